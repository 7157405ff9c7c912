"""How long an epoch takes, from a step or two on this machine: enough for the plan of a search."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np

from kinegraph.data.arrays import cast_to_float32, open_array
from kinegraph.data.augment import choose_augmentation
from kinegraph.data.pipeline import build_pipeline
from kinegraph.errors import KinegraphError
from kinegraph.remote import fetch
from kinegraph.skeleton.layouts import get_layout
from kinegraph.spec import Spec

FORWARD_SHARE = 1 / 3
"""A forward pass takes about a third of a training step."""
MAX_MEASURED_STEPS = 3
ENOUGH_S = 3.0


def estimate_epoch_seconds(spec: Spec) -> float | None:
    """Seconds of one epoch with its share of validations, by one process; None where that cannot be told (data not
    here, a GPU full).

    Measured on the first clips: input steps, augmentation, forward and backward pass. Reading the data, the optimizer
    and a teacher are not counted.
    """
    from kinegraph.data.dataset import EpochBatchSampler

    data, train = spec.dataset, spec.train
    try:
        clips = open_array(fetch(data.train_dataset.data_path))
        num_val_clips = len(open_array(fetch(data.val_dataset.data_path)))
        step_s = _measure_step(spec, cast_to_float32(clips[: data.batch_size]))
    except (KinegraphError, RuntimeError, MemoryError):
        return None
    sampler = EpochBatchSampler(len(clips), data.batch_size, seed=0, min_batches=train.min_epoch_steps)
    validation_steps = math.ceil(num_val_clips / data.batch_size) / train.validation_interval
    return step_s * (sampler.batches_per_epoch + FORWARD_SHARE * validation_steps)


def _measure_step(spec: Spec, first_clips: np.ndarray[Any, Any]) -> float:
    import torch

    from kinegraph.data.transforms import TrainingAugmentation
    from kinegraph.devices import choose_precision
    from kinegraph.models import build_model

    data, layout = spec.dataset, get_layout(spec.model.graph_layout)
    pipeline = build_pipeline(spec.input, first_clips.shape[1], layout)
    changes, _ = choose_augmentation(spec.augment, pipeline, list(data.label_map or {}), layout.symmetric)
    augment = TrainingAugmentation(
        *(data.window_size, data.random_choose, data.random_move, 0), *(pipeline, changes, layout.symmetric)
    )
    device = torch.device("cuda" if spec.train.accelerator != "cpu" and torch.cuda.is_available() else "cpu")
    is_narrow = choose_precision(spec.train.precision, device.type) == "bf16"
    network = build_model(spec.model, layout, data.num_classes, pipeline.output_channels).to(device)
    clips, numbers = torch.from_numpy(first_clips.copy()).to(device), np.arange(len(first_clips))

    def step() -> float:
        started_s = time.monotonic()
        with torch.autocast(device.type, torch.bfloat16, enabled=is_narrow):
            logits = network(augment(clips, numbers, 0))
        logits.float().sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.monotonic() - started_s

    step()
    times: list[float] = []
    while len(times) < MAX_MEASURED_STEPS and sum(times) < ENOUGH_S:
        times.append(step())
    return min(times)
