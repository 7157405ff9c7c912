"""The record of a job, job.json in its folder: what was asked, what was decided, and how far it is.

Pending ──> Running ──> Complete | Error | Canceled
   └──────────────────────────────> Error | Canceled

The record is there before anything is launched, and each version of it appears whole. Afterwards one process at a time
writes it: whoever launches, then the supervisor of the job, and a reader only where that supervisor is gone for sure.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from kinegraph import remote
from kinegraph.config import shorten
from kinegraph.errors import KinegraphError, Problem, StorageError, UserError
from kinegraph.file_systems import check_location
from kinegraph.jobs.plain_json import parse_json
from kinegraph.spec import SHORTHANDS
from kinegraph.storage import dump_json

Status = Literal["Pending", "Running", "Complete", "Error", "Canceled"]

TRANSITIONS: dict[str, tuple[str, ...]] = {
    "Pending": ("Running", "Error", "Canceled"),
    "Running": ("Complete", "Error", "Canceled"),
    "Complete": (),
    "Error": (),
    "Canceled": (),
}
"""State -> the states that may follow."""

ROOT_VARIABLE = "KINEGRAPH_JOBS_ROOT"
RECORD_NAME = "job.json"
SPEC_NAME = "spec.yaml"
LOG_NAME = "log.txt"
CANCEL_NAME = "cancel.json"
HEARTBEAT_NAME = "heartbeat.json"
MAX_RECORD_BYTES = 1024 * 1024
SCHEMA_VERSION = 1
MIN_PREFIX = 4
ID_PATTERN = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
SECRET_OVERRIDE = re.compile(r"\s*encryption_key(\.[^=]*)?\s*=")
NOT_SHOWN = "(set, not shown)"

_STRICT = ConfigDict(extra="forbid")


@dataclass(config=_STRICT, frozen=True)
class ProcessInfo:
    """A process on some machine. `start` tells it from a later one with the same number; `boot` from one before a
    restart of the machine. Both are empty where the system does not tell."""

    pid: int
    host: str
    start: str = ""
    boot: str = ""


@dataclass(config=_STRICT, frozen=True)
class PolicyRecord:
    """What was decided about a train request, and why."""

    policy: str
    origin: str
    reason: str
    uses_automl: bool
    route_reason: str


@dataclass(config=_STRICT, frozen=True)
class Job:
    """An action under a runner.

    `action` is what was asked for and `effective_action` what runs: automl or train for a train request. `inferred`
    holds the options that were filled in (dotted key -> value). `encryption_key` says where the key comes from, never
    what it is. `owner` is the process that answers for the job: first the one that launches it, then its supervisor;
    `process` is the action itself. `progress` is read from the results when somebody asks, and not kept. Times are
    ISO 8601, UTC.
    """

    id: str
    action: str
    effective_action: str
    runner: str
    created_at: str
    results_dir: str
    status: Status = "Pending"
    message: str = ""
    schema_version: int = SCHEMA_VERSION
    runner_address: str = ""
    parent_job_id: str | None = None
    data_source: str | dict[str, str] | None = None
    overrides: list[str] = field(default_factory=list)
    inferred: dict[str, Any] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    policy: PolicyRecord | None = None
    encryption_key: str = ""
    num_gpus: int = 0
    command: list[str] = field(default_factory=list)
    started_at: str | None = None
    ended_at: str | None = None
    host: str = ""
    owner: ProcessInfo | None = None
    process: ProcessInfo | None = None
    exit_code: int | None = None
    progress: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    @property
    def has_ended(self) -> bool:
        return not TRANSITIONS[self.status]

    def as_data(self) -> dict[str, Any]:
        """The record as plain data: what job.json and the answers of `kinegraph jobs` hold."""
        return asdict(self)


def make_job_id() -> str:
    return str(uuid.uuid4())


def get_time() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def advance(job: Job, status: Status, **changes: Any) -> Job:
    """The job in another state. Raises KinegraphError for a step that the states do not allow."""
    if status not in TRANSITIONS[job.status]:
        expected = " or ".join(TRANSITIONS[job.status]) or "no further state: the job has ended"
        raise KinegraphError(Problem(f"job {job.id}", f"the step {job.status} -> {status}", expected))
    return replace(job, status=status, **changes)


def redact_overrides(overrides: Sequence[str]) -> list[str]:
    """The overrides as they may be written: without the value of the encryption key."""
    return [
        f"{text.partition('=')[0]}={NOT_SHOWN}" if SECRET_OVERRIDE.match(text) else text for text in map(str, overrides)
    ]


def write_overrides(changes: Sequence[str] | Mapping[str, Any]) -> list[str]:
    """`key=value` texts from such texts or from a mapping of dotted keys (or shorthands) to values."""
    if isinstance(changes, Mapping):
        known = {SHORTHANDS.get(key, key): value for key, value in changes.items()}
        return [f"{key}={dump_json(_make_plain(value))}" for key, value in known.items()]
    if isinstance(changes, str):
        hint = "Give a list: ['train.num_epochs=20', ...]."
        raise UserError(Problem("spec_overrides", "one text", "a list of key=value texts or a mapping", hint))
    return [str(text) for text in changes]


def _make_plain(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def find_root(root: str | os.PathLike[str] | None = None) -> str:
    """The folder of all jobs: the argument, else KINEGRAPH_JOBS_ROOT, else ./jobs. A local one becomes absolute."""
    text = os.environ.get(ROOT_VARIABLE) or "jobs" if root is None else os.fspath(root)
    return make_absolute(text, "root")


def make_absolute(location: str, where: str = "a path") -> str:
    """A path that means the same in another folder; a URI stays as it is.

    `where` says what it is for. Raises UserError for a URI with a password, and for an empty text, which would mean the
    current folder: most often it is a variable of a shell that is not set.
    """
    if not location:
        raise UserError(Problem(where, "an empty text", "a path, or a URI such as s3://bucket/data"))
    if remote.is_remote(location):
        check_location(location)
        return location.rstrip("/")
    return os.path.abspath(os.path.expanduser(location))


def find_folder(root: str, job_id: str) -> str:
    return remote.join(root, job_id)


def find_work_folder(root: str, job_id: str) -> Path:
    """Where a job writes on the machine that runs it: its folder, or for a remote root one in the cache."""
    return remote.find_cache_folder() / "jobs" / job_id if remote.is_remote(root) else Path(root, job_id)


def write_job(root: str, job: Job) -> None:
    """Write job.json, whole or not at all. Raises StorageError."""
    text = dump_json(job.as_data(), indent=2) + "\n"
    # A half of a surrogate pair, as in names that are no UTF-8, is no text; its escape sequence is one of JSON
    text = text.encode("utf-8", errors="backslashreplace").decode()
    remote.write_text(remote.join(root, job.id, RECORD_NAME), text)


def read_job(root: str, job_id: str) -> Job:
    """The record as it was last written. `job_id` may be the unique start of an id. Raises UserError, StorageError."""
    return read_record(root, find_job_id(root, job_id))


def read_record(root: str, full_id: str) -> Job:
    """The record in the folder of a job. Raises UserError where there is none, StorageError for a damaged one."""
    location = remote.join(root, full_id, RECORD_NAME)
    text = remote.read_text(location, MAX_RECORD_BYTES)
    try:
        content = parse_json(text)
        _check_version(content, location)
        job = TypeAdapter(Job).validate_python(content)
    except ValueError as error:
        raise StorageError(Problem(location, _describe_fault(error), "the record of a job")) from None
    if job.id != full_id:
        raise StorageError(Problem(location, f"the record of job {shorten(job.id)}", f"that of {full_id}"))
    return replace(job, progress={})


def _check_version(content: Any, location: str) -> None:
    version = content.get("schema_version") if isinstance(content, dict) else None
    if type(version) is int and version == SCHEMA_VERSION:
        return
    is_newer = type(version) is int and version > SCHEMA_VERSION
    hint = "A newer Kinegraph wrote it: update this one." if is_newer else ""
    got = "no schema_version" if version is None else f"schema_version {shorten(version)}"
    raise StorageError(Problem(location, got, f"schema_version {SCHEMA_VERSION}", hint))


def _describe_fault(error: ValueError) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{shorten('.'.join(map(str, first['loc'])))}: {first['msg']}"
    return f"text that is not JSON ({error})"


def find_job_id(root: str, job_id: str) -> str:
    """The full id of the job that the text names or begins. Raises UserError for none and for several."""
    text = str(job_id).lower()
    if ID_PATTERN.fullmatch(text) and remote.exists(remote.join(root, text, RECORD_NAME)):
        return text
    is_prefix = len(text) >= MIN_PREFIX and not text.strip("0123456789abcdef-")
    found = list_job_ids(root, text) if is_prefix else []
    if len(found) == 1:
        return found[0]
    expected = f"the id of a job under {root}, or its first characters (at least {MIN_PREFIX})"
    if found:
        raise UserError(Problem("job id", f"{text!r}, which begins {len(found)} ids", expected))
    hint = f"`kinegraph jobs list` shows them; --root or {ROOT_VARIABLE} names another folder."
    raise UserError(Problem("job id", f"{str(job_id)[:80]!r}, which is not there", expected, hint))


def list_job_ids(root: str, start: str = "") -> list[str]:
    """The ids of the jobs under a root that begin with `start`, unordered. A root that is not there yet has none."""
    names = [name for name, kind in remote.list_folder(root).items() if kind == "directory" and name.startswith(start)]
    return [
        name for name in names if ID_PATTERN.fullmatch(name) and remote.is_file(remote.join(root, name, RECORD_NAME))
    ]
