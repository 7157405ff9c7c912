"""Actions as jobs: under a runner, with a record, finding each other's results.

from kinegraph.jobs import create_job, wait_for_job
train = create_job("train", data_source="data", spec={"model": {"graph_layout": "coco"}})
wait_for_job(train.id)
create_job("evaluate", parent_job_id=train.id, data_source="data")
"""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "create_job": "kinegraph.jobs.client",
    "get_job_status": "kinegraph.jobs.client",
    "get_job_logs": "kinegraph.jobs.client",
    "cancel_job": "kinegraph.jobs.client",
    "list_jobs": "kinegraph.jobs.client",
    "wait_for_job": "kinegraph.jobs.client",
    "resolve_spec_param": "kinegraph.jobs.resolve",
    "SPEC_PARAMS": "kinegraph.jobs.resolve",
    "Job": "kinegraph.jobs.record",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'kinegraph.jobs' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
