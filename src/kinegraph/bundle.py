"""Skill bundles, ours and the original's: what parses, what is missing, whether AutoML is runnable.

A bundle is a folder with SKILL.md, references/skill_info.yaml, references/spec_template_<action>.yaml,
schemas/<action>.schema.json and schemas/manifest.json. It may come from strangers: nothing outside the folder is read,
and sizes, depth, the length of keys and the growth by aliases are limited.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from kinegraph.config_source import read_source
from kinegraph.errors import Problem, SpecError, UserError

SKILL_FILE = "SKILL.md"
INFO_FILE = "references/skill_info.yaml"
MANIFEST_FILE = "schemas/manifest.json"
TEMPLATE_FILE = "references/spec_template_{action}.yaml"
SCHEMA_FILE = "schemas/{action}.schema.json"
NEEDED_FOR_AUTOML = (SCHEMA_FILE.format(action="train"), TEMPLATE_FILE.format(action="train"))

MAX_FILE_BYTES = 4_000_000
MAX_BUNDLE_BYTES = 32_000_000
MAX_FRONT_MATTER = 20_000
MAX_FILES = 1000
MAX_DEPTH = 50
MAX_NODES = 10_000
MAX_NAME = 200
MAX_KEY = 1000
MAX_PROBLEMS = 1000
TOO_MANY_PROBLEMS = f"more than {MAX_PROBLEMS} problems: the others are not told"
ACTION_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}$")


@dataclass(frozen=True)
class BundleReport:
    """What `check_bundle` found. Files are relative to the folder.

    parsed          files that could be read
    missing         files that should be there and are not
    problems        what is wrong, missing files included; at most 1000
    notices         what is read all the same, such as Infinity in JSON
    not_runnable    what keeps AutoML from running, or ''
    generated_by    what the front matter of SKILL.md says, or ''
    """

    folder: str
    name: str
    actions: tuple[str, ...]
    parsed: tuple[str, ...]
    missing: tuple[str, ...]
    problems: tuple[Problem, ...]
    notices: tuple[str, ...]
    automl_enabled: bool
    automl_runnable: bool
    not_runnable: str
    generated_by: str

    def as_data(self) -> dict[str, Any]:
        """The report as plain data, for `--json`."""
        return asdict(self)


@dataclass
class _Finding:
    """What has been read and found so far. The content of a file that nobody needs any more is None."""

    folder: Path
    size_bytes: int = 0
    content: dict[str, Any] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def refuse(self, name: str, got: str, expected: str, hint: str = "") -> None:
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(Problem(name, got, expected, hint))
        elif TOO_MANY_PROBLEMS not in self.notices:
            self.notices.append(TOO_MANY_PROBLEMS)

    def forget(self, *names: str) -> None:
        """Keep that files were read, not what is in them: a few bytes of JSON take many in memory."""
        self.content |= dict.fromkeys(self.content.keys() & set(names))

    def get_mapping(self, name: str, key: str = "") -> dict[str, Any]:
        """The mapping in a file, or under one of its keys; empty if it is not there or no mapping."""
        value = self.content.get(name)
        if key:
            value = value.get(key) if isinstance(value, dict) else None
            if value is not None and not isinstance(value, dict):
                self.refuse(f"{name}: {key}", f"a {type(value).__name__}", "a mapping")
        return value if isinstance(value, dict) else {}


class _UnreadableError(Exception):
    pass


def check_bundle(folder: str | Path) -> BundleReport:
    """Read a skill bundle and report on it. Raises UserError if there is no such folder."""
    root = Path(folder)
    if not os.path.isdir(root):
        got = "a file" if os.path.isfile(root) else "nothing"
        raise UserError(Problem(str(folder), got, "the folder of a skill bundle", f"It holds {SKILL_FILE}."))
    finding = _Finding(root.resolve())
    for name in (SKILL_FILE, INFO_FILE, MANIFEST_FILE):
        _read(finding, name)
    actions = _list_actions(finding)
    for action in actions or ["train"]:
        template, schema = TEMPLATE_FILE.format(action=action), SCHEMA_FILE.format(action=action)
        _read(finding, template)
        _read(finding, schema)
        if actions:
            _check_schema(finding, schema, template)
        finding.forget(template, schema)
    for name in _list_others(finding):
        _read(finding, name)
        finding.forget(name)
    generated_by = _check_skill_file(finding)
    _check_references(finding)
    is_enabled = _find_enabled(finding)
    not_runnable = "; ".join(
        _explain_unusable(finding, name) for name in NEEDED_FOR_AUTOML if name not in finding.content
    )
    title = finding.get_mapping(INFO_FILE).get("name", "")
    return BundleReport(
        str(folder),
        title if isinstance(title, str) else "",
        tuple(actions),
        tuple(sorted(finding.content)),
        tuple(finding.missing),
        tuple(finding.problems),
        tuple(finding.notices),
        is_enabled,
        is_enabled and not not_runnable,
        not_runnable,
        generated_by,
    )


def _explain_unusable(finding: _Finding, name: str) -> str:
    return f"{name} cannot be read: {reason}" if (reason := finding.unreadable.get(name)) else f"{name} is missing"


def _list_actions(finding: _Finding) -> list[str]:
    """The actions that skill_info.yaml and the manifest name."""
    names = [*finding.get_mapping(INFO_FILE, "actions"), *finding.get_mapping(MANIFEST_FILE, "actions")]
    actions: list[str] = []
    for name in dict.fromkeys(names):
        if isinstance(name, str) and ACTION_NAME.match(name) and len(actions) < MAX_FILES:
            actions.append(name)
        else:
            finding.refuse("actions", repr(name)[:80], "the name of an action")
    return actions


def _list_others(finding: _Finding) -> list[str]:
    """Other YAML and JSON files in references and schemas, at most 1000."""
    names: list[str] = []
    for part in ("references", "schemas"):
        for place, folders, files in os.walk(finding.folder / part):
            folders.sort()
            names += [
                (Path(place) / file).relative_to(finding.folder).as_posix()
                for file in sorted(files)
                if file.endswith((".json", ".yaml", ".yml"))
            ]
            if len(names) > MAX_FILES:
                finding.notices.append(f"more than {MAX_FILES} files: the others were not read")
                return names[:MAX_FILES]
    known = {*finding.content, *finding.missing, *finding.unreadable}
    return [name for name in names if name not in known]


def _read(finding: _Finding, name: str) -> None:
    """Read a file of the bundle into `content`, or note why not."""
    path = finding.folder / name
    if not os.path.lexists(path):
        finding.missing.append(name)
        finding.refuse(name, "nothing", "a file of the bundle")
        return
    try:
        _check_file(finding, path)
        if name.endswith(".json"):
            finding.content[name] = _read_json(finding, name, path)
        elif name.endswith(".md"):
            finding.content[name] = path.read_text("utf-8")
        else:
            finding.content[name] = read_source(path)
    except (SpecError, _UnreadableError, OSError, UnicodeDecodeError) as error:
        reason = error.problems[0].got if isinstance(error, SpecError) else _explain(error)
        finding.unreadable[name] = reason
        finding.refuse(name, reason, "a file that can be read")


def _explain(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or "an error while reading"
    return "text that is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)


def _check_file(finding: _Finding, path: Path) -> None:
    real = Path(os.path.realpath(path))  # Path.resolve raises for a loop of links
    if not real.is_relative_to(finding.folder):
        raise _UnreadableError("a link out of the bundle")
    if not real.is_file():
        raise _UnreadableError("no regular file")
    size = real.stat().st_size
    if size > MAX_FILE_BYTES:
        raise _UnreadableError(f"a file of {size / 1e6:.1f} MB, which is over {MAX_FILE_BYTES / 1e6:.0f} MB")
    if finding.size_bytes + size > MAX_BUNDLE_BYTES:
        raise _UnreadableError(f"a file with which the bundle is over {MAX_BUNDLE_BYTES / 1e6:.0f} MB")
    finding.size_bytes += size


def _read_json(finding: _Finding, name: str, path: Path) -> Any:
    """The content of a JSON file; Infinity and NaN, which JSON does not have, are read and noted."""
    strange: list[str] = []

    def take_constant(text: str) -> float:
        strange.append(text)
        return float(text)

    def take_float(text: str) -> float:
        return take_constant(text) if math.isinf(float(text)) else float(text)

    try:
        data = json.loads(path.read_text("utf-8"), parse_constant=take_constant, parse_float=take_float)
    except json.JSONDecodeError as error:
        raise _UnreadableError(f"line {error.lineno}: {error.msg}, which is not JSON") from None
    except RecursionError:
        raise _UnreadableError("values nested too deeply") from None
    except ValueError as error:
        if isinstance(error, UnicodeDecodeError):
            raise
        raise _UnreadableError("a number with too many digits") from None
    if strange:
        kinds = ", ".join(sorted({text[:20] for text in strange}))
        finding.notices.append(f"{name}: {len(strange)} values that JSON does not have ({kinds})")
    if not isinstance(data, dict):
        raise _UnreadableError(f"a {type(data).__name__} instead of an object")
    return data


class _FrontMatterLoader(yaml.SafeLoader):
    """Plain data without aliases: a few of them could expand to a huge tree."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias")
        return super().compose_node(parent, index)


