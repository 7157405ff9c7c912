"""8 bits: calibration, the integers in the file, what runtimes make of it, and what the export action measures."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kinegraph.actions import export
from kinegraph.backends import BACKENDS
from kinegraph.backends.model_file import ModelFile
from kinegraph.errors import CheckpointError, DataError, ParityError, SpecError
from kinegraph.models.checkpoint import write_checkpoint
from kinegraph.models.folded import INPUT, FoldedNetwork, Layer, SumLayer
from kinegraph.models.quantization import Quantization
from kinegraph.onnx_quantized import FEWEST_CHANNELS, quantize_weight, write_quantized_form
from kinegraph.onnx_structure import RANGES_KEY, read_folded, read_model, rebuild
from kinegraph.quantize import calibrate
from kinegraph.runtime import load
from model_files import find_shared_folder, make_clips
from reference.folded_plain import Weights, apply_plainly, compute_plainly
from test_backends import find_absence, make_network


def make_folded(padding: str = "symmetric") -> FoldedNetwork:
    make = Weights(0, joints=6)
    layers: list[Layer] = [
        make.affine("norm", INPUT, 3),
        make.graph("g1", "norm", 3, 32, relu=True),
        make.temporal("t1", "g1", 32, 32, 5),
        SumLayer("s1", ("t1", "g1"), relu=True),
        make.graph("g2", "s1", 32, 48, relu=True),
        make.temporal("t2", "g2", 48, 48, 5, stride=2),
        make.temporal("way", "s1", 32, 48, 1, stride=2),
        SumLayer("s2", ("t2", "way"), relu=True),
        make.graph("g3", "s2", 48, 48),
        make.temporal("t3", "g3", 48, 32, 3, dilation=2, relu=True),
    ]
    return make.network(3, layers, padding=padding)  # type: ignore[arg-type]


def make_input(seed: int = 1, clips: int = 8) -> np.ndarray:
    return Weights(seed, 6).draw(clips, 3, 30, 6, 2)


def run(content: bytes, clips: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["fc_pred"], {"input": clips})[0])


def test_ranges_are_the_least_and_largest_values_of_all_batches() -> None:
    network, clips = make_folded(), make_input()
    ranges = calibrate(network, [clips[:3], clips[3:]]).activation_ranges
    results = {INPUT: clips.astype(np.float64).transpose(0, 4, 2, 3, 1)}
    for layer in network.layers:
        y = apply_plainly(layer, [results[name] for name in layer.inputs], causal=False)
        results[layer.name] = np.maximum(y, 0) if layer.relu else y
    mixed = np.einsum("nmtvc,kvw->nmtkwc", results["s1"], network.layers[4].adjacency)  # type: ignore[attr-defined]
    results["g2/mixed"] = mixed
    assert set(results) <= set(ranges)
    assert set(ranges) - set(results) == {"g1/mixed", "g3/mixed"}
    for name, values in results.items():
        expected = (min(values.min(), 0), max(values.max(), 0))
        np.testing.assert_allclose(ranges[name], expected, rtol=1e-4, atol=1e-4)


def test_calibration_of_a_failed_training_is_refused() -> None:
    network = make_folded()
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        calibrate(replace(network, layers=network.layers[:2]), [np.full((1, 3, 4, 6, 1), np.inf, np.float32)])


@given(st.floats(-1e6, 0), st.floats(0, 1e6))
def test_a_scale_meets_zero_and_both_ends(low: float, high: float) -> None:
    scale, zero_point = Quantization({"x": (low, high)}).find_scale("x")
    assert scale > 0
    assert 0 <= zero_point <= 255
    assert (0 - zero_point) * scale <= low + 0.51 * scale
    assert (255 - zero_point) * scale >= high - 0.51 * scale


@given(hnp.arrays(np.float32, (4, 3, 5, 1), elements=st.floats(-100, 100, width=32)))
def test_integers_of_weights_lose_no_more_than_rounding_by_the_largest(weight: np.ndarray) -> None:
    integers, scale = quantize_weight(weight)
    assert integers.dtype == np.int8
    assert np.abs(integers.astype(int)).max() <= 127
    steps = np.maximum(np.abs(weight).max(axis=(1, 2, 3)), 1e-12)[:, None, None, None] / 127
    plain = np.rint(weight / steps) * steps
    error = np.square(integers * scale[:, None, None, None] - weight.astype(np.float64)).sum(axis=(1, 2, 3))
    assert (error <= np.square(plain - weight).sum(axis=(1, 2, 3)) * 1.001 + 1e-6).all()


@pytest.mark.parametrize("padding", ["symmetric", "causal"])
def test_answers_in_8_bits_are_near(padding: str) -> None:
    network = make_folded(padding)
    content = write_quantized_form(network, calibrate(network, [make_input()]))
    clips = make_input(2)
    expected, _ = compute_plainly(network, clips)
    error = run(content, clips) - expected
    assert np.abs(error).max() > 1e-4, "nothing was rounded"
    assert np.sqrt(np.mean(error**2)) < 0.05 * np.sqrt(np.mean(expected**2))


def test_onnxruntime_computes_with_integers(tmp_path: Path) -> None:
    """All convolutions of enough channels become integer ones; only that of the three input channels stays."""
    network = make_folded()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    content = write_quantized_form(network, calibrate(network, [make_input()]))
    onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    operators = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert operators.count("QLinearConv") == 6
    assert sum(operators.count(name) for name in ("Conv", "FusedConv")) == 1
    assert FEWEST_CHANNELS > 3


def test_the_network_and_its_ranges_are_read_back() -> None:
    network = make_folded()
    quantization = calibrate(network, [make_input()])
    restored, ranges = rebuild(read_model(write_quantized_form(network, quantization)), "model")
    assert restored is not None
    assert ranges is not None
    names = {INPUT, *(layer.name for layer in network.layers)}
    assert ranges.activation_ranges == {name: quantization.activation_ranges[name] for name in names}
    for one, other in zip(restored.layers, network.layers, strict=True):
        assert (one.name, one.inputs, one.relu) == (other.name, other.inputs, other.relu)
        if one.name in ("t1", "t2", "t3"):
            weight = other.weight.transpose(2, 1, 0)  # type: ignore[attr-defined]
            integers, scale = quantize_weight(weight)
            expected = (integers * scale[:, None, None]).transpose(2, 1, 0)
            np.testing.assert_allclose(one.weight, expected, rtol=1e-6)  # type: ignore[attr-defined]
            np.testing.assert_array_equal(one.bias, other.bias)  # type: ignore[attr-defined]
    np.testing.assert_array_equal(restored.layers[1].weight, network.layers[1].weight)  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", ["[]", "{}", '{"input": [0, 1]}', "nonsense", '{"input": [1, 0, 2]}', "[" * 100_000])
def test_damaged_ranges_are_refused(text: str) -> None:
    network = make_folded()
    proto = onnx.load_from_string(write_quantized_form(network, calibrate(network, [make_input()])))
    next(entry for entry in proto.metadata_props if entry.key == RANGES_KEY).value = text
    with pytest.raises(CheckpointError, match=r"damaged kinegraph\.activation_ranges"):
        rebuild(proto, "model")


@cache
def find_data() -> Path:
    """A folder with a checkpoint, training clips, and labels that are the answers of the network in float32."""
    folder = find_shared_folder() / "quantize"
    folder.mkdir()
    write_checkpoint(folder / "m.pth", make_network("EF-GCN"))
    for name, seed in (("train", 1), ("test", 2)):
        np.save(folder / f"{name}.npy", make_clips(40, seed=seed, frames=16))
        labels = load(folder / "m.pth", "torch").predict(make_clips(40, seed=seed, frames=16)).labels
        (folder / f"{name}.json").write_text(json.dumps(labels.tolist()))
    return folder


def make_spec(folder: Path, **options: Any) -> dict[str, Any]:
    data = find_data()
    own = {
        "checkpoint": str(data / "m.pth"),
        "onnx_file": str(folder / "m.onnx"),
        "quantize": "int8",
        "calibration_dataset": {"data_path": str(data / "train.npy")},
        "max_accuracy_loss": 100,
    }
    return {"results_dir": str(folder / "results"), "export": {**own, **options}}


@pytest.fixture(params=["onnxruntime", "openvino", "native"])
def backend(request: pytest.FixtureRequest) -> str:
    if find_absence(request.param):
        pytest.skip(find_absence(request.param))
    return str(request.param)


@cache
def find_exported() -> Path:
    return Path(export(make_spec(find_data())).files["onnx"])


def test_every_backend_answers_nearly_as_in_float32(backend: str) -> None:
    clips = make_clips(40, seed=2, frames=16)
    expected = load(find_data() / "m.pth", "torch").logits(clips)
    error = load(find_exported(), backend).logits(clips) - expected
    assert np.sqrt(np.mean(error**2)) < 0.05 * np.sqrt(np.mean(expected**2))
    assert np.abs(error).max() > 1e-4 * np.abs(expected).max(), "nothing was rounded"


def test_the_file_says_its_ranges_to_other_backends() -> None:
    file = ModelFile(find_exported(), "onnx")
    assert file.quantization is not None
    assert set(BACKENDS) >= {"native"}
    network = read_folded(find_exported())
    assert network is not None
    assert set(file.quantization.activation_ranges) == {INPUT, *(layer.name for layer in network.layers)}


def test_loss_is_measured_on_the_labels_that_are_given(tmp_path: Path) -> None:
    data = find_data()
    test = {"data_path": str(data / "test.npy"), "label_path": str(data / "test.json")}
    result = export(make_spec(tmp_path, quantization_test_dataset=test))
    report = json.loads(Path(result.files["quantization"]).read_text())
    assert Path(result.files["quantization"]) == tmp_path / "m.quantization.json"
    assert json.loads(Path(result.files["export"]).read_text())["quantization"] == report
    clips = np.load(data / "test.npy")
    labels = np.array(json.loads((data / "test.json").read_text()))
    correct = 100 * np.mean(load(result.files["onnx"], "onnxruntime").predict(clips).labels == labels)
    assert report["accuracy_float"] == 100, "the labels are its own answers"
    assert report["accuracy_int8"] == pytest.approx(correct)
    assert report["accuracy_loss"] == result.metrics["accuracy_loss"] == pytest.approx(100 - correct)
    assert report["changed"] == pytest.approx(100 - correct)
    assert (report["num_clips"], report["is_calibration"]) == (40, False)
    assert 0 < report["relative_error"] < 0.05
    assert (tmp_path / "m.onnx").stat().st_size == result.metrics["size_bytes"]


def test_without_labels_answers_that_change_are_counted_on_the_calibration_clips(tmp_path: Path) -> None:
    result = export(make_spec(tmp_path, calibration_clips=10))
    report = json.loads(Path(result.files["quantization"]).read_text())
    assert (report["accuracy_float"], report["accuracy_int8"]) == (None, None)
    assert (report["num_clips"], report["is_calibration"]) == (10, True)
    assert report["accuracy_loss"] == report["changed"]


def label_answers(options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The same options, with the answers in float32 as the labels of the test clips."""
    clips = options["quantization_test_dataset"]["data_path"]
    labels = load(options["checkpoint"], "torch").predict(np.load(clips)).labels
    (folder / "near.json").write_text(json.dumps(labels.tolist()))
    return {**options, "quantization_test_dataset": {"data_path": clips, "label_path": str(folder / "near.json")}}


