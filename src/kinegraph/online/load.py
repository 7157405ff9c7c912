"""Opening a model for frame by frame inference."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from kinegraph.backends.model_file import ModelFile
from kinegraph.errors import Problem, UserError
from kinegraph.online.model import OnlineModel
from kinegraph.online.numpy_steps import NumpySteps
from kinegraph.online.onnx_steps import OnnxSteps, is_step_form
from kinegraph.online.schedule import make_schedule
from kinegraph.online.window import WindowSteps
from kinegraph.remote import fetch
from kinegraph.runtime import load as load_predictor
from kinegraph.runtime import open_model_file
from kinegraph.threads import count_threads

Mode = Literal["auto", "step", "window"]
MODES = ("auto", "step", "window")
WINDOW_FRAMES = 64
WINDOW_STRIDE = 8


def load(
    path: str | Path,
    mode: Mode = "auto",
    key: str = "",
    window_frames: int = WINDOW_FRAMES,
    window_stride: int = WINDOW_STRIDE,
    threads: int = 0,
) -> OnlineModel:
    """Open a .pth or .onnx model for frame by frame inference.

    mode     step: the network is carried out once per frame, exactly; window: the last `window_frames` frames are
             classified anew every `window_stride` frames, which any model can; auto: step where the model can
    key      of an encrypted checkpoint; default: the environment variable KINEGRAPH_ENCRYPTION_KEY
    threads  of onnxruntime and of the backend of a window; 0: all cores of this process

    Raises CheckpointError for a file that cannot be read, UserError where mode is "step" and the model has no such
    form.
    """
    if mode not in MODES or min(window_frames, window_stride) < 1:
        got = f"mode {mode!r}, window_frames {window_frames}, window_stride {window_stride}"
        raise UserError(Problem("online load", got, f"one of {', '.join(MODES)}, and frames of at least 1"))
    path = fetch(path)
    file = open_model_file(path, key=key)
    if file.kind == "onnx" and is_step_form(file.metadata):
        steps = OnnxSteps(path, count_threads(threads))
        return OnlineModel(str(path), steps, steps.description)
    if mode != "window":
        obstacle = _find_obstacle(file)
        if not obstacle:
            return OnlineModel(str(path), NumpySteps(file.demand_network("online")), file.description)
        if mode == "step":
            expected = "a model that can be carried out frame by frame"
            hint = "Use mode='window', or train with the recipe `online`."
            raise UserError(Problem(str(path), obstacle, expected, hint))
    predictor = load_predictor(path, key=file.key, threads=threads)
    return OnlineModel(str(path), WindowSteps(predictor, window_frames, window_stride), predictor.description)


def _find_obstacle(file: ModelFile) -> str:
    """Why a model has no form step by step, or ''."""
    pipeline = file.description.pipeline
    if file.network is None:
        return "a network that sees all frames at once"
    if pipeline is not None and not pipeline.is_causal:
        return "an input pipeline that looks at whole clips"
    try:
        make_schedule(file.network)
    except UserError as error:
        problem = error.problems[0]
        return f"a network whose {problem.where} has {problem.got}, not {problem.expected}"
    return ""
