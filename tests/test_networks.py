"""The published networks against plain restatements of what is new in each."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kinegraph.data.pipeline import InputPipeline
from kinegraph.errors import SpecError
from kinegraph.export import convert
from kinegraph.export_parity import PARITY_SHAPES, check_parity
from kinegraph.model_description import ModelDescription
from kinegraph.models import Foldable, build_model
from kinegraph.models.agcn import AdaptiveGraphConvolution
from kinegraph.models.ctr_gcn import RefinedGraphConvolution
from kinegraph.models.ctr_gcn import TemporalUnit as RefinedTemporalUnit
from kinegraph.models.dd_net import DDNet, halve
from kinegraph.models.st_gcn_pp import Block, TemporalUnit
from kinegraph.models.stages import BlockPlan
from kinegraph.skeleton.graph import build_adjacency
from kinegraph.skeleton.layouts import LAYOUTS
from kinegraph.spec import ModelSpec

NETWORKS = ("ST-GCN++", "CTR-GCN", "TD-GCN", "2s-AGCN", "DD-Net")
EXACT_WITH_PADDING = ("CTR-GCN", "TD-GCN", "2s-AGCN", "DD-Net")
LAYOUT = LAYOUTS["coco"]
Array = NDArray[np.float64]


def make_network(model_type: str, channels: int = 3, **changes: object) -> nn.Module:
    """A small network far from where it started, with statistics of its own in every normalisation."""
    torch.manual_seed(0)
    size = {"width": 0.25, "depth": 1} | changes
    model = build_model(replace(ModelSpec(), model_type=model_type, **size), LAYOUT, 4, channels)
    disturb(model)
    with torch.no_grad():
        model.train()(torch.randn(6, channels, 20, 17, 2))
    return model.eval()


def disturb(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for part in module.modules():
            if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
                nn.init.uniform_(part.running_mean, -0.5, 0.5)
                nn.init.uniform_(part.running_var, 0.5, 1.5)


def to_numpy(tensor: Tensor | None) -> Array:
    assert tensor is not None
    return tensor.detach().double().numpy()


def normalise(x: Array, norm: nn.Module) -> Array:
    """(C, T, V): the normalisation in evaluation mode."""
    scale, shift, mean, variance = (
        to_numpy(getattr(norm, name))[:, None, None] for name in ("weight", "bias", "running_mean", "running_var")
    )
    return (x - mean) / np.sqrt(variance + 1e-5) * scale + shift


def convolve(x: Array, convolution: nn.Module, stride: int, dilation: int, before: int) -> Array:
    """(C, T, V): a (k, 1) convolution, tap by tap, with zeros outside."""
    weight = to_numpy(convolution.weight)[..., 0]
    frames = x.shape[1]
    result = np.zeros((len(weight), -(-frames // stride), x.shape[2]))
    for t in range(result.shape[1]):
        for tap in range(weight.shape[2]):
            source = t * stride + tap * dilation - before
            if 0 <= source < frames:
                result[:, t] += weight[:, :, tap] @ x[:, source]
    return result


def find_maximum(x: Array, stride: int, before: int, after: int) -> Array:
    frames = x.shape[1]
    return np.stack(
        [x[:, max(0, t - before) : t + after + 1].max(axis=1) for t in range(0, frames, stride)],
        axis=1,
    )


@pytest.mark.parametrize(
    ("model_type", "classes", "millions"),
    [("ST-GCN++", 60, 1.39), ("CTR-GCN", 120, 1.46), ("2s-AGCN", 60, 3.46)],
)
def test_graph_networks_have_as_many_parameters_as_published(model_type: str, classes: int, millions: float) -> None:
    """25 joints of NTU RGB+D; CTR-GCN's paper counts its network for the 120 classes of the larger set."""
    options = replace(ModelSpec(), model_type=model_type, graph_strategy="spatial_exact")
    model = build_model(options, LAYOUTS["ntu-rgb+d"], classes)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert round(count / 1e6, 2) == millions


