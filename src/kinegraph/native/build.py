"""A folded network handed to the kernels layer by layer, in floats or in bytes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kinegraph.errors import Problem, UserError
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
from kinegraph.models.quantization import Quantization
from kinegraph.native.graph import Links, plan_graph
from kinegraph.native.quantization import Scale, find_byte_layers, quantize_weight
from kinegraph.native.winograd import can_transform, transform_weight

if TYPE_CHECKING:
    from kinegraph.native import _kernels

    # to_bytes, what a byte of the residual is worth, zero point of the result, byte that stands for 0 in the input
    Rescaling = tuple[bool, float, float, int]

NO_RESULT = -1
NOTHING = np.empty(0, np.float32)
MAX_LINKS = 1_000_000
"""Pairs of joints with a weight, of all subsets of all graph convolutions: a plan takes some microseconds for each."""


class Builder:
    """Adds layer after layer. A sum of two is left to the convolution before it where nothing else reads that one.

    With a quantization, results exist as floats, as bytes, or as both, each made when a layer first needs it.
    """

    def __init__(self, kernels: _kernels.Network, network: FoldedNetwork, quantization: Quantization | None) -> None:
        self.kernels = kernels
        self.network = network
        self.floats = {INPUT: 0}
        self.bytes: dict[str, int] = {}
        self.layers = {layer.name: layer for layer in network.layers}
        self.byte_layers = find_byte_layers(network) if quantization else set[str]()
        self.scales = _find_scales(network, quantization) if quantization else {}
        self.joined = _find_joined(network)

    def build(self) -> None:
        """Raises UserError where a range of an activation is missing or none, ValueError beyond MAX_LINKS."""
        graphs = [layer.adjacency for layer in self.network.layers if isinstance(layer, GraphConvolutionLayer)]
        links = sum(np.count_nonzero(adjacency) for adjacency in graphs)
        if links > MAX_LINKS:
            raise ValueError(f"{links} links between joints, more than {MAX_LINKS}")
        postponed = {sum_name: name for name, sum_name in self.joined.items()}
        for layer in self.network.layers:
            if layer.name in self.joined:
                continue
            if layer.name in postponed:
                convolution = self.layers[postponed[layer.name]]
                other = next(name for name in layer.inputs if name != convolution.name)
                self._add(replace(convolution, relu=layer.relu), layer.name, other)
            else:
                self._add(layer, layer.name, None)
        self._get_floats(self.network.layers[-1].name)
        head = _floats(self.network.head_weight)
        bias = _floats(self.network.head_bias)
        self.kernels.add_head(head.shape[1], self.network.only_real_frames, head, bias)

    def _get_floats(self, name: str) -> int:
        if name not in self.floats:
            scale = self.scales[name]
            number = self.kernels.add_conversion(self.bytes[name], False, scale.scale, scale.zero_point)
            self.floats[name] = number
        return self.floats[name]

    def _get_bytes(self, name: str) -> int:
        if name not in self.bytes:
            scale = self.scales[name]
            number = self.kernels.add_conversion(self.floats[name], True, 1 / scale.scale, scale.zero_point)
            self.bytes[name] = number
        return self.bytes[name]

    def _add(self, layer: Layer, result: str, residual: str | None) -> None:
        if layer.name in self.byte_layers:
            if isinstance(layer, GraphConvolutionLayer):
                self._add_byte_graph(layer, result, residual)
            elif isinstance(layer, TemporalConvolutionLayer):
                self._add_byte_temporal(layer, result, residual)
            return
        sources = tuple(self._get_floats(name) for name in layer.inputs)
        before = NO_RESULT if residual is None else self._get_floats(residual)
        self.floats[result] = self._add_floats(layer, sources, before)

    def _add_floats(self, layer: Layer, sources: tuple[int, ...], residual: int) -> int:
        match layer:
            case AffineLayer():
                return self.kernels.add_affine(sources[0], layer.relu, _floats(layer.scale), _floats(layer.shift))
            case GraphConvolutionLayer():
                return self._add_graph(layer, sources[0], residual)
            case TemporalConvolutionLayer():
                return self._add_temporal(layer, sources[0], residual)
            case TemporalMaximumLayer():
                before = _count_before(layer.size, 1, self.network.padding)
                return self.kernels.add_maximum(sources[0], layer.relu, layer.size, layer.stride, before)
            case SumLayer() | ConcatenationLayer():
                return self.kernels.add_joined(sources, layer.relu, isinstance(layer, SumLayer))
        raise TypeError(type(layer).__name__)

    def _add_graph(self, layer: GraphConvolutionLayer, source: int, residual: int) -> int:
        plan = plan_graph(layer)
        parts = tuple(
            (
                part.rows,
                len(part.subsets),
                *_pack_links(part.mixing),
                _floats(layer.weight[list(part.subsets)]),
                NOTHING,
            )
            for part in plan.parts
        )
        channels, bias = layer.weight.shape[2], _floats(layer.bias)
        return self.kernels.add_graph(
            source, residual, layer.relu, channels, bias, parts, *_pack_links(plan.combination), None
        )

    def _add_temporal(self, layer: TemporalConvolutionLayer, source: int, residual: int) -> int:
        is_winograd = can_transform(layer)
        weight = transform_weight(layer) if is_winograd else _floats(layer.weight)
        channels, bias = layer.weight.shape[2], _floats(layer.bias)
        geometry = self._describe(layer)
        return self.kernels.add_temporal(
            source, residual, layer.relu, is_winograd, channels, geometry, weight, NOTHING, bias, None
        )

    def _describe(self, layer: TemporalConvolutionLayer) -> tuple[int, int, int, int]:
        taps = layer.weight.shape[0]
        return taps, layer.stride, layer.dilation, _count_before(taps, layer.dilation, self.network.padding)

    def _add_byte_graph(self, layer: GraphConvolutionLayer, result: str, residual: str | None) -> None:
        """On bytes, sums of joints come after the products, in float: a sum before would have to be rounded."""
        plan = plan_graph(layer, only_after=True)
        source = self.scales[layer.inputs[0]]
        step, rescaling, shift, before = self._rescale(layer, result, residual)
        parts = []
        bias = layer.bias.astype(np.float64)
        for part in plan.parts:
            (k,) = part.subsets
            weight, steps = quantize_weight(layer.weight[k])
            worth = steps * source.scale  # of a product of 1
            offset = source.zero_point * worth * weight.sum(axis=0, dtype=np.int64)
            bias = bias - np.outer(layer.adjacency[k].sum(axis=0, dtype=np.float64), offset)
            parts.append((part.rows, 1, *_pack_links(part.mixing), weight, _floats(worth / step)))
        channels, links = layer.weight.shape[2], _pack_links(plan.combination)
        source_bytes, floats = self._get_bytes(layer.inputs[0]), _floats((bias + shift) / step)
        number = self.kernels.add_graph(
            source_bytes, before, layer.relu, channels, floats, tuple(parts), *links, rescaling
        )
        (self.bytes if rescaling[0] else self.floats)[result] = number

    def _add_byte_temporal(self, layer: TemporalConvolutionLayer, result: str, residual: str | None) -> None:
        source = self.scales[layer.inputs[0]]
        step, rescaling, shift, before = self._rescale(layer, result, residual)
        weight, steps = quantize_weight(layer.weight)
        worth = steps * source.scale
        bias = layer.bias - source.zero_point * worth * weight.sum(axis=(0, 1), dtype=np.int64)
        channels, geometry = layer.weight.shape[2], self._describe(layer)
        scale, bias = _floats(worth / step), _floats((bias + shift) / step)
        number = self.kernels.add_temporal(
            self._get_bytes(layer.inputs[0]),
            before,
            layer.relu,
            False,
            channels,
            geometry,
            weight,
            scale,
            bias,
            rescaling,
        )
        (self.bytes if rescaling[0] else self.floats)[result] = number

    def _rescale(self, layer: Layer, result: str, residual: str | None) -> tuple[float, Rescaling, float, int]:
        """What a step of the result is worth, the rescaling, what the bias gains by the residual, and the residual."""
        is_last = result == self.network.layers[-1].name
        target = Scale(1.0, 0) if is_last else self.scales[result]  # the last result is averaged as floats
        factor, shift, before = 0.0, 0.0, NO_RESULT
        if residual is not None:
            before = self._get_bytes(residual)
            factor = self.scales[residual].scale / target.scale
            shift = -self.scales[residual].scale * self.scales[residual].zero_point
        fill = self.scales[layer.inputs[0]].zero_point
        return target.scale, (not is_last, factor, target.zero_point, fill), shift, before


def _find_joined(network: FoldedNetwork) -> dict[str, str]:
    """Convolution that takes a sum over -> that sum. Of two, the one with more work."""
    layers = {layer.name: layer for layer in network.layers}
    convolutions = GraphConvolutionLayer | TemporalConvolutionLayer
    work = {layer.name: layer.weight.size for layer in network.layers if isinstance(layer, convolutions)}
    reads = [name for layer in network.layers for name in layer.inputs]
    joined = {}
    for layer in network.layers:
        if isinstance(layer, SumLayer) and len(layer.inputs) == 2:
            free = [name for name in layer.inputs if name in work and reads.count(name) == 1 and not layers[name].relu]
            if free:
                joined[max(free, key=lambda name: work[name])] = layer.name
    return joined


def _find_scales(network: FoldedNetwork, quantization: Quantization) -> dict[str, Scale]:
    scales, problems = {}, []
    for name in (INPUT, *(layer.name for layer in network.layers)):
        where = f"quantization.activation_ranges[{name!r}]"
        found = quantization.activation_ranges.get(name)
        if found is None:
            problems.append(Problem(where, "nothing", "the smallest and the largest value"))
            continue
        try:
            scales[name] = Scale.of_range(*found)
        except ValueError as error:
            problems.append(Problem(where, str(error), "finite numbers, the smaller one first"))
    if problems:
        raise UserError(*problems)
    return scales


def _count_before(taps: int, dilation: int, padding: Padding) -> int:
    reach = (taps - 1) * dilation
    return reach if padding == "causal" else taps // 2 * dilation


def _floats(values: NDArray[np.floating]) -> NDArray[np.float32]:
    return np.ascontiguousarray(values, np.float32)


def _pack_links(links: Links) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]:
    """start (rows + 1,), source and weight of each link."""
    start = np.cumsum([0, *(len(row) for row in links)], dtype=np.int32)
    source = np.array([joint for row in links for joint, _ in row], np.int32)
    weight = np.array([factor for row in links for _, factor in row], np.float32)
    return start, source, weight
