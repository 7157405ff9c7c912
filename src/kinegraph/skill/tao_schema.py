"""The schema of an action in TAO's form, strict JSON, with the action's own part of the spec only.

It serves tools that read such bundles, AutoML among them (automl/vendor_schema.py). Beyond the original's fields a leaf
holds automl_minimum, automl_maximum, automl_log and automl_specials, the range worth searching, and
depends_on_values, the values of depends_on with which the option has an effect.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, get_args, get_origin

import yaml

from kinegraph.config import Option, SearchRange, list_choices, list_groups, list_options
from kinegraph.config_source import nest
from kinegraph.skeleton.layouts import LAYOUTS
from kinegraph.spec import REQUIRED, SECTIONS, Spec
from kinegraph.templates import build_template

NETWORK_ARCH = "pose_classification"
COMMON = ("model_name", "encryption_key", "results_dir")
TYPES: dict[type, str] = {bool: "bool", int: "int", float: "float", str: "string", list: "list", dict: "collection"}
OPEN_CHOICES: dict[str, tuple[str, ...]] = {"model.graph_layout": tuple(LAYOUTS)}
"""Options that take other values too, which the form cannot say; their description does."""


def build_tao_schema(action: str) -> dict[str, Any]:
    """The schema of an action. Its root `default` is the spec template, `popular` the options shown first."""
    sections = (*COMMON, *SECTIONS[action])
    entries = {entry.key: entry for entry in list_options(Spec) if entry.key.split(".")[0] in sections}
    groups = {key: help for key, help in list_groups(Spec).items() if key.split(".")[0] in sections}
    template = yaml.safe_load(build_template(action))
    parents = {parent for entry in entries.values() for parent in _find_parents(entry)}
    properties: dict[str, Any] = {}
    for key, help in groups.items():
        _place(properties, key, _describe_group(key, help, action, entries, groups))
    for key, entry in entries.items():
        _place(properties, key, _describe_leaf(entry, key in parents))
    return {
        "type": "object",
        "properties": properties,
        "default": template,
        "automl_default_parameters": list_searched(entries) if "train" in sections else [],
        "automl_disabled_parameters": list_disabled(entries, groups),
        "popular": nest({key: entry.default for key, entry in entries.items() if entry.extra["popular"]}),
        "required": _list_required(action),
        "x_tao_schema": {
            "action": action,
            "model": NETWORK_ARCH,
            "network_arch": NETWORK_ARCH,
            "schema_action": action,
            "schema_version": 1,
            "source": "the spec dataclasses of Kinegraph",
        },
    }


def list_searched(entries: Mapping[str, Option]) -> list[str]:
    """What AutoML searches by default."""
    return sorted(key for key, entry in entries.items() if entry.extra["automl_enabled"])


def list_disabled(entries: Mapping[str, Option], groups: Mapping[str, str]) -> list[str]:
    """What AutoML never searches: groups as such, paths, secrets, lists and mappings."""
    kinds = ("list", "collection")
    leaves = [
        key
        for key, entry in entries.items()
        if entry.extra.get("path") or entry.extra.get("secret") or _name_type(entry) in kinds
    ]
    return sorted([*groups, *leaves])


def _list_required(action: str, prefix: str = "") -> list[str]:
    """The next part of the mandatory keys under a prefix."""
    keys = [key.removeprefix(prefix) for key in REQUIRED[action] if key.startswith(prefix)]
    return list(dict.fromkeys(key.split(".")[0] for key in keys))


def _place(properties: dict[str, Any], key: str, node: dict[str, Any]) -> None:
    *parents, name = key.split(".")
    for part in parents:
        properties = properties[part]["properties"]
    properties[name] = node


def _describe_group(
    key: str, help: str, action: str, entries: Mapping[str, Option], groups: Mapping[str, str]
) -> dict[str, Any]:
    inside = {name: entry for name, entry in entries.items() if name.startswith(f"{key}.")}
    inner_groups = {name: text for name, text in groups.items() if name.startswith(f"{key}.")}
    direct = [name.rpartition(".")[2] for name, entry in inside.items() if entry.extra["popular"]]
    node: dict[str, Any] = {
        "type": "collection",
        "title": key.rpartition(".")[2].replace("_", " "),
        "description": help,
        "automl_enabled": False,
        "default": _descend(nest({name: entry.default for name, entry in inside.items()}), key),
        "properties": {},
    }
    lists = {
        "automl_default_parameters": list_searched(inside),
        "automl_disabled_parameters": list_disabled(inside, inner_groups),
        "popular": direct,
        "required": _list_required(action, f"{key}."),
    }
    return node | {name: values for name, values in lists.items() if values}


def _descend(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree[part]
    return tree


def _describe_leaf(entry: Option, is_parent: bool) -> dict[str, Any]:
    node: dict[str, Any] = {
        "type": _name_type(entry),
        "title": entry.key.rpartition(".")[2].replace("_", " "),
        "description": entry.help,
    }
    if entry.default is not None:
        node["default"] = entry.default
    choices = list_choices(entry) or list(OPEN_CHOICES.get(entry.key, ()))
    optional = {
        "minimum": entry.minimum,
        "maximum": entry.maximum,
        "enum": choices or None,
        "popular": entry.extra["popular"] or None,
        "parent_param": is_parent or None,
    }
    node |= {name: value for name, value in optional.items() if value is not None}
    search = entry.extra.get("search")
    if entry.extra["automl_enabled"] or search is None:
        node["automl_enabled"] = entry.extra["automl_enabled"]
    if search is not None:
        node |= _describe_search(search, choices) | _describe_condition(search)
    return node


def _name_type(entry: Option) -> str:
    if list_choices(entry) or entry.key in OPEN_CHOICES:
        return "categorical"
    kinds = [get_origin(kind) or kind for kind in (entry.type, *get_args(entry.type))]
    return next(TYPES[kind] for kind in kinds if kind in TYPES)


def _describe_search(search: SearchRange, choices: list[Any]) -> dict[str, Any]:
    """The range to search, and how it is drawn from."""
    node: dict[str, Any] = {}
    if search.choices:
        if choices:
            shares = search.weights or (1,) * len(search.choices)
            by_choice = dict(zip(search.choices, shares, strict=True))
            node["option_weights"] = [by_choice.get(choice, 0) for choice in choices]
        return node
    for name, bound in (("automl_minimum", search.low), ("automl_maximum", search.high)):
        if bound is not None and math.isfinite(bound):
            node[name] = bound
    node["automl_log"] = search.log
    if search.specials:
        node["automl_specials"] = list(search.specials)
    if search.powers_of is not None:
        node["math_cond"] = f"^ {search.powers_of}"
    elif search.step is not None:
        node["math_cond"] = f"/ {search.step:g}"
    elif search.above:
        node["math_cond"] = "> depends_on"
    return node


def _describe_condition(search: SearchRange) -> dict[str, Any]:
    """depends_on with the values that matter; a mapping of values where it depends on several options."""
    values = {key: list(accepted) for key, accepted in search.when.items()}
    if search.above:
        return {"depends_on": search.above} | ({"depends_on_values": values} if values else {})
    if len(values) == 1:
        parent, accepted = next(iter(values.items()))
        return {"depends_on": parent, "depends_on_values": accepted}
    return {"depends_on": next(iter(values)), "depends_on_values": values} if values else {}


def _find_parents(entry: Option) -> list[str]:
    search = entry.extra.get("search")
    return [] if search is None else [*search.when, *([search.above] if search.above else [])]
