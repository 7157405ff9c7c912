"""What the train section adds to the plain loop: losses, mixing, averages, balance, stopping, fusion, teachers."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kinegraph.actions import evaluate, export, inference, train
from kinegraph.data.dataset import EpochBatchSampler
from kinegraph.data.order import BalancedOrder
from kinegraph.data.transforms import TrainingAugmentation
from kinegraph.errors import SpecError
from kinegraph.models import Foldable, build_model
from kinegraph.models.checkpoint import build_from_checkpoint, read_checkpoint
from kinegraph.models.folded_torch import FoldedModel
from kinegraph.models.late_fusion import LateFusion, fit_fusion_weights
from kinegraph.run_files import BEST_METRICS_NAME
from kinegraph.runtime import load
from kinegraph.skeleton.layouts import LAYOUTS
from kinegraph.spec import ModelSpec
from kinegraph.spec_input import AugmentSpec
from kinegraph.spec_train import TrainSpec
from kinegraph.training_job import has_ended
from kinegraph.training_loss import MixedBatch, TrainingLoss, mix_clips, weigh_classes
from kinegraph.weight_average import WeightAverage
from small_runs import LAYOUT, make_spec, train_until_killed, write_small_data

SMALL = {"model_type": "EF-GCN", "depth": 1, "width": 0.25}
STREAMS = ["joint", "bone", "joint_motion"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_small_data(tmp_path)
    return tmp_path


def make_small(folder: Path, results: str = "results", late: bool = False, **options: Any) -> dict[str, Any]:
    spec = make_spec(folder, results, **options)
    spec["model"] |= SMALL
    if late:
        spec["model"] |= {"fusion": "late"}
        spec["input"] = {"streams": STREAMS}
    return spec


def draw_logits(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def compare_plainly(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Cross entropy of each clip, by the definition."""
    classes = logits.shape[1]
    targets = torch.full_like(logits, smoothing / classes)
    targets[torch.arange(len(labels)), labels] += 1 - smoothing
    return -(targets * (logits - logits.exp().sum(1, keepdim=True).log())).sum(1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("is_weighted", [False, True])
def test_the_loss_of_mixed_clips_is_the_mean_of_both_labels(smoothing: float, is_weighted: bool) -> None:
    logits, labels, others = draw_logits(6, 4), torch.tensor([0, 1, 2, 3, 0, 0]), torch.tensor([3, 2, 1, 0, 0, 1])
    weights = weigh_classes(np.array([0, 0, 0, 1, 2, 3]), 4) if is_weighted else None
    loss = TrainingLoss(TrainSpec(label_smoothing=smoothing), weights)
    factor = weights.double() if weights is not None else torch.ones(4).double()
    parts = [factor[each] * compare_plainly(logits, each, smoothing) for each in (labels, others)]
    expected = 0.3 * parts[0].mean() + 0.7 * parts[1].mean()
    torch.testing.assert_close(loss(logits, MixedBatch(logits, labels, others, 0.3)), expected)


def test_the_loss_of_streams_is_the_sum_of_theirs() -> None:
    logits, labels = draw_logits(3, 5, 4), torch.tensor([0, 1, 2, 3, 0])
    expected = sum(compare_plainly(each, labels, 0.0).mean() for each in logits)
    torch.testing.assert_close(TrainingLoss(TrainSpec())(logits, MixedBatch(logits, labels, labels)), expected)


def test_a_teacher_adds_the_divergence_of_softened_answers() -> None:
    logits, teacher, labels = draw_logits(5, 4), draw_logits(5, 4, seed=1), torch.tensor([0, 1, 2, 3, 0])
    options = TrainSpec(teacher_weight=0.25, teacher_temperature=3.0)
    softened, learned = (values / 3.0 for values in (logits, teacher))
    q, p = (values.exp() / values.exp().sum(1, keepdim=True) for values in (softened, learned))
    divergence = (p * (p / q).log()).sum(1).mean()
    expected = 0.75 * compare_plainly(logits, labels, 0.0).mean() + 0.25 * 9 * divergence
    batch = MixedBatch(logits, labels, labels)
    torch.testing.assert_close(TrainingLoss(options)(logits, batch, teacher), expected)


def test_weights_of_classes_are_one_on_average() -> None:
    labels = np.array([0] * 6 + [2] * 3 + [3])
    weights = weigh_classes(labels, 4).numpy()
    np.testing.assert_allclose(weights, [10 / 18, 0, 10 / 9, 10 / 3], rtol=1e-6)
    assert weights[labels].mean() == pytest.approx(1)


def test_mixed_clips_are_sums_of_two() -> None:
    clips, labels = torch.arange(4.0)[:, None].expand(4, 3).contiguous(), torch.arange(4)
    torch.manual_seed(0)
    mixed = mix_clips(clips, labels, alpha=1.0)
    assert 0 < mixed.share < 1 and sorted(mixed.others.tolist()) == [0, 1, 2, 3]
    expected = mixed.share * labels + (1 - mixed.share) * mixed.others
    torch.testing.assert_close(mixed.clips, expected[:, None].expand(4, 3))
    assert mix_clips(clips, labels, alpha=0.0) == MixedBatch(clips, labels, labels)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(0, 5))
