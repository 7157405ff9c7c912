"""The data sets of the accuracy benchmark: recordings read in place, and arrays of some of their clips.

A file holds all clips one after the other. What is written for training and testing goes to a folder outside the work
tree, each part in files of its own. Which clips train, choose and test is fixed here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

import nw_ucla
from kinegraph.skeleton.layouts import get_layout
from kinegraph.storage import make_folder, write_atomically, write_json

Indices = NDArray[np.int64]

VALIDATION_SUBJECTS = (5, 10)
"""Of the ten of NW-UCLA: every fifth, chosen before anything was trained."""
VALIDATION_SHARE = 0.15
SPLIT_SEED = 1

Form = Literal["raw", "fitted"]
"""raw: as recorded, with zeros after each clip. fitted: as benchmarks/nw_ucla.py prepares clips for ST-GCN: relative to
the centre joint of the first frame, with zeros or resampled to nw_ucla.NUM_FRAMES."""


@dataclass(frozen=True)
class Source:
    """What is known of a data set without reading it.

    num_frames   frames of its longest clip
    layout       its name
    score_channel  channel of a confidence, or -1
    class_names  in label order
    """

    title: str
    num_frames: int
    layout: str
    score_channel: int
    class_names: tuple[str, ...]


@dataclass(frozen=True)
class Recordings:
    """clips (T, V, C) each; labels, subjects (0: unknown) and is_test (N,), as the files say."""

    clips: list[NDArray[np.float32]]
    labels: NDArray[np.int64]
    subjects: NDArray[np.int64]
    is_test: NDArray[np.bool_]


@dataclass(frozen=True)
class Fold:
    """Indices of clips. train is fit and val together; test is only looked at for a final model."""

    name: str
    fit: Indices
    val: Indices
    train: Indices
    test: Indices


SOURCES: dict[str, Source] = {
    "nw_ucla": Source("NW-UCLA", 201, "kinect_v1", -1, nw_ucla.CLASS_NAMES),
    "penn_action": Source(
        "Penn Action",
        663,
        "penn_action",
        2,
        (
            *("baseball_pitch", "baseball_swing", "bench_press", "bowl", "clean_and_jerk", "golf_swing", "jump_rope"),
            *("jumping_jacks", "pullup", "pushup", "situp", "squat", "strum_guitar", "tennis_forehand", "tennis_serve"),
        ),
    ),
    "utkinect": Source(
        "UTKinect-Action",
        110,
        "kinect_v1",
        -1,
        ("walk", "sit down", "stand up", "pick up", "carry", "throw", "push", "pull", "wave hands", "clap hands"),
    ),
}


def read_recordings(path: Path, source: Source) -> Recordings:
    """All clips of a file of arrays `frames` (sum of lengths, V, C), `length`, `label` and, if there are any, `subject`
    and `test`. Raises ValueError for labels that are not among the classes.
    """
    content = np.load(path)
    labels, count = content["label"], len(content["label"])
    if labels.dtype.kind == "U":
        labels = np.array([source.class_names.index(name) for name in labels.tolist()])
    if labels.min() < 0 or labels.max() >= len(source.class_names):
        raise ValueError(f"{path}: a label outside 0 to {len(source.class_names) - 1}")
    return Recordings(
        np.split(content["frames"].astype(np.float32), np.cumsum(content["length"])[:-1]),
        labels.astype(np.int64),
        content["subject"].astype(np.int64) if "subject" in content else np.zeros(count, np.int64),
        content["test"].astype(bool) if "test" in content else np.zeros(count, bool),
    )


def stack_clips(recordings: Recordings, chosen: Indices, source: Source, form: Form) -> NDArray[np.float32]:
    """The chosen clips as an array (N, C, T, V, 1). See `Form`."""
    num_frames = source.num_frames if form == "raw" else nw_ucla.NUM_FRAMES
    _, num_joints, num_channels = recordings.clips[0].shape
    array = np.zeros((len(chosen), num_channels, num_frames, num_joints, 1), np.float32)
    for clip, index in zip(array, chosen, strict=True):
        frames = recordings.clips[index]
        if form == "fitted":
            frames = nw_ucla.fit_length(_move_to_centre(frames, source), num_frames)
        clip[:, : len(frames), :, 0] = frames.transpose(2, 0, 1)
    return array


def _move_to_centre(frames: NDArray[np.float32], source: Source) -> NDArray[np.float32]:
    origin = frames[0, get_layout(source.layout).centre].copy()
    if source.score_channel >= 0:
        origin[source.score_channel] = 0
    return frames - origin


def write_part(
    folder: Path, part: str, recordings: Recordings, chosen: Indices, source: Source, form: Form
) -> dict[str, str]:
    """`<part>_data.npy` (N, C, T, V, 1) and `<part>_label.json` of the chosen clips, unless they are there.

    Gives back their paths as a spec names them: data_path and label_path.
    """
    data, labels = make_folder(folder) / f"{part}_data.npy", folder / f"{part}_label.json"
    if not (data.exists() and labels.exists()):
        with write_atomically(data) as file:
            np.save(file, stack_clips(recordings, chosen, source, form))
        names = [f"clip_{index}" for index in chosen.tolist()]
        write_json(labels, {"names": names, "labels": recordings.labels[chosen].tolist()})
    return {"data_path": str(data), "label_path": str(labels)}


def split_by_subject(recordings: Recordings) -> list[Fold]:
    """NW-UCLA, cross-view: view 3 is the test; of views 1 and 2 two subjects validate."""
    validates = np.isin(recordings.subjects, VALIDATION_SUBJECTS)
    return [_make_fold("cross_view", recordings.is_test, validates)]


def split_stratified(recordings: Recordings) -> list[Fold]:
    """Penn Action: its own test flag; of the training clips 15 % of every class validate. It names no subjects."""
    validates = np.zeros(len(recordings.labels), bool)
    rng = np.random.Generator(np.random.PCG64(SPLIT_SEED))
    for label in np.unique(recordings.labels):
        own = np.flatnonzero(~recordings.is_test & (recordings.labels == label))
        validates[rng.permutation(own)[: round(VALIDATION_SHARE * len(own))]] = True
    return [_make_fold("own_split", recordings.is_test, validates)]


def split_each_subject(recordings: Recordings) -> list[Fold]:
    """UTKinect: each subject is the test once, and the next one validates."""
    subjects = np.unique(recordings.subjects).tolist()
    following = dict(zip(subjects, [*subjects[1:], subjects[0]], strict=True))
    return [
        _make_fold(f"subject_{own:02d}", recordings.subjects == own, recordings.subjects == following[own])
        for own in subjects
    ]


SPLITS: dict[str, Callable[[Recordings], list[Fold]]] = {
    "nw_ucla": split_by_subject,
    "penn_action": split_stratified,
    "utkinect": split_each_subject,
}


def _make_fold(name: str, is_test: NDArray[np.bool_], validates: NDArray[np.bool_]) -> Fold:
    groups = (~is_test & ~validates, ~is_test & validates, ~is_test, is_test)
    return Fold(name, *(np.flatnonzero(group) for group in groups))
