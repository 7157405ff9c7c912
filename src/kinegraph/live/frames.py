"""Skeleton frames as JSON lines, from strangers: parsed and checked with limits, whatever is in them.

{"person": "7", "time": 12.4, "joints": [[x, y, z], ...]}
{"time": 12.4, "people": [{"person": "7", "joints": [...]}, ...]}
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import chain
from types import NoneType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_LINE_BYTES = 4 * 1024 * 1024
MAX_PEOPLE_PER_LINE = 10_000
MAX_ID_CHARACTERS = 200
MAX_TIME_S = 1e11
"""Beyond any clock in seconds; below it, float64 still tells microseconds apart (nearly: 15 of them)."""
MAX_COORDINATE = 1e6
"""Pixels, metres and millimetres stay below it. What is above counts as not found: a network would answer NaN."""
SHOWN_CHARACTERS = 60
NUMBERS = {float, int, NoneType, *(np.dtype(code).type for code in "efdbhilqBHILQ")}
"""Types of a coordinate: of JSON, where null was not found, and of NumPy, from Python. No text, nor true and false."""


class Observation(NamedTuple):
    """One person at one moment. `joints`: V lists of numbers; not checked yet (see `read_joints`)."""

    person: str
    time: float
    joints: Any


class Fault(NamedTuple):
    """Something that was left out: `kind` is counted, the rest is told now and then."""

    kind: str
    where: str
    got: str
    expected: str


class LineBuffer:
    """Cuts a stream of bytes into lines. Holds at most MAX_LINE_BYTES: the rest of a longer line is skipped unread."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.size_bytes = 0
        self.skips = False
        self.num_skipped = 0
        """Lines that were too long so far."""

    def add(self, data: bytes) -> list[bytes]:
        """The lines that end in `data`, without their newlines; an empty one in the place of one that was skipped."""
        first, newline, rest = data.partition(b"\n")
        if not newline:
            self._keep(first)
            return []
        self._keep(first)
        lines = [b"".join(self.parts), *rest.split(b"\n")]
        self.parts, self.size_bytes, self.skips = [], 0, False
        self._keep(lines.pop())
        return lines

    def close(self) -> list[bytes]:
        """The last line, if it did not end in a newline."""
        return self.add(b"\n") if self.parts else []

    def _keep(self, part: bytes) -> None:
        if self.skips or not part:
            return
        if self.size_bytes + len(part) > MAX_LINE_BYTES:
            self.parts, self.size_bytes, self.skips = [], 0, True
            self.num_skipped += 1
            return
        self.parts.append(part)
        self.size_bytes += len(part)


def parse_line(line: bytes, where: str) -> tuple[list[Observation], list[Fault]]:
    """The people of one JSON line, and what of it was left out. An empty line holds nobody."""
    if not line or line.isspace():
        return [], []
    try:
        data = json.loads(line.decode())
    except RecursionError:
        return [], [Fault("malformed", where, "lists in lists without end", "a line of JSON")]
    except ValueError as error:
        reason = f" ({error.msg} at {error.pos})" if isinstance(error, json.JSONDecodeError) else ""
        return [], [Fault("malformed", where, _shorten(line) + reason, "a line of JSON")]
    if type(data) is not dict:
        return [], [Fault("malformed", where, _shorten(data), "a JSON object with person, time and joints")]
    time = data.get("time")
    if (type(time) is not float and type(time) is not int) or not abs(time) <= MAX_TIME_S:
        return [], [Fault("malformed", f"{where}.time", _shorten(time), "seconds, a number")]
    people = data.get("people")
    if people is None:
        fault = _check_person(data, where)
        return ([], [fault]) if fault else ([Observation(str(data["person"]), float(time), data["joints"])], [])
    if type(people) is not list or len(people) > MAX_PEOPLE_PER_LINE:
        expected = f"a list of at most {MAX_PEOPLE_PER_LINE} people"
        return [], [Fault("malformed", f"{where}.people", _shorten(people), expected)]
    found, faults = [], []
    for place, entry in enumerate(people):
        fault = _check_person(entry, f"{where}.people[{place}]")
        if fault:
            faults.append(fault)
        else:
            found.append(Observation(str(entry["person"]), float(time), entry["joints"]))
    return found, faults


def _check_person(entry: Any, where: str) -> Fault | None:
    if type(entry) is not dict:
        return Fault("malformed", where, _shorten(entry), "a JSON object with person and joints")
    person = entry.get("person")
    is_id = type(person) is int or (type(person) is str and 0 < len(person) <= MAX_ID_CHARACTERS)
    if not is_id or (type(person) is int and abs(person) >= 2**64):
        return Fault(
            "malformed", f"{where}.person", _shorten(person), f"text up to {MAX_ID_CHARACTERS} characters, or a number"
        )
    if type(entry.get("joints")) is not list:
        return Fault("malformed", f"{where}.joints", _shorten(entry.get("joints")), "a list of joints")
    return None


