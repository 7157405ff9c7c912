"""What becomes of logits: the temperature of the model, unknown clips, several test clips of a sequence."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kinegraph import online
from kinegraph.actions import evaluate, inference
from kinegraph.calibration import softmax
from kinegraph.data.counters import uniform_from_counters
from kinegraph.data.pipeline import InputPipeline, build_pipeline
from kinegraph.data.sampling import TimeDraws
from kinegraph.errors import SpecError, UserError
from kinegraph.model_description import describe_checkpoint
from kinegraph.models import build_model
from kinegraph.models.checkpoint import Checkpoint, build_from_checkpoint, write_checkpoint
from kinegraph.onnx_graph import write_clip_form
from kinegraph.onnx_step import write_step_form
from kinegraph.runtime import UNKNOWN_LABEL, load
from kinegraph.skeleton.layouts import LAYOUTS
from kinegraph.spec import ModelSpec
from kinegraph.spec_input import InputSpec
from model_files import CLASS_NAMES, LABEL_MAP, make_clips

LAYOUT = LAYOUTS["coco"]
TEMPERATURE = 2.5
NUM_CLIPS = 12
UNIFORM = {"sampling": "uniform", "num_frames": 5}
CROPPED = {"sampling": "crop_resize", "num_frames": 5}


@cache
def build_checkpoint(sampling: str = "none", test_clips: int = 1, temperature: float = TEMPERATURE) -> Checkpoint:
    """A small causal network whose answers differ from clip to clip."""
    torch.manual_seed(5)
    options = InputSpec(sampling=sampling, num_frames=5, test_clips=test_clips, streams=["joint", "bone"])
    pipeline = build_pipeline(options, 3, LAYOUT)
    model_options = ModelSpec(
        model_type="EF-GCN", depth=1, width=0.25, temporal_padding="causal", graph_layout=LAYOUT.name
    )
    model = build_model(model_options, LAYOUT, len(CLASS_NAMES), pipeline.output_channels)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        model.train()(torch.from_numpy(pipeline(make_clips(24, seed=9))))
    return Checkpoint(
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        *(model_options, LAYOUT, len(CLASS_NAMES), dict(LABEL_MAP), pipeline.to_dict()),
        num_channels=pipeline.output_channels,
        temperature=temperature,
    )


def write_model(path: Path, checkpoint: Checkpoint) -> Path:
    """As a checkpoint, or by its name as an ONNX file of whole clips or of steps."""
    if path.suffix == ".pth":
        write_checkpoint(path, checkpoint)
        return path
    model: Any = build_from_checkpoint(checkpoint, str(path))
    write = write_step_form if path.stem == "step" else write_clip_form
    path.write_bytes(write(model.fold(), 17, describe_checkpoint(checkpoint, str(path)).to_metadata()))
    return path


def compute_plain_logits(checkpoint: Checkpoint, clips: NDArray[np.float32]) -> NDArray[np.float64]:
    pipeline = InputPipeline.from_dict(checkpoint.pipeline)
    with torch.no_grad():
        logits = build_from_checkpoint(checkpoint, "here")(torch.from_numpy(pipeline(clips)))
    return np.asarray(logits.double().numpy())


@pytest.mark.parametrize("name", ["model.pth", "model.onnx"])
def test_probabilities_have_the_temperature_and_logits_do_not(tmp_path: Path, name: str) -> None:
    checkpoint, clips = build_checkpoint(), make_clips(NUM_CLIPS)
    predictor = load(write_model(tmp_path / name, checkpoint))
    expected = compute_plain_logits(checkpoint, clips)
    assert predictor.description.temperature == TEMPERATURE
    np.testing.assert_allclose(predictor.logits(clips), expected, atol=1e-4)
    predictions = predictor.predict(clips)
    wanted = torch.softmax(torch.from_numpy(expected) / TEMPERATURE, dim=1).numpy()
    np.testing.assert_allclose(predictions.probabilities, wanted, atol=1e-5)
    assert predictions.labels.tolist() == expected.argmax(axis=1).tolist()
    assert np.abs(wanted - softmax(expected)).max() > 0.05, "or nothing is shown"


def test_files_of_before_have_the_temperature_1(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.pth", build_checkpoint())
    content = torch.load(path, weights_only=True)
    del content["kinegraph"]["temperature"]
    torch.save(content, path)
    clips = make_clips(3)
    predictor = load(path)
    np.testing.assert_allclose(predictor.predict(clips).probabilities, softmax(predictor.logits(clips)))
    assert predictor.description.temperature == 1.0


@pytest.mark.parametrize(("name", "mode"), [("model.pth", "step"), ("model.pth", "window"), ("step.onnx", "auto")])
def test_frame_by_frame_answers_have_the_temperature(tmp_path: Path, name: str, mode: Any) -> None:
    checkpoint, clips = build_checkpoint(), make_clips(2, frames=9)
    model = online.load(write_model(tmp_path / name, checkpoint), mode=mode, window_stride=1)
    probabilities, _ = model.step(clips[..., 0], model.start(2))
    expected = softmax(compute_plain_logits(checkpoint, clips), TEMPERATURE)
    np.testing.assert_allclose(probabilities, expected, atol=1e-5)


@pytest.mark.parametrize("threshold", [0.0, 0.4, 1.0])
def test_clips_below_the_threshold_are_unknown(tmp_path: Path, threshold: float) -> None:
    predictor = load(write_model(tmp_path / "model.pth", build_checkpoint()))
    plain, found = (predictor.predict(make_clips(NUM_CLIPS), reject_threshold=value) for value in (0.0, threshold))
    np.testing.assert_array_equal(found.probabilities, plain.probabilities)
    is_low = (plain.probabilities.max(axis=1) < threshold).tolist()
    assert any(is_low) == (threshold > 0) and all(is_low) == (threshold == 1)
    for low, label, name, best in zip(is_low, found.labels.tolist(), found.class_names, plain.labels, strict=True):
        assert (label, name) == ((UNKNOWN_LABEL, "unknown") if low else (best, CLASS_NAMES[best]))


@pytest.mark.parametrize("threshold", [60, -0.1, float("nan")])
def test_a_threshold_is_a_probability(tmp_path: Path, threshold: float) -> None:
    predictor = load(write_model(tmp_path / "model.pth", build_checkpoint()))
    with pytest.raises(UserError, match="a probability from 0 to 1"):
        predictor.predict(make_clips(2), reject_threshold=threshold)


def make_action_spec(folder: Path, action: str) -> dict[str, Any]:
    np.save(folder / "clips.npy", make_clips(NUM_CLIPS))
    (folder / "labels.json").write_text(json.dumps([i % 4 for i in range(NUM_CLIPS)]))
    files = {"data_path": str(folder / "clips.npy"), "label_path": str(folder / "labels.json")}
    path = write_model(folder / "model.pth", build_checkpoint())
    return {"results_dir": str(folder / "results"), action: {"checkpoint": str(path), "test_dataset": files}}


def read_rows(path: str) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_inference_writes_unknown_and_keeps_the_best_class(tmp_path: Path) -> None:
    spec = make_action_spec(tmp_path, "inference")
    result = inference(spec, "inference.reject_threshold=0.4")
    plain = load(tmp_path / "model.pth").predict(make_clips(NUM_CLIPS))
    best = plain.probabilities.max(axis=1)
    wanted = ["unknown" if value < 0.4 else name for value, name in zip(best, plain.class_names, strict=True)]
    assert 0 < wanted.count("unknown") < NUM_CLIPS
    assert Path(result.files["results"]).read_text().splitlines() == wanted
    rows = read_rows(result.files["results_csv"])
    entries = json.loads(Path(result.files["results_json"]).read_text())["results"]
    for i, (row, entry) in enumerate(zip(rows, entries, strict=True)):
        label = -1 if wanted[i] == "unknown" else int(plain.labels[i])
        assert row["class"].lstrip("'") == entry["class"] == wanted[i]
        assert int(row["label"]) == entry["label"] == label
        assert row["best_class"].lstrip("'") == entry["top_k"][0]["class"] == plain.class_names[i]
        assert int(row["best_label"]) == entry["top_k"][0]["label"] == plain.labels[i]
        assert float(row["probability"]) == pytest.approx(best[i], rel=1e-4)
        assert entry["probability"] == pytest.approx(best[i])
    assert result.metrics["num_unknown"] == wanted.count("unknown")
    assert sum(result.metrics["clips_per_class"].values()) == NUM_CLIPS - wanted.count("unknown")
    plain_result = inference(spec)
    assert "num_unknown" not in plain_result.metrics
    assert set(rows[0]) - set(read_rows(plain_result.files["results_csv"])[0]) == {"best_class", "best_label"}


def test_evaluate_reports_calibration_and_rejection(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spec = make_action_spec(tmp_path, "evaluate")
    with caplog.at_level("INFO", "kinegraph"):
        result = evaluate(spec, "evaluate.reject_threshold=0.4")
    plain = load(tmp_path / "model.pth").predict(make_clips(NUM_CLIPS))
    truth = np.arange(NUM_CLIPS) % 4
    own = plain.probabilities[np.arange(NUM_CLIPS), truth]
    metrics = json.loads(Path(result.files["metrics"]).read_text())
    assert metrics["nll"] == result.metrics["nll"] == pytest.approx(-np.log(own).mean(), abs=1e-4)
    assert 0 < metrics["ece"] == result.metrics["ece"] < 100
    assert metrics["temperature"] == TEMPERATURE
    is_kept = plain.probabilities.max(axis=1) >= 0.4
    assert 0 < is_kept.sum() < NUM_CLIPS
    rest = round(100 * float((plain.labels == truth)[is_kept].mean()), 2)
    rejected = round(100 * float((~is_kept).mean()), 2)
    assert metrics["rejection"] == {"threshold": 0.4, "rejected": rejected, "accuracy_of_rest": rest}
    assert (result.metrics["rejected"], result.metrics["accuracy_of_rest"]) == (rejected, rest)
    assert [row["rejected"] for row in read_rows(result.files["predictions"])] == [
        str(int(not kept)) for kept in is_kept
    ]
    assert f"Calibration error: {metrics['ece']:.2f} % (15 bins)" in caplog.text
    assert f"Below 0.4: {rejected:.2f} % of the answers; accuracy of the rest: {rest:.2f} %" in caplog.text
    again = json.loads(Path(evaluate(spec).files["metrics"]).read_text())
    assert "rejection" not in again and again["ece"] == metrics["ece"] and again["accuracy"] == metrics["accuracy"]


@pytest.mark.parametrize("name", ["model.pth", "model.onnx"])
@pytest.mark.parametrize("sampling", ["uniform", "crop_resize"])
def test_answers_are_the_mean_over_the_test_clips(tmp_path: Path, name: str, sampling: str) -> None:
    checkpoint, clips = build_checkpoint(sampling, test_clips=3), make_clips(NUM_CLIPS, frames=23)
    pipeline = InputPipeline.from_dict(checkpoint.pipeline)
    network = build_from_checkpoint(checkpoint, "here")
    num_places = 2 if sampling == "crop_resize" else 5
    total = np.zeros((NUM_CLIPS, 4))
    for number in range(3):
        places = np.tile(uniform_from_counters(0, number, np.array([0]), num_places, 0), (NUM_CLIPS, 1))
        draws = TimeDraws(places, np.ones(NUM_CLIPS), np.ones((NUM_CLIPS, 2))) if number else None
        x = pipeline.finish(pipeline.sample(pipeline.normalise(pipeline.clean(clips)), draws))
        with torch.no_grad():
            total += torch.softmax(network(torch.from_numpy(x)).double(), dim=1).numpy()
    predictor = load(write_model(tmp_path / name, checkpoint))
    logits = predictor.logits(clips, batch_size=5)
    np.testing.assert_allclose(np.exp(logits), total / 3, atol=1e-5)
    assert logits.dtype == np.float32
    first = softmax(compute_plain_logits(checkpoint, clips))
    assert np.abs(total / 3 - first).max() > 0.01, "or nothing is shown"
    calibrated = (total / 3) ** (1 / TEMPERATURE)
    wanted = calibrated / calibrated.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(predictor.predict(clips).probabilities, wanted, atol=1e-5)


@pytest.mark.parametrize("name", ["model.pth", "model.onnx"])
def test_overrides_that_change_nothing_are_told(tmp_path: Path, name: str) -> None:
    spec = make_action_spec(tmp_path, "inference")
    np.save(tmp_path / "clips.npy", make_clips(NUM_CLIPS, frames=23))
    spec["inference"]["checkpoint"] = str(write_model(tmp_path / name, build_checkpoint("uniform")))
    spec["train"] = {"num_epochs": 7}  # of the file, which may be that of all actions
    spec["model"] = {"dropout": 0.7}
    log = tmp_path / "results/inference/log.txt"
    inference(spec, "dataset.batch_size=2", "inference.top_k=2")
    assert "no effect" not in log.read_text()
    inference(spec, "train.temperature=3", "train.optim.lr=1", "augment.mirror=1", "model.dropout=0.9")
    told = [line.partition("warning: ")[2] for line in log.read_text().splitlines() if "no effect" in line]
    assert "train.temperature, train.optim.lr: no effect, inference does not read the section train." in log.read_text()
    assert "augment.mirror: no effect" in log.read_text() and "model.dropout 0.9 has no effect" in log.read_text()
    assert len(told) == 3


@pytest.mark.parametrize("name", ["model.pth", "model.onnx"])
def test_a_trained_model_takes_other_test_clips_and_no_other_input(tmp_path: Path, name: str) -> None:
    spec = make_action_spec(tmp_path, "inference")
    np.save(tmp_path / "clips.npy", make_clips(NUM_CLIPS, frames=23))
    spec["inference"]["checkpoint"] = str(write_model(tmp_path / name, build_checkpoint("uniform")))
    with_three = load(write_model(tmp_path / f"three_{name}", build_checkpoint("uniform", test_clips=3)))
    wanted = with_three.predict(make_clips(NUM_CLIPS, frames=23)).probabilities.max(axis=1)
    result = inference(spec, "input.test_clips=3", "input.sampling=crop_resize", "input.streams=[joint,bone]")
    found = [float(row["probability"]) for row in read_rows(result.files["results_csv"])]
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    plain = [float(row["probability"]) for row in read_rows(inference(spec).files["results_csv"])]
    assert np.abs(np.array(plain) - wanted).max() > 0.01, "or nothing is shown"
    told = [line for line in (tmp_path / "results/inference/log.txt").read_text().splitlines() if "no effect" in line]
    assert len(told) == 1 and "input.sampling crop_resize has no effect" in told[0]
    with pytest.raises(SpecError, match=r"input.test_clips: got 3, expected 1: .* trained with sampling none"):
        load(write_model(tmp_path / f"plain_{name}", build_checkpoint())).set_test_clips(3)


@pytest.mark.parametrize("options", [UNIFORM, CROPPED], ids=["uniform", "crop_resize"])
def test_test_clips_are_fixed_and_the_first_is_that_of_one(options: dict[str, Any]) -> None:
    clips = make_clips(4, frames=40)
    one = build_pipeline(InputSpec(**options), 3, LAYOUT)
    several = build_pipeline(InputSpec(**options, test_clips=4), 3, LAYOUT)
    made = list(several.make_test_clips(clips))
    np.testing.assert_array_equal(made[0], one(clips))
    np.testing.assert_array_equal(made[0], several(clips))
    assert len(made) == 4 and len(list(one.make_test_clips(clips))) == 1
    for number, own in enumerate(made):
        assert own.dtype == np.float32 and own.flags.c_contiguous and own.shape == made[0].shape
        assert all(np.abs(own - other).max() > 0.01 for other in made[:number])
        # The same for every clip and in every batch
        alone = list(several.make_test_clips(clips[2:3]))
        np.testing.assert_array_equal(alone[number][0], own[2])
    restored = InputPipeline.from_dict(json.loads(json.dumps(several.to_dict())))
    assert restored == several


def test_pipelines_of_before_have_one_test_clip() -> None:
    data = build_pipeline(InputSpec(**UNIFORM), 3, LAYOUT).to_dict()
    del data["options"]["test_clips"]
    assert InputPipeline.from_dict(data) == build_pipeline(InputSpec(**UNIFORM), 3, LAYOUT)


@pytest.mark.parametrize("sampling", ["none", "contiguous"])
def test_several_test_clips_need_a_sampling_that_varies(sampling: str) -> None:
    with pytest.raises(SpecError, match=r"input\.test_clips: got 2, expected 1 with sampling"):
        build_pipeline(InputSpec(sampling=sampling, test_clips=2), 3, LAYOUT)


def test_several_test_clips_are_named_as_an_obstacle_frame_by_frame(tmp_path: Path) -> None:
    pipeline = build_pipeline(InputSpec(**UNIFORM, test_clips=2), 3, LAYOUT)
    with pytest.raises(UserError) as caught:
        pipeline.start()
    assert {problem.where for problem in caught.value.problems} == {"input.sampling", "input.test_clips"}
    path = write_model(tmp_path / "model.pth", build_checkpoint("uniform", test_clips=2))
    with pytest.raises(UserError, match="looks at whole clips"):
        online.load(path, mode="step")
    clips = make_clips(2, frames=9)
    model = online.load(path, window_stride=1)
    probabilities, _ = model.step(clips[..., 0], model.start(2))
    np.testing.assert_allclose(probabilities, load(path).predict(clips).probabilities, atol=1e-6)


def test_a_network_that_fails_is_refused_with_test_clips_too(tmp_path: Path) -> None:
    checkpoint = build_checkpoint("uniform", test_clips=2)
    weights = {**checkpoint.state_dict, "fcn.bias": torch.full((4,), float("nan"))}
    write_checkpoint(tmp_path / "nan.pth", replace(checkpoint, state_dict=weights))
    with pytest.raises(UserError, match="logits that are NaN"):
        load(tmp_path / "nan.pth").predict(make_clips(1))
