from __future__ import annotations

import csv
import errno
import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from kinegraph.actions import inference
from kinegraph.data.pipeline import InputPipeline
from kinegraph.errors import DataError, SpecError, StorageError
from kinegraph.predict import check_agreement, defuse, find_batch_size, predict_file, rank_classes
from kinegraph.runtime import ModelDescription, load
from kinegraph.skeleton.layouts import LAYOUTS
from kinegraph.spec import Spec
from model_files import (
    CLASS_NAMES,
    LABEL_MAP,
    find_exported,
    find_model,
    make_clips,
    make_run,
    write_foreign,
    write_model,
)

NUM_CLIPS = 11


@pytest.fixture
def data(tmp_path: Path) -> Path:
    np.save(tmp_path / "clips.npy", make_clips(NUM_CLIPS))
    return tmp_path / "clips.npy"


def make_spec(data: Path, checkpoint: Path, **changes: Any) -> dict[str, Any]:
    own = {"checkpoint": str(checkpoint), "test_dataset": {"data_path": str(data)}}
    return {"results_dir": str(data.parent / "results"), "inference": own, **changes}


def read_csv(path: Path | str) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("ending", ["pth", "onnx"])
def test_results_agree_with_the_predictor(data: Path, ending: str) -> None:
    model = find_model() if ending == "pth" else find_exported()
    result = inference(make_spec(data, model), "inference.batch_size=4")
    expected = load(find_model()).predict(make_clips(NUM_CLIPS))
    assert set(expected.class_names) == set(CLASS_NAMES), "every class must occur, or the comparison says little"

    assert Path(result.files["results"]) == data.parent / "results" / "inference" / "results.txt"
    assert Path(result.files["results"]).read_text() == "".join(name + "\n" for name in expected.class_names)

    rows = read_csv(result.files["results_csv"])
    assert [row["class"] for row in rows] == [defuse(name) for name in expected.class_names]
    assert "'=jumping" in [row["class"] for row in rows]
    assert [int(row["label"]) for row in rows] == expected.labels.tolist()
    assert [row["name"] for row in rows] == [f"clip_{number}" for number in range(NUM_CLIPS)]
    best = [float(row["probability"]) for row in rows]
    np.testing.assert_allclose(best, expected.probabilities.max(1), atol=1e-3)

    content = json.loads(Path(result.files["results_json"]).read_text())
    assert content["class_names"] == CLASS_NAMES
    assert [entry["class"] for entry in content["results"]] == expected.class_names
    for entry, probabilities in zip(content["results"], expected.probabilities, strict=True):
        order = sorted(range(4), key=lambda label: -probabilities[label])[:3]
        assert [item["label"] for item in entry["top_k"]] == order
        assert [item["class"] for item in entry["top_k"]] == [CLASS_NAMES[label] for label in order]
        got = [item["probability"] for item in entry["top_k"]]
        np.testing.assert_allclose(got, probabilities[order], atol=1e-3)

    assert result.metrics["num_clips"] == NUM_CLIPS
    counts = {name: expected.class_names.count(name) for name in CLASS_NAMES}
    assert result.metrics["clips_per_class"] == counts


def test_run_folder_tells_what_was_run(data: Path) -> None:
    inference(make_spec(data, find_model(), encryption_key="very secret"))
    folder = data.parent / "results" / "inference"
    assert yaml.safe_load((folder / "experiment.yaml").read_text())["inference"]["checkpoint"] == str(find_model())
    states = [json.loads(line)["status"] for line in (folder / "status.json").read_text().splitlines()]
    assert states == ["STARTED", "SUCCESS"]
    assert not [path for path in folder.iterdir() if b"very secret" in path.read_bytes()]
    assert not list(folder.glob("*.tmp"))


