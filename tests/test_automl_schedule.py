from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kinegraph.automl.schedule import Finished, Promote, Schedule, Start, Wait, plan_schedule
from kinegraph.automl.trials import Trial, find_best
from kinegraph.errors import SpecError

PLAIN = ("random", "tpe", "bayesian", "cmaes", "qmc")
HALVING = ("asha", "hyperband", "bohb")


def make_schedule(algorithm: str = "asha", **options: Any) -> Schedule:
    return plan_schedule(
        algorithm,
        **{
            "max_trials": 9,
            "num_epochs": 5,
            "max_epochs": 9,
            "reduction_factor": 3,
            "epoch_multiplier": 1,
            "max_concurrent": 1,
            "direction": "maximize",
            **options,
        },
    )


@dataclass
class Controller:
    """Keeps trials running as the schedule says. `measure(number, budget)` gives a score; None fails the trial.

    Without `sees_failures` a trial whose score is not finite ends as if it had gone well.
    """

    schedule: Schedule
    measure: Callable[[int, int], float | None]
    choose: Callable[[int], int] = lambda count: 0
    sees_failures: bool = True
    trials: list[Trial] = field(default_factory=list)
    epochs: int = 0
    log: list[tuple[int, int]] = field(default_factory=list)

    def run(self, num_events: int = 10_000) -> bool:
        """Whether the schedule says that it is finished, within so many ends of trials."""
        for _ in range(num_events):
            decision = self.schedule.decide(copy.deepcopy(self.trials))
            while not isinstance(decision, Wait | Finished):
                self.begin(decision)
                decision = self.schedule.decide(copy.deepcopy(self.trials))
            running = [trial for trial in self.trials if trial.state == "running"]
            assert len(running) <= self.schedule.max_concurrent
            if isinstance(decision, Finished):
                assert not running
                return True
            assert running, "waits for nothing"
            self.end(running[self.choose(len(running))])
        return False

    def begin(self, decision: Start | Promote) -> None:
        if isinstance(decision, Start):
            assert decision.number == len(self.trials)
            self.trials.append(Trial(decision.number, {}, decision.budget, bracket=decision.bracket))
            return
        trial = self.trials[decision.number]
        self.check_promotion(trial, decision.budget)
        trial.target, trial.state = decision.budget, "running"

    def check_promotion(self, trial: Trial, budget: int) -> None:
        """It goes to the next rung, and is in the top share of its own, of which at least one may go on."""
        assert trial.state == "paused" and not has_failed(trial)
        bracket = self.schedule.brackets[trial.bracket]
        assert budget == bracket.budgets[bracket.budgets.index(trial.target) + 1]
        rung = trial.target
        members = [other for other in self.trials if other.bracket == trial.bracket]
        if not self.schedule.is_asynchronous:
            assert len(members) == bracket.num_trials
            assert not any(other.state == "running" and other.target <= rung for other in members)
        scores = [other.scores[rung] for other in members if rung in other.scores and not has_failed(other)]
        sign = 1 if self.schedule.direction == "maximize" else -1
        num_better = sum(sign * score > sign * trial.scores[rung] for score in scores)
        assert num_better < max(1, len(scores) // self.schedule.reduction_factor)

    def end(self, trial: Trial) -> None:
        self.epochs += trial.target - trial.budget
        self.log.append((trial.number, trial.target))
        score = self.measure(trial.number, trial.target)
        if score is None:
            trial.state = "failed"
            return
        trial.scores[trial.target] = score
        if self.sees_failures and not math.isfinite(score):
            trial.state = "failed"
        else:
            trial.state = "complete" if trial.target == self.schedule.max_budget else "paused"


def has_failed(trial: Trial) -> bool:
    return trial.state == "failed" or not all(map(math.isfinite, trial.scores.values()))


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    return make_schedule(
        draw(st.sampled_from((*HALVING, "random"))),
        max_trials=draw(st.integers(1, 40)),
        max_epochs=draw(st.integers(1, 30)),
        reduction_factor=draw(st.integers(2, 5)),
        epoch_multiplier=draw(st.integers(1, 3)),
        max_concurrent=draw(st.integers(1, 6)),
        direction=draw(st.sampled_from(["maximize", "minimize"])),
    )


def make_measure(draw: Callable[..., Any], failures: bool) -> Callable[[int, int], float | None]:
    scores = st.sampled_from([0.1, 0.2, 0.3, 0.5, 0.8])
    bad = st.sampled_from([None, math.nan, math.inf])
    kinds = st.one_of(scores, scores, bad) if failures else scores
    return lambda number, budget: draw(kinds)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_schedule_keeps_its_promises(data: st.DataObject) -> None:
    schedule = data.draw(schedules())
    failures = data.draw(st.booleans())
    controller = Controller(
        schedule,
        make_measure(data.draw, failures),
        choose=lambda count: data.draw(st.integers(0, count - 1)),
        sees_failures=data.draw(st.booleans()),
    )
    assert controller.run(), "never finishes"
    trials, outlook = controller.trials, schedule.describe()
    assert len(trials) == schedule.max_trials
    assert max(trial.target for trial in trials) <= schedule.max_budget
    assert controller.epochs <= outlook.limit_epochs
    assert outlook.expected_epochs <= outlook.worst_epochs <= outlook.limit_epochs
    if not any(map(has_failed, trials)):
        assert controller.epochs <= outlook.worst_epochs
        assert schedule.is_asynchronous or controller.epochs == outlook.expected_epochs
    best = find_best(trials, schedule.direction)
    if best is None:
        assert all(map(has_failed, trials))
    else:
        assert best.budget == schedule.max_budget


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_with_one_worker_kills_change_nothing(data: st.DataObject) -> None:
    algorithm = data.draw(st.sampled_from((*HALVING, "random")))
    options = {"max_trials": data.draw(st.integers(1, 40)), "max_epochs": data.draw(st.integers(1, 30))}
    seed = data.draw(st.integers(0, 10_000))

    def measure(number: int, budget: int) -> float | None:
        value = hash((seed, number, budget)) % 97
        return None if value % 11 == 0 else value / 97

    straight = Controller(make_schedule(algorithm, **options), measure)
    assert straight.run()
    killed = Controller(make_schedule(algorithm, **options), measure)
    while not killed.run(num_events=data.draw(st.integers(1, 5))):
        trials = copy.deepcopy(killed.trials)
        killed = Controller(make_schedule(algorithm, **options), measure, trials=trials, log=killed.log)
    assert killed.log == straight.log
    assert killed.trials == straight.trials


@pytest.mark.parametrize("algorithm", PLAIN)
def test_plain_algorithms_train_every_trial_in_full(algorithm: str) -> None:
    schedule = make_schedule(algorithm, max_trials=4, num_epochs=7, max_epochs=0, reduction_factor=0)
    controller = Controller(schedule, lambda number, budget: 0.5)
    assert controller.run()
    assert controller.log == [(0, 7), (1, 7), (2, 7), (3, 7)]
    outlook = schedule.describe()
    assert (outlook.expected_epochs, outlook.worst_epochs, outlook.limit_epochs) == (28, 28, 28)


def test_hyperband_has_the_brackets_of_the_paper() -> None:
    """Li et al. 2018, table 1: R = 81, eta = 3."""
    table = [
        [(81, 1), (27, 3), (9, 9), (3, 27), (1, 81)],
        [(34, 3), (11, 9), (3, 27), (1, 81)],
        [(15, 9), (5, 27), (1, 81)],
        [(8, 27), (2, 81)],
        [(5, 81)],
    ]
    for algorithm in ("hyperband", "bohb"):
        outlook = make_schedule(algorithm, max_epochs=81, max_trials=143).describe()
        assert [[(rung.num_trials, rung.budget) for rung in rungs] for rungs in outlook.brackets] == table
        assert outlook.notes == ()
    twice = make_schedule("hyperband", max_epochs=81, max_trials=286).describe()
    assert len(twice.brackets) == 10 and twice.brackets[:5] == twice.brackets[5:] == outlook.brackets


def test_hyperband_is_scaled_down_to_the_trials_that_are_allowed() -> None:
    outlook = make_schedule("hyperband", max_epochs=27, max_trials=20).describe()
    sizes = [rungs[0].num_trials for rungs in outlook.brackets]
    assert sum(sizes) == 20 and sizes == sorted(sizes, reverse=True) and min(sizes) >= 1
    assert [rungs[0].budget for rungs in outlook.brackets] == [1, 3, 9, 27]
    assert any("27+12+6+4 = 49" in note and "= 20" in note for note in outlook.notes)
    few = make_schedule("hyperband", max_epochs=27, max_trials=3)
    assert [(bracket.num_trials, bracket.budgets) for bracket in few.brackets] == [(3, (1, 3, 9, 27))]
    more = make_schedule("hyperband", max_epochs=27, max_trials=60).describe()
    assert sum(rungs[0].num_trials for rungs in more.brackets) == 60
    assert [rungs[0].num_trials for rungs in more.brackets[:4]] == [27, 12, 6, 4]


def test_asha_promotes_as_in_the_paper_and_closes_its_rungs() -> None:
    """One worker, eta = 3, budgets 1, 3, 9: after every third trial the best of those not promoted goes on."""
    scores = [0.1, 0.9, 0.2, 0.3, 0.8, 0.4]
    controller = Controller(make_schedule("asha", max_trials=6), lambda number, budget: scores[number] + budget / 100)
    assert controller.run()
    started_and_promoted = [(0, 1), (1, 1), (2, 1), (1, 3), (3, 1), (4, 1), (5, 1), (4, 3)]
    assert controller.log == [*started_and_promoted, (1, 9)]
    assert [trial.state for trial in controller.trials] == ["paused", "complete", *["paused"] * 4]


def test_asha_in_the_worst_order_stays_within_its_worst_case() -> None:
    schedule = make_schedule("asha", max_trials=12)
    controller = Controller(schedule, lambda number, budget: float(number))
    assert controller.run()
    outlook = schedule.describe()
    assert controller.epochs == outlook.worst_epochs > outlook.expected_epochs
    assert [rung.most_trials for rung in outlook.brackets[0]] == [12, 10, 8]


@pytest.mark.parametrize("algorithm", HALVING)
@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_where_all_others_fail_the_worst_trial_is_trained_in_full(algorithm: str, direction: str) -> None:
    """Every trial but the last fails above the first rung, and the last looks worst there."""
    schedule = make_schedule(algorithm, max_trials=2 if algorithm != "asha" else 6, direction=direction)
    last = schedule.max_trials - 1
    sign = -1.0 if direction == "maximize" else 1.0
    controller = Controller(
        schedule, lambda number, budget: sign * number if number == last or budget == 1 else math.nan
    )
    assert controller.run()
    assert [trial.state for trial in controller.trials] == [*["failed"] * last, "complete"]
    assert controller.trials[last].budget == 9
    assert find_best(controller.trials, schedule.direction) is controller.trials[last]


def test_all_failed_ends_the_study() -> None:
    for algorithm in (*PLAIN, *HALVING):
        controller = Controller(make_schedule(algorithm), lambda number, budget: None)
        assert controller.run()
        assert len(controller.trials) == 9 and {trial.state for trial in controller.trials} == {"failed"}


def test_equal_scores_go_by_number() -> None:
    controller = Controller(make_schedule("asha", max_trials=3), lambda number, budget: 0.5)
    assert controller.run()
    assert controller.log == [(0, 1), (1, 1), (2, 1), (0, 3), (0, 9)]


def test_several_workers_are_kept_busy_in_a_later_bracket() -> None:
    schedule = make_schedule("hyperband", max_trials=17, max_concurrent=12)
    assert [bracket.num_trials for bracket in schedule.brackets] == [9, 5, 3]
    controller = Controller(schedule, lambda number, budget: 0.5)
    for _ in range(12):
        decision = schedule.decide(controller.trials)
        assert isinstance(decision, Start)
        controller.begin(decision)
    assert [trial.bracket for trial in controller.trials] == [0] * 9 + [1] * 3
    assert schedule.decide(controller.trials) == Wait()


def test_a_trial_that_still_runs_is_not_promoted() -> None:
    schedule = make_schedule("asha", max_trials=4, max_concurrent=2)
    trials = [Trial(number, {}, 1, "paused", scores={1: 0.1 * number}) for number in range(3)]
    assert schedule.decide(trials) == Promote(2, 3)
    trials[2].state = "running"
    assert schedule.decide(trials) == Start(3, 0, 1)


def test_budgets_are_whole_epochs() -> None:
    budgets = {
        (27, 3, 1): (1, 3, 9, 27),
        (27, 3, 2): (2, 6, 18, 54),
        (20, 3, 1): (2, 6, 20),
        (2, 3, 5): (10,),
        (10, 2, 1): (1, 2, 5, 10),
    }
    for (max_epochs, factor, multiplier), expected in budgets.items():
        schedule = make_schedule(
            "asha", max_epochs=max_epochs, reduction_factor=factor, epoch_multiplier=multiplier, num_epochs=0
        )
        assert schedule.brackets[0].budgets == expected
        assert schedule.max_budget == max_epochs * multiplier


def test_nonsense_is_refused_all_at_once() -> None:
    with pytest.raises(SpecError) as refused:
        make_schedule(
            "asha", max_trials=0, max_epochs=0, reduction_factor=1, epoch_multiplier=0, max_concurrent=0, num_epochs=0
        )
    assert {problem.where for problem in refused.value.problems} == {
        "automl.automl_max_recommendations",
        "automl.automl_max_epochs",
        "automl.automl_reduction_factor",
        "automl.epoch_multiplier",
        "automl.automl_max_concurrent",
    }
    with pytest.raises(SpecError, match=r"train\.num_epochs"):
        make_schedule("tpe", num_epochs=0)
    with pytest.raises(SpecError, match="Did you mean 'hyperband'"):
        make_schedule("hyperbend")
