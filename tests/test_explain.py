from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from torch import Tensor, nn

from kinegraph.data.missing import find_real
from kinegraph.data.pipeline import InputPipeline, build_pipeline
from kinegraph.data.synthetic import make_skeletons
from kinegraph.errors import CheckpointError, UserError
from kinegraph.explain import (
    Explainable,
    Explainer,
    Explanations,
    choose_clips,
    find_file_frames,
    load_explainer,
    write_explanations,
)
from kinegraph.explain_picture import ExplainedClip, _draw_bars, _draw_poses, _gather_cells, _make_colors
from kinegraph.model_description import ModelDescription
from kinegraph.models import MODELS, build_model
from kinegraph.models.late_fusion import LateFusion
from kinegraph.models.layers import mean_over_real_frames, weigh_real_frames
from kinegraph.skeleton.layouts import LAYOUTS
from kinegraph.spec import ModelSpec
from kinegraph.spec_input import InputSpec
from model_files import find_model, make_clips, make_run, write_foreign

NUM_CLASSES = 4
NUM_JOINTS = 17
LAYOUT = LAYOUTS["coco"]
PNG_START = b"\x89PNG\r\n\x1a\n"


def make_network(model_type: str, channels: int = 3, **changes: Any) -> nn.Module:
    """In evaluation mode, with statistics in its batch normalisations and a head that is not near zero."""
    torch.manual_seed(2)
    options = replace(ModelSpec(), model_type=model_type, width=0.25, graph_layout="coco", **changes)
    network = build_model(options, LAYOUT, NUM_CLASSES, channels)
    with torch.no_grad():
        network.train()(torch.randn(6, channels, 12, NUM_JOINTS, 2))
        for module in network.modules():
            if isinstance(module, nn.Linear) or module is getattr(network, "fcn", None):
                module.weight.normal_(0, 1)  # type: ignore[operator,union-attr]
                module.bias.normal_(0, 1)  # type: ignore[operator,union-attr]
    return network.eval()


def make_explainer(network: nn.Module, pipeline: InputPipeline | None = None) -> Explainer:
    description = ModelDescription(NUM_CLASSES, None, LAYOUT, pipeline or InputPipeline(3, NUM_JOINTS))
    return Explainer("test", network, description)


def make_padded_clips(num_clips: int = 3, frames: int = 14) -> np.ndarray:
    """Two people; the second one leaves early and is absent in the last clip; the first clip is full."""
    x = make_clips(num_clips, frames=frames, people=2)
    x[1:, :, 9:] = 0
    x[:, :, 5:, :, 1] = 0
    x[-1, ..., 1] = 0
    return x


