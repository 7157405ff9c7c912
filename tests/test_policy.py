"""AutoML or plain training: what a request asks for, in the words that people use, and where it goes."""

from __future__ import annotations

import pytest

from kinegraph.errors import UserError
from kinegraph.policy import PolicyDecision, choose_route, resolve_automl_policy

REQUESTS: list[tuple[str, str]] = [
    # against it
    ("Turn off AutoML.", "off"),
    ("turn off AutoML and train for 30 epochs", "off"),
    ("Please switch AutoML off for this one.", "off"),
    ("Disable AutoML", "off"),
    ("no HPO", "off"),
    ("No HPO please, train on train.yaml", "off"),
    ("plain training", "off"),
    ("I want plain training on the files in data/", "off"),
    ("Train ST-GCN without hyper-parameter search.", "off"),
    ("Train without hyperparameter optimisation and then export to ONNX", "off"),
    ("Fit the model, just one run.", "off"),
    ("train once", "off"),
    ("Train the model once with lr 0.05", "off"),
    ("Only one training run, I am in a hurry", "off"),
    ("A single run is enough for now.", "off"),
    ("Don't use AutoML", "off"),
    ("dont use automl pls", "off"),
    ("It doesn't need AutoML", "off"),
    ("We don't need any tuning here.", "off"),
    ("Do not run a hyperparameter sweep.", "off"),
    ("never use auto-ml in this project", "off"),
    ("AutoML should not be used", "off"),
    ("AutoML is not needed.", "off"),
    ("train on the UCLA files, AutoML off", "off"),
    ("automl_policy: off", "off"),
    ("Use train.yaml with automl=off", "off"),
    ("Skip the HPO and go straight to training", "off"),
    ("Skip any hyper-parameter tuning", "off"),
    ("Train with AutoML disabled", "off"),
    ("I have no time for AutoML today", "off"),
    ("There is no need for a hyper-parameter search", "off"),
    ("use plain training instead of AutoML", "off"),
    ("no AutoML or HPO", "off"),
    ("Neither AutoML nor sweeps", "off"),
    ("Can you train this without AutoML?", "off"),
    ("Could you turn off AutoML for this run?", "off"),
    ("Leave AutoML out this time.", "off"),
    ("Train with the layout coco. Use 4 workers. And no auto ml.", "off"),
    ("The data is in s3://bucket/set. I already know good settings. Don't tune anything.", "off"),
    ("AutoML takes too long, so turn it off", "off"),
    ("I know AutoML is the default, but don't use it", "off"),
    ("Don't forget to disable AutoML", "off"),
    ("No GPU here, and no AutoML either", "off"),
    ("Keep the hyperparameters fixed", "off"),
    ("don't touch the hyper-parameters", "off"),
    ("Use AutoML. Actually, scratch that: no AutoML.", "off"),
    ("Hi! I would like to train a classifier on my clips; a vanilla training run will do.", "off"),
    ("please don't, under any circumstances, use AutoML", "off"),
    ("avoid HPO if possible", "off"),
    ("I don't want you to run AutoML", "off"),
    ("I do not think we need HPO", "off"),
    ("Same as last time: no AutoML", "off"),
    ("train w/o automl", "off"),
    ("train with --no-automl", "off"),
    ("'train without HPO'", "off"),
    ("No tuning\nNo sweeps\nTrain 20 epochs", "off"),
    ("Get rid of the hyperparameter search", "off"),
    ("HPO is overkill for this data", "off"),
    # for it
    ("Use AutoML", "on"),
    ("use automl to find a good learning rate", "on"),
    ("Tune the model on these clips", "on"),
    ("tune lr and dropout", "on"),
    ("Search hyperparameters for me", "on"),
    ("Find the best hyper-parameters", "on"),
    ("Do not disable AutoML", "on"),
    ("don't turn off AutoML", "on"),
    ("Don't skip the hyper-parameter search!", "on"),
    ("Please run HPO with 20 trials", "on"),
    ("Enable AutoML and use the H100", "on"),
    ("turn AutoML back on", "on"),
    ("AutoML on, 10 trials", "on"),
    ("There is no need to turn off AutoML", "on"),
    ("Do not forget to use AutoML", "on"),
    ("no plain training, run AutoML", "on"),
    ("AutoML instead of plain training", "on"),
    ("No problem, use AutoML", "on"),
    ("There is no problem with using AutoML", "on"),
    ("No GPU here, use AutoML with 4 trials", "on"),
    ("I don't have a GPU but run a sweep over the learning rate", "on"),
    ("Not just one run: use AutoML", "on"),
    ("Could you run AutoML on this?", "on"),
    ("Without a GPU, please do hyper-parameter optimization", "on"),
    ("Use AutoML and skip the export", "on"),
    ("Run AutoML without wandb", "on"),
    ("Do not touch the test set. Use AutoML.", "on"),
    ("Train with AutoML. Don't use more than 4 CPU hours.", "on"),
    ("HPO is required", "on"),
    ("never disable automl", "on"),
    # nothing is said
    ("Train a classifier on NW-UCLA", "auto"),
    ("", "auto"),
    ("   \n", "auto"),
    ("Train on train_data.npy, no problem if it takes long", "auto"),
    ("no GPU on this machine, train on the CPU", "auto"),
    ("Don't export the model", "auto"),
    ("disable wandb", "auto"),
    ("Turn off the augmentation", "auto"),
    ("Train once the data is converted", "auto"),
    ("Fine-tune the checkpoint from last week without weight decay", "auto"),
    ("Do not fine-tune, train from scratch", "auto"),
    ("Skip the first 10 clips", "auto"),
    ("There is only a single training file", "auto"),
    ("Remove the class sweep", "auto"),
    ("Avoid overfitting", "auto"),
    ('Train, and map label 3 to the class named "no AutoML"', "auto"),
    ("The column is called `disable AutoML`; train on it", "auto"),
    ("The title is 'plain training', please train", "auto"),
    ("Read the specs in /data/no automl/x/train.yaml", "auto"),
    ("results_dir=/results/no-automl/run1", "auto"),
    ("train on s3://bucket/plain-training/set", "auto"),
    ("```\nautoml_policy: off\n```\nis what the log said; train again", "auto"),
    ("Train the classes sit, stand, sweep and jump", "auto"),
    # all kinds, written after the patterns and without a look at them
    ("Kick off a training job, but leave AutoML off", "off"),
    ("I'd rather not use AutoML", "off"),
    ("Let's not do HPO this time", "off"),
    ("We won't be needing AutoML", "off"),
    ("train.yaml is already tuned; no further tuning required", "off"),
    ("no further hyperparameter search needed", "off"),
    ("AutoML isn't necessary", "off"),
    ("You can skip AutoML", "off"),
    ("Make it a plain run", "off"),
    ("plain run please", "off"),
    ("Just train it once and evaluate", "off"),
    ("just do a single training run with the spec as is", "off"),
    ("run training exactly once", "off"),
    ("one run, no search", "off"),
    ("no automl thanks", "off"),
    ("AutoML: disabled", "off"),
    ("--automl_policy off", "off"),
    ("automl_policy=on", "on"),
    ("set automl_policy to off", "off"),
    ("set automl to on", "on"),
    ("I want the hyperparameter optimization off", "off"),
    ("with AutoML turned off", "off"),
    ("keep AutoML disabled", "off"),
    ("Keep AutoML on", "on"),
    ("Leave AutoML enabled", "on"),
    ("don't leave AutoML on", "off"),
    ("AutoML must not run", "off"),
    ("ensure that AutoML doesn't run", "off"),
    ("make sure AutoML is off", "off"),
    ("make sure that AutoML is not disabled", "on"),
    ("No need for AutoML, I already have hyper-parameters", "off"),
    ("Not without AutoML", "on"),
    ("train with HPO", "on"),
    ("Do a Bayesian optimization with 20 trials", "on"),
    ("use asha", "on"),
    ("please tune", "on"),
    ("Let AutoML choose the settings", "on"),
    ("optimise the hyper-parameters", "on"),
    ("why not use AutoML", "on"),
    ("You don't have to turn AutoML off", "on"),
    ("you must not turn off AutoML", "on"),
    ("AutoML shouldn't be skipped", "on"),
    ("I don't mind if you use AutoML", "auto"),
    ("either AutoML or not", "auto"),
    ("My colleague ran it without AutoML", "auto"),
    ("Only use AutoML if the accuracy is below 80", "auto"),
    ("train for one epoch", "auto"),
    ("Do not use class weights", "auto"),
    ("no early stopping", "auto"),
    ("Without augmentation, train 30 epochs", "auto"),
    ("What is the difference between HPO and plain training?", "auto"),
    ("It is not clear to me what AutoML does", "auto"),
    ("Explain AutoML", "auto"),
    ("Train on clips of one person, not two", "auto"),
    ("Don't turn off the GPU", "auto"),
    ("AutoML is not my favourite", "auto"),
    ("Would you mind turning off AutoML?", "off"),
    ("Please don't bother with AutoML", "off"),
    ("do not waste time on hyperparameter search", "off"),
    ("Train only. No AutoML. No export.", "off"),
    ("nothing but plain training", "off"),
    ("I'm not a fan of AutoML, do plain training", "off"),
    ("Evaluate the checkpoint, no AutoML", "off"),
    ("Stop using AutoML", "off"),
    ("go without automl", "off"),
    ("do it without the AutoML stuff", "off"),
    ("Don't search for better hyperparameters", "off"),
    ("train plainly", "off"),
    ("No. Use AutoML.", "on"),
    ("Yes to wandb, no to AutoML", "off"),
    ("AutoML=false", "off"),
    ("automl: no", "off"),
    ("use_automl=false", "off"),
    ("I need a model by noon so no hyper parameter tuning please", "off"),
    ("There's no reason not to use AutoML", "on"),
    ("I can't afford a sweep", "off"),
    ("We cannot afford HPO now", "off"),
    ("Don't do anything fancy, no AutoML", "off"),
    ("No AutoML?", "auto"),
    ("turn off auto-ML, and don't turn it on again", "off"),
    (
        "I have two sets. Train on the first. I do not want any hyperparameter search to run: the GPU is shared.",
        "off",
    ),
    ("train st-gcn on /data/ucla for 30 epochs with lr 0.05, momentum 0.9, no nesterov", "auto"),
    ("no nesterov, use AutoML", "on"),
    ("don't use the test set for tuning", "auto"),
    ("Without touching the test set, tune the model", "on"),
    ("AutoML disabled please", "off"),
    ("I want to train with fixed hyperparameters", "off"),
    ("do one run only", "off"),
    ("just a quick single run to see if the data loads", "off"),
    ("a quick run without hpo then a full run with hpo", "auto"),
    ("enable hpo but disable early stopping", "on"),
    ("disable early stopping and enable hpo", "on"),
    ("switch off early stopping during HPO", "auto"),
    ("use AutoML without pruning", "on"),
    ("I can't use AutoML", "off"),
    ("we never got AutoML to work so train plainly", "off"),
    ("turn AutoML off unless I said otherwise earlier", "auto"),
    ("pls no automl", "off"),
    ("NO AUTOML!!!", "off"),
    ("AutoML? No thanks.", "auto"),
    ("Hyperparameter tuning isn't wanted", "off"),
    ("auto-tuning off", "off"),
    ("Don't do HPO, don't do AutoML.", "off"),
    ("no sweeps", "off"),
    ("I don't object to AutoML", "auto"),
    ("not interested in AutoML", "off"),
    ("Train it without a doubt with AutoML", "on"),
    ("do without AutoML", "off"),
    ("without AutoML's help", "off"),
    ("AutoML's not needed", "off"),
    ("train model, automl=none", "off"),
    ("automl_policy = off", "off"),
    ("set `automl_policy: off`", "auto"),
    ("Disable the automl step", "off"),
    ("disable automl/hpo", "off"),
    ("exclude HPO from the pipeline", "off"),
    ("only convert and train, skip tuning and export", "off"),
    ("no tune", "off"),
    ("keine automl bitte", "auto"),
    ("I'd like you to not tune", "off"),
    ("don't spend time on searching hyperparameters", "off"),
    ("Run exactly one training", "off"),
    ("I need just one model, use AutoML to get it", "on"),
    ("Do not let AutoML change the window size", "on"),
    ("No need to tune dropout", "auto"),
    ("Tune nothing", "off"),
    ('automl_policy="off"', "off"),
    ('{"automl_policy": "off"}', "off"),
    ("use automl, but don't search dropout", "on"),
    ("AutoML? No, thanks; plain training.", "off"),
    # doubt and conflicts
    ("Should I use AutoML?", "auto"),
    ("Is AutoML off by default?", "auto"),
    ("Do we need HPO here?", "auto"),
    ("What does plain training mean?", "auto"),
    ("Maybe without AutoML", "auto"),
    ("I am not sure whether to disable AutoML", "auto"),
    ("Disable AutoML if there is no GPU", "auto"),
    ("Use plain training unless you have two hours", "auto"),
    ("I don't care about AutoML or not", "auto"),
    ("Compare plain training with AutoML", "auto"),
    ("First train without AutoML, then use AutoML", "auto"),
    ("Turn off AutoML. Tune the learning rate.", "auto"),
    ("Yesterday we trained without AutoML", "auto"),
    ("The previous run used no HPO and got 80 %", "auto"),
    ("Tell me about the AutoML results", "auto"),
    ("Disable wandb during AutoML", "auto"),
    ("Skip the first 10 clips when tuning", "auto"),
    ("Do not export after the AutoML run", "auto"),
    ("AutoML or plain training, it's up to you", "auto"),
]
IN_DOUBT = REQUESTS[[text for text, _ in REQUESTS].index("Should I use AutoML?") :]


