"""Which values a trial tries: reproducible, better than chance where it should be, blind to what it must not see."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import optuna
import pytest
from cmaes import CMA
from scipy.stats import qmc

from kinegraph.automl.dimensions import Dimension, SearchSpace
from kinegraph.automl.samplers import (
    ALGORITHMS,
    SAMPLERS,
    STARTUP_TRIALS,
    check_algorithm,
    check_options,
    suggest_values,
)
from kinegraph.automl.space import build_space
from kinegraph.automl.trials import Trial
from kinegraph.config import SearchRange
from kinegraph.errors import SpecError
from kinegraph.spec import AutomlSpec
from kinegraph.spec_reading import read_spec

LOCAL = [name for name, algorithm in ALGORITHMS.items() if "local" in algorithm.engines]
MODELS = ("bayesian", "tpe", "cmaes", "bohb")
LR, DROPOUT, CLIP = "train.optim.lr", "model.dropout", "train.grad_clip"

Objective = Callable[[dict[str, Any]], float]


def build(*overrides: str) -> SearchSpace:
    loaded = read_spec(None, overrides)
    return build_space(loaded.values, loaded.origins, 64)


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    """Everything that a space can hold: logarithms, special values, conditions, whole numbers, choices."""
    return build(
        "automl.automl_hyperparameters=[+train.optim.lr_scheduler, +dataset.random_choose, +dataset.batch_size]"
    )


def suggest(
    space: SearchSpace, algorithm: str, number: int, history: Sequence[Trial], seed: int = 3, **options: Any
) -> dict[str, Any]:
    return suggest_values(space, algorithm, seed, number, history, "maximize", AutomlSpec(**options))


def finish(number: int, values: dict[str, Any], score: float) -> Trial:
    return Trial(number, values, 9, "complete", scores={9: score})


def run_study(
    space: SearchSpace, algorithm: str, objective: Objective, num_trials: int, seed: int = 3, **options: Any
) -> list[Trial]:
    history: list[Trial] = []
    for number in range(num_trials):
        values = suggest(space, algorithm, number, history, seed, **options)
        history.append(finish(number, values, objective(values)))
    return history


def rate(values: dict[str, Any]) -> float:
    """A smooth objective; its optimum is lr 0.003, dropout 0.2, momentum 0.7."""
    distance = (math.log10(values[LR]) + 2.5) ** 2 + 4 * (values[DROPOUT] - 0.2) ** 2
    return -distance - 10 * (values.get("train.optim.momentum", 0.7) - 0.7) ** 2


@pytest.fixture(scope="module")
def history(space: SearchSpace) -> list[Trial]:
    """Twelve finished trials."""
    return run_study(space, "random", rate, 12)


@pytest.mark.parametrize("algorithm", LOCAL)
def test_the_same_question_has_the_same_answer(algorithm: str, space: SearchSpace, history: list[Trial]) -> None:
    before = json.dumps([asdict(trial) for trial in history])
    random.seed(1)
    np.random.seed(1)
    first = suggest(space, algorithm, 12, history)
    random.seed(2)
    np.random.seed(2)
    again = suggest(space, algorithm, 12, list(reversed(history)))
    assert first == again
    assert space.holds(first)
    assert json.dumps([asdict(trial) for trial in history]) == before
    assert suggest(space, algorithm, 0, history) == space.defaults
    others = [suggest(space, algorithm, 12, history, seed=4), suggest(space, algorithm, 13, history)]
    assert first not in others


IN_ANOTHER_PROCESS = """
import json, sys
from kinegraph.automl.samplers import suggest_values
from kinegraph.automl.space import build_space
from kinegraph.automl.trials import Trial
from kinegraph.spec import AutomlSpec
from kinegraph.spec_reading import read_spec
overrides, trials, algorithms = json.load(sys.stdin)
loaded = read_spec(None, overrides)
space = build_space(loaded.values, loaded.origins, 64)
for trial in trials:
    trial["scores"] = {int(budget): score for budget, score in trial["scores"].items()}
