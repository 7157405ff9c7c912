"""A network rewritten for inference, as plain data: layers with NumPy weights that every runtime can carry out.

Exact for trained weights: batch normalisations are folded into the convolutions beside them, edge importance is
multiplied into the adjacency, dropout is gone. A network that can be written this way has a method `fold`. PyTorch
(models/folded_torch.py), ONNX files, the native kernels and the step by step form all follow this description, so that
they compute the same.

Shapes here are (T, V, C) for one person: frames, joints, channels. K subsets, k taps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Values = NDArray[np.floating]
Padding = Literal["symmetric", "causal"]
INPUT = "input"


@dataclass(frozen=True, eq=False)
class Layer:
    """`inputs` name earlier layers, or INPUT; `name` is unique in a network. `relu`: negative results become zero."""

    name: str
    inputs: tuple[str, ...]
    relu: bool = False


@dataclass(frozen=True, eq=False)
class AffineLayer(Layer):
    """y[t, v, c] = x[t, v, c] * scale[v, c] + shift[v, c]. Both (V, C)."""

    scale: Array = None  # type: ignore[assignment]
    shift: Array = None  # type: ignore[assignment]


@dataclass(frozen=True, eq=False)
class GraphConvolutionLayer(Layer):
    """y[t, w, d] = sum over k, v, c of x[t, v, c] * adjacency[k, v, w] * weight[k, c, d] + bias[w, d].

    adjacency (K, V, V), weight (K, C, C'), bias (V, C'). Few entries of the adjacency differ from zero unless it was
    learned.
    """

    adjacency: Array = None  # type: ignore[assignment]
    weight: Array = None  # type: ignore[assignment]
    bias: Array = None  # type: ignore[assignment]


@dataclass(frozen=True, eq=False)
class TemporalConvolutionLayer(Layer):
    """y[t, v, d] = sum over tap i and c of x[t * stride + i * dilation - before, v, c] * weight[i, c, d] + bias[d].

    weight (k, C, C'), bias (C',). Frames outside the clip count as zero: `before` of them at the start, which is
    (k - 1) * dilation with causal padding and half of that (k is odd) with symmetric padding; the result has
    ceil(T / stride) frames. One tap is a 1x1 convolution.
    """

    weight: Array = None  # type: ignore[assignment]
    bias: Array = None  # type: ignore[assignment]
    stride: int = 1
    dilation: int = 1


def choose_channels(name: str, source: str, first: int, size: int, num_channels: int) -> TemporalConvolutionLayer:
    """`size` of the `num_channels` channels of a layer, from `first` on, as a convolution of one tap."""
    chosen = np.zeros((1, num_channels, size), np.float32)
    chosen[0, first + np.arange(size), np.arange(size)] = 1
    return TemporalConvolutionLayer(name, (source,), weight=chosen, bias=np.zeros(size, np.float32))


@dataclass(frozen=True, eq=False)
class TemporalMaximumLayer(Layer):
    """The largest of `size` frames around (symmetric) or up to (causal) each frame; frames outside do not count."""

    size: int = 3
    stride: int = 1


@dataclass(frozen=True, eq=False)
class SumLayer(Layer):
    """The sum of inputs of one shape."""


@dataclass(frozen=True, eq=False)
class ConcatenationLayer(Layer):
    """The channels of the inputs one after the other."""


@dataclass(frozen=True, eq=False)
class FoldedNetwork:
    """Layers in an order in which each comes after its inputs. The mean of the last one over people, frames and joints
    goes through the head: head_weight (C', classes), head_bias (classes,).
    """

    num_channels: int
    num_joints: int
    layers: tuple[Layer, ...]
    head_weight: Array
    head_bias: Array
    padding: Padding = "symmetric"
    only_real_frames: bool = False
    """The mean leaves out people without a value that is not zero, and of each the frames after the last such value."""

    @property
    def num_classes(self) -> int:
        return len(self.head_bias)

    def count_channels(self) -> dict[str, int]:
        """Layer name -> channels of its result."""
        channels = {INPUT: self.num_channels}
        for layer in self.layers:
            match layer:
                case GraphConvolutionLayer() | TemporalConvolutionLayer():
                    channels[layer.name] = layer.weight.shape[2]
                case ConcatenationLayer():
                    channels[layer.name] = sum(channels[name] for name in layer.inputs)
                case _:
                    channels[layer.name] = channels[layer.inputs[0]]
        return channels

    def find_strides(self) -> dict[str, int]:
        """Layer name -> how many input frames lie between two frames of its result."""
        strides = {INPUT: 1}
        for layer in self.layers:
            own = layer.stride if isinstance(layer, TemporalConvolutionLayer | TemporalMaximumLayer) else 1
            strides[layer.name] = strides[layer.inputs[0]] * own
        return strides

    def count_multiply_adds(self, num_frames: int) -> int:
        """Multiplications with an addition for a clip of one person, with the zeros of each adjacency left out."""
        channels, strides = self.count_channels(), self.find_strides()
        total = self.head_weight.size
        for layer in self.layers:
            cells = -(-num_frames // strides[layer.name]) * self.num_joints
            match layer:
                case GraphConvolutionLayer():
                    links = int(np.count_nonzero(layer.adjacency)) / self.num_joints
                    subsets, before, after = layer.weight.shape
                    total += int(cells * (links * min(before, after) + subsets * before * after))
                case TemporalConvolutionLayer():
                    total += cells * layer.weight.size
                case AffineLayer():
                    total += cells * channels[layer.name]
        return total


def fold_batch_norm(parts: Sequence[Values], epsilon: float) -> tuple[Array, Array]:
    """Weight (..., C') and bias (..., C') of a convolution that does what it and a batch normalisation after it did.

    parts: weight and bias of the convolution, then scale, shift, mean and variance of the normalisation, each (C',):
    y = (x - mean) / sqrt(variance + epsilon) * scale + shift (Ioffe and Szegedy, 2015). Computed in float64.
    """
    weight, bias, scale, shift, mean, variance = (np.asarray(part, np.float64) for part in parts)
    factor = scale / np.sqrt(variance + epsilon)
    folded_bias = (bias - mean) * factor + shift
    return np.ascontiguousarray(weight * factor, np.float32), np.ascontiguousarray(folded_bias, np.float32)
