"""Label files: a name and a class for every clip, from .pkl, .json, .npz, .npy or .csv."""

from __future__ import annotations

import csv
import io
import json
import reprlib
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kinegraph.data.arrays import read_array_header
from kinegraph.data.plain_pickle import read_plain_pickle
from kinegraph.errors import DataError, Problem, look_up, suggest

MAX_FILE_BYTES = 256 * 1024 * 1024
MAX_PROBLEMS = 20
LABEL_LIMIT = 2**31
NAME_KEYS = ("names", "name")
LABEL_KEYS = ("labels", "label")


@dataclass(frozen=True)
class Labels:
    """The clips of a data set in the order of its array.

    `labels` is int64 (N,). `class_names` are the distinct class names where the file holds names instead of
    numbers and no label map says otherwise: label i is then `class_names[i]`.
    """

    names: list[str]
    labels: np.ndarray
    class_names: list[str] | None


def read_labels(path: str | Path, label_map: Mapping[str, int] | None = None) -> Labels:
    """The labels of a file. Class names become numbers by `label_map`, or without one by their sorted order.

    .pkl   a pickle of (sample names, labels); only plain values are read, nothing in it is run
    .json  {"names": [...], "labels": [...]}, {name: label, ...}, or a list of labels
    .npz   arrays `labels` and, if there are any, `names`
    .npy   the labels alone
    .csv   a table with the columns `label` and, if there are any, `name`

    Clips without a name are called clip_0, clip_1, ... Every fault is a DataError that tells the place in the
    file.
    """
    path = Path(path)
    read = look_up(READERS, path.suffix.lower(), str(path), DataError)
    names, values = read(_read_bytes(path), str(path))
    if not values:
        raise DataError(Problem(str(path), "no labels", "one label for each clip"))
    if names is None:
        names = [f"clip_{i}" for i in range(len(values))]
    elif len(names) != len(values):
        got = f"{len(names)} names and {len(values)} labels"
        raise DataError(Problem(str(path), got, "as many names as labels"))
    names = _convert_names(names, str(path))
    if _are_class_names(values, label_map):
        return _number_class_names(names, values, label_map, str(path))
    return Labels(names, _convert_labels(values, str(path)), None)


def _read_bytes(path: Path) -> bytes:
    if not path.is_file():
        got = "a folder" if path.is_dir() else "no such file"
        raise DataError(Problem(str(path), got, "a label file: " + ", ".join(READERS)))
    try:
        size_bytes = path.stat().st_size
        if size_bytes > MAX_FILE_BYTES:
            expected = f"a label file of at most {MAX_FILE_BYTES} bytes"
            raise DataError(Problem(str(path), f"{size_bytes} bytes", expected))
        return path.read_bytes()
    except OSError as error:
        raise DataError(Problem(str(path), error.strerror or str(error), "a readable label file")) from None


def _read_pickle(content: bytes, where: str) -> tuple[list[Any] | None, list[Any]]:
    value = read_plain_pickle(content, where)
    if isinstance(value, list) and len(value) == 2:
        names, labels = value
        return _as_list(names, f"{where}: sample names"), _as_list(labels, f"{where}: labels")
    raise DataError(Problem(where, _describe(value), "a pickle of (sample_names, labels), two lists"))


def _read_json(content: bytes, where: str) -> tuple[list[Any] | None, list[Any]]:
    try:
        value = json.loads(content.decode("utf-8-sig"), object_pairs_hook=_refuse_repeated_keys)
    except (ValueError, RecursionError) as error:
        expected = 'JSON: {"names": [...], "labels": [...]}, {name: label, ...} or a list of labels'
        raise DataError(Problem(where, str(error)[:200], expected)) from None
    if isinstance(value, list):
        return None, value
    if not isinstance(value, dict):
        raise DataError(Problem(where, _describe(value), "an object or a list"))
    label_key = _find_key(value, LABEL_KEYS)
    if label_key is None or not isinstance(value[label_key], list):
        return list(value), list(value.values())
    name_key = _find_key(value, NAME_KEYS)
    names = None if name_key is None else _as_list(value[name_key], f"{where}: {name_key}")
    return names, value[label_key]


