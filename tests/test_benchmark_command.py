"""`kinegraph benchmark`: what is measured, how it is counted, and what happens when something cannot be measured.

Never how fast anything is.
"""

from __future__ import annotations

import json
import math
import platform
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kinegraph import cli
from kinegraph.backends import BACKENDS
from kinegraph.benchmark import processes, session, subjects, worker
from kinegraph.benchmark.facts import ModelFacts, read_facts
from kinegraph.benchmark.machine import describe_machine, read_cpu_fields
from kinegraph.benchmark.plan import Lane
from kinegraph.benchmark.plot import plot_report
from kinegraph.benchmark.processes import WorkerError, WorkerProcess
from kinegraph.benchmark.report import build_report, describe_clips, summarise_latencies
from kinegraph.benchmark.session import MIN_CALLS, Session
from kinegraph.benchmark.settings import Settings, make_settings
from kinegraph.benchmark.table import (
    Progress,
    build_clip_table,
    build_missing_table,
    format_bytes,
    format_count,
    format_number,
    format_share,
)
from kinegraph.data.pipeline import InputPipeline, build_pipeline
from kinegraph.errors import UserError
from kinegraph.model_description import ModelDescription
from kinegraph.models.folded import INPUT, FoldedNetwork, TemporalConvolutionLayer
from kinegraph.onnx_graph import write_clip_form
from kinegraph.onnx_step import write_step_form
from kinegraph.run import Terminated
from kinegraph.skeleton.layouts import LAYOUTS
from kinegraph.spec_input import InputSpec

JOINTS, CHANNELS, HIDDEN, CLASSES = 5, 3, 4, 2
KEY = "correct-horse-battery"
NUMBER = {"type": "number"}
OPTIONAL = {"type": ["number", "null"]}
STATUS = {
    "status": {"enum": ["measured", "waiting", "unavailable", "failed"]},
    "reason": {"type": ["string", "null"]},
}
LATENCY = {
    "type": ["object", "null"],
    "properties": dict.fromkeys(("p50", "p90", "p99", "mean", "min", "max"), NUMBER),
    "required": ["p50", "p90", "p99", "mean", "min", "max"],
    "additionalProperties": False,
}
ROW = {
    "threads": {"type": "integer"},
    "calls": {"type": "integer"},
    "latency_ms": LATENCY,
    "load_s": OPTIONAL,
    "first_call_ms": OPTIONAL,
    "memory_bytes": {"type": ["integer", "null"]},
    **STATUS,
}


def list_of(properties: dict[str, Any]) -> dict[str, Any]:
    item = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return {"type": "array", "items": item}


SCHEMA = {
    "type": "object",
    "properties": {
        "format_version": {"const": 1},
        "created": {"type": "string"},
        "interrupted": {"type": "boolean"},
        "model": {
            "type": "object",
            "required": ["path", "file_bytes", "parameters", "clip", "multiply_adds_per_clip", "type", "layout"],
        },
        "settings": {"type": "object", "required": ["backends", "batches", "threads", "seconds", "min_calls"]},
        "machine": {"type": "object", "required": ["cpu", "usable_cores", "versions", "load_average", "extensions"]},
        "peaks": list_of(
            {"threads": {"type": "integer"}, "library": {"type": ["string", "null"]}, "gflops": OPTIONAL, **STATUS}
        ),
        "measurements": list_of(
            {
                "backend": {"type": "string"},
                "batch": {"type": "integer"},
                "clips_per_s": OPTIONAL,
                "cpu_ms_per_clip": OPTIONAL,
                "gflops": OPTIONAL,
                "share_of_peak": OPTIONAL,
                "pipeline_share": OPTIONAL,
                **ROW,
            }
        ),
        "steps": list_of(
            {"people": {"type": "integer"}, "frames_per_s": OPTIONAL, "delay_frames": OPTIONAL, **ROW}  # type: ignore[dict-item]
        ),
    },
    "required": ["created", "format_version", "interrupted", "machine", "measurements", "model", "peaks", "steps"],
}


