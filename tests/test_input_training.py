"""Training with steps of the input and augmentation, from the spec to the answers of the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kinegraph
from kinegraph.actions import run_action
from kinegraph.data.pipeline import InputPipeline, build_pipeline
from kinegraph.errors import SpecError
from kinegraph.models.checkpoint import build_from_checkpoint, read_checkpoint
from kinegraph.skeleton.layouts import LAYOUTS
from kinegraph.spec_input import InputSpec
from small_runs import make_spec, write_small_data

INPUT = {
    "centre": "first",
    "scale": "frame",
    "sampling": "uniform",
    "num_frames": 5,
    "streams": ["bone", "bone_motion"],
}
AUGMENT = {"rotation_y": 20.0, "noise": 0.05, "joint_drop": 0.1, "frame_drop": 0.1, "time_warp": 0.3, "mirror": 0.5}


def make_input_spec(folder: Path, **changes: Any) -> dict[str, Any]:
    return {**make_spec(folder, num_epochs=1), "input": INPUT, "augment": AUGMENT, **changes}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("input")
    write_small_data(folder)
    run_action("train", make_input_spec(folder))
    return folder


def test_a_model_holds_its_input_and_answers_by_it(trained: Path) -> None:
    import torch

    path = trained / "results/train/pc_model_latest.pth"
    checkpoint = read_checkpoint(path)
    expected = build_pipeline(InputSpec(**INPUT, origin_joint=-2), 3, LAYOUTS["coco"])
    assert checkpoint.pipeline is not None and InputPipeline.from_dict(checkpoint.pipeline) == expected
    assert (checkpoint.options.input_channels, checkpoint.num_channels) == (3, 6)
    clips = np.load(trained / "val_data.npy")
    network = build_from_checkpoint(checkpoint, str(path))
    with torch.no_grad():
        logits = network(torch.from_numpy(expected(clips)))
    predictor = kinegraph.load(path)
    assert predictor.pipeline == expected
    np.testing.assert_allclose(predictor.logits(clips), logits.numpy(), atol=1e-4)
    spec = json.loads(json.dumps(checkpoint.spec))
    assert spec["input"]["sampling"] == "uniform" and spec["augment"]["mirror"] == 0.5


@pytest.mark.parametrize(("key", "value"), [("centre", "frame"), ("num_frames", 6), ("streams", ["joint", "bone"])])
def test_a_run_does_not_go_on_with_another_input(trained: Path, key: str, value: Any) -> None:
    with pytest.raises(SpecError) as caught:
        run_action("train", make_input_spec(trained, input={**INPUT, key: value}))
    assert [problem.where for problem in caught.value.problems] == [f"input.{key}"]


@pytest.mark.parametrize(
    ("section", "values", "place"),
    [
        ("input", {"align": "first", "score_channel": 2}, "input.align"),
        ("augment", {"speed": 0.5}, "augment.speed"),
        ("dataset", {"window_size": 10}, "input.sampling"),
        ("dataset", {"random_choose": True}, "input.sampling"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(
    tmp_path: Path, section: str, values: dict[str, Any], place: str
) -> None:
    write_small_data(tmp_path)
    spec = make_input_spec(tmp_path)
    spec[section] = {**spec[section], **values}
    with pytest.raises(SpecError) as caught:
        run_action("train", spec)
    assert [problem.where for problem in caught.value.problems] == [place]


def test_mirror_images_of_sided_classes_are_left_out_with_a_warning(tmp_path: Path) -> None:
    write_small_data(tmp_path)
    spec = make_input_spec(tmp_path)
    spec["dataset"] = {**spec["dataset"], "label_map": {"walk": 0, "wave left": 1, "wave right": 2}}
    run_action("train", spec)
    told = (tmp_path / "results/train/log.txt").read_text()
    assert "augment.mirror=0.5 has no effect: the class 'wave left' and 1 more names a side" in told


@pytest.mark.parametrize(("highest", "named", "is_told"), [(1.0, -1, True), (1.2, -1, False), (1.0, 2, False)])
def test_a_last_channel_that_looks_like_a_score_is_told(
    tmp_path: Path, highest: float, named: int, is_told: bool
) -> None:
    write_small_data(tmp_path)
    for part in ("train", "val"):
        clips = np.load(tmp_path / f"{part}_data.npy")
        clips[:, 2] = np.random.default_rng(0).uniform(0, 1, clips[:, 2].shape) * (clips != 0).any(axis=1)
        clips[0, 2, 0, 0, 0] = highest
        np.save(tmp_path / f"{part}_data.npy", clips)
    spec = make_input_spec(tmp_path)
    spec["input"] = {**INPUT, "score_channel": named}
    run_action("train", spec)
    told = (tmp_path / "results/train/log.txt").read_text()
    assert ("set input.score_channel=2" in told) == is_told
