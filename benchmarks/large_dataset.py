"""Training on a file of a million clips: time to the first step, memory over the steps, and clips that a loader reads.

    python benchmarks/large_dataset.py [--clips 1000000] [--steps 60]

Makes a sparse .npy file of clips 3 x 32 x 17 x 1 (6.5 GB, a thousandth of them written) and labels as .npy in a
temporary folder, runs `kinegraph train` on it in a process of its own with a step that reads the batch and computes
nothing, and writes benchmarks/results/large_dataset.json. `resident_bytes` is what the process holds in memory, pages
of the file included, at some of its steps.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SHAPE = (3, 32, 17, 1)
NUM_CLASSES = 60
SHUFFLES = ("full", "blocks")


def write_clips(folder: Path, part: str, num_clips: int) -> None:
    """`<part>_data.npy`, holes but for every thousandth clip, and `<part>_label.npy`."""
    array = np.lib.format.open_memmap(folder / f"{part}_data.npy", "w+", np.float32, (num_clips, *SHAPE))
    array[::1000] = np.random.default_rng(0).normal(size=SHAPE)
    array.flush()
    np.save(folder / f"{part}_label.npy", np.arange(num_clips) % NUM_CLASSES)


def make_spec(folder: Path, shuffle: str) -> dict[str, Any]:
    files = {
        f"{part}_dataset": {kind + "_path": str(folder / f"{part}_{kind}.npy") for kind in ("data", "label")}
        for part in ("train", "val")
    }
    return {
        "results_dir": str(folder / shuffle),
        "wandb": {"enable": False},
        "model": {"graph_layout": "coco"},
        "dataset": {**files, "batch_size": 64, "num_workers": 0, "shuffle": shuffle},
        "train": {"num_epochs": 1, "accelerator": "cpu"},
    }


def train_without_computing(spec_path: Path, num_steps: int) -> None:
    """In the child: print JSON of the time to the first step, then memory and speed over `num_steps` steps."""
    started_s = time.perf_counter()
    from kinegraph.actions import train
    from kinegraph.fit import _Trainer

    moments: list[tuple[float, int]] = []
    cpu_s = time.process_time
    imported_s = cpu_s()
    first_s: list[float] = []

    def measure(trainer: Any, batch: Any) -> None:
        first_s[:] = first_s or [cpu_s()]
        batch.data.sum().item()
        moments.append((time.perf_counter() - started_s, read_resident_bytes()))
        if len(moments) == num_steps:
            chosen = np.unique(np.geomspace(1, num_steps, 12).astype(int)) - 1
            steps_s = moments[-1][0] - moments[0][0]
            measured = {
                "seconds_to_first_step": round(moments[0][0], 3),
                "cpu_seconds_of_imports": round(imported_s, 3),
                "cpu_seconds_from_there_to_first_step": round(first_s[0] - imported_s, 3),
                "clips_per_second": round((num_steps - 1) * len(batch.labels) / steps_s),
                "resident_bytes": {int(step) + 1: moments[step][1] for step in chosen},
                "largest_resident_bytes": max(resident for _, resident in moments),
            }
            print("MEASURED " + json.dumps(measured), flush=True)
            os._exit(0)

    _Trainer._train_step = measure  # type: ignore[method-assign]
    train(json.loads(spec_path.read_text()))


def read_resident_bytes() -> int:
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def run_child(spec: dict[str, Any], folder: Path, num_steps: int) -> dict[str, Any]:
    path = folder / "spec.json"
    path.write_text(json.dumps(spec))
    command = [sys.executable, __file__, "--child", str(path), "--steps", str(num_steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("MEASURED ")]
    if not lines:
        raise SystemExit(f"the training said:\n{done.stdout}\n{done.stderr}")
    measured: dict[str, Any] = json.loads(lines[0].removeprefix("MEASURED "))
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=1_000_000)
    parser.add_argument("--steps", type=int, default=4000, help="steps of 64 clips that are measured")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "large_dataset.json")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return train_without_computing(arguments.child, arguments.steps)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_clips(folder, "train", arguments.clips)
        write_clips(folder, "val", 100)
        runs = {}
        for shuffle in SHUFFLES:
            runs[shuffle] = run_child(make_spec(folder, shuffle), folder, arguments.steps)
            print(shuffle, runs[shuffle], flush=True)
        file_bytes = (folder / "train_data.npy").stat().st_size
    result = {
        "what": (__doc__ or "").strip(),
        "clips": arguments.clips,
        "file_bytes": file_bytes,
        "steps": arguments.steps,
        "runs": runs,
        "python": platform.python_version(),
        "cpu_count": os.cpu_count(),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    return None


if __name__ == "__main__":
    main()
