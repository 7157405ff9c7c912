"""Folded networks as ONNX files in 8 bits: pairs of QuantizeLinear and DequantizeLinear round the convolutions.

Runtimes turn a convolution between such pairs into one of integers (Jacob et al., Quantization and Training of Neural
Networks for Efficient Integer-Arithmetic-Only Inference, CVPR 2018): weights signed, one scale for each output
channel; activations unsigned, one scale for the tensor. Joints are mixed in float32. The first graph convolution stays
float32: it reads few channels, where integers gain nothing, and errors there reach everything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper

from kinegraph.models.folded import (
    INPUT,
    FoldedNetwork,
    GraphConvolutionLayer,
    Layer,
    TemporalConvolutionLayer,
)
from kinegraph.models.mixing_order import mixes_joints_first
from kinegraph.models.quantization import Quantization
from kinegraph.onnx_graph import (
    INPUT_NAME,
    MIN_OPSET,
    OUTPUT_NAME,
    GraphWriter,
    count_zeros,
    finish,
    mix_joints,
    write_head,
    write_input,
    write_layer,
    write_mean,
)
from kinegraph.onnx_structure import (
    INTEGERS,
    RANGES_KEY,
    SCALE,
    STRUCTURE_KEY,
    describe_structure,
    list_weights,
)
from kinegraph.storage import dump_json

FEWEST_CHANNELS = 16
SMALLEST = 1e-12
CUTS = np.linspace(0.6, 1, 17)
Array = NDArray[np.float32]


def is_quantized(layer: Layer) -> bool:
    """Whether a layer is carried out in integers: a convolution of enough channels."""
    match layer:
        case GraphConvolutionLayer():
            return layer.weight.shape[1] >= FEWEST_CHANNELS and mixes_joints_first(layer)
        case TemporalConvolutionLayer():
            return layer.weight.shape[1] >= FEWEST_CHANNELS
    return False


def quantize_weight(weight: Array) -> tuple[NDArray[np.int8], Array]:
    """(C', ...) -> integers from -127 to 127 of the same shape, and the scale of each output channel (C',).

    Of several parts of the largest weight that may become 127, each channel takes the one of least squared error.
    """
    rows = weight.reshape(len(weight), -1).astype(np.float64)
    largest = np.maximum(np.abs(rows).max(axis=1), SMALLEST)
    scales = largest / 127
    smallest = np.full(len(rows), np.inf)
    for cut in CUTS:
        candidate = largest * cut / 127
        rounded = np.clip(np.rint(rows / candidate[:, None]), -127, 127) * candidate[:, None]
        error = np.square(rounded - rows).sum(axis=1)
        scales, smallest = np.where(error < smallest, candidate, scales), np.minimum(error, smallest)
    scale = scales.astype(np.float32)
    integers = np.clip(np.rint(rows / scale[:, None]), -127, 127).astype(np.int8)
    return integers.reshape(weight.shape), scale


def write_quantized_form(
    network: FoldedNetwork,
    quantization: Quantization,
    opset_version: int = MIN_OPSET,
    metadata: Mapping[str, str] | None = None,
) -> bytes:
    """The content of an ONNX file in clip form whose convolutions run in 8 bits. The ranges are in the metadata too.

    `quantization` has the tensors that `kinegraph.quantize.calibrate` gives.
    """
    writer = QuantizedWriter(opset_version, quantization)
    sizes = writer.add("Shape", [INPUT_NAME], "sizes")
    frames = writer.add("Gather", [sizes, writer.store_numbers(2)], "num_frames", axis=0)
    results = {INPUT: write_input(writer, network, frames)}
    # What only float32 layers read needs no rounding
    read_in_integers = {name for layer in network.layers if is_quantized(layer) for name in layer.inputs}
    for layer in network.layers:
        sources = [results[name] for name in layer.inputs]
        zeros = count_zeros(layer, network.padding)
        result = (
            writer.write(layer, sources, zeros) if is_quantized(layer) else write_layer(writer, layer, sources, zeros)
        )
        if is_quantized(layer) or layer.name in read_in_integers:
            result = writer.round(result, layer.name)
        results[layer.name] = result
    write_head(writer, network, write_mean(writer, network, results[network.layers[-1].name], sizes))
    shape: list[str | int | None] = ["batch", network.num_channels, "frames", network.num_joints, "people"]
    given = helper.make_tensor_value_info(INPUT_NAME, TensorProto.FLOAT, shape)
    answer = helper.make_tensor_value_info(OUTPUT_NAME, TensorProto.FLOAT, ["batch", network.num_classes])
    names = {INPUT, *(layer.name for layer in network.layers)}
    ranges = {name: limits for name, limits in quantization.activation_ranges.items() if name in names}
    own = {
        STRUCTURE_KEY: dump_json(describe_structure(network, writer.nodes)),
        RANGES_KEY: dump_json(ranges),
    }
    return finish(writer, [given], [answer], {**(metadata or {}), **own})


class QuantizedWriter(GraphWriter):
    """A writer that knows the scales of the tensors."""

    def __init__(self, opset_version: int, quantization: Quantization) -> None:
        super().__init__(opset_version)
        self.quantization = quantization

    def round(self, source: str, name: str) -> str:
        """Round a tensor to its 256 values: a pair that the runtime takes for "8 bits from here on"."""
        scale, zero_point = self.quantization.find_scale(name)
        pair = [
            self.store(f"{name}.scale_of_result", np.array(scale, np.float32)),
            self.store(f"{name}.zero_of_result", np.array(zero_point, np.uint8)),
        ]
        integers = self.add("QuantizeLinear", [source, *pair], f"{name}/integers")
        return self.add("DequantizeLinear", [integers, *pair], f"{name}/rounded")

    def write(self, layer: Layer, sources: Sequence[str], zeros: tuple[int, int]) -> str:
        """A convolution in integers. Its ReLU is left to the rounding after it, which cuts negative values."""
        weights = list_weights(layer)
        name = layer.name
        for key, values in weights.items():
            if key != f"{name}.weight":
                self.store(key, values)
        integers, scales = quantize_weight(weights[f"{name}.weight"])
        source, zeros_of_weight = sources[0], np.zeros(len(scales), np.int8)
        parts = [self.store(f"{name}.weight{INTEGERS}", integers), self.store(f"{name}.weight{SCALE}", scales)]
        parts.append(self.store(f"zeros_{len(scales)}", zeros_of_weight))
        weight = self.add("DequantizeLinear", parts, f"{name}/weight", axis=0)
        kernel = {"kernel_shape": list(integers.shape[2:])}
        if isinstance(layer, TemporalConvolutionLayer):
            kernel |= {"strides": [layer.stride, 1], "dilations": [layer.dilation, 1]}
            kernel["pads"] = [zeros[0], 0, zeros[1], 0]
            return self.add(
                "Conv",
                [source, weight, self._store_bias(layer.name, layer.inputs[0], layer.bias, scales)],
                name,
                **kernel,
            )
        assert isinstance(layer, GraphConvolutionLayer)
        mixed = self.round(mix_joints(self, layer, source), f"{name}/mixed")
        mean = layer.bias.mean(axis=0)
        total = self.add(
            "Conv", [mixed, weight, self._store_bias(name, f"{name}/mixed", mean, scales)], f"{name}/sum", **kernel
        )
        rest = (layer.bias - mean).T[:, None]  # (C', 1, V)
        if not rest.any():
            return total
        return self._add_rest(layer, total, rest)

    def _store_bias(self, name: str, source: str, bias: Array, scales: Array) -> str:
        """The bias in the unit of the products, 32 bits: what integer convolutions add."""
        unit = (self.quantization.find_scale(source)[0] * scales.astype(np.float64)).astype(np.float32)
        limit = 2**31 - 1
        integers = np.clip(np.rint(bias.astype(np.float64) / unit), -limit, limit).astype(np.int32)
        parts = [self.store(f"{name}.bias_of_products", integers), self.store(f"{name}.unit_of_products", unit)]
        return self.add("DequantizeLinear", parts, f"{name}/bias", axis=0)

    def _add_rest(self, layer: GraphConvolutionLayer, total: str, rest: Array) -> str:
        """Add what the bias of each joint differs from the mean one, in integers too."""
        name = layer.name
        _, high = self.quantization.activation_ranges[name]
        # What is below by more than the bias can raise is cut by the ReLU in any case
        low = (
            -float(np.abs(rest).max())
            if layer.relu
            else self.quantization.activation_ranges[name][0] - float(rest.max())
        )
        ranges = {f"{name}/sum": (min(low, 0.0), high - min(0.0, float(rest.min())))}
        rest_range = {f"{name}/rest": (float(min(rest.min(), 0)), float(max(rest.max(), 0)))}
        other = QuantizedWriter(self.opset_version, Quantization(ranges | rest_range))
        other.nodes, other.weights = self.nodes, self.weights
        rounded = other.round(total, f"{name}/sum")
        scale, zero_point = other.quantization.find_scale(f"{name}/rest")
        integers = np.clip(np.rint(rest / scale) + zero_point, 0, 255).astype(np.uint8)
        parts = [
            self.store(f"{name}.rest{INTEGERS}", integers),
            self.store(f"{name}.rest{SCALE}", np.array(scale, np.float32)),
            self.store(f"{name}.rest_zero", np.array(zero_point, np.uint8)),
        ]
        return self.add("Add", [rounded, self.add("DequantizeLinear", parts, f"{name}/rest")], name)
