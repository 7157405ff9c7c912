"""A folded network handed to the kernels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kinegraph.errors import CheckpointError, DataError, Problem, UserError
from kinegraph.models.folded import FoldedNetwork
from kinegraph.models.quantization import Quantization
from kinegraph.native.build import Builder

try:
    from kinegraph.native import _kernels
except ImportError as error:
    _absence = f"the C extension is missing ({error})"
else:
    _absence = ""

MAX_THREADS = 256


def is_available() -> bool:
    """Whether the kernels were built when Kinegraph was installed."""
    return not _absence


def explain_absence() -> str:
    """Why `is_available()` is False; empty where it is True."""
    return _absence


def list_instruction_sets() -> list[str]:
    """Those of "avx512", "avx2" and "plain" that this CPU has, fastest first; none without the kernels."""
    return [] if _absence else _kernels.list_instruction_sets()


class NativeNetwork:
    """Answers as the folded network does, to float32 rounding. May be called from several threads at once.

    threads: how many a call uses, at most 256. quantization: convolutions in int8 where it is given, so that answers
    are close instead. instruction_set: one of `list_instruction_sets()`, the fastest if None.
    Raises UserError where the kernels are missing or an argument is not to be had.
    """

    def __init__(
        self,
        network: FoldedNetwork,
        threads: int,
        quantization: Quantization | None = None,
        *,
        instruction_set: str | None = None,
    ) -> None:
        sets = list_instruction_sets()
        if not sets:
            hint = "Install a C compiler and install Kinegraph again, or use another engine."
            raise UserError(Problem("native kernels", _absence, "kernels built at installation", hint))
        if not 1 <= threads <= MAX_THREADS:
            raise UserError(Problem("threads", str(threads), f"1 to {MAX_THREADS}"))
        if instruction_set is not None and instruction_set not in sets:
            raise UserError(Problem("instruction_set", repr(instruction_set), "one of " + ", ".join(sets)))
        self.network = network
        self.threads = threads
        self.quantization = quantization
        self.instruction_set = instruction_set or sets[0]
        try:
            self._kernels = _kernels.Network(network.num_channels, network.num_joints, self.instruction_set)
            Builder(self._kernels, network, quantization).build()
        except (ValueError, MemoryError) as error:
            hint = "Use the backend onnxruntime or torch."
            raise CheckpointError(Problem("network", str(error), "one that the native kernels hold", hint)) from None

    def compute(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """(N, C, T, V, M) -> logits (N, classes)."""
        logits, _ = self._compute(x, with_features=False)
        return logits

    def compute_features(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """(N, C, T, V, M) -> (N, M, T', V, C'): what the mean is taken of."""
        return self._compute(x, with_features=True)[1]

    def _compute(self, x: NDArray[np.float32], with_features: bool) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        x = np.ascontiguousarray(x, np.float32)
        network = self.network
        if x.ndim != 5 or x.shape[1] != network.num_channels or x.shape[3] != network.num_joints or 0 in x.shape[2:]:
            expected = f"(N, {network.num_channels}, T, {network.num_joints}, M) with frames and people"
            raise DataError(Problem("clips", f"an array of shape {x.shape}", expected))
        if self.quantization is not None and not np.isfinite(x).all():
            raise DataError(Problem("clips", "NaN or infinite values", "finite values, as bytes cannot hold others"))
        logits = np.empty((x.shape[0], network.num_classes), np.float32)
        clips, _, frames, joints, people = x.shape
        last = network.layers[-1].name
        frames_out, channels_out = -(-frames // network.find_strides()[last]), network.count_channels()[last]
        shape = (clips, people, frames_out, joints, channels_out) if with_features else (0,)
        features = np.empty(shape, np.float32)
        if clips:
            try:
                self._kernels.compute(x, x.shape, self.threads, logits, features)
            except (ValueError, MemoryError) as error:
                hint = "Use shorter clips, or the backend onnxruntime."
                raise DataError(Problem("clips", f"shape {x.shape}: {error}", "clips that fit", hint)) from None
        return logits, features
