"""Export in 8 bits: calibration on training clips, and what it costs in accuracy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kinegraph.backends.onnxruntime_backend import open_session
from kinegraph.data.arrays import open_array
from kinegraph.data.checks import check_dataset
from kinegraph.data.pipeline import InputPipeline
from kinegraph.errors import DataError, ParityError, Problem
from kinegraph.model_description import ModelDescription
from kinegraph.models.folded import FoldedNetwork
from kinegraph.onnx_graph import INPUT_NAME, OUTPUT_NAME
from kinegraph.onnx_quantized import write_quantized_form
from kinegraph.quantize import calibrate
from kinegraph.run import Run
from kinegraph.spec import ExportSpec, TestDataSpec
from kinegraph.threads import count_threads

BATCH_SIZE = 16
Array = NDArray[np.float32]


@dataclass(frozen=True)
class Loss:
    """What the answers in 8 bits are worth beside those in float32. Accuracies and changes in percent of the clips."""

    data_path: str
    is_calibration: bool
    num_clips: int
    accuracy_float: float | None
    accuracy_int8: float | None
    changed: float
    max_abs_error: float
    relative_error: float
    """Root mean square of the difference of the logits, relative to that of the logits."""

    @property
    def percent(self) -> float:
        """The loss of accuracy in percentage points; without labels, the clips whose class changes."""
        if self.accuracy_float is None or self.accuracy_int8 is None:
            return self.changed
        return self.accuracy_float - self.accuracy_int8

    @property
    def words(self) -> str:
        """What `percent` is, for messages."""
        if self.accuracy_float is None:
            return f"another class for {self.percent:.2f} percent of the clips (no labels were given)"
        return f"a loss of accuracy of {self.percent:.2f} percent"

    def as_data(self) -> dict[str, Any]:
        return {**asdict(self), "accuracy_loss": self.percent}


@dataclass(frozen=True)
class Clips:
    """Some clips of a file, with their labels where there are any."""

    path: str
    chosen: NDArray[np.int64]
    labels: NDArray[np.int64] | None
    pipeline: InputPipeline

    def read(self) -> Iterator[Array]:
        """Batches as the network takes them."""
        array = open_array(self.path)
        for start in range(0, len(self.chosen), BATCH_SIZE):
            part = self.chosen[start : start + BATCH_SIZE]
            yield self.pipeline(np.asarray(array[part]), f"{self.path}: clips {part[0]} to {part[-1]}")


def convert_to_int8(
    network: FoldedNetwork,
    float_content: bytes,
    description: ModelDescription,
    options: ExportSpec,
    opset_version: int,
    run: Run,
) -> tuple[bytes, Loss]:
    """The content of an ONNX file in 8 bits, and its loss beside `float_content`, the file in float32.

    Raises DataError for data that do not fit the model, ParityError for a loss above export.max_accuracy_loss, unless
    export.force is set.
    """
    calibration = _choose_clips(options.calibration_dataset, description, options.calibration_clips)
    test = calibration
    if options.quantization_test_dataset.data_path:
        test = _choose_clips(options.quantization_test_dataset, description, None)
    run.info(f"Calibrating on {len(calibration.chosen)} clips of {calibration.path}.")
    quantization = calibrate(network, calibration.read())
    content = write_quantized_form(network, quantization, opset_version, description.to_metadata())
    run.info(f"Comparing with float32 on {len(test.chosen)} clips of {test.path}.")
    loss = _measure(float_content, content, test, test is calibration)
    if loss.percent > options.max_accuracy_loss:
        if not options.force:
            hint = (
                "Calibrate on more clips, raise export.max_accuracy_loss or set export.force=true. Nothing was written."
            )
            expected = f"at most {options.max_accuracy_loss:g} percent (export.max_accuracy_loss)"
            raise ParityError(Problem("export.quantize", f"{loss.words} in 8 bits", expected, hint))
        run.warn(f"8 bits give {loss.words}; the file is written because export.force is set.")
    return content, loss


def _choose_clips(options: TestDataSpec, description: ModelDescription, count: int | None) -> Clips:
    """All clips of a data set, or `count` evenly spread ones. Raises DataError where they do not fit the model."""
    pipeline = description.pipeline
    assert pipeline is not None
    label_map = None
    if description.label_map is not None:
        label_map = {name: label for label, name in enumerate(description.class_names)}
    info = check_dataset(
        options.data_path,
        options.label_path or None,
        layout=description.layout,
        num_channels=pipeline.num_channels,
        num_classes=description.num_classes,
        label_map=label_map,
    )
    num_clips = info.shape[0]
    if num_clips == 0:
        raise DataError(Problem(options.data_path, "no clips", "at least one"))
    chosen = np.arange(num_clips)
    if count is not None and count < num_clips:
        chosen = np.linspace(0, num_clips - 1, count).round().astype(np.int64)
    labels = None if info.labels is None else np.asarray(info.labels.labels)[chosen]
    return Clips(options.data_path, chosen, labels, pipeline)


def _measure(float_content: bytes, int8_content: bytes, clips: Clips, is_calibration: bool) -> Loss:
    """Both files answer on the same clips, by onnxruntime."""
    threads = count_threads()
    sessions = [open_session(content, threads, "export") for content in (float_content, int8_content)]
    answers: list[list[Array]] = [[], []]
    for batch in clips.read():
        for session, parts in zip(sessions, answers, strict=True):
            parts.append(session.run([OUTPUT_NAME], {INPUT_NAME: batch})[0])
    expected, got = (np.concatenate(parts) for parts in answers)
    correct_float, correct_int8 = None, None
    if clips.labels is not None:
        correct_float, correct_int8 = (
            100 * float((logits.argmax(1) == clips.labels).mean()) for logits in (expected, got)
        )
    error = np.sqrt(np.mean(np.square(got - expected), dtype=np.float64))
    size = np.sqrt(np.mean(np.square(expected), dtype=np.float64))
    return Loss(
        data_path=clips.path,
        is_calibration=is_calibration,
        num_clips=len(clips.chosen),
        accuracy_float=correct_float,
        accuracy_int8=correct_int8,
        changed=100 * float((expected.argmax(1) != got.argmax(1)).mean()),
        max_abs_error=float(np.abs(got - expected).max()),
        relative_error=float(error / max(size, 1e-12)),
    )
