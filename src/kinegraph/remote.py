"""Locations: paths of this machine, and URIs such as s3://bucket/folder/file, behind one small interface.

A location is text. `fetch` keeps whole remote files in the cache folder (KINEGRAPH_CACHE, default
~/.cache/kinegraph), by URI and version, where they are opened as any file.
"""

from __future__ import annotations

import glob
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kinegraph.cache import (
    CACHE_VARIABLE,
    find_cache_folder,
    hash_file,
    hash_location,
    hash_text,
    hold_file,
    lock_file,
    remove_other_versions,
)
from kinegraph.errors import Problem, StorageError, UserError
from kinegraph.file_systems import (
    BUCKET_SCHEMES,
    READ_ONLY_SCHEMES,
    URI_PATTERN,
    Opened,
    check_location,
    find_info_version,
    find_modified_s,
    find_scheme,
    open_location,
    retry,
    tells_changes,
)
from kinegraph.storage import explain_os_error, make_folder, write_atomically

PIECE_BYTES = 16 << 20
TEXT_LIMIT_BYTES = 16 << 20
MAX_LOADS = 3

Info = dict[str, Any]
Progress = Callable[[int, int], None]
"""Called with the bytes that are there and the bytes in all."""


@dataclass(frozen=True)
class FileEntry:
    """A file of a folder: its name below it, with `/`; `version` changes whenever the content does."""

    name: str
    size_bytes: int
    modified_s: float
    version: str


def is_remote(location: str | Path) -> bool:
    """Whether this is a URI and not a path of this machine."""
    return URI_PATTERN.match(str(location)) is not None


def join(location: str | Path, *names: str) -> str:
    """The location of something below a folder."""
    if not is_remote(location):
        return str(Path(location, *names))
    return "/".join([str(location).rstrip("/"), *(name.strip("/") for name in names)])


def split_location(location: str | Path) -> tuple[str, str]:
    """The folder that something lies in, and its name there."""
    if not is_remote(location):
        return str(Path(location).parent), Path(location).name
    folder, _, name = str(location).rstrip("/").rpartition("/")
    return folder, name


def exists(location: str | Path) -> bool:
    """Whether there is a file or a folder. Raises UserError, StorageError where that cannot be told."""
    return _find_kind(str(location)) != ""


def is_folder(location: str | Path) -> bool:
    """Whether there is a folder, or something below this prefix."""
    return _find_kind(str(location)) == "directory"


def is_file(location: str | Path) -> bool:
    """Whether there is a file."""
    return _find_kind(str(location)) == "file"


def _find_kind(location: str) -> str:
    """What fsspec calls it: file, directory or other; empty where there is nothing."""
    if is_remote(location):
        return str((_find_info(location) or {"type": ""})["type"])
    if os.path.isfile(location):  # Path.is_file raises for a long name
        return "file"
    return "directory" if os.path.isdir(location) else "other" if os.path.exists(location) else ""


def check_writable(location: str) -> None:
    """Refuse what cannot take files: a missing bucket, a read-only scheme. Raises UserError, StorageError."""
    check_location(location)
    if not is_remote(location):
        return
    if find_scheme(location) in READ_ONLY_SCHEMES:
        raise UserError(Problem(location, "a location to write to", "a folder, or a URI such as s3://bucket/folder"))
    if find_scheme(location) in BUCKET_SCHEMES and not exists(location):
        scheme, _, rest = location.partition("://")
        bucket = f"{scheme}://{rest.split('/')[0]}"
        if not exists(bucket):
            raise UserError(Problem(location, f"the bucket {bucket}, which does not exist", "a bucket", "Create it."))


def list_files(location: str | Path) -> list[FileEntry]:
    """All files below a folder, sorted by name; none where there is no such folder."""
    if not is_remote(location):
        return sorted(_walk(Path(location)), key=lambda entry: entry.name)
    opened = open_location(str(location))
    try:
        found = retry(lambda: opened.file_system.find(opened.path, detail=True), str(location))
    except FileNotFoundError:
        return []
    prefix = opened.path.rstrip("/") + "/"
    entries = []
    for path, info in found.items():
        parts = path.removeprefix(prefix).split("/")
        # A key may be any text; one that would lead out of a folder on a disk is nobody's result
        if path.startswith(prefix) and not {"", ".", ".."} & set(parts):
            entries.append(
                FileEntry("/".join(parts), int(info["size"] or 0), find_modified_s(info), find_info_version(info))
            )
    return sorted(entries, key=lambda entry: entry.name)


