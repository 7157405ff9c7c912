"""A folded network inside an ONNX file: how its weights are stored, and reading it back without PyTorch.

The metadata entry `kinegraph.folded` says the layers, the initialisers hold their weights, named after them
(`block_3.temporal.weight`). So a runtime of our own can carry out a file that onnxruntime can carry out too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kinegraph.errors import CheckpointError, Problem
from kinegraph.models.folded import (
    INPUT,
    AffineLayer,
    ConcatenationLayer,
    FoldedNetwork,
    GraphConvolutionLayer,
    Layer,
    SumLayer,
    TemporalConvolutionLayer,
    TemporalMaximumLayer,
)
from kinegraph.models.mixing_order import mixes_joints_first
from kinegraph.models.quantization import Quantization
from kinegraph.whole_numbers import check_whole_number

if TYPE_CHECKING:
    import onnx

STRUCTURE_KEY = "kinegraph.folded"
RANGES_KEY = "kinegraph.activation_ranges"
STRUCTURE_VERSION = 1
HEAD_WEIGHT, HEAD_BIAS = "head.weight", "head.bias"
INTEGERS, SCALE = "_integers", "_scale"
MAX_LAYERS = 10_000
MAX_JOINTS = 10_000
MAX_STEP = 10_000
MAX_ELEMENTS = 500_000_000
"""Of all weights together, 2 GB: what protobuf allows too."""
MAX_MADE_ELEMENTS = 32_000_000
"""Of identity matrices and biases repeated for each joint, 128 MB: a file of a few bytes can ask for them."""

Array = NDArray[np.float32]
KINDS: dict[str, type[Layer]] = {
    "affine": AffineLayer,
    "graph_convolution": GraphConvolutionLayer,
    "temporal_convolution": TemporalConvolutionLayer,
    "temporal_maximum": TemporalMaximumLayer,
    "sum": SumLayer,
    "concatenation": ConcatenationLayer,
}
KIND_NAMES = {layer: name for name, layer in KINDS.items()}


def describe_structure(network: FoldedNetwork, nodes: Iterable[onnx.NodeProto]) -> dict[str, Any]:
    """What `kinegraph.folded` says about a network whose graph has these nodes."""
    return {
        "version": STRUCTURE_VERSION,
        "num_channels": network.num_channels,
        "num_joints": network.num_joints,
        "padding": network.padding,
        "only_real_frames": network.only_real_frames,
        "layers": [_describe_layer(layer) for layer in network.layers],
        "nodes": digest_nodes(nodes),
    }


def digest_nodes(nodes: Iterable[onnx.NodeProto]) -> str:
    """SHA-256 of the nodes: a graph that was edited is no longer the network that the metadata describe."""
    digest = hashlib.sha256()
    for node in nodes:
        digest.update(node.SerializeToString(deterministic=True))
    return digest.hexdigest()


def _describe_layer(layer: Layer) -> dict[str, Any]:
    own: dict[str, Any] = {
        "kind": KIND_NAMES[type(layer)],
        "name": layer.name,
        "inputs": list(layer.inputs),
        "relu": layer.relu,
    }
    match layer:
        case GraphConvolutionLayer():
            own |= {"subsets": list_subsets(layer), "joints_first": mixes_joints_first(layer)}
        case TemporalConvolutionLayer():
            own |= {"stride": layer.stride, "dilation": layer.dilation}
        case TemporalMaximumLayer():
            own |= {"size": layer.size, "stride": layer.stride}
    return own


def list_subsets(layer: GraphConvolutionLayer) -> list[str]:
    """identity or matrix for each subset: joints need no mixing where their matrix is the identity."""
    identity = np.eye(layer.adjacency.shape[1], dtype=np.float32)
    return ["identity" if np.array_equal(matrix, identity) else "matrix" for matrix in layer.adjacency]


def list_weights(layer: Layer) -> dict[str, Array]:
    """Name of the initialiser -> array in the form that ONNX operators take, where axes are (N, C, T, V)."""
    match layer:
        case AffineLayer():
            return {f"{layer.name}.scale": layer.scale.T[:, None], f"{layer.name}.shift": layer.shift.T[:, None]}
        case GraphConvolutionLayer():
            subsets, before, after = layer.weight.shape
            if mixes_joints_first(layer):
                weight = layer.weight.reshape(subsets * before, after).T
            else:
                weight = layer.weight.transpose(0, 2, 1).reshape(subsets * after, before)
            has_one_bias = bool((layer.bias == layer.bias[0]).all())
            weights = {
                f"{layer.name}.weight": weight[:, :, None, None],
                # (C',) goes into the convolution; (C', 1, V) is added after it
                f"{layer.name}.bias": layer.bias[0] if has_one_bias else layer.bias.T[:, None],
            }
            for k, kind in enumerate(list_subsets(layer)):
                if kind == "matrix":
                    weights[f"{layer.name}.adjacency_{k}"] = layer.adjacency[k]
            return weights
        case TemporalConvolutionLayer():
            weight = layer.weight.transpose(2, 1, 0)[..., None]
            return {f"{layer.name}.weight": weight, f"{layer.name}.bias": layer.bias}
    return {}


def read_folded(source: Path | str | bytes) -> FoldedNetwork | None:
    """The folded network in an ONNX file or in its content; None if it holds none that this version can read.

    Raises CheckpointError for a file that cannot be read or contradicts itself.
    """
    where = "ONNX model" if isinstance(source, bytes) else str(source)
    return rebuild(read_model(source), where)[0]


def read_model(source: Path | str | bytes) -> onnx.ModelProto:
    """An ONNX file or its content, parsed. Raises CheckpointError."""
    import onnx
    from google.protobuf.message import DecodeError

    where = "ONNX model" if isinstance(source, bytes) else str(source)
    try:
        content = source if isinstance(source, bytes) else Path(source).read_bytes()
        return onnx.ModelProto.FromString(content)
    except OSError as error:
        raise CheckpointError(Problem(where, error.strerror or str(error), "an ONNX file", "Check the path.")) from None
    except DecodeError:
        hint = "The file may be cut or damaged: copy or export it again."
        raise CheckpointError(Problem(where, "a file that cannot be read", "an ONNX model", hint)) from None


def rebuild(proto: onnx.ModelProto, where: str) -> tuple[FoldedNetwork | None, Quantization | None]:
    """The folded network of a parsed file, and the activation ranges of one for int8. Raises CheckpointError."""
    network = _rebuild_network(proto, where)
    text = _find_entry(proto, RANGES_KEY)
    if network is None or text is None:
        return network, None
    try:
        ranges = {str(name): (float(low), float(high)) for name, (low, high) in json.loads(text).items()}
        if set(ranges) != {INPUT, *(layer.name for layer in network.layers)}:
            raise ValueError("ranges of other layers")
        for low, high in ranges.values():
            if not (np.isfinite([low, high]).all() and low <= 0 <= high):
                raise ValueError(f"a range from {low} to {high}")
    except (ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise _refuse(where, f"damaged {RANGES_KEY} ({error})") from None
    return network, Quantization(ranges)


def _find_entry(proto: onnx.ModelProto, key: str) -> str | None:
    return next((entry.value for entry in proto.metadata_props if entry.key == key), None)


def _rebuild_network(proto: onnx.ModelProto, where: str) -> FoldedNetwork | None:
    text = _find_entry(proto, STRUCTURE_KEY)
    if text is None:
        return None
    try:
        structure = json.loads(text)
        if structure["version"] != STRUCTURE_VERSION or structure["nodes"] != digest_nodes(proto.graph.node):
            return None
        reader = _WeightReader(proto)
        num_joints = check_whole_number(structure["num_joints"], "num_joints", 1, MAX_JOINTS)
        if not 1 <= len(structure["layers"]) <= MAX_LAYERS:
            raise ValueError(f"{len(structure['layers'])} layers")
        layers = tuple(_rebuild_layer(layer, reader, num_joints) for layer in structure["layers"])
        network = FoldedNetwork(
            check_whole_number(structure["num_channels"], "num_channels", 1, MAX_ELEMENTS),
            num_joints,
            layers,
            reader.take(HEAD_WEIGHT, 2),
            reader.take(HEAD_BIAS, 1),
            _check_choice(structure["padding"], ("symmetric", "causal")),
            _check_choice(structure["only_real_frames"], (True, False)),
        )
        check_network(network)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, OverflowError) as error:
        raise _refuse(where, f"damaged {STRUCTURE_KEY} ({type(error).__name__}: {str(error)[:200]})") from None
    return network


def _refuse(where: str, got: str) -> CheckpointError:
    return CheckpointError(Problem(where, got, "the entries that Kinegraph writes", "Export the model again."))


class _WeightReader:
    """Initialisers of a file by name. Together they may grow to MAX_ELEMENTS, and what is made to MAX_MADE_ELEMENTS."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
        self.left = MAX_ELEMENTS
        self.left_to_make = MAX_MADE_ELEMENTS

    def take(self, name: str, num_axes: int) -> Array:
        """The array of a name as float32; of one stored in 8 bits, integers times scale. Raises ValueError."""
        if name + INTEGERS in self.tensors:
            values = self._read(name + INTEGERS, np.int8).astype(np.float32)
            scale = self._read(name + SCALE, np.float32)
            if scale.shape != values.shape[:1]:
                raise ValueError(f"{name}: {scale.shape} scales")
            values *= scale.reshape(-1, *[1] * (values.ndim - 1))
        else:
            values = self._read(name, np.float32)
        if values.ndim != num_axes or values.size == 0:
            raise ValueError(f"{name}: shape {values.shape}")
        # A copy, that can be written and does not keep the file in memory
        return np.array(values, np.float32, order="C")

    def make_identity(self, size: int) -> Array:
        """A matrix that is not in the file."""
        self._reserve(size**2)
        return np.eye(size, dtype=np.float32)

    def repeat(self, values: Array, count: int) -> Array:
        """(C,) -> (count, C)."""
        self._reserve(count * len(values))
        return np.tile(values, (count, 1))

    def _reserve(self, size: int) -> None:
        self.left_to_make -= size
        if self.left_to_make < 0:
            limit = MAX_MADE_ELEMENTS * 4 // 10**6
            raise ValueError(f"identity matrices and biases that would take more than {limit} MB")

    def _read(self, name: str, dtype: type[np.generic]) -> NDArray[Any]:
        from onnx import TensorProto, numpy_helper

        tensor = self.tensors.pop(name)  # layers of one name must not multiply what is in the file
        expected = {np.int8: TensorProto.INT8, np.float32: TensorProto.FLOAT}[dtype]  # type: ignore[index]
        if tensor.data_type != expected or tensor.data_location == TensorProto.EXTERNAL:
            raise ValueError(f"{name}: a tensor of another type or in another file")
        # Not shapes but bytes decide what is allocated: a tensor whose dims promise more is refused
        values: NDArray[Any] = numpy_helper.to_array(tensor)
        self.left -= values.size
        if self.left < 0:
            raise ValueError("more weights than a file can hold")
        return values


