from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kinegraph.metrics import count_confusion, format_table, measure_top_k, score

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
