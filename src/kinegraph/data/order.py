"""The order in which an epoch goes through the clips: a function of (clips, seed, epoch), the same in every process.

full    one permutation of all clips; each clip of a batch is read from another place of the file
blocks  blocks of consecutive clips in random order, WINDOW_BLOCKS of them mixed clip by clip at a time: a file that
        does not fit into memory is read in pieces that a disk or a network gives quickly
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Shuffle = Literal["full", "blocks"]
Clips = NDArray[np.int64]
BLOCK_CLIPS = 128
WINDOW_BLOCKS = 64


class FullOrder:
    """A permutation of all clips, 8 bytes for each."""

    def __init__(self, num_samples: int, seed: int, epoch: int) -> None:
        self.order: Clips = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_samples)

    def take(self, start: int, stop: int) -> Clips:
        """The clips at the places start to stop - 1 of the order."""
        return self.order[start:stop]


class BlockOrder:
    """Blocks in random order, mixed within windows; only one window is in memory at a time."""

    def __init__(self, num_samples: int, seed: int, epoch: int) -> None:
        self.num_samples, self.key = num_samples, [seed, epoch]
        num_blocks = -(-num_samples // BLOCK_CLIPS)
        self.blocks: Clips = np.random.Generator(np.random.PCG64(self.key)).permutation(num_blocks)
        sizes = np.minimum(BLOCK_CLIPS, num_samples - self.blocks * BLOCK_CLIPS)
        starts = np.concatenate([[0], np.cumsum(sizes)])
        # The place at which each window begins, and the end of the last one
        self.bounds: Clips = np.append(starts[:-1:WINDOW_BLOCKS], num_samples)
        self.window = -1
        self.clips: Clips = np.zeros(0, np.int64)

    def take(self, start: int, stop: int) -> Clips:
        """The clips at the places start to stop - 1 of the order."""
        parts = [np.zeros(0, np.int64)]
        while start < min(stop, self.num_samples):
            window = int(np.searchsorted(self.bounds, start, side="right")) - 1
            self._open(window)
            first, end = int(self.bounds[window]), int(min(stop, self.bounds[window + 1]))
            parts.append(self.clips[start - first : end - first])
            start = end
        return np.concatenate(parts)

    def _open(self, window: int) -> None:
        if window == self.window:
            return
        blocks = self.blocks[window * WINDOW_BLOCKS : (window + 1) * WINDOW_BLOCKS]
        clips = (blocks[:, None] * BLOCK_CLIPS + np.arange(BLOCK_CLIPS)).ravel()
        # One coordinate more than the order of the blocks has, so that the two never draw the same numbers
        generator = np.random.Generator(np.random.PCG64([*self.key, window + 1]))
        self.window, self.clips = window, generator.permutation(clips[clips < self.num_samples])


class BalancedOrder:
    """As many clips as there are, of every class equally many: of a rare class some again, of a frequent one not all.

    A class with n clips that gets k places has each of its clips k // n or k // n + 1 times. `repeats` stands beside
    `order` and tells the draws of a clip apart: 0, 1, 2 and so on.
    """

    def __init__(self, labels: NDArray[np.int64], seed: int, epoch: int) -> None:
        generator = np.random.Generator(np.random.PCG64([seed, epoch]))
        classes = np.unique(labels)
        sizes = np.full(len(classes), len(labels) // len(classes))
        sizes[generator.permutation(len(classes))[: len(labels) % len(classes)]] += 1
        parts, repeats = [], []
        for label, size in zip(classes.tolist(), sizes.tolist(), strict=True):
            clips = np.flatnonzero(labels == label)
            rounds = -(-size // len(clips))
            parts.append(np.concatenate([generator.permutation(clips) for _ in range(rounds)])[:size])
            repeats.append(np.arange(size) // len(clips))
        places = generator.permutation(len(labels))
        self.order: Clips = np.concatenate(parts)[places]
        self.repeats: Clips = np.concatenate(repeats)[places]

    def take(self, start: int, stop: int) -> Clips:
        """The clips at the places start to stop - 1 of the order."""
        return self.order[start:stop]


class FileOrder:
    """The clips as they stand in the file."""

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples

    def take(self, start: int, stop: int) -> Clips:
        """The clips at the places start to stop - 1 of the order."""
        return np.arange(start, min(stop, self.num_samples))


Order = FullOrder | BlockOrder | BalancedOrder | FileOrder


def make_order(
    num_samples: int,
    seed: int,
    epoch: int,
    shuffle: bool,
    how: Shuffle,
    balanced_by: NDArray[np.int64] | None = None,
) -> Order:
    """The order of one pass through the clips, as the spec's dataset.shuffle and dataset.balance say."""
    if not shuffle:
        return FileOrder(num_samples)
    if balanced_by is not None:
        return BalancedOrder(balanced_by, seed, epoch)
    return FullOrder(num_samples, seed, epoch) if how == "full" else BlockOrder(num_samples, seed, epoch)
