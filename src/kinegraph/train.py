"""The train action: check the data, decide where to start and on which devices, then run `fit` there."""

from __future__ import annotations

import functools
import json
import multiprocessing
import secrets
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_fabric import Fabric
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from kinegraph.calibration import is_at_bound
from kinegraph.config import get_value
from kinegraph.data.augment import choose_augmentation
from kinegraph.data.checks import DatasetInfo, check_dataset, infer_classes
from kinegraph.data.pipeline import InputPipeline, build_pipeline, look_for_score, settle_origin
from kinegraph.data.upright import find_tilts
from kinegraph.devices import build_fabric, choose_devices, choose_precision
from kinegraph.errors import (
    CheckpointError,
    DataError,
    KinegraphError,
    Problem,
    SpecError,
    StorageError,
    UserError,
)
from kinegraph.fit import fit
from kinegraph.models.checkpoint import Checkpoint
from kinegraph.resume import announce_resume, check_same_run, find_resume_point, make_fingerprint
from kinegraph.run import LOGGER, Result, Run
from kinegraph.run_checkpoints import list_files, repair_run
from kinegraph.skeleton.layouts import Layout, get_layout
from kinegraph.spec import Spec
from kinegraph.training_job import TrainingJob, find_last_epoch, has_ended


def train(spec: Spec, run: Run) -> Result:
    """Train a classifier, or go on with the run in the folder. Raises UserError before the first step."""
    layout = get_layout(spec.model.graph_layout)
    pipeline = build_pipeline(spec.input, spec.model.input_channels, layout)
    if spec.dataset.random_move and spec.model.model_type != "ST-GCN":
        hint = "It would move padding too. Use augment.rotation_z, augment.scale and augment.shift."
        expected = f"false with {spec.model.model_type}, which knows padding by its zeros"
        raise SpecError(Problem("dataset.random_move", "true", expected, hint))
    devices = choose_devices(spec, run)
    precision = choose_precision(spec.train.precision, devices.accelerator)
    train_info, val_info, num_classes, label_map = _check_data(spec, run, layout)
    pipeline = _settle_pipeline(pipeline, layout, train_info, run)
    spec = _complete_spec(spec, num_classes, label_map, pipeline)
    run.spec = spec
    fingerprint = {"train": make_fingerprint(train_info), "val": make_fingerprint(val_info)}
    resumed = find_resume_point(spec, run)
    seed = spec.train.seed
    if resumed:
        path, checkpoint = resumed
        check_same_run(checkpoint, spec, layout, pipeline, fingerprint, devices.world_size, str(path))
        assert checkpoint.training is not None
        seed = checkpoint.training["seed"]
        if run.writes:
            checkpoint.training["best"] = repair_run(run, path, checkpoint.training["best"])
        if has_ended(checkpoint.training["epoch"], checkpoint.training["best"], spec.train):
            return _report_complete(checkpoint, spec, run)
        announce_resume(path, checkpoint, spec, precision, run)
    assert train_info.labels is not None and val_info.labels is not None
    augment, warnings = choose_augmentation(spec.augment, pipeline, label_map, layout.symmetric)
    for message in (*warnings, *find_tilts(augment, pipeline, layout, train_info.data_path)):
        run.warn(message)
    job = TrainingJob(
        run=run,
        layout=layout,
        num_classes=num_classes,
        label_map=label_map,
        pipeline=pipeline,
        augment=augment,
        train_labels=train_info.labels.labels,
        train_names=train_info.labels.names,
        val_labels=val_info.labels.labels,
        seed=secrets.randbelow(2**31) if seed < 0 else seed,
        fingerprint=fingerprint,
        precision=precision,
        resume_path=resumed[0] if resumed else None,
    )
    run.write_experiment(spec)
    _notice_ineffective_options(spec, run)
    outcome = _launch(build_fabric(devices, precision), job)
    if outcome["fusion_weights"] and not spec.model.fusion_weights:
        outcome["metrics"]["fusion_weights"] = _report_fitted_weights(spec, outcome["fusion_weights"], run)
    if not spec.train.temperature and is_at_bound(outcome["temperature"]):
        run.warn(
            f"train.temperature was fitted to {outcome['temperature']:.3g}, the end of what is allowed: probabilities "
            "say little. The validation clips are hardly told apart, or their labels are not those of training."
        )
    return Result(outcome["metrics"], list_files(run))


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
            classes_from="" if data.label_map else "the training labels",
            **options,
        )
    except UserError as error:
        problems += error.problems
    if problems or train_info is None or val_info is None or num_classes is None or label_map is None:
        raise UserError(*dict.fromkeys(problems))
    for message in (*train_info.warnings, *val_info.warnings):
        run.warn(message)
    return train_info, val_info, num_classes, label_map


