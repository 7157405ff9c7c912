"""The record of a study: an Optuna journal file, written by the process that runs the study and nobody else.

A paused trial stays RUNNING there, since Optuna has no word for it; what it lacks stands in user attributes. Other
tools of Optuna (its dashboard, for one) can read the file.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial

from kinegraph.automl.trials import Direction, Trial
from kinegraph.errors import KinegraphError, Problem
from kinegraph.storage import cut_torn_line

JOURNAL_NAME = "study.journal"
STUDY_NAME = "kinegraph"
ATTRIBUTES = ("values", "target", "state", "bracket", "seconds", "attempts", "error")


class StudyJournal:
    """Trials of a study on disk. Only one process may have it open: the caller holds the lock of the folder."""

    def __init__(self, folder: Path, direction: Direction) -> None:
        path = folder / JOURNAL_NAME
        _repair(path)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._storage = JournalStorage(JournalFileBackend(str(path)))
                self._study = optuna.create_study(
                    storage=self._storage, study_name=STUDY_NAME, direction=direction, load_if_exists=True
                )
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            hint = "Choose another results_dir, or remove the file: its trials are then forgotten."
            got = f"a file that cannot be read ({error})"
            raise KinegraphError(Problem(str(path), got, "the journal of a study", hint)) from error

    def load(self) -> list[Trial]:
        """All trials, by number."""
        return [_read(frozen) for frozen in self._study.get_trials(deepcopy=False)]

    def add(self, trial: Trial, params: dict[str, Any], distributions: dict[str, BaseDistribution]) -> None:
        """Record a new trial, whose number is the next one, before it starts."""
        self._study.add_trial(
            create_trial(
                state=TrialState.RUNNING,
                params=params,
                distributions={name: distributions[name] for name in params},
                user_attrs=_write_attributes(trial),
            )
        )
        number = len(self._study.get_trials(deepcopy=False)) - 1
        assert number == trial.number, "trials are added in order, by one process"

    def update(self, trial: Trial) -> None:
        """Record what changed: a score, a promotion, the end."""
        known = self._study.get_trials(deepcopy=False)[trial.number]
        if known.state.is_finished():
            return
        for name, value in _write_attributes(trial).items():
            if known.user_attrs.get(name) != value:
                self._storage.set_trial_user_attr(known._trial_id, name, value)
        for budget, score in trial.scores.items():
            if known.intermediate_values.get(budget) != score:
                self._storage.set_trial_intermediate_value(known._trial_id, budget, score)
        if trial.state == "complete":
            self._study.tell(trial.number, trial.score)
        elif trial.state == "failed":
            self._study.tell(trial.number, state=TrialState.FAIL)


def _repair(path: Path) -> None:
    """Undo what a kill may have left: half a line, and the lock of a process that is gone."""
    if path.exists():
        cut_torn_line(path)
    with contextlib.suppress(OSError):
        Path(f"{path}.lock").unlink(missing_ok=True)


def _write_attributes(trial: Trial) -> dict[str, Any]:
    attributes = {name: getattr(trial, name) for name in ATTRIBUTES}
    return attributes | {"values": json.dumps(trial.values)}


def _read(frozen: FrozenTrial) -> Trial:
    attributes = {name: frozen.user_attrs[name] for name in ATTRIBUTES}
    attributes["values"] = json.loads(attributes["values"])
    scores = {int(budget): score for budget, score in sorted(frozen.intermediate_values.items())}
    return Trial(number=frozen.number, scores=scores, **attributes)
