"""Frame by frame equals offline: exactly the causal network, and the inside of the symmetric one."""

from __future__ import annotations

import io
import zipfile
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

from kinegraph import online
from kinegraph.cli import main
from kinegraph.data.pipeline import InputPipeline, build_pipeline
from kinegraph.errors import CheckpointError, DataError, UserError
from kinegraph.models import MODELS, build_model, find_network
from kinegraph.models.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from kinegraph.models.folded import INPUT, ConcatenationLayer, FoldedNetwork, SumLayer, TemporalConvolutionLayer
from kinegraph.online.numpy_steps import NumpySteps
from kinegraph.online.onnx_steps import OnnxSteps
from kinegraph.online.schedule import make_schedule
from kinegraph.skeleton.layouts import get_layout
from kinegraph.spec import ModelSpec
from kinegraph.spec_input import InputSpec

LAYOUT = get_layout("coco")
CLASSES = 4
FOLDABLE = [name for name in MODELS if hasattr(find_network(replace(ModelSpec(), model_type=name)), "fold")]
CASES = list(product(FOLDABLE, ("causal", "symmetric")))
Array = NDArray[np.float32]


def make_network(model_type: str, padding: str, dropout: float = 0.0) -> nn.Module:
    """A network whose batch normalisations and weights are far from where they start."""
    torch.manual_seed(3)
    options = replace(ModelSpec(), model_type=model_type, temporal_padding=padding, dropout=dropout)
    model = build_model(options, LAYOUT, CLASSES)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        model.train()
        model(make_clip(2, 24))
    return model.eval()


def make_clip(clips: int, frames: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(clips, 3, frames, LAYOUT.num_joints, 1, generator=generator)


def write_model(path: Path, model_type: str, padding: str) -> nn.Module:
    model = make_network(model_type, padding)
    options = replace(ModelSpec(), model_type=model_type, temporal_padding=padding, graph_layout="coco")
    names = {name: i for i, name in enumerate("abcd")}
    pipeline = InputPipeline(3, LAYOUT.num_joints).to_dict()
    write_checkpoint(path, Checkpoint(model.state_dict(), options, LAYOUT, CLASSES, names, pipeline))
    return model


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[Path, nn.Module]]:
    folder = tmp_path_factory.mktemp("models")
    made = {}
    for model_type, padding in CASES:
        path = folder / f"{model_type}_{padding}.pth"
        made[model_type, padding] = path, write_model(path, model_type, padding)
    return made


@torch.no_grad()
def classify(model: nn.Module, clip: torch.Tensor) -> NDArray[np.float64]:
    return torch.softmax(model(clip).double(), dim=1).numpy()


def test_there_are_as_many_cases_as_expected() -> None:
    assert len(CASES) == 2 * len(FOLDABLE)
    assert {"ST-GCN", "EF-GCN", "ST-GCN++"} <= set(FOLDABLE)


@pytest.mark.parametrize("model_type", FOLDABLE)
def test_causal_network_equals_offline_after_every_frame(files: dict, model_type: str) -> None:
    path, network = files[model_type, "causal"]
    model = online.load(path, mode="step")
    clip = make_clip(2, 21)
    state = model.start(num_people=2)
    assert model.delay_frames == 0
    for frames in range(1, 22):
        probabilities, state = model.step(clip[:, :, frames - 1, :, 0].numpy(), state)
        np.testing.assert_allclose(probabilities, classify(network, clip[:, :, :frames]), atol=1e-5)


@torch.no_grad()
def compute_logits_by_position(network: nn.Module, clip: torch.Tensor) -> Array:
    """(1, C, T, V, 1) -> logits (T', classes) of each position of the last map, from the offline network."""
    features = network.forward_features(clip)[0, 0].mean(dim=2).T  # (T', C')
    head = network.fcn
    weight = head.weight.flatten(1)
    return (features @ weight.T + head.bias).numpy()


