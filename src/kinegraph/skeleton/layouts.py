"""Skeleton layouts: which joints a detector reports and how they are linked."""

from __future__ import annotations

import reprlib
from collections import deque
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from kinegraph.errors import DataError, Problem, suggest
from kinegraph.skeleton.catalogue import DESCRIPTIONS, Description

Pair = tuple[int, int]

MAX_JOINTS = 1024
MAX_FILE_BYTES = 1_000_000
MAX_PROBLEMS = 20
REQUIRED_KEYS = ("name", "joints", "edges", "centre")
OPTIONAL_KEYS = ("symmetric", "bones")


@dataclass(frozen=True)
class Layout:
    """The joints of one person and their links. Indices count from 0.

    joints      names, in the order of axis V
    edges       undirected links, may hold cycles; the graph of the network
    bones       (child, parent), a tree rooted at `centre` that reaches every joint: V - 1 of them
    symmetric   (left, right) pairs, which a mirror image swaps
    centre      the joint that stands for the body's centre of gravity

    Raises DataError with everything that is wrong.
    """

    name: str
    joints: tuple[str, ...]
    edges: tuple[Pair, ...]
    bones: tuple[Pair, ...]
    symmetric: tuple[Pair, ...]
    centre: int

    def __post_init__(self) -> None:
        where = f"layout {self.name!r}"
        _raise_any(_find_form_problems(self.to_dict(), where))
        _raise_any(_find_tree_problems(self, where))

    @property
    def num_joints(self) -> int:
        return len(self.joints)

    def to_dict(self) -> dict[str, Any]:
        """Lists, strings and integers only, as stored in checkpoints and ONNX metadata."""
        return {
            "name": self.name,
            "joints": list(self.joints),
            "edges": [list(edge) for edge in self.edges],
            "centre": self.centre,
            "symmetric": [list(pair) for pair in self.symmetric],
            "bones": [list(bone) for bone in self.bones],
        }

    @classmethod
    def from_dict(cls, data: object, where: str = "layout") -> Layout:
        """The opposite of `to_dict`; also takes joint names in place of indices.

        Without `symmetric`, joints named left_x and right_x are paired; without `bones`, they are derived
        from the edges.
        Raises DataError with everything that is wrong, each under `where`.
        """
        _raise_any(_find_form_problems(data, where))
        assert isinstance(data, Mapping)
        joints = tuple(data["joints"])
        index = _index_joints(joints)
        edges = _resolve_pairs(data["edges"], index)
        centre = _resolve_joint(data["centre"], index)
        assert centre is not None
        symmetric, bones = data.get("symmetric"), data.get("bones")
        return cls(
            data["name"],
            joints,
            edges,
            derive_bones(len(joints), edges, centre) if bones is None else _resolve_pairs(bones, index),
            pair_sides(joints) if symmetric is None else _resolve_pairs(symmetric, index),
            centre,
        )


def derive_bones(num_joints: int, edges: Sequence[Pair], centre: int) -> tuple[Pair, ...]:
    """(child, parent) on the shortest ways from the centre, sorted; among equal ways the lowest index wins.

    Joints without a way to the centre are left out.
    """
    neighbours: list[list[int]] = [[] for _ in range(num_joints)]
    for first, second in edges:
        neighbours[first].append(second)
        neighbours[second].append(first)
    parents: dict[int, int] = {}
    waiting = deque([centre])
    while waiting:
        parent = waiting.popleft()
        for child in sorted(neighbours[parent]):
            if child != centre and child not in parents:
                parents[child] = parent
                waiting.append(child)
    return tuple(sorted(parents.items()))


def pair_sides(joints: Sequence[str]) -> tuple[Pair, ...]:
    """(left, right) of all joints named left_x and right_x."""
    index = _index_joints(joints)
    sides = (
        (position, index.get("right_" + name.removeprefix("left_")))
        for name, position in index.items()
        if name.startswith("left_")
    )
    return tuple((left, right) for left, right in sides if right is not None)


def get_layout(name_or_yaml_path: str, where: str = "layout") -> Layout:
    """A layout of the table, or one described in a .yaml or .yml file.

    `where` names the option in the DataError that an unknown name raises.
    """
    if name_or_yaml_path in LAYOUTS:
        return LAYOUTS[name_or_yaml_path]
    if name_or_yaml_path.lower().endswith((".yaml", ".yml")):
        return _read_layout(Path(name_or_yaml_path))
    expected = "one of " + ", ".join(LAYOUTS) + ", or the path of a .yaml file"
    hint = suggest(name_or_yaml_path, LAYOUTS)
    raise DataError(Problem(where, reprlib.repr(name_or_yaml_path), expected, hint))


