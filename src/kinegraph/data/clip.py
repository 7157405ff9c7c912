"""The interchange form between the readers of recordings and everything else."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, eq=False)
class Track:
    """One person followed through a recording, as the detector wrote it, before any normalisation.

    T counts the frames in which the person was seen, in the order of the recording.
    """

    source: int
    """The camera or stream; ids of people are unique within it."""
    object_id: int
    positions: npt.NDArray[np.float64]
    """(T, V, 3): x, y, z of each joint in the units of the file."""
    scores: npt.NDArray[np.float64]
    """(T, V): the detector's confidence; 0 means that the joint was not found."""
    frames: npt.NDArray[np.int64]
    """(T,): frame numbers of the stream."""
    timestamps_ns: npt.NDArray[np.uint64]
    """(T,): time stamps of the frames in nanoseconds."""

    @property
    def num_frames(self) -> int:
        return len(self.frames)

    def find_gaps(self) -> npt.NDArray[np.intp]:
        """(gaps,): indices of the frames whose number does not follow the frame before them by one."""
        return np.flatnonzero(np.diff(self.frames) != 1) + 1