def _refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        (repeated, count), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the name {repeated!r} {count} times, so labels would be lost")
    return mapping


def _read_npz(content: bytes, where: str) -> tuple[list[Any] | None, list[Any]]:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            keys = {name.removesuffix(".npy"): name for name in archive.namelist()}
            label_key, name_key = _find_key(keys, LABEL_KEYS), _find_key(keys, NAME_KEYS)
            if label_key is None:
                got = "the arrays " + reprlib.repr(list(keys))
                raise DataError(Problem(where, got, "an array named label or labels"))
            labels = _read_npz_array(archive, keys[label_key], f"{where}: {label_key}")
            if name_key is None:
                return None, labels
            return _read_npz_array(archive, keys[name_key], f"{where}: {name_key}"), labels
    except DataError:
        raise
    except Exception as error:  # a forged archive can raise anything
        got = f"a damaged archive ({type(error).__name__}: {str(error)[:200]})"
        hint = "Write it with numpy.savez(path, names=names, labels=labels)."
        raise DataError(Problem(where, got, "an .npz file", hint)) from None


def _read_npy(content: bytes, where: str) -> tuple[list[Any] | None, list[Any]]:
    return None, _read_flat_array(io.BytesIO(content), len(content), where)


def _read_npz_array(archive: zipfile.ZipFile, member: str, where: str) -> list[Any]:
    """A 1-D array of an archive; its sizes are checked before anything is unpacked."""
    size_bytes = archive.getinfo(member).file_size
    if size_bytes > MAX_FILE_BYTES:
        raise DataError(Problem(where, f"{size_bytes} bytes unpacked", f"at most {MAX_FILE_BYTES} bytes"))
    return _read_flat_array(io.BytesIO(archive.read(member)), size_bytes, where)


def _read_flat_array(stream: io.BytesIO, size_bytes: int, where: str) -> list[Any]:
    header = read_array_header(stream, where)
    if header.dtype.hasobject:
        hint = "Text: numpy.array(names, dtype=str)."
        raise DataError(Problem(where, "an array of Python objects", "numbers or text", hint))
    if len(header.shape) != 1 or header.dtype.kind not in "iufUSb":
        got = f"shape {header.shape} of {header.dtype}"
        raise DataError(Problem(where, got, "a 1-D array of numbers or text"))
    if header.offset + header.size_bytes > size_bytes:
        got = f"{size_bytes} bytes for shape {header.shape} of {header.dtype}"
        raise DataError(Problem(where, got, f"{header.offset + header.size_bytes} bytes"))
    return np.frombuffer(stream.getbuffer(), header.dtype, header.shape[0], header.offset).tolist()


def _read_csv(content: bytes, where: str) -> tuple[list[Any] | None, list[Any]]:
    try:
        rows = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
        header = [cell.strip().lower() for cell in next(rows, [])]
        label_key, name_key = _find_key(header, LABEL_KEYS), _find_key(header, NAME_KEYS)
        if label_key is None:
            hint = "The first line names the columns: name,label."
            raise DataError(Problem(f"{where}: line 1", reprlib.repr(header), "a column named label", hint))
        label_column = header.index(label_key)
        name_column = None if name_key is None else header.index(name_key)
        names: list[str] = []
        labels: list[str] = []
        problems: list[Problem] = []
        for row in rows:
            if not row:
                continue
            if len(row) != len(header):
                place = f"{where}: line {rows.line_num}"
                problems.append(Problem(place, f"{len(row)} cells", f"{len(header)}, as in the first line"))
                continue
            labels.append(row[label_column].strip())
            names.append(str(len(names)) if name_column is None else row[name_column])
    except (csv.Error, UnicodeDecodeError) as error:
        hint = "Save the table as UTF-8 text with commas."
        expected = "a CSV table with the columns name,label"
        raise DataError(Problem(where, str(error)[:200], expected, hint)) from None
    if problems:
        raise DataError(*_limit(problems, where))
    return (None if name_column is None else names), labels


READERS: dict[str, Callable[[bytes, str], tuple[list[Any] | None, list[Any]]]] = {
    ".pkl": _read_pickle,
    ".json": _read_json,
    ".npz": _read_npz,
    ".npy": _read_npy,
    ".csv": _read_csv,
}


