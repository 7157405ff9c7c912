"""Whether the best trial is better than the user's spec, told so that a lucky run is not sold as a gain."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from kinegraph.automl.trials import Direction, orient
from kinegraph.storage import write_json

CONFIDENCE = 0.95
ENOUGH_SEEDS = 3

Verdict = Literal["better", "worse", "same", "unclear", "not known"]


@dataclass(frozen=True)
class Side:
    """Scores of one configuration by seed; None where the training failed."""

    scores: dict[int, float | None]
    mean: float | None
    standard_deviation: float | None

    @property
    def finished(self) -> list[float]:
        return [score for score in self.scores.values() if score is not None]


@dataclass(frozen=True)
class Comparison:
    """Your spec against the best trial, trained again with several seeds on the same data.

    `gain` is the difference of the means with a sign that makes an improvement positive, `standard_error` that of this
    difference, `interval` its 95 % confidence interval (Welch's t). None where too few seeds allow none.
    """

    metric: str
    direction: Direction
    spec: Side
    best: Side
    gain: float | None
    standard_error: float | None
    interval: tuple[float, float] | None
    verdict: Verdict
    text: str

    def as_data(self) -> dict[str, Any]:
        return asdict(self)


def compare_with_spec(
    spec_scores: Mapping[int, float | None],
    best_scores: Mapping[int, float | None],
    *,
    metric: str,
    direction: Direction,
    num_trials: int,
) -> Comparison:
    """Compare the scores (by seed) of the user's spec and of the best of `num_trials` trials.

    The score that made the trial the best should not be among them: it was chosen for being high.
    """
    spec, best = _sum_up(spec_scores), _sum_up(best_scores)
    gain = standard_error = None
    interval = None
    if spec.mean is not None and best.mean is not None:
        gain = orient(best.mean, direction) - orient(spec.mean, direction)
        if spec.standard_deviation is not None and best.standard_deviation is not None:
            standard_error, interval = _measure_error(spec, best, gain)
    verdict = _judge(gain, interval)
    text = _tell(metric, spec, best, gain, standard_error, interval, verdict, num_trials)
    return Comparison(metric, direction, spec, best, gain, standard_error, interval, verdict, text)


def write_comparison(folder: Path, comparison: Comparison) -> Path:
    """Write comparison.json into the study folder. Raises StorageError."""
    path = folder / "comparison.json"
    write_json(path, comparison.as_data())
    return path


def _sum_up(scores: Mapping[int, float | None]) -> Side:
    sound = {seed: score if score is not None and math.isfinite(score) else None for seed, score in scores.items()}
    finished = [score for score in sound.values() if score is not None]
    mean = statistics.fmean(finished) if finished else None
    return Side(sound, mean, statistics.stdev(finished) if len(finished) > 1 else None)


def _measure_error(spec: Side, best: Side, gain: float) -> tuple[float, tuple[float, float]]:
    """Standard error of the difference of two means and its confidence interval (Welch 1947, unequal variances)."""
    from scipy.special import stdtrit

    assert spec.standard_deviation is not None and best.standard_deviation is not None
    parts = [(side.standard_deviation or 0.0) ** 2 / len(side.finished) for side in (spec, best)]
    error = math.sqrt(sum(parts))
    if error == 0:
        return 0.0, (gain, gain)
    shares = [part**2 / (len(side.finished) - 1) for part, side in zip(parts, (spec, best), strict=True)]
    degrees = sum(parts) ** 2 / sum(shares)
    reach = float(stdtrit(degrees, 0.5 + CONFIDENCE / 2)) * error
    return error, (gain - reach, gain + reach)


def _judge(gain: float | None, interval: tuple[float, float] | None) -> Verdict:
    if gain is None:
        return "not known"
    if interval is None:
        return "unclear"
    low, high = interval
    if low == high == 0:
        return "same"
    return "better" if low > 0 else "worse" if high < 0 else "unclear"


def _tell(
    metric: str,
    spec: Side,
    best: Side,
    gain: float | None,
    standard_error: float | None,
    interval: tuple[float, float] | None,
    verdict: Verdict,
    num_trials: int,
) -> str:
    sides = f"{metric}: your spec {_tell_side(spec)}, the best trial {_tell_side(best)}."
    if gain is None:
        return f"{sides} There is nothing to compare."
    if interval is None or standard_error is None:
        hint = "set automl.confirm_seeds=3 or more to find out"
        return f"{sides} A gain of {gain:+.4f}, which may be luck: one run says nothing about the scatter ({hint})."
    if standard_error == 0:
        scatter = "Neither varied with the seed"
        return f"{sides} {scatter}." + (f" A gain of {gain:+.4f}." if gain else " There is no difference.")
    ratio = abs(gain) / standard_error
    low, high = interval
    size = f"A gain of {gain:+.4f} ({ratio:.1f} standard errors; 95 % interval {low:+.4f} to {high:+.4f})"
    meaning = {
        "better": "more than the scatter between seeds explains",
        "worse": "the best trial was luck: your spec is better",
        "unclear": "no more than other seeds alone may bring: no gain is shown",
    }[verdict]
    if verdict == "unclear" and min(len(spec.finished), len(best.finished)) < ENOUGH_SEEDS:
        meaning = f"so few seeds cannot show a gain (automl.confirm_seeds={ENOUGH_SEEDS} or more may)"
    if verdict == "better" and num_trials > 1:
        chosen = f"It was chosen among {num_trials} trials by the same validation data, which flatters it"
        return f"{sides} {size}: {meaning}. {chosen}: measure it on the test split once."
    return f"{sides} {size}: {meaning}."


def _tell_side(side: Side) -> str:
    finished = side.finished
    num_failed = len(side.scores) - len(finished)
    failed = f", {num_failed} failed" if num_failed else ""
    if side.mean is None:
        return f"has no result ({num_failed} runs failed)" if num_failed else "has no result"
    runs = f"{len(finished)} seed{'s' if len(finished) > 1 else ''}{failed}"
    scatter = f" ± {side.standard_deviation:.4f}" if side.standard_deviation is not None else ""
    return f"{side.mean:.4f}{scatter} ({runs})"