def split_by_gradient(network: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """Cells (N, M, T', V) without knowing how the network pools: the logit is linear in its map."""
    original: Callable[[Tensor], Tensor] = network.forward_features  # type: ignore[assignment]
    features = original(x).detach().requires_grad_()
    network.forward_features = lambda _: features
    logits = network(x)
    network.forward_features = original
    logits.gather(1, labels[:, None]).sum().backward()
    assert features.grad is not None
    return (features.detach() * features.grad).sum(dim=2)


EXPLAINABLE = [name for name in MODELS if isinstance(make_network(name), Explainable)]


def test_the_first_networks_can_be_explained() -> None:
    assert {"ST-GCN", "EF-GCN"} <= set(EXPLAINABLE)


@pytest.mark.parametrize("frames", [1, 6, 14])
@pytest.mark.parametrize("model_type", EXPLAINABLE)
def test_contributions_add_up_to_the_logit_and_are_what_the_gradient_says(model_type: str, frames: int) -> None:
    network = make_network(model_type)
    x = make_padded_clips(frames=frames)
    with torch.no_grad():
        logits = network(torch.from_numpy(x)).double().numpy()
    explainer = make_explainer(network)
    for label in range(NUM_CLASSES):
        labels = np.full(len(x), label)
        found = explainer.explain(x, labels)
        total = found.contributions.sum(axis=(1, 2, 3)) + found.biases
        np.testing.assert_allclose(total, logits[:, label], rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(found.scores, logits[:, label], rtol=1e-6, atol=1e-6)
        cells = split_by_gradient(network, torch.from_numpy(x), torch.from_numpy(labels))
        np.testing.assert_allclose(found.contributions, cells.numpy(), rtol=1e-3, atol=1e-5)
    found = explainer.explain(x)
    assert found.labels.tolist() == logits.argmax(axis=1).tolist()


@pytest.mark.parametrize("model_type", [name for name in EXPLAINABLE if name != "ST-GCN"])
def test_padding_and_absent_people_contribute_nothing(model_type: str) -> None:
    network = make_network(model_type)
    assert isinstance(network, Explainable)
    stride = network.total_stride
    found = make_explainer(network).explain(make_padded_clips())
    is_late = np.arange(found.contributions.shape[2]) * stride
    assert (found.contributions[1:, 0, is_late >= 9] == 0).all()
    assert (found.contributions[:, 1, is_late >= 5] == 0).all()
    assert (found.contributions[-1, 1] == 0).all()
    assert (found.contributions[:2, 1].any(axis=(1, 2))).all(), "the second person is there in the others"
    assert np.isnan(found.frames[1:, is_late >= 9]).all()
    assert (found.frames[0] == is_late).all()


def test_weights_of_real_frames_are_what_the_mean_uses() -> None:
    x = torch.from_numpy(make_padded_clips())
    features = torch.randn(3, 2, 5, 4, NUM_JOINTS)
    weights = weigh_real_frames(x, 4)
    expected = torch.zeros(3, 5)
    for n in range(3):
        real = [
            (m, t) for m in range(2) for t in range(4) if (x[n, :, 4 * t :, :, m] != 0).any()
        ]  # a person stays until the last frame with a value
        for m, t in real:
            expected[n] += features[n, m, :, t].mean(dim=1) / len(real)
            torch.testing.assert_close(weights[n, m, t], torch.tensor(1 / len(real)))
    torch.testing.assert_close(mean_over_real_frames(features, x, 4), expected)
    torch.testing.assert_close(weights.sum(dim=(1, 2)), torch.ones(3))


@pytest.mark.parametrize(
    "changes",
    [
        {"sampling": "uniform", "num_frames": 7},
        {"sampling": "uniform", "num_frames": 40},
        {"sampling": "crop_resize", "num_frames": 9, "test_crop": 0.8},
        {"sampling": "contiguous", "num_frames": 30},
        {"sampling": "none", "missing": "hold"},
        {},
    ],
    ids=str,
)
def test_frames_of_the_file_are_those_that_the_network_gets(changes: dict[str, Any]) -> None:
    """Every coordinate holds the number of its frame plus 1, so what comes out says where it was read."""
    x = np.zeros((2, 3, 24, NUM_JOINTS, 1), np.float32)
    x += np.arange(1, 25)[None, None, :, None, None]
    x[1, :, 17:] = 0
    pipeline = build_pipeline(replace(InputSpec(), **changes), 3, LAYOUT)
    seen = pipeline(x)[:, 0, :, 0, 0]
    frames = find_file_frames(pipeline, x)
    assert frames.shape == seen.shape
    np.testing.assert_allclose(np.nan_to_num(frames, nan=-1.0) + 1, seen, atol=1e-5)


def test_frames_of_an_explanation_step_with_the_map() -> None:
    pipeline = build_pipeline(InputSpec(sampling="uniform", num_frames=10), 3, LAYOUT)
    x = make_clips(2, frames=20)
    found = make_explainer(make_network("EF-GCN"), pipeline).explain(x)
    assert found.frames.tolist() == [[1, 9, 17]] * 2  # middles of segments of two frames, every fourth of them


@pytest.mark.parametrize(("padding", "before", "after"), [("symmetric", 22, 22), ("causal", 44, 0)])
def test_a_cell_sees_the_frames_round_its_own(padding: str, before: int, after: int) -> None:
    """As docs/explain.md says: a change of one frame reaches these cells and no others."""
    explainer = make_explainer(make_network("EF-GCN", temporal_padding=padding))
    x = make_clips(1, frames=100)
    first = explainer.explain(x, np.array([0]))
    assert first.frames[0].tolist() == list(range(0, 100, 4))
    changed = x.copy()
    changed[:, :, 50] += 3
    second = explainer.explain(changed, np.array([0]))
    reached = first.frames[0][(first.contributions != second.contributions).any(axis=(0, 1, 3))]
    assert reached.min() >= 50 - after
    assert reached.max() <= 50 + before
    assert reached.min() < 50 - after + 4
    assert reached.max() > 50 + before - 4


def test_people_are_in_the_order_of_the_file() -> None:
    pipeline = build_pipeline(InputSpec(people_order="motion", missing="hold"), 3, LAYOUT)
    network = make_network("EF-GCN")
    x = make_clips(3, people=3)
    x[..., 2] *= 3
    x[1, ..., 1] = 0
    found = make_explainer(network, pipeline).explain(x)
    direct = make_explainer(network).explain(x)
    np.testing.assert_allclose(found.contributions, direct.contributions, atol=1e-5)
    assert found.contributions[:, 2].any(axis=(1, 2)).all()
    assert not found.contributions[1, 1].any()


def test_streams_of_a_late_fusion_are_weighted() -> None:
    network = LateFusion(lambda channels: make_network("EF-GCN", channels), 6, 2, [3, 1]).eval()
    with torch.no_grad():
        network.branches[1].fcn.weight.neg_()  # type: ignore[operator,union-attr]
    pipeline = build_pipeline(InputSpec(streams=["joint", "joint_motion"]), 3, LAYOUT)
    x = make_clips(3)
    found = make_explainer(network, pipeline).explain(x)
    with torch.no_grad():
        inputs = torch.from_numpy(pipeline(x))
        logits = network.forward_branches(inputs).double()
        assert found.labels.tolist() == network(inputs).argmax(dim=1).tolist()
    picked = logits[:, range(3), found.labels].numpy()
    np.testing.assert_allclose(found.scores, 0.75 * picked[0] + 0.25 * picked[1], rtol=1e-5)
    np.testing.assert_allclose(found.contributions.sum(axis=(1, 2, 3)) + found.biases, found.scores, atol=1e-4)
    np.testing.assert_allclose(found.stream_sums.sum(axis=1) + found.biases, found.scores, atol=1e-4)
    assert found.stream_sums.shape == (3, 2)


class JointFree(nn.Module):
    """A network without joints in its map, the smallest one."""

    total_stride = 2

    def __init__(self) -> None:
        super().__init__()
        self.fcn = nn.Linear(3 * NUM_JOINTS, NUM_CLASSES)

    def forward_features(self, x: Tensor) -> Tensor:
        return x[:, :, ::2].permute(0, 4, 1, 3, 2).flatten(2, 3)[..., None]

    def pooling_weights(self, x: Tensor) -> Tensor:
        return weigh_real_frames(x, 2)

    def classify(self, features: Tensor, x: Tensor) -> Tensor:
        logits: Tensor = self.fcn(mean_over_real_frames(features, x, 2))
        return logits

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.forward_features(x), x)


class WrongWeights(JointFree):
    def pooling_weights(self, x: Tensor) -> Tensor:
        return 0.9 * super().pooling_weights(x)


def test_a_network_that_pools_otherwise_than_it_says_is_refused() -> None:
    x = make_clips(2)
    make_explainer(JointFree()).explain(x)
    with pytest.raises(CheckpointError, match="add up"):
        make_explainer(WrongWeights()).explain(x)


class OtherAnswer(JointFree):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x) + 1


