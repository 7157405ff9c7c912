"""Which values a trial tries: a function of the seed, the trial's number and what the trials before it brought.

Nothing is remembered between calls, so that a study that was killed goes on with the trials that it would have had.
With one trial at a time the whole study is a function of its seed; with more, the random trials still are.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kinegraph.automl.dimensions import SearchSpace
from kinegraph.automl.trials import Direction, Trial, orient
from kinegraph.errors import Problem, SpecError, suggest
from kinegraph.spec import AutomlSpec

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.study import Study

STARTUP_TRIALS = 8
"""Trials, the spec's own among them, before a model of the scores is asked."""
BOHB_RANDOM_SHARE = 1 / 3
CMAES_SIGMA = 0.25
"""First standard deviation, as a share of each range."""
CMAES_SMALLEST = 4
"""Trials of a generation. Of two or three only one is a parent: the rank-mu update has weight 0, and is divided by."""
MAX_REDRAWS = 20
SHOWN_DIGITS = 6

Params = dict[str, Any]


@dataclass(frozen=True)
class Algorithm:
    """What a name of automl.algorithm stands for. `engines`: where it runs."""

    help: str
    engines: tuple[str, ...] = ("local",)


ALGORITHMS: dict[str, Algorithm] = {
    "bayesian": Algorithm("Gaussian process, expected improvement; the default", ("local", "ray")),
    "tpe": Algorithm("tree-structured Parzen estimator", ("local", "ray")),
    "random": Algorithm("independent draws", ("local", "ray")),
    "qmc": Algorithm("Sobol points, spread more evenly than random ones", ("local", "ray")),
    "cmaes": Algorithm("CMA-ES, generations of automl_population_size trials", ("local", "ray")),
    "asha": Algorithm("random draws; the better ones of each rung go on, asynchronously", ("local", "ray")),
    "hyperband": Algorithm("random draws; brackets of successive halving"),
    "bohb": Algorithm("hyperband with TPE in place of most random draws"),
    "pbt": Algorithm("population-based training: the worse copy the better and vary them", ("ray",)),
}
UNSUPPORTED = ("dehb", "hyperband_es", "bfbo")
"""Names of the original that no engine here can do."""


def check_algorithm(name: str, engine: str) -> Algorithm:
    """The algorithm of this name. Raises SpecError with those that the engine can do."""
    possible = [known for known, algorithm in ALGORITHMS.items() if engine in algorithm.engines]
    if name in possible:
        return ALGORITHMS[name]
    if name in ALGORITHMS:
        hint = f"Set automl.engine={' or '.join(ALGORITHMS[name].engines)} for it."
    else:
        hint = "" if name in UNSUPPORTED else suggest(name, possible)
    got = repr(name) if name not in (*ALGORITHMS, *UNSUPPORTED) else f"{name!r}, which the engine {engine} cannot do"
    raise SpecError(Problem("automl.algorithm", got, "one of " + ", ".join(possible), hint))


def check_options(options: AutomlSpec) -> None:
    """Raises SpecError for an algorithm that the engine cannot do, or that cannot work with its options."""
    check_algorithm(options.algorithm, options.engine)
    _check_population(options.algorithm, options)


def _check_population(algorithm: str, options: AutomlSpec) -> None:
    size = options.automl_population_size
    if algorithm == "cmaes" and size < CMAES_SMALLEST:
        expected = f"at least {CMAES_SMALLEST} for cmaes"
        raise SpecError(Problem("automl.automl_population_size", str(size), expected))


@dataclass(frozen=True)
class _Question:
    """What a sampler goes by. `history` holds the trials before this one whose values lie in the space."""

    space: SearchSpace
    seed: int
    number: int
    history: tuple[Trial, ...]
    direction: Direction
    options: AutomlSpec

    def make_seed(self, attempt: int = 0) -> int:
        """A seed of 32 bits for this trial alone."""
        return int(np.random.SeedSequence([self.seed, self.number, attempt]).generate_state(1)[0])


def suggest_values(
    space: SearchSpace,
    algorithm: str,
    seed: int,
    number: int,
    history: Sequence[Trial],
    direction: Direction,
    options: AutomlSpec,
) -> dict[str, Any]:
    """The values of trial `number`: dotted key -> value of each option that has an effect.

    Trial 0 has the values of the spec. `history` are the other trials of the study, running ones included. The same
    arguments give the same values in any process. A trial that would repeat an earlier one exactly is drawn again; it
    repeats one only if the space is used up.
    """
    if number == 0:
        return dict(space.defaults)
    check_algorithm(algorithm, options.engine)
    _check_population(algorithm, options)
    earlier = sorted((trial for trial in history if trial.number < number), key=lambda trial: trial.number)
    known = [trial.values for trial in earlier]
    usable = tuple(trial for trial in earlier if space.holds(trial.values))
    question = _Question(space, seed, number, usable, direction, options)
    values = _round(space, SAMPLERS[algorithm](question))
    for attempt in range(1, MAX_REDRAWS + 1):
        if values not in known:
            return values
        values = _round(space, _sample_random(question, attempt))
    untried = space.find_untried(known) if values in known else []
    if not untried:
        return values
    return untried[int(np.random.default_rng([seed, number, MAX_REDRAWS + 1]).integers(len(untried)))]


