"""Studies end to end on tiny data, with real worker processes."""

from __future__ import annotations

import copy
import csv
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from kinegraph.actions import automl, evaluate, train
from kinegraph.automl.confirm import confirm_best
from kinegraph.automl.definition import check_definition
from kinegraph.automl.estimate import estimate_epoch_seconds
from kinegraph.automl.journal import StudyJournal
from kinegraph.automl.plan import format_plan, make_plan
from kinegraph.automl.results import find_divergence
from kinegraph.automl.study import set_leftovers_aside
from kinegraph.automl.trial_spec import build_base, build_trial_spec
from kinegraph.automl.trials import Trial, find_best
from kinegraph.automl.workers import Outcome, WorkerPool, choose_environments
from kinegraph.data.transforms import TrainingAugmentation
from kinegraph.errors import KinegraphError, SpecError, UserError
from kinegraph.models.checkpoint import read_checkpoint
from kinegraph.run import Run
from kinegraph.spec import Spec
from kinegraph.spec_reading import read_spec
from small_runs import make_spec, write_small_data


def make_search(folder: Path, results: str = "results", **options: Any) -> dict[str, Any]:
    spec = make_spec(folder, results)
    spec["dataset"]["num_workers"] = 1  # as in the template: trials fork processes that read data
    spec["automl"] = {"algorithm": "random", "automl_max_recommendations": 3, **options}
    return spec


