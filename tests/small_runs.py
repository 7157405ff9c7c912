"""Tiny data sets and specs for tests that train: a few clips of a few frames, so that a step costs milliseconds."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
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


DIE_IN_STEP = """
import json, os, signal, sys
from kinegraph.actions import train
from kinegraph.fit import _Trainer
original, calls = _Trainer._train_step, []
def step(self, *arguments):
    calls.append(1)
    if len(calls) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    original(self, *arguments)
_Trainer._train_step = step
train(json.loads(sys.argv[1]))
"""


def train_until_killed(spec: dict[str, Any], step: int) -> None:
    """Train in a process of its own that is killed (SIGKILL) when it begins this step, counted from 1."""
    words = [sys.executable, "-c", DIE_IN_STEP, json.dumps(spec), str(step)]
    done = subprocess.run(words, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
