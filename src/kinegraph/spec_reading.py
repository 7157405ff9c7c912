"""Reading a spec for an action: defaults, file and overrides, and all that the action still needs, told at once."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from kinegraph.calibration import SMALLEST_TEMPERATURE
from kinegraph.config import MANDATORY, LoadedSpec, get_value, list_options, load_spec, shorten
from kinegraph.errors import Problem, SpecError, UserError
from kinegraph.remote import check_writable, is_file, is_folder, is_remote, join
from kinegraph.skeleton.layouts import LAYOUTS
from kinegraph.spec import KEY_VARIABLE, MAX_SEED, REQUIRED, SECTIONS, SHORTHANDS, DatasetConvertSpec, Spec
from kinegraph.spec_input import find_weight_problems


def read_spec(
    source: Any = None, overrides: tuple[str, ...] | list[str] = (), action: str | None = None
) -> LoadedSpec[Spec]:
    """A spec from a YAML file, a mapping or nothing, with `key=value` overrides; checked for an action if one is named.

    Raises SpecError with everything that is wrong with it.
    """
    try:
        loaded = load_spec(Spec, source, overrides, SHORTHANDS)
    except SpecError as error:
        if action is None or error.partial is None:
            raise
        told = " ".join(problem.where for problem in error.problems)
        more = [problem for problem in find_problems(error.partial, action) if problem.where.split(" ")[0] not in told]
        raise SpecError(*error.problems, *more) from None
    if action is not None:
        check_spec(loaded, action)
    return loaded


def check_spec(loaded: LoadedSpec[Spec], action: str) -> None:
    """Raise SpecError with all that the action still needs: mandatory values, files, a results folder."""
    problems = find_problems(loaded, action)
    if problems:
        raise SpecError(*problems)


def find_problems(loaded: LoadedSpec[Spec], action: str) -> list[Problem]:
    """What `check_spec` raises."""
    return [
        *_find_missing(loaded, action),
        *_find_missing_files(loaded, action),
        *_find_conflicts(loaded.values, action),
    ]


def find_results_dir(spec: Spec, action: str) -> str | None:
    """<action>.results_dir, else <results_dir>/<action>, else None: a path or a URI."""
    own: str = get_value(spec, action).results_dir
    if own:
        return own
    return join(spec.results_dir, action) if spec.results_dir else None


def list_paths(spec: Spec, action: str, kind: str) -> dict[str, str]:
    """Key -> location of the paths that an action uses and that are set. `kind` is "input" or "output"."""
    found = {}
    for entry in list_options(Spec):
        if entry.extra.get("path") == kind and entry.key.split(".")[0] in (*SECTIONS[action], "results_dir"):
            value = get_value(spec, entry.key)
            if value not in ("", MANDATORY):
                found[entry.key] = value
    layout = spec.model.graph_layout
    if kind == "input" and layout not in LAYOUTS and ("model" in SECTIONS[action] or is_remote(layout)):
        found["model.graph_layout"] = layout
    return found


def _find_missing(loaded: LoadedSpec[Spec], action: str) -> list[Problem]:
    problems = []
    spec = loaded.values
    unset = {key for key in REQUIRED[action] if get_value(spec, key) == ""}
    demanded = (*SECTIONS[action], "model_name", "encryption_key")
    unset |= {key for key in loaded.missing if key.split(".")[0] in demanded}
    if os.environ.get(KEY_VARIABLE):
        unset.discard("encryption_key")
    if find_results_dir(spec, action) is None:
        unset.add("results_dir")
    else:
        unset.discard("results_dir")
    for entry in list_options(Spec):
        if any(entry.key == key or entry.key.startswith(f"{key}.") for key in unset):
            hint = f"Set it in the spec or add {entry.key}=... to the command."
            problems.append(Problem(entry.key, "nothing", f"a value: {entry.help}", hint))
    return problems


def _find_missing_files(loaded: LoadedSpec[Spec], action: str) -> list[Problem]:
    problems: list[Problem] = []
    for kind in ("input", "output"):
        for key, location in list_paths(loaded.values, action, kind).items():
            place = f"{key} ({loaded.origins.get(key, 'default')})"
            try:
                if kind == "output":
                    check_writable(location)
                else:
                    problems += _find_missing_file(key, place, location)
            except UserError as error:
                # Credentials that are refused are refused for every file: what to do about it is said once
                told = [problem.hint for problem in problems]
                problems += [
                    replace(item, where=f"{place}: {item.where}", hint="" if item.hint in told else item.hint)
                    for item in error.problems
                ]
    return problems


def _find_missing_file(key: str, place: str, location: str) -> list[Problem]:
    if is_file(location):
        return []
    got = f"{shorten(location)}, which {'is a folder' if is_folder(location) else 'does not exist'}"
    return [Problem(place, got, "a layout file" if key == "model.graph_layout" else "a file", "Check the path.")]


def _find_conflicts(spec: Spec, action: str) -> list[Problem]:
    problems = []
    if action in ("evaluate", "inference") and get_value(spec, action).trt_engine:
        hint = f"Leave it out and set {action}.checkpoint to a .pth or .onnx file."
        problems.append(Problem(f"{action}.trt_engine", "a path", "nothing: TensorRT is not supported yet", hint))
    if action in ("train", "automl"):
        problems += _find_training_conflicts(spec)
    if action == "dataset_convert":
        problems += _find_window_conflicts(spec.dataset_convert)
    return problems


def _find_training_conflicts(spec: Spec) -> list[Problem]:
    problems = []
    train = spec.train
    ids = train.gpu_ids
    if (ids != [0] and len(ids) != train.num_gpus) or len(set(ids)) != len(ids) or min(ids, default=0) < 0:
        expected = f"{train.num_gpus} different ids of at least 0, as many as train.num_gpus"
        problems.append(Problem("train.gpu_ids", repr(ids), expected))
    if train.seed >= MAX_SEED:
        problems.append(Problem("train.seed", str(train.seed), f"less than {MAX_SEED}"))
    if spec.dataset.random_move and spec.model.input_channels < 2:
        expected = "at least 2 channels: it moves x and y"
        problems.append(Problem("dataset.random_move", f"true with {spec.model.input_channels} channel", expected))
    if spec.input.sampling != "none" and (spec.dataset.random_choose or spec.dataset.window_size != -1):
        expected = "window_size -1 and random_choose false: input.sampling says which frames are taken"
        got = f"dataset.window_size {spec.dataset.window_size}, random_choose {spec.dataset.random_choose}"
        problems.append(Problem("input.sampling", f"{spec.input.sampling} and {got}", expected))
    if spec.model.fusion == "late" and len(spec.input.streams) > 1:
        problems += find_weight_problems(spec.model.fusion_weights, len(spec.input.streams))
    if 0 < train.temperature < SMALLEST_TEMPERATURE:
        expected = f"0, to fit it, or at least {SMALLEST_TEMPERATURE}"
        problems.append(Problem("train.temperature", f"{train.temperature:g}", expected))
    if train.label_doubt > 0 and train.mixup > 0:
        expected = "train.mixup 0 or train.label_doubt 0: the answer to two mixed clips tells nothing about one's label"
        problems.append(
            Problem("train.label_doubt", f"{train.label_doubt:g} with train.mixup {train.mixup:g}", expected)
        )
    if train.stop_after_epoch == 0:
        problems.append(Problem("train.stop_after_epoch", "0", "-1 or a number of epochs of at least 1"))
    optim = train.optim
    if optim.optimizer_type == "torch.optim.SGD" and optim.nesterov and optim.momentum == 0:
        problems.append(
            Problem("train.optim.nesterov", "True with momentum 0", "a momentum above 0, or nesterov=false")
        )
    if spec.dataset.window_size == 0:
        problems.append(Problem("dataset.window_size", "0", "-1 or a number of frames of at least 1"))
    labels = sorted((spec.dataset.label_map or {}).values())
    if labels and labels != list(range(len(labels))):
        expected = f"the labels 0 to {len(labels) - 1}, each once"
        problems.append(Problem("dataset.label_map", f"the labels {labels}", expected))
    return problems


def _find_window_conflicts(spec: DatasetConvertSpec) -> list[Problem]:
    problems = []
    if spec.focal_length == 0 and spec.pose_type == "3dbp":
        problems.append(Problem("dataset_convert.focal_length", "0.0", "a focal length above 0 pixels"))
    if int(spec.sequence_length * spec.sequence_overlap) < 1:
        got = f"{spec.sequence_overlap} of {spec.sequence_length} frames, a stride of 0 frames"
        expected = "a fraction that gives a stride of at least 1 frame"
        problems.append(Problem("dataset_convert.sequence_overlap", got, expected))
    if spec.sequence_length > spec.sequence_length_max:
        expected = f"at most sequence_length_max = {spec.sequence_length_max}"
        problems.append(Problem("dataset_convert.sequence_length", str(spec.sequence_length), expected))
    return problems
