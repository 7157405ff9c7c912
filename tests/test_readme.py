"""What the README shows works: its Python example, its layout file, and the commands it names."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from kinegraph.cli import main
from kinegraph.models import build_model
from kinegraph.models.checkpoint import Checkpoint, write_checkpoint
from kinegraph.skeleton.layouts import LAYOUTS, get_layout
from kinegraph.spec import ModelSpec

README = Path(__file__).parents[1] / "README.md"


def find_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


def test_python_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = find_blocks("python")
    assert len(blocks) == 1
    (tmp_path / "kinegraph-demo/results/train").mkdir(parents=True)
    (tmp_path / "kinegraph-demo/data").mkdir()
    torch.manual_seed(0)
    model = build_model(ModelSpec(), LAYOUTS["nvidia"], 2)
    checkpoint = Checkpoint(dict(model.state_dict()), ModelSpec(), LAYOUTS["nvidia"], 2, {"walking": 0, "jumping": 1})
    write_checkpoint(tmp_path / "kinegraph-demo/results/train/pc_model_best.pth", checkpoint)
    clips = np.random.default_rng(0).normal(size=(5, 3, 8, 34, 1)).astype(np.float32)
    np.save(tmp_path / "kinegraph-demo/data/test_data.npy", clips)
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks[0], "README.md", "exec"), {})
    shown = capsys.readouterr().out
    assert len(re.findall("walking|jumping", shown)) == 3
    assert all(0.5 <= float(number) <= 1 for number in re.findall(r"\d\.\d+", shown)) and re.search(r"\d\.\d+", shown)


def test_layout_example(tmp_path: Path) -> None:
    blocks = find_blocks("yaml")
    assert len(blocks) == 1
    (tmp_path / "my_layout.yaml").write_text(blocks[0])
    layout = get_layout(str(tmp_path / "my_layout.yaml"))
    assert layout.joints == ("hip", "neck", "head", "left_hand", "right_hand") and layout.centre == 0


def test_commands_exist(capsys: pytest.CaptureFixture[str]) -> None:
    text = README.read_text()
    commands = set(re.findall(r"(?:kinegraph|pose_classification) ([a-z_]+)\b", text)) - {"import"}
    named = {"train", "evaluate", "export", "validate", "template", "inspect", "layouts", "dataset_convert"}
    assert named <= commands
    for command in commands & (named | {"inference", "demo", "schema"}):
        assert main([command, "--help"]) == 0
