"""Spec files: typed options with their documentation, and one loader that reports every error at once.

A spec class is a pydantic dataclass whose fields are made with `option`. Everything else is derived from these
fields: validation, `key=value` overrides, AutoML's search space, JSON Schema and commented templates (templates.py).
Merge order: defaults <- YAML <- overrides; `origins` remembers where each value came from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from dataclasses import field as dataclass_field
from dataclasses import fields as dataclass_fields
from pathlib import Path
from types import UnionType
from typing import Any, Generic, Literal, TypeVar, get_args, get_origin

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from kinegraph.config_source import MANDATORY, References, list_keys, merge, parse_overrides, read_source
from kinegraph.errors import Problem, SpecError, suggest

SPEC_CONFIG = ConfigDict(extra="forbid", coerce_numbers_to_str=True, allow_inf_nan=False)
SHOWN_CHARACTERS = 80

SpecType = TypeVar("SpecType")


@dataclass(frozen=True)
class SearchRange:
    """Where AutoML looks for an option's value: numbers from `low` to `high`, or `choices`.

    `high` None: a bound that is known only with the data. `log`: uniform in the logarithm. `step`: only low,
    low + step and so on. `powers_of`: only powers of this number. `specials`: values outside the range that are tried
    as well, such as 0 for none. `weights`: how often each choice is drawn. `when`: the option has an effect only while
    each key named here has one of the values named with it. `above`: key of an option that it must exceed.
    """

    low: float | None = None
    high: float | None = None
    log: bool = False
    specials: tuple[float, ...] = ()
    choices: tuple[Any, ...] = ()
    weights: tuple[float, ...] = ()
    step: float | None = None
    powers_of: int | None = None
    when: Mapping[str, tuple[Any, ...]] = dataclass_field(default_factory=dict)
    above: str = ""

    def as_data(self) -> dict[str, Any]:
        """What differs from the defaults, as plain data for JSON."""
        data = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        data["when"] = {key: list(values) for key, values in self.when.items()}
        return {name: value for name, value in data.items() if value or (value == 0 and value is not False)}

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> SearchRange:
        """What `as_data` gave."""
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in data.items()
        }
        values["when"] = {key: tuple(accepted) for key, accepted in data.get("when", {}).items()}
        return cls(**values)


def option(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    automl: bool = False,
    search: SearchRange | None = None,
    popular: bool = False,
    path: str = "",
    secret: bool = False,
) -> Any:
    """A field of a spec class: its default, meaning and range in one place.

    Choices are written as a Literal type. `path` is "input" for something that must exist when it is set and the
    running action uses it, or "output". `search`: AutoML may search it there, and does so by default with `automl`;
    `popular`: shown first; `secret`: its value is never shown.
    """
    if automl and search is None:
        raise TypeError(f"an option that is searched by default needs its range: {help}")
    extra: dict[str, Any] = {"automl_enabled": automl, "popular": popular}
    if path:
        extra["path"] = path
    if secret:
        extra["secret"] = True
    if search:
        extra["search"] = search.as_data()
    arguments: dict[str, Any] = {"description": help, "ge": minimum, "le": maximum, "json_schema_extra": extra}
    if isinstance(default, list | dict):
        return Field(default_factory=lambda: type(default)(default), **arguments)
    return Field(default=default, **arguments)


def group(spec_class: type, help: str) -> Any:
    """A field of a spec class that holds another spec class."""
    return dataclass_field(default_factory=lambda: spec_class(), metadata={"help": help})


@dataclass(frozen=True)
class Option:
    """One leaf of a spec class, as the places that derive something from it see it.

    `extra` holds automl_enabled and popular, and where they were given path, secret and search (a SearchRange).
    """

    key: str
    type: Any
    default: Any
    help: str
    minimum: float | None
    maximum: float | None
    extra: dict[str, Any]


@dataclass(frozen=True)
class LoadedSpec(Generic[SpecType]):
    """A valid spec and, for each key that the user gave a value, its origin: 'file' or 'override'.

    `missing` are the keys that are `???`: an action that needs one must ask for it.
    """

    values: SpecType
    origins: dict[str, str]
    missing: frozenset[str] = frozenset()


def list_options(spec_class: type, prefix: str = "") -> Iterator[Option]:
    """All leaves of a spec class, in order, with dotted keys."""
    infos: dict[str, FieldInfo] = spec_class.__pydantic_fields__  # type: ignore[attr-defined]
    for field in dataclass_fields(spec_class):
        info = infos[field.name]
        if is_dataclass(info.annotation):
            yield from list_options(info.annotation, f"{prefix}{field.name}.")  # type: ignore[arg-type]
            continue
        limits = {type(limit).__name__: limit for limit in info.metadata}
        extra: dict[str, Any] = dict(info.json_schema_extra) if isinstance(info.json_schema_extra, dict) else {}
        if "search" in extra:
            extra["search"] = SearchRange.from_data(extra["search"])
        yield Option(
            key=prefix + field.name,
            type=info.annotation,
            default=info.get_default(call_default_factory=True),
            help=info.description or "",
            minimum=getattr(limits.get("Ge"), "ge", None),
            maximum=getattr(limits.get("Le"), "le", None),
            extra=extra,
        )


def list_groups(spec_class: type, prefix: str = "") -> dict[str, str]:
    """Dotted key -> help text of every group of a spec class."""
    groups = {}
    for field in dataclass_fields(spec_class):
        annotation = spec_class.__pydantic_fields__[field.name].annotation  # type: ignore[attr-defined]
        if is_dataclass(annotation):
            groups[prefix + field.name] = field.metadata.get("help", "")
            groups |= list_groups(annotation, f"{prefix}{field.name}.")  # type: ignore[arg-type]
    return groups


def get_value(spec: Any, key: str) -> Any:
    """The value of a dotted key."""
    for part in key.split("."):
        spec = getattr(spec, part)
    return spec


def find_changes(loaded: LoadedSpec[Any]) -> dict[str, Any]:
    """Dotted key -> value of every option that differs from its default. Secrets are not shown."""
    values = {entry.key: (entry, get_value(loaded.values, entry.key)) for entry in list_options(type(loaded.values))}
    return {
        key: "(set, not shown)" if entry.extra.get("secret") else value
        for key, (entry, value) in values.items()
        if value != entry.default
    }


def load_spec(
    spec_class: type[SpecType],
    source: str | Path | Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
    shorthands: Mapping[str, str] | None = None,
) -> LoadedSpec[SpecType]:
    """Merge defaults, a YAML file (or a mapping) and `key=value` overrides into a checked spec.

    Raises SpecError with all problems at once: unknown keys, wrong types, values out of range, bad choices.
    """
    name = str(source) if isinstance(source, str | Path) else "spec"
    entries = list(list_options(spec_class))
    secrets = [entry.key for entry in entries if entry.extra.get("secret")]
    texts = {_find_text_key(entry) for entry in entries}
    given = read_source(source, texts)
    changes = parse_overrides(overrides, shorthands or {}, texts, secrets)
    origins = {key: "file" for key in list_keys(given)} | {key: "override" for key in list_keys(changes)}
    merged = merge(merge(asdict(spec_class()), given), changes)  # type: ignore[call-overload]
    references = References(merged, secrets)
    values = references.resolve()
    places = {key: "override" if origin == "override" else name for key, origin in origins.items()}
    problems = [Problem(f"{places.get(key, name)}: {key}", *rest) for key, *rest in references.problems]
    missing: set[str] = set()
    prepared = _prepare(values, spec_class, missing)
    try:
        checked = TypeAdapter(spec_class).validate_python(prepared)
    except ValidationError as error:
        problems += [_explain(item, spec_class, places, secrets) for item in _list_errors(error, entries, prepared)]
        refused = SpecError(*problems)
        refused.partial = _load_rest(spec_class, prepared, error, origins, missing)
        raise refused from None
    if problems:
        raise SpecError(*problems)
    origins = {key: origin for key, origin in origins.items() if key not in missing and _is_there(values, key)}
    return LoadedSpec(checked, origins, frozenset(missing))


def _load_rest(
    spec_class: type[SpecType], values: Any, error: ValidationError, origins: dict[str, str], missing: set[str]
) -> LoadedSpec[SpecType] | None:
    """The spec with defaults in the place of what was refused; None if that is not enough."""
    for item in error.errors():
        node = values
        for depth, part in enumerate(item["loc"], 1):
            if not isinstance(node.get(part), dict) or depth == len(item["loc"]):
                node.pop(part, None)
                break
            node = node[part]
    try:
        return LoadedSpec(TypeAdapter(spec_class).validate_python(values), origins, frozenset(missing))
    except ValidationError:
        return None


def _find_text_key(entry: Option) -> str:
    """The key of an option that is text, key.* for a list of text or a mapping by names, or ''."""
    kinds = [kind for kind in (entry.type, *get_args(entry.type)) if get_origin(kind) in (list, dict)]
    if kinds and get_args(kinds[0])[0] is str:
        return f"{entry.key}.*"
    return entry.key if entry.type is str else ""


def _is_there(values: Any, key: str) -> bool:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values is not None


def _prepare(values: Any, spec_class: Any, missing: set[str], prefix: str = "") -> Any:
    """Drop what is not set (null and ???), so that the default stands; help pydantic with what it takes too lightly."""
    if not isinstance(values, dict):
        return values
    infos = spec_class.__pydantic_fields__
    kept = {}
    for key, value in values.items():
        annotation = infos[key].annotation if key in infos else None
        if isinstance(value, str) and value == MANDATORY:
            missing.add(f"{prefix}{key}")
        elif value is None:
            continue
        elif is_dataclass(annotation):
            kept[key] = _prepare(value, annotation, missing, f"{prefix}{key}.")
        elif isinstance(value, bool) and annotation in (int, float):
            kept[key] = str(value).lower()  # pydantic would take true for 1
        elif get_origin(annotation) is Literal and isinstance(value, int | float):
            kept[key] = str(value)  # YAML reads the choice "32" as a number
        else:
            kept[key] = value
    return kept


EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "text",
    "list": "a list, such as [1, 2]",
    "dict": "a mapping, such as {name: 1}",
    "dataclass": "a group of options",
}
"""What pydantic expected, by the first word of the type of its error."""


def _list_errors(error: ValidationError, entries: Sequence[Option], values: Any) -> Iterator[Any]:
    """pydantic's errors. An option that may be of several kinds has one for each kind: they become one."""
    kinds = {tuple(entry.key.split(".")): get_args(entry.type) for entry in entries if _is_of_kinds(entry)}
    told = set()
    for item in error.errors():
        path = next((path for path in kinds if item["loc"][: len(path)] == path), None)
        if path is None:
            yield item
        elif path not in told:
            told.add(path)
            given = values
            for part in path:
                given = given[part]
            expected = " or ".join(_name_kind(kind) for kind in kinds[path])
            yield {"type": "several_kinds", "loc": path, "input": given, "msg": expected}


