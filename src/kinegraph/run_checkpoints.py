"""Which checkpoint files a training run keeps: names, the newest, the best, and the pointers to them."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kinegraph.errors import CheckpointError
from kinegraph.models.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from kinegraph.run import Run
from kinegraph.run_files import BEST_METRICS_NAME, BEST_NAME, LATEST_NAME
from kinegraph.storage import point_to, write_atomically, write_json

NAME_PATTERN = re.compile(r"model_epoch_(\d{3,})_step_(\d{5,})\.pth")


def name_checkpoint(epoch: int, step: int) -> str:
    """File name for a 0-based epoch and the number of steps done in all."""
    return f"model_epoch_{epoch:03d}_step_{step:05d}.pth"


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run, the newest (by step) first; pointers are not among them."""
    found = [(match, path) for path in folder.glob("model_epoch_*.pth") if (match := NAME_PATTERN.fullmatch(path.name))]
    return [path for _, path in sorted(found, key=lambda item: (int(item[0][2]), int(item[0][1])), reverse=True)]


def find_latest(run: Run, key: str) -> tuple[Path, Checkpoint] | None:
    """The newest checkpoint of a run folder that can be read and resumed; damaged ones are passed over with a warning.

    Raises CheckpointError if there are some and none can be read (a wrong key, for one).
    """
    failure = None
    for path in list_checkpoints(run.folder):
        try:
            checkpoint = read_checkpoint(path, key)
        except CheckpointError as error:
            run.warn(f"{error} Trying the one before.")
            failure = error
            continue
        if checkpoint.training:
            return path, checkpoint
    if failure:
        raise failure
    return None


def is_better(metrics: dict[str, float], best: dict[str, Any] | None, best_metric: str = "val_acc") -> bool:
    """By best_metric, then by the other of val_acc and val_loss; a metric that is not a number never wins."""
    if any(not math.isfinite(metrics[name]) for name in ("val_acc", "val_loss")):
        return False

    def rank(values: dict[str, Any]) -> tuple[float, float]:
        order = (values["val_acc"], -values["val_loss"])
        return order if best_metric == "val_acc" else order[::-1]

    return best is None or rank(metrics) > rank(best)


def list_files(run: Run) -> dict[str, str]:
    """The pointers of a training run that are there, by role."""
    pointers = {"latest": run.folder / LATEST_NAME, "best": run.folder / BEST_NAME}
    return {role: str(path) for role, path in pointers.items() if path.exists()}


def repair_run(run: Run, path: Path, best: dict[str, Any] | None) -> dict[str, Any] | None:
    """Set right what a kill, or a resume from another folder, left: pointers, leftovers, the best checkpoint.

    `path` is the checkpoint to go on from and `best` what it knows of the best one; gives back the best that holds.
    """
    for leftover in run.folder.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)
    if path.parent.resolve() == run.folder.resolve():
        point_to(run.folder / LATEST_NAME, path)
    if best is None:
        return None
    own = run.folder / best["file"]
    if not own.is_file():
        other = path.parent / best["file"]
        if not other.is_file():
            run.warn(f"The best checkpoint so far, {other}, is not there: the best is looked for anew from here.")
            return None
        with write_atomically(own) as file:
            file.write(other.read_bytes())
    _point_to_best(run.folder, best)
    return best


def _point_to_best(folder: Path, best: dict[str, Any]) -> None:
    point_to(folder / BEST_NAME, folder / best["file"])
    shown = {name: value for name, value in best.items() if name not in ("on_interval", "replaces")}
    write_json(folder / BEST_METRICS_NAME, shown)
    if best["replaces"] and best["replaces"] != best["file"]:
        with contextlib.suppress(OSError):
            (folder / best["replaces"]).unlink(missing_ok=True)


class CheckpointKeeper:
    """Saves checkpoints under their names, moves the pointers, and removes a best one that a better one replaces.

    `best` holds the metrics, epoch, step and file of the best checkpoint so far, or None. A checkpoint saved only for
    being the best is removed once it no longer is.
    """

    def __init__(self, run: Run, key: str, best: dict[str, Any] | None) -> None:
        self.run = run
        self.key = key
        self.best = best

    def note_metrics(self, metrics: dict[str, float], epoch: int, step: int, on_interval: bool) -> bool:
        """Record the metrics of a validation; True if they are the best so far, and so to be saved."""
        if not is_better(metrics, self.best, self.run.spec.train.best_metric):
            return False
        replaced = self.best["file"] if self.best and not self.best["on_interval"] else None
        self.best = {
            **metrics,
            "epoch": epoch,
            "step": step,
            "file": name_checkpoint(epoch, step),
            "on_interval": on_interval,
            "replaces": replaced,
        }
        return True

    def save(self, epoch: int, step: int, make: Callable[[], Checkpoint]) -> Path:
        """Write a checkpoint, then point to it. A kill in between leaves a pointer that is one checkpoint old."""
        path = self.run.folder / name_checkpoint(epoch, step)
        write_checkpoint(path, make(), self.key)
        point_to(self.run.folder / LATEST_NAME, path)
        if self.best and self.best["file"] == path.name:
            _point_to_best(self.run.folder, self.best)
        return path
