"""The last lines of a log, however long it is."""

from __future__ import annotations

import os
from pathlib import Path

from kinegraph.storage import explain_os_error

MAX_LOG_BYTES = 16 * 1024 * 1024


def read_tail(path: Path) -> str:
    """The text of a log, from its last whole lines within 16 MiB. Raises StorageError."""
    try:
        with open(path, "rb") as file:
            size_bytes = file.seek(0, os.SEEK_END)
            file.seek(max(0, size_bytes - MAX_LOG_BYTES))
            content = file.read()
    except OSError as error:
        raise explain_os_error(error, path) from error
    if size_bytes > MAX_LOG_BYTES:
        content = content[content.find(b"\n") + 1 :]
    return content.decode("utf-8", errors="replace")


def cut_lines(text: str, tail: int | None) -> str:
    """The last `tail` lines of a text; all of them for None."""
    if tail is None:
        return text
    lines = text.splitlines(keepends=True)
    return "".join(lines[max(0, len(lines) - tail) :])
