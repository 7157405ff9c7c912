"""What an online model remembers about people, as a value: nothing is hidden in the model."""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kinegraph.errors import DataError, Problem
from kinegraph.whole_numbers import check_whole_number

HEADER = "header"
MAX_STATE_BYTES = 1 << 30
MAX_HEADER_BYTES = 4096
MAX_PHASE = 1 << 31


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
            _check_entries(archive, like)
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        phase = check_whole_number(json.loads(arrays.pop(HEADER).tobytes())["phase"], "phase", 0, MAX_PHASE - 1)
        state = State(phase, arrays)
        if describe(state) != describe(like) or len({len(array) for array in arrays.values()}) != 1:
            raise ValueError("arrays of other names, shapes or types")
    except Exception as error:  # zip files and arrays have many ways to be damaged, each with an error of its own
        got = f"damaged or foreign content ({type(error).__name__}: {str(error)[:200]})"
        raise DataError(Problem("online state", got, "a state of this model, from to_bytes")) from None
    return state


def _check_entries(archive: zipfile.ZipFile, like: State) -> None:
    """Raises ValueError for an entry whose header promises other than `like` has, before memory is taken for it."""
    expected = describe(like)
    if sum(entry.file_size for entry in archive.infolist()) > MAX_STATE_BYTES:
        raise ValueError(f"more than {MAX_STATE_BYTES} bytes")
    for entry in archive.infolist():
        with archive.open(entry) as stream:
            np.lib.format.read_magic(stream)
            shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
        name = entry.filename.removesuffix(".npy")
        if dtype.hasobject or math.prod(shape) * dtype.itemsize > entry.file_size:
            raise ValueError(f"{name}: shape {shape} of {dtype} in {entry.file_size} bytes")
        if name != HEADER and expected.get(name) != (shape[1:], dtype.str):
            raise ValueError(f"{name}: shape {shape} of {dtype}")
        if name == HEADER and entry.file_size > MAX_HEADER_BYTES:
            raise ValueError("a long header")


def describe(state: State) -> dict[str, tuple[tuple[int, ...], str]]:
    """Key -> shape without the axis of people, and dtype."""
    return {key: (array.shape[1:], array.dtype.str) for key, array in state.arrays.items()}
