"""The actions with data and results on an S3 server, as on machines that come and go."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import kinegraph
from kinegraph import actions, file_systems, local_run, mirror
from kinegraph.actions import dataset_convert, evaluate, export, inference, run_action, train
from kinegraph.cli import main
from kinegraph.errors import CheckpointError, KinegraphError, SpecError, StorageError, UserError
from kinegraph.run import Result
from kinegraph.skeleton.layouts import LAYOUTS
from s3_server import BUCKET, S3Server, make_environment, run_proxy, serve_s3
from small_runs import make_spec, write_small_data
from test_convert import NUM_JOINTS, make_recording

ROOT = f"s3://{BUCKET}"
FINAL = "model_epoch_001_step_00006.pth"
WAIT_S = 120


def use(server: S3Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work as a machine with this cache folder."""
    for name, value in server.variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("KINEGRAPH_CACHE", str(cache))
    monkeypatch.setattr(file_systems, "RETRY_DELAYS_S", (0.01,))
    monkeypatch.setattr(mirror, "FINAL_DELAYS_S", (0.01,))


def make_remote_spec(results: str, **train_options: Any) -> dict[str, Any]:
    spec = make_spec(Path("/data"), results, **train_options)
    spec["dataset"]["random_move"] = True
    text = json.dumps(spec).replace('"/data/' + results, f'"{ROOT}/{results}').replace('"/data/', f'"{ROOT}/data/')
    moved: dict[str, Any] = json.loads(text)
    return moved


def read_everything(server: S3Server, prefix: str) -> dict[str, bytes]:
    return {key.removeprefix(f"{prefix}/"): server.get(key) for key in server.list_keys(prefix)}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    folder = tmp_path_factory.mktemp("data")
    write_small_data(folder)
    layout = LAYOUTS["coco"].to_dict() | {"name": "mine"}
    (folder / "layout.yaml").write_text(yaml.safe_dump(layout))
    (folder / "recording.json").write_text(json.dumps(make_recording(list(range(12)))))
    with serve_s3() as running:
        for path in folder.iterdir():
            running.put(f"data/{path.name}", path)
        yield running


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def results(server: S3Server, machine: Path) -> Iterator[dict[str, Result]]:
    """All five actions, each finding what it needs on the server."""
    checkpoint = f"{ROOT}/all/train/pc_model_best.pth"
    clips = {"data_path": f"{ROOT}/data/val_data.npy", "label_path": f"{ROOT}/data/val_label.json"}
    convert = {"data": f"{ROOT}/data/recording.json", "num_joints": NUM_JOINTS, "sequence_length": 8}
    convert |= {"sequence_length_min": 3, "sequence_length_max": 10}
    infer = {"checkpoint": checkpoint, "test_dataset": clips, "output_file": f"{ROOT}/elsewhere/names.txt"}
    with pytest.MonkeyPatch.context() as patch:
        use(server, machine, patch)
        yield {
            "dataset_convert": dataset_convert({"results_dir": f"{ROOT}/all", "dataset_convert": convert}),
            "train": train(make_remote_spec("all", num_epochs=1)),
            "evaluate": evaluate(
                {"evaluate": {"checkpoint": checkpoint, "test_dataset": clips}}, f"results_dir={ROOT}/all/"
            ),
            "inference": inference({"results_dir": f"{ROOT}/all", "inference": infer}),
            "export": export({"results_dir": f"{ROOT}/all", "export": {"checkpoint": checkpoint}}),
        }


EXPECTED = {
    "dataset_convert": {"data.npy", "object_0.npy", "index.json"},
    "train": {"model_epoch_000_step_00003.pth", "pc_model_latest.pth", "pc_model_best.pth", "best.json", "metrics.csv"},
    "evaluate": {"metrics.json", "confusion_matrix.csv", "confusion_matrix.png", "predictions.csv"},
    "inference": {"results.csv", "results.json"},
    "export": {"export.json"},
}


