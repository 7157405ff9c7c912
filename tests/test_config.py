"""The generic loader on small spec classes of its own: merging, references, limits, errors, schema, templates."""

from __future__ import annotations

import json
import traceback
from pathlib import Path, PurePath
from typing import Any, Literal

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic.dataclasses import dataclass

from kinegraph import remote
from kinegraph.config import (
    SPEC_CONFIG,
    LoadedSpec,
    SearchRange,
    find_changes,
    get_value,
    group,
    list_groups,
    list_options,
    load_spec,
    option,
)
from kinegraph.config_source import MAX_FILE_BYTES, merge, parse_overrides, read_source
from kinegraph.errors import SpecError
from kinegraph.templates import build_json_schema, write_template


@dataclass(config=SPEC_CONFIG)
class InnerSpec:
    rate: float = option(0.5, "a rate", minimum=0, maximum=1)
    steps: list[int] = option([1, 2], "some steps")
    mode: Literal["fast", "slow", "32"] = option("fast", "how")


@dataclass(config=SPEC_CONFIG)
class OuterSpec:
    name: str = option("plain", "a name")
    secret: str = option("", "a secret", secret=True)
    count: int = option(3, "a count", minimum=1)
    flag: bool = option(False, "a flag")
    weights: dict[str, int] | None = option(None, "weights by name")
    needed: str = option("???", "something needed", path="input")
    inner: InnerSpec = group(InnerSpec, "the inner group")


def load(source: Any = None, *overrides: str) -> LoadedSpec[OuterSpec]:
    return load_spec(OuterSpec, source, overrides, {"rate": "inner.rate"})


def fail(source: Any = None, *overrides: str) -> list[str]:
    with pytest.raises(SpecError) as caught:
        load(source, *overrides)
    return [str(problem) for problem in caught.value.problems]


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "spec.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_merge_order_and_origins(tmp_path: Path) -> None:
    path = write(tmp_path, "count: 5\ninner: {rate: 0.25, mode: slow}\nweights: {a: 1}\n")
    loaded = load(path, "rate=0.75", "weights.b=2")
    assert loaded.values == OuterSpec(
        count=5, weights={"a": 1, "b": 2}, inner=InnerSpec(rate=0.75, mode="slow", steps=[1, 2])
    )
    assert loaded.origins["count"] == "file"
    assert loaded.origins["inner.mode"] == "file"
    assert loaded.origins["inner.rate"] == "override"
    assert loaded.origins["weights.a"] == "file"
    assert loaded.origins["weights.b"] == "override"
    assert {"inner", "weights"} <= set(loaded.origins)
    assert not {"name", "inner.steps", "secret"} & set(loaded.origins)
    assert find_changes(loaded) == {
        "count": 5,
        "weights": {"a": 1, "b": 2},
        "inner.rate": 0.75,
        "inner.mode": "slow",
    }


def test_lists_are_replaced_and_later_overrides_win() -> None:
    assert load({"inner": {"steps": [7, 8, 9]}}, "inner.steps=[4]").values.inner.steps == [4]
    assert load(None, "count=4", "count=6").values.count == 6


@pytest.mark.parametrize(
    ("text", "key", "expected"),
    [
        ("inner.steps=[10,60]", "inner.steps", [10, 60]),
        ("weights.walking=4", "weights", {"walking": 4}),
        ("inner.rate=1e-4", "inner.rate", 1e-4),
        ("inner.rate=1E-4", "inner.rate", 1e-4),
        ("inner.rate=.5", "inner.rate", 0.5),
        ("inner.rate=1", "inner.rate", 1.0),
        ("count='7'", "count", 7),
        ("count=010", "count", 10),
        ("flag=yes", "flag", True),
        ("flag=False", "flag", False),
        ("name=a=b", "name", "a=b"),
        ("name=12:30", "name", "12:30"),
        ("name=2024-01-02", "name", "2024-01-02"),
        ("name=7", "name", "7"),
        ("name=", "name", "plain"),
        ("inner.mode=32", "inner.mode", "32"),
        (" count = 8", "count", 8),
        ("inner={rate: 0.1, steps: []}", "inner", InnerSpec(rate=0.1, steps=[])),
    ],
)
def test_override_values_are_yaml(text: str, key: str, expected: Any) -> None:
    assert get_value(load(None, text).values, key) == expected


