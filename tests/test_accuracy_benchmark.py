"""The accuracy benchmark: which clips train, choose and test; that a test part is read once; what a hash covers."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import accuracy  # noqa: E402
import accuracy_data  # noqa: E402
import accuracy_protocol  # noqa: E402
import baseline  # noqa: E402
import view_folds  # noqa: E402
from accuracy_data import SOURCES, SPLITS, Recordings, Source  # noqa: E402
from accuracy_protocol import PartOutcome, plan_recipe  # noqa: E402
from kinegraph.models import build_model  # noqa: E402
from kinegraph.models.folded import GraphConvolutionLayer  # noqa: E402
from kinegraph.recipes import RECIPES, Recipe  # noqa: E402
from kinegraph.skeleton.layouts import LAYOUTS, get_layout  # noqa: E402
from kinegraph.spec import ModelSpec  # noqa: E402

TINY = Source("Tiny", 12, "kinect_v1", -1, ("rest", "wave", "jump"))
TINY_VALUES: dict[str, Any] = {
    "model.model_type": "EF-GCN",
    "model.width": 0.125,
    "model.depth": 1,
    "input.centre": "first",
    "input.sampling": "uniform",
    "input.num_frames": 8,
    "input.streams": ["joint", "bone"],
    "augment.rotation_y": 30.0,
    "dataset.batch_size": 4,
    "train.num_epochs": 1,
    "train.accelerator": "cpu",
    "train.optim.lr": 0.01,
}
COUNTS = {"nw_ucla": (1020, 464), "penn_action": (1258, 1068)}


def make_recordings(num_subjects: int = 4, clips_each: int = 6) -> Recordings:
    rng = np.random.Generator(np.random.PCG64(3))
    count = num_subjects * clips_each
    labels = np.arange(count) % 3
    clips = [
        rng.normal(size=(int(length), 20, 3)).astype(np.float32) + np.float32(label)
        for length, label in zip(rng.integers(1, 13, count), labels, strict=True)
    ]
    return Recordings(clips, labels, np.repeat(np.arange(num_subjects) + 1, clips_each), np.arange(count) % 4 == 3)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Words of the command for a tiny data set, whose recipe `tiny` trains in a moment."""
    monkeypatch.setitem(SOURCES, "tiny", TINY)
    monkeypatch.setitem(SPLITS, "tiny", lambda recordings: accuracy_data.split_each_subject(recordings)[:2])
    monkeypatch.setitem(accuracy.FLOORS, "tiny", {"guessing": 33.3})
    monkeypatch.setitem(RECIPES, "tiny", Recipe("for tests", dict(TINY_VALUES)))
    recordings = make_recordings()
    np.savez(
        tmp_path / "tiny.npz",
        frames=np.concatenate(recordings.clips),
        length=[len(clip) for clip in recordings.clips],
        label=recordings.labels,
        subject=recordings.subjects,
    )
    (tmp_path / "accuracy.md").write_text(f"Text.\n{accuracy.BEGIN}\n{accuracy.END}\nMore.\n")
    paths = {"data": "", "runs": "runs", "results": "accuracy.json", "log": "reads.jsonl", "document": "accuracy.md"}
    return [word for name, path in paths.items() for word in (f"--{name}", str(tmp_path / path))]


def measure(words: list[str], *more: str, recipe: str = "tiny") -> dict[str, Any]:
    """The newest entry after the command."""
    arguments = accuracy.parse_arguments(["--dataset", "tiny", "--recipe", recipe, "--seed-list", "1", *words, *more])
    accuracy.run_benchmark(arguments)
    entries: list[dict[str, Any]] = json.loads(arguments.results.read_text())
    return entries[-1]


