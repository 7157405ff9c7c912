from __future__ import annotations

import codecs
import io
import json
import os
import pickle
import struct
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kinegraph.data import labels as labels_module
from kinegraph.data import plain_pickle
from kinegraph.data.labels import read_labels
from kinegraph.data.plain_pickle import ALLOWED, read_plain_pickle
from kinegraph.errors import DataError, Problem

NAMES = ["a", "b", "c", "d"]
NUMBERS = [2, 0, 1, 2]
CLASSES = ["walk", "jump", "sit", "walk"]


def write(path: Path, content: Any) -> Path:
    if path.suffix == ".pkl":
        content = pickle.dumps(content)
    elif path.suffix == ".json":
        content = json.dumps(content).encode()
    elif path.suffix == ".npz":
        stream = io.BytesIO()
        np.savez(stream, **content)
        content = stream.getvalue()
    else:
        content = content.encode()
    path.write_bytes(content)
    return path


def find_problems(path: Path, label_map: dict[str, int] | None = None) -> tuple[Problem, ...]:
    with pytest.raises(DataError) as caught:
        read_labels(path, label_map)
    for problem in caught.value.problems:
        assert problem.where.startswith(str(path)) and problem.got and problem.expected
    return caught.value.problems


NUMBERED_FILES = {
    "tuple.pkl": (NAMES, NUMBERS),
    "list.pkl": [NAMES, NUMBERS],
    "arrays.pkl": (np.array(NAMES), np.array(NUMBERS)),
    "objects.pkl": (np.array(NAMES, dtype=object), np.array(NUMBERS, dtype=object)),
    "big_endian.pkl": (NAMES, np.array(NUMBERS, ">i4")),
    "scalars.pkl": ([np.str_(name) for name in NAMES], [np.int64(label) for label in NUMBERS]),
    "floats.pkl": (NAMES, [float(label) for label in NUMBERS]),
    "bytes.pkl": ([name.encode() for name in NAMES], NUMBERS),
    "lists.json": {"names": NAMES, "labels": NUMBERS},
    "singular.json": {"name": NAMES, "label": NUMBERS},
    "mapping.json": dict(zip(NAMES, NUMBERS, strict=True)),
    "singular.npz": {"name": NAMES, "label": NUMBERS},
    "plural.npz": {"names": np.array(NAMES), "labels": np.array(NUMBERS, np.uint8)},
    "table.csv": "name,label\na,2\nb,0\nc,1\nd,2\n",
    "reordered.csv": "\ufeffLabel, split, Name\r\n2,x,a\r\n0,x,b\r\n\r\n1,y,c\r\n2,y,d\r\n",
}


@pytest.mark.parametrize("name", NUMBERED_FILES)
def test_every_format_gives_names_and_numbers(tmp_path: Path, name: str) -> None:
    labels = read_labels(write(tmp_path / name, NUMBERED_FILES[name]))
    assert labels.names == NAMES
    assert labels.labels.tolist() == NUMBERS and labels.labels.dtype == np.int64
    assert labels.class_names is None


def test_an_array_holds_labels_without_names(tmp_path: Path) -> None:
    for array, names in (
        (np.array(NUMBERS), None),
        (np.array(["sit", "jump", "sit", "walk"]), ["jump", "sit", "walk"]),
    ):
        np.save(tmp_path / "a.npy", array)
        labels = read_labels(tmp_path / "a.npy")
        assert labels.labels.tolist() == (NUMBERS if names is None else [1, 0, 1, 2])
        assert labels.class_names == names and labels.names == ["clip_0", "clip_1", "clip_2", "clip_3"]
    for wrong in (np.zeros((2, 2), int), np.array([None, 1]), np.zeros(0, int)):
        np.save(tmp_path / "a.npy", wrong)
        with pytest.raises(DataError):
            read_labels(tmp_path / "a.npy")


def test_every_suffix_is_tested() -> None:
    assert {Path(name).suffix for name in NUMBERED_FILES} | {".npy"} == set(labels_module.READERS)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", [name for name in NUMBERED_FILES if name.endswith(".pkl")])
def test_every_pickle_protocol_is_read(tmp_path: Path, name: str, protocol: int) -> None:
    path = tmp_path / name
    path.write_bytes(pickle.dumps(NUMBERED_FILES[name], protocol=protocol))
    labels = read_labels(path)
    assert labels.names == NAMES and labels.labels.tolist() == NUMBERS


