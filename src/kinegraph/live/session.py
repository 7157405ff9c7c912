"""A stream from its source to its last event: reading, telling what was left out, ending properly."""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any

from kinegraph.live.engine import Event, LiveEngine
from kinegraph.live.frames import Fault, Observation, parse_line
from kinegraph.live.sources import Source

POLL_S = 0.2
WARNING_INTERVAL_S = 5.0
"""Between two warnings of one kind."""
LONGEST_PAUSE_S = 10.0
"""With `realtime`, a longer pause of the recording is cut short."""

Write = Callable[[list[Event]], None]


class Stop:
    """Whether somebody asked the stream to stop: `number` of the signal, 0 for nobody."""

    number = 0

    def ask(self, number: int, frame: Any = None) -> None:
        """A signal handler. The first one ends the stream in order; a second one does not wait for that."""
        if self.number:
            raise KeyboardInterrupt
        self.number = number


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Ctrl-C and SIGTERM ask the stream to stop while this is open. Only for the main thread."""
    stop = Stop()
    previous = {number: signal.signal(number, stop.ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Warnings:
    """Tells what was left out, each kind at most once in WARNING_INTERVAL_S, with how often it came since."""

    def __init__(self, tell: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self.tell = tell
        self.clock = clock
        self.told_at: dict[str, float] = {}
        self.told_count: Counter[str] = Counter()

    def add(self, faults: Iterable[Fault], counts: Counter[str]) -> None:
        """faults: one of each kind is enough; counts: of all so far."""
        for fault in faults:
            now = self.clock()
            if now - self.told_at.get(fault.kind, -WARNING_INTERVAL_S) < WARNING_INTERVAL_S:
                continue
            more = counts[fault.kind] - self.told_count[fault.kind] - 1
            self.told_at[fault.kind], self.told_count[fault.kind] = now, counts[fault.kind]
            also = f" ({more} more like it)" if more > 0 else ""
            self.tell(f"warning: {fault.where}: got {fault.got}, expected {fault.expected}; left out{also}.")


class Session:
    """One stream. `write` gets events as they happen; `tell` gets lines for people."""

    def __init__(
        self, source: Source, engine: LiveEngine, write: Write, tell: Callable[[str], None], realtime: bool = False
    ) -> None:
        self.source = source
        self.engine = engine
        self.write = write
        self.realtime = realtime
        self.warnings = Warnings(tell)
        self.stop = Stop()
        self.paced: tuple[float, float] | None = None  # a time of the stream, and when it was

    def run(self, stop: Stop) -> dict[str, int]:
        """Until the source ends or `stop` is asked for; then every open segment is closed. Gives the counts."""
        self.stop = stop
        reason = self._follow()
        self._write(self.engine.end_all(reason))
        counts = dict(sorted(self.engine.counts.items()))
        self.write([{"event": "summary", "reason": reason, "counts": counts}])
        return counts

    def _follow(self) -> str:
        silent_since = time.monotonic()
        while not self.stop.number:
            batches = self.source.read(POLL_S)
            if batches is None:
                return "stream_end"
            faults: list[Fault] = []
            observations: list[Observation] = []
            for batch in batches:
                for place, line in enumerate(batch.lines):
                    found, wrong = parse_line(line, batch.locate(place))
                    observations += found
                    faults += wrong
            faults += self.source.faults
            self.source.faults.clear()
            self.engine.counts.update(fault.kind for fault in faults)
            self.warnings.add(faults, self.engine.counts)
            if observations:
                self._feed(observations)
                silent_since = time.monotonic()  # only now: a slow network is no silence
            elif self.source.is_live and time.monotonic() - silent_since > self.engine.options.forget_after_s:
                self._write(self.engine.end_all("idle"))
        return "stopped"

    def _feed(self, observations: list[Observation]) -> None:
        if not self.realtime:
            self._write(self.engine.feed(observations))
            return
        for moment, group in groupby(observations, key=lambda item: item.time):
            if not self._wait_for(moment):
                return
            self._write(self.engine.feed(list(group)))

    def _wait_for(self, moment: float) -> bool:
        """Until a time of the stream has come; False if the stream is to stop."""
        now = time.monotonic()
        if self.paced is None or abs(moment - self.paced[0] - (now - self.paced[1])) > LONGEST_PAUSE_S:
            self.paced = (moment, now)
        until = self.paced[1] + moment - self.paced[0]
        while not self.stop.number:
            left = until - time.monotonic()
            if left <= 0:
                return True
            time.sleep(min(left, POLL_S))
        return False

    def _write(self, events: list[Event]) -> None:
        if events:
            self.write(events)
        self.warnings.add(self.engine.take_faults(), self.engine.counts)
