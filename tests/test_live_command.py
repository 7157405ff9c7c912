"""The command `kinegraph live`: end to end, mistakes, signals."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kinegraph.cli import main
from kinegraph.data.pipeline import build_pipeline
from kinegraph.models.checkpoint import write_checkpoint
from kinegraph.skeleton.layouts import LAYOUTS
from kinegraph.spec_input import InputSpec
from kinegraph.spec_live import LiveSpec
from live_stand_in import make_line
from model_files import CLASS_NAMES, LAYOUT, NUM_JOINTS, make_checkpoint, write_model


def write_frames(path: Path, num_frames: int = 240) -> Path:
    rng = np.random.default_rng(2)
    with open(path, "w") as file:
        for i in range(num_frames):
            people = [{"person": name, "joints": rng.normal(size=(NUM_JOINTS, 3)).tolist()} for name in "ab"]
            file.write(json.dumps({"time": i / 30, "people": people}) + "\n")
    return path


def read_events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


SENSITIVE = [
    "live.enter_threshold=0.3",
    "live.leave_threshold=0.2",
    "live.frames_per_second=30",
    "live.pooling_frames=8",
]


def test_command_answers_as_the_model_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """End to end with a small real network: its probabilities, and the segments that follow from them."""
    from kinegraph import online
    from kinegraph.live.decisions import find_segments, make_rules

    model_path, frames = write_model(tmp_path), write_frames(tmp_path / "frames.jsonl")
    assert main(["live", str(frames), "--model", str(model_path), "--probabilities", *SENSITIVE]) == 0
    captured = capsys.readouterr()
    events = read_events(captured.out)
    assert events[0]["event"] == "start" and events[0]["class_names"] == CLASS_NAMES
    assert events[-1]["event"] == "summary" and events[-1]["counts"]["frames"] == 480
    assert "480 frames, 2 tracks" in captured.err and "left out: nothing" in captured.err

    model = online.load(model_path)
    lines = [json.loads(line)["people"] for line in frames.read_text().splitlines()]
    sent = np.array([[person["joints"] for person in people] for people in lines], np.float32)
    sent = sent.transpose(1, 3, 0, 2)  # (people, C, T, V)
    state = model.start(2, 8)
    wanted, times = [], []
    for i in range(sent.shape[2]):
        probabilities, state = model.step(sent[:, :, i], state)
        if np.isfinite(probabilities).all():
            wanted.append(probabilities)
            times.append((i - model.delay_frames) / 30)
    told = [event for event in events if event["event"] == "probabilities" and event["person"] == "b"]
    assert len(told) == len(wanted) > 0
    np.testing.assert_allclose([event["probabilities"] for event in told], np.array(wanted)[:, 1], atol=6e-5)
    assert [event["time"] for event in told] == pytest.approx(times, abs=1e-6)
    options = LiveSpec(enter_threshold=0.3, leave_threshold=0.2)
    found = find_segments(make_rules(options, CLASS_NAMES, 30.0), np.array(times), np.array(wanted)[:, 1])
    ended = [event for event in events if event["event"] == "segment_end" and event["person"] == "b"]
    assert len(found) > 0
    assert [event["class"] for event in ended] == [CLASS_NAMES[segment.label] for segment in found]
    assert [event["start"] for event in ended] == pytest.approx([segment.start for segment in found], abs=1e-5)
    assert [event["end"] for event in ended] == pytest.approx([segment.end for segment in found], abs=1e-5)


def test_command_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model_path, frames = write_model(tmp_path), write_frames(tmp_path / "frames.jsonl", 3)
    output = tmp_path / "events.jsonl"
    assert main(["live", str(frames), "--model", str(model_path), "-o", str(output)]) == 0
    assert capsys.readouterr().out == ""
    assert read_events(output.read_text())[-1]["reason"] == "stream_end"
    wrong = [
        (["live", str(frames)], "--model: got nothing"),
        (["live", str(frames), "--model", str(model_path), "-o", str(output)], "there already"),
        (["live", str(frames), "--model", str(tmp_path / "missing.pth")], "missing.pth"),
        (["live", str(tmp_path / "missing"), "--model", str(model_path)], "no such file"),
        (["live", str(frames), "--model", str(model_path), "live.enter_threshold=2"], "at most 1"),
        (["live", str(frames), "--model", str(model_path), "live.no_action_classes=[run]"], "a class of the model"),
        (["live", "-", "--realtime", "--model", str(model_path)], "--realtime: got the source -"),
        (["live", "tcp://0.0.0.0:0", "--model", str(model_path)], "--allow-remote"),
    ]
    for arguments, expected in wrong:
        assert main(arguments) == 2, arguments
        assert expected in capsys.readouterr().err


def test_a_model_with_a_window_takes_no_pooling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = build_pipeline(InputSpec(sampling="uniform", num_frames=8), 3, LAYOUTS[LAYOUT])
    write_checkpoint(tmp_path / "model.pth", replace(make_checkpoint(), pipeline=pipeline.to_dict()))
    frames = write_frames(tmp_path / "frames.jsonl", 20)
    command = ["live", str(frames), "--model", str(tmp_path / "model.pth")]
    for accepted in ([], ["live.pooling_frames=0"]):
        assert main([*command, *accepted]) == 0
        assert read_events(capsys.readouterr().out)[-1]["counts"]["answers"] == 40
    assert main([*command, "live.pooling_frames=8"]) == 2
    assert "pooling_frames: got 8, expected none: this model classifies a window" in capsys.readouterr().err


STAND_IN = """
import sys
sys.path.insert(0, sys.argv[1])
from live_stand_in import StandInModel, StandInPool
from kinegraph import online
from kinegraph.cli import main
online.load = lambda path, key: StandInModel()
online.TrackPool = lambda model, pooling_frames: StandInPool(model)
sys.exit(main(sys.argv[2:]))
"""


def start_command(source: str, *options: str) -> subprocess.Popen[bytes]:
    """`kinegraph live` as a process of its own, which need not wait for torch."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", STAND_IN, str(Path(__file__).parent), "live", source, "--model", "any.pth"]
    return subprocess.Popen([*command, *options], stdin=pipe, stdout=pipe, stderr=pipe)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (None, 0)])
