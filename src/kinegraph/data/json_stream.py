"""Reading a JSON file that is one long list, a piece at a time."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from kinegraph.errors import DataError, Problem

PIECE_BYTES = 64 << 10  # what is parsed at once stays in the cache: a quarter faster than megabytes
MAX_INDENT = 256

Report = Callable[[int, int], None]
"""Called with the bytes read so far and the bytes of the file."""


@dataclass(frozen=True)
class Piece:
    """Some neighbouring entries of the list."""

    first: int
    """Position of the first of them in the list."""
    entries: list[Any]
    may_hold_booleans: bool


def read_list(path: Path, skipped_keys: Sequence[str] = (), on_progress: Report | None = None) -> Iterator[Piece]:
    """The entries of the list in a JSON file, piece by piece: memory holds one piece, not the file.

    Flat lists of numbers under one of `skipped_keys` are given as empty lists, which saves their time.

    A piece ends where `}, {"<key>"` is found, with the first key of the first entry. Such a place is between
    two entries of the outer list if and only if the text before it is a complete list; while it is not, the
    piece grows.

    Raises DataError for what is not a list, not JSON, cut off or unreadable, with the place.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115 closed below; only a failure to open is the user's to mend
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(Problem(str(path), reason, "a file that can be read")) from error
    with file:
        size = os.fstat(file.fileno()).st_size
        text = file.read(PIECE_BYTES)
        opening = re.match(rb"\s*\[", text)
        if opening is None:
            raise DataError(_explain_not_a_list(path, text))
        offset, first = opening.end(), 0
        text = text[offset:]
        key = re.match(rb'\s*\{\s*("[^"\\]*")', text)
        while True:
            at_end = offset + len(text) >= size
            cut = len(text) if at_end else _find_cut(text, key[1]) if key else -1
            piece = _parse(text[:cut], first, skipped_keys, at_end, path, offset) if cut >= 0 else None
            if piece is None:
                more = file.read(max(PIECE_BYTES, len(text)))
                text += more
                size = size if more else offset + len(text)
                continue
            yield piece
            if on_progress is not None:
                on_progress(offset + cut, size)
            if at_end:
                return
            first += len(piece.entries)
            offset += cut + 1
            text = text[cut + 1 :] + file.read(PIECE_BYTES)


def _find_cut(text: bytes, key: bytes) -> int:
    """Index of the comma before the last object that begins with this key; -1 if there is none."""
    at = text.rfind(key)
    while at > 0:
        start = max(0, at - MAX_INDENT)
        between = re.search(rb"\}\s*(,)\s*\{\s*\Z", text[start:at])
        if between:
            return start + between.start(1)
        at = text.rfind(key, 0, at)
    return -1


def _parse(text: bytes, first: int, skipped_keys: Sequence[str], at_end: bool, path: Path, offset: int) -> Piece | None:
    """The entries in a text, which has the list's closing bracket if `at_end`; None if it must grow first."""
    closing = b"" if at_end else b"]"
    short = _skip_numbers(text, skipped_keys)
    try:
        return Piece(first, from_json(b"[" + short + closing), b"true" in short or b"false" in short)
    except ValueError:
        pass
    # The same again with nothing skipped, for the right place of the error.
    try:
        return Piece(first, from_json(b"[" + text + closing), may_hold_booleans=True)
    except ValueError as error:
        place = _find_place(text, str(error))
        if not at_end and place >= len(text) - 1:
            return None
        raise DataError(_explain_syntax(path, text, str(error), place, offset)) from error


def _skip_numbers(text: bytes, skipped_keys: Sequence[str]) -> bytes:
    for name in skipped_keys:
        key = f'"{name}"'.encode()
        kept, done = [], 0
        at = text.find(key)
        while at >= 0:
            opening = text.find(b"[", at)
            closing = text.find(b"]", opening)
            is_value = text[at + len(key) : opening].strip() == b":"
            is_flat = text.find(b"[", opening + 1, closing) == text.find(b'"', opening, closing) == -1
            if is_value and is_flat and closing >= 0:
                kept.append(text[done : opening + 1])
                done = closing
            at = text.find(key, max(at + len(key), done))
        text = b"".join([*kept, text[done:]]) if kept else text
    return text


def _find_place(text: bytes, message: str) -> int:
    """Index in the text of an error that the parser reports for `[` + text, as line and column."""
    found = re.search(r"line (\d+) column (\d+)", message)
    if found is None:
        return 0
    start = 0
    for _ in range(int(found[1]) - 1):
        start = text.find(b"\n", start) + 1
    bracket = 1 if found[1] == "1" else 0
    return max(0, start + int(found[2]) - 1 - bracket)


def _explain_syntax(path: Path, text: bytes, message: str, place: int, offset: int) -> Problem:
    where = f"{path}: byte {offset + place}"
    if message.startswith("EOF"):
        hint = "The file was cut off: let the recorder finish, or copy the file again."
        return Problem(where, "the end of the file inside the list", "a complete JSON list", hint)
    shown = text[max(0, place - 20) : place + 20].decode(errors="replace")
    reason = re.sub(r" at line \d+ column \d+", "", message)
    return Problem(where, f"{shown!r} ({reason})", "JSON")


def _explain_not_a_list(path: Path, text: bytes) -> Problem:
    start = text.lstrip()[:40]
    got = "an empty file" if not start else f"a file that begins with {start.decode(errors='replace')!r}"
    hint = "Give the file that DeepStream's body-pose-3D app saves."
    return Problem(str(path), got, "a JSON list of frames, which begins with '['", hint)
