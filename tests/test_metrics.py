from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kinegraph.metrics import (
    Rejection,
    count_confusion,
    format_table,
    measure_auroc,
    measure_calibration_error,
    measure_negative_log_likelihood,
    measure_rejection,
    measure_top_k,
    score,
)

NUM_CLASSES = 4
NAMES = ["a", "b", "c", "d"]
PAIRS = st.lists(st.tuples(st.integers(0, NUM_CLASSES - 1), st.integers(0, NUM_CLASSES - 1)), min_size=1, max_size=60)


def score_pairs(pairs: list[tuple[int, int]]):
    truth, predicted = np.array(pairs, np.int64).reshape(-1, 2).T
    return score(count_confusion(truth, predicted, NUM_CLASSES), NAMES)


def test_confusion_has_a_row_for_each_true_class() -> None:
    confusion = count_confusion(np.array([0, 0, 2]), np.array([0, 1, 1]), 3)
    assert confusion.tolist() == [[1, 1, 0], [0, 0, 0], [0, 1, 0]]


@given(PAIRS)
def test_confusion_counts_every_pair_once(pairs: list[tuple[int, int]]) -> None:
    truth, predicted = np.array(pairs).T
    confusion = count_confusion(truth, predicted, NUM_CLASSES)
    counts = Counter(pairs)
    assert confusion.shape == (NUM_CLASSES, NUM_CLASSES)
    assert all(confusion[i, j] == counts[i, j] for i in range(NUM_CLASSES) for j in range(NUM_CLASSES))


@given(PAIRS)
def test_scores_agree_with_their_definitions(pairs: list[tuple[int, int]]) -> None:
    scores = score_pairs(pairs)
    recalls, f1s = [], []
    for label in range(NUM_CLASSES):
        row = scores.classes[label]
        true_positives = sum(t == label and p == label for t, p in pairs)
        false_positives = sum(t != label and p == label for t, p in pairs)
        false_negatives = sum(t == label and p != label for t, p in pairs)
        present, named = true_positives + false_negatives, true_positives + false_positives
        assert row.support == present
        recall = true_positives / present if present else None
        precision = true_positives / named if named else None
        assert row.recall == row.accuracy == (None if recall is None else pytest.approx(100 * recall, abs=0.0051))
        assert row.precision == (None if precision is None else pytest.approx(100 * precision, abs=0.0051))
        if present + named:
            f1 = 2 * (recall or 0) * (precision or 0) / ((recall or 0) + (precision or 0)) if true_positives else 0.0
            assert row.f1 == pytest.approx(100 * f1, abs=0.0051)
            f1s.append(f1)
        else:
            assert row.f1 is None
        recalls.append(recall)
    present_recalls = [recall for recall in recalls if recall is not None]
    assert scores.accuracy == pytest.approx(100 * np.mean([t == p for t, p in pairs]), abs=0.0051)
    assert scores.avg_accuracy == pytest.approx(100 * sum(present_recalls) / NUM_CLASSES, abs=0.0051)
    assert scores.avg_accuracy_present == pytest.approx(100 * np.mean(present_recalls), abs=0.0051)
    assert scores.macro_f1 == pytest.approx(100 * np.mean(f1s), abs=0.0051)
    assert scores.num_clips == len(pairs)


def test_numbers_are_percent_with_two_decimals_and_absent_classes_count_as_0() -> None:
    scores = score_pairs([(0, 0), (0, 0), (0, 1), (1, 1)])
    assert (scores.accuracy, scores.avg_accuracy, scores.avg_accuracy_present) == (75.0, 41.67, 83.33)
    assert [row.accuracy for row in scores.classes] == [66.67, 100.0, None, None]


def test_no_clips_give_zeros_not_an_error() -> None:
    scores = score(np.zeros((NUM_CLASSES, NUM_CLASSES), np.int64), NAMES)
    assert (scores.accuracy, scores.avg_accuracy, scores.macro_f1, scores.num_clips) == (0.0, 0.0, 0.0, 0)


def test_scores_are_strict_json() -> None:
    text = json.dumps(score_pairs([(0, 1)]).as_data(), allow_nan=False)
    assert json.loads(text)["classes"][3]["accuracy"] is None


@pytest.mark.parametrize(
    ("truth", "predicted"), [([0, 4], [0, 0]), ([0, -1], [0, 0]), ([0], [0, 1]), ([[0]], [[0]]), ([0], [4])]
)
def test_labels_that_do_not_fit_are_refused(truth: list, predicted: list) -> None:
    with pytest.raises(ValueError, match=r"labels outside|expected \(N,\)"):
        count_confusion(np.array(truth), np.array(predicted), NUM_CLASSES)


