"""`kinegraph jobs ...`: answers, exit codes and JSON fields. What the SDK does is tested in test_jobs.py."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from kinegraph import cli
from kinegraph.jobs import Job, client
from kinegraph.jobs.processes import describe_process
from kinegraph.jobs.record import advance, get_time, read_job, write_job
from kinegraph.run import LOGGER
from small_runs import write_small_data

KEY = "correct-horse-battery"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KINEGRAPH_JOBS_ROOT", str(tmp_path / "jobs"))
    monkeypatch.delenv("KINEGRAPH_ENCRYPTION_KEY", raising=False)
    return tmp_path / "jobs"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    write_small_data(folder)
    return folder


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Exit code, stdout and stderr of a command; with --json stdout is parsed."""
    monkeypatch.setattr(sys, "argv", ["kinegraph"])

    def call(*arguments: object) -> tuple[int, Any, str]:
        code = cli.main(["jobs", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, json.loads(captured.out) if "--json" in arguments else captured.out, captured.err

    yield call
    for handler in list(LOGGER.handlers):
        LOGGER.removeHandler(handler)
    LOGGER.propagate = True


@pytest.fixture
def launch_as(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make launching a job nothing but the record of how it ended."""

    def choose(*states: str, **values: Any) -> None:
        def launch(root: str, job: Job, key: str) -> None:
            for state in states:
                job = advance(job, state, **values)  # type: ignore[arg-type]
            write_job(root, job)

        monkeypatch.setitem(client.RUNNERS, "local", replace(client.RUNNERS["local"], launch=launch))

    return choose


def test_submit(ask: Callable[..., Any], root: Path, data: Path, launch_as: Callable[..., None]) -> None:
    launch_as("Running", "Complete", metrics={"val_acc": 0.5}, files={"best": "b.pth"})
    code, out, _ = ask("submit", "train", "--data-source", data, "num_epochs=3", "--request", "no AutoML please")
    (folder,) = root.iterdir()
    assert code == 0
    assert f"Job {folder.name}: train on the local runner." in out
    assert "AutoML: no." in out
    assert str(folder / "train") in out
    assert "val_acc" not in out
    assert read_job(str(root), folder.name).overrides == ["num_epochs=3"]
    code, out, _ = ask("submit", "train", "--data-source", data, "--wait")
    assert code == 0
    assert "AutoML: yes." in out
    assert "automl is Complete." in out
    assert "val_acc: 0.5" in out
    assert "best: b.pth" in out


def test_submit_as_json(ask: Callable[..., Any], root: Path, data: Path, launch_as: Callable[..., None]) -> None:
    launch_as()
    pairs = [("train", "data", ".npy"), ("train", "label", ".json"), ("val", "data", ".npy"), ("val", "label", ".json")]
    sources = [f"dataset.{part}_dataset.{kind}_path={data}/{part}_{kind}{ending}" for part, kind, ending in pairs]
    arguments = [text for source in sources for text in ("--data-source", source)]
    code, answer, err = ask("submit", "train", *arguments, "-k", KEY, "--automl-policy", "off", "--json")
    assert (code, answer["status"]) == (0, "ok")
    assert set(answer["job"]) == {field.name for field in fields(Job)}
    assert answer["job"]["status"] == "Pending"
    assert answer["job"]["policy"]["uses_automl"] is False
    assert answer["job"]["data_source"] == dict(source.split("=") for source in sources)
    assert KEY not in json.dumps(answer) + err
    assert KEY not in "".join(path.read_text() for path in (root / answer["job"]["id"]).iterdir())


@pytest.mark.parametrize(
    ("states", "code"), [(("Running", "Complete"), 0), (("Error",), 1), (("Running", "Canceled"), 1), (("Running",), 3)]
)
def test_waiting_tells_how_it_ended(
    ask: Callable[..., Any],
    root: Path,
    data: Path,
    launch_as: Callable[..., None],
    states: tuple[str, ...],
    code: int,
) -> None:
    launch_as(*states)
    submitted = ask("submit", "train", "--data-source", data, "--wait", "--timeout", "0.01", "--json")
    assert (submitted[0], submitted[1]["job"]["status"]) == (code, states[-1])
    job_id = submitted[1]["job"]["id"]
    assert ask("status", job_id, "--wait", "--timeout", 0)[0] == code
    assert ask("status", job_id[:8])[0] == 0


def test_status_list_logs_and_cancel(
    ask: Callable[..., Any], root: Path, data: Path, launch_as: Callable[..., None]
) -> None:
    assert ask("list") == (0, "", "No jobs here. `kinegraph jobs submit ACTION` starts one.\n")
    assert ask("list", "--json")[1] == {"status": "ok", "jobs": []}
    launch_as("Running", "Error", message="no memory", ended_at=get_time())
    job_id = ask("submit", "train", "--data-source", data, "--json")[1]["job"]["id"]
    assert ask("status", job_id)[1] == f"Job {job_id}: automl is Error. no memory\n"
    assert ask("status", job_id, "--json")[1]["job"]["message"] == "no memory"
    _, listing, _ = ask("list")
    assert listing.split()[0] == job_id[:8]
    assert "Error" in listing
    assert [job["id"] for job in ask("list", "--json")[1]["jobs"]] == [job_id]
    (root / job_id / "log.txt").write_text("one\ntwo")
    assert ask("logs", job_id)[1] == "one\ntwo\n"
    assert ask("logs", job_id, "-n", 1)[1] == "two\n"
    assert ask("logs", job_id, "--json")[1] == {"status": "ok", "job_id": job_id, "text": "one\ntwo"}
    assert ask("cancel", job_id)[:2] == (0, f"Job {job_id}: automl is Error. no memory\n")
    assert ask("cancel", job_id, "--json")[1]["job"]["status"] == "Error"


def test_resolve(ask: Callable[..., Any], root: Path) -> None:
    (root / "tao").mkdir(parents=True)
    (root / "tao" / "model_epoch_001_step_00002.pth").write_bytes(b"")
    expected = str(root / "tao" / "model_epoch_001_step_00002.pth")
    assert ask("resolve", "parent_model", "--parent", "tao", "--checkpoint", "latest")[1] == expected + "\n"
    answer = ask("resolve", "parent_model", "--parent", "tao", "--checkpoint", "1", "--json")[1]
    assert answer == {"status": "ok", "name": "parent_model", "value": expected}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["submit", "trian"], "Did you mean 'train'?"),
        (["submit", "train"], "dataset.train_dataset.data_path"),
        (["submit", "export", "--parent", "nobody"], "which is not there"),
        (["status", "nobody"], "`kinegraph jobs list` shows them"),
        (["logs", "nobody"], "which is not there"),
        (["cancel", "nobody"], "which is not there"),
        (["resolve", "parent_modl"], "Did you mean 'parent_model'?"),
        (["resolve", "output_dir", "--job", "../../../etc"], "which is not there"),
        (["resolve", "parent_model", "--checkpoint", "9" * 5000], "best, latest, or the number"),
        (["submit", "train", "--data-source", ""], "data_source: got an empty text"),
        (["submit", "train", "--data-source", "dataset.train_dataset.data_path="], "got an empty text"),
        (["submit", "train", "--timeout", "5"], "--timeout: got a time without --wait"),
        (["submit", "train", "--wait", "--timeout", "nan"], "--timeout: got nan"),
        (["status", "nobody", "--timeout", "5"], "--timeout: got a time without --wait"),
    ],
)
def test_mistakes(ask: Callable[..., Any], root: Path, arguments: list[str], text: str) -> None:
    code, out, err = ask(*arguments)
    assert (code, out) == (2, "")
    assert text in err
    assert not root.exists()
    code, answer, _ = ask(*arguments, "--json")
    assert (code, answer["status"]) == (2, "error")


def test_help(ask: Callable[..., Any]) -> None:
    code, out, _ = ask("--help")
    assert code == 0
    for command in ("submit", "status", "logs", "cancel", "list", "resolve"):
        assert f"  {command} " in out
        assert ask(command, "--help")[0] == 0


@pytest.fixture
def record(root: Path) -> Callable[..., Job]:
    """Write the record of a job; its results folder is there."""

    def write(**values: Any) -> Job:
        known = {"action": "train", "effective_action": "train", "runner": "local", "created_at": get_time()}
        job_id = f"aaaaaaaa-0000-4000-8000-{len(list(root.glob('*'))):012d}"
        job = Job(**{"id": job_id, "results_dir": str(root / job_id / "train"), **known, **values})
        Path(job.results_dir).mkdir(parents=True)
        write_job(str(root), job)
        return job

    return write


@pytest.mark.parametrize("value", ["x", None, [1], pytest.param(10**400, id="huge")])
def test_a_status_of_damaged_progress(ask: Callable[..., Any], record: Callable[..., Job], value: Any) -> None:
    running = record(status="Running", owner=describe_process(os.getpid()))
    line = {"timestamp": get_time(), "status": "RUNNING", "epoch": value, "max_epoch": value, "kpi": {"val_acc": value}}
    (Path(running.results_dir) / "status.json").write_text(json.dumps(line) + "\n")
    ended = record(status="Error", progress={"epoch": value, "max_epoch": value}, metrics={"val_acc": value})
    for job in (running, ended):
        code, out, _ = ask("status", job.id)
        assert (code, job.id in out, "epoch" in out) == (0, True, False)
        assert ask("status", job.id, "--json")[0] == 0
    if isinstance(value, int):
        assert f"val_acc: {value}" in ask("status", ended.id)[1]


def test_progress_and_metrics(ask: Callable[..., Any], record: Callable[..., Job]) -> None:
    metrics = {"val_acc": 2 / 3, "num_clips": 12345678, "note": "x"}
    running = record(status="Running", owner=describe_process(os.getpid()), metrics=metrics)
    line = {"timestamp": get_time(), "status": "RUNNING", "epoch": 3, "max_epoch": 9, "eta": "0:01:00.000000"}
    (Path(running.results_dir) / "status.json").write_text(json.dumps(line) + "\n")
    assert ask("status", running.id)[1].splitlines()[1:] == [
        "  epoch 4 of 10 is done, 0:01:00.000000 left",
        "  val_acc: 0.666667",
        "  num_clips: 12345678",
    ]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_texts_that_are_none_do_not_hide_the_other_jobs(
    monkeypatch: pytest.MonkeyPatch, record: Callable[..., Job], encoding: str
) -> None:
    told = "a\ud800 ü \U0001f600 \x1b[31m\x9b\u202e"
    job, other = record(status="Error", message=told, metrics={"\udcff": 0.5}, exit_code=1), record(status="Error")
    answers = {}
    for arguments in (["list", "--json"], ["status", job.id, "--json"], ["status", job.id], ["list"]):
        stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stdout)
        assert cli.main(["jobs", *arguments]) == 0
        answers[" ".join(arguments)] = stdout.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    listed = json.loads(answers["list --json"])["jobs"]
    assert {item["id"]: item["message"] for item in listed} == {job.id: told, other.id: ""}
    shown = json.loads(answers[f"status {job.id} --json"])["job"]
    assert (shown["message"], shown["metrics"]) == (told, {"\udcff": 0.5})
    assert "a\\ud800" in answers[f"status {job.id}"]
    assert len(answers["list"].splitlines()) == 2


def test_records_and_logs_do_not_steer_the_terminal(
    ask: Callable[..., Any], record: Callable[..., Job], root: Path
) -> None:
    steering = "\x1b]0;title\x07\x1b[2J\r\x9b1A\u202e\x7f"
    shown = "\\x1b]0;title\\x07\\x1b[2J\\r\\x9b1A\\u202e\\x7f"
    values = {"effective_action": steering, "metrics": {steering: 1}, "files": {"best": steering}}
    job = record(status="Canceled", message=f"one\ntwo\t{steering}", **values)
    (root / job.id / "log.txt").write_text(f"one\n{steering}\n", newline="")
    path = root / job.id / "job.json"
    unread = json.loads(path.read_text()) | {steering: 1}
    answers = [ask(*call) for call in (["status", job.id], ["list"], ["logs", job.id], ["cancel", job.id])]
    assert [code for code, _, _ in answers] == [0] * 4
    assert f"one\ntwo\t{shown}\n" in answers[0][1]
    assert answers[2][1] == f"one\n{shown}\n"
    answers += [ask(*call, "--json") for call in (["status", job.id], ["list"], ["logs", job.id])]
    assert answers[4][1]["job"]["message"] == f"one\ntwo\t{steering}"
    assert answers[6][1]["text"] == f"one\n{steering}\n"
    path.write_text(json.dumps(unread))
    answers += [ask("status", job.id), ask("list")]
    assert [(code, "\\x1b[2J" in err) for code, _, err in answers[-2:]] == [(1, True), (0, True)]
    said = "".join(str(text) for code, out, err in answers for text in (out, err) if isinstance(text, str))
    assert not set(said) & set("\x1b\x07\r\x9b\u202e\x7f")
