"""The end of a study: the comparison with the user's spec, the files of results, the plots."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

from kinegraph.automl.comparison import Comparison, compare_with_spec, write_comparison
from kinegraph.automl.confirm import confirm_best
from kinegraph.automl.plots import write_plots
from kinegraph.automl.pool import TrainingPool
from kinegraph.automl.results import remove_checkpoints, write_results
from kinegraph.automl.study import Study
from kinegraph.automl.trials import Trial, find_best
from kinegraph.errors import KinegraphError, Problem
from kinegraph.run import Result


def finish_study(study: Study, pool: TrainingPool) -> Result:
    """Compare, write everything, remove the checkpoints of other trials.

    Raises KinegraphError if no trial ended well.
    """
    run, options = study.run, study.spec.automl
    best = find_best(study.trials, study.direction)
    files = write_results(
        run.folder,
        study.trials,
        metric=options.metric,
        direction=study.direction,
        experiment_id=run.folder.name,
        location=run.show(str(run.folder)),
    )
    if best is None:
        errors = list(dict.fromkeys(trial.error for trial in study.trials))
        hint = f"Look at {run.folder / 'all_trials.csv'} and the log.txt of a trial."
        raise KinegraphError(Problem("automl", f"no trial that ended well: {errors[0]}", "at least one", hint))
    comparison = _compare(study, pool, best)
    if comparison is not None:
        files["comparison"] = str(write_comparison(run.folder, comparison))
        run.info(comparison.text)
    log_keys = [entry.key for entry in study.space.dimensions if entry.search.log]
    files |= write_plots(run.folder, study.trials, options.metric, study.direction, log_keys)
    if options.automl_delete_intermediate_ckpt:
        freed_bytes = remove_checkpoints(run.folder, study.trials, study.direction, is_finished=True)
        if freed_bytes:
            run.info(f"Removed the checkpoints of other trials ({freed_bytes / 1e6:.0f} MB).")
    return Result(_sum_up(study, best, comparison), files)


def _compare(study: Study, pool: TrainingPool, best: Trial) -> Comparison | None:
    """Your spec against the best: trained again with new seeds, or else the two trials of the search."""
    options, first = study.spec.automl, study.trials[0]
    compare = partial(compare_with_spec, metric=options.metric, direction=study.direction, num_trials=len(study.trials))
    if _is_spec(study, best):
        study.run.info(f"No trial was better than your spec ({options.metric} {best.score:.4f}).")
        return None
    if options.confirm_seeds:
        study.run.info(f"Training your spec and the best trial again with {options.confirm_seeds} other seeds.")
        scores = confirm_best(study.spec, study.run, pool, study.base, best, study.schedule.max_budget, study.direction)
        return compare(scores["spec"], scores["best"])
    seed = study.spec.train.seed
    at_budget = first.scores.get(best.budget) if first.state != "failed" and _is_spec(study, first) else None
    if at_budget is None:
        study.run.info("Your spec (trial 0) was not trained as long as the best: automl.confirm_seeds compares them.")
        return None
    return compare({seed: at_budget}, {seed: best.score})


def _sum_up(study: Study, best: Trial, comparison: Comparison | None) -> dict[str, Any]:
    first = study.trials[0]
    return {
        "metric": study.spec.automl.metric,
        "direction": study.direction,
        "best_trial": best.number,
        "best_score": best.score,
        "best_epochs": best.budget,
        "best_values": best.values,
        "spec_score": first.score if first.state != "failed" and _is_spec(study, first) else None,
        "spec_epochs": first.budget,
        "num_trials": len(study.trials),
        "num_failed": sum(trial.state == "failed" for trial in study.trials),
        "trial_seconds": sum(trial.seconds for trial in study.trials),
        "verdict": comparison.verdict if comparison else "same" if _is_spec(study, best) else "not known",
    }


def _is_spec(study: Study, trial: Trial) -> bool:
    """Whether it is the user's spec still: in a population trial 0 may have gone on from another."""
    values, spec_values = (json.dumps(found, sort_keys=True) for found in (trial.values, study.space.defaults))
    return trial.number == 0 and values == spec_values
