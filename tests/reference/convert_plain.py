"""dataset_convert restated one joint at a time, straight from the written formats, in plain Python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Person = tuple[int, int]
"""Source and object id."""

Pose = list[list[float]]
"""Joint -> coordinates."""


def normalise_joint(
    joint: Sequence[float], root: Sequence[float], pose_type: str, options: dict[str, Any]
) -> list[float]:
    x, y, z, confidence = joint
    if confidence == 0:
        return [0.0, 0.0] if pose_type == "2dbp" else [0.0, 0.0, 0.0]
    if pose_type == "3dbp":
        focal_length = options["focal_length"]
        return [(x - root[0]) / focal_length, (y - root[1]) / focal_length, (z - root[2]) / focal_length]
    across = x / options["input_width"] - 0.5
    down = y / options["input_height"] - 0.5
    return [across, down] if pose_type == "2dbp" else [across, down, z]


def collect_poses(recording: Any, options: dict[str, Any]) -> dict[Person, list[tuple[int, int, Pose]]]:
    """Parsed JSON -> for each person, in order: frame number, time stamp, pose."""
    pose_type = options["pose_type"]
    field = "pose3d" if pose_type == "3dbp" else "pose25d"
    people: dict[Person, list[tuple[int, int, Pose]]] = {}
    for entry in recording:
        for batch in entry["batches"]:
            for found in batch["objects"]:
                numbers = found[field]
                root = numbers[0:4]
                pose = []
                for joint in range(options["num_joints"]):
                    values = numbers[4 * joint : 4 * joint + 4]
                    pose.append(normalise_joint(values, root, pose_type, options))
                person = (batch["batch_id"], found["object_id"])
                people.setdefault(person, []).append((batch["frame_num"], batch["ntp_timestamp"], pose))
    return people


def find_windows(frames: Sequence[int], options: dict[str, Any]) -> list[tuple[int, int]]:
    """First and end position of each window in a person's list of frames."""
    parts = [[0, len(frames)]]
    if options["split_gaps"]:
        for position in range(1, len(frames)):
            if frames[position] != frames[position - 1] + 1:
                parts[-1][1] = position
                parts.append([position, len(frames)])
    windows = []
    for start, end in parts:
        while end - start >= options["sequence_length_min"]:
            windows.append((start, min(start + options["sequence_length"], end)))
            start += int(options["sequence_length"] * options["sequence_overlap"])
    return windows


def fill_windows(poses: Sequence[Pose], windows: Sequence[tuple[int, int]], options: dict[str, Any]) -> np.ndarray:
    """(n, C, sequence_length_max, V, 1) float32."""
    num_joints = options["num_joints"]
    num_channels = 2 if options["pose_type"] == "2dbp" else 3
    shape = (len(windows), num_channels, options["sequence_length_max"], num_joints, 1)
    filled = np.zeros(shape, dtype=np.float32)
    for row, (start, end) in enumerate(windows):
        for frame in range(end - start):
            pose = poses[start + frame]
            for joint in range(num_joints):
                filled[row, :, frame, joint, 0] = pose[joint]
    return filled


def convert(recording: Any, options: dict[str, Any]) -> dict[str, tuple[Person, np.ndarray, list[dict[str, int]]]]:
    """Parsed JSON -> file name -> person, array, and for each window what the index says of it."""
    people = collect_poses(recording, options)
    sources = {source for source, _ in people}
    converted = {}
    for source, number in sorted(people):
        rows = people[source, number]
        windows = find_windows([frame for frame, _, _ in rows], options)
        if not windows:
            continue
        about = [
            {
                "num_frames": end - start,
                "first_frame": rows[start][0],
                "last_frame": rows[end - 1][0],
                "first_timestamp_ns": rows[start][1],
                "last_timestamp_ns": rows[end - 1][1],
            }
            for start, end in windows
        ]
        name = f"object_{number}.npy" if len(sources) == 1 else f"source_{source}_object_{number}.npy"
        array = fill_windows([pose for _, _, pose in rows], windows, options)
        converted[name] = ((source, number), array, about)
    return converted