@pytest.mark.parametrize("model_type", ["ST-GCN", "EF-GCN"])
def test_symmetric_network_equals_offline_without_its_ends(files: dict, model_type: str) -> None:
    path, network = files[model_type, "symmetric"]
    model = online.load(path, mode="step")
    delay, stride = model.delay_frames, model.steps.total_stride
    assert (delay, stride) == {"ST-GCN": (76, 4), "EF-GCN": (22, 4)}[model_type]
    frames = 2 * delay + 3 * stride + 2
    clip = make_clip(1, frames)
    by_position = compute_logits_by_position(network, clip)
    state = model.start()
    # A position sees `delay` frames on either side: the first that sees no zeros at the start is at frame `delay`
    positions = [p for p in range(0, frames, stride) if p >= delay]
    for frame in range(frames):
        probabilities, state = model.step(clip[:, :, frame, :, 0].numpy(), state)
        done = [p // stride for p in positions if p + delay <= frame]
        if not done:
            assert np.isnan(probabilities).all()
            continue
        expected = torch.softmax(torch.from_numpy(by_position[done].mean(axis=0)).double(), dim=0)
        np.testing.assert_allclose(probabilities[0], expected, atol=1e-5)
    assert len(done) >= 3


def test_pooling_window_is_the_mean_of_the_last_positions(files: dict) -> None:
    path, network = files["EF-GCN", "causal"]
    model = online.load(path)
    clip = make_clip(1, 30)
    by_position = compute_logits_by_position(network, clip)
    state = model.start(pooling_frames=10)
    for frame in range(30):
        probabilities, state = model.step(clip[:, :, frame, :, 0].numpy(), state)
        last = frame // 4
        expected = torch.softmax(torch.from_numpy(by_position[max(0, last - 2) : last + 1].mean(axis=0)).double(), 0)
        np.testing.assert_allclose(probabilities[0], expected, atol=1e-5)


def test_several_frames_at_once_are_the_same(files: dict) -> None:
    model = online.load(files["EF-GCN", "causal"][0])
    clip = make_clip(2, 11)[..., 0].numpy()
    one_by_one = model.start(2)
    for frame in range(11):
        expected, one_by_one = model.step(clip[:, :, frame], one_by_one)
    probabilities, together = model.step(clip, model.start(2))
    assert (probabilities == expected).all()
    assert together.phase == one_by_one.phase == 11 % 4


def test_step_leaves_the_old_state_as_it_was(files: dict) -> None:
    model = online.load(files["ST-GCN", "causal"][0])
    clip = make_clip(1, 3)[..., 0].numpy()
    _, state = model.step(clip, model.start())
    before = {key: array.copy() for key, array in state.arrays.items()}
    first, _ = model.step(clip, state)
    again, _ = model.step(clip, state)
    assert (first == again).all()
    assert all((state.arrays[key] == array).all() for key, array in before.items())


def write_online_model(path: Path, **options: object) -> tuple[nn.Module, InputPipeline]:
    """EF-GCN with causal padding behind a pipeline with these options."""
    torch.manual_seed(4)
    pipeline = build_pipeline(replace(InputSpec(), **options), 3, LAYOUT)
    model_options = replace(ModelSpec(), model_type="EF-GCN", temporal_padding="causal", graph_layout="coco")
    model = build_model(model_options, LAYOUT, CLASSES, pipeline.output_channels)
    model.train()
    model(torch.from_numpy(pipeline(make_clip(8, 30).numpy())))
    names = {name: i for i, name in enumerate("abcd")}
    checkpoint = Checkpoint(model.state_dict(), model_options, LAYOUT, CLASSES, names, pipeline.to_dict())
    write_checkpoint(path, replace(checkpoint, num_channels=pipeline.output_channels))
    return model.eval(), pipeline


STREAMS = ["joint", "bone", "joint_motion", "bone_motion"]
PIPELINES = [
    {"streams": STREAMS, "centre": "frame", "missing": "hold", "sampling": "contiguous", "num_frames": 12},
    {"streams": ["joint_motion", "joint"], "centre": "first", "scale": "first", "align": "first"},
    {"streams": ["bone"], "scale": "frame", "frames_per_second": 15.0},
]


@pytest.mark.parametrize("options", PIPELINES, ids=["hold", "first", "frame"])
def test_pipeline_and_network_together_equal_offline(tmp_path: Path, options: dict) -> None:
    network, pipeline = write_online_model(tmp_path / "model.pth", **options)
    model = online.load(tmp_path / "model.pth", mode="step")
    assert model.frames_per_second == options.get("frames_per_second", 0.0)
    clip = make_clip(1, 25).numpy()
    clip[0, :, 5:9, 3] = 0  # a joint that is missing for a while
    clip[0, :, 0, 11] = 0  # and one from the start
    state = model.start()
    for frames in range(1, 26):
        probabilities, state = model.step(clip[:, :, frames - 1, :, 0], state)
        offline = torch.from_numpy(pipeline(clip[:, :, :frames]))
        np.testing.assert_allclose(probabilities, classify(network, offline), atol=1e-5)


@pytest.mark.parametrize("options", PIPELINES[:2], ids=["hold", "first"])
def test_exported_step_equals_the_checkpoint(tmp_path: Path, options: dict, capsys: pytest.CaptureFixture[str]) -> None:
    write_online_model(tmp_path / "model.pth", **options)
    overrides = [f"export.checkpoint={tmp_path / 'model.pth'}", "export.form=step", f"results_dir={tmp_path}"]
    assert main(["export", *overrides]) == 0
    exported = online.load(tmp_path / "model_step.onnx")
    original = online.load(tmp_path / "model.pth", mode="step")
    assert type(exported.steps) is OnnxSteps and exported.class_names == original.class_names
    clip = make_clip(2, 11)[..., 0].numpy()
    ours, theirs = original.start(2, 6), exported.start(2, 6)
    for frame in range(11):
        expected, ours = original.step(clip[:, :, frame], ours)
        probabilities, theirs = exported.step(clip[:, :, frame], theirs)
        np.testing.assert_allclose(probabilities, expected, atol=1e-5)
    back = online.state_from_bytes(theirs.to_bytes(), like=exported.start(1, 6))
    again, _ = exported.step(clip[:, :, 0], back)
    expected, _ = original.step(clip[:, :, 0], ours)
    np.testing.assert_allclose(again, expected, atol=1e-5)
    _write_with_damaged_metadata(tmp_path / "model_step.onnx", tmp_path / "damaged.onnx")
    with pytest.raises(CheckpointError, match=r"damaged metadata kinegraph\.step"):
        online.load(tmp_path / "damaged.onnx")


def _write_with_damaged_metadata(source: Path, target: Path) -> None:
    model = onnx.load(source)
    for entry in model.metadata_props:
        if entry.key == "kinegraph.step":
            entry.value = entry.value.replace('"total_stride": 4', '"total_stride": 0')
    onnx.save(model, target)


def test_pipeline_that_looks_ahead_takes_a_window(tmp_path: Path) -> None:
    network, pipeline = write_online_model(tmp_path / "model.pth", sampling="uniform", num_frames=8)
    with pytest.raises(UserError, match="looks at whole clips"):
        online.load(tmp_path / "model.pth", mode="step")
    model = online.load(tmp_path / "model.pth", window_frames=20, window_stride=1)
    clip = make_clip(1, 25)
    probabilities, _ = model.step(clip[..., 0].numpy(), model.start())
    offline = torch.from_numpy(pipeline(clip[:, :, 5:].numpy()))
    np.testing.assert_allclose(probabilities, classify(network, offline), atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("pqrst"), st.sampled_from("pqrst"), st.booleans()), min_size=1, max_size=12),
    st.sampled_from([None, 6]),
)
def test_people_in_a_pool_do_not_touch_each_other(events: list[tuple[str, str, bool]], pooling: int | None) -> None:
    """Whoever comes, waits or leaves: each person's answer is that of a state of their own."""
    model = _shared_model()
    pool = online.TrackPool(model, pooling)
    alone: dict[str, online.State] = {}
    rng = np.random.default_rng(0)
    for first, second, leaves in events:
        frames = {person: rng.normal(size=(3, LAYOUT.num_joints)).astype(np.float32) for person in (first, second)}
        answers = pool.update(frames)
        assert answers.keys() == frames.keys()
        for person, frame in frames.items():
            expected, alone[person] = model.step(frame[None], alone.get(person) or model.start(1, pooling))
            np.testing.assert_allclose(answers[person], expected[0], atol=1e-5)
        if leaves:
            pool.forget(first)
            del alone[first]
        assert len(pool) == len(alone)


