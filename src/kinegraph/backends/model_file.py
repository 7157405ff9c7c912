"""One model file, read as far as a backend asks: weights, folded network, ONNX content."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kinegraph.errors import CheckpointError, Problem, look_up
from kinegraph.model_description import ModelDescription, describe_checkpoint
from kinegraph.models.folded import FoldedNetwork
from kinegraph.models.quantization import Quantization

if TYPE_CHECKING:
    import onnx
    from torch import nn

    from kinegraph.models.checkpoint import Checkpoint

KINDS = {".pth": "torch", ".pt": "torch", ".ckpt": "torch", ".tlt": "torch", ".onnx": "onnx"}
OPSET_VERSION = 18


def find_kind(path: Path) -> str:
    """torch or onnx, by the ending of the name. Raises CheckpointError for another ending."""
    return look_up(KINDS, path.suffix.lower(), f"{path}: ending", CheckpointError)


class ModelFile:
    """kind: torch (a checkpoint of Kinegraph or TAO) or onnx. key: of an encrypted checkpoint.

    Every property raises CheckpointError where the file cannot be read.
    """

    def __init__(self, path: Path, kind: str, key: str = "") -> None:
        if not path.is_file():
            got = "a folder" if path.is_dir() else "no such file"
            raise CheckpointError(Problem(str(path), got, "a model file", "Check the path."))
        self.path, self.kind, self.key = path, kind, key

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """Of a .pth file."""
        from kinegraph.models.checkpoint import read_checkpoint

        return read_checkpoint(self.path, self.key)

    @cached_property
    def module(self) -> nn.Module:
        """The network of a .pth file as PyTorch trained it, in eval mode."""
        from kinegraph.models.checkpoint import build_from_checkpoint

        return build_from_checkpoint(self.checkpoint, str(self.path))

    @cached_property
    def proto(self) -> onnx.ModelProto:
        """Of an .onnx file."""
        from kinegraph.onnx_structure import read_model

        return read_model(self.path)

    @cached_property
    def metadata(self) -> dict[str, str]:
        """Of an .onnx file."""
        return {entry.key: entry.value for entry in self.proto.metadata_props}

    @cached_property
    def description(self) -> ModelDescription:
        """What the file says about itself."""
        if self.kind == "torch":
            return describe_checkpoint(self.checkpoint, str(self.path))
        from kinegraph.backends.onnx_interface import read_interface

        return read_interface(self.proto, str(self.path)).describe()

    @cached_property
    def network(self) -> FoldedNetwork | None:
        """The folded network; None where there is none."""
        return self._folded[0]

    @property
    def quantization(self) -> Quantization | None:
        """Activation ranges, of an ONNX file for int8."""
        return self._folded[1]

    @cached_property
    def _folded(self) -> tuple[FoldedNetwork | None, Quantization | None]:
        found: tuple[FoldedNetwork | None, Quantization | None]
        if self.kind == "torch":
            from kinegraph.models import Foldable

            found = self.module.fold() if isinstance(self.module, Foldable) else None, None
        else:
            from kinegraph.onnx_structure import rebuild

            found = rebuild(self.proto, str(self.path))
        if found[0] is not None:
            _check_finite(found[0], str(self.path))
        return found

    def demand_network(self, backend: str) -> FoldedNetwork:
        """The folded network. Raises CheckpointError where there is none."""
        if self.network is None:
            got = "a network that cannot be folded" if self.kind == "torch" else "an ONNX file without a folded network"
            other = "torch" if self.kind == "torch" else "onnxruntime"
            expected = f"a model that the backend {backend} can carry out"
            raise CheckpointError(Problem(str(self.path), got, expected, f"Use the backend {other}."))
        return self.network

    def make_onnx(self, backend: str) -> bytes:
        """The content of an ONNX file: of a .pth file the folded network, written in memory."""
        if self.kind == "onnx":
            refuse_external_data(self.proto, str(self.path))
            return self.path.read_bytes()
        from kinegraph.onnx_graph import write_clip_form

        return write_clip_form(self.demand_network(backend), OPSET_VERSION, self.description.to_metadata())


def refuse_external_data(proto: onnx.ModelProto, where: str) -> None:
    """Raises CheckpointError for weights in other files: each runtime looks for them in another folder."""
    from onnx.external_data_helper import uses_external_data

    outside = [tensor.name for tensor in _walk_tensors(proto.graph) if uses_external_data(tensor)]
    if outside:
        got = f"weights in other files ({', '.join(outside[:3])})"
        raise CheckpointError(Problem(where, got, "one file", "Write it with all weights inside, or use onnxruntime."))


def _walk_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Every tensor of a graph and of the graphs inside it."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for inner in (attribute.g, *attribute.graphs):
                if inner.node or inner.initializer:
                    yield from _walk_tensors(inner)


def _check_finite(network: FoldedNetwork, where: str) -> None:
    """Kernels that cut negative values may hide NaN: weights of a failed training would give answers."""
    arrays = [network.head_weight, network.head_bias]
    for layer in network.layers:
        arrays += [value for value in vars(layer).values() if isinstance(value, np.ndarray)]
    if not all(np.isfinite(array).all() for array in arrays):
        got = "weights, hence logits that are NaN or infinite"
        raise CheckpointError(Problem(where, got, "finite weights", "They may come from a failed training."))
