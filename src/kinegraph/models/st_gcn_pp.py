"""ST-GCN++: ST-GCN with a learned graph in every block and temporal convolutions of several reaches.

Duan et al., PYSKL: Towards Good Practices for Skeleton Action Recognition, ACM MM 2022, section 3.2: the graph is a
parameter, with a way round the spatial unit; six branches in the temporal unit (3 x 1 with dilations 1 to 4, a maximum
of 3, 1 x 1).

Frames of padding and absent people (all zeros) do not count in the mean that is classified.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from kinegraph.models.block_network import BlockNetwork
from kinegraph.models.folded import (
    AffineLayer,
    ConcatenationLayer,
    GraphConvolutionLayer,
    Layer,
    Padding,
    SumLayer,
    TemporalConvolutionLayer,
    TemporalMaximumLayer,
)
from kinegraph.models.layers import StridedPointwise, fold_norm, mix_joints
from kinegraph.models.stages import BlockPlan, build_shortcut, plan_blocks

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kinegraph.spec import ModelSpec

TEMPORAL_KERNEL = 3
DILATIONS = (1, 2, 3, 4)
MAXIMUM_SIZE = 3
NUM_BRANCHES = len(DILATIONS) + 2


class STGCNPP(BlockNetwork):
    """options.width scales the channels of every stage, options.depth is the number of blocks in each, 0: 4, 3 and 3.

    With options.temporal_padding "causal" no branch sees a later frame. adjacency: (K, V, V), where every block starts.
    """

    def __init__(
        self,
        options: ModelSpec,
        adjacency: Tensor | NDArray[np.float32],
        num_classes: int,
        num_channels: int | None = None,
    ) -> None:
        num_channels = num_channels or options.input_channels
        super().__init__(options, adjacency, num_channels)
        plans = plan_blocks(options, num_channels)
        self.blocks = nn.ModuleList(Block(plan, self.A, self.padding, is_first=i == 0) for i, plan in enumerate(plans))
        self.dropout = nn.Dropout(options.dropout)
        self.fcn = nn.Linear(plans[-1].after, num_classes)


class Block(nn.Module):
    """Graph convolution, temporal unit, and a way round both, which the first block lacks.

    Tensors are (N, C, T, V) in channels_last memory.
    """

    def __init__(self, plan: BlockPlan, adjacency: Tensor, padding: Padding, is_first: bool) -> None:
        super().__init__()
        self.topology = nn.Parameter(adjacency.clone())
        self.mapping = nn.Conv2d(len(adjacency) * plan.before, plan.after, 1, bias=False)
        self.spatial_bn = nn.BatchNorm2d(plan.after)
        self.spatial_shortcut = build_shortcut(BlockPlan(plan.before, plan.after, 1))
        self.temporal = TemporalUnit(plan.after, plan.stride, padding)
        self.shortcut = None if is_first else build_shortcut(plan)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, T, V) -> (N, C', T', V)."""
        y = self.spatial_bn(self.mapping(self._mix(x))) + self.spatial_shortcut(x)
        y = self.temporal(functional.relu(y, inplace=True))
        if self.shortcut is not None:
            y = y + self.shortcut(x)
        return functional.relu(y, inplace=True)

    def _mix(self, x: Tensor) -> Tensor:
        """(N, C, T, V) -> (N, K*C, T, V): each joint's neighbours, summed up for every subset."""
        subsets, joints, _ = self.topology.shape
        rows = self.topology.permute(2, 0, 1).reshape(joints * subsets, joints)  # (w * k, v)
        mixed = mix_joints(rows, x.permute(0, 2, 3, 1))  # (N, T, w * k, C)
        return mixed.reshape(x.shape[0], x.shape[2], joints, subsets * x.shape[1]).permute(0, 3, 1, 2)

    def fold(self, name: str, source: str) -> list[Layer]:
        """The block as layers that begin at the layer `source`; the last one is its result."""
        spatial = self._fold_graph(f"{name}.graph", source)
        layers = spatial + self.temporal.fold(f"{name}.temporal", spatial[-1].name, self.topology.shape[1])
        if self.shortcut is None:
            return [*layers[:-1], replace(layers[-1], relu=True)]
        end = layers[-1].name
        if isinstance(self.shortcut, nn.Identity):
            return [*layers, SumLayer(f"{name}.sum", (end, source), relu=True)]
        assert isinstance(self.shortcut, nn.Sequential)
        shortcut = _fold_convolution(f"{name}.shortcut", source, self.shortcut[0], self.shortcut[1])
        return [*layers, shortcut, SumLayer(f"{name}.sum", (end, shortcut.name), relu=True)]

    def _fold_graph(self, name: str, source: str) -> list[Layer]:
        adjacency = self.topology.detach().numpy().copy()
        weight = self.mapping.weight.detach().flatten(1).T.unflatten(0, (len(adjacency), -1))  # (K, C, C')
        zeros = torch.zeros(len(adjacency[0]), weight.shape[2])
        weights, bias = fold_norm(weight, zeros, self.spatial_bn)
        graph = GraphConvolutionLayer(name, (source,), adjacency=adjacency, weight=weights, bias=bias)
        if isinstance(self.spatial_shortcut, nn.Identity):
            return [graph, SumLayer(f"{name}.sum", (name, source), relu=True)]
        assert isinstance(self.spatial_shortcut, nn.Sequential)
        shortcut = _fold_convolution(f"{name}.shortcut", source, self.spatial_shortcut[0], self.spatial_shortcut[1])
        return [graph, shortcut, SumLayer(f"{name}.sum", (name, shortcut.name), relu=True)]


