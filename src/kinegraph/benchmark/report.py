"""The measurements as plain data: benchmark.json.

format_version, created, interrupted
model         file, bytes, parameters, what it is; shape of its clips; multiply-adds of one clip
settings      what was asked
machine       CPU, memory, versions, load
peaks         per thread count: the matrix product that the rates are compared with
measurements  one entry for each backend, thread count and batch size
steps         one entry for each thread count and number of people, frame by frame

An entry has a status: measured, waiting (interrupted before its turn), unavailable or failed, the last two with a
reason. What was not measured is null.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import numpy as np

from kinegraph.benchmark.facts import ModelFacts
from kinegraph.benchmark.plan import Lane
from kinegraph.benchmark.session import MIN_CALLS, Session
from kinegraph.benchmark.settings import Settings

FORMAT_VERSION = 1
PERCENTILES = (50, 90, 99)
FLOPS = 2
"""Of a multiplication with an addition."""


def build_report(settings: Settings, facts: ModelFacts, machine: dict[str, Any], session: Session) -> dict[str, Any]:
    """All of benchmark.json: latencies in ms, other times in s, rates of arithmetic in GFLOP/s, sizes in bytes."""
    lanes = session.lanes
    peaks = [describe_peak(lane) for lane in lanes if lane.kind == "products"]
    on_cpu = settings.device in ("", "cpu")
    return {
        "format_version": FORMAT_VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "interrupted": session.stop_signal != 0,
        "model": _describe_model(settings, facts),
        "settings": {**asdict(settings), "min_calls": MIN_CALLS, "slice_s": session.slice_s},
        "machine": machine,
        "peaks": peaks,
        "measurements": [
            # TensorRT takes a GPU by itself: the product on the CPU says nothing about it
            describe_clips(lane, facts, {} if on_cpu and lane.backend == "tensorrt" else _index_peaks(peaks))
            for lane in lanes
            if lane.kind == "clips"
        ],
        "steps": [describe_steps(lane) for lane in lanes if lane.kind == "steps"],
    }


def _describe_model(settings: Settings, facts: ModelFacts) -> dict[str, Any]:
    channels, frames, joints, people = facts.clip_shape
    return {
        "path": settings.model,
        "file_bytes": facts.file_bytes,
        "type": facts.model_type,
        "layout": facts.layout,
        "num_classes": facts.num_classes,
        "parameters": facts.parameters,
        "clip": {"channels": channels, "frames": frames, "joints": joints, "people": people},
        "multiply_adds_per_clip": facts.multiply_adds,
    }


def _index_peaks(peaks: Sequence[dict[str, Any]]) -> dict[int, float]:
    return {peak["threads"]: peak["gflops"] for peak in peaks if peak["gflops"]}


def describe_peak(lane: Lane) -> dict[str, Any]:
    """The best matrix product of all slices: a peak is what the machine can do when nothing disturbs it."""
    gflops = None
    if lane.latencies_s and lane.can_run:
        gflops = FLOPS * lane.facts["multiply_adds"] / min(lane.latencies_s) / 1e9
    return {**_describe_status(lane), "threads": lane.threads, "library": lane.facts.get("library"), "gflops": gflops}


def describe_clips(lane: Lane, facts: ModelFacts, peaks: dict[int, float]) -> dict[str, Any]:
    """An entry of `measurements`.

    clips_per_s is all clips through all the time. gflops is that of the fastest call, as the peak is that of the
    fastest product, so that a busy machine makes neither look worse than the other; it counts the multiply-adds of the
    network as it is defined, whatever the backend does to save some, and leaves out the share of the input pipeline.
    memory_bytes is what the process grew by, up to this batch size.
    """
    measured = _describe_times(lane)
    rate = measured["calls_per_s"]
    clips_per_s = None if rate is None else rate * lane.size
    gflops = None
    if clips_per_s is not None and facts.multiply_adds is not None:
        compute_s = min(lane.latencies_s) * (1 - measured["pipeline_share"])
        gflops = FLOPS * facts.multiply_adds * lane.size / max(compute_s, 1e-9) / 1e9
    peak = peaks.get(lane.threads)
    calls = measured["calls"] * lane.size
    return {
        "backend": lane.backend,
        "threads": lane.threads,
        "batch": lane.size,
        **_describe_status(lane),
        "calls": measured["calls"],
        "latency_ms": measured["latency_ms"],
        "clips_per_s": clips_per_s,
        "cpu_ms_per_clip": 1e3 * lane.cpu_s / calls if calls else None,
        "gflops": gflops,
        "share_of_peak": gflops / peak if gflops is not None and peak else None,
        "pipeline_share": measured["pipeline_share"] if facts.data_path is not None else None,
        **_describe_start(lane),
    }


def describe_steps(lane: Lane) -> dict[str, Any]:
    """An entry of `steps`; latency_ms is that of one frame of all people, frames_per_s counts frames of one person."""
    measured = _describe_times(lane)
    rate = measured["calls_per_s"]
    return {
        "threads": lane.threads,
        "people": lane.size,
        **_describe_status(lane),
        "calls": measured["calls"],
        "latency_ms": measured["latency_ms"],
        "frames_per_s": None if rate is None else rate * lane.size,
        "delay_frames": lane.facts.get("delay_frames"),
        **_describe_start(lane),
    }


def summarise_latencies(latencies_s: Sequence[float]) -> dict[str, float]:
    """p50, p90, p99, mean, min and max in ms, of at least one.

    Percentile p of n sorted values is the one at p / 100 * (n - 1), counted from 0; between two places it lies on the
    line through their values (Hyndman and Fan 1996, definition 7).
    """
    values = np.asarray(latencies_s, np.float64) * 1e3
    found = dict(zip((f"p{p}" for p in PERCENTILES), np.percentile(values, PERCENTILES).tolist(), strict=True))
    return {**found, "mean": float(values.mean()), "min": float(values.min()), "max": float(values.max())}


def _describe_times(lane: Lane) -> dict[str, Any]:
    if not (lane.latencies_s and lane.can_run):
        return {"calls": 0, "latency_ms": None, "calls_per_s": None, "pipeline_share": None}
    total_s = sum(lane.latencies_s)
    return {
        "calls": len(lane.latencies_s),
        "latency_ms": summarise_latencies(lane.latencies_s),
        "calls_per_s": len(lane.latencies_s) / total_s,
        "pipeline_share": lane.pipeline_s / total_s,
    }


def _describe_status(lane: Lane) -> dict[str, Any]:
    return {"status": lane.status, "reason": lane.reason or None}


def _describe_start(lane: Lane) -> dict[str, Any]:
    """Loading, the first call, which chooses kernels and allocates, and the growth of the process."""
    is_open = lane.load_s > 0
    return {
        "load_s": lane.load_s if is_open else None,
        "first_call_ms": 1e3 * lane.first_s if lane.first_s else None,
        "memory_bytes": lane.memory_bytes,
    }
