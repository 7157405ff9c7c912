"""Decisions against a plain restatement that sees the whole array at once."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kinegraph.errors import SpecError
from kinegraph.live import decisions
from kinegraph.live.decisions import Rules, Segment, find_segments, finish, make_rules, start, step
from kinegraph.spec_live import LiveSpec

NAMES = ("rest", "wave", "sit", "jump")
SMOOTHING = ("none", "exponential", "average")
PlainSegment = tuple[int, float, float, float]


def smooth_plainly(rules: Rules, times: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    if rules.smoothing == "none":
        return probabilities
    rows: list[np.ndarray] = []
    for i, time in enumerate(times):
        if rules.smoothing == "average":
            rows.append(probabilities[: i + 1][times[: i + 1] > time - rules.smoothing_s].mean(axis=0))
        elif i == 0:
            rows.append(probabilities[0])
        else:
            keeps = math.exp(-(time - times[i - 1]) / rules.smoothing_s)
            rows.append(keeps * rows[-1] + (1 - keeps) * probabilities[i])
    return np.array(rows)


def find_plainly(rules: Rules, times: np.ndarray, probabilities: np.ndarray) -> list[PlainSegment]:
    """(label, start, end, mean probability) of each segment: hysteresis, then too short ones out, then merging."""
    smoothed = smooth_plainly(rules, times, probabilities)
    labels: list[int] = []
    for row in smoothed:
        before = labels[-1] if labels else -1
        best = int(np.argmax(row))
        if row[best] >= rules.enter[best]:
            labels.append(best if rules.is_action[best] else -1)
        else:
            labels.append(before if before >= 0 and row[before] >= rules.leave[before] else -1)
    runs: list[tuple[int, int, int]] = []  # label, first, one past the last
    for i, label in enumerate(labels):
        if runs and runs[-1][0] == label:
            runs[-1] = (label, runs[-1][1], i + 1)
        else:
            runs.append((label, i, i + 1))
    found: list[tuple[int, float, float, list[float]]] = []
    for label, first, past in runs:
        end = times[min(past, len(times) - 1)]
        if label < 0 or end - times[first] < rules.min_duration_s:
            continue
        values = smoothed[first:past, label].tolist()
        if found and found[-1][0] == label and times[first] - found[-1][2] <= rules.merge_gap_s:
            found[-1] = (label, found[-1][1], end, found[-1][3] + values)
        else:
            found.append((label, times[first], end, values))
    return [(label, begin, end, float(np.mean(values))) for label, begin, end, values in found]


@st.composite
def draw_rules(draw: Any) -> Rules:
    enter = np.array(draw(st.lists(st.sampled_from([0.3, 0.5, 0.6, 0.9]), min_size=4, max_size=4)))
    share = np.array(draw(st.lists(st.sampled_from([0.0, 0.5, 0.8, 1.0]), min_size=4, max_size=4)))
    return Rules(
        class_names=NAMES,
        enter=enter,
        leave=enter * share,
        is_action=np.array(draw(st.lists(st.booleans(), min_size=4, max_size=4))),
        smoothing=draw(st.sampled_from(SMOOTHING)),
        smoothing_s=draw(st.sampled_from([0.1, 0.5, 2.0])),
        smoothing_answers=200,
        min_duration_s=draw(st.sampled_from([0.0, 0.1, 0.3, 1.0])),
        merge_gap_s=draw(st.sampled_from([0.0, 0.2, 0.7])),
    )


def draw_stream(seed: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Times with uneven steps; probabilities that stay with one class for a while and flicker."""
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.choice([0.03, 0.1, 0.25], size=length)) + rng.uniform(-5, 5)
    favourite = np.repeat(rng.integers(0, 4, length), rng.integers(1, 8, length))[:length]
    weights = np.where(np.arange(4) == favourite[:, None], rng.choice([1.0, 6.0, 30.0], (length, 1)), 1.0)
    return times, np.array([rng.dirichlet(row) for row in weights])