def test_the_answer_itself_is_what_is_compared() -> None:
    with pytest.raises(CheckpointError, match="add up"):
        make_explainer(OtherAnswer()).explain(make_clips(2))


def test_a_network_without_a_mean_is_refused() -> None:
    with pytest.raises(UserError, match="a Sequential"):
        make_explainer(nn.Sequential(nn.Flatten(), nn.Linear(5, NUM_CLASSES)))


@pytest.mark.parametrize("labels", [[0, 4], [-1, 0], [0], [0.5, 1.0]])
def test_labels_that_do_not_fit_are_refused(labels: list[float]) -> None:
    with pytest.raises(UserError, match="labels"):
        make_explainer(JointFree()).explain(make_clips(2), np.array(labels))


def test_an_onnx_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"no matter what")
    with pytest.raises(UserError, match=r"ONNX.*pth"):
        load_explainer(path)


@given(st.data())
def test_chosen_clips_are_spread_and_show_what_is_wrong(data: st.DataObject) -> None:
    num_clips, limit = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 30))
    is_wrong = np.array(data.draw(st.lists(st.booleans(), min_size=num_clips, max_size=num_clips)))
    chosen = choose_clips(num_clips, limit, is_wrong)
    assert len(chosen) == len(set(chosen)) == min(num_clips, limit)
    assert chosen == sorted(chosen)
    assert 0 <= chosen[0] <= chosen[-1] < num_clips
    if num_clips > limit:
        assert is_wrong[chosen].sum() >= min(is_wrong.sum(), limit // 2)
        assert (~is_wrong[chosen]).sum() >= min((~is_wrong).sum(), limit - limit // 2)
        gaps = np.diff([-1, *choose_clips(num_clips, limit)])
        assert gaps.max() <= num_clips // limit + 1


def write_all(
    folder: Path, explainer: Explainer, clips: np.ndarray, labels: np.ndarray, **changes: Any
) -> tuple[dict[str, Any], Any, Path]:
    np.save(folder / "clips.npy", clips)
    spec = {"results_dir": str(folder), "inference": {"checkpoint": str(find_model())}}
    run = make_run(folder / "run", "inference", spec)
    names = [f"take {i}: $a/b_{i}" for i in range(len(clips))]
    files = write_explanations(explainer, str(folder / "clips.npy"), labels, names, run, **{"limit": 3, **changes})
    content = json.loads(Path(files["explanations"]).read_text())
    with np.load(files["explanations_arrays"]) as arrays:
        return content, dict(arrays), folder / "run" / "explanations"


def test_files_agree_with_each_other(tmp_path: Path) -> None:
    explainer = load_explainer(find_model())
    clips = make_clips(6, people=2, frames=30)
    clips[:, :, 22:] = 0
    labels = explainer.explain(clips).labels
    true_labels = labels.copy()
    true_labels[4] = (labels[4] + 1) % NUM_CLASSES
    content, arrays, folder = write_all(tmp_path, explainer, clips, labels, true_labels=true_labels)
    assert arrays["contributions"].dtype == np.float32
    assert arrays["contributions"].shape == (3, 2, 8, NUM_JOINTS)
    indices = [entry["index"] for entry in content["clips"]]
    assert 4 in indices
    assert arrays["indices"].tolist() == indices
    names = explainer.class_names
    for place, entry in enumerate(content["clips"]):
        index, cells = entry["index"], arrays["contributions"][place]
        assert entry["class"] == names[labels[index]]
        assert entry["true_class"] == names[true_labels[index]]
        assert list(entry["joints"]) == list(LAYOUT.joints)
        np.testing.assert_allclose(list(entry["joints"].values()), cells.sum((0, 1)), atol=1e-5)
        np.testing.assert_allclose(entry["people"], cells.sum((1, 2)), atol=1e-5)
        assert sum(entry["people"]) + entry["bias"] == pytest.approx(entry["score"], abs=1e-4)
        assert entry["behind_the_end"] == pytest.approx(cells[:, 6:].sum(), abs=1e-5)  # ST-GCN counts them
        sums = cells[:, :6].sum((0, 2))
        assert entry["strongest_frames"][0]["frame"] == 4 * sums.argmax()
        assert entry["strongest_frames"][0]["contribution"] == pytest.approx(sums.max(), abs=1e-5)
        assert (folder / entry["picture"]).read_bytes().startswith(PNG_START)
    assert len(list(folder.iterdir())) == 3 + 2


def test_a_label_of_minus_one_is_the_answer_of_the_network(tmp_path: Path) -> None:
    explainer = make_explainer(make_network("EF-GCN"))
    explainer.class_names = ["a", "b", "c", "a name of several\nlines " + 200 * "x"]
    clips = make_clips(2)
    content, arrays, _ = write_all(tmp_path, explainer, clips, np.array([-1, 3]))
    answers = explainer.explain(clips).labels
    assert arrays["labels"].tolist() == [answers[0], 3]
    assert content["clips"][0]["class"] == explainer.class_names[answers[0]]


def test_a_map_without_joints_says_so(tmp_path: Path) -> None:
    explainer = make_explainer(JointFree())
    clips = make_clips(2, people=2)
    content, arrays, folder = write_all(tmp_path, explainer, clips, np.array([0, 1]))
    assert arrays["contributions"].shape == (2, 2, 4, 1)
    assert [entry["joints"] for entry in content["clips"]] == ["absent"] * 2
    assert len(list(folder.glob("*.png"))) == 2


@pytest.mark.parametrize(("rows", "words"), [(NUM_JOINTS, "sum of the joint"), (1, "sum")])
def test_bars_are_called_what_they_are(rows: int, words: str) -> None:
    values = np.random.default_rng(0).standard_normal((1, 5, rows))
    clips = find_real(make_clips(1, frames=10), 3)
    axes = Figure().add_subplot()
    _draw_bars(axes, _gather_cells(ExplainedClip("", clips, LAYOUT, values, np.arange(5.0), 0.0, 0.0)))
    assert axes.get_xlabel() == words
    np.testing.assert_allclose([bar.get_width() for bar in axes.patches], values.sum(axis=(0, 1)))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(0, 3))
def test_what_is_drawn_adds_up(frames: list[int], num_behind: int) -> None:
    """Also where a short clip repeats frames, and of cells behind its end."""
    places = np.array([*sorted(frames), *[np.nan] * num_behind])
    values = np.random.default_rng(0).standard_normal((2, len(places), NUM_JOINTS))
    clips = find_real(make_clips(1, frames=10, people=2), 3)
    cells = _gather_cells(ExplainedClip("", clips, LAYOUT, values, places, 0.0, 0.0))
    assert cells.values.sum() + cells.behind == pytest.approx(values.sum())
    assert cells.frames.tolist() == sorted(set(frames))
    assert (np.diff(cells.edges) > 0).all()
    assert (cells.edges[:-1] <= cells.frames).all()
    assert (cells.frames <= cells.edges[1:]).all()
    for frame, drawn in zip(cells.frames, cells.values.transpose(1, 0, 2), strict=True):
        np.testing.assert_allclose(drawn, values[:, places == frame].sum(axis=1))


def test_a_clip_without_anybody_has_an_explanation(tmp_path: Path) -> None:
    clips = np.zeros((1, 3, 8, NUM_JOINTS, 1), np.float32)
    content, arrays, folder = write_all(tmp_path, load_explainer(find_model()), clips, np.array([2]))
    assert np.isnan(arrays["frames"]).all()
    assert content["clips"][0]["strongest_frames"] == []
    assert len(list(folder.glob("*.png"))) == 1


def draw_moments(clips: np.ndarray) -> list[str]:
    """What is written over and at the skeletons of a clip (1, C, T, V, M)."""
    masked, num_frames = find_real(clips, 3), clips.shape[2]
    frames = np.arange(0.0, num_frames, 4) if masked.is_real.any() else np.full(2, np.nan)
    values = np.random.default_rng(0).standard_normal((clips.shape[4], len(frames), NUM_JOINTS))
    explained = ExplainedClip("", masked, LAYOUT, values, frames, 0.0, 0.0)
    cells = _gather_cells(explained)
    axes = Figure().add_subplot()
    _draw_poses(axes, explained, cells, _make_colors(cells.limit))
    return [text.get_text() for text in axes.texts]


def test_moments_of_a_short_clip_are_drawn_once() -> None:
    assert draw_moments(make_clips(1, frames=1)) == ["frame 0"]
    several = draw_moments(make_clips(1, frames=3))
    assert several == list(dict.fromkeys(several)) and "frame 0" in several
    assert len(draw_moments(make_clips(1, frames=90))) in (4, 6, 8)


def test_people_are_told_apart_and_their_absence_is_said() -> None:
    clips = make_clips(1, people=2, frames=40)
    assert {"1", "2"} < set(draw_moments(clips))
    clips[..., 0] = 0
    assert not {"1", "2"} & set(draw_moments(clips)), "one person needs no number"
    clips[:] = 0
    assert draw_moments(clips) == ["nobody is in this clip"]


def test_a_foreign_file_is_explained(tmp_path: Path) -> None:
    found = load_explainer(write_foreign(tmp_path)).explain(make_clips(2))
    assert isinstance(found, Explanations)
    np.testing.assert_allclose(found.contributions.sum(axis=(1, 2, 3)) + found.biases, found.scores, atol=1e-4)


ARM = [22, 24, 26, 28, 30, 32]
"""Left elbow, wrist and hand of the layout nvidia."""


def make_waving(num_clips: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """People who stand; every second one waves with the left arm: that alone makes class 1."""
    skeletons = make_skeletons(6 * num_clips, seed, num_frames=24)
    joints = skeletons.joints[skeletons.labels == 3] / 1000
    rng = np.random.default_rng(seed)
    labels = np.arange(len(joints)) % 2
    for clip in np.flatnonzero(labels):
        wave = 0.25 * np.sin(0.9 * np.arange(24) + rng.uniform(0, 6))
        joints[clip][:, ARM, 1] += wave[:, None]
    joints = joints - joints[:, :1, :1] + rng.normal(0, 0.01, joints.shape)
    return joints.transpose(0, 3, 1, 2)[..., None].astype(np.float32), labels


def test_an_arm_that_makes_the_class_gets_the_largest_contributions() -> None:
    """Five of five seeds do when tried, by factors of two and more; another weight start must not turn it over."""
    torch.manual_seed(1)
    layout = LAYOUTS["nvidia"]
    x, labels = make_waving(40, 1)
    options = replace(ModelSpec(), model_type="EF-GCN", width=0.25, depth=1, dropout=0.0)
    network = build_model(options, layout, 2)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    for _ in range(25):
        loss = nn.functional.cross_entropy(network(torch.from_numpy(x)), torch.from_numpy(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05, "untrained, a network explains nothing"
    waving = make_waving(20, 100)[0][1::2]
    explainer = Explainer("test", network.eval(), ModelDescription(2, None, layout, InputPipeline(3, 34)))
    found = explainer.explain(waving, np.ones(len(waving), int))
    by_joint = found.contributions.mean(axis=0).sum(axis=(0, 1))
    assert set(np.argsort(-by_joint)[: len(ARM)].tolist()) == set(ARM)
