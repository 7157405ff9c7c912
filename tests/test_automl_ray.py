"""Searches on a Ray cluster: one of two CPUs on loopback, which all tests of this file share."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from kinegraph.actions import automl
from kinegraph.automl.dimensions import Dimension, SearchSpace
from kinegraph.automl.ray_cluster import LOOPBACK_VARIABLE, connect_ray, divide_cluster
from kinegraph.automl.ray_engine import describe_training, list_stops, open_ray_study
from kinegraph.automl.schedule import plan_schedule
from kinegraph.automl.trial_files import copy_in, read_population, replace_with
from kinegraph.config import SearchRange
from kinegraph.errors import SpecError, UserError
from kinegraph.models.checkpoint import read_checkpoint
from kinegraph.run import Run
from kinegraph.spec import KEY_VARIABLE
from kinegraph.spec_reading import read_spec
from small_runs import make_spec, write_small_data

ray = pytest.importorskip("ray")

KEY = "Hush-Hush-88"
DIVERGING = 1e30


def make_search(folder: Path, results: str, **options: Any) -> dict[str, Any]:
    spec = make_spec(folder, results)
    spec["automl"] = {"engine": "ray", "algorithm": "random", **options}
    return spec


def make_random_search(folder: Path, results: str, **options: Any) -> dict[str, Any]:
    """Trial 1 of 3 diverges."""
    options["custom_param_ranges"] = {"train.optim.lr": {"valid_options": [0.01, DIVERGING]}}
    keys = ["train.optim.lr", "model.dropout"]
    return make_search(folder, results, automl_hyperparameters=keys, automl_max_recommendations=3, seed=0, **options)


def read_rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def read_outcomes(folder: Path) -> list[dict[str, str]]:
    """all_trials.csv without what differs from run to run."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in read_rows(folder)]


