"""The train action: check the data, decide where to start and on which devices, then run `fit` there."""

from __future__ import annotations

import functools
import multiprocessing
import os
import secrets
import warnings
import zlib
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric

from kinegraph.data.arrays import open_array
from kinegraph.data.checks import DatasetInfo, check_dataset, infer_classes
from kinegraph.data.pipeline import InputPipeline
from kinegraph.errors import CheckpointError, KinegraphError, Problem, SpecError, UserError
from kinegraph.fit import TrainingJob, fit
from kinegraph.models.checkpoint import Checkpoint, read_checkpoint
from kinegraph.run import Result, Run, find_encryption_key
from kinegraph.run_checkpoints import BEST_NAME, LATEST_NAME, find_latest
from kinegraph.skeleton.layouts import Layout, get_layout
from kinegraph.spec import Spec

PRECISIONS: dict[str, Any] = {"32": "32-true", "bf16": "bf16-mixed"}
MODEL_DIFFERENCES = ("model_type", "graph_layout", "graph_strategy", "input_channels", "edge_importance_weighting")


def train(spec: Spec, run: Run) -> Result:
    """Train a classifier, or go on with the run in the folder. Raises UserError before the first step."""
    layout = get_layout(spec.model.graph_layout)
    train_info, val_info, num_classes, label_map = _check_data(spec, run, layout)
    spec = _complete_spec(spec, num_classes, label_map)
    run.spec = spec
    fingerprint = {"train": _fingerprint(train_info), "val": _fingerprint(val_info)}
    resumed = _find_resume_point(spec, run)
    if resumed:
        _check_same_run(resumed[1], spec, layout, label_map, fingerprint, str(resumed[0]))
        if resumed[1].training and resumed[1].training["epoch"] >= spec.train.num_epochs:
            return _report_complete(resumed[1], spec, run)
        _announce_resume(resumed, run)
    elif spec.model.pretrained_model_path:
        run.info(f"Weights start from {spec.model.pretrained_model_path}.")
    seed = resumed[1].training["seed"] if resumed and resumed[1].training else spec.train.seed
    seed = secrets.randbelow(2**31) if seed < 0 else seed
    assert train_info.labels is not None and val_info.labels is not None
    job = TrainingJob(
        run=run,
        layout=layout,
        num_classes=num_classes,
        label_map=label_map,
        pipeline=InputPipeline(spec.model.input_channels, layout.num_joints),
        train_labels=train_info.labels.labels,
        val_labels=val_info.labels.labels,
        seed=seed,
        fingerprint=fingerprint,
        resume_path=resumed[0] if resumed else None,
    )
    fabric = _build_fabric(spec, run, job)
    run.write_experiment(spec)
    _notice_ineffective_options(spec, run)
    outcome = _launch(fabric, job)
    return Result(outcome["metrics"], outcome["files"])


def _check_data(spec: Spec, run: Run, layout: Layout) -> tuple[DatasetInfo, DatasetInfo, int, dict[str, int]]:
    """Both sets checked, all their problems together; classes from the spec or else from the training labels."""
    data = spec.dataset
    label_map = dict(data.label_map) if data.label_map else None
    num_classes = data.num_classes if run.is_set("dataset.num_classes") else None
    options: dict[str, Any] = {"layout": layout, "num_channels": spec.model.input_channels}
    problems: list[Problem] = []
    train_info = val_info = None
    try:
        train_info = check_dataset(
            data.train_dataset.data_path,
            data.train_dataset.label_path,
            num_classes=num_classes,
            label_map=label_map,
            **options,
        )
        assert train_info.labels is not None
        num_classes, label_map = infer_classes(train_info.labels, label_map, num_classes)
    except UserError as error:
        problems += error.problems
    try:
        val_info = check_dataset(
            data.val_dataset.data_path,
            data.val_dataset.label_path,
            num_classes=num_classes,
            label_map=label_map,
            **options,
        )
    except UserError as error:
        problems += error.problems
    if problems or train_info is None or val_info is None or num_classes is None or label_map is None:
        raise UserError(*dict.fromkeys(problems))
    for message in (*train_info.warnings, *val_info.warnings):
        run.warn(message)
    return train_info, val_info, num_classes, label_map


