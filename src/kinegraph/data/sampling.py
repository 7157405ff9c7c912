"""Which frames of a clip the network sees: positions in time, computed in NumPy, and clips read there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kinegraph.data.array_namespace import convert_like, get_namespace
from kinegraph.data.counters import uniform_from_counters
from kinegraph.data.missing import MaskedClips
from kinegraph.errors import SpecError, look_up

if TYPE_CHECKING:
    from kinegraph.spec_input import InputSpec

Positions = tuple[NDArray[np.float64], NDArray[np.bool_]]
"""Where in a clip each frame is read, in frames from 0 (N, T), and whether it lies in the clip (N, T)."""


@dataclass(frozen=True, eq=False)
class TimeDraws:
    """What is random about time in training, for each of N clips.

    places   (N, draws) in [0, 1): see `count_draws`
    speed    (N,) frames of the clip that pass in one frame; 1: as recorded
    pace     (N, K) above 0: speeds at K places from the beginning to the end of the clip, linear between them; only
             their ratios matter, as the clip keeps its ends
    """

    places: NDArray[np.float64]
    speed: NDArray[np.float64]
    pace: NDArray[np.float64]


def count_draws(options: InputSpec) -> int:
    """How many random places a clip needs."""
    return {"none": 1, "contiguous": 1, "crop_resize": 2, "uniform": options.num_frames}[options.sampling]


def draw_test_clip(options: InputSpec, number: int, num_clips: int) -> TimeDraws | None:
    """The draws of test clip `number` of each sequence, the same for all of them and always: None for the first, which
    is sampled in the middle, and random ones as in training for the others (as PYSKL tests; Duan et al., 2022).
    """
    if number == 0:
        return None
    places = uniform_from_counters(0, number, np.zeros(1, np.int64), count_draws(options), 0)
    return TimeDraws(np.repeat(places, num_clips, axis=0), np.ones(num_clips), np.ones((num_clips, 2)))


def sample(clips: MaskedClips, options: InputSpec, draws: TimeDraws | None = None) -> MaskedClips:
    """Clips (N, C, T, V, M) -> (N, C, T', V, M): what `options.sampling` asks for, at random with draws.

    Without draws T' is num_frames, except for none (T) and contiguous (T, and at least num_frames).
    """
    if options.sampling == "none" and draws is None:
        return clips
    if options.sampling == "contiguous" and draws is None:
        return pad(clips, options.num_frames)
    positions, is_inside = place_frames(clips.find_lengths(), clips.data.shape[2], options, draws)
    return read_frames(clips, positions, is_inside)


def place_frames(
    lengths: NDArray[np.int64], num_frames: int, options: InputSpec, draws: TimeDraws | None = None
) -> Positions:
    """Positions for clips of these lengths (N,) in an array of num_frames frames."""
    place = look_up(SAMPLINGS, options.sampling, "input.sampling", SpecError)
    positions, is_inside = place(lengths, num_frames, options, draws)
    last = np.maximum(lengths - 1, 0)[:, None]
    if draws is not None and (draws.pace != draws.pace[:, :1]).any():
        positions = last * warp_time(np.clip(positions / np.maximum(last, 1), 0, 1), draws.pace)
    return np.clip(positions, 0, last), is_inside & (lengths > 0)[:, None]


def warp_time(share: NDArray[np.float64], pace: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N, T) in [0, 1] -> how much of the clip has passed there at a pace (N, K): 0 at 0, 1 at 1, growing."""
    pieces = pace.shape[1] - 1
    piece = np.minimum((share * pieces).astype(np.int64), pieces - 1)
    inside = share * pieces - piece
    before = np.cumsum(np.pad((pace[:, 1:] + pace[:, :-1]) / 2, ((0, 0), (1, 0))), axis=1)
    first = np.take_along_axis(pace, piece, axis=1)
    change = np.take_along_axis(pace, piece + 1, axis=1) - first
    passed = np.take_along_axis(before, piece, axis=1) + inside * (first + inside * change / 2)
    return passed / before[:, -1:]


def _place_uniform(
    lengths: NDArray[np.int64], num_frames: int, options: InputSpec, draws: TimeDraws | None
) -> Positions:
    """One frame of each of num_frames equal segments: its middle, or a random one.

    The sampling of PYSKL (Duan et al., 2022) and before it of TSN (Wang et al., 2016); a clip with fewer frames than
    segments repeats some.
    """
    offsets = np.full((len(lengths), options.num_frames), 0.5) if draws is None else draws.places
    segments = np.arange(options.num_frames)[None, :] + offsets
    positions = np.floor(segments * lengths[:, None] / options.num_frames)
    return np.minimum(positions, np.maximum(lengths - 1, 0)[:, None]), np.ones(positions.shape, bool)


def _place_crop(lengths: NDArray[np.int64], num_frames: int, options: InputSpec, draws: TimeDraws | None) -> Positions:
    """A part of the clip, stretched linearly to num_frames: the middle, or a random part of random length.

    As in CTR-GCN (Chen et al., 2021): a random part has num_frames frames at least, where the clip has so many.
    """
    if draws is None:
        start = np.floor((1 - options.test_crop) * lengths / 2)
        cropped = np.maximum(lengths - 2 * start, 1)
    else:
        share = options.smallest_crop + (1 - options.smallest_crop) * draws.places[:, 0]
        shortest = np.maximum(np.minimum(lengths, options.num_frames), 1)
        cropped = np.clip(np.floor(share * lengths), shortest, np.maximum(lengths, 1))
        start = np.floor(draws.places[:, 1] * (lengths - cropped + 1))
    # The middle of each of num_frames equal pieces, between the middles of the frames
    middles = (np.arange(options.num_frames) + 0.5)[None, :] * cropped[:, None] / options.num_frames - 0.5
    positions = start[:, None] + np.clip(middles, 0, (cropped - 1)[:, None])
    return positions, np.ones(positions.shape, bool)


def _place_contiguous(
    lengths: NDArray[np.int64], num_frames: int, options: InputSpec, draws: TimeDraws | None
) -> Positions:
    """Frames one after the other, from a random place where the clip is longer; what is missing is padded."""
    size = num_frames if options.sampling == "none" else options.num_frames
    if draws is None:
        size = max(size, num_frames)
        positions = np.broadcast_to(np.arange(size, dtype=np.float64), (len(lengths), size))
        return positions, positions < lengths[:, None]
    played = np.floor((lengths - 1) / draws.speed) + 1  # frames that the clip has at its new speed
    start = np.floor(draws.places[:, 0] * (np.maximum(played - size, 0) + 1))
    frames = start[:, None] + np.arange(size)[None, :]
    return frames * draws.speed[:, None], frames < played[:, None]


SAMPLINGS = {
    "none": _place_contiguous,
    "contiguous": _place_contiguous,
    "uniform": _place_uniform,
    "crop_resize": _place_crop,
}


def read_frames(clips: MaskedClips, positions: NDArray[np.float64], is_inside: NDArray[np.bool_]) -> MaskedClips:
    """The clips at positions (N, T'), linearly between frames; zeros where `is_inside` (N, T') is false.

    A joint that is missing in one of the two frames is taken from the nearer one, so it may be missing.
    """
    xp = get_namespace(clips.data)
    low = np.floor(positions).astype(np.int64)
    share = positions - low
    inside = convert_like(is_inside, clips.data)[:, :, None, None]
    result = _take(clips, low)
    if share.any():
        following = _take(clips, np.minimum(low + 1, clips.data.shape[2] - 1))
        weight = convert_like(share, clips.data)[:, None, :, None, None]
        is_late = convert_like(share >= 0.5, clips.data)[:, :, None, None]
        nearer = xp.where(is_late[:, None], following.data, result.data)
        between = result.data + weight * (following.data - result.data)
        is_real = xp.where(is_late, following.is_real, result.is_real)
        result = MaskedClips(
            xp.where((following.is_real & result.is_real)[:, None], between, nearer),
            is_real,
        )
    if is_inside.all():
        return result
    return MaskedClips(xp.where(inside[:, None], result.data, 0.0), result.is_real & inside)


def _take(clips: MaskedClips, frames: NDArray[np.int64]) -> MaskedClips:
    """Frames (N, T') of each clip."""
    xp = get_namespace(clips.data)
    frames = convert_like(frames, clips.data)
    rows = np.arange(len(clips.data))[:, None]
    rows = convert_like(rows, clips.data)
    # Two index arrays round a slice put the indexed axes first: (N, T', C, V, M)
    return MaskedClips(xp.moveaxis(clips.data[rows, :, frames], 2, 1), clips.is_real[rows, frames])


def pad(clips: MaskedClips, num_frames: int) -> MaskedClips:
    """Zeros at the end up to num_frames; longer clips as they are."""
    missing = num_frames - clips.data.shape[2]
    if missing <= 0:
        return clips
    xp = get_namespace(clips.data)
    parts = []
    for x, axis in ((clips.data, 2), (clips.is_real, 1)):
        shape = [missing if place == axis else size for place, size in enumerate(x.shape)]
        zeros = np.zeros(shape, x.dtype) if xp is np else x.new_zeros(shape)
        parts.append(xp.concatenate([x, zeros], axis=axis))
    return MaskedClips(*parts)
