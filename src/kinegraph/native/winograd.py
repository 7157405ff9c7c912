"""The transformed weights of temporal convolutions that source/winograd.h computes with fewer multiplications.

Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016. m outputs of a convolution with r taps are
A^T [(G w) * (B^T x)], one product for each of m + r - 1 points. Only G is needed here; B and A are in the C source.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kinegraph.models.folded import TemporalConvolutionLayer

MAX_TAPS = 9
# The last point is infinity in each
BLOCK_POINTS = (0.0, 1.0, -1.0, 2.0)
BLOCKS_POINTS = (0.0, 1.0, -1.0, 0.5, -2.0)
HALVED_POINTS = (0.0, 1.0, -1.0, 2.0, -2.0, 0.5, -0.5)


def transform_taps(points: Sequence[float], taps: int) -> NDArray[np.float64]:
    """G: (points and infinity, taps), after Cook and Toom: powers of each point over its distances to the others."""
    finite = np.array(points)
    distances = finite[:, None] - finite
    np.fill_diagonal(distances, 1)
    powers = finite[:, None] ** np.arange(taps)
    infinity = np.zeros((1, taps))
    infinity[0, -1] = 1
    return np.concatenate([powers / distances.prod(axis=1, keepdims=True), infinity])


def can_transform(layer: TemporalConvolutionLayer) -> bool:
    """Whether it has such a form and gains by it: transforms cost as much as some ten channels."""
    taps, *channels = layer.weight.shape
    if min(channels) < 16 or not 5 <= taps <= MAX_TAPS:
        return False
    return layer.stride == 1 or (layer.stride == 2 and layer.dilation == 1)


def transform_weight(layer: TemporalConvolutionLayer) -> NDArray[np.float32]:
    """Stride 1: (30, 1, C, C'); stride 2: (8, 2, C, C'), for even and odd taps."""
    taps, channels, outputs = layer.weight.shape
    weight = np.zeros((10, channels, outputs))
    weight[:taps] = layer.weight
    if layer.stride == 1:
        pieces = weight[:MAX_TAPS].reshape(3, 3, channels, outputs)
        block, blocks = transform_taps(BLOCK_POINTS, 3), transform_taps(BLOCKS_POINTS, 3)
        transformed = np.einsum("fi,gp,picd->fgcd", block, blocks, pieces, optimize=True)
        return np.ascontiguousarray(transformed.reshape(30, 1, channels, outputs), np.float32)
    phases = weight.reshape(5, 2, channels, outputs)
    transformed = np.einsum("fj,jpcd->fpcd", transform_taps(HALVED_POINTS, 5), phases, optimize=True)
    return np.ascontiguousarray(transformed, np.float32)
