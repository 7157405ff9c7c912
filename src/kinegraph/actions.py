"""The actions, and the one way into them.

from kinegraph.actions import train, evaluate
result = train("spec.yaml", "train.num_epochs=20")
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kinegraph.config_source import nest
from kinegraph.errors import look_up
from kinegraph.local_run import fetch_inputs, open_results
from kinegraph.recipes import choose_recipe, find_recipe
from kinegraph.run import Result, Run, find_launched_rank, open_run
from kinegraph.spec import SECTIONS, Spec
from kinegraph.spec_reading import read_spec

ACTIONS: dict[str, str] = {
    "dataset_convert": "kinegraph.data.convert:convert_dataset",
    "train": "kinegraph.train:train",
    "automl": "kinegraph.automl.search:search",
    "evaluate": "kinegraph.evaluate:evaluate",
    "inference": "kinegraph.predict:infer",
    "export": "kinegraph.export:export",
}

TRAINING = ("train", "automl")
"""Actions that take the default recipe where there is no spec."""
NOT_FOR_ALL = frozenset().union(*SECTIONS.values()) - {"model", "dataset", "input", "wandb"}
"""Sections that some actions ignore. Model, dataset and input are compared with a model; wandb is given to all."""
DISTRIBUTED = ("train",)
"""Actions that all processes of torchrun or SLURM work on; of the others only the first process does anything."""

SpecSource = str | Path | Mapping[str, Any] | None


def find_recipe_of(name: str, source: SpecSource, overrides: Sequence[str]) -> str:
    """The recipe whose values an action takes in the place of a spec; '' where there is a spec, or no training."""
    return choose_recipe(overrides) if source is None and name in TRAINING else ""


def run_action(name: str, source: SpecSource = None, overrides: Sequence[str] = ()) -> Result:
    """Run an action on a spec: a YAML file, a mapping or nothing, with `key=value` overrides.

    A training without a spec is that of a recipe, see `find_recipe_of`.
    Raises UserError for what the user can mend, KinegraphError for what failed.
    """
    target = look_up(ACTIONS, name, "action")
    recipe = find_recipe_of(name, source, overrides)
    loaded = read_spec(nest(find_recipe(recipe).values) if recipe else source, list(overrides), name)
    module, _, function = target.partition(":")
    action: Callable[[Spec, Run], Result] = getattr(importlib.import_module(module), function)
    if name not in DISTRIBUTED and find_launched_rank() > 0:
        return Result()
    with (
        open_results(loaded.values, name) as results,
        open_run(name, results.folder, results.spec, loaded.origins, results.locations) as run,
    ):
        if recipe:
            run.info(f"No spec file: recipe {recipe}. `kinegraph template {name} --recipe {recipe}` shows its values.")
        _notice_unread_overrides(name, run)
        fetch_inputs(run, results)
        result = action(run.spec, run)
        result.files.setdefault("results_dir", str(results.folder))
        # Before the run says that it succeeded
        results.upload_all()
    return Result(run.show(result.metrics), run.show(result.files))


def _notice_unread_overrides(action: str, run: Run) -> None:
    """Say which overrides are of sections that only other actions read. A file may hold the sections of all of them."""
    overrides = [key for key, origin in run.origins.items() if origin == "override"]
    unread: dict[str, list[str]] = {}
    for key in overrides:
        section = key.partition(".")[0]
        is_group = any(other.startswith(f"{key}.") for other in overrides)
        if section in NOT_FOR_ALL.difference(SECTIONS[action]) and not is_group:
            unread.setdefault(section, []).append(key)
    for section, keys in unread.items():
        run.warn(f"{', '.join(keys)}: no effect, {action} does not read the section {section}.")


def dataset_convert(source: SpecSource = None, *overrides: str) -> Result:
    """Cut recordings into windows: arrays and an index. See `run_action`."""
    return run_action("dataset_convert", source, overrides)


def train(source: SpecSource = None, *overrides: str) -> Result:
    """Train a classifier, or go on with a run that was stopped. See `run_action`."""
    return run_action("train", source, overrides)


def automl(source: SpecSource = None, *overrides: str) -> Result:
    """Search for better options: many trainings, the best of them kept. See `run_action`."""
    return run_action("automl", source, overrides)


def evaluate(source: SpecSource = None, *overrides: str) -> Result:
    """Measure a model on labelled clips. See `run_action`."""
    return run_action("evaluate", source, overrides)


def inference(source: SpecSource = None, *overrides: str) -> Result:
    """Classify clips. See `run_action`."""
    return run_action("inference", source, overrides)


def export(source: SpecSource = None, *overrides: str) -> Result:
    """Write a model as ONNX. See `run_action`."""
    return run_action("export", source, overrides)
