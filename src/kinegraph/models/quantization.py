"""What int8 inference needs to know beside the weights: between which values each result of a network lies."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Quantization:
    """activation_ranges: layer name (and INPUT) -> (low, high) of its result, low <= 0 <= high; values outside are cut.

    Activations become 8 bits without a sign and one scale for the whole tensor; zero is always met exactly. Weights
    become signed 8 bits with one scale for each output channel, from -127 to 127.
    """

    activation_ranges: dict[str, tuple[float, float]]

    def find_scale(self, layer: str) -> tuple[float, int]:
        """(scale, zero point) of a result: value = (number - zero point) * scale, number from 0 to 255."""
        low, high = self.activation_ranges[layer]
        scale = max(high - low, 1e-12) / 255
        return scale, min(255, max(0, round(-low / scale)))
