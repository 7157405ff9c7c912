"""A command for each action: `kinegraph ACTION -e spec.yaml [key=value ...]`."""

from __future__ import annotations

from collections.abc import Callable

import typer

from kinegraph.cli.answers import format_result, print_json, say
from kinegraph.cli.parameters import (
    ACTION_HELP,
    AsJson,
    JsonProgress,
    Key,
    Overrides,
    ResultsDir,
    SpecFile,
    collect_overrides,
)
from kinegraph.errors import Problem, SpecError

EXIT_TERMINATED = 143
SEARCH_HINT = "To search for better options: kinegraph automl{spec} (see --dry-run)."

app = typer.Typer()


def _make_action_command(name: str) -> Callable[..., None]:
    def command(
        overrides: Overrides = None,
        spec: SpecFile = None,
        results_dir: ResultsDir = None,
        key: Key = None,
        as_json: AsJson = False,
        json_progress: JsonProgress = False,
    ) -> None:
        from kinegraph.actions import run_action
        from kinegraph.run import Terminated, find_launched_rank, show_messages

        show_messages(json_progress)
        changes = collect_overrides(overrides, results_dir, key)
        try:
            result = run_action(name, spec, changes)
        except Terminated:
            raise typer.Exit(EXIT_TERMINATED) from None
        except SpecError as error:
            raise add_template_hint(error, name) if spec is None and not overrides else error from None
        if find_launched_rank() > 0:
            return
        if as_json:
            print_json({"status": "ok", "action": name, "metrics": result.metrics, "files": result.files})
            return
        print(format_result(result.metrics, result.files))
        if name == "train":
            say(SEARCH_HINT.format(spec=f" -e {spec}" if spec else ""))

    return command


for _name, _help in ACTION_HELP.items():
    if _name != "automl":
        app.command(_name, help=_help)(_make_action_command(_name))


def add_template_hint(error: SpecError, action: str) -> SpecError:
    """For a command without a spec: where to get one."""
    hint = f"`kinegraph template {action} -o {action}.yaml` writes one to fill in."
    return SpecError(*error.problems, Problem("spec", "no spec file", "-e SPEC.YAML, or all that is missing", hint))
