"""Parts of a training step on the CPU with frames as the first axis and channels as the last: (T, V, N, C).

There every mixing of channels, joints or frames is a matrix product on slices, without copies. The result of each is
what torch.nn's own layers give, up to rounding. docs/performance.md says what it brings.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

MIN_CELLS = 4096
"""Clips x people x joints x frames; measured against the layers of torch.nn."""
NEARLY_ALL = 0.9
LANES = 4
LANE_VALUES = 1 << 16


def is_worthwhile(x: Tensor) -> bool:
    """Whether a training step on (N, V, C, T) should take this form.

    For the CPU only: cuDNN has its own ways. In a small batch the weights, which are transformed in each step, cost
    more than what is saved.
    """
    cells = x.shape[0] * x.shape[1] * x.shape[3]
    return x.device.type == "cpu" and not torch.is_autocast_enabled("cpu") and cells >= MIN_CELLS


class Columns(NamedTuple):
    """Of one subset of the adjacency, the columns first to last - 1 may differ from zero."""

    first: int
    last: int
    is_diagonal: bool


def order_joints(adjacency: Tensor) -> tuple[Tensor, tuple[Columns, ...]]:
    """(K, V, V) -> an order of the joints (V,), and for each subset where it is not zero once they are in that order.

    Many joints have no neighbours in some subset. In this order they stand together, so that they can be left out.
    """
    is_link = (adjacency != 0).cpu()
    used = is_link.any(dim=1).tolist()  # (K, V)
    before_last = used[-2] if len(used) > 1 else used[-1]
    order = sorted(range(adjacency.shape[1]), key=lambda joint: (used[-1][joint], not before_last[joint]))
    columns = []
    for links, subset in zip(is_link, used, strict=True):
        places = [place for place, joint in enumerate(order) if subset[joint]] or [-1]
        first, last = max(places[0], 0), places[-1] + 1
        if last - first >= NEARLY_ALL * len(order):  # one product over all joints is then quicker than one per frame
            first, last = 0, len(order)
        is_diagonal = int(links.sum()) == int(links.diagonal().sum())
        columns.append(Columns(first, last, is_diagonal))
    return torch.tensor(order), tuple(columns)


def convolve_graph(x: Tensor, adjacency: Tensor, weight: Tensor, bias: Tensor, columns: tuple[Columns, ...]) -> Tensor:
    """y[w] = sum over k, v of x[v] * adjacency[k, v, w] @ weight[k] + bias[w], with gradients of the first order.

    x (T, V, N, C), adjacency (K, V, V), weight (K, C, C'), bias (V, C') -> (T, V, N, C'). `columns`, from
    `order_joints`: entries of the adjacency that must be zero by them get no gradient.
    """
    result: Tensor = _GraphConvolution.apply(x, adjacency, weight, bias, columns)
    return result


class _GraphConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, adjacency: Tensor, weight: Tensor, bias: Tensor, columns: tuple[Columns, ...]
    ) -> Tensor:
        frames, joints, clips, _ = x.shape
        y = bias[None, :, None].expand(frames, joints, clips, weight.shape[2]).contiguous()
        kept = []
        for subset, own in enumerate(columns):
            if own.last > own.first:
                mixed = _mix(x, adjacency[subset], own)
                _add_product(y[:, own.first : own.last], mixed, weight[subset])
                # What a diagonal subset gives is quickly computed again
                kept += [] if own.is_diagonal else [mixed]
        ctx.save_for_backward(x, adjacency, weight, *kept)
        ctx.columns = columns
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        x, adjacency, weight, *kept = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = torch.zeros_like(x)
        grad_adjacency, grad_weight = torch.zeros_like(adjacency), torch.zeros_like(weight)
        for subset, own in enumerate(ctx.columns):
            if own.last <= own.first:
                continue
            mixed = _mix(x, adjacency[subset], own) if own.is_diagonal else kept.pop(0)
            rows = grad[:, own.first : own.last].reshape(-1, weight.shape[2])
            torch.mm(mixed.view(-1, weight.shape[1]).T, rows, out=grad_weight[subset])
            grad_mixed = torch.mm(rows, weight[subset].T).view(mixed.shape)
            _mix_back(x, grad_x, adjacency[subset], grad_adjacency[subset], grad_mixed, own)
        return grad_x, grad_adjacency, grad_weight, grad.sum(dim=(0, 2)), None


def _mix(x: Tensor, adjacency: Tensor, own: Columns) -> Tensor:
    """(T, V, N, C), (V, V) -> (T, w, N, C)."""
    if own.is_diagonal:
        return x[:, own.first : own.last] * adjacency.diagonal()[own.first : own.last, None, None]
    mixed = torch.bmm(adjacency[:, own.first : own.last].T.expand(len(x), -1, -1), x.flatten(2))
    return mixed.view(len(x), own.last - own.first, *x.shape[2:])


def _mix_back(x: Tensor, grad_x: Tensor, adjacency: Tensor, grad_adjacency: Tensor, grad: Tensor, own: Columns) -> None:
    """Add to the gradients of x (T, V, N, C) and adjacency (V, V) what comes from that of its mixture (T, w, N, C)."""
    place = slice(own.first, own.last)
    if own.is_diagonal:
        grad_x[:, place].addcmul_(grad, adjacency.diagonal()[place, None, None])
        grad_adjacency.diagonal()[place] = (x[:, place] * grad).sum(dim=(0, 2, 3))
        return
    flat = grad.flatten(2)  # (T, w, N * C)
    grad_x.flatten(2).baddbmm_(adjacency[:, place].expand(len(x), -1, -1), flat)
    grad_adjacency[:, place] = torch.bmm(x.flatten(2), flat.transpose(1, 2)).sum(dim=0)


def _add_product(target: Tensor, rows: Tensor, weight: Tensor) -> None:
    """target (T, w, N, C') += rows (T, w, N, C) @ weight (C, C')."""
    if target.is_contiguous():
        target.view(-1, target.shape[3]).addmm_(rows.view(-1, rows.shape[3]), weight)
    else:
        frames = len(target)
        target.flatten(1, 2).baddbmm_(rows.flatten(1, 2), weight.expand(frames, -1, -1))


def normalise(x: Tensor, norm: nn.Module, relu: bool = False) -> Tensor:
    """BatchNorm2d in training mode over (T, V, N, C), and ReLU after it."""
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    result: Tensor = _Normalisation.apply(x, norm.weight, norm.bias, norm, relu)
    return result


class _Normalisation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, norm: nn.BatchNorm2d, relu: bool) -> Tensor:
        momentum = 0.0 if norm.momentum is None else norm.momentum
        statistics = (norm.running_mean, norm.running_var, True, momentum, norm.eps)
        y, mean, inverse = torch.native_batch_norm(x.permute(0, 3, 1, 2), weight, bias, *statistics)
        y = y.permute(0, 2, 3, 1)
        if relu:
            y = y.relu_()
        ctx.save_for_backward(x, weight, mean, inverse, y if relu else None)
        ctx.epsilon = norm.eps
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, weight, mean, inverse, y = ctx.saved_tensors
        if y is not None:
            grad = torch.ops.aten.threshold_backward(grad, y, 0)
        images = (grad.contiguous().permute(0, 3, 1, 2), x.permute(0, 3, 1, 2))
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            *images, weight, None, None, mean, inverse, True, ctx.epsilon, [True, True, True]
        )
        return grad_x.permute(0, 2, 3, 1), grad_weight, grad_bias, None, None


def finish_block(x: Tensor, rate: float, residual: Tensor | None) -> Tensor:
    """relu(dropout(x) + residual), for tensors of one shape."""
    result: Tensor = _BlockEnd.apply(x, draw_mask(x, rate) if rate > 0 else None, residual)
    return result


class _BlockEnd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor | None, residual: Tensor | None) -> Tensor:
        if residual is None:
            y = x.clone() if mask is None else x * mask
        else:
            y = x + residual if mask is None else torch.addcmul(residual, x, mask)
        ctx.save_for_backward(y.relu_(), mask)
        ctx.has_residual = residual is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor | None]:
        y, mask = ctx.saved_tensors
        grad = torch.ops.aten.threshold_backward(grad, y, 0)
        return grad if mask is None else grad * mask, None, grad if ctx.has_residual else None


def draw_mask(x: Tensor, rate: float) -> Tensor:
    """What dropout multiplies x with: 0, or 1 / (1 - rate). From torch's generator, 16 bits for each value.

    torch.nn.Dropout draws 64 bits for each, which took 8 % of a training step. The share of zeros is `rate` up to
    1 / 65536, and the factor of the others is the one that belongs to that share.
    """
    mask = torch.empty_like(x)
    if rate >= 1:
        return mask.zero_()
    kept = min(max(round((1 - rate) * LANE_VALUES), 1), LANE_VALUES - 1)
    draws = torch.empty(-(-x.numel() // LANES), dtype=torch.int64).random_(-(2**63), None)
    torch.lt(draws.view(torch.int16)[: x.numel()].view(x.shape), kept - LANE_VALUES // 2, out=mask)
    return mask.mul_(LANE_VALUES / kept)
