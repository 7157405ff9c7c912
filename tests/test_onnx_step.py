"""Step form against the definition restated frame by frame, and against the network that sees the whole clip."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from kinegraph.actions import export
from kinegraph.errors import CheckpointError, ParityError, SpecError, UserError
from kinegraph.export_parity import check_step_parity
from kinegraph.models.folded import (
    INPUT,
    AffineLayer,
    ConcatenationLayer,
    FoldedNetwork,
    GraphConvolutionLayer,
    Layer,
    SumLayer,
    TemporalConvolutionLayer,
    TemporalMaximumLayer,
)
from kinegraph.online.onnx_steps import INITIAL, STEP_KEY
from kinegraph.onnx_graph import MIN_OPSET
from kinegraph.onnx_step import describe_step, write_step_form
from kinegraph.runtime import load
from model_files import CLASS_NAMES, write_model
from reference.folded_plain import Weights, apply_plainly, compute_plainly
from test_onnx_graph import NEWEST_OF_ONNXRUNTIME


def make_network(padding: str, seed: int = 0) -> FoldedNetwork:
    """Every kind of layer, two strides, a dilation, and branches that wait for one another."""
    make = Weights(seed, joints=4)
    layers: list[Layer] = [
        make.affine("norm", INPUT, 3),
        make.graph("g1", "norm", 3, 8, relu=True),
        make.temporal("t1", "g1", 8, 8, 5),
        SumLayer("s1", ("t1", "g1"), relu=True),
        make.graph("g2", "s1", 8, 6, subsets=2, relu=True),
        make.temporal("t2", "g2", 6, 6, 5, stride=2, dilation=2),
        make.temporal("way", "s1", 8, 6, 1, stride=2),
        SumLayer("s2", ("t2", "way"), relu=True),
        make.temporal("b1", "s2", 6, 4, 3, dilation=2),
        TemporalMaximumLayer("b2", ("s2",), size=3),
        ConcatenationLayer("joined", ("b1", "b2", "s2"), relu=True),
        TemporalMaximumLayer("halved", ("joined",), size=5, stride=2),
        make.temporal("last", "halved", 16, 10, 3, stride=1, relu=True),
    ]
    return make.network(3, layers, padding=padding)  # type: ignore[arg-type]


class Driver:
    """What a program does with a file in step form, from its metadata alone."""

    def __init__(self, content: bytes, num_people: int) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        self.session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        self.step = json.loads(self.session.get_modelmeta().custom_metadata_map[STEP_KEY], parse_constant=pytest.fail)
        self.names = [output.name for output in self.session.get_outputs()]
        self.count = 0
        self.state = {
            entry["input"]: np.full((num_people, *entry["shape"]), INITIAL[entry["initial"]], np.float32)
            for entry in self.step["states"]
        }

    def __call__(self, frame: np.ndarray) -> np.ndarray | None:
        phase = np.array(self.count % self.step["total_stride"], np.int64)
        result = dict(
            zip(self.names, self.session.run(None, {"frame": frame, "phase": phase, **self.state}), strict=True)
        )
        self.state = {entry["input"]: result[entry["output"]] for entry in self.step["states"]}
        self.count += 1
        if not result["is_new"]:
            assert result["logits"].shape == (len(frame), 3)
            assert not result["logits"].any()
            return None
        return np.asarray(result["logits"])


def step_plainly(network: FoldedNetwork, clip: np.ndarray) -> dict[int, np.ndarray]:
    """Number of the frame -> logits, by the definition: every layer keeps all its results, as (frame, values)."""
    timings = {INPUT: (1, 0)}
    last = network.layers[-1].name
    results: dict[str, list[np.ndarray]] = {name: [] for name in (INPUT, *(layer.name for layer in network.layers))}
    answers = {}
    for n in range(clip.shape[2]):
        results[INPUT].append(clip[:, :, n].transpose(0, 2, 1).astype(np.float64))  # (N, V, C)
        for layer in network.layers:
            stride, reach = timings[layer.inputs[0]][0], max(timings[name][1] for name in layer.inputs)
            symmetric = network.padding == "symmetric"
            if isinstance(layer, TemporalConvolutionLayer):
                reach += (len(layer.weight) // 2) * layer.dilation * stride * symmetric
                stride *= layer.stride
            elif isinstance(layer, TemporalMaximumLayer):
                reach += (layer.size // 2) * stride * symmetric
                stride *= layer.stride
            timings[layer.name] = (stride, reach)
            if (n - reach) % stride:
                continue
            results[layer.name].append(evaluate_plainly(layer, results, timings))
        if (n - timings[last][1]) % timings[last][0] == 0:
            answers[n] = results[last][-1].mean(axis=1) @ network.head_weight.astype(np.float64) + network.head_bias
    return answers


def evaluate_plainly(
    layer: Layer, results: dict[str, list[np.ndarray]], timings: dict[str, tuple[int, int]]
) -> np.ndarray:
    """The next result of a layer (N, V, C')."""
    source = results[layer.inputs[0]]
    nothing = np.zeros_like(source[0])
    if isinstance(layer, TemporalConvolutionLayer):
        taps = len(layer.weight)
        kept = [nothing] * ((taps - 1) * layer.dilation) + source
        y = sum(kept[-1 - (taps - 1 - i) * layer.dilation] @ layer.weight[i].astype(np.float64) for i in range(taps))
        y = y + layer.bias
    elif isinstance(layer, TemporalMaximumLayer):
        y = np.max(source[-layer.size :], axis=0)
    elif isinstance(layer, SumLayer | ConcatenationLayer):
        stride, reach = timings[layer.name]
        delayed = []
        for name in layer.inputs:
            lag = (reach - timings[name][1]) // stride
            delayed.append(results[name][-1 - lag] if len(results[name]) > lag else np.zeros_like(results[name][0]))
        y = sum(delayed) if isinstance(layer, SumLayer) else np.concatenate(delayed, axis=2)
    else:
        assert isinstance(layer, AffineLayer | GraphConvolutionLayer)
        y = apply_plainly(layer, [source[-1][:, None, None]], causal=True)[:, 0, 0]
    return np.maximum(y, 0) if layer.relu else np.asarray(y)


@pytest.mark.parametrize("padding", ["symmetric", "causal"])
@pytest.mark.parametrize("opset_version", [MIN_OPSET, 18, NEWEST_OF_ONNXRUNTIME])
def test_steps_are_those_of_the_definition(padding: str, opset_version: int) -> None:
    network = make_network(padding)
    clip = Weights(1, 4).draw(3, 3, 60, 4)
    expected = step_plainly(network, clip)
    driver = Driver(write_step_form(network, opset_version), 3)
    answers = {n: answer for n in range(60) if (answer := driver(clip[:, :, n])) is not None}
    assert list(answers) == list(expected)
    assert len(answers) >= 14
    for n, answer in answers.items():
        np.testing.assert_allclose(answer, expected[n], atol=1e-4)


def test_causal_steps_add_up_to_the_network_on_every_prefix() -> None:
    """The mean of the logits so far is what the network answers on frames 0 to n."""
    network = make_network("causal", seed=3)
    clip = Weights(4, 4).draw(2, 3, 41, 4)
    driver = Driver(write_step_form(network), 2)
    logits = []
    for n in range(41):
        answer = driver(clip[:, :, n])
        logits += [] if answer is None else [answer]
        expected, _ = compute_plainly(network, clip[:, :, : n + 1, :, None])
        np.testing.assert_allclose(np.mean(logits, axis=0), expected, atol=1e-4)


def test_symmetric_steps_are_the_inside_of_the_network() -> None:
    network = make_network("symmetric", seed=5)
    clip = Weights(6, 4).draw(2, 3, 90, 4)
    _, features = compute_plainly(network, clip[..., None])
    expected = features[:, 0].mean(axis=2) @ network.head_weight + network.head_bias  # (N, T', classes)
    driver = Driver(write_step_form(network), 2)
    stride, delay, first = (driver.step[key] for key in ("total_stride", "delay_frames", "first_valid_frame"))
    assert (stride, first) == (4, 2 * delay)
    compared = 0
    for n in range(90):
        answer = driver(clip[:, :, n])
        if answer is not None and n >= first:
            np.testing.assert_allclose(answer, expected[:, (n - delay) // stride], atol=1e-4)
            compared += 1
    assert compared >= 5


def test_people_do_not_influence_each_other_and_state_is_a_value() -> None:
    network = make_network("causal")
    clip = Weights(7, 4).draw(3, 3, 12, 4)
    content = write_step_form(network)
    together, alone = Driver(content, 3), Driver(content, 1)
    for n in range(12):
        before = {name: values.copy() for name, values in together.state.items()}
        kept = together.state
        all_of_them, one = together(clip[:, :, n]), alone(clip[1:2, :, n])
        assert all(np.array_equal(before[name], kept[name]) for name in before)
        if all_of_them is not None:
            assert one is not None
            np.testing.assert_allclose(all_of_them[1:2], one, atol=1e-5)


def test_metadata_say_what_a_driver_needs() -> None:
    network = make_network("symmetric")
    step = describe_step(network)
    assert step["version"] == 1
    # 2 (t1), then 4 frames of dilation, then steps of 2 frames: 2 * 2, steps of 2: 2 * 2, steps of 4: 4
    assert step["delay_frames"] == 2 + 4 + 4 + 4 + 4
    assert step["total_stride"] == 4
    assert (step["num_channels"], step["num_joints"], step["padding"]) == (3, 4, "symmetric")
    shapes = {entry["input"]: (entry["shape"], entry["initial"]) for entry in step["states"]}
    assert shapes["state.t2"] == ([4, 8, 6], "zero")
    assert shapes["state.b2"] == ([4, 2, 6], "minus_infinity")
    assert shapes["state.s1/1"] == ([4, 2, 8], "zero")
    assert "state.g1" not in shapes
    proto = onnx.load_from_string(write_step_form(network))
    assert {item.name for item in proto.graph.input} == {"frame", "phase", *shapes}
    outputs = {entry["output"] for entry in step["states"]}
    assert {item.name for item in proto.graph.output} == {"logits", "is_new", *outputs}
    assert sum(node.op_type == "If" for node in proto.graph.node) == 2


def test_branches_that_cannot_meet_are_refused() -> None:
    make = Weights(0, 4)
    layers: list[Layer] = [
        make.temporal("a", INPUT, 3, 4, 3, stride=2),
        make.temporal("b", INPUT, 3, 4, 1, stride=2),
        SumLayer("s", ("a", "b")),
    ]
    with pytest.raises(UserError, match="layer s"):
        write_step_form(make.network(3, layers))


def test_a_file_that_answers_otherwise_is_found() -> None:
    network = make_network("symmetric")
    assert check_step_parity(network, write_step_form(network)).max_relative_error < 1e-4
    other = replace(network, head_bias=network.head_bias + 0.1)
    with pytest.raises(ParityError, match="relative error"):
        check_step_parity(network, write_step_form(other))


def make_spec(folder: Path, **options: Any) -> dict[str, Any]:
    own = {"checkpoint": str(write_model(folder)), "form": "step", **options}
    return {"results_dir": str(folder / "results"), "export": own}


def test_export_in_step_form(tmp_path: Path) -> None:
    result = export(make_spec(tmp_path))
    assert Path(result.files["onnx"]) == tmp_path / "model_step.onnx"
    assert result.metrics["max_relative_error"] <= 1e-4
    metadata = {entry.key: json.loads(entry.value) for entry in onnx.load(result.files["onnx"]).metadata_props}
    assert metadata["kinegraph.class_names"] == CLASS_NAMES
    assert metadata["kinegraph.step"]["total_stride"] == 4
    assert metadata["kinegraph.step"]["delay_frames"] == 76
    with pytest.raises(CheckpointError, match=r"a model in step form.*kinegraph\.online"):
        load(result.files["onnx"])


def test_step_form_in_8_bits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"export\.quantize: got int8 with export\.form=step"):
        export(make_spec(tmp_path, quantize="int8"))