def read_rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def read_outcomes(folder: Path) -> list[dict[str, str]]:
    """all_trials.csv without what differs from run to run."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in read_rows(folder)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("automl")
    write_small_data(folder)
    return folder


@pytest.fixture(scope="module")
def searched(data: Path) -> Path:
    """The study folder of an undisturbed random search."""
    result = automl(make_search(data, "undisturbed"))
    return Path(result.files["results_dir"])


def test_search_leaves_what_the_facts_say(data: Path, searched: Path) -> None:
    record = json.loads((searched / "best_rec.json").read_text())
    assert (record["schema_version"], record["metric_name"], record["direction"]) == (1, "val_acc", "maximize")
    scores = []
    for number in range(3):
        rows = read_rows(searched / f"trial_{number:03d}" / "metrics.csv")
        assert len(rows) == 2
        scores.append(max(float(row["val_acc"]) for row in rows))
    assert [rec["score"] for rec in record["all_recs"]] == scores
    assert record["best"]["rec_id"] == scores.index(max(scores))
    assert record["best"]["observed_budget"] == 2
    checkpoint = read_checkpoint(searched / "pc_model_best.pth")
    assert checkpoint.metrics["val_acc"] == max(scores)
    names = {path.name for path in searched.iterdir()}
    assert {"all_trials.csv", "best_spec.yaml", "study.journal", "experiment.yaml", "status.json"} <= names
    assert len(list(searched.glob("*.png"))) == 4


def test_the_spec_is_trial_0_and_other_trials_differ(searched: Path) -> None:
    specs = [yaml.safe_load((searched / f"trial_{number:03d}/experiment.yaml").read_text()) for number in range(3)]
    assert specs[0]["train"]["optim"]["lr"] == 0.01
    assert specs[0]["model"]["dropout"] == 0.5
    assert len({spec["train"]["optim"]["lr"] for spec in specs}) == 3
    assert all(1e-4 <= spec["train"]["optim"]["lr"] <= 0.5 for spec in specs)
    assert all("random_choose" not in key for spec in specs for key in spec["automl"])


def test_only_the_best_trial_keeps_its_checkpoints(searched: Path) -> None:
    best = json.loads((searched / "best_rec.json").read_text())["best"]["rec_id"]
    kept = {path.parent.name for path in searched.glob("trial_*/*.pth")}
    assert kept == {f"trial_{best:03d}"}


def test_best_spec_trains_and_evaluates(data: Path, searched: Path, tmp_path: Path) -> None:
    train(searched / "best_spec.yaml", f"results_dir={tmp_path}")
    best = json.loads((searched / "best_rec.json").read_text())["best"]
    scores = [float(row["val_acc"]) for row in read_rows(tmp_path / "train/metrics.csv")]
    assert max(scores) == best["score"]
    result = evaluate(
        {
            "results_dir": str(tmp_path),
            "evaluate": {
                "checkpoint": str(searched / "pc_model_best.pth"),
                "test_dataset": {"data_path": str(data / "val_data.npy"), "label_path": str(data / "val_label.json")},
            },
        }
    )
    assert result.metrics["accuracy"] == pytest.approx(100 * best["score"], abs=0.01)


def test_finished_search_says_the_same_again_and_more_trials_extend_it(data: Path, searched: Path) -> None:
    before = read_rows(searched / "all_trials.csv")
    automl(make_search(data, "undisturbed"))
    assert read_rows(searched / "all_trials.csv") == before
    automl(make_search(data, "undisturbed", automl_max_recommendations=4))
    after = read_rows(searched / "all_trials.csv")
    assert after[:3] == before and len(after) == 4


def test_another_search_in_the_folder_is_refused(data: Path, searched: Path) -> None:
    with pytest.raises(SpecError, match=r"automl\.seed: got 5, expected 1234"):
        automl(make_search(data, "undisturbed", seed=5))
    spec = make_search(data, "undisturbed")
    spec["train"]["num_epochs"] = 3
    with pytest.raises(SpecError, match=r"train\.num_epochs: got 3, expected 2"):
        automl(spec)


SEARCH = "import json, sys; from kinegraph.actions import automl; automl(json.loads(sys.argv[1]))"

SEARCH_AND_DIE = textwrap.dedent(
    """
    import json, os, signal, sys
    from kinegraph.actions import automl
    from kinegraph.automl import study

    spec, moment, count = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    calls = 0

    def die_at(function, after=False):
        def call(*arguments, **options):
            global calls
            calls += 1
            if calls == count and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*arguments, **options)
            if calls == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        return call

    if moment == "before_send":
        study._send = die_at(study._send)
    elif moment == "after_send":
        study._send = die_at(study._send, after=True)
    elif moment == "before_record":
        study._record = die_at(study._record)
    elif moment == "after_record":
        study._record = die_at(study._record, after=True)
    automl(spec)
    """
)


@pytest.mark.parametrize(
    ("moment", "count"), [("before_send", 2), ("after_send", 2), ("before_record", 1), ("after_record", 2)]
)
def test_killed_search_goes_on_to_the_same_trials(data: Path, searched: Path, moment: str, count: int) -> None:
    spec = make_search(data, f"killed_{moment}")
    folder = data / f"killed_{moment}" / "automl"
    done = subprocess.run(
        [sys.executable, "-c", SEARCH_AND_DIE, json.dumps(spec), moment, str(count)], capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    automl(spec)
    assert read_outcomes(folder / "all_trials.csv") == read_outcomes(searched / "all_trials.csv")[:3]


def test_a_worker_that_is_killed_goes_on_from_its_checkpoint(data: Path, searched: Path) -> None:
    spec = make_search(data, "worker_killed")
    folder = data / "worker_killed" / "automl"
    process = subprocess.Popen(
        [sys.executable, "-c", SEARCH, json.dumps(spec)],
        stderr=subprocess.DEVNULL,
    )
    wait_for(lambda: list((folder / "trial_000").glob("model_epoch_000*.pth")), process)
    workers = find_workers(process.pid)
    assert len(workers) == 1
    os.kill(workers[0], signal.SIGKILL)
    assert process.wait(timeout=200) == 0
    rows = read_outcomes(folder / "all_trials.csv")
    assert rows == read_outcomes(searched / "all_trials.csv")[:3]


def test_workers_end_when_the_search_is_killed(data: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SEARCH, json.dumps(make_search(data, "orphans"))],
        stderr=subprocess.DEVNULL,
    )
    wait_for(lambda: find_workers(process.pid), process)
    workers = find_workers(process.pid)
    process.kill()
    process.wait()
    assert workers
    wait_for(lambda: not any(is_running(worker) for worker in workers))


def wait_for(check: Any, process: subprocess.Popen[Any] | None = None, timeout_s: float = 120) -> None:
    until_s = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < until_s, "waited too long"
        assert process is None or process.poll() is None, "the process ended before"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def find_workers(parent: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            is_child = path.joinpath("stat").read_text().rpartition(")")[2].split()[1] == str(parent)
            if is_child and b"kinegraph.automl.worker" in path.joinpath("cmdline").read_bytes():
                found.append(int(path.name))
        except OSError:
            continue
    return found


def test_two_workers_try_the_same_random_trials(data: Path, searched: Path) -> None:
    result = automl(make_search(data, "two_workers", automl_max_concurrent=2))
    rows = read_outcomes(Path(result.files["results_dir"]) / "all_trials.csv")
    assert rows == read_outcomes(searched / "all_trials.csv")[:3]


def test_promoted_trial_ends_as_one_that_was_never_paused(data: Path, tmp_path: Path) -> None:
    options = {"algorithm": "asha", "automl_max_epochs": 4, "automl_reduction_factor": 2}
    spec = make_search(data, "asha", automl_delete_intermediate_ckpt=False, **options)
    spec["train"]["optim"] |= {"lr_scheduler": "Cosine"}
    spec["train"]["validation_interval"] = 3
    result = automl(spec)
    folder = Path(result.files["results_dir"])
    rows = read_rows(folder / "all_trials.csv")
    budgets = sorted(int(row["budget"]) for row in rows)
    assert budgets[-1] == 4 and budgets[0] == 1
    for row in rows:  # also where the interval of the spec has no validation at the rung
        best = json.loads((folder / f"trial_{int(row['number']):03d}/best.json").read_text())
        assert float(row["score"]) == pytest.approx(best["val_acc"], abs=1e-6)
    number = next(int(row["number"]) for row in rows if row["budget"] == "4")
    assert result.metrics["best_trial"] == number
    log = (folder / f"trial_{number:03d}/log.txt").read_text()
    assert log.count("Resuming from") == 2
    straight = yaml.safe_load((folder / f"trial_{number:03d}/experiment.yaml").read_text())
    straight["train"] |= {"results_dir": str(tmp_path), "stop_after_epoch": -1}
    train(straight)
    names = sorted(path.name for path in tmp_path.glob("model_epoch_003*.pth"))
    assert len(names) == 1
    ours, theirs = (read_checkpoint(place / names[0]) for place in (folder / f"trial_{number:03d}", tmp_path))
    assert len(ours.state_dict) == 172
    assert all(torch.equal(ours.state_dict[name], theirs.state_dict[name]) for name in ours.state_dict)


def test_a_search_over_few_choices_ends_when_all_are_tried(data: Path) -> None:
    spec = make_search(data, "few", automl_max_recommendations=9, automl_hyperparameters=["train.optim.nesterov"])
    result = automl(spec)
    rows = read_rows(Path(result.files["all_trials"]))
    assert sorted(row["train.optim.nesterov"] for row in rows) == ["false", "true"]
    assert len(rows) == 2


def test_a_trial_that_diverges_fails_alone(data: Path) -> None:
    ranges = {"train.optim.lr": {"valid_min": 1e30, "valid_max": 1e32}}
    spec = make_search(data, "diverging", custom_param_ranges=ranges, automl_hyperparameters=["train.optim.lr"])
    result = automl(spec)
    rows = read_rows(Path(result.files["all_trials"]))
    assert [row["state"] for row in rows] == ["complete", "failed", "failed"]
    assert rows[1]["score"] == "" and "finite" in rows[1]["error"]
    assert result.metrics["best_trial"] == 0 and result.metrics["num_failed"] == 2


def test_a_search_without_any_good_trial_fails(data: Path) -> None:
    spec = make_search(data, "hopeless", automl_max_recommendations=1)
    spec["train"]["optim"]["lr"] = 1e30
    with pytest.raises(KinegraphError, match="no trial that ended well") as caught:
        automl(spec)
    assert caught.value.exit_code == 1


def test_a_mistake_in_the_data_stops_the_search_and_can_be_mended(data: Path) -> None:
    spec = make_search(data, "mistake", automl_max_recommendations=1)
    spec["dataset"]["label_map"] = {"one": 0, "two": 1}
    with pytest.raises(UserError, match="label"):
        automl(spec)
    del spec["dataset"]["label_map"]
    assert automl(spec).metrics["num_trials"] == 1
    spec = make_search(data, "mistake_of_two", automl_max_recommendations=2, automl_max_concurrent=2)
    spec["dataset"]["label_map"] = {"one": 0, "two": 1}
    with pytest.raises(UserError, match="label"):
        automl(spec)
    assert not (data / "mistake_of_two/automl/study.journal").exists()


def test_confirmation_trains_both_sides_with_other_seeds(data: Path) -> None:
    options = {"confirm_seeds": 2, "custom_param_ranges": {"train.optim.lr": {"valid_min": 0.001, "valid_max": 0.1}}}
    spec = make_search(data, "confirmed", metric="train_loss", **options)
    spec["train"]["optim"]["lr"] = 1e-7  # so that another trial is the best
    result = automl(spec)
    folder = Path(result.files["results_dir"])
    assert result.metrics["best_trial"] > 0
    comparison = json.loads((folder / "comparison.json").read_text())
    assert set(comparison["spec"]["scores"]) == set(comparison["best"]["scores"]) == {"1235", "1236"}
    for side, name in (("spec", "spec"), ("best", f"trial_{result.metrics['best_trial']:03d}")):
        for seed in ("1235", "1236"):
            rows = read_rows(folder / "confirm" / f"{name}_seed_{seed}" / "metrics.csv")
            assert comparison[side]["scores"][seed] == min(float(row["train_loss"]) for row in rows)
            experiment = yaml.safe_load((folder / "confirm" / f"{name}_seed_{seed}" / "experiment.yaml").read_text())
            assert experiment["train"]["seed"] == int(seed)


def test_the_key_reaches_workers_and_no_file(data: Path) -> None:
    result = automl(make_search(data, "encrypted", automl_max_recommendations=1), "encryption_key=Hush-Hush-77")
    folder = Path(result.files["results_dir"])
    assert read_checkpoint(folder / "pc_model_best.pth", "Hush-Hush-77").num_classes == 3
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert not [path for path in files if b"Hush-Hush-77" in path.read_bytes()]


def test_journal_keeps_trials_and_survives_a_torn_line(tmp_path: Path) -> None:
    from optuna.distributions import FloatDistribution

    distributions = {"lr": FloatDistribution(0.1, 1.0)}
    journal = StudyJournal(tmp_path, "minimize")
    trials = [Trial(number, {"lr": 0.5, "x": [1, "a"]}, 3, bracket=number) for number in range(2)]
    for trial in trials:
        journal.add(trial, {"lr": 0.5}, distributions)
    trials[0].scores, trials[0].state, trials[0].target = {3: 0.25}, "paused", 9
    journal.update(trials[0])
    trials[1].state, trials[1].error, trials[1].seconds = "failed", "boom", 2.5
    journal.update(trials[1])
    with open(tmp_path / "study.journal", "ab") as file:
        file.write(b'{"op_code": 8, "worker_id": "x')
    (tmp_path / "study.journal.lock").symlink_to("nowhere")
    assert StudyJournal(tmp_path, "minimize").load() == trials
    trials[0].scores[9], trials[0].state = 0.125, "complete"
    StudyJournal(tmp_path, "minimize").update(trials[0])
    assert StudyJournal(tmp_path, "minimize").load() == trials


def test_a_kill_between_any_two_lines_of_the_journal_loses_nothing(tmp_path: Path) -> None:
    """Every prefix of the file is a state that the study was in; a trial that ended has its score."""
    from optuna.distributions import FloatDistribution

    (tmp_path / "whole").mkdir()
    journal = StudyJournal(tmp_path / "whole", "maximize")
    states: list[list[Trial]] = [[]]
    trial = Trial(0, {"lr": 0.5}, 1)
    journal.add(trial, {"lr": 0.5}, {"lr": FloatDistribution(0.1, 1.0)})
    states.append([copy.deepcopy(trial)])
    for change in (
        {"scores": {1: 0.25}, "state": "paused"},
        {"target": 3, "state": "running"},
        {"scores": {1: 0.25, 3: 0.75}, "state": "complete", "seconds": 2.0},
    ):
        for name, value in change.items():
            setattr(trial, name, value)
        journal.update(trial)
        states.append([copy.deepcopy(trial)])
    lines = (tmp_path / "whole/study.journal").read_bytes().splitlines(keepends=True)
    assert len(lines) >= 7
    seen = []
    for count in range(1, len(lines) + 1):
        folder = tmp_path / str(count)
        folder.mkdir()
        (folder / "study.journal").write_bytes(b"".join(lines[:count]))
        found = StudyJournal(folder, "maximize").load()
        assert found in states
        seen.append(states.index(found))
        assert StudyJournal(folder, "maximize").load() == found
    assert seen == sorted(seen) and set(seen) == set(range(len(states)))


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1}\n{"b"\n',
        '{"op_code":0,"worker_id":"x","study_name":"kinegraph","directions":[2]}\n'
        '{"op_code":4,"worker_id":"x","study_id":0,"datetime_start":"2026-01-01T00:00:00","state":0,"value":null,'
        '"values":null,"distributions":{},"params":{},"user_attrs":{"trial":{"number":0,"state":5}},"system_attrs":{},'
        '"intermediate_values":{}}\n',
        '{"op_code":0,"worker_id":"x","study_name":"kinegraph","directions":[2]}\n'
        '{"op_code":4,"worker_id":"x","study_id":0,"datetime_start":"2026-01-01T00:00:00","state":0,"value":null,'
        '"values":null,"distributions":{},"params":{},"user_attrs":{},"system_attrs":{},"intermediate_values":{}}\n',
        "[" * 100_000 + "\n{}\n",
    ],
)
def test_a_damaged_journal_is_a_clear_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "study.journal").write_text(text)
    with pytest.raises(KinegraphError, match=r"study\.journal: got a file that cannot be read"):
        StudyJournal(tmp_path, "maximize").load()


def test_a_run_whose_loss_was_not_finite_has_failed(tmp_path: Path) -> None:
    header = "epoch,step,lr,train_loss,train_acc,val_loss,val_acc,seconds\n"
    (tmp_path / "metrics.csv").write_text(header + "0,1,0.1,1.0,0.5,0.9,0.6,1\n1,2,0.1,1.0,0.5,nan,0.9,1\n")
    assert find_divergence(tmp_path, 1) == ""
    assert find_divergence(tmp_path, 2) == "val_loss was nan in epoch 2"
    (tmp_path / "metrics.csv").write_text(header + "0,1,0.1,1.0,0.5,,,1\n1,2,0.1,1.0,0.5,0.9,0.9,1\n")
    assert find_divergence(tmp_path, 2) == "", "an epoch without validation is sound"
    assert find_divergence(tmp_path / "nothing", 2) == ""


def test_a_model_that_blows_up_in_the_last_step_is_no_good_trial(data: Path) -> None:
    """One step, an enormous rate: the loss before it is finite, and the accuracy after it the share of a class."""
    spec = make_search(data, "blown_up", automl_max_recommendations=1)
    spec["dataset"]["batch_size"] = 13
    spec["train"] |= {"num_epochs": 1, "optim": {"lr": 1e37}}
    with pytest.raises(KinegraphError, match="no trial that ended well: val_loss was nan"):
        automl(spec)


def test_leftovers_of_a_forgotten_study_are_set_aside(tmp_path: Path) -> None:
    (tmp_path / "trial_000").mkdir()
    (tmp_path / "trial_000/metrics.csv").write_text("old")
    (tmp_path / "confirm").mkdir()
    run = Run("automl", tmp_path, Spec())
    set_leftovers_aside(run)
    set_leftovers_aside(run)
    (tmp_path / "trial_000").mkdir()
    set_leftovers_aside(run)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"trial_000.forgotten1", "trial_000.forgotten2", "confirm.forgotten1"}
    assert (tmp_path / "trial_000.forgotten1/metrics.csv").read_text() == "old"


def test_confirmation_names_the_trial_that_it_confirms(data: Path, tmp_path: Path) -> None:
    """Another trial may be the best once the study is extended: its trainings must not be taken for the new one's."""
    loaded = read_spec(make_search(data, confirm_seeds=1))
    run = Run("automl", tmp_path, loaded.values)
    pool = RecordingPool()
    for number in (1, 3):
        confirm_best(loaded.values, run, pool, {}, Trial(number, {"model.dropout": 0.1 * number}, 2), 2, "maximize")
    folders = [Path(spec["train"]["results_dir"]).name for spec in pool.specs]
    assert folders == ["spec_seed_1235", "trial_001_seed_1235", "spec_seed_1235", "trial_003_seed_1235"]


