"""What is measured: the model and the shape of its clips, read once before any backend opens the file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kinegraph.backends.model_file import ModelFile
from kinegraph.benchmark.settings import Settings
from kinegraph.data.arrays import open_array
from kinegraph.data.pipeline import InputPipeline
from kinegraph.errors import Problem, UserError
from kinegraph.model_description import ModelDescription
from kinegraph.online.onnx_steps import is_step_form
from kinegraph.remote import fetch
from kinegraph.runtime import open_model_file

DEFAULT_FRAMES = 300
MAX_INPUT_BYTES = 2**31

Shape = tuple[int, int, int, int]


@dataclass(frozen=True)
class ModelFacts:
    """path, data_path: files of this machine. clip_shape (C, T, V, M) is what the network gets, data_shape that of the
    clips before the input pipeline. multiply_adds, of one clip: None for a network that cannot be folded.
    """

    path: Path
    data_path: Path | None
    clip_shape: Shape
    data_shape: Shape
    file_bytes: int
    parameters: int
    num_classes: int
    model_type: str
    layout: str
    multiply_adds: int | None


def read_facts(settings: Settings, key: str = "") -> ModelFacts:
    """Open the model, and the data where there are some, and find out all that the workers are told.

    Raises CheckpointError, DataError or UserError for a file that is none, or clips that do not fit or fill the memory.
    """
    path = fetch(settings.model)
    data_path = fetch(settings.data) if settings.data else None
    file = open_model_file(path, key=key)
    only_steps = file.kind == "onnx" and is_step_form(file.metadata)
    # No backend for clips can describe a file that takes frames
    description = ModelDescription.from_metadata(file.metadata, str(path)) if only_steps else file.description
    if data_path is None:
        fixed = _find_fixed_axes(file) if file.kind == "onnx" and not only_steps else (None,) * 5
        clip_shape = _choose_shape(description.pipeline, fixed, settings)
        channels = description.pipeline.num_channels if description.pipeline else clip_shape[0]
        data_shape = (channels, *clip_shape[1:])
    else:
        data_shape, clip_shape = _read_data_shape(data_path, description)
    _check_size(max(clip_shape, data_shape, key=math.prod), settings)
    options = description.metadata.get("model")
    return ModelFacts(
        path=path,
        data_path=data_path,
        clip_shape=clip_shape,
        data_shape=data_shape,
        file_bytes=path.stat().st_size,
        parameters=_count_parameters(file),
        num_classes=description.num_classes,
        model_type=str(options.get("model_type", "")) if isinstance(options, dict) else "",
        layout=description.layout.name if description.layout else "",
        multiply_adds=None if only_steps else count_multiply_adds(file, clip_shape),
    )


def count_multiply_adds(file: ModelFile, clip_shape: Shape) -> int | None:
    """Of one clip (C, T, V, M), all its people; None where the network cannot be folded."""
    network = file.network
    if network is None:
        return None
    _, num_frames, _, num_people = clip_shape
    head = int(network.head_weight.size)  # once for a clip, after the mean over its people
    return (network.count_multiply_adds(num_frames) - head) * num_people + head


def _find_fixed_axes(file: ModelFile) -> tuple[int | None, ...]:
    """The sizes (N, C, T, V, M) that an ONNX file demands; None: any."""
    from kinegraph.backends.onnx_interface import read_interface

    shape = read_interface(file.proto, str(file.path)).given.shape
    return tuple(size if isinstance(size, int) else None for size in shape)


def _choose_shape(pipeline: InputPipeline | None, fixed: tuple[int | None, ...], settings: Settings) -> Shape:
    """Of random clips as the network gets them: what was asked for, else what the file fixes, else usual sizes."""
    if pipeline is None:
        got = "a model that does not say its channels and joints"
        raise UserError(Problem(settings.model, got, "clips to measure it with", "Give them with --data clips.npy."))
    frames = settings.frames or fixed[2] or _find_frames(pipeline) or DEFAULT_FRAMES
    people = settings.people or fixed[4] or 1
    return pipeline.output_channels, frames, pipeline.num_joints, people


def _find_frames(pipeline: InputPipeline) -> int | None:
    """Frames that the pipeline samples of every clip; None where it leaves all."""
    if pipeline.options is None or pipeline.options.sampling == "none":
        return None
    return pipeline.options.num_frames


def _read_data_shape(path: Path, description: ModelDescription) -> tuple[Shape, Shape]:
    """(before, after the pipeline) of the clips of a file, which also finds out that they fit the model."""
    clips = open_array(path)
    first = np.array(clips[:1])
    pipeline = description.pipeline or InputPipeline(first.shape[1], first.shape[3])
    return first.shape[1:], pipeline(first, str(path)).shape[1:]


def _check_size(shape: Shape, settings: Settings) -> None:
    size_bytes = 4 * 2 * max(settings.batches) * math.prod(shape)  # see subjects.make_clips
    if size_bytes > MAX_INPUT_BYTES:
        got = f"{max(settings.batches)} clips {shape} at once, which take {size_bytes / 2**30:.1f} GiB"
        expected = f"at most {MAX_INPUT_BYTES / 2**30:g} GiB"
        raise UserError(Problem("--batch", got, expected, "Ask for smaller batches, fewer frames or fewer people."))


def _count_parameters(file: ModelFile) -> int:
    """Trained numbers of a checkpoint; of an ONNX file all numbers that it stores."""
    if file.kind == "torch":
        return sum(parameter.numel() for parameter in file.module.parameters())
    return sum(math.prod(tensor.dims) for tensor in file.proto.graph.initializer)
