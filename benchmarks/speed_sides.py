"""One side of a comparison, in a process of its own: `python speed_sides.py NAME ARGUMENTS_AS_JSON`.

It prepares, warms up, prints READY, and then, for every line on its input, takes a turn and prints the seconds of one
run. A turn is as many runs as take TURN_S, at least one: a process that has just waited for its turn runs slower at
first, which would be all that is seen of a short function. The reference sides (`original_...`, `loop_...`) are
tests/reference/st_gcn_original.py.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

LAYOUT = "nvidia"
NUM_CLASSES = 10
TURN_S = 0.5
MAX_RUNS = 1000
WINDOW_FRAMES = 300
LAYOUTS_BY_JOINTS = {20: "kinect_v1", 34: LAYOUT}
Run = Callable[[], object]


def make_clips(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def build_original(joints: int, threads: int) -> Any:
    import torch

    from kinegraph.skeleton.graph import build_adjacency
    from kinegraph.skeleton.layouts import LAYOUTS
    from reference import st_gcn_original

    torch.set_num_threads(threads)
    adjacency = torch.from_numpy(build_adjacency(LAYOUTS[LAYOUTS_BY_JOINTS[joints]], "spatial"))
    return st_gcn_original.OriginalSTGCN(adjacency, 3, NUM_CLASSES)


def original_clip(batch: int, threads: int, **_: Any) -> Run:
    """Logits of clips 3 x 300 x 34 by the plain network: eager, eval and inference mode."""
    import torch

    model = build_original(34, threads).eval()
    clips = torch.from_numpy(make_clips(batch, 3, WINDOW_FRAMES, 34, 1))

    def run() -> object:
        with torch.inference_mode():
            return model(clips)

    return run


def our_clip(model: str, backend: str, batch: int, threads: int) -> Run:
    """The same clips through `kinegraph.load`, its checks of the input included."""
    import kinegraph

    predictor = kinegraph.load(model, backend=backend, threads=threads)
    clips = make_clips(batch, 3, WINDOW_FRAMES, 34, 1)
    return lambda: predictor.logits(clips, batch_size=batch)


def original_sliding_window(people: int, threads: int) -> Run:
    """After one new frame of each person: the last 300 frames of all of them, computed anew."""
    import torch

    model = build_original(34, threads).eval()
    recent = torch.from_numpy(make_clips(people, 3, WINDOW_FRAMES, 34, 1))
    frame = torch.from_numpy(make_clips(people, 3, 1, 34, 1))

    def run() -> object:
        nonlocal recent
        with torch.inference_mode():
            recent = torch.cat([recent[:, :, 1:], frame], dim=2)
            return model(recent).softmax(dim=1)

    return run


def our_step(model: str, people: int, threads: int) -> Run:
    """One new frame of each person through `kinegraph.online`."""
    from kinegraph import online

    stepper = online.load(model, mode="step", threads=threads)
    joints = stepper.num_joints
    frames = make_clips(people, 3, joints)
    _, state = stepper.step(make_clips(people, 3, 32, joints), stepper.start(people))

    def run() -> object:
        nonlocal state
        answer, state = stepper.step(frames, state)
        return answer

    return run


def make_training(model: Any, batch: int, frames: int, joints: int, channels: int = 3) -> Run:
    import torch

    from reference import st_gcn_original

    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-4)
    clips = torch.from_numpy(make_clips(batch, channels, frames, joints, 1))
    labels = torch.arange(batch) % NUM_CLASSES
    return lambda: st_gcn_original.train_step(model, optimizer, clips, labels)


def original_training(batch: int, frames: int, joints: int, threads: int, keeps_memory: bool = False) -> Run:
    if keeps_memory:
        keep_memory()
    return make_training(build_original(joints, threads), batch, frames, joints)


def our_training(batch: int, frames: int, joints: int, threads: int, keeps_memory: bool = True) -> Run:
    """The network of the package, and as in `kinegraph train` what is freed is kept."""
    import torch

    from kinegraph.models import build_model
    from kinegraph.skeleton.layouts import LAYOUTS
    from kinegraph.spec import ModelSpec

    if keeps_memory:
        keep_memory()
    torch.set_num_threads(threads)
    model = build_model(ModelSpec(), LAYOUTS[LAYOUTS_BY_JOINTS[joints]], NUM_CLASSES)
    return make_training(model, batch, frames, joints)


def recipe_training(width: float, precision: str, threads: int) -> Run:
    """A step of the network of the recipes for clips: 16 clips of 48 frames, 20 joints, four streams."""
    import torch

    from kinegraph.models import build_model
    from kinegraph.skeleton.layouts import LAYOUTS
    from kinegraph.spec import ModelSpec

    keep_memory()
    torch.set_num_threads(threads)
    model = build_model(ModelSpec(model_type="EF-GCN", width=width), LAYOUTS[LAYOUTS_BY_JOINTS[20]], NUM_CLASSES, 12)
    step = make_training(model, 16, 48, 20, channels=12)

    def run() -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            return step()

    return run


KEPT = contextlib.ExitStack()


def keep_memory() -> None:
    from kinegraph.allocator import keep_freed_memory

    KEPT.enter_context(keep_freed_memory())


def loop_random_move(batch: int, threads: int) -> Run:
    from reference import st_gcn_original

    clips, draws = make_clips(batch, 3, WINDOW_FRAMES, 34, 1), np.random.default_rng(1).random((batch, 8)).tolist()
    return lambda: np.stack([st_gcn_original.move_clip(clip, own) for clip, own in zip(clips, draws, strict=True)])


def our_random_move(batch: int, threads: int) -> Run:
    import torch

    from kinegraph.data.transforms import random_move

    torch.set_num_threads(threads)
    clips, draws = (
        torch.from_numpy(make_clips(batch, 3, WINDOW_FRAMES, 34, 1)),
        np.random.default_rng(1).random((batch, 8)),
    )
    return lambda: random_move(clips, draws)


def start_help(threads: int) -> Run:
    """The command from nothing to the end of its help."""
    return lambda: run_python("-m", "kinegraph", "--help")


def start_bare_python(threads: int) -> Run:
    return lambda: run_python("-c", "import numpy")


ANSWER = """
import sys
if sys.argv[2] == "onnxruntime":
    sys.modules["torch"] = None
