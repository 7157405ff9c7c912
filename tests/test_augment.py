from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kinegraph.data.augment import (
    AFFINE_DRAWS,
    DROP_DRAWS,
    TIME_DRAWS,
    add_noise,
    choose_augmentation,
    draw_time,
    drop_frames,
    drop_joints,
    find_augment_problems,
    find_mirrored,
    find_side_names,
    is_active,
    make_affine,
    mirror,
    move,
)
from kinegraph.data.counters import _mix, _mix_signed, normal_from_counters, uniform_from_counters
from kinegraph.data.missing import MaskedClips, find_real
from kinegraph.data.pipeline import InputPipeline, build_pipeline
from kinegraph.data.sampling import TimeDraws
from kinegraph.data.transforms import TrainingAugmentation
from kinegraph.errors import SpecError
from kinegraph.skeleton.layouts import LAYOUTS
from kinegraph.spec_input import AugmentSpec, InputSpec

LAYOUT = LAYOUTS["coco"]
NUM_JOINTS = LAYOUT.num_joints
ALL = AugmentSpec(
    rotation_x=20,
    rotation_y=50,
    rotation_z=10,
    scale=0.2,
    shift=0.3,
    shear=0.2,
    noise=0.05,
    joint_drop=0.3,
    frame_drop=0.2,
    speed=0.5,
    time_warp=0.5,
    mirror=0.5,
)


def make_clips(num_clips: int = 4, num_channels: int = 3, num_frames: int = 8, seed: int = 0) -> np.ndarray:
    """Clips with missing joints, padding of their own length and, in half of them, no second person."""
    random = np.random.default_rng(seed)
    x = random.uniform(1, 2, (num_clips, num_channels, num_frames, NUM_JOINTS, 2))
    x *= random.random((num_clips, 1, num_frames, NUM_JOINTS, 2)) < 0.8
    for clip in range(num_clips):
        x[clip, :, num_frames - clip % num_frames :] = 0 if clip else x[clip, :, num_frames:]
    x[1::2, ..., 1] = 0
    return x.astype(np.float32)


def as_kind(x: np.ndarray, kind: str) -> Any:
    return x if kind == "numpy" else torch.from_numpy(x.copy())


def mask(x: np.ndarray, kind: str, num_coordinates: int = 3) -> MaskedClips:
    return find_real(as_kind(x, kind), num_coordinates)


kinds = pytest.mark.parametrize("kind", ["numpy", "torch"])


def test_torch_mixes_the_same_bits() -> None:
    bits = np.random.default_rng(0).integers(0, 2**64, 10_000, dtype=np.uint64)
    bits[:3] = [0, 2**64 - 1, 2**63]
    mixed = _mix_signed(torch.from_numpy(bits.view(np.int64)))
    assert np.array_equal(mixed.numpy().view(np.uint64), _mix(bits))


@kinds
def test_normal_numbers_are_normal_and_do_not_depend_on_the_batch(kind: str) -> None:
    index = np.array([3, 8, 11])
    like = as_kind(np.zeros(1, np.float32), kind)
    drawn = normal_from_counters(1, 2, index, 20_001, 5, like)
    assert drawn.shape == (3, 20_001) and drawn.dtype == like.dtype
    values = np.asarray(drawn, np.float64)
    alone = np.asarray(normal_from_counters(1, 2, index[1:2], 20_001, 5, like))
    assert np.array_equal(alone[0], np.asarray(drawn)[1])
    for row in values:
        # Kolmogorov-Smirnov against the normal distribution, p = 0.001, and its moments at five deviations
        expected = np.array([0.5 * (1 + math.erf(value / math.sqrt(2))) for value in np.sort(row)])
        assert np.abs(expected - (np.arange(len(row)) + 0.5) / len(row)).max() < 1.95 / math.sqrt(len(row))
        assert abs(row.mean()) < 5 / math.sqrt(len(row)) and abs(row.var() - 1) < 5 * math.sqrt(2 / len(row))
    half = 10_000
    correlations = np.corrcoef([*values[:, :half], *values[:, half + 1 : 2 * half + 1]])
    assert np.abs(correlations[~np.eye(6, dtype=bool)]).max() < 5 / math.sqrt(half)
    other = np.asarray(normal_from_counters(1, 2, index, 20_001, 5, np.zeros(1, np.float32)))
    np.testing.assert_allclose(values, other, atol=1e-4)


