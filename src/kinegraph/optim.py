"""Optimizers and learning-rate schedules. The learning rate is a function of the position in training, so that a
resumed run needs nothing but that position (and, for AutoReduce, two numbers)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from kinegraph.spec_train import OptimSpec

PLATEAU_THRESHOLD = 1e-4


def build_optimizer(options: OptimSpec, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that `options.optimizer_type` names; momentum and nesterov belong to SGD."""
    shared: dict[str, Any] = {"lr": options.lr, "weight_decay": options.weight_decay}
    match options.optimizer_type:
        case "torch.optim.SGD":
            return torch.optim.SGD(parameters, momentum=options.momentum, nesterov=options.nesterov, **shared)
        case "torch.optim.Adam":
            return torch.optim.Adam(parameters, **shared)
        case "torch.optim.Adamax":
            return torch.optim.Adamax(parameters, **shared)
        case "torch.optim.AdamW":
            return torch.optim.AdamW(parameters, **shared)


class LearningRateSchedule:
    """The learning rate for every step: MultiStep and AutoReduce by epoch, Cosine by step, each after a warm-up.

    AutoReduce multiplies by lr_decay once the watched loss has not fallen (by a relative 1e-4) for more than `patience`
    epochs, down to min_lr: the rule of torch's ReduceLROnPlateau. Cosine: SGDR (Loshchilov and Hutter 2017), eq. 5,
    without restarts.
    """

    def __init__(self, options: OptimSpec, num_epochs: int, steps_per_epoch: int) -> None:
        self.options = options
        self.num_epochs = num_epochs
        self.steps_per_epoch = steps_per_epoch
        self.plateau_lr = options.lr
        self.best_loss = math.inf
        self.bad_epochs = 0

    def compute_lr(self, epoch: int, step: int) -> float:
        """The learning rate of a step (0-based in its epoch)."""
        options = self.options
        done = epoch * self.steps_per_epoch + step
        warmup_steps = options.warmup_epochs * self.steps_per_epoch
        if done < warmup_steps:
            return options.lr * (done + 1) / warmup_steps
        if options.lr_scheduler == "MultiStep":
            return options.lr * options.lr_decay ** sum(epoch >= start for start in options.lr_steps)
        if options.lr_scheduler == "AutoReduce":
            return self.plateau_lr
        lowest = min(options.min_lr, options.lr)
        progress = (done - warmup_steps) / max(self.num_epochs * self.steps_per_epoch - warmup_steps, 1)
        return lowest + (options.lr - lowest) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))

    def finish_epoch(self, losses: dict[str, float]) -> None:
        """Tell AutoReduce the losses of the epoch; an epoch without the watched one changes nothing."""
        loss = losses.get(self.options.lr_monitor)
        if self.options.lr_scheduler != "AutoReduce" or loss is None:
            return
        if loss < self.best_loss * (1 - PLATEAU_THRESHOLD):
            self.best_loss, self.bad_epochs = loss, 0
        else:
            self.bad_epochs += 1
        if self.bad_epochs > self.options.patience:
            lowest = min(self.options.min_lr, self.options.lr)
            self.plateau_lr = max(self.plateau_lr * self.options.lr_decay, lowest)
            self.bad_epochs = 0

    def state_dict(self) -> dict[str, float]:
        """What AutoReduce remembers."""
        return {"plateau_lr": self.plateau_lr, "best_loss": self.best_loss, "bad_epochs": self.bad_epochs}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from `state_dict`."""
        self.plateau_lr = state["plateau_lr"]
        self.best_loss = state["best_loss"]
        self.bad_epochs = int(state["bad_epochs"])
