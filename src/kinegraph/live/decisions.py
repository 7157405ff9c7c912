"""From probabilities over time to segments: who did what from when to when.

For each person: smoothed probabilities, runs of a class by hysteresis, runs that last long enough, runs of one class
close together as one segment. Everything is a function of (rules, state, one answer); a state holds a row per person,
so that many people cost little more than one. `state` values are never changed in place by `step`.

1. Smoothing. exponential: s = s + (1 - exp(-dt / smoothing_s)) (p - s), from the first p on; average: the mean of the
   answers of the last `smoothing_s` seconds.
2. Hysteresis (Schmitt trigger). The most probable class starts a run, and ends that of another class, where it reaches
   its enter threshold; a run ends too where its own class falls below its leave threshold. Classes that count as no
   action end runs and start none.
3. A run covers [time of its first answer, time of the first answer outside). If it is shorter than `min_duration_s`,
   it never was.
4. Runs of one class with no other run between them, and at most `merge_gap_s` apart, are one segment.

All times are in seconds and about the frames that an answer is about: the caller takes off the delay of the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kinegraph.errors import Problem, SpecError, suggest
from kinegraph.spec_live import LiveSpec

Values = NDArray[np.float64]
Labels = NDArray[np.int64]
NONE = -1
MAX_SMOOTHING_ANSWERS = 512
"""What smoothing=average keeps for each person at most."""
UNKNOWN_RATE_ANSWERS = 128
"""How many answers it keeps where their rate is not known."""


@dataclass(frozen=True, eq=False)
class Rules:
    """`enter`, `leave` (classes,) probabilities; `is_action` (classes,); the rest in seconds.

    `smoothing_answers`: how many answers smoothing=average keeps for each person.
    """

    class_names: tuple[str, ...]
    enter: Values
    leave: Values
    is_action: NDArray[np.bool_]
    smoothing: Literal["exponential", "average", "none"] = "none"
    smoothing_s: float = 0.0
    smoothing_answers: int = 1
    min_duration_s: float = 0.0
    merge_gap_s: float = 0.0


def make_rules(options: LiveSpec, class_names: Sequence[str], answers_per_second: float = 0.0) -> Rules:
    """The rules that a spec describes. `answers_per_second` 0: unknown.

    Raises SpecError with all that does not fit: names of classes that the model lacks, thresholds that are no
    probabilities, a leave threshold above its enter threshold.
    """
    problems = []
    for key in ("class_enter_thresholds", "class_leave_thresholds", "no_action_classes"):
        for name in getattr(options, key):
            if name not in class_names:
                expected = "a class of the model: " + ", ".join(class_names)
                problems.append(Problem(f"live.{key}", repr(name), expected, suggest(name, class_names)))
    for key in ("class_enter_thresholds", "class_leave_thresholds"):
        for name, value in getattr(options, key).items():
            if not 0 <= value <= 1:
                problems.append(Problem(f"live.{key}.{name}", str(value), "a probability, 0 to 1"))
    enter = [options.class_enter_thresholds.get(name, options.enter_threshold) for name in class_names]
    leave = [options.class_leave_thresholds.get(name, options.leave_threshold) for name in class_names]
    for name, high, low in zip(class_names, enter, leave, strict=True):
        if low > high:
            expected = f"at most its enter threshold, {high:g}"
            problems.append(Problem(f"live: leave threshold of {name!r}", f"{low:g}", expected))
    is_smooth = options.smoothing != "none" and options.smoothing_s > 0
    answers = int(np.ceil(options.smoothing_s * answers_per_second)) + 1 if answers_per_second else UNKNOWN_RATE_ANSWERS
    if is_smooth and options.smoothing == "average" and answers > MAX_SMOOTHING_ANSWERS:
        expected = (
            f"at most {(MAX_SMOOTHING_ANSWERS - 1) / answers_per_second:g} at {answers_per_second:g} answers a second"
        )
        hint = "live.smoothing=exponential has no such limit."
        problems.append(Problem("live.smoothing_s", f"{options.smoothing_s:g}", expected, hint))
    if problems:
        raise SpecError(*problems)
    return Rules(
        class_names=tuple(class_names),
        enter=np.array(enter, np.float64),
        leave=np.array(leave, np.float64),
        is_action=np.array([name not in options.no_action_classes for name in class_names]),
        smoothing=options.smoothing if is_smooth else "none",
        smoothing_s=options.smoothing_s,
        smoothing_answers=answers if is_smooth and options.smoothing == "average" else 1,
        min_duration_s=options.min_duration_s,
        merge_gap_s=options.merge_gap_s,
    )


@dataclass(frozen=True, eq=False)
class State:
    """What is known of N people: a row each. Labels are -1 where there is none; times are NaN where there is none.

    The run is what goes on by hysteresis, long enough or not; the segment is what was started and not yet closed.
    `segment_end` is NaN while the run goes on that the segment last took in.
    """

    smoothed: Values  # (N, classes)
    kept: Values  # (N, answers, classes): the answers that smoothing=average looks back at
    kept_time: Values  # (N, answers)
    last_time: Values
    run_label: Labels
    run_start: Values
    run_sum: Values  # of the smoothed probabilities of its class
    run_count: Labels
    segment_label: Labels
    segment_start: Values
    segment_end: Values
    segment_sum: Values
    segment_count: Labels

    def copy(self) -> State:
        return State(*(getattr(self, name).copy() for name in NAMES))

    def take(self, rows: NDArray[np.int64]) -> State:
        """The state of some people, copied."""
        return State(*(getattr(self, name)[rows] for name in NAMES))

    def put(self, rows: NDArray[np.int64], part: State) -> None:
        """Write the rows that `take` gave back into this state, in place."""
        for name in NAMES:
            getattr(self, name)[rows] = getattr(part, name)

    def enlarge(self, part: State) -> State:
        """A state with the people of both."""
        return State(*(np.concatenate([getattr(self, name), getattr(part, name)]) for name in NAMES))


NAMES = tuple(field.name for field in fields(State))


class Segment(NamedTuple):
    """`row`: which person; `end` NaN: it goes on; `probability`: the mean of the smoothed ones of its class so far."""

    row: int
    label: int
    start: float
    end: float
    probability: float

    @property
    def has_ended(self) -> bool:
        return self.end == self.end


def start(rules: Rules, num_people: int) -> State:
    """The state of people of whom nothing is known yet."""
    num_classes, answers = len(rules.class_names), rules.smoothing_answers

    def fill(value: float, *shape: int) -> Values:
        return np.full((num_people, *shape), value)

    def label() -> Labels:
        return np.full(num_people, NONE, np.int64)

    def count() -> Labels:
        return np.zeros(num_people, np.int64)

    return State(
        smoothed=fill(0.0, num_classes),
        kept=fill(0.0, answers, num_classes),
        kept_time=fill(-np.inf, answers),
        last_time=fill(np.nan),
        run_label=label(),
        run_start=fill(np.nan),
        run_sum=fill(0.0),
        run_count=count(),
        segment_label=label(),
        segment_start=fill(np.nan),
        segment_end=fill(np.nan),
        segment_sum=fill(0.0),
        segment_count=count(),
    )


def step(rules: Rules, state: State, times: Values, probabilities: Values) -> tuple[State, list[Segment]]:
    """One answer for each person: times (N,) seconds, later than the ones before, probabilities (N, classes).

    Gives the new state and what is new: segments that start (end NaN), and segments that ended, which are final. A
    segment is told as started once it has lasted `min_duration_s`, and as ended once nothing can go on with it.
    """
    changed = state.copy()
    _smooth(rules, changed, times, probabilities)
    news = _confirm_runs(rules, changed, times)  # before the run ends: it covers the time up to now
    target = _find_target(rules, changed)
    _end_runs(changed, (changed.run_label >= 0) & (target != changed.run_label), times)
    begins = (target >= 0) & (target != changed.run_label)
    changed.run_label[:] = target
    changed.run_start[begins] = times[begins]
    changed.run_sum[begins] = 0
    changed.run_count[begins] = 0
    runs = target >= 0
    changed.run_sum[runs] += changed.smoothed[runs, target[runs]]
    changed.run_count[runs] += 1
    news += _close(changed, _find_over(rules, changed, times))
    news += _confirm_runs(rules, changed, times)  # a minimum of 0 seconds is reached at once
    changed.last_time[:] = times
    return changed, news


def finish(rules: Rules, state: State) -> list[Segment]:
    """The segments that are open when the people go: closed at the time of their last answers.

    A segment that starts and ends with this stands there twice, as it does from `step`.
    """
    changed = state.copy()
    news = _confirm_runs(rules, changed, changed.last_time)
    _end_runs(changed, changed.run_label >= 0, changed.last_time)
    return news + _close(changed, changed.segment_label >= 0)


def find_segments(rules: Rules, times: Values, probabilities: Values) -> list[Segment]:
    """The finished segments of one person: times (T,) rising, probabilities (T, classes)."""
    state, found = start(rules, 1), []
    for time, row in zip(times, probabilities, strict=True):
        state, news = step(rules, state, np.array([time]), row[None])
        found += news
    return [segment for segment in found + finish(rules, state) if segment.has_ended]


def _smooth(rules: Rules, state: State, times: Values, probabilities: Values) -> None:
    if rules.smoothing == "none":
        state.smoothed[:] = probabilities
    elif rules.smoothing == "exponential":
        share = 1 - np.exp(-(times - state.last_time) / rules.smoothing_s)
        share = np.where(np.isnan(share), 1.0, share)[:, None]
        state.smoothed[:] += share * (probabilities - state.smoothed)
    else:
        rows, oldest = np.arange(len(times)), state.kept_time.argmin(axis=1)
        state.kept[rows, oldest] = probabilities
        state.kept_time[rows, oldest] = times
        counts = state.kept_time > (times - rules.smoothing_s)[:, None]
        total = np.einsum("nak,na->nk", state.kept, counts)
        state.smoothed[:] = total / counts.sum(axis=1, keepdims=True)


def _find_target(rules: Rules, state: State) -> Labels:
    """(N,): the label of the run that each person is in from now on, or NONE."""
    rows = np.arange(len(state.run_label))
    best = state.smoothed.argmax(axis=1)
    enters = state.smoothed[rows, best] >= rules.enter[best]
    own = np.maximum(state.run_label, 0)
    stays = (state.run_label >= 0) & (state.smoothed[rows, own] >= rules.leave[own])
    kept = np.where(stays, state.run_label, NONE)
    return np.where(enters, np.where(rules.is_action[best], best, NONE), kept)


def _is_in_segment(state: State) -> NDArray[np.bool_]:
    """Whether the run that goes on is part of the open segment."""
    return (state.segment_label >= 0) & np.isnan(state.segment_end)


def _confirm_runs(rules: Rules, state: State, times: Values) -> list[Segment]:
    """Runs that have lasted long enough go on with the open segment of their class, or close it and start their own."""
    confirmed = (state.run_label >= 0) & ~_is_in_segment(state)
    confirmed &= times - state.run_start >= rules.min_duration_s
    if not confirmed.any():
        return []
    goes_on = confirmed & (state.segment_label == state.run_label)
    state.segment_end[goes_on] = np.nan
    begins = confirmed & ~goes_on
    news = _close(state, begins & (state.segment_label >= 0))
    state.segment_label[begins] = state.run_label[begins]
    state.segment_start[begins] = state.run_start[begins]
    state.segment_end[begins] = np.nan
    state.segment_sum[begins] = 0
    state.segment_count[begins] = 0
    means = state.run_sum / np.maximum(state.run_count, 1)
    return news + _list(state, begins, means)


def _end_runs(state: State, ends: NDArray[np.bool_], times: Values) -> None:
    """What a run in a segment leaves to it: its end and its probabilities."""
    ends = ends & _is_in_segment(state)
    state.segment_end[ends] = times[ends]
    state.segment_sum[ends] += state.run_sum[ends]
    state.segment_count[ends] += state.run_count[ends]


def _find_over(rules: Rules, state: State, times: Values) -> NDArray[np.bool_]:
    """Open segments that nothing can go on with: too long ago, and no run under way that began in time."""
    is_late = times - state.segment_end > rules.merge_gap_s  # never of NaN: the run goes on
    may_go_on = (state.run_label == state.segment_label) & (state.run_start - state.segment_end <= rules.merge_gap_s)
    return (state.segment_label >= 0) & is_late & ~may_go_on


def _close(state: State, chosen: NDArray[np.bool_]) -> list[Segment]:
    news = _list(state, chosen, state.segment_sum / np.maximum(state.segment_count, 1))
    state.segment_label[chosen] = NONE
    state.segment_end[chosen] = np.nan
    return news


def _list(state: State, chosen: NDArray[np.bool_], probabilities: Values) -> list[Segment]:
    rows = np.flatnonzero(chosen)
    columns = (state.segment_label, state.segment_start, state.segment_end, probabilities)
    return [Segment(*values) for values in zip(rows.tolist(), *(c[rows].tolist() for c in columns), strict=True)]