def _check_choice(value: Any, choices: tuple[Any, ...]) -> Any:
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
        raise ValueError(f"{str(value)[:40]} is none of {choices}")
    return value


def _rebuild_layer(data: Mapping[str, Any], reader: _WeightReader, num_joints: int) -> Layer:
    kind, name, inputs = KINDS[data["kind"]], data["name"], data["inputs"]
    if not isinstance(name, str) or not isinstance(inputs, list) or not all(isinstance(item, str) for item in inputs):
        raise TypeError("layer names that are no text")
    common = (name, tuple(inputs), _check_choice(data["relu"], (True, False)))
    if kind is AffineLayer:
        scale, shift = reader.take(f"{name}.scale", 3), reader.take(f"{name}.shift", 3)
        return AffineLayer(*common, scale=_drop_frames(scale), shift=_drop_frames(shift))
    if kind is GraphConvolutionLayer:
        return _rebuild_graph_convolution(common, data, reader, num_joints)
    if kind is TemporalConvolutionLayer:
        weight = reader.take(f"{name}.weight", 4)
        if weight.shape[3] != 1:
            raise ValueError(f"{name}.weight: shape {weight.shape}")
        return TemporalConvolutionLayer(
            *common,
            weight=np.ascontiguousarray(weight[..., 0].transpose(2, 1, 0)),
            bias=reader.take(f"{name}.bias", 1),
            stride=check_whole_number(data["stride"], "stride", 1, MAX_STEP),
            dilation=check_whole_number(data["dilation"], "dilation", 1, MAX_STEP),
        )
    if kind is TemporalMaximumLayer:
        size, stride = (check_whole_number(data[key], key, 1, MAX_STEP) for key in ("size", "stride"))
        return TemporalMaximumLayer(*common, size=size, stride=stride)
    return kind(*common)


