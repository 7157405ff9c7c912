"""Searched options as numbers and choices that a sampler draws.

A sampler knows parameters: `<key>` is a number or a choice; `<key>?`, where an option has special values, says whether
the number counts ("range") or which special value stands instead. A space translates between parameters and the values
of options, both ways without loss.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, islice
from typing import TYPE_CHECKING, Any

from kinegraph.config import SearchRange

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import BaseTrial

IN_RANGE = "range"
MAX_LISTED = 10_000
"""Combinations of values that are listed, to find those that no trial has."""
STEP_DIGITS = 12
"""Multiples of a step are rounded to so many digits: 3 * 0.1 is 0.3."""

Draw = Callable[[str, "BaseDistribution"], Any]


@dataclass(frozen=True)
class Dimension:
    """One searched option. Both bounds of `search` are known here; `default` is the value of the spec.

    `is_integer`: whole numbers only. `origin`: where the default comes from (file, override or default). `note`: what a
    user should know about its range.
    """

    key: str
    search: SearchRange
    default: Any
    is_integer: bool = False
    origin: str = "default"
    note: str = ""

    @cached_property
    def distributions(self) -> dict[str, BaseDistribution]:
        """The parameters of this option."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        search = self.search
        if search.weights:
            return {self.key: FloatDistribution(0.0, 1.0)}
        if search.choices:
            return {self.key: CategoricalDistribution(search.choices)}
        low, high = self._bounds
        number: BaseDistribution
        if self._is_counted:
            number = IntDistribution(int(low), int(high), log=search.log and not self._is_grid)
        else:
            number = FloatDistribution(float(low), float(high), log=search.log)
        if search.specials:
            return {f"{self.key}?": CategoricalDistribution((IN_RANGE, *search.specials)), self.key: number}
        return {self.key: number}

    def draw(self, draw: Draw, floor: float | None = None) -> Any:
        """A value, from parameters that `draw(name, distribution)` gives. `floor`: what it must exceed."""
        search = self.search
        if not search.choices:
            if search.specials:
                drawn = draw(f"{self.key}?", self.distributions[f"{self.key}?"])
                if drawn != IN_RANGE:
                    return search.specials[search.specials.index(drawn)]
            return self._lift(draw(self.key, self.distributions[self.key]), floor)
        drawn = draw(self.key, self.distributions[self.key])
        if search.weights:
            return search.choices[bisect.bisect_right(self._shares[:-1], drawn)]
        return search.choices[search.choices.index(drawn)]

    def encode(self, value: Any, floor: float | None = None) -> dict[str, Any]:
        """The parameters that give a value; none if it lies outside of the range."""
        search = self.search
        if search.choices:
            if value not in search.choices:
                return {}
            index = search.choices.index(value)
            if not search.weights:
                return {self.key: search.choices[index]}
            below = self._shares[index - 1] if index else 0.0
            return {self.key: (below + self._shares[index]) / 2}
        if value in search.specials:
            return {f"{self.key}?": search.specials[search.specials.index(value)]}
        number = self._locate(value)
        if number is None or self._lift(number, floor) != value:
            return {}
        return ({f"{self.key}?": IN_RANGE} if search.specials else {}) | {self.key: number}

    def may_be(self, value: Any) -> bool:
        """Whether a trial may draw this value."""
        return bool(self.encode(value))

    def count_values(self) -> int | None:
        """How many values it may have, whatever it must exceed; None: infinitely many."""
        if self.search.choices:
            return len(self.search.choices)
        low, high = self._bounds
        if low < high and not self._is_counted:
            return None
        return int(high - low) + 1 + sum(self._locate(special) is None for special in self.search.specials)

    def list_values(self, floor: float | None = None) -> Iterator[Any]:
        """The values that it may have above `floor`, if these are finitely many."""
        yield from self.search.choices or self.search.specials
        if not self.search.choices:
            low, high = self._bounds
            numbers = range(self._find_first(floor), int(high) + 1) if self._is_counted else (low,)
            for value in map(self._place, numbers):
                if value not in self.search.specials and (floor is None or value > floor):
                    yield value

    def find_highest(self) -> float:
        """The largest number that it may be."""
        if self.search.choices:
            return max(self.search.choices)
        return max(self._place(self._bounds[1]), *self.search.specials, -math.inf)

    def describe_range(self) -> str:
        """The range in words, for the plan."""
        search = self.search
        if search.weights:
            total = sum(search.weights)
            shares = zip(search.choices, search.weights, strict=True)
            return ", ".join(f"{choice} ({weight / total:.0%})" for choice, weight in shares)
        if search.choices:
            return ", ".join(map(str, search.choices))
        ends = self._place(self._bounds[0]), self._place(self._bounds[1])
        text = f"{ends[0]:g}..{ends[1]:g}"
        if search.powers_of:
            text += f", powers of {search.powers_of}"
        elif search.step:
            text += f" in steps of {search.step:g}"
        if search.log:
            text += " (log)"
        return text + "".join(f" or {special:g}" for special in search.specials)

    @cached_property
    def _shares(self) -> list[float]:
        total = sum(self.search.weights)
        return [share / total for share in accumulate(self.search.weights)]

    @property
    def _is_grid(self) -> bool:
        return bool(self.search.step or self.search.powers_of)

    @property
    def _is_counted(self) -> bool:
        return self.is_integer or self._is_grid

    @cached_property
    def _bounds(self) -> tuple[float, float]:
        """Of the parameter: of the exponent, of the number of steps above low, or of the value itself."""
        low, high, step, base = self.search.low, self.search.high, self.search.step, self.search.powers_of
        assert low is not None and high is not None, f"{self.key}: a range without bounds"
        if base:
            exponents = range(math.floor(math.log(low, base)) - 1, math.ceil(math.log(high, base)) + 2)
            inside = [exponent for exponent in exponents if low <= base**exponent <= high]
            return (inside[0], inside[-1]) if inside else (1, 0)
        if step:
            return 0, math.floor((high - low) / step + 1e-9)
        return (math.ceil(low), math.floor(high)) if self.is_integer else (low, high)

    @property
    def is_empty(self) -> bool:
        """Whether no number lies in the range."""
        return not self.search.choices and self._bounds[0] > self._bounds[1]

    def _place(self, number: float) -> float:
        """Parameter -> value."""
        low, step, base = self.search.low, self.search.step, self.search.powers_of
        value: float = number
        if base:
            value = base**number
        elif step:
            value = round((low or 0) + number * step, STEP_DIGITS)
        return int(value) if self.is_integer else float(value)

    def _locate(self, value: Any) -> float | None:
        """Value -> parameter, or None if there is none."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return None
        low, high = self._bounds
        number: float = value
        if self.search.powers_of:
            number = round(math.log(value, self.search.powers_of)) if value > 0 else low - 1
        elif self.search.step:
            number = round((value - (self.search.low or 0)) / self.search.step)
        return number if low <= number <= high and self._place(number) == value else None

    def _lift(self, number: float, floor: float | None) -> float:
        """The value of a parameter; one that does not exceed `floor` is moved to a place above it.

        Parameters that are right stay as they are; the others are spread over the whole rest of the range.
        """
        value = self._place(number)
        if floor is None or value > floor:
            return value
        low, high = self._bounds
        if self._is_counted:
            first = self._find_first(floor)
            return self._place(first + (int(number) - int(low)) % max(int(high) - first + 1, 1))
        share = (number - low) / (floor - low) if floor > low else 0.0
        return min(max(high - share * (high - floor), math.nextafter(floor, math.inf)), high)

    def _find_first(self, floor: float | None) -> int:
        """The first whole parameter whose value exceeds `floor`."""
        low, high = int(self._bounds[0]), int(self._bounds[1])
        return low if floor is None else low + bisect.bisect_right(range(low, high + 1), floor, key=self._place)


@dataclass(frozen=True)
class SearchSpace:
    """What a study searches: `dimensions`, those that others depend on first.

    `fixed` holds the values of options that are not searched but decide which others have an effect. `left_out` gives
    for each option that was asked for and is not searched the reason; `notes` is what else a user should know.
    """

    dimensions: tuple[Dimension, ...]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @cached_property
    def distributions(self) -> dict[str, BaseDistribution]:
        """All parameters, also of options that have an effect only now and then."""
        return {name: found for entry in self.dimensions for name, found in entry.distributions.items()}

    @cached_property
    def defaults(self) -> dict[str, Any]:
        """The values of the spec, for trial 0: dotted key -> value of each option that has an effect."""
        return self._walk(lambda dimension, floor: dimension.default)

    def suggest(self, trial: BaseTrial) -> dict[str, Any]:
        """Values of the options that have an effect, from an Optuna trial."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        def draw(name: str, distribution: BaseDistribution) -> Any:
            if isinstance(distribution, CategoricalDistribution):
                return trial.suggest_categorical(name, distribution.choices)
            if isinstance(distribution, IntDistribution):
                return trial.suggest_int(name, distribution.low, distribution.high, log=distribution.log)
            assert isinstance(distribution, FloatDistribution)
            return trial.suggest_float(name, distribution.low, distribution.high, log=distribution.log)

        return self._walk(lambda dimension, floor: dimension.draw(draw, floor))

    def decode(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Values of the options that have an effect, from parameters, of which some may have no effect."""
        return self._walk(lambda dimension, floor: dimension.draw(lambda name, distribution: params[name], floor))

    def encode(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters that give these values. A value outside of its range, which trial 0 may have, gives none."""
        params: dict[str, Any] = {}

        def look_up_value(dimension: Dimension, floor: float | None) -> Any:
            value = values.get(dimension.key)
            params.update(dimension.encode(value, floor))
            return value

        self._walk(look_up_value)
        return params

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Whether these are values of this space: each in its range, none missing, none without effect."""
        try:
            return self.decode(self.encode(values)) == dict(values)
        except KeyError:
            return False

    def count_values(self) -> int | None:
        """How many combinations of values there are; None: infinitely many.

        Options without effect make no difference. Above MAX_LISTED an upper bound: as if all always had an effect.
        """
        counts = [entry.count_values() for entry in self.dimensions]
        finite = [count for count in counts if count is not None]
        if len(finite) < len(counts):
            return None
        return math.prod(finite) if self._listed is None else len(self._listed)

    def find_untried(self, tried: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
        """The combinations of values that are not among `tried`; None: more than MAX_LISTED in all."""
        if self._listed is None:
            return None
        known = {frozenset(values.items()) for values in tried if self.holds(values)}
        return [values for values in self._listed if frozenset(values.items()) not in known]

    def is_used_up(self, tried: Iterable[Mapping[str, Any]]) -> bool:
        """Whether every combination of values is among `tried`: another trial would repeat one."""
        return self.find_untried(tried) == []

    @cached_property
    def _listed(self) -> list[dict[str, Any]] | None:
        """All combinations of values, or None if these are more than MAX_LISTED."""
        if any(entry.count_values() is None for entry in self.dimensions):
            return None
        found = list(islice(self._list_values({}, self.dimensions), MAX_LISTED + 1))
        return found if len(found) <= MAX_LISTED else None

    def _list_values(self, values: dict[str, Any], rest: Sequence[Dimension]) -> Iterator[dict[str, Any]]:
        """`values` with every combination of those of the other dimensions."""
        if not rest:
            yield values
        elif self._has_effect(rest[0], values):
            for value in rest[0].list_values(self._find_floor(rest[0], values)):
                yield from self._list_values({**values, rest[0].key: value}, rest[1:])
        else:
            yield from self._list_values(values, rest[1:])

    def describe(self) -> list[dict[str, Any]]:
        """The searched options as plain data, in words under "range"; what does not apply is left out."""
        return [
            {"key": entry.key, "range": entry.describe_range(), "spec_value": entry.default}
            | {"origin": entry.origin, "note": entry.note}
            | entry.search.as_data()
            for entry in self.dimensions
        ]

    def _walk(self, choose: Callable[[Dimension, float | None], Any]) -> dict[str, Any]:
        """Parents before children, options without effect passed over."""
        values: dict[str, Any] = {}
        for dimension in self.dimensions:
            if self._has_effect(dimension, values):
                values[dimension.key] = choose(dimension, self._find_floor(dimension, values))
        return values

    def _has_effect(self, dimension: Dimension, values: Mapping[str, Any]) -> bool:
        """Whether an option counts, given the values of those before it."""
        known = {**self.fixed, **values}
        return all(key in known and known[key] in accepted for key, accepted in dimension.search.when.items())

    def _find_floor(self, dimension: Dimension, values: Mapping[str, Any]) -> float | None:
        floor: float | None = {**self.fixed, **values}.get(dimension.search.above)
        return floor
