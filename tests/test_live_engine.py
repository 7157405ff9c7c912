"""Tracks, the clock of the model and what happens to frames that are late, missing or wrong."""

from __future__ import annotations

import itertools
import json
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kinegraph.errors import SpecError
from kinegraph.live.engine import LiveEngine
from kinegraph.live.frames import Observation
from kinegraph.spec_live import LiveSpec
from live_stand_in import StandInModel, StandInPool, make_joints

PLAIN = {"smoothing": "none", "min_duration_s": 0.0, "merge_gap_s": 0.0}


def make_engine(
    fps: float = 10.0, delay: int = 0, tells: bool = False, **options: Any
) -> tuple[LiveEngine, StandInPool]:
    model = StandInModel(fps, delay)
    pool = StandInPool(model)
    return LiveEngine(model, pool, LiveSpec(**(PLAIN | options)), tells), pool


def take_frames(pool: StandInPool) -> list[np.ndarray]:
    """(T, C, V) of every track, the ended ones first."""
    return [np.array(frames) for frames in [*pool.finished, *pool.history.values()] if frames]


def observe(person: str, times: Any, values: Any) -> list[Observation]:
    return [Observation(person, float(time), make_joints(0, x)) for time, x in zip(times, values, strict=True)]


def pick(events: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == kind]


@given(st.floats(-1e3, 2e9), st.sampled_from([10.0, 15.0, 29.97, 30.0, 120.0]), st.sampled_from([3, 6, None]))
@settings(deadline=None, max_examples=50)
def test_a_stream_at_the_rate_of_the_model_passes_unchanged(start: float, fps: float, digits: int | None) -> None:
    """Also with time stamps rounded to milliseconds: no frame is mixed, none comes twice, none is kept back."""
    engine, pool = make_engine(fps)
    times = start + np.arange(100) / fps
    times = times if digits is None else np.round(times, digits)
    values = np.random.default_rng(0).normal(size=100) + 5
    sent = np.array([make_joints(0, x) for x in values], np.float32).transpose(0, 2, 1)
    for place, item in enumerate(observe("a", times, values)):
        engine.feed([item])
        assert len(pool.history["0"]) == place + 1
    received = take_frames(pool)[0]
    if digits is None:
        np.testing.assert_allclose(received, sent, rtol=1e-4)
    else:  # a millisecond beside its tick, a frame is mixed with so much of its neighbour
        share = 1.01 * 10.0**-digits * fps + 2 * np.spacing(abs(start)) * fps
        np.testing.assert_allclose(received, sent, atol=share * np.ptp(values) + 1e-4)


@given(st.integers(0, 10**6), st.sampled_from([10.0, 30.0]))
@settings(deadline=None, max_examples=40)
def test_other_rates_are_interpolated(seed: int, fps: float) -> None:
    """As numpy.interp does for the whole recording, at the ticks up to its end; never with frames of the future."""
    rng = np.random.default_rng(seed)
    times = 3 + np.cumsum(rng.uniform(0.005, 0.3, size=60))
    values = rng.normal(size=60) + 5
    engine, pool = make_engine(fps)
    seen = []
    for item in observe("a", times, values):
        engine.feed([item])
        seen.append(len(pool.history["0"]))
    received = take_frames(pool)[0][:, 0, 1]
    ticks = times[0] + np.arange(len(received)) / fps
    wanted = np.interp(ticks, times, values)
    for place, tick in enumerate(ticks):  # a frame shortly before its tick is taken as it is
        near = np.flatnonzero((times <= tick) & (tick <= times + 0.05 / fps))
        wanted[place] = values[near[-1]] if len(near) else wanted[place]
    np.testing.assert_allclose(received, wanted, rtol=1e-4)
    for time, count in zip(times, seen, strict=True):
        assert times[0] + (count - 1) / fps <= time + 0.0501 / fps  # not before its frames have come
        assert times[0] + count / fps > time  # nor later than that


def test_frames_as_they_come() -> None:
    engine, pool = make_engine(0.0, delay=2, tells=True)
    times = [1.0, 1.1, 1.3, 1.35, 1.6]
    events = engine.feed(observe("a", times, range(1, 6)))
    assert take_frames(pool)[0][:, 0, 1].tolist() == [1, 2, 3, 4, 5]
    assert [event["time"] for event in pick(events, "probabilities")] == [1.0, 1.1, 1.3]


def test_times_are_those_of_what_the_answers_are_about() -> None:
    engine, _ = make_engine(10.0, delay=7)
    labels = [0] * 20 + [1] * 15 + [0] * 20
    frames = [Observation("a", 100 + i / 10, make_joints(label)) for i, label in enumerate(labels)]
    events = engine.feed(frames)
    begin = next(event for event in pick(events, "segment_start") if event["class"] == "wave")
    end = next(event for event in pick(events, "segment_end") if event["class"] == "wave")
    assert (begin["start"], begin["time"]) == pytest.approx((102.0, 102.7))
    assert (end["start"], end["end"], end["time"]) == pytest.approx((102.0, 103.5, 104.2))
    assert end["probability"] == 0.9


