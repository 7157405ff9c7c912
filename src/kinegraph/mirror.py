"""A local folder that is uploaded to a URI as it changes, so that results outlive the machine they were made on.

The work goes on in the local folder. A thread looks for whole new or changed files every few seconds. What a file
names is there before the file: checkpoints go up before best.json, and status.json last of all. What was uploaded is
remembered beside the folder, by size and time here and version there, so that a run that goes on uploads only what is
new, and takes over what another machine wrote in the meantime. (Two versions of a file that have the same size, written
within one tick of the clock, a few milliseconds, count as one.)
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from kinegraph.errors import KinegraphError, Problem, StorageError
from kinegraph.remote import copy, find_version, join, list_files, load, remove, upload
from kinegraph.run_files import STATUS_NAME
from kinegraph.storage import make_folder, write_json

UPLOAD_EXCLUDES = ("inputs/",)
"""Copies of what a job was given. A name with / at its end is a folder."""
TEMPORARY_NAMES = ("*.tmp", "*.part", "*.lock")
INDEX_ENDINGS = (".json", ".yaml", ".csv")
"""Small files that may name others, which must be there first."""
INDEX_LIMIT_BYTES = 16 << 20
INTERVAL_S = 3.0
FINAL_DELAYS_S: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0)


@dataclass(frozen=True)
class _Uploaded:
    """A file as it was here when it was uploaded, and the version that it then got there."""

    size_bytes: int
    modified_ns: int
    version: str


class Mirror:
    """Uploads a folder to a URI.

    `take_over` first, then `start`; `upload_all` where everything must be up; `close` at the end. With `names`, only
    these files are looked at. `record` is a file of this machine that remembers what is up.
    """

    def __init__(
        self,
        folder: Path,
        uri: str,
        record: Path,
        warn: Callable[[str], None],
        names: Sequence[str] = (),
        excludes: Sequence[str] = UPLOAD_EXCLUDES,
    ) -> None:
        self.folder, self.uri, self.names = folder, uri, tuple(names)
        self._record, self._warn, self._excludes = record, warn, tuple(excludes)
        self._uploaded = _read_record(record)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._failure = ""

    def take_over(self, only_missing: bool = False) -> int:
        """Load what is at the URI and differs from what this folder uploaded; how many files that was.

        A file that was changed there since this folder last uploaded it, or removed, is so here afterwards: another
        machine has gone on. `only_missing`: for other processes of the same run, which write nothing.
        """
        make_folder(self.folder)
        there = self._list_remote()
        taken = 0
        for name, version in there.items():
            known, path = self._uploaded.get(name), self.folder / name
            is_here = os.path.lexists(path)
            if is_here and (only_missing or (known is not None and known.version == version)):
                continue
            if path.is_symlink():  # a pointer: its target must not be written through it
                path.unlink()
            version = load(join(self.uri, name), path)
            taken += 1
            if not only_missing:
                self._note(name, path, version)
        if not only_missing:
            self._remove_what_is_gone(set(there))
            self._write_record()
        return taken

    def _remove_what_is_gone(self, there: set[str]) -> None:
        here = self._scan()
        for name in set(self._uploaded) - there:
            known = self._uploaded.pop(name)
            if here.get(name) == (known.size_bytes, known.modified_ns):
                (self.folder / name).unlink(missing_ok=True)

    def start(self) -> None:
        """Upload from now on, in a thread."""
        self._thread = threading.Thread(target=self._work, name="kinegraph-upload", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            with self._lock:
                self._tell(self._upload_round())

    def upload_all(self, delays_s: tuple[float, ...] | None = None) -> None:
        """Upload what is not up yet. Raises StorageError, which names the folder, if that fails again and again."""
        delays_s = FINAL_DELAYS_S if delays_s is None else delays_s
        delays = list(delays_s)
        while True:
            with self._lock:
                before = dict(self._uploaded)
                failure = self._upload_round()
                if self._uploaded != before:
                    delays = list(delays_s)
            if failure is None:
                return
            if not delays:
                reason = "; ".join(f"{problem.where}: {problem.got}" for problem in failure.problems)
                hint = f"Nothing is lost: all is in {self.folder}. The same command uploads the rest. {_join(failure)}"
                raise StorageError(Problem(self.uri, f"results that are not all up ({reason})", "all", hint.strip()))
            time.sleep(delays.pop(0))

    def close(self) -> None:
        """End the thread. What is not up yet stays in the folder."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _upload_round(self) -> KinegraphError | None:
        """Upload all that is new; the error at which this stopped."""
        try:
            here = self._scan()
            gone = [name for name in self._uploaded if name not in here]
            # Read before the rest is listed: what they name is then among the rest. One that is new since goes up in
            # the next round: it may name what is written after the list was made
            held = {name: self._read_index(name) for name in here if self._is_index(name, here[name][0])}
            later = self._scan()
            rest = [name for name in later if name not in held and not self._is_index(name, later[name][0])]
            rest.sort(key=lambda name: self._rank(name))
            for name in rest:
                self._upload(name, later[name], self.folder / name)
            outdated = [name for name in held if self._is_outdated(name, here[name])]
            for name in sorted(set(held) - set(outdated), key=lambda name: self._rank(name)):
                self._upload(name, here[name], held[name])
            for name in gone if not outdated else ():
                self._remove(name)
        except KinegraphError as error:
            return error
        except OSError as error:
            return StorageError(Problem(str(self.folder), error.strerror or type(error).__name__, "readable files"))
        return None

    def _remove(self, name: str) -> None:
        """Remove at the URI what the run removed here, unless another machine has written it anew."""
        if os.path.lexists(self.folder / name):
            return
        uri, known = join(self.uri, name), self._uploaded[name]
        if find_version(uri) == known.version:
            remove(uri)
        del self._uploaded[name]
        self._write_record()

    def _upload(self, name: str, stamp: tuple[int, int], content: bytes | Path | None) -> None:
        known = self._uploaded.get(name)
        if content is None or (known is not None and (known.size_bytes, known.modified_ns) == stamp):
            return
        uri = join(self.uri, name)
        pointed = self._find_target(content)
        try:
            if pointed:
                copy(join(self.uri, pointed), uri)
            else:
                upload(content, uri)
        except KinegraphError:
            if not (self.folder / name).exists():  # a checkpoint that a better one replaced just now
                return
            raise
        self._uploaded[name] = _Uploaded(*stamp, find_version(uri))
        self._write_record()

    def _find_target(self, content: bytes | Path) -> str:
        """The name of the file that a pointer points to, if that is up as it is here; '' otherwise."""
        if isinstance(content, bytes) or not content.is_symlink():
            return ""
        target = content.resolve()
        if not target.is_relative_to(self.folder.resolve()) or not target.is_file():
            return ""
        name, stat = target.relative_to(self.folder.resolve()).as_posix(), target.stat()
        known = self._uploaded.get(name)
        is_up = known is not None and (known.size_bytes, known.modified_ns) == (stat.st_size, stat.st_mtime_ns)
        return name if is_up else ""

    def _is_index(self, name: str, size_bytes: int) -> bool:
        return name.endswith(INDEX_ENDINGS) and size_bytes <= INDEX_LIMIT_BYTES

    def _is_outdated(self, name: str, stamp: tuple[int, int]) -> bool:
        """Whether a file that names others has moved on since it was read: what it named may be gone, and not up."""
        if not name.endswith(".json") or PurePosixPath(name).name == STATUS_NAME:
            return False
        try:
            stat = (self.folder / name).stat()
        except FileNotFoundError:
            return True
        return (stat.st_size, stat.st_mtime_ns) != stamp

    def _read_index(self, name: str) -> bytes | None:
        try:
            return (self.folder / name).read_bytes()
        except FileNotFoundError:
            return None

    def _rank(self, name: str) -> tuple[bool, bool, str]:
        """Files, then pointers to files, then status.json."""
        return PurePosixPath(name).name == STATUS_NAME, (self.folder / name).is_symlink(), name

    def _scan(self) -> dict[str, tuple[int, int]]:
        """Name -> size in bytes and time in ns of every file that is mirrored; of a link, its target's."""
        found = {}
        for place, folders, names in os.walk(self.folder, onerror=self._note_unreadable):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in names:
                path = Path(place, name)
                relative = path.relative_to(self.folder).as_posix()
                if self._is_mirrored(relative):
                    with contextlib.suppress(FileNotFoundError):  # removed just now
                        stat = path.stat()
                        found[relative] = (stat.st_size, stat.st_mtime_ns)
        return found

    def _note_unreadable(self, error: OSError) -> None:
        """A folder that cannot be read is no empty one: what is in it must not be taken for removed."""
        is_removed = isinstance(error, FileNotFoundError) and Path(str(error.filename)) != self.folder
        if not is_removed:
            raise error

    def _is_mirrored(self, name: str) -> bool:
        if self.names:
            return name in self.names
        parts = PurePosixPath(name).parts
        if any(part.startswith(".") for part in parts):
            return False
        patterns = (*TEMPORARY_NAMES, *(pattern for pattern in self._excludes if not pattern.endswith("/")))
        folders = [pattern for pattern in self._excludes if pattern.endswith("/")]
        return not any(fnmatch.fnmatch(parts[-1], pattern) for pattern in patterns) and not name.startswith(
            tuple(folders)
        )

    def _list_remote(self) -> dict[str, str]:
        """Name -> version of what is at the URI."""
        if self.names:
            found = {name: find_version(join(self.uri, name)) for name in self.names}
            return {name: version for name, version in found.items() if version}
        return {entry.name: entry.version for entry in list_files(self.uri) if self._is_mirrored(entry.name)}

    def _note(self, name: str, path: Path, version: str) -> None:
        stat = path.stat()
        self._uploaded[name] = _Uploaded(stat.st_size, stat.st_mtime_ns, version)

    def _write_record(self) -> None:
        write_json(self._record, {name: asdict(known) for name, known in self._uploaded.items()})

    def _tell(self, failure: KinegraphError | None) -> None:
        """Say once that uploads fail, and once that they work again."""
        reason = str(failure or "")
        if reason and reason != self._failure:
            self._warn(f"Results are not uploaded for now, it is tried again: {reason}")
        if self._failure and not reason:
            self._warn(f"Results are uploaded to {self.uri} again.")
        self._failure = reason


def _join(failure: KinegraphError) -> str:
    return " ".join(problem.hint for problem in failure.problems if problem.hint)


def _read_record(path: Path) -> dict[str, _Uploaded]:
    try:
        return {name: _Uploaded(**known) for name, known in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):  # none yet, or damaged: all is then taken over anew
        return {}
