"""A recipe is a spec that can be trained as it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

import small_runs
from kinegraph import online
from kinegraph.actions import train
from kinegraph.cli import main
from kinegraph.config import list_options
from kinegraph.models import build_model
from kinegraph.models.checkpoint import read_checkpoint
from kinegraph.recipes import DEFAULT_RECIPE, RECIPES, choose_recipe
from kinegraph.skeleton.layouts import get_layout
from kinegraph.spec import ModelSpec, Spec


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_trains_from_its_template(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_runs.write_small_data(tmp_path)
    template = tmp_path / "train.yaml"
    assert main(["template", "train", "--recipe", name, "-o", str(template)]) == 0
    spec = yaml.safe_load(template.read_text())
    for key, value in RECIPES[name].values.items():
        section = spec
        for part in key.split(".")[:-1]:
            section = section[part]
        assert section[key.split(".")[-1]] == value
    files = [
        f"dataset.{part}_dataset.{kind}_path={tmp_path / part}_{kind}.{ending}"
        for part in ("train", "val")
        for kind, ending in (("data", "npy"), ("label", "json"))
    ]
    small = ["model.graph_layout=coco", "dataset.batch_size=4", "train.num_epochs=1", "train.accelerator=cpu"]
    small += ["train.min_epoch_steps=4"] if "train.min_epoch_steps" in RECIPES[name].values else []
    assert main(["train", "-e", str(template), *files, *small, f"results_dir={tmp_path / 'results'}"]) == 0
    capsys.readouterr()
    checkpoint = tmp_path / "results/train/pc_model_latest.pth"
    if name == "online":
        model = online.load(checkpoint, mode="step")
        probabilities, _ = model.step(np.load(tmp_path / "val_data.npy")[:2, ..., 0], model.start(2))
        np.testing.assert_allclose(probabilities.sum(axis=1), 1)


def test_recipes_name_known_options() -> None:
    known = {entry.key for entry in list_options(Spec)}
    assert all(key in known for recipe in RECIPES.values() for key in recipe.values)
    assert {"tao", "small", "balanced", "best", "online"} == RECIPES.keys() and not RECIPES["tao"].values


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), DEFAULT_RECIPE),
        (("model.graph_layout=coco", "num_epochs=3"), DEFAULT_RECIPE),
        (("model.dropout=0.1",), DEFAULT_RECIPE),
        (("model.model_type=DD-Net",), DEFAULT_RECIPE),
        (("model.model_type=ST-GCN",), "tao"),
        (("model.model_type='ST-GCN'",), "tao"),
        (("model.model_type=ST-GCN", "model.model_type=CTR-GCN"), DEFAULT_RECIPE),
    ],
)
def test_a_training_without_a_spec_is_that_of_a_recipe(overrides: tuple[str, ...], expected: str) -> None:
    assert choose_recipe(overrides) == expected


def test_a_spec_file_keeps_the_network_of_tao(tmp_path: Path) -> None:
    small_runs.write_small_data(tmp_path)
    train(small_runs.make_spec(tmp_path, num_epochs=1))
    assert read_checkpoint(tmp_path / "results/train/pc_model_latest.pth").options.model_type == "ST-GCN"
    overrides = [f"results_dir={tmp_path / 'other'}", "model.graph_layout=coco", "num_epochs=1", "batch_size=4"]
    for part in ("train", "val"):
        overrides.append(f"dataset.{part}_dataset.data_path={tmp_path}/{part}_data.npy")
        overrides.append(f"dataset.{part}_dataset.label_path={tmp_path}/{part}_label.json")
    train(None, *overrides)
    assert f"recipe {DEFAULT_RECIPE}" in (tmp_path / "other/train/log.txt").read_text()
    train(None, *overrides, f"results_dir={tmp_path / 'wider'}", "model.width=0.25")
    wider = read_checkpoint(tmp_path / "wider/train/pc_model_latest.pth").options
    assert (wider.model_type, wider.width) == (RECIPES[DEFAULT_RECIPE].values["model.model_type"], 0.25)
    found = read_checkpoint(tmp_path / "other/train/pc_model_latest.pth").options.model_type
    assert found == RECIPES[DEFAULT_RECIPE].values["model.model_type"] != "ST-GCN"


@pytest.mark.parametrize("name", ["small", "online"])
def test_network_of_the_small_recipes_is_small(name: str) -> None:
    values = RECIPES[name].values
    options = {key.removeprefix("model."): value for key, value in values.items() if key.startswith("model.")}
    channels = 3 * len(values["input.streams"])
    model = build_model(replace(ModelSpec(), **options), get_layout("ntu-rgb+d"), 60, channels)
    assert sum(parameter.numel() for parameter in model.parameters()) < 400_000


def test_unknown_recipe_and_other_actions_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["template", "train", "--recipe", "onlin"]) == 2
    assert "Did you mean 'online'?" in capsys.readouterr().err
    assert main(["template", "export", "--recipe", "online"]) == 2
    assert "train or automl" in capsys.readouterr().err
