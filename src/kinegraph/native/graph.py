"""How a graph convolution is cut into matrix products: as few rows as its adjacency allows.

y_w = sum over subsets k and joints v of a_kvw (x_v W_k). An edge (v, w) of subset k can be summed before the product
with W_k, which then has a row for w, or after it, which then has a row for v. Which joints must have a row so that
every edge has one at an end is the vertex cover of a bipartite graph, and the smallest is as large as the largest
matching (König, 1931). For the `spatial` strategy that is about two thirds of the rows of the definition.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kinegraph.models.folded import GraphConvolutionLayer

Links = list[list[tuple[int, float]]]
FREE = -1


@dataclass(frozen=True, eq=False)
class Part:
    """One matrix product: `rows` rows, each of sums of joints for all of `subsets` side by side.

    mixing: for each subset in turn, for each row, the (joint, weight) pairs that are summed.
    """

    subsets: tuple[int, ...]
    rows: int
    mixing: Links


@dataclass(frozen=True, eq=False)
class GraphPlan:
    """combination: for each joint of the result, (row, weight) pairs; rows are counted through all parts."""

    parts: tuple[Part, ...]
    combination: Links


def plan_graph(layer: GraphConvolutionLayer, only_after: bool = False) -> GraphPlan:
    """Products and sums that give y without its bias. only_after: no sums before a product, where they would round."""
    subsets, num_joints, _ = layer.adjacency.shape
    if only_after:
        covers = [({int(v) for v in np.flatnonzero(rows.any(axis=1))}, set[int]()) for rows in layer.adjacency != 0]
    else:
        covers = [find_cover(adjacency != 0) for adjacency in layer.adjacency]
    parts: list[Part] = []
    combination: Links = [[] for _ in range(num_joints)]
    num_rows = 0
    # Joints whose sums need the same subsets share a product, which then also adds the subsets up
    patterns: dict[tuple[int, ...], list[int]] = {}
    for w in range(num_joints):
        pattern = tuple(k for k in range(subsets) if w in covers[k][1])
        if pattern:
            patterns.setdefault(pattern, []).append(w)
    for pattern, joints in patterns.items():
        mixing: Links = []
        for k in pattern:
            after = covers[k][0]
            mixing += [[(v, a) for v, a in _list_links(layer.adjacency[k, :, w]) if v not in after] for w in joints]
        parts.append(Part(pattern, len(joints), mixing))
        for row, w in enumerate(joints):
            combination[w].append((num_rows + row, 1.0))
        num_rows += len(joints)
    for k in range(subsets):
        after_joints = sorted(covers[k][0])
        if not after_joints:
            continue
        parts.append(Part((k,), len(after_joints), [[(v, 1.0)] for v in after_joints]))
        for row, v in enumerate(after_joints):
            for w, a in _list_links(layer.adjacency[k, v]):
                combination[w].append((num_rows + row, a))
        num_rows += len(after_joints)
    return GraphPlan(tuple(parts), combination)


def _list_links(weights: NDArray[np.float32]) -> list[tuple[int, float]]:
    return [(int(i), float(weights[i])) for i in np.flatnonzero(weights)]


def find_cover(edges: NDArray[np.bool_]) -> tuple[set[int], set[int]]:
    """Rows and columns of a (V, W) matrix, as few as possible, that together hold all its True entries.

    A largest matching by Hopcroft and Karp (1973), then the cover that König's proof builds from it.
    """
    neighbours = [np.flatnonzero(row).tolist() for row in edges]
    column_of, row_of = _match(neighbours, edges.shape[1])
    waiting = [row for row, column in enumerate(column_of) if column == FREE]
    rows, columns = set(waiting), set[int]()
    while waiting:
        for w in neighbours[waiting.pop()]:
            if w not in columns:
                columns.add(w)
                # A column reached from an unmatched row is matched, else the matching were not the largest
                if row_of[w] not in rows:
                    rows.add(row_of[w])
                    waiting.append(row_of[w])
    return {v for v, row in enumerate(neighbours) if row} - rows, columns


def _match(neighbours: list[list[int]], num_columns: int) -> tuple[list[int], list[int]]:
    """The column of each row and the row of each column, or FREE, in a largest matching.

    Each round extends it along paths of the shortest length that there is, as many as do not meet: at most about two
    times the root of the number of rows, where one path at a time would take as many rounds as rows.
    """
    column_of, row_of = [FREE] * len(neighbours), [FREE] * num_columns
    while True:
        depth = _measure_depths(neighbours, column_of, row_of)
        left = [iter(columns) for columns in neighbours]
        found = [_extend(row, left, depth, column_of, row_of) for row, w in enumerate(column_of) if w == FREE]
        if not any(found):
            return column_of, row_of


def _measure_depths(neighbours: list[list[int]], column_of: list[int], row_of: list[int]) -> list[int]:
    """How many steps of a path each row is away from a free one, up to the first free column; FREE beyond it."""
    depth = [FREE] * len(neighbours)
    level = [row for row, column in enumerate(column_of) if column == FREE]
    steps = 0
    while level:
        for row in level:
            depth[row] = steps
        owners = [row_of[w] for row in level for w in neighbours[row]]
        if FREE in owners:
            break
        level = [row for row in dict.fromkeys(owners) if depth[row] == FREE]
        steps += 1
    return depth


def _extend(start: int, left: list[Iterator[int]], depth: list[int], column_of: list[int], row_of: list[int]) -> bool:
    """Give row `start` a column, moving other rows to other columns; False if no short path leads to a free one.

    left: the columns of each row that were not tried in this round.
    """
    path, taken = [start], list[int]()
    while path:
        row = path[-1]
        for w in left[row]:
            owner = row_of[w]
            if owner == FREE or depth[owner] == depth[row] + 1:
                taken.append(w)
                break
        else:
            path.pop()
            del taken[-1:]
            continue
        if owner == FREE:
            for row, w in zip(path, taken, strict=True):
                column_of[row], row_of[w] = w, row
            return True
        path.append(owner)
    return False