def _check_skill_file(finding: _Finding) -> str:
    """SKILL.md begins with front matter that has a name and a description. Returns metadata.generated_by, or ''."""
    text = finding.content.get(SKILL_FILE)
    if text is None:
        return ""
    lines = text[:MAX_FRONT_MATTER].splitlines()
    if not lines or lines[0].rstrip() != "---" or "---" not in [line.rstrip() for line in lines[1:]]:
        finding.refuse(SKILL_FILE, "no front matter", "YAML between two lines --- at the beginning")
        return ""
    end = [line.rstrip() for line in lines].index("---", 1)
    try:
        front = yaml.load("\n".join(lines[1:end]), Loader=_FrontMatterLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        finding.refuse(SKILL_FILE, "front matter that cannot be read", "YAML without aliases")
        return ""
    front = front if isinstance(front, dict) else {}
    for key in ("name", "description"):
        if not isinstance(front.get(key), str) or not front[key].strip():
            finding.refuse(f"{SKILL_FILE}: {key}", repr(front.get(key))[:80], "text in the front matter")
    title = finding.get_mapping(INFO_FILE).get("name")
    if isinstance(title, str) and isinstance(front.get("name"), str) and title != front["name"]:
        finding.refuse(f"{INFO_FILE}: name", repr(title)[:80], f"{front['name'][:80]!r}, as in {SKILL_FILE}")
    metadata = front.get("metadata")
    generated_by = metadata.get("generated_by") if isinstance(metadata, dict) else None
    return generated_by if isinstance(generated_by, str) else ""


def _check_references(finding: _Finding) -> None:
    """Files that the manifest and skill_info.yaml name must be there, in the bundle."""
    for action, entry in finding.get_mapping(MANIFEST_FILE, "actions").items():
        for key in ("path", "spec_template"):
            named = entry.get(key) if isinstance(entry, dict) else None
            _check_reference(finding, f"{MANIFEST_FILE}: {action}.{key}", named, finding.folder)
    for action, named in finding.get_mapping(INFO_FILE, "spec_templates").items():
        _check_reference(finding, f"{INFO_FILE}: spec_templates.{action}", named, finding.folder / "references")
    if failures := finding.get_mapping(MANIFEST_FILE, "failures"):
        finding.notices.append(f"{MANIFEST_FILE}: no schema could be made for {', '.join(map(str, failures))[:200]}")


def _check_reference(finding: _Finding, where: str, named: Any, base: Path) -> None:
    if not isinstance(named, str) or not named or "\0" in named:
        finding.refuse(where, repr(named)[:80], "the name of a file in the bundle")
        return
    target = Path(os.path.realpath(base / named[:1000]))
    if not (target.is_relative_to(finding.folder) and os.path.isfile(target)):
        finding.refuse(where, f"{named[:200]!r}, which is not in the bundle", "a file that is there")


def _find_enabled(finding: _Finding) -> bool:
    """What skill_info.yaml says about AutoML; the manifest where that file says nothing."""
    said = {name: finding.get_mapping(name).get("automl_enabled") for name in (INFO_FILE, MANIFEST_FILE)}
    for name, value in said.items():
        if name in finding.content and not isinstance(value, bool):
            finding.refuse(f"{name}: automl_enabled", repr(value)[:80], "true or false")
    values = [value for value in said.values() if isinstance(value, bool)]
    if len(set(values)) > 1:
        finding.refuse(f"{MANIFEST_FILE}: automl_enabled", str(values[1]), f"{values[0]}, as in {INFO_FILE}")
    return bool(values and values[0])


def _check_schema(finding: _Finding, name: str, template: str) -> None:
    """The options of a schema, and that its template has no others. One that is too large counts as unreadable."""
    schema = finding.content.get(name)
    if schema is None:
        return
    if not isinstance(schema.get("properties"), dict):
        finding.refuse(f"{name}: properties", repr(schema.get("properties"))[:80], "a mapping of options")
        return
    try:
        nodes = dict(_walk_schema(schema))
    except _UnreadableError as error:
        del finding.content[name]
        finding.unreadable[name] = str(error)
        finding.refuse(name, str(error), "a schema of an ordinary size")
        return
    for key, node in nodes.items():
        _check_leaf(finding, f"{name}: {key}", node)
    defaults = schema.get("automl_default_parameters", [])
    for key in defaults if isinstance(defaults, list) else [defaults]:
        if not isinstance(key, str) or key not in nodes:
            finding.refuse(f"{name}: automl_default_parameters", repr(key)[:80], "the key of an option in this schema")
    for key in _find_unknown(finding.content.get(template) or {}, nodes):
        finding.refuse(f"{template}: {key}", "a key that its schema does not know", f"an option in {name}")


def _walk_schema(schema: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Dotted key and node of every group and leaf, down to 50 levels. Raises _UnreadableError if they are too many.

    The original has lists of names among the properties of a group: no options. A key repeats those of its groups, so
    that a small file could grow to gigabytes: names, keys and their number are limited before a key is made.
    """
    waiting: list[tuple[str, Any, int]] = [("", schema, 0)]
    count = 0
    while waiting:
        key, node, depth = waiting.pop()
        if key:
            yield key, node
        properties = node.get("properties") if depth < MAX_DEPTH else None
        prefix = f"{key}." if key else ""
        for name, child in properties.items() if isinstance(properties, dict) else ():
            if not isinstance(child, dict):
                continue
            count += 1
            if len(name) > MAX_NAME or len(prefix) + len(name) > MAX_KEY:
                raise _UnreadableError(f"a property with a name over {MAX_NAME} or a key over {MAX_KEY} characters")
            if count > MAX_NODES:
                raise _UnreadableError(f"more than {MAX_NODES} properties")
            waiting.append((prefix + name, child, depth + 1))


def _check_leaf(finding: _Finding, where: str, node: Mapping[str, Any]) -> None:
    choices, weights = node.get("enum"), node.get("option_weights")
    if weights is not None:
        count = len(choices) if isinstance(choices, list) else 0
        is_list = isinstance(weights, list) and all(_is_number(weight) and weight >= 0 for weight in weights)
        if not is_list or len(weights) != count or not any(weight > 0 for weight in weights):
            expected = f"{count} numbers of at least 0, one for each choice, not all 0"
            finding.refuse(f"{where}: option_weights", repr(weights)[:80], expected)
    low, high = node.get("minimum"), node.get("maximum")
    if _is_number(low) and _is_number(high) and low > high:  # type: ignore[operator]
        finding.refuse(f"{where}: minimum", str(low), f"at most the maximum, {high}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def _find_unknown(
    template: Mapping[str, Any], nodes: Mapping[str, Mapping[str, Any]], prefix: str = ""
) -> Iterator[str]:
    """Dotted keys of a template that a schema does not know. A group without properties takes any key."""
    for name, value in template.items():
        key = prefix + str(name)[: MAX_NAME + 1]  # no schema has a longer one, and aliases may repeat it
        if key not in nodes:
            yield key
        elif isinstance(value, dict) and isinstance(nodes[key].get("properties"), dict):
            yield from _find_unknown(value, nodes, f"{key}.")
