"""Jobs without runners: records, states, what is filled in, which model is chosen, what is found out about the dead."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from kinegraph.errors import DataError, KinegraphError, SpecError, StorageError, UserError
from kinegraph.jobs import client, create_job, get_job_logs, get_job_status, list_jobs, resolve_spec_param
from kinegraph.jobs.artifacts import find_model
from kinegraph.jobs.environment import build_environment
from kinegraph.jobs.liveness import STALE_S
from kinegraph.jobs.processes import describe_process, is_alive
from kinegraph.jobs.record import (
    TRANSITIONS,
    Job,
    advance,
    get_time,
    make_job_id,
    read_job,
    write_job,
    write_overrides,
)
from kinegraph.jobs.request import Plan, Request, plan_job
from kinegraph.jobs.resolve import FUNCTIONS, SPEC_PARAMS
from kinegraph.jobs.supervisor import Supervisor, read_answer
from small_runs import make_spec, write_clips, write_small_data

KEY = "correct-horse-battery"
KEY_VARIABLE = "KINEGRAPH_ENCRYPTION_KEY"


@pytest.fixture(autouse=True)
def without_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (KEY_VARIABLE, "KINEGRAPH_JOBS_ROOT", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    write_small_data(folder)
    write_clips(folder, "test", 5, seed=3)
    return folder


def make_job(root: Path, **values: Any) -> Job:
    """A record, written; its results folder is there."""
    job_id = values.pop("id", None) or make_job_id()
    action = values.pop("action", "train")
    results = root / job_id / action
    known = {"action": action, "effective_action": action, "runner": "local", "created_at": get_time()}
    job = Job(**{"id": job_id, "results_dir": str(results), **known, **values})
    results.mkdir(parents=True)
    write_job(str(root), job)
    return job


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def plan(root: Path, action: str = "train", **values: Any) -> Plan:
    overrides = write_overrides(values.pop("overrides", ()))
    return plan_job(Request(action, str(root), overrides=overrides, **values))


def test_every_pair_of_states(tmp_path: Path) -> None:
    allowed = {("Pending", "Running")} | {
        (first, last)
        for first, last in itertools.product(("Pending", "Running"), ("Complete", "Error", "Canceled"))
        if (first, last) != ("Pending", "Complete")
    }
    pairs = list(itertools.product(TRANSITIONS, TRANSITIONS))
    assert len(pairs) == 25
    for first, last in pairs:
        job = replace(make_job(tmp_path), status=first)
        if (first, last) in allowed:
            assert advance(job, last, message="x").status == last  # type: ignore[arg-type]
        else:
            with pytest.raises(KinegraphError, match=f"{first} -> {last}"):
                advance(job, last)  # type: ignore[arg-type]


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    job = make_job(tmp_path, owner=describe_process(os.getpid()), metrics={"val_acc": 0.5}, notices=["ü"], exit_code=0)
    assert read_job(str(tmp_path), job.id) == job
    assert read_job(str(tmp_path), job.id[:8]) == job
    assert list((tmp_path / job.id).glob(".*")) == []


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"status": "Done"}, "status"),
        ({"surprise": 1}, "surprise"),
        ({"owner": {"pid": "one", "host": "h"}}, "owner"),
        ({"id": "another"}, "another"),
        (None, "not JSON"),
        ("big", "bytes"),
    ],
)
def test_a_damaged_record(tmp_path: Path, change: Any, text: str) -> None:
    job = make_job(tmp_path)
    path = tmp_path / job.id / "job.json"
    if change == "big":
        path.write_text(" " * 2_000_000 + path.read_text())
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | change) if change else "{")
    with pytest.raises((StorageError, UserError), match=text):
        get_job_status(job.id, tmp_path)


def test_names_of_jobs(tmp_path: Path) -> None:
    first = make_job(tmp_path, id="aaaaaaaa-0000-4000-8000-000000000001", created_at="2026-01-01T00:00:00+00:00")
    second = make_job(tmp_path, id="aaaaaaaa-0000-4000-8000-000000000002", created_at="2026-01-02T00:00:00+00:00")
    (tmp_path / "notes").mkdir()
    assert [job.id for job in list_jobs(tmp_path)] == [second.id, first.id]
    assert get_job_status(first.id.upper(), tmp_path).id == first.id
    with pytest.raises(UserError, match="begins 2 ids"):
        get_job_status("aaaaaaaa", tmp_path)
    unknown = ("bbbbbbbb", "aaa", "", "../data", "*", str(tmp_path), make_job_id())
    for name in unknown:
        with pytest.raises(UserError, match="which is not there"):
            get_job_status(name, tmp_path)
    assert list_jobs(tmp_path / "nothing") == []


def test_root_by_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(tmp_path / "jobs")
    monkeypatch.chdir(tmp_path)
    assert [found.id for found in list_jobs()] == [job.id]
    monkeypatch.setenv("KINEGRAPH_JOBS_ROOT", str(tmp_path / "other"))
    assert list_jobs() == []


def test_listing_imports_nothing_heavy(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    program = (
        "import sys; from kinegraph.jobs import get_job_status, list_jobs\n"
        f"assert len(list_jobs({str(tmp_path)!r})) == 1\nget_job_status({job.id!r}, {str(tmp_path)!r})\n"
        "heavy = {'torch', 'ray', 'fsspec', 's3fs', 'optuna', 'onnx', 'matplotlib', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_overrides_may_be_texts_or_a_mapping() -> None:
    assert write_overrides(["a=1"]) == ["a=1"]
    changes = {
        "num_epochs": 3,
        "model.graph_layout": "coco",
        "train.optim.lr_steps": [1, 2],
        "train.cudnn": {"a": True},
    }
    assert write_overrides(changes) == [
        "train.num_epochs=3",
        'model.graph_layout="coco"',
        "train.optim.lr_steps=[1, 2]",
        'train.cudnn={"a": true}',
    ]
    with pytest.raises(UserError, match="a list of key=value"):
        write_overrides("num_epochs=3")


@pytest.mark.parametrize(
    ("options", "action", "origin"),
    [
        ({}, "automl", "default"),
        ({"automl_policy": "off"}, "train", "explicit"),
        ({"automl_policy": "on"}, "automl", "explicit"),
        ({"words": "Train it, but disable AutoML."}, "train", "request"),
        ({"words": "Train it, but disable AutoML.", "automl_policy": "auto"}, "automl", "explicit"),
    ],
)
def test_a_train_request_follows_the_policy(tmp_path: Path, data: Path, options: Any, action: str, origin: str) -> None:
    planned = plan(tmp_path, data_source=data, overrides={"train.seed": 7}, **options)
    job = planned.job
    assert (job.action, job.effective_action) == ("train", action)
    assert job.results_dir == str(tmp_path / job.id / action)
    assert job.policy is not None
    assert (job.policy.origin, job.policy.uses_automl) == (origin, action == "automl")
    assert job.policy.reason and job.policy.route_reason
    assert planned.values["train.seed"] == 7


def test_a_bundle_is_looked_at(tmp_path: Path, data: Path) -> None:
    bundle = tmp_path / "bundle" / "references"
    bundle.mkdir(parents=True)
    (bundle / "skill_info.yaml").write_text("name: x\nautoml_enabled: true\n")
    job = plan(tmp_path, data_source=data, bundle=bundle.parent).job
    assert job.effective_action == "train"
    assert job.policy is not None
    assert "AutoML is enabled but not runnable until schemas are generated" in job.policy.route_reason
    (bundle / "skill_info.yaml").write_text("name: x\nautoml_enabled: false\n")
    job = plan(tmp_path, data_source=data, bundle=bundle.parent).job
    assert job.policy is not None
    assert (job.effective_action, "not enabled" in job.policy.route_reason) == ("train", True)


def test_other_actions_never_search(tmp_path: Path, data: Path) -> None:
    touch(tmp_path, "model.pth")
    given = {"evaluate": "evaluate.checkpoint", "inference": "inference.checkpoint", "export": "export.checkpoint"}
    for action, key in given.items():
        planned = plan(tmp_path, action, data_source=data, overrides={key: tmp_path / "model.pth"}, automl_policy="on")
        assert (planned.job.effective_action, planned.job.policy) == (action, None)
        assert planned.values[key] == str(tmp_path / "model.pth")


def test_missing_sources_are_named_before_anything_is_written(tmp_path: Path) -> None:
    root = tmp_path / "jobs"
    (tmp_path / "recording").mkdir()
    expected = {
        "train": [f"dataset.{part}_dataset.{kind}_path" for part in ("train", "val") for kind in ("data", "label")],
        "evaluate": ["evaluate.test_dataset.data_path", "evaluate.test_dataset.label_path", "evaluate.checkpoint"],
        "inference": ["inference.test_dataset.data_path", "inference.checkpoint"],
        "export": ["export.checkpoint"],
        "dataset_convert": ["dataset_convert.data"],
    }
    for action, keys in expected.items():
        for source in (None, tmp_path / "recording"):
            with pytest.raises(SpecError) as caught:
                create_job(action, root=root, data_source=source)
            assert sorted(problem.where for problem in caught.value.problems) == sorted(keys), (action, source)
    with pytest.raises(SpecError) as caught:
        create_job("train", ["train.num_epoch=3"], root=root)
    assert len(caught.value.problems) == 5
    assert not root.exists()


def test_files_of_a_folder(tmp_path: Path, data: Path) -> None:
    values = plan(tmp_path, data_source=data).values
    for part in ("train", "val"):
        assert values[f"dataset.{part}_dataset.data_path"] == str(data / f"{part}_data.npy")
        assert values[f"dataset.{part}_dataset.label_path"] == str(data / f"{part}_label.json")
    (data / "val_label.pkl").write_bytes(pickle.dumps(([], [])))
    touch(data, "val_label.csv", "model.pth")
    checkpoint = {"evaluate.checkpoint": data / "model.pth"}
    values = plan(tmp_path, "evaluate", data_source=data, overrides=checkpoint).values
    assert values["evaluate.test_dataset.data_path"] == str(data / "val_data.npy")
    assert values["evaluate.test_dataset.label_path"] == str(data / "val_label.pkl")
    checkpoint = {"inference.checkpoint": data / "model.pth"}
    values = plan(tmp_path, "inference", data_source=data, overrides=checkpoint).values
    assert values["inference.test_dataset.data_path"] == str(data / "test_data.npy")
    assert values["inference.test_dataset.label_path"] == str(data / "test_label.json")
    (data / "test_label.json").unlink()
    values = plan(tmp_path, "inference", data_source=data, overrides=checkpoint).values
    assert "inference.test_dataset.label_path" not in values
    touch(tmp_path / "recordings", "walk.json")
    for source in (tmp_path / "recordings", tmp_path / "recordings" / "walk.json"):
        values = plan(tmp_path, "dataset_convert", data_source=source).values
        assert values["dataset_convert.data"] == str(tmp_path / "recordings" / "walk.json")


def test_what_stands_above_what(tmp_path: Path, data: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    write_small_data(other)
    label = "dataset.train_dataset.label_path"
    planned = plan(
        tmp_path, data_source=data, spec={"dataset": {"train_dataset": {"label_path": str(other / "train_label.json")}}}
    )
    assert planned.values[label] == str(other / "train_label.json")
    assert any(label in notice for notice in planned.job.notices)
    source = {label: data / "train_label.json"}
    planned = plan(tmp_path, data_source=source, spec=make_spec(other))
    assert planned.values[label] == str(data / "train_label.json")
    assert planned.values["dataset.val_dataset.label_path"] == str(other / "val_label.json")
    planned = plan(tmp_path, data_source=source, spec=make_spec(other), overrides={label: other / "train_label.json"})
    assert planned.values[label] == str(other / "train_label.json")
    with pytest.raises(SpecError, match="Did you mean 'dataset\\.train_dataset\\.label_path'"):
        plan(tmp_path, data_source={"dataset.train_dataset.labels_path": "x"}, spec=make_spec(other))
    with pytest.raises(SpecError, match="which is not there"):
        plan(tmp_path, data_source=tmp_path / "nowhere", spec=make_spec(other))


def test_a_job_has_its_own_folder_unless_an_override_names_one(tmp_path: Path, data: Path) -> None:
    spec = make_spec(data)
    spec["train"]["results_dir"] = str(tmp_path / "from-file")
    for policy, action in (("off", "train"), ("on", "automl")):
        planned = plan(tmp_path, spec=spec, automl_policy=policy)
        assert planned.job.results_dir == str(tmp_path / planned.job.id / action)
        assert planned.values["results_dir"] == str(tmp_path / planned.job.id)
        assert "train.results_dir" not in planned.values
        planned = plan(tmp_path, spec=spec, automl_policy=policy, overrides={"results_dir": tmp_path / "mine"})
        assert planned.job.results_dir == str(tmp_path / "mine" / action)
        planned = plan(tmp_path, spec=spec, automl_policy=policy, overrides={"train.results_dir": tmp_path / "exactly"})
        assert planned.job.results_dir == str(tmp_path / "exactly")
        assert planned.values[f"{action}.results_dir"] == str(tmp_path / "exactly")


def test_paths_become_absolute(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(data)
    touch(data, "model.pth")
    job = plan(Path("jobs"), data_source=".", overrides=["pretrained_model=model.pth"])
    assert job.values["dataset.val_dataset.data_path"] == str(data / "val_data.npy")
    assert job.values["model.pretrained_model_path"] == str(data / "model.pth")
    assert job.job.data_source == str(data)


def test_a_key_is_kept_nowhere(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    runner = replace(client.RUNNERS["local"], launch=lambda root, job, key: calls.append(key))
    monkeypatch.setitem(client.RUNNERS, "local", runner)
    key_file = tmp_path / "key.txt"
    key_file.write_text(KEY + "\n")
    common: Any = {"data_source": data, "root": tmp_path / "jobs", "automl_policy": "off"}
    by_file = create_job("train", key_file=key_file, **common)
    by_value = create_job("train", {"encryption_key": KEY, "train.seed": 3}, **common)
    in_spec = create_job("train", spec={"encryption_key": KEY}, **common)
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    by_environment = create_job("train", **common)
    assert by_file.encryption_key == f"file:{key_file}"
    assert by_environment.encryption_key == f"environment:{KEY_VARIABLE}"
    assert by_value.overrides == ["encryption_key=(set, not shown)", "train.seed=3"]
    assert calls == ["", KEY, KEY, ""]
    files = [
        path for job in (by_file, by_value, in_spec, by_environment) for path in (tmp_path / "jobs" / job.id).iterdir()
    ]
    assert len(files) == 8
    assert not [path for path in files if KEY in path.read_text()]


def test_wrong_key_files(tmp_path: Path, data: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    for path, text in (
        (tmp_path / "empty", "empty first line"),
        (tmp_path / "none", "No such file"),
        (data, "Is a dir"),
    ):
        with pytest.raises(SpecError, match=text):
            create_job("train", root=tmp_path, data_source=data, key_file=path)


def test_environment_of_a_job() -> None:
    variables = {
        "PATH": "/bin",
        "AWS_REGION": "x",
        "MY_TOKEN": "y",
        "RANK": "1",
        "SLURM_PROCID": "0",
        KEY_VARIABLE: KEY,
    }
    kept = {"PATH": "/bin", "AWS_REGION": "x"}
    assert build_environment(variables) == kept | {KEY_VARIABLE: KEY}
    assert build_environment(variables, "other") == kept | {KEY_VARIABLE: "other"}


def write_training(folder: Path, best: int | None = 1, scores: dict[int, float] | None = None) -> None:
    touch(folder, *(f"model_epoch_{epoch:03d}_step_{(epoch + 1) * 3:05d}.pth" for epoch in range(3)))
    touch(folder, "pc_model_latest.pth", "lightning_logs/version_0/model_epoch_009_step_00099.pth", ".model.pth")
    if best is not None:
        (folder / "best.json").write_text(json.dumps({"file": f"model_epoch_{best:03d}_step_{(best + 1) * 3:05d}.pth"}))
    lines = [{"epoch": epoch, "kpi": {"val_acc": score}} for epoch, score in (scores or {}).items()]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"epoch": 2, "kpi": {"val_a'
    (folder / "status.json").write_text(text)


def test_best_latest_or_an_epoch(tmp_path: Path) -> None:
    write_training(tmp_path)
    names = {choice: Path(find_model(str(tmp_path), choice).location).name for choice in ("best", "latest", 0, "1")}
    assert names == {
        "best": "model_epoch_001_step_00006.pth",
        "latest": "model_epoch_002_step_00009.pth",
        0: "model_epoch_000_step_00003.pth",
        "1": "model_epoch_001_step_00006.pth",
    }
    with pytest.raises(DataError, match="one of the epochs 0, 1, 2"):
        find_model(str(tmp_path), 9)
    for wrong in ("newest", -1, "1.5"):
        with pytest.raises(UserError, match="best, latest, or the number of an epoch"):
            find_model(str(tmp_path), wrong)


def test_best_of_a_folder_of_tao(tmp_path: Path) -> None:
    write_training(tmp_path / "train", best=None, scores={0: 0.5, 1: 0.25, 2: 0.5})
    assert find_model(str(tmp_path)).location.endswith("train/model_epoch_002_step_00009.pth")
    write_training(tmp_path / "train", best=None, scores={0: 0.75, 1: 0.25, 2: float("nan")})
    assert find_model(str(tmp_path)).location.endswith("train/model_epoch_000_step_00003.pth")
    write_training(tmp_path / "train", best=None)
    found = find_model(str(tmp_path))
    assert found.location.endswith("train/model_epoch_002_step_00009.pth")
    assert "val_acc" in found.notice


@pytest.mark.parametrize("name", ["pc_model.pth", "a/b/old.tlt", "weights.hdf5"])
def test_endings_of_model_files(tmp_path: Path, name: str) -> None:
    touch(tmp_path, name, "labels.txt", "x_latest.pth", "lightning_logs/y.pth")
    assert find_model(str(tmp_path), "latest").location == str(tmp_path / name)


def test_pointers_and_logs_are_no_models(tmp_path: Path) -> None:
    touch(tmp_path, "pc_model_latest.pth", "lightning_logs/model_epoch_001_step_00001.pth", "notes.txt")
    with pytest.raises(DataError, match="no checkpoint"):
        find_model(str(tmp_path))


def write_search(folder: Path, uri: str) -> None:
    write_training(folder / "trial_000")
    write_training(folder / "trial_002", best=0)
    touch(folder, "pc_model_best.pth")
    (folder / "best_rec.json").write_text(json.dumps({"best": {"rec_id": 2, "checkpoint_uri": uri}}))


def test_an_automl_parent_gives_its_best_trial(tmp_path: Path) -> None:
    folder = tmp_path / "automl"
    inside = str(folder / "trial_002" / "model_epoch_000_step_00003.pth")
    for uri in (inside, "/moved/trial_002/model_epoch_000_step_00003.pth", "s3://b/model_epoch_000_step_00003.pth"):
        write_search(folder, uri)
        assert find_model(str(folder)).location == inside
    assert find_model(str(folder), "latest").location.endswith("trial_002/model_epoch_002_step_00009.pth")
    assert find_model(str(folder), 1).location.endswith("trial_002/model_epoch_001_step_00006.pth")
    touch(tmp_path, "secret.pth")
    for uri in (f"{folder}/../secret.pth", str(tmp_path / "secret.pth"), "", ".."):
        write_search(folder, uri)
        assert find_model(str(folder)).location == str(folder / "pc_model_best.pth")
    (folder / "best_rec.json").write_text(json.dumps({"best": None}))
    with pytest.raises(DataError, match="no trial"):
        find_model(str(folder))


def test_every_spec_param_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = make_job(tmp_path, status="Complete")
    write_training(Path(parent.results_dir))
    model = str(Path(parent.results_dir) / "model_epoch_001_step_00006.pth")
    own = tmp_path / make_job_id()
    monkeypatch.setenv(KEY_VARIABLE, KEY)

    def ask(name: str, **values: Any) -> str:
        return resolve_spec_param(name, root=tmp_path, job_id=own.name, **values)

    expected = {
        "key": f"environment:{KEY_VARIABLE}",
        "output_dir": str(own),
        "parent_model": "",
        "parent_model_folder": "",
        "resume_model": "",
        "ptm_if_no_resume_model": "given.pth",
        "create_onnx_file": str(own / "export" / "model.onnx"),
        "create_inference_result_file_pose": str(own / "inference" / "results.txt"),
    }
    assert set(expected) == set(FUNCTIONS)
    actions = {"create_onnx_file": "export", "create_inference_result_file_pose": "inference"}
    for name, value in expected.items():
        assert ask(name, action=actions.get(name, "train"), pretrained_model="given.pth") == value
    assert ask("parent_model", parent_job_id=parent.id[:8]) == model
    assert ask("parent_model", parent_job_id=parent.id, checkpoint="latest").endswith("00009.pth")
    assert ask("parent_model_folder", parent_job_id=parent.id) == parent.results_dir
    assert ask("ptm_if_no_resume_model", parent_job_id=parent.id) == model
    write_training(own / "train")
    assert ask("resume_model") == str(own / "train" / "model_epoch_002_step_00009.pth")
    assert ask("resume_model", action="automl") == ""
    assert ask("ptm_if_no_resume_model", pretrained_model="given.pth") == ""
    with pytest.raises(UserError, match="Did you mean 'parent_model'"):
        ask("parent_modl")
    with pytest.raises(UserError, match="no job id"):
        resolve_spec_param("output_dir", root=tmp_path)
    names = {name for table in SPEC_PARAMS.values() for name in table.values()}
    assert names == set(FUNCTIONS) - {"parent_model_folder"}


def test_children_of_jobs(tmp_path: Path, data: Path) -> None:
    parent = make_job(tmp_path, status="Complete")
    write_training(Path(parent.results_dir))
    exported = make_job(tmp_path, action="export", status="Complete")
    touch(Path(exported.results_dir), "model.onnx")
    evaluated = make_job(tmp_path, action="evaluate", status="Complete")
    for action in ("evaluate", "inference", "export"):
        planned = plan(tmp_path, action, parent_job_id=parent.id[:8], data_source=data, checkpoint="latest")
        assert planned.values[f"{action}.checkpoint"].endswith("model_epoch_002_step_00009.pth")
        assert planned.job.inferred[f"{action}.checkpoint"] == planned.values[f"{action}.checkpoint"]
        assert planned.job.parent_job_id == parent.id
    for action in ("evaluate", "inference"):
        values = plan(tmp_path, action, parent_job_id=exported.id, data_source=data).values
        assert values[f"{action}.checkpoint"] == str(Path(exported.results_dir) / "model.onnx")
    for wrong, action in ((exported, "export"), (evaluated, "inference")):
        with pytest.raises(SpecError, match="Name the training"):
            plan(tmp_path, action, parent_job_id=wrong.id, data_source=data)
    own = str(Path(parent.results_dir) / "model_epoch_000_step_00003.pth")
    planned = plan(tmp_path, "export", parent_job_id=parent.id, overrides={"export.checkpoint": own})
    assert planned.values["export.checkpoint"] == own
    assert planned.values["export.onnx_file"] == str(Path(planned.job.results_dir) / "model.onnx")
    tuned = plan(tmp_path, parent_job_id=parent.id, data_source=data, automl_policy="off")
    assert tuned.values["model.pretrained_model_path"].endswith("model_epoch_001_step_00006.pth")


def test_parents_that_have_not_ended_or_failed(tmp_path: Path) -> None:
    for status in ("Pending", "Running"):
        parent = make_job(tmp_path, status=status)
        with pytest.raises(SpecError, match=f"which is {status}"):
            plan(tmp_path, "export", parent_job_id=parent.id)
    parent = make_job(tmp_path, status="Canceled")
    with pytest.raises(SpecError, match="no checkpoint"):
        plan(tmp_path, "export", parent_job_id=parent.id)
    write_training(Path(parent.results_dir))
    assert "ended as Canceled" in plan(tmp_path, "export", parent_job_id=parent.id).job.notices[0]
    for unknown in ("nobody", "..", "a/b"):
        with pytest.raises(SpecError, match="which is not there"):
            plan(tmp_path, "export", parent_job_id=unknown)


def test_classes_of_a_foreign_parent_come_from_its_spec(tmp_path: Path) -> None:
    import torch

    folder = tmp_path / "tao-job" / "train"
    folder.mkdir(parents=True)
    torch.save({"state_dict": {"x": torch.zeros(1)}}, folder / "model_epoch_000_step_00001.pth")
    told = {"dataset": {"num_classes": 2, "label_map": {"a": 0, "b": 1}}, "model": {"graph_layout": "coco"}}
    (folder / "experiment.yaml").write_text(yaml.safe_dump(told | {"train": {"num_epochs": 3}}))
    values = plan(tmp_path, "export", parent_job_id="tao-job").values
    assert values["dataset.num_classes"] == 2
    assert values["dataset.label_map"] == {"a": 0, "b": 1}
    assert values["model.graph_layout"] == "coco"
    assert "train.num_epochs" not in values
    own = {"format_version": 1, "kinegraph": {}}
    torch.save({"state_dict": {"x": torch.zeros(1)}, "kinegraph": own}, folder / "model_epoch_000_step_00001.pth")
    assert "dataset.num_classes" not in plan(tmp_path, "export", parent_job_id="tao-job").values


def test_processes() -> None:
    me = describe_process(os.getpid())
    assert is_alive(me)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        info = describe_process(child.pid)
        assert is_alive(info)
        child.kill()
        while is_alive(info):  # a zombie from here on: nobody has asked for its exit code
            time.sleep(0.01)
    assert not is_alive(info)
    others = [replace(me, start="1"), replace(me, boot="before"), replace(me, host="elsewhere"), replace(me, pid=2**22)]
    assert [is_alive(other) for other in others] == [False] * 4


def write_status(job: Job, *lines: dict[str, Any]) -> None:
    path = Path(job.results_dir) / "status.json"
    path.write_text("".join(json.dumps({"timestamp": get_time()} | line) + "\n" for line in lines))


GONE = replace(describe_process(os.getpid()), start="1")


def test_a_dead_job_is_noticed(tmp_path: Path) -> None:
    for status in ("Pending", "Running"):
        job = make_job(tmp_path, status=status, owner=GONE)
        found = get_job_status(job.id, tmp_path)
        assert (found.status, "is gone" in found.message, found.ended_at is not None) == ("Error", True, True)
        assert read_job(str(tmp_path), job.id) == found
        assert get_job_status(job.id, tmp_path) == found


def test_a_machine_that_was_restarted(tmp_path: Path) -> None:
    job = make_job(tmp_path, status="Running", owner=replace(describe_process(os.getpid()), boot="before"))
    assert get_job_status(job.id, tmp_path).status == "Error"


def test_what_the_dead_left_in_status_json(tmp_path: Path) -> None:
    job = make_job(tmp_path, status="Running", owner=GONE)
    write_status(job, {"status": "STARTED"}, {"status": "SUCCESS", "message": "done"})
    (tmp_path / job.id / "answer.json").write_text(json.dumps({"metrics": {"val_acc": 1.0}, "files": {"best": "x"}}))
    found = get_job_status(job.id, tmp_path)
    assert (found.status, found.metrics, found.files) == ("Complete", {"val_acc": 1.0}, {"best": "x"})
    job = make_job(tmp_path, status="Running", owner=GONE)
    write_status(job, {"status": "STARTED"}, {"status": "FAILURE", "message": "train failed: no memory"})
    found = get_job_status(job.id, tmp_path)
    assert (found.status, "no memory" in found.message) == ("Error", True)
    job = make_job(tmp_path, status="Running", owner=GONE)
    write_status(job, {"status": "SUCCESS", "timestamp": "2020-01-01T00:00:00+00:00"})
    assert get_job_status(job.id, tmp_path).status == "Error"
    job = make_job(tmp_path, status="Running", owner=GONE)
    (tmp_path / job.id / "cancel.json").write_text("{}")
    assert get_job_status(job.id, tmp_path).status == "Canceled"


def test_an_action_that_outlives_its_supervisor_still_runs(tmp_path: Path) -> None:
    job = make_job(tmp_path, status="Running", owner=GONE, process=describe_process(os.getpid()))
    assert get_job_status(job.id, tmp_path).status == "Running"


def test_a_job_of_another_machine_is_judged_by_its_silence_only(tmp_path: Path) -> None:
    long_ago = (datetime.now(UTC) - timedelta(seconds=STALE_S + 60)).isoformat()
    elsewhere = replace(GONE, host="elsewhere")
    job = make_job(tmp_path, status="Running", owner=elsewhere, host="elsewhere")
    assert get_job_status(job.id, tmp_path).status == "Running"
    job = make_job(tmp_path, status="Running", owner=elsewhere, host="elsewhere", created_at=long_ago)
    found = get_job_status(job.id, tmp_path)
    assert (found.status, "no sign of life" in found.message, "elsewhere" in found.message) == ("Error", True, True)
    assert read_job(str(tmp_path), job.id).status == "Running", "it may come back"
    heartbeat = tmp_path / job.id / "heartbeat.json"
    heartbeat.write_text(json.dumps({"time": get_time()}))
    assert get_job_status(job.id, tmp_path).status == "Running"
    heartbeat.write_text("[1")
    assert get_job_status(job.id, tmp_path).status == "Error"
    write_status(job, {"status": "RUNNING"})
    assert get_job_status(job.id, tmp_path).status == "Running"


def supervise(root: Path, monkeypatch: pytest.MonkeyPatch, program: str, cancel: bool = False) -> tuple[int, Job]:
    """Run a Python program in the place of an action."""
    job = make_job(root)
    monkeypatch.setattr("kinegraph.jobs.supervisor.build_command", lambda job, spec: [sys.executable, "-c", program])
    monkeypatch.setattr("kinegraph.jobs.supervisor.CANCEL_CHECK_S", 0.05)
    supervisor = Supervisor(str(root), job, grace_s=0.5)
    if cancel:
        monkeypatch.setattr(Supervisor, "_look_for_cancel", lambda self: _cancel_once_ready(self, root / job.id))
    return supervisor.run(), read_job(str(root), job.id)


def _cancel_once_ready(supervisor: Supervisor, folder: Path) -> None:
    if "ready" in (folder / "log.txt").read_text():
        (folder / "cancel.json").write_text("{}")
        supervisor.is_stopped = True


def test_answer_of_an_action(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = {"status": "ok", "metrics": {"val_acc": 0.5}, "files": {"best": "b.pth"}}
    program = f"import sys; print('noise'); print({json.dumps(answer, indent=2)!r}); print('said', file=sys.stderr)"
    code, job = supervise(tmp_path, monkeypatch, program)
    assert (code, job.status, job.exit_code) == (0, "Complete", 0)
    assert (job.metrics, job.files) == (answer["metrics"], answer["files"])
    assert get_job_logs(job.id, tmp_path) == "said\n"
    assert {path.name for path in (tmp_path / job.id).iterdir()} == {"job.json", "log.txt", "train"}


@pytest.mark.parametrize(
    ("program", "code", "text"),
    [
        ("import sys; sys.exit(1)", 1, "exit code 1 and no answer"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -9, "SIGKILL. Was the memory used up?"),
        (
            "import json, sys\n"
            "problem = {'where': 'a.npy', 'got': '1', 'expected': '2', 'hint': 'Do.'}\n"
            "print(json.dumps({'status': 'error', 'problems': [problem, problem]})); sys.exit(2)",
            2,
            "a.npy: got 1, expected 2. Do.\na.npy: got 1, expected 2. Do.",
        ),
    ],
)
def test_failures_of_an_action(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, code: int, text: str
) -> None:
    _, job = supervise(tmp_path, monkeypatch, program)
    assert (job.status, job.exit_code) == ("Error", code)
    assert text in job.message
    assert text.splitlines()[0] in get_job_logs(job.id, tmp_path)


def test_an_action_that_does_not_listen_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deaf = "import signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    deaf += "print('ready', file=sys.stderr, flush=True); time.sleep(60)"
    _, job = supervise(tmp_path, monkeypatch, deaf, cancel=True)
    assert (job.status, job.exit_code) == ("Canceled", -signal.SIGKILL)
    assert job.process is not None and not is_alive(job.process)


def test_processes_left_by_an_action_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        "import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    )
    program += "print(child.pid, file=sys.stderr)"
    _, job = supervise(tmp_path, monkeypatch, program)
    child = int(get_job_logs(job.id, tmp_path))
    until_s = time.monotonic() + 20
    while is_alive(describe_process(child)) and describe_process(child).start and time.monotonic() < until_s:
        time.sleep(0.01)
    assert not is_alive(describe_process(child))


def test_canceled_before_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(tmp_path)
    (tmp_path / job.id / "cancel.json").write_text("{}")
    assert Supervisor(str(tmp_path), job).run() == 1
    assert read_job(str(tmp_path), job.id).status == "Canceled"


def test_a_storage_that_is_away_for_a_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kinegraph.jobs import supervisor

    failures = iter([True, False, True, False])

    def write(root: str, job: Job) -> None:
        if next(failures):
            raise StorageError
        write_job(root, job)

    monkeypatch.setattr(supervisor, "write_job", write)
    monkeypatch.setattr(supervisor, "WRITE_DELAYS_S", (0.0, 0.0))
    _, job = supervise(tmp_path, monkeypatch, "pass")
    assert job.status == "Complete"
    assert not list(failures)


@pytest.mark.parametrize("text", ["", "noise", "[1]", "{", "noise {}", '{"a": NaN', "{" * 10_000])
def test_answers_that_are_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "answer.json").write_text(text)
    assert read_answer(tmp_path / "answer.json") == {}
    assert read_answer(tmp_path / "none.json") == {}


def test_progress_of_a_running_job(tmp_path: Path) -> None:
    job = make_job(tmp_path, status="Running", owner=describe_process(os.getpid()))
    assert get_job_status(job.id, tmp_path).progress == {}
    write_status(
        job,
        {"status": "STARTED", "message": "Starting"},
        {"status": "RUNNING", "epoch": 3, "max_epoch": 9, "kpi": {"val_acc": 0.5}, "eta": "0:01:00.000000"},
        {"status": "RUNNING", "epoch": 4, "max_epoch": 9, "kpi": {}},
    )
    progress = get_job_status(job.id, tmp_path).progress
    assert progress.pop("timestamp")
    assert progress == {"epoch": 4, "max_epoch": 9, "eta": "0:01:00.000000", "kpi": {"val_acc": 0.5}}
    assert read_job(str(tmp_path), job.id).progress == {}


def test_a_damaged_record_does_not_hide_the_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good, bad = make_job(tmp_path), make_job(tmp_path)
    (tmp_path / bad.id / "job.json").write_text("{")
    assert [job.id for job in list_jobs(tmp_path)] == [good.id]
    assert bad.id in caplog.text


def test_last_lines_of_a_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(tmp_path, status="Complete")
    assert get_job_logs(job.id, tmp_path) == ""
    path = tmp_path / job.id / "log.txt"
    path.write_bytes(b"one\ntwo\xff\nthree\n")
    assert get_job_logs(job.id, tmp_path, tail=2) == "two�\nthree\n"
    assert get_job_logs(job.id, tmp_path, tail=0) == ""
    monkeypatch.setattr("kinegraph.jobs.logs.MAX_LOG_BYTES", 8)
    assert get_job_logs(job.id, tmp_path) == "three\n"
    with pytest.raises(UserError, match="at least 0"):
        get_job_logs(job.id, tmp_path, tail=-1)


def test_a_launch_that_fails_leaves_no_job_waiting(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(root: str, job: Job, key: str) -> None:
        assert read_job(root, job.id).status == "Pending", "the record is there before the launch"
        assert (Path(root) / job.id / "spec.yaml").is_file()
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(client.RUNNERS, "local", replace(client.RUNNERS["local"], launch=launch))
    with pytest.raises(OSError, match="No space"):
        create_job("train", data_source=data, root=tmp_path / "jobs")
    (job,) = list_jobs(tmp_path / "jobs")
    assert (job.status, "No space" in job.message) == ("Error", True)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"action": "trian"}, "Did you mean 'train'"),
        ({"runner": "slurm"}, "one of local, ray"),
        ({"runner": "ray"}, "no address"),
        ({"runner": "ray", "address": "http://user:secret@host:8265"}, "a user or password"),
        ({"root": "s3://user:secret@bucket/jobs"}, "s3://"),
    ],
)
def test_mistakes_of_the_caller(tmp_path: Path, data: Path, options: dict[str, Any], text: str) -> None:
    known: Any = {"action": "train", "root": tmp_path / "jobs", "data_source": data} | options
    with pytest.raises(UserError, match=text) as caught:
        create_job(**known)
    assert "secret" not in str(caught.value)
    assert not (tmp_path / "jobs").exists()


def test_ids_of_spec_params_lead_to_jobs_only(tmp_path: Path) -> None:
    root = tmp_path / "jobs"
    job = make_job(root, results_dir=str(tmp_path / "elsewhere"))
    write_training(tmp_path / "elsewhere")
    write_training(tmp_path / "outside" / "train")
    newest = str(tmp_path / "elsewhere" / "model_epoch_002_step_00009.pth")
    for name in (job.id, job.id[:8], job.id.upper()):
        assert resolve_spec_param("output_dir", root=root, job_id=name) == str(root / job.id)
        assert resolve_spec_param("resume_model", root=root, job_id=name) == newest
    unknown = ("../outside", "../../../etc", str(tmp_path / "outside"), "..", "", "bbbbbbbb", "notes")
    for name in unknown:
        for param in ("output_dir", "resume_model", "parent_model"):
            with pytest.raises(UserError, match="which is not there"):
                resolve_spec_param(param, root=root, job_id=name)
        with pytest.raises(UserError, match="which is not there"):
            resolve_spec_param("parent_model", root=root, parent_job_id=name)


def test_numbers_of_epochs_without_bound(tmp_path: Path) -> None:
    write_training(tmp_path)
    for number in ("9" * 5000, 10**5000, -(10**5000), "1" * 10):
        with pytest.raises(UserError, match="best, latest, or the number of an epoch") as caught:
            find_model(str(tmp_path), number)
        assert len(str(caught.value)) < 300
    with pytest.raises(DataError, match="epoch 999999999"):
        find_model(str(tmp_path), "999999999")


def test_scores_that_are_no_numbers_choose_no_checkpoint(tmp_path: Path) -> None:
    write_training(tmp_path, best=None, scores={0: 0.25, 1: 0.5, 2: 10**400})
    assert find_model(str(tmp_path)).location.endswith("model_epoch_001_step_00006.pth")


@pytest.mark.parametrize("value", ["x", None, [1], {"a": 1}, True, -1, 1.5, pytest.param(10**400, id="huge")])
def test_progress_that_is_none(tmp_path: Path, value: Any) -> None:
    job = make_job(tmp_path, status="Running", owner=describe_process(os.getpid()))
    write_status(job, {"status": "RUNNING", "epoch": 1, "max_epoch": 9, "eta": "0:01:00"})
    damaged = dict.fromkeys(("epoch", "max_epoch", "step"), value) | {"eta": [1], "kpi": [1]}
    with open(Path(job.results_dir) / "status.json", "a") as file:
        file.write(json.dumps({"timestamp": get_time(), "status": "RUNNING"} | damaged) + "\n")
    progress = get_job_status(job.id, tmp_path).progress
    assert (progress["epoch"], progress["max_epoch"], progress["eta"]) == (1, 9, "0:01:00")
    assert not {"step", "kpi"} & set(progress)


def nest_deeply(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"a": value}
    return value


def test_json_nested_too_deep(tmp_path: Path) -> None:
    job = make_job(tmp_path, status="Running", owner=describe_process(os.getpid()))
    write_status(job, {"status": "RUNNING", "epoch": 1}, {"status": "RUNNING", "epoch": 2, "kpi": nest_deeply(900)})
    assert get_job_status(job.id, tmp_path).progress["epoch"] == 1
    (tmp_path / "answer.json").write_text(json.dumps({"metrics": nest_deeply(900)}))
    assert read_answer(tmp_path / "answer.json") == {}
    path = tmp_path / job.id / "job.json"
    record = json.loads(path.read_text())
    for depth, is_read in ((31, True), (32, False), (900, False)):
        path.write_text(json.dumps(record | {"metrics": nest_deeply(depth)}))
        assert len(list_jobs(tmp_path)) == is_read
    with pytest.raises(StorageError, match="nested deeper than 32 levels"):
        get_job_status(job.id, tmp_path)


@pytest.mark.parametrize(
    ("version", "text"),
    [(2, "schema_version 2.*A newer Kinegraph"), (0, "schema_version 0"), ("1", "'1'"), (None, "no schema_version")],
)
def test_records_of_other_versions(tmp_path: Path, version: Any, text: str) -> None:
    job = make_job(tmp_path)
    path = tmp_path / job.id / "job.json"
    record = json.loads(path.read_text())
    assert record["schema_version"] == 1
    path.write_text(json.dumps(record | {"schema_version": version, "a_field_of_later": 1}))
    with pytest.raises(StorageError, match=text):
        get_job_status(job.id, tmp_path)


def test_progress_in_a_record_is_not_believed(tmp_path: Path) -> None:
    job = make_job(tmp_path, status="Error", progress={"epoch": "x", "max_epoch": None})
    assert get_job_status(job.id, tmp_path).progress == {}


def test_halves_of_surrogate_pairs_in_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(tmp_path, status="Running", owner=GONE, notices=["a\ud800"])
    found = get_job_status(job.id, tmp_path)
    assert (found.status, found.notices) == ("Error", ["a\ud800"])
    assert read_job(str(tmp_path), job.id) == found
    problem = {"where": "b\udcff", "got": "1", "expected": "2", "hint": ""}
    program = f"import json; print(json.dumps({{'problems': [{problem!r}]}})); raise SystemExit(1)"
    _, job = supervise(tmp_path, monkeypatch, program)
    assert (job.status, job.message) == ("Error", "b\udcff: got 1, expected 2.")
    assert "b\\udcff: got 1" in get_job_logs(job.id, tmp_path)


def test_empty_paths_are_not_the_current_folder(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(data)
    key = "dataset.train_dataset.data_path"
    empty: list[tuple[str, dict[str, Any]]] = [
        ("data_source", {"data_source": ""}),
        (key, {"data_source": {key: ""}}),
        ("key_file", {"data_source": data, "key_file": ""}),
        ("bundle", {"data_source": data, "bundle": ""}),
    ]
    for where, options in empty:
        with pytest.raises(UserError) as caught:
            plan(tmp_path, **options)
        assert (where, "an empty text") in [(problem.where, problem.got) for problem in caught.value.problems]
    with pytest.raises(UserError, match="which is not there"):
        plan(tmp_path, data_source=data, parent_job_id="")
    with pytest.raises(UserError, match="root: got an empty text"):
        list_jobs("")
