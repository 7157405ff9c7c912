"""Model files (.pth): reading with restrictions, writing whole, and what can be told from weights alone.

A file is a dict in the form of a Lightning checkpoint (`state_dict` with the prefix `model.`), with one more entry,
`kinegraph`, that holds all that inference needs as plain data. Files of TAO lack it: then the options are read off
the tensors.
"""

from __future__ import annotations

import io
import platform
import re
import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import kinegraph
from kinegraph.calibration import check_temperature
from kinegraph.errors import CheckpointError, DataError, Problem
from kinegraph.models import build_network
from kinegraph.models.encryption import encrypt
from kinegraph.models.foreign import check_graph, convert_to_float32, read_foreign
from kinegraph.models.restricted import explain_vendor_encryption, load_restricted
from kinegraph.skeleton.graph import build_adjacency
from kinegraph.skeleton.layouts import Layout
from kinegraph.spec import ModelSpec
from kinegraph.storage import write_atomically

FORMAT_VERSION = 1
MAX_CHANNELS = 10_000
PREFIX = "model."
FIRST_BRANCH = "branches.0."
HEAD = re.compile(r"(branches\.\d+\.)?(fcn|branch_heads\.\d+)\.(weight|bias)")
"""The classifier of a network, or of each stream of a LateFusion, and those of the branches of an MB-GCN."""
NUMBER = (int, float)
TRAINING_TYPES: dict[str, Any] = {
    **dict.fromkeys(("epoch", "step", "global_step", "seed", "world_size"), int),
    **{"seconds": NUMBER, "totals": list, "optimizer": dict, "schedule": dict},
    **{"best": (dict, type(None)), "fingerprint": dict},
}


@dataclass
class Checkpoint:
    """A model file in memory. `state_dict` keys have no prefix; `training` is what resuming needs, or None."""

    state_dict: dict[str, torch.Tensor]
    options: ModelSpec
    layout: Layout
    num_classes: int
    label_map: dict[str, int] | None = None
    pipeline: dict[str, Any] | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    spec: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    training: dict[str, Any] | None = None
    num_channels: int | None = None
    """Channels that the input pipeline gives to the network; None: those of the data."""
    temperature: float = 1.0
    """What logits are divided by for probabilities."""

    @property
    def is_foreign(self) -> bool:
        """Whether another tool wrote the file."""
        return not self.versions

    @property
    def class_names(self) -> list[str]:
        """Names in label order; class_0, class_1, ... where the file holds none."""
        names = {label: name for name, label in (self.label_map or {}).items()}
        return [names.get(label, f"class_{label}") for label in range(self.num_classes)]


def list_versions() -> dict[str, str]:
    """Versions that a checkpoint records."""
    return {"kinegraph": kinegraph.__version__, "torch": str(torch.__version__), "python": platform.python_version()}


def write_checkpoint(path: Path, checkpoint: Checkpoint, key: str = "") -> None:
    """Write atomically; with a key, encrypted in memory first, so that no plain weights reach the disk."""
    training = dict(checkpoint.training or {})
    options = asdict(checkpoint.options)
    options.pop("pretrained_model_path")
    content = {
        "epoch": training.get("epoch", 0),
        "global_step": training.get("global_step", 0),
        "pytorch-lightning_version": "2.0.0",
        "state_dict": {PREFIX + name: tensor for name, tensor in checkpoint.state_dict.items()},
        "kinegraph": {
            "format_version": FORMAT_VERSION,
            "model": options,
            "layout": checkpoint.layout.to_dict(),
            "num_classes": checkpoint.num_classes,
            "num_channels": checkpoint.num_channels,
            "temperature": checkpoint.temperature,
            "label_map": checkpoint.label_map,
            "pipeline": checkpoint.pipeline,
            "metrics": checkpoint.metrics,
            "spec": checkpoint.spec,
            "versions": list_versions(),
            "training": training,
        },
    }
    # In memory first: torch would turn a full disk or an interrupt in the middle into an error of its own
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with write_atomically(path) as file:
        file.write(encrypt(buffer.getvalue(), key) if key else buffer.getbuffer())