def test_a_larger_loss_is_refused_unless_forced(tmp_path: Path) -> None:
    """Clips so near the border between two classes that 8 bits change some of the answers."""
    step = np.linspace(-1, 1, 64, dtype=np.float32)[:, None, None, None, None] * 1e-3
    near = np.load(find_data() / "train.npy")[:1] * (1 + step)
    np.save(tmp_path / "near.npy", near)
    checkpoint = make_network("EF-GCN")
    weights = dict(checkpoint.state_dict)
    weights["fcn.weight"] = weights["fcn.weight"] * torch.tensor([1.0, 0, 0, 0])[:, None]
    # The second class is always zero: the median of the first becomes the border
    middle = float(np.median(load(find_data() / "m.pth", "torch").logits(near)[:, 0])) - float(weights["fcn.bias"][0])
    weights["fcn.bias"] = torch.tensor([-middle, 0.0, -1e3, -1e3])
    write_checkpoint(tmp_path / "m.pth", replace(checkpoint, state_dict=weights))
    own = {"checkpoint": str(tmp_path / "m.pth"), "max_accuracy_loss": 0.5}
    own["quantization_test_dataset"] = {"data_path": str(tmp_path / "near.npy")}
    labels = load(tmp_path / "m.pth", "torch").predict(near * (1 + step)).labels
    assert len(set(labels.tolist())) == 2, "the border must lie among the clips"
    told = (
        r"another class for .* percent of the clips \(no labels were given\) in 8 bits, expected at most 0\.5 percent"
    )
    with pytest.raises(ParityError, match=told):
        export(make_spec(tmp_path, **own))
    with pytest.raises(ParityError, match=r"a loss of accuracy of .* percent in 8 bits, expected at most 0\.5 percent"):
        export(make_spec(tmp_path, **label_answers(own, tmp_path)))
    assert not (tmp_path / "m.onnx").exists()
    assert not (tmp_path / "m.quantization.json").exists()
    result = export(make_spec(tmp_path, **own), "export.force=true")
    assert result.metrics["accuracy_loss"] > 0.5


def test_the_name_without_onnx_file(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m.pth", make_network("EF-GCN"))
    result = export(make_spec(tmp_path, checkpoint=str(tmp_path / "m.pth"), onnx_file=""))
    assert Path(result.files["onnx"]) == tmp_path / "m_int8.onnx"


def test_calibration_clips_are_demanded_and_checked(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"export\.calibration_dataset\.data_path: got nothing"):
        export(make_spec(tmp_path, calibration_dataset={}))
    np.save(tmp_path / "wrong.npy", np.zeros((2, 3, 8, 16, 1), np.float32))
    with pytest.raises(DataError, match="16 joints"):
        export(make_spec(tmp_path, calibration_dataset={"data_path": str(tmp_path / "wrong.npy")}))
    assert not (tmp_path / "m.onnx").exists()
