"""How well detected segments match annotated ones: found or not, how exactly, how soon, and how many false alarms.

Two questions, both answered one to one, within a recording and a class:

- Segments at a temporal IoU: the detections, most probable first, each take the free annotation with which their IoU is
  highest, if it reaches the threshold. This is how the benchmarks of temporal action detection match (THUMOS: Idrees et
  al., 2017; ActivityNet: Caba Heilbron et al., CVPR 2015), and what average precision is defined with, so precision,
  recall and F1 (F1@IoU of Lea et al., CVPR 2017) use the same. An optimal assignment could find a pair more at a low
  threshold, with knowledge that a detector does not have; above 0.5 no segment can match two, and all ways agree.
- Points: a detection belongs to the annotation of its class that it overlaps longest. An annotation is a hit if one of
  its detections was told while the action went on. A detection that overlaps none is a false alarm.

Times are seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

IOU_THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)


class Annotation(NamedTuple):
    """What was done, from when to when."""

    class_name: str
    start: float
    end: float


class Detection(NamedTuple):
    """What was detected; `told`: when the start of the segment was told, which is later than `start`."""

    class_name: str
    start: float
    end: float
    probability: float
    told: float


class Recording(NamedTuple):
    """One person in one recording of `duration_s` seconds."""

    name: str
    duration_s: float
    annotations: Sequence[Annotation]
    detections: Sequence[Detection]


@dataclass(frozen=True)
class SegmentScores:
    """Of one class, or of all. Shares from 0 to 1; None where there is nothing to divide by.

    `recall`, `precision`, `f1` are by IoU threshold, as text such as "0.5". Delays, in seconds, are those of the hits:
    from the start of the action to when it was told; of an alarm that was told before, 0.
    """

    num_annotations: int
    num_detections: int
    recall: dict[str, float | None]
    precision: dict[str, float | None]
    f1: dict[str, float | None]
    average_precision: dict[str, float | None]
    num_hits: int
    hit_rate: float | None
    num_false_alarms: int
    false_alarms_per_minute: float | None
    delay_median_s: float | None
    delay_p90_s: float | None


@dataclass(frozen=True)
class DetectionScores:
    """`total.average_precision` is the mean over the classes that occur (mAP)."""

    minutes: float
    total: SegmentScores
    classes: dict[str, SegmentScores]

    def as_data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


@dataclass
class _Tally:
    """What was counted of one class: the sums of several are those of all of them."""

    num_annotations: int
    num_detections: int
    num_matches: dict[float, int]
    average_precision: dict[float, float | None]
    delays: list[float]
    num_false_alarms: int


def score_detections(
    recordings: Sequence[Recording], class_names: Sequence[str], thresholds: Sequence[float] = IOU_THRESHOLDS
) -> DetectionScores:
    """Score the detections of several recordings. Classes outside class_names raise ValueError."""
    seconds = sum(recording.duration_s for recording in recordings)
    for recording in recordings:
        items: list[Annotation | Detection] = [*recording.annotations, *recording.detections]
        wrong = [item for item in items if item.class_name not in class_names or not item.start <= item.end]
        if wrong:
            raise ValueError(f"{recording.name}: {wrong[0]}")
    tallies = {name: _count(_pick(recordings, name), thresholds) for name in class_names}
    every = list(tallies.values())
    means: dict[float, float | None] = {}
    for threshold in thresholds:
        known = [value for tally in every if (value := tally.average_precision[threshold]) is not None]
        means[threshold] = float(np.mean(known)) if known else None
    total = _Tally(
        sum(tally.num_annotations for tally in every),
        sum(tally.num_detections for tally in every),
        {threshold: sum(tally.num_matches[threshold] for tally in every) for threshold in thresholds},
        means,
        [delay for tally in every for delay in tally.delays],
        sum(tally.num_false_alarms for tally in every),
    )
    minutes = seconds / 60
    classes = {name: _summarise(tally, minutes) for name, tally in tallies.items()}
    return DetectionScores(minutes, _summarise(total, minutes), classes)


def measure_iou(first: Annotation | Detection, second: Annotation | Detection) -> float:
    """Temporal intersection over union; 0 for two moments."""
    shared = _measure_overlap(first, second)
    union = (first.end - first.start) + (second.end - second.start) - shared
    return shared / union if union > 0 else 0.0


def match_segments(
    annotations: Sequence[Annotation], detections: Sequence[Detection], threshold: float
) -> list[int | None]:
    """For each detection of one class and recording, the place of the annotation that it takes, or None.

    The most probable detection chooses first; of equally probable ones the earlier one, of annotations with the same
    IoU the earlier one.
    """
    matches: list[int | None] = [None] * len(detections)
    free = sorted(range(len(annotations)), key=lambda place: annotations[place].start)
    for place in sorted(
        range(len(detections)), key=lambda place: (-detections[place].probability, detections[place].start)
    ):
        ious = [measure_iou(annotations[other], detections[place]) for other in free]
        best = max(range(len(free)), key=lambda index: ious[index], default=None)
        if best is not None and ious[best] >= threshold and ious[best] > 0:
            matches[place] = free.pop(best)
    return matches


def measure_average_precision(probabilities: Sequence[float], is_match: Sequence[bool], num_annotations: int) -> float:
    """The area under the interpolated precision over recall: precision at a recall is the best at this or a higher one.

    probabilities, is_match: of every detection of a class, over all recordings. num_annotations: at least 1.
    (Everingham et al., PASCAL VOC 2010 and later.)
    """
    order = np.argsort(-np.asarray(probabilities, np.float64), kind="stable")
    hits = np.cumsum(np.asarray(is_match, bool)[order])
    precision = hits / np.arange(1, len(hits) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    gains = np.diff(hits, prepend=0)  # each match adds 1 / num_annotations of recall
    return float((best * gains).sum() / num_annotations)


def assign_to_longest(annotations: Sequence[Annotation], detections: Sequence[Detection]) -> list[int | None]:
    """For each detection the place of the annotation that it overlaps longest (the first of equals), or None."""
    assigned: list[int | None] = []
    for detection in detections:
        shared = [_measure_overlap(annotation, detection) for annotation in annotations]
        best = max(range(len(shared)), key=lambda index: shared[index], default=None)
        assigned.append(best if best is not None and shared[best] > 0 else None)
    return assigned


def _measure_overlap(first: Annotation | Detection, second: Annotation | Detection) -> float:
    return max(min(first.end, second.end) - max(first.start, second.start), 0.0)


def _pick(recordings: Sequence[Recording], class_name: str) -> list[tuple[list[Annotation], list[Detection]]]:
    return [
        (
            [item for item in recording.annotations if item.class_name == class_name],
            [item for item in recording.detections if item.class_name == class_name],
        )
        for recording in recordings
    ]


def _count(parts: Sequence[tuple[list[Annotation], list[Detection]]], thresholds: Sequence[float]) -> _Tally:
    """What there is to count of one class."""
    num_annotations = sum(len(annotations) for annotations, _ in parts)
    probabilities = [item.probability for _, detections in parts for item in detections]
    num_matches, average_precision = {}, {}
    for threshold in thresholds:
        is_match = [match is not None for part in parts for match in match_segments(*part, threshold)]
        num_matches[threshold] = sum(is_match)
        average_precision[threshold] = (
            measure_average_precision(probabilities, is_match, num_annotations) if num_annotations else None
        )
    delays: list[float] = []
    num_false_alarms = 0
    for actions, detections in parts:
        assigned = assign_to_longest(actions, detections)
        num_false_alarms += sum(place is None for place in assigned)
        for place, action in enumerate(actions):
            told = [item.told for item, other in zip(detections, assigned, strict=True) if other == place]
            if told and min(told) <= action.end:
                delays.append(max(min(told) - action.start, 0.0))
    return _Tally(num_annotations, len(probabilities), num_matches, average_precision, delays, num_false_alarms)


def _summarise(tally: _Tally, minutes: float) -> SegmentScores:
    matches = {f"{threshold:g}": count for threshold, count in tally.num_matches.items()}
    both = tally.num_annotations + tally.num_detections

    def divide(part: float, whole: float) -> float | None:
        return part / whole if whole else None

    def by_threshold(measure: Callable[[int], float | None]) -> dict[str, float | None]:
        return {threshold: measure(count) for threshold, count in matches.items()}

    return SegmentScores(
        num_annotations=tally.num_annotations,
        num_detections=tally.num_detections,
        recall=by_threshold(lambda count: divide(count, tally.num_annotations)),
        precision=by_threshold(lambda count: divide(count, tally.num_detections)),
        f1=by_threshold(lambda count: divide(2 * count, both)),
        average_precision={f"{threshold:g}": value for threshold, value in tally.average_precision.items()},
        num_hits=len(tally.delays),
        hit_rate=divide(len(tally.delays), tally.num_annotations),
        num_false_alarms=tally.num_false_alarms,
        false_alarms_per_minute=divide(tally.num_false_alarms, minutes),
        delay_median_s=float(np.median(tally.delays)) if tally.delays else None,
        delay_p90_s=float(np.quantile(tally.delays, 0.9)) if tally.delays else None,
    )
