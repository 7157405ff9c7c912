"""The export action: a checkpoint becomes one ONNX file that says all that inference needs, checked against PyTorch.

Input `input` (batch, C, frames, V, people), output `fc_pred` (batch, classes), logits; batch, frames and people are
dynamic. The weights are inside the file (protobuf allows 2 GB; ST-GCN has 12 MB).
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn

from kinegraph.errors import KinegraphError, ParityError, Problem, SpecError, UserError
from kinegraph.models.checkpoint import build_from_checkpoint, read_checkpoint
from kinegraph.models.encryption import is_encrypted
from kinegraph.predict import check_agreement, join_lines
from kinegraph.run import Result, Run, find_encryption_key
from kinegraph.runtime import ModelDescription, describe_checkpoint
from kinegraph.spec import Spec
from kinegraph.storage import make_folder, write_atomically, write_json

INPUT_NAME = "input"
OUTPUT_NAME = "fc_pred"
LABELS_NAME = "labels.txt"
MIN_OPSET = 18
TOLERANCE = 1e-4
SAMPLE_SHAPE = (2, 30, 2)
PARITY_SHAPES = ((1, 1, 1), (3, 7, 1), (2, 30, 2), (1, 64, 2), (1, 300, 1))
"""(clips, frames, people). Odd and even lengths, shorter than the kernel and the length of TAO's clips."""


@dataclass(frozen=True)
class Parity:
    """The largest differences between onnxruntime and PyTorch; relative to the largest logit of the same shape."""

    max_abs_error: float
    max_relative_error: float
    shapes: list[dict[str, Any]]


def export(spec: Spec, run: Run) -> Result:
    """Write export.checkpoint as ONNX, with labels.txt beside it and export.json in the results folder.

    Raises UserError if a file is in the way and export.overwrite is false, ParityError if onnxruntime answers otherwise
    than PyTorch: then no file is written.
    """
    source = Path(spec.export.checkpoint)
    target = find_target(spec)
    if source.suffix.lower() == ".onnx":
        raise SpecError(Problem("export.checkpoint", repr(str(source)), "a .pth file", "It is ONNX already."))
    _check_opset(spec.export.opset_version)
    checkpoint = read_checkpoint(source, find_encryption_key(spec))
    description = describe_checkpoint(checkpoint, str(source))
    label_map = check_agreement(spec, run, description, str(source))
    description = _complete(description, label_map, spec)
    labels = "".join(join_lines(description.class_names))
    _refuse_overwrite(target, labels, spec.export.overwrite)
    model = build_from_checkpoint(checkpoint, str(source))
    make_folder(target.parent)
    run.write_experiment()
    _notify(spec, run, source)
    run.info(f"Exporting {source} with operator set {spec.export.opset_version}.")
    content = convert(model, description, spec.export.opset_version)
    run.info(f"Comparing with PyTorch on {len(PARITY_SHAPES)} shapes.")
    parity = check_parity(model, content, description)
    files = {
        "onnx": str(target),
        "labels": str(target.with_name(LABELS_NAME)),
        "export": str(run.folder / "export.json"),
    }
    with write_atomically(files["labels"], "w") as file:
        file.write(labels)
    with write_atomically(target) as file:
        file.write(content)
    metrics = {
        "max_abs_error": parity.max_abs_error,
        "max_relative_error": parity.max_relative_error,
        "opset_version": spec.export.opset_version,
        "size_bytes": len(content),
    }
    written = {**metrics, "tolerance": TOLERANCE, "shapes": parity.shapes, "files": run.show(files)}
    write_json(files["export"], written)
    run.info(f"Wrote {target}: {len(content) / 1e6:.1f} MB, largest difference to PyTorch {parity.max_abs_error:.1e}.")
    return Result(metrics, files)


def find_target(spec: Spec) -> Path:
    """export.onnx_file, else the name of the checkpoint with the ending .onnx. Raises SpecError for another ending."""
    if not spec.export.onnx_file:
        return Path(spec.export.checkpoint).with_suffix(".onnx")
    target = Path(spec.export.onnx_file)
    if target.suffix.lower() != ".onnx":
        raise SpecError(Problem("export.onnx_file", repr(str(target)), "a name that ends with .onnx"))
    return target


def _check_opset(version: int) -> None:
    newest = onnx.defs.onnx_opset_version()
    if not MIN_OPSET <= version <= newest:
        expected = f"{MIN_OPSET} to {newest}"
        raise SpecError(Problem("export.opset_version", str(version), expected, f"{MIN_OPSET} suits most runtimes."))


