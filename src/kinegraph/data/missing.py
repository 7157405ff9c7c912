"""Joints that the detector did not find: which they are, and what stands in their place."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kinegraph.data.array_namespace import (
    Array,
    accumulate_maximum,
    cast_mask,
    convert_to_numpy,
    find_first,
    get_namespace,
    take_along,
)


@dataclass(frozen=True, eq=False)
class MaskedClips:
    """Clips and what in them is real: `data` (N, C, T, V, M) is zero wherever `is_real` (N, T, V, M) is false.

    A mask is kept, because a real joint can be at zero: the centre, once it is subtracted.
    """

    data: Array
    is_real: Array

    def find_lengths(self) -> np.ndarray:
        """Last frame with a real joint of anybody, plus 1: int64 (N,); 0 for clips without any."""
        xp = get_namespace(self.data)
        is_frame = xp.any(xp.any(self.is_real, axis=3), axis=2)  # (N, T)
        num_frames = is_frame.shape[1]
        last = num_frames - find_first(xp.flip(is_frame, (1,)), 1)[:, 0]
        lengths = convert_to_numpy(xp.where(xp.any(is_frame, axis=1), last, last * 0))
        return lengths.astype(np.int64)


def find_real(
    data: Array, num_coordinates: int, score_threshold: float = 0.0, origin_joint: int = -1, has_score: bool = False
) -> MaskedClips:
    """(N, C, T, V, M) -> the clips with their mask; what is not real is set to zero in all channels.

    A joint is missing if all its coordinates are zero, or if its score (the last channel, with `has_score`) is below
    the threshold. `origin_joint` is the joint that the coordinates are relative to: its zeros are real wherever another
    joint of the person is.
    """
    xp = get_namespace(data)
    is_real = xp.any(data[:, :num_coordinates] != 0, axis=1)
    if has_score and score_threshold > 0:
        is_real = is_real & (data[:, -1] >= score_threshold)
    if origin_joint >= 0:
        is_real[:, :, origin_joint] = xp.any(is_real, axis=2)
    return MaskedClips(xp.where(is_real[:, None], data, 0.0), is_real)


def hold_missing(clips: MaskedClips, num_coordinates: int) -> MaskedClips:
    """A missing joint stays where it was last seen, with score 0; one that was never seen stays missing.

    Only in frames in which its person is there: of a frame without anybody it cannot be known, frame by frame, whether
    the clip is over.
    """
    xp = get_namespace(clips.data)
    before, is_known = _find_before(clips.is_real)
    is_filled = ~clips.is_real & is_known & xp.any(clips.is_real, axis=2)[:, :, None]
    if not bool(xp.any(is_filled)):
        return clips
    values = take_along(clips.data[:, :num_coordinates], before[:, None], 2)
    return fill(clips, is_filled, values)


def interpolate_missing(clips: MaskedClips, num_coordinates: int) -> MaskedClips:
    """A missing joint goes straight from where it was last seen to where it is seen next, with score 0.

    Before its first and after its last sight it stands still; one that is never seen stays missing. Frames without a
    person are filled between the first and the last one with that person.
    """
    xp = get_namespace(clips.data)
    num_frames = clips.is_real.shape[1]
    before, has_before = _find_before(clips.is_real)
    backwards, has_after = _find_before(xp.flip(clips.is_real, (1,)))
    after, has_after = num_frames - 1 - xp.flip(backwards, (1,)), xp.flip(has_after, (1,))
    # A person is there from the first to the last sight of any joint
    is_inside = xp.any(has_before, axis=2) & xp.any(has_after, axis=2)
    is_filled = ~clips.is_real & is_inside[:, :, None] & (has_before | has_after)
    if not bool(xp.any(is_filled)):
        return clips
    first, last = xp.where(has_before, before, after), xp.where(has_after, after, before)
    frames = _number_frames(clips.is_real)
    share = cast_mask(frames - first, clips.data) / cast_mask(xp.clip(last - first, 1, None), clips.data)
    coordinates = clips.data[:, :num_coordinates]
    start, end = take_along(coordinates, first[:, None], 2), take_along(coordinates, last[:, None], 2)
    return fill(clips, is_filled, start + share[:, None] * (end - start))


def fill(clips: MaskedClips, is_filled: Array, values: Array) -> MaskedClips:
    """Put coordinates (N, D, T, V, M) where `is_filled` (N, T, V, M); other channels are zero there."""
    xp = get_namespace(clips.data)
    num_coordinates = values.shape[1]
    parts = [xp.where(is_filled[:, None], values, clips.data[:, :num_coordinates])]
    if num_coordinates < clips.data.shape[1]:
        parts.append(clips.data[:, num_coordinates:])
    return MaskedClips(xp.concatenate(parts, axis=1), clips.is_real | is_filled)


def _find_before(is_real: Array) -> tuple[Array, Array]:
    """The last frame up to each in which a joint is real, 0 where there is none, and whether there is one."""
    xp = get_namespace(is_real)
    frames = _number_frames(is_real)
    last = accumulate_maximum(xp.where(is_real, frames, -1), 1)
    return xp.clip(last, 0, None), last >= 0


def _number_frames(is_real: Array) -> Array:
    xp = get_namespace(is_real)
    num_frames = is_real.shape[1]
    frames = xp.arange(num_frames) if xp is np else xp.arange(num_frames, device=is_real.device)
    return frames[None, :, None, None]


def order_people(clips: MaskedClips, order: str, num_coordinates: int) -> MaskedClips:
    """People along M by the number of frames they are in ("presence") or by how far their joints go ("motion").

    Most first; among equal ones, and with "file", as in the file.
    """
    if order == "file" or clips.is_real.shape[3] == 1:
        return clips
    xp = get_namespace(clips.data)
    if order == "presence":
        amount = cast_mask(xp.any(clips.is_real, axis=2), clips.data).sum(1)
    else:
        places = clips.data[:, :num_coordinates]
        way = xp.sqrt(((places[:, :, 1:] - places[:, :, :-1]) ** 2).sum(1))
        is_way = clips.is_real[:, 1:] & clips.is_real[:, :-1]
        amount = xp.where(is_way, way, 0.0).sum(2).sum(1)
    order_of_people = xp.argsort(-amount, stable=True)[:, None, None]  # (N, 1, 1, M)
    data = take_along(clips.data, order_of_people[:, None], 4)
    return MaskedClips(data, take_along(clips.is_real, order_of_people, 3))
