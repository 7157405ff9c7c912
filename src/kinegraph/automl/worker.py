"""A worker of a study: trains what it is told, one training after the other. `python -m kinegraph.automl.worker`

It reads one JSON object a line from stdin, {"name", "spec"}, and answers on stdout with {"name", "error", "problems"}.
When stdin ends, whoever started it is gone: it stops at once, in the middle of a step, and the checkpoint of the last
epoch is what the study goes on from.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import traceback
from typing import IO, Any

from kinegraph.actions import run_action
from kinegraph.errors import KinegraphError, UserError


def main() -> None:
    """Train until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not come between the answers
    source = os.fdopen(os.dup(0), encoding="utf-8")
    # A thread that waits on sys.stdin holds its lock, and processes that are forked meanwhile (those that read data)
    # would wait for it for ever
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115 (it stays for as long as the process)
    requests: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=_read_requests, args=(source, requests), daemon=True).start()
    while True:
        request = requests.get()
        _answer(answers, {"name": request["name"], **train_trial(request["spec"])})


def _read_requests(source: IO[str], requests: queue.Queue[dict[str, Any]]) -> None:
    for line in source:
        requests.put(json.loads(line))
    os._exit(0)


def train_trial(spec: dict[str, Any]) -> dict[str, Any]:
    """Train; whatever goes wrong is an answer.

    {"error": '' or what failed, "is_mistake": whether the user can mend it, "problems": [...]}.
    """
    try:
        run_action("train", spec)
    except KinegraphError as error:
        return {"error": str(error), "is_mistake": isinstance(error, UserError), "problems": error.as_data()}
    except Exception as error:
        traceback.print_exc()
        _free_memory()
        return {"error": f"{type(error).__name__}: {error}", "is_mistake": False, "problems": []}
    return {"error": "", "is_mistake": False, "problems": []}


def _free_memory() -> None:
    """After a GPU ran out of memory: what the failed training held must not fail the next one."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _answer(answers: IO[str], data: dict[str, Any]) -> None:
    answers.write(json.dumps(data) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
