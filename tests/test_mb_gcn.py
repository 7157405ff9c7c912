"""MB-GCN with several streams: branches that meet in the middle. With one stream all networks are tested together."""

from __future__ import annotations

import csv
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kinegraph.actions import export, train
from kinegraph.models import build_model
from kinegraph.models.checkpoint import load_pretrained, read_checkpoint
from kinegraph.models.folded_torch import FoldedModel
from kinegraph.models.mb_gcn import MBGCN
from kinegraph.run_files import LATEST_NAME
from kinegraph.runtime import load
from kinegraph.skeleton.layouts import LAYOUTS
from kinegraph.spec import ModelSpec
from small_runs import make_spec, write_small_data

LAYOUT = LAYOUTS["coco"]
Array = NDArray[np.float64]


def make_network(given: int = 3, streams: int = 3, **changes: object) -> MBGCN:
    """A small network far from where it started, with statistics of its own in every normalisation."""
    torch.manual_seed(0)
    options = replace(ModelSpec(), model_type="MB-GCN", input_channels=given, dropout=0.0, **changes)  # type: ignore[arg-type]
    model = build_model(options, LAYOUT, 4, given * streams)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.train()(torch.randn(6, given * streams, 20, 17, 2))
    assert isinstance(model, MBGCN)
    return model.eval()


def to_numpy(tensor: Tensor | None) -> Array:
    assert tensor is not None
    return tensor.detach().double().numpy()


def normalise(x: Array, norm: nn.Module, rows: list[int] | slice = slice(None)) -> Array:
    """(C, ...): the normalisation in evaluation mode, or with so many of its rows."""
    names = ("weight", "bias", "running_mean", "running_var")
    shape = (-1,) + (1,) * (x.ndim - 1)
    scale, shift, mean, variance = (to_numpy(getattr(norm, name))[rows].reshape(shape) for name in names)
    return (x - mean) / np.sqrt(variance + 1e-5) * scale + shift


