"""The runners with real processes: one conformance suite for all, the chain of jobs, and what kills leave behind."""

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

import numpy as np
import pytest

from kinegraph.errors import UserError
from kinegraph.jobs import (
    Job,
    cancel_job,
    create_job,
    get_job_logs,
    get_job_status,
    list_jobs,
    wait_for_job,
)
from kinegraph.jobs.processes import is_alive
from kinegraph.jobs.record import read_job
from kinegraph.jobs.runners import RUNNERS
from ray_cluster import start_ray
from s3_server import serve_s3
from small_runs import make_spec, write_clips, write_small_data

KEY = "correct-horse-battery"
WAIT_S = 240


@pytest.fixture(scope="module")
def ray_address() -> Iterator[str]:
    with start_ray() as cluster:
        yield cluster.dashboard


@pytest.fixture(params=sorted(RUNNERS))
def runner(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The arguments that choose a runner."""
    address = request.getfixturevalue("ray_address") if request.param == "ray" else None
    return {"runner": request.param, "address": address}


@pytest.fixture(autouse=True)
def without_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("KINEGRAPH_ENCRYPTION_KEY", "KINEGRAPH_JOBS_ROOT", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    write_small_data(folder)
    write_clips(folder, "test", 5, seed=3)
    return folder


@pytest.fixture
def stop_all(tmp_path: Path) -> Iterator[None]:
    """Whatever a test leaves running is ended."""
    yield
    for job in list_jobs(tmp_path / "jobs"):
        for process in (job.process, job.owner):
            if process is not None and process.pid != os.getpid() and is_alive(process):
                os.kill(process.pid, signal.SIGKILL)


pytestmark = pytest.mark.usefixtures("stop_all")


def write_recording(path: Path) -> Path:
    """A person with 3 joints over 12 frames, as dataset_convert reads it."""
    person = {"object_id": 7, "pose25d": [0.5] * 12, "pose3d": [1.0] * 12}
    frames = [
        {
            "num_frames_in_batch": 1,
            "batches": [{"batch_id": 0, "frame_num": frame, "ntp_timestamp": frame, "objects": [person]}],
        }
        for frame in range(12)
    ]
    path.write_text(json.dumps(frames))
    return path


CONVERSION = {
    "dataset_convert": {"num_joints": 3, "sequence_length": 8, "sequence_length_min": 3, "sequence_length_max": 10}
}


def convert(folder: Path, recording: Path, **options: Any) -> Job:
    return create_job("dataset_convert", spec=CONVERSION, data_source=recording, root=folder / "jobs", **options)


def train_for_ever(folder: Path, data: Path, **options: Any) -> Job:
    """A training that does not end by itself, once its process is there."""
    common: Any = {"root": folder / "jobs", "automl_policy": "off"}
    job = create_job("train", ["num_epochs=1000000"], spec=make_spec(data), **common, **options)
    return wait_until(lambda: get_job_status(job.id, folder / "jobs"), lambda job: job.status != "Pending")


def wait_until(look: Callable[[], Job], is_reached: Callable[[Job], bool]) -> Job:
    until_s = time.monotonic() + WAIT_S
    while not is_reached(job := look()):
        assert time.monotonic() < until_s, job
        time.sleep(0.1)
    return job


class TestConformance:
    """What every runner does. Each test starts one job at most: on Ray that costs seconds."""

    def test_success_with_its_answer_and_its_log(self, tmp_path: Path, runner: dict[str, Any]) -> None:
        job = convert(tmp_path, write_recording(tmp_path / "walk.json"), **runner)
        assert job.status in ("Pending", "Running", "Complete")
        assert job.runner == runner["runner"]
        job = wait_for_job(job.id, tmp_path / "jobs", WAIT_S)
        assert (job.status, job.exit_code, job.message) == ("Complete", 0, ""), get_job_logs(job.id, tmp_path / "jobs")
        assert job.results_dir == str(tmp_path / "jobs" / job.id / "dataset_convert")
        assert np.load(Path(job.results_dir) / "object_7.npy").shape == (3, 3, 10, 3, 1)  # from frames 0, 4 and 8
        assert job.files["results_dir"] == job.results_dir
        assert job.metrics
        assert job.started_at is not None and job.ended_at is not None
        assert job.created_at <= job.started_at <= job.ended_at
        log = get_job_logs(job.id, tmp_path / "jobs")
        assert log
        assert get_job_logs(job.id, tmp_path / "jobs", tail=1) == log.splitlines(keepends=True)[-1]
        assert cancel_job(job.id, tmp_path / "jobs") == job
        names = {path.name for path in (tmp_path / "jobs" / job.id).iterdir()}
        assert names == {"job.json", "spec.yaml", "log.txt", "dataset_convert"}

    def test_failure_with_its_exit_code_and_message(self, tmp_path: Path, runner: dict[str, Any]) -> None:
        (tmp_path / "walk.json").write_text('{"no": "list"}')
        job = wait_for_job(convert(tmp_path, tmp_path / "walk.json", **runner).id, tmp_path / "jobs", WAIT_S)
        assert (job.status, job.exit_code) == ("Error", 2)
        assert "walk.json" in job.message
        assert job.message in get_job_logs(job.id, tmp_path / "jobs")

    def test_running_job_seen_from_elsewhere_and_canceled(
        self, tmp_path: Path, data: Path, runner: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SECRET_OF_THE_CALLER", "7c1d")
        job = train_for_ever(tmp_path, data, **runner)
        assert job.process is not None
        variables = Path(f"/proc/{job.process.pid}/environ").read_bytes()
        assert b"PATH=" in variables
        assert b"7c1d" not in variables
        seen = ask_in_another_process(tmp_path / "jobs", "status", job.id)
        assert (seen["status"], seen["process"]["pid"]) == ("Running", job.process.pid)
        job = cancel_job(job.id, tmp_path / "jobs")
        assert (job.status, job.message) == ("Canceled", "canceled")
        assert job.process is not None and not is_alive(job.process)
        assert get_job_status(job.id, tmp_path / "jobs").status == "Canceled"

    def test_it_survives_its_caller(self, tmp_path: Path, runner: dict[str, Any]) -> None:
        recording = write_recording(tmp_path / "walk.json")
        arguments = ["submit", "dataset_convert", "--data-source", recording, "--runner", runner["runner"]]
        arguments += ["--address", runner["address"]] if runner["address"] else []
        section = CONVERSION["dataset_convert"]
        arguments += [f"dataset_convert.{name}={value}" for name, value in section.items()]
        told = ask_in_another_process(tmp_path / "jobs", *arguments)
        assert wait_for_job(told["id"], tmp_path / "jobs", WAIT_S).status == "Complete"

    def test_a_dead_supervisor_is_noticed(self, tmp_path: Path, data: Path, runner: dict[str, Any]) -> None:
        job = train_for_ever(tmp_path, data, **runner)
        assert job.owner is not None and job.process is not None and job.owner.pid != job.process.pid
        os.kill(job.owner.pid, signal.SIGKILL)
        job = wait_until(lambda: get_job_status(job.id, tmp_path / "jobs"), lambda job: job.has_ended)
        assert job.status == "Error"
        assert job.process is not None and not is_alive(job.process), "the action must not go on alone"
        assert read_job(str(tmp_path / "jobs"), job.id) == job


def ask_in_another_process(root: Path, *arguments: object) -> Any:
    """The job that `kinegraph jobs ... --json` answers with."""
    command = [sys.executable, "-m", "kinegraph", "jobs", *map(str, arguments), "--root", str(root), "--json"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout)["job"]


def test_an_unknown_job_or_runner(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="which is not there"):
        get_job_status("deadbeef", tmp_path)
    with pytest.raises(UserError, match="Did you mean 'local'"):
        create_job("export", runner="locale", root=tmp_path)


def test_a_ray_cluster_that_is_not_there(tmp_path: Path) -> None:
    recording = write_recording(tmp_path / "walk.json")
    with pytest.raises(UserError, match="Is the cluster up"):
        convert(tmp_path, recording, runner="ray", address="http://127.0.0.1:9")
    assert not (tmp_path / "jobs").exists()


def test_a_key_by_value_is_not_given_to_ray(tmp_path: Path, ray_address: str) -> None:
    recording = write_recording(tmp_path / "walk.json")
    spec = CONVERSION | {"encryption_key": KEY}
    with pytest.raises(UserError, match="by value") as caught:
        create_job(
            "dataset_convert", spec=spec, data_source=recording, root=tmp_path, runner="ray", address=ray_address
        )
    assert KEY not in str(caught.value)


def test_a_job_that_waits_for_a_gpu_can_be_canceled(tmp_path: Path, data: Path, ray_address: str) -> None:
    spec = make_spec(data, accelerator="gpu")
    known: Any = {"root": tmp_path / "jobs", "automl_policy": "off", "runner": "ray", "address": ray_address}
    job = create_job("train", spec=spec, **known)
    assert (job.status, job.num_gpus) == ("Pending", 1)
    assert get_job_status(job.id, tmp_path / "jobs").status == "Pending"
    assert cancel_job(job.id, tmp_path / "jobs").status == "Canceled"


def test_a_killed_action_is_an_error(tmp_path: Path, data: Path) -> None:
    job = train_for_ever(tmp_path, data)
    assert job.process is not None
    os.kill(job.process.pid, signal.SIGKILL)
    job = wait_for_job(job.id, tmp_path / "jobs", WAIT_S)
    assert (job.status, job.exit_code) == ("Error", -signal.SIGKILL)
    assert "SIGKILL" in job.message


def test_a_supervisor_that_the_system_ends_is_no_cancellation(tmp_path: Path, data: Path) -> None:
    job = train_for_ever(tmp_path, data)
    assert job.owner is not None
    os.kill(job.owner.pid, signal.SIGTERM)
    job = wait_for_job(job.id, tmp_path / "jobs", WAIT_S)
    assert (job.status, "SIGTERM" in job.message) == ("Error", True)


def test_a_launcher_that_dies_in_between(tmp_path: Path, data: Path) -> None:
    """The record is there, and whoever was to launch is not."""
    program = f"""
import os, signal
from kinegraph.jobs import create_job
from kinegraph.jobs import local_runner
local_runner.subprocess.Popen = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
create_job("train", spec={make_spec(data)!r}, root={str(tmp_path / "jobs")!r})
"""
    result = subprocess.run([sys.executable, "-c", program], timeout=60, check=False)
    assert result.returncode == -signal.SIGKILL
    (job,) = list_jobs(tmp_path / "jobs")
    assert (job.status, "is gone" in job.message) == ("Error", True)


def run_to_the_end(action: str, root: object, **options: Any) -> Job:
    job = create_job(action, root=str(root), **options)
    job = wait_for_job(job.id, str(root), WAIT_S)
    assert job.status == "Complete", f"{job.message}\n{get_job_logs(job.id, str(root))}"
    return job


def run_chain(root: object, spec: dict[str, Any], source: object, **options: Any) -> dict[str, Job]:
    """A training and its children, which get nothing but their parent and their data."""
    jobs = {"train": run_to_the_end("train", root, spec=spec, automl_policy="off", **options)}
    data: dict[str, Any] = {"data_source": str(source)}
    jobs["evaluate"] = run_to_the_end("evaluate", root, parent_job_id=jobs["train"].id, **data, **options)
    jobs["export"] = run_to_the_end("export", root, parent_job_id=jobs["train"].id, **options)
    jobs["inference"] = run_to_the_end("inference", root, parent_job_id=jobs["export"].id, **data, **options)
    return jobs


def test_the_chain_of_jobs_with_an_encrypted_model(tmp_path: Path, data: Path) -> None:
    key_file = tmp_path / "key.txt"
    key_file.write_text(KEY)
    spec = make_spec(data, num_epochs=1)
    jobs = run_chain(tmp_path / "jobs", spec, data, key_file=key_file)
    assert jobs["evaluate"].metrics["num_clips"] == 6
    assert jobs["export"].files["onnx"] == str(Path(jobs["export"].results_dir) / "model.onnx")
    lines = (Path(jobs["inference"].results_dir) / "results.txt").read_text().splitlines()
    assert len(lines) == 5
    model = jobs["evaluate"].inferred["evaluate.checkpoint"]
    assert Path(model).resolve() == (Path(jobs["train"].results_dir) / "pc_model_best.pth").resolve()
    assert not Path(model).read_bytes().startswith(b"PK"), "the model is encrypted"
    texts = [path for path in (tmp_path / "jobs").rglob("*") if path.suffix in (".json", ".yaml", ".txt", ".csv")]
    assert len(texts) > 12
    assert not [path for path in texts if KEY in path.read_text()]


@pytest.mark.timeout(600)
def test_the_chain_of_jobs_from_a_search_on_object_storage(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KINEGRAPH_CACHE", str(tmp_path / "cache"))
    with serve_s3() as server:
        for name, value in server.variables.items():
            monkeypatch.setenv(name, value)
        for path in data.iterdir():
            server.put(f"data/{path.name}", path)
        spec = make_spec(data, num_epochs=1)
        del spec["dataset"]["train_dataset"], spec["dataset"]["val_dataset"]
        root, source = "s3://bucket/results", "s3://bucket/data"
        spec["automl"] = {"automl_max_recommendations": 2, "algorithm": "random"}
        train = run_to_the_end("train", root, spec=spec, data_source=source)
        assert (train.action, train.results_dir) == ("train", f"{root}/{train.id}/automl")
        export = run_to_the_end("export", root, parent_job_id=train.id[:8])
        jobs = [run_to_the_end("evaluate", root, parent_job_id=train.id, data_source=source)]
        jobs += [run_to_the_end("inference", root, parent_job_id=export.id, data_source=source)]
        keys = set(server.list_keys("results/"))
        for job, name in ((train, "pc_model_best.pth"), (export, "model.onnx"), (jobs[0], "metrics.json")):
            assert f"results/{job.id}/{job.effective_action}/{name}" in keys
        for job in (train, export, *jobs):
            assert {f"results/{job.id}/{name}" for name in ("job.json", "spec.yaml", "log.txt")} <= keys
        assert server.get(f"results/{jobs[1].id}/inference/results.txt").count(b"\n") == 5
        assert [job.id for job in list_jobs(root)] == [job.id for job in (jobs[1], jobs[0], export, train)]
        assert "trial" in get_job_logs(train.id, root)
        contents = [server.get(key) for key in keys if key.endswith((".json", ".yaml", ".txt"))]
        assert len(contents) > 12
        assert not [content for content in contents if server.secret_key.encode() in content]
