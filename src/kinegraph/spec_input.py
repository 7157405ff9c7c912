"""The options of the input pipeline and of augmentation, which spec.py takes in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, WithJsonSchema
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from kinegraph.config import SPEC_CONFIG, SearchRange, option
from kinegraph.errors import Problem

STREAMS = ("joint", "bone", "joint_motion", "bone_motion")


def find_weight_problems(weights: Sequence[float], num_streams: int) -> list[Problem]:
    """What is wrong with model.fusion_weights for so many streams, each with a network of its own."""
    if not weights or (len(weights) == num_streams and min(weights) >= 0 and sum(weights) > 0):
        return []
    expected = f"a weight for each of {num_streams} streams, none below 0 and not all 0"
    hint = f"model.fusion_weights={[1] * num_streams} weighs them alike, [] fits them on the validation clips."
    return [Problem("model.fusion_weights", str(list(weights)), expected, hint.replace(", 1", ",1"))]


def _check_stream_name(name: str) -> str:
    if name not in STREAMS:
        raise PydanticCustomError("choice", "a known stream", {"choices": list(STREAMS)})
    return name


StreamName = Annotated[
    str, AfterValidator(_check_stream_name), WithJsonSchema({"type": "string", "enum": list(STREAMS)})
]


@dataclass(config=SPEC_CONFIG)
class InputSpec:
    frames_per_second: float = option(
        0.0, "rate of the data, which frame by frame inference keeps to; 0: unknown", minimum=0, maximum=1000
    )
    missing: Literal["keep", "hold", "interpolate"] = option(
        "keep", "joints that are zero: keep zeros, hold their last place, or interpolate in time"
    )
    score_channel: int = option(-1, "channel that holds scores: the last one, 2 or 3; -1: none", minimum=-1, maximum=3)
    score_threshold: float = option(0.0, "joints with a lower score count as missing", minimum=0)
    origin_joint: int = option(
        -1,
        "joint that coordinates are relative to, whose zeros are real; -1: the centre, if the data look so; -2: none",
        minimum=-2,
    )
    people_order: Literal["file", "presence", "motion"] = option(
        "file", "order of the people: as in the file, by frames they are in, or by how much they move"
    )
    people: Literal["each", "together"] = option(
        "each", "normalise each person alone, or all by the first one, which keeps the distances between them"
    )
    centre: Literal["none", "first", "frame"] = option(
        "none", "put the layout's centre at 0: that of the first frame, or of each frame"
    )
    scale: Literal["none", "first", "frame"] = option(
        "none", "divide by the size of the person in the first frame, or in each frame"
    )
    scale_by: Literal["trunk", "bones"] = option("trunk", "the size: length of the trunk, or mean length of the bones")
    align: Literal["none", "first"] = option(
        "none", "3D: turn about the vertical until shoulders and hips of the first frame lie along x"
    )
    vertical: Literal["y", "z"] = option("y", "align: the vertical axis")
    sampling: Literal["none", "uniform", "crop_resize", "contiguous"] = option(
        "none", "frames of a clip: all, one from each segment, a part resized, or one after the other"
    )
    num_frames: int = option(64, "frames that sampling gives", minimum=1, maximum=10_000)
    smallest_crop: float = option(0.5, "crop_resize, training: shortest part of a clip", minimum=0, maximum=1)
    test_crop: float = option(0.95, "crop_resize, testing: the middle part of a clip", minimum=0, maximum=1)
    test_clips: int = option(
        1,
        "sampling uniform and crop_resize: differently sampled clips of a sequence that an answer is averaged over",
        minimum=1,
        maximum=100,
    )
    streams: list[StreamName] = option(
        ["joint"], "what the network gets, channel after channel: joint, bone, joint_motion, bone_motion"
    )


@dataclass(config=SPEC_CONFIG)
class AugmentSpec:
    rotation_x: float = option(
        0.0, "3D: largest turn about x, degrees", minimum=0, maximum=180, search=SearchRange(0.0, 30.0)
    )
    rotation_y: float = option(
        0.0, "3D: largest turn about y, degrees", minimum=0, maximum=180, search=SearchRange(0.0, 60.0)
    )
    rotation_z: float = option(
        0.0, "largest turn about z, in the plane of 2D, degrees", minimum=0, maximum=180, search=SearchRange(0.0, 30.0)
    )
    scale: float = option(
        0.0, "largest change of each axis; 0.1: by 0.9 to 1.1", minimum=0, maximum=0.9, search=SearchRange(0.0, 0.4)
    )
    shift: float = option(
        0.0, "largest shift along each axis, in units of the normalised data", minimum=0, search=SearchRange(0.0, 0.5)
    )
    shear: float = option(
        0.0, "largest shift of an axis by a unit of another one", minimum=0, maximum=2, search=SearchRange(0.0, 0.5)
    )
    noise: float = option(
        0.0, "standard deviation, in units of the normalised data", minimum=0, search=SearchRange(0.0, 0.05)
    )
    joint_drop: float = option(
        0.0, "probability that a joint is lost for a while", minimum=0, maximum=1, search=SearchRange(0.0, 0.3)
    )
    frame_drop: float = option(
        0.0, "probability that a frame is lost", minimum=0, maximum=0.95, search=SearchRange(0.0, 0.3)
    )
    speed: float = option(
        0.0,
        "sampling none and contiguous: largest change of speed; 0.5: from 1.5 times slower to 1.5 times faster",
        minimum=0,
        maximum=3,
        search=SearchRange(0.0, 1.0, when={"input.sampling": ("none", "contiguous")}),
    )
    time_warp: float = option(
        0.0,
        "change of pace within a clip; 2: at five places paces of 1/3 to 3, relative to each other",
        minimum=0,
        maximum=9,
        search=SearchRange(0.0, 3.0),
    )
    mirror: float = option(
        0.0,
        "probability of a mirror image, left and right joints swapped",
        minimum=0,
        maximum=1,
        search=SearchRange(0.0, 0.5),
    )
    sides_matter: Literal["auto", "always", "never"] = option(
        "auto", "no mirror images: if a class name says left or right, always, or never"
    )
