"""What a study shows while it runs: a table that is redrawn at a terminal, else a line when something changes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from kinegraph.automl.trials import Direction, TrialState, orient
from kinegraph.run import format_duration
from kinegraph.storage import dump_json

Mode = Literal["terminal", "lines", "json"]

NUM_BEST, NUM_LAST = 5, 10
EPOCH_LINE_INTERVAL_S = 30.0
FRAME_LINES = 8
"""Lines of the screen that are not trials."""


@dataclass(frozen=True)
class TrialRow:
    """A trial as it stands: `epoch` of `target` epochs are done, `score` is the best value so far."""

    number: int
    state: TrialState
    epoch: int
    target: int
    score: float | None
    elapsed_s: float
    eta_s: float | None = None


@dataclass(frozen=True)
class StudyRow:
    """The study as a whole. `num_ended` trials are neither running nor to come."""

    num_ended: int
    max_trials: int
    best_trial: int | None
    best_score: float | None
    elapsed_s: float
    eta_s: float | None = None


def choose_mode(as_json: bool) -> Mode:
    """JSON lines when asked; a table if messages go to a terminal."""
    return "json" if as_json else "terminal" if sys.stderr.isatty() else "lines"


class StudyTable:
    """Use it in a `with` block and call `show` whenever something may have changed.

    `say` takes lines (modes lines and json). At a terminal, what others print meanwhile appears above the table.
    """

    def __init__(self, metric: str, direction: Direction, mode: Mode, say: Callable[[str], None]) -> None:
        self.metric = metric
        self.direction = direction
        self.mode = mode
        self.say = say
        self._live: Any = None
        self._said: dict[int, TrialRow] = {}
        self._said_s: dict[int, float] = {}

    def __enter__(self) -> StudyTable:
        if self.mode == "terminal":
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(stderr=True), auto_refresh=False, redirect_stdout=False)
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, study: StudyRow, rows: Sequence[TrialRow]) -> None:
        """Draw the table, or say what changed since the last call."""
        if self._live is not None:
            limit = max(1, self._live.console.height - FRAME_LINES)
            self._live.update(build_table(study, rows, self.metric, self.direction, limit), refresh=True)
        elif self.mode != "terminal":
            for row in sorted(rows, key=lambda row: row.number):
                if self._is_news(row):
                    self._said[row.number] = row
                    self._said_s[row.number] = time.monotonic()
                    as_text = format_json if self.mode == "json" else format_line
                    self.say(as_text(study, row, self.metric))

    def _is_news(self, row: TrialRow) -> bool:
        """A change of state or target; epochs all as JSON, now and then as lines."""
        before = self._said.get(row.number)
        if before is None or (before.state, before.target) != (row.state, row.target):
            return True
        if before.epoch == row.epoch:
            return False
        return self.mode == "json" or time.monotonic() - self._said_s[row.number] >= EPOCH_LINE_INTERVAL_S


def format_line(study: StudyRow, row: TrialRow, metric: str) -> str:
    """'trial 3 running: epoch 4 of 9, val_acc 0.8125, 12 s, 15 s left; best 0.9 (trial 1), 2 of 20 trials done'."""
    parts = [f"epoch {row.epoch} of {row.target}"]
    if row.score is not None:
        parts.append(f"{metric} {row.score:.4f}")
    parts.append(format_duration(row.elapsed_s))
    if row.eta_s is not None and row.state == "running":
        parts.append(f"{format_duration(row.eta_s)} left")
    text = f"trial {row.number} {row.state}: {', '.join(parts)}"
    if study.best_score is not None:
        text += f"; best {study.best_score:.4f} (trial {study.best_trial})"
    left = f", {format_duration(study.eta_s)} left" if study.eta_s is not None else ""
    return f"{text}; {study.num_ended} of {study.max_trials} trials done{left}"


def format_json(study: StudyRow, row: TrialRow, metric: str) -> str:
    """One JSON object: event, metric, and the fields of both rows under trial and study."""
    return dump_json({"event": "trial", "metric": metric, "trial": asdict(row), "study": asdict(study)})


def select_rows(rows: Sequence[TrialRow], direction: Direction, limit: int) -> list[TrialRow]:
    """The rows to show, by number: those running, the best five and the last ten, in this order of importance."""
    running = [row for row in rows if row.state == "running"]
    ended = [row for row in rows if row.state in ("paused", "complete") and row.score is not None]
    ended.sort(key=lambda row: (-row.target, -orient(row.score or 0.0, direction), row.number))
    last = sorted(rows, key=lambda row: -row.number)[:NUM_LAST]
    chosen = {row.number: row for row in [*running, *ended[:NUM_BEST], *last]}
    return sorted(list(chosen.values())[:limit], key=lambda row: row.number)


def build_table(study: StudyRow, rows: Sequence[TrialRow], metric: str, direction: Direction, limit: int) -> Any:
    """A rich table of the chosen rows with the state of the study around it."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    shown = select_rows(rows, direction, limit)
    table = Table(box=None, pad_edge=False)
    table.add_column("trial", justify="right")
    table.add_column("state")
    for name in ("epoch", metric, "time", "left"):
        table.add_column(Text(name), justify="right")
    styles = {"running": "cyan", "failed": "red", "paused": "dim", "complete": ""}
    for row in shown:
        is_best = row.number == study.best_trial
        cells = [
            str(row.number),
            f"{row.state}, best" if is_best else row.state,
            f"{row.epoch} of {row.target}",
            "" if row.score is None else f"{row.score:.4f}",
            format_duration(row.elapsed_s),
            format_duration(row.eta_s) if row.eta_s is not None and row.state == "running" else "",
        ]
        table.add_row(*map(Text, cells), style="bold" if is_best else styles[row.state])
    hidden = len(rows) - len(shown)
    return Group(Text(_head(study, metric)), table, *([Text(f"and {hidden} more")] if hidden else []))


def _head(study: StudyRow, metric: str) -> str:
    filled = round(20 * study.num_ended / max(study.max_trials, 1))
    parts = [f"{'█' * filled}{'·' * (20 - filled)} {study.num_ended} of {study.max_trials} trials"]
    if study.best_score is not None:
        parts.append(f"best {metric} {study.best_score:.4f} (trial {study.best_trial})")
    parts.append(format_duration(study.elapsed_s))
    if study.eta_s is not None:
        parts.append(f"{format_duration(study.eta_s)} left")
    return ", ".join(parts)
