"""The same interface for networks that cannot be carried out step by step: a window, recomputed every few frames."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kinegraph.runtime import Predictor

Array = NDArray[np.float32]
Memory = dict[str, Array]


class WindowSteps:
    """Keeps the last `window_frames` raw frames of each person and classifies them as a clip every `stride` frames."""

    delay_frames = 0
    first_valid_frame = 0
    pools_itself = True
    takes_raw_frames = True

    def __init__(self, predictor: Predictor, window_frames: int, stride: int) -> None:
        assert predictor.pipeline is not None
        self.predictor = predictor
        self.window_frames = window_frames
        self.total_stride = stride
        self.num_classes = predictor.num_classes
        self.frame_shape = (predictor.pipeline.num_channels, predictor.pipeline.num_joints)

    def start(self, num_people: int) -> Memory:
        """No frames yet: (N, C, frames, V), and how many of them have been seen (N,)."""
        channels, joints = self.frame_shape
        frames = np.zeros((num_people, channels, self.window_frames, joints), np.float32)
        return {"frames": frames, "seen": np.zeros(num_people, np.float32)}

    def step(self, frame: Array, phase: int, memory: Memory) -> tuple[Array | None, Memory]:
        """frame (N, C, V) -> logits (N, classes) of the frames so far, or None between two strides; new memory."""
        frames = np.concatenate([memory["frames"][:, :, 1:], frame[:, :, None]], axis=2)
        seen = np.minimum(memory["seen"] + 1, self.window_frames)
        memory = {"frames": frames, "seen": seen}
        if phase % self.total_stride:
            return None, memory
        logits = np.empty((len(frame), self.num_classes), np.float32)
        for length in np.unique(seen).astype(int):
            people = seen == length
            clips = frames[people, :, self.window_frames - length :, :, None]
            logits[people] = self.predictor.logits(clips)
        return logits, memory
