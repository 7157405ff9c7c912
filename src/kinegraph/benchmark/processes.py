"""Starting workers and talking to them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from typing import Any

from kinegraph.spec import KEY_VARIABLE

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
END_WAIT_S = 5.0


class WorkerError(Exception):
    """A worker cannot do what it was asked for. `is_refusal`: it said so itself, in words meant for users."""

    def __init__(self, reason: str, is_refusal: bool) -> None:
        super().__init__(reason)
        self.reason, self.is_refusal = reason, is_refusal


class WorkerProcess:
    """A fresh process. The thread counts of libraries that read them once, at their start, go in the environment;
    so does the key, which others could see on a command line.
    """

    def __init__(self, threads: int, key: str) -> None:
        self.log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (closed by `close`)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kinegraph.benchmark.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            encoding="utf-8",
            env={**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(threads)), **({KEY_VARIABLE: key} if key else {})},
            start_new_session=True,  # Ctrl-C is for the process that measures: it still writes what there is
        )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request of worker.py. Raises WorkerError where there is none."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line.endswith("\n"):
            raise WorkerError(self._describe_end(), is_refusal=False)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"], answer["is_refusal"])
        return answer

    def close(self) -> None:
        """End the process, wherever it is."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        self.log.close()

    def _describe_end(self) -> str:
        try:
            code = self.process.wait(END_WAIT_S)
        except subprocess.TimeoutExpired:
            return "the process closed its output"
        self.log.seek(0)
        said = [line.strip() for line in self.log.read()[-4000:].splitlines() if line.strip()]
        last = f": {said[-1][:200]}" if said else ""
        if code >= 0:
            return f"the process ended with exit code {code}{last}"
        name = signal.Signals(-code).name
        return f"the process was ended by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}{last}"