def list_folder(location: str | Path) -> dict[str, str]:
    """Name -> kind (file, directory or other) of what lies directly in a folder; {} where there is no such folder.

    However much lies deeper: of a storage only this level is asked for.
    """
    if not is_remote(location):
        return _list_local(str(location))
    opened = open_location(str(location))
    try:
        found = retry(lambda: opened.file_system.ls(opened.path, detail=True), str(location))
    except FileNotFoundError:
        return {}
    prefix = opened.path.rstrip("/") + "/"
    kinds = {info["name"].rstrip("/"): str(info["type"]) for info in found}
    names = {path.removeprefix(prefix): kind for path, kind in kinds.items() if path.startswith(prefix)}
    return {name: kind for name, kind in names.items() if name not in ("", ".", "..") and "/" not in name}


def _list_local(folder: str) -> dict[str, str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name: _find_kind(entry.path) for entry in entries}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise explain_os_error(error, folder) from error


def _walk(folder: Path) -> Iterator[FileEntry]:
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place, name)
            with suppress(OSError):  # it went away, or a link leads nowhere
                stat = path.stat()
                relative = path.relative_to(folder).as_posix()
                yield FileEntry(relative, stat.st_size, stat.st_mtime, f"{stat.st_size}-{stat.st_mtime_ns}")


def find_version(location: str) -> str:
    """The version of a remote file; '' where there is none."""
    info = _find_info(location)
    return find_info_version(info) if info else ""


def read_text(location: str | Path, limit_bytes: int = TEXT_LIMIT_BYTES) -> str:
    """The text of a file. Raises UserError where it is missing, larger than the limit or not UTF-8."""
    place = str(location)
    content = read_start(place, limit_bytes + 1)
    if len(content) > limit_bytes:
        raise UserError(Problem(place, f"more than {limit_bytes} bytes", f"text of at most {limit_bytes} bytes"))
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise UserError(Problem(place, "bytes that are no text", "text in UTF-8")) from None


def read_start(location: str | Path, num_bytes: int) -> bytes:
    """The first bytes of a file, or all where there are fewer. Raises UserError where it is missing."""
    place = str(location)
    try:
        if is_remote(place):
            return open_location(place).read_start(place, num_bytes)
        with open(place, "rb") as file:
            return file.read(num_bytes)
    except (FileNotFoundError, IsADirectoryError):
        raise _explain_missing(place) from None
    except OSError as error:
        raise explain_os_error(error, place) from error


def write_text(location: str | Path, text: str) -> None:
    """Write a file, whole or not at all, and the folders above it."""
    if is_remote(location):
        opened = open_location(str(location))
        _write(lambda: opened.file_system.pipe_file(opened.path, text.encode()), str(location))
        return
    make_folder(Path(location).parent)
    with write_atomically(location, "w") as file:
        file.write(text)


def upload(content: bytes | Path, uri: str) -> None:
    """Write bytes, or the content of a local file, to a URI, in one attempt. Raises UserError, StorageError."""
    opened = open_location(uri)
    if isinstance(content, bytes):
        _write(lambda: opened.file_system.pipe_file(opened.path, content), uri, ())
    else:
        _write(lambda: opened.file_system.put_file(str(content), opened.path), uri, ())


def copy(source: str, target: str) -> None:
    """Copy a remote file to another URI of the same storage, which does it itself. Raises UserError, StorageError."""
    opened = open_location(source)
    _write(lambda: opened.file_system.cp_file(opened.path, open_location(target).path), target, ())


def _write(call: Callable[[], None], uri: str, delays_s: tuple[float, ...] | None = None) -> None:
    try:
        retry(call, uri, delays_s)
    except FileNotFoundError:
        raise UserError(Problem(uri, "a bucket or folder that does not exist", "one that does", "Create it.")) from None


def remove(location: str | Path) -> None:
    """Remove a file, or a folder with all that is in it; nothing where there is neither. A bucket is refused."""
    if not is_remote(location):
        path = Path(location)
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise explain_os_error(error, path) from error
        return
    opened = open_location(str(location))
    if "/" not in opened.path.strip("/") and find_scheme(str(location)) in BUCKET_SCHEMES:
        raise UserError(Problem(str(location), "a whole bucket", "a file or a folder in it"))
    with suppress(FileNotFoundError):
        retry(lambda: _remove_literally(opened.file_system, opened.path), str(location))
        if find_scheme(str(location)) not in BUCKET_SCHEMES:
            _remove_folders(opened.file_system, opened.path)


def _remove_literally(file_system: Any, path: str) -> None:
    """Remove a file, or all below a folder, one by one: fsspec's `rm` takes its argument for a pattern ([1], *)."""
    if file_system.isfile(path):
        file_system.rm_file(path)
        return
    for name in file_system.find(f"{path.rstrip('/')}/"):
        file_system.rm_file(name)


def _remove_folders(file_system: Any, path: str) -> None:
    below = file_system.find(path, withdirs=True, detail=True) if file_system.isdir(path) else {}
    folders = [name for name, info in below.items() if info["type"] == "directory"]
    for folder in [*sorted(folders, key=len, reverse=True), path]:
        with suppress(OSError, NotImplementedError):
            file_system.rmdir(folder)


