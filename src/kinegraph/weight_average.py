"""The exponential moving average of a network's weights, which often answers better than the last weights do."""

from __future__ import annotations

import copy

import torch
from torch import nn

WARM_UP_STEPS = 10


class WeightAverage:
    """A copy of the network whose weights follow the trained ones: average = d * average + (1 - d) * weights.

    d is `decay`, but at most (1 + steps) / (10 + steps), so that the random first weights are soon forgotten (as in
    TensorFlow's ExponentialMovingAverage). The statistics of normalisations are averaged with them.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, network: nn.Module, num_steps: int) -> None:
        """Take in the weights after a training step, `num_steps` in all."""
        decay = min(self.decay, (1 + num_steps) / (WARM_UP_STEPS + num_steps))
        own, new = self.network.state_dict(), network.state_dict()
        averaged = [name for name, tensor in own.items() if tensor.is_floating_point()]
        torch._foreach_lerp_([own[name] for name in averaged], [new[name] for name in averaged], 1 - decay)
        for name in own.keys() - set(averaged):
            own[name].copy_(new[name])
