"""How accuracy is measured: a recipe on a data set, validated and tested through the public actions.

A validation part inside the training part chooses. The final model is trained again on the whole training part, with
fixed options, and its last weights are tested once. docs/accuracy.md has the reasons.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import baseline
import nw_ucla
from accuracy_data import SOURCES, Fold, Form, Indices, Recordings, stack_clips, write_part
from kinegraph.actions import evaluate, train
from kinegraph.config_source import nest
from kinegraph.models import Foldable
from kinegraph.models.checkpoint import Checkpoint, build_from_checkpoint, read_checkpoint
from kinegraph.models.late_fusion import LateFusion
from kinegraph.recipes import find_recipe
from kinegraph.run_checkpoints import list_checkpoints
from kinegraph.run_files import BEST_NAME, LATEST_NAME
from kinegraph.skeleton.layouts import get_layout
from kinegraph.storage import dump_json, make_folder, write_json

WATCHED = 10
"""Training demands validation clips: a final model gets every tenth of its training clips, which choose nothing."""

REFERENCE: dict[str, Any] = {
    "model.model_type": "ST-GCN",
    "model.graph_strategy": "spatial",
    "model.edge_importance_weighting": True,
    "model.dropout": 0.5,
    "dataset.batch_size": 16,
    "train.num_epochs": 30,
    "train.optim.optimizer_type": "torch.optim.SGD",
    "train.optim.lr": 0.1,
    "train.optim.momentum": 0.9,
    "train.optim.nesterov": True,
    "train.optim.weight_decay": 1e-4,
    "train.optim.lr_scheduler": "MultiStep",
    "train.optim.lr_steps": [10, 60],
    "train.optim.lr_decay": 0.1,
}
"""ST-GCN with its first recipe (TAO's defaults, spelt out), for as many epochs as benchmarks/nw_ucla.py gives it."""

DEPTH_OPTIONS = ("input.align", "input.vertical")
"""Turns in space, which data of two coordinates cannot have."""


@dataclass(frozen=True)
class Plan:
    """A recipe on a data set.

    values: dotted keys of the spec, without paths. left_out: keys of the recipe that 2D data cannot have.
    """

    dataset: str
    recipe: str
    values: dict[str, Any]
    left_out: tuple[str, ...]
    form: Form
    recipe_hash: str

    @property
    def folder_name(self) -> str:
        return f"{self.recipe}_{self.recipe_hash[:12]}"


@dataclass(frozen=True)
class PartOutcome:
    """What came of one training and the clips it was measured on: a run of one fold. multiply_adds are per clip."""

    right: int
    clips: int
    seconds: float
    parameters: int
    multiply_adds: int
    device: str
    threads: int
    commit: str


class Contestant(Protocol):
    """What is measured: each fold is validated, and a final model tested."""

    def validate(self, fold: Fold) -> PartOutcome: ...

    def find_tested(self, fold: Fold) -> PartOutcome | None:
        """What an earlier `test` found, without looking at a clip."""
        ...

    def test(self, fold: Fold) -> PartOutcome: ...


def plan_recipe(dataset: str, recipe: str, num_epochs: int = 0, changes: Mapping[str, Any] | None = None) -> Plan:
    """The values of a recipe on a data set, and their hash; with num_epochs cut to so many, under a name that
    says so. `changes` replace values of the recipe. Raises UserError for an unknown recipe.
    """
    source = SOURCES[dataset]
    layout = get_layout(source.layout)
    own: dict[str, Any] = {"reference": REFERENCE, "baseline": {"grid": baseline.GRID}}
    recipe_values = (own[recipe] if recipe in own else find_recipe(recipe).values) | dict(changes or {})
    has_depth = source.score_channel < 0
    left_out = () if has_depth else tuple(key for key in DEPTH_OPTIONS if key in recipe_values)
    form: Form = "fitted" if recipe == "reference" else "raw"
    values = {key: value for key, value in recipe_values.items() if key not in left_out}
    if num_epochs not in (0, values.get("train.num_epochs")):
        values["train.num_epochs"] = num_epochs
        recipe = f"{recipe}_{num_epochs}_epochs"
    values |= {
        "model.graph_layout": layout.name,
        "model.input_channels": 3,
        "dataset.num_classes": len(source.class_names),
        "dataset.label_map": {name: label for label, name in enumerate(source.class_names)},
    }
    if any(key.startswith("input.") for key in values):
        values["input.score_channel"] = source.score_channel
    hashed = json.loads(dump_json({"values": values, "layout": layout.to_dict(), "form": form}))
    canonical = json.dumps(hashed, sort_keys=True, separators=(",", ":"))
    return Plan(dataset, recipe, values, left_out, form, hashlib.sha256(canonical.encode()).hexdigest())


def carry_over(validated: Checkpoint, values: dict[str, Any]) -> dict[str, Any]:
    """Everything that a final training takes from its validation run: what was chosen on the validation clips.

    The temperature, the weights of fused streams, and with early stopping the number of epochs.
    """
    fixed: dict[str, Any] = {"train.temperature": validated.temperature}
    weights = validated.state_dict.get("fusion_weights")
    if weights is not None:
        fixed["model.fusion_weights"] = weights.tolist()
    if values.get("train.early_stopping", 0) > 0:
        best = (validated.training or {})["best"]
        fixed |= {"train.early_stopping": 0, "train.stop_after_epoch": best["epoch"] + 1}
    return fixed


def list_choices(plan: Plan) -> list[str]:
    """What changes answers and is chosen by the validation training of a recipe. A temperature changes none."""
    chosen = []
    if plan.values.get("model.fusion") == "late" and not plan.values.get("model.fusion_weights"):
        chosen.append("the weights of its streams")
    if plan.values.get("train.early_stopping", 0) > 0:
        chosen.append("the number of epochs")
    return chosen


class Training:
    """A recipe trained with one seed. All it writes is under `folder`; the same call resumes what was stopped."""

    def __init__(self, plan: Plan, seed: int, recordings: Recordings, folder: Path) -> None:
        self.plan, self.seed, self.recordings = plan, seed, recordings
        self.source = SOURCES[plan.dataset]
        self.data = folder / plan.dataset / "data"
        self.runs = folder / plan.dataset / plan.folder_name / f"seed_{seed}"

    def validate(self, fold: Fold) -> PartOutcome:
        """Trained on fit, measured on val, which also chooses what `carry_over` hands on."""
        run = self.runs / fold.name / "validation"
        known = read_outcome(run)
        if known:
            return known
        parts = {"train": self._write(fold, "fit", fold.fit), "val": self._write(fold, "val", fold.val)}
        values = self._make_values(run, parts)
        facts = _note_facts(run)
        result = train(nest(values))
        stops_early = values.get("train.early_stopping", 0) > 0
        accuracy = result.metrics["best"]["val_acc"] if stops_early else result.metrics["val_acc"]
        return self._finish(run, facts, round(accuracy * len(fold.val)), len(fold.val), result.metrics)

    def find_tested(self, fold: Fold) -> PartOutcome | None:
        return read_outcome(self.runs / fold.name / "final")

    def test(self, fold: Fold) -> PartOutcome:
        """Trained on train with what validation fixed; its last weights are measured on test."""
        run = self.runs / fold.name / "final"
        known = read_outcome(run)
        if known:
            return known
        stops_early = self.plan.values.get("train.early_stopping", 0) > 0
        validation = self.runs / fold.name / "validation"
        parts = {
            "train": self._write(fold, "train", fold.train),
            "val": self._write(fold, "watched", fold.train[::WATCHED]),
        }
        fixed: dict[str, Any] = {}
        if list_choices(self.plan) or read_outcome(validation):
            chosen = validation / "train" / (BEST_NAME if stops_early else LATEST_NAME)
            fixed = carry_over(read_checkpoint(chosen), self.plan.values)
        values = self._make_values(run, parts) | fixed
        facts = _note_facts(run)
        result = train(nest(values))
        tested = {f"evaluate.test_dataset.{key}": path for key, path in self._write(fold, "test", fold.test).items()}
        if not (run / "evaluate/metrics.json").exists():
            evaluate(nest(values | tested | {"evaluate.checkpoint": str(run / "train" / LATEST_NAME)}))
        confusion = np.array(json.loads((run / "evaluate/metrics.json").read_text())["confusion_matrix"])
        return self._finish(run, facts, int(np.trace(confusion)), int(confusion.sum()), result.metrics)

    def _write(self, fold: Fold, part: str, chosen: Indices) -> dict[str, str]:
        return write_part(
            self.data / self.plan.form / fold.name, part, self.recordings, chosen, self.source, self.plan.form
        )

    def _make_values(self, run: Path, parts: dict[str, dict[str, str]]) -> dict[str, Any]:
        """The plan, and what only says where files are and how work is done."""
        values: dict[str, Any] = {"dataset.num_workers": 0, "train.checkpoint_interval": 5} | self.plan.values
        for part, files in parts.items():
            values |= {f"dataset.{part}_dataset.{key}": path for key, path in files.items()}
        return values | {
            "results_dir": str(make_folder(run)),
            "wandb.enable": False,
            "train.seed": self.seed,
        }

    def _finish(self, run: Path, facts: dict[str, Any], right: int, clips: int, metrics: dict[str, Any]) -> PartOutcome:
        checkpoint = read_checkpoint(run / "train" / LATEST_NAME)
        num_frames = self.source.num_frames if self.plan.form == "raw" else nw_ucla.NUM_FRAMES
        if self.plan.values.get("input.sampling", "none") != "none":
            num_frames = checkpoint.spec["input"]["num_frames"]
        network = build_from_checkpoint(checkpoint, str(run))
        channels = checkpoint.num_channels or self.plan.values["model.input_channels"]
        work = count_multiply_adds(network, channels, num_frames, checkpoint.layout.num_joints)
        work *= self.plan.values.get("input.test_clips", 1)
        parameters = sum(parameter.numel() for parameter in network.parameters())
        facts = facts | {"device": f"{facts['device']}, {(checkpoint.training or {})['precision']}"}
        outcome = PartOutcome(right, clips, metrics["train_seconds"], parameters, work, **facts)
        write_json(run / "outcome.json", asdict(outcome))
        remove_old_checkpoints(run / "train")
        return outcome


class Baseline:
    """benchmarks/baseline.py under the same protocol."""

    def __init__(self, plan: Plan, recordings: Recordings) -> None:
        self.recordings, self.source = recordings, SOURCES[plan.dataset]
        self.layout = get_layout(self.source.layout)
        self.chosen: dict[str, baseline.BaselineOptions] = {}

    def validate(self, fold: Fold) -> PartOutcome:
        started_s = time.monotonic()
        labels = self.recordings.labels
        options, right = baseline.choose_options(
            *(self._stack(fold.fit), labels[fold.fit], self._stack(fold.val), labels[fold.val]),
            *(self.layout, self.source.score_channel, len(self.source.class_names)),
        )
        self.chosen[fold.name] = options
        seconds = time.monotonic() - started_s
        model = self._fit(fold.fit, options)
        return self._describe(model, right, len(fold.val), seconds)

    def find_tested(self, fold: Fold) -> PartOutcome | None:
        return None

    def test(self, fold: Fold) -> PartOutcome:
        started_s = time.monotonic()
        model = self._fit(fold.train, self.chosen[fold.name])
        seconds = time.monotonic() - started_s
        scores = baseline.compute_scores(model, self._make_groups(fold.test, model.options))
        right = int((scores.argmax(axis=1) == self.recordings.labels[fold.test]).sum())
        return self._describe(model, right, len(fold.test), seconds)

    def _stack(self, chosen: Indices) -> NDArray[np.float32]:
        return stack_clips(self.recordings, chosen, self.source, "raw")

    def _make_groups(self, chosen: Indices, options: baseline.BaselineOptions) -> list[NDArray[np.float64]]:
        clips = self._stack(chosen)
        return baseline.make_groups(clips, self.layout, self.source.score_channel, options.num_frames, options.groups)

    def _fit(self, chosen: Indices, options: baseline.BaselineOptions) -> baseline.BaselineModel:
        groups, labels = self._make_groups(chosen, options), self.recordings.labels[chosen]
        return baseline.fit_baseline(groups, labels, len(self.source.class_names), options)

    def _describe(self, model: baseline.BaselineModel, right: int, clips: int, seconds: float) -> PartOutcome:
        facts = _find_facts() | {"device": _name_cpu()}
        return PartOutcome(right, clips, seconds, model.num_parameters, model.multiply_adds, **facts)


def read_outcome(run: Path) -> PartOutcome | None:
    """What `Training` noted at the end of a run."""
    path = run / "outcome.json"
    return PartOutcome(**json.loads(path.read_text())) if path.exists() else None


def count_multiply_adds(network: nn.Module, num_channels: int, num_frames: int, num_joints: int) -> int:
    """Multiplications with an addition for a clip of one person: of the folded network, or counted as it runs."""
    if isinstance(network, LateFusion):
        own = network.stream_channels
        return sum(count_multiply_adds(branch, own, num_frames, num_joints) for branch in network.branches)
    if isinstance(network, Foldable):
        return network.fold().count_multiply_adds(num_frames)
    return count_run(network, num_channels, num_frames, num_joints)


def count_run(network: nn.Module, num_channels: int, num_frames: int, num_joints: int) -> int:
    """The same by torch's counter, which sees convolutions and matrix products."""
    clip = torch.rand(1, num_channels, num_frames, num_joints, 1)
    network.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(clip)
    return int(counter.get_total_flops()) // 2


def remove_old_checkpoints(folder: Path) -> None:
    """Of a finished training only the last and the best checkpoint stay: ten folds of all of them fill a disk."""
    kept = {(folder / name).resolve() for name in (LATEST_NAME, BEST_NAME)}
    for path in list_checkpoints(folder):
        if path.resolve() not in kept:
            with contextlib.suppress(OSError):
                path.unlink()


def add_outcomes(outcomes: list[PartOutcome]) -> PartOutcome:
    """Folds together: sums of clips and seconds; the size is that of the largest."""
    return replace(
        outcomes[0],
        right=sum(each.right for each in outcomes),
        clips=sum(each.clips for each in outcomes),
        seconds=sum(each.seconds for each in outcomes),
        parameters=max(each.parameters for each in outcomes),
        multiply_adds=max(each.multiply_adds for each in outcomes),
    )


def _note_facts(run: Path) -> dict[str, Any]:
    """device, threads and commit of a training when it first started."""
    path = make_folder(run) / "facts.json"
    if not path.exists():
        write_json(path, _find_facts())
    facts: dict[str, Any] = json.loads(path.read_text())
    return facts


def _find_facts() -> dict[str, Any]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _name_cpu()
    return {"device": device, "threads": torch.get_num_threads(), "commit": find_commit()}


def _name_cpu() -> str:
    return f"CPU, {platform.machine()}"


def find_commit() -> str:
    """HEAD, with +changes if files that are tracked differ from it."""
    here = Path(__file__).parent

    def ask(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=False).stdout.strip()

    changed = ask("status", "--porcelain", "--untracked-files=no", "--", "../src", ".", ":!results", ":!*.jsonl")
    return ask("rev-parse", "HEAD") + ("+changes" if changed else "")
