"""How accurate a recipe is on real recordings, by one protocol: docs/accuracy.md.

    .venv/bin/python benchmarks/accuracy.py --dataset nw_ucla --recipe small --seeds 3
    .venv/bin/python benchmarks/accuracy.py --dataset nw_ucla --recipe small --seeds 3 --final

The first command trains without the validation part and measures on it. The second also trains the final models on the
whole training part and reads the test part, once for each model: a read is logged in benchmarks/test_reads.jsonl. The
same command goes on with what was stopped. A recipe is one of Kinegraph, `reference` or `baseline`. Without --dataset
only the tables of docs/accuracy.md are written again.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from accuracy_data import SOURCES, SPLITS, Fold, read_recordings
from accuracy_protocol import (
    Baseline,
    Contestant,
    PartOutcome,
    Plan,
    Training,
    add_outcomes,
    find_commit,
    list_choices,
    plan_recipe,
)
from kinegraph.config_source import nest
from kinegraph.errors import UserError
from kinegraph.run import format_duration, show_messages
from kinegraph.storage import append_line, dump_json, lock_folder, make_folder, write_atomically, write_json

HERE = Path(__file__).parent
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
COLUMNS = (
    *("recipe", "test accuracy %", "validation %", "seeds", "parameters", "multiply-adds"),
    *("training", "on", "test reads"),
)
RECIPE_ORDER = ("baseline", "reference", "tao", "online", "small", "balanced", "best")

FLOORS: dict[str, dict[str, float]] = {
    "nw_ucla": {"1-NN": 58.4, "RBF-SVM": 69.0},
    "penn_action": {"1-NN": 89.3, "RBF-SVM": 90.2},
    "utkinect": {"RBF-SVM": 82.9},
}
"""Untuned, on positions and velocities of 32 frames; measured by others on the same files."""

READ, RECALLED = "read in a paper, log or repository", "recalled, not checked"
PUBLISHED: dict[str, tuple[tuple[str, str, str], ...]] = {
    "nw_ucla": (
        ("SkateFormer", "98.3", RECALLED),
        ("TD-GCN", "97.4", READ),
        ("LSTC-MDA", "97.2", READ),
        ("InfoGCN", "97.0", READ),
        ("CTR-GCN, four streams", "96.5 claimed, 95.0-95.5 reproduced", READ),
        ("CTR-GCN, joints", "93.5 reproduced", READ),
        ("Shift-GCN", "94.6", RECALLED),
        ("HBRNN-L", "78.5", RECALLED),
    ),
}
"""(network, test accuracy in percent, how we know). Most choose their best epoch on the test part; ours never do."""


@dataclass(frozen=True)
class SeedRow:
    """Accuracies in percent; `trained` is the final training if there is one, else that of the validation."""

    val_accuracy: float | None
    test_accuracy: float | None
    trained: PartOutcome
    is_final: bool = False


def read_log(path: Path) -> list[dict[str, Any]]:
    """Every look at a test part, the oldest first."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def find_read(log: list[dict[str, Any]], plan: Plan, seed: int) -> dict[str, Any] | None:
    """The first look at the test part with this data set, recipe and seed."""
    wanted = (plan.dataset, plan.recipe_hash, seed)
    return next((read for read in log if _name_read(read) == wanted and read["test_accuracy"] is not None), None)


def _name_read(read: dict[str, Any]) -> tuple[str, str, int]:
    return read["dataset"], read["recipe_hash"], read["seed"]


def find_reads(log: list[dict[str, Any]], dataset: str, recipe: str) -> list[dict[str, Any]]:
    """The looks at the test part for a recipe: in all its versions, and with the epochs that `--epochs` gave it."""
    own = re.compile(rf"{re.escape(recipe)}(_\d+_epochs)?")
    return [read for read in log if read["dataset"] == dataset and own.fullmatch(read["recipe"])]


