"""The spec of a trial: what the user gave, the values of the trial, and where and how long it trains."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kinegraph.config import get_value, list_options
from kinegraph.config_source import set_value
from kinegraph.spec import Spec

LEFT_OUT = ("automl", "encryption_key", "results_dir", "train.gpu_ids")
"""Not part of a trial. The key and the GPUs reach a worker through its environment."""


def build_base(spec: Spec, given: Mapping[str, str]) -> dict[str, Any]:
    """The options that the user gave (`given` holds their dotted keys), nested; what is left out keeps its default.

    Stating a default would make a claim of it: num_classes, for one, must be read off the labels.
    """
    base: dict[str, Any] = {}
    for entry in list_options(Spec):
        stated = entry.key in given or any(key.startswith(f"{entry.key}.") for key in given)
        if stated and not {entry.key, entry.key.split(".")[0]} & set(LEFT_OUT):
            set_value(base, entry.key, copy.deepcopy(get_value(spec, entry.key)))
    return base


def validate_at_pauses(base: Mapping[str, Any], interval: int, pauses: Iterable[int]) -> dict[str, Any]:
    """The base with train.validation_interval so short that every pause (epochs done) falls on a validation.

    Else a pause would be a validation of its own, which chooses no checkpoint: a score without a model behind it.
    """
    spec = copy.deepcopy(dict(base))
    common = math.gcd(interval, *pauses)
    if common != interval:
        set_value(spec, "train.validation_interval", common)
    return spec


def build_trial_spec(
    base: Mapping[str, Any],
    values: Mapping[str, Any],
    folder: Path,
    *,
    num_epochs: int,
    stop_after_epoch: int = -1,
    metric: str = "val_acc",
    seed: int | None = None,
) -> dict[str, Any]:
    """The nested spec of one training in `folder`. `seed` replaces train.seed."""
    spec = copy.deepcopy(dict(base))
    changes = {
        **values,
        "train.results_dir": str(folder),
        "train.num_epochs": num_epochs,
        "train.stop_after_epoch": stop_after_epoch if stop_after_epoch < num_epochs else -1,
        "train.best_metric": metric if metric == "val_loss" else "val_acc",
    }
    if seed is not None:
        changes["train.seed"] = seed
    for key, value in changes.items():
        set_value(spec, key, value)
    return spec
