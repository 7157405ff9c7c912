"""Where training metrics go besides status.json: metrics.csv, TensorBoard and Weights & Biases."""

from __future__ import annotations

import csv
import importlib.util
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kinegraph.run import Run, redact
from kinegraph.spec import WandbSpec
from kinegraph.storage import write_atomically

COLUMNS = ("epoch", "step", "lr", "train_loss", "train_acc", "val_loss", "val_acc", "seconds")


class TrainLog:
    """Writes one row of metrics per epoch; only rank 0 makes one."""

    def __init__(self, run: Run, first_epoch: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = run.folder / "metrics.csv"
        self.rows = [row for row in _read_rows(self.path) if int(row["epoch"]) < first_epoch]
        self.tensorboard = SummaryWriter(str(run.folder / "tensorboard"), purge_step=first_epoch)
        self.wandb = _open_wandb(run)
        self.run = run

    def write_epoch(self, row: dict[str, Any]) -> None:
        """Add the metrics of one epoch (keys of COLUMNS; those not measured are left out)."""
        self.rows.append({name: row.get(name, "") for name in COLUMNS})
        with write_atomically(self.path, "w") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
        for name in COLUMNS[2:]:
            if name in row:
                self.tensorboard.add_scalar(name, row[name], row["epoch"])
        self.tensorboard.flush()
        if self.wandb is not None:
            try:
                self.wandb.log(row, step=row["step"])
            except Exception as error:  # a tracker must never fail a run
                self.run.warn(f"Weights & Biases stopped: {type(error).__name__}: {error}")
                self.wandb = None

    def close(self) -> None:
        """Finish the trackers."""
        self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()


def _read_rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _open_wandb(run: Run) -> Any:
    options = run.spec.wandb
    if not options.enable:
        return None
    missing = _find_missing_for_wandb()
    if missing:
        run.info(f"Weights & Biases is off: {missing}. (wandb.enable=false silences this line.)")
        return None
    import wandb

    try:
        return wandb.init(dir=str(run.folder), config=redact(run.spec), **_translate_wandb(options))
    except Exception as error:  # a tracker must never fail a run
        run.warn(f"Weights & Biases is off: {type(error).__name__}: {error}")
        return None


def _find_missing_for_wandb() -> str:
    if importlib.util.find_spec("wandb") is None:
        return "wandb is not installed"
    if not os.environ.get("WANDB_API_KEY") and os.environ.get("WANDB_MODE") not in ("offline", "disabled"):
        return "WANDB_API_KEY is not set (or set WANDB_MODE=offline)"
    return ""


def _translate_wandb(options: WandbSpec) -> dict[str, Any]:
    given = asdict(options)
    given.pop("enable")
    given["id"] = given.pop("run_id")
    if given["id"]:
        given["resume"] = "allow"
    return {name: value for name, value in given.items() if value not in ("", [])}
