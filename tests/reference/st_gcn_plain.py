"""ST-GCN's adjacency and graph convolution, slow and plain, as restated from the formulas for tests.

Nothing here is shared with the package: distances come from relaxing all pairs, subsets from comparing joint by joint,
and the convolution is the definition, one number at a time.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def measure_distances(num_joints: int, edges: list[tuple[int, int]]) -> list[list[float]]:
    """Number of edges between all pairs of joints (Floyd and Warshall)."""
    distance = [[0.0 if a == b else math.inf for b in range(num_joints)] for a in range(num_joints)]
    for a, b in edges:
        distance[a][b] = distance[b][a] = 1.0
    for middle in range(num_joints):
        for a in range(num_joints):
            for b in range(num_joints):
                distance[a][b] = min(distance[a][b], distance[a][middle] + distance[middle][b])
    return distance


def choose_subset(strategy: str, j: int, i: int, distance: list[list[float]], centre: int) -> int:
    """The number of the matrix that holds the entry of neighbour j at joint i."""
    to_centre = [row[centre] for row in distance]
    if strategy == "uniform":
        return 0
    if strategy == "distance":
        return 0 if i == j else 1
    if strategy == "spatial":
        near = [d if d <= 1 else math.inf for d in to_centre]
        if i == j:
            return 0
        return 2 if near[j] < near[i] else 1
    assert strategy == "spatial_exact"
    if to_centre[j] == to_centre[i]:
        return 0
    return 1 if to_centre[j] < to_centre[i] else 2


def build_adjacency(num_joints: int, edges: list[tuple[int, int]], centre: int, strategy: str) -> Array:
    """(K, V, V): entry [k, j, i] is 1 / (number of neighbours of i, itself included), in the matrix of its subset."""
    distance = measure_distances(num_joints, edges)
    subsets = {"uniform": 1, "distance": 2, "spatial": 3, "spatial_exact": 3}[strategy]
    adjacency = np.zeros((subsets, num_joints, num_joints))
    for i in range(num_joints):
        neighbours = [j for j in range(num_joints) if distance[j][i] <= 1]
        for j in neighbours:
            adjacency[choose_subset(strategy, j, i, distance, centre), j, i] = 1 / len(neighbours)
    return adjacency


def convolve_graph(x: Array, weight: Array, bias: Array, adjacency: Array) -> Array:
    """x (C, V), weight (K*C', C), bias (K*C',), adjacency (K, V, V) -> (C', V), for one frame of one person."""
    num_subsets, num_joints, _ = adjacency.shape
    out_channels = len(bias) // num_subsets
    y = np.zeros((out_channels, num_joints))
    for k in range(num_subsets):
        for channel in range(out_channels):
            row = k * out_channels + channel
            mapped = [
                bias[row] + sum(weight[row, c] * x[c, joint] for c in range(len(x))) for joint in range(num_joints)
            ]
            for i in range(num_joints):
                y[channel, i] += sum(mapped[j] * adjacency[k, j, i] for j in range(num_joints))
    return y
