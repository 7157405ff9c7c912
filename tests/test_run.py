"""The run folder: experiment.yaml, status.json with exactly one last line, log.txt, and no key anywhere."""

from __future__ import annotations

import builtins
import errno
import json
import logging
import os
import re
import signal
import subprocess
import sys
import textwrap
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kinegraph.run
from kinegraph import actions
from kinegraph.errors import DataError, KinegraphError, Problem, SpecError, StorageError, UserError
from kinegraph.run import Result, Run, Terminated, format_duration, format_eta, open_run
from kinegraph.spec import Spec
from kinegraph.spec_reading import read_spec

FIELDS = ["date", "time", "timestamp", "status", "verbosity", "message", "kpi"]
LAST = ("SUCCESS", "FAILURE")
KEY = "correct-horse-battery"


def read_status(folder: Path) -> list[dict[str, Any]]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    text = (folder / "status.json").read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def list_states(folder: Path) -> list[str]:
    return [line["status"] for line in read_status(folder)]


def start(folder: Path, **values: Any) -> Any:
    return open_run("train", folder, Spec(**values), {})


def test_status_lines(tmp_path: Path) -> None:
    before = datetime.now(UTC) - timedelta(seconds=1)
    with start(tmp_path) as run:
        run.write_status("RUNNING", "Epoch 1.", {"train_loss": 0.5}, epoch=0, step=3, eta="0:00:01.000000")
    lines = read_status(tmp_path)
    assert [line["status"] for line in lines] == ["STARTED", "RUNNING", "SUCCESS"]
    for line in lines:
        assert list(line)[:7] == FIELDS
        moment = datetime.fromisoformat(line["timestamp"])
        assert moment.utcoffset() == timedelta(0)
        assert before <= moment <= datetime.now(UTC) + timedelta(seconds=1)
        local = moment.astimezone()
        near = [local + timedelta(seconds=shift) for shift in (-1, 0, 1)]
        assert line["date"] in [f"{time.month}/{time.day}/{time.year}" for time in near]
        assert line["time"] in [f"{time.hour}:{time.minute}:{time.second}" for time in near]
        assert line["verbosity"] == "INFO"
    assert list(lines[1])[7:] == ["epoch", "step", "eta"]
    assert (lines[1]["kpi"], lines[1]["epoch"], lines[1]["step"]) == ({"train_loss": 0.5}, 0, 3)
    assert (lines[0]["kpi"], lines[2]["kpi"]) == ({}, {})


def test_dates_and_times_are_not_padded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
            return datetime(2026, 3, 4, 5, 6, 7, 89000, tz)

    monkeypatch.setattr(kinegraph.run, "datetime", Clock)
    with start(tmp_path):
        pass
    line = read_status(tmp_path)[0]
    assert (line["date"], line["time"], line["timestamp"]) == ("3/4/2026", "5:6:7", "2026-03-04T05:06:07.089+00:00")


def test_numbers_that_json_does_not_have(tmp_path: Path) -> None:
    with start(tmp_path) as run:
        run.write_status("RUNNING", "", {"a": float("nan"), "b": float("inf"), "c": np.float32(0.5), "d": [np.nan]})
    assert read_status(tmp_path)[1]["kpi"] == {"a": None, "b": None, "c": 0.5, "d": [None]}


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("it broke"), "train failed: RuntimeError: it broke"),
        (DataError(Problem("a.npy", "1", "2")), "train failed: a.npy: got 1, expected 2."),
        (KeyboardInterrupt(), "train failed: interrupted"),
        (Terminated(), "train failed: terminated (SIGTERM)"),
        (SystemExit(3), "train failed: SystemExit: 3"),
        (MemoryError(), "train failed: MemoryError: "),
    ],
)
def test_failure_is_the_one_last_line(tmp_path: Path, error: BaseException, message: str) -> None:
    with pytest.raises(type(error)) as caught, start(tmp_path):
        raise error
    assert caught.value is error
    lines = read_status(tmp_path)
    assert [line["status"] for line in lines] == ["STARTED", "FAILURE"]
    assert lines[-1]["message"] == message
    assert lines[-1]["verbosity"] == "ERROR"


def test_unexpected_error_leaves_its_traceback_in_the_log(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError) as caught, start(tmp_path):
        1 / 0  # noqa: B018
    assert caught.value.__notes__ == [f"The traceback is in {tmp_path / 'log.txt'}."]
    log = (tmp_path / "log.txt").read_text()
    assert "Traceback (most recent call last)" in log
    assert "1 / 0" in log


def test_error_of_the_system_becomes_a_storage_error(tmp_path: Path) -> None:
    with (
        pytest.raises(StorageError, match=r"weights\.bin: got No space left on device.*Free some space"),
        start(tmp_path),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "weights.bin")
    assert list_states(tmp_path) == ["STARTED", "FAILURE"]
    assert "No space left" in read_status(tmp_path)[-1]["message"]


