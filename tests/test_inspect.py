from __future__ import annotations

import json
import pickle
import statistics
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kinegraph.data import arrays
from kinegraph.data.body import find_body
from kinegraph.data.checks import check_dataset
from kinegraph.data.inspect import format_report, inspect_dataset
from kinegraph.data.labels import read_labels
from kinegraph.errors import DataError
from kinegraph.skeleton.layouts import get_layout

CLASSES = ["sit", "walk", "sit", "jump", "sit", "walk", "sit", "sit"]


def make_array() -> np.ndarray:
    """Eight clips of unequal length with one or two people, missing joints, and one empty clip."""
    random = np.random.default_rng(5)
    array = random.uniform(-2, 3, (8, 3, 10, 34, 2)).astype(np.float32)
    for clip, length in enumerate([10, 4, 7, 1, 0, 9, 10, 5]):
        array[clip, :, length:] = 0
    array[[0, 2, 5], ..., 1] = 0
    array[7, :, :3] = 0  # starts with empty frames
    array[:, :, :, 4] *= random.random((8, 1, 10, 2)) < 0.5
    array[:, :, 2, 9] = 0
    array[6, 1, 3, 5, 0] = 0  # one channel that happens to be zero is not a missing joint
    return array


def write_labels(path: Path, classes: list[Any]) -> Path:
    path.write_text(json.dumps({"names": [f"n{i}" for i in range(len(classes))], "labels": classes}))
    return path


@pytest.fixture(params=[None, 500])
def report(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    if request.param:
        # Blocks of 500 values cut every clip into several pieces.
        monkeypatch.setattr(
            "kinegraph.data.inspect.iterate_blocks", lambda array: arrays.iterate_blocks(array, request.param)
        )
    np.save(tmp_path / "a.npy", make_array())
    return inspect_dataset(tmp_path / "a.npy", write_labels(tmp_path / "a.json", CLASSES))


def test_the_report_equals_a_count_by_hand(report: dict[str, Any]) -> None:
    array = make_array()
    lengths, people = [], [0, 0, 0]
    missing, present = [0] * 34, 0
    for clip in array:
        frames = [t + 1 for t in range(10) if clip[:, t].any()]
        lengths.append(frames[-1] if frames else 0)
        people[sum(bool(clip[..., m].any()) for m in range(2))] += 1
        for t in range(10):
            for m in range(2):
                if clip[:, t, :, m].any():
                    present += 1
                    for v in range(34):
                        missing[v] += not clip[:, t, v, m].any()
    used = [length for length in lengths if length]
    assert report["lengths"] == {"min": min(used), "median": statistics.median(used), "max": max(used)}
    assert report["people"] == people == [1, 3, 4]
    assert report["missing_joints"] == pytest.approx([count / present for count in missing])
    assert sum(share > 0 for share in report["missing_joints"]) == 2
    assert report["empty_clips"] == [4]
    for channel in range(3):
        there = array.any(axis=1)
        values = array[:, channel][there]
        assert report["ranges"][channel] == {"min": float(values.min()), "max": float(values.max())}
    assert report["shape"] == {"clips": 8, "channels": 3, "frames": 10, "joints": 34, "people": 2}
    assert report["dtype"] == "float32" and report["nan"] == report["infinite"] == 0
    assert report["layouts"] == ["nvidia"] and len(report["joint_names"]) == 34
    assert report["classes"] == [
        {"label": 0, "name": "jump", "count": 1},
        {"label": 1, "name": "sit", "count": 5},
        {"label": 2, "name": "walk", "count": 2},
    ]
    assert len(report["problems"]) == 1 and "1 clip is empty" in report["problems"][0]


def test_the_report_is_plain_data(report: dict[str, Any]) -> None:
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_the_text_tells_what_the_report_holds(report: dict[str, Any]) -> None:
    text = format_report(report)
    lines = text.splitlines()
    assert max(len(line) for line in lines if ".npy" not in line and ".json" not in line) <= 100
    assert "8 clips x 3 channels x 10 frames x 34 joints x 2 people, float32" in text
    assert "1 to 10 frames, median 7" in text
    assert "1 clip with 0, 3 clips with 1, 4 clips with 2" in text
    bars = {line.split()[1]: line.count("#") for line in lines if line.strip()[:1].isdigit() and "%" in line}
    assert bars["sit"] == 40 and bars["walk"] == 16 and bars["jump"] == 8
    assert f"4 {report['joint_names'][4]}" in text and f"9 {report['joint_names'][9]}" in text
    assert "1 clip is empty (all zeros): 4" in text


def test_faults_are_described_and_not_raised(tmp_path: Path) -> None:
    array = np.ones((4, 2, 5, 26, 1), np.float64)
    array[1, 0, 2, 3, 0] = np.nan
    array[2, 1, 0, 0, 0] = np.inf
    np.save(tmp_path / "a.npy", array)
    (tmp_path / "a.pkl").write_bytes(pickle.dumps((["x", "y", "z"], [0, -1, 3])))
    report = inspect_dataset(tmp_path / "a.npy", tmp_path / "a.pkl")
    assert report["nan"] == report["infinite"] == 1
    assert report["ranges"] == [{"min": 1.0, "max": 1.0}] * 2
    assert report["layouts"] == [] and report["joint_names"] is None
    told = "\n".join(report["problems"])
    for words in (
        "3 labels for 4 clips",
        "1 labels below 0",
        "clip 1, channel 0, frame 2, joint 3",
        "26 joints",
    ):
        assert words in told
        assert words in format_report(report)
    json.dumps(report, allow_nan=False)


@pytest.mark.parametrize("block_values", [arrays.BLOCK_VALUES, 300])
@pytest.mark.parametrize("joints", [17, 34])
@pytest.mark.parametrize("has_score", [False, True])
def test_odd_first_frames_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_values: int, joints: int, has_score: bool
) -> None:
    """Of layouts that are known, by the trunk (34 joints); where several have as many joints, by the spread (17)."""
    monkeypatch.setattr(
        "kinegraph.data.inspect.iterate_blocks", lambda array: arrays.iterate_blocks(array, block_values)
    )
    random = np.random.default_rng(2)
    pose = random.normal(size=(3, 1, joints, 1))
    clips = pose * random.uniform(0.8, 1.2, (9, 1, 12, 1, 2))
    clips *= np.linspace(1, 10, 9)[:, None, None, None, None]  # who is far away is small: that is usual
    clips[0, ..., 1] = 0  # nobody there
    clips[1, :, :5] = 0  # comes late
    clips[2, :, 0, :, 1] *= 0.02
    clips[3, :, :4], clips[3, :, 4, :, 0] = 0, 10 * clips[3, :, 4, :, 0]
    clips[4, :, 0] *= 0.5  # not so far from the others
    clips[5, :, 3] *= 0.1  # not the first frame
    clips[6, :, :11], clips[6, :, 0] = 0, 0.1 * clips[6, :, 0]  # alone at the start, then the last frame
    is_there = clips.any(axis=(1, 3))[:, None, :, None]
    clips += 100 * is_there  # away from the origin
    if has_score:
        clips[:, 2] = random.random((9, 12, joints, 2)) * is_there[:, 0]
    np.save(tmp_path / "a.npy", clips.astype(np.float32))
    report = inspect_dataset(tmp_path / "a.npy")
    assert report["odd_first_frames"] == [2, 3, 6]
    (problem,) = [text for text in report["problems"] if "first frame" in text]
    assert "in 3 clips" in problem and ": 2, 3, 6." in problem and "input.scale=first" in problem
    assert problem in format_report(report)


