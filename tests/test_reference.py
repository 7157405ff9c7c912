"""The reference that speed is measured against gives the right answers, and our training gives the same gradients."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from golden_weights import golden_input, golden_state_dict
from kinegraph.data.transforms import random_move
from kinegraph.models import frames_first, winograd
from kinegraph.models.frames_first import draw_mask
from kinegraph.models.st_gcn import STGCN
from kinegraph.skeleton.graph import build_adjacency
from kinegraph.skeleton.layouts import LAYOUTS
from kinegraph.spec import ModelSpec
from reference import random_move_plain, st_gcn_original

NUM_CLASSES = 5


@pytest.fixture(autouse=True)
def always_frames_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small batches too go the way that is made for large ones."""
    monkeypatch.setattr(frames_first, "MIN_CELLS", 0)


@torch.inference_mode()
def test_the_original_equals_the_golden_logits(shared: Path) -> None:
    entries = json.loads((shared / "golden" / "model_logits.json").read_text())
    assert len(entries) == 4
    for entry in entries:
        adjacency = np.array(entry["adjacency"], np.float32)
        model = st_gcn_original.OriginalSTGCN(
            torch.from_numpy(adjacency),
            entry["shape"][1],
            entry["num_classes"],
            edge_importance=entry["edge_importance_weighting"],
        ).eval()
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        weights = golden_state_dict(shapes, adjacency)
        model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()}, strict=True)
        assert len(shapes) == entry["keys"]
        logits = model(torch.from_numpy(golden_input(entry["shape"]))).numpy()
        np.testing.assert_allclose(logits, entry["logits"], rtol=0, atol=1e-4)


def make_pair(layout: str = "coco", **changes: Any) -> tuple[STGCN, nn.Module]:
    """Our network and the original with the same weights, which differ from their first values everywhere."""
    torch.manual_seed(0)
    options = replace(ModelSpec(), **changes)
    adjacency = torch.from_numpy(build_adjacency(LAYOUTS[layout], options.graph_strategy))
    ours = STGCN(options, adjacency, NUM_CLASSES)
    with torch.no_grad():
        for name, tensor in ours.state_dict().items():
            if name != "A" and tensor.is_floating_point():
                tensor.mul_(1 + 0.2 * torch.rand_like(tensor)).add_(0.05 * torch.rand_like(tensor))
    other = st_gcn_original.OriginalSTGCN(
        adjacency, options.input_channels, NUM_CLASSES, options.dropout, options.edge_importance_weighting
    )
    other.load_state_dict(ours.state_dict(), strict=True)
    return ours, other


def test_sliding_windows_answer_for_the_last_frames() -> None:
    _, model = make_pair()
    model.eval()
    frames = torch.randn(3, 9, 17)
    answers = list(st_gcn_original.classify_sliding_windows(model, iter(frames.unbind(1)), 4))
    assert len(answers) == 9
    with torch.no_grad():
        for last, answer in enumerate(answers):
            window = frames[:, max(0, last - 3) : last + 1]
            expected = model(window[None, ..., None]).softmax(1)[0]
            torch.testing.assert_close(answer, expected, rtol=1e-5, atol=1e-6)


