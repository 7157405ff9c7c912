"""The network of 2s-AGCN: graphs that are given, learned, and made for each clip, added up.

Shi et al., Two-Stream Adaptive Graph Convolutional Networks for Skeleton-Based Action Recognition, CVPR 2019,
sections 3.2 and 3.3. Its two streams are joints and bones (section 3.4), a network each: input.streams [joint, bone]
with model.fusion late.

Frames of padding and absent people (all zeros) count neither in the graphs nor for their neighbours in time nor in the
mean that is classified: a clip and the same clip with padding have one answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from kinegraph.models.folded import Padding
from kinegraph.models.layers import FrameNorm, skip_frames
from kinegraph.models.stages import (
    BlockPlan,
    MarkedNetwork,
    build_shortcut,
    mark_frames,
    normalise_joints,
    plan_blocks,
    refuse_causal_padding,
    start_convolutions,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kinegraph.spec import ModelSpec

TEMPORAL_KERNEL = 9
EMBEDDING = 4
"""Channels of a block for each one that joints are compared by."""
SMALL_SCALE = 1e-6


class AGCN(MarkedNetwork):
    """options.width scales the channels of every stage, options.depth is the number of blocks in each, 0: 4, 3 and 3.

    adjacency: (K, V, V), the given graph. Raises SpecError for causal padding.
    """

    A: Tensor
    padding: Padding = "symmetric"

    def __init__(
        self,
        options: ModelSpec,
        adjacency: Tensor | NDArray[np.float32],
        num_classes: int,
        num_channels: int | None = None,
    ) -> None:
        super().__init__()
        refuse_causal_padding(options)
        num_channels = num_channels or options.input_channels
        weights = torch.as_tensor(adjacency, dtype=torch.float32).clone()
        self.register_buffer("A", weights)
        self.data_bn = FrameNorm(num_channels * weights.shape[-1])
        plans = plan_blocks(options, num_channels)
        self.blocks = nn.ModuleList(Block(plan, weights.shape, is_first=i == 0) for i, plan in enumerate(plans))
        self.dropout = nn.Dropout(options.dropout)
        self.fcn = nn.Linear(plans[-1].after, num_classes)
        start_convolutions(self)

    def forward_features(self, x: Tensor, marked_by: Tensor | None = None) -> Tensor:
        """(N, C, T, V, M) -> (N, M, C', T', V): the map whose mean is classified."""
        clips, people = x.shape[0], x.shape[4]
        is_real = mark_frames(x if marked_by is None else marked_by)
        x = normalise_joints(x, self.data_bn).contiguous(memory_format=torch.channels_last)
        for block in self.blocks:
            assert isinstance(block, Block)
            x = block(x, is_real, self.A)
            is_real = skip_frames(is_real, block.stride)
        return x.unflatten(0, (clips, people))


class Block(nn.Module):
    """Adaptive graph convolution, temporal convolution, and a way round both, which the first block lacks.

    Tensors are (N, C, T, V) in channels_last memory.
    """

    def __init__(self, plan: BlockPlan, graph_shape: torch.Size, is_first: bool) -> None:
        super().__init__()
        before, after, self.stride = plan.before, plan.after, plan.stride
        self.spatial = AdaptiveGraphConvolution(before, after, graph_shape)
        self.spatial_bn = nn.BatchNorm2d(after)
        nn.init.constant_(self.spatial_bn.weight, SMALL_SCALE)
        self.spatial_shortcut = build_shortcut(BlockPlan(before, after, 1))
        reach = TEMPORAL_KERNEL // 2
        self.temporal = nn.Conv2d(after, after, (TEMPORAL_KERNEL, 1), (self.stride, 1), (reach, 0), bias=False)
        self.temporal_bn = nn.BatchNorm2d(after)
        self.shortcut = None if is_first else build_shortcut(plan)

    def forward(self, x: Tensor, is_real: Tensor, adjacency: Tensor) -> Tensor:
        """(N, C, T, V), is_real (N, 1, T), adjacency (K, V, V) -> (N, C', T', V)."""
        y = self.spatial_bn(self.spatial(x, is_real, adjacency)) + self.spatial_shortcut(x)
        y = functional.relu(y, inplace=True) * is_real[..., None]
        y = self.temporal_bn(self.temporal(y))
        if self.shortcut is not None:
            y = y + self.shortcut(x)
        return functional.relu(y, inplace=True)


class AdaptiveGraphConvolution(nn.Module):
    """Equation 3 of the paper: the sum over k of W_k x (A_k + B_k + C_k), where A is given, B learned and C compares
    the joints of the clip (equation 4).

    The first embedding has no bias: it would add the same to all that the softmax compares.
    """

    def __init__(self, before: int, after: int, graph_shape: torch.Size) -> None:
        super().__init__()
        self.num_subsets = graph_shape[0]
        size = self.num_subsets * max(1, after // EMBEDDING)
        self.learned = nn.Parameter(torch.full(graph_shape, SMALL_SCALE))
        self.neighbours = nn.Conv2d(before, size, 1, bias=False)
        self.receivers = nn.Conv2d(before, size, 1)
        self.mapping = nn.Conv2d(self.num_subsets * before, after, 1, bias=False)

    def forward(self, x: Tensor, is_real: Tensor, adjacency: Tensor) -> Tensor:
        """(N, C, T, V), is_real (N, 1, T), adjacency (K, V, V) -> (N, C', T, V)."""
        clips, channels, frames, joints = x.shape
        topologies = adjacency + self.learned + self.compare(x, is_real)  # (N, K, v, w)
        rows = topologies.permute(0, 3, 1, 2).reshape(clips, 1, joints * self.num_subsets, joints)  # (w * k, v)
        batch = rows.expand(-1, frames, -1, -1).reshape(clips * frames, joints * self.num_subsets, joints)
        mixed = torch.bmm(batch, x.permute(0, 2, 3, 1).reshape(clips * frames, joints, channels))
        mixed = mixed.reshape(clips, frames, joints, self.num_subsets * channels).permute(0, 3, 1, 2)
        y: Tensor = self.mapping(mixed)
        return y

    def compare(self, x: Tensor, is_real: Tensor) -> Tensor:
        """(N, C, T, V), is_real (N, 1, T) -> C (N, K, V, V): how alike joints v and w are, adding up to 1 over v."""
        neighbours = self._embed(self.neighbours(x) * is_real[..., None])
        receivers = self._embed(self.receivers(x))
        size = self.receivers.out_channels // self.num_subsets
        count = is_real.sum(dim=2).clamp(min=1) * size
        alike = neighbours @ receivers.transpose(2, 3) / count[:, :, None, None]
        return alike.softmax(dim=2)

    def _embed(self, x: Tensor) -> Tensor:
        """(N, K*E, T, V) -> (N, K, V, E*T)."""
        return x.unflatten(1, (self.num_subsets, -1)).permute(0, 1, 4, 3, 2).flatten(3)
