"""The values of a searched option as places between 0 and 1, for pictures and for measuring importance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kinegraph.automl.trials import Trial

MAX_TICKED_VALUES = 5
SPECIAL_GAP = 0.16
MAX_NAME_CHARACTERS = 40
LINE_CHARACTERS = 14


@dataclass(frozen=True)
class Axis:
    """One option. `positions` gives each trial's place (trial number -> 0..1), None where the option has no effect."""

    key: str
    positions: dict[int, float | None]
    ticks: list[tuple[float, str]]
    is_category: bool
    num_values: int


def make_axis(key: str, trials: Sequence[Trial], is_log: bool) -> Axis:
    """Places of an option's values: numbers on a linear or log scale, anything else side by side.

    A value that means something else than its number (0 on a log scale, -1 among numbers that are positive) gets a
    place of its own below the others.
    """
    given = {trial.number: trial.values[key] for trial in trials if key in trial.values}
    numbers = list(given.values())
    is_number = all(isinstance(value, int | float) and not isinstance(value, bool) for value in numbers)
    places, ticks = _place_numbers(numbers, is_log) if is_number else _place_categories(numbers)
    positions = {
        trial.number: places[_name(given[trial.number])] if trial.number in given else None for trial in trials
    }
    return Axis(key, positions, ticks, not is_number, len(places) + (None in positions.values()))


def _place_categories(values: Sequence[Any]) -> tuple[dict[str, float], list[tuple[float, str]]]:
    names = sorted({_name(value) for value in values})
    places = {name: index / (len(names) - 1) if len(names) > 1 else 0.5 for index, name in enumerate(names)}
    return places, [(place, _shorten(name, 18)) for name, place in places.items()]


def _place_numbers(values: Sequence[float], is_log: bool) -> tuple[dict[str, float], list[tuple[float, str]]]:
    is_signed = not is_log and max(values) < 0
    specials = [] if is_signed else sorted({value for value in values if value < 0 or (is_log and value == 0)})
    usual = sorted(set(values) - set(specials))
    step = min(SPECIAL_GAP, 0.5 / max(1, len(specials)))
    bottom = step * len(specials)
    places = {_name(value): index * step for index, value in enumerate(specials)}
    ticks = [(index * step, f"{value:g}") for index, value in enumerate(specials)]
    if not usual:
        return {name: place + 0.5 for name, place in places.items()}, [(place + 0.5, name) for place, name in ticks]
    low, high = (_scale(value, is_log) for value in (usual[0], usual[-1]))

    def place(value: float) -> float:
        share = (_scale(value, is_log) - low) / (high - low) if high > low else 0.5
        return bottom + (1 - bottom) * share

    places |= {_name(value): place(value) for value in usual}
    ticked = usual if len(usual) <= MAX_TICKED_VALUES else _choose_ticks(usual[0], usual[-1], is_log)
    return places, ticks + _thin_out([(place(value), f"{value:.3g}") for value in ticked])


def _scale(value: float, is_log: bool) -> float:
    return math.log10(value) if is_log else float(value)


def _choose_ticks(low: float, high: float, is_log: bool) -> list[float]:
    from matplotlib.ticker import LogLocator, MaxNLocator

    locator = LogLocator(subs=(1.0, 3.0)) if is_log else MaxNLocator(5)
    inside = [float(value) for value in locator.tick_values(low, high) if low <= value <= high]
    return inside if len(inside) > 1 else [low, high]


def _thin_out(ticks: list[tuple[float, str]]) -> list[tuple[float, str]]:
    """Without ticks so close to the one below that their labels would overlap."""
    kept: list[tuple[float, str]] = []
    for tick in ticks:
        if not kept or tick[0] - kept[-1][0] > 0.045:
            kept.append(tick)
    return kept


def _name(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return repr(float(value)) if isinstance(value, int | float) else str(value)


def _shorten(name: str, limit: int) -> str:
    name = " ".join(name.split())
    return name if len(name) <= limit else f"{name[: limit - 1]}…"


def shorten_keys(keys: Sequence[str]) -> dict[str, str]:
    """Dotted key -> as many of its last parts as tell it from the others."""
    names = {}
    for key in keys:
        parts = key.split(".")
        tails = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        names[key] = next((tail for tail in tails if sum(f".{other}".endswith(f".{tail}") for other in keys) == 1), key)
    return {key: _shorten(name, MAX_NAME_CHARACTERS) for key, name in names.items()}


def wrap_name(name: str) -> str:
    """Broken into lines after _ and . where it is long."""
    lines = [""]
    for piece in name.replace("_", "_\0").replace(".", ".\0").split("\0"):
        if lines[-1] and len(lines[-1]) + len(piece) > LINE_CHARACTERS:
            lines.append("")
        lines[-1] += piece
    return "\n".join(lines)
