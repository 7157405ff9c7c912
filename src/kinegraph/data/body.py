"""What the input pipeline knows of a skeleton: centre, bones, trunk, the line across, the sides."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kinegraph.errors import DataError, Problem
from kinegraph.skeleton.layouts import MAX_JOINTS, Layout, Pair

LOW_JOINTS = (("left_hip", "right_hip"), ("hip_centre",), ("pelvis",), ("spine_base",))
HIGH_JOINTS = (("left_shoulder", "right_shoulder"), ("shoulder_centre",), ("spine_shoulder",), ("neck",), ("thorax",))
ACROSS = ("shoulder", "hip")


@dataclass(frozen=True)
class Body:
    """Joints by index.

    centre      the joint that stands for the place of the body
    bones       (child, parent) of every joint but the centre
    trunk       joints at its lower and at its upper end, whose means are taken; both empty: the layout has no trunk
    across      (left, right) pairs, shoulders and hips, whose lines run across the body
    symmetric   (left, right) pairs that a mirror image swaps
    """

    centre: int
    bones: tuple[Pair, ...]
    trunk: tuple[tuple[int, ...], tuple[int, ...]]
    across: tuple[Pair, ...]
    symmetric: tuple[Pair, ...]

    def to_dict(self) -> dict[str, Any]:
        """Lists and integers only."""
        return {
            "centre": self.centre,
            "bones": [list(bone) for bone in self.bones],
            "trunk": [list(end) for end in self.trunk],
            "across": [list(pair) for pair in self.across],
            "symmetric": [list(pair) for pair in self.symmetric],
        }

    @classmethod
    def from_dict(cls, data: Any, num_joints: int, where: str) -> Body:
        """The opposite of `to_dict`. Raises DataError for anything that it would not have written."""
        problems = list(_find_problems(data, num_joints, where))
        if problems:
            raise DataError(*problems)
        pairs = {key: tuple((first, second) for first, second in data[key]) for key in ("bones", "across", "symmetric")}
        low, high = (tuple(end) for end in data["trunk"])
        return cls(data["centre"], pairs["bones"], (low, high), pairs["across"], pairs["symmetric"])

    @property
    def parents(self) -> dict[int, int]:
        """Joint -> the joint that it hangs on; the centre has none."""
        return dict(self.bones)


def find_body(layout: Layout) -> Body:
    """The body of a layout. Trunk and line across are found by the names of the joints."""
    index = {name: place for place, name in enumerate(layout.joints)}

    def find_end(choices: Sequence[tuple[str, ...]]) -> tuple[int, ...]:
        return next((tuple(index[name] for name in names) for names in choices if set(names) <= set(index)), ())

    low, high = find_end(LOW_JOINTS), find_end(HIGH_JOINTS)
    across = [(index.get(f"left_{name}"), index.get(f"right_{name}")) for name in ACROSS]
    return Body(
        centre=layout.centre,
        bones=layout.bones,
        trunk=(low, high) if low and high else ((), ()),
        across=tuple((left, right) for left, right in across if left is not None and right is not None),
        symmetric=layout.symmetric,
    )


def _find_problems(data: Any, num_joints: int, where: str) -> Iterator[Problem]:
    keys = ("centre", "bones", "trunk", "across", "symmetric")
    if not isinstance(data, Mapping) or set(data) != set(keys) or num_joints > MAX_JOINTS:
        yield Problem(where, reprlib.repr(data), f"a mapping with {', '.join(keys)}, of at most {MAX_JOINTS} joints")
        return

    def is_joint(value: Any) -> bool:
        return type(value) is int and 0 <= value < num_joints

    def is_list(value: Any, length: int | None) -> bool:
        fits = isinstance(value, list | tuple) and len(value) <= num_joints and length in (None, len(value))
        return fits and all(is_joint(joint) for joint in value)

    if not is_joint(data["centre"]):
        yield Problem(f"{where}.centre", reprlib.repr(data["centre"]), f"a joint from 0 to {num_joints - 1}")
    for key in ("bones", "across", "symmetric"):
        pairs = data[key]
        fits = isinstance(pairs, list | tuple) and len(pairs) <= num_joints
        if not fits or not all(is_list(pair, 2) for pair in pairs):
            yield Problem(f"{where}.{key}", reprlib.repr(pairs), "pairs of joints")
        elif (
            key == "bones"
            and is_joint(data["centre"])
            and sorted(child for child, _ in pairs) != [joint for joint in range(num_joints) if joint != data["centre"]]
        ):
            yield Problem(f"{where}.bones", reprlib.repr(pairs), "one bone for each joint but the centre")
        elif key == "symmetric" and len({joint for pair in pairs for joint in pair}) != 2 * len(pairs):
            yield Problem(f"{where}.symmetric", reprlib.repr(pairs), "each joint in one pair at most")
    trunk = data["trunk"]
    is_pair = isinstance(trunk, list | tuple) and len(trunk) == 2
    if not is_pair or not all(is_list(end, None) for end in trunk) or bool(trunk[0]) != bool(trunk[1]):
        yield Problem(f"{where}.trunk", reprlib.repr(trunk), "the joints of its lower and its upper end")
