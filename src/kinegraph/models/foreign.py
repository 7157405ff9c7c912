"""Checkpoints of other tools: the options of ST-GCN read off the shapes of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kinegraph.errors import CheckpointError, DataError, Problem
from kinegraph.models.restricted import InertOptions
from kinegraph.skeleton.graph import STRATEGIES, build_adjacency
from kinegraph.skeleton.layouts import LAYOUTS, MAX_JOINTS, Layout, derive_bones
from kinegraph.spec import ModelSpec

MAX_SUBSETS = 16


def check_graph(adjacency: torch.Tensor, where: str) -> None:
    shape = tuple(adjacency.shape)
    if len(shape) != 3 or shape[1] != shape[2] or not (0 < shape[0] <= MAX_SUBSETS and 0 < shape[1] <= MAX_JOINTS):
        expected = f"(K, V, V), at most {MAX_SUBSETS} subsets and {MAX_JOINTS} joints"
        raise CheckpointError(Problem(f"{where}: A", f"shape {shape}", expected))


@dataclass(frozen=True)
class ForeignModel:
    """What the tensors of a foreign file tell; `state_dict` holds them as float32."""

    state_dict: dict[str, torch.Tensor]
    options: ModelSpec
    layout: Layout
    num_classes: int
    label_map: dict[str, int] | None


def convert_to_float32(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights in the precision that the network computes in."""
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state_dict.items()}


def read_foreign(state_dict: dict[str, torch.Tensor], content: Mapping[str, Any], path: Path) -> ForeignModel:
    """Tell the options of ST-GCN from the shapes of its tensors. Raises CheckpointError."""
    needed = ["A", "fcn.weight", "data_bn.weight", "st_gcn_networks.0.gcn.conv.weight"]
    absent = [name for name in needed if name not in state_dict]
    if absent:
        hint = f"It holds {', '.join(list(state_dict)[:3])}, ..."
        raise CheckpointError(Problem(str(path), "no " + ", ".join(absent), "the tensors of ST-GCN", hint))
    for name in ("fcn.weight", "st_gcn_networks.0.gcn.conv.weight"):
        shape = tuple(state_dict[name].shape)
        if len(shape) != 4 or 0 in shape:
            raise CheckpointError(Problem(f"{path}: {name}", f"shape {shape}", "the four axes of a convolution"))
    check_graph(state_dict["A"], str(path))
    is_rounded = state_dict["A"].dtype in (torch.float16, torch.bfloat16)
    state_dict = convert_to_float32(state_dict)
    try:
        layout, strategy = _match_graph(state_dict["A"].float().numpy(), 4e-3 if is_rounded else 1e-5)
    except DataError as error:
        got = f"a graph of {state_dict['A'].shape[1]} joints that do not all hang together"
        raise CheckpointError(Problem(f"{path}: A", got, "the graph of one skeleton")) from error
    if is_rounded and layout.name in LAYOUTS:
        state_dict["A"] = torch.from_numpy(build_adjacency(layout, strategy))
    try:
        options = ModelSpec(
            input_channels=state_dict["st_gcn_networks.0.gcn.conv.weight"].shape[1],
            graph_layout=layout.name if layout.name in LAYOUTS else "nvidia",
            graph_strategy=strategy,  # type: ignore[arg-type]
            edge_importance_weighting="edge_importance.0" in state_dict,
        )
    except ValueError as error:
        got = f"{state_dict['st_gcn_networks.0.gcn.conv.weight'].shape[1]} input channels"
        raise CheckpointError(
            Problem(str(path), got, "a number of channels that model.input_channels takes")
        ) from error
    num_classes = state_dict["fcn.weight"].shape[0]
    return ForeignModel(state_dict, options, layout, num_classes, _find_label_map(content, num_classes))


def _match_graph(adjacency: np.ndarray, tolerance: float) -> tuple[Layout, str]:
    num_joints = adjacency.shape[1]
    for layout in LAYOUTS.values():
        if layout.num_joints != num_joints:
            continue
        for strategy in STRATEGIES:
            candidate = build_adjacency(layout, strategy)
            if candidate.shape == adjacency.shape and np.allclose(candidate, adjacency, atol=tolerance):
                return layout, strategy
    linked = adjacency.sum(0) != 0
    edges = tuple((i, j) for i, j in np.argwhere(np.tril(linked | linked.T, -1)).tolist())
    joints = tuple(f"joint_{number}" for number in range(num_joints))
    strategy = {1: "uniform", 2: "distance"}.get(adjacency.shape[0], "spatial")
    return Layout("unknown", joints, edges, derive_bones(num_joints, edges, 0), (), 0), strategy


def _find_label_map(content: Mapping[str, Any], num_classes: int) -> dict[str, int] | None:
    """A label map among plain hyper-parameters, wherever it lies in them."""
    seen: set[int] = set()

    def search(node: Any, depth: int) -> dict[str, int] | None:
        node = _unwrap(node)
        if not isinstance(node, Mapping) or depth > 8 or id(node) in seen:
            return None
        seen.add(id(node))
        candidate = _unwrap(node.get("label_map"))
        if isinstance(candidate, Mapping):
            label_map = {name: _unwrap(label) for name, label in candidate.items() if isinstance(name, str)}
            labels = [label if isinstance(label, int | str) else "?" for label in label_map.values()]
            if len(labels) == num_classes and {str(label) for label in labels} == {*map(str, range(num_classes))}:
                return {name: int(label) for name, label in label_map.items()}
        return next((found for child in node.values() if (found := search(child, depth + 1))), None)

    parts = [content.get("hyper_parameters"), content.get("label_map") and {"label_map": content["label_map"]}]
    return next((found for part in parts if (found := search(part, 0))), None)


def _unwrap(node: Any) -> Any:
    """What an options object holds: its children or its value."""
    if not isinstance(node, InertOptions):
        return node
    state = getattr(node, "state", None)
    if not isinstance(state, Mapping):
        return state
    return state.get("_content", state.get("_val", state))
