"""Networks that can be folded, run by Kinegraph's own kernels on the CPU."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kinegraph.backends.model_file import ModelFile
from kinegraph.errors import Problem, UserError

Array = NDArray[np.float32]


class NativeBackend:
    """In 8 bits where the file has activation ranges."""

    def __init__(self, file: ModelFile, device: str, threads: int) -> None:
        from kinegraph import native

        if not native.is_available():
            hint = "Install Kinegraph where a C compiler is, or use the backend onnxruntime."
            raise UserError(
                Problem("backend", "'native'", f"kernels that were built: {native.explain_absence()}", hint)
            )
        self.description = file.description
        self.network = native.NativeNetwork(
            file.demand_network("native"), min(threads, native.MAX_THREADS), file.quantization
        )

    def compute(self, x: Array, where: str) -> Array:
        """(N, C, T, V, M) -> logits (N, classes)."""
        return np.asarray(self.network.compute(x))
