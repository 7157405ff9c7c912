"""One execution of an action and its folder: experiment.yaml, status.json, log.txt, messages and the final state."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import yaml

from kinegraph.errors import KinegraphError, Problem, StorageError
from kinegraph.run_files import EXPERIMENT_NAME, STATUS_NAME
from kinegraph.spec import KEY_VARIABLE, Spec
from kinegraph.storage import append_line, dump_json, explain_os_error, lock_folder, make_folder, write_atomically

LOGGER = logging.getLogger("kinegraph")
PROGRESS_LINE_INTERVAL_S = 10.0
LOCK_WAIT_S = 5.0
"""A process that was killed may take a moment to be gone."""


class Terminated(BaseException):
    """SIGTERM arrived. Not an Exception, so that no handler in between takes it for an ordinary failure."""


@dataclass
class Result:
    """What an action gives back: numbers, and the files it made (role -> path)."""

    metrics: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)


@dataclass
class Run:
    """The folder of a run and everything that is said about it.

    Only the process with `writes` touches the folder or speaks: in distributed runs that is rank 0. `locations` says
    which URI a path of this machine stands for: the action works on the paths, records and messages name the URIs.
    """

    action: str
    folder: Path
    spec: Spec
    origins: dict[str, str] = field(default_factory=dict)
    writes: bool = True
    locations: dict[str, str] = field(default_factory=dict)
    _progress: _Progress | None = field(default=None, repr=False)
    _has_ended: bool = field(default=False, repr=False)

    def is_set(self, key: str) -> bool:
        """Whether the user gave a value for this dotted key, even if it equals the default."""
        return key in self.origins

    def show(self, data: Any) -> Any:
        """Plain data or text with the URIs that the user gave in the place of the paths that stand for them."""
        if not self.locations:
            return data
        if isinstance(data, str):
            for path in sorted(self.locations, key=len, reverse=True):
                data = data.replace(path, self.locations[path])
            return data
        if isinstance(data, dict):
            return {self.show(key): self.show(value) for key, value in data.items()}
        return [self.show(value) for value in data] if isinstance(data, list | tuple) else data

    def info(self, message: str) -> None:
        if self.writes:
            LOGGER.info(self.show(message))

    def warn(self, message: str) -> None:
        if self.writes:
            LOGGER.warning(self.show(message))

    def progress(self, done: int, total: int, what: str) -> None:
        """Show that `done` of `total` are finished: a bar at a terminal, else a line now and then."""
        if not self.writes:
            return
        if self._progress is None or self._progress.what != what:
            self._progress = _Progress(what, done)
        self._progress.show(done, total)
        if done >= total:
            self._progress = None

    def write_experiment(self, spec: Spec | None = None) -> None:
        """Write experiment.yaml, the effective spec. Every action does so once its checks have passed."""
        if self.writes:
            with write_atomically(self.folder / EXPERIMENT_NAME, "w") as file:
                yaml.safe_dump(self.show(redact(spec or self.spec)), file, sort_keys=False)

    def write_status(self, status: str, message: str, kpi: dict[str, Any] | None = None, **fields: Any) -> None:
        """Append one line to status.json: STARTED, RUNNING, SUCCESS, FAILURE or SKIPPED."""
        is_last = status in ("SUCCESS", "FAILURE")
        if not self.writes or (is_last and self._has_ended):
            return
        now = datetime.now()
        line = {
            "date": f"{now.month}/{now.day}/{now.year}",
            "time": f"{now.hour}:{now.minute}:{now.second}",
            "timestamp": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "status": status,
            "verbosity": "ERROR" if status == "FAILURE" else "INFO",
            "message": self.show(message),
            "kpi": kpi or {},
            **self.show(fields),
        }
        self._has_ended = is_last
        LOGGER.debug("status", extra={"event": {"event": "status", **line}})
        try:
            append_line(self.folder / STATUS_NAME, dump_json(line))
        except StorageError:
            self._has_ended = False
            raise


class _Progress:
    """The time left is told from what is done after the first call: before it lies what an earlier run did."""

    def __init__(self, what: str, first_done: int) -> None:
        self.what = what
        self.first_done = first_done
        self.started_s = time.monotonic()
        self.shown_s = self.started_s
        self.as_json = find_message_form() == "json"
        self.terminal = sys.stderr.isatty() and not self.as_json

    def show(self, done: int, total: int) -> None:
        now_s = time.monotonic()
        interval_s = 0.1 if self.terminal else 1.0 if self.as_json else PROGRESS_LINE_INTERVAL_S
        if now_s - self.shown_s < interval_s and not (self.terminal and done >= total):
            return
        if done >= total and not self.terminal:
            return
        self.shown_s = now_s
        left_s = (now_s - self.started_s) / max(done - self.first_done, 1) * (total - done)
        text = f"{self.what}: {done} of {total}, {format_duration(left_s)} left"
        if self.as_json:
            event = {"event": "progress", "what": self.what, "done": done, "total": total, "left_s": round(left_s, 3)}
            LOGGER.debug("progress", extra={"event": event})
        elif self.terminal:
            filled = round(24 * done / max(total, 1))
            bar = "█" * filled + "·" * (24 - filled)
            end = "\r" if done < total else "\r\x1b[K"
            print(f"\r\x1b[K{bar} {text}", end=end, file=sys.stderr, flush=True)
        else:
            LOGGER.info(text)


def format_duration(seconds: float) -> str:
    """'4 s', '3 min 20 s', '1 h 5 min'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def format_eta(seconds: float) -> str:
    """H:MM:SS.ffffff, the form of the fields time_per_epoch, time_per_step and eta in status.json."""
    text = str(timedelta(seconds=max(seconds, 0)))
    return text if "." in text else text + ".000000"


