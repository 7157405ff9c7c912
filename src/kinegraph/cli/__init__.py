"""The command line: `kinegraph ACTION -e spec.yaml [key=value ...]` and what helps to write a spec.

Nothing heavy is imported before a command needs it: help, validate, template, schema and layouts answer at once.
"""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

# Pydantic would look for plugins in every installed package, which costs as much as all else at the start.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")

import typer
from typer.main import get_command

from kinegraph import __version__
from kinegraph.cli import actions, automl, benchmark, jobs, live, skill, spec_files
from kinegraph.cli.actions import EXIT_TERMINATED
from kinegraph.cli.answers import print_json, say
from kinegraph.errors import KinegraphError, Problem

EXIT_INTERRUPTED = 130
STOPPED = {EXIT_INTERRUPTED: "interrupted", EXIT_TERMINATED: "terminated"}

app = typer.Typer(
    help="Classify human motion from skeleton sequences.",
    epilog="Start with `kinegraph demo`, or with `kinegraph template train -o train.yaml`.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"kinegraph {__version__}")
        raise typer.Exit


@app.callback()
def _start(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


for _module in (actions, automl, spec_files, live, benchmark):
    app.add_typer(_module.app)
app.add_typer(jobs.app, name="jobs", short_help="Run actions as jobs that find each other's results.")
app.add_typer(skill.app, name="skill", short_help="Write or check the bundle that an AI agent reads.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code: 0, 1 failure, 2 user error, 130 interrupt, 143 SIGTERM."""
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    name = Path(sys.argv[0]).name if sys.argv and not sys.argv[0].endswith(".py") else "kinegraph"
    as_json = "--json" in given
    if isinstance(sys.stdout, io.TextIOWrapper):
        # as stderr does: a character that the terminal does not know costs that character, not the answer
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = get_command(app).main(given, prog_name=name, standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        # whoever read the answer has seen enough; the interpreter must not complain about it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        return _report(error, given, as_json)
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    if code in STOPPED:
        say(STOPPED[code])
        if as_json:
            print_json({"status": "error", "exit_code": code, "problems": []})
    return code if isinstance(code, int) else 0


def _report(error: Exception, given: Sequence[str], as_json: bool) -> int:
    """Say what went wrong, each problem on a line of stderr or as JSON on stdout; give the exit code."""
    problems: Sequence[Problem] = ()
    if isinstance(error, KinegraphError):
        code, problems = error.exit_code, error.problems
    elif isinstance(error, typer.TyperException):
        code, problems = (
            2,
            [Problem("command line", error.format_message(), "a command", _point_to_help(given))],
        )
    else:
        code = 1
        hint = " ".join(getattr(error, "__notes__", ())) or "KINEGRAPH_DEBUG=1 shows the traceback."
        problems = [Problem("unexpected error", f"{type(error).__name__}: {error}", "no error", hint)]
    if os.environ.get("KINEGRAPH_DEBUG") == "1" and not isinstance(error, typer.TyperException):
        traceback.print_exception(error)
    if as_json:
        data = [
            {"where": item.where, "got": item.got, "expected": item.expected, "hint": item.hint} for item in problems
        ]
        print_json({"status": "error", "exit_code": code, "problems": data})
        return code
    for problem in problems:
        say(f"error: {_describe(error, problem)}")
    return code


def _describe(error: Exception, problem: Problem) -> str:
    if isinstance(error, KinegraphError):
        return str(problem)
    return problem.got + ("" if problem.got.endswith(("?", ".")) else ".") + f" {problem.hint}"


def _point_to_help(given: Sequence[str]) -> str:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    command = f" {given[0]}" if given and given[0] in commands else ""
    return f"See `kinegraph{command} --help`."


if __name__ == "__main__":
    sys.exit(main())
