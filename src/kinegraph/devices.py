"""Which devices and how many processes a training gets, from the spec, the machine and the launcher."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from lightning_fabric import Fabric

from kinegraph.errors import Problem, SpecError
from kinegraph.run import Run, find_launch
from kinegraph.spec import Spec
from kinegraph.spec_train import CudnnSpec

PRECISIONS: dict[str, Any] = {"32": "32-true", "bf16": "bf16-mixed"}


@dataclass(frozen=True)
class Devices:
    """Where a training runs. `ids` are GPUs, or the number of processes on the CPU."""

    accelerator: str
    ids: list[int] | int
    num_nodes: int
    strategy: str
    world_size: int


def choose_devices(spec: Spec, run: Run) -> Devices:
    """Devices as the spec and the launcher say. Raises SpecError where they contradict each other or the machine.

    Without a launcher several processes of one machine are spawned. torchrun and SLURM start them themselves.
    """
    options = spec.train
    num_found = torch.cuda.device_count()
    if options.accelerator == "gpu" and num_found == 0:
        raise SpecError(Problem("train.accelerator", "gpu, and no GPU was found", "cpu or auto"))
    on_cpu = options.accelerator == "cpu" or num_found == 0
    launch = find_launch()
    num_processes = options.num_gpus
    if on_cpu and options.accelerator == "auto":
        num_processes = num_processes if launch else 1
        how = f"{num_processes} processes" if num_processes > 1 else "one process"
        run.info(f"No GPU was found: training in {how} on the CPU.")
    world_size = num_processes * options.num_nodes
    _check_launch(spec, world_size)
    if not on_cpu and num_processes > num_found:
        raise SpecError(Problem("train.num_gpus", str(num_processes), f"at most {num_found}, the GPUs found here"))
    ids: list[int] | int = num_processes
    if not on_cpu:
        ids = options.gpu_ids if len(options.gpu_ids) == num_processes else list(range(num_processes))
        if max(ids) >= num_found:
            raise SpecError(Problem("train.gpu_ids", str(ids), f"ids from 0 to {num_found - 1}"))
    strategy = "auto" if world_size == 1 else "ddp" if launch else "ddp_spawn"
    return Devices("cpu" if on_cpu else "cuda", ids, options.num_nodes, strategy, world_size)


def _check_launch(spec: Spec, world_size: int) -> None:
    options, launch = spec.train, find_launch()
    if launch and launch.world_size != world_size:
        got = f"{options.num_gpus} on {options.num_nodes} machine(s)"
        hint = f"Set train.num_gpus={launch.local_world_size} train.num_nodes={launch.num_nodes}."
        expected = f"the {launch.world_size} processes that torchrun or SLURM started"
        raise SpecError(Problem("train.num_gpus and train.num_nodes", got, expected, hint))
    if options.num_nodes > 1 and not launch:
        start = f"torchrun --nnodes={options.num_nodes} --nproc-per-node={options.num_gpus} -m kinegraph train ..."
        hint = f"Start it on each machine: {start}"
        raise SpecError(Problem("train.num_nodes", str(options.num_nodes), "1, or a start by torchrun or SLURM", hint))


def choose_precision(asked: str, accelerator: str) -> str:
    """The precision "32" or "bf16" as asked; for "auto" bf16 where the processors multiply it faster than float32.

    Gains are made by GPUs that have it and by CPUs with AVX-512 or AMX instructions for it; others only imitate it.
    """
    if asked != "auto":
        return asked
    if accelerator == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "32"
    found = torch.cpu.get_capabilities()
    return "bf16" if found.get("avx512_bf16") or found.get("amx_bf16") else "32"


def build_fabric(devices: Devices, precision: str) -> Fabric:
    """Lightning Fabric on these devices, in a precision of `choose_precision`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Fabric(
            accelerator=devices.accelerator,
            devices=devices.ids,
            num_nodes=devices.num_nodes,
            strategy=devices.strategy,
            precision=PRECISIONS[precision],
        )


def apply_settings(options: CudnnSpec, world_size: int) -> None:
    """cuDNN, deterministic algorithms, and CPU threads shared among the processes of a machine; in each process."""
    torch.backends.cudnn.benchmark = options.benchmark
    torch.backends.cudnn.deterministic = options.deterministic
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(options.deterministic, warn_only=True)
    if world_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
