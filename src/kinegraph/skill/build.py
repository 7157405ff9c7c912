"""`kinegraph skill build`: the bundle that tells an agent how to use Kinegraph, generated from the spec."""

from __future__ import annotations

import os
from pathlib import Path

import yaml

from kinegraph.errors import Problem, UserError
from kinegraph.skill.guide import DESCRIPTION, build_guide
from kinegraph.skill.info import build_manifest, build_skill_info, name_json_schema, name_schema, name_template
from kinegraph.skill.tao_schema import build_tao_schema
from kinegraph.spec import SECTIONS
from kinegraph.storage import dump_json, explain_os_error, make_folder, write_atomically
from kinegraph.templates import build_schema, build_template

PARTS = ("references", "schemas", "schemas/json")


def list_contents() -> dict[str, str]:
    """File name in the bundle -> its text."""
    contents = {
        "SKILL.md": build_guide(),
        "references/skill_info.yaml": yaml.safe_dump(build_skill_info(DESCRIPTION), sort_keys=False, width=120),
        "schemas/manifest.json": _format(build_manifest()),
    }
    for action in SECTIONS:
        contents[name_template(action)] = build_template(action)
        contents[name_schema(action)] = _format(build_tao_schema(action))
        contents[name_json_schema(action)] = _format(build_schema(action))
    return contents


def build_skill(folder: str | Path) -> dict[str, list[str]]:
    """Write the bundle: {"written": [...], "removed": [...]}, names in the folder.

    A bundle that is there is brought up to date; files of it that are no longer part of one are removed. Raises
    UserError for a folder that holds something else, StorageError.
    """
    root = Path(folder)
    if os.path.isdir(root) and os.listdir(root) and not os.path.isfile(root / "SKILL.md"):
        hint = "Name a new folder."
        raise UserError(Problem(str(folder), "a folder with other files", "a new folder, or one with a bundle", hint))
    contents = list_contents()
    make_folder(root)
    for part in PARTS:
        make_folder(root / part)
    for name, text in contents.items():
        with write_atomically(root / name, "w") as file:
            file.write(text)
    return {"written": list(contents), "removed": _remove_old(root, set(contents))}


def _remove_old(root: Path, names: set[str]) -> list[str]:
    """Templates and schemas of actions that are gone."""
    patterns = (name_template("*"), name_schema("*"), name_json_schema("*"))
    old = [path for pattern in patterns for path in sorted(root.glob(pattern))]
    old = [path for path in old if path.relative_to(root).as_posix() not in names]
    for path in old:
        try:
            path.unlink()
        except OSError as error:
            raise explain_os_error(error, path) from error
    return [path.relative_to(root).as_posix() for path in old]


def _format(data: object) -> str:
    return dump_json(data, indent=2) + "\n"
