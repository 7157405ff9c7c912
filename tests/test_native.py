"""The native kernels against reference/folded_plain.py."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching

from golden_weights import golden_input, golden_state_dict
from kinegraph import native
from kinegraph.errors import CheckpointError, DataError, UserError
from kinegraph.models import build_model
from kinegraph.models.folded import (
    INPUT,
    ConcatenationLayer,
    FoldedNetwork,
    GraphConvolutionLayer,
    Layer,
    SumLayer,
    TemporalMaximumLayer,
)
from kinegraph.models.folded_torch import FoldedModel
from kinegraph.native import NativeNetwork
from kinegraph.native.graph import _measure_depths, find_cover, plan_graph
from kinegraph.skeleton.graph import build_adjacency
from kinegraph.skeleton.layouts import LAYOUTS
from kinegraph.spec import ModelSpec
from reference.folded_plain import Weights, compute_plainly

pytestmark = pytest.mark.skipif(not native.is_available(), reason=native.explain_absence())
SETS = native.list_instruction_sets()
# Relative to the largest number: rounding of float32 with room for the transforms of Winograd's method
TOLERANCE = 2e-5


def assert_right(network: FoldedNetwork, x: NDArray[np.float32], sets: list[str] = SETS) -> None:
    logits, features = compute_plainly(network, x)
    assert len(sets) > 0
    for name in sets:
        kernels = NativeNetwork(network, 2, instruction_set=name)
        found = kernels.compute_features(x)
        assert found.shape == features.shape
        np.testing.assert_allclose(found, features, rtol=0, atol=TOLERANCE * (1 + np.abs(features).max()))
        np.testing.assert_allclose(kernels.compute(x), logits, rtol=0, atol=TOLERANCE * (1 + np.abs(logits).max()))


def test_a_cpu_has_at_least_the_plain_kernels() -> None:
    assert SETS[-1] == "plain"


@pytest.mark.parametrize("padding", ["symmetric", "causal"])
@pytest.mark.parametrize("taps", [1, 3, 5, 7, 9, 11])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (1, 3), (5, 4)])
def test_temporal_convolutions(padding: str, taps: int, stride: int, dilation: int) -> None:
    make = Weights(taps, joints=4)
    for channels, outputs, frames in ((17, 36, 14), (32, 16, 25)):
        layers = [make.temporal("t", INPUT, channels, outputs, taps, stride, dilation, relu=frames == 25)]
        assert_right(make.network(channels, layers, padding=padding), make.draw(1, channels, frames, 4, 1))


@pytest.mark.parametrize("stride", [1, 2])
def test_temporal_convolutions_of_any_number_of_frames(stride: int) -> None:
    make = Weights(joints=3)
    network = make.network(16, [make.temporal("t", INPUT, 16, 16, 9, stride)])
    for frames in range(1, 41):
        assert_right(network, make.draw(1, 16, frames, 3, 1), SETS[:1])


@pytest.mark.parametrize("density", [0.0, 0.2, 1.0])
@pytest.mark.parametrize(("channels", "outputs"), [(3, 16), (20, 7), (64, 80), (16, 128)])
@pytest.mark.parametrize("joints", [1, 5, 18])
def test_graph_convolutions(density: float, channels: int, outputs: int, joints: int) -> None:
    make = Weights(joints, joints=joints)
    for subsets in (1, 3):
        layers = [make.graph("g", INPUT, channels, outputs, subsets, density, relu=subsets == 3)]
        assert_right(make.network(channels, layers), make.draw(2, channels, 7, joints, 2))


@pytest.mark.parametrize("padding", ["symmetric", "causal"])
@pytest.mark.parametrize(("size", "stride"), [(1, 1), (3, 1), (3, 2), (4, 1), (5, 3), (9, 2)])
def test_maxima(padding: str, size: int, stride: int) -> None:
    make = Weights(size)
    for frames in (1, 2, 9, 20):
        layers: list[Layer] = [TemporalMaximumLayer("m", (INPUT,), size=size, stride=stride)]
        assert_right(make.network(19, layers, padding=padding), make.draw(1, 19, frames, 5, 2))


@pytest.mark.parametrize("parts", [(16, 32), (3, 5, 16), (17, 1, 30, 2), (40,)])
def test_concatenations(parts: tuple[int, ...]) -> None:
    make = Weights(len(parts))
    branches: list[Layer] = [make.temporal(f"t{i}", INPUT, 6, outputs, 1) for i, outputs in enumerate(parts)]
    joined = ConcatenationLayer("c", tuple(layer.name for layer in branches), relu=True)
    layers = [*branches, joined, make.temporal("last", "c", sum(parts), 8, 3)]
    assert_right(make.network(6, layers), make.draw(1, 6, 9, 5, 1))


def test_sums_in_every_place() -> None:
    """Sums that a convolution takes over, and those that none can: several readers, relu before, three inputs, one."""
    make = Weights(3)
    first, second = make.temporal("a", INPUT, 16, 16, 9), make.graph("b", INPUT, 16, 16)
    cases: list[list[Layer]] = [
        [first, SumLayer("s", ("a", INPUT), relu=True)],
        [first, SumLayer("s", (INPUT, "a"))],
        [first, second, SumLayer("s", ("a", "b"), relu=True)],
        [second, first, SumLayer("s", ("b", "a")), make.temporal("z", "s", 16, 5, 3)],
        [first, SumLayer("s", ("a", "a"))],
        [replace(first, relu=True), SumLayer("s", ("a", INPUT))],
        [first, SumLayer("s", ("a", INPUT)), SumLayer("r", ("s", "a"), relu=True)],
        [first, second, SumLayer("s", ("a", "b", INPUT), relu=True)],
        [first, SumLayer("s", ("a",), relu=True)],
        [first, second, SumLayer("s", ("a", INPUT)), SumLayer("r", ("b", "s")), make.affine("z", "r", 16, relu=True)],
        [first, SumLayer("s", (INPUT, INPUT)), SumLayer("r", ("s", "a"), relu=True)],
    ]
    x = make.draw(2, 16, 13, 5, 1)
    for layers in cases:
        assert_right(make.network(16, layers), x)


def test_all_kinds_in_one_network() -> None:
    make = Weights(5, joints=7)
    layers = [
        make.affine("norm", INPUT, 3),
        make.graph("g1", "norm", 3, 24, relu=True),
        make.temporal("t1", "g1", 24, 24, 9),
        SumLayer("s1", ("t1", "g1"), relu=True),
        make.graph("g2", "s1", 24, 40, relu=True),
        make.temporal("t2", "g2", 40, 40, 9, stride=2),
        make.temporal("way", "s1", 24, 40, 1, stride=2),
        SumLayer("s2", ("t2", "way"), relu=True),
        make.temporal("b1", "s2", 40, 10, 5, dilation=2),
        TemporalMaximumLayer("b2", ("s2",), size=3),
        ConcatenationLayer("joined", ("b1", "b2"), relu=True),
        make.affine("last", "joined", 50, relu=True),
    ]
    for padding in ("symmetric", "causal"):
        assert_right(make.network(3, layers, padding=padding), make.draw(3, 3, 37, 7, 2))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_chain_of_layers(data: st.DataObject) -> None:
    draw = data.draw
    make = Weights(draw(st.integers(0, 1000)), joints=draw(st.integers(1, 9)))
    sizes = st.integers(1, 40)
    channels = first = draw(sizes)
    source, layers = INPUT, list[Layer]()
    for i in range(draw(st.integers(1, 3))):
        outputs, name = draw(sizes), f"layer_{i}"
        relu = draw(st.booleans())
        if draw(st.booleans()):
            density = draw(st.sampled_from([0.0, 0.3, 1.0]))
            layers.append(make.graph(name, source, channels, outputs, draw(st.integers(1, 4)), density, relu))
        else:
            taps, stride, dilation = (draw(st.integers(1, limit)) for limit in (5, 3, 3))
            layers.append(make.temporal(name, source, channels, outputs, 2 * taps - 1, stride, dilation, relu))
        source, channels = name, outputs
    shape = (draw(st.integers(1, 3)), first, draw(st.integers(1, 30)), make.joints, draw(st.integers(1, 2)))
    network = make.network(first, layers, padding=draw(st.sampled_from(["symmetric", "causal"])))
    assert_right(network, make.draw(*shape), [draw(st.sampled_from(SETS))])


@given(edges=st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=6))
def test_a_cover_holds_all_edges_and_is_the_smallest(edges: list[list[bool]]) -> None:
    matrix = np.array(edges)
    rows, columns = find_cover(matrix)
    assert all(v in rows or w in columns for v, w in zip(*np.nonzero(matrix), strict=True))
    best = min(
        bin(chosen).count("1") + int(matrix[[i for i in range(len(matrix)) if not chosen >> i & 1]].any(axis=0).sum())
        for chosen in range(2 ** len(matrix))
    )
    assert len(rows) + len(columns) == best


@settings(deadline=None)
@given(seed=st.integers(0, 1000), shape=st.tuples(st.integers(1, 60), st.integers(1, 60)), density=st.floats(0, 0.3))
def test_a_cover_is_as_large_as_the_largest_matching(seed: int, shape: tuple[int, int], density: float) -> None:
    """Those of SciPy, for graphs that are too large to try all covers."""
    matrix = np.random.default_rng(seed).random(shape) < density
    rows, columns = find_cover(matrix)
    assert not np.delete(np.delete(matrix, list(rows), 0), list(columns), 1).any()
    matched = maximum_bipartite_matching(csr_array(matrix), perm_type="column")
    assert len(rows) + len(columns) == np.count_nonzero(matched >= 0)


def test_a_cover_takes_few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where half of the rows take away the columns of the others first, one path a round would take 100 rounds."""
    rounds = 0

    def measure(*arguments: Any) -> list[int]:
        nonlocal rounds
        rounds += 1
        return _measure_depths(*arguments)

    monkeypatch.setattr("kinegraph.native.graph._measure_depths", measure)
    triangle = np.tril(np.ones((200, 200), bool))
    for matrix in (
        triangle,
        triangle[::-1],
        triangle.T,
        triangle[:, ::-1],
        np.eye(200, dtype=bool) | np.eye(200, k=1, dtype=bool),
    ):
        rounds = 0
        rows, columns = find_cover(matrix)
        assert len(rows) + len(columns) == 200
        assert 2 <= rounds <= 2 * math.sqrt(200) + 2