class RecordingPool:
    """A pool whose trainings fail at once."""

    num_free = 1

    def __init__(self) -> None:
        self.specs: list[dict[str, Any]] = []
        self.names: list[str] = []

    def submit(self, name: str, spec: dict[str, Any]) -> None:
        self.specs.append(spec)
        self.names.append(name)

    def wait(self, timeout_s: float) -> Outcome:
        return Outcome(self.names.pop(), "not trained")


def test_every_problem_of_a_search_is_told_at_once(data: Path) -> None:
    spec = make_search(data, algorithm="dehb", metric="val_accuracy", automl_hyperparameters=["train.optim.rl"])
    spec["automl"]["automl_max_concurrent"] = 0
    with pytest.raises(SpecError) as caught:
        make_plan(read_spec(spec))
    text = str(caught.value)
    for place in ("automl.algorithm", "automl.metric", "automl.automl_hyperparameters", "automl.automl_max_concurrent"):
        assert place in text


def test_a_direction_against_the_meaning_of_the_metric_is_refused(data: Path) -> None:
    with pytest.raises(SpecError, match=r"automl\.direction: got minimize, expected maximize for val_acc"):
        make_plan(read_spec(make_search(data, direction="minimize")))


@pytest.mark.parametrize(("threads", "expected"), [("4,2", "4"), ("0", None), ("many", None), ("", None)])
def test_odd_numbers_of_threads(data: Path, monkeypatch: pytest.MonkeyPatch, threads: str, expected: str) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    found = choose_environments(read_spec(make_search(data)).values)
    assert found == [{"OMP_NUM_THREADS": expected or str(os.cpu_count())}]


