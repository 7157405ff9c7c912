"""Whether the options of an input pipeline fit the data, the layout and frame by frame inference."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from kinegraph.data.body import Body
from kinegraph.errors import DataError, Problem

if TYPE_CHECKING:
    from kinegraph.spec_input import InputSpec

NEEDS_LATER_FRAMES = {
    ("missing", "interpolate"): ("keep or hold", "a joint goes to where it is seen next"),
    ("people_order", "presence"): ("file", "who is there longest is known at the end"),
    ("people_order", "motion"): ("file", "who moves most is known at the end"),
    ("people", "together"): ("each", "people come one by one"),
    ("sampling", "uniform"): ("none or contiguous", "it needs the length of the clip"),
    ("sampling", "crop_resize"): ("none or contiguous", "it needs the length of the clip"),
}
"""(option, value) -> what would work, and why this does not."""

RESAMPLES = ("uniform", "crop_resize")
"""What `sampling` must be for several different clips of a sequence."""

NOT_READ_WITH = {
    "score_threshold": (("score_channel",), (-1,)),
    "people": (("centre", "scale", "align"), ("none",)),
    "scale_by": (("scale",), ("none",)),
    "vertical": (("align",), ("none",)),
    "num_frames": (("sampling",), ("none",)),
    "smallest_crop": (("sampling",), ("none", "uniform", "contiguous")),
}
"""option -> the options without which nothing reads it, where all of them have one of the values."""
ONLY_IN_TESTING = ("test_crop", "test_clips")
UNKNOWN = {"frames_per_second": 0.0, "origin_joint": -1}
"""option -> the value that says nothing about the data."""


def find_score_channel(lowest: Sequence[float], highest: Sequence[float]) -> int:
    """The channel that looks like a score: the last of three or more, if it is never outside 0 to 1; else -1.

    lowest, highest: of each channel, over the joints that are there.
    """
    last = len(lowest) - 1
    return last if last >= 2 and lowest[last] >= 0 and 0 < highest[last] <= 1 else -1


def find_step_obstacles(options: InputSpec | None) -> list[Problem]:
    """The options that rule out frame by frame inference."""
    if options is None:
        return []
    problems = [
        Problem(f"input.{name}", repr(value), f"{expected} for frame by frame inference", f"With {value}, {reason}.")
        for (name, value), (expected, reason) in NEEDS_LATER_FRAMES.items()
        if getattr(options, name) == value
    ]
    if options.test_clips > 1:
        hint = "Several clips of a sequence are sampled when it is over."
        problems.append(Problem("input.test_clips", str(options.test_clips), "1 for frame by frame inference", hint))
    return problems


def compare_options(own: InputSpec | None, trained: InputSpec | None, where: str) -> list[str]:
    """Messages for fine-tuning: what the network met in training and does not meet any more.

    own: of the run; trained: of the checkpoint `where`; None: a pipeline without steps. Streams are told too where
    their number is the same, so that weights of other streams fit.
    """
    from kinegraph.spec_input import InputSpec

    own, trained = own or InputSpec(), trained or InputSpec()
    messages = []
    for item in fields(InputSpec):
        name = item.name
        values = getattr(trained, name), getattr(own, name)
        deciders, idle = NOT_READ_WITH.get(name, ((name,), ()))
        is_read = any(getattr(options, decider) not in idle for decider in deciders for options in (own, trained))
        if values[0] == values[1] or not is_read or name in ONLY_IN_TESTING or UNKNOWN.get(name) in values:
            continue
        before, now = (", ".join(value) if isinstance(value, list) else str(value) for value in values)
        messages.append(f"{where} was trained with input.{name} {before} and this run has {now}: it has to adapt.")
    return messages


def settle_options(options: InputSpec | None) -> dict[str, Any]:
    """The options of a pipeline's input, to compare: defaults where it has no steps."""
    from kinegraph.spec_input import InputSpec

    settled = asdict(options or InputSpec())
    # -1 asks to find out, and a pipeline without steps never needed to
    return settled | {"origin_joint": -2 if settled["origin_joint"] == -1 else settled["origin_joint"]}


def read_options(data: Any, where: str) -> InputSpec:
    """The options that a pipeline stored. Raises DataError for unknown ones and for values that they cannot have."""
    from pydantic import TypeAdapter, ValidationError

    from kinegraph.spec_input import InputSpec

    if not isinstance(data, Mapping):
        raise DataError(Problem(where, reprlib.repr(data), "a mapping of options"))
    try:
        return TypeAdapter(InputSpec).validate_python(dict(data))
    except ValidationError as error:
        problems = [
            Problem(".".join([where, *(str(part) for part in item["loc"])]), reprlib.repr(item["input"]), item["msg"])
            for item in error.errors()[:20]
        ]
        raise DataError(*problems) from None


def find_option_problems(
    options: InputSpec, num_channels: int, num_joints: int, body: Body, where: str
) -> list[Problem]:
    """What does not fit the channels and joints of the data, or other options."""
    problems = []
    score = options.score_channel
    if score >= 0 and (score != num_channels - 1 or score < 2):
        expected = f"-1 or {num_channels - 1}, the last of {num_channels} channels, after x and y"
        if num_channels < 3:
            expected = f"-1: {num_channels} channels leave none for a score"
        problems.append(Problem(f"{where}.score_channel", str(score), expected))
    if options.score_threshold > 0 and score < 0:
        problems.append(Problem(f"{where}.score_threshold", str(options.score_threshold), "0 without a score_channel"))
    if options.origin_joint >= num_joints:
        expected = f"-1, -2 or a joint from 0 to {num_joints - 1}"
        problems.append(Problem(f"{where}.origin_joint", str(options.origin_joint), expected))
    if options.align != "none" and num_channels - (score >= 0) != 3:
        expected = "none: only three coordinates can be turned about the vertical"
        problems.append(Problem(f"{where}.align", options.align, expected))
    elif options.align != "none" and not body.across:
        expected = "none: the layout names no left and right shoulder or hip"
        problems.append(Problem(f"{where}.align", options.align, expected))
    if options.scale != "none" and options.scale_by == "trunk" and not body.trunk[0]:
        hint = "The layout names no hips and shoulders to measure a trunk by."
        problems.append(Problem(f"{where}.scale_by", "trunk", "bones", hint))
    if options.test_clips > 1 and options.sampling not in RESAMPLES:
        expected = f"1 with sampling {options.sampling}, which always takes the same frames"
        hint = f"Set sampling to {' or '.join(RESAMPLES)}."
        problems.append(Problem(f"{where}.test_clips", str(options.test_clips), expected, hint))
    if not options.streams or len(set(options.streams)) != len(options.streams):
        problems.append(Problem(f"{where}.streams", repr(options.streams), "at least one stream, each once"))
    return problems
