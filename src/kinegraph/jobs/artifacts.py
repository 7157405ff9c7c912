"""Which model file of a finished job serves the next one: the best, the latest, or that of an epoch."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from kinegraph import remote
from kinegraph.config import shorten
from kinegraph.errors import DataError, Problem, UserError
from kinegraph.jobs.plain_json import parse_json
from kinegraph.run_files import BEST_METRICS_NAME, BEST_NAME, BEST_TRIAL_NAME, STATUS_NAME

SUFFIXES = (".pth", ".tlt", ".hdf5")
LEFT_OUT_FOLDER = "lightning_logs"
POINTER_MARK = "_latest"
EPOCH_PATTERN = re.compile(r"epoch[_=-]?(\d{1,9})(?:[_-]step[_=-]?(\d{1,12}))?")
MAX_EPOCH = 10**9 - 1
"""As many digits as the pattern takes."""
MAX_JSON_BYTES = 16 * 1024 * 1024
MAX_STATUS_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class Artifact:
    """A model file; `notice` says where the choice is not the obvious one."""

    location: str
    notice: str = ""


@dataclass(frozen=True)
class Candidate:
    """A checkpoint of a folder: its name below it, epoch (0-based) and step; -1 where the name does not say."""

    name: str
    epoch: int
    step: int
    modified_s: float

    @property
    def age(self) -> tuple[int, int, float, str]:
        """Sorts the newest last."""
        return self.epoch, self.step, self.modified_s, self.name


def parse_choice(text: str | int) -> str | int:
    """best, latest or the number of an epoch. Raises UserError."""
    if isinstance(text, int):
        text = str(text) if abs(text) <= MAX_EPOCH else f"a number beyond {MAX_EPOCH}"
    choice = text.strip().lower()
    if choice in CHOICES:
        return choice
    if choice.isascii() and choice.isdigit() and len(choice) <= len(str(MAX_EPOCH)):
        return int(choice)
    raise UserError(Problem("checkpoint", shorten(text), "best, latest, or the number of an epoch, counted from 0"))


def find_model(folder: str, choice: str | int = "best") -> Artifact:
    """The checkpoint in the results folder of a training or of an AutoML search (then of its best trial).

    `choice` is best (by val_acc), latest, or an epoch (0-based, as in the names of the files). Raises DataError.
    """
    choice = parse_choice(choice)
    entries = remote.list_files(folder)
    names = {entry.name for entry in entries}
    results = _find_nearest(names, BEST_TRIAL_NAME)
    if results is not None:
        place = remote.join(folder, *PurePosixPath(results).parts[:-1])
        return _find_best_trial(place, results, choice) if choice != "best" else _find_searched(place)
    candidates = [
        Candidate(entry.name, *_read_name(entry.name), entry.modified_s)
        for entry in entries
        if is_candidate(entry.name)
    ]
    if isinstance(choice, int):
        return _find_epoch(folder, candidates, choice)
    return CHOICES[choice](folder, names, candidates)


def find_onnx(folder: str) -> str:
    """The newest exported model in a results folder. Raises DataError."""
    found = [entry for entry in remote.list_files(folder) if entry.name.lower().endswith(".onnx")]
    if not found:
        hint = "See the log of the export job."
        raise DataError(Problem(folder, "no .onnx file", "the model of an export", hint))
    return remote.join(folder, max(found, key=lambda entry: (entry.modified_s, entry.name)).name)


def is_candidate(name: str) -> bool:
    """Whether a file name (below a results folder) is a checkpoint, and neither a pointer nor a logger's copy."""
    path = PurePosixPath(name)
    return (
        path.suffix.lower() in SUFFIXES
        and LEFT_OUT_FOLDER not in path.parts
        and POINTER_MARK not in path.name
        and path.name != BEST_NAME
        and not path.name.startswith(".")
    )


def _read_name(name: str) -> tuple[int, int]:
    match = EPOCH_PATTERN.search(PurePosixPath(name).name)
    return (int(match[1]), int(match[2] or -1)) if match else (-1, -1)


def _find_nearest(names: set[str], wanted: str) -> str | None:
    """The file of this name that lies least deep."""
    found = [name for name in names if PurePosixPath(name).name == wanted]
    return min(found, key=lambda name: (name.count("/"), name), default=None)


