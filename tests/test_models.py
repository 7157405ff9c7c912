from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from golden_weights import golden_input, golden_state_dict
from kinegraph.errors import DataError, SpecError
from kinegraph.models import MODELS, build_model
from kinegraph.models.st_gcn import STGCN, GraphConvolution
from kinegraph.skeleton.graph import STRATEGIES, build_adjacency
from kinegraph.skeleton.layouts import LAYOUTS, Layout
from kinegraph.spec import ModelSpec
from reference import st_gcn_plain

NUM_CLASSES = 5
FIRST = ("ST-GCN", "EF-GCN")
SMALL = {"width": 0.5, "depth": 1}
CASES = [
    *product(FIRST, LAYOUTS, STRATEGIES),
    *product([name for name in MODELS if name not in FIRST], LAYOUTS, ["spatial_exact"]),
    *product(["ST-GCN++", "CTR-GCN", "TD-GCN", "2s-AGCN"], ["coco"], ["uniform", "distance", "spatial"]),
]
"""All of them for the first two; the others are small, and take every layout and every strategy once."""


def make_options(model_type: str = "ST-GCN", **changes: object) -> ModelSpec:
    return replace(ModelSpec(), model_type=model_type, **changes)


def make_clips(layout: Layout, clips: int = 2, frames: int = 3, people: int = 2, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(clips, channels, frames, layout.num_joints, people, generator=generator)


def warm_up(model: nn.Module, layout: Layout) -> nn.Module:
    """Give the batch normalisations statistics, so that evaluation mode is not the identity there."""
    model.train()
    with torch.no_grad():
        model(make_clips(layout))
    return model.eval()


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Layout]:
    """Each network with each layout and strategy, in evaluation mode."""
    model_type, layout_name, strategy = request.param
    torch.manual_seed(0)
    layout = LAYOUTS[layout_name]
    size = {} if model_type in FIRST else SMALL
    model = build_model(make_options(model_type, graph_strategy=strategy, **size), layout, NUM_CLASSES)
    with torch.no_grad():
        for parameter in model.parameters():  # some start at zero, and what comes after them has no gradient then
            parameter.add_(0.05 * torch.randn_like(parameter))
    return warm_up(model, layout), layout


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return warm_up(build_model(make_options(), LAYOUTS["coco"], NUM_CLASSES), LAYOUTS["coco"])


def test_there_are_as_many_cases_as_expected() -> None:
    assert len(CASES) == len(set(CASES)) == 2 * 11 * 4 + 6 * 11 + 4 * 3
    assert {name for name, _, _ in CASES} == set(MODELS)


@torch.no_grad()
def test_logits_have_a_row_per_clip(case: tuple[nn.Module, Layout]) -> None:
    model, layout = case
    for clips, frames, people in ((1, 6, 1), (2, 2, 3), (2, 1, 1)):
        logits = model(make_clips(layout, clips, frames, people))
        assert logits.shape == (clips, NUM_CLASSES)
        assert logits.isfinite().all()


def test_every_parameter_gets_a_gradient(case: tuple[nn.Module, Layout]) -> None:
    # In training mode a bias before a batch normalisation rightly gets none, so this is asked in evaluation mode
    model, layout = case
    model.zero_grad()
    model(make_clips(layout)).square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    model.zero_grad()
    assert without == []