@pytest.mark.parametrize("action", EXPECTED)
def test_results_are_on_the_server(action: str, results: dict[str, Result], server: S3Server, machine: Path) -> None:
    found = read_everything(server, f"all/{action}")
    assert {*EXPECTED[action], "experiment.yaml", "status.json", "log.txt"} <= set(found)
    assert not any(name.startswith(".") or name.endswith(".tmp") for name in found)
    lines = [json.loads(line)["status"] for line in found["status.json"].decode().splitlines()]
    assert lines[0] == "STARTED" and lines[-1] == "SUCCESS"
    files = results[action].files
    assert files["results_dir"] == f"{ROOT}/all/{action}"
    assert all(server.get(uri.removeprefix(f"{ROOT}/")) for role, uri in files.items() if role != "results_dir")


def test_files_beside_the_results_folder(results: dict[str, Result], server: S3Server) -> None:
    assert results["inference"].files["results"] == f"{ROOT}/elsewhere/names.txt"
    assert len(server.get("elsewhere/names.txt").split()) == 6
    assert results["export"].files["onnx"] == f"{ROOT}/all/train/pc_model_best.onnx"
    assert server.get("all/train/labels.txt").split() == [b"class_0", b"class_1", b"class_2"]
    with pytest.MonkeyPatch.context() as patch:
        use(server, Path(os.environ["KINEGRAPH_CACHE"]) / "other", patch)
        with pytest.raises(UserError, match="there already"):
            export({"results_dir": f"{ROOT}/again", "export": {"checkpoint": f"{ROOT}/all/train/pc_model_best.pth"}})


def test_records_name_uris_and_no_secrets(results: dict[str, Result], server: S3Server, machine: Path) -> None:
    from kinegraph.models.checkpoint import read_checkpoint

    found = read_everything(server, "all")
    assert len(found) > 25
    for name, content in found.items():
        if not name.startswith("train/tensorboard") and not name.endswith("log.txt"):
            assert str(machine).encode() not in content, name
        assert server.secret_key.encode() not in content, name
        assert server.access_key.encode() not in content, name
    for path in machine.rglob("*"):
        assert not path.is_file() or server.secret_key.encode() not in path.read_bytes(), path
    experiment = yaml.safe_load(found["train/experiment.yaml"])
    assert experiment["dataset"]["train_dataset"]["data_path"] == f"{ROOT}/data/train_data.npy"
    assert experiment["results_dir"] == f"{ROOT}/all"
    assert json.loads(found["evaluate/metrics.json"])["data_path"] == f"{ROOT}/data/val_data.npy"
    assert json.loads(found["inference/results.json"])["model"] == f"{ROOT}/all/train/pc_model_best.pth"
    assert json.loads(found["dataset_convert/index.json"])["recording"] == f"{ROOT}/data/recording.json"
    path = machine / "checkpoint.pth"
    path.write_bytes(found["train/pc_model_latest.pth"])
    assert read_checkpoint(path, "").spec["dataset"] == experiment["dataset"]


