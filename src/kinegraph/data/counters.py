"""Random numbers from their coordinates alone (seed, epoch, clip, number of the draw), without a generator's state.

The coordinates pass one after the other through the mixing function of SplitMix64 (Steele, Lea and Flood, "Fast
splittable pseudorandom number generators", 2014). NumPy and torch, on any device, draw the same bits.
"""

from __future__ import annotations

import math

import numpy as np

from kinegraph.data.array_namespace import Array, convert_like, get_namespace

GOLDEN = 0x9E3779B97F4A7C15
FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
SHIFTS = (30, 27, 31)


def uniform_from_counters(seed: int, epoch: int, index: np.ndarray, num_draws: int, stream: int) -> np.ndarray:
    """Random numbers in [0, 1) from their coordinates alone: float64 (n, num_draws) for `index` (n,).

    `stream` keeps the draws of different augmentations apart.
    """
    state = _start(seed, epoch, index, stream)
    state = _mix(state ^ np.arange(num_draws, dtype=np.uint64)[None, :])
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def normal_from_counters(seed: int, epoch: int, index: np.ndarray, num_draws: int, stream: int, like: Array) -> Array:
    """Standard normal numbers (n, num_draws), computed where `like` is and of its dtype.

    Two from each 64 bits: the radius from the upper half, the angle from the lower one (Box and Muller, 1958).
    """
    xp = get_namespace(like)
    count = -(-num_draws // 2)
    start = _start(seed, epoch, index, stream)
    if xp is np:
        bits = _mix(start ^ np.arange(count, dtype=np.uint64)[None, :])
        high, low = bits >> np.uint64(32), bits & np.uint64(0xFFFFFFFF)
    else:
        bits = _mix_signed(convert_like(start.view(np.int64), like) ^ xp.arange(count, device=like.device)[None, :])
        high, low = (bits >> 32) & 0xFFFFFFFF, bits & 0xFFFFFFFF
    # Half a step up: the logarithm of zero must not come
    radius = _cast(high, like) * 2.0**-32 + 2.0**-33
    angle = _cast(low, like) * (2 * math.pi * 2.0**-32)
    radius = xp.sqrt(-2.0 * xp.log(xp.clip(radius, None, 1.0)))
    return xp.concatenate([radius * xp.cos(angle), radius * xp.sin(angle)], axis=1)[:, :num_draws]


def _cast(x: Array, like: Array) -> Array:
    return x.astype(like.dtype) if isinstance(x, np.ndarray) else x.to(like.dtype)


def _start(seed: int, epoch: int, index: np.ndarray, stream: int) -> np.ndarray:
    """The states (n, 1) from which the draws of each clip go on."""
    state = np.zeros((1, 1), np.uint64)
    for coordinate in (seed, stream, epoch):
        state = _mix(state ^ np.uint64(coordinate % 2**64))
    return _mix(state ^ np.asarray(index, np.int64).astype(np.uint64)[:, None])


def _mix(x: np.ndarray) -> np.ndarray:
    """One step of SplitMix64 from each state: a bijection of uint64 that spreads every bit over all."""
    x = x + np.uint64(GOLDEN)
    x = (x ^ (x >> np.uint64(SHIFTS[0]))) * np.uint64(FACTORS[0])
    x = (x ^ (x >> np.uint64(SHIFTS[1]))) * np.uint64(FACTORS[1])
    return x ^ (x >> np.uint64(SHIFTS[2]))


def _mix_signed(x: Array) -> Array:
    """The same on torch's int64: it wraps round as well, but shifts copies of the sign in, which are masked out."""
    x = x + (GOLDEN - 2**64)
    x = (x ^ _shift(x, SHIFTS[0])) * (FACTORS[0] - 2**64)
    x = (x ^ _shift(x, SHIFTS[1])) * (FACTORS[1] - 2**64)
    return x ^ _shift(x, SHIFTS[2])


def _shift(x: Array, count: int) -> Array:
    return (x >> count) & ((1 << (64 - count)) - 1)
