"""train.label_doubt: clips whose labels the network doubts are found, listed, and not learned from."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kinegraph.actions import train
from kinegraph.errors import SpecError
from kinegraph.label_doubt import MEMORY, START, LabelDoubt
from kinegraph.models.checkpoint import read_checkpoint
from kinegraph.run_files import DOUBTED_NAME, LATEST_NAME
from kinegraph.spec_train import TrainSpec
from kinegraph.training_loss import MixedBatch, TrainingLoss
from small_runs import make_spec, train_until_killed, write_clips

NUM_CLIPS, CLASSES = 96, 3
WRONG = (4, 17, 30)
SMALL = {"model_type": "EF-GCN", "depth": 1, "width": 0.25}


def keep(values: Tensor, how: str) -> Tensor:
    """What one process has is what all have."""
    return values


def write_data(folder: Path, wrong: tuple[int, ...] = WRONG) -> None:
    """Clips of three classes that are easily told apart, by joints and by bones; some have the next class as label."""
    for part, num_clips, seed in (("train", NUM_CLIPS, 1), ("val", 6, 2)):
        write_clips(folder, part, num_clips, seed)
        clips = np.load(folder / f"{part}_data.npy")
        clips[:, 1, :, ::2] += (np.arange(num_clips) % CLASSES)[:, None, None, None]
        np.save(folder / f"{part}_data.npy", clips)
    path = folder / "train_label.json"
    labels = json.loads(path.read_text())
    for clip in wrong:
        labels[clip] = (labels[clip] + 1) % CLASSES
    names = [f"clip {i}" for i in range(NUM_CLIPS)]
    path.write_text(json.dumps({"names": names, "labels": labels}))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_data(tmp_path)
    return tmp_path


def make_small(folder: Path, results: str = "results", late: bool = False, **options: Any) -> dict[str, Any]:
    optim = {"lr": 0.03, "lr_scheduler": "Cosine"}
    own = {"label_doubt": 0.2, "num_epochs": 30, "validation_interval": 10, "optim": optim}
    spec = make_spec(folder, results, **own | options)
    spec["dataset"] |= {"batch_size": 8}
    spec["augment"] = {"noise": 1.0}  # so that no clip can be learned by heart
    spec["model"] |= SMALL | ({"fusion": "late"} if late else {})
    spec["input"] = {"streams": ["joint", "bone"] if late else ["joint"]}
    return spec


def read_table(folder: Path) -> list[dict[str, str]]:
    with open(folder / DOUBTED_NAME, newline="") as file:
        return list(csv.DictReader(file))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4))
def test_margins_are_averages_of_what_the_definition_says(seed: int, epochs: int) -> None:
    rng = np.random.Generator(np.random.PCG64(seed))
    labels, doubt, expected = rng.integers(0, 4, 6), LabelDoubt(6, 0.1), np.zeros(6)
    for _ in range(epochs):
        visits: dict[int, list[float]] = {}
        for _ in range(3):
            index, logits = rng.integers(0, 6, 4), rng.normal(size=(4, 4))
            doubt.note(torch.from_numpy(index), torch.from_numpy(logits), torch.from_numpy(labels[index]))
            for clip, row in zip(index, np.exp(logits) / np.exp(logits).sum(1, keepdims=True), strict=True):
                visits.setdefault(clip, []).append(np.delete(row, labels[clip]).max() - row[labels[clip]])
        doubt.finish_epoch(keep)
        for clip, margins in visits.items():
            expected[clip] = MEMORY * expected[clip] + (1 - MEMORY) * np.mean(margins)
    np.testing.assert_allclose(doubt.margins.numpy(), expected, atol=1e-12)
    order = [int(i) for i in np.argsort(-expected, kind="stable") if expected[i] > 0.1]
    assert doubt.list_doubted(START) == order
    assert doubt.list_doubted(START - 0.01) == []
    everybody = torch.arange(6)
    assert doubt.find_trusted(everybody, START - 0.01).all()
    assert doubt.find_trusted(everybody, START).tolist() == [margin <= 0.1 for margin in expected]


@pytest.mark.parametrize("streams", [0, 2])
def test_the_loss_is_that_of_the_clips_that_are_learned(streams: int) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(*((streams,) if streams else ()), 5, 4, generator=generator, requires_grad=True)
    teacher = torch.randn(5, 4, generator=generator)
    labels, clips = torch.tensor([0, 1, 2, 3, 0]), torch.zeros(5, 1)
    loss, learned = TrainingLoss(TrainSpec(label_smoothing=0.1)), torch.tensor([True, False, True, True, False])
    part = logits[..., learned, :]
    expected = loss(part, MixedBatch(clips[learned], labels[learned], labels[learned]), teacher[learned])
    batch = MixedBatch(clips, labels, labels)
    torch.testing.assert_close(loss(logits, batch, teacher, learned), expected)
    nothing = loss(logits, batch, teacher, torch.zeros(5, dtype=torch.bool))
    nothing.backward()
    assert nothing.item() == 0 and logits.grad is not None and not logits.grad.any()


@pytest.mark.parametrize("late", [False, True])
def test_wrong_labels_are_found_and_listed(data: Path, late: bool) -> None:
    train(make_small(data, late=late))
    rows = read_table(data / "results/train")
    assert sorted(int(row["number"]) for row in rows) == sorted(WRONG)
    for row in rows:
        true = int(row["number"]) % CLASSES
        assert row["name"] == f"clip {row['number']}"
        assert (row["label"], row["answer"]) == (f"class_{(true + 1) % CLASSES}", f"class_{true}")
        assert 0.2 < float(row["margin"]) <= 1
    margins = [float(row["margin"]) for row in rows]
    assert margins == sorted(margins, reverse=True)


def test_right_labels_are_all_learned(tmp_path: Path) -> None:
    write_data(tmp_path, wrong=())
    train(make_small(tmp_path))
    assert read_table(tmp_path / "results/train") == []


def test_without_it_no_table_is_written(data: Path) -> None:
    train(make_small(data, label_doubt=0.0, num_epochs=1))
    assert not (data / "results/train" / DOUBTED_NAME).exists()
    training = read_checkpoint(data / "results/train" / LATEST_NAME).training
    assert training is not None and "label_doubt" not in training


def test_mixed_clips_tell_nothing_about_labels(data: Path) -> None:
    with pytest.raises(SpecError, match=r"train\.label_doubt: got 0\.2 with train\.mixup 0\.5"):
        train(make_small(data, mixup=0.5))


def test_a_killed_run_ends_as_an_undisturbed_one(data: Path) -> None:
    """Killed in step 11 of an epoch, with the last checkpoint after step 6 of it: half an epoch is in the state."""
    options = {"num_epochs": 12, "checkpoint_interval": 6, "checkpoint_interval_unit": "step"}
    for name in ("whole", "killed"):
        spec = make_small(data, name, **options)
        if name == "killed":
            train_until_killed(spec, step=95)
        train(spec)
    whole, killed = (read_checkpoint(data / name / "train" / LATEST_NAME) for name in ("whole", "killed"))
    assert whole.training is not None and killed.training is not None
    pairs = [(whole.state_dict, killed.state_dict), (whole.training["label_doubt"], killed.training["label_doubt"])]
    for one, other in pairs:
        for key, tensor in one.items():
            torch.testing.assert_close(tensor, other[key], rtol=0, atol=0)
    assert whole.training["label_doubt"]["margins"].any()
    assert read_table(data / "whole/train") == read_table(data / "killed/train")


def test_processes_share_what_they_know(data: Path) -> None:
    spec = make_small(data, num_gpus=2)
    words = [
        sys.executable,
        "-c",
        "import json, sys; from kinegraph.actions import train; train(json.loads(sys.argv[1]))",
    ]
    done = subprocess.run([*words, json.dumps(spec)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(int(row["number"]) for row in read_table(data / "results/train")) == sorted(WRONG)
