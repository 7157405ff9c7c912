"""`kinegraph demo`: every action but dataset_convert, on generated data, in a few minutes on two CPU cores."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kinegraph.actions import run_action
from kinegraph.data.synthetic import CLASS_NAMES, write_dataset
from kinegraph.errors import Problem, UserError
from kinegraph.run import Result, format_duration, show_messages
from kinegraph.storage import write_atomically
from kinegraph.templates import build_template

NUM_STEPS = 5
PARTS = ("train", "val", "test")
TRAINING = {
    "train.num_epochs": 5,
    "train.optim.optimizer_type": "torch.optim.AdamW",
    "train.optim.lr": 0.002,
    "train.optim.lr_scheduler": "Cosine",
    "train.optim.warmup_epochs": 1,
    "model.dropout": 0.2,
    "dataset.batch_size": 8,
    "dataset.num_workers": 0,
    "dataset.label_map": {name: label for label, name in enumerate(CLASS_NAMES)},
}
"""Chosen for an answer after few steps; the defaults of the spec are for training of an hour and more."""
WITHOUT_EFFECT = (
    *(f"train.optim.{name}" for name in ("momentum", "nesterov", "lr_monitor", "patience", "lr_steps", "lr_decay")),
    *(f"{action}.{name}" for action in ("evaluate", "inference") for name in ("num_gpus", "gpu_ids", "num_nodes")),
)
"""Commented out in the specs of the demo, so that no action has to say that they do nothing there."""


@dataclass(frozen=True)
class DemoSize:
    """How many clips of each split are generated, and the seed of the generator."""

    train: int = 432
    val: int = 96
    test: int = 240
    seed: int = 1


def run_demo(folder: Path, size: DemoSize | None = None, training: Mapping[str, Any] | None = None) -> Result:
    """Generate a data set, then train, evaluate, classify and export; gives evaluate's metrics and all files.

    `training` replaces options of the training spec. What is in the folder already, from a demo before, is used again.
    Raises UserError if the folder holds something else, and what the actions raise.
    """
    show_messages()
    started_s = time.monotonic()
    size = size or DemoSize()
    _check_folder(folder)
    with _show_step(1, "Generating labelled motion"):
        data = _make_data(folder / "data", size)
    with _show_step(2, "Training ST-GCN"):
        trained = _run_step(folder, "train", _name_training_data(data) | TRAINING | dict(training or {}))
    with _show_step(3, "Evaluating it on people that it has not seen"):
        evaluated = _run_step(folder, "evaluate", _name_test_data("evaluate", trained, data))
    with _show_step(4, "Classifying clips"):
        _run_step(folder, "inference", _name_test_data("inference", trained, data))
    with _show_step(5, "Exporting to ONNX, and checking that it answers alike"):
        onnx_file = str(folder / "results" / "export" / "model.onnx")
        values = {"export.checkpoint": trained.files["best"], "export.onnx_file": onnx_file, "export.overwrite": True}
        _run_step(folder, "export", values)
    seconds = time.monotonic() - started_s
    print(_summarise(folder, size, evaluated.metrics["accuracy"], seconds), flush=True)
    return Result(evaluated.metrics, {"checkpoint": trained.files["best"], "onnx": onnx_file, **data})


@contextmanager
def _show_step(number: int, title: str) -> Iterator[None]:
    started_s = time.monotonic()
    print(f"\n{number}/{NUM_STEPS} {title} ...", flush=True)
    yield
    print(f"    done in {format_duration(time.monotonic() - started_s)}", flush=True)


def _check_folder(folder: Path) -> None:
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "data").is_dir():
        hint = "Choose another one with --folder."
        raise UserError(Problem(str(folder), "a folder with other files", "a new folder, or one of a demo", hint))


def _make_data(folder: Path, size: DemoSize) -> dict[str, str]:
    data = {
        f"{part}_{kind[0]}": str(folder / f"{part}_{kind[0]}.{kind[1]}")
        for part in PARTS
        for kind in (("data", "npy"), ("label", "pkl"))
    }
    if all(Path(path).is_file() for path in data.values()):
        print(f"    {folder} is there already")
        return data
    return {name: str(path) for name, path in write_dataset(folder, size.train, size.val, size.test, size.seed).items()}


def _name_training_data(data: Mapping[str, str]) -> dict[str, str]:
    return {
        f"dataset.{part}_dataset.{kind}_path": data[f"{part}_{kind}"]
        for part in ("train", "val")
        for kind in ("data", "label")
    }


def _name_test_data(action: str, trained: Result, data: Mapping[str, str]) -> dict[str, str]:
    return {
        f"{action}.checkpoint": trained.files["best"],
        f"{action}.test_dataset.data_path": data["test_data"],
        f"{action}.test_dataset.label_path": data["test_label"],
    }


def _run_step(folder: Path, action: str, values: Mapping[str, Any]) -> Result:
    """Write the action's spec, or keep the one that is there, and run it."""
    path = folder / f"{action}.yaml"
    if path.exists():
        print(f"    {path} is there already and is used as it is", flush=True)
    else:
        known = {"results_dir": str(folder / "results"), **values}
        with write_atomically(path, "w") as file:
            file.write(build_template(action, known, WITHOUT_EFFECT))
    return run_action(action, path)


def _summarise(folder: Path, size: DemoSize, accuracy: float, seconds: float) -> str:
    results = folder / "results"
    num_classes = len(CLASS_NAMES)
    load = f"kinegraph.load('{results}/export/model.onnx')"
    clips = f"numpy.load('{folder}/data/test_data.npy')[:3]"
    return f"""
Finished in {format_duration(seconds)}. In {folder}:
  data/               {size.train} clips to train on, {size.val} to choose the best epoch, {size.test} to test; 2 s each
  *.yaml              the spec of each action, with every option explained
  results/train/      checkpoints (pc_model_best.pth), metrics.csv, TensorBoard
  results/evaluate/   metrics.json, confusion matrix, predictions
  results/inference/  results.txt, results.csv, results.json
  results/export/     model.onnx and its labels.txt

Accuracy on the test clips: {accuracy:.1f} % ({num_classes} classes; guessing gives {100 / num_classes:.1f} %).
The data is synthetic: a program moved model bodies in front of a model camera. The number shows that everything works
together; it says nothing about recordings of real people.

Try next:
  kinegraph inspect {folder}/data/train_data.npy {folder}/data/train_label.pkl
  kinegraph train -e {folder}/train.yaml train.num_epochs=20 results_dir={folder}/longer
  kinegraph evaluate -e {folder}/evaluate.yaml evaluate.checkpoint={results}/export/model.onnx
  python -c "import kinegraph, numpy; print({load}.predict({clips}))"
  kinegraph template train -o train.yaml     (a spec for data of your own)"""