@pytest.mark.parametrize(("model_type", "channels", "millions"), [("EF-GCN", 3, 0.35), ("MB-GCN", 12, 0.39)])
def test_our_networks_have_as_many_parameters_as_documented(model_type: str, channels: int, millions: float) -> None:
    model = build_model(ModelSpec(model_type=model_type), LAYOUTS["ntu-rgb+d"], 60, channels)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 2) == millions


@pytest.mark.parametrize(("width", "millions"), [(1, 1.82), (0.5, 0.50), (0.25, 0.15)])
def test_dd_net_has_as_many_parameters_as_published(width: float, millions: float) -> None:
    """64, 32 and 16 filters; 22 joints of a hand in the paper, 21 here."""
    options = replace(ModelSpec(), model_type="DD-Net", width=width)
    model = build_model(options, LAYOUTS["mediapipe_hand"], 14)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 2) == millions


@pytest.mark.parametrize("model_type", NETWORKS)
def test_width_and_depth_change_the_size(model_type: str) -> None:
    def count(**changes: object) -> int:
        model = build_model(replace(ModelSpec(), model_type=model_type, **changes), LAYOUT, 4)
        return sum(parameter.numel() for parameter in model.parameters())

    own = count()
    assert count(width=0.5) < 0.35 * own
    assert count(depth=1) < own < count(depth=5)
    if model_type == "DD-Net":
        assert count(depth=2) == own


@pytest.mark.parametrize(("stride", "padding"), [(1, "symmetric"), (2, "symmetric"), (1, "causal"), (2, "causal")])
@torch.no_grad()
def test_six_branches_are_what_the_paper_says(stride: int, padding: str) -> None:
    torch.manual_seed(0)
    unit = TemporalUnit(20, stride, padding)
    disturb(unit)
    unit.eval()
    x = torch.randn(1, 20, 11, 3)
    reduced = np.maximum(normalise(convolve(to_numpy(x[0]), unit.reduction, 1, 1, 0), unit.reduction_bn), 0)
    branches = []
    for i, size in enumerate((5, 3, 3, 3)):
        part = reduced[5 + 3 * (i - 1) if i else 0 :][:size]
        dilation = i + 1
        before = 2 * dilation if padding == "causal" else dilation
        branches.append(convolve(part, unit.dilated[i], stride, dilation, before))
    branches.append(find_maximum(reduced[14:], stride, *((2, 0) if padding == "causal" else (1, 1))))
    branches.append(convolve(to_numpy(x[0]), unit.itself, stride, 1, 0))
    assert [len(branch) for branch in branches] == [5, 3, 3, 3, 3, 3]
    together = np.maximum(normalise(np.concatenate(branches), unit.branches_bn), 0)
    expected = normalise(convolve(together, unit.mapping, 1, 1, 0), unit.norm)
    np.testing.assert_allclose(to_numpy(unit(x)[0]), expected, atol=1e-5)


@torch.no_grad()
def test_graph_of_st_gcn_pp_is_summed_over_subsets_and_neighbours() -> None:
    torch.manual_seed(0)
    adjacency = torch.rand(3, 5, 5)
    block = Block(BlockPlan(2, 8, 1), adjacency, "symmetric", is_first=True)
    disturb(block)
    block.eval()
    x = torch.randn(1, 2, 4, 5)
    weight = to_numpy(block.mapping.weight)[:, :, 0, 0].reshape(8, 3, 2)
    expected = np.einsum("dkc,ctv,kvw->dtw", weight, to_numpy(x[0]), to_numpy(block.topology))
    np.testing.assert_allclose(to_numpy(block.mapping(block._mix(x))[0]), expected, atol=1e-5)


