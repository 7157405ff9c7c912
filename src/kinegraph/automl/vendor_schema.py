"""Search ranges from a train schema in TAO's form, whoever wrote it.

Such a schema nests options under "properties"; a leaf says in minimum, maximum, enum, option_weights, math_cond and
depends_on what its option may be. Its bounds say what is valid, not what is worth a try, and may be Infinity: where an
option has a range of its own here, the search stays inside both. The schemas that Kinegraph writes hold its own ranges
as automl_minimum, automl_maximum, automl_log and automl_specials, which count as they are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from kinegraph.automl.ranges import is_number
from kinegraph.config import Option, SearchRange, shorten
from kinegraph.errors import Problem, SpecError
from kinegraph.remote import read_text

MAX_DEPTH = 20
MAX_LEAVES = 10_000
STRICT = 1e-6
"""How far "> 0" keeps off 0."""
TRUE_WORDS = ("true", "yes", "1")


@dataclass
class VendorRanges:
    """What a schema says about options that may be searched here.

    `searched`: those that it searches by default, in its order. `ranges` only holds options of ours. `notes`: what it
    says of options that are not searched here. `problems`: what cannot be understood, by key.
    """

    searched: list[str] = field(default_factory=list)
    ranges: dict[str, SearchRange] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: dict[str, Problem] = field(default_factory=dict)


class _UnclearError(Exception):
    """got, expected: what a leaf says that has no meaning here."""


def read_schema(location: str) -> dict[str, Any]:
    """The schema in a JSON file, which may hold Infinity. Raises SpecError."""
    try:
        schema = json.loads(read_text(location))
    except RecursionError:
        raise SpecError(Problem(location, "values nested too deeply", "a train schema")) from None
    except ValueError as error:
        raise SpecError(Problem(location, f"text that is not JSON ({error})", "a train schema in JSON")) from None
    if not isinstance(schema, dict) or not isinstance(schema.get("properties"), dict):
        raise SpecError(Problem(location, "no properties", "a train schema, an object with properties"))
    return schema


def read_ranges(schema: Mapping[str, Any], options: Mapping[str, Option]) -> VendorRanges:
    """The search ranges of a schema, laid over those of `options` (dotted key -> option)."""
    leaves = dict(_list_leaves(schema))
    searched = schema.get("automl_default_parameters")
    if not isinstance(searched, list):
        searched = [key for key, leaf in leaves.items() if _is_true(leaf.get("automl_enabled"))]
    disabled = schema.get("automl_disabled_parameters")
    disabled = disabled if isinstance(disabled, list) else []
    found = VendorRanges()
    for key in dict.fromkeys(name for name in searched if isinstance(name, str)):
        if key in disabled:
            found.notes.append(f"{shorten(key)} is not searched: the schema disables it.")
        elif key not in options:
            found.notes.append(f"{shorten(key)} is not searched: no option has this name here.")
        elif "search" not in options[key].extra:
            found.notes.append(f"{shorten(key)} is not searched: it has no search range here.")
        else:
            found.searched.append(key)
    for key, leaf in leaves.items():
        if key in options and "search" in options[key].extra:
            try:
                found.ranges[key] = _read_leaf(leaf, options[key])
            except _UnclearError as error:
                hint = f"Give {key} a range in automl.custom_param_ranges, or take it out of the search."
                got, expected = error.args
                found.problems[key] = Problem(f"schema: {key}", got, expected, hint)
    return found


def _list_leaves(node: Mapping[str, Any], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, dict[str, Any]]]:
    properties = node.get("properties")
    if depth > MAX_DEPTH or not isinstance(properties, dict) or len(properties) > MAX_LEAVES:
        return
    for name, child in properties.items():
        if isinstance(child, dict) and "properties" in child:
            yield from _list_leaves(child, f"{prefix}{name}.", depth + 1)
        elif isinstance(child, dict):
            yield f"{prefix}{name}", child


def _is_true(value: Any) -> bool:
    return str(value).lower() in TRUE_WORDS


def _read_leaf(leaf: Mapping[str, Any], entry: Option) -> SearchRange:
    """The range of one option. Raises _UnclearError."""
    own: SearchRange = entry.extra["search"]
    own = replace(own, when={**own.when, **_read_condition(leaf)})
    enum = leaf.get("enum")
    if isinstance(enum, list) and enum:
        return _read_choices(enum, leaf.get("option_weights"), entry, own)
    if own.choices:
        weights = leaf.get("option_weights")
        return replace(own, weights=_read_weights(weights, len(own.choices))) if weights else own
    if "automl_minimum" in leaf or "automl_maximum" in leaf:
        low, high = _read_bound(leaf, "automl_minimum"), _read_bound(leaf, "automl_maximum")
        own = replace(own, low=own.low if low is None else low, high=own.high if high is None else high)
        own = replace(own, log=_is_true(leaf["automl_log"]) if "automl_log" in leaf else own.log)
        specials = leaf.get("automl_specials", [])
        if not isinstance(specials, list) or not all(is_number(special) for special in specials):
            raise _UnclearError(f"automl_specials {shorten(specials)}", "a list of numbers")
        own = replace(own, specials=tuple(specials))
    else:
        own = _intersect(own, _read_bound(leaf, "minimum"), _read_bound(leaf, "maximum"))
    return _apply_math(own, leaf)


def _read_condition(leaf: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """depends_on_values names the values of depends_on with which the option has an effect.

    Also as a mapping, from each option that it depends on to such values.
    """
    parent, accepted = leaf.get("depends_on"), leaf.get("depends_on_values")
    if not isinstance(accepted, dict):
        accepted = {parent: accepted} if isinstance(parent, str) else {}
    conditions = {str(key): tuple(values) for key, values in accepted.items() if isinstance(values, list)}
    for values in conditions.values():
        if not all(value is None or isinstance(value, str | int | float) for value in values):
            raise _UnclearError(f"depends_on_values {shorten(list(values))}", "numbers, texts, true or false")
    return conditions


def _read_bound(leaf: Mapping[str, Any], name: str) -> float | None:
    """A finite bound, or None where the schema gives none."""
    value = leaf.get(name)
    if isinstance(value, str) and value.lower().lstrip("+-") in ("inf", "infinity", ""):
        return None
    if value is None or (isinstance(value, float) and math.isinf(value)):
        return None
    if not is_number(value):
        raise _UnclearError(f"{name} {shorten(value)}", "a number")
    return value


def _intersect(own: SearchRange, low: float | None, high: float | None) -> SearchRange:
    """What is both in our range and valid by the schema; the schema's range where the two have nothing in common."""
    new_low = own.low if low is None or own.low is None else max(low, own.low)
    new_high = high if own.high is None else own.high if high is None else min(high, own.high)
    if new_low is not None and new_high is not None and new_low > new_high:
        if low is None or high is None or low > high:
            raise _UnclearError(f"{low} to {high}", "a range with finite bounds, or one that meets ours")
        new_low, new_high = low, high
    specials = tuple(
        special for special in own.specials if (low is None or special >= low) and (high is None or special <= high)
    )
    return replace(own, low=new_low, high=new_high, specials=specials)


