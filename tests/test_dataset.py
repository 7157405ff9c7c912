from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from kinegraph.data import arrays, order
from kinegraph.data.arrays import NonFiniteCount, iterate_blocks
from kinegraph.data.dataset import (
    Batch,
    ClipDataset,
    EpochBatchSampler,
    EvaluationShard,
    check_dataset,
    infer_classes,
    open_array,
    pass_batch,
)
from kinegraph.data.labels import Labels
from kinegraph.data.pipeline import InputPipeline
from kinegraph.errors import DataError, Problem
from kinegraph.skeleton.layouts import get_layout

SHAPE = (11, 3, 6, 34, 1)


def make_array(shape: tuple[int, ...] = SHAPE, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(0).uniform(0.1, 1, shape).astype(dtype)


def save(path: Path, array: np.ndarray) -> Path:
    np.save(path, array)
    return path


def save_labels(path: Path, numbers: list[int]) -> Path:
    path.write_bytes(pickle.dumps(([f"name_{i}" for i in range(len(numbers))], numbers)))
    return path


def catch(function: Callable[[], object]) -> tuple[Problem, ...]:
    with pytest.raises(DataError) as caught:
        function()
    return caught.value.problems


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", ">f4"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_open_array_maps_the_file(tmp_path: Path, dtype: str, order: str) -> None:
    array = np.asarray(make_array(dtype=dtype), order=order)  # type: ignore[call-overload]
    opened = open_array(save(tmp_path / "a.npy", array))
    assert isinstance(opened, np.memmap) and not opened.flags.writeable
    assert opened.dtype == array.dtype and np.array_equal(opened, array)


def test_a_truncated_file_tells_the_missing_bytes(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npy", make_array())
    whole = path.read_bytes()
    for missing in (1, 1000, len(whole) - 200):
        path.write_bytes(whole[: len(whole) - missing])
        (problem,) = catch(lambda: open_array(path))
        assert problem.where == str(path)
        assert problem.got == f"{len(whole) - missing} bytes: {missing} bytes are missing"
        assert problem.expected.startswith(f"{len(whole)} bytes")
    path.write_bytes(whole + b"more")  # harmless
    assert open_array(path).shape == SHAPE


def test_a_header_that_promises_the_impossible_is_only_a_message(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    for shape in [(2**62, 3, 4, 5, 6), (2**64, 1, 1, 1, 1)]:
        with path.open("wb") as stream:
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_2_0(stream, header)
        (problem,) = catch(lambda: open_array(path))
        assert "missing" in problem.got


@pytest.mark.parametrize(
    ("array", "words", "hint"),
    [
        (make_array((4, 3, 6, 34)), "4 axes", "numpy.newaxis"),
        (make_array((4, 3)), "2 axes", "clips, channels, frames, joints, people"),
        (np.zeros(SHAPE, np.int64), "dtype int64", "astype(numpy.float32)"),
        (np.zeros(SHAPE, np.complex64), "dtype complex64", "astype"),
        (np.zeros(SHAPE, bool), "dtype bool", "astype"),
        (np.zeros((0, 3, 6, 34, 1), np.float32), "no clips", ""),
        (np.zeros((4, 3, 0, 34, 0), np.float32), "no frames, people", ""),
        (np.array([np.zeros(3), np.zeros(4)], dtype=object), "Python objects", "padded"),
    ],
)
def test_other_arrays_are_refused(tmp_path: Path, array: np.ndarray, words: str, hint: str) -> None:
    (problem,) = catch(lambda: open_array(save(tmp_path / "a.npy", array)))
    assert words in problem.got and hint in problem.hint


def test_several_faults_of_a_file_are_told_together(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npy", np.zeros((4, 3, 6, 34), np.int32))
    path.write_bytes(path.read_bytes()[:-5])
    assert len(catch(lambda: open_array(path))) == 3


def test_files_that_are_no_arrays_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    assert catch(lambda: open_array(path))[0].got == "no such file"
    assert catch(lambda: open_array(tmp_path))[0].got == "a folder"
    whole = save(path, make_array()).read_bytes()
    for content, words in [
        (b"", "empty"),
        (b"PK\x03\x04aaaaaaaaaaaa", "zip"),
        (pickle.dumps([1, 2]), "pickle"),
        (b"1,2,3\n", "starts with"),
        (whole[:40], "damaged"),
        (whole.replace(b"descr", b"DESCR"), "damaged"),
        (b"\x93NUMPY\x09\x00" + whole[8:], "damaged"),
    ]:
        path.write_bytes(content)
        assert words in catch(lambda: open_array(path))[0].got


@given(
    shape=st.tuples(*[st.integers(1, 6)] * 5),
    values=st.integers(1, 400),
)
@settings(max_examples=60, deadline=None)
def test_blocks_cover_the_array_once_and_stay_small(shape: tuple[int, ...], values: int) -> None:
    array = np.arange(np.prod(shape), dtype=np.float64).reshape(shape)
    rebuilt = np.full(shape, -1.0)
    for clips, frames, block in iterate_blocks(array, values):
        assert block.size <= max(values, array[0, :, 0].size)
        assert (rebuilt[clips, :, frames] == -1).all()
        rebuilt[clips, :, frames] = block
    assert np.array_equal(rebuilt, array)


@given(
    places=st.lists(st.tuples(*[st.integers(0, 3)] * 5, st.sampled_from([np.nan, np.inf, -np.inf])), max_size=8),
    values=st.integers(1, 600),
)
@settings(max_examples=60, deadline=None)
def test_non_finite_values_are_counted_over_blocks(
    places: list[tuple[int, int, int, int, int, float]], values: int
) -> None:
    array = np.ones((4, 4, 4, 4, 4), np.float32)
    for *place, value in places:
        array[tuple(place)] = value
    count = NonFiniteCount()
    for clips, frames, block in iterate_blocks(array, values):
        count.add(block, clips.start, frames.start)
    assert count.nan == np.isnan(array).sum() and count.infinite == np.isinf(array).sum()
    bad = ~np.isfinite(array)
    assert count.clips == bad.any(axis=(1, 2, 3, 4)).sum()
    if count.first is None:
        assert not bad.any() and count.as_problem("a") is None
    else:
        assert bad[count.first] and count.first[0] == np.argwhere(bad)[0][0]


def test_a_good_data_set_passes(tmp_path: Path) -> None:
    data, labels = (
        save(tmp_path / "a.npy", make_array()),
        save_labels(tmp_path / "a.pkl", [0, 1, 2] * 3 + [0, 1]),
    )
    info = check_dataset(data, labels, layout=get_layout("nvidia"), num_channels=3, num_classes=3)
    assert info.shape == SHAPE and info.dtype == "float32" and info.warnings == []
    assert info.labels is not None and info.labels.labels.tolist() == [0, 1, 2] * 3 + [0, 1]
    assert check_dataset(data, None).labels is None


def test_all_problems_of_both_files_come_together(tmp_path: Path) -> None:
    array = make_array((11, 2, 6, 25, 1))
    array[4, 1, 3, 7, 0] = np.nan
    array[9, 0, 0, 0, 0] = np.inf
    data, labels = save(tmp_path / "a.npy", array), save_labels(tmp_path / "a.pkl", [0, 1, 7])
    problems = catch(lambda: check_dataset(data, labels, layout=get_layout("nvidia"), num_channels=3, num_classes=6))
    label, joints, channels, count, values = problems
    assert label.where == str(labels) and label.got == "1 label outside (7), the first at clip 2 (name_2)"
    assert "0 to 5" in label.expected
    assert joints.got == "25 joints in shape (11, 2, 6, 25, 1)" and "34 joints" in joints.expected
    assert "ntu-rgb+d" in joints.hint and "openpose_25" in joints.hint and "coco" not in joints.hint
    assert channels.got.startswith("2 channels") and "model.input_channels=2" in channels.hint
    assert count.where == str(labels) and count.got == "3 labels" and count.expected.startswith("11,")
    assert values.where == str(data) and values.got == (
        "1 NaN and 1 infinite values in 2 clips, the first at clip 4, channel 1, frame 3, joint 7, person 0"
    )


def test_two_unreadable_files_are_both_named(tmp_path: Path) -> None:
    problems = catch(lambda: check_dataset(tmp_path / "a.npy", tmp_path / "b.pkl"))
    assert {problem.where for problem in problems} == {str(tmp_path / "a.npy"), str(tmp_path / "b.pkl")}


def test_joints_that_fit_no_layout_lead_to_a_yaml_file(tmp_path: Path) -> None:
    data = save(tmp_path / "a.npy", make_array((2, 3, 4, 999, 1)))
    (problem,) = catch(lambda: check_dataset(data, None, layout=get_layout("coco")))
    assert "YAML" in problem.hint


def test_axes_in_another_order_are_no_channels(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((4, 30, 20, 3, 1), np.float32))  # frames, joints, channels
    options = {"layout": get_layout("kinect_v1"), "num_channels": 3}
    with pytest.raises(DataError, match=r"30 channels .*numpy\.transpose") as caught:
        check_dataset(tmp_path / "a.npy", None, **options)
    assert len(caught.value.problems) == 1
    np.save(tmp_path / "b.npy", np.ones((4, 30, 5, 20, 1), np.float32))
    assert check_dataset(tmp_path / "b.npy", None, layout=get_layout("kinect_v1"), num_channels=30).shape[1] == 30


def test_values_beyond_float32_are_found(tmp_path: Path) -> None:
    array = make_array(dtype="float64")
    array[1, 2, 3, 4, 0] = -1e39
    (problem,) = catch(lambda: check_dataset(save(tmp_path / "a.npy", array), None))
    assert "0 NaN and 1 infinite" in problem.got and "clip 1, channel 2, frame 3, joint 4" in problem.got


@pytest.mark.parametrize("block_values", [None, 100])
def test_empty_clips_are_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_values: int | None) -> None:
    if block_values:
        # The default of iterate_blocks is bound at import, so replace the function.
        monkeypatch.setattr(
            "kinegraph.data.checks.iterate_blocks", lambda array: arrays.iterate_blocks(array, block_values)
        )
    array = make_array()
    array[[2, 7]] = 0
    array[3, :, :5] = 0  # only its last frame holds something
    info = check_dataset(save(tmp_path / "a.npy", array), None)
    assert info.warnings == [f"{tmp_path / 'a.npy'}: 2 clips are empty (all zeros): 2, 7"]
    array[:9] = 0
    info = check_dataset(save(tmp_path / "a.npy", array), None)
    assert info.warnings[0].endswith("9 clips are empty (all zeros): 0, 1, 2, 3, 4, ...")


@pytest.mark.parametrize(
    ("numbers", "num_classes", "label_map", "words"),
    [
        ([-1, 0], None, None, "1 label outside (-1)"),
        ([0, 6], 6, None, "1 label outside (6)"),
        ([1, 2], 2, None, "1 label outside (2)"),
        ([0, 2], None, {"a": 0, "b": 1}, "1 label outside (2)"),
        ([0, 1], 3, {"a": 0, "b": 1}, "2 class names"),
        ([0, 1], 1, {"a": 0, "b": 1}, "2 class names"),
        ([0, 1], 2, {"a": 0, "b": 2}, "the numbers 0, 2"),
        ([0, 1], None, {"a": 1, "b": 1}, "the numbers 1, 1"),
    ],
)
def test_labels_and_classes_must_fit(
    tmp_path: Path, numbers: list[int], num_classes: int | None, label_map: dict[str, int] | None, words: str
) -> None:
    data, path = (
        save(tmp_path / "a.npy", make_array((2, 3, 4, 17, 1))),
        save_labels(tmp_path / "a.pkl", numbers),
    )
    problems = catch(lambda: check_dataset(data, path, num_classes=num_classes, label_map=label_map))
    assert words in problems[0].got
    labels = Labels(["x", "y"], np.array(numbers), None)
    assert words in catch(lambda: infer_classes(labels, label_map, num_classes))[0].got
    if numbers == [1, 2]:
        assert "subtract 1" in problems[0].hint


def test_classes_are_inferred() -> None:
    labels = Labels(["x", "y", "z"], np.array([0, 2, 1]), None)
    assert infer_classes(labels) == (3, {"class_0": 0, "class_1": 1, "class_2": 2})
    assert infer_classes(labels, None, 4) == (4, {f"class_{i}": i for i in range(4)})
    given_map = {"c": 2, "a": 0, "b": 1}
    assert infer_classes(labels, given_map) == (3, given_map)
    named = Labels(["x", "y", "z"], np.array([0, 2, 1]), ["jump", "sit", "walk"])
    assert infer_classes(named) == (3, {"jump": 0, "sit": 1, "walk": 2})
    assert infer_classes(named, None, 3) == (3, {"jump": 0, "sit": 1, "walk": 2})
    assert "3 class names" in catch(lambda: infer_classes(named, None, 5))[0].got
    huge = Labels(["x"], np.array([10**6]), None)
    assert "1000000" in catch(lambda: infer_classes(huge))[0].got


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", ">f4"])
def test_a_batch_holds_the_clips_in_the_order_asked_for(tmp_path: Path, dtype: str) -> None:
    array = make_array(dtype=dtype)
    dataset = ClipDataset(save(tmp_path / "a.npy", array), np.arange(11) * 10)
    assert len(dataset) == 11
    for indices in ([7, 0, 10, 3, 7], [4], []):
        batch = dataset.__getitems__(indices)
        assert batch.data.dtype == torch.float32 and batch.data.is_contiguous()
        assert batch.data.shape == (len(indices), *SHAPE[1:])
        assert np.array_equal(batch.data.numpy(), array[indices].astype(np.float32))
        assert batch.labels.dtype == batch.index.dtype == torch.int64
        assert batch.labels.tolist() == [10 * i for i in indices] and batch.index.tolist() == indices
    assert torch.equal(dataset[3].data, dataset.__getitems__([3]).data)
    for wrong in (-1, 11):
        with pytest.raises(IndexError):
            dataset.__getitems__([0, wrong])


@pytest.mark.parametrize(("num_workers", "context"), [(0, None), (2, "fork"), (1, "spawn")])
def test_a_loader_gives_the_same_batches_with_and_without_workers(
    tmp_path: Path, num_workers: int, context: str | None
) -> None:
    array = make_array()
    dataset = ClipDataset(save(tmp_path / "a.npy", array), np.arange(11), InputPipeline(3, 34))
    sampler = EpochBatchSampler(11, 4, seed=3, epoch=1, shuffle=True, drop_last=False)
    loader: DataLoader[Batch] = DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=pass_batch,
        num_workers=num_workers,
        multiprocessing_context=context,
    )
    batches = list(loader)
    assert [batch.index.tolist() for batch in batches] == list(sampler)
    assert len(batches) == len(loader) == 3
    for batch in batches:
        assert isinstance(batch, Batch)
        assert np.array_equal(batch.data.numpy(), array[batch.index.numpy()])
        assert torch.equal(batch.labels, batch.index)


def test_the_memory_map_is_reopened_and_not_pickled(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npy", make_array((200, 3, 6, 34, 1)))
    dataset = ClipDataset(path)
    content = pickle.dumps(dataset)
    assert len(content) < path.stat().st_size / 50
    copy = pickle.loads(content)
    assert copy.array is None
    assert torch.equal(copy.__getitems__([5, 1]).data, dataset.__getitems__([5, 1]).data)
    assert isinstance(copy.array, np.memmap)
    assert dataset.__getitems__([5, 1]).labels.tolist() == [-1, -1]
    changed = pickle.loads(content)
    save(path, make_array((199, 3, 6, 34, 1)))
    assert "(199, 3" in catch(lambda: changed.__getitems__([0]))[0].got


def test_the_dataset_refuses_foreign_labels_and_nan(tmp_path: Path) -> None:
    array = make_array()
    array[6, 0, 0, 0, 0] = np.nan
    path = save(tmp_path / "a.npy", array)
    catch(lambda: ClipDataset(path, np.arange(10)))
    dataset = ClipDataset(path, pipeline=InputPipeline(3, 34))
    dataset.__getitems__([5])
    assert "1 NaN" in catch(lambda: dataset.__getitems__([5, 6]))[0].got


SIZES = {
    "num_samples": st.integers(1, 60),
    "batch_size": st.integers(1, 12),
    "world_size": st.integers(1, 4),
    "shuffle": st.booleans(),
    "drop_last": st.booleans(),
}


@given(**SIZES, seed=st.integers(0, 10**9), epoch=st.integers(0, 1000))
@settings(max_examples=150, deadline=None)
def test_ranks_share_one_order_in_equal_batches(
    num_samples: int, batch_size: int, world_size: int, shuffle: bool, drop_last: bool, seed: int, epoch: int
) -> None:
    ranks = [
        list(
            EpochBatchSampler(
                num_samples,
                batch_size,
                seed=seed,
                epoch=epoch,
                shuffle=shuffle,
                drop_last=drop_last,
                rank=rank,
                world_size=world_size,
            )
        )
        for rank in range(world_size)
    ]
    global_size = batch_size * world_size
    assert len({len(batches) for batches in ranks}) == 1 and len(ranks[0]) >= 1
    together = [[clip for part in parts for clip in part] for parts in zip(*ranks, strict=True)]
    for parts in zip(*ranks, strict=True):
        assert len({len(part) for part in parts}) == 1 and 1 <= len(parts[0]) <= batch_size
    order = [clip for batch in together for clip in batch]
    # On one process the order is the same permutation, so the number of ranks does not change what is learned
    # from.
    alone = EpochBatchSampler(num_samples, global_size, seed=seed, epoch=epoch, shuffle=shuffle, drop_last=drop_last)
    single = [clip for batch in alone for clip in batch]
    assert order[: len(single)] == single and len(order) - len(single) < world_size
    assert sorted(set(single)) == sorted(single)
    if drop_last and num_samples >= global_size:
        assert len(single) == num_samples // global_size * global_size
    else:
        assert sorted(single) == list(range(num_samples))
    if not shuffle:
        assert single == list(range(len(single)))


@given(num_samples=st.integers(1, 60), batch_size=st.integers(1, 12), least=st.integers(0, 90), data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_resumed_epoch_goes_on_where_it_was(
    num_samples: int, batch_size: int, least: int, data: st.DataObject
) -> None:
    whole = EpochBatchSampler(num_samples, batch_size, seed=1, epoch=4, min_batches=least)
    start = data.draw(st.integers(0, whole.batches_per_epoch))
    rest = EpochBatchSampler(num_samples, batch_size, seed=1, epoch=4, start_batch=start, min_batches=least)
    assert list(rest) == list(whole)[start:] and len(rest) == len(whole) - start
    assert list(rest) == list(rest), "a second pass gives the same batches"


@given(num_samples=st.integers(1, 40), batch_size=st.integers(1, 12), least=st.integers(0, 90))
@settings(max_examples=60, deadline=None)
def test_epochs_of_several_passes_are_as_many_epochs_of_one(num_samples: int, batch_size: int, least: int) -> None:
    options: dict[str, Any] = {"num_samples": num_samples, "batch_size": batch_size, "seed": 1}
    epochs = [EpochBatchSampler(**options, epoch=epoch, min_batches=least) for epoch in range(2)]
    per_pass = len(EpochBatchSampler(**options))
    passes = -(-max(least, 1) // per_pass)
    assert len(epochs[0]) == passes * per_pass
    plain = [EpochBatchSampler(**options, epoch=number) for number in range(2 * passes)]
    assert list(itertools.chain(*epochs)) == list(itertools.chain(*plain))
    numbers = [epoch.find_pass(batch) for epoch in epochs for batch in range(len(epoch))]
    assert numbers == [number for number in range(2 * passes) for _ in range(per_pass)]


def test_the_order_depends_on_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        return list(EpochBatchSampler(50, 50, seed=seed, epoch=epoch))

    assert order(1, 0) == order(1, 0)
    assert len({str(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    expected = np.random.Generator(np.random.PCG64([1234, 2])).permutation(50).tolist()
    assert order(1234, 2) == [expected]


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_samples": 0},
        {"batch_size": 0},
        {"seed": -1},
        {"epoch": -1},
        {"start_batch": 4},
        {"start_batch": -1},
        {"rank": 1},
        {"rank": -1},
    ],
)
def test_the_sampler_refuses_impossible_arguments(wrong: dict[str, int]) -> None:
    good = {"num_samples": 10, "batch_size": 3, "seed": 0, "epoch": 0}
    assert len(EpochBatchSampler(**good)) == 3  # type: ignore[arg-type]
    with pytest.raises(ValueError):
        EpochBatchSampler(**{**good, **wrong})  # type: ignore[arg-type]


@given(num_samples=st.integers(1, 60), batch_size=st.integers(1, 12), world_size=st.integers(1, 5))
@settings(max_examples=150, deadline=None)
def test_evaluation_counts_every_clip_once(num_samples: int, batch_size: int, world_size: int) -> None:
    shards = [EvaluationShard(num_samples, batch_size, rank, world_size) for rank in range(world_size)]
    sizes = [[len(clips) for clips, _ in shard] for shard in shards]
    assert all(size == sizes[0] for size in sizes) and min(sizes[0]) >= 1 and max(sizes[0]) <= batch_size
    assert all(0 <= clip < num_samples for shard in shards for clips in shard.batches for clip in clips)
    counted = [clip for shard in shards for clips, valid in shard for clip in clips[:valid]]
    assert counted == list(range(num_samples))
    if world_size == 1:
        assert shards[0].valid_counts == sizes[0]
    assert len(shards[0]) == len(sizes[0])


@given(
    num_samples=st.integers(1, 5000),
    seed=st.integers(0, 10**6),
    batch_size=st.integers(1, 300),
    world_size=st.integers(1, 3),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_shuffled_blocks_hold_every_clip_once(
    num_samples: int, seed: int, batch_size: int, world_size: int, data: st.DataObject
) -> None:
    def list_batches(rank: int = 0, **options: int) -> list[list[int]]:
        sampler = EpochBatchSampler(
            *(num_samples, batch_size),
            **{"seed": seed, "epoch": 3, "drop_last": False, "how": "blocks", **options},
            rank=rank,
            world_size=world_size,
        )
        return list(sampler)

    with mock.patch.multiple(order, BLOCK_CLIPS=16, WINDOW_BLOCKS=4):
        ranks = [list_batches(rank) for rank in range(world_size)]
        start = data.draw(st.integers(0, len(ranks[0])))
        assert list_batches(start_batch=start) == ranks[0][start:]
        assert list_batches() == ranks[0]
        if num_samples > 200:
            assert list_batches(epoch=4) != ranks[0]
    together = [clip for parts in zip(*ranks, strict=True) for part in parts for clip in part]
    assert sorted(set(together)) == list(range(num_samples)) and len(together) - num_samples < world_size
    # Wherever one reads, the clips are of few blocks
    window = 16 * 4
    for first in range(0, num_samples - window, window):
        blocks = {clip // 16 for clip in together[first : first + window]}
        assert len(blocks) <= 2 * 4 + 1


def test_shuffled_blocks_are_mixed_well() -> None:
    taken = order.BlockOrder(100_000, seed=1, epoch=0).take(0, 100_000)
    neighbours = (np.diff(taken) == 1).mean()
    assert neighbours < 0.002
    # A batch of 64 clips comes from about as many blocks as 64 draws from a window of 64 blocks would
    batches = taken[: 64 * 1000].reshape(-1, 64) // order.BLOCK_CLIPS
    distinct = np.mean([len(set(batch)) for batch in batches])
    assert distinct == pytest.approx(64 * (1 - (1 - 1 / 64) ** 64), rel=0.05)


def test_runs_of_neighbours_are_read_at_once_and_copied(tmp_path: Path) -> None:
    array = make_array()
    dataset = ClipDataset(save(tmp_path / "a.npy", array))
    batch = dataset.__getitems__([3, 4, 5])
    assert np.array_equal(batch.data.numpy(), array[3:6])
    batch.data[:] = 0
    assert np.array_equal(dataset.__getitems__([3]).data.numpy(), array[3:4])


def test_pages_are_released_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kinegraph.data.dataset.RELEASED_BYTES", SHAPE[1] * SHAPE[2] * SHAPE[3] * 4 * 2)
    array = make_array()
    dataset = ClipDataset(save(tmp_path / "a.npy", array))
    for _ in range(3):
        for batch in EpochBatchSampler(11, 3, seed=0, drop_last=False):
            assert np.array_equal(dataset.__getitems__(batch).data.numpy(), array[batch])


def test_of_a_large_array_some_clips_are_checked_and_each_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = make_array((40, 3, 2, 17, 1))
    array[0] = 0
    array[12, 1, 1, 3, 0] = np.nan
    array[13, 1, 1, 3, 0] = np.nan
    path = save(tmp_path / "a.npy", array)
    assert "in 2 clips, the first at clip 12" in catch(lambda: check_dataset(path, None))[0].got
    values = array[0].size
    monkeypatch.setattr("kinegraph.data.checks.MAX_SCANNED_VALUES", 39 * values)
    monkeypatch.setattr("kinegraph.data.checks.SAMPLED_VALUES", 10 * values)
    (problem,) = catch(lambda: check_dataset(path, None))
    assert "1 NaN and 0 infinite values in 1 clips, the first at clip 12, channel 1, frame 1, joint 3" in problem.got
    assert "(of the 10 clips looked at, one in 4)" in problem.got
    array[12] = 1
    info = check_dataset(save(path, array), None)
    assert info.warnings == [f"{path}: 1 clip is empty (all zeros): 0 of the 10 looked at"]
    dataset = ClipDataset(path, pipeline=InputPipeline(3, 17))
    assert "1 NaN" in catch(lambda: dataset.__getitems__([14, 13]))[0].got
