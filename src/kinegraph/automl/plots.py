"""Pictures of a study: history, importance of the options, parallel coordinates, learning curves.

Colours are those that people with any colour vision tell apart: viridis for amounts, vermillion for the best trial
(Okabe and Ito 2008), and failed trials have a mark of their own.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kinegraph.automl.axes import Axis, make_axis, shorten_keys, wrap_name
from kinegraph.automl.results import read_curve
from kinegraph.automl.trials import Direction, Trial, find_best, orient
from kinegraph.storage import write_atomically

BLUE, VERMILLION, GREY = "#0072B2", "#D55E00", "#767676"
MIN_TRIALS_FOR_IMPORTANCE = 8
MAX_NAMED_CURVES = 8
FAILED_Y = -0.13


def write_plots(
    folder: Path,
    trials: Sequence[Trial],
    metric: str,
    direction: Direction,
    log_keys: Collection[str] = (),
) -> dict[str, str]:
    """Write all four PNG files into the study folder, whatever has been trained; gives them back by role.

    `log_keys` are the options that are searched on a log scale. Raises StorageError.
    """
    paths = {name: folder / f"{name}.png" for name in ("history", "importance", "parallel", "learning_curves")}
    plot_history(paths["history"], trials, metric, direction)
    plot_importance(paths["importance"], trials, metric, direction, log_keys)
    plot_parallel(paths["parallel"], trials, metric, direction, log_keys)
    curves = {trial.number: read_curve(folder / trial.name, metric) for trial in trials}
    plot_learning_curves(paths["learning_curves"], trials, curves, metric, direction)
    return {f"plot_{name}": str(path) for name, path in paths.items()}


def plot_history(path: Path, trials: Sequence[Trial], metric: str, direction: Direction) -> None:
    """Score of each trial, coloured by the epochs it got, and the best up to each."""
    scored = [trial for trial in trials if _is_scored(trial)]
    if not scored:
        _write_message(path, "No trial has a score yet.")
        return
    figure, axes = _open_figure(9, 5)
    low, high = _find_limits([trial.scores[trial.budget] for trial in scored], direction)
    colors = _color_budgets(sorted({trial.budget for trial in scored}))
    for budget, color in colors.items():
        group = [trial for trial in scored if trial.budget == budget and low <= trial.scores[budget] <= high]
        x, y = [trial.number for trial in group], [trial.scores[budget] for trial in group]
        size = 45 if len(trials) <= 40 else 25
        axes.scatter(
            x, y, s=size, color=color, edgecolor="white", linewidth=0.6, label=_count(budget, "epoch"), zorder=3
        )
    far = [trial.number for trial in scored if not low <= trial.scores[trial.budget] <= high]
    _mark_at_edge(axes, far, "off the scale", direction == "minimize", marker="^" if direction == "minimize" else "v")
    ordered = sorted(trials, key=lambda trial: trial.number)
    steps = [(trial.number, find_best(ordered[: index + 1], direction)) for index, trial in enumerate(ordered)]
    line = [(number, best.scores[best.budget]) for number, best in steps if best is not None]
    best = find_best(trials, direction)
    assert best is not None
    label = f"best so far (trial {best.number}: {best.score:.4g})"
    axes.step(*zip(*line, strict=True), where="post", color=VERMILLION, linewidth=1.8, label=label, zorder=2)
    axes.scatter([best.number], [best.score], s=170, facecolor="none", edgecolor=VERMILLION, linewidth=1.8, zorder=4)
    failed = [trial.number for trial in trials if trial.state == "failed"]
    _mark_at_edge(axes, failed, "failed", at_top=False, marker="x")
    margin = 0.06 * (high - low)
    axes.set_ylim(low - margin, high + margin)
    last = max(trial.number for trial in trials)
    axes.set_xlim(-0.6 - 0.02 * last, last + 0.6 + 0.02 * last)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.set_xlabel("trial")
    axes.set_ylabel(metric, parse_math=False)
    figure.legend(loc="outside upper center", ncols=6, frameon=False, fontsize=8.5)
    _save(figure, path)


def _mark_at_edge(axes: Any, numbers: Sequence[int], label: str, at_top: bool, marker: str) -> None:
    if numbers:
        x, y = numbers, [float(at_top)] * len(numbers)
        style = {"color": "black", "s": 40, "linewidth": 1.6, "clip_on": False, "zorder": 5}
        label = f"{label} ({len(numbers)})"
        axes.scatter(x, y, transform=axes.get_xaxis_transform(), marker=marker, label=label, **style)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def plot_importance(
    path: Path, trials: Sequence[Trial], metric: str, direction: Direction, log_keys: Collection[str] = ()
) -> None:
    """How much each option decides whether a trial is among the good ones, as shares of 1."""
    budget = _choose_budget(trials)
    compared = [trial for trial in trials if _is_scored(trial) and budget in trial.scores]
    if len(compared) < MIN_TRIALS_FOR_IMPORTANCE:
        what = f"{_count(len(compared), 'trial')} with a score at the same number of epochs"
        _write_message(path, f"{what}:\ntoo few to tell the options apart ({MIN_TRIALS_FOR_IMPORTANCE} are needed).")
        return
    shares = measure_importance(compared, budget, direction, log_keys)
    if not shares:
        _write_message(path, "All trials have the same score or the same options:\nthere is nothing to tell apart.")
        return
    names = shorten_keys(list(shares))
    keys = sorted(shares, key=lambda key: (shares[key], key))
    figure, axes = _open_figure(8, 1.6 + 0.38 * len(keys))
    bars = axes.barh([names[key] for key in keys], [shares[key] for key in keys], color=BLUE, height=0.65)
    axes.bar_label(bars, fmt="%.2f", padding=4, fontsize=9)
    axes.set_xlim(0, 1.12 * max(shares.values()))
    for text in axes.get_yticklabels():
        text.set_parse_math(False)
    axes.grid(False, axis="y")
    title = f"Importance for {metric} after {_count(budget, 'epoch')}"
    figure.suptitle(title, x=0.02, ha="left", fontsize=11, parse_math=False)
    rough = "" if len(compared) >= 4 * len(keys) else "; so few for so many options: a rough guess"
    axes.set_title(f"{len(compared)} trials{rough}", x=0.02, fontsize=9, color=GREY, loc="left")
    axes.set_xlabel("share (PED-ANOVA)")
    _save(figure, path)


def measure_importance(
    trials: Sequence[Trial], budget: int, direction: Direction, log_keys: Collection[str] = ()
) -> dict[str, float]:
    """Share of each option, 1 in all, by PED-ANOVA (Watanabe et al. 2023), the most important first.

    Options with one value only are left out; {} where nothing can be told.
    """
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

    if len({trial.scores[budget] for trial in trials}) < 2:
        return {}
    axes = [make_axis(key, trials, key in log_keys) for key in _list_keys(trials)]
    axes = [axis for axis in axes if axis.num_values > 1]
    if not axes:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        verbosity = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        try:
            study = optuna.create_study(direction=direction)
            for trial in trials:
                params: dict[str, Any] = {}
                kinds: dict[str, BaseDistribution] = {}
                for axis in axes:
                    position = axis.positions[trial.number]
                    if position is not None:
                        places = sorted({place for place, _ in axis.ticks})
                        kinds[axis.key] = (
                            CategoricalDistribution(places) if axis.is_category else FloatDistribution(0.0, 1.0)
                        )
                        params[axis.key] = position
                value = trial.scores[budget]
                study.add_trial(optuna.create_trial(params=params, distributions=kinds, value=value))
            quantile = float(np.clip(5 / len(trials), 0.1, 0.5))
            evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=quantile)
            shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
        finally:
            optuna.logging.set_verbosity(verbosity)
    return shares if all(map(math.isfinite, shares.values())) and sum(shares.values()) > 0 else {}


def plot_parallel(
    path: Path, trials: Sequence[Trial], metric: str, direction: Direction, log_keys: Collection[str] = ()
) -> None:
    """A line for each trial through its options to its score; a trial skips the options that it does not use."""
    shown = [trial for trial in trials if _is_scored(trial) or trial.state == "failed"]
    scored = [trial for trial in shown if _is_scored(trial)]
    keys = _list_keys(shown)
    if not scored or not keys:
        _write_message(path, "No trial has a score yet.")
        return
    low, high = _find_limits([trial.scores[trial.budget] for trial in scored], direction)
    heights = {trial.number: (min(max(trial.scores[trial.budget], low), high) - low) / (high - low) for trial in scored}
    columns = [make_axis(key, shown, key in log_keys) for key in keys]
    names = shorten_keys(keys)
    figure, axes = _open_figure(min(max(6.5, 1.35 * (len(keys) + 2)), 24), 5.4)
    best = find_best(scored, direction)
    assert best is not None
    colors = _get_colormap("viridis" if direction == "maximize" else "viridis_r")
    worst = orient(-math.inf, direction)
    for trial in sorted(shown, key=lambda trial: orient(heights.get(trial.number, worst), direction)):
        height = heights.get(trial.number)
        route = [axis.positions[trial.number] for axis in columns] + [FAILED_Y if height is None else height]
        style: dict[str, Any] = {"color": GREY, "linestyle": ":", "linewidth": 1.2, "alpha": 0.8}
        if trial is best:
            style = {"color": VERMILLION, "linewidth": 2.8, "zorder": 4}
        elif height is not None:
            alpha = 0.85 if len(shown) <= 30 else 0.55
            style = {"color": colors(0.95 * height), "linewidth": 1.3, "alpha": alpha}
        axes.plot(*_curve([FAILED_Y if place is None else place for place in route]), **style)
    _draw_columns(axes, columns, [names[key] for key in keys])
    budgets = {trial.budget for trial in scored}
    ends = f"{metric} after\n{min(budgets)} to {max(budgets)} epochs" if len(budgets) > 1 else metric
    failed = [(FAILED_Y, "failed")] if len(scored) < len(shown) else []
    ticks = [((value - low) / (high - low), f"{value:.3g}") for value in _list_ticks(low, high)]
    _draw_column(axes, len(keys), [*ticks, *failed], ends, side="left")
    handles = _make_handles(best, len(scored) - 1, len(scored) < len(shown))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    axes.set_xlim(-0.35, len(keys) + 0.75)
    axes.set_ylim(-0.2, 1.03)
    axes.axis("off")
    _save(figure, path)


def _make_handles(best: Trial, num_others: int, any_failed: bool) -> list[Any]:
    from matplotlib.lines import Line2D

    colors = _get_colormap("viridis")
    handles = [Line2D([], [], color=VERMILLION, linewidth=2.8, label=f"best (trial {best.number})")]
    if num_others:
        handles.append(Line2D([], [], color=colors(0.6), linewidth=1.5, label="trials, the lighter the better"))
    if any_failed:
        handles.append(Line2D([], [], color=GREY, linestyle=":", label="failed"))
    return handles


def _curve(route: Sequence[float]) -> tuple[Any, Any]:
    """Points of a line that leaves each column level: bundles of trials stay apart better than with corners."""
    share = np.linspace(0, 1, 25)
    smooth = share * share * (3 - 2 * share)
    x = np.concatenate([index + share for index in range(len(route) - 1)])
    y = np.concatenate([start + (end - start) * smooth for start, end in itertools.pairwise(route)])
    return x, y


def _draw_columns(axes: Any, columns: Sequence[Axis], names: Sequence[str]) -> None:
    for index, (axis, name) in enumerate(zip(columns, names, strict=True)):
        unused = [(FAILED_Y, "not used")] if None in axis.positions.values() else []
        _draw_column(axes, index, [*axis.ticks, *unused], wrap_name(name))


def _draw_column(axes: Any, x: int, ticks: Sequence[tuple[float, str]], name: str, side: str = "right") -> None:
    axes.plot([x, x], [0, 1], color="black", linewidth=1, zorder=5)
    axes.text(x, 1.05, name, ha="center", va="bottom", fontsize=9, fontweight="bold", parse_math=False)
    box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.8}
    for place, label in ticks:
        axes.plot([x - 0.025, x + 0.025], [place, place], color="black", linewidth=1, zorder=5)
        axes.text(x + 0.05, place, label, ha="left", va="center", fontsize=8, bbox=box, zorder=6, parse_math=False)


def plot_learning_curves(
    path: Path,
    trials: Sequence[Trial],
    curves: Mapping[int, Sequence[tuple[int, float]]],
    metric: str,
    direction: Direction,
) -> None:
    """The metric over the epochs of each trial (number -> (epoch, value)); dotted lines where trials paused."""
    drawn = [trial for trial in trials if curves.get(trial.number)]
    if not drawn:
        _write_message(path, "No trial has measured its metric yet.")
        return
    figure, axes = _open_figure(9, 5)
    best = find_best(trials, direction)
    values = [value for trial in drawn for _, value in curves[trial.number]]
    low, high = _find_limits(values, direction)
    colors = _get_colormap("viridis")
    is_named = len(drawn) <= MAX_NAMED_CURVES
    for index, trial in enumerate(drawn):
        epochs = [epoch + 1 for epoch, _ in curves[trial.number]]
        points = [value for _, value in curves[trial.number]]
        marker = "o" if len(points) <= 12 or is_named else None
        style: dict[str, Any] = {"linewidth": 1.3, "alpha": 0.8 if is_named else 0.4, "color": BLUE}
        if is_named:
            style |= {"color": colors(0.9 * index / max(1, len(drawn) - 1)), "label": f"trial {trial.number}"}
        if trial is best:
            style = {"linewidth": 2.6, "color": VERMILLION, "zorder": 4, "label": f"best (trial {trial.number})"}
        if trial.state == "failed":
            style |= {"linestyle": "--", "color": GREY}
            axes.plot(epochs[-1], points[-1], marker="x", color="black", markersize=7, zorder=5)
        axes.plot(epochs, points, marker=marker, markersize=3.5, **style)
    rungs = sorted({budget for trial in trials for budget in trial.scores})
    for number, budget in enumerate(rungs if len(rungs) > 1 else ()):
        label = "rungs" if number == 0 else None
        axes.axvline(budget, color=GREY, linestyle=":", linewidth=1.2, label=label, zorder=1)
    margin = 0.06 * (high - low)
    axes.set_ylim(low - margin, high + margin)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.set_xlabel("epochs trained")
    axes.set_ylabel(metric, parse_math=False)
    if not is_named:
        axes.plot([], [], color=BLUE, alpha=0.6, label=f"the other {len(drawn) - 1} trials")
    figure.legend(loc="outside upper center", ncols=5, frameon=False, fontsize=9)
    _save(figure, path)


def _is_scored(trial: Trial) -> bool:
    return trial.state != "failed" and trial.score is not None and math.isfinite(trial.score)


def _list_keys(trials: Sequence[Trial]) -> list[str]:
    return list(dict.fromkeys(key for trial in trials for key in trial.values))


def _choose_budget(trials: Sequence[Trial]) -> int:
    """The largest budget that enough trials have a score at, else the one that most have."""
    counts: dict[int, int] = {}
    for trial in filter(_is_scored, trials):
        for budget in trial.scores:
            counts[budget] = counts.get(budget, 0) + 1
    enough = [budget for budget, count in counts.items() if count >= MIN_TRIALS_FOR_IMPORTANCE]
    return max(enough) if enough else max(counts, key=lambda budget: (counts[budget], budget), default=0)


def _find_limits(values: Sequence[float], direction: Direction) -> tuple[float, float]:
    """The range to show: all of it, or without bad values that lie so far off that nothing else could be seen."""
    quarter, median, three_quarters = np.percentile(values, [25, 50, 75])
    reach = 4 * (three_quarters - quarter)
    near = [value for value in values if reach == 0 or orient(value - median, direction) >= -reach]
    low, high = min(near), max(near)
    if high - low < 1e-9 * max(abs(high), 1e-6):
        spread = 0.05 * abs(high) or 0.05
        return low - spread, high + spread
    return low, high


def _list_ticks(low: float, high: float) -> list[float]:
    from matplotlib.ticker import MaxNLocator

    return [float(value) for value in MaxNLocator(6).tick_values(low, high) if low <= value <= high]


def _color_budgets(budgets: Sequence[int]) -> dict[int, Any]:
    if len(budgets) == 1:
        return {budgets[0]: BLUE}
    colors = _get_colormap("viridis")
    return {budget: colors(0.9 * index / (len(budgets) - 1)) for index, budget in enumerate(budgets)}


def _get_colormap(name: str) -> Any:
    from matplotlib import colormaps

    return colormaps[name]


def _open_figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(True, color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _write_message(path: Path, message: str) -> None:
    figure, axes = _open_figure(7, 2)
    axes.axis("off")
    axes.text(0.5, 0.5, message, ha="center", va="center", fontsize=12, color=GREY, parse_math=False)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    with warnings.catch_warnings(), write_atomically(path) as file:
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(file, format="png", dpi=130)
