"""The picture of an explanation: skeletons, the map of joints and frames, and its sums.

Orange speaks for the class, blue against it: colours that people with any colour vision tell apart (Okabe and Ito
2008). The columns of all panels are the same frames, the rows of map and bars the same joints.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kinegraph.data.augment_picture import View, choose_view
from kinegraph.data.missing import MaskedClips
from kinegraph.skeleton.layouts import Layout
from kinegraph.storage import write_atomically

AGAINST, NEUTRAL, FOR = "#0072B2", "#f4f4f4", "#D55E00"
BONE, TEXT = "#b5b5b5", "#333333"
NUMBERS_OF_POSES = (8, 6, 4)
"""The first with which the people are as high as their row lets them be, or nearly; else the last."""
LEFT_IN, MAP_IN, GAP_IN, BARS_IN, RIGHT_IN = 1.75, 9.2, 0.2, 2.0, 0.35
TITLE_IN, POSES_IN, CURVE_IN, BOTTOM_IN = 0.75, 2.3, 0.95, 0.85
ROW_IN, MIN_ROWS = 0.19, 4
NOTHING = 1e-12
PERCENTILE = 99.0
"""Of the contributions, at full colour: a single cell would leave the others pale."""


@dataclass(frozen=True, eq=False)
class ExplainedClip:
    """clips (1, D, T, V, M) in coordinates of the file, contributions (M, T', V or 1), frames (T',) of the file."""

    title: str
    clips: MaskedClips
    layout: Layout
    contributions: NDArray[np.float64]
    frames: NDArray[np.float64]
    score: float
    bias: float


@dataclass(frozen=True, eq=False)
class _Cells:
    """Contributions that are drawn: values (M, F, V or 1) at different frames (F,) of the file, from edges (F + 1,)."""

    values: NDArray[np.float64]
    frames: NDArray[np.float64]
    edges: NDArray[np.float64]
    behind: float
    limit: float


def draw_explanation(path: Path, clip: ExplainedClip) -> None:
    """Write a PNG: skeletons on top, below them the sum of each frame, the map, and the sum of each joint."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cells = _gather_cells(clip)
    num_rows = max(MIN_ROWS, cells.values.shape[2])
    heights = (BOTTOM_IN, ROW_IN * num_rows, CURVE_IN, POSES_IN, TITLE_IN)
    width, height = LEFT_IN + MAP_IN + GAP_IN + BARS_IN + RIGHT_IN, sum(heights) + 2 * GAP_IN
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)

    def add(left: float, bottom: float, wide: float, high: float) -> Any:
        axes = figure.add_axes((left / width, bottom / height, wide / width, high / height))
        axes.tick_params(labelsize=8, colors=TEXT, length=2)
        axes.spines[["top", "right"]].set_visible(False)
        return axes

    map_axes = add(LEFT_IN, heights[0], MAP_IN, heights[1])
    curve = add(LEFT_IN, sum(heights[:2]) + GAP_IN, MAP_IN, heights[2])
    poses = add(LEFT_IN, sum(heights[:3]) + 2 * GAP_IN, MAP_IN, heights[3])
    bars = add(LEFT_IN + MAP_IN + GAP_IN, heights[0], BARS_IN, heights[1])
    colors = _make_colors(cells.limit)
    _draw_map(map_axes, clip, cells, colors)
    _draw_curve(curve, cells)
    _draw_poses(poses, clip, cells, colors)
    _draw_bars(bars, cells)
    _write_texts(figure, clip, cells, (width, height), colors)
    with warnings.catch_warnings(), write_atomically(path) as file:
        warnings.filterwarnings("ignore", message="Glyph")  # names of clips in a script that the font lacks
        figure.savefig(file, format="png", dpi=110)


def _gather_cells(clip: ExplainedClip) -> _Cells:
    """Cells behind the end are left out, and those at the same frame (of a short clip) added."""
    is_inside = ~np.isnan(clip.frames)
    behind = float(clip.contributions[:, ~is_inside].sum())
    frames, places = np.unique(clip.frames[is_inside], return_inverse=True)
    if len(frames) == 0:
        frames = np.zeros(1)
    values = np.zeros((len(clip.contributions), len(frames), clip.contributions.shape[2]))
    for place, cell in zip(places, np.flatnonzero(is_inside), strict=True):
        values[:, place] += clip.contributions[:, cell]
    middles = (frames[1:] + frames[:-1]) / 2
    reach = (middles[0] - frames[0], frames[-1] - middles[-1]) if len(frames) > 1 else (0.5, 0.5)
    ends = (frames[:1] - reach[0], frames[-1:] + reach[1])
    edges = np.concatenate([ends[0], middles, ends[1]])
    edges = np.clip(edges, -0.5, clip.clips.data.shape[2] - 0.5)
    limit = float(np.percentile(np.abs(values.sum(axis=0)), PERCENTILE))
    return _Cells(values, frames, edges, behind, max(limit, NOTHING))


