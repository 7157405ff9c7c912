"""`kinegraph skill build` and `check`: the bundle that tells an agent how to use Kinegraph."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from kinegraph.cli.answers import print_json, say
from kinegraph.cli.parameters import AsJson

FAULTY_EXIT_CODE = 2

app = typer.Typer(
    help="Write or check a skill bundle for agents.",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

Folder = Annotated[str, typer.Argument(metavar="DIR", help="Folder of the bundle.")]


@app.command(help="Write the skill bundle, or bring one up to date.")
def build(folder: Folder, as_json: AsJson = False) -> None:
    from kinegraph.skill.build import build_skill

    changes = build_skill(folder)
    if as_json:
        print_json({"status": "ok", "folder": folder, **changes})
        return
    print(f"Wrote {len(changes['written'])} files to {folder}.")
    for name in changes["removed"]:
        print(f"  removed {name}")


@app.command(help="Check a skill bundle of anybody: what parses, what is missing, whether AutoML is runnable.")
def check(folder: Folder, as_json: AsJson = False) -> None:
    from kinegraph.bundle import check_bundle

    report = check_bundle(folder)
    if as_json:
        answer: dict[str, Any] = {"status": "error" if report.problems else "ok"}
        answer |= {"exit_code": FAULTY_EXIT_CODE} if report.problems else {}
        print_json(answer | report.as_data())
    else:
        _print_report(report)
        for problem in report.problems:
            say(f"error: {problem}")
    if report.problems:
        raise typer.Exit(FAULTY_EXIT_CODE)


def _print_report(report: Any) -> None:
    print(f"{report.name or report.folder}: actions {', '.join(report.actions) or 'none'}")
    print(f"  {len(report.parsed)} files parse, {len(report.missing)} are missing, {len(report.problems)} problems")
    if report.automl_runnable:
        print("  AutoML is enabled and runnable.")
    elif report.automl_enabled:
        from kinegraph.policy import NOT_RUNNABLE

        print(f"  {NOT_RUNNABLE}: {report.not_runnable}.")
    else:
        print("  AutoML is not enabled.")
    for notice in report.notices:
        print(f"  notice: {notice}")