def read_joints(
    observations: Sequence[Observation], num_joints: int, num_channels: int
) -> tuple[NDArray[np.float32], list[int], list[Fault]]:
    """The joints of people: values (n, V, C), the places of those they belong to, and why the others were left out.

    A joint has C numbers, or C + 1 if a score follows, which is not used. Numbers that are null, not finite or beyond
    MAX_COORDINATE make their joint NaN: not found.
    """
    values = _read_all(observations, num_joints, num_channels)
    chosen, faults = list(range(len(observations))), []
    if values is None:  # somebody's joints are not what they should be: find out whose
        singles = [_read_all([item], num_joints, num_channels) for item in observations]
        singles = [
            _read_slowly(item.joints, num_joints, num_channels) if single is None else single
            for single, item in zip(singles, observations, strict=True)
        ]
        chosen = [place for place, single in enumerate(singles) if single is not None]
        faults = [
            _describe_joints(item, num_joints, num_channels)
            for item, single in zip(observations, singles, strict=True)
            if single is None
        ]
        parts = [single for single in singles if single is not None]
        values = np.concatenate(parts) if parts else np.zeros((0, num_joints, num_channels))
    with np.errstate(invalid="ignore"):
        is_lost = ~(np.abs(values) <= MAX_COORDINATE).all(axis=2)
    if is_lost.any():
        values[is_lost] = np.nan
    return np.asarray(values, np.float32), chosen, faults


def _read_all(observations: Sequence[Observation], num_joints: int, num_channels: int) -> NDArray[np.float64] | None:
    """All at once: (n, V, C); None if one of them is out of the ordinary."""
    try:
        joints = list(chain.from_iterable(item.joints for item in observations))
        numbers = list(chain.from_iterable(joints))
        sizes = {len(item.joints) for item in observations}, {len(joint) for joint in joints}
        # NumPy would take texts for the numbers in them
        if not NUMBERS.issuperset(map(type, numbers)) or sizes[0] != {num_joints} or len(sizes[1]) != 1:
            return None
        values = np.array(numbers, np.float64)
    except (TypeError, OverflowError):
        return None
    size = sizes[1].pop()
    if not num_channels <= size <= num_channels + 1:
        return None
    return values.reshape(len(observations), num_joints, size)[:, :, :num_channels]


def _read_slowly(joints: Any, num_joints: int, num_channels: int) -> NDArray[np.float64] | None:
    """One person (1, V, C) with null or huge numbers among the numbers; None if there is no making sense of it."""
    if len(joints) != num_joints:
        return None
    values = np.full((1, num_joints, num_channels), np.nan)
    for joint, numbers in enumerate(joints):
        if numbers is None:
            continue
        if type(numbers) is not list or not num_channels <= len(numbers) <= num_channels + 1:
            return None
        for channel, number in enumerate(numbers):
            if type(number) not in NUMBERS:
                return None
            if channel < num_channels and number is not None and abs(number) <= MAX_COORDINATE:
                values[0, joint, channel] = number
    return values


def _describe_joints(item: Observation, num_joints: int, num_channels: int) -> Fault:
    lengths = sorted({len(joint) if isinstance(joint, list | tuple | np.ndarray) else 0 for joint in item.joints})
    sizes = " or ".join(str(length) for length in lengths[:4]) or "no"
    got = f"{len(item.joints)} joints of {sizes} numbers"
    if len(item.joints) == num_joints and set(lengths) <= {num_channels, num_channels + 1}:
        got += ", or something among them that is no number"
    expected = f"{num_joints} joints of {num_channels} numbers, and a score after them or not"
    return Fault("wrong_joints", f"person {_shorten(item.person)}, time {item.time:.6f}", got, expected)


def split_by_person(observations: Sequence[Observation], limit: int) -> Iterator[list[Observation]]:
    """The observations in their order, in groups of at most `limit` in which nobody stands twice."""
    group: list[Observation] = []
    people: set[str] = set()
    for item in observations:
        if item.person in people or len(group) >= limit:
            yield group
            group, people = [], set()
        group.append(item)
        people.add(item.person)
    if group:
        yield group


def _shorten(value: Any) -> str:
    if type(value) in (dict, list):
        return f"a JSON {'object' if type(value) is dict else 'list'} of {len(value)}"
    if value is None:
        return "nothing"
    if type(value) is int and (value.bit_length() > 128):
        return "a huge number"
    text = repr(value[: SHOWN_CHARACTERS + 1].decode("utf-8", "replace") if isinstance(value, bytes) else value)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."
