"""From what was asked to what will run: the record and the spec of a new job, or all that is wrong with them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kinegraph import remote
from kinegraph.config import LoadedSpec, get_value, list_options
from kinegraph.config_source import nest
from kinegraph.errors import Problem, SpecError, UserError, look_up
from kinegraph.jobs.artifacts import parse_choice
from kinegraph.jobs.record import (
    Job,
    PolicyRecord,
    find_folder,
    get_time,
    make_absolute,
    make_job_id,
    redact_overrides,
)
from kinegraph.jobs.resolve import (
    FUNCTIONS,
    KEY_FROM_CALL,
    KEY_FROM_FILE,
    SPEC_PARAMS,
    Context,
    Parent,
    find_inherited,
    find_key_reference,
    find_parent,
    read_key_file,
)
from kinegraph.jobs.sources import CHECKPOINTS, find_missing_sources, read_data_source
from kinegraph.policy import choose_route, resolve_automl_policy
from kinegraph.skeleton.layouts import LAYOUTS
from kinegraph.spec import REQUIRED, Spec
from kinegraph.spec_reading import read_spec

OWN_FOLDERS = ("results_dir", *(f"{action}.results_dir" for action in SPEC_PARAMS))
PRETRAINED = "model.pretrained_model_path"
RESUME = "train.resume_training_checkpoint_path"


@dataclass(frozen=True)
class Request:
    """What `create_job` was called with."""

    action: str
    root: str
    runner: str = "local"
    overrides: Sequence[str] = ()
    spec: str | os.PathLike[str] | Mapping[str, Any] | None = None
    parent_job_id: str | None = None
    data_source: str | os.PathLike[str] | Mapping[str, str] | None = None
    automl_policy: str | None = None
    words: str | None = None
    bundle: str | os.PathLike[str] | None = None
    checkpoint: str | int = "best"
    key_file: str | os.PathLike[str] | None = None
    address: str = ""


@dataclass
class Plan:
    """A job that can be launched: its record, its spec as dotted keys, and the encryption key if given by value."""

    job: Job
    values: dict[str, Any]
    key: str = field(default="", repr=False)


@dataclass
class _Draft:
    """The spec as it fills up; `origins` are those of the user's values."""

    values: dict[str, Any]
    origins: dict[str, str]
    parent: Parent | None = None
    inferred: dict[str, Any] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def infer(self, key: str, value: Any, notice: str = "") -> None:
        self.values[key] = value
        self.inferred[key] = value
        if notice and notice not in self.notices:
            self.notices.append(notice)

    def has_override(self, key: str) -> bool:
        return self.origins.get(key) == "override" and self.values.get(key) not in (None, "")


def plan_job(request: Request) -> Plan:
    """Decide all that a job needs, before anything is written. Raises SpecError with everything that is wrong.

    Overrides stand above what the job infers (its folder, its parent's model, a data source), and this above the spec
    file. A spec file's results folders are not used: every job has its own.
    """
    look_up(SPEC_PARAMS, request.action, "action")
    loaded, problems = _read(request)
    policy = _decide_policy(request)
    action = "automl" if policy and policy.uses_automl else request.action
    key, reference = _find_key(request, loaded.values, problems)
    draft = _Draft(_list_values(loaded), dict(loaded.origins), problems=problems)
    job_id = make_job_id()
    folder = find_folder(request.root, job_id)
    results_dir = _choose_folders(draft, action, folder)
    source = read_data_source(action, request.data_source, {key for key, value in draft.values.items() if value})
    _take_source(draft, source.values, source.notices, source.problems)
    _resolve(draft, request, action, folder, results_dir, reference)
    problems += find_missing_sources(action, _list_given(draft), problems)
    _check(draft, request, action)
    if problems:
        raise SpecError(*problems)
    job = Job(
        id=job_id,
        action=request.action,
        effective_action=action,
        runner=request.runner,
        created_at=get_time(),
        results_dir=results_dir,
        runner_address=request.address,
        parent_job_id=draft.parent.id if draft.parent else None,
        data_source=_describe_source(request.data_source),
        overrides=redact_overrides(request.overrides),
        inferred=draft.inferred,
        notices=draft.notices,
        policy=policy,
        encryption_key=reference,
        num_gpus=_count_gpus(loaded.values, action),
    )
    return Plan(job, draft.values, key)


def _read(request: Request) -> tuple[LoadedSpec[Spec], list[Problem]]:
    """The user's spec, and what is wrong with it."""
    try:
        return read_spec(request.spec, list(request.overrides)), []
    except SpecError as error:
        if error.partial is None:
            raise
        return error.partial, list(error.problems)


def _decide_policy(request: Request) -> PolicyRecord | None:
    """For a train request, whether it becomes a search. A bundle is looked at where one is given."""
    if request.action != "train":
        return None
    decision = resolve_automl_policy(request.words, request.automl_policy)
    if request.bundle is None:
        route = choose_route("train", decision)
    else:
        from kinegraph.bundle import check_bundle

        report = check_bundle(make_absolute(os.fspath(request.bundle), "bundle"))
        route = choose_route("train", decision, report.automl_enabled, report.not_runnable)
    return PolicyRecord(decision.policy, decision.origin, decision.reason, route.uses_automl, route.reason)


