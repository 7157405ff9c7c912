"""Specs as users of TAO have them, and every template, run unchanged but for the paths."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from kinegraph.actions import ACTIONS
from kinegraph.cli import main

# The two sample specs that the facts describe: 34 joints, and Kinetics. Two epochs instead of 70 and 50.
NVIDIA_SPEC = """
results_dir: {results}
encryption_key: nvidia_tao
model:
  model_type: ST-GCN
  pretrained_model_path: ""
  input_channels: 3
  dropout: 0.5
  graph_layout: "nvidia"
  graph_strategy: "spatial"
  edge_importance_weighting: True
dataset:
  train_dataset:
    data_path: {data}/train_data.npy
    label_path: {data}/train_label.pkl
  val_dataset:
    data_path: {data}/val_data.npy
    label_path: {data}/val_label.pkl
  num_classes: 6
  label_map:
    sitting_down: 0
    getting_up: 1
    sitting: 2
    standing: 3
    walking: 4
    jumping: 5
  batch_size: 16
  num_workers: 1
train:
  optim:
    lr: 0.1
    momentum: 0.9
    nesterov: True
    weight_decay: 0.0001
    lr_scheduler: "MultiStep"
    lr_steps:
    - 10
    - 60
    lr_decay: 0.1
  num_epochs: 70
  checkpoint_interval: 5
  num_gpus: 1
evaluate:
  checkpoint: ???
  test_dataset:
    data_path: {data}/val_data.npy
    label_path: {data}/val_label.pkl
inference:
  checkpoint: ???
  output_file: {results}/inference/classes.txt
  test_dataset:
    data_path: {data}/val_data.npy
export:
  checkpoint: ???
  onnx_file: {results}/export/model.onnx
"""

KINETICS_SPEC = """
results_dir: {results}
model:
  model_type: ST-GCN
  input_channels: 3
  dropout: 0.5
  graph_layout: "openpose"
  graph_strategy: "spatial"
  edge_importance_weighting: True
dataset:
  train_dataset:
    data_path: {data}/train_data.npy
    label_path: {data}/train_label.pkl
  val_dataset:
    data_path: {data}/val_data.npy
    label_path: {data}/val_label.pkl
  num_classes: 5
  label_map:
    front_raises: 0
    pull_ups: 1
    clean_and_jerk: 2
    presenting_weather_forecast: 3
    deadlifting: 4
  random_choose: True
  random_move: True
  window_size: 150
  batch_size: 16
  num_workers: 1
train:
  optim:
    lr: 0.1
    momentum: 0.9
    nesterov: True
    weight_decay: 0.0001
    lr_scheduler: "MultiStep"
    lr_steps: [20, 30, 40]
    lr_decay: 0.1
  num_epochs: 50
  checkpoint_interval: 5
evaluate:
  checkpoint: ???
  test_dataset:
    data_path: {data}/val_data.npy
    label_path: {data}/val_label.pkl
inference:
  checkpoint: ???
  output_file: {results}/inference/classes.txt
  test_dataset:
    data_path: {data}/val_data.npy
export:
  checkpoint: ???
  onnx_file: {results}/export/model.onnx
"""


def write_vendor_data(folder: Path, num_joints: int, num_classes: int, num_frames: int) -> None:
    """Arrays and pickled labels `(sample_names, labels)`, as the original's tools write them."""
    rng = np.random.default_rng(7)
    for part, num_clips in (("train", 6), ("val", 5)):
        clips = rng.normal(size=(num_clips, 3, num_frames, num_joints, 1)).astype(np.float32)
        np.save(folder / f"{part}_data.npy", clips)
        names = [f"{part}_{number}" for number in range(num_clips)]
        labels = [number % num_classes for number in range(num_clips)]
        (folder / f"{part}_label.pkl").write_bytes(pickle.dumps((names, labels)))


