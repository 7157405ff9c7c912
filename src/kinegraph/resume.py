"""Where a training starts: anew, from a given checkpoint, or where the run in the folder stopped."""

from __future__ import annotations

import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from kinegraph.data.arrays import open_array
from kinegraph.data.checks import DatasetInfo
from kinegraph.data.input_checks import settle_options
from kinegraph.data.pipeline import InputPipeline
from kinegraph.errors import CheckpointError, Problem, SpecError
from kinegraph.models.checkpoint import Checkpoint, read_checkpoint
from kinegraph.run import Run, find_encryption_key
from kinegraph.run_checkpoints import find_latest, list_checkpoints
from kinegraph.skeleton.layouts import Layout
from kinegraph.spec import Spec
from kinegraph.spec_input import InputSpec

MODEL_DIFFERENCES = (
    *("model_type", "graph_strategy", "input_channels", "edge_importance_weighting"),
    *("temporal_padding", "width", "depth", "fusion", "coordinates"),
)


def find_resume_point(spec: Spec, run: Run) -> tuple[Path, Checkpoint] | None:
    """The checkpoint to go on from, or None.

    One given by path starts a new folder; once that folder has checkpoints of its own, the newest of them is taken, so
    that a killed run goes on with the same command. Raises CheckpointError, also where nothing is gone on with and
    the weights of model.pretrained_model_path are of another fusion than the network.
    """
    key = find_encryption_key(spec)
    found = _find_checkpoint(spec, run, key)
    path = spec.model.pretrained_model_path
    if found is None and path:
        check_same_fusion(read_checkpoint(path, key), spec, path)
    return found


def _find_checkpoint(spec: Spec, run: Run, key: str) -> tuple[Path, Checkpoint] | None:
    if not spec.train.resume_training_checkpoint_path:
        return find_latest(run, key)
    path = Path(spec.train.resume_training_checkpoint_path)
    own = list_checkpoints(run.folder)
    inside = path.resolve().parent == run.folder.resolve()
    if own and not inside:
        run.info(f"The newest checkpoint in {run.folder} is taken, not {path}: this run has gone on from it already.")
        return find_latest(run, key)
    if inside and own and own[0].resolve() != path.resolve():
        hint = "Choose another results_dir, or move the newer ones away."
        got = f"{path}, and newer checkpoints such as {own[0].name} beside it"
        raise CheckpointError(
            Problem("train.resume_training_checkpoint_path", got, "the newest one of its folder", hint)
        )
    checkpoint = read_checkpoint(path, key)
    if not checkpoint.training:
        hint = "Set model.pretrained_model_path to start a new training from these weights."
        got = "a checkpoint without the state of a training"
        raise CheckpointError(Problem(str(path), got, "one that `kinegraph train` wrote", hint))
    return path, checkpoint


def check_same_fusion(checkpoint: Checkpoint, spec: Spec, where: str) -> None:
    """Refuse to start a late fusion from one network, or the reverse, or from another number of streams.

    Hardly a tensor of the one has its place in the other. Raises CheckpointError.
    """
    streams = _list_streams(checkpoint, where)
    is_late = checkpoint.options.fusion == "late" and len(streams) > 1
    wants_late = spec.model.fusion == "late" and len(spec.input.streams) > 1
    if is_late == wants_late and (not is_late or len(streams) == len(spec.input.streams)):
        return
    fusion = "late" if is_late else "early"
    hint = f"Set model.fusion={fusion} and input.streams=[{','.join(streams)}], as in the checkpoint"
    if is_late and not wants_late:
        hint += ". Or set train.teacher to this file: that is how one network learns from a late fusion."
    else:
        hint += ", or start from a late fusion of as many streams."
    asked = _describe_fusion(wants_late, list(spec.input.streams))
    raise CheckpointError(
        Problem(
            "model.pretrained_model_path",
            f"{where}, {_describe_fusion(is_late, streams)}",
            f"{asked}, as model.fusion and input.streams ask for",
            hint,
        )
    )


def _list_streams(checkpoint: Checkpoint, where: str) -> list[str]:
    if checkpoint.pipeline is None:
        return list(InputSpec().streams)
    options = InputPipeline.from_dict(checkpoint.pipeline, f"{where}: input pipeline").options
    return list((options or InputSpec()).streams)


def _describe_fusion(is_late: bool, streams: list[str]) -> str:
    count = f"{len(streams)} {'stream' if len(streams) == 1 else 'streams'} ({', '.join(streams)})"
    return f"a late fusion of {count}" if is_late else f"one network for {count}"