def test_null_means_not_set() -> None:
    loaded = load({"count": None, "inner": None, "weights": {"a": 1}}, "weights=null", "inner.rate=0.1")
    assert loaded.values == OuterSpec(inner=InnerSpec(rate=0.1))
    assert not {"count", "weights", "weights.a"} & set(loaded.origins)
    assert loaded.origins["inner.rate"] == "override"


def test_question_marks_are_remembered_and_leave_the_default() -> None:
    loaded = load({"count": "???", "name": "???", "inner": "???"})
    assert loaded.values == OuterSpec()
    assert loaded.missing == {"count", "name", "inner", "needed"}
    assert not {"count", "name", "inner"} & set(loaded.origins)
    assert load({"needed": "x", "count": "???"}, "count=2").missing == frozenset()


def test_references() -> None:
    source = {"name": "runs", "needed": "${name}/a-${count}", "weights": {"a": "${count}", "b": "${.a}"}}
    loaded = load({**source, "inner": {"rate": "${inner.mode}", "mode": "fast"}}, "inner.rate=${..count}", "count=1")
    assert loaded.values.needed == "runs/a-1"
    assert loaded.values.weights == {"a": 1, "b": 1}
    assert loaded.values.inner.rate == 1.0
    assert load({"name": "${needed}", "needed": "${inner.mode}"}).values.name == "fast"


@pytest.mark.parametrize("unset", [None, "", "???"])
def test_text_around_something_unset_is_unset(unset: str | None) -> None:
    """A path below an empty results folder would be a path below the root of the disk."""

    @dataclass(config=SPEC_CONFIG)
    class PathSpec:
        folder: str = option("", "a folder")
        needed: str = option("???", "a file")

    loaded = load_spec(PathSpec, {"folder": unset, "needed": "${folder}/x"})
    assert "needed" in loaded.missing
    assert loaded.values.needed == "???"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("${oc.env:HOME}", "Resolvers are not run"),
        ("a ${env:HOME} b", "Resolvers are not run"),
        ("${nothing}", "does not exist"),
        ("${name.x}", "does not exist"),
        ("${name}", "leads back"),
        ("${needed}", "leads back"),
        ("${inner${count}}", "a reference in a reference"),
        ("${count", "without end"),
        ("${secret}", "secret"),
        ("x${inner}", "single value"),
        ("${}", "does not exist"),
    ],
)
def test_references_that_cannot_be_followed(value: str, reason: str) -> None:
    problems = fail({"name": value, "needed": "${name}", "secret": "my-key"})
    assert any(reason in problem for problem in problems), problems
    assert "my-key" not in "".join(problems)