def _make_colors(limit: float) -> Any:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    return ScalarMappable(
        Normalize(-limit, limit), LinearSegmentedColormap.from_list("for_and_against", [AGAINST, NEUTRAL, FOR])
    )


def _draw_map(axes: Any, clip: ExplainedClip, cells: _Cells, colors: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    values = cells.values.sum(axis=0).T  # (V, F)
    has_joints = len(values) == clip.layout.num_joints
    names = [name.replace("_", " ") for name in clip.layout.joints] if has_joints else ["all joints"]
    rows = np.arange(len(values) + 1) - 0.5
    axes.pcolormesh(cells.edges, rows, values, cmap=colors.cmap, norm=colors.norm)
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.set_yticks(range(len(names)), names, fontsize=8, parse_math=False)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    axes.set_xlabel("frame of the clip", fontsize=9, color=TEXT)
    axes.set_xlim(cells.edges[0], cells.edges[-1])


def _draw_curve(axes: Any, cells: _Cells) -> None:
    totals = cells.values.sum(axis=(0, 2))
    shades = np.where(totals >= 0, FOR, AGAINST).tolist()
    axes.bar(
        cells.edges[:-1], totals, np.diff(cells.edges), align="edge", color=shades, edgecolor="white", linewidth=0.6
    )
    people = np.flatnonzero(cells.values.any(axis=(1, 2)))
    if len(people) > 1:
        for line, person in zip(("-", "--", ":", "-."), people, strict=False):
            sums = cells.values[person].sum(axis=1)
            axes.plot(cells.frames, sums, line, color=TEXT, linewidth=1.0, label=f"person {person + 1}")
        axes.legend(fontsize=7, frameon=False, loc="best", ncols=4)
    axes.axhline(0, color=TEXT, linewidth=0.6)
    axes.set_xlim(cells.edges[0], cells.edges[-1])
    axes.tick_params(bottom=False, labelbottom=False)
    axes.spines["bottom"].set_visible(False)
    axes.set_ylabel("sum of\nthe frame", fontsize=8, color=TEXT)


def _draw_bars(axes: Any, cells: _Cells) -> None:
    from matplotlib.ticker import MaxNLocator

    sums = cells.values.sum(axis=(0, 1))
    axes.barh(range(len(sums)), sums, color=np.where(sums >= 0, FOR, AGAINST).tolist(), height=0.75)
    axes.axvline(0, color=TEXT, linewidth=0.6)
    axes.set_ylim(len(sums) - 0.5, -0.5)
    axes.set_yticks([])
    axes.xaxis.set_major_locator(MaxNLocator(3))
    axes.spines["left"].set_visible(False)
    label = "sum of the joint" if len(sums) > 1 else "sum"
    are_several = cells.values.any(axis=(1, 2)).sum() > 1
    axes.set_xlabel(f"{label}, all people" if are_several else label, fontsize=9, color=TEXT)


def _draw_poses(axes: Any, clip: ExplainedClip, cells: _Cells, colors: Any) -> None:
    """The people at evenly spread moments, each above its part of the map."""
    axes.axis("off")
    axes.set_aspect("equal")
    axes.set_xlim(0, MAP_IN)
    axes.set_ylim(0, POSES_IN)
    person = int(clip.clips.is_real[0].any(axis=1).sum(axis=0).argmax())
    one = MaskedClips(clip.clips.data[..., [person]], clip.clips.is_real[..., [person]])
    view = choose_view(one, clip.layout)
    start, end = cells.edges[0], cells.edges[-1]
    if not clip.clips.is_real.any():
        axes.text(MAP_IN / 2, POSES_IN / 2, "nobody is in this clip", fontsize=11, color=TEXT, ha="center", va="center")
        return
    for most in NUMBERS_OF_POSES:
        count = min(most, max(1, round(end - start)))  # each frame once
        width = MAP_IN / count
        moments = start + (np.arange(count) + 0.5) * (end - start) / count
        frames = np.clip(np.round(moments), 0, clip.clips.data.shape[2] - 1).astype(int)
        points, is_real = _project(clip.clips, frames, view)  # (2, poses, V, M), (poses, V, M)
        if not is_real.any():
            return
        scale, lowest, is_high = _fit(points, is_real, 0.92 * width, 0.8 * POSES_IN)
        if is_high:
            break
    are_several = is_real.any(axis=(0, 1)).sum() > 1
    size = float(np.clip(scale * np.ptp(points[1][is_real]) / (0.8 * POSES_IN), 0.3, 1.0))
    for i, frame in enumerate(frames):
        if not is_real[i].any():
            continue
        middle = _find_middle(points[0, i][is_real[i]])
        x = (i + 0.5) * width + scale * (points[0, i] - middle)
        y = 0.06 * POSES_IN + scale * (points[1, i] - lowest)
        cell = int(np.abs(cells.frames - moments[i]).argmin())
        for m in np.flatnonzero(is_real[i].any(axis=0)):
            values = cells.values[m, cell]
            if len(values) != clip.layout.num_joints:  # a map without joints: none of them says anything
                values = np.zeros(clip.layout.num_joints)
            _draw_pose(axes, (x[:, m], y[:, m]), is_real[i, :, m], values, clip.layout, colors, size)
            if are_several:
                top = np.flatnonzero(is_real[i, :, m])[y[is_real[i, :, m], m].argmax()]
                place = {"xytext": (0, 3 + 3 * size), "textcoords": "offset points", "ha": "center", "fontsize": 7}
                axes.annotate(str(m + 1), (x[top, m], y[top, m]), color=TEXT, zorder=3, **place)
        axes.text((i + 0.5) * width, POSES_IN, f"frame {frame}", fontsize=8, color=TEXT, ha="center", va="top")


def _project(clips: MaskedClips, frames: NDArray[np.int64], view: View) -> tuple[NDArray[Any], NDArray[Any]]:
    data = clips.data[0, :, frames].transpose(1, 0, 2, 3)  # the index in front: (poses, D, V, M) -> (D, poses, V, M)
    flat = data.reshape(len(data), -1)
    if len(flat) == 1:
        flat = np.concatenate([flat, 0 * flat])
    return view.project(flat).reshape(2, *data.shape[1:]), clips.is_real[0, frames]


def _fit(points: NDArray[Any], is_real: NDArray[Any], width: float, height: float) -> tuple[float, float, bool]:
    """(scale, lowest point, whether they fill the height): the same for all poses, so that a jump is a jump."""
    wide = max(np.ptp(x[real]) for x, real in zip(points[0], is_real, strict=True) if real.any())
    heights = points[1][is_real]
    high = np.ptp(heights)
    by_width, by_height = width / max(wide, 1e-9), height / max(high, 1e-9)
    return float(min(by_width, by_height)), float(heights.min()), bool(by_width > 0.8 * by_height)


def _find_middle(x: NDArray[Any]) -> float:
    return float(x.min() + x.max()) / 2


def _draw_pose(
    axes: Any,
    places: tuple[NDArray[Any], NDArray[Any]],
    is_real: NDArray[np.bool_],
    values: NDArray[np.float64],
    layout: Layout,
    colors: Any,
    size: float,
) -> None:
    x, y = places
    for child, parent in layout.bones:
        if is_real[child] and is_real[parent]:
            ends = [child, parent]
            axes.plot(x[ends], y[ends], color=BONE, linewidth=1.6 * size, solid_capstyle="round", zorder=1)
    sizes = size * (14 + 60 * np.clip(np.abs(values) / colors.norm.vmax, 0, 1))
    order = np.argsort(np.abs(values), kind="stable")
    order = order[is_real[order]]
    shades = colors.to_rgba(values[order])
    axes.scatter(x[order], y[order], s=sizes[order], color=shades, edgecolor="#777777", linewidth=0.5, zorder=2)


def _write_texts(figure: Any, clip: ExplainedClip, cells: _Cells, size: tuple[float, float], colors: Any) -> None:
    width, height = size
    left, top = LEFT_IN / width, 1 - 0.18 / height
    figure.text(left, top, clip.title, fontsize=13, color=TEXT, va="top", parse_math=False)
    inside = float(cells.values.sum())
    parts = f"logit {clip.score:.2f} = bias {clip.bias:+.2f}, frames of the clip {inside:+.2f}"
    if cells.behind:
        parts += f", frames behind its end {cells.behind:+.2f}"
    figure.text(left, top - 0.29 / height, parts, fontsize=9.5, color=TEXT, va="top")
    if cells.limit == NOTHING:
        return  # no colour to explain
    place = ((LEFT_IN + MAP_IN + GAP_IN) / width, 1 - 0.62 / height, BARS_IN / width, 0.1 / height)
    bar = figure.colorbar(colors, cax=figure.add_axes(place), orientation="horizontal", extend="both")
    number = f"{cells.limit:.2g}"
    labels = [f"-{number}\nagainst", "0", f"+{number}\nfor the class"]
    bar.set_ticks([-cells.limit, 0, cells.limit], labels=labels)
    bar.ax.tick_params(labelsize=8, colors=TEXT, length=2)
    bar.outline.set_visible(False)