def _settle_pipeline(pipeline: InputPipeline, layout: Layout, info: DatasetInfo, run: Run) -> InputPipeline:
    settled = settle_origin(pipeline, info.data_path)
    if settled.options is not None and settled.options.origin_joint >= 0 and settled != pipeline:
        name = layout.joints[layout.centre]
        run.info(f"The coordinates are relative to {name}: its zeros are real (input.origin_joint=-2: missing joints).")
    if settled.options is not None and settled.options.score_channel < 0:
        channel = look_for_score(info.data_path)
        if channel >= 0:
            run.warn(
                f"Channel {channel} of {info.data_path} lies in 0 to 1, like a score, and is taken for a coordinate. "
                f"If it is a score, set input.score_channel={channel}."
            )
    return settled


def _complete_spec(spec: Spec, num_classes: int, label_map: dict[str, int], pipeline: InputPipeline) -> Spec:
    """The effective spec: with the classes that were read from the labels, and without a score among the coordinates
    between which DD-Net takes distances.
    """
    model = spec.model
    if model.model_type == "DD-Net" and model.coordinates == 0 and pipeline.num_coordinates == 2:
        model = replace(model, coordinates=2)
    return replace(spec, model=model, dataset=replace(spec.dataset, num_classes=num_classes, label_map=label_map))


def _report_fitted_weights(spec: Spec, weights: list[float], run: Run) -> dict[str, float]:
    fitted = dict(zip(spec.input.streams, weights, strict=True))
    told = ", ".join(f"{stream} {weight:.3g}" for stream, weight in fitted.items())
    kept = ",".join(f"{weight:.4g}" for weight in weights)
    run.info(f"Weights of the streams, fitted on the validation clips: {told} (model.fusion_weights=[{kept}]).")
    return fitted


def _report_complete(checkpoint: Checkpoint, spec: Spec, run: Run) -> Result:
    training = checkpoint.training or {}
    done, last = training["epoch"], find_last_epoch(spec.train)
    option = "num_epochs" if last == spec.train.num_epochs else "stop_after_epoch"
    if done < last:
        option = "early_stopping"
    run.info(
        f"Already complete: {run.folder} holds {done} of {spec.train.num_epochs} epochs. "
        f"Raise train.{option} to train on, or choose another results_dir."
    )
    metrics = {**checkpoint.metrics, "best": training["best"], "train_seconds": training["seconds"]}
    return Result(metrics, list_files(run))


def _launch(fabric: Fabric, job: TrainingJob) -> dict[str, Any]:
    """Run `fit` in this process or in one for each device; an error there is raised here."""
    with tempfile.TemporaryDirectory() as folder:
        job.failure_path = Path(folder) / "failure.json"
        try:
            # A partial, not an argument: Fabric walks through arguments and stops at frozen dataclasses
            outcome: dict[str, Any] = fabric.launch(functools.partial(fit, job=job))
            return outcome
        except (ProcessRaisedException, ProcessExitedException) as error:
            LOGGER.debug("a training process failed", exc_info=error)
            raise _explain_child(job.failure_path, error) from error
        finally:
            for child in multiprocessing.active_children():
                child.terminate()


