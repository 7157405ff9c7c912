"""Trained models that answer: one Predictor over PyTorch checkpoints (.pth) and ONNX files (.onnx).

    predictions = kinegraph.load("model.onnx").predict(clips)
    predictions.class_names, predictions.probabilities

torch is imported only to open a .pth file: an exported model needs onnxruntime alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kinegraph.data.pipeline import InputPipeline
from kinegraph.errors import CheckpointError, DataError, Problem, UserError, look_up
from kinegraph.remote import fetch
from kinegraph.skeleton.layouts import Layout
from kinegraph.storage import dump_json

if TYPE_CHECKING:
    from kinegraph.models.checkpoint import Checkpoint

METADATA_PREFIX = "kinegraph."
METADATA_VERSION = 1
MAX_CLASSES = 1_000_000
SUFFIXES = {".pth": "torch", ".pt": "torch", ".ckpt": "torch", ".tlt": "torch", ".onnx": "onnx"}


@dataclass(frozen=True)
class ModelDescription:
    """What a model file says about itself. `layout`, `label_map` and `pipeline` are None where a foreign file does not.

    `metadata` holds plain data: `model` (its options), `model_name`, `metrics` and `versions`; empty for foreign ONNX.
    """

    num_classes: int
    label_map: dict[str, int] | None = None
    layout: Layout | None = None
    pipeline: InputPipeline | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def class_names(self) -> list[str]:
        """Names in label order; class_0, class_1, ... where there are none."""
        names = {label: name for name, label in (self.label_map or {}).items()}
        return [names.get(label, f"class_{label}") for label in range(self.num_classes)]

    def to_metadata(self) -> dict[str, str]:
        """The description as strict JSON strings, for the metadata of an ONNX file."""
        values = {
            "format_version": METADATA_VERSION,
            "num_classes": self.num_classes,
            "class_names": self.class_names,
            "label_map": self.label_map,
            "layout": self.layout.to_dict() if self.layout else None,
            "pipeline": self.pipeline.to_dict() if self.pipeline else None,
            **self.metadata,
        }
        return {METADATA_PREFIX + key: dump_json(value) for key, value in values.items()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], where: str) -> ModelDescription:
        """The opposite of `to_metadata`. Raises CheckpointError for what it would not have written."""
        try:
            own = {
                key.removeprefix(METADATA_PREFIX): json.loads(value)
                for key, value in metadata.items()
                if key.startswith(METADATA_PREFIX)
            }
            version = own.pop("format_version")
            if version != METADATA_VERSION:
                hint = "Update Kinegraph."
                raise CheckpointError(Problem(where, f"metadata version {version!r}", str(METADATA_VERSION), hint))
            own.pop("class_names", None)
            description = cls(
                _check_count(own.pop("num_classes")),
                _check_label_map(own.pop("label_map", None)),
                None if own.get("layout") is None else Layout.from_dict(own["layout"], f"{where}: layout"),
                None if own.get("pipeline") is None else InputPipeline.from_dict(own["pipeline"], f"{where}: pipeline"),
                {key: value for key, value in own.items() if key not in ("layout", "pipeline")},
            )
        except (KeyError, TypeError, ValueError, RecursionError, DataError) as error:
            got = f"damaged metadata ({type(error).__name__}: {error})"
            raise CheckpointError(
                Problem(where, got, "the entries that Kinegraph writes", "Export it again.")
            ) from None
        return description


def _check_count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_CLASSES:
        raise ValueError(f"{value!r} classes")
    return value


def _check_label_map(value: Any) -> dict[str, int] | None:
    if value is not None and not (isinstance(value, dict) and all(type(label) is int for label in value.values())):
        raise TypeError("a label map that is not name -> number")
    return value


def describe_checkpoint(checkpoint: Checkpoint, where: str) -> ModelDescription:
    """What a .pth file says about its model. Raises DataError for an input pipeline that this version lacks."""
    options = asdict(checkpoint.options)
    options.pop("pretrained_model_path")
    if checkpoint.pipeline is None:
        pipeline = InputPipeline(checkpoint.options.input_channels, checkpoint.layout.num_joints)
    else:
        pipeline = InputPipeline.from_dict(checkpoint.pipeline, f"{where}: input pipeline")
    metadata = {
        "model": options,
        "model_name": checkpoint.spec.get("model_name", ""),
        "metrics": checkpoint.metrics,
        "versions": checkpoint.versions,
    }
    return ModelDescription(checkpoint.num_classes, checkpoint.label_map, checkpoint.layout, pipeline, metadata)


class Backend(Protocol):
    """Computes logits. Construction reads the file and raises CheckpointError where it cannot."""

    description: ModelDescription

    def compute(self, x: NDArray[np.float32], where: str) -> NDArray[np.float32]:
        """(N, C, T, V, M) -> logits (N, classes), N at least 1."""
        ...


class TorchBackend:
    """A checkpoint of Kinegraph or TAO, run by PyTorch."""

    def __init__(self, path: Path, key: str, device: str) -> None:
        import torch

        from kinegraph.models.checkpoint import build_from_checkpoint, read_checkpoint

        if device != "cpu" and not torch.cuda.is_available():
            raise UserError(Problem("device", repr(device), "cpu", "PyTorch finds no GPU here."))
        checkpoint = read_checkpoint(path, key)
        self.description = describe_checkpoint(checkpoint, str(path))
        self.device = torch.device(device)
        self.model = build_from_checkpoint(checkpoint, str(path)).to(self.device)

    def compute(self, x: NDArray[np.float32], where: str) -> NDArray[np.float32]:
        """(N, C, T, V, M) -> logits (N, classes)."""
        import torch

        clips = torch.from_numpy(x if x.flags.writeable else x.copy())
        # cuDNN would round the inputs of float32 convolutions to 10 bits; a GPU is to answer as the CPU does
        exact = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
        with torch.inference_mode(), exact:
            logits = self.model(clips.to(self.device))
        return np.asarray(logits.float().cpu().numpy())


class OnnxBackend:
    """An ONNX file with one input (N, C, T, V, M) and logits (N, classes) as its first output, run by onnxruntime."""

    def __init__(self, path: Path, key: str, device: str) -> None:
        if device != "cpu":
            raise UserError(Problem("device", repr(device), "cpu", "ONNX models run on the CPU."))
        self.path = str(path)
        self.session = _open_session(path)
        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        if len(inputs) != 1 or len(inputs[0].shape) != 5 or inputs[0].type != "tensor(float)":
            got = ", ".join(f"{item.name}: {item.type} {item.shape}" for item in inputs) or "no input"
            raise CheckpointError(Problem(str(path), got, "one float32 input (N, C, T, V, M)"))
        self.input_name, self.input_shape = inputs[0].name, inputs[0].shape
        self.output_name, output_shape = outputs[0].name, outputs[0].shape
        metadata = self.session.get_modelmeta().custom_metadata_map
        if METADATA_PREFIX + "format_version" in metadata:
            self.description = ModelDescription.from_metadata(metadata, str(path))
        else:
            self.description = _describe_foreign(self.input_shape, output_shape, str(path))

    def compute(self, x: NDArray[np.float32], where: str) -> NDArray[np.float32]:
        """(N, C, T, V, M) -> logits (N, classes). A model with a fixed batch gets its batches filled with zeros."""
        self._check_fixed_axes(x.shape, where)
        fixed = self.input_shape[0]
        if not isinstance(fixed, int):
            return self._run(x)
        parts = []
        for start in range(0, len(x), fixed):
            part = x[start : start + fixed]
            padded = np.zeros((fixed, *x.shape[1:]), np.float32)
            padded[: len(part)] = part
            parts.append(self._run(padded)[: len(part)])
        return np.concatenate(parts)

    def _run(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        try:
            logits = self.session.run([self.output_name], {self.input_name: x})[0]
        except Exception as error:  # a foreign file may promise axes that its operators cannot keep
            reason = " ".join(str(error).split())[:200]
            got = f"an error of onnxruntime for clips {x.shape} ({reason})"
            raise CheckpointError(Problem(self.path, got, "logits", "Try the shape it was exported with.")) from None
        return np.asarray(logits, np.float32)

    def _check_fixed_axes(self, shape: tuple[int, ...], where: str) -> None:
        names = ("clips", "channels", "frames", "joints", "people")
        problems = [
            Problem(
                where,
                f"{shape[axis]} {names[axis]} in shape {shape}",
                f"{size} {names[axis]}, fixed in the model",
            )
            for axis, size in enumerate(self.input_shape)
            if axis and isinstance(size, int) and shape[axis] != size
        ]
        if problems:
            raise DataError(*problems)


def _open_session(path: Path) -> Any:
    import onnxruntime

    if not path.is_file():
        got = "a folder" if path.is_dir() else "no such file"
        raise CheckpointError(Problem(str(path), got, "an ONNX file", "Check the path."))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises a type of its own for each way a file can be wrong
        reason = " ".join(str(error).split())[:200]
        hint = "The file may be cut or damaged: copy or export it again."
        raise CheckpointError(
            Problem(str(path), f"a file that cannot be read ({reason})", "an ONNX model", hint)
        ) from None


def _describe_foreign(input_shape: list[Any], output_shape: list[Any], where: str) -> ModelDescription:
    if len(output_shape) != 2 or not isinstance(output_shape[1], int):
        got = f"a first output of shape {output_shape}"
        raise CheckpointError(Problem(where, got, "logits (N, classes) with a fixed number of classes"))
    _, num_channels, _, num_joints, _ = input_shape
    pipeline = None
    if isinstance(num_channels, int) and isinstance(num_joints, int):
        pipeline = InputPipeline(num_channels, num_joints)
    return ModelDescription(output_shape[1], pipeline=pipeline)


BACKENDS: dict[str, Callable[[Path, str, str], Backend]] = {"torch": TorchBackend, "onnx": OnnxBackend}


@dataclass(frozen=True, eq=False)
class Predictions:
    """One entry for each clip: the most probable class and its label, and the probabilities of all classes."""

    class_names: list[str]
    labels: NDArray[np.int64]
    """(N,)"""
    probabilities: NDArray[np.float64]
    """(N, classes), each row adds up to 1."""


class Predictor:
    """A trained model with its input pipeline and class names. Made by `load`."""

    def __init__(self, path: str, backend: Backend) -> None:
        self.path = path
        self.backend = backend
        self.description = backend.description
        self.label_map = self.description.label_map
        self.class_names = self.description.class_names

    @property
    def num_classes(self) -> int:
        return self.description.num_classes

    @property
    def layout(self) -> Layout | None:
        return self.description.layout

    @property
    def pipeline(self) -> InputPipeline | None:
        return self.description.pipeline

    @property
    def metadata(self) -> dict[str, Any]:
        return self.description.metadata

    def name_classes(self, label_map: Mapping[str, int]) -> None:
        """Name the classes of a model whose file holds no names. The labels must be 0, 1, ... one for each class."""
        if sorted(label_map.values()) != list(range(self.num_classes)):
            expected = (
                f"the labels 0 to {self.num_classes - 1}, each once, as {self.path} has {self.num_classes} classes"
            )
            raise UserError(Problem("label map", f"the labels {sorted(label_map.values())}", expected))
        self.label_map = dict(label_map)
        self.class_names = sorted(label_map, key=lambda name: label_map[name])

    def logits(self, array: NDArray[Any], batch_size: int = 64, where: str = "input") -> NDArray[np.float32]:
        """(N, C, T, V, M), or one clip (C, T, V, M) -> logits (N, classes) float32; no clips give no rows.

        Raises DataError for arrays that do not fit the model, and for NaN or infinity in them.
        """
        if batch_size < 1:
            raise UserError(Problem("batch_size", str(batch_size), "at least 1"))
        x = self._add_axis(np.asarray(array), where)
        parts = [np.zeros((0, self.num_classes), np.float32)]
        for start in range(0, len(x), batch_size):
            part = x[start : start + batch_size]
            place = where if len(x) <= batch_size else f"{where}, clips from {start}"
            pipeline = self.pipeline or _take_as_is(part)
            parts.append(self.backend.compute(pipeline(part, place), place))
            if parts[-1].shape != (len(part), self.num_classes):
                got = f"logits of shape {parts[-1].shape} for {len(part)} clips"
                raise CheckpointError(Problem(self.path, got, f"{(len(part), self.num_classes)}"))
        if len(x) == 0 and self.pipeline is not None:
            self.pipeline(x, where)
        logits = np.concatenate(parts)
        if not np.isfinite(logits).all():
            got = "logits that are NaN or infinite"
            raise CheckpointError(
                Problem(self.path, got, "finite logits", "Its weights may come from a failed training.")
            )
        return logits

    def predict(self, array: NDArray[Any], batch_size: int = 64) -> Predictions:
        """Classify clips (N, C, T, V, M), or one clip (C, T, V, M). Raises as `logits`."""
        return self.decide(self.logits(array, batch_size))

    def decide(self, logits: NDArray[Any]) -> Predictions:
        """Logits (N, classes) -> the classes they stand for."""
        labels = np.argmax(logits, axis=1).astype(np.int64)
        names = [self.class_names[label] for label in labels.tolist()]
        return Predictions(names, labels, softmax(logits))

    def _add_axis(self, x: NDArray[Any], where: str) -> NDArray[Any]:
        if x.ndim != 4:
            return x if x.ndim == 5 else _refuse_axes(x, where)
        pipeline = self.pipeline
        if pipeline and x.shape[0] != pipeline.num_channels and x.shape[1] == pipeline.num_channels:
            got = f"4 axes, shape {x.shape}"
            hint = "For clips of one person add the axis of people: x[..., numpy.newaxis]."
            raise DataError(Problem(where, got, "clips (N, C, T, V, M), or one clip (C, T, V, M)", hint))
        return x[np.newaxis]


def _refuse_axes(x: NDArray[Any], where: str) -> NDArray[Any]:
    expected = "clips (N, C, T, V, M), or one clip (C, T, V, M)"
    raise DataError(Problem(where, f"{x.ndim} axes, shape {x.shape}", expected))


def _take_as_is(x: NDArray[Any]) -> InputPipeline:
    """The checks for a model that does not say what it was trained with: any channels and joints."""
    return InputPipeline(x.shape[1], x.shape[3])


def softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    """(N, classes) -> probabilities (N, classes), in float64 and without overflow."""
    values = np.asarray(logits, np.float64)
    powers = np.exp(values - values.max(axis=1, keepdims=True, initial=-np.inf))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def load(path: str | Path, backend: str = "auto", key: str = "", device: str = "cpu") -> Predictor:
    """Open a trained model: a .pth file of Kinegraph or TAO, or an .onnx file; also at an s3:// or other URI.

    backend   torch, onnx, or auto: by the ending of the name
    key       of an encrypted checkpoint; default: the environment variable KINEGRAPH_ENCRYPTION_KEY
    device    cpu, or cuda, cuda:1, ... for .pth

    Raises CheckpointError for a file that cannot be read, UserError for the rest.
    """
    path = fetch(path)
    if backend == "auto":
        backend = look_up(SUFFIXES, path.suffix.lower(), f"{path}: ending", CheckpointError)
    open_backend = look_up(BACKENDS, backend, "backend", UserError)
    key = key or os.environ.get("KINEGRAPH_ENCRYPTION_KEY", "")
    return Predictor(str(path), open_backend(path, key, device))
