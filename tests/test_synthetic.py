"""The motion generator: physical facts on noise-free skeletons, the camera and detector, files and recordings."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kinegraph.data.convert import plan_windows
from kinegraph.data.formats import read_deepstream
from kinegraph.data.synthetic import (
    CLASS_NAMES,
    SyntheticClips,
    SyntheticSkeletons,
    make_clips,
    make_recording,
    make_skeletons,
    write_dataset,
)
from kinegraph.data.synthetic_actions import perform_sequence
from kinegraph.data.synthetic_body import (
    LEFT_RIGHT,
    MAX_STATURE_MM,
    MIN_STATURE_MM,
    NUM_JOINTS,
    PARENTS,
    draw_body,
    orient,
    pose_body,
)
from kinegraph.data.synthetic_motion import draw_style, ease, jump, walk
from kinegraph.errors import DataError
from kinegraph.skeleton.layouts import get_layout

NUM_CLIPS = 360
LAYOUT = get_layout("nvidia")
JOINT = {name: index for index, name in enumerate(LAYOUT.joints)}
FEET = [JOINT[f"{side}_{part}"] for side in ("left", "right") for part in ("big_toe", "small_toe", "heel")]
# The spine bends between hip and shoulder: the only links of the layout that are no bones of the generator's body.
SPINE = {(JOINT["left_hip"], JOINT["left_shoulder"]), (JOINT["right_hip"], JOINT["right_shoulder"])}


@pytest.fixture(scope="module")
def skeletons() -> SyntheticSkeletons:
    return make_skeletons(NUM_CLIPS, seed=11)


@pytest.fixture(scope="module")
def clips() -> SyntheticClips:
    return make_clips(NUM_CLIPS, seed=11)


def select(skeletons: SyntheticSkeletons, name: str) -> np.ndarray:
    """The joints (n, T, 34, 3) of the clips of a class."""
    chosen = skeletons.joints[skeletons.labels == CLASS_NAMES.index(name)]
    assert len(chosen) == NUM_CLIPS // len(CLASS_NAMES)
    return chosen


def measure_thigh_slope(joints: np.ndarray) -> np.ndarray:
    """Sine of the angle (..., 2) of the thighs below the horizontal: 1 hanging, 0 level."""
    hip, knee = joints[..., [1, 2], :], joints[..., [4, 5], :]
    return (hip[..., 1] - knee[..., 1]) / np.linalg.norm(hip - knee, axis=-1)


def test_classes_are_in_label_order_and_equally_frequent(skeletons: SyntheticSkeletons) -> None:
    assert CLASS_NAMES == ("sitting_down", "getting_up", "sitting", "standing", "walking", "jumping")
    assert np.bincount(skeletons.labels).tolist() == [NUM_CLIPS // 6] * 6


def test_same_seed_gives_the_same_bits_and_a_longer_set_begins_with_the_shorter() -> None:
    first, again, longer = make_clips(20, 5), make_clips(20, 5), make_clips(31, 5)
    assert first.data.tobytes() == again.data.tobytes() == longer.data[:20].tobytes()
    assert first.names == again.names == longer.names[:20]
    assert first.labels.tolist() == longer.labels[:20].tolist()


def test_another_seed_gives_other_people() -> None:
    first, second = make_skeletons(48, 1), make_skeletons(48, 2)
    assert len(set(first.statures)) == len(set(second.statures)) == 4
    assert not set(first.statures) & set(second.statures)
    assert not np.array_equal(make_clips(6, 1).data, make_clips(6, 2).data)


@pytest.mark.parametrize(("num_frames", "fps"), [(30, 15.0), (20, 10.0), (16, 8.0), (64, 30.0)])
def test_shapes_and_types(num_frames: int, fps: float) -> None:
    clips = make_clips(14, 3, num_frames, fps)
    assert clips.data.shape == (14, 3, num_frames, NUM_JOINTS, 1)
    assert clips.data.dtype == np.float32
    assert np.isfinite(clips.data).all()
    assert clips.labels.dtype == np.int64
    assert len(set(clips.names)) == 14
    assert clips.subjects.tolist() == [0] * 12 + [1] * 2
    assert all(name.endswith(CLASS_NAMES[label]) for name, label in zip(clips.names, clips.labels, strict=True))


def test_skeleton_agrees_with_the_layout() -> None:
    assert LAYOUT.num_joints == NUM_JOINTS
    assert set(LAYOUT.symmetric) == set(LEFT_RIGHT)
    links = {tuple(sorted(edge)) for edge in LAYOUT.edges} - SPINE
    assert links == {tuple(sorted((joint, int(parent)))) for joint, parent in enumerate(PARENTS) if parent >= 0}


def test_bones_keep_their_length_and_sides_are_equal(skeletons: SyntheticSkeletons) -> None:
    joints = skeletons.joints
    lengths = np.linalg.norm(joints[:, :, 1:] - joints[:, :, PARENTS[1:]], axis=-1)  # (N, T, V - 1)
    assert lengths.shape == (NUM_CLIPS, 30, NUM_JOINTS - 1)
    assert np.ptp(lengths, axis=1).max() < 1e-6
    assert lengths.min() > 10.0
    assert len(LAYOUT.symmetric) == 15
    for left, right in LAYOUT.symmetric:
        assert np.abs(lengths[:, 0, left - 1] - lengths[:, 0, right - 1]).max() < 1e-6


def test_proportions_are_those_of_people(skeletons: SyntheticSkeletons) -> None:
    stature = skeletons.statures
    assert ((stature >= MIN_STATURE_MM) & (stature <= MAX_STATURE_MM)).all()
    assert stature.std() > 40.0
    first = skeletons.joints[:, 0]

    def measure(start: str, end: str) -> np.ndarray:
        return np.linalg.norm(first[:, JOINT[start]] - first[:, JOINT[end]], axis=1) / stature

    thigh, shank = measure("left_hip", "left_knee"), measure("left_knee", "left_ankle")
    assert (np.abs(thigh + shank - 0.49) < 0.06).all()
    assert (np.abs(thigh / shank - 1.0) < 0.15).all()
    assert abs(measure("left_shoulder", "left_elbow").mean() - 0.186) < 0.01
    assert abs(measure("left_elbow", "left_wrist").mean() - 0.146) < 0.01
    assert abs(measure("left_shoulder", "right_shoulder").mean() - 0.258) < 0.015
    assert abs(measure("left_heel", "left_big_toe").mean() - 0.152) < 0.015


def test_standing_people_are_as_tall_as_they_should_be(skeletons: SyntheticSkeletons) -> None:
    """Eyes stand 0.936 of the stature above the floor; a bow, a bent knee or a lowered head takes some of it away."""
    standing = skeletons.labels == CLASS_NAMES.index("standing")
    eyes = skeletons.joints[standing][:, :, JOINT["left_eye"], 1] / skeletons.statures[standing, None]
    assert abs(np.median(eyes) - 0.936) < 0.03
    assert eyes.max() < 1.02


def test_left_is_left_and_knees_bend_forward(skeletons: SyntheticSkeletons) -> None:
    joints = skeletons.joints
    assert (joints[:, :, 1, 0] > joints[:, :, 2, 0]).all()
    hip, knee, ankle = joints[:, :, [1, 2]], joints[:, :, [4, 5]], joints[:, :, [7, 8]]
    middle = 0.5 * (hip + ankle)
    toes = joints[:, :, [9, 10]] - joints[:, :, [13, 14]]
    # Not behind the line from hip to ankle: on the side of the toes, or on the line where the leg is straight.
    assert (((knee - middle) * toes)[..., [0, 2]].sum(axis=-1) > -0.06 * 250.0**2).mean() > 0.999
    upper, lower = knee - hip, ankle - knee
    bend = np.cross(upper, lower)[..., 0]  # about the axis to the left: positive folds the shank backward
    assert bend.min() > -1e-6 * 400.0**2


def test_sitting_down_lowers_the_pelvis_and_getting_up_raises_it(skeletons: SyntheticSkeletons) -> None:
    for name, sign in (("sitting_down", -1.0), ("getting_up", 1.0)):
        joints = select(skeletons, name)
        rise = sign * (joints[:, -1, 0, 1] - joints[:, 0, 0, 1])
        assert rise.min() > 50.0
        assert np.median(rise) > 250.0
        slope = sign * (measure_thigh_slope(joints[:, -1]) - measure_thigh_slope(joints[:, 0])).mean(axis=-1)
        assert slope.min() > 0.05


def test_sitting_and_standing_keep_the_pelvis_where_it_is(skeletons: SyntheticSkeletons) -> None:
    sitting, standing = select(skeletons, "sitting"), select(skeletons, "standing")
    for joints in (sitting, standing):
        assert np.ptp(joints[:, :, 0, 1], axis=1).max() < 90.0
        assert np.ptp(joints[:, :, 0, 0], axis=1).max() < 150.0
    assert np.abs(measure_thigh_slope(sitting)).max() < 0.55
    assert np.abs(np.median(measure_thigh_slope(sitting))) < 0.25
    assert measure_thigh_slope(standing).min() > 0.7  # a lifted foot
    assert np.median(measure_thigh_slope(standing)) > 0.97


def test_feet_stay_on_the_floor_and_nobody_sinks_into_it(skeletons: SyntheticSkeletons) -> None:
    assert skeletons.joints[..., 1].min() > -25.0
    for name in ("sitting_down", "getting_up"):
        feet = select(skeletons, name)[:, :, FEET]
        assert feet[..., 1].max() < 40.0
        assert np.ptp(feet, axis=1).max() < 30.0
    for name in ("sitting_down", "getting_up", "standing", "sitting"):
        ankles = select(skeletons, name)[:, :, [7, 8]]
        feet = select(skeletons, name)[:, :, [[9, 11, 13], [10, 12, 14]]]
        assert (feet[..., 1].min(axis=-1) < ankles[..., 1]).all()


def test_jumping_takes_both_feet_off_the_floor_for_as_long_as_gravity_allows(skeletons: SyntheticSkeletons) -> None:
    lowest = select(skeletons, "jumping")[:, :, FEET, 1].min(axis=2)  # (n, T)
    on_floor = np.median(skeletons.joints[skeletons.labels == 3][:, :, FEET, 1])
    assert (lowest.max(axis=1) > on_floor + 12.0).all()
    for name in ("sitting_down", "getting_up", "sitting", "standing", "walking"):
        others = select(skeletons, name)[:, :, FEET, 1].min(axis=2)
        assert others.max() < on_floor + 45.0, name


def test_a_jump_falls_with_gravity() -> None:
    rng = np.random.Generator(np.random.PCG64(4))
    times, height = np.arange(400) / 200.0, 300.0
    motion = jump(draw_body(rng), draw_style(rng), rng, times, [1.0], height, crouch=200.0)
    half = np.sqrt(2.0 * height / 9810.0)
    flying = np.abs(times - 1.0) < half - 0.02
    pelvis = motion.pelvis[flying, 1]
    fall = -0.5 * 9810.0 * (times[flying] - 1.0) ** 2
    assert flying.sum() > 80
    assert np.abs(pelvis - pelvis.max() - fall).max() < 8.0  # sway of the hips over the feet moves it by millimetres


def test_walking_alternates_the_ankles_and_swings_the_arms_against_them(skeletons: SyntheticSkeletons) -> None:
    joints = select(skeletons, "walking")
    apart = joints[:, :, 7, 2] - joints[:, :, 8, 2]
    fast = (joints[:, -1, 0, 2] - joints[:, 0, 0, 2]) > 1600.0
    assert fast.sum() >= 15
    crossings = (np.diff(np.sign(apart), axis=1) != 0).sum(axis=1)
    assert crossings[fast].min() >= 2
    assert (np.ptp(apart, axis=1)[fast] > 400.0).all()
    arms = joints[:, :, 22, 2] - joints[:, :, 23, 2]
    arms = arms - arms.mean(axis=1, keepdims=True)
    assert ((arms * apart).mean(axis=1)[fast] < 0.0).mean() > 0.85
    assert (joints[:, -1, 0, 2] - joints[:, 0, 0, 2]).min() > 100.0


def test_a_walking_foot_does_not_slide() -> None:
    rng = np.random.Generator(np.random.PCG64(8))
    body, style, times = draw_body(rng), draw_style(rng), np.arange(300) / 100.0
    motion = walk(body, style, rng, times, np.ones(300), speed=1200.0)
    joints = pose_body(body, motion)
    joints[..., 2] += motion.travel[:, None]
    flat = (np.abs(motion.foot[..., 0]) < 1e-9) & (np.abs(motion.ankle[..., 1] - body.ankle_height) < 1e-6)
    speed = np.abs(np.diff(joints[:, [7, 8]], axis=0)[..., 2]) * 100.0
    still = flat[1:] & flat[:-1]
    assert still.sum() > 100
    assert speed[still].max() < 40.0  # mm/s; the hips pass at 1200


def test_a_leg_out_of_reach_stays_whole() -> None:
    rng = np.random.Generator(np.random.PCG64(3))
    body = draw_body(rng)
    motion = walk(body, draw_style(rng), rng, np.arange(10) / 15.0, np.ones(10), 1000.0)
    motion.ankle[:, 0, 2] += 5000.0
    motion.ankle[:, 1] = motion.pelvis - (1.0, 0.0, 0.0)
    joints = pose_body(body, motion)
    assert np.isfinite(joints).all()
    lengths = np.linalg.norm(joints[:, 1:] - joints[:, PARENTS[1:]], axis=-1)
    assert np.ptp(lengths, axis=0).max() < 1e-6


@given(st.lists(st.floats(-10.0, 10.0), min_size=3, max_size=3))
@settings(max_examples=50, deadline=None)
def test_orient_is_the_product_of_three_rotations(angles: list[float]) -> None:
    def rotate(axis: int, angle: float) -> np.ndarray:
        matrix, (i, j) = np.eye(3), ((1, 2), (2, 0), (0, 1))[axis]
        matrix[i, i] = matrix[j, j] = np.cos(angle)
        matrix[i, j], matrix[j, i] = -np.sin(angle), np.sin(angle)
        return matrix

    pitch, yaw, roll = angles
    assert np.allclose(orient(np.array(angles)), rotate(1, yaw) @ rotate(0, pitch) @ rotate(2, roll), atol=1e-12)


def test_ease_is_the_minimum_jerk_curve() -> None:
    x = np.linspace(0.0, 1.0, 11)
    np.testing.assert_allclose(ease(x), 10 * x**3 - 15 * x**4 + 6 * x**5, atol=1e-12)
    assert ease(np.array([-3.0, 7.0])).tolist() == [0.0, 1.0]


def test_joint_zero_is_the_origin_and_missing_joints_are_zeros(clips: SyntheticClips) -> None:
    assert (clips.data[:, :, :, 0] == 0.0).all()
    missing = (clips.data[..., 0] == 0.0).all(axis=1)[:, :, 1:]
    assert 0.01 < missing.mean() < 0.15
    some = (clips.data[:, :, :, 1:, 0] == 0.0).any(axis=1)
    assert (some == missing).all()
    assert missing.all(axis=1).any(), "no limb is hidden for a whole clip"


def test_clips_show_the_skeletons_at_their_size(skeletons: SyntheticSkeletons, clips: SyntheticClips) -> None:
    """Distances from joint 0, times the focal length, are those of the body up to noise and the stretch of depth."""
    wanted = np.linalg.norm(skeletons.joints - skeletons.joints[:, :, :1], axis=-1)
    seen = np.linalg.norm(clips.data[..., 0] * 1200.0, axis=1)
    there = (seen > 0.0) & (wanted > 300.0)
    assert there.sum() > 100_000
    assert abs(np.median((seen - wanted)[there])) < 10.0
    assert np.quantile(np.abs(seen - wanted)[there], 0.9) < 100.0


def test_upright_people_stand_upright_in_the_picture(clips: SyntheticClips) -> None:
    """Camera y points down: the neck is above the pelvis (smaller y), the ankles below it."""
    standing = clips.data[clips.labels == 3][..., 0]
    assert np.median(standing[:, 1, :, JOINT["neck"]]) < -0.25
    assert np.median(standing[:, 1, :, JOINT["left_ankle"]]) > 0.4


def test_depth_is_noisier_than_the_picture_plane(clips: SyntheticClips) -> None:
    """In still classes the second difference over time is mostly the detector's noise."""
    still = clips.data[np.isin(clips.labels, [2, 3])][..., 0]
    seen = (still != 0.0).all(axis=1)
    there = seen[:, 2:] & seen[:, 1:-1] & seen[:, :-2]
    second = np.diff(still, n=2, axis=2)
    spread = [np.median(np.abs(second[:, channel][there])) for channel in range(3)]
    assert 1.5 < spread[2] / spread[0] < 3.5
    assert 0.7 < spread[1] / spread[0] < 1.4


