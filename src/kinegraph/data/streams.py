"""Streams: what the network gets of the joints. Their channels stand one after the other.

Joints, bones and their motions are the four streams of 2s-AGCN (Shi et al., 2019) and its successors; fusing them at
the input of one network is early fusion as in EfficientGCN (Song et al., 2021).
"""

from __future__ import annotations

from collections.abc import Sequence

from kinegraph.data.array_namespace import Array, get_namespace
from kinegraph.data.body import Body
from kinegraph.data.missing import MaskedClips


def make_streams(
    clips: MaskedClips,
    streams: Sequence[str],
    num_coordinates: int,
    body: Body,
    before: MaskedClips | None = None,
) -> Array:
    """Clips -> (N, C * streams, T, V, M), each stream with the channels of the clips, zero where it is not known.

    joint          as it is
    bone           coordinates minus those of the parent; the centre has none
    joint_motion   coordinates minus those in the frame before; zero in the first frame
    bone_motion    the same of the bones

    Where a joint that a value needs is missing, the value is zero. A score is the lower one of those of both joints.
    `before` is the frame (T = 1) before the first one, for frame by frame inference.
    """
    xp = get_namespace(clips.data)
    bones: MaskedClips | None = None
    parts = []
    for stream in streams:
        source, source_before = clips, before
        if stream.startswith("bone"):
            bones = make_bones(clips, num_coordinates, body) if bones is None else bones
            source = bones
            source_before = None if before is None else make_bones(before, num_coordinates, body)
        if stream.endswith("motion"):
            source = make_motion(source, num_coordinates, source_before)
        parts.append(source.data)
    return parts[0] if len(parts) == 1 else xp.concatenate(parts, axis=1)


def make_bones(clips: MaskedClips, num_coordinates: int, body: Body) -> MaskedClips:
    """Each joint minus its parent."""
    num_joints = clips.data.shape[3]
    parents = [body.parents.get(joint, joint) for joint in range(num_joints)]
    is_real = clips.is_real & clips.is_real[:, :, parents]
    is_real[:, :, body.centre] = False
    return _subtract(clips.data, clips.data[:, :, :, parents], is_real, num_coordinates)


def make_motion(clips: MaskedClips, num_coordinates: int, before: MaskedClips | None = None) -> MaskedClips:
    """Each frame minus the one before."""
    xp = get_namespace(clips.data)
    first = before or MaskedClips(xp.zeros_like(clips.data[:, :, :1]), xp.zeros_like(clips.is_real[:, :1]))
    data = xp.concatenate([first.data, clips.data[:, :, :-1]], axis=2)
    is_real = xp.concatenate([first.is_real, clips.is_real[:, :-1]], axis=1)
    return _subtract(clips.data, data, clips.is_real & is_real, num_coordinates)


def _subtract(x: Array, other: Array, is_real: Array, num_coordinates: int) -> MaskedClips:
    """Difference of the coordinates and the lower score, where real."""
    xp = get_namespace(x)
    result = x[:, :num_coordinates] - other[:, :num_coordinates]
    if num_coordinates < x.shape[1]:
        scores = xp.minimum(x[:, num_coordinates:], other[:, num_coordinates:])
        result = xp.concatenate([result, scores], axis=1)
    return MaskedClips(xp.where(is_real[:, None], result, 0.0), is_real)
