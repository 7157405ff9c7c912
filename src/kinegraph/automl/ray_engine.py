"""A search on a Ray cluster: Ray Tune runs the trials, the study's journal remembers them.

Values come from the samplers of the local engine, so that a seed means the same trials. Why not Tune's Optuna search
and its own resume: docs/decisions/0005-ray-searcher.md.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

from kinegraph.automl.definition import check_definition
from kinegraph.automl.finish import finish_study
from kinegraph.automl.progress import open_table, show_study
from kinegraph.automl.ray_cluster import Share, connect_ray, divide_cluster
from kinegraph.automl.schedule import Schedule
from kinegraph.automl.study import Study, count_trials, open_study
from kinegraph.automl.trial_files import POPULATION_NAME, collect, read_population, remove_all_checkpoints
from kinegraph.automl.trial_spec import build_trial_spec
from kinegraph.automl.trials import Trial, find_best
from kinegraph.config import get_value
from kinegraph.config_source import set_value
from kinegraph.errors import KinegraphError, Problem, look_up
from kinegraph.file_systems import open_location
from kinegraph.remote import is_remote, join, remove
from kinegraph.run import Result, Run, find_encryption_key
from kinegraph.spec import Spec
from kinegraph.spec_reading import list_paths

TUNE_FOLDER = ".ray"
"""What Tune writes, in the study's folder; hidden, so that it is not mirrored. Of use only while the search runs."""
NUM_REPORTS = 10
"""A training is cut into about so many pieces where no rung says how many."""
MAX_FAILURES = 1
"""How often a trial whose process was lost starts again."""
NUM_KEPT_CHECKPOINTS = 3
"""Of a trial of a population: others may be about to take over the one before the last."""


def search_with_ray(spec: Spec, run: Run) -> Result:
    """Search on a Ray cluster. Run again in the same folder, it goes on where it stopped.

    Raises UserError for a spec that cannot be searched, or a cluster that is not there; KinegraphError if no trial ends
    well.
    """
    with connect_ray(spec, run):
        share = divide_cluster(spec)
        study = open_ray_study(spec, run, share)
        check_definition(run)
        run.write_experiment()
        training = describe_training(study)
        with open_table(study) as table:
            _tune(study, share, training, partial(show_study, study, table))
            show_study(study, table)
        return _finish(study, share, training)


def open_ray_study(spec: Spec, run: Run, share: Share) -> Study:
    """The study of a folder, new or as it was left."""
    study = open_study(spec, run, share.num_slots)
    for trial in study.trials:
        if trial.state == "running":
            _adopt_takeover(study, trial)
    return study


def _adopt_takeover(study: Study, trial: Trial) -> None:
    """A trial that took over another just before the search was killed: the journal may not know its values yet."""
    state = read_population(study.get_folder(trial) / POPULATION_NAME)
    if state is not None and study.space.holds(state["values"]):
        trial.values = state["values"]
        study.journal.update(trial)


def list_stops(schedule: Schedule, validation_interval: int) -> list[int]:
    """The epochs after which a trial reports: the rungs, or about ten, each after a validation that is due anyway."""
    budgets = schedule.brackets[0].budgets
    if len(budgets) > 1:
        return list(budgets)
    num_epochs = schedule.max_budget
    step = validation_interval * math.ceil(num_epochs / (validation_interval * NUM_REPORTS))
    return [*range(step, num_epochs, step), num_epochs]


def describe_training(study: Study) -> dict[str, Any]:
    """What the nodes must know of all trials, as plain data. No secrets: Ray writes and shows it."""
    spec, run = study.spec, study.run
    base = copy.deepcopy(dict(study.base))
    for kind in ("input", "output"):
        for key, location in list_paths(spec, "train", kind).items():
            if _has(base, key) and not is_remote(location):
                set_value(base, key, os.path.abspath(location))
    metric = study.spec.automl.metric
    full = build_trial_spec(base, {}, run.folder, num_epochs=study.schedule.max_budget, metric=metric)
    location = str(run.show(str(run.folder)))
    return {
        "spec": run.show(full),
        "location": location if is_remote(location) else os.path.abspath(location),
        "num_epochs": study.schedule.max_budget,
        "stops": list_stops(study.schedule, spec.train.validation_interval),
        "metric": metric,
        "direction": study.direction,
        "is_encrypted": bool(find_encryption_key(spec)),
    }


def _has(nested: Mapping[str, Any], key: str) -> bool:
    first, _, rest = key.partition(".")
    return first in nested and (not rest or _has(nested[first], rest))


