"""What the user wrote, as plain data: YAML files, `key=value` overrides, and ${another.key} in their values.

Files may come from strangers: size, nesting and the growth by aliases and references are limited, no tag builds an
object, and nothing of this machine's environment can be read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from kinegraph.errors import Problem, SpecError, UserError
from kinegraph.remote import is_remote, read_start

MANDATORY = "???"
HINT_QUOTES = "Write it in quotes, and those in quotes for the shell: 'key=\"value\"'."
MAX_FILE_BYTES = 1_000_000
MAX_NODES = 100_000
MAX_TEXT = 10_000
INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9_]{0,17}|0x[0-9a-fA-F]{1,15})$")
REFERENCE = re.compile(r"\$\{([^${}]*)\}")
FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+)$"
    r"|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
)


class _Loader(yaml.SafeLoader):
    """Plain data only. As in YAML 1.2, 1e-4 is a number, 010 is ten, and 12:30 and a date are text."""


_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0].rpartition(":")[2] not in ("float", "int", "timestamp")]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", INTEGER, list("-+0123456789"))


def read_source(source: str | Path | Mapping[str, Any] | None, texts: Collection[str] = ()) -> dict[str, Any]:
    """The options of a YAML file or a mapping as plain data. Raises SpecError.

    `texts` are the dotted keys of options that are text, and key.* for lists of text and mappings by names: such
    values stay as they are written.
    """
    if source is None:
        return {}
    if isinstance(source, Mapping):
        return {str(key): _copy_plain(value) for key, value in source.items()}
    text = _read_spec(source)
    if len(text) > MAX_FILE_BYTES:
        raise SpecError(Problem(str(source), "a file of over 1 MB", "a spec file of at most 1 MB"))
    try:
        content = _parse_yaml(text, texts)
    except _UnreadableError as error:
        raise SpecError(Problem(str(source), str(error), "a YAML spec")) from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SpecError(Problem(str(source), f"a {type(content).__name__}", "a mapping of options"))
    return content


def _read_spec(source: str | Path) -> bytes:
    """A spec file; of one that is too large one byte more than it may have."""
    try:
        if is_remote(source):
            return read_start(source, MAX_FILE_BYTES + 1)
        with open(source, "rb") as file:
            return file.read(MAX_FILE_BYTES + 1)
    except UserError as error:
        raise SpecError(*error.problems) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        hint = "`kinegraph template train -o train.yaml` writes one to fill in."
        raise SpecError(Problem(str(source), reason, "a spec file that can be read", hint)) from error


class _UnreadableError(Exception):
    """Why a text is not plain YAML, without quoting it: there may be a key in it."""


def _parse_yaml(text: bytes | str, texts: Collection[str] = (), key: str = "") -> Any:
    """`key`: the dotted key that the text is the value of."""
    try:
        loader = _Loader(text)
        try:
            root = loader.get_single_node()
            if root is None:
                return None
            _check_nodes(root)
            root = _keep_text(root, key, texts, loader)
            return loader.construct_document(root)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        place = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise _UnreadableError(place + _name_fault(error)) from None
    except RecursionError:
        raise _UnreadableError("values nested too deeply") from None
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError) as error:
        reason = f" ({error.reason})" if isinstance(error, yaml.reader.ReaderError | UnicodeDecodeError) else ""
        raise _UnreadableError(f"text that is not YAML{reason}") from None


def _name_fault(error: yaml.MarkedYAMLError) -> str:
    """In fixed words: the error's own quote the text."""
    if isinstance(error, yaml.composer.ComposerError):
        several = error.context == "expected a single document in the stream"
        return "another document" if several else "an alias (*) without its anchor (&), or an anchor given twice"
    if isinstance(error, yaml.constructor.ConstructorError):
        return "a value without a constructor: an unknown tag (!), or a key that is a list or mapping (unhashable)"
    return "text that is not YAML (see to brackets, quotes, colons, indentation and signs such as * ! & % @)"


