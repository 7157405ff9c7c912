"""The command line: answers, exit codes, errors on stderr or as JSON, and no torch where none is needed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import typer
import yaml

import kinegraph
from kinegraph import actions, cli
from kinegraph.cli.parameters import ACTION_HELP
from kinegraph.errors import DataError, KinegraphError, Problem
from kinegraph.recipes import DEFAULT_RECIPE, RECIPES
from kinegraph.run import LOGGER, Result, Run, Terminated
from kinegraph.skeleton.layouts import LAYOUTS
from kinegraph.spec import Spec
from kinegraph.templates import build_template
from small_runs import make_spec, write_small_data

KEY = "correct-horse-battery"


class Answer:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def data(self) -> Any:
        return json.loads(self.out)


@pytest.fixture(autouse=True)
def remove_messages(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "argv", ["kinegraph"])
    monkeypatch.delenv("KINEGRAPH_ENCRYPTION_KEY", raising=False)
    monkeypatch.delenv("KINEGRAPH_DEBUG", raising=False)
    yield
    for handler in list(LOGGER.handlers):
        LOGGER.removeHandler(handler)
    LOGGER.propagate = True


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    def call(*arguments: object) -> Answer:
        code = cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Answer(code, captured.out, captured.err)

    return call


@pytest.fixture
def export_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[str]]:
    """Put a function in the place of the export action; gives the overrides that it needs."""

    def replace(action: Callable[[Spec, Run], Result]) -> list[str]:
        monkeypatch.setitem(actions.ACTIONS, "export", f"{__name__}:ACTION")
        monkeypatch.setattr(sys.modules[__name__], "ACTION", action, raising=False)
        (tmp_path / "model.pth").write_text("x")
        return [f"results_dir={tmp_path}/results", f"export.checkpoint={tmp_path}/model.pth"]

    return replace


def raise_error(error: BaseException) -> Callable[[Spec, Run], Result]:
    def act(spec: Spec, run: Run) -> Result:
        raise error

    return act


def succeed(spec: Spec, run: Run) -> Result:
    run.info("working")
    metrics = {"accuracy": 91.25, "loss": float("nan"), "confusion": [[1, 0], [0, 1]], "name": spec.model_name}
    return Result(metrics, {"onnx": "a/model.onnx"})


def test_every_action_is_a_command() -> None:
    assert set(ACTION_HELP) == set(actions.ACTIONS)
    assert len(ACTION_HELP) == 6


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help(ask: Callable[..., Answer], arguments: list[str]) -> None:
    answer = ask(*arguments)
    assert answer.code == 0
    assert answer.err == ""
    for command in (*actions.ACTIONS, "validate", "template", "schema", "layouts", "inspect", "sample", "demo"):
        assert f"  {command} " in answer.out
    assert "..." not in answer.out.partition("Commands:")[2]


def test_help_of_every_command(ask: Callable[..., Answer]) -> None:
    commands = [*actions.ACTIONS, "validate", "template", "schema", "layouts", "inspect", "sample", "demo"]
    for command in commands:
        answer = ask(command, "--help")
        assert (answer.code, answer.err) == (0, "")
        assert f"kinegraph {command}" in answer.out


def test_version(ask: Callable[..., Answer]) -> None:
    answer = ask("--version")
    assert (answer.code, answer.out) == (0, f"kinegraph {kinegraph.__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["trian"], "Did you mean 'train'? See `kinegraph --help`."),
        (["train", "--epochs", "3"], "No such option: --epochs"),
        (["train", "-e"], "See `kinegraph train --help`."),
        (["template"], "See `kinegraph template --help`."),
        (["template", "trian"], "Did you mean 'train'?"),
        (["schema", "trian"], "Did you mean 'train'?"),
        (["validate", "--action", "trian"], "Did you mean 'train'?"),
        (["layouts", "nvidea"], "Did you mean 'nvidia'?"),
        (["layouts", "missing.yaml"], "missing.yaml"),
        (["train", "spec.yaml"], "Put -e before the name of a spec file."),
        (["train", "-e", "missing.yaml"], "missing.yaml: got No such file"),
        (["train"], "`kinegraph template train -o train.yaml`"),
        (["inspect", "missing.npy"], "missing.npy"),
    ],
)
def test_mistakes_of_the_user(ask: Callable[..., Answer], arguments: list[str], text: str) -> None:
    answer = ask(*arguments)
    assert answer.code == 2
    assert answer.out == ""
    assert text in answer.err
    assert "Traceback" not in answer.err
    assert all(line.startswith("error: ") for line in answer.err.splitlines())


def test_all_problems_are_told_each_on_a_line(ask: Callable[..., Answer], tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text("train: {num_epoch: 3, seed: -2}\nmodel: {dropout: 2}\n")
    answer = ask("train", "-e", path, "dataset.batch_size=0")
    lines = answer.err.splitlines()
    assert answer.code == 2
    missing = ["results_dir"]
    missing += [f"dataset.{part}_dataset.{kind}_path" for part in ("train", "val") for kind in ("data", "label")]
    wrong = ["train.num_epoch", "train.seed", "model.dropout", "override: dataset.batch_size"]
    assert len(lines) == len(missing) + len(wrong)
    for text in (*wrong, *missing):
        assert any(text in line for line in lines)


def test_problems_as_json(ask: Callable[..., Answer]) -> None:
    answer = ask("train", "--json", "num_epochs=0", "train.sead=1")
    assert answer.code == 2
    assert answer.err == ""
    assert answer.data["status"] == "error"
    assert answer.data["exit_code"] == 2
    assert [set(problem) for problem in answer.data["problems"]] == [{"where", "got", "expected", "hint"}] * 7
    problems = {problem["where"]: problem for problem in answer.data["problems"]}
    assert problems["override: train.num_epochs"]["got"] == "0"
    assert problems["override: train.num_epochs"]["expected"] == "at least 1"
    assert problems["override: train.sead"]["hint"] == "Did you mean 'seed'?"
    usage = ask("train", "--json", "--epochs=3")
    assert (usage.code, usage.data["status"]) == (2, "error")
    assert "--epochs" in usage.data["problems"][0]["got"]


def test_success(ask: Callable[..., Answer], export_with: Any) -> None:
    overrides = export_with(succeed)
    answer = ask("export", *overrides, "model_name=mine")
    assert answer.code == 0
    assert "working" in answer.err
    assert "working" not in answer.out
    assert "accuracy" in answer.out
    assert "91.25" in answer.out
    assert "a/model.onnx" in answer.out


def test_success_as_json(ask: Callable[..., Answer], export_with: Any, tmp_path: Path) -> None:
    overrides = export_with(succeed)
    answer = ask("export", "--json", *overrides)
    assert answer.code == 0
    assert answer.data == {
        "status": "ok",
        "action": "export",
        "metrics": {
            "accuracy": 91.25,
            "loss": None,
            "confusion": [[1, 0], [0, 1]],
            "name": "pose_classification",
        },
        "files": {"onnx": "a/model.onnx", "results_dir": str(tmp_path / "results" / "export")},
    }


@pytest.mark.parametrize("spelling", ["-e", "--experiment_spec", "--experiment_spec_file"])
def test_spellings_of_the_original(ask: Callable[..., Answer], export_with: Any, tmp_path: Path, spelling: str) -> None:
    overrides = export_with(succeed)
    path = tmp_path / "spec.yaml"
    path.write_text(f"results_dir: {tmp_path}/other\nmodel_name: from-file\nexport:\n  checkpoint: ???\n")
    answer = ask("export", spelling, path, overrides[1], "-r", tmp_path / "short", "-k", "0123", "--json")
    assert answer.code == 0
    assert answer.data["metrics"]["name"] == "from-file"
    assert answer.data["files"]["results_dir"] == str(tmp_path / "short" / "export")
    assert "KINEGRAPH_ENCRYPTION_KEY" in answer.err
    assert "0123" not in answer.err + answer.out


def test_a_key_option_is_taken_as_text(ask: Callable[..., Answer], export_with: Any) -> None:
    seen: list[str] = []

    def act(spec: Spec, run: Run) -> Result:
        seen.append(spec.encryption_key)
        return Result()

    overrides = export_with(act)
    keys = ["1e5", "0x10", "yes", "a: b", '"', "ü"]
    for key in keys:
        assert ask("export", *overrides, "-k", key).code == 0
    assert seen == keys


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (DataError(Problem("a.npy", "1 joint", "34 joints", "Check it.")), 2, "error: a.npy: got 1 joint, expected 34"),
        (KinegraphError(Problem("a", "b", "c")), 1, "error: a: got b, expected c."),
        (OSError(28, "No space left on device", "x.bin"), 1, "x.bin: got No space left on device"),
        (RuntimeError("it broke"), 1, "error: RuntimeError: it broke. The traceback is in "),
        (KeyboardInterrupt(), 130, "interrupted"),
        (Terminated(), 143, "terminated"),
    ],
)
def test_exit_codes(
    ask: Callable[..., Answer], export_with: Any, tmp_path: Path, error: BaseException, code: int, text: str
) -> None:
    overrides = export_with(raise_error(error))
    answer = ask("export", *overrides)
    assert answer.code == code
    assert answer.out == ""
    assert text in answer.err
    assert "Traceback" not in answer.err
    status = (tmp_path / "results" / "export" / "status.json").read_text().splitlines()
    assert [json.loads(line)["status"] for line in status] == ["STARTED", "FAILURE"]
    as_json = ask("export", *overrides, "--json")
    assert as_json.code == code
    assert (as_json.data["status"], as_json.data["exit_code"]) == ("error", code)


def test_unexpected_error(
    ask: Callable[..., Answer], export_with: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = export_with(raise_error(ZeroDivisionError("division")))
    log = tmp_path / "results" / "export" / "log.txt"
    assert str(log) in ask("export", *overrides).err
    assert "Traceback" in log.read_text()
    monkeypatch.setenv("KINEGRAPH_DEBUG", "1")
    assert "Traceback" in ask("export", *overrides).err
    monkeypatch.delenv("KINEGRAPH_DEBUG")
    monkeypatch.setattr("kinegraph.templates.build_template", raise_error(ZeroDivisionError("division")))
    answer = ask("template", "train")
    assert answer.code == 1
    assert "KINEGRAPH_DEBUG=1" in answer.err


def test_a_second_process_of_a_run_is_silent(
    ask: Callable[..., Answer], export_with: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = export_with(succeed)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    answer = ask("export", *overrides, "--json")
    assert (answer.code, answer.out, answer.err) == (0, "", "")


def test_validate(ask: Callable[..., Answer], tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(f"train: {{num_epochs: 20}}\nencryption_key: {KEY}\nevaluate:\n  checkpoint: ???\n")
    answer = ask("validate", "-e", path, "learning_rate=1e-4")
    assert answer.code == 0
    assert "OK" in answer.out
    assert "train.num_epochs = 20" in answer.out
    assert "train.optim.lr = 0.0001 (override)" in answer.out
    assert "batch_size" not in answer.out
    assert KEY not in answer.out + answer.err
    data = ask("validate", "-e", path, "learning_rate=1e-4", "--json").data
    assert data["status"] == "ok"
    assert data["values"]["train.num_epochs"] == {"value": 20, "origin": "file"}
    assert data["values"]["train.optim.lr"] == {"value": 1e-4, "origin": "override"}
    assert KEY not in json.dumps(data)
    assert ask("validate", "-e", path, "--action", "train").code == 2
    assert ask("validate", "-e", path, "num_epochs=0").code == 2


def test_validate_checks_what_an_action_needs(ask: Callable[..., Answer], tmp_path: Path) -> None:
    (tmp_path / "model.pth").write_text("x")
    arguments = [f"results_dir={tmp_path}", f"export.checkpoint={tmp_path}/model.pth"]
    answer = ask("validate", "--action", "export", *arguments)
    assert answer.code == 0
    assert "ready for export" in answer.out
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("action", actions.ACTIONS)
def test_template_and_schema(ask: Callable[..., Answer], tmp_path: Path, action: str) -> None:
    template, schema = ask("template", action), ask("schema", action)
    assert (template.code, schema.code) == (0, 0)
    values = RECIPES[DEFAULT_RECIPE].values if action in actions.TRAINING else {}
    assert template.out == build_template(action, values)
    jsonschema.Draft202012Validator.check_schema(schema.data)
    assert not list(jsonschema.Draft202012Validator(schema.data).iter_errors(yaml.safe_load(template.out)))
    for command, text in (("template", template.out), ("schema", schema.out)):
        path = tmp_path / "folder" / f"{command}.txt"
        assert ask(command, action, "-o", path).code == 0
        assert path.read_text() == text
        again = ask(command, action, "-o", path)
        assert again.code == 2
        assert "is there already" in again.err


def test_layouts(ask: Callable[..., Answer], tmp_path: Path) -> None:
    listing = ask("layouts").out
    assert all(f"{name} " in listing for name in LAYOUTS)
    data = ask("layouts", "--json").data
    assert [layout["name"] for layout in data["layouts"]] == list(LAYOUTS)
    one = ask("layouts", "coco", "--json").data
    assert one == {"status": "ok", "layouts": [LAYOUTS["coco"].to_dict()]}
    text = ask("layouts", "coco").out
    for part in ("17 joints", "centre 0 (nose)", "left_ankle", "15-13", "left_eye > nose", "left_knee | right_knee"):
        assert part in text
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"name": "mine", "joints": ["a", "b"], "edges": [[0, 1]], "centre": 0}))
    assert ask("layouts", path, "--json").data["layouts"][0]["joints"] == ["a", "b"]


def test_inspect(ask: Callable[..., Answer], tmp_path: Path) -> None:
    np.save(tmp_path / "data.npy", np.ones((4, 3, 5, 17, 1), np.float32))
    (tmp_path / "labels.json").write_text("[0, 1, 1, 1]")
    report = ask("inspect", tmp_path / "data.npy", tmp_path / "labels.json", "--json").data
    assert report["shape"] == {"clips": 4, "channels": 3, "frames": 5, "joints": 17, "people": 1}
    assert "coco" in report["layouts"]
    assert "coco" in ask("inspect", tmp_path / "data.npy").out


LIGHT = [
    ["--help"],
    ["--version"],
    ["train", "--help"],
    ["validate", "num_epochs=3"],
    ["template", "train"],
    ["schema", "train"],
    ["layouts"],
    ["layouts", "coco", "--json"],
    ["train", "num_epochs=0"],
]


def test_torch_is_not_imported_where_none_is_needed() -> None:
    program = f"""
        import sys
        from kinegraph.cli import main
        for arguments in {LIGHT!r}:
            assert main(arguments) in (0, 2)
            heavy = {{"torch", "lightning_fabric", "onnx", "onnxruntime", "matplotlib", "rich"}} & set(sys.modules)
            assert not heavy, (arguments, heavy)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr


def test_public_names() -> None:
    assert len(kinegraph.__all__) == len(set(kinegraph.__all__)) > 5
    for name in kinegraph.__all__:
        assert getattr(kinegraph, name) is not None
    assert set(kinegraph.__all__) <= set(dir(kinegraph))
    with pytest.raises(AttributeError, match="nothing"):
        kinegraph.nothing  # noqa: B018


def test_importing_the_package_imports_nothing_else() -> None:
    program = "import sys, kinegraph; assert not [name for name in sys.modules if name.startswith('kinegraph.')]"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def run_module(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kinegraph", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)


def test_as_a_program() -> None:
    good, bad = run_module("--version"), run_module("trian")
    assert (good.returncode, good.stdout) == (0, f"kinegraph {kinegraph.__version__}\n")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr == "error: No such command 'trian'. Did you mean 'train'? See `kinegraph --help`.\n"


def test_reader_that_stops_early() -> None:
    command = f"{sys.executable} -m kinegraph schema train | head -c 10"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120, check=False)
    assert len(result.stdout) == 10
    assert "BrokenPipe" not in result.stderr


CHILD = """
    import signal, sys, time
    from kinegraph import actions, cli

    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests that run in the background inherit none

    def act(spec, run):
        print("ready", flush=True)
        time.sleep(60)

    actions.ACTIONS["export"] = "__main__:act"
    sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals(tmp_path: Path, number: signal.Signals, code: int) -> None:
    (tmp_path / "model.pth").write_text("x")
    command = [sys.executable, "-c", textwrap.dedent(CHILD), "export"]
    command += [f"results_dir={tmp_path}", f"export.checkpoint={tmp_path}/model.pth"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(number)
        _, err = child.communicate(timeout=60)
    assert child.returncode == code
    assert err.splitlines()[-1] in ("terminated", "interrupted")
    lines = (tmp_path / "export" / "status.json").read_text().splitlines()
    assert [json.loads(line)["status"] for line in lines] == ["STARTED", "FAILURE"]


def test_automl_dry_run_shows_the_plan_and_trains_nothing(ask: Callable[..., Answer], tmp_path: Path) -> None:
    write_small_data(tmp_path)
    spec = tmp_path / "spec.yaml"
    spec.write_text(json.dumps(make_spec(tmp_path)))
    answer = ask("automl", "-e", spec, "--dry-run", "--json", "automl.automl_max_recommendations=5")
    assert answer.code == 0
    plan = json.loads(answer.out)["plan"]
    assert (plan["algorithm"], plan["max_trials"], plan["metric"]) == ("bayesian", 5, "val_acc")
    assert plan["estimated_seconds"] > 0
    assert {row["key"] for row in plan["searched"]} >= {"train.optim.lr", "model.dropout"}
    answer = ask("automl", "-e", spec, "--dry-run")
    assert (answer.code, answer.out) == (0, "")
    assert "Searched options" in answer.err and "0 (your spec)" in answer.err
    assert not (tmp_path / "results").exists()


def test_automl_lists_and_checks_algorithms(ask: Callable[..., Answer], tmp_path: Path) -> None:
    listed = json.loads(ask("automl", "--algorithms", "--json").out)["algorithms"]
    assert {entry["name"] for entry in listed} >= {"bayesian", "tpe", "random", "cmaes", "asha", "hyperband", "bohb"}
    write_small_data(tmp_path)
    spec = tmp_path / "spec.yaml"
    spec.write_text(json.dumps(make_spec(tmp_path)))
    answer = ask("automl", "-e", spec, "--dry-run", "automl.algorithm=dehb")
    assert answer.code == 2
    assert "bayesian" in answer.err and "hyperband" in answer.err and "Traceback" not in answer.err


def test_json_progress_is_json_lines(ask: Callable[..., Answer], tmp_path: Path) -> None:
    write_small_data(tmp_path)
    spec = tmp_path / "spec.yaml"
    spec.write_text(json.dumps(make_spec(tmp_path)))
    answer = ask("train", "-e", spec, "--json", "--json-progress")
    events = [json.loads(line) for line in answer.err.splitlines()]
    assert {"message", "status"} <= {event["event"] for event in events}
    states = [event["status"] for event in events if event["event"] == "status"]
    assert states == ["STARTED", "RUNNING", "RUNNING", "SUCCESS"]
    assert json.loads(answer.out)["status"] == "ok"


def test_sample_writes_a_data_set_that_inspect_takes(ask: Callable[..., Answer], tmp_path: Path) -> None:
    files = json.loads(ask("sample", tmp_path, "--clips", 12, "--json").out)["files"]
    assert set(files) == {
        *(f"{part}_{kind}" for part in ("train", "val", "test") for kind in ("data", "label")),
        "recording",
    }
    report = json.loads(ask("inspect", files["train_data"], files["train_label"], "--json").out)
    assert report["problems"] == [] and report["shape"]["clips"] == 12
    assert isinstance(json.loads(Path(files["recording"]).read_text()), list)
    assert ask("sample", tmp_path, "--clips", 0).code == 2


@pytest.mark.parametrize("command", ["template", "schema"])
def test_texts_as_json(ask: Callable[..., Answer], tmp_path: Path, command: str) -> None:
    data = ask(command, "train", "--json").data
    assert (data["status"], data["action"], data["file"]) == ("ok", "train", None)
    plain = ask(command, "train").out
    assert (
        data["template"] if command == "template" else json.dumps(data["schema"], indent=2)
    ).strip() == plain.strip()
    written = ask(command, "train", "--json", "-o", tmp_path / "file").data
    assert written["file"] == str(tmp_path / "file")
    assert (tmp_path / "file").read_text().strip() == plain.strip()


def test_json_progress_of_a_search_starts_with_its_plan(ask: Callable[..., Answer], tmp_path: Path) -> None:
    write_small_data(tmp_path)
    spec = tmp_path / "spec.yaml"
    spec.write_text(json.dumps(make_spec(tmp_path)))
    answer = ask("automl", "-e", spec, "--dry-run", "--json-progress", "encryption_key=hush")
    events = [json.loads(line) for line in answer.err.splitlines()]
    assert [event["event"] for event in events] == ["message", "plan"]
    assert "KINEGRAPH_ENCRYPTION_KEY" in events[0]["message"]


@pytest.mark.parametrize(("typed", "code"), [("n", 0), ("", 130)])
def test_a_search_that_is_not_confirmed(
    ask: Callable[..., Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: str, code: int
) -> None:
    write_small_data(tmp_path)
    spec = tmp_path / "spec.yaml"
    spec.write_text(json.dumps(make_spec(tmp_path)))

    def answer_at_the_terminal(*arguments: Any, **options: Any) -> bool:
        if not typed:
            raise typer.Abort
        return typed == "y"

    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr(typer, "confirm", answer_at_the_terminal)
    answer = ask("automl", "-e", spec, "--json")
    assert answer.code == code
    if typed:
        assert answer.data == {"status": "ok", "action": "automl", "started": False}
    assert not (tmp_path / "results").exists()