def read_checkpoint(path: Path | str, key: str = "") -> Checkpoint:
    """Read a model file of Kinegraph or TAO, on the CPU. Raises CheckpointError; never runs code from the file."""
    path = Path(path)
    content = load_restricted(path, key)
    state_dict = _find_state_dict(content, path)
    own = content.get("kinegraph")
    if own is None:
        foreign = read_foreign(state_dict, content, path)
        return Checkpoint(foreign.state_dict, foreign.options, foreign.layout, foreign.num_classes, foreign.label_map)
    state_dict = convert_to_float32(state_dict)
    version = own.get("format_version") if isinstance(own, dict) else own
    if version != FORMAT_VERSION:
        hint = "Update Kinegraph."
        raise CheckpointError(Problem(str(path), f"format version {_show(version)}", str(FORMAT_VERSION), hint))
    try:
        checkpoint = Checkpoint(
            state_dict=state_dict,
            options=ModelSpec(**own["model"]),
            layout=Layout.from_dict(own["layout"]),
            num_classes=own["num_classes"],
            label_map=own["label_map"],
            pipeline=own["pipeline"],
            metrics=own["metrics"],
            spec=own["spec"],
            versions=own["versions"],
            training=own["training"] or None,
            num_channels=own.get("num_channels"),
            temperature=check_temperature(own.get("temperature", 1.0)),
        )
        _check_description(checkpoint)
    except (KeyError, TypeError, ValueError, DataError) as error:
        got = f"a damaged description ({type(error).__name__}: {error})"
        raise CheckpointError(Problem(str(path), got, "the entries that Kinegraph writes")) from error
    return checkpoint


def _check_description(checkpoint: Checkpoint) -> None:
    """Raises ValueError where an entry of our own does not fit its type or the tensors."""
    heads = [tensor for name, tensor in checkpoint.state_dict.items() if HEAD.fullmatch(name)]
    classes = checkpoint.num_classes
    if type(classes) is not int or classes < 1:
        raise ValueError(f"num_classes is {_show(classes)}")
    channels = checkpoint.num_channels
    if channels is not None and (type(channels) is not int or not 1 <= channels <= MAX_CHANNELS):
        raise ValueError(f"num_channels is {_show(channels)}")
    if not heads or any(head.shape[:1] != (classes,) for head in heads):
        found = " and ".join(f"a tensor {tuple(head.shape)}" for head in heads) or "no tensor"
        raise ValueError(f"{classes} classes and {found} fcn.weight")
    graph = _find_graph(checkpoint.state_dict)
    if graph is not None and graph.shape[-1:] != (checkpoint.layout.num_joints,):
        raise ValueError(f"{checkpoint.layout.num_joints} joints and a graph {tuple(graph.shape)}")
    names = checkpoint.label_map
    if names is not None and not (
        isinstance(names, dict)
        and all(isinstance(name, str) and type(label) is int for name, label in names.items())
        and sorted(names.values()) == list(range(classes))
    ):
        raise ValueError(f"label_map does not name {classes} classes")
    for name in ("metrics", "spec", "versions"):
        if not isinstance(getattr(checkpoint, name), dict):
            raise ValueError(f"{name} is no mapping")
    if not isinstance(checkpoint.pipeline, dict | None):
        raise ValueError("pipeline is no mapping")
    training = {} if checkpoint.training is None else checkpoint.training
    wrong = [
        name
        for name, kind in TRAINING_TYPES.items()
        if checkpoint.training is not None
        and (not isinstance(training, dict) or name not in training or not isinstance(training[name], kind))
    ]
    if wrong:
        raise ValueError(f"the state of the training lacks {', '.join(wrong)}, or they are of another type")


