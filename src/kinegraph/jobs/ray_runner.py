"""Runs jobs on a Ray cluster, by Ray's job submission. The root must be a shared folder or object storage.

No secret travels with the job: Ray shows what it is given. Credentials and the encryption key come from the environment
of the cluster, or from a key file there.
"""

from __future__ import annotations

import os
import shlex
import time
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from kinegraph import remote
from kinegraph.errors import KinegraphError, Problem, UserError
from kinegraph.jobs.liveness import End, find_silence, measure_age_s
from kinegraph.jobs.processes import is_alive
from kinegraph.jobs.record import CANCEL_NAME, Job
from kinegraph.jobs.resolve import KEY_FROM_CALL

ADDRESS_VARIABLE = "RAY_ADDRESS"
NO_AGENT = "No available agent"
SUBMIT_S = 60.0
"""How long submitting is tried. For twice that time it is no wonder that Ray does not know a job."""
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
STOP_WAIT_S = 15.0


def prepare(root: str, job: Job) -> Job:
    """The address is the one that was given, else RAY_ADDRESS. Raises UserError without Ray, address or cluster."""
    address = job.runner_address or os.environ.get(ADDRESS_VARIABLE, "")
    if not address:
        hint = f"Give address=http://HOST:8265, or set {ADDRESS_VARIABLE}."
        raise UserError(Problem("runner ray", "no address", "the address of a Ray cluster's dashboard", hint))
    if "@" in urlsplit(address).netloc:
        raise UserError(Problem("runner ray", "an address with a user or password", "http://HOST:8265"))
    if job.encryption_key == KEY_FROM_CALL:
        hint = "Use a key file that the cluster can read, or KINEGRAPH_ENCRYPTION_KEY in its environment."
        raise UserError(Problem("encryption_key", "a key by value", "a reference: Ray shows what it is given", hint))
    _connect(address)
    return replace(job, runner_address=address)


def launch(root: str, job: Job, key: str) -> None:
    command = ["python", "-m", "kinegraph.jobs.supervisor", root, job.id]
    gpus = {"entrypoint_num_gpus": job.num_gpus} if job.num_gpus else {}
    client = _connect(job.runner_address)
    until_s = time.monotonic() + SUBMIT_S
    while True:
        try:
            client.submit_job(entrypoint=shlex.join(command), submission_id=_name(job), **gpus)
            return
        except Exception as error:
            # A cluster that has just started says this until its agents are up
            if NO_AGENT not in str(error) or time.monotonic() >= until_s:
                raise KinegraphError(Problem("runner ray", _describe(error), "a job that Ray takes")) from None
        time.sleep(1)


def find_end(root: str, job: Job) -> End | None:
    """By what Ray says; by silence where the cluster cannot be reached."""
    if job.process is not None and is_alive(job.process):
        return None
    try:
        info = _connect(job.runner_address).get_job_info(_name(job))
    except UserError:
        return find_silence(root, job)
    except RuntimeError as error:
        if "does not exist" in str(error):
            if measure_age_s(job) < 2 * SUBMIT_S:
                return None
            return End(f"the Ray cluster at {job.runner_address} does not know the job: was it restarted?", True)
        return find_silence(root, job)
    state = str(getattr(info.status, "value", info.status))
    if state == "PENDING" and remote.exists(remote.join(root, job.id, CANCEL_NAME)):
        # Ray keeps it until there is room for it: the supervisor then sees that nobody wants it any more
        return End("canceled before it started", True)
    if state not in ENDED:
        return None
    return End(f"Ray ended the job: {' '.join(str(info.message).split())[:500]}", True)


def ask_to_stop(root: str, job: Job) -> None:
    """A job that waits for resources is taken back; of one that runs, the supervisor looks for the request."""
    if job.status == "Pending":
        kill(root, job)


def kill(root: str, job: Job) -> None:
    try:
        client = _connect(job.runner_address)
        client.stop_job(_name(job))
        until_s = time.monotonic() + STOP_WAIT_S
        while time.monotonic() < until_s and find_end(root, job) is None:
            time.sleep(0.2)
    except RuntimeError:
        return  # it is not there any more


def read_log(root: str, job: Job) -> str:
    """What Ray caught: the supervisor's own words, as when it could not start."""
    try:
        return str(_connect(job.runner_address).get_job_logs(_name(job)))
    except (KinegraphError, RuntimeError):
        return ""


def _name(job: Job) -> str:
    return f"kinegraph-{job.id}"


def _connect(address: str) -> Any:
    try:
        from ray.job_submission import JobSubmissionClient
    except ImportError:
        hint = "pip install 'kinegraph[ray]' brings it."
        raise UserError(Problem("runner ray", "no ray package", "Ray", hint)) from None
    try:
        return JobSubmissionClient(address)
    except Exception as error:
        hint = "It is the address of the dashboard, such as http://HOST:8265. Is the cluster up?"
        raise UserError(Problem(f"runner ray at {address}", _describe(error), "a Ray cluster", hint)) from None


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
