"""What a running study looks like from outside: rows for the live table, read from the run folders of the trials."""

from __future__ import annotations

import sys
import time

from kinegraph.automl.results import read_curve
from kinegraph.automl.study import Study
from kinegraph.automl.table import StudyRow, StudyTable, TrialRow, choose_mode
from kinegraph.automl.trials import Trial, find_best, orient
from kinegraph.run import find_message_form


def open_table(study: Study) -> StudyTable:
    """A table at a terminal, JSON lines where they were asked for, else lines in the log."""
    form = find_message_form()
    mode = choose_mode(form == "json") if form else "lines"
    return StudyTable(
        study.spec.automl.metric, study.direction, mode, _print_line if mode == "json" else study.run.info
    )


def _print_line(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def show_study(study: Study, table: StudyTable) -> None:
    """Show where the study stands."""
    rows = [_make_row(study, trial) for trial in study.trials]
    best = find_best(study.trials, study.direction)
    table.show(
        StudyRow(
            num_ended=sum(trial.state != "running" for trial in study.trials),
            max_trials=study.schedule.max_trials,
            best_trial=None if best is None else best.number,
            best_score=None if best is None else best.score,
            elapsed_s=time.monotonic() - study.started_s,
            eta_s=_estimate_left(study, rows),
        ),
        rows,
    )


def _make_row(study: Study, trial: Trial) -> TrialRow:
    elapsed_s = trial.seconds
    if trial.state != "running":
        return TrialRow(trial.number, trial.state, trial.budget, trial.target, trial.score, elapsed_s)
    if trial.number in study.started:
        elapsed_s += time.monotonic() - study.started[trial.number]
    curve = read_curve(study.get_folder(trial), study.spec.automl.metric)
    epoch = max((epoch + 1 for epoch, _ in curve), default=0)
    values = [value for _, value in curve]
    score = max(values, key=lambda value: orient(value, study.direction), default=None)
    left_s = elapsed_s / epoch * (trial.target - epoch) if epoch else None
    return TrialRow(trial.number, "running", epoch, trial.target, score, elapsed_s, left_s)


def _estimate_left(study: Study, rows: list[TrialRow]) -> float | None:
    """From the epochs that the schedule expects and the time that those done have taken, of all trials together."""
    done = sum(row.epoch for row in rows)
    if not done:
        return None
    left = max(0, study.schedule.describe().expected_epochs - done)
    num_running = max(1, sum(row.state == "running" for row in rows))
    return sum(row.elapsed_s for row in rows) / done * left / num_running
