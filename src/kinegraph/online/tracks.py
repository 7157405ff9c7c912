"""Many people who come and go: who is in step with whom is stepped together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from kinegraph.online.model import OnlineModel
from kinegraph.online.state import State, join_states

Array = NDArray[np.float32]


class TrackPool:
    """The states of all tracked people of one model, in one batch for each phase of its stride."""

    def __init__(self, model: OnlineModel, pooling_frames: int | None = None) -> None:
        self.model = model
        self.newcomer = model.start(1, pooling_frames)
        self.groups: dict[int, tuple[list[str], State]] = {}

    def __len__(self) -> int:
        return sum(len(people) for people, _ in self.groups.values())

    def update(self, frames: Mapping[str, Array]) -> dict[str, NDArray[np.float64]]:
        """person -> its next frame (C, V); answers person -> probabilities (classes,), of those who have some already.

        Unknown people start here; people without a frame wait. Raises DataError for a frame of another shape or with
        values that are not finite; then nobody is stepped.
        """
        arrays = {person: self.model.check_frame(frame, person) for person, frame in frames.items()}
        answers: dict[str, NDArray[np.float64]] = {}
        stepped: list[tuple[list[str], State]] = []
        waiting: list[tuple[list[str], State]] = []
        for people, state in self._list_due(arrays, waiting):
            probabilities, state = self.model.step(np.stack([arrays[person] for person in people]), state)
            stepped.append((people, state))
            has_answer = np.isfinite(probabilities[:, 0])
            answers.update(
                (person, row) for person, row, valid in zip(people, probabilities, has_answer, strict=True) if valid
            )
        self.groups = _gather([*waiting, *stepped])
        return answers

    def forget(self, person: str) -> None:
        """Drop a person's state; of somebody unknown: nothing."""
        for phase, (people, state) in self.groups.items():
            if person in people:
                kept = [place for place, name in enumerate(people) if name != person]
                if kept:
                    self.groups[phase] = _select(people, state, kept)
                else:
                    del self.groups[phase]
                return

    def _list_due(
        self, frames: Mapping[str, Array], waiting: list[tuple[list[str], State]]
    ) -> list[tuple[list[str], State]]:
        """Groups to step; the others go to `waiting`."""
        due = []
        known: set[str] = set()
        for people, state in self.groups.values():
            known.update(people)
            here = [place for place, person in enumerate(people) if person in frames]
            if len(here) == len(people):
                due.append((people, state))
                continue
            there = [place for place, person in enumerate(people) if person not in frames]
            waiting.append(_select(people, state, there))
            if here:
                due.append(_select(people, state, here))
        new = [person for person in frames if person not in known]
        if new:
            start = self.newcomer.select(np.zeros(len(new), np.int64))
            due.append((new, start))
        return list(_gather(due).values())


def _select(people: list[str], state: State, places: Sequence[int]) -> tuple[list[str], State]:
    return [people[place] for place in places], state.select(places)


def _gather(groups: list[tuple[list[str], State]]) -> dict[int, tuple[list[str], State]]:
    """One group for each phase."""
    by_phase: dict[int, list[tuple[list[str], State]]] = {}
    for group in groups:
        by_phase.setdefault(group[1].phase, []).append(group)
    return {
        phase: (
            [person for people, _ in members for person in people],
            join_states([state for _, state in members]),
        )
        for phase, members in by_phase.items()
    }
