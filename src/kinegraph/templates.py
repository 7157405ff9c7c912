"""What is derived from the spec for people and editors: commented templates and JSON Schemas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kinegraph.config import MANDATORY, build_json_schema, write_template
from kinegraph.spec import REQUIRED, SECTIONS, Spec

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
