"""One text of a computation for NumPy arrays and torch tensors: where the two differ, this module knows it."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = Any
"""A NumPy array or a torch tensor."""


def get_namespace(x: Array) -> Any:
    """The module, numpy or torch, whose functions take `x`. torch is imported only for tensors."""
    if isinstance(x, np.ndarray):
        return np
    import torch

    return torch


def convert_like(values: np.ndarray, x: Array) -> Array:
    """A NumPy array as an array of the kind of `x`, on its device; floats get the dtype of `x`."""
    if isinstance(x, np.ndarray):
        return values.astype(x.dtype) if values.dtype.kind == "f" else values
    import torch

    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return (tensor.to(x.dtype) if values.dtype.kind == "f" else tensor).to(x.device)


def convert_to_numpy(x: Array) -> np.ndarray:
    """The values in memory of the CPU."""
    return x if isinstance(x, np.ndarray) else x.cpu().numpy()


def cast_mask(mask: Array, x: Array) -> Array:
    """A mask as ones and zeros of the dtype of `x`."""
    return mask.astype(x.dtype) if isinstance(mask, np.ndarray) else mask.to(x.dtype)


def find_first(mask: Array, axis: int) -> Array:
    """The place of the first true value along an axis, which stays with size 1; 0 where none is true."""
    if isinstance(mask, np.ndarray):
        return mask.argmax(axis=axis, keepdims=True)
    return mask.byte().argmax(dim=axis, keepdim=True)


def accumulate_maximum(x: Array, axis: int) -> Array:
    """The largest value so far along an axis."""
    return np.maximum.accumulate(x, axis=axis) if isinstance(x, np.ndarray) else x.cummax(dim=axis).values


def take_along(x: Array, index: Array, axis: int) -> Array:
    """x[..., index, ...] along an axis; the other axes of both are broadcast."""
    if isinstance(x, np.ndarray):
        return np.take_along_axis(x, index, axis)
    return x.take_along_dim(index, axis)


def put_last(x: Array, axis: int) -> Array:
    """The axis moved to the end, contiguous: sums over it are then the same whatever the other sizes are."""
    if isinstance(x, np.ndarray):
        return np.ascontiguousarray(np.moveaxis(x, axis, -1))
    return x.movedim(axis, -1).contiguous()
