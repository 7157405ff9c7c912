"""Options of a training that meet: pauses, fused streams, clipped gradients, teachers, narrow networks in bfloat16."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kinegraph import fit
from kinegraph.actions import train
from kinegraph.data.dataset import Batch
from kinegraph.errors import CheckpointError, SpecError
from kinegraph.models import MODELS
from kinegraph.models.checkpoint import Checkpoint, read_checkpoint
from kinegraph.models.late_fusion import fit_fusion_weights
from kinegraph.run_files import BEST_METRICS_NAME, LATEST_NAME
from kinegraph.skeleton.layouts import get_layout
from kinegraph.spec_reading import read_spec
from kinegraph.validation import Answers, measure_network
from small_runs import make_spec, write_small_data

SMALL = {"model_type": "EF-GCN", "depth": 1, "width": 0.25}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_small_data(tmp_path)
    return tmp_path


def make_small(folder: Path, results: str, streams: list[str], fusion: str = "late", **options: Any) -> dict[str, Any]:
    spec = make_spec(folder, results, **options)
    spec["model"] |= SMALL | {"fusion": fusion}
    spec["input"] = {"streams": streams}
    return spec


def read_latest(data: Path, results: str) -> Checkpoint:
    return read_checkpoint(data / results / "train" / LATEST_NAME)


@pytest.mark.parametrize("fusion", ["early", "late"])
def test_pauses_between_validations_choose_nothing(data: Path, fusion: str) -> None:
    options: dict[str, Any] = {"num_epochs": 9, "validation_interval": 3, "early_stopping": 3, "seed": 7}
    train(make_small(data, "straight", ["joint", "bone"], fusion, **options))
    for stop in (1, 2, 4, 5, 7, 8, -1):
        train(make_small(data, "paused", ["joint", "bone"], fusion, stop_after_epoch=stop, **options))
    best = [json.loads((data / name / "train" / BEST_METRICS_NAME).read_text()) for name in ("straight", "paused")]
    assert best[0] == best[1]
    straight, paused = (read_latest(data, name) for name in ("straight", "paused"))
    assert straight.temperature == paused.temperature
    assert all(torch.equal(tensor, paused.state_dict[name]) for name, tensor in straight.state_dict.items())


@pytest.mark.parametrize(("min_epoch_steps", "epochs"), [(0, 2), (3, 2), (4, 4), (7, 6)])
def test_small_sets_are_trained_for_enough_steps(data: Path, min_epoch_steps: int, epochs: int) -> None:
    """3 batches in a pass: the same training as one of so many epochs of a pass."""
    train(make_spec(data, "asked", min_epoch_steps=min_epoch_steps, num_epochs=2, stop_after_epoch=1))
    train(make_spec(data, "asked", min_epoch_steps=min_epoch_steps, num_epochs=2))
    train(make_spec(data, "plain", num_epochs=epochs))
    asked, plain = (read_latest(data, name) for name in ("asked", "plain"))
    assert asked.training is not None and asked.training["global_step"] == 3 * epochs
    assert all(torch.equal(tensor, plain.state_dict[name]) for name, tensor in asked.state_dict.items())


def test_clipped_gradients_of_a_stream_do_not_depend_on_the_others(data: Path) -> None:
    for results, other in (("one", "bone"), ("two", "joint_motion")):
        train(make_small(data, results, ["joint", other], grad_clip=0.05, num_epochs=2))
    one, two = (read_latest(data, results).state_dict for results in ("one", "two"))
    names = [name for name in one if name.startswith("branches.0.")]
    assert names and all(torch.equal(one[name], two[name]) for name in names)
    assert not torch.equal(one["branches.1.fcn.weight"], two["branches.1.fcn.weight"])


def test_weights_that_are_given_later_hold(data: Path) -> None:
    train(make_small(data, "first", ["joint", "bone"], num_epochs=1))
    given = {"fusion_weights": [1, 3]}
    spec = make_small(data, "first", ["joint", "bone"], num_epochs=2)
    spec["model"] |= given
    train(spec)
    tuned = make_small(data, "tuned", ["joint", "bone"], num_epochs=1)
    tuned["model"] |= given | {"pretrained_model_path": str(data / "first/train" / LATEST_NAME)}
    train(tuned)
    for results in ("first", "tuned"):
        torch.testing.assert_close(read_latest(data, results).state_dict["fusion_weights"], torch.tensor([0.25, 0.75]))


def test_a_teacher_without_input_steps_teaches_a_student_with_more_streams(data: Path) -> None:
    train(make_spec(data, "teacher", num_epochs=1))
    teacher = str(data / "teacher/train" / LATEST_NAME)
    train(make_small(data, "student", ["bone", "joint"], "early", teacher=teacher, num_epochs=1))
    with pytest.raises(SpecError, match=r"train.teacher: input.streams: got the streams bone"):
        train(make_spec(data, "refused", teacher=str(data / "student/train" / LATEST_NAME)))


def test_a_teacher_that_cannot_be_read_is_named(data: Path) -> None:
    (data / "teacher.pth").write_text("no checkpoint")
    with pytest.raises(CheckpointError, match=r"train.teacher: .*teacher.pth"):
        train(make_spec(data, "student", teacher=str(data / "teacher.pth")))


def test_a_teacher_of_another_skeleton_is_refused(data: Path) -> None:
    train(make_spec(data, "teacher", num_epochs=1))
    spec = make_spec(data, "student", teacher=str(data / "teacher/train" / LATEST_NAME))
    joints = [f"j{i}" for i in range(np.load(data / "train_data.npy").shape[3])]
    layout = {
        "name": "chain",
        "joints": joints,
        "edges": [list(pair) for pair in itertools.pairwise(joints)],
    }
    (data / "chain.yaml").write_text(json.dumps(layout | {"centre": "j0"}))
    spec["model"]["graph_layout"] = str(data / "chain.yaml")
    with pytest.raises(SpecError, match=r"train.teacher: model.graph_layout: got .* expected chain"):
        train(spec)


def test_a_teacher_of_the_same_skeleton_may_have_another_name_for_it(data: Path) -> None:
    train(make_spec(data, "teacher", num_epochs=1))
    (data / "mine.yaml").write_text(json.dumps(get_layout("coco").to_dict() | {"name": "mine"}))
    spec = make_spec(data, "student", teacher=str(data / "teacher/train" / LATEST_NAME), num_epochs=1)
    spec["model"]["graph_layout"] = str(data / "mine.yaml")
    train(spec)


def test_a_teacher_without_an_input_of_its_own_saw_arrays_as_they_are(data: Path) -> None:
    """As files of TAO: a student whose clips are normalised would show it others."""
    train(make_spec(data, "teacher", num_epochs=1))
    plain = str(data / "plain.pth")
    torch.save({"state_dict": {f"model.{k}": v for k, v in read_latest(data, "teacher").state_dict.items()}}, plain)
    train(make_small(data, "more_streams", ["bone", "joint"], "early", teacher=plain, num_epochs=1))
    spec = make_spec(data, "refused", teacher=plain)
    spec["input"] = {"centre": "first"}
    with pytest.raises(SpecError, match=r"train.teacher: input.centre: got 'none', expected 'first'"):
        train(spec)


def test_weights_for_other_streams_are_refused_before_anything_is_read(data: Path) -> None:
    spec = make_small(data, "results", ["joint", "bone"])
    spec["model"]["fusion_weights"] = [1, 1, 1, 1]
    with pytest.raises(SpecError, match=r"each of 2 streams.*model.fusion_weights=\[1,1\]") as caught:
        read_spec(spec, [], "train")
    assert len(caught.value.problems) == 1
    spec["input"]["streams"] = ["joint"]
    assert read_spec(spec, [], "train").values.model.fusion_weights == [1, 1, 1, 1], "one stream has no weights"


def test_time_left_counts_steps_where_an_epoch_goes_on(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 3 batches: the last one of the first epoch, then two epochs of three."""
    steps = {"checkpoint_interval": 2, "checkpoint_interval_unit": "step", "num_epochs": 3}
    train(make_spec(data, "results", **steps, stop_after_epoch=1))
    for path in (data / "results/train").glob("model_epoch_000_step_00003.pth"):
        path.unlink()
    clock, real = [0.0], fit._Trainer._train_step

    def take_a_second(*given: Any) -> None:
        real(*given)
        clock[0] += 1

    monkeypatch.setattr(fit._Trainer, "_train_step", take_a_second)
    monkeypatch.setattr(fit, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    train(make_spec(data, "results", **steps))
    lines = [json.loads(line) for line in (data / "results/train/status.json").read_text().splitlines()]
    left = [line["eta"] for line in lines if line.get("epoch") is not None and "eta" in line]
    assert left[-3:] == ["0:00:06.000000", "0:00:03.000000", "0:00:00.000000"]


def test_a_process_without_a_clip_of_its_own_has_answers_of_no_clips() -> None:
    """As where there are more processes than validation clips: the last batch is padding for some of them."""
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
    answers = Answers(1)
    batch = Batch(torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64), torch.arange(2))
    totals = measure_network(network, [(batch, 0)], answers, nullcontext)
    assert totals.count == 0
    assert torch.cat(answers.logits, dim=-2).shape == (0, 3) and torch.cat(answers.labels).shape == (0,)


