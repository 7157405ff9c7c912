"""CTR-GCN: a graph for every channel, refined from a graph that all channels share.

Chen et al., Channel-wise Topology Refinement Graph Convolution for Skeleton-Based Action Recognition, ICCV 2021,
sections 3.2 and 3.3; its hyper-parameters are those of the paper and of its published configuration.

Frames of padding and absent people (all zeros) count neither in the graphs nor for their neighbours in time nor in the
mean that is classified: a clip and the same clip with padding have one answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from kinegraph.models.folded import Padding
from kinegraph.models.layers import FrameNorm, StridedPointwise, skip_frames
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

REDUCTION = 8
"""Channels of a map for each one that joints are compared by (section 3.2, r)."""
RELATIONS_OF_INPUT = 8
"""Channels that the joints of the first block, with few channels, are compared by."""
MOST_INPUT_CHANNELS = 16
NUM_BRANCHES = 4
TEMPORAL_KERNEL = 5
DILATIONS = (1, 2)
MAXIMUM_SIZE = 3
SMALL_SCALE = 1e-6


class CTRGCN(MarkedNetwork):
    """options.width scales the channels of every stage, options.depth is the number of blocks in each, 0: 4, 3 and 3.

    adjacency: (K, V, V), where the shared graphs of every block start. Raises SpecError for causal padding.
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
        self.blocks = nn.ModuleList(
            Block(plan, self.build_spatial(plan.before, plan.after, weights), is_first=i == 0)
            for i, plan in enumerate(plans)
        )
        self.dropout = nn.Dropout(options.dropout)
        self.fcn = nn.Linear(plans[-1].after, num_classes)
        start_convolutions(self)

    def build_spatial(self, before: int, after: int, adjacency: Tensor) -> nn.Module:
        """The graph convolution of a block: (N, C, T, V), is_real (N, 1, T) -> (N, C', T, V); adjacency (K, V, V)."""
        return RefinedGraphConvolution(before, after, adjacency)

    def forward_features(self, x: Tensor, marked_by: Tensor | None = None) -> Tensor:
        """(N, C, T, V, M) -> (N, M, C', T', V): the map whose mean is classified."""
        clips, people = x.shape[0], x.shape[4]
        is_real = mark_frames(x if marked_by is None else marked_by)
        x = normalise_joints(x, self.data_bn).contiguous()
        for block in self.blocks:
            assert isinstance(block, Block)
            x = block(x, is_real)
            is_real = skip_frames(is_real, block.stride)
        return x.unflatten(0, (clips, people))


class Block(nn.Module):
    """Graphs refined for each channel, temporal convolutions, and a way round both, which the first block lacks."""

    def __init__(self, plan: BlockPlan, spatial: nn.Module, is_first: bool) -> None:
        super().__init__()
        before, after, self.stride = plan.before, plan.after, plan.stride
        self.spatial = spatial
        self.spatial_bn = nn.BatchNorm2d(after)
        nn.init.constant_(self.spatial_bn.weight, SMALL_SCALE)
        self.spatial_shortcut = build_shortcut(BlockPlan(before, after, 1))
        self.temporal = TemporalUnit(after, self.stride)
        self.shortcut = None if is_first else build_shortcut(plan)

    def forward(self, x: Tensor, is_real: Tensor) -> Tensor:
        """(N, C, T, V), is_real (N, 1, T) -> (N, C', T', V)."""
        y = self.spatial_bn(self.spatial(x, is_real)) + self.spatial_shortcut(x)
        y = self.temporal(functional.relu(y, inplace=True), is_real)
        if self.shortcut is not None:
            y = y + self.shortcut(x)
        return functional.relu(y, inplace=True)


class RefinedGraphConvolution(nn.Module):
    """Equations 3 to 6 of the paper, summed over the K subsets.

    topology (K, V, V) is learned and shared by all channels. What refines it is tanh(M(a_w, b_v)) = tanh(a_w - b_v) of
    the receiving joint w and its neighbour v, where a and b are means over the frames, mapped to fewer channels.
    """

    def __init__(self, before: int, after: int, adjacency: Tensor) -> None:
        super().__init__()
        self.num_subsets = len(adjacency)
        relations = count_relations(before)
        self.topology = nn.Parameter(adjacency.clone())
        self.strength = nn.Parameter(torch.zeros(1))
        self.receivers = nn.Conv1d(before, self.num_subsets * relations, 1)
        self.neighbours = nn.Conv1d(before, self.num_subsets * relations, 1)
        self.refinement = nn.Conv1d(self.num_subsets * relations, self.num_subsets * after, 1, groups=self.num_subsets)
        self.mapping = nn.Conv2d(before, after * self.num_subsets, 1)

    def forward(self, x: Tensor, is_real: Tensor) -> Tensor:
        """(N, C, T, V), is_real (N, 1, T) -> (N, C', T, V)."""
        # The mean over frames comes first: maps are linear, so it is the same, and there is far less to map
        mean = average_frames(x, is_real)
        relations = relate_joints(self.receivers(mean), self.neighbours(mean), self.num_subsets)
        topologies = refine_topologies(self.topology, self.strength, self.refinement, relations)
        return gather_by_channel(self.mapping(x), topologies)