def write_tiny_model(
    folder: Path,
    pipeline: InputPipeline | None = None,
    frames: int | None = None,
    write: Callable[..., bytes] = write_clip_form,
) -> Path:
    """An ONNX file of one 1x1 convolution and a head, with a name that no terminal should obey. frames: fixed in it."""
    generator = np.random.default_rng(0)
    pipeline = pipeline or InputPipeline(CHANNELS, JOINTS)
    channels, joints = pipeline.output_channels, pipeline.num_joints
    weight = generator.standard_normal((1, channels, HIDDEN)).astype(np.float32)
    layer = TemporalConvolutionLayer("only", (INPUT,), weight=weight, bias=np.zeros(HIDDEN, np.float32))
    head = generator.standard_normal((HIDDEN, CLASSES)).astype(np.float32)
    network = FoldedNetwork(channels, joints, (layer,), head, np.zeros(CLASSES, np.float32))
    description = ModelDescription(CLASSES, pipeline=pipeline, metadata={"model": {"model_type": "tiny\x1b[31m"}})
    proto = onnx.load_from_string(write(network, 18, description.to_metadata()))
    if frames is not None:
        proto.graph.input[0].type.tensor_type.shape.dim[2].dim_value = frames
    path = folder / "tiny.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def make_pipeline() -> InputPipeline:
    """Two streams of 16 frames sampled from each clip."""
    options = InputSpec(streams=["joint", "bone"], sampling="uniform", num_frames=16)
    return build_pipeline(options, CHANNELS, LAYOUTS["coco"])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path)


@pytest.fixture
def ask(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.setattr(sys, "argv", ["kinegraph"])
    monkeypatch.delenv("KINEGRAPH_ENCRYPTION_KEY", raising=False)

    def call(*arguments: object) -> tuple[int, str, str]:
        try:
            code = cli.main(["benchmark", *map(str, arguments)])
        except SystemExit as end:
            code = int(end.code or 0)
        return (code, *capfd.readouterr())

    return call


class FakeWorker:
    """Answers as worker.py does, each call taking the latency of its backend, and notes who was asked when."""

    asked: list[tuple[str, int, int]]
    latencies_s: dict[str, float]
    refused: dict[str, str]
    dies: dict[str, int]
    interrupt: tuple[int, type[BaseException]] | None

    def __init__(self, threads: int, key: str) -> None:
        self.threads, self.is_dead, self.num_slices = threads, False, 0

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if request["do"] == "open":
            self.name = request["backend"]
            if self.name in self.refused:
                raise WorkerError(self.refused[self.name], is_refusal=True)
            facts = {"library": "numpy", "multiply_adds": 10**6, "delay_frames": 3}
            return {"load_s": 0.5, "start_bytes": 1000, "facts": facts}
        if request["do"] == "warm":
            return {"first_s": 0.2, "peak_bytes": 3000 + request["size"]}
        self.asked.append((self.name, self.threads, request["size"]))
        if self.interrupt is not None and len(self.asked) > self.interrupt[0]:
            raise self.interrupt[1]
        self.num_slices += 1
        if self.num_slices > self.dies.get(self.name, math.inf):
            self.is_dead = True
            raise WorkerError("the process was ended by SIGKILL", is_refusal=False)
        latency_s = self.latencies_s.get(self.name, 0.01)
        count = max(1, math.ceil(request["slice_s"] / latency_s - 1e-9))
        return {"latencies_s": [latency_s] * count, "pipeline_s": 0.25 * count * latency_s, "cpu_s": count * latency_s}

    def close(self) -> None:
        self.is_dead = True


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeWorker]:
    class Fake(FakeWorker):
        asked, latencies_s, refused, dies, interrupt = [], {}, {}, {}, None

    monkeypatch.setattr(session, "WorkerProcess", Fake)
    return Fake


def make_facts(**changes: Any) -> ModelFacts:
    facts: dict[str, Any] = {
        "path": Path("model.onnx"),
        "data_path": None,
        "clip_shape": (3, 20, 5, 1),
        "data_shape": (3, 20, 5, 1),
        "file_bytes": 1234,
        "parameters": 56,
        "num_classes": 2,
        "model_type": "tiny",
        "layout": "coco",
        "multiply_adds": 1000,
        **changes,
    }
    return ModelFacts(**facts)


