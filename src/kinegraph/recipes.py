"""Recipes: values for the options of training that belong together. `kinegraph template train --recipe NAME`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kinegraph.errors import UserError, look_up


@dataclass(frozen=True)
class Recipe:
    """`values`: dotted keys of the spec -> what they are set to; all other options keep their defaults."""

    purpose: str
    values: dict[str, Any] = field(default_factory=dict)


RECIPES: dict[str, Recipe] = {
    "tao": Recipe("TAO's pose classification as it is: ST-GCN, arrays as they are"),
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


def find_recipe(name: str) -> Recipe:
    """The recipe of this name. Raises UserError, with the names that there are, for another."""
    return look_up(RECIPES, name, "recipe", UserError)
