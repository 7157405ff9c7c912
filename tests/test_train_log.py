from __future__ import annotations

import importlib.machinery
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kinegraph.data.checks import check_dataset
from kinegraph.errors import DataError
from kinegraph.run import Run
from kinegraph.spec_reading import read_spec
from kinegraph.train_log import COLUMNS, TrainLog

ROW = {"epoch": 0, "step": 5, "lr": 0.1, "train_loss": 1.5, "train_acc": 0.5, "seconds": 2.0}


class RecordingRun(Run):
    def __init__(self, folder: Path, **spec: Any) -> None:
        loaded = read_spec(spec)
        super().__init__("train", folder, loaded.values, loaded.origins)
        self.messages: list[str] = []

    def info(self, message: str) -> None:
        self.messages.append(message)

    def warn(self, message: str) -> None:
        self.messages.append(f"warning: {message}")


class FakeTracker:
    def __init__(self, fails: bool = False) -> None:
        self.rows: list[dict[str, Any]] = []
        self.fails, self.is_finished = fails, False

    def log(self, row: dict[str, Any], step: int) -> None:
        self.rows.append(row)

    def finish(self) -> None:
        self.is_finished = True
        if self.fails:
            raise OSError("no network")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module that stands for wandb: logged in, and recording what it is given."""
    module: Any = ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    module.api = SimpleNamespace(api_key="from-login")
    module.tracker = FakeTracker()
    module.given = []
    module.init = lambda **options: module.given.append(options) or module.tracker
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(sys, "argv", ["kinegraph", "train"])
    for name in ("WANDB_API_KEY", "WANDB_MODE", "KINEGRAPH_ENCRYPTION_KEY"):
        monkeypatch.delenv(name, raising=False)
    return module


def test_key_of_a_login_counts(fake: Any, tmp_path: Path) -> None:
    run = RecordingRun(tmp_path, encryption_key="hidden")
    log = TrainLog(run, 0)
    log.write_epoch(ROW)
    log.close()
    assert fake.tracker.rows == [ROW] and fake.tracker.is_finished
    assert len(fake.given) == 1 and "hidden" not in str(fake.given)
    assert run.messages == []


def test_without_a_key_it_is_off(fake: Any, tmp_path: Path) -> None:
    for api in (SimpleNamespace(api_key=None), None):
        fake.api = api
        run = RecordingRun(tmp_path)
        TrainLog(run, 0).close()
        assert len(run.messages) == 1 and "wandb login" in run.messages[0]
    assert fake.given == []


@pytest.mark.parametrize("failure", ["init", "finish"])
def test_failures_of_the_tracker_are_warnings(fake: Any, tmp_path: Path, failure: str) -> None:
    def fail(**options: Any) -> None:
        raise RuntimeError("no network")

    if failure == "init":
        fake.init = fail
    fake.tracker.fails = True
    run = RecordingRun(tmp_path)
    TrainLog(run, 0).close()
    assert len(run.messages) == 1 and run.messages[0].startswith("warning:") and "no network" in run.messages[0]


@pytest.mark.parametrize("arguments", [["-k", "my-key"], ["encryption_key=my-key"], ['encryption_key="my\\x2dkey"']])
def test_key_on_the_command_line_does_not_reach_the_tracker(
    fake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["kinegraph", "train", *arguments])
    run = RecordingRun(tmp_path, encryption_key="my-key")
    TrainLog(run, 0).close()
    assert fake.given == []
    assert len(run.messages) == 1 and "command line" in run.messages[0] and "my-key" not in run.messages[0]


def test_damaged_rows_of_metrics_are_dropped(fake: Any, tmp_path: Path) -> None:
    whole = "0,5,0.1,1.5,0.5,,,2.0"
    damaged = ["x,5,0.1,1.5,0.5,,,2.0", "1,5", "1,5,0.1,1.5,0.5,,,2.0,9", "1,5,0.1,abc,0.5,,,2.0", "\x00\ufffd"]
    later = "3,5,0.1,1.5,0.5,,,2.0"
    header = ",".join(COLUMNS)
    (tmp_path / "metrics.csv").write_text("\n".join([header, *damaged, whole, later]) + "\n")
    log = TrainLog(RecordingRun(tmp_path, wandb={"enable": False}), 2)
    log.write_epoch({**ROW, "epoch": 2})
    log.close()
    assert (tmp_path / "metrics.csv").read_text().splitlines() == [header, whole, "2,5,0.1,1.5,0.5,,,2.0"]


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe\x00", b"epoch\n1\n", b"a,b\n1,2\n", b'epoch,"step\n' + b"9" * 200_000]
)
def test_damaged_metrics_start_anew(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "metrics.csv").write_bytes(content)
    log = TrainLog(RecordingRun(tmp_path, wandb={"enable": False}), 5)
    assert log.rows == []
    log.close()


def test_message_names_where_the_classes_come_from(tmp_path: Path) -> None:
    np.save(tmp_path / "data.npy", np.ones((2, 3, 4, 5, 1), np.float32))
    (tmp_path / "labels.json").write_text('{"names": ["x", "y"], "labels": [0, 7]}')
    label_map = {"a": 0, "b": 1, "c": 2}
    for classes_from, expected in (("the training labels", "from the training labels"), ("", "dataset.label_map")):
        with pytest.raises(DataError) as caught:
            check_dataset(
                tmp_path / "data.npy",
                tmp_path / "labels.json",
                label_map=label_map,
                classes_from=classes_from,
            )
        assert expected in str(caught.value)
