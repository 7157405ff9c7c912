"""ST-GCN as its paper and first program compute it, plainly, in eager PyTorch: what our speed is measured against.

Channels first. Each graph convolution maps its input to K * C' channels and then mixes the joints of every subset with
one einsum; normalisation, ReLU, convolution and dropout are the layers of torch.nn, one after the other. It loads the
state dict of the package's network as it is. It gets the same threads, the same mode (eval and inference mode, or
training), and the same warm-up as what it is compared with, and it is what nn.Conv2d gives in eager mode: nothing in it
is made slower than a straightforward program would be.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

CHANNELS = (64, 64, 64, 64, 128, 128, 128, 256, 256, 256)
STRIDES = (1, 1, 1, 1, 2, 1, 1, 2, 1, 1)
ROTATIONS = (-10.0, -5.0, 0.0, 5.0, 10.0)
SCALES = (0.9, 1.0, 1.1)
SHIFTS = (-0.2, -0.1, 0.0, 0.1, 0.2)


class GraphConvolution(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, num_subsets: int) -> None:
        super().__init__()
        self.num_subsets = num_subsets
        self.conv = nn.Conv2d(in_channels, out_channels * num_subsets, kernel_size=1)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        """(N, C, T, V), (K, V, V) -> (N, C', T, V)."""
        x = self.conv(x)
        clips, channels, frames, joints = x.shape
        x = x.view(clips, self.num_subsets, channels // self.num_subsets, frames, joints)
        return torch.einsum("nkctv,kvw->nctw", x, adjacency).contiguous()


class Block(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, num_subsets: int, stride: int, dropout: float, number: int):
        super().__init__()
        self.gcn = GraphConvolution(in_channels, out_channels, num_subsets)
        self.tcn = nn.Sequential(
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_channels, out_channels, (9, 1), (stride, 1), (4, 0)),
            nn.BatchNorm2d(out_channels),
            nn.Dropout(dropout if number else 0.0, inplace=True),
        )
        self.residual: nn.Module | None = None
        if number and in_channels == out_channels and stride == 1:
            self.residual = nn.Identity()
        elif number:
            self.residual = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=(stride, 1)), nn.BatchNorm2d(out_channels)
            )
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        """(N, C, T, V), (K, V, V) -> (N, C', T', V)."""
        y = self.tcn(self.gcn(x, adjacency))
        return self.relu(y if self.residual is None else y + self.residual(x))


class OriginalSTGCN(nn.Module):
    """adjacency (K, V, V). Names of the weights as in TAO's checkpoints."""

    def __init__(
        self,
        adjacency: Tensor,
        num_channels: int,
        num_classes: int,
        dropout: float = 0.5,
        edge_importance: bool = True,
    ) -> None:
        super().__init__()
        self.register_buffer("A", adjacency)
        num_subsets, num_joints, _ = adjacency.shape
        self.data_bn = nn.BatchNorm1d(num_channels * num_joints)
        inputs = (num_channels, *CHANNELS)
        self.st_gcn_networks = nn.ModuleList(
            Block(inputs[i], CHANNELS[i], num_subsets, STRIDES[i], dropout, i) for i in range(len(CHANNELS))
        )
        self.edge_importance = (
            nn.ParameterList(nn.Parameter(torch.ones(adjacency.shape)) for _ in CHANNELS) if edge_importance else None
        )
        self.fcn = nn.Conv2d(CHANNELS[-1], num_classes, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, T, V, M) -> logits (N, classes)."""
        clips, channels, frames, joints, people = x.shape
        x = x.permute(0, 4, 3, 1, 2).contiguous().view(clips * people, joints * channels, frames)
        x = self.data_bn(x)
        x = x.view(clips, people, joints, channels, frames).permute(0, 1, 3, 4, 2).contiguous()
        x = x.view(clips * people, channels, frames, joints)
        for number, block in enumerate(self.st_gcn_networks):
            adjacency: Tensor = self.A  # type: ignore[assignment]
            x = block(x, adjacency if self.edge_importance is None else adjacency * self.edge_importance[number])
        x = functional.avg_pool2d(x, x.shape[2:])
        x = x.view(clips, people, -1, 1, 1).mean(dim=1)
        return self.fcn(x).view(clips, -1)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, clips: Tensor, labels: Tensor) -> float:
    """One step on a batch (N, C, T, V, M): forward, cross-entropy, backward, update. Gives the loss."""
    loss = functional.cross_entropy(model(clips), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def classify_sliding_windows(model: nn.Module, frames: Iterator[Tensor], window_frames: int) -> Iterator[Tensor]:
    """After each frame (C, V): probabilities (classes,) of the last `window_frames` frames, all computed anew."""
    recent: deque[Tensor] = deque(maxlen=window_frames)
    with torch.inference_mode():
        for frame in frames:
            recent.append(frame)
            window = torch.stack(tuple(recent), dim=1)[None, ..., None]  # (1, C, T, V, 1)
            yield model(window).softmax(dim=1)[0]


def move_clip(clip: np.ndarray, draws: Sequence[float]) -> np.ndarray:
    """random_move of one clip (C, T, V, M), frame after frame, the joints of a frame at once.

    draws: eight numbers in [0, 1), for the start and end of rotation, scale, shift of channel 0 and of channel 1.
    """
    lists = (ROTATIONS, SCALES, SHIFTS, SHIFTS)
    ends = [[choices[int(draw * len(choices))] for draw in draws[2 * i : 2 * i + 2]] for i, choices in enumerate(lists)]
    num_frames = clip.shape[1]
    angles, scales, shifts_0, shifts_1 = (np.linspace(start, end, num_frames) for start, end in ends)
    angles = angles * np.pi / 180
    moved = clip.copy()
    for frame in range(num_frames):
        cosine, sine = np.cos(angles[frame]) * scales[frame], np.sin(angles[frame]) * scales[frame]
        rotation = np.array([[cosine, -sine], [sine, cosine]])
        turned = np.dot(rotation, clip[:2, frame].reshape(2, -1))
        turned[0] += shifts_0[frame]
        turned[1] += shifts_1[frame]
        moved[:2, frame] = turned.reshape(2, *clip.shape[2:])
    return moved
