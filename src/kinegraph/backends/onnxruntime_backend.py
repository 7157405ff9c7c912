"""ONNX models, and networks that can be folded, run by onnxruntime on the CPU. Needs neither torch nor onnx."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kinegraph.backends.model_file import ModelFile
from kinegraph.backends.onnx_interface import Tensor, check_interface
from kinegraph.errors import CheckpointError, Problem, describe_reason


class OnnxruntimeBackend:
    """What a session says about a model is believed: it is what runs."""

    def __init__(self, file: ModelFile, device: str, threads: int) -> None:
        path = str(file.path)
        self.session = open_session(file.path if file.kind == "onnx" else file.make_onnx("onnxruntime"), threads, path)
        inputs = [Tensor(item.name, tuple(item.shape), item.type) for item in self.session.get_inputs()]
        outputs = [Tensor(item.name, tuple(item.shape), item.type) for item in self.session.get_outputs()]
        self.interface = check_interface(path, inputs, outputs, self.session.get_modelmeta().custom_metadata_map)
        self.description = self.interface.describe() if file.kind == "onnx" else file.description

    def compute(self, x: NDArray[np.float32], where: str) -> NDArray[np.float32]:
        """(N, C, T, V, M) -> logits (N, classes)."""
        return self.interface.compute(x, where, self._run)

    def _run(self, x: NDArray[np.float32]) -> Any:
        return self.session.run([self.interface.answer.name], {self.interface.given.name: x})[0]


def open_session(model: Path | bytes, threads: int, where: str) -> Any:
    """A session of onnxruntime on the CPU, which says nothing. Raises CheckpointError for a model it cannot read."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    try:
        content = model if isinstance(model, bytes) else str(model)
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises a type of its own for each way a file can be wrong
        hint = "The file may be cut or damaged: copy or export it again."
        got = f"a file that cannot be read ({describe_reason(error)})"
        raise CheckpointError(Problem(where, got, "an ONNX model", hint)) from None