def test_table_is_large_and_has_all_policies() -> None:
    texts = [text for text, _ in REQUESTS]
    assert len(texts) == len(set(texts)) >= 60
    counts = {policy: sum(expected == policy for _, expected in REQUESTS) for policy in ("auto", "on", "off")}
    assert min(counts.values()) >= 25


@pytest.mark.parametrize(("text", "expected"), REQUESTS)
def test_words_of_a_request(text: str, expected: str) -> None:
    decision = resolve_automl_policy(text)
    assert decision.policy == expected, decision.reason
    assert decision.origin == ("default" if expected == "auto" else "request")
    assert decision.reason


@pytest.mark.parametrize("text", [text for text, _ in IN_DOUBT])
def test_doubt_is_told(text: str) -> None:
    assert "in doubt" in resolve_automl_policy(text).reason


def test_the_reason_quotes_what_was_understood() -> None:
    reason = resolve_automl_policy("Please train on my clips without any hyper-parameter search, token=abc123.").reason
    assert '"without any hyper-parameter search"' in reason
    assert "abc123" not in reason
    both = resolve_automl_policy("disable AutoML. Tune the lr.").reason
    assert "disable automl" in both and "tune the lr" in both
    assert "does not count" in resolve_automl_policy('a class named "no AutoML"').reason


