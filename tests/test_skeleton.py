from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kinegraph.errors import DataError, Problem
from kinegraph.skeleton.graph import STRATEGIES, build_adjacency, measure_hops
from kinegraph.skeleton.layouts import LAYOUTS, MAX_FILE_BYTES, Layout, derive_bones, find_layouts, get_layout
from reference import st_gcn_plain

# name: joints, edges, pairs of sides, centre
EXPECTED = {
    "nvidia": (34, 35, 15, "pelvis"),
    "openpose": (18, 17, 8, "neck"),
    "human3.6m": (17, 17, 6, "thorax"),
    "ntu-rgb+d": (25, 24, 10, "spine_shoulder"),
    "ntu_edge": (24, 23, 10, "neck"),
    "coco": (17, 19, 8, "nose"),
    "kinect_v1": (20, 19, 8, "spine"),
    "mediapipe_pose": (33, 39, 16, "nose"),
    "mediapipe_hand": (21, 21, 0, "wrist"),
    "openpose_25": (25, 24, 11, "neck"),
    "penn_action": (13, 14, 6, "head"),
}

# All neighbours of some joints of each layout, by name
NEIGHBOURS = {
    "nvidia": {
        "pelvis": "left_hip right_hip torso",
        "neck": "torso nose left_shoulder right_shoulder",
        "left_hip": "pelvis left_knee left_shoulder",
        "right_ankle": "right_knee right_big_toe right_heel",
        "left_wrist": "left_elbow left_pinky_knuckle left_middle_tip left_index_knuckle left_thumb_tip",
    },
    "openpose": {
        "neck": "nose left_shoulder right_shoulder",
        "right_shoulder": "neck right_elbow right_hip",
        "nose": "neck left_eye right_eye",
    },
    "human3.6m": {
        "pelvis": "left_hip right_hip",
        "spine": "thorax left_hip right_hip",
        "neck": "thorax head left_shoulder right_shoulder",
    },
    "ntu-rgb+d": {
        "spine_shoulder": "spine_middle neck left_shoulder right_shoulder",
        "left_thumb": "left_hand_tip left_hand",
        "right_hand_tip": "right_thumb",
    },
    "ntu_edge": {
        "spine_middle": "spine_base neck left_shoulder right_shoulder",
        "neck": "spine_middle head",
        "right_thumb": "right_hand_tip right_hand",
    },
    "coco": {
        "nose": "left_eye right_eye",
        "left_eye": "nose right_eye left_ear",
        "left_hip": "right_hip left_shoulder left_knee",
    },
    "kinect_v1": {
        "spine": "hip_centre shoulder_centre",
        "shoulder_centre": "spine head left_shoulder right_shoulder",
        "right_foot": "right_ankle",
    },
    "mediapipe_pose": {
        "left_ankle": "left_knee left_heel left_foot_index",
        "right_wrist": "right_elbow right_pinky right_index right_thumb",
        "nose": "left_eye_inner right_eye_inner left_mouth right_mouth left_shoulder right_shoulder",
    },
    "mediapipe_hand": {
        "wrist": "thumb_cmc index_mcp pinky_mcp",
        "middle_mcp": "index_mcp ring_mcp middle_pip",
        "thumb_tip": "thumb_ip",
    },
    "openpose_25": {
        "neck": "nose hip_centre left_shoulder right_shoulder",
        "left_ankle": "left_knee left_big_toe left_heel",
        "right_small_toe": "right_big_toe",
    },
    "penn_action": {
        "head": "left_shoulder right_shoulder",
        "left_shoulder": "head right_shoulder left_elbow left_hip",
        "right_hip": "left_hip right_shoulder right_knee",
        "right_ankle": "right_knee",
    },
}

CHAIN = Layout("chain", ("a", "b", "c", "d"), ((0, 1), (1, 2), (2, 3)), ((1, 0), (2, 1), (3, 2)), (), 0)


def find_problems(data: object) -> tuple[Problem, ...]:
    with pytest.raises(DataError) as caught:
        Layout.from_dict(data)
    return caught.value.problems


def describe_person(**changes: Any) -> dict[str, Any]:
    person: dict[str, Any] = {
        "name": "person",
        "joints": ["head", "neck", "left_hand", "right_hand"],
        "edges": [["head", "neck"], ["neck", "left_hand"], [1, 3]],
        "centre": "neck",
    }
    return {**person, **changes}


