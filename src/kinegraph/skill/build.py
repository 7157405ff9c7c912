"""`kinegraph skill build`: the bundle that tells an agent how to use Kinegraph, generated from the spec."""

from __future__ import annotations

import os
from pathlib import Path

import yaml

from kinegraph.bundle import SKILL_FILE, check_bundle
from kinegraph.errors import Problem, UserError
from kinegraph.skill.guide import DESCRIPTION, build_guide
from kinegraph.skill.info import build_manifest, build_skill_info, name_json_schema, name_schema, name_template
from kinegraph.skill.tao_schema import build_tao_schema
from kinegraph.spec import SECTIONS
from kinegraph.storage import dump_json, explain_os_error, make_folder, write_atomically
from kinegraph.templates import build_schema, build_template

PARTS = ("references", "schemas", "schemas/json")
GENERATED_BY = "kinegraph skill build"
"""The mark in the front matter of SKILL.md: a folder without it is not ours to overwrite."""


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

    A bundle that this command made is brought up to date, and files of actions that are gone are removed. Raises
    UserError for a folder that holds something else, StorageError.
    """
    root = Path(folder)
    actions = _list_old_actions(root)
    contents = list_contents()
    make_folder(root)
    removed = _remove_old(root, actions)  # first: the new manifest no longer names them
    for name, text in contents.items():  # SKILL.md first: with it, what a kill leaves behind can be built again
        make_folder((root / name).parent)
        with write_atomically(root / name, "w") as file:
            file.write(text)
    return {"written": list(contents), "removed": removed}


def _list_old_actions(root: Path) -> tuple[str, ...]:
    """The actions of the bundle of ours in a folder; none for a new or empty folder. Raises UserError for others."""
    try:
        is_new = not os.path.isdir(root) or not os.listdir(root)
    except OSError as error:
        raise explain_os_error(error, root) from error
    if is_new:
        return ()
    expected = "a new folder, or one with a bundle that this command made"
    report = check_bundle(root)
    if report.generated_by != GENERATED_BY:
        is_skill = os.path.lexists(root / SKILL_FILE)
        got = f"a skill without 'generated_by: {GENERATED_BY}'" if is_skill else "a folder with other files"
        raise UserError(Problem(str(root), got, expected, "Name a new folder."))
    links = [part for part in PARTS if os.path.islink(root / part)]
    if links:
        hint = "What a link leads to is not written to: name a new folder."
        raise UserError(*(Problem(str(root / part), "a link", "a folder of the bundle", hint) for part in links))
    return report.actions


def _remove_old(root: Path, actions: tuple[str, ...]) -> list[str]:
    """Remove the template and schemas of actions that are gone."""
    removed = []
    for action in actions:
        for name in (name_template(action), name_schema(action), name_json_schema(action)):
            path = root / name
            if action in SECTIONS or os.path.islink(path) or not os.path.isfile(path):
                continue
            try:
                path.unlink()
            except OSError as error:
                raise explain_os_error(error, path) from error
            removed.append(name)
    return removed


def _format(data: object) -> str:
    return dump_json(data, indent=2) + "\n"