def redact(spec: Spec) -> dict[str, Any]:
    """The spec as plain data, without the encryption key."""
    values = asdict(spec)
    values.pop("encryption_key")
    return values


def find_encryption_key(spec: Spec) -> str:
    """The key from the spec, else from the environment (KINEGRAPH_ENCRYPTION_KEY), else ''."""
    return spec.encryption_key or os.environ.get(KEY_VARIABLE, "")


@dataclass(frozen=True)
class Launch:
    """What torchrun or SLURM says about this process."""

    rank: int
    world_size: int
    local_world_size: int

    @property
    def num_nodes(self) -> int:
        return max(1, self.world_size // max(1, self.local_world_size))


def find_launch() -> Launch | None:
    """Who started this process: torchrun or srun; None without them (an interactive SLURM shell counts as none)."""
    torchrun, slurm = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_ID")
    try:
        if all(name in os.environ for name in torchrun):
            return Launch(*(int(os.environ[name]) for name in torchrun))
        interactive = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
        if all(name in os.environ for name in slurm) and not interactive:
            world_size = int(os.environ["SLURM_NTASKS"])
            num_nodes = int(os.environ.get("SLURM_NNODES", 1))
            return Launch(int(os.environ["SLURM_PROCID"]), world_size, world_size // max(1, num_nodes))
    except ValueError:
        return None
    return None


def find_launched_rank() -> int:
    """The rank that torchrun or SLURM gave this process; 0 without them."""
    launch = find_launch()
    return launch.rank if launch else 0


@contextmanager
def open_run(
    action: str, folder: Path, spec: Spec, origins: dict[str, str], locations: dict[str, str] | None = None
) -> Iterator[Run]:
    """Make the folder, write a STARTED line; end with one SUCCESS or FAILURE line.

    SIGTERM becomes Terminated. OSError becomes StorageError. Everything raised is passed on.
    """
    run = Run(action, folder, spec, origins, writes=find_launched_rank() == 0, locations=locations or {})
    make_folder(folder)
    with lock_folder(folder, LOCK_WAIT_S) if run.writes else nullcontext():
        handler = connect_log(run)
        try:
            with raise_on_sigterm(), _explain_failure(run):
                run.write_status("STARTED", f"Starting {action}.")
                yield run
                run.write_status("SUCCESS", f"{action} finished successfully.")
        finally:
            if handler is not None:
                LOGGER.removeHandler(handler)
                handler.close()


@contextmanager
def _explain_failure(run: Run) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        explained = _find_cause(error, run)
        _write_failure(run, explained)
        if explained is not error:
            LOGGER.debug("traceback", exc_info=error)
            raise explained from error
        if isinstance(error, Exception) and not isinstance(error, KinegraphError):
            error.add_note(f"The traceback is in {run.folder / 'log.txt'}.")
        raise


def _find_cause(error: BaseException, run: Run) -> BaseException:
    """What to tell: an interrupt that a library made an error of its own, an OSError in our words, or the error."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, KeyboardInterrupt | Terminated):
            return error if link is error else type(link)()
        link = link.__context__
    if isinstance(error, OSError):
        return explain_os_error(error, error.filename or run.folder)
    # A full disk is one of this machine; all else is about what the user gave
    if run.locations and isinstance(error, KinegraphError) and not isinstance(error, StorageError):
        return type(error)(*(Problem(**run.show(asdict(problem))) for problem in error.problems))
    return error


def _write_failure(run: Run, error: BaseException) -> None:
    named = {KeyboardInterrupt: "interrupted", Terminated: "terminated (SIGTERM)"}
    reason = named.get(type(error)) or (
        str(error) if isinstance(error, KinegraphError) else f"{type(error).__name__}: {error}"
    )
    try:
        run.write_status("FAILURE", f"{run.action} failed: {reason}")
    except KinegraphError as second:
        LOGGER.error("status.json could not be written: %s", second)
    if run.writes and not isinstance(error, KinegraphError | KeyboardInterrupt | Terminated):
        LOGGER.debug("traceback", exc_info=error)


def connect_log(run: Run) -> logging.Handler | None:
    """Send messages of this process to the run's log.txt; None if they go there already or the run does not write."""
    path = run.folder / "log.txt"
    open_files = [getattr(handler, "baseFilename", "") for handler in LOGGER.handlers]
    if not run.writes or str(path.absolute()) in open_files:
        return None
    try:
        handler = _LogFile(path, encoding="utf-8")
    except OSError as error:
        raise explain_os_error(error, path) from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.setLevel(logging.DEBUG)
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.DEBUG)
    return handler


class _LogFile(logging.FileHandler):
    def filter(self, record: logging.LogRecord) -> bool:
        """Not what only a reader of JSON lines is told: it stands in status.json."""
        return not hasattr(record, "event") and bool(super().filter(record))

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (a name of logging)
        """Say nothing: a full disk shows in status.json and in the run's own error, not once more per message."""


def show_messages(as_json: bool = False) -> None:
    """Show messages on stderr from now on: as text, or with progress and status as JSON lines."""
    if any(isinstance(handler, _Messages | _JsonMessages) for handler in LOGGER.handlers):
        return
    LOGGER.addHandler(_JsonMessages(logging.DEBUG) if as_json else _Messages(logging.INFO))
    LOGGER.setLevel(logging.DEBUG)
    LOGGER.propagate = False


def find_message_form() -> Literal["", "text", "json"]:
    """How this process shows its messages; '' where nobody asked for them."""
    if any(isinstance(handler, _JsonMessages) for handler in LOGGER.handlers):
        return "json"
    return "text" if any(isinstance(handler, _Messages) for handler in LOGGER.handlers) else ""


class _Messages(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        clear = "\r\x1b[K" if sys.stderr.isatty() else ""  # a progress bar may stand there
        print(clear + prefix + record.getMessage(), file=sys.stderr, flush=True)


class _JsonMessages(logging.Handler):
    """One JSON object a line: event is message, progress, status, or what an action adds (trials)."""

    def emit(self, record: logging.LogRecord) -> None:
        event = getattr(record, "event", None)
        if event is None and record.levelno < logging.INFO:
            return
        event = event or {"event": "message", "level": record.levelname.lower(), "message": record.getMessage()}
        print(dump_json(event), file=sys.stderr, flush=True)


@contextmanager
def raise_on_sigterm() -> Iterator[None]:
    """SIGTERM becomes Terminated, where this is the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not cut the last words short
        raise Terminated

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
