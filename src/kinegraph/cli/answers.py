"""How commands answer: JSON or text on stdout, notices on stderr, new files."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from kinegraph.errors import Problem, UserError


def format_result(metrics: dict[str, Any], files: dict[str, str]) -> str:
    """Numbers and files of a result as two small tables."""
    lines = []
    numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float | str)}
    for title, values in (("Metrics", numbers), ("Files", files)):
        width = max((len(name) for name in values), default=0)
        lines += [f"{title}:"] if values else []
        lines += [f"  {name:<{width}}  {_format_number(value)}" for name, value in values.items()]
    return "\n".join(lines)


def _format_number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def deliver(text: str, output: str | None) -> None:
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
    say(f"Wrote {output}.")


def format_json(data: Any) -> str:
    """Strict JSON, indented."""
    from kinegraph.storage import dump_json

    return dump_json(data, indent=2)


def print_json(data: Any) -> None:
    """The answer of a command with --json: one JSON document on stdout."""
    print(format_json(data))


def say(message: str) -> None:
    """A line on stderr."""
    print(message, file=sys.stderr)