def list_names(folder: Path) -> set[str]:
    """Files by their places, without those whose names differ from run to run."""
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {name.as_posix() for name in names if not {"tensorboard", "logs"} & set(name.parts)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ray")
    write_small_data(folder)
    return folder


@pytest.fixture(scope="module")
def cluster(data: Path) -> Iterator[str]:
    """The address of a cluster that was started as a search starts one, with the key in its environment."""
    spec = read_spec(make_search(data, "cluster")).values
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv(KEY_VARIABLE, KEY)
        patch.setenv("OMP_NUM_THREADS", "1")
        with connect_ray(spec, Run("automl", data, spec)):
            yield ray.get_runtime_context().gcs_address
        assert not ray.is_initialized()


@pytest.fixture(scope="module")
def searched(data: Path, cluster: str) -> Path:
    """The study folder of an undisturbed random search by two workers."""
    spec = make_random_search(data, "undisturbed", automl_max_concurrent=2)
    folder = Path(automl(spec).files["results_dir"])
    assert ray.is_initialized(), "a cluster that was there before is left alone"
    return folder


def test_random_search_is_that_of_the_local_engine(data: Path, searched: Path) -> None:
    local = Path(automl(make_random_search(data, "local", engine="local")).files["results_dir"])
    rows = read_outcomes(searched / "all_trials.csv")
    assert rows == read_outcomes(local / "all_trials.csv")
    assert {row["state"] for row in rows} == {"complete", "failed"}, "one of each kind, or the test shows nothing"
    for row in rows:
        diverges = float(row["train.optim.lr"]) == DIVERGING
        assert (row["state"] == "failed") == diverges == ("loss of" in row["error"])
    records = [json.loads((folder / "best_rec.json").read_text()) for folder in (searched, local)]
    for record in records:
        del record["best"]["checkpoint_uri"]
    assert records[0] == records[1]
    assert list_names(searched) == list_names(local)


def test_checkpoints_are_encrypted_and_no_file_holds_the_key(searched: Path) -> None:
    assert read_checkpoint(searched / "pc_model_best.pth", KEY).num_classes == 3
    with pytest.raises(UserError):
        read_checkpoint(searched / "pc_model_best.pth", "another")
    files = [path for path in searched.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


SEARCH = "import json, sys; from kinegraph.actions import automl; automl(json.loads(sys.argv[1]))"


def test_killed_search_goes_on_to_the_same_trials(data: Path, searched: Path, cluster: str) -> None:
    spec = make_random_search(data, "killed", automl_max_concurrent=1)
    folder = data / "killed" / "automl"
    states = [row["state"] for row in read_rows(searched / "all_trials.csv")]
    assert states[0] == "complete"
    second = states.index("complete", 1)
    process = subprocess.Popen(
        [sys.executable, "-c", SEARCH, json.dumps(spec)],
        env={**os.environ, "RAY_ADDRESS": cluster, LOOPBACK_VARIABLE: "0"},
        stderr=subprocess.DEVNULL,
    )
    until_s = time.monotonic() + 200
    try:
        while not list((folder / f"trial_{second:03d}").glob("model_epoch_000*.pth")):
            assert process.poll() is None and time.monotonic() < until_s
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    first_status = (folder / "trial_000/status.json").read_bytes()
    automl(spec)
    assert read_outcomes(folder / "all_trials.csv") == read_outcomes(searched / "all_trials.csv")
    assert (folder / "trial_000/status.json").read_bytes() == first_status, "a finished trial is not trained again"
    assert "Resuming from" in (folder / f"trial_{second:03d}/log.txt").read_text()


def test_asha_stops_a_worse_trial_at_its_rung(data: Path, cluster: str) -> None:
    options: dict[str, Any] = {
        "algorithm": "asha",
        "automl_max_recommendations": 3,
        "automl_max_epochs": 2,
        "automl_reduction_factor": 2,
        "automl_max_concurrent": 1,
        "metric": "train_loss",
        "automl_hyperparameters": ["train.optim.lr"],
        # The spec's own rate is the best by far
        "custom_param_ranges": {"train.optim.lr": {"valid_min": 1e-9, "valid_max": 1e-8}},
    }
    spec = make_search(data, "asha", **options)
    spec["train"]["optim"]["lr"] = 0.0015
    folder = Path(automl(spec).files["results_dir"])
    rows = read_rows(folder / "all_trials.csv")
    assert [(row["state"], row["budget"]) for row in rows[:2]] == [("complete", "2"), ("paused", "1")]
    assert len(rows) == 3
    for row in rows:
        curve = read_rows(folder / f"trial_{int(row['number']):03d}/metrics.csv")
        assert len(curve) == int(row["budget"])
        assert float(row["score"]) == min(float(epoch["train_loss"]) for epoch in curve)
    best = json.loads((folder / "best_rec.json").read_text())["best"]
    assert (best["rec_id"], best["observed_budget"]) == (0, 2)


def test_the_worst_of_a_population_goes_on_from_the_best_with_other_values(data: Path, cluster: str) -> None:
    options: dict[str, Any] = {
        "algorithm": "pbt",
        "automl_population_size": 3,
        "automl_max_concurrent": 2,
        "automl_delete_intermediate_ckpt": False,
        "metric": "train_loss",
        "automl_hyperparameters": ["train.optim.lr"],
        "custom_param_ranges": {"train.optim.lr": {"valid_min": 1e-9, "valid_max": 0.02}},
    }
    folder = Path(automl(make_search(data, "pbt", **options)).files["results_dir"])
    rows = read_rows(folder / "all_trials.csv")
    assert [(row["state"], row["budget"]) for row in rows] == [("complete", "2")] * 3
    curves = [read_rows(folder / f"trial_{number:03d}/metrics.csv") for number in range(3)]
    takeovers = {}
    for number in range(3):
        state = read_population(folder / f"trial_{number:03d}/population.json")
        if state is not None:
            takeovers[number] = state
    assert len(takeovers) == 1, "a quarter of three, rounded up"
    ((number, state),) = takeovers.items()
    source = int(state["trial"].removeprefix("trial_"))
    assert source != number and state["epochs"] == 1
    assert curves[number][0] == curves[source][0], "its history is that of the other"
    losses = [float(curve[0]["train_loss"]) for curve in curves]
    assert losses[source] == min(losses)
    rate = float(rows[number]["train.optim.lr"])
    assert rate == state["values"]["train.optim.lr"] != float(rows[source]["train.optim.lr"])
    assert 1e-9 <= rate <= 0.02
    experiment = yaml.safe_load((folder / f"trial_{number:03d}/experiment.yaml").read_text())
    assert experiment["train"]["optim"]["lr"] == rate
    assert float(curves[number][1]["lr"]) == pytest.approx(rate)
    first = {path.name: path for path in (folder / f"trial_{number:03d}").glob("model_epoch_000*.pth")}
    assert len(first) == 1
    for name, path in first.items():
        assert path.read_bytes() == (folder / f"trial_{source:03d}" / name).read_bytes()


def test_a_mistake_in_the_spec_ends_the_search(data: Path, cluster: str) -> None:
    spec = make_search(data, "mistake", automl_max_concurrent=1)
    spec["dataset"]["label_map"] = {"one": 0, "two": 1}
    with pytest.raises(UserError, match="label"):
        automl(spec)
    assert not (data / "mistake/automl/study.journal").exists()


def test_key_by_value_is_refused_on_a_cluster_of_others(data: Path, cluster: str) -> None:
    with pytest.raises(UserError, match="a key by value") as caught:
        automl(make_search(data, "key"), "encryption_key=Other-77")
    assert "Other-77" not in str(caught.value)


def test_address_of_a_dashboard_is_explained(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    spec = read_spec(make_search(data, "address")).values
    with pytest.raises(UserError, match="expected HOST:6379"), connect_ray(spec, Run("automl", data, spec)):
        pass


def test_without_ray_the_extra_is_named(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'kinegraph\[ray\]'"):
        automl(make_search(data, "missing"))


def test_algorithms_that_ray_cannot_do_are_named(data: Path) -> None:
    with pytest.raises(SpecError, match=r"hyperband.*expected one of bayesian, .*asha, pbt"):
        automl(make_search(data, "hyperband", algorithm="hyperband"))


NODES = {
    "two with four GPUs": [{"CPU": 8.0, "GPU": 4.0}, {"CPU": 8.0, "GPU": 4.0}],
    "CPUs": [{"CPU": 6.0}, {"CPU": 2.0}],
}


@pytest.mark.parametrize(
    ("nodes", "options", "expected"),
    [
        ("two with four GPUs", {}, (1, 1, 8)),
        ("two with four GPUs", {"num_gpus": 3}, (1, 3, 2)),
        ("two with four GPUs", {"num_gpus": 2, "wanted": 3}, (1, 2, 3)),
        ("two with four GPUs", {"accelerator": "cpu"}, (1, 0, 16)),
        ("CPUs", {}, (1, 0, 8)),
        ("CPUs", {"wanted": 2}, (4, 0, 2)),
        ("CPUs", {"wanted": 1}, (6, 0, 1)),
        ("CPUs", {"wanted": 20}, (1, 0, 20)),
    ],
)
def test_what_a_trial_gets(
    data: Path, monkeypatch: pytest.MonkeyPatch, nodes: str, options: dict[str, Any], expected: tuple[int, int, int]
) -> None:
    found = [{"Alive": True, "Resources": node} for node in NODES[nodes]]
    monkeypatch.setattr(ray, "nodes", lambda: [*found, {"Alive": False, "Resources": {"GPU": 64.0}}])
    spec = make_search(data, "share", automl_max_concurrent=options.pop("wanted", -1))
    spec["train"] |= {"accelerator": "auto", **options}
    share = divide_cluster(read_spec(spec).values)
    assert (share.cpus, share.gpus, share.num_slots) == expected


def test_more_gpus_than_a_node_has_are_refused(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"GPU": 4.0}}] * 2)
    spec = read_spec(make_search(data, "share"), ["train.accelerator=gpu", "train.num_gpus=5"]).values
    with pytest.raises(SpecError, match=r"train\.num_gpus: got 5, expected at most 4"):
        divide_cluster(spec)


@pytest.mark.parametrize(
    ("algorithm", "num_epochs", "interval", "expected"),
    [
        ("random", 2, 1, [1, 2]),
        ("random", 7, 1, [1, 2, 3, 4, 5, 6, 7]),
        ("random", 50, 1, list(range(5, 51, 5))),
        ("random", 50, 4, [*range(8, 50, 8), 50]),
        ("random", 3, 5, [3]),
        ("asha", 50, 4, [1, 3, 9, 27]),
    ],
)
def test_trials_report_at_rungs_or_about_ten_times(
    algorithm: str, num_epochs: int, interval: int, expected: list[int]
) -> None:
    schedule = plan_schedule(
        algorithm,
        max_trials=4,
        num_epochs=num_epochs,
        max_epochs=27,
        reduction_factor=3,
        epoch_multiplier=1,
        max_concurrent=1,
        direction="maximize",
    )
    assert list_stops(schedule, interval) == expected


def test_values_are_varied_within_their_ranges() -> None:
    from kinegraph.automl.ray_population import vary_values

    space = SearchSpace(
        (
            Dimension("rate", SearchRange(1e-4, 0.5, log=True), 0.1),
            Dimension("share", SearchRange(0.0, 0.9), 0.5),
            Dimension("patience", SearchRange(1, 20), 3, is_integer=True),
            Dimension("batch", SearchRange(8, 64, powers_of=2), 16, is_integer=True),
            Dimension("clip", SearchRange(0.1, 10.0, log=True, specials=(0.0,)), 0.0),
            Dimension("kind", SearchRange(choices=("a", "b")), "a"),
            Dimension("above", SearchRange(1, 30, above="patience"), 5, is_integer=True),
        )
    )
    generator = np.random.default_rng(0)
    values = space.defaults
    seen: dict[str, set[Any]] = {key: set() for key in values}
    for _ in range(300):
        varied = vary_values(space, values, "MultiStep", generator)
        assert space.holds(varied), varied
        assert (varied["kind"], varied["clip"]) == ("a", 0.0)
        assert varied["rate"] != values["rate"]
        values = varied
        for key, value in values.items():
            seen[key].add(value)
    assert seen["batch"] == {8, 16, 32, 64}
    assert len(seen["patience"]) > 10 and len(seen["rate"]) > 200


def test_rate_of_autoreduce_is_not_varied() -> None:
    from kinegraph.automl.ray_population import vary_values

    space = SearchSpace(
        (
            Dimension("train.optim.lr", SearchRange(1e-4, 0.5, log=True), 0.1),
            Dimension("train.optim.weight_decay", SearchRange(1e-6, 1e-2, log=True), 1e-4),
        )
    )
    varied = vary_values(space, space.defaults, "AutoReduce", np.random.default_rng(0))
    assert varied["train.optim.lr"] == 0.1 and varied["train.optim.weight_decay"] != 1e-4


def test_a_run_folder_takes_over_another(tmp_path: Path) -> None:
    source, target, packed = (tmp_path / name for name in ("source", "target", "packed"))
    for folder in (source, target, packed):
        folder.mkdir()
    for folder, steps in ((source, ("00003", "00006", "00009")), (target, ("00004", "00005"))):
        for epoch, step in enumerate(steps):
            (folder / f"model_epoch_{epoch:03d}_step_{step}.pth").write_text(f"{folder.name} {step}")
        (folder / "pc_model_latest.pth").symlink_to(f"model_epoch_{len(steps) - 1:03d}_step_{steps[-1]}.pth")
        (folder / "metrics.csv").write_text(folder.name)
        (folder / "log.txt").write_text(folder.name)
    (source / "best.json").write_text(json.dumps({"file": "model_epoch_000_step_00003.pth"}))
    copy_in(str(source), packed)
    (packed / "state.json").write_text("{}")
    kept = {"model_epoch_000_step_00003.pth", "model_epoch_002_step_00009.pth", "best.json", "metrics.csv"}
    assert {path.name for path in packed.iterdir()} == {*kept, "state.json"}
    replace_with(str(target), packed, {"trial": "source", "values": {"lr": 0.5}})
    assert {path.name for path in target.iterdir()} == {*kept, "log.txt", "population.json"}
    assert (target / "metrics.csv").read_text() == "source" and (target / "log.txt").read_text() == "target"
    assert read_population(target / "population.json") == {"trial": "source", "values": {"lr": 0.5}}
    assert read_population(source / "population.json") is None


def test_nodes_are_told_uris_absolute_paths_and_no_key(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}])
    monkeypatch.chdir(data)
    spec = make_search(data, "told")
    spec["dataset"]["train_dataset"]["label_path"] = "train_label.json"
    loaded = read_spec(spec, [f"encryption_key={KEY}"])
    cached = str(data / "train_data.npy")
    places = {str(tmp_path): "s3://bucket/study", cached: "s3://bucket/train_data.npy"}
    run = Run("automl", tmp_path, loaded.values, loaded.origins, locations=places)
    study = open_ray_study(loaded.values, run, divide_cluster(loaded.values))
    training = describe_training(study)
    files = training["spec"]["dataset"]["train_dataset"]
    assert files == {"data_path": "s3://bucket/train_data.npy", "label_path": str(data / "train_label.json")}
    assert training["location"] == "s3://bucket/study"
    assert training["is_encrypted"] and KEY not in json.dumps(training)


