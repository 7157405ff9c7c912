"""The inference action, and what evaluation and export share with it: opening a model that agrees with the spec."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kinegraph.backends import CPU_ONLY
from kinegraph.backends.model_file import KINDS
from kinegraph.data.arrays import open_array
from kinegraph.data.checks import check_dataset, check_label_map
from kinegraph.data.input_checks import UNKNOWN
from kinegraph.data.labels import read_labels
from kinegraph.errors import DataError, Problem, SpecError
from kinegraph.explain import Explainer, load_explainer, write_explanations
from kinegraph.model_description import ModelDescription
from kinegraph.run import Result, Run, find_encryption_key
from kinegraph.runtime import UNKNOWN_CLASS, UNKNOWN_LABEL, Predictions, Predictor, load
from kinegraph.skeleton.graph import build_adjacency
from kinegraph.skeleton.layouts import Layout, get_layout
from kinegraph.spec import EvaluateSpec, InferenceSpec, ModelSpec, Spec
from kinegraph.spec_input import InputSpec
from kinegraph.storage import make_folder, write_atomically, write_json

UNKNOWN_LAYOUT = "unknown"
COMPARED_OPTIONS = {"model_type", "input_channels", "graph_layout", "graph_strategy"}
"""Of the model section: what a user may state, and must state rightly."""
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def infer(spec: Spec, run: Run) -> Result:
    """Classify the clips of inference.test_dataset.

    Writes output_file (default results.txt: one class name a line, in input order), results.csv and results.json.
    """
    options = spec.inference
    predictor = open_model(spec, run, options, "inference")
    explainer = open_explainer(spec, predictor, options)
    batch_size = find_batch_size(spec, options, "inference")
    data_path, label_path = options.test_dataset.data_path, options.test_dataset.label_path
    names = _check_clips(predictor, data_path, label_path, run)
    text_path = Path(options.output_file) if options.output_file else run.folder / "results.txt"
    make_folder(text_path.parent)
    run.write_experiment()
    threshold = options.reject_threshold
    if threshold > 0 and UNKNOWN_CLASS in predictor.class_names:
        run.warn(
            f"A class of the model is called {UNKNOWN_CLASS}; clips that are rejected have the label {UNKNOWN_LABEL}."
        )
    logits = predict_file(predictor, data_path, batch_size, run, "inference")
    predictions = predictor.decide(logits, threshold)
    ranked = rank_classes(predictions.probabilities, options.top_k)
    files = {"results": str(text_path)}
    files |= {f"results_{ending}": str(run.folder / f"results.{ending}") for ending in ("csv", "json")}
    with write_atomically(text_path, "w") as file:
        file.writelines(join_lines(predictions.class_names))
    write_csv(files["results_csv"], *_list_rows(predictor, predictions, names, ranked, threshold > 0))
    write_json(files["results_json"], run.show(_describe_results(predictor, predictions, names, ranked, data_path)))
    if explainer:
        files |= write_explanations(explainer, data_path, ranked[:, 0], names, run, options.explain_clips)
    run.info(f"Wrote the classes of {len(names)} clips to {text_path}.")
    is_known = predictions.labels != UNKNOWN_LABEL
    counts = np.bincount(predictions.labels[is_known], minlength=predictor.num_classes).tolist()
    metrics: dict[str, Any] = {
        "num_clips": len(names),
        "clips_per_class": dict(zip(predictor.class_names, counts, strict=True)),
    }
    if threshold > 0:
        metrics["num_unknown"] = int((~is_known).sum())
        run.info(f"{metrics['num_unknown']} of them are {UNKNOWN_CLASS}: no class has a probability of {threshold:g}.")
    return Result(metrics, files)


def _check_clips(predictor: Predictor, data_path: str, label_path: str, run: Run) -> list[str]:
    """Names of the clips; of a label file only the names are used."""
    problems: list[Problem] = []
    names: list[str] = []
    try:
        if label_path:
            names = read_labels(label_path).names
    except DataError as error:
        problems += error.problems
    try:
        info = check_dataset(data_path, None, layout=predictor.layout, num_channels=_find_channels(predictor))
    except DataError as error:
        raise DataError(*problems, *error.problems) from None
    if problems:
        raise DataError(*problems)
    num_clips = info.shape[0]
    if label_path and len(names) != num_clips:
        expected = f"{num_clips}, one for each clip of {data_path}"
        raise DataError(Problem(label_path, f"{len(names)} names", expected))
    for warning in info.warnings:
        run.warn(warning)
    return names or [f"clip_{number}" for number in range(num_clips)]


def _find_channels(predictor: Predictor) -> int | None:
    return predictor.pipeline.num_channels if predictor.pipeline else None


def predict_file(predictor: Predictor, data_path: str, batch_size: int, run: Run, what: str) -> NDArray[np.float32]:
    """Logits (N, classes) of the clips in a .npy file, read batch by batch from a memory map, with progress."""
    array = open_array(data_path)
    logits = np.empty((len(array), predictor.num_classes), np.float32)
    for start in range(0, len(array), batch_size):
        stop = min(start + batch_size, len(array))
        where = f"{data_path}: clips {start} to {stop - 1}"
        logits[start:stop] = predictor.logits(array[start:stop], batch_size, where)
        run.progress(stop, len(array), what)
    return logits


def rank_classes(probabilities: NDArray[np.float64], top_k: int) -> NDArray[np.intp]:
    """(N, classes) -> labels (N, k), most probable first; among equals the lowest label."""
    return np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]


def _list_rows(
    predictor: Predictor,
    predictions: Predictions,
    names: Sequence[str],
    ranked: NDArray[np.intp],
    rejects: bool,
) -> tuple[list[str], Iterator[list[Any]]]:
    """Header and rows of results.csv: the answer, then the second class and so on up to top_k.

    Where clips can be rejected, the best class has columns of its own, as the answer may be unknown.
    """
    header = ["index", "name", "class", "label", "probability", *(["best_class", "best_label"] if rejects else [])]
    for rank in range(2, ranked.shape[1] + 1):
        header += [f"class_{rank}", f"probability_{rank}"]

    def list_rows() -> Iterator[list[Any]]:
        for index, name in enumerate(names):
            best = int(ranked[index, 0])
            row: list[Any] = [index, name, predictions.class_names[index], int(predictions.labels[index])]
            row.append(format_probability(predictions.probabilities[index, best]))
            row += [predictor.class_names[best], best] if rejects else []
            for other in ranked[index, 1:]:
                row += [
                    predictor.class_names[other],
                    format_probability(predictions.probabilities[index, other]),
                ]
            yield row

    return header, list_rows()


def _describe_results(
    predictor: Predictor,
    predictions: Predictions,
    names: Sequence[str],
    ranked: NDArray[np.intp],
    data_path: str,
) -> dict[str, Any]:
    def describe(index: int, label: int) -> dict[str, Any]:
        probability = float(predictions.probabilities[index, label])
        return {"class": predictor.class_names[label], "label": label, "probability": probability}

    results = [
        {
            "index": index,
            "name": name,
            "class": predictions.class_names[index],
            "label": int(predictions.labels[index]),
            "probability": float(predictions.probabilities[index].max()),
            "top_k": [describe(index, int(label)) for label in ranked[index]],
        }
        for index, name in enumerate(names)
    ]
    return {
        "model": predictor.path,
        "data_path": data_path,
        "class_names": predictor.class_names,
        "results": results,
    }


def format_probability(value: float) -> str:
    return f"{value:.6g}"


def join_lines(names: Iterable[str]) -> Iterator[str]:
    """One name a line, whatever the names hold."""
    return (" ".join(name.splitlines()) + "\n" for name in names)


def write_csv(path: str | Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table, atomically. Text that a spreadsheet would run as a formula (=, +, -, @) gets an apostrophe in front."""
    with write_atomically(path, "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        for row in (header, *rows):
            writer.writerow([defuse(cell) if isinstance(cell, str) else cell for cell in row])


def defuse(text: str) -> str:
    """The text, with an apostrophe in front where a spreadsheet would take it for a formula."""
    return f"'{text}" if text.startswith(FORMULA_STARTS) else text


def find_batch_size(spec: Spec, options: EvaluateSpec | InferenceSpec, action: str) -> int:
    """<action>.batch_size, or dataset.batch_size where it is -1. Raises SpecError for 0."""
    if options.batch_size == 0:
        raise SpecError(Problem(f"{action}.batch_size", "0", "at least 1, or -1 for dataset.batch_size"))
    return spec.dataset.batch_size if options.batch_size < 0 else options.batch_size


def open_model(spec: Spec, run: Run, options: EvaluateSpec | InferenceSpec, action: str) -> Predictor:
    """The model of <action>.checkpoint on the right device, with class names, after `check_agreement`."""
    path = Path(options.checkpoint)
    device = _choose_device(path, run, options, action)
    predictor = load(path, options.backend, find_encryption_key(spec), device, options.threads)
    label_map = check_agreement(spec, run, predictor.description, str(path))
    _take_input_options(spec, run, predictor)
    if label_map is not None and predictor.label_map is None:
        predictor.name_classes(label_map)
    return predictor


def _take_input_options(spec: Spec, run: Run, predictor: Predictor) -> None:
    """The test clips that the user asked for; of all else about the input the model's own holds, which is said."""
    trained = predictor.pipeline.options if predictor.pipeline else None
    defaults = InputSpec()
    for entry in fields(InputSpec):
        key, value = f"input.{entry.name}", getattr(spec.input, entry.name)
        held = getattr(trained or defaults, entry.name)
        # A template states every option; only a value that somebody chose counts
        chosen = run.origins.get(key) == "override" or value != getattr(defaults, entry.name)
        if not chosen or value == held or UNKNOWN.get(entry.name) == value:
            continue
        if entry.name == "test_clips":
            predictor.set_test_clips(value)
        else:
            _warn_held(run, key, value, predictor.path, held)


def open_explainer(spec: Spec, predictor: Predictor, options: EvaluateSpec | InferenceSpec) -> Explainer | None:
    """What says why, if the spec asks for it. Raises UserError for a model that cannot."""
    if not options.explain:
        return None
    return load_explainer(predictor.path, find_encryption_key(spec), predictor.class_names)


def _choose_device(path: Path, run: Run, options: EvaluateSpec | InferenceSpec, action: str) -> str:
    if options.num_gpus > 1 or options.num_nodes > 1:
        key = "num_gpus" if options.num_gpus > 1 else "num_nodes"
        run.warn(f"{action}.{key}={max(options.num_gpus, options.num_nodes)}: {action} uses one device.")
    num_gpus = 0
    takes_gpu = KINDS.get(path.suffix.lower()) == "torch" or options.backend == "tensorrt"
    if takes_gpu and options.backend not in CPU_ONLY:
        import torch

        num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if num_gpus == 0:
        if (options.num_gpus, options.gpu_ids) != (1, [0]):
            run.info(f"{action} of {path.name} runs on the CPU: num_gpus and gpu_ids have no effect.")
        return ""
    gpu_id = options.gpu_ids[0] if options.gpu_ids else 0
    if not 0 <= gpu_id < num_gpus:
        raise SpecError(Problem(f"{action}.gpu_ids", str(options.gpu_ids), f"ids from 0 to {num_gpus - 1}"))
    return f"cuda:{gpu_id}"


def check_agreement(spec: Spec, run: Run, model: ModelDescription, where: str) -> dict[str, int] | None:
    """Compare what the user set about the model with what its file says; return the label map that holds.

    Only options that the user gave are compared, and only where the file tells. Raises SpecError with every
    disagreement, each with both values.
    """
    problems = []

    def disagree(key: str, got: Any, expected: Any) -> None:
        place = f"{key} ({run.origins.get(key, 'file')})"
        hint = f"Leave {key} out: the model file says it. Or choose another model."
        problems.append(Problem(place, str(got), f"{expected}, as in {where}", hint))

    options = model.metadata.get("model", {})
    known: list[tuple[str, Any, Any]] = [
        ("model.model_type", spec.model.model_type, options.get("model_type")),
        ("model.input_channels", spec.model.input_channels, options.get("input_channels")),
        ("dataset.num_classes", spec.dataset.num_classes, model.num_classes),
    ]
    for key, got, expected in known:
        if run.is_set(key) and expected is not None and got != expected:
            disagree(key, got, expected)
    if model.layout is not None:
        _compare_graphs(spec, run, model.layout, options.get("graph_strategy", ""), disagree)
    given = spec.dataset.label_map if run.is_set("dataset.label_map") else None
    if given and model.label_map:
        wrong = {name: label for name, label in given.items() if model.label_map.get(name) != label}
        if wrong:
            disagree("dataset.label_map", wrong, model.label_map)
    elif given:
        problems += check_label_map(given, model.num_classes)
    if problems:
        raise SpecError(*problems)
    _notice_other_wishes(spec, run, options, where)
    return model.label_map or given or None


def _notice_other_wishes(spec: Spec, run: Run, options: Mapping[str, Any], where: str) -> None:
    """Options of the network that are not compared: a file has them from its training, but an override is a wish."""
    for entry in fields(ModelSpec):
        key, value = f"model.{entry.name}", getattr(spec.model, entry.name)
        held = options.get(entry.name, value)
        if entry.name not in COMPARED_OPTIONS and run.origins.get(key) == "override" and value != held:
            _warn_held(run, key, value, where, held)


def _warn_held(run: Run, key: str, value: Any, where: str, held: Any) -> None:
    run.warn(f"{key} {value} has no effect: {where} was trained with {held}, which holds.")


def _compare_graphs(
    spec: Spec, run: Run, layout: Layout, strategy: str, disagree: Callable[[str, Any, Any], None]
) -> None:
    """Layouts and strategies are equal where the network sees the same graph, whatever they are called."""
    is_unknown = layout.name == UNKNOWN_LAYOUT
    if run.is_set("model.graph_layout"):
        given = get_layout(spec.model.graph_layout, "model.graph_layout")
        same = given.num_joints == layout.num_joints and _list_links(given) == _list_links(layout)
        if not is_unknown and same:
            same = _have_equal_graphs(given, layout, strategy, strategy)
        if not same:
            disagree("model.graph_layout", _describe_layout(given), _describe_layout(layout))
    # The strategy behind a graph that matches no known layout cannot be told from its weights
    if run.is_set("model.graph_strategy") and strategy and not is_unknown:
        given_strategy = spec.model.graph_strategy
        if not _have_equal_graphs(layout, layout, given_strategy, strategy):
            disagree("model.graph_strategy", given_strategy, strategy)


def _have_equal_graphs(first: Layout, second: Layout, first_strategy: str, second_strategy: str) -> bool:
    first_graph, second_graph = (
        build_adjacency(first, first_strategy),
        build_adjacency(second, second_strategy),
    )
    return first_graph.shape == second_graph.shape and bool(np.allclose(first_graph, second_graph, atol=1e-5))


def _list_links(layout: Layout) -> set[frozenset[int]]:
    return {frozenset(edge) for edge in layout.edges}


def _describe_layout(layout: Layout) -> str:
    return f"{layout.name} ({layout.num_joints} joints)"