def _drop_frames(values: Array) -> Array:
    """(C, 1, V) -> (V, C)."""
    if values.shape[1] != 1:
        raise ValueError(f"shape {values.shape}")
    return np.ascontiguousarray(values[:, 0].T)


def _rebuild_graph_convolution(
    common: tuple[str, tuple[str, ...], bool], data: Mapping[str, Any], reader: _WeightReader, num_joints: int
) -> GraphConvolutionLayer:
    name, kinds = common[0], data["subsets"]
    stored = reader.take(f"{name}.weight", 4)[:, :, 0, 0]
    subsets = len(kinds)
    if not 1 <= subsets <= max(stored.shape):
        raise ValueError(f"{name}: {subsets} subsets")
    if _check_choice(data["joints_first"], (True, False)):
        weight = stored.T.reshape(subsets, -1, stored.shape[0])
    else:
        weight = stored.reshape(subsets, -1, stored.shape[1]).transpose(0, 2, 1)
    matrices = []
    for k, kind in enumerate(kinds):
        if _check_choice(kind, ("identity", "matrix")) == "identity":
            matrices.append(reader.make_identity(num_joints))
            continue
        matrices.append(reader.take(f"{name}.adjacency_{k}", 2))
        if matrices[-1].shape != (num_joints, num_joints):
            raise ValueError(f"{name}: an adjacency {matrices[-1].shape}")
    bias_axes = len(reader.tensors[f"{name}.bias"].dims)
    bias = reader.take(f"{name}.bias", 1 if bias_axes == 1 else 3)
    bias = reader.repeat(bias, num_joints) if bias_axes == 1 else _drop_frames(bias)
    adjacency = np.stack(matrices)
    return GraphConvolutionLayer(*common, adjacency=adjacency, weight=np.ascontiguousarray(weight), bias=bias)


