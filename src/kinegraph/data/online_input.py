"""The input pipeline one frame at a time: a state goes in and a new one comes out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kinegraph.data.body import Body
from kinegraph.data.missing import MaskedClips, fill, find_real
from kinegraph.data.normalise import Reference, apply_references, measure
from kinegraph.data.streams import make_streams

if TYPE_CHECKING:
    from kinegraph.spec_input import InputSpec

InputState = dict[str, NDArray[Any]]
"""Arrays with an entry for each person along the first axis, so that people can be taken out and put together."""


def start_input(
    num_people: int, num_channels: int, num_coordinates: int, num_joints: int, options: InputSpec | None
) -> InputState:
    """The state before the first frame; it holds what the options need and nothing else."""
    state: InputState = {}
    if options is None:
        return state
    if "first" in (options.centre, options.scale, options.align):
        state["is_started"] = np.zeros(num_people, bool)
        state["centre"] = np.zeros((num_people, num_coordinates), np.float32)
        state["size"] = np.ones(num_people, np.float32)
        state["cosine"] = np.ones(num_people, np.float32)
        state["sine"] = np.zeros(num_people, np.float32)
    if options.missing == "hold":
        state["last"] = np.zeros((num_people, num_coordinates, num_joints), np.float32)
        state["is_known"] = np.zeros((num_people, num_joints), bool)
    if any(stream.endswith("motion") for stream in options.streams):
        state["before"] = np.zeros((num_people, num_channels, num_joints), np.float32)
        state["was_real"] = np.zeros((num_people, num_joints), bool)
    return state


def step_input(
    frames: NDArray[np.float32], state: InputState, num_coordinates: int, options: InputSpec, body: Body
) -> tuple[NDArray[np.float32], InputState]:
    """(N, C, 1, V, 1), checked -> (N, C', V) and the new state."""
    state = dict(state)
    has_score = options.score_channel >= 0
    clips = find_real(frames, num_coordinates, options.score_threshold, options.origin_joint, has_score)
    if "last" in state:
        clips = _hold(clips, state, num_coordinates)
    if "is_started" in state:
        _start_people(clips, state, num_coordinates, options, body)
    clips = _normalise(clips, state, num_coordinates, options, body)
    before = None
    if "before" in state:
        before = MaskedClips(state["before"][:, :, None, :, None], state["was_real"][:, None, :, None])
        state["before"], state["was_real"] = clips.data[:, :, 0, :, 0], clips.is_real[:, 0, :, 0]
    result = make_streams(clips, options.streams, num_coordinates, body, before)
    return np.ascontiguousarray(result[:, :, 0, :, 0], np.float32), state


def _hold(clips: MaskedClips, state: InputState, num_coordinates: int) -> MaskedClips:
    """`hold_missing` with what was seen in earlier frames."""
    last, is_known = state["last"][:, :, None, :, None], state["is_known"][:, None, :, None]
    is_there = clips.is_real.any(axis=2)[:, :, None]
    coordinates = clips.data[:, :num_coordinates]
    state["last"] = np.where(clips.is_real[:, None], coordinates, last)[:, :, 0, :, 0]
    state["is_known"] = (is_known | clips.is_real)[:, 0, :, 0]
    return fill(clips, ~clips.is_real & is_known & is_there, last)


def _start_people(clips: MaskedClips, state: InputState, num_coordinates: int, options: InputSpec, body: Body) -> None:
    """Measure those people who are there for the first time."""
    is_new = clips.is_real.any(axis=(1, 2, 3)) & ~state["is_started"]
    if not is_new.any():
        return
    found = measure(clips, num_coordinates, options, body)
    state["is_started"] = state["is_started"] | is_new
    state["centre"] = np.where(is_new[:, None], found.centre[:, :, 0, 0], state["centre"])
    for name in ("size", "cosine", "sine"):
        state[name] = np.where(is_new, getattr(found, name)[:, 0, 0], state[name])


def _normalise(
    clips: MaskedClips, state: InputState, num_coordinates: int, options: InputSpec, body: Body
) -> MaskedClips:
    modes = {options.centre, options.scale, options.align}
    if modes == {"none"}:
        return clips
    first = None
    if "is_started" in state:
        turn = (state[name][:, None, None] for name in ("size", "cosine", "sine"))
        first = Reference(state["centre"][:, :, None, None], *turn)
    each = measure(clips, num_coordinates, options, body) if "frame" in modes else None
    return apply_references(clips, num_coordinates, options, first, each)