def _tune(study: Study, share: Share, training: dict[str, Any], show: Any) -> None:
    """Let Tune train what is left of the study."""
    from ray import tune
    from ray.tune.error import TuneError

    from kinegraph.automl.ray_trainable import TrialTraining
    from kinegraph.automl.ray_trials import Recorder, StudyTrials

    trials = StudyTrials(study, count_trials(study.spec), share.num_slots)
    if trials.is_finished():
        return
    keeps_steps = study.spec.automl.algorithm in ("asha", "pbt")
    recorder = Recorder(study, training["location"], keeps_steps, show)
    make_scheduler = look_up(SCHEDULERS, study.spec.automl.algorithm, "automl.algorithm")
    storage = join(training["location"], TUNE_FOLDER)
    remove(storage)  # left by a search that was killed
    try:
        tune.run(
            TrialTraining,
            name="study",
            config={"training": training},
            resources_per_trial={"cpu": share.cpus, "gpu": share.gpus},
            search_alg=trials,
            scheduler=make_scheduler(study, share, training, trials, recorder),
            callbacks=[recorder],
            checkpoint_config=tune.CheckpointConfig(num_to_keep=NUM_KEPT_CHECKPOINTS),
            max_failures=MAX_FAILURES,
            reuse_actors=True,
            raise_on_failed_trial=False,
            verbose=0,
            trial_dirname_creator=lambda trial: trial.trial_id,
            **_open_storage(storage),
        )
    except TuneError as error:
        if recorder.mistake:
            raise recorder.mistake from None
        got = str(error).strip().splitlines()[-1]
        raise KinegraphError(Problem("Ray Tune", got, "a search that goes on")) from error
    finally:
        remove(storage)


def _open_storage(location: str) -> dict[str, Any]:
    """Tune's storage: a path, or with our own file system, which has its retries and credentials."""
    if not is_remote(location):
        return {"storage_path": location}
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    opened = open_location(location)
    return {"storage_path": opened.path, "storage_filesystem": PyFileSystem(FSSpecHandler(opened.file_system))}


def _make_plain(study: Study, share: Share, training: dict[str, Any], trials: Any, recorder: Any) -> Any:
    from ray.tune.schedulers import FIFOScheduler

    return FIFOScheduler()


def _make_asha(study: Study, share: Share, training: dict[str, Any], trials: Any, recorder: Any) -> Any:
    """Tune's ASHA, which stops a trial at a rung and never takes it up again; it is told of the rungs so far."""
    from ray.tune.schedulers import ASHAScheduler

    stops = training["stops"]
    scheduler = ASHAScheduler(
        time_attr="epochs",
        metric="score",
        mode=study.direction[:3],
        max_t=stops[-1],
        grace_period=stops[0],
        reduction_factor=study.spec.automl.automl_reduction_factor,
    )
    for trial in study.trials:
        known: Any = SimpleNamespace(trial_id=trial.name)
        scheduler.on_trial_add(None, known)  # type: ignore[arg-type]
        for epochs, score in sorted(trial.scores.items()):
            scheduler.on_trial_result(None, known, {"epochs": epochs, "score": score})  # type: ignore[arg-type]
    return scheduler


def _make_population(study: Study, share: Share, training: dict[str, Any], trials: Any, recorder: Any) -> Any:
    import numpy as np

    from kinegraph.automl.ray_population import SCHEDULER, Population, vary_values

    # A search that goes on draws on, not again
    place = sum(len(trial.scores) for trial in study.trials)
    generator = np.random.default_rng([study.spec.automl.seed, len(study.trials), place])
    return Population(
        interval=training["stops"][0],
        mode=study.direction[:3],
        num_slots=share.num_slots,
        vary=partial(vary_values, study.space, scheduler=str(get_value(study.spec, SCHEDULER)), generator=generator),
        count_to_come=trials.count_to_come,
        tell=recorder.tell_takeover,
    )


SCHEDULERS = {
    "bayesian": _make_plain,
    "tpe": _make_plain,
    "random": _make_plain,
    "qmc": _make_plain,
    "cmaes": _make_plain,
    "asha": _make_asha,
    "pbt": _make_population,
}


def _finish(study: Study, share: Share, training: dict[str, Any]) -> Result:
    """The results, as of a search on one machine."""
    from kinegraph.automl.ray_pool import RayPool

    location, best = training["location"], find_best(study.trials, study.direction)
    if is_remote(location) and best is not None:
        collect(join(location, best.name), study.get_folder(best), with_best=True)
    result = finish_study(study, RayPool(study.run, share, training))
    if is_remote(location) and study.spec.automl.automl_delete_intermediate_ckpt:
        for trial in study.trials:
            if trial is not best:
                remove_all_checkpoints(join(location, trial.name))
    return result