@pytest.mark.parametrize("block_values", [arrays.BLOCK_VALUES, 300])
@pytest.mark.parametrize("place", [0, 1, 5])
@pytest.mark.parametrize("is_depth", [False, True])
def test_the_whole_file_says_whether_the_last_channel_is_a_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_values: int, place: int, is_depth: bool
) -> None:
    """A person is small in one first frame, in the last channel only; just the last clip tells what that holds."""
    monkeypatch.setattr(
        "kinegraph.data.inspect.iterate_blocks", lambda array: arrays.iterate_blocks(array, block_values)
    )
    random = np.random.default_rng(4)
    clips = random.uniform(-1, 1, (7, 3, 1, 17, 1)).repeat(12, axis=2)
    clips[:, :2] *= 0.01
    clips[:6, 2] = np.abs(clips[:6, 2])
    clips[place, 2, 0] *= 0.01
    clips[6, 2] *= 3 if is_depth else 0
    clips[3, 2] = 0  # nothing is known of the channel there
    np.save(tmp_path / "a.npy", clips.astype(np.float32))
    report = inspect_dataset(tmp_path / "a.npy")
    assert report["odd_first_frames"] == ([place] if is_depth else [])
    assert report["score_channel"] == (-1 if is_depth else 2)
    assert ("input.score_channel=2" in format_report(report)) != is_depth


def test_joints_with_a_place_and_no_score_are_told(tmp_path: Path) -> None:
    clips = np.random.default_rng(1).uniform(0.1, 1, (2, 3, 10, 17, 1)).astype(np.float32)
    np.save(tmp_path / "scored.npy", clips)
    clips[:, 2, :, 3:5] = 0  # a place without a score
    clips[1, :, :, 9] = 0  # missing altogether
    np.save(tmp_path / "unscored.npy", clips)
    told = {name: inspect_dataset(tmp_path / f"{name}.npy") for name in ("scored", "unscored")}
    assert told["scored"]["zero_scores"] == 0 and "score_threshold" not in format_report(told["scored"])
    assert told["unscored"]["zero_scores"] == pytest.approx(40 / 330)
    assert "12.1% of the joints have a place and score 0: with input.score_threshold" in format_report(told["unscored"])
    np.save(tmp_path / "depth.npy", 3 * clips - 1)
    assert inspect_dataset(tmp_path / "depth.npy")["zero_scores"] is None


