"""The evaluate action: how well a model knows labelled clips."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kinegraph.data.checks import DatasetInfo, check_dataset
from kinegraph.data.labels import Labels
from kinegraph.errors import DataError, Problem
from kinegraph.metrics import Counts, Scores, count_confusion, format_table, measure_top_k, score
from kinegraph.predict import find_batch_size, format_probability, open_model, predict_file, write_csv
from kinegraph.run import Result, Run
from kinegraph.runtime import Predictor
from kinegraph.spec import Spec
from kinegraph.storage import write_atomically, write_json

TOP_K = (3, 5)
MAX_NUMBERED_CLASSES = 20
MAX_TICK_CHARACTERS = 24


def evaluate(spec: Spec, run: Run) -> Result:
    """Measure a model on the clips of evaluate.test_dataset.

    Writes metrics.json, confusion_matrix.csv and .png, and predictions.csv, and prints the accuracy of each class.
    """
    options = spec.evaluate
    predictor = open_model(spec, run, options, "evaluate")
    batch_size = find_batch_size(spec, options, "evaluate")
    info, labels = _check_clips(predictor, options.test_dataset.data_path, options.test_dataset.label_path)
    for warning in info.warnings:
        run.warn(warning)
    run.write_experiment()
    logits = predict_file(predictor, info.data_path, batch_size, run, "evaluate")
    predictions = predictor.decide(logits)
    confusion = count_confusion(labels.labels, predictions.labels, predictor.num_classes)
    top_k = {
        str(k): round(100 * measure_top_k(logits, labels.labels, k), 2) for k in TOP_K if k < predictor.num_classes
    }
    scores = score(confusion, predictor.class_names, top_k)
    files = {
        "metrics": str(run.folder / "metrics.json"),
        "confusion_matrix": str(run.folder / "confusion_matrix.csv"),
        "confusion_matrix_plot": str(run.folder / "confusion_matrix.png"),
        "predictions": str(run.folder / "predictions.csv"),
    }
    _write_predictions(files["predictions"], predictor, labels, predictions.labels, predictions.probabilities)
    write_confusion(files["confusion_matrix"], confusion, predictor.class_names)
    plot_confusion(files["confusion_matrix_plot"], confusion, predictor.class_names)
    description = _describe(scores, confusion, predictor, info, options.test_dataset.label_path)
    write_json(files["metrics"], run.show(description))
    run.info(format_table(scores))
    kpi = {"accuracy": scores.accuracy, "avg_accuracy": scores.avg_accuracy}
    run.write_status("RUNNING", f"Evaluated {scores.num_clips} clips.", kpi=kpi)
    metrics = {**kpi, "avg_accuracy_present": scores.avg_accuracy_present, "macro_f1": scores.macro_f1}
    metrics |= {f"top_{k}_accuracy": percent for k, percent in top_k.items()}
    return Result({**metrics, "num_clips": scores.num_clips}, files)


def _check_clips(predictor: Predictor, data_path: str, label_path: str) -> tuple[DatasetInfo, Labels]:
    label_map = None
    if predictor.label_map is not None:
        label_map = {name: label for label, name in enumerate(predictor.class_names)}
    info = check_dataset(
        data_path,
        label_path,
        layout=predictor.layout,
        num_channels=predictor.pipeline.num_channels if predictor.pipeline else None,
        num_classes=predictor.num_classes,
        label_map=label_map,
    )
    assert info.labels is not None, "a label file was given"
    if info.labels.class_names is not None:
        got = f"class names, and {predictor.path} does not say which class is which"
        hint = "Set dataset.label_map to the order that the model was trained with."
        raise DataError(Problem(label_path, got, "labels as numbers, or a label map", hint))
    return info, info.labels


def _describe(
    scores: Scores, confusion: Counts, predictor: Predictor, info: DatasetInfo, label_path: str
) -> dict[str, Any]:
    """The content of metrics.json; percentages are rounded to 2 decimals."""
    return {
        **scores.as_data(),
        "confusion_matrix": confusion.tolist(),
        "class_names": predictor.class_names,
        "model": predictor.path,
        "data_path": info.data_path,
        "label_path": label_path,
        "shape": list(info.shape),
    }


def _write_predictions(
    path: str,
    predictor: Predictor,
    labels: Labels,
    predicted: NDArray[np.int64],
    probabilities: NDArray[np.float64],
) -> None:
    names = predictor.class_names
    header = ["index", "name", "true", "predicted", "correct", *(f"probability_{name}" for name in names)]
    rows = (
        [
            index,
            name,
            names[labels.labels[index]],
            names[predicted[index]],
            int(labels.labels[index] == predicted[index]),
            *map(format_probability, probabilities[index].tolist()),
        ]
        for index, name in enumerate(labels.names)
    )
    write_csv(path, header, rows)


def write_confusion(path: str | Path, confusion: Counts, class_names: list[str]) -> None:
    """The matrix as a table: a row for each true class, a column for each predicted one."""
    rows = ([name, *counts] for name, counts in zip(class_names, confusion.tolist(), strict=True))
    write_csv(path, ["true/predicted", *class_names], rows)


def plot_confusion(path: str | Path, confusion: Counts, class_names: list[str]) -> None:
    """The matrix as a PNG, coloured by the share of the true class; up to 20 classes with the counts in the cells."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    num_classes = len(class_names)
    share = 100 * confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    size_inches = float(np.clip(2.5 + 0.55 * num_classes, 5.0, 14.0))
    font_size = float(np.clip(0.65 * 72 * (size_inches - 2.5) / num_classes, 3.0, 10.0))
    figure = Figure(figsize=(size_inches + 0.8, size_inches), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(image, ax=axes, shrink=0.8, label="% of the true class")
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    step = max(1, num_classes // 100)
    ticks = range(0, num_classes, step)
    names = [_shorten(class_names[label]) for label in ticks]
    # Class names are text, not formulas
    axes.set_xticks(ticks, names, rotation=45 if num_classes <= 10 else 90, fontsize=font_size, parse_math=False)
    axes.set_yticks(ticks, names, fontsize=font_size, parse_math=False)
    if num_classes <= 10:
        for text in axes.get_xticklabels():
            text.set(horizontalalignment="right", rotation_mode="anchor")
    if num_classes <= MAX_NUMBERED_CLASSES:
        for row, column in np.ndindex(confusion.shape):
            color = "white" if share[row, column] > 50 else "black" if confusion[row, column] else "lightgrey"
            number = str(confusion[row, column])
            axes.text(column, row, number, ha="center", va="center", color=color, fontsize=font_size)
    with warnings.catch_warnings(), write_atomically(path) as file:
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(file, format="png", dpi=150)


def _shorten(name: str) -> str:
    name = " ".join(name.split())
    return name if len(name) <= MAX_TICK_CHARACTERS else name[: MAX_TICK_CHARACTERS - 3] + "..."