@pytest.mark.parametrize("dataset", SOURCES)
def test_splits_of_the_real_data(dataset: str, shared: Path) -> None:
    source = SOURCES[dataset]
    recordings = accuracy_data.read_recordings(shared / f"data/{dataset}.npz", source)
    folds = SPLITS[dataset](recordings)
    assert max(len(clip) for clip in recordings.clips) == source.num_frames
    assert set(recordings.labels) == set(range(len(source.class_names)))
    for fold in folds:
        assert np.array_equal(np.union1d(fold.fit, fold.val), fold.train)
        assert len(fold.fit) + len(fold.val) == len(fold.train) and len(fold.val) > 0
        assert np.array_equal(np.union1d(fold.train, fold.test), np.arange(len(recordings.clips)))
        assert not np.intersect1d(fold.train, fold.test).size
        if dataset != "penn_action":
            assert not np.intersect1d(recordings.subjects[fold.fit], recordings.subjects[fold.val]).size
    if dataset == "utkinect":
        assert len(recordings.clips) == 199 and len(folds) == 10
        assert np.array_equal(np.sort(np.concatenate([fold.test for fold in folds])), np.arange(199))
        assert all(
            not np.intersect1d(recordings.subjects[fold.train], recordings.subjects[fold.test]).size for fold in folds
        )
    else:
        (fold,) = folds
        assert (len(fold.train), len(fold.test)) == COUNTS[dataset]
        assert not recordings.is_test[fold.train].any() and recordings.is_test[fold.test].all()
        share = len(fold.val) / len(fold.train)
        assert 0.1 < share < 0.25
        assert set(recordings.labels[fold.val]) == set(range(len(source.class_names)))


def test_stratified_split_takes_its_share_of_every_class() -> None:
    recordings = make_recordings(num_subjects=10, clips_each=24)
    (fold,) = accuracy_data.split_stratified(recordings)
    for label in range(3):
        of_class = int((recordings.labels[fold.train] == label).sum())
        assert (recordings.labels[fold.val] == label).sum() == round(0.15 * of_class)
    again = accuracy_data.split_stratified(recordings)[0]
    assert np.array_equal(fold.val, again.val)


def test_parts_hold_the_chosen_clips(tmp_path: Path) -> None:
    recordings = make_recordings()
    chosen = np.array([5, 2, 11])
    files = accuracy_data.write_part(tmp_path, "fit", recordings, chosen, TINY, "raw")
    array = np.load(files["data_path"])
    assert array.shape == (3, 3, 12, 20, 1) and array.dtype == np.float32
    for clip, index in zip(array, chosen, strict=True):
        frames = recordings.clips[index]
        np.testing.assert_array_equal(clip[:, : len(frames), :, 0].transpose(1, 2, 0), frames, strict=True)
        assert not clip[:, len(frames) :].any()
    assert json.loads(Path(files["label_path"]).read_text())["labels"] == recordings.labels[chosen].tolist()


def test_fitted_clips_are_relative_to_the_centre_and_keep_scores() -> None:
    source = SOURCES["penn_action"]
    frames = np.random.default_rng(0).uniform(1, 9, (7, 13, 3)).astype(np.float32)
    recordings = replace(make_recordings(1, 1), clips=[frames])
    clip = accuracy_data.stack_clips(recordings, np.array([0]), source, "fitted")[0, :, :7, :, 0]
    np.testing.assert_array_equal(clip[:2, 0, 0], 0)
    np.testing.assert_allclose(clip[:2], (frames - frames[0, 0])[..., :2].transpose(2, 0, 1), atol=1e-5)
    np.testing.assert_array_equal(clip[2], frames[..., 2])


def test_hash_changes_with_the_recipe_and_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECIPES, "tiny", Recipe("one", dict(TINY_VALUES)))
    first = plan_recipe("nw_ucla", "tiny")
    assert plan_recipe("nw_ucla", "tiny").recipe_hash == first.recipe_hash
    assert plan_recipe("utkinect", "tiny").recipe_hash != first.recipe_hash
    monkeypatch.setitem(RECIPES, "tiny", Recipe("another purpose", dict(reversed(TINY_VALUES.items()))))
    assert plan_recipe("nw_ucla", "tiny").recipe_hash == first.recipe_hash
    hashes = {first.recipe_hash}
    for key, value in (("train.num_epochs", 2), ("train.optim.lr", 0.02), ("input.streams", ["bone", "joint"])):
        monkeypatch.setitem(RECIPES, "tiny", Recipe("one", TINY_VALUES | {key: value}))
        hashes.add(plan_recipe("nw_ucla", "tiny").recipe_hash)
    assert len(hashes) == 4


def test_only_what_belongs_to_the_data_differs_between_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECIPES, "tiny", Recipe("one", TINY_VALUES | {"input.align": "first"}))
    plans = {dataset: plan_recipe(dataset, "tiny") for dataset in ("nw_ucla", "penn_action")}
    own = {"model.graph_layout", "dataset.num_classes", "dataset.label_map", "input.score_channel"}
    three, two = plans["nw_ucla"].values, plans["penn_action"].values
    differing = {key for key in three | two if three.get(key) != two.get(key)}
    assert differing == own | {"input.align"}
    assert set(plans["penn_action"].left_out) == {"input.align"}
    assert not plans["nw_ucla"].left_out and two["input.score_channel"] == 2


