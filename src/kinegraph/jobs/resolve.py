"""What a job fills in by itself: where its results go, which model of its parent it uses, where the key comes from."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from kinegraph import remote
from kinegraph.config_source import read_source
from kinegraph.errors import DataError, KinegraphError, Problem, SpecError, UserError, look_up
from kinegraph.jobs.artifacts import find_model, find_onnx, parse_choice
from kinegraph.jobs.record import ID_PATTERN, RECORD_NAME, find_folder, find_job_id, find_root, make_absolute, read_job
from kinegraph.run_files import EXPERIMENT_NAME
from kinegraph.spec import KEY_VARIABLE

KEY_FROM_ENVIRONMENT = f"environment:{KEY_VARIABLE}"
KEY_FROM_CALL = "given with the call, not kept"
KEY_FROM_FILE = "file:"
UNFINISHED = ("Pending", "Running")
TRAINING = ("train", "automl")
MAX_PICKLE_BYTES = 4 * 1024 * 1024
INHERITED = ("dataset.num_classes", "dataset.label_map", "model.graph_layout")


@dataclass(frozen=True)
class Parent:
    """A job whose results are used. `action` is '' for a results folder without a record, such as one of TAO."""

    id: str
    results_dir: str
    action: str = ""
    notice: str = ""


@dataclass(frozen=True)
class Context:
    """What is known when the options of a job are filled in.

    `folder` is that of the job, `results_dir` that of its action in it. `pretrained` and `resume` are what the user
    gave for them, `checkpoint` is best, latest or an epoch.
    """

    action: str
    folder: str
    results_dir: str
    parent: Parent | None = None
    checkpoint: str | int = "best"
    pretrained: str = ""
    resume: str = ""
    key: str = ""


@dataclass(frozen=True)
class Inferred:
    """A value that was filled in; '' leaves the option as it is."""

    value: str
    notice: str = ""


def _get_key(context: Context) -> Inferred:
    """Where the key comes from. Never the key: it reaches the action by its environment."""
    return Inferred(context.key)


def _get_output_dir(context: Context) -> Inferred:
    return Inferred(context.folder)


def _find_parent_model(context: Context) -> Inferred:
    parent = context.parent
    if parent is None:
        return Inferred("")
    if parent.action == "export":
        if context.action in ("evaluate", "inference"):
            return Inferred(find_onnx(parent.results_dir), parent.notice)
        hint = "Name the training as parent_job_id."
        got = f"the export job {parent.id}"
        raise UserError(Problem("parent_job_id", got, f"a training, for {context.action}", hint))
    if parent.action and parent.action not in TRAINING:
        hint = "Name the training, or the export of it, as parent_job_id."
        got = f"the job {parent.id}, which is {parent.action}"
        raise UserError(Problem("parent_job_id", got, "a job that made a model", hint))
    artifact = find_model(parent.results_dir, context.checkpoint)
    return Inferred(artifact.location, "; ".join(filter(None, (parent.notice, artifact.notice))))


def _find_parent_model_folder(context: Context) -> Inferred:
    model = _find_parent_model(context)
    return Inferred(remote.split_location(model.value)[0] if model.value else "", model.notice)


def _find_resume_model(context: Context) -> Inferred:
    """The newest checkpoint in the job's own results. A search finds its own state by itself."""
    if context.action == "automl" or not remote.is_folder(context.results_dir):
        return Inferred("")
    try:
        return Inferred(find_model(context.results_dir, "latest").location)
    except DataError:
        return Inferred("")


def _find_pretrained_model(context: Context) -> Inferred:
    """What the user gave, else the model of a parent that is a training; '' if the job has one to go on from."""
    if context.resume or _find_resume_model(context).value:
        return Inferred("")
    if context.pretrained or context.parent is None or context.parent.action not in (*TRAINING, ""):
        return Inferred(context.pretrained)
    return _find_parent_model(context)


def _name_onnx_file(context: Context) -> Inferred:
    return Inferred(remote.join(context.results_dir, "model.onnx"))


def _name_result_file(context: Context) -> Inferred:
    return Inferred(remote.join(context.results_dir, "results.txt"))


FUNCTIONS: dict[str, Callable[[Context], Inferred]] = {
    "key": _get_key,
    "output_dir": _get_output_dir,
    "parent_model": _find_parent_model,
    "parent_model_folder": _find_parent_model_folder,
    "resume_model": _find_resume_model,
    "ptm_if_no_resume_model": _find_pretrained_model,
    "create_onnx_file": _name_onnx_file,
    "create_inference_result_file_pose": _name_result_file,
}

_ALWAYS = {"encryption_key": "key", "results_dir": "output_dir"}
_TRAINING_PARAMS = {
    **_ALWAYS,
    "model.pretrained_model_path": "ptm_if_no_resume_model",
    "train.resume_training_checkpoint_path": "resume_model",
}
SPEC_PARAMS: dict[str, dict[str, str]] = {
    "dataset_convert": {"results_dir": "output_dir"},
    "train": _TRAINING_PARAMS,
    "automl": _TRAINING_PARAMS,
    "evaluate": {**_ALWAYS, "evaluate.checkpoint": "parent_model"},
    "inference": {
        **_ALWAYS,
        "inference.checkpoint": "parent_model",
        "inference.output_file": "create_inference_result_file_pose",
    },
    "export": {**_ALWAYS, "export.checkpoint": "parent_model", "export.onnx_file": "create_onnx_file"},
}
"""Action -> dotted key of the spec -> the function in FUNCTIONS that fills it in."""