def make_fingerprint(info: DatasetInfo) -> dict[str, Any]:
    """Enough to notice other data: shape, labels, and the first, middle and last clip."""
    array = open_array(info.data_path)
    some = np.asarray(array[sorted({0, len(array) // 2, len(array) - 1})])
    assert info.labels is not None
    return {
        "shape": list(info.shape),
        "labels_crc32": zlib.crc32(info.labels.labels.tobytes()),
        "clips_crc32": zlib.crc32(some.tobytes()),
    }


def check_same_run(
    checkpoint: Checkpoint,
    spec: Spec,
    layout: Layout,
    pipeline: InputPipeline,
    fingerprint: dict[str, Any],
    world_size: int,
    where: str,
) -> None:
    """Refuse to go on with another model, data, classes or optimizer, naming every difference. Raises SpecError."""
    training = checkpoint.training or {}
    old, new = asdict(checkpoint.options), asdict(spec.model)
    pairs = {f"model.{name}": (old[name], new[name]) for name in MODEL_DIFFERENCES}
    pairs["model.graph_layout"] = (checkpoint.layout.to_dict(), layout.to_dict())
    pairs |= _compare_pipelines(checkpoint, pipeline, where)
    pairs["dataset.label_map"] = (checkpoint.label_map, spec.dataset.label_map)
    before = checkpoint.spec["train"]["optim"]["optimizer_type"]
    pairs["train.optim.optimizer_type"] = (before, spec.train.optim.optimizer_type)
    for part in ("train", "val"):
        pairs[f"dataset.{part}_dataset"] = (training["fingerprint"][part], fingerprint[part])
    if training["step"]:
        pairs["dataset.batch_size, in the middle of an epoch"] = (
            checkpoint.spec["dataset"]["batch_size"],
            spec.dataset.batch_size,
        )
        pairs["dataset.shuffle, in the middle of an epoch"] = (
            checkpoint.spec["dataset"].get("shuffle", "full"),
            spec.dataset.shuffle,
        )
        pairs["dataset.balance, in the middle of an epoch"] = (
            checkpoint.spec["dataset"].get("balance", "none"),
            spec.dataset.balance,
        )
        pairs["train.min_epoch_steps, in the middle of an epoch"] = (
            checkpoint.spec["train"].get("min_epoch_steps", 0),
            spec.train.min_epoch_steps,
        )
        pairs["the number of processes, in the middle of an epoch"] = (training["world_size"], world_size)
    hint = "Choose another results_dir for a new run, or set it back to go on with this one."
    problems = [
        Problem(name, _shorten(now), f"{_shorten(then)}, as in {where}", hint)
        for name, (then, now) in pairs.items()
        if then != now
    ]
    if problems:
        raise SpecError(*problems)


def _compare_pipelines(checkpoint: Checkpoint, pipeline: InputPipeline, where: str) -> dict[str, tuple[Any, Any]]:
    """Key -> (then, now) of the options of the input."""
    then = pipeline
    if checkpoint.pipeline is not None:
        then = InputPipeline.from_dict(checkpoint.pipeline, f"{where}: input pipeline")
    old, new = (settle_options(each.options) for each in (then, pipeline))
    return {f"input.{name}": (old[name], new[name]) for name in new}


def announce_resume(path: Path, checkpoint: Checkpoint, spec: Spec, precision: str, run: Run) -> None:
    """Say where the run goes on, and which changed options the stored state overrules."""
    training = checkpoint.training or {}
    place = f"epoch {training['epoch'] + 1}" + (f", step {training['step'] + 1}" if training["step"] else "")
    run.info(f"Resuming from {path} at {place}. (For a new run choose another results_dir.)")
    before = checkpoint.spec["train"]
    if run.is_set("train.seed") and before["seed"] != spec.train.seed:
        run.warn(f"train.seed={spec.train.seed} has no effect: the run goes on with seed {training['seed']}.")
    then = training.get("precision", precision)
    if then != precision:
        run.warn(f"Going on in precision {precision}; before it was {then} (train.precision={then} keeps it).")
    optim = spec.train.optim
    if optim.lr_scheduler == "AutoReduce" and before["optim"]["lr"] != optim.lr:
        run.warn(f"train.optim.lr={optim.lr} has no effect: AutoReduce goes on with its own rate.")


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 160 else text[:160] + "..."