@kinds
def test_lost_joints_equal_a_loop(kind: str) -> None:
    x = make_clips(6)
    draws = uniform_from_counters(1, 0, np.arange(6), DROP_DRAWS * NUM_JOINTS * 2, 1)
    lost = np.asarray(drop_joints(as_kind(x, kind), 0.4, draws))
    expected = x.copy()
    for clip in range(6):
        length = max((t + 1 for t in range(8) if x[clip, :, t].any()), default=0)
        table = draws[clip].reshape(DROP_DRAWS, NUM_JOINTS, 2)
        for joint in range(NUM_JOINTS):
            for person in range(2):
                whether, place, share = table[:, joint, person]
                if whether < 0.4:
                    first = int(place * length)
                    expected[clip, :, first : first + 1 + int(share * length), joint, person] = 0
    assert np.array_equal(lost, expected) and not np.array_equal(lost, x)
    assert np.array_equal(np.asarray(drop_joints(as_kind(x, kind), 0.0, draws)), x)


@kinds
def test_lost_frames_equal_a_loop_and_never_take_the_first(kind: str) -> None:
    x = make_clips(5)
    x[2, :, :3] = 0
    draws = uniform_from_counters(1, 0, np.arange(5), 8, 1)
    draws[2, 3] = 0.0
    lost = np.asarray(drop_frames(as_kind(x, kind), 0.5, draws))
    for clip in range(5):
        first = next(t for t in range(8) if x[clip, :, t].any())
        for t in range(8):
            expected = np.zeros_like(x[clip, :, t]) if draws[clip, t] < 0.5 and t != first else x[clip, :, t]
            assert np.array_equal(lost[clip, :, t], expected)


def move_point(point: list[float], augment: AugmentSpec, row: np.ndarray) -> list[float]:
    """One point, step by step, as docs/input.md tells it."""
    amount = [2 * draw - 1 for draw in row.tolist()]
    size = len(point)
    if row[15] < augment.mirror:
        point = [-point[0], *point[1:]]
    point = [value * (1 + augment.scale * amount[3 + axis]) for axis, value in enumerate(point)]
    others = [(i, j) for i in range(size) for j in range(size) if i != j]
    sheared = list(point)
    for place, (i, j) in enumerate(others):
        sheared[i] += augment.shear * amount[9 + place] * point[j]
    point = sheared
    planes = [(1, 2), (2, 0), (0, 1)]
    for axis, limit in enumerate((augment.rotation_x, augment.rotation_y, augment.rotation_z)):
        first, second = planes[axis]
        if second < size and first < size:
            angle = limit * amount[axis] * math.pi / 180
            turned = complex(point[first], point[second]) * complex(math.cos(angle), math.sin(angle))
            point = list(point)
            point[first], point[second] = turned.real, turned.imag
    return [value + augment.shift * amount[6 + axis] for axis, value in enumerate(point)]