def test_no_more_workers_than_trials(data: Path) -> None:
    spec = read_spec(make_search(data, automl_max_concurrent=100_000)).values
    assert len(choose_environments(spec)) == 3


def test_best_is_among_the_largest_budget() -> None:
    trials = [
        Trial(0, {}, 9, "complete", scores={3: 0.5, 9: 0.6}),
        Trial(1, {}, 3, "paused", scores={3: 0.9}),
        Trial(2, {}, 9, "complete", scores={9: 0.6}),
        Trial(3, {}, 9, "failed", scores={9: 0.99}),
        Trial(4, {}, 9, "complete", scores={9: float("nan")}),
    ]
    assert find_best(trials, "maximize") is trials[0]
    trials[2].scores[9] = 0.5
    assert find_best(trials, "minimize") is trials[2]
    assert find_best(trials[3:], "maximize") is None


def test_trial_spec_states_only_what_the_user_gave(data: Path) -> None:
    loaded = read_spec(make_search(data), ["encryption_key=secret", "train.optim.momentum=0.8"])
    base = build_base(loaded.values, loaded.origins)
    assert base["train"] == {"num_epochs": 2, "accelerator": "cpu", "optim": {"lr": 0.01, "momentum": 0.8}}
    assert "num_classes" not in base["dataset"]
    assert not {"encryption_key", "automl", "results_dir"} & set(base)
    spec = build_trial_spec(base, {"model.dropout": 0.1}, data / "x", num_epochs=9, stop_after_epoch=3, seed=7)
    assert spec["model"]["dropout"] == 0.1
    assert spec["train"] | {"optim": 0} == {
        "num_epochs": 9,
        "accelerator": "cpu",
        "optim": 0,
        "results_dir": str(data / "x"),
        "stop_after_epoch": 3,
        "best_metric": "val_acc",
        "seed": 7,
    }
    assert base["train"]["num_epochs"] == 2, "the base is not touched"


