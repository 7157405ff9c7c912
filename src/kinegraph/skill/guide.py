# ruff: noqa: E501 (prose and tables of Markdown, and commands in one line)
"""SKILL.md: what an agent reads that has never seen Kinegraph. Its commands are run by tests/test_skill.py."""

from __future__ import annotations

from kinegraph.config import list_options
from kinegraph.skeleton.layouts import LAYOUTS
from kinegraph.skill.info import SKILL_NAME
from kinegraph.skill.tao_schema import list_searched
from kinegraph.spec import Spec

DESCRIPTION = (
    "Train, tune, evaluate, export and run classifiers of human motion from skeleton sequences with Kinegraph. "
    "Use it when there are .npy arrays of joints with labels, or a body-pose recording, and somebody wants an action "
    "recognition model, its metrics, predictions, or an ONNX file. Reads TAO pose classification specs, data and models."
)

EXIT_CODES: dict[int, str] = {
    0: "done",
    1: "it failed while running: a full disk, a lost connection, a failed job; read the message, then run it again",
    2: "a mistake in what was asked: every problem is told at once; mend them all, then run it again",
    3: "`jobs ... --wait --timeout S`: the job has not ended yet and goes on",
    130: "interrupted (Ctrl-C)",
    143: "terminated (SIGTERM)",
}

