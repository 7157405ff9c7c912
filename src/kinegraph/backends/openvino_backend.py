"""ONNX models, and networks that can be folded, run by OpenVINO on the CPU (pip install kinegraph[openvino])."""

from __future__ import annotations

import functools
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kinegraph.backends import is_installed
from kinegraph.backends.model_file import ModelFile
from kinegraph.backends.onnx_interface import read_interface
from kinegraph.errors import CheckpointError, Problem, UserError, describe_reason

_LOADING = threading.Lock()


@functools.cache
def _get_core() -> Any:
    """One for the whole process, never freed. Its CPU plugin gives the thread that loads it another signal stack, and
    unmaps it when it is freed, also where another thread frees it: the next signal then ends the process."""
    import openvino

    return openvino.Core()


class OpenvinoBackend:
    """In float32: on processors with bfloat16 OpenVINO would else round to 8 bits."""

    def __init__(self, file: ModelFile, device: str, threads: int) -> None:
        if not is_installed("openvino"):
            hint = "pip install 'kinegraph[openvino]'"
            raise UserError(Problem("backend", "'openvino'", "a package that is installed", hint))
        import onnx

        content = file.make_onnx("openvino")
        proto = file.proto if file.kind == "onnx" else onnx.ModelProto.FromString(content)
        self.interface = read_interface(proto, str(file.path))
        self.description = file.description
        options: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
        }
        with _LOADING:
            core = _get_core()
        try:
            self.model = core.compile_model(core.read_model(content), "CPU", options)
        except RuntimeError as error:
            got = f"a file that OpenVINO cannot read ({describe_reason(error)})"
            raise CheckpointError(
                Problem(str(file.path), got, "an ONNX model", "Use the backend onnxruntime.")
            ) from None
        self.request = self.model.create_infer_request()
        self.lock = threading.Lock()

    def compute(self, x: NDArray[np.float32], where: str) -> NDArray[np.float32]:
        """(N, C, T, V, M) -> logits (N, classes)."""
        return self.interface.compute(x, where, self._run)

    def _run(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        # A request holds its tensors: the next answer would overwrite this one
        with self.lock:
            self.request.infer({0: x})
            return np.array(self.request.get_output_tensor(0).data)
