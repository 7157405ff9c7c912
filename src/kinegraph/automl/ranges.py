"""What the user asks to search: automl_hyperparameters, automl_fixed and custom_param_ranges, checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_origin

from kinegraph.config import Option, list_choices, list_groups, shorten
from kinegraph.errors import Problem, suggest
from kinegraph.spec import SHORTHANDS, AutomlSpec, Spec

KEYS_KEY = "automl.automl_hyperparameters"
FIXED_KEY = "automl.automl_fixed"
RANGES_KEY = "automl.custom_param_ranges"
LARGEST = 1e300
RANGE_FIELDS = ("valid_min", "valid_max", "valid_options")


def choose_keys(
    automl: AutomlSpec, default_keys: Sequence[str], options: Mapping[str, Option], problems: list[Problem]
) -> list[str]:
    """The options to search. What is wrong goes to `problems`."""
    fixed = {_expand(text): text for text in automl.automl_fixed if text.strip()}
    for key in fixed:
        if key not in options:
            problems.append(_explain_unknown(FIXED_KEY, key, options))
    named = [text.strip() for text in automl.automl_hyperparameters if text.strip()]
    plain = [_expand(text) for text in named if text[0] not in "+-"]
    added = [_expand(text[1:]) for text in named if text[0] == "+"]
    removed = [_expand(text[1:]) for text in named if text[0] == "-"]
    for key in dict.fromkeys([*plain, *added]):
        refusal = _explain_refusal(key, options)
        if refusal:
            problems.append(refusal)
        elif key in fixed:
            got = f"{key}, which {FIXED_KEY} fixes"
            problems.append(Problem(KEYS_KEY, got, "an option that is either searched or fixed"))
    wanted = list(dict.fromkeys([*(plain or default_keys), *added]))
    for key in removed:
        if key not in wanted:
            expected = "one of those that are searched: " + ", ".join(wanted)
            problems.append(Problem(KEYS_KEY, f"-{key}, which is not searched", expected, suggest(key, wanted)))
    left = [key for key in wanted if key not in removed and key not in fixed]
    return [key for key in left if key in options and "search" in options[key].extra]


def _expand(text: str) -> str:
    key = text.strip()
    return SHORTHANDS.get(key, key)


def _list_searchable(options: Mapping[str, Option]) -> list[str]:
    return [key for key, entry in options.items() if "search" in entry.extra]


def _explain_unknown(where: str, key: str, options: Mapping[str, Option]) -> Problem:
    searchable = _list_searchable(options)
    elsewhere = [name for name in searchable if name.split(".")[-1] == key.split(".")[-1]]
    hint = f"Did you mean {' or '.join(elsewhere)}?" if elsewhere else suggest(key, searchable)
    expected = "an option that can be searched" if hint else "one of " + ", ".join(searchable)
    return Problem(where, f"the unknown key {shorten(key)}", expected, hint)


def _explain_refusal(key: str, options: Mapping[str, Option]) -> Problem | None:
    """Why an option cannot be searched; None if it can."""
    groups = list_groups(Spec)
    if key not in options and key not in groups:
        return _explain_unknown(KEYS_KEY, key, options)
    entry = options.get(key)
    if entry and "search" in entry.extra:
        return None
    inside = [name for name in _list_searchable(options) if name.startswith(f"{key}.")]
    if entry is None:
        reason, hint = "a group", f"Name its options: {', '.join(inside)}." if inside else ""
    else:
        reason, hint = _name_kind(entry), ""
    return Problem(KEYS_KEY, f"{key}, which is {reason}", "an option that can be searched", hint)


def _name_kind(entry: Option) -> str:
    section = entry.key.split(".")[0]
    if entry.extra.get("secret"):
        return "a secret"
    if entry.extra.get("path"):
        return "a path"
    if get_origin(entry.type) is list or isinstance(entry.default, list):
        return "a list"
    if entry.key == "dataset.label_map":
        return "a mapping"
    if section not in ("model", "dataset", "train"):
        return "no option of training"
    return "part of what is trained, where, or for how long, and no choice between better and worse"


def read_custom_ranges(
    given: Any, options: Mapping[str, Option], searched: Sequence[str], problems: list[Problem]
) -> dict[str, dict[str, Any]]:
    """Dotted key -> {valid_min, valid_max} or {valid_options}, each checked. What is wrong goes to `problems`.

    Taken as {key: {...}}, with dotted or nested keys, and as [{parameter: key, ...}].
    """
    found: dict[str, dict[str, Any]] = {}
    ranges = [(_expand(name), content) for name, content in _list_ranges(given)]
    for key, count in Counter(key for key, _ in ranges if key in options).items():
        if count > 1:
            hint = "A shorthand, a dotted key and nested keys may name the same option."
            problems.append(Problem(f"{RANGES_KEY}: {key}", f"{count} ranges", "one for each option", hint))
    for key, content in ranges:
        where = f"{RANGES_KEY}: {key}" if key else RANGES_KEY
        if key not in options:
            problems.append(_explain_unknown(RANGES_KEY, key, options))
            continue
        if key not in searched:
            hint = f"Add +{key} to {KEYS_KEY}." if "search" in options[key].extra else ""
            problems.append(Problem(where, "a range", "none: the option is not searched", hint))
            continue
        if not isinstance(content, Mapping):
            problems.append(Problem(where, shorten(content), "valid_min and valid_max, or valid_options"))
            continue
        given_fields = {field: value for field, value in content.items() if value is not None and value != []}
        wrong = _find_problem(where, options[key], given_fields)
        if wrong:
            problems.append(wrong)
        else:
            found[key] = given_fields
    return found


def _list_ranges(given: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(given, list):
        for item in given:
            content = dict(item) if isinstance(item, Mapping) else {}
            yield str(content.pop("parameter", "")), content
    elif isinstance(given, Mapping):
        yield from _flatten(given, "")


def _flatten(given: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Keys may be dotted or nested: key=value overrides nest."""
    for name, content in given.items():
        key = f"{prefix}{name}"
        is_group = isinstance(content, Mapping) and content and not set(content) & set(RANGE_FIELDS)
        if is_group and all(isinstance(child, Mapping) for child in content.values()):
            yield from _flatten(content, f"{key}.")
        else:
            yield key, content


