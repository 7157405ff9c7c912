"""The search space: which options, over which ranges, under which conditions, and back from values to parameters."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from optuna.trial import FixedTrial

from kinegraph import config_source
from kinegraph.automl.dimensions import Dimension, SearchSpace
from kinegraph.automl.samplers import suggest_values
from kinegraph.automl.space import build_space
from kinegraph.automl.trial_spec import build_base, build_trial_spec
from kinegraph.automl.vendor_schema import read_schema
from kinegraph.config import SearchRange, list_options
from kinegraph.errors import SpecError
from kinegraph.skill.tao_schema import build_tao_schema
from kinegraph.spec import AutomlSpec, Spec
from kinegraph.spec_reading import read_spec

OPTIONS = {entry.key: entry for entry in list_options(Spec)}
SEARCHABLE = [key for key, entry in OPTIONS.items() if "search" in entry.extra]
EXTRAS = sorted(set(SEARCHABLE) - {key for key, entry in OPTIONS.items() if entry.extra["automl_enabled"]})
LR, SCHEDULER, OPTIMIZER = "train.optim.lr", "train.optim.lr_scheduler", "train.optim.optimizer_type"
MOMENTUM, NESTEROV, PATIENCE = "train.optim.momentum", "train.optim.nesterov", "train.optim.patience"
DECAY, DROPOUT, CLIP = "train.optim.lr_decay", "model.dropout", "train.grad_clip"
WINDOW, CHOOSE, BATCH = "dataset.window_size", "dataset.random_choose", "dataset.batch_size"
WEIGHT_DECAY = "train.optim.weight_decay"


def build(
    *overrides: str, num_frames: int | None = 64, num_clips: int | None = None, schema: Any = None, **automl: Any
) -> SearchSpace:
    loaded = read_spec({"automl": automl}, list(overrides))
    return build_space(loaded.values, loaded.origins, num_frames, schema, num_clips)


def fail(*overrides: str, **automl: Any) -> str:
    with pytest.raises(SpecError) as caught:
        build(*overrides, **automl)
    return str(caught.value)


def name_keys(space: SearchSpace) -> set[str]:
    return {dimension.key for dimension in space.dimensions}


def find(space: SearchSpace, key: str) -> Dimension:
    return next(dimension for dimension in space.dimensions if dimension.key == key)


def draw(space: SearchSpace, number: int, seed: int = 0) -> dict[str, Any]:
    return suggest_values(space, "random", seed, number, [], "maximize", AutomlSpec())


def test_the_default_space_of_the_default_spec() -> None:
    space = build()
    assert name_keys(space) == {DROPOUT, CLIP, LR, DECAY, MOMENTUM, WEIGHT_DECAY}
    assert set(space.left_out) == {WINDOW, PATIENCE}
    assert "lr_scheduler=AutoReduce" in space.left_out[PATIENCE]
    assert "random_choose=True" in space.left_out[WINDOW]
    defaults = {DROPOUT: 0.5, CLIP: 0.0, LR: 0.1, DECAY: 0.1, MOMENTUM: 0.9, WEIGHT_DECAY: 1e-4}
    assert space.defaults == defaults == draw(space, 0)
    assert space.holds(defaults)
    assert space.distributions[LR] == optuna.distributions.FloatDistribution(1e-4, 0.5, log=True)
    assert space.encode({CLIP: 0.0}) == {f"{CLIP}?": 0.0}
    assert space.encode({CLIP: 2.0}) == {f"{CLIP}?": "range", CLIP: 2.0}


@pytest.mark.parametrize("scheduler", ["MultiStep", "AutoReduce", "Cosine"])
@pytest.mark.parametrize("optimizer", ["torch.optim.SGD", "torch.optim.AdamW"])
def test_only_what_the_spec_uses_is_searched(scheduler: str, optimizer: str) -> None:
    keys = name_keys(build(f"{SCHEDULER}={scheduler}", f"{OPTIMIZER}={optimizer}"))
    assert (PATIENCE in keys) == (scheduler == "AutoReduce")
    assert (DECAY in keys) == (scheduler != "Cosine")
    assert (MOMENTUM in keys) == (optimizer == "torch.optim.SGD")


def test_conditions_on_searched_options() -> None:
    space = build(automl_hyperparameters=[f"+{SCHEDULER}", f"+{OPTIMIZER}", f"+{CHOOSE}"])
    assert not space.left_out
    seen: set[tuple[Any, ...]] = set()
    for number in range(1, 200):
        values = draw(space, number)
        assert (PATIENCE in values) == (values[SCHEDULER] == "AutoReduce")
        assert (DECAY in values) == (values[SCHEDULER] != "Cosine")
        assert (MOMENTUM in values) == (values[OPTIMIZER] == "torch.optim.SGD")
        assert (WINDOW in values) == values[CHOOSE]
        if values[CHOOSE]:
            assert values[WINDOW] == -1 or 16 <= values[WINDOW] <= 64
        seen.add((values[SCHEDULER], values[OPTIMIZER], values[CHOOSE]))
    assert len(seen) == 3 * 4 * 2


def test_the_window_reaches_to_the_length_of_the_data() -> None:
    space = build(f"{CHOOSE}=true", num_frames=300)
    assert find(space, WINDOW).search == replace(OPTIONS[WINDOW].extra["search"], high=300)
    short = build(f"{CHOOSE}=true", num_frames=10)
    assert {draw(short, number)[WINDOW] for number in range(1, 30)} == {-1, 10}
    with pytest.raises(SpecError, match=r"window_size: got no finite range.*custom_param_ranges"):
        build(f"{CHOOSE}=true", num_frames=None)
    own = {WINDOW: {"valid_min": 20, "valid_max": 30}}
    space = build(f"{CHOOSE}=true", num_frames=None, custom_param_ranges=own)
    assert find(space, WINDOW).search.specials == ()
    assert {draw(space, number)[WINDOW] for number in range(1, 200)} == set(range(20, 31))


def test_choosing_keys() -> None:
    assert name_keys(build(automl_hyperparameters=["", LR, DROPOUT])) == {LR, DROPOUT}
    assert name_keys(build(automl_hyperparameters=["learning_rate", f"+{BATCH}"])) == {LR, BATCH}
    assert name_keys(build(automl_hyperparameters=[f"-{LR}", "+batch_size"])) == {
        *(DROPOUT, CLIP, DECAY, MOMENTUM, WEIGHT_DECAY, BATCH)
    }
    assert LR not in name_keys(build(automl_fixed=[LR]))
    assert name_keys(build("automl.automl_hyperparameters=[train.optim.lr]")) == {LR}


def test_all_wrong_keys_are_told_at_once() -> None:
    told = fail(
        automl_hyperparameters=[
            "+lr",
            "+train.optim.lrr",
            "+train.optim",
            "+wandb.tags",
            f"-{NESTEROV}",
            f"+{DROPOUT}",
        ],
        automl_fixed=[DROPOUT, "train.oops"],
        custom_param_ranges={"train.nothing": {"valid_min": 1}, BATCH: {"valid_min": 8}},
    )
    expected = [
        "automl.automl_fixed: got the unknown key 'train.oops'",
        "automl.automl_hyperparameters: got the unknown key 'lr', expected an option that can be searched. "
        "Did you mean train.optim.lr?",
        "automl.automl_hyperparameters: got the unknown key 'train.optim.lrr'",
        "automl.automl_hyperparameters: got train.optim, which is a group",
        "automl.automl_hyperparameters: got wandb.tags, which is a list",
        "automl.automl_hyperparameters: got model.dropout, which automl.automl_fixed fixes",
        "automl.automl_hyperparameters: got -train.optim.nesterov, which is not searched",
        "automl.custom_param_ranges: got the unknown key 'train.nothing'",
        "automl.custom_param_ranges: dataset.batch_size: got a range",
    ]
    for line, start in zip(told.splitlines(), expected, strict=True):
        assert line.startswith(start)


NEVER = {
    "train.optim": "a group",
    "model.pretrained_model_path": "a path",
    "train.gpu_ids": "a list",
    "train.optim.lr_steps": "a list",
    "dataset.label_map": "a mapping",
    "encryption_key": "a secret",
    "wandb.name": "no option of training",
    "evaluate.batch_size": "no option of training",
    "train.cudnn.benchmark": "part of what is trained",
    "train.num_epochs": "part of what is trained",
}


@pytest.mark.parametrize("key", NEVER)
def test_what_is_never_searched(key: str) -> None:
    assert f"got {key}, which is {NEVER[key]}" in fail(automl_hyperparameters=[f"+{key}"])


def test_every_searchable_option_can_be_named() -> None:
    assert len(EXTRAS) == 25
    keys = name_keys(build(f"{CHOOSE}=true", automl_hyperparameters=[f"+{key}" for key in EXTRAS]))
    assert keys == set(SEARCHABLE)


def test_an_empty_space_says_what_was_left_out() -> None:
    told = fail(automl_hyperparameters=[PATIENCE])
    assert "nothing to search" in told
    assert "patience: it counts only with train.optim.lr_scheduler=AutoReduce" in told


def test_what_does_not_fit_the_spec_is_left_out() -> None:
    space = build("model.input_channels=1", automl_hyperparameters=["+dataset.random_move"])
    assert "dataset.random_move" in space.left_out
    space = build("model.pretrained_model_path=a.pth", automl_hyperparameters=["+model.graph_strategy"])
    assert "model.graph_strategy" in space.left_out


CUSTOM_FORMS: list[Any] = [
    {LR: {"valid_min": 0.01, "valid_max": 0.2}},
    {"train": {"optim": {"lr": {"valid_min": 0.01, "valid_max": 0.2}}}},
    {"learning_rate": {"valid_min": 0.01, "valid_max": 0.2, "valid_options": []}},
]


@pytest.mark.parametrize("given_ranges", CUSTOM_FORMS)
def test_own_ranges(given_ranges: Any) -> None:
    search = find(build(custom_param_ranges=given_ranges), LR).search
    assert (search.low, search.high, search.log) == (0.01, 0.2, True)


def test_own_ranges_as_a_list() -> None:
    loaded = read_spec()
    loaded.values.automl.custom_param_ranges = [{"parameter": LR, "valid_max": 0.2}]  # type: ignore[assignment]
    search = find(build_space(loaded.values, loaded.origins, 64), LR).search
    assert (search.low, search.high) == (1e-4, 0.2)


def test_own_ranges_on_the_command_line() -> None:
    space = build(
        "automl.custom_param_ranges.train.optim.lr.valid_max=0.2",
        f"automl.custom_param_ranges={{{DROPOUT}: {{valid_options: [0, 0.5]}}}}",
    )
    assert {draw(space, number)[DROPOUT] for number in range(1, 20)} == {0.0, 0.5}
    assert all(type(draw(space, number)[DROPOUT]) is float for number in range(1, 20))


BAD_RANGES = {
    f"{LR}: got 0..0.5, expected bounds above 0": {LR: {"valid_min": 0}},
    f"{LR}: got valid_min 0.2 above valid_max 0.1": {LR: {"valid_min": 0.2, "valid_max": 0.1}},
    f"{LR}: got 0.7..0.5, expected a lower bound": {LR: {"valid_min": 0.7}},
    f"{LR}.valid_max: got inf": {LR: {"valid_max": math.inf}},
    f"{LR}.valid_max: got 1000000": {LR: {"valid_max": 10**400}},
    f"{LR}: got the choice 10000": {LR: {"valid_options": [10**400]}},
    f"{LR}.valid_max: got nan": {LR: {"valid_max": math.nan}},
    f"{LR}.valid_max: got True": {LR: {"valid_max": True}},
    f"{LR}.valid_max: got '1'": {LR: {"valid_max": "1"}},
    f"{LR}: got the unknown field 'valid_mix'": {LR: {"valid_mix": 1}},
    f"{LR}: got nothing": {LR: {}},
    f"{LR}: got 3,": {LR: 3},
    f"{LR}: got the choice 'a'": {LR: {"valid_options": ["a"]}},
    f"{LR}: got valid_options [0.1, 0.1]": {LR: {"valid_options": [0.1, 0.1]}},
    f"{LR}: got valid_options [1, 1.0]": {LR: {"valid_options": [1, 1.0]}},
    f"{LR}: got valid_options 5": {LR: {"valid_options": 5}},
    "0.7..0.5, expected a lower bound that is not above the upper one. 0.5 is the search's own upper bound": {
        LR: {"valid_min": 0.7}
    },
    "0.0001 is the search's own lower bound: valid_min sets another": {LR: {"valid_max": 1e-5}},
    "0.1 is the search's own lower bound": {CLIP: {"valid_min": 0, "valid_max": 0.05}},
    f"{LR}: got valid_options and bounds": {LR: {"valid_options": [0.1], "valid_max": 1}},
    f"{DROPOUT}: got 0.0..1.5, expected at most 1": {DROPOUT: {"valid_max": 1.5}},
    f"{DROPOUT}: got the choice -1, expected at least 0": {DROPOUT: {"valid_options": [-1]}},
    f"{MOMENTUM}: got 0 among its values": {MOMENTUM: {"valid_min": 0}},
}


@pytest.mark.parametrize("told", BAD_RANGES)
def test_bad_ranges(told: str) -> None:
    assert told in fail(custom_param_ranges=BAD_RANGES[told])


TWICE: list[Any] = [
    {LR: {"valid_min": 0.01}, "train": {"optim": {"lr": {"valid_max": 0.2}}}},
    {LR: {"valid_min": 0.01}, "learning_rate": {"valid_max": 0.2}},
    [{"parameter": LR, "valid_min": 0.01}, {"parameter": LR, "valid_max": 0.2}],
]


@pytest.mark.parametrize("ranges", TWICE)
def test_two_ranges_of_one_option(ranges: Any) -> None:
    told = fail(custom_param_ranges=ranges)
    assert told.startswith(f"automl.custom_param_ranges: {LR}: got 2 ranges, expected one for each option.")
    assert len(told.splitlines()) == 1


@pytest.mark.parametrize(("text", "shown"), [("abc", "'abc'"), ("5", "5"), ("[{a: 1}, x]", "[{'a': 1}, 'x']")])
def test_ranges_of_a_wrong_type_are_told_once(text: str, shown: str) -> None:
    told = fail(f"automl.custom_param_ranges={text}", "train.num_epochs=none")
    expected = f"override: automl.custom_param_ranges: got {shown}, expected a mapping or a list of mappings."
    assert [line for line in told.splitlines() if "custom_param_ranges" in line] == [expected]
    assert len(told.splitlines()) == 2, "the other mistake is told as well"


def test_own_ranges_end_with_the_data() -> None:
    crop = f"{CHOOSE}=true"

    def fail_window(content: dict[str, Any], *overrides: str) -> str:
        return fail(crop, *overrides, num_frames=4, custom_param_ranges={WINDOW: content})

    where, expected = f"automl.custom_param_ranges: {WINDOW}", "expected at most 4, the frames of a training clip."
    assert fail_window({"valid_min": 100, "valid_max": 200}) == f"{where}: got 100..200, {expected}"
    assert fail_window({"valid_options": [2, 5]}) == f"{where}: got the choices [2, 5], {expected}"
    assert "4 is the search's own upper bound" in fail_window({"valid_min": 100})
    own = {WINDOW: {"valid_min": 2, "valid_max": 4}}
    assert {draw(build(crop, num_frames=4, custom_param_ranges=own), n)[WINDOW] for n in range(1, 40)} == {2, 3, 4}
    own = {WINDOW: {"valid_min": 2, "valid_max": 8}}
    space = build(crop, f"{WINDOW}=8", num_frames=4, custom_param_ranges=own)
    assert find(space, WINDOW).search.high == 8, "clips are padded where the spec says so"
    assert "got 2..9, expected at most 4" in fail_window({"valid_min": 2, "valid_max": 9}, f"{WINDOW}=8")


def test_batches_end_with_the_data() -> None:
    added, where = ["+batch_size"], f"automl.custom_param_ranges: {BATCH}"
    told = fail(automl_hyperparameters=added, num_clips=40, custom_param_ranges={BATCH: {"valid_max": 1e15}})
    assert told == f"{where}: got 4..1000000000000000.0, expected at most 40, the training clips."
    sizes = {
        (40, 16): {4, 8, 16, 32},
        (5, 4): {4},
        (3, 2): {2},
        (1, 1): {1},
        (10, 16): {4, 8, 16},  # the spec's own
        (None, 16): {4, 8, 16, 32, 64, 128},
    }
    for (num_clips, default), expected in sizes.items():
        space = build(f"{BATCH}={default}", automl_hyperparameters=added, num_clips=num_clips)
        assert {draw(space, number)[BATCH] for number in range(1, 100)} == expected, num_clips
    assert len(sizes) == 6


def test_a_schema_reaches_as_far_as_the_data() -> None:
    def search(**content: Any) -> SearchRange:
        schema = nest({BATCH: content}, automl_default_parameters=[BATCH])
        return find(build(schema=schema, num_clips=40), BATCH).search

    assert search(automl_minimum=2, automl_maximum=1e15).high == 40
    kept = search(enum=[8, 64, 32, 256], option_weights=[1, 2, 3, 4])
    assert (kept.choices, kept.weights) == ((8, 32), (1.0, 3.0))
    told = r"^dataset.batch_size: got .*64.*, expected at most 40, the training clips"
    with pytest.raises(SpecError, match=told):
        search(minimum=64, maximum=99)
    with pytest.raises(SpecError, match=told):
        search(enum=[64, 256])


def test_bad_ranges_of_other_options() -> None:
    added = {"automl_hyperparameters": [f"+{SCHEDULER}", f"+{BATCH}"]}
    told = fail(custom_param_ranges={SCHEDULER: {"valid_options": ["Cosinus"]}}, **added)
    assert "the choice 'Cosinus', expected one of AutoReduce" in told
    assert "bounds, expected valid_options" in fail(custom_param_ranges={SCHEDULER: {"valid_max": 2}}, **added)
    assert "a range that holds a value" in fail(custom_param_ranges={BATCH: {"valid_min": 5, "valid_max": 7}}, **added)
    assert "at least 1, or -1" in fail(f"{CHOOSE}=true", custom_param_ranges={WINDOW: {"valid_min": 0}})


def test_a_bound_at_a_special_value_keeps_it() -> None:
    search = find(build(custom_param_ranges={CLIP: {"valid_min": 0, "valid_max": 9}}), CLIP).search
    assert (search.low, search.high, search.specials) == (0.1, 9, (0.0,))
    search = find(build(custom_param_ranges={CLIP: {"valid_min": 1}}), CLIP).search
    assert (search.low, search.high, search.specials) == (1, 50, ())


def test_our_ranges_reach_to_the_value_of_the_spec() -> None:
    space = build(f"{LR}=2.0", f"{DROPOUT}=0.9", f"{SCHEDULER}=AutoReduce", f"{PATIENCE}=30")
    assert (find(space, LR).search.high, find(space, LR).search.low) == (2.0, 1e-4)
    assert find(space, DROPOUT).search.high == 0.9
    assert find(space, PATIENCE).search.high == 30
    assert space.holds(space.defaults)


def test_a_value_outside_of_an_own_range_belongs_to_trial_0_alone() -> None:
    space = build(custom_param_ranges={LR: {"valid_min": 0.001, "valid_max": 0.01}})
    assert draw(space, 0)[LR] == 0.1
    assert "only trial 0 has 0.1" in find(space, LR).note
    assert not space.holds(space.defaults)
    assert LR not in space.encode(space.defaults)
    assert all(0.001 <= draw(space, number)[LR] <= 0.01 for number in range(1, 50))
    space = build(f"{BATCH}=20", automl_hyperparameters=["+batch_size"])
    assert "only trial 0 has 20" in find(space, BATCH).note
    assert {draw(space, number)[BATCH] for number in range(1, 100)} == {4, 8, 16, 32, 64, 128}


def test_momentum_without_nesterov_may_be_0() -> None:
    space = build(f"{NESTEROV}=false", custom_param_ranges={MOMENTUM: {"valid_min": 0}})
    assert find(space, MOMENTUM).search.low == 0
    told = fail(
        f"{NESTEROV}=false",
        custom_param_ranges={MOMENTUM: {"valid_min": 0}},
        automl_hyperparameters=[f"+{NESTEROV}"],
    )
    assert "values above 0, while train.optim.nesterov may be on" in told
    adam = f"{OPTIMIZER}=torch.optim.Adam"
    space = build(adam, f"{MOMENTUM}=0", automl_hyperparameters=[f"+{OPTIMIZER}"])
    assert find(space, MOMENTUM).search.low == 0.5
    told = fail(adam, f"{MOMENTUM}=0", automl_hyperparameters=[f"+{OPTIMIZER}"], automl_fixed=[MOMENTUM])
    assert "0 among its values" in told


def test_numbers_are_uniform_on_their_scale() -> None:
    space = build()
    rows = [draw(space, number) for number in range(1, 1001)]
    logs = np.sort([math.log10(row[LR]) for row in rows])
    expected = np.linspace(-4, math.log10(0.5), len(logs))
    assert np.abs(logs - expected).max() < 0.15
    drops = np.sort([row[DROPOUT] for row in rows])
    assert np.abs(drops - np.linspace(0, 0.8, len(drops))).max() < 0.04
    assert 0.45 < np.mean([row[CLIP] == 0 for row in rows]) < 0.55


def make_space(*dimensions: Dimension, **fixed: Any) -> SearchSpace:
    return SearchSpace(dimensions, {key.replace("__", "."): value for key, value in fixed.items()})


def test_weights_of_choices() -> None:
    space = make_space(Dimension("a", SearchRange(choices=("x", "y", "z"), weights=(1.0, 2.0, 5.0)), "x"))
    drawn = [draw(space, number)["a"] for number in range(1, 801)]
    assert [drawn.count(choice) / 800 for choice in "xyz"] == pytest.approx([0.125, 0.25, 0.625], abs=0.05)
    for choice in "xyz":
        assert space.suggest(FixedTrial(space.encode({"a": choice}))) == {"a": choice}
    assert find(space, "a").describe_range() == "x (12%), y (25%), z (62%)"


@pytest.mark.parametrize("is_integer", [True, False])
@pytest.mark.parametrize("log", [True, False])
def test_an_option_above_another(is_integer: bool, log: bool) -> None:
    lower = Dimension("a", SearchRange(1, 9), 2, is_integer=True)
    upper = Dimension("b", SearchRange(1, 10, above="a", log=log), 5, is_integer=is_integer)
    space = make_space(lower, upper)
    drawn = [draw(space, number) for number in range(1, 1501)]
    assert len(drawn) == 1500
    for values in drawn:
        assert values["a"] < values["b"] <= 10
        assert space.holds(values)
        assert space.suggest(FixedTrial(space.encode(values))) == values
    if is_integer and not log:
        counts = [sum(values == {"a": 7, "b": high} for values in drawn) for high in (8, 9, 10)]
        assert min(counts) > 30, "the room above is filled evenly"
    assert not space.holds({"a": 5, "b": 5})
    assert draw(make_space(replace(upper, is_integer=True), a=9), 3) == {"b": 10}


def test_the_room_above_another_is_filled_evenly() -> None:
    for log, ends in ((False, (5, 10)), (True, (math.log(5), math.log(10)))):
        upper = Dimension("b", SearchRange(1, 10, above="a", log=log), 7.0)
        drawn = [draw(make_space(upper, a=5), number)["b"] for number in range(1, 501)]
        counts, _ = np.histogram(np.log(drawn) if log else drawn, bins=4, range=ends)
        assert counts.sum() == 500
        assert counts.min() > 60


def test_whole_numbers_are_equally_likely() -> None:
    space = make_space(Dimension("a", SearchRange(1, 4), 2, is_integer=True))
    drawn = [draw(space, number)["a"] for number in range(1, 801)]
    assert [drawn.count(number) / 800 for number in (1, 2, 3, 4)] == pytest.approx([0.25] * 4, abs=0.05)


def test_conditions_reach_through() -> None:
    """What depends on an option without effect has none, whatever value that option might have had."""
    flags = (False, True)
    space = make_space(
        Dimension("a", SearchRange(choices=flags), True),
        Dimension("b", SearchRange(choices=flags, when={"a": (True,)}), True),
        Dimension("c", SearchRange(choices=flags, when={"b": flags}), True),
    )
    drawn = [draw(space, number) for number in range(1, 40)]
    assert {frozenset(values) for values in drawn} == {frozenset("a"), frozenset("abc")}
    assert space.defaults == {"a": True, "b": True, "c": True}
    assert not space.holds({"a": False, "b": True})


def test_steps_and_powers() -> None:
    space = make_space(
        Dimension("step", SearchRange(8, 41, step=8), 16, is_integer=True),
        Dimension("tenth", SearchRange(0.0, 0.5, step=0.1), 0.3),
        Dimension("power", SearchRange(3, 100, powers_of=3), 9, is_integer=True),
        Dimension("half", SearchRange(0.25, 3, powers_of=2), 0.5),
    )
    drawn = [draw(space, number) for number in range(1, 400)]
    assert {values["step"] for values in drawn} == {8, 16, 24, 32, 40}
    assert {values["tenth"] for values in drawn} == {0.0, 0.1, 0.2, 0.3, 0.4, 0.5}
    assert {values["power"] for values in drawn} == {3, 9, 27, 81}
    assert {values["half"] for values in drawn} == {0.25, 0.5, 1.0, 2.0}
    assert all(space.suggest(FixedTrial(space.encode(values))) == values for values in drawn)
    assert not space.holds(drawn[0] | {"step": 12})


def test_the_description_is_plain_data() -> None:
    rows = build(f"{LR}=0.2", automl_hyperparameters=[f"+{SCHEDULER}", f"+{BATCH}"]).describe()
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    by_key = {row["key"]: row for row in rows}
    assert by_key[LR]["range"] == "0.0001..0.5 (log)"
    assert (by_key[LR]["spec_value"], by_key[LR]["origin"]) == (0.2, "override")
    assert by_key[BATCH]["range"] == "4..128, powers of 2"
    assert by_key[CLIP]["range"] == "0.1..50 (log) or 0"
    assert by_key[SCHEDULER]["range"] == "AutoReduce, MultiStep, Cosine"
    assert by_key[PATIENCE]["when"] == {SCHEDULER: ["AutoReduce"]}
    order = [row["key"] for row in rows]
    assert order.index(SCHEDULER) < min(order.index(PATIENCE), order.index(DECAY))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    overrides = [f"results_dir={folder}/results"]
    for part in ("train", "val"):
        for kind, name in (("data", f"{part}.npy"), ("label", f"{part}.json")):
            (folder / name).touch()
            overrides.append(f"dataset.{part}_dataset.{kind}_path={folder / name}")
    return overrides


SPEC_VALUES = {
    OPTIMIZER: st.sampled_from(["torch.optim.SGD", "torch.optim.Adam"]),
    SCHEDULER: st.sampled_from(["MultiStep", "AutoReduce", "Cosine"]),
    NESTEROV: st.booleans(),
    MOMENTUM: st.sampled_from([0.0, 0.3, 0.9, 0.999]),
    CHOOSE: st.booleans(),
    WINDOW: st.sampled_from([-1, 1, 20, 500]),
    LR: st.sampled_from([0.0, 1e-6, 0.1, 3.0]),
    WEIGHT_DECAY: st.sampled_from([0.0, 1e-4, 0.5]),
    BATCH: st.sampled_from([1, 3, 16, 500]),
    "train.optim.warmup_epochs": st.sampled_from([0, 3, 40]),
    "model.input_channels": st.sampled_from([1, 3]),
}


def test_finite_spaces_are_counted() -> None:
    flags = (False, True)
    space = make_space(
        Dimension("a", SearchRange(choices=flags), True),
        Dimension("b", SearchRange(1, 3, specials=(-1, 2), when={"a": (True,)}), 1, is_integer=True),
        Dimension("c", SearchRange(0.0, 0.2, step=0.1), 0.0),
        Dimension("d", SearchRange(2, 16, powers_of=2, above="b"), 8, is_integer=True),
        Dimension("e", SearchRange(0.7, 0.7), 0.7),
    )
    # without b 4 values of d stand above it; with b = -1 and 1 four, with 2 and 3 three and three
    assert space.count_values() == 3 * (4 + 4 + 4 + 3 + 3)
    listed = space.find_untried([])
    assert listed is not None
    assert len({json.dumps(values, sort_keys=True) for values in listed}) == len(listed) == 54
    assert all(space.holds(values) for values in listed)
    assert all(draw(space, number) in listed for number in range(1, 60))
    assert space.find_untried(listed[1:]) == listed[:1]
    assert not space.is_used_up(listed[1:])
    assert space.is_used_up([{"a": True}, *reversed(listed)])
    assert space.is_used_up([json.loads(json.dumps(values)) for values in listed])


def test_spaces_without_end_are_never_used_up() -> None:
    numbers = build()
    assert numbers.count_values() is None
    assert numbers.find_untried([]) is None
    assert not numbers.is_used_up([numbers.defaults])
    many = make_space(
        Dimension("a", SearchRange(1, 10**9), 1, is_integer=True),
        Dimension("b", SearchRange(1, 10**9, above="a"), 2, is_integer=True),
    )
    assert many.count_values() == 10**18, "an upper bound"
    assert many.find_untried([]) is None
    assert not many.is_used_up([{"a": 1, "b": 2}])


def test_dotted_keys_are_nested_in_one_way() -> None:
    expected = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert config_source.nest({"a.b": 1, "a.c.d": 2, "e": 3}) == expected
    assert config_source.parse_overrides(["a.b=1", "a.c=0", "a.c.d=2", "e=3"], {}) == expected
    config_source.set_value(expected, "a", 4)
    config_source.set_value(expected, "e.f", 5)
    assert expected == {"a": 4, "e": {"f": 5}}
    assert build_trial_spec({"model": 1}, {DROPOUT: 0.5}, Path("x"), num_epochs=1)["model"] == {"dropout": 0.5}


@settings(max_examples=25, deadline=None)
@given(
    chosen=st.fixed_dictionaries({}, optional=SPEC_VALUES),
    added=st.lists(st.sampled_from(EXTRAS), unique=True),
    seed=st.integers(0, 2**32),
    num_frames=st.integers(1, 400),
    num_clips=st.integers(1, 400) | st.none(),
)
@example(chosen={MOMENTUM: 0.0, NESTEROV: False}, added=[NESTEROV, OPTIMIZER], seed=0, num_frames=30, num_clips=9)
@example(chosen={MOMENTUM: 0.0, OPTIMIZER: "torch.optim.Adam"}, added=EXTRAS, seed=1, num_frames=30, num_clips=3)
def test_every_trial_is_a_valid_spec_and_comes_back(
    files: list[str], chosen: dict[str, Any], added: list[str], seed: int, num_frames: int, num_clips: int | None
) -> None:
    overrides = [f"{key}={value}" for key, value in chosen.items()] + files
    try:
        loaded = read_spec({"automl": {"automl_hyperparameters": [f"+{key}" for key in added]}}, overrides, "automl")
    except SpecError:
        assume(False)  # Nesterov's momentum without momentum
    space = build_space(loaded.values, loaded.origins, num_frames, num_clips=num_clips)
    base = build_base(loaded.values, loaded.origins)
    for number in range(3):
        values = draw(space, number, seed)
        if space.holds(values):
            assert space.suggest(FixedTrial(space.encode(values))) == values
            assert set(space.encode(values)) <= set(space.distributions)
        else:
            assert number == 0
        trained = read_spec(build_trial_spec(base, values, Path("out"), num_epochs=3), action="train").values
        for key, value in values.items():
            group: Any = trained
            for part in key.split("."):
                group = getattr(group, part)
            assert group == value
            assert type(group) is type(value)


def leaf(**entries: Any) -> dict[str, Any]:
    return {"type": "float", "default": 0, **entries}


def nest(leaves: dict[str, dict[str, Any]], **root: Any) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object", "properties": {}, **root}
    for key, content in leaves.items():
        node = schema
        *parents, last = key.split(".")
        for part in parents:
            node = node["properties"].setdefault(part, {"type": "object", "properties": {}})
        node["properties"][last] = content
    return schema


def build_from(leaves: dict[str, dict[str, Any]], *overrides: str, **automl: Any) -> SearchSpace:
    return build(*overrides, schema=nest(leaves, automl_default_parameters=list(leaves)), **automl)


def test_a_schema_of_the_original() -> None:
    """Infinite and merely valid bounds give way to ours; unknown and disabled options are told and not searched."""
    leaves = {
        LR: leaf(minimum=0.0, maximum=math.inf, automl_enabled="TRUE"),
        MOMENTUM: leaf(minimum=0.0, maximum=math.inf, automl_enabled=True),
        DROPOUT: leaf(minimum=0.2, maximum=0.6, automl_enabled=True),
        "train.optim.other": leaf(minimum=0, maximum=1, automl_enabled=True),
        "train.num_epochs": leaf(minimum=1, maximum=math.inf, automl_enabled=True),
        WEIGHT_DECAY: leaf(minimum=0, maximum=math.inf, automl_enabled=True),
        DECAY: leaf(minimum=0, maximum="inf", automl_enabled=False),
    }
    space = build(schema=nest(leaves, automl_disabled_parameters=[WEIGHT_DECAY, "train.optim"]))
    assert name_keys(space) == {LR, MOMENTUM, DROPOUT}
    assert find(space, LR).search == OPTIONS[LR].extra["search"]
    assert find(space, MOMENTUM).search.low == 0.5
    assert (find(space, DROPOUT).search.low, find(space, DROPOUT).search.high) == (0.2, 0.6)
    assert len(space.notes) == 3
    for note, key in zip(space.notes, ["train.optim.other", WEIGHT_DECAY, "train.num_epochs"], strict=True):
        assert key in note


def test_conditions_of_a_schema() -> None:
    leaves = {
        BATCH: {"type": "int", "minimum": 4, "maximum": 64, "math_cond": "/ 8"},
        SCHEDULER: {"type": "categorical", "enum": ["Cosine", "MultiStep", "Step"], "option_weights": [3, 1, 9]},
        PATIENCE: {"type": "int", "minimum": 1, "maximum": 9, "depends_on": NESTEROV, "depends_on_values": [False]},
        NESTEROV: {"type": "bool"},
        "train.optim.warmup_epochs": {"type": "int", "math_cond": "> depends_on", "depends_on": PATIENCE},
        DROPOUT: leaf(minimum=0.0, maximum=1.0, math_cond="> 0.0"),
        "train.optim.min_lr": leaf(enum=[1e-5, 1e-3]),
    }
    leaves["train.optim.warmup_epochs"] |= {"automl_minimum": 0, "automl_maximum": 20}
    space = build_from(leaves, f"{SCHEDULER}=AutoReduce")
    assert find(space, SCHEDULER).search.choices == ("Cosine", "MultiStep")
    assert find(space, SCHEDULER).search.weights == (3.0, 1.0)
    drawn = [draw(space, number) for number in range(1, 301)]
    assert {values[BATCH] for values in drawn} == {8, 16, 24, 32, 40, 48, 56, 64}
    assert 0.65 < np.mean([values[SCHEDULER] == "Cosine" for values in drawn]) < 0.85
    assert {values.get("train.optim.min_lr") for values in drawn} == {1e-5, 1e-3, None}
    assert all(0 < values[DROPOUT] <= 0.8 for values in drawn)
    assert not any(PATIENCE in values for values in drawn), "AutoReduce is not among the schema's choices"
    space = build_from({key: leaves[key] for key in leaves if key != SCHEDULER}, f"{SCHEDULER}=AutoReduce")
    drawn = [draw(space, number) for number in range(1, 301)]
    assert all((PATIENCE in values) == (not values[NESTEROV]) for values in drawn)
    with_patience = [values for values in drawn if PATIENCE in values]
    assert len(with_patience) > 50
    assert all(values["train.optim.warmup_epochs"] > values[PATIENCE] for values in with_patience)


def test_our_own_schema_gives_our_own_space() -> None:
    schema = build_tao_schema("train")
    for overrides in ([], [f"{CHOOSE}=true", f"{SCHEDULER}=AutoReduce"]):
        asked = {"automl_hyperparameters": [f"+{key}" for key in EXTRAS]} if overrides else {}
        own = build(*overrides, **asked)
        read = build(*overrides, schema=schema, **asked)
        assert {entry.key: entry for entry in read.dimensions} == {entry.key: entry for entry in own.dimensions}
        assert (read.left_out, read.notes) == (own.left_out, ())


def test_a_schema_with_nothing_of_our_range() -> None:
    space = build_from({DROPOUT: leaf(minimum=0.85, maximum=0.95), LR: leaf(maximum=math.inf)})
    assert all(0.5 <= draw(space, number)[DROPOUT] <= 0.95 for number in range(1, 20))
    search = find(build_from({DROPOUT: leaf(minimum=0.85, maximum=0.95)}, f"{DROPOUT}=0.9"), DROPOUT).search
    assert (search.low, search.high) == (0.85, 0.95)


def test_powers_in_a_schema() -> None:
    space = build_from({BATCH: {"type": "int", "minimum": 3, "maximum": 40, "math_cond": "^ 2"}})
    assert {draw(space, number)[BATCH] for number in range(1, 60)} == {4, 8, 16, 32}


BAD_LEAVES: dict[str, dict[str, Any]] = {
    "one of": {"math_cond": "% 3"},
    "math_cond '^ x'": {"math_cond": "^ x"},
    "minimum 'low'": {"minimum": "low"},
    "option_weights [1]": {"enum": [0.1, 0.2], "option_weights": [1]},
    "option_weights that are all 0": {"enum": [0.1, 0.2], "option_weights": [0, 0]},
    "the choices ['a']": {"enum": ["a"]},
    "0.6 to None": {"minimum": 0.6, "maximum": math.inf},
    "at least 0": {"automl_minimum": -3, "automl_log": False},
    "math_cond '/ 1e-300'": {"math_cond": "/ 1e-300"},
    "at most 1e+09 steps": {"math_cond": "/ 0.01", "automl_maximum": 1e200},
    "maximum 1000000": {"maximum": 10**400},
    "automl_specials 0": {"automl_minimum": 1, "automl_specials": 0},
    "the special value -5.0, expected at least 0": {"automl_minimum": 0.1, "automl_specials": [0, -5.0]},
    "depends_on_values [['a']], expected numbers, texts": {"depends_on": NESTEROV, "depends_on_values": [["a"]]},
    "depends_on_values [{}], expected numbers, texts": {"depends_on_values": {NESTEROV: [{}]}},
    "the condition on 'train.oops'": {"math_cond": "> depends_on", "depends_on": "train.oops"},
    f"expected values above those of {LR}": {"math_cond": "> depends_on", "depends_on": LR},
    "expected values above those of train.gpu_ids": {"math_cond": "> depends_on", "depends_on": "train.gpu_ids"},
}


@pytest.mark.parametrize("told", BAD_LEAVES)
def test_bad_leaves_of_a_schema(told: str) -> None:
    with pytest.raises(SpecError) as caught:
        build_from({LR: leaf(**BAD_LEAVES[told])})
    assert told in str(caught.value)


def test_special_values_of_whole_numbers_are_whole() -> None:
    leaves = {BATCH: {"automl_minimum": 4, "automl_specials": [1.5]}}
    with pytest.raises(SpecError, match=r"special value 1\.5, expected a whole number"):
        build_from(leaves)
    leaves[BATCH]["automl_specials"] = [1.0, 1]
    specials = find(build_from(leaves), BATCH).search.specials
    assert [(special, type(special)) for special in specials] == [(1, int)]


def test_options_of_a_schema_that_wait_for_each_other() -> None:
    with pytest.raises(SpecError, match="conditions in a circle"):
        build_from(
            {
                LR: leaf(depends_on=NESTEROV, depends_on_values=[True]),
                NESTEROV: {"type": "bool", "depends_on": LR, "depends_on_values": [0.1]},
            }
        )


def test_own_ranges_mend_a_schema() -> None:
    space = build_from({LR: leaf(minimum="low")}, custom_param_ranges={LR: {"valid_max": 0.2}})
    assert find(space, LR).search.high == 0.2


def test_schema_files(tmp_path: Path) -> None:
    path = tmp_path / "train.schema.json"
    schema = nest({LR: leaf(minimum=0, maximum=math.inf)}, automl_default_parameters=[LR])
    path.write_text(json.dumps(schema))
    assert "Infinity" in path.read_text()
    assert name_keys(build(f"automl.schema_path={path}")) == {LR}
    for text, told in {"{": "not JSON", "[]": "no properties", "[" * 100_000: "nested too deeply"}.items():
        path.write_text(text)
        with pytest.raises(SpecError, match=told):
            read_schema(str(path))