def test_balanced_sampling_takes_all_classes_equally_often(labels: list[int], epoch: int) -> None:
    array = np.array(labels)
    order = BalancedOrder(array, seed=3, epoch=epoch)
    clips = order.take(0, len(labels))
    assert len(clips) == len(labels)
    counts = np.unique_counts(array[clips]).counts
    assert counts.max() - counts.min() <= 1 or len(np.unique(array)) == 1
    for label in np.unique(array):
        own = clips[array[clips] == label]
        often = np.bincount(own, minlength=len(array))[array == label]
        assert often.max() - often.min() <= 1
    np.testing.assert_array_equal(BalancedOrder(array, 3, epoch).take(2, 9), clips[2:9])
    for clip in np.unique(clips):
        assert sorted(order.repeats[clips == clip]) == list(range((clips == clip).sum()))


@pytest.mark.parametrize("world_size", [1, 2])
def test_clips_drawn_again_are_changed_otherwise(world_size: int) -> None:
    labels = np.array([0] * 20 + [1] * 2)
    augment = TrainingAugmentation(options=AugmentSpec(rotation_y=180.0, noise=0.1), seed=5)
    seen: dict[int, list[torch.Tensor]] = {}
    for rank in range(world_size):
        sampler = EpochBatchSampler(
            22, 4, seed=1, epoch=2, start_batch=1, min_batches=9, balanced_by=labels, rank=rank, world_size=world_size
        )
        for batch, clips in enumerate(sampler, start=1):
            draws = sampler.number_draws(batch, np.array(clips))
            np.testing.assert_array_equal(draws % 22, clips)
            changed = augment(torch.ones(len(clips), 3, 4, 5, 1), draws, sampler.find_pass(batch))
            for clip, one in zip(clips, changed, strict=True):
                seen.setdefault(clip, []).append(one)
    assert max(len(own) for own in seen.values()) > 5  # the two clips of the rare class
    for own in seen.values():
        assert len({tuple(one.flatten().tolist()) for one in own}) == len(own)


def test_without_balancing_draws_are_the_clips() -> None:
    sampler = EpochBatchSampler(22, 4, seed=1, min_batches=9)
    for batch, clips in enumerate(sampler):
        np.testing.assert_array_equal(sampler.number_draws(batch, np.array(clips)), clips)


def test_the_average_of_weights_follows_its_formula() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = WeightAverage(network, decay=0.9)
    expected = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for step in range(1, 200, 40):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += 1
            network(torch.randn(4, 2))
        average.update(network, step)
        decay = min(0.9, (1 + step) / (10 + step))
        for name, tensor in network.state_dict().items():
            is_number = tensor.is_floating_point()
            expected[name] = decay * expected[name] + (1 - decay) * tensor if is_number else tensor.clone()
    for name, tensor in average.network.state_dict().items():
        torch.testing.assert_close(tensor, expected[name])
    assert not average.network.training


def test_training_ends_when_validation_stands_still() -> None:
    options = TrainSpec(num_epochs=10, early_stopping=3)
    best = {"epoch": 4}
    assert [has_ended(done, best, options) for done in (5, 7, 8, 9)] == [False, False, True, True]
    assert not has_ended(9, None, options) and has_ended(10, None, options)
    assert not has_ended(9, best, TrainSpec(num_epochs=10))
    options = TrainSpec(num_epochs=20, early_stopping=1, validation_interval=5)
    assert [has_ended(done, best, options) for done in (5, 6, 9, 10, 11)] == [False, False, False, True, True]


