from __future__ import annotations

import json
import logging
import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import kinegraph.export
from golden_weights import golden_input, golden_state_dict
from kinegraph.actions import export, inference
from kinegraph.errors import CheckpointError, ParityError, SpecError, StorageError, UserError
from kinegraph.export import find_target
from kinegraph.export_parity import PARITY_SHAPES, check_parity
from kinegraph.models import build_model
from kinegraph.models.checkpoint import build_from_checkpoint, write_checkpoint
from kinegraph.runtime import describe_checkpoint, load
from kinegraph.skeleton.layouts import LAYOUTS
from kinegraph.spec import ModelSpec
from kinegraph.spec_reading import read_spec
from model_files import (
    CLASS_NAMES,
    LABEL_MAP,
    find_exported,
    find_model,
    find_shared_folder,
    make_checkpoint,
    make_clips,
    write_foreign,
    write_model,
)


def make_spec(folder: Path, checkpoint: Path, **changes: Any) -> dict[str, Any]:
    return {"results_dir": str(folder / "results"), "export": {"checkpoint": str(checkpoint)}, **changes}


@pytest.fixture
def no_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Conversion answers with the file that was exported once, from the same weights."""
    content = find_exported().read_bytes()

    def convert(model: Any, description: Any, opset_version: int) -> bytes:
        proto = onnx.load_from_string(content)
        onnx.helper.set_model_props(proto, description.to_metadata())
        return proto.SerializeToString()

    monkeypatch.setattr(kinegraph.export, "convert", convert)
    monkeypatch.setattr("kinegraph.export_parity.PARITY_SHAPES", PARITY_SHAPES[:2])


def list_files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_golden_logits_from_onnx(shared: Path, tmp_path: Path) -> None:
    case = json.loads((shared / "golden" / "model_logits.json").read_text())[1]
    options = ModelSpec(graph_layout=case["layout"], graph_strategy=case["strategy"])
    model = build_model(options, LAYOUTS[case["layout"]], case["num_classes"])
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    weights = golden_state_dict(shapes, np.array(case["adjacency"]))
    torch.save({"state_dict": {name: torch.as_tensor(value) for name, value in weights.items()}}, tmp_path / "tao.pth")
    result = export(make_spec(tmp_path, tmp_path / "tao.pth"))
    logits = load(result.files["onnx"]).logits(golden_input(case["shape"]))
    np.testing.assert_allclose(logits, case["logits"], rtol=0, atol=1e-4)


def test_files_of_an_export() -> None:
    path = find_exported()
    assert path == find_model().with_suffix(".onnx")
    assert path.with_name("labels.txt").read_text().splitlines() == CLASS_NAMES
    report = json.loads((find_shared_folder() / "results/export/export.json").read_text())
    assert len(report["shapes"]) == len(PARITY_SHAPES) == 5
    assert 0 <= report["max_relative_error"] <= report["tolerance"] == 1e-4
    assert report["files"]["onnx"] == str(path)
    assert report["size_bytes"] == path.stat().st_size
    assert (find_shared_folder() / "results/export/experiment.yaml").exists()
    assert not list(find_shared_folder().glob(".*.tmp"))


def test_graph_has_the_names_and_axes_that_were_promised() -> None:
    model = onnx.load(find_exported())
    onnx.checker.check_model(model, full_check=True)
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 17}
    session = onnxruntime.InferenceSession(find_exported(), providers=["CPUExecutionProvider"])
    (given,), (answer,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.shape, given.type) == ("input", ["batch", 3, "frames", 17, "people"], "tensor(float)")
    assert (answer.name, answer.shape, answer.type) == ("fc_pred", ["batch", 4], "tensor(float)")


@pytest.mark.parametrize("clips", [1, 3])
@pytest.mark.parametrize("frames", [1, 2, 7, 30, 65])
@pytest.mark.parametrize("people", [1, 2])
def test_batch_frames_and_people_are_dynamic(clips: int, frames: int, people: int) -> None:
    array = make_clips(clips, frames=frames, people=people)
    session = onnxruntime.InferenceSession(find_exported(), providers=["CPUExecutionProvider"])
    (logits,) = session.run(["fc_pred"], {"input": array})
    np.testing.assert_allclose(logits, load(find_model()).logits(array), rtol=1e-4, atol=1e-3)


def test_metadata_is_strict_json_and_complete() -> None:
    metadata = {entry.key: entry.value for entry in onnx.load(find_exported()).metadata_props}
    own = {
        key.removeprefix("kinegraph."): json.loads(value, parse_constant=pytest.fail) for key, value in metadata.items()
    }
    assert set(metadata) == {"kinegraph." + key for key in own}
    assert own["format_version"] == 1
    assert own["class_names"] == CLASS_NAMES
    assert own["label_map"] == LABEL_MAP
    assert own["layout"] == LAYOUTS["coco"].to_dict()
    assert own["pipeline"] == make_checkpoint().pipeline
    assert own["model"]["graph_strategy"] == "spatial"
    assert own["model_name"] == "test_model"
    assert own["metrics"] == {"val_acc": 0.5, "val_loss": None}
    assert own["versions"]["torch"] == torch.__version__


def test_file_holds_no_paths_of_this_machine() -> None:
    content = find_exported().read_bytes()
    places = [str(Path(kinegraph.export.__file__).parent), str(Path(torch.__file__).parent), str(find_shared_folder())]
    assert [place for place in places if place.encode() in content] == []


def test_foreign_checkpoint_is_exported_with_the_names_of_the_spec(tmp_path: Path) -> None:
    """The whole way once more, with another layout and strategy, and quietly."""
    torch.manual_seed(1)
    options = replace(make_checkpoint().options, graph_layout="openpose", graph_strategy="distance", input_channels=2)
    model = kinegraph.models.build_model(options, LAYOUTS["openpose"], 2)
    torch.save(model.state_dict(), tmp_path / "foreign.pth")
    spec = make_spec(tmp_path, tmp_path / "foreign.pth", dataset={"label_map": {"up": 1, "down": 0}})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = export(spec, "model.graph_layout=openpose", "model.graph_strategy=distance")
    assert result.metrics["max_relative_error"] <= 1e-4
    assert (tmp_path / "labels.txt").read_text() == "down\nup\n"
    predictor = load(result.files["onnx"])
    assert predictor.class_names == ["down", "up"]
    assert predictor.layout == LAYOUTS["openpose"]
    assert predictor.metadata["model_name"] == "pose_classification"
    clips = np.random.default_rng(0).standard_normal((3, 2, 5, 18, 2)).astype(np.float32)
    np.testing.assert_allclose(predictor.logits(clips), load(tmp_path / "foreign.pth").logits(clips), atol=1e-4)


def test_foreign_checkpoint_of_the_same_graph(tmp_path: Path, no_conversion: None) -> None:
    result = export(make_spec(tmp_path, write_foreign(tmp_path, "", LABEL_MAP)))
    assert load(result.files["onnx"]).class_names == CLASS_NAMES
    other = export(make_spec(tmp_path, write_foreign(tmp_path)), f"export.onnx_file={tmp_path}/other/nameless.onnx")
    assert load(other.files["onnx"]).class_names == ["class_0", "class_1", "class_2", "class_3"]


def test_existing_file_is_not_replaced_unless_told_to(tmp_path: Path, no_conversion: None) -> None:
    model = write_model(tmp_path)
    target = tmp_path / "model.onnx"
    target.write_bytes(b"precious")
    with pytest.raises(UserError, match=r"model\.onnx: got a file that is there already.*export\.overwrite=true"):
        export(make_spec(tmp_path, model))
    assert target.read_bytes() == b"precious"
    assert not (tmp_path / "labels.txt").exists()
    assert not (tmp_path / "results/export/experiment.yaml").exists()
    export(make_spec(tmp_path, model), "export.overwrite=true")
    assert load(target).class_names == CLASS_NAMES


def test_labels_of_other_classes_are_not_replaced_unless_told_to(tmp_path: Path, no_conversion: None) -> None:
    model = write_model(tmp_path)
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    with pytest.raises(UserError, match=r"labels\.txt: got a file with other classes"):
        export(make_spec(tmp_path, model))
    assert list_files(tmp_path) == {
        "model.pth",
        "labels.txt",
        "results/export/.lock",
        "results/export/log.txt",
        "results/export/status.json",
    }
    export(make_spec(tmp_path, model), "export.overwrite=true")
    assert (tmp_path / "labels.txt").read_text().splitlines() == CLASS_NAMES
    # A second export of the same classes into the folder needs no permission
    export(make_spec(tmp_path, model), f"export.onnx_file={tmp_path}/second.onnx")
    assert (tmp_path / "second.onnx").exists()


def test_existing_folder_in_the_way(tmp_path: Path) -> None:
    model = write_model(tmp_path)
    (tmp_path / "model.onnx").mkdir()
    with pytest.raises(UserError, match="got a folder"):
        export(make_spec(tmp_path, model), "export.overwrite=true")


def test_default_name_is_that_of_the_pointer(tmp_path: Path) -> None:
    write_model(tmp_path, "model_epoch_001_step_00002.pth")
    os.symlink("model_epoch_001_step_00002.pth", tmp_path / "pc_model_best.pth")
    spec = read_spec(make_spec(tmp_path, tmp_path / "pc_model_best.pth")).values
    assert find_target(spec) == tmp_path / "pc_model_best.onnx"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("export.onnx_file=model.bin", r"export\.onnx_file: .*ends with \.onnx"),
        ("export.opset_version=16", r"export\.opset_version: got 16, expected at least 17"),
        ("export.opset_version=9999", r"export\.opset_version: got 9999, expected 17 to"),
        ("model.graph_layout=nvidia", r"model\.graph_layout \(override\): got nvidia"),
        ("dataset.num_classes=6", r"dataset\.num_classes \(override\): got 6, expected 4"),
    ],
)
def test_mistakes_in_the_spec_are_found_before_the_work(tmp_path: Path, override: str, words: str) -> None:
    model = write_model(tmp_path)
    with pytest.raises(SpecError, match=words):
        export(make_spec(tmp_path, model), override)
    assert not (tmp_path / "results/export/experiment.yaml").exists()


def test_onnx_as_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="It is ONNX already"):
        export(make_spec(tmp_path, find_exported()))


def test_wrong_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="wrong key"):
        export(make_spec(tmp_path, write_model(tmp_path, "secret.pth", key="right"), encryption_key="wrong"))


def test_encrypted_checkpoint_gives_a_plain_file_and_a_line_says_so(
    tmp_path: Path, no_conversion: None, caplog: pytest.LogCaptureFixture
) -> None:
    model = write_model(tmp_path, "secret.pth", key="very secret")
    with caplog.at_level(logging.INFO, "kinegraph"):
        result = export(make_spec(tmp_path, model, encryption_key="very secret"), "export.gpu_id=1")
    assert "secret.pth is encrypted; the exported ONNX file is plain" in caplog.text
    assert "export.gpu_id=1 has no effect: export runs on the CPU" in caplog.text
    assert load(result.files["onnx"]).class_names == CLASS_NAMES
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 8
    assert [path for path in files if b"very secret" in path.read_bytes()] == []


def test_a_file_that_answers_otherwise_is_not_written(
    tmp_path: Path, no_conversion: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make_checkpoint()
    weights = {**checkpoint.state_dict, "fcn.bias": checkpoint.state_dict["fcn.bias"] + 0.1}
    write_checkpoint(tmp_path / "model.pth", replace(checkpoint, state_dict=weights))
    with pytest.raises(ParityError, match=r"relative error of 0\.\d+ .*expected at most 0\.0001"):
        export(make_spec(tmp_path, tmp_path / "model.pth"))
    assert not (tmp_path / "model.onnx").exists()
    assert not (tmp_path / "labels.txt").exists()
    assert not (tmp_path / "results/export/export.json").exists()


def test_parity_is_refused_for_a_file_that_onnxruntime_cannot_open() -> None:
    model = build_from_checkpoint(make_checkpoint(), "model.pth")
    with pytest.raises(ParityError, match="a file that onnxruntime can open"):
        check_parity(model, b"not a model", describe_checkpoint(make_checkpoint(), "model.pth"))


@pytest.mark.parametrize("name", ["model.onnx", "labels.txt"])
def test_full_disk_leaves_no_half_file(
    tmp_path: Path, no_conversion: None, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    replace_file = os.replace

    def fail(source: Any, target: Any) -> None:
        if Path(target).name == name:
            raise OSError(28, "No space left on device")
        replace_file(source, target)

    monkeypatch.setattr("kinegraph.storage.os.replace", fail)
    with pytest.raises(StorageError, match=f"{name}: got No space left"):
        export(make_spec(tmp_path, write_model(tmp_path)))
    assert not (tmp_path / "model.onnx").exists()
    assert [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")] == []
    monkeypatch.undo()
    # What is left does not stop the next try: labels of the same classes may stay
    kinegraph.export._refuse_overwrite(tmp_path / "model.onnx", "".join(f"{name}\n" for name in CLASS_NAMES), False)


def test_exported_model_serves_the_inference_action(tmp_path: Path) -> None:
    np.save(tmp_path / "clips.npy", make_clips(5))
    own = {"checkpoint": str(find_exported()), "test_dataset": {"data_path": str(tmp_path / "clips.npy")}}
    result = inference({"results_dir": str(tmp_path), "inference": own})
    expected = load(find_model()).predict(make_clips(5)).class_names
    assert Path(result.files["results"]).read_text().splitlines() == expected


class Unfoldable(torch.nn.Module):
    """A network that only PyTorch's exporter can write."""

    def __init__(self, *_: Any) -> None:
        super().__init__()
        self.fcn = torch.nn.Conv2d(3, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fcn(x.mean(dim=(2, 3, 4))[:, :, None, None]).flatten(1)


def test_a_network_that_cannot_be_folded_is_exported_by_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kinegraph.models.find_network", lambda _: Unfoldable)
    torch.manual_seed(0)
    weights = Unfoldable().state_dict()
    write_checkpoint(tmp_path / "model.pth", replace(make_checkpoint(), state_dict=weights))
    spec = make_spec(tmp_path, tmp_path / "model.pth")
    for override, words in (
        ("export.form=step", r"export\.form: got step for a network that cannot be folded"),
        ("export.opset_version=17", r"export\.opset_version: got 17, expected at least 18"),
    ):
        with pytest.raises(SpecError, match=words):
            export(spec, override)
    result = export(spec)
    assert result.metrics["opset_version"] == 18
    content = onnx.load(result.files["onnx"])
    assert str(Path(torch.__file__).parent).encode() not in content.SerializeToString()
    clips = make_clips(3)
    expected = clips.mean((2, 3, 4)) @ weights["fcn.weight"][:, :, 0, 0].numpy().T + weights["fcn.bias"].numpy()
    np.testing.assert_allclose(load(result.files["onnx"]).logits(clips), expected, atol=1e-5)