def _find_key(keys: Any, wanted: tuple[str, ...]) -> str | None:
    return next((key for key in wanted if key in keys), None)


def _as_list(value: Any, where: str) -> list[Any]:
    if isinstance(value, np.ndarray) and value.ndim == 1:
        return value.tolist()
    if isinstance(value, list | tuple):
        return list(value)
    raise DataError(Problem(where, _describe(value), "a list"))


def _describe(value: Any) -> str:
    """The kind of a value in a few words; never its whole content."""
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape}"
    if isinstance(value, list | tuple | dict | str | bytes):
        return f"a {type(value).__name__} of length {len(value)}"
    return f"{type(value).__name__} {reprlib.repr(value)}"


def _limit(problems: list[Problem], where: str) -> list[Problem]:
    """The first problems; a wrong column gives thousands of equal ones."""
    if len(problems) <= MAX_PROBLEMS:
        return problems
    rest = Problem(where, f"{len(problems) - MAX_PROBLEMS} more problems of this kind", "none")
    return [*problems[:MAX_PROBLEMS], rest]


def _convert_names(names: list[Any], where: str) -> list[str]:
    if set(map(type, names)) == {str} and _is_encodable("".join(names)):
        return names
    converted, problems = [], []
    for i, name in enumerate(names):
        if isinstance(name, bytes):
            name = name.decode("utf-8", errors="replace")
        if isinstance(name, str | int) and not isinstance(name, bool):
            # A lone surrogate, which a pickle or an escape in JSON may hold, cannot be written to any file
            converted.append(str(name).encode("utf-8", "replace").decode())
        else:
            problems.append(Problem(f"{where}: sample name {i}", _describe(name), "text"))
    if problems:
        raise DataError(*_limit(problems, where))
    return converted


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_number(text: str) -> bool:
    """Whether a cell of a table holds a whole number rather than a class name."""
    return text.isascii() and text.removeprefix("-").isdigit()


def _are_class_names(values: list[Any], label_map: Mapping[str, int] | None) -> bool:
    if set(map(type, values)) == {int}:
        return False
    if any(isinstance(value, str) and not _is_number(value) for value in values):
        return True
    # Classes may be called "1", "2", ...: the label map decides.
    return label_map is not None and all(isinstance(value, str) and value in label_map for value in values)


def _convert_labels(values: list[Any], where: str) -> np.ndarray:
    if set(map(type, values)) == {int} and max(max(values), -min(values)) < LABEL_LIMIT:
        return np.array(values, np.int64)
    labels = np.zeros(len(values), np.int64)
    problems = []
    for i, value in enumerate(values):
        is_text = isinstance(value, str) and len(value) <= 11
        is_whole = isinstance(value, float) and value.is_integer()
        if (is_text or is_whole or isinstance(value, int)) and not isinstance(value, bool):
            number = int(value)
            if abs(number) < LABEL_LIMIT:
                labels[i] = number
                continue
        problems.append(Problem(f"{where}: label {i}", _describe(value), "a whole number or a class name"))
    if problems:
        raise DataError(*_limit(problems, where))
    return labels


def _number_class_names(names: list[str], values: list[Any], label_map: Mapping[str, int] | None, where: str) -> Labels:
    problems = [
        Problem(f"{where}: label {i}", _describe(value) if value else "an empty label", "a class name")
        for i, value in enumerate(values)
        if not isinstance(value, str) or not value
    ]
    if problems:
        raise DataError(*_limit(problems, where))
    class_names = sorted(set(values))
    if label_map is None:
        by_name: Mapping[str, int] = {name: i for i, name in enumerate(class_names)}
    else:
        by_name = label_map
        first_use = dict(zip(reversed(values), range(len(values) - 1, -1, -1), strict=True))
        expected = "one of the label map: " + ", ".join(label_map)
        problems = [
            Problem(f"{where}: label {first_use[name]}", repr(name), expected, suggest(name, label_map))
            for name in class_names
            if name not in label_map
        ]
        if problems:
            raise DataError(*_limit(problems, where))
    labels = np.array([by_name[value] for value in values], np.int64)
    return Labels(names, labels, class_names if label_map is None else None)
