"""The record of a study: an Optuna journal file, written by the process that runs the study and nobody else.

Each change of a trial is one line that holds all of it, so that a kill leaves either the trial before or the one after.
What Optuna's own fields hold beside it is for its tools (the dashboard, for one). A paused trial stays RUNNING
there, since Optuna has no word for it.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial
from pydantic import TypeAdapter

from kinegraph.automl.trials import Direction, Trial
from kinegraph.errors import KinegraphError, Problem
from kinegraph.storage import cut_torn_line

JOURNAL_NAME = "study.journal"
STUDY_NAME = "kinegraph"
ATTRIBUTE = "trial"


class StudyJournal:
    """Trials of a study on disk. Only one process may have it open: the caller holds the lock of the folder."""

    def __init__(self, folder: Path, direction: Direction) -> None:
        self.path = folder / JOURNAL_NAME
        _repair(self.path)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with self._explain_damage(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._storage = JournalStorage(JournalFileBackend(str(self.path)))
            self._study = optuna.create_study(
                storage=self._storage, study_name=STUDY_NAME, direction=direction, load_if_exists=True
            )

    def load(self) -> list[Trial]:
        """All trials, by number. Raises KinegraphError for what no study wrote."""
        with self._explain_damage():
            frozen = self._study.get_trials(deepcopy=False)
            trials = [_read(entry) for entry in frozen]
            for trial, entry in zip(trials, frozen, strict=True):
                self._tell_optuna(trial, entry)
            return trials

    def add(self, trial: Trial, params: Mapping[str, Any], distributions: Mapping[str, BaseDistribution]) -> None:
        """Record a new trial, whose number is the next one, before it starts."""
        used = {name: distributions[name] for name in params}
        attributes = {ATTRIBUTE: asdict(trial)}
        running = TrialState.RUNNING
        self._study.add_trial(
            create_trial(state=running, params=dict(params), distributions=used, user_attrs=attributes)
        )
        number = len(self._study.get_trials(deepcopy=False)) - 1
        assert number == trial.number, "trials are added in order, by one process"

    def update(self, trial: Trial) -> None:
        """Record what changed: a score, a promotion, the end."""
        known = self._study.get_trials(deepcopy=False)[trial.number]
        if known.state.is_finished():
            return
        self._storage.set_trial_user_attr(known._trial_id, ATTRIBUTE, asdict(trial))
        self._tell_optuna(trial, known)

    def _tell_optuna(self, trial: Trial, known: FrozenTrial) -> None:
        if known.state.is_finished():
            return
        for budget, score in trial.scores.items():
            if known.intermediate_values.get(budget) != score:
                self._storage.set_trial_intermediate_value(known._trial_id, budget, score)
        if trial.state == "complete":
            self._study.tell(trial.number, trial.score)
        elif trial.state == "failed":
            self._study.tell(trial.number, state=TrialState.FAIL)

    @contextlib.contextmanager
    def _explain_damage(self) -> Any:
        try:
            yield
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, AssertionError, RecursionError) as error:
            hint = "Choose another results_dir, or remove the file: its trials are then forgotten."
            got = f"a file that cannot be read ({type(error).__name__})"
            raise KinegraphError(Problem(str(self.path), got, "the journal of a study", hint)) from error


def _repair(path: Path) -> None:
    """Undo what a kill may have left: half a line, and the lock of a process that is gone."""
    if path.exists():
        cut_torn_line(path)
    with contextlib.suppress(OSError):
        Path(f"{path}.lock").unlink(missing_ok=True)


def _read(frozen: FrozenTrial) -> Trial:
    # JSON has made text of the budgets, which pydantic turns back
    trial = TypeAdapter(Trial).validate_python(frozen.user_attrs[ATTRIBUTE])
    if trial.number != frozen.number or (trial.state == "complete" and not trial.scores):
        raise ValueError("a trial that contradicts itself")
    return trial
