"""Checkpoints, and folded networks out of ONNX files, run by PyTorch on the CPU or a GPU."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from kinegraph.backends.model_file import ModelFile
from kinegraph.errors import Problem, UserError

SETTINGS_LOCK = threading.Lock()
"""Two threads that changed and put back the settings of the process at once would leave the wrong ones."""


class TorchBackend:
    """On the CPU the folded network, where there is one; on a GPU the network as it was trained."""

    def __init__(self, file: ModelFile, device: str, threads: int) -> None:
        import torch

        from kinegraph.models.folded_torch import FoldedModel

        device = device or "cpu"
        if device != "cpu" and not torch.cuda.is_available():
            raise UserError(Problem("device", repr(device), "cpu", "PyTorch finds no GPU here."))
        self.description = file.description
        self.device, self.threads = torch.device(device), threads
        self.model: torch.nn.Module
        if file.kind == "onnx" or (device == "cpu" and file.network is not None):
            self.model = FoldedModel(file.demand_network("torch")).eval()
        else:
            self.model = file.module
        self.model.to(self.device)

    def compute(self, x: NDArray[np.float32], where: str) -> NDArray[np.float32]:
        """(N, C, T, V, M) -> logits (N, classes)."""
        import torch

        clips = torch.from_numpy(x if x.flags.writeable else x.copy())
        with SETTINGS_LOCK, self._settings(), torch.inference_mode():
            logits = self.model(clips.to(self.device))
            return np.asarray(logits.float().cpu().numpy())

    @contextlib.contextmanager
    def _settings(self) -> Iterator[None]:
        """Settings of the whole process, which training may go on with: put back afterwards."""
        import torch

        if self.device.type != "cpu":
            # cuDNN would round the inputs of float32 convolutions to 10 bits; a GPU is to answer as the CPU does
            with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
                yield
            return
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)