def test_infinite_logits_do_not_reach_fusion_weights() -> None:
    logits = torch.randn(2, 40, 3, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(40) % 3
    damaged = torch.cat([logits, torch.full((2, 1, 3), torch.inf)], dim=1)
    torch.testing.assert_close(
        fit_fusion_weights(damaged, torch.cat([labels, labels[:1]])), fit_fusion_weights(logits, labels)
    )
    assert fit_fusion_weights(damaged[:, 40:], labels[:1]).tolist() == [0.5, 0.5]


STEP = """
import sys
import torch
from kinegraph.models import build_network
from kinegraph.spec import ModelSpec

torch.set_num_threads(1)
torch.manual_seed(0)
options = ModelSpec(model_type=sys.argv[1], width=0.125, depth=0 if sys.argv[1] == "ST-GCN" else 1)
network = build_network(options, torch.rand(3, 17, 17) / 10, 4, 3).train()
for _ in range(12):
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(torch.randn(4, 3, 16, 17, 1))
    torch.nn.functional.cross_entropy(logits.float(), torch.randint(0, 4, (4,))).backward()
print("done")
"""


@pytest.mark.parametrize("model_type", sorted(set(MODELS) - {"ST-GCN"}))
def test_narrow_networks_train_in_bfloat16(model_type: str) -> None:
    """In a process of its own: what goes wrong here is memory of the process (StridedPointwise)."""
    done = subprocess.run([sys.executable, "-c", STEP, model_type], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-2000:]
