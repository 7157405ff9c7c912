"""Runs jobs as processes of this machine that survive whoever started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace

from kinegraph import remote
from kinegraph.errors import Problem, StorageError
from kinegraph.jobs.environment import build_environment
from kinegraph.jobs.liveness import End, find_silence
from kinegraph.jobs.logs import read_tail
from kinegraph.jobs.processes import describe_process, is_alive, is_on_this_machine, send_signal
from kinegraph.jobs.record import LOG_NAME, Job, find_work_folder, write_job
from kinegraph.storage import explain_os_error, make_folder

_LAUNCHED: list[subprocess.Popen[bytes]] = []
"""Supervisors that this process started: kept so that the system can forget them once they have ended."""


def prepare(root: str, job: Job) -> Job:
    """This process answers for the job until its supervisor does."""
    me = describe_process(os.getpid())
    return replace(job, host=me.host, owner=me)


def launch(root: str, job: Job, key: str) -> None:
    """Start the supervisor in a session of its own. It holds until the record names it."""
    folder = make_folder(find_work_folder(root, job.id))
    command = [sys.executable, "-m", "kinegraph.jobs.supervisor", root, job.id, "--hold"]
    path = folder / LOG_NAME
    try:
        with open(path, "ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=log,
                env=build_environment(os.environ, key),
                cwd=folder,
                start_new_session=True,
            )
    except OSError as error:
        raise explain_os_error(error, path) from error
    _LAUNCHED[:] = [other for other in _LAUNCHED if other.poll() is None] + [process]
    assert process.stdin is not None
    try:
        write_job(root, replace(job, owner=describe_process(process.pid)))
        process.stdin.write(b"\n")
        process.stdin.close()
    except BrokenPipeError:
        raise StorageError(Problem(f"job {job.id}", "a supervisor that ended at once", "one that runs")) from None
    except BaseException:
        process.kill()
        raise


def find_end(root: str, job: Job) -> End | None:
    """By its processes on the machine that runs it, elsewhere by its last sign of life."""
    for process in _LAUNCHED:
        process.poll()
    owner = job.owner
    if owner is None or not is_on_this_machine(owner):
        return find_silence(root, job)
    if is_alive(owner) or (job.process is not None and is_alive(job.process)):
        return None
    return End(f"the process of the job on {owner.host} is gone (killed, or the machine was restarted)", True)


def ask_to_stop(root: str, job: Job) -> None:
    if not (job.owner and job.owner.pid != os.getpid() and send_signal(job.owner, signal.SIGTERM)):
        send_signal(job.process, signal.SIGTERM, to_group=True)


def kill(root: str, job: Job) -> None:
    send_signal(job.process, signal.SIGKILL, to_group=True)
    if job.owner and job.owner.pid != os.getpid():
        send_signal(job.owner, signal.SIGKILL)


def read_log(root: str, job: Job) -> str:
    """With a remote root the log of a running job lies in the cache of its machine."""
    path = find_work_folder(root, job.id) / LOG_NAME
    return read_tail(path) if remote.is_remote(root) and path.is_file() else ""
