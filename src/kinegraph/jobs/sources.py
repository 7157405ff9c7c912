"""Where the data of a job come from: a mapping of options to paths, or a folder whose file names are known."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from kinegraph import remote
from kinegraph.errors import Problem, UserError, look_up
from kinegraph.jobs.record import make_absolute
from kinegraph.spec import REQUIRED

LABEL_ENDINGS = (".pkl", ".json", ".npz", ".csv")
OPTIONAL_SOURCES = ("inference.test_dataset.label_path",)
CHECKPOINTS = ("evaluate.checkpoint", "inference.checkpoint", "export.checkpoint")

_TRAINING_FILES = {
    "dataset.train_dataset.data_path": "train_data",
    "dataset.train_dataset.label_path": "train_label",
    "dataset.val_dataset.data_path": "val_data",
    "dataset.val_dataset.label_path": "val_label",
}
SOURCE_FILES: dict[str, dict[str, str]] = {
    "train": _TRAINING_FILES,
    "automl": _TRAINING_FILES,
    "evaluate": {"evaluate.test_dataset.data_path": "val_data", "evaluate.test_dataset.label_path": "val_label"},
    "inference": {"inference.test_dataset.data_path": "test_data", "inference.test_dataset.label_path": "test_label"},
    "dataset_convert": {"dataset_convert.data": ""},
    "export": {},
}
"""Action -> data option -> the name of its file in a folder, without ending. Arrays are .npy; dataset_convert takes the
one .json file of a folder."""

MANDATORY_SOURCES: dict[str, tuple[str, ...]] = {
    action: tuple(key for key in keys if key not in CHECKPOINTS) for action, keys in REQUIRED.items()
}
"""Action -> the data options without which it cannot start."""


@dataclass
class SourcedData:
    """Data options filled in from a data source (dotted key -> location), and what to say about it."""

    values: dict[str, str] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def read_data_source(
    action: str, source: str | os.PathLike[str] | Mapping[str, str] | None, given: Collection[str]
) -> SourcedData:
    """The data options of an action. `given` are the keys that the spec or an override sets: a folder leaves them.

    A mapping (dotted key -> path) says which option is meant and stands above the spec. A folder or a prefix fills in
    its files by their names: train_data.npy, train_label.pkl (or .json, .npz, .csv), val_*, for evaluate val_*, for
    inference test_*. Wrong sources and missing files are in `problems`.
    """
    if source is None:
        return SourcedData()
    files = SOURCE_FILES[action]
    if not files:
        return SourcedData(notices=[f"{action} reads no data: the data source is not used"])
    if isinstance(source, Mapping):
        return _read_mapping(files, source)
    try:
        folder = make_absolute(os.fspath(source), "data_source")
        is_folder = remote.is_folder(folder)
        if not is_folder and action == "dataset_convert" and remote.exists(folder):
            return _read_mapping(files, {"dataset_convert.data": folder})
    except UserError as error:
        return SourcedData(problems=list(error.problems))
    if not is_folder:
        got = f"{str(source)!r}, which is {'no folder' if remote.exists(folder) else 'not there'}"
        hint = "For single files give a mapping: {" + ", ".join(f"{key}: PATH" for key in files) + "}."
        return SourcedData(
            problems=[Problem("data_source", got, "a folder or a prefix such as s3://bucket/data", hint)]
        )
    return _read_folder(action, folder, given)


def _read_mapping(files: Mapping[str, str], source: Mapping[str, str]) -> SourcedData:
    found = SourcedData()
    for key, path in source.items():
        try:
            look_up(files, key, "data_source")
            found.values[key] = make_absolute(os.fspath(path), key)
        except UserError as error:
            found.problems += error.problems
    return found


def _read_folder(action: str, folder: str, given: Collection[str]) -> SourcedData:
    found = SourcedData()
    names = _list_names(folder)
    for key, stem in SOURCE_FILES[action].items():
        if key in given:
            found.notices.append(f"{key} stands in the spec: the data source {folder} is not used for it")
            continue
        wanted = FINDERS[key.rpartition(".")[2]](stem, names)
        present = [name for name in wanted if name in names]
        if present:
            found.values[key] = remote.join(folder, present[0])
        elif key not in OPTIONAL_SOURCES:
            got = f"no {' or '.join(wanted) if wanted else 'single .json file'} in {folder}"
            hint = f"Put it there, or set {key}."
            found.problems.append(Problem(key, got, "a data source", hint))
    return found


def _list_names(folder: str) -> set[str]:
    """Names of the files directly in a folder."""
    return {name for name, kind in remote.list_folder(folder).items() if kind == "file"}


def _name_recording(stem: str, names: Collection[str]) -> list[str]:
    recordings = [name for name in names if name.lower().endswith(".json")]
    return recordings if len(recordings) == 1 else []


FINDERS: dict[str, Callable[[str, Collection[str]], list[str]]] = {
    "data_path": lambda stem, names: [f"{stem}.npy"],
    "label_path": lambda stem, names: [stem + ending for ending in LABEL_ENDINGS],
    "data": _name_recording,
}
"""Last part of a data option -> the file names that serve it, the preferred one first."""


def find_missing_sources(action: str, given: Collection[str], problems: list[Problem]) -> list[Problem]:
    """One problem for each mandatory data option that has no value, but for those that a problem names already."""
    told = {problem.where for problem in problems}
    hint = "Set it in the spec or add {}=PATH, or name a folder as data_source."
    return [
        Problem(key, "nothing", "a data source, which this action cannot do without", hint.format(key))
        for key in MANDATORY_SOURCES[action]
        if key not in given and key not in told
    ]
