"""Folded networks as ONNX files: the same numbers, and the same network read back."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kinegraph.errors import CheckpointError
from kinegraph.models.folded import (
    INPUT,
    ConcatenationLayer,
    FoldedNetwork,
    GraphConvolutionLayer,
    Layer,
    SumLayer,
    TemporalMaximumLayer,
)
from kinegraph.onnx_graph import MIN_OPSET, write_clip_form
from kinegraph.onnx_structure import STRUCTURE_KEY, read_folded
from reference.folded_plain import Weights, compute_plainly

NEWEST_OF_ONNXRUNTIME = 26


def make_network(seed: int = 0, padding: str = "symmetric") -> FoldedNetwork:
    """Every kind of layer; graph convolutions with more and fewer channels after than before, one with one bias."""
    make = Weights(seed, joints=5)
    plain = make.graph("g3", "s2", 40, 24)
    bias = np.tile(plain.bias[:1], (5, 1))
    adjacency = plain.adjacency.copy()
    adjacency[1] = np.eye(5)
    layers: list[Layer] = [
        make.affine("norm", INPUT, 3),
        make.graph("g1", "norm", 3, 24, relu=True),
        make.temporal("t1", "g1", 24, 24, 9),
        SumLayer("s1", ("t1", "g1"), relu=True),
        replace(make.graph("g2", "s1", 24, 40, subsets=1, relu=True), bias=np.tile(make.draw(1, 40), (5, 1))),
        make.temporal("t2", "g2", 40, 40, 3, stride=2, dilation=3),
        make.temporal("way", "s1", 24, 40, 1, stride=2),
        SumLayer("s2", ("t2", "way", "way"), relu=True),
        replace(plain, bias=bias, adjacency=adjacency),
        make.graph("g4", "g3", 24, 7, subsets=1),
        make.temporal("b1", "s2", 40, 10, 5, dilation=2),
        TemporalMaximumLayer("b2", ("s2",), size=3),
        ConcatenationLayer("joined", ("b1", "b2", "g4"), relu=True),
        TemporalMaximumLayer("halved", ("joined",), size=4, stride=2),
        make.affine("last", "halved", 57, relu=True),
    ]
    return make.network(3, layers, padding=padding)  # type: ignore[arg-type]


def run(content: bytes, clips: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["fc_pred"], {"input": clips})[0])


def assert_right(network: FoldedNetwork, clips: np.ndarray, opset_version: int = MIN_OPSET) -> None:
    expected, _ = compute_plainly(network, clips)
    answer = run(write_clip_form(network, opset_version), clips)
    np.testing.assert_allclose(answer, expected, rtol=0, atol=1e-5 * (1 + np.abs(expected).max()))


@pytest.mark.parametrize("padding", ["symmetric", "causal"])
@pytest.mark.parametrize("frames", [1, 2, 3, 8, 37])
def test_every_kind_of_layer(padding: str, frames: int) -> None:
    assert_right(make_network(1, padding), Weights(2, 5).draw(2, 3, frames, 5, 2))


@pytest.mark.parametrize("opset_version", range(MIN_OPSET, NEWEST_OF_ONNXRUNTIME + 1))
def test_every_operator_set(opset_version: int) -> None:
    network = replace(make_network(3), only_real_frames=opset_version % 2 == 0)
    content = write_clip_form(network, opset_version)
    assert onnx.load_from_string(content).opset_import[0].version == opset_version
    clips = Weights(4, 5).draw(2, 3, 9, 5, 1)
    np.testing.assert_allclose(run(content, clips), run(write_clip_form(network), clips), atol=1e-5)
    if not network.only_real_frames:
        assert_right(network, clips, opset_version)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_chain_of_layers_is_carried_out_and_read_back(data: st.DataObject) -> None:
    draw = data.draw
    make = Weights(draw(st.integers(0, 1000)), joints=draw(st.integers(1, 6)))
    sizes = st.integers(1, 20)
    channels = first = draw(sizes)
    source, layers = INPUT, list[Layer]()
    for i in range(draw(st.integers(1, 3))):
        outputs, name, relu = draw(sizes), f"layer_{i}", draw(st.booleans())
        if draw(st.booleans()):
            density = draw(st.sampled_from([0.0, 0.3, 1.0]))
            layers.append(make.graph(name, source, channels, outputs, draw(st.integers(1, 4)), density, relu))
        else:
            taps, stride, dilation = (draw(st.integers(1, limit)) for limit in (5, 3, 3))
            layers.append(make.temporal(name, source, channels, outputs, 2 * taps - 1, stride, dilation, relu))
        source, channels = name, outputs
    shape = (draw(st.integers(1, 3)), first, draw(st.integers(1, 20)), make.joints, draw(st.integers(1, 2)))
    network = make.network(first, layers, padding=draw(st.sampled_from(["symmetric", "causal"])))
    clips = make.draw(*shape)
    assert_right(network, clips)
    restored = read_folded(write_clip_form(network))
    assert restored is not None
    assert_equal(restored, network)


def assert_equal(first: FoldedNetwork, second: FoldedNetwork) -> None:
    for name in ("num_channels", "num_joints", "padding", "only_real_frames", "num_classes"):
        assert getattr(first, name) == getattr(second, name)
    pairs: list[tuple[Any, Any]] = list(zip(first.layers, second.layers, strict=True))
    for one, other in pairs:
        assert type(one) is type(other)
        for field in fields(one):
            values = getattr(one, field.name), getattr(other, field.name)
            if isinstance(values[0], np.ndarray):
                np.testing.assert_array_equal(*values)
                assert values[0].dtype == np.float32
            else:
                assert values[0] == values[1]
    np.testing.assert_array_equal(first.head_weight, second.head_weight)
    np.testing.assert_array_equal(first.head_bias, second.head_bias)


@pytest.mark.parametrize("padding", ["symmetric", "causal"])
def test_a_network_is_read_back_as_it_was(tmp_path: Path, padding: str) -> None:
    network = replace(make_network(5, padding), only_real_frames=True)
    path = tmp_path / "model.onnx"
    path.write_bytes(write_clip_form(network, metadata={"kinegraph.x": "1"}))
    restored = read_folded(path)
    assert restored is not None
    assert_equal(restored, network)
    assert all(array.flags.writeable for array in (restored.head_weight, restored.head_bias))


def test_mean_over_real_frames_leaves_out_padding_and_absent_people() -> None:
    """Stated frame by frame: results whose frame is the last real one or before count, all if there are none."""
    make = Weights(6, joints=5)
    network = make.network(3, [make.temporal("t", INPUT, 3, 8, 5, stride=2, relu=True)])
    clips = make.draw(4, 3, 12, 5, 2)
    clips[0, :, 7:] = 0
    clips[1, ..., 1] = 0
    clips[1, :, :, :, 0][:, 3:] = 0
    clips[2] = 0
    _, features = compute_plainly(network, clips)  # (N, M, T', V, C')
    expected = []
    for clip, maps in zip(clips, features, strict=True):
        last = [max((t for t in range(12) if clip[:, t, :, person].any()), default=-1) for person in range(2)]
        kept = [maps[person, i] for person in range(2) for i in range(6) if max(last) < 0 or 2 * i <= last[person]]
        expected.append(np.mean(kept, axis=(0, 1)) @ network.head_weight + network.head_bias)
    answer = run(write_clip_form(replace(network, only_real_frames=True)), clips)
    np.testing.assert_allclose(answer, expected, atol=1e-5)


def change(content: bytes, edit: Callable[[onnx.ModelProto, dict[str, Any]], None]) -> bytes:
    """The file with an edited graph or structure."""
    proto = onnx.load_from_string(content)
    entry = next(entry for entry in proto.metadata_props if entry.key == STRUCTURE_KEY)
    structure = json.loads(entry.value)
    edit(proto, structure)
    entry.value = json.dumps(structure)
    return proto.SerializeToString()


def find_tensor(proto: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(tensor for tensor in proto.graph.initializer if tensor.name == name)


def test_files_without_a_network_that_can_be_read_give_none() -> None:
    content = write_clip_form(make_network())
    assert read_folded(content) is not None
    proto = onnx.load_from_string(content)
    del proto.metadata_props[:]
    assert read_folded(proto.SerializeToString()) is None
    assert read_folded(change(content, lambda _, structure: structure.update(version=99))) is None

    def add_node(proto: onnx.ModelProto, _: dict[str, Any]) -> None:
        proto.graph.node.append(onnx.helper.make_node("Softmax", ["fc_pred"], ["probabilities"]))

    assert read_folded(change(content, add_node)) is None, "an edited graph is no longer the network"


def damage_external(proto: onnx.ModelProto, _: dict[str, Any]) -> None:
    tensor = find_tensor(proto, "t1.weight")
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")


def damage_dims(proto: onnx.ModelProto, _: dict[str, Any]) -> None:
    tensor = find_tensor(proto, "t1.weight")
    del tensor.dims[:]
    tensor.dims.extend([2**40, 2**20, 9, 1])


def damage_type(proto: onnx.ModelProto, _: dict[str, Any]) -> None:
    find_tensor(proto, "t1.weight").data_type = onnx.TensorProto.DOUBLE


def drop_tensor(proto: onnx.ModelProto, _: dict[str, Any]) -> None:
    proto.graph.initializer.remove(find_tensor(proto, "g1.adjacency_2"))


def set_layer(index: int, **changes: Any) -> Callable[[onnx.ModelProto, dict[str, Any]], None]:
    return lambda _, structure: structure["layers"][index].update(changes)


@pytest.mark.parametrize(
    "edit",
    [
        damage_external,
        damage_dims,
        damage_type,
        drop_tensor,
        lambda _, structure: structure.update(num_joints=10**9),
        lambda _, structure: structure.update(num_joints=6),
        lambda _, structure: structure.update(num_channels="3"),
        lambda _, structure: structure.update(padding="wide"),
        lambda _, structure: structure.update(only_real_frames=1),
        lambda _, structure: structure.update(layers=[]),
        lambda _, structure: structure.update(layers=[{}] * 20_000),
        lambda _, structure: structure.update(layers={"a": 1}),
        lambda _, structure: structure.pop("padding"),
        lambda _, structure: structure["layers"].pop(3),
        lambda _, structure: structure["layers"].reverse(),
        set_layer(0, kind="magic"),
        set_layer(0, name="g1"),
        set_layer(0, name=["norm"]),
        set_layer(0, inputs=["last"]),
        set_layer(0, inputs=["input", "input"]),
        set_layer(0, relu="yes"),
        set_layer(1, subsets=["identity"] * 10**6),
        set_layer(1, subsets=["matrix"]),
        set_layer(1, subsets=5),
        set_layer(1, joints_first=False),
        set_layer(2, stride=0),
        set_layer(2, stride=2**70),
        set_layer(2, dilation=True),
        set_layer(2, dilation=9999),
        set_layer(3, inputs=["t1"]),
        set_layer(3, inputs=["t1", "norm"]),
        set_layer(7, inputs=["t2", "s1"]),
        set_layer(11, size=-3),
    ],
)
def test_damaged_structures_are_refused(edit: Callable[[onnx.ModelProto, dict[str, Any]], None]) -> None:
    with pytest.raises(CheckpointError, match=r"damaged kinegraph\.folded"):
        read_folded(change(write_clip_form(make_network()), edit))


def write_identities(joints: int) -> bytes:
    """A file of some kilobytes that asks for two identity matrices, and a bias for each joint."""
    make = Weights(0, joints=5)
    layer = make.graph("g", INPUT, 3, 4, subsets=2)
    layer = replace(layer, adjacency=np.stack([np.eye(5, dtype=np.float32)] * 2), bias=np.tile(layer.bias[:1], (5, 1)))
    content = write_clip_form(make.network(3, [layer]))
    return change(content, lambda _, structure: structure.update(num_joints=joints))


def test_identities_take_memory_only_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    content = write_identities(10_000)
    assert len(content) < 10_000
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="identity matrices and biases that would take more than 128 MB"):
        read_folded(content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000_000
    needed = 2 * 7**2 + 7 * 4
    monkeypatch.setattr("kinegraph.onnx_structure.MAX_MADE_ELEMENTS", needed)
    network = read_folded(write_identities(7))
    assert network is not None and isinstance(network.layers[0], GraphConvolutionLayer)
    np.testing.assert_array_equal(network.layers[0].adjacency, [np.eye(7)] * 2)
    assert network.layers[0].bias.shape == (7, 4)
    monkeypatch.setattr("kinegraph.onnx_structure.MAX_MADE_ELEMENTS", needed - 1)
    with pytest.raises(CheckpointError, match="identity matrices and biases"):
        read_folded(write_identities(7))


def test_layers_of_one_name_do_not_multiply_what_is_in_the_file() -> None:
    make = Weights(0, joints=5)
    content = write_clip_form(make.network(64, [make.temporal("t", INPUT, 64, 64, 64)]))
    repeated = change(content, lambda _, structure: structure.update(layers=structure["layers"] * 300))
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=r"damaged kinegraph\.folded"):
        read_folded(repeated)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * len(content)


@pytest.mark.parametrize("text", ["", "[1]", "null", "{", "[" * 100_000, '{"version": 1}'])
def test_structures_that_are_none_are_refused(text: str) -> None:
    proto = onnx.load_from_string(write_clip_form(make_network()))
    next(entry for entry in proto.metadata_props if entry.key == STRUCTURE_KEY).value = text
    with pytest.raises(CheckpointError, match=r"damaged kinegraph\.folded"):
        read_folded(proto.SerializeToString())


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="missing"):
        read_folded(tmp_path / "missing.onnx")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_folded(write_clip_form(make_network())[:-1000])


def test_initialisers_are_named_after_layers_and_identities_are_not_stored() -> None:
    proto = onnx.load_from_string(write_clip_form(make_network()))
    names = {tensor.name for tensor in proto.graph.initializer}
    assert {"t1.weight", "t1.bias", "norm.scale", "g1.adjacency_0", "head.weight"} <= names
    assert {"g3.adjacency_0", "g3.adjacency_2"} <= names
    assert "g3.adjacency_1" not in names
    assert isinstance(make_network().layers[8], GraphConvolutionLayer)