def _keep_text(node: yaml.Node, key: str, texts: Collection[str], loader: _Loader) -> yaml.Node:
    """Plain scalars that YAML takes for a number or a truth value become text again where an option is text.

    `texts` holds key.* for the items of a list and the names in a mapping. Null stays null: not set.
    """
    if isinstance(node, yaml.ScalarNode):
        implied = loader.resolve(yaml.ScalarNode, node.value, (True, False))
        is_kept = key in texts and node.tag == implied and not node.tag.endswith((":null", ":str"))
        return yaml.ScalarNode("tag:yaml.org,2002:str", node.value, node.start_mark) if is_kept else node
    if isinstance(node, yaml.SequenceNode):
        node.value = [_keep_text(child, f"{key}.*", texts, loader) for child in node.value]
    elif isinstance(node, yaml.MappingNode) and f"{key}.*" in texts:
        node.value = [(_keep_text(name, f"{key}.*", texts, loader), child) for name, child in node.value]
    elif isinstance(node, yaml.MappingNode):
        pairs = []
        for name, child in node.value:
            is_merge = name.tag == "tag:yaml.org,2002:merge"
            path = key if is_merge else f"{key}.{name.value}".removeprefix(".")
            pairs.append((name, _keep_text(child, path, texts, loader)))
        node.value = pairs
    return node


def _check_nodes(root: yaml.Node) -> None:
    """Refuse a key that stands twice, and aliases that expand to a huge tree or contain themselves."""
    sizes: dict[int, int] = {}

    def measure(node: yaml.Node) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = MAX_NODES + 1
            children = node.value if isinstance(node, yaml.SequenceNode) else []
            if isinstance(node, yaml.MappingNode):
                _check_keys(node)
                children = [child for pair in node.value for child in pair]
            sizes[id(node)] = 1 + sum(measure(child) for child in children)
        return sizes[id(node)]

    if measure(root) > MAX_NODES:
        raise _UnreadableError(f"more than {MAX_NODES} values, counting what its aliases expand to")


def _check_keys(node: yaml.MappingNode) -> None:
    seen = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            if (key.tag, key.value) in seen:
                raise _UnreadableError(f"line {key.start_mark.line + 1}: the key {key.value[:80]!r} a second time")
            seen.add((key.tag, key.value))


