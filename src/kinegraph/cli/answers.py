"""How commands answer: JSON or text on stdout, notices on stderr, new files."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from kinegraph.errors import Problem, UserError

UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What can steer a terminal or turn the order of its text, and halves of surrogate pairs; not tab and newline."""
NOT_ASCII = re.compile("[^\x00-\x7f]")


def format_result(metrics: dict[str, Any], files: dict[str, str]) -> str:
    """Numbers and files of a result as two small tables."""
    lines = []
    numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float | str)}
    for title, values in (("Metrics", numbers), ("Files", files)):
        width = max((len(name) for name in values), default=0)
        lines += [f"{title}:"] if values else []
        lines += [f"  {name:<{width}}  {format_number(value)}" for name, value in values.items()]
    return "\n".join(lines)


def format_number(value: Any) -> str:
    """Six digits of a float; all of an integer, which may be too large to be a float."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def deliver(text: str, output: str | None, answer: dict[str, Any] | None = None) -> None:
    """Print a text or write it to a file that is not there yet; `answer` is what --json says in its place."""
    if output is not None:
        _write_new(output, text)
    if answer is not None:
        print_json({"status": "ok", **answer, "file": output})
    elif output is None:
        print(text.removesuffix("\n"))
    else:
        say(f"Wrote {output}.")


def _write_new(output: str, text: str) -> None:
    from kinegraph.storage import make_folder, write_atomically

    path = Path(output)
    if os.path.lexists(path):
        raise UserError(Problem(output, "a file that is there already", "a new file", "Choose another name."))
    make_folder(path.absolute().parent)
    with write_atomically(path, "w") as file:
        file.write(text.removesuffix("\n") + "\n")


def format_json(data: Any) -> str:
    """Strict JSON, indented."""
    from kinegraph.storage import dump_json

    return dump_json(data, indent=2)


def print_json(data: Any) -> None:
    """The answer of a command with --json: one JSON document on stdout, whatever stdout is and the texts in it hold."""
    text = UNPRINTABLE.sub(_escape_as_json, format_json(data))
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = NOT_ASCII.sub(_escape_as_json, text)
    print(text)


def _escape_as_json(match: re.Match[str]) -> str:
    return f"\\u{ord(match[0]):04x}" if match[0] < "\U00010000" else json.dumps(match[0])[1:-1]


def make_printable(text: str) -> str:
    """A text that somebody else may have written, with what could steer the terminal shown as escape sequences."""
    return UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def say(message: str) -> None:
    """A line on stderr; an event where JSON lines were asked for."""
    run = sys.modules.get("kinegraph.run")  # importing it only to ask would slow down every command
    if run is not None and run.find_message_form() == "json":
        run.LOGGER.info(message)
    else:
        print(make_printable(message), file=sys.stderr)
