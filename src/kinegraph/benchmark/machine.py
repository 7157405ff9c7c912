"""Where a measurement was made, and how much memory a process takes."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import kinegraph
from kinegraph.threads import count_cores

PACKAGES = ("numpy", "torch", "onnx", "onnxruntime", "openvino", "tensorrt")
EXTENSIONS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "asimd", "sve")
"""Of the vector units: what decides which kernels a backend takes."""
CPU_INFO = Path("/proc/cpuinfo")


def describe_machine() -> dict[str, Any]:
    """CPU, memory, versions and how busy it is. Nothing that names the machine or its user."""
    fields = read_cpu_fields(CPU_INFO.read_text(errors="replace") if CPU_INFO.is_file() else "")
    flags = set((fields.get("flags") or fields.get("Features", "")).split())
    return {
        "cpu": fields.get("model name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "extensions": [name for name in EXTENSIONS if name in flags],
        "logical_cpus": os.cpu_count(),
        "usable_cores": count_cores(),
        "memory_bytes": _count_memory(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {"kinegraph": kinegraph.__version__, **_list_versions()},
    }


def read_cpu_fields(text: str) -> dict[str, str]:
    """The fields of the first processor in the text of /proc/cpuinfo."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, separator, value = line.partition(":")
        if not separator and fields:
            break
        fields[name.strip()] = value.strip()
    return fields


def _list_versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _count_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def read_peak_bytes() -> int | None:
    """The most memory that this process ever held (resident set); None where the system does not say.

    On Linux not from getrusage: there a new process begins with the peak of the one that started it.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
