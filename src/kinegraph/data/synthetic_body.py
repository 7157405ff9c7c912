"""The body of the motion generator: proportions, joint channels, forward kinematics of the 34-joint `nvidia` layout.

Person axes, in millimetres: x to the person's left, y up, z forward, origin on the floor below the person.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

NUM_JOINTS = 34
SIDE = np.array([1.0, -1.0])  # left, right along x
LEFT_RIGHT = ((1, 2), (4, 5), (7, 8), (9, 10), (11, 12), (13, 14), (16, 17), (18, 19), (20, 21), (22, 23),
              (24, 25), (26, 27), (28, 29), (30, 31), (32, 33))  # fmt: skip
PARENTS = np.array([-1, 0, 0, 0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 7, 8, 6, 15, 15, 16, 17, 6, 6, 20, 21, 22, 23,
                    24, 25, 24, 25, 24, 25, 24, 25])  # fmt: skip
MIN_STATURE_MM, MAX_STATURE_MM = 1450.0, 2000.0

# Fractions of stature. Segment lengths and heights: Drillis and Contini (1966), as tabulated in Winter, Biomechanics
# and Motor Control of Human Movement (4th ed., 2009), figure 4.1: hip 0.530, knee 0.285, ankle 0.039, shoulder 0.818,
# eye 0.936 high; half shoulder width 0.129, hip width 0.191, upper arm 0.186, forearm 0.146, hand 0.108, foot 0.152
# long and 0.055 wide. Points inside a segment (toes, knuckles, ears) are placed by eye within these.
# Each row: left joint, its x, y, z from the parent; the right one mirrors x.
_OFFSETS = {
    1: (0.048, 0.0, 0.0),  # hip: half way from the midline to the side of the hip
    3: (0.0, 0.144, 0.0),
    4: (0.0, -0.245, 0.0),
    6: (0.0, 0.150, 0.0),
    7: (0.0, -0.246, 0.0),
    9: (-0.012, -0.033, 0.112),
    11: (0.045, 0.0, -0.027),
    13: (0.0, -0.031, -0.038),
    15: (0.0, 0.096, 0.062),
    16: (0.018, 0.016, -0.012),
    18: (0.026, -0.010, -0.048),
    20: (0.129, -0.006, 0.0),
    22: (0.0, -0.186, 0.0),
    24: (0.0, -0.146, 0.0),
    26: (0.002, -0.048, -0.022),
    28: (0.0, -0.106, 0.002),
    30: (0.002, -0.055, 0.015),
    32: (-0.012, -0.046, 0.038),
}


@dataclass(frozen=True)
class Body:
    """Offsets (34, 3) in mm of each joint from its parent in the upright pose, arms hanging, palms to the thighs."""

    stature: float
    offsets: Array
    ankle_height: float

    @property
    def thigh(self) -> float:
        return float(-self.offsets[4, 1])

    @property
    def shank(self) -> float:
        return float(-self.offsets[7, 1])

    @property
    def half_hip(self) -> float:
        return float(self.offsets[1, 0])


@dataclass
class Motion:
    """What a person does: channels over T frames, angles in radians, lengths in mm, person axes; sides are left, right.

    Angles are (pitch, yaw, roll); pitch leans forward or points toes down, yaw turns left, roll leans to the right.
    """

    travel: Array  # (T,) way walked forward
    pelvis: Array  # (T, 3) middle of the hips, relative to the point that travels
    hips: Array  # (T, 3) angles of the pelvis
    trunk: Array  # (T, 3) angles of the rib cage
    head: Array  # (T, 3) angles of the head
    ankle: Array  # (T, 2, 3) wanted ankles, relative to the point that travels
    foot: Array  # (T, 2, 2) foot pitch, toe-out
    splay: Array  # (T, 2) outward turn of the plane in which the knee bends
    arm: Array  # (T, 2, 5) shoulder flexion, abduction, inward turn; elbow flexion; pronation


def draw_body(rng: np.random.Generator) -> Body:
    """A random adult: stature about 1700 +- 95 mm, and each length off its mean proportion by about 3 %."""
    stature = float(np.clip(rng.normal(1700.0, 95.0), MIN_STATURE_MM, MAX_STATURE_MM))
    build = np.clip(rng.normal(1.0, 0.03, 3), 0.93, 1.07)  # legs and arms, trunk, breadth
    offsets = np.zeros((NUM_JOINTS, 3))
    right_of = dict(LEFT_RIGHT)
    for joint, fractions in _OFFSETS.items():
        length = build[1] if joint in (3, 6) else build[0]
        offset = np.array(fractions) * stature * np.clip(rng.normal(1.0, 0.02), 0.95, 1.05)
        offsets[joint] = offset * (build[2], length, 1.0)
        if joint in right_of:
            offsets[right_of[joint]] = offsets[joint] * (-1.0, 1.0, 1.0)
    return Body(stature, offsets, 0.039 * stature)


def orient(angles: Array) -> Array:
    """Rotation matrices (..., 3, 3) = Ry(yaw) Rx(pitch) Rz(roll) of angles (..., 3) = (pitch, yaw, roll)."""
    (sx, sy, sz), (cx, cy, cz) = np.moveaxis(np.sin(angles), -1, 0), np.moveaxis(np.cos(angles), -1, 0)
    rows = [cy * cz + sy * sx * sz, sy * sx * cz - cy * sz, sy * cx,
            cx * sz, cx * cz, -sx,
            cy * sx * sz - sy * cz, sy * sz + cy * sx * cz, cy * cx]  # fmt: skip
    return np.stack(rows, axis=-1).reshape(*angles.shape[:-1], 3, 3)


def turn(points: Array, heading: Array) -> Array:
    """Turn points (T, V, 3) about the vertical by heading (T,), to the left."""
    none = np.zeros_like(heading)
    return np.asarray(points @ np.swapaxes(orient(np.stack([none, heading, none], axis=-1)), 1, 2))


def roll_foot(body: Body, ankle: Array, pitch: Array) -> Array:
    """Move the ankles (..., 3) of flat feet to where they are after rolling over the heel (pitch < 0) or the ball."""
    ball = 0.9 * body.offsets[9, 1:] + (0.0, -0.004 * body.stature)
    pivot = np.where(pitch[..., None] < 0, body.offsets[13, 1:], ball)
    sin, cos = np.sin(pitch), np.cos(pitch)
    moved = ankle.copy()
    moved[..., 1] += pivot[..., 0] - (cos * pivot[..., 0] - sin * pivot[..., 1])
    moved[..., 2] += pivot[..., 1] - (sin * pivot[..., 0] + cos * pivot[..., 1])
    return moved


def reach_height(body: Body, pelvis: Array, ankle: Array, extension: float) -> Array:
    """The height (T,) that the pelvis (T, 3) may have so that no leg to an ankle (T, 2, 3) is longer than extension."""
    hip_x = pelvis[:, None, 0] + SIDE * body.half_hip
    across = (ankle[..., 0] - hip_x) ** 2 + (ankle[..., 2] - pelvis[:, None, 2]) ** 2
    room = (extension * (body.thigh + body.shank)) ** 2 - across
    return np.asarray((ankle[..., 1] + np.sqrt(np.maximum(room, 0.0))).min(axis=1))


def _bend_leg(body: Body, hip: Array, ankle: Array, splay: Array, side: float) -> tuple[Array, Array]:
    """Knee (T, 3) and ankle (T, 3): the law of cosines; an ankle out of reach is pulled back to the straight leg."""
    way = ankle - hip
    wanted = np.linalg.norm(way, axis=1, keepdims=True)
    along = way / wanted
    shortest, longest = 1.05 * abs(body.thigh - body.shank) + 40.0, 0.9995 * (body.thigh + body.shank)
    distance = np.clip(wanted, shortest, longest)
    forward = np.stack([side * np.sin(splay), np.zeros_like(splay), np.cos(splay)], axis=1)
    forward -= (forward * along).sum(axis=1, keepdims=True) * along
    forward /= np.maximum(np.linalg.norm(forward, axis=1, keepdims=True), 1e-9)
    share = (body.thigh**2 - body.shank**2 + distance**2) / (2.0 * distance)
    knee = hip + share * along + np.sqrt(np.maximum(body.thigh**2 - share**2, 0.0)) * forward
    return knee, hip + distance * along


def pose_body(body: Body, motion: Motion) -> Array:
    """Joints (T, 34, 3) in mm and person axes, without travel; every bone keeps its length whatever the motion asks."""
    num_frames = len(motion.travel)
    joints = np.empty((num_frames, NUM_JOINTS, 3))

    def place(children: list[int], rotation: Array) -> None:
        joints[:, children] = joints[:, PARENTS[children]] + body.offsets[children] @ np.swapaxes(rotation, 1, 2)

    joints[:, 0] = motion.pelvis
    place([1, 2], orient(motion.hips))
    place([3], orient(0.5 * (motion.hips + motion.trunk)))
    thorax = orient(motion.trunk)
    place([6], thorax)
    place([20, 21], thorax)
    head = orient(motion.head)
    for pair in ([15], [16, 17], [18, 19]):
        place(pair, head)
    none = np.zeros(num_frames)
    for index, side in enumerate(SIDE):
        hip, knee, ankle = 1 + index, 4 + index, 7 + index
        joints[:, knee], joints[:, ankle] = _bend_leg(
            body, joints[:, hip], motion.ankle[:, index], motion.splay[:, index], float(side)
        )
        pitch, toe_out = motion.foot[:, index].T
        foot = orient(np.stack([pitch, side * toe_out, none], axis=1))
        place([9 + index, 13 + index], foot)
        place([11 + index], foot)
        flexion, abduction, inward, elbow, pronation = motion.arm[:, index].T
        upper = orient(np.stack([-flexion, motion.trunk[:, 1], side * abduction], axis=1))
        upper = upper @ orient(np.stack([none, -side * inward, none], axis=1))
        place([22 + index], upper)
        forearm = upper @ orient(np.stack([-elbow, none, none], axis=1))
        place([24 + index], forearm)
        hand = forearm @ orient(np.stack([none, -side * pronation, none], axis=1))
        place([26 + index, 28 + index, 30 + index, 32 + index], hand)
    return joints
