"""The action dataset_convert: recordings -> normalised poses -> windows -> arrays and an index."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from kinegraph.data.clip import Track
from kinegraph.data.formats import FORMATS
from kinegraph.errors import DataError, Problem, StorageError
from kinegraph.run import Result, Run
from kinegraph.spec import DatasetConvertSpec, Spec
from kinegraph.storage import write_atomically, write_json

POSE_FIELDS = {"3dbp": "pose3d", "25dbp": "pose25d", "2dbp": "pose25d"}
BLOCK_BYTES = 4 << 20  # larger blocks cost more: the system clears fresh memory for each

Float32Array = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.intp]


def normalise_poses(
    positions: npt.NDArray[np.float64],
    scores: npt.NDArray[np.float64],
    pose_type: str,
    *,
    focal_length: float = 1200.0,
    input_width: int = 1920,
    input_height: int = 1080,
) -> Float32Array:
    """(T, V, 3) positions and (T, V) scores -> (C, T, V): what the network sees.

    3dbp: x, y, z minus those of joint 0, even where that was not found, over the focal length.
    25dbp: x / width - 0.5, y / height - 0.5, z. 2dbp: the first two of these.
    Joints with score 0 become zeros. Computed in float64 and rounded once.
    """
    num_frames, num_joints = scores.shape
    poses = np.empty((2 if pose_type == "2dbp" else 3, num_frames, num_joints), dtype=np.float32)
    missing = scores == 0
    for channel, pose in enumerate(poses):
        values = positions[:, :, channel]
        if pose_type == "3dbp":
            values = (values - values[:, :1]) / focal_length
        elif channel < 2:
            values = values / (input_width, input_height)[channel] - 0.5
        with np.errstate(over="ignore"):  # convert_dataset reports what does not fit into float32
            pose[:] = values
        pose[missing] = 0
    return poses


def plan_windows(num_frames: int, length: int, stride: int, shortest: int) -> IntArray:
    """(n, 2): first frame and end of each window of a track.

    A window starts every `stride` frames while at least `shortest` frames remain; the last ones are shorter
    than `length`. Raises ValueError for a stride below 1.
    """
    if stride < 1:
        raise ValueError(f"got a stride of {stride} frames, expected at least 1")
    starts = np.arange(0, num_frames - max(shortest, 1) + 1, stride)
    return np.stack([starts, np.minimum(starts + length, num_frames)], axis=1)


def cut_windows(poses: Float32Array, windows: IntArray, padded_length: int) -> Float32Array:
    """(C, T, V) poses and (n, 2) windows -> (n, C, padded_length, V, 1), zeros after the end of each window.

    Raises ValueError for a window that is longer than padded_length.
    """
    num_channels, num_frames, num_joints = poses.shape
    cut = np.zeros((len(windows), num_channels, padded_length, num_joints, 1), dtype=np.float32)
    if not len(windows):
        return cut
    length = int((windows[:, 1] - windows[:, 0]).max())
    if length > padded_length:
        raise ValueError(f"got a window of {length} frames, expected at most {padded_length}")
    frames = windows[:, :1] + np.arange(length)
    outside = frames >= windows[:, 1:]
    frames = np.minimum(frames, num_frames - 1)
    for channel in range(num_channels):
        cut[:, channel, :length, :, 0] = poses[channel][frames]
    cut[:, :, :length, :, 0].transpose(0, 2, 1, 3)[outside] = 0
    return cut


def cut_blocks(track: Track, windows: IntArray, options: DatasetConvertSpec) -> Iterator[Float32Array]:
    """The normalised windows of a track, (n, C, sequence_length_max, V, 1), a few megabytes at a time.

    Raises DataError for positions that do not fit into float32.
    """
    poses = normalise_poses(
        track.positions,
        track.scores,
        options.pose_type,
        focal_length=options.focal_length,
        input_width=options.input_width,
        input_height=options.input_height,
    )
    if not np.isfinite(poses).all():
        where = f"{options.data}: source {track.source}, object {track.object_id}"
        raise DataError(Problem(where, "a position too large for float32", "coordinates in mm or pixels"))
    num_channels, _, num_joints = poses.shape
    num_rows = max(1, BLOCK_BYTES // (4 * num_channels * options.sequence_length_max * num_joints))
    for start in range(0, len(windows), num_rows):
        yield cut_windows(poses, windows[start : start + num_rows], options.sequence_length_max)


@dataclass(frozen=True)
class _Plan:
    """What becomes of one track."""

    track: Track
    file_name: str
    windows: IntArray


def convert_dataset(spec: Spec, run: Run) -> Result:
    """Write the windows of a recording: an array per person, all of them in data.npy, and index.json.

    Each array is float32 (n, C, sequence_length_max, V, 1). index.json is written last: while it is missing,
    the arrays beside it are not complete. `check_spec` has seen to it that the stride is at least 1 and that
    a window fits into sequence_length_max. Raises DataError, StorageError.
    """
    options = spec.dataset_convert
    path = Path(options.data)

    def show_reading(done_bytes: int, total_bytes: int) -> None:
        run.progress(done_bytes >> 20, total_bytes >> 20, f"Reading {path.name} (MiB)")

    read = FORMATS["deepstream"]
    tracks = read(path, POSE_FIELDS[options.pose_type], options.num_joints, show_reading)
    num_gaps = _report_gaps(tracks, options.split_gaps, run)
    plans = _plan_tracks(tracks, options)
    _report_short_tracks(plans, options, run)
    plans = [plan for plan in plans if len(plan.windows)]
    shape = _find_shape(plans, options)
    _check_space(run.folder, 2 * 4 * math.prod(shape))
    run.write_experiment()
    index = run.folder / "index.json"
    index.unlink(missing_ok=True)
    _write_arrays(plans, shape, options, run)
    _warn_of_old_files(plans, run)
    write_json(index, run.show(_build_index(plans, shape, options)))
    run.info(f"{shape[0]} windows of {len(plans)} people written to {run.folder}.")
    metrics = {
        "num_windows": shape[0],
        "num_tracks": len(tracks),
        "num_short_tracks": len(tracks) - len(plans),
        "num_gaps": num_gaps,
    }
    files = {"data": str(run.folder / "data.npy"), "index": str(index)}
    return Result(metrics, files)


def _report_gaps(tracks: list[Track], split_gaps: bool, run: Run) -> int:
    counts = [len(track.find_gaps()) for track in tracks]
    if sum(counts):
        where = f"{sum(counts)} gaps in {np.count_nonzero(counts)} of {len(tracks)} tracks"
        if split_gaps:
            run.info(f"{where}: the tracks are cut there.")
        else:
            hint = "dataset_convert.split_gaps=true cuts the tracks there."
            run.warn(f"{where}: frames are missing, and windows run across as if they were not. {hint}")
    return sum(counts)


def _plan_tracks(tracks: list[Track], options: DatasetConvertSpec) -> list[_Plan]:
    stride = int(options.sequence_length * options.sequence_overlap)
    has_many_sources = len({track.source for track in tracks}) > 1
    plans = []
    for track in tracks:
        prefix = f"source_{track.source}_" if has_many_sources else ""
        borders = [0, *(track.find_gaps() if options.split_gaps else []), track.num_frames]
        windows = [
            start + plan_windows(end - start, options.sequence_length, stride, options.sequence_length_min)
            for start, end in pairwise(borders)
        ]
        plans.append(_Plan(track, f"{prefix}object_{track.object_id}.npy", np.concatenate(windows)))
    return plans


def _report_short_tracks(plans: list[_Plan], options: DatasetConvertSpec, run: Run) -> None:
    """Tell which people give no window. Raises DataError if nobody does."""
    short = [plan.track for plan in plans if not len(plan.windows)]
    if len(short) == len(plans):
        longest = max((track.num_frames for track in short), default=0)
        got = f"{len(short)} people, seen in at most {longest} frames"
        together = " without a gap" if options.split_gaps else ""
        expected = f"one of at least sequence_length_min={options.sequence_length_min} frames{together}"
        raise DataError(Problem(options.data, got, expected, "Record longer, or allow shorter windows."))
    if short:
        named = ", ".join(str(track.object_id) for track in short[:10]) + (", ..." if len(short) > 10 else "")
        reason = f"fewer than {options.sequence_length_min} frames"
        run.warn(f"{len(short)} of {len(plans)} people are in no window ({reason}): object {named}.")


def _find_shape(plans: list[_Plan], options: DatasetConvertSpec) -> tuple[int, int, int, int, int]:
    num_windows = sum(len(plan.windows) for plan in plans)
    num_channels = 2 if options.pose_type == "2dbp" else 3
    return num_windows, num_channels, options.sequence_length_max, options.num_joints, 1


def _check_space(folder: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if needed_bytes > free_bytes:
        got = f"{free_bytes / 1e9:.1f} GB of free space"
        hint = "Raise sequence_overlap, lower sequence_length_max, or choose another results_dir."
        raise StorageError(Problem(str(folder), got, f"{needed_bytes / 1e9:.1f} GB for the windows", hint))


def _write_arrays(plans: list[_Plan], shape: tuple[int, ...], options: DatasetConvertSpec, run: Run) -> None:
    """Write the array of each person and the merged one, a block of windows at a time."""
    done = 0
    with write_atomically(run.folder / "data.npy") as merged:
        _write_header(merged, shape)
        for plan in plans:
            with write_atomically(run.folder / plan.file_name) as own:
                _write_header(own, (len(plan.windows), *shape[1:]))
                for block in cut_blocks(plan.track, plan.windows, options):
                    own.write(block.data)
                    merged.write(block.data)
                    done += len(block)
                    run.progress(done, shape[0], "Writing windows")


def _write_header(file: IO[Any], shape: tuple[int, ...]) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})


def _warn_of_old_files(plans: list[_Plan], run: Run) -> None:
    written = {plan.file_name for plan in plans}
    found = [*run.folder.glob("object_*.npy"), *run.folder.glob("source_*_object_*.npy")]
    old = sorted(path.name for path in found if path.name not in written)
    if old:
        run.warn(f"{run.folder} still holds arrays of an earlier run ({old[0]}, {len(old)} in all).")


def _build_index(plans: list[_Plan], shape: tuple[int, ...], options: DatasetConvertSpec) -> dict[str, Any]:
    """Where each window comes from: its row in data.npy, and in the array of its person."""
    windows: list[dict[str, Any]] = []
    for plan in plans:
        track = plan.track
        for file_row, (start, end) in enumerate(plan.windows.tolist()):
            windows.append(
                {
                    "row": len(windows),
                    "file": plan.file_name,
                    "file_row": file_row,
                    "source": track.source,
                    "object": track.object_id,
                    "num_frames": end - start,
                    "first_frame": int(track.frames[start]),
                    "last_frame": int(track.frames[end - 1]),
                    "first_timestamp_ns": int(track.timestamps_ns[start]),
                    "last_timestamp_ns": int(track.timestamps_ns[end - 1]),
                }
            )
    return {
        "recording": options.data,
        "data": "data.npy",
        "shape": list(shape),
        "pose_type": options.pose_type,
        "windows": windows,
    }