def convolve(x: Array, convolution: nn.Module, stride: int, before: int) -> Array:
    """(C, T, V): a (k, 1) convolution, tap by tap, with zeros outside."""
    weight = to_numpy(convolution.weight)[..., 0]  # type: ignore[arg-type]
    result = np.zeros((len(weight), -(-x.shape[1] // stride), x.shape[2]))
    for t, tap in product(range(result.shape[1]), range(weight.shape[2])):
        source = t * stride + tap - before
        if 0 <= source < x.shape[1]:
            result[:, t] += weight[:, :, tap] @ x[:, source]
    return result


def run_block(x: Array, block: nn.Module, stride: int, before: int) -> Array:
    """Decision 7: each joint and its neighbours, mapped and added; five frames; a way round both."""
    parts = dict(block.named_children())
    mixed = np.einsum("ctv,vw->ctw", x, to_numpy(block.topology))  # type: ignore[arg-type]
    spatial = convolve(x, parts["own"], 1, 0) + convolve(mixed, parts["neighbours"], 1, 0)
    y = np.maximum(normalise(spatial, parts["spatial_bn"]), 0)
    y = normalise(convolve(y, parts["temporal"], stride, before), parts["temporal_bn"])
    around = x if isinstance(parts["shortcut"], nn.Identity) else convolve(x, parts["shortcut"], stride, 0)
    return np.maximum(y + around, 0)


@pytest.mark.parametrize(
    ("given", "streams", "padding"), [(3, 4, "symmetric"), (2, 3, "causal"), (3, 1, "symmetric"), (4, 2, "causal")]
)
@torch.no_grad()
def test_answer_equals_its_definition(given: int, streams: int, padding: str) -> None:
    model = make_network(given, streams, temporal_padding=padding, width=0.5, depth=2)
    x = torch.randn(1, given * streams, 11, 17, 1)
    before = 4 if padding == "causal" else 2
    clip = to_numpy(x[0, ..., 0])
    ends = []
    for i in range(streams):
        channels = range(given * i, given * (i + 1))
        # Rows of the normalisation: all channels of the first joint, then of the second
        rows = [joint * given * streams + channel for channel in channels for joint in range(17)]
        flat = clip[list(channels)].transpose(0, 2, 1).reshape(-1, 11)
        y = normalise(flat, model.data_bn, rows).reshape(given, 17, 11).transpose(0, 2, 1)
        for j, stride in enumerate((1, 1, 2, 1)):
            y = run_block(y, model.branches[i][j], stride, before)  # type: ignore[index]
        ends.append(y)
    y = np.concatenate(ends)
    for j, stride in enumerate((2, 1)):
        y = run_block(y, model.blocks[j], stride, before)
    assert y.shape == (64, 3, 17)
    expected = to_numpy(model.fcn.weight) @ y.mean(axis=(1, 2)) + to_numpy(model.fcn.bias)
    np.testing.assert_allclose(to_numpy(model(x)[0]), expected, atol=1e-4)


@torch.no_grad()
def test_training_answers_once_for_the_network_and_once_for_each_branch() -> None:
    model = make_network(width=0.25, depth=1)
    x = torch.randn(5, 9, 12, 17, 2)
    assert model(x).shape == (5, 4)
    model.train()
    logits = model(x)
    assert logits.shape == (4, 5, 4)
    assert torch.equal(model.fuse(logits), logits[0])
    changed = x.clone()
    changed[:, 3:6] = torch.randn(5, 3, 12, 17, 2)
    differs = [(one - other).abs().max() > 1e-3 for one, other in zip(model(changed), logits, strict=True)]
    assert differs == [True, False, True, False]


def test_the_loss_of_a_branch_teaches_that_branch_alone() -> None:
    model = make_network(width=0.25, depth=1).train()
    model(torch.randn(5, 9, 12, 17, 1))[2].square().sum().backward()
    taught = {
        name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()
    }
    assert {name.split(".")[0] + "." + name.split(".")[1] for name in taught if "data_bn" not in name} == {
        "branches.1",
        "branch_heads.1",
    }


def test_one_stream_has_no_heads_beside_that_of_the_network() -> None:
    model = make_network(streams=1).train()
    assert len(model.branch_heads) == 0
    assert model(torch.randn(2, 3, 8, 17, 1)).shape == (2, 4)


@pytest.mark.parametrize(("fusion", "padding"), product(("early", "late"), ("symmetric", "causal")))
@torch.no_grad()
def test_folded_network_answers_as_the_original(fusion: str, padding: str) -> None:
    options = replace(ModelSpec(), model_type="MB-GCN", fusion=fusion, temporal_padding=padding, width=0.5)  # type: ignore[arg-type]
    torch.manual_seed(0)
    model = build_model(options, LAYOUT, 4, 9)
    model.train()(torch.randn(6, 9, 20, 17, 2))
    model.eval()
    folded = FoldedModel(model.fold())  # type: ignore[operator]
    for frames, people in ((1, 1), (7, 2), (30, 3)):
        x = torch.randn(2, 9, frames, 17, people)
        x[1, :, (frames + 1) // 2 :] = 0
        torch.testing.assert_close(folded(x), model(x), atol=1e-5, rtol=1e-4)


def test_size_is_that_of_a_small_network() -> None:
    def count(**changes: object) -> int:
        options = replace(ModelSpec(), model_type="MB-GCN", **changes)  # type: ignore[arg-type]
        model = build_model(options, LAYOUTS["ntu-rgb+d"], 60, 12)
        return sum(parameter.numel() for parameter in model.parameters())

    own = count()
    assert own == count(depth=2) < 400_000
    assert count(width=0.5) < 0.35 * own
    assert count(depth=1) < own < count(depth=3)


def test_a_training_of_several_streams_end_to_end(tmp_path: Path) -> None:
    """Losses are told as a mean, accuracies are those of the network, and its file answers as the checkpoint does."""
    write_small_data(tmp_path)
    spec = make_spec(tmp_path, num_epochs=8, label_doubt=0.9, grad_clip=5.0, ema_decay=0.5)
    spec["model"] |= {"model_type": "MB-GCN", "width": 0.25, "depth": 1, "dropout": 0.0}
    spec["input"] = {"streams": ["joint", "bone", "joint_motion"]}
    train(spec)
    path = tmp_path / "results/train" / LATEST_NAME
    with open(tmp_path / "results/train/metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    assert 0.5 < float(rows[0]["train_loss"]) < 2  # one loss of chance is 1.1, the sum of four would be 4.4
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    network = read_checkpoint(path)
    assert sum(name.startswith("branch_heads.") for name in network.state_dict) == 6
    onnx = tmp_path / "model.onnx"
    export(spec | {"export": {"checkpoint": str(path), "onnx_file": str(onnx)}})
    clips = np.load(tmp_path / "val_data.npy")
    np.testing.assert_allclose(load(str(onnx)).logits(clips), load(str(path)).logits(clips), atol=1e-4)


@pytest.mark.parametrize("fusion", ["early", "late"])
def test_what_is_learned_does_not_depend_on_a_pause(tmp_path: Path, fusion: str) -> None:
    write_small_data(tmp_path)
    for results, stops in (("straight", [-1]), ("paused", [1, 2, -1])):
        for stop in stops:
            spec = make_spec(tmp_path, results, num_epochs=3, seed=5, stop_after_epoch=stop)
            spec["model"] |= {"model_type": "MB-GCN", "width": 0.25, "depth": 1, "fusion": fusion}
            spec["input"] = {"streams": ["joint", "bone"]}
            train(spec)
    straight, paused = (
        read_checkpoint(tmp_path / name / "train" / LATEST_NAME).state_dict for name in ("straight", "paused")
    )
    assert all(torch.equal(tensor, paused[name]) for name, tensor in straight.items())


def test_other_classes_start_with_new_heads_and_the_weights_of_all_blocks(tmp_path: Path) -> None:
    write_small_data(tmp_path)
    spec = make_spec(tmp_path, num_epochs=1)
    spec["model"] |= {"model_type": "MB-GCN", "width": 0.25, "depth": 1}
    spec["input"] = {"streams": ["joint", "bone"]}
    train(spec)
    path = tmp_path / "results/train" / LATEST_NAME
    trained = read_checkpoint(path)
    model = build_model(trained.options, LAYOUT, 5, 6)
    assert "has 3 classes and this model has 5" in load_pretrained(model, trained, str(path))[0]
    state = model.state_dict()
    heads = [name for name in state if name.startswith(("fcn.", "branch_heads."))]
    assert len(heads) == 6
    assert all(torch.equal(state[name], tensor) for name, tensor in trained.state_dict.items() if name not in heads)