def run_session(settings: Settings, **facts: Any) -> Session:
    measured = Session(settings, make_facts(**facts))
    measured.run(lambda what, share, left_s: None)
    return measured


# What was asked


def test_settings_by_default_are_all_backends_and_one_thread() -> None:
    settings = make_settings("m.pth")
    assert settings.backends == tuple(BACKENDS)
    assert settings.batches == (1, 8, 32)
    assert settings.threads[0] == 1
    assert (settings.frames, settings.people, settings.data) == (None, None, None)


def test_settings_from_texts() -> None:
    settings = make_settings("m.pth", ["onnx", "torch, native", "torch"], "8, 1,8", "2")
    assert settings.backends == ("onnxruntime", "torch", "native")
    assert settings.batches == (1, 8)
    assert settings.threads == (2,)


def test_settings_report_everything_that_is_wrong_at_once() -> None:
    with pytest.raises(UserError) as caught:
        make_settings("m.pth", ["onnxrntime"], "1,x", "0", "c.npy", 0, 2, math.nan)
    where = [problem.where for problem in caught.value.problems]
    expected = ["--backend", "--batch", "--threads", "--frames", "--frames", "--people", "--seconds"]
    assert where == expected
    assert "onnxruntime" in caught.value.problems[0].hint


@pytest.mark.parametrize("text", ["", "1,", "-1", "1.5", "4097", "9" * 30, "²"])
def test_settings_refuse_counts(text: str) -> None:
    with pytest.raises(UserError, match="--batch"):
        make_settings("m.pth", batches=text)


# What the model is


def test_facts_count_the_work_of_all_people(model: Path) -> None:
    facts = read_facts(make_settings(str(model), frames=7, people=2, batches="1"))
    assert facts.clip_shape == facts.data_shape == (CHANNELS, 7, JOINTS, 2)
    assert facts.multiply_adds == 2 * 7 * JOINTS * CHANNELS * HIDDEN + HIDDEN * CLASSES
    assert facts.file_bytes == model.stat().st_size
    assert facts.parameters >= CHANNELS * HIDDEN + HIDDEN * CLASSES


def test_facts_take_the_shape_of_the_clips(model: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "clips.npy", np.zeros((4, CHANNELS, 9, JOINTS, 3), np.float32))
    facts = read_facts(make_settings(str(model), data=str(tmp_path / "clips.npy"), batches="1"))
    assert facts.clip_shape == (CHANNELS, 9, JOINTS, 3)


def test_facts_have_300_frames_by_default(model: Path) -> None:
    assert read_facts(make_settings(str(model), batches="1")).clip_shape == (CHANNELS, 300, JOINTS, 1)


def test_facts_take_frames_that_the_file_fixes(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path, frames=12)
    assert read_facts(make_settings(str(path), batches="1")).clip_shape == (CHANNELS, 12, JOINTS, 1)


def test_facts_tell_the_clips_before_the_pipeline_from_those_after_it(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path, make_pipeline())
    random = read_facts(make_settings(str(path), batches="1"))
    assert random.clip_shape == (2 * CHANNELS, 16, 17, 1)
    assert random.data_shape[0] == CHANNELS
    np.save(tmp_path / "clips.npy", np.ones((2, CHANNELS, 50, 17, 2), np.float32))
    real = read_facts(make_settings(str(path), data=str(tmp_path / "clips.npy"), batches="1"))
    assert (real.data_shape, real.clip_shape) == ((CHANNELS, 50, 17, 2), (2 * CHANNELS, 16, 17, 2))
    assert real.multiply_adds == 2 * 16 * 17 * 2 * CHANNELS * HIDDEN + HIDDEN * CLASSES


def test_facts_of_a_file_that_takes_frames_not_clips(tmp_path: Path) -> None:
    facts = read_facts(make_settings(str(write_tiny_model(tmp_path, write=write_step_form)), frames=9, batches="1"))
    assert facts.data_shape == (CHANNELS, 9, JOINTS, 1)
    assert (facts.num_classes, facts.multiply_adds) == (CLASSES, None)


def test_facts_refuse_batches_that_fill_the_memory(model: Path) -> None:
    with pytest.raises(UserError, match="GiB"):
        read_facts(make_settings(str(model), frames=100_000, people=100, batches="4096"))


