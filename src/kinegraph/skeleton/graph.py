"""Partition strategies: a layout -> adjacency (K, V, V), one matrix for each subset of a joint's neighbours.

Yan et al., Spatial Temporal Graph Convolutional Networks for Skeleton-Based Action Recognition, AAAI 2018,
"Partition strategies". Entry [k, j, i] weighs joint j in the sum at joint i: the graph convolution is the sum
over k of x_k @ A[k].
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from kinegraph.errors import DataError, look_up
from kinegraph.skeleton.layouts import Layout

Matrix = NDArray[np.float64]
Subsets = list[NDArray[np.bool_]]


def build_adjacency(layout: Layout, strategy: str) -> NDArray[np.float32]:
    """The weights of neighbours (K, V, V): links and self links, columns summing to one, split by strategy.

    Raises DataError for an unknown strategy.
    """
    split = look_up(STRATEGIES, strategy, "graph_strategy", DataError)
    linked = np.eye(layout.num_joints)
    for first, second in layout.edges:
        linked[first, second] = linked[second, first] = 1.0
    weights = linked / linked.sum(axis=0)
    return np.stack([weights * subset for subset in split(layout)]).astype(np.float32)


def measure_hops(layout: Layout) -> Matrix:
    """The number of edges between each joint and the centre (V,); infinity where there is no way."""
    linked = np.eye(layout.num_joints, dtype=bool)
    for first, second in layout.edges:
        linked[first, second] = linked[second, first] = True
    hops = np.full(layout.num_joints, np.inf)
    frontier = np.arange(layout.num_joints) == layout.centre
    distance = 0
    while frontier.any():
        hops[frontier] = distance
        frontier = linked[frontier].any(axis=0) & np.isinf(hops)
        distance += 1
    return hops


def split_uniform(layout: Layout) -> Subsets:
    """One subset: every neighbour alike."""
    return [np.ones((layout.num_joints, layout.num_joints), dtype=bool)]


def split_distance(layout: Layout) -> Subsets:
    """Two subsets: the joint itself, its neighbours."""
    itself = np.eye(layout.num_joints, dtype=bool)
    return [itself, ~itself]


def split_spatial(layout: Layout) -> Subsets:
    """Three subsets as in TAO: joint i itself; its neighbours j with d(j) >= d(i); those with d(j) < d(i).

    d is the hop distance to the centre, *infinite beyond one hop*, and infinity equals infinity. So only the
    links of the centre and of its neighbours are told apart. The paper does not truncate, but released weights
    were trained so.
    """
    to_centre = measure_hops(layout)
    to_centre[to_centre > 1] = np.inf
    itself = np.eye(layout.num_joints, dtype=bool)
    further = to_centre[:, None] < to_centre[None, :]
    return [itself, ~itself & ~further, further]


def split_spatial_exact(layout: Layout) -> Subsets:
    """Three subsets by the paper's equation for the spatial configuration.

    r is the full hop distance to the centre. In order: r_j = r_i (the joint and neighbours as far out),
    r_j < r_i (centripetal), r_j > r_i (centrifugal).
    """
    to_centre = measure_hops(layout)
    neighbour, joint = to_centre[:, None], to_centre[None, :]
    return [neighbour == joint, neighbour < joint, neighbour > joint]


STRATEGIES: dict[str, Callable[[Layout], Subsets]] = {
    "uniform": split_uniform,
    "distance": split_distance,
    "spatial": split_spatial,
    "spatial_exact": split_spatial_exact,
}
