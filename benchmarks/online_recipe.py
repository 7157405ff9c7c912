"""What frame by frame inference costs in accuracy: the recipe `online` beside the same network with whole clips.

    .venv/bin/python benchmarks/online_recipe.py --data ../shared/data/nw_ucla.npz

NW-UCLA, cross-view, through the public actions. The same command resumes runs that were stopped. Every side trains on
all clips of views 1 and 2 for the recipe's number of epochs; the test view is given to evaluate once for each model,
with the last epoch, which nothing chose. val_dataset is a copy of one training subject's clips, only to watch.
"""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from kinegraph import online
from kinegraph.actions import evaluate, train
from kinegraph.config_source import nest
from kinegraph.models import build_model
from kinegraph.recipes import RECIPES
from kinegraph.run import show_messages
from kinegraph.skeleton.layouts import get_layout
from kinegraph.spec import ModelSpec
from kinegraph.storage import make_folder, write_json

WATCHED_SUBJECT = 1
RESULT_PATH = Path(__file__).parent / "results" / "online_recipe.json"
SIDES: dict[str, dict[str, Any]] = {
    "online": {},
    "symmetric padding": {"model.temporal_padding": "symmetric"},
    "whole clips": {
        "model.temporal_padding": "symmetric",
        "input.sampling": "uniform",
        "input.centre": "first",
        "input.missing": "interpolate",
        "augment.speed": 0.0,
        "augment.time_warp": 0.3,
    },
}
"""What differs from the recipe."""


def prepare(source: Path, folder: Path) -> None:
    """Write train, val and test arrays (N, C, T, V, 1) as recorded, with zeros after each clip, and labels."""
    content = np.load(source)
    clips = np.split(content["frames"], np.cumsum(content["length"])[:-1])
    array = np.zeros((len(clips), 3, int(content["length"].max()), clips[0].shape[1], 1), np.float32)
    for clip, frames in zip(array, clips, strict=True):
        clip[:, : len(frames), :, 0] = frames.transpose(2, 0, 1)
    is_test = content["test"]
    parts = {"train": ~is_test, "val": ~is_test & (content["subject"] == WATCHED_SUBJECT), "test": is_test}
    for part, chosen in parts.items():
        np.save(folder / f"{part}_data.npy", array[chosen])
        write_json(folder / f"{part}_label.json", content["label"][chosen].tolist())


def write_spec(data: Path, folder: Path, changes: dict[str, Any], seed: int) -> Path:
    """The recipe with the changes of a side, on the files of `prepare`."""
    values = RECIPES["online"].values | changes
    values |= {f"dataset.{part}_dataset.data_path": str(data / f"{part}_data.npy") for part in ("train", "val")}
    values |= {f"dataset.{part}_dataset.label_path": str(data / f"{part}_label.json") for part in ("train", "val")}
    values |= {
        "results_dir": str(folder),
        "wandb.enable": False,
        "model.graph_layout": "kinect_v1",
        "train.seed": seed,
        "train.checkpoint_interval": 5,
        "evaluate.test_dataset.data_path": str(data / "test_data.npy"),
        "evaluate.test_dataset.label_path": str(data / "test_label.json"),
        "evaluate.checkpoint": str(folder / "train/pc_model_latest.pth"),
    }
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(nest(values), sort_keys=False))
    return path


def run_online(model_path: Path, data: Path) -> dict[str, Any]:
    """The test clips, each from a fresh state, frame by frame: how many get an answer, and how many a right one."""
    model = online.load(model_path, mode="step")
    clips, lengths = np.load(data / "test_data.npy")[..., 0], []
    labels = np.array(yaml.safe_load((data / "test_label.json").read_text()))
    answers = np.full(len(clips), -1)
    for i, clip in enumerate(clips):
        length = int(np.flatnonzero((clip != 0).any(axis=(0, 2)))[-1]) + 1
        lengths.append(length)
        probabilities, _ = model.step(clip[None, :, :length], model.start())
        if np.isfinite(probabilities).all():
            answers[i] = probabilities[0].argmax()
    answered = answers >= 0
    right = (answers == labels)[answered]
    return {
        "delay_frames": model.delay_frames,
        "clips": len(clips),
        "median_length": float(np.median(lengths)),
        "clips_with_an_answer": int(answered.sum()),
        "accuracy_of_those": float(right.mean()) if len(right) else None,
    }


def describe_network(options: dict[str, Any]) -> dict[str, int]:
    layout = get_layout("kinect_v1")
    chosen = {key.removeprefix("model."): value for key, value in options.items() if key.startswith("model.")}
    model = build_model(ModelSpec(**chosen), layout, 10, 3 * len(options["input.streams"]))
    network = model.fold()
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "multiply_adds_per_clip": network.count_multiply_adds(options["input.num_frames"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/nw_ucla.npz"))
    parser.add_argument("--runs", type=Path, default=Path.home() / "kinegraph-runs" / "online_recipe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--output", type=Path, default=RESULT_PATH)
    arguments = parser.parse_args()
    show_messages()
    make_folder(arguments.runs)
    if not (arguments.runs / "test_label.json").exists():
        prepare(arguments.data, arguments.runs)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    result: dict[str, Any] = {
        "dataset": "NW-UCLA",
        "protocol": "cross-view: trained on views 1 and 2 (1020 clips), tested once on view 3 (464 clips), last epoch",
        "recipe": RECIPES["online"].values,
        "network": describe_network(RECIPES["online"].values),
        "seeds": arguments.seeds,
        "device": f"CPU, {torch.get_num_threads()} thread(s)",
        "commit": commit,
        "sides": {name: {"changes": changes, "runs": []} for name, changes in SIDES.items()},
    }
    for seed in arguments.seeds:
        for name, changes in SIDES.items():
            folder = arguments.runs / f"{name.replace(' ', '_')}_{seed}"
            make_folder(folder)
            spec = write_spec(arguments.runs, folder, changes, seed)
            trained = train(spec)
            tested = evaluate(spec)
            row = {"seed": seed, "test_accuracy": tested.metrics["accuracy"]}
            row["train_seconds"] = trained.metrics["train_seconds"]
            if changes.get("input.sampling") != "uniform":
                row["frame_by_frame"] = run_online(folder / "train/pc_model_latest.pth", arguments.runs)
            result["sides"][name]["runs"].append(row)
            write_json(arguments.output, result)


if __name__ == "__main__":
    main()