def count_relations(before: int) -> int:
    """How many channels the joints of a map with so many channels are compared by."""
    return RELATIONS_OF_INPUT if before <= MOST_INPUT_CHANNELS else max(1, before // REDUCTION)


def average_frames(x: Tensor, is_real: Tensor) -> Tensor:
    """(N, C, T, V), is_real (N, 1, T) -> the mean over real frames (N, C, V); zeros where no frame is real."""
    weights = is_real / is_real.sum(dim=2, keepdim=True).clamp(min=1)
    return torch.einsum("nctv,nt->ncv", x, weights[:, 0])


def relate_joints(receivers: Tensor, neighbours: Tensor, num_subsets: int) -> Tensor:
    """Both (N, K*R, V) -> tanh(a_w - b_v) (N, K, R, V, V) of receiver w and neighbour v at [v, w]."""
    a = receivers.unflatten(1, (num_subsets, -1))[..., None, :]
    b = neighbours.unflatten(1, (num_subsets, -1))[..., None]
    return torch.tanh(a - b)


def refine_topologies(topology: Tensor, strength: Tensor, refinement: nn.Conv1d, relations: Tensor) -> list[Tensor]:
    """topology (K, V, V), strength (1,), refinement of K groups from R to C' channels, relations (N, K, R, V, V) ->
    for each subset (N, C', V, V), equation 4: what joint v gives to joint w at [v, w].
    """
    num_subsets, joints, _ = topology.shape
    assert refinement.bias is not None
    weight = refinement.weight.unflatten(0, (num_subsets, -1)).squeeze(3)  # (K, C', R)
    bias = refinement.bias.unflatten(0, (num_subsets, -1))  # (K, C')
    flat = relations.flatten(3)
    topologies = []
    for k in range(num_subsets):
        shared = topology[k].flatten() + strength * bias[k][:, None]  # (C', V * V)
        refined = shared + torch.matmul(strength * weight[k], flat[:, k])
        topologies.append(refined.unflatten(2, (joints, joints)))
    return topologies


def gather_by_channel(mapped: Tensor, topologies: list[Tensor]) -> Tensor:
    """(N, C'*K, T, V) and for each of K subsets (N, C', V, V) -> their products, added up (N, C', T, V).

    Channels are in the order (C', K): each subset is then a batch of matrices that needs no copy.
    """
    clips, _, frames, joints = mapped.shape
    subsets = mapped.unflatten(1, (-1, len(topologies))).flatten(0, 1)  # (N*C', K, T, V)
    y = torch.bmm(subsets[:, 0], topologies[0].flatten(0, 1))
    for k in range(1, len(topologies)):
        y = torch.baddbmm(y, subsets[:, k], topologies[k].flatten(0, 1))
    return y.reshape(clips, -1, frames, joints)


class TemporalUnit(nn.Module):
    """Four branches of a quarter of the channels each: two dilated convolutions, a maximum, and the frame itself
    (section 3.3). The 1x1 convolutions of the first three are one, as are the normalisations behind all four.
    """

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        size = channels // NUM_BRANCHES
        self.reduction = nn.Conv2d(channels, size * (NUM_BRANCHES - 1), 1, bias=False)
        self.reduction_bn = nn.BatchNorm2d(size * (NUM_BRANCHES - 1))
        reach = TEMPORAL_KERNEL // 2
        self.dilated = nn.ModuleList(
            nn.Conv2d(size, size, (TEMPORAL_KERNEL, 1), (stride, 1), (reach * dilation, 0), (dilation, 1), bias=False)
            for dilation in DILATIONS
        )
        self.maximum = nn.MaxPool2d((MAXIMUM_SIZE, 1), (stride, 1), (MAXIMUM_SIZE // 2, 0))
        self.itself = StridedPointwise(channels, size, stride)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor, is_real: Tensor) -> Tensor:
        """(N, C, T, V), is_real (N, 1, T) -> (N, C, T', V)."""
        reduced = functional.relu(self.reduction_bn(self.reduction(x)), inplace=True)
        # Zeros here do to a frame beside them what the end of a clip does, in the maximum too: nothing is below zero
        reduced = reduced * is_real[..., None]
        *parts, last = reduced.chunk(NUM_BRANCHES - 1, dim=1)
        branches = [convolve(part) for convolve, part in zip(self.dilated, parts, strict=True)]
        y: Tensor = self.norm(torch.cat([*branches, self.maximum(last), self.itself(x)], dim=1))
        return y
