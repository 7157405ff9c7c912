"""Convolution over time with fewer multiplications, for training on the CPU.

A convolution with k taps multiplies k times for each result. Winograd's minimal filtering F(m, k) computes m results
from m + k - 1 products: y = A [(G w) * (B x)], where x are m + k - 1 frames, w the taps, and A, B, G small constant
matrices (S. Winograd, Arithmetic Complexity of Computations, 1980; for convolutional networks: Lavin and Gray, CVPR
2016). Large k would make it inexact, so for nine taps F(m, 3) is nested in F(3, 3) (R. Agarwal and J. Cooley, New
algorithms for digital convolution, 1977): 2.3 to 3.3 products in place of 9, with errors of some 1e-6 in float32. A
stride of two is the sum of two convolutions, of the even and of the odd frames, with 5 and 4 taps.

Frames are the first axis here, (T, R, C), R rows (joints x clips). Every step is then a matrix product on slices that
need no copies, and zeros before and after the clip are frames that are left out.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

Matrix = NDArray[np.floating]
INFINITY = float("inf")
MAX_BUFFER_VALUES = 1 << 20


@dataclass(frozen=True, eq=False)
class Filtering:
    """y (m) = results (m, P) @ ((taps (P, k) @ w (k)) * (frames (P, m + k - 1) @ x))."""

    results: Matrix
    taps: Matrix
    frames: Matrix


def make_filtering(num_results: int, num_taps: int, points: Sequence[float]) -> Filtering:
    """F(num_results, num_taps) by interpolation in num_results + num_taps - 1 points (Toom and Cook, transposed)."""
    size = num_results + num_taps - 1
    if len(set(points)) != size:
        raise ValueError(f"{points}: expected {size} different points")
    evaluate = _evaluate_powers(points, size)
    taps, frames = _evaluate_powers(points, num_taps), np.linalg.inv(evaluate).T
    # Scaling a point in the one and back in the other changes nothing but the rounding: balanced, by powers of two
    factor = 2 ** np.round(np.log2(np.abs(frames).sum(1) / np.abs(taps).sum(1)) / 2)[:, None]
    return Filtering(_evaluate_powers(points, num_results).T, taps * factor, frames / factor)


def _evaluate_powers(points: Sequence[float], num_powers: int) -> Matrix:
    """(points, powers): 1, p, p^2, ...; at infinity only the highest power counts."""
    last = [0.0] * (num_powers - 1) + [1.0]
    return np.array([last if p == INFINITY else [p**power for power in range(num_powers)] for p in points])


def nest(inner: Filtering, outer: Filtering) -> Filtering:
    """Tap k1 * j + i goes through `inner` with i and `outer` with j; inner must be some F(k1, k1)."""
    period, inner_size = inner.frames.shape[1] // 2 + 1, inner.frames.shape[0]
    assert inner.results.shape[0] == inner.taps.shape[1] == period
    outer_size = outer.frames.shape[0]
    frames = np.zeros((outer_size, inner_size, period * (outer_size - 1) + inner_size))
    for block in range(outer_size):
        place = slice(period * block, period * block + inner_size)
        frames[:, :, place] += outer.frames[:, block, None, None] * inner.frames[None]
    return Filtering(
        np.kron(outer.results, inner.results), np.kron(outer.taps, inner.taps), frames.reshape(-1, frames.shape[2])
    )


_TWO_BY_THREE = make_filtering(2, 3, (0, 1, -1, INFINITY))
_THREE_BY_THREE = make_filtering(3, 3, (0, 1, -1, 2, INFINITY))
_FOUR_BY_THREE = make_filtering(4, 3, (0, 1, -1, 2, -2, INFINITY))
_FIVE_BY_THREE = make_filtering(5, 3, (0, 1, -1, 2, -2, 0.5, INFINITY))

# Number of taps -> the filterings that may be used; the plain one for clips of one or two frames
FILTERINGS: dict[int, tuple[Filtering, ...]] = {
    9: (
        nest(_THREE_BY_THREE, _FIVE_BY_THREE),
        nest(_THREE_BY_THREE, _FOUR_BY_THREE),
        nest(_THREE_BY_THREE, _THREE_BY_THREE),
        nest(_THREE_BY_THREE, _TWO_BY_THREE),
        Filtering(np.ones((1, 9)), np.eye(9), np.eye(9)),
    ),
    5: (
        make_filtering(4, 5, (0, 1, -1, 2, -2, 0.5, -0.5, INFINITY)),
        make_filtering(2, 5, (0, 1, -1, 2, -0.5, INFINITY)),
        Filtering(np.ones((1, 5)), np.eye(5), np.eye(5)),
    ),
}
# (taps, stride): the taps of each phase are padded with zeros to this many
TAPS_OF_A_PHASE: dict[tuple[int, int], int] = {(9, 1): 9, (9, 2): 5}


def choose_filtering(num_taps: int, num_frames: int, num_channels: int) -> Filtering:
    """The one with the fewest products for so many frames of the result; partly used tiles count as whole ones."""

    def count_products(filtering: Filtering) -> int:
        size, points = filtering.results.shape
        # Per channel of a row, forward and backward: mixing of channels; transforms of frames and of results
        products = 3 * num_channels + 3 * filtering.frames.shape[1] + 2 * size
        return -(-num_frames // size) * points * products

    return min(FILTERINGS[num_taps], key=count_products)


@functools.lru_cache(maxsize=256)
def _find_matrices(
    num_taps: int, num_frames: int, num_channels: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """results (m, P), taps (P, k), frames (P, m + k - 1)."""
    chosen = choose_filtering(num_taps, num_frames, num_channels)
    matrices = (chosen.results, chosen.taps, chosen.frames)
    results, taps, frames = (torch.from_numpy(np.ascontiguousarray(matrix)).to(dtype) for matrix in matrices)
    return results, taps, frames


def convolve_over_time(x: Tensor, weight: Tensor, bias: Tensor, stride: int, before: int) -> Tensor:
    """(T, V, N, C), weight (C', C, k, 1), bias (C',) -> (ceil(T / stride), V, N, C'), with first derivatives.

    `before` zeros stand before the first frame and k - 1 - before behind the last. k must be 9, stride 1 or 2.
    """
    result: Tensor = _Convolution.apply(x, weight, bias, stride, before)
    return result


@dataclass(frozen=True)
class _Plan:
    """How one convolution is cut into tiles of m result frames, and each tile into parts of the rows."""

    num_frames: int
    num_results: int
    stride: int
    before: int
    tile: int
    window: int

    def list_tiles(self) -> Iterator[tuple[int, int]]:
        """(first result frame, result frames) of each tile."""
        for first in range(0, self.num_results, self.tile):
            yield first, min(self.tile, self.num_results - first)

    def cut_window(self, first: int, phase: int) -> tuple[slice, slice]:
        """(frames of the clip, columns of the frame matrix) of a tile; zeros outside the clip are in neither."""
        start = first * self.stride - self.before + phase
        low = max(0, -(start // self.stride)) if start < 0 else 0
        high = max(low, min(self.window, -(-(self.num_frames - start) // self.stride)))
        begin = start + low * self.stride
        return slice(begin, begin + (high - low) * self.stride, self.stride), slice(low, high)


def _make_plan(x: Tensor, num_taps: int, stride: int, before: int) -> tuple[_Plan, tuple[Tensor, Tensor, Tensor]]:
    num_results = -(-x.shape[0] // stride)
    matrices = _find_matrices(TAPS_OF_A_PHASE[num_taps, stride], num_results, x.shape[2], x.dtype)
    tile, window = matrices[0].shape[0], matrices[2].shape[1]
    return _Plan(x.shape[0], num_results, stride, before, tile, window), matrices


def _transform_weight(weight: Tensor, taps: Tensor, stride: int) -> list[Tensor]:
    """(C', C, k, 1) -> (P, C, C') for each phase."""
    by_tap = weight.squeeze(3).permute(2, 1, 0)  # (k, C, C')
    transformed = []
    for phase in range(stride):
        own = by_tap[phase::stride]
        product = taps[:, : len(own)] @ own.reshape(len(own), -1)
        transformed.append(product.view(-1, *own.shape[1:]))
    return transformed


def _cut_rows(num_rows: int, values_per_row: int) -> Iterator[slice]:
    """Parts of about equal size, so small that a transformed tile stays in the cache."""
    num_parts = -(-num_rows * values_per_row // MAX_BUFFER_VALUES)
    size = -(-num_rows // max(1, num_parts))
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, stride: int, before: int) -> Tensor:
        plan, (results, taps, frames) = _make_plan(x, weight.shape[2], stride, before)
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.before = stride, before
        weights = _transform_weight(weight, taps, stride)
        points, before_channels, channels = weights[0].shape
        shape, x = x.shape, x.flatten(1, 2)
        y = x.new_empty(plan.num_results, x.shape[1], channels)
        for rows in _cut_rows(x.shape[1], points * max(before_channels, channels)):
            part, part_y = x[:, rows].flatten(1), y[:, rows].flatten(1)
            count = rows.stop - rows.start
            for first, size in plan.list_tiles():
                total = x.new_empty(points, count, channels)
                for phase in range(stride):
                    clip, columns = plan.cut_window(first, phase)
                    seen = (frames[:, columns] @ part[clip]).view(points, count, before_channels)
                    total.baddbmm_(seen, weights[phase], beta=min(phase, 1))
                torch.mm(results[:size], total.view(points, -1), out=part_y[first : first + size])
        y += bias
        return y.view(-1, *shape[1:3], channels)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        plan, (results, taps, frames) = _make_plan(x, weight.shape[2], ctx.stride, ctx.before)
        shape, x, grad = x.shape, x.flatten(1, 2), grad.contiguous().flatten(1, 2)
        weights = _transform_weight(weight, taps, ctx.stride)
        points, before_channels, channels = weights[0].shape
        needs_x = ctx.needs_input_grad[0]
        grad_x = torch.zeros_like(x) if needs_x else None
        grad_weights = [torch.zeros_like(w) for w in weights]
        for rows in _cut_rows(x.shape[1], points * max(before_channels, channels)):
            part, part_grad = x[:, rows].flatten(1), grad[:, rows].flatten(1)
            part_x = grad_x[:, rows].flatten(1) if grad_x is not None else None
            count = rows.stop - rows.start
            for first, size in plan.list_tiles():
                spread = (results[:size].T @ part_grad[first : first + size]).view(points, count, channels)
                for phase in range(ctx.stride):
                    clip, columns = plan.cut_window(first, phase)
                    seen = (frames[:, columns] @ part[clip]).view(points, count, before_channels)
                    grad_weights[phase].baddbmm_(seen.transpose(1, 2), spread)
                    if part_x is not None:
                        back = torch.bmm(spread, weights[phase].transpose(1, 2)).view(points, -1)
                        part_x[clip].addmm_(frames[:, columns].T, back)
        grad_x = grad_x if grad_x is None else grad_x.view(shape)
        return grad_x, _gather_taps(weight, taps, grad_weights), grad.sum((0, 1)), None, None


def _gather_taps(weight: Tensor, taps: Tensor, grad_weights: list[Tensor]) -> Tensor:
    """The opposite of `_transform_weight` for gradients: (P, C, C') for each phase -> (C', C, k, 1)."""
    by_tap = weight.new_empty(weight.shape[2], weight.shape[1], weight.shape[0])
    stride = len(grad_weights)
    for phase, grad in enumerate(grad_weights):
        own = by_tap[phase::stride]
        own.copy_((taps[:, : len(own)].T @ grad.flatten(1)).view(own.shape))
    return by_tap.permute(2, 1, 0).unsqueeze(3).contiguous()
