"""Augmentation of training batches, vectorised over the clips, on the device of the batch.

What a clip gets depends on (seed, epoch, clip number) only: not on the batch around it, the workers or a
resume.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from kinegraph.data import augment as changes
from kinegraph.data.counters import normal_from_counters, uniform_from_counters
from kinegraph.data.missing import MaskedClips
from kinegraph.data.pipeline import InputPipeline
from kinegraph.data.sampling import count_draws
from kinegraph.skeleton.layouts import Pair
from kinegraph.spec_input import AugmentSpec, InputSpec

ROTATIONS_DEGREES = (-10.0, -5.0, 0.0, 5.0, 10.0)
SCALES = (0.9, 1.0, 1.1)
SHIFTS = (-0.2, -0.1, 0.0, 0.1, 0.2)
# Rotation, scale, shift of channel 0 and shift of channel 1, each at the start and at the end of the clip.
MOVE_DRAWS = 8
CHOOSE_STREAM = 1
MOVE_STREAM = 2
PLACE_STREAM = 3
TIME_STREAM = 4
AFFINE_STREAM = 5
NOISE_STREAM = 6
JOINT_STREAM = 7
FRAME_STREAM = 8
WHOLE_CLIP = -1


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
    moved = torch.empty_like(x)
    # Two passes over memory for each channel, without arrays in between
    torch.addcmul(shift_0, cosine, x[:, 0], out=moved[:, 0]).addcmul_(sine, x[:, 1], value=-1)
    torch.addcmul(shift_1, sine, x[:, 0], out=moved[:, 1]).addcmul_(cosine, x[:, 1])
    moved[:, 2:] = x[:, 2:]
    return moved


def _draw_course(choices: tuple[float, ...], draws: np.ndarray, num_frames: int) -> np.ndarray:
    """Pick both ends for each clip, (N, 2) draws in [0, 1), and go linearly between them: (N, T)."""
    ends = np.array(choices)[np.floor(draws * len(choices)).astype(np.int64)]
    return np.linspace(ends[:, 0], ends[:, 1], num_frames, axis=1)


@dataclass(frozen=True)
class TrainingAugmentation:
    """From clips as they are in the file to the input of the network, in training.

    Without a pipeline with steps and without `options` (of the spec's `augment`) only what the spec's `dataset` section
    asks for: window, then move. With them, the steps of the pipeline with random sampling, and in between:

        lose joints and frames -> clean -> normalise -> sample -> window -> move -> `augment` -> streams

    Joints and frames are lost first, so that what the pipeline does about missing ones happens as at inference.
    """

    window_size: int = WHOLE_CLIP
    random_choose: bool = False
    random_move: bool = False
    seed: int = 0
    pipeline: InputPipeline | None = None
    options: AugmentSpec | None = None
    symmetric: tuple[Pair, ...] = ()

    def __call__(self, x: torch.Tensor, index: torch.Tensor | np.ndarray, epoch: int) -> torch.Tensor:
        """(N, C, T, V, M) and a number for each clip (N,) -> the augmented clips (N, C', T', V, M), on the same
        device. Clips of the same number are changed alike in an epoch.
        """
        numbers = index.cpu().numpy() if isinstance(index, torch.Tensor) else np.asarray(index)
        options = self.options if self.options is not None and changes.is_active(self.options) else None
        pipeline = self.pipeline
        if options is None and (pipeline is None or pipeline.options is None):
            return self._move(self._choose(x, numbers, epoch), numbers, epoch)
        pipeline = pipeline or InputPipeline(x.shape[1], x.shape[3])
        options = options or AugmentSpec()
        x = self._lose(x, options, numbers, epoch)
        clips = pipeline.normalise(pipeline.clean(x))
        clips = self._sample(clips, pipeline, options, numbers, epoch)
        is_real = self._choose(clips.is_real[:, None], numbers, epoch)[:, 0]
        data = self._move(self._choose(clips.data, numbers, epoch), numbers, epoch)
        # Here nothing leaks into what is not real, unlike in the recipe that the move comes from
        clips = MaskedClips(torch.where(is_real[:, None], data, 0.0), is_real)
        return pipeline.finish(self._change(clips, pipeline, options, numbers, epoch))

    def _draw(self, numbers: np.ndarray, epoch: int, num_draws: int, stream: int) -> np.ndarray:
        return uniform_from_counters(self.seed, epoch, numbers, num_draws, stream)

    def _choose(self, x: torch.Tensor, numbers: np.ndarray, epoch: int) -> torch.Tensor:
        if not self.random_choose:
            return pad_window(x, self.window_size)
        return random_choose(x, self.window_size, self._draw(numbers, epoch, 1, CHOOSE_STREAM))

    def _move(self, x: torch.Tensor, numbers: np.ndarray, epoch: int) -> torch.Tensor:
        return random_move(x, self._draw(numbers, epoch, MOVE_DRAWS, MOVE_STREAM)) if self.random_move else x

    def _lose(self, x: torch.Tensor, options: AugmentSpec, numbers: np.ndarray, epoch: int) -> torch.Tensor:
        _, _, num_frames, num_joints, num_people = x.shape
        if options.joint_drop > 0:
            draws = self._draw(numbers, epoch, changes.DROP_DRAWS * num_joints * num_people, JOINT_STREAM)
            x = changes.drop_joints(x, options.joint_drop, draws)
        if options.frame_drop > 0:
            x = changes.drop_frames(x, options.frame_drop, self._draw(numbers, epoch, num_frames, FRAME_STREAM))
        return x

    def _sample(
        self, clips: MaskedClips, pipeline: InputPipeline, options: AugmentSpec, numbers: np.ndarray, epoch: int
    ) -> MaskedClips:
        own = pipeline.options or InputSpec()
        if own.sampling == "none" and options.speed == 0 and options.time_warp == 0:
            return clips
        places = self._draw(numbers, epoch, count_draws(own), PLACE_STREAM)
        draws = changes.draw_time(options, places, self._draw(numbers, epoch, changes.TIME_DRAWS, TIME_STREAM))
        return pipeline.sample(clips, draws)

    def _change(
        self, clips: MaskedClips, pipeline: InputPipeline, options: AugmentSpec, numbers: np.ndarray, epoch: int
    ) -> MaskedClips:
        size = pipeline.num_coordinates
        amounts = (options.rotation_x, options.rotation_y, options.rotation_z, options.scale, options.shift)
        if any((*amounts, options.shear, options.mirror)):
            draws = self._draw(numbers, epoch, changes.AFFINE_DRAWS, AFFINE_STREAM)
            is_centred = pipeline.options is not None and pipeline.options.centre != "none"
            clips = changes.move(clips, *changes.make_affine(options, size, draws), is_centred)
            clips = changes.mirror(clips, changes.find_mirrored(options, draws), self.symmetric)
        if options.noise > 0:
            count = size * int(np.prod(clips.data.shape[2:]))
            normals = normal_from_counters(self.seed, epoch, numbers, count, NOISE_STREAM, clips.data)
            clips = changes.add_noise(clips, options.noise, normals)
        return clips
