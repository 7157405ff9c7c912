"""DD-Net: distances between joints and two motions in 1-D convolutions, for sets of some hundred clips.

Yang et al., Make Skeleton-based Action Recognition Model Smaller, Faster and Better, ACM Multimedia Asia 2019,
section 3. Three streams (the distances of all pairs of joints, the motion from frame to frame, and the motion over two
frames at half the rate) meet and go through three stages of convolutions over time. 64 filters are the paper's 1.8M
parameters; width 0.5 and 0.25 are its smaller networks.

Ours: motions look back, not ahead, so that the network can be causal; each step of the dense layers before the
classifier is done frame by frame and the mean over real frames comes last, where the paper takes the maximum over
frames first: the score then splits over people and frames. People are treated one by one.

Frames of padding and absent people (all zeros) count nowhere: a clip and the same clip with padding have one answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from kinegraph.models.folded import Padding
from kinegraph.models.layers import FrameNorm, skip_frames
from kinegraph.models.stages import MarkedNetwork, mark_frames, scale_channels

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kinegraph.spec import ModelSpec

FILTERS = 64
DEPTH = 2
STAGES = (2, 4, 8)
"""Factors of the filters; the distances and the slow motion are halved in time before, and each stage but the last
one halves it after."""
TOTAL_STRIDE = 8
DENSE = 128
"""Channels of both dense layers; they stay as they are with fewer filters, as in the paper."""
LEAK = 0.2
MOST_COORDINATES = 3
STREAM_DROPOUT = 0.2
"""Dropout of whole channels between convolutions, for each 1 of options.dropout: 0.1 at the paper's 0.5."""
KERNEL = 3


