"""A Ray cluster of one node on loopback for tests. Others may run beside it: every port is its own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

START_TIMEOUT_S = 120


@dataclass(frozen=True)
class RayCluster:
    """`dashboard` takes jobs; `address` is that of the cluster itself, for ray.init."""

    dashboard: str
    address: str


def find_free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        return [item.getsockname()[1] for item in sockets]


@contextmanager
def start_ray(num_cpus: int = 2) -> Iterator[RayCluster]:
    """Start a head node, wait for its dashboard, and stop it with all that it started."""
    port, dashboard, agent, agent_grpc, client, metrics = find_free_ports(6)
    folder = Path(tempfile.mkdtemp(prefix="kg"))  # short: the names of Ray's sockets lie below it
    scripts = Path(sys.executable).parent
    command = [str(scripts / "ray"), "start", "--head", "--block", "--disable-usage-stats"]
    command += [f"--num-cpus={num_cpus}", "--num-gpus=0", "--node-ip-address=127.0.0.1", f"--port={port}"]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--temp-dir={folder}"]
    command += [f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_grpc}"]
    command += [f"--ray-client-server-port={client}", f"--metrics-export-port={metrics}"]
    command += ["--object-store-memory=80000000"]
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    # Without a mode of its own the cluster takes the token of this account, if an earlier one made one
    variables |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    variables["PATH"] = f"{scripts}:{os.environ['PATH']}"
    with open(folder / "start.log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=variables, start_new_session=True)
    try:
        _wait_for(f"http://127.0.0.1:{dashboard}/api/version", process, folder / "start.log")
        yield RayCluster(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{port}")
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    until_s = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < until_s:
        with suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
            if answer.status == 200:
                return
        time.sleep(0.2)
    raise RuntimeError(f"Ray did not start: {log.read_text()[-3000:]}")
