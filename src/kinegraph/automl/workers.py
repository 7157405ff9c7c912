"""The worker processes of a study: how many, with which devices, and what becomes of them."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kinegraph.errors import Problem, SpecError
from kinegraph.run import find_encryption_key
from kinegraph.spec import KEY_VARIABLE, Spec
from kinegraph.storage import make_folder

MAX_GPU_WORKERS = 4
STOP_TIMEOUT_S = 10.0
MAX_ATTEMPTS = 2
"""A training whose process was lost (killed, out of memory) is tried once more, from its last checkpoint."""


@dataclass(frozen=True)
class Outcome:
    """How a training ended. `error` is '' if it went well; `died` means that the process itself was lost."""

    name: str
    error: str = ""
    died: bool = False
    is_mistake: bool = False
    problems: tuple[Problem, ...] = ()


@dataclass
class _Worker:
    index: int
    process: subprocess.Popen[str]
    name: str | None = None
    """The training it works on."""


@dataclass
class WorkerPool:
    """Processes that train. A worker that dies is replaced when there is work for it.

    Use it in a `with` block: at its end the workers are stopped. They also stop by themselves when this process dies.
    """

    folder: Path
    environments: list[dict[str, str]]
    _workers: list[_Worker] = field(default_factory=list)
    _events: queue.Queue[tuple[_Worker, str | None]] = field(default_factory=queue.Queue)

    @property
    def num_free(self) -> int:
        return len(self.environments) - sum(worker.name is not None for worker in self._workers)

    def submit(self, name: str, spec: dict[str, Any]) -> None:
        """Give a training to a free worker."""
        worker = self._find_free()
        worker.name = name
        assert worker.process.stdin is not None
        try:
            worker.process.stdin.write(json.dumps({"name": name, "spec": spec}) + "\n")
            worker.process.stdin.flush()
        except OSError:
            pass  # it has died: its thread reports that

    def wait(self, timeout_s: float) -> Outcome | None:
        """The next training that ended, or None after `timeout_s`."""
        until_s = time.monotonic() + timeout_s
        while (left_s := until_s - time.monotonic()) > 0:
            try:
                worker, line = self._events.get(timeout=left_s)
            except queue.Empty:
                return None
            name, worker.name = worker.name, None
            if line is not None:
                return _read_answer(line)
            if worker in self._workers:
                self._workers.remove(worker)
            if name is not None:
                return Outcome(name, _describe_end(worker.process), died=True)
        return None

    def __enter__(self) -> WorkerPool:
        make_folder(self.folder)
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self._workers:
            assert worker.process.stdin is not None
            with suppress(OSError):  # it has died with a request unread
                worker.process.stdin.close()
        for worker in self._workers:
            try:
                worker.process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()

    def _find_free(self) -> _Worker:
        for worker in self._workers:
            if worker.name is None and worker.process.poll() is None:
                return worker
        self._workers = [worker for worker in self._workers if worker.name is not None]  # the idle ones have died
        taken = {worker.index for worker in self._workers}
        index = next(index for index in range(len(self.environments)) if index not in taken)
        with open(self.folder / f"worker_{index}.log", "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "kinegraph.automl.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **self.environments[index]},
                start_new_session=True,  # Ctrl-C is for the process that runs the study
            )
        worker = _Worker(index, process)
        self._workers.append(worker)
        threading.Thread(target=self._read_answers, args=(worker,), daemon=True).start()
        threading.Thread(target=_end_group, args=(process,), daemon=True).start()
        return worker

    def _read_answers(self, worker: _Worker) -> None:
        assert worker.process.stdout is not None
        for line in worker.process.stdout:
            self._events.put((worker, line))
        worker.process.wait()
        self._events.put((worker, None))


def _end_group(process: subprocess.Popen[str]) -> None:
    """When a worker has ended, end what it leaves behind: a process that was reading data for it, if it was forked just
    then, would wait for ever and keep the pipe of the answers open.
    """
    process.wait()
    with suppress(OSError):  # it left nothing
        os.killpg(process.pid, signal.SIGKILL)


def _read_answer(line: str) -> Outcome:
    answer = json.loads(line)
    problems = tuple(Problem(**problem) for problem in answer["problems"])
    return Outcome(answer["name"], answer["error"], is_mistake=answer["is_mistake"], problems=problems)


def _describe_end(process: subprocess.Popen[str]) -> str:
    code = process.returncode
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        reason = " (out of memory?)" if name == "SIGKILL" else ""
        return f"the process was ended by {name}{reason}"
    return f"the process ended with exit code {code}"


def choose_environments(spec: Spec, given: Collection[str] = ()) -> list[dict[str, str]]:
    """The environment of each worker: its GPUs, or its share of the CPU's threads; the encryption key if there is one.

    `given`: the keys that the user gave. One worker on a CPU unless automl_max_concurrent says otherwise; on GPUs as
    many as they allow, 4 at most. Raises SpecError if that is more than there are GPUs for.
    """
    wanted = spec.automl.automl_max_concurrent
    if wanted == 0:
        expected = "-1 or a number of trials of at least 1"
        raise SpecError(Problem("automl.automl_max_concurrent", "0", expected))
    gpus = _list_gpus(spec, given)
    key = find_encryption_key(spec)
    shared = {KEY_VARIABLE: key} if key else {}
    if not gpus:
        count = min(max(wanted, 1), spec.automl.automl_max_recommendations)
        num_threads = _count_threads()
        return [shared | {"OMP_NUM_THREADS": str(max(1, num_threads // count))} for _ in range(count)]
    per_trial = spec.train.num_gpus
    possible = len(gpus) // per_trial
    count = min(possible, MAX_GPU_WORKERS) if wanted < 0 else wanted
    if count < 1 or count > possible:
        got = f"{count or 1} trials at once with {per_trial} GPUs each"
        raise SpecError(Problem("automl.automl_max_concurrent", got, f"at most {len(gpus)} GPUs, those found here"))
    groups = [gpus[start * per_trial : (start + 1) * per_trial] for start in range(count)]
    return [shared | {"CUDA_VISIBLE_DEVICES": ",".join(group)} for group in groups]


def _list_gpus(spec: Spec, given: Collection[str]) -> list[str]:
    """The GPUs of the study: train.gpu_ids if they were chosen, else all that this process may use."""
    if spec.train.accelerator == "cpu":
        return []
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    found = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
    found = found[: torch.cuda.device_count()]
    chosen = spec.train.gpu_ids
    if "train.gpu_ids" not in given or not found:
        return found
    if not all(0 <= index < len(found) for index in chosen):
        raise SpecError(Problem("train.gpu_ids", str(chosen), f"ids from 0 to {len(found) - 1}"))
    return [found[index] for index in chosen]


def _count_threads() -> int:
    """OMP_NUM_THREADS (its first number, where it gives one for each level), else the cores of the machine."""
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) else os.cpu_count() or 1