@pytest.mark.parametrize("channels", [3, 24])
@torch.no_grad()
def test_refinement_of_graphs_equals_its_definition(channels: int) -> None:
    """Chen et al., equations 3 to 6, number by number, for a clip whose last frames are padding."""
    torch.manual_seed(0)
    subsets, joints, frames, real, after = 3, 4, 5, 3, 8
    relations = 8 if channels <= 16 else 3
    unit = RefinedGraphConvolution(channels, after, torch.rand(subsets, joints, joints))
    disturb(unit)
    x = torch.randn(2, channels, frames, joints)
    is_real = (torch.arange(frames) < real).float().expand(2, 1, frames)
    answer = unit(x, is_real)
    a, b, mapping, refinement = (
        (to_numpy(part.weight).reshape(len(part.weight), -1), to_numpy(part.bias))
        for part in (unit.receivers, unit.neighbours, unit.mapping, unit.refinement)
    )
    assert len(a[0]) == subsets * relations
    alpha = unit.strength.item()
    for clip in range(2):
        values = to_numpy(x[clip])
        mean = values[:, :real].mean(axis=1)
        expected = np.zeros((after, frames, joints))
        for k in range(subsets):
            rows = slice(k * relations, (k + 1) * relations)
            for w in range(joints):
                for v in range(joints):
                    relation = np.tanh(a[0][rows] @ mean[:, w] + a[1][rows] - b[0][rows] @ mean[:, v] - b[1][rows])
                    refined = refinement[0][k * after :][:after] @ relation + refinement[1][k * after :][:after]
                    graph = unit.topology[k, v, w].item() + alpha * refined
                    mapped = mapping[0][k::subsets] @ values[:, :, v] + mapping[1][k::subsets][:, None]
                    expected[:, :, w] += graph[:, None] * mapped
        np.testing.assert_allclose(to_numpy(answer[clip]), expected, atol=1e-4)


@pytest.mark.parametrize("stride", [1, 2])
@torch.no_grad()
def test_four_branches_are_what_the_paper_says(stride: int) -> None:
    torch.manual_seed(0)
    unit = RefinedTemporalUnit(16, stride)
    disturb(unit)
    unit.eval()
    x = torch.randn(1, 16, 11, 3)
    values = to_numpy(x[0])
    reduced = np.maximum(normalise(convolve(values, unit.reduction, 1, 1, 0), unit.reduction_bn), 0)
    branches = [convolve(reduced[4 * i : 4 * i + 4], unit.dilated[i], stride, i + 1, 2 * (i + 1)) for i in (0, 1)]
    branches += [find_maximum(reduced[8:], stride, 1, 1), convolve(values, unit.itself, stride, 1, 0)]
    expected = normalise(np.concatenate(branches), unit.norm)
    np.testing.assert_allclose(to_numpy(unit(x, torch.ones(1, 1, 11))[0]), expected, atol=1e-5)


