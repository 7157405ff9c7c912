"""TD-GCN: the graphs of CTR-GCN for every channel, and beside them a graph for every frame.

Liu et al., Temporal Decoupling Graph Convolutional Network for Skeleton-based Gesture Recognition, IEEE Transactions on
Multimedia, 2023; where weights start is read in the authors' implementation. Blocks and the temporal unit are those of
CTR-GCN, and so is the treatment of padding: the graph of a frame is made from that frame alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from kinegraph.models.ctr_gcn import (
    CTRGCN,
    average_frames,
    count_relations,
    gather_by_channel,
    refine_topologies,
    relate_joints,
)

WEIGHT_OF_CHANNELS = 0.5
WEIGHT_OF_FRAMES = 0.1
"""What both sums weigh before training."""


class TDGCN(CTRGCN):
    """options, adjacency and errors as in CTRGCN."""

    def build_spatial(self, before: int, after: int, adjacency: Tensor) -> nn.Module:
        """The graph convolution of a block: (N, C, T, V), is_real (N, 1, T) -> (N, C', T, V); adjacency (K, V, V)."""
        return DecoupledGraphConvolution(before, after, adjacency)


class DecoupledGraphConvolution(nn.Module):
    """The sum over K subsets of two ways to gather the mapped joints, each with a learned weight.

    By channel: as in CTR-GCN, but one embedding stands for receivers and neighbours: tanh(a_w - a_v). By frame: with
    the graph tanh(m_w - m_v), where m is the mean of the mapped channels in that frame. In neither difference would a
    bias remain.
    """

    def __init__(self, before: int, after: int, adjacency: Tensor) -> None:
        super().__init__()
        self.num_subsets = len(adjacency)
        size = self.num_subsets * count_relations(before)
        self.topology = nn.Parameter(adjacency.clone())
        self.strength = nn.Parameter(torch.zeros(1))
        self.channel_weight = nn.Parameter(torch.full((1,), WEIGHT_OF_CHANNELS))
        self.frame_weight = nn.Parameter(torch.full((1,), WEIGHT_OF_FRAMES))
        self.embedding = nn.Conv1d(before, size, 1, bias=False)
        self.refinement = nn.Conv1d(size, self.num_subsets * after, 1, groups=self.num_subsets)
        self.mapping = nn.Conv2d(before, after * self.num_subsets, 1)

    def forward(self, x: Tensor, is_real: Tensor) -> Tensor:
        """(N, C, T, V), is_real (N, 1, T) -> (N, C', T, V)."""
        embedded = self.embedding(average_frames(x, is_real))
        relations = relate_joints(embedded, embedded, self.num_subsets)
        # Weighed before joints are gathered: graphs are smaller than maps
        topology, strength = self.channel_weight * self.topology, self.channel_weight * self.strength
        topologies = refine_topologies(topology, strength, self.refinement, relations)
        mapped = self.mapping(x)
        return gather_by_channel(mapped, topologies) + self._gather_by_frame(mapped, self.relate_in_frames(x))

    def relate_in_frames(self, x: Tensor) -> Tensor:
        """(N, C, T, V) -> (N, T, K, V, V): what joint v gives to joint w in a frame, at [v, w], unweighed."""
        # The mean over channels comes first, as that over frames does
        weight = self.mapping.weight.unflatten(0, (-1, self.num_subsets)).mean(dim=0)  # (K, C, 1, 1)
        mean = functional.conv2d(x, weight).transpose(1, 2)  # (N, T, K, V)
        return torch.tanh(mean[..., None, :] - mean[..., None])

    def _gather_by_frame(self, mapped: Tensor, topologies: Tensor) -> Tensor:
        """(N, C'*K, T, V), (N, T, K, V, V) -> (N, C', T, V)."""
        subsets = mapped.unflatten(1, (-1, self.num_subsets)).permute(0, 3, 1, 2, 4)  # (N, T, C', K, V)
        graphs = (self.frame_weight * topologies).flatten(2, 3)
        return torch.matmul(subsets.flatten(3), graphs).transpose(1, 2)
