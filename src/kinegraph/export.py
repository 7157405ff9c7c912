"""The export action: a checkpoint becomes one ONNX file that says all that inference needs, checked against PyTorch.

Input `input` (batch, C, frames, V, people), output `fc_pred` (batch, classes), logits; batch, frames and people are
dynamic. The weights are inside the file (protobuf allows 2 GB; ST-GCN has 12 MB). With export.form=step the file takes
one frame at a time (onnx_step.py), with export.quantize=int8 its convolutions run in 8 bits (onnx_quantized.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
from torch import nn

from kinegraph.errors import Problem, SpecError, UserError
from kinegraph.export_int8 import Loss, convert_to_int8
from kinegraph.export_parity import TOLERANCE, Parity, check_parity, check_step_parity
from kinegraph.model_description import ModelDescription, describe_checkpoint
from kinegraph.models import Foldable
from kinegraph.models.checkpoint import build_from_checkpoint, read_checkpoint
from kinegraph.models.encryption import is_encrypted
from kinegraph.onnx_graph import MIN_OPSET, write_clip_form
from kinegraph.onnx_step import write_step_form
from kinegraph.onnx_torch import MIN_OPSET as MIN_TORCH_OPSET
from kinegraph.onnx_torch import export_by_torch
from kinegraph.predict import check_agreement, join_lines
from kinegraph.run import Result, Run, find_encryption_key
from kinegraph.spec import Spec
from kinegraph.storage import make_folder, write_atomically, write_json

LABELS_NAME = "labels.txt"
LOSS_SUFFIX = ".quantization.json"


@dataclass(frozen=True)
class Exported:
    """The content of a file and what was found out about it."""

    content: bytes
    parity: Parity
    loss: Loss | None = None


def export(spec: Spec, run: Run) -> Result:
    """Write export.checkpoint as ONNX, with labels.txt beside it and export.json in the results folder.

    In 8 bits, what they cost in accuracy stands in a file beside it, model.quantization.json, and in export.json.

    Raises UserError if a file is in the way and export.overwrite is false, ParityError if onnxruntime answers otherwise
    than PyTorch, or in 8 bits too much worse: then no file is written.
    """
    source = Path(spec.export.checkpoint)
    target = find_target(spec)
    if source.suffix.lower() == ".onnx":
        raise SpecError(Problem("export.checkpoint", repr(str(source)), "a .pth file", "It is ONNX already."))
    _check_options(spec)
    checkpoint = read_checkpoint(source, find_encryption_key(spec))
    description = describe_checkpoint(checkpoint, str(source))
    label_map = check_agreement(spec, run, description, str(source))
    description = _complete(description, label_map, spec)
    labels = "".join(join_lines(description.class_names))
    _refuse_overwrite(target, labels, spec.export.overwrite, spec.export.quantize)
    model = build_from_checkpoint(checkpoint, str(source))
    opset_version = _choose_opset(spec, run, model)
    make_folder(target.parent)
    run.write_experiment()
    _notify(spec, run, source)
    run.info(f"Exporting {source} with operator set {opset_version}.")
    exported = _make_content(spec, run, model, description, opset_version)
    return _write(run, target, labels, exported, opset_version)


def _make_content(
    spec: Spec, run: Run, model: nn.Module, description: ModelDescription, opset_version: int
) -> Exported:
    """The file in the form that is asked for, checked."""
    options = spec.export
    if options.form == "step":
        assert isinstance(model, Foldable)
        network = model.fold()
        content = write_step_form(network, opset_version, description.to_metadata())
        run.info("Comparing frame by frame with PyTorch.")
        return Exported(content, check_step_parity(network, content))
    content = convert(model, description, opset_version)
    run.info("Comparing with PyTorch.")
    parity = check_parity(model, content, description)
    if options.quantize == "none":
        return Exported(content, parity)
    assert isinstance(model, Foldable)
    quantized, loss = convert_to_int8(model.fold(), content, description, options, opset_version, run)
    return Exported(quantized, parity, loss)


def _write(run: Run, target: Path, labels: str, exported: Exported, opset_version: int) -> Result:
    files = {
        "onnx": str(target),
        "labels": str(target.with_name(LABELS_NAME)),
        "export": str(run.folder / "export.json"),
    }
    parity, loss = exported.parity, exported.loss
    metrics: dict[str, Any] = {
        "max_abs_error": parity.max_abs_error,
        "max_relative_error": parity.max_relative_error,
        "opset_version": opset_version,
        "size_bytes": len(exported.content),
    }
    written = {**metrics, "tolerance": TOLERANCE, "shapes": parity.shapes}
    if loss is not None:
        files["quantization"] = str(target.with_suffix(LOSS_SUFFIX))
        metrics |= {"accuracy_loss": loss.percent, "changed": loss.changed}
        written |= {"quantization": run.show(loss.as_data())}
    with write_atomically(files["labels"], "w") as file:
        file.write(labels)
    with write_atomically(target) as file:
        file.write(exported.content)
    if loss is not None:
        write_json(files["quantization"], run.show(loss.as_data()))
    write_json(files["export"], {**written, "files": run.show(files)})
    size = f"{len(exported.content) / 1e6:.1f} MB"
    if loss is None:
        run.info(f"Wrote {target}: {size}, largest difference to PyTorch {parity.max_abs_error:.1e}.")
    else:
        run.info(f"Wrote {target}: {size}, {loss.words}.")
    return Result(metrics, files)


def find_target(spec: Spec) -> Path:
    """export.onnx_file, else the name of the checkpoint with the ending .onnx, _step.onnx or _int8.onnx.

    Raises SpecError for another ending.
    """
    if not spec.export.onnx_file:
        source = Path(spec.export.checkpoint)
        kind = "_step" if spec.export.form == "step" else "_int8" if spec.export.quantize == "int8" else ""
        return source.with_name(f"{source.stem}{kind}.onnx")
    target = Path(spec.export.onnx_file)
    if target.suffix.lower() != ".onnx":
        raise SpecError(Problem("export.onnx_file", repr(str(target)), "a name that ends with .onnx"))
    return target


def _check_options(spec: Spec) -> None:
    options, problems = spec.export, []
    version, newest = options.opset_version, onnx.defs.onnx_opset_version()
    if not MIN_OPSET <= version <= newest:
        expected = f"{MIN_OPSET} to {newest}"
        problems.append(Problem("export.opset_version", str(version), expected, f"{MIN_OPSET} suits most runtimes."))
    if options.quantize == "int8" and options.form == "step":
        hint = "One frame is too little work for 8 bits to gain anything."
        problems.append(Problem("export.quantize", "int8 with export.form=step", "export.form=clip", hint))
    elif options.quantize == "int8" and not options.calibration_dataset.data_path:
        hint = "Give clips of the training data; a few hundred are enough."
        problems.append(Problem("export.calibration_dataset.data_path", "nothing", "a .npy file of clips", hint))
    if problems:
        raise SpecError(*problems)


def _choose_opset(spec: Spec, run: Run, model: nn.Module) -> int:
    """export.opset_version, or the oldest that PyTorch's exporter writes where a network needs that one."""
    version = spec.export.opset_version
    if not isinstance(model, Foldable):
        for key, value, plain in (("form", spec.export.form, "clip"), ("quantize", spec.export.quantize, "none")):
            if value != plain:
                got = f"{value} for a network that cannot be folded"
                raise SpecError(Problem(f"export.{key}", got, plain))
    if isinstance(model, Foldable) or version >= MIN_TORCH_OPSET:
        return version
    if run.is_set("export.opset_version"):
        hint = "This network is written by PyTorch's exporter, which knows no older one."
        raise SpecError(Problem("export.opset_version", str(version), f"at least {MIN_TORCH_OPSET}", hint))
    return MIN_TORCH_OPSET


