"""Which processes there are, and which configurations each of them measures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from kinegraph.benchmark.facts import ModelFacts
from kinegraph.benchmark.settings import Settings

Kind = Literal["clips", "steps", "products"]
Status = Literal["waiting", "measured", "unavailable", "failed"]
STEPS_BACKEND = "step by step"


@dataclass
class Lane:
    """One configuration: what was measured of it so far. `size` is clips at once, for steps people at once.

    status   waiting: nothing measured yet; unavailable: not installed, or it does not support the model; failed
    """

    kind: Kind
    backend: str
    threads: int
    size: int
    status: Status = "waiting"
    reason: str = ""
    latencies_s: list[float] = field(default_factory=list)
    spent_s: float = 0.0
    pipeline_s: float = 0.0
    cpu_s: float = 0.0
    first_s: float = 0.0
    load_s: float = 0.0
    memory_bytes: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def can_run(self) -> bool:
        return self.status in ("waiting", "measured")

    def add(self, answer: dict[str, Any]) -> None:
        """Take in a slice: an answer to `measure`."""
        self.status = "measured"
        self.latencies_s += answer["latencies_s"]
        self.spent_s += sum(answer["latencies_s"])
        self.pipeline_s += answer["pipeline_s"]
        self.cpu_s += answer["cpu_s"]

    def give_up(self, reason: str, is_refusal: bool) -> None:
        """Say why there is no (more) measurement. What was measured before a failure does not count."""
        self.status, self.reason = ("unavailable" if is_refusal else "failed"), " ".join(reason.split())


@dataclass
class Station:
    """One process with its lanes, and what it is told when it is opened."""

    request: dict[str, Any]
    threads: int
    lanes: list[Lane]

    @property
    def name(self) -> str:
        lane = self.lanes[0]
        return f"{lane.backend}, {lane.threads} thread{'s' if lane.threads > 1 else ''}"


def plan_stations(settings: Settings, facts: ModelFacts) -> list[Station]:
    """One for each backend and thread count, one for each thread count of the rest. Sizes ascend: that the peak of the
    memory is read after each of them depends on it.
    """
    stations = []
    for threads in settings.threads:
        for backend in settings.backends:
            stations.append(_make_station("clips", backend, threads, settings.batches, settings, facts))
    people = tuple(sorted({1, max(settings.batches)}))
    for threads in settings.threads:
        stations.append(_make_station("steps", STEPS_BACKEND, threads, people, settings, facts))
        stations.append(_make_station("products", "matrix product", threads, (1,), settings, facts))
    return stations


def _make_station(
    kind: Kind, backend: str, threads: int, sizes: tuple[int, ...], settings: Settings, facts: ModelFacts
) -> Station:
    request = {
        "do": "open",
        "kind": kind,
        "model": str(facts.path),
        "backend": backend,
        "threads": threads,
        "device": settings.device,
        "sizes": list(sizes),
        "shape": list(facts.data_shape if kind == "steps" else facts.clip_shape),
        "data": None if facts.data_path is None else str(facts.data_path),
    }
    return Station(request, threads, [Lane(kind, backend, threads, size) for size in sizes])
