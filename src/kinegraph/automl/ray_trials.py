"""A study as Tune sees it: where trials come from, and what is recorded of them.

The journal of the study is the only record: what Tune keeps for itself is never read again.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.tune import Callback
from ray.tune.experiment import Trial as RayTrial
from ray.tune.experiment.config_parser import _create_trial_from_spec, _make_parser
from ray.tune.search.search_algorithm import SearchAlgorithm

from kinegraph.automl.ray_population import count_active
from kinegraph.automl.samplers import suggest_values
from kinegraph.automl.study import Study, report_trial
from kinegraph.automl.trial_files import collect
from kinegraph.automl.trials import Trial
from kinegraph.errors import Problem, UserError
from kinegraph.remote import is_remote, join

MAX_REASON = 300


class StudyTrials(SearchAlgorithm):
    """The trials of a study for Tune: those that were running, then new ones, `num_slots` at a time.

    A new trial is chosen when there is room for it and no sooner, so that the sampler knows all that ended before.
    """

    def __init__(self, study: Study, max_trials: int, num_slots: int) -> None:
        self.study, self.max_trials, self.num_slots = study, max_trials, num_slots
        self._waiting = [trial for trial in study.trials if trial.state == "running"]
        self._made: list[RayTrial] = []
        self._spec: dict[str, Any] = {}

    def add_configurations(self, experiments: Any) -> None:
        experiment = experiments[0] if isinstance(experiments, list) else experiments
        self._spec = experiment.spec

    def count_to_come(self) -> int:
        """Trials that Tune has not been given yet."""
        return len(self._waiting) + max(0, self.max_trials - len(self.study.trials))

    def is_finished(self) -> bool:
        return self.count_to_come() == 0

    def next_trial(self) -> RayTrial | None:
        if self.is_finished() or count_active(self._made) >= self.num_slots:
            return None
        if self._waiting:
            trial = self._waiting.pop(0)
            self.study.run.info(f"{trial.name} goes on.")
        else:
            trial = self._start()
        spec = copy.copy(self._spec)
        spec["config"] = {**spec["config"], "values": trial.values, "epochs": trial.budget}
        made = _create_trial_from_spec(spec, _make_parser(), trial_id=trial.name, experiment_tag=trial.name)
        self._made.append(made)
        return made

    def _start(self) -> Trial:
        study, options, number = self.study, self.study.spec.automl, len(self.study.trials)
        values = suggest_values(
            study.space, options.algorithm, options.seed, number, study.trials, study.direction, options
        )
        trial = Trial(number, values, study.schedule.max_budget)
        study.journal.add(trial, study.space.encode(values), study.space.distributions)
        study.trials.append(trial)
        return trial


class Recorder(Callback):
    """Writes what becomes of the trials into the journal, and shows it.

    `keeps_steps`: scores before the last epoch count (rungs, meetings of a population). `location`: the study's folder
    as the nodes know it.
    """

    def __init__(self, study: Study, location: str, keeps_steps: bool, show: Callable[[], None]) -> None:
        self.study, self.location, self.keeps_steps, self.show = study, location, keeps_steps, show
        self.mistake: UserError | None = None
        """Why the search was given up; Tune passes on only its text."""

    def on_step_end(self, iteration: int, trials: list[RayTrial], **info: Any) -> None:
        self.show()

    def on_trial_start(self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: Any) -> None:
        self.study.started[self._find(trial).number] = time.monotonic()

    def on_trial_result(
        self, iteration: int, trials: list[RayTrial], trial: RayTrial, result: dict[str, Any], **info: Any
    ) -> None:
        own, study = self._find(trial), self.study
        own.seconds += result["time_this_iter_s"]
        study.started[own.number] = time.monotonic()
        own.values = result["values"]
        epochs = result["epochs"]
        if result["error"]:
            self._fail(own, result["error"])
            if own.number == 0 and result["is_mistake"] and not any(other.scores for other in study.trials):
                study.discard()  # a mistake in the spec itself, which every trial would repeat
                self.mistake = UserError(*(Problem(**problem) for problem in result["problems"]))
                raise self.mistake
            return
        is_last = epochs >= study.schedule.max_budget
        if self.keeps_steps or is_last:
            own.scores[epochs] = result["score"]
        if result["done"]:
            own.state, own.target = ("complete" if is_last else "paused"), epochs
            self._end(own)
        study.journal.update(own)

    def on_trial_recover(self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: Any) -> None:
        own = self._find(trial)
        own.attempts += 1
        self.study.journal.update(own)
        self.study.run.warn(f"{own.name}: its process was lost. It goes on from its last checkpoint.")

    def on_trial_error(self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: Any) -> None:
        self._fail(self._find(trial), f"its process was lost ({_read_reason(trial)})")

    def tell_takeover(self, name: str, source: str, values: dict[str, Any]) -> None:
        """Say which trial goes on from which."""
        shown = ", ".join(f"{key}={value!r}" for key, value in values.items())
        self.study.run.info(f"{name} goes on from {source} with {shown}.")

    def _fail(self, trial: Trial, error: str) -> None:
        trial.state, trial.error = "failed", error
        self.study.run.warn(f"{trial.name} failed: {error}")
        self._end(trial)
        self.study.journal.update(trial)

    def _end(self, trial: Trial) -> None:
        self.study.started.pop(trial.number, None)
        if is_remote(self.location):
            collect(join(self.location, trial.name), self.study.get_folder(trial))
        report_trial(self.study, trial)

    def _find(self, trial: RayTrial) -> Trial:
        return next(own for own in self.study.trials if own.name == trial.trial_id)


def _read_reason(trial: RayTrial) -> str:
    """What Ray says of the end of a process, in a line."""
    path = trial.error_file
    text = Path(path).read_text(encoding="utf-8", errors="replace") if path and Path(path).is_file() else ""
    text = text.rpartition("Failure #")[2].partition("\n")[2].strip()
    if "Traceback" in text:
        text = text.splitlines()[-1]
    return " ".join(text.split())[:MAX_REASON] or "no reason is known"
