"""Whether the best trial is better than the user's spec, or was lucky: both are trained again with other seeds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kinegraph.automl.pool import TrainingPool
from kinegraph.automl.results import measure_run, prune_checkpoints
from kinegraph.automl.study import CONFIRM_FOLDER
from kinegraph.automl.trial_spec import build_trial_spec
from kinegraph.automl.trials import Direction, Trial
from kinegraph.automl.workers import MAX_ATTEMPTS, Outcome
from kinegraph.run import Run
from kinegraph.spec import Spec

POLL_S = 10.0


def confirm_best(
    spec: Spec,
    run: Run,
    pool: TrainingPool,
    base: Mapping[str, Any],
    best: Trial,
    num_epochs: int,
    direction: Direction,
) -> dict[str, dict[int, float | None]]:
    """Train the user's spec and the best one with each of automl.confirm_seeds new seeds, in full.

    Gives {"spec": {seed: score}, "best": {seed: score}}, None for a training that failed. What is trained already is
    not trained again. The seed that chose the best is not among them.
    """
    first = max(spec.train.seed, 0) + 1
    specs: dict[str, dict[str, Any]] = {}
    asked: dict[str, tuple[str, int]] = {}
    for seed in range(first, first + spec.automl.confirm_seeds):
        for side, values in (("spec", {}), ("best", best.values)):
            # Another trial may be the best when the study is extended
            name = f"{side}_seed_{seed}" if side == "spec" else f"{best.name}_seed_{seed}"
            folder = run.folder / CONFIRM_FOLDER / name
            asked[name] = side, seed
            specs[name] = build_trial_spec(
                base, values, folder, num_epochs=num_epochs, metric=spec.automl.metric, seed=seed
            )
    scores: dict[str, dict[int, float | None]] = {"spec": {}, "best": {}}
    for outcome in _train_all(pool, specs):
        side, seed = asked[outcome.name]
        scores[side][seed] = _read_score(outcome, specs[outcome.name], spec.automl.metric, direction, run)
        run.progress(sum(map(len, scores.values())), len(specs), "trainings to confirm")
    return {side: dict(sorted(values.items())) for side, values in scores.items()}


def _train_all(pool: TrainingPool, specs: Mapping[str, Any]) -> Iterator[Outcome]:
    waiting = list(specs)
    attempts = dict.fromkeys(specs, 0)
    num_left = len(specs)
    while num_left:
        while waiting and pool.num_free:
            name = waiting.pop(0)
            attempts[name] += 1
            pool.submit(name, specs[name])
        outcome = pool.wait(POLL_S)
        if outcome is None:
            continue
        if outcome.died and attempts[outcome.name] < MAX_ATTEMPTS:
            waiting.insert(0, outcome.name)
        else:
            num_left -= 1
            yield outcome


def _read_score(
    outcome: Outcome, trial_spec: Mapping[str, Any], metric: str, direction: Direction, run: Run
) -> float | None:
    score, error = None, outcome.error
    if not error:
        folder = Path(trial_spec["train"]["results_dir"])
        prune_checkpoints(folder)
        score, error = measure_run(folder, metric, direction, trial_spec["train"]["num_epochs"])
    if error:
        run.warn(f"{outcome.name} failed: {error}")
    return score