def test_names_come_from_the_label_file_whatever_its_labels_are(data: Path) -> None:
    names = [f"=cmd|{number}" for number in range(NUM_CLIPS)]
    labels = data.with_name("labels.json")
    labels.write_text(json.dumps({"names": names, "labels": [-1] * NUM_CLIPS}))
    spec = make_spec(data, find_model())
    spec["inference"]["test_dataset"]["label_path"] = str(labels)
    result = inference(spec)
    assert [row["name"] for row in read_csv(result.files["results_csv"])] == [f"'{name}" for name in names]
    content = json.loads(Path(result.files["results_json"]).read_text())
    assert [entry["name"] for entry in content["results"]] == names


def test_label_file_of_another_length_is_refused_before_the_work(data: Path) -> None:
    labels = data.with_name("labels.json")
    labels.write_text(json.dumps([0, 1]))
    spec = make_spec(data, find_model())
    spec["inference"]["test_dataset"]["label_path"] = str(labels)
    with pytest.raises(DataError, match="got 2 names, expected 11"):
        inference(spec)
    assert not (data.parent / "results" / "inference" / "experiment.yaml").exists()


def test_output_file_may_lie_elsewhere(data: Path) -> None:
    target = data.parent / "new" / "folder" / "answer.txt"
    result = inference(make_spec(data, find_model()), f"inference.output_file={target}")
    assert result.files["results"] == str(target)
    assert len(target.read_text().splitlines()) == NUM_CLIPS


@pytest.mark.parametrize("top_k", [1, 4, 9])
def test_top_k_sets_how_many_classes_are_listed(data: Path, top_k: int) -> None:
    result = inference(make_spec(data, find_model()), f"inference.top_k={top_k}")
    rows = read_csv(result.files["results_csv"])
    assert sum(key.startswith("class") for key in rows[0]) == min(top_k, 4)


def test_every_problem_of_the_data_is_found_first(data: Path) -> None:
    clips = make_clips(4)[:, :2]
    clips[2, 1, 0, 0, 0] = np.nan
    np.save(data, clips)
    with pytest.raises(DataError) as caught:
        inference(make_spec(data, find_model()))
    assert [("channels" in problem.got, "NaN" in problem.got) for problem in caught.value.problems] == [
        (True, False),
        (False, True),
    ]


