"""A recipe that turns people about the vertical says so where the vertical is another axis."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kinegraph.actions import train
from kinegraph.data.missing import find_real
from kinegraph.data.pipeline import InputPipeline
from kinegraph.data.upright import find_tilts, find_upright_axis
from kinegraph.recipes import find_recipe
from kinegraph.skeleton.layouts import Layout, get_layout
from kinegraph.spec_input import AugmentSpec
from small_runs import LAYOUT, make_spec, write_small_data

KINECT = get_layout("kinect_v1")
WIDE = AugmentSpec(rotation_x=20.0, rotation_y=180.0, rotation_z=10.0)


def make_people(axis: int, layout: Layout = KINECT) -> np.ndarray:
    """Standing bodies (4, 3, 5, V, 1), three metres away: heads up along an axis, a tenth of it aslant."""
    rng = np.random.default_rng(axis)
    clips = rng.normal(0, 0.05, (4, 3, 5, layout.num_joints, 1)).astype(np.float32)
    clips[:, (axis + 1) % 3] += 3.0
    for joint, name in enumerate(layout.joints):
        height = 0.6 * any(word in name for word in ("shoulder", "neck", "head")) - 0.8 * ("foot" in name)
        clips[:, axis, :, joint] += height
    return clips


def save(folder: Path, clips: np.ndarray) -> str:
    np.save(folder / "clips.npy", clips)
    return str(folder / "clips.npy")


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("sign", [1, -1])
def test_people_stand_along_their_trunks(axis: int, sign: int) -> None:
    assert find_upright_axis(find_real(sign * make_people(axis), 3), KINECT) == axis


def test_missing_joints_do_not_lean_a_body() -> None:
    clips = make_people(1)
    # Without hips a trunk would go from the camera to the shoulders
    clips[:3, :, :, [joint for joint, name in enumerate(KINECT.joints) if "hip" in name]] = 0
    assert find_upright_axis(find_real(clips, 3), KINECT) == 1
    clips[3:] = 0
    assert find_upright_axis(find_real(clips, 3), KINECT) == -1


def test_mixed_directions_and_bodies_without_trunk_say_nothing() -> None:
    mixed = np.concatenate([make_people(0), make_people(1), make_people(2)])
    assert find_upright_axis(find_real(mixed, 3), KINECT) == -1
    hand = get_layout("mediapipe_hand")
    assert find_upright_axis(find_real(make_people(1, hand), 3), hand) == -1


@pytest.mark.parametrize("name", ["nw_ucla", "utkinect"])
def test_real_people_stand_along_y(shared: Path, name: str) -> None:
    path = shared / "data" / f"{name}.npz"
    if not path.is_file():
        pytest.skip("the recordings are not here")
    with np.load(path) as file:
        frames = file["frames"][::20].astype(np.float32)  # one clip of frames of many people
    assert find_upright_axis(find_real(frames.transpose(2, 0, 1)[None, ..., None], 3), KINECT) == 1


def test_the_wide_turn_belongs_to_the_axis_people_stand_along(tmp_path: Path) -> None:
    pipeline = InputPipeline(3, KINECT.num_joints)
    assert find_tilts(WIDE, pipeline, KINECT, save(tmp_path, make_people(1))) == []
    path = save(tmp_path, make_people(2))
    (told,) = find_tilts(WIDE, pipeline, KINECT, path)
    assert "augment.rotation_y=10 augment.rotation_z=180" in told and "along z" in told and path in told
    exchanged = AugmentSpec(rotation_x=20.0, rotation_y=10.0, rotation_z=180.0)
    assert find_tilts(exchanged, pipeline, KINECT, path) == []
    assert find_tilts(AugmentSpec(rotation_y=45.0), pipeline, KINECT, path) == []


def test_coordinates_of_a_picture_have_no_such_turns(tmp_path: Path) -> None:
    pipeline = InputPipeline(2, KINECT.num_joints)
    assert find_tilts(WIDE, pipeline, KINECT, save(tmp_path, make_people(0)[:, :2])) == []


def test_the_default_recipe_is_checked_at_training(tmp_path: Path) -> None:
    assert find_recipe("small").values["augment.rotation_y"] > 60
    write_small_data(tmp_path)
    path = tmp_path / "train_data.npy"
    spec = make_spec(tmp_path, num_epochs=1) | {"augment": {"rotation_y": 180.0}}
    for axis in (1, 2):
        np.save(path, make_people(axis, get_layout(LAYOUT))[np.arange(13) % 4])
        train(spec | {"results_dir": str(tmp_path / str(axis))})
    said = [(tmp_path / str(axis) / "train/log.txt").read_text() for axis in (1, 2)]
    assert "upside down" not in said[0] and "they stand along z" in said[1]