def resolve_spec_param(
    name: str,
    *,
    action: str = "train",
    root: str | os.PathLike[str] | None = None,
    job_id: str | None = None,
    parent_job_id: str | None = None,
    checkpoint: str | int = "best",
    pretrained_model: str = "",
    key_file: str | os.PathLike[str] | None = None,
) -> str:
    """What one function of FUNCTIONS gives for a job, without creating one; '' where there is nothing to fill in.

    `action` is the one that asks. `job_id` is needed for what lies in the job's own folder, `parent_job_id` for what
    comes from the parent. A full id may be that of a job that is not there yet. `key` gives the reference to the key,
    not the key. Raises UserError, StorageError.
    """
    function = look_up(FUNCTIONS, name, "spec param")
    look_up(SPEC_PARAMS, action, "action")
    place = find_root(root)
    needs_own = name not in ("key", "parent_model", "parent_model_folder")
    if needs_own and job_id is None:
        raise UserError(Problem(name, "no job id", "the id of the job whose folder is meant"))
    folder, results_dir = (place, "") if job_id is None else _find_own(place, job_id, action)
    return function(
        Context(
            action,
            folder,
            results_dir,
            parent=find_parent(place, parent_job_id),
            checkpoint=parse_choice(checkpoint),
            pretrained=pretrained_model,
            key=find_key_reference(key_file),
        )
    ).value


def _find_own(root: str, job_id: str, action: str) -> tuple[str, str]:
    """The folder and the results folder of a job: of one that is there, or of one that has only its id yet."""
    text = job_id.lower()
    full_id = text if ID_PATTERN.fullmatch(text) else find_job_id(root, job_id)
    folder = find_folder(root, full_id)
    if remote.exists(remote.join(folder, RECORD_NAME)):
        return folder, read_job(root, full_id).results_dir
    return folder, remote.join(folder, action)


def find_parent(root: str, parent_job_id: str | None) -> Parent | None:
    """The results of the parent. Raises UserError if there is none, or if it has not ended yet."""
    if parent_job_id is None:
        return None
    folder = find_folder(root, parent_job_id)
    is_name = parent_job_id not in ("", ".", "..") and not set(parent_job_id) & set("/\\:")
    has_record = is_name and remote.exists(remote.join(folder, RECORD_NAME))
    if is_name and not has_record and remote.is_folder(folder):
        return Parent(parent_job_id, folder)
    job = read_job(root, parent_job_id)
    if job.status in UNFINISHED:
        hint = f"`kinegraph jobs status {job.id} --wait` waits for it."
        raise UserError(Problem("parent_job_id", f"job {job.id}, which is {job.status}", "a job that has ended", hint))
    notice = "" if job.status == "Complete" else f"the parent job {job.id} ended as {job.status}: what it left is used"
    return Parent(job.id, job.results_dir, job.effective_action, notice)


def find_key_reference(key_file: str | os.PathLike[str] | None = None) -> str:
    """Where the encryption key comes from: file:PATH, environment:NAME, or '' without one. Raises UserError."""
    if key_file is not None:
        return KEY_FROM_FILE + make_absolute(os.fspath(key_file), "key_file")
    return KEY_FROM_ENVIRONMENT if os.environ.get(KEY_VARIABLE) else ""


def find_inherited(parent: Parent | None, model: str) -> dict[str, Any]:
    """What the spec beside a foreign checkpoint says about its classes and its layout: dotted key -> value.

    Our own checkpoints hold this themselves, and so does every job of ours: only results without a record are
    looked at.
    """
    if parent is None or parent.action or not model.lower().endswith(".pth") or not _is_foreign(model):
        return {}
    place, base = remote.split_location(model)[0], parent.results_dir
    while len(place) >= len(base):
        spec_file = remote.join(place, EXPERIMENT_NAME)
        if remote.exists(spec_file):
            return _read_inherited(spec_file)
        place = remote.split_location(place)[0]
    return {}


def _read_inherited(spec_file: str) -> dict[str, Any]:
    try:
        content = read_source(remote.fetch(spec_file))
    except SpecError:
        return {}
    found = {}
    for key in INHERITED:
        group, _, name = key.partition(".")
        value = content.get(group, {}).get(name) if isinstance(content.get(group), dict) else None
        if value not in (None, "", "???"):
            found[key] = value
    return found


def _is_foreign(model: str) -> bool:
    """Whether another tool wrote a .pth file, told from the names in it alone: no torch, nothing is unpickled."""
    try:
        with zipfile.ZipFile(remote.fetch(model)) as archive:
            name = next(name for name in archive.namelist() if PurePosixPath(name).name == "data.pkl")
            with archive.open(name) as file:
                content = file.read(MAX_PICKLE_BYTES)
                return not (b"kinegraph" in content and b"format_version" in content)
    except (KinegraphError, OSError, zipfile.BadZipFile, StopIteration, RuntimeError, NotImplementedError):
        return False


def read_key_file(reference: str) -> str:
    """The key in a key file: its first line. Raises UserError."""
    path = Path(reference.removeprefix(KEY_FROM_FILE))
    try:
        with open(path, encoding="utf-8") as file:
            key = file.readline(4096).strip()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "text that is not UTF-8"
        raise UserError(Problem(f"key file {path}", reason, "a file with the key in its first line")) from None
    if not key:
        raise UserError(Problem(f"key file {path}", "an empty first line", "the encryption key"))
    return key
