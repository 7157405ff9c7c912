"""What several commands take: spec, overrides, folders, keys, and how they answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated

import typer

from kinegraph.cli.answers import say
from kinegraph.errors import look_up

ACTION_HELP = {
    "train": "Train a classifier once, or go on with a stopped run.",
    "automl": "Search for better options by many trainings.",
    "evaluate": "Measure a model on labelled clips.",
    "inference": "Classify clips.",
    "export": "Write a model as ONNX.",
    "dataset_convert": "Cut recordings into windows: arrays and an index.",
}
KEY_ADVICE = (
    "notice: others on this machine can see a key that stands on a command line; "
    "the environment variable KINEGRAPH_ENCRYPTION_KEY is safer."
)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Options of the spec, such as train.num_epochs=20.", show_default=False),
]
SpecFile = Annotated[
    str | None,
    typer.Option(
        "-e", "--experiment_spec", "--experiment_spec_file", metavar="SPEC.YAML", help="Spec file.", show_default=False
    ),
]
ResultsDir = Annotated[
    str | None,
    typer.Option("-r", "--results_dir", metavar="FOLDER", help="The same as results_dir=FOLDER.", show_default=False),
]
Key = Annotated[
    str | None,
    typer.Option(
        "-k",
        "--key",
        metavar="KEY",
        help="Encryption key. Others can see it here: prefer KINEGRAPH_ENCRYPTION_KEY.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Answer with JSON on stdout.")]
JsonProgress = Annotated[bool, typer.Option("--json-progress", help="Progress and messages as JSON lines on stderr.")]
OutputFile = Annotated[
    str | None, typer.Option("-o", "--output", metavar="FILE", help="Write to a new file.", show_default=False)
]
ActionName = Annotated[str, typer.Argument(metavar="ACTION", help=", ".join(ACTION_HELP))]


def check_action(name: str) -> None:
    """Refuse what is no action, with the nearest name."""
    look_up(ACTION_HELP, name, "action")


def collect_overrides(overrides: Sequence[str] | None, results_dir: str | None, key: str | None) -> list[str]:
    """Short options first, so that a full key=value wins. Quoted, so that YAML does not take a text for a number."""
    changes = [] if results_dir is None else [f"results_dir={json.dumps(results_dir)}"]
    changes += [] if key is None else [f"encryption_key={json.dumps(key)}"]
    changes += overrides or []
    if any(change.startswith("encryption_key=") for change in changes):
        say(KEY_ADVICE)
    return changes
