"""models/folded.py restated in float64 NumPy, definition by definition, and random layers to try things on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from kinegraph.models.folded import (
    INPUT,
    AffineLayer,
    ConcatenationLayer,
    FoldedNetwork,
    GraphConvolutionLayer,
    Layer,
    Padding,
    SumLayer,
    TemporalConvolutionLayer,
    TemporalMaximumLayer,
)

Doubles = NDArray[np.float64]


def compute_plainly(network: FoldedNetwork, x: NDArray[np.float32]) -> tuple[Doubles, Doubles]:
    """Logits (N, classes) and features (N, M, T', V, C'), in float64, definition by definition."""
    results = {INPUT: x.astype(np.float64).transpose(0, 4, 2, 3, 1)}  # (N, M, T, V, C)
    for layer in network.layers:
        inputs = [results[name] for name in layer.inputs]
        y = apply_plainly(layer, inputs, causal=network.padding == "causal")
        results[layer.name] = np.maximum(y, 0) if layer.relu else y
    features = results[network.layers[-1].name]
    return features.mean(axis=(1, 2, 3)) @ network.head_weight.astype(np.float64) + network.head_bias, features


def apply_plainly(layer: Layer, inputs: list[Doubles], causal: bool) -> Doubles:
    x = inputs[0]
    frames = x.shape[2]
    match layer:
        case AffineLayer():
            return x * layer.scale + layer.shift
        case GraphConvolutionLayer():
            parts = [x, layer.adjacency.astype(np.float64), layer.weight.astype(np.float64)]
            return np.einsum("nmtvc,kvw,kcd->nmtwd", *parts, optimize=True) + layer.bias
        case TemporalConvolutionLayer():
            taps, _, channels = layer.weight.shape
            reach = (taps - 1) * layer.dilation
            before = reach if causal else reach // 2
            y = np.zeros((*x.shape[:2], -(-frames // layer.stride), x.shape[3], channels)) + layer.bias
            for t in range(y.shape[2]):
                for tap in range(taps):
                    source = t * layer.stride + tap * layer.dilation - before
                    if 0 <= source < frames:
                        y[:, :, t] += x[:, :, source] @ layer.weight[tap].astype(np.float64)
            return y
        case TemporalMaximumLayer():
            before = layer.size - 1 if causal else layer.size // 2
            starts = [t - before for t in range(0, frames, layer.stride)]
            return np.stack([x[:, :, max(0, s) : s + layer.size].max(axis=2) for s in starts], axis=2)
        case SumLayer():
            return sum(inputs[1:], start=x)
        case ConcatenationLayer():
            return np.concatenate(inputs, axis=-1)
    raise TypeError(layer)


class Weights:
    """Random layers. Weights are such that results stay about as large as inputs."""

    def __init__(self, seed: int = 0, joints: int = 5) -> None:
        self.random = np.random.default_rng(seed)
        self.joints = joints

    def draw(self, *shape: int, scale: float = 1.0) -> NDArray[np.float32]:
        return (self.random.standard_normal(shape) * scale).astype(np.float32)

    def affine(self, name: str, source: str, channels: int, relu: bool = False) -> AffineLayer:
        scale, shift = self.draw(self.joints, channels), self.draw(self.joints, channels)
        return AffineLayer(name, (source,), relu, scale=scale, shift=shift)

    def graph(
        self,
        name: str,
        source: str,
        channels: int,
        outputs: int,
        subsets: int = 3,
        density: float = 0.3,
        relu: bool = False,
    ) -> GraphConvolutionLayer:
        adjacency = self.draw(subsets, self.joints, self.joints)
        adjacency *= self.random.random(adjacency.shape) < density
        weight = self.draw(subsets, channels, outputs, scale=(channels * subsets) ** -0.5)
        bias = self.draw(self.joints, outputs)
        return GraphConvolutionLayer(name, (source,), relu, adjacency=adjacency, weight=weight, bias=bias)

    def temporal(
        self,
        name: str,
        source: str,
        channels: int,
        outputs: int,
        taps: int,
        stride: int = 1,
        dilation: int = 1,
        relu: bool = False,
    ) -> TemporalConvolutionLayer:
        weight = self.draw(taps, channels, outputs, scale=(channels * taps) ** -0.5)
        bias = self.draw(outputs)
        return TemporalConvolutionLayer(
            name, (source,), relu, weight=weight, bias=bias, stride=stride, dilation=dilation
        )

    def network(
        self, channels: int, layers: list[Layer], classes: int = 3, padding: Padding = "symmetric"
    ) -> FoldedNetwork:
        plan = FoldedNetwork(channels, self.joints, tuple(layers), self.draw(1, 1), self.draw(1))
        outputs = plan.count_channels()[layers[-1].name]
        head = self.draw(outputs, classes), self.draw(classes)
        return replace(plan, head_weight=head[0], head_bias=head[1], padding=padding)
