"""Arrays of clips on disk: opening them as memory maps, and walking over them in blocks of bounded size."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from kinegraph.errors import DataError, Problem

AXES = ("clips", "channels", "frames", "joints", "people")
AXIS_LETTERS = "(N, C, T, V, M)"
FLOAT_SIZES = (2, 4, 8)
BLOCK_VALUES = 4 * 1024 * 1024
HEADER_READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


@dataclass(frozen=True)
class ArrayHeader:
    """What the first bytes of a .npy file promise."""

    shape: tuple[int, ...]
    is_fortran: bool
    dtype: np.dtype
    offset: int

    @property
    def size_bytes(self) -> int:
        """Bytes of values after the header, in exact integers: a forged shape cannot wrap around."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_array_header(stream: BinaryIO, where: str) -> ArrayHeader:
    """The header of a .npy stream; DataError where it is none. Reads no values."""
    start = stream.read(8)
    stream.seek(0)
    try:
        version = np.lib.format.read_magic(stream)
        shape, is_fortran, dtype = HEADER_READERS[version](stream)
    except (ValueError, KeyError, EOFError, TypeError, SyntaxError, RecursionError, MemoryError):
        raise DataError(
            Problem(where, _name_content(start), "a .npy file", "Write it with numpy.save(path, array).")
        ) from None
    return ArrayHeader(shape, is_fortran, dtype, stream.tell())


def _name_content(start: bytes) -> str:
    if not start:
        return "an empty file"
    if start.startswith(b"PK"):
        return "a zip archive (an .npz file?)"
    if start.startswith(b"\x80"):
        return "a pickle"
    if start.startswith(b"\x93NUMPY"):
        return "a .npy file with a damaged or unknown header"
    return f"a file that starts with {start!r}"


def open_array(path: str | Path) -> np.ndarray:
    """The clips of a .npy file as a read-only memory map (N, C, T, V, M).

    The dtype stays as stored: float32, or float16 and float64, which are cast batch by batch. A file that is
    missing, truncated, pickled, of another number of axes, of another dtype or without values is a DataError.
    """
    path = Path(path)
    if not path.is_file():
        got = "a folder" if path.is_dir() else "no such file"
        raise DataError(Problem(str(path), got, f"a .npy file {AXIS_LETTERS}"))
    try:
        with path.open("rb") as stream:
            header = read_array_header(stream, str(path))
            file_bytes = stream.seek(0, 2)
    except OSError as error:
        raise DataError(Problem(str(path), error.strerror or str(error), "a readable .npy file")) from None
    problems = _check_header(header, file_bytes, str(path))
    if problems:
        raise DataError(*problems)
    array = np.memmap(
        path,
        header.dtype,
        mode="r",
        offset=header.offset,
        shape=header.shape,
        order="F" if header.is_fortran else "C",
    )
    return array


def _check_header(header: ArrayHeader, file_bytes: int, where: str) -> list[Problem]:
    shape, dtype = header.shape, header.dtype
    if dtype.hasobject:
        got = "an array of Python objects (a pickle inside the .npy file)"
        hint = "Clips of unequal length must be padded with zeros to one length; then save as float32."
        return [Problem(where, got, "a float32 array", hint)]
    problems = []
    if dtype.kind != "f" or dtype.itemsize not in FLOAT_SIZES:
        hint = "Convert it: numpy.save(path, array.astype(numpy.float32))."
        problems.append(Problem(where, f"dtype {dtype}", "float32 (or float16, float64)", hint))
    if len(shape) != len(AXES):
        hint = f"The axes are {', '.join(AXES)}."
        if len(shape) == len(AXES) - 1:
            hint = f"If the axis of people is missing: numpy.save(path, array[..., numpy.newaxis]). {hint}"
        got = f"{len(shape)} axes, shape {shape}"
        problems.append(Problem(where, got, f"{len(AXES)} axes {AXIS_LETTERS}", hint))
    elif min(shape) < 1:
        empty = ", ".join(axis for axis, size in zip(AXES, shape, strict=True) if size < 1)
        problems.append(Problem(where, f"shape {shape}: no {empty}", "at least one along every axis"))
    missing = header.offset + header.size_bytes - file_bytes
    if missing > 0:
        got = f"{file_bytes} bytes: {missing} bytes are missing"
        expected = f"{header.offset + header.size_bytes} bytes for shape {shape} of {dtype}"
        problems.append(Problem(where, got, expected, "The file is truncated: copy or write it again."))
    return problems


def release_pages(array: np.ndarray) -> None:
    """Take the pages of a memory map that were read out of this process; the system still caches them."""
    mapped = getattr(array, "_mmap", None)
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def iterate_blocks(array: np.ndarray, values: int = BLOCK_VALUES) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """(clips, frames, block) over an array (N, C, T, V, M), each block of about `values` values at most.

    Whole clips where they fit, otherwise one clip cut along its frames, so memory stays flat for any file.
    """
    num_clips, _, num_frames, _, _ = array.shape
    values_per_frame = array[0, :, 0].size
    clips_per_block = max(1, values // (values_per_frame * num_frames))
    frames_per_block = num_frames if clips_per_block > 1 else max(1, values // values_per_frame)
    plain = np.asarray(array)
    for clip in range(0, num_clips, clips_per_block):
        clips = slice(clip, min(clip + clips_per_block, num_clips))
        for frame in range(0, num_frames, frames_per_block):
            frames = slice(frame, min(frame + frames_per_block, num_frames))
            yield clips, frames, plain[clips, :, frames]


def cast_to_float32(block: np.ndarray) -> np.ndarray:
    """A contiguous float32 copy or view; values beyond its range become infinite."""
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(block, np.float32)


@dataclass
class NonFiniteCount:
    """Counts NaN and infinite values over the blocks of an array and remembers the first place."""

    nan: int = 0
    infinite: int = 0
    clips: int = 0
    first: tuple[int, ...] | None = None
    last_clip: int = -1

    def add(self, block: np.ndarray, first_clip: int = 0, first_frame: int = 0) -> None:
        """Count in a float block (n, C, t, V, M) that starts at this clip and frame of the array."""
        bad = ~np.isfinite(block)
        if not bad.any():
            return
        num_nan = int(np.isnan(block).sum())
        self.nan += num_nan
        self.infinite += int(bad.sum()) - num_nan
        bad_clips = first_clip + np.flatnonzero(bad.any(axis=(1, 2, 3, 4)))
        # A clip that is longer than a block arrives in several pieces: count it once.
        self.clips += len(bad_clips) - int(bad_clips[0] == self.last_clip)
        self.last_clip = int(bad_clips[-1])
        if self.first is None:
            clip, channel, frame, joint, person = (int(i) for i in np.unravel_index(bad.argmax(), bad.shape))
            self.first = (clip + first_clip, channel, frame + first_frame, joint, person)

    def as_problem(self, where: str) -> Problem | None:
        """The first place and the numbers, or None where everything is finite."""
        if self.first is None:
            return None
        axes = ("clip", "channel", "frame", "joint", "person")
        place = ", ".join(f"{axis} {i}" for axis, i in zip(axes, self.first, strict=True))
        counts = f"{self.nan} NaN and {self.infinite} infinite values in {self.clips} clips"
        hint = "Joints that were not detected are zeros here: numpy.nan_to_num(array, posinf=0, neginf=0)."
        return Problem(where, f"{counts}, the first at {place}", "finite float32 values", hint)
