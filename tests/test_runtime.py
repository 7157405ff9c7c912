from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import kinegraph
from golden_weights import golden_input, golden_state_dict
from kinegraph.data.pipeline import InputPipeline
from kinegraph.errors import CheckpointError, DataError, UserError
from kinegraph.models import build_model
from kinegraph.models.checkpoint import write_checkpoint
from kinegraph.runtime import METADATA_PREFIX, ModelDescription, Predictor, describe_checkpoint, load, softmax
from kinegraph.skeleton.layouts import LAYOUTS
from kinegraph.spec import ModelSpec
from model_files import (
    CLASS_NAMES,
    LABEL_MAP,
    NUM_JOINTS,
    find_exported,
    find_model,
    make_checkpoint,
    make_clips,
    write_foreign,
    write_model,
)

TOLERANCE = {"rtol": 1e-3, "atol": 1e-3}


def write_onnx(path: Path, shape: list, num_classes: int | str = 2, metadata: dict[str, str] | None = None) -> Path:
    """A foreign ONNX file whose logits are the means over T, V, M of the first two channels."""
    helper = onnx.helper
    nodes = [
        helper.make_node("Slice", ["clips", "start", "stop", "axis"], ["two"]),
        helper.make_node("ReduceMean", ["two"], ["mean"], axes=[2, 3, 4], keepdims=0),
    ]
    constants = [
        onnx.numpy_helper.from_array(np.array([value], np.int64), name)
        for name, value in (("start", 0), ("stop", 2), ("axis", 1))
    ]
    graph = helper.make_graph(
        nodes,
        "means",
        [helper.make_tensor_value_info("clips", onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("mean", onnx.TensorProto.FLOAT, [shape[0], num_classes])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    helper.set_model_props(model, metadata or {})
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module", params=["torch", "onnx"])
def predictor(request: pytest.FixtureRequest) -> Predictor:
    return load(find_model() if request.param == "torch" else find_exported())


def test_golden_logits_through_the_public_reader(shared: Path, tmp_path: Path) -> None:
    cases = json.loads((shared / "golden" / "model_logits.json").read_text())
    assert len(cases) == 4
    for case in cases:
        options = ModelSpec(
            graph_layout=case["layout"],
            graph_strategy=case["strategy"],
            edge_importance_weighting=case["edge_importance_weighting"],
            input_channels=case["shape"][1],
        )
        model = build_model(options, LAYOUTS[case["layout"]], case["num_classes"])
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        assert len(shapes) == case["keys"]
        weights = golden_state_dict(shapes, np.array(case["adjacency"]))
        path = tmp_path / "plain.pth"
        torch.save({name: torch.from_numpy(np.array(value)) for name, value in weights.items()}, path)
        predictor = load(path)
        assert predictor.layout == LAYOUTS[case["layout"]]
        assert predictor.num_classes == case["num_classes"]
        np.testing.assert_allclose(predictor.logits(golden_input(case["shape"])), case["logits"], rtol=0, atol=1e-4)


def test_predictor_says_what_the_model_is(predictor: Predictor) -> None:
    assert predictor.class_names == CLASS_NAMES
    assert predictor.label_map == LABEL_MAP
    assert predictor.layout == LAYOUTS["coco"]
    assert predictor.pipeline == InputPipeline(3, NUM_JOINTS)
    assert predictor.num_classes == 4
    assert predictor.metadata["model"]["graph_strategy"] == "spatial"
    assert "pretrained_model_path" not in predictor.metadata["model"]
    assert predictor.metadata["model_name"] == "test_model"
    assert set(predictor.metadata["versions"]) == {"kinegraph", "torch", "python"}
    assert predictor.metadata["metrics"]["val_acc"] == 0.5


def test_both_backends_answer_alike() -> None:
    clips = make_clips(23)
    first, second = load(find_model()).predict(clips), load(find_exported()).predict(clips)
    assert set(first.class_names) == set(CLASS_NAMES), "every class must occur, or the comparison says little"
    assert first.class_names == second.class_names
    assert first.labels.tolist() == second.labels.tolist()
    np.testing.assert_allclose(first.probabilities, second.probabilities, **TOLERANCE)


def test_names_labels_and_probabilities_belong_together(predictor: Predictor) -> None:
    predictions = predictor.predict(make_clips(9))
    assert predictions.probabilities.shape == (9, 4)
    np.testing.assert_allclose(predictions.probabilities.sum(1), 1)
    assert predictions.labels.tolist() == predictions.probabilities.argmax(1).tolist()
    assert predictions.class_names == [CLASS_NAMES[label] for label in predictions.labels]


@pytest.mark.parametrize("batch_size", [1, 2, 7, 100])
def test_batch_size_changes_nothing(predictor: Predictor, batch_size: int) -> None:
    clips = make_clips(7)
    logits = predictor.logits(clips, batch_size)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, predictor.logits(clips), **TOLERANCE)


def test_clips_do_not_influence_each_other(predictor: Predictor) -> None:
    clips = make_clips(5)
    order = [3, 0, 4, 2, 1]
    np.testing.assert_allclose(predictor.logits(clips[order]), predictor.logits(clips)[order], **TOLERANCE)


@pytest.mark.parametrize(("frames", "people"), [(1, 1), (7, 3), (31, 2)])
def test_any_length_and_number_of_people(predictor: Predictor, frames: int, people: int) -> None:
    clips = make_clips(3, frames=frames, people=people)
    np.testing.assert_allclose(predictor.logits(clips), load(find_model()).logits(clips), **TOLERANCE)


def test_one_clip_and_no_clips(predictor: Predictor) -> None:
    clips = make_clips(2)
    one = predictor.predict(clips[0])
    np.testing.assert_allclose(one.probabilities, predictor.predict(clips[:1]).probabilities, **TOLERANCE)
    none = predictor.predict(clips[:0])
    assert none.class_names == []
    assert none.probabilities.shape == (0, 4)


def test_other_dtypes_and_strides_are_taken(predictor: Predictor) -> None:
    clips = make_clips(3)
    expected = predictor.logits(clips)
    np.testing.assert_allclose(predictor.logits(clips.astype(np.float64)), expected, **TOLERANCE)
    np.testing.assert_allclose(predictor.logits(np.asfortranarray(clips)), expected, **TOLERANCE)
    clips.flags.writeable = False
    np.testing.assert_allclose(predictor.logits(clips), expected, **TOLERANCE)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda clips: clips[:, :2], "2 channels"),
        (lambda clips: clips[:, :, :, :16], "16 joints"),
        (lambda clips: clips[..., 0], "add the axis of people"),
        (lambda clips: clips[0, 0], "3 axes"),
        (lambda clips: np.where(clips > 1, np.nan, clips), "NaN"),
        (lambda clips: clips[:0, :2], "2 channels"),
        (lambda clips: clips[:, :, :0], "at least one frame"),
    ],
)
def test_clips_that_do_not_fit_are_refused(predictor: Predictor, change, words: str) -> None:
    with pytest.raises(DataError, match=words):
        predictor.predict(change(make_clips(4)))