@pytest.mark.parametrize("text", [text for text, _ in REQUESTS[::7]])
@pytest.mark.parametrize("explicit", ["auto", "on", "off", "OFF", " on "])
def test_an_explicit_value_wins(text: str, explicit: str) -> None:
    decision = resolve_automl_policy(text, explicit)
    assert (decision.policy, decision.origin) == (explicit.strip().lower(), "explicit")


def test_explicit_truth_values_of_yaml() -> None:
    assert resolve_automl_policy("use AutoML", False).policy == "off"
    assert resolve_automl_policy("no AutoML", True).policy == "on"
    assert resolve_automl_policy("no AutoML", "").policy == "off"
    assert resolve_automl_policy(None, None) == PolicyDecision(
        "auto", "default", "nothing was said about AutoML: auto is the default"
    )


def test_another_explicit_value_is_refused() -> None:
    with pytest.raises(UserError, match=r"automl_policy: got 'of', expected one of auto, on, off\. Did you mean 'off'"):
        resolve_automl_policy("train", "of")


STRANGE = (
    "no ",
    "'",
    '`"',
    "a/",
    ", please",
    "don't and ",
    "x",
    "x-",
    "“",
    "a ",
    "one ",
    "tune the ",
    "://",
    ": ",
    "sweep or ",
)