def test_environment_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KINEGRAPH_TEST_SECRET", "do-not-show")
    for text in ("${oc.env:KINEGRAPH_TEST_SECRET}", "${env:KINEGRAPH_TEST_SECRET}", "$KINEGRAPH_TEST_SECRET"):
        try:
            assert "do-not-show" not in load({"name": text}).values.name
        except SpecError as error:
            assert "do-not-show" not in str(error)


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "count: 0\nflag: maybe\ninner: {rate: 2, mode: fats, stepps: []}\nnme: x\nname: [1]\n")
    problems = fail(path, "inner.steps=[1,x]", "weights.a=b")
    expected = [
        f"{path}: count: got 0, expected at least 1",
        f"{path}: flag: got 'maybe', expected true or false",
        f"{path}: inner.rate: got 2, expected at most 1",
        f"{path}: inner.mode: got 'fats', expected one of fast, slow, 32. Did you mean 'fast'?",
        f"{path}: inner.stepps: got the unknown key 'stepps', expected one of rate, steps, mode. Did you mean 'steps'?",
        f"{path}: nme: got the unknown key 'nme'",
        f"{path}: name: got [1], expected text",
        "override: inner.steps.1: got 'x', expected a whole number",
        "override: weights.a: got 'b', expected a whole number",
    ]
    for start in expected:
        assert any(problem.startswith(start) for problem in problems), (start, problems)
    assert len(problems) == len(expected)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ({"count": True}, "count: got 'true', expected a whole number"),
        ({"inner": {"rate": False}}, "inner.rate: got 'false', expected a number"),
        ({"count": 1.5}, "count: got 1.5, expected a whole number"),
        ({"inner": 5}, "inner: got 5, expected a group of options"),
        ({"inner": [1]}, "inner: got [1], expected a group of options"),
        ({"inner": {"rate": float("nan")}}, "inner.rate: got nan, expected a finite number"),
        ({"inner": {"rate": float("inf")}}, "inner.rate: got inf, expected a finite number"),
        ({"inner": {"steps": 3}}, "inner.steps: got 3, expected a list"),
        ({"weights": [1]}, "weights: got [1], expected a mapping"),
        ({"inner": {"count": 3}}, "Did you mean count?"),
        ({"secret": ["hidden"]}, "secret: got a value that is not shown, expected text"),
    ],
)
def test_wrong_types(source: dict[str, Any], expected: str) -> None:
    problems = fail(source)
    assert len(problems) == 1
    assert expected in problems[0]
    assert "hidden" not in problems[0]


def test_long_values_are_cut() -> None:
    assert all(len(problem) < 400 for problem in fail({"count": "9" * 100_000, "x" * 100_000: 1}))


def test_python_values_in_a_mapping() -> None:
    loaded = load({"name": PurePath("a/b"), "inner": {"steps": (1, 2)}})
    assert loaded.values.name == str(PurePath("a/b"))
    assert loaded.values.inner.steps == [1, 2]


@pytest.mark.parametrize(
    ("text", "hint"),
    [("spec.yaml", "Put -e before"), ("count", "key=value"), ("=3", "key=value"), (".=3", "key=value")],
)
def test_override_without_key_or_value(text: str, hint: str) -> None:
    assert hint in fail(None, text)[0]


def test_broken_overrides_are_told_together_without_their_values() -> None:
    problems = fail(None, "secret=[hidden", "name={a", "count=3")
    assert len(problems) == 2
    assert problems[0].startswith("override: secret:")
    assert problems[1].startswith("override: name:")
    assert "hidden" not in "".join(problems)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("count: 3\nname: [hidden\n", "line 3"),
        ("count: 3\nname: a\ncount: 4\n", "line 3: the key 'count' a second time"),
        ("inner: {rate: 0.1, rate: 0.2}", "the key 'rate' a second time"),
        ("name: &a [*a]", "aliases"),
        ("name: &a {x: *a}", "aliases"),
        ("name: !!python/object/apply:os.system [hidden]", "constructor"),
        ("name: !!python/name:os.system", "constructor"),
        ("a: 1\n---\nb: 2", "another document"),
        ("- 1\n- 2", "a mapping of options"),
        ("just text", "a mapping of options"),
        ("name: " + "[" * 5000, "nested too deeply"),
        (b"name: \xff\xfe", "not YAML"),
        (b"name: a\x00b", "not YAML"),
        ("name: !!int x", "not YAML"),
        ("name: !!timestamp x", "not YAML"),
        ("? [a, b]\n: 1", "unhashable"),
    ],
)
def test_text_that_is_no_spec(tmp_path: Path, text: str | bytes, reason: str) -> None:
    problems = fail(write(tmp_path, text))
    assert len(problems) == 1
    assert reason in problems[0]
    assert problems[0].startswith(str(tmp_path / "spec.yaml"))
    assert "hidden" not in problems[0]


