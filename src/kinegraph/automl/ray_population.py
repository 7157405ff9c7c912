"""Population-based training (Jaderberg et al. 2017): now and then the worst trials go on from the best, with varied
options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from optuna.distributions import CategoricalDistribution, IntDistribution
from ray.tune.experiment import Trial as RayTrial
from ray.tune.schedulers import PopulationBasedTraining

from kinegraph.automl.dimensions import Dimension, SearchSpace
from kinegraph.automl.samplers import SHOWN_DIGITS

QUANTILE = 0.25
RESAMPLE_PROBABILITY = 0.25
FACTORS = (0.8, 1.2)
RATE, SCHEDULER = "train.optim.lr", "train.optim.lr_scheduler"


class Population(PopulationBasedTraining):
    """Tune's scheduler in its synchronous form, made to hold with a limit on trials at a time and with failures.

    All trials meet every `interval` epochs; then the worst quarter copies trials of the best quarter. `count_to_come`
    says how many trials are yet to start: nobody is copied before all have been measured.
    """

    def __init__(
        self,
        *,
        interval: int,
        mode: str,
        num_slots: int,
        vary: Callable[[Mapping[str, Any]], dict[str, Any]],
        count_to_come: Callable[[], int],
        tell: Callable[[str, str, dict[str, Any]], None],
    ) -> None:
        super().__init__(
            time_attr="epochs",
            metric="latest",
            mode=mode,
            perturbation_interval=interval,
            quantile_fraction=QUANTILE,
            custom_explore_fn=lambda config: {**config, "values": vary(config["values"])},
            log_config=False,
            synch=True,
        )
        self._num_slots, self._count_to_come, self._tell = num_slots, count_to_come, tell

    def on_trial_add(self, tune_controller: Any, trial: RayTrial) -> None:
        super().on_trial_add(tune_controller, trial)
        # A trial that goes on after a restart of the search has trained already
        epochs = trial.config["epochs"]
        self._trial_state[trial].last_train_time = epochs
        self._trial_state[trial].last_perturbation_time = epochs
        self._next_perturbation_sync = max(self._next_perturbation_sync, epochs + self._perturbation_interval)

    def on_trial_result(self, tune_controller: Any, trial: RayTrial, result: dict[str, Any]) -> str:
        if self._count_to_come():
            self._save_trial_state(self._trial_state[trial], result["epochs"], result, trial)
            return str(self.PAUSE)
        return str(super().on_trial_result(tune_controller, trial, result))

    def on_trial_error(self, tune_controller: Any, trial: RayTrial) -> None:
        super().on_trial_error(tune_controller, trial)
        tune_controller.get_live_trials().discard(trial)  # Tune itself waits for it for ever
        self._go_on_without(tune_controller, trial)

    def on_trial_complete(self, tune_controller: Any, trial: RayTrial, result: dict[str, Any]) -> None:
        super().on_trial_complete(tune_controller, trial, result)
        self._go_on_without(tune_controller, trial)

    def choose_trial_to_run(self, tune_controller: Any) -> RayTrial | None:
        if count_active(tune_controller.get_trials()) >= self._num_slots:
            return None
        return super().choose_trial_to_run(tune_controller)

    def _go_on_without(self, tune_controller: Any, trial: RayTrial) -> None:
        """Where all others wait for a trial that will not come, they go on to the next meeting."""
        others = [other for other in tune_controller.get_live_trials() if other is not trial]
        waiting = [self._trial_state[other].last_train_time >= self._next_perturbation_sync for other in others]
        if others and all(waiting) and not self._count_to_come():
            self._next_perturbation_sync += self._perturbation_interval

    def _exploit(self, tune_controller: Any, trial: RayTrial, trial_to_clone: RayTrial) -> None:
        super()._exploit(tune_controller, trial, trial_to_clone)
        self._tell(trial.trial_id, trial_to_clone.trial_id, trial.config["values"])


def count_active(trials: list[RayTrial]) -> int:
    """Trials that run or are about to."""
    return sum(trial.status in (RayTrial.PENDING, RayTrial.RUNNING) for trial in trials)


def vary_values(
    space: SearchSpace, values: Mapping[str, Any], scheduler: str, generator: np.random.Generator
) -> dict[str, Any]:
    """Values with every number by a fifth larger or smaller, or now and then drawn anew; within their ranges.

    Choices and special values stay, since a checkpoint of one optimizer or network fits no other. So does the learning
    rate of AutoReduce, which has its own from the start. `scheduler`: the spec's lr_scheduler.
    """
    varied = dict(values)
    for dimension in space.dimensions:
        if dimension.key not in values or dimension.search.choices:
            continue
        if dimension.key == RATE and values.get(SCHEDULER, scheduler) == "AutoReduce":
            continue
        floor = varied.get(dimension.search.above)
        if values[dimension.key] not in dimension.search.specials:
            varied[dimension.key] = _vary_number(dimension, values[dimension.key], floor, generator)
    return varied


def _vary_number(dimension: Dimension, value: float, floor: float | None, generator: np.random.Generator) -> Any:
    distribution: Any = dimension.distributions[dimension.key]
    assert not isinstance(distribution, CategoricalDistribution)
    low, high = distribution.low, distribution.high
    number = dimension.encode(value, floor).get(dimension.key, value)
    is_whole = isinstance(distribution, IntDistribution)
    if generator.random() < RESAMPLE_PROBABILITY:
        ends = np.log([low, high]) if distribution.log else np.array([low, high], dtype=float)
        number = float(generator.uniform(*ends))
        number = float(np.exp(number)) if distribution.log else number
    else:
        factor = FACTORS[int(generator.integers(2))]
        moved = number * factor
        # A whole number must move at least to the next; exponents move by one
        if is_whole and (dimension.search.powers_of or round(moved) == number):
            moved = number + (1 if factor > 1 else -1)
        number = moved
    number = min(max(round(number) if is_whole else number, low), high)
    drawn = dimension.draw(lambda name, _: number if name == dimension.key else "range", floor)
    rounded = float(f"{drawn:.{SHOWN_DIGITS}g}") if isinstance(drawn, float) else drawn
    return rounded if dimension.encode(rounded, floor) else drawn
