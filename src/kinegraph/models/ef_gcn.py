"""EF-GCN: a small graph network whose streams are fused at its input, made by the clock of a CPU.

From others: streams that meet early in one network (EfficientGCN, Song et al., TPAMI 2022, section 3.2), and a topology
per block that is learned freely (2s-AGCN, Shi et al., CVPR 2019, eq. 3, matrix B). Ours: the joint itself and its
neighbours are the only two subsets, so joints are mixed once per block; all other operations are dense convolutions
of 64 channels or more, which a CPU does near its peak; two batch normalisations a block.
docs/decisions/0007-ef-gcn.md has the measurements.

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
    GraphConvolutionLayer,
    Layer,
    Padding,
    SumLayer,
    TemporalConvolutionLayer,
)
from kinegraph.models.layers import StridedPointwise, fold_norm, mix_joints
from kinegraph.models.stages import scale_channels

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kinegraph.spec import ModelSpec

STAGES = (64, 64, 128)
"""Channels; each stage but the first begins with stride 2."""
TOTAL_STRIDE = 2 ** (len(STAGES) - 1)
TEMPORAL_KERNEL = 5
DEPTH = 2


class EFGCN(BlockNetwork):
    """options.width scales the channels of every stage, options.depth is the number of blocks in each, 0: 2."""

    total_stride = TOTAL_STRIDE

    def __init__(
        self,
        options: ModelSpec,
        adjacency: Tensor | NDArray[np.float32],
        num_classes: int,
        num_channels: int | None = None,
    ) -> None:
        before = num_channels or options.input_channels
        super().__init__(options, adjacency, before)
        self.blocks = build_blocks(options, self.A, before, STAGES, 1)
        self.dropout = nn.Dropout(options.dropout)
        self.fcn = nn.Linear(scale_channels(STAGES[-1], options), num_classes)


def build_blocks(
    options: ModelSpec, adjacency: Tensor, before: int, stages: tuple[int, ...], first_stride: int
) -> nn.ModuleList:
    """Blocks for maps of `before` channels and a graph (K, V, V). Each stage but the first begins with stride 2."""
    blocks = []
    for stage, channels in enumerate(stages):
        after = scale_channels(channels, options)
        for i in range(options.depth or DEPTH):
            stride = 1 if i > 0 else first_stride if stage == 0 else 2
            blocks.append(Block(before, after, adjacency.sum(dim=0), stride, options.temporal_padding))
            before = after
    return nn.ModuleList(blocks)


class Block(nn.Module):
    """Spatial unit, temporal convolution, and a way round both. Tensors are (N, C, T, V) in channels_last memory."""

    def __init__(self, before: int, after: int, topology: Tensor, stride: int, padding: Padding) -> None:
        super().__init__()
        self.topology = nn.Parameter(topology.clone())
        self.own = nn.Conv2d(before, after, 1, bias=False)
        self.neighbours = nn.Conv2d(before, after, 1, bias=False)
        self.spatial_bn = nn.BatchNorm2d(after)
        reach = TEMPORAL_KERNEL // 2
        self.missing_zeros = TEMPORAL_KERNEL - 1 if padding == "causal" else 0
        zeros = 0 if self.missing_zeros else reach
        self.temporal = nn.Conv2d(after, after, (TEMPORAL_KERNEL, 1), (stride, 1), (zeros, 0), bias=False)
        self.temporal_bn = nn.BatchNorm2d(after)
        keeps_shape = before == after and stride == 1
        self.shortcut = nn.Identity() if keeps_shape else StridedPointwise(before, after, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, T, V) -> (N, C', T', V)."""
        mixed = mix_joints(self.topology.T, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        y = functional.relu(self.spatial_bn(self.own(x) + self.neighbours(mixed)), inplace=True)
        if self.missing_zeros:
            y = functional.pad(y, (0, 0, self.missing_zeros, 0))
        y = self.temporal_bn(self.temporal(y)) + self.shortcut(x)
        return functional.relu(y, inplace=True)

    def fold(self, name: str, source: str) -> list[Layer]:
        """The block as layers that begin at the layer `source`; the last one is its result."""
        topology = self.topology.detach().numpy()
        weights = torch.stack([self.own.weight, self.neighbours.weight]).squeeze((3, 4)).transpose(1, 2)  # (K, C, C')
        nothing = torch.zeros(len(topology), weights.shape[2])
        weight, bias = fold_norm(weights, nothing, self.spatial_bn)
        adjacency = np.stack([np.eye(len(topology), dtype=np.float32), topology])
        graph = GraphConvolutionLayer(f"{name}.graph", (source,), True, adjacency=adjacency, weight=weight, bias=bias)
        taps, shift = fold_norm(_list_taps(self.temporal), torch.zeros(weights.shape[2]), self.temporal_bn)
        stride = self.temporal.stride[0]
        temporal = TemporalConvolutionLayer(f"{name}.temporal", (graph.name,), weight=taps, bias=shift, stride=stride)
        total = SumLayer(f"{name}.sum", (temporal.name, source), relu=True)
        if isinstance(self.shortcut, nn.Identity):
            return [graph, temporal, total]
        taps = np.ascontiguousarray(_list_taps(self.shortcut).detach().numpy())
        no_bias = np.zeros(taps.shape[2], np.float32)
        shortcut = TemporalConvolutionLayer(f"{name}.shortcut", (source,), weight=taps, bias=no_bias, stride=stride)
        return [graph, temporal, shortcut, replace(total, inputs=(temporal.name, shortcut.name))]


def _list_taps(convolution: nn.Module) -> Tensor:
    """The weight of a (k, 1) convolution as (k, C, C')."""
    assert isinstance(convolution, nn.Conv2d)
    return convolution.weight.squeeze(3).permute(2, 1, 0)
