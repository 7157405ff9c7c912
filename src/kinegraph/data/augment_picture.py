"""A picture of what each augmentation does to a clip: `kinegraph inspect DATA --augment -o FILE.png`.

Colours are those that people with any colour vision tell apart (Okabe and Ito 2008).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kinegraph.data import augment as changes
from kinegraph.data.arrays import cast_to_float32, open_array
from kinegraph.data.body import find_body
from kinegraph.data.counters import normal_from_counters, uniform_from_counters
from kinegraph.data.missing import MaskedClips, find_real
from kinegraph.data.normalise import apply_references, measure, take_first
from kinegraph.data.pipeline import look_for_score
from kinegraph.data.sampling import sample
from kinegraph.errors import DataError, Problem, UserError
from kinegraph.skeleton.layouts import Layout, find_layouts, get_layout
from kinegraph.spec_input import AugmentSpec, InputSpec
from kinegraph.storage import write_atomically

LEFT, RIGHT, MIDDLE, BEFORE = "#0072B2", "#D55E00", "#333333", "#bbbbbb"
CROSS: dict[str, Any] = {"marker": "x", "linestyle": "none", "color": BEFORE, "markersize": 7, "markeredgewidth": 2}
STRENGTHS: dict[str, float] = {
    "rotation_x": 25.0,
    "rotation_y": 50.0,
    "rotation_z": 25.0,
    "scale": 0.3,
    "shift": 0.3,
    "shear": 0.3,
    "noise": 0.05,
    "mirror": 1.0,
    "joint_drop": 0.25,
    "frame_drop": 0.4,
    "speed": 0.8,
    "time_warp": 3.0,
}
"""Option of `augment` -> the strength that is shown, strong enough to be seen."""
NEEDS_DEPTH = ("rotation_x", "rotation_y")
OVER_TIME = ("joint_drop", "frame_drop", "speed", "time_warp")
MOST_POSES, FEWEST_POSES = 9, 4
STRIP_SHAPE = 2.2
"""Width by height of a panel over time."""
COLUMNS = 8
SPANS = {True: 4, False: 2}
"""Columns of a panel, over time or not."""
HIGH_NAMES, LOW_NAMES = ("head", "nose", "neck", "shoulder"), ("ankle", "foot", "knee", "toe", "heel")


@dataclass(frozen=True)
class View:
    """How a skeleton is drawn: the vertical channel and its direction, and which bones are of which side."""

    layout: Layout
    vertical: int
    sign: float

    def project(self, joints: np.ndarray) -> np.ndarray:
        """(D, V) -> (2, V): x to the right, up upwards."""
        return np.stack([joints[0], self.sign * joints[self.vertical]])

    def find_color(self, child: int, parent: int) -> str:
        names = (self.layout.joints[child], self.layout.joints[parent])
        sides = {name.partition("_")[0] for name in names} & {"left", "right"}
        return {"left": LEFT, "right": RIGHT}[sides.pop()] if len(sides) == 1 else MIDDLE


def draw_augmentations(
    data_path: str | Path,
    picture: Path,
    layout_name: str | None = None,
    clip: int = 0,
    class_names: Sequence[str] = (),
) -> list[str]:
    """Write a PNG with a panel for each augmentation that the data can have; gives back their names.

    The clip is centred and scaled by its first frame, for the panels of a single frame by that one. Grey is the clip
    before, colours after, at the strength in the title. A last channel that looks like a score is not drawn.
    Raises DataError for data or a layout that do not fit, UserError for a picture that is there already or no PNG.
    """
    if picture.exists():
        raise UserError(Problem(str(picture), "a file that is there already", "a new file", "Choose another name."))
    if picture.suffix.lower() != ".png":
        raise UserError(Problem(str(picture), "another kind of file", "a file that ends in .png"))
    array = open_array(data_path)
    layout = _choose_layout(array.shape[3], layout_name, str(data_path))
    if not 0 <= clip < len(array):
        raise UserError(Problem("--clip", str(clip), f"a clip from 0 to {len(array) - 1}"))
    score = look_for_score(str(data_path))
    x = cast_to_float32(array[clip : clip + 1, : score if score > 0 else 3])
    clips = _prepare(x, layout)
    if clips is None:
        raise DataError(Problem(f"{data_path}, clip {clip}", "no joints", "a clip with a person", "Set --clip."))
    names = [name for name in STRENGTHS if name not in NEEDS_DEPTH or clips.data.shape[1] == 3]
    view = choose_view(clips, layout)
    title = f"{Path(data_path).name}, clip {clip}, layout {layout.name}"
    title += f"; channel {score} is taken for a score" if score > 0 else ""
    sided = changes.find_side_names(class_names)
    notes = {"mirror": f"off in training: {sided[0]} names a side"} if sided else {}
    _draw(picture, names, clips, view, title, notes)
    return names


def _choose_layout(num_joints: int, name: str | None, where: str) -> Layout:
    fitting = find_layouts(num_joints)
    if name is None and len(fitting) != 1:
        choices = " or ".join(fitting) or "a YAML file that describes them"
        raise UserError(
            Problem(where, f"{num_joints} joints", "one layout with so many", f"Set --layout to {choices}.")
        )
    layout = get_layout(name or fitting[0], "--layout")
    if layout.num_joints != num_joints:
        hint = f"Layouts with {num_joints} joints: {', '.join(fitting) or 'none'}."
        raise DataError(Problem(where, f"{num_joints} joints", f"{layout.num_joints}, as {layout.name} has", hint))
    return layout


def _prepare(x: np.ndarray, layout: Layout) -> MaskedClips | None:
    """The person of (1, C, T, V, M) who is there longest, without the empty end; normalised."""
    num_coordinates = x.shape[1]
    is_relative = not x[:, :, :, layout.centre].any()  # to the centre, most likely, or it was never seen
    clips = find_real(x, num_coordinates, origin_joint=layout.centre if is_relative else -1)
    person = int(clips.is_real.any(axis=2).sum(axis=1)[0].argmax())
    clips = MaskedClips(clips.data[..., [person]], clips.is_real[..., [person]])
    length = int(clips.find_lengths()[0])
    if length == 0:
        return None
    clips = MaskedClips(clips.data[:, :, :length], clips.is_real[:, :length])
    return _normalise(clips, layout)


def _normalise(clips: MaskedClips, layout: Layout) -> MaskedClips:
    body, num_coordinates = find_body(layout), clips.data.shape[1]
    options = InputSpec(centre="first", scale="first", scale_by="trunk" if body.trunk[0] else "bones")
    first = measure(take_first(clips, options), num_coordinates, options, body)
    return apply_references(clips, num_coordinates, options, first, None)


def choose_view(clips: MaskedClips, layout: Layout) -> View:
    """The vertical is the channel along which head and feet are farthest apart; the head goes up."""
    frame = _find_frame(clips)
    is_real, joints = clips.is_real[0, frame, :, 0], clips.data[0, :, frame, :, 0]

    def average(words: tuple[str, ...]) -> np.ndarray | None:
        chosen = [v for v, name in enumerate(layout.joints) if is_real[v] and any(word in name for word in words)]
        return joints[:, chosen].mean(axis=1) if chosen else None

    high, low = average(HIGH_NAMES), average(LOW_NAMES)
    if high is None or low is None or len(joints) < 2:
        return View(layout, min(1, len(joints) - 1), 1.0)
    upwards = high - low
    vertical = 1 + int(np.abs(upwards[1:]).argmax())
    return View(layout, vertical, 1.0 if upwards[vertical] > 0 else -1.0)


def _find_frame(clips: MaskedClips) -> int:
    """A frame in the middle with as many joints as any."""
    counts = clips.is_real[0, :, :, 0].sum(axis=1)
    best = np.flatnonzero(counts == counts.max())
    return int(best[len(best) // 2])


def _take_frame(clips: MaskedClips, layout: Layout) -> MaskedClips:
    """One frame as a clip, centred and scaled by itself: changes turn and stretch a person around the centre."""
    frame = _find_frame(clips)
    one = MaskedClips(clips.data[:, :, [frame]], clips.is_real[:, [frame]])
    return _normalise(one, layout)


def _change(name: str, clips: MaskedClips, layout: Layout) -> MaskedClips:
    """One augmentation at its strength."""
    strength: dict[str, Any] = {name: STRENGTHS[name]}
    options = AugmentSpec(**strength)
    data, size = clips.data, clips.data.shape[1]
    index = np.zeros(1, np.int64)
    if name == "joint_drop":
        draws = uniform_from_counters(3, 0, index, changes.DROP_DRAWS * data.shape[3], 1)
        return _lose(clips, changes.drop_joints(data, options.joint_drop, draws))
    if name == "frame_drop":
        draws = uniform_from_counters(2, 0, index, data.shape[2], 1)
        return _lose(clips, changes.drop_frames(data, options.frame_drop, draws))
    if name in ("speed", "time_warp"):
        # The largest amounts: as fast, and as fast at the beginning and slow at the end, as it gets
        draws = np.r_[1.0, np.linspace(1, 0, changes.TIME_DRAWS - 1)][None]
        return sample(clips, InputSpec(), changes.draw_time(options, np.zeros((1, 1)), draws))
    if name == "noise":
        return changes.add_noise(clips, options.noise, normal_from_counters(1, 0, index, data[0].size, 1, data))
    # Scale and shear look like what they are if the axes differ
    draws = np.ones((1, changes.AFFINE_DRAWS))
    draws[0, 4], draws[0, 15] = 0.0, 0.0
    draws[0, 10:15] = 0.5
    moved = changes.move(clips, *changes.make_affine(options, size, draws), is_centred=True)
    return changes.mirror(moved, changes.find_mirrored(options, draws), layout.symmetric)


def _lose(clips: MaskedClips, data: np.ndarray) -> MaskedClips:
    is_lost = (data != clips.data).any(axis=1)
    is_frame = (data != 0).any(axis=(1, 3))[:, :, None]  # the centre is at zero, lost or not
    return MaskedClips(data, clips.is_real & ~is_lost & is_frame)


def _draw(picture: Path, names: list[str], clips: MaskedClips, view: View, title: str, notes: dict[str, str]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    panels = sorted(names, key=lambda name: name in OVER_TIME)
    num_still = sum(name not in OVER_TIME for name in panels)
    still_rows = math.ceil(num_still * SPANS[False] / COLUMNS)
    rows = still_rows + math.ceil((len(panels) - num_still) * SPANS[True] / COLUMNS)
    figure = Figure(figsize=(13.6, 3.7 * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12, color=MIDDLE, parse_math=False)
    grid = figure.add_gridspec(rows, COLUMNS)
    still = _take_frame(clips, view.layout)
    for place, name in enumerate(panels):
        is_over_time = name in OVER_TIME
        first_row, place = (still_rows, place - num_still) if is_over_time else (0, place)
        row, column = divmod(place * SPANS[is_over_time], COLUMNS)
        axes = figure.add_subplot(grid[first_row + row, column : column + SPANS[is_over_time]])
        axes.axis("off")
        axes.set_aspect("equal", anchor="N")
        unit = "°" if name.startswith("rotation") else ""
        note = f"\n{notes[name]}" if name in notes else ""
        axes.set_title(f"{name} {STRENGTHS[name]:g}{unit}{note}", fontsize=11, color=MIDDLE, parse_math=False)
        if is_over_time:
            _draw_strips(axes, clips, _change(name, clips, view.layout), view)
        else:
            _draw_pose(axes, still, 0, view, is_before=True)
            _draw_pose(axes, _change(name, still, view.layout), 0, view)
    legend = [("before", BEFORE), ("left side", LEFT), ("right side", RIGHT), ("middle", MIDDLE)]
    handles = [Line2D([], [], color=color, linewidth=3, label=label) for label, color in legend]
    handles.append(Line2D([], [], **CROSS, label="nobody: a lost frame, or the clip is over"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=10)
    with write_atomically(picture) as file:
        figure.savefig(file, format="png", dpi=110)


def _draw_strips(axes: Any, before: MaskedClips, after: MaskedClips, view: View) -> None:
    """The same moments of both, side by side: above as it was, below as it is now. Everybody stays in place."""
    last = before.data.shape[2] - 1
    every = np.unique(np.linspace(0, last, MOST_POSES).astype(int))
    boxes = [_find_box(each, frame, view) for each in (before, after) for frame in every]
    height = 1.25 * max(box[3] for box in boxes)
    width = max(1.25 * max(box[2] for box in boxes), 0.45 * height)
    fitting = int(STRIP_SHAPE * 2 * height / max(width, 1e-9))
    frames = np.unique(np.linspace(0, last, min(max(fitting, FEWEST_POSES), MOST_POSES)).astype(int))
    for place, frame in enumerate(frames):
        for row, clips in enumerate((before, after)):
            x, y, *_ = _find_box(clips, frame, view)
            corner = (place * width, -row * height)
            _draw_pose(axes, clips, frame, view, (corner[0] - x, corner[1] - y), is_before=row == 0, size=0.6)
        if not after.is_real[0, frame].any():
            axes.plot(place * width, -height, **CROSS)


def _find_box(clips: MaskedClips, frame: int, view: View) -> tuple[float, float, float, float]:
    """The middle of the real joints of a frame, and how wide and high they are; zeros where there are none."""
    is_real = clips.is_real[0, frame, :, 0]
    if not is_real.any():
        return 0.0, 0.0, 0.0, 0.0
    x, y = view.project(clips.data[0, :, frame, :, 0])[:, is_real]
    return float(x.min() + x.max()) / 2, float(y.min() + y.max()) / 2, float(np.ptp(x)), float(np.ptp(y))


def _draw_pose(
    axes: Any,
    clips: MaskedClips,
    frame: int,
    view: View,
    offset: tuple[float, float] = (0.0, 0.0),
    is_before: bool = False,
    size: float = 1.0,
) -> None:
    """Bones and joints of one frame that are real."""
    is_real = clips.is_real[0, frame, :, 0]
    x, y = view.project(clips.data[0, :, frame, :, 0])
    x, y = x + offset[0], y + offset[1]
    width = size * (3.0 if is_before else 2.0)
    for child, parent in view.layout.bones:
        if is_real[child] and is_real[parent]:
            color = BEFORE if is_before else view.find_color(child, parent)
            ends = [child, parent]
            axes.plot(
                x[ends], y[ends], color=color, linewidth=width, solid_capstyle="round", zorder=1 + (not is_before)
            )
    color = BEFORE if is_before else MIDDLE
    axes.scatter(x[is_real], y[is_real], s=size**2 * (9 if is_before else 7), color=color, zorder=2 + (not is_before))
