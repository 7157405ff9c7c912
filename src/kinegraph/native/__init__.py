"""Folded networks on the CPU, by kernels of our own in C: several times as fast as PyTorch for one clip.

    network = NativeNetwork(model.fold(), threads=2)
    logits = network.compute(clips)  # (N, C, T, V, M) -> (N, classes)

The kernels are optional: where they could not be built at installation, `is_available()` is False and
`explain_absence()` says why. No torch is imported.
"""

from kinegraph.native.network import (
    MAX_THREADS,
    NativeNetwork,
    explain_absence,
    is_available,
    list_instruction_sets,
)

__all__ = [
    "MAX_THREADS",
    "NativeNetwork",
    "explain_absence",
    "is_available",
    "list_instruction_sets",
]