@given(seed=st.integers(0, 100), joints=st.integers(1, 12), density=st.floats(0, 1))
def test_a_graph_plan_is_the_definition(seed: int, joints: int, density: float) -> None:
    make = Weights(seed, joints=joints)
    layer = make.graph("g", INPUT, 4, 3, 3, density)
    plan = plan_graph(layer)
    x = make.draw(joints, 4).astype(np.float64)
    products = []
    for part in plan.parts:
        mixed = np.array([sum((a * x[v] for v, a in row), np.zeros(4)) for row in part.mixing])
        mixed = mixed.reshape(len(part.subsets), part.rows, 4)
        products.append(np.einsum("krc,kcd->rd", mixed, layer.weight[list(part.subsets)].astype(np.float64)))
    rows = np.concatenate([*products, np.zeros((0, 3))])
    found = np.array([sum((a * rows[i] for i, a in row), np.zeros(3)) for row in plan.combination])
    expected = np.einsum("vc,kvw,kcd->wd", x, layer.adjacency.astype(np.float64), layer.weight.astype(np.float64))
    np.testing.assert_allclose(found, expected, atol=1e-9)


@pytest.fixture(scope="module")
def st_gcn() -> FoldedNetwork:
    torch.manual_seed(0)
    model = build_model(ModelSpec(), LAYOUTS["nvidia"], 6)
    with torch.no_grad():
        model.train()(torch.randn(4, 3, 24, 34, 1))
        return model.eval().fold()  # type: ignore[operator]