@kinds
@pytest.mark.parametrize(("num_channels", "size"), [(3, 3), (2, 2), (3, 2), (4, 3)])
@pytest.mark.parametrize("is_centred", [True, False])
def test_moved_clips_equal_a_loop_over_points(kind: str, num_channels: int, size: int, is_centred: bool) -> None:
    augment = ALL if size == 3 else replace(ALL, rotation_x=0.0, rotation_y=0.0)
    x = make_clips(6, num_channels)
    draws = uniform_from_counters(1, 0, np.arange(6), AFFINE_DRAWS, 1)
    clips = mask(x, kind, size)
    moved = move(clips, *make_affine(augment, size, draws), is_centred)
    assert np.array_equal(np.asarray(moved.is_real), np.asarray(clips.is_real))
    mirrored = find_mirrored(augment, draws)
    assert mirrored.any() and not mirrored.all()
    expected = np.zeros_like(x, dtype=np.float64)
    for clip in range(6):
        there = [(t, v, m) for t in range(8) for v in range(NUM_JOINTS) for m in range(2) if x[clip, :, t, v, m].any()]
        first = [place for place in there if place[0] == there[0][0]]
        pivot = [0.0] * size
        if not is_centred:
            pivot = [sum(float(x[clip, c][place]) for place in first) / len(first) for c in range(size)]
        for place in there:
            values = [float(x[clip, c][place]) for c in range(num_channels)]
            point = move_point(
                [value - p for value, p in zip(values[:size], pivot, strict=False)], augment, draws[clip]
            )
            for c in range(num_channels):
                expected[clip, c][place] = point[c] + pivot[c] if c < size else values[c]
    np.testing.assert_allclose(np.asarray(moved.data), expected, atol=5e-6)
    assert not np.asarray(moved.data)[expected == 0].any()


def test_rotation_about_y_keeps_y_and_lengths() -> None:
    augment = AugmentSpec(rotation_y=60)
    draws = uniform_from_counters(1, 0, np.arange(200), AFFINE_DRAWS, 1)
    matrices, shifts = make_affine(augment, 3, draws)
    assert not shifts.any()
    np.testing.assert_allclose(matrices @ matrices.transpose(0, 2, 1), np.tile(np.eye(3), (200, 1, 1)), atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(matrices), 1)
    np.testing.assert_allclose(matrices[:, 1], np.tile([0, 1, 0], (200, 1)), atol=1e-12)
    angles = np.rad2deg(np.arctan2(matrices[:, 0, 2], matrices[:, 0, 0]))
    assert 50 < angles.max() <= 60 and -60 <= angles.min() < -50 and abs(angles.mean()) < 10


@kinds
@given(seed=st.integers(0, 1000), is_centred=st.booleans())
@settings(max_examples=20, deadline=None)
def test_mirrored_twice_is_as_before(kind: str, seed: int, is_centred: bool) -> None:
    x = make_clips(seed=seed)
    draws = np.full((4, AFFINE_DRAWS), 0.5)
    augment = AugmentSpec(mirror=1.0)

    def reflect(clips: MaskedClips) -> MaskedClips:
        clips = move(clips, *make_affine(augment, 3, draws), is_centred)
        return mirror(clips, find_mirrored(augment, draws), LAYOUT.symmetric)

    clips = mask(x, kind)
    once = reflect(clips)
    twice = reflect(once)
    np.testing.assert_allclose(np.asarray(twice.data), x, atol=1e-5)
    assert np.array_equal(np.asarray(twice.is_real), np.asarray(clips.is_real))
    left, right = LAYOUT.joints.index("left_wrist"), LAYOUT.joints.index("right_wrist")
    assert np.array_equal(np.asarray(once.is_real)[:, :, left], np.asarray(clips.is_real)[:, :, right])
    if is_centred:
        assert np.array_equal(np.asarray(once.data)[:, 0, :, left], -x[:, 0, :, right])
        assert np.array_equal(np.asarray(once.data)[:, 1:, :, left], x[:, 1:, :, right])


def test_only_chosen_clips_are_mirrored() -> None:
    x = make_clips()
    chosen = np.array([True, False, True, False])
    swapped = mirror(mask(x, "numpy"), chosen, LAYOUT.symmetric)
    order = list(range(NUM_JOINTS))
    for left, right in LAYOUT.symmetric:
        order[left], order[right] = right, left
    assert np.array_equal(swapped.data[chosen], x[chosen][:, :, :, order])
    assert np.array_equal(swapped.data[~chosen], x[~chosen])


