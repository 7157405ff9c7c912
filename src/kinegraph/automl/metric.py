"""What a study improves, and in which direction."""

from __future__ import annotations

from kinegraph.automl.trials import Direction
from kinegraph.errors import Problem, SpecError, suggest
from kinegraph.spec import AutomlSpec

METRICS: dict[str, Direction] = {
    "val_acc": "maximize",
    "val_loss": "minimize",
    "train_acc": "maximize",
    "train_loss": "minimize",
    "seconds": "minimize",
}
"""The columns of metrics.csv that can be improved."""


def choose_direction(options: AutomlSpec) -> Direction:
    """automl.direction, or what the metric's meaning says. Raises SpecError for a metric that no training logs."""
    if options.metric not in METRICS:
        expected = "one of " + ", ".join(METRICS)
        raise SpecError(Problem("automl.metric", repr(options.metric), expected, suggest(options.metric, METRICS)))
    usual = METRICS[options.metric]
    if options.direction not in ("auto", usual):
        hint = "Leave automl.direction out."
        raise SpecError(Problem("automl.direction", options.direction, f"{usual} for {options.metric}", hint))
    return usual
