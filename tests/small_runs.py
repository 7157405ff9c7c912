"""Tiny data sets and specs for tests that train: a few clips of a few frames, so that a step costs milliseconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

LAYOUT = "coco"
NUM_JOINTS = 17


def write_clips(folder: Path, part: str, num_clips: int, seed: int, num_frames: int = 4, num_classes: int = 3) -> None:
    """Random clips whose first channel is shifted by the label: `<part>_data.npy` and `<part>_label.json`."""
    rng = np.random.Generator(np.random.PCG64(seed))
    labels = np.arange(num_clips) % num_classes
    clips = rng.normal(size=(num_clips, 3, num_frames, NUM_JOINTS, 1)).astype(np.float32)
    clips[:, 0] += labels[:, None, None, None]
    np.save(folder / f"{part}_data.npy", clips)
    (folder / f"{part}_label.json").write_text(json.dumps(labels.tolist()))


def make_spec(folder: Path, results: str = "results", **train: Any) -> dict[str, Any]:
    """A train spec on the files of `write_clips` in the folder."""

    def name_files(part: str) -> dict[str, str]:
        return {"data_path": str(folder / f"{part}_data.npy"), "label_path": str(folder / f"{part}_label.json")}

    return {
        "results_dir": str(folder / results),
        "wandb": {"enable": False},
        "model": {"graph_layout": LAYOUT},
        "dataset": {
            "train_dataset": name_files("train"),
            "val_dataset": name_files("val"),
            "batch_size": 4,
            "num_workers": 0,
        },
        "train": {"num_epochs": 2, "accelerator": "cpu", "optim": {"lr": 0.01}, **train},
    }


def write_small_data(folder: Path) -> None:
    """13 training clips (3 batches of 4, one clip dropped) and 6 validation clips of 3 classes."""
    write_clips(folder, "train", 13, seed=1)
    write_clips(folder, "val", 6, seed=2)
