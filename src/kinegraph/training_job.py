"""What a training run is given, and where it stands: plain data that `train` and `fit` share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kinegraph.data.pipeline import InputPipeline
from kinegraph.run import Run
from kinegraph.skeleton.layouts import Layout
from kinegraph.spec_input import AugmentSpec
from kinegraph.spec_train import TrainSpec


@dataclass
class TrainingJob:
    """What every process of a training run gets. Labels are int64 arrays, one for each clip, as are names."""

    run: Run
    layout: Layout
    num_classes: int
    label_map: dict[str, int]
    pipeline: InputPipeline
    augment: AugmentSpec
    train_labels: Any
    train_names: list[str]
    val_labels: Any
    seed: int
    fingerprint: dict[str, Any]
    precision: str
    resume_path: Path | None
    failure_path: Path | None = None


@dataclass
class Totals:
    """Sums over clips: loss, correct answers, count."""

    loss: float = 0.0
    correct: float = 0.0
    count: float = 0.0

    def add(self, loss: float, correct: float, count: float) -> None:
        self.loss += loss
        self.correct += correct
        self.count += count

    def compute_means(self, name: str) -> dict[str, float]:
        return {f"{name}_loss": self.loss / max(self.count, 1), f"{name}_acc": self.correct / max(self.count, 1)}


@dataclass
class Position:
    """Where training stands: `step` steps of `epoch` are done, `global_step` in all."""

    epoch: int = 0
    step: int = 0
    global_step: int = 0
    seconds: float = 0.0
    totals: Totals = field(default_factory=Totals)


def find_last_epoch(options: TrainSpec) -> int:
    """How many epochs are done when this run ends: num_epochs, or fewer if it pauses before."""
    stop = options.stop_after_epoch
    return options.num_epochs if stop < 0 else min(stop, options.num_epochs)


def has_ended(epochs_done: int, best: dict[str, Any] | None, options: TrainSpec) -> bool:
    """Whether training is over: all epochs done, or the newest validation is train.early_stopping epochs or more behind
    the best one.
    """
    if epochs_done >= find_last_epoch(options):
        return True
    if options.early_stopping == 0 or best is None:
        return False
    validated = epochs_done // options.validation_interval * options.validation_interval - 1
    return validated - int(best["epoch"]) >= options.early_stopping