_MODELS: dict[str, online.OnlineModel] = {}


def _shared_model() -> online.OnlineModel:
    if not _MODELS:
        steps = NumpySteps(make_network("EF-GCN", "causal").fold())
        description = online.model.ModelDescription(CLASSES, pipeline=InputPipeline(3, LAYOUT.num_joints))
        _MODELS["one"] = online.OnlineModel("memory", steps, description)
    return _MODELS["one"]


def test_pool_refuses_a_bad_frame_and_steps_nobody(files: dict) -> None:
    pool = online.TrackPool(online.load(files["EF-GCN", "causal"][0]))
    good = np.zeros((3, LAYOUT.num_joints), np.float32)
    pool.update({"a": good})
    for bad in (good[:2], np.full_like(good, np.nan)):
        with pytest.raises(DataError, match="b: got shape"):
            pool.update({"a": good, "b": bad})
    assert len(pool) == 1
    assert {state.phase for _, state in pool.groups.values()} == {1}


def test_state_survives_as_bytes(files: dict) -> None:
    model = online.load(files["EF-GCN", "symmetric"][0])
    clip = make_clip(2, 7)[..., 0].numpy()
    _, state = model.step(clip, model.start(2))
    back = online.state_from_bytes(state.to_bytes(), like=model.start())
    assert back.phase == state.phase
    assert all((back.arrays[key] == array).all() for key, array in state.arrays.items())
    chosen = back.select([1])
    assert chosen.num_people == 1
    joined = online.join_states([chosen, state])
    assert (joined.arrays["memory.block_0.temporal"][1:] == state.arrays["memory.block_0.temporal"]).all()