def count_reads(log: list[dict[str, Any]], dataset: str, recipe: str) -> int:
    """How often the test part was read for a recipe: its seeds together count once, every change of it once more, and
    so does every repetition. A read that was begun and not finished counts, too."""
    own = find_reads(log, dataset, recipe)
    finished = Counter(_name_read(read) for read in own if read["test_accuracy"] is not None)
    most: dict[str, int] = {}
    for read in own:
        most[read["recipe_hash"]] = max(most.get(read["recipe_hash"], 1), finished[_name_read(read)])
    return sum(most.values())


def measure_seed(
    contestant: Contestant,
    plan: Plan,
    folds: list[Fold],
    seed: int,
    is_final: bool,
    log_path: Path,
    validates: bool = True,
) -> SeedRow:
    """Validation, and with `is_final` the test, unless the log knows its result."""
    validated = add_outcomes([contestant.validate(fold) for fold in folds]) if validates else None
    read = find_read(read_log(log_path), plan, seed)
    found = [contestant.find_tested(fold) for fold in folds]
    tested = [each for each in found if each is not None]
    if read is None and is_final:
        if all(_name_read(begun) != (plan.dataset, plan.recipe_hash, seed) for begun in read_log(log_path)):
            log_read(log_path, plan, seed, find_commit(), None)  # before the first fold is looked at
        tested = [contestant.test(fold) for fold in folds]
        total = add_outcomes(tested)
        read = log_read(log_path, plan, seed, total.commit, compute_percent(total))
    is_complete = read is not None and len(tested) == len(folds)
    trained = add_outcomes(tested) if is_complete else validated
    if trained is None:
        raise SystemExit(f"Seed {seed} was tested, but its trainings are not here: leave out --unvalidated.")
    val_accuracy = compute_percent(validated) if validated else None
    return SeedRow(val_accuracy, read["test_accuracy"] if read else None, trained, is_complete)


def log_read(path: Path, plan: Plan, seed: int, commit: str, accuracy: float | None) -> dict[str, Any]:
    """Note a look at the test part: without an accuracy one that begins."""
    read = {
        "dataset": plan.dataset,
        "recipe": plan.recipe,
        "recipe_hash": plan.recipe_hash,
        "commit": commit,
        "seed": seed,
        "test_accuracy": accuracy,
        "date": datetime.now(UTC).date().isoformat(),
    }
    append_line(path, dump_json(read))
    return read


def compute_percent(outcome: PartOutcome) -> float:
    return round(100 * outcome.right / outcome.clips, 2)


def read_results(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text()) if path.exists() else []


def find_entry(entries: list[dict[str, Any]], plan: Plan) -> dict[str, Any] | None:
    wanted = (plan.dataset, plan.recipe_hash)
    return next((entry for entry in entries if (entry["dataset"], entry["recipe_hash"]) == wanted), None)


def is_measured(entry: dict[str, Any] | None, seed: int, is_final: bool, validates: bool = True) -> bool:
    """Whether the results hold all that is asked for."""
    if entry is None or seed not in entry["seeds"]:
        return False
    place = entry["seeds"].index(seed)
    needed = ["val_accuracy"] * validates + ["test_accuracy"] * is_final
    return all(entry[name][place] is not None for name in needed)


def merge_row(entry: dict[str, Any] | None, plan: Plan, seed: int, row: SeedRow) -> dict[str, Any]:
    """The entry of a plan with one more seed, or with a seed measured again."""
    listed = ("test_accuracy", "val_accuracy", "train_seconds")
    rows = {}
    if entry is not None:
        rows = {known: [entry[name][i] for name in listed] for i, known in enumerate(entry["seeds"])}
    tested, validated, seconds = rows.get(seed, [None, None, None])
    known_val = validated if row.val_accuracy is None else row.val_accuracy  # --unvalidated measures none
    # A validation that is measured after its test does not stand for the final model
    final = entry if tested is not None and not row.is_final else None
    rows[seed] = [row.test_accuracy, known_val, seconds if final else round(row.trained.seconds, 1)]
    seeds = sorted(rows)
    merged = {
        "dataset": plan.dataset,
        "recipe": plan.recipe,
        "recipe_hash": plan.recipe_hash,
        "seeds": seeds,
        **{name: [rows[known][i] for known in seeds] for i, name in enumerate(listed)},
        "parameters": row.trained.parameters,
        "multiply_adds_per_clip": row.trained.multiply_adds,
        "device": row.trained.device,
        "threads": row.trained.threads,
        "commit": row.trained.commit,
        "left_out": list(plan.left_out),
        "spec": nest(plan.values),
    }
    return merged | {name: final[name] for name in ("device", "threads", "commit")} if final else merged