def _round(space: SearchSpace, values: dict[str, Any]) -> dict[str, Any]:
    """Numbers to six digits, which people can read, where that leaves them in their ranges."""
    for key, value in values.items():
        if isinstance(value, float) and math.isfinite(value):
            rounded = {**values, key: float(f"{value:.{SHOWN_DIGITS}g}")}
            values = rounded if space.holds(rounded) else values
    return values


def _sample_random(question: _Question, attempt: int = 0) -> dict[str, Any]:
    """Independent draws, a function of seed and number."""
    generator = np.random.default_rng([question.seed, question.number, attempt])
    distributions = question.space.distributions
    draws = generator.random(len(distributions))
    return question.space.decode(_scale(distributions, draws))


def _sample_qmc(question: _Question) -> dict[str, Any]:
    """Point `number` of a Sobol sequence, scrambled by the seed (Owen 1998)."""
    from scipy.stats import qmc

    distributions = question.space.distributions
    sequence = qmc.Sobol(len(distributions), scramble=True, rng=np.random.default_rng(question.seed))
    sequence.fast_forward(question.number)
    return question.space.decode(_scale(distributions, sequence.random(1)[0]))


def _sample_tpe(question: _Question) -> dict[str, Any]:
    """Bergstra et al. 2011, with joint densities for options that come together; running trials count as bad."""
    if question.number < STARTUP_TRIALS:
        return _sample_random(question)
    return _ask_tpe(question, _score(question.history, question.direction))


def _sample_bohb(question: _Question) -> dict[str, Any]:
    """Falkner et al. 2018: a model of the trials at the largest budget with enough of them, and a share at random.

    Enough is two more than the number of options plus one. The model is TPE's, as theirs is up to details.
    """
    is_random = np.random.default_rng(question.make_seed(attempt=1)).random() < BOHB_RANDOM_SHARE
    enough = len(question.space.dimensions) + 3
    budgets = sorted({budget for trial in question.history for budget in trial.scores}, reverse=True)
    for budget in budgets:
        count = sum(trial.state != "failed" and budget in trial.scores for trial in question.history)
        if count >= enough and not is_random:
            return _ask_tpe(question, _score(question.history, question.direction, budget))
    return _sample_random(question)


def _sample_bayesian(question: _Question) -> dict[str, Any]:
    """A Gaussian process over all options; those without effect in a trial are taken to have the spec's value."""
    from optuna.samplers import GPSampler

    scores = _score(question.history, question.direction)
    if question.number < STARTUP_TRIALS or sum(score is not None for _, score in scores) < 2:
        return _sample_random(question)
    with _quiet():
        sampler = GPSampler(seed=question.make_seed(), n_startup_trials=0)
        rows = [(_complete(question.space, trial.values), score) for trial, score in scores]
        study = _build_study(question, sampler, rows)
        return question.space.decode(study.ask(fixed_distributions=question.space.distributions).params)


def _ask_tpe(question: _Question, scores: Sequence[tuple[Trial, float | None]]) -> dict[str, Any]:
    from optuna.samplers import TPESampler

    with _quiet():
        sampler = TPESampler(
            seed=question.make_seed(), n_startup_trials=2, multivariate=True, group=True, constant_liar=True
        )
        rows = [(question.space.encode(trial.values), score) for trial, score in scores]
        return question.space.suggest(_build_study(question, sampler, rows).ask())


def _sample_cmaes(question: _Question) -> dict[str, Any]:
    """Hansen 2016, on all numbers, each range as 0 to 1; choices are drawn at random.

    It starts from the spec's values. Every generation is played again from the scores, so that there is no state to
    keep. A trial without a score counts as the worst of its generation.
    """
    from cmaes import CMA
    from optuna.distributions import CategoricalDistribution

    distributions = question.space.distributions
    names = [name for name, found in distributions.items() if not isinstance(found, CategoricalDistribution)]
    if not names:
        return _sample_random(question)
    numbers = {name: distributions[name] for name in names}
    size = question.options.automl_population_size
    start = _unscale(numbers, _complete(question.space, question.space.defaults))
    bounds = np.array([[0.0, 1.0]] * len(names))
    strategy = CMA(start, CMAES_SIGMA, bounds, seed=question.seed % 2**32, population_size=size)
    scores = {trial.number: (trial, score) for trial, score in _score(question.history, question.direction)}
    generation, place = divmod(question.number - 1, size)
    for past in range(generation):
        told = []
        for number in range(1 + past * size, 1 + (past + 1) * size):
            point = strategy.ask()
            trial, score = scores.get(number, (None, None))
            if trial is not None:
                params = _scale(numbers, point) | question.space.encode(trial.values)
                point = _unscale(numbers, params)
            told.append((point, score))
        worst = min((score for _, score in told if score is not None), default=0.0)
        strategy.tell([(point, -(worst if score is None else score)) for point, score in told])
    points = [strategy.ask() for _ in range(place + 1)]
    params = _scale(distributions, np.random.default_rng(question.make_seed()).random(len(distributions)))
    return question.space.decode(params | _scale(numbers, points[place]))


