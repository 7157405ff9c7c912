"""What a worker can measure: clips through a backend, frames step by step, and the matrix product to compare with.

A subject is opened once. `make_call(size)` then gives a function that does the work once, for a batch of `size`, and
answers how much of the time the input pipeline took, in seconds.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kinegraph.errors import Problem, UserError, look_up
from kinegraph.runtime import load
from kinegraph.spec import KEY_VARIABLE
from kinegraph.threads import MAX_THREADS

Call = Callable[[], float]
PRODUCT_SIZES = {4: 512, 16: 1024, MAX_THREADS: 2048}
"""Threads, up to so many -> rows and columns of the matrices: enough work for all of them, and short enough (some
milliseconds) that a few products run without a disturbance even on a busy machine.
"""
GPU_PRODUCT_SIZE = 4096
NUM_TRIES = 3
MAX_EXTRA_CLIPS = 16
STEP_FRAMES = 64
SEED = 1


class Subject(Protocol):
    facts: dict[str, Any]
    """What opening found out, for the report."""

    def make_call(self, size: int) -> Call:
        """The work of one call with a batch of `size`."""
        ...


class Clips:
    """Batches of clips through a backend; clips of a file go through the model's input pipeline first."""

    def __init__(self, request: dict[str, Any], clips: NDArray[np.floating], key: str) -> None:
        self.facts: dict[str, Any] = {}
        self.clips = clips
        self.predictor = load(
            request["model"], request["backend"], key, device=request["device"], threads=request["threads"]
        )
        self.is_real = request["data"] is not None

    def make_call(self, size: int) -> Call:
        """Logits of `size` clips; other clips each time."""
        compute = self.predictor.backend.compute
        pipeline = self.predictor.pipeline if self.is_real else None
        clips, start = self.clips, 0

        def call() -> float:
            nonlocal start
            batch = clips[start : start + size]
            start = (start + 1) % (len(clips) - size + 1)
            if not self.is_real:
                compute(batch, "clips")
                return 0.0
            begun_s = time.perf_counter()
            ready = np.asarray(batch, np.float32) if pipeline is None else pipeline(batch, "clips")
            pipeline_s = time.perf_counter() - begun_s
            compute(ready, "clips")
            return pipeline_s

        return call


class Steps:
    """One frame of each of `size` people through the step by step form of the model."""

    def __init__(self, request: dict[str, Any], clips: NDArray[np.floating], key: str) -> None:
        from kinegraph import online

        self.model = online.load(request["model"], mode="step", key=key, threads=request["threads"])
        self.frames = np.ascontiguousarray(clips[0, ..., 0].swapaxes(0, 1), np.float32)  # (T, C, V)
        self.facts = {"delay_frames": self.model.delay_frames}

    def make_call(self, size: int) -> Call:
        """One step. Every person gets the same frames, at another time each."""
        state = self.model.start(size)
        shifts, number = np.arange(size), 0

        def call() -> float:
            nonlocal state, number
            _, state = self.model.step(self.frames[(shifts + number) % len(self.frames)], state)
            number += 1
            return 0.0

        return call


class Products:
    """The product of two float32 matrices by whichever of NumPy and PyTorch is faster here: the machine's peak."""

    def __init__(self, request: dict[str, Any], clips: NDArray[np.floating], key: str) -> None:
        generator = np.random.default_rng(SEED)
        is_gpu = request["device"] not in ("", "cpu")
        size = next(size for most, size in PRODUCT_SIZES.items() if request["threads"] <= most)
        size = GPU_PRODUCT_SIZE if is_gpu else size
        left, right = (generator.standard_normal((size, size), np.float32) for _ in range(2))
        calls: dict[str, Call] = {} if is_gpu else {"numpy": _make_numpy_product(left, right)}
        try:
            calls["torch"] = _make_torch_product(left, right, request["threads"], request["device"] or "cpu")
        except ImportError:
            if not calls:
                raise
        times = {name: min(_time(call) for _ in range(NUM_TRIES)) for name, call in calls.items()}
        library = min(times, key=lambda name: times[name])
        self.call = calls[library]
        self.facts = {"library": library, "multiply_adds": size**3}

    def make_call(self, size: int) -> Call:
        """One product, whatever the size."""
        return self.call


def _make_numpy_product(left: NDArray[np.float32], right: NDArray[np.float32]) -> Call:
    result = np.empty_like(left)

    def call() -> float:
        np.matmul(left, right, out=result)
        return 0.0

    return call


def _make_torch_product(left: NDArray[np.float32], right: NDArray[np.float32], threads: int, device: str) -> Call:
    import torch

    torch.set_num_threads(threads)
    a, b = torch.from_numpy(left).to(device), torch.from_numpy(right).to(device)
    result = torch.empty_like(a)
    is_gpu = a.is_cuda

    def call() -> float:
        torch.mm(a, b, out=result)
        if is_gpu:
            torch.cuda.synchronize()
        return 0.0

    return call


def _time(call: Call) -> float:
    begun_s = time.perf_counter()
    call()
    return time.perf_counter() - begun_s


SUBJECTS: dict[str, Callable[[dict[str, Any], NDArray[np.floating], str], Subject]] = {
    "clips": Clips,
    "steps": Steps,
    "products": Products,
}


def open_subject(request: dict[str, Any], clips: NDArray[np.floating]) -> Subject:
    """The subject `request["kind"]`. Raises KinegraphError or ImportError where it cannot be measured here."""
    key = os.environ.get(KEY_VARIABLE, "")
    return look_up(SUBJECTS, request["kind"], "kind")(request, clips, key)


def make_clips(request: dict[str, Any]) -> NDArray[np.floating]:
    """The clips (N, C, T, V, M) of a worker: somewhat more than the largest batch, at most twice as many.

    Those of the file where there is one, from its start and over again if it is short; else standard normal numbers.
    """
    largest = max(request["sizes"])
    if request["kind"] == "products":
        return np.zeros((1, 1, 1, 1, 1), np.float32)
    count = largest + min(largest, MAX_EXTRA_CLIPS) if request["kind"] == "clips" else 1
    if request["data"] is None:
        channels, frames, joints, people = request["shape"]
        frames = STEP_FRAMES if request["kind"] == "steps" else frames
        shape = (count, channels, frames, joints, people)
        return np.random.default_rng(SEED).standard_normal(shape, np.float32)
    from kinegraph.data.arrays import open_array

    stored = open_array(Path(request["data"]))
    if not len(stored):
        raise UserError(Problem(request["data"], "no clips", "at least one"))
    return np.asarray(stored[np.arange(count) % len(stored)])
