"""ONNX models, and networks that can be folded, run by TensorRT on an NVIDIA GPU (pip install kinegraph[tensorrt]).

Written against TensorRT 10 (ICudaEngine with named tensors, execute_async_v3). Memory and streams are PyTorch's.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kinegraph.backends import is_installed
from kinegraph.backends.model_file import ModelFile
from kinegraph.backends.onnx_interface import read_interface
from kinegraph.errors import CheckpointError, Problem, UserError

MAX_CLIPS = 64
"""Engines are built for batches up to this one, or the first one if that is larger."""


class TensorrtBackend:
    """In float32. An engine is built at the first clip, and again for one larger than it was built for."""

    def __init__(self, file: ModelFile, device: str, threads: int) -> None:
        if not is_installed("tensorrt"):
            hint = "pip install 'kinegraph[tensorrt]'"
            raise UserError(Problem("backend", "'tensorrt'", "a package that is installed", hint))
        import onnx
        import torch

        if device == "cpu" or not torch.cuda.is_available():
            got = repr(device) if device == "cpu" else "no GPU that PyTorch finds"
            hint = "TensorRT needs PyTorch with CUDA; on the CPU use another backend."
            raise UserError(Problem("device", got, "an NVIDIA GPU", hint))
        self.device = torch.device(device or "cuda")
        self.path = str(file.path)
        self.content = file.make_onnx("tensorrt")
        proto = file.proto if file.kind == "onnx" else onnx.ModelProto.FromString(self.content)
        self.interface = read_interface(proto, self.path)
        self.description = file.description
        self.largest: tuple[int, ...] = ()
        self.engine: Any = None
        self.context: Any = None
        self.lock = threading.Lock()

    def compute(self, x: NDArray[np.float32], where: str) -> NDArray[np.float32]:
        """(N, C, T, V, M) -> logits (N, classes)."""
        with self.lock:
            return self.interface.compute(x, where, self._run)

    def _run(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        import torch

        if self.engine is None or any(size > limit for size, limit in zip(x.shape, self.largest, strict=True)):
            grown = (max(sizes) for sizes in zip(x.shape, self.largest or x.shape, strict=True))
            self._build(tuple(grown), x.shape)
        with torch.cuda.device(self.device):
            clips = torch.from_numpy(np.ascontiguousarray(x)).to(self.device)
            self.context.set_input_shape(self.interface.given.name, tuple(x.shape))
            shape = tuple(self.context.get_tensor_shape(self.interface.answer.name))
            logits = torch.empty(shape, dtype=torch.float32, device=self.device)
            self.context.set_tensor_address(self.interface.given.name, clips.data_ptr())
            self.context.set_tensor_address(self.interface.answer.name, logits.data_ptr())
            stream = torch.cuda.current_stream()
            if not self.context.execute_async_v3(stream.cuda_stream):
                raise RuntimeError("TensorRT could not run the engine")
            stream.synchronize()
        return np.asarray(logits.cpu().numpy())

    def _build(self, largest: tuple[int, ...], usual: tuple[int, ...]) -> None:
        """An engine for clips up to `largest`, tuned for `usual`."""
        import tensorrt
        import torch

        logger = tensorrt.Logger(tensorrt.Logger.ERROR)
        with torch.cuda.device(self.device):
            builder = tensorrt.Builder(logger)
            network = builder.create_network(0)
            parser = tensorrt.OnnxParser(network, logger)
            if not parser.parse(self.content):
                reason = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))[:200]
                got = f"a file that TensorRT cannot read ({reason})"
                hint = "Use the backend onnxruntime."
                raise CheckpointError(Problem(self.path, got, "an ONNX model", hint))
            fixed = self.interface.given.shape
            self.largest = tuple(
                size if isinstance(size, int) else max(limit, MAX_CLIPS if axis == 0 else 1)
                for axis, (size, limit) in enumerate(zip(fixed, largest, strict=True))
            )
            smallest = tuple(
                size if isinstance(size, int) else (1 if axis in (0, 2, 4) else self.largest[axis])
                for axis, size in enumerate(fixed)
            )
            config = builder.create_builder_config()
            config.clear_flag(tensorrt.BuilderFlag.TF32)  # rounds to 10 bits: a GPU is to answer as the CPU does
            profile = builder.create_optimization_profile()
            profile.set_shape(self.interface.given.name, smallest, usual, self.largest)
            config.add_optimization_profile(profile)
            plan = builder.build_serialized_network(network, config)
            if plan is None:
                raise RuntimeError("TensorRT could not build an engine")
            self.engine = tensorrt.Runtime(logger).deserialize_cuda_engine(plan)
            self.context = self.engine.create_execution_context()
