"""The reference: ST-GCN with the original's recipe on NW-UCLA, cross-view, through the public actions.

    .venv/bin/python benchmarks/nw_ucla.py --data ../shared/data/nw_ucla.npz

About an hour on two cores. The same command resumes a run that was stopped. It trains on all clips of views 1 and 2
for a fixed number of epochs; val_dataset is a copy of one training subject's clips, only to watch. The test view is
given to evaluate once, with the last epoch, which nothing chose.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import statistics
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from kinegraph.actions import evaluate, train
from kinegraph.run import show_messages
from kinegraph.storage import make_folder, write_json

NUM_FRAMES = 64
WATCHED_SUBJECT = 1
CLASS_NAMES = (
    "pick up with one hand",
    "pick up with two hands",
    "drop trash",
    "walk around",
    "sit down",
    "stand up",
    "donning",
    "doffing",
    "throw",
    "carry",
)
RESULT_PATH = Path(__file__).parent / "results" / "nw_ucla_stgcn_default.json"


def fit_length(frames: np.ndarray, num_frames: int) -> np.ndarray:
    """(T, V, C) -> (num_frames, V, C): zeros at the end of a short clip, linear resampling of a long one."""
    length = len(frames)
    if length <= num_frames:
        return np.concatenate([frames, np.zeros((num_frames - length, *frames.shape[1:]), frames.dtype)])
    place = np.linspace(0, length - 1, num_frames)
    before = np.minimum(place.astype(int), length - 2)
    share = (place - before)[:, None, None]
    return frames[before] * (1 - share) + frames[before + 1] * share


def prepare(source: Path, folder: Path) -> None:
    """Write train, val and test arrays (N, C, T, V, 1) and labels, centred on the first frame's hip centre."""
    content = np.load(source)
    ends = np.cumsum(content["length"])
    clips = np.split(content["frames"], ends[:-1])
    array = np.stack([fit_length(clip - clip[0, 0], NUM_FRAMES) for clip in clips])
    array = np.ascontiguousarray(array.transpose(0, 3, 1, 2)[..., None], dtype=np.float32)
    is_test = content["test"]
    parts = {"train": ~is_test, "val": ~is_test & (content["subject"] == WATCHED_SUBJECT), "test": is_test}
    for part, chosen in parts.items():
        np.save(folder / f"{part}_data.npy", array[chosen])
        names, labels = content["name"][chosen].tolist(), content["label"][chosen].tolist()
        write_json(folder / f"{part}_label.json", {"names": names, "labels": labels})


def write_spec(folder: Path, epochs: int) -> Path:
    """The spec of the run: the original's recipe, and the files of `prepare`."""

    def name_files(part: str) -> dict[str, str]:
        return {"data_path": str(folder / f"{part}_data.npy"), "label_path": str(folder / f"{part}_label.json")}

    optim = {"optimizer_type": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}
    optim |= {"lr_scheduler": "MultiStep", "lr_steps": [10, 60], "lr_decay": 0.1}
    spec = {
        "results_dir": str(folder / "results"),
        "wandb": {"enable": False},
        "model": {"model_type": "ST-GCN", "graph_layout": "kinect_v1", "graph_strategy": "spatial", "dropout": 0.5},
        "dataset": {
            "train_dataset": name_files("train"),
            "val_dataset": name_files("val"),
            "num_classes": len(CLASS_NAMES),
            "label_map": {name: label for label, name in enumerate(CLASS_NAMES)},
            "batch_size": 16,
            "num_workers": 0,
        },
        "train": {"num_epochs": epochs, "checkpoint_interval": 5, "optim": optim},
        "evaluate": {
            "test_dataset": name_files("test"),
            "checkpoint": str(folder / "results/train/pc_model_latest.pth"),
        },
    }
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(spec, sort_keys=False))
    return path


def read_epoch_seconds(folder: Path) -> list[float]:
    with open(folder / "results/train/metrics.csv", newline="") as file:
        return [float(row["seconds"]) for row in csv.DictReader(file)]


def describe_spec(path: Path, folder: Path) -> Any:
    """The spec without this machine's folder."""
    return yaml.safe_load(path.read_text().replace(str(folder), "<runs>"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/nw_ucla.npz"))
    parser.add_argument("--runs", type=Path, default=Path.home() / "kinegraph-runs" / "nw_ucla_stgcn_default")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--output", type=Path, default=RESULT_PATH)
    arguments = parser.parse_args()
    show_messages()
    make_folder(arguments.runs)
    prepare(arguments.data, arguments.runs)
    spec = write_spec(arguments.runs, arguments.epochs)
    trained = train(spec)
    tested = evaluate(spec)
    seconds = read_epoch_seconds(arguments.runs)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    result = {
        "dataset": "NW-UCLA",
        "protocol": "cross-view: trained on views 1 and 2 (all 1020 clips), tested once on view 3 (464 clips)",
        "recipe": "ST-GCN, the original's defaults",
        "checkpoint": "last epoch",
        "test_accuracy": tested.metrics["accuracy"],
        "test_avg_accuracy": tested.metrics["avg_accuracy"],
        "final_train_loss": trained.metrics["train_loss"],
        "final_train_accuracy": trained.metrics["train_acc"],
        "seeds": [1234],
        "seconds_per_epoch": {
            "median": statistics.median(seconds),
            "min": min(seconds),
            "max": max(seconds),
            "note": "OMP_NUM_THREADS=1; other work ran on the other core, so the minimum is the best guide",
        },
        "device": f"CPU, {torch.get_num_threads()} thread(s), {platform.machine()}",
        "versions": {"torch": str(torch.__version__), "python": platform.python_version()},
        "commit": commit,
        "spec": describe_spec(spec, arguments.runs),
    }
    write_json(arguments.output, result)
    print(json.dumps({name: result[name] for name in ("test_accuracy", "test_avg_accuracy", "seconds_per_epoch")}))


if __name__ == "__main__":
    main()
