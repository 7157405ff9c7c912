"""Probabilities that mean what they say: softmax with a temperature, and the temperature fitted on validation clips.

Temperature scaling of Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017), section 4.2: one number that
all logits are divided by. The order of the classes stays as it is.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

SMALLEST_TEMPERATURE = 0.05
LARGEST_TEMPERATURE = 20.0
"""What is fitted stays between these."""
READ_TEMPERATURES = (1e-6, 1e6)
"""What a model file may hold: float32 logits divided by it are far from overflow."""
BISECTIONS = 40


def softmax(logits: NDArray[Any], temperature: float = 1.0) -> NDArray[np.float64]:
    """(N, classes) -> probabilities (N, classes) of logits / temperature, in float64 and without overflow."""
    values = np.asarray(logits, np.float64)
    powers = np.exp((values - values.max(axis=1, keepdims=True, initial=-np.inf)) / temperature)
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def fit_temperature(logits: NDArray[Any], labels: NDArray[Any]) -> float:
    """The temperature, from 0.05 to 20, under which the labels (N,) are likeliest: least mean negative log likelihood
    of softmax(logits / temperature), logits (N, classes).

    One more clip counts, spread over all of them, whose right class is the likeliest of the others. So clips that
    are all answered rightly do not ask for probabilities of 1: of N right answers the next one is expected to be
    wrong with about 1 / (N + 1), as Platt (1999, section 2.2) does for two classes. Clips whose logits are not finite
    are left out. 1.0 where nothing can be told: no clips, one class, or logits that are all alike. ValueError for
    labels that do not fit.
    """
    values, truth = np.asarray(logits, np.float64), np.asarray(labels)
    if values.ndim != 2 or truth.shape != values.shape[:1]:
        raise ValueError(
            f"logits of shape {values.shape} and labels of shape {truth.shape}, expected (N, classes), (N,)"
        )
    num_classes = values.shape[1]
    if len(truth) and not 0 <= truth.min() <= truth.max() < num_classes:
        raise ValueError(f"labels outside 0 to {num_classes - 1}")
    is_finite = np.isfinite(values).all(axis=1)
    values, truth = values[is_finite], truth[is_finite].astype(np.int64)
    if not len(values) or num_classes < 2:
        return 1.0
    values = values - values.max(axis=1, keepdims=True)
    if not values.any():
        return 1.0
    wanted = _find_wanted_mean(values, truth)

    def is_too_sharp(temperature: float) -> bool:
        # The derivative by 1 / temperature, which only grows: the likelihood has one maximum
        return float((softmax(values, temperature) * values).sum(axis=1).mean()) > wanted

    low, high = math.log(SMALLEST_TEMPERATURE), math.log(LARGEST_TEMPERATURE)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if is_too_sharp(math.exp(middle)) else (low, middle)
    return math.exp((low + high) / 2)


def is_at_bound(temperature: float) -> bool:
    """Whether a fitted temperature would be larger if that were allowed: the logits tell next to nothing."""
    return temperature > 0.999 * LARGEST_TEMPERATURE


def _find_wanted_mean(values: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """The mean over clips of the logit that the labels expect, the additional clip included."""
    rows = np.arange(len(values))
    own = values[rows, labels]
    others = values.copy()
    others[rows, labels] = -np.inf
    return float((len(values) * own.mean() + others.max(axis=1).mean()) / (len(values) + 1))


def check_temperature(value: Any) -> float:
    """The temperature that a model file holds. ValueError for what is none."""
    if type(value) not in (int, float) or not READ_TEMPERATURES[0] <= value <= READ_TEMPERATURES[1]:
        raise ValueError(f"temperature is {str(value)[:40]!r}")
    return float(value)
