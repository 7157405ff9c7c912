from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from kinegraph import cache, file_systems, remote
from kinegraph.errors import KinegraphError, StorageError, UserError
from s3_server import BUCKET, S3Server, make_environment, run_proxy, serve_s3

CONTENT = bytes(range(256)) * 1200  # 300 KiB, five pieces of PIECE_BYTES
PIECE_BYTES = 64 << 10


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with serve_s3() as running:
        yield running


@pytest.fixture(autouse=True)
def environment(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("KINEGRAPH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(file_systems, "RETRY_DELAYS_S", (0.01, 0.01, 0.01))
    monkeypatch.setattr(remote, "PIECE_BYTES", PIECE_BYTES)


def fail(call: Any, *arguments: Any) -> KinegraphError:
    with pytest.raises(KinegraphError) as caught:
        call(*arguments)
    return caught.value


@pytest.mark.parametrize("place", ["memory://grows.txt", f"s3://{BUCKET}/grows.txt"])
def test_a_file_that_is_replaced_while_it_is_read_comes_whole(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    remote.write_text(place, "short")
    look = file_systems.Opened.find_info

    def look_and_replace(opened: file_systems.Opened, location: str) -> Any:
        found = look(opened, location)
        remote.write_text(location, "much longer")
        return found

    monkeypatch.setattr(file_systems.Opened, "find_info", look_and_replace)
    assert remote.read_text(place, limit_bytes=100) == "much longer"


@pytest.mark.parametrize("kind", ["local", "memory", "s3"])
def test_all_kinds_of_locations_answer_alike(kind: str, tmp_path: Path) -> None:
    base = {"local": str(tmp_path / "a"), "memory": f"memory://{tmp_path.name}", "s3": f"s3://{BUCKET}/{tmp_path.name}"}
    folder = base[kind]
    assert remote.is_remote(folder) == (kind != "local")
    first, second = remote.join(folder, "b", "one.txt"), remote.join(folder, "two.txt")
    assert not remote.exists(folder) and remote.list_files(folder) == []
    remote.write_text(first, "grüße\n")
    remote.write_text(second, "")
    assert remote.read_text(first) == "grüße\n" and remote.read_text(second) == ""
    assert [remote.exists(place) for place in (first, folder, remote.join(folder, "c"))] == [True, True, False]
    assert [remote.is_folder(place) for place in (first, folder, remote.join(folder, "b"))] == [False, True, True]
    assert [remote.is_file(place) for place in (first, folder, remote.join(folder, "c"))] == [True, False, False]
    entries = remote.list_files(folder)
    assert [(entry.name, entry.size_bytes) for entry in entries] == [("b/one.txt", 8), ("two.txt", 0)]
    assert all(entry.modified_s > 1_600_000_000 for entry in entries)
    assert remote.fetch(first).read_text(encoding="utf-8") == "grüße\n"
    remote.write_text(second, "more")
    assert remote.list_files(folder)[1].version != entries[1].version
    assert remote.list_files(folder)[0].version == entries[0].version
    remote.remove(first)
    assert [entry.name for entry in remote.list_files(folder)] == ["two.txt"]
    remote.remove(folder)
    assert not remote.exists(second)
    remote.remove(folder)


def test_names() -> None:
    assert remote.join("s3://bucket/a/", "b", "c.npy") == "s3://bucket/a/b/c.npy"
    assert remote.join("a/", "b") == str(Path("a/b"))
    assert remote.split_location("s3://bucket/a/b.npy") == ("s3://bucket/a", "b.npy")
    assert remote.split_location("a/b.npy") == ("a", "b.npy")
    assert [remote.is_remote(text) for text in ("s3://a", "file:///a", "/a", "a:b", "C:\\a", "a/s3://b")] == [
        *(True, True, False, False, False, False)
    ]


def test_keys_that_lead_out_of_a_folder_are_not_listed(server: S3Server, tmp_path: Path) -> None:
    for name in ("good", "../bad", "a/../../bad", "a//bad"):
        server.put(f"{tmp_path.name}/{name}", b"x")
    assert len(server.list_keys(tmp_path.name)) == 4
    assert [entry.name for entry in remote.list_files(f"s3://{BUCKET}/{tmp_path.name}")] == ["good"]


def test_second_fetch_loads_nothing(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = server.put(f"{tmp_path.name}/data.npy", CONTENT)
    shown: list[tuple[int, int]] = []
    with run_proxy(server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        first = remote.fetch(uri, lambda done, total: shown.append((done, total)))
        assert first.read_bytes() == CONTENT and first.name == "data.npy"
        assert [request.split()[0] for request in proxy.requests].count("GET") == 5
        assert shown == [(min(end * PIECE_BYTES, len(CONTENT)), len(CONTENT)) for end in range(1, 6)]
        proxy.requests.clear()
        assert remote.fetch(uri) == first
        assert [request.split()[0] for request in proxy.requests] == ["HEAD"]
        server.put(f"{tmp_path.name}/data.npy", b"new")
        second = remote.fetch(uri)
        assert second.read_bytes() == b"new"
        assert first.read_bytes() == CONTENT, "this process may still open it"
        os.close(cache._held.pop(first))  # as if the process had ended
        assert remote.fetch(uri) == second
        assert not first.exists()


def test_damaged_copy_is_loaded_anew(server: S3Server, tmp_path: Path) -> None:
    uri = server.put(f"{tmp_path.name}/data.npy", CONTENT)
    path = remote.fetch(uri)
    path.write_bytes(CONTENT[:-1])
    assert remote.fetch(uri).read_bytes() == CONTENT


def test_broken_download_goes_on_where_it_stopped(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = server.put(f"{tmp_path.name}/data.npy", CONTENT)
    with run_proxy(server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        proxy.cut_answer_after, proxy.cuts = 30_000, 1
        path = remote.fetch(uri)
        assert proxy.cuts <= 0, "the connection was cut"
        assert path.read_bytes() == CONTENT
        assert proxy.answer_bytes < len(CONTENT) + 2 * PIECE_BYTES, "only the broken piece came again"


def test_failed_download_goes_on_later(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = server.put(f"{tmp_path.name}/data.npy", CONTENT)
    monkeypatch.setattr(file_systems, "RETRY_DELAYS_S", ())
    with run_proxy(server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        seen: list[int] = []

        def break_after_two(done: int, total: int) -> None:
            seen.append(done)
            if len(seen) == 2:
                proxy.cut_answer_after, proxy.cuts = 1, 1_000

        error = fail(remote.fetch, uri, break_after_two)
        assert isinstance(error, StorageError) and uri in str(error)
        assert seen == [PIECE_BYTES, 2 * PIECE_BYTES]
        proxy.cuts = proxy.answer_bytes = 0
        assert remote.fetch(uri).read_bytes() == CONTENT
        assert proxy.answer_bytes < len(CONTENT) - PIECE_BYTES


def test_changed_file_is_not_mixed(server: S3Server, tmp_path: Path) -> None:
    key = f"{tmp_path.name}/data.npy"
    uri = server.put(key, CONTENT)
    other = CONTENT[::-1]

    def change(done: int, total: int) -> None:
        if done == PIECE_BYTES:
            server.put(key, other)

    assert remote.fetch(uri, change).read_bytes() == other


def test_processes_that_want_the_same_file(server: S3Server, tmp_path: Path) -> None:
    uri = server.put(f"{tmp_path.name}/data.npy", CONTENT)
    script = (
        "import sys, zlib; from kinegraph import remote; "
        "print(zlib.crc32(remote.fetch(sys.argv[1]).read_bytes()), len(remote.fetch(sys.argv[1]).read_bytes()))"
    )
    with run_proxy(server.endpoint) as proxy:
        environment = make_environment(server, tmp_path / "shared", AWS_ENDPOINT_URL=proxy.endpoint)
        command = [sys.executable, "-c", script, uri]
        processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        answers = {process.communicate()[0] for process in processes}
        assert len(answers) == 1
        assert next(iter(answers)).split()[1] == str(len(CONTENT))
        assert [request.split()[0] for request in proxy.requests].count("GET") == 1, "one of them loaded it"


@pytest.mark.parametrize("case", ["wrong secret", "unknown key", "no key"])
def test_refused_credentials(
    case: str, server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    uri = server.put(f"{tmp_path.name}/data.npy", b"x")
    hidden = ["not-the-secret-0123456789", "KEYIDTHATISUNKNOWN", server.secret_key, server.access_key]
    if case == "wrong secret":
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", hidden[0])
    elif case == "unknown key":
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", hidden[1])
    else:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
            monkeypatch.setenv(name, str(tmp_path / "none"))
    calls: list[tuple[Any, ...]] = [
        (remote.exists, uri),
        (remote.fetch, uri),
        (remote.list_files, f"s3://{BUCKET}"),
        (remote.write_text, uri, "y"),
        (remote.upload, b"y", uri),
        (remote.remove, uri),
    ]
    for call, *arguments in calls:
        error = fail(call, *arguments)
        assert isinstance(error, UserError), call
        assert "access denied" in str(error) and "AWS_SECRET_ACCESS_KEY" in str(error)
        assert error.__suppress_context__, "a traceback must not show the request"
        assert not any(secret in str(error) + caplog.text for secret in hidden)
    assert server.get(f"{tmp_path.name}/data.npy") == b"x"


@pytest.mark.parametrize(
    ("location", "hidden"),
    [
        ("s3://name:hunter2@bucket/a", "hunter2"),
        ("https://user:hunter2@localhost/a", "hunter2"),
        ("https://localhost/a?X-Amz-Signature=abcdef", "abcdef"),
    ],
)
def test_credentials_in_a_location_are_refused_and_not_shown(location: str, hidden: str) -> None:
    for call in (remote.exists, remote.fetch, remote.list_files, remote.check_writable):
        error = fail(call, location)
        assert isinstance(error, UserError)
        assert hidden not in str(error)


def test_unknown_scheme_and_read_only_scheme() -> None:
    assert "unknown scheme s33" in str(fail(remote.exists, "s33://bucket/a"))
    assert "to write to" in str(fail(remote.check_writable, "https://localhost/a"))


def test_what_is_missing(server: S3Server, tmp_path: Path) -> None:
    server.put(f"{tmp_path.name}/file", b"x")
    for call in (remote.fetch, remote.read_text):
        assert isinstance(fail(call, f"s3://{BUCKET}/{tmp_path.name}/other"), UserError)
        assert isinstance(fail(call, f"s3://{BUCKET}/{tmp_path.name}"), UserError)
        assert "s3://none/a" in str(fail(call, "s3://none/a"))
    for call, *more in ((remote.write_text, "x"), (remote.check_writable,)):
        error = fail(call, "s3://none/a", *more)
        assert isinstance(error, UserError) and "bucket" in str(error)
    remote.check_writable(f"s3://{BUCKET}/not/there/yet")
    assert isinstance(fail(remote.remove, f"s3://{BUCKET}"), UserError)
    assert server.list_keys(tmp_path.name), "the bucket was not emptied"


def test_unreachable_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(file_systems, "RETRY_DELAYS_S", (0.01,))
    error = fail(remote.exists, f"s3://{BUCKET}/a")
    assert isinstance(error, StorageError) and error.exit_code == 1
    assert "AWS_ENDPOINT_URL" in str(error)


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    file_systems._open_file_system.cache_clear()
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    error = fail(remote.exists, f"s3://{BUCKET}/a")
    assert isinstance(error, UserError) and "pip install 'kinegraph[s3]'" in str(error)


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_text_is_limited(kind: str, server: S3Server, tmp_path: Path) -> None:
    place = str(tmp_path / "text") if kind == "local" else f"s3://{BUCKET}/{tmp_path.name}/text"
    remote.write_text(place, "12345")
    assert remote.read_text(place, limit_bytes=5) == "12345"
    assert "more than 4 bytes" in str(fail(remote.read_text, place, 4))
    if kind == "local":
        Path(place).write_bytes(b"\xff\xfe")
    else:
        server.put(f"{tmp_path.name}/text", b"\xff\xfe")
    assert "UTF-8" in str(fail(remote.read_text, place))


def test_full_cache_disk_is_told(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = server.put(f"{tmp_path.name}/data.npy", CONTENT)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda path: usage)
    error = fail(remote.fetch, uri)
    assert isinstance(error, StorageError) and "KINEGRAPH_CACHE" in str(error)


@contextmanager
def serve_http(content: bytes, headers: dict[str, str], tells_size: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """A web server of one file that knows no ranges: the file's URI, and what it sends, to be changed."""
    state: dict[str, Any] = {"content": content, "headers": headers, "sent": 0}

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200)
            for name, value in state["headers"].items():
                self.send_header(name, value)
            if tells_size:
                self.send_header("Content-Length", str(len(state["content"])))
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            with suppress(ConnectionError):  # the other side may have read enough
                for start in range(0, len(state["content"]), PIECE_BYTES):
                    state["sent"] += self.wfile.write(state["content"][start : start + PIECE_BYTES])

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/data.npy", state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize("tells_size", [True, False])
@pytest.mark.parametrize("header", ["Last-Modified", "Content-MD5", ""])
def test_changed_file_of_a_web_server_is_loaded_anew(header: str, tells_size: bool) -> None:
    values = {"Last-Modified": ("Mon, 05 Jan 2026 10:00:00 GMT", "Mon, 05 Jan 2026 10:00:01 GMT")}
    before, after = ({header: value} if header else {} for value in values.get(header, ("YQ==", "Yg==")))
    with serve_http(CONTENT, before, tells_size) as (uri, state):
        first = remote.fetch(uri)
        assert first.read_bytes() == CONTENT
        state["sent"] = 0
        assert remote.fetch(uri) == first, "the same content has the same place"
        if header and tells_size:
            assert state["sent"] == 0
        state["content"], state["headers"] = CONTENT[::-1], after
        assert remote.fetch(uri).read_bytes() == CONTENT[::-1]
        assert first.read_bytes() == CONTENT, "this process may still open it"


def test_part_without_a_version_is_not_gone_on_with() -> None:
    with serve_http(CONTENT, {}, True) as (uri, _):
        folder = cache.find_cache_folder() / "files" / cache.hash_location(uri)
        folder.mkdir(parents=True)
        (folder / f"{cache.hash_text(f'{len(CONTENT)}-0.0')}.part").write_bytes(b"x" * 1000)
        assert remote.fetch(uri).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("info", "modified_s"),
    [
        ({"Last-Modified": "Thu, 01 Jan 1970 00:01:00 GMT"}, 60.0),
        ({"updated": "1970-01-01T00:01:00+00:00"}, 60.0),
        ({"last_modified": datetime(1970, 1, 1, 0, 1, tzinfo=UTC)}, 60.0),
        ({"updated": "yesterday"}, 0.0),
    ],
)
def test_times_of_storages(info: dict[str, Any], modified_s: float) -> None:
    assert file_systems.find_modified_s(info) == modified_s
    version = file_systems.find_info_version({"size": 3, **info})
    assert file_systems.tells_changes(info) and version not in ("3-0.0", "3-None")


def test_leftover_is_not_mixed_into_a_loaded_file(server: S3Server, tmp_path: Path) -> None:
    uri = server.put(f"{tmp_path.name}/data.npy", CONTENT)
    names = [f".data.npy.{os.getpid()}.{ending}" for ending in ("tmp", "0a1b2c3d.part.tmp")]
    for name in names:
        (tmp_path / name).write_bytes(b"of another version")
    remote.load(uri, tmp_path / "data.npy")
    assert (tmp_path / "data.npy").read_bytes() == CONTENT
    assert not (tmp_path / names[1]).exists()
    assert [path.name for path in tmp_path.glob("*.part.tmp")] == []


@pytest.mark.parametrize("tells_size", [True, False])
def test_text_of_a_web_server_is_limited(tells_size: bool) -> None:
    with serve_http(b"x" * (64 << 20), {}, tells_size) as (uri, state):
        assert "more than 1000 bytes" in str(fail(remote.read_text, uri, 1000))
        assert state["sent"] < 48 << 20, "most was not asked for"
        state["content"] = "grüße\n".encode()
        assert remote.read_text(uri) == "grüße\n"


def test_nothing_heavy_is_imported() -> None:
    script = "import sys, kinegraph.spec, kinegraph.mirror; print([m for m in ('fsspec', 's3fs') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
