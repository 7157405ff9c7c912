"""Small trained-looking models, data and runs for the tests of everything after training."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kinegraph.data.pipeline import InputPipeline
from kinegraph.models import build_model
from kinegraph.models.checkpoint import Checkpoint, write_checkpoint
from kinegraph.run import Run
from kinegraph.skeleton.layouts import LAYOUTS
from kinegraph.spec import ModelSpec
from kinegraph.spec_reading import read_spec

LAYOUT = "coco"
NUM_JOINTS = 17
NUM_FRAMES = 8
LABEL_MAP = {"walking": 2, "sitting": 0, "standing": 1, "=jumping": 3}
"""Not in label order, and with a name that a spreadsheet would take for a formula."""
CLASS_NAMES = ["sitting", "standing", "walking", "=jumping"]


def make_clips(num_clips: int, seed: int = 3, frames: int = NUM_FRAMES, people: int = 1) -> np.ndarray:
    """Random clips (N, 3, T, 17, M) whose joints lie around a place of their own, so that they differ as clips."""
    rng = np.random.default_rng(seed)
    place = 2 * rng.standard_normal((num_clips, 3, 1, NUM_JOINTS, 1))
    return (place + rng.standard_normal((num_clips, 3, frames, NUM_JOINTS, people))).astype(np.float32)


@cache
def make_checkpoint(seed: int = 0, strategy: str = "spatial") -> Checkpoint:
    """A network whose logits are spread, so that all classes occur among its answers for `make_clips`."""
    torch.manual_seed(seed)
    options = ModelSpec(graph_layout=LAYOUT, graph_strategy=strategy)  # type: ignore[arg-type]
    model = build_model(options, LAYOUTS[LAYOUT], len(CLASS_NAMES))
    clips = torch.from_numpy(make_clips(24, seed=9))
    for module in model.modules():
        if hasattr(module, "momentum"):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(clips)
        model.eval()
        logits = model(clips)
        head = model.get_submodule("fcn")
        scale = 2 / logits.std(0)
        head.weight *= scale[:, None, None, None]
        head.bias.copy_((head.bias - logits.mean(0)) * scale)
    return Checkpoint(
        state_dict={name: tensor.clone() for name, tensor in model.state_dict().items()},
        options=options,
        layout=LAYOUTS[LAYOUT],
        num_classes=len(CLASS_NAMES),
        label_map=dict(LABEL_MAP),
        pipeline=InputPipeline(3, NUM_JOINTS).to_dict(),
        metrics={"val_acc": 0.5, "val_loss": float("nan")},
        spec={"model_name": "test_model"},
    )


def write_model(folder: Path, name: str = "model.pth", key: str = "") -> Path:
    write_checkpoint(folder / name, make_checkpoint(), key)
    return folder / name


def write_foreign(folder: Path, prefix: str = "model.", label_map: dict[str, int] | None = None) -> Path:
    """The same weights as another tool writes them: no entry of ours."""
    content: dict[str, Any] = {
        "state_dict": {prefix + name: tensor for name, tensor in make_checkpoint().state_dict.items()}
    }
    if label_map:
        content["hyper_parameters"] = {"dataset": {"label_map": label_map}}
    torch.save(content, folder / "foreign.pth")
    return folder / "foreign.pth"


SHARED_FOLDER = tempfile.TemporaryDirectory(prefix="kinegraph-tests-")
"""Removed when the process ends."""


def find_shared_folder() -> Path:
    return Path(SHARED_FOLDER.name)


@cache
def find_model() -> Path:
    """A .pth file that tests only read."""
    return write_model(find_shared_folder())


@cache
def find_exported() -> Path:
    """The ONNX file of `find_model`, made once by the export action; it takes some 15 seconds."""
    from kinegraph.actions import export

    folder = find_shared_folder()
    spec = {"results_dir": str(folder / "results"), "export": {"checkpoint": str(find_model())}}
    return Path(export(spec).files["onnx"])


def make_run(folder: Path, action: str, spec: dict[str, Any]) -> Run:
    loaded = read_spec(spec)
    folder.mkdir(parents=True, exist_ok=True)
    return Run(action, folder, loaded.values, loaded.origins)
