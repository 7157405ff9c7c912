"""Processes of this machine: which one is meant by a record, and whether it is still there."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from pathlib import Path

from kinegraph.jobs.record import ProcessInfo

BOOT_ID_FILE = Path("/proc/sys/kernel/random/boot_id")
ENDED_STATES = ("Z", "X", "x")
"""A zombie has ended: only its parent has not asked for its exit code yet."""


def describe_process(pid: int) -> ProcessInfo:
    """The identity of a process of this machine; `start` and `boot` are empty where /proc does not exist."""
    return ProcessInfo(pid, socket.gethostname(), _read_start(pid)[1], _read_boot_id())


def is_on_this_machine(process: ProcessInfo) -> bool:
    return process.host == socket.gethostname()


def is_alive(process: ProcessInfo) -> bool:
    """Whether exactly this process runs on this machine, since its last restart."""
    if not is_on_this_machine(process) or process.boot != _read_boot_id() or process.pid <= 1:
        return False
    state, start = _read_start(process.pid)
    if state:
        return state not in ENDED_STATES and start == process.start
    if os.path.isdir("/proc/self"):
        return False
    try:
        os.kill(process.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def send_signal(process: ProcessInfo | None, number: signal.Signals, to_group: bool = False) -> bool:
    """Signal a process, or the group that it leads. False if it is not there (any more) or not on this machine."""
    if process is None or not is_alive(process):
        return False
    with contextlib.suppress(ProcessLookupError, PermissionError):
        (os.killpg if to_group else os.kill)(process.pid, number)
        return True
    return False


def _read_start(pid: int) -> tuple[str, str]:
    """State and start time (ticks since boot) of a process, or empty texts."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "", ""
    fields = text.rpartition(")")[2].split()  # the name before it may hold spaces and parentheses
    return fields[0], fields[19]


def _read_boot_id() -> str:
    try:
        return BOOT_ID_FILE.read_text(encoding="ascii").strip()
    except OSError:
        return ""