def check_network(network: FoldedNetwork) -> None:
    """Raises ValueError where layers of a network do not fit together, so that no runtime has to check again."""
    joints = network.num_joints
    channels, strides = {INPUT: network.num_channels}, {INPUT: 1}
    for layer in network.layers:
        if layer.name in channels or not layer.inputs or any(name not in channels for name in layer.inputs):
            raise ValueError(f"layer {layer.name[:80]!r} with the inputs {str(layer.inputs)[:80]}")
        joins = isinstance(layer, SumLayer | ConcatenationLayer)
        if (len(layer.inputs) > 1) != joins or len({strides[name] for name in layer.inputs}) > 1:
            raise ValueError(f"layer {layer.name[:80]!r}: inputs that it cannot join")
        before = [channels[name] for name in layer.inputs]
        fits, after, stride = True, before[0], 1
        match layer:
            case AffineLayer():
                fits = layer.scale.shape == layer.shift.shape == (joints, after)
            case GraphConvolutionLayer():
                subsets, _, after = layer.weight.shape
                fits = layer.weight.shape[1] == before[0] and layer.bias.shape == (joints, after)
                fits = fits and layer.adjacency.shape == (subsets, joints, joints)
            case TemporalConvolutionLayer():
                reach, after, stride = (len(layer.weight) - 1) * layer.dilation, layer.weight.shape[2], layer.stride
                fits = layer.weight.shape[1] == before[0] and layer.bias.shape == (after,) and reach <= MAX_STEP
                fits = fits and (network.padding == "causal" or reach % 2 == 0)
            case TemporalMaximumLayer():
                stride = layer.stride
            case SumLayer():
                fits = len(set(before)) == 1
            case ConcatenationLayer():
                after = sum(before)
        channels[layer.name], strides[layer.name] = after, strides[layer.inputs[0]] * stride
        if not fits or strides[layer.name] > MAX_STEP:
            raise ValueError(f"layer {layer.name[:80]!r}: weights that do not fit")
    if network.head_weight.shape != (channels[network.layers[-1].name], len(network.head_bias)):
        raise ValueError(f"{HEAD_WEIGHT}: shape {network.head_weight.shape}")
