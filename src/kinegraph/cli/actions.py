"""A command for each action: `kinegraph ACTION -e spec.yaml [key=value ...]`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from kinegraph.run import Result

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
        from kinegraph.run import find_launched_rank, show_messages

        show_messages(json_progress)
        changes = collect_overrides(overrides, results_dir, key)
        with explain_end(name, has_spec=spec is not None or bool(overrides)):
            result = run_action(name, spec, changes)
        if find_launched_rank() > 0:
            return
        answer_result(name, result, as_json)
        if name == "train" and not as_json:
            say(SEARCH_HINT.format(spec=f" -e {spec}" if spec else ""))

    return command


for _name, _help in ACTION_HELP.items():
    if _name != "automl":
        app.command(_name, help=_help)(_make_action_command(_name))


def answer_result(action: str, result: Result, as_json: bool) -> None:
    """What an action gives back, on stdout."""
    if as_json:
        print_json({"status": "ok", "action": action, "metrics": result.metrics, "files": result.files})
    else:
        print(format_result(result.metrics, result.files))


@contextmanager
def explain_end(action: str, has_spec: bool) -> Iterator[None]:
    """SIGTERM becomes its exit code; an error of a command without a spec says where to get one."""
    from kinegraph.run import Terminated

    try:
        yield
    except Terminated:
        raise typer.Exit(EXIT_TERMINATED) from None
    except SpecError as error:
        raise error if has_spec else _add_template_hint(error, action) from None


def _add_template_hint(error: SpecError, action: str) -> SpecError:
    hint = f"`kinegraph template {action} -o {action}.yaml` writes one to fill in."
    return SpecError(*error.problems, Problem("spec", "no spec file", "-e SPEC.YAML, or all that is missing", hint))