@pytest.mark.parametrize("damage", ["cut", "other", "phase", "text"])
def test_foreign_state_is_refused(files: dict, damage: str) -> None:
    model = online.load(files["EF-GCN", "causal"][0])
    other = online.load(files["ST-GCN", "causal"][0])
    content = {
        "cut": model.start().to_bytes()[:-200],
        "other": other.start().to_bytes(),
        "phase": replace(model.start(), phase=-1).to_bytes(),
        "text": b"no archive",
    }[damage]
    with pytest.raises(DataError, match="online state"):
        online.state_from_bytes(content, like=model.start())


def test_states_of_other_phases_are_not_joined(files: dict) -> None:
    model = online.load(files["EF-GCN", "causal"][0])
    _, later = model.step(np.zeros((1, 3, LAYOUT.num_joints)), model.start())
    with pytest.raises(DataError, match="phases 0 and 1"):
        online.join_states([model.start(), later])


def test_window_mode_classifies_the_last_frames(files: dict) -> None:
    path, network = files["ST-GCN", "symmetric"]
    model = online.load(path, mode="window", window_frames=8, window_stride=3)
    clip = make_clip(1, 20)
    state = model.start()
    for frame in range(20):
        probabilities, state = model.step(clip[:, :, frame, :, 0].numpy(), state)
        last = frame // 3 * 3 + 1
        np.testing.assert_allclose(probabilities, classify(network, clip[:, :, max(0, last - 8) : last]), atol=1e-5)


def test_branches_that_cannot_meet_are_left_to_a_window(files: dict) -> None:
    """The branches of ST-GCN++ reach odd numbers of frames ahead, behind a stride of 2."""
    path, network = files["ST-GCN++", "symmetric"]
    with pytest.raises(UserError, match=r"block_4.*Use mode='window'"):
        online.load(path, mode="step")
    model = online.load(path, window_frames=8, window_stride=1)
    clip = make_clip(1, 8)
    state = model.start()
    for frame in range(8):
        probabilities, state = model.step(clip[:, :, frame, :, 0].numpy(), state)
    np.testing.assert_allclose(probabilities, classify(network, clip), atol=1e-5)


@pytest.mark.parametrize("model_type", [name for name in MODELS if name not in FOLDABLE])
def test_networks_that_cannot_be_folded_take_a_window(tmp_path: Path, model_type: str) -> None:
    network = write_model(tmp_path / "model.pth", model_type, "symmetric")
    with pytest.raises(UserError, match=r"a network that sees all frames at once.*Use mode='window'"):
        online.load(tmp_path / "model.pth", mode="step")
    model = online.load(tmp_path / "model.pth", window_frames=6, window_stride=1)
    assert model.has_window
    clip = make_clip(1, 9)
    state = model.start()
    for frame in range(9):
        probabilities, state = model.step(clip[:, :, frame, :, 0].numpy(), state)
        expected = classify(network, clip[:, :, max(0, frame - 5) : frame + 1])
        np.testing.assert_allclose(probabilities, expected, atol=1e-5)


