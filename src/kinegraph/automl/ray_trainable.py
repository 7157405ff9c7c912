"""A trial on a Ray cluster: an actor that trains from stop to stop and tells how good it is there.

It works in the trial's run folder, on a disk that all nodes share or in object storage, with the checkpoints of the
train action. So a trial that starts again, on this node or another, goes on from where its folder stands.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from ray.tune import Trainable

from kinegraph.automl.results import measure_run, read_curve
from kinegraph.automl.trial_files import copy_in, read_metrics_folder, replace_with
from kinegraph.automl.worker import train_trial
from kinegraph.config_source import set_value
from kinegraph.errors import KinegraphError, Problem
from kinegraph.remote import is_remote, join
from kinegraph.spec import KEY_VARIABLE

STATE_NAME = "state.json"
"""In a checkpoint of Tune: whose it is, and how many epochs it has."""


class TrialTraining(Trainable):
    """Config: "training", what all trials have in common (see ray_engine); "values" and "epochs" of this one."""

    def setup(self, config: dict[str, Any]) -> None:
        self.training: dict[str, Any] = config["training"]
        self.values: dict[str, Any] = config["values"]
        self.epochs: int = config["epochs"]

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.setup(new_config)
        return True

    @property
    def location(self) -> str:
        """The trial's run folder."""
        return join(self.training["location"], self.trial_id)

    def step(self) -> dict[str, Any]:
        """Train to the next stop: {"epochs", "score" (best so far), "latest", "values"}, or {"error", ...} and done."""
        num_epochs = self.training["num_epochs"]
        stop = next(stop for stop in self.training["stops"] if stop > self.epochs)
        answer = check_node(self.training) or train_trial(self._make_spec(stop))
        if not answer["error"]:
            try:
                answer |= self._measure(stop)
            except KinegraphError as error:
                answer["error"] = str(error)
        if answer["error"]:
            return {**answer, "epochs": self.epochs, "values": self.values, "done": True}
        self.epochs = stop
        return {**answer, "epochs": stop, "values": self.values, "done": stop >= num_epochs}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        copy_in(self.location, Path(checkpoint_dir))
        state = {"trial": self.trial_id, "epochs": self.epochs}
        Path(checkpoint_dir, STATE_NAME).write_text(json.dumps(state), encoding="utf-8")

    def load_checkpoint(self, checkpoint_dir: Any) -> None:
        """Its own: the run folder has it already. Another trial's: the run folder goes on from that."""
        state = json.loads(Path(checkpoint_dir, STATE_NAME).read_text(encoding="utf-8"))
        self.epochs = state["epochs"]
        if state["trial"] != self.trial_id:
            replace_with(self.location, Path(checkpoint_dir), {**state, "values": self.values})

    def _make_spec(self, stop: int) -> dict[str, Any]:
        spec: dict[str, Any] = json.loads(json.dumps(self.training["spec"]))
        stop_after = stop if stop < self.training["num_epochs"] else -1
        changes = {**self.values, "train.results_dir": self.location, "train.stop_after_epoch": stop_after}
        for key, value in changes.items():
            set_value(spec, key, value)
        return spec

    def _measure(self, stop: int) -> dict[str, Any]:
        metric, direction = self.training["metric"], self.training["direction"]
        with tempfile.TemporaryDirectory() as spare:
            folder = read_metrics_folder(self.location, Path(spare))
            score, error = measure_run(folder, metric, direction, stop)
            curve = [value for epoch, value in read_curve(folder, metric) if epoch < stop]
        return {"error": error} if error else {"score": score, "latest": curve[-1]}


def check_node(training: dict[str, Any]) -> dict[str, Any]:
    """What keeps this node from training for the study, as an answer of `train_trial`; {} if nothing does."""
    location, problem = training["location"], None
    if not is_remote(location) and not Path(location).is_dir():
        hint = "Put it on a disk that all nodes share, or in object storage (s3://bucket/folder)."
        problem = Problem("results_dir", f"{location}, which a node of the cluster does not see", "one it sees", hint)
    elif training["is_encrypted"] and not os.environ.get(KEY_VARIABLE):
        hint = "Set it where `ray start` runs on each node."
        problem = Problem(KEY_VARIABLE, "no key on a node of the cluster", "the key, as here", hint)
    if problem is None:
        return {}
    error = KinegraphError(problem)
    return {"error": str(error), "is_mistake": True, "problems": error.as_data()}
