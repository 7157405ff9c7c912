"""int8: activations as unsigned bytes with one scale for a layer, weights as signed bytes with one for each channel.

The ranges of activations are in models/quantization.py. A byte q stands for (q - zero_point) * scale.
Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference, CVPR 2018.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kinegraph.models.folded import FoldedNetwork, GraphConvolutionLayer, TemporalConvolutionLayer

MAX_RANGE = 1e30
# Below, products of bytes are too short to pay: first layers read three channels
FEWEST_CHANNELS = 16
# What of the largest weight still has a byte of its own; the rest is cut off. The best for each channel is taken.
CUTS = tuple(np.linspace(1.0, 0.6, 17))


@dataclass(frozen=True)
class Scale:
    """How bytes stand for numbers; zero is exact."""

    scale: float
    zero_point: int

    @classmethod
    def of_range(cls, smallest: float, largest: float) -> Scale:
        """Zero is always in the range. Raises ValueError for a range that is none."""
        if not (np.isfinite([smallest, largest]).all() and smallest <= largest and largest - smallest <= MAX_RANGE):
            raise ValueError(f"({smallest}, {largest})")
        low, high = min(0.0, smallest), max(0.0, largest)
        scale = max((high - low) / 255, 1e-30)
        return cls(scale, min(255, round(-low / scale)))


def quantize_weight(weight: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float64]]:
    """(..., C') -> the same as int8, and what a step of each channel is worth (C',): least squared error."""
    columns = weight.astype(np.float64).reshape(-1, weight.shape[-1])
    largest = np.abs(columns).max(axis=0, initial=0.0)
    largest[largest == 0] = 1
    best = np.full(columns.shape[1], np.inf)
    steps = largest / 127
    for cut in CUTS:
        candidate = largest * cut / 127
        error = np.square(np.clip(np.rint(columns / candidate), -127, 127) * candidate - columns).sum(axis=0)
        better = error < best
        best[better], steps[better] = error[better], candidate[better]
    quantized = np.clip(np.rint(columns / steps), -127, 127).astype(np.int8)
    return quantized.reshape(weight.shape), steps


def find_byte_layers(network: FoldedNetwork) -> set[str]:
    """Names of the convolutions that are computed on bytes."""
    channels = network.count_channels()
    convolutions = GraphConvolutionLayer | TemporalConvolutionLayer
    return {
        layer.name
        for layer in network.layers
        if isinstance(layer, convolutions) and channels[layer.inputs[0]] >= FEWEST_CHANNELS
    }