def test_batch_size_0_is_refused(predictor: Predictor) -> None:
    with pytest.raises(UserError, match="batch_size: got 0"):
        predictor.predict(make_clips(1), batch_size=0)


@given(hnp.arrays(np.float64, (3, 4), elements=st.floats(-1e300, 1e300)))
def test_softmax_agrees_with_plain_arithmetic_and_never_overflows(logits: np.ndarray) -> None:
    probabilities = softmax(logits)
    assert np.isfinite(probabilities).all()
    for row, got in zip(logits.tolist(), probabilities.tolist(), strict=True):
        powers = [np.exp(np.float64(value) - max(row)) for value in row]
        np.testing.assert_allclose(got, [power / sum(powers) for power in powers], atol=1e-15)


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("label_map", [None, LABEL_MAP])
def test_foreign_checkpoint(tmp_path: Path, prefix: str, label_map: dict[str, int] | None) -> None:
    predictor = load(write_foreign(tmp_path, prefix, label_map))
    assert predictor.label_map == label_map
    assert predictor.class_names == (CLASS_NAMES if label_map else ["class_0", "class_1", "class_2", "class_3"])
    assert predictor.layout == LAYOUTS["coco"]
    clips = make_clips(4)
    np.testing.assert_array_equal(predictor.logits(clips), load(find_model()).logits(clips))


def test_classes_of_a_foreign_model_can_be_named(tmp_path: Path) -> None:
    predictor = load(write_foreign(tmp_path))
    predictor.name_classes(LABEL_MAP)
    assert predictor.predict(make_clips(5)).class_names == load(find_model()).predict(make_clips(5)).class_names
    with pytest.raises(UserError, match="labels 0 to 3"):
        predictor.name_classes({"a": 0, "b": 1})


