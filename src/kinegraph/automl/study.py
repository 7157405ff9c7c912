"""A study: trials that are chosen, trained by the workers and recorded, until the schedule has no more to ask for.

All decisions are functions of the list of trials, which the journal holds. So a study that was killed goes on by
reading the journal, sending out again what was running, and deciding as before.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kinegraph.automl.definition import DEFINITION_NAME
from kinegraph.automl.journal import JOURNAL_NAME, StudyJournal
from kinegraph.automl.metric import choose_direction
from kinegraph.automl.results import measure_run, remove_checkpoints
from kinegraph.automl.samplers import check_options, suggest_values
from kinegraph.automl.schedule import Finished, Promote, Schedule, Start, Wait, plan_schedule
from kinegraph.automl.space import SearchSpace, build_space
from kinegraph.automl.trial_spec import build_base, build_trial_spec, validate_at_pauses
from kinegraph.automl.trials import Direction, Trial, find_best
from kinegraph.automl.workers import MAX_ATTEMPTS, Outcome, WorkerPool, choose_environments
from kinegraph.data.arrays import open_array
from kinegraph.errors import DataError, Problem, SpecError, UserError
from kinegraph.remote import fetch
from kinegraph.run import Run
from kinegraph.spec import Spec

POLL_S = 1.0
CONFIRM_FOLDER = "confirm"


@dataclass
class Study:
    """A search in progress: what it searches, how, and the trials so far."""

    spec: Spec
    run: Run
    direction: Direction
    space: SearchSpace
    schedule: Schedule
    base: dict[str, Any]
    journal: StudyJournal
    trials: list[Trial]
    started_s: float = field(default_factory=time.monotonic)
    started: dict[int, float] = field(default_factory=dict)
    """Trial -> when its training was sent out, by this process."""

    def get_folder(self, trial: Trial) -> Path:
        """The run folder of a trial."""
        return self.run.folder / trial.name

    def is_used_up(self) -> bool:
        """Whether another trial would only repeat one. With rungs a repetition is allowed: it fills its bracket."""
        has_rungs = len(self.schedule.brackets[0].budgets) > 1
        return not has_rungs and self.space.is_used_up(trial.values for trial in self.trials)

    def discard(self) -> None:
        """Forget everything, so that a corrected spec can start anew in the same folder."""
        for name in (JOURNAL_NAME, DEFINITION_NAME):
            (self.run.folder / name).unlink(missing_ok=True)

    def make_spec(self, trial: Trial) -> dict[str, Any]:
        """What the worker trains: the full schedule, paused at the trial's target."""
        return build_trial_spec(
            self.base,
            trial.values,
            self.get_folder(trial),
            num_epochs=self.schedule.max_budget,
            stop_after_epoch=trial.target,
            metric=self.spec.automl.metric,
        )


def open_study(spec: Spec, run: Run, max_concurrent: int | None = None) -> Study:
    """The study of a folder, new or as it was left. `max_concurrent`: trials at once, where a cluster says so."""
    search = prepare_search(spec, run.origins)
    schedule = search.schedule if max_concurrent is None else make_schedule(spec, max_concurrent)
    journal = StudyJournal(run.folder, search.direction)
    trials = journal.load()
    base = build_base(spec, run.origins)
    if not trials:
        set_leftovers_aside(run)
    return Study(
        spec=spec,
        run=run,
        direction=search.direction,
        space=search.space,
        schedule=schedule,
        base=run.show(validate_at_pauses(base, spec.train.validation_interval, schedule.list_pauses())),
        journal=journal,
        trials=trials,
    )


@dataclass(frozen=True)
class PreparedSearch:
    """What follows from the spec before anything is trained. `environments`: of the workers of this machine."""

    direction: Direction
    space: SearchSpace
    environments: list[dict[str, str]]
    schedule: Schedule