def test_st_gcn_equals_the_folded_model_in_torch(st_gcn: FoldedNetwork) -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 50, 34, 2)).astype(np.float32)
    with torch.no_grad():
        expected = FoldedModel(st_gcn).double()(torch.from_numpy(x).double()).numpy()
    found = NativeNetwork(st_gcn, 2).compute(x)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_st_gcn_equals_the_golden_logits(shared: Path) -> None:
    entries = json.loads((shared / "golden" / "model_logits.json").read_text())
    assert len(entries) == 4
    for entry in entries:
        options = replace(
            ModelSpec(),
            graph_strategy=entry["strategy"],
            input_channels=entry["shape"][1],
            edge_importance_weighting=entry["edge_importance_weighting"],
        )
        model = build_model(options, LAYOUTS[entry["layout"]], entry["num_classes"]).eval()
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        weights = golden_state_dict(shapes, np.array(entry["adjacency"]))
        model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()}, strict=True)
        network = NativeNetwork(model.fold(), 2)  # type: ignore[operator]
        np.testing.assert_allclose(network.compute(golden_input(entry["shape"])), entry["logits"], rtol=0, atol=1e-4)


def test_spatial_graphs_need_about_two_thirds_of_the_rows() -> None:
    for layout in LAYOUTS.values():
        adjacency = build_adjacency(layout, "spatial").astype(np.float32)
        weight = np.zeros((len(adjacency), 1, 1), np.float32)
        layer = GraphConvolutionLayer("g", (INPUT,), adjacency=adjacency, weight=weight, bias=weight[0])
        rows = sum(part.rows * len(part.subsets) for part in plan_graph(layer).parts)
        share = 0.71 if layout.num_joints > 13 else 28 / 39  # few joints: the diagonal subset is a larger part
        assert rows <= share * adjacency.shape[0] * adjacency.shape[1]


