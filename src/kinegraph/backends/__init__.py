"""What carries a trained network out. One file each; `open_backend` imports the one that is asked for."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from importlib import import_module
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kinegraph.backends.model_file import ModelFile
from kinegraph.errors import CheckpointError, Problem, UserError, look_up
from kinegraph.model_description import ModelDescription
from kinegraph.threads import count_threads


class Backend(Protocol):
    """Computes logits. Construction raises CheckpointError for a file that it cannot carry out."""

    description: ModelDescription

    def compute(self, x: NDArray[np.float32], where: str) -> NDArray[np.float32]:
        """(N, C, T, V, M) -> logits (N, classes), N at least 1. May be called by several threads at once."""
        ...


BACKENDS: dict[str, str] = {
    "torch": "kinegraph.backends.torch_backend:TorchBackend",
    "onnxruntime": "kinegraph.backends.onnxruntime_backend:OnnxruntimeBackend",
    "openvino": "kinegraph.backends.openvino_backend:OpenvinoBackend",
    "tensorrt": "kinegraph.backends.tensorrt_backend:TensorrtBackend",
    "native": "kinegraph.backends.native_backend:NativeBackend",
}
"""name -> class, made from (file, device, threads)."""
ALIASES = {"onnx": "onnxruntime"}
CPU_ONLY = ("onnxruntime", "openvino", "native")


def open_backend(file: ModelFile, name: str, device: str, threads: int) -> Backend:
    """The backend `name` (auto: see `choose_backend`) for a model file.

    device   cpu, cuda, cuda:1, ...; "": the CPU, and for tensorrt the first GPU
    threads  of the CPU; 0: `count_threads` decides

    Raises UserError for an unknown name, a package that is missing or a device that the backend cannot use.
    """
    name = ALIASES.get(name, name)
    if name != "auto":
        look_up(BACKENDS, name, "backend", UserError)
    threads = count_threads(threads)
    if name == "auto":
        name = choose_backend(file, device)
        if name == "native":
            try:
                return _make_backend(file, name, device, threads)
            except CheckpointError:  # larger than the kernels' limits, which the others do not have
                name = "torch" if file.kind == "torch" else "onnxruntime"
    if device not in ("", "cpu") and name in CPU_ONLY:
        raise UserError(Problem("device", repr(device), "cpu", f"The backends {', '.join(CPU_ONLY)} run on the CPU."))
    return _make_backend(file, name, device, threads)


def _make_backend(file: ModelFile, name: str, device: str, threads: int) -> Backend:
    module, _, class_name = BACKENDS[name].partition(":")
    make: Callable[[ModelFile, str, int], Backend] = getattr(import_module(module), class_name)
    return make(file, device, threads)


def choose_backend(file: ModelFile, device: str) -> str:
    """The fastest backend that is installed and supports the model.

    On the CPU our own kernels are fastest, then onnxruntime (docs/runtimes.md has the measurements); a network that
    cannot be folded is left to the program that the file was made for. On a GPU: PyTorch, TensorRT for ONNX files.
    """
    if device not in ("", "cpu"):
        if file.kind == "torch":
            return "torch"
        return "tensorrt" if is_installed("tensorrt") else "onnxruntime"
    if _has_native_kernels() and _can_fold(file) and (file.quantization is None or _has_byte_products()):
        return "native"
    if file.kind == "torch" and not _can_fold(file):
        return "torch"
    return "onnxruntime"


def is_installed(package: str) -> bool:
    """Whether a package can be imported."""
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:
        return False


def _has_native_kernels() -> bool:
    try:
        return bool(import_module("kinegraph.native").is_available())
    except (ImportError, AttributeError):
        return False


def _has_byte_products() -> bool:
    """Whether 8 bits are faster than 32 in our kernels: elsewhere they take longer."""
    return "avx512vnni" in import_module("kinegraph.native").list_instruction_sets()


def _can_fold(file: ModelFile) -> bool:
    """A folded network is read from an ONNX file by the package onnx; a reader without it can still use onnxruntime."""
    if file.kind == "onnx" and not is_installed("onnx"):
        return False
    return file.network is not None
