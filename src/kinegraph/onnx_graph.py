"""Folded networks as ONNX files in clip form, written node by node.

Inside, tensors are (N, C, T, V), N clips x people. Measured with onnxruntime and OpenVINO on the CPU, this is the
fastest form: the convolutions, nine tenths of the work, run at the processor's limit there. Channels last would leave
the temporal convolution to matrix products of nine shifted copies. Joints are mixed by one matrix product for each
subset, written side by side as channels, so that one convolution does the sum over subsets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

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
from kinegraph.models.mixing_order import mixes_joints_first
from kinegraph.onnx_structure import (
    HEAD_BIAS,
    HEAD_WEIGHT,
    STRUCTURE_KEY,
    describe_structure,
    list_subsets,
    list_weights,
)
from kinegraph.storage import dump_json

INPUT_NAME = "input"
OUTPUT_NAME = "fc_pred"
MIN_OPSET = 17


class GraphWriter:
    """Nodes and initialisers of one graph. Branches share the initialisers of the graph that they are in."""

    def __init__(self, opset_version: int, weights: dict[str, onnx.TensorProto] | None = None) -> None:
        self.opset_version = opset_version
        self.nodes: list[onnx.NodeProto] = []
        self.weights = {} if weights is None else weights

    def branch(self) -> GraphWriter:
        """A writer for the nodes of a branch."""
        return type(self)(self.opset_version, self.weights)

    def add(self, operator: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """A node with one output, which gives it its name."""
        self.nodes.append(helper.make_node(operator, list(inputs), [output], name=output, **attributes))
        return output

    def store(self, name: str, values: NDArray[Any]) -> str:
        """An initialiser; one of a name that is there already stays."""
        if name not in self.weights:
            self.weights[name] = numpy_helper.from_array(np.asarray(values, order="C"), name)
        return name

    def store_numbers(self, *numbers: int) -> str:
        """Whole numbers as an initialiser (n,), for shapes and axes."""
        return self.store("numbers." + "_".join(map(str, numbers)), np.array(numbers, np.int64))

    def reduce(self, operator: str, source: str, axes: Sequence[int], output: str, keepdims: int = 0) -> str:
        """ReduceMean, ReduceMax or ReduceSum: where the axes stand depends on the operator set."""
        if operator == "ReduceSum" or self.opset_version >= 18:
            return self.add(operator, [source, self.store_numbers(*axes)], output, keepdims=keepdims)
        return self.add(operator, [source], output, axes=list(axes), keepdims=keepdims)

    def convolve(self, source: str, weight: str, bias: str, output: str, **attributes: Any) -> str:
        """A convolution; bias "" is none. The kernel is read off the weight (C', C, k, 1)."""
        kernel = list(self.weights[weight].dims[2:])
        inputs = [source, weight, bias] if bias else [source, weight]
        return self.add("Conv", inputs, output, kernel_shape=kernel, **attributes)


def write_clip_form(
    network: FoldedNetwork, opset_version: int = MIN_OPSET, metadata: Mapping[str, str] | None = None
) -> bytes:
    """The content of an ONNX file: `input` (batch, C, frames, V, people) -> `fc_pred` (batch, classes), logits.

    Batch, frames and people are dynamic. `metadata` is stored beside the structure that `read_folded` reads back.
    """
    writer = GraphWriter(opset_version)
    sizes = writer.add("Shape", [INPUT_NAME], "sizes")
    frames = writer.add("Gather", [sizes, writer.store_numbers(2)], "num_frames", axis=0)
    results = {INPUT: write_input(writer, network, frames)}
    for layer in network.layers:
        results[layer.name] = write_layer(
            writer, layer, [results[name] for name in layer.inputs], count_zeros(layer, network.padding)
        )
    write_head(writer, network, write_mean(writer, network, results[network.layers[-1].name], sizes))
    given = helper.make_tensor_value_info(
        INPUT_NAME, TensorProto.FLOAT, ["batch", network.num_channels, "frames", network.num_joints, "people"]
    )
    answer = helper.make_tensor_value_info(OUTPUT_NAME, TensorProto.FLOAT, ["batch", network.num_classes])
    structure = dump_json(describe_structure(network, writer.nodes))
    return finish(writer, [given], [answer], {**(metadata or {}), STRUCTURE_KEY: structure})


def write_input(writer: GraphWriter, network: FoldedNetwork, frames: str) -> str:
    """(N, C, T, V, M) -> (N*M, C, T, V)."""
    people_first = writer.add("Transpose", [INPUT_NAME], "people_first", perm=[0, 4, 1, 2, 3])
    before, after = writer.store_numbers(-1, network.num_channels), writer.store_numbers(network.num_joints)
    shape = writer.add("Concat", [before, frames, after], "person_shape", axis=0)
    return writer.add("Reshape", [people_first, shape], "person_clips")


def count_zeros(layer: Layer, padding: Padding) -> tuple[int, int]:
    """How many frames before and after the clip a layer takes for zero (a maximum: for minus infinity)."""
    match layer:
        case TemporalConvolutionLayer():
            reach = (len(layer.weight) - 1) * layer.dilation
        case TemporalMaximumLayer():
            reach = layer.size - 1
        case _:
            return 0, 0
    before = reach if padding == "causal" else (reach + 1) // 2
    return before, reach - before


def write_layer(writer: GraphWriter, layer: Layer, sources: Sequence[str], zeros: tuple[int, int]) -> str:
    """Nodes of one layer, (N, C, T, V) -> (N, C', T', V); the result has the layer's name."""
    for name, values in list_weights(layer).items():
        writer.store(name, values)
    output = f"{layer.name}/linear" if layer.relu else layer.name
    padding = {"pads": [zeros[0], 0, zeros[1], 0]}
    match layer:
        case AffineLayer():
            scaled = writer.add("Mul", [sources[0], f"{layer.name}.scale"], f"{layer.name}/scaled")
            writer.add("Add", [scaled, f"{layer.name}.shift"], output)
        case GraphConvolutionLayer():
            _write_graph_convolution(writer, layer, sources[0], output)
        case TemporalConvolutionLayer():
            steps = {"strides": [layer.stride, 1], "dilations": [layer.dilation, 1]}
            writer.convolve(sources[0], f"{layer.name}.weight", f"{layer.name}.bias", output, **steps, **padding)
        case TemporalMaximumLayer():
            writer.add("MaxPool", sources, output, kernel_shape=[layer.size, 1], strides=[layer.stride, 1], **padding)
        case SumLayer():
            add_up(writer, sources, output)
        case ConcatenationLayer():
            writer.add("Concat", sources, output, axis=1)
        case _:
            raise TypeError(type(layer).__name__)
    return writer.add("Relu", [output], layer.name) if layer.relu else output


def add_up(writer: GraphWriter, sources: Sequence[str], output: str) -> str:
    """The sum of two or more tensors; pairs, because runtimes join those with the convolution before."""
    total = sources[0]
    for i, source in enumerate(sources[1:], start=2):
        total = writer.add("Add", [total, source], output if i == len(sources) else f"{output}/{i}")
    return total


def _write_graph_convolution(writer: GraphWriter, layer: GraphConvolutionLayer, source: str, output: str) -> None:
    name = layer.name
    weight, bias = f"{name}.weight", f"{name}.bias"
    in_convolution = len(writer.weights[bias].dims) == 1
    if mixes_joints_first(layer):
        mixed = mix_joints(writer, layer, source)
        if in_convolution:
            writer.convolve(mixed, weight, bias, output)
            return
        total = writer.convolve(mixed, weight, "", f"{name}/sum")
    else:
        parts = [f"{name}/mapped_{k}" for k in range(len(layer.weight))]
        mapped = writer.convolve(source, weight, "", f"{name}/mapped")
        if len(parts) == 1:
            parts = [mapped]
        else:
            lengths = writer.store_numbers(*[layer.weight.shape[2]] * len(parts))
            writer.nodes.append(helper.make_node("Split", [mapped, lengths], parts, name=f"{name}/split", axis=1))
        parts = _mix_parts(writer, layer, parts)
        total = add_up(writer, parts, f"{name}/sum") if len(parts) > 1 else parts[0]
        if in_convolution:
            bias = writer.add("Reshape", [bias, writer.store_numbers(-1, 1, 1)], f"{name}/bias")
    writer.add("Add", [total, bias], output)


def mix_joints(writer: GraphWriter, layer: GraphConvolutionLayer, source: str) -> str:
    """(N, C, T, V) -> (N, K * C, T, V): the joints as each subset mixes them."""
    parts = _mix_parts(writer, layer, [source] * len(layer.weight))
    return writer.add("Concat", parts, f"{layer.name}/mixed", axis=1) if len(parts) > 1 else parts[0]


def _mix_parts(writer: GraphWriter, layer: GraphConvolutionLayer, parts: Sequence[str]) -> list[str]:
    return [
        part
        if kind == "identity"
        else writer.add("MatMul", [part, f"{layer.name}.adjacency_{k}"], f"{layer.name}/mixed_{k}")
        for k, (part, kind) in enumerate(zip(parts, list_subsets(layer), strict=True))
    ]


def write_mean(writer: GraphWriter, network: FoldedNetwork, features: str, sizes: str) -> str:
    """(N*M, C', T', V) -> the mean over people, frames and joints (N, C')."""
    clips = writer.add("Gather", [sizes, writer.store_numbers(0)], "num_clips", axis=0)
    channels = network.head_weight.shape[0]
    if not network.only_real_frames:
        mean = writer.reduce("ReduceMean", features, (2, 3), "person_features")
        shape = writer.add("Concat", [clips, writer.store_numbers(-1, channels)], "people_shape", axis=0)
        return writer.reduce("ReduceMean", writer.add("Reshape", [mean, shape], "people_features"), (1,), "features")
    mean = writer.reduce("ReduceMean", features, (3,), "frame_features")  # (N*M, C', T')
    lengths = writer.add("Shape", [features], "feature_sizes")
    lengths = writer.add("Gather", [lengths, writer.store_numbers(2)], "num_results", axis=0)
    shape = writer.add("Concat", [clips, writer.store_numbers(-1, channels), lengths], "people_shape", axis=0)
    by_person = writer.add("Reshape", [mean, shape], "people_features")  # (N, M, C', T')
    stride = network.find_strides()[network.layers[-1].name]
    weights = _write_frame_weights(writer, stride)
    weights = writer.add("Unsqueeze", [weights, writer.store_numbers(2)], "weights")  # (N, M, 1, T')
    return writer.reduce("ReduceSum", writer.add("Mul", [by_person, weights], "weighted"), (1, 3), "features")


def _write_frame_weights(writer: GraphWriter, stride: int) -> str:
    """How much each result counts (N, M, T'); each clip's add up to 1. See models/layers.py, mean_over_real_frames."""
    size = writer.reduce(
        "ReduceMax", writer.add("Abs", [INPUT_NAME], "sizes_of_values"), (1, 3), "largest"
    )  # (N, T, M)
    by_person = writer.add("Transpose", [writer.add("Sign", [size], "has_values")], "has_values/people", perm=[0, 2, 1])
    axis = writer.store("numbers.axis_2", np.array(2, np.int64))
    # A frame is real if it or a later one has values
    later = writer.add("Sign", [writer.add("CumSum", [by_person, axis], "later", reverse=1)], "is_real")
    present = writer.reduce("ReduceMax", later, (1, 2), "is_present", keepdims=1)
    one = writer.store("one", np.array(1, np.float32))
    later = writer.add("Add", [later, writer.add("Sub", [one, present], "is_absent")], "is_counted")
    numbers = [writer.store_numbers(number) for number in (0, np.iinfo(np.int64).max, 2, stride)]
    chosen = writer.add("Slice", [later, *numbers], "is_counted/results")
    return writer.add("Div", [chosen, writer.reduce("ReduceSum", chosen, (1, 2), "count", keepdims=1)], "shares")


def write_head(writer: GraphWriter, network: FoldedNetwork, features: str, output: str = OUTPUT_NAME) -> str:
    """(N, C') -> logits (N, classes)."""
    weight, bias = writer.store(HEAD_WEIGHT, network.head_weight), writer.store(HEAD_BIAS, network.head_bias)
    return writer.add("Gemm", [features, weight, bias], output)


def finish(
    writer: GraphWriter,
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    metadata: Mapping[str, str],
) -> bytes:
    """The graph as the checked content of a file. Raises ValueError for an operator set that the graph cannot use."""
    graph = helper.make_graph(writer.nodes, "kinegraph", inputs, outputs, list(writer.weights.values()))
    opsets = [helper.make_opsetid("", writer.opset_version)]
    version = helper.find_min_ir_version_for(opsets)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=version, producer_name="kinegraph")
    helper.set_model_props(model, dict(metadata))
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()
