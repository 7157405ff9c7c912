"""`kinegraph jobs ...`: actions that go on by themselves, with a record, and find each other's results."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from kinegraph.cli.answers import format_number, make_printable, print_json, say
from kinegraph.cli.parameters import AsJson, Key, Overrides, SpecFile, collect_overrides
from kinegraph.errors import Problem, UserError

FAILED_EXIT_CODE = 1
STILL_RUNNING_EXIT_CODE = 3
SHORT_ID = 8

app = typer.Typer(
    help="Run actions as jobs that go on by themselves and find each other's results.",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

JobId = Annotated[str, typer.Argument(metavar="JOB_ID", help="The id of a job, or its first characters.")]
Root = Annotated[
    str | None,
    typer.Option(
        "--root",
        metavar="FOLDER",
        help="Folder of all jobs, or s3://bucket/prefix; default KINEGRAPH_JOBS_ROOT, else ./jobs.",
        show_default=False,
    ),
]
JobAction = Annotated[
    str, typer.Argument(metavar="ACTION", help="train, automl, evaluate, inference, export or dataset_convert.")
]
ParentId = Annotated[
    str | None,
    typer.Option("--parent", metavar="JOB_ID", help="Job whose model is used.", show_default=False),
]
DataSource = Annotated[
    list[str] | None,
    typer.Option(
        "--data-source",
        metavar="FOLDER",
        help="Folder or s3:// prefix with train_data.npy, train_label.pkl, val_*, test_*; or KEY=PATH, several times.",
        show_default=False,
    ),
]
RunnerName = Annotated[str, typer.Option("--runner", metavar="NAME", help="local or ray.")]
Address = Annotated[
    str | None,
    typer.Option("--address", metavar="URL", help="Ray cluster; default RAY_ADDRESS.", show_default=False),
]
Checkpoint = Annotated[
    str, typer.Option("--checkpoint", metavar="WHICH", help="Of the parent: best, latest or an epoch (from 0).")
]
KeyFile = Annotated[
    str | None,
    typer.Option("--key-file", metavar="FILE", help="File with the encryption key.", show_default=False),
]
AutomlPolicy = Annotated[
    str | None,
    typer.Option("--automl-policy", metavar="POLICY", help="train: auto, on or off.", show_default=False),
]
RequestWords = Annotated[
    str | None,
    typer.Option("--request", metavar="TEXT", help="train: the request in words, for the policy.", show_default=False),
]
Bundle = Annotated[
    str | None,
    typer.Option("--bundle", metavar="FOLDER", help="train: skill bundle to check for AutoML.", show_default=False),
]
Wait = Annotated[bool, typer.Option("--wait", help="Wait for the end of the job.")]
Timeout = Annotated[
    float | None,
    typer.Option("--timeout", metavar="SECONDS", help="With --wait: no longer than this.", show_default=False),
]
Tail = Annotated[
    int | None, typer.Option("--tail", "-n", metavar="LINES", help="Only the last lines.", show_default=False)
]


@app.command(help="Start an action as a job. A train request becomes an AutoML search unless the policy is off.")
def submit(
    action: JobAction,
    overrides: Overrides = None,
    spec: SpecFile = None,
    parent: ParentId = None,
    data_source: DataSource = None,
    checkpoint: Checkpoint = "best",
    runner: RunnerName = "local",
    address: Address = None,
    root: Root = None,
    automl_policy: AutomlPolicy = None,
    request: RequestWords = None,
    bundle: Bundle = None,
    key: Key = None,
    key_file: KeyFile = None,
    wait: Wait = False,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    from kinegraph.jobs import create_job

    _check_timeout(wait, timeout)
    job = create_job(
        action,
        collect_overrides(overrides, None, key),
        parent,
        _read_data_source(data_source),
        runner,
        spec=spec,
        root=root,
        automl_policy=automl_policy,
        request=request,
        bundle=bundle,
        checkpoint=checkpoint,
        key_file=key_file,
        address=address,
    )
    for notice in job.notices:
        say(f"notice: {notice}")
    if not as_json:
        _show(f"Job {job.id}: {job.effective_action} on the {job.runner} runner.")
        if job.policy:
            _show(f"AutoML: {'yes' if job.policy.uses_automl else 'no'}. {job.policy.route_reason}.")
        _show(f"Results: {job.results_dir}")
    _answer(job.id, root, wait, timeout, as_json, is_new=True)


@app.command(help="Show how far a job is.")
def status(
    job_id: JobId, root: Root = None, wait: Wait = False, timeout: Timeout = None, as_json: AsJson = False
) -> None:
    _check_timeout(wait, timeout)
    _answer(job_id, root, wait, timeout, as_json)


@app.command(help="Show what a job said.")
def logs(job_id: JobId, root: Root = None, tail: Tail = None, as_json: AsJson = False) -> None:
    from kinegraph.jobs import get_job_logs

    text = get_job_logs(job_id, root, tail)
    if as_json:
        print_json({"status": "ok", "job_id": job_id, "text": text})
    else:
        _show(text, end="" if text.endswith("\n") or not text else "\n")


@app.command(help="Stop a job.")
def cancel(job_id: JobId, root: Root = None, as_json: AsJson = False) -> None:
    from kinegraph.jobs import cancel_job

    job = cancel_job(job_id, root)
    if as_json:
        print_json({"status": "ok", "job": job.as_data()})
    else:
        _show(_format_state(job))
    if not job.has_ended:
        say(f"The stop is asked for; {job.host or 'the cluster'} carries it out.")


@app.command("list", help="List the jobs, the newest first.")
def list_all(root: Root = None, as_json: AsJson = False) -> None:
    from kinegraph.jobs import list_jobs
    from kinegraph.run import show_messages

    show_messages()
    jobs = list_jobs(root)
    if as_json:
        print_json({"status": "ok", "jobs": [job.as_data() for job in jobs]})
        return
    for job in jobs:
        parent = f"  of {job.parent_job_id[:SHORT_ID]}" if job.parent_job_id else ""
        _show(f"{job.id[:SHORT_ID]}  {job.created_at[:19]}  {job.effective_action:<16}{job.status:<10}{parent}")
    if not jobs:
        say("No jobs here. `kinegraph jobs submit ACTION` starts one.")


@app.command(help="Give the value that one spec param would have for a job.")
def resolve(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Such as parent_model or create_onnx_file.")],
    action: Annotated[str, typer.Option("--action", metavar="ACTION", help="The action that asks.")] = "train",
    job: Annotated[
        str | None, typer.Option("--job", metavar="JOB_ID", help="The job itself.", show_default=False)
    ] = None,
    parent: ParentId = None,
    checkpoint: Checkpoint = "best",
    pretrained_model: Annotated[
        str, typer.Option("--pretrained-model", metavar="FILE", help="For ptm_if_no_resume_model.", show_default=False)
    ] = "",
    key_file: KeyFile = None,
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    from kinegraph.jobs import resolve_spec_param

    value = resolve_spec_param(
        name,
        action=action,
        root=root,
        job_id=job,
        parent_job_id=parent,
        checkpoint=checkpoint,
        pretrained_model=pretrained_model,
        key_file=key_file,
    )
    print_json({"status": "ok", "name": name, "value": value}) if as_json else _show(value)


def _answer(
    job_id: str, root: str | None, wait: bool, timeout: float | None, as_json: bool, is_new: bool = False
) -> None:
    """Print the state of a job. The exit code tells a failed job (1) and one that a wait did not see end (3)."""
    from kinegraph.jobs import get_job_status, wait_for_job

    job = wait_for_job(job_id, root, timeout) if wait else get_job_status(job_id, root)
    if as_json:
        print_json({"status": "ok", "job": job.as_data()})
    elif wait or not is_new:
        _show(_format_state(job))
    if wait and job.status != "Complete":
        raise typer.Exit(FAILED_EXIT_CODE if job.has_ended else STILL_RUNNING_EXIT_CODE)


def _check_timeout(wait: bool, timeout: float | None) -> None:
    if timeout is None:
        return
    if not wait:
        raise UserError(Problem("--timeout", "a time without --wait", "both or none of them", "Add --wait."))
    if not timeout >= 0:  # NaN is not
        raise UserError(Problem("--timeout", str(timeout), "seconds, at least 0"))


def _show(text: str, end: str = "\n") -> None:
    """Print what comes from a record or a log: others may have written it."""
    print(make_printable(text), end=end)


def _format_state(job: Any) -> str:
    lines = [f"Job {job.id}: {job.effective_action} is {job.status}." + (f" {job.message}" if job.message else "")]
    if "epoch" in job.progress and "max_epoch" in job.progress:
        done, num_epochs = job.progress["epoch"] + 1, job.progress["max_epoch"] + 1
        lines.append(f"  epoch {done} of {num_epochs} is done, {job.progress.get('eta', '?')} left")
    numbers = {name: value for name, value in job.metrics.items() if isinstance(value, int | float)}
    lines += [f"  {name}: {format_number(value)}" for name, value in numbers.items()]
    lines += [f"  {role}: {path}" for role, path in job.files.items()]
    return "\n".join(lines)


def _read_data_source(given: list[str] | None) -> str | dict[str, str] | None:
    """One folder, or KEY=PATH texts."""
    if not given:
        return None
    pairs = [text.partition("=") for text in given]
    if len(given) == 1 and not (pairs[0][1] and "." in pairs[0][0] and "/" not in pairs[0][0]):
        return given[0]
    return {key: path for key, _, path in pairs}