def make_bomb(levels: int, mapping: bool = False) -> str:
    lines = ["a0: &a0 {x: 1, y: 2}" if mapping else "a0: &a0 [1, 1]"]
    for level in range(1, levels):
        before = f"*a{level - 1}"
        nested = f"{{<<: [{before}, {before}]}}" if mapping else f"[{', '.join([before] * 9)}]"
        lines.append(f"a{level}: &a{level} {nested}")
    return "\n".join(lines)


@pytest.mark.parametrize("text", [make_bomb(9), make_bomb(40, mapping=True)])
def test_yaml_bomb(tmp_path: Path, text: str) -> None:
    assert "aliases" in fail(write(tmp_path, text))[0]


def test_harmless_aliases_and_merge_keys(tmp_path: Path) -> None:
    text = "weights: &w {a: 1, b: 2}\ninner: &i {rate: 0.1}\n"
    assert load(write(tmp_path, text)).values.weights == {"a": 1, "b": 2}
    merged = "inner:\n  <<: &i {rate: 0.1, mode: slow}\n  mode: fast\n"
    assert load(write(tmp_path, merged)).values.inner == InnerSpec(rate=0.1, mode="fast")


@pytest.mark.parametrize("levels", [30, 400])
def test_references_that_grow(levels: int) -> None:
    """2 ** 30 copies of a text, and as many of a group: refused before they are made."""
    texts = {f"k{level}": "${.k%d}${.k%d}" % (level - 1, level - 1) for level in range(1, levels)}  # noqa: UP031
    assert fail({"weights": {"k0": "xxxxxxxxxx", **texts}})
    groups = {f"k{level}": {"x": "${k%d}" % (level - 1), "y": "${k%d}" % (level - 1)} for level in range(1, levels)}  # noqa: UP031
    assert fail({"k0": {"x": 1}, **groups})


def test_file_limits(tmp_path: Path) -> None:
    assert "over 1 MB" in fail(write(tmp_path, "# " + "x" * 2 * MAX_FILE_BYTES))[0]
    assert "over 1 MB" in fail("/dev/zero")[0]
    assert "No such file" in fail(tmp_path / "missing.yaml")[0]
    assert "directory" in fail(tmp_path)[0]
    assert fail("a\0b")
    assert load(write(tmp_path, "")).values == OuterSpec()


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text("ab", max_size=2),
    lambda children: st.dictionaries(st.sampled_from("xyz"), children, min_size=1, max_size=3),
    max_leaves=8,
)


