"""A network in step form as an ONNX file (`export.form: step`), carried out by onnxruntime, without torch.

The names of its inputs, outputs and states stand here, for who writes such files and who reads them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kinegraph.backends.onnxruntime_backend import open_session
from kinegraph.errors import CheckpointError, Problem, describe_reason
from kinegraph.model_description import ModelDescription
from kinegraph.whole_numbers import check_whole_number

STEP_KEY = "kinegraph.step"
STEP_VERSION = 1
FRAME_NAME, PHASE_NAME, LOGITS_NAME, IS_NEW_NAME = "frame", "phase", "logits", "is_new"
STATE, NEW_STATE = "state.", "new_state."
INITIAL = {"zero": 0.0, "minus_infinity": -np.inf}
MAX_FRAMES = 100_000
MAX_STATE_VALUES = 2_000_000

Array = NDArray[np.float32]
Memory = dict[str, Array]


class OnnxSteps:
    """Raises CheckpointError for a file that is not in step form, or does not say what Kinegraph writes."""

    pools_itself = False
    takes_raw_frames = False

    def __init__(self, path: Path, threads: int) -> None:
        self.path = str(path)
        self.session = open_session(path, threads, self.path)
        metadata = self.session.get_modelmeta().custom_metadata_map
        try:
            self._read(metadata)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            got = f"damaged metadata {STEP_KEY} ({type(error).__name__}: {error})"
            raise CheckpointError(Problem(self.path, got, "what Kinegraph writes", "Export it again.")) from None
        self.description = ModelDescription.from_metadata(metadata, self.path)
        self.num_classes = self.description.num_classes

    def _read(self, metadata: Mapping[str, str]) -> None:
        step = json.loads(metadata[STEP_KEY])
        if step["version"] != STEP_VERSION:
            raise ValueError(f"version {step['version']!r}")
        self.total_stride = check_whole_number(step["total_stride"], "total_stride", 1, MAX_FRAMES)
        self.delay_frames = check_whole_number(step["delay_frames"], "delay_frames", 0, MAX_FRAMES)
        self.first_valid_frame = check_whole_number(step["first_valid_frame"], "first_valid_frame", 0, MAX_FRAMES)
        self.states: dict[str, tuple[tuple[int, ...], float]] = {}
        values = 0
        for state in step["states"]:
            shape = tuple(check_whole_number(size, "a size of a state", 1, MAX_FRAMES) for size in state["shape"])
            name = state["input"].removeprefix(STATE)
            if state["input"] != STATE + name or state["output"] != NEW_STATE + name:
                raise ValueError(f"a state {state['input']!r}")
            values += int(np.prod(shape, dtype=np.float64))
            self.states[name] = shape, INITIAL[state["initial"]]
        if values > MAX_STATE_VALUES:
            raise ValueError(f"{values} values of state for each person")
        given = {item.name for item in self.session.get_inputs()}
        if given != {FRAME_NAME, PHASE_NAME, *(STATE + name for name in self.states)}:
            raise ValueError(f"the inputs {sorted(given)[:5]}")

    def start(self, num_people: int) -> Memory:
        """The memory before the first frame."""
        return {
            name: np.full((num_people, *shape), initial, np.float32) for name, (shape, initial) in self.states.items()
        }

    def step(self, frame: Array, phase: int, memory: Memory) -> tuple[Array | None, Memory]:
        """frame (N, C, V), phase modulo total_stride -> logits (N, classes), or None at frames without; new memory."""
        feed: dict[str, Any] = {STATE + name: memory[name] for name in self.states}
        feed |= {FRAME_NAME: np.ascontiguousarray(frame, np.float32), PHASE_NAME: np.array(phase, np.int64)}
        names = [LOGITS_NAME, IS_NEW_NAME, *(NEW_STATE + name for name in self.states)]
        try:
            logits, is_new, *states = self.session.run(names, feed)
        except Exception as error:  # onnxruntime raises types of its own
            got = f"an error of onnxruntime ({describe_reason(error)})"
            raise CheckpointError(Problem(self.path, got, "a step")) from None
        return (logits if is_new else None), dict(zip(self.states, states, strict=True))


def is_step_form(metadata: Mapping[str, str]) -> bool:
    """Whether an ONNX file with these metadata is in step form."""
    return STEP_KEY in metadata
