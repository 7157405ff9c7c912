"""How fast Kinegraph is, against plain restatements of what it replaces.

    python benchmarks/speed.py [--only clip,training] [--quick] [--threads 2]

Each comparison runs its two sides in processes of their own, which both prepare and warm up and then take turns: what
disturbs the machine disturbs both. Reported are the medians and the median of the ratios of neighbouring
runs, reference / ours. The reference is tests/reference/st_gcn_original.py in eager PyTorch with the same threads.
Sides that cannot run here (a backend that is not installed) are listed with the reason. The results are written by
commit into benchmarks/results/speed.json, and as a table between the markers of docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kinegraph.benchmark.machine import describe_machine

ROOT = Path(__file__).resolve().parents[1]
SIDES_PATH = Path(__file__).with_name("speed_sides.py")
PAGE = ROOT / "docs" / "performance.md"
MARKERS = ("<!-- speed: begin -->", "<!-- speed: end -->")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
LAST_LINES = 3


@dataclass(frozen=True)
class Side:
    """A function of speed_sides.py with its arguments."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """`scale`: so many runs of the reference are what one run of ours does."""

    title: str
    ours: Side
    reference: Side | None
    rounds: int = 15
    scale: float = 1.0


class SideError(Exception):
    """A side cannot run here."""


@contextmanager
def start_side(side: Side, threads: int) -> Iterator[Callable[[], float]]:
    """Give a function that runs the side once in its process, for its seconds."""
    command = [sys.executable, str(SIDES_PATH), side.name, json.dumps({**side.arguments, "threads": threads})]
    environment = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(threads))}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        )
        assert process.stdin is not None and process.stdout is not None
        streams = process.stdin, process.stdout

        def read_line() -> str:
            line = streams[1].readline()
            if not line:
                errors.seek(0)
                raise SideError(" | ".join(errors.read().strip().splitlines()[-LAST_LINES:])[-300:])
            return line

        def run_once() -> float:
            streams[0].write("go\n")
            streams[0].flush()
            return float(read_line())

        try:
            while read_line() != "READY\n":
                pass
            yield run_once
        finally:
            process.stdin.close()
            process.wait()


def compare(comparison: Comparison, threads: int, quick: bool) -> dict[str, Any]:
    """Both sides in turn; seconds and ratio, or why it could not be measured."""
    rounds = max(2, comparison.rounds // 5) if quick else comparison.rounds
    row: dict[str, Any] = {"title": comparison.title, "threads": threads}
    try:
        with ExitStack() as stack:
            ours = stack.enter_context(start_side(comparison.ours, threads))
            reference = stack.enter_context(start_side(comparison.reference, threads)) if comparison.reference else None
            pairs = [(ours(), reference() * comparison.scale if reference else 0.0) for _ in range(rounds)]
    except SideError as error:
        return {**row, "skipped": str(error)}
    row["our_seconds"] = statistics.median(first for first, _ in pairs)
    row["rounds"] = rounds
    if comparison.reference:
        row["reference_seconds"] = statistics.median(second for _, second in pairs)
        row["ratio"] = statistics.median(second / first for first, second in pairs)
        row["ratio_quartiles"] = [float(q) for q in np.percentile([b / a for a, b in pairs], [25, 75])]
    return row


def list_clip_cases(models: dict[str, str]) -> list[Comparison]:
    """Single clips and batches of 3 x 300 x 34 for every backend, float32 and int8."""
    pairs = (
        ("torch", "pth"),
        ("onnxruntime", "onnx"),
        ("openvino", "onnx"),
        ("native", "pth"),
        ("onnxruntime", "int8"),
        ("openvino", "int8"),
        ("native", "int8"),
    )
    return [
        Comparison(
            f"{'one clip' if batch == 1 else f'{batch} clips'}, {backend}{' int8' if form == 'int8' else ''}",
            Side("our_clip", {"model": models[form], "backend": backend, "batch": batch}),
            Side("original_clip", {"batch": batch}),
            rounds=15 if batch == 1 else 5,
        )
        for batch in (1, 16)
        for backend, form in pairs
    ]


def list_online_cases(models: dict[str, str]) -> list[Comparison]:
    """One new frame: a step, against the last 300 frames anew."""
    few = 4
    window = Side("our_clip", {"model": models["onnx"], "backend": "onnxruntime", "batch": 1})
    same = Comparison(
        "a frame of 1 person, onnxruntime, against the window in onnxruntime",
        Side("our_step", {"model": models["step"], "people": 1}),
        window,
    )
    recipe = Comparison(
        "a frame of 200 people, network of the recipe online",
        Side("our_step", {"model": models["online"], "people": 200}),
        None,
    )
    return [same, recipe] + [
        Comparison(
            f"a frame of {people} {'person' if people == 1 else 'people'}, {form}",
            Side("our_step", {"model": models[key], "people": people}),
            Side("original_sliding_window", {"people": min(people, few)}),
            rounds=15,
            scale=people / min(people, few),
        )
        for people in (1, 200)
        for form, key in (("NumPy", "causal"), ("onnxruntime", "step"))
    ]


def list_training_cases(models: dict[str, str]) -> list[Comparison]:
    """A training step on batches of 16: as `kinegraph train` does it, against a plain program."""
    shapes = {"3 x 64 x 20": {"frames": 64, "joints": 20}, "3 x 300 x 34": {"frames": 300, "joints": 34}}
    rows = []
    for name, shape in shapes.items():
        arguments = {"batch": 16, **shape}
        rounds = 9 if shape["frames"] == 64 else 5
        title = f"training step, 16 clips {name}"
        rows.append(Comparison(title, Side("our_training", arguments), Side("original_training", arguments), rounds))
        kept = {**arguments, "keeps_memory": True}
        rows.append(
            Comparison(
                f"{title}, both keep freed memory",
                Side("our_training", arguments),
                Side("original_training", kept),
                rounds,
            )
        )
    return rows


def list_precision_cases(models: dict[str, str]) -> list[Comparison]:
    """A training step in bfloat16 against the same in float32."""
    return [
        Comparison(
            f"training step of EF-GCN, width {width}, bfloat16 against float32",
            *(Side("recipe_training", {"width": width, "precision": precision}) for precision in ("bf16", "32")),
            25,
        )
        for width in (1, 2)
    ]


def list_augmentation_cases(models: dict[str, str]) -> list[Comparison]:
    arguments = {"batch": 16}
    ours, loop = Side("our_random_move", arguments), Side("loop_random_move", arguments)
    return [Comparison("random_move of 16 clips 3 x 300 x 34", ours, loop)]


def list_start_cases(models: dict[str, str]) -> list[Comparison]:
    """Processes from nothing."""
    torch_side = Side("start_and_answer", {"model": models["pth"], "backend": "torch"})
    onnx_side = Side("start_and_answer", {"model": models["onnx"], "backend": "onnxruntime"})
    return [
        Comparison("kinegraph --help, against Python with NumPy", Side("start_help"), Side("start_bare_python"), 9),
        Comparison("start and answer, onnxruntime without torch, against torch", onnx_side, torch_side, 9),
    ]


PEAKS: dict[str, tuple[str, float, str]] = {
    "float32 matrix product": ("peak_float32", 2 * 4096**3 / 1e9, "GFLOP/s"),
    "int8 matrix product": ("peak_int8", 2 * 4096**3 / 1e9, "GOP/s"),
    "memory copy": ("peak_memory", 2 * 4 * 2**28 / 1e9, "GB/s"),
}


def list_peak_cases(models: dict[str, str]) -> list[Comparison]:
    """What the machine can do, in the same run."""
    return [Comparison(title, Side(name), None, 7) for title, (name, _, _) in PEAKS.items()]


CASES: dict[str, Callable[[dict[str, str]], list[Comparison]]] = {
    "peaks": list_peak_cases,
    "clip": list_clip_cases,
    "online": list_online_cases,
    "training": list_training_cases,
    "precision": list_precision_cases,
    "augmentation": list_augmentation_cases,
    "start": list_start_cases,
}


def write_models(folder: Path) -> dict[str, str]:
    """Files with random weights: pth, causal, online; onnx, int8, step. One that fails is named all the same."""
    from kinegraph.actions import export
    from kinegraph.data.pipeline import InputPipeline
    from kinegraph.models import build_model
    from kinegraph.models.checkpoint import Checkpoint, write_checkpoint
    from kinegraph.skeleton.layouts import LAYOUTS
    from kinegraph.spec import ModelSpec

    layout = LAYOUTS["nvidia"]
    np.save(folder / "clips.npy", np.random.default_rng(0).normal(size=(16, 3, 300, 34, 1)).astype(np.float32))
    for name, padding in (("pth", "symmetric"), ("causal", "causal")):
        options = ModelSpec(temporal_padding=padding)  # type: ignore[arg-type]
        model = build_model(options, layout, 10).eval()
        content = Checkpoint(
            model.state_dict(), options, layout, 10, pipeline=InputPipeline(3, 34).to_dict(), spec={"model_name": name}
        )
        write_checkpoint(folder / f"{name}.pth", content)
    write_online_model(folder / "online.pth")
    forms: dict[str, dict[str, Any]] = {
        "onnx": {"checkpoint": "pth"},
        "int8": {
            "checkpoint": "pth",
            "quantize": "int8",
            "force": True,
            "calibration_dataset": {"data_path": str(folder / "clips.npy")},
        },
        "step": {"checkpoint": "causal", "form": "step"},
    }
    for name, options_of_form in forms.items():
        section = {**options_of_form, "checkpoint": str(folder / f"{options_of_form['checkpoint']}.pth")}
        section |= {"onnx_file": str(folder / f"{name}.onnx"), "results_dir": str(folder / name), "overwrite": True}
        try:
            export({"export": section})
        except Exception as error:  # what is measured of it then says that the file is missing
            print(f"{name}.onnx was not written: {error}", flush=True)
    return {name: str(folder / f"{name}.pth") for name in ("pth", "causal", "online")} | {
        name: str(folder / f"{name}.onnx") for name in forms
    }


def write_online_model(path: Path) -> None:
    """The network and input pipeline of the recipe `online` for 20 joints, with random weights."""
    from kinegraph.config_source import nest
    from kinegraph.data.pipeline import build_pipeline
    from kinegraph.models import build_model
    from kinegraph.models.checkpoint import Checkpoint, write_checkpoint
    from kinegraph.recipes import RECIPES
    from kinegraph.skeleton.layouts import LAYOUTS
    from kinegraph.spec import ModelSpec
    from kinegraph.spec_input import InputSpec

    sections, layout = nest(RECIPES["online"].values), LAYOUTS["kinect_v1"]
    options = ModelSpec(**sections["model"])
    pipeline = build_pipeline(InputSpec(**sections["input"]), 3, layout)
    channels = pipeline.output_channels
    model = build_model(options, layout, 10, channels).eval()
    content = Checkpoint(
        model.state_dict(), options, layout, 10, pipeline=pipeline.to_dict(), spec={}, num_channels=channels
    )
    write_checkpoint(path, content)


def find_commit() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    dirty = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=False)
    return (done.stdout.strip() or "unknown") + ("+changes" if dirty.stdout.strip() else "")


def format_table(result: dict[str, Any]) -> str:
    """Markdown: a row for each comparison."""
    machine = result["machine"]
    lines = [
        f"{machine['cpu']}, {machine['usable_cores']} cores; torch {machine['versions'].get('torch', '-')}, "
        f"onnxruntime {machine['versions'].get('onnxruntime', '-')}; commit {result['commit'][:12]}.",
        "",
        "| | threads | ours | reference | times as fast |",
        "|---|---|---|---|---|",
    ]
    for row in (row for rows in result["cases"].values() for row in rows):
        if "skipped" in row:
            lines.append(f"| {row['title']} | {row['threads']} | not measured | | |")
        elif row["title"] in PEAKS:
            _, amount, unit = PEAKS[row["title"]]
            lines.append(f"| {row['title']} | {row['threads']} | {amount / row['our_seconds']:.0f} {unit} | | |")
        elif "ratio" not in row:
            lines.append(f"| {row['title']} | {row['threads']} | {show_seconds(row['our_seconds'])} | | |")
        else:
            times = f"{show_seconds(row['our_seconds'])} | {show_seconds(row['reference_seconds'])}"
            lines.append(f"| {row['title']} | {row['threads']} | {times} | {row['ratio']:.2f} |")
    return "\n".join(lines)


def show_seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def update_page(table: str) -> None:
    """Put the table between the markers of docs/performance.md."""
    text = PAGE.read_text()
    before, rest = text.split(MARKERS[0])
    _, after = rest.split(MARKERS[1])
    PAGE.write_text(f"{before}{MARKERS[0]}\n{table}\n{MARKERS[1]}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help=f"some of {', '.join(CASES)}, with commas")
    parser.add_argument("--quick", action="store_true", help="a fifth of the rounds; no page")
    parser.add_argument("--threads", default=str(os.cpu_count()), help="thread counts, with commas")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "speed.json")
    arguments = parser.parse_args()
    names = arguments.only.split(",") if arguments.only else list(CASES)
    if unknown := set(names) - set(CASES):
        parser.error(f"--only: {', '.join(sorted(unknown))}: expected some of {', '.join(CASES)}")
    cases: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        models = write_models(Path(folder))
        for name in names:
            cases[name] = []
            for threads in map(int, arguments.threads.split(",")):
                for comparison in CASES[name](models):
                    cases[name].append(compare(comparison, threads, arguments.quick))
                    print(cases[name][-1], flush=True)
    result = {"commit": find_commit(), "machine": describe_machine(), "quick": arguments.quick, "cases": cases}
    earlier = json.loads(arguments.output.read_text()) if arguments.output.is_file() else {}
    known = earlier.get(result["commit"], {})
    result["cases"] = {**known.get("cases", {}), **cases}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({**earlier, str(result["commit"]): result}, indent=2) + "\n")
    table = format_table(result)
    print(table)
    if not arguments.quick and PAGE.is_file():
        update_page(table)


if __name__ == "__main__":
    main()
