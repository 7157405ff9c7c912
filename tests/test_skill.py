"""The skill bundle: what it holds, that it is up to date, and that every command of SKILL.md works as it stands."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import yaml
from typer.main import get_command

from kinegraph.automl.vendor_schema import read_ranges
from kinegraph.bundle import check_bundle
from kinegraph.cli import app, main
from kinegraph.config import SearchRange, list_options
from kinegraph.data.synthetic import write_dataset
from kinegraph.errors import UserError
from kinegraph.skill.build import build_skill, list_contents
from kinegraph.skill.guide import ERRORS, EXIT_CODES
from kinegraph.spec import SECTIONS, Spec
from kinegraph.spec_reading import read_spec
from s3_server import serve_s3

pytestmark = pytest.mark.timeout(900)
"""All commands of SKILL.md take 80 seconds of one processor, and longer where others work too."""

ROOT = Path(__file__).parents[1]
BUNDLE = ROOT / "skills/train-pose-classification"
REPAIR = "kinegraph skill build skills/train-pose-classification"
ACTIONS = ("dataset_convert", "train", "automl", "evaluate", "inference", "export")
SEARCHED = [
    "dataset.window_size",
    "model.dropout",
    "train.grad_clip",
    "train.optim.lr",
    "train.optim.lr_decay",
    "train.optim.momentum",
    "train.optim.patience",
    "train.optim.weight_decay",
]
"""From the facts of TAO: automl_default_parameters."""
LEAF_TYPES = {"int", "float", "bool", "string", "categorical", "list", "list_2", "ordered_int"}


def read_guide() -> str:
    return (BUNDLE / "SKILL.md").read_text()


def read_json(name: str) -> Any:
    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is no JSON")

    return json.loads((BUNDLE / name).read_text(), parse_constant=refuse)


def walk(node: dict[str, Any], prefix: str = "") -> dict[str, dict[str, Any]]:
    found = {}
    for name, child in node["properties"].items():
        found[prefix + name] = child
        if "properties" in child:
            found |= walk(child, f"{prefix}{name}.")
    return found


def test_the_bundle_in_the_repository_is_up_to_date(tmp_path: Path) -> None:
    build_skill(tmp_path / "new")
    built = {path.relative_to(tmp_path / "new"): path.read_text() for path in (tmp_path / "new").rglob("*.*")}
    there = {path.relative_to(BUNDLE): path.read_text() for path in BUNDLE.rglob("*.*")}
    assert len(built) == 3 + 3 * len(ACTIONS)
    different = [str(name) for name in {*built, *there} if built.get(name) != there.get(name)]
    assert not different, f"{sorted(different)} are out of date. Run: {REPAIR}"


def test_our_bundle_is_whole() -> None:
    report = check_bundle(BUNDLE)
    assert (report.problems, report.missing, report.notices) == ((), (), ())
    assert report.actions == ACTIONS
    assert report.automl_runnable


def test_build_twice_and_into_something_else(tmp_path: Path) -> None:
    folder = tmp_path / "skill"
    first = build_skill(folder)
    manifest = json.loads((folder / "schemas/manifest.json").read_text())
    manifest["actions"] |= {"old": {}, "../../up": {}}
    (folder / "schemas/manifest.json").write_text(json.dumps(manifest))
    mine = ("notes.txt", "schemas/mine.schema.json", "schemas/json/mine.json", "references/spec_template_mine.yaml")
    for name in ("schemas/old.schema.json", "schemas/json/old.json", *mine):
        (folder / name).write_text("{}")
    (tmp_path / "up.schema.json").write_text("{}")
    again = build_skill(folder)
    assert first["written"] == again["written"] and first["removed"] == []
    assert again["removed"] == ["schemas/old.schema.json", "schemas/json/old.json"]
    assert all((folder / name).exists() for name in mine) and (tmp_path / "up.schema.json").exists()
    assert not (folder / "schemas/old.schema.json").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").write_text("")
    with pytest.raises(UserError, match="a folder with other files"):
        build_skill(tmp_path / "other")


def list_files(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "front", ["", "metadata: {generated_by: somebody}\n", "metadata: kinegraph skill build\n", "metadata: [\n"]
)
def test_the_skill_of_somebody_else_is_left_alone(tmp_path: Path, front: str) -> None:
    (tmp_path / "schemas").mkdir()
    (tmp_path / "SKILL.md").write_text(f"---\nname: a\ndescription: b\n{front}---\ngenerated_by: kinegraph skill build")
    (tmp_path / "schemas/theirs.schema.json").write_text("{}")
    before = list_files(tmp_path)
    with pytest.raises(UserError, match="a skill without 'generated_by: kinegraph skill build'"):
        build_skill(tmp_path)
    assert list_files(tmp_path) == before and len(before) == 2


@pytest.mark.parametrize("part", ["references", "schemas", "schemas/json"])
def test_nothing_is_written_through_a_link(tmp_path: Path, part: str) -> None:
    folder, outside = tmp_path / "skill", tmp_path / "outside"
    build_skill(folder)
    (folder / part).rename(outside)
    (folder / part).symlink_to(outside)
    for path in outside.glob("*.*"):
        path.write_text("theirs")
    before = list_files(tmp_path)
    with pytest.raises(UserError, match="got a link"):
        build_skill(folder)
    assert list_files(tmp_path) == before
    assert "theirs" in before.values()


def test_skill_info() -> None:
    info = yaml.safe_load((BUNDLE / "references/skill_info.yaml").read_text())
    assert (info["network_arch"], info["automl_enabled"], info["gpu_spec_key"]) == (
        "pose_classification",
        True,
        "train.num_gpus",
    )
    assert tuple(info["actions"]) == tuple(info["spec_params"]) == tuple(info["spec_templates"]) == ACTIONS
    for action, entry in info["actions"].items():
        assert entry["command"].startswith(f"kinegraph {action} -e {{config_path}}")
        assert (entry["config_format"], entry["mode"], entry["upload_excludes"]) == ("yaml", "config", ["inputs/"])
        assert "results_dir" in entry["outputs"]
    train = info["actions"]["train"]["inputs"]
    assert [key for key, entry in train.items() if not entry.get("optional")] == list(info["data_sources"]["train"])
    assert info["data_sources"]["evaluate"]["evaluate.test_dataset.label_path"]["path"] == "val_label.pkl"
    assert info["data_sources"]["inference"]["inference.test_dataset.data_path"] == {
        "source": "train_datasets",
        "path": "test_data.npy",
    }
    assert info["spec_params"]["evaluate"]["evaluate.checkpoint"] == "parent_model"
    assert info["spec_params"]["train"]["train.resume_training_checkpoint_path"] == "resume_model"
    assert info["spec_shorthand_keys"]["num_epochs"] == "train.num_epochs"


def test_manifest() -> None:
    manifest = read_json("schemas/manifest.json")
    assert (manifest["schema_version"], manifest["failures"], tuple(manifest["actions"])) == (1, {}, ACTIONS)
    for action, entry in manifest["actions"].items():
        schema = read_json(entry["path"])
        assert entry["spec_template"] == f"references/spec_template_{action}.yaml"
        assert (BUNDLE / entry["json_schema"]).is_file()
        for key in ("automl_default_parameters", "automl_disabled_parameters", "popular"):
            assert entry[key] == schema[key]


@pytest.mark.parametrize("action", ACTIONS)
def test_schema_in_the_form_of_tao(action: str) -> None:
    schema = read_json(f"schemas/{action}.schema.json")
    template = yaml.safe_load((BUNDLE / f"references/spec_template_{action}.yaml").read_text())
    own = {"model_name", "encryption_key", "results_dir", *SECTIONS[action]}
    assert schema["type"] == "object" and set(schema["properties"]) == own
    assert schema["default"] == template
    nodes = walk(schema)
    assert set(schema["required"]) <= set(schema["properties"]) and (schema["required"] or action == "automl")
    for key, node in nodes.items():
        assert node["type"] == ("collection" if "properties" in node else node["type"]), key
        assert node["description"] and node["title"]
        if "properties" not in node:
            assert node["type"] in LEAF_TYPES or "default" in node or key == "dataset.label_map"
        assert all(np.isfinite(node[bound]) for bound in ("minimum", "maximum") if bound in node)
    is_training = action in ("train", "automl")
    assert schema["automl_default_parameters"] == (SEARCHED if is_training else [])
    disabled = schema["automl_disabled_parameters"]
    assert not set(disabled) & set(schema["automl_default_parameters"]) and set(disabled) <= set(nodes)
    if is_training:
        never = ("train", "train.gpu_ids", "train.optim.lr_steps", "train.cudnn", "wandb", "dataset.label_map")
        assert {*never, "model.pretrained_model_path", "train.results_dir"} <= set(disabled)


def test_leaves_of_the_train_schema() -> None:
    nodes = walk(read_json("schemas/train.schema.json"))
    rate = nodes["train.optim.lr"]
    assert (rate["type"], rate["default"], rate["minimum"], rate["automl_enabled"]) == ("float", 0.1, 0, True)
    assert (rate["automl_minimum"], rate["automl_maximum"], rate["automl_log"]) == (1e-4, 0.5, True)
    patience = nodes["train.optim.patience"]
    assert (patience["depends_on"], patience["depends_on_values"]) == ("train.optim.lr_scheduler", ["AutoReduce"])
    scheduler = nodes["train.optim.lr_scheduler"]
    assert scheduler["type"] == "categorical" and scheduler["parent_param"] is True
    assert len(scheduler["option_weights"]) == len(scheduler["enum"]) == 3
    assert nodes["dataset.batch_size"]["math_cond"] == "^ 2"
    assert nodes["train.grad_clip"]["automl_specials"] == [0.0]
    assert "automl_maximum" not in nodes["dataset.window_size"]
    assert nodes["train.num_epochs"]["popular"] is True and "num_epochs" in nodes["train"]["popular"]
    assert "train_dataset" in nodes["dataset"]["required"]


def test_our_schema_read_back_gives_our_search_space() -> None:
    options = {entry.key: entry for entry in list_options(Spec)}
    found = read_ranges(read_json("schemas/train.schema.json"), options)
    assert found.searched == SEARCHED and not found.notes and not found.problems
    own = {key: entry.extra["search"] for key, entry in options.items() if "search" in entry.extra}
    assert len(own) >= 15 and set(found.ranges) == set(own)
    for key, expected in own.items():
        assert isinstance(expected, SearchRange)
        assert found.ranges[key] == expected, key


@pytest.mark.parametrize("action", ACTIONS)
def test_standard_schema(action: str) -> None:
    schema = read_json(f"schemas/json/{action}.json")
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    jsonschema.Draft202012Validator.check_schema(schema)
    template = yaml.safe_load((BUNDLE / f"references/spec_template_{action}.yaml").read_text())
    assert not list(jsonschema.Draft202012Validator(schema).iter_errors(template))


def test_the_bundle_is_written_without_heavy_imports() -> None:
    heavy = ("torch", "optuna", "ray", "fsspec", "matplotlib", "scipy", "onnx")
    code = (
        "import sys; from kinegraph.skill.build import list_contents; from kinegraph.bundle import check_bundle; "
        f"list_contents(); check_bundle({str(BUNDLE)!r}); print([name for name in {heavy} if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert shown.stdout.strip() == "[]"


def test_commands_build_and_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path / "skill")
    assert main(["skill", "build", folder, "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["written"]) == set(list_contents())
    assert main(["skill", "check", folder]) == 0
    assert "AutoML is enabled and runnable" in capsys.readouterr().out
    (Path(folder) / "schemas/train.schema.json").unlink()
    assert main(["skill", "check", folder]) == 2
    shown = capsys.readouterr()
    assert "AutoML is enabled but not runnable until schemas are generated" in shown.out
    assert "error: schemas/train.schema.json: got nothing" in shown.err
    assert main(["skill", "check", folder, "--json"]) == 2
    data = json.loads(capsys.readouterr().out)
    assert (data["status"], data["exit_code"], data["automl_runnable"]) == ("error", 2, False)
    assert data["problems"][0]["where"] == "schemas/train.schema.json"
    assert {"parsed", "missing", "problems", "automl_enabled", "automl_runnable", "not_runnable"} <= set(data)
    assert main(["skill", "check", str(tmp_path / "none"), "--json"]) == 2


# SKILL.md as its reader takes it: a table of placeholders, and blocks of commands.


def read_placeholders() -> dict[str, str]:
    rows = re.findall(r"^\| `\{(\w+)\}` \| `([^`]+)` \|", read_guide(), re.MULTILINE)
    assert len(rows) == len(dict(rows)) >= 6
    return dict(rows)


def fill(text: str) -> str:
    values = read_placeholders()
    values["epochs"] += " train.min_epoch_steps=0"  # the recipe's 17 steps an epoch teach this test nothing
    for name, value in values.items():
        text = text.replace(f"{{{name}}}", value)
    return text


def find_blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", read_guide(), re.DOTALL | re.MULTILINE)


def test_the_guide_is_short_and_every_placeholder_is_in_its_table() -> None:
    guide = read_guide()
    assert len(guide.splitlines()) < 250
    front = yaml.safe_load(guide.split("---")[1])
    assert front["name"] == "train-pose-classification" and 50 < len(front["description"]) < 1024
    commands = "".join(find_blocks("sh") + find_blocks("sh s3") + find_blocks("python"))
    used = set(re.findall(r"\{([a-z_0-9]+)\}", commands))
    assert used == set(read_placeholders())
    kinds = set(re.findall(r"^```(.+)$", guide, re.MULTILINE))
    assert kinds == {"sh", "sh s3", "python", "text"}
    install = find_blocks("text")
    assert len(install) == 1 and install[0].count("pip install") == 3, "what is not run here is the installation alone"


def test_commands_named_in_the_text_exist() -> None:
    named = set(re.findall(r"(?:`|^|\()kinegraph ([a-z_]+(?: [a-z]+)?)", read_guide(), re.MULTILINE))
    assert len(named) >= 8
    commands = get_command(app).commands  # type: ignore[attr-defined]
    for name in named:
        first, _, second = name.partition(" ")
        assert first in commands, name
        if hasattr(commands[first], "commands") and second:
            assert second in commands[first].commands, name
    options = {
        option
        for command in [*commands.values(), *commands["jobs"].commands.values(), *commands["skill"].commands.values()]
        for parameter in command.params
        for option in parameter.opts
    }
    text = read_guide().replace("--no-index --find-links", "")
    shown = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
    assert len(shown) >= 10 and shown <= options | {"--help", "--version"}


def test_options_shown_in_the_text_are_taken() -> None:
    shown = re.findall(r"`(automl\.[a-z_]+=[^`]+)`", read_guide())
    assert len(shown) == 3
    automl = read_spec(None, shown).values.automl
    assert automl.automl_hyperparameters == ["+train.optim.lr_scheduler", "-model.dropout"]
    assert automl.custom_param_ranges == {"train.optim.lr": {"valid_min": 0.001, "valid_max": 0.1}}


def test_exit_codes_are_told_once_in_the_same_words() -> None:
    assert set(EXIT_CODES) == {0, 1, 2, 3, 130, 143}
    page = (ROOT / "docs/exit_codes.md").read_text()
    for text in (read_guide(), page):
        rows = dict(re.findall(r"^\| (\d+) \| (.+) \|$", text, re.MULTILINE))
        assert rows == {str(code): meaning for code, meaning in EXIT_CODES.items()}


TROUBLES: dict[str, str] = {
    "got nothing, expected a value": "train",
    "the unknown key": "validate train.optim.lrate=1",
    "which does not exist": "export export.checkpoint=none.pth results_dir=r",
    "expected at least": "validate num_epochs=0",
    "joints in shape": "train {files} model.graph_layout=coco results_dir=r",
    "labels, expected": "train {files} dataset.train_dataset.label_path=data/val_label.pkl results_dir=r",
    "a file that is there already": "template train -o there.yaml",
    "an encrypted checkpoint and no key": "evaluate evaluate.checkpoint=locked.pth {test} results_dir=r",
    "which this action cannot do without": "jobs submit train",
    "job id: got": "jobs status 12345678",
    "AutoML is enabled but not runnable until schemas are generated": "skill check bundle",
    "expected one of": "validate train.optim.lr_scheduler=Step",
}


def test_error_patterns_are_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert set(TROUBLES) == set(ERRORS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KINEGRAPH_ENCRYPTION_KEY", raising=False)
    write_dataset(Path("data"), 12, 6, 6, seed=1)
    write_locked_checkpoint(tmp_path / "locked.pth")
    (tmp_path / "there.yaml").write_text("")
    build_skill("bundle")
    Path("bundle/schemas/train.schema.json").unlink()
    parts = ("train", "val")
    files = [
        f"dataset.{part}_dataset.{kind}_path=data/{part}_{kind}.{end}"
        for part in parts
        for kind, end in (("data", "npy"), ("label", "pkl"))
    ]
    test = "evaluate.test_dataset.data_path=data/test_data.npy evaluate.test_dataset.label_path=data/test_label.pkl"
    for message, command in TROUBLES.items():
        assert f"| `{message}` |" in read_guide()
        arguments = command.replace("{files}", " ".join(files)).replace("{test}", test).split()
        assert main(arguments) == 2, command
        shown = capsys.readouterr()
        assert message in shown.out + shown.err, command


def write_locked_checkpoint(path: Path) -> None:
    from kinegraph.models import build_model
    from kinegraph.models.checkpoint import Checkpoint, write_checkpoint
    from kinegraph.skeleton.layouts import LAYOUTS
    from kinegraph.spec import ModelSpec

    model = build_model(ModelSpec(), LAYOUTS["nvidia"], 6)
    label_map = {f"class_{label}": label for label in range(6)}
    checkpoint = Checkpoint(dict(model.state_dict()), ModelSpec(), LAYOUTS["nvidia"], 6, label_map)
    write_checkpoint(path, checkpoint, "a key for this test")


JSON_FIELDS = {
    "inspect.json": ("inspect", ()),
    "validate.json": ("validate", ()),
    "plan.json": ("automl --dry-run", ("plan",)),
    "algorithms.json": ("automl --algorithms", ()),
    "train_job.json": ("jobs submit", ("job",)),
    "evaluate_job.json": ("jobs submit", ("job",)),
    "jobs.json": ("jobs list", ()),
    "train.json": ("an action", ()),
    "evaluate.json": ("an action", ()),
    "export.json": ("an action", ()),
    "inference.json": ("an action", ()),
    "convert.json": ("an action", ()),
}
"""File that a command of SKILL.md writes -> the row of its table of fields, and the object that holds them."""


def list_told_fields(row: str) -> tuple[str, list[str]]:
    """The outer and the inner fields that the table names for a command."""
    text = re.search(rf"^\| [^|]*{re.escape(row)}[^|]*\| (.+) \|$", read_guide(), re.MULTILINE)
    assert text is not None, row
    outer, colon, inner = text[1].partition("`: `")
    names = re.findall(r"`(\w+)`", f"`{inner}" if colon else outer)
    return outer.strip("`") if colon else "", names


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh folder in which all commands of SKILL.md were run, one after the other, in one shell."""
    folder = tmp_path_factory.mktemp("skill")
    script = "set -eu -o pipefail\n" + "\n".join(find_blocks("sh"))
    run(folder, ["bash", "-c", fill(script)], {})
    return folder