def _read_choices(enum: list[Any], weights: Any, entry: Option, own: SearchRange) -> SearchRange:
    """Those choices that are known here, with their weights."""
    if not own.choices and not all(is_number(choice) for choice in enum):
        raise _UnclearError(f"the choices {shorten(enum)}", "numbers")
    shares = _read_weights(weights, len(enum)) if weights else (1.0,) * len(enum)
    kept = {
        own.choices[own.choices.index(choice)] if own.choices else choice: share
        for choice, share in zip(enum, shares, strict=True)
        if share > 0 and (not own.choices or choice in own.choices)
    }
    if not kept:
        raise _UnclearError(f"the choices {shorten(enum)}", f"at least one of {', '.join(map(str, own.choices))}")
    used = tuple(kept.values()) if len(set(kept.values())) > 1 else ()
    return SearchRange(choices=tuple(kept), weights=used, when=own.when)


def _read_weights(weights: Any, count: int) -> tuple[float, ...]:
    is_list = isinstance(weights, list) and len(weights) == count
    if not is_list or not all(is_number(share) and share >= 0 for share in weights):
        raise _UnclearError(f"option_weights {shorten(weights)}", f"{count} numbers of at least 0, one per choice")
    if not sum(weights):
        raise _UnclearError("option_weights that are all 0", "at least one above 0")
    return tuple(float(share) for share in weights)


def _apply_math(own: SearchRange, leaf: Mapping[str, Any]) -> SearchRange:
    """math_cond: "^ 2" powers of 2, "/ 8" multiples of 8, "> depends_on" above another option, "> 0" above a number."""
    text = leaf.get("math_cond")
    if text is None or text == "":
        return own
    expected = 'one of "^ 2", "/ 8", "> depends_on", or a comparison with a number'
    sign, _, argument = str(text).strip().partition(" ")
    parent = leaf.get("depends_on")
    if sign == ">" and argument.strip() == "depends_on" and isinstance(parent, str) and parent:
        return replace(own, above=parent)
    try:
        number = float(argument)
    except ValueError:
        number = math.nan
    if not is_number(number):
        raise _UnclearError(f"math_cond {shorten(text)}", expected)
    if sign == "^" and number >= 2 and number.is_integer():
        return replace(own, powers_of=int(number), step=None, log=False)
    if sign == "/" and number >= STRICT:
        low = None if own.low is None else math.ceil(own.low / number) * number
        return replace(own, low=low, step=number, powers_of=None, log=False)
    if sign in (">", ">="):
        return _compare(own, number, sign == ">", is_lower=True)
    if sign in ("<", "<="):
        return _compare(own, number, sign == "<", is_lower=False)
    raise _UnclearError(f"math_cond {shorten(text)}", expected)


def _compare(own: SearchRange, number: float, is_strict: bool, *, is_lower: bool) -> SearchRange:
    """A bound that a comparison gives; a strict one keeps the number itself out."""
    if is_lower:
        bound = number + STRICT if is_strict else number
        low = bound if own.low is None else max(own.low, bound)
        return replace(own, low=low, specials=tuple(special for special in own.specials if special >= bound))
    bound = number - STRICT if is_strict else number
    high = bound if own.high is None else min(own.high, bound)
    return replace(own, high=high, specials=tuple(special for special in own.specials if special <= bound))