@pytest.mark.parametrize(
    ("text", "num_joints", "classes", "num_frames"),
    [
        (NVIDIA_SPEC, 34, {"sitting_down", "getting_up", "sitting", "standing", "walking", "jumping"}, 8),
        (
            KINETICS_SPEC,
            18,
            {"front_raises", "pull_ups", "clean_and_jerk", "presenting_weather_forecast", "deadlifting"},
            10,
        ),
    ],
    ids=["nvidia", "kinetics"],
)
def test_sample_spec_runs_through_every_action(
    tmp_path: Path, text: str, num_joints: int, classes: set[str], num_frames: int
) -> None:
    write_vendor_data(tmp_path, num_joints, len(classes), num_frames)
    results = tmp_path / "results"
    spec = tmp_path / "spec.yaml"
    spec.write_text(text.format(results=results, data=tmp_path))
    checkpoint = results / "train/pc_model_latest.pth"
    assert main(["train", "-e", str(spec), "num_epochs=2"]) == 0
    assert main(["evaluate", "-e", str(spec), f"evaluate.checkpoint={checkpoint}"]) == 0
    assert main(["inference", "-e", str(spec), f"inference.checkpoint={checkpoint}"]) == 0
    assert main(["export", "-e", str(spec), f"export.checkpoint={checkpoint}"]) == 0
    metrics = json.loads((results / "evaluate/metrics.json").read_text())
    assert 0 <= metrics["accuracy"] <= 100
    answers = (results / "inference/classes.txt").read_text().splitlines()
    assert len(answers) == 5 and set(answers) <= classes
    onnx = results / "export/model.onnx"
    again = tmp_path / "again"
    arguments = [f"inference.checkpoint={onnx}", f"inference.output_file={again}.txt", f"inference.results_dir={again}"]
    assert main(["inference", "-e", str(spec), *arguments]) == 0
    assert again.with_suffix(".txt").read_text().splitlines() == answers
    for action in ("train", "evaluate", "inference", "export"):
        assert "nvidia_tao" not in (results / action / "experiment.yaml").read_text()


def fill_template(text: str, values: dict[str, str]) -> dict[str, Any]:
    """The template as YAML with each ??? and the results folder replaced; every ??? must be known."""
    spec = yaml.safe_load(text)

    def fill(node: dict[str, Any], prefix: str) -> None:
        for key, value in node.items():
            path = f"{prefix}{key}"
            if isinstance(value, dict):
                fill(value, path + ".")
            elif value == "???" or path == "results_dir":
                node[key] = values[path]

    fill(spec, "")
    return spec


def test_every_template_runs_once_its_paths_are_filled(
    tmp_path: Path, shared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_vendor_data(tmp_path, 34, 3, 8)
    checkpoint = str(tmp_path / "results/train/pc_model_latest.pth")
    values = {
        "results_dir": str(tmp_path / "results"),
        "dataset_convert.data": str(shared / "golden/bodypose3d.json"),
        "evaluate.checkpoint": checkpoint,
        "inference.checkpoint": checkpoint,
        "export.checkpoint": checkpoint,
    }
    for part in ("train", "val"):
        for kind, ending in (("data", "npy"), ("label", "pkl")):
            values[f"dataset.{part}_dataset.{kind}_path"] = str(tmp_path / f"{part}_{kind}.{ending}")
            for action in ("evaluate", "inference"):
                values[f"{action}.test_dataset.{kind}_path"] = str(tmp_path / f"val_{kind}.{ending}")
    order = ["dataset_convert", "train", "automl", "evaluate", "inference", "export"]
    assert sorted(order) == sorted(ACTIONS)
    for action in order:
        capsys.readouterr()
        assert main(["template", action]) == 0
        spec = tmp_path / f"{action}.yaml"
        spec.write_text(yaml.safe_dump(fill_template(capsys.readouterr().out, values)))
        extra = ["num_epochs=1"] if action in ("train", "automl") else []
        extra += ["automl.automl_max_recommendations=1"] if action == "automl" else []
        assert main([action, "-e", str(spec), *extra]) == 0, action
        status = (tmp_path / "results" / action / "status.json").read_text().splitlines()
        assert json.loads(status[-1])["status"] == "SUCCESS"
        experiment = (tmp_path / "results" / action / "experiment.yaml").read_text()
        assert re.search(r"^results_dir:", experiment, re.MULTILINE)
