"""What a training may start from: weights of another fusion of streams are refused before the first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kinegraph.actions import train
from kinegraph.data.pipeline import build_pipeline
from kinegraph.errors import CheckpointError
from kinegraph.models import build_model
from kinegraph.models.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from kinegraph.skeleton.layouts import get_layout
from kinegraph.spec import ModelSpec
from kinegraph.spec_input import InputSpec
from small_runs import LAYOUT, make_spec, write_small_data

NETWORK: dict[str, Any] = {"model_type": "EF-GCN", "width": 0.125, "depth": 1}


@pytest.fixture()
def data(tmp_path: Path) -> Path:
    write_small_data(tmp_path)
    return tmp_path


def write_weights(path: Path, fusion: Any, streams: list[Any]) -> None:
    layout = get_layout(LAYOUT)
    options = ModelSpec(**NETWORK, graph_layout=LAYOUT, fusion=fusion)
    pipeline = build_pipeline(InputSpec(streams=streams), options.input_channels, layout)
    channels = pipeline.output_channels
    weights = build_model(options, layout, 3, channels).state_dict()
    write_checkpoint(
        path,
        Checkpoint(weights, options, layout, 3, None, pipeline.to_dict(), versions={"a": "b"}, num_channels=channels),
    )


def make_tuning(folder: Path, path: Path, fusion: str, streams: list[str]) -> dict[str, Any]:
    spec = make_spec(folder, num_epochs=1)
    spec["model"] |= {**NETWORK, "fusion": fusion, "pretrained_model_path": str(path)}
    spec["input"] = {"streams": streams}
    return spec


TWO, THREE = ["joint", "bone"], ["joint", "bone", "joint_motion"]


@pytest.mark.parametrize(
    ("given", "asked", "words"),
    [
        (
            ("late", TWO),
            ("early", TWO),
            [
                "a late fusion of 2 streams (joint, bone)",
                "expected one network for 2 streams (joint, bone)",
                "Set model.fusion=late and input.streams=[joint,bone]",
                "train.teacher",
            ],
        ),
        (
            ("early", TWO),
            ("late", TWO),
            [
                "one network for 2 streams (joint, bone)",
                "expected a late fusion of 2 streams (joint, bone)",
                "Set model.fusion=early and input.streams=[joint,bone]",
            ],
        ),
        (
            ("late", THREE),
            ("late", TWO),
            [
                "a late fusion of 3 streams (joint, bone, joint_motion)",
                "expected a late fusion of 2 streams (joint, bone)",
                "Set model.fusion=late and input.streams=[joint,bone,joint_motion]",
            ],
        ),
        (("late", TWO), ("late", ["bone"]), ["a late fusion of 2 streams", "expected one network for 1 stream (bone)"]),
    ],
)
def test_another_fusion_is_one_clear_problem(
    data: Path, given: tuple[str, list[str]], asked: tuple[str, list[str]], words: list[str]
) -> None:
    path = data / "given.pth"
    write_weights(path, *given)
    with pytest.raises(CheckpointError) as caught:
        train(make_tuning(data, path, *asked))
    (problem,) = caught.value.problems
    assert problem.where == "model.pretrained_model_path" and str(path) in problem.got
    assert [word for word in words if word not in str(problem)] == []
    assert not list(data.rglob("model_epoch*"))


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        (("late", TWO), ("late", ["joint", "joint_motion"])),
        # One stream is one network, whatever the fusion
        (("late", ["joint"]), ("early", ["joint"])),
        (("early", ["joint"]), ("late", ["joint"])),
    ],
)
def test_the_same_fusion_is_a_start(data: Path, given: tuple[str, list[str]], asked: tuple[str, list[str]]) -> None:
    path = data / "given.pth"
    write_weights(path, *given)
    spec = make_tuning(data, path, *asked)
    spec["train"]["optim"]["lr"] = 0.0
    train(spec)
    after = read_checkpoint(data / "results/train/pc_model_latest.pth").state_dict
    before = read_checkpoint(path).state_dict
    name = next(name for name in before if name.endswith("fcn.weight"))
    assert (after[name] == before[name]).all() and before[name].any()


def test_a_run_that_goes_on_does_not_look_at_the_weights_it_started_from(data: Path) -> None:
    path = data / "given.pth"
    write_weights(path, "early", ["joint"])
    spec = make_tuning(data, path, "early", ["joint"])
    train(spec)
    write_weights(path, "late", TWO)
    spec["train"]["num_epochs"] = 2
    train(spec)
    assert read_checkpoint(data / "results/train/pc_model_latest.pth").training["epoch"] == 2