@given(st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_top_k_agrees_with_a_plain_count(k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.integers(0, 3, (12, 5)).astype(np.float32)
    truth = rng.integers(0, 5, 12)
    hits = 0
    for row, label in zip(logits.tolist(), truth.tolist(), strict=True):
        ahead = sum(value > row[label] or (value == row[label] and other < label) for other, value in enumerate(row))
        hits += ahead < k
    assert measure_top_k(logits, truth, k) == pytest.approx(hits / 12)


def test_top_1_is_argmax_and_top_all_is_1() -> None:
    rng = np.random.default_rng(0)
    logits, truth = rng.standard_normal((50, 5)), rng.integers(0, 5, 50)
    assert measure_top_k(logits, truth, 1) == pytest.approx((logits.argmax(1) == truth).mean())
    assert measure_top_k(logits, truth, 5) == 1.0


def test_table_names_every_class_and_both_accuracies() -> None:
    table = format_table(score_pairs([(0, 0), (0, 0), (0, 1), (1, 1)]))
    lines = table.splitlines()
    assert [line.split()[0] for line in lines[:5]] == ["class", *NAMES]
    assert lines[1].split() == ["a", "3", "66.67", "100.00", "80.00"]
    assert lines[3].split() == ["c", "0", "-", "-", "-"]
    assert "Total accuracy: 75.00 % of 4 clips" in lines
    assert "Average class accuracy: 41.67 %" in lines
    assert "2 of 4 classes have no clip here" in lines[-1]
    assert "83.33" in lines[-1]


def test_table_of_a_full_set_has_no_note() -> None:
    assert format_table(score_pairs([(i, i) for i in range(4)])).splitlines()[-1] == "Average class accuracy: 100.00 %"


@given(st.integers(1, 40), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_calibration_error_agrees_with_bins_counted_one_by_one(num_clips: int, num_bins: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    # Sixteenths, so that probabilities fall on the edges of bins too
    counts = rng.multinomial(16, [0.6, 0.3, 0.1], num_clips)
    probabilities, truth = counts / 16, rng.integers(0, 3, num_clips)
    error = 0.0
    for number in range(num_bins):
        members = [i for i in range(num_clips) if number < counts[i].max() * num_bins / 16 <= number + 1]
        if members:
            accuracy = np.mean([int(np.argmax(counts[i])) == truth[i] for i in members])
            confidence = np.mean([counts[i].max() / 16 for i in members])
            error += len(members) / num_clips * abs(accuracy - confidence)
    assert measure_calibration_error(probabilities, truth, num_bins) == pytest.approx(error, abs=1e-12)


def test_calibration_error_of_known_answers() -> None:
    sure = np.tile([1.0, 0.0], (4, 1))
    assert measure_calibration_error(sure, np.array([0, 0, 0, 0])) == 0.0
    assert measure_calibration_error(sure, np.array([0, 0, 0, 1])) == pytest.approx(0.25)
    assert measure_calibration_error(np.tile([0.75, 0.25], (4, 1)), np.array([0, 0, 0, 1])) == pytest.approx(0.0)
    assert measure_calibration_error(np.zeros((0, 2)), np.zeros(0)) == 0.0


@given(st.integers(1, 10), st.floats(0.1, 200), st.integers(0, 2**32 - 1))
def test_likelihood_agrees_with_plain_arithmetic(num_clips: int, spread: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits, truth = spread * rng.standard_normal((num_clips, 4)), rng.integers(0, 4, num_clips)
    total = sum(float(np.logaddexp.reduce(row) - row[label]) for row, label in zip(logits, truth, strict=True))
    assert measure_negative_log_likelihood(logits, truth) == pytest.approx(total / num_clips)
    assert measure_negative_log_likelihood(logits[:0], truth[:0]) == 0.0


SCORES = st.lists(st.integers(-3, 3), min_size=1, max_size=25)


@given(SCORES, SCORES)
def test_auroc_agrees_with_a_count_of_all_pairs(positives: list[int], negatives: list[int]) -> None:
    wins = sum((p > n) + 0.5 * (p == n) for p in positives for n in negatives)
    found = measure_auroc(np.array(positives), np.array(negatives))
    assert found == pytest.approx(wins / (len(positives) * len(negatives)))
    assert measure_auroc(np.array(negatives), np.array(positives)) == pytest.approx(1 - found)
    assert measure_auroc(np.exp(positives), np.exp(negatives)) == pytest.approx(found), "only the order counts"


@pytest.mark.parametrize(("positives", "negatives"), [([], [1.0]), ([1.0], []), ([float("nan")], [1.0])])
def test_auroc_needs_scores_of_both(positives: list[float], negatives: list[float]) -> None:
    with pytest.raises(ValueError, match="expected some of each"):
        measure_auroc(np.array(positives), np.array(negatives))


def test_rejection_counts_answers_below_the_threshold() -> None:
    probabilities = np.array([[0.9, 0.1], [0.5, 0.5], [0.2, 0.8], [0.4, 0.6]])
    truth = np.array([0, 1, 0, 1])
    assert measure_rejection(probabilities, truth, 0.6) == Rejection(0.6, 25.0, 66.67)
    assert measure_rejection(probabilities, truth, 0.85) == Rejection(0.85, 75.0, 100.0)
    assert measure_rejection(probabilities, truth, 0.95) == Rejection(0.95, 100.0, None)
    assert measure_rejection(probabilities, truth, 0.0) == Rejection(0.0, 0.0, 50.0)
