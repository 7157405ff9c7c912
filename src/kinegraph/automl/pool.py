"""What trains for a study, whatever machines it has."""

from __future__ import annotations

from typing import Any, Protocol

from kinegraph.automl.workers import Outcome


class TrainingPool(Protocol):
    """Trainings side by side: submit one where `num_free` allows it, wait for the next that ends."""

    @property
    def num_free(self) -> int: ...

    def submit(self, name: str, spec: dict[str, Any]) -> None: ...

    def wait(self, timeout_s: float) -> Outcome | None: ...