def test_noise_is_added_to_what_is_real_only() -> None:
    x = make_clips(4, 4)
    clips = mask(x, "torch")
    normals = normal_from_counters(0, 0, np.arange(4), 3 * 8 * NUM_JOINTS * 2, 0, clips.data)
    noisy = add_noise(clips, 0.1, normals)
    difference = (noisy.data - clips.data).numpy()
    real = np.repeat(clips.is_real.numpy()[:, None], 3, axis=1)
    assert not difference[:, 3].any(), "a score is left alone"
    assert not difference[:, :3][~real].any()
    values = difference[:, :3][real]
    assert abs(values.std() - 0.1) < 0.1 * 5 / math.sqrt(2 * values.size) and abs(values.mean()) < 0.5 / math.sqrt(
        values.size
    )


def test_speeds_are_as_often_slow_as_fast() -> None:
    draws = uniform_from_counters(1, 0, np.arange(4000), TIME_DRAWS, 1)
    time = draw_time(AugmentSpec(speed=0.5, time_warp=2.0), np.zeros((4000, 1)), draws)
    assert 1.49 < time.speed.max() <= 1.5 and 1 / 1.5 <= time.speed.min() < 0.671
    assert abs((time.speed > 1).mean() - 0.5) < 0.05
    assert time.pace.shape[1] >= 3
    for pace in time.pace.T:
        assert 2.95 < pace.max() <= 3 and 1 / 3 <= pace.min() < 1 / 2.95 and abs((pace > 1).mean() - 0.5) < 0.05
    assert np.abs(np.corrcoef(time.pace.T) - np.eye(time.pace.shape[1])).max() < 0.1, "each part has its own"
    none = draw_time(AugmentSpec(), np.zeros((4000, 1)), draws)
    assert (none.speed == 1).all() and (none.pace == 1).all()


