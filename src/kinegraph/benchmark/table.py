"""A report on the terminal, and its progress."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from kinegraph.run import format_duration

LINE_INTERVAL_S, TERMINAL_INTERVAL_S = 10.0, 0.1
BAR_WIDTH = 24
PLAIN_WIDTH = 140
"""Columns where the output is no terminal."""
FEW_CALLS = 100
BUSY_SHARE = 0.5


class Progress:
    """A bar at a terminal, else a line now and then through `say`."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.shown_s = time.monotonic()
        self.is_terminal = sys.stderr.isatty()

    def __call__(self, what: str, share: float | None, left_s: float | None) -> None:
        now_s = time.monotonic()
        if now_s - self.shown_s < (TERMINAL_INTERVAL_S if self.is_terminal else LINE_INTERVAL_S):
            return
        self.shown_s = now_s
        text = what if share is None else f"{what}: {share:.0%}"
        text += "" if left_s is None else f", {format_duration(left_s)} left"
        if not self.is_terminal:
            self.say(text)
            return
        filled = round(BAR_WIDTH * (share or 0.0))
        bar = "█" * filled + "·" * (BAR_WIDTH - filled)
        print(f"\r\x1b[K{bar} {text}", end="\r", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Remove the bar."""
        if self.is_terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def print_report(report: dict[str, Any]) -> None:
    """Tables on stdout."""
    from rich.console import Console
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    for line in describe_head(report):
        console.print(Text(line))
    parts = [
        (None, build_clip_table(report, console.width)),
        ("Frame by frame (kinegraph.online)", build_step_table(report)),
        ("Not measured", build_missing_table(report)),
    ]
    for title, table in parts:
        if table is not None:
            console.print(Text("" if title is None else f"\n{title}", style="bold"))
            console.print(table)
    for line in list_notes(report):
        console.print(Text(line, style="dim"))


def describe_head(report: dict[str, Any]) -> list[str]:
    """What was measured where."""
    model, machine = report["model"], report["machine"]
    clip = model["clip"]
    work = model["multiply_adds_per_clip"]
    facts = [
        " ".join(filter(None, [model["type"], model["layout"]])),
        f"{format_bytes(model['file_bytes'])} file",
        f"{format_count(model['parameters'])} parameters",
        f"clips of {clip['frames']} frames x {clip['joints']} joints x {clip['channels']} channels"
        + (f" x {clip['people']} people" if clip["people"] > 1 else ""),
        "" if work is None else f"{format_count(work)} multiply-adds a clip",
    ]
    extensions = f" ({', '.join(machine['extensions'])})" if machine["extensions"] else ""
    peaks = [
        f"{peak['gflops']:.4g} GFLOP/s with {_count_threads(peak['threads'])}"
        for peak in report["peaks"]
        if peak["gflops"]
    ]
    return [
        f"{model['path']}: {', '.join(filter(None, facts))}",
        f"{machine['cpu']}, {machine['usable_cores']} cores{extensions}",
        *([f"matrix product: {', '.join(peaks)}"] if peaks else []),
    ]


def build_clip_table(report: dict[str, Any], width: int = PLAIN_WIDTH) -> Any:
    """Measured configurations, the fastest of each thread count and batch size in bold; None if there are none.

    Columns that a narrow terminal has no place for are left out.
    """
    rows = [row for row in report["measurements"] if row["latency_ms"]]
    if not rows:
        return None
    has_data = any(row["pipeline_share"] is not None for row in rows)
    columns = [name for name, (least, _) in CLIP_COLUMNS.items() if width >= least and (has_data or name != "input")]
    table = _make_table(["backend"], columns)
    best: dict[tuple[int, int], float] = {}
    for row in rows:
        group = row["threads"], row["batch"]
        best[group] = max(best.get(group, 0.0), row["clips_per_s"])
    before = None
    for row in sorted(rows, key=lambda row: (row["threads"], row["batch"])):
        group = row["threads"], row["batch"]
        if before not in (None, group):
            table.add_section()
        before = group
        cells = [row["backend"], *(CLIP_COLUMNS[name][1](row) for name in columns)]
        _add_row(table, cells, row["clips_per_s"] == best[group])
    return table


def build_step_table(report: dict[str, Any]) -> Any:
    """Steps of one frame; None if there are none."""
    rows = [row for row in report["steps"] if row["latency_ms"]]
    if not rows:
        return None
    names = ["threads", "people", "mean ms", "p50 ms", "p99 ms", "frames/s", "memory", "delay frames", "calls"]
    table = _make_table([], names)
    for row in rows:
        latency = row["latency_ms"]
        cells = [
            str(row["threads"]),
            str(row["people"]),
            *(format_number(latency[name]) for name in ("mean", "p50", "p99")),
            format_number(row["frames_per_s"]),
            format_bytes(row["memory_bytes"]),
            str(row["delay_frames"]),
            str(row["calls"]),
        ]
        _add_row(table, cells, False)
    return table


def build_missing_table(report: dict[str, Any]) -> Any:
    """Who was not measured, and why; those with one reason in one line. None if all were."""
    groups: dict[tuple[str, str], list[str]] = {}
    for row in [*report["measurements"], *report["steps"]]:
        if row["latency_ms"]:
            continue
        size = f"batch {row['batch']}" if "batch" in row else f"{row['people']} people"
        reason = row["reason"] or ("interrupted" if report["interrupted"] else row["status"])
        name = row.get("backend", "step by step")
        groups.setdefault((name, reason), []).append(f"{_count_threads(row['threads'])}, {size}")
    if not groups:
        return None
    totals: dict[str, int] = {}
    for row in report["measurements"]:
        totals[row["backend"]] = totals.get(row["backend"], 0) + 1
    totals["step by step"] = len(report["steps"])
    table = _make_table(["backend", "configurations", "reason"], [])
    for (name, reason), places in groups.items():
        _add_row(table, [name, "all" if len(places) == totals[name] else "; ".join(places), reason], False)
    return table


def list_notes(report: dict[str, Any]) -> list[str]:
    """What a reader should know about these numbers."""
    notes = []
    rows = [row for row in [*report["measurements"], *report["steps"]] if row["latency_ms"]]
    if any(row["calls"] < FEW_CALLS for row in rows):
        notes.append(
            f"p99 of fewer than {FEW_CALLS} calls is close to the slowest of them; --seconds gives more calls."
        )
    if any((row.get("share_of_peak") or 0.0) > 1 for row in rows):
        notes.append(
            "More than 100 % of the peak: the multiply-adds are those of the network as it is defined; "
            "a backend may need fewer, or compute in 8 bits."
        )
    machine = report["machine"]
    load = machine["load_average"]
    if load is not None and load > BUSY_SHARE * machine["usable_cores"]:
        notes.append(f"Other programs were running (load average {load:.1f}): a quiet machine gives better numbers.")
    if report["interrupted"]:
        notes.append("Interrupted: what was measured until then.")
    return notes


def format_number(value: float | None) -> str:
    """Three digits: 0.0123, 1.23, 123, 12346."""
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def format_share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2g} %" if value < 0.1 else f"{value:.0%}".replace("%", " %")


def format_count(value: int) -> str:
    """512, 3.08 M, 1.94 G."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.3g} {unit}"
    return str(value)


def format_bytes(value: int | None) -> str:
    """In units of 1024: 12.3 MiB."""
    if value is None:
        return ""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if value >= 1024**power:
            return f"{format_number(value / 1024**power)} {unit}"
    return f"{value} B"


def _count_threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def _make_table(left: Sequence[str], right: Sequence[str]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _add_row(table: Any, cells: Sequence[str], is_best: bool) -> None:
    from rich.text import Text

    table.add_row(*map(Text, cells), style="bold" if is_best else "")


CLIP_COLUMNS: dict[str, tuple[int, Callable[[dict[str, Any]], str]]] = {
    "threads": (0, lambda row: str(row["threads"])),
    "batch": (0, lambda row: str(row["batch"])),
    "p50 ms": (0, lambda row: format_number(row["latency_ms"]["p50"])),
    "p99 ms": (0, lambda row: format_number(row["latency_ms"]["p99"])),
    "clips/s": (0, lambda row: format_number(row["clips_per_s"])),
    "input": (80, lambda row: format_share(row["pipeline_share"])),
    "GFLOP/s": (80, lambda row: format_number(row["gflops"])),
    "of peak": (80, lambda row: format_share(row["share_of_peak"])),
    "memory": (80, lambda row: format_bytes(row["memory_bytes"])),
    "CPU ms/clip": (120, lambda row: format_number(row["cpu_ms_per_clip"])),
    "load s": (120, lambda row: format_number(row["load_s"])),
    "calls": (120, lambda row: str(row["calls"])),
}
"""name -> (columns that the terminal must have, the cell of a row)."""
