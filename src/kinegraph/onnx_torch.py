"""Networks that cannot be folded as ONNX files, by PyTorch's exporter."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

import onnx
import torch
from torch import nn

from kinegraph.errors import KinegraphError, Problem
from kinegraph.model_description import ModelDescription
from kinegraph.onnx_graph import INPUT_NAME, OUTPUT_NAME

SAMPLE_SHAPE = (2, 30, 2)
MIN_OPSET = 18
"""PyTorch's exporter writes no older operator set."""


def export_by_torch(model: nn.Module, description: ModelDescription, opset_version: int) -> bytes:
    """The network as the content of an ONNX file with the description in its metadata.

    torch's newer exporter (dynamo) takes 5 to 15 s where the older, deprecated one takes 1 s. But the older one refuses
    convolutions whose weights are computed, as in the graph convolutions here.
    """
    assert description.pipeline is not None
    clips, frames, people = SAMPLE_SHAPE
    pipeline = description.pipeline
    sample = torch.zeros(clips, pipeline.output_channels, frames, pipeline.num_joints, people)
    axes = {0: torch.export.Dim("batch"), 2: torch.export.Dim("frames"), 4: torch.export.Dim("people")}
    with _silence():
        program = torch.onnx.export(
            model,
            (sample,),
            input_names=[INPUT_NAME],
            output_names=[OUTPUT_NAME],
            dynamic_shapes=(axes,),
            opset_version=opset_version,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    made = max(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    if made != opset_version:
        got = f"operator set {made}"
        hint = f"Set export.opset_version={made}."
        raise KinegraphError(Problem("export", got, str(opset_version), hint))
    _strip(proto)
    proto.producer_name = "kinegraph"
    onnx.helper.set_model_props(proto, description.to_metadata())
    onnx.checker.check_model(proto, full_check=True)
    return proto.SerializeToString()


def _strip(proto: onnx.ModelProto) -> None:
    """Take out the exporter's notes, which hold source lines and paths of this machine."""
    graph = proto.graph
    for entry in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        entry.doc_string = ""
        del entry.metadata_props[:]


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep the exporter's warnings about itself and about absent packages off the screen."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
