"""Clips for a DataLoader: whole batches from a memory map, in an order that seed and epoch alone decide."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from kinegraph.data.arrays import cast_to_float32, open_array, release_pages
from kinegraph.data.checks import DatasetInfo, check_dataset, infer_classes
from kinegraph.data.order import BalancedOrder, Shuffle, make_order
from kinegraph.data.pipeline import InputPipeline
from kinegraph.errors import DataError, Problem

RELEASED_BYTES = 32 * 1024 * 1024
"""After reading so much of a file its pages are let go, so that memory stays flat. Each brings 15 neighbours along."""

__all__ = [
    "Batch",
    "ClipDataset",
    "DatasetInfo",
    "EpochBatchSampler",
    "EvaluationShard",
    "check_dataset",
    "infer_classes",
    "load_batches",
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


def load_batches(
    dataset: ClipDataset, batches: Iterable[list[int]], num_workers: int, device: torch.device
) -> Iterator[Batch]:
    """The batches of a set on a device, read by so many processes; the clips' numbers stay on the CPU."""
    loader: DataLoader[Batch] = DataLoader(
        dataset,
        batch_sampler=batches,  # type: ignore[arg-type]  # its own types know samplers only
        num_workers=num_workers,
        collate_fn=pass_batch,
        pin_memory=device.type == "cuda",
    )
    for batch in loader:
        data = batch.data.to(device, non_blocking=True)
        yield Batch(data, batch.labels.to(device, non_blocking=True), batch.index)


class ClipDataset(Dataset[Batch]):
    """The clips of a .npy file, read batch by batch.

    Use it as `DataLoader(dataset, batch_sampler=..., collate_fn=pass_batch)`. The memory map is never
    pickled: each worker opens the file itself. With a pipeline, every batch goes through it, which also
    refuses NaN and infinity; its method `check` alone refuses them and leaves the rest to the training step.
    """

    def __init__(
        self,
        data_path: str | Path,
        labels: np.ndarray | None = None,
        pipeline: InputPipeline | Callable[[np.ndarray, str], np.ndarray] | None = None,
    ) -> None:
        self.data_path = str(data_path)
        self.pipeline = pipeline
        self.array: np.ndarray | None = open_array(data_path)
        self.shape = self.array.shape
        self.unreleased_bytes = 0
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
        clips = _read_clips(array, index)
        self.unreleased_bytes += clips.nbytes
        if self.unreleased_bytes > RELEASED_BYTES:
            release_pages(array)
            self.unreleased_bytes = 0
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


def _read_clips(array: np.ndarray, index: np.ndarray) -> np.ndarray:
    """float32 copies of the clips, read in the order of the file: whole runs of neighbours at once."""
    plain = np.asarray(array)
    places = np.argsort(index, kind="stable")
    wanted = index[places]
    if len(index) and wanted[-1] - wanted[0] == len(index) - 1 and (np.diff(index) == 1).all():
        return cast_to_float32(plain[wanted[0] : wanted[-1] + 1]).copy()
    clips = np.empty((len(index), *array.shape[1:]), np.float32)
    with np.errstate(over="ignore"):
        for place, clip in zip(places.tolist(), wanted.tolist(), strict=True):
            clips[place] = plain[clip]
    return clips