@torch.no_grad()
def test_adaptive_graph_equals_its_definition() -> None:
    """Shi et al., equations 3 and 4, for a clip whose last frames are padding."""
    torch.manual_seed(0)
    subsets, joints, frames, real, channels, after = 3, 4, 6, 4, 3, 8
    adjacency = torch.rand(subsets, joints, joints)
    unit = AdaptiveGraphConvolution(channels, after, adjacency.shape)
    disturb(unit)
    x = torch.randn(2, channels, frames, joints)
    is_real = (torch.arange(frames) < real).float().expand(2, 1, frames)
    answer = unit(x, is_real, adjacency)
    size = after // 4
    theta, phi, mapping = (
        to_numpy(part.weight)[:, :, 0, 0] for part in (unit.neighbours, unit.receivers, unit.mapping)
    )
    for clip in range(2):
        values = to_numpy(x[clip])
        expected = np.zeros((after, frames, joints))
        for k in range(subsets):
            rows = slice(k * size, (k + 1) * size)
            first = np.einsum("ec,ctv->etv", theta[rows], values[:, :real])
            second = np.einsum("ec,ctv->etv", phi[rows], values[:, :real])
            second += to_numpy(unit.receivers.bias)[rows, None, None]
            alike = np.exp(np.einsum("etv,etw->vw", first, second) / (size * real))
            graph = to_numpy(adjacency[k]) + to_numpy(unit.learned[k]) + alike / alike.sum(axis=0)
            mixed = np.einsum("ctv,vw->ctw", values, graph)
            expected += np.einsum("dc,ctw->dtw", mapping[:, k * channels : (k + 1) * channels], mixed)
        np.testing.assert_allclose(to_numpy(answer[clip]), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "streams", "coordinates", "expected"),
    [(2, 1, 0, 2), (3, 1, 0, 3), (3, 1, 2, 2), (4, 1, 0, 3), (3, 2, 0, 3), (3, 4, 2, 2), (2, 4, 0, 2)],
)
@torch.no_grad()
def test_distances_and_motions_are_taken_of_the_right_numbers(
    given: int, streams: int, coordinates: int, expected: int
) -> None:
    channels, frames = given * streams, 5
    options = replace(ModelSpec(), model_type="DD-Net", input_channels=given, coordinates=coordinates, width=0.25)
    model = build_model(options, LAYOUT, 4, channels)
    assert isinstance(model, DDNet)
    poses = torch.randn(2, channels, frames, 17)
    distances, slow, fast = (to_numpy(part) for part in model.measure(poses))
    assert distances.shape == (2, 17 * 16 // 2, frames)
    values = to_numpy(poses)
    for clip, frame in ((0, 0), (1, 4)):
        pose = values[clip, :expected, frame]
        plain = [math.dist(pose[:, v], pose[:, w]) for v in range(17) for w in range(v + 1, 17)]
        np.testing.assert_allclose(distances[clip, :, frame], plain, atol=1e-5)
    assert slow.shape == (2, channels * 17, 5)
    assert fast.shape == (2, channels * 17, 3)
    assert (slow[:, :, 0] == 0).all()
    assert (fast[:, :, 0] == 0).all()
    flat = values.transpose(0, 1, 3, 2).reshape(2, -1, frames)
    for t in range(1, frames):
        np.testing.assert_allclose(slow[:, :, t], flat[:, :, t] - flat[:, :, t - 1], atol=1e-6)
    for t in (1, 2):
        np.testing.assert_allclose(fast[:, :, t], flat[:, :, 2 * t] - flat[:, :, 2 * t - 2], atol=1e-6)


@pytest.mark.parametrize("frames", [1, 2, 5, 6])
@pytest.mark.parametrize("padding", ["symmetric", "causal"])
def test_halving_takes_the_larger_of_two_real_frames(frames: int, padding: str) -> None:
    x = -1 - torch.rand(1, 2, frames + 3)
    is_real = (torch.arange(frames + 3) < frames).float()[None, None]
    answer = halve(x, is_real, padding)
    assert answer.shape[2] == math.ceil((frames + 3) / 2)
    for t in range(answer.shape[2]):
        pair = (2 * t - 1, 2 * t) if padding == "causal" else (2 * t, 2 * t + 1)
        real = [x[0, :, i] for i in pair if 0 <= i < frames]
        expected = torch.stack(real).amax(dim=0) if 2 * t < frames else torch.zeros(2)
        assert torch.equal(answer[0, :, t], expected)


@pytest.mark.parametrize("model_type", EXACT_WITH_PADDING)
@pytest.mark.parametrize("frames", [1, 8, 13])
@torch.no_grad()
def test_padding_and_absent_people_change_nothing(model_type: str, frames: int) -> None:
    model = make_network(model_type)
    x = torch.randn(2, 3, frames, 17, 1)
    padded = torch.zeros(2, 3, frames + 9, 17, 3)
    padded[:, :, :frames, :, 1:2] = x
    torch.testing.assert_close(model(padded), model(x), atol=1e-5, rtol=1e-4)
    padded[:, :, frames, 0, 1] = 0.1
    assert (model(padded) - model(x)).abs().max() > 1e-4


@pytest.mark.parametrize("model_type", EXACT_WITH_PADDING)
@pytest.mark.parametrize("frames", [1, 5])
@torch.no_grad()
def test_who_stands_still_is_not_absent_in_a_late_fusion(model_type: str, frames: int) -> None:
    """The motion stream alone is all zeros."""
    options = replace(ModelSpec(), model_type=model_type, width=0.25, depth=1, fusion="late")
    torch.manual_seed(0)
    model = build_model(options, LAYOUT, 4, 6).eval()
    joints = torch.randn(1, 3, 1, 17, 1).expand(-1, -1, frames, -1, -1)
    x = torch.cat([joints, torch.zeros_like(joints)], dim=1)
    padded = torch.cat([x, torch.zeros(1, 6, 12, 17, 1)], dim=2)
    torch.testing.assert_close(model(padded), model(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("model_type", ["ST-GCN++", "MB-GCN", "DD-Net"])
@torch.no_grad()
def test_causal_networks_do_not_look_ahead(model_type: str) -> None:
    x = torch.randn(1, 3, 33, 17, 1)
    changed = x.clone()
    changed[:, :, 17:] += 1
    causal, symmetric = (make_network(model_type, temporal_padding=padding) for padding in ("causal", "symmetric"))
    seen = math.ceil(17 / causal.total_stride)
    before, after = (causal.forward_features(clip)[:, :, :, :seen] for clip in (x, changed))
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-4)
    full_before, full_after = (causal.forward_features(clip) for clip in (x, changed))
    assert (full_after - full_before)[:, :, :, seen:].abs().amin(dim=3).max() > 1e-3
    before, after = (symmetric.forward_features(clip)[:, :, :, :seen] for clip in (x, changed))
    assert (after - before).abs().max() > 1e-3


@pytest.mark.parametrize("model_type", ["CTR-GCN", "TD-GCN", "2s-AGCN"])
def test_networks_that_look_at_all_frames_refuse_causal_padding(model_type: str) -> None:
    options = replace(ModelSpec(), model_type=model_type, temporal_padding="causal")
    with pytest.raises(SpecError, match=rf"model\.temporal_padding: got causal with {model_type}, expected symmetric"):
        build_model(options, LAYOUT, 4)


@pytest.mark.parametrize("model_type", NETWORKS)
@torch.no_grad()
def test_map_averages_to_the_logits(model_type: str) -> None:
    model = make_network(model_type)
    for frames in (1, 6, 13):
        x = torch.randn(2, 3, frames, 17, 2)
        features, weights = model.forward_features(x), model.pooling_weights(x)
        size = math.ceil(frames / model.total_stride)
        assert features.shape == (2, 2, model.fcn.in_features, size, 1 if model_type == "DD-Net" else 17)
        cells = torch.einsum("nmctv,nmt,oc->no", features, weights, model.fcn.weight) / features.shape[4]
        torch.testing.assert_close(cells + model.fcn.bias, model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", ["ST-GCN", "EF-GCN", "MB-GCN", *NETWORKS])
@pytest.mark.parametrize("frames", [1, 4, 8])
def test_a_batch_of_one_short_clip_trains(model_type: str, frames: int) -> None:
    model = make_network(model_type).train()
    model(torch.randn(1, 3, frames, 17, 1)).square().sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.any() for gradient in gradients)
    assert all(statistic.isfinite().all() for statistic in model.buffers())


@pytest.mark.parametrize("model_type", EXACT_WITH_PADDING)
def test_networks_that_cannot_be_folded_are_exported_with_free_axes(model_type: str) -> None:
    model = make_network(model_type, width=0.125)
    assert not isinstance(model, Foldable)
    description = ModelDescription(4, {name: i for i, name in enumerate("abcd")}, LAYOUT, InputPipeline(3, 17), {})
    parity = check_parity(model, convert(model, description, 18), description)  # raises ParityError above 1e-4
    assert len(parity.shapes) == len(PARITY_SHAPES)
    assert parity.max_relative_error < 1e-4


def test_shared_graph_starts_as_the_strategy_says() -> None:
    adjacency = torch.from_numpy(build_adjacency(LAYOUT, "spatial"))
    for model_type in ("ST-GCN++", "CTR-GCN", "TD-GCN"):
        model = build_model(replace(ModelSpec(), model_type=model_type, depth=1), LAYOUT, 4)
        graphs = [tensor for name, tensor in model.named_parameters() if name.endswith("topology")]
        assert len(graphs) == 3
        assert all(torch.equal(graph, adjacency) for graph in graphs)
