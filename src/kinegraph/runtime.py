"""Trained models that answer: one Predictor over PyTorch checkpoints (.pth) and ONNX files (.onnx).

    predictions = kinegraph.load("model.onnx").predict(clips)
    predictions.class_names, predictions.probabilities

What carries the network out is a backend (backends/). torch is imported only to open a .pth file: an exported model
needs onnxruntime alone.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kinegraph.backends import Backend, open_backend
from kinegraph.backends.model_file import KINDS, ModelFile, find_kind
from kinegraph.calibration import softmax
from kinegraph.data.input_checks import RESAMPLES
from kinegraph.data.pipeline import InputPipeline
from kinegraph.errors import CheckpointError, DataError, Problem, SpecError, UserError
from kinegraph.model_description import METADATA_PREFIX, ModelDescription, describe_checkpoint
from kinegraph.remote import fetch
from kinegraph.skeleton.layouts import Layout

__all__ = [
    "METADATA_PREFIX",
    "UNKNOWN_CLASS",
    "UNKNOWN_LABEL",
    "ModelDescription",
    "Predictions",
    "Predictor",
    "describe_checkpoint",
    "load",
    "softmax",
]

UNKNOWN_CLASS = "unknown"
"""The answer for a clip that is rejected; its label is UNKNOWN_LABEL."""
UNKNOWN_LABEL = -1
KINDS_OF_BACKENDS = {"torch": "torch", "onnx": "onnx", "onnxruntime": "onnx"}


@dataclass(frozen=True, eq=False)
class Predictions:
    """One entry for each clip: the most probable class and its label, and the probabilities of all classes.

    A clip that was rejected has the class name "unknown" and the label -1.
    """

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

    def set_test_clips(self, number: int) -> None:
        """Average each answer over so many differently sampled clips of the sequence, whatever the model's file says.

        Raises SpecError for a model that always takes the same frames.
        """
        pipeline = self.pipeline
        options = pipeline.options if pipeline else None
        if number > 1 and (options is None or options.sampling not in RESAMPLES):
            sampling = options.sampling if options else "none"
            expected = f"1: {self.path} was trained with sampling {sampling}, which always takes the same frames"
            raise SpecError(Problem("input.test_clips", str(number), expected))
        if pipeline is not None and options is not None:
            changed = replace(pipeline, options=replace(options, test_clips=number))
            self.description = replace(self.description, pipeline=changed)

    def logits(self, array: NDArray[Any], batch_size: int = 64, where: str = "input") -> NDArray[np.float32]:
        """(N, C, T, V, M), or one clip (C, T, V, M) -> logits (N, classes) float32; no clips give no rows.

        With input.test_clips above 1 they are the logarithms of the mean probabilities. The temperature of the model
        is not in them: `decide` applies it.

        Raises DataError for arrays that do not fit the model, and for NaN or infinity in them.
        """
        if batch_size < 1:
            raise UserError(Problem("batch_size", str(batch_size), "at least 1"))
        x = self._add_axis(np.asarray(array), where)
        parts = [np.zeros((0, self.num_classes), np.float32)]
        for start in range(0, len(x), batch_size):
            part = x[start : start + batch_size]
            place = where if len(x) <= batch_size else f"{where}, clips from {start}"
            parts.append(self._compute(part, place))
        if len(x) == 0 and self.pipeline is not None:
            self.pipeline(x, where)
        logits = np.concatenate(parts)
        if not np.isfinite(logits).all():
            got = "logits that are NaN or infinite"
            raise CheckpointError(
                Problem(self.path, got, "finite logits", "Its weights may come from a failed training.")
            )
        return logits

    def predict(self, array: NDArray[Any], batch_size: int = 64, reject_threshold: float = 0.0) -> Predictions:
        """Classify clips (N, C, T, V, M), or one clip (C, T, V, M), as `decide` does. Raises as `logits`."""
        return self.decide(self.logits(array, batch_size), reject_threshold)

    def decide(self, logits: NDArray[Any], reject_threshold: float = 0.0) -> Predictions:
        """Logits (N, classes) -> the classes they stand for, and the calibrated probabilities.

        Clips whose highest probability is below reject_threshold are unknown. UserError for one outside 0 to 1.
        """
        if not 0 <= reject_threshold <= 1:
            raise UserError(Problem("reject_threshold", f"{reject_threshold}", "a probability from 0 to 1"))
        labels = np.argmax(logits, axis=1).astype(np.int64)
        probabilities = softmax(logits, self.description.temperature)
        labels[probabilities.max(axis=1, initial=0.0) < reject_threshold] = UNKNOWN_LABEL
        names = [UNKNOWN_CLASS if label == UNKNOWN_LABEL else self.class_names[label] for label in labels.tolist()]
        return Predictions(names, labels, probabilities)

    def _compute(self, clips: NDArray[Any], where: str) -> NDArray[np.float32]:
        """The logits of one batch: of the test clips of each sequence, the logarithms of their mean probabilities."""
        pipeline = self.pipeline or _take_as_is(clips)
        answers = []
        for test_clips in pipeline.make_test_clips(clips, where):
            answers.append(self.backend.compute(test_clips, where))
            if answers[-1].shape != (len(clips), self.num_classes):
                got = f"logits of shape {answers[-1].shape} for {len(clips)} clips"
                raise CheckpointError(Problem(self.path, got, f"{(len(clips), self.num_classes)}"))
        if len(answers) == 1:
            return answers[0]
        total = np.logaddexp.reduce([_compute_log_probabilities(logits) for logits in answers])
        return np.asarray(total - math.log(len(answers)), np.float32)

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


def _compute_log_probabilities(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Logits (N, classes) -> logarithms of their probabilities, uncalibrated."""
    values = np.asarray(logits, np.float64)
    values = values - values.max(axis=1, keepdims=True, initial=-np.inf)
    return np.asarray(values - np.log(np.exp(values).sum(axis=1, keepdims=True)))


def load(path: str | Path, backend: str = "auto", key: str = "", device: str = "", threads: int = 0) -> Predictor:
    """Open a trained model: a .pth file of Kinegraph or TAO, or an .onnx file; also at an s3:// or other URI.

    backend   torch, onnxruntime (or onnx, as it was called), openvino, tensorrt, native; auto: the fastest that is
              installed and can carry the model out
    key       of an encrypted checkpoint; default: the environment variable KINEGRAPH_ENCRYPTION_KEY
    device    cpu, or cuda, cuda:1, ... for torch and tensorrt; default: the CPU, for tensorrt the first GPU
    threads   of the CPU; 0: the cores that this process may use

    Raises CheckpointError for a file that cannot be read, UserError for the rest.
    """
    path = fetch(path)
    return Predictor(str(path), open_backend(open_model_file(path, backend, key), backend, device, threads))


def open_model_file(path: Path, backend: str = "auto", key: str = "") -> ModelFile:
    """A local model file of the kind that its ending says, or where that says nothing, that `backend` was made for."""
    kind = KINDS_OF_BACKENDS.get(backend)
    if kind is None or path.suffix.lower() in KINDS:
        kind = find_kind(path)
    return ModelFile(path, kind, key or os.environ.get("KINEGRAPH_ENCRYPTION_KEY", ""))