def run_online(rules: Rules, streams: list[tuple[np.ndarray, np.ndarray]]) -> list[list[tuple[float, Segment]]]:
    """Everything that `step` and `finish` told and when, for each of several people of equally long streams."""
    state, told = start(rules, len(streams)), [[] for _ in streams]
    for i in range(len(streams[0][0])):
        times = np.array([times[i] for times, _ in streams])
        state, news = step(rules, state, times, np.array([values[i] for _, values in streams]))
        for segment in news:
            told[segment.row].append((float(times[segment.row]), segment))
    for segment in finish(rules, state):
        told[segment.row].append((np.inf, segment))
    return told


@settings(deadline=None, max_examples=120)
@given(draw_rules(), st.integers(0, 10**6), st.integers(1, 60))
def test_same_as_plain_restatement(rules: Rules, seed: int, length: int) -> None:
    times, probabilities = draw_stream(seed, length)
    found = find_segments(rules, times, probabilities)
    expected = find_plainly(rules, times, probabilities)
    assert [item[1:4] for item in found] == [item[:3] for item in expected]
    assert [item.probability for item in found] == pytest.approx([item[3] for item in expected])


def test_streams_of_the_tests_hold_segments() -> None:
    rules = make_rules(LiveSpec(), NAMES)
    counts = [len(find_plainly(rules, *draw_stream(seed, 60))) for seed in range(50)]
    assert sum(counts) > 50


@settings(deadline=None, max_examples=80)
@given(draw_rules(), st.integers(0, 10**6), st.integers(1, 60))
def test_what_is_told(rules: Rules, seed: int, length: int) -> None:
    times, probabilities = draw_stream(seed, length)
    news = run_online(rules, [(times, probabilities)])[0]
    told = [segment for _, segment in news]
    ended = [segment for segment in told if segment.has_ended]
    assert [segment.has_ended for segment in told] == [False, True] * len(ended)  # one after the other
    for first, last in zip(told[::2], told[1::2], strict=True):
        assert (first.label, first.start) == (last.label, last.start)
        assert rules.is_action[first.label]
        assert last.end - last.start >= rules.min_duration_s
        assert 0 <= last.probability <= 1
        assert last.start in times and last.end in times
    for moment, segment in news:
        if not segment.has_ended:  # told as soon as it has lasted long enough
            lasts = (times >= segment.start) & (times - segment.start >= rules.min_duration_s)
            assert moment == times[lasts][0]
        elif (late := times > segment.end + rules.merge_gap_s + rules.min_duration_s + 1e-6).any():
            assert segment.end <= moment <= times[late][0]
    for before, after in itertools.pairwise(ended):
        assert before.end <= after.start
        assert before.label != after.label or after.start - before.end > rules.merge_gap_s


@settings(deadline=None, max_examples=20)
@given(draw_rules(), st.lists(st.integers(0, 10**6), min_size=2, max_size=5), st.integers(1, 40))
def test_people_do_not_touch_each_other(rules: Rules, seeds: list[int], length: int) -> None:
    streams = [draw_stream(seed, length) for seed in seeds]
    together = run_online(rules, streams)
    for row, stream in enumerate(streams):
        alone = [(moment, segment._replace(row=row)) for moment, segment in run_online(rules, [stream])[0]]
        assert repr(together[row]) == repr(alone)


@settings(deadline=None, max_examples=15)
@given(draw_rules(), st.integers(0, 10**6), st.integers(0, 40))
def test_state_is_a_value(rules: Rules, seed: int, place: int) -> None:
    """Steps from a state leave it as it was; a state that was put away and taken again goes on the same."""
    times, probabilities = draw_stream(seed, 41)
    states = [start(rules, 1)]
    for time, row in zip(times, probabilities, strict=True):
        before = states[-1].copy()
        states.append(step(rules, states[-1], np.array([time]), row[None])[0])
        finish(rules, states[-2])
        for name in decisions.NAMES:
            np.testing.assert_array_equal(getattr(states[-2], name), getattr(before, name))
    table = start(rules, 3).enlarge(start(rules, 2))
    rows = np.array([3])
    table.put(rows, states[place])
    state, news = step(rules, table.take(rows), times[place : place + 1], probabilities[place : place + 1])
    again, expected = step(rules, states[place], times[place : place + 1], probabilities[place : place + 1])
    assert repr(news) == repr(expected)
    for name in decisions.NAMES:
        np.testing.assert_array_equal(getattr(state, name), getattr(again, name))
        np.testing.assert_array_equal(getattr(again, name), getattr(states[place + 1], name))
        np.testing.assert_array_equal(getattr(table, name)[:3], getattr(start(rules, 3), name))