def test_neither_threads_nor_neighbours_in_a_batch_change_a_bit(st_gcn: FoldedNetwork) -> None:
    x = np.random.default_rng(1).standard_normal((5, 3, 20, 34, 1)).astype(np.float32)
    expected = np.concatenate([NativeNetwork(st_gcn, 1).compute(clip[None]) for clip in x])
    for threads in (1, 2, 3, 7):
        np.testing.assert_array_equal(NativeNetwork(st_gcn, threads).compute(x), expected)


def test_one_network_answers_several_callers_at_once(st_gcn: FoldedNetwork) -> None:
    clips = np.random.default_rng(2).standard_normal((12, 1, 3, 16, 34, 1)).astype(np.float32)
    network = NativeNetwork(st_gcn, 2)
    expected = [network.compute(clip) for clip in clips]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(network.compute, clips))
    np.testing.assert_array_equal(found, expected)


def test_other_numbers_of_frames_between_calls(st_gcn: FoldedNetwork) -> None:
    random = np.random.default_rng(3)
    network = NativeNetwork(st_gcn, 2)
    for frames in (7, 30, 1, 12):
        x = random.standard_normal((1, 3, frames, 34, 1)).astype(np.float32)
        np.testing.assert_array_equal(network.compute(x), NativeNetwork(st_gcn, 2).compute(x))


def test_the_mean_over_real_frames_only() -> None:
    """Frames after a person's last value, and people without any, do not count; in a clip of zeros all do."""
    make = Weights(4)
    network = make.network(4, [make.temporal("t", INPUT, 4, 8, 3, stride=2, relu=True)])
    x = make.draw(4, 4, 11, 5, 2)
    x[0, :, 7:, :, 0] = 0
    x[0, :, 3] = 0
    x[1, :, :, :, 1] = 0
    x[2] = 0
    _, features = compute_plainly(network, x)
    lengths = [(7, 11), (11, 0), (11, 11), (11, 11)]
    for name in SETS:
        found = NativeNetwork(replace(network, only_real_frames=True), 2, instruction_set=name).compute(x)
        for clip, ends in enumerate(lengths):
            real = np.concatenate([features[clip, m, : -(-end // 2)] for m, end in enumerate(ends)])  # (frames, V, C')
            expected = real.mean(axis=(0, 1)) @ network.head_weight + network.head_bias
            np.testing.assert_allclose(found[clip], expected, rtol=0, atol=1e-5)


def test_numbers_that_are_none_stay_none() -> None:
    make = Weights()
    network = make.network(16, [make.temporal("t", INPUT, 16, 16, 1, relu=True), TemporalMaximumLayer("m", ("t",))])
    x = make.draw(1, 16, 6, 5, 1)
    x[0, :, 2, 3, 0] = np.nan
    for name in SETS:
        kernels = NativeNetwork(network, 1, instruction_set=name)
        bad = np.isnan(kernels.compute_features(x)[0, 0]).all(axis=-1)  # (T, V)
        assert set(zip(*np.nonzero(bad), strict=True)) <= {(1, 3), (2, 3), (3, 3)}
        assert bad.any()
        assert np.isnan(kernels.compute(x)).all()


def test_clips_of_another_shape_are_refused(st_gcn: FoldedNetwork) -> None:
    network = NativeNetwork(st_gcn, 1)
    assert network.compute(np.zeros((0, 3, 5, 34, 1), np.float32)).shape == (0, 6)
    for shape in ((1, 3, 5, 33, 1), (1, 2, 5, 34, 1), (1, 3, 0, 34, 1), (1, 3, 5, 34, 0), (3, 5, 34)):
        with pytest.raises(DataError, match="clips: got"):
            network.compute(np.zeros(shape, np.float32))


def test_arguments_that_are_not_to_be_had(st_gcn: FoldedNetwork) -> None:
    for threads in (0, -1, 257):
        with pytest.raises(UserError, match="threads"):
            NativeNetwork(st_gcn, threads)
    with pytest.raises(UserError, match="instruction_set"):
        NativeNetwork(st_gcn, 1, instruction_set="mmx")


def test_graphs_with_too_many_links_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    make = Weights(joints=6)
    network = make.network(3, [make.graph("g", INPUT, 3, 4, 2, 1.0), make.graph("h", "g", 4, 4, 2, 1.0)])
    monkeypatch.setattr("kinegraph.native.build.MAX_LINKS", 144)
    NativeNetwork(network, 1)
    monkeypatch.setattr("kinegraph.native.build.MAX_LINKS", 143)
    with pytest.raises(CheckpointError, match=r"144 links between joints, more than 143.*onnxruntime"):
        NativeNetwork(network, 1)


def test_no_torch_is_imported() -> None:
    code = "import sys, kinegraph.native; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