def test_reason_of_a_lost_process_is_one_line(tmp_path: Path) -> None:
    from kinegraph.automl.ray_trials import _read_reason

    path = tmp_path / "error.txt"
    trial: Any = SimpleNamespace(error_file=str(path))
    assert _read_reason(trial) == "no reason is known"
    path.write_text("Failure # 1 (occurred at 1)\nfirst\nFailure # 2 (occurred at 2)\nThe actor died:\n\texit code 9\n")
    assert _read_reason(trial) == "The actor died: exit code 9"
    path.write_text("Failure # 1 (occurred at 1)\nTraceback (most recent call last):\n  File x\nOSError: gone\n")
    assert _read_reason(trial) == "OSError: gone"


def test_node_that_does_not_see_the_results_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kinegraph.automl.ray_trainable import check_node

    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    seen = {"location": str(tmp_path), "is_encrypted": False}
    assert check_node(seen) == {} == check_node({**seen, "location": "s3://bucket/study"})
    hidden = check_node({**seen, "location": str(tmp_path / "elsewhere")})
    assert hidden["is_mistake"] and "a disk that all nodes share" in hidden["error"]
    locked = check_node({**seen, "is_encrypted": True})
    assert locked["is_mistake"] and KEY_VARIABLE in locked["error"]
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    assert check_node({**seen, "is_encrypted": True}) == {}
