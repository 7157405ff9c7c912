"""The evaluate action: how well a model knows labelled clips."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kinegraph.data.checks import DatasetInfo, check_dataset
from kinegraph.data.labels import Labels
from kinegraph.errors import DataError, Problem
from kinegraph.explain import write_explanations
from kinegraph.metrics import (
    CALIBRATION_BINS,
    Counts,
    Rejection,
    Scores,
    count_confusion,
    format_table,
    measure_calibration_error,
    measure_negative_log_likelihood,
    measure_rejection,
    measure_top_k,
    score,
)
from kinegraph.predict import (
    find_batch_size,
    format_probability,
    open_explainer,
    open_model,
    predict_file,
    write_csv,
)
from kinegraph.run import Result, Run
from kinegraph.runtime import Predictions, Predictor
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
    explainer = open_explainer(spec, predictor, options)
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
    threshold = options.reject_threshold
    _write_predictions(files["predictions"], predictor, labels, predictions, threshold)
    write_confusion(files["confusion_matrix"], confusion, predictor.class_names)
    plot_confusion(files["confusion_matrix_plot"], confusion, predictor.class_names)
    calibration = _measure_calibration(logits, predictions, labels, predictor.description.temperature)
    rejection = measure_rejection(predictions.probabilities, labels.labels, threshold) if threshold > 0 else None
    description = _describe(scores, confusion, predictor, info, options.test_dataset.label_path)
    description |= {**calibration, **({"rejection": asdict(rejection)} if rejection else {})}
    write_json(files["metrics"], run.show(description))
    if explainer:
        chosen = predictions.labels, labels.names, run, options.explain_clips, labels.labels
        files |= write_explanations(explainer, info.data_path, *chosen)
    run.info(format_table(scores))
    run.info(_format_answers(calibration, rejection))
    kpi = {"accuracy": scores.accuracy, "avg_accuracy": scores.avg_accuracy}
    run.write_status("RUNNING", f"Evaluated {scores.num_clips} clips.", kpi=kpi)
    metrics: dict[str, Any] = {**kpi, "avg_accuracy_present": scores.avg_accuracy_present, "macro_f1": scores.macro_f1}
    metrics |= {f"top_{k}_accuracy": percent for k, percent in top_k.items()}
    metrics |= {key: calibration[key] for key in ("ece", "nll")}
    if rejection:
        metrics |= {"rejected": rejection.rejected, "accuracy_of_rest": rejection.accuracy_of_rest}
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


def _measure_calibration(
    logits: NDArray[np.float32], predictions: Predictions, labels: Labels, temperature: float
) -> dict[str, float]:
    """ece in percent, nll in nats a clip, and the temperature that both are about."""
    error = measure_calibration_error(predictions.probabilities, labels.labels)
    likelihood = measure_negative_log_likelihood(logits.astype(np.float64) / temperature, labels.labels)
    return {"ece": round(100 * error, 2), "nll": round(likelihood, 4), "temperature": temperature}


def _format_answers(calibration: dict[str, float], rejection: Rejection | None) -> str:
    line = (
        f"Calibration error: {calibration['ece']:.2f} % ({CALIBRATION_BINS} bins), "
        f"negative log likelihood: {calibration['nll']:.4f}, temperature: {calibration['temperature']:.3g}"
    )
    if rejection is None:
        return line
    rest = (
        "none is left"
        if rejection.accuracy_of_rest is None
        else f"accuracy of the rest: {rejection.accuracy_of_rest:.2f} %"
    )
    return f"{line}\nBelow {rejection.threshold:g}: {rejection.rejected:.2f} % of the answers; {rest}"


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
    predictions: Predictions,
    threshold: float,
) -> None:
    """A row for each clip; with a threshold also whether its answer is rejected, 1 or 0."""
    names, predicted, probabilities = predictor.class_names, predictions.labels, predictions.probabilities
    header = ["index", "name", "true", "predicted", "correct", *(f"probability_{name}" for name in names)]
    header += ["rejected"] if threshold > 0 else []
    rows = (
        [
            index,
            name,
            names[labels.labels[index]],
            names[predicted[index]],
            int(labels.labels[index] == predicted[index]),
            *map(format_probability, probabilities[index].tolist()),
            *([int(probabilities[index].max() < threshold)] if threshold > 0 else []),
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
