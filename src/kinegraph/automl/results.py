"""What a study leaves behind: best_rec.json, all_trials.csv, best_spec.yaml and the best trial's checkpoint.

A trial is read from its run folder `<study folder>/<trial.name>`, which holds what the train action writes.
"""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from kinegraph.automl.trials import Direction, Trial, find_best, orient
from kinegraph.config_source import nest, read_source
from kinegraph.errors import Problem, SpecError
from kinegraph.predict import write_csv
from kinegraph.remote import join
from kinegraph.run_files import (
    BEST_METRICS_NAME,
    BEST_NAME,
    BEST_TRIAL_NAME,
    EXPERIMENT_NAME,
    LATEST_NAME,
    METRICS_NAME,
)
from kinegraph.storage import explain_os_error, write_atomically, write_json

CHECKPOINT_NAME = re.compile(r"model_epoch_(\d{3,9})_step_(\d{5,18})\.pth")
# Pointers first: a glob passes over a link whose target is gone
CHECKPOINT_PATTERNS = (LATEST_NAME, BEST_NAME, "model_epoch_*_step_*.pth")

BUDGET_KEYS = ("train.num_epochs", "train.stop_after_epoch")
"""Options that say how long a trial trains, not what it is: best_rec.json leaves them out."""

FIXED_COLUMNS = ("number", "state", "score", "budget", "seconds")


def read_curve(folder: Path, metric: str) -> list[tuple[int, float]]:
    """(epoch, value) of a metric in the metrics.csv of a train run, by 0-based epoch; only finite values.

    A run that has not got so far has none. Raises SpecError if metrics.csv has no such column.
    """
    path = folder / METRICS_NAME
    try:
        with open(path, newline="", encoding="utf-8", errors="replace") as file, suppress(csv.Error):
            reader = csv.DictReader(file)
            columns = list(reader.fieldnames or ())
            if columns and metric not in columns:
                expected = "a column of metrics.csv: " + ", ".join(columns)
                raise SpecError(Problem("automl.metric", repr(metric), expected))
            return sorted(_read_points(reader, metric).items())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise explain_os_error(error, path) from error
    return []


def _read_points(rows: csv.DictReader[str], metric: str) -> dict[int, float]:
    points = {}
    for row in rows:
        with suppress(KeyError, TypeError, ValueError):  # an empty cell, or a row that something damaged
            epoch, value = int(row["epoch"]), float(row[metric])
            if epoch >= 0 and math.isfinite(value):
                points[epoch] = value
    return points


def find_divergence(folder: Path, budget: int) -> str:
    """What to say of a train run whose loss was not finite in one of its first `budget` epochs; '' of a sound one.

    Its other metrics mean nothing from there on: an accuracy is then the share of one class.
    """
    for row in _read_rows(folder / METRICS_NAME):
        for name in ("train_loss", "val_loss"):
            with suppress(KeyError, TypeError, ValueError):
                if int(row["epoch"]) < budget and row[name] and not math.isfinite(float(row[name])):
                    return f"{name} was {row[name]} in epoch {int(row['epoch']) + 1}"
    return ""


def _read_rows(path: Path) -> list[dict[str, str]]:
    try:
        with open(path, newline="", encoding="utf-8", errors="replace") as file, suppress(csv.Error):
            return list(csv.DictReader(file))
    except OSError:
        return []
    return []


