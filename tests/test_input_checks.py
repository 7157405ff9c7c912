"""What is said about a checkpoint whose input pipeline differs from that of the training that goes on with it."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from kinegraph.data.input_checks import NOT_READ_WITH, ONLY_IN_TESTING, UNKNOWN, compare_options
from kinegraph.spec_input import InputSpec

NORMALISED = InputSpec(centre="first", scale="first", align="first", score_channel=3, sampling="crop_resize")
"""With it every option is read."""
OTHER_VALUES: dict[str, Any] = {
    "frames_per_second": 15.0,
    "missing": "hold",
    "score_channel": -1,
    "score_threshold": 0.5,
    "origin_joint": 4,
    "people_order": "motion",
    "people": "together",
    "centre": "frame",
    "scale": "frame",
    "scale_by": "bones",
    "align": "none",
    "vertical": "z",
    "sampling": "uniform",
    "num_frames": 32,
    "smallest_crop": 0.3,
    "streams": ["bone"],
}


def test_tables_name_options() -> None:
    names = {item.name for item in fields(InputSpec)}
    assert set(OTHER_VALUES) == names - set(ONLY_IN_TESTING)
    assert {*NOT_READ_WITH, *ONLY_IN_TESTING, *UNKNOWN} <= names


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_each_option_that_differs_is_told(name: str) -> None:
    trained = replace(NORMALISED, frames_per_second=30.0, origin_joint=0)
    own = replace(trained, **{name: OTHER_VALUES[name]})
    assert compare_options(trained, trained, "model.pth") == []
    (message,) = compare_options(own, trained, "model.pth")
    assert message.startswith(f"model.pth was trained with input.{name} ")
    before, now = (
        ", ".join(value) if isinstance(value, list) else value for value in (getattr(trained, name), OTHER_VALUES[name])
    )
    assert f"{name} {before} and this run has {now}:" in message
    assert len(compare_options(trained, own, "model.pth")) == 1


def test_what_nothing_reads_or_nobody_knows_is_not_told() -> None:
    idle = {name: OTHER_VALUES[name] for name in NOT_READ_WITH}
    assert compare_options(replace(InputSpec(), **idle), InputSpec(), "model.pth") == []
    testing = replace(NORMALISED, test_crop=0.5)
    assert compare_options(testing, NORMALISED, "model.pth") == []
    rate = replace(NORMALISED, frames_per_second=30.0, origin_joint=-2)
    assert compare_options(rate, NORMALISED, "model.pth") == compare_options(NORMALISED, rate, "model.pth") == []


def test_a_pipeline_without_steps_is_the_default() -> None:
    assert compare_options(None, None, "model.pth") == compare_options(InputSpec(), None, "model.pth") == []
    told = compare_options(None, InputSpec(streams=["bone", "joint_motion"], centre="frame"), "model.pth")
    assert told == [
        "model.pth was trained with input.centre frame and this run has none: it has to adapt.",
        "model.pth was trained with input.streams bone, joint_motion and this run has joint: it has to adapt.",
    ]
