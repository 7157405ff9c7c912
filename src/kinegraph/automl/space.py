"""The search space of a study, from the spec: which options, over which ranges, under which conditions.

An option's own range stands on its field in spec.py. Over it go the schema that automl.schema_path names and
automl.custom_param_ranges.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from graphlib import CycleError, TopologicalSorter
from typing import Any

from kinegraph.automl.dimensions import Dimension, SearchSpace
from kinegraph.automl.ranges import RANGES_KEY, choose_keys, coerce, find_misfit, read_custom_ranges
from kinegraph.automl.vendor_schema import VendorRanges, read_ranges, read_schema
from kinegraph.config import Option, SearchRange, get_value, list_options
from kinegraph.errors import Problem, SpecError
from kinegraph.spec import Spec

OPTIMIZER = "train.optim.optimizer_type"
NESTEROV = "train.optim.nesterov"
MOMENTUM = "train.optim.momentum"
WINDOW = "dataset.window_size"
BATCH = "dataset.batch_size"
MAX_STEPS = 1e9
MOVE = "dataset.random_move"


def build_space(
    spec: Spec,
    origins: Mapping[str, str],
    num_frames: int | None = None,
    schema: Mapping[str, Any] | None = None,
    num_clips: int | None = None,
) -> SearchSpace:
    """What `spec.automl` asks to search. Raises SpecError with all that is wrong.

    `origins` are those of the loaded spec; `num_frames` is the length T of the training clips, the largest window, and
    `num_clips` their number N, the largest batch; None: not known, any may be asked for.
    `schema`: a train schema in TAO's form, in place of the one that automl.schema_path names.
    """
    if schema is None and spec.automl.schema_path:
        schema = read_schema(spec.automl.schema_path)
    options = {entry.key: entry for entry in list_options(Spec)}
    vendor = VendorRanges() if schema is None else read_ranges(schema, options)
    default_keys = [entry.key for entry in options.values() if entry.extra["automl_enabled"]]
    sizes = {WINDOW: (num_frames, "the frames of a training clip"), BATCH: (num_clips, "the training clips")}
    limits = {key: _Limit(size, meaning) for key, (size, meaning) in sizes.items() if size}
    building = _Building(spec, origins, options, vendor, limits)
    keys = choose_keys(spec.automl, default_keys if schema is None else vendor.searched, options, building.problems)
    custom = read_custom_ranges(spec.automl.custom_param_ranges, options, keys, building.problems)
    for key in keys:
        building.add_range(key, custom.get(key))
    building.leave_out()
    building.make_dimensions()
    building.check()
    if building.problems:
        raise SpecError(*building.problems)
    return building.finish()


@dataclass(frozen=True)
class _Limit:
    """The largest value that makes a difference with the training data, and what it is."""

    largest: int
    meaning: str


@dataclass
class _Building:
    """A space that is being put together, with all that is wrong with it so far."""

    spec: Spec
    origins: Mapping[str, str]
    options: Mapping[str, Option]
    vendor: VendorRanges
    limits: Mapping[str, _Limit]
    ranges: dict[str, SearchRange] = field(default_factory=dict)
    custom: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    dimensions: dict[str, Dimension] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def add_range(self, key: str, custom: Mapping[str, Any] | None) -> None:
        """The range of an option: its own, the schema's, the user's; each over the one before."""
        own: SearchRange = self.options[key].extra["search"]
        search = self.vendor.ranges.get(key, own)
        if key in self.limits:
            search = _narrow(search, own, self.limits[key].largest)
        if custom:
            self.custom[key] = custom
            search = _apply_custom(search, custom)
        elif key in self.vendor.problems:
            self.problems.append(self.vendor.problems[key])
        unknown = [name for name in (*search.when, search.above) if name and name not in self.options]
        for name in unknown:
            self.problems.append(Problem(f"schema: {key}", f"the condition on {name!r}", "a key of the spec"))
        if not unknown:
            self.ranges[key] = search

    def leave_out(self) -> None:
        """Drop what can have no effect, again and again, since others may depend on it."""
        if MOVE in self.ranges and self.spec.model.input_channels < 2:
            del self.ranges[MOVE]
            self.left_out[MOVE] = "it moves x and y, and model.input_channels is less than 2"
        while True:
            without = {key: reason for key in self.ranges if (reason := self._find_reason(key))}
            if not without:
                return
            self.left_out |= without
            self.ranges = {key: search for key, search in self.ranges.items() if key not in without}

    def _find_reason(self, key: str) -> str:
        for parent, accepted in self.ranges[key].when.items():
            value = get_value(self.spec, parent)
            if parent in self.ranges:
                choices = self.ranges[parent].choices
                if choices and not set(choices) & set(accepted) and value not in accepted:
                    return f"it counts with no choice of {parent}"
            elif value not in accepted:
                wanted = " or ".join(str(choice) or "''" for choice in accepted)
                return f"it counts only with {parent}={wanted}"
        return ""

    def make_dimensions(self) -> None:
        """Check the ranges and stretch our own ones to the values of the spec."""
        for key, search in self.ranges.items():
            entry = self.options[key]
            default = get_value(self.spec, key)
            problem = _find_range_problem(key, search, entry, self.custom.get(key))
            problem = problem or self._find_excess(key, search, default)
            if problem:
                self.problems.append(problem)
                continue
            is_integer = entry.type is int
            dimension = Dimension(key, _coerce(search, entry), default, is_integer, self.origins.get(key, "default"))
            if dimension.is_empty:
                expected = "a range that holds a value"
                self.problems.append(Problem(_name_place(key, key in self.custom), _show(search), expected))
                continue
            is_worth_more = key not in self.custom and not (key == MOMENTUM and default == 0)
            if is_worth_more and not dimension.may_be(default):
                dimension = _stretch(dimension)
            if not dimension.may_be(default):
                dimension = replace(dimension, note=f"only trial 0 has {default!r}, which lies outside")
            self.dimensions[key] = dimension

    def _find_excess(self, key: str, search: SearchRange, default: Any) -> Problem | None:
        """What the training data is too small for. As large as in the spec it may be: the user wants it so."""
        highest = max(search.choices) if search.choices else search.high
        limit = self.limits.get(key)
        if limit is None or highest is None or highest <= max(limit.largest, default):
            return None
        return Problem(_name_place(key, key in self.custom), _show(search), f"at most {limit.largest}, {limit.meaning}")

    def check(self) -> None:
        """What goes wrong between options."""
        self._check_nesterov()
        window = self.dimensions.get(WINDOW)
        if window and window.may_be(0):
            self.problems.append(Problem(f"{RANGES_KEY}: {WINDOW}", "a range with 0", "at least 1, or -1"))
        for key, dimension in self.dimensions.items():
            parent = dimension.search.above
            if parent:
                self._check_above(key, parent)
        if not self.dimensions and not self.problems:
            reasons = "; ".join(f"{key}: {reason}" for key, reason in self.left_out.items())
            hint = f"Left out: {reasons}." if reasons else "Name options in automl.automl_hyperparameters."
            self.problems.append(Problem("automl", "nothing to search", "at least one option with an effect", hint))

    def _check_nesterov(self) -> None:
        """The spec refuses Nesterov's momentum with momentum 0, so no trial may have both."""
        momentum, nesterov, optimizer = (self.dimensions.get(key) for key in (MOMENTUM, NESTEROV, OPTIMIZER))
        if optimizer and not optimizer.may_be("torch.optim.SGD"):
            return
        is_on = nesterov.may_be(True) if nesterov else self.spec.train.optim.nesterov
        is_searched = any((momentum, nesterov, optimizer))
        may_be_zero = momentum.may_be(0) if momentum else self.spec.train.optim.momentum == 0
        if is_searched and is_on and may_be_zero:
            where = _name_place(MOMENTUM, MOMENTUM in self.custom)
            hint = f"Or set {NESTEROV}=false and do not search it."
            self.problems.append(
                Problem(where, "0 among its values", f"values above 0, while {NESTEROV} may be on", hint)
            )

    def _check_above(self, key: str, parent: str) -> None:
        search, default = self.dimensions[key].search, get_value(self.spec, parent)
        highest = self.dimensions[parent].find_highest() if parent in self.dimensions else default
        is_number = isinstance(highest, int | float) and not search.choices
        if not is_number or not self.dimensions[key].find_highest() > highest:
            expected = f"values above those of {parent}, which reaches {highest!r}"
            self.problems.append(Problem(_name_place(key, key in self.custom), _show(search), expected))

    def finish(self) -> SearchSpace:
        """Parents first. Raises SpecError where options wait for each other."""
        parents = {key: [*entry.search.when, entry.search.above] for key, entry in self.dimensions.items()}
        known = {name for names in parents.values() for name in names if name and name not in self.dimensions}
        graph = {key: [name for name in names if name in self.dimensions] for key, names in parents.items()}
        try:
            order = list(TopologicalSorter(graph).static_order())
        except CycleError as error:
            where = f"schema: {error.args[1][0]}"
            got = "conditions in a circle: " + ", ".join(error.args[1])
            raise SpecError(Problem(where, got, "options that do not wait for each other")) from None
        return SearchSpace(
            dimensions=tuple(self.dimensions[key] for key in order),
            fixed={name: get_value(self.spec, name) for name in sorted(known)},
            left_out=self.left_out,
            notes=tuple(self.vendor.notes),
        )


