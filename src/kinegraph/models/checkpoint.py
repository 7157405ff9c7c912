"""Model files (.pth): reading with restrictions, writing whole, and what can be told from weights alone.

A file is a dict in the form of a Lightning checkpoint (`state_dict` with the prefix `model.`), with one more entry,
`kinegraph`, that holds all that inference needs as plain data. Files of TAO lack it: then the options are read off
the tensors.
"""

from __future__ import annotations

import io
import pickletools
import platform
import re
import reprlib
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import kinegraph
from kinegraph.errors import CheckpointError, DataError, Problem
from kinegraph.models.encryption import decrypt, encrypt, is_encrypted
from kinegraph.models.st_gcn import STGCN
from kinegraph.skeleton.graph import STRATEGIES, build_adjacency
from kinegraph.skeleton.layouts import LAYOUTS, MAX_JOINTS, Layout, derive_bones
from kinegraph.spec import ModelSpec
from kinegraph.storage import write_atomically

FORMAT_VERSION = 1
MAX_FILE_BYTES = 8 * 2**30
MAX_PICKLE_BYTES = 4 * 2**20
MAX_COPIED_BYTES = 2**30
"""The bytes of a pickle times its calls, each of which may copy all that was built before."""
MAX_SUBSETS = 16
PREFIX = "model."