def test_pickles_of_older_numpy_and_python_are_read(tmp_path: Path) -> None:
    path = tmp_path / "old.pkl"
    # NumPy 1 named its modules numpy.core; Python 2 wrote the bytes of an array as text.
    new = pickle.dumps((NAMES, np.array(NUMBERS)), protocol=2)
    old = new.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert old != new
    path.write_bytes(old)
    assert read_labels(path).labels.tolist() == NUMBERS
    content = struct.pack("<4q", *NUMBERS)
    path.write_bytes(
        b"\x80\x02](U\x01aU\x01bU\x01cU\x01decnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
        b"K\x00\x85U\x01b\x87R(K\x01K\x04\x85cnumpy\ndtype\nU\x02i8K\x00K\x01\x87R(K\x03U\x01<NNN"
        b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x20" + content + b"tb\x86."
    )
    labels = read_labels(path)
    assert labels.names == NAMES and labels.labels.tolist() == NUMBERS


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.json", NUMBERS),
        ("labels.json", {"labels": NUMBERS}),
        ("labels.npz", {"labels": NUMBERS}),
        ("labels.csv", "label\n2\n0\n1\n2\n"),
    ],
)
def test_clips_without_names_are_numbered(tmp_path: Path, name: str, content: Any) -> None:
    labels = read_labels(write(tmp_path / name, content))
    assert labels.names == ["clip_0", "clip_1", "clip_2", "clip_3"]
    assert labels.labels.tolist() == NUMBERS


@pytest.mark.parametrize("name", ["names.pkl", "names.json"])
def test_names_that_no_file_can_hold_are_replaced(tmp_path: Path, name: str) -> None:
    names = ["a\ud800b", "plain"]
    content = (names, [0, 1]) if name.endswith("pkl") else {"names": names, "labels": [0, 1]}
    assert read_labels(write(tmp_path / name, content)).names == ["a?b", "plain"]


CLASS_FILES = {
    "classes.pkl": (NAMES, CLASSES),
    "classes.json": {"names": NAMES, "labels": CLASSES},
    "mapping.json": dict(zip(NAMES, CLASSES, strict=True)),
    "classes.npz": {"name": NAMES, "label": CLASSES},
    "classes.csv": "name,label\na,walk\nb,jump\nc,sit\nd,walk\n",
}


@pytest.mark.parametrize("name", CLASS_FILES)
def test_class_names_become_numbers(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, CLASS_FILES[name])
    labels = read_labels(path)
    assert labels.class_names == ["jump", "sit", "walk"]
    assert labels.labels.tolist() == [2, 0, 1, 2]
    mapped = read_labels(path, {"sit": 0, "walk": 1, "jump": 2, "never": 3})
    assert mapped.class_names is None and mapped.labels.tolist() == [1, 2, 0, 1]
    problems = find_problems(path, {"walk": 0, "jumps": 1, "sit": 2})
    assert len(problems) == 1
    problem = problems[0]
    assert "label 1" in problem.where and problem.got == "'jump'"
    assert problem.hint == "Did you mean 'jumps'?"


def test_classes_named_by_numbers_follow_the_label_map(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "label\n7\n3\n7\n")
    assert read_labels(path).labels.tolist() == [7, 3, 7]
    assert read_labels(path, {"7": 0, "3": 1}).labels.tolist() == [0, 1, 0]
    assert read_labels(path, {"walk": 0}).labels.tolist() == [7, 3, 7]


@given(rows=st.lists(st.tuples(st.text(st.characters(exclude_categories=["Cs"])), st.integers(-9, 99)), min_size=1))
@settings(max_examples=50, deadline=None)
def test_pickle_json_and_npz_agree(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, int]]) -> None:
    folder = tmp_path_factory.mktemp("labels")
    names, numbers = [name for name, _ in rows], [number for _, number in rows]
    files = [
        write(folder / "a.pkl", (names, numbers)),
        write(folder / "b.pkl", (np.array(names, object), np.array(numbers))),
        write(folder / "a.json", {"names": names, "labels": numbers}),
    ]
    for path in files:
        labels = read_labels(path)
        assert labels.names == names and labels.labels.tolist() == numbers