def _complete_spec(spec: Spec, num_classes: int, label_map: dict[str, int]) -> Spec:
    """The effective spec: with the classes that were read from the labels."""
    return replace(spec, dataset=replace(spec.dataset, num_classes=num_classes, label_map=label_map))


def _fingerprint(info: DatasetInfo) -> dict[str, Any]:
    """Enough to notice other data: shape, labels, and the first, middle and last clip."""
    array = open_array(info.data_path)
    some = np.asarray(array[sorted({0, len(array) // 2, len(array) - 1})])
    assert info.labels is not None
    return {
        "shape": list(info.shape),
        "labels_crc32": zlib.crc32(info.labels.labels.tobytes()),
        "clips_crc32": zlib.crc32(some.tobytes()),
    }


def _find_resume_point(spec: Spec, run: Run) -> tuple[Any, Checkpoint] | None:
    key = find_encryption_key(spec)
    path = spec.train.resume_training_checkpoint_path
    if path:
        checkpoint = read_checkpoint(path, key)
        if not checkpoint.training:
            hint = "Set model.pretrained_model_path to start a new training from these weights."
            got = "a checkpoint without the state of a training"
            raise CheckpointError(Problem(path, got, "one that `kinegraph train` wrote", hint))
        return path, checkpoint
    return find_latest(run, key)


def _check_same_run(
    checkpoint: Checkpoint,
    spec: Spec,
    layout: Layout,
    label_map: dict[str, int],
    fingerprint: dict[str, Any],
    where: str,
) -> None:
    """Refuse to go on with another model, other data or other classes, naming every difference."""
    training = checkpoint.training or {}
    old, new = asdict(checkpoint.options), asdict(spec.model)
    pairs = {f"model.{name}": (old[name], new[name]) for name in MODEL_DIFFERENCES}
    pairs["layout"] = (checkpoint.layout.to_dict(), layout.to_dict())
    pairs["classes"] = (checkpoint.label_map, label_map)
    for part in ("train", "val"):
        pairs[f"dataset.{part}_dataset"] = (training["fingerprint"][part], fingerprint[part])
    if training["step"]:
        before = checkpoint.spec["dataset"]["batch_size"], checkpoint.spec["train"]["num_gpus"]
        pairs["batch size and processes, in the middle of an epoch"] = (
            before,
            (spec.dataset.batch_size, spec.train.num_gpus),
        )
    hint = "Choose another results_dir for a new run, or set these back to go on with this one."
    problems = [
        Problem(f"{name} (this run against {where})", _shorten(now), _shorten(then), hint)
        for name, (then, now) in pairs.items()
        if then != now
    ]
    if problems:
        raise SpecError(*problems)


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 160 else text[:160] + "..."


def _announce_resume(resumed: tuple[Any, Checkpoint], run: Run) -> None:
    path, checkpoint = resumed
    training = checkpoint.training or {}
    place = f"epoch {training['epoch'] + 1}" + (f", step {training['step'] + 1}" if training["step"] else "")
    run.info(f"Resuming from {path} at {place}. (For a new run choose another results_dir.)")


def _report_complete(checkpoint: Checkpoint, spec: Spec, run: Run) -> Result:
    training = checkpoint.training or {}
    run.info(
        f"Already complete: {run.folder} holds {training['epoch']} of {spec.train.num_epochs} epochs. "
        "Raise train.num_epochs to train on, or choose another results_dir."
    )
    files = {"latest": str(run.folder / LATEST_NAME), "best": str(run.folder / BEST_NAME)}
    metrics = {**checkpoint.metrics, "best": training["best"], "train_seconds": training["seconds"]}
    return Result(metrics, files)


def _build_fabric(spec: Spec, run: Run, job: TrainingJob) -> Fabric:
    options = spec.train
    torch.backends.cudnn.benchmark = options.cudnn.benchmark
    torch.backends.cudnn.deterministic = options.cudnn.deterministic
    if options.cudnn.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    num_gpus = torch.cuda.device_count()
    if options.accelerator == "gpu" and num_gpus == 0:
        raise SpecError(Problem("train.accelerator", "gpu, and no GPU was found", "cpu or auto"))
    on_cpu = options.accelerator == "cpu" or num_gpus == 0
    num_processes = options.num_gpus
    if on_cpu and options.accelerator == "auto":
        run.info("No GPU was found: training in one process on the CPU.")
        num_processes = 1
    launched = ("WORLD_SIZE" in os.environ and "LOCAL_RANK" in os.environ) or "SLURM_PROCID" in os.environ
    if options.num_nodes > 1 and not launched:
        hint = (
            f"Start it on each machine: torchrun --nnodes={options.num_nodes} --nproc-per-node={options.num_gpus} ..."
        )
        raise SpecError(Problem("train.num_nodes", str(options.num_nodes), "1, or a start by torchrun or SLURM", hint))
    devices: Any = num_processes
    if not on_cpu:
        devices = options.gpu_ids if len(options.gpu_ids) == num_processes else list(range(num_processes))
        if max(devices) >= num_gpus:
            raise SpecError(Problem("train.gpu_ids", str(devices), f"ids from 0 to {num_gpus - 1}"))
    distributed = num_processes * options.num_nodes > 1
    strategy = "auto" if not distributed else "ddp" if launched else "ddp_spawn"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Fabric(
            accelerator="cpu" if on_cpu else "cuda",
            devices=devices,
            num_nodes=options.num_nodes,
            strategy=strategy,
            precision=PRECISIONS[options.precision],
        )


def _launch(fabric: Fabric, job: TrainingJob) -> dict[str, Any]:
    """Run `fit` in this process or in one for each device; a failure there becomes an error here."""
    try:
        # A partial, not an argument: Fabric walks through arguments and stops at frozen dataclasses
        outcome: dict[str, Any] = fabric.launch(functools.partial(fit, job=job))
        return outcome
    except torch.multiprocessing.ProcessRaisedException as error:
        last_line = str(error).strip().splitlines()[-1]
        raise KinegraphError(Problem("a training process", last_line, "no failure", "See log.txt.")) from error
    finally:
        for child in multiprocessing.active_children():
            child.terminate()


def _notice_ineffective_options(spec: Spec, run: Run) -> None:
    """Say which options that the user set have no effect with the others, instead of ignoring them silently."""
    optim, data = spec.train.optim, spec.dataset
    without_effect = {
        "train.optim.momentum": (optim.optimizer_type != "torch.optim.SGD", "only SGD has momentum"),
        "train.optim.nesterov": (optim.optimizer_type != "torch.optim.SGD", "only SGD has it"),
        "train.optim.patience": (optim.lr_scheduler != "AutoReduce", "only AutoReduce waits"),
        "train.optim.lr_monitor": (optim.lr_scheduler != "AutoReduce", "only AutoReduce watches a loss"),
        "train.optim.min_lr": (optim.lr_scheduler == "MultiStep", "MultiStep has no lowest rate"),
        "train.optim.lr_steps": (optim.lr_scheduler != "MultiStep", "only MultiStep has steps"),
        "train.optim.lr_decay": (optim.lr_scheduler == "Cosine", "Cosine has no steps"),
        "dataset.random_choose": (data.random_choose and data.window_size < 1, "it needs a window_size"),
    }
    for key, (idle, reason) in without_effect.items():
        if idle and run.origins.get(key) == "override":
            run.warn(f"{key} has no effect here: {reason}.")
        elif idle and run.is_set(key):
            run.info(f"{key} has no effect here: {reason}.")
