"""Actions in continuous recordings: `kinegraph live` on UTKinect-Action, of people whom the model has never seen.

    .venv/bin/python benchmarks/utkinect_detection.py --prepare FOLDER --recipe recipe.yaml    # then kinegraph train
    .venv/bin/python benchmarks/utkinect_detection.py --model FOLDER/results/train/pc_model_latest.pth

Five recordings of subjects 1 (twice), 2, 5 and 10; --prepare writes the clips of the other six subjects and a spec.
Frame by frame through the live engine; the options of `live` may be given as live.key=value.

What is known of the files, and checked: the lines of a recording within the annotated frame numbers are exactly the
clip in utkinect.npz (same unit, metres, same axes), where of lines with one frame number the first is taken. One
annotation (carry in s10_e02) is empty, and has no clip. Frame numbers are even, 4 to 6 apart in the median. They are
taken for a count of 60 a second, which is 11 to 16 frames a second: at that rate people walk at 0.5 to 0.8 m/s, at 30 a
second it would be half of that. Where the person was not tracked, numbers are missing.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from kinegraph.config_source import nest
from kinegraph.live.detection import Annotation, Detection, Recording, score_detections
from kinegraph.live.engine import LiveEngine
from kinegraph.live.frames import Observation
from kinegraph.spec_live import LiveSpec
from kinegraph.spec_reading import read_spec
from kinegraph.storage import make_folder, write_json

NUMBERS_PER_SECOND = 60
FRAMES_PER_SECOND = 15.0
RECORDINGS = ("s01_e01", "s01_e02", "s02_e01", "s05_e01", "s10_e02")
TESTED_SUBJECTS = (1, 2, 5, 10)
WATCHED_SUBJECT = 3
CLASS_NAMES = {
    "walk": "walk",
    "sitDown": "sit down",
    "standUp": "stand up",
    "pickUp": "pick up",
    "carry": "carry",
    "throw": "throw",
    "push": "push",
    "pull": "pull",
    "waveHands": "wave hands",
    "clapHands": "clap hands",
}
"""Name in the label file -> ours, in the order of the labels."""
NUM_CLIPS_CHECKED = 49
RESULT_PATH = Path(__file__).parent / "results" / "utkinect_detection.json"


class Stream(NamedTuple):
    """A recording: frame numbers (T,), joints (T, 20, 3) in metres, and action name -> first and last number."""

    numbers: np.ndarray
    joints: np.ndarray
    actions: dict[str, tuple[int, int]]


def read_labels(path: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """Recording -> action name of the file -> first and last frame number; empty annotations are left out."""
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for line in path.read_text().splitlines():
        name, colon, numbers = line.strip().partition(":")
        if colon and "NaN" not in numbers:
            first, last = numbers.split()
            found[list(found)[-1]][name] = (int(first), int(last))
        elif name and not colon:
            found[name] = {}
    return found


def read_stream(folder: Path, name: str, labels: dict[str, dict[str, tuple[int, int]]]) -> Stream:
    rows = np.loadtxt(folder / f"joints_{name}.txt", ndmin=2)
    numbers, first_lines = np.unique(rows[:, 0].astype(int), return_index=True)
    return Stream(numbers, rows[first_lines, 1:].reshape(-1, 20, 3), labels[name])


def check_clips(streams: dict[str, Stream], content: Any) -> int:
    """How many clips of utkinect.npz the annotations cut out of the recordings, all exactly; ValueError otherwise."""
    clips = np.split(content["frames"], np.cumsum(content["length"])[:-1])
    names, checked = list(CLASS_NAMES), 0
    for name, stream in streams.items():
        of_recording = (content["subject"] == int(name[1:3])) & (content["episode"] == int(name[5:7]))
        for place in np.flatnonzero(of_recording):
            first, last = stream.actions[names[content["label"][place]]]
            cut = stream.joints[(stream.numbers >= first) & (stream.numbers <= last)].astype(np.float32)
            if not np.array_equal(cut, clips[place]):
                raise ValueError(f"{name}: clip {place} is not what its annotation cuts out")
            checked += 1
    return checked


def detect(stream: Stream, model: Any, pool: Any, options: LiveSpec) -> tuple[list[Detection], dict[str, int]]:
    """The segments that the live engine tells, frame by frame, and its counts."""
    engine = LiveEngine(model, pool, options)
    events = []
    for number, joints in zip(stream.numbers.tolist(), stream.joints.tolist(), strict=True):
        events += engine.feed([Observation("person", number / NUMBERS_PER_SECOND, joints)])
    events += engine.end_all("stream_end")
    told, found = {}, []
    for event in events:
        if event["event"] == "segment_start":
            told[event["class"], event["start"]] = event["time"]
        elif event["event"] == "segment_end":
            moment = told[event["class"], event["start"]]
            found.append(Detection(event["class"], event["start"], event["end"], event["probability"], moment))
    return found, dict(engine.counts)


def annotate(stream: Stream) -> list[Annotation]:
    return [
        Annotation(CLASS_NAMES[name], first / NUMBERS_PER_SECOND, last / NUMBERS_PER_SECOND)
        for name, (first, last) in stream.actions.items()
    ]


def prepare_training(data: Path, recipe: Path | None, folder: Path) -> Path:
    """Write the clips of the subjects who are not tested (N, C, T, V, 1), with zeros at their ends, and a train spec.

    The clips are as recorded, about FRAMES_PER_SECOND, without times of their own. val is a copy of one training
    subject's clips, only to watch: nothing is chosen by the tested subjects. recipe: a spec that is completed.
    """
    make_folder(folder)
    content = np.load(data)
    clips = np.split(content["frames"], np.cumsum(content["length"])[:-1])
    array = np.zeros((len(clips), 3, int(content["length"].max()), 20, 1), np.float32)
    for clip, frames in zip(array, clips, strict=True):
        clip[:, : len(frames), :, 0] = frames.transpose(2, 0, 1)
    is_train = ~np.isin(content["subject"], TESTED_SUBJECTS)
    paths = {}
    for part, chosen in {"train": is_train, "val": is_train & (content["subject"] == WATCHED_SUBJECT)}.items():
        np.save(folder / f"{part}_data.npy", array[chosen])
        write_json(folder / f"{part}_label.json", content["label"][chosen].tolist())
        paths[f"dataset.{part}_dataset.data_path"] = str(folder / f"{part}_data.npy")
        paths[f"dataset.{part}_dataset.label_path"] = str(folder / f"{part}_label.json")
    spec = yaml.safe_load(recipe.read_text()) if recipe else {}
    own = nest(
        {
            **paths,
            "results_dir": str(folder / "results"),
            "wandb.enable": False,
            "model.graph_layout": "kinect_v1",
            "dataset.num_classes": len(CLASS_NAMES),
            "dataset.label_map": {name: label for label, name in enumerate(CLASS_NAMES.values())},
            "input.frames_per_second": FRAMES_PER_SECOND,
        }
    )
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(combine(spec, own), sort_keys=False))
    return path


def combine(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Nested mappings as one; the second one wins."""
    combined = dict(first)
    for key, value in second.items():
        both = isinstance(value, dict) and isinstance(combined.get(key), dict) and key != "label_map"
        combined[key] = combine(combined[key], value) if both else value
    return combined