PIPELINES = {
    "plain": InputSpec(),
    "uniform": InputSpec(sampling="uniform", num_frames=5, centre="first", scale="first", missing="hold"),
    "crop": InputSpec(sampling="crop_resize", num_frames=6, streams=["joint", "bone_motion"]),
    "contiguous": InputSpec(sampling="contiguous", num_frames=6, centre="frame", align="first"),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_a_clip_gets_the_same_whatever_is_in_its_batch(name: str) -> None:
    speed = 0.0 if name in ("uniform", "crop") else 0.5
    pipeline = build_pipeline(PIPELINES[name], 3, LAYOUT)
    augment = TrainingAugmentation(
        seed=5, pipeline=pipeline, options=replace(ALL, speed=speed), symmetric=LAYOUT.symmetric
    )
    x, index = torch.from_numpy(make_clips(6)), torch.tensor([40, 7, 7000, 3, 1, 0])
    together = augment(x, index, epoch=2)
    assert together.shape[1] == pipeline.output_channels and torch.isfinite(together).all()
    order = torch.tensor([5, 2, 0])
    assert torch.equal(augment(x[order], index[order], epoch=2), together[order])
    for clip in range(6):
        torch.testing.assert_close(augment(x[clip : clip + 1], index[clip : clip + 1], 2)[0], together[clip])
    assert not torch.equal(augment(x, index, epoch=3), together)
    assert not torch.equal(replace(augment, seed=6)(x, index, epoch=2), together)


@pytest.mark.parametrize("name", PIPELINES)
def test_without_randomness_training_sees_what_inference_sees(name: str) -> None:
    pipeline = build_pipeline(PIPELINES[name], 3, LAYOUT)
    x = make_clips(4)
    seen = TrainingAugmentation(pipeline=pipeline, options=AugmentSpec())(torch.from_numpy(x), np.arange(4), 0)
    if PIPELINES[name].sampling == "none":
        np.testing.assert_allclose(seen.numpy(), pipeline(x), atol=1e-5)
        return
    places = {"uniform": 5, "crop_resize": 2, "contiguous": 1}[PIPELINES[name].sampling]
    draws = TimeDraws(uniform_from_counters(0, 0, np.arange(4), places, 3), np.ones(4), np.ones((4, 2)))
    expected = pipeline.finish(pipeline.sample(pipeline.normalise(pipeline.clean(x)), draws))
    np.testing.assert_allclose(seen.numpy(), expected, atol=1e-5)
    assert not np.array_equal(seen.numpy(), pipeline(x)[:, :, : seen.shape[2]])


@pytest.mark.parametrize("name", [field.name for field in fields(AugmentSpec) if field.name != "sides_matter"])
def test_each_option_alone_changes_clips_and_leaves_zeros(name: str) -> None:
    options = AugmentSpec(**{name: getattr(ALL, name)})
    assert is_active(options) and not is_active(AugmentSpec())
    x = make_clips(8)
    augment = TrainingAugmentation(seed=1, pipeline=InputPipeline(3, NUM_JOINTS), options=options)
    changed = augment(torch.from_numpy(x), np.arange(8), 0).numpy()
    assert not np.array_equal(changed, x)
    absent = ~x.any(axis=(1, 2, 3))  # (N, M)
    assert absent.any() and not changed.transpose(0, 4, 1, 2, 3)[absent].any()
    if name not in ("speed", "time_warp"):
        empty = ~x.any(axis=(1, 3, 4))  # (N, T)
        assert empty.any() and not changed.transpose(0, 2, 1, 3, 4)[empty].any(), "padding was moved"
    if name not in ("speed", "time_warp", "mirror"):
        missing = ~x.any(axis=1)
        assert not changed.transpose(0, 2, 3, 4, 1)[missing].any(), "missing joints were moved"


def test_moves_of_the_dataset_section_leave_no_traces_in_padding_with_steps() -> None:
    x = make_clips(6)
    pipeline = build_pipeline(InputSpec(scale="first", scale_by="bones"), 3, LAYOUT)
    augment = TrainingAugmentation(10, True, True, 1, pipeline)
    changed = augment(torch.from_numpy(x), np.arange(6), 0).numpy()
    assert changed.shape[2] == 10
    counts = (changed != 0).any(axis=1).sum(axis=(1, 2, 3))
    assert counts.tolist() == (x != 0).any(axis=1).sum(axis=(1, 2, 3)).tolist()


def test_frames_are_lost_before_the_pipeline_fills_what_is_missing() -> None:
    x = np.repeat(make_clips(1)[:, :, :1], 8, axis=2) + 0
    x[x == 0] = 1.5
    pipeline = build_pipeline(InputSpec(missing="interpolate"), 3, LAYOUT)
    augment = TrainingAugmentation(pipeline=pipeline, options=AugmentSpec(frame_drop=0.5, joint_drop=0.2), seed=3)
    changed = augment(torch.from_numpy(x), np.arange(1), 0).numpy()
    is_filled = (changed != 0).all(axis=1)[0]  # a person that stands still is filled in exactly
    last = max(t for t in range(8) if is_filled[t].any())
    assert np.allclose(
        changed[0][:, : last + 1][:, is_filled[: last + 1]], x[0][:, : last + 1][:, is_filled[: last + 1]]
    )
    assert is_filled[: last + 1].any(axis=(1, 2)).all()


@pytest.mark.parametrize(
    ("name", "is_sided"),
    [
        ("wave left hand", True),
        ("RaiseRightArm", True),
        ("turn_left", True),
        ("LEFT", True),
        ("left-handed serve", True),
        ("pick up", False),
        ("cleft", False),
        ("bright room", False),
        ("leftover", False),
        ("upright", False),
    ],
)
def test_class_names_that_name_a_side(name: str, is_sided: bool) -> None:
    assert find_side_names([name, "walk"]) == ([name] if is_sided else [])


@pytest.mark.parametrize(
    ("sides_matter", "names", "is_kept"),
    [
        ("auto", ["walk", "sit"], True),
        ("auto", ["walk", "turn left"], False),
        ("always", ["walk", "sit"], False),
        ("never", ["walk", "turn left"], True),
    ],
)
def test_mirror_images_are_left_out_where_sides_matter(sides_matter: Any, names: list[str], is_kept: bool) -> None:
    given_options = AugmentSpec(mirror=0.5, noise=0.1, sides_matter=sides_matter)
    options, told = choose_augmentation(given_options, InputPipeline(3, NUM_JOINTS), names)
    assert options.mirror == (0.5 if is_kept else 0.0) and options.noise == 0.1
    assert len(told) == (not is_kept) and given_options.mirror == 0.5
    if names[1] == "turn left" and told:
        assert "turn left" in told[0]
    unused, told = choose_augmentation(AugmentSpec(sides_matter=sides_matter), InputPipeline(3, NUM_JOINTS), names)
    assert not told and unused.mirror == 0


def test_mirror_images_without_pairs_are_told() -> None:
    hand = LAYOUTS["mediapipe_hand"]
    assert not hand.symmetric
    augment, plain = AugmentSpec(mirror=0.5), InputPipeline(3, hand.num_joints)
    options, told = choose_augmentation(augment, plain, ["wave"], hand.symmetric)
    assert options == augment
    assert told == ["augment.mirror=0.5 negates x and swaps no joints: the layout names no symmetric pairs."]
    centred = InputSpec(centre="frame")
    assert choose_augmentation(augment, build_pipeline(centred, 3, hand), ["wave"])[1] == told
    # Where joints are swapped, nothing is mirrored, or it is for another reason
    assert choose_augmentation(augment, build_pipeline(centred, 3, LAYOUT), ["wave"])[1] == []
    assert choose_augmentation(augment, plain, ["wave"], LAYOUT.symmetric)[1] == []
    assert choose_augmentation(AugmentSpec(noise=0.1), plain, ["wave"], hand.symmetric)[1] == []
    (only,) = choose_augmentation(augment, plain, ["turn left"], hand.symmetric)[1]
    assert "has no effect" in only


@pytest.mark.parametrize(("options", "num_channels"), [(InputSpec(), 2), (InputSpec(score_channel=2), 3)])
def test_2d_data_stay_in_their_plane(options: InputSpec, num_channels: int) -> None:
    augment = AugmentSpec(rotation_x=5, rotation_y=6, rotation_z=7)
    chosen, told = choose_augmentation(augment, build_pipeline(options, num_channels, LAYOUT), [])
    assert chosen == AugmentSpec(rotation_z=7)
    assert told == [
        "augment.rotation_x and augment.rotation_y: no effect, it takes 3 coordinates, and the data have 2."
    ]
    assert choose_augmentation(augment, build_pipeline(InputSpec(), 3, LAYOUT), []) == (augment, [])


@pytest.mark.parametrize(
    ("augment", "options", "num_channels", "places"),
    [
        (AugmentSpec(rotation_x=5, rotation_y=5, rotation_z=5), InputSpec(), 2, []),
        (AugmentSpec(rotation_z=5, shear=0.1), InputSpec(), 1, ["rotation_z", "shear"]),
        (AugmentSpec(scale=0.1), InputSpec(), 4, [""]),
        (AugmentSpec(scale=0.1), InputSpec(score_channel=3), 4, []),
        (AugmentSpec(speed=0.1), InputSpec(sampling="uniform"), 3, ["speed"]),
        (AugmentSpec(speed=0.1), InputSpec(sampling="contiguous"), 3, []),
        (ALL, InputSpec(), 3, []),
    ],
)
def test_options_that_the_data_cannot_have(
    augment: AugmentSpec, options: InputSpec, num_channels: int, places: list[str]
) -> None:
    pipeline = build_pipeline(options, num_channels, LAYOUT)
    problems = find_augment_problems(augment, pipeline.num_coordinates, pipeline.options)
    assert [problem.where for problem in problems] == [f"augment.{place}".strip(".") for place in places]
    if problems:
        with pytest.raises(SpecError):
            choose_augmentation(augment, pipeline, [])
