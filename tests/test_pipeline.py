from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kinegraph.data.body import Body, find_body
from kinegraph.data.missing import MaskedClips, find_real
from kinegraph.data.normalise import normalise
from kinegraph.data.pipeline import InputPipeline, build_pipeline, settle_origin
from kinegraph.data.sampling import SAMPLINGS, TimeDraws, count_draws, place_frames, read_frames, warp_time
from kinegraph.errors import DataError, SpecError, UserError
from kinegraph.skeleton.layouts import LAYOUTS, Layout
from kinegraph.spec_input import InputSpec
from reference_files import load_reference

LAYOUT = Layout.from_dict(
    {
        "name": "small",
        "joints": ["neck", "left_shoulder", "right_shoulder", "left_hip", "right_hip", "left_foot"],
        "edges": [[1, 0], [2, 0], [3, 0], [4, 0], [5, 3]],
        "centre": 0,
    }
)
NUM_JOINTS = LAYOUT.num_joints
MODES = ["none", "first", "frame"]
STREAMS = ["joint", "bone", "joint_motion", "bone_motion"]


def make_clips(seed: int, num_channels: int = 3, num_frames: int = 9, num_people: int = 2) -> np.ndarray:
    """Four clips with missing joints, lost frames, absent people, padding at the end; the last one is empty."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(4, num_channels, num_frames, NUM_JOINTS, num_people)) + 3
    x *= random.random((4, 1, num_frames, NUM_JOINTS, num_people)) < random.choice([0.5, 0.8, 1.0])
    x *= random.random((4, 1, num_frames, 1, num_people)) < random.choice([0.7, 1.0])
    for clip in range(4):
        x[clip, :, random.integers(1, num_frames + 1) :] = 0
        if random.random() < 0.3:
            x[clip, ..., random.integers(num_people)] = 0
    x[3] = 0
    return x.astype(np.float32)


@st.composite
def make_options(draw: Any, num_channels: int, causal: bool = False) -> InputSpec:
    has_score = num_channels == 4 or (num_channels == 3 and draw(st.booleans()))
    streams = draw(st.lists(st.sampled_from(STREAMS), min_size=1, max_size=4, unique=True))
    return InputSpec(
        missing=draw(st.sampled_from(["keep", "hold"] if causal else ["keep", "hold", "interpolate"])),
        score_channel=num_channels - 1 if has_score else -1,
        score_threshold=draw(st.sampled_from([0.0, 2.5])) if has_score else 0.0,
        origin_joint=draw(st.integers(-1, NUM_JOINTS - 1)),
        people_order="file" if causal else draw(st.sampled_from(["file", "presence", "motion"])),
        people="each" if causal else draw(st.sampled_from(["each", "together"])),
        centre=draw(st.sampled_from(MODES)),
        scale=draw(st.sampled_from(MODES)),
        scale_by=draw(st.sampled_from(["trunk", "bones"])),
        align=draw(st.sampled_from(["none", "first"])) if num_channels - has_score == 3 else "none",
        vertical=draw(st.sampled_from(["y", "z"])),
        sampling=draw(st.sampled_from(["none", "contiguous"] if causal else list(SAMPLINGS))),
        num_frames=draw(st.integers(1, 14)),
        test_crop=draw(st.sampled_from([0.0, 0.5, 0.95, 1.0])),
        streams=streams,
    )


@given(seed=st.integers(0, 2**32), num_channels=st.integers(2, 4), data=st.data())
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_pipeline_equals_the_plain_restatement(seed: int, num_channels: int, data: Any) -> None:
    run_clip = load_reference("input_plain").run_clip
    options = data.draw(make_options(num_channels))
    x = make_clips(seed, num_channels)
    before = x.copy()
    pipeline = build_pipeline(options, num_channels, LAYOUT)
    y = pipeline(x)
    assert np.array_equal(x, before), "the input was changed in place"
    assert y.dtype == np.float32 and y.flags.c_contiguous and y.shape[1] == pipeline.output_channels
    for clip, result in zip(x, y, strict=True):
        expected = run_clip(clip.astype(np.float64), options, find_body(LAYOUT))
        assert not result[np.isnan(expected)].any(), "what is missing is exactly zero"
        expected = np.nan_to_num(expected)
        np.testing.assert_allclose(result, expected, rtol=2e-4, atol=2e-4 * max(1, np.abs(expected).max()))
    by_torch = pipeline.run(torch.from_numpy(x))
    assert by_torch.dtype == torch.float32
    torch.testing.assert_close(by_torch, torch.from_numpy(y), rtol=1e-4, atol=1e-4 * max(1, float(np.abs(y).max())))
    assert not y[3].any(), "an empty clip stays empty"


@given(seed=st.integers(0, 2**32), num_channels=st.integers(2, 4), data=st.data())
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_frame_by_frame_equals_the_whole_clip_on_every_prefix(seed: int, num_channels: int, data: Any) -> None:
    options = data.draw(make_options(num_channels, causal=True))
    pipeline = build_pipeline(options, num_channels, LAYOUT)
    assert pipeline.is_causal
    x = make_clips(seed, num_channels, num_frames=7)
    # people of all clips side by side, as tracks: (N * M, C, T, V)
    tracks = x.transpose(0, 4, 1, 2, 3).reshape(8, num_channels, 7, NUM_JOINTS)
    state = pipeline.start(8)
    for t in range(7):
        old = {name: array.copy() for name, array in state.items()}
        given_state = state
        frames, state = pipeline.step(tracks[:, :, t], state)
        assert given_state.keys() == old.keys() and all(np.array_equal(given_state[name], old[name]) for name in old)
        whole = pipeline(x[:, :, : t + 1])[:, :, t]  # (N, C', V, M)
        assert np.array_equal(frames, whole.transpose(0, 3, 1, 2).reshape(frames.shape))
        assert frames.dtype == np.float32


def test_people_of_a_state_can_be_taken_out_and_put_together() -> None:
    options = InputSpec(centre="first", scale="first", missing="hold", streams=["joint", "bone_motion"])
    pipeline = build_pipeline(options, 3, LAYOUT)
    tracks = make_clips(5)[:3, ..., 0]  # (N, C, T, V)
    together = pipeline.start(3)
    alone = [pipeline.start(1) for _ in range(3)]
    for t in range(tracks.shape[2]):
        frames, together = pipeline.step(tracks[:, :, t], together)
        for person in range(3):
            frame, alone[person] = pipeline.step(tracks[[person], :, t], alone[person])
            assert np.array_equal(frame[0], frames[person])
    joined = {name: np.concatenate([state[name] for state in alone]) for name in together}
    assert len(joined) == 9
    for name, array in together.items():
        assert np.array_equal(joined[name], array)


def test_a_step_refuses_what_does_not_fit() -> None:
    pipeline = build_pipeline(InputSpec(centre="first"), 3, LAYOUT)
    state = pipeline.start(2)
    for shape in [(3, 3, NUM_JOINTS), (2, 2, NUM_JOINTS), (2, 3, 5), (2, 3, 1, NUM_JOINTS)]:
        with pytest.raises(DataError):
            pipeline.step(np.ones(shape), state)
    with pytest.raises(DataError, match="NaN"):
        pipeline.step(np.full((2, 3, NUM_JOINTS), np.nan), state)


def test_pipelines_that_look_ahead_say_which_step_does() -> None:
    options = InputSpec(missing="interpolate", people="together", people_order="motion", sampling="crop_resize")
    pipeline = build_pipeline(options, 3, LAYOUT)
    assert not pipeline.is_causal
    with pytest.raises(UserError) as caught:
        pipeline.start()
    named = {problem.where for problem in caught.value.problems}
    assert named == {"input.missing", "input.people", "input.people_order", "input.sampling"}
    plain = InputPipeline(3, NUM_JOINTS)
    assert plain.is_causal
    frame = make_clips(0)[:, :, 0, :, 0]
    stepped, _ = plain.step(frame, plain.start(4))
    assert np.array_equal(stepped, frame)


@given(seed=st.integers(0, 2**32), data=st.data())
@settings(max_examples=40, deadline=None)
def test_padding_and_absent_people_change_nothing(seed: int, data: Any) -> None:
    options = data.draw(make_options(3))
    pipeline = build_pipeline(options, 3, LAYOUT)
    x = make_clips(seed)
    y = pipeline(x)
    longer = np.concatenate([x, np.zeros_like(x)], axis=2)
    z = pipeline(longer)
    shorter = min(y.shape[2], z.shape[2])
    np.testing.assert_allclose(z[:, :, :shorter], y[:, :, :shorter], rtol=1e-5, atol=1e-5)
    assert not z[:, :, shorter:].any()
    more = pipeline(np.concatenate([x, np.zeros_like(x)], axis=4))
    np.testing.assert_allclose(more[..., :2], y, rtol=1e-5, atol=1e-5)
    assert not more[..., 2:].any()


@given(seed=st.integers(0, 2**32), angle=st.floats(-3, 3), size=st.floats(0.01, 100), data=st.data())
@settings(max_examples=40, deadline=None)
def test_normalised_clips_do_not_depend_on_where_they_were_recorded(
    seed: int, angle: float, size: float, data: Any
) -> None:
    mode = data.draw(st.sampled_from(["first", "frame"]))
    options = InputSpec(centre=mode, scale=mode, align="first", vertical="z", scale_by="bones")
    pipeline = build_pipeline(options, 3, LAYOUT)
    x = np.random.default_rng(seed).normal(size=(2, 3, 5, NUM_JOINTS, 1)) + 3
    x[:, 0, 0, [1, 3]] += 10  # a clear line from right to left in the first frame
    real = np.random.default_rng(seed).random((2, 1, 5, NUM_JOINTS, 1)) < 0.8
    real[:, :, 0, 1:5] = True
    turned = x.copy()
    turned[:, 0] = np.cos(angle) * x[:, 0] - np.sin(angle) * x[:, 1]
    turned[:, 1] = np.sin(angle) * x[:, 0] + np.cos(angle) * x[:, 1]
    moved = size * (turned + np.array([4.0, -7.0, 2.0])[:, None, None, None])
    first, second = pipeline(x * real), pipeline(moved * real)
    np.testing.assert_allclose(second, first, atol=2e-3 * max(1, np.abs(first).max()))


def test_a_real_joint_at_zero_is_not_missing() -> None:
    """The centre is at zero once it is subtracted: bones to it and its motion must be there."""
    x = np.zeros((1, 3, 2, NUM_JOINTS, 1), np.float32)
    x[0, :, :, :, 0] = np.random.default_rng(0).uniform(1, 2, (3, 2, NUM_JOINTS))
    options = InputSpec(centre="first", streams=["joint", "bone", "joint_motion"])
    joint, bone, motion = np.split(build_pipeline(options, 3, LAYOUT)(x), 3, axis=1)
    assert not joint[0, :, 0, 0].any()
    np.testing.assert_allclose(bone[0, :, :, 1, 0], x[0, :, :, 1, 0] - x[0, :, :, 0, 0], atol=1e-6)
    np.testing.assert_allclose(motion[0, :, 1, 0, 0], x[0, :, 1, 0, 0] - x[0, :, 0, 0, 0], atol=1e-6)


def test_coordinates_relative_to_the_centre(tmp_path: Path) -> None:
    x = np.random.default_rng(0).uniform(-1, 2, (1, 3, 4, NUM_JOINTS, 1)).astype(np.float32)
    x[:, :, :, 0] = 0
    x[:, :, 3] = 0
    path = str(tmp_path / "clips.npy")
    np.save(path, x)
    pipeline = build_pipeline(InputSpec(centre="first"), 3, LAYOUT)
    settled = settle_origin(pipeline, path)
    assert settled == build_pipeline(InputSpec(centre="first", origin_joint=0), 3, LAYOUT)
    assert np.array_equal(settled(x), x), "the centre is at zero already"
    assert not np.allclose(pipeline(x), x), "without being told, the mean of the joints stands in"
    kept = build_pipeline(InputSpec(centre="first", origin_joint=-2), 3, LAYOUT)
    assert settle_origin(kept, path) == kept and np.array_equal(kept(x), pipeline(x))
    for other in (np.abs(x), x + (x != 0) * 0 + np.eye(NUM_JOINTS, dtype=np.float32)[0, :, None]):
        np.save(path, other)  # as in an image, all positive: the centre was not found; or it is there
        assert settle_origin(pipeline, path) == kept
    plain = InputPipeline(3, NUM_JOINTS)
    assert settle_origin(plain, path) is plain


def make_draws(
    options: InputSpec, num_clips: int, seed: int = 0, speed: float = 1.0, pace: Sequence[float] = (1.0, 1.0)
) -> TimeDraws:
    places = np.random.default_rng(seed).random((num_clips, count_draws(options)))
    return TimeDraws(places, np.full(num_clips, speed), np.tile(pace, (num_clips, 1)))


@given(
    sampling=st.sampled_from(list(SAMPLINGS)),
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    num_frames=st.integers(1, 30),
    seed=st.integers(0, 99),
    speed=st.floats(0.3, 3),
    pace=st.lists(st.floats(0.1, 10), min_size=2, max_size=6),
)
@settings(max_examples=150, deadline=None)
def test_random_places_lie_in_the_clip_and_in_order(
    sampling: str, lengths: list[int], num_frames: int, seed: int, speed: float, pace: list[float]
) -> None:
    options = InputSpec(sampling=sampling, num_frames=num_frames)
    draws = make_draws(options, len(lengths), seed, speed, pace)
    positions, is_inside = place_frames(np.array(lengths), 40, options, draws)
    assert positions.shape == is_inside.shape == (len(lengths), 40 if sampling == "none" else num_frames)
    for row, inside, length in zip(positions, is_inside, lengths, strict=True):
        assert inside.any() == (length > 0)
        used = row[inside]
        assert not length or (used.min() >= 0 and used.max() <= length - 1)
        assert (np.diff(used) >= -1e-9).all(), "time runs backwards"
        if sampling in ("uniform", "crop_resize") and length:
            assert inside.all()
        if sampling == "uniform" and len(set(pace)) == 1 and length:
            segments = np.floor((np.arange(num_frames)) * length / num_frames)
            assert (used == np.floor(used)).all()
            assert (used >= segments - 1e-9).all()


def test_uniform_sampling_takes_one_frame_of_each_segment() -> None:
    options = InputSpec(sampling="uniform", num_frames=4)
    lengths = np.array([12, 12, 4, 2])
    positions, _ = place_frames(lengths, 12, options)
    assert positions.tolist() == [[1, 4, 7, 10], [1, 4, 7, 10], [0, 1, 2, 3], [0, 0, 1, 1]]
    seen = set()
    for seed in range(60):
        positions, _ = place_frames(lengths, 12, options, make_draws(options, 4, seed))
        assert (positions[0] // 3).tolist() == [0, 1, 2, 3]
        seen |= set(positions[0].tolist())
    assert seen == set(range(12))


def test_random_crops_have_every_length_and_place() -> None:
    options = InputSpec(sampling="crop_resize", num_frames=5, smallest_crop=0.5)
    lengths = np.full(3000, 20)
    positions, _ = place_frames(lengths, 20, options, make_draws(options, 3000))
    # five frames in the middles of five equal pieces: the part follows from the distance between them
    parts = np.round((positions[:, 1] - positions[:, 0]) * 5).astype(int)
    starts = np.round(positions[:, 0] + 0.5 - parts / 10).astype(int)
    assert set(parts.tolist()) >= set(range(10, 20)) and parts.min() == 10 and parts.max() <= 20
    assert set(starts[parts == 10].tolist()) == set(range(11)) and (starts + parts).max() == 20
    short, _ = place_frames(np.array([5, 3]), 20, options, make_draws(options, 2))
    assert short[0].tolist() == [0, 1, 2, 3, 4], "never fewer frames than are asked for"
    np.testing.assert_allclose(short[1], np.clip((np.arange(5) + 0.5) * 3 / 5 - 0.5, 0, 2))


def test_contiguous_frames_keep_their_rate() -> None:
    options = InputSpec(sampling="contiguous", num_frames=6)
    lengths = np.full(400, 10)
    positions, is_inside = place_frames(lengths, 12, options, make_draws(options, 400))
    assert is_inside.all() and (np.diff(positions) == 1).all()
    assert set(positions[:, 0].tolist()) == {0, 1, 2, 3, 4}
    positions, is_inside = place_frames(np.array([4]), 12, options, make_draws(options, 1))
    assert is_inside[0].tolist() == [True] * 4 + [False] * 2 and positions[0, :4].tolist() == [0, 1, 2, 3]
    # twice as fast: ten frames are seen in five
    positions, is_inside = place_frames(np.array([10]), 12, options, make_draws(options, 1, speed=2.0))
    assert positions[0, :5].tolist() == [0, 2, 4, 6, 8] and is_inside[0].tolist() == [True] * 5 + [False]
    # half as fast: nineteen places, six of them in a row
    positions, is_inside = place_frames(np.array([10]), 12, options, make_draws(options, 1, speed=0.5))
    assert is_inside.all() and np.allclose(np.diff(positions), 0.5)


def test_a_warped_clip_keeps_its_ends_and_changes_its_speed() -> None:
    options = InputSpec()
    positions, _ = place_frames(np.array([101]), 101, options, make_draws(options, 1, pace=(3.0, 1.0)))
    steps = np.diff(positions[0])
    assert positions[0, 0] == 0 and positions[0, -1] == 100
    np.testing.assert_allclose(steps[[0, -1]], [1.495, 0.505])
    np.testing.assert_allclose(np.diff(steps), np.full(99, -0.01))


@given(pace=st.lists(st.floats(0.1, 10), min_size=2, max_size=7), scale=st.floats(0.1, 10))
@settings(max_examples=60, deadline=None)
def test_warped_time_is_the_integral_of_the_pace(pace: list[float], scale: float) -> None:
    share = np.linspace(0, 1, 4001)
    warped = warp_time(share[None], np.array([pace]))[0]
    speed = np.interp(share, np.linspace(0, 1, len(pace)), pace)
    passed = np.concatenate([[0.0], np.cumsum((speed[1:] + speed[:-1]) / 2)])
    np.testing.assert_allclose(warped, passed / passed[-1], atol=1e-4)
    np.testing.assert_allclose(warp_time(share[None], scale * np.array([pace]))[0], warped, atol=1e-12)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_frames_between_frames(kind: str) -> None:
    data = np.array([2.0, 4.0, 0.0, 8.0], np.float32).reshape(1, 1, 4, 1, 1)
    clips = find_real(data if kind == "numpy" else torch.from_numpy(data), 1)
    places = np.array([[0, 0.25, 1, 1.25, 1.5, 2.75, 3, 3]])
    inside = np.array([[True] * 7 + [False]])
    read = read_frames(clips, places, inside)
    assert np.asarray(read.data)[0, 0, :, 0, 0].tolist() == [2, 2.5, 4, 4, 0, 8, 8, 0]
    assert np.asarray(read.is_real)[0, :, 0, 0].tolist() == [True, True, True, True, False, True, True, False]


def test_people_are_ordered() -> None:
    x = np.zeros((1, 3, 6, NUM_JOINTS, 3), np.float32)
    x[0, :, 1:3, :, 0] = np.random.default_rng(0).normal(size=(3, 2, NUM_JOINTS)) * 9 + 1  # short, fast
    x[0, :, :, :, 2] = 1 + np.arange(6)[:, None] * 0.01  # long, slow
    by_presence = build_pipeline(InputSpec(people_order="presence"), 3, LAYOUT)(x)
    assert np.array_equal(by_presence, x[..., [2, 0, 1]])
    by_motion = build_pipeline(InputSpec(people_order="motion"), 3, LAYOUT)(x)
    assert np.array_equal(by_motion, x[..., [0, 2, 1]])


def test_distances_between_people_are_kept_together_and_lost_alone() -> None:
    x = np.zeros((1, 3, 3, NUM_JOINTS, 2), np.float32)
    x[..., 1] = np.random.default_rng(1).uniform(1, 2, (1, 3, 3, NUM_JOINTS))
    x[:, :, 1:, :, 0] = np.random.default_rng(2).uniform(5, 6, (1, 3, 2, NUM_JOINTS))
    together = build_pipeline(InputSpec(centre="first", people="together"), 3, LAYOUT)(x)
    real = (x != 0).all(axis=1, keepdims=True)
    expected = np.where(real, x - x[:, :, :1, :1, 1:], 0)  # person 1 is there first
    np.testing.assert_allclose(together, expected, atol=1e-6)
    alone = build_pipeline(InputSpec(centre="first"), 3, LAYOUT)(x)
    assert not alone[0, :, 1, 0, 0].any() and not alone[0, :, 0, 0, 1].any()


def test_normalising_nothing_is_nothing() -> None:
    x = make_clips(1)
    clips = find_real(x, 3)
    assert normalise(clips, 3, InputSpec(), find_body(LAYOUT)) is clips
    assert InputPipeline(3, NUM_JOINTS).run(x) is x


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_known_layout_has_a_body(name: str) -> None:
    layout = LAYOUTS[name]
    body = find_body(layout)
    assert Body.from_dict(json.loads(json.dumps(body.to_dict())), layout.num_joints, "body") == body
    if name == "mediapipe_hand":
        assert body.trunk == ((), ()) and body.across == ()
        return
    low, high = ([layout.joints[joint] for joint in end] for end in body.trunk)
    assert set(low) in ({"left_hip", "right_hip"}, {"hip_centre"}, {"pelvis"})
    assert set(high) == {"left_shoulder", "right_shoulder"}
    assert [layout.joints[left] for left, _ in body.across] == ["left_shoulder", "left_hip"]
    assert [layout.joints[right] for _, right in body.across] == ["right_shoulder", "right_hip"]


BAD_OPTIONS: list[tuple[dict[str, Any], int, str, list[str]]] = [
    ({"score_channel": 2}, 4, "coco", ["input.score_channel"]),
    ({"score_channel": 1}, 2, "coco", ["input.score_channel"]),
    ({"score_threshold": 0.5}, 3, "coco", ["input.score_threshold"]),
    ({"origin_joint": 17}, 3, "coco", ["input.origin_joint"]),
    ({"align": "first"}, 2, "coco", ["input.align"]),
    ({"align": "first", "score_channel": 2}, 3, "coco", ["input.align"]),
    ({"align": "first", "scale": "first"}, 3, "mediapipe_hand", ["input.align", "input.scale_by"]),
    ({"streams": []}, 3, "coco", ["input.streams"]),
    ({"streams": ["bone", "bone"], "origin_joint": 99}, 3, "coco", ["input.origin_joint", "input.streams"]),
]


@pytest.mark.parametrize(("values", "num_channels", "layout", "places"), BAD_OPTIONS)
def test_options_that_do_not_fit(values: dict[str, Any], num_channels: int, layout: str, places: list[str]) -> None:
    with pytest.raises(SpecError) as caught:
        build_pipeline(InputSpec(**values), num_channels, LAYOUTS[layout])
    assert [problem.where for problem in caught.value.problems] == places


def test_pipeline_casts_and_keeps_the_values() -> None:
    x = make_clips(0)
    pipeline = InputPipeline(num_channels=3, num_joints=NUM_JOINTS)
    for given_array in (x, x.astype(np.float64), np.asfortranarray(x), x[:, :, ::-1]):
        y = pipeline(given_array)
        assert y.dtype == np.float32 and y.flags.c_contiguous
        assert np.array_equal(y, given_array.astype(np.float32))
    assert pipeline(np.zeros((0, 3, 5, NUM_JOINTS, 1))).shape == (0, 3, 5, NUM_JOINTS, 1)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_no_clips_give_no_clips(sampling: str) -> None:
    options = InputSpec(
        sampling=sampling, num_frames=5, centre="frame", scale="first", align="first", missing="interpolate"
    )
    y = build_pipeline(options, 3, LAYOUT)(np.zeros((0, 3, 5, NUM_JOINTS, 1)))
    assert y.shape == (0, 3, 5, NUM_JOINTS, 1)


def test_pipeline_names_every_problem_of_the_shape() -> None:
    pipeline = InputPipeline(num_channels=3, num_joints=34)
    with pytest.raises(DataError) as caught:
        pipeline(np.zeros((1, 2, 0, 17, 1)))
    assert [problem.got.split(" in ")[0] for problem in caught.value.problems] == [
        "2 channels",
        "17 joints",
        "shape (1, 2, 0, 17, 1)",
    ]
    with pytest.raises(DataError, match="4 axes") as caught:
        pipeline(np.zeros((1, 3, 5, 34)))
    assert "numpy.newaxis" in caught.value.problems[0].hint
    with pytest.raises(DataError, match="dtype"):
        pipeline(np.full((1, 3, 5, 34, 1), "a"))


def test_pipeline_locates_nan_and_infinity() -> None:
    x = np.ones((4, 3, 5, 4, 2), np.float64)
    x[2, 1, 3, 0, 1] = np.nan
    x[3, 0, 0, 0, 0] = 1e300  # finite here, infinite as float32
    with pytest.raises(DataError) as caught:
        InputPipeline(3, 4)(x)
    assert caught.value.problems[0].got == (
        "1 NaN and 1 infinite values in 2 clips, the first at clip 2, channel 1, frame 3, joint 0, person 1"
    )


def test_a_pipeline_without_steps_is_written_as_before() -> None:
    pipeline = build_pipeline(InputSpec(), 3, LAYOUTS["nvidia"])
    assert pipeline == InputPipeline(3, 34)
    assert pipeline.to_dict() == {"version": 1, "num_channels": 3, "num_joints": 34, "steps": []}
    assert InputPipeline.from_dict(pipeline.to_dict()) == pipeline


@given(data=st.data(), num_channels=st.integers(2, 4))
@settings(max_examples=40, deadline=None)
def test_pipelines_survive_plain_data_and_pickling(data: Any, num_channels: int) -> None:
    pipeline = build_pipeline(data.draw(make_options(num_channels)), num_channels, LAYOUT)
    assert InputPipeline.from_dict(json.loads(json.dumps(pipeline.to_dict(), allow_nan=False))) == pipeline
    assert pickle.loads(pickle.dumps(pipeline)) == pipeline
    assert pipeline.output_channels == num_channels * len(pipeline.options.streams if pipeline.options else [0])


GOOD = {"version": 1, "num_channels": 3, "num_joints": 34, "steps": []}


@pytest.mark.parametrize(
    ("data", "places"),
    [
        ([], ["model.pth"]),
        ({}, ["model.pth.version"]),
        ({**GOOD, "version": 3}, ["model.pth.version"]),
        ({**GOOD, "version": True}, ["model.pth.version"]),
        ({**GOOD, "version": [1]}, ["model.pth.version"]),
        ({**GOOD, "steps": ["center"]}, ["model.pth.steps[0]"]),
        ({**GOOD, "steps": "abc"}, ["model.pth.steps"]),
        ({**GOOD, "steps": [3]}, ["model.pth.steps"]),
        ({**GOOD, "more": 1}, ["model.pth.more"]),
        (
            {"version": 1, "num_channels": 0, "num_joints": "34", "steps": []},
            ["model.pth.num_channels", "model.pth.num_joints"],
        ),
    ],
)
def test_pipeline_refuses_foreign_data(data: object, places: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        InputPipeline.from_dict(data, "model.pth")
    assert [problem.where for problem in caught.value.problems] == places


@pytest.mark.parametrize(
    ("key", "value", "place"),
    [
        ("options", None, "p.options"),
        ("options", {"num_frames": 10**12}, "p.options.num_frames"),
        ("options", {"streams": ["bones"]}, "p.options.streams.0"),
        ("options", {"centre": "last"}, "p.options.centre"),
        ("options", {"more": 1}, "p.options.more"),
        ("options", {"align": "first", "score_channel": 2}, "p.options.align"),
        ("body", None, "p.body"),
        ("body", {"centre": 6}, "p.body.centre"),
        ("body", {"centre": True}, "p.body.centre"),
        ("body", {"bones": [[1, 0]]}, "p.body.bones"),
        ("body", {"bones": [[1, 0]] * 5}, "p.body.bones"),
        ("body", {"bones": [[1, -1], [2, 0], [3, 0], [4, 0], [5, 3]]}, "p.body.bones"),
        ("body", {"trunk": [[1], []]}, "p.body.trunk"),
        ("body", {"trunk": [[1], [99]]}, "p.body.trunk"),
        ("body", {"trunk": [1, 2]}, "p.body.trunk"),
        ("body", {"across": [[1, 2, 3]]}, "p.body.across"),
        ("body", {"symmetric": [[1, 2], [2, 3]]}, "p.body.symmetric"),
        ("body", {"more": 1}, "p.body"),
        ("steps", [], "p.steps"),
    ],
)
def test_damaged_steps_are_refused(key: str, value: Any, place: str) -> None:
    data = build_pipeline(InputSpec(centre="first"), 3, LAYOUT).to_dict()
    data[key] = {**data[key], **value} if isinstance(value, dict) else value
    with pytest.raises(DataError) as caught:
        InputPipeline.from_dict(data, "p")
    assert [problem.where for problem in caught.value.problems] == [place]


def test_steps_work_without_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import numpy, json\n"
        "from kinegraph.data.pipeline import InputPipeline\n"
        "assert 'pydantic' not in sys.modules\n"
        "pipeline = InputPipeline.from_dict(json.loads(sys.argv[1]))\n"
        "x = numpy.random.default_rng(0).normal(size=(2, 3, 9, 6, 2))\n"
        "print(pipeline(x).shape, pipeline.step(x[:, :, 0, :, 0], pipeline.start(2))[0].shape)"
    )
    options = InputSpec(missing="hold", centre="first", scale="frame", align="first", streams=["bone", "bone_motion"])
    data = json.dumps(build_pipeline(options, 3, LAYOUT).to_dict())
    done = subprocess.run([sys.executable, "-c", code, data], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(2, 6, 9, 6, 2) (2, 6, 6)"


def test_every_option_of_the_input_is_stored() -> None:
    options = InputSpec(centre="first")
    stored = build_pipeline(options, 3, LAYOUT).to_dict()["options"]
    assert stored == asdict(options) and set(stored) == {field.name for field in fields(InputSpec)}


def test_values_that_overflow_are_refused() -> None:
    x = np.full((1, 3, 4, NUM_JOINTS, 1), 3e38, np.float32)
    x[0, :, :, 1] *= -1
    pipeline = build_pipeline(InputSpec(centre="first", scale="first", align="first"), 3, LAYOUT)
    with pytest.raises(DataError, match="too large"):
        pipeline(x)
    with pytest.raises(DataError, match="too large"):
        pipeline.step(x[:, :, 0, :, 0], pipeline.start(1))
    assert np.isfinite(pipeline(x / 1e22)).all()


def test_lengths_count_to_the_last_real_frame() -> None:
    x = make_clips(3)
    expected = [max((t + 1 for t in range(9) if clip[:, t].any()), default=0) for clip in x]
    assert find_real(x, 3).find_lengths().tolist() == expected
    assert find_real(torch.from_numpy(x), 3).find_lengths().tolist() == expected
    assert MaskedClips(x, np.zeros((4, 9, NUM_JOINTS, 2), bool)).find_lengths().tolist() == [0] * 4