def test_threads_are_divided_among_workers(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert choose_environments(read_spec(make_search(data)).values) == [{"OMP_NUM_THREADS": "8"}]
    spec = read_spec(make_search(data, automl_max_concurrent=3)).values
    assert choose_environments(spec) == [{"OMP_NUM_THREADS": "2"}] * 3


def test_gpus_are_divided_among_workers(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 6)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    overrides = ["train.accelerator=auto", "train.num_gpus=2"]
    found = choose_environments(read_spec(make_search(data), overrides).values)
    assert found == [{"CUDA_VISIBLE_DEVICES": ids} for ids in ("0,1", "2,3", "4,5")]
    assert len(choose_environments(read_spec(make_search(data), ["train.accelerator=auto"]).values)) == 4
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,5,3,2,1,0")
    assert choose_environments(read_spec(make_search(data), overrides).values)[1]["CUDA_VISIBLE_DEVICES"] == "3,2"
    with pytest.raises(SpecError, match="automl_max_concurrent"):
        choose_environments(read_spec(make_search(data, automl_max_concurrent=4), overrides).values)


def test_definition_ignores_what_decides_nothing(data: Path, tmp_path: Path) -> None:
    def check(*overrides: str) -> None:
        check_definition(Run("automl", tmp_path, read_spec(make_search(data), overrides).values))

    check()
    harmless = ["dataset.num_workers=3", "automl.confirm_seeds=4", "automl.automl_max_recommendations=50"]
    check(*harmless)
    with pytest.raises(SpecError) as caught:
        check("model.dropout=0.1", "automl.algorithm=tpe")
    assert [problem.where for problem in caught.value.problems] == ["automl.algorithm", "model.dropout"]


def test_plan_counts_epochs_and_estimates_time(data: Path) -> None:
    options = {"algorithm": "hyperband", "automl_max_epochs": 9, "automl_max_recommendations": 100, "confirm_seeds": 2}
    plan = make_plan(read_spec(make_search(data, **options)))
    # Hyperband's table for R = 9, eta = 3: 9 -> 3 -> 1, 5 -> 1, 3 (here in several rounds of 17)
    first = plan["schedule"]["brackets"][:3]
    assert [[(rung["num_trials"], rung["budget"]) for rung in rungs] for rungs in first] == [
        [(9, 1), (3, 3), (1, 9)],
        [(5, 3), (1, 9)],
        [(3, 9)],
    ]
    assert plan["confirm_epochs"] == 2 * 2 * 9
    epochs = plan["schedule"]["expected_epochs"] + 36
    assert plan["estimated_seconds"] == pytest.approx(plan["seconds_per_epoch"] * epochs)
    assert plan["first_trials"][0]["train.optim.lr"] == 0.01
    text = format_plan(plan)
    assert "9 to epoch 1 -> 3 to epoch 3 -> 1 to epoch 9" in text and "0 (your spec)" in text
    assert re.search(r"train\.optim\.patience +not searched: it counts only with train\.optim\.lr_scheduler", text)


def test_estimate_counts_every_step_of_an_epoch(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def estimate(**options: int) -> float:
        spec = make_search(data)
        spec["train"] |= options
        seconds = estimate_epoch_seconds(read_spec(spec).values)
        assert seconds is not None
        return seconds

    monkeypatch.setattr("kinegraph.automl.estimate._measure_step", lambda spec, clips: 1.0)
    once, validation = estimate(), estimate() - estimate(validation_interval=10**6)
    steps = round(once - validation)
    assert steps >= 1 and validation > 0
    assert estimate(min_epoch_steps=5 * steps) - validation == pytest.approx(5 * steps)


def test_estimate_measures_the_network_with_its_input(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    real = TrainingAugmentation.__call__

    def augment(*given: Any) -> torch.Tensor:
        shapes.append(real(*given).shape)
        return real(*given)

    monkeypatch.setattr(TrainingAugmentation, "__call__", augment)
    spec = make_search(data)
    spec["model"] |= {"model_type": "EF-GCN", "fusion": "late", "width": 0.25}
    spec["input"] = {"streams": ["joint", "bone"], "sampling": "uniform", "num_frames": 7}
    spec["augment"] = {"rotation_y": 30.0}
    seconds = estimate_epoch_seconds(read_spec(spec).values)
    assert seconds is not None and seconds > 0
    assert len(shapes) >= 2 and all(shape[1:3] == (6, 7) for shape in shapes)


def test_a_lost_worker_takes_along_what_it_forked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that reads data, forked just before its worker is killed, has its pipe and does not end by itself."""
    program, orphan = tmp_path / "worker.sh", tmp_path / "orphan"
    program.write_text(f"#!/bin/sh\nsleep 1000 &\necho $! > {orphan}.new\nmv {orphan}.new {orphan}\nexec sleep 1000\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with WorkerPool(tmp_path / "logs", [{}]) as pool:
        pool.submit("lost", {})
        wait_for(orphan.exists)
        os.kill(pool._workers[0].process.pid, signal.SIGKILL)
        outcome = pool.wait(30)
    assert outcome is not None and outcome.died and "SIGKILL" in outcome.error
    wait_for(lambda: not is_running(int(orphan.read_text())))


def test_pool_replaces_a_worker_and_reports_errors(tmp_path: Path, data: Path) -> None:
    spec = make_spec(data)
    spec["train"] |= {"results_dir": str(tmp_path / "run"), "num_epochs": 1}
    broken = {**spec, "dataset": spec["dataset"] | {"batch_size": 0}}
    with WorkerPool(tmp_path / "logs", [{"OMP_NUM_THREADS": "1"}]) as pool:
        pool.submit("broken", broken)
        assert pool.num_free == 0
        outcome = pool.wait(100)
        assert outcome is not None and outcome.is_mistake and "batch_size" in outcome.error
        pool.submit("killed", spec)
        os.kill(pool._workers[0].process.pid, signal.SIGKILL)
        outcome = pool.wait(100)
        assert outcome is not None and outcome.died and "SIGKILL" in outcome.error
        pool.submit("again", spec)
        outcome = pool.wait(100)
        assert outcome is not None and (outcome.name, outcome.error) == ("again", "")
        os.kill(pool._workers[0].process.pid, signal.SIGKILL)  # while it has nothing to do
        pool._workers[0].process.wait()
        pool.submit("once more", spec)
        outcome = pool.wait(100)
        assert outcome is not None and (outcome.name, outcome.error) == ("once more", "")
    assert (tmp_path / "run/pc_model_latest.pth").exists()