class TemporalUnit(nn.Module):
    """Six branches of a sixth of the channels each, the first of what is left over, and a map of them all.

    The 1x1 convolutions with which the first five begin are one.
    """

    def __init__(self, channels: int, stride: int, padding: Padding) -> None:
        super().__init__()
        size = channels // NUM_BRANCHES
        first = channels - size * (NUM_BRANCHES - 1)
        self.sizes = [first] + [size] * (NUM_BRANCHES - 2)
        self.stride = stride
        self.is_causal = padding == "causal"
        self.reduction = nn.Conv2d(channels, sum(self.sizes), 1, bias=False)
        self.reduction_bn = nn.BatchNorm2d(sum(self.sizes))
        self.dilated = nn.ModuleList(
            nn.Conv2d(
                width, width, (TEMPORAL_KERNEL, 1), (stride, 1), self._count_zeros(dilation), (dilation, 1), bias=False
            )
            for width, dilation in zip(self.sizes[:-1], DILATIONS, strict=True)
        )
        self.itself = StridedPointwise(channels, size, stride)
        self.branches_bn = nn.BatchNorm2d(channels)
        self.mapping = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def _count_zeros(self, dilation: int) -> tuple[int, int]:
        """What a convolution adds at either end by itself; a causal one gets its zeros before."""
        return (0 if self.is_causal else TEMPORAL_KERNEL // 2 * dilation, 0)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, T, V) -> (N, C, T', V)."""
        reduced = functional.relu(self.reduction_bn(self.reduction(x)), inplace=True)
        *parts, last = reduced.split(self.sizes, dim=1)
        branches = []
        for part, convolution, dilation in zip(parts, self.dilated, DILATIONS, strict=True):
            if self.is_causal:
                part = functional.pad(part, (0, 0, (TEMPORAL_KERNEL - 1) * dilation, 0))
            branches.append(convolution(part))
        branches += [self._find_maximum(last), self.itself(x)]
        y = functional.relu(self.branches_bn(torch.cat(branches, dim=1)), inplace=True)
        result: Tensor = self.norm(self.mapping(y))
        return result

    def _find_maximum(self, x: Tensor) -> Tensor:
        """(N, C, T, V) -> (N, C, T', V). Zeros before the clip change nothing: no value is below zero."""
        before = MAXIMUM_SIZE // 2
        if self.is_causal:
            x, before = functional.pad(x, (0, 0, MAXIMUM_SIZE - 1, 0)), 0
        return functional.max_pool2d(x, (MAXIMUM_SIZE, 1), (self.stride, 1), (before, 0))

    def fold(self, name: str, source: str, num_joints: int) -> list[Layer]:
        """The unit as layers; the last one is its result. The normalisation behind the branches goes into each."""
        reduction, shift = fold_norm(_list_taps(self.reduction), torch.zeros(sum(self.sizes)), self.reduction_bn)
        scale, offset = fold_norm(torch.ones(1), torch.zeros(1), self.branches_bn)
        layers: list[Layer] = []
        outputs = []
        end = 0
        for i, size in enumerate(self.sizes):
            part = slice(end, end + size)
            end += size
            weight = np.ascontiguousarray(reduction[:, :, part])
            start = f"{name}.reduction_{i}"
            layers.append(TemporalConvolutionLayer(start, (source,), True, weight=weight, bias=shift[part].copy()))
            if i < len(DILATIONS):
                branch = _scale_convolution(f"{name}.{i}", start, self.dilated[i], scale[part], offset[part])
                layers.append(replace(branch, dilation=DILATIONS[i]))
            else:
                layers.append(TemporalMaximumLayer(f"{name}.maximum", (start,), size=MAXIMUM_SIZE, stride=self.stride))
                scales, shifts = (np.tile(values[part], (num_joints, 1)) for values in (scale, offset))
                layers.append(AffineLayer(f"{name}.{i}", (layers[-1].name,), True, scale=scales, shift=shifts))
            outputs.append(f"{name}.{i}")
        layers.append(_scale_convolution(f"{name}.itself", source, self.itself, scale[end:], offset[end:]))
        layers.append(ConcatenationLayer(f"{name}.branches", (*outputs, f"{name}.itself")))
        return [*layers, _fold_convolution(f"{name}.mapping", layers[-1].name, self.mapping, self.norm)]


def _scale_convolution(
    name: str, source: str, convolution: nn.Module, scale: NDArray[np.float32], shift: NDArray[np.float32]
) -> TemporalConvolutionLayer:
    """A convolution, its result scaled and shifted, with negative results set to zero."""
    assert isinstance(convolution, nn.Conv2d)
    weight = np.ascontiguousarray(_list_taps(convolution).detach().numpy() * scale)
    return TemporalConvolutionLayer(
        name, (source,), True, weight=weight, bias=shift.copy(), stride=convolution.stride[0]
    )


def _fold_convolution(name: str, source: str, convolution: nn.Module, norm: nn.Module) -> TemporalConvolutionLayer:
    """A convolution and the normalisation behind it."""
    assert isinstance(convolution, nn.Conv2d)
    weight, bias = fold_norm(_list_taps(convolution), torch.zeros(convolution.out_channels), norm)
    return TemporalConvolutionLayer(name, (source,), weight=weight, bias=bias, stride=convolution.stride[0])


def _list_taps(convolution: nn.Module) -> Tensor:
    """The weight of a (k, 1) convolution as (k, C, C')."""
    assert isinstance(convolution, nn.Conv2d)
    return convolution.weight.squeeze(3).permute(2, 1, 0)
