"""Detection figures against plain restatements of their definitions."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kinegraph.live.detection import (
    IOU_THRESHOLDS,
    Annotation,
    Detection,
    Recording,
    assign_to_longest,
    match_segments,
    measure_average_precision,
    measure_iou,
    score_detections,
)

NAMES = ("wave", "sit", "jump")


@st.composite
def draw_spans(draw: Any, most: int = 6) -> list[tuple[int, int]]:
    """Whole seconds, one after the other, without overlap."""
    places = sorted(draw(st.lists(st.integers(0, 60), max_size=2 * most, unique=True)))
    return list(zip(places[::2], places[1::2], strict=False))


@st.composite
def draw_recording(draw: Any) -> Recording:
    name = st.sampled_from(NAMES)
    annotations = [Annotation(draw(name), *span) for span in draw(draw_spans())]
    detections = [
        Detection(draw(name), first, last, draw(st.sampled_from([0.5, 0.7, 0.9])), first + draw(st.integers(0, 9)))
        for first, last in draw(draw_spans())
    ]
    return Recording("r", 60.0, annotations, detections)


def count_shared_seconds(a: Any, b: Any) -> tuple[int, int]:
    """(intersection, union), counted second by second."""
    first, second = set(range(int(a.start), int(a.end))), set(range(int(b.start), int(b.end)))
    return len(first & second), len(first | second)


@given(st.lists(st.integers(0, 20), min_size=4, max_size=4))
def test_iou(places: list[int]) -> None:
    a = Annotation("wave", *sorted(places[:2]))
    b = Annotation("wave", *sorted(places[2:]))
    shared, union = count_shared_seconds(a, b)
    assert measure_iou(a, b) == pytest.approx(shared / union if union else 0.0)
    assert measure_iou(a, b) == measure_iou(b, a)


def match_plainly(annotations: Any, detections: Any, threshold: float) -> set[tuple[int, int]]:
    """(detection, annotation) pairs: the best detection left takes the best annotation left, until none is left."""
    detections_left, annotations_left = set(range(len(detections))), set(range(len(annotations)))
    pairs = set()
    while detections_left:
        best = min(detections_left, key=lambda d: (-detections[d].probability, detections[d].start))
        detections_left.remove(best)
        fitting = []
        for place in annotations_left:
            shared, union = count_shared_seconds(annotations[place], detections[best])
            if shared and shared >= threshold * union - 1e-9:
                fitting.append((Fraction(-shared, union), annotations[place].start, place))
        if fitting:
            place = min(fitting)[2]
            annotations_left.remove(place)
            pairs.add((best, place))
    return pairs


@settings(deadline=None)
@given(draw_recording(), st.sampled_from([0.15, 0.31, 0.5, 0.71]))
def test_matching(recording: Recording, threshold: float) -> None:
    matches = match_segments(recording.annotations, recording.detections, threshold)
    pairs = {(place, match) for place, match in enumerate(matches) if match is not None}
    assert pairs == match_plainly(recording.annotations, recording.detections, threshold)


@settings(deadline=None)
@given(draw_recording())
def test_above_a_half_no_assignment_matches_more(recording: Recording) -> None:
    from scipy.optimize import linear_sum_assignment

    ious = [[measure_iou(a, d) >= 0.55 for a in recording.annotations] for d in recording.detections]
    fits = np.array(ious, bool).reshape(len(recording.detections), len(recording.annotations))
    rows, columns = linear_sum_assignment(fits, maximize=True)
    matches = match_segments(recording.annotations, recording.detections, 0.55)
    assert sum(match is not None for match in matches) == fits[rows, columns].sum()


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 1), st.booleans()), max_size=12, unique_by=lambda item: item[0]), st.integers(0, 4)
)
def test_average_precision(items: list[tuple[float, bool]], missed: int) -> None:
    """For each annotation that was found, the best precision of all cuts that find at least as many; else 0."""
    num_found = sum(is_match for _, is_match in items)
    num_annotations = num_found + missed
    if num_annotations == 0:
        return
    ordered = sorted(items, reverse=True)
    cuts = [(sum(match for _, match in ordered[:size]), size) for size in range(1, len(ordered) + 1)]
    total = sum(max(hits / size for hits, size in cuts if hits >= number) for number in range(1, num_found + 1))
    found = measure_average_precision([p for p, _ in items], [match for _, match in items], num_annotations)
    assert found == pytest.approx(total / num_annotations)


def check_class(recordings: list[Recording], name: str, scores: Any) -> None:
    parts = [
        ([a for a in r.annotations if a.class_name == name], [d for d in r.detections if d.class_name == name])
        for r in recordings
    ]
    num_annotations, num_detections = (sum(len(part[i]) for part in parts) for i in (0, 1))
    assert (scores.num_annotations, scores.num_detections) == (num_annotations, num_detections)
    for threshold in IOU_THRESHOLDS:
        num_matches = sum(len(match_plainly(*part, threshold)) for part in parts)
        shown = f"{threshold:g}"
        assert scores.recall[shown] == (num_matches / num_annotations if num_annotations else None)
        assert scores.precision[shown] == (num_matches / num_detections if num_detections else None)
        recall, precision = scores.recall[shown], scores.precision[shown]
        if num_matches:
            assert scores.f1[shown] == pytest.approx(2 * recall * precision / (recall + precision))
    delays, alarms = [], 0
    for actions, detections in parts:
        told: dict[int, list[float]] = {}
        for detection in detections:
            shared = [count_shared_seconds(annotation, detection)[0] for annotation in actions]
            if not any(shared):
                alarms += 1
            else:
                told.setdefault(shared.index(max(shared)), []).append(detection.told)
        for place, moments in told.items():
            if min(moments) <= actions[place].end:
                delays.append(max(min(moments) - actions[place].start, 0))
    assert scores.num_false_alarms == alarms
    assert scores.false_alarms_per_minute == alarms / len(recordings)
    assert scores.num_hits == len(delays)
    if delays:
        ordered = sorted(delays)
        middle = len(ordered) // 2
        median = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
        assert scores.delay_median_s == pytest.approx(median)
        place = 0.9 * (len(ordered) - 1)
        low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
        assert scores.delay_p90_s == pytest.approx(low + (place - math.floor(place)) * (high - low))
    else:
        assert scores.delay_median_s is scores.delay_p90_s is None


@settings(deadline=None)
@given(st.lists(draw_recording(), min_size=1, max_size=3))
def test_scores(recordings: list[Recording]) -> None:
    scores = score_detections(recordings, NAMES)
    assert scores.minutes == len(recordings)
    assert list(scores.classes) == list(NAMES)
    for name in NAMES:
        check_class(recordings, name, scores.classes[name])
    total = scores.total
    for field in ("num_annotations", "num_detections", "num_hits", "num_false_alarms"):
        assert getattr(total, field) == sum(getattr(item, field) for item in scores.classes.values())
    known = [value for item in scores.classes.values() if (value := item.average_precision["0.5"]) is not None]
    assert total.average_precision["0.5"] == (pytest.approx(sum(known) / len(known)) if known else None)


def test_example() -> None:
    """Two actions: one found late and twice, one not at all; and something that nobody did."""
    annotations = [Annotation("wave", 10, 20), Annotation("sit", 30, 32)]
    detections = [
        Detection("wave", 12, 15, 0.8, 12.5),
        Detection("wave", 15, 21, 0.9, 15.5),
        Detection("sit", 31.5, 33, 0.7, 32.5),  # told when it was over
        Detection("jump", 40, 41, 0.7, 40.5),
    ]
    scores = score_detections([Recording("r", 120, annotations, detections)], NAMES)
    wave, sit, jump = (scores.classes[name] for name in NAMES)
    assert (wave.num_hits, wave.delay_median_s, wave.num_false_alarms) == (1, 2.5, 0)
    assert wave.recall["0.3"] == 1 and wave.precision["0.3"] == 0.5
    assert wave.average_precision["0.3"] == 1  # both fit (3 of 10 seconds, 5 of 11): the more probable one takes it
    assert wave.recall["0.4"] == 1 and wave.average_precision["0.4"] == 1  # only that one fits
    assert wave.recall["0.5"] == 0
    assert (sit.num_hits, sit.hit_rate, sit.delay_median_s) == (0, 0.0, None)
    assert sit.recall["0.1"] == 1  # half a second of 3
    assert jump.false_alarms_per_minute == 0.5 and jump.hit_rate is None and jump.average_precision["0.5"] is None
    assert scores.total.false_alarms_per_minute == 0.5 and scores.total.hit_rate == 0.5
    # Told before the action began: no delay
    early = Detection("wave", 9, 20, 0.9, 9.5)
    assert score_detections([Recording("r", 60, annotations, [early])], NAMES).total.delay_median_s == 0


@given(draw_recording())
def test_detections_equal_to_the_truth_are_perfect(recording: Recording) -> None:
    perfect = [Detection(*item, 0.9, item.start) for item in recording.annotations]
    total = score_detections([recording._replace(detections=perfect)], NAMES).total
    if perfect:
        assert set(total.f1.values()) == set(total.average_precision.values()) == {1.0}
        assert (total.hit_rate, total.delay_p90_s, total.num_false_alarms) == (1.0, 0.0, 0)


@given(draw_recording())
def test_one_detection_belongs_to_one_annotation(recording: Recording) -> None:
    for place, other in enumerate(assign_to_longest(recording.annotations, recording.detections)):
        shared = [count_shared_seconds(item, recording.detections[place])[0] for item in recording.annotations]
        assert other == (shared.index(max(shared)) if any(shared) else None)


def test_wrong_items_are_refused() -> None:
    for wrong in (Annotation("run", 0, 1), Annotation("wave", 2, 1), Annotation("wave", float("nan"), 1)):
        with pytest.raises(ValueError, match="r: Annotation"):
            score_detections([Recording("r", 60, [wrong], [])], NAMES)


def test_no_recordings() -> None:
    total = score_detections([], NAMES).total
    assert total.hit_rate is total.false_alarms_per_minute is total.f1["0.5"] is None
    assert len(list(itertools.chain(total.recall, total.precision))) == 2 * len(IOU_THRESHOLDS)
