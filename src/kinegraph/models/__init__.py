"""The networks. `build_model` imports the one that is asked for, so that reading the table needs no torch.

Axis letters in tensor code: N clips (inside a network: clips x people), C channels, T frames, V joints,
M people, K subsets of the partition strategy. Clips enter as (N, C, T, V, M); a network answers with logits
(N, classes).
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from kinegraph.errors import Problem, SpecError, look_up
from kinegraph.skeleton.graph import build_adjacency
from kinegraph.skeleton.layouts import Layout

if TYPE_CHECKING:
    from torch import nn

    from kinegraph.models.folded import FoldedNetwork
    from kinegraph.spec import ModelSpec

MODELS: dict[str, str] = {
    "ST-GCN": "kinegraph.models.st_gcn:STGCN",
    "EF-GCN": "kinegraph.models.ef_gcn:EFGCN",
    "MB-GCN": "kinegraph.models.mb_gcn:MBGCN",
    "ST-GCN++": "kinegraph.models.st_gcn_pp:STGCNPP",
    "CTR-GCN": "kinegraph.models.ctr_gcn:CTRGCN",
    "TD-GCN": "kinegraph.models.td_gcn:TDGCN",
    "2s-AGCN": "kinegraph.models.agcn:AGCN",
    "DD-Net": "kinegraph.models.dd_net:DDNet",
}


@runtime_checkable
class Foldable(Protocol):
    """A network that can be rewritten for inference."""

    def fold(self) -> FoldedNetwork:
        """The same network for inference, as plain data, from its present weights."""
        ...


def build_model(options: ModelSpec, layout: Layout, num_classes: int, num_channels: int | None = None) -> nn.Module:
    """The network `options.model_type` with fresh weights, for clips of this layout.

    num_channels: channels that the input pipeline gives out; default: those of the data, options.input_channels.

    Raises SpecError for an unknown model, DataError for an unknown strategy.
    """
    adjacency = build_adjacency(layout, options.graph_strategy)
    return build_network(options, adjacency, num_classes, num_channels or options.input_channels)


def build_network(options: ModelSpec, adjacency: Any, num_classes: int, num_channels: int) -> nn.Module:
    """The network for a graph (K, V, V); with late fusion of several streams, one for each in a LateFusion."""
    build = find_network(options)
    num_streams = num_channels // options.input_channels
    if options.fusion == "early" or num_streams < 2:
        return build(options, adjacency, num_classes, num_channels)
    from kinegraph.models.late_fusion import FoldableLateFusion, LateFusion
    from kinegraph.spec_input import STREAMS, find_weight_problems

    if num_streams > len(STREAMS):
        raise SpecError(
            Problem(
                "model.input_channels", str(options.input_channels), f"a {len(STREAMS)}th of {num_channels} or more"
            )
        )
    weights = options.fusion_weights
    if problems := find_weight_problems(weights, num_streams):
        raise SpecError(*problems)

    def build_branch(channels: int) -> nn.Module:
        return build(options, adjacency, num_classes, channels)

    fuse = FoldableLateFusion if hasattr(build, "fold") else LateFusion
    return fuse(build_branch, num_channels, num_streams, weights)


def find_network(options: ModelSpec) -> Callable[..., nn.Module]:
    """The class of the network: (options, adjacency (K, V, V), num_classes, num_channels) -> nn.Module."""
    module, _, name = look_up(MODELS, options.model_type, "model.model_type", SpecError).partition(":")
    network: Callable[..., nn.Module] = getattr(import_module(module), name)
    return network