# The machine


def test_cpu_fields_are_those_of_the_first_processor() -> None:
    text = "processor\t: 0\nmodel name\t: Some CPU: fast\nflags\t\t: fpu avx2\n\nprocessor\t: 1\nmodel name\t: Other\n"
    assert read_cpu_fields(text) == {"processor": "0", "model name": "Some CPU: fast", "flags": "fpu avx2"}
    assert read_cpu_fields("") == {}


def test_machine_tells_versions_and_no_names() -> None:
    found = describe_machine()
    assert found["versions"]["numpy"] == np.__version__
    assert found["usable_cores"] >= 1
    allowed = {"cpu", "architecture", "extensions", "logical_cpus", "usable_cores", "memory_bytes", "load_average"}
    assert set(found) == allowed | {"system", "python", "versions"}
    assert platform.node() not in found.values()


@pytest.mark.skipif(sys.platform != "linux", reason="the size of a process is read from /proc")
def test_peak_bytes_are_those_of_this_process_and_count_what_was_freed() -> None:
    code = (
        "from kinegraph.benchmark.machine import read_peak_bytes\n"
        "before = read_peak_bytes()\nblock = b'x' * 100_000_000\ndel block\nprint(before, read_peak_bytes())"
    )
    keep = b"x" * 150_000_000  # a large process must not hand its peak on to the ones that it starts
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before < len(keep)
    assert 95_000_000 < after - before < 130_000_000


# Counting


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=50))
def test_percentiles_lie_on_the_line_between_two_sorted_values(latencies_s: list[float]) -> None:
    found = summarise_latencies(latencies_s)
    values = sorted(1e3 * value for value in latencies_s)
    for percent in (50, 90, 99):
        place = percent / 100 * (len(values) - 1)
        below, above = values[math.floor(place)], values[math.ceil(place)]
        expected = below + (place - math.floor(place)) * (above - below)
        assert found[f"p{percent}"] == pytest.approx(expected)
    assert found["mean"] == pytest.approx(math.fsum(values) / len(values))
    assert (found["min"], found["max"]) == pytest.approx((values[0], values[-1]))


def test_rates_of_a_row_follow_from_its_latencies() -> None:
    lane = Lane("clips", "torch", 2, 4)
    lane.add({"latencies_s": [0.1, 0.3], "pipeline_s": 0.1, "cpu_s": 0.8})
    lane.add({"latencies_s": [0.1], "pipeline_s": 0.025, "cpu_s": 0.2})
    row = describe_clips(lane, make_facts(multiply_adds=10**9, data_path=Path("c.npy")), {2: 200.0, 1: 1.0})
    assert row["calls"] == 3
    assert row["clips_per_s"] == pytest.approx(3 * 4 / 0.5)
    assert row["pipeline_share"] == pytest.approx(0.25)
    assert row["cpu_ms_per_clip"] == pytest.approx(1000 * 1.0 / 12)
    # the fastest call: 4 clips of 2 * 10^9 operations in three quarters of 0.1 s
    assert row["gflops"] == pytest.approx(4 * 2 / 0.075)
    assert row["share_of_peak"] == pytest.approx(4 * 2 / 0.075 / 200)


class Clock:
    """Stands in for `time`: a call takes as long as the list says."""

    def __init__(self, durations_s: list[float]) -> None:
        self.now_s, self.durations_s, self.num_calls = 0.0, durations_s, 0

    def perf_counter(self) -> float:
        return self.now_s

    process_time = perf_counter

    def call(self) -> float:
        self.now_s += self.durations_s[min(self.num_calls, len(self.durations_s) - 1)]
        self.num_calls += 1
        return 0.001