def _name_place(key: str, is_custom: bool) -> str:
    return f"{RANGES_KEY}: {key}" if is_custom else key


def _show(search: SearchRange) -> str:
    return f"{search.low}..{search.high}" if not search.choices else f"the choices {list(search.choices)}"


def _narrow(search: SearchRange, own: SearchRange, largest: int) -> SearchRange:
    """What is left of our range, or of the schema's, up to the largest value that makes a difference.

    A bound or choices of the schema's that leave nothing stay, to be refused.
    """
    if search.choices:
        kept = [index for index, choice in enumerate(search.choices) if choice <= largest]
        choices = tuple(search.choices[index] for index in kept) or search.choices
        weights = tuple(search.weights[index] for index in kept) if search.weights and kept else search.weights
        return replace(search, choices=choices, weights=weights)
    low, base = search.low, search.powers_of
    if low is not None and low == own.low:
        low = min(low, base ** int(math.log(largest, base)) if base else largest)
    is_within = low is None or low <= largest
    high = min(largest, math.inf if search.high is None else search.high) if is_within else search.high
    return replace(search, low=low, high=high)


def _apply_custom(search: SearchRange, custom: Mapping[str, Any]) -> SearchRange:
    """The user's bounds, or choices. Special values outside of the bounds go; a bound at one of them adds nothing."""
    if "valid_options" in custom:
        return SearchRange(choices=tuple(custom["valid_options"]), when=search.when)
    low, high = custom.get("valid_min"), custom.get("valid_max")
    specials = tuple(
        special for special in search.specials if (low is None or special >= low) and (high is None or special <= high)
    )
    if low is None or low in specials:
        low = search.low
    high = search.high if high is None else high
    return replace(search, low=low, high=high, specials=specials)


