"""The SDK of jobs: create, look at, wait for, cancel. `kinegraph jobs ...` does the same."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import yaml

from kinegraph import remote
from kinegraph.config_source import nest
from kinegraph.errors import KinegraphError, Problem, StorageError, UserError, look_up
from kinegraph.jobs.liveness import judge, read_progress
from kinegraph.jobs.logs import cut_lines, read_tail
from kinegraph.jobs.record import (
    CANCEL_NAME,
    LOG_NAME,
    SPEC_NAME,
    Job,
    advance,
    find_root,
    get_time,
    list_job_ids,
    read_job,
    read_record,
    write_job,
    write_overrides,
)
from kinegraph.jobs.request import Request, plan_job
from kinegraph.jobs.runners import RUNNERS
from kinegraph.jobs.supervisor import GRACE_S
from kinegraph.run import LOGGER
from kinegraph.storage import dump_json

POLL_S = 0.2
MAX_POLL_S = 5.0
CANCEL_WAIT_S = GRACE_S + 15.0

Root = str | os.PathLike[str] | None


def create_job(
    action: str,
    spec_overrides: Sequence[str] | Mapping[str, Any] = (),
    parent_job_id: str | None = None,
    data_source: str | os.PathLike[str] | Mapping[str, str] | None = None,
    runner: str = "local",
    *,
    spec: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    root: Root = None,
    automl_policy: str | None = None,
    request: str | None = None,
    bundle: str | os.PathLike[str] | None = None,
    checkpoint: str | int = "best",
    key_file: str | os.PathLike[str] | None = None,
    address: str | None = None,
) -> Job:
    """Start an action and give its record; it goes on when the caller ends.

    A train request becomes a search (the action automl) by `automl_policy` (auto, on, off) or by the words of the
    `request`; `job.policy` says what was decided and why, after a look at the skill `bundle` if one is named. `spec` is
    a YAML file or a mapping; `spec_overrides` are key=value texts or a mapping, and stand above all else. The model
    comes from the parent job: its best checkpoint, the latest, or that of an epoch. `data_source` is a folder, a
    prefix such as s3://bucket/data, or a mapping of options to paths. `key_file` holds the encryption key; without it
    KINEGRAPH_ENCRYPTION_KEY is passed on. `root` is the folder of all jobs: else KINEGRAPH_JOBS_ROOT, else ./jobs.
    `address` is that of a Ray cluster.

    Raises SpecError with all that is wrong before anything is written, StorageError where the record cannot be.
    """
    chosen = look_up(RUNNERS, runner, "runner")
    place = find_root(root)
    plan = plan_job(
        Request(
            action,
            place,
            runner,
            write_overrides(spec_overrides),
            spec,
            parent_job_id,
            data_source,
            automl_policy,
            request,
            bundle,
            checkpoint,
            key_file,
            address or "",
        )
    )
    job = chosen.prepare(place, plan.job)
    text = yaml.safe_dump(nest(plan.values), sort_keys=False, allow_unicode=True)
    remote.write_text(remote.join(place, job.id, SPEC_NAME), text)
    write_job(place, job)
    try:
        chosen.launch(place, job, plan.key)
    except (KinegraphError, OSError) as error:
        write_job(place, advance(job, "Error", message=f"could not be launched: {error}", ended_at=get_time()))
        raise
    return read_job(place, job.id)


def get_job_status(job_id: str, root: Root = None) -> Job:
    """The record of a job as it is now; `.status` is Pending, Running, Complete, Error or Canceled.

    A job that is said to run and does not any more is found out (see `liveness`). Raises UserError for an unknown id.
    """
    job = _look(job_id, root)
    return replace(job, progress=read_progress(job)) if job.status == "Running" else job


def _look(job_id: str, root: Root) -> Job:
    place = find_root(root)
    return _refresh(place, read_job(place, job_id))


def _refresh(root: str, job: Job) -> Job:
    if job.has_ended:
        return job
    end = look_up(RUNNERS, job.runner, f"runner of job {job.id}").find_end(root, job)
    if end is None:
        return job
    job = read_job(root, job.id)  # its last words may have come while we looked
    if job.has_ended:
        return job
    judged = judge(root, job, end)
    if end.is_certain:
        with contextlib.suppress(KinegraphError):  # whoever may only read gets the answer all the same
            write_job(root, judged)
    return judged


def list_jobs(root: Root = None) -> list[Job]:
    """All jobs under a root, the newest first; without asking a cluster, so that a list takes no time.

    A record that cannot be read is left out, with a warning.
    """
    place = find_root(root)
    jobs = []
    for job_id in list_job_ids(place):
        try:
            job = read_record(place, job_id)
            jobs.append(_refresh(place, job) if job.runner == "local" else job)
        except (StorageError, UserError) as error:
            LOGGER.warning("left out: %s", error)
    return sorted(jobs, key=lambda job: job.created_at, reverse=True)


def wait_for_job(job_id: str, root: Root = None, timeout_s: float | None = None) -> Job:
    """The record once the job has ended, or as it is after `timeout_s` seconds."""
    until_s = time.monotonic() + (float("inf") if timeout_s is None else timeout_s)
    pause_s = POLL_S
    while True:
        job = _look(job_id, root)
        left_s = until_s - time.monotonic()
        if job.has_ended or left_s <= 0:
            return job
        time.sleep(min(pause_s, left_s))
        pause_s = min(MAX_POLL_S, pause_s * 1.2)


def get_job_logs(job_id: str, root: Root = None, tail: int | None = None) -> str:
    """What a job said so far: all of it (at most 16 MiB), or its last `tail` lines."""
    if tail is not None and tail < 0:
        raise UserError(Problem("tail", str(tail), "a number of lines of at least 0"))
    place = find_root(root)
    job = read_job(place, job_id)
    location = remote.join(place, job.id, LOG_NAME)
    runner = look_up(RUNNERS, job.runner, f"runner of job {job.id}")
    text = runner.read_log(place, job) if remote.is_remote(place) and not job.has_ended else ""
    if not text and remote.exists(location):
        text = read_tail(remote.fetch(location))
    return cut_lines(text or runner.read_log(place, job), tail)


def cancel_job(job_id: str, root: Root = None) -> Job:
    """Stop a job: SIGTERM, and SIGKILL after 20 seconds. A job that has ended stays as it is.

    One on another machine is asked to stop by a file in its folder; it may still be Running in the record given back.
    """
    place = find_root(root)
    job = _look(job_id, place)
    if job.has_ended:
        return job
    runner = look_up(RUNNERS, job.runner, f"runner of job {job.id}")
    remote.write_text(remote.join(place, job.id, CANCEL_NAME), dump_json({"requested_at": get_time()}))
    runner.ask_to_stop(place, job)
    job = wait_for_job(job.id, place, CANCEL_WAIT_S)
    if not job.has_ended:
        runner.kill(place, job)
        job = wait_for_job(job.id, place, POLL_S)
    return job
