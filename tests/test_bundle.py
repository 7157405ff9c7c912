"""Skill bundles of anybody: what is read, what is told, and that nothing hostile gets through."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from kinegraph.bundle import MAX_FILE_BYTES, BundleReport, check_bundle
from kinegraph.errors import UserError

ACTIONS = ("train", "evaluate")
SKILL = (
    "---\nname: train-something\ndescription: >\n  Trains\n  something.\nmetadata: {version: 1}\n---\n\n# Something\n"
)
LEARNING_RATE = {"type": "float", "default": 0.1, "minimum": 0.0, "maximum": 1.0, "automl_enabled": True}


def make_schema(section: str) -> dict[str, Any]:
    """In the form of the original: a list of names stands among the properties, and a group may hold any key."""
    options = {
        "lr": LEARNING_RATE,
        "kind": {"type": "categorical", "enum": ["a", "b"], "option_weights": [0.2, 0.8], "default": "a"},
        "map": {"type": "collection"},
    }
    group = {"type": "collection", "properties": options, "automl_disabled_parameters": [f"{section}.map"]}
    return {
        "type": "object",
        "properties": {"automl_disabled_parameters": [section], section: group, "results_dir": {"type": "string"}},
        "automl_default_parameters": [f"{section}.lr"],
        "default": {section: {"lr": 0.1}},
    }


def write_bundle(folder: Path, actions: tuple[str, ...] = ACTIONS) -> Path:
    """A whole bundle, by hand."""
    (folder / "references").mkdir(parents=True)
    (folder / "schemas").mkdir()
    (folder / "SKILL.md").write_text(SKILL)
    info: dict[str, Any] = {"name": "train-something", "automl_enabled": True, "actions": {}, "spec_templates": {}}
    manifest: dict[str, Any] = {"schema_version": 1, "automl_enabled": True, "failures": {}, "actions": {}}
    for action in actions:
        template = f"references/spec_template_{action}.yaml"
        info["actions"][action] = {"command": f"run {action} -e {{config_path}}"}
        info["spec_templates"][action] = f"../{template}"
        manifest["actions"][action] = {"path": f"schemas/{action}.schema.json", "spec_template": template}
        (folder / template).write_text(f"results_dir: ???\n{action}: {{lr: 0.1, map: {{any: 1}}}}\n")
        (folder / f"schemas/{action}.schema.json").write_text(json.dumps(make_schema(action)))
    (folder / "references/skill_info.yaml").write_text(yaml.safe_dump(info, sort_keys=False))
    (folder / "schemas/manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle")


def change_json(path: Path, change: Callable[[Any], Any]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def list_places(report: BundleReport) -> list[str]:
    return [problem.where for problem in report.problems]


def test_a_whole_bundle(bundle: Path) -> None:
    report = check_bundle(bundle)
    assert (report.problems, report.missing, report.notices) == ((), (), ())
    assert report.name == "train-something"
    assert report.actions == ACTIONS
    assert len(report.parsed) == 7
    assert report.automl_enabled and report.automl_runnable and report.not_runnable == ""
    assert json.loads(json.dumps(report.as_data()))["automl_runnable"] is True


def test_the_repository_of_the_original_has_no_schemas(tmp_path: Path) -> None:
    """There, a bundle is SKILL.md and skill_info.yaml until its maintainers generate the rest."""
    bundle = write_bundle(tmp_path / "bundle")
    for path in [*bundle.glob("schemas/*"), *bundle.glob("references/spec_template_*")]:
        path.unlink()
    report = check_bundle(bundle)
    assert report.automl_enabled and not report.automl_runnable
    assert report.not_runnable == "schemas/train.schema.json is missing; references/spec_template_train.yaml is missing"
    assert set(report.missing) == {
        "schemas/manifest.json",
        *(f"schemas/{action}.schema.json" for action in ACTIONS),
        *(f"references/spec_template_{action}.yaml" for action in ACTIONS),
    }
    assert set(report.missing) <= set(list_places(report))


def test_infinity_is_read_and_told(bundle: Path) -> None:
    path = bundle / "schemas/train.schema.json"
    text = path.read_text().replace('"maximum": 1.0', '"maximum": Infinity, "low": -Infinity, "odd": NaN, "big": 1e999')
    path.write_text(text)
    report = check_bundle(bundle)
    assert report.problems == () and report.automl_runnable
    assert report.notices == (
        "schemas/train.schema.json: 4 values that JSON does not have (-Infinity, 1e999, Infinity, NaN)",
    )


def test_an_empty_folder_and_no_folder(tmp_path: Path) -> None:
    report = check_bundle(tmp_path)
    assert not report.automl_enabled and not report.automl_runnable and report.parsed == ()
    assert {"SKILL.md", "references/skill_info.yaml", "schemas/manifest.json"} <= set(report.missing)
    assert "schemas/train.schema.json is missing" in report.not_runnable
    (tmp_path / "file").write_text("")
    for path, got in ((tmp_path / "none", "nothing"), (tmp_path / "file", "a file")):
        with pytest.raises(UserError, match=f"got {got}, expected the folder of a skill bundle"):
            check_bundle(path)


NEEDED = ("schemas/train.schema.json", "references/spec_template_train.yaml")


@pytest.mark.parametrize("name", NEEDED)
@pytest.mark.parametrize(
    "content",
    ["{", "[1, 2]", "\xff\xff", "a: b: c", "x" * (MAX_FILE_BYTES + 1)],
    ids=["cut", "list", "bytes", "text", "huge"],
)
def test_automl_needs_files_that_parse(bundle: Path, name: str, content: str) -> None:
    (bundle / name).write_bytes(content.encode("latin-1"))
    report = check_bundle(bundle)
    assert not report.automl_runnable
    assert report.not_runnable.startswith(f"{name} cannot be read: ")
    assert name in list_places(report) and name not in report.parsed
    assert len(report.parsed) == 6


def test_other_files_do_not_matter_for_automl(bundle: Path) -> None:
    (bundle / "schemas/evaluate.schema.json").write_text("{")
    (bundle / "schemas/more.json").write_text("nonsense")
    (bundle / "references/more.yaml").write_text("a: 1")
    report = check_bundle(bundle)
    assert report.automl_runnable
    assert list_places(report) == ["schemas/evaluate.schema.json", "schemas/more.json"]
    assert "references/more.yaml" in report.parsed


def test_automl_that_is_not_enabled(bundle: Path) -> None:
    info = bundle / "references/skill_info.yaml"
    info.write_text(info.read_text().replace("automl_enabled: true", "automl_enabled: false"))
    report = check_bundle(bundle)
    assert (report.automl_enabled, report.automl_runnable, report.not_runnable) == (False, False, "")
    assert list_places(report) == ["schemas/manifest.json: automl_enabled"]
    info.write_text(info.read_text().replace("automl_enabled: false", "automl_enabled: maybe"))
    assert "references/skill_info.yaml: automl_enabled" in list_places(check_bundle(bundle))


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("# Something\n", "SKILL.md"),
        ("", "SKILL.md"),
        ("---\nname: train-something\n", "SKILL.md"),
        ("---\nname: train-something\n---\n", "SKILL.md: description"),
        ("---\nname: ''\ndescription: a\n---\n", "SKILL.md: name"),
        ("---\n- a\n---\n", "SKILL.md: name"),
        ("---\nname: [\n---\n", "SKILL.md"),
        ("---\nname: !!python/object/apply:os.getcwd []\ndescription: a\n---\n", "SKILL.md"),
        ("---\na: &a {b: c}\nname: {<<: *a}\ndescription: a\n---\n", "SKILL.md"),
        ("---\nname: " + "[" * 5000 + "\n---\n", "SKILL.md"),
        ("---\nname: other\ndescription: a\n---\n", "references/skill_info.yaml: name"),
    ],
)
def test_front_matter(bundle: Path, text: str, place: str) -> None:
    (bundle / "SKILL.md").write_text(text)
    assert place in list_places(check_bundle(bundle))


def test_what_the_manifest_names_must_be_there(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "outside.json").write_text("{}")
    named = {"path": "schemas/other.json", "spec_template": "../outside.json"}

    def change(manifest: Any) -> None:
        manifest["actions"]["train"] = named
        manifest["actions"]["evaluate"]["path"] = None
        manifest["failures"] = {"export": "no dataclass"}

    change_json(bundle / "schemas/manifest.json", change)
    report = check_bundle(bundle)
    assert list_places(report) == [
        "schemas/manifest.json: train.path",
        "schemas/manifest.json: train.spec_template",
        "schemas/manifest.json: evaluate.path",
    ]
    assert len(report.notices) == 1 and "export" in report.notices[0]


def test_a_template_with_a_key_that_its_schema_does_not_know(bundle: Path) -> None:
    (bundle / "references/spec_template_train.yaml").write_text("train: {lr: 1, rl: 2, map: {x: {y: 1}}}\nother: 3\n")
    places = list_places(check_bundle(bundle))
    assert sorted(places) == [f"references/spec_template_train.yaml: {key}" for key in ("other", "train.rl")]


@pytest.mark.parametrize(
    ("node", "place"),
    [
        ({"enum": ["a", "b"], "option_weights": [1]}, "option_weights"),
        ({"enum": ["a", "b"], "option_weights": [1, -1]}, "option_weights"),
        ({"enum": ["a", "b"], "option_weights": [0, 0]}, "option_weights"),
        ({"enum": ["a", "b"], "option_weights": "ab"}, "option_weights"),
        ({"option_weights": [1]}, "option_weights"),
        ({"minimum": 2, "maximum": 1}, "minimum"),
    ],
)
def test_leaves(bundle: Path, node: dict[str, Any], place: str) -> None:
    def change(schema: Any) -> None:
        schema["properties"]["train"]["properties"]["kind"] = node

    change_json(bundle / "schemas/train.schema.json", change)
    assert list_places(check_bundle(bundle)) == [f"schemas/train.schema.json: train.kind: {place}"]


def test_default_parameters_must_be_options(bundle: Path) -> None:
    change_json(
        bundle / "schemas/train.schema.json", lambda schema: schema["automl_default_parameters"].append("train.x")
    )
    report = check_bundle(bundle)
    assert [str(problem) for problem in report.problems] == [
        "schemas/train.schema.json: automl_default_parameters: got 'train.x', "
        "expected the key of an option in this schema."
    ]


def test_nothing_outside_the_bundle_is_read(bundle: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.json"
    secret.write_text('{"key": "abc"}')
    path = bundle / "schemas/train.schema.json"
    path.unlink()
    path.symlink_to(secret)
    (bundle / "references/loop.yaml").symlink_to("loop.yaml")
    (bundle / "references/pipe.yaml").unlink(missing_ok=True)
    os.mkfifo(bundle / "references/pipe.yaml")
    (bundle / "schemas/folder.json").mkdir()
    (bundle / "schemas/far").symlink_to(tmp_path)
    report = check_bundle(bundle)
    assert report.not_runnable == "schemas/train.schema.json cannot be read: a link out of the bundle"
    reasons = {problem.where: problem.got for problem in report.problems}
    assert "secret.json" not in str(report) and "abc" not in str(report)
    assert reasons["references/pipe.yaml"] == "no regular file"
    assert "references/loop.yaml" in reasons


def test_names_of_actions_cannot_lead_out(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", ("train",))
    info = yaml.safe_load((bundle / "references/skill_info.yaml").read_text())
    info["actions"] |= {"../../x": {}, "a/b": {}, "": {}, 3: {}, "x" * 200: {}}
    (bundle / "references/skill_info.yaml").write_text(yaml.safe_dump(info, sort_keys=False))
    report = check_bundle(bundle)
    assert report.actions == ("train",)
    assert list_places(report).count("actions") == 5


BOMB = "a0: &a0 {k: 1}\n" + "".join(f"a{n}: &a{n} [" + ", ".join([f"*a{n - 1}"] * 9) + "]\n" for n in range(1, 12))
MERGES = "a0: &a0 {k: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 60))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("references/spec_template_train.yaml", BOMB),
        ("references/spec_template_train.yaml", MERGES),
        ("references/spec_template_train.yaml", "a: " + "[" * 100_000),
        ("references/spec_template_train.yaml", "a: !!python/object/apply:os.system [true]"),
        ("schemas/train.schema.json", '{"a": ' * 200_000),
        ("schemas/train.schema.json", "[" * 200_000 + "]" * 200_000),
        ("schemas/train.schema.json", '{"a": ' + "9" * 100_000 + "}"),
        ("SKILL.md", "---\nname: a\ndescription: b\n" + MERGES + "---\n"),
        ("references/skill_info.yaml", BOMB),
    ],
)
def test_hostile_files_are_told_and_cost_little(bundle: Path, name: str, text: str) -> None:
    (bundle / name).write_text(text)
    report = check_bundle(bundle)
    assert name in list_places(report)


def test_a_deep_schema_and_many_files_end(bundle: Path) -> None:
    node: dict[str, Any] = {"type": "int", "enum": [1], "option_weights": [1, 2]}
    for _ in range(200):
        node = {"type": "collection", "properties": {"x": node}}
    schema = {"type": "object", "properties": {"train": node}, "automl_default_parameters": []}
    (bundle / "schemas/train.schema.json").write_text(json.dumps(schema))
    for number in range(1100):
        (bundle / f"references/{number}.yaml").write_text("")
    report = check_bundle(bundle)
    assert len(report.parsed) <= 1010
    assert any("more than 1000 files" in notice for notice in report.notices)


@pytest.mark.parametrize("name", ["references/skill_info.yaml", "schemas/manifest.json"])
@pytest.mark.parametrize(
    "content", ['{"actions": 3}', '{"actions": {"train": 3}}', '{"actions": ["train"]}', '{"name": []}']
)
def test_odd_content_is_no_crash(bundle: Path, name: str, content: str) -> None:
    (bundle / name).write_text(content)
    assert check_bundle(bundle).problems


@pytest.mark.parametrize(
    ("properties", "reason"),
    [
        ({"x" * 201: {"type": "int"}}, "a property with a name over 200"),
        ({"x" * 100_000: {"properties": {str(n): {} for n in range(1000)}}}, "a property with a name over 200"),
        ({f"x{n}": {} for n in range(10_000)}, "more than 10000 properties"),
    ],
    ids=["long", "long group", "many"],
)
def test_schemas_that_would_grow_are_refused(bundle: Path, properties: dict[str, Any], reason: str) -> None:
    schema = {"type": "object", "properties": {"train": {"properties": properties}}}
    (bundle / "schemas/train.schema.json").write_text(json.dumps(schema))
    report = check_bundle(bundle)
    assert report.not_runnable.startswith(f"schemas/train.schema.json cannot be read: {reason}")
    assert list_places(report) == ["schemas/train.schema.json"]
    assert not report.automl_runnable and "schemas/train.schema.json" not in report.parsed


def test_long_keys_of_short_names_are_refused(bundle: Path) -> None:
    node: dict[str, Any] = {"type": "int"}
    for _ in range(6):
        node = {"properties": {"x" * 200: node}}
    (bundle / "schemas/train.schema.json").write_text(json.dumps(node))
    assert "a key over 1000 characters" in check_bundle(bundle).not_runnable


def test_the_largest_schema_is_read(bundle: Path) -> None:
    schema = {"properties": {f"x{n}" + "x" * 194: {} for n in range(10_000)}}
    (bundle / "schemas/train.schema.json").write_text(json.dumps(schema))
    assert check_bundle(bundle).not_runnable == ""


def test_a_long_name_that_a_template_repeats_is_cut(bundle: Path) -> None:
    groups = {f"g{n}": {"properties": {}} for n in range(500)}
    (bundle / "schemas/train.schema.json").write_text(json.dumps({"properties": groups}))
    text = f"g0: &a {{{'x' * 1000}: 1}}\n" + "".join(f"g{n}: *a\n" for n in range(1, 500))
    (bundle / "references/spec_template_train.yaml").write_text(text)
    places = [place for place in list_places(check_bundle(bundle)) if place.endswith("x")]
    assert len(places) == 500 and max(map(len, places)) < 300


def test_problems_are_limited(bundle: Path) -> None:
    defaults = [f"none{n}" for n in range(3000)]
    change_json(bundle / "schemas/train.schema.json", lambda schema: schema.update(automl_default_parameters=defaults))
    report = check_bundle(bundle)
    assert len(report.problems) == 1000
    assert report.notices == ("more than 1000 problems: the others are not told",)


def test_a_bundle_is_read_up_to_32_megabytes(bundle: Path) -> None:
    for number in range(10):
        (bundle / f"schemas/more{number}.json").write_text("{}" + " " * 3_900_000)
    report = check_bundle(bundle)
    assert list_places(report) == ["schemas/more8.json", "schemas/more9.json"]
    assert {problem.got for problem in report.problems} == {"a file with which the bundle is over 32 MB"}


def test_the_content_of_other_files_is_not_kept(bundle: Path) -> None:
    for number in range(12):
        (bundle / f"schemas/more{number}.json").write_text('{"a": [' + "[]," * 40_000 + "0]}")  # 2.5 MB in memory
    tracemalloc.start()
    try:
        report = check_bundle(bundle)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(report.parsed) == 19
    assert peak < 15e6


def test_huge_numbers_in_a_schema_are_no_crash(bundle: Path) -> None:
    node = {"enum": ["a", "b"], "option_weights": [10**400, 0.5], "minimum": 0.5, "maximum": 10**400}
    change_json(
        bundle / "schemas/train.schema.json",
        lambda schema: schema["properties"]["train"]["properties"].update(kind=node),
    )
    assert check_bundle(bundle).problems == ()
