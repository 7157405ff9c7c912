"""Random changes of training clips, vectorised over the batch, where the batch is.

What is random comes in as uniform numbers, so that every function here is a plain function of its arguments. Missing
joints, frames without a person and padding stay zero throughout.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kinegraph.data.array_namespace import Array, cast_mask, convert_like, find_first, get_namespace, take_along
from kinegraph.data.missing import MaskedClips
from kinegraph.data.pipeline import InputPipeline
from kinegraph.data.sampling import TimeDraws
from kinegraph.errors import Problem, SpecError
from kinegraph.skeleton.layouts import Pair

if TYPE_CHECKING:
    from kinegraph.spec_input import AugmentSpec, InputSpec

Draws = NDArray[np.float64]
"""Uniform numbers in [0, 1), a row for each clip."""

AFFINE_DRAWS = 16
"""Three angles, scales and shifts, six shears, and whether it is mirrored."""
DROP_DRAWS = 3
"""For each joint of each person: whether, from where, and how long."""
TIME_DRAWS = 6
"""One for the speed of a clip, the others for its parts."""
SIDE = re.compile(r"(?<![a-z])(left|right)(?![a-z])")


def find_augment_problems(
    augment: AugmentSpec, num_coordinates: int, options: InputSpec | None = None
) -> list[Problem]:
    """The options that these data cannot have."""
    problems = []
    for name in ("rotation_z", "shear"):
        value = getattr(augment, name)
        if value > 0 and num_coordinates < 2:
            expected = f"0: it needs 2 coordinates, and the data have {num_coordinates}"
            problems.append(Problem(f"augment.{name}", f"{value:g}", expected))
    moves = any(getattr(augment, name) > 0 for name in ("rotation_z", "scale", "shift", "shear", "mirror"))
    if moves and num_coordinates > 3:
        got = f"{num_coordinates} coordinates"
        hint = "Set input.score_channel if the last channel is a score."
        problems.append(Problem("augment", got, "at most 3 to rotate, scale, shift, shear or mirror", hint))
    if augment.speed > 0 and options is not None and options.sampling in ("uniform", "crop_resize"):
        expected = "0 with this input.sampling, which gives all clips one length; time_warp changes the speed within"
        problems.append(Problem("augment.speed", f"{augment.speed:g}", expected))
    return problems


def choose_augmentation(
    augment: AugmentSpec, pipeline: InputPipeline, class_names: Iterable[str], symmetric: Sequence[Pair] | None = None
) -> tuple[AugmentSpec, list[str]]:
    """The augmentation that a training gets, and what the user should know: without mirror images where sides matter,
    and without turns out of the plane that the data are in, so that a recipe serves 2D and 3D.

    symmetric: the pairs that a mirror image swaps; None: those of the pipeline, if it has any steps.
    Raises SpecError with every option that the data cannot have.
    """
    problems = find_augment_problems(augment, pipeline.num_coordinates, pipeline.options)
    if problems:
        raise SpecError(*problems)
    augment, told = _stay_in_plane(augment, pipeline.num_coordinates)
    augment, more = _choose_mirror(augment, pipeline, class_names, symmetric)
    return augment, told + more


def _stay_in_plane(augment: AugmentSpec, num_coordinates: int) -> tuple[AugmentSpec, list[str]]:
    turns = [name for name in ("rotation_x", "rotation_y") if getattr(augment, name) > 0]
    if num_coordinates > 2 or not turns:
        return augment, []
    named = " and ".join(f"augment.{name}" for name in turns)
    reason = f"it takes 3 coordinates, and the data have {num_coordinates}"
    return replace(augment, rotation_x=0.0, rotation_y=0.0), [f"{named}: no effect, {reason}."]


def _choose_mirror(
    augment: AugmentSpec, pipeline: InputPipeline, class_names: Iterable[str], symmetric: Sequence[Pair] | None
) -> tuple[AugmentSpec, list[str]]:
    sided = find_side_names(class_names) if augment.sides_matter == "auto" else []
    if augment.mirror == 0:
        return augment, []
    if symmetric is None and pipeline.body is not None:
        symmetric = pipeline.body.symmetric
    if not (sided or augment.sides_matter == "always"):
        message = (
            f"augment.mirror={augment.mirror:g} negates x and swaps no joints: the layout names no symmetric pairs."
        )
        return augment, [message] if symmetric is not None and not symmetric else []
    reason = "augment.sides_matter is always"
    if sided:
        more = f" and {len(sided) - 1} more" if len(sided) > 1 else ""
        reason = f"the class {sided[0]!r}{more} names a side (augment.sides_matter=never mirrors all the same)"
    return replace(augment, mirror=0.0), [f"augment.mirror={augment.mirror:g} has no effect: {reason}."]


def find_side_names(class_names: Iterable[str]) -> list[str]:
    """The class names that hold the word left or right."""
    spaced = ((name, re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()) for name in class_names)
    return [name for name, text in spaced if SIDE.search(text)]


def is_active(augment: AugmentSpec) -> bool:
    """Whether any of them is on."""
    amounts = (value for value in vars(augment).values() if isinstance(value, int | float))
    return any(amount > 0 for amount in amounts)


def draw_time(augment: AugmentSpec, places: Draws, draws: Draws) -> TimeDraws:
    """`draws` (N, TIME_DRAWS) -> speed, and the pace of its parts, as likely slower as faster by the same factor."""
    spread = 2 * draws - 1
    return TimeDraws(places, (1 + augment.speed) ** spread[:, 0], (1 + augment.time_warp) ** spread[:, 1:])


def drop_joints(x: Array, probability: float, draws: Draws) -> Array:
    """(N, C, T, V, M) with joints lost for a while, as a detector loses them; `draws` (N, 3 * V * M).

    Each joint of each person is lost with this probability, from a random frame on, for a random number of frames up to
    all that its clip has.
    """
    xp = get_namespace(x)
    num_clips, _, num_frames, num_joints, num_people = x.shape
    is_lost, place, share = (
        convert_like(draws.reshape(num_clips, DROP_DRAWS, num_joints, num_people)[:, [i]], x) for i in range(DROP_DRAWS)
    )
    lengths = convert_like(_find_raw_lengths(x).astype(np.float64), x)[:, None, None, None]
    first = xp.floor(place * lengths)
    end = first + 1 + xp.floor(share * lengths)
    frames = convert_like(np.arange(num_frames, dtype=np.float64)[None, :, None, None], x)
    is_gone = (is_lost < probability) & (frames >= first) & (frames < end)  # (N, T, V, M)
    return xp.where(is_gone[:, None], 0.0, x)


def drop_frames(x: Array, probability: float, draws: Draws) -> Array:
    """(N, C, T, V, M) with each frame lost with this probability, but the first one with a person; `draws` (N, T)."""
    xp = get_namespace(x)
    is_gone = convert_like(draws < probability, x)
    is_frame = xp.any((x != 0).reshape(*x.shape[:3], -1), axis=3)
    is_frame = xp.any(is_frame, axis=1)  # (N, T)
    frames = convert_like(np.arange(x.shape[2])[None, :], x)
    is_gone = is_gone & (frames != find_first(is_frame, 1))
    return xp.where(is_gone[:, None, :, None, None], 0.0, x)


def _find_raw_lengths(x: Array) -> NDArray[np.int64]:
    return MaskedClips(x, get_namespace(x).any(x != 0, axis=1)).find_lengths()


def mirror(clips: MaskedClips, is_mirrored: NDArray[np.bool_], symmetric: Sequence[Pair]) -> MaskedClips:
    """Left and right joints swapped in those clips (N,). The mirror image of x itself is part of `make_affine`."""
    xp = get_namespace(clips.data)
    if not is_mirrored.any():
        return clips
    swapped = list(range(clips.data.shape[3]))
    for left, right in symmetric:
        swapped[left], swapped[right] = right, left
    choose = convert_like(is_mirrored, clips.data)[:, None, None, None]
    return MaskedClips(
        xp.where(choose[:, None], clips.data[:, :, :, swapped], clips.data),
        xp.where(choose, clips.is_real[:, :, swapped], clips.is_real),
    )


def make_affine(augment: AugmentSpec, num_coordinates: int, draws: Draws) -> tuple[Draws, Draws]:
    """`draws` (N, 16) -> matrices (N, D, D) and shifts (N, D): y = matrix @ (x - pivot) + pivot + shift.

    First mirror x and scale the axes, then shear, then turn about x, y and z. Each amount is uniform between minus and
    plus the option.
    """
    num_clips, size = len(draws), num_coordinates
    spread = 2 * draws - 1
    matrices = np.zeros((num_clips, size, size))
    axes = range(size)
    matrices[:, axes, axes] = 1 + augment.scale * spread[:, 3 : 3 + size]
    matrices[:, 0, 0] *= np.where(find_mirrored(augment, draws), -1, 1)
    shear = np.tile(np.eye(size), (num_clips, 1, 1))
    rows, columns = np.nonzero(~np.eye(size, dtype=bool))
    shear[:, rows, columns] = augment.shear * spread[:, 9 : 9 + len(rows)]
    matrices = shear @ matrices
    limits = (augment.rotation_x, augment.rotation_y, augment.rotation_z)
    for axis, limit in enumerate(limits):
        if limit > 0:
            matrices = _make_rotation(axis, np.deg2rad(limit * spread[:, axis]), size) @ matrices
    return matrices, augment.shift * spread[:, 6 : 6 + size]


def find_mirrored(augment: AugmentSpec, draws: Draws) -> NDArray[np.bool_]:
    """Which clips are mirrored: (N,)."""
    return np.asarray(draws[:, 15] < augment.mirror)


def _make_rotation(axis: int, angles: Draws, size: int) -> Draws:
    """Right-handed about axis 0, 1 or 2; of two coordinates only about 2, in their plane."""
    first, second = ((1, 2), (2, 0), (0, 1))[axis]
    rotation = np.tile(np.eye(size), (len(angles), 1, 1))
    rotation[:, first, first] = rotation[:, second, second] = np.cos(angles)
    rotation[:, second, first] = np.sin(angles)
    rotation[:, first, second] = -np.sin(angles)
    return rotation


def move(clips: MaskedClips, matrices: Draws, shifts: Draws, is_centred: bool) -> MaskedClips:
    """Clips with their coordinates moved by matrices (N, D, D) and shifts (N, D), all people of a clip alike.

    The pivot is the origin where the clips are centred, else the mean of all joints in the first frame with a person.
    """
    xp = get_namespace(clips.data)
    size = matrices.shape[1]
    x = clips.data[:, :size]
    matrix, offset = convert_like(matrices, x), convert_like(shifts, x)[:, :, None]
    if not is_centred:
        pivot = _find_pivot(clips, size)
        offset = offset + pivot - xp.matmul(matrix, pivot)
    moved = xp.matmul(matrix, x.reshape(*x.shape[:2], -1)) + offset
    return _replace_coordinates(clips, moved.reshape(x.shape))


def _find_pivot(clips: MaskedClips, size: int) -> Array:
    """(N, D, 1)."""
    xp = get_namespace(clips.data)
    is_frame = xp.any(xp.any(clips.is_real, axis=3), axis=2)
    place = find_first(is_frame, 1)[:, :, None, None]  # (N, 1, 1, 1)
    joints = take_along(clips.data[:, :size], place[:, None], 2)
    count = cast_mask(take_along(clips.is_real, place, 1), joints).sum((1, 2, 3))
    return (joints.sum((2, 3, 4)) / xp.clip(count, 1, None)[:, None])[:, :, None]


def add_noise(clips: MaskedClips, amount: float, normals: Array) -> MaskedClips:
    """Coordinates plus `amount` times normals (N, D * T * V * M)."""
    num_clips, _, *rest = clips.data.shape
    noise = normals.reshape(num_clips, -1, *rest)
    return _replace_coordinates(clips, clips.data[:, : noise.shape[1]] + amount * noise)


def _replace_coordinates(clips: MaskedClips, coordinates: Array) -> MaskedClips:
    xp = get_namespace(clips.data)
    size = coordinates.shape[1]
    data = xp.where(clips.is_real[:, None], coordinates, 0.0)
    if size < clips.data.shape[1]:
        data = xp.concatenate([data, clips.data[:, size:]], axis=1)
    return MaskedClips(data, clips.is_real)