def test_gaps() -> None:
    engine, pool = make_engine(10.0, max_gap_s=0.5)
    events = engine.feed(observe("a", [0, 0.1, 0.6, 0.7], [1, 2, 7, 8]))
    assert take_frames(pool)[0][:, 0, 1].tolist() == pytest.approx([1, 2, 3, 4, 5, 6, 7, 8])
    events += engine.feed(observe("a", [1.3, 1.4], [1, 2]))
    assert [(event["event"], event["time"]) for event in events if "track" in event["event"]] == [
        ("track_start", 0.0),
        ("track_end", 0.7),
        ("track_start", 1.3),
    ]
    assert pick(events, "track_end")[0]["reason"] == "gap"
    assert pick(events, "segment_end") == [
        {**pick(events, "segment_end")[0], "class": "rest", "start": 0.0, "end": 0.7, "time": 0.7}
    ]
    assert take_frames(pool)[1][:, 0, 1].tolist() == [1, 2]
    assert [event["start"] for event in pick(events, "segment_start")] == [0.0, 1.3]  # nothing is left of the first


def test_decisions_about_interpolated_frames_are_told_when_they_can_be_known() -> None:
    engine, _ = make_engine(10.0)
    events = engine.feed([Observation("a", 0.0, make_joints(0)), Observation("a", 0.4, make_joints(4 / 3))])
    told = [(event["class"], event["start"], event["time"]) for event in pick(events, "segment_start")]
    assert told == [("rest", 0.0, 0.0), ("wave", 0.2, 0.4)]  # labels 0, 1/3, 2/3, 1, 4/3


def test_late_frames_duplicates_and_clocks_that_start_again() -> None:
    engine, pool = make_engine(10.0, forget_after_s=2.0)
    events = engine.feed(observe("a", [5, 5.1, 5.1, 5.0, 3.2, 5.2], [1, 2, 9, 9, 9, 3]))
    assert take_frames(pool)[0][:, 0, 1].tolist() == pytest.approx([1, 2, 3])
    assert engine.counts["duplicate"] == 1 and engine.counts["late"] == 2
    assert [fault.kind for fault in engine.take_faults()] == ["duplicate", "late"]
    assert engine.take_faults() == []
    events += engine.feed(observe("a", [1.0, 1.1], [4, 5]))
    assert [event["reason"] for event in pick(events, "track_end")] == ["restart"]
    assert take_frames(pool)[1][:, 0, 1].tolist() == pytest.approx([4, 5])


def test_joints_that_were_not_found() -> None:
    """null: held from the frame before, zero in a first frame. Zeros stand for themselves and are not mixed."""
    engine, pool = make_engine(10.0)
    times, values = [0, 0.1, 0.2, 0.3], [None, 3.0, None, 5.0]
    lost = [
        Observation("a", t, [[0, 1, 1], None if x is None else [x, 2, 2]]) for t, x in zip(times, values, strict=True)
    ]
    engine.feed(lost)
    assert take_frames(pool)[0][:, 0, 1].tolist() == [0, 3, 3, 5]
    engine, pool = make_engine(10.0)
    frames = [[0, 1, 1], [5, 5, 5]], [[0, 1, 1], [0, 0, 0]], [[0, 1, 1], [8, 8, 8]]
    engine.feed([Observation("a", i * 0.25, list(joints)) for i, joints in enumerate(frames)])  # at 0, 0.25 and 0.5
    assert take_frames(pool)[0][:, 0, 1].tolist() == [5, 5, 0, 0, 8, 8]
    engine.feed([Observation("a", 0.6, [None, [1, 2, float("nan")]])])
    assert engine.counts["no_joints"] == 1
    assert len(take_frames(pool)[0]) == 6


def test_wrong_joints_stop_nobody() -> None:
    engine, pool = make_engine(10.0)
    wrong = Observation("a", 0.1, [[1, 2, 3]])
    engine.feed([*observe("a", [0], [1]), wrong, *observe("b", [0.1], [1]), *observe("a", [0.2], [3])])
    assert sorted(frames[:, 0, 1].tolist() for frames in take_frames(pool)) == [[1], pytest.approx([1, 2, 3])]
    assert engine.counts["wrong_joints"] == 1
    assert "got 1 joints" not in str(engine.faults[0]) and "1 joints of 3 numbers" in engine.faults[0].got


def test_people_come_and_go() -> None:
    engine, pool = make_engine(10.0, max_people=2, forget_after_s=1.0)
    events = engine.feed([*observe("a", [0], [1]), *observe("b", [0], [1]), *observe("c", [0], [1])])
    assert len(pick(events, "track_start")) == 2 and engine.counts["too_many_people"] == 1
    for i in range(1, 30):
        events += engine.feed(observe("a", [i / 10], [1]))
    ended = pick(events, "track_end")
    assert [(event["person"], event["reason"], event["time"]) for event in ended] == [("b", "idle", 0.0)]
    assert len(pick(engine.feed(observe("c", [3.0], [1])), "track_start")) == 1
    assert len(engine.tracks) == len(pool.history) == 2
    events = engine.end_all("stream_end")
    assert {event["person"] for event in pick(events, "track_end")} == {"a", "c"}
    assert len(engine.tracks) == len(pool.history) == 0


