"""Trainings as Ray tasks, for what comes after the search: the confirmation with other seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kinegraph.automl.ray_cluster import Share
from kinegraph.automl.trial_files import collect
from kinegraph.automl.workers import Outcome
from kinegraph.errors import Problem
from kinegraph.remote import is_remote
from kinegraph.run import Run


class RayPool:
    """A TrainingPool of a cluster. `training` is what `check_node` goes by."""

    def __init__(self, run: Run, share: Share, training: dict[str, Any]) -> None:
        import ray

        options = {"num_cpus": share.cpus, "num_gpus": share.gpus, "max_retries": 0}
        self._train = ray.remote(train_on_node).options(**options)
        self._run, self._num_slots, self._training = run, share.num_slots, training
        self._running: dict[Any, tuple[str, str]] = {}

    @property
    def num_free(self) -> int:
        return self._num_slots - len(self._running)

    def submit(self, name: str, spec: dict[str, Any]) -> None:
        """Start a training; its paths are given as the nodes know them."""
        folder = spec["train"]["results_dir"]
        self._running[self._train.remote(self._run.show(spec), self._training)] = name, folder

    def wait(self, timeout_s: float) -> Outcome | None:
        """The next training that ended, or None after `timeout_s`."""
        import ray

        ended, _ = ray.wait(list(self._running), timeout=timeout_s)
        if not ended:
            return None
        name, folder = self._running.pop(ended[0])
        try:
            answer = ray.get(ended[0])
        except ray.exceptions.RayError as error:
            return Outcome(name, f"its process was lost ({type(error).__name__})", died=True)
        location = self._run.show(folder)
        if is_remote(location) and not answer["error"]:
            collect(location, Path(folder))
        problems = tuple(Problem(**problem) for problem in answer["problems"])
        return Outcome(name, answer["error"], is_mistake=answer["is_mistake"], problems=problems)


def train_on_node(spec: dict[str, Any], training: dict[str, Any]) -> dict[str, Any]:
    """Train on a node of the cluster; an answer of a worker."""
    from kinegraph.automl.ray_trainable import check_node
    from kinegraph.automl.worker import train_trial

    return check_node(training) or train_trial(spec)
