"""int8 kernels against exact arithmetic on what the bytes stand for, and the C extension against bad input."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kinegraph import native
from kinegraph.errors import UserError
from kinegraph.models import build_model
from kinegraph.models.folded import (
    INPUT,
    ConcatenationLayer,
    FoldedNetwork,
    GraphConvolutionLayer,
    Layer,
    SumLayer,
    TemporalConvolutionLayer,
    TemporalMaximumLayer,
)
from kinegraph.models.quantization import Quantization
from kinegraph.native import NativeNetwork
from kinegraph.native.quantization import Scale, quantize_weight
from kinegraph.skeleton.layouts import LAYOUTS
from kinegraph.spec import ModelSpec
from reference.folded_plain import Weights, apply_plainly, compute_plainly

if native.is_available():
    from kinegraph.native import _kernels

pytestmark = pytest.mark.skipif(not native.is_available(), reason=native.explain_absence())
SETS = native.list_instruction_sets()
STEP = 2.0**-5
# Of the input: bytes stand for -40 to 215 steps, so that drawn numbers on the grid need no rounding
INPUT_RANGE = (-40 * STEP, 215 * STEP)


def draw_on_grid(make: Weights, *shape: int) -> NDArray[np.float32]:
    return (make.random.integers(-40, 216, shape) * STEP).astype(np.float32)


def round_weights(layer: Layer) -> Layer:
    """The layer with the weights that its bytes stand for."""
    if isinstance(layer, GraphConvolutionLayer):
        pairs = [quantize_weight(weight) for weight in layer.weight]
        return replace(layer, weight=np.stack([weight * steps for weight, steps in pairs]))
    if isinstance(layer, TemporalConvolutionLayer):
        weight, steps = quantize_weight(layer.weight)
        return replace(layer, weight=weight * steps)
    return layer


def assert_exact(layer: Layer, x: NDArray[np.float32], make: Weights, residual: bool, padding: str) -> None:
    """As the last layer, results are floats and exact; before another one, they are rounded to the nearest byte."""
    relu = layer.relu
    exact = apply_plainly(round_weights(layer), [x.astype(np.float64).transpose(0, 4, 2, 3, 1)], padding == "causal")
    layers = [layer]
    if residual:
        layers = [replace(layer, relu=False), SumLayer("sum", (layer.name, INPUT), relu=relu)]
        exact = exact + x.transpose(0, 4, 2, 3, 1)
    exact = np.maximum(exact, 0) if relu else exact
    low, high = (float(np.quantile(exact, part)) for part in (0.02, 0.98))
    result = layers[-1].name
    ranges = {INPUT: INPUT_RANGE, layer.name: (low, high), result: (low, high), "same": (low, high)}
    channels = x.shape[1]
    for name in SETS:
        network = make.network(channels, layers, padding=padding)
        found = NativeNetwork(network, 2, Quantization(ranges), instruction_set=name).compute_features(x)
        np.testing.assert_allclose(found, exact, rtol=0, atol=1e-5 * (1 + np.abs(exact).max()))
        longer = [*layers, TemporalMaximumLayer("same", (result,), size=1)]
        network = make.network(channels, longer, padding=padding)
        found = NativeNetwork(network, 2, Quantization(ranges), instruction_set=name).compute_features(x)
        scale = Scale.of_range(low, high)
        lowest, highest = ((q - scale.zero_point) * scale.scale for q in (0, 255))
        atol = scale.scale * 0.501 + 1e-5 * np.abs(exact).max()
        np.testing.assert_allclose(found, np.clip(exact, lowest, highest), rtol=0, atol=atol)


@pytest.mark.parametrize(("channels", "outputs"), [(16, 16), (20, 70), (64, 128), (130, 33)])
@pytest.mark.parametrize(("taps", "stride", "dilation"), [(1, 1, 1), (9, 1, 1), (9, 2, 1), (3, 3, 2), (5, 1, 3)])
def test_temporal_convolutions_on_bytes(channels: int, outputs: int, taps: int, stride: int, dilation: int) -> None:
    make = Weights(taps + outputs, joints=3)
    layer = make.temporal("t", INPUT, channels, outputs, taps, stride, dilation, relu=stride == 1)
    x = draw_on_grid(make, 1, channels, 11, 3, 2)
    residual = channels == outputs and stride == 1
    assert_exact(layer, x, make, residual, "causal" if taps == 5 else "symmetric")


@pytest.mark.parametrize(("channels", "outputs"), [(16, 16), (64, 20), (70, 64)])
@pytest.mark.parametrize(("density", "subsets"), [(0.0, 1), (0.3, 3), (1.0, 2)])
def test_graph_convolutions_on_bytes(channels: int, outputs: int, density: float, subsets: int) -> None:
    make = Weights(channels + subsets, joints=7)
    layer = make.graph("g", INPUT, channels, outputs, subsets, density, relu=subsets == 3)
    assert_exact(layer, draw_on_grid(make, 2, channels, 6, 7, 1), make, channels == outputs, "symmetric")


@given(
    weight=st.lists(st.lists(st.floats(-1e3, 1e3, width=32), min_size=3, max_size=3), min_size=1, max_size=20),
)
def test_weights_as_bytes_are_no_further_than_with_the_largest_as_127(weight: list[list[float]]) -> None:
    values = np.array(weight, np.float32)
    quantized, steps = quantize_weight(values)
    largest = np.maximum(np.abs(values.astype(np.float64)).max(axis=0), 1e-30) / 127
    plain = np.rint(values / largest) * largest
    error, plain_error = (np.square(found - values).sum(axis=0) for found in (quantized * steps, plain))
    assert (error <= plain_error * (1 + 1e-6) + 1e-20).all()
    assert np.abs(quantized.astype(int)).max() <= 127


@given(ends=st.tuples(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6)))
def test_a_scale_holds_its_range_and_zero(ends: tuple[float, float]) -> None:
    low, high = min(ends), max(ends)
    scale = Scale.of_range(low, high)
    assert 0 <= scale.zero_point <= 255
    slack = scale.scale * 0.5001 + 1e-25
    assert -scale.zero_point * scale.scale <= min(low, 0) + slack
    assert (255 - scale.zero_point) * scale.scale >= max(high, 0) - slack


def test_layers_that_stay_floats_among_bytes() -> None:
    make = Weights(2, joints=4)
    layers: list[Layer] = [
        make.temporal("first", INPUT, 16, 32, 3, relu=True),
        make.graph("graph", "first", 32, 32, relu=True),
        SumLayer("three", ("first", "graph", "first"), relu=True),
        TemporalMaximumLayer("most", ("three",), size=3, stride=2),
        make.temporal("way", "three", 32, 16, 1, stride=2),
        ConcatenationLayer("joined", ("most", "way")),
        make.affine("scaled", "joined", 48, relu=True),
        make.temporal("last", "scaled", 48, 24, 5),
    ]
    network = make.network(16, layers)
    x = draw_on_grid(make, 2, 16, 15, 4, 1)
    ranges = find_ranges(network, x)
    _, expected = compute_plainly(network, x)
    for name in SETS:
        found = NativeNetwork(network, 2, Quantization(ranges), instruction_set=name).compute_features(x)
        assert np.linalg.norm(found - expected) < 0.03 * np.linalg.norm(expected)


def find_ranges(network: FoldedNetwork, x: NDArray[np.float32]) -> dict[str, tuple[float, float]]:
    ranges = {INPUT: (float(x.min()), float(x.max()))}
    for i, layer in enumerate(network.layers):
        # Results so far, through a head that nobody looks at
        channels = network.count_channels()[layer.name]
        head = np.zeros((channels, 1), np.float32)
        part = replace(network, layers=network.layers[: i + 1], head_weight=head, head_bias=head[0])
        y = NativeNetwork(part, 2).compute_features(x)
        ranges[layer.name] = (float(y.min()), float(y.max()))
    return ranges


def test_st_gcn_in_bytes_is_close() -> None:
    torch.manual_seed(0)
    model = build_model(ModelSpec(), LAYOUTS["coco"], 6)
    random = np.random.default_rng(0)
    x = random.standard_normal((3, 3, 1, 17, 1)) + 0.3 * np.cumsum(random.standard_normal((3, 3, 40, 17, 1)), axis=2)
    x = x.astype(np.float32)
    with torch.no_grad():
        for _ in range(20):
            model.train()(torch.from_numpy(x))
        network = model.eval().fold()  # type: ignore[operator]
    expected = NativeNetwork(network, 2).compute_features(x)
    quantized = NativeNetwork(network, 2, Quantization(find_ranges(network, x)))
    found = quantized.compute_features(x)
    assert np.linalg.norm(found - expected) < 0.05 * np.linalg.norm(expected)
    logits = NativeNetwork(network, 2).compute(x)
    np.testing.assert_allclose(quantized.compute(x), logits, rtol=0, atol=0.02 * np.abs(logits).max())
    one_by_one = np.concatenate([NativeNetwork(network, 1, quantized.quantization).compute(clip[None]) for clip in x])
    np.testing.assert_array_equal(quantized.compute(x), one_by_one)


def test_all_missing_ranges_are_told_at_once() -> None:
    make = Weights()
    layers: list[Layer] = [make.temporal("t", INPUT, 16, 16, 3), make.temporal("u", "t", 16, 16, 3)]
    network = make.network(16, layers)
    with pytest.raises(UserError) as caught:
        NativeNetwork(network, 1, Quantization({INPUT: (0, 1), "u": (1, float("nan"))}))
    assert [problem.where for problem in caught.value.problems] == [
        "quantization.activation_ranges['t']",
        "quantization.activation_ranges['u']",
    ]


def make_links(*rows: list[int]) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]:
    start = np.cumsum([0, *(len(row) for row in rows)], dtype=np.int32)
    sources = np.array([v for row in rows for v in row], np.int32)
    return start, sources, np.ones(len(sources), np.float32)


def test_the_extension_refuses_what_does_not_fit() -> None:
    """Sizes, references and kinds; the network is as it was after each, and answers in the end."""
    floats = lambda *shape: np.ones(shape, np.float32)  # noqa: E731
    nothing, links = floats(0), make_links([0], [1])
    part = (2, 1, *links, floats(4, 4), nothing)
    network = _kernels.Network(4, 2, "plain")
    good_temporal = (0, -1, False, False, 4, (3, 1, 1, 1), floats(3, 4, 4), nothing, floats(4), None)
    good_graph = (0, -1, False, 4, floats(2, 4), (part,), *links, None)
    bad: list[tuple[str, tuple[object, ...]]] = [
        ("add_affine", (0, False, floats(2, 4), floats(2, 3))),
        ("add_affine", (1, False, floats(2, 4), floats(2, 4))),
        ("add_affine", (-1, False, floats(2, 4), floats(2, 4))),
        ("add_maximum", (0, False, 0, 1, 0)),
        ("add_maximum", (0, False, 3, 1, 3)),
        ("add_maximum", (0, False, 3, 0, 1)),
        ("add_joined", ((), False, True)),
        ("add_joined", ((0, 7), False, True)),
        ("add_joined", ((0,) * 65, False, False)),
        ("add_conversion", (5, True, 1.0, 0.0)),
        ("add_conversion", (0, False, 1.0, 0.0)),
        ("add_head", (3, False, floats(4, 3), floats(3))),
    ]
    for position, values in (
        (0, (3, -1)),
        (1, (1, -2)),
        (4, (0, 5, 2**40)),
        (5, ((2, 1, 1, 1), (3, 0, 1, 1), (3, 1, 0, 1), (3, 1, 1, 3), (3, 1, 1, -1), (2**40, 2**40, 1, 1))),
        (6, (floats(3, 4, 5), floats(1), np.ones((3, 4, 4), np.int8))),
        (8, (floats(3), floats(5))),
        (3, (True,)),
        (9, ((True, 1.0, 0.0, 0), (True, 1.0, 0.0, 256))),
    ):
        bad += [
            ("add_temporal", (*good_temporal[:position], value, *good_temporal[position + 1 :])) for value in values
        ]
    parts = [
        (3, 1, *links, floats(4, 4), nothing),
        (2, 2, *links, floats(8, 4), nothing),
        (2, 1, *make_links([0], [2]), floats(4, 4), nothing),
        (2, 1, *make_links([0], [-1]), floats(4, 4), nothing),
        (2, 1, links[0][::-1].copy(), *links[1:], floats(4, 4), nothing),
        (2, 1, np.array([0, 9, 2], np.int32), *links[1:], floats(4, 4), nothing),
        (2, 1, *links[:2], floats(1), floats(4, 4), nothing),
        (0, 1, *make_links(), floats(4, 4), nothing),
    ]
    bad += [("add_graph", (*good_graph[:5], (wrong,), *good_graph[6:])) for wrong in parts]
    bad += [("add_graph", (*good_graph[:6], *make_links(*rows), None)) for rows in ([[0]], [[0], [2]], [[0], [-5]])]
    for method, arguments in bad:
        with pytest.raises(ValueError, match=r"[a-z]"):
            getattr(network, method)(*arguments)
    for method, arguments in (("add_temporal", (1,)), ("add_graph", (*good_graph[:5], (1,), *good_graph[6:]))):
        with pytest.raises(TypeError):
            getattr(network, method)(*arguments)
    assert network.add_temporal(*good_temporal) == 1
    assert network.add_graph(1, *good_graph[1:]) == 2
    x, logits = np.ones((1, 4, 5, 2, 1), np.float32), np.zeros((1, 3), np.float32)
    with pytest.raises(ValueError, match="head"):
        network.compute(x, x.shape, 1, logits, bytearray())
    network.add_head(3, False, floats(4, 3), floats(3))
    with pytest.raises(ValueError, match="head"):
        network.add_temporal(*good_temporal)
    assert_calls_are_checked(network, x, logits)
    network.compute(x, x.shape, 1, logits, bytearray())
    # 13 in the three inner frames and 9 in the outer two; 4 of their mean and 1; 4 of that and 1
    np.testing.assert_allclose(logits, 4 * (4 * (13 * 3 + 9 * 2) / 5 + 1) + 1, rtol=1e-6)


def assert_calls_are_checked(network: object, x: NDArray[np.float32], logits: NDArray[np.float32]) -> None:
    n, c, t, v, m = x.shape
    shapes = [shape for shape in product((0, n, -1), (c, c + 1), (t, t + 1, 2**62), (v, 2**40), (m, 0, 2**62))]
    assert len(shapes) == 108
    for shape in shapes:
        if shape != x.shape:
            with pytest.raises((ValueError, OverflowError)):
                network.compute(x, shape, 1, logits, bytearray())  # type: ignore[attr-defined]
    for threads in (0, 257, -(2**40)):
        with pytest.raises(ValueError, match="threads"):
            network.compute(x, x.shape, threads, logits, bytearray())  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="logits"):
        network.compute(x, x.shape, 1, logits[:, :2].copy(), bytearray())  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="features"):
        network.compute(x, x.shape, 1, logits, np.zeros(7, np.float32))  # type: ignore[attr-defined]
    with pytest.raises((BufferError, TypeError)):
        network.compute(x, x.shape, 1, b"123456789012", bytearray())  # type: ignore[attr-defined]


def test_arguments_that_build_while_they_are_read() -> None:
    """A number whose conversion adds a layer to the same network must not confuse the one that is being built."""
    network = _kernels.Network(4, 2, "plain")
    ones = np.ones((2, 4), np.float32)

    class Sly:
        def __index__(self) -> int:
            network.add_affine(0, False, ones, ones)
            return 2

    part = (Sly(), 1, *make_links([0], [1]), np.ones((4, 4), np.float32), ones[:0])
    with pytest.raises(ValueError, match=r"[a-z]"):
        network.add_graph(0, -1, False, 4, ones, (part,), *make_links([0], [1]), None)  # type: ignore[arg-type]
    assert network.add_affine(0, False, ones, ones) == 2


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_the_extension_survives_any_numbers(data: st.DataObject) -> None:
    """Numbers of any size beside buffers of any: a ValueError or a result, never another thing."""
    number = st.one_of(st.integers(-3, 20), st.sampled_from([2**16, 2**31 - 1]))
    long_number = st.one_of(number, st.sampled_from([2**32, 2**62, -(2**63)]))
    buffer = st.integers(0, 300).map(lambda size: np.zeros(size, np.int32))
    boolean = st.booleans()
    form = st.none() | st.tuples(boolean, st.floats(-1, 1), st.floats(0, 9), st.integers(-1, 300))
    part = st.tuples(long_number, long_number, buffer, buffer, buffer, buffer, buffer)
    calls = {
        "add_affine": (number, boolean, buffer, buffer),
        "add_maximum": (number, boolean, long_number, long_number, long_number),
        "add_joined": (st.lists(long_number, max_size=4).map(tuple), boolean, boolean),
        "add_conversion": (number, boolean, st.floats(-1, 1), st.floats(0, 9)),
        "add_head": (long_number, boolean, buffer, buffer),
        "add_temporal": (
            *(number, number, boolean, boolean, long_number),
            *(st.tuples(*[long_number] * 4), buffer, buffer, buffer, form),
        ),
        "add_graph": (
            *(number, number, boolean, long_number, buffer),
            *(st.lists(part, max_size=2).map(tuple), buffer, buffer, buffer, form),
        ),
        "compute": (buffer, st.tuples(*[long_number] * 5), long_number, buffer, buffer),
    }
    network = _kernels.Network(
        data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5)), data.draw(st.sampled_from(SETS))
    )
    for _ in range(4):
        method = data.draw(st.sampled_from(sorted(calls)))
        try:
            getattr(network, method)(*(data.draw(argument) for argument in calls[method]))
        except (ValueError, OverflowError, MemoryError):
            continue