@pytest.mark.parametrize(
    ("durations_s", "expected"),
    [
        ([0.02, 0.04, 0.03, 0.05], [0.04, 0.03, 0.05]),  # the first call only brings back the caches
        ([0.05, 0.04, 0.03], [0.05, 0.04, 0.03]),  # a long one cannot be wasted
        ([0.5], [0.5]),
    ],
)
def test_slice_leaves_out_a_short_first_call(
    durations_s: list[float], expected: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(durations_s)
    monkeypatch.setattr(worker, "time", clock)
    answer = worker.measure(clock.call, 0.11)
    assert answer["latencies_s"] == pytest.approx(expected)
    assert answer["pipeline_s"] == pytest.approx(0.001 * len(expected))
    assert answer["cpu_s"] == pytest.approx(sum(expected))


def test_slice_of_a_call_without_duration_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock([0.0])
    monkeypatch.setattr(worker, "time", clock)
    assert len(worker.measure(clock.call, 0.1)["latencies_s"]) == worker.MAX_CALLS


# Taking turns


def test_every_configuration_is_measured_in_turn(fake: type[FakeWorker]) -> None:
    fake.latencies_s = {"torch": 0.05, "native": 0.3}
    measured = run_session(make_settings("m.onnx", ["torch", "native"], "1,4", "1,2", seconds=1.0))
    due = {(lane.backend, lane.threads, lane.size): lane for lane in measured.lanes}
    assert len(due) == 2 * 2 * 2 + 2 * 2 + 2
    for lane in due.values():
        assert lane.status == "measured"
        assert len(lane.latencies_s) >= MIN_CALLS
        assert sum(lane.latencies_s) == pytest.approx(lane.spent_s)
        assert lane.spent_s >= 1.0 - 1e-9
        assert lane.memory_bytes == 3000 + lane.size - 1000
    # as long as nobody is done, each round holds everybody once, and not always in the same order
    size = len(due)
    rounds = [fake.asked[start : start + size] for start in range(0, 8 * size, size)]
    assert all(set(part) == set(due) for part in rounds)
    assert len({tuple(part) for part in rounds}) > 1
    # who has had its time and its calls is not asked again: 10 calls of 0.3 s, one in each slice
    assert fake.asked.count(("native", 1, 1)) == MIN_CALLS


def test_a_backend_that_refuses_is_a_row_with_its_reason(fake: type[FakeWorker]) -> None:
    fake.refused = {"tensorrt": "tensorrt is not installed", "step by step": "sees all frames at once"}
    settings = make_settings("m.onnx", ["torch", "tensorrt"], "1,4", "1", seconds=0.2)
    report = build_report(settings, make_facts(), describe_machine(), run_session(settings))
    jsonschema.validate(report, SCHEMA)
    rows = {(row["backend"], row["batch"]): row for row in report["measurements"]}
    assert {key: row["status"] for key, row in rows.items()} == {
        ("torch", 1): "measured",
        ("torch", 4): "measured",
        ("tensorrt", 1): "unavailable",
        ("tensorrt", 4): "unavailable",
    }
    assert rows["tensorrt", 1]["reason"] == "tensorrt is not installed"
    assert rows["tensorrt", 1]["latency_ms"] is None
    assert [row["reason"] for row in report["steps"]] == ["sees all frames at once"] * 2
    table = build_missing_table(report)
    assert [str(cell) for cell in table.columns[1].cells] == ["all", "all"]


def test_a_process_that_dies_fails_alone(fake: type[FakeWorker]) -> None:
    fake.dies = {"native": 3}
    measured = run_session(make_settings("m.onnx", ["torch", "native"], "1,4", "1", seconds=0.5))
    ends = {(lane.backend, lane.size): (lane.status, lane.reason) for lane in measured.lanes if lane.kind == "clips"}
    failed = ("failed", "the process was ended by SIGKILL")
    assert ends == {
        ("torch", 1): ("measured", ""),
        ("torch", 4): ("measured", ""),
        ("native", 1): failed,
        ("native", 4): failed,
    }


@pytest.mark.parametrize(("error", "number"), [(KeyboardInterrupt, signal.SIGINT), (Terminated, signal.SIGTERM)])
def test_what_was_measured_before_an_interrupt_stays(
    fake: type[FakeWorker], error: type[BaseException], number: int
) -> None:
    fake.interrupt = (4, error)
    settings = make_settings("m.onnx", ["torch", "native"], "1,4", "1", seconds=0.5)
    measured = run_session(settings)
    assert measured.stop_signal == number
    assert sum(len(lane.latencies_s) > 0 for lane in measured.lanes) == 4
    assert all(process.is_dead for process in measured.workers.values())  # type: ignore[attr-defined]
    report = build_report(settings, make_facts(), describe_machine(), measured)
    jsonschema.validate(report, SCHEMA)
    statuses = [row["status"] for row in [*report["measurements"], *report["steps"], *report["peaks"]]]
    assert sorted(statuses) == ["measured"] * 4 + ["waiting"] * (len(statuses) - 4)


# Processes


def test_a_killed_process_is_told_from_its_signal() -> None:
    process = WorkerProcess(1, "")
    try:
        process.process.kill()
        with pytest.raises(WorkerError, match="SIGKILL") as caught:
            process.ask({"do": "warm", "size": 1})
        assert not caught.value.is_refusal
    finally:
        process.close()


def test_the_key_and_the_threads_go_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    started: dict[str, Any] = {}

    def start(command: list[str], **options: Any) -> Any:
        started.update(options, command=command)
        return SimpleNamespace()

    monkeypatch.setattr(processes.subprocess, "Popen", start)
    WorkerProcess(3, KEY).log.close()
    assert KEY not in " ".join(started["command"])
    assert started["env"]["KINEGRAPH_ENCRYPTION_KEY"] == KEY
    assert started["env"]["OMP_NUM_THREADS"] == "3"
    assert started["start_new_session"] is True


def test_a_worker_explains_what_it_cannot_do(tmp_path: Path) -> None:
    request = {"do": "open", "kind": "clips", "model": str(tmp_path / "none.onnx"), "backend": "onnxruntime"}
    request |= {"threads": 1, "device": "", "sizes": [1], "shape": [3, 4, 5, 1], "data": None}
    answer = worker.Worker().answer(request)
    assert answer["is_refusal"] is True
    assert "none.onnx" in answer["error"]


# What is measured


def make_request(model: Path, **changes: Any) -> dict[str, Any]:
    request = {"kind": "clips", "model": str(model), "backend": "onnxruntime", "threads": 1, "device": ""}
    return {**request, "sizes": [1, 3], "shape": [CHANNELS, 6, JOINTS, 1], "data": None, **changes}


def record(subject: Any, monkeypatch: pytest.MonkeyPatch, size: int, num_calls: int) -> list[np.ndarray]:
    seen: list[np.ndarray] = []
    compute = subject.predictor.backend.compute
    monkeypatch.setattr(
        subject.predictor.backend, "compute", lambda x, where: seen.append(np.array(x)) or compute(x, where)
    )
    call = subject.make_call(size)
    for _ in range(num_calls):
        assert call() >= 0
    return seen


def test_real_clips_go_through_the_input_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = np.random.default_rng(2).standard_normal((4, CHANNELS, 40, 17, 1))
    np.save(tmp_path / "clips.npy", stored)
    request = make_request(write_tiny_model(tmp_path, make_pipeline()), data=str(tmp_path / "clips.npy"))
    clips = subjects.make_clips(request)
    assert np.array_equal(clips, stored[[0, 1, 2, 3, 0, 1]])  # 3 at once and as many again, from the start
    seen = record(subjects.open_subject(request, clips), monkeypatch, 3, 5)
    for number, x in enumerate(seen):
        start = number % 4
        assert x.dtype == np.float32
        assert np.array_equal(x, make_pipeline()(stored[[0, 1, 2, 3, 0, 1]][start : start + 3]))


def test_random_clips_are_what_the_network_gets(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = make_request(model)
    subject = subjects.open_subject(request, subjects.make_clips(request))
    seen = record(subject, monkeypatch, 1, 2)
    assert [x.shape for x in seen] == [(1, CHANNELS, 6, JOINTS, 1)] * 2
    assert not np.array_equal(seen[0], seen[1])


@pytest.mark.parametrize("write", [write_clip_form, write_step_form])
def test_steps_give_each_person_the_next_frame(
    write: Callable[..., bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = make_request(write_tiny_model(tmp_path, write=write), kind="steps", shape=[CHANNELS, 6, JOINTS, 1])
    clips = subjects.make_clips(request)
    steps = subjects.open_subject(request, clips)
    seen: list[np.ndarray] = []
    states: list[Any] = []
    step = steps.model.step  # type: ignore[attr-defined]

    def record_step(frames: np.ndarray, state: Any) -> Any:
        seen.append(frames)
        states.append(state)
        return step(frames, state)

    monkeypatch.setattr(steps.model, "step", record_step)  # type: ignore[attr-defined]
    call = steps.make_call(3)
    for _ in range(70):
        call()
    num_frames = clips.shape[2]
    for number, frames in enumerate(seen):
        assert frames.shape == (3, CHANNELS, JOINTS)
        for person in range(3):
            assert np.array_equal(frames[person], clips[0, :, (person + number) % num_frames, :, 0])
    assert [int(state.arrays["age"][0]) for state in states] == list(range(70))


# The command


def test_command_measures_all_that_was_asked(model: Path, tmp_path: Path, ask: Callable[..., Any]) -> None:
    """The real processes: two backends, one that is not there, and the files."""
    folder = tmp_path / "out"
    names = ["onnxruntime", "openvino", "tensorrt"]
    options = ["--frames", 6, "--batch", "1,3", "--threads", "1", "--seconds", 0.02, "-o", folder]
    code, out, err = ask(model, *(word for name in names for word in ("--backend", name)), *options, "--json")
    assert code == 0, err
    answer = json.loads(out)
    assert answer.pop("status") == "ok"
    assert answer.pop("files") == {"report": str(folder / "benchmark.json"), "plot": str(folder / "benchmark.png")}
    assert answer == json.loads((folder / "benchmark.json").read_text())
    assert (folder / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    jsonschema.validate(answer, SCHEMA)
    rows = {(row["backend"], row["batch"]): row for row in answer["measurements"]}
    assert list(rows) == [(name, size) for name in names for size in (1, 3)]
    assert [(row["people"], row["threads"]) for row in answer["steps"]] == [(1, 1), (3, 1)]
    work = 6 * JOINTS * CHANNELS * HIDDEN + HIDDEN * CLASSES
    assert answer["model"]["multiply_adds_per_clip"] == work
    [peak] = answer["peaks"]
    for size in (1, 3):
        row = rows["onnxruntime", size]
        assert row["status"] == "measured"
        assert row["calls"] >= MIN_CALLS
        assert row["clips_per_s"] == pytest.approx(size * 1000 / row["latency_ms"]["mean"])
        assert row["gflops"] == pytest.approx(size * 2 * work / (row["latency_ms"]["min"] / 1e3) / 1e9)
        assert row["share_of_peak"] == pytest.approx(row["gflops"] / peak["gflops"])
        assert row["memory_bytes"] > 0
        assert row["pipeline_share"] is None
        step = answer["steps"][size > 1]
        assert step["status"] == "measured", step["reason"]
        assert step["frames_per_s"] == pytest.approx(size * 1000 / step["latency_ms"]["mean"])
        for name in ("openvino", "tensorrt"):
            other = rows[name, size]
            assert (other["status"] == "measured") == (other["reason"] is None) == (other["latency_ms"] is not None)


def test_command_interrupted_writes_what_there_is(
    model: Path, tmp_path: Path, ask: Callable[..., Any], fake: type[FakeWorker]
) -> None:
    fake.interrupt = (3, KeyboardInterrupt)
    code, out, err = ask(model, "--threads", "1", "-o", tmp_path / "out")
    assert code == 130
    assert err.splitlines()[-1] == "interrupted"
    report = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    jsonschema.validate(report, SCHEMA)
    assert report["interrupted"] is True
    assert "Interrupted" in out
    assert "clips/s" in out
    assert "\x1b" not in out and "tiny\\x1b[31m" in out


def test_command_terminated_answers_with_one_json_document(
    model: Path, ask: Callable[..., Any], fake: type[FakeWorker]
) -> None:
    fake.interrupt = (3, Terminated)
    code, out, _ = ask(model, "--threads", "1", "--json")
    assert code == 143
    answer = json.loads(out)
    assert answer["interrupted"] is True


def test_command_does_not_tell_the_key(
    model: Path, tmp_path: Path, ask: Callable[..., Any], fake: type[FakeWorker]
) -> None:
    _, out, err = ask(model, "--threads", "1", "--seconds", 0.01, "-k", KEY, "-o", tmp_path / "out", "--json")
    assert "KINEGRAPH_ENCRYPTION_KEY" in err
    assert KEY not in out + err + (tmp_path / "out" / "benchmark.json").read_text()


def test_command_refuses_what_is_no_model(tmp_path: Path, ask: Callable[..., Any]) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    (tmp_path / "text.txt").write_text("no model")
    for name in ("broken.onnx", "text.txt", "missing.onnx", "missing.pth"):
        code, _, err = ask(tmp_path / name)
        assert code == 2
        assert name in err


def test_command_refuses_clips_that_do_not_fit(model: Path, tmp_path: Path, ask: Callable[..., Any]) -> None:
    np.save(tmp_path / "clips.npy", np.zeros((2, CHANNELS, 4, JOINTS + 1, 1), np.float32))
    code, _, err = ask(model, "--data", tmp_path / "clips.npy")
    assert code == 2
    assert f"{JOINTS + 1} joints" in err


def test_command_keeps_an_old_report(model: Path, tmp_path: Path, ask: Callable[..., Any]) -> None:
    (tmp_path / "benchmark.json").write_text("old")
    code, _, err = ask(model, "-o", tmp_path)
    assert code == 2
    assert "there already" in err
    assert (tmp_path / "benchmark.json").read_text() == "old"


# How it looks


@pytest.fixture
def report(fake: type[FakeWorker]) -> dict[str, Any]:
    fake.latencies_s = {"torch": 0.02, "native": 0.01, "openvino": 0.04}
    settings = make_settings("m.onnx", ["torch", "native", "openvino"], "1,4", "1,2", seconds=0.2)
    return build_report(settings, make_facts(), describe_machine(), run_session(settings))


def test_table_leaves_out_columns_on_a_narrow_terminal(report: dict[str, Any]) -> None:
    wide, narrow = build_clip_table(report, 200), build_clip_table(report, 60)
    names = [column.header for column in narrow.columns]
    assert names == ["backend", "threads", "batch", "p50 ms", "p99 ms", "clips/s"]
    assert len(wide.columns) > len(names)
    assert len(narrow.rows) == 3 * 2 * 2
    bold = [number for number, row in enumerate(narrow.rows) if row.style == "bold"]
    backends = [str(cell) for cell in narrow.columns[0].cells]
    assert [backends[number] for number in bold] == ["native"] * 4


def test_plot_is_written_whatever_was_measured(report: dict[str, Any], tmp_path: Path) -> None:
    from matplotlib.image import imread

    empty = {**report, "measurements": [], "steps": []}
    one = {**report, "measurements": report["measurements"][:1], "steps": []}
    sizes = []
    for number, content in enumerate((report, one, empty)):
        plot_report(tmp_path / f"{number}.png", content)
        picture = imread(tmp_path / f"{number}.png")
        assert picture[..., :3].min() < 0.5  # something is drawn
        sizes.append(picture.shape[1])
    assert sizes[0] > sizes[1]


def test_progress_says_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    from kinegraph.benchmark import table

    clock = SimpleNamespace(now_s=0.0)
    monkeypatch.setattr(table.time, "monotonic", lambda: clock.now_s)
    lines: list[str] = []
    progress = Progress(lines.append)
    for second in range(25):
        clock.now_s = float(second)
        progress("measuring", second / 25, 25.0 - second)
    assert lines == ["measuring: 40%, 15 s left", "measuring: 80%, 5 s left"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, ""), (0.012345, "0.0123"), (1.2345, "1.23"), (99.96, "100"), (123.4, "123"), (12345.6, "12346")],
)
def test_format_number(value: float | None, expected: str) -> None:
    assert format_number(value) == expected


def test_format_units() -> None:
    assert [format_bytes(value) for value in (None, 512, 2048, 3 * 2**20, 2**31)] == [
        "",
        "512 B",
        "2 KiB",
        "3 MiB",
        "2 GiB",
    ]
    assert [format_count(value) for value in (512, 12_300, 3_080_000, 5_530_000_000)] == [
        "512",
        "12.3 k",
        "3.08 M",
        "5.53 G",
    ]
    assert [format_share(value) for value in (None, 0.0123, 0.5, 1.534)] == ["", "1.2 %", "50 %", "153 %"]