def list_leaves(tree: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    if not isinstance(tree, dict):
        return {path: tree}
    return {key: value for name, child in tree.items() for key, value in list_leaves(child, (*path, name)).items()}


@given(PLAIN, PLAIN)
def test_merge_keeps_all_of_what_is_above_and_the_rest_of_what_is_below(below: Any, above: Any) -> None:
    merged = list_leaves(merge({"root": below}, {"root": above}))
    low, high = list_leaves({"root": below}), list_leaves({"root": above})
    for path, value in high.items():
        assert merged[path] == value
    for path, value in low.items():
        covered = any(path[: len(other)] == other[: len(path)] for other in high)
        assert covered or merged[path] == value
    assert set(merged) <= set(low) | set(high)
    assert merge({"root": below}, {}) == {"root": below}
    assert merge({"root": below}, {"root": below}) == {"root": below}


@given(st.dictionaries(st.sampled_from(["a.b", "a.c", "d", "e.f.g"]), st.integers(-(10**9), 10**9)))
def test_overrides_put_each_value_at_its_key(values: dict[str, int]) -> None:
    tree = parse_overrides([f"{key}={value}" for key, value in values.items()], {})
    for key, value in values.items():
        node: Any = tree
        for part in key.split("."):
            node = node[part]
        assert node == value


def test_options_and_groups_are_listed_in_order() -> None:
    assert [entry.key for entry in list_options(OuterSpec)] == [
        *("name", "secret", "count", "flag", "weights", "needed"),
        *("inner.rate", "inner.steps", "inner.mode"),
    ]
    assert list_groups(OuterSpec) == {"inner": "the inner group"}
    rate = next(entry for entry in list_options(OuterSpec) if entry.key == "inner.rate")
    assert (rate.default, rate.minimum, rate.maximum, rate.help) == (0.5, 0, 1, "a rate")


def test_defaults_are_not_shared() -> None:
    load().values.inner.steps.append(99)
    assert load().values.inner.steps == [1, 2]


def test_json_schema() -> None:
    schema = build_json_schema(OuterSpec, "outer", ["needed", "inner.rate"])
    jsonschema.Draft202012Validator.check_schema(schema)
    assert json.loads(json.dumps(schema, allow_nan=False)) == schema
    validator = jsonschema.Draft202012Validator(schema)
    good = {"needed": "x", "inner": {"rate": 0.5, "steps": [1], "mode": None}, "count": None, "weights": {"a": 1}}
    assert not list(validator.iter_errors(good))
    bad: list[dict[str, Any]] = [
        {"inner": {"rate": 0.5}},
        {"needed": "x", "inner": {}},
        {"needed": "x"},
        {**good, "count": 0},
        {**good, "count": "3"},
        {**good, "unknown": 1},
        {**good, "inner": {"rate": 2}},
        {**good, "inner": {"rate": 0.5, "mode": "fats"}},
        {**good, "weights": {"a": "b"}},
    ]
    for spec in bad:
        assert list(validator.iter_errors(spec)), spec


def test_template_shows_every_option_of_its_sections() -> None:
    text = write_template(OuterSpec, ["inner", "count", "name", "secret"], {"inner.rate": 0.25}, ["secret"])
    assert yaml.safe_load(text) == {
        "inner": {"rate": 0.25, "steps": [1, 2], "mode": "fast"},
        "count": 3,
        "name": "plain",
    }
    assert list(yaml.safe_load(text)) == ["inner", "count", "name"]
    assert '# secret: ""' in text
    for line in text.splitlines():
        assert not line or "# " in line or line == "inner:"
    assert "0..1" in text
    assert "one of fast, slow, 32" in text
    assert "at least 1" in text


WRITTEN = ["1e5", "2026_11_22", "0x1F", "true", "No", "1.50", ".5", "-0", ".inf", "="]


@pytest.mark.parametrize("text", WRITTEN)
def test_text_options_take_a_scalar_as_it_is_written(tmp_path: Path, text: str) -> None:
    assert load(None, f"secret={text}", f"name={text}").values.secret == text
    assert load(None, f"name={text}").values.name == text
    assert load(write(tmp_path, f"name: {text}\nneeded: a\nsecret: &x {text}\n")).values.secret == text
    assert load(write(tmp_path, f"name: {text}")).values.name == text


@dataclass(config=SPEC_CONFIG)
class TextsSpec:
    folder: str = option("", "a folder")
    tags: list[str] = option([], "tags")
    count: int = option(1, "a count")


@dataclass(config=SPEC_CONFIG)
class TwoTextsSpec:
    names: dict[str, int] | None = option(None, "numbers by name")
    first: TextsSpec = group(TextsSpec, "one")
    second: TextsSpec = group(TextsSpec, "two")


def test_text_in_groups_lists_and_names(tmp_path: Path) -> None:
    first = "first: &a {folder: 2026_11_22, tags: [1e5, on], count: 0x1F}\n"
    text = first + "second: {<<: *a, count: 1_0}\nnames: {yes: 1e0}"
    values = load_spec(TwoTextsSpec, write(tmp_path, text), ["second={tags: [0x1F]}"]).values
    assert values.first == TextsSpec("2026_11_22", ["1e5", "on"], 31)
    assert values.second == TextsSpec("2026_11_22", ["0x1F"], 10)
    assert values.names == {"yes": 1}


def test_alias_of_a_number_as_text_stays_a_number_elsewhere(tmp_path: Path) -> None:
    values = load(write(tmp_path, "name: &n 0x10\ncount: *n\n")).values
    assert (values.name, values.count) == ("0x10", 16)


@pytest.mark.parametrize("text", ["", "null", "~", "Null"])
def test_null_as_text_is_not_set(tmp_path: Path, text: str) -> None:
    assert load(None, f"name={text}").values.name == "plain"
    assert load(write(tmp_path, f"name: {text}")).values.name == "plain"


SECRET_FAULTS = [
    *("*topsecret", "!topsecret x", "!!int topsecret", "!topsecret!x y", "%topsecret", "[topsecret"),
    *("'topsecret", "&topsecret &topsecret x"),
    *("{topsecret: 1, topsecret: 2}", "${topsecret}", "a ${topsecret}", "topsecret: 1: 2", "@topsecret"),
]


@pytest.mark.parametrize("value", SECRET_FAULTS)
@pytest.mark.parametrize("key", ["secret", "secret.x", "secrte"])
def test_errors_do_not_quote_a_secret(value: str, key: str) -> None:
    with pytest.raises(SpecError) as caught:
        load(None, f"{key}={value}")
    if not (key == "secrte" and ("${" in value or "{topsecret:" in value)):
        assert "topsecret" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("value", [value for value in SECRET_FAULTS if "topsecret: 1" not in value])
def test_errors_of_files_do_not_quote_a_secret(tmp_path: Path, value: str) -> None:
    with pytest.raises(SpecError) as caught:
        load(write(tmp_path, f"count: 3\nsecret: {value}\n"))
    assert "topsecret" not in "".join(traceback.format_exception(caught.value))


def test_search_ranges_come_back_from_plain_data() -> None:
    """Zeros, flags and tuples included; what is the default is left out."""
    assert SearchRange(0, 5).as_data() == {"low": 0, "high": 5}
    ranges = [
        SearchRange(0.0, 0.8),
        SearchRange(0, None, log=True, specials=(0,), step=8, above="a.b"),
        SearchRange(choices=(False, True), weights=(0.0, 1.0), when={"a.b": (True, "x"), "c": (0,)}, powers_of=2),
    ]
    for search in ranges:
        data = search.as_data()
        assert json.loads(json.dumps(data, allow_nan=False)) == data
        assert SearchRange.from_data(data) == search


def test_an_option_that_is_searched_by_default_needs_a_range() -> None:
    with pytest.raises(TypeError, match="needs its range"):
        option(1, "a count", automl=True)

    @dataclass(config=SPEC_CONFIG)
    class SearchedSpec:
        rate: float = option(0.5, "a rate", automl=True, search=SearchRange(0.0, 1.0))
        other: float = option(0.5, "a rate")

    rate, other = list_options(SearchedSpec)
    assert rate.extra["search"] == SearchRange(0.0, 1.0)
    assert "search" not in other.extra
    jsonschema.Draft202012Validator.check_schema(build_json_schema(SearchedSpec, "searched"))


def test_remote_spec_is_limited_and_not_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KINEGRAPH_CACHE", str(tmp_path / "cache"))
    uri = f"memory://{tmp_path.name}/spec.yaml"
    remote.write_text(uri, "rate: 0.25\n")
    assert read_source(uri) == {"rate": 0.25}
    remote.write_text(uri, "#" * (MAX_FILE_BYTES + 1))
    for place, words in ((uri, "a file of over 1 MB"), (f"{uri}.missing", "no file")):
        with pytest.raises(SpecError) as caught:
            read_source(place)
        assert words in str(caught.value) and place in str(caught.value)
    assert not (tmp_path / "cache").exists(), "nothing was loaded whole"