def _copy_plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy_plain(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_copy_plain(child) for child in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def parse_overrides(
    overrides: Sequence[str],
    shorthands: Mapping[str, str],
    texts: Collection[str] = (),
    secrets: Collection[str] = (),
) -> dict[str, Any]:
    """`key=value` texts, values in YAML, as nested data; a later one wins. Raises SpecError with all problems.

    `texts` as in `read_source`; nothing of the values of `secrets` is told.
    """
    tree: dict[str, Any] = {}
    problems = []
    for text in overrides:
        key, equals, value = text.partition("=")
        key = shorthands.get(key.strip(), key.strip())
        if not equals or not all(key.split(".")):
            is_file = text.lower().endswith((".yaml", ".yml"))
            hint = "Put -e before the name of a spec file." if is_file else ""
            expected = "key=value, such as train.num_epochs=20"
            where = f"override {text.partition('=')[0]!r}"
            problems.append(Problem(where, "no value" if key else "no key", expected, hint))
            continue
        try:
            set_value(tree, key, _parse_yaml(value, texts, key))
        except _UnreadableError as error:
            got = "text that is not YAML" if _is_secret(key, secrets) else str(error)
            problems.append(Problem(f"override: {key}", got, "a YAML value", HINT_QUOTES))
    if problems:
        raise SpecError(*problems)
    return tree


def _is_secret(key: str, secrets: Collection[str]) -> bool:
    return any(f"{key}.".startswith(f"{secret}.") for secret in secrets)


def set_value(nested: dict[str, Any], key: str, value: Any) -> None:
    """Put a value under a dotted key of nested mappings. What stands in its way and is no mapping is replaced."""
    *groups, name = key.split(".")
    for part in groups:
        child = nested.get(part)
        nested[part] = child if isinstance(child, dict) else {}
        nested = nested[part]
    nested[name] = value


def nest(values: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as nested mappings."""
    nested: dict[str, Any] = {}
    for key, value in values.items():
        set_value(nested, key, value)
    return nested


def merge(below: Any, above: Any) -> Any:
    """Mappings are merged key by key; everything else above replaces what is below."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    merged = dict(below)
    for key, value in above.items():
        merged[key] = merge(below[key], value) if key in below else value
    return merged


def list_keys(values: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys of the leaves and of the groups that are not empty."""
    for key, value in values.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from list_keys(value, f"{prefix}{key}.")


@dataclass
class References:
    """Replaces ${another.key} in a tree of plain data by the value of that key.

    A text around references to what is not set is itself not set: it becomes `???`, so that an action that needs it
    asks for it. `problems` holds (key, got, expected, hint) of references that cannot be followed.
    """

    root: dict[str, Any]
    secrets: Collection[str] = ()
    problems: list[tuple[str, str, str, str]] = field(default_factory=list)
    _known: dict[tuple[Any, ...], tuple[Any, int]] = field(default_factory=dict)
    _open: set[tuple[Any, ...]] = field(default_factory=set)

    def resolve(self) -> dict[str, Any]:
        try:
            resolved: dict[str, Any] = self._resolve_at((), self.root)[0]
        except RecursionError:
            self._refuse((), "references or values nested too deeply", "fewer levels")
            return {}
        return resolved or {}

    def _resolve_at(self, path: tuple[Any, ...], raw: Any) -> tuple[Any, int]:
        """The value at a path, and how many values it holds."""
        if path not in self._known:
            self._open.add(path)
            if isinstance(raw, dict):
                children = {key: self._resolve_at((*path, key), value) for key, value in raw.items()}
                value: Any = {key: child for key, (child, _) in children.items()}
                size = 1 + sum(child_size for _, child_size in children.values())
            elif isinstance(raw, list):
                items = [self._resolve_at((*path, index), value) for index, value in enumerate(raw)]
                value, size = [item for item, _ in items], 1 + sum(item_size for _, item_size in items)
            elif isinstance(raw, str) and "${" in raw:
                value, size = self._resolve_text(path, raw)
            else:
                value, size = raw, 1
            if size > MAX_NODES:
                value, size = self._refuse(path, "references that expand without end", f"at most {MAX_NODES} values")
            self._open.discard(path)
            self._known[path] = value, size
        return self._known[path]

    def _resolve_text(self, path: tuple[Any, ...], text: str) -> tuple[Any, int]:
        if "${" in REFERENCE.sub("", text):
            return self._refuse(path, "a reference in a reference, or one without end", "${another.key}")
        whole = REFERENCE.fullmatch(text)
        if whole:
            return self._follow(path, whole.group(1))
        pieces = []
        for index, piece in enumerate(REFERENCE.split(text)):
            value = self._follow(path, piece)[0] if index % 2 else piece
            if index % 2 and value in (None, "", MANDATORY):
                return MANDATORY, 1
            if isinstance(value, dict | list):
                return self._refuse(path, f"text around ${{{piece}}}, which is no single value", "a single value")
            pieces.append(str(value))
        if sum(map(len, pieces)) > MAX_TEXT:
            return self._refuse(path, "references that expand to a long text", f"at most {MAX_TEXT} characters")
        return "".join(pieces), 1

    def _follow(self, path: tuple[Any, ...], reference: str) -> tuple[Any, int]:
        shown = "${" + reference + "}"
        if ":" in reference:
            return self._refuse(path, shown, "a value or ${another.key}", "Resolvers are not run.")
        name = reference.lstrip(".")
        dots = len(reference) - len(name)
        target: tuple[Any, ...] = (*(path[:-dots] if dots else ()), *name.split("."))
        if ".".join(map(str, target)) in self.secrets:
            return self._refuse(path, shown, "another key", "A secret may not be copied to other options.")
        node: Any = self.root
        for depth, part in enumerate(target):
            if isinstance(node, str) and "${" in node and target[:depth] not in self._open:
                node = self._resolve_at(target[:depth], node)[0]
            if not isinstance(node, dict) or part not in node:
                return self._refuse(path, f"{shown}, which does not exist", "a key of this spec")
            node = node[part]
        if target in self._open:
            return self._refuse(path, f"{shown}, which leads back here", "a key that does not need this one")
        return self._resolve_at(target, node)

    def _refuse(self, path: tuple[Any, ...], got: str, expected: str, hint: str = "") -> tuple[Any, int]:
        key = ".".join(map(str, path))
        got = "a reference that cannot be followed" if _is_secret(key, self.secrets) else got
        self.problems.append((key, got, expected, hint))
        return None, 1