def find_layouts(num_joints: int) -> list[str]:
    """The names of the layouts that have this many joints."""
    return [name for name, layout in LAYOUTS.items() if layout.num_joints == num_joints]


def _read_layout(path: Path) -> Layout:
    """Read a layout from YAML.

    Anchors and aliases are refused: nested ones let a small file describe gigabytes.
    """
    import yaml  # here, because the table must not pay for it at the start of the command line

    class PlainLoader(yaml.SafeLoader):
        def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
            if self.check_event(yaml.AliasEvent):
                mark = self.peek_event().start_mark
                raise yaml.composer.ComposerError(None, None, "an alias, not allowed in a layout", mark)
            node: yaml.Node | None = super().compose_node(parent, index)
            return node

    try:
        if not path.is_file():
            raise DataError(Problem(str(path), "no such file", "a YAML file that describes a layout"))
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise DataError(Problem(str(path), "a larger file", f"at most {MAX_FILE_BYTES} bytes"))
        # PlainLoader is a SafeLoader: it makes plain data only
        data = yaml.load(content, Loader=PlainLoader)
    except OSError as error:
        got = error.strerror or str(error)
        raise DataError(Problem(str(path), got, "a file that can be read")) from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        got = " ".join(str(error).split()) or type(error).__name__
        hint = f"Keys: {', '.join(REQUIRED_KEYS)}; optional: {', '.join(OPTIONAL_KEYS)}."
        raise DataError(Problem(str(path), got, "a YAML file that describes a layout", hint)) from error
    return Layout.from_dict(data, str(path))


def _raise_any(problems: Iterator[Problem]) -> None:
    """Raise the first problems of possibly very many."""
    found = tuple(islice(problems, MAX_PROBLEMS))
    if found:
        raise DataError(*found)


def _find_form_problems(data: object, where: str) -> Iterator[Problem]:
    """Everything wrong with a layout as plain data, except the shape of its tree."""
    known = REQUIRED_KEYS + OPTIONAL_KEYS
    if not isinstance(data, Mapping):
        yield Problem(where, reprlib.repr(data), f"a mapping with the keys {', '.join(REQUIRED_KEYS)}")
        return
    for key in data:
        if key not in known:
            got, expected = f"the key {reprlib.repr(key)}", "one of " + ", ".join(known)
            yield Problem(where, got, expected, suggest(str(key), known))
    for key in REQUIRED_KEYS:
        if data.get(key) is None:
            yield Problem(where, f"no {key}", f"the key {key}")
    name, joints, centre = (data.get(key) for key in ("name", "joints", "centre"))
    if name is not None and not (isinstance(name, str) and name):
        yield Problem(f"{where}: name", reprlib.repr(name), "a text")
    if joints is None:
        return
    joint_problems = list(islice(_find_joint_problems(joints, f"{where}: joints"), MAX_PROBLEMS))
    yield from joint_problems
    if joint_problems:
        return
    index = _index_joints(joints)
    if centre is not None and _resolve_joint(centre, index) is None:
        yield _describe_bad_joint(centre, index, f"{where}: centre")
    for key in ("edges", "symmetric", "bones"):
        if data.get(key) is not None:
            yield from _find_pair_problems(data[key], index, f"{where}: {key}")
    if isinstance(data.get("symmetric"), list):
        yield from _find_side_problems(data["symmetric"], index, f"{where}: symmetric")


def _find_joint_problems(joints: object, where: str) -> Iterator[Problem]:
    if not isinstance(joints, list) or not 1 <= len(joints) <= MAX_JOINTS:
        got = f"{len(joints)} of them" if isinstance(joints, list) else reprlib.repr(joints)
        yield Problem(where, got, f"a list of 1 to {MAX_JOINTS} names")
        return
    seen: set[Hashable] = set()
    for position, joint in enumerate(joints):
        if not isinstance(joint, str) or not joint:
            yield Problem(f"{where}[{position}]", reprlib.repr(joint), "a name", "Put it in quotes.")
        elif joint in seen:
            yield Problem(f"{where}[{position}]", reprlib.repr(joint), "a name that occurs once")
        else:
            seen.add(joint)


