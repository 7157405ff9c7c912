"""Opening a model for frame by frame inference."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from kinegraph.errors import Problem, UserError
from kinegraph.models.folded import FoldedNetwork
from kinegraph.online.model import OnlineModel, Steps
from kinegraph.online.numpy_steps import NumpySteps
from kinegraph.online.window import WindowSteps
from kinegraph.remote import fetch
from kinegraph.runtime import ModelDescription
from kinegraph.runtime import load as load_predictor

Mode = Literal["auto", "step", "window"]
WINDOW_FRAMES = 64
WINDOW_STRIDE = 8


def load(
    path: str | Path,
    mode: Mode = "auto",
    key: str = "",
    window_frames: int = WINDOW_FRAMES,
    window_stride: int = WINDOW_STRIDE,
) -> OnlineModel:
    """Open a .pth or .onnx model for frame by frame inference.

    mode     step: the network is carried out once per frame, exactly; window: the last `window_frames` frames are
             classified anew every `window_stride` frames, which any model can; auto: step where the model can
    key      of an encrypted checkpoint; default: the environment variable KINEGRAPH_ENCRYPTION_KEY

    Raises CheckpointError for a file that cannot be read, UserError where mode is "step" and the model has no such
    form.
    """
    path = fetch(path)
    key = key or os.environ.get("KINEGRAPH_ENCRYPTION_KEY", "")
    if mode not in ("auto", "step", "window"):
        raise UserError(Problem("mode", repr(mode), "auto, step or window"))
    if mode != "window":
        network, description, reason = _read_network(path, key)
        if network is not None and not reason:
            return OnlineModel(str(path), NumpySteps(network), description)
        if mode == "step":
            hint = "Use mode='window'."
            raise UserError(Problem(str(path), reason, "a network that can be carried out frame by frame", hint))
    predictor = load_predictor(path, key=key)
    steps: Steps = WindowSteps(predictor, window_frames, window_stride)
    return OnlineModel(str(path), steps, predictor.description)


def _read_network(path: Path, key: str) -> tuple[FoldedNetwork | None, ModelDescription, str]:
    """The folded network, what the file says, and why it has no form step by step, or ''."""
    if path.suffix.lower() == ".onnx":
        network, description = None, load_predictor(path).description
        reason = "an ONNX file without a folded network"
    else:
        network, description = _read_checkpoint(path, key)
        reason = f"a {description.metadata['model']['model_type']} network, which sees all frames at once"
    if network is not None:
        reason = ""
    return network, description, reason


def _read_checkpoint(path: Path, key: str) -> tuple[FoldedNetwork | None, ModelDescription]:
    from kinegraph.models import Foldable
    from kinegraph.models.checkpoint import build_from_checkpoint, read_checkpoint
    from kinegraph.runtime import describe_checkpoint

    checkpoint = read_checkpoint(path, key)
    model = build_from_checkpoint(checkpoint, str(path))
    network: FoldedNetwork | None = model.fold() if isinstance(model, Foldable) else None
    return network, describe_checkpoint(checkpoint, str(path))
