"""Networks whose map is the work of one block after another, each of which can be folded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from kinegraph.models.folded import INPUT, AffineLayer, FoldedNetwork, Layer, Padding
from kinegraph.models.layers import FrameNorm, fold_norm
from kinegraph.models.stages import PooledNetwork, normalise_joints

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kinegraph.spec import ModelSpec


class BlockNetwork(PooledNetwork):
    """The part that is alike: a normalisation of the input, blocks on (N, C, T, V) in channels_last memory, the fold.

    A network adds `blocks`, each with `fold(name, source) -> list[Layer]`, `dropout` and `fcn`.
    """

    A: Tensor
    blocks: nn.ModuleList

    def __init__(self, options: ModelSpec, adjacency: Tensor | NDArray[np.float32], num_channels: int) -> None:
        super().__init__()
        self.padding: Padding = options.temporal_padding
        weights = torch.as_tensor(adjacency, dtype=torch.float32).clone()
        self.register_buffer("A", weights)
        self.data_bn = FrameNorm(num_channels * weights.shape[-1])

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, C, T, V, M) -> (N, M, C', T', V): the map whose mean is classified."""
        clips, people = x.shape[0], x.shape[4]
        x = normalise_joints(x, self.data_bn).contiguous(memory_format=torch.channels_last)
        for block in self.blocks:
            x = block(x)
        return x.unflatten(0, (clips, people))

    def fold(self) -> FoldedNetwork:
        """The same network for inference, as plain data."""
        num_joints = int(self.A.shape[-1])
        scale, shift = fold_norm(torch.ones(1), torch.zeros(1), self.data_bn)
        shape = (num_joints, -1)
        layers: list[Layer] = [AffineLayer("data_bn", (INPUT,), scale=scale.reshape(shape), shift=shift.reshape(shape))]
        for i, block in enumerate(self.blocks):
            foldable: Any = block
            layers += foldable.fold(f"block_{i}", layers[-1].name)
        return FoldedNetwork(
            self.data_bn.num_features // num_joints,
            num_joints,
            tuple(layers),
            np.ascontiguousarray(self.fcn.weight.detach().T.numpy()),
            self.fcn.bias.detach().numpy().copy(),
            self.padding,
            only_real_frames=True,
        )