def _complete(description: ModelDescription, label_map: dict[str, int] | None, spec: Spec) -> ModelDescription:
    """A foreign file may lack class names and a model name: the spec's are then stored."""
    name = description.metadata["model_name"] or spec.model_name
    metadata = {**description.metadata, "model_name": name}
    return ModelDescription(description.num_classes, label_map, description.layout, description.pipeline, metadata)


def _refuse_overwrite(target: Path, labels: str, overwrite: bool) -> None:
    """Equal labels may stay: several exports of one training share a folder."""
    labels_path = target.with_name(LABELS_NAME)
    problems = []
    for path in (target, labels_path):
        if path.is_dir():
            problems.append(Problem(str(path), "a folder", "a file name"))
    if not overwrite and not problems:
        hint = "Set export.overwrite=true to replace it, or export.onnx_file to write elsewhere."
        if target.exists() or target.is_symlink():
            problems.append(Problem(str(target), "a file that is there already", "a new file", hint))
        if labels_path.exists() and labels_path.read_bytes() != labels.encode():
            got = "a file with other classes"
            problems.append(Problem(str(labels_path), got, "no file, or the classes of this model", hint))
    if problems:
        raise UserError(*problems)


def _notify(spec: Spec, run: Run, source: Path) -> None:
    if spec.export.gpu_id != 0:
        run.warn(f"export.gpu_id={spec.export.gpu_id} has no effect: export runs on the CPU.")
    with open(source, "rb") as file:
        if is_encrypted(file.read(8)):
            run.warn(f"{source} is encrypted; the exported ONNX file is plain: anyone can read its weights.")


def convert(model: nn.Module, description: ModelDescription, opset_version: int) -> bytes:
    """The network as the content of an ONNX file with the description in its metadata.

    torch's newer exporter (dynamo) takes 5 to 15 s where the older, deprecated one takes 1 s. But the older one refuses
    convolutions whose weights are computed, as in the graph convolutions here.
    """
    assert description.pipeline is not None
    clips, frames, people = SAMPLE_SHAPE
    sample = torch.zeros(clips, description.pipeline.num_channels, frames, description.pipeline.num_joints, people)
    axes = {0: torch.export.Dim("batch"), 2: torch.export.Dim("frames"), 4: torch.export.Dim("people")}
    with _silence():
        program = torch.onnx.export(
            model,
            (sample,),
            input_names=[INPUT_NAME],
            output_names=[OUTPUT_NAME],
            dynamic_shapes=(axes,),
            opset_version=opset_version,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    made = max(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    if made != opset_version:
        got = f"operator set {made}"
        hint = f"Set export.opset_version={made}."
        raise KinegraphError(Problem("export", got, str(opset_version), hint))
    _strip(proto)
    proto.producer_name = "kinegraph"
    onnx.helper.set_model_props(proto, description.to_metadata())
    onnx.checker.check_model(proto, full_check=True)
    return proto.SerializeToString()


def _strip(proto: onnx.ModelProto) -> None:
    """Take out the exporter's notes, which hold source lines and paths of this machine."""
    graph = proto.graph
    for entry in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        entry.doc_string = ""
        del entry.metadata_props[:]


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep the exporter's warnings about itself and about absent packages off the screen."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def check_parity(model: nn.Module, content: bytes, description: ModelDescription) -> Parity:
    """Compare onnxruntime with PyTorch on random clips of PARITY_SHAPES. Raises ParityError beyond TOLERANCE."""
    assert description.pipeline is not None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises a type of its own for each way a file can be wrong
        reason = " ".join(str(error).split())[:200]
        hint = f"Set export.opset_version={MIN_OPSET}."
        raise ParityError(Problem("export", reason, "a file that onnxruntime can open", hint)) from None
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
    parity = Parity(max(row["max_abs_error"] for row in rows), max(row["max_relative_error"] for row in rows), rows)
    worst = [row for row in rows if not row["max_relative_error"] <= TOLERANCE]
    if worst:
        got = "; ".join(
            f"a relative error of {row['max_relative_error']:.2g} for clips {row['shape']}" for row in worst
        )
        hint = "Nothing was written. Try another export.opset_version."
        raise ParityError(Problem("export", got, f"at most {TOLERANCE:g}", hint))
    return parity


def _compare(shape: list[int], answer: np.ndarray, expected: np.ndarray) -> dict[str, Any]:
    if answer.shape != expected.shape:
        raise ParityError(Problem("export", f"logits {answer.shape} for clips {shape}", str(expected.shape)))
    difference = float(np.abs(answer - expected).max())
    scale = float(np.abs(expected).max())
    return {"shape": shape, "max_abs_error": difference, "max_relative_error": difference / max(scale, 1e-12)}
