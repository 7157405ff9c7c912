"""Every option of TAO's pose classification is here with its default, range and choices; what an action demands."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from kinegraph.actions import ACTIONS
from kinegraph.config import find_choices, get_value, list_options
from kinegraph.errors import SpecError
from kinegraph.run import redact
from kinegraph.spec import REQUIRED, SECTIONS, SHORTHANDS, Spec
from kinegraph.spec_reading import check_spec, find_results_dir, read_spec
from kinegraph.templates import build_schema, build_template

SOURCE = Path(__file__).resolve().parents[1] / "src" / "kinegraph"

# key: (default, minimum, maximum, choices that the original has), or only the default
TABLE: dict[str, Any] = {
    "model_name": "pose_classification",
    "encryption_key": "",
    "results_dir": "",
    "wandb.enable": True,
    "wandb.project": "TAO Toolkit",
    "wandb.name": "TAO Toolkit Training",
    "wandb.entity": "",
    "wandb.group": "",
    "wandb.run_id": "",
    "wandb.tags": ["tao-toolkit"],
    "wandb.reinit": False,
    "wandb.sync_tensorboard": False,
    "wandb.save_code": False,
    "model.model_type": ("ST-GCN", None, None, ["ST-GCN"]),
    "model.pretrained_model_path": "",
    "model.input_channels": (3, 1, None, []),
    "model.dropout": (0.5, 0, 1, []),
    "model.graph_layout": "nvidia",
    "model.graph_strategy": ("spatial", None, None, ["uniform", "distance", "spatial"]),
    "model.edge_importance_weighting": True,
    "dataset.train_dataset.data_path": "",
    "dataset.train_dataset.label_path": "",
    "dataset.val_dataset.data_path": "",
    "dataset.val_dataset.label_path": "",
    "dataset.num_classes": (6, 1, None, []),
    "dataset.label_map": None,
    "dataset.random_choose": False,
    "dataset.random_move": False,
    "dataset.window_size": (-1, -1, None, []),
    "dataset.batch_size": (16, 1, None, []),
    "dataset.num_workers": (1, 0, None, []),
    "train.num_gpus": (1, 1, None, []),
    "train.num_nodes": (1, 1, None, []),
    "train.gpu_ids": [0],
    "train.seed": (1234, -1, None, []),
    "train.cudnn.benchmark": False,
    "train.cudnn.deterministic": True,
    "train.num_epochs": (10, 1, None, []),
    "train.checkpoint_interval": (1, 1, None, []),
    "train.checkpoint_interval_unit": ("epoch", None, None, ["epoch", "step"]),
    "train.validation_interval": (1, 1, None, []),
    "train.resume_training_checkpoint_path": "",
    "train.results_dir": "",
    "train.optim.optimizer_type": (
        *("torch.optim.SGD", None, None),
        ["torch.optim.SGD", "torch.optim.Adam", "torch.optim.Adamax"],
    ),
    "train.optim.lr": (0.1, 0, None, []),
    "train.optim.momentum": (0.9, 0, None, []),
    "train.optim.nesterov": True,
    "train.optim.weight_decay": (1e-4, 0, None, []),
    "train.optim.lr_scheduler": ("MultiStep", None, None, ["AutoReduce", "MultiStep"]),
    "train.optim.lr_monitor": ("val_loss", None, None, ["val_loss", "train_loss"]),
    "train.optim.patience": (1, 1, None, []),
    "train.optim.min_lr": (1e-4, 0, None, []),
    "train.optim.lr_steps": [10, 60],
    "train.optim.lr_decay": (0.1, 0, None, []),
    "train.grad_clip": (0.0, 0, None, []),
    "evaluate.num_gpus": (1, 1, None, []),
    "evaluate.gpu_ids": [0],
    "evaluate.num_nodes": (1, 1, None, []),
    "evaluate.checkpoint": "???",
    "evaluate.trt_engine": "",
    "evaluate.results_dir": "",
    "evaluate.batch_size": (-1, -1, None, []),
    "evaluate.test_dataset.data_path": "",
    "evaluate.test_dataset.label_path": "",
    "inference.num_gpus": (1, 1, None, []),
    "inference.gpu_ids": [0],
    "inference.num_nodes": (1, 1, None, []),
    "inference.checkpoint": "???",
    "inference.trt_engine": "",
    "inference.results_dir": "",
    "inference.batch_size": (-1, -1, None, []),
    "inference.test_dataset.data_path": "",
    "inference.test_dataset.label_path": "",
    "inference.output_file": "",
    "export.results_dir": "",
    "export.checkpoint": "",
    "export.onnx_file": "",
    "export.gpu_id": (0, 0, None, []),
    "dataset_convert.results_dir": "",
    "dataset_convert.data": "",
    "dataset_convert.pose_type": ("3dbp", None, None, ["3dbp", "25dbp", "2dbp"]),
    "dataset_convert.num_joints": (34, 1, None, []),
    "dataset_convert.input_width": (1920, 1, None, []),
    "dataset_convert.input_height": (1080, 1, None, []),
    "dataset_convert.focal_length": (1200.0, 0, None, []),
    "dataset_convert.sequence_length_max": (300, 1, None, []),
    "dataset_convert.sequence_length_min": (10, 1, None, []),
    "dataset_convert.sequence_length": (100, 1, None, []),
    "dataset_convert.sequence_overlap": (0.5, 0, 1, []),
}
AUTOML = {
    *("dataset.window_size", "model.dropout", "train.grad_clip", "train.optim.lr", "train.optim.lr_decay"),
    *("train.optim.momentum", "train.optim.patience", "train.optim.weight_decay"),
}
POPULAR = {f"{action}.{name}" for action in ("train", "evaluate", "inference") for name in ("num_gpus", "gpu_ids")}
POPULAR |= {f"{action}.num_nodes" for action in ("train", "evaluate", "inference")}
POPULAR |= {f"train.{name}" for name in ("num_epochs", "checkpoint_interval", "validation_interval")}
POPULAR_OF_AUTOML = {"algorithm", "metric", "automl_max_recommendations", "automl_max_epochs", "automl_hyperparameters"}
LAYOUTS_OF_THE_ORIGINAL = ("nvidia", "openpose", "human3.6m", "ntu-rgb+d", "ntu_edge", "coco")

OPTIONS = {entry.key: entry for entry in list_options(Spec)}


def fail(action: str, source: Any = None, *overrides: str) -> list[str]:
    with pytest.raises(SpecError) as caught:
        check_spec(read_spec(source, overrides), action)
    return [str(problem) for problem in caught.value.problems]


def test_table_is_complete() -> None:
    assert len(TABLE) == 89


@pytest.mark.parametrize("key", TABLE)
def test_option_is_as_in_the_original(key: str) -> None:
    row = TABLE[key]
    default, minimum, maximum, choices = row if isinstance(row, tuple) else (row, None, None, [])
    entry = OPTIONS[key]
    assert entry.default == default
    assert type(entry.default) is type(default)
    assert (entry.minimum, entry.maximum) == (minimum, maximum)
    ours = find_choices(Spec, key)
    assert set(choices) <= set(ours)
    assert bool(choices) == bool(ours)
    assert get_value(read_spec().values, key) == default
    assert entry.help


@pytest.mark.parametrize("key", [key for key, row in TABLE.items() if isinstance(row, tuple)])
def test_limits_and_choices_are_enforced(key: str) -> None:
    default, minimum, maximum, choices = TABLE[key]
    for value in [*choices, default, *(limit for limit in (minimum, maximum) if limit is not None)]:
        assert get_value(read_spec(None, [f"{key}={value}"]).values, key) == value
    bad = [limit + step for limit, step in ((minimum, -1), (maximum, 1)) if limit is not None]
    bad += ["no-such-choice"] if choices else []
    assert bad
    for value in bad:
        with pytest.raises(SpecError, match=re.escape(key)):
            read_spec(None, [f"{key}={value}"])


def test_automl_and_popular_marks() -> None:
    assert {key for key, entry in OPTIONS.items() if entry.extra["automl_enabled"]} == AUTOML
    assert {key for key, entry in OPTIONS.items() if entry.extra["popular"]} == POPULAR | {
        f"automl.{name}" for name in POPULAR_OF_AUTOML
    }


def test_all_layouts_of_the_original_are_taken() -> None:
    for name in LAYOUTS_OF_THE_ORIGINAL:
        assert read_spec(None, [f"graph_layout={name}"]).values.model.graph_layout == name
    assert read_spec(None, ["graph_layout=my_layout.yaml"]).values.model.graph_layout == "my_layout.yaml"
    with pytest.raises(SpecError, match="Did you mean 'nvidia'"):
        read_spec(None, ["graph_layout=nvidea"])


def expand_names(cell: str) -> list[str]:
    """`a.{b,c}.x, .y` -> a.b.x, a.c.x, a.b.y, a.c.y: the short form of the table in the facts."""
    names: list[str] = []
    for part in re.split(r", (?=[.a-z])", cell):
        full = part if not part.startswith(".") else names[0].rpartition(".")[0] + part
        variants = [full]
        while any("{" in name for name in variants):
            variants = [
                name[: name.index("{")] + choice + name[name.index("}") + 1 :]
                for name in variants
                for choice in name[name.index("{") + 1 : name.index("}")].split(",")
            ]
        names += variants
    return names


def test_table_names_the_options_of_the_facts(shared: Path) -> None:
    """A second reading of the source: its rows name exactly the keys of TABLE."""
    text = (shared / "facts" / "tao.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1].strip() for line in text.splitlines() if re.match(r"\| [a-z_]+[.{a-z_ ]", line)]
    rows = [row for row in rows if row not in ("key", "inference.*")]
    names = {name for row in rows for name in expand_names(row)}
    names = {re.sub(r"\.(sequence_length)_max, _min$", r".\1_max", name) for name in names}
    names |= {"dataset_convert.sequence_length_min"} if "dataset_convert.sequence_length_max" in names else set()
    names = {name for name in names if not name.endswith("._min") and name != "_min"}
    names |= {name.replace("evaluate.", "inference.") for name in names if name.startswith("evaluate.")}
    assert names == set(TABLE)


def test_shorthands() -> None:
    values = {
        "graph_layout": "coco",
        "resume_checkpoint": "a.pth",
        "pretrained_model": "b.pth",
        "export_onnx": "c.onnx",
    }
    values |= {"inference_output_file": "d.txt", "learning_rate": "0.5"}
    assert len(SHORTHANDS) == 13
    for short, full in SHORTHANDS.items():
        assert full in OPTIONS
        value = values.get(short, "7")
        loaded = read_spec(None, [f"{short}={value}"])
        assert str(get_value(loaded.values, full)) == value
        assert loaded.origins[full] == "override"
    with pytest.raises(SpecError, match=r"train\.num_epochs"):
        read_spec({"num_epochs": 3})


def test_documented_overrides() -> None:
    overrides = ["train.optim.lr_steps=[10,60]", "dataset.label_map.walking=4", "learning_rate=1e-4"]
    values = read_spec(None, overrides).values
    assert values.train.optim.lr_steps == [10, 60]
    assert values.dataset.label_map == {"walking": 4}
    assert values.train.optim.lr == 1e-4


def test_precision_is_a_number_in_yaml() -> None:
    assert read_spec(None, ["train.precision=32"]).values.train.precision == "32"
    assert read_spec(None, ["train.precision=bf16"]).values.train.precision == "bf16"


def write_inputs(folder: Path) -> dict[str, Any]:
    """A spec with every input of every action, all of them there."""
    for name in ("data.npy", "labels.pkl", "model.pth", "recording.json"):
        (folder / name).write_bytes(b"x")
    files = {"data_path": str(folder / "data.npy"), "label_path": str(folder / "labels.pkl")}
    return {
        "results_dir": str(folder / "results"),
        "dataset": {"train_dataset": files, "val_dataset": files},
        "evaluate": {"checkpoint": str(folder / "model.pth"), "test_dataset": files},
        "inference": {"checkpoint": str(folder / "model.pth"), "test_dataset": {"data_path": files["data_path"]}},
        "export": {"checkpoint": str(folder / "model.pth")},
        "dataset_convert": {"data": str(folder / "recording.json")},
    }


def test_actions_have_sections_and_required_options() -> None:
    assert set(SECTIONS) == set(REQUIRED) == set(ACTIONS)
    assert len(ACTIONS) == 6
    assert {key for keys in REQUIRED.values() for key in keys} <= set(OPTIONS)


@pytest.mark.parametrize("action", ACTIONS)
def test_only_what_an_action_needs_is_demanded(tmp_path: Path, action: str) -> None:
    whole = write_inputs(tmp_path)
    own = {"results_dir": whole["results_dir"]}
    own |= {section: whole[section] for section in SECTIONS[action] if section in whole}
    others = {"evaluate", "inference", "export"} - {action}
    for section in others:
        own[section] = {"checkpoint": "???", "results_dir": "???"}
    check_spec(read_spec(own), action)
    missing = fail(action)
    demanded = {"results_dir", *REQUIRED[action]}
    assert {problem.split(":")[0] for problem in missing} == demanded
    assert all("=..." in problem for problem in missing)


@pytest.mark.parametrize("action", ACTIONS)
def test_missing_files_are_named_with_their_origin(tmp_path: Path, action: str) -> None:
    source = write_inputs(tmp_path)
    for path in tmp_path.iterdir():
        path.unlink()
    problems = fail(action, source)
    assert len(problems) == len(REQUIRED[action])
    for key in REQUIRED[action]:
        assert any(problem.startswith(f"{key} (file): got") and "does not exist" in problem for problem in problems)


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    source = write_inputs(tmp_path)
    overrides = [
        f"dataset.train_dataset.data_path={tmp_path}",
        "dataset.val_dataset.data_path=memory://bucket/data.npy",
        "pretrained_model=" + "x" * 5000,
        "graph_layout=missing.yaml",
        "train.results_dir=http://localhost/results",
    ]
    problems = fail("train", source, *overrides)
    assert len(problems) == 5
    for text in ("is a folder", "memory://bucket/data.npy", "xxx", "missing.yaml", "http://localhost/results"):
        assert any(text in problem for problem in problems), text


def test_question_marks_of_the_running_action_are_demanded(tmp_path: Path) -> None:
    source = write_inputs(tmp_path)
    problems = fail("train", source, "num_classes=???", "train.num_epochs=???", "model_name=???", "results_dir=???")
    assert [problem.split(":")[0] for problem in problems] == [
        *("model_name", "results_dir", "dataset.num_classes", "train.num_epochs")
    ]
    check_spec(read_spec(source, ["results_dir=???", f"train.results_dir={tmp_path}/own"]), "train")
    check_spec(read_spec(source, ["evaluate=???"]), "train")


def test_key_may_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_inputs(tmp_path)
    monkeypatch.delenv("KINEGRAPH_ENCRYPTION_KEY", raising=False)
    assert "encryption_key" in fail("train", source, "encryption_key=???")[0]
    monkeypatch.setenv("KINEGRAPH_ENCRYPTION_KEY", "from-the-environment")
    loaded = read_spec(source, ["encryption_key=???"])
    check_spec(loaded, "train")
    assert loaded.values.encryption_key == ""


@pytest.mark.parametrize(
    ("action", "overrides", "expected"),
    [
        ("evaluate", ["evaluate.trt_engine=a.engine"], "TensorRT is not supported"),
        ("inference", ["inference.trt_engine=a.engine"], "TensorRT is not supported"),
        ("train", ["num_gpus=2", "train.gpu_ids=[0,1,2]"], "2 different ids"),
        ("train", ["train.optim.momentum=0"], "nesterov=false"),
        ("train", ["dataset.window_size=0"], "at least 1"),
        ("train", ["dataset.label_map={a: 0, b: 2}"], "each once"),
        ("train", ["dataset.label_map={a: 0, b: 0}"], "each once"),
        ("dataset_convert", ["dataset_convert.sequence_overlap=0.001"], "stride"),
        ("dataset_convert", ["dataset_convert.sequence_overlap=0"], "stride"),
        ("dataset_convert", ["dataset_convert.sequence_length=301"], "sequence_length_max = 300"),
        ("dataset_convert", ["dataset_convert.focal_length=0"], "above 0"),
    ],
)
def test_conflicts(tmp_path: Path, action: str, overrides: list[str], expected: str) -> None:
    problems = fail(action, write_inputs(tmp_path), *overrides)
    assert len(problems) == 1
    assert expected in problems[0]


def test_results_folder(tmp_path: Path) -> None:
    assert find_results_dir(read_spec().values, "train") is None
    values = read_spec(None, ["results_dir=a", "evaluate.results_dir=b"]).values
    assert find_results_dir(values, "train") == "a/train"
    assert find_results_dir(values, "evaluate") == "b"
    values = read_spec(None, ["results_dir=s3://bucket/a/"]).values
    assert find_results_dir(values, "train") == "s3://bucket/a/train"


def fill_template(folder: Path, action: str) -> dict[str, Any]:
    """The template with each ??? replaced by a file that is there."""
    whole = write_inputs(folder)
    spec = yaml.safe_load(build_template(action))
    for key in REQUIRED[action]:
        node, source = spec, whole
        *groups, name = key.split(".")
        for part in groups:
            node, source = node[part], source[part]
        assert node[name] == "???"
        node[name] = source[name]
    return spec


@pytest.mark.parametrize("action", ACTIONS)
def test_template_is_complete_and_runs_when_filled(tmp_path: Path, action: str) -> None:
    text = build_template(action)
    assert text.count(": ???") == len(REQUIRED[action])
    spec = fill_template(tmp_path, action)
    assert set(spec) == {"model_name", "results_dir", *SECTIONS[action]}
    loaded = read_spec(spec)
    check_spec(loaded, action)
    shown = {line.strip(" #").split(":")[0] for line in text.splitlines()}
    expected = [key for key in OPTIONS if key.split(".")[0] in SECTIONS[action] or "." not in key]
    assert {key.split(".")[-1] for key in expected} <= shown
    left_out = {"encryption_key", "dataset.num_classes", "dataset.label_map"}
    assert not left_out & set(loaded.origins)
    set_keys = {key for key in loaded.origins if key in OPTIONS}
    assert set_keys == set(expected) - left_out
    changed = {key for key in set_keys if get_value(loaded.values, key) != OPTIONS[key].default}
    changes = {"results_dir", *REQUIRED[action]} | ({"wandb.enable"} if action in ("train", "automl") else set())
    assert changed == changes


def test_train_template_values() -> None:
    text = build_template("train")
    assert yaml.safe_load(text)["wandb"]["enable"] is False
    label_map = next(line for line in text.splitlines() if line.startswith("  # label_map: "))
    names = yaml.safe_load(label_map.strip(" #"))["label_map"]
    assert names == {f"class_{label}": label for label in range(6)}


@pytest.mark.parametrize("action", ACTIONS)
def test_schema_takes_the_template_and_refuses_mistakes(tmp_path: Path, action: str) -> None:
    schema = build_schema(action)
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    assert not list(validator.iter_errors(yaml.safe_load(build_template(action))))
    filled = fill_template(tmp_path, action)
    assert not list(validator.iter_errors(filled))
    assert not list(validator.iter_errors({**filled, "encryption_key": None, "model": {"dropout": None}}))
    every_null = {section: dict.fromkeys(vars(getattr(Spec(), section))) for section in ("automl", "wandb")}
    assert not list(validator.iter_errors({**filled, **every_null})), "null: not set"
    read_spec({**filled, **every_null})
    assert list(validator.iter_errors({}))
    mistakes: list[dict[str, Any]] = [
        {"modle": {}},
        {"model": {"dropout": 2}},
        {"model": {"graph_strategy": "spacial"}},
        {"model": {"model_type": "LSTM"}},
        {"train": {"num_epochs": 0}},
        {"train": {"optim": {"lr": "fast"}}},
        {"dataset": {**filled.get("dataset", {}), "label_map": {"a": "b"}}},
    ]
    for mistake in mistakes:
        assert list(validator.iter_errors({**filled, **mistake})), mistake
    assert schema["default"]["train"]["num_epochs"] == 10


def test_effective_spec_is_a_spec(tmp_path: Path) -> None:
    """What experiment.yaml holds can be read again and says the same."""
    values = read_spec(write_inputs(tmp_path), ["dataset.label_map={a: 0}", "train.precision=bf16"]).values
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(redact(values)))
    assert read_spec(path).values == values


def find_read_names() -> set[str]:
    """The names of all attributes that the sources read, and of all options that are looked up by a dotted text."""
    names: set[str] = set()
    files = [path for path in SOURCE.rglob("*.py") if path.name != "spec.py"]
    assert len(files) > 10
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                names.add(node.attr)
    return names


def test_every_option_is_read_somewhere() -> None:
    own_checks = {
        "trt_engine",
        "results_dir",
    }  # by the checks of the spec: there is no TensorRT yet, and find_results_dir
    used_whole = {key for key in OPTIONS if key.startswith("wandb.")}  # handed to wandb.init by name
    read = find_read_names() | own_checks
    unread = [key for key in OPTIONS if key.split(".")[-1] not in read and key not in used_whole]
    assert not unread


def test_all_kinds_of_mistakes_come_together(tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(
        "modle: {a: 1}\n"
        "train: {num_epoch: 3, optim: {lr: -1, lr_scheduler: MultiSteps}, checkpoint_interval: many}\n"
        "dataset: {train_dataset: {data_path: /not/there.npy}, batch_size: [1]}\n"
    )
    with pytest.raises(SpecError) as caught:
        read_spec(spec, ["train.seed=x"], "train")
    text = str(caught.value)
    expected = [
        "modle: got the unknown key",
        "train.num_epoch: got the unknown key",
        "train.optim.lr: got -1",
        "Did you mean 'MultiStep'?",
        "train.checkpoint_interval: got 'many'",
        "dataset.batch_size: got",
        "override: train.seed: got 'x'",
        "'/not/there.npy', which does not exist",
        "dataset.train_dataset.label_path: got nothing",
        "dataset.val_dataset.data_path: got nothing",
        "results_dir: got nothing",
    ]
    assert [words for words in expected if words not in text] == []
