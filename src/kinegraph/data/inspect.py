"""What is in a data set: `kinegraph inspect data.npy labels.pkl`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kinegraph.data.arrays import NonFiniteCount, cast_to_float32, iterate_blocks, open_array
from kinegraph.data.body import Body, find_body
from kinegraph.data.checks import MOST_CHANNELS, check_shape, describe_empty_clips, list_some
from kinegraph.data.input_checks import find_score_channel
from kinegraph.data.labels import Labels, read_labels
from kinegraph.data.missing import MaskedClips
from kinegraph.data.normalise import measure
from kinegraph.errors import DataError, Problem, UserError
from kinegraph.skeleton.layouts import find_layouts, get_layout
from kinegraph.spec_input import InputSpec

BAR_WIDTH = 40
AXIS_KEYS = ("clips", "channels", "frames", "joints", "people")
ODD_FACTOR = 3.0
"""A person so much smaller or larger in its first frame than it usually is was not tracked well there."""


@dataclass
class _Scan:
    """Sums over the blocks of an array (N, C, T, V, M)."""

    lengths: np.ndarray  # (N,) last frame that is not all zeros, plus 1
    is_seen: np.ndarray  # (N, M) whether the person appears at all
    missing: np.ndarray  # (V,) frames in which a person is there and this joint is all zeros
    lowest: np.ndarray  # (C,) over joints that are there
    highest: np.ndarray  # (C,)
    joints: int = 0
    unscored: int = 0  # joints that are there with a zero in the last channel
    present_frames: int = 0
    non_finite: NonFiniteCount = field(default_factory=NonFiniteCount)

    def add(self, clips: slice, frames: slice, block: np.ndarray) -> None:
        """Count in a block (n, C, t, V, M)."""
        values = cast_to_float32(block)
        self.non_finite.add(values, clips.start, frames.start)
        is_joint = (values != 0).any(axis=1)  # (n, t, V, M)
        is_person = is_joint.any(axis=2)  # (n, t, M)
        self.is_seen[clips] |= is_person.any(axis=1)
        is_frame = is_person.any(axis=2)  # (n, t)
        last = is_frame.shape[1] - is_frame[:, ::-1].argmax(axis=1) + frames.start
        self.lengths[clips] = np.where(is_frame.any(axis=1), last, self.lengths[clips])
        self.missing += (is_person[:, :, None] & ~is_joint).sum(axis=(0, 1, 3))
        self.present_frames += int(is_person.sum())
        self.joints += int(is_joint.sum())
        self.unscored += int((is_joint & (values[:, -1] == 0)).sum())
        is_value = is_joint[:, None] & np.isfinite(values)  # (n, C, t, V, M)
        axes = (0, 2, 3, 4)
        self.lowest = np.minimum(self.lowest, np.where(is_value, values, np.inf).min(axis=axes))
        self.highest = np.maximum(self.highest, np.where(is_value, values, -np.inf).max(axis=axes))

    def count_coordinates(self) -> int:
        """All channels, or all but the last of three or more while that looks like a score: never outside 0 to 1.

        Once a block has ruled out a score it stays ruled out.
        """
        has_score = len(self.lowest) >= 3 and self.lowest[-1] >= 0 and self.highest[-1] <= 1
        return len(self.lowest) - int(has_score)


@dataclass
class _Sizes:
    """How large each person (N, M) is, as `input.scale` measures it: in its first frame, and on average.

    Without `body`, of which a known layout tells, the size is the spread of the joints.
    """

    num_coordinates: int
    body: Body
    first: np.ndarray
    is_seen: np.ndarray
    log_sum: np.ndarray
    count: np.ndarray

    @classmethod
    def start(cls, num_coordinates: int, num_clips: int, num_people: int, body: Body | None) -> _Sizes:
        shape = num_clips, num_people
        body = body or Body(centre=0, bones=(), trunk=((), ()), across=(), symmetric=())
        arrays = np.ones(shape), np.zeros(shape, bool), np.zeros(shape), np.zeros(shape, np.int64)
        return cls(num_coordinates, body, *arrays)

    def add(self, clips: slice, masked: MaskedClips) -> None:
        """Measure in a block (n, C, t, V, M); those of a clip come in their order."""
        with np.errstate(over="ignore", invalid="ignore"):
            size = measure(masked, self.num_coordinates, InputSpec(), self.body).size  # (n, t, M)
        is_person = masked.is_real.any(axis=2)
        is_new = is_person.any(axis=1) & ~self.is_seen[clips]
        first = np.take_along_axis(size, is_person.argmax(axis=1)[:, None], axis=1)[:, 0]
        self.first[clips] = np.where(is_new, first, self.first[clips])
        self.is_seen[clips] |= is_new
        self.log_sum[clips] += np.log(np.where(is_person, size, 1.0)).sum(axis=1)
        self.count[clips] += is_person.sum(axis=1)

    def find_odd(self) -> np.ndarray:
        """The clips in which somebody is ODD_FACTOR times smaller or larger in its first frame than on average."""
        usual = np.exp(self.log_sum / np.maximum(self.count, 1))
        is_odd = (self.first * ODD_FACTOR < usual) | (self.first > usual * ODD_FACTOR)
        return np.flatnonzero((is_odd & self.is_seen).any(axis=1))


def _scan_blocks(array: np.ndarray, body: Body | None) -> tuple[_Scan, np.ndarray]:
    """The sums over an array (N, C, T, V, M), and the clips whose first frame is odd."""
    num_clips, num_channels, _, num_joints, num_people = array.shape
    scan = _Scan(
        lengths=np.zeros(num_clips, np.int64),
        is_seen=np.zeros((num_clips, num_people), bool),
        missing=np.zeros(num_joints, np.int64),
        lowest=np.full(num_channels, np.inf),
        highest=np.full(num_channels, -np.inf),
    )
    # Whether the last channel is a score only the whole file tells: till then people are measured with and without it
    counts = {num_channels, scan.count_coordinates()}
    sizes = {count: _Sizes.start(count, num_clips, num_people, body) for count in counts}
    for clips, frames, block in iterate_blocks(array):
        scan.add(clips, frames, block)
        if scan.count_coordinates() == num_channels:
            sizes = {num_channels: sizes[num_channels]}
        values = np.nan_to_num(cast_to_float32(block), nan=0.0, posinf=0.0, neginf=0.0)
        masked = MaskedClips(values, (values != 0).any(axis=1))
        for each in sizes.values():
            each.add(clips, masked)
    return scan, sizes[scan.count_coordinates()].find_odd()


def _open_both(data_path: str | Path, label_path: str | Path | None) -> tuple[np.ndarray, Labels | None]:
    """The array and its labels; a DataError names what is wrong with both."""
    problems: list[Problem] = []
    array = labels = None
    try:
        array = open_array(data_path)
    except UserError as error:
        problems += error.problems
    try:
        labels = read_labels(label_path) if label_path else None
    except UserError as error:
        problems += error.problems
    if array is None or problems:
        raise DataError(*problems)
    return array, labels


def inspect_dataset(data_path: str | Path, label_path: str | Path | None = None) -> dict[str, Any]:
    """Describe an array (N, C, T, V, M) and its labels as plain data, ready for JSON.

    Lengths are in frames. A joint counts as missing where its person is in the frame but all its channels are
    zero; ranges are taken over the joints that are there, and so is `zero_scores`, the share of them whose score is 0
    (None without a channel that looks like a score). Faults that allow a description stand under
    `problems`; a file that cannot be read is a DataError. Reads the array once, in blocks, with flat memory.
    """
    array, labels = _open_both(data_path, label_path)
    layouts = find_layouts(array.shape[3])
    layout = get_layout(layouts[0]) if len(layouts) == 1 else None
    scan, odd = _scan_blocks(array, find_body(layout) if layout else None)
    used = scan.lengths[scan.lengths > 0]
    empty = np.flatnonzero(scan.lengths == 0)
    score_channel = find_score_channel(scan.lowest.tolist(), scan.highest.tolist())
    report: dict[str, Any] = {
        "data_path": str(data_path),
        "label_path": str(label_path) if label_path else None,
        "shape": dict(zip(AXIS_KEYS, array.shape, strict=True)),
        "dtype": str(array.dtype),
        "layouts": layouts,
        "classes": None if labels is None else _count_classes(labels),
        "lengths": {
            "min": int(used.min()) if len(used) else 0,
            "median": float(np.median(used)) if len(used) else 0.0,
            "max": int(used.max()) if len(used) else 0,
        },
        "people": np.bincount(scan.is_seen.sum(axis=1), minlength=array.shape[4] + 1).tolist(),
        "missing_joints": [float(share) for share in scan.missing / max(1, scan.present_frames)],
        "ranges": [
            {"min": float(low), "max": float(high)} if low <= high else None
            for low, high in zip(scan.lowest, scan.highest, strict=True)
        ],
        "score_channel": score_channel,
        "zero_scores": scan.unscored / max(1, scan.joints) if score_channel >= 0 else None,
        "nan": scan.non_finite.nan,
        "infinite": scan.non_finite.infinite,
        "empty_clips": empty.tolist(),
        "odd_first_frames": odd.tolist(),
    }
    report["joint_names"] = list(layout.joints) if layout else None
    report["problems"] = _find_problems(report, labels, scan, empty)
    return report


def _count_classes(labels: Labels) -> list[dict[str, Any]]:
    numbers, counts = np.unique(labels.labels, return_counts=True)
    names = labels.class_names
    return [
        {"label": int(number), "name": names[number] if names else None, "count": int(count)}
        for number, count in zip(numbers, counts, strict=True)
    ]


def _find_problems(report: dict[str, Any], labels: Labels | None, scan: _Scan, empty: np.ndarray) -> list[str]:
    problems = []
    num_clips = report["shape"]["clips"]
    if labels is not None and len(labels.labels) != num_clips:
        problems.append(f"{report['label_path']}: {len(labels.labels)} labels for {num_clips} clips.")
    if labels is not None and labels.labels.min() < 0:
        problems.append(f"{report['label_path']}: {int((labels.labels < 0).sum())} labels below 0.")
    non_finite = scan.non_finite.as_problem(report["data_path"])
    if non_finite is not None:
        problems.append(str(non_finite))
    if len(empty):
        problems.append(f"{report['data_path']}: {describe_empty_clips(empty)}.")
    odd = report["odd_first_frames"]
    if odd:
        problems.append(
            f"{report['data_path']}: in {len(odd)} {'clip' if len(odd) == 1 else 'clips'} a person is {ODD_FACTOR:g} "
            f"times smaller or larger in the first frame than on average: {list_some(odd)}. With input.scale=first "
            f"all frames of such a clip are scaled by that one."
        )
    if report["shape"]["channels"] > MOST_CHANNELS:
        problems += [
            str(problem)
            for problem in check_shape(tuple(report["shape"].values()), report["data_path"], num_channels=3)
        ]
    elif not report["layouts"]:
        problems.append(f"No known layout has {report['shape']['joints']} joints.")
    return problems


def format_report(report: dict[str, Any]) -> str:
    """The report of `inspect_dataset` as text for a terminal."""
    shape = report["shape"]
    lengths = report["lengths"]
    rows = [
        ("data", report["data_path"]),
        ("shape", " x ".join(f"{size} {axis}" for axis, size in shape.items()) + f", {report['dtype']}"),
        ("layouts", ", ".join(report["layouts"]) or f"none with {shape['joints']} joints"),
        ("clip length", f"{lengths['min']} to {lengths['max']} frames, median {lengths['median']:g}"),
        ("people", ", ".join(_describe_people(report["people"]))),
    ]
    for channel, limits in enumerate(report["ranges"][: MOST_CHANNELS + 1]):
        text = f"{limits['min']:.4g} to {limits['max']:.4g}" if limits else "all zeros"
        if channel == report["score_channel"]:
            text += f", like a score: if it is one, train with input.score_channel={channel}"
            if report["zero_scores"] > 0:
                text += (
                    f"; {report['zero_scores']:.1%} of the joints have a place and score 0: with "
                    "input.score_threshold=0.01 they count as missing"
                )
        rows.append((f"channel {channel}", text))
    if len(report["ranges"]) > MOST_CHANNELS + 1:
        rows.append(("...", f"{len(report['ranges']) - MOST_CHANNELS - 1} more channels"))
    rows.append(("NaN, infinite", f"{report['nan']}, {report['infinite']}"))
    lines = [f"{name:<14}{text}" for name, text in rows]
    if report["classes"] is not None:
        lines += ["", f"Clips per class ({report['label_path']})", *_draw_classes(report["classes"])]
    lines += ["", "Missing joints (share of the frames in which the person is there)"]
    lines += _draw_missing(report["missing_joints"], report["joint_names"])
    if report["problems"]:
        lines += ["", "Problems", *(f"  {problem}" for problem in report["problems"])]
    return "\n".join(lines)


def _describe_people(counts: list[int]) -> list[str]:
    return [
        f"{count} {'clip' if count == 1 else 'clips'} with {people}" for people, count in enumerate(counts) if count
    ]


def _draw_classes(classes: list[dict[str, Any]]) -> list[str]:
    titles = [f"{entry['label']} {entry['name']}" if entry["name"] else str(entry["label"]) for entry in classes]
    width = max(len(title) for title in titles)
    most = max(entry["count"] for entry in classes)
    total = sum(entry["count"] for entry in classes)
    lines = []
    for title, entry in zip(titles, classes, strict=True):
        bar = "#" * max(1, round(BAR_WIDTH * entry["count"] / most))
        lines.append(f"  {title:<{width}}  {entry['count']:>7}  {entry['count'] / total:>6.1%}  {bar}")
    return lines


def _draw_missing(shares: list[float], joint_names: list[str] | None) -> list[str]:
    titles = [f"{joint} {joint_names[joint]}" if joint_names else str(joint) for joint in range(len(shares))]
    width = max(len(title) for title in titles)
    lines = [
        f"  {title:<{width}}  {share:>6.1%}  {'#' * round(BAR_WIDTH * share)}".rstrip()
        for title, share in zip(titles, shares, strict=True)
        if share > 0
    ]
    return lines or ["  none"]