_TEXT = """\
---
name: {name}
description: >-
  {description}
license: Apache-2.0
metadata:
  generated_by: kinegraph skill build
---

# Kinegraph: classify human motion from skeletons

Arrays of joints over time go in, an action for each clip comes out. Everything is a command with `--json`; nothing asks
questions when no terminal is there, nothing is downloaded at run time, and a stopped command goes on when it is run again.

## When to use it

- There are skeleton clips: `.npy`, float32, axes (N, C, T, V, M) = clips, channels (x, y, z), frames, joints, people, and labels
  in `.csv` (columns name, label), `.json`, `.npz` or `.pkl`. Or a recording of DeepStream's body-pose-3D app (`.json`).
- Somebody wants a classifier of actions, its accuracy, predictions, or an ONNX file; or has specs, data or checkpoints of
  TAO's `pose_classification`: they work unchanged, and so does that command name.
- Not for raw video (run a pose detector first), not for images, not for one single pose.

## Install

```text
pip install kinegraph            # Python 3.11+; brings torch. For a machine without GPU take torch's CPU wheel first
pip install 'kinegraph[s3]'      # s3:// paths
pip install 'kinegraph[ray]'     # jobs and searches on a Ray cluster
```

Offline: collect the wheels on a machine with a network (`pip download kinegraph -d wheels`), copy the folder, then
`pip install --no-index --find-links wheels kinegraph`. `kinegraph --version` tells whether it is there.

## Placeholders

Replace these in every command below. The values are examples that work as they stand, small enough to try.

| placeholder | example | meaning |
|---|---|---|
| `{data}` | `data` | folder with train_data.npy, train_label.pkl, val_*, test_* (labels also .json, .npz, .csv) |
| `{layout}` | `nvidia` | joints and edges: one of LAYOUTS; or a .yaml file |
| `{results}` | `results` | folder for results; `s3://bucket/prefix` works too |
| `{epochs}` | `1` | epochs of a trial run. For a real one leave out `train.num_epochs`: the recipe has its own number |
| `{trials}` | `2` | trials of a search; 20 and more for a real one |
| `{request}` | `train a classifier on my clips` | what the user said, in their words |
| `{recording}` | `data/recording.json` | a body-pose-3D recording |
| `{s3_data}` | `s3://bucket/data` | where the same files lie on object storage |

Nothing at hand? This writes generated clips of 6 actions, and recording.json:

```sh
kinegraph sample {data} --clips 24 --json > sample.json
```

## 1. Look at the data, write a spec

```sh
kinegraph inspect {data}/train_data.npy {data}/train_label.pkl --json > inspect.json
kinegraph layouts --json > layouts.json
kinegraph template train -o train.yaml
```

`inspect.json`: `problems` should be empty; `layouts` names those that fit the number of joints. `train.yaml` has every option with its
meaning, with the values of the recipe `small` (`--recipe balanced`, `best`, `online` for frame by frame, `tao` for ST-GCN as in TAO); each `???` needs a value, in the file or as `key=value` on the command line. Classes are taken from the labels. Keep
people of the test apart from those of training and validation: validation chooses the best epoch, the test chooses nothing.

```sh
FILES="dataset.train_dataset.data_path={data}/train_data.npy dataset.train_dataset.label_path={data}/train_label.pkl"
FILES="$FILES dataset.val_dataset.data_path={data}/val_data.npy dataset.val_dataset.label_path={data}/val_label.pkl"
OPTIONS="model.graph_layout={layout} train.num_epochs={epochs} dataset.num_workers=0"
kinegraph validate -e train.yaml --action train $FILES $OPTIONS --json > validate.json
```

## 2. Train: AutoML unless told otherwise

A request to train is a search for good options (AutoML) unless the user does not want that. Pass the user's own words as
`--request`, or decide yourself with `--automl-policy auto|on|off`, which wins over the words:

- "turn off AutoML", "no HPO", "plain training", "just one run" and the like mean off, for this request only. "Don't disable AutoML" does
  not. Quoted text does not count. Doubt and contradictions mean auto.
- auto and on go to the search if it is enabled and runnable; otherwise the training is plain, and the answer says why (`--bundle DIR` checks
  a skill bundle for that). `job.policy` in the answer holds `policy`, `origin`, `reason`, `uses_automl` and `route_reason`: tell the user.
- evaluate, inference, export and dataset_convert never go to the search. `kinegraph train` itself always trains once.
- All overrides pass through to what runs.

See what a search would do, and how long it takes, before it starts. Say so to the user if it is long:

```sh
kinegraph automl -e train.yaml $FILES $OPTIONS automl.automl_max_recommendations={trials} --dry-run --json > plan.json
kinegraph automl --algorithms --json > algorithms.json
```

Searched by default, where they have an effect: SEARCHED. Trial 0 is the spec as it
stands. `automl.automl_hyperparameters=[+train.optim.lr_scheduler,-model.dropout]` adds and removes; `automl.automl_fixed=[KEY]` locks;
`automl.custom_param_ranges={train.optim.lr: {valid_min: 0.001, valid_max: 0.1}}` sets a range (YAML: quote it for the shell).

Run it as a job: it goes on when the caller ends, and later jobs find its model by its id.

```sh
job_id() { python -c "import json, sys; print(json.load(sys.stdin)['job']['id'])"; }
TRAIN=$(kinegraph jobs submit train -e train.yaml --data-source {data} --request "{request}" $OPTIONS \\
  automl.automl_max_recommendations={trials} --json | job_id)
kinegraph jobs status $TRAIN --wait --json > train_job.json
kinegraph jobs logs $TRAIN --tail 20
```

`--data-source` is a folder, an s3:// prefix or KEY=PATH; it fills in the file names. Without `--wait` poll `kinegraph jobs status ID --json`
(`job.status`: Pending, Running, Complete, Error, Canceled). `kinegraph jobs cancel ID` stops a job.

## 3. Evaluate, export, classify: child jobs

`--parent` gives the best checkpoint of the training (of the best trial after a search; `--checkpoint latest` or an epoch gives another),
or the ONNX file of an export. Classes and layout come from the checkpoint: do not repeat them.

```sh
EVALUATE=$(kinegraph jobs submit evaluate --parent $TRAIN --data-source {data} --wait --json | job_id)
EXPORT=$(kinegraph jobs submit export --parent $TRAIN --wait --json | job_id)
INFERENCE=$(kinegraph jobs submit inference --parent $EXPORT --data-source {data} --wait --json | job_id)
kinegraph jobs status $EVALUATE --json > evaluate_job.json
kinegraph jobs list --json > jobs.json
```

As a job evaluate measures val_data.npy of the folder; name other files with `evaluate.test_dataset.data_path=...` and `.label_path=...`.

## The same without jobs

```sh
BEST={results}/train/pc_model_best.pth
TEST="evaluate.test_dataset.data_path={data}/test_data.npy evaluate.test_dataset.label_path={data}/test_label.pkl"
kinegraph train -e train.yaml $FILES $OPTIONS results_dir={results} --json > train.json
kinegraph evaluate results_dir={results} evaluate.checkpoint=$BEST $TEST --json > evaluate.json
kinegraph export results_dir={results} export.checkpoint=$BEST export.onnx_file={results}/model.onnx --json > export.json
kinegraph inference results_dir={results} inference.checkpoint={results}/model.onnx \\
  inference.test_dataset.data_path={data}/test_data.npy --json > inference.json
```

## Run the ONNX file without torch, and check it against the metrics

```python
import json
import kinegraph, numpy, onnxruntime
from kinegraph.data.labels import read_labels

clips = numpy.load("{data}/test_data.npy")  # float32 (N, C, T, V, M); one clip (C, T, V, M) will do for predict
model = kinegraph.load("{results}/model.onnx")  # onnxruntime behind it, torch is not imported
answer = model.predict(clips)
print(answer.class_names[:3], answer.probabilities.max(axis=1)[:3])

session = onnxruntime.InferenceSession("{results}/model.onnx")  # the network alone, which gets what the pipeline makes
logits = session.run(["fc_pred"], {"input": model.pipeline(clips)})[0]
labels = numpy.asarray(read_labels("{data}/test_label.pkl").labels)
accuracy = round(100 * float((logits.argmax(axis=1) == labels).mean()), 2)
assert accuracy == json.load(open("{results}/evaluate/metrics.json"))["accuracy"], accuracy
```

`labels.txt` beside the ONNX file holds the class names in the order of the logits.

## From a recording

```sh
kinegraph dataset_convert dataset_convert.data={recording} results_dir={results} --json > convert.json
kinegraph inference results_dir={results}/recording inference.checkpoint={results}/model.onnx \\
  inference.test_dataset.data_path={results}/dataset_convert/data.npy --json > windows.json
```

One array for each person, all windows in `data.npy`, and `index.json`, which says which person, frames and times each window holds.
Labels must come from you: one for each window of `index.json`.

## Object storage

Every path may be `s3://...`: data is cached, results are uploaded as they appear. Credentials only from the environment (AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL for other servers) or the AWS configuration; never in a URI or a spec.

```sh s3
kinegraph inference results_dir={results}/s3 inference.checkpoint={results}/model.onnx \\
  inference.test_dataset.data_path={s3_data}/test_data.npy --json > s3.json
```

## Read results as data

`--json` prints one JSON object on stdout: `status` is ok or error. An error has `exit_code` and `problems`, each with `where`, `got`, `expected`
and `hint`. Progress and messages go to stderr; `--json-progress` makes them JSON lines there (`event`: message, progress, status).

| command | fields beside status |
|---|---|
| `inspect` | `shape`, `layouts`, `classes`, `lengths`, `problems` |
| `validate` | `action`, `values` (key: value and origin of what differs from the defaults) |
| an action | `action`, `metrics`, `files` (role: path; the results folder is among them) |
| `automl --dry-run` | `plan`: `algorithm`, `max_trials`, `searched`, `first_trials`, `estimated_seconds` |
| `automl --algorithms` | `algorithms`: `name`, `engines`, `help` |
| `jobs submit`, `status`, `cancel` | `job`: `id`, `status`, `message`, `effective_action`, `policy`, `results_dir`, `metrics`, `files` |
| `jobs list` | `jobs`: the same, newest first |
| `skill check` | `parsed`, `missing`, `problems`, `automl_enabled`, `automl_runnable`, `not_runnable` |

Metrics: train `val_acc`, `best`; evaluate `accuracy`, `avg_accuracy`, `macro_f1` in percent; export `max_abs_error` against PyTorch.

| file in a results folder | by |
|---|---|
| `experiment.yaml`, `status.json` (JSON lines, the last is SUCCESS or FAILURE), `log.txt` | every action |
| `pc_model_best.pth`, `pc_model_latest.pth`, `model_epoch_*.pth`, `best.json`, `metrics.csv` | train |
| `metrics.json` (total and for each class, confusion matrix), `confusion_matrix.png`, `predictions.csv` | evaluate |
| `results.txt` (one class a line), `results.csv`, `results.json` | inference |
| `best_rec.json`, `best_spec.yaml`, `all_trials.csv`, `pc_model_best.pth`, plots, `trial_000/` ... | automl |
| `job.json` (the record), `spec.yaml`, `log.txt`, and the action's folder | a job, in `jobs/ID/` |

## After a kill or a restart

Run the same command with the same results_dir again: a training goes on from its newest checkpoint and ends with the same weights; a
search keeps finished trials and continues running ones. More epochs later: the same command with a higher `train.num_epochs`. A job whose machine
went down becomes Error; submit it again (`train.resume_training_checkpoint_path=FILE` goes on from a checkpoint).

## Errors and what to do

Each line is `where: got what, expected what.` and a hint. All problems of a spec come together.

| message holds | do |
|---|---|
ERRORS

## Exit codes

| code | meaning |
|---|---|
CODES

More: `kinegraph COMMAND --help`; `references/spec_template_<action>.yaml` (every option), `schemas/json/<action>.json` (JSON Schema 2020-12
for editors), `schemas/<action>.schema.json` (TAO's form, with search ranges), `references/skill_info.yaml` (actions, inputs, data sources).
"""

