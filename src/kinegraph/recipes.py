"""Recipes: values for the options of training that belong together. `kinegraph template train --recipe NAME`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kinegraph.errors import UserError, look_up


@dataclass(frozen=True)
class Recipe:
    """`values`: dotted keys of the spec -> what they are set to; all other options keep their defaults."""

    purpose: str
    values: dict[str, Any] = field(default_factory=dict)


_CLIPS: dict[str, Any] = {
    "input.streams": ["joint", "bone", "joint_motion", "bone_motion"],
    "input.centre": "first",
    "input.scale": "first",
    "input.scale_by": "bones",
    "input.sampling": "crop_resize",
    "input.num_frames": 48,
    "input.missing": "interpolate",
    "augment.rotation_x": 20.0,
    "augment.rotation_y": 180.0,
    "augment.rotation_z": 10.0,
    "augment.scale": 0.3,
    "augment.shear": 0.2,
    "augment.noise": 0.02,
    "augment.joint_drop": 0.1,
    "augment.time_warp": 2.4,
    "augment.mirror": 0.5,
    "dataset.batch_size": 16,
    "dataset.num_workers": 0,
    "train.num_epochs": 120,
    "train.min_epoch_steps": 17,
    "train.precision": "auto",
    "train.grad_clip": 5.0,
    "train.ema_decay": 0.995,
    "train.validation_interval": 5,
    "train.checkpoint_interval": 5,
    "train.optim.optimizer_type": "torch.optim.SGD",
    "train.optim.lr": 0.05,
    "train.optim.weight_decay": 5e-4,
    "train.optim.lr_scheduler": "Cosine",
    "train.optim.min_lr": 0.0,
    "train.optim.warmup_epochs": 5,
}
"""What the recipes for whole clips share."""

_LATE: dict[str, Any] = {"model.fusion": "late", "model.fusion_weights": [1.0, 1.0, 1.0, 1.0]}
"""A network for each of the four streams. Weights fitted to validation clips were no better than equal ones."""

RECIPES: dict[str, Recipe] = {
    "tao": Recipe("TAO's pose classification as it is: ST-GCN, arrays as they are"),
    "small": Recipe(
        "whole clips, a narrow network for each of four streams, 0.35M parameters in all: laptops, edge boxes, "
        "some hundred to some thousand clips",
        {
            **_CLIPS,
            "model.model_type": "EF-GCN",
            **_LATE,
            "model.width": 0.5,
            "model.dropout": 0.2,
        },
    ),
    "balanced": Recipe(
        "whole clips, one network whose four streams meet in the middle, 0.8M parameters: where one network is wanted, "
        "to distil into or to change",
        {
            **_CLIPS,
            "model.model_type": "MB-GCN",
            "model.width": 1.5,
            "model.dropout": 0.2,
            "train.num_epochs": 150,
        },
    ),
    "best": Recipe(
        "whole clips, a network of full width for each of four streams, 1.4M parameters in all: "
        "when the time of training does not count",
        {**_CLIPS, "model.model_type": "EF-GCN", **_LATE, "model.dropout": 0.2, "train.min_epoch_steps": 34},
    ),
    "online": Recipe(
        "frame by frame: a small causal network, contiguous frames, nothing that looks ahead",
        {
            "model.model_type": "EF-GCN",
            "model.temporal_padding": "causal",
            "model.dropout": 0.2,
            "input.streams": ["joint", "bone", "joint_motion", "bone_motion"],
            "input.centre": "frame",
            "input.sampling": "contiguous",
            "input.num_frames": 48,
            "input.missing": "hold",
            "augment.rotation_x": 10.0,
            "augment.rotation_y": 45.0,
            "augment.rotation_z": 10.0,
            "augment.scale": 0.15,
            "augment.speed": 0.3,
            "dataset.batch_size": 32,
            "dataset.num_workers": 0,
            "train.num_epochs": 40,
            "train.precision": "auto",
            "train.grad_clip": 5.0,
            "train.optim.optimizer_type": "torch.optim.SGD",
            "train.optim.lr": 0.1,
            "train.optim.weight_decay": 5e-4,
            "train.optim.lr_scheduler": "Cosine",
            "train.optim.min_lr": 0.0,
            "train.optim.warmup_epochs": 5,
        },
    ),
}

DEFAULT_RECIPE = "small"
NETWORK_OF_TAO = "ST-GCN"


def choose_recipe(overrides: Sequence[str]) -> str:
    """The recipe of a training that has no spec, only `key=value` overrides, which change its values: the default one,
    or that of TAO where they ask for its network.
    """
    given = dict(override.partition("=")[::2] for override in overrides)
    return "tao" if given.get("model.model_type", "").strip("'\" ") == NETWORK_OF_TAO else DEFAULT_RECIPE


def find_recipe(name: str) -> Recipe:
    """The recipe of this name. Raises UserError, with the names that there are, for another."""
    return look_up(RECIPES, name, "recipe", UserError)