SAMPLERS: dict[str, Callable[[_Question], dict[str, Any]]] = {
    "bayesian": _sample_bayesian,
    "tpe": _sample_tpe,
    "random": _sample_random,
    "qmc": _sample_qmc,
    "cmaes": _sample_cmaes,
    "asha": _sample_random,
    "hyperband": _sample_random,
    "bohb": _sample_bohb,
    "pbt": _sample_random,
}
"""pbt: the first population; its engine varies it from there."""


def _score(
    trials: Sequence[Trial], direction: Direction, budget: int | None = None
) -> list[tuple[Trial, float | None]]:
    """Each trial with its score at a budget (None: its last), larger is better; running ones have none.

    A failed trial counts as the worst: what diverges once will again. One that never reached the budget is left out.
    """
    found: list[tuple[Trial, float | None]] = []
    for trial in trials:
        score = trial.score if budget is None else trial.scores.get(budget)
        if trial.state == "failed":
            found.append((trial, -math.inf))
        elif score is not None:
            found.append((trial, orient(score, direction) if math.isfinite(score) else -math.inf))
        elif trial.state == "running":
            found.append((trial, None))
    finite = [score for _, score in found if score is not None and score > -math.inf]
    if not finite:
        return [(trial, None) for trial, score in found if score is None]
    return [(trial, min(finite) if score == -math.inf else score) for trial, score in found]


def _build_study(question: _Question, sampler: BaseSampler, rows: Sequence[tuple[Params, float | None]]) -> Study:
    """A study in memory that knows the trials, finished ones and running ones (without a score)."""
    import optuna
    from optuna.trial import TrialState, create_trial

    study = optuna.create_study(direction="maximize", sampler=sampler)
    for params, score in rows:
        state = TrialState.RUNNING if score is None else TrialState.COMPLETE
        used = {name: question.space.distributions[name] for name in params}
        study.add_trial(create_trial(state=state, value=score, params=params, distributions=used))
    return study


def _complete(space: SearchSpace, values: Mapping[str, Any]) -> Params:
    """All parameters: those of `values`, and the spec's or the middle of the range for what they leave out."""
    middle = _scale(space.distributions, np.full(len(space.distributions), 0.5))
    usual = {name: param for entry in space.dimensions for name, param in entry.encode(entry.default).items()}
    return middle | usual | space.encode(values)


def _scale(distributions: Mapping[str, BaseDistribution], shares: np.ndarray) -> Params:
    """Points of the unit cube -> parameters, uniform on the scale of each."""
    return {
        name: _scale_one(found, min(max(float(share), 0.0), 1.0))
        for (name, found), share in zip(distributions.items(), shares, strict=True)
    }


def _scale_one(distribution: BaseDistribution, share: float) -> Any:
    from optuna.distributions import CategoricalDistribution, IntDistribution

    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[min(int(share * len(distribution.choices)), len(distribution.choices) - 1)]
    low, high = _find_ends(distribution)
    number = low + share * (high - low)
    number = math.exp(number) if distribution.log else number  # type: ignore[attr-defined]
    if isinstance(distribution, IntDistribution):
        number = math.floor(number + 0.5)
    return min(max(number, distribution.low), distribution.high)  # type: ignore[attr-defined]


def _unscale(distributions: Mapping[str, BaseDistribution], params: Mapping[str, Any]) -> np.ndarray:
    """Parameters -> points of the unit cube; numbers only."""
    shares = []
    for name, distribution in distributions.items():
        low, high = _find_ends(distribution)
        number = math.log(params[name]) if distribution.log else params[name]  # type: ignore[attr-defined]
        shares.append((number - low) / (high - low) if high > low else 0.5)
    return np.clip(np.array(shares), 0.0, 1.0)


def _find_ends(distribution: Any) -> tuple[float, float]:
    """Bounds on the scale of a number; every whole number has the same room, halves on either side of it."""
    from optuna.distributions import IntDistribution

    margin = 0.5 if isinstance(distribution, IntDistribution) else 0.0
    low, high = distribution.low - margin, distribution.high + margin
    return (math.log(low), math.log(high)) if distribution.log else (low, high)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Optuna's messages; as it was before afterwards."""
    import optuna

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(level)