def test_long_and_strange_requests() -> None:
    """With a pattern that goes back over what it read, one of these would run into the time limit of a test."""
    for part in STRANGE:
        text = (part * 100_000)[:100_000]
        assert resolve_automl_policy(text).policy != "off"
    assert resolve_automl_policy("no AutoML. " * 9_000).policy == "off"
    with pytest.raises(UserError, match="100001 characters"):
        resolve_automl_policy("x" * 100_001)


OFF = PolicyDecision("off", "request", 'the request says "no hpo"')
ON = PolicyDecision("on", "explicit", "automl_policy is on")
AUTO = PolicyDecision("auto", "default", "auto is the default")
MISSING = "AutoML is enabled but not runnable until schemas are generated"


@pytest.mark.parametrize("decision", [AUTO, ON])
def test_train_goes_to_automl_unless_something_is_against_it(decision: PolicyDecision) -> None:
    route = choose_route("train", decision)
    assert route.uses_automl and decision.reason in route.reason
    not_enabled = choose_route("train", decision, automl_enabled=False, not_runnable="schemas/train.schema.json")
    assert not not_enabled.uses_automl and "not enabled" in not_enabled.reason and MISSING not in not_enabled.reason
    not_runnable = choose_route("train", decision, not_runnable="schemas/train.schema.json is missing")
    assert not not_runnable.uses_automl
    assert MISSING in not_runnable.reason and "schemas/train.schema.json is missing" in not_runnable.reason


def test_off_means_plain_training() -> None:
    for not_runnable in ("", "schemas/train.schema.json is missing"):
        route = choose_route("train", OFF, not_runnable=not_runnable)
        assert not route.uses_automl and OFF.reason in route.reason and MISSING not in route.reason


@pytest.mark.parametrize("action", ["evaluate", "inference", "export", "dataset_convert"])
@pytest.mark.parametrize("decision", [AUTO, ON, OFF])
def test_other_actions_never_go_to_automl(action: str, decision: PolicyDecision) -> None:
    route = choose_route(action, decision)
    assert not route.uses_automl and action in route.reason
