from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kinegraph import file_systems, mirror, remote
from kinegraph.errors import StorageError
from kinegraph.mirror import Mirror
from kinegraph.storage import point_to, write_json
from s3_server import BUCKET, S3Server, run_proxy, serve_s3


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_systems, "RETRY_DELAYS_S", ())
    monkeypatch.setattr(mirror, "FINAL_DELAYS_S", (0.01,))
    monkeypatch.setattr(mirror, "INTERVAL_S", 0.05)


@pytest.fixture
def uri(tmp_path: Path) -> Iterator[str]:
    uri = f"memory://{tmp_path.name}/results"
    yield uri
    remote.remove(uri)


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of what is uploaded or copied, in order."""
    names: list[str] = []
    upload, copy = mirror.upload, mirror.copy

    def note_upload(content: bytes | Path, uri: str) -> None:
        upload(content, uri)
        names.append(uri.rpartition("/")[2])

    def note_copy(source: str, target: str) -> None:
        copy(source, target)
        names.append(f"{target.rpartition('/')[2]} from {source.rpartition('/')[2]}")

    monkeypatch.setattr(mirror, "upload", note_upload)
    monkeypatch.setattr(mirror, "copy", note_copy)
    return names


def open_mirror(machine: Path, uri: str, warn: Callable[[str], None] = print, names: tuple[str, ...] = ()) -> Mirror:
    (machine / "run").mkdir(parents=True, exist_ok=True)
    return Mirror(machine / "run", uri, machine / "uploaded.json", warn, names)


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / name.replace("__", "/").replace("_dot_", ".")).write_text(text)


def read_all(uri: str) -> dict[str, str]:
    return {entry.name: remote.read_text(remote.join(uri, entry.name)) for entry in remote.list_files(uri)}


def test_new_changed_and_removed_files(tmp_path: Path, uri: str, uploads: list[str]) -> None:
    folder = tmp_path / "a/run"
    copy = open_mirror(tmp_path / "a", uri)
    (folder / "tensorboard").mkdir()
    (folder / "inputs").mkdir()
    write(folder, status_dot_json="one", tensorboard__events="two", model_dot_pth="three", log_dot_txt="four")
    write(folder, _dot_hidden="no", inputs__data="no", model_dot_tmp="no", study_dot_lock="no")
    copy.upload_all()
    expected = {"status.json": "one", "tensorboard/events": "two", "model.pth": "three", "log.txt": "four"}
    assert read_all(uri) == expected
    uploads.clear()
    copy.upload_all()
    assert uploads == []
    (folder / "model.pth").unlink()
    write(folder, status_dot_json="one more")
    copy.upload_all()
    assert uploads == ["status.json"]
    expected.pop("model.pth")
    assert read_all(uri) == {**expected, "status.json": "one more"}


def test_what_was_uploaded_is_remembered(tmp_path: Path, uri: str, uploads: list[str]) -> None:
    write((open_mirror(tmp_path / "a", uri)).folder, model_dot_pth="three", status_dot_json="one")
    open_mirror(tmp_path / "a", uri).upload_all()
    assert sorted(uploads) == ["model.pth", "status.json"]
    again = open_mirror(tmp_path / "a", uri)
    assert again.take_over() == 0
    again.upload_all()
    assert len(uploads) == 2


def test_another_machine_takes_over_and_the_first_follows(tmp_path: Path, uri: str, uploads: list[str]) -> None:
    first = open_mirror(tmp_path / "a", uri)
    write(first.folder, kept_dot_pth="kept", replaced_dot_pth="old", status_dot_json="1")
    first.upload_all()
    second = open_mirror(tmp_path / "b", uri)
    assert second.take_over() == 3
    uploads.clear()
    second.upload_all()
    assert uploads == [], "what was taken over is not uploaded again"
    (second.folder / "replaced.pth").unlink()
    write(second.folder, status_dot_json="1 2", new_dot_pth="new")
    second.upload_all()
    write(first.folder, unsent_dot_pth="only here")
    first = open_mirror(tmp_path / "a", uri)
    assert first.take_over() == 2
    expected = {"kept.pth": "kept", "new.pth": "new", "status.json": "1 2", "unsent.pth": "only here"}
    assert {path.name: path.read_text() for path in first.folder.iterdir()} == expected
    first.upload_all()
    assert read_all(uri) == expected


def test_local_changes_are_kept_where_nobody_else_wrote(tmp_path: Path, uri: str) -> None:
    first = open_mirror(tmp_path / "a", uri)
    write(first.folder, status_dot_json="1")
    first.upload_all()
    write(first.folder, status_dot_json="1 2")
    again = open_mirror(tmp_path / "a", uri)
    assert again.take_over() == 0
    again.upload_all()
    assert read_all(uri) == {"status.json": "1 2"}


def test_other_processes_load_only_what_is_missing(tmp_path: Path, uri: str) -> None:
    first = open_mirror(tmp_path / "a", uri)
    write(first.folder, a_dot_pth="there", b_dot_pth="there")
    first.upload_all()
    other = open_mirror(tmp_path / "b", uri)
    write(other.folder, a_dot_pth="here")
    assert other.take_over(only_missing=True) == 1
    assert {path.name: path.read_text() for path in other.folder.iterdir()} == {"a.pth": "here", "b.pth": "there"}
    assert not (tmp_path / "b/uploaded.json").exists()


def test_damaged_record_takes_over_anew(tmp_path: Path, uri: str) -> None:
    first = open_mirror(tmp_path / "a", uri)
    write(first.folder, model_dot_pth="one")
    first.upload_all()
    (tmp_path / "a/uploaded.json").write_text('{"model.pth": {"size')
    assert open_mirror(tmp_path / "a", uri).take_over() == 1


def test_only_named_files(tmp_path: Path, uri: str) -> None:
    remote.write_text(remote.join(uri, "labels.txt"), "a\n")
    remote.write_text(remote.join(uri, "other.txt"), "not ours")
    copy = open_mirror(tmp_path / "a", uri, names=("model.onnx", "labels.txt"))
    assert copy.take_over() == 1
    write(copy.folder, model_dot_onnx="m", stray="no")
    copy.upload_all()
    assert read_all(uri) == {"labels.txt": "a\n", "model.onnx": "m", "other.txt": "not ours"}


def test_order_and_pointers(tmp_path: Path, uri: str, uploads: list[str]) -> None:
    copy = open_mirror(tmp_path / "a", uri)
    for name in ("best.json", "status.json", "a_status.csv"):
        (copy.folder / name).write_text(name)
    (copy.folder / "model_epoch_000.pth").write_text("weights")
    point_to(copy.folder / "a_latest.pth", copy.folder / "model_epoch_000.pth")
    copy.upload_all()
    order = ["model_epoch_000.pth", "a_latest.pth from model_epoch_000.pth", "a_status.csv", "best.json", "status.json"]
    assert uploads == order
    (copy.folder / "model_epoch_001.pth").write_text("better")
    os.utime(copy.folder / "model_epoch_001.pth", ns=(1, 1))
    point_to(copy.folder / "a_latest.pth", copy.folder / "model_epoch_001.pth")
    copy.upload_all()
    assert uploads[5:] == ["model_epoch_001.pth", "a_latest.pth from model_epoch_001.pth"]
    assert read_all(uri)["a_latest.pth"] == "better"
    other = open_mirror(tmp_path / "b", uri)
    other.take_over()
    assert (other.folder / "a_latest.pth").read_text() == "better"


def test_best_json_never_names_what_is_not_there(tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a training writes a checkpoint, names it in best.json and removes the one before, as fast as it can."""
    copy = open_mirror(tmp_path / "a", uri)
    checks = 0

    def check() -> None:
        nonlocal checks
        if remote.exists(remote.join(uri, "best.json")):
            best = json.loads(remote.read_text(remote.join(uri, "best.json")))["file"]
            assert remote.exists(remote.join(uri, best)), best
            checks += 1

    for name in ("upload", "remove"):
        original = getattr(mirror, name)

        def call(*arguments: object, original: Callable[..., None] = original) -> None:
            original(*arguments)
            check()

        monkeypatch.setattr(mirror, name, call)
    is_over = threading.Event()

    def train() -> None:
        for epoch in range(300):
            (copy.folder / f"model_{epoch}.pth").write_text("x")
            # Longer each time: the clock of a file system may stand still between two of these epochs
            write_json(copy.folder / "best.json", {"file": f"model_{epoch}.pth", "filler": "x" * epoch})
            (copy.folder / f"model_{epoch - 1}.pth").unlink(missing_ok=True)
        is_over.set()

    trainer = threading.Thread(target=train)
    trainer.start()
    rounds = 0
    while not is_over.is_set() or rounds < 5:
        copy.upload_all()
        rounds += 1
    trainer.join()
    copy.upload_all()
    assert checks > 20
    assert sorted(read_all(uri)) == ["best.json", "model_299.pth"]


