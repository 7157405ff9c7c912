"""Reads pickles that hold plain values only, and runs nothing that a pickle asks for.

A pickle is a program: the usual reader calls whatever it names. Here every name in it is looked up in a short
table of our own stand-ins (for arrays, dtypes and scalars of NumPy and for bytes); any other name is refused.
The stand-ins build values from bytes that are in the file, so a forged size cannot make us allocate memory.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from collections.abc import Callable
from typing import Any

import numpy as np

from kinegraph.errors import DataError, Problem

# Each opcode makes at most one small object; the C reader also keeps a table as long as the largest memo
# number.
MAX_OPCODES = 20_000_000
MAX_ITEM_BYTES = 65536
EXTENSION_OPCODES = ("EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID", "NEXT_BUFFER")
MEMO_OPCODES = ("PUT", "BINPUT", "LONG_BINPUT")
HINT = "Save two plain lists: pickle.dump((sample_names, labels), file), or use .json, .csv or .npz."


class PlainArray:
    """Takes the state of a pickled array and becomes an array, or a list where it held objects."""

    def __init__(self, value: np.ndarray | list[Any] | None = None) -> None:
        self.value: np.ndarray | list[Any] | None = value

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, content = state
        if isinstance(content, list):
            if len(shape) != 1 or shape[0] != len(content):
                raise pickle.UnpicklingError("an array of objects with another shape than its content")
            self.value = content
        else:
            self.value = _read_array(content, dtype, shape, "F" if is_fortran else "C")


class PlainDtype:
    """A dtype by its name, such as i8 or U12, and its byte order."""

    def __init__(self, name: Any) -> None:
        if not isinstance(name, str) or name[:1] not in tuple("iufUSO") or not name[1:].isdigit():
            raise pickle.UnpicklingError(f"an array of dtype {str(name)[:40]!r}")
        if len(name) > 6 or int(name[1:]) > MAX_ITEM_BYTES:
            raise pickle.UnpicklingError(f"array items of dtype {name[:40]!r}")
        self.name = name
        self.byte_order = "="

    def __setstate__(self, state: Any) -> None:
        if state[1] not in ("<", ">", "=", "|"):
            raise pickle.UnpicklingError("a dtype with an unknown byte order")
        self.byte_order = state[1]

    def as_dtype(self) -> np.dtype:
        if self.name.startswith("O"):
            raise pickle.UnpicklingError("an array of objects without its objects")
        return np.dtype(self.byte_order + self.name)


class Constructor:
    """A callable that a pickle may name; refuses to be modified, as BUILD opcodes could otherwise do."""

    __slots__ = ("make",)

    def __init__(self, make: Callable[..., Any]) -> None:
        self.make = make

    def __call__(self, *arguments: Any) -> Any:
        return self.make(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a state for a type")


def _read_array(content: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    if isinstance(content, str):  # bytes of Python 2
        content = content.encode("latin1")
    if not isinstance(dtype, PlainDtype) or not isinstance(content, bytes | bytearray):
        raise pickle.UnpicklingError("an array without dtype or content")
    if not isinstance(shape, tuple) or not all(isinstance(size, int) and size >= 0 for size in shape):
        raise pickle.UnpicklingError("an array without a shape")
    plain = dtype.as_dtype()
    if math.prod(shape) * plain.itemsize != len(content):
        raise pickle.UnpicklingError(f"an array whose shape {shape} and {len(content)} bytes disagree")
    if not content:
        return np.zeros(0, plain)
    return np.frombuffer(content, plain).reshape(shape, order="F" if order == "F" else "C")


def _start_array(*_: Any) -> PlainArray:
    return PlainArray()


def _make_dtype(name: Any, *_: Any) -> PlainDtype:
    return PlainDtype(name)


def _make_scalar(dtype: Any, content: Any) -> Any:
    return _read_array(content, dtype, (1,), "C")[0].item()


def _make_array(content: Any, dtype: Any, shape: Any, order: Any, *_: Any) -> PlainArray:
    return PlainArray(_read_array(content, dtype, shape, order))


def _encode(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"text in the encoding {encoding[:40]!r}")
    return text.encode("latin1")


def _make_empty_bytes() -> bytes:
    return b""


def _refuse_call(*_: Any) -> None:
    raise pickle.UnpicklingError("a call of numpy.ndarray")


ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): _refuse_call,
    ("numpy", "dtype"): _make_dtype,
    ("_codecs", "encode"): _encode,
    ("builtins", "bytes"): _make_empty_bytes,
    ("__builtin__", "bytes"): _make_empty_bytes,
    # NumPy 2 writes _core, NumPy 1 wrote core.
    ("numpy._core.multiarray", "_reconstruct"): _start_array,
    ("numpy.core.multiarray", "_reconstruct"): _start_array,
    ("numpy._core.multiarray", "scalar"): _make_scalar,
    ("numpy.core.multiarray", "scalar"): _make_scalar,
    ("numpy._core.numeric", "_frombuffer"): _make_array,
    ("numpy.core.numeric", "_frombuffer"): _make_array,
}


class PlainUnpickler(pickle.Unpickler):
    """Finds nothing but the stand-ins of the table above."""

    def __init__(self, stream: io.BytesIO, where: str) -> None:
        # latin1 keeps the bytes of arrays written by Python 2.
        super().__init__(stream, encoding="latin1")
        self.where = where

    def find_class(self, module: str, name: str) -> Constructor:
        make = ALLOWED.get((module, name))
        if make is None:
            expected = "plain lists, tuples, dicts, text, numbers and NumPy arrays"
            hint = f"Nothing in the file was run. {HINT}"
            raise DataError(Problem(self.where, f"a pickle that names {module}.{name}", expected, hint))
        return Constructor(make)


def read_plain_pickle(content: bytes, where: str) -> Any:
    """The value of a pickle of lists, tuples, dicts, text, bytes, numbers, and arrays and scalars of NumPy.

    Arrays and scalars of NumPy come back as arrays and Python numbers or text; an array of objects as a list.
    DataError names the first type that is not among these, or says that the file is damaged.
    """
    try:
        _scan_opcodes(content)
        value = PlainUnpickler(io.BytesIO(content), where).load()
    except DataError:
        raise
    except Exception as error:  # a forged pickle can raise anything
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        got = f"a pickle that is damaged or holds more than plain values ({reason})"
        raise DataError(Problem(where, got, "a pickle of (sample_names, labels)", HINT)) from None
    return _unwrap(value)


def _scan_opcodes(content: bytes) -> None:
    for number, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        if number >= MAX_OPCODES:
            raise pickle.UnpicklingError(f"more than {MAX_OPCODES} opcodes")
        if opcode.name in EXTENSION_OPCODES:
            raise pickle.UnpicklingError(f"the opcode {opcode.name}")
        if opcode.name in MEMO_OPCODES and not 0 <= int(argument or 0) <= len(content):
            raise pickle.UnpicklingError(f"the memo number {argument}")


def _unwrap(value: Any) -> Any:
    """Replace the stand-ins in the value and one level below it: label files are no deeper."""
    if isinstance(value, PlainArray):
        return value.value
    if isinstance(value, list | tuple):
        return [item.value if isinstance(item, PlainArray) else item for item in value]
    if isinstance(value, dict):
        return {key: item.value if isinstance(item, PlainArray) else item for key, item in value.items()}
    return value