class Attack:
    """Pickles as a call of any function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_tries_to_run_code_does_not(tmp_path: Path, protocol: int) -> None:
    path, witness = tmp_path / "evil.pkl", tmp_path / "witness"
    content = pickle.dumps((NAMES, Attack(os.system, f"touch {witness}")), protocol=protocol)
    path.write_bytes(content)
    (problem,) = find_problems(path)
    assert problem.got == f"a pickle that names {os.system.__module__}.system"
    assert os.system.__module__ == "posix"
    assert not witness.exists()
    pickle.loads(content)  # the attack is real: the usual reader runs it
    assert witness.exists()


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (b"cbuiltins\neval\n(S'1'\ntR.", "builtins.eval"),
        (b"(S'1'\nibuiltins\nexec\n.", "builtins.exec"),
        (b"\x80\x04\x8c\x08builtins\x8c\x07getattr\x93.", "builtins.getattr"),
        (b"\x80\x04\x8c\x05numpy\x8c\x0cndarray.tile\x93.", "numpy.ndarray.tile"),
        (pickle.dumps(({1, 2}, [1]), protocol=2), "set"),
        (pickle.dumps((NAMES, np.datetime64("2020-01-01"))), "dtype 'M8'"),
        (pickle.dumps((NAMES, Path("x"))), "Posix"),
    ],
)
def test_other_types_are_refused_by_name(tmp_path: Path, content: bytes, names: str) -> None:
    path = tmp_path / "other.pkl"
    path.write_bytes(content)
    (problem,) = find_problems(path)
    assert names in problem.got, problem.got


def array_pickle(dtype: str, shape: Any, content: Any) -> bytes:
    """A pickle of (names, array) whose array claims any dtype, shape and content."""

    class Dtype:
        def __reduce__(self) -> Any:
            return np.dtype, (dtype, False, True), (3, "<", None, None, None, -1, -1, 0)

    class Array:
        def __reduce__(self) -> Any:
            rebuild = np.zeros(1).__reduce__()
            return rebuild[0], rebuild[1], (1, shape, Dtype(), False, content)

    return pickle.dumps((NAMES, Array()))


FORGED = {
    "huge shape": array_pickle("i8", (10**12,), b"\0" * 8),
    "shape that wraps around": array_pickle("i8", (2**61 + 1,), b"\0" * 8),
    "negative shape": array_pickle("i8", (-1, -1), b"\0" * 8),
    "shape of text": array_pickle("i8", "abc", b"\0" * 8),
    "huge items": array_pickle("U9999999999", (1,), b"\0" * 8),
    "raw memory": array_pickle("V8", (4,), b"\0" * 32),
    "objects without objects": array_pickle("O8", (4,), b"\0" * 32),
    "number as content": array_pickle("i8", (1,), 10**10),
    "two axes of objects": array_pickle("O8", (2, 2), [1, 2, 3, 4]),
    "call of ndarray": b"\x80\x02cnumpy\nndarray\nJ\x00\xca\x9a\x3b\x85R.",
    "sized bytes": b"\x80\x02c__builtin__\nbytes\nJ\x00\xca\x9a\x3b\x85R.",
    "memo number": b"\x80\x02]r\xff\xff\xff\xff.",
    "memo number as text": b"]p4294967295\n.",
    "long text": b"\x80\x04\x8d\xff\xff\xff\xff\x00\x00\x00\x00a.",
    "long bytearray": b"\x80\x05\x96\xff\xff\xff\xff\x0f\x00\x00\x00a.",
    "extension": b"\x80\x02\x82\x01.",
    "persistent number": b"Pabc\n.",
    "changed constructor": b"\x80\x02cnumpy\ndtype\nN}U\x04makeK\x01s\x86b.",
    "encoding": b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00hex\x86R.",
    "cut": pickle.dumps((NAMES, NUMBERS))[:-5],
    "text": b"hello, this is no pickle",
    "empty": b"",
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_pickles_are_refused_without_allocating(tmp_path: Path, name: str) -> None:
    path = tmp_path / "forged.pkl"
    path.write_bytes(FORGED[name])
    tracemalloc.start()
    try:
        (problem,) = find_problems(path)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "more than plain values" in problem.got or "of length" in problem.got, problem.got
    assert peak_bytes < 5_000_000


def test_allowed_names_are_few() -> None:
    modules = {module for module, _ in ALLOWED}
    assert {module.split(".")[0] for module in modules} == {"numpy", "_codecs", "builtins", "__builtin__"}
    assert {name for module, name in ALLOWED if "builtin" in module} == {"bytes"}
    assert codecs.encode not in ALLOWED.values() and np.dtype not in ALLOWED.values()


def test_a_pickle_of_too_many_opcodes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_pickle, "MAX_OPCODES", 100)
    with pytest.raises(DataError, match="more than 100 opcodes"):
        read_plain_pickle(pickle.dumps(list(range(200))), "a.pkl")


@pytest.mark.parametrize("name", ["a.pkl", "a.json", "a.npz", "a.csv"])
def test_large_missing_and_empty_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = tmp_path / name
    assert find_problems(path)[0].got == "no such file"
    path.mkdir()
    assert find_problems(path)[0].got == "a folder"
    path.rmdir()
    path.write_bytes(b"")
    find_problems(path)
    path.write_bytes(b"x" * 101)
    monkeypatch.setattr(labels_module, "MAX_FILE_BYTES", 100)
    assert find_problems(path)[0].got == "101 bytes"


def test_an_unknown_suffix_names_the_known_ones(tmp_path: Path) -> None:
    (problem,) = find_problems(tmp_path / "labels.cvs")
    assert problem.got == "'.cvs'" and problem.hint == "Did you mean '.csv'?"
    assert all(suffix in problem.expected for suffix in (".pkl", ".json", ".npz", ".csv"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("other.pkl", (NAMES, NUMBERS[:3]), "4 names and 3 labels"),
        ("three.pkl", (NAMES, NUMBERS, NUMBERS), "length 3"),
        ("text.pkl", (NAMES, "abcd"), "a str of length 4"),
        ("matrix.pkl", (NAMES, np.zeros((4, 2))), "shape (4, 2)"),
        ("half.pkl", (NAMES, [0, 1, 0.5, 2]), "float 0.5"),
        ("nan.pkl", (NAMES, [0, 1, float("nan"), 2]), "nan"),
        ("boolean.pkl", (NAMES, [0, 1, True, 2]), "bool True"),
        ("nested.pkl", (NAMES, [0, 1, [2], 2]), "a list of length 1"),
        ("huge.pkl", (NAMES, [0, 1, 2**40, 2]), "int 1099511627776"),
        ("names.pkl", (["a", "b", None, "d"], NUMBERS), "None"),
        ("none.pkl", ([], []), "no labels"),
        ("none.json", [], "no labels"),
        ("number.json", 3, "int 3"),
        ("mixed.json", {"labels": ["walk", 3]}, "int 3"),
        ("blank.json", {"labels": ["walk", ""]}, "an empty label"),
        ("names.json", {"names": "ab", "labels": [1, 2]}, "a str of length 2"),
        ("none.npz", {"scores": [1, 2]}, "scores"),
        ("matrix.npz", {"labels": [[1, 2]]}, "(1, 2)"),
        ("objects.npz", {"labels": np.array([1, "a"], dtype=object)}, "objects"),
        ("complex.npz", {"labels": np.array([1j])}, "complex128"),
        ("none.csv", "name,class\na,1\n", "class"),
        ("header.csv", "name,label\n", "no labels"),
        ("blank.csv", "name,label\na,\n", "an empty label"),
    ],
)
def test_malformed_files_are_described(tmp_path: Path, name: str, content: Any, words: str) -> None:
    (problem,) = find_problems(write(tmp_path / name, content))
    assert words in problem.got, problem.got


def test_damaged_text_and_archives_are_described(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'{"a": 1, "b": 2, "a": 3}')
    assert "'a' 2 times" in find_problems(path)[0].got
    for content in (b'{"a": 1', b"\xff\xfe", b"[" * 100_000, b"[" + b"9" * 5000 + b"]"):
        path.write_bytes(content)
        find_problems(path)
    path = tmp_path / "a.csv"
    for content in (
        b"name,label\n\xff,1\n",
        b'name,label\n"a,1\n',
        b"name,label\n" + b"a" * 200_000 + b",1\n",
    ):
        path.write_bytes(content)
        find_problems(path)
    path = write(tmp_path / "a.npz", {"labels": NUMBERS})
    content = path.read_bytes()
    for damaged in (
        content[:-30],
        content[: len(content) // 2],
        b"PK\x03\x04",
        content.replace(b"NUMPY", b"NUMPI"),
    ):
        path.write_bytes(damaged)
        find_problems(path)


def test_all_bad_rows_are_told_together(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'name,label\na,1\nb\n"c\nc",2\nd,1,2\n')
    problems = find_problems(path)
    assert [problem.where for problem in problems] == [f"{path}: line 3", f"{path}: line 6"]
    problems = find_problems(write(tmp_path / "b.pkl", (["a"] * 500, [0.5] * 500)))
    assert len(problems) == labels_module.MAX_PROBLEMS + 1
    assert "480 more" in problems[-1].got


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bomb.npz"
    monkeypatch.setattr(labels_module, "MAX_FILE_BYTES", 1_000_000)
    np.savez_compressed(path, labels=np.zeros(1_000_000, np.int64))
    assert path.stat().st_size < 100_000
    assert "bytes unpacked" in find_problems(path)[0].got
    # A header that promises more than the member holds.
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<i8", "fortran_order": False, "shape": (10**12,)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("labels.npy", stream.getvalue() + b"\0" * 8)
    assert "(1000000000000,)" in find_problems(path)[0].got