def test_best_json_written_between_the_two_lists_of_a_round(
    tmp_path: Path, uri: str, uploads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is up only after what it names, also when a training writes the first of both while a round lists files."""
    copy = open_mirror(tmp_path / "a", uri)
    scan, scans = copy._scan, 0

    def scan_while_a_training_writes() -> dict[str, tuple[int, int]]:
        nonlocal scans
        scans += 1
        if scans == 2:
            (copy.folder / "model_1.pth").write_text("x")
            write_json(copy.folder / "best.json", {"file": "model_1.pth"})
        return scan()

    monkeypatch.setattr(copy, "_scan", scan_while_a_training_writes)
    copy.upload_all()
    copy.upload_all()
    assert uploads == ["model_1.pth", "best.json"]


def test_thread_uploads_as_the_folder_changes(tmp_path: Path, uri: str) -> None:
    copy = open_mirror(tmp_path / "a", uri)
    copy.start()
    write(copy.folder, status_dot_json="one")
    is_up = threading.Event()
    for _ in range(400):
        if remote.exists(remote.join(uri, "status.json")):
            is_up.set()
            break
        is_up.wait(0.05)
    copy.close()
    assert is_up.is_set()


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with serve_s3() as running:
        yield running


def test_broken_uploads_go_on(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection breaks in the middle of every upload until it works again; nothing of the run is lost."""
    warnings: list[str] = []
    content = os.urandom(300_000)
    with run_proxy(server.endpoint) as proxy:
        for name, value in {**server.variables, "AWS_ENDPOINT_URL": proxy.endpoint}.items():
            monkeypatch.setenv(name, value)
        uri = f"s3://{BUCKET}/{tmp_path.name}"
        copy = open_mirror(tmp_path / "a", uri, warnings.append)
        (copy.folder / "model.pth").write_bytes(content)
        write(copy.folder, best_dot_json="{}")
        proxy.cut_request_after, proxy.cuts = 100_000, 1_000_000
        with pytest.raises(StorageError) as caught:
            copy.upload_all()
        assert str(copy.folder) in str(caught.value) and "Nothing is lost" in str(caught.value)
        assert proxy.cuts < 1_000_000
        assert server.list_keys(tmp_path.name) == [], "best.json waits for the checkpoint"
        copy.start()
        for _ in range(400):
            if warnings:
                break
            threading.Event().wait(0.05)
        proxy.cuts = 0
        for _ in range(400):
            if len(warnings) > 1:
                break
            threading.Event().wait(0.05)
        copy.close()
        copy.upload_all()
    assert len(warnings) == 2 and "again" in warnings[1]
    assert server.get(f"{tmp_path.name}/model.pth") == content
    assert len(server.list_keys(tmp_path.name)) == 2


def test_large_file_in_parts(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.variables.items():
        monkeypatch.setenv(name, value)
    copy = open_mirror(tmp_path / "a", f"s3://{BUCKET}/{tmp_path.name}")
    with open(copy.folder / "data.npy", "wb") as file:
        file.truncate(100 << 20)
        file.write(b"end")
    copy.upload_all()
    again = open_mirror(tmp_path / "a", copy.uri)
    assert again.take_over() == 0, "the version of a file in parts is known, too"
    head = server.client.head_object(Bucket=BUCKET, Key=f"{tmp_path.name}/data.npy")
    assert head["ContentLength"] == 100 << 20 and "-" in head["ETag"]


def test_files_lost_from_the_staging_folder_are_not_removed_at_the_uri(tmp_path: Path, uri: str) -> None:
    first = open_mirror(tmp_path / "a", uri)
    write(first.folder, model_dot_pth="weights")
    first.upload_all()
    (first.folder / "model.pth").unlink()  # by somebody who needed space, after the run
    again = open_mirror(tmp_path / "a", uri)
    assert again.take_over() == 1
    again.upload_all()
    assert read_all(uri) == {"model.pth": "weights"}


def test_a_folder_that_cannot_be_read_is_no_empty_one(
    tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_mirror(tmp_path / "a", uri)
    (first.folder / "trial").mkdir()
    write(first.folder, trial__model_dot_pth="weights")
    first.upload_all()
    scandir = os.scandir

    def fail(path: object) -> object:
        if str(path).endswith("trial"):
            raise OSError(5, "Input/output error", str(path))
        return scandir(path)  # type: ignore[call-overload]

    monkeypatch.setattr(os, "scandir", fail)
    with pytest.raises(StorageError, match="Input/output error"):
        first.upload_all()
    monkeypatch.undo()
    assert read_all(uri) == {"trial/model.pth": "weights"}


def test_what_another_machine_wrote_since_is_not_removed(tmp_path: Path, uri: str) -> None:
    first = open_mirror(tmp_path / "a", uri)
    write(first.folder, model_dot_pth="first")
    first.upload_all()
    remote.write_text(remote.join(uri, "model.pth"), "of the second machine")
    (first.folder / "model.pth").unlink()
    first.upload_all()
    assert read_all(uri) == {"model.pth": "of the second machine"}


@pytest.mark.parametrize("name", ["run[1]", "run*", "run?"])
def test_removing_takes_names_literally(tmp_path: Path, uri: str, name: str) -> None:
    for place in ("run1", name):
        remote.write_text(remote.join(uri, place, "model.pth"), place)
    remote.remove(remote.join(uri, name, "model.pth"))
    assert read_all(uri) == {"run1/model.pth": "run1"}
    remote.write_text(remote.join(uri, name, "a", "b.txt"), "x")
    remote.remove(remote.join(uri, name))
    assert read_all(uri) == {"run1/model.pth": "run1"}