def _find_range_problem(
    key: str, search: SearchRange, entry: Option, custom: Mapping[str, Any] | None
) -> Problem | None:
    where = _name_place(key, custom is not None)
    hint = f"Give it one in {RANGES_KEY}: {{{key}: {{valid_min: ..., valid_max: ...}}}}."
    values = {"choice": search.choices, "special value": search.specials}
    for name, value in [(name, value) for name, group in values.items() for value in group]:
        misfit = find_misfit(entry, value)
        if misfit:
            return Problem(where, f"the {name} {value!r}", misfit)
    if search.choices:
        return None
    if search.low is None or search.high is None:
        return Problem(where, "no finite range", "a range with both bounds", hint)
    if not (math.isfinite(search.low) and math.isfinite(search.high)):
        return Problem(where, _show(search), "finite bounds", hint)
    if search.low > search.high:
        expected = "a lower bound that is not above the upper one"
        return Problem(where, _show(search), expected, _name_own_bound(search, custom))
    if (search.log or search.powers_of) and search.low <= 0:
        return Problem(where, _show(search), "bounds above 0: it is searched on a logarithmic scale")
    if search.step and (search.high - search.low) / search.step > MAX_STEPS:
        return Problem(where, f"{_show(search)} in steps of {search.step:g}", f"at most {MAX_STEPS:g} steps")
    for bound in (search.low, search.high):
        misfit = find_misfit(replace(entry, type=float), bound)
        if misfit:
            return Problem(where, _show(search), misfit)
    return None


def _name_own_bound(search: SearchRange, custom: Mapping[str, Any] | None) -> str:
    """Which bound stands there although the user did not give it: for want of one, or for a special value."""
    if custom is not None and custom.get("valid_max") != search.high:
        return f"{search.high} is the search's own upper bound: valid_max sets another."
    if custom is not None and custom.get("valid_min") != search.low:
        return f"{search.low} is the search's own lower bound: valid_min sets another."
    return ""


def _coerce(search: SearchRange, entry: Option) -> SearchRange:
    return replace(
        search,
        choices=tuple(coerce(entry, choice) for choice in search.choices),
        specials=tuple(dict.fromkeys(coerce(entry, special) for special in search.specials)),
    )


def _stretch(dimension: Dimension) -> Dimension:
    """The range with the spec's value in it, where that is possible; trial 0 has that value in any case."""
    search, value = dimension.search, dimension.default
    if search.choices or not isinstance(value, int | float) or isinstance(value, bool):
        return dimension
    if value <= 0 and (search.log or search.powers_of):
        return dimension
    assert search.low is not None and search.high is not None
    stretched = replace(dimension, search=replace(search, low=min(search.low, value), high=max(search.high, value)))
    return stretched if stretched.may_be(value) else dimension
