"""What an online model remembers about people, as a value: nothing is hidden in the model."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kinegraph.errors import DataError, Problem

HEADER = "header"
MAX_STATE_BYTES = 1 << 30


@dataclass(frozen=True, eq=False)
class State:
    """Arrays with an entry for each of N people along their first axis, and `phase`: frames seen modulo the stride of
    the model. People of one phase can be in one state, whenever they came.
    """

    phase: int
    arrays: dict[str, NDArray[Any]]

    @property
    def num_people(self) -> int:
        return len(self.arrays["age"])

    @property
    def size_bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())

    def select(self, people: Sequence[int] | NDArray[np.int64]) -> State:
        """The state of some of the people, by their places; a copy."""
        places = np.asarray(people, np.int64)
        return State(self.phase, {key: array[places] for key, array in self.arrays.items()})

    def to_bytes(self) -> bytes:
        """The state for a file or another process; `from_bytes` reads it back exactly."""
        buffer = io.BytesIO()
        header = np.frombuffer(json.dumps({"phase": self.phase}).encode(), np.uint8)
        np.savez(buffer, allow_pickle=False, **{HEADER: header}, **self.arrays)
        return buffer.getvalue()


def join_states(states: Sequence[State]) -> State:
    """One state for the people of several, in their order. Raises DataError where phases or arrays differ."""
    first = states[0]
    if len(states) == 1:
        return first
    for other in states[1:]:
        if other.phase != first.phase or describe(other) != describe(first):
            got = f"states of phases {first.phase} and {other.phase}"
            hint = "Only states of one model, one pooling and one phase go together."
            raise DataError(Problem("online state", got, "states of one kind", hint))
    return State(first.phase, {key: np.concatenate([state.arrays[key] for state in states]) for key in first.arrays})


def state_from_bytes(content: bytes, like: State) -> State:
    """The opposite of `State.to_bytes`. `like` is any state of the same model and pooling, which says what is expected.

    Raises DataError for anything else. Never runs code from the content.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > MAX_STATE_BYTES:
                raise ValueError(f"more than {MAX_STATE_BYTES} bytes")
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        phase = json.loads(arrays.pop(HEADER).tobytes())["phase"]
        if type(phase) is not int or phase < 0:
            raise ValueError(f"phase {phase!r}")
        state = State(phase, arrays)
        if describe(state) != describe(like) or len({len(array) for array in arrays.values()}) != 1:
            raise ValueError("arrays of other names, shapes or types")
    except (ValueError, KeyError, TypeError, OSError, zipfile.BadZipFile, EOFError) as error:
        got = f"damaged or foreign content ({error})"
        raise DataError(Problem("online state", got, "a state of this model, from to_bytes")) from None
    return state


def describe(state: State) -> dict[str, tuple[tuple[int, ...], str]]:
    """Key -> shape without the axis of people, and dtype."""
    return {key: (array.shape[1:], array.dtype.str) for key, array in state.arrays.items()}
