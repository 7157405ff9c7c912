"""The input pipeline restated for one clip, with loops and without masks: a joint is a list of numbers, or None.

Written from docs/input.md; it shares nothing with the package but the options and the body.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

Joint = list[float] | None
People = list[list[list[Joint]]]  # person, frame, joint


def run_clip(clip: np.ndarray, options: Any, body: Any) -> np.ndarray:
    """(C, T, V, M) -> (C', T', V, M) float64, NaN where there is nothing."""
    num_channels, _, num_joints, _ = clip.shape
    size = num_channels - (options.score_channel >= 0)
    people = read_people(clip, options, size)
    people = [FILLS[options.missing](frames, size) for frames in people]
    people = order(people, options.people_order, size)
    length = 1 + max((t for frames in people for t, joints in enumerate(frames) if is_there(joints)), default=-1)
    people = normalise(people, options, body, size)
    people = [sample(frames, length, options) for frames in people]
    parts = []
    for stream in options.streams:
        chosen = people
        if stream.startswith("bone"):
            chosen = [[make_bones(joints, body, size) for joints in frames] for frames in people]
        if stream.endswith("motion"):
            chosen = [make_motion(frames, size) for frames in chosen]
        parts.append(write_people(chosen, num_channels, num_joints))
    return np.concatenate(parts)


def read_people(clip: np.ndarray, options: Any, size: int) -> People:
    num_channels, num_frames, num_joints, num_people = clip.shape
    people: People = []
    for person in range(num_people):
        frames = []
        for t in range(num_frames):
            joints: list[Joint] = []
            for v in range(num_joints):
                values = [float(clip[c, t, v, person]) for c in range(num_channels)]
                is_zero = all(value == 0 for value in values[:size])
                is_poor = size < num_channels and options.score_threshold > 0 and values[-1] < options.score_threshold
                joints.append(None if is_zero or is_poor else values)
            if options.origin_joint >= 0 and is_there(joints):
                v = options.origin_joint
                joints[v] = [float(clip[c, t, v, person]) for c in range(num_channels)]
            frames.append(joints)
        people.append(frames)
    return people


def is_there(joints: list[Joint]) -> bool:
    return any(joint is not None for joint in joints)


def keep(frames: list[list[Joint]], size: int) -> list[list[Joint]]:
    return frames


def hold(frames: list[list[Joint]], size: int) -> list[list[Joint]]:
    last: dict[int, list[float]] = {}
    result = []
    for joints in frames:
        filled = list(joints)
        for v, joint in enumerate(joints):
            if joint is not None:
                last[v] = joint
            elif v in last and is_there(joints):
                filled[v] = without_score(last[v], size)
        result.append(filled)
    return result


def interpolate(frames: list[list[Joint]], size: int) -> list[list[Joint]]:
    result = [list(joints) for joints in frames]
    seen = [t for t, joints in enumerate(frames) if is_there(joints)]
    for v in range(len(frames[0])):
        known = [t for t, joints in enumerate(frames) if joints[v] is not None]
        if not known:
            continue
        for t in range(seen[0], seen[-1] + 1):
            if frames[t][v] is not None:
                continue
            before = max((k for k in known if k < t), default=min(known))
            after = min((k for k in known if k > t), default=max(known))
            a, b = frames[before][v], frames[after][v]
            assert a is not None and b is not None
            share = (t - before) / (after - before) if before < t < after else 0.0
            if t < before:
                b = a
            result[t][v] = without_score([x + share * (y - x) for x, y in zip(a, b, strict=True)], size)
    return result


FILLS = {"keep": keep, "hold": hold, "interpolate": interpolate}


def without_score(joint: list[float], size: int) -> list[float]:
    return joint[:size] + [0.0] * (len(joint) - size)


def order(people: People, by: str, size: int) -> People:
    def count(frames: list[list[Joint]]) -> float:
        if by == "presence":
            return sum(is_there(joints) for joints in frames)
        way = 0.0
        for t in range(1, len(frames)):
            for old, new in zip(frames[t - 1], frames[t], strict=True):
                if old is not None and new is not None:
                    way += math.dist(old[:size], new[:size])
        return way

    return people if by == "file" else sorted(people, key=lambda frames: -count(frames))


def normalise(people: People, options: Any, body: Any, size: int) -> People:
    num_frames = len(people[0])

    def find_frame(person: int, t: int, mode: str) -> list[Joint] | None:
        """The joints by which a person is measured in a frame."""
        members = range(len(people)) if options.people == "together" else [person]
        times = range(num_frames) if mode == "first" else [t]
        return next((people[m][s] for s in times for m in members if is_there(people[m][s])), None)

    result: People = []
    for person, frames in enumerate(people):
        moved = []
        for t, joints in enumerate(frames):
            new: list[Joint] = []
            for joint in joints:
                if joint is None:
                    new.append(None)
                    continue
                point = joint[:size]
                if options.centre != "none":
                    centre = find_centre(find_frame(person, t, options.centre), body, size)
                    point = [x - y for x, y in zip(point, centre, strict=True)]
                if options.scale != "none":
                    length = find_size(find_frame(person, t, options.scale), options, body, size)
                    point = [x / length for x in point]
                if options.align != "none":
                    point = turn(point, find_frame(person, t, "first"), options.vertical, body, size)
                new.append(point + joint[size:])
            moved.append(new)
        result.append(moved)
    return result


def find_centre(joints: list[Joint] | None, body: Any, size: int) -> list[float]:
    assert joints is not None
    joint = joints[body.centre]
    return joint[:size] if joint is not None else find_mean(joints, size)


def find_mean(joints: list[Joint], size: int) -> list[float]:
    there = [joint for joint in joints if joint is not None]
    return [sum(joint[i] for joint in there) / len(there) for i in range(size)]


def find_spread(joints: list[Joint], size: int) -> float:
    mean = find_mean(joints, size)
    squares = [math.dist(joint[:size], mean) ** 2 for joint in joints if joint is not None]
    return math.sqrt(sum(squares) / len(squares))


def find_size(joints: list[Joint] | None, options: Any, body: Any, size: int) -> float:
    assert joints is not None
    spread = measured = find_spread(joints, size)
    if options.scale_by == "trunk":
        ends = [[joints[v] for v in end if joints[v] is not None] for end in body.trunk]
        if ends[0] and ends[1]:
            measured = math.dist(find_mean(ends[0], size), find_mean(ends[1], size))
    else:
        lengths = []
        for child, parent in body.bones:
            a, b = joints[child], joints[parent]
            if a is not None and b is not None:
                lengths.append(math.dist(a[:size], b[:size]))
        if lengths:
            measured = sum(lengths) / len(lengths)
    measured = max(measured, 0.1 * spread)
    return measured if measured > 0 else 1.0


def turn(point: list[float], joints: list[Joint] | None, vertical: str, body: Any, size: int) -> list[float]:
    assert joints is not None
    x, y = 0, 2 if vertical == "y" else 1
    across = [0.0, 0.0]
    for left, right in body.across:
        a, b = joints[left], joints[right]
        if a is not None and b is not None:
            across[0] += a[x] - b[x]
            across[1] += a[y] - b[y]
    if math.hypot(*across) <= 0.01 * find_spread(joints, size) or across == [0.0, 0.0]:
        return point
    angle = -math.atan2(across[1], across[0])
    turned = complex(point[x], point[y]) * complex(math.cos(angle), math.sin(angle))
    result = list(point)
    result[x], result[y] = turned.real, turned.imag
    return result


def sample(frames: list[list[Joint]], length: int, options: Any) -> list[list[Joint]]:
    count, num_joints = options.num_frames, len(frames[0])
    nothing: list[Joint] = [None] * num_joints
    if options.sampling == "none":
        return frames
    if options.sampling == "contiguous":
        return frames + [nothing] * (count - len(frames))
    if length == 0:
        return [nothing] * count
    if options.sampling == "uniform":
        return [frames[(2 * i + 1) * length // (2 * count)] for i in range(count)]
    left_out = math.floor((1 - options.test_crop) * length / 2)
    cropped = max(length - 2 * left_out, 1)
    result = []
    for i in range(count):
        place = left_out + min(max((i + 0.5) * cropped / count - 0.5, 0), cropped - 1)
        result.append(read_between(frames, place))
    return result


def read_between(frames: list[list[Joint]], place: float) -> list[Joint]:
    """A frame at a place between two frames."""
    low = math.floor(place)
    share = place - low
    if share == 0:
        return frames[low]
    joints: list[Joint] = []
    for a, b in zip(frames[low], frames[low + 1], strict=True):
        if a is not None and b is not None:
            joints.append([x + share * (y - x) for x, y in zip(a, b, strict=True)])
        else:
            joints.append(b if share >= 0.5 else a)
    return joints


def subtract(a: Joint, b: Joint, size: int) -> Joint:
    if a is None or b is None:
        return None
    scores = [min(x, y) for x, y in zip(a[size:], b[size:], strict=True)]
    return [x - y for x, y in zip(a[:size], b[:size], strict=True)] + scores


def make_bones(joints: list[Joint], body: Any, size: int) -> list[Joint]:
    result: list[Joint] = [None] * len(joints)
    for child, parent in body.bones:
        result[child] = subtract(joints[child], joints[parent], size)
    return result


def make_motion(frames: list[list[Joint]], size: int) -> list[list[Joint]]:
    result: list[list[Joint]] = [[None] * len(frames[0])]
    for before, joints in itertools.pairwise(frames):
        result.append([subtract(new, old, size) for new, old in zip(joints, before, strict=True)])
    return result


def write_people(people: People, num_channels: int, num_joints: int) -> np.ndarray:
    result = np.full((num_channels, len(people[0]), num_joints, len(people)), np.nan)
    for person, frames in enumerate(people):
        for t, joints in enumerate(frames):
            for v, joint in enumerate(joints):
                if joint is not None:
                    result[:, t, v, person] = joint
    return result