def test_encrypted_checkpoint_needs_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KINEGRAPH_ENCRYPTION_KEY", raising=False)
    path = write_model(tmp_path, "secret.pth", key="right")
    clips = make_clips(2)
    expected = load(find_model()).logits(clips)
    with pytest.raises(CheckpointError, match="no key"):
        load(path)
    with pytest.raises(CheckpointError, match="wrong key"):
        load(path, key="wrong")
    np.testing.assert_array_equal(load(path, key="right").logits(clips), expected)
    monkeypatch.setenv("KINEGRAPH_ENCRYPTION_KEY", "right")
    np.testing.assert_array_equal(load(path).logits(clips), expected)


@pytest.mark.parametrize("name", ["model.onnx", "model.pth"])
@pytest.mark.parametrize("content", [b"", b"\x00\x01\x02 not a model", None])
def test_unreadable_files_are_refused(tmp_path: Path, name: str, content: bytes | None) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        load(path)


def test_truncated_onnx_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.onnx"
    path.write_bytes(find_exported().read_bytes()[:-20000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(path)


def test_unknown_ending_and_backend_name_the_choices(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"got '\.h5', expected one of .*\.pth.*\.onnx"):
        load(tmp_path / "model.h5")
    with pytest.raises(UserError, match="Did you mean 'onnxruntime'"):
        load(find_model(), backend="onnxruntim")


def test_backend_can_be_named_where_the_ending_says_nothing(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(find_model().read_bytes())
    assert load(path, backend="torch").class_names == CLASS_NAMES


def test_gpu_for_onnx_is_refused() -> None:
    with pytest.raises(UserError, match="run on the CPU"):
        load(find_exported(), device="cuda")


def test_foreign_onnx_takes_its_sizes_from_the_input(tmp_path: Path) -> None:
    predictor = load(write_onnx(tmp_path / "m.onnx", ["n", 3, 5, 17, 1]))
    assert predictor.class_names == ["class_0", "class_1"]
    assert predictor.pipeline == InputPipeline(3, 17)
    assert (predictor.layout, predictor.label_map, predictor.metadata) == (None, None, {})
    clips = make_clips(4, frames=5, people=1)
    np.testing.assert_allclose(predictor.logits(clips, 3), clips[:, :2].mean((2, 3, 4)), rtol=1e-5, atol=1e-6)
    with pytest.raises(DataError, match=r"6 frames in shape .* expected 5 frames, fixed in the model"):
        predictor.logits(make_clips(1, frames=6, people=1))


def test_foreign_onnx_with_a_fixed_batch_takes_any_number_of_clips(tmp_path: Path) -> None:
    predictor = load(write_onnx(tmp_path / "m.onnx", [4, 3, "t", 17, "m"]))
    clips = make_clips(10)
    np.testing.assert_allclose(predictor.logits(clips, 7), clips[:, :2].mean((2, 3, 4)), rtol=1e-5, atol=1e-6)


def test_foreign_onnx_with_free_axes_is_still_checked_for_nan(tmp_path: Path) -> None:
    predictor = load(write_onnx(tmp_path / "m.onnx", ["n", "c", "t", "v", "m"]))
    assert predictor.pipeline is None
    clips = make_clips(3)
    np.testing.assert_allclose(predictor.logits(clips), clips[:, :2].mean((2, 3, 4)), rtol=1e-5, atol=1e-6)
    clips[1, 0, 0, 0, 0] = np.inf
    with pytest.raises(DataError, match="1 infinite"):
        predictor.logits(clips)


@pytest.mark.parametrize(
    ("shape", "num_classes", "words"),
    [(["n", 3, 5, 17], 2, "one float32 input"), (["n", "c", 5, 17, 1], "k", "fixed number of classes")],
)
def test_onnx_of_another_kind_is_refused(tmp_path: Path, shape: list, num_classes: int | str, words: str) -> None:
    path = tmp_path / "m.onnx"
    if len(shape) == 5:
        write_onnx(path, shape, num_classes)
    else:
        node = onnx.helper.make_node("Identity", ["x"], ["y"])
        values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in "xy"]
        graph = onnx.helper.make_graph([node], "g", values[:1], values[1:])
        onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8), path)
    with pytest.raises(CheckpointError, match=words):
        load(path)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("format_version", "7", "metadata version 7"),
        ("num_classes", '"four"', "damaged metadata"),
        ("num_classes", "99999999999", "damaged metadata"),
        ("label_map", '["a"]', "damaged metadata"),
        ("label_map", '{"a": "0"}', "damaged metadata"),
        ("layout", '{"name": "x"}', "damaged metadata"),
        ("temperature", "0", "damaged metadata"),
        ("temperature", "NaN", "damaged metadata"),
        ("temperature", '"1"', "damaged metadata"),
        ("pipeline", '{"version": 1}', "damaged metadata"),
        ("model", "{", "damaged metadata"),
        ("model", "[" * 100_000, "damaged metadata"),
    ],
)
def test_damaged_metadata_is_refused(tmp_path: Path, key: str, value: str, words: str) -> None:
    metadata = describe_checkpoint(make_checkpoint(), "model.pth").to_metadata()
    assert METADATA_PREFIX + key in metadata
    metadata[METADATA_PREFIX + key] = value
    path = write_onnx(tmp_path / "m.onnx", ["n", 3, "t", 17, "m"], 2, metadata)
    with pytest.raises(CheckpointError, match=words):
        load(path)


