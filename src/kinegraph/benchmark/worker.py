"""A process in which one subject is measured. `python -m kinegraph.benchmark.worker`

It reads one JSON object a line from stdin and answers each with one on stdout:

    {"do": "open", "kind", ...}     -> {"load_s", "start_bytes", "facts"}
    {"do": "warm", "size"}          -> {"first_s", "peak_bytes"}
    {"do": "measure", "size", "slice_s"} -> {"latencies_s", "pipeline_s", "cpu_s"}

or with {"error", "is_refusal"}. It ends with its stdin.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from typing import Any

from kinegraph.benchmark.machine import read_peak_bytes
from kinegraph.benchmark.subjects import Call, Subject, make_clips, open_subject
from kinegraph.errors import KinegraphError

WARM_CALLS, WARM_S = 5, 1.0
MAX_CALLS = 10_000
"""In one slice."""
RETAKE_SHARE = 0.25


def main() -> None:
    """Answer until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not come between the answers
    worker = Worker()
    for line in sys.stdin:
        answers.write(json.dumps(worker.answer(json.loads(line))) + "\n")
        answers.flush()


class Worker:
    def __init__(self) -> None:
        self.subject: Subject | None = None
        self.calls: dict[int, Call] = {}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what a request says; whatever goes wrong is an answer."""
        try:
            if request["do"] == "open":
                return self._open(request)
            size = request["size"]
            if request["do"] == "warm":
                return self._warm(size)
            return measure(self.calls[size], request["slice_s"])
        except KinegraphError as error:
            return {"error": str(error), "is_refusal": True}
        except ImportError as error:
            return {"error": f"{error.name or error} is not installed", "is_refusal": True}
        except Exception as error:
            traceback.print_exc()
            return {"error": f"{type(error).__name__}: {error}", "is_refusal": False}

    def _open(self, request: dict[str, Any]) -> dict[str, Any]:
        clips = make_clips(request)
        start_bytes = read_peak_bytes()
        begun_s = time.perf_counter()
        self.subject = open_subject(request, clips)
        load_s = time.perf_counter() - begun_s
        return {"load_s": load_s, "start_bytes": start_bytes, "facts": self.subject.facts}

    def _warm(self, size: int) -> dict[str, Any]:
        """The first calls choose kernels, allocate and compile."""
        assert self.subject is not None
        call = self.subject.make_call(size)
        begun_s = time.perf_counter()
        call()
        first_s = time.perf_counter() - begun_s
        for _ in range(WARM_CALLS - 1):
            if time.perf_counter() - begun_s > WARM_S:
                break
            call()
        self.calls[size] = call
        return {"first_s": first_s, "peak_bytes": read_peak_bytes()}


def measure(call: Call, slice_s: float) -> dict[str, Any]:
    """Call for about `slice_s` seconds, at least once.

    Other processes have used the caches since the last slice: a first call that is short is repeated, not counted.
    """
    latencies: list[float] = []
    pipeline_s = 0.0
    is_first = True
    begun_s = time.perf_counter()
    cpu_begun_s = time.process_time()
    while True:
        before_s = time.perf_counter()
        spent_s = call()
        after_s = time.perf_counter()
        if is_first and after_s - before_s < RETAKE_SHARE * slice_s:
            begun_s, cpu_begun_s = after_s, time.process_time()
        else:
            latencies.append(after_s - before_s)
            pipeline_s += spent_s
        is_first = False
        if latencies and (after_s - begun_s >= slice_s or len(latencies) >= MAX_CALLS):
            break
    return {"latencies_s": latencies, "pipeline_s": pipeline_s, "cpu_s": time.process_time() - cpu_begun_s}


if __name__ == "__main__":
    main()
