"""Frame by frame inference: what an answer costs is one frame, not a window."""

from __future__ import annotations

from kinegraph.online.load import load
from kinegraph.online.model import OnlineModel
from kinegraph.online.state import State, join_states, state_from_bytes
from kinegraph.online.tracks import TrackPool

__all__ = ["OnlineModel", "State", "TrackPool", "join_states", "load", "state_from_bytes"]
