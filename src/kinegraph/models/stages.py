"""What the successors of ST-GCN share: the plan of their ten blocks, and how a clip enters and leaves a network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from kinegraph.errors import Problem, SpecError
from kinegraph.models.layers import StridedPointwise, mark_real_frames, mean_over_real_frames, weigh_real_frames

if TYPE_CHECKING:
    from kinegraph.spec import ModelSpec

STAGES = ((64, 4), (128, 3), (256, 3))
"""Channels and blocks; each stage but the first begins with stride 2. ST-GCN (Yan et al., AAAI 2018, section 3.6) has
nine blocks in its paper; the tenth, of 64 channels, is in its authors' code (st_gcn.py), from which TAO has it too."""
TOTAL_STRIDE = 2 ** (len(STAGES) - 1)


class PooledNetwork(nn.Module):
    """A network whose answer is a linear layer after dropout and the mean of a map over joints and real frames.

    total_stride: frames of a clip from one frame of the map to the next.
    """

    total_stride = TOTAL_STRIDE
    dropout: nn.Module
    fcn: nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, T, V, M) -> logits (N, classes)."""
        return self.classify(self.forward_features(x), x)

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, C, T, V, M) -> (N, M, C', T', V): the map whose mean is classified."""
        raise NotImplementedError

    def classify(self, features: Tensor, x: Tensor) -> Tensor:
        """The map (N, M, C', T', V) of clips x (N, C, T, V, M) -> logits (N, classes)."""
        logits: Tensor = self.fcn(self.dropout(mean_over_real_frames(features, x, self.total_stride)))
        return logits

    def pooling_weights(self, x: Tensor) -> Tensor:
        """(N, C, T, V, M) -> (N, M, T'): what people and frames of the map weigh in the mean, 1 in all."""
        return weigh_real_frames(x, self.total_stride)


class MarkedNetwork(PooledNetwork):
    """One in which padding and absent people do not count before the mean either: its map needs marks of them."""

    def forward_features(self, x: Tensor, marked_by: Tensor | None = None) -> Tensor:
        """(N, C, T, V, M) -> (N, M, C', T', V). marked_by: clips (N, C'', T, V, M) whose zeros tell what is padding, of
        which x are some channels; default x. Motions alone would take a person who stands still for absent.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class BlockPlan:
    """Channels before and after a block, and its stride in frames."""

    before: int
    after: int
    stride: int


def plan_blocks(options: ModelSpec, num_channels: int) -> list[BlockPlan]:
    """The blocks in order: options.width scales their channels, options.depth is how many a stage has, 0: its own."""
    plans: list[BlockPlan] = []
    before = num_channels
    for stage, (channels, own_depth) in enumerate(STAGES):
        after = scale_channels(channels, options)
        for i in range(options.depth or own_depth):
            plans.append(BlockPlan(before, after, 2 if stage > 0 and i == 0 else 1))
            before = after
    return plans


def scale_channels(channels: int, options: ModelSpec) -> int:
    """The channels times options.width, as a multiple of 8."""
    return max(8, round(channels * options.width / 8) * 8)


def build_shortcut(plan: BlockPlan) -> nn.Module:
    """The way round a block: nothing where the shape stays, else a 1x1 convolution and a normalisation."""
    if plan.before == plan.after and plan.stride == 1:
        return nn.Identity()
    return nn.Sequential(StridedPointwise(plan.before, plan.after, plan.stride), nn.BatchNorm2d(plan.after))


def normalise_joints(x: Tensor, norm: nn.Module) -> Tensor:
    """Clips (N, C, T, V, M) -> (N*M, C, T, V) in channels_last memory, through a BatchNorm1d of V*C channels."""
    clips, channels, frames, joints, people = x.shape
    x = x.permute(0, 4, 3, 1, 2).reshape(clips * people, joints * channels, frames)
    x = norm(x)
    return x.reshape(clips * people, joints, channels, frames).permute(0, 2, 3, 1)


def mark_frames(x: Tensor) -> Tensor:
    """Clips (N, C, T, V, M) -> (N*M, 1, T), 1 where the frame is real, and 0 in padding and for absent people."""
    return mark_real_frames(x).flatten(0, 1)[:, None].to(x.dtype)


def refuse_causal_padding(options: ModelSpec) -> None:
    """For networks whose graphs are made from all frames of a clip. Raises SpecError."""
    if options.temporal_padding == "causal":
        got = f"causal with {options.model_type}"
        expected = "symmetric, as its graphs look at all frames of a clip"
        hint = "EF-GCN, MB-GCN, ST-GCN, ST-GCN++ and DD-Net can be causal."
        raise SpecError(Problem("model.temporal_padding", got, expected, hint))


def start_convolutions(network: nn.Module) -> None:
    """Weights of convolutions as CTR-GCN, TD-GCN and 2s-AGCN start them: normal, by the channels after (He et al.,
    ICCV 2015, eq. 14), biases zero.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
