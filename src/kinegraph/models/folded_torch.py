"""A folded network carried out by PyTorch, channels last: every mixing of channels is one matrix product.

Inside, clips are (N, T, V, C), N clips x people.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

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
from kinegraph.models.layers import mean_over_real_frames, mix_joints
from kinegraph.models.mixing_order import mixes_joints_first


class FoldedModel(nn.Module):
    """Answers as the network that was folded does in evaluation mode."""

    head_weight: Tensor
    head_bias: Tensor

    def __init__(self, network: FoldedNetwork) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_build(layer, network.padding) for layer in network.layers)
        self.names = [layer.name for layer in network.layers]
        self.inputs = [layer.inputs for layer in network.layers]
        self.last_use = {name: i for i, names in enumerate(self.inputs) for name in names}
        self.only_real_frames = network.only_real_frames
        self.total_stride = network.find_strides()[network.layers[-1].name]
        self.register_buffer("head_weight", _tensor(network.head_weight))
        self.register_buffer("head_bias", _tensor(network.head_bias))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, T, V, M) -> (N, classes)."""
        clips, people = x.shape[0], x.shape[4]
        features = self.forward_features(x.permute(0, 4, 2, 3, 1).flatten(0, 1))  # (N*M, T', V, C')
        if self.only_real_frames:
            by_person = features.unflatten(0, (clips, people)).permute(0, 1, 4, 2, 3)  # (N, M, C', T', V)
            features = mean_over_real_frames(by_person, x, self.total_stride)
        else:
            features = features.mean(dim=(1, 2)).unflatten(0, (clips, people)).mean(dim=1)
        return torch.addmm(self.head_bias, features, self.head_weight)

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, T, V, C) -> (N, T', V, C')."""
        results = {INPUT: x}
        for i, (name, inputs, layer) in enumerate(zip(self.names, self.inputs, self.layers, strict=True)):
            results[name] = layer(*(results[source] for source in inputs))
            for source in inputs:
                if self.last_use[source] == i:
                    results.pop(source, None)
        return results[self.names[-1]]


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).clone()


def _build(layer: Layer, padding: Padding) -> nn.Module:
    match layer:
        case AffineLayer():
            return _Affine(layer)
        case GraphConvolutionLayer():
            return _GraphConvolution(layer)
        case TemporalConvolutionLayer():
            return _TemporalConvolution(layer, padding)
        case TemporalMaximumLayer():
            return _TemporalMaximum(layer, padding)
        case SumLayer():
            return _Sum(layer)
        case ConcatenationLayer():
            return _Concatenation(layer)
    raise TypeError(type(layer).__name__)


def _activate(x: Tensor, relu: bool) -> Tensor:
    return x.relu_() if relu else x


class _Affine(nn.Module):
    scale: Tensor
    shift: Tensor

    def __init__(self, layer: AffineLayer) -> None:
        super().__init__()
        self.relu = layer.relu
        self.register_buffer("scale", _tensor(layer.scale))
        self.register_buffer("shift", _tensor(layer.shift))

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, V, C) -> the same shape."""
        return _activate(torch.addcmul(self.shift, x, self.scale), self.relu)


