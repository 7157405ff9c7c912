"""The measurement: open every process, warm up, then short slices of all configurations in turn.

A computer is never quiet. What disturbs it for a second then disturbs a slice of each configuration, not all of one.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from typing import Any

from kinegraph.benchmark.facts import ModelFacts
from kinegraph.benchmark.plan import Lane, Station, plan_stations
from kinegraph.benchmark.processes import WorkerError, WorkerProcess
from kinegraph.benchmark.settings import Settings
from kinegraph.run import Terminated, raise_on_sigterm

MIN_CALLS = 10
SLICE_S = 0.1
SLICES = 10
"""At least so many turns for each configuration that is not slower than a slice."""

Show = Callable[[str, float | None, float | None], None]
"""(what is done, share that is done or None, seconds left or None)"""


class Session:
    """lanes: all configurations; stop_signal: number of the signal that ended it early, or 0."""

    def __init__(self, settings: Settings, facts: ModelFacts, key: str = "") -> None:
        self.settings, self.facts, self.key = settings, facts, key
        self.stations = plan_stations(settings, facts)
        self.workers: dict[int, WorkerProcess] = {}
        self.stop_signal = 0
        self.slice_s = min(SLICE_S, settings.seconds / SLICES)

    @property
    def lanes(self) -> list[Lane]:
        return [lane for station in self.stations for lane in station.lanes]

    def run(self, show: Show) -> None:
        """Measure. Ctrl-C and SIGTERM end it early; what is measured until then stays."""
        try:
            with raise_on_sigterm():
                for number, station in enumerate(self.stations):
                    show(f"opening {station.name}", number / len(self.stations), None)
                    self._open(number, station)
                self._measure(show)
        except KeyboardInterrupt:
            self.stop_signal = signal.SIGINT
        except Terminated:
            self.stop_signal = signal.SIGTERM
        finally:
            for worker in self.workers.values():
                worker.close()

    def _open(self, number: int, station: Station) -> None:
        """Open and warm up. The peak of the memory after each size is that of this size, as sizes ascend."""
        worker = self.workers[number] = WorkerProcess(station.threads, self.key)
        try:
            opened = worker.ask(station.request)
        except WorkerError as error:
            for lane in station.lanes:
                lane.give_up(error.reason, error.is_refusal)
            return
        for lane in station.lanes:
            lane.load_s, lane.facts = opened["load_s"], opened["facts"]
            answer = self._ask(number, lane, {"do": "warm", "size": lane.size})
            if answer is not None:
                lane.first_s = answer["first_s"]
                if answer["peak_bytes"] is not None:
                    lane.memory_bytes = answer["peak_bytes"] - opened["start_bytes"]

    def _measure(self, show: Show) -> None:
        order = random.Random(0)  # otherwise each would always follow the same one, and find its caches
        while due := self._list_due():
            order.shuffle(due)
            for number, lane in due:
                left_s = self._estimate_left()
                spent_s = sum(lane.spent_s for lane in self.lanes)
                show("measuring", spent_s / max(spent_s + left_s, 1e-9), left_s)
                answer = self._ask(number, lane, {"do": "measure", "size": lane.size, "slice_s": self.slice_s})
                if answer is not None:
                    lane.add(answer)

    def _ask(self, number: int, lane: Lane, request: dict[str, Any]) -> dict[str, Any] | None:
        """None where the worker failed: then this lane gives up. Of a process that is gone each one hears so."""
        if not lane.can_run:
            return None
        try:
            return self.workers[number].ask(request)
        except WorkerError as error:
            lane.give_up(error.reason, error.is_refusal)
            return None

    def _list_due(self) -> list[tuple[int, Lane]]:
        return [
            (number, lane)
            for number, station in enumerate(self.stations)
            for lane in station.lanes
            if lane.can_run and not is_done(lane, self.settings.seconds)
        ]

    def _estimate_left(self) -> float:
        """Seconds, from the latencies so far or the first call."""
        left_s = 0.0
        for _, lane in self._list_due():
            calls = len(lane.latencies_s)
            call_s = lane.spent_s / calls if calls else lane.first_s
            left_s += max(self.settings.seconds - lane.spent_s, (MIN_CALLS - calls) * call_s)
        return left_s


def is_done(lane: Lane, seconds: float) -> bool:
    """Whether a configuration had its time and its number of calls."""
    return len(lane.latencies_s) >= MIN_CALLS and lane.spent_s >= seconds