def test_write_dataset(tmp_path: Path) -> None:
    paths = write_dataset(tmp_path / "data", num_train=18, num_val=6, num_test=12, seed=4)
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == sorted(
        f"{split}_{part}" for split in ("train", "val", "test") for part in ("data.npy", "label.pkl")
    )
    arrays = {}
    for split, count in (("train", 18), ("val", 6), ("test", 12)):
        arrays[split] = np.load(paths[f"{split}_data"], allow_pickle=False)
        assert arrays[split].shape == (count, 3, 30, NUM_JOINTS, 1)
        assert arrays[split].dtype == np.float32
        names, labels = pickle.loads(paths[f"{split}_label"].read_bytes())
        assert [type(names), type(labels), {*map(type, names)}, {*map(type, labels)}] == [list, list, {str}, {int}]
        assert len(set(names)) == len(labels) == count
        assert all(name.startswith(f"{split}_") for name in names)
        assert sorted(labels) == sorted(list(range(6)) * (count // 6))
    assert not np.array_equal(arrays["train"][:6], arrays["val"])
    assert not np.array_equal(arrays["train"][:12], arrays["test"])
    again = write_dataset(tmp_path / "again", num_train=18, num_val=6, num_test=12, seed=4)
    assert len(paths) == 6
    assert all(paths[key].read_bytes() == again[key].read_bytes() for key in paths)


@pytest.mark.parametrize(
    ("num_clips", "num_frames", "fps", "num_problems"),
    [(0, 30, 15.0, 1), (6, 5, 15.0, 1), (6, 30, 0.0, 1), (10**9, 0, 1.0, 2)],
)
def test_impossible_sizes_are_refused(num_clips: int, num_frames: int, fps: float, num_problems: int) -> None:
    with pytest.raises(DataError) as raised:
        make_clips(num_clips, 0, num_frames, fps)
    assert len(raised.value.problems) == num_problems


@pytest.mark.parametrize(("num_frames", "num_people"), [(0, 1), (10, 0), (10**7, 10)])
def test_impossible_recordings_are_refused(num_frames: int, num_people: int) -> None:
    with pytest.raises(DataError, match="make_recording"):
        make_recording(num_frames, num_people, 0)


def test_recording_is_read_with_the_frames_it_was_made_of(tmp_path: Path) -> None:
    num_frames, num_people = 240, 3
    recording = make_recording(num_frames, num_people, seed=9)
    assert recording == make_recording(num_frames, num_people, seed=9)
    assert recording != make_recording(num_frames, num_people, seed=10)
    assert len(recording) == num_frames
    counts = np.zeros(num_people, dtype=int)
    for frame, entry in enumerate(recording):
        assert entry["num_frames_in_batch"] == 1
        for batch in entry["batches"]:
            assert batch["frame_num"] == frame
            assert batch["num_obj_meta"] == len(batch["objects"]) > 0
            for item in batch["objects"]:
                counts[item["object_id"]] += 1
    assert counts.min() > 100

    path = tmp_path / "recording.json"
    path.write_text(json.dumps(recording, allow_nan=False))
    tracks = read_deepstream(path, "pose3d", NUM_JOINTS)
    assert len(tracks) == num_people
    for track, count in zip(tracks, counts, strict=True):
        assert track.positions.shape == (count, NUM_JOINTS, 3)
        windows = plan_windows(count, length=30, stride=15, shortest=10)
        assert len(windows) == sum(count - start >= 10 for start in range(0, count, 15))


def test_recorded_pixels_are_the_projection_of_recorded_points() -> None:
    recording = make_recording(40, 2, seed=3)
    objects = [item for entry in recording for batch in entry["batches"] for item in batch["objects"]]
    assert len(objects) > 40
    solid = np.array([item["pose3d"] for item in objects]).reshape(-1, NUM_JOINTS, 4)
    flat = np.array([item["pose25d"] for item in objects]).reshape(-1, NUM_JOINTS, 4)
    np.testing.assert_allclose(flat[..., 0], solid[..., 0] / solid[..., 2] * 1200.0 + 960.0, atol=2e-3)
    np.testing.assert_allclose(flat[..., 1], solid[..., 1] / solid[..., 2] * 1200.0 + 540.0, atol=2e-3)
    assert (flat[:, 0, 2] == 0.0).all()
    assert (solid[..., 2] > 1500.0).all()
    assert (flat[..., 3] == solid[..., 3]).all()
    assert ((solid[..., 3] >= 0.0) & (solid[..., 3] < 1.0)).all()
    inside = (flat[..., 0] > 0) & (flat[..., 0] < 1920) & (flat[..., 1] > 0) & (flat[..., 1] < 1080)
    assert inside.mean() > 0.9


def test_a_sequence_shows_every_action_without_a_jerk() -> None:
    seen: set[int] = set()
    for seed in range(6):
        rng = np.random.Generator(np.random.PCG64(seed))
        body, style = draw_body(rng), draw_style(rng)
        joints, labels = perform_sequence(body, style, rng, 600, 15.0, room=(500.0, 1200.0))
        assert joints.shape == (600, NUM_JOINTS, 3) and labels.shape == (600,)
        seen |= set(labels.tolist())
        lengths = np.linalg.norm(joints[:, 1:] - joints[:, PARENTS[1:]], axis=-1)
        assert np.ptp(lengths, axis=0).max() < 1e-6
        assert np.linalg.norm(np.diff(joints[:, 0], axis=0), axis=-1).max() < 260.0  # mm a frame: a jump's take-off
        assert np.abs(joints[:, 0, [0, 2]]).max() < 3500.0
    assert seen == set(range(6))
