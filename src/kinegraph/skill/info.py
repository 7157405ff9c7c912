"""skill_info.yaml and the manifest: what the actions take and give, as data."""

from __future__ import annotations

from typing import Any

from kinegraph.config import list_options
from kinegraph.jobs.resolve import SPEC_PARAMS
from kinegraph.jobs.sources import MANDATORY_SOURCES, OPTIONAL_SOURCES, SOURCE_FILES
from kinegraph.skill.tao_schema import NETWORK_ARCH, build_tao_schema
from kinegraph.spec import REQUIRED, SECTIONS, SHORTHANDS, Spec

SKILL_NAME = "train-pose-classification"
UPLOAD_EXCLUDES = ["inputs/"]
FILE_ENDINGS = {"data_path": ".npy", "label_path": ".pkl"}
OUTPUT_FILES: dict[str, tuple[str, ...]] = {"export": ("export.onnx_file",), "inference": ("inference.output_file",)}


def build_skill_info(description: str) -> dict[str, Any]:
    """The content of skill_info.yaml."""
    return {
        "name": SKILL_NAME,
        "description": description,
        "network_arch": NETWORK_ARCH,
        "automl_enabled": True,
        "data_format": "default",
        "gpu_spec_key": "train.num_gpus",
        "actions": {action: _describe_action(action) for action in SECTIONS},
        "data_sources": {action: sources for action in SECTIONS if (sources := _describe_sources(action))},
        "spec_params": {action: dict(SPEC_PARAMS[action]) for action in SECTIONS},
        "key_defaults": {},
        "spec_shorthand_keys": dict(SHORTHANDS),
        "spec_templates": {action: f"../{name_template(action)}" for action in SECTIONS},
    }


def build_manifest() -> dict[str, Any]:
    """The content of schemas/manifest.json. `json_schema` names the standard schema beside the one in TAO's form."""
    actions = {}
    for action in SECTIONS:
        schema = build_tao_schema(action)
        actions[action] = {
            "path": name_schema(action),
            "json_schema": name_json_schema(action),
            "spec_template": name_template(action),
            "core_module": NETWORK_ARCH,
            "schema_action": action,
            **{key: schema[key] for key in ("automl_default_parameters", "automl_disabled_parameters", "popular")},
        }
    return {
        "schema_version": 1,
        "model": NETWORK_ARCH,
        "network_arch": NETWORK_ARCH,
        "automl_enabled": True,
        "failures": {},
        "actions": actions,
    }


def name_template(action: str) -> str:
    return f"references/spec_template_{action}.yaml"


def name_schema(action: str) -> str:
    return f"schemas/{action}.schema.json"


def name_json_schema(action: str) -> str:
    return f"schemas/json/{action}.json"


def _describe_action(action: str) -> dict[str, Any]:
    return {
        "command": f"kinegraph {action} -e {{config_path}}" + (" --yes" if action == "automl" else ""),
        "config_format": "yaml",
        "mode": "config",
        "inputs": {key: _describe_input(key, action) for key in _list_inputs(action)},
        "outputs": {"results_dir": {"type": "folder"}}
        | {key: {"type": "file"} for key in OUTPUT_FILES.get(action, ())},
        "upload_excludes": list(UPLOAD_EXCLUDES),
    }


def _list_inputs(action: str) -> list[str]:
    """The options of an action that name files to read, mandatory ones first."""
    keys = [
        entry.key
        for entry in list_options(Spec)
        if entry.extra.get("path") == "input" and entry.key.split(".")[0] in SECTIONS[action]
    ]
    return sorted(keys, key=lambda key: key not in REQUIRED[action])


def _describe_input(key: str, action: str) -> dict[str, Any]:
    return {"type": "file"} if key in REQUIRED[action] else {"type": "file", "optional": True}


def _describe_sources(action: str) -> dict[str, dict[str, Any]]:
    """Option -> the file of a data folder that serves it. Other label files (.json, .npz, .csv) serve as well."""
    sources: dict[str, dict[str, Any]] = {}
    for key, stem in SOURCE_FILES[action].items():
        if key not in (*MANDATORY_SOURCES[action], *OPTIONAL_SOURCES):
            continue
        name = stem + FILE_ENDINGS[key.rpartition(".")[2]] if stem else "*.json"
        sources[key] = {"source": "train_datasets", "path": name}
        if key in OPTIONAL_SOURCES:
            sources[key]["optional"] = True
    return sources