def test_a_run_in_the_same_folder_repairs_a_torn_line_and_appends(tmp_path: Path) -> None:
    with start(tmp_path):
        pass
    with open(tmp_path / "status.json", "a") as file:
        file.write('{"date": "1/1/2026", "ti')
    with start(tmp_path):
        pass
    assert list_states(tmp_path) == ["STARTED", "SUCCESS", "STARTED", "SUCCESS"]


@pytest.mark.parametrize("state", LAST)
def test_an_action_cannot_add_a_second_last_line(tmp_path: Path, state: str) -> None:
    with start(tmp_path) as run:
        run.write_status(state, "by the action itself")
    assert list_states(tmp_path) == ["STARTED", state]


def test_full_disk_at_the_last_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(number: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(StorageError), start(tmp_path):
        monkeypatch.setattr(os, "fsync", refuse)
    monkeypatch.undo()
    assert list_states(tmp_path) == ["STARTED"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("name", ["log.txt", "status.json", "experiment.yaml"])
def test_files_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int) -> None:
    real_open = builtins.open

    def refuse(path: Any, *arguments: Any, **named: Any) -> Any:
        if name in str(path):
            raise OSError(number, os.strerror(number))
        return real_open(path, *arguments, **named)

    with monkeypatch.context() as context:
        context.setattr(builtins, "open", refuse)
        with pytest.raises(StorageError, match=os.strerror(number)) as caught, start(tmp_path) as run:
            run.write_experiment()
    assert name in str(caught.value)
    if name == "experiment.yaml":
        assert list_states(tmp_path) == ["STARTED", "FAILURE"]


def test_rename_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(StorageError, match=r"experiment\.yaml.*Free some space"), start(tmp_path) as run:
        monkeypatch.setattr(os, "replace", refuse)
        run.write_experiment()
    assert list_states(tmp_path) == ["STARTED", "FAILURE"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "log.txt", "status.json"]


def test_results_path_through_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a path through the file"), start(tmp_path / "file" / "results"):
        pass


def test_experiment_is_the_effective_spec_without_the_key(tmp_path: Path) -> None:
    values = read_spec(None, [f"encryption_key={KEY}", "learning_rate=1e-4", "dataset.label_map.walking=0"]).values
    with open_run("train", tmp_path, values, {}) as run:
        run.write_experiment()
    again = read_spec(tmp_path / "experiment.yaml").values
    assert again.encryption_key == ""
    values.encryption_key = ""
    assert again == values


def fail_at(place: str) -> Any:
    def act(spec: Spec, run: Run) -> Result:
        run.info("started")
        run.write_experiment()
        if place == "user":
            raise DataError(Problem("a.npy", "1", "2"))
        if place == "bug":
            raise RuntimeError("it broke")
        return Result({"accuracy": 1.0})

    return act


@pytest.mark.parametrize("from_environment", [False, True])
@pytest.mark.parametrize("place", ["", "user", "bug"])
def test_key_is_written_nowhere(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    place: str,
    from_environment: bool,
) -> None:
    (tmp_path / "model.pth").write_text("x")
    monkeypatch.setitem(actions.ACTIONS, "export", f"{__name__}:ACTION")
    monkeypatch.setattr(sys.modules[__name__], "ACTION", fail_at(place), raising=False)
    monkeypatch.delenv("KINEGRAPH_ENCRYPTION_KEY", raising=False)
    overrides = [f"results_dir={tmp_path}/results", f"export.checkpoint={tmp_path}/model.pth"]
    if from_environment:
        monkeypatch.setenv("KINEGRAPH_ENCRYPTION_KEY", KEY)
    else:
        overrides.append(f"encryption_key={KEY}")
    try:
        actions.run_action("export", None, overrides)
    except Exception as error:
        assert place
        assert KEY not in str(error)
    written = [path for path in (tmp_path / "results").rglob("*") if path.is_file()]
    assert {path.name for path in written} == {".lock", "experiment.yaml", "log.txt", "status.json"}
    for path in written:
        assert KEY not in path.read_text()
    assert KEY not in "".join(capfd.readouterr())


@pytest.mark.parametrize("text", ["encryption_key=[KEY", "encryption_key=[KEY]", "name=[KEY, ${encryption_key}"])
def test_key_is_in_no_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(SpecError) as caught:
        read_spec(None, [text.replace("KEY", KEY)])
    assert KEY not in str(caught.value)
    path = tmp_path / "spec.yaml"
    for line in (
        f"encryption_key: [{KEY}",
        f"encryption_key: {{{KEY}: 1}}",
        f"model_name: ${{encryption_key}}{KEY}x${{",
    ):
        path.write_text(line)
        with pytest.raises(SpecError) as caught:
            read_spec(path)
        assert KEY not in str(caught.value)


def test_user_errors_of_the_spec_start_no_run(tmp_path: Path) -> None:
    with pytest.raises(SpecError):
        actions.run_action("train", None, [f"results_dir={tmp_path}/results"])
    assert not list(tmp_path.iterdir())


def test_action_gets_the_spec_and_its_origins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Spec, Run]] = []

    def act(spec: Spec, run: Run) -> Result:
        seen.append((spec, run))
        return Result({"a": 1})

    (tmp_path / "model.pth").write_text("x")
    monkeypatch.setitem(actions.ACTIONS, "export", f"{__name__}:ACTION")
    monkeypatch.setattr(sys.modules[__name__], "ACTION", act, raising=False)
    source = {"dataset": {"num_classes": 6}, "export": {"checkpoint": str(tmp_path / "model.pth")}}
    result = actions.export(source, f"results_dir={tmp_path}", "export.opset_version=18")
    spec, run = seen[0]
    assert run.spec is spec
    assert run.folder == tmp_path / "export"
    assert run.is_set("dataset.num_classes")
    assert run.is_set("export.opset_version")
    assert run.is_set("dataset")
    assert not run.is_set("dataset.label_map")
    assert not run.is_set("train.num_epochs")
    assert result.metrics == {"a": 1}
    assert result.files == {"results_dir": str(tmp_path / "export")}