def make_steps(*parts: tuple[float, str, float]) -> tuple[np.ndarray, np.ndarray]:
    """(seconds, class name, its probability) ... at 10 answers a second; the rest is shared by the other classes."""
    labels = np.concatenate([np.full(round(10 * seconds), NAMES.index(name)) for seconds, name, _ in parts])
    values = np.concatenate([np.full(round(10 * seconds), value) for seconds, _, value in parts])
    others = ((1 - values) / 3)[:, None]
    return np.arange(len(labels)) / 10, np.where(np.arange(4) == labels[:, None], values[:, None], others)


def name_segments(rules: Rules, *parts: tuple[float, str, float]) -> list[tuple[str, float, float]]:
    return [
        (NAMES[segment.label], round(segment.start, 3), round(segment.end, 3))
        for segment in find_segments(rules, *make_steps(*parts))
    ]


def test_examples() -> None:
    options = LiveSpec(smoothing="none", no_action_classes=["rest"], min_duration_s=0.3, merge_gap_s=0.2)
    rules = make_rules(options, NAMES)
    # Hysteresis: 0.5 keeps what 0.8 began, and begins nothing
    assert name_segments(rules, (1, "wave", 0.5), (1, "wave", 0.8), (1, "wave", 0.5), (1, "rest", 0.9)) == [
        ("wave", 1.0, 3.0)
    ]
    # Too short
    assert name_segments(rules, (1, "rest", 0.9), (0.2, "wave", 0.9), (1, "rest", 0.9)) == []
    assert name_segments(rules, (1, "rest", 0.9), (0.3, "wave", 0.9), (1, "rest", 0.9)) == [("wave", 1.0, 1.3)]
    # A short interruption, by no action or by a flicker of another class
    for between in ("rest", "sit"):
        for length, expected in ((0.2, [("wave", 0.0, 2.1)]), (0.3, [("wave", 0.0, 1.0), ("wave", 1.3, 2.2)])):
            segments = name_segments(rules, (1, "wave", 0.9), (length, between, 0.9), (1, "wave", 0.9))
            expected = sorted([*expected, ("sit", 1.0, 1.3)]) if between == "sit" and length == 0.3 else expected
            assert sorted(segments) == sorted(expected)
    # One class takes over from another
    assert name_segments(rules, (1, "wave", 0.9), (1.1, "sit", 0.9)) == [("wave", 0.0, 1.0), ("sit", 1.0, 2.0)]
    # A higher threshold for one class
    rules = make_rules(replace_options(options, class_enter_thresholds={"wave": 0.95}), NAMES)
    assert name_segments(rules, (1, "wave", 0.9), (1.1, "sit", 0.9)) == [("sit", 1.0, 2.0)]


def replace_options(options: LiveSpec, **changes: Any) -> LiveSpec:
    return replace(options, **changes)


def test_refused_options() -> None:
    options = LiveSpec(
        class_enter_thresholds={"waves": 0.5, "sit": 0.3},
        class_leave_thresholds={"jump": 1.5},
        no_action_classes=["nothing"],
        smoothing="average",
        smoothing_s=30,
    )
    with pytest.raises(SpecError) as caught:
        make_rules(options, NAMES, 30.0)
    text = str(caught.value)
    for part in ("'waves'", "Did you mean 'wave'?", "'sit'", "1.5", "'nothing'", "live.smoothing_s: got 30"):
        assert part in text
    assert len(caught.value.problems) == 6  # 1.5 is also above the enter threshold of its class
    assert make_rules(LiveSpec(smoothing="average", smoothing_s=0.5), NAMES, 30.0).smoothing_answers == 16
