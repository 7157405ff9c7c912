"""What a search will do, before it starts: algorithm, budget, searched options, first trials, time."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from kinegraph.automl.estimate import estimate_epoch_seconds
from kinegraph.automl.samplers import ALGORITHMS, suggest_values
from kinegraph.automl.study import prepare_search
from kinegraph.config import LoadedSpec
from kinegraph.run import format_duration
from kinegraph.spec import Spec
from kinegraph.spec_reading import find_results_dir

NUM_SHOWN_TRIALS = 3


def make_plan(loaded: LoadedSpec[Spec], with_time: bool = True) -> dict[str, Any]:
    """The plan of a search as plain data. Raises SpecError where the spec cannot be searched.

    `with_time` measures a training step, to estimate the seconds.
    """
    spec = loaded.values
    options = spec.automl
    search = prepare_search(spec, loaded.origins)
    space, schedule, environments = search.space, search.schedule, search.environments
    num_workers = schedule.max_concurrent
    outlook = schedule.describe()
    confirm_epochs = 2 * options.confirm_seeds * schedule.max_budget
    epoch_s = estimate_epoch_seconds(spec) if with_time else None
    is_divided = all("OMP_NUM_THREADS" in environment for environment in environments) and environments
    epochs = outlook.expected_epochs + confirm_epochs
    first = [
        suggest_values(space, options.algorithm, options.seed, number, [], search.direction, options)
        for number in range(min(NUM_SHOWN_TRIALS, schedule.max_trials))
    ]
    return {
        "algorithm": options.algorithm,
        "engine": options.engine,
        "metric": options.metric,
        "direction": search.direction,
        "seed": options.seed,
        "max_trials": schedule.max_trials,
        "max_epochs_per_trial": schedule.max_budget,
        "concurrent_trials": num_workers,
        "schedule": outlook.as_data(),
        "confirm_seeds": options.confirm_seeds,
        "confirm_epochs": confirm_epochs,
        "searched": space.describe(),
        "not_searched": dict(space.left_out),
        "notes": list(space.notes),
        "first_trials": first,
        "seconds_per_epoch": epoch_s,
        "estimated_seconds": None if epoch_s is None else epoch_s * epochs / (1 if is_divided else num_workers),
        "results_dir": str(find_results_dir(spec, "automl")),
    }


def format_plan(plan: dict[str, Any]) -> str:
    """The plan for people."""
    lines = [
        f"Search: {plan['algorithm']}, {plan['direction']} {plan['metric']}, seed {plan['seed']}, {plan['engine']}",
        f"  {plan['max_trials']} trials of up to {plan['max_epochs_per_trial']} epochs, "
        f"{plan['concurrent_trials']} at a time",
        *_format_rungs(plan["schedule"]),
        f"  {_format_time(plan)}",
        f"  results: {plan['results_dir']}",
        "",
        "Searched options",
        *_format_searched(plan),
        "",
        "First trials",
    ]
    for number, values in enumerate(plan["first_trials"]):
        shown = ", ".join(f"{key} {_format_value(value)}" for key, value in values.items())
        lines.append(f"  {number}{' (your spec)' if number == 0 else ''}: {shown}")
    return "\n".join(lines)


def _format_rungs(schedule: dict[str, Any]) -> list[str]:
    lines = []
    if any(len(rungs) > 1 for rungs in schedule["brackets"]):
        for rungs in schedule["brackets"]:
            lines.append("  " + " -> ".join(f"{rung['num_trials']} to epoch {rung['budget']}" for rung in rungs))
    return lines + [f"  {note}" for note in schedule["notes"]]


def _format_time(plan: dict[str, Any]) -> str:
    epochs = f"{plan['schedule']['expected_epochs']} epochs"
    if plan["confirm_epochs"]:
        epochs += f" and {plan['confirm_epochs']} to confirm with {plan['confirm_seeds']} seeds"
    if plan["estimated_seconds"] is None:
        return f"{epochs}; how long they take could not be measured"
    return f"{epochs}, about {format_duration(plan['estimated_seconds'])} on this machine"


def _format_searched(plan: dict[str, Any]) -> list[str]:
    rows = plan["searched"]
    width = max((len(key) for key in [*(row["key"] for row in rows), *plan["not_searched"]]), default=0)
    lines = [f"  {row['key']:<{width}}  {row['range']}{_format_note(row.get('note'))}" for row in rows]
    lines += [f"  {key:<{width}}  not searched: {reason}" for key, reason in plan["not_searched"].items()]
    return lines + [f"  {note}" for note in plan["notes"]]


def _format_note(note: str | None) -> str:
    return f" ({note})" if note else ""


def _format_value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def list_algorithms() -> list[dict[str, Any]]:
    """The algorithms by name, with the engines that run each and what it does."""
    return [{"name": name, **asdict(entry)} for name, entry in ALGORITHMS.items()]
