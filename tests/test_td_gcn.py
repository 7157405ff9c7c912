"""TD-GCN against a plain restatement of what is new in it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kinegraph.models import build_model
from kinegraph.models.td_gcn import DecoupledGraphConvolution
from kinegraph.skeleton.layouts import LAYOUTS
from kinegraph.spec import ModelSpec

Array = NDArray[np.float64]


def to_numpy(tensor: Tensor | None) -> Array:
    assert tensor is not None
    return tensor.detach().double().numpy()


def make_unit(channels: int, after: int, subsets: int, joints: int) -> DecoupledGraphConvolution:
    """Far from where it starts, where nothing is refined."""
    torch.manual_seed(0)
    unit = DecoupledGraphConvolution(channels, after, torch.rand(subsets, joints, joints))
    with torch.no_grad():
        for parameter in unit.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return unit


def restate(unit: DecoupledGraphConvolution, x: Array, real: int) -> Array:
    """One clip (C, T, V) of which the first frames are real -> (C', T, V), one pair of joints after the other."""
    subsets, joints, _ = unit.topology.shape
    embedding = to_numpy(unit.embedding.weight)[:, :, 0]
    refine_weight, refine_bias = to_numpy(unit.refinement.weight)[:, :, 0], to_numpy(unit.refinement.bias)
    map_weight, map_bias = to_numpy(unit.mapping.weight)[:, :, 0, 0], to_numpy(unit.mapping.bias)
    alpha, beta, gamma = (part.item() for part in (unit.strength, unit.channel_weight, unit.frame_weight))
    relations, after = len(embedding) // subsets, len(map_weight) // subsets
    mean = x[:, :real].mean(axis=1)
    result = np.zeros((after, *x.shape[1:]))
    for k in range(subsets):
        embedded = embedding[k * relations : (k + 1) * relations] @ mean
        rows = slice(k * after, (k + 1) * after)
        mapped = np.einsum("dc,ctv->dtv", map_weight[k::subsets], x) + map_bias[k::subsets][:, None, None]
        for w in range(joints):
            for v in range(joints):
                refined = refine_weight[rows] @ np.tanh(embedded[:, w] - embedded[:, v]) + refine_bias[rows]
                by_channel = unit.topology[k, v, w].item() + alpha * refined
                result[:, :, w] += beta * by_channel[:, None] * mapped[:, :, v]
                for t in range(x.shape[1]):
                    by_frame = np.tanh(mapped[:, t, w].mean() - mapped[:, t, v].mean())
                    result[:, t, w] += gamma * by_frame * mapped[:, t, v]
    return result


@pytest.mark.parametrize(("channels", "relations"), [(3, 8), (24, 3)])
@torch.no_grad()
def test_unit_equals_its_definition(channels: int, relations: int) -> None:
    """For clips whose last frames are padding."""
    subsets, frames, real, joints = 3, 5, 3, 4
    unit = make_unit(channels, 8, subsets, joints)
    assert unit.embedding.out_channels == subsets * relations
    x = torch.randn(2, channels, frames, joints)
    answer = unit(x, (torch.arange(frames) < real).float().expand(2, 1, frames))
    for clip in range(2):
        np.testing.assert_allclose(to_numpy(answer[clip]), restate(unit, to_numpy(x[clip]), real), atol=1e-4)


@torch.no_grad()
def test_each_frame_has_its_own_graph_from_that_frame_alone() -> None:
    unit = make_unit(3, 8, 2, 4)
    x = torch.randn(1, 3, 6, 4)
    graphs = unit.relate_in_frames(x)
    assert graphs.shape == (1, 6, 2, 4, 4)
    assert torch.equal(graphs, -graphs.transpose(3, 4))
    changed = x.clone()
    changed[:, :, 2] += torch.randn(3, 4)
    differs = (unit.relate_in_frames(changed) - graphs).abs().amax(dim=(0, 2, 3, 4)) > 1e-4
    assert differs.tolist() == [False, False, True, False, False, False]


@torch.no_grad()
def test_training_starts_from_the_shared_graph_and_a_little_of_each_frame() -> None:
    unit = DecoupledGraphConvolution(3, 8, torch.rand(3, 4, 4))
    assert [unit.strength.item(), unit.channel_weight.item()] == [0, 0.5]
    assert unit.frame_weight.item() == pytest.approx(0.1)


def test_everything_learns() -> None:
    unit = make_unit(3, 8, 3, 4)
    (unit(torch.randn(2, 3, 5, 4), torch.ones(2, 1, 5)) ** 2).sum().backward()
    for name, parameter in unit.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 1e-6, name


def count_block(before: int, after: int, stride: int, is_first: bool, subsets: int, joints: int) -> int:
    relations = 8 if before <= 16 else before // 8
    graphs = subsets * joints**2 + 3
    compare = subsets * before * relations + subsets * (relations + 1) * after
    mapping = subsets * (before + 1) * after + 2 * after
    quarter = after // 4
    temporal = after * 3 * quarter + 2 * 3 * quarter + 2 * 5 * quarter**2 + after * quarter + 2 * after
    shortcut = before * after + 2 * after
    shortcuts = (before != after) + (not is_first and (before != after or stride > 1))
    return graphs + compare + mapping + temporal + shortcuts * shortcut


def test_network_has_as_many_parameters_as_its_equations() -> None:
    """Counted, as no publication that we could read names a number; 1.37 million for 25 joints and 60 classes."""
    options = replace(ModelSpec(), model_type="TD-GCN", graph_strategy="spatial_exact")
    model = build_model(options, LAYOUTS["ntu-rgb+d"], 60)
    subsets, joints = 3, 25
    channels = [3, 64, 64, 64, 64, 128, 128, 128, 256, 256, 256]
    expected = 2 * 3 * joints + 256 * 60 + 60
    for i in range(10):
        stride = 2 if i in (4, 7) else 1
        expected += count_block(channels[i], channels[i + 1], stride, i == 0, subsets, joints)
    assert isinstance(model, nn.Module)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    assert round(expected / 1e6, 2) == 1.37
