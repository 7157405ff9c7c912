"""What is known of a trial, and which of several is the best."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

TrialState = Literal["running", "paused", "complete", "failed"]
Direction = Literal["maximize", "minimize"]


@dataclass
class Trial:
    """One configuration of a study. Budgets are epochs.

    `values` holds the searched options that have an effect (dotted key -> value). `target` is the budget that it is
    being trained to, or was last. `scores` maps each budget it has reached to the best value of the metric up to there.
    A paused trial may be promoted to a larger budget later.
    """

    number: int
    values: dict[str, Any]
    target: int
    state: TrialState = "running"
    bracket: int = 0
    scores: dict[int, float] = field(default_factory=dict)
    seconds: float = 0.0
    attempts: int = 0
    error: str = ""

    @property
    def budget(self) -> int:
        """The largest budget with a score; 0 if there is none."""
        return max(self.scores, default=0)

    @property
    def score(self) -> float | None:
        """The score at the largest budget, or None."""
        return self.scores[self.budget] if self.scores else None

    @property
    def name(self) -> str:
        """Name of its run folder."""
        return f"trial_{self.number:03d}"


def orient(score: float, direction: Direction) -> float:
    """The score with a sign that makes larger better."""
    return score if direction == "maximize" else -score


def find_best(trials: Iterable[Trial], direction: Direction) -> Trial | None:
    """The best among the trials at the largest budget that any has reached; the earliest of equals.

    A failed trial never counts, nor does a score that is not finite.
    """
    sound = [trial for trial in trials if trial.state != "failed" and _is_finite(trial.score)]
    largest = max((trial.budget for trial in sound), default=0)
    ranked = [trial for trial in sound if trial.budget == largest]
    return max(ranked, key=lambda trial: (orient(trial.scores[largest], direction), -trial.number), default=None)


def _is_finite(score: float | None) -> bool:
    return score is not None and math.isfinite(score)