def test_a_window_takes_no_pooling(files: dict) -> None:
    path, _ = files["EF-GCN", "causal"]
    model = online.load(path, mode="window")
    assert model.has_window and not online.load(path).has_window
    with pytest.raises(UserError, match=r"pooling_frames: got 10, expected none: .*live\.pooling_frames=0"):
        model.start(pooling_frames=10)
    with pytest.raises(UserError, match="pooling_frames: got 1, expected none"):
        online.TrackPool(model, 1)


def test_wrong_frames_and_modes_are_explained(files: dict) -> None:
    model = online.load(files["EF-GCN", "causal"][0])
    with pytest.raises(DataError, match=r"frames: got shape \(1, 3, 5\), expected finite numbers \(1, 3, 17\)"):
        model.step(np.zeros((1, 3, 5)), model.start())
    with pytest.raises(DataError, match="NaN or infinity"):
        model.step(np.full((1, 3, 17), np.inf), model.start())
    with pytest.raises(UserError, match="at least 1"):
        model.start(0)
    with pytest.raises(UserError, match="one of auto, step, window"):
        online.load(files["EF-GCN", "causal"][0], mode="exact")  # type: ignore[arg-type]


def test_branches_that_cannot_meet_are_refused() -> None:
    weight = np.ones((3, 2, 2), np.float32)
    bias = np.zeros(2, np.float32)
    layers = (
        TemporalConvolutionLayer("down", (INPUT,), weight=weight[:1], bias=bias, stride=2),
        TemporalConvolutionLayer("seen", (INPUT,), weight=weight, bias=bias, stride=2),
        SumLayer("sum", ("down", "seen")),
    )
    with pytest.raises(UserError, match="layer sum"):
        make_schedule(FoldedNetwork(2, 1, layers, weight[0], bias))
    causal = make_schedule(FoldedNetwork(2, 1, layers, weight[0], bias, padding="causal"))
    assert causal.lags == {("sum", 0): 0, ("sum", 1): 0}


def test_concatenation_waits_for_its_slowest_branch() -> None:
    rng = np.random.default_rng(5)
    weight, bias = rng.normal(size=(3, 1, 1)).astype(np.float32), np.zeros(1, np.float32)
    layers = (
        TemporalConvolutionLayer("slow", (INPUT,), weight=weight, bias=bias, dilation=2),
        ConcatenationLayer("both", (INPUT, "slow")),
    )
    steps = NumpySteps(FoldedNetwork(1, 1, layers, np.eye(2, dtype=np.float32), np.zeros(2, np.float32)))
    signal = rng.normal(size=12).astype(np.float32)
    memory = steps.start(1)
    for frame in range(12):
        logits, memory = steps.step(signal[frame].reshape(1, 1, 1), 0, memory)
        if frame >= 4:
            middle = signal[frame - 4 : frame + 1 : 2] @ weight[:, 0, 0]
            np.testing.assert_allclose(logits[0], [signal[frame - 2], middle], rtol=1e-5)


def test_state_with_absurd_shapes_takes_no_memory(files: dict) -> None:
    like = online.load(files["EF-GCN", "causal"][0]).start()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**14,)})
        archive.writestr("sum.npy", header.getvalue())
    with pytest.raises(DataError, match="sum: shape"):
        online.state_from_bytes(buffer.getvalue(), like=like)
    nested = np.frombuffer(b"[" * 3000, np.uint8)
    other = io.BytesIO()
    np.savez(other, header=nested)
    with pytest.raises(DataError, match="RecursionError"):
        online.state_from_bytes(other.getvalue(), like=like)


def test_checkpoint_that_disagrees_with_its_pipeline_is_refused(tmp_path: Path) -> None:
    write_online_model(tmp_path / "model.pth", streams=["joint", "bone"])
    checkpoint = read_checkpoint(tmp_path / "model.pth")
    pipeline = build_pipeline(replace(InputSpec(), streams=["joint", "bone", "joint_motion"]), 3, LAYOUT)
    write_checkpoint(tmp_path / "other.pth", replace(checkpoint, pipeline=pipeline.to_dict()))
    with pytest.raises(CheckpointError, match="9 channels of 17 joints from the input pipeline, expected 6 of 17"):
        online.load(tmp_path / "other.pth")