def test_both_loops_of_random_move_and_ours_agree() -> None:
    rng = np.random.default_rng(0)
    clips, draws = rng.normal(size=(6, 3, 7, 5, 2)).astype(np.float32), rng.random((6, 8))
    ours = random_move(torch.from_numpy(clips), draws).numpy()
    for clip, uniforms, moved in zip(clips, draws, ours, strict=True):
        expected = random_move_plain.move_clip(clip, uniforms.tolist())
        np.testing.assert_allclose(st_gcn_original.move_clip(clip, uniforms.tolist()), expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(moved, expected, rtol=1e-5, atol=1e-5)


def make_batch(frames: int, layout: str = "coco", people: int = 1, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, channels, frames, LAYOUTS[layout].num_joints, people, generator=generator)


def find_gradients(model: nn.Module, clips: torch.Tensor) -> dict[str, torch.Tensor]:
    """The logits, the gradient of every parameter and of the clips, and the new running statistics."""
    clips = clips.clone().requires_grad_()
    logits = model(clips)
    (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view(logits.shape)).sum().backward()
    found = {f"gradient of {name}": parameter.grad for name, parameter in model.named_parameters()}
    return {"logits": logits, "clips": clips.grad, **found, **dict(model.named_buffers())}


@pytest.mark.parametrize("strategy", ["uniform", "distance", "spatial", "spatial_exact"])
@pytest.mark.parametrize("frames", [1, 2, 7, 25])
def test_training_gives_the_gradients_of_the_original(frames: int, strategy: str) -> None:
    ours, original = make_pair(graph_strategy=strategy, dropout=0.0)
    found, expected = (
        find_gradients(model.double().train(), make_batch(frames).double()) for model in (ours, original)
    )
    assert found.keys() == expected.keys() and len(found) > 100
    for name, tensor in found.items():
        torch.testing.assert_close(
            tensor, expected[name], rtol=1e-6, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("weighting", [True, False])
def test_training_in_float32_stays_close_to_the_original(weighting: bool) -> None:
    """Against float64. Rounding grows over ten normalised layers and turns a few ReLU round, in either network."""
    clips = make_batch(64)
    ours, original = make_pair(edge_importance_weighting=weighting, dropout=0.0)
    exact = find_gradients(copy.deepcopy(original).double().train(), clips.double())
    found = find_gradients(ours.train(), clips)
    names = [name for name in found if name.startswith("gradient")]
    errors = {name: float((found[name].double() - exact[name]).norm()) for name in names}
    norm = float(torch.stack([exact[name].norm() for name in names]).norm())
    assert sum(error**2 for error in errors.values()) ** 0.5 < 1e-4 * norm
    for name in names:
        assert errors[name] < 0.02 * float(exact[name].norm()) + 1e-6 * norm, name
    torch.testing.assert_close(found["logits"].double(), exact["logits"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("padding", ["symmetric", "causal"])
def test_training_and_evaluation_are_the_same_network(padding: Literal["symmetric", "causal"]) -> None:
    """The layers of evaluation, in training mode, against the training pass that stands in for them on the CPU."""
    ours, _ = make_pair(temporal_padding=padding, dropout=0.0)
    clips = make_batch(21).double()
    ours.double().train()
    fast = ours.forward_features(clips)
    with mock.patch.object(torch, "is_autocast_enabled", return_value=True):
        plain = ours.forward_features(clips)
    assert fast.grad_fn is not None and fast.shape == plain.shape
    torch.testing.assert_close(fast, plain, rtol=1e-6, atol=1e-8)


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    for rate in (0.1, 0.5, 0.77):
        mask = draw_mask(torch.empty(300, 1001), rate)
        values = mask.unique().tolist()
        assert len(values) == 2 and values[0] == 0 and values[1] == pytest.approx(1 / (1 - rate), rel=1e-4)
        assert (mask == 0).double().mean().item() == pytest.approx(rate, abs=5e-3)
        # Independent along both axes: neighbours agree as often as two independent draws do
        kept = mask > 0
        agreement = rate**2 + (1 - rate) ** 2
        for first, second in ((kept[1:], kept[:-1]), (kept[:, 1:], kept[:, :-1]), (kept[:, 4:], kept[:, :-4])):
            assert (first == second).double().mean().item() == pytest.approx(agreement, abs=5e-3)
    assert (draw_mask(torch.empty(10, 10), 1.0) == 0).all()


def test_dropout_follows_the_seed() -> None:
    ours, _ = make_pair()
    ours.train()
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        with torch.no_grad():
            runs.append(ours(make_batch(9)))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


@given(
    frames=st.integers(1, 40),
    stride=st.sampled_from([1, 2]),
    before=st.sampled_from([4, 8]),
    channels=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    limit=st.sampled_from([1 << 20, 60]),
)
@settings(max_examples=60, deadline=None)
def test_convolution_over_time_equals_torch(
    frames: int, stride: int, before: int, channels: tuple[int, int], limit: int
) -> None:
    generator = torch.Generator().manual_seed(frames)
    shapes = ((frames, 3, 2, channels[0]), (channels[1], channels[0], 9, 1), (channels[1],))
    inputs = [torch.randn(*shape, dtype=torch.float64, generator=generator, requires_grad=True) for shape in shapes]
    x, weight, bias = inputs
    with mock.patch.object(winograd, "MAX_BUFFER_VALUES", limit):
        y = winograd.convolve_over_time(x, weight, bias, stride, before)
        gradients = torch.autograd.grad(y.square().sum(), inputs)
    padded = functional.pad(x.permute(2, 3, 0, 1), (0, 0, before, 8 - before))  # (N, C, T, V)
    expected = functional.conv2d(padded, weight, bias, (stride, 1)).permute(2, 3, 0, 1)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    for found, right in zip(gradients, torch.autograd.grad(expected.square().sum(), inputs), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-8, atol=1e-8)


def test_convolution_over_time_in_float32_has_small_errors() -> None:
    generator = torch.Generator().manual_seed(0)
    for frames, stride in ((16, 1), (64, 1), (75, 1), (64, 2)):
        x = torch.rand(frames, 4, 8, 64, generator=generator)
        weight, bias = torch.randn(64, 64, 9, 1, generator=generator) / 24, torch.zeros(64)
        exact = winograd.convolve_over_time(x.double(), weight.double(), bias.double(), stride, 4)
        error = winograd.convolve_over_time(x, weight, bias, stride, 4).double() - exact
        assert error.square().mean().sqrt() < 3e-6 * exact.std()
        assert error.abs().max() < 3e-5 * exact.std()