@torch.no_grad()
def test_evaluation_is_deterministic_and_treats_clips_apart(case: tuple[nn.Module, Layout]) -> None:
    model, layout = case
    clips = make_clips(layout, clips=3)
    before = clips.clone()
    together = model(clips)
    assert torch.equal(model(clips), together)
    assert torch.equal(clips, before)
    apart = torch.cat([model(clip[None]) for clip in clips])
    torch.testing.assert_close(apart, together, rtol=1e-4, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-4


@torch.no_grad()
def test_the_order_of_people_does_not_matter(case: tuple[nn.Module, Layout]) -> None:
    model, layout = case
    clips = make_clips(layout, people=3)
    logits = model(clips)
    torch.testing.assert_close(model(clips[..., [2, 0, 1]]), logits, rtol=1e-4, atol=1e-5)
    assert (model(clips[..., [0, 0, 1]]) - logits).abs().max() > 1e-5


@pytest.mark.parametrize("model_type", MODELS)
def test_training_learns_a_small_batch(model_type: str) -> None:
    torch.manual_seed(0)
    layout = LAYOUTS["coco"]
    model = build_model(make_options(model_type, dropout=0.1), layout, NUM_CLASSES)
    clips, labels = make_clips(layout, clips=5, frames=5, people=1), torch.arange(5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    losses = []
    for _ in range(12):
        loss = nn.functional.cross_entropy(model(clips), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1
    assert losses[-1] < 0.1


def test_unknown_models_and_strategies_are_named() -> None:
    options = make_options()
    options.model_type = "ST-GCM"
    with pytest.raises(SpecError, match=r"model\.model_type.*Did you mean 'ST-GCN'"):
        build_model(options, LAYOUTS["coco"], NUM_CLASSES)
    options = make_options()
    options.graph_strategy = "far"
    with pytest.raises(DataError, match="graph_strategy"):
        build_model(options, LAYOUTS["coco"], NUM_CLASSES)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("layout_name", LAYOUTS)
def test_graph_convolution_equals_its_definition(layout_name: str, strategy: str) -> None:
    torch.manual_seed(0)
    adjacency = build_adjacency(LAYOUTS[layout_name], strategy)
    weights = torch.from_numpy(adjacency) * (1 + torch.rand(adjacency.shape))
    layer = GraphConvolution(2, 3, len(weights))
    x = torch.randn(2, 2, 4, len(adjacency[0]))
    with torch.no_grad():
        y = layer(x, weights)
    assert y.shape == (2, 3, 4, len(adjacency[0]))
    weight, bias = layer.conv.weight.detach().double().numpy(), layer.conv.bias.detach().double().numpy()
    for clip, frame in ((0, 0), (1, 3)):
        frame_x = x[clip, :, frame].double().numpy()
        plain = st_gcn_plain.convolve_graph(frame_x, weight[:, :, 0, 0], bias, weights.double().numpy())
        np.testing.assert_allclose(y[clip, :, frame].numpy(), plain, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_st_gcn_equals_the_golden_logits(shared: Path) -> None:
    entries = json.loads((shared / "golden" / "model_logits.json").read_text())
    assert len(entries) == 4
    for entry in entries:
        _, channels, _, _, _ = entry["shape"]
        options = make_options(
            graph_strategy=entry["strategy"],
            input_channels=channels,
            edge_importance_weighting=entry["edge_importance_weighting"],
        )
        model = build_model(options, LAYOUTS[entry["layout"]], entry["num_classes"]).eval()
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        weights = golden_state_dict(shapes, np.array(entry["adjacency"]))
        model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()}, strict=True)
        logits = model(torch.from_numpy(golden_input(entry["shape"]))).numpy()
        assert len(shapes) == entry["keys"]
        assert sum(parameter.numel() for parameter in model.parameters()) == entry["params"]
        np.testing.assert_allclose(logits, entry["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("weighting", [True, False])
def test_st_gcn_names_its_weights_as_tao_does(weighting: bool) -> None:
    model = build_model(make_options(edge_importance_weighting=weighting), LAYOUTS["coco"], NUM_CLASSES)
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = {"A", "fcn.weight", "fcn.bias", *(f"data_bn.{part}" for part in norm)}
    for i in range(10):
        block = f"st_gcn_networks.{i}"
        expected |= {f"{block}.{name}.{part}" for name in ("gcn.conv", "tcn.2") for part in ("weight", "bias")}
        expected |= {f"{block}.tcn.{name}.{part}" for name in (0, 3) for part in norm}
        expected |= {f"edge_importance.{i}"} if weighting else set()
        if i in (4, 7):
            expected |= {f"{block}.residual.0.{part}" for part in ("weight", "bias")}
            expected |= {f"{block}.residual.1.{part}" for part in norm}
    assert len(expected) == (172 if weighting else 162)
    assert set(model.state_dict()) == expected
    assert "A" not in dict(model.named_parameters())


def test_st_gcn_keeps_its_own_adjacency_and_starts_edges_at_one() -> None:
    adjacency = build_adjacency(LAYOUTS["coco"], "spatial")
    expected = torch.from_numpy(adjacency.copy())
    networks = [STGCN(make_options(), given, NUM_CLASSES) for given in (adjacency, torch.from_numpy(adjacency))]
    adjacency[:] = 0
    for network in networks:
        assert torch.equal(network.A, expected)
        assert all((weights == 1).all() for weights in network.edge_importance)


@torch.no_grad()
def test_st_gcn_features_average_to_the_logits(model: STGCN) -> None:
    for frames in (1, 2, 5, 8, 13):
        clips = make_clips(LAYOUTS["coco"], frames=frames)
        features = model.forward_features(clips)
        assert features.shape == (2, 2, 256, math.ceil(frames / 4), 17)
        cells = torch.einsum("nmctv,oc->nmotv", features, model.fcn.weight[:, :, 0, 0])
        torch.testing.assert_close(cells.mean(dim=(1, 3, 4)) + model.fcn.bias, model(clips), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_st_gcn_treats_people_apart(model: STGCN) -> None:
    clips = make_clips(LAYOUTS["coco"], people=3)
    apart = [model.forward_features(clips[..., [person]])[:, 0] for person in range(3)]
    torch.testing.assert_close(torch.stack(apart, 1), model.forward_features(clips), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_st_gcn_drops_out_in_every_block_but_the_first(model: STGCN) -> None:
    rates = [[m.p for m in block.modules() if isinstance(m, nn.Dropout)] for block in model.st_gcn_networks]
    assert rates == [[]] + [[0.5]] * 9
    clips = make_clips(LAYOUTS["coco"])
    dropping = build_model(make_options(), LAYOUTS["coco"], NUM_CLASSES)
    assert not torch.equal(dropping(clips), dropping(clips))
    keeping = build_model(make_options(dropout=0.0), LAYOUTS["coco"], NUM_CLASSES)
    assert torch.equal(keeping(clips), keeping(clips))