def prune_checkpoints(folder: Path) -> None:
    """Leave a train run its newest and its best checkpoint: enough to go on from, and to use.

    They are found by name and best.json, not by the pointers, which are plain copies where a run came from a URI.
    """
    found = {path: match for path in folder.glob("model_*.pth") if (match := CHECKPOINT_NAME.fullmatch(path.name))}
    try:
        best = json.loads((folder / BEST_METRICS_NAME).read_text(encoding="utf-8"))["file"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    newest = max(found, key=lambda path: (int(found[path][2]), int(found[path][1])), default=None)
    for path in found:
        if path != newest and path.name != best:
            with suppress(OSError):  # a file that stays costs only space
                path.unlink()


def measure_run(folder: Path, metric: str, direction: Direction, budget: int) -> tuple[float | None, str]:
    """(score, '') of a train run at a budget, or (None, why it has none): it diverged, or nothing was measured."""
    diverged = find_divergence(folder, budget)
    if diverged:
        return None, diverged
    found = read_scores(folder, metric, direction, budget)
    return (found[0], "") if found else (None, f"{metric} was never a finite number")


def read_scores(folder: Path, metric: str, direction: Direction, budget: int) -> tuple[float, int] | None:
    """The best value of a metric in the first `budget` epochs of a train run, and its epoch (the first of equals).

    None if nothing finite was measured. Raises SpecError for a metric that is not logged.
    """
    points = [(value, epoch) for epoch, value in read_curve(folder, metric) if epoch < budget]
    return max(points, key=lambda point: (orient(point[0], direction), -point[1]), default=None)


def write_results(
    folder: Path,
    trials: Sequence[Trial],
    *,
    metric: str,
    direction: Direction,
    experiment_id: str,
    location: str = "",
) -> dict[str, str]:
    """Write the results of a study into its folder; gives back the files by role.

    `location` is where others find the folder (a URI, if it is copied to one). A study in which every trial failed has
    no best: then only the lists are written. Raises StorageError.
    """
    location = location or str(folder)
    best = find_best(trials, direction)
    files = {"all_trials": str(folder / "all_trials.csv"), "best_rec": str(folder / BEST_TRIAL_NAME)}
    write_trials(folder / "all_trials.csv", trials)
    found: dict[str, Any] = {}
    if best is not None:
        found = _copy_best(folder / best.name, folder)
        if found:
            files |= {"best": str(folder / BEST_NAME), "best_metrics": str(folder / BEST_METRICS_NAME)}
        if _write_best_spec(folder, best, f"{metric} {best.score}", location):
            files["best_spec"] = str(folder / "best_spec.yaml")
    record = {
        "schema_version": 1,
        "experiment_id": experiment_id,
        "metric_name": metric,
        "direction": direction,
        "best": None if best is None else _describe_best(best, found, location),
        "all_recs": [
            {"rec_id": trial.number, "score": find_score(trial), "job_id": trial.name} for trial in _sort(trials)
        ],
    }
    write_json(folder / BEST_TRIAL_NAME, record)
    return files


def find_score(trial: Trial) -> float | None:
    """The score that counts: None for a failed trial and for what is not finite."""
    is_sound = trial.state != "failed" and trial.score is not None and math.isfinite(trial.score)
    return trial.score if is_sound else None


def _describe_best(best: Trial, found: Mapping[str, Any], location: str) -> dict[str, Any]:
    return {
        "rec_id": best.number,
        "score": best.score,
        "specs": nest({key: value for key, value in best.values.items() if key not in BUDGET_KEYS}),
        "observed_budget": best.budget,
        "checkpoint_uri": join(location, BEST_NAME) if found else None,
        "checkpoint_epoch": found.get("epoch"),
        "checkpoint_step": found.get("step"),
    }


def write_trials(path: Path, trials: Sequence[Trial]) -> None:
    """all_trials.csv: a row for each trial by number, a column for each searched option, empty without effect."""
    ordered = _sort(trials)
    keys = list(dict.fromkeys(key for trial in ordered for key in trial.values))
    rows = (
        [
            trial.number,
            trial.state,
            find_score(trial),
            trial.budget,
            round(trial.seconds, 3),
            *(_write_cell(trial.values.get(key)) for key in keys),
            trial.error,
        ]
        for trial in ordered
    )
    write_csv(path, [*FIXED_COLUMNS, *keys, "error"], rows)


def _write_cell(value: Any) -> Any:
    """Numbers and text as they are, everything else as JSON."""
    return json.dumps(value) if isinstance(value, bool | list | dict) else value


def _sort(trials: Sequence[Trial]) -> list[Trial]:
    return sorted(trials, key=lambda trial: trial.number)


def _copy_best(trial_folder: Path, folder: Path) -> dict[str, Any]:
    """Copy a trial's best checkpoint and its best.json; gives back the latter, {} if there is no checkpoint."""
    source = trial_folder / BEST_NAME
    if not source.is_file():
        return {}
    try:
        metrics: dict[str, Any] = json.loads((trial_folder / BEST_METRICS_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        metrics = {}
    metrics |= {"file": BEST_NAME, "trial": trial_folder.name}
    try:
        with open(source, "rb") as original, write_atomically(folder / BEST_NAME) as copy:
            shutil.copyfileobj(original, copy)
    except OSError as error:
        raise explain_os_error(error, source) from error
    write_json(folder / BEST_METRICS_NAME, metrics)
    return metrics


def _write_best_spec(folder: Path, best: Trial, reached: str, location: str) -> bool:
    """best_spec.yaml: the trial's effective spec, to be trained in a folder of its own and to the end."""
    source = folder / best.name / EXPERIMENT_NAME
    if not source.is_file():
        return False
    values = read_source(source)
    values["results_dir"] = location
    train = values.setdefault("train", {})
    train |= {"results_dir": "", "resume_training_checkpoint_path": ""}
    if "stop_after_epoch" in train:
        train["stop_after_epoch"] = -1
    with write_atomically(folder / "best_spec.yaml", "w") as file:
        file.write(
            f"# The best configuration found ({best.name}: {reached}). Train it: kinegraph train -e best_spec.yaml\n"
        )
        yaml.safe_dump(values, file, sort_keys=False)
    return True


def remove_checkpoints(folder: Path, trials: Collection[Trial], direction: Direction, is_finished: bool) -> int:
    """Remove the checkpoints of all trials but the best; gives back how many bytes that freed.

    Running trials keep theirs, and so do paused ones, which may be promoted, unless the study is finished. The rest of
    a run folder stays.
    """
    best = find_best(trials, direction)
    over = ("complete", "failed", "paused") if is_finished else ("complete", "failed")
    freed_bytes = 0
    for trial in trials:
        if trial is best or trial.state not in over:
            if trial.state != "running":
                prune_checkpoints(folder / trial.name)
            continue
        for pattern in CHECKPOINT_PATTERNS:
            for path in (folder / trial.name).glob(pattern):
                with suppress(OSError):  # a file that stays costs only space
                    size_bytes = path.lstat().st_size
                    path.unlink()
                    freed_bytes += size_bytes
    return freed_bytes
