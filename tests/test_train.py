from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kinegraph import run_checkpoints
from kinegraph.actions import train
from kinegraph.errors import CheckpointError, KinegraphError, SpecError, StorageError, UserError
from kinegraph.fit import _Trainer
from kinegraph.models.checkpoint import build_from_checkpoint, read_checkpoint
from small_runs import make_spec, write_clips, write_small_data

FINAL = "model_epoch_001_step_00006.pth"


@pytest.fixture()
def data(tmp_path: Path) -> Path:
    write_small_data(tmp_path)
    return tmp_path


def read_status(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "status.json").read_text().splitlines()]


def read_weights(path: Path, key: str = "") -> dict[str, torch.Tensor]:
    return read_checkpoint(path, key).state_dict


def assert_same_weights(first: Path, second: Path) -> None:
    one, two = read_weights(first), read_weights(second)
    assert one.keys() == two.keys() and len(one) == 172
    different = [name for name in one if not torch.equal(one[name], two[name])]
    assert not different


def test_run_folder_holds_what_the_facts_say(data: Path) -> None:
    result = train(make_spec(data))
    folder = data / "results/train"
    names = {path.name for path in folder.iterdir()}
    assert {"experiment.yaml", "status.json", "metrics.csv", "log.txt", "best.json", "tensorboard"} <= names
    assert {"model_epoch_000_step_00003.pth", FINAL} <= names
    assert (folder / "pc_model_latest.pth").resolve().name == FINAL
    lines = read_status(folder)
    assert [line["status"] for line in lines] == ["STARTED", "RUNNING", "RUNNING", "SUCCESS"]
    epoch = lines[2]
    assert (epoch["epoch"], epoch["step"], epoch["max_epoch"], epoch["max_step"]) == (1, 6, 1, 6)
    assert set(epoch["kpi"]) == {"train_loss", "train_acc", "val_loss", "val_acc"}
    assert epoch["eta"] == "0:00:00.000000"
    with open(folder / "metrics.csv", newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["0", "1"]
    best = json.loads((folder / "best.json").read_text())
    assert (folder / "pc_model_best.pth").resolve().name == best["file"]
    assert result.metrics["best"]["val_acc"] == best["val_acc"]


def test_checkpoint_carries_all_that_inference_needs(data: Path) -> None:
    train(make_spec(data))
    checkpoint = read_checkpoint(data / "results/train/pc_model_latest.pth")
    assert checkpoint.num_classes == 3
    assert checkpoint.label_map == {"class_0": 0, "class_1": 1, "class_2": 2}
    assert checkpoint.layout.name == "coco" and checkpoint.layout.num_joints == 17
    assert checkpoint.pipeline is not None and checkpoint.pipeline["num_channels"] == 3
    assert {"val_acc", "val_loss", "train_loss"} <= checkpoint.metrics.keys()
    assert checkpoint.spec["dataset"]["num_classes"] == 3
    assert checkpoint.versions["torch"] == str(torch.__version__)


def test_best_is_kept_and_last_is_saved_whatever_the_intervals(data: Path) -> None:
    spec = make_spec(data, num_epochs=5, checkpoint_interval=100, validation_interval=2)
    train(spec)
    folder = data / "results/train"
    files = sorted(path.name for path in folder.glob("model_*.pth"))
    best = json.loads((folder / "best.json").read_text())
    assert set(files) == {"model_epoch_004_step_00015.pth", best["file"]}
    validated = [line["epoch"] for line in read_status(folder) if "val_acc" in line["kpi"]]
    assert validated == [1, 3, 4]
    stale = [line for line in read_status(folder) if line["status"] == "RUNNING" and line["epoch"] in (0, 2)]
    assert len(stale) == 2 and all("val_loss" not in line["kpi"] for line in stale)


def test_finished_run_says_complete_and_more_epochs_go_on(data: Path) -> None:
    train(make_spec(data))
    before = (data / "results/train" / FINAL).stat().st_mtime_ns
    train(make_spec(data))
    assert (data / "results/train" / FINAL).stat().st_mtime_ns == before
    assert "Already complete" in (data / "results/train/log.txt").read_text()
    train(make_spec(data, num_epochs=3))
    train(make_spec(data, results="straight", num_epochs=3))
    name = "model_epoch_002_step_00009.pth"
    assert_same_weights(data / "results/train" / name, data / "straight/train" / name)


@pytest.mark.parametrize("scheduler", ["MultiStep", "AutoReduce", "Cosine"])
def test_paused_training_ends_as_one_that_was_not(data: Path, scheduler: str) -> None:
    # patience 1 and validation every 2 epochs: the validation that a pause brings must not count for AutoReduce
    optim = {"lr": 0.05, "lr_scheduler": scheduler, "lr_steps": [2, 4], "patience": 1, "warmup_epochs": 1}
    options = {"num_epochs": 6, "validation_interval": 2, "optim": optim}
    train(make_spec(data, results="straight", **options))
    for stop in (1, 3, 5, -1):
        result = train(make_spec(data, results="paused", stop_after_epoch=stop, **options))
        done = 6 if stop < 0 else stop
        last = Path(result.files["latest"]).resolve().name
        assert last == f"model_epoch_{done - 1:03d}_step_{done * 3:05d}.pth"
    assert_same_weights(data / "paused/train" / last, data / "straight/train" / last)
    rates = []
    for name in ("paused", "straight"):
        with open(data / name / "train/metrics.csv", newline="") as file:
            rates.append([row["lr"] for row in csv.DictReader(file)])
    assert rates[0] == rates[1] and len(rates[0]) == 6


def test_pause_reached_says_complete_and_names_the_option(data: Path) -> None:
    for _ in range(2):
        train(make_spec(data, num_epochs=3, stop_after_epoch=1))
    assert "1 of 3 epochs. Raise train.stop_after_epoch" in (data / "results/train/log.txt").read_text()
    with pytest.raises(SpecError, match=r"train\.stop_after_epoch: got 0"):
        train(make_spec(data, stop_after_epoch=0))


@pytest.mark.parametrize("metric", ["val_acc", "val_loss"])
def test_best_metric_chooses_the_best_checkpoint(data: Path, metric: str) -> None:
    train(make_spec(data, num_epochs=5, best_metric=metric, optim={"lr": 0.3, "lr_steps": []}))
    with open(data / "results/train/metrics.csv", newline="") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    best = json.loads((data / "results/train/best.json").read_text())
    chosen = max(row["val_acc"] for row in rows) if metric == "val_acc" else min(row["val_loss"] for row in rows)
    assert best[metric] == pytest.approx(chosen, abs=1e-12)


def test_best_metric_decides_where_accuracy_and_loss_disagree() -> None:
    now, before = {"val_acc": 0.9, "val_loss": 2.0}, {"val_acc": 0.8, "val_loss": 1.0}
    assert run_checkpoints.is_better(now, before, "val_acc")
    assert not run_checkpoints.is_better(now, before, "val_loss")
    assert run_checkpoints.is_better(before, now, "val_loss")


def test_a_second_run_in_a_folder_waits_and_is_refused(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kinegraph.run.LOCK_WAIT_S", 0.2)
    folder = data / "results/train"
    folder.mkdir(parents=True)
    hold = (
        "import sys, pathlib; from kinegraph.storage import lock_folder\n"
        "with lock_folder(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="another process is running in"):
        train(make_spec(data))
    holder.kill()
    holder.wait()
    train(make_spec(data))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": {"graph_layout": "coco", "graph_strategy": "uniform"}}, "graph_strategy"),
        ({"model": {"graph_layout": "human3.6m"}}, "graph_layout"),
    ],
)
def test_another_model_in_the_same_folder_is_refused(data: Path, change: dict[str, Any], named: str) -> None:
    train(make_spec(data, num_epochs=1))
    with pytest.raises(UserError, match=named):
        train({**make_spec(data, num_epochs=2), **change})


def test_other_data_in_the_same_folder_is_refused(data: Path) -> None:
    train(make_spec(data, num_epochs=1))
    kept = (data / "results/train/experiment.yaml").read_text()
    write_clips(data, "train", 13, seed=99)
    with pytest.raises(SpecError, match="train_dataset"):
        train(make_spec(data, num_epochs=2))
    assert (data / "results/train/experiment.yaml").read_text() == kept


def test_pointers_and_rows_are_set_right_after_a_kill_between(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(make_spec(data, num_epochs=1))
    folder = data / "results/train"
    pointed = {name: os.readlink(folder / name) for name in ("pc_model_latest.pth", "pc_model_best.pth")}
    spec = make_spec(data)
    with monkeypatch.context() as patch:
        patch.setattr(run_checkpoints, "point_to", stop)
        with pytest.raises(KeyboardInterrupt):
            train(make_spec(data, results="other"))
    train(spec)
    for name, target in pointed.items():
        (folder / name).unlink()
        (folder / name).symlink_to(target)
    (folder / ".model_epoch_009_step_00099.pth.1.tmp").write_bytes(b"torn")
    train(spec)
    assert os.readlink(folder / "pc_model_latest.pth") == FINAL
    best = read_checkpoint(folder / FINAL).training["best"]
    assert os.readlink(folder / "pc_model_best.pth") == best["file"]
    assert not list(folder.glob(".*tmp"))
    interrupted = data / "other/train"
    assert not (interrupted / "pc_model_latest.pth").exists()
    train(make_spec(data, results="other"))
    with open(interrupted / "metrics.csv", newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["0", "1"]
    assert os.readlink(interrupted / "pc_model_latest.pth") == FINAL


def stop(*_: Any) -> None:
    raise KeyboardInterrupt


def test_resume_in_the_middle_of_an_epoch_needs_the_same_batches(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = make_spec(data, num_epochs=1, checkpoint_interval_unit="step")
    with monkeypatch.context() as patch:
        patch.setattr(_Trainer, "_validate", stop)
        with pytest.raises(KeyboardInterrupt):
            train(spec)
    with pytest.raises(SpecError, match="batch_size"):
        train({**spec, "dataset": {**spec["dataset"], "batch_size": 3}})
    with pytest.raises(SpecError, match=r"dataset\.shuffle"):
        train({**spec, "dataset": {**spec["dataset"], "shuffle": "blocks"}})
    with pytest.raises(SpecError, match="number of processes"):
        train({**spec, "train": {**spec["train"], "num_gpus": 2}})
    train(spec)


def test_optimizer_options_hold_on_resume(data: Path) -> None:
    train(make_spec(data, num_epochs=1))
    optim = {"lr": 0.01, "weight_decay": 0.5, "momentum": 0.1, "nesterov": False}
    train(make_spec(data, num_epochs=2, optim=optim))
    group = read_checkpoint(data / "results/train" / FINAL).training["optimizer"]["param_groups"][0]
    assert {name: group[name] for name in ("weight_decay", "momentum", "nesterov")} == {
        "weight_decay": 0.5,
        "momentum": 0.1,
        "nesterov": False,
    }
    with pytest.raises(SpecError, match="optimizer_type"):
        train(make_spec(data, num_epochs=3, optim={"optimizer_type": "torch.optim.Adam"}))


def test_resume_into_another_folder_brings_the_best_along(data: Path) -> None:
    train(make_spec(data, num_epochs=2))
    first = data / "results/train"
    spec = make_spec(data, results="new", num_epochs=3, optim={"lr": 0.0})
    spec["train"]["resume_training_checkpoint_path"] = str(first / "pc_model_latest.pth")
    result = train(spec)
    folder = data / "new/train"
    best = json.loads((folder / "best.json").read_text())
    assert (folder / best["file"]).is_file() and (folder / "pc_model_best.pth").exists()
    assert all(Path(path).exists() for path in result.files.values())
    again = train({**spec, "train": {**spec["train"], "num_epochs": 4}})
    assert "is taken, not" in (folder / "log.txt").read_text()
    assert again.metrics["best"]["file"] == best["file"]


RUN_AND_DIE = textwrap.dedent(
    """
    import contextlib, json, os, signal, sys
    from kinegraph import run_checkpoints
    from kinegraph.models import checkpoint
    from kinegraph.storage import write_atomically
    from kinegraph.actions import train
    from kinegraph.fit import _Trainer

    spec, moment, count = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    calls = 0

    def die_at(original):
        def call(*arguments, **options):
            global calls
            calls += 1
            if calls == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)
        return call

    class HalfFile:
        def __init__(self, file):
            self.file = file

        def write(self, content):
            global calls
            calls += 1
            if calls == count:
                self.file.write(bytes(content)[: len(content) // 2])
                self.file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            self.file.write(content)

    @contextlib.contextmanager
    def write_half(path):
        with write_atomically(path) as file:
            yield HalfFile(file)

    if moment == "step":
        _Trainer._train_step = die_at(_Trainer._train_step)
    elif moment == "pointer":
        run_checkpoints.point_to = die_at(run_checkpoints.point_to)
    elif moment == "write":
        checkpoint.write_atomically = write_half
    elif moment == "validation":
        _Trainer._validate = die_at(_Trainer._validate)
    train(spec)
    """
)


def run_and_die(spec: dict[str, Any], moment: str, count: int) -> None:
    arguments = [sys.executable, "-c", RUN_AND_DIE, json.dumps(spec), moment, str(count)]
    done = subprocess.run(arguments, capture_output=True, timeout=200, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    write_small_data(folder)
    spec = make_spec(folder)
    spec["dataset"]["random_move"] = True
    train(spec)
    return folder


@pytest.mark.parametrize(
    ("unit", "workers", "moment", "count"),
    [
        ("epoch", 0, "step", 5),
        ("epoch", 2, "validation", 2),
        ("step", 0, "write", 3),
        ("step", 2, "step", 6),
        ("step", 0, "pointer", 4),
    ],
)
def test_killed_run_ends_with_the_weights_of_an_undisturbed_one(
    undisturbed: Path, tmp_path: Path, unit: str, workers: int, moment: str, count: int
) -> None:
    spec = make_spec(undisturbed, results=f"killed_{unit}_{workers}_{moment}", checkpoint_interval_unit=unit)
    spec["dataset"] |= {"random_move": True, "num_workers": workers}
    folder = Path(spec["results_dir"]) / "train"
    run_and_die(spec, moment, count)
    assert [line["status"] for line in read_status(folder)].count("SUCCESS") == 0
    train(spec)
    assert "Resuming from" in (folder / "log.txt").read_text()
    assert_same_weights(folder / FINAL, undisturbed / "results/train" / FINAL)
    statuses = [line["status"] for line in read_status(folder)]
    assert statuses.count("SUCCESS") == 1 and statuses[-1] == "SUCCESS"


def test_explicit_resume_and_torn_status_line(undisturbed: Path) -> None:
    spec = make_spec(undisturbed, results="explicit")
    spec["dataset"]["random_move"] = True
    spec["train"]["resume_training_checkpoint_path"] = str(undisturbed / "results/train/model_epoch_000_step_00003.pth")
    folder = undisturbed / "explicit/train"
    folder.mkdir(parents=True)
    (folder / "status.json").write_text('{"status": "STARTED"}\n{"status": "RUNN')
    train(spec)
    assert_same_weights(folder / FINAL, undisturbed / "results/train" / FINAL)
    assert [line["status"] for line in read_status(folder)] == ["STARTED", "STARTED", "RUNNING", "SUCCESS"]


def test_two_gloo_processes(data: Path) -> None:
    spec = make_spec(data, num_gpus=2, num_epochs=1)
    result = train(spec)
    assert read_status(data / "results/train")[-1]["status"] == "SUCCESS"
    assert (data / "results/train/model_epoch_000_step_00001.pth").is_file()
    assert 0 <= result.metrics["val_acc"] <= 1


def test_options_without_effect_are_named_once_somebody_chose_them(data: Path) -> None:
    optim = {"lr": 0.01, "lr_scheduler": "Cosine", "patience": 7, "lr_decay": 0.1}
    train(make_spec(data, num_epochs=1, optim=optim), "model.fusion_weights=[]")
    log = (data / "results/train/log.txt").read_text()
    assert "train.optim.patience has no effect" in log and "lr_decay" not in log
    assert "model.fusion_weights has no effect" not in log


@pytest.mark.parametrize(("interval", "is_told"), [(3, True), (1, False)])
def test_early_stopping_that_cannot_act_is_told(data: Path, interval: int, is_told: bool) -> None:
    train(make_spec(data, num_epochs=2, early_stopping=1, validation_interval=interval))
    assert ("train.early_stopping has no effect" in (data / "results/train/log.txt").read_text()) == is_told


@pytest.mark.parametrize("are_right", [True, False])
def test_a_temperature_at_its_bound_is_named(data: Path, are_right: bool) -> None:
    train(make_spec(data, num_epochs=1))
    pretrained = data / "results/train/pc_model_latest.pth"
    network = build_from_checkpoint(read_checkpoint(pretrained), str(pretrained)).eval()
    with torch.inference_mode():
        logits = network(torch.from_numpy(np.load(data / "val_data.npy")))
    labels = logits.argmax(1) if are_right else logits.argmin(1)
    (data / "val_label.json").write_text(json.dumps(labels.tolist()))
    spec = make_spec(data, results="tuned", num_epochs=1, optim={"lr": 0.0})
    spec["dataset"]["label_map"] = {"class_0": 0, "class_1": 1, "class_2": 2}
    spec["model"]["pretrained_model_path"] = str(pretrained)
    train(spec)
    tuned = read_checkpoint(data / "tuned/train/pc_model_latest.pth")
    assert (tuned.temperature > 19.9) != are_right
    assert ("train.temperature was fitted to 20" in (data / "tuned/train/log.txt").read_text()) != are_right


def test_a_child_process_tells_its_error(data: Path) -> None:
    train(make_spec(data, num_epochs=1))
    spec = make_spec(data, results="tuned", num_gpus=2, num_epochs=1)
    spec["model"] |= {
        "graph_strategy": "uniform",
        "pretrained_model_path": str(data / "results/train/pc_model_latest.pth"),
    }
    with pytest.raises(CheckpointError, match="strategy spatial"):
        train(spec)


def run_torchrun(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    torchrun = Path(sys.executable).with_name("torchrun")
    command = [str(torchrun), "--standalone", "--nproc-per-node=2", "-m", "kinegraph", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200, check=False)


def test_torchrun_starts_the_processes(data: Path) -> None:
    spec = data / "spec.yaml"
    spec.write_text(json.dumps(make_spec(data, num_epochs=1, seed=-1)))
    wrong = run_torchrun(["train", "-e", str(spec)], data)
    assert wrong.returncode != 0 and "2 processes that torchrun or SLURM started" in wrong.stderr
    assert not list((data / "results/train").glob("*.pth"))
    done = run_torchrun(["train", "-e", str(spec), "num_gpus=2"], data)
    assert done.returncode == 0, done.stderr
    statuses = [line["status"] for line in read_status(data / "results/train")]
    assert statuses[-3:] == ["STARTED", "RUNNING", "SUCCESS"] and statuses.count("SUCCESS") == 1
    assert read_checkpoint(data / "results/train/pc_model_latest.pth").training["world_size"] == 2


def test_no_gpu_means_one_process_and_a_notice(data: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    train(make_spec(data, num_gpus=2, num_epochs=1, accelerator="auto"))
    assert "No GPU was found" in (data / "results/train/log.txt").read_text()
    assert (data / "results/train/model_epoch_000_step_00003.pth").is_file()


def test_encrypted_run_writes_no_plain_weights_and_no_key(data: Path) -> None:
    spec = {**make_spec(data, num_epochs=1), "encryption_key": "a secret phrase"}
    train(spec)
    files = [path for path in (data / "results").rglob("*") if path.is_file() and not path.is_symlink()]
    weights = [path for path in files if path.suffix == ".pth"]
    assert len(weights) == 1 and len(files) >= 6
    assert all(path.read_bytes()[:5] == b"KGENC" for path in weights)
    assert not [path for path in files if b"a secret phrase" in path.read_bytes()]
    assert read_weights(weights[0], "a secret phrase")
    with pytest.raises(CheckpointError, match="wrong key"):
        train({**spec, "encryption_key": "another", "train": {**spec["train"], "num_epochs": 2}})
    with pytest.raises(CheckpointError, match="no key"):
        train(make_spec(data, num_epochs=2))


def test_fine_tuning_with_another_number_of_classes(data: Path) -> None:
    train(make_spec(data, num_epochs=1))
    pretrained = data / "results/train/pc_model_latest.pth"
    write_clips(data, "train", 12, seed=3, num_classes=4)
    write_clips(data, "val", 4, seed=4, num_classes=4)
    spec = make_spec(data, results="tuned", num_epochs=1, optim={"lr": 0.0})
    spec["model"]["pretrained_model_path"] = str(pretrained)
    train(spec)
    log = (data / "tuned/train/log.txt").read_text()
    assert "3 classes and this model has 4" in log
    assert "was trained for other classes" not in log
    before, after = read_weights(pretrained), read_weights(data / "tuned/train/pc_model_latest.pth")
    assert after["fcn.weight"].shape[0] == 4
    assert torch.equal(before["st_gcn_networks.3.gcn.conv.weight"], after["st_gcn_networks.3.gcn.conv.weight"])


def test_fine_tuning_on_as_many_other_classes_says_so(data: Path) -> None:
    train(make_spec(data, num_epochs=1))
    spec = make_spec(data, results="tuned", num_epochs=1)
    spec["model"]["pretrained_model_path"] = str(data / "results/train/pc_model_latest.pth")
    spec["dataset"]["label_map"] = {"a": 0, "b": 1, "c": 2}
    train(spec)
    assert "was trained for other classes (class_0" in (data / "tuned/train/log.txt").read_text()


@pytest.mark.parametrize("name", ["Adam", "Adamax", "AdamW"])
def test_optimizer_is_honoured(data: Path, name: str) -> None:
    train(make_spec(data, num_epochs=1, optim={"optimizer_type": f"torch.optim.{name}", "lr": 0.001}))
    training = read_checkpoint(data / "results/train/pc_model_latest.pth").training
    state = training["optimizer"]["state"][0]
    assert ("exp_inf" in state) == (name == "Adamax") and ("exp_avg_sq" in state) == (name != "Adamax")
    assert training["optimizer"]["param_groups"][0]["lr"] == 0.001


@pytest.mark.parametrize("clip", [{}, {"grad_clip": 1.0}])
def test_diverging_training_stops_with_advice(data: Path, clip: dict[str, float]) -> None:
    with pytest.raises(KinegraphError, match="finite loss"):
        train(make_spec(data, num_epochs=4, optim={"lr": 1e30}, **clip))
    last = read_status(data / "results/train")[-1]
    assert last["status"] == "FAILURE"


def test_data_errors_of_both_sets_come_together(data: Path) -> None:
    clips = np.load(data / "train_data.npy")
    clips[2, 1, 0, 3, 0] = np.nan
    np.save(data / "train_data.npy", clips)
    (data / "val_label.json").write_text("[0, 1]")
    with pytest.raises(UserError) as caught:
        train(make_spec(data))
    text = str(caught.value)
    assert "train_data.npy" in text and "val_label.json" in text and len(caught.value.problems) == 2


def test_set_smaller_than_a_batch_is_trained_on(data: Path) -> None:
    write_clips(data, "train", 3, seed=5)
    result = train(make_spec(data, num_epochs=1))
    assert result.metrics["train_loss"] > 0
    assert (data / "results/train/model_epoch_000_step_00001.pth").is_file()


def test_full_disk_is_a_clear_error(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def refuse(source: Any, target: Any, **options: Any) -> None:
        if str(target).endswith(".pth"):
            raise OSError(28, "No space left on device", str(target))
        replace(source, target, **options)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(StorageError, match="Free some space"):
        train(make_spec(data, num_epochs=1))
    folder = data / "results/train"
    assert read_status(folder)[-1]["status"] == "FAILURE"
    assert not list(folder.glob("*.pth")) and not list(folder.glob(".*tmp"))
    monkeypatch.undo()
    train(make_spec(data, num_epochs=1))
    assert read_status(folder)[-1]["status"] == "SUCCESS"


def test_interrupt_inside_a_library_is_still_an_interrupt(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(*_: Any) -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(KeyboardInterrupt):
        train(make_spec(data, num_epochs=1))
    assert "interrupted" in read_status(data / "results/train")[-1]["message"]


def test_interrupts_write_failure_lines(data: Path) -> None:
    code = "import json,sys; from kinegraph.actions import train; train(json.loads(sys.argv[1]))"
    spec = make_spec(data, num_epochs=500)
    process = subprocess.Popen([sys.executable, "-c", code, json.dumps(spec)], stderr=subprocess.PIPE)
    status = data / "results/train/status.json"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (status.is_file() and "RUNNING" in status.read_text()):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    last = read_status(data / "results/train")[-1]
    assert last["status"] == "FAILURE" and "SIGTERM" in last["message"]


def test_freed_memory_is_kept_while_training_and_given_back_after() -> None:
    code = textwrap.dedent(
        """
        import resource
        import numpy as np
        from kinegraph.allocator import keep_freed_memory

        def count_faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(3):
                np.ones(5 * 2**20)  # 40 MB: blocks above 32 MB are never kept
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        plain = count_faults()
        with keep_freed_memory() as kept:
            np.ones(5 * 2**20)  # 40 MB: blocks above 32 MB are never kept
            inside = count_faults()
        print(int(kept), plain, inside, count_faults())
        """
    )
    # Huge pages, which NumPy asks for, would hide the faults
    environment = {**os.environ, "NUMPY_MADVISE_HUGEPAGE": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    kept, plain, inside, after = (int(number) for number in done.stdout.split())
    if not kept:
        pytest.skip("this C library keeps or returns memory as it likes")
    assert plain > 20_000 and after > 20_000
    assert inside < plain / 20


def test_resume_with_another_padding_or_depth_is_refused(data: Path) -> None:
    spec = make_spec(data, num_epochs=1)
    spec["model"] |= {"model_type": "EF-GCN", "depth": 1, "width": 0.25}
    train(spec)
    for change in ({"temporal_padding": "causal"}, {"depth": 2}, {"width": 0.5}):
        other = make_spec(data, num_epochs=2)
        other["model"] |= spec["model"] | change
        with pytest.raises(SpecError, match=next(iter(change))):
            train(other)


def test_random_move_is_refused_where_zeros_mean_padding(data: Path) -> None:
    spec = make_spec(data, num_epochs=1)
    spec["model"] |= {"model_type": "EF-GCN", "depth": 1}
    spec["dataset"] |= {"random_move": True}
    with pytest.raises(SpecError, match=r"augment\.rotation_z"):
        train(spec)
