"""What a measurement is asked for, checked before anything is opened."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from kinegraph.backends import ALIASES, BACKENDS
from kinegraph.errors import Problem, UserError, suggest
from kinegraph.threads import MAX_THREADS, count_cores

MAX_BATCH = 4096
MAX_FRAMES = 100_000
MAX_PEOPLE = 100
MAX_SECONDS = 3600.0
DEFAULT_BATCHES = "1,8,32"
REPORT_NAME, PLOT_NAME = "benchmark.json", "benchmark.png"


@dataclass(frozen=True)
class Settings:
    """`model` and `data` as the user named them. None for frames and people: those of the model, of the data.

    seconds   time that each configuration is measured for; warm-up comes on top
    device    cpu, cuda, ...; "": what each backend takes by itself
    """

    model: str
    backends: tuple[str, ...]
    batches: tuple[int, ...]
    threads: tuple[int, ...]
    data: str | None = None
    frames: int | None = None
    people: int | None = None
    seconds: float = 2.0
    device: str = ""


def make_settings(
    model: str,
    backends: list[str] | None = None,
    batches: str = DEFAULT_BATCHES,
    threads: str | None = None,
    data: str | None = None,
    frames: int | None = None,
    people: int | None = None,
    seconds: float = 2.0,
    device: str = "",
) -> Settings:
    """Settings from the texts of a command line; counts are written 1,8,32. Default threads: 1, and all cores.

    Raises UserError with everything that is wrong.
    """
    problems: list[Problem] = []
    names = _read_backends(backends, problems)
    batch_sizes = _read_counts(batches, "--batch", MAX_BATCH, problems)
    thread_counts = _read_counts(threads or f"1,{count_cores()}", "--threads", MAX_THREADS, problems)
    for option, value, largest in (("--frames", frames, MAX_FRAMES), ("--people", people, MAX_PEOPLE)):
        if value is not None and not 1 <= value <= largest:
            problems.append(Problem(option, str(value), f"1 to {largest}"))
        if value is not None and data is not None:
            problems.append(Problem(option, f"{value} together with --data", "one of both", "The clips have a shape."))
    if not (math.isfinite(seconds) and 0 < seconds <= MAX_SECONDS):
        problems.append(Problem("--seconds", str(seconds), f"more than 0, up to {MAX_SECONDS:g}"))
    if problems:
        raise UserError(*problems)
    return Settings(model, names, batch_sizes, thread_counts, data, frames, people, seconds, device)


def check_folder(folder: str) -> None:
    """Refuse a folder that holds a report already: measurements cannot be made again. Raises UserError."""
    for name in (REPORT_NAME, PLOT_NAME):
        path = Path(folder) / name
        if os.path.lexists(path):
            raise UserError(Problem(str(path), "a file that is there already", "a new folder", "Choose another one."))


def _read_backends(given: list[str] | None, problems: list[Problem]) -> tuple[str, ...]:
    if not given:
        return tuple(BACKENDS)
    names = [ALIASES.get(name, name) for text in given for name in text.replace(" ", "").split(",")]
    problems += [
        Problem("--backend", repr(name), "one of " + ", ".join(BACKENDS), suggest(name, BACKENDS))
        for name in names
        if name not in BACKENDS
    ]
    return tuple(dict.fromkeys(names))


def _read_counts(text: str, option: str, largest: int, problems: list[Problem]) -> tuple[int, ...]:
    """'1,8,32' -> (1, 8, 32): sorted, each once."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdecimal() and 1 <= int(word[:9]) <= largest for word in words):
        problems.append(Problem(option, repr(text), f"numbers from 1 to {largest} with commas between, such as 1,8"))
        return ()
    return tuple(sorted({int(word) for word in words}))
