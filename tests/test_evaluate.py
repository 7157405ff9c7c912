from __future__ import annotations

import csv
import json
import logging
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kinegraph.actions import evaluate
from kinegraph.errors import DataError, SpecError
from kinegraph.evaluate import plot_confusion
from kinegraph.runtime import load
from model_files import CLASS_NAMES, LABEL_MAP, find_exported, find_model, make_clips, write_foreign

NUM_CLIPS = 13
LABELS = [number % 3 for number in range(NUM_CLIPS)]
"""The class 3 is absent."""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    np.save(tmp_path / "clips.npy", make_clips(NUM_CLIPS))
    write_labels(tmp_path, LABELS)
    return tmp_path


def write_labels(folder: Path, labels: list[Any]) -> None:
    names = [f"s{number}" for number in range(len(labels))]
    (folder / "labels.json").write_text(json.dumps({"names": names, "labels": labels}))


def make_spec(data: Path, checkpoint: Path, **changes: Any) -> dict[str, Any]:
    files = {"data_path": str(data / "clips.npy"), "label_path": str(data / "labels.json")}
    own = {"checkpoint": str(checkpoint), "test_dataset": files}
    return {"results_dir": str(data / "results"), "evaluate": own, **changes}


def read_rows(path: str | Path) -> list[list[str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


@pytest.mark.parametrize("ending", ["pth", "onnx"])
def test_files_agree_with_the_predictor(data: Path, ending: str) -> None:
    model = find_model() if ending == "pth" else find_exported()
    result = evaluate(make_spec(data, model), "evaluate.batch_size=5")
    expected = load(find_model()).predict(make_clips(NUM_CLIPS))
    pairs = list(zip(LABELS, expected.labels.tolist(), strict=True))
    hits = [true == predicted for true, predicted in pairs]
    assert 0 < sum(hits) < NUM_CLIPS, "some right and some wrong, or the comparison says little"
    recalls = [np.mean([hit for hit, true in zip(hits, LABELS, strict=True) if true == label]) for label in range(3)]

    metrics = json.loads(Path(result.files["metrics"]).read_text())
    for numbers in (metrics, result.metrics):
        assert numbers["accuracy"] == round(100 * np.mean(hits), 2)
        assert numbers["avg_accuracy"] == round(100 * sum(recalls) / 4, 2)
        assert numbers["avg_accuracy_present"] == round(100 * sum(recalls) / 3, 2)
        assert numbers["num_clips"] == NUM_CLIPS
    assert [row["name"] for row in metrics["classes"]] == CLASS_NAMES
    assert [row["support"] for row in metrics["classes"]] == [5, 4, 4, 0]
    assert metrics["classes"][3]["accuracy"] is None
    confusion = [[pairs.count((i, j)) for j in range(4)] for i in range(4)]
    assert metrics["confusion_matrix"] == confusion

    rows = read_rows(result.files["confusion_matrix"])
    shown = [*CLASS_NAMES[:3], "'=jumping"]
    assert rows[0][1:] == [row[0] for row in rows[1:]] == shown
    assert [[int(cell) for cell in row[1:]] for row in rows[1:]] == confusion

    header, *rows = read_rows(result.files["predictions"])
    assert header == ["index", "name", "true", "predicted", "correct", *(f"probability_{name}" for name in CLASS_NAMES)]
    assert [row[1] for row in rows] == [f"s{number}" for number in range(NUM_CLIPS)]
    assert [(row[2], row[3]) for row in rows] == [(shown[true], shown[predicted]) for true, predicted in pairs]
    assert [row[4] == "1" for row in rows] == hits
    probabilities = np.array([row[5:] for row in rows], np.float64)
    np.testing.assert_allclose(probabilities, expected.probabilities, atol=1e-3)

    best = np.argsort(-expected.probabilities, axis=1)[:, :3]
    top_3 = np.mean([label in row for label, row in zip(LABELS, best.tolist(), strict=True)])
    assert result.metrics["top_3_accuracy"] == round(100 * top_3, 2)
    assert "top_5_accuracy" not in result.metrics, "there are only 4 classes"


def test_status_holds_the_kpi_and_the_table_is_printed(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "kinegraph"):
        result = evaluate(make_spec(data, find_model()))
    lines = [json.loads(line) for line in (data / "results/evaluate/status.json").read_text().splitlines()]
    assert [line["status"] for line in lines] == ["STARTED", "RUNNING", "SUCCESS"]
    assert lines[1]["kpi"] == {key: result.metrics[key] for key in ("accuracy", "avg_accuracy")}
    assert f"Total accuracy: {result.metrics['accuracy']:.2f} % of {NUM_CLIPS} clips" in caplog.text
    assert f"Average class accuracy: {result.metrics['avg_accuracy']:.2f} %" in caplog.text
    assert all(name in caplog.text for name in CLASS_NAMES)
    assert (data / "results/evaluate/experiment.yaml").exists()


@pytest.mark.parametrize("foreign", [False, True])
def test_labels_as_text_follow_the_label_map_of_the_model(data: Path, foreign: bool) -> None:
    expected = evaluate(make_spec(data, find_model())).metrics
    write_labels(data, [CLASS_NAMES[label] for label in LABELS])
    model = write_foreign(data) if foreign else find_model()
    changes = {"dataset": {"label_map": LABEL_MAP}} if foreign else {}
    assert evaluate(make_spec(data, model, **changes)).metrics == expected


def test_labels_as_text_need_a_label_map(data: Path) -> None:
    write_labels(data, [CLASS_NAMES[label] for label in LABELS])
    with pytest.raises(DataError, match=r"does not say which class is which.*Set dataset\.label_map"):
        evaluate(make_spec(data, write_foreign(data)))


@pytest.mark.parametrize("batch_size", [1, 13, 100])
def test_any_batch_size_gives_the_same(data: Path, batch_size: int) -> None:
    expected = evaluate(make_spec(data, find_model())).metrics
    assert evaluate(make_spec(data, find_model()), f"evaluate.batch_size={batch_size}").metrics == expected


def test_a_set_of_one_clip(data: Path) -> None:
    np.save(data / "clips.npy", make_clips(1))
    write_labels(data, [int(load(find_model()).predict(make_clips(1)).labels[0])])
    metrics = evaluate(make_spec(data, find_model())).metrics
    assert (metrics["accuracy"], metrics["avg_accuracy"], metrics["avg_accuracy_present"]) == (100.0, 25.0, 100.0)


@pytest.mark.parametrize(
    ("clips", "labels", "words"),
    [
        (make_clips(NUM_CLIPS)[:, :2], LABELS, "2 channels"),
        (make_clips(NUM_CLIPS)[:, :, :, :10], LABELS, "expected 17 joints, as in the layout coco"),
        (make_clips(NUM_CLIPS), LABELS[:-1], "12 labels"),
        (make_clips(NUM_CLIPS), [*LABELS[:-1], 4], "labels from 0 to 3"),
        (make_clips(NUM_CLIPS), [*LABELS[:-1], -1], "labels from 0 to 3"),
        (make_clips(NUM_CLIPS), ["runing"] * NUM_CLIPS, "'runing'"),
        (np.full_like(make_clips(NUM_CLIPS), np.nan), LABELS, "NaN"),
    ],
)
def test_data_that_does_not_fit_the_model_is_refused_before_the_work(
    data: Path, clips: np.ndarray, labels: list[Any], words: str
) -> None:
    np.save(data / "clips.npy", clips)
    write_labels(data, labels)
    with pytest.raises(DataError, match=words):
        evaluate(make_spec(data, find_model()))
    assert not (data / "results/evaluate/experiment.yaml").exists()
    last = json.loads((data / "results/evaluate/status.json").read_text().splitlines()[-1])
    assert last["status"] == "FAILURE"


def test_a_spec_that_disagrees_with_the_model_is_refused(data: Path) -> None:
    with pytest.raises(SpecError, match=r"model\.graph_layout \(override\): got nvidia \(34 joints\), expected coco"):
        evaluate(make_spec(data, find_model()), "model.graph_layout=nvidia")


def test_options_of_training_do_not_matter(data: Path) -> None:
    expected = evaluate(make_spec(data, find_model())).metrics
    changes = {"model": {"dropout": 0.9}, "dataset": {"window_size": 3, "random_move": True}}
    assert evaluate(make_spec(data, find_model(), **changes)).metrics == expected


def test_several_gpus_are_a_notice(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "kinegraph"):
        evaluate(make_spec(data, find_model()), "evaluate.num_nodes=4")
    assert "evaluate.num_nodes=4: evaluate uses one device." in caplog.text


def read_png_size(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    return width, height


@pytest.mark.parametrize("num_classes", [1, 2, 60])
def test_plot_grows_with_the_classes_and_takes_any_name(
    tmp_path: Path, num_classes: int, recwarn: pytest.WarningsRecorder
) -> None:
    confusion = np.diag(np.arange(num_classes))
    names = [f"$\\frac{{{number}$ 起立\n{'x' * 50}" for number in range(num_classes)]
    plot_confusion(tmp_path / "plot.png", confusion, names)
    width, height = read_png_size(tmp_path / "plot.png")
    assert min(width, height) >= (1800 if num_classes == 60 else 700)
    assert max(width, height) <= 2400
    assert [str(item.message) for item in recwarn if "Glyph" in str(item.message)] == []
