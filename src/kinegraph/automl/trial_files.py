"""Files of a trial's run folder, which may lie on this machine, on a shared disk or in object storage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from kinegraph.automl.results import CHECKPOINT_PATTERNS
from kinegraph.remote import find_version, is_remote, join, list_files, load, read_text, remove, upload, write_text
from kinegraph.run_files import BEST_METRICS_NAME, METRICS_NAME
from kinegraph.storage import make_folder, write_atomically

POPULATION_NAME = "population.json"
"""In the run folder of a trial that took over another: the values that it has had since, and where they come from."""
CHECKPOINT_SUFFIX = ".pth"


def copy_in(location: str, folder: Path) -> None:
    """Copy what training goes on from: the newest checkpoint, the best one, and the metrics so far."""
    names = [entry.name for entry in list_files(location) if "/" not in entry.name]
    checkpoints = sorted(name for name in names if name.startswith("model_epoch_") and name.endswith(CHECKPOINT_SUFFIX))
    wanted = set(checkpoints[-1:])
    if BEST_METRICS_NAME in names:
        best = json.loads(read_text(join(location, BEST_METRICS_NAME)))
        wanted |= {BEST_METRICS_NAME, best["file"]}
    wanted |= {METRICS_NAME}
    for name in sorted(wanted & set(names)):
        _fetch(join(location, name), folder / name)


def replace_with(location: str, folder: Path, state: dict[str, Any]) -> None:
    """Let a run folder go on from what `copy_in` copied of another, `state` saying so.

    In an order that a kill leaves a folder of one training at any moment: its own, none yet, or the other's.
    """
    for entry in list_files(location):
        if _is_copied(entry.name):
            remove(join(location, entry.name))
    write_text(join(location, POPULATION_NAME), json.dumps(state))
    copied = [path for path in folder.iterdir() if _is_copied(path.name)]
    for path in sorted(copied, key=lambda path: (path.suffix == CHECKPOINT_SUFFIX, path.name)):
        _put(path, join(location, path.name))


def _is_copied(name: str) -> bool:
    return name.endswith(CHECKPOINT_SUFFIX) or name in (BEST_METRICS_NAME, METRICS_NAME)


def collect(location: str, folder: Path, with_best: bool = False) -> None:
    """Copy a run folder in object storage to this machine without its checkpoints, or with the best one."""
    make_folder(folder)
    for entry in list_files(location):
        is_checkpoint = entry.name.endswith(CHECKPOINT_SUFFIX)
        is_wanted = entry.name == CHECKPOINT_PATTERNS[1] if is_checkpoint else not entry.name.startswith("tensorboard/")
        if is_wanted and (with_best or not is_checkpoint):
            load(join(location, entry.name), folder / entry.name)


def remove_all_checkpoints(location: str) -> None:
    """Remove the checkpoints of a run folder."""
    for entry in list_files(location):
        if entry.name.endswith(CHECKPOINT_SUFFIX):
            remove(join(location, entry.name))


def read_metrics_folder(location: str, folder: Path) -> Path:
    """A folder of this machine with the metrics.csv of a run folder: that one itself, or `folder`."""
    if not is_remote(location):
        return Path(location)
    if find_version(join(location, METRICS_NAME)):
        load(join(location, METRICS_NAME), folder / METRICS_NAME)
    return folder


def read_population(path: Path) -> dict[str, Any] | None:
    """What `replace_with` wrote beside a run, or None."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) and isinstance(state.get("values"), dict) else None


def _fetch(location: str, target: Path) -> None:
    if is_remote(location):
        load(location, target)
    else:
        shutil.copyfile(location, target)


def _put(source: Path, location: str) -> None:
    if is_remote(location):
        upload(source, location)
        return
    make_folder(Path(location).parent)
    with open(source, "rb") as original, write_atomically(location) as copy:
        shutil.copyfileobj(original, copy)
