"""Frame by frame inference: `step(frames, state) -> (probabilities, state)` for each tracked person.

model = kinegraph.online.load("model.pth")
state = model.start(num_people=2)
probabilities, state = model.step(frames, state)
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kinegraph.calibration import softmax
from kinegraph.errors import DataError, Problem, UserError
from kinegraph.model_description import ModelDescription
from kinegraph.online.state import State
from kinegraph.skeleton.layouts import Layout

Array = NDArray[np.float32]
Memory = dict[str, Array]
MEMORY = "memory."
INPUT = "input."


class Steps(Protocol):
    """How a network is carried out step by step. It holds no state of its own."""

    total_stride: int
    delay_frames: int
    first_valid_frame: int
    num_classes: int
    pools_itself: bool
    """Its logits are about all that it remembers, so that no mean over time is taken of them."""
    takes_raw_frames: bool
    """It brings the input pipeline itself."""

    def start(self, num_people: int) -> Memory:
        """The memory before the first frame, each array with N people along its first axis."""
        ...

    def step(self, frame: Array, phase: int, memory: Memory) -> tuple[Array | None, Memory]:
        """frame (N, C, V), phase modulo total_stride -> logits (N, classes), or None at frames without; new memory."""
        ...


class OnlineModel:
    """A trained model that takes frames one at a time. Made by `kinegraph.online.load`."""

    def __init__(self, path: str, steps: Steps, description: ModelDescription) -> None:
        self.path = path
        self.steps = steps
        self.description = description
        self.class_names = description.class_names
        pipeline = description.pipeline
        if pipeline is None:
            got = "a model that does not say its channels and joints"
            raise UserError(Problem(path, got, "a model that Kinegraph trained or exported"))
        self.pipeline = pipeline

    @property
    def num_channels(self) -> int:
        return self.pipeline.num_channels

    @property
    def num_joints(self) -> int:
        return self.pipeline.num_joints

    @property
    def layout(self) -> Layout | None:
        return self.description.layout

    @property
    def frames_per_second(self) -> float:
        """Of the data that the model was trained with; 0.0: unknown."""
        return self.pipeline.options.frames_per_second if self.pipeline.options else 0.0

    @property
    def delay_frames(self) -> int:
        """The answer after a frame is about frames up to so many before it."""
        return self.steps.delay_frames

    @property
    def has_window(self) -> bool:
        """Whether an answer is about a window of frames as it is, so that no mean over time is taken of answers."""
        return self.steps.pools_itself

    def start(self, num_people: int = 1, pooling_frames: int | None = None) -> State:
        """The state before the first frame.

        pooling_frames: the answer is about the mean over the last so many frames (rounded up to whole strides of the
        network); None: over all frames since the start. Raises UserError for one where the model has a window.
        """
        if num_people < 1 or (pooling_frames is not None and pooling_frames < 1):
            got = f"{num_people} people, pooling_frames {pooling_frames}"
            raise UserError(Problem("online start", got, "at least 1 of each"))
        if pooling_frames is not None and self.has_window:
            expected = "none: this model classifies a window of frames, and the answer is about that"
            hint = "How long it is, window_frames of online.load says. In a spec: live.pooling_frames=0"
            raise UserError(Problem("pooling_frames", str(pooling_frames), expected, hint))
        classes = self.steps.num_classes
        arrays: dict[str, NDArray[Any]] = {
            "age": np.zeros(num_people, np.int64),
            "count": np.zeros(num_people, np.int64),
        }
        if pooling_frames is None and not self.has_window:
            arrays["sum"] = np.zeros((num_people, classes))
        else:
            kept = -(-(pooling_frames or 1) // self.steps.total_stride)
            arrays["recent"] = np.zeros((num_people, kept, classes))
        arrays |= {MEMORY + key: array for key, array in self.steps.start(num_people).items()}
        if not self.steps.takes_raw_frames:
            arrays |= {INPUT + key: array for key, array in self.pipeline.start(num_people).items()}
        return State(0, arrays)

    def step(self, frames: NDArray[Any], state: State) -> tuple[NDArray[np.float64], State]:
        """The next frame (N, C, V) of N people, or several (N, C, T, V) -> probabilities (N, classes), the new state.

        The given state stays as it was. Rows are NaN as long as there is no answer (see `delay_frames`). Raises
        DataError for another shape or values that are not finite.
        """
        values = self._check_frames(frames, state.num_people)
        for frame in np.moveaxis(values, 2, 0):
            state = self._advance(frame, state)
        return self.answer(state), state

    def answer(self, state: State) -> NDArray[np.float64]:
        """Probabilities (N, classes) as of the last frame of the state; NaN where there is no answer yet."""
        total = state.arrays["sum"] if "sum" in state.arrays else state.arrays["recent"].sum(axis=1)
        count = state.arrays["count"][:, None]
        return np.where(count > 0, softmax(total / np.maximum(count, 1), self.description.temperature), np.nan)

    def check_frame(self, frame: NDArray[Any], where: str) -> Array:
        """One person's frame (C, V) as float32. Raises DataError for another shape or values that are not finite."""
        values = np.asarray(frame, np.float32)
        if values.shape != (self.num_channels, self.num_joints) or not np.isfinite(values).all():
            raise _refuse(values, where, f"({self.num_channels}, {self.num_joints})")
        return values

    def _check_frames(self, frames: NDArray[Any], num_people: int) -> Array:
        values = np.asarray(frames, np.float32)
        values = values[:, :, np.newaxis] if values.ndim == 3 else values
        expected = (num_people, self.num_channels, self.num_joints)
        if values.ndim != 4 or values.shape[:2] + values.shape[3:] != expected or not np.isfinite(values).all():
            raise _refuse(np.asarray(frames), "frames", f"{expected} (people of the state, channels, joints)")
        return values

    def _advance(self, frame: Array, state: State) -> State:
        arrays = dict(state.arrays)
        if not self.steps.takes_raw_frames:
            frame, seen = self.pipeline.step(frame, _pick(arrays, INPUT))
            arrays |= {INPUT + key: array for key, array in seen.items()}
        logits, memory = self.steps.step(frame, state.phase, _pick(arrays, MEMORY))
        arrays |= {MEMORY + key: array for key, array in memory.items()}
        if logits is not None:
            self._pool(logits, arrays)
        arrays["age"] = arrays["age"] + 1
        return State((state.phase + 1) % self.steps.total_stride, arrays)

    def _pool(self, logits: Array, arrays: dict[str, NDArray[Any]]) -> None:
        """Take the logits of this frame into the mean, of those people for whom they are valid."""
        valid = arrays["age"] >= self.steps.first_valid_frame
        newest = np.where(valid[:, None], logits, 0.0)
        if "sum" in arrays:
            arrays["sum"] = arrays["sum"] + newest
            arrays["count"] = arrays["count"] + valid
        else:
            kept = arrays["recent"].shape[1]
            arrays["recent"] = np.concatenate([arrays["recent"][:, 1:], newest[:, None]], axis=1)
            arrays["count"] = np.minimum(arrays["count"] + valid, kept)


def _pick(arrays: dict[str, NDArray[Any]], prefix: str) -> dict[str, NDArray[Any]]:
    """The arrays whose key has the prefix, without it."""
    return {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}


def _refuse(values: NDArray[Any], where: str, expected: str) -> DataError:
    got = f"shape {values.shape}" if np.isfinite(values).all() else f"shape {values.shape} with NaN or infinity"
    return DataError(Problem(where, got, f"finite numbers {expected}"))
