from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kinegraph.calibration import LARGEST_TEMPERATURE, SMALLEST_TEMPERATURE, check_temperature, fit_temperature, softmax

TEMPERATURES = np.exp(np.linspace(math.log(SMALLEST_TEMPERATURE), math.log(LARGEST_TEMPERATURE), 200))


def compute_objective(logits: np.ndarray, labels: np.ndarray, temperature: float) -> float:
    """Sum of -log likelihood of all clips, and of one more whose right class is the second choice; plain arithmetic."""
    total = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        scaled = [value / temperature for value in row]
        normaliser = max(scaled) + math.log(sum(math.exp(value - max(scaled)) for value in scaled))
        second = max(value for place, value in enumerate(scaled) if place != label)
        total += normaliser - scaled[label] + (normaliser - second) / len(labels)
    return total


def draw_answers(temperature: float, num_clips: int, seed: int, num_classes: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Logits whose labels are drawn from softmax(logits / temperature)."""
    rng = np.random.default_rng(seed)
    logits = 3 * rng.standard_normal((num_clips, num_classes))
    shares = np.cumsum(softmax(logits, temperature), axis=1)
    return logits, (rng.random((num_clips, 1)) > shares[:, :-1]).sum(axis=1)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(2, 5), st.floats(0.1, 30), st.integers(0, 2**32 - 1))
def test_no_other_temperature_is_likelier(num_clips: int, num_classes: int, spread: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = spread * rng.standard_normal((num_clips, num_classes))
    labels = rng.integers(0, num_classes, num_clips)
    found = fit_temperature(logits, labels)
    assert SMALLEST_TEMPERATURE <= found <= LARGEST_TEMPERATURE
    least = min(compute_objective(logits, labels, temperature) for temperature in TEMPERATURES)
    assert compute_objective(logits, labels, found) <= least + 1e-9 * max(1.0, abs(least))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_the_temperature_that_made_the_labels_is_found(temperature: float) -> None:
    found = fit_temperature(*draw_answers(temperature, 20_000, seed=1))
    assert found == pytest.approx(temperature, rel=0.05)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.3, 3), st.integers(0, 100))
def test_logits_times_a_factor_ask_for_that_factor(factor: float, seed: int) -> None:
    logits, labels = draw_answers(1.0, 200, seed)
    assert fit_temperature(factor * logits, labels) == pytest.approx(factor * fit_temperature(logits, labels), rel=1e-6)


@pytest.mark.parametrize(("num_clips", "gap"), [(9, 2.0), (99, 8.0), (999, 30.0)])
def test_clips_that_are_all_right_leave_room_for_a_mistake(num_clips: int, gap: float) -> None:
    logits = np.tile([gap, 0.0], (num_clips, 1))
    temperature = fit_temperature(logits, np.zeros(num_clips, int))
    assert softmax(logits, temperature)[0, 1] == pytest.approx(1 / (num_clips + 1))


def test_extremes_stay_within_the_bounds() -> None:
    logits = np.tile([1e-3, 0.0], (1000, 1))
    assert fit_temperature(logits, np.zeros(1000, int)) == pytest.approx(SMALLEST_TEMPERATURE)
    assert fit_temperature(logits, np.ones(1000, int)) == pytest.approx(LARGEST_TEMPERATURE)


@pytest.mark.parametrize(
    "logits", [np.zeros((0, 3)), np.ones((4, 1)), np.full((4, 3), 7.0), np.full((4, 3), np.nan)], ids=str
)
def test_where_nothing_can_be_told_it_is_1(logits: np.ndarray) -> None:
    assert fit_temperature(logits, np.zeros(len(logits), int)) == 1.0


def test_clips_of_a_failed_answer_are_left_out() -> None:
    logits, labels = draw_answers(2.0, 300, seed=3)
    expected = fit_temperature(logits, labels)
    spoilt = np.concatenate([logits, [[np.nan] * 5, [np.inf, 0, 0, 0, 0]]])
    assert fit_temperature(spoilt, np.append(labels, [0, 1])) == expected != 1.0


@pytest.mark.parametrize(
    ("logits", "labels"),
    [(np.ones((3, 2)), [0, 1]), (np.ones((3, 2)), [0, 1, 2]), (np.ones((3, 2)), [0, -1, 0]), (np.ones(3), [0, 0, 0])],
)
def test_labels_that_do_not_fit_are_refused(logits: np.ndarray, labels: list[int]) -> None:
    with pytest.raises(ValueError, match=r"expected \(N, classes\)|labels outside"):
        fit_temperature(logits, np.array(labels))


def test_what_a_file_may_hold() -> None:
    assert check_temperature(2) == 2.0 and type(check_temperature(2)) is float
    wrong: list[Any] = [0, -1.0, float("nan"), float("inf"), 1e-7, 1e7, True, "1", None, [1.0]]
    for value in wrong:
        with pytest.raises(ValueError, match="temperature is"):
            check_temperature(value)
