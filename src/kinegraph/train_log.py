"""Where training metrics go besides status.json: metrics.csv, TensorBoard and Weights & Biases."""

from __future__ import annotations

import csv
import importlib.util
import os
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kinegraph.run import Run, find_encryption_key, format_duration, format_eta, redact
from kinegraph.run_files import METRICS_NAME
from kinegraph.spec import WandbSpec
from kinegraph.storage import write_atomically
from kinegraph.training_job import find_last_epoch

COLUMNS = ("epoch", "step", "lr", "train_loss", "train_acc", "val_loss", "val_acc", "seconds")


class TrainLog:
    """Writes one row of metrics per epoch; only rank 0 makes one."""

    def __init__(self, run: Run, first_epoch: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = run.folder / METRICS_NAME
        self.rows = _read_rows(self.path, first_epoch)
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

    def report_epoch(
        self, row: dict[str, Any], losses: dict[str, float], epoch_s: float, steps: int, num_batches: int, left_s: float
    ) -> None:
        """Log an epoch of so many steps, and tell the user and status.json about it.

        num_batches: steps of a whole epoch, of which a resumed run may have done some before.
        """
        self.write_epoch({**row, "seconds": round(epoch_s, 3)})
        train, epoch, step_s = self.run.spec.train, row["epoch"], epoch_s / max(steps, 1)
        numbers = "  ".join(f"{name} {value:.4f}" for name, value in losses.items())
        eta = f", {format_duration(left_s)} left" if epoch < find_last_epoch(train) - 1 else ""
        self.run.info(f"epoch {epoch + 1} of {train.num_epochs}: {numbers}  lr {row['lr']:.4g}  ({epoch_s:.1f} s{eta})")
        self.run.write_status(
            "RUNNING",
            f"Epoch {epoch + 1} of {train.num_epochs} is done.",
            kpi=losses,
            epoch=epoch,
            step=row["step"],
            max_epoch=train.num_epochs - 1,
            max_step=train.num_epochs * num_batches,
            time_per_epoch=format_eta(step_s * num_batches),
            time_per_step=format_eta(step_s),
            eta=format_eta(left_s),
        )

    def close(self) -> None:
        """Finish the trackers."""
        self.tensorboard.close()
        if self.wandb is not None:
            try:
                self.wandb.finish()
            except Exception as error:  # a tracker must never fail a run
                self.run.warn(f"Weights & Biases did not finish: {type(error).__name__}: {error}")


def _read_rows(path: Path, first_epoch: int) -> list[dict[str, Any]]:
    """The whole rows of the epochs before `first_epoch`; a row that something damaged is dropped."""
    rows: list[dict[str, Any]] = []
    if not path.is_file():
        return rows
    # After a csv.Error, what follows cannot be told apart into rows
    with open(path, newline="", encoding="utf-8", errors="replace") as file, suppress(csv.Error):
        rows.extend(row for row in csv.DictReader(file) if _is_whole(row))
    return [row for row in rows if int(row["epoch"]) < first_epoch]


def _is_whole(row: dict[Any, Any]) -> bool:
    try:
        int(row["epoch"])
        [float(row[name] or 0) for name in COLUMNS]
    except (KeyError, TypeError, ValueError):
        return False
    return len(row) == len(COLUMNS) and None not in row.values()


def _open_wandb(run: Run) -> Any:
    options = run.spec.wandb
    if not options.enable:
        return None
    missing = _find_missing_for_wandb()
    if missing:
        run.info(f"Weights & Biases is off: {missing}. (wandb.enable=false silences this line.)")
        return None
    if _is_key_on_command_line(find_encryption_key(run.spec)):
        hint = "Give the key in KINEGRAPH_ENCRYPTION_KEY."
        run.warn(f"Weights & Biases is off: it stores the command line, and the encryption key is on it. {hint}")
        return None
    try:
        import wandb

        return wandb.init(dir=str(run.folder), config=run.show(redact(run.spec)), **_translate_wandb(options))
    except Exception as error:  # a tracker must never fail a run
        run.warn(f"Weights & Biases is off: {type(error).__name__}: {error}")
        return None


def _find_missing_for_wandb() -> str:
    if importlib.util.find_spec("wandb") is None:
        return "wandb is not installed"
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") in ("offline", "disabled") or _has_login():
        return ""
    return "there is no key of it (`wandb login` or WANDB_API_KEY; or set WANDB_MODE=offline)"


def _has_login() -> bool:
    """Whether `wandb login` left a key. Asked of wandb itself, which looks it up without asking the user."""
    try:
        import wandb

        return bool(wandb.api.api_key)
    except Exception:  # another version, or a damaged installation: then the variable has to be set
        return False


def _is_key_on_command_line(key: str) -> bool:
    """Also where it is written with quotes or escapes, so that its text differs."""
    if not key:
        return False
    return any(key in text or text.strip().startswith("encryption_key") for text in sys.argv[1:])


def _translate_wandb(options: WandbSpec) -> dict[str, Any]:
    given = asdict(options)
    given.pop("enable")
    given["id"] = given.pop("run_id")
    if given["id"]:
        given["resume"] = "allow"
    return {name: value for name, value in given.items() if value not in ("", [])}