def prepare_search(spec: Spec, given: Mapping[str, str]) -> PreparedSearch:
    """Raises SpecError with all that keeps the spec from being searched. `given`: the keys that the user gave."""
    problems: list[Problem] = []

    def attempt(function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except SpecError as error:
            problems.extend(error.problems)

    is_local = spec.automl.engine == "local"
    environments = attempt(choose_environments, spec, given) if is_local else []
    # How many a cluster allows is known once it is joined
    max_concurrent = len(environments or []) or max(1, spec.automl.automl_max_concurrent)
    direction = attempt(choose_direction, spec.automl)
    schedule = attempt(make_schedule, spec, max_concurrent)
    space = attempt(build_study_space, spec, given)
    if problems:
        raise SpecError(*dict.fromkeys(problems))
    return PreparedSearch(direction, space, environments, schedule)


def set_leftovers_aside(run: Run) -> None:
    """Before the first trial: the trainings of a study whose journal is gone must not be taken for those to come."""
    for path in [*run.folder.glob("trial_[0-9]*"), run.folder / CONFIRM_FOLDER]:
        if path.is_dir() and ".forgotten" not in path.name:
            place = next(place for number in itertools.count(1) if not (place := _name_aside(path, number)).exists())
            path.rename(place)
            run.warn(f"{path} is of another study: it is now {place.name}.")


def _name_aside(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.forgotten{number}")


def build_study_space(spec: Spec, given: Mapping[str, str]) -> SearchSpace:
    """What is searched: by the options of the spec, or by a schema in TAO's form. `given`: keys that the user gave."""
    try:
        num_clips, _, num_frames, _, _ = open_array(fetch(spec.dataset.train_dataset.data_path)).shape
    except DataError:
        num_clips = num_frames = None  # the training itself tells what is wrong with the data
    return build_space(spec, given, num_frames=num_frames, num_clips=num_clips)


def count_trials(spec: Spec) -> int:
    """automl_max_recommendations; of a population (pbt) its size, if that is less."""
    options = spec.automl
    if options.algorithm != "pbt":
        return options.automl_max_recommendations
    return min(options.automl_population_size, options.automl_max_recommendations)


def make_schedule(spec: Spec, max_concurrent: int) -> Schedule:
    """Which trials train how long. Raises SpecError for an algorithm that the engine cannot do."""
    options = spec.automl
    check_options(options)
    return plan_schedule(
        options.algorithm,
        max_trials=count_trials(spec),
        num_epochs=spec.train.num_epochs,
        max_epochs=options.automl_max_epochs,
        reduction_factor=options.automl_reduction_factor,
        epoch_multiplier=options.epoch_multiplier,
        max_concurrent=max_concurrent,
        direction=choose_direction(options),
    )


def run_trials(study: Study, pool: WorkerPool, show: Callable[[], None]) -> None:
    """Train until the schedule has no more to ask for; `show` is called when something may have changed."""
    interrupted = [trial for trial in study.trials if trial.state == "running"]
    while True:
        if pool.num_free:
            if interrupted:
                trial = interrupted.pop(0)
                study.run.info(f"{trial.name} goes on.")
                _send(study, pool, trial)
                continue
            decision = study.schedule.decide(study.trials)
            if isinstance(decision, Start) and study.is_used_up():
                if not any(trial.state == "running" for trial in study.trials):
                    study.run.info("Every combination of the searched values has been tried.")
                    break
            elif isinstance(decision, Finished):
                break
            elif not isinstance(decision, Wait):
                _send(study, pool, _follow(study, decision))
                continue
        show()
        outcome = pool.wait(POLL_S)
        if outcome is not None:
            _record(study, pool, outcome)


def _follow(study: Study, decision: Start | Promote) -> Trial:
    """Record a decision before it is carried out."""
    if isinstance(decision, Promote):
        trial = study.trials[decision.number]
        trial.target, trial.state = decision.budget, "running"
        study.journal.update(trial)
        return trial
    options = study.spec.automl
    values = suggest_values(
        study.space, options.algorithm, options.seed, decision.number, study.trials, study.direction, options
    )
    trial = Trial(decision.number, values, decision.budget, bracket=decision.bracket)
    study.journal.add(trial, study.space.encode(values), study.space.distributions)
    study.trials.append(trial)
    return trial


def _send(study: Study, pool: WorkerPool, trial: Trial) -> None:
    study.started[trial.number] = time.monotonic()
    pool.submit(trial.name, study.make_spec(trial))


def _record(study: Study, pool: WorkerPool, outcome: Outcome) -> None:
    """What became of a trial: its score, or why there is none."""
    trial = next(trial for trial in study.trials if trial.name == outcome.name)
    trial.seconds += time.monotonic() - study.started.pop(trial.number)
    if outcome.died and trial.attempts + 1 < MAX_ATTEMPTS:
        trial.attempts += 1
        study.journal.update(trial)
        study.run.warn(f"{trial.name}: {outcome.error}. It goes on from its last checkpoint.")
        _send(study, pool, trial)
        return
    score, error = None, outcome.error
    if not error:
        score, error = measure_run(study.get_folder(trial), study.spec.automl.metric, study.direction, trial.target)
    if score is not None:
        trial.scores[trial.target] = score
        trial.state = "complete" if trial.target >= study.schedule.max_budget else "paused"
    else:
        trial.state, trial.error = "failed", error
        study.run.warn(f"{trial.name} failed: {error}")
    study.journal.update(trial)
    report_trial(study, trial)
    if study.spec.automl.automl_delete_intermediate_ckpt:
        remove_checkpoints(study.run.folder, study.trials, study.direction, is_finished=False)
    if trial.number == 0 and outcome.is_mistake and not any(other.scores for other in study.trials):
        study.discard()
        raise UserError(*outcome.problems)  # a mistake in the spec itself, which every trial would repeat


def report_trial(study: Study, trial: Trial) -> None:
    """A line in status.json for a trial that ended or paused."""
    best = find_best(study.trials, study.direction)
    metric = study.spec.automl.metric
    shown = "failed" if trial.state == "failed" else f"{metric} {trial.score:.4f} after {trial.budget} epochs"
    kpi = {} if best is None else {f"best_{metric}": best.score, "best_trial": best.number}
    study.run.write_status("RUNNING", f"{trial.name}: {shown}.", kpi=kpi, trial=trial.number)