@st.composite
def make_graphs(draw: st.DrawFn, connected: bool) -> tuple[int, list[tuple[int, int]], int]:
    """A number of joints, edges and a centre."""
    num_joints = draw(st.integers(1, 9))
    pairs = [(a, b) for b in range(num_joints) for a in range(b)]
    edges = set(draw(st.lists(st.sampled_from(pairs), unique=True))) if pairs else set()
    if connected:
        edges |= {(draw(st.integers(0, joint - 1)), joint) for joint in range(1, num_joints)}
    return num_joints, draw(st.permutations(sorted(edges))), draw(st.integers(0, num_joints - 1))


def test_table_holds_the_layouts_expected() -> None:
    found = {
        name: (layout.num_joints, len(layout.edges), len(layout.symmetric), layout.joints[layout.centre])
        for name, layout in LAYOUTS.items()
    }
    assert found == EXPECTED
    assert all(name == layout.name for name, layout in LAYOUTS.items())


@pytest.mark.parametrize("name", EXPECTED)
def test_joints_have_the_neighbours_their_names_say(name: str) -> None:
    layout = LAYOUTS[name]
    links = [{layout.joints[a], layout.joints[b]} for a, b in layout.edges]
    assert len(NEIGHBOURS[name]) >= 3
    for joint, neighbours in NEIGHBOURS[name].items():
        assert {other for link in links if joint in link for other in link - {joint}} == set(neighbours.split())


@pytest.mark.parametrize("name", [name for name in EXPECTED if name != "mediapipe_hand"])
def test_limbs_are_chains(name: str) -> None:
    layout = LAYOUTS[name]
    links = {frozenset((layout.joints[a], layout.joints[b])) for a, b in layout.edges}
    for side in ("left", "right"):
        for first, second in (("hip", "knee"), ("knee", "ankle"), ("shoulder", "elbow"), ("elbow", "wrist")):
            assert frozenset((f"{side}_{first}", f"{side}_{second}")) in links


@pytest.mark.parametrize("name", EXPECTED)
def test_mirror_image_keeps_the_edges(name: str) -> None:
    layout = LAYOUTS[name]
    mirror = list(range(layout.num_joints))
    for left, right in layout.symmetric:
        assert layout.joints[left].replace("left_", "right_") == layout.joints[right]
        mirror[left], mirror[right] = right, left
    sided = [joint for joint in layout.joints if joint.startswith(("left_", "right_"))]
    assert len(sided) == 2 * len(layout.symmetric)
    edges = {frozenset(edge) for edge in layout.edges}
    assert {frozenset((mirror[a], mirror[b])) for a, b in layout.edges} == edges
    assert mirror[layout.centre] == layout.centre


@pytest.mark.parametrize("name", EXPECTED)
def test_bones_are_a_tree_of_edges(name: str) -> None:
    layout = LAYOUTS[name]
    assert len(layout.bones) == layout.num_joints - 1
    assert {frozenset(bone) for bone in layout.bones} <= {frozenset(edge) for edge in layout.edges}
    parents = dict(layout.bones)
    for joint in range(layout.num_joints):
        for _ in range(layout.num_joints):
            joint = parents.get(joint, joint)
        assert joint == layout.centre


@given(make_graphs(connected=True))
def test_derived_bones_take_the_shortest_way(graph: tuple[int, list[tuple[int, int]], int]) -> None:
    num_joints, edges, centre = graph
    distance = st_gcn_plain.measure_distances(num_joints, edges)
    bones = derive_bones(num_joints, edges, centre)
    assert [child for child, _ in bones] == [joint for joint in range(num_joints) if joint != centre]
    for child, parent in bones:
        assert distance[parent][child] == 1
        assert distance[parent][centre] == distance[child][centre] - 1
    assert derive_bones(num_joints, [(b, a) for a, b in reversed(edges)], centre) == bones


def test_equal_ways_go_through_the_lowest_index() -> None:
    assert derive_bones(4, [(3, 2), (3, 1), (0, 2), (0, 1)], 0) == ((1, 0), (2, 0), (3, 1))


@given(make_graphs(connected=False))
def test_derived_bones_leave_out_what_is_not_linked(graph: tuple[int, list[tuple[int, int]], int]) -> None:
    num_joints, edges, centre = graph
    distance = st_gcn_plain.measure_distances(num_joints, edges)
    reached = [j for j in range(num_joints) if j != centre and math.isfinite(distance[j][centre])]
    assert [child for child, _ in derive_bones(num_joints, edges, centre)] == reached


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", EXPECTED)
def test_adjacency_equals_the_plain_restatement(name: str, strategy: str) -> None:
    layout = LAYOUTS[name]
    adjacency = build_adjacency(layout, strategy)
    plain = st_gcn_plain.build_adjacency(layout.num_joints, list(layout.edges), layout.centre, strategy)
    assert adjacency.dtype == np.float32
    np.testing.assert_array_equal(adjacency, plain.astype(np.float32))
    np.testing.assert_allclose(adjacency.sum(axis=(0, 1)), 1, rtol=1e-6)


