"""Centre, size and direction of the people in clips.

Each is read off the first frame with the person or off the frame itself, never off a later one: frame by frame
inference gives the same values. Joints that are missing and frames without a person stay zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kinegraph.data.array_namespace import Array, cast_mask, find_first, get_namespace, put_last, take_along
from kinegraph.data.body import Body
from kinegraph.data.missing import MaskedClips

if TYPE_CHECKING:
    from kinegraph.spec_input import InputSpec

SMALLEST_SIZE = 0.1
"""Of the spread of the joints: a trunk that points at the camera must not blow the person up."""
SMALLEST_ACROSS = 0.01
"""Of the spread of the joints: a shorter line across the body has no direction."""
HORIZONTAL = {"y": (0, 2), "z": (0, 1)}
"""Vertical axis -> channels of the horizontal plane."""


@dataclass(frozen=True, eq=False)
class Reference:
    """Where people are, how large and which way they look: centre (N, D, T, M); size, cosine, sine (N, T, M).

    T and M may be 1, for all frames and all people. Cosine and sine turn the line from right to left onto +x.
    """

    centre: Array
    size: Array
    cosine: Array
    sine: Array


def normalise(clips: MaskedClips, num_coordinates: int, options: InputSpec, body: Body) -> MaskedClips:
    """Centre, scale and align as the options say. The score channel, if any, stays as it is."""
    modes = {options.centre, options.scale, options.align}
    if modes == {"none"}:
        return clips
    first = measure(take_first(clips, options), num_coordinates, options, body) if "first" in modes else None
    each = measure(_take_main(clips, options), num_coordinates, options, body) if "frame" in modes else None
    return apply_references(clips, num_coordinates, options, first, each)


def apply_references(
    clips: MaskedClips, num_coordinates: int, options: InputSpec, first: Reference | None, each: Reference | None
) -> MaskedClips:
    """`normalise` with references that are known: of the first frame and of each frame, as far as they are used."""
    xp = get_namespace(clips.data)
    x = clips.data[:, :num_coordinates]
    choices = {"first": first, "frame": each}
    centre, size, align = (choices.get(mode) for mode in (options.centre, options.scale, options.align))
    if centre is not None:
        x = x - centre.centre[:, :, :, None]
    if size is not None:
        x = x / size.size[:, None, :, None]
    if align is not None:
        x = _turn(x, align, options.vertical)
    parts = [xp.where(clips.is_real[:, None], x, 0.0)]
    if num_coordinates < clips.data.shape[1]:
        parts.append(clips.data[:, num_coordinates:])
    return MaskedClips(xp.concatenate(parts, axis=1), clips.is_real)


def _turn(x: Array, reference: Reference, vertical: str) -> Array:
    """Rotate (N, 3, T, V, M) about the vertical axis."""
    xp = get_namespace(x)
    first, second = HORIZONTAL[vertical]
    cosine, sine = reference.cosine[:, :, None], reference.sine[:, :, None]
    channels = [x[:, channel] for channel in range(3)]
    channels[first] = cosine * x[:, first] + sine * x[:, second]
    channels[second] = cosine * x[:, second] - sine * x[:, first]
    return xp.stack(channels, axis=1)


def take_first(clips: MaskedClips, options: InputSpec) -> MaskedClips:
    """The first frame of each person (N, C, 1, V, M); with people "together" of the first one there, M = 1."""
    xp = get_namespace(clips.data)
    is_there = xp.any(clips.is_real, axis=2)[:, :, None]  # (N, T, 1, M)
    if options.people == "together":
        is_there = xp.any(is_there, axis=3)[..., None]
    place = find_first(is_there, 1)  # (N, 1, 1, M or 1)
    data, is_real = take_along(clips.data, place[:, None], 2), take_along(clips.is_real, place, 1)
    return _take_main(MaskedClips(data, is_real), options)


def _take_main(clips: MaskedClips, options: InputSpec) -> MaskedClips:
    """With people "together", in each frame the first person that is there, M = 1; else everybody."""
    if options.people == "each":
        return clips
    xp = get_namespace(clips.data)
    person = find_first(xp.any(clips.is_real, axis=2)[:, :, None], 3)  # (N, T, 1, 1)
    return MaskedClips(take_along(clips.data, person[:, None], 4), take_along(clips.is_real, person, 3))


def measure(clips: MaskedClips, num_coordinates: int, options: InputSpec, body: Body) -> Reference:
    """The reference of every person in every frame. What its joints do not tell:

    without the centre joint, the mean of the joints that are there; without a trunk (or any bone), their spread, which
    is about as long; a size of 0 counts as 1; without shoulders and hips, nobody is turned.
    """
    xp = get_namespace(clips.data)
    x = put_last(clips.data[:, :num_coordinates], 3)  # (N, D, T, M, V)
    is_real = put_last(clips.is_real, 2)  # (N, T, M, V)
    weight = cast_mask(is_real, x)
    count = xp.clip(weight.sum(-1), 1, None)
    mean = x.sum(-1) / count[:, None]
    offsets = (x - mean[..., None]) * weight[:, None]
    spread = xp.sqrt((offsets * offsets).sum(1).sum(-1) / count)
    centre = xp.where(is_real[:, None, ..., body.centre], x[..., body.centre], mean)
    size = _measure_size(x, is_real, spread, options, body)
    across = _measure_across(x, is_real, options, body)
    length = xp.sqrt((across * across).sum(1))
    is_line = (length > SMALLEST_ACROSS * spread) & (length > 0)
    divisor = xp.where(is_line, length, 1.0)
    cosine = xp.where(is_line, across[:, 0] / divisor, 1.0)
    sine = xp.where(is_line, across[:, 1] / divisor, 0.0)
    return Reference(centre, size, cosine, sine)


def _measure_size(x: Array, is_real: Array, spread: Array, options: InputSpec, body: Body) -> Array:
    """(N, D, T, M, V) -> length of the trunk or mean length of the bones (N, T, M)."""
    xp = get_namespace(x)
    if options.scale_by == "trunk" and body.trunk[0]:
        way, is_there = find_trunk(x, is_real, body)
        measured = xp.where(is_there, xp.sqrt((way * way).sum(1)), spread)
    else:
        children, parents = [child for child, _ in body.bones], [parent for _, parent in body.bones]
        way = x[..., children] - x[..., parents]
        is_bone = is_real[..., children] & is_real[..., parents]
        weight = cast_mask(is_bone, x)
        total = (xp.sqrt((way * way).sum(1)) * weight).sum(-1)
        measured = xp.where(xp.any(is_bone, axis=-1), total / xp.clip(weight.sum(-1), 1, None), spread)
    size = xp.maximum(measured, SMALLEST_SIZE * spread)
    return xp.where(size > 0, size, 1.0)


def find_trunk(x: Array, is_real: Array, body: Body) -> tuple[Array, Array]:
    """(N, D, T, M, V) -> from the lower to the upper end of the trunk (N, D, T, M), and whether both are there
    (N, T, M), of a body that has one.
    """
    (low, has_low), (high, has_high) = (_average(x, is_real, joints) for joints in body.trunk)
    return high - low, has_low & has_high


def _average(x: Array, is_real: Array, joints: tuple[int, ...]) -> tuple[Array, Array]:
    """The mean (N, D, T, M) of those of the joints that are real, and whether one is (N, T, M)."""
    xp = get_namespace(x)
    places = list(joints)
    weight = cast_mask(is_real[..., places], x)
    total = (x[..., places] * weight[:, None]).sum(-1)
    return total / xp.clip(weight.sum(-1), 1, None)[:, None], xp.any(is_real[..., places], axis=-1)


def _measure_across(x: Array, is_real: Array, options: InputSpec, body: Body) -> Array:
    """The sum of the horizontal lines from right to left shoulder and hip: (N, 2, T, M)."""
    xp = get_namespace(x)
    if x.shape[1] != 3 or not body.across:
        return xp.zeros_like(x[..., 0][:, [0, 0]])
    plane = list(HORIZONTAL[options.vertical])
    left, right = [pair[0] for pair in body.across], [pair[1] for pair in body.across]
    lines = x[:, plane][..., left] - x[:, plane][..., right]
    is_line = is_real[..., left] & is_real[..., right]
    return (lines * cast_mask(is_line, x)[:, None]).sum(-1)
