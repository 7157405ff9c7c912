"""What is derived from the spec for people and editors: commented templates and JSON Schemas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import yaml
from pydantic import TypeAdapter

from kinegraph.config import MANDATORY, Option, list_choices, list_groups, list_options
from kinegraph.spec import REQUIRED, SECTIONS, Spec

COMMENT_COLUMN = 42
TEMPLATE_VALUES: dict[str, Any] = {"results_dir": "./results", "wandb.enable": False}
LEFT_OUT_OF_TEMPLATES = ("encryption_key", "dataset.num_classes", "dataset.label_map")
"""Stated in a spec, the classes become a claim that the data must meet, and a key may end up in somebody's hands."""


def build_template(action: str, known: Mapping[str, Any] | None = None, left_out: Sequence[str] = ()) -> str:
    """A commented YAML spec for an action, with ??? for what only the user can know.

    `known` are values that are known already (dotted keys), `left_out` options to comment out as well.
    """
    known = known or {}
    values = TEMPLATE_VALUES | dict.fromkeys(REQUIRED[action], MANDATORY)
    if action == "train":
        values["dataset.label_map"] = {f"class_{label}": label for label in range(6)}
    left_out = [key for key in (*LEFT_OUT_OF_TEMPLATES, *left_out) if key not in known]
    lines = [
        f"# Spec of `kinegraph {action}`. Fill in each ???, then run: kinegraph {action} -e FILE",
        f"# Any option can also stand on the command line: kinegraph {action} -e FILE key=value",
    ]
    if action in ("evaluate", "inference", "export"):
        lines += [
            "# The checkpoint knows the model and its classes. For one of another tool add the sections",
            "# model and dataset of `kinegraph template train`.",
        ]
    sections = ("model_name", "encryption_key", "results_dir", *SECTIONS[action])
    return "\n".join(lines) + "\n\n" + write_template(Spec, sections, values | dict(known), left_out)


def build_schema(action: str) -> dict[str, Any]:
    """The JSON Schema of a spec for an action. It knows all sections, since one file may serve every action."""
    return build_json_schema(Spec, f"kinegraph {action}", REQUIRED[action])


def build_json_schema(spec_class: type, title: str, required: Sequence[str] = ()) -> dict[str, Any]:
    """A standard JSON Schema (2020-12) of a spec class; `required` are dotted keys that must be present."""
    schema: dict[str, Any] = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    schema |= TypeAdapter(spec_class).json_schema()
    schema["title"] = title
    schema["default"] = asdict(spec_class())  # type: ignore[call-overload]
    leaves = {entry.key: entry for entry in list_options(spec_class)}
    groups = list_groups(spec_class)
    for key in [*groups, *leaves]:
        node = _find_property(schema, key.split("."))
        if key in groups:
            node["description"] = groups[key]
        else:
            node["default"] = leaves[key].default
            _allow_null(node)
    for key in required:
        _require(schema, key.split("."))
    return schema


def _find_property(schema: dict[str, Any], parts: list[str]) -> dict[str, Any]:
    node = schema
    for part in parts:
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rpartition("/")[2]]
        node = node["properties"][part]
    return node


def _allow_null(node: dict[str, Any]) -> None:
    """In a spec, null means that an option is not set."""
    if "const" in node:
        node["enum"] = [node.pop("const")]
    if isinstance(node.get("type"), str):
        node["type"] = [node["type"], "null"]
    if "anyOf" in node and {"type": "null"} not in node["anyOf"]:
        node["anyOf"] = [*node["anyOf"], {"type": "null"}]
    if "enum" in node and None not in node["enum"]:
        node["enum"] = [*node["enum"], None]


def _require(schema: dict[str, Any], parts: list[str]) -> None:
    node: dict[str, Any] = {}
    branch = node
    for index, part in enumerate(parts):
        branch["required"] = [part]
        if index < len(parts) - 1:
            branch["properties"] = {part: {}}
            branch = branch["properties"][part]
    schema.setdefault("allOf", []).append(node)


def write_template(
    spec_class: type, sections: Sequence[str], values: Mapping[str, Any], left_out: Sequence[str] = ()
) -> str:
    """A complete YAML spec of the named sections in their order, each option with its meaning, range and choices.

    `values` replaces defaults (dotted keys); the options in `left_out` are commented out.
    """
    groups = list_groups(spec_class)
    lines: list[str] = []
    open_groups: list[str] = []
    order = {section: position for position, section in enumerate(sections)}
    entries = [entry for entry in list_options(spec_class) if entry.key.split(".")[0] in order]
    for entry in sorted(entries, key=lambda entry: order[entry.key.split(".")[0]]):
        parts = entry.key.split(".")
        for depth in range(1, len(parts)):
            path = ".".join(parts[:depth])
            if path not in open_groups:
                open_groups.append(path)
                opening = f"{'  ' * (depth - 1)}{parts[depth - 1]}:"
                lines += ["", f"# {groups[path]}", opening] if depth == 1 else [_comment(opening, groups[path])]
        mark = "# " if entry.key in left_out else ""
        value = _write_value(values.get(entry.key, entry.default))
        lines.append(_comment(f"{'  ' * (len(parts) - 1)}{mark}{parts[-1]}: {value}", describe_option(entry)))
    return "\n".join(lines) + "\n"


def _write_value(value: Any) -> str:
    if value == "":
        return '""'
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...")


def _comment(text: str, comment: str) -> str:
    return f"{text:<{COMMENT_COLUMN}}  # {comment}"


def describe_option(entry: Option) -> str:
    """The help text with the range and the choices of an option."""
    notes = [entry.help]
    choices = list_choices(entry)
    if choices:
        notes.append("one of " + ", ".join(choices))
    if entry.minimum is not None or entry.maximum is not None:
        low = "" if entry.minimum is None else f"{entry.minimum:g}"
        high = "" if entry.maximum is None else f"{entry.maximum:g}"
        notes.append(f"{low}..{high}" if low and high else f"at least {low}" if low else f"at most {high}")
    return "; ".join(notes)
