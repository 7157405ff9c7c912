"""Whole numbers in files of strangers."""

from __future__ import annotations

from typing import Any


def check_whole_number(value: Any, name: str, smallest: int, largest: int) -> int:
    """The value, if it is an int (no bool, no 3.0) from smallest to largest; else ValueError, which says the name.

    `largest` limits what the number can make a reader allocate.
    """
    if type(value) is not int or not smallest <= value <= largest:
        raise ValueError(f"{name} is {str(value)[:40]}")
    return value
