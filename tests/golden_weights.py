"""Weights and inputs that anyone can rebuild from a formula, so that golden files need to hold outputs only."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]

BATCH_NORM_MARKS = ("bn", ".tcn.0.", ".tcn.3.", ".residual.1.")


def golden_input(shape: Sequence[int]) -> NDArray[np.float32]:
    """A clip batch (N, C, T, V, M), uniform in [-1, 1)."""
    return _draw(20260101, shape).astype(np.float32)


def golden_state_dict(keys_and_shapes: Mapping[str, Sequence[int]], adjacency: Array) -> dict[str, Array]:
    """A state dict whose tensors follow from their names alone; `A` is the adjacency itself."""
    return {name: _fill(name, tuple(shape), adjacency) for name, shape in keys_and_shapes.items()}


def _draw(seed: int, shape: Sequence[int]) -> NDArray[np.float64]:
    numbers = 2 * np.random.Generator(np.random.PCG64(seed)).random(int(np.prod(shape, dtype=int))) - 1
    return numbers.reshape(shape)


def _fill(name: str, shape: tuple[int, ...], adjacency: Array) -> Array:
    if name == "A":
        return adjacency.astype(np.float32)
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    start = _draw(zlib.crc32(name.encode()), shape)
    is_batch_norm = any(mark in name for mark in BATCH_NORM_MARKS)
    if name.endswith("running_var") or name.startswith("edge_importance"):
        values = 1 + 0.5 * start
    elif name.endswith(("running_mean", "bias")):
        values = 0.1 * start
    elif is_batch_norm and name.endswith("weight"):
        values = 1 + 0.2 * start
    else:
        values = start * np.sqrt(3 / np.prod(shape[1:]))
    return values.astype(np.float32)
