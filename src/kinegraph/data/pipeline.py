"""The deterministic input steps between an array of clips and a model; a checkpoint stores them.

Only NumPy is needed: an exported model answers without torch.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kinegraph.data.arrays import AXIS_LETTERS, NonFiniteCount, cast_to_float32
from kinegraph.errors import DataError, Problem, suggest

VERSION = 1
KEYS = ("version", "num_channels", "num_joints", "steps")

# name -> (N, C, T, V, M) to (N, C', T', V, M). Empty: the reference recipe feeds the arrays as they are.
STEPS: dict[str, Callable[[np.ndarray], np.ndarray]] = {}


@dataclass(frozen=True)
class InputPipeline:
    """What every clip goes through before the model, in training, evaluation, inference and export alike."""

    num_channels: int
    num_joints: int
    steps: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint or the metadata of an ONNX file; `from_dict` reads it back."""
        return {
            "version": VERSION,
            "num_channels": self.num_channels,
            "num_joints": self.num_joints,
            "steps": list(self.steps),
        }

    @classmethod
    def from_dict(cls, data: Any, where: str = "input pipeline") -> InputPipeline:
        """The pipeline that `to_dict` wrote; DataError for an unknown version, an unknown step or damaged
        data.
        """
        if not isinstance(data, Mapping):
            raise DataError(Problem(where, type(data).__name__, "a mapping with " + ", ".join(KEYS)))
        if data.get("version") != VERSION or isinstance(data.get("version"), bool):
            hint = "The model was made by another version of Kinegraph: use that version, or export it again."
            raise DataError(Problem(f"{where}.version", reprlib.repr(data.get("version")), str(VERSION), hint))
        problems = _check_keys(data, where)
        if problems:
            raise DataError(*problems)
        return cls(data["num_channels"], data["num_joints"], tuple(data["steps"]))

    def __call__(self, x: np.ndarray, where: str = "input") -> np.ndarray:
        """(N, C, T, V, M) numbers -> (N, C', T', V, M) float32, contiguous.

        DataError, with every problem, for another number of axes, channels or joints, no frames or people,
        NaN or infinity.
        """
        x = np.asarray(x)
        problems = self._check_shape(x, where)
        if problems:
            raise DataError(*problems)
        y = cast_to_float32(x)
        count = NonFiniteCount()
        count.add(y)
        problem = count.as_problem(where)
        if problem:
            raise DataError(problem)
        for step in self.steps:
            y = STEPS[step](y)
        return np.ascontiguousarray(y, np.float32)

    def _check_shape(self, x: np.ndarray, where: str) -> list[Problem]:
        problems = []
        if x.dtype.kind not in "fiu":
            problems.append(Problem(where, f"dtype {x.dtype}", "numbers (float32)"))
        if x.ndim != 5:
            hint = "Add the axis of people: x[..., numpy.newaxis]." if x.ndim == 4 else ""
            problems.append(Problem(where, f"{x.ndim} axes, shape {x.shape}", f"5 axes {AXIS_LETTERS}", hint))
            return problems
        _, num_channels, num_frames, num_joints, num_people = x.shape
        if num_channels != self.num_channels:
            got = f"{num_channels} channels in shape {x.shape}"
            problems.append(Problem(where, got, f"{self.num_channels} channels, as the model was trained with"))
        if num_joints != self.num_joints:
            got = f"{num_joints} joints in shape {x.shape}"
            problems.append(Problem(where, got, f"{self.num_joints} joints, as the model was trained with"))
        if num_frames < 1 or num_people < 1:
            problems.append(Problem(where, f"shape {x.shape}", "at least one frame and one person"))
        return problems


def _check_keys(data: Mapping[str, Any], where: str) -> list[Problem]:
    problems = [
        Problem(f"{where}.{key}", "an unknown key", "one of " + ", ".join(KEYS)) for key in data if key not in KEYS
    ]
    for key in ("num_channels", "num_joints"):
        value = data.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            problems.append(Problem(f"{where}.{key}", reprlib.repr(value), "a whole number of at least 1"))
    steps = data.get("steps")
    if not isinstance(steps, list | tuple) or not all(isinstance(step, str) for step in steps):
        return [*problems, Problem(f"{where}.steps", reprlib.repr(steps), "a list of step names")]
    expected = f"one of {', '.join(STEPS)}" if STEPS else "no steps: this version of Kinegraph has none"
    for i, step in enumerate(steps):
        if step not in STEPS:
            problems.append(Problem(f"{where}.steps[{i}]", reprlib.repr(step), expected, suggest(step, STEPS)))
    return problems