@given(make_graphs(connected=False), st.sampled_from(sorted(STRATEGIES)))
@settings(max_examples=200)
def test_adjacency_of_any_graph(graph: tuple[int, list[tuple[int, int]], int], strategy: str) -> None:
    num_joints, edges, centre = graph
    bones = tuple((joint, centre) for joint in range(num_joints) if joint != centre)
    layout = Layout("any", tuple(f"joint {j}" for j in range(num_joints)), tuple(edges), bones, (), centre)
    plain = st_gcn_plain.build_adjacency(num_joints, edges, centre, strategy)
    np.testing.assert_array_equal(build_adjacency(layout, strategy), plain.astype(np.float32))
    distance = st_gcn_plain.measure_distances(num_joints, edges)
    assert measure_hops(layout).tolist() == [row[centre] for row in distance]


def test_spatial_truncates_and_spatial_exact_does_not() -> None:
    """A chain a-b-c-d with its centre at a, by hand: distances 0, 1, inf, inf; in truth 0, 1, 2, 3."""
    half, third = 1 / 2, 1 / 3
    itself = np.diag([half, third, third, half])
    outward, inward = np.zeros((4, 4)), np.zeros((4, 4))
    outward[0, 1] = third  # a is nearer to the centre than b
    outward[1, 2] = third
    inward[1, 0] = half
    inward[2, 1] = third
    exact_outward, exact_inward = outward.copy(), inward.copy()
    exact_outward[2, 3] = half  # truncated, c and d are equally far
    exact_inward[3, 2] = inward[3, 2] = third
    inward[2, 3] = half
    for strategy, parts in (("spatial", (inward, outward)), ("spatial_exact", (exact_outward, exact_inward))):
        np.testing.assert_array_equal(build_adjacency(CHAIN, strategy), np.stack([itself, *parts]).astype(np.float32))


def test_adjacency_equals_the_golden_arrays(shared: Path) -> None:
    entries = json.loads((shared / "golden" / "model_logits.json").read_text())
    assert len(entries) == 4
    for entry in entries:
        adjacency = build_adjacency(LAYOUTS[entry["layout"]], entry["strategy"])
        np.testing.assert_array_equal(adjacency, np.array(entry["adjacency"], np.float32))


def test_unknown_strategy_is_named() -> None:
    with pytest.raises(DataError, match="Did you mean 'spatial'"):
        build_adjacency(CHAIN, "spacial")


@pytest.mark.parametrize("name", EXPECTED)
def test_plain_data_gives_the_layout_back(name: str) -> None:
    layout = LAYOUTS[name]
    assert Layout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout


def test_get_and_find_by_name() -> None:
    assert get_layout("coco") is LAYOUTS["coco"]
    assert find_layouts(17) == ["human3.6m", "coco"]
    assert find_layouts(25) == ["ntu-rgb+d", "openpose_25"]
    assert find_layouts(99) == []
    with pytest.raises(DataError) as caught:
        get_layout("nvidea", "model.graph_layout")
    (problem,) = caught.value.problems
    assert problem.where == "model.graph_layout"
    assert "nvidia" in problem.hint
    assert ".yaml" in problem.expected


