"""ST-GCN.

Yan et al., Spatial Temporal Graph Convolutional Networks for Skeleton-Based Action Recognition, AAAI 2018.
The names of the weights are those of TAO's pose classification, so that its checkpoints load as they are.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from kinegraph.models.folded import (
    INPUT,
    AffineLayer,
    FoldedNetwork,
    GraphConvolutionLayer,
    Layer,
    Padding,
    SumLayer,
    TemporalConvolutionLayer,
)
from kinegraph.models.frames_first import Columns, convolve_graph, finish_block, is_worthwhile, normalise, order_joints
from kinegraph.models.layers import FrameNorm, StridedPointwise, fold_norm, weigh_all_frames
from kinegraph.models.winograd import convolve_over_time

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kinegraph.spec import ModelSpec

CHANNELS = (64, 64, 64, 64, 128, 128, 128, 256, 256, 256)
STRIDES = (1, 1, 1, 1, 2, 1, 1, 2, 1, 1)
TOTAL_STRIDE = math.prod(STRIDES)
TEMPORAL_KERNEL = 9


class STGCN(nn.Module):
    """Ten blocks of graph and temporal convolution, the mean over all cells, and a linear classifier.

    With options.temporal_padding "causal" no temporal convolution sees a later frame: its zeros are all at the start.
    Weights start as PyTorch starts its convolutions and batch normalisations; edge importance starts at one.

    adjacency: (K, V, V), from `kinegraph.skeleton.graph.build_adjacency`.
    """

    A: Tensor
    total_stride = TOTAL_STRIDE

    def __init__(
        self,
        options: ModelSpec,
        adjacency: Tensor | NDArray[np.float32],
        num_classes: int,
        num_channels: int | None = None,
    ) -> None:
        super().__init__()
        num_channels = num_channels or options.input_channels
        self.padding: Padding = options.temporal_padding
        weights = torch.as_tensor(adjacency, dtype=torch.float32).clone()
        num_subsets, num_joints, _ = weights.shape
        self.register_buffer("A", weights)
        self.data_bn = FrameNorm(num_channels * num_joints)
        inputs = (num_channels, *CHANNELS)
        self.st_gcn_networks = nn.ModuleList(
            Block(inputs[i], CHANNELS[i], num_subsets, STRIDES[i], options, is_first=i == 0)
            for i in range(len(CHANNELS))
        )
        self.edge_importance = (
            nn.ParameterList(nn.Parameter(torch.ones_like(weights)) for _ in CHANNELS)
            if options.edge_importance_weighting
            else None
        )
        self.fcn = nn.Conv2d(CHANNELS[-1], num_classes, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, T, V, M) -> (N, classes)."""
        return self.classify(self.forward_features(x), x)

    def classify(self, features: Tensor, x: Tensor) -> Tensor:
        """The map (N, M, C', T', V) of clips x (N, C, T, V, M) -> logits (N, classes)."""
        logits: Tensor = self.fcn(features.mean(dim=(1, 3, 4))[:, :, None, None])
        return logits.flatten(1)

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, C, T, V, M) -> (N, M, C', T', V): the map that is averaged and classified."""
        clips, channels, frames, joints, people = x.shape
        x = x.permute(0, 4, 3, 1, 2).reshape(clips * people, joints * channels, frames)
        x = self.data_bn(x)
        x = x.reshape(clips * people, joints, channels, frames)
        if self.training and is_worthwhile(x):
            x = self._train_blocks(x)
        else:
            x = x.permute(0, 2, 3, 1)  # (N*M, C, T, V)
            for i, block in enumerate(self.st_gcn_networks):
                x = block(x, self._weigh_edges(i))
        return x.unflatten(0, (clips, people))

    def pooling_weights(self, x: Tensor) -> Tensor:
        """(N, C, T, V, M) -> (N, M, T'): what people and frames of the map weigh in the mean, 1 in all."""
        return weigh_all_frames(x, TOTAL_STRIDE)

    def _weigh_edges(self, i: int) -> Tensor:
        """The adjacency (K, V, V) of block i."""
        return self.A if self.edge_importance is None else self.A * self.edge_importance[i]

    def _train_blocks(self, x: Tensor) -> Tensor:
        """(N, V, C, T) -> (N, C', T', V): the blocks in the form that is fast to train on the CPU."""
        order, columns = order_joints(self.A)
        x = x.permute(3, 1, 0, 2)[:, order].contiguous()  # (T, V, N, C)
        for i, block in enumerate(self.st_gcn_networks):
            assert isinstance(block, Block)
            x = block.train_frames_first(x, self._weigh_edges(i)[:, order[:, None], order], columns)
        return x[:, order.argsort()].permute(2, 3, 0, 1)

    def fold(self) -> FoldedNetwork:
        """The same network for inference, as plain data."""
        num_joints = int(self.A.shape[-1])
        ones, zeros = torch.ones(1), torch.zeros(1)
        scale, shift = fold_norm(ones, zeros, self.data_bn)
        layers: list[Layer] = [
            AffineLayer(
                "data_bn",
                (INPUT,),
                scale=scale.reshape(num_joints, -1),
                shift=shift.reshape(num_joints, -1),
            )
        ]
        for i, block in enumerate(self.st_gcn_networks):
            adjacency = self.A if self.edge_importance is None else self.A * self.edge_importance[i]
            assert isinstance(block, Block)
            layers += block.fold(f"block_{i}", layers[-1].name, adjacency.detach().numpy())
        assert self.fcn.bias is not None
        head = self.fcn.weight.detach().flatten(1).T
        return FoldedNetwork(
            int(self.data_bn.num_features) // num_joints,
            num_joints,
            tuple(layers),
            np.ascontiguousarray(head.numpy()),
            self.fcn.bias.detach().numpy().copy(),
            self.padding,
        )


class Block(nn.Module):
    """Graph convolution, temporal convolution and a residual way round both, which the first block lacks."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_subsets: int,
        stride: int,
        options: ModelSpec,
        is_first: bool,
    ) -> None:
        super().__init__()
        reach = TEMPORAL_KERNEL // 2
        self.missing_zeros = TEMPORAL_KERNEL - 1 if options.temporal_padding == "causal" else 0
        self.gcn = GraphConvolution(in_channels, out_channels, num_subsets)
        self.tcn = nn.Sequential(
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(
                out_channels, out_channels, (TEMPORAL_KERNEL, 1), (stride, 1), (0 if self.missing_zeros else reach, 0)
            ),
            nn.BatchNorm2d(out_channels),
            nn.Identity() if is_first else nn.Dropout(options.dropout, inplace=True),
        )
        self.residual: nn.Module | None
        if is_first:
            self.residual = None
        elif in_channels == out_channels and stride == 1:
            self.residual = nn.Identity()
        else:
            self.residual = nn.Sequential(
                StridedPointwise(in_channels, out_channels, stride, bias=True),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        """(N, C, T, V), (K, V, V) -> (N, C', T', V)."""
        y: Tensor = self.gcn(x, adjacency)
        for layer in self.tcn:
            if isinstance(layer, nn.Conv2d) and self.missing_zeros:
                y = functional.pad(y, (0, 0, self.missing_zeros, 0))
            y = layer(y)
        if self.residual is not None:
            y = y + self.residual(x)
        return functional.relu(y, inplace=True)

    def train_frames_first(self, x: Tensor, adjacency: Tensor, columns: tuple[Columns, ...]) -> Tensor:
        """(T, V, N, C), (K, V, V) -> (T', V, N, C'): what `forward` computes, in training mode on the CPU."""
        norm, _, convolution, last_norm, dropout = self.tcn
        assert isinstance(convolution, nn.Conv2d)
        assert convolution.bias is not None
        y = normalise(self.gcn.train_frames_first(x, adjacency, columns), norm, relu=True)
        stride = convolution.stride[0]
        before = self.missing_zeros or TEMPORAL_KERNEL // 2
        y = convolve_over_time(y, convolution.weight, convolution.bias, stride, before)
        y = normalise(y, last_norm)
        residual = x if self.residual is not None else None
        if isinstance(self.residual, nn.Sequential):
            way_round, way_norm = self.residual
            assert isinstance(way_round, nn.Conv2d)
            mapped = functional.linear(x[::stride].contiguous(), way_round.weight.flatten(1), way_round.bias)
            residual = normalise(mapped, way_norm)
        return finish_block(y, dropout.p if isinstance(dropout, nn.Dropout) else 0.0, residual)

    def fold(self, name: str, source: str, adjacency: NDArray[np.float32]) -> list[Layer]:
        """The block as layers that begin at the layer `source`; the last one is its result."""
        norm, _, convolution, last_norm, _ = self.tcn
        weight, bias = self.gcn.fold(adjacency, norm)
        graph = GraphConvolutionLayer(
            f"{name}.graph", (source,), relu=True, adjacency=adjacency, weight=weight, bias=bias
        )
        temporal = _fold_convolution(f"{name}.temporal", graph.name, convolution, last_norm)
        if self.residual is None:
            return [graph, replace(temporal, relu=True)]
        if isinstance(self.residual, nn.Identity):
            return [graph, temporal, SumLayer(f"{name}.sum", (temporal.name, source), relu=True)]
        assert isinstance(self.residual, nn.Sequential)
        way_round = _fold_convolution(f"{name}.residual", source, self.residual[0], self.residual[1])
        return [graph, temporal, way_round, SumLayer(f"{name}.sum", (temporal.name, way_round.name), relu=True)]


def _fold_convolution(name: str, source: str, convolution: nn.Module, norm: nn.Module) -> TemporalConvolutionLayer:
    assert isinstance(convolution, nn.Conv2d)
    assert convolution.bias is not None
    taps = convolution.weight.squeeze(3).permute(2, 1, 0)  # (k, C, C')
    weight, shift = fold_norm(taps, convolution.bias, norm)
    return TemporalConvolutionLayer(name, (source,), weight=weight, bias=shift, stride=convolution.stride[0])


class GraphConvolution(nn.Module):
    """Sum over k of conv_k(x) @ A_k, where conv_k are the K groups of output channels of one 1x1 convolution.

    Computed the other way round: neighbours are summed first, in one matrix product, and the K results become
    the input channels of one convolution, which then also does the sum over k. That is the same by linearity,
    and it works on K * C maps where the definition works on K * C'.
    """

    def __init__(self, in_channels: int, out_channels: int, num_subsets: int) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.conv = nn.Conv2d(in_channels, num_subsets * out_channels, kernel_size=1)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        """(N, C, T, V), (K, V, V) -> (N, C', T, V)."""
        clips, channels, frames, joints = x.shape
        subsets = adjacency.shape[0]
        x = x @ adjacency.transpose(0, 1).reshape(joints, subsets * joints)
        x = x.reshape(clips, channels, frames, subsets, joints).permute(0, 3, 1, 2, 4)
        x = x.reshape(clips, subsets * channels, frames, joints)
        weight = self.conv.weight.reshape(subsets, self.out_channels, channels).transpose(0, 1)  # (C', K, C)
        x = functional.conv2d(x, weight.reshape(self.out_channels, subsets * channels, 1, 1))
        assert self.conv.bias is not None
        # The bias belongs to conv_k(x), so each joint receives it as often as its column of A_k weighs
        bias = self.conv.bias.reshape(subsets, self.out_channels).transpose(0, 1) @ adjacency.sum(dim=1)  # (C', V)
        return x + bias[:, None, :]

    def train_frames_first(self, x: Tensor, adjacency: Tensor, columns: tuple[Columns, ...]) -> Tensor:
        """(T, V, N, C), (K, V, V) -> (T, V, N, C')."""
        assert self.conv.bias is not None
        weight = self.conv.weight.flatten(1).unflatten(0, (-1, self.out_channels)).transpose(1, 2)  # (K, C, C')
        biases = self.conv.bias.reshape(-1, self.out_channels)  # (K, C')
        return convolve_graph(x, adjacency, weight, adjacency.sum(dim=1).T @ biases, columns)

    def fold(self, adjacency: NDArray[np.float32], norm: nn.Module) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Weight (K, C, C') and bias (V, C') of this convolution and the normalisation after it."""
        subsets = len(adjacency)
        weight = self.conv.weight.detach().squeeze((2, 3)).unflatten(0, (subsets, -1)).transpose(1, 2)  # (K, C, C')
        assert self.conv.bias is not None
        biases = self.conv.bias.detach().double().unflatten(0, (subsets, -1))
        bias = torch.from_numpy(adjacency).double().sum(dim=1).T @ biases  # (V, C')
        return fold_norm(weight, bias, norm)