def _explain_child(failure_path: Path, error: Exception) -> KinegraphError:
    """The error that a child process wrote down, or else what is known of its end."""
    if failure_path.is_file():
        failure = json.loads(failure_path.read_text())
        kinds = {kind.__name__: kind for kind in (UserError, SpecError, DataError, CheckpointError, StorageError)}
        return kinds.get(failure["kind"], KinegraphError)(*(Problem(**problem) for problem in failure["problems"]))
    last_line = str(error).strip().splitlines()[-1]
    return KinegraphError(Problem("a training process", last_line, "no failure", "The traceback is in log.txt."))


def _notice_ineffective_options(spec: Spec, run: Run) -> None:
    """Say which options that the user set have no effect with the others, instead of ignoring them silently."""
    optim, data, name = spec.train.optim, spec.dataset, spec.model.model_type
    without_effect = {
        "train.optim.momentum": (optim.optimizer_type != "torch.optim.SGD", "only SGD has momentum"),
        "train.optim.nesterov": (optim.optimizer_type != "torch.optim.SGD", "only SGD has it"),
        "train.optim.patience": (optim.lr_scheduler != "AutoReduce", "only AutoReduce waits"),
        "train.optim.lr_monitor": (optim.lr_scheduler != "AutoReduce", "only AutoReduce watches a loss"),
        "train.optim.min_lr": (optim.lr_scheduler == "MultiStep", "MultiStep has no lowest rate"),
        "train.optim.lr_steps": (optim.lr_scheduler != "MultiStep", "only MultiStep has steps"),
        "train.optim.lr_decay": (optim.lr_scheduler == "Cosine", "Cosine has no steps"),
        "model.fusion": (len(spec.input.streams) == 1, "there is one stream"),
        "model.fusion_weights": (
            spec.model.fusion == "early" or len(spec.input.streams) == 1,
            "one network takes all streams",
        ),
        "dataset.shuffle": (data.balance == "sampling", "balanced sampling has an order of its own"),
        "train.teacher_weight": (not spec.train.teacher, "there is no teacher"),
        "train.teacher_temperature": (not spec.train.teacher, "there is no teacher"),
        "model.width": (name == "ST-GCN", "ST-GCN has its own widths"),
        "model.depth": (name == "ST-GCN", "ST-GCN has ten blocks"),
        "model.edge_importance_weighting": (name != "ST-GCN", f"only ST-GCN has it, not {name}"),
        "model.graph_strategy": (name == "DD-Net", "DD-Net has no graph"),
        "model.coordinates": (name != "DD-Net", "only DD-Net takes distances"),
        "input.num_frames": (spec.input.sampling == "none", "without sampling all frames are taken"),
        "input.smallest_crop": (spec.input.sampling != "crop_resize", "only crop_resize crops"),
        "input.test_crop": (spec.input.sampling != "crop_resize", "only crop_resize crops"),
        "input.scale_by": (spec.input.scale == "none", "nothing is scaled"),
        "input.vertical": (spec.input.align == "none", "nothing is aligned"),
        "train.early_stopping": (
            spec.train.validation_interval >= spec.train.num_epochs,
            "the only validation is that of the last epoch (train.validation_interval)",
        ),
        "augment.sides_matter": (spec.augment.mirror == 0, "nothing is mirrored"),
        "dataset.random_choose": (data.random_choose and data.window_size < 1, "it needs a window_size"),
    }
    for key, (idle, reason) in without_effect.items():
        # A template states every option; only a value that somebody chose is worth a word
        is_default = get_value(spec, key) == get_value(Spec(), key)
        chosen = not is_default or (run.origins.get(key) == "override" and get_value(spec, key) != [])
        if idle and chosen:
            run.warn(f"{key} has no effect here: {reason}.")
