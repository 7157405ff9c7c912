"""Commands that help to write a spec and to look at data: from validate to demo."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from kinegraph.cli.actions import EXIT_TERMINATED
from kinegraph.cli.answers import deliver, format_json, format_result, print_json
from kinegraph.cli.parameters import ActionName, AsJson, OutputFile, Overrides, SpecFile, check_action

app = typer.Typer()


@app.command(help="Check a spec without running anything.")
def validate(
    overrides: Overrides = None,
    spec: SpecFile = None,
    action: Annotated[
        str | None,
        typer.Option("--action", metavar="ACTION", help="Also check what this action needs.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    from kinegraph.actions import find_recipe_of
    from kinegraph.config import find_changes
    from kinegraph.config_source import nest
    from kinegraph.recipes import find_recipe
    from kinegraph.spec_reading import read_spec

    if action is not None:
        check_action(action)
    recipe = find_recipe_of(action or "", spec, overrides or [])
    loaded = read_spec(nest(find_recipe(recipe).values) if recipe else spec, overrides or [], action)
    changes = find_changes(loaded)
    if as_json:
        values = {key: {"value": value, "origin": loaded.origins.get(key, "default")} for key, value in changes.items()}
        print_json({"status": "ok", "action": action, "recipe": recipe or None, "values": values})
        return
    name = spec or (f"the recipe {recipe} with the overrides" if recipe else "the overrides")
    print(f"OK: {name}, ready for {action}." if action else f"OK: {name}. --action checks what an action needs.")
    if changes:
        print("\nOther than the defaults:")
    for key, value in changes.items():
        origin = " (override)" if loaded.origins.get(key) == "override" else ""
        print(f"  {key} = {json.dumps(value, ensure_ascii=False)}{origin}")


@app.command(help="Write a commented spec to fill in.")
def template(
    action: ActionName,
    output: OutputFile = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            metavar="NAME",
            help="For train and automl: small (default), balanced, best, online, tao.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    from kinegraph.actions import TRAINING
    from kinegraph.errors import Problem, UserError
    from kinegraph.recipes import DEFAULT_RECIPE, find_recipe
    from kinegraph.templates import build_template

    check_action(action)
    if recipe is not None and action not in TRAINING:
        raise UserError(
            Problem("--recipe", f"the action {action}", "train or automl", "A checkpoint knows its recipe.")
        )
    chosen = recipe or (DEFAULT_RECIPE if action in TRAINING else "tao")
    text = build_template(action, find_recipe(chosen).values)
    answer = {"action": action, "recipe": chosen, "template": text}
    deliver(text, output, answer if as_json else None)


@app.command(help="Write the JSON Schema of a spec.")
def schema(action: ActionName, output: OutputFile = None, as_json: AsJson = False) -> None:
    from kinegraph.templates import build_schema

    check_action(action)
    built = build_schema(action)
    deliver(format_json(built), output, {"action": action, "schema": built} if as_json else None)


@app.command(help="List the skeleton layouts, or show one.")
def layouts(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A name or a YAML file.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    from kinegraph.skeleton.layouts import LAYOUTS, get_layout

    if name is not None:
        layout = get_layout(name, "layout")
        shown = [layout]
        text = _format_layout(layout)
    else:
        shown = list(LAYOUTS.values())
        lines = [
            f"{layout.name:<16}{layout.num_joints:>3} joints, centre {layout.joints[layout.centre]}" for layout in shown
        ]
        more = "`kinegraph layouts NAME` shows one. A layout of your own: model.graph_layout: my_layout.yaml"
        text = "\n".join([*lines, "", more])
    if as_json:
        print_json({"status": "ok", "layouts": [layout.to_dict() for layout in shown]})
    else:
        print(text)


@app.command(help="Show what is in a data set.")
def inspect(
    data: Annotated[str, typer.Argument(metavar="DATA.npy", help="Array (N, C, T, V, M).")],
    labels: Annotated[
        str | None, typer.Argument(metavar="LABELS", help="Labels: .pkl, .json, .npz or .csv.", show_default=False)
    ] = None,
    augment: Annotated[
        bool, typer.Option("--augment", help="Draw what each augmentation does to a clip, into the file of -o.")
    ] = False,
    output: OutputFile = None,
    layout: Annotated[
        str | None,
        typer.Option("--layout", metavar="NAME", help="With --augment: the layout, where several have as many joints."),
    ] = None,
    clip: Annotated[
        int | None,
        typer.Option("--clip", metavar="N", help="With --augment: which clip, from 0.", show_default="0"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    from kinegraph.data.inspect import format_report, inspect_dataset
    from kinegraph.errors import Problem, UserError
    from kinegraph.remote import fetch

    if augment or output is not None:
        _draw_augmentations(data, labels, augment, output, layout, clip or 0, as_json)
        return
    alone = [name for name, value in (("--clip", clip), ("--layout", layout)) if value is not None]
    if alone:
        got = "no --augment"
        raise UserError(
            Problem(", ".join(alone), got, "--augment: they say what it draws", "Add --augment -o FILE.png.")
        )
    files = {location: str(fetch(location)) for location in (data, labels) if location}
    text = format_json(inspect_dataset(*files.values()))
    for location, path in files.items():  # the user's names, not those of the cache
        text = text.replace(json.dumps(path)[1:-1], json.dumps(location)[1:-1])
    report = json.loads(text)
    print_json({"status": "ok", **report}) if as_json else print(format_report(report))


def _draw_augmentations(
    data: str,
    labels: str | None,
    augment: bool,
    output: str | None,
    layout: str | None,
    clip: int,
    as_json: bool,
) -> None:
    from kinegraph.data.labels import read_labels
    from kinegraph.errors import Problem, UserError
    from kinegraph.remote import fetch

    if output is None or not augment:
        got = "no file" if output is None else "a file without --augment"
        raise UserError(Problem("-o", got, "a PNG file to draw into with --augment", "Add --augment -o FILE.png."))
    from kinegraph.data.augment_picture import draw_augmentations

    class_names = (read_labels(fetch(labels)).class_names or []) if labels else []
    names = draw_augmentations(fetch(data), Path(output), layout, clip, class_names)
    if as_json:
        print_json({"status": "ok", "augmentations": names, "files": {"picture": output}})
    else:
        print(format_result({}, {"picture": output}))


@app.command(help="Write generated clips and a recording to try things on.")
def sample(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="Where the files go.")],
    clips: Annotated[int, typer.Option("--clips", metavar="N", help="Training clips; half as many for the rest.")] = 60,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Other people and movements.")] = 1,
    as_json: AsJson = False,
) -> None:
    from kinegraph.data.synthetic import make_recording, write_dataset
    from kinegraph.storage import write_atomically

    files = write_dataset(Path(folder), clips, clips // 2, clips // 2, seed)
    files["recording"] = Path(folder) / "recording.json"
    with write_atomically(files["recording"], "w") as file:
        json.dump(make_recording(120, 1, seed), file)
    shown = {role: str(path) for role, path in files.items()}
    print_json({"status": "ok", "files": shown}) if as_json else print(format_result({}, shown))


@app.command(help="Try every action on generated data; takes some minutes.")
def demo(
    folder: Annotated[
        str, typer.Option("--folder", metavar="FOLDER", help="Where everything goes.")
    ] = "kinegraph-demo",
    as_json: AsJson = False,
) -> None:
    from kinegraph.demo import run_demo
    from kinegraph.run import Terminated

    try:
        with redirect_stdout(sys.stderr) if as_json else nullcontext():
            result = run_demo(Path(folder))
    except Terminated:
        raise typer.Exit(EXIT_TERMINATED) from None
    if as_json:
        print_json({"status": "ok", "metrics": result.metrics, "files": result.files})


def _format_layout(layout: Any) -> str:
    def name_pairs(pairs: Sequence[tuple[int, int]], sign: str) -> str:
        return ", ".join(f"{layout.joints[first]} {sign} {layout.joints[second]}" for first, second in pairs)

    lines = [f"{layout.name}: {layout.num_joints} joints, centre {layout.centre} ({layout.joints[layout.centre]})"]
    lines += ["", "Joints"]
    lines += [f"  {index:>3}  {joint}" for index, joint in enumerate(layout.joints)]
    lines += ["", "Edges", "  " + ", ".join(f"{first}-{second}" for first, second in layout.edges)]
    lines += ["", "Bones (child > parent)", "  " + name_pairs(layout.bones, ">")]
    lines += ["", "Symmetric", "  " + (name_pairs(layout.symmetric, "|") or "none")]
    return "\n".join(lines)