def test_axes_in_another_order_are_recognised(tmp_path: Path) -> None:
    clips = np.random.default_rng(1).standard_normal((2, 60, 17, 3, 1)).astype(np.float32)  # (N, T, V, C, M)
    np.save(tmp_path / "a.npy", clips)
    report = inspect_dataset(tmp_path / "a.npy")
    (problem,) = report["problems"]
    assert "numpy.transpose puts axes in order" in problem and "60 channels" in problem
    text = format_report(report)
    assert "47 more channels" in text and "channel 13" not in text


def test_a_bad_trunk_in_a_first_frame_is_odd(tmp_path: Path) -> None:
    """The rest of the person is as always, so that only the layout tells."""
    layout = get_layout("kinect_v1")
    clip = np.random.default_rng(0).normal(size=(1, 3, 1, 20, 1)).repeat(30, axis=2)
    low, high = find_body(layout).trunk
    clip[0, :, 0, list(high)] = clip[0, :, 0, list(low)] + 0.001
    np.save(tmp_path / "a.npy", np.concatenate([clip, clip[:, :, ::-1]]).astype(np.float32))
    assert inspect_dataset(tmp_path / "a.npy")["odd_first_frames"] == [0]


def test_an_array_of_zeros_without_labels(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((3, 2, 5, 17, 1), np.float16))
    report = inspect_dataset(tmp_path / "a.npy")
    assert report["lengths"] == {"min": 0, "median": 0.0, "max": 0}
    assert report["people"] == [3, 0] and report["ranges"] == [None, None]
    assert report["classes"] is None and report["label_path"] is None
    assert set(report["layouts"]) >= {"human3.6m", "coco"} and report["joint_names"] is None
    text = format_report(report)
    assert "all zeros" in text and "Clips per class" not in text


def test_unreadable_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        inspect_dataset(tmp_path / "a.npy")
    with pytest.raises(DataError, match=r"(?s)a\.npy: got no such file.*a\.pkl: got no such file"):
        inspect_dataset(tmp_path / "a.npy", tmp_path / "a.pkl")
    np.save(tmp_path / "a.npy", make_array())
    with pytest.raises(DataError, match="no such file"):
        inspect_dataset(tmp_path / "a.npy", tmp_path / "a.pkl")


def test_memory_stays_flat(tmp_path: Path) -> None:
    # 240 MB that take no room on disk: a hole in the file reads as zeros.
    mapped = np.lib.format.open_memmap(tmp_path / "a.npy", "w+", np.float32, (2, 3, 294118, 34, 1))
    mapped[1, 2, -1, -1, 0] = 7
    mapped.flush()
    size_bytes = mapped.nbytes
    del mapped
    assert size_bytes > 230e6
    tracemalloc.start()
    try:
        report = inspect_dataset(tmp_path / "a.npy")
        info = check_dataset(tmp_path / "a.npy", None)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert report["lengths"]["max"] == 294118 and report["empty_clips"] == [0]
    assert len(info.warnings) == 1
    assert peak_bytes < size_bytes / 2


def test_real_recordings_are_described(shared: Path, tmp_path: Path) -> None:
    path = shared / "data" / "nw_ucla.npz"
    if not path.is_file():
        pytest.skip(f"{path} is missing")
    labels = read_labels(path)
    assert len(labels.names) == 1484 and labels.names[0] == "a05_s04_e02_v01"
    with np.load(path, allow_pickle=False) as archive:
        frames, lengths, numbers = archive["frames"], archive["length"][:100], archive["label"]
    assert np.array_equal(labels.labels, numbers)
    array = np.zeros((100, 3, lengths.max(), 20, 1), np.float32)
    for clip, (end, length) in enumerate(zip(np.cumsum(lengths), lengths, strict=True)):
        array[clip, :, :length, :, 0] = frames[end - length : end].transpose(2, 0, 1)
    np.save(tmp_path / "a.npy", array)
    report = inspect_dataset(tmp_path / "a.npy", path)
    assert report["layouts"] == ["kinect_v1"]
    assert report["lengths"]["max"] == lengths.max() and report["lengths"]["median"] == np.median(lengths)
    assert sum(entry["count"] for entry in report["classes"]) == 1484
    assert report["problems"] == [f"{path}: 1484 labels for 100 clips."]
    assert "1484 labels for 100 clips" in format_report(report)