def test_command_ends_properly(number: int | None, code: int) -> None:
    """On a signal and at the end of stdin: open segments are closed, and the exit code says which."""
    with start_command("-") as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write(b"".join(make_line("a", i / 10) for i in range(20)))
        process.stdin.flush()
        lines = [process.stdout.readline()]
        while b"segment_start" not in lines[-1]:  # flushed at once: it comes while stdin is still open
            assert lines[-1]
            lines.append(process.stdout.readline())
        if number is None:
            process.stdin.close()
        else:
            process.send_signal(number)
        lines += process.stdout.read().splitlines()
        errors = process.stderr.read().decode()
        assert process.wait() == code, errors
    events = [json.loads(line) for line in lines]
    kinds = ["start", "track_start", "segment_start", "segment_end", "track_end", "summary"]
    assert [event["event"] for event in events] == kinds
    assert events[3]["end"] == 1.9
    assert events[-1]["reason"] == ("stream_end" if number is None else "stopped")
    assert "Traceback" not in errors


@pytest.mark.timeout(120)
def test_nobody_reads_on(tmp_path: Path) -> None:
    """`kinegraph live ... | head -1` ends without a traceback."""
    path = tmp_path / "frames.jsonl"
    path.write_bytes(b"".join(make_line("a", i / 10) for i in range(5000)))
    with start_command(str(path), "--probabilities") as process:
        assert process.stdout and process.stderr
        process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read().decode()
        assert process.wait() == 1
    assert "Traceback" not in errors and "BrokenPipe" not in errors


def test_live_is_light() -> None:
    """Neither torch nor onnxruntime is loaded before a model is."""
    code = (
        "import sys, kinegraph.online\n"
        "from kinegraph.live import detection, session, sources\n"
        "print({'torch', 'onnx', 'onnxruntime', 'scipy', 'matplotlib'} & set(sys.modules))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "set()"
