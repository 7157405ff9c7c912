"""Files appear whole or not at all, and a failing disk gives an error that says what to do."""

from __future__ import annotations

import builtins
import errno
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kinegraph.errors import StorageError, UserError
from kinegraph.storage import (
    append_line,
    dump_json,
    make_folder,
    point_to,
    write_atomically,
    write_json,
)

FAILURES = [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO]


def fail_with(number: int) -> Callable[..., Any]:
    def refuse(*arguments: Any, **named: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return refuse


def break_writing(monkeypatch: pytest.MonkeyPatch, place: str, number: int) -> None:
    if place == "open":
        monkeypatch.setattr(builtins, "open", fail_with(number))
    else:
        monkeypatch.setattr(os, place, fail_with(number))


@pytest.mark.parametrize("number", FAILURES)
@pytest.mark.parametrize("place", ["open", "replace", "fsync"])
def test_failing_disk_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, number: int
) -> None:
    path = tmp_path / "metrics.json"
    path.write_text("old")
    with monkeypatch.context() as context:
        break_writing(context, place, number)
        with pytest.raises(StorageError) as caught:
            write_json(path, {"new": 1})
    assert caught.value.exit_code == 1
    text = str(caught.value)
    assert str(path) in text
    assert os.strerror(number) in text
    assert ("Free some space" in text) == (number == errno.ENOSPC)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failing_writer_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), write_atomically(tmp_path / "a.bin") as file:
        file.write(b"half")
        raise error
    assert not list(tmp_path.iterdir())


def test_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with write_atomically(path, "w") as file:
        file.write("first\nsecond ü\n")
        assert not path.exists()
    assert path.read_bytes() == "first\nsecond ü\n".encode()
    with write_atomically(path) as file:
        file.write(b"\x00")
    assert path.read_bytes() == b"\x00"
    assert list(tmp_path.iterdir()) == [path]


def test_missing_folder_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No such file"):
        write_json(tmp_path / "missing" / "a.json", {})
    with pytest.raises(StorageError, match="No such file"):
        append_line(tmp_path / "missing" / "a.json", "x")


@pytest.mark.parametrize("number", FAILURES)
@pytest.mark.parametrize("place", ["open", "fsync"])
def test_failing_append_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, number: int
) -> None:
    path = tmp_path / "status.json"
    append_line(path, "one")
    with monkeypatch.context() as context:
        break_writing(context, place, number)
        with pytest.raises(StorageError, match=os.strerror(number)):
            append_line(path, "two")
    append_line(path, "three")
    assert path.read_text() == "one\nthree\n"


@pytest.mark.parametrize(
    ("before", "after"),
    [("", "x\n"), ("a\n", "a\nx\n"), ("a\nb", "a\nx\n"), ("torn", "x\n"), ("a\n\n", "a\n\nx\n")],
)
def test_torn_last_line_is_cut(tmp_path: Path, before: str, after: str) -> None:
    path = tmp_path / "status.json"
    path.write_text(before)
    append_line(path, "x")
    assert path.read_text() == after


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\n\r"), max_size=9)), st.integers(0, 30))
def test_lines_survive_a_cut_at_any_byte(tmp_path_factory: pytest.TempPathFactory, lines: list[str], cut: int) -> None:
    path = tmp_path_factory.mktemp("lines") / "status.json"
    for line in lines:
        append_line(path, line)
    whole = path.read_bytes() if lines else b""
    path.write_bytes(whole[: max(0, len(whole) - cut)])
    kept = path.read_bytes().count(b"\n")
    append_line(path, "end")
    assert path.read_bytes() == "".join(f"{line}\n" for line in [*lines[:kept], "end"]).encode()


def test_names_that_are_not_unicode(tmp_path: Path) -> None:
    append_line(tmp_path / "status.json", dump_json({"path": "a\udcff"}))
    assert json.loads((tmp_path / "status.json").read_text()) == {"path": "a\udcff"}


def test_folder_below_a_file_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "a" / "b"):
        with pytest.raises(UserError, match="a path through the file") as caught:
            make_folder(path)
        assert caught.value.exit_code == 2
        assert str(tmp_path / "file") in str(caught.value)
    assert make_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert make_folder(tmp_path / "a" / "b").is_dir()


@pytest.mark.parametrize("number", FAILURES)
def test_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(os, "mkdir", fail_with(number))
    with pytest.raises(StorageError, match=os.strerror(number)):
        make_folder(tmp_path / "a")


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_folder_with_an_impossible_name(tmp_path: Path, name: str) -> None:
    with pytest.raises((StorageError, UserError)):
        make_folder(tmp_path / name)


@pytest.mark.parametrize("links", [True, False])
def test_pointer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    if not links:
        monkeypatch.setattr(os, "symlink", fail_with(errno.EPERM))
    for text in ("one", "two"):
        (tmp_path / f"{text}.pth").write_text(text)
        point_to(tmp_path / "latest.pth", tmp_path / f"{text}.pth")
        assert (tmp_path / "latest.pth").read_text() == text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest.pth", "one.pth", "two.pth"]


def test_pointer_moves_with_its_folder(tmp_path: Path) -> None:
    make_folder(tmp_path / "a")
    (tmp_path / "a" / "one.pth").write_text("one")
    point_to(tmp_path / "a" / "latest.pth", tmp_path / "a" / "one.pth")
    (tmp_path / "a").rename(tmp_path / "b")
    assert (tmp_path / "b" / "latest.pth").read_text() == "one"


def test_pointer_on_a_failing_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one.pth").write_text("one")
    monkeypatch.setattr(os, "replace", fail_with(errno.ENOSPC))
    with pytest.raises(StorageError, match="Free some space"):
        point_to(tmp_path / "latest.pth", tmp_path / "one.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["one.pth"]


def test_json_is_strict(tmp_path: Path) -> None:
    data = {
        "a": math.nan,
        "b": [math.inf, 1.5, (-math.inf,)],
        "c": np.float32(0.5),
        "d": np.int64(3),
        "e": np.float32("nan"),
    }
    write_json(tmp_path / "a.json", data)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    expected = {"a": None, "b": [None, 1.5, [None]], "c": 0.5, "d": 3, "e": None}
    assert json.loads(text, parse_constant=refuse) == expected
    assert '"d": 3,' in text
