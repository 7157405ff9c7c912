"""What makes a study the same study: written beside its journal, compared when it goes on."""

from __future__ import annotations

import json
from typing import Any

from kinegraph.errors import Problem, SpecError
from kinegraph.run import Run, redact
from kinegraph.spec import AutomlSpec
from kinegraph.storage import write_json

DEFINITION_NAME = "study.json"
MAY_CHANGE = (
    "results_dir",
    "wandb",
    "evaluate",
    "inference",
    "export",
    "dataset_convert",
    "train.results_dir",
    "train.gpu_ids",
    "train.accelerator",
    "dataset.num_workers",
    "automl.results_dir",
    "automl.automl_max_concurrent",
    "automl.automl_delete_intermediate_ckpt",
    "automl.confirm_seeds",
)
"""Options that decide nothing about the trials."""
MAY_RISE = "automl.automl_max_recommendations"
FIXED_SIZE = ("hyperband", "bohb", "pbt")


def check_definition(run: Run) -> None:
    """Write what defines the study, or refuse to go on with another one, naming every difference. Raises SpecError."""
    path = run.folder / DEFINITION_NAME
    now = _flatten(run.show(redact(run.spec)))
    if not path.exists():
        write_json(path, now)
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SpecError(Problem(str(path), f"a file that cannot be read ({error})", "what a study wrote")) from None
    may_change = (*MAY_CHANGE, MAY_RISE) if _may_rise(run.spec.automl) else MAY_CHANGE
    hint = "Choose another results_dir for a new study, or set it back to go on with this one."
    problems = [
        Problem(key, repr(now.get(key)), f"{before.get(key)!r}, as in {path}", hint)
        for key in sorted({*now, *before})
        if now.get(key) != before.get(key) and not _may_change(key, may_change)
    ]
    if problems:
        raise SpecError(*problems)
    write_json(path, now)


def _may_rise(options: AutomlSpec) -> bool:
    """Whether more trials extend the study.

    Not where their number decides the brackets, nor where a paused trial may be promoted whose checkpoints are gone.
    """
    if options.algorithm == "asha":
        return not options.automl_delete_intermediate_ckpt
    return options.algorithm not in FIXED_SIZE


def _may_change(key: str, may_change: tuple[str, ...]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in may_change)


def _flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        name = f"{prefix}{key}"
        flat |= _flatten(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return flat
