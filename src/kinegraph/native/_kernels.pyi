"""The C extension (source/module.c). Buffers are C-contiguous float32 or int32; results are numbers counted from 1."""

import numpy as np
from numpy.typing import NDArray

# Whatever has a C-contiguous buffer; a type for all of them came with Python 3.12
Buffer = NDArray[np.generic] | bytes | bytearray

def list_instruction_sets() -> list[str]: ...

class Network:
    def __new__(cls, channels: int, joints: int, instruction_set: str, /) -> Network: ...
    def add_affine(self, source: int, relu: bool, scale: Buffer, shift: Buffer, /) -> int: ...
    def add_graph(
        self,
        source: int,
        residual: int,
        relu: bool,
        channels: int,
        bias: Buffer,
        parts: tuple[tuple[int, int, Buffer, Buffer, Buffer, Buffer, Buffer], ...],
        start: Buffer,
        row: Buffer,
        factor: Buffer,
        bytes: tuple[bool, float, float, int] | None,
        /,
    ) -> int: ...
    def add_temporal(
        self,
        source: int,
        residual: int,
        relu: bool,
        is_winograd: bool,
        channels: int,
        geometry: tuple[int, int, int, int],
        weight: Buffer,
        scale: Buffer,
        bias: Buffer,
        bytes: tuple[bool, float, float, int] | None,
        /,
    ) -> int: ...
    def add_conversion(self, source: int, to_bytes: bool, factor: float, zero_point: float, /) -> int: ...
    def add_maximum(self, source: int, relu: bool, size: int, stride: int, before: int, /) -> int: ...
    def add_joined(self, sources: tuple[int, ...], relu: bool, is_sum: bool, /) -> int: ...
    def add_head(self, classes: int, only_real_frames: bool, weight: Buffer, bias: Buffer, /) -> None: ...
    def compute(self, x: Buffer, shape: tuple[int, ...], threads: int, logits: Buffer, features: Buffer, /) -> None: ...