history = [Trial(**trial) for trial in trials]
answers = [suggest_values(space, name, 3, 12, history, "maximize", AutomlSpec()) for name in algorithms]
print(json.dumps(answers))
"""


def test_another_process_gives_the_same_answers_and_is_silent() -> None:
    overrides = ["automl.automl_hyperparameters=[+train.optim.lr_scheduler]"]
    space = build(*overrides)
    history = run_study(space, "random", rate, 12)
    question = json.dumps([overrides, [asdict(trial) for trial in history], LOCAL])
    done = subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS],
        input=question,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": "77"},
        check=True,
    )
    assert json.loads(done.stdout) == [suggest(space, name, 12, history) for name in LOCAL]
    assert done.stderr == ""


@pytest.mark.parametrize("algorithm", LOCAL)
def test_the_first_trials_do_not_depend_on_scores(algorithm: str, space: SearchSpace) -> None:
    """So they are the same with any number of workers. A generation of cmaes is as long as its population."""
    good = run_study(space, algorithm, rate, STARTUP_TRIALS)
    bad = run_study(space, algorithm, lambda values: -rate(values), STARTUP_TRIALS)
    assert [trial.values for trial in good] == [trial.values for trial in bad]
    assert len({json.dumps(trial.values) for trial in good}) == STARTUP_TRIALS


@pytest.mark.parametrize("algorithm", MODELS)
def test_models_learn_from_the_scores(algorithm: str, space: SearchSpace) -> None:
    history = run_study(space, "random", rate, 21)
    against = [finish(trial.number, trial.values, -rate(trial.values)) for trial in history]
    seeds = range(1 if algorithm == "bayesian" else 4)  # bohb draws one trial in three at random
    answers = [suggest(space, algorithm, 21, history, seed) for seed in seeds]
    assert answers != [suggest(space, algorithm, 21, against, seed) for seed in seeds]
    flipped = [suggest_values(space, algorithm, seed, 21, against, "minimize", AutomlSpec()) for seed in seeds]
    assert flipped == answers


@pytest.mark.parametrize("algorithm", ["random", "qmc", "asha", "hyperband"])
def test_draws_are_blind(algorithm: str, space: SearchSpace) -> None:
    good = run_study(space, algorithm, rate, 15)
    bad = run_study(space, algorithm, lambda values: -rate(values), 15)
    assert [trial.values for trial in good] == [trial.values for trial in bad]


def make_numbers() -> SearchSpace:
    names = [f"{LR}", DROPOUT, "train.optim.momentum"]
    return build(f"automl.automl_hyperparameters=[{', '.join(names)}]")


def test_models_beat_chance() -> None:
    """Mean regret over seeds at a fixed number of trials, on three numbers with a known optimum of 0."""
    numbers = make_numbers()
    options = {"automl_population_size": 5}

    def find_regret(algorithm: str, num_trials: int, seeds: range) -> float:
        studies = [run_study(numbers, algorithm, rate, num_trials, seed, **options) for seed in seeds]
        return float(np.mean([-max(trial.score or -math.inf for trial in study) for study in studies]))

    assert find_regret("bayesian", 16, range(2)) < 0.3 * find_regret("random", 16, range(2))
    by_chance = find_regret("random", 80, range(6))
    assert find_regret("tpe", 80, range(6)) < 0.5 * by_chance
    assert find_regret("cmaes", 80, range(6)) < 0.5 * by_chance


def test_cmaes_is_played_again_exactly() -> None:
    """Against the strategy itself, kept alive over three generations."""
    size = 6
    numbers = SearchSpace((Dimension("a", SearchRange(0.0, 1.0), 0.3), Dimension("b", SearchRange(-5.0, 5.0), 1.0)))

    def objective(values: dict[str, Any]) -> float:
        return -((values["a"] - 0.8) ** 2) - (values["b"] / 5 + 0.4) ** 2

    study = run_study(numbers, "cmaes", objective, 1 + 3 * size, automl_population_size=size)
    strategy = CMA(np.array([0.3, 0.6]), 0.25, np.array([[0.0, 1.0]] * 2), seed=3, population_size=size)
    expected = []
    for _ in range(3):
        told = []
        for point in [strategy.ask() for _ in range(size)]:
            values = {"a": float(f"{point[0]:.6g}"), "b": float(f"{-5 + 10 * point[1]:.6g}")}
            expected.append(values)
            told.append((np.array([values["a"], (values["b"] + 5) / 10]), -objective(values)))
        strategy.tell(told)
    assert len(expected) == 18
    for trial, values in zip(study[1:], expected, strict=True):
        assert trial.values == pytest.approx(values, rel=1e-5)


def test_qmc_gives_the_points_of_the_sequence() -> None:
    numbers = SearchSpace((Dimension("a", SearchRange(0.0, 1.0), 0.3), Dimension("b", SearchRange(-5.0, 5.0), 1.0)))
    points = qmc.Sobol(2, scramble=True, rng=np.random.default_rng(3)).random(16)
    for number in range(1, 16):
        values = suggest(numbers, "qmc", number, [])
        assert [values["a"], (values["b"] + 5) / 10] == pytest.approx(points[number].tolist(), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("algorithm", ["bayesian", "tpe", "cmaes"])
def test_what_fails_counts_as_the_worst(algorithm: str) -> None:
    """Everything above lr 0.02 fails: that region is left alone, though nothing else speaks against it."""
    numbers = make_numbers()
    history = []
    for number in range(26):
        values = suggest(numbers, "random", number, [])
        trial = finish(number, values, values[DROPOUT])
        if values[LR] > 0.02:
            trial = Trial(number, values, 9, "failed", scores={9: math.nan} if number % 2 else {})
        history.append(trial)
    assert 5 < sum(trial.state == "failed" for trial in history) < 15
    asked = [suggest(numbers, algorithm, 26, history, seed)[LR] for seed in range(4)]
    by_chance = [suggest(numbers, "random", 26, history, seed)[LR] for seed in range(4)]
    assert np.mean(np.log10(asked)) < np.mean(np.log10(by_chance))
    assert sum(lr > 0.02 for lr in asked) <= 1


@pytest.mark.parametrize("algorithm", MODELS)
def test_histories_without_any_score(algorithm: str, space: SearchSpace) -> None:
    values = [suggest(space, "random", number, []) for number in range(21)]
    for state, scores in (("failed", {}), ("running", {}), ("failed", {9: math.nan}), ("complete", {9: math.inf})):
        history = [Trial(number, given, 9, state, scores=dict(scores)) for number, given in enumerate(values)]  # type: ignore[arg-type]
        assert space.holds(suggest(space, algorithm, 21, history))


@pytest.mark.parametrize("algorithm", ["bayesian", "tpe"])
def test_running_trials_are_seen(algorithm: str, space: SearchSpace, history: list[Trial]) -> None:
    """Else workers that ask at the same time would try the same."""
    next_values = suggest(space, algorithm, 13, history)
    running = Trial(12, {**max(history, key=lambda trial: trial.score or 0).values}, 9)
    assert suggest(space, algorithm, 13, [*history, running]) != next_values
    later = Trial(14, running.values, 9)
    assert suggest(space, algorithm, 13, [*history, later]) == next_values, "later trials are none of its business"


def test_bohb_asks_the_largest_budget_that_has_enough() -> None:
    """Budget 9 prefers high dropout, budget 3 low: the model follows 9 once six trials have reached it."""
    numbers = make_numbers()
    values = [suggest(numbers, "random", number, [], seed=8) for number in range(40)]

    def count_high(num_full: int) -> float:
        history = []
        for number, given in enumerate(values):
            scores = {3: -given[DROPOUT]} | ({9: given[DROPOUT]} if number < num_full else {})
            history.append(Trial(number, given, max(scores), "paused", scores=scores))
        asked = [suggest(numbers, "bohb", 40, history, seed)[DROPOUT] for seed in range(24)]
        return float(np.mean(asked))

    assert count_high(5) < 0.4 < count_high(20)
    assert abs(count_high(5) - count_high(0)) < 1e-9, "five are not enough"
    history = [finish(number, given, given[DROPOUT]) for number, given in enumerate(values)]
    drawn = [
        suggest(numbers, "bohb", 40, history, seed) == suggest(numbers, "random", 40, [], seed) for seed in range(60)
    ]
    assert 0.15 < np.mean(drawn) < 0.5, "one in three is drawn at random"


def test_a_finite_space_is_not_tried_twice() -> None:
    flags = SearchSpace((Dimension("a", SearchRange(1, 4), 2, is_integer=True),))
    for algorithm in LOCAL:
        tried = [trial.values["a"] for trial in run_study(flags, algorithm, lambda values: values["a"], 4)]
        assert sorted(tried) == [1, 2, 3, 4], algorithm
        assert suggest(flags, algorithm, 4, [finish(number, {"a": a}, 0) for number, a in enumerate(tried)])


def test_the_last_untried_combination_is_found() -> None:
    """Redraws would hardly find it: one of 900, and one that the weights make next to impossible."""
    many = SearchSpace(tuple(Dimension(key, SearchRange(1, 30), 1, is_integer=True) for key in "ab"))
    values = [{"a": a, "b": b} for a in range(1, 31) for b in range(1, 31)]
    tried = [finish(number, found, 0) for number, found in enumerate(values[:-1])]
    for algorithm in ("random", "qmc", "asha"):
        assert suggest(many, algorithm, len(tried), tried) == {"a": 30, "b": 30}
    rare = SearchSpace((Dimension("a", SearchRange(choices=("x", "y", "z"), weights=(1.0, 1e-12, 1e-12)), "x"),))
    study = run_study(rare, "tpe", lambda values: 0.0, 3)
    assert sorted(trial.values["a"] for trial in study) == ["x", "y", "z"]
    assert not rare.is_used_up([trial.values for trial in study[:2]])
    assert rare.is_used_up([trial.values for trial in study])
    others = {suggest(rare, "random", 1, study[:1], seed)["a"] for seed in range(20)}
    assert others == {"y", "z"}, "which of them depends on the seed"


def test_a_generation_of_cmaes_has_four_trials_at_least() -> None:
    numbers = make_numbers()
    for size in (2, 3):
        told = f"automl.automl_population_size: got {size}, expected at least 4 for cmaes"
        with pytest.raises(SpecError, match=told):
            check_options(AutomlSpec(algorithm="cmaes", automl_population_size=size))
        with pytest.raises(SpecError, match=told):
            suggest(numbers, "cmaes", 1, [], automl_population_size=size)
        check_options(AutomlSpec(algorithm="pbt", engine="ray", automl_population_size=size))
        assert suggest(numbers, "random", 1, [], automl_population_size=size)
    check_options(AutomlSpec(algorithm="cmaes", automl_population_size=4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        study = run_study(numbers, "cmaes", rate, 14, automl_population_size=4)
    assert len({json.dumps(trial.values) for trial in study}) == 14
    with pytest.raises(SpecError, match=r"automl\.algorithm"):
        check_options(AutomlSpec(algorithm="pbt"))


def test_a_range_of_one_value() -> None:
    number = Dimension("b", SearchRange(0, 1), 0.5)
    single = SearchSpace((Dimension("a", SearchRange(4, 4), 4, is_integer=True), number))
    for algorithm in LOCAL:
        study = run_study(single, algorithm, lambda values: values["b"], 11)
        assert {trial.values["a"] for trial in study} == {4}
        assert len({trial.values["b"] for trial in study}) == 11


def test_trials_of_another_space_are_passed_over(space: SearchSpace, history: list[Trial]) -> None:
    strange = [finish(3, {"train.optim.lr": 99.0}, 1e9), *(trial for trial in history if trial.number != 3)]
    known = [trial for trial in strange if trial.number != 3]
    assert len(known) == 11
    for algorithm in ("bayesian", "tpe", "bohb"):
        assert suggest(space, algorithm, 12, strange) == suggest(space, algorithm, 12, known)


def test_numbers_are_short() -> None:
    numbers = make_numbers()
    drawn = [value for number in range(1, 30) for value in suggest(numbers, "random", number, []).values()]
    assert len(drawn) == 87
    assert all(float(f"{value:.6g}") == value for value in drawn)


def test_algorithms() -> None:
    assert set(SAMPLERS) == set(ALGORITHMS)
    assert len(LOCAL) == 8
    for name in LOCAL:
        assert check_algorithm(name, "local") is ALGORITHMS[name]
    assert check_algorithm("pbt", "ray")
    for name in ("dehb", "hyperband_es", "bfbo", "pbt", "nothing"):
        with pytest.raises(SpecError) as caught:
            check_algorithm(name, "local")
        assert "one of " + ", ".join(LOCAL) in str(caught.value)
        assert ("automl.engine=ray" in str(caught.value)) == (name == "pbt")
    with pytest.raises(SpecError, match="Did you mean 'bayesian'"):
        check_algorithm("baysian", "local")


def test_optuna_is_left_as_it_was(space: SearchSpace, history: list[Trial]) -> None:
    optuna.logging.set_verbosity(optuna.logging.INFO)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for algorithm in LOCAL:
            suggest(space, algorithm, 12, history)
    assert optuna.logging.get_verbosity() == optuna.logging.INFO