def build_tables(entries: list[dict[str, Any]], log: list[dict[str, Any]]) -> str:
    """A Markdown table for each data set: what was measured here, floors, published numbers."""
    parts = []
    for dataset, source in SOURCES.items():
        shown = choose_entries([entry for entry in entries if entry["dataset"] == dataset])
        order = sorted(shown, key=lambda name: (RECIPE_ORDER.index(name) if name in RECIPE_ORDER else 99, name))
        lines = [
            f"### {source.title}",
            "",
            f"| {' | '.join(COLUMNS)} |",
            "|" + "---|" * len(COLUMNS),
            *(_format_row(name, shown[name], log) for name in order),
            *(
                f"| floor: {name} | {percent} |" + " |" * (len(COLUMNS) - 2)
                for name, percent in FLOORS[dataset].items()
            ),
        ]
        if dataset in PUBLISHED:
            lines += ["", "| published | test accuracy % | known how |", "|---|---|---|"]
            lines += [f"| {' | '.join(row)} |" for row in PUBLISHED[dataset]]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def choose_entries(entries: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Entries of a data set by recipe: that of the recipe as it is now, and of one that is not measured, the newest."""
    shown = {entry["recipe"]: entry for entry in entries}
    for entry in entries:
        name = re.sub(r"_\d+_epochs$", "", entry["recipe"])
        if _is_current(entry, name):
            if shown[entry["recipe"]] is entry:
                del shown[entry["recipe"]]  # with its number of epochs it has become the recipe
            shown[name] = entry
    return shown


def _is_current(entry: dict[str, Any], name: str) -> bool:
    try:
        return plan_recipe(entry["dataset"], name).recipe_hash == entry["recipe_hash"]
    except UserError:  # a recipe that is gone
        return False


def _format_row(recipe: str, entry: dict[str, Any], log: list[dict[str, Any]]) -> str:
    earlier: dict[tuple[str, str], list[float]] = {}
    for read in find_reads(log, entry["dataset"], recipe):
        if read["recipe_hash"] != entry["recipe_hash"] and read["test_accuracy"] is not None:
            cut = read["recipe"].removeprefix(recipe).strip("_").replace("_", " ")
            earlier.setdefault((read["recipe_hash"], cut), []).append(read["test_accuracy"])
    reads = str(count_reads(log, entry["dataset"], recipe))
    if earlier:
        means = (f"{statistics.mean(own):.1f} {cut}".strip() for (_, cut), own in earlier.items())
        reads += f" (other versions: {', '.join(means)})"
    threads = f", {entry['threads']} threads" if entry["device"].startswith("CPU") else ""
    cells = [
        recipe,
        _format_spread(entry["test_accuracy"]),
        _format_spread(entry["val_accuracy"], "not measured"),
        str(len(entry["seeds"])),
        format_count(entry["parameters"]),
        format_count(entry["multiply_adds_per_clip"]),
        format_duration(statistics.mean(entry["train_seconds"])),
        f"{entry['device']}{threads}",
        reads,
    ]
    return f"| {' | '.join(cells)} |"


def _format_spread(values: list[float | None], otherwise: str = "not read") -> str:
    """Mean and, of several, (min..max); how many seeds it is of where others lack the number."""
    known = [value for value in values if value is not None]
    if not known:
        return otherwise
    text = f"{statistics.mean(known):.1f}"
    if len(known) > 1:
        text += f" ({min(known):.1f}..{max(known):.1f})"
    return text if len(known) == len(values) else f"{text}, {len(known)} of {len(values)} seeds"


def format_count(number: int) -> str:
    for size, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return str(number)


def write_tables(path: Path, tables: str) -> None:
    """Put the tables between their markers."""
    text = path.read_text()
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    with write_atomically(path, "w") as file:
        file.write(f"{text[:start]}\n\n{tables}\n\n{text[end:]}")


def run_benchmark(arguments: argparse.Namespace) -> None:
    """Measure what is not measured yet; after every seed the results and tables are written."""
    plan = plan_recipe(arguments.dataset, arguments.recipe, arguments.epochs)
    if arguments.unvalidated and (chosen := list_choices(plan)):
        raise SystemExit(f"--unvalidated: the validation of {plan.recipe} chooses {', '.join(chosen)}.")
    seeds = [1] if arguments.recipe == "baseline" else arguments.seed_list or list(range(1, arguments.seeds + 1))
    entry = find_entry(read_results(arguments.results), plan)
    validates = not arguments.unvalidated
    waiting = [seed for seed in seeds if not is_measured(entry, seed, arguments.final, validates)]
    if not waiting:
        return
    recordings = read_recordings(arguments.data / f"{arguments.dataset}.npz", SOURCES[arguments.dataset])
    folds = SPLITS[arguments.dataset](recordings)
    make_folder(arguments.runs)
    for seed in waiting:
        contestant: Contestant = Training(plan, seed, recordings, arguments.runs)
        if arguments.recipe == "baseline":
            contestant = Baseline(plan, recordings)
        row = measure_seed(contestant, plan, folds, seed, arguments.final, arguments.log, validates)
        with lock_folder(arguments.runs, wait_s=60):
            entries = read_results(arguments.results)
            entry = find_entry(entries, plan)
            others = [each for each in entries if each is not entry]
            write_json(arguments.results, [*others, merge_row(entry, plan, seed, row)])
            write_tables(arguments.document, build_tables(read_results(arguments.results), read_log(arguments.log)))
        validated = _format_spread([row.val_accuracy], "not measured")
        tested = _format_spread([row.test_accuracy])
        print(f"{plan.dataset}, {plan.recipe}, seed {seed}: validation {validated}, test {tested}")


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=tuple(SOURCES))
    parser.add_argument("--recipe", help="a recipe of Kinegraph, reference or baseline")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 1 to N; the baseline has one")
    parser.add_argument("--seed-list", type=lambda text: [int(word) for word in text.split(",")], help="such as 1,2,3")
    parser.add_argument("--final", action="store_true", help="train the final models and read the test part")
    parser.add_argument(
        "--unvalidated", action="store_true", help="with --final: no validation trainings, where they choose nothing"
    )
    parser.add_argument("--epochs", type=int, default=0, help="cut the recipe to so many, as a recipe of its own")
    parser.add_argument("--jobs-threads", type=int, help="CPU threads of a training")
    parser.add_argument(
        "--data",
        type=Path,
        default=HERE.parent.parent / "shared/data",
        help="folder of the recordings (.npz), default shared/data beside the project",
    )
    parser.add_argument(
        "--runs",
        type=Path,
        default=Path.home() / "kinegraph-runs/accuracy",
        help="folder of the trainings, to go on with",
    )
    parser.add_argument("--results", type=Path, default=HERE / "results/accuracy.json", help="file of the results")
    parser.add_argument("--log", type=Path, default=HERE / "test_reads.jsonl", help="file that notes each test read")
    parser.add_argument(
        "--document", type=Path, default=HERE.parent / "docs/accuracy.md", help="page whose tables are written again"
    )
    arguments = parser.parse_args(words)
    if bool(arguments.dataset) != bool(arguments.recipe):
        parser.error("--dataset and --recipe go together")
    if arguments.epochs < 0 or (arguments.epochs and arguments.recipe == "baseline"):
        parser.error("--epochs takes a number of 1 or more and a recipe that is trained")
    if arguments.unvalidated and (not arguments.final or arguments.recipe == "baseline"):
        parser.error("--unvalidated goes with --final and a recipe that is trained")
    return arguments


def main(words: list[str] | None = None) -> None:
    arguments = parse_arguments(words)
    show_messages()
    if arguments.jobs_threads:
        torch.set_num_threads(arguments.jobs_threads)
    if arguments.dataset:
        run_benchmark(arguments)
    write_tables(arguments.document, build_tables(read_results(arguments.results), read_log(arguments.log)))


if __name__ == "__main__":
    main()
