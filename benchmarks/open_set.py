"""Does a model notice actions it was never shown? Classes held out of training, told from known ones by their scores.

    .venv/bin/python benchmarks/open_set.py --data ../shared/data/nw_ucla.npz --recipe small

NW-UCLA, views 1 and 2 only: the test view is never read. Each of five folds trains on 8 of the 10 classes with six
subjects, through the public actions; two further subjects give the validation clips that the temperature is fitted on,
and two more are measured: their clips of known classes against their clips of the held-out ones. The same command
resumes what was stopped. The result file has the mean over the folds and each of them.
"""

from __future__ import annotations

import argparse
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import kinegraph
from accuracy_data import SOURCES, VALIDATION_SUBJECTS, Indices, Recordings, read_recordings, write_part
from accuracy_protocol import plan_recipe
from kinegraph.actions import evaluate, train
from kinegraph.calibration import softmax
from kinegraph.config_source import nest
from kinegraph.data.labels import read_labels
from kinegraph.metrics import measure_auroc, measure_calibration_error
from kinegraph.run import show_messages
from kinegraph.run_files import LATEST_NAME
from kinegraph.storage import make_folder, write_json

DATASET = "nw_ucla"
MEASURED_SUBJECTS = (4, 9)
"""Neither trained on nor used for the temperature. Every fifth, as VALIDATION_SUBJECTS."""
NUM_FOLDS = 5
KEPT_SHARE = 0.95
"""The threshold that is reported keeps so many of the validation clips."""
RESULT_PATH = Path(__file__).parent / "results" / "open_set.json"
Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Fold:
    """Indices of clips, and the labels of the classes that training does not see."""

    held_out: tuple[int, ...]
    fit: Indices
    val: Indices
    known: Indices
    unknown: Indices


def split(recordings: Recordings, num_classes: int) -> list[Fold]:
    """Every class is held out once, in pairs that stand apart in the list of classes."""
    subjects, may_read = recordings.subjects, ~recordings.is_test
    validates = may_read & np.isin(subjects, VALIDATION_SUBJECTS)
    measured = may_read & np.isin(subjects, MEASURED_SUBJECTS)
    folds = []
    for number in range(NUM_FOLDS):
        held_out = tuple(range(number, num_classes, NUM_FOLDS))
        is_known = ~np.isin(recordings.labels, held_out)
        parts = (may_read & ~validates & ~measured & is_known, validates & is_known)
        parts += (measured & is_known, measured & ~is_known)
        folds.append(Fold(held_out, *(np.flatnonzero(part) for part in parts)))
    return folds


def train_fold(
    fold: Fold, recordings: Recordings, values: dict[str, Any], folder: Path, seed: int
) -> tuple[str, dict[str, dict[str, str]]]:
    """The path of a model that knows all classes but those held out, and the files of its clips."""
    source = SOURCES[DATASET]
    names = [name for label, name in enumerate(source.class_names) if label not in fold.held_out]
    new_labels = np.full(len(source.class_names), -1)
    new_labels[[source.class_names.index(name) for name in names]] = np.arange(len(names))
    relabelled = replace(recordings, labels=new_labels[recordings.labels])
    files = {
        part: write_part(folder / "data", part, relabelled, getattr(fold, part), source, "raw")
        for part in ("fit", "val", "known", "unknown")
    }
    own = {"dataset.num_workers": 0, "train.checkpoint_interval": 5} | values
    for part, key in (("fit", "train"), ("val", "val")):
        own |= {f"dataset.{key}_dataset.{name}": path for name, path in files[part].items()}
    own |= {
        "dataset.num_classes": len(names),
        "dataset.label_map": {name: label for label, name in enumerate(names)},
        "results_dir": str(folder),
        "wandb.enable": False,
        "train.seed": seed,
    }
    train(nest(own))
    return str(folder / "train" / LATEST_NAME), files