def test_spec_of_a_run_works_on_another_machine(
    results: dict[str, Result], server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with a layout file, and a checkpoint to start from, on the server."""
    use(server, tmp_path / "cache", monkeypatch)
    experiment = yaml.safe_load(server.get("all/train/experiment.yaml"))
    experiment["model"]["graph_layout"] = f"{ROOT}/data/layout.yaml"
    pretrained = f"{ROOT}/all/train/pc_model_best.pth"
    train(experiment, f"results_dir={ROOT}/again", f"pretrained_model={pretrained}")
    again = yaml.safe_load(server.get("again/train/experiment.yaml"))
    assert again["model"]["graph_layout"] == f"{ROOT}/data/layout.yaml"
    assert again["model"]["pretrained_model_path"] == pretrained
    assert f"Weights start from {pretrained}".encode() in server.get("again/train/log.txt")


def test_errors_name_uris(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(server, tmp_path / "cache", monkeypatch)
    clips = {"data_path": f"{ROOT}/data/val_data.npy", "label_path": f"{ROOT}/data/val_label.json"}
    server.put("data/model.pth", b"no checkpoint")
    with pytest.raises(CheckpointError) as caught:
        evaluate({"results_dir": ROOT, "evaluate": {"checkpoint": f"{ROOT}/data/model.pth", "test_dataset": clips}})
    assert caught.value.problems[0].where == f"{ROOT}/data/model.pth"
    last = json.loads(server.get("evaluate/status.json").decode().splitlines()[-1])
    assert last["status"] == "FAILURE" and f"{ROOT}/data/model.pth" in last["message"]


def test_inspect_load_and_specs_by_uri(
    server: S3Server,
    results: dict[str, Result],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    use(server, tmp_path / "cache", monkeypatch)
    assert main(["inspect", f"{ROOT}/data/val_data.npy", f"{ROOT}/data/val_label.json", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["data_path"], report["label_path"]) == (f"{ROOT}/data/val_data.npy", f"{ROOT}/data/val_label.json")
    assert str(tmp_path) not in json.dumps(report)
    assert main(["validate", "-e", f"{ROOT}/all/train/experiment.yaml", "--action", "train"]) == 0
    assert main(["validate", "-e", f"{ROOT}/all/train/nothing.yaml"]) == 2
    assert "nothing.yaml" in capsys.readouterr().err
    assert kinegraph.load(results["train"].files["best"]).num_classes == 3


TRAIN_AND_WAIT = """
import sys, time
from kinegraph import mirror
from kinegraph.actions import train
from kinegraph.run_checkpoints import CheckpointKeeper

mirror.INTERVAL_S = 0.1
save = CheckpointKeeper.save

def save_and_wait(keeper, epoch, step, make):
    path = save(keeper, epoch, step, make)
    time.sleep(int(sys.argv[2]))
    return path

CheckpointKeeper.save = save_and_wait
train(sys.argv[1])
"""


def start_training(server: S3Server, cache: Path, spec: dict[str, Any]) -> subprocess.Popen[bytes]:
    """A training that stops to wait after its first checkpoint."""
    cache.mkdir(parents=True)
    (cache / "spec.yaml").write_text(yaml.safe_dump(spec))
    command = [sys.executable, "-c", TRAIN_AND_WAIT, str(cache / "spec.yaml"), str(WAIT_S)]
    return subprocess.Popen(command, env=make_environment(server, cache), stderr=subprocess.PIPE)


def wait_for(server: S3Server, key: str, process: subprocess.Popen[bytes]) -> None:
    until_s = time.monotonic() + WAIT_S
    while key not in server.list_keys(key):
        assert process.poll() is None and time.monotonic() < until_s, f"{key} did not come"
        time.sleep(0.1)


def test_killed_training_goes_on_on_another_machine(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from kinegraph.models.checkpoint import read_checkpoint

    process = start_training(server, tmp_path / "first", make_remote_spec("killed"))
    wait_for(server, "killed/train/best.json", process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    use(server, tmp_path / "second", monkeypatch)
    train(make_remote_spec("killed"))
    statuses = [json.loads(line) for line in server.get("killed/train/status.json").decode().splitlines()]
    assert [line["status"] for line in statuses].count("STARTED") == 2 and statuses[-1]["status"] == "SUCCESS"
    assert b"Resuming from s3://" in server.get("killed/train/log.txt")
    assert len(server.get("killed/train/metrics.csv").splitlines()) == 3
    write_small_data(tmp_path)
    local = make_spec(tmp_path)
    local["dataset"]["random_move"] = True
    train(local)
    (tmp_path / FINAL).write_bytes(server.get(f"killed/train/{FINAL}"))
    ours, expected = (read_checkpoint(path, "") for path in (tmp_path / FINAL, tmp_path / "results/train" / FINAL))
    assert len(ours.state_dict) > 10
    assert all(torch.equal(ours.state_dict[name], tensor) for name, tensor in expected.state_dict.items())
    assert server.get("killed/train/pc_model_latest.pth") == (tmp_path / FINAL).read_bytes()


def test_terminated_training_uploads_its_end(server: S3Server, tmp_path: Path) -> None:
    process = start_training(server, tmp_path / "first", make_remote_spec("terminated"))
    wait_for(server, "terminated/train/pc_model_latest.pth", process)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    last = json.loads(server.get("terminated/train/status.json").decode().splitlines()[-1])
    assert last["status"] == "FAILURE" and "SIGTERM" in last["message"]


def test_all_that_is_missing_is_told_before_anything_starts(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(server, tmp_path / "cache", monkeypatch)
    spec = make_remote_spec("missing")
    spec["dataset"]["train_dataset"]["data_path"] = f"{ROOT}/data/none.npy"
    spec["dataset"]["val_dataset"]["label_path"] = f"{ROOT}/data"
    spec["model"]["graph_layout"] = "s3://none/layout.yaml"
    spec["model"]["pretrained_model_path"] = "s3://name:hunter2@bucket/model.pth"
    with pytest.raises(SpecError) as caught:
        train(spec, "train.results_dir=s3://none/results")
    where = sorted(problem.where.split(" ")[0] for problem in caught.value.problems)
    assert where == [
        "dataset.train_dataset.data_path",
        "dataset.val_dataset.label_path",
        "model.graph_layout",
        "model.pretrained_model_path",
        "train.results_dir",
    ]
    assert "hunter2" not in str(caught.value)
    assert server.list_keys("missing") == [] and not (tmp_path / "cache").exists()


def test_wrong_secret_on_the_command_line(server: S3Server, tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(make_remote_spec("refused")))
    hidden = "not-the-secret-0123456789"
    environment = make_environment(server, tmp_path / "cache", AWS_SECRET_ACCESS_KEY=hidden, KINEGRAPH_DEBUG="1")
    command = [sys.executable, "-m", "kinegraph", "train", "-e", str(tmp_path / "spec.yaml"), "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    problems = json.loads(done.stdout)["problems"]
    assert len(problems) == 5 and "AWS_SECRET_ACCESS_KEY" in problems[0]["hint"]
    assert hidden not in done.stdout + done.stderr and server.secret_key not in done.stdout + done.stderr
    assert not any(hidden in path.read_text() for path in tmp_path.rglob("*") if path.is_file())


def test_results_that_cannot_be_uploaded_are_kept(
    results: dict[str, Result], server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = {"data_path": f"{ROOT}/data/val_data.npy", "label_path": f"{ROOT}/data/val_label.json"}
    spec = {"evaluate": {"checkpoint": f"{ROOT}/all/train/pc_model_best.pth", "test_dataset": clips}}
    overrides = [f"results_dir={ROOT}/broken"]
    use(server, tmp_path, monkeypatch)
    with run_proxy(server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        proxy.cut_request_after = 1
        with monkeypatch.context() as patch, pytest.raises(KinegraphError) as caught:
            # The server is gone once the inputs are there
            patch.setattr(actions, "fetch_inputs", fetch_inputs_and(lambda: setattr(proxy, "cuts", 1_000_000)))
            run_action("evaluate", spec, overrides)
        assert isinstance(caught.value, StorageError) and caught.value.exit_code == 1
        folder = next(path for path in tmp_path.glob("results/*/evaluate"))
        assert str(folder) in str(caught.value)
        assert (folder / "metrics.json").is_file()
        assert json.loads((folder / "status.json").read_text().splitlines()[-1])["status"] == "FAILURE"
        assert server.list_keys("broken") == []
        proxy.cuts = 0
        run_action("evaluate", spec, overrides)
    lines = [json.loads(line)["status"] for line in server.get("broken/evaluate/status.json").decode().splitlines()]
    assert lines == ["STARTED", "RUNNING", "FAILURE", "STARTED", "RUNNING", "SUCCESS"]


def fetch_inputs_and(then: Callable[[], None]) -> Callable[..., None]:
    fetch_inputs = local_run.fetch_inputs

    def call(*arguments: Any) -> None:
        fetch_inputs(*arguments)
        then()

    return call