def test_metadata_that_promises_other_classes_than_the_graph_gives_is_refused(tmp_path: Path) -> None:
    metadata = describe_checkpoint(make_checkpoint(), "model.pth").to_metadata()
    path = write_onnx(tmp_path / "m.onnx", ["n", 3, "t", 17, "m"], 2, metadata)
    with pytest.raises(CheckpointError, match=r"logits of shape \(1, 2\)"):
        load(path).predict(make_clips(1))


def test_description_survives_metadata() -> None:
    description = describe_checkpoint(make_checkpoint(), "model.pth")
    metadata = description.to_metadata()
    assert all(json.loads(value, parse_constant=pytest.fail) is not None for value in metadata.values())
    restored = ModelDescription.from_metadata({**metadata, "someone.else": "not json"}, "model.onnx")
    metrics = {"val_acc": 0.5, "val_loss": None}
    assert restored == replace(description, metadata={**description.metadata, "metrics": metrics})


def test_weights_of_a_failed_training_are_named(tmp_path: Path) -> None:
    checkpoint = make_checkpoint()
    weights = {**checkpoint.state_dict, "fcn.bias": torch.full((4,), float("nan"))}
    write_checkpoint(tmp_path / "nan.pth", replace(checkpoint, state_dict=weights))
    with pytest.raises(CheckpointError, match="logits that are NaN"):
        load(tmp_path / "nan.pth").predict(make_clips(1))


WITHOUT_TORCH = """
    import sys

    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in ("torch", "pytorch_lightning", "onnx", "onnxscript"):
                raise ImportError(f"{name} is blocked")

    sys.meta_path.insert(0, Blocker())
"""


def run_without_torch(code: str, *arguments: str) -> str:
    """Run code in a process where torch (and the packages that write ONNX) cannot be imported."""
    program = textwrap.dedent(WITHOUT_TORCH) + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_exported_model_answers_without_torch(tmp_path: Path) -> None:
    clips = make_clips(6)
    np.save(tmp_path / "clips.npy", clips)
    code = """
        import json
        import numpy as np
        import kinegraph

        predictor = kinegraph.load(sys.argv[1])
        predictions = predictor.predict(np.load(sys.argv[2]))
        try:
            import torch
            raise SystemExit("torch was not blocked")
        except ImportError:
            pass
        print(json.dumps({
            "class_names": predictions.class_names,
            "probabilities": predictions.probabilities.tolist(),
            "layout": predictor.layout.to_dict(),
            "pipeline": predictor.pipeline.to_dict(),
        }))
    """
    answer = json.loads(run_without_torch(code, str(find_exported()), str(tmp_path / "clips.npy")))
    expected = kinegraph.load(find_model()).predict(clips)
    assert answer["class_names"] == expected.class_names
    np.testing.assert_allclose(answer["probabilities"], expected.probabilities, **TOLERANCE)
    assert answer["layout"] == LAYOUTS["coco"].to_dict()
    assert answer["pipeline"] == InputPipeline(3, NUM_JOINTS).to_dict()


def test_actions_on_an_exported_model_need_no_torch(tmp_path: Path) -> None:
    clips = make_clips(6)
    np.save(tmp_path / "clips.npy", clips)
    (tmp_path / "labels.json").write_text(json.dumps([0, 1, 2, 3, 0, 1]))
    code = """
        from kinegraph import actions

        model, folder = sys.argv[1:]
        data = {"data_path": folder + "/clips.npy", "label_path": folder + "/labels.json"}
        for action in ("inference", "evaluate"):
            spec = {"results_dir": folder, action: {"checkpoint": model, "test_dataset": data}}
            actions.run_action(action, spec)
        assert "torch" not in sys.modules
    """
    run_without_torch(code, str(find_exported()), str(tmp_path))
    expected = load(find_model()).predict(clips).class_names
    assert (tmp_path / "inference" / "results.txt").read_text().splitlines() == expected
    assert (tmp_path / "evaluate" / "confusion_matrix.png").stat().st_size > 1000