def measure_fold(model: str, files: dict[str, dict[str, str]], folder: Path) -> dict[str, Any]:
    """How well the scores of a model tell known clips from unknown ones; known ones should score higher."""
    predictor = kinegraph.load(model)
    temperature = predictor.description.temperature
    logits = {part: predictor.logits(np.load(paths["data_path"])) for part, paths in files.items() if part != "fit"}
    data = {f"evaluate.test_dataset.{name}": path for name, path in files["known"].items()}
    tested = evaluate(nest(data | {"evaluate.checkpoint": model, "results_dir": str(folder)})).metrics
    truth = read_labels(files["known"]["label_path"]).labels
    threshold = float(np.quantile(find_confidence(logits["val"], temperature), 1 - KEPT_SHARE))
    rejected = {
        part: float((predictor.decide(logits[part], threshold).labels < 0).mean()) for part in ("known", "unknown")
    }
    return {
        "clips": {part: len(own) for part, own in logits.items()},
        "temperature": temperature,
        "accuracy_known": tested["accuracy"],
        "ece_before": round(100 * measure_calibration_error(softmax(logits["known"]), truth), 2),
        "ece_after": tested["ece"],
        "auroc_probability_before": compare(*(find_confidence(logits[part], 1.0) for part in ("known", "unknown"))),
        "auroc_probability_after": compare(
            *(find_confidence(logits[part], temperature) for part in ("known", "unknown"))
        ),
        "auroc_energy": compare(*(find_energy(logits[part]) for part in ("known", "unknown"))),
        "threshold": threshold,
        "known_rejected": rejected["known"],
        "unknown_rejected": rejected["unknown"],
    }


def find_confidence(logits: NDArray[np.float32], temperature: float) -> Scores:
    """The highest probability of each clip (Hendrycks and Gimpel, ICLR 2017)."""
    return np.asarray(softmax(logits, temperature).max(axis=1))


def find_energy(logits: NDArray[np.float32]) -> Scores:
    """The negative free energy of each clip, log sum exp of its logits (Liu et al., NeurIPS 2020, equation 4)."""
    return np.asarray(np.logaddexp.reduce(logits.astype(np.float64), axis=1))


def compare(known: Scores, unknown: Scores) -> float | None:
    """AUROC, or None where all scores are one: logits that are logarithms of probabilities have no energy."""
    if np.ptp(np.concatenate([known, unknown])) < 1e-4:
        return None
    return round(measure_auroc(known, unknown), 4)


def summarise(folds: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean of every number over the folds that are done."""
    names = [name for name in folds[0] if name not in ("clips", "held_out")]
    columns = {name: [fold[name] for fold in folds] for name in names}
    return {name: None if None in values else round(float(np.mean(values)), 4) for name, values in columns.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/nw_ucla.npz"))
    parser.add_argument("--runs", type=Path, default=Path.home() / "kinegraph-runs" / "open_set")
    parser.add_argument("--recipe", default="small")
    parser.add_argument("--folds", type=int, nargs="+", default=list(range(NUM_FOLDS)), choices=range(NUM_FOLDS))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--epochs", type=int, help="fewer than the recipe's, to try it out; not for the result file")
    parser.add_argument(
        "--output", type=Path, help="default: benchmarks/results/open_set.json; with --epochs in --runs"
    )
    arguments = parser.parse_args()
    show_messages()
    source = SOURCES[DATASET]
    recordings = read_recordings(arguments.data, source)
    plan = plan_recipe(DATASET, arguments.recipe)
    values = plan.values | ({"train.num_epochs": arguments.epochs} if arguments.epochs else {})
    name = f"{plan.folder_name}_{arguments.epochs}_epochs" if arguments.epochs else plan.folder_name
    runs = make_folder(arguments.runs / name / f"seed_{arguments.seed}")
    output = arguments.output or (runs / "open_set.json" if arguments.epochs else RESULT_PATH)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    result: dict[str, Any] = {
        "dataset": source.title,
        "protocol": f"views 1 and 2; subjects {list(VALIDATION_SUBJECTS)} fit the temperature, "
        f"{list(MEASURED_SUBJECTS)} are measured, the others train; last epoch",
        "recipe": arguments.recipe,
        "recipe_hash": plan.recipe_hash,
        "spec": values,
        "seed": arguments.seed,
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} thread(s)",
        "commit": commit,
        "folds": [],
    }
    folds = split(recordings, len(source.class_names))
    for number in arguments.folds:
        fold, folder = folds[number], make_folder(runs / f"fold_{number}")
        model, files = train_fold(fold, recordings, values, folder, arguments.seed)
        held_out = [source.class_names[label] for label in fold.held_out]
        result["folds"].append({"held_out": held_out, **measure_fold(model, files, folder)})
        result["mean"] = summarise(result["folds"])
        write_json(output, result)
    print(f"Mean over {len(result['folds'])} folds: {result['mean']}. Wrote {output}.")


if __name__ == "__main__":
    main()
