"""Lines of strangers: what is taken, what is left out and how that is told."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kinegraph.live import frames
from kinegraph.live.frames import LineBuffer, Observation, parse_line, read_joints, split_by_person

JOINTS = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: (
        st.lists(children, max_size=4)
        | st.dictionaries(st.sampled_from(["person", "time", "joints", "people", "x"]), children, max_size=4)
    ),
    max_leaves=20,
)


def parse(data: Any) -> tuple[list[Observation], list[str]]:
    found, faults = parse_line(json.dumps(data).encode(), "line 1")
    return found, [f"{fault.kind} {fault.where}: {fault.got}" for fault in faults]


def test_lines() -> None:
    one = parse_line(b'{"person": "a", "time": 1.5, "joints": [[1, 2, 3], [4, 5, 6]]}', "line 1")
    assert one == ([Observation("a", 1.5, [[1, 2, 3], [4, 5, 6]])], [])
    several = {"time": 2, "people": [{"person": 7, "joints": JOINTS}, {"joints": []}, {"person": "b", "joints": []}]}
    found, faults = parse(several)
    assert found == [Observation("7", 2.0, JOINTS), Observation("b", 2.0, [])]
    assert faults == ["malformed line 1.people[1].person: nothing"]
    assert parse({"time": 2, "people": []}) == parse_line(b"", "line 1") == parse_line(b" \r", "line 1") == ([], [])


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"{", "line 1: '{' (Expecting property name enclosed in double quotes at 1)"),
        (b"\xff\xfex", "line 1: '"),
        (b"[1, 2]", "line 1: a JSON list of 2"),
        (b"null", "line 1: nothing"),
        (b"[" * 100_000, "line 1: lists in lists"),
        (b"1" * 5000, "line 1: '111"),
        (b'{"person": "a", "joints": []}', "line 1.time: nothing"),
        (b'{"person": "a", "joints": [], "time": "1"}', "line 1.time: '1'"),
        (b'{"person": "a", "joints": [], "time": true}', "line 1.time: True"),
        (b'{"person": "a", "joints": [], "time": NaN}', "line 1.time: nan"),
        (b'{"person": "a", "joints": [], "time": 1e12}', "line 1.time: 1000000000000.0"),
        (b'{"person": "a", "joints": [], "time": ' + b"9" * 400 + b"}", "line 1.time: a huge number"),
        (b'{"person": "", "joints": [], "time": 1}', "line 1.person: ''"),
        (b'{"person": 1.5, "joints": [], "time": 1}', "line 1.person: 1.5"),
        (b'{"person": true, "joints": [], "time": 1}', "line 1.person: True"),
        (b'{"person": 18446744073709551616, "joints": [], "time": 1}', "line 1.person: 18446744073709551616"),
        (b'{"person": "' + b"a" * 201 + b'", "joints": [], "time": 1}', "line 1.person: 'aaa"),
        (b'{"person": "a", "joints": {}, "time": 1}', "line 1.joints: a JSON object of 0"),
        (b'{"time": 1, "people": {}}', "line 1.people: a JSON object of 0"),
        (b'{"time": 1, "people": [3]}', "line 1.people[0]: 3"),
        (b'{"time": 1, "people": [' + b",".join([b"0"] * 10_001) + b"]}", "line 1.people: a JSON list of 10001"),
    ],
)
def test_malformed_lines(line: bytes, expected: str) -> None:
    found, faults = parse_line(line, "line 1")
    assert found == []
    assert len(faults) == 1
    assert faults[0].kind == "malformed"
    text = f"{faults[0].where}: {faults[0].got}"
    assert text.startswith(expected)
    assert len(text) < 300 and faults[0].expected


@given(st.binary(max_size=200))
def test_any_bytes(line: bytes) -> None:
    parse_line(line, "line 1")


@settings(deadline=None)
@given(JSON, st.floats(-10, 10))
def test_any_json(data: Any, time: float) -> None:
    for value in (data, {"person": "a", "time": time, "joints": [data, data]}, {"time": time, "people": [data]}):
        found, _ = parse_line(json.dumps(value).encode(), "line 1")
        values, chosen, more = read_joints(found, 2, 3)
        assert values.shape == (len(chosen), 2, 3) and values.dtype == np.float32
        assert len(chosen) + len(more) == len(found)
        is_nan = np.isnan(values)
        assert (np.abs(values[~is_nan]) <= frames.MAX_COORDINATE).all()
        assert (is_nan.any(axis=2) == is_nan.all(axis=2)).all()


def read(*joints: Any) -> tuple[np.ndarray, list[int], list[str]]:
    values, chosen, faults = read_joints([Observation("a", 0.0, item) for item in joints], 2, 3)
    return values, chosen, [fault.got for fault in faults]


@pytest.mark.parametrize("kind", ["int16", "int32", "uint16", "int64", "float16", "float32", "float64"])
def test_joints_of_any_numpy_type(kind: str) -> None:
    array = np.arange(6).reshape(2, 3).astype(kind)
    values, chosen, faults = read(array, array.tolist())
    np.testing.assert_array_equal(values, np.stack([array, array]).astype(np.float32))
    assert (chosen, faults) == ([0, 1], [])
    assert read(array[:, :1])[2] == ["2 joints of 1 numbers"]


def test_joints() -> None:
    scored = [[*joint, 0.7] for joint in JOINTS]
    values, chosen, faults = read(JOINTS, scored)
    np.testing.assert_array_equal(values, np.array([JOINTS, JOINTS], np.float32))
    assert (chosen, faults) == ([0, 1], [])
    # Not found: null, NaN, infinite, huge; the other joint stays
    for lost in (None, [None, 2, 3], [1, float("nan"), 3], [1, 2, float("inf")], [1, 2, -1e7], [10**400, 2, 3]):
        values, chosen, faults = read([lost, JOINTS[1]], JOINTS)
        assert np.isnan(values[0, 0]).all()
        np.testing.assert_array_equal(values[:, 1], [JOINTS[1], JOINTS[1]])
        np.testing.assert_array_equal(values[1, 0], JOINTS[0])
        assert (chosen, faults) == ([0, 1], [])
    # A score that is not finite loses nothing: it is not used
    assert np.isfinite(read([[1, 2, 3, float("nan")], [1, 2, 3, None]])[0]).all()
    # Some joints with a score, some without
    np.testing.assert_array_equal(read([scored[0], JOINTS[1]])[0][0], JOINTS)


@pytest.mark.parametrize(
    "joints",
    [
        [],
        [[1, 2, 3]],
        [[1, 2], [3, 4]],
        [[1, 2, 3, 4, 5]] * 2,
        [[1, 2, 3], 4],
        [[1, 2, 3], {}],
        [[1, 2, 3], [1, 2, {}]],
        [[1, 2, 3], [1, 2, "x"]],
        [[1, 2, 3], [1, 2, "1.5"]],
        [["1", "2", "3"], ["4", "5", "6"]],
        [[1, 2, 3, "0.9"], [4, 5, 6, "0.9"]],
        [[1, 2, 3], [1, 2, True]],
        ["123", "456"],
        [{"1": 0, "2": 0, "3": 0}] * 2,
        [[[1, 2, 3]] * 2] * 2,
        [None, None, None],
        ["a", "b"],
        [[1, 2, 3], [1, 2, [3]]],
    ],
)
def test_joints_that_make_no_sense(joints: Any) -> None:
    values, chosen, faults = read(JOINTS, joints, JOINTS)
    assert chosen == [0, 2]
    assert len(values) == 2
    assert len(faults) == 1 and "joints of" in faults[0]


def test_texts_among_numbers_cost_no_memory() -> None:
    """An array of texts would have room for the longest one at every place."""
    joints = [["x" * 1_000_000, *[0] * 100_000]] * 2
    tracemalloc.start()
    assert read(joints)[1] == []
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000_000


@settings(deadline=None)
@given(st.lists(st.binary(max_size=12), max_size=12), st.lists(st.integers(0, 60), max_size=6))
def test_lines_do_not_depend_on_where_data_is_cut(parts: list[bytes], cuts: list[int]) -> None:
    data = b"\n".join(parts)
    buffer, lines = LineBuffer(), []
    places = [0, *sorted(cuts), len(data)]
    for first, last in itertools.pairwise(places):
        lines += buffer.add(data[first:last])
    lines += buffer.close()
    whole = data.split(b"\n")
    assert lines == (whole if whole[-1] else whole[:-1])


def test_long_lines_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "MAX_LINE_BYTES", 10)
    buffer = LineBuffer()
    assert buffer.add(b"short\n" + b"x" * 8) == [b"short"]
    assert buffer.add(b"x" * 8) == []
    for _ in range(100):
        assert buffer.add(b"x" * 8) == []
        assert buffer.size_bytes == 0 and buffer.parts == []
    assert buffer.add(b"x\nnext\n\n1234567890\n") == [b"", b"next", b"", b"1234567890"]
    assert buffer.num_skipped == 1
    buffer.add(b"12345678901\n")
    assert buffer.num_skipped == 2


@given(st.lists(st.sampled_from("abcd"), max_size=30), st.integers(1, 5))
def test_groups_hold_nobody_twice(people: list[str], limit: int) -> None:
    observations = [Observation(person, float(i), []) for i, person in enumerate(people)]
    groups = list(split_by_person(observations, limit))
    assert [item for group in groups for item in group] == observations
    assert all(0 < len({item.person for item in group}) == len(group) <= limit for group in groups)
