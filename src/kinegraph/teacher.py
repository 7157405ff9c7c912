"""Distillation: a trained model whose answers on the same augmented clips a training learns from."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kinegraph.data.input_checks import settle_options
from kinegraph.data.pipeline import InputPipeline
from kinegraph.errors import CheckpointError, Problem, SpecError
from kinegraph.models.checkpoint import build_from_checkpoint, read_checkpoint
from kinegraph.skeleton.layouts import Layout

PLACE = "train.teacher"
HINT = "Train the teacher on the same classes and layout, with the same `input` section; only its streams may be fewer."


class Teacher:
    """The network of a checkpoint whose input is that of the student: all of its streams, or some of them.

    Raises SpecError for other classes, another layout or another input, CheckpointError for a file that cannot be read.
    """

    def __init__(
        self,
        path: str,
        key: str,
        pipeline: InputPipeline,
        layout: Layout,
        label_map: dict[str, int],
        device: torch.device,
    ) -> None:
        try:
            checkpoint = read_checkpoint(path, key)
        except CheckpointError as error:
            raise CheckpointError(*(replace(item, where=f"{PLACE}: {item.where}") for item in error.problems)) from None
        # A file of TAO stores no input: its network saw arrays as they are
        own = InputPipeline(checkpoint.num_channels or checkpoint.options.input_channels, checkpoint.layout.num_joints)
        if checkpoint.pipeline is not None:
            own = InputPipeline.from_dict(checkpoint.pipeline, f"{path}: input pipeline")
        problems = _compare_inputs(own, pipeline)
        problems += _compare_layouts(checkpoint.layout, layout)
        if checkpoint.num_classes != len(label_map):
            got = f"{checkpoint.num_classes} classes"
            problems.append(Problem(f"{PLACE}: classes", got, f"{len(label_map)}", HINT))
        elif checkpoint.label_map not in (None, label_map):
            problems.append(Problem(f"{PLACE}: dataset.label_map", repr(checkpoint.label_map), repr(label_map), HINT))
        if problems:
            raise SpecError(*problems)
        self.channels = _find_channels(own, pipeline)
        self.network = build_from_checkpoint(checkpoint, path).to(device)

    @torch.no_grad()
    def compute(self, clips: Tensor) -> Tensor:
        """The student's input (N, C, T, V, M) -> the teacher's logits (N, classes)."""
        logits: Tensor = self.network(clips[:, self.channels])
        return logits


def _compare_layouts(teacher: Layout, student: Layout) -> list[Problem]:
    """By what they hold: the same skeleton may have another name."""
    theirs, ours = teacher.to_dict(), student.to_dict()
    differing = [part for part in ours if part != "name" and theirs[part] != ours[part]]
    if not differing:
        return []
    got, expected = (f"{each.name} ({each.num_joints} joints)" for each in (teacher, student))
    return [Problem(f"{PLACE}: model.graph_layout", f"{got}, with other {', '.join(differing)}", expected, HINT)]


def _compare_inputs(teacher: InputPipeline, student: InputPipeline) -> list[Problem]:
    theirs, ours = (settle_options(each.options) for each in (teacher, student))
    problems = [
        Problem(f"{PLACE}: input.{name}", repr(theirs[name]), repr(ours[name]), HINT)
        for name in ours
        if name not in ("streams", "test_clips") and theirs[name] != ours[name]
    ]
    missing = [name for name in theirs["streams"] if name not in ours["streams"]]
    if missing:
        got = f"the streams {', '.join(missing)}"
        problems.append(Problem(f"{PLACE}: input.streams", got, f"some of {', '.join(ours['streams'])}", HINT))
    if teacher.num_channels != student.num_channels:
        got, expected = f"{teacher.num_channels} channels", str(student.num_channels)
        problems.append(Problem(f"{PLACE}: model.input_channels", got, expected, HINT))
    return problems


def _find_channels(teacher: InputPipeline, student: InputPipeline) -> list[int]:
    """The channels of the student's input that the teacher takes, in its order."""
    theirs, ours = (settle_options(each.options)["streams"] for each in (teacher, student))
    size = student.num_channels
    return [ours.index(name) * size + channel for name in theirs for channel in range(size)]
