"""The options of `kinegraph live`: the clock of the model, when an action starts and ends, who is followed."""

from __future__ import annotations

from typing import Literal

from pydantic.dataclasses import dataclass

from kinegraph.config import SPEC_CONFIG, option


@dataclass(config=SPEC_CONFIG)
class LiveSpec:
    checkpoint: str = option("", "model: .pth or .onnx; the same as --model", path="input")
    frames_per_second: float = option(
        0.0,
        "rate that the model sees; 0: that of its training data, or if unknown frames as they come",
        minimum=0,
        maximum=1000,
    )
    pooling_frames: int = option(
        16, "frames that an answer is averaged over; 0: all since the person came", minimum=0, maximum=100_000
    )
    smoothing: Literal["exponential", "average", "none"] = option("exponential", "how probabilities are smoothed")
    smoothing_s: float = option(
        0.2, "time constant (exponential) or length (average) in seconds", minimum=0, maximum=60
    )
    enter_threshold: float = option(0.6, "an action starts at this probability", minimum=0, maximum=1)
    leave_threshold: float = option(0.4, "and ends below this one", minimum=0, maximum=1)
    class_enter_thresholds: dict[str, float] = option({}, "enter_threshold of single classes, CLASS_NAME: value")
    class_leave_thresholds: dict[str, float] = option({}, "leave_threshold of single classes, CLASS_NAME: value")
    no_action_classes: list[str] = option([], "names of classes that count as no action")
    min_duration_s: float = option(0.3, "shorter segments are not reported; seconds", minimum=0, maximum=3600)
    merge_gap_s: float = option(
        0.2, "an action that stops for at most so many seconds goes on as one segment", minimum=0, maximum=3600
    )
    max_gap_s: float = option(
        0.5, "frames missing for at most so many seconds are interpolated; else the track ends", minimum=0, maximum=10
    )
    forget_after_s: float = option(
        2.0, "people without frames for so many seconds are forgotten; at least max_gap_s", minimum=0, maximum=3600
    )
    max_people: int = option(256, "people followed at the same time", minimum=1, maximum=10_000)
