"""Readers of recordings: one function per file format, each gives tracks."""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from kinegraph.data.clip import Track
from kinegraph.data.json_stream import Report, read_list
from kinegraph.errors import DataError, Problem

MAX_PROBLEMS = 20
POSE_FIELDS = ("pose3d", "pose25d")

Reader = Callable[[Path, str, int, Report | None], list[Track]]


def read_deepstream(path: Path, pose_field: str, num_joints: int, on_progress: Report | None = None) -> list[Track]:
    """The tracks of a JSON file saved by DeepStream's body-pose-3D app, sorted by source and object id.

    `pose_field` is "pose3d" (millimetres from the camera) or "pose25d" (pixels, z relative to the pelvis);
    the numbers of the other one are skipped unread. The file is read in pieces, so that memory holds one
    piece and the chosen poses.

    Frames without people are not in the file, so `num_frames_in_batch` and `num_obj_meta` are not compared
    with anything. A person is (`batch_id`, `object_id`). The same person twice in a row in one frame is an
    error: two people share the id, and every window of it would mix them. Frame numbers that jump or start
    again are left to the caller (`Track.find_gaps`).

    Raises DataError with all problems of the file together.
    """
    unused_fields = [name for name in POSE_FIELDS if name != pose_field]
    pack = struct.Struct(f"qQ{4 * num_joints}d").pack
    buffers: dict[tuple[int, int], bytearray] = {}
    problems = _ProblemList(path)
    for piece in read_list(path, unused_fields, on_progress):
        for index, entry in enumerate(piece.entries, piece.first):
            found: list[Problem] = []
            try:
                if piece.may_hold_booleans:  # which would pass for 0 and 1 below
                    found = _check_entry(entry, f"{path}: [{index}]", pose_field, num_joints)
                if not found:
                    _add_entry(buffers, entry, pose_field, pack)
            except (KeyError, TypeError, ValueError, OverflowError, struct.error) as error:
                where = f"{path}: [{index}]"
                unknown = Problem(where, f"what cannot be read ({error})", "the poses of one or more frames")
                found = _check_entry(entry, where, pose_field, num_joints) or [unknown]
            problems.extend(found)
    problems.raise_if_any()
    tracks = [_build_track(*key, buffers[key], num_joints) for key in sorted(buffers)]
    for track in tracks:
        problems.extend(_check_track(track, path))
    problems.raise_if_any()
    return tracks


FORMATS: dict[str, Reader] = {"deepstream": read_deepstream}


def _add_entry(
    buffers: dict[tuple[int, int], bytearray], entry: Any, pose_field: str, pack: Callable[..., bytes]
) -> None:
    """Append the poses of one list entry. Whatever is wrong with it raises; `_check_entry` then says what."""
    for batch in _get_list(entry, "batches"):
        source, frame, timestamp_ns = batch["batch_id"], batch["frame_num"], batch["ntp_timestamp"]
        for person in _get_list(batch, "objects"):
            object_id = person["object_id"]
            if type(object_id) is not int or type(source) is not int:
                raise TypeError("ids become file names and must be integers")
            buffer = buffers.get((source, object_id))
            if buffer is None:
                if not (_is_id(source) and _is_id(object_id)):
                    raise OverflowError("ids become file names and must be short")
                buffer = buffers[source, object_id] = bytearray()
            buffer += pack(frame, timestamp_ns, *person[pose_field])


def _build_track(source: int, object_id: int, buffer: bytearray, num_joints: int) -> Track:
    row = np.dtype([("frame", np.int64), ("timestamp_ns", np.uint64), ("joints", np.float64, (num_joints, 4))])
    rows = np.frombuffer(buffer, dtype=row)
    joints = rows["joints"]
    return Track(source, object_id, joints[..., :3], joints[..., 3], rows["frame"], rows["timestamp_ns"])


def _is_id(value: Any) -> bool:
    return type(value) is int and -(2**63) <= value < 2**64


def _get_list(holder: Any, key: str) -> list[Any]:
    value = holder[key]
    if type(value) is not list:
        raise TypeError(f"{key} must be a list")
    return value


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


Rules = Mapping[str, tuple[Callable[[Any], bool], str]]
"""Key -> what its value must satisfy, and the words for it."""

ENTRY_RULES: Rules = {"batches": (_is_list, "a list")}
BATCH_RULES: Rules = {
    "batch_id": (_is_id, "an integer"),
    "frame_num": (lambda value: type(value) is int and abs(value) < 2**63, "an integer"),
    "ntp_timestamp": (lambda value: type(value) is int and 0 <= value < 2**64, "nanoseconds, an integer"),
    "objects": (_is_list, "a list"),
}
PERSON_RULES: Rules = {"object_id": (_is_id, "an integer of at most 64 bits")}


