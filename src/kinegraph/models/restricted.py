"""Reading a PyTorch file of a stranger: only tensors and plain values, and no more memory than its size warrants."""

from __future__ import annotations

import io
import pickletools
import re
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from kinegraph.errors import CheckpointError, Problem
from kinegraph.models.encryption import decrypt, is_encrypted

MAX_FILE_BYTES = 8 * 2**30
MAX_PICKLE_BYTES = 4 * 2**20
MAX_COPIED_BYTES = 2**30
"""The bytes of a pickle times its calls, each of which may copy all that was built before."""


class InertOptions(dict[Any, Any]):
    """Stands for an options object in a foreign file: keeps its state, never runs its code."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        self.state = state


INERT_MODULES = ("omegaconf.", "nvidia_tao_core.", "nvidia_tao_pytorch.", "pytorch_lightning.", "typing.")
INERT_TYPES = ("builtins.dict", "builtins.list", "builtins.int", "builtins.float", "builtins.str", "builtins.bool")
"""Names in the hyper-parameters of foreign files that are read as `InertOptions`, whatever is installed."""
TENSOR_NAMES = re.compile(
    r"collections\.(OrderedDict|defaultdict)|torch\.(Size|device|nn\.parameter\.Parameter)"
    r"|torch\._utils\._rebuild_(tensor|tensor_v2|parameter)"
    r"|torch\.(Float|Double|Half|BFloat16|Long|Int|Short|Char|Byte|Bool)Storage"
    r"|torch\.(float|double|half|bfloat|u?int|long|short|bool)\d*"
)
"""What else a pickle may name. torch allows more, some of which allocates what the file asks for (bytearray)."""


def load_restricted(path: Path, key: str) -> dict[str, Any]:
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
        with torch.serialization.safe_globals([(InertOptions, name) for name in inert]):
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
                module, name = str(argument).split(" ", 1)
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
        raise ValueError(f"GLOBAL {'_io.BytesIO' if texts or '_io.BytesIO' in refused else min(refused)}")
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
        return explain_vendor_encryption(path)
    if found:
        hint = "Save it again with tensors and plain values only."
        return Problem(str(path), f"an object of type {found[1]}", "tensors and plain values", hint)
    reason = " ".join(text.split("WeightsUnpickler error:")[-1].split("Check the documentation")[0].split())[:200]
    hint = "The file may be cut or damaged: copy it again."
    return Problem(str(path), f"a file that cannot be read ({reason})", "a PyTorch checkpoint", hint)


def explain_vendor_encryption(path: Path) -> Problem:
    hint = "Save it without encryption there first; its format is not public."
    return Problem(str(path), "a checkpoint encrypted by the original tool", "a plain checkpoint, or one of ours", hint)