def test_clocks_of_several_senders_need_not_agree() -> None:
    """People are forgotten by how far the stream has come, not by somebody else's time stamps."""
    engine, _ = make_engine(10.0, forget_after_s=1.0)
    for i in range(50):
        engine.feed([*observe("a", [i / 10], [1]), *observe("b", [1.7e9 + i / 10], [1])])
        engine.feed(observe("mad", [(-1) ** i * 1e10], [1]))
    assert engine.counts["tracks"] == 2 + 50
    assert engine.counts["ended_idle"] == 0


def make_crowd(seed: int) -> list[Observation]:
    """Frames of five people at different rates, in order of time; every one of them does this and that."""
    rng = np.random.default_rng(seed)
    found = []
    for person in "abcde":
        times = np.cumsum(rng.uniform(0.02, 0.3, size=40))
        labels = np.repeat(rng.integers(0, 3, 10), 4)
        found += [Observation(person, t, make_joints(label)) for t, label in zip(times.tolist(), labels, strict=True)]
    return sorted(found, key=lambda item: item.time)


@given(st.integers(0, 10**6), st.lists(st.integers(0, 200), max_size=10), st.integers(0, 3))
@settings(deadline=None, max_examples=15)
def test_what_happens_does_not_depend_on_batches(seed: int, cuts: list[int], delay: int) -> None:
    options = {"smoothing": "exponential", "smoothing_s": 0.1, "min_duration_s": 0.2, "forget_after_s": 60.0}
    frames = make_crowd(seed)
    places = [0, *sorted(cuts), len(frames)]
    batches = [frames[first:last] for first, last in itertools.pairwise(places)]

    def run(batches: list[list[Observation]]) -> dict[str, list[Any]]:
        engine, _ = make_engine(10.0, delay, **options)
        events = [event for batch in batches for event in engine.feed(batch)] + engine.end_all("stream_end")
        return {person: [event for event in events if event["person"] == person] for person in "abcde"}

    assert run(batches) == run([[item] for item in frames])


def test_a_network_that_lost_itself_starts_anew() -> None:
    class Forgetful(StandInPool):
        is_lost = False

        def update(self, frames: Any) -> dict[str, np.ndarray]:
            return {} if self.is_lost else super().update(frames)

    model = StandInModel()
    pool = Forgetful(model)
    engine = LiveEngine(model, pool, LiveSpec(**PLAIN))
    engine.feed(observe("a", [0, 0.1], [1, 1]))
    pool.is_lost = True
    engine.feed(observe("a", [0.2, 0.3], [1, 1]))
    assert engine.counts["no_answer"] == 1 and len(pool.finished) == 1
    pool.is_lost = False
    engine.feed(observe("a", [0.4], [1]))
    assert engine.counts["answers"] == 3


def test_refused_options() -> None:
    with pytest.raises(SpecError, match=r"live\.forget_after_s"):
        make_engine(max_gap_s=3.0, forget_after_s=1.0)


def test_memory_stays_flat() -> None:
    """A long stream of people who come and go, with faults: nothing grows."""
    model = StandInModel(30.0, 3)
    engine = LiveEngine(model, StandInPool(model, remembers=False), LiveSpec(smoothing="average", max_people=40))
    rng = np.random.default_rng(1)
    joints = [make_joints(label) for label in range(3)]
    people = [f"person {i}" for i in range(20)]
    newest, num_events = 20, 0

    def run(num_frames: int, first: int) -> None:
        nonlocal newest, num_events
        for i in range(first, first + num_frames):
            if i % 10 == 0:
                people[int(rng.integers(20))] = f"person {newest}"
                newest += 1
            frames = [Observation(person, i / 30, joints[int(rng.integers(3))]) for person in people]
            if i % 7 == 0:
                frames += [Observation(f"wrong {i}", i / 30, []), frames[0], Observation("x", i / 30, [None, None])]
            num_events += len(engine.feed(frames))
            if i % 50 == 0:
                engine.take_faults()

    run(1000, 0)
    before = len(pickle.dumps(engine))  # all that it holds
    run(4200, 1000)
    after = len(pickle.dumps(engine))
    assert engine.counts["frames"] > 100_000 and engine.counts["tracks"] > 400 and num_events > 1000
    assert engine.tracks.capacity <= 40 and len(engine.state.last_time) <= 40 and len(engine.tracks) <= 40
    assert len(engine.pool.history) <= 40  # type: ignore[attr-defined]
    assert 10_000 < after < 1.05 * before


def test_events_are_plain_json() -> None:
    engine, _ = make_engine(10.0, tells=True)
    events = engine.feed(make_crowd(3)) + engine.end_all("stream_end")
    assert json.loads(json.dumps(events, allow_nan=False)) == events
    assert {event["event"] for event in events} == {
        *("track_start", "track_end", "segment_start", "segment_end", "probabilities")
    }