def test_reference_is_the_first_recipe() -> None:
    from kinegraph.config import get_value
    from kinegraph.spec import Spec

    changed = {key: value for key, value in accuracy_protocol.REFERENCE.items() if get_value(Spec(), key) != value}
    assert changed == {"train.num_epochs": 30}


def test_layout_of_penn_action() -> None:
    """The order of the joints is that of the recordings."""
    layout = get_layout(SOURCES["penn_action"].layout)
    assert layout.joints[:5] == ("head", "left_shoulder", "right_shoulder", "left_elbow", "right_elbow")
    assert layout.num_joints == 13 and len(layout.symmetric) == 6


def test_one_recipe_from_validation_to_the_test(tiny: list[str], tmp_path: Path) -> None:
    entry = measure(tiny)
    assert entry["test_accuracy"] == [None] and 0 <= entry["val_accuracy"][0] <= 100
    assert not (tmp_path / "reads.jsonl").exists()
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(("test_", "train_data", "watched"))]
    # Only the first fold's run was finished: the second goes on from its checkpoint, the first is not touched
    runs = sorted((tmp_path / "runs/tiny").glob("tiny_*/seed_1/*/validation"))
    assert len(runs) == 2
    logs = [(run / "train/metrics.csv").stat().st_mtime_ns for run in runs]
    (runs[1] / "outcome.json").unlink()
    (tmp_path / "accuracy.json").unlink()
    again = measure(tiny)
    assert again == entry | {"train_seconds": again["train_seconds"]}
    assert [(run / "train/metrics.csv").stat().st_mtime_ns for run in runs] == logs

    final = measure(tiny, "--final")
    begun, read = accuracy.read_log(tmp_path / "reads.jsonl")
    assert begun == read | {"test_accuracy": None, "commit": begun["commit"]}
    assert final["test_accuracy"] == [read["test_accuracy"]] and final["val_accuracy"] == entry["val_accuracy"]
    assert read["recipe_hash"] == final["recipe_hash"] and read["seed"] == 1
    right = 0
    for run in sorted((tmp_path / "runs/tiny").glob("tiny_*/seed_1/*/final")):
        metrics = json.loads((run / "evaluate/metrics.json").read_text())
        assert metrics["num_clips"] == 6 and "latest" in metrics["model"]
        right += sum(metrics["confusion_matrix"][label][label] for label in range(3))
    assert final["test_accuracy"] == [round(100 * right / 12, 2)]