class _InertOptions(dict[Any, Any]):
    """Stands for an options object in a foreign file: keeps its state, never runs its code."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        self.state = state


INERT_MODULES = ("omegaconf.", "nvidia_tao_core.", "nvidia_tao_pytorch.", "pytorch_lightning.", "typing.")
INERT_TYPES = ("builtins.dict", "builtins.list", "builtins.int", "builtins.float", "builtins.str", "builtins.bool")
"""Names in the hyper-parameters of foreign files that are read as `_InertOptions`, whatever is installed."""
TENSOR_NAMES = re.compile(
    r"collections\.(OrderedDict|defaultdict)|torch\.(Size|device|nn\.parameter\.Parameter)"
    r"|torch\._utils\._rebuild_(tensor|tensor_v2|parameter)"
    r"|torch\.(Float|Double|Half|BFloat16|Long|Int|Short|Char|Byte|Bool)Storage"
    r"|torch\.(float|double|half|bfloat|u?int|long|short|bool)\d*"
)
"""What else a pickle may name. torch allows more, some of which allocates what the file asks for (bytearray)."""
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
            "label_map": checkpoint.label_map,
            "pipeline": checkpoint.pipeline,
            "metrics": checkpoint.metrics,
            "spec": checkpoint.spec,
            "versions": list_versions(),
            "training": training,
        },
    }
    if key:
        buffer = io.BytesIO()
        torch.save(content, buffer)
        with write_atomically(path) as file:
            file.write(encrypt(buffer.getvalue(), key))
        return
    with write_atomically(path) as file:
        torch.save(content, file)


def read_checkpoint(path: Path | str, key: str = "") -> Checkpoint:
    """Read a model file of Kinegraph or TAO, on the CPU. Raises CheckpointError; never runs code from the file."""
    path = Path(path)
    content = _load_restricted(path, key)
    state_dict = _find_state_dict(content, path)
    own = content.get("kinegraph")
    if own is None:
        return _read_foreign(state_dict, content, path)
    state_dict = _convert_to_float32(state_dict)
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
        )
        _check_description(checkpoint)
    except (KeyError, TypeError, ValueError, DataError) as error:
        got = f"a damaged description ({type(error).__name__}: {error})"
        raise CheckpointError(Problem(str(path), got, "the entries that Kinegraph writes")) from error
    return checkpoint


def _check_description(checkpoint: Checkpoint) -> None:
    """Raises ValueError where an entry of our own does not fit its type or the tensors."""
    head, classes = checkpoint.state_dict.get("fcn.weight"), checkpoint.num_classes
    if type(classes) is not int or classes < 1:
        raise ValueError(f"num_classes is {_show(classes)}")
    if head is None or head.shape[:1] != (classes,):
        found = "no tensor" if head is None else f"a tensor {tuple(head.shape)}"
        raise ValueError(f"{classes} classes and {found} fcn.weight")
    if "A" in checkpoint.state_dict and checkpoint.state_dict["A"].shape[-1:] != (checkpoint.layout.num_joints,):
        raise ValueError(f"{checkpoint.layout.num_joints} joints and a graph {tuple(checkpoint.state_dict['A'].shape)}")
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


def _show(value: Any) -> str:
    return reprlib.repr(value)[:80]


def build_from_checkpoint(checkpoint: Checkpoint, where: str) -> nn.Module:
    """The network with its weights, in eval mode. Raises CheckpointError where tensors do not fit."""
    adjacency = checkpoint.state_dict.get("A")
    if adjacency is None:
        adjacency = torch.from_numpy(build_adjacency(checkpoint.layout, checkpoint.options.graph_strategy))
    _check_graph(adjacency, where)
    with torch.device("meta"):  # shapes first: the description may ask for far more memory than the tensors hold
        plan = STGCN(checkpoint.options, adjacency.to("meta"), checkpoint.num_classes)
    wrong = _list_misfits(plan, checkpoint.state_dict)
    if wrong:
        raise CheckpointError(*(Problem(f"{where}: {name}", got, expected) for name, got, expected in wrong[:5]))
    model = STGCN(checkpoint.options, adjacency, checkpoint.num_classes)
    model.load_state_dict(checkpoint.state_dict)
    return model.eval()


def load_pretrained(model: nn.Module, checkpoint: Checkpoint, where: str) -> list[str]:
    """Copy weights into a model for fine-tuning; a head of another size stays as it is initialised.

    Returns messages for the user. Raises CheckpointError if anything but the head does not fit.
    """
    weights = dict(checkpoint.state_dict)
    messages = []
    own_graph, other_graph = model.get_buffer("A"), weights.get("A")
    if other_graph is not None and (own_graph.shape != other_graph.shape or not torch.allclose(own_graph, other_graph)):
        got = f"a graph of layout {checkpoint.layout.name}, strategy {checkpoint.options.graph_strategy}"
        hint = "Set model.graph_layout and model.graph_strategy to those of the checkpoint."
        raise CheckpointError(Problem(where, got, "the graph of model.graph_layout and model.graph_strategy", hint))
    head = {name for name in weights if name.startswith("fcn.")}
    target = model.state_dict()
    if any(name in target and target[name].shape != weights[name].shape for name in head):
        for name in head:
            del weights[name]
        messages.append(
            f"The head of {where} has {checkpoint.num_classes} classes and this model has "
            f"{target['fcn.weight'].shape[0]}: it starts new, all other weights are taken over."
        )
    wrong = [item for item in _list_misfits(model, weights) if item[0] not in head]
    if wrong:
        raise CheckpointError(*(Problem(f"{where}: {name}", got, expected) for name, got, expected in wrong[:5]))
    model.load_state_dict(weights, strict=False)
    return messages


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


def _load_restricted(path: Path, key: str) -> dict[str, Any]:
    try:
        size_bytes = path.stat().st_size
        if size_bytes > MAX_FILE_BYTES:
            raise CheckpointError(Problem(str(path), f"{size_bytes} bytes", f"at most {MAX_FILE_BYTES} bytes"))
        content = path.read_bytes()
    except OSError as error:
        hint = "Check the path."
        raise CheckpointError(Problem(str(path), error.strerror or str(error), "a readable file", hint)) from error
    if is_encrypted(content):
        content = decrypt(content, key, str(path))
    _refuse_compression(content, path)
    try:
        names = _scan_pickles(content)
        inert = [name for name in names if name.startswith(INERT_MODULES) or name in INERT_TYPES]
        inert.append("collections.defaultdict")
        with torch.serialization.safe_globals([(_InertOptions, name) for name in inert]):
            loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        _check_sizes(loaded, len(content))
    except Exception as error:  # torch raises many types for files that are damaged or refused
        raise CheckpointError(_explain_refusal(path, error)) from error
    if not isinstance(loaded, dict):
        raise CheckpointError(Problem(str(path), f"a {type(loaded).__name__}", "a dict with a state_dict"))
    return loaded


def _scan_pickles(content: bytes) -> set[str]:
    """The names in the pickles of a file, before they are read. Raises ValueError for what is not allowed.

    torch wrote five pickles before the tensors until version 1.5, and one in an archive since then.
    """
    is_archive = content.startswith(b"PK\x03\x04")
    if is_archive:
        content = torch._C.PyTorchFileReader(io.BytesIO(content)).get_record("data.pkl")
    stream, names, texts, calls = io.BytesIO(content), set(), set(), 0
    for _ in range(1 if is_archive else 5):
        for opcode, argument, _ in pickletools.genops(stream):
            if stream.tell() > MAX_PICKLE_BYTES:
                raise ValueError("its description is too long")
            if opcode.name == "GLOBAL":
                module, name = argument.split(" ", 1)
                module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
                names.add(f"{module}.{name}")
            elif opcode.name in ("REDUCE", "NEWOBJ"):
                calls += 1
            elif argument == "state_dict_encrypted":
                texts.add(argument)
        if stream.tell() == len(content):
            break
    refused = {name for name in names if not name.startswith(INERT_MODULES) and name not in INERT_TYPES}
    refused = {name for name in refused if not TENSOR_NAMES.fullmatch(name)}
    if refused:
        raise ValueError(f"GLOBAL {'_io.BytesIO' if texts else min(refused)}")
    if calls * min(stream.tell(), MAX_PICKLE_BYTES) > MAX_COPIED_BYTES:
        raise ValueError("its description has too many objects")
    return names


def _check_sizes(loaded: Any, num_bytes: int) -> None:
    """Refuse tensors that claim more values than the file holds: views that repeat some (stride 0), or none at all."""
    tensors = list(_list_tensors(loaded))
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    repeats = any(size > tensor.untyped_storage().nbytes() for size, tensor in zip(sizes, tensors, strict=True))
    if repeats or sum(sizes) > 2 * num_bytes or sum(storages.values()) > num_bytes:
        raise ValueError("tensors larger than what the file holds of them")


def _list_tensors(loaded: Any) -> Iterator[torch.Tensor]:
    waiting, seen = [loaded], set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, torch.Tensor):
            yield node
        elif isinstance(node, dict):
            waiting += [*node.keys(), *node.values(), *vars(node).values()] if type(node) is not dict else node.values()
        elif isinstance(node, list | tuple):
            waiting += node


def _refuse_compression(content: bytes, path: Path) -> None:
    """torch stores tensors as they are; a file that unpacks to more than its size is not from torch."""
    if not content.startswith(b"PK\x03\x04"):
        return
    try:
        unpacked = sum(entry.file_size for entry in zipfile.ZipFile(io.BytesIO(content)).infolist())
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise CheckpointError(_explain_refusal(path, error)) from error
    if unpacked > len(content):
        got = f"an archive that unpacks from {len(content)} to {unpacked} bytes"
        raise CheckpointError(Problem(str(path), got, "tensors stored without compression"))


def _explain_refusal(path: Path, error: Exception) -> Problem:
    text = str(error)
    found = re.search(r"GLOBAL ([\w.]+)", text)
    if found and found[1] == "_io.BytesIO":
        return _explain_vendor_encryption(path)
    if found:
        hint = "Save it again with tensors and plain values only."
        return Problem(str(path), f"an object of type {found[1]}", "tensors and plain values", hint)
    reason = " ".join(text.split("WeightsUnpickler error:")[-1].split("Check the documentation")[0].split())[:200]
    hint = "The file may be cut or damaged: copy it again."
    return Problem(str(path), f"a file that cannot be read ({reason})", "a PyTorch checkpoint", hint)


def _explain_vendor_encryption(path: Path) -> Problem:
    hint = "Save it without encryption there first; its format is not public."
    return Problem(str(path), "a checkpoint encrypted by the original tool", "a plain checkpoint, or one of ours", hint)


def _find_state_dict(content: Mapping[str, Any], path: Path) -> dict[str, torch.Tensor]:
    weights = content.get("state_dict", content)
    if content.get("state_dict_encrypted") or isinstance(weights, bytes):
        raise CheckpointError(_explain_vendor_encryption(path))
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


def _convert_to_float32(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.float() if value.is_floating_point() else value for name, value in state_dict.items()}


def _check_graph(adjacency: torch.Tensor, where: str) -> None:
    shape = tuple(adjacency.shape)
    if len(shape) != 3 or shape[1] != shape[2] or not (0 < shape[0] <= MAX_SUBSETS and 0 < shape[1] <= MAX_JOINTS):
        expected = f"(K, V, V), at most {MAX_SUBSETS} subsets and {MAX_JOINTS} joints"
        raise CheckpointError(Problem(f"{where}: A", f"shape {shape}", expected))


def _read_foreign(state_dict: dict[str, torch.Tensor], content: Mapping[str, Any], path: Path) -> Checkpoint:
    """Tell the options of ST-GCN from the shapes of its tensors."""
    needed = ["A", "fcn.weight", "data_bn.weight", "st_gcn_networks.0.gcn.conv.weight"]
    absent = [name for name in needed if name not in state_dict]
    if absent:
        hint = f"It holds {', '.join(list(state_dict)[:3])}, ..."
        raise CheckpointError(Problem(str(path), "no " + ", ".join(absent), "the tensors of ST-GCN", hint))
    for name in ("fcn.weight", "st_gcn_networks.0.gcn.conv.weight"):
        shape = tuple(state_dict[name].shape)
        if len(shape) != 4 or 0 in shape:
            raise CheckpointError(Problem(f"{path}: {name}", f"shape {shape}", "the four axes of a convolution"))
    _check_graph(state_dict["A"], str(path))
    is_rounded = state_dict["A"].dtype in (torch.float16, torch.bfloat16)
    state_dict = _convert_to_float32(state_dict)
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
        raise CheckpointError(Problem(str(path), got, "a number of channels that model.input_channels takes")) from error
    num_classes = state_dict["fcn.weight"].shape[0]
    return Checkpoint(state_dict, options, layout, num_classes, _find_label_map(content, num_classes))


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
    if not isinstance(node, _InertOptions):
        return node
    state = getattr(node, "state", None)
    if not isinstance(state, Mapping):
        return state
    return state.get("_content", state.get("_val", state))