def _find_key(request: Request, spec: Spec, problems: list[Problem]) -> tuple[str, str]:
    """The key, if it was given by value, and where the action gets it from."""
    reference = ""
    if spec.encryption_key and request.key_file:
        problems.append(Problem("encryption_key", "a key and a key file", "one of them"))
    try:
        reference = find_key_reference(request.key_file)
        if reference.startswith(KEY_FROM_FILE) and request.runner == "local":
            read_key_file(reference)
    except UserError as error:
        problems += error.problems
    return spec.encryption_key, KEY_FROM_CALL if spec.encryption_key else reference


def _list_values(loaded: LoadedSpec[Spec]) -> dict[str, Any]:
    """What the user set, as dotted keys, without secrets; paths made absolute, since the job runs elsewhere."""
    values = {}
    for entry in list_options(Spec):
        if entry.key not in loaded.origins or entry.extra.get("secret"):
            continue
        value = get_value(loaded.values, entry.key)
        is_layout_file = entry.key == "model.graph_layout" and value not in LAYOUTS
        is_path = entry.extra.get("path") and value not in ("", "???")
        values[entry.key] = make_absolute(value) if is_path or is_layout_file else value
    return values


def _choose_folders(draft: _Draft, action: str, folder: str) -> str:
    """Leave only the results folders that an override names; gives the results folder of the action."""
    for key in OWN_FOLDERS:
        if not draft.has_override(key):
            draft.values.pop(key, None)
    own, asked = f"{action}.results_dir", "train.results_dir"
    if action == "automl" and asked in draft.values:
        folder_of_training = draft.values.pop(asked)
        if own not in draft.values:
            draft.infer(own, folder_of_training, f"the search takes the results folder of {asked}")
    base = draft.values.get("results_dir", folder)
    return str(draft.values.get(own) or remote.join(base, action))


def _take_source(draft: _Draft, values: dict[str, str], notices: list[str], problems: list[Problem]) -> None:
    for key, value in values.items():
        if draft.has_override(key):
            draft.notices.append(f"{key} is overridden: the data source is not used for it")
        else:
            draft.infer(key, value)
    draft.notices += notices
    draft.problems += problems


def _resolve(draft: _Draft, request: Request, action: str, folder: str, results_dir: str, reference: str) -> None:
    """Fill in the options of SPEC_PARAMS and what a foreign parent says of its model."""
    try:
        draft.parent = find_parent(request.root, request.parent_job_id)
        context = Context(
            action,
            folder,
            results_dir,
            draft.parent,
            parse_choice(request.checkpoint),
            draft.values.get(PRETRAINED, ""),
            draft.values.get(RESUME, ""),
            reference,
        )
    except UserError as error:
        draft.problems += error.problems
        return
    for key, name in SPEC_PARAMS[action].items():
        is_kept = draft.has_override(key) or (draft.values.get(key) and key not in (*CHECKPOINTS, PRETRAINED))
        if name == "key" or (is_kept and key != PRETRAINED):
            continue
        try:
            found = FUNCTIONS[name](context)
        except UserError as error:
            draft.problems += [replace(item, where=f"{key}: {item.where}") for item in error.problems]
            continue
        if found.value and found.value != draft.values.get(key):
            draft.infer(key, found.value, found.notice)
        elif not found.value and key == PRETRAINED and draft.values.pop(key, ""):
            draft.notices.append(f"{key} is not used: the job has a checkpoint of its own to go on from")
        if key in CHECKPOINTS and found.value:
            _inherit(draft, found.value)


def _inherit(draft: _Draft, model: str) -> None:
    for key, value in find_inherited(draft.parent, model).items():
        if key not in draft.values:
            draft.infer(key, value)


def _list_given(draft: _Draft) -> list[str]:
    return [key for key, value in draft.values.items() if value not in (None, "")]


def _check(draft: _Draft, request: Request, action: str) -> None:
    """What the action itself would refuse. Files are looked for only where they must be seen from here."""
    told = " ".join(problem.where for problem in draft.problems)
    for key in CHECKPOINTS:
        if key in REQUIRED[action] and not draft.values.get(key) and key not in told:
            hint = f"Name the training as parent_job_id, or set {key}."
            draft.problems.append(Problem(key, "nothing", "a model", hint))
            told += f" {key}"
    try:
        read_spec(nest(draft.values), (), action if request.runner == "local" else None)
    except SpecError as error:
        draft.problems += [item for item in error.problems if _find_key_of(item) not in told]


def _find_key_of(problem: Problem) -> str:
    """The option that a problem is about: its place is KEY, KEY (origin) or FILE: KEY."""
    return problem.where.rpartition(": ")[2].split(" ")[0]


def _describe_source(source: str | os.PathLike[str] | Mapping[str, str] | None) -> str | dict[str, str] | None:
    if source is None:
        return None
    if isinstance(source, Mapping):
        return {str(key): make_absolute(os.fspath(path)) for key, path in source.items()}
    return make_absolute(os.fspath(source))


def _count_gpus(spec: Spec, action: str) -> int:
    """GPUs that a cluster reserves for the job itself; trials on a cluster reserve their own."""
    if action not in ("train", "automl") or spec.train.accelerator != "gpu":
        return 0
    if action == "train":
        return spec.train.num_gpus
    return 0 if spec.automl.engine == "ray" else spec.train.num_gpus * max(1, spec.automl.automl_max_concurrent)
