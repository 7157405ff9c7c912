"""The steps of the demo, without their work: which specs they get, and what a second demo in the same folder does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kinegraph import cli, demo
from kinegraph.config import LoadedSpec, get_value
from kinegraph.data.synthetic import CLASS_NAMES
from kinegraph.demo import DemoSize, run_demo
from kinegraph.errors import UserError
from kinegraph.run import LOGGER, Result
from kinegraph.spec import Spec
from kinegraph.spec_reading import check_spec, read_spec

SMALL = DemoSize(train=12, val=6, test=6)
STEPS = ["train", "evaluate", "inference", "export"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The specs that the actions get, in order; the actions only leave the files that the next ones need."""
    made: list[tuple[str, LoadedSpec[Spec]]] = []

    def act(action: str, path: Path) -> Result:
        loaded = read_spec(path)
        check_spec(loaded, action)
        made.append((action, loaded))
        folder = Path(loaded.values.results_dir) / action
        folder.mkdir(parents=True, exist_ok=True)
        files = {"results_dir": str(folder), "best": str(folder / "pc_model_best.pth")}
        if action == "train":
            Path(files["best"]).write_text("x")
        return Result({"accuracy": 93.3}, files)

    monkeypatch.setattr(demo, "run_action", act)
    yield made
    for handler in list(LOGGER.handlers):
        LOGGER.removeHandler(handler)


def test_steps(tmp_path: Path, calls: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "demo"
    result = run_demo(folder, SMALL)
    assert [action for action, _ in calls] == STEPS
    clips = {part: np.load(folder / "data" / f"{part}_data.npy", mmap_mode="r") for part in ("train", "val", "test")}
    assert [len(array) for array in clips.values()] == [12, 6, 6]
    specs = {action: loaded.values for action, loaded in calls}
    assert specs["train"].dataset.label_map == {name: label for label, name in enumerate(CLASS_NAMES)}
    for part in ("train", "val"):
        assert get_value(specs["train"], f"dataset.{part}_dataset").data_path == str(
            folder / "data" / f"{part}_data.npy"
        )
    for action in ("evaluate", "inference"):
        assert get_value(specs[action], action).test_dataset.data_path == str(folder / "data" / "test_data.npy")
    for action in STEPS[1:]:
        assert get_value(specs[action], action).checkpoint == str(folder / "results" / "train" / "pc_model_best.pth")
    assert specs["export"].export.overwrite
    assert result.metrics["accuracy"] == 93.3
    out = capsys.readouterr().out
    for step in range(1, 6):
        assert f"\n{step}/5 " in out
    for text in (
        "93.3 %",
        "synthetic",
        "says nothing about",
        "Try next:",
        f"{folder}/train.yaml",
        "guessing gives 16.7 %",
    ):
        assert text in out


def test_a_second_demo_uses_what_is_there(tmp_path: Path, calls: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run_demo(tmp_path / "demo", SMALL)
    data = tmp_path / "demo" / "data" / "train_data.npy"
    before = data.stat().st_mtime_ns
    spec = tmp_path / "demo" / "train.yaml"
    spec.write_text(spec.read_text().replace("num_epochs: ", "num_epochs: 1"))
    capsys.readouterr()
    run_demo(tmp_path / "demo", SMALL)
    assert [action for action, _ in calls] == STEPS * 2
    assert data.stat().st_mtime_ns == before
    epochs = [loaded.values.train.num_epochs for action, loaded in calls if action == "train"]
    assert epochs[1] == int(f"1{epochs[0]}")
    assert capsys.readouterr().out.count("is there already") == 5


def test_data_cut_short_is_made_again(tmp_path: Path, calls: Any) -> None:
    run_demo(tmp_path / "demo", SMALL)
    data = tmp_path / "demo" / "data"
    before = (data / "train_data.npy").read_bytes()
    (data / "test_label.pkl").unlink()
    run_demo(tmp_path / "demo", SMALL)
    assert (data / "test_label.pkl").is_file()
    assert (data / "train_data.npy").read_bytes() == before


def test_a_folder_with_other_files_is_refused(tmp_path: Path, calls: Any) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="--folder"):
        run_demo(tmp_path, SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    assert cli.main(["demo", "--folder", str(tmp_path)]) == 2
    assert not calls
