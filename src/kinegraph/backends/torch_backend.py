"""Checkpoints, and folded networks out of ONNX files, run by PyTorch on the CPU or a GPU."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kinegraph.backends.model_file import ModelFile
from kinegraph.errors import Problem, UserError


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
        # The number of threads belongs to the whole process: training may go on with another one
        before = torch.get_num_threads()
        if self.device.type == "cpu" and before != self.threads:
            torch.set_num_threads(self.threads)
        # cuDNN would round the inputs of float32 convolutions to 10 bits; a GPU is to answer as the CPU does
        exact = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
        try:
            with torch.inference_mode(), exact:
                logits = self.model(clips.to(self.device))
                return np.asarray(logits.float().cpu().numpy())
        finally:
            if torch.get_num_threads() != before:
                torch.set_num_threads(before)