class _GraphConvolution(nn.Module):
    """Joints first where that leaves fewer products, else channels first: both are exact."""

    mixing: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self, layer: GraphConvolutionLayer) -> None:
        super().__init__()
        self.relu = layer.relu
        subsets, before, after = layer.weight.shape
        num_joints = layer.adjacency.shape[1]
        self.joints_first = mixes_joints_first(layer)
        # Rows (w, k) of the product with (V, C) give (w, k * C): the form that the product of channels needs
        mixing = layer.adjacency.transpose(2, 0, 1)  # (w, k, v)
        if self.joints_first:
            self.register_buffer("mixing", _tensor(mixing.reshape(num_joints * subsets, num_joints)))
            self.register_buffer("weight", _tensor(layer.weight.reshape(subsets * before, after)))
        else:
            self.register_buffer("mixing", _tensor(mixing.transpose(0, 2, 1).reshape(num_joints, num_joints * subsets)))
            self.register_buffer("weight", _tensor(layer.weight.transpose(1, 0, 2).reshape(before, subsets * after)))
        self.register_buffer("bias", _tensor(layer.bias))

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, V, C) -> (N, T, V, C')."""
        clips, frames, joints, _ = x.shape
        if self.joints_first:
            mixed = mix_joints(self.mixing, x)  # (N, T, w * k, C)
            y = mixed.reshape(clips, frames, joints, self.weight.shape[0]) @ self.weight
        else:
            mapped = (x @ self.weight).reshape(clips, frames, -1, self.bias.shape[1])  # (N, T, v * k, C')
            y = mix_joints(self.mixing, mapped)
        return _activate(y + self.bias, self.relu)


class _TemporalConvolution(nn.Module):
    weight: Tensor
    bias: Tensor

    def __init__(self, layer: TemporalConvolutionLayer, padding: Padding) -> None:
        super().__init__()
        self.relu, self.stride, self.dilation = layer.relu, layer.stride, layer.dilation
        taps = layer.weight.shape[0]
        reach = (taps - 1) * layer.dilation
        self.before = reach if padding == "causal" else reach // 2
        self.after = reach - self.before
        self.is_pointwise = taps == 1
        weight = _tensor(layer.weight)  # (k, C, C')
        if not self.is_pointwise:
            weight = weight.permute(2, 1, 0)[..., None].contiguous(memory_format=torch.channels_last)  # (C', C, k, 1)
        self.register_buffer("weight", weight[0] if self.is_pointwise else weight)
        self.register_buffer("bias", _tensor(layer.bias))

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, V, C) -> (N, ceil(T / stride), V, C')."""
        if self.is_pointwise:
            return _activate(x[:, :: self.stride] @ self.weight + self.bias, self.relu)
        symmetric = self.before == self.after
        if not symmetric:
            x = functional.pad(x, (0, 0, 0, 0, self.before, self.after))
        x = x.permute(0, 3, 1, 2)  # (N, C, T, V), in the memory of channels_last
        padding = (self.before if symmetric else 0, 0)
        y = functional.conv2d(x, self.weight, self.bias, (self.stride, 1), padding, (self.dilation, 1))
        return _activate(y, self.relu).permute(0, 2, 3, 1)


class _TemporalMaximum(nn.Module):
    def __init__(self, layer: TemporalMaximumLayer, padding: Padding) -> None:
        super().__init__()
        self.relu, self.size, self.stride = layer.relu, layer.size, layer.stride
        self.before = layer.size - 1 if padding == "causal" else layer.size // 2
        self.after = layer.size - 1 - self.before

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, V, C) -> (N, ceil(T / stride), V, C)."""
        padded = functional.pad(x, (0, 0, 0, 0, self.before, self.after), value=-torch.inf)
        frames = padded.unfold(1, self.size, self.stride)  # (N, T', V, C, size)
        return _activate(frames.amax(dim=-1), self.relu)


class _Sum(nn.Module):
    def __init__(self, layer: SumLayer) -> None:
        super().__init__()
        self.relu = layer.relu

    def forward(self, first: Tensor, *others: Tensor) -> Tensor:
        """Tensors of one shape -> their sum."""
        total = first + others[0]
        for other in others[1:]:
            total = total + other
        return _activate(total, self.relu)


class _Concatenation(nn.Module):
    def __init__(self, layer: ConcatenationLayer) -> None:
        super().__init__()
        self.relu = layer.relu

    def forward(self, *parts: Tensor) -> Tensor:
        """(N, T, V, C) each -> (N, T, V, sum of C)."""
        return _activate(torch.cat(parts, dim=-1), self.relu)
