"""`kinegraph benchmark`: how fast a model answers, backend by backend."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Annotated, Any

import typer

from kinegraph.cli.actions import EXIT_TERMINATED
from kinegraph.cli.answers import make_printable, print_json, say
from kinegraph.cli.parameters import KEY_ADVICE, AsJson, Key

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: EXIT_TERMINATED}
ENDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}

app = typer.Typer()


@app.command(help="Measure how fast each backend answers.")
def benchmark(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model: .pth or .onnx.")],
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="CLIPS.npy",
            help="Clips (N, C, T, V, M) to take, through the model's input pipeline. Default: random numbers, without.",
            show_default=False,
        ),
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option("--backend", metavar="NAME", help="Only this one; can be given again.", show_default=False),
    ] = None,
    batch: Annotated[str, typer.Option("--batch", metavar="N,N,...", help="Clips at once.")] = "1,8,32",
    threads: Annotated[
        str | None,
        typer.Option(
            "--threads", metavar="N,N,...", help="Threads of the CPU; default: 1, and all cores.", show_default=False
        ),
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option("--frames", metavar="N", help="Of a clip; default: the model's, or 300.", show_default=False),
    ] = None,
    people: Annotated[
        int | None, typer.Option("--people", metavar="N", help="In a clip; default: 1.", show_default=False)
    ] = None,
    seconds: Annotated[float, typer.Option("--seconds", metavar="S", help="Time for each configuration.")] = 2.0,
    device: Annotated[
        str, typer.Option("--device", metavar="NAME", help="cpu, cuda, cuda:1, ...", show_default=False)
    ] = "",
    output: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FOLDER",
            help="Write benchmark.json and benchmark.png there.",
            show_default=False,
        ),
    ] = None,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    from kinegraph.benchmark.facts import read_facts
    from kinegraph.benchmark.machine import describe_machine
    from kinegraph.benchmark.report import build_report
    from kinegraph.benchmark.session import Session
    from kinegraph.benchmark.settings import check_folder, make_settings
    from kinegraph.benchmark.table import Progress, print_report
    from kinegraph.spec import KEY_VARIABLE
    from kinegraph.storage import make_folder

    settings = make_settings(model, backend, batch, threads, data, frames, people, seconds, device)
    if output is not None:
        check_folder(output)
        make_folder(Path(output))
    if key:
        say(KEY_ADVICE)
    machine = describe_machine()  # before the measurement, which is a load itself
    key = key or os.environ.get(KEY_VARIABLE, "")
    session = Session(settings, read_facts(settings, key), key)
    progress = Progress(say)
    session.run(progress)
    progress.clear()
    report = build_report(settings, session.facts, machine, session)
    files = _write_files(output, report)
    if as_json:
        print_json({"status": "ok", **report, "files": files})
    else:
        print_report(make_all_printable(report))
        for path in files.values():
            say(f"Wrote {path}.")
    if session.stop_signal:
        say(ENDS[signal.Signals(session.stop_signal)])
        # Not typer.Exit: for these codes that would put a second JSON document behind the report
        raise SystemExit(EXIT_CODES[signal.Signals(session.stop_signal)])


def _write_files(output: str | None, report: dict[str, Any]) -> dict[str, str]:
    """role -> path of what was written."""
    if output is None:
        return {}
    from kinegraph.benchmark.plot import plot_report
    from kinegraph.benchmark.settings import PLOT_NAME, REPORT_NAME
    from kinegraph.storage import write_json

    paths = {"report": Path(output) / REPORT_NAME, "plot": Path(output) / PLOT_NAME}
    write_json(paths["report"], report)
    plot_report(paths["plot"], make_all_printable(report))
    return {role: str(path) for role, path in paths.items()}


def make_all_printable(data: Any) -> Any:
    """The same data with every text as a terminal may show it: a model file says what it likes about itself."""
    if isinstance(data, dict):
        return {name: make_all_printable(value) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return [make_all_printable(value) for value in data]
    return make_printable(data) if isinstance(data, str) else data
