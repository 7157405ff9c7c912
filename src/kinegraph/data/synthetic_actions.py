"""Which actions the motion generator shows, easy and borderline ones, one a clip or one after another."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kinegraph.data.synthetic_body import Array, Body, Motion, pose_body, turn
from kinegraph.data.synthetic_motion import (
    Style,
    blend,
    ease,
    fidget,
    gesture,
    jump,
    jump_period,
    shift_weight,
    sit_and_stand,
    swell,
    walk,
)

SITTING_DOWN, GETTING_UP, SITTING, STANDING, WALKING, JUMPING = range(6)


def _ease_seated(rng: np.random.Generator, times: Array) -> Array:
    """0 -> 1 over a time that suits sitting down; at least a quarter of the way lies inside the clip."""
    length = float(times[-1])
    kind = rng.uniform()
    duration = float(np.clip(np.exp(rng.normal(np.log(1.35), 0.28)), 0.8, 2.5))
    centre = rng.uniform(0.2, 0.8) * length
    reached = 1.0
    if kind < 0.14:
        duration = rng.uniform(2.5, 4.5)
    elif kind < 0.21:
        centre = length + rng.uniform(-0.25, 0.05) * duration
    elif kind < 0.26:
        centre = rng.uniform(-0.05, 0.25) * duration
    elif kind < 0.33:
        centre, reached = rng.uniform(0.2, 0.5) * length, rng.uniform(0.4, 0.65)
    return reached * ease((times - centre) / duration + 0.5)


def _change_posture(body: Body, style: Style, rng: np.random.Generator, times: Array, up: bool) -> Motion:
    seated = _ease_seated(rng, times)
    motion = sit_and_stand(body, style, rng, times, 1.0 - seated if up else seated)
    if rng.uniform() < 0.25:
        gesture(rng, times, motion, rng.uniform(0.2, 0.7))
    return motion


def _sit(body: Body, style: Style, rng: np.random.Generator, times: Array) -> Motion:
    lean: Array | float = 0.0
    seated = np.ones_like(times)
    if rng.uniform() < 0.3:
        duration = rng.uniform(1.0, 3.0)
        lean = swell(times, rng.uniform(-0.5 * duration, times[-1] - 0.4 * duration), duration) * rng.uniform(0.4, 1.1)
        seated -= rng.uniform(0.0, 0.06) * lean
    motion = sit_and_stand(body, style, rng, times, seated, lean)
    if rng.uniform() < 0.6:
        fidget(body, style, rng, times, motion)
    if rng.uniform() < 0.35:
        gesture(rng, times, motion, rng.uniform(0.3, 1.0))
    return motion


def _stand(body: Body, style: Style, rng: np.random.Generator, times: Array) -> Motion:
    lean: Array | float = 0.0
    if rng.uniform() < 0.15:
        duration = rng.uniform(1.0, 3.0)
        lean = swell(times, rng.uniform(-0.5 * duration, times[-1] - 0.4 * duration), duration) * rng.uniform(0.2, 0.9)
    motion = sit_and_stand(body, style, rng, times, np.zeros_like(times), lean)
    bob: Array | float = 0.0
    if rng.uniform() < 0.15:
        beat = 0.5 - 0.5 * np.cos(2.0 * np.pi * rng.uniform(0.3, 1.6) * times + rng.uniform(0.0, 6.28))
        bob = rng.uniform(15.0, 55.0) * beat
    shift_weight(body, rng, times, motion, rng.uniform(0.1, 1.1), bob)
    if rng.uniform() < 0.5:
        gesture(rng, times, motion, rng.uniform(0.3, 1.0))
    return motion


def _walk(body: Body, style: Style, rng: np.random.Generator, times: Array) -> Motion:
    length, kind = float(times[-1]), rng.uniform()
    speed, lift = float(np.clip(rng.normal(1150.0, 250.0), 600.0, 1900.0)), rng.uniform(0.8, 1.2)
    going = np.ones_like(times)
    if kind < 0.17:
        speed, lift = rng.uniform(300.0, 650.0), rng.uniform(0.45, 0.95)
    elif kind < 0.27:
        going = ease((times - rng.uniform(0.1, 0.5) * length) / 0.5)
    elif kind < 0.36:
        going = 1.0 - ease((times - rng.uniform(0.4, 0.8) * length) / 0.5)
    motion = walk(body, style, rng, times, going, speed * body.stature / 1700.0, lift)
    if rng.uniform() < 0.2:
        gesture(rng, times, motion, rng.uniform(0.3, 0.9))
    return motion


def _jump(body: Body, style: Style, rng: np.random.Generator, times: Array, hop: bool | None = None) -> Motion:
    length = float(times[-1])
    hop = rng.uniform() < 0.18 if hop is None else hop
    height = rng.uniform(40.0, 100.0) if hop else rng.uniform(100.0, 380.0)
    crouch = rng.uniform(0.025, 0.07) * body.stature if hop else rng.uniform(0.07, 0.19) * body.stature
    apexes = [rng.uniform(0.12, 0.88) * length]
    period = jump_period(body, height, crouch) * rng.uniform(1.0, 1.15)
    if rng.uniform() < 0.35:
        apexes += [apexes[0] + period] * bool(rng.integers(2)) + [apexes[0] - period] * bool(rng.integers(2))
    motion = jump(body, style, rng, times, sorted(apexes), height, crouch)
    if rng.uniform() < 0.3:
        motion.travel = rng.uniform(-100.0, 400.0) * ease((times - apexes[0]) / 0.5 + 0.5)
    return motion


def perform(label: int, body: Body, style: Style, rng: np.random.Generator, times: Array) -> Motion:
    """The action of a label over times (T,), which start at 0 s."""
    if label in (SITTING_DOWN, GETTING_UP):
        return _change_posture(body, style, rng, times, up=label == GETTING_UP)
    return {SITTING: _sit, STANDING: _stand, WALKING: _walk, JUMPING: _jump}[label](body, style, rng, times)


def perform_sequence(
    body: Body, style: Style, rng: np.random.Generator, num_frames: int, fps: float, room: tuple[float, float]
) -> tuple[Array, NDArray[np.int64]]:
    """A person doing one action after another: joints (T, 34, 3) in mm in the world, and the label of each frame (T).

    The person starts at the origin (z towards the camera) and walks within +-room (x, z) of it.
    """
    pieces: list[Array] = []
    labels: list[NDArray[np.int64]] = []
    label, place, heading = STANDING, np.zeros(3), rng.uniform(0.0, 2.0 * np.pi)
    last: Motion | None = None
    while sum(len(piece) for piece in pieces) < num_frames:
        goal = np.array([rng.uniform(-room[0], room[0]), 0.0, rng.uniform(-room[1], room[1])]) - place
        motion, times = _perform_piece(label, body, style, rng, fps, float(np.hypot(goal[0], goal[2])))
        if last is not None:
            motion = blend(last, motion, times)
        last = motion
        headings = np.full(len(times), heading)
        if label == WALKING:
            change = (np.arctan2(goal[0], goal[2]) - heading + np.pi) % (2.0 * np.pi) - np.pi
            headings = heading + change * ease(times / 0.8)
        ahead = np.stack([np.sin(headings), np.zeros(len(times)), np.cos(headings)], axis=1)
        places = place + np.cumsum(np.diff(motion.travel, prepend=motion.travel[0])[:, None] * ahead, axis=0)
        pieces.append(turn(pose_body(body, motion), headings) + places[:, None])
        labels.append(np.full(len(times), label))
        place, heading = places[-1], float(headings[-1])
        label = int(rng.choice(_NEXT[label]))
    return np.concatenate(pieces)[:num_frames], np.concatenate(labels)[:num_frames]


_NEXT = {
    SITTING_DOWN: [SITTING],
    GETTING_UP: [STANDING, WALKING],
    SITTING: [GETTING_UP],
    STANDING: [WALKING, WALKING, SITTING_DOWN, JUMPING],
    WALKING: [STANDING, SITTING_DOWN, WALKING],
    JUMPING: [STANDING, WALKING],
}


def _perform_piece(
    label: int, body: Body, style: Style, rng: np.random.Generator, fps: float, way: float
) -> tuple[Motion, Array]:
    """A whole action, begun and ended at rest, and its times (T,) from 0 s; walking covers about `way` mm."""
    if label in (SITTING_DOWN, GETTING_UP):
        duration = rng.uniform(1.0, 2.2)
        times = _count(duration + 0.3, fps)
        seated = ease((times - 0.15) / duration)
        return sit_and_stand(body, style, rng, times, seated if label == SITTING_DOWN else 1.0 - seated), times
    if label == WALKING:
        speed = float(np.clip(rng.normal(1150.0, 200.0), 700.0, 1700.0)) * body.stature / 1700.0
        duration = max(way / speed, 1.0) + 0.5
        times = _count(duration, fps)
        going = ease(times / 0.5) * (1.0 - ease((times - duration + 0.5) / 0.5))
        return walk(body, style, rng, times, going, speed), times
    if label == JUMPING:
        height, crouch = rng.uniform(80.0, 350.0), rng.uniform(0.06, 0.15) * body.stature
        period = 1.1 * jump_period(body, height, crouch)
        apexes = [1.5 + period * count for count in range(int(rng.integers(1, 4)))]
        times = _count(apexes[-1] + 1.6, fps)
        return jump(body, style, rng, times, apexes, height, crouch), times
    times = _count(rng.uniform(2.0, 6.0), fps)
    return perform(label, body, style, rng, times), times


def _count(duration: float, fps: float) -> Array:
    return np.asarray(np.arange(max(int(np.ceil(duration * fps)), 2)) / fps)
