"""Rewriting for inference changes nothing but rounding."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

from kinegraph.models import MODELS, Foldable, build_model, find_network
from kinegraph.models.folded import (
    INPUT,
    FoldedNetwork,
    GraphConvolutionLayer,
    TemporalConvolutionLayer,
    TemporalMaximumLayer,
)
from kinegraph.models.folded_torch import FoldedModel
from kinegraph.models.layers import mark_real_frames
from kinegraph.models.mixing_order import mixes_joints_first
from kinegraph.skeleton.layouts import get_layout
from kinegraph.spec import ModelSpec

FOLDABLE = [name for name in MODELS if hasattr(find_network(replace(ModelSpec(), model_type=name)), "fold")]
CASES = list(product(FOLDABLE, ("symmetric", "causal"), ("uniform", "spatial")))


def make_trained(model_type: str, padding: str, strategy: str) -> nn.Module:
    """A network far from where it started, with statistics of its own in every normalisation."""
    torch.manual_seed(0)
    options = replace(ModelSpec(), model_type=model_type, temporal_padding=padding, graph_strategy=strategy)
    model = build_model(options, get_layout("coco"), 5, num_channels=4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.train()
        model(torch.randn(3, 4, 20, 17, 2))
    return model.eval()


@pytest.mark.parametrize(("model_type", "padding", "strategy"), CASES)
def test_folded_network_answers_as_the_original(model_type: str, padding: str, strategy: str) -> None:
    model = make_trained(model_type, padding, strategy)
    assert isinstance(model, Foldable)
    folded = FoldedModel(model.fold())
    for clips, frames, people in ((1, 1, 1), (2, 7, 1), (2, 30, 2), (1, 64, 3)):
        x = torch.randn(clips, 4, frames, 17, people)
        x[-1, :, (frames + 1) // 2 :] = 0
        x[0, ..., 1:] = 0
        with torch.no_grad():
            expected, answer = model(x), folded(x)
        assert (answer - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_there_are_as_many_cases_as_expected() -> None:
    assert len(CASES) == 4 * len(FOLDABLE)
    assert {"ST-GCN", "EF-GCN", "ST-GCN++"} <= set(FOLDABLE)


@pytest.mark.parametrize("model_type", FOLDABLE)
def test_folding_leaves_the_network_as_it_was(model_type: str) -> None:
    model = make_trained(model_type, "symmetric", "spatial")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for layer in model.fold().layers:
        for values in vars(layer).values():
            if isinstance(values, np.ndarray):
                values += 1
    assert all((tensor == before[name]).all() for name, tensor in model.state_dict().items())


def test_padding_and_absent_people_do_not_count_in_the_mean() -> None:
    model = make_trained("EF-GCN", "causal", "spatial")
    x = torch.randn(1, 4, 12, 17, 1)
    padded = torch.zeros(1, 4, 40, 17, 3)
    padded[:, :, :12, :, 1:2] = x
    with torch.no_grad():
        torch.testing.assert_close(model(padded), model(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("frames", [1, 5, 9, 11])
def test_mean_takes_results_at_their_own_frames(frames: int) -> None:
    """A causal network does not see what follows: a clip and the same with zeros after it are one."""
    model = make_trained("EF-GCN", "causal", "spatial")
    x = torch.randn(2, 4, frames, 17, 1)
    padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 7))
    with torch.no_grad():
        expected = model.fcn(model.forward_features(x).mean(dim=(1, 3, 4)))
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model(padded), expected, atol=1e-5, rtol=1e-5)


def test_real_frames_end_with_the_last_value() -> None:
    x = torch.zeros(2, 3, 5, 4, 2)
    x[0, 1, 1, 2, 0] = 1  # a frame of zeros before it belongs to the clip
    x[0, 0, 3, 0, 0] = -1
    expected = torch.tensor([[[1, 1, 1, 1, 0], [0, 0, 0, 0, 0]], [[1] * 5, [1] * 5]], dtype=torch.bool)
    assert (mark_real_frames(x) == expected).all()


def test_multiply_adds_are_counted_by_hand() -> None:
    weight = np.ones((3, 2, 4), np.float32)
    layers = (
        TemporalConvolutionLayer("a", (INPUT,), weight=weight, bias=np.zeros(4, np.float32), stride=2),
        TemporalMaximumLayer("b", ("a",)),
    )
    network = FoldedNetwork(2, 5, layers, np.ones((4, 3), np.float32), np.zeros(3, np.float32))
    # 4 results of 7 frames, 5 joints, 3 x 2 x 4 products each; the head has 4 x 3
    assert network.count_multiply_adds(7) == 4 * 5 * 24 + 12
    assert network.find_strides() == {INPUT: 1, "a": 2, "b": 2}
    assert network.count_channels() == {INPUT: 2, "a": 4, "b": 4}


@pytest.mark.parametrize(("before", "after"), list(product((1, 2, 7, 64), repeat=2)))
@pytest.mark.parametrize(("subsets", "joints"), [(1, 3), (3, 17)])
def test_the_order_of_mixing_is_the_one_with_fewer_products(before: int, after: int, subsets: int, joints: int) -> None:
    layer = GraphConvolutionLayer(
        *("a", (INPUT,)),
        adjacency=np.zeros((subsets, joints, joints), np.float32),
        weight=np.zeros((subsets, before, after), np.float32),
        bias=np.zeros((joints, after), np.float32),
    )
    channels = subsets * joints * before * after
    joints_first = subsets * joints**2 * before + channels
    channels_first = channels + subsets * joints**2 * after
    assert mixes_joints_first(layer) == (joints_first <= channels_first)
