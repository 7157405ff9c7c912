"""`kinegraph automl`: show the plan of a search, ask, then run it."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from kinegraph.cli.actions import answer_result, explain_end
from kinegraph.cli.answers import print_json
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

app = typer.Typer()

DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
Algorithms = Annotated[bool, typer.Option("--algorithms", help="List the algorithms and stop.")]


@app.command("automl", help=ACTION_HELP["automl"])
def automl(
    overrides: Overrides = None,
    spec: SpecFile = None,
    results_dir: ResultsDir = None,
    key: Key = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    algorithms: Algorithms = False,
    as_json: AsJson = False,
    json_progress: JsonProgress = False,
) -> None:
    if algorithms:
        _list_algorithms(as_json)
        return
    from kinegraph.actions import run_action
    from kinegraph.automl.plan import make_plan
    from kinegraph.run import show_messages
    from kinegraph.spec_reading import read_spec

    show_messages(json_progress)
    changes = collect_overrides(overrides, results_dir, key)
    with explain_end("automl", has_spec=spec is not None or bool(overrides)):
        plan = make_plan(read_spec(spec, changes, "automl"))
        if dry_run and as_json:
            print_json({"status": "ok", "action": "automl", "dry_run": True, "plan": plan})
            return
        _show_plan(plan, json_progress)
        if dry_run:
            return
        if not (yes or _confirm()):
            if as_json:
                print_json({"status": "ok", "action": "automl", "started": False})
            return
        result = run_action("automl", spec, changes)
    answer_result("automl", result, as_json)


def _show_plan(plan: dict[str, Any], as_event: bool) -> None:
    from kinegraph.automl.plan import format_plan
    from kinegraph.storage import dump_json

    print(dump_json({"event": "plan", "plan": plan}) if as_event else format_plan(plan), file=sys.stderr, flush=True)


def _confirm() -> bool:
    """Ask at a terminal; go ahead where nobody can answer."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return True
    try:
        return typer.confirm("Start the search?", default=True, err=True)
    except typer.Abort:  # Ctrl-C or Ctrl-D at the question
        raise KeyboardInterrupt from None


def _list_algorithms(as_json: bool) -> None:
    from kinegraph.automl.plan import list_algorithms

    rows = list_algorithms()
    if as_json:
        print_json({"status": "ok", "algorithms": rows})
        return
    for row in rows:
        print(f"{row['name']:<12}{', '.join(row['engines']):<12}{row['help']}")