ERRORS: dict[str, str] = {
    "got nothing, expected a value": "a mandatory option: set it in the spec or add key=value to the command",
    "the unknown key": "a misspelt option; take the suggested one, or look into the template",
    "which does not exist": "a wrong path: paths are taken from the folder where the command runs",
    "expected at least": "a value out of range; the template tells the range",
    "joints in shape": "the layout does not fit the data: take one that the hint names, or write a layout file",
    "labels, expected": "labels and clips differ in number: they belong to different files",
    "a file that is there already": "add export.overwrite=true, or name another file",
    "an encrypted checkpoint and no key": "set KINEGRAPH_ENCRYPTION_KEY; never put a key on a command line",
    "which this action cannot do without": "a job without data: add --data-source FOLDER or set the option",
    "job id: got": "no such job under this root: `kinegraph jobs list`, and --root or KINEGRAPH_JOBS_ROOT",
    "AutoML is enabled but not runnable until schemas are generated": (
        "plain training was done; `kinegraph skill build DIR` makes a whole bundle"
    ),
    "expected one of": "a word that is no choice; take one of the list",
}
"""Part of a message of ours -> what to do. tests/test_skill.py brings each about."""


def build_guide() -> str:
    """The text of SKILL.md."""
    searched = ", ".join(f"`{key}`" for key in list_searched({entry.key: entry for entry in list_options(Spec)}))
    errors = "\n".join(f"| `{message}` | {advice} |" for message, advice in ERRORS.items())
    codes = "\n".join(f"| {code} | {meaning} |" for code, meaning in EXIT_CODES.items())
    replaced = {
        "{name}": SKILL_NAME,
        "{description}": DESCRIPTION,
        "LAYOUTS": ", ".join(LAYOUTS),
        "SEARCHED": searched,
        "ERRORS": errors,
        "CODES": codes,
    }
    text = _TEXT
    for mark, value in replaced.items():
        text = text.replace(mark, value)
    return text
