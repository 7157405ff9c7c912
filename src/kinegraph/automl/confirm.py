"""Whether the best trial is better than the user's spec, or was lucky: both are trained again with other seeds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kinegraph.automl.pool import TrainingPool
from kinegraph.automl.results import read_scores
from kinegraph.automl.trial_spec import build_trial_spec
from kinegraph.automl.trials import Direction
from kinegraph.automl.workers import Outcome
from kinegraph.run import Run
from kinegraph.spec import Spec

FOLDER_NAME = "confirm"
MAX_ATTEMPTS = 2
POLL_S = 10.0


def confirm_best(
    spec: Spec,
    run: Run,
    pool: TrainingPool,
    base: Mapping[str, Any],
    best_values: Mapping[str, Any],
    num_epochs: int,
    direction: Direction,
) -> dict[str, dict[int, float | None]]:
    """Train the user's spec and the best one with each of automl.confirm_seeds new seeds, in full.

    Gives {"spec": {seed: score}, "best": {seed: score}}, None for a training that failed. What is trained already is
    not trained again. The seed that chose the best is not among them.
    """
    first = max(spec.train.seed, 0) + 1
    specs = {}
    for seed in range(first, first + spec.automl.confirm_seeds):
        for side, values in (("spec", {}), ("best", best_values)):
            name = f"{side}_seed_{seed}"
            folder = run.folder / FOLDER_NAME / name
            specs[name] = build_trial_spec(
                base, values, folder, num_epochs=num_epochs, metric=spec.automl.metric, seed=seed
            )
    scores: dict[str, dict[int, float | None]] = {"spec": {}, "best": {}}
    for outcome in _train_all(pool, specs):
        side, _, seed_text = outcome.name.partition("_seed_")
        scores[side][int(seed_text)] = _read_score(outcome, specs[outcome.name], spec.automl.metric, direction, run)
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
    if outcome.error:
        run.warn(f"{outcome.name} failed: {outcome.error}")
        return None
    folder = Path(trial_spec["train"]["results_dir"])
    found = read_scores(folder, metric, direction, trial_spec["train"]["num_epochs"])
    return found[0] if found else None