@pytest.mark.parametrize("suffix", [".yaml", ".yml"])
def test_layout_is_read_from_yaml(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"person{suffix}"
    path.write_text(
        """
        name: person
        joints: [head, neck, left_hand, right_hand]
        edges: [[head, neck], [neck, left_hand], [1, 3]]
        centre: neck
        """
    )
    joints = ("head", "neck", "left_hand", "right_hand")
    edges, bones = ((0, 1), (1, 2), (1, 3)), ((0, 1), (2, 1), (3, 1))
    assert get_layout(str(path)) == Layout("person", joints, edges, bones, ((2, 3),), 1)


def test_given_pairs_and_bones_win_over_derived_ones() -> None:
    layout = Layout.from_dict(
        describe_person(symmetric=[], edges=[["neck", "head"]], bones=[[0, 1], ["left_hand", "head"], [3, 0]])
    )
    assert layout.symmetric == ()
    assert layout.bones == ((0, 1), (2, 0), (3, 0))
    assert layout.edges == ((1, 0),)


def test_all_problems_of_a_file_come_together(tmp_path: Path) -> None:
    path = tmp_path / "person.yaml"
    path.write_text(
        """
        name: person
        joints: [head, neck, left_hand, right_hand]
        edges: [[head, nek], [neck, neck], [1, 4], [0, 1], [1, 0], [head], [true, 3]]
        center: neck
        symmetric: [[2, 3], [3, 0]]
        """
    )
    with pytest.raises(DataError) as caught:
        get_layout(str(path))
    problems = {problem.where.removeprefix(str(path)): problem for problem in caught.value.problems}
    assert all(problem.where.startswith(str(path)) for problem in caught.value.problems)
    assert len(caught.value.problems) == 9
    assert set(problems) == {"", *(f": edges[{i}]" for i in (0, 1, 2, 4, 5, 6)), ": symmetric[1]"}
    assert "'neck'" in problems[": edges[0]"].hint
    assert "Did you mean 'centre'?" in str(caught.value)
    assert "no centre" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"name": ""}, "a text"),
        ({"name": 7}, "a text"),
        ({"joints": []}, "a list of 1 to 1024 names"),
        ({"joints": [f"joint {j}" for j in range(1025)]}, "got 1025 of them"),
        ({"joints": "head"}, "a list of 1 to 1024 names"),
        ({"joints": ["head", "neck", "head", "right_hand"]}, "joints\\[2\\].*occurs once"),
        ({"joints": ["head", "neck", True, "right_hand"]}, "joints\\[2\\].*got True"),
        ({"edges": "head-neck"}, "a list of pairs"),
        ({"edges": [["head", "neck"], ["neck", "left_hand"]]}, "no way from right_hand"),
        ({"centre": "nek"}, "centre.*Did you mean 'neck'"),
        ({"centre": -1}, "index from 0 to 3"),
        ({"centre": 1.0}, "index from 0 to 3"),
        ({"bones": [[0, 1], [2, 1]]}, "no way from right_hand"),
        ({"bones": [[0, 1], [2, 1], [1, 3]]}, "neck as a child"),
        ({"bones": [[0, 1], [2, 1], [3, 1], [3, 0]]}, "a second parent of right_hand"),
        ({"bones": [[0, 1], [2, 3], [3, 2]]}, "occurs once"),
        ({"symmetric": [[2, 3], [0, 2]]}, "left_hand again"),
        ({"symmetric": [[2, 2]]}, "two different joints"),
        ({"fps": 30}, "the key 'fps'"),
    ],
)
def test_wrong_layouts_are_refused(changes: dict[str, Any], text: str) -> None:
    Layout.from_dict(describe_person())
    with pytest.raises(DataError, match=text):
        Layout.from_dict(describe_person(**changes))


@pytest.mark.parametrize("data", [None, [], "person", 3])
def test_what_is_no_mapping_is_refused(data: object) -> None:
    (problem,) = find_problems(data)
    assert problem.expected.startswith("a mapping")


def test_construction_checks_too() -> None:
    with pytest.raises(DataError, match="no way from d"):
        replace(CHAIN, bones=CHAIN.bones[:-1])
    with pytest.raises(DataError, match="centre"):
        replace(CHAIN, centre=4)
    with pytest.raises(DataError, match=r"edges\[3\].*occurs once"):
        replace(CHAIN, edges=(*CHAIN.edges, (1, 0)))


def test_very_many_problems_are_cut_off() -> None:
    assert len(find_problems(describe_person(edges=[["nobody", "nowhere"]] * 100_000))) == 20


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("joints: [", "a YAML file"),
        ("!!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("a: &a [x, x]\nb: [*a, *a]", "an alias"),
        ("a: &a {x: 1}\n<<: *a", "an alias"),
        ("[" * 5000, "a YAML file"),
        ("name: \x00", "a YAML file"),
        ("name: 2026-99-99", "a YAML file"),
        ("? [a, b]\n: 1\n", "the key|a YAML file"),
        ("", "a mapping"),
        ("- name", "a mapping"),
        ("#" * (MAX_FILE_BYTES + 1), "a larger file"),
    ],
)
def test_strange_files_are_refused(tmp_path: Path, content: str, text: str) -> None:
    path = tmp_path / "layout.yaml"
    path.write_bytes(content.encode())
    with pytest.raises(DataError, match=text) as caught:
        get_layout(str(path))
    assert all(problem.where.startswith(str(path)) for problem in caught.value.problems)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    for name in ("missing.yaml", "folder.yaml"):
        with pytest.raises(DataError, match=f"{name}: got no such file"):
            get_layout(str(tmp_path / name))


def test_skeleton_needs_no_torch() -> None:
    code = "import sys, kinegraph.skeleton.graph, kinegraph.models; sys.exit(bool({'torch', 'yaml'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