def _find_pair_problems(pairs: object, index: Mapping[str, int], where: str) -> Iterator[Problem]:
    if not isinstance(pairs, list):
        yield Problem(where, reprlib.repr(pairs), "a list of pairs of joints")
        return
    seen: set[Pair] = set()
    for position, pair in enumerate(pairs):
        here = f"{where}[{position}]"
        if not isinstance(pair, list) or len(pair) != 2:
            yield Problem(here, reprlib.repr(pair), "a pair of joints")
            continue
        first, second = (_resolve_joint(joint, index) for joint in pair)
        if first is None:
            yield _describe_bad_joint(pair[0], index, here)
        if second is None:
            yield _describe_bad_joint(pair[1], index, here)
        if first is None or second is None:
            continue
        key = (min(first, second), max(first, second))
        if first == second:
            yield Problem(here, reprlib.repr(pair), "two different joints")
        elif key in seen:
            yield Problem(here, reprlib.repr(pair), "a pair that occurs once")
        seen.add(key)


def _find_side_problems(pairs: Sequence[object], index: Mapping[str, int], where: str) -> Iterator[Problem]:
    """A mirror image swaps each joint with one other, so no joint may stand in two pairs."""
    joints = list(index)
    seen: dict[int, int] = {}
    for position, pair in enumerate(pairs):
        for end in pair if isinstance(pair, list) else ():
            joint = _resolve_joint(end, index)
            if joint is not None and seen.setdefault(joint, position) != position:
                yield Problem(f"{where}[{position}]", f"{joints[joint]} again", "each joint in one pair at most")


def _find_tree_problems(layout: Layout, where: str) -> Iterator[Problem]:
    """Bones must give every joint but the centre one parent, and a way to the centre."""
    parents: dict[int, int] = {}
    for position, (child, parent) in enumerate(layout.bones):
        here, name = f"{where}: bones[{position}]", layout.joints[child]
        if child == layout.centre:
            yield Problem(here, f"{name} as a child", "the centre without a parent", "A bone is [child, parent].")
        elif child in parents:
            yield Problem(here, f"a second parent of {name}", "one parent", "A bone is [child, parent].")
        parents[child] = parent
    reached = {layout.centre, *dict(derive_bones(layout.num_joints, layout.bones, layout.centre))}
    lost = [name for position, name in enumerate(layout.joints) if position not in reached]
    if lost:
        names = ", ".join(lost[:MAX_PROBLEMS]) + (", ..." if len(lost) > MAX_PROBLEMS else "")
        expected = f"a way from every joint to the centre, {layout.joints[layout.centre]}"
        hint = "Add the edges that are missing, or list the bones."
        yield Problem(where, f"no way from {names}", expected, hint)


def _index_joints(joints: Sequence[str]) -> dict[str, int]:
    return {name: position for position, name in enumerate(joints)}


def _resolve_joint(joint: object, index: Mapping[str, int]) -> int | None:
    """The index of a joint given by name or index; None if there is no such joint."""
    if isinstance(joint, str):
        return index.get(joint)
    if isinstance(joint, int) and not isinstance(joint, bool) and 0 <= joint < len(index):
        return joint
    return None


def _resolve_pairs(pairs: Sequence[Sequence[object]], index: Mapping[str, int]) -> tuple[Pair, ...]:
    """Pairs of indices; to be called when `_find_pair_problems` found none."""
    resolved = ((_resolve_joint(first, index), _resolve_joint(second, index)) for first, second in pairs)
    return tuple((first, second) for first, second in resolved if first is not None and second is not None)


def _describe_bad_joint(joint: object, index: Mapping[str, int], where: str) -> Problem:
    hint = suggest(joint, index) if isinstance(joint, str) else ""
    return Problem(where, reprlib.repr(joint), f"a joint's name or an index from 0 to {len(index) - 1}", hint)


def _read_description(description: Description) -> Layout:
    joints: list[str] = []
    for joint in description.joints.split():
        side, _, rest = joint.partition("_")
        joints += [f"left_{rest}", f"right_{rest}"] if side == "both" else [joint]
    first = description.first
    edges = [[int(end) - first for end in edge.split("-")] for edge in description.edges.split()]
    return Layout.from_dict(
        {"name": description.name, "joints": joints, "edges": edges, "centre": description.centre - first}
    )


LAYOUTS: dict[str, Layout] = {layout.name: _read_description(layout) for layout in DESCRIPTIONS}
