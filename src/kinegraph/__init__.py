"""Kinegraph: classify human motion from skeleton sequences."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "load": "kinegraph.runtime",
    "open_array": "kinegraph.data.arrays",
    "Predictor": "kinegraph.runtime",
    "run_action": "kinegraph.actions",
    "Result": "kinegraph.run",
    "LAYOUTS": "kinegraph.skeleton.layouts",
    "Layout": "kinegraph.skeleton.layouts",
    "get_layout": "kinegraph.skeleton.layouts",
    "KinegraphError": "kinegraph.errors",
    "UserError": "kinegraph.errors",
}

__all__ = [*_EXPORTS, "__version__"]


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used: nothing here imports torch before an action needs it."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'kinegraph' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
