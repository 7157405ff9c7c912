"""Along which axis people stand, and whether augmentation would turn them upside down."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kinegraph.data.array_namespace import put_last
from kinegraph.data.body import find_body
from kinegraph.data.missing import MaskedClips
from kinegraph.data.normalise import find_trunk
from kinegraph.data.pipeline import InputPipeline, read_some_clips
from kinegraph.skeleton.layouts import Layout

if TYPE_CHECKING:
    from kinegraph.spec_input import AugmentSpec

AXES = "xyz"
UPRIGHT = 0.8
"""Mean cosine between trunks and an axis, either way round, from which on people count as standing along it."""
TILTED = 60.0
"""Degrees: of a larger turn about an axis that lies across, half of all clips and more have people on their sides."""


def find_upright_axis(clips: MaskedClips, layout: Layout) -> int:
    """The coordinate along which trunks stand in clips of 3 coordinates, or -1: mixed, or no trunk is known."""
    body = find_body(layout)
    if not body.trunk[0]:
        return -1
    ways, is_there = find_trunk(put_last(clips.data[:, :3], 3), put_last(clips.is_real, 2), body)
    trunks = np.moveaxis(ways, 1, -1)[is_there]
    lengths = np.linalg.norm(trunks, axis=1, keepdims=True)
    trunks = trunks[lengths[:, 0] > 0] / lengths[lengths[:, 0] > 0]
    cosines = np.abs(trunks).sum(axis=0) / max(len(trunks), 1)
    axis = int(cosines.argmax())
    return axis if cosines[axis] >= UPRIGHT else -1


def find_tilts(augment: AugmentSpec, pipeline: InputPipeline, layout: Layout, data_path: str) -> list[str]:
    """What to tell a user whose recipe turns people about another axis than that along which they stand."""
    if pipeline.num_coordinates != 3:
        return []
    turns = {axis: getattr(augment, f"rotation_{axis}") for axis in AXES}
    if max(turns.values()) <= TILTED:
        return []
    upright = find_upright_axis(pipeline.clean(read_some_clips(data_path)), layout)
    if upright < 0:
        return []
    stands = AXES[upright]
    return [
        f"augment.rotation_{axis}={degrees:g} turns people upside down: in {data_path} they stand along {stands}. "
        f"Exchange the two: augment.rotation_{axis}={turns[stands]:g} augment.rotation_{stands}={degrees:g}."
        for axis, degrees in turns.items()
        if degrees > TILTED and axis != stands
    ]