def _complete(description: ModelDescription, label_map: dict[str, int] | None, spec: Spec) -> ModelDescription:
    """A foreign file may lack class names and a model name: the spec's are then stored."""
    name = description.metadata["model_name"] or spec.model_name
    metadata = {**description.metadata, "model_name": name}
    return replace(description, label_map=label_map, metadata=metadata)


def _refuse_overwrite(target: Path, labels: str, overwrite: bool, quantize: str = "none") -> None:
    """Equal labels may stay: several exports of one training share a folder."""
    labels_path = target.with_name(LABELS_NAME)
    problems = []
    loss_paths = [target.with_suffix(LOSS_SUFFIX)] if quantize != "none" else []
    for path in (target, labels_path, *loss_paths):
        if path.is_dir():
            problems.append(Problem(str(path), "a folder", "a file name"))
    if not overwrite and not problems:
        hint = "Set export.overwrite=true to replace it, or export.onnx_file to write elsewhere."
        for path in (target, *loss_paths):
            if path.exists() or path.is_symlink():
                problems.append(Problem(str(path), "a file that is there already", "a new file", hint))
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
    """The network as the content of an ONNX file with the description in its metadata."""
    if isinstance(model, Foldable):
        return write_clip_form(model.fold(), opset_version, description.to_metadata())
    return export_by_torch(model, description, opset_version)
