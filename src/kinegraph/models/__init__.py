"""The networks. `build_model` imports the one that is asked for, so that reading the table needs no torch.

Axis letters in tensor code: N clips (inside a network: clips x people), C channels, T frames, V joints,
M people, K subsets of the partition strategy. Clips enter as (N, C, T, V, M); a network answers with logits
(N, classes).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from kinegraph.errors import SpecError, look_up
from kinegraph.skeleton.graph import build_adjacency
from kinegraph.skeleton.layouts import Layout

if TYPE_CHECKING:
    from torch import nn

    from kinegraph.spec import ModelSpec

MODELS: dict[str, str] = {"ST-GCN": "kinegraph.models.st_gcn:STGCN"}


def build_model(options: ModelSpec, layout: Layout, num_classes: int) -> nn.Module:
    """The network `options.model_type` with fresh weights, for clips of this layout.

    Raises SpecError for an unknown model, DataError for an unknown strategy.
    """
    module, _, name = look_up(MODELS, options.model_type, "model.model_type", SpecError).partition(":")
    adjacency = build_adjacency(layout, options.graph_strategy)
    model: nn.Module = getattr(import_module(module), name)(options, adjacency, num_classes)
    return model
