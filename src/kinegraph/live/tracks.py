"""The people of a stream: a row of arrays each, and their frames put on the clock of the model.

A track is one person without a gap. Its clock starts with its first frame; a tick is a moment at which the model wants
a frame. The frame of a tick is interpolated between the two neighbouring frames (linearly, as soon as the later one is
there), so that a stream of any rate, also a changing one, looks to the model as its training data did.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]
Values = NDArray[np.float64]
Joints = NDArray[np.float32]
FIRST_CAPACITY = 16
EARLY_SHARE = 0.05
EARLY_S = 0.00101
MAX_EARLY_SHARE = 0.25
"""A frame serves the tick that comes so little later, as a share of a period or in seconds: whichever is more, up to
MAX_EARLY_SHARE. Time stamps are rounded, often to milliseconds; waiting for the next frame would gain nothing."""
CHANGING = ("start", "time", "num_ticks", "progress", "joints", "tick_times", "has_answered", "is_open")


class TrackTable:
    """What is known of each track, in arrays with a row each; rows are used again. No decisions, no network.

    period_s     between two ticks; 0: every frame is a tick
    lag_ticks    how many ticks the model's answers lag behind its input
    """

    def __init__(self, num_joints: int, num_channels: int, period_s: float, lag_ticks: int, max_tracks: int) -> None:
        self.period_s = period_s
        self.lag_ticks = lag_ticks
        self.max_tracks = max_tracks
        self.early_s = min(max(EARLY_SHARE * period_s, EARLY_S), MAX_EARLY_SHARE * period_s)
        self.rows: dict[str, int] = {}
        self.people: list[str] = []
        self.free: list[int] = []
        self.progress_s = 0.0
        """How far the stream has come: the furthest that any track has come, each by its own time stamps."""
        lags = lag_ticks + 1 if period_s == 0 else 0
        self.start = np.zeros(0)
        self.time = np.zeros(0)
        self.num_ticks = np.zeros(0, np.int64)
        self.progress = np.zeros(0)
        self.joints = np.zeros((0, num_joints, num_channels), np.float32)
        self.tick_times = np.zeros((0, lags))
        self.has_answered = np.zeros(0, bool)
        self.is_open = np.zeros(0, bool)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def capacity(self) -> int:
        return len(self.time)

    def open(self, person: str, time: float, joints: Joints) -> int | None:
        """A row for a new track with its first frame, joints (V, C); None if there are max_tracks already.

        NaN joints, which were not found, become zero: what they are in training data.
        """
        if not self.free and not self._grow():
            return None
        row = self.free.pop()
        self.rows[person] = row
        self.people[row] = person
        self.start[row] = self.time[row] = time
        self.num_ticks[row] = 0
        self.progress[row] = self.progress_s
        self.joints[row] = np.nan_to_num(joints, nan=0.0)
        self.tick_times[row] = np.nan
        self.has_answered[row] = False
        self.is_open[row] = True
        return row

    def close(self, row: int) -> None:
        """Give the row back."""
        del self.rows[self.people[row]]
        self.people[row] = ""
        self.is_open[row] = False
        self.free.append(row)

    def count_ticks(self, rows: Rows, times: Values) -> Rows:
        """How many ticks each of the rows has up to the times of their next frames that it has not had yet."""
        if self.period_s == 0:
            return np.ones(len(rows), np.int64)
        places = (times - self.start[rows] + self.early_s) / self.period_s
        return np.floor(places).astype(np.int64) + 1 - self.num_ticks[rows]

    def interpolate(self, rows: Rows, times: Values, joints: Joints) -> tuple[Joints, Values]:
        """The frames (n, V, C) of the next tick of each row, and the times of these ticks.

        times (n,) and joints (n, V, C): the next frame of each, at or after the tick. A joint that is exactly zero,
        which stands for one that was not found, in one of the two frames is not mixed: the nearer frame has it.
        """
        if self.period_s == 0:
            self.tick_times[rows, self.num_ticks[rows] % self.tick_times.shape[1]] = times
            self.num_ticks[rows] += 1
            return joints, times
        ticks = self.start[rows] + self.num_ticks[rows] * self.period_s
        self.num_ticks[rows] += 1
        before, spans = self.joints[rows], times - self.time[rows]
        share = np.where(spans > 0, (ticks - self.time[rows]) / np.where(spans > 0, spans, 1), 1.0)
        share = np.clip(share, 0.0, 1.0)
        part = share.astype(np.float32)[:, None, None]
        mixed = before + part * (joints - before)
        is_whole = (part <= 0) | (part >= 1)
        is_lost = ~np.logical_and(before.any(axis=2), joints.any(axis=2))[..., np.newaxis]
        nearer = np.where(part < 0.5, before, joints)
        return np.where(is_lost | is_whole, nearer, mixed), ticks

    def find_answer_times(self, rows: Rows, ticks: Values) -> Values:
        """What the answers after the ticks are about: `lag_ticks` before; the first frame at the earliest."""
        if self.period_s == 0:
            size = self.tick_times.shape[1]
            oldest = self.tick_times[rows, self.num_ticks[rows] % size]
            return np.where(np.isnan(oldest), self.start[rows], oldest)
        return np.maximum(ticks - self.lag_ticks * self.period_s, self.start[rows])

    def move_on(self, rows: Rows, times: Values, joints: Joints) -> None:
        """The frames whose ticks are done become the last frames of their tracks."""
        self.progress[rows] += times - self.time[rows]
        self.progress_s = max(self.progress_s, float(self.progress[rows].max(initial=0)))
        self.time[rows] = times
        self.joints[rows] = joints

    def find_idle(self, limit_s: float) -> list[int]:
        """The rows of tracks that the rest of the stream has left behind by more than limit_s."""
        idle = self.is_open & (self.progress_s - self.progress > limit_s)
        return np.flatnonzero(idle).tolist() if idle.any() else []

    def _grow(self) -> bool:
        old = self.capacity
        new = min(max(2 * old, FIRST_CAPACITY), self.max_tracks)
        if new == old:
            return False
        for name in CHANGING:
            array = getattr(self, name)
            setattr(self, name, np.concatenate([array, np.zeros((new - old, *array.shape[1:]), array.dtype)]))
        self.people += [""] * (new - old)
        self.free = list(range(new - 1, old - 1, -1))
        return True
