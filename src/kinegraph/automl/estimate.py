"""How long an epoch takes, from a step or two on this machine: enough for the plan of a search."""

from __future__ import annotations

import math
import time

from kinegraph.data.arrays import open_array
from kinegraph.errors import KinegraphError
from kinegraph.remote import fetch
from kinegraph.skeleton.layouts import get_layout
from kinegraph.spec import Spec

FORWARD_SHARE = 1 / 3
"""A forward pass takes about a third of a training step."""
MAX_MEASURED_STEPS = 3
ENOUGH_S = 3.0


def estimate_epoch_seconds(spec: Spec) -> float | None:
    """Seconds of one epoch with validation, by one process; None where that cannot be told (data not here, a GPU full).

    Measured on zeros in the shape of the data, after one step to warm up. Reading the data is not counted.
    """
    try:
        data = open_array(fetch(spec.dataset.train_dataset.data_path))
        num_val_clips = len(open_array(fetch(spec.dataset.val_dataset.data_path)))
        step_s = _measure_step(spec, data.shape)
    except (KinegraphError, RuntimeError, MemoryError):
        return None
    batch_size = spec.dataset.batch_size
    num_steps = math.ceil(len(data) / batch_size)
    return step_s * (num_steps + FORWARD_SHARE * math.ceil(num_val_clips / batch_size))


def _measure_step(spec: Spec, shape: tuple[int, ...]) -> float:
    import torch

    from kinegraph.models import build_model

    num_clips, channels, frames, joints, people = shape
    if spec.dataset.window_size > 0:
        frames = spec.dataset.window_size
    on_gpu = spec.train.accelerator != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    network = build_model(spec.model, get_layout(spec.model.graph_layout), spec.dataset.num_classes).to(device)
    clips = torch.zeros(min(spec.dataset.batch_size, num_clips), channels, frames, joints, people, device=device)

    def step() -> float:
        started_s = time.monotonic()
        network(clips).sum().backward()
        if on_gpu:
            torch.cuda.synchronize()
        return time.monotonic() - started_s

    step()
    times: list[float] = []
    while len(times) < MAX_MEASURED_STEPS and sum(times) < ENOUGH_S:
        times.append(step())
    return min(times)
