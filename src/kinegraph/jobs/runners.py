"""The runners: where a job runs. Each places the same supervisor somewhere and can say whether it is still there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kinegraph.jobs import local_runner, ray_runner
from kinegraph.jobs.liveness import End
from kinegraph.jobs.record import Job


@dataclass(frozen=True)
class Runner:
    """What a runner can do. All functions take the root and the job.

    prepare      the job with what the runner knows before launch (its address); raises UserError where it cannot run
    launch       start the supervisor of a job whose record is written; the key is '' unless it was given by value
    find_end     why a job that has not ended by its record cannot be running any more; None while it may be
    ask_to_stop  hurry up a cancellation that the record's folder asks for already
    kill         end it at once, where that can be done from here
    read_log     the runner's own log: what there is where the job's log.txt is not there
    """

    prepare: Callable[[str, Job], Job]
    launch: Callable[[str, Job, str], None]
    find_end: Callable[[str, Job], End | None]
    ask_to_stop: Callable[[str, Job], None]
    kill: Callable[[str, Job], None]
    read_log: Callable[[str, Job], str]


RUNNERS: dict[str, Runner] = {
    "local": Runner(
        local_runner.prepare,
        local_runner.launch,
        local_runner.find_end,
        local_runner.ask_to_stop,
        local_runner.kill,
        local_runner.read_log,
    ),
    "ray": Runner(
        ray_runner.prepare,
        ray_runner.launch,
        ray_runner.find_end,
        ray_runner.ask_to_stop,
        ray_runner.kill,
        ray_runner.read_log,
    ),
}
