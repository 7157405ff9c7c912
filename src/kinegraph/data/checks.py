"""Whether an array, its labels, the layout and the classes fit together: all faults at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from kinegraph.data.arrays import (
    AXES,
    AXIS_LETTERS,
    NonFiniteCount,
    cast_to_float32,
    iterate_blocks,
    open_array,
    release_pages,
)
from kinegraph.data.labels import Labels, read_labels
from kinegraph.errors import DataError, Problem
from kinegraph.skeleton.layouts import Layout, find_layouts

MOST_CHANNELS = 12
"""More, unasked for, are no coordinates but another axis."""
MAX_INFERRED_CLASSES = 10_000
SHOWN = 5
MAX_SCANNED_VALUES = 2**28
"""1 GiB of float32, some seconds of reading. Of larger arrays about SAMPLED_VALUES are read before the start."""
SAMPLED_VALUES = 2**24


@dataclass(frozen=True)
class DatasetInfo:
    """A data set that passed its checks. `labels` is None where no label file was given."""

    data_path: str
    shape: tuple[int, int, int, int, int]
    dtype: str
    labels: Labels | None = None
    warnings: list[str] = field(default_factory=list)


def check_dataset(
    data_path: str | Path,
    label_path: str | Path | None,
    *,
    layout: Layout | None = None,
    num_channels: int | None = None,
    num_classes: int | None = None,
    label_map: Mapping[str, int] | None = None,
    classes_from: str = "",
) -> DatasetInfo:
    """Check a .npy file (N, C, T, V, M) and its label file; what is None is not checked.

    `classes_from` names where the classes come from, for the messages, where that is no option of the spec.
    One DataError holds every problem of both files: shape, joints, channels, labels, NaN and infinity. Clips
    that hold nothing but zeros are only a warning in the result. Values are read in blocks, with flat memory: all
    of them up to MAX_SCANNED_VALUES, else those of clips spread evenly over the file, since every batch is checked
    again as it is read.
    """
    problems: list[Problem] = []
    warnings: list[str] = []
    labels = None
    if label_path:
        try:
            labels = read_labels(label_path, label_map)
        except DataError as error:
            problems += error.problems
    if label_map is not None:
        problems += check_label_map(label_map, num_classes)
        num_classes = len(label_map) if num_classes is None else num_classes
    if labels is not None:
        problems += _check_labels(labels, num_classes, label_map, str(label_path), classes_from)
    array = None
    try:
        array = open_array(data_path)
    except DataError as error:
        problems += error.problems
    if array is not None:
        problems += check_shape(array.shape, str(data_path), layout=layout, num_channels=num_channels)
        if labels is not None and len(labels.labels) != len(array):
            expected = f"{len(array)}, one for each clip of {data_path}"
            problems.append(Problem(str(label_path), f"{len(labels.labels)} labels", expected))
        problem, empty = scan_values(array, str(data_path))
        problems += [problem] if problem else []
        if len(empty):
            step = choose_step(array)
            looked_at = f" of the {len(range(0, len(array), step))} looked at" if step > 1 else ""
            warnings.append(f"{data_path}: {describe_empty_clips(empty)}{looked_at}")
    if problems or array is None:
        raise DataError(*problems)
    n, c, t, v, m = array.shape
    return DatasetInfo(str(data_path), (n, c, t, v, m), str(array.dtype), labels, warnings)


def check_shape(
    shape: tuple[int, ...], where: str, *, layout: Layout | None = None, num_channels: int | None = None
) -> list[Problem]:
    """Joints against the layout and channels against the model, for a shape (N, C, T, V, M)."""
    problems = []
    if num_channels is not None and num_channels != shape[1] > MOST_CHANNELS:
        # What follows would advise to train on frames or joints as channels
        expected = f"clips {AXIS_LETTERS}: {', '.join(AXES)}"
        hint = "numpy.transpose puts axes in order. Channels are coordinates: x, y, perhaps z and a score."
        return [Problem(where, f"{shape[1]} channels in shape {shape}", expected, hint)]
    if layout is not None and shape[3] != layout.num_joints:
        fitting = find_layouts(shape[3])
        hint = f"No known layout has {shape[3]} joints: set model.graph_layout to a YAML file that describes it."
        if fitting:
            hint = f"Layouts with {shape[3]} joints: {', '.join(fitting)}. Set model.graph_layout."
        expected = f"{layout.num_joints} joints, as in the layout {layout.name}"
        problems.append(Problem(where, f"{shape[3]} joints in shape {shape}", expected, hint))
    if num_channels is not None and shape[1] != num_channels:
        hint = f"Set model.input_channels={shape[1]}, or convert the data."
        got = f"{shape[1]} channels in shape {shape}"
        problems.append(Problem(where, got, f"{num_channels} channels (model.input_channels)", hint))
    return problems


def check_label_map(label_map: Mapping[str, int], num_classes: int | None) -> list[Problem]:
    """The numbers of a label map are 0, 1, ... without gaps, one for each class."""
    where = "dataset.label_map"
    if num_classes is not None and len(label_map) != num_classes:
        expected = f"{num_classes} (dataset.num_classes)"
        hint = "Name every class in the map, or leave both out: they are then inferred from the labels."
        return [Problem(where, f"{len(label_map)} class names", expected, hint)]
    if sorted(label_map.values()) != list(range(len(label_map))):
        got = "the numbers " + list_some(sorted(label_map.values()))
        return [Problem(where, got, f"each of 0 to {len(label_map) - 1} once")]
    return []


def _check_labels(
    labels: Labels,
    num_classes: int | None,
    label_map: Mapping[str, int] | None,
    where: str,
    classes_from: str = "",
) -> list[Problem]:
    outside = labels.labels < 0
    expected = "0 or more"
    if num_classes is not None:
        outside |= labels.labels >= num_classes
        source = classes_from or ("dataset.num_classes" if label_map is None else "dataset.label_map")
        expected = f"labels from 0 to {num_classes - 1} ({num_classes} classes, from {source})"
    places = np.flatnonzero(outside)
    if not len(places):
        return []
    values = list_some(sorted(set(labels.labels[places].tolist())))
    first = f"clip {places[0]} ({labels.names[places[0]]})"
    noun = "label" if len(places) == 1 else "labels"
    got = f"{len(places)} {noun} outside ({values}), the first at {first}"
    hint = "Labels count from 0: subtract 1." if labels.labels.min() == 1 else ""
    return [Problem(where, got, expected, hint)]


def choose_step(array: np.ndarray) -> int:
    """Every how manyeth clip a check before the start reads: 1 up to MAX_SCANNED_VALUES."""
    return 1 if array.size <= MAX_SCANNED_VALUES else -(-array.size // SAMPLED_VALUES)


def scan_values(array: np.ndarray, where: str) -> tuple[Problem | None, np.ndarray]:
    """NaN and infinity in an array (N, C, T, V, M), and the numbers of the clips that are all zeros.

    Of a large array only every `choose_step`th clip is read.
    """
    step = choose_step(array)
    count = NonFiniteCount()
    is_used = np.zeros(len(range(0, len(array), step)), bool)
    for clips, frames, block in iterate_blocks(np.asarray(array)[::step]):
        values = cast_to_float32(block)
        count.add(values, clips.start, frames.start)
        is_used[clips] |= values.any(axis=(1, 2, 3, 4))
    release_pages(array)
    if count.first is not None:
        count.first = (count.first[0] * step, *count.first[1:])
    problem = count.as_problem(where)
    if problem is not None and step > 1:
        problem = replace(problem, got=f"{problem.got} (of the {len(is_used)} clips looked at, one in {step})")
    return problem, np.flatnonzero(~is_used) * step


def describe_empty_clips(empty: np.ndarray) -> str:
    clips = "clip is" if len(empty) == 1 else "clips are"
    return f"{len(empty)} {clips} empty (all zeros): {list_some(empty.tolist())}"


def infer_classes(
    labels: Labels,
    label_map: Mapping[str, int] | None = None,
    num_classes: int | None = None,
    where: str = "labels",
) -> tuple[int, dict[str, int]]:
    """(num_classes, label_map) of a training set, where the user left out one or both.

    Names come from the label map, else from the class names in the label file, else they are class_0,
    class_1, ... DataError where they contradict each other or the labels.
    """
    if label_map is None:
        if num_classes is None:
            largest = int(labels.labels.max())
            num_classes = len(labels.class_names) if labels.class_names else largest + 1
            if num_classes > MAX_INFERRED_CLASSES:
                got = f"a label of {largest}"
                hint = "If there really are so many classes, set dataset.num_classes."
                raise DataError(Problem(where, got, f"fewer than {MAX_INFERRED_CLASSES} classes", hint))
        names = labels.class_names or [f"class_{i}" for i in range(num_classes)]
        label_map = {name: i for i, name in enumerate(names)}
    problems = check_label_map(label_map, num_classes)
    num_classes = len(label_map) if num_classes is None else num_classes
    problems += _check_labels(labels, num_classes, label_map, where)
    if problems:
        raise DataError(*problems)
    return num_classes, dict(label_map)


def list_some(values: list[int]) -> str:
    """The first of them as text."""
    return ", ".join(str(value) for value in values[:SHOWN]) + (", ..." if len(values) > SHOWN else "")
