"""Memory that a training frees stays with the process while it trains.

The C library gives large blocks back to the system when they are freed, and the system clears every page when they are
asked for again. A training step frees and asks for the same gigabytes each time: with batches of 16 clips of 300 frames
and 34 joints that was 2 to 5 million page faults a step and 30 to 40 % of its time (docs/performance.md).
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# From malloc.h of glibc, the same on every architecture. Left alone, glibc moves both thresholds up to twice and once
# 32 MiB as blocks of that size are freed; who sets one ends that. So they are put where they would have gone.
M_TRIM_THRESHOLD, LAST_TRIM_THRESHOLD = -1, 64 * 2**20
M_MMAP_THRESHOLD, LAST_MMAP_THRESHOLD = -3, 32 * 2**20
M_MMAP_MAX, FIRST_MMAP_MAX = -4, 65536
NEVER = 2**31 - 1


@contextmanager
def keep_freed_memory() -> Iterator[bool]:
    """Keep what is freed for the next use in this process, and give it back at the end.

    Yields False where the C library has no such setting: then nothing changes.
    """
    library = _find_library()
    if library is None:
        yield False
        return
    kept = bool(library.mallopt(M_MMAP_MAX, 0)) and bool(library.mallopt(M_TRIM_THRESHOLD, NEVER))
    try:
        yield kept
    finally:
        library.mallopt(M_MMAP_MAX, FIRST_MMAP_MAX)
        library.mallopt(M_MMAP_THRESHOLD, LAST_MMAP_THRESHOLD)
        library.mallopt(M_TRIM_THRESHOLD, LAST_TRIM_THRESHOLD)
        library.malloc_trim(0)


def _find_library() -> Any:
    """The C library of this process if it is glibc, else None."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None
