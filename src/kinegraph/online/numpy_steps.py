"""A folded network, one frame at a time, in NumPy: no torch needed.

Inside, a frame of N people is (N, V, C). Each temporal layer keeps the frames that it still needs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
from kinegraph.online.schedule import Schedule, make_schedule, measure_span

Array = NDArray[np.float32]
Memory = dict[str, Array]
Step = Callable[..., Array]


class NumpySteps:
    """Carries out the steps of one network. It holds weights only: what changes is in the memory that it is given."""

    pools_itself = False
    takes_raw_frames = False

    def __init__(self, network: FoldedNetwork) -> None:
        self.network = network
        self.schedule: Schedule = make_schedule(network)
        self.steps: dict[str, Step] = {layer.name: _make_step(layer) for layer in network.layers}
        self.memory_shapes = _measure_memory(network, self.schedule)
        self.num_classes = network.num_classes
        self.total_stride = self.schedule.total_stride
        self.delay_frames = self.schedule.delay_frames
        self.first_valid_frame = self.schedule.first_valid_frame

    def start(self, num_people: int) -> Memory:
        """The memory before the first frame: zeros, and for a maximum minus infinity."""
        return {
            key: np.full((num_people, *shape), fill, np.float32) for key, (shape, fill) in self.memory_shapes.items()
        }

    def step(self, frame: Array, phase: int, memory: Memory) -> tuple[Array | None, Memory]:
        """frame (N, C, V), the number of the frame modulo the total stride -> logits (N, classes) and the new memory.

        Logits are None at frames at which the last layer is not evaluated. `memory` itself stays as it was.
        """
        memory = dict(memory)
        results: dict[str, Array] = {INPUT: np.ascontiguousarray(frame.transpose(0, 2, 1))}
        for layer in self.network.layers:
            is_due = self.schedule.timings[layer.name].is_due(phase)
            if isinstance(layer, TemporalConvolutionLayer | TemporalMaximumLayer):
                source = results.get(layer.inputs[0])
                if source is None:
                    continue
                window = _append(memory, layer.name, source)
                if is_due:
                    results[layer.name] = self.steps[layer.name](window)
                continue
            sources = [self._recall(layer, place, results, memory) for place in range(len(layer.inputs))]
            if is_due:
                results[layer.name] = self.steps[layer.name](*sources)
        features = results.get(self.schedule.last)
        if features is None:
            return None, memory
        logits = features.mean(axis=1) @ self.network.head_weight + self.network.head_bias
        return logits, memory

    def _recall(self, layer: Layer, place: int, results: dict[str, Array], memory: Memory) -> Array | None:
        """An input of a layer, from as many results ago as this layer has to wait for the others."""
        source = results.get(layer.inputs[place])
        if source is None or not self.schedule.lags.get((layer.name, place)):
            return source
        return np.asarray(_append(memory, f"{layer.name}/{place}", source)[:, :, 0])


def _append(memory: Memory, key: str, newest: Array) -> Array:
    """(N, V, frames, C): what is kept, then the newest; the memory drops its oldest."""
    kept = memory.get(key)
    if kept is None:
        return newest[:, :, None]
    window = np.concatenate([kept, newest[:, :, None]], axis=2)
    memory[key] = window[:, :, 1:]
    return window


def _measure_memory(network: FoldedNetwork, schedule: Schedule) -> dict[str, tuple[tuple[int, int, int], float]]:
    """Key -> shape (V, frames, C) and first value of what is kept."""
    channels = network.count_channels()
    shapes = {}
    for layer in network.layers:
        span, _ = measure_span(layer)
        if span:
            fill = -np.inf if isinstance(layer, TemporalMaximumLayer) else 0.0
            shapes[layer.name] = ((network.num_joints, span, channels[layer.inputs[0]]), fill)
        for place, source in enumerate(layer.inputs):
            lag = schedule.lags.get((layer.name, place))
            if lag:
                shapes[f"{layer.name}/{place}"] = ((network.num_joints, lag, channels[source]), 0.0)
    return shapes


def _activate(x: NDArray[Any], relu: bool) -> Array:
    return np.maximum(x, 0, out=x) if relu else x


def _make_step(layer: Layer) -> Step:
    match layer:
        case AffineLayer():
            return lambda x: _activate(x * layer.scale + layer.shift, layer.relu)
        case GraphConvolutionLayer():
            return _make_graph_step(layer)
        case TemporalConvolutionLayer():
            return _make_temporal_step(layer)
        case TemporalMaximumLayer():
            return lambda window: _activate(window.max(axis=2), layer.relu)
        case SumLayer():
            return lambda first, second, *others: _activate(sum(others, first + second), layer.relu)
        case ConcatenationLayer():
            return lambda *parts: _activate(np.concatenate(parts, axis=2), layer.relu)
    raise TypeError(type(layer).__name__)


def _make_graph_step(layer: GraphConvolutionLayer) -> Step:
    """Joints first where that leaves fewer products, else channels first."""
    subsets, before, after = layer.weight.shape
    joints = layer.adjacency.shape[1]
    mixing = layer.adjacency.transpose(2, 0, 1)  # (w, k, v)
    if mixes_joints_first(layer):
        rows = np.ascontiguousarray(mixing.reshape(joints * subsets, joints))
        weight = np.ascontiguousarray(layer.weight.reshape(subsets * before, after))

        def mix_joints_first(x: Array) -> Array:
            y = (rows @ x).reshape(-1, subsets * before) @ weight
            y = y.reshape(len(x), joints, after)
            y += layer.bias
            return _activate(y, layer.relu)

        return mix_joints_first
    rows = np.ascontiguousarray(mixing.transpose(0, 2, 1).reshape(joints, joints * subsets))
    weight = np.ascontiguousarray(layer.weight.transpose(1, 0, 2).reshape(before, subsets * after))

    def mix_channels_first(x: Array) -> Array:
        y: Array = rows @ (x.reshape(-1, before) @ weight).reshape(len(x), joints * subsets, after)
        y += layer.bias
        return _activate(y, layer.relu)

    return mix_channels_first


def _make_temporal_step(layer: TemporalConvolutionLayer) -> Step:
    taps, before, after = layer.weight.shape
    weight = np.ascontiguousarray(layer.weight.reshape(taps * before, after))

    def convolve(window: Array) -> Array:
        people, joints, _, _ = window.shape
        y: Array = window[:, :, :: layer.dilation].reshape(people * joints, taps * before) @ weight
        y += layer.bias
        return _activate(y.reshape(people, joints, after), layer.relu)

    return convolve