import numpy, kinegraph
kinegraph.load(sys.argv[1], backend=sys.argv[2]).predict(numpy.zeros((1, 3, 300, 34, 1), numpy.float32))
"""


def start_and_answer(model: str, backend: str, threads: int) -> Run:
    """A process that opens a model and classifies one clip; for onnxruntime torch cannot be imported in it."""
    return lambda: run_python("-c", ANSWER, model, backend)


def run_python(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)


def peak_float32(threads: int) -> Run:
    """4096^3 multiply-adds: see `speed.PEAKS` for what is made of the seconds."""
    import torch

    torch.set_num_threads(threads)
    a, b, c = torch.rand(4096, 4096), torch.rand(4096, 4096), torch.empty(4096, 4096)
    return lambda: torch.mm(a, b, out=c)


def peak_int8(threads: int) -> Run:
    import torch

    torch.set_num_threads(threads)
    a, b = (torch.randint(-128, 127, (4096, 4096), dtype=torch.int8) for _ in range(2))
    return lambda: torch._int_mm(a, b)


def peak_memory(threads: int) -> Run:
    """A copy of 1 GiB: 2 GiB of traffic."""
    import torch

    torch.set_num_threads(threads)
    source, target = torch.ones(2**28), torch.ones(2**28)
    return lambda: target.copy_(source)


SIDES: dict[str, Callable[..., Run]] = {
    "original_clip": original_clip,
    "our_clip": our_clip,
    "original_sliding_window": original_sliding_window,
    "our_step": our_step,
    "original_training": original_training,
    "our_training": our_training,
    "recipe_training": recipe_training,
    "loop_random_move": loop_random_move,
    "our_random_move": our_random_move,
    "start_help": start_help,
    "start_bare_python": start_bare_python,
    "start_and_answer": start_and_answer,
    "peak_float32": peak_float32,
    "peak_int8": peak_int8,
    "peak_memory": peak_memory,
}


def main() -> None:
    run = SIDES[sys.argv[1]](**json.loads(sys.argv[2]))
    run()
    started_s = time.perf_counter()
    run()
    runs = max(1, min(MAX_RUNS, int(TURN_S / (time.perf_counter() - started_s))))
    print("READY", flush=True)
    for _ in sys.stdin:
        started_s = time.perf_counter()
        for _ in range(runs):
            run()
        print((time.perf_counter() - started_s) / runs, flush=True)


if __name__ == "__main__":
    main()
