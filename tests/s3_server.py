"""An S3 server on loopback for tests, and a proxy before it that counts requests and breaks connections."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BUCKET = "bucket"
CHECK_FROM_NOW_ON, CHECK_NEVER = b"0", b"inf"


@dataclass
class S3Server:
    """A running server. `client` is boto3's: tests look at the bucket with it, not with what they test."""

    endpoint: str
    access_key: str
    secret_key: str = field(repr=False)
    client: Any = field(repr=False)

    @property
    def variables(self) -> dict[str, str]:
        """The environment of a process that uses the server."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_ENDPOINT_URL": self.endpoint,
        }

    def put(self, key: str, content: bytes | Path) -> str:
        """Store an object; its URI."""
        body = content.read_bytes() if isinstance(content, Path) else content
        self.client.put_object(Bucket=BUCKET, Key=key, Body=body)
        return f"s3://{BUCKET}/{key}"

    def get(self, key: str) -> bytes:
        content: bytes = self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
        return content

    def list_keys(self, prefix: str = "") -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return [entry["Key"] for page in pages for entry in page.get("Contents", ())]


@contextmanager
def serve_s3() -> Iterator[S3Server]:
    """An S3 server on a free port of loopback, with one empty bucket. It checks every signature and knows one key."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        _ask(f"http://{host}:{port}/moto-api/reset-auth", CHECK_NEVER)
        _ask(f"http://{host}:{port}/moto-api/reset", b"")
        options: dict[str, Any] = {"endpoint_url": f"http://{host}:{port}", "region_name": "us-east-1"}
        anybody = {"aws_access_key_id": "anybody", "aws_secret_access_key": "anything"}
        iam = boto3.client("iam", **options, **anybody)
        iam.create_user(UserName="tester")
        allowed = {"Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}], "Version": "2012-10-17"}
        iam.put_user_policy(UserName="tester", PolicyName="storage", PolicyDocument=json.dumps(allowed))
        key = iam.create_access_key(UserName="tester")["AccessKey"]
        known = {"aws_access_key_id": key["AccessKeyId"], "aws_secret_access_key": key["SecretAccessKey"]}
        client = boto3.client("s3", **options, **known)
        client.create_bucket(Bucket=BUCKET)
        _ask(f"{options['endpoint_url']}/moto-api/reset-auth", CHECK_FROM_NOW_ON)
        yield S3Server(options["endpoint_url"], key["AccessKeyId"], key["SecretAccessKey"], client)
    finally:
        server.stop()


def _ask(url: str, content: bytes) -> None:
    request = urllib.request.Request(url, content, {"Content-Type": "text/plain"}, method="POST")
    urllib.request.urlopen(request).close()


@dataclass
class Proxy:
    """Between client and server: what it saw, and what it is to break.

    `cut_answer_after` and `cut_request_after`: close both sides once so many bytes went through in that direction on
    one connection, `cuts` times. `answer`: reply with these bytes instead of asking the server.
    """

    endpoint: str = ""
    requests: list[str] = field(default_factory=list)
    answer_bytes: int = 0
    cuts: int = 0
    cut_answer_after: int = 0
    cut_request_after: int = 0
    answer: bytes = b""
    lock: Any = field(default_factory=threading.Lock, repr=False)

    def take_cut(self) -> bool:
        with self.lock:
            self.cuts -= 1
            return self.cuts >= 0


@contextmanager
def run_proxy(target: str) -> Iterator[Proxy]:
    """A proxy on a free port of loopback before the server at this endpoint."""
    host, port = target.removeprefix("http://").split(":")
    proxy = Proxy()
    listener = socket.create_server(("127.0.0.1", 0))
    proxy.endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            server = socket.create_connection((host, int(port)))
            for start, end, is_answer in ((client, server, False), (server, client, True)):
                threading.Thread(target=_pass_on, args=(proxy, start, end, is_answer), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield proxy
    finally:
        listener.close()


def _pass_on(proxy: Proxy, start: socket.socket, end: socket.socket, is_answer: bool) -> None:
    passed = 0
    with suppress(OSError):
        while content := start.recv(65536):
            passed += len(content)
            with proxy.lock:
                if is_answer:
                    proxy.answer_bytes += len(content)
                elif content.split(b" ", 1)[0] in (b"GET", b"PUT", b"HEAD", b"POST", b"DELETE"):
                    proxy.requests.append(content.split(b" HTTP/")[0].decode(errors="replace"))
            if not is_answer and proxy.answer:
                start.sendall(proxy.answer)
                break
            limit = proxy.cut_answer_after if is_answer else proxy.cut_request_after
            if limit and passed > limit and proxy.take_cut():
                break
            end.sendall(content)
    for side in (start, end):
        with suppress(OSError):
            side.shutdown(socket.SHUT_RDWR)
        side.close()


def make_environment(server: S3Server, cache: Path, **variables: str) -> dict[str, str]:
    """The environment of a subprocess that uses the server and a cache folder of its own."""
    return {**os.environ, **server.variables, "KINEGRAPH_CACHE": str(cache), "OMP_NUM_THREADS": "1", **variables}
