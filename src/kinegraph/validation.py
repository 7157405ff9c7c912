"""Validation after an epoch, and what is fitted on it: the weights of fused streams and the temperature."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn import functional

from kinegraph.calibration import fit_temperature
from kinegraph.data.dataset import Batch
from kinegraph.models.late_fusion import LateFusion, fit_fusion_weights
from kinegraph.training_job import Totals

FITTED_CLIPS = 20_000
"""What is fitted takes so many clips at most, evenly spread: enough for a handful of numbers."""


class Answers:
    """Logits and labels of a validation, as many as are fitted on."""

    def __init__(self, num_clips: int) -> None:
        self.stride = -(-num_clips // FITTED_CLIPS)
        self.seen = 0
        self.logits: list[Tensor] = []
        self.labels: list[Tensor] = []

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Logits (N, classes) or (streams, N, classes) of the next clips."""
        first = -self.seen % self.stride
        self.seen += len(labels)
        # Copies: a slice would keep all of its batch in memory
        self.logits.append(logits[..., first :: self.stride, :].float().cpu().clone())
        self.labels.append(labels[first :: self.stride].cpu().clone())

    def gather(self, fabric: Fabric) -> tuple[Tensor, Tensor]:
        """Those of all processes."""
        logits, labels = torch.cat(self.logits, dim=-2), torch.cat(self.labels)
        if fabric.world_size == 1:
            return logits, labels
        parts: list[Any] = [None] * fabric.world_size
        torch.distributed.all_gather_object(parts, (logits, labels))
        return torch.cat([part[0] for part in parts], dim=-2), torch.cat([part[1] for part in parts])


@torch.no_grad()
def measure_network(
    network: nn.Module, batches: Iterable[tuple[Batch, int]], answers: Answers, autocast: Callable[[], Any]
) -> Totals:
    """Sums over the clips that count of each batch; `answers` gets their logits, of fused streams those of each.

    `autocast()` is the context, of a lower precision perhaps, in which the network runs; all else is in float32.
    """
    network.eval()
    totals = Totals()
    for batch, valid in batches:
        labels = batch.labels[:valid]
        with autocast():
            each = network.forward_branches(batch.data) if isinstance(network, LateFusion) else network(batch.data)
        each = each[..., :valid, :].float()
        logits = network.fuse(each) if isinstance(network, LateFusion) else each
        answers.add(each, labels)
        if valid:
            loss = functional.cross_entropy(logits, labels, reduction="sum").item()
            totals.add(loss, (logits.argmax(1) == labels).sum().item(), valid)
    return totals


def fit_answers(network: nn.Module, logits: Tensor, labels: Tensor, fits_weights: bool) -> float:
    """The temperature that calibrates the network; of fused streams also set their weights, if that is asked."""
    if isinstance(network, LateFusion):
        if fits_weights:
            network.fusion_weights.copy_(fit_fusion_weights(logits, labels))
        logits = network.fuse(logits.to(network.fusion_weights.device)).cpu()
    return fit_temperature(logits.double().numpy(), labels.numpy())