def test_a_test_part_is_read_once_and_a_changed_recipe_shows(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = []
    real = accuracy_protocol.evaluate
    monkeypatch.setattr(accuracy_protocol, "evaluate", lambda spec: looks.append(1) or real(spec))
    first = measure(tiny, "--final")
    assert len(looks) == 2
    assert measure(tiny, "--final") == first
    (tmp_path / "accuracy.json").unlink()
    assert measure(tiny, "--final")["test_accuracy"] == first["test_accuracy"]
    assert len(looks) == 2 and len(accuracy.read_log(tmp_path / "reads.jsonl")) == 2
    assert "| tiny |" in (tmp_path / "accuracy.md").read_text()

    monkeypatch.setitem(RECIPES, "tiny", Recipe("changed", TINY_VALUES | {"train.optim.lr": 0.02}))
    second = measure(tiny, "--final")
    assert second["recipe_hash"] != first["recipe_hash"] and len(looks) == 4
    text = (tmp_path / "accuracy.md").read_text()
    assert text.startswith("Text.") and text.endswith("More.\n")
    (row,) = [line for line in text.splitlines() if line.startswith("| tiny |")]
    assert row.endswith(f"| 2 (other versions: {first['test_accuracy'][0]:.1f}) |")


def test_final_training_takes_over_what_validation_chose(tiny: list[str], tmp_path: Path) -> None:
    RECIPES["tiny"].values.update({"model.fusion": "late", "train.early_stopping": 1, "train.num_epochs": 3})
    measure(tiny, "--final")
    from kinegraph.models.checkpoint import read_checkpoint

    for fold in sorted((tmp_path / "runs/tiny").glob("tiny_*/seed_1/*")):
        chosen = read_checkpoint(fold / "validation/train/pc_model_best.pth")
        final = read_checkpoint(fold / "final/train/pc_model_latest.pth")
        assert final.training is not None and chosen.training is not None
        assert final.training["epoch"] == chosen.training["best"]["epoch"] + 1
        assert final.temperature == pytest.approx(chosen.temperature)
        np.testing.assert_allclose(final.state_dict["fusion_weights"], chosen.state_dict["fusion_weights"], rtol=1e-5)


def test_a_recipe_of_fewer_epochs_is_another_recipe(tiny: list[str], tmp_path: Path) -> None:
    whole = plan_recipe("tiny", "tiny")
    assert measure(tiny, "--epochs", "2")["recipe"] == "tiny_2_epochs"
    cut = plan_recipe("tiny", "tiny", 2)
    assert cut.values == whole.values | {"train.num_epochs": 2} and cut.recipe_hash != whole.recipe_hash
    (metrics,) = {path.read_text().count("\n") for path in (tmp_path / "runs").rglob("metrics.csv")}
    assert metrics == 1 + 2, "a line for each epoch"
    assert plan_recipe("tiny", "tiny", TINY_VALUES["train.num_epochs"]) == whole, "the recipe itself"
    for wrong in (["--epochs", "-1"], ["--epochs", "2", "--recipe", "baseline"]):
        with pytest.raises(SystemExit):
            measure(tiny, *wrong)


def test_without_validation_where_it_chooses_nothing(tiny: list[str], tmp_path: Path) -> None:
    runs = tmp_path / "runs/tiny" / plan_recipe("tiny", "tiny").folder_name / "seed_1"
    unfinished = [
        runs / fold.name / "validation/train/pc_model_latest.pth" for fold in SPLITS["tiny"](make_recordings())
    ]
    for path in unfinished:
        path.parent.mkdir(parents=True)
        path.write_bytes(b"of a training that was stopped")
    entry = measure(tiny, "--final", "--unvalidated")
    assert entry["val_accuracy"] == [None] and 0 <= entry["test_accuracy"][0] <= 100
    assert sorted((tmp_path / "runs").rglob("validation/*/*")) == sorted(unfinished)
    assert "| not measured |" in (tmp_path / "accuracy.md").read_text()
    for path in unfinished:
        path.unlink()
    validated = measure(tiny)["val_accuracy"]
    assert validated != [None] and measure(tiny, "--final", "--unvalidated")["val_accuracy"] == validated
    with pytest.raises(SystemExit):
        measure(tiny, "--unvalidated")
    RECIPES["tiny"].values.update({"model.fusion": "late", "train.early_stopping": 1})
    with pytest.raises(SystemExit, match="chooses the weights of its streams, the number of epochs"):
        measure(tiny, "--final", "--unvalidated")


def test_folds_of_views_train_on_one_and_measure_the_other() -> None:
    views = np.array([1, 2, 3, 2, 1, 3])
    one, two = view_folds.split_by_view(views).values()
    assert (one.fit.tolist(), one.val.tolist(), one.train.tolist()) == ([0, 4], [1, 3], [0, 4])
    assert (two.fit.tolist(), two.val.tolist()) == ([1, 3], [0, 4])
    assert not len(one.test) and not len(two.test)


def test_a_changed_recipe_on_the_folds_of_views(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content = dict(np.load(tmp_path / "tiny.npz"))
    np.savez(tmp_path / "tiny.npz", **content, view=np.arange(len(content["label"])) % 3 + 1)
    monkeypatch.setattr(view_folds, "DATASET", "tiny")
    words = ["--recipe", "tiny", "--data", str(tmp_path), "--runs", str(tmp_path / "runs")]
    words += ["--results", str(tmp_path / "folds.json")]
    for changes in ([], ["train.optim.lr=0.02", "train.num_epochs=2"], []):
        view_folds.main([*words, *changes])
    rows = json.loads((tmp_path / "folds.json").read_text())
    assert [(row["changes"], row["fold"]) for row in rows] == [
        ({"train.optim.lr": 0.02, "train.num_epochs": 2}, "view_1_to_2"),
        ({"train.optim.lr": 0.02, "train.num_epochs": 2}, "view_2_to_1"),
        ({}, "view_1_to_2"),
        ({}, "view_2_to_1"),
    ]
    changed = plan_recipe("tiny", "tiny", changes=rows[0]["changes"])
    assert changed.values["train.optim.lr"] == 0.02 and changed.recipe_hash == rows[0]["recipe_hash"]
    assert rows[0]["recipe_hash"] == rows[1]["recipe_hash"] != rows[2]["recipe_hash"]
    assert f"view_2_to_1, seed 1: {rows[3]['accuracy']} %" in capsys.readouterr().out


def make_read(recipe_hash: str, seed: int, recipe: str = "small") -> dict[str, Any]:
    return {"dataset": "nw_ucla", "recipe": recipe, "recipe_hash": recipe_hash, "seed": seed, "test_accuracy": 50.0}


@given(st.dictionaries(st.tuples(st.sampled_from("abc"), st.integers(1, 3)), st.integers(1, 3), max_size=6))
def test_reads_are_counted_by_version_and_repetition(times: dict[tuple[str, int], int]) -> None:
    log = [make_read(version, seed) for (version, seed), count in times.items() for _ in range(count)]
    log += [make_read("a", 1, "balanced"), make_read("a", 1) | {"dataset": "utkinect"}]
    log += [read | {"test_accuracy": None} for read in log]  # each was begun
    log.append(make_read("d", 1) | {"test_accuracy": None})
    log += [make_read("e", seed, "small_30_epochs") for seed in (1, 2)] + [make_read("f", 1, "smaller")]
    expected = 2
    for version in "abc":
        expected += max([count for (own, _), count in times.items() if own == version], default=0)
    assert accuracy.count_reads(log, "nw_ucla", "small") == expected
    assert accuracy.count_reads(log, "nw_ucla", "small_30_epochs") == 1


def test_seeds_are_merged_in_order() -> None:
    plan = plan_recipe("nw_ucla", "reference")
    outcome = PartOutcome(3, 4, 10.0, 5, 6, "CPU", 1, "abc")
    entry = None
    for seed in (3, 1, 2, 1):
        entry = accuracy.merge_row(
            entry, plan, seed, accuracy.SeedRow(float(seed), None if seed == 3 else 9.0, outcome)
        )
    assert entry is not None
    assert (entry["seeds"], entry["val_accuracy"]) == ([1, 2, 3], [1.0, 2.0, 3.0])
    assert entry["test_accuracy"] == [9.0, 9.0, None]
    assert accuracy.is_measured(entry, 3, False) and not accuracy.is_measured(entry, 3, True)
    entry = accuracy.merge_row(entry, plan, 4, accuracy.SeedRow(None, 9.0, outcome))
    assert accuracy.is_measured(entry, 4, True, validates=False) and not accuracy.is_measured(entry, 4, True)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([None, None], "not read"),
        ([70.0], "70.0"),
        ([70.0, 71.04], "70.5 (70.0..71.0)"),
        ([None, 70.0, None], "70.0, 1 of 3 seeds"),
        ([70.0, None, 72.0], "71.0 (70.0..72.0), 2 of 3 seeds"),
    ],
)
def test_cells_say_of_how_many_seeds_they_are(values: list[float | None], text: str) -> None:
    assert accuracy._format_spread(values) == text


