"""Latency and throughput of a report as a picture.

A backend keeps its colour in all panels; the colours are those that people with any colour vision tell apart (Okabe and
Ito 2008). Full bars and lines are the largest thread count, pale and dashed ones the others.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from kinegraph.benchmark.table import describe_head, format_number
from kinegraph.storage import write_atomically

COLORS = {
    "torch": "#D55E00",
    "onnxruntime": "#0072B2",
    "openvino": "#009E73",
    "tensorrt": "#E69F00",
    "native": "#CC79A7",
    "step by step": "#56B4E9",
}
GREY = "#767676"
PALE = 0.4
BAR_HEIGHT, GAP = 0.8, 0.6
REACH = 2.0
"""Of the axis of latencies, in longest bars."""

Row = dict[str, Any]


def plot_report(path: Path, report: dict[str, Any]) -> None:
    """Write a PNG, whatever was measured. Raises StorageError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in report["measurements"] if row["latency_ms"]]
    steps = [row for row in report["steps"] if row["latency_ms"]]
    batches = sorted({row["batch"] for row in rows})
    first = [row for row in rows if row["batch"] == batches[0]]
    panels = [bool(rows), len(batches) > 1, bool(steps)]
    widths = [width for width, is_shown in zip((1.25, 1.0, 0.9), panels, strict=True) if is_shown] or [1.0]
    height = max(3.8, 1.7 + 0.36 * max(len(first), len(steps)))
    figure = Figure(figsize=(1.0 + 4.6 * sum(widths), height), layout="constrained")
    FigureCanvasAgg(figure)
    areas = list(figure.subplots(1, len(widths), squeeze=False, gridspec_kw={"width_ratios": widths})[0])
    if not rows and not steps:
        areas[0].axis("off")
        areas[0].text(0.5, 0.5, "Nothing was measured.", ha="center", va="center", color=GREY)
    if rows:
        batch = batches[0]
        _draw_bars(areas.pop(0), first, f"Latency of {'one clip' if batch == 1 else f'{batch} clips'}", "ms", "p50")
    if len(batches) > 1:
        _draw_throughput(areas.pop(0), rows, batches)
    if steps:
        _draw_bars(areas.pop(0), steps, "Frame by frame", "ms per frame", "mean")
    figure.suptitle("\n".join(_describe(report)), fontsize=10, parse_math=False)
    with warnings.catch_warnings(), write_atomically(path) as file:
        warnings.filterwarnings("ignore", message="Glyph")  # of a name in a script that the font lacks
        figure.savefig(file, format="png", dpi=130)


def _describe(report: dict[str, Any]) -> list[str]:
    """The head of the report with the name of the file instead of its path."""
    path = report["model"]["path"]
    model, machine, *_ = describe_head(report)
    return [Path(path).name + model.removeprefix(path), machine]


def _draw_bars(axes: Any, rows: Sequence[Row], title: str, unit: str, bar: str) -> None:
    """`bar` (p50 or mean) of each row, a line from there to p99; the fastest first within each thread count (or number
    of people). A p99 that would leave no place for the rest ends in an arrow.
    """
    most = max(row["threads"] for row in rows)
    values = [row["latency_ms"] for row in rows]
    limit = min(max(value["p99"] for value in values), REACH * max(value[bar] for value in values))
    place, ticks = 0.0, []
    groups: dict[int, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["people"] if "people" in row else row["threads"], []).append(row)
    for _, group in sorted(groups.items()):
        for row in sorted(group, key=lambda row: row["latency_ms"][bar]):
            latency, name = row["latency_ms"], row.get("backend", "step by step")
            alpha = 1.0 if row["threads"] == most else PALE
            axes.barh(place, latency[bar], BAR_HEIGHT, color=COLORS.get(name, GREY), alpha=alpha)
            end = min(latency["p99"], limit)
            axes.plot([latency[bar], end], [place, place], color="black", linewidth=1)
            axes.plot([end], [place], color="black", marker="|" if end == latency["p99"] else ">", markersize=6)
            text, at = f"{format_number(latency[bar])}, p99 {format_number(latency['p99'])}", max(end, latency[bar])
            axes.annotate(text, (at, place), (6, 0), textcoords="offset points", va="center", fontsize=8.5)
            ticks.append((place, _name_bar(row, name)))
            place += 1
        place += GAP
    axes.set_yticks([tick for tick, _ in ticks], [label for _, label in ticks], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.45 * max(limit, *(value[bar] for value in values)))
    axes.set_xlabel(f"{unit}: {'median' if bar == 'p50' else bar}, line to p99")
    _finish(axes, title, "x")


def _name_bar(row: Row, name: str) -> str:
    threads = f"{row['threads']} thread{'s' if row['threads'] > 1 else ''}"
    if "people" in row:
        return f"{row['people']} {'people' if row['people'] > 1 else 'person'}, {threads}"
    return f"{name}, {threads}"


def _draw_throughput(axes: Any, rows: Sequence[Row], batches: Sequence[int]) -> None:
    """Clips per second over the batch size, a line for each backend and thread count."""
    most = max(row["threads"] for row in rows)
    lines: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        lines.setdefault((row["backend"], row["threads"]), []).append(row)
    for (backend, threads), points in lines.items():
        style: dict[str, Any] = {"linestyle": "-", "linewidth": 2.0}
        if threads != most:
            style = {"linestyle": "--", "linewidth": 1.3}
        axes.plot(
            [row["batch"] for row in points],
            [row["clips_per_s"] for row in points],
            color=COLORS.get(backend, GREY),
            marker="o",
            markersize=4,
            **style,
        )
    backends = dict.fromkeys(row["backend"] for row in rows)
    fewer = sorted({row["threads"] for row in rows} - {most})
    handles = [_make_handle(name, COLORS.get(name, GREY), "-") for name in backends]
    if fewer:
        names = ", ".join(map(str, fewer)) + (" thread" if fewer == [1] else " threads")
        handles += [_make_handle(f"{most} threads", GREY, "-"), _make_handle(names, GREY, "--")]
    axes.legend(handles=handles, frameon=False, fontsize=8.5, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)
    axes.set_xscale("log")
    axes.minorticks_off()
    axes.set_xticks(list(batches), [str(batch) for batch in batches])
    axes.set_ylim(0, 1.08 * max(row["clips_per_s"] for row in rows))
    axes.set_xlabel("batch size")
    axes.set_ylabel("clips per second")
    _finish(axes, "Throughput", "both")


def _make_handle(label: str, color: str, style: Literal["-", "--"]) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=color, linestyle=style, linewidth=2, label=label)


def _finish(axes: Any, title: str, grid: str) -> None:
    axes.set_title(title, fontsize=11, loc="left", fontweight="bold")
    axes.grid(True, axis=grid, color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
