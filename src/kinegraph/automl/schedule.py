"""Which trial starts or goes on next, and for how many epochs.

A schedule remembers nothing: it decides from the list of trials alone, so that a study that was killed goes on as if
nothing had happened. A trial that is promoted goes on from where it paused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kinegraph.automl.trials import Direction, Trial, orient
from kinegraph.errors import Problem, SpecError, look_up


@dataclass(frozen=True)
class Start:
    """Begin trial `number` and train it for `budget` epochs."""

    number: int
    bracket: int
    budget: int


@dataclass(frozen=True)
class Promote:
    """Let the paused trial `number` go on until it has trained for `budget` epochs in all."""

    number: int
    budget: int


@dataclass(frozen=True)
class Wait:
    """Nothing to begin before a running trial ends."""


@dataclass(frozen=True)
class Finished:
    """Nothing is left to do."""


Decision = Start | Promote | Wait | Finished


@dataclass(frozen=True)
class Bracket:
    """`num_trials` trials that are compared with each other at each of `budgets` (epochs, rising)."""

    budgets: tuple[int, ...]
    num_trials: int


@dataclass(frozen=True)
class Rung:
    """How many trials reach a budget if none fails: as a rule, and at most."""

    budget: int
    num_trials: int
    most_trials: int


@dataclass(frozen=True)
class Outlook:
    """What a schedule will do. Epochs are those of all trials together; a trial that goes on repeats none.

    `expected_epochs`: nothing fails, and each rung passes on its share. `worst_epochs`: nothing fails, but trials come
    in such an order that as many as possible go on. `limit_epochs` holds whatever fails.
    """

    brackets: tuple[tuple[Rung, ...], ...]
    expected_epochs: int
    worst_epochs: int
    limit_epochs: int
    notes: tuple[str, ...]

    def as_data(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Schedule:
    """Brackets of trials, worked off in order. See `plan_schedule`."""

    algorithm: str
    brackets: tuple[Bracket, ...]
    reduction_factor: int
    max_concurrent: int
    direction: Direction
    is_asynchronous: bool = False
    notes: tuple[str, ...] = ()

    @property
    def max_budget(self) -> int:
        """Epochs of a trial that goes all the way."""
        return max(bracket.budgets[-1] for bracket in self.brackets)

    @property
    def max_trials(self) -> int:
        return sum(bracket.num_trials for bracket in self.brackets)

    def list_pauses(self) -> list[int]:
        """The epochs after which a trial may pause before its end."""
        return sorted({budget for bracket in self.brackets for budget in bracket.budgets} - {self.max_budget})

    def decide(self, trials: Sequence[Trial]) -> Decision:
        """What to do next. Ask again after each start, promotion and end of a trial.

        A trial that failed, or that has a score that is not finite, is never promoted and no rung counts it.
        """
        num_running = sum(trial.state == "running" for trial in trials)
        if num_running >= self.max_concurrent:
            return Wait()
        decide_in = self._decide_asynchronously if self.is_asynchronous else self._decide_synchronously
        for index, bracket in enumerate(self.brackets):
            decision = decide_in(index, bracket, trials)
            if decision is not None:
                return decision
        return Wait() if num_running else Finished()

    def describe(self) -> Outlook:
        """Rungs, trials and epochs, for the plan that is shown before a search starts."""
        brackets = tuple(self._list_rungs(bracket) for bracket in self.brackets)
        return Outlook(
            brackets,
            expected_epochs=sum(_count_epochs(rungs, lambda rung: rung.num_trials) for rungs in brackets),
            worst_epochs=sum(_count_epochs(rungs, lambda rung: rung.most_trials) for rungs in brackets),
            limit_epochs=sum(bracket.num_trials * bracket.budgets[-1] for bracket in self.brackets),
            notes=self.notes,
        )

    def _decide_synchronously(self, index: int, bracket: Bracket, trials: Sequence[Trial]) -> Decision | None:
        """Successive halving (Li et al. 2018, algorithm 1): a rung is decided once all its trials have ended."""
        members = [trial for trial in trials if trial.bracket == index]
        if len(members) < bracket.num_trials:
            return self._start(index, bracket, trials)
        for budget, above in zip(bracket.budgets, bracket.budgets[1:], strict=False):
            if any(trial.state == "running" and trial.target <= budget for trial in members):
                return None
            ranked = self._rank(members, budget)
            share = max(1, len(ranked) // self.reduction_factor)
            waiting = [trial for trial in ranked if not _has_left(trial, budget)]
            # Survivors only: one that failed after its promotion makes room for the next
            if waiting and len(ranked) - len(waiting) < share:
                return Promote(waiting[0].number, above)
        return None

    def _decide_asynchronously(self, index: int, bracket: Bracket, trials: Sequence[Trial]) -> Decision | None:
        """ASHA (Li et al. 2020, algorithm 2): promote from the highest rung that allows it, else start a trial.

        Once nothing more may start and nothing runs, the best of the highest rung reached goes on even where a rung has
        fewer than `reduction_factor` trials, until one trial has the full budget.
        """
        steps = list(zip(bracket.budgets, bracket.budgets[1:], strict=False))[::-1]
        for budget, above in steps:
            ranked = self._rank(trials, budget)
            share = len(ranked) // self.reduction_factor
            waiting = [t for t in ranked[:share] if t.state != "running" and not _has_left(t, budget)]
            if waiting:
                return Promote(waiting[0].number, above)
        if len(trials) < bracket.num_trials:
            return self._start(index, bracket, trials)
        if any(trial.state == "running" for trial in trials) or self._rank(trials, bracket.budgets[-1]):
            return None
        for budget, above in steps:
            ranked = self._rank(trials, budget)
            if ranked:
                return Promote(ranked[0].number, above)
        return None

    def _start(self, index: int, bracket: Bracket, trials: Sequence[Trial]) -> Start:
        return Start(max((trial.number for trial in trials), default=-1) + 1, index, bracket.budgets[0])

    def _rank(self, trials: Sequence[Trial], budget: int) -> list[Trial]:
        """The sound trials that have reached a budget, the best first, the earliest of equals."""
        reached = [trial for trial in trials if _is_sound(trial) and budget in trial.scores]
        return sorted(reached, key=lambda trial: (-orient(trial.scores[budget], self.direction), trial.number))

    def _list_rungs(self, bracket: Bracket) -> tuple[Rung, ...]:
        rungs = [Rung(bracket.budgets[0], bracket.num_trials, bracket.num_trials)]
        for budget in bracket.budgets[1:]:
            below = rungs[-1]
            usual = max(1, below.num_trials // self.reduction_factor)
            # With reduction_factor - 1 sound trials below it, one may be the best of its rung for a moment
            most = max(1, below.most_trials - self.reduction_factor + 1) if self.is_asynchronous else usual
            rungs.append(Rung(budget, usual, most))
        return tuple(rungs)


def _is_sound(trial: Trial) -> bool:
    return trial.state != "failed" and all(map(math.isfinite, trial.scores.values()))


def _has_left(trial: Trial, budget: int) -> bool:
    """Whether it was promoted from there."""
    return trial.target > budget


def _count_epochs(rungs: Sequence[Rung], count: Callable[[Rung], int]) -> int:
    below = [0, *(rung.budget for rung in rungs)]
    return sum(count(rung) * (rung.budget - reached) for rung, reached in zip(rungs, below, strict=False))


def plan_schedule(
    algorithm: str,
    *,
    max_trials: int,
    num_epochs: int,
    max_epochs: int,
    reduction_factor: int,
    epoch_multiplier: int,
    max_concurrent: int,
    direction: Direction,
) -> Schedule:
    """The schedule of an algorithm of at most `max_trials` trials, `max_concurrent` at a time.

    asha, hyperband and bohb train to rungs of max_epochs * epoch_multiplier / reduction_factor^k epochs, rounded down,
    the others every trial for num_epochs. Raises SpecError with all problems.
    """
    limits = [
        ("automl.automl_max_recommendations", max_trials, 1),
        ("automl.automl_max_concurrent", max_concurrent, 1),
    ]
    is_halving = algorithm in PLANS and PLANS[algorithm] is not _plan_plain
    if is_halving:
        limits += [
            ("automl.automl_max_epochs", max_epochs, 1),
            ("automl.automl_reduction_factor", reduction_factor, 2),
            ("automl.epoch_multiplier", epoch_multiplier, 1),
        ]
    else:
        limits.append(("train.num_epochs", num_epochs, 1))
    problems = [Problem(key, str(value), f"at least {low}") for key, value, low in limits if value < low]
    try:
        plan = look_up(PLANS, algorithm, "automl.algorithm", SpecError)
    except SpecError as error:
        problems += error.problems
    if problems:
        raise SpecError(*problems)
    budgets = _list_budgets(max_epochs, epoch_multiplier, reduction_factor) if is_halving else (num_epochs,)
    brackets, notes = plan(budgets, max_trials, reduction_factor)
    return Schedule(algorithm, brackets, reduction_factor, max_concurrent, direction, algorithm == "asha", notes)


def _list_budgets(max_epochs: int, epoch_multiplier: int, reduction_factor: int) -> tuple[int, ...]:
    """As many rungs as there are whole powers of reduction_factor in max_epochs, the lowest first."""
    num_steps = 0
    while reduction_factor ** (num_steps + 1) <= max_epochs:
        num_steps += 1
    longest = max_epochs * epoch_multiplier
    return tuple(longest // reduction_factor**step for step in range(num_steps, -1, -1))


Plan = tuple[tuple[Bracket, ...], tuple[str, ...]]


def _plan_plain(budgets: tuple[int, ...], max_trials: int, reduction_factor: int) -> Plan:
    return (Bracket(budgets, max_trials),), ()


def _plan_asha(budgets: tuple[int, ...], max_trials: int, reduction_factor: int) -> Plan:
    if len(budgets) == 1:
        return (Bracket(budgets, max_trials),), (_explain_single_rung(reduction_factor),)
    first = (
        f"One trial in {reduction_factor} goes on to the next rung, as soon as {reduction_factor} have reached one; "
        "the order in which they end decides how many in all."
    )
    last = "At the end the best goes on until one has trained for all epochs."
    return (Bracket(budgets, max_trials),), (first, last)


def _plan_hyperband(budgets: tuple[int, ...], max_trials: int, reduction_factor: int) -> Plan:
    """Li et al. 2018, algorithm 1: bracket s of s_max, ..., 0 starts ceil((s_max + 1) / (s + 1) * eta^s) trials."""
    num_brackets = len(budgets)
    whole = [-(-num_brackets * reduction_factor**step // (step + 1)) for step in range(num_brackets - 1, -1, -1)]
    num_rounds, left = divmod(max_trials, sum(whole))
    sizes = whole * num_rounds
    notes = [_explain_single_rung(reduction_factor)] if num_brackets == 1 else []
    if num_rounds > 1:
        notes.append(f"{num_rounds} rounds of {sum(whole)} trials.")
    if left and num_rounds == 0:
        sizes = _scale_down(whole, left)
        full = f"{'+'.join(map(str, whole))} = {sum(whole)} trials"
        used = f"{'+'.join(map(str, sizes))} = {left}" if len(sizes) > 1 else f"{left} in the first bracket"
        notes.append(f"The brackets ask for {full}; scaled down to {used} (automl.automl_max_recommendations).")
    elif left:
        last = _scale_down(whole, left)
        sizes = sizes + last
        notes.append(f"A last round is scaled down to {'+'.join(map(str, last))} trials.")
    # A scaled-down round may lack its last brackets, never its first
    brackets = [Bracket(budgets[index % num_brackets :], size) for index, size in enumerate(sizes)]
    return tuple(brackets), tuple(notes)


def _scale_down(sizes: list[int], max_trials: int) -> list[int]:
    """The sizes in proportion with the sum `max_trials`, each at least 1.

    Trials are given out one by one to the bracket that is furthest behind (D'Hondt's method). With fewer trials than
    brackets all go to the first, which explores most: a bracket of one trial compares nothing.
    """
    if max_trials < len(sizes):
        return [max_trials]
    scaled = [1] * len(sizes)
    for _ in range(max_trials - len(sizes)):
        behind = [size / (share + 1) for size, share in zip(sizes, scaled, strict=True)]
        scaled[behind.index(max(behind))] += 1
    return scaled


def _explain_single_rung(reduction_factor: int) -> str:
    hint = "raise automl.automl_max_epochs for more rungs"
    return f"automl_max_epochs is below the reduction factor {reduction_factor}: every trial trains in full ({hint})."


PLANS: dict[str, Callable[[tuple[int, ...], int, int], Plan]] = {
    "random": _plan_plain,
    "tpe": _plan_plain,
    "bayesian": _plan_plain,
    "cmaes": _plan_plain,
    "qmc": _plan_plain,
    "pbt": _plan_plain,
    "asha": _plan_asha,
    "hyperband": _plan_hyperband,
    "bohb": _plan_hyperband,
}
"""How the trials of each algorithm are scheduled; which values they get is the sampler's."""