def _explain_missing(location: str) -> UserError:
    return UserError(Problem(location, "a location where no file is", "a file", "Check the path."))


def _find_info(location: str) -> Info | None:
    return open_location(location).find_info(location)


def fetch(location: str | Path, progress: Progress | None = None) -> Path:
    """The file of this machine behind a location. A remote one is loaded into the cache, unless it is there already.

    What a broken connection or a kill left of a file is gone on with. Several processes may ask for the same file.
    Raises UserError where it is missing or denied, StorageError where it cannot be loaded.
    """
    if not is_remote(location):
        return Path(location)
    uri = str(location)
    folder = make_folder(find_cache_folder() / "files" / hash_location(uri))
    try:
        with lock_file(folder / "lock"):
            path = _load(uri, folder, progress)
            hold_file(path)
            remove_other_versions(folder, path.parent)
            return path
    except FileNotFoundError:
        raise _explain_missing(uri) from None
    except OSError as error:
        raise explain_os_error(error, error.filename or folder) from error


def load(uri: str, target: Path) -> str:
    """Copy a remote file to a path, whole or not at all, past the cache; its version.

    Raises UserError where it is missing or denied, StorageError where it cannot be loaded.
    """
    opened = open_location(uri)
    make_folder(target.parent)
    start = f".{target.name}.{os.getpid()}."
    part = target.with_name(f"{start}{secrets.token_hex(4)}.part.tmp")
    try:
        for leftover in target.parent.glob(f"{glob.escape(start)}*.part.tmp"):  # of a process that had our number
            leftover.unlink(missing_ok=True)
        version = _load_version(opened, uri, opened.find_info(uri), lambda _: part, None)
        os.replace(part, target)
        return version
    except FileNotFoundError:
        raise _explain_missing(uri) from None
    except OSError as error:
        raise explain_os_error(error, error.filename or target) from error
    finally:
        part.unlink(missing_ok=True)


def _load(uri: str, folder: Path, progress: Progress | None) -> Path:
    """The file in the cache that is the remote one's present version; FileNotFoundError where there is none."""
    opened = open_location(uri)
    info = opened.find_info(uri)
    if info is None or info["type"] == "directory":
        raise FileNotFoundError
    path = folder / hash_text(find_info_version(info)) / _name_file(uri)
    if tells_changes(info) and path.is_file() and info["size"] in (None, path.stat().st_size):
        return path
    version = _load_version(opened, uri, info, lambda version: folder / f"{hash_text(version)}.part", progress)
    part = folder / f"{hash_text(version)}.part"
    path = folder / (hash_text(version) if tells_changes(info) else hash_file(part)) / path.name
    make_folder(path.parent)
    os.replace(part, path)
    return path


def _load_version(
    opened: Opened, uri: str, info: Info | None, name_part: Callable[[str], Path], progress: Progress | None
) -> str:
    """Load the present version of a file; pieces of two versions make no file. FileNotFoundError if there is none."""
    for _ in range(MAX_LOADS):
        if info is None or info["type"] == "directory":
            raise FileNotFoundError
        version = find_info_version(info)
        part = name_part(version)
        _download(opened, uri, info, part, progress)
        info = opened.find_info(uri)
        if info is not None and find_info_version(info) == version:
            return version
        part.unlink()
    raise StorageError(Problem(uri, "a file that keeps changing", "one that stays while it is loaded"))


def _download(opened: Opened, uri: str, info: Info, part: Path, progress: Progress | None) -> None:
    size_bytes = info["size"]
    if size_bytes is None or not tells_changes(info):  # its pieces could be of two versions
        retry(lambda: opened.copy_whole(str(part), size_bytes), uri)
        return
    with open(part, "ab") as file:
        done = os.fstat(file.fileno()).st_size
        if done > size_bytes:
            file.truncate(0)
            done = 0
        free_bytes = shutil.disk_usage(part.parent).free
        if size_bytes - done > free_bytes:
            got = f"{free_bytes / 1e9:.1f} GB of free space"
            hint = f"Empty this folder, or set {CACHE_VARIABLE} to another one."
            expected = f"{size_bytes / 1e9:.1f} GB for {uri}"
            raise StorageError(Problem(str(find_cache_folder()), got, expected, hint))
        while done < size_bytes:
            start, end = done, min(done + PIECE_BYTES, size_bytes)
            file.write(retry(lambda start=start, end=end: opened.read_piece(start, end, size_bytes), uri))  # type: ignore[misc]
            file.flush()
            done = os.fstat(file.fileno()).st_size
            if progress:
                progress(done, size_bytes)
        os.fsync(file.fileno())


def _name_file(uri: str) -> str:
    """The last part of a URI as a file name: its ending says what the file is."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", split_location(uri)[1])[-100:].lstrip(".") or "file"