def _find_best(folder: str, names: set[str], candidates: Sequence[Candidate]) -> Artifact:
    """By our best.json, else by val_acc in status.json, else the latest one."""
    metrics = _find_nearest(names, BEST_METRICS_NAME)
    if metrics is not None:
        named = _read_json(remote.join(folder, metrics)).get("file")
        name = str(PurePosixPath(metrics).parent / PurePosixPath(str(named)).name)
        if name in names:
            return Artifact(remote.join(folder, name))
    pointer = _find_nearest(names, BEST_NAME)
    if pointer is not None:
        return Artifact(remote.join(folder, pointer))
    latest = _find_latest(folder, names, candidates)
    status = _find_nearest(names, STATUS_NAME)
    scores = read_scores(remote.join(folder, status)) if status else {}
    scored = [candidate for candidate in candidates if candidate.epoch in scores]
    if scored:
        best = max(scored, key=lambda candidate: (scores[candidate.epoch], candidate.age))
        return Artifact(remote.join(folder, best.name))
    return Artifact(
        latest.location, f"{folder} does not say which checkpoint has the best val_acc: the latest is taken"
    )


def _find_latest(folder: str, names: set[str], candidates: Sequence[Candidate]) -> Artifact:
    if not candidates:
        hint = "Was it a training, and did it reach its first checkpoint? See its log."
        raise DataError(Problem(folder, "no checkpoint", "a file " + ", ".join(SUFFIXES), hint))
    return Artifact(remote.join(folder, max(candidates, key=lambda candidate: candidate.age).name))


def _find_epoch(folder: str, candidates: Sequence[Candidate], epoch: int) -> Artifact:
    found = [candidate for candidate in candidates if candidate.epoch == epoch]
    if not found:
        epochs = sorted({candidate.epoch for candidate in candidates if candidate.epoch >= 0})
        expected = "one of the epochs " + ", ".join(map(str, epochs[:50])) if epochs else "a folder with checkpoints"
        raise DataError(Problem(f"{folder}: checkpoint", f"epoch {epoch}", expected))
    return Artifact(remote.join(folder, max(found, key=lambda candidate: candidate.age).name))


CHOICES: dict[str, Callable[[str, set[str], Sequence[Candidate]], Artifact]] = {
    "best": _find_best,
    "latest": _find_latest,
}
"""What a checkpoint may be called, beside the number of an epoch."""


def _find_searched(folder: str) -> Artifact:
    """The checkpoint that best_rec.json names, if it lies in this folder; else the copy beside it."""
    best = _read_best(folder)
    uri = str(best.get("checkpoint_uri") or "")
    name = PurePosixPath(uri).name
    trial = _name_trial(best)
    inside = uri.startswith(f"{folder.rstrip('/')}/") and ".." not in PurePosixPath(uri).parts
    places = [uri] if inside else []
    if name and name not in (".", ".."):
        places.append(remote.join(folder, trial, name))
    places.append(remote.join(folder, BEST_NAME))
    for place in places:
        if remote.exists(place):
            return Artifact(place)
    hint = f"{BEST_TRIAL_NAME} names it; was it removed?"
    raise DataError(Problem(folder, f"no checkpoint of {trial}", "that of the best trial", hint))


def _find_best_trial(folder: str, results: str, choice: str | int) -> Artifact:
    """The latest checkpoint of the best trial, or that of an epoch."""
    trial = remote.join(folder, _name_trial(_read_best(folder)))
    if remote.is_folder(trial):
        return find_model(trial, choice)
    hint = "Take the best: only its checkpoint is kept of a search."
    raise DataError(Problem(trial, "no such folder", "the run folder of the best trial", hint))


def _read_best(folder: str) -> dict[str, Any]:
    location = remote.join(folder, BEST_TRIAL_NAME)
    best = _read_json(location).get("best")
    if not isinstance(best, dict) or type(best.get("rec_id")) is not int:
        raise DataError(Problem(f"{location}: best", "no trial", "the best trial: did any of them succeed?"))
    return best


def _name_trial(best: dict[str, Any]) -> str:
    return f"trial_{best['rec_id']:03d}"


def _read_json(location: str) -> dict[str, Any]:
    try:
        content = parse_json(remote.read_text(location, MAX_JSON_BYTES))
    except ValueError as error:
        raise DataError(Problem(location, f"text that is not JSON ({error})", "JSON")) from None
    if not isinstance(content, dict):
        raise DataError(Problem(location, f"a {type(content).__name__}", "a mapping"))
    return content


def read_status(location: str) -> list[dict[str, Any]]:
    """The lines of a status.json; those that are no JSON objects, such as one torn by a kill, are left out."""
    lines = []
    for text in remote.read_text(location, MAX_STATUS_BYTES).splitlines():
        try:
            line = parse_json(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def read_scores(location: str) -> dict[int, float]:
    """Epoch -> val_acc, from a status.json; the last one counts where an epoch was trained twice."""
    scores = {}
    for line in read_status(location):
        kpi = line.get("kpi")
        score = kpi.get("val_acc") if isinstance(kpi, dict) else None
        epoch = line.get("epoch")
        # no integer of hundreds of digits, which is no float, and no NaN, which is in no range
        if type(epoch) is int and isinstance(score, int | float) and abs(score) <= sys.float_info.max:
            scores[epoch] = float(score)
    return scores
