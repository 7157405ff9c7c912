"""The motion generator behind `kinegraph demo`: synthetic clips and recordings of the 34-joint `nvidia` layout.

Nothing here is recorded from people. Bodies of plausible proportions move by forward kinematics, a camera looks at
them, and a detector that errs (more in depth, now and then without a joint) reports them. A label says what the person
does, so none is wrong; some clips are hard because the motion itself is: a person who begins to sit down as the clip
ends, shuffles, hops by a few centimetres, or leans forward on a chair without getting up.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kinegraph.data.convert import normalise_poses
from kinegraph.data.synthetic_actions import perform, perform_sequence
from kinegraph.data.synthetic_body import NUM_JOINTS, Array, Body, draw_body, orient, pose_body, turn
from kinegraph.data.synthetic_motion import draw_style, drift
from kinegraph.errors import DataError, Problem
from kinegraph.storage import make_folder, write_atomically

CLASS_NAMES: tuple[str, ...] = ("sitting_down", "getting_up", "sitting", "standing", "walking", "jumping")
FOCAL_LENGTH = 1200.0
IMAGE_WIDTH, IMAGE_HEIGHT = 1920, 1080
CLIPS_PER_SUBJECT = 12
MAX_CLIPS = 200_000
MAX_PERSON_FRAMES = 100_000
START_TIME_NS = 1_767_225_600_000_000_000  # 2026-01-01, UTC

_FACE = [15, 16, 17, 18, 19]
_HANDS = [[26, 28, 30, 32], [27, 29, 31, 33]]
_ARMS = [[22, 24, *_HANDS[0]], [23, 25, *_HANDS[1]]]
_FEET = [[7, 9, 11, 13], [8, 10, 12, 14]]
_LEGS = [[4, *_FEET[0]], [5, *_FEET[1]]]
_OCCLUDED = [*_ARMS, *_LEGS, *_HANDS, *_FEET, _FEET[0] + _FEET[1], _FACE]


@dataclass(frozen=True)
class SyntheticSkeletons:
    """Joints (N, T, 34, 3) in mm without camera and noise: x to the person's left, y up, z the way the person faces."""

    joints: Array
    labels: NDArray[np.int64]
    subjects: NDArray[np.int64]
    statures: Array


@dataclass(frozen=True)
class SyntheticClips:
    """data (N, 3, T, 34, 1) float32 as dataset_convert makes it with pose type 3dbp; labels, names, subjects (N)."""

    data: NDArray[np.float32]
    labels: NDArray[np.int64]
    names: list[str]
    subjects: NDArray[np.int64]


@dataclass(frozen=True)
class Camera:
    """Where the person's axes lie in camera axes: x right, y down, z depth, mm; angles in radians."""

    height: float
    distance: float
    sideways: float
    tilt: float  # downward
    roll: float

    def view(self, points: Array) -> Array:
        """World points (..., 3), y up, z towards the camera -> camera axes (..., 3)."""
        seen = np.array([self.sideways, self.height, self.distance]) + points * (1.0, -1.0, -1.0)
        turned: Array = seen @ orient(np.array([self.tilt, 0.0, self.roll])).T
        return turned


def _draw_camera(rng: np.random.Generator) -> Camera:
    height, distance = rng.uniform(900.0, 3000.0), rng.uniform(3000.0, 7000.0)
    tilt = np.arctan2(height - 900.0, distance) + rng.normal(0.0, 0.05)
    return Camera(height, distance, rng.uniform(-0.25, 0.25) * distance, tilt, rng.normal(0.0, 0.03))


