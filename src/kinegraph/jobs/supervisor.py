"""The process that stands beside an action: `python -m kinegraph.jobs.supervisor ROOT JOB_ID`.

It starts the action, keeps its output, gives signs of life, stops it on request and writes the final state. Under every
runner it is the same; a runner only decides where it runs. If it dies, the action is stopped by the system (Linux).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from kinegraph import remote
from kinegraph.errors import KinegraphError, StorageError
from kinegraph.jobs.environment import build_environment
from kinegraph.jobs.plain_json import parse_json
from kinegraph.jobs.processes import describe_process
from kinegraph.jobs.record import (
    CANCEL_NAME,
    HEARTBEAT_NAME,
    LOG_NAME,
    SPEC_NAME,
    Job,
    Status,
    advance,
    find_work_folder,
    get_time,
    read_job,
    write_job,
)
from kinegraph.jobs.resolve import KEY_FROM_FILE, read_key_file
from kinegraph.storage import dump_json, make_folder

ANSWER_NAME = "answer.json"
MAX_ANSWER_BYTES = 4 * 1024 * 1024
POLL_S = 0.2
CANCEL_CHECK_S = 1.0
REMOTE_CANCEL_CHECK_S = 5.0
HEARTBEAT_S = 30.0
GRACE_S = 20.0
WRITE_DELAYS_S = (0.0, 1.0, 5.0, 15.0, 60.0, 120.0)
PR_SET_PDEATHSIG = 1


class Supervisor:
    """Runs one job. `is_stopped` is set by a signal; `grace_s` is what the action gets to end after SIGTERM."""

    def __init__(self, root: str, job: Job, grace_s: float = GRACE_S) -> None:
        self.root = root
        self.job = job
        self.grace_s = grace_s
        self.is_stopped = False
        self.folder = find_work_folder(root, job.id)
        self.is_remote = remote.is_remote(root)
        self.log_size = -1

    def run(self) -> int:
        """From Pending to the final state; gives the exit code of the action, or 1."""
        make_folder(self.folder)
        if self._is_canceled():
            self._end("Canceled", "canceled before it started")
            return 1
        try:
            action = self._start()
        except (KinegraphError, OSError) as error:
            self._end("Error", f"could not be started: {error}")
            return 1
        try:
            reason = self._watch(action)
        finally:
            _kill_group(action, signal.SIGKILL)  # what an action that crashed left behind, or an error in here
        self._finish(action.returncode, reason)
        return action.returncode if 0 <= action.returncode < 256 else 1

    def _start(self) -> subprocess.Popen[bytes]:
        spec = self.folder / SPEC_NAME
        if self.is_remote:
            remote.write_text(spec, remote.read_text(remote.join(self.root, self.job.id, SPEC_NAME)))
        key = read_key_file(self.job.encryption_key) if self.job.encryption_key.startswith(KEY_FROM_FILE) else ""
        command = build_command(self.job, spec)
        with open(self.folder / ANSWER_NAME, "wb") as answer, open(self.folder / LOG_NAME, "ab") as log:
            action = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=answer,
                stderr=log,
                env=build_environment(os.environ, key),
                cwd=self.folder,
                start_new_session=True,
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )
        try:
            me = describe_process(os.getpid())
            changes = {"command": command, "started_at": get_time(), "host": me.host, "owner": me}
            self._write(advance(self.job, "Running", **changes, process=describe_process(action.pid)))
        except BaseException:
            _kill_group(action, signal.SIGKILL)
            action.wait()
            raise
        return action

    def _watch(self, action: subprocess.Popen[bytes]) -> str:
        """Wait for the end. Gives why the action was stopped: canceled, terminated, or '' if it was not."""
        reason, stop_at_s = "", float("inf")
        due_s = {self._beat: 0.0, self._look_for_cancel: 0.0}
        intervals_s = {
            self._beat: HEARTBEAT_S,
            self._look_for_cancel: REMOTE_CANCEL_CHECK_S if self.is_remote else CANCEL_CHECK_S,
        }
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                action.wait(POLL_S)
                return reason
            now_s = time.monotonic()
            for call, next_s in due_s.items():
                if now_s >= next_s:
                    call()
                    due_s[call] = time.monotonic() + intervals_s[call]
            if self.is_stopped and not reason:
                reason = "canceled" if self._is_canceled() else "terminated"
                stop_at_s = time.monotonic() + self.grace_s
                _kill_group(action, signal.SIGTERM)
            if time.monotonic() >= stop_at_s:
                _kill_group(action, signal.SIGKILL)

    def _look_for_cancel(self) -> None:
        self.is_stopped = self.is_stopped or self._is_canceled()

    def _is_canceled(self) -> bool:
        with contextlib.suppress(KinegraphError):  # a storage that is away for a moment: ask again later
            return remote.exists(remote.join(self.root, self.job.id, CANCEL_NAME))
        return False

    def _beat(self) -> None:
        """Say that the job is alive, for readers on other machines, and show them its log."""
        with contextlib.suppress(KinegraphError):
            remote.write_text(remote.join(self.root, self.job.id, HEARTBEAT_NAME), dump_json({"time": get_time()}))
            self._upload_log()

    def _upload_log(self) -> None:
        path = self.folder / LOG_NAME
        if self.is_remote and path.is_file() and path.stat().st_size != self.log_size:
            size_bytes = path.stat().st_size
            remote.upload(path, remote.join(self.root, self.job.id, LOG_NAME))
            self.log_size = size_bytes

    def _finish(self, code: int, reason: str) -> None:
        answer = read_answer(self.folder / ANSWER_NAME)
        if code == 0:
            self._end("Complete", "", exit_code=0, metrics=answer.get("metrics"), files=answer.get("files"))
            return
        message = describe_failure(code, answer)
        self._log(f"error: {line}" for line in message.splitlines())
        if reason == "canceled":
            self._end("Canceled", "canceled", exit_code=code)
        elif reason:
            self._end("Error", "stopped from outside (SIGTERM), as when a machine shuts down", exit_code=code)
        else:
            self._end("Error", message, exit_code=code)

    def _end(self, status: Status, message: str, **found: Any) -> None:
        """Write the final state and what was read from the answer, and clear up."""
        kept = {name: value for name, value in found.items() if value is not None}
        changes = {**kept, "message": message, "ended_at": get_time()}
        with contextlib.suppress(KinegraphError):
            self._upload_log()
        self._write(advance(self.job, status, **changes))
        with contextlib.suppress(KinegraphError):
            remote.remove(remote.join(self.root, self.job.id, HEARTBEAT_NAME))
        (self.folder / ANSWER_NAME).unlink(missing_ok=True)
        if self.is_remote and self.log_size >= 0:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _log(self, lines: Any) -> None:
        path, text = self.folder / LOG_NAME, {"encoding": "utf-8", "errors": "backslashreplace"}
        with contextlib.suppress(OSError), open(path, "a", **text) as log:  # type: ignore[call-overload]
            log.writelines(f"{line}\n" for line in lines)

    def _write(self, job: Job) -> None:
        """Write the record, with patience: a storage that is away for minutes must not cost the result."""
        for attempt, delay_s in enumerate(WRITE_DELAYS_S, 1):
            time.sleep(delay_s)
            try:
                write_job(self.root, job)
                self.job = job
                return
            except StorageError as error:
                self._log([f"the record could not be written: {error}"])
                if attempt == len(WRITE_DELAYS_S):
                    raise


def build_command(job: Job, spec: Path) -> list[str]:
    """What is run: the same command that a person would give."""
    options = ["--yes"] if job.effective_action == "automl" else []
    return [sys.executable, "-m", "kinegraph", job.effective_action, "-e", str(spec), "--json", *options]


def read_answer(path: Path) -> dict[str, Any]:
    """The JSON that an action printed last; {} if it did not come to that."""
    try:
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - MAX_ANSWER_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return {}
    start = 0 if text.startswith("{") else text.rfind("\n{") + 1
    with contextlib.suppress(ValueError):
        answer = parse_json(text[start:])
        return answer if isinstance(answer, dict) else {}
    return {}


def describe_failure(code: int, answer: dict[str, Any]) -> str:
    """One line for each problem that the action told, or how it ended without a word."""
    lines = []
    for problem in answer.get("problems") or []:
        with contextlib.suppress(TypeError, KeyError):
            line = f"{problem['where']}: got {problem['got']}, expected {problem['expected']}."
            lines.append(f"{line} {problem['hint']}".strip())
    if lines:
        return "\n".join(lines)
    if code < 0:
        with contextlib.suppress(ValueError):
            name = signal.Signals(-code).name
            hint = " Was the memory used up?" if name == "SIGKILL" else ""
            return f"ended by the signal {name}.{hint}"
    return f"ended with exit code {code} and no answer: see the log"


def _kill_group(action: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(action.pid, number)


def _die_with_parent() -> None:
    """Runs in the child before the action: have the system send SIGTERM when the supervisor dies."""
    import ctypes

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _make_stop(supervisor: Supervisor) -> Callable[[int, FrameType | None], None]:
    def stop(number: int, frame: FrameType | None) -> None:
        supervisor.is_stopped = True

    return stop


def main(arguments: list[str]) -> int:
    """`--hold`: wait for a line on stdin, by which the launcher says that the record names this process."""
    root, job_id, *options = arguments
    if "--hold" in options and not sys.stdin.buffer.readline():
        return 1  # the launcher is gone and the record names it, so that a reader notices
    job = read_job(root, job_id)
    if job.status != "Pending":
        return 1
    supervisor = Supervisor(root, job)
    signal.signal(signal.SIGTERM, _make_stop(supervisor))
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # not SIG_IGN, which the action would inherit
    return supervisor.run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