def _find_graph(state_dict: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """The adjacency (K, V, V) of the network, or of the first stream's."""
    return state_dict.get("A", state_dict.get(f"{FIRST_BRANCH}A"))


def _show(value: Any) -> str:
    return reprlib.repr(value)[:80]


def build_from_checkpoint(checkpoint: Checkpoint, where: str) -> nn.Module:
    """The network with its weights, in eval mode. Raises CheckpointError where tensors do not fit."""
    adjacency = _find_graph(checkpoint.state_dict)
    if adjacency is None:
        adjacency = torch.from_numpy(build_adjacency(checkpoint.layout, checkpoint.options.graph_strategy))
    check_graph(adjacency, where)
    options = checkpoint.options
    arguments = checkpoint.num_classes, checkpoint.num_channels or options.input_channels
    with torch.device("meta"):  # shapes first: the description may ask for far more memory than the tensors hold
        plan = build_network(options, adjacency.to("meta"), *arguments)
    wrong = _list_misfits(plan, checkpoint.state_dict)
    if wrong:
        raise CheckpointError(*(Problem(f"{where}: {name}", got, expected) for name, got, expected in wrong[:5]))
    model = build_network(options, adjacency, *arguments)
    model.load_state_dict(checkpoint.state_dict)
    return model.eval()


def load_pretrained(model: nn.Module, checkpoint: Checkpoint, where: str) -> list[str]:
    """Copy weights into a model for fine-tuning; a head of another size stays as it is initialised.

    Returns messages for the user. Raises CheckpointError if anything but the head does not fit.
    """
    weights = dict(checkpoint.state_dict)
    messages = []
    own_graph, other_graph = _find_graph(model.state_dict()), _find_graph(weights)
    if own_graph is not None and other_graph is not None and not _are_equal(own_graph, other_graph):
        got = f"a graph of layout {checkpoint.layout.name}, strategy {checkpoint.options.graph_strategy}"
        hint = "Set model.graph_layout and model.graph_strategy to those of the checkpoint."
        raise CheckpointError(Problem(where, got, "the graph of model.graph_layout and model.graph_strategy", hint))
    padding = getattr(model, "padding", checkpoint.options.temporal_padding)
    if padding != checkpoint.options.temporal_padding:
        given = checkpoint.options.temporal_padding
        messages.append(f"{where} was trained with {given} padding and this model has {padding}: it has to adapt.")
    head = {name for name in weights if HEAD.fullmatch(name)}
    target = model.state_dict()
    if any(name in target and target[name].shape != weights[name].shape for name in head):
        for name in head:
            del weights[name]
        messages.append(
            f"The head of {where} has {checkpoint.num_classes} classes and this model has "
            f"{len(target[next(iter(head))])}: it starts new, all other weights are taken over."
        )
    wrong = [item for item in _list_misfits(model, weights) if item[0] not in head]
    if wrong:
        raise CheckpointError(*(Problem(f"{where}: {name}", got, expected) for name, got, expected in wrong[:5]))
    model.load_state_dict(weights, strict=False)
    return messages


def _are_equal(graph: torch.Tensor, other: torch.Tensor) -> bool:
    return graph.shape == other.shape and torch.allclose(graph, other)


def _list_misfits(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> list[tuple[str, str, str]]:
    target = model.state_dict()
    missing = [(name, "nothing", f"a tensor {tuple(target[name].shape)}") for name in target if name not in weights]
    extra = [(name, "an unknown tensor", "only tensors of the network") for name in weights if name not in target]
    shapes = [
        (name, f"shape {tuple(weights[name].shape)}", f"shape {tuple(target[name].shape)}")
        for name in target
        if name in weights and weights[name].shape != target[name].shape
    ]
    return missing + extra + shapes


def _find_state_dict(content: Mapping[str, Any], path: Path) -> dict[str, torch.Tensor]:
    weights = content.get("state_dict", content)
    if content.get("state_dict_encrypted") or isinstance(weights, bytes):
        raise CheckpointError(explain_vendor_encryption(path))
    if not isinstance(weights, Mapping):
        raise CheckpointError(Problem(f"{path}: state_dict", f"a {type(weights).__name__}", "named tensors"))
    tensors = {
        name.removeprefix(PREFIX): value.detach()
        for name, value in weights.items()
        if isinstance(name, str) and isinstance(value, torch.Tensor)
    }
    if not tensors:
        raise CheckpointError(Problem(str(path), "no tensors", "the weights of a network"))
    return tensors
