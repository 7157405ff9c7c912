"""Folded networks as ONNX files in step form: one call takes one frame of N people and gives the new state.

Inputs   `frame` (N, C, V), `phase` int64: the number of the frame modulo the total stride, `state.<name>` (N, ...)
Outputs  `logits` (N, classes) of this frame's features, `is_new` bool: whether the last layer was evaluated at this
         frame (else the logits are zeros), `new_state.<name>`

When a layer is evaluated is said in online/schedule.py. Layers that are due at the same frames sit in one `If`; the
`If`s follow one another by stride, which needs no nesting: a layer reads only from layers that are due whenever it is.
Inside, a frame is (N, V, C) and what a layer remembers (N, V, frames, C): a step is a few rows, for which matrix
products are faster than convolutions. The mean over time is left to the caller, who takes it of the logits: the head
is linear.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

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
from kinegraph.online.onnx_steps import (
    FRAME_NAME,
    IS_NEW_NAME,
    LOGITS_NAME,
    NEW_STATE,
    PHASE_NAME,
    STATE,
    STEP_KEY,
    STEP_VERSION,
)
from kinegraph.online.schedule import Schedule, Timing, make_schedule, measure_span
from kinegraph.onnx_graph import MIN_OPSET, GraphWriter, add_up, finish, write_head
from kinegraph.storage import dump_json


@dataclass(frozen=True)
class Kept:
    """What a layer remembers of one input: `shape` (V, frames, C) for each person, filled with INITIAL[initial]."""

    name: str
    shape: tuple[int, int, int]
    initial: str = "zero"


@dataclass
class Group:
    """Layers that are due at the same frames: their nodes, and what is read of them outside."""

    timing: Timing
    writer: GraphWriter
    results: list[str] = field(default_factory=list)
    states: list[Kept] = field(default_factory=list)


def list_kept(network: FoldedNetwork, schedule: Schedule) -> dict[tuple[str, int], Kept]:
    """(layer, place of the input) -> what is remembered of it, for every input of which something is."""
    channels = network.count_channels()
    kept = {}
    for layer in network.layers:
        span, _ = measure_span(layer)
        initial = "minus_infinity" if isinstance(layer, TemporalMaximumLayer) else "zero"
        for place, source in enumerate(layer.inputs):
            frames = schedule.lags.get((layer.name, place), span)
            if frames:
                name = f"{layer.name}/{place}" if len(layer.inputs) > 1 else layer.name
                kept[layer.name, place] = Kept(name, (network.num_joints, frames, channels[source]), initial)
    return kept


def describe_step(network: FoldedNetwork) -> dict[str, Any]:
    """What `kinegraph.step` says: all that a program needs to carry the network out frame by frame."""
    schedule = make_schedule(network)
    return {
        "version": STEP_VERSION,
        "total_stride": schedule.total_stride,
        "delay_frames": schedule.delay_frames,
        "first_valid_frame": schedule.first_valid_frame,
        "padding": network.padding,
        "num_channels": network.num_channels,
        "num_joints": network.num_joints,
        "states": [
            {
                "input": STATE + kept.name,
                "output": NEW_STATE + kept.name,
                "shape": list(kept.shape),
                "initial": kept.initial,
            }
            for kept in list_kept(network, schedule).values()
        ],
    }


def write_step_form(
    network: FoldedNetwork, opset_version: int = MIN_OPSET, metadata: Mapping[str, str] | None = None
) -> bytes:
    """The content of an ONNX file in step form. Raises UserError where branches of the network cannot meet."""
    schedule = make_schedule(network)
    kept = list_kept(network, schedule)
    writer = GraphWriter(opset_version)
    groups = _write_groups(writer, network, schedule, kept)
    for key in sorted(groups):
        _close_group(writer, groups[key], network)
    last = schedule.timings[schedule.last]
    writer.add("Identity", [_write_condition(writer, last)], IS_NEW_NAME)
    inputs = [
        helper.make_tensor_value_info(
            FRAME_NAME, TensorProto.FLOAT, ["people", network.num_channels, network.num_joints]
        ),
        helper.make_tensor_value_info(PHASE_NAME, TensorProto.INT64, []),
    ]
    outputs = [
        helper.make_tensor_value_info(LOGITS_NAME, TensorProto.FLOAT, ["people", network.num_classes]),
        helper.make_tensor_value_info(IS_NEW_NAME, TensorProto.BOOL, []),
    ]
    for state in kept.values():
        inputs.append(helper.make_tensor_value_info(STATE + state.name, TensorProto.FLOAT, ["people", *state.shape]))
        outputs.append(
            helper.make_tensor_value_info(NEW_STATE + state.name, TensorProto.FLOAT, ["people", *state.shape])
        )
    return finish(writer, inputs, outputs, {**(metadata or {}), STEP_KEY: dump_json(describe_step(network))})


def _write_groups(
    writer: GraphWriter, network: FoldedNetwork, schedule: Schedule, kept: Mapping[tuple[str, int], Kept]
) -> dict[tuple[int, int], Group]:
    """The nodes of all layers, each in the group in which it is due. What is always due is written right away."""
    groups: dict[tuple[int, int], Group] = {}

    def find_group(name: str) -> Group:
        timing = schedule.timings[name]
        key = (timing.stride, timing.reach % timing.stride)
        if key not in groups:
            groups[key] = Group(timing, writer if timing.stride == 1 else writer.branch())
        return groups[key]

    # A name means another tensor inside the If that makes it than after it
    inside = {INPUT: writer.add("Transpose", [FRAME_NAME], "joints_first", perm=[0, 2, 1])}
    outside = dict(inside)
    for layer in network.layers:
        group = find_group(layer.name)
        sources = []
        for place, source in enumerate(layer.inputs):
            origin = find_group(source)
            if origin is not group and origin.timing.stride > 1 and source not in origin.results:
                origin.results.append(source)
            value = (inside if origin is group else outside)[source]
            state = kept.get((layer.name, place))
            if state is None:
                sources.append(value)
                continue
            window = _write_window(origin.writer, state, inside[source])
            origin.states.append(state)
            if origin is not group:
                window = _write_window(group.writer, state, value, "/evaluated")
            lags = isinstance(layer, SumLayer | ConcatenationLayer)
            sources.append(_write_oldest(group.writer, state, window) if lags else window)
        inside[layer.name] = _write_layer(group.writer, layer, sources)
        outside[layer.name] = inside[layer.name] if group.timing.stride == 1 else f"{layer.name}/result"
    last = find_group(schedule.last)
    features = last.writer.reduce("ReduceMean", inside[schedule.last], (1,), "features")
    if last.timing.stride == 1:
        write_head(last.writer, network, features, LOGITS_NAME)
    else:
        write_head(last.writer, network, features, f"{LOGITS_NAME}/due")
    return groups


def _write_window(writer: GraphWriter, state: Kept, newest: str, suffix: str = "") -> str:
    """(N, V, frames, C): what is kept, then the newest."""
    name = f"{state.name}/window{suffix}"
    newest = writer.add("Unsqueeze", [newest, writer.store_numbers(2)], f"{name}/newest")
    return writer.add("Concat", [STATE + state.name, newest], name, axis=2)


def _write_oldest(writer: GraphWriter, state: Kept, window: str) -> str:
    first = writer.store("numbers.first", np.array(0, np.int64))
    return writer.add("Gather", [window, first], f"{state.name}/oldest", axis=2)


def _write_condition(writer: GraphWriter, timing: Timing) -> str:
    """Whether a stride divides the number of the frame minus the reach."""
    stride, reach = timing.stride, timing.reach % timing.stride
    name = f"is_due_{stride}_{reach}"
    if any(name in node.output for node in writer.nodes):
        return name
    scalar = [
        writer.store(f"numbers.scalar_{value}", np.array(value, np.int64)) for value in (-reach % stride, stride, 0)
    ]
    shifted = writer.add("Add", [PHASE_NAME, scalar[0]], f"{name}/shifted")
    return writer.add("Equal", [writer.add("Mod", [shifted, scalar[1]], f"{name}/rest"), scalar[2]], name)


def _close_group(writer: GraphWriter, group: Group, network: FoldedNetwork) -> None:
    """New states of a group, and around it an If that passes them on unchanged where it is not due."""
    due, skipped = group.writer, writer.branch()
    is_always_due = group.timing.stride == 1
    names, due_outputs, skipped_outputs = [], [], []
    one, end, axis = writer.store_numbers(1), writer.store_numbers(np.iinfo(np.int64).max), writer.store_numbers(2)
    for state in group.states:
        name = NEW_STATE + state.name
        inner = name if is_always_due else f"{name}/due"
        due_outputs.append(due.add("Slice", [f"{state.name}/window", one, end, axis], inner))
        names.append(name)
        skipped_outputs.append(skipped.add("Identity", [STATE + state.name], f"{name}/skipped"))
    if is_always_due:
        return
    for name in group.results:
        names.append(f"{name}/result")
        due_outputs.append(name)
        nothing = writer.store("nothing", np.zeros((0, 0, 0), np.float32))
        skipped_outputs.append(skipped.add("Identity", [nothing], f"{name}/skipped"))
    if any(f"{LOGITS_NAME}/due" in node.output for node in due.nodes):
        names.append(LOGITS_NAME)
        due_outputs.append(f"{LOGITS_NAME}/due")
        skipped_outputs.append(_write_no_logits(skipped, network))
    condition = _write_condition(writer, group.timing)
    branches = {
        "then_branch": _make_branch("due", due, due_outputs),
        "else_branch": _make_branch("skipped", skipped, skipped_outputs),
    }
    writer.nodes.append(helper.make_node("If", [condition], names, name=f"{condition}/layers", **branches))


def _write_no_logits(writer: GraphWriter, network: FoldedNetwork) -> str:
    sizes = writer.add("Shape", [FRAME_NAME], f"{LOGITS_NAME}/sizes")
    people = writer.add("Gather", [sizes, writer.store_numbers(0)], f"{LOGITS_NAME}/people", axis=0)
    shape = writer.add("Concat", [people, writer.store_numbers(network.num_classes)], f"{LOGITS_NAME}/shape", axis=0)
    return writer.add("ConstantOfShape", [shape], f"{LOGITS_NAME}/skipped")


def _make_branch(name: str, writer: GraphWriter, outputs: list[str]) -> onnx.GraphProto:
    values = [helper.make_tensor_value_info(output, TensorProto.FLOAT, None) for output in outputs]
    return helper.make_graph(writer.nodes, name, [], values)


def _write_layer(writer: GraphWriter, layer: Layer, sources: list[str]) -> str:
    """One layer on a frame (N, V, C), or on a window (N, V, frames, C) where it sees several."""
    name = layer.name
    output = f"{name}/linear" if layer.relu else name
    match layer:
        case AffineLayer():
            scale, shift = writer.store(f"{name}.scale", layer.scale), writer.store(f"{name}.shift", layer.shift)
            writer.add("Add", [writer.add("Mul", [sources[0], scale], f"{name}/scaled"), shift], output)
        case GraphConvolutionLayer():
            _write_graph_convolution(writer, layer, sources[0], output)
        case TemporalConvolutionLayer():
            _write_temporal_convolution(writer, layer, sources[0], output)
        case TemporalMaximumLayer():
            if layer.size == 1:
                writer.add("Identity", sources, output)
            else:
                writer.reduce("ReduceMax", sources[0], (2,), output)
        case SumLayer():
            add_up(writer, sources, output)
        case ConcatenationLayer():
            writer.add("Concat", sources, output, axis=2)
        case _:
            raise TypeError(type(layer).__name__)
    return writer.add("Relu", [output], name) if layer.relu else output


def _write_graph_convolution(writer: GraphWriter, layer: GraphConvolutionLayer, source: str, output: str) -> None:
    name = layer.name
    subsets, before, after = layer.weight.shape
    joints = layer.adjacency.shape[1]
    mixing = layer.adjacency.transpose(2, 0, 1)  # (w, k, v)
    if mixes_joints_first(layer):
        rows = writer.store(f"{name}.mixing", mixing.reshape(joints * subsets, joints))
        weight = writer.store(f"{name}.weight", layer.weight.reshape(subsets * before, after))
        mixed = writer.add("MatMul", [rows, source], f"{name}/mixed")
        mixed = writer.add("Reshape", [mixed, writer.store_numbers(0, joints, subsets * before)], f"{name}/by_joint")
        total = writer.add("MatMul", [mixed, weight], f"{name}/sum")
    else:
        rows = writer.store(f"{name}.mixing", mixing.transpose(0, 2, 1).reshape(joints, joints * subsets))
        weight = writer.store(f"{name}.weight", layer.weight.transpose(1, 0, 2).reshape(before, subsets * after))
        mapped = writer.add("MatMul", [source, weight], f"{name}/mapped")
        mapped = writer.add("Reshape", [mapped, writer.store_numbers(0, joints * subsets, after)], f"{name}/by_subset")
        total = writer.add("MatMul", [rows, mapped], f"{name}/sum")
    writer.add("Add", [total, writer.store(f"{name}.bias", layer.bias)], output)


def _write_temporal_convolution(writer: GraphWriter, layer: TemporalConvolutionLayer, source: str, output: str) -> None:
    name = layer.name
    taps, before, after = layer.weight.shape
    if taps > 1:
        if layer.dilation > 1:
            start, end = writer.store_numbers(0), writer.store_numbers(np.iinfo(np.int64).max)
            axis, step = writer.store_numbers(2), writer.store_numbers(layer.dilation)
            source = writer.add("Slice", [source, start, end, axis, step], f"{name}/taps")
        source = writer.add("Reshape", [source, writer.store_numbers(0, 0, taps * before)], f"{name}/rows")
    weight = writer.store(f"{name}.weight", layer.weight.reshape(taps * before, after))
    total = writer.add("MatMul", [source, weight], f"{name}/sum")
    writer.add("Add", [total, writer.store(f"{name}.bias", layer.bias)], output)