class EpochBatchSampler:
    """The batches of one epoch as lists of clip numbers, a pure function of the arguments.

    An epoch is one pass through the clips, or as many as `min_batches` need. The order of a pass is drawn from
    (seed, number of the pass), as `how` says (see data/order.py), the same on every rank; with labels
    `balanced_by` all classes come equally often. It is cut
    into global batches of batch_size x world_size clips, and each rank takes its slice of each, so all ranks
    have equally many batches. `drop_last` drops an incomplete global batch, unless it is the only one: a small
    set is still trained on. Where an incomplete global batch does not divide among the ranks, it is filled up
    with clips from the start of the order. `start_batch` leaves out the batches that were already done before a
    resume.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        seed: int,
        epoch: int = 0,
        start_batch: int = 0,
        min_batches: int = 0,
        shuffle: bool = True,
        how: Shuffle = "full",
        balanced_by: np.ndarray | None = None,
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
        self.how: Shuffle = how
        self.balanced_by = balanced_by
        self.rank = rank
        self.world_size = world_size
        num_full, rest = divmod(num_samples, batch_size * world_size)
        self.batches_per_pass = num_full if drop_last and num_full else num_full + (rest > 0)
        self.num_passes = max(-(-min_batches // self.batches_per_pass), 1)
        self.batches_per_epoch = self.num_passes * self.batches_per_pass
        if not 0 <= start_batch <= self.batches_per_epoch:
            raise ValueError(f"start_batch {start_batch} is outside 0 to {self.batches_per_epoch}")
        self.start_batch = start_batch
        self.known_repeats: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))

    def __len__(self) -> int:
        """Batches that are left, from start_batch on."""
        return self.batches_per_epoch - self.start_batch

    def find_pass(self, batch: int) -> int:
        """In which pass through the clips, counted from the first epoch on, a batch of this epoch is."""
        return self.epoch * self.num_passes + batch // self.batches_per_pass

    def number_draws(self, batch: int, index: np.ndarray) -> np.ndarray:
        """A number for each clip of a batch of this epoch, `index` (n,), that no other draw of its pass has: that of
        the clip, and for a clip that is drawn again the number of clips more for each time.
        """
        if self.balanced_by is None or not self.shuffle:
            return index
        number = self.find_pass(batch)
        if self.known_repeats[0] != number:
            self.known_repeats = number, BalancedOrder(self.balanced_by, self.seed, number).repeats
        repeats = self.known_repeats[1]
        own = self._cut(lambda start, stop: repeats[start:stop], batch % self.batches_per_pass)
        return index + self.num_samples * own

    def __iter__(self) -> Iterator[list[int]]:
        batches = range(self.start_batch, self.batches_per_epoch)
        for number, of_pass in itertools.groupby(batches, self.find_pass):
            order = make_order(self.num_samples, self.seed, number, self.shuffle, self.how, self.balanced_by)
            for batch in of_pass:
                yield self._cut(order.take, batch % self.batches_per_pass).tolist()

    def _cut(self, take: Callable[[int, int], np.ndarray], batch: int) -> np.ndarray:
        """This rank's part of a batch of a pass, of which `take(start, stop)` gives a stretch."""
        global_size = self.batch_size * self.world_size
        clips = take(batch * global_size, (batch + 1) * global_size)
        missing = -len(clips) % self.world_size
        if missing:
            clips = np.concatenate([clips, np.resize(take(0, missing), missing)])
        size = len(clips) // self.world_size
        return clips[self.rank * size : (self.rank + 1) * size]


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
        self.batches = _ShardBatches(clips, batch_size, num_samples)
        parts = (clips[start : start + batch_size] for start in range(0, per_rank, batch_size))
        self.valid_counts = [max(0, min(part.stop, num_samples) - part.start) for part in parts]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[list[int], int]]:
        return zip(self.batches, self.valid_counts, strict=True)


class _ShardBatches(Sequence[list[int]]):
    """Lists of clip numbers, made when they are asked for; numbers beyond the set become its last clip."""

    def __init__(self, clips: range, batch_size: int, num_samples: int) -> None:
        self.clips, self.batch_size, self.num_samples = clips, batch_size, num_samples

    def __len__(self) -> int:
        return -(-len(self.clips) // self.batch_size)

    @overload
    def __getitem__(self, place: int) -> list[int]: ...
    @overload
    def __getitem__(self, place: slice) -> list[list[int]]: ...
    def __getitem__(self, place: int | slice) -> list[int] | list[list[int]]:
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(len(self)))]
        start = range(len(self))[place] * self.batch_size
        return [min(clip, self.num_samples - 1) for clip in self.clips[start : start + self.batch_size]]


def _check_sizes(num_samples: int, batch_size: int, rank: int, world_size: int) -> None:
    if num_samples < 1 or batch_size < 1 or not 0 <= rank < world_size:
        got = f"num_samples {num_samples}, batch_size {batch_size}, rank {rank} of {world_size}"
        raise ValueError(f"{got}: expected clips, a batch of 1 or more, and a rank below the world size")