def test_empty_clips_are_a_warning(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    clips = make_clips(3)
    clips[1] = 0
    np.save(data, clips)
    with caplog.at_level(logging.WARNING, "kinegraph"):
        inference(make_spec(data, find_model()))
    assert "1 clip is empty" in caplog.text


@pytest.mark.parametrize("batch_size", [1, 4, 11, 64])
def test_predict_file_agrees_with_the_whole_array(data: Path, batch_size: int) -> None:
    run = make_run(data.parent / "run", "inference", {})
    predictor = load(find_model())
    logits = predict_file(predictor, str(data), batch_size, run, "inference")
    np.testing.assert_allclose(logits, predictor.logits(make_clips(NUM_CLIPS)), rtol=1e-3, atol=1e-3)


def test_half_precision_files_are_taken(data: Path) -> None:
    np.save(data, make_clips(3).astype(np.float16))
    run = make_run(data.parent / "run", "inference", {})
    logits = predict_file(load(find_model()), str(data), 2, run, "inference")
    np.testing.assert_allclose(logits, load(find_model()).logits(make_clips(3)), atol=0.1)


def test_batch_size_comes_from_the_dataset_where_it_is_left_out() -> None:
    spec = Spec()
    assert find_batch_size(spec, spec.inference, "inference") == spec.dataset.batch_size == 16
    spec.inference.batch_size = 5
    assert find_batch_size(spec, spec.inference, "inference") == 5
    spec.inference.batch_size = 0
    with pytest.raises(SpecError, match=r"inference\.batch_size: got 0"):
        find_batch_size(spec, spec.inference, "inference")


def test_ranks_break_ties_like_argmax() -> None:
    assert rank_classes(np.array([[0.2, 0.4, 0.4], [0.0, 1.0, 0.0]]), 2).tolist() == [[1, 2], [1, 0]]


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@x", "\tx", "\rx"])
def test_formulas_are_defused(text: str) -> None:
    assert defuse(text) == "'" + text


@pytest.mark.parametrize("text", ["walking", "", "a=b", "'x", "1-2"])
def test_other_text_is_left_alone(text: str) -> None:
    assert defuse(text) == text


def test_several_gpus_and_machines_are_a_notice(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "kinegraph"):
        inference(make_spec(data, find_exported()), "inference.num_gpus=2")
    assert "inference.num_gpus=2: inference uses one device." in caplog.text
    assert "runs on the CPU" in caplog.text


def test_only_the_first_process_works(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    spec = make_spec(data, find_model())
    assert inference(spec).files == {}
    assert not Path(spec["results_dir"]).exists()
    monkeypatch.setenv("RANK", "0")
    assert Path(inference(spec).files["results"]).is_file()


@pytest.mark.parametrize("name", ["results.txt", "results.csv", "results.json"])
def test_full_disk_leaves_no_half_file(data: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    replace_file = os.replace

    def fail(source: Any, target: Any) -> None:
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace_file(source, target)

    monkeypatch.setattr("kinegraph.storage.os.replace", fail)
    with pytest.raises(StorageError, match=f"{name}: got No space left"):
        inference(make_spec(data, find_model()))
    folder = data.parent / "results" / "inference"
    assert (folder / "experiment.yaml").exists()
    assert not (folder / name).exists()
    assert not [path for path in folder.iterdir() if path.name.endswith(".tmp")]
    assert json.loads((folder / "status.json").read_text().splitlines()[-1])["status"] == "FAILURE"


AGREEING = {
    "model": {
        "model_type": "ST-GCN",
        "graph_layout": "coco",
        "graph_strategy": "spatial",
        "input_channels": 3,
        "dropout": 0.1,
    },
    "dataset": {"num_classes": 4, "label_map": LABEL_MAP, "window_size": 77},
}


def compare(folder: Path, spec: dict[str, Any], model: Path) -> dict[str, int] | None:
    run = make_run(folder, "inference", spec)
    return check_agreement(run.spec, run, load(model).description, str(model))


@pytest.mark.parametrize("ending", ["pth", "onnx"])
@pytest.mark.parametrize("spec", [{}, AGREEING, {"dataset": {"label_map": {"walking": 2}}}])
def test_agreeing_specs_pass(tmp_path: Path, ending: str, spec: dict[str, Any]) -> None:
    assert compare(tmp_path, spec, find_model() if ending == "pth" else find_exported()) == LABEL_MAP


@pytest.mark.parametrize(
    ("spec", "key", "got", "expected"),
    [
        ({"model": {"graph_layout": "nvidia"}}, "model.graph_layout", "nvidia", "coco"),
        ({"model": {"graph_layout": "human3.6m"}}, "model.graph_layout", "human3.6m", "coco"),
        ({"model": {"graph_strategy": "uniform"}}, "model.graph_strategy", "uniform", "spatial"),
        ({"model": {"graph_strategy": "spatial_exact"}}, "model.graph_strategy", "spatial_exact", "spatial"),
        ({"model": {"input_channels": 2}}, "model.input_channels", "2", "3"),
        ({"dataset": {"num_classes": 6}}, "dataset.num_classes", "6", "4"),
        ({"dataset": {"label_map": {**LABEL_MAP, "walking": 3}}}, "dataset.label_map", "'walking': 3", "'walking': 2"),
        ({"dataset": {"label_map": {"class_0": 0}}}, "dataset.label_map", "'class_0': 0", "'sitting': 0"),
    ],
)
@pytest.mark.parametrize("ending", ["pth", "onnx"])
def test_disagreement_is_an_error_with_both_values(
    tmp_path: Path, ending: str, spec: dict[str, Any], key: str, got: str, expected: str
) -> None:
    model = find_model() if ending == "pth" else find_exported()
    with pytest.raises(SpecError) as caught:
        compare(tmp_path, spec, model)
    (problem,) = caught.value.problems
    assert problem.where == f"{key} (file)"
    assert got in problem.got
    assert expected in problem.expected
    assert str(model) in problem.expected


def test_disagreements_are_reported_together(tmp_path: Path) -> None:
    spec = {"model": {"graph_layout": "nvidia", "input_channels": 2}, "dataset": {"num_classes": 7}}
    with pytest.raises(SpecError) as caught:
        compare(tmp_path, spec, find_model())
    assert len(caught.value.problems) == 3


def test_a_layout_file_with_the_same_graph_agrees(tmp_path: Path) -> None:
    copy = {**LAYOUTS["coco"].to_dict(), "name": "my_body"}
    copy["edges"] = [edge[::-1] for edge in reversed(copy["edges"])]
    path = tmp_path / "my_body.yaml"
    path.write_text(yaml.safe_dump(copy))
    assert compare(tmp_path, {"model": {"graph_layout": str(path)}}, find_model()) == LABEL_MAP
    path.write_text(yaml.safe_dump(move_centre(copy)))
    with pytest.raises(SpecError, match="my_body"):
        compare(tmp_path, {"model": {"graph_layout": str(path)}}, find_model())


def test_graph_of_an_unknown_layout_is_compared_by_its_edges(tmp_path: Path) -> None:
    coco = LAYOUTS["coco"]
    unknown = replace(coco, name="unknown", joints=tuple(f"joint_{number}" for number in range(17)))
    metadata = {"model": {"graph_strategy": "spatial"}}
    model = ModelDescription(4, layout=unknown, pipeline=InputPipeline(3, 17), metadata=metadata)
    run = make_run(tmp_path, "inference", {"model": {"graph_layout": "coco", "graph_strategy": "spatial_exact"}})
    assert check_agreement(run.spec, run, model, "foreign.pth") is None
    run = make_run(tmp_path, "inference", {"model": {"graph_layout": "human3.6m"}})
    with pytest.raises(SpecError, match=r"human3\.6m \(17 joints\), expected unknown \(17 joints\)"):
        check_agreement(run.spec, run, model, "foreign.pth")


def move_centre(layout: dict[str, Any]) -> dict[str, Any]:
    """The layout with another centre: the spatial strategy then gives another graph."""
    return {key: value for key, value in layout.items() if key != "bones"} | {"centre": 9}


@pytest.mark.parametrize("prefix", ["", "model."])
def test_foreign_model_takes_the_label_map_of_an_agreeing_spec(data: Path, prefix: str) -> None:
    spec = make_spec(data, write_foreign(data.parent, prefix), **AGREEING)
    result = inference(spec)
    expected = load(find_model()).predict(make_clips(NUM_CLIPS)).class_names
    assert Path(result.files["results"]).read_text().splitlines() == expected


def test_label_map_that_does_not_fit_a_nameless_model_is_refused(data: Path) -> None:
    spec = make_spec(data, write_foreign(data.parent), dataset={"label_map": {"a": 0, "b": 1}})
    with pytest.raises(SpecError, match=r"dataset\.label_map: got 2 class names, expected 4"):
        inference(spec)


def test_disagreement_stops_the_action_before_the_work(data: Path) -> None:
    with pytest.raises(SpecError, match=r"dataset\.num_classes"):
        inference(make_spec(data, find_model()), "dataset.num_classes=6")
    assert not (data.parent / "results" / "inference" / "experiment.yaml").exists()


def test_encryption_key_of_the_spec_opens_the_model(data: Path) -> None:
    model = write_model(data.parent, "secret.pth", key="open sesame")
    result = inference(make_spec(data, model, encryption_key="open sesame"))
    assert result.metrics["num_clips"] == NUM_CLIPS


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_ids_without_a_gpu_are_a_notice(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "kinegraph"):
        inference(make_spec(data, find_model()), "inference.gpu_ids=[3]")
    assert "runs on the CPU" in caplog.text
