"""How many threads inference takes: as many as there are cores that this process may really use."""

from __future__ import annotations

import os
from pathlib import Path

from kinegraph.errors import Problem, UserError

MAX_THREADS = 1024
ROOT = Path("/")


def count_threads(requested: int = 0) -> int:
    """`requested`, or where that is 0 OMP_NUM_THREADS if it is set, else `count_cores`. Raises UserError."""
    if not 0 <= requested <= MAX_THREADS:
        raise UserError(Problem("threads", str(requested), f"1 to {MAX_THREADS}, or 0 for the cores of this process"))
    if requested:
        return requested
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdecimal() and int(given):
        return min(int(given), MAX_THREADS)
    return count_cores()


def count_cores(root: Path = ROOT) -> int:
    """Physical cores among the CPUs that this process may run on, at most what its control group may use; at least 1.

    Counting those of the machine would let threads wait for one another in a container. Threads of one core share
    its arithmetic units: a second one there gains nothing. `root`: where /proc and /sys are.
    """
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    cores = set()
    for cpu in cpus:
        siblings = root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        cores.add(_read(siblings) or str(cpu))
    quota = _find_quota(root)
    return max(1, min(len(cores), int(quota) if quota is not None else len(cores)))


def _find_quota(root: Path) -> float | None:
    """CPUs that the control group (version 2 or 1) and those above it grant; None: no limit."""
    quotas = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, place = line.split(":", 2) if line.count(":") >= 2 else ("", "-", "")
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        parts = [part for part in place.split("/") if part not in ("", "..")]
        for depth in range(len(parts) + 1):
            folder = mount.joinpath(*parts[:depth])
            words = _read(folder / "cpu.max").split() if not controllers else []
            if controllers:
                words = [_read(folder / f"cpu.cfs_{kind}_us") for kind in ("quota", "period")]
            if len(words) == 2 and words[0].isdecimal() and words[1].isdecimal() and int(words[1]):
                quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