def measure(model_path: Path, data: Path, options: LiveSpec) -> dict[str, Any]:
    """Everything that is reported of a model."""
    from kinegraph import online

    model = online.load(model_path)
    if not (options.frames_per_second or model.frames_per_second):
        options.frames_per_second = FRAMES_PER_SECOND
    folder = data / "raw" / "utkinect"
    labels = read_labels(folder / "actionLabel_modified.txt")
    streams = {name: read_stream(folder, name, labels) for name in RECORDINGS}
    num_checked = check_clips(streams, np.load(data / "utkinect.npz"))
    if num_checked != NUM_CLIPS_CHECKED:
        raise ValueError(f"{num_checked} clips could be compared with their recordings, expected {NUM_CLIPS_CHECKED}")
    recordings, counts = [], {}
    for name, stream in streams.items():
        pool = online.TrackPool(model, options.pooling_frames or None)
        detections, counts[name] = detect(stream, model, pool, options)
        duration_s = float(stream.numbers[-1] - stream.numbers[0]) / NUMBERS_PER_SECOND
        recordings.append(Recording(name, duration_s, annotate(stream), detections))
    return {
        "dataset": "UTKinect-Action, continuous recordings",
        "protocol": (
            f"trained without subjects {', '.join(map(str, TESTED_SUBJECTS))}; "
            f"{len(RECORDINGS)} recordings of them, frame by frame; frame numbers are sixtieths of a second"
        ),
        "frames_per_second": options.frames_per_second or model.frames_per_second,
        "delay_frames": model.delay_frames,
        "model": model.description.metadata.get("model", {}),
        "live": {key: value for key, value in asdict(options).items() if key != "checkpoint"},
        "clips_compared_with_recordings": num_checked,
        "total": score_detections(recordings, list(CLASS_NAMES.values())).as_data(),
        "recordings": {
            recording.name: {
                "seconds": recording.duration_s,
                "scores": asdict(score_detections([recording], list(CLASS_NAMES.values())).total),
                "counts": counts[recording.name],
                "annotations": [item._asdict() for item in recording.annotations],
                "detections": [item._asdict() for item in recording.detections],
            }
            for recording in recordings
        },
    }


def find_commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="live.key=value")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--prepare", type=Path, metavar="FOLDER", help="write training arrays and spec, and end")
    parser.add_argument("--recipe", type=Path, metavar="SPEC.YAML", help="the spec that --prepare completes")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--output", type=Path, default=RESULT_PATH)
    arguments = parser.parse_args()
    if arguments.prepare:
        print(prepare_training(arguments.data / "utkinect.npz", arguments.recipe, arguments.prepare))
        return
    if arguments.model is None:
        parser.error("--model or --prepare is needed")
    result = measure(arguments.model, arguments.data, read_spec(None, arguments.overrides).values.live)
    result |= {"commit": find_commit(), "python": platform.python_version()}
    write_json(arguments.output, result)
    total = result["total"]["total"]
    for key in ("hit_rate", "false_alarms_per_minute", "delay_median_s", "delay_p90_s", "f1", "average_precision"):
        print(f"{key}: {total[key]}")


if __name__ == "__main__":
    main()
