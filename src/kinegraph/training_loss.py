"""The loss of a training step: cross entropy with what the spec adds to it, and mixing of clips."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from kinegraph.spec_train import TrainSpec


@dataclass(frozen=True)
class MixedBatch:
    """`share` of each clip and the rest of another one, whose labels are `others`. Without mixing the share is 1."""

    clips: Tensor
    labels: Tensor
    others: Tensor
    share: float = 1.0


def mix_clips(clips: Tensor, labels: Tensor, alpha: float) -> MixedBatch:
    """Mixup (Zhang et al., ICLR 2018): one share for the batch from Beta(alpha, alpha), partners from a permutation.

    Random numbers come from torch, which the caller seeds for the step. alpha 0: nothing is mixed.
    """
    if alpha == 0:
        return MixedBatch(clips, labels, labels)
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    partners = torch.randperm(len(clips)).to(clips.device)
    return MixedBatch(share * clips + (1 - share) * clips[partners], labels, labels[partners], share)


def weigh_classes(labels: np.ndarray, num_classes: int) -> Tensor:
    """Labels (N,) -> weights (classes,), inverse to how often each class occurs, 1 on average over the clips."""
    counts = np.bincount(labels, minlength=num_classes)
    present = counts > 0
    weights = np.zeros(num_classes, np.float32)
    weights[present] = len(labels) / (present.sum() * counts[present])
    return torch.from_numpy(weights)


class TrainingLoss:
    """Cross entropy with label smoothing (Szegedy et al., CVPR 2016, section 7), weights of classes (classes,), and
    distillation: train.teacher_weight of the loss is the divergence from a teacher's answers, both at
    train.teacher_temperature and times its square (Hinton et al., 2015, section 2).
    """

    def __init__(self, options: TrainSpec, class_weights: Tensor | None = None) -> None:
        self.options = options
        self.class_weights = class_weights

    def __call__(
        self,
        logits: Tensor,
        batch: MixedBatch,
        teacher_logits: Tensor | None = None,
        learned: Tensor | None = None,
    ) -> Tensor:
        """Logits (N, classes), or (streams, N, classes): the sum of the losses of the streams.

        learned: which clips count, (N,); None: all. Where none does the loss is 0.
        """
        if learned is not None and not learned.all():
            if not learned.any():
                return 0 * logits.sum()
            chosen = MixedBatch(batch.clips[learned], batch.labels[learned], batch.others[learned], batch.share)
            teacher_logits = None if teacher_logits is None else teacher_logits[learned]
            return self(logits[..., learned, :], chosen, teacher_logits)
        if logits.ndim == 3:
            return torch.stack([self(each, batch, teacher_logits) for each in logits]).sum()
        loss = self._compare(logits, batch.labels)
        if batch.share < 1:
            loss = batch.share * loss + (1 - batch.share) * self._compare(logits, batch.others)
        if teacher_logits is None:
            return loss
        weight, temperature = self.options.teacher_weight, self.options.teacher_temperature
        return (1 - weight) * loss + weight * measure_divergence(logits, teacher_logits, temperature)

    def _compare(self, logits: Tensor, labels: Tensor) -> Tensor:
        smoothing = self.options.label_smoothing
        if self.class_weights is None:
            return functional.cross_entropy(logits, labels, label_smoothing=smoothing)
        weights = self.class_weights.to(logits.device)
        # torch would divide by the weights of this batch, which takes them away again where a batch holds one class
        each = functional.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
        return (weights[labels] * each).mean()


def measure_divergence(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Mean Kullback-Leibler divergence of softened answers (N, classes) from the teacher's, times temperature²."""
    student, teacher = (values.log_softmax(dim=1) for values in (logits / temperature, teacher_logits / temperature))
    return functional.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2
