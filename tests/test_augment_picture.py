from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from kinegraph.cli import main
from kinegraph.data.augment_picture import STRENGTHS, draw_augmentations
from kinegraph.errors import DataError, UserError
from kinegraph.spec_input import AugmentSpec


def write_walk(path: Path, num_joints: int = 20, num_channels: int = 3) -> Path:
    x = np.random.default_rng(0).uniform(-1, 1, (3, num_channels, 12, num_joints, 2)).astype(np.float32)
    x[0] = 0
    x[..., 1] = 0
    x[1, :, 6:] = 0
    np.save(path, x)
    return path


def read_size(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    return int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")


def test_a_panel_for_each_augmentation(tmp_path: Path) -> None:
    data = write_walk(tmp_path / "a.npy")
    names = draw_augmentations(data, tmp_path / "a.png", clip=1)
    assert set(names) == set(STRENGTHS) == {name for name in vars(AugmentSpec()) if name != "sides_matter"}
    width, height = read_size(tmp_path / "a.png")
    assert width > 1000 and height > 1000
    flat = draw_augmentations(write_walk(tmp_path / "b.npy", 17, 2), tmp_path / "b.png", "coco", 2)
    assert set(names) - set(flat) == {"rotation_x", "rotation_y"}
    scored = np.load(tmp_path / "b.npy").repeat(2, axis=1)[:, :3]
    scored[:, 2] = np.abs(scored[:, 2])
    np.save(tmp_path / "c.npy", scored)
    assert draw_augmentations(tmp_path / "c.npy", tmp_path / "c.png", "coco", 2) == flat


def test_a_picture_of_sided_classes_says_that_mirror_is_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes = []
    monkeypatch.setattr("kinegraph.data.augment_picture._draw", lambda *given: notes.append(given[-1]))
    data = write_walk(tmp_path / "a.npy")
    for classes in ((), ("wave", "pull left")):
        draw_augmentations(data, tmp_path / "a.png", clip=1, class_names=classes)
    assert notes == [{}, {"mirror": "off in training: pull left names a side"}]


def test_what_cannot_be_drawn(tmp_path: Path) -> None:
    data = write_walk(tmp_path / "a.npy")
    with pytest.raises(DataError, match="no joints"):
        draw_augmentations(data, tmp_path / "a.png")
    with pytest.raises(UserError, match="clip from 0 to 2"):
        draw_augmentations(data, tmp_path / "a.png", clip=3)
    with pytest.raises(DataError, match="17, as coco has"):
        draw_augmentations(data, tmp_path / "a.png", "coco")
    with pytest.raises(UserError, match=r"human3.6m or coco"):
        draw_augmentations(write_walk(tmp_path / "b.npy", 17), tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a file that ends in \.png"):
        draw_augmentations(data, tmp_path / "a.txt", clip=1)
    assert not (tmp_path / "a.png").exists() and not (tmp_path / "a.txt").exists()
    (tmp_path / "a.png").write_text("mine")
    with pytest.raises(UserError, match="there already"):
        draw_augmentations(data, tmp_path / "a.png", clip=1)
    assert (tmp_path / "a.png").read_text() == "mine"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, picture = str(write_walk(tmp_path / "a.npy")), tmp_path / "a.png"
    assert main(["inspect", data, "--augment", "-o", str(picture), "--clip", "1", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["files"] == {"picture": str(picture)} and len(answer["augmentations"]) == len(STRENGTHS)
    read_size(picture)
    assert main(["inspect", data, "--augment"]) == 2
    for alone in (["--clip", "0"], ["--layout", "coco"]):
        capsys.readouterr()
        assert main(["inspect", data, *alone]) == 2
        assert f"{alone[0]}: got no --augment" in capsys.readouterr().err
    assert main(["inspect", data, "-o", str(picture)]) == 2
