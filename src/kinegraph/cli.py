"""The command line: `kinegraph ACTION -e spec.yaml [key=value ...]` and what helps to write a spec.

Nothing heavy is imported before a command needs it: help, validate, template, schema and layouts answer at once.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

# Pydantic would look for plugins in every installed package, which costs as much as all else at the start.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")

import typer
from typer.main import get_command

from kinegraph import __version__
from kinegraph.errors import KinegraphError, Problem, SpecError, UserError

ACTION_HELP = {
    "train": "Train a classifier, or go on with a stopped run.",
    "evaluate": "Measure a model on labelled clips.",
    "inference": "Classify clips.",
    "export": "Write a model as ONNX.",
    "dataset_convert": "Cut recordings into windows: arrays and an index.",
}
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143
STOPPED = {EXIT_INTERRUPTED: "interrupted", EXIT_TERMINATED: "terminated"}
KEY_ADVICE = (
    "notice: others on this machine can see a key that stands on a command line; "
    "the environment variable KINEGRAPH_ENCRYPTION_KEY is safer."
)

app = typer.Typer(
    help="Classify human motion from skeleton sequences.",
    epilog="Start with `kinegraph demo`, or with `kinegraph template train -o train.yaml`.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
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
OutputFile = Annotated[
    str | None, typer.Option("-o", "--output", metavar="FILE", help="Write to a new file.", show_default=False)
]
ActionName = Annotated[str, typer.Argument(metavar="ACTION", help=", ".join(ACTION_HELP))]


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


def _make_action_command(name: str) -> Callable[..., None]:
    def command(
        overrides: Overrides = None,
        spec: SpecFile = None,
        results_dir: ResultsDir = None,
        key: Key = None,
        as_json: AsJson = False,
    ) -> None:
        from kinegraph.actions import run_action
        from kinegraph.run import Terminated, find_launched_rank, show_messages

        show_messages()
        changes = _collect_overrides(overrides, results_dir, key)
        try:
            result = run_action(name, spec, changes)
        except Terminated:
            raise typer.Exit(EXIT_TERMINATED) from None
        except SpecError as error:
            raise _add_template_hint(error, name) if spec is None and not overrides else error from None
        if find_launched_rank() > 0:
            return
        if as_json:
            _print_json({"status": "ok", "action": name, "metrics": result.metrics, "files": result.files})
        else:
            print(_format_result(result.metrics, result.files))

    return command


for _name, _help in ACTION_HELP.items():
    app.command(_name, help=_help)(_make_action_command(_name))


@app.command(help="Check a spec without running anything.")
def validate(
    overrides: Overrides = None,
    spec: SpecFile = None,
    action: Annotated[
        str | None,
        typer.Option("--action", metavar="ACTION", help="Also check what this action needs.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    from kinegraph.config import find_changes
    from kinegraph.spec import read_spec

    if action is not None:
        _check_action(action)
    loaded = read_spec(spec, overrides or [], action)
    changes = find_changes(loaded)
    if as_json:
        values = {key: {"value": value, "origin": loaded.origins.get(key, "default")} for key, value in changes.items()}
        _print_json({"status": "ok", "action": action, "values": values})
        return
    name = spec or "the overrides"
    print(f"OK: {name}, ready for {action}." if action else f"OK: {name}. --action checks what an action needs.")
    if changes:
        print("\nOther than the defaults:")
    for key, value in changes.items():
        origin = " (override)" if loaded.origins.get(key) == "override" else ""
        print(f"  {key} = {json.dumps(value, ensure_ascii=False)}{origin}")


@app.command(help="Write a commented spec to fill in.")
def template(action: ActionName, output: OutputFile = None) -> None:
    from kinegraph.templates import build_template

    _check_action(action)
    _deliver(build_template(action), output)


@app.command(help="Write the JSON Schema of a spec.")
def schema(action: ActionName, output: OutputFile = None) -> None:
    from kinegraph.templates import build_schema

    _check_action(action)
    _deliver(_format_json(build_schema(action)), output)


@app.command(help="List the skeleton layouts, or show one.")
def layouts(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A name or a YAML file.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    from kinegraph.skeleton.layouts import LAYOUTS, get_layout

    if name is not None:
        layout = get_layout(name, "layout")
        _print_json(layout.to_dict()) if as_json else print(_format_layout(layout))
    elif as_json:
        _print_json([layout.to_dict() for layout in LAYOUTS.values()])
    else:
        for layout in LAYOUTS.values():
            print(f"{layout.name:<16}{layout.num_joints:>3} joints, centre {layout.joints[layout.centre]}")
        print("\n`kinegraph layouts NAME` shows one. A layout of your own: model.graph_layout: my_layout.yaml")


@app.command(help="Show what is in a data set.")
def inspect(
    data: Annotated[str, typer.Argument(metavar="DATA.npy", help="Array (N, C, T, V, M).")],
    labels: Annotated[
        str | None, typer.Argument(metavar="LABELS", help="Labels: .pkl, .json, .npz or .csv.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    from kinegraph.data.inspect import format_report, inspect_dataset

    report = inspect_dataset(data, labels)
    _print_json(report) if as_json else print(format_report(report))


@app.command(help="Try every action on generated data; takes some minutes.")
def demo(
    folder: Annotated[
        str, typer.Option("--folder", metavar="FOLDER", help="Where everything goes.")
    ] = "kinegraph-demo",
) -> None:
    from kinegraph.demo import run_demo
    from kinegraph.run import Terminated

    try:
        run_demo(Path(folder))
    except Terminated:
        raise typer.Exit(EXIT_TERMINATED) from None


def _check_action(name: str) -> None:
    from kinegraph.errors import look_up

    look_up(ACTION_HELP, name, "action")


def _collect_overrides(overrides: Sequence[str] | None, results_dir: str | None, key: str | None) -> list[str]:
    """Short options first, so that a full key=value wins. Quoted, so that YAML does not take a text for a number."""
    changes = [] if results_dir is None else [f"results_dir={json.dumps(results_dir)}"]
    changes += [] if key is None else [f"encryption_key={json.dumps(key)}"]
    changes += overrides or []
    if any(change.startswith("encryption_key=") for change in changes):
        _say(KEY_ADVICE)
    return changes


def _add_template_hint(error: SpecError, action: str) -> SpecError:
    hint = f"`kinegraph template {action} -o {action}.yaml` writes one to fill in."
    return SpecError(*error.problems, Problem("spec", "no spec file", "-e SPEC.YAML, or all that is missing", hint))


def _format_result(metrics: dict[str, Any], files: dict[str, str]) -> str:
    lines = []
    numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float | str)}
    for title, values in (("Metrics", numbers), ("Files", files)):
        width = max((len(name) for name in values), default=0)
        lines += [f"{title}:"] if values else []
        lines += [f"  {name:<{width}}  {_format_number(value)}" for name, value in values.items()]
    return "\n".join(lines)


def _format_number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _format_layout(layout: Any) -> str:
    def name_pairs(pairs: Sequence[tuple[int, int]], sign: str) -> str:
        return ", ".join(f"{layout.joints[first]} {sign} {layout.joints[second]}" for first, second in pairs)

    lines = [f"{layout.name}: {layout.num_joints} joints, centre {layout.centre} ({layout.joints[layout.centre]})"]
    lines += ["", "Joints"]
    lines += [f"  {index:>3}  {joint}" for index, joint in enumerate(layout.joints)]
    lines += ["", "Edges", "  " + ", ".join(f"{first}-{second}" for first, second in layout.edges)]
    lines += ["", "Bones (child > parent)", "  " + name_pairs(layout.bones, ">")]
    lines += ["", "Symmetric", "  " + (name_pairs(layout.symmetric, "|") or "none")]
    return "\n".join(lines)


def _deliver(text: str, output: str | None) -> None:
    """Print a text or write it to a file that is not there yet."""
    if output is None:
        print(text.removesuffix("\n"))
        return
    from kinegraph.storage import make_folder, write_atomically

    path = Path(output)
    if os.path.lexists(path):
        raise UserError(Problem(output, "a file that is there already", "a new file", "Choose another name."))
    make_folder(path.absolute().parent)
    with write_atomically(path, "w") as file:
        file.write(text.removesuffix("\n") + "\n")
    _say(f"Wrote {output}.")


def _format_json(data: Any) -> str:
    from kinegraph.storage import dump_json

    return dump_json(data, indent=2)


def _print_json(data: Any) -> None:
    print(_format_json(data))


def _say(message: str) -> None:
    print(message, file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code: 0, 1 failure, 2 user error, 130 interrupt, 143 SIGTERM."""
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    name = Path(sys.argv[0]).name if sys.argv and not sys.argv[0].endswith(".py") else "kinegraph"
    as_json = "--json" in given
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
        _say(STOPPED[code])
        if as_json:
            _print_json({"status": "error", "exit_code": code, "problems": []})
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
        _print_json({"status": "error", "exit_code": code, "problems": data})
        return code
    for problem in problems:
        _say(f"error: {_describe(error, problem)}")
    return code


def _describe(error: Exception, problem: Problem) -> str:
    if isinstance(error, KinegraphError):
        return str(problem)
    return problem.got + ("" if problem.got.endswith(("?", ".")) else ".") + f" {problem.hint}"


def _point_to_help(given: Sequence[str]) -> str:
    known = [command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands]
    command = f" {given[0]}" if given and given[0] in known else ""
    return f"See `kinegraph{command} --help`."


if __name__ == "__main__":
    sys.exit(main())