def test_a_validation_after_the_test_leaves_what_is_known_of_the_final_model() -> None:
    plan = plan_recipe("nw_ucla", "reference")
    final = accuracy.merge_row(
        None, plan, 1, accuracy.SeedRow(None, 9.0, PartOutcome(3, 4, 10.0, 5, 6, "GPU", 1, "a"), True)
    )
    validated = PartOutcome(3, 4, 2.0, 5, 6, "CPU", 2, "b")
    assert accuracy.merge_row(final, plan, 1, accuracy.SeedRow(7.0, 9.0, validated)) == final | {"val_accuracy": [7.0]}


def test_the_table_shows_recipes_as_they_are_now(tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    first = measure(tiny)
    cut = measure(tiny, "--epochs", "2")
    assert accuracy.choose_entries([first, cut]) == {"tiny": first, "tiny_2_epochs": cut}
    monkeypatch.setitem(RECIPES, "tiny", Recipe("cut", TINY_VALUES | {"train.num_epochs": 2}))
    assert accuracy.choose_entries([first, cut]) == {"tiny": cut}
    monkeypatch.setitem(RECIPES, "tiny", Recipe("as it was", TINY_VALUES))
    assert accuracy.choose_entries([cut, first]) == accuracy.choose_entries([first, cut])
    monkeypatch.delitem(RECIPES, "tiny")
    assert accuracy.choose_entries([first, cut]) == {"tiny": first, "tiny_2_epochs": cut}


def test_multiply_adds_agree_with_a_counted_run() -> None:
    layout = get_layout("kinect_v1")
    model = build_model(ModelSpec(model_type="EF-GCN"), layout, 10, 12)
    folded = accuracy_protocol.count_multiply_adds(model, 12, 64, 20)
    assert folded == model.fold().count_multiply_adds(64)
    # A fresh topology is mostly zeros, which only the folded form leaves out
    for block in model.blocks:
        torch.nn.init.ones_(block.topology)
    network = model.fold()
    strides = network.find_strides()
    # The own joint is a subset of its own when folded, and the counter does not see products of single values
    unseen = 64 * 20 * 12
    for layer in network.layers:
        if isinstance(layer, GraphConvolutionLayer):
            unseen += 64 // strides[layer.name] * 20 * layer.weight.shape[1]
    mean_over_frames = 64 // model.total_stride * network.head_weight.shape[0]
    expected = network.count_multiply_adds(64) - unseen + mean_over_frames
    assert accuracy_protocol.count_run(model, 12, 64, 20) == expected
    assert unseen < 0.02 * network.count_multiply_adds(64)
    late = build_model(ModelSpec(model_type="EF-GCN", fusion="late"), layout, 10, 12)
    one = build_model(ModelSpec(model_type="EF-GCN"), layout, 10, 3)
    assert accuracy_protocol.count_multiply_adds(late, 12, 64, 20) == 4 * one.fold().count_multiply_adds(64)


def test_baseline_is_ridge_regression_in_the_space_of_its_kernel() -> None:
    """The linear kernel against ridge regression on the features themselves (the dual and the primal solution)."""
    rng = np.random.default_rng(1)
    groups, others = ([rng.normal(size=(n, 6)), 5 * rng.normal(size=(n, 3))] for n in (20, 7))
    labels = np.arange(20) % 3
    options = baseline.BaselineOptions(num_frames=16, groups="distances", width=0.0, ridge=0.1)
    model = baseline.fit_baseline(groups, labels, 3, options)
    means, scales = baseline.measure_groups(groups)
    x, z = (baseline.scale_groups(each, means, scales) for each in (groups, others))
    ridge = 0.1 * (x**2).sum(axis=1).mean()
    targets = np.where(labels[:, None] == np.arange(3), 1.0, -1.0)
    weights = np.linalg.solve(x.T @ x + ridge * np.eye(9), x.T @ (targets - targets.mean(axis=0)))
    np.testing.assert_allclose(baseline.compute_scores(model, others), z @ weights + targets.mean(axis=0), atol=1e-9)


def test_chosen_baseline_is_the_best_of_its_grid() -> None:
    recordings = make_recordings(4, 9)
    layout, chosen = LAYOUTS["kinect_v1"], np.arange(36)
    clips = accuracy_data.stack_clips(recordings, chosen, TINY, "raw")
    fit, val = chosen < 27, chosen >= 27
    labels = recordings.labels
    options, right = baseline.choose_options(clips[fit], labels[fit], clips[val], labels[val], layout, -1, 3)
    counts = {}
    for each in baseline.list_options()[::5]:
        groups = [
            baseline.make_groups(part, layout, -1, each.num_frames, each.groups) for part in (clips[fit], clips[val])
        ]
        scores = baseline.compute_scores(baseline.fit_baseline(groups[0], labels[fit], 3, each), groups[1])
        counts[each] = int((scores.argmax(axis=1) == labels[val]).sum())
    assert right >= max(counts.values())
    groups = [
        baseline.make_groups(part, layout, -1, options.num_frames, options.groups) for part in (clips[fit], clips[val])
    ]
    scores = baseline.compute_scores(baseline.fit_baseline(groups[0], labels[fit], 3, options), groups[1])
    assert (scores.argmax(axis=1) == labels[val]).sum() == right


def test_baseline_goes_through_the_same_command(tiny: list[str], tmp_path: Path) -> None:
    entry = measure(tiny, "--final", recipe="baseline")
    assert entry["seeds"] == [1] and entry["test_accuracy"][0] is not None
    assert measure(tiny, "--final", recipe="baseline") == entry
    assert [read["test_accuracy"] is None for read in accuracy.read_log(tmp_path / "reads.jsonl")] == [True, False]


def test_tables_in_the_docs_are_the_generated_ones() -> None:
    text = (BENCHMARKS.parent / "docs/accuracy.md").read_text()
    shown = text[text.index(accuracy.BEGIN) + len(accuracy.BEGIN) : text.index(accuracy.END)].strip()
    entries = accuracy.read_results(BENCHMARKS / "results/accuracy.json")
    assert shown == accuracy.build_tables(entries, accuracy.read_log(BENCHMARKS / "test_reads.jsonl"))
