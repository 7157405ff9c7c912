"""How a recipe does on a view that it never saw, without the test view of NW-UCLA: docs/decisions/0010.

    .venv/bin/python benchmarks/view_folds.py --recipe small
    .venv/bin/python benchmarks/view_folds.py --recipe small model.width=1 train.num_epochs=120

Trains on view 1 and measures on view 2, and the other way round: what the test asks for, from half of its training
clips. `key=value` changes the recipe. The same command goes on with what was stopped; nothing is done twice. The
result file has all that was measured, whatever came of it: what is chosen here was chosen among so many.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from accuracy import compute_percent, read_results
from accuracy_data import SOURCES, Fold, read_recordings
from accuracy_protocol import Plan, Training, plan_recipe
from kinegraph.config_source import parse_overrides
from kinegraph.run import show_messages
from kinegraph.storage import lock_folder, make_folder, write_json

HERE = Path(__file__).parent
DATASET = "nw_ucla"
VIEWS = (1, 2)
"""View 3 is the test."""


def split_by_view(views: np.ndarray[Any, Any]) -> dict[str, Fold]:
    """Folds by name. None has test clips: `test` is empty."""
    folds = {}
    for trained, measured in (VIEWS, VIEWS[::-1]):
        name = f"view_{trained}_to_{measured}"
        fit, val = (np.flatnonzero(views == view) for view in (trained, measured))
        folds[name] = Fold(name, fit, val, fit, np.empty(0, np.int64))
    return folds


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted keys."""
    values: dict[str, Any] = {}
    for key, value in tree.items():
        values |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return values


def measure_fold(plan: Plan, changes: dict[str, Any], fold: Fold, seed: int, training: Training) -> dict[str, Any]:
    """A row of the result file."""
    outcome = training.validate(fold)
    return {
        "recipe": plan.recipe,
        "changes": changes,
        "recipe_hash": plan.recipe_hash,
        "fold": fold.name,
        "seed": seed,
        "accuracy": compute_percent(outcome),
        "parameters": outcome.parameters,
        "multiply_adds_per_clip": outcome.multiply_adds,
        "train_seconds": round(outcome.seconds, 1),
        "device": outcome.device,
        "threads": outcome.threads,
        "commit": outcome.commit,
    }


def add_row(path: Path, row: dict[str, Any]) -> None:
    """The newest row of a recipe, fold and seed replaces an older one."""

    def name(of: dict[str, Any]) -> tuple[Any, ...]:
        return of["recipe_hash"], of["fold"], of["seed"]

    rows = read_results(path)
    write_json(path, [*(each for each in rows if name(each) != name(row)), row])


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("changes", nargs="*", help="key=value, as in a spec")
    parser.add_argument("--fold", choices=[f"view_{a}_to_{b}" for a, b in (VIEWS, VIEWS[::-1])], help="only this one")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared/data", help="folder of .npz files")
    parser.add_argument("--runs", type=Path, default=Path.home() / "kinegraph-runs/view_folds")
    parser.add_argument("--results", type=Path, default=HERE / "results/view_folds.json")
    arguments = parser.parse_args(words)
    show_messages()
    changes = flatten(parse_overrides(arguments.changes, {}))
    plan = plan_recipe(DATASET, arguments.recipe, changes=changes)
    path = arguments.data / f"{DATASET}.npz"
    recordings = read_recordings(path, SOURCES[DATASET])
    folds = split_by_view(np.load(path)["view"])
    training = Training(plan, arguments.seed, recordings, make_folder(arguments.runs))
    for name in [arguments.fold] if arguments.fold else folds:
        row = measure_fold(plan, changes, folds[name], arguments.seed, training)
        with lock_folder(arguments.runs, wait_s=60):
            add_row(arguments.results, row)
        print(f"{plan.recipe} {' '.join(arguments.changes)}, {name}, seed {arguments.seed}: {row['accuracy']} %")


if __name__ == "__main__":
    main()
