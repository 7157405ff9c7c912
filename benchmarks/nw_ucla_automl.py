"""What AutoML adds to the original's recipe on NW-UCLA, cross-view, through the public actions.

    .venv/bin/python benchmarks/nw_ucla_automl.py --data ../shared/data/nw_ucla.npz

The same command goes on where it was stopped. Three steps:
1. `automl` searches with asha on views 1 and 2 without two subjects, who are the validation split; then your spec (the
   original's recipe) and the best trial are trained again with other seeds (automl.confirm_seeds).
2. Both are trained on all clips of views 1 and 2, for as many epochs, with several seeds; the last epoch counts.
3. Each of these models reads the test view once. Nothing is chosen by it.
Clips have 32 frames, and trainings are short: what is measured is the gain at this budget, not the best possible.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from kinegraph.actions import automl, evaluate, train
from kinegraph.run import show_messages
from kinegraph.storage import make_folder, write_json
from nw_ucla import CLASS_NAMES, fit_length

NUM_FRAMES = 32
VALIDATION_SUBJECTS = (1, 2)
SEARCH = {
    "algorithm": "asha",
    "automl_max_recommendations": 16,
    "automl_max_epochs": 9,
    "automl_reduction_factor": 3,
    "automl_hyperparameters": [
        "+train.optim.lr_scheduler",
        "+train.optim.optimizer_type",
        "+train.optim.warmup_epochs",
        "+dataset.random_move",
    ],
    "confirm_seeds": 2,
}
FINAL_SEEDS = (1, 2)
RESULT_PATH = Path(__file__).parent / "results" / "nw_ucla_automl.json"


def prepare(source: Path, folder: Path) -> None:
    """Write arrays (N, C, T, V, 1) and labels of the parts, each clip centred on the first frame's hip centre."""
    content = np.load(source)
    clips = np.split(content["frames"], np.cumsum(content["length"])[:-1])
    array = np.stack([fit_length(clip - clip[0, 0], NUM_FRAMES) for clip in clips])
    array = np.ascontiguousarray(array.transpose(0, 3, 1, 2)[..., None], dtype=np.float32)
    is_test, is_val = content["test"], np.isin(content["subject"], VALIDATION_SUBJECTS)
    parts = {"train": ~is_test & ~is_val, "val": ~is_test & is_val, "whole": ~is_test, "test": is_test}
    for part, chosen in parts.items():
        np.save(folder / f"{part}_data.npy", array[chosen])
        names, labels = content["name"][chosen].tolist(), content["label"][chosen].tolist()
        write_json(folder / f"{part}_label.json", {"names": names, "labels": labels})


def name_files(folder: Path, part: str) -> dict[str, str]:
    return {"data_path": str(folder / f"{part}_data.npy"), "label_path": str(folder / f"{part}_label.json")}


def make_spec(folder: Path) -> dict[str, Any]:
    """The original's recipe, with the epochs of the search."""
    optim = {"optimizer_type": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}
    optim |= {"lr_scheduler": "MultiStep", "lr_steps": [10, 60], "lr_decay": 0.1}
    return {
        "results_dir": str(folder / "search"),
        "wandb": {"enable": False},
        "model": {"model_type": "ST-GCN", "graph_layout": "kinect_v1", "graph_strategy": "spatial", "dropout": 0.5},
        "dataset": {
            "train_dataset": name_files(folder, "train"),
            "val_dataset": name_files(folder, "val"),
            "label_map": {name: label for label, name in enumerate(CLASS_NAMES)},
            "batch_size": 16,
            "num_workers": 0,
        },
        "train": {"num_epochs": SEARCH["automl_max_epochs"], "accelerator": "cpu", "optim": optim},
        "automl": SEARCH,
    }


def measure_final(folder: Path, spec: dict[str, Any], name: str, seed: int) -> dict[str, float]:
    """Train on all training clips and read the test view, once: a result that is there is not measured again."""
    results = folder / "final" / f"{name}_seed_{seed}"
    done = results / "evaluate" / "metrics.json"
    if not done.is_file():
        dataset = spec["dataset"] | {"train_dataset": name_files(folder, "whole")}
        options = spec["train"] | {"seed": seed, "results_dir": "", "num_epochs": SEARCH["automl_max_epochs"]}
        final = {**spec, "results_dir": str(results), "dataset": dataset, "train": options}
        final = {
            key: value for key, value in final.items() if key in ("results_dir", "wandb", "model", "dataset", "train")
        }
        train(final)
        test = {"test_dataset": name_files(folder, "test"), "checkpoint": str(results / "train/pc_model_latest.pth")}
        evaluate({"results_dir": str(results), "evaluate": test})
    return {"seed": seed, "test_accuracy": json.loads(done.read_text())["accuracy"]}


def sum_up(scores: list[dict[str, float]]) -> dict[str, Any]:
    values = [score["test_accuracy"] for score in scores]
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"by_seed": scores, "mean": statistics.fmean(values), "standard_deviation": spread}


def read_trials(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "all_trials.csv").read_text(encoding="utf-8").splitlines()
    header = text[0].split(",")
    return [dict(zip(header, line.split(","), strict=False)) for line in text[1:]]


def sum_seconds(folder: Path) -> float:
    """Of all epochs of all trainings below a folder."""
    total = 0.0
    for path in folder.rglob("metrics.csv"):
        with open(path, newline="") as file:
            total += sum(float(row["seconds"]) for row in csv.DictReader(file))
    return round(total, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/nw_ucla.npz"))
    parser.add_argument("--runs", type=Path, default=Path.home() / "kinegraph-runs" / "nw_ucla_automl")
    parser.add_argument("--output", type=Path, default=RESULT_PATH)
    arguments = parser.parse_args()
    show_messages()
    folder = make_folder(arguments.runs)
    if not (folder / "test_data.npy").exists():
        prepare(arguments.data, folder)
    spec = make_spec(folder)
    found = automl(spec)
    search_folder = Path(found.files["results_dir"])
    best_spec = yaml.safe_load((search_folder / "best_spec.yaml").read_text())
    sides = {"default": spec, "automl": best_spec}
    final = {
        name: sum_up([measure_final(folder, side, name, seed) for seed in FINAL_SEEDS]) for name, side in sides.items()
    }
    comparison_path = search_folder / "comparison.json"
    result = {
        "dataset": "NW-UCLA cross-view (train views 1 and 2, test view 3), 32 frames",
        "validation": f"subjects {VALIDATION_SUBJECTS} inside the training views",
        "network": "ST-GCN, 3.1 million parameters",
        "search": SEARCH,
        "search_result": found.metrics,
        "comparison_on_validation": json.loads(comparison_path.read_text()) if comparison_path.exists() else None,
        "trials": read_trials(search_folder),
        "test": final,
        "test_gain": final["automl"]["mean"] - final["default"]["mean"],
        "train_seconds": {part: sum_seconds(folder / part) for part in ("search", "final")},
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }
    write_json(arguments.output, result)
    print(json.dumps(final, indent=2))


if __name__ == "__main__":
    main()