def read_rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "train" / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_run_that_stopped_early_is_complete(data: Path) -> None:
    spec = make_small(data, num_epochs=30, early_stopping=2, optim={"lr": 1e-9})
    train(spec)
    rows = read_rows(data / "results")
    assert len(rows) < 30
    best = json.loads((data / "results" / "train" / BEST_METRICS_NAME).read_text())
    assert len(rows) == best["epoch"] + 3
    train(spec)
    assert read_rows(data / "results") == rows
    train({**spec, "train": {**spec["train"], "early_stopping": 3}})
    assert len(read_rows(data / "results")) > len(rows)


ALL_OPTIONS = {"label_smoothing": 0.1, "mixup": 0.4, "ema_decay": 0.9, "num_epochs": 3}


@pytest.mark.parametrize("late", [False, True])
def test_a_killed_run_with_every_option_ends_as_an_undisturbed_one(data: Path, late: bool) -> None:
    results = []
    for name in ("whole", "killed"):
        spec = make_small(data, name, late, **ALL_OPTIONS)
        spec["dataset"] |= {"balance": "sampling"}
        if name == "killed":
            train_until_killed(spec, step=6)
        train(spec)
        results.append(read_checkpoint(data / name / "train/pc_model_latest.pth"))
    first, second = results
    assert first.training is not None and second.training is not None
    for one, other in ((first.state_dict, second.state_dict), (first.training["weights"], second.training["weights"])):
        assert one.keys() == other.keys()
        for key, tensor in one.items():
            torch.testing.assert_close(tensor, other[key], rtol=0, atol=0)
    assert first.temperature == second.temperature != 1.0
    some = "branches.0.fcn.weight" if late else "fcn.weight"
    assert not torch.equal(first.state_dict[some], first.training["weights"][some])


def test_options_that_are_off_change_nothing(data: Path) -> None:
    """The weights of a TAO spec's training are those of the plain loop."""
    train(make_small(data, "plain"))
    train(make_small(data, "temperature", temperature=2.0))
    one, other = (read_checkpoint(data / name / "train/pc_model_latest.pth") for name in ("plain", "temperature"))
    for key, tensor in one.state_dict.items():
        torch.testing.assert_close(tensor, other.state_dict[key], rtol=0, atol=0)
    assert other.temperature == 2.0


def find_model(data: Path, results: str) -> str:
    return str(data / results / "train" / "pc_model_latest.pth")


def test_fused_streams_are_one_model_for_every_action(data: Path) -> None:
    train(make_small(data, late=True))
    model = find_model(data, "results")
    network = build_from_checkpoint(read_checkpoint(model), model)
    assert isinstance(network, LateFusion) and len(network.branches) == len(STREAMS)
    assert network.fusion_weights.sum().item() == pytest.approx(1)
    log = (data / "results/train/log.txt").read_text()
    told = ", ".join(f"{name} {weight:.3g}" for name, weight in zip(STREAMS, network.fusion_weights, strict=True))
    assert f"fitted on the validation clips: {told} (model.fusion_weights=[" in log
    test_set = {"data_path": str(data / "val_data.npy"), "label_path": str(data / "val_label.json")}
    base = {"results_dir": str(data / "answers"), "wandb": {"enable": False}}
    evaluate({**base, "evaluate": {"checkpoint": model, "test_dataset": test_set}})
    inference({**base, "inference": {"checkpoint": model, "test_dataset": test_set}})
    onnx = str(data / "model.onnx")
    export({**base, "export": {"checkpoint": model, "onnx_file": onnx}})
    clips = np.load(data / "val_data.npy")
    np.testing.assert_allclose(load(onnx).logits(clips), load(model).logits(clips), atol=1e-4)
    pipeline = load(model).pipeline
    assert pipeline is not None
    with torch.no_grad():
        each = [
            branch(torch.from_numpy(pipeline(clips)[:, 3 * i : 3 * i + 3])) for i, branch in enumerate(network.branches)
        ]
    expected = sum(weight * logits for weight, logits in zip(network.fusion_weights, each, strict=True))
    np.testing.assert_allclose(load(model).logits(clips), expected.numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "folds"),
    [("EF-GCN", True), ("MB-GCN", True), ("ST-GCN++", True), ("CTR-GCN", False), ("TD-GCN", False)],
)
def test_a_fusion_folds_where_its_networks_do(model_type: str, folds: bool) -> None:
    options = ModelSpec(model_type=model_type, fusion="late", width=0.125, depth=1)  # type: ignore[arg-type]
    network = build_model(options, LAYOUTS[LAYOUT], 3, 6).eval()
    assert isinstance(network, Foldable) == folds
    x = torch.randn(2, 6, 9, LAYOUTS[LAYOUT].num_joints, 2)
    x[1, :, 5:] = 0
    with torch.no_grad():
        network.fusion_weights.copy_(torch.tensor([0.7, 0.3]))  # type: ignore[operator,union-attr]
        logits = network(x)
        if isinstance(network, Foldable):
            torch.testing.assert_close(FoldedModel(network.fold())(x), logits, atol=1e-5, rtol=1e-5)


