"""In which order a graph convolution mixes joints and channels: every runtime that can choose asks here."""

from __future__ import annotations

from kinegraph.models.folded import GraphConvolutionLayer


def mixes_joints_first(layer: GraphConvolutionLayer) -> bool:
    """Whether joints are mixed before channels: that leaves fewer products where channels become more.

    Both orders are exact; the same one everywhere keeps rounding alike.
    """
    _, before, after = layer.weight.shape
    return before <= after
