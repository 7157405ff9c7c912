"""Frames of people in, events out: tracks, the clock of the model, the network, and decisions.

What one frame of a person costs besides the network is spread over all people of a moment: everything here works on
arrays with a row per person. Memory is bounded by `live.max_people`, however long the stream.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kinegraph.errors import Problem, SpecError
from kinegraph.live import decisions
from kinegraph.live.decisions import Segment, make_rules
from kinegraph.live.frames import Fault, Observation, read_joints, split_by_person
from kinegraph.live.tracks import Joints, Rows, TrackTable, Values
from kinegraph.spec_live import LiveSpec

Event = dict[str, Any]
TIME_DIGITS = 6
PROBABILITY_DIGITS = 4


class Model(Protocol):
    """What is used of `kinegraph.online.OnlineModel`."""

    class_names: list[str]

    @property
    def num_channels(self) -> int: ...

    @property
    def num_joints(self) -> int: ...

    @property
    def frames_per_second(self) -> float: ...

    @property
    def delay_frames(self) -> int: ...


class Pool(Protocol):
    """What is used of `kinegraph.online.TrackPool`."""

    def update(self, frames: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float64]]: ...

    def forget(self, person: str) -> None: ...


class LiveEngine:
    """Turns observations into events. `pool` holds the network's states; it belongs to this engine alone.

    Raises SpecError for options that do not fit the model or each other.
    """

    def __init__(self, model: Model, pool: Pool, options: LiveSpec, tells_probabilities: bool = False) -> None:
        if options.forget_after_s < options.max_gap_s:
            expected = f"at least live.max_gap_s, {options.max_gap_s:g}"
            raise SpecError(Problem("live.forget_after_s", f"{options.forget_after_s:g}", expected))
        self.model = model
        self.pool = pool
        self.options = options
        self.tells_probabilities = tells_probabilities
        self.frames_per_second = options.frames_per_second or model.frames_per_second
        period_s = 1 / self.frames_per_second if self.frames_per_second else 0.0
        self.rules = make_rules(options, model.class_names, self.frames_per_second)
        self.tracks = TrackTable(model.num_joints, model.num_channels, period_s, model.delay_frames, options.max_people)
        self.state = decisions.start(self.rules, 0)
        self.counts: Counter[str] = Counter()
        self.faults: list[Fault] = []
        """What was left out since `take_faults` was called last."""

    def feed(self, observations: Sequence[Observation]) -> list[Event]:
        """The next people and moments of the stream, in the order in which they came -> what happened."""
        events: list[Event] = []
        for group in split_by_person(observations, self.options.max_people):
            self._feed_group(group, events)
            for row in self.tracks.find_idle(self.options.forget_after_s):
                self._end_track(row, "idle", events)
        return events

    def end_all(self, reason: str) -> list[Event]:
        """Close every track and its open segments."""
        events: list[Event] = []
        for row in list(self.tracks.rows.values()):
            self._end_track(row, reason, events)
        return events

    def take_faults(self) -> list[Fault]:
        """What was left out since the last call."""
        faults, self.faults = self.faults, []
        return faults

    def _feed_group(self, group: list[Observation], events: list[Event]) -> None:
        """At most one frame of each person."""
        joints, chosen, faults = read_joints(group, self.model.num_joints, self.model.num_channels)
        for fault in faults:
            self._note(fault)
        self.counts["frames"] += len(group)
        is_lost = np.isnan(joints[:, :, 0])  # (n, V)
        rows, times = self._find_rows([group[place] for place in chosen], joints, np.all(is_lost, axis=1), events)
        goes_on = rows >= 0
        if not goes_on.all():
            rows, times, joints, is_lost = rows[goes_on], times[goes_on], joints[goes_on], is_lost[goes_on]
        if not len(rows):
            return
        if is_lost.any():  # held from the frame before; of a new track they are zero there
            joints = np.where(is_lost[..., None], self.tracks.joints[rows], joints)
        num_ticks = self.tracks.count_ticks(rows, times)
        for done in range(int(num_ticks.max(initial=0))):
            due = num_ticks > done
            if due.all():
                self._tick(rows, times, joints, events)
            else:
                self._tick(rows[due], times[due], joints[due], events)
        self.tracks.move_on(rows, times, joints)

    def _find_rows(
        self, group: list[Observation], joints: Joints, is_empty: NDArray[np.bool_], events: list[Event]
    ) -> tuple[Rows, Values]:
        """The row of each observation, -1 for those that are left out; tracks end and start here."""
        table, options = self.tracks, self.options
        known = table.rows
        rows = np.array([known.get(item.person, -1) for item in group], np.int64)
        times = np.array([item.time for item in group], np.float64)
        steps = np.where(rows >= 0, times - table.time[rows] if table.capacity else 0.0, np.inf)
        for place in np.flatnonzero((steps <= 0) | (steps > options.max_gap_s) | is_empty).tolist():
            item, row, span = group[place], int(rows[place]), float(steps[place])
            rows[place] = -1
            if is_empty[place]:
                self._note(_describe(item, "no_joints", "no joint that was found", "at least one"))
            elif row >= 0 and -options.forget_after_s <= span <= 0:
                kind = "duplicate" if span == 0 else "late"
                expected = f"a time after {table.time[row]:.{TIME_DIGITS}f}"
                self._note(
                    _describe(item, kind, "its time again" if kind == "duplicate" else "an earlier time", expected)
                )
            else:
                if row >= 0:
                    self._end_track(row, "gap" if span > 0 else "restart", events)
                rows[place] = self._start_track(item, joints[place], events)
        return rows, times

    def _start_track(self, item: Observation, joints: Joints, events: list[Event]) -> int:
        row = self.tracks.open(item.person, item.time, joints)
        if row is None:
            expected = f"at most {self.options.max_people} people (live.max_people)"
            self._note(_describe(item, "too_many_people", "one more person", expected))
            return -1
        missing = self.tracks.capacity - len(self.state.last_time)
        if missing:
            self.state = self.state.enlarge(decisions.start(self.rules, missing))
        self.counts["tracks"] += 1
        events.append({"event": "track_start", "person": item.person, "time": round(item.time, TIME_DIGITS)})
        return row

    def _end_track(self, row: int, reason: str, events: list[Event]) -> None:
        person, time = self.tracks.people[row], float(self.tracks.time[row])
        place = np.array([row])
        self._tell(decisions.finish(self.rules, self.state.take(place)), place, np.array([time]), events)
        self.state.put(place, decisions.start(self.rules, 1))
        self.tracks.close(row)
        self.pool.forget(str(row))
        self.counts[f"ended_{reason}"] += 1
        events.append({"event": "track_end", "person": person, "time": round(time, TIME_DIGITS), "reason": reason})

    def _tick(self, rows: Rows, times: Values, joints: Joints, events: list[Event]) -> None:
        """One frame for the network for each of the rows, and what follows from its answers."""
        frames, ticks = self.tracks.interpolate(rows, times, joints)
        keys = list(map(str, rows.tolist()))
        answers = self.pool.update(dict(zip(keys, frames.transpose(0, 2, 1), strict=True)))
        self.counts["ticks"] += len(keys)
        if len(answers) < len(keys):
            has_answer = np.array([key in answers for key in keys])
            self._restart_silent(rows[~has_answer], events)
            keys = [key for key in keys if key in answers]
            rows, ticks, times = rows[has_answer], ticks[has_answer], times[has_answer]
        if not keys:
            return
        probabilities = np.array([answers[key] for key in keys])
        self.counts["answers"] += len(keys)
        self.tracks.has_answered[rows] = True
        about = self.tracks.find_answer_times(rows, ticks)
        if self.tells_probabilities:
            self._tell_probabilities(rows, about, probabilities, events)
        part, news = decisions.step(self.rules, self.state.take(rows), about, probabilities)
        self.state.put(rows, part)
        if news:
            self._tell(news, rows, times, events)

    def _restart_silent(self, rows: Rows, events: list[Event]) -> None:
        """A network that answered and does not any more has lost itself (overflow): its person starts anew."""
        for row in rows[self.tracks.has_answered[rows]].tolist():
            self.pool.forget(str(row))
            self.tracks.has_answered[row] = False
            person = self.tracks.people[row]
            self._note(Fault("no_answer", f"person {person!r}", "no finite probabilities", "an answer of the model"))

    def _tell(self, news: list[Segment], rows: Rows, times: Values, events: list[Event]) -> None:
        for segment in news:
            event: Event = {
                "event": "segment_end" if segment.has_ended else "segment_start",
                "person": self.tracks.people[int(rows[segment.row])],
                "class": self.rules.class_names[segment.label],
                "start": round(segment.start, TIME_DIGITS),
                "time": round(float(times[segment.row]), TIME_DIGITS),
                "probability": round(segment.probability, PROBABILITY_DIGITS),
            }
            if segment.has_ended:
                event["end"] = round(segment.end, TIME_DIGITS)
                self.counts["segments"] += 1
            events.append(event)

    def _tell_probabilities(self, rows: Rows, about: Values, probabilities: Values, events: list[Event]) -> None:
        people = self.tracks.people
        digits = np.round(probabilities, PROBABILITY_DIGITS).tolist()
        for row, time, values in zip(rows.tolist(), about.tolist(), digits, strict=True):
            event = {"event": "probabilities", "person": people[row], "time": round(time, TIME_DIGITS)}
            events.append(event | {"probabilities": values})

    def _note(self, fault: Fault) -> None:
        """Count it, and keep the first of each kind to be told: a flood of faults must not fill the memory."""
        self.counts[fault.kind] += 1
        if all(fault.kind != other.kind for other in self.faults):
            self.faults.append(fault)


def _describe(item: Observation, kind: str, got: str, expected: str) -> Fault:
    return Fault(kind, f"person {item.person!r}, time {item.time:.{TIME_DIGITS}f}", got, expected)
