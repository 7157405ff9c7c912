"""When each layer of a folded network is evaluated, if frames come one at a time.

A result of a layer belongs to a frame: the middle of what it sees (symmetric padding) or the last of it (causal). With
stride s there is one for every frame that s divides, counted from the first. It is ready `reach` frames later: that
many frames it sees after its own. So at frame n, from 0, the layer is evaluated if s divides n - reach.

The idea of running a trained network step by step is that of continual inference networks (Hedegaard and Iosifidis,
2022); here the state is a value outside the network, and strides are kept.
"""

from __future__ import annotations

from dataclasses import dataclass

from kinegraph.errors import Problem, UserError
from kinegraph.models.folded import (
    INPUT,
    ConcatenationLayer,
    FoldedNetwork,
    Layer,
    SumLayer,
    TemporalConvolutionLayer,
    TemporalMaximumLayer,
)


@dataclass(frozen=True)
class Timing:
    """`stride` and `reach` of a layer's results, in frames of the input."""

    stride: int
    reach: int

    def is_due(self, phase: int) -> bool:
        """Whether the layer is evaluated at a frame; `phase`: its number modulo a multiple of the stride."""
        return (phase - self.reach) % self.stride == 0


@dataclass(frozen=True)
class Schedule:
    """Timing of every layer (and of INPUT), and `lags`: (layer, place of the input) -> how many results it waits."""

    timings: dict[str, Timing]
    lags: dict[tuple[str, int], int]
    last: str

    @property
    def total_stride(self) -> int:
        """Frames between two answers of the network."""
        return self.timings[self.last].stride

    @property
    def delay_frames(self) -> int:
        """The answer at a frame is about the frame so long before it."""
        return self.timings[self.last].reach

    @property
    def first_valid_frame(self) -> int:
        """From this frame on, counted from 0, no answer sees the state that the network started with."""
        return 2 * self.delay_frames


def make_schedule(network: FoldedNetwork) -> Schedule:
    """The schedule of a folded network. Raises UserError where branches cannot meet (odd reaches behind a stride)."""
    timings = {INPUT: Timing(1, 0)}
    lags: dict[tuple[str, int], int] = {}
    for layer in network.layers:
        sources = [timings[name] for name in layer.inputs]
        stride, reach = sources[0].stride, max(source.reach for source in sources)
        if isinstance(layer, SumLayer | ConcatenationLayer):
            for place, source in enumerate(sources):
                if source.stride != stride or (reach - source.reach) % stride:
                    raise _refuse(layer, sources)
                lags[layer.name, place] = (reach - source.reach) // stride
        span, own_stride = measure_span(layer)
        if network.padding == "symmetric":
            reach += span // 2 * stride
        timings[layer.name] = Timing(stride * own_stride, reach)
    return Schedule(timings, lags, network.layers[-1].name)


def measure_span(layer: Layer) -> tuple[int, int]:
    """(how many earlier results of its input a layer sees, its own stride)."""
    match layer:
        case TemporalConvolutionLayer():
            return (len(layer.weight) - 1) * layer.dilation, layer.stride
        case TemporalMaximumLayer():
            return layer.size - 1, layer.stride
    return 0, 1


def _refuse(layer: Layer, sources: list[Timing]) -> UserError:
    got = ", ".join(f"stride {source.stride} and reach {source.reach}" for source in sources)
    expected = "branches of one stride whose reaches differ by whole strides"
    return UserError(Problem(f"layer {layer.name}", got, expected, "Use mode='window', or train with causal padding."))
