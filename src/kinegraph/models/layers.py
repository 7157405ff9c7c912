"""What several networks are made of."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from kinegraph.models.folded import fold_batch_norm

if TYPE_CHECKING:
    from numpy.typing import NDArray


class StridedPointwise(nn.Conv2d):
    """A 1x1 convolution of every stride-th frame: nn.Conv2d, but safe in bfloat16 on a CPU.

    The library that torch computes it with there (oneDNN 3.12) writes beyond its memory in the gradient of the weights
    if the input has a number of channels that 16 does not divide. Without a stride it does not.
    """

    def __init__(self, before: int, after: int, stride: int, bias: bool = False) -> None:
        super().__init__(before, after, 1, (stride, 1), bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, T, V) -> (N, C', ceil(T / stride), V)."""
        if self.training and torch.is_autocast_enabled(x.device.type):
            return functional.conv2d(x[:, :, :: self.stride[0]], self.weight, self.bias)
        return super().forward(x)


class FrameNorm(nn.BatchNorm1d):
    """nn.BatchNorm1d over (N, C, T), but one value in each channel is normalised as in inference: it has no variance.

    A last batch of one clip comes to that, where the clip is no longer than what one frame of the map stands for.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, T) -> the same shape."""
        if self.training and x.shape[0] * x.shape[2] == 1:
            statistics = (self.running_mean, self.running_var)
            return functional.batch_norm(x, *statistics, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


def mark_real_frames(x: Tensor) -> Tensor:
    """(N, C, T, V, M) -> (N, M, T), true up to the last frame in which a person has a value that is not zero.

    A person without any is absent: no frame is real. If all people of a clip are, all its frames count as real.
    """
    has_values = (x != 0).any(dim=3).any(dim=1).transpose(1, 2)  # (N, M, T)
    is_real = has_values.flip(2).cumsum(dim=2).flip(2) > 0  # cummax says the same; ONNX lacks it
    return is_real | ~is_real.any(dim=2, keepdim=True).any(dim=1, keepdim=True)


def skip_frames(x: Tensor, stride: int) -> Tensor:
    """(N, C, T) -> (N, C, ceil(T / stride)): every stride-th frame.

    As the maximum of one frame, not as a slice: PyTorch's exporter then sees that maps and marks stay equally long.
    And not as max_pool1d, for which the exporter fixes the number of frames.
    """
    return functional.max_pool2d(x, 1, (1, stride))


def weigh_real_frames(x: Tensor, stride: int) -> Tensor:
    """Clips (N, C, T, V, M) -> weights (N, M, T') of people and frames of a map, adding up to 1 for each clip.

    All real frames weigh the same, padding and absent people nothing. stride: frames of x from one of the map to the
    next.
    """
    weights = skip_frames(mark_real_frames(x).to(x.dtype), stride)
    return weights / weights.sum(dim=(1, 2), keepdim=True)


def weigh_all_frames(x: Tensor, stride: int) -> Tensor:
    """The same where every frame of everybody counts, there or not."""
    clips, _, frames, _, people = x.shape
    size = -(-frames // stride)
    return x.new_full((clips, people, size), 1 / (people * size))


def mean_over_real_frames(features: Tensor, x: Tensor, stride: int) -> Tensor:
    """Features (N, M, C', T', V) of clips x (N, C, T, V, M) -> their mean over joints and real frames (N, C').

    stride: frames of x from one of the features to the next.
    """
    weights = weigh_real_frames(x, stride).to(features.dtype)
    return torch.einsum("nmct,nmt->nc", features.mean(dim=4), weights)


def mix_joints(mixing: Tensor, x: Tensor) -> Tensor:
    """mixing (W, V), x (N, T, V, C) -> (N, T, W, C).

    As a batch of small products: torch.matmul would transpose x in memory, and back, to make one large product of it.
    """
    clips, frames, joints, channels = x.shape
    batch = mixing.expand(clips * frames, -1, -1)
    return torch.bmm(batch, x.reshape(clips * frames, joints, channels)).unflatten(0, (clips, frames))


def fold_norm(weight: Tensor, bias: Tensor, norm: nn.Module) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Weight (..., C') and bias (..., C') with the batch normalisation that comes after them."""
    assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    parts = [weight, bias, norm.weight, norm.bias, norm.running_mean, norm.running_var]
    return fold_batch_norm([part.detach().double().numpy() for part in parts], norm.eps)