class DDNet(MarkedNetwork):
    """options.width scales the filters, options.depth is the number of convolutions in a stage, 0: 2.

    With options.temporal_padding "causal" nothing looks at a later frame. Distances are taken of the coordinates of the
    first stream: options.coordinates channels of a joint, 0: the first three, or all if there are fewer. Motions are
    taken of all channels. The adjacency (K, V, V) only tells the number of joints.
    """

    pairs: Tensor
    total_stride = TOTAL_STRIDE

    def __init__(
        self,
        options: ModelSpec,
        adjacency: Tensor | NDArray[np.float32],
        num_classes: int,
        num_channels: int | None = None,
    ) -> None:
        super().__init__()
        num_channels = num_channels or options.input_channels
        num_joints = int(adjacency.shape[-1])
        self.padding: Padding = options.temporal_padding
        self.num_coordinates = min(options.coordinates or MOST_COORDINATES, options.input_channels, num_channels)
        self.register_buffer("pairs", torch.triu_indices(num_joints, num_joints, 1), persistent=False)
        filters = scale_channels(FILTERS, options)
        dropout = STREAM_DROPOUT * options.dropout
        self.distances = self._build_stream(self.pairs.shape[1], filters, dropout)
        self.slow_motion = self._build_stream(num_joints * num_channels, filters, dropout)
        self.fast_motion = self._build_stream(num_joints * num_channels, filters, dropout)
        before = 3 * filters
        stages = []
        for factor in STAGES:
            stages.append(Stage(before, factor * filters, options.depth or DEPTH, self.padding, dropout))
            before = factor * filters
        self.stages = nn.ModuleList(stages)
        self.dense = nn.Sequential(Convolution(before, DENSE, 1, self.padding), nn.Dropout(options.dropout))
        self.last = Convolution(DENSE, DENSE, 1, self.padding)
        self.dropout = nn.Dropout(options.dropout)
        self.fcn = nn.Linear(DENSE, num_classes)

    def _build_stream(self, channels: int, filters: int, dropout: float) -> Stream:
        return Stream(channels, filters, self.padding, dropout)

    def forward_features(self, x: Tensor, marked_by: Tensor | None = None) -> Tensor:
        """(N, C, T, V, M) -> (N, M, C', T', 1): the map whose mean is classified. No joints are left in it."""
        clips, people = x.shape[0], x.shape[4]
        is_real = mark_frames(x if marked_by is None else marked_by)
        poses = x.permute(0, 4, 1, 2, 3).flatten(0, 1)  # (N*M, C, T, V)
        distances, slow, fast = self.measure(poses)
        y = self.distances(distances, is_real), self.slow_motion(slow, is_real)
        halves = [halve(part, is_real, self.padding) for part in y]
        is_real = skip_frames(is_real, 2)
        z = torch.cat([*halves, self.fast_motion(fast, is_real)], dim=1)
        for i, stage in enumerate(self.stages):
            if i > 0:
                z, is_real = halve(z, is_real, self.padding), skip_frames(is_real, 2)
            z = stage(z, is_real)
        z = self.last(self.dense(z))
        return z[..., None].unflatten(0, (clips, people))

    def measure(self, poses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, C, T, V) -> distances (N, V (V - 1) / 2, T) of joints 0 and 1, 0 and 2, ..., 1 and 2, ...; slow motion
        (N, C*V, T) since the frame before; fast motion (N, C*V, ceil(T / 2)) of every second frame since the one two
        before. The first frame of each motion is zero.
        """
        points = poses[:, : self.num_coordinates]
        first, second = self.pairs
        differences = points.index_select(3, first) - points.index_select(3, second)
        flat = poses.transpose(2, 3).flatten(1, 2)
        distances = torch.linalg.vector_norm(differences, dim=1).transpose(1, 2)
        return distances, _subtract_last(flat), _subtract_last(skip_frames(flat, 2))


def _subtract_last(x: Tensor) -> Tensor:
    """(N, C, T): each frame minus the one before."""
    return functional.pad(x[:, :, 1:] - x[:, :, :-1], (1, 0))


def halve(x: Tensor, is_real: Tensor, padding: Padding) -> Tensor:
    """(N, C, T), is_real (N, 1, T) -> (N, C, ceil(T / 2)): the larger of two frames, of real ones.

    Those of a pair are frames 2 t and 2 t + 1, with causal padding 2 t - 1 and 2 t.
    """
    nothing = torch.finfo(x.dtype).min
    x = x.masked_fill(is_real == 0, nothing)
    x = functional.pad(x, (1, 0) if padding == "causal" else (0, 1), value=nothing)
    return functional.max_pool2d(x, (1, 2)) * skip_frames(is_real, 2)


class Stream(nn.Module):
    """One input of the network: normalised, then mapped by convolutions of 1, 3 and 1 frames."""

    def __init__(self, channels: int, filters: int, padding: Padding, dropout: float) -> None:
        super().__init__()
        self.norm = FrameNorm(channels)
        self.wide = Convolution(channels, 2 * filters, 1, padding)
        self.middle = Convolution(2 * filters, filters, KERNEL, padding)
        self.narrow = Convolution(filters, filters, 1, padding)
        self.dropout = nn.Dropout1d(dropout)

    def forward(self, x: Tensor, is_real: Tensor) -> Tensor:
        """(N, C, T), is_real (N, 1, T) -> (N, C', T), zero in padding."""
        x = self.dropout(self.wide(self.norm(x * is_real))) * is_real
        x = self.dropout(self.middle(x))
        y: Tensor = self.dropout(self.narrow(x)) * is_real
        return y


class Stage(nn.Module):
    """Convolutions of three frames, one after the other."""

    def __init__(self, before: int, after: int, depth: int, padding: Padding, dropout: float) -> None:
        super().__init__()
        sizes = [before] + [after] * depth
        self.convolutions = nn.ModuleList(Convolution(sizes[i], sizes[i + 1], KERNEL, padding) for i in range(depth))
        self.dropout = nn.Dropout1d(dropout)

    def forward(self, x: Tensor, is_real: Tensor) -> Tensor:
        """(N, C, T), is_real (N, 1, T) -> (N, C', T), zero in padding."""
        for convolution in self.convolutions:
            x = convolution(x) * is_real
        y: Tensor = self.dropout(x)
        return y


class Convolution(nn.Module):
    """A convolution over time, a normalisation and a leaky ReLU."""

    def __init__(self, before: int, after: int, size: int, padding: Padding) -> None:
        super().__init__()
        is_causal = padding == "causal"
        self.missing_zeros = size - 1 if is_causal else 0
        self.convolution = nn.Conv1d(before, after, size, padding=0 if is_causal else size // 2, bias=False)
        self.norm = FrameNorm(after)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, T) -> (N, C', T)."""
        if self.missing_zeros:
            x = functional.pad(x, (self.missing_zeros, 0))
        return functional.leaky_relu(self.norm(self.convolution(x)), LEAK)