def run(folder: Path, command: list[str], variables: dict[str, str]) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("KINEGRAPH_", "AWS_"))}
    environment = kept | {"PATH": path, "OMP_NUM_THREADS": "1"} | variables
    done = subprocess.run(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=850
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_command_of_the_guide_works(workplace: Path) -> None:
    results = workplace / read_placeholders()["results"]
    for name in ("train/pc_model_best.pth", "evaluate/metrics.json", "model.onnx", "inference/results.txt"):
        assert (results / name).is_file(), name
    with open(results / "evaluate/predictions.csv", newline="") as file:
        predicted = [row["predicted"] for row in csv.DictReader(file)]
    assert len(predicted) == 12
    assert (results / "inference/results.txt").read_text().splitlines() == predicted, ".pth and .onnx answer alike"
    assert json.loads((workplace / "inspect.json").read_text())["problems"] == []


def test_the_fields_of_answers_are_those_of_the_table(workplace: Path) -> None:
    for name, (row, holder) in JSON_FIELDS.items():
        data = json.loads((workplace / name).read_text())
        assert data.get("status", "ok") == "ok", name
        outer, fields = list_told_fields(row)
        for part in holder:
            assert outer == part
            data = data[part]
        if name == "jobs.json":
            assert len(data["jobs"]) == 4
            continue
        if name == "algorithms.json":
            data = data["algorithms"][0]
        assert fields and set(fields) <= set(data), name


def test_the_train_request_became_a_search_and_its_children_found_the_model(workplace: Path) -> None:
    job = json.loads((workplace / "train_job.json").read_text())["job"]
    assert (job["status"], job["effective_action"]) == ("Complete", "automl")
    assert job["policy"]["uses_automl"] is True and job["policy"]["policy"] == "auto"
    jobs = json.loads((workplace / "jobs.json").read_text())["jobs"]
    assert [entry["status"] for entry in jobs] == ["Complete"] * 4
    study = Path(job["results_dir"])
    for name in ("best_rec.json", "best_spec.yaml", "all_trials.csv", "pc_model_best.pth", "trial_000"):
        assert (study / name).exists(), name
    evaluated = json.loads((workplace / "evaluate_job.json").read_text())["job"]
    assert 0 <= evaluated["metrics"]["accuracy"] <= 100


def test_onnx_without_torch_agrees_with_the_metrics(workplace: Path, tmp_path: Path) -> None:
    """The Python of the guide, with a torch that cannot be imported."""
    (tmp_path / "torch.py").write_text("raise ImportError('torch must not be needed')\n")
    blocks = find_blocks("python")
    assert len(blocks) == 1 and "assert accuracy ==" in blocks[0]
    shown = run(workplace, [sys.executable, "-c", fill(blocks[0])], {"PYTHONPATH": str(tmp_path)})
    assert "class_" in shown


def test_results_of_the_plain_run_stand_where_the_table_says(workplace: Path) -> None:
    rows = re.findall(r"^\| (`[^|]+) \| (train|evaluate|inference|every action) \|$", read_guide(), re.MULTILINE)
    assert len(rows) == 4
    for names, action in rows:
        folders = ("train", "evaluate", "inference", "export") if action == "every action" else (action,)
        for folder in folders:
            place = workplace / read_placeholders()["results"] / folder
            for name in re.findall(r"`([^`]+)`", names):
                assert list(place.glob(name)), f"{folder}: {name}"


def test_commands_with_object_storage(workplace: Path) -> None:
    blocks = find_blocks("sh s3")
    assert len(blocks) == 1
    placeholders = read_placeholders()
    with serve_s3() as server:
        prefix = placeholders["s3_data"].removeprefix("s3://bucket/")
        server.put(f"{prefix}/test_data.npy", workplace / placeholders["data"] / "test_data.npy")
        run(workplace, ["bash", "-c", f"set -eu\n{fill(blocks[0])}"], {**server.variables, "KINEGRAPH_CACHE": "cache"})
    answer = json.loads((workplace / "s3.json").read_text())
    assert answer["metrics"]["num_clips"] == 12