def _is_of_kinds(entry: Option) -> bool:
    return get_origin(entry.type) is UnionType and type(None) not in get_args(entry.type)


def _name_kind(kind: Any) -> str:
    origin = get_origin(kind) or kind
    if origin is list:
        return f"a list of {_name_kind(get_args(kind)[0]).removeprefix('a ')}s"
    return "a mapping" if origin is dict else EXPECTED.get(origin.__name__, origin.__name__)


def _explain(item: Any, spec_class: type, places: Mapping[str, str], secrets: Sequence[str]) -> Problem:
    """One pydantic error in our words."""
    parts = [str(part) for part in item["loc"] if part != "[key]"]
    key = ".".join(parts)
    known = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    origin = next((places[name] for name in known if name in places), "spec")
    place = f"{origin}: {key if len(key) <= SHOWN_CHARACTERS else key[:SHOWN_CHARACTERS] + '...'}"
    kind, context = item["type"], item.get("ctx", {})
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        return _explain_unknown_key(place, parts, spec_class)
    got = "a value that is not shown" if key in secrets else shorten(item["input"])
    if kind in ("literal_error", "choice"):
        choices = context.get("choices") or find_choices(spec_class, key)
        expected = "one of " + ", ".join(choices) + context.get("more", "")
        return Problem(place, got, expected, suggest(str(item["input"]), choices))
    limits = {"greater_than_equal": f"at least {context.get('ge')}", "less_than_equal": f"at most {context.get('le')}"}
    expected = limits.get(kind) or EXPECTED.get(kind.split("_")[0]) or item["msg"].removeprefix("Input should be ")
    return Problem(place, got, expected)


def shorten(value: Any) -> str:
    """repr(value), cut to what fits in a line."""
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."


def find_choices(spec_class: type, key: str) -> list[str]:
    """The choices of an option; empty if it is free."""
    return next((list_choices(entry) for entry in list_options(spec_class) if entry.key == key), [])


def list_choices(entry: Option) -> list[str]:
    """The choices of an option; empty if it is free."""
    return list(get_args(entry.type)) if get_origin(entry.type) is Literal else []


def _explain_unknown_key(place: str, parts: list[str], spec_class: type) -> Problem:
    prefix = "".join(part + "." for part in parts[:-1])
    keys = [*(entry.key for entry in list_options(spec_class)), *list_groups(spec_class)]
    siblings = [key[len(prefix) :].split(".")[0] for key in keys if key.startswith(prefix)]
    siblings = list(dict.fromkeys(siblings))
    elsewhere = [key for key in keys if key.split(".")[-1] == parts[-1]]
    hint = suggest(parts[-1], siblings) or (f"Did you mean {' or '.join(elsewhere)}?" if elsewhere else "")
    return Problem(place, f"the unknown key {shorten(parts[-1])}", "one of " + ", ".join(siblings), hint)
