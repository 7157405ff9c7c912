"""Where files are written: whole or not at all, and with an error that says what to do."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from kinegraph.errors import Problem, StorageError, UserError

LOCK_NAME = ".lock"


def explain_os_error(error: OSError, path: Path | str) -> StorageError:
    """The same error as one line that names the file and the next step."""
    reason = error.strerror or str(error)
    hint = "Free some space or choose another results_dir." if error.errno == errno.ENOSPC else "Choose another folder."
    return StorageError(Problem(str(path), reason, "a file that can be read and written", hint))


def make_folder(path: Path) -> Path:
    """Create a folder and its parents.

    Raises UserError if a part of the path is a file, StorageError if it cannot be created.
    """
    for part in (path, *path.parents):
        if os.path.lexists(part):  # Path.exists raises for a name that is too long
            if not os.path.isdir(part):
                hint = "Choose another results_dir."
                raise UserError(Problem(str(path), f"a path through the file {part}", "a folder", hint))
            break
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise explain_os_error(error, path) from error
    except ValueError as error:
        raise UserError(Problem(repr(str(path)), str(error), "a path")) from error
    return path


@contextmanager
def write_atomically(path: Path | str, mode: str = "wb") -> Iterator[IO[Any]]:
    """A file object whose content appears under `path` at once when the block ends well, or never.

    It is written beside its target under a temporary name, flushed to the disk and renamed, so that a kill or a
    full disk leaves the old file or none. Raises StorageError.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    try:
        with open(temporary, mode.replace("w", "x"), **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise explain_os_error(error, path) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def dump_json(data: Any, indent: int | None = None) -> str:
    """Strict JSON: NaN and infinity, which JSON does not have, become null; NumPy numbers become numbers."""
    return json.dumps(
        _replace_non_finite(data), indent=indent, allow_nan=False, ensure_ascii=False, default=_get_number
    )


def _get_number(value: Any) -> Any:
    """The plain number in a NumPy one."""
    number = value.item()
    return None if isinstance(number, float) and not math.isfinite(number) else number


def _replace_non_finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _replace_non_finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_replace_non_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def write_json(path: Path | str, data: Any) -> None:
    """Strict JSON, indented, atomically. See `dump_json`."""
    with write_atomically(path, "w") as file:
        file.write(dump_json(data, indent=2) + "\n")


def point_to(pointer: Path, target: Path) -> None:
    """Make `pointer` name a file in the same folder: a relative link, or a hard link where links are not allowed."""
    temporary = pointer.with_name(f".{pointer.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        try:
            os.symlink(target.name, temporary)
        except (OSError, NotImplementedError):
            os.link(target, temporary)
        os.replace(temporary, pointer)
    except OSError as error:
        raise explain_os_error(error, pointer) from error
    finally:
        temporary.unlink(missing_ok=True)


def append_line(path: Path, line: str) -> None:
    """Append one line and flush it to the disk, or leave the file as it was.

    A torn last line, left by a kill, is cut off first. Raises StorageError.
    """
    size = None
    try:
        with open(path, "ab+") as file:
            _cut_torn_line(file)
            size = file.tell()
            file.write(line.encode(errors="backslashreplace") + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if size is not None:
            with contextlib.suppress(OSError):
                os.truncate(path, size)
        raise explain_os_error(error, path) from error


def cut_torn_line(path: Path) -> None:
    """Remove the half line that a kill left at the end of a file of lines. Raises StorageError."""
    try:
        with open(path, "rb+") as file:
            _cut_torn_line(file)
    except OSError as error:
        raise explain_os_error(error, path) from error


@contextmanager
def lock_folder(folder: Path, wait_s: float = 0.0) -> Iterator[None]:
    """Keep other processes from running in a folder. The system frees the lock when the process ends, however it does.

    Raises UserError if another process holds it for longer than `wait_s`. Where a file system has no locks, nothing is
    held.
    """
    path = folder / LOCK_NAME
    try:
        file = open(path, "ab")  # noqa: SIM115 (it stays open as long as the lock is held)
    except OSError as error:
        raise explain_os_error(error, path) from error
    with file:
        _wait_for_lock(file, folder, wait_s)
        yield


def _wait_for_lock(file: IO[bytes], folder: Path, wait_s: float) -> None:
    try:
        import fcntl
    except ImportError:  # no such locks on Windows
        return
    until_s = time.monotonic() + wait_s
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return
        if time.monotonic() >= until_s:
            hint = "Wait for it or stop it, or choose another results_dir."
            raise UserError(Problem(str(folder), "a folder that another process is running in", "a free one", hint))
        time.sleep(0.1)


def _cut_torn_line(file: IO[bytes]) -> None:
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return
    file.seek(size - 1)
    if file.read(1) == b"\n":
        return
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)
    file.seek(0, os.SEEK_END)
