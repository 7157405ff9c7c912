"""The cache folder: where it is, and which version of a file stays in it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

CACHE_VARIABLE = "KINEGRAPH_CACHE"

_held: dict[Path, int] = {}
"""Cached files that this process was given, by path, each with an open descriptor that holds a shared lock."""


def find_cache_folder() -> Path:
    """KINEGRAPH_CACHE, or ~/.cache/kinegraph. It may be removed whenever no run uses it."""
    given = os.environ.get(CACHE_VARIABLE)
    return Path(given).expanduser().absolute() if given else Path.home() / ".cache" / "kinegraph"


def hash_location(uri: str) -> str:
    """A short name for a URI, and for the server that it is on."""
    server = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    return hash_text(f"{server} {uri.rstrip('/')}")


def hash_text(text: str) -> str:
    """A short name for a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def hash_file(path: Path) -> str:
    """A short name for the content of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:24]


@contextmanager
def lock_file(path: Path) -> Iterator[None]:
    """Held by one process at a time; a killed one lets go of it."""
    import fcntl

    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def hold_file(path: Path) -> None:
    """Keep a file of the cache from being removed while this process lives."""
    import fcntl

    if path in _held:
        if os.path.samestat(os.fstat(_held[path]), os.stat(path)):
            return
        os.close(_held.pop(path))
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    _held[path] = descriptor


def remove_other_versions(folder: Path, kept: Path) -> None:
    """Older versions of a file that no process holds, and what is left of loading them."""
    import fcntl

    for leftover in folder.glob("*.part"):
        leftover.unlink(missing_ok=True)
    for version in folder.iterdir():
        if not version.is_dir() or version == kept:
            continue
        for path in version.iterdir():
            with open(path, "rb") as file, suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
        with suppress(OSError):
            version.rmdir()
