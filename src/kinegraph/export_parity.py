"""Does an exported file answer as PyTorch does?"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import nn

from kinegraph.errors import ParityError, Problem, describe_reason
from kinegraph.model_description import ModelDescription
from kinegraph.models.folded import FoldedNetwork
from kinegraph.models.folded_torch import FoldedModel
from kinegraph.online.onnx_steps import FRAME_NAME, INITIAL, IS_NEW_NAME, LOGITS_NAME, PHASE_NAME, STEP_KEY
from kinegraph.onnx_graph import INPUT_NAME, OUTPUT_NAME

TOLERANCE = 1e-4
PARITY_SHAPES = ((1, 1, 1), (3, 7, 1), (2, 30, 2), (1, 64, 2), (1, 300, 1))
"""(clips, frames, people). Odd and even lengths, shorter than the kernel and the length of TAO's clips."""
NUM_STEP_PEOPLE = 2
NUM_STEP_ANSWERS = 4


@dataclass(frozen=True)
class Parity:
    """The largest differences between onnxruntime and PyTorch; relative to the largest logit of the same shape."""

    max_abs_error: float
    max_relative_error: float
    shapes: list[dict[str, Any]]


def check_parity(model: nn.Module, content: bytes, description: ModelDescription) -> Parity:
    """Compare onnxruntime with PyTorch on random clips of PARITY_SHAPES. Raises ParityError beyond TOLERANCE."""
    assert description.pipeline is not None
    session = _open(content)
    generator = np.random.default_rng(0)
    rows = []
    for clips, frames, people in PARITY_SHAPES:
        shape = (clips, description.pipeline.num_channels, frames, description.pipeline.num_joints, people)
        raw = generator.standard_normal(shape).astype(np.float32)
        # Real clips are padded with zeros at the end
        raw[-1, :, (frames + 1) // 2 :] = 0
        clip = description.pipeline(raw)
        with torch.inference_mode():
            expected = model(torch.from_numpy(clip)).numpy()
        answer = session.run([OUTPUT_NAME], {INPUT_NAME: clip})[0]
        rows.append(_compare(list(shape), answer, expected))
    return _judge(rows)


def check_step_parity(network: FoldedNetwork, content: bytes) -> Parity:
    """Compare a file in step form with PyTorch, which sees the whole clip at once. Raises ParityError.

    Answers are compared from the first that does not depend on how the state begins, up to the last that does not
    depend on where the clip ends.
    """
    session = _open(content)
    step = json.loads(session.get_modelmeta().custom_metadata_map[STEP_KEY])
    stride, delay, first = step["total_stride"], step["delay_frames"], step["first_valid_frame"]
    num_frames = first + NUM_STEP_ANSWERS * stride
    shape = (NUM_STEP_PEOPLE, network.num_channels, num_frames, network.num_joints)
    clip = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    answers = _run_steps(session, step, clip)
    with torch.inference_mode():
        features = FoldedModel(network).eval().forward_features(torch.from_numpy(clip).permute(0, 2, 3, 1))
        expected = (
            features.mean(dim=2) @ torch.from_numpy(network.head_weight) + torch.from_numpy(network.head_bias)
        ).numpy()
    rows = []
    for frame, logits in answers.items():
        if frame >= first and frame < num_frames:
            rows.append(_compare([*shape[:2], frame + 1, shape[3]], logits, expected[:, (frame - delay) // stride]))
    if len(rows) != NUM_STEP_ANSWERS:
        raise ParityError(Problem("export", f"{len(rows)} answers of the step form", str(NUM_STEP_ANSWERS)))
    return _judge(rows)


def _run_steps(session: Any, step: dict[str, Any], clip: NDArray[np.float32]) -> dict[int, NDArray[np.float32]]:
    """Number of the frame -> its logits (N, classes), for the frames at which there are new ones."""
    state = {
        entry["input"]: np.full((len(clip), *entry["shape"]), INITIAL[entry["initial"]], np.float32)
        for entry in step["states"]
    }
    names = [LOGITS_NAME, IS_NEW_NAME, *(entry["output"] for entry in step["states"])]
    answers = {}
    for frame in range(clip.shape[2]):
        phase = np.array(frame % step["total_stride"], np.int64)
        logits, is_new, *kept = session.run(names, {FRAME_NAME: clip[:, :, frame], PHASE_NAME: phase, **state})
        state = dict(zip(state, kept, strict=True))
        if is_new:
            answers[frame] = logits
    return answers


def _open(content: bytes) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises a type of its own for each way a file can be wrong
        hint = "Set export.opset_version=17."
        expected = "a file that onnxruntime can open"
        raise ParityError(Problem("export", describe_reason(error), expected, hint)) from None


def _compare(shape: list[int], answer: np.ndarray, expected: np.ndarray) -> dict[str, Any]:
    if answer.shape != expected.shape:
        raise ParityError(Problem("export", f"logits {answer.shape} for clips {shape}", str(expected.shape)))
    difference = float(np.abs(answer - expected).max())
    scale = float(np.abs(expected).max())
    return {"shape": shape, "max_abs_error": difference, "max_relative_error": difference / max(scale, 1e-12)}


def _judge(rows: list[dict[str, Any]]) -> Parity:
    parity = Parity(max(row["max_abs_error"] for row in rows), max(row["max_relative_error"] for row in rows), rows)
    worst = [row for row in rows if not row["max_relative_error"] <= TOLERANCE]
    if worst:
        got = "; ".join(
            f"a relative error of {row['max_relative_error']:.2g} for clips {row['shape']}" for row in worst
        )
        hint = "Nothing was written. Try another export.opset_version."
        raise ParityError(Problem("export", got, f"at most {TOLERANCE:g}", hint))
    return parity
