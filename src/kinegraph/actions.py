"""The actions, and the one way into them.

from kinegraph.actions import train, evaluate
result = train("spec.yaml", "train.num_epochs=20")
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kinegraph.errors import look_up
from kinegraph.run import Result, Run, find_launched_rank, open_run
from kinegraph.spec import Spec, find_results_dir, read_spec

ACTIONS: dict[str, str] = {
    "dataset_convert": "kinegraph.data.convert:convert_dataset",
    "train": "kinegraph.train:train",
    "evaluate": "kinegraph.evaluate:evaluate",
    "inference": "kinegraph.predict:infer",
    "export": "kinegraph.export:export",
}

DISTRIBUTED = ("train",)
"""Actions that all processes of torchrun or SLURM work on; of the others only the first process does anything."""

SpecSource = str | Path | Mapping[str, Any] | None


def run_action(name: str, source: SpecSource = None, overrides: Sequence[str] = ()) -> Result:
    """Run an action on a spec: a YAML file, a mapping or nothing, with `key=value` overrides.

    Raises UserError for what the user can mend, KinegraphError for what failed.
    """
    target = look_up(ACTIONS, name, "action")
    loaded = read_spec(source, list(overrides), name)
    folder = find_results_dir(loaded.values, name)
    assert folder is not None, "read_spec demands a results folder"
    module, _, function = target.partition(":")
    action: Callable[[Spec, Run], Result] = getattr(importlib.import_module(module), function)
    if name not in DISTRIBUTED and find_launched_rank() > 0:
        return Result()
    with open_run(name, folder, loaded.values, loaded.origins) as run:
        result = action(loaded.values, run)
        result.files.setdefault("results_dir", str(folder))
    return result


def dataset_convert(source: SpecSource = None, *overrides: str) -> Result:
    """Cut recordings into windows: arrays and an index. See `run_action`."""
    return run_action("dataset_convert", source, overrides)


def train(source: SpecSource = None, *overrides: str) -> Result:
    """Train a classifier, or go on with a run that was stopped. See `run_action`."""
    return run_action("train", source, overrides)


def evaluate(source: SpecSource = None, *overrides: str) -> Result:
    """Measure a model on labelled clips. See `run_action`."""
    return run_action("evaluate", source, overrides)


def inference(source: SpecSource = None, *overrides: str) -> Result:
    """Classify clips. See `run_action`."""
    return run_action("inference", source, overrides)


def export(source: SpecSource = None, *overrides: str) -> Result:
    """Write a model as ONNX. See `run_action`."""
    return run_action("export", source, overrides)
