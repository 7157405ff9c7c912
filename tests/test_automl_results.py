from __future__ import annotations

import csv
import io
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from kinegraph.actions import train
from kinegraph.automl.axes import make_axis, shorten_keys, wrap_name
from kinegraph.automl.comparison import compare_with_spec, write_comparison
from kinegraph.automl.plots import measure_importance, write_plots
from kinegraph.automl.results import (
    prune_checkpoints,
    read_curve,
    read_scores,
    remove_checkpoints,
    write_results,
    write_trials,
)
from kinegraph.automl.table import (
    Mode,
    StudyRow,
    StudyTable,
    TrialRow,
    build_table,
    choose_mode,
    format_line,
    select_rows,
)
from kinegraph.automl.trials import Trial
from kinegraph.errors import SpecError
from kinegraph.spec_reading import read_spec
from small_runs import make_spec, write_small_data

METRICS = """epoch,step,lr,train_loss,train_acc,val_loss,val_acc,seconds
0,3,0.1,1.5,0.2,,,1
1,6,0.1,1.2,0.4,0.9,0.5,1
2,9,0.1,1.1,0.5,nan,0.7,1
3,12,0.1,1.0,0.6,0.4,0.7,1
4,15,0.1,0.9,0.6,0.2,inf,1
"""


def make_trials() -> list[Trial]:
    """Rungs 1 and 3; trial 1 is the best at 3; trial 0 has a higher score at 1; trial 2 failed."""
    lr, scheduler, patience = "train.optim.lr", "train.optim.lr_scheduler", "train.optim.patience"
    return [
        Trial(0, {lr: 0.1, scheduler: "Cosine"}, 1, "paused", scores={1: 0.9}, seconds=1.0),
        Trial(1, {lr: 0.01, scheduler: "AutoReduce", patience: 3}, 3, "complete", 0, {1: 0.5, 3: 0.8}, 3.1416),
        Trial(2, {lr: 0.4, scheduler: "Cosine"}, 1, "failed", scores={1: math.nan}, error="=loss, not\nfinite"),
        Trial(3, {lr: 0.3, scheduler: "Cosine"}, 3, "complete", scores={1: 0.6, 3: 0.7}),
        Trial(4, {lr: 0.2, scheduler: "Cosine", "train.num_epochs": 9}, 3, "running", scores={1: 0.55}),
    ]


def write_run(folder: Path, epoch: int = 2) -> None:
    """A run folder with a checkpoint of every kind; the best one is a link, as a training leaves it."""
    folder.mkdir()
    for name in (f"model_epoch_{epoch:03d}_step_00009.pth", "model_epoch_001_step_00006.pth"):
        (folder / name).write_bytes(folder.name.encode() + name.encode())
    for pointer in ("pc_model_best.pth", "pc_model_latest.pth"):
        (folder / pointer).symlink_to(f"model_epoch_{epoch:03d}_step_00009.pth")
    best = {"val_acc": 0.8, "epoch": epoch, "step": 9, "file": f"model_epoch_{epoch:03d}_step_00009.pth"}
    (folder / "best.json").write_text(json.dumps(best))
    (folder / "metrics.csv").write_text(METRICS)
    spec = {
        "results_dir": "",
        "train": {"results_dir": str(folder), "num_epochs": 3, "stop_after_epoch": 1, "optim": {"lr": 0.01}},
    }
    (folder / "experiment.yaml").write_text(yaml.safe_dump(spec))


@pytest.fixture()
def study(tmp_path: Path) -> Path:
    for trial in make_trials():
        write_run(tmp_path / trial.name)
    return tmp_path


def write(folder: Path, trials: list[Trial], **options: Any) -> dict[str, str]:
    given = {"metric": "val_acc", "direction": "maximize", "experiment_id": "study", **options}
    return write_results(folder, trials, **given)


