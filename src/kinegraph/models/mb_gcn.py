"""MB-GCN: a branch of blocks for each stream, which meet in the middle; each branch also learns to answer alone.

From others: input branches that are fused before the main part of one network (EfficientGCN, Song et al., TPAMI 2022,
section 3.2), and losses at a layer in the middle (Deeply-Supervised Nets, Lee et al., AISTATS 2015). The blocks are
those of EF-GCN. docs/decisions/0013-mb-gcn.md has what it was measured against.

Frames of padding and absent people (all zeros) do not count in the mean that is classified.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from kinegraph.models.block_network import BlockNetwork
from kinegraph.models.ef_gcn import build_blocks
from kinegraph.models.folded import ConcatenationLayer, FoldedNetwork, Layer, choose_channels
from kinegraph.models.layers import mean_over_real_frames
from kinegraph.models.stages import normalise_joints, scale_channels

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kinegraph.spec import ModelSpec

BRANCH_STAGES = (32, 32)
"""Channels of each branch; the second stage begins with stride 2."""
MAIN_STAGES = (128,)
"""Channels after the branches have met; each stage begins with stride 2."""
BRANCH_STRIDE = 2 ** (len(BRANCH_STAGES) - 1)
TOTAL_STRIDE = BRANCH_STRIDE * 2 ** len(MAIN_STAGES)


class MBGCN(BlockNetwork):
    """options.width scales the channels of every stage, options.depth is the number of blocks in each, 0: 2.

    A stream is options.input_channels channels, in the order of the channels. The branches' own heads are used in
    training only; a single stream has none.
    """

    total_stride = TOTAL_STRIDE

    def __init__(
        self,
        options: ModelSpec,
        adjacency: Tensor | NDArray[np.float32],
        num_classes: int,
        num_channels: int | None = None,
    ) -> None:
        num_channels = num_channels or options.input_channels
        super().__init__(options, adjacency, num_channels)
        num_streams = max(1, num_channels // options.input_channels)
        self.stream_channels = num_channels // num_streams
        self.branches = nn.ModuleList(
            build_blocks(options, self.A, self.stream_channels, BRANCH_STAGES, 1) for _ in range(num_streams)
        )
        branch_channels = scale_channels(BRANCH_STAGES[-1], options)
        self.blocks = build_blocks(options, self.A, num_streams * branch_channels, MAIN_STAGES, 2)
        self.dropout = nn.Dropout(options.dropout)
        self.fcn = nn.Linear(scale_channels(MAIN_STAGES[-1], options), num_classes)
        heads = num_streams if num_streams > 1 else 0
        self.branch_heads = nn.ModuleList(nn.Linear(branch_channels, num_classes) for _ in range(heads))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, T, V, M) -> logits (N, classes); in training those of the network and of each branch (1 + streams, N,
        classes), for a loss each.
        """
        if not self.training or not self.branch_heads:
            return super().forward(x)
        parts = self._run_branches(x)
        answers = [self.classify(self._run_main(parts, x), x)]
        for part, head in zip(parts, self.branch_heads, strict=True):
            features = part.unflatten(0, (x.shape[0], x.shape[4]))
            answers.append(head(self.dropout(mean_over_real_frames(features, x, BRANCH_STRIDE))))
        return torch.stack(answers)

    def fuse(self, logits: Tensor) -> Tensor:
        """What `forward` gives in training -> the answers of the network (N, classes)."""
        return logits[0]

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, C, T, V, M) -> (N, M, C', T', V): the map whose mean is classified."""
        return self._run_main(self._run_branches(x), x)

    def _run_branches(self, x: Tensor) -> list[Tensor]:
        """Clips -> a map (N*M, C', T', V) of each branch."""
        streams = normalise_joints(x, self.data_bn).split(self.stream_channels, dim=1)
        parts = []
        for stream, branch in zip(streams, self.branches, strict=True):
            y = stream.contiguous(memory_format=torch.channels_last)
            blocks: Any = branch
            for block in blocks:
                y = block(y)
            parts.append(y)
        return parts

    def _run_main(self, parts: list[Tensor], x: Tensor) -> Tensor:
        y = torch.cat(parts, dim=1).contiguous(memory_format=torch.channels_last)
        for block in self.blocks:
            y = block(y)
        return y.unflatten(0, (x.shape[0], x.shape[4]))

    def fold(self) -> FoldedNetwork:
        """The same network for inference, as plain data."""
        start = super().fold()
        norm, main = start.layers[0], start.layers[1:]
        layers: list[Layer] = [norm]
        ends = []
        for i, branch in enumerate(self.branches):
            source = norm.name
            if len(self.branches) > 1:
                size, total = self.stream_channels, self.stream_channels * len(self.branches)
                layers.append(choose_channels(f"branch_{i}.input", source, i * size, size, total))
                source = layers[-1].name
            blocks: Any = branch
            for j, block in enumerate(blocks):
                layers += block.fold(f"branch_{i}.block_{j}", source)
                source = layers[-1].name
            ends.append(source)
        if len(ends) > 1:
            layers.append(ConcatenationLayer("branches", tuple(ends)))
        # The blocks after the branches were written as if the normalisation came before them
        moved = {norm.name: layers[-1].name}
        met = [replace(layer, inputs=tuple(moved.get(name, name) for name in layer.inputs)) for layer in main]
        return replace(start, layers=(*layers, *met))