def test_given_weights_are_kept_and_wrong_ones_refused(data: Path) -> None:
    spec = make_small(data, late=True)
    spec["model"]["fusion_weights"] = [2, 1, 1]
    train(spec)
    state = read_checkpoint(find_model(data, "results")).state_dict
    torch.testing.assert_close(state["fusion_weights"], torch.tensor([0.5, 0.25, 0.25]))
    assert "fitted on the validation clips" not in (data / "results/train/log.txt").read_text()
    spec = make_small(data, "other", late=True)
    spec["model"]["fusion_weights"] = [2, 1]
    with pytest.raises(SpecError, match=r"a weight for each of 3 streams"):
        train(spec)


@pytest.mark.parametrize(("score_channel", "coordinates"), [(2, 2), (-1, 0)])
def test_dd_net_takes_no_score_for_a_coordinate(data: Path, score_channel: int, coordinates: int) -> None:
    spec = make_spec(data)
    spec["model"] |= {"model_type": "DD-Net", "width": 0.25}
    spec["input"] = {"score_channel": score_channel}
    train(spec)
    path = find_model(data, "results")
    network = build_from_checkpoint(read_checkpoint(path), path)
    assert read_checkpoint(path).options.coordinates == coordinates
    assert network.num_coordinates == (2 if score_channel == 2 else 3)


def test_fitted_weights_are_the_likeliest() -> None:
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(0, 4, (400,), generator=generator)
    quality = torch.tensor([2.0, 1.0, 0.0])[:, None, None]
    logits = torch.randn(3, 400, 4, generator=generator) + quality * nn.functional.one_hot(labels, 4)

    def measure(weights: Tensor) -> float:
        total = torch.einsum("s,snk->nk", weights, logits)
        return min(float(nn.functional.cross_entropy(total * scale, labels)) for scale in torch.logspace(-1, 1, 81))

    fitted = fit_fusion_weights(logits, labels)
    assert fitted.sum().item() == pytest.approx(1)
    grid = [torch.tensor([a, b, 20 - a - b]) / 20 for a in range(21) for b in range(21 - a)]
    assert measure(fitted) <= min(measure(weights) for weights in grid) + 2e-3
    assert fitted[0] > fitted[1] > fitted[2]


def test_streams_learn_as_if_each_were_alone() -> None:
    """The loss of one stream gives no gradient to another."""
    layout = LAYOUTS[LAYOUT]
    options = ModelSpec(**SMALL, fusion="late")
    network = build_model(options, layout, 3, 6)
    assert isinstance(network, LateFusion)
    x = torch.randn(2, 6, 4, layout.num_joints, 1)
    network.train()(x)[1].sum().backward()
    given = [any(p.grad is not None and p.grad.abs().max() > 0 for p in b.parameters()) for b in network.branches]
    assert given == [False, True]


def test_a_student_learns_from_a_teacher_of_the_same_input(data: Path) -> None:
    train(make_small(data, "teacher", late=True))
    teacher = find_model(data, "teacher")
    spec = make_small(data, "student", late=True, teacher=teacher, teacher_weight=1.0)
    spec["model"]["fusion"] = "early"
    train(spec)
    alone = make_small(data, "alone", late=True)
    alone["model"]["fusion"] = "early"
    train(alone)
    student, other = (read_checkpoint(find_model(data, name)) for name in ("student", "alone"))
    assert not torch.equal(student.state_dict["fcn.weight"], other.state_dict["fcn.weight"])
    spec["train"] |= {"teacher": find_model(data, "teacher")}
    spec["input"] = {"streams": ["joint", "bone"], "centre": "first"}
    spec["results_dir"] = str(data / "refused")
    with pytest.raises(SpecError) as caught:
        train(spec)
    assert "joint_motion" in str(caught.value) and "input.centre" in str(caught.value)