def _find_problem(where: str, entry: Option, content: Mapping[str, Any]) -> Problem | None:
    unknown = [field for field in content if field not in RANGE_FIELDS]
    if unknown:
        hint = suggest(str(unknown[0]), RANGE_FIELDS)
        return Problem(where, f"the unknown field {shorten(unknown[0])}", "one of " + ", ".join(RANGE_FIELDS), hint)
    if not content:
        return Problem(where, "nothing", "valid_min and valid_max, or valid_options")
    if "valid_options" in content:
        choices = content["valid_options"]
        if len(content) > 1:
            return Problem(where, "valid_options and bounds", "one of the two")
        is_list = isinstance(choices, list)
        misfits = [(choice, misfit) for choice in choices if (misfit := find_misfit(entry, choice))] if is_list else []
        if misfits:
            return Problem(where, f"the choice {shorten(misfits[0][0])}", misfits[0][1])
        if not is_list or len({coerce(entry, choice) for choice in choices}) < len(choices):
            return Problem(where, f"valid_options {shorten(choices)}", "a list of different values")
        return None
    if entry.extra["search"].choices:
        return Problem(where, "bounds", "valid_options: the option is no number")
    for field, value in content.items():
        if not is_number(value):
            return Problem(f"{where}.{field}", shorten(value), "a finite number")
    low, high = content.get("valid_min"), content.get("valid_max")
    if low is not None and high is not None and low > high:
        return Problem(where, f"valid_min {low} above valid_max {high}", "valid_min at most valid_max")
    return None


def is_number(value: Any) -> bool:
    """Whether this is a finite number that a float can hold: JSON has integers of any length."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST


def coerce(entry: Option, value: Any) -> Any:
    """A value that fits an option, as a number of its type: 1 is 1.0 where it is a float."""
    kind: type = entry.type
    return kind(value) if kind in (int, float) else value


def find_misfit(entry: Option, value: Any) -> str:
    """What an option expects if `value` is nothing for it, else an empty text."""
    choices = list_choices(entry)
    if choices:
        return "" if value in choices else "one of " + ", ".join(choices)
    if entry.type is bool:
        return "" if isinstance(value, bool) else "true or false"
    if not is_number(value) or (entry.type is int and value != int(value)):
        return "a whole number" if entry.type is int else "a finite number"
    if entry.minimum is not None and value < entry.minimum:
        return f"at least {entry.minimum:g}"
    if entry.maximum is not None and value > entry.maximum:
        return f"at most {entry.maximum:g}"
    return ""