def test_unknown_action() -> None:
    with pytest.raises(UserError, match="Did you mean 'train'"):
        actions.run_action("trian")


def test_a_process_that_does_not_write_is_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(RuntimeError), start(tmp_path) as run:
        assert not run.writes
        run.info("x")
        run.progress(1, 2, "epochs")
        run.write_experiment()
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_messages_go_to_stderr_and_to_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinegraph.run.show_messages()
    kinegraph.run.show_messages()
    try:
        with start(tmp_path) as run:
            run.info("hello")
            run.warn("careful")
        assert capsys.readouterr().err == "hello\nwarning: careful\n"
        log = (tmp_path / "log.txt").read_text()
        assert len(re.findall(r"^[-0-9]+ [:,0-9]+ INFO hello$", log, re.MULTILINE)) == 1
        assert len(re.findall(r"WARNING careful$", log, re.MULTILINE)) == 1
    finally:
        for handler in list(kinegraph.run.LOGGER.handlers):
            kinegraph.run.LOGGER.removeHandler(handler)
        kinegraph.run.LOGGER.propagate = True


def test_the_log_is_closed_with_the_run(tmp_path: Path) -> None:
    before = list(logging.getLogger("kinegraph").handlers)
    with pytest.raises(ValueError, match="x"), start(tmp_path):
        raise ValueError("x")
    assert logging.getLogger("kinegraph").handlers == before


def test_progress_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(kinegraph.run, "PROGRESS_LINE_INTERVAL_S", 0.0)
    with start(tmp_path) as run:
        for done in (1, 2, 4):
            run.progress(done, 4, "clips")
    log = (tmp_path / "log.txt").read_text()
    assert "clips: 1 of 4" in log
    assert "clips: 2 of 4" in log


def test_the_time_left_does_not_count_what_an_earlier_run_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [1000.0]
    monkeypatch.setattr(kinegraph.run.time, "monotonic", lambda: now_s[0])
    with start(tmp_path) as run:
        for done in (801, 802, 803, 804):
            run.progress(done, 1000, "steps")
            now_s[0] += 20.0
    assert "steps: 804 of 1000, 1 h 5 min left" in (tmp_path / "log.txt").read_text()  # 196 steps of 20 s


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (200, "3 min 20 s"), (3900, "1 h 5 min"), (90061, "25 h 1 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00:00.000000"), (61.5, "0:01:01.500000"), (7384.000001, "2:03:04.000001"), (-1, "0:00:00.000000")],
)
def test_remaining_time_has_the_form_of_the_original(seconds: float, text: str) -> None:
    assert format_eta(seconds) == text


CHILD = """
    import signal, sys, time
    from pathlib import Path
    from kinegraph.run import open_run
    from kinegraph.spec import Spec
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests that run in the background inherit none
    with open_run("train", Path(sys.argv[1]), Spec(), {}):
        print("ready", flush=True)
        time.sleep(60)
"""


@pytest.mark.parametrize(("number", "message"), [(signal.SIGTERM, "terminated"), (signal.SIGINT, "interrupted")])
def test_signals(tmp_path: Path, number: signal.Signals, message: str) -> None:
    command = [sys.executable, "-c", textwrap.dedent(CHILD), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(number)
        child.communicate(timeout=60)
    assert child.returncode != 0
    lines = read_status(tmp_path)
    assert [line["status"] for line in lines] == ["STARTED", "FAILURE"]
    assert message in lines[-1]["message"]


def test_the_handler_of_signals_is_put_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated), start(tmp_path):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_errors_have_their_exit_codes() -> None:
    assert [error.exit_code for error in (KinegraphError, StorageError, UserError, SpecError, DataError)] == [
        1,
        1,
        2,
        2,
        2,
    ]
    problem = Problem("here", "1", "2", "Do this.")
    assert (
        DataError(problem, problem).as_data()
        == [{"where": "here", "got": "1", "expected": "2", "hint": "Do this."}] * 2
    )
