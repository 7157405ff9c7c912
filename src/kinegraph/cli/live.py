"""`kinegraph live`: frames in, segments out as they happen."""

from __future__ import annotations

import gc
import json
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from kinegraph.cli.actions import EXIT_TERMINATED
from kinegraph.cli.answers import say
from kinegraph.cli.parameters import Key, Overrides, SpecFile, collect_overrides
from kinegraph.errors import Problem, UserError

if TYPE_CHECKING:
    from kinegraph.spec import Spec

RARE_COLLECTION = (50_000, 20, 20)
"""Parsed frames are many small lists without cycles: looking for cycles among them took a third of the parsing."""

app = typer.Typer()


@app.command(help="Say who does what while frames come in, as JSON lines.")
def live(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="Frames as JSON lines: a file, - (stdin), or tcp://127.0.0.1:PORT, unix:///PATH."
        ),
    ],
    overrides: Overrides = None,
    model: Annotated[
        str | None,
        typer.Option("-m", "--model", metavar="MODEL", help="Model: .pth or .onnx.", show_default=False),
    ] = None,
    spec: SpecFile = None,
    key: Key = None,
    output: Annotated[
        str | None,
        typer.Option("-o", "--output", metavar="FILE", help="Events go to a new file, not to stdout."),
    ] = None,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Also the probabilities of all classes, frame by frame.")
    ] = False,
    realtime: Annotated[
        bool, typer.Option("--realtime", help="Follow the time stamps of a file, as if it happened now.")
    ] = False,
    allow_remote: Annotated[
        bool, typer.Option("--allow-remote", help="Let other machines connect to a tcp:// address.")
    ] = False,
) -> None:
    from kinegraph.live.session import Session, stop_on_signals
    from kinegraph.live.sources import SocketSource, open_source
    from kinegraph.spec_reading import read_spec

    changes = collect_overrides(overrides, None, key)
    changes += [] if model is None else [f"live.checkpoint={json.dumps(model)}"]
    values = read_spec(spec, changes).values
    with ExitStack() as stack:
        stop = stack.enter_context(stop_on_signals())
        frames = open_source(source, allow_remote)
        stack.callback(frames.close)
        if realtime and frames.is_live:
            raise UserError(Problem("--realtime", f"the source {source}", "a file: what is live has its own speed"))
        engine, description = _open_engine(values, probabilities)
        file = _open_output(output, stack)
        write = _make_writer(file)
        write([description])
        if isinstance(frames, SocketSource):
            say(f"Listening on {frames.address}; Ctrl-C ends it.")
        stack.callback(gc.set_threshold, *gc.get_threshold())
        gc.set_threshold(*RARE_COLLECTION)
        session = Session(frames, engine, write, say, realtime)
        counts = session.run(stop)
        say(describe_counts(counts))
    if stop.number == signal.SIGINT:
        raise KeyboardInterrupt
    if stop.number:
        raise typer.Exit(EXIT_TERMINATED)


def _open_engine(spec: Spec, tells_probabilities: bool) -> tuple[Any, dict[str, Any]]:
    """The engine, and the event that says what it works with."""
    from kinegraph.live.engine import LiveEngine
    from kinegraph.online import TrackPool, load
    from kinegraph.run import find_encryption_key
    from kinegraph.spec_live import LiveSpec

    options = spec.live
    if not options.checkpoint:
        raise UserError(Problem("--model", "nothing", "a model, .pth or .onnx", "Or set live.checkpoint in the spec."))
    model = load(options.checkpoint, key=find_encryption_key(spec))
    has_default = options.pooling_frames == LiveSpec().pooling_frames
    pool = TrackPool(model, None if model.has_window and has_default else options.pooling_frames or None)
    engine = LiveEngine(model, pool, options, tells_probabilities)
    rate = engine.frames_per_second
    if not rate:
        say("notice: the model does not know its frame rate, frames are taken as they come; live.frames_per_second=30")
    description = {
        "event": "start",
        "model": options.checkpoint,
        "class_names": list(model.class_names),
        "frames_per_second": rate or None,
        "delay_frames": model.delay_frames,
    }
    return engine, description


def _open_output(output: str | None, stack: ExitStack) -> TextIO:
    if output is None:
        return sys.stdout
    from kinegraph.storage import explain_os_error

    try:
        return stack.enter_context(open(output, "x", encoding="utf-8"))
    except FileExistsError:
        hint = "Choose another name."
        raise UserError(Problem(output, "a file that is there already", "a new file", hint)) from None
    except OSError as error:
        raise explain_os_error(error, output) from error


def _make_writer(file: TextIO) -> Callable[[list[dict[str, Any]]], None]:
    """Events as JSON lines, flushed at once. ASCII only: names of people and classes are whatever a stranger sent."""
    from kinegraph.storage import explain_os_error

    def write(events: list[dict[str, Any]]) -> None:
        try:
            file.write("".join(json.dumps(event, allow_nan=False) + "\n" for event in events))
            file.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise explain_os_error(error, file.name) from error

    return write


def describe_counts(counts: dict[str, int]) -> str:
    """A line for people: what came, what was found, what was left out."""
    usual = ("frames", "ticks", "answers", "tracks", "segments")
    text = ", ".join(f"{counts.get(name, 0)} {name}" for name in ("frames", "tracks", "segments"))
    others = [
        f"{count} {name}" for name, count in counts.items() if name not in usual and not name.startswith("ended_")
    ]
    return f"{text}; left out: {', '.join(others) or 'nothing'}."
