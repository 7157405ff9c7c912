"""random_move for one clip, frame by frame and joint by joint, straight from the description of the recipe."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

ROTATIONS = [-10.0, -5.0, 0.0, 5.0, 10.0]
SCALES = [0.9, 1.0, 1.1]
SHIFTS = [-0.2, -0.1, 0.0, 0.1, 0.2]


def pick(choices: Sequence[float], draw: float) -> float:
    """Cut [0, 1) into as many equal parts as there are choices."""
    for place, choice in enumerate(choices):
        if draw < (place + 1) / len(choices):
            return choice
    raise AssertionError(f"{draw} is not below 1")


def move_clip(clip: np.ndarray, draws: list[float]) -> np.ndarray:
    """(C, T, V, M) and eight draws (start and end of rotation, scale, shift 0, shift 1) -> the moved clip."""
    _, num_frames, num_joints, num_people = clip.shape
    ends = []
    for place, choices in enumerate([ROTATIONS, SCALES, SHIFTS, SHIFTS]):
        ends.append((pick(choices, draws[2 * place]), pick(choices, draws[2 * place + 1])))
    moved = clip.astype(np.float64).copy()
    for frame in range(num_frames):
        share = frame / (num_frames - 1) if num_frames > 1 else 0.0
        degrees, scale, shift_0, shift_1 = (start + (end - start) * share for start, end in ends)
        angle = degrees * math.pi / 180
        for joint in range(num_joints):
            for person in range(num_people):
                a, b = (float(clip[channel, frame, joint, person]) for channel in (0, 1))
                # Multiplying a + ib by scale * e^(i angle) turns and scales the point.
                turned = complex(a, b) * scale * complex(math.cos(angle), math.sin(angle))
                moved[0, frame, joint, person] = turned.real + shift_0
                moved[1, frame, joint, person] = turned.imag + shift_1
    return moved
