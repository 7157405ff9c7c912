"""Decisions while frames come in: who does what, from when to when, as events."""

from __future__ import annotations

from kinegraph.live.decisions import Rules, Segment, find_segments, make_rules
from kinegraph.live.engine import LiveEngine
from kinegraph.live.frames import Observation

__all__ = ["LiveEngine", "Observation", "Rules", "Segment", "find_segments", "make_rules"]
