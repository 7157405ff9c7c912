"""Augmentation of training batches, vectorised over the clips, on the device of the batch.

What a clip gets depends on (seed, epoch, clip number) only: not on the batch around it, the workers or a
resume.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

ROTATIONS_DEGREES = (-10.0, -5.0, 0.0, 5.0, 10.0)
SCALES = (0.9, 1.0, 1.1)
SHIFTS = (-0.2, -0.1, 0.0, 0.1, 0.2)
# Rotation, scale, shift of channel 0 and shift of channel 1, each at the start and at the end of the clip.
MOVE_DRAWS = 8
CHOOSE_STREAM = 1
MOVE_STREAM = 2
WHOLE_CLIP = -1


def uniform_from_counters(seed: int, epoch: int, index: np.ndarray, num_draws: int, stream: int) -> np.ndarray:
    """Random numbers in [0, 1) from their coordinates alone: float64 (n, num_draws) for `index` (n,).

    The coordinates pass one after the other through the mixing function of SplitMix64 (Steele, Lea and Flood,
    "Fast splittable pseudorandom number generators", 2014). `stream` keeps the draws of different
    augmentations apart.
    """
    state = np.zeros((1, 1), np.uint64)
    for coordinate in (seed, stream, epoch):
        state = _mix(state ^ np.uint64(coordinate % 2**64))
    state = _mix(state ^ np.asarray(index, np.int64).astype(np.uint64)[:, None])
    state = _mix(state ^ np.arange(num_draws, dtype=np.uint64)[None, :])
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    """One step of SplitMix64 from each state: a bijection of uint64 that spreads every bit over all."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def pad_window(x: torch.Tensor, window_size: int) -> torch.Tensor:
    """(N, C, T, V, M) with zeros at the end up to `window_size` frames; longer clips and -1: as they are."""
    missing = window_size - x.shape[2]
    if window_size == WHOLE_CLIP or missing <= 0:
        return x
    return torch.nn.functional.pad(x, (0, 0, 0, 0, 0, missing))


def random_choose(x: torch.Tensor, window_size: int, uniforms: np.ndarray) -> torch.Tensor:
    """(N, C, T, V, M) -> (N, C, window_size, V, M), `uniforms` (N, 1) in [0, 1).

    A longer clip is cropped at a random place, a shorter one put at a random place among zeros; every place
    is equally likely. Window -1 leaves clips whole.
    """
    num_frames = x.shape[2]
    if window_size in (WHOLE_CLIP, num_frames):
        return x
    places = np.asarray(uniforms, np.float64).reshape(len(x))
    start = np.floor(places * (abs(num_frames - window_size) + 1)).astype(np.int64)
    first = torch.from_numpy(start if window_size < num_frames else -start).to(x.device)
    frames = first[:, None] + torch.arange(window_size, device=x.device)
    clips = torch.arange(len(x), device=x.device)[:, None]
    # Two index arrays round a slice put the indexed axes first: (N, window, C, V, M).
    chosen = x[clips, :, frames.clamp(0, num_frames - 1)].movedim(2, 1)
    if window_size < num_frames:
        return chosen.contiguous()
    is_real = (frames >= 0) & (frames < num_frames)
    return torch.where(is_real[:, None, :, None, None], chosen, chosen.new_zeros(())).contiguous()


def random_move(x: torch.Tensor, uniforms: np.ndarray) -> torch.Tensor:
    """(N, C, T, V, M) with channels 0 and 1 rotated, scaled and shifted; `uniforms` (N, 8) in [0, 1).

    Rotation, scale and both shifts are picked from their lists at both ends of the clip and run linearly over
    its frames. Padded frames move as well, as in the recipe that this comes from (ST-GCN on Kinetics, Yan et
    al. 2018).
    """
    if x.shape[1] < 2:
        raise ValueError(f"random_move needs channels 0 and 1, got {x.shape[1]} channel")
    draws = np.asarray(uniforms, np.float64).reshape(len(x), MOVE_DRAWS)
    num_frames = x.shape[2]
    angle = np.deg2rad(_draw_course(ROTATIONS_DEGREES, draws[:, 0:2], num_frames))
    scale = _draw_course(SCALES, draws[:, 2:4], num_frames)
    shifts = [_draw_course(SHIFTS, draws[:, first : first + 2], num_frames) for first in (4, 6)]
    courses = np.stack([scale * np.cos(angle), scale * np.sin(angle), *shifts])  # (4, N, T)
    cosine, sine, shift_0, shift_1 = torch.from_numpy(courses).to(x.dtype).to(x.device)[..., None, None]
    moved = x.clone()
    moved[:, 0] = cosine * x[:, 0] - sine * x[:, 1] + shift_0
    moved[:, 1] = sine * x[:, 0] + cosine * x[:, 1] + shift_1
    return moved


def _draw_course(choices: tuple[float, ...], draws: np.ndarray, num_frames: int) -> np.ndarray:
    """Pick both ends for each clip, (N, 2) draws in [0, 1), and go linearly between them: (N, T)."""
    ends = np.array(choices)[np.floor(draws * len(choices)).astype(np.int64)]
    return np.linspace(ends[:, 0], ends[:, 1], num_frames, axis=1)


@dataclass(frozen=True)
class TrainingAugmentation:
    """The augmentations of the spec's `dataset` section, in their order: window, then move."""

    window_size: int = WHOLE_CLIP
    random_choose: bool = False
    random_move: bool = False
    seed: int = 0

    def __call__(self, x: torch.Tensor, index: torch.Tensor | np.ndarray, epoch: int) -> torch.Tensor:
        """(N, C, T, V, M) and the clips' numbers (N,) -> the augmented clips (N, C, T', V, M), on the same
        device.
        """
        numbers = index.cpu().numpy() if isinstance(index, torch.Tensor) else np.asarray(index)
        if self.random_choose:
            x = random_choose(x, self.window_size, uniform_from_counters(self.seed, epoch, numbers, 1, CHOOSE_STREAM))
        else:
            x = pad_window(x, self.window_size)
        if self.random_move:
            draws = uniform_from_counters(self.seed, epoch, numbers, MOVE_DRAWS, MOVE_STREAM)
            x = random_move(x, draws)
        return x
