"""Jobs under a root on object storage: what is asked of the storage. Chains of jobs there: test_job_runners.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from kinegraph import remote
from kinegraph.errors import StorageError
from kinegraph.jobs import get_job_status, list_jobs
from kinegraph.jobs.record import Job, get_time, make_job_id, write_job
from kinegraph.jobs.sources import read_data_source
from s3_server import BUCKET, S3Server, run_proxy, serve_s3


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with serve_s3() as running:
        yield running


@pytest.fixture(autouse=True)
def environment(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("KINEGRAPH_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", ["local", "memory", "s3"])
def test_one_level_of_a_folder(kind: str, tmp_path: Path) -> None:
    base = {"local": str(tmp_path / "a"), "memory": f"memory://{tmp_path.name}", "s3": f"s3://{BUCKET}/{tmp_path.name}"}
    folder = base[kind]
    assert remote.list_folder(folder) == {}
    for names in (("b", "c", "one.txt"), ("b", "two.txt"), ("three.txt",), ("d", "four.txt")):
        remote.write_text(remote.join(folder, *names), "x")
    assert remote.list_folder(folder) == {"b": "directory", "d": "directory", "three.txt": "file"}
    assert remote.list_folder(remote.join(folder, "b")) == {"c": "directory", "two.txt": "file"}
    for nothing in ("three.txt", "none"):
        assert remote.list_folder(remote.join(folder, nothing)) == {}


def test_one_level_of_a_bucket(server: S3Server, tmp_path: Path) -> None:
    for name in ("good/x", "../bad", "/bad"):
        server.put(f"{tmp_path.name}/{name}", b"x")
    assert remote.list_folder(f"s3://{BUCKET}/{tmp_path.name}") == {"good": "directory"}
    assert remote.list_folder(f"s3://{BUCKET}")[tmp_path.name] == "directory"
    assert remote.list_folder(f"s3://{BUCKET}-that-is-not-there") == {}


def test_a_folder_that_may_not_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(StorageError, match="Permission denied"):
        remote.list_folder(tmp_path)


def test_listing_jobs_looks_at_no_results(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = f"s3://{BUCKET}/{tmp_path.name}"
    known = {"action": "train", "effective_action": "train", "runner": "local", "created_at": get_time()}
    jobs = [Job(id=make_job_id(), results_dir=f"{root}/x", status="Complete", **known) for _ in range(3)]
    for job in jobs:
        write_job(root, job)
        for number in range(20):
            server.put(f"{tmp_path.name}/{job.id}/train/trial_{number:03d}/metrics.csv", b"x")
    server.put(f"{tmp_path.name}/{make_job_id()}/train/model.pth", b"a folder of another tool")
    server.put(f"{tmp_path.name}/notes/job.json", b"{}")
    with run_proxy(server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        assert {job.id for job in list_jobs(root)} == {job.id for job in jobs}
        listings = find_listings(proxy.requests)
        assert f"{tmp_path.name}/" in [listing["prefix"][0] for listing in listings]
        assert all("delimiter" in listing for listing in listings if listing.get("max-keys") != ["1"])
        assert not [request for request in proxy.requests if "metrics.csv" in request]
        proxy.requests.clear()
        assert get_job_status(jobs[1].id[:8], root) == jobs[1]
        listings = find_listings(proxy.requests)
        assert len(listings) == 1 and "delimiter" in listings[0]
        assert not [request for request in proxy.requests if jobs[0].id in request], "the others are not looked at"


def find_listings(requests: list[str]) -> list[dict[str, list[str]]]:
    """The queries of the requests that list objects."""
    queries = [parse_qs(urlsplit(request.split(" ")[1]).query) for request in requests]
    return [query for query in queries if "list-type" in query]


def test_a_data_source_is_not_searched_in_depth(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("val_data.npy", "val_label.json", "deep/val_label.pkl", "val_label.pkl/x"):
        server.put(f"{tmp_path.name}/{name}", b"x")
    folder = f"s3://{BUCKET}/{tmp_path.name}"
    with run_proxy(server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        found = read_data_source("evaluate", folder, ())
        assert all("delimiter" in query or query["max-keys"] == ["1"] for query in find_listings(proxy.requests))
        assert find_listings(proxy.requests)
    assert found.problems == []
    assert found.values == {
        "evaluate.test_dataset.data_path": f"{folder}/val_data.npy",
        "evaluate.test_dataset.label_path": f"{folder}/val_label.json",
    }
