"""Sources, and the loop around the engine."""

from __future__ import annotations

import signal
import socket
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kinegraph.errors import UserError
from kinegraph.live import session, sources
from kinegraph.live.engine import LiveEngine
from kinegraph.live.frames import Fault
from kinegraph.live.session import Session, Stop, Warnings
from kinegraph.live.sources import Batch, SocketSource, open_source
from kinegraph.spec_live import LiveSpec
from live_stand_in import StandInModel, StandInPool, make_line


def make_engine(**options: Any) -> LiveEngine:
    model = StandInModel(10.0)
    plain = {"smoothing": "none", "min_duration_s": 0.0, "merge_gap_s": 0.0, **options}
    return LiveEngine(model, StandInPool(model), LiveSpec(**plain))


def wait_until(is_so: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.01)


def follow(source: Any, engine: LiveEngine, act: Callable[[], None] | None = None) -> tuple[list[Any], list[str]]:
    """Events and messages of a session. It is stopped once `act`, in another thread, has done its work."""
    events: list[Any] = []
    messages: list[str] = []
    stop = Stop()

    def run_act() -> None:
        try:
            if act:
                act()
        finally:
            stop.ask(signal.SIGTERM)

    thread = threading.Thread(target=run_act)
    if act:
        thread.start()
    Session(source, engine, events.extend, messages.append).run(stop)
    if act:
        thread.join()
    source.close()
    return events, messages


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "frames.jsonl"
    lines = [make_line("a", i / 10) for i in range(20)]
    lines[5:5] = [b"\n", b"broken\n", b'{"person": "a", "time": 0.45, "joints": [[1]]}\n']
    path.write_bytes(b"".join(lines).rstrip(b"\n"))  # the last line without its newline
    events, messages = follow(open_source(str(path)), make_engine())
    kinds = ["track_start", "segment_start", "segment_end", "track_end", "summary"]
    assert [event["event"] for event in events] == kinds
    assert (events[2]["start"], events[2]["end"]) == (0.0, 1.9)
    assert events[3]["reason"] == events[4]["reason"] == "stream_end"
    assert events[4]["counts"]["malformed"] == events[4]["counts"]["wrong_joints"] == 1
    assert [message.split(": got")[0] for message in messages] == [
        f"warning: {path}, line 7",
        "warning: person 'a', time 0.450000",
    ]


def test_tcp_connections() -> None:
    source = open_source("tcp://127.0.0.1:0")
    assert isinstance(source, SocketSource)
    host, port = source.address.removeprefix("tcp://").split(":")
    engine = make_engine(forget_after_s=1000.0)

    def act() -> None:
        with socket.create_connection((host, int(port))) as first, socket.create_connection((host, int(port))) as last:
            for i in range(10):
                line = make_line("a", i / 10)
                first.sendall(line[:30])
                last.sendall(make_line("b", i / 10))
                first.sendall(line[30:])
            last.sendall(b"broken\n")
            wait_until(lambda: engine.counts["frames"] == 20 and engine.counts["malformed"] == 1)
        wait_until(lambda: not source.senders)

    events, messages = follow(source, engine, act)
    ended = [(event["person"], event["end"]) for event in events if event["event"] == "segment_end"]
    assert sorted(ended) == [("a", 0.9), ("b", 0.9)]
    assert events[-1]["reason"] == "stopped"
    assert len(messages) == 1 and "line 11: got 'broken'" in messages[0]


def test_too_many_connections_and_too_long_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_CONNECTIONS", 2)
    monkeypatch.setattr("kinegraph.live.frames.MAX_LINE_BYTES", 1000)
    source = open_source("tcp://localhost:0")
    assert isinstance(source, SocketSource)
    port = int(source.address.split(":")[-1])
    engine = make_engine()

    def act() -> None:
        connections = [socket.create_connection(("127.0.0.1", port)) for _ in range(2)]
        wait_until(lambda: len(source.senders) == 2)
        with socket.create_connection(("127.0.0.1", port)) as refused:
            assert refused.recv(10) == b""
        connections[0].sendall(b"x" * 300_000 + b"\n" + make_line("a", 1.0))
        wait_until(lambda: engine.counts["frames"] == 1)
        for connection in connections:
            connection.close()

    follow(source, engine, act)
    assert engine.counts["too_many_connections"] == engine.counts["too_long"] == 1


