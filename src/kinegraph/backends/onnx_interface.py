"""Inputs, outputs and metadata of an ONNX model, whoever wrote it, and the clips that it accepts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kinegraph.data.pipeline import InputPipeline
from kinegraph.errors import CheckpointError, DataError, KinegraphError, Problem, describe_reason
from kinegraph.model_description import METADATA_PREFIX, ModelDescription

if TYPE_CHECKING:
    import onnx

AXES = ("clips", "channels", "frames", "joints", "people")
FLOAT = "tensor(float)"
Size = int | str | None
Array = NDArray[np.float32]


@dataclass(frozen=True)
class Tensor:
    """An input or output. Sizes that are not fixed are names or None; `kind` is tensor(float), ..."""

    name: str
    shape: tuple[Size, ...]
    kind: str


@dataclass(frozen=True)
class OnnxInterface:
    """One float32 input (N, C, T, V, M) and logits (N, classes) as the first output."""

    path: str
    given: Tensor
    answer: Tensor
    metadata: Mapping[str, str]

    def describe(self) -> ModelDescription:
        """What the metadata say, or what the shapes tell of a foreign model. Raises CheckpointError."""
        if METADATA_PREFIX + "format_version" in self.metadata:
            return ModelDescription.from_metadata(self.metadata, self.path)
        shape = self.answer.shape
        if len(shape) != 2 or not isinstance(shape[1], int):
            got = f"a first output of shape {list(shape)}"
            raise CheckpointError(Problem(self.path, got, "logits (N, classes) with a fixed number of classes"))
        _, num_channels, _, num_joints, _ = self.given.shape
        pipeline = None
        if isinstance(num_channels, int) and isinstance(num_joints, int):
            pipeline = InputPipeline(num_channels, num_joints)
        return ModelDescription(shape[1], pipeline=pipeline)

    def compute(self, x: Array, where: str, run: Callable[[Array], Array]) -> Array:
        """Logits of clips by `run`. A model with a fixed batch gets its batches filled with zeros.

        Raises DataError where another axis is fixed and differs, CheckpointError for an error of the runtime.
        """
        self._check_fixed_axes(x.shape, where)
        fixed = self.given.shape[0]
        if not isinstance(fixed, int):
            return self._run(x, run)
        parts = []
        for start in range(0, len(x), fixed):
            part = x[start : start + fixed]
            padded = np.zeros((fixed, *x.shape[1:]), np.float32)
            padded[: len(part)] = part
            parts.append(self._run(padded, run)[: len(part)])
        return np.concatenate(parts)

    def _run(self, x: Array, run: Callable[[Array], Array]) -> Array:
        try:
            return np.asarray(run(x), np.float32)
        except KinegraphError:
            raise
        except Exception as error:  # each runtime raises types of its own; a foreign file may promise too many axes
            got = f"an error of the runtime for clips {x.shape} ({describe_reason(error)})"
            raise CheckpointError(Problem(self.path, got, "logits", "Try the shape it was exported with.")) from None

    def _check_fixed_axes(self, shape: tuple[int, ...], where: str) -> None:
        problems = [
            Problem(where, f"{shape[axis]} {AXES[axis]} in shape {shape}", f"{size} {AXES[axis]}, fixed in the model")
            for axis, size in enumerate(self.given.shape)
            if axis and isinstance(size, int) and shape[axis] != size
        ]
        if problems:
            raise DataError(*problems)


def check_interface(
    path: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor], metadata: Mapping[str, str]
) -> OnnxInterface:
    """The interface of a model in clip form. Raises CheckpointError for a model of another kind."""
    if METADATA_PREFIX + "step" in metadata:
        expected, hint = "a model in clip form", "Open it with kinegraph.online, or export with export.form=clip."
        raise CheckpointError(Problem(path, "a model in step form", expected, hint))
    if len(inputs) != 1 or len(inputs[0].shape) != 5 or inputs[0].kind != FLOAT or not outputs:
        got = ", ".join(f"{item.name}: {item.kind} {list(item.shape)}" for item in inputs) or "no input"
        raise CheckpointError(Problem(path, got, "one float32 input (N, C, T, V, M)"))
    return OnnxInterface(path, inputs[0], outputs[0], metadata)


def read_interface(proto: onnx.ModelProto, path: str) -> OnnxInterface:
    """The interface of a model in memory."""
    stored = {tensor.name for tensor in proto.graph.initializer}
    inputs = [_describe(item) for item in proto.graph.input if item.name not in stored]
    outputs = [_describe(item) for item in proto.graph.output]
    return check_interface(path, inputs, outputs, {entry.key: entry.value for entry in proto.metadata_props})


def _describe(item: onnx.ValueInfoProto) -> Tensor:
    own = item.type.tensor_type
    shape: list[Size] = []
    for size in own.shape.dim:
        shape.append(size.dim_value if size.HasField("dim_value") else size.dim_param or None)
    return Tensor(item.name, tuple(shape), FLOAT if own.elem_type == 1 else f"type {own.elem_type}")
