"""The Ray cluster of a search: one that is there already, or one on this machine for the time of the search."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from kinegraph.errors import KinegraphError, Problem, SpecError, UserError
from kinegraph.run import Run, find_encryption_key
from kinegraph.spec import KEY_VARIABLE, Spec

ADDRESS_VARIABLE = "RAY_ADDRESS"
LOOPBACK_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Ray's word, on any system, for whether a node may be reached from others; if not, it uses the loopback address."""
OBJECT_STORE_BYTES = 100_000_000
"""Nothing large goes through it: data and checkpoints are files."""
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # Tune's own tables and files beside ours
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    # An interrupt ends the action, which says so; Tune would end as if it had finished
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
}


@dataclass(frozen=True)
class Share:
    """What a trial gets of the cluster, and how many trials run at a time."""

    cpus: int
    gpus: int
    num_slots: int


@contextmanager
def connect_ray(spec: Spec, run: Run) -> Iterator[None]:
    """Be connected to Ray: to the cluster of this process, else that of RAY_ADDRESS, else one started here.

    What was started here is stopped at the end, and nothing else. Raises UserError where Ray or the cluster is missing.
    """
    ray = _import_ray()
    with _set_variables(SETTINGS):
        if ray.is_initialized():
            _refuse_key_by_value(spec)
            yield
            return
        address = os.environ.get(ADDRESS_VARIABLE, "")
        if address:
            _refuse_key_by_value(spec)
            _check_address(address)
            run.info(f"Joining the Ray cluster at {address}.")
            with _keep_signal_handlers():
                _join(ray, address)
            try:
                yield
            finally:
                ray.shutdown()
            return
        with _start(ray, find_encryption_key(spec)):
            yield


def _import_ray() -> Any:
    try:
        import pyarrow.fs
        import ray.tune
    except ImportError:
        hint = "pip install 'kinegraph[ray]' brings it."
        raise UserError(Problem("automl.engine", "ray, and no ray package", "Ray with Tune", hint)) from None
    assert pyarrow.fs
    return ray


def _refuse_key_by_value(spec: Spec) -> None:
    """A cluster that others may use shows what it is given."""
    if spec.encryption_key:
        hint = f"Set {KEY_VARIABLE} in the environment of the cluster's nodes and here, and leave the option out."
        raise UserError(Problem("encryption_key", "a key by value", "a key that the cluster has already", hint))


def _check_address(address: str) -> None:
    if "://" in address:
        hint = "http://HOST:8265 is for jobs (`kinegraph jobs submit`). A search runs inside of the cluster."
        raise UserError(Problem(ADDRESS_VARIABLE, address, "HOST:6379 or auto", hint))


def _join(ray: Any, address: str) -> None:
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:
        got = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        hint = "Is the cluster up, and does this machine belong to it?"
        raise UserError(Problem(f"{ADDRESS_VARIABLE}={address}", got, "a Ray cluster", hint)) from None


@contextmanager
def _start(ray: Any, key: str) -> Iterator[None]:
    """A cluster of this machine alone, on loopback, without dashboard. Its workers inherit this environment."""
    folder = tempfile.mkdtemp(prefix="kg")  # short: the names of Ray's sockets lie below it
    try:
        variables = {LOOPBACK_VARIABLE: "0"} | ({KEY_VARIABLE: key} if key else {})
        with _keep_signal_handlers(), _set_variables(variables), _stay_on_loopback(ray):
            try:
                ray.init(
                    address="local",
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    object_store_memory=OBJECT_STORE_BYTES,
                    _temp_dir=folder,
                )
            except Exception as error:
                got = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                raise KinegraphError(Problem("Ray on this machine", got, "a start")) from error
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _stay_on_loopback(ray: Any) -> Iterator[None]:
    """The variable is read when Ray is imported, which may have been before; its processes read it when they start."""
    constants = ray._private.ray_constants
    before, constants.ENABLE_RAY_CLUSTER = constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _keep_signal_handlers() -> Iterator[None]:
    """Ray puts its own handler of SIGTERM, which ends the process without the run's last words."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextmanager
def _set_variables(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def divide_cluster(spec: Spec) -> Share:
    """GPUs (train.num_gpus for each trial) where the cluster has some, else a share of its CPUs.

    Raises SpecError if no node has as many GPUs as a trial needs.
    """
    import ray

    wanted = spec.automl.automl_max_concurrent
    if wanted == 0:
        expected = "-1 or a number of trials of at least 1"
        raise SpecError(Problem("automl.automl_max_concurrent", "0", expected))
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus, cpus = ([int(node.get(kind, 0)) for node in nodes] for kind in ("GPU", "CPU"))
    if spec.train.accelerator != "cpu" and (any(gpus) or spec.train.accelerator == "gpu"):
        per_trial = spec.train.num_gpus
        num_slots = sum(found // per_trial for found in gpus)
        if num_slots == 0:
            expected = f"at most {max(gpus, default=0)}, the GPUs of a node of the cluster"
            raise SpecError(Problem("train.num_gpus", str(per_trial), expected))
        return Share(1, per_trial, wanted if wanted > 0 else num_slots)
    if wanted < 0:
        return Share(1, 0, max(1, sum(cpus)))
    return Share(max(1, min(max(cpus, default=1), sum(cpus) // wanted)), 0, wanted)
