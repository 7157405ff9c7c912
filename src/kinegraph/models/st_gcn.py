"""ST-GCN.

Yan et al., Spatial Temporal Graph Convolutional Networks for Skeleton-Based Action Recognition, AAAI 2018.
The names of the weights are those of TAO's pose classification, so that its checkpoints load as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kinegraph.spec import ModelSpec

CHANNELS = (64, 64, 64, 64, 128, 128, 128, 256, 256, 256)
STRIDES = (1, 1, 1, 1, 2, 1, 1, 2, 1, 1)
TEMPORAL_KERNEL = 9


class STGCN(nn.Module):
    """Ten blocks of graph and temporal convolution, the mean over all cells, and a linear classifier.

    Weights start as PyTorch starts its convolutions and batch normalisations; edge importance starts at one.

    adjacency: (K, V, V), from `kinegraph.skeleton.graph.build_adjacency`.
    """

    def __init__(self, options: ModelSpec, adjacency: Tensor | NDArray[np.float32], num_classes: int) -> None:
        super().__init__()
        weights = torch.as_tensor(adjacency, dtype=torch.float32).clone()
        num_subsets, num_joints, _ = weights.shape
        self.register_buffer("A", weights)
        self.data_bn = nn.BatchNorm1d(options.input_channels * num_joints)
        inputs = (options.input_channels, *CHANNELS)
        self.st_gcn_networks = nn.ModuleList(
            Block(inputs[i], CHANNELS[i], num_subsets, STRIDES[i], options.dropout, is_first=i == 0)
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
        features = self.forward_features(x).mean(dim=(1, 3, 4))  # (N, C')
        logits: Tensor = self.fcn(features[:, :, None, None])
        return logits.flatten(1)

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, C, T, V, M) -> (N, M, C', T', V): the map that is averaged and classified."""
        clips, channels, frames, joints, people = x.shape
        x = x.permute(0, 4, 3, 1, 2).reshape(clips * people, joints * channels, frames)
        x = self.data_bn(x)
        x = x.reshape(clips * people, joints, channels, frames).permute(0, 2, 3, 1)  # (N*M, C, T, V)
        for i, block in enumerate(self.st_gcn_networks):
            x = block(x, self.A if self.edge_importance is None else self.A * self.edge_importance[i])
        return x.unflatten(0, (clips, people))


class Block(nn.Module):
    """Graph convolution, temporal convolution and a residual way round both, which the first block lacks."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_subsets: int,
        stride: int,
        dropout: float,
        is_first: bool,
    ) -> None:
        super().__init__()
        self.gcn = GraphConvolution(in_channels, out_channels, num_subsets)
        self.tcn = nn.Sequential(
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_channels, out_channels, (TEMPORAL_KERNEL, 1), (stride, 1), (TEMPORAL_KERNEL // 2, 0)),
            nn.BatchNorm2d(out_channels),
            nn.Identity() if is_first else nn.Dropout(dropout, inplace=True),
        )
        self.residual: nn.Module | None
        if is_first:
            self.residual = None
        elif in_channels == out_channels and stride == 1:
            self.residual = nn.Identity()
        else:
            self.residual = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=(stride, 1)),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        """(N, C, T, V), (K, V, V) -> (N, C', T', V)."""
        y: Tensor = self.tcn(self.gcn(x, adjacency))
        if self.residual is not None:
            y = y + self.residual(x)
        return functional.relu(y, inplace=True)


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