def _check_entry(entry: Any, where: str, pose_field: str, num_joints: int) -> list[Problem]:
    """What is wrong with one entry of the list, place by place."""
    return list(_find_problems(entry, where, pose_field, num_joints))


def _find_problems(entry: Any, where: str, pose_field: str, num_joints: int) -> Iterator[Problem]:
    yield from _check_keys(entry, where, ENTRY_RULES)
    person_rules: Rules = {**PERSON_RULES, pose_field: (_is_list, f"a list of {4 * num_joints} numbers")}
    for batch, batch_where in _walk(entry, where, "batches"):
        yield from _check_keys(batch, batch_where, BATCH_RULES)
        for person, person_where in _walk(batch, batch_where, "objects"):
            yield from _check_keys(person, person_where, person_rules)
            if isinstance(person, dict) and isinstance(person.get(pose_field), list):
                yield from _check_pose(person[pose_field], f"{person_where}.{pose_field}", num_joints)


def _check_keys(value: Any, where: str, rules: Rules) -> Iterator[Problem]:
    if not isinstance(value, dict):
        yield Problem(where, _describe(value), f"a JSON object with {', '.join(rules)}")
        return
    for key, (is_right, expected) in rules.items():
        if key not in value:
            others = [name for name in POSE_FIELDS if key in POSE_FIELDS and name in value]
            hint = f"It has {others[0]}: choose another dataset_convert.pose_type." if others else ""
            yield Problem(f"{where}.{key}", "nothing", expected, hint)
        elif not is_right(value[key]):
            yield Problem(f"{where}.{key}", _describe(value[key]), expected)


def _check_pose(numbers: list[Any], where: str, num_joints: int) -> Iterator[Problem]:
    if len(numbers) != 4 * num_joints:
        fitting, rest = divmod(len(numbers), 4)
        fits = rest == 0 and fitting > 0
        hint = f"These are {fitting} joints: set dataset_convert.num_joints={fitting}." if fits else ""
        expected = f"{4 * num_joints} (x, y, z and confidence of {num_joints} joints)"
        yield Problem(where, f"{len(numbers)} numbers", expected, hint)
    for index, number in enumerate(numbers):
        if type(number) is not float and not (type(number) is int and abs(number) < 2**1023):
            yield Problem(f"{where}[{index}]", _describe(number), "a number")


def _check_track(track: Track, path: Path) -> Iterator[Problem]:
    where = f"{path}: source {track.source}, object {track.object_id}"
    repeated = np.flatnonzero(np.diff(track.frames) == 0)
    if repeated.size:
        got = f"frame {track.frames[repeated[0]]} more than once ({repeated.size} such places)"
        hint = "Two people share this id: record with the tracker on, or take one of them out."
        yield Problem(where, got, "each person at most once in a frame", hint)
    with np.errstate(invalid="ignore", over="ignore"):
        total = track.positions.sum() + track.scores.sum()
    if np.isfinite(total):  # then all of its terms are: the cheap question first
        return
    bad = ~(np.isfinite(track.positions).all(axis=2) & np.isfinite(track.scores))
    if bad.any():
        frame, joint = np.argwhere(bad)[0]
        places = f"frame {track.frames[frame]}, joint {joint} ({np.count_nonzero(bad)} such joints)"
        hint = "A joint that was not found is written as zeros with confidence 0."
        yield Problem(where, f"NaN or infinity in {places}", "finite numbers", hint)


def _walk(value: Any, where: str, key: str) -> Iterator[tuple[Any, str]]:
    children = value.get(key) if isinstance(value, dict) else None
    for index, child in enumerate(children if isinstance(children, list) else []):
        yield child, f"{where}.{key}[{index}]"


def _describe(value: Any) -> str:
    names = {dict: "a JSON object", list: "a JSON list", type(None): "null", bool: str(value).lower()}
    text = names.get(type(value)) or repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


@dataclass
class _ProblemList:
    """The problems of one file. The same one at many places is told once, with the number of places."""

    path: Path
    first: dict[tuple[str, ...], Problem] = field(default_factory=dict)
    counts: Counter[tuple[str, ...]] = field(default_factory=Counter)
    num_others: int = 0

    def extend(self, problems: Iterable[Problem]) -> None:
        for problem in problems:
            kind = (re.sub(r"\[\d+\]", "[]", problem.where), problem.got, problem.expected)
            if kind in self.first or len(self.first) < MAX_PROBLEMS:
                self.first.setdefault(kind, problem)
                self.counts[kind] += 1
            else:
                self.num_others += 1

    def raise_if_any(self) -> None:
        if not self.first:
            return
        told = [
            replace(problem, got=f"{problem.got} (and at {self.counts[kind] - 1} more places)")
            if self.counts[kind] > 1
            else problem
            for kind, problem in self.first.items()
        ]
        if self.num_others:
            told.append(Problem(str(self.path), f"{self.num_others} more problems", "none"))
        raise DataError(*told)
