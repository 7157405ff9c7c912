"""dataset_convert against a plain loop over joints, on an hour of a two-person recording.

    python benchmarks/dataset_convert.py

Makes the recording in a temporary folder, runs both sides in turn on it and writes
benchmarks/results/dataset_convert.json. Two comparisons, each the median over the repetitions of
plain seconds / our seconds, both sides giving the same arrays (checked):

conversion   from the same parsed JSON to the windows in memory. Plain: tests/reference/convert_plain.py, which
             normalises and fills joint by joint. Ours also checks the values.
end_to_end   from the file to the .npy files. Plain: json.load, the loop, np.save of one array per person. Ours: the
             action, which also checks the file, writes data.npy (the same windows again) and index.json and
             flushes to the disk.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from kinegraph.actions import dataset_convert
from kinegraph.data import formats
from kinegraph.data.convert import cut_blocks, plan_windows
from kinegraph.data.json_stream import Piece
from kinegraph.spec import DatasetConvertSpec

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from reference import convert_plain  # noqa: E402 the slow restatement lives with the tests

NUM_JOINTS = 34
FPS = 30
OPTIONS: dict[str, Any] = {
    "pose_type": "3dbp",
    "num_joints": NUM_JOINTS,
    "input_width": 1920,
    "input_height": 1080,
    "focal_length": 1200.0,
    "sequence_length_max": 300,
    "sequence_length_min": 10,
    "sequence_length": 100,
    "sequence_overlap": 0.5,
    "split_gaps": False,
}
"""The defaults of the spec."""


def write_recording(path: Path, num_frames: int) -> None:
    """Two people in every frame. A thousand different poses are drawn and used in turn."""
    random = np.random.default_rng(1234)

    def draw_pose(centre: list[float], spread: list[float]) -> str:
        pose = np.empty((NUM_JOINTS, 4))
        pose[:, :3] = np.round(random.normal(centre, spread, (NUM_JOINTS, 3)), 3)
        pose[:, 3] = np.where(random.random(NUM_JOINTS) < 0.05, 0, np.round(random.random(NUM_JOINTS), 3))
        return json.dumps(pose.ravel().tolist())

    poses = [
        f'"pose25d": {draw_pose([960, 540, 0], [150, 200, 80])}, "pose3d": {draw_pose([0, 0, 3000], [400, 400, 80])}'
        for _ in range(1000)
    ]
    with open(path, "w") as file:
        file.write("[")
        for frame in range(num_frames):
            people = ", ".join(
                f'{{"object_id": {number}, {poses[(frame + 501 * number) % len(poses)]}}}' for number in range(2)
            )
            file.write(", " if frame else "")
            file.write(
                f'{{"num_frames_in_batch": 1, "batches": [{{"batch_id": 0, "frame_num": {frame}, '
                f'"ntp_timestamp": {1_700_000_000_000_000_000 + frame * 1_000_000_000 // FPS}, '
                f'"num_obj_meta": 2, "objects": [{people}]}}]}}'
            )
        file.write("]")


def convert_parsed(recording: list[Any], keep: bool) -> dict[str, list[np.ndarray]]:
    """Our conversion from JSON that is parsed already: the blocks of windows of each person, as they are written.

    Only the last block is kept unless `keep`, as in the action, which writes and forgets them.
    """

    def give_parsed(*_: Any) -> Iterator[Piece]:
        yield Piece(0, recording, may_hold_booleans=False)

    options = DatasetConvertSpec(**OPTIONS)
    stride = int(options.sequence_length * options.sequence_overlap)
    with mock.patch.object(formats, "read_list", give_parsed):
        tracks = formats.read_deepstream(Path("parsed"), "pose3d", NUM_JOINTS)
    converted = {}
    for track in tracks:
        windows = plan_windows(track.num_frames, options.sequence_length, stride, options.sequence_length_min)
        blocks = deque(cut_blocks(track, windows, options), maxlen=None if keep else 1)
        converted[f"object_{track.object_id}.npy"] = list(blocks)
    return converted


def time_repetition(path: Path, folder: Path) -> dict[str, float]:
    """Seconds of each part: the plain side, then ours."""
    plain_folder, our_folder = folder / "plain", folder / "ours"
    plain_folder.mkdir(exist_ok=True)
    seconds = {}
    gc.collect()
    started = time.perf_counter()
    with open(path, "rb") as file:
        recording = json.load(file)
    parsed = time.perf_counter()
    gc.freeze()  # neither side's time is to hold the collector's walks over the parsed recording
    converting = time.perf_counter()
    arrays = {name: array for name, (_, array, _) in convert_plain.convert(recording, OPTIONS).items()}
    converted = time.perf_counter()
    for name, array in arrays.items():
        np.save(plain_folder / name, array)
    seconds["plain_parse"] = parsed - started
    seconds["plain_convert"] = converted - converting
    seconds["plain_save"] = time.perf_counter() - converted

    started = time.perf_counter()
    convert_parsed(recording, keep=False)
    seconds["our_convert"] = time.perf_counter() - started
    ours = {name: np.concatenate(blocks) for name, blocks in convert_parsed(recording, keep=True).items()}
    check_equal(arrays, ours)
    del recording, arrays, ours
    gc.unfreeze()
    gc.collect()

    section = {**OPTIONS, "data": str(path), "results_dir": str(our_folder)}
    started = time.perf_counter()
    dataset_convert({"dataset_convert": section})
    seconds["our_end_to_end"] = time.perf_counter() - started
    names = sorted(path.name for path in plain_folder.glob("*.npy"))
    check_equal(*({name: np.load(side / name, mmap_mode="r") for name in names} for side in (plain_folder, our_folder)))

    started = time.perf_counter()
    formats.read_deepstream(path, "pose3d", NUM_JOINTS)
    seconds["our_read"] = time.perf_counter() - started
    seconds["ratio_conversion"] = seconds["plain_convert"] / seconds["our_convert"]
    plain_end_to_end = seconds["plain_parse"] + seconds["plain_convert"] + seconds["plain_save"]
    seconds["ratio_end_to_end"] = plain_end_to_end / seconds["our_end_to_end"]
    return seconds


def check_equal(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> None:
    if not first or first.keys() != second.keys():
        raise SystemExit(f"the sides give different people: {sorted(first)} and {sorted(second)}")
    for name, array in first.items():
        if not np.array_equal(array, second[name]):
            raise SystemExit(f"the sides differ in {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=3600 * FPS, help="frames of the recording (default: an hour)")
    parser.add_argument("--repetitions", type=int, default=3)
    default = ROOT / "benchmarks" / "results" / "dataset_convert.json"
    parser.add_argument("--output", type=Path, default=default, help="where the result is written")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "recording.json"
        write_recording(path, arguments.frames)
        file_bytes = path.stat().st_size
        repetitions = []
        for number in range(arguments.repetitions):
            repetitions.append(time_repetition(path, folder))
            print(number, {key: round(value, 2) for key, value in repetitions[-1].items()}, flush=True)

    median = {key: round(statistics.median(row[key] for row in repetitions), 3) for key in repetitions[0]}
    result = {
        "what": (__doc__ or "").strip(),
        "frames": arguments.frames,
        "people": 2,
        "file_bytes": file_bytes,
        "options": OPTIONS,
        "ratio_conversion": median["ratio_conversion"],
        "ratio_end_to_end": median["ratio_end_to_end"],
        "limits": (
            f"End to end, {median['our_read']} s of our {median['our_end_to_end']} s are reading the JSON (parsing "
            "included) and most of the rest is writing the windows twice. Python's own json takes "
            f"{median['plain_parse']} s of the plain side. From parsed JSON, about three quarters of our time "
            "are taking 29 million numbers out of Python lists (struct.pack; numpy.fromiter and array.fromlist are "
            "no faster)."
        ),
        "median_seconds": {key: value for key, value in median.items() if not key.startswith("ratio")},
        "repetitions": [{key: round(value, 4) for key, value in row.items()} for row in repetitions],
        "python": platform.python_version(),
        "numpy": np.__version__,
        "cpu_count": os.cpu_count(),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"conversion {median['ratio_conversion']} x, end to end {median['ratio_end_to_end']} x: {arguments.output}")


if __name__ == "__main__":
    main()