def _observe(rng: np.random.Generator, seen: Array) -> tuple[Array, Array]:
    """What a detector reports of joints (T, V, 3) in camera axes: positions and scores (T, V); score 0 is a miss.

    The error of a joint wanders (a detector errs alike in neighbouring frames) and jitters, is about twice as large in
    depth, larger at hands and feet, and the depth of the whole person is stretched a little.
    """
    num_frames = len(seen)
    level = float(np.clip(np.exp(rng.normal(np.log(7.0), 0.45)), 3.0, 25.0))
    weight = np.ones(NUM_JOINTS)
    weight[[0, 1, 2, 3, 6]] = 0.7
    weight[[*_HANDS[0], *_HANDS[1], *_FEET[0], *_FEET[1]]] = 1.4
    jitter = rng.standard_normal((num_frames, NUM_JOINTS, 3)) * 0.6
    jitter *= np.where(rng.random((num_frames, NUM_JOINTS, 1)) < 0.01, 6.0, 1.0)
    wander = drift(rng, np.arange(num_frames) / 15.0, (NUM_JOINTS, 3), fastest=0.4)
    error = level * weight[:, None] * (1.0, 1.0, 2.2) * (jitter + wander)
    stretch = (1.0, 1.0, 1.0 + float(np.clip(rng.normal(0.0, 0.07), -0.2, 0.2)))
    found = seen[:, :1] + (seen - seen[:, :1]) * stretch + error
    score = np.clip(rng.normal(rng.uniform(0.6, 0.9), 0.1, (num_frames, NUM_JOINTS)), 0.05, 0.99)
    score[rng.random((num_frames, NUM_JOINTS)) < rng.uniform(0.0, 0.03)] = 0.0
    for _ in range(rng.poisson(0.7 * num_frames / 30)):
        start = int(rng.integers(num_frames))
        length = 60 if rng.random() < 0.08 else int(rng.integers(3, 16))
        score[max(start - length // 2, 0) : start + length // 2, _OCCLUDED[rng.integers(len(_OCCLUDED))]] = 0.0
    return found, score


def _draw(seed: int, *key: int) -> np.random.Generator:
    """The generator of one thing in a data set: what is drawn for one does not move the others."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)))


def _make_clip(seed: int, index: int, times: Array) -> tuple[Array, int, int, Body, np.random.Generator]:
    """Noise-free joints (T, 34, 3) of clip `index`, its label, subject, body, and the generator to go on with.

    A clip depends on the seed and its index only; each six clips in a row hold the six classes in random order.
    """
    num_classes, subject = len(CLASS_NAMES), index // CLIPS_PER_SUBJECT
    label = int(_draw(seed, 0, index // num_classes).permutation(num_classes)[index % num_classes])
    person = _draw(seed, 1, subject)
    body, style = draw_body(person), draw_style(person)
    rng = _draw(seed, 2, index)
    motion = perform(label, body, style, rng, times)
    joints = pose_body(body, motion)
    joints[..., 2] += motion.travel[:, None]
    return joints, label, subject, body, rng


def _check_size(num_clips: int, num_frames: int, fps: float) -> Array:
    """The times (T,) of the frames; DataError if a clip is too short to hold an action or too much is asked for."""
    problems = []
    if not 1 <= num_clips <= MAX_CLIPS:
        problems.append(Problem("num_clips", str(num_clips), f"1 to {MAX_CLIPS}"))
    if not (fps > 0.0 and 1.0 <= num_frames / fps <= 60.0):
        got = f"{num_frames} frames at {fps} frames a second"
        problems.append(Problem("num_frames", got, "a clip of 1 to 60 seconds", "Change num_frames or fps."))
    if problems:
        raise DataError(*problems)
    return np.arange(num_frames) / fps


def make_skeletons(num_clips: int, seed: int, num_frames: int = 30, fps: float = 15.0) -> SyntheticSkeletons:
    """The motions that make_clips(num_clips, seed, ...) shows, before the camera and the detector."""
    times = _check_size(num_clips, num_frames, fps)
    made = [_make_clip(seed, index, times) for index in range(num_clips)]
    return SyntheticSkeletons(
        joints=np.stack([clip[0] for clip in made]),
        labels=np.array([clip[1] for clip in made], dtype=np.int64),
        subjects=np.array([clip[2] for clip in made], dtype=np.int64),
        statures=np.array([clip[3].stature for clip in made]),
    )


def make_clips(num_clips: int, seed: int, num_frames: int = 30, fps: float = 15.0) -> SyntheticClips:
    """Labelled clips, the classes in equal number, a new person every 12 clips; another seed gives other people.

    Deterministic for a seed; the first clips do not depend on num_clips. Raises DataError.
    """
    times = _check_size(num_clips, num_frames, fps)
    data = np.empty((num_clips, 3, num_frames, NUM_JOINTS, 1), dtype=np.float32)
    labels = np.empty(num_clips, dtype=np.int64)
    subjects = np.empty(num_clips, dtype=np.int64)
    for index in range(num_clips):
        joints, labels[index], subjects[index], _, rng = _make_clip(seed, index, times)
        # Cameras are put where people face them: most do, some are seen from the side, a few from behind.
        heading = rng.normal(0.0, 0.7) + rng.normal(0.0, 0.1) * times
        seen = _draw_camera(rng).view(turn(joints, heading))
        data[index, ..., 0] = normalise_poses(*_observe(rng, seen), "3dbp", focal_length=FOCAL_LENGTH)
    names = [
        f"person_{subject:04d}_clip_{index:05d}_{CLASS_NAMES[label]}"
        for index, (subject, label) in enumerate(zip(subjects, labels, strict=True))
    ]
    return SyntheticClips(data, labels, names, subjects)


def write_dataset(folder: Path, num_train: int, num_val: int, num_test: int, seed: int) -> dict[str, Path]:
    """Write {train,val,test}_data.npy and _label.pkl; no person appears in two splits.

    Returns the paths under the keys train_data, train_label, val_data, ... Raises DataError, StorageError.
    """
    folder = make_folder(Path(folder))
    counts = {"train": num_train, "val": num_val, "test": num_test}
    seeds = np.random.SeedSequence(seed).generate_state(len(counts)).tolist()
    paths: dict[str, Path] = {}
    for (split, count), split_seed in zip(counts.items(), seeds, strict=True):
        clips = make_clips(count, split_seed)
        paths[f"{split}_data"] = folder / f"{split}_data.npy"
        paths[f"{split}_label"] = folder / f"{split}_label.pkl"
        with write_atomically(paths[f"{split}_data"]) as file:
            np.save(file, clips.data)
        with write_atomically(paths[f"{split}_label"]) as file:
            pickle.dump(([f"{split}_{name}" for name in clips.names], clips.labels.tolist()), file)
    return paths


def make_recording(num_frames: int, num_people: int, seed: int, fps: float = 15.0) -> list[dict[str, Any]]:
    """A recording as DeepStream's body-pose-3D app saves it: people who stand, walk, sit, get up and jump in turn.

    One batch a frame from one source; people come late, leave early and are lost for a few frames, and frames without
    anybody have no batch. Each object: pose3d, 34 x (x, y, z in mm from the camera, score); pose25d, 34 x (pixels x, y
    of a 1920x1080 image with focal length 1200, depth beyond joint 0 in units of the mean bone length, score).
    Raises DataError.
    """
    if num_people < 1 or num_frames < 1 or num_people * num_frames > MAX_PERSON_FRAMES or not fps > 0.0:
        got = f"num_frames {num_frames}, num_people {num_people}, fps {fps}"
        expected = f"positive numbers, at most {MAX_PERSON_FRAMES} frames times people"
        raise DataError(Problem("make_recording", got, expected))
    scene = _draw(seed, 3)
    camera = Camera(scene.uniform(1500.0, 2800.0), 5500.0 + 600.0 * num_people, 0.0, scene.uniform(0.1, 0.25), 0.0)
    frames: list[list[dict[str, Any]]] = [[] for _ in range(num_frames)]
    for person in range(num_people):
        rng = _draw(seed, 4, person)
        body, style = draw_body(rng), draw_style(rng)
        joints, _ = perform_sequence(body, style, rng, num_frames, fps, room=(500.0, 1200.0))
        joints[..., 0] += 1500.0 * (person - 0.5 * (num_people - 1))
        found, score = _observe(rng, camera.view(joints))
        pose3d, pose25d = _describe_pose(body, found, score)
        for frame in np.flatnonzero(_draw_presence(rng, num_frames, is_first=person == 0)):
            frames[frame].append({"object_id": person, "pose25d": pose25d[frame], "pose3d": pose3d[frame]})
    return [
        {"num_frames_in_batch": 1, "batches": [_describe_frame(frame, objects, fps)] if objects else []}
        for frame, objects in enumerate(frames)
    ]


def _draw_presence(rng: np.random.Generator, num_frames: int, is_first: bool) -> NDArray[np.bool_]:
    """In which frames (T,) a tracker reports a person."""
    present = np.ones(num_frames, dtype=bool)
    if not is_first:
        present[: int(rng.uniform(0.0, 0.3) * num_frames)] = False
        present[int(rng.uniform(0.8, 1.1) * num_frames) :] = False
    for start in rng.integers(1, max(num_frames - 1, 2), rng.poisson(num_frames / 300)):
        present[start : min(start + int(rng.integers(1, 6)), num_frames - 1)] = False
    return present


def _describe_pose(body: Body, found: Array, score: Array) -> tuple[list[list[float]], list[list[float]]]:
    """pose3d and pose25d, a list of 4 V numbers a frame, of joints (T, V, 3) in camera axes and scores (T, V)."""
    bone = float(np.linalg.norm(body.offsets[1:], axis=1).mean())
    depth = np.maximum(found[..., 2], 1.0)
    flat = np.stack([
        found[..., 0] / depth * FOCAL_LENGTH + 0.5 * IMAGE_WIDTH,
        found[..., 1] / depth * FOCAL_LENGTH + 0.5 * IMAGE_HEIGHT,
        (found[..., 2] - found[:, :1, 2]) / bone,
    ], axis=-1)  # fmt: skip
    return tuple(  # type: ignore[return-value]
        np.round(np.concatenate([points, score[..., None]], axis=-1), 3).reshape(len(found), -1).tolist()
        for points in (found, flat)
    )


def _describe_frame(frame: int, objects: list[dict[str, Any]], fps: float) -> dict[str, Any]:
    return {
        "batch_id": 0,
        "frame_num": frame,
        "ntp_timestamp": START_TIME_NS + round(frame * 1e9 / fps),
        "num_obj_meta": len(objects),
        "objects": objects,
    }
