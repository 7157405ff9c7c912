"""Clips for a DataLoader: whole batches from a memory map, in an order that seed and epoch alone decide."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from kinegraph.data.arrays import cast_to_float32, open_array
from kinegraph.data.checks import DatasetInfo, check_dataset, infer_classes
from kinegraph.data.pipeline import InputPipeline
from kinegraph.errors import DataError, Problem

__all__ = [
    "Batch",
    "ClipDataset",
    "DatasetInfo",
    "EpochBatchSampler",
    "EvaluationShard",
    "check_dataset",
    "infer_classes",
    "open_array",
    "pass_batch",
]


class Batch(NamedTuple):
    """Clips float32 (n, C, T, V, M), labels int64 (n,), -1 where unknown, and the clips' numbers in the set."""

    data: torch.Tensor
    labels: torch.Tensor
    index: torch.Tensor  # type: ignore[assignment]  # hides tuple.index, which nothing calls


def pass_batch(batch: Any) -> Batch:
    """The collate function that belongs to ClipDataset, which makes whole batches itself."""
    whole: Batch = batch  # the loader's own types know lists of single samples only
    return whole


class ClipDataset(Dataset[Batch]):
    """The clips of a .npy file, read batch by batch.

    Use it as `DataLoader(dataset, batch_sampler=..., collate_fn=pass_batch)`. The memory map is never
    pickled: each worker opens the file itself. With a pipeline, every batch goes through it, which also
    refuses NaN and infinity.
    """

    def __init__(
        self,
        data_path: str | Path,
        labels: np.ndarray | None = None,
        pipeline: InputPipeline | None = None,
    ) -> None:
        self.data_path = str(data_path)
        self.pipeline = pipeline
        self.array: np.ndarray | None = open_array(data_path)
        self.shape = self.array.shape
        self.labels = np.full(len(self.array), -1, np.int64) if labels is None else np.asarray(labels, np.int64)
        if self.labels.shape != (len(self.array),):
            expected = f"one for each of the {len(self.array)} clips of {data_path}"
            raise DataError(Problem("labels", f"shape {self.labels.shape}", expected))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> Batch:
        """The batch that holds this one clip."""
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """The clips in the order asked for, read from the file in the order of the file."""
        index = np.asarray(indices, np.int64)
        if len(index) and not (index.min() >= 0 and index.max() < len(self)):
            raise IndexError(f"clips {index.min()} to {index.max()} of a set of {len(self)}")
        array = self._open()
        clips = np.empty((len(index), *self.shape[1:]), np.float32)
        for place in np.argsort(index, kind="stable"):
            clips[place] = cast_to_float32(array[index[place]])
        if self.pipeline is not None:
            clips = self.pipeline(clips, self.data_path)
        return Batch(torch.from_numpy(clips), torch.from_numpy(self.labels[index]), torch.from_numpy(index))

    def _open(self) -> np.ndarray:
        if self.array is None:
            self.array = open_array(self.data_path)
            if self.array.shape != self.shape:
                got = f"shape {self.array.shape}"
                raise DataError(Problem(self.data_path, got, f"{self.shape}, as when it was first opened"))
        return self.array

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "array": None}


class EpochBatchSampler:
    """The batches of one epoch as lists of clip numbers, a pure function of the arguments.

    The order is a permutation drawn from (seed, epoch), the same on every rank. It is cut into global batches
    of batch_size x world_size clips, and each rank takes its slice of each, so all ranks have equally many
    batches. `drop_last` drops an incomplete global batch, unless it is the only one: a small set is still
    trained on. Where an incomplete global batch does not divide among the ranks, it is filled up with clips
    from the start of the order. `start_batch` leaves out the batches that were already done before a resume.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        seed: int,
        epoch: int = 0,
        start_batch: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        _check_sizes(num_samples, batch_size, rank, world_size)
        if seed < 0 or epoch < 0:
            raise ValueError(f"seed {seed} and epoch {epoch} must be 0 or more")
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = epoch
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        num_full, rest = divmod(num_samples, batch_size * world_size)
        self.batches_per_epoch = num_full if drop_last and num_full else num_full + (rest > 0)
        if not 0 <= start_batch <= self.batches_per_epoch:
            raise ValueError(f"start_batch {start_batch} is outside 0 to {self.batches_per_epoch}")
        self.start_batch = start_batch

    def __len__(self) -> int:
        """Batches that are left, from start_batch on."""
        return self.batches_per_epoch - self.start_batch

    def __iter__(self) -> Iterator[list[int]]:
        order = np.arange(self.num_samples)
        if self.shuffle:
            generator = np.random.Generator(np.random.PCG64([self.seed, self.epoch]))
            order = generator.permutation(self.num_samples)
        global_size = self.batch_size * self.world_size
        for batch in range(self.start_batch, self.batches_per_epoch):
            clips = order[batch * global_size : (batch + 1) * global_size]
            clips = np.concatenate([clips, np.resize(order, -len(clips) % self.world_size)])
            size = len(clips) // self.world_size
            yield clips[self.rank * size : (self.rank + 1) * size].tolist()


class EvaluationShard:
    """One rank's part of a set, in order: (clip numbers, how many of them count) for each batch.

    All ranks have equally many batches of equal sizes, as collective operations demand; what is missing is
    filled up with the last clip, and those repeats stand at the end of a batch, after the clips that count.
    Every clip counts exactly once over all ranks. Give `batches` to a DataLoader as its batch_sampler, and
    cut each answer to `valid_counts[i]`. On one rank nothing is filled up.
    """

    def __init__(self, num_samples: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        _check_sizes(num_samples, batch_size, rank, world_size)
        per_rank = -(-num_samples // world_size)
        clips = range(rank * per_rank, (rank + 1) * per_rank)
        starts = range(0, per_rank, batch_size)
        self.batches = [[min(clip, num_samples - 1) for clip in clips[i : i + batch_size]] for i in starts]
        self.valid_counts = [sum(clip < num_samples for clip in clips[i : i + batch_size]) for i in starts]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[list[int], int]]:
        return zip(self.batches, self.valid_counts, strict=True)


def _check_sizes(num_samples: int, batch_size: int, rank: int, world_size: int) -> None:
    if num_samples < 1 or batch_size < 1 or not 0 <= rank < world_size:
        got = f"num_samples {num_samples}, batch_size {batch_size}, rank {rank} of {world_size}"
        raise ValueError(f"{got}: expected clips, a batch of 1 or more, and a rank below the world size")