def test_scores_are_the_best_finite_values_up_to_the_budget(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    expected = {
        ("val_acc", "maximize", 1): None,
        ("val_acc", "maximize", 2): (0.5, 1),
        ("val_acc", "maximize", 99): (0.7, 2),
        ("val_acc", "minimize", 99): (0.5, 1),
        ("val_loss", "minimize", 4): (0.4, 3),
        ("val_loss", "minimize", 5): (0.2, 4),
    }
    found = {key: read_scores(tmp_path / "run", key[0], key[1], key[2]) for key in expected}
    assert found == expected
    assert read_curve(tmp_path / "run", "val_loss") == [(1, 0.9), (3, 0.4), (4, 0.2)]
    assert read_scores(tmp_path / "none", "val_acc", "maximize", 9) is None
    with pytest.raises(SpecError, match=r"automl\.metric.*val_f1.*val_acc"):
        read_scores(tmp_path / "run", "val_f1", "maximize", 9)


def test_damaged_rows_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_bytes(
        METRICS.encode() + b"5,18,0.1,1,1,0.1\nx,1,1,1,1,1,0.99,1\n\x00\xff,,\n-1,,,,,,0.99,"
    )
    assert read_scores(tmp_path, "val_acc", "maximize", 99) == (0.7, 2)
    (tmp_path / "metrics.csv").write_bytes(b"")
    assert read_scores(tmp_path, "val_acc", "maximize", 99) is None


def test_best_rec_holds_what_the_facts_say(study: Path) -> None:
    trials = make_trials()
    trials[1].values["train.num_epochs"] = 3
    trials[1].values["train.stop_after_epoch"] = 3
    write(study, trials, location="s3://bucket/study")
    assert json.loads((study / "best_rec.json").read_text()) == {
        "schema_version": 1,
        "experiment_id": "study",
        "metric_name": "val_acc",
        "direction": "maximize",
        "best": {
            "rec_id": 1,
            "score": 0.8,
            "specs": {"train": {"optim": {"lr": 0.01, "lr_scheduler": "AutoReduce", "patience": 3}}},
            "observed_budget": 3,
            "checkpoint_uri": "s3://bucket/study/pc_model_best.pth",
            "checkpoint_epoch": 2,
            "checkpoint_step": 9,
        },
        "all_recs": [
            {"rec_id": 0, "score": 0.9, "job_id": "trial_000"},
            {"rec_id": 1, "score": 0.8, "job_id": "trial_001"},
            {"rec_id": 2, "score": None, "job_id": "trial_002"},
            {"rec_id": 3, "score": 0.7, "job_id": "trial_003"},
            {"rec_id": 4, "score": 0.55, "job_id": "trial_004"},
        ],
    }


def test_files_of_the_best_trial_stand_beside_the_study(study: Path) -> None:
    files = write(study, make_trials())
    assert set(files) == {"all_trials", "best_rec", "best", "best_metrics", "best_spec"}
    assert all(Path(path).is_file() for path in files.values())
    assert not (study / "pc_model_best.pth").is_symlink()
    assert (study / "pc_model_best.pth").read_bytes() == b"trial_001model_epoch_002_step_00009.pth"
    metrics = json.loads((study / "best.json").read_text())
    assert metrics == {"val_acc": 0.8, "epoch": 2, "step": 9, "file": "pc_model_best.pth", "trial": "trial_001"}
    best = write(study, make_trials(), direction="minimize")["best"]
    assert Path(best).read_bytes().startswith(b"trial_003")


def test_table_of_trials_has_a_column_for_each_option(study: Path) -> None:
    write(study, make_trials()[::-1])
    with open(study / "all_trials.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    options = ["train.optim.lr", "train.optim.lr_scheduler", "train.optim.patience", "train.num_epochs"]
    assert list(rows[0]) == ["number", "state", "score", "budget", "seconds", *options, "error"]
    assert [row["number"] for row in rows] == ["0", "1", "2", "3", "4"]
    assert rows[1] | {"error": ""} == {
        "number": "1",
        "state": "complete",
        "score": "0.8",
        "budget": "3",
        "seconds": "3.142",
        "train.optim.lr": "0.01",
        "train.optim.lr_scheduler": "AutoReduce",
        "train.optim.patience": "3",
        "train.num_epochs": "",
        "error": "",
    }
    assert (rows[2]["state"], rows[2]["score"], rows[2]["train.optim.patience"]) == ("failed", "", "")
    assert rows[2]["error"] == "'=loss, not\nfinite"  # no formula for a spreadsheet
    write_trials(study / "values.csv", [Trial(0, {"a": True, "b": [1, 2], "c": -1}, 1)])
    assert (study / "values.csv").read_text().splitlines()[1] == '0,running,,0,0.0,true,"[1, 2]",-1,'


def test_study_without_a_sound_trial_has_no_best(tmp_path: Path) -> None:
    failed = [Trial(0, {"a": 1}, 1, "failed", error="boom"), Trial(1, {"a": 2}, 1, "paused", scores={1: math.inf})]
    assert set(write(tmp_path, failed)) == {"all_trials", "best_rec"}
    record = json.loads((tmp_path / "best_rec.json").read_text())
    assert record["best"] is None
    assert [entry["score"] for entry in record["all_recs"]] == [None, None]


def test_best_whose_checkpoint_is_gone_is_told_without_one(study: Path) -> None:
    (study / "trial_001/pc_model_best.pth").unlink()
    (study / "trial_001/experiment.yaml").unlink()
    assert set(write(study, make_trials())) == {"all_trials", "best_rec"}
    best = json.loads((study / "best_rec.json").read_text())["best"]
    assert (best["rec_id"], best["checkpoint_uri"], best["checkpoint_epoch"]) == (1, None, None)


def test_best_spec_trains_to_the_end_in_a_folder_of_its_own(tmp_path: Path) -> None:
    write_small_data(tmp_path)
    spec = make_spec(tmp_path, results="unused", optim={"lr": 0.02})
    folder = tmp_path / "study"
    spec["train"] |= {"results_dir": str(folder / "trial_000"), "num_epochs": 2, "stop_after_epoch": 1}
    train(spec)
    trials = [Trial(0, {"train.optim.lr": 0.02}, 1, "paused", scores={1: 0.5})]
    files = write(folder, trials)
    loaded = read_spec(files["best_spec"], [], "train").values
    assert (loaded.train.optim.lr, loaded.train.num_epochs, loaded.train.stop_after_epoch) == (0.02, 2, -1)
    train(files["best_spec"])
    with open(folder / "train/metrics.csv", newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["0", "1"]
    text = Path(files["best_spec"]).read_text()
    assert text.startswith("# ") and "kinegraph train -e best_spec.yaml" in text and "encryption_key" not in text


def list_checkpoints(folder: Path) -> dict[str, int]:
    return {path.name: len(list(path.glob("*.pth"))) for path in sorted(folder.glob("trial_*"))}


def test_checkpoints_of_others_are_removed_once_they_are_of_no_use(study: Path) -> None:
    trials = make_trials()
    before = {path.name for path in (study / "trial_003").iterdir() if path.suffix != ".pth"}
    freed_bytes = remove_checkpoints(study, trials, "maximize", is_finished=False)
    assert list_checkpoints(study) == {
        "trial_000": 3,  # paused: may be promoted; keeps its newest and its best, which are one file with two pointers
        "trial_001": 3,  # the best, the same
        "trial_002": 0,
        "trial_003": 0,
        "trial_004": 4,  # running
    }
    assert {path.name for path in (study / "trial_003").iterdir()} == before
    assert freed_bytes >= 2 * 2 * len(b"trial_001model_epoch_002_step_00009.pth")
    remove_checkpoints(study, trials, "maximize", is_finished=True)
    assert list_checkpoints(study) == {"trial_000": 0, "trial_001": 3, "trial_002": 0, "trial_003": 0, "trial_004": 4}
    assert remove_checkpoints(study, trials, "maximize", is_finished=True) == 0


def test_pruning_keeps_the_newest_and_the_best_also_where_pointers_are_copies(tmp_path: Path) -> None:
    """A run that came from a URI has copies in the place of links."""
    names = [f"model_epoch_{epoch:03d}_step_{3 * epoch:05d}.pth" for epoch in range(4)]
    for name in (*names, "pc_model_best.pth", "pc_model_latest.pth"):
        (tmp_path / name).write_bytes(b"weights")
    prune_checkpoints(tmp_path)
    assert len(list(tmp_path.glob("*.pth"))) == 6, "which one is the best is not known"
    (tmp_path / "best.json").write_text(json.dumps({"file": names[1]}))
    prune_checkpoints(tmp_path)
    left = {path.name for path in tmp_path.glob("*.pth")}
    assert left == {names[1], names[3], "pc_model_best.pth", "pc_model_latest.pth"}


def compare(spec: dict[int, float | None], best: dict[int, float | None], **options: Any) -> Any:
    return compare_with_spec(spec, best, **{"metric": "val_acc", "direction": "maximize", "num_trials": 20, **options})


def test_one_seed_is_told_as_possible_luck(tmp_path: Path) -> None:
    comparison = compare({1: 0.8}, {1: 0.9})
    assert comparison.verdict == "unclear" and comparison.gain == pytest.approx(0.1)
    assert comparison.standard_error is None and comparison.interval is None
    assert "may be luck" in comparison.text and "confirm_seeds" in comparison.text
    data = json.loads(write_comparison(tmp_path, comparison).read_text())
    assert data["spec"]["scores"] == {"1": 0.8} and data["verdict"] == "unclear"
    assert compare({1: 0.8, 2: 0.7}, {1: 0.9}).verdict == "unclear"


def test_several_seeds_are_measured_against_their_scatter() -> None:
    """Against Welch's interval by hand: 3 seeds each and equal variances give 4 degrees of freedom, t = 2.776."""
    spec: dict[int, float | None] = {1: 0.80, 2: 0.82, 3: 0.84}
    comparison = compare(spec, {seed: score + 0.1 for seed, score in spec.items() if score is not None})
    error = math.sqrt(2 * 0.02**2 / 3)
    assert comparison.spec.standard_deviation == pytest.approx(statistics.stdev([0.8, 0.82, 0.84]))
    assert comparison.standard_error == pytest.approx(error)
    assert comparison.interval == pytest.approx((0.1 - 2.7764 * error, 0.1 + 2.7764 * error), abs=1e-4)
    assert comparison.verdict == "better"
    assert f"{0.1 / error:.1f} standard errors" in comparison.text
    assert "20 trials" in comparison.text and "test split" in comparison.text
    close = compare(spec, {seed: score + 0.03 for seed, score in spec.items() if score is not None})
    assert close.verdict == "unclear" and "no gain is shown" in close.text
    two = compare({1: 0.3, 2: 0.4}, {1: 0.74, 2: 0.75})
    assert two.verdict == "unclear" and "automl.confirm_seeds=3" in two.text


def test_comparison_knows_the_direction_and_what_failed() -> None:
    low, high = {1: 0.10, 2: 0.11, 3: 0.12}, {1: 0.50, 2: 0.51, 3: 0.52}
    assert compare(high, low, metric="val_loss", direction="minimize").verdict == "better"
    assert compare(high, low, metric="val_loss", direction="minimize").gain == pytest.approx(0.4)
    worse = compare(high, low)
    assert worse.verdict == "worse" and "luck" in worse.text and worse.gain == pytest.approx(-0.4)
    partly = compare({**low, 4: None}, {**high, 4: math.nan})
    assert partly.verdict == "better" and partly.text.count("1 failed") == 2
    assert partly.best.scores[4] is None
    nothing = compare({1: None}, high)
    assert nothing.verdict == "not known" and nothing.gain is None and "nothing to compare" in nothing.text
    same = compare({1: 0.5, 2: 0.5}, {1: 0.5, 2: 0.5})
    assert same.verdict == "same" and "no difference" in same.text


def make_random_trials(count: int) -> list[Trial]:
    """The score depends on lr alone: the larger, the better."""
    trials = []
    for number in range(count):
        values: dict[str, Any] = {
            "train.optim.lr": 10 ** -(1 + number * 7 % count / count * 3),
            "model.dropout": number * 11 % 13 / 13,
            "train.grad_clip": 0.0 if number % 3 == 0 else 0.5 + number,
            "dataset.window_size": -1 if number % 4 == 0 else 10 * number,
            "train.optim.lr_scheduler": ("Cosine", "AutoReduce")[number % 2],
            "model.a_very_long_option_name_that_does_not_end": "$x_1$ " * 9 + str(number % 2),
        }
        if number % 2:
            values["train.optim.patience"] = 1 + number % 5
        score = math.log10(values["train.optim.lr"]) + 4
        rungs = (1, 3) if number % 5 == 0 else (1,)
        trials.append(Trial(number, values, rungs[-1], "paused", scores={rung: score + rung for rung in rungs}))
    return trials


@pytest.mark.parametrize("count", [0, 1, 4, 24])
def test_plots_are_pictures_for_any_number_of_trials(tmp_path: Path, count: int) -> None:
    trials = make_random_trials(count)
    for trial in trials:
        write_run(tmp_path / trial.name)
    if count > 1:
        trials[1].state, trials[1].scores = "failed", {}
    files = write_plots(tmp_path, trials, "val_acc", "minimize", log_keys=["train.optim.lr", "train.grad_clip"])
    assert set(files) == {"plot_history", "plot_importance", "plot_parallel", "plot_learning_curves"}
    for path in files.values():
        content = Path(path).read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n" and len(content) > 2000


def test_all_trials_failed_or_equal_gives_pictures_too(tmp_path: Path) -> None:
    for state, score in (("failed", math.nan), ("complete", 0.5)):
        trials = [Trial(number, {"a": number}, 1, state, scores={1: score}) for number in range(10)]
        assert len(write_plots(tmp_path, trials, "val_acc", "maximize")) == 4


def test_importance_finds_the_option_that_matters() -> None:
    trials = make_random_trials(40)
    shares = measure_importance(trials, 1, "maximize", ["train.optim.lr"])
    assert next(iter(shares)) == "train.optim.lr" and shares["train.optim.lr"] > 0.5
    assert sum(shares.values()) == pytest.approx(1)
    assert shares == measure_importance(trials, 1, "maximize", ["train.optim.lr"])
    equal = [Trial(number, {"a": number}, 1, "complete", scores={1: 0.5}) for number in range(9)]
    assert measure_importance(equal, 1, "maximize") == {}
    constant = [Trial(number, {"a": 1}, 1, "complete", scores={1: number / 9}) for number in range(9)]
    assert measure_importance(constant, 1, "maximize") == {}


def place(values: list[Any], is_log: bool = False) -> list[float | None]:
    trials = [Trial(number, {} if value is None else {"a": value}, 1) for number, value in enumerate(values)]
    return list(make_axis("a", trials, is_log).positions.values())


def test_axes_place_values_between_0_and_1() -> None:
    assert place([0, 5, None, 10]) == [0.0, 0.5, None, 1.0]
    assert place([0.001, 0.1, 0.01], is_log=True) == pytest.approx([0.0, 1.0, 0.5])
    special, low, high = place([0.0, 0.1, 10.0], is_log=True)
    assert special == 0.0 and low is not None and 0.1 < low < 0.3 and high == 1.0
    assert place([-1, 10, 20])[0] == 0.0 and place([-1, 10, 20])[1] == low
    assert place(["b", "a", "b", True]) == [0.5, 0.0, 0.5, 1.0]
    assert place([7]) == place([0.0], is_log=True) == [0.5]


def test_names_are_as_short_as_they_can_be() -> None:
    keys = ["train.optim.lr", "train.optim.lr_decay", "model.dropout", "data.dropout"]
    assert list(shorten_keys(keys).values()) == ["lr", "lr_decay", "model.dropout", "data.dropout"]
    assert wrap_name("edge_importance_weighting") == "edge_\nimportance_\nweighting"


def make_row(
    number: int, state: Any = "complete", epoch: int = 9, target: int = 9, score: float | None = 0.5
) -> TrialRow:
    return TrialRow(number, state, epoch, target, score, elapsed_s=12.0, eta_s=30.0 if state == "running" else None)


STUDY = StudyRow(num_ended=2, max_trials=20, best_trial=1, best_score=0.9, elapsed_s=65.0, eta_s=600.0)


def show(mode: Mode, *snapshots: list[TrialRow]) -> list[str]:
    lines: list[str] = []
    with StudyTable("val_acc", "maximize", mode, lines.append) as table:
        for rows in snapshots:
            table.show(STUDY, rows)
    return lines


def test_lines_tell_changes_of_state_and_nothing_twice() -> None:
    running, later = make_row(1, "running", 1, score=None), make_row(1, "running", 5)
    lines = show(
        "lines", [make_row(0), running], [running, make_row(0)], [make_row(0), later], [make_row(0), make_row(1)]
    )
    assert [line.split(":")[0] for line in lines] == ["trial 0 complete", "trial 1 running", "trial 1 complete"]
    assert lines[1] == (
        "trial 1 running: epoch 1 of 9, 12 s, 30 s left; best 0.9000 (trial 1); 2 of 20 trials done, 10 min 0 s left"
    )
    assert format_line(STUDY, make_row(3), "val_acc").startswith(
        "trial 3 complete: epoch 9 of 9, val_acc 0.5000, 12 s;"
    )


def test_json_lines_tell_every_epoch() -> None:
    lines = show(
        "json", [make_row(1, "running", 1)], [make_row(1, "running", 1)], [make_row(1, "running", 2, score=math.nan)]
    )
    records = [json.loads(line) for line in lines]
    assert [record["trial"]["epoch"] for record in records] == [1, 2]
    assert records[1]["trial"]["score"] is None
    assert records[0]["event"] == "trial" and records[0]["study"]["best_score"] == 0.9
    assert set(records[0]["trial"]) == {"number", "state", "epoch", "target", "score", "elapsed_s", "eta_s"}


def test_long_studies_show_the_running_the_best_and_the_last() -> None:
    rows = [make_row(number, score=1 - number / 100) for number in range(50)]
    rows[20] = make_row(20, "running", 1)
    rows[30] = make_row(30, "paused", 3, 3, score=2.0)  # a shorter training does not count as better
    rows[1] = make_row(1, "failed", score=3.0)
    shown = [row.number for row in select_rows(rows, "maximize", 99)]
    assert shown == [0, 2, 3, 4, 5, 20, *range(40, 50)]
    assert [row.number for row in select_rows(rows, "minimize", 3)] == [20, 48, 49]
    assert [row.number for row in select_rows(rows, "maximize", 1)] == [20]


def test_terminal_shows_a_table() -> None:
    from rich.console import Console

    rows = [make_row(number) for number in range(40)] + [make_row(40, "running", 4)]
    screen = io.StringIO()
    Console(file=screen, width=110).print(build_table(STUDY, rows, "val_acc", "maximize", 7))
    lines = screen.getvalue().splitlines()
    assert "2 of 20 trials, best val_acc 0.9000 (trial 1), 1 min 5 s, 10 min 0 s left" in lines[0]
    assert lines[1].split() == ["trial", "state", "epoch", "val_acc", "time", "left"]
    assert len(lines) == 2 + 7 + 1 and lines[-1] == "and 34 more"
    assert lines[-2].split() == ["40", "running", "4", "of", "9", "0.5000", "12", "s", "30", "s"]
    assert any("complete, best" in line for line in lines)


def test_mode_follows_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert (choose_mode(as_json=False), choose_mode(as_json=True)) == ("lines", "json")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert (choose_mode(as_json=False), choose_mode(as_json=True)) == ("terminal", "json")
