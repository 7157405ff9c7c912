"""Distillation: a trained model whose answers on the same augmented clips a training learns from."""

from __future__ import annotations

from dataclasses import asdict

import torch
from torch import Tensor

from kinegraph.data.pipeline import InputPipeline
from kinegraph.errors import Problem, SpecError
from kinegraph.models.checkpoint import build_from_checkpoint, read_checkpoint

PLACE = "train.teacher"


class Teacher:
    """The network of a checkpoint whose input is that of the student: all of its streams, or some of them.

    Raises SpecError for other classes or another input, CheckpointError for a file that cannot be read.
    """

    def __init__(
        self, path: str, key: str, pipeline: InputPipeline, label_map: dict[str, int], device: torch.device
    ) -> None:
        checkpoint = read_checkpoint(path, key)
        own = pipeline
        if checkpoint.pipeline is not None:
            own = InputPipeline.from_dict(checkpoint.pipeline, f"{path}: input pipeline")
        problems = _compare_inputs(own, pipeline)
        if checkpoint.label_map is not None and checkpoint.label_map != label_map:
            problems.append(Problem(PLACE, f"classes {checkpoint.class_names}", f"{sorted(label_map)}"))
        if problems:
            raise SpecError(*problems)
        self.channels = _find_channels(own, pipeline)
        self.network = build_from_checkpoint(checkpoint, path).to(device)

    @torch.no_grad()
    def compute(self, clips: Tensor) -> Tensor:
        """The student's input (N, C, T, V, M) -> the teacher's logits (N, classes)."""
        logits: Tensor = self.network(clips[:, self.channels])
        return logits


def _compare_inputs(teacher: InputPipeline, student: InputPipeline) -> list[Problem]:
    hint = "Train the teacher with the same `input` section; only its streams may be fewer."
    theirs, ours = (asdict(each.options) if each.options else {} for each in (teacher, student))
    names = sorted((theirs.keys() | ours.keys()) - {"streams", "test_clips"})
    problems = [
        Problem(f"{PLACE}: input.{name}", repr(theirs.get(name)), repr(ours.get(name)), hint)
        for name in names
        if theirs.get(name) != ours.get(name)
    ]
    missing = [name for name in theirs.get("streams", []) if name not in ours.get("streams", [])]
    if missing:
        got = f"the streams {', '.join(missing)}"
        problems.append(Problem(f"{PLACE}: input.streams", got, f"some of {', '.join(ours['streams'])}", hint))
    return problems


def _find_channels(teacher: InputPipeline, student: InputPipeline) -> list[int]:
    """The channels of the student's input that the teacher takes, in its order."""
    if teacher.options is None or student.options is None:
        return list(range(student.output_channels))
    size = student.num_channels
    places = [student.options.streams.index(name) for name in teacher.options.streams]
    return [place * size + channel for place in places for channel in range(size)]
