"""One network for each input stream, whose answers are added: late fusion, in one model file.

The streams are trained side by side, each by its own loss, which is what training them one after the other gives, with
the same clips and random changes for all of them. Their logits are added with weights, as 2s-AGCN (Shi et al., CVPR
2019, section 3.4) and CTR-GCN (Chen et al., ICCV 2021) fuse their streams; `fit_fusion_weights` finds the weights on
validation clips. A sum of logits is one network with a linear head again, so every runtime can carry it out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from kinegraph.models.folded import INPUT, ConcatenationLayer, FoldedNetwork, Layer, choose_channels
from kinegraph.models.stages import MarkedNetwork

if TYPE_CHECKING:
    from kinegraph.models.folded import Padding

PULL = 1e-4
"""Towards equal weights, for validation clips that every stream answers right: they prefer no weights."""


class LateFusion(nn.Module):
    """`build(channels)` makes the network of one stream, for so many of the channels of a clip.

    weights: one for each stream; they are scaled to add up to 1. Empty: all the same.
    """

    fusion_weights: Tensor

    def __init__(
        self, build: Callable[[int], nn.Module], num_channels: int, num_streams: int, weights: Sequence[float]
    ) -> None:
        super().__init__()
        self.stream_channels = num_channels // num_streams
        self.branches = nn.ModuleList(build(self.stream_channels) for _ in range(num_streams))
        self.register_buffer("fusion_weights", torch.empty(num_streams))
        self.set_weights(weights or [1.0] * num_streams)

    def set_weights(self, weights: Sequence[float]) -> None:
        """Fix the weights of the streams, scaled to add up to 1."""
        given = torch.tensor(list(weights), dtype=torch.float32)
        self.fusion_weights.copy_(given / given.sum())

    @property
    def padding(self) -> Padding:
        """The temporal padding of the branches."""
        padding: Padding = self._first.padding
        return padding

    @property
    def _first(self) -> Any:
        return self.branches[0]

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, T, V, M) -> logits (N, classes); in training those of each stream (streams, N, classes), for a loss
        each.
        """
        logits = self.forward_branches(x)
        return logits if self.training else self.fuse(logits)

    def forward_branches(self, x: Tensor) -> Tensor:
        """(N, C, T, V, M) -> logits (streams, N, classes). Padding is what is zero in all streams."""
        parts = x.split(self.stream_channels, dim=1)
        answers = []
        for branch, part in zip(self.branches, parts, strict=True):
            network: Any = branch
            answers.append(network.classify(map_stream(network, part, x), x))
        return torch.stack(answers)

    def fuse(self, logits: Tensor) -> Tensor:
        """Logits (streams, N, classes) -> their weighted sum (N, classes)."""
        return torch.einsum("s,snk->nk", self.fusion_weights.to(logits.dtype), logits)


def map_stream(network: Any, part: Tensor, x: Tensor) -> Tensor:
    """The map of a network for its channels `part` of clips x (N, C, T, V, M); what is padding, all channels tell."""
    features: Tensor
    if isinstance(network, MarkedNetwork):
        features = network.forward_features(part, x)
    else:
        features = network.forward_features(part)
    return features


class FoldableLateFusion(LateFusion):
    """One of networks that can be folded."""

    def fold(self) -> FoldedNetwork:
        """The same network for inference, as plain data."""
        parts = [branch.fold() for branch in self.branches]  # type: ignore[operator]
        size, weights = self.stream_channels, self.fusion_weights.tolist()
        layers: list[Layer] = []
        for i, part in enumerate(parts):
            layers += _place_stream(part, f"stream_{i}", i * size, size * len(parts))
        ends = tuple(f"stream_{i}.{part.layers[-1].name}" for i, part in enumerate(parts))
        layers.append(ConcatenationLayer("streams", ends))
        head = np.concatenate([weight * part.head_weight for weight, part in zip(weights, parts, strict=True)])
        bias = np.sum([weight * part.head_bias for weight, part in zip(weights, parts, strict=True)], axis=0)
        return replace(
            parts[0],
            num_channels=size * len(parts),
            layers=tuple(layers),
            head_weight=head.astype(np.float32),
            head_bias=bias.astype(np.float32),
        )


def _place_stream(network: FoldedNetwork, name: str, first: int, num_channels: int) -> list[Layer]:
    """The layers of a stream's network, on its channels of all `num_channels`, under names of their own."""
    size = network.num_channels
    start = choose_channels(f"{name}.input", INPUT, first, size, num_channels)
    renamed = {INPUT: start.name} | {layer.name: f"{name}.{layer.name}" for layer in network.layers}
    return [start] + [
        replace(layer, name=renamed[layer.name], inputs=tuple(renamed[other] for other in layer.inputs))
        for layer in network.layers
    ]


def fit_fusion_weights(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits (streams, N, classes) and labels (N,) -> weights (streams,), none below 0, adding up to 1.

    Those of the least mean negative log likelihood of the sum, at the temperature that suits it best. Clips with a
    logit that is not finite are left out; without any other, all weigh the same.
    """
    is_finite = logits.isfinite().all(dim=2).all(dim=0)
    values, labels = logits[:, is_finite].double(), labels[is_finite]
    if not len(labels):
        return torch.full((len(logits),), 1 / len(logits))
    logarithms = torch.zeros(len(logits), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logarithms], max_iter=200, line_search_fn="strong_wolfe")

    def measure() -> Tensor:
        optimizer.zero_grad()
        total = torch.einsum("s,snk->nk", logarithms.exp(), values)
        loss = functional.cross_entropy(total, labels) + PULL * logarithms.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimizer.step(measure)  # type: ignore[no-untyped-call]
    return logarithms.detach().softmax(dim=0).float()
