"""How well predictions match the truth: confusion matrix, accuracy, precision, recall, F1, top-k, calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]
CALIBRATION_BINS = 15


@dataclass(frozen=True)
class ClassScore:
    """One class, in percent. None where there is nothing to divide by: no clip of the class, or never predicted.

    `accuracy` is the share of the clips of this class that were recognised, which is its recall.
    """

    name: str
    label: int
    support: int
    accuracy: float | None
    precision: float | None
    recall: float | None
    f1: float | None


@dataclass(frozen=True)
class Scores:
    """A whole set, in percent rounded to 2 decimals.

    `avg_accuracy` is the mean of the accuracies of all classes, where a class that the set lacks counts as 0;
    `avg_accuracy_present` is the mean over the classes that the set holds. `macro_f1` is the mean over the classes that
    occur in the truth or in the predictions.
    """

    num_clips: int
    accuracy: float
    avg_accuracy: float
    avg_accuracy_present: float
    macro_f1: float
    top_k_accuracy: dict[str, float]
    classes: list[ClassScore]

    def as_data(self) -> dict[str, Any]:
        return asdict(self)


def count_confusion(truth: NDArray[Any], predicted: NDArray[Any], num_classes: int) -> Counts:
    """The confusion matrix (classes, classes): row i, column j counts the clips of class i taken for class j.

    truth, predicted: (N,) labels from 0 to num_classes - 1; ValueError for others, or for unequal lengths.
    """
    truth, predicted = np.asarray(truth, np.int64), np.asarray(predicted, np.int64)
    if truth.shape != predicted.shape or truth.ndim != 1:
        raise ValueError(f"truth has shape {truth.shape} and predicted {predicted.shape}, expected (N,) twice")
    if len(truth) and not 0 <= min(truth.min(), predicted.min()) <= max(truth.max(), predicted.max()) < num_classes:
        raise ValueError(f"labels outside 0 to {num_classes - 1}")
    counts = np.bincount(truth * num_classes + predicted, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes).astype(np.int64)


def measure_top_k(logits: NDArray[Any], truth: NDArray[Any], k: int) -> float:
    """The share (0 to 1) of clips whose class is among the k highest of logits (N, classes); 0 for no clips.

    Among equal logits the lowest label is taken first, as argmax does.
    """
    if not len(truth):
        return 0.0
    best = np.argsort(-np.asarray(logits), axis=1, kind="stable")[:, :k]
    return float((best == np.asarray(truth)[:, None]).any(axis=1).mean())


def measure_calibration_error(
    probabilities: NDArray[Any], truth: NDArray[Any], num_bins: int = CALIBRATION_BINS
) -> float:
    """The expected calibration error (0 to 1) of probabilities (N, classes); 0 for no clips.

    Clips are sorted by the probability of their answer into bins of equal width, open below and closed above; the error
    is the mean over clips of the difference between accuracy and mean probability of their bin (Guo et al., 2017,
    equation 3).
    """
    if not len(truth):
        return 0.0
    values = np.asarray(probabilities, np.float64)
    highest = values.max(axis=1)
    is_right = values.argmax(axis=1) == np.asarray(truth)
    bins = np.clip(np.ceil(highest * num_bins).astype(np.int64) - 1, 0, num_bins - 1)
    # Of each bin the sum of (right - probability): its size times the difference of the means
    gaps = np.bincount(bins, weights=is_right - highest, minlength=num_bins)
    return float(np.abs(gaps).sum() / len(highest))


def measure_negative_log_likelihood(logits: NDArray[Any], truth: NDArray[Any]) -> float:
    """The mean of -log(probability of the true class) over clips with these logits (N, classes); 0 for no clips."""
    if not len(truth):
        return 0.0
    values = np.asarray(logits, np.float64)
    values = values - values.max(axis=1, keepdims=True)
    own = values[np.arange(len(values)), np.asarray(truth)]
    return float((np.log(np.exp(values).sum(axis=1)) - own).mean())


@dataclass(frozen=True)
class Rejection:
    """Answers below a threshold, in percent: how many there are, and the accuracy of the rest (None: there is none)."""

    threshold: float
    rejected: float
    accuracy_of_rest: float | None


def measure_rejection(probabilities: NDArray[Any], truth: NDArray[Any], threshold: float) -> Rejection:
    """What refusing answers below `threshold` does, for probabilities (N, classes) and labels (N,)."""
    values = np.asarray(probabilities, np.float64)
    is_kept = values.max(axis=1, initial=0.0) >= threshold
    is_right = values.argmax(axis=1) == np.asarray(truth)
    kept = int(is_kept.sum())
    rejected = _divide(len(values) - kept, len(values)) or 0.0
    return Rejection(threshold, rejected, _divide(int(is_right[is_kept].sum()), kept))


def measure_auroc(positives: NDArray[Any], negatives: NDArray[Any]) -> float:
    """The area under the receiver operating characteristic: how often a positive scores higher than a negative.

    positives (N,), negatives (M,): scores, in any order. Ties count one half (Mann and Whitney, 1947; by ranks, where
    equal scores share their mean rank). ValueError without positives or negatives, or for NaN.
    """
    high, low = (np.asarray(scores, np.float64).ravel() for scores in (positives, negatives))
    if not len(high) or not len(low) or np.isnan(high).any() or np.isnan(low).any():
        raise ValueError(f"{len(high)} positives and {len(low)} negatives, expected some of each, without NaN")
    _, places, counts = np.unique(np.concatenate([high, low]), return_inverse=True, return_counts=True)
    last_ranks = np.cumsum(counts)
    ranks = (last_ranks - (counts - 1) / 2)[places]
    wins = ranks[: len(high)].sum() - len(high) * (len(high) + 1) / 2
    return float(wins / (len(high) * len(low)))


def score(confusion: Counts, class_names: Sequence[str], top_k_accuracy: dict[str, float] | None = None) -> Scores:
    """All figures of a confusion matrix (classes, classes). `top_k_accuracy` is passed on: 'k' -> percent."""
    hits = confusion.diagonal().tolist()
    support = confusion.sum(axis=1).tolist()
    predicted = confusion.sum(axis=0).tolist()
    classes = []
    for label, name in enumerate(class_names):
        recall = _divide(hits[label], support[label])
        precision = _divide(hits[label], predicted[label])
        f1 = _divide(2 * hits[label], support[label] + predicted[label])
        classes.append(ClassScore(name, label, support[label], recall, precision, recall, f1))
    recalls = [hit / count for hit, count in zip(hits, support, strict=True) if count]
    f1s = [2 * hit / (a + b) for hit, a, b in zip(hits, support, predicted, strict=True) if a + b]
    return Scores(
        num_clips=sum(support),
        accuracy=_divide(sum(hits), sum(support)) or 0.0,
        avg_accuracy=_divide(sum(recalls), len(hits)) or 0.0,
        avg_accuracy_present=_divide(sum(recalls), len(recalls)) or 0.0,
        macro_f1=_divide(sum(f1s), len(f1s)) or 0.0,
        top_k_accuracy=dict(top_k_accuracy or {}),
        classes=classes,
    )


def _divide(part: float, whole: float) -> float | None:
    return round(100 * part / whole, 2) if whole else None


def format_table(scores: Scores) -> str:
    """The accuracy of each class, total accuracy and average class accuracy as plain text."""
    header = ("class", "clips", "accuracy", "precision", "F1")
    rows = [
        (_shorten(row.name), str(row.support), _show(row.accuracy), _show(row.precision), _show(row.f1))
        for row in scores.classes
    ]
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    lines = []
    for name, *cells in (header, *rows):
        cells = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *cells]))
    lines += [
        "",
        f"Total accuracy: {scores.accuracy:.2f} % of {scores.num_clips} clips",
        f"Average class accuracy: {scores.avg_accuracy:.2f} %",
    ]
    absent = sum(row.support == 0 for row in scores.classes)
    if absent:
        lines.append(
            f"{absent} of {len(scores.classes)} classes have no clip here and count as 0; "
            f"average over the others: {scores.avg_accuracy_present:.2f} %"
        )
    return "\n".join(lines)


def _show(percent: float | None) -> str:
    return "-" if percent is None else f"{percent:.2f}"


def _shorten(name: str, width: int = 40) -> str:
    name = " ".join(name.split())
    return name if len(name) <= width else name[: width - 3] + "..."