def test_silence_closes_segments() -> None:
    """When a camera stops sending, nobody waits for its next frame to hear that the action is over."""
    source = open_source("tcp://127.0.0.1:0")
    assert isinstance(source, SocketSource)
    engine = make_engine(max_gap_s=0.1, forget_after_s=0.1)

    def act() -> None:
        with socket.create_connection(("127.0.0.1", int(source.address.split(":")[-1]))) as connection:
            connection.sendall(make_line("a", 0.0) + make_line("a", 0.1))
            wait_until(lambda: engine.counts["ended_idle"] == 1)

    events, _ = follow(source, engine, act)
    assert [event["event"] for event in events][:4] == ["track_start", "segment_start", "segment_end", "track_end"]


def test_a_slow_network_is_no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    class Clock:
        monotonic = staticmethod(lambda: now[0])

    class SlowEngine(LiveEngine):
        def feed(self, observations: Any) -> Any:
            now[0] += 100
            return super().feed(observations)

    class TwoFrames:
        is_live = True
        faults: list[Fault] = []  # noqa: RUF012
        batches = iter(
            [[Batch("stdin", 1, [make_line("a", 0.0)])], [], [Batch("stdin", 2, [make_line("a", 0.1)])], None]
        )

        def read(self, timeout_s: float) -> Any:
            return next(self.batches)

    monkeypatch.setattr(session, "time", Clock)
    model = StandInModel()
    engine = SlowEngine(model, StandInPool(model), LiveSpec())
    Session(TwoFrames(), engine, lambda events: None, print).run(Stop())  # type: ignore[arg-type]
    assert engine.counts["tracks"] == 1 and engine.counts["ended_stream_end"] == 1


def test_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "frames.sock"
    source = open_source(f"unix://{path}")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(UserError, match="a socket in use"):
        open_source(f"unix://{path}")
    engine = make_engine()

    def act() -> None:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
            connection.sendall(make_line("a", 0.0))
            wait_until(lambda: engine.counts["frames"] == 1)

    follow(source, engine, act)
    assert not path.exists()
    with socket.socket(socket.AF_UNIX) as dead:  # what a killed process leaves
        dead.bind(str(path))
    open_source(f"unix://{path}").close()
    path.write_text("something else")
    with pytest.raises(UserError, match="a file that is there already"):
        open_source(f"unix://{path}")
    assert path.read_text() == "something else"


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("missing.jsonl", "no such file"),
        ("/", "a folder"),
        ("/dev/null", "standard input"),
        ("tcp://127.0.0.1", "no HOST:PORT"),
        ("tcp://127.0.0.1:99999", "no HOST:PORT"),
        ("tcp://127.0.0.1:x", "no HOST:PORT"),
        ("tcp://:5000", "no HOST:PORT"),
        ("tcp://0.0.0.0:5000", "--allow-remote"),
        ("tcp://192.168.1.1:5000", "--allow-remote"),
        ("tcp://example.org:5000", "--allow-remote"),
        ("tcp://[::]:5000", "--allow-remote"),
        ("unix://" + "x" * 300, "unix:///PATH"),
        ("unix:///no/such/folder/a.sock", "unix:///PATH"),
    ],
)
def test_refused_sources(location: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        open_source(location)


def test_warnings_are_rare() -> None:
    told: list[str] = []
    now = [0.0]
    warnings = Warnings(told.append, lambda: now[0])
    counts: Counter[str] = Counter()
    for i in range(1000):
        now[0] = i / 100
        kind = "late" if i % 2 else "malformed"
        counts[kind] += 1
        warnings.add([Fault(kind, f"line {i}", "this", "that")], counts)
    assert len(told) == 4
    assert told[0] == "warning: line 0: got this, expected that; left out."
    assert told[2] == "warning: line 500: got this, expected that; left out (249 more like it)."


def test_realtime_follows_the_time_stamps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, fed = [50.0], []

    class Clock:
        monotonic = staticmethod(lambda: now[0])

        @staticmethod
        def sleep(seconds: float) -> None:
            now[0] += seconds

    class Engine(LiveEngine):
        def feed(self, observations: Any) -> Any:
            fed.extend((item.time, now[0]) for item in observations)
            return super().feed(observations)

    monkeypatch.setattr(session, "time", Clock)
    path = tmp_path / "frames.jsonl"
    path.write_bytes(b"".join(make_line("a", moment) for moment in (7.0, 7.5, 9.0, 1009.0, 1010.0)))
    model = StandInModel()
    engine = Engine(model, StandInPool(model), LiveSpec())
    Session(open_source(str(path)), engine, lambda events: None, print, realtime=True).run(Stop())
    assert [moment for moment, _ in fed] == [7.0, 7.5, 9.0, 1009.0, 1010.0]
    assert [when for _, when in fed] == pytest.approx([50.0, 50.5, 52.0, 52.0, 53.0])
