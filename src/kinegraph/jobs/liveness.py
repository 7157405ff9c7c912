"""Whether a job that is said to be Running still is, and what became of it if not.

On the machine that runs it, the processes decide, and so does the Ray cluster for its jobs: then the record is
corrected for good. Elsewhere only silence can be noticed (another machine's clock may be wrong, its network down): then
the answer says Error and the record stays as it is, so that a job that comes back is Running again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from kinegraph import remote
from kinegraph.errors import KinegraphError
from kinegraph.jobs.artifacts import read_status
from kinegraph.jobs.plain_json import parse_json
from kinegraph.jobs.record import CANCEL_NAME, HEARTBEAT_NAME, Job, Status, advance, find_work_folder, get_time
from kinegraph.jobs.supervisor import ANSWER_NAME, read_answer
from kinegraph.run_files import STATUS_NAME

STALE_S = 600.0
MAX_HEARTBEAT_BYTES = 10_000
MAX_COUNT = 10**15


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_COUNT


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict) and bool(value)


PROGRESS: dict[str, Callable[[Any], bool]] = {
    "epoch": _is_count,
    "max_epoch": _is_count,
    "step": _is_count,
    "max_step": _is_count,
    "time_per_epoch": _is_text,
    "eta": _is_text,
    "kpi": _is_mapping,
    "message": _is_text,
    "timestamp": _is_text,
}
"""What of a line of status.json tells how far a run is -> whether a value of it can be used."""


@dataclass(frozen=True)
class End:
    """Why a job cannot be running any more. What is not certain is told, and not written."""

    message: str
    is_certain: bool


def find_silence(root: str, job: Job) -> End | None:
    """The end of a job without a sign of life for ten minutes; None if there was one."""
    signs = [job.created_at, job.started_at, _read_heartbeat(root, job)]
    signs += [line.get("timestamp") for line in _read_status(job)[-1:]]
    times = [time for sign in signs if (time := _parse_time(sign)) is not None]
    latest = max(times, default=datetime.fromtimestamp(0, UTC))
    if (datetime.now(UTC) - latest).total_seconds() < STALE_S:
        return None
    place = f"{job.runner} runner on {job.host}" if job.host else f"{job.runner} runner"
    return End(f"no sign of life from the {place} since {latest.isoformat(timespec='seconds')}", False)


def judge(root: str, job: Job, end: End) -> Job:
    """The final state of a job whose processes are gone: by the last line of status.json, else Canceled or Error."""
    lines = _read_status(job)
    status, message = (lines[-1].get("status"), str(lines[-1].get("message", ""))) if lines else (None, "")
    if status == "SUCCESS":
        answer = read_answer(find_work_folder(root, job.id) / ANSWER_NAME)
        found = {name: answer[name] for name in ("metrics", "files") if isinstance(answer.get(name), dict)}
        running = job if job.status == "Running" else advance(job, "Running")
        return _end(running, "Complete", f"finished; then {end.message}", **found)
    if end.is_certain and remote.exists(remote.join(root, job.id, CANCEL_NAME)):
        return _end(job, "Canceled", "canceled")
    return _end(job, "Error", f"{message} ({end.message})" if status == "FAILURE" else f"{end.message}: see the log")


def _end(job: Job, status: Status, message: str, **found: Any) -> Job:
    return advance(job, status, message=message, ended_at=get_time(), **found)


def _read_status(job: Job) -> list[dict[str, Any]]:
    """The lines that this job, and no earlier one in the same folder, wrote into its status.json."""
    location = remote.join(job.results_dir, STATUS_NAME)
    created = _parse_time(job.created_at)
    with contextlib.suppress(KinegraphError):
        if remote.exists(location):
            lines = [(_parse_time(line.get("timestamp")), line) for line in read_status(location)]
            return [line for time, line in lines if time is not None and (created is None or time >= created)]
    return []


def _read_heartbeat(root: str, job: Job) -> Any:
    location = remote.join(root, job.id, HEARTBEAT_NAME)
    with contextlib.suppress(KinegraphError, ValueError):
        content = parse_json(remote.read_text(location, MAX_HEARTBEAT_BYTES))
        return content.get("time") if isinstance(content, dict) else None
    return None


def measure_age_s(job: Job) -> float:
    """Seconds since the job was created."""
    created = _parse_time(job.created_at)
    return (datetime.now(UTC) - created).total_seconds() if created else float("inf")


def read_progress(job: Job) -> dict[str, Any]:
    """How far a job is by its status.json: the last epoch, max_epoch, eta, kpi and so on; {} if it says nothing."""
    lines = [line for line in _read_status(job) if line.get("status") == "RUNNING"]
    known = {name: line[name] for line in lines for name, fits in PROGRESS.items() if fits(line.get(name))}
    return {name: known[name] for name in PROGRESS if name in known}


def _parse_time(text: Any) -> datetime | None:
    if not isinstance(text, str):
        return None
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        return None
    return time if time.tzinfo else time.replace(tzinfo=UTC)
