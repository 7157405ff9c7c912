"""The exceptions that reach a user, and the did-you-mean lookup that every table shares.

KinegraphError            exit 1: something failed while running
├── StorageError          a file could not be written (disk full, read-only folder)
├── ParityError           an exported model does not answer as the original
└── UserError             exit 2: a mistake in what was asked, which the user can mend
    ├── SpecError         the spec file or an override
    ├── DataError         arrays, labels, recordings, layouts
    └── CheckpointError   a model file that cannot be read or does not fit
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

Value = TypeVar("Value")


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where it is, what was found, what should be there, what to do next."""

    where: str
    got: str
    expected: str
    hint: str = ""

    def __str__(self) -> str:
        text = f"{self.where}: got {self.got}, expected {self.expected}."
        return f"{text} {self.hint}" if self.hint else text


class KinegraphError(Exception):
    """Base of all errors shown to a user without a traceback; carries one or more problems."""

    exit_code = 1

    def __init__(self, *problems: Problem) -> None:
        self.problems = problems
        super().__init__("\n".join(str(problem) for problem in problems))

    def as_data(self) -> list[dict[str, str]]:
        """The problems as plain data, for `--json`."""
        return [asdict(problem) for problem in self.problems]


class StorageError(KinegraphError):
    pass


class ParityError(KinegraphError):
    pass


class UserError(KinegraphError):
    exit_code = 2


class SpecError(UserError):
    """`partial` is the spec without what is wrong in it, where there is one: its other mistakes can be told too."""

    partial: Any = None


class DataError(UserError):
    pass


class CheckpointError(UserError):
    pass


def describe_reason(error: Exception) -> str:
    """What an exception of another library says, in one line of at most 200 characters."""
    return " ".join(str(error).split())[:200]


def suggest(name: str, choices: Iterable[str]) -> str:
    """'Did you mean ...?' for a near miss of one of the choices, else an empty string."""
    by_lower = {choice.lower(): choice for choice in choices}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return f"Did you mean {by_lower[near[0]]!r}?" if near else ""


def look_up(table: Mapping[str, Value], name: str, where: str, error: type[UserError] = UserError) -> Value:
    """table[name], or an error that names the place, lists the choices and suggests the nearest one."""
    if name in table:
        return table[name]
    raise error(Problem(where, repr(name), "one of " + ", ".join(table), suggest(name, table)))
