"""A model and a pool with the interface of kinegraph.online, whose answers can be foretold."""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np

CLASS_NAMES = ["rest", "wave", "sit"]


class StandInModel:
    """Two joints of three numbers. The first number of the first joint says the class: 0, 1 or 2."""

    class_names = CLASS_NAMES
    num_channels = 3
    num_joints = 2
    has_window = False

    def __init__(self, frames_per_second: float = 10.0, delay_frames: int = 0) -> None:
        self.frames_per_second = frames_per_second
        self.delay_frames = delay_frames


class StandInPool:
    """Answers about the frame `delay_frames` ago, as soon as there is one. Remembers all frames, if it `remembers`."""

    def __init__(self, model: StandInModel, remembers: bool = True) -> None:
        self.model = model
        self.remembers = remembers
        self.history: dict[str, list[np.ndarray]] = {}
        self.finished: list[list[np.ndarray]] = []
        self.num_calls = 0

    def update(self, frames: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One frame (C, V) of each person -> probabilities (classes,)."""
        self.num_calls += 1
        answers = {}
        for person, frame in frames.items():
            assert frame.shape == (3, 2) and frame.dtype == np.float32 and np.isfinite(frame).all()
            past = self.history.setdefault(person, [])
            past.append(frame.copy())
            if not self.remembers:
                del past[: -self.model.delay_frames - 1]
            if len(past) > self.model.delay_frames:
                label = round(float(past[-1 - self.model.delay_frames][0, 0]))
                answers[person] = np.where(np.arange(3) == label, 0.9, 0.05)
        return answers

    def forget(self, person: str) -> None:
        """The next frame of this person is a first one."""
        frames = self.history.pop(person, [])
        if self.remembers:
            self.finished.append(frames)


def make_joints(label: float, x: float = 1.0) -> list[list[float]]:
    return [[float(label), 1.0, 1.0], [x, 2.0, 2.0]]


def make_line(person: str, time_s: float, label: int = 1) -> bytes:
    return json.dumps({"person": person, "time": time_s, "joints": make_joints(label)}).encode() + b"\n"
