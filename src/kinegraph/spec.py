"""Every option of Kinegraph, those of spec_input.py, spec_train.py and spec_live.py included.

Names, defaults and ranges are those of TAO's pose classification where it has them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from kinegraph.config import MANDATORY, SPEC_CONFIG, SearchRange, group, option
from kinegraph.skeleton.layouts import LAYOUTS
from kinegraph.spec_input import AugmentSpec, InputSpec
from kinegraph.spec_live import LiveSpec
from kinegraph.spec_train import TrainSpec

KEY_VARIABLE = "KINEGRAPH_ENCRYPTION_KEY"


def _check_layout_name(name: str) -> str:
    if name in LAYOUTS or name.lower().endswith((".yaml", ".yml")):
        return name
    context = {"choices": list(LAYOUTS), "more": ", or the path of a .yaml file"}
    raise PydanticCustomError("choice", "a known layout", context)


MAX_SEED = 2**63

_FLAG = (False, True)

BackendName = Literal["auto", "torch", "onnxruntime", "openvino", "tensorrt", "native"]
_BACKEND_HELP = "what carries the network out; auto: the fastest that is installed and can"
_THREADS_HELP = "CPU threads; 0: the cores that this process may use"

LayoutName = Annotated[str, AfterValidator(_check_layout_name)]


@dataclass(config=SPEC_CONFIG)
class WandbSpec:
    enable: bool = option(True, "log to Weights & Biases if it is installed and a key is there (or WANDB_MODE=offline)")
    project: str = option("TAO Toolkit", "project that the run belongs to")
    entity: str = option("", "team or user that owns the project")
    group: str = option("", "group of the run")
    name: str = option("TAO Toolkit Training", "name of the run")
    run_id: str = option("", "id of a run to continue")
    tags: list[str] = option(["tao-toolkit"], "tags of the run")
    reinit: bool = option(False, "allow several runs in one process")
    sync_tensorboard: bool = option(False, "copy what TensorBoard gets")
    save_code: bool = option(False, "store the calling script with the run")


@dataclass(config=SPEC_CONFIG)
class ModelSpec:
    model_type: Literal["ST-GCN", "EF-GCN", "MB-GCN", "ST-GCN++", "CTR-GCN", "TD-GCN", "2s-AGCN", "DD-Net"] = option(
        "ST-GCN", "network"
    )
    pretrained_model_path: str = option("", "checkpoint whose weights training starts from", path="input")
    input_channels: int = option(3, "values per joint: 3 for x, y, z; 2 for x, y", minimum=1)
    dropout: float = option(
        0.5,
        "dropout: of ST-GCN in every block but the first, of the others before the classifier",
        minimum=0,
        maximum=1,
        automl=True,
        search=SearchRange(0.0, 0.8),
    )
    width: float = option(1.0, "factor of the channels of every block; not for ST-GCN", minimum=0.125, maximum=8)
    depth: int = option(
        0,
        "blocks in each of the three stages, with DD-Net convolutions; 0: the network's own; not for ST-GCN",
        minimum=0,
        maximum=16,
    )
    coordinates: int = option(
        0,
        "DD-Net: channels that are coordinates; 0: the first three, and with input.score_channel=2 the first two",
        minimum=0,
        maximum=3,
    )
    graph_layout: LayoutName = option("nvidia", "joints and edges: a name from `kinegraph layouts`, or a YAML file")
    graph_strategy: Literal["uniform", "distance", "spatial", "spatial_exact"] = option(
        "spatial",
        "partition strategy; spatial_exact is the paper's rule",
        search=SearchRange(
            choices=("uniform", "distance", "spatial", "spatial_exact"), when={"model.pretrained_model_path": ("",)}
        ),
    )
    edge_importance_weighting: bool = option(
        True,
        "learn a weight for every edge in every block",
        search=SearchRange(choices=_FLAG, when={"model.pretrained_model_path": ("",)}),
    )
    temporal_padding: Literal["symmetric", "causal"] = option(
        "symmetric",
        "zeros round the frames of a temporal convolution; causal: only before them, for frame by frame inference",
    )
    fusion: Literal["early", "late"] = option(
        "early", "several input.streams: one network for all of them, or one for each, whose answers are averaged"
    )
    fusion_weights: list[float] = option([], "late fusion: a weight for each stream; empty: fitted on validation clips")


@dataclass(config=SPEC_CONFIG)
class TrainingDataSpec:
    data_path: str = option("", "array (N, C, T, V, M), .npy", path="input")
    label_path: str = option("", "labels: .pkl, .json, .npz, .npy or .csv", path="input")


@dataclass(config=SPEC_CONFIG)
class TestDataSpec:
    data_path: str = option("", "array (N, C, T, V, M), .npy", path="input")
    label_path: str = option("", "labels: .pkl, .json, .npz, .npy or .csv", path="input")


@dataclass(config=SPEC_CONFIG)
class DatasetSpec:
    train_dataset: TrainingDataSpec = group(TrainingDataSpec, "what is trained on")
    val_dataset: TrainingDataSpec = group(TrainingDataSpec, "what chooses the best checkpoint")
    num_classes: int = option(6, "number of classes; taken from the labels when left out", minimum=1)
    label_map: dict[str, int] | None = option(None, "class name: label; taken from the labels when left out")
    random_choose: bool = option(
        False,
        "training: crop or place clips at random within window_size",
        search=SearchRange(choices=_FLAG),
    )
    random_move: bool = option(
        False, "training: rotate, scale and shift clips at random", search=SearchRange(choices=_FLAG)
    )
    window_size: int = option(
        -1,
        "training: frames per clip, padded with zeros; -1: as they are",
        minimum=-1,
        automl=True,
        search=SearchRange(16, None, specials=(-1,), when={"dataset.random_choose": (True,)}),
    )
    batch_size: int = option(16, "clips per batch and process", minimum=1, search=SearchRange(4, 128, powers_of=2))
    num_workers: int = option(1, "processes that read data; 0: none", minimum=0)
    balance: Literal["none", "loss", "sampling"] = option(
        "none", "classes of unequal size: weigh the loss, or sample all classes equally often"
    )
    shuffle: Literal["full", "blocks"] = option(
        "full", "order of the training clips; blocks: of neighbours, for files larger than memory and slow disks"
    )


@dataclass(config=SPEC_CONFIG)
class EvaluateSpec:
    num_gpus: int = option(1, "GPUs; evaluation uses one", minimum=1, popular=True)
    gpu_ids: list[int] = option([0], "which GPU", popular=True)
    num_nodes: int = option(1, "machines; evaluation uses one", minimum=1, popular=True)
    checkpoint: str = option(MANDATORY, "model: .pth or .onnx", path="input")
    trt_engine: str = option("", "TensorRT engine (not supported yet)")
    results_dir: str = option("", "results folder; default <results_dir>/evaluate", path="output")
    batch_size: int = option(-1, "clips per batch; -1: dataset.batch_size", minimum=-1)
    backend: BackendName = option("auto", _BACKEND_HELP)
    threads: int = option(0, _THREADS_HELP, minimum=0, maximum=1024)
    test_dataset: TestDataSpec = group(TestDataSpec, "what is evaluated")
    reject_threshold: float = option(
        0.0,
        "report how many answers have a lower probability, and the accuracy of the rest; 0: off",
        minimum=0,
        maximum=1,
    )
    explain: bool = option(False, "explain some answers by people, frames and joints, in explanations/; needs a .pth")
    explain_clips: int = option(20, "clips explained, at most", minimum=1, maximum=1000)


@dataclass(config=SPEC_CONFIG)
class InferenceSpec:
    num_gpus: int = option(1, "GPUs; inference uses one", minimum=1, popular=True)
    gpu_ids: list[int] = option([0], "which GPU", popular=True)
    num_nodes: int = option(1, "machines; inference uses one", minimum=1, popular=True)
    checkpoint: str = option(MANDATORY, "model: .pth or .onnx", path="input")
    trt_engine: str = option("", "TensorRT engine (not supported yet)")
    results_dir: str = option("", "results folder; default <results_dir>/inference", path="output")
    batch_size: int = option(-1, "clips per batch; -1: dataset.batch_size", minimum=-1)
    backend: BackendName = option("auto", _BACKEND_HELP)
    threads: int = option(0, _THREADS_HELP, minimum=0, maximum=1024)
    test_dataset: TestDataSpec = group(TestDataSpec, "what is classified")
    reject_threshold: float = option(
        0.0, "clips whose highest probability is lower are 'unknown', label -1; 0: off", minimum=0, maximum=1
    )
    explain: bool = option(False, "explain some answers by people, frames and joints, in explanations/; needs a .pth")
    explain_clips: int = option(20, "clips explained, at most", minimum=1, maximum=1000)
    output_file: str = option("", "one class name a line; default results.txt in the results folder", path="output")
    top_k: int = option(3, "classes listed for each clip in results.csv and results.json", minimum=1)


@dataclass(config=SPEC_CONFIG)
class ExportSpec:
    results_dir: str = option("", "results folder; default <results_dir>/export", path="output")
    checkpoint: str = option("", "model: .pth", path="input")
    onnx_file: str = option("", "file to write; default beside the checkpoint", path="output")
    gpu_id: int = option(0, "GPU; export runs on the CPU", minimum=0)
    overwrite: bool = option(False, "replace onnx_file if it is there")
    opset_version: int = option(17, "ONNX operator set", minimum=17)
    form: Literal["clip", "step"] = option("clip", "clip: takes whole clips; step: one frame at a time, with a state")
    quantize: Literal["none", "int8"] = option("none", "int8: convolutions in 8 bits, for clips on the CPU")
    calibration_dataset: TestDataSpec = group(TestDataSpec, "int8: training clips that the ranges of values come from")
    calibration_clips: int = option(256, "int8: clips taken of them, evenly spread", minimum=1, maximum=100_000)
    quantization_test_dataset: TestDataSpec = group(
        TestDataSpec, "int8: what the loss of accuracy is measured on; default the calibration clips"
    )
    max_accuracy_loss: float = option(
        1.0, "int8: refuse a larger loss, in percent of the clips; without labels, of answers that change", minimum=0
    )
    force: bool = option(False, "int8: write the file whatever the loss")


@dataclass(config=SPEC_CONFIG)
class DatasetConvertSpec:
    results_dir: str = option("", "results folder; default <results_dir>/dataset_convert", path="output")
    data: str = option("", "recording saved by DeepStream's body-pose-3D app, .json", path="input")
    pose_type: Literal["3dbp", "25dbp", "2dbp"] = option(
        "3dbp", "3dbp: millimetres from joint 0; 25dbp: image x, y and relative z; 2dbp: image x, y"
    )
    num_joints: int = option(34, "joints per person", minimum=1)
    input_width: int = option(1920, "image width in pixels", minimum=1)
    input_height: int = option(1080, "image height in pixels", minimum=1)
    focal_length: float = option(1200.0, "focal length in pixels", minimum=0)
    sequence_length_max: int = option(300, "frames of an array, padded with zeros", minimum=1)
    sequence_length_min: int = option(10, "shortest window in frames", minimum=1)
    sequence_length: int = option(100, "frames of a window", minimum=1)
    sequence_overlap: float = option(
        0.5, "stride of the windows as a fraction of sequence_length", minimum=0, maximum=1
    )
    split_gaps: bool = option(False, "cut a track where frames are missing, instead of closing the gap")


@dataclass(config=SPEC_CONFIG)
class AutomlSpec:
    engine: Literal["local", "ray"] = option("local", "local: processes of this machine; ray: a Ray cluster")
    algorithm: str = option(
        "bayesian", "how trials are chosen; `kinegraph automl --algorithms` lists them", popular=True
    )
    metric: str = option("val_acc", "column of metrics.csv that is improved", popular=True)
    direction: Literal["auto", "maximize", "minimize"] = option(
        "auto", "auto: accuracies rise, losses and seconds fall"
    )
    automl_max_recommendations: int = option(20, "trials in all", minimum=1, popular=True)
    automl_max_epochs: int = option(27, "asha, hyperband, bohb: epochs of the longest trials", minimum=1, popular=True)
    automl_reduction_factor: int = option(
        3, "asha, hyperband, bohb: one trial in so many goes on to the next rung", minimum=2
    )
    epoch_multiplier: int = option(1, "asha, hyperband, bohb: factor of all their epochs", minimum=1)
    automl_max_concurrent: int = option(
        -1, "trials at the same time; -1: one on a CPU, as many as there are GPUs (4 at most) else", minimum=-1
    )
    automl_population_size: int = option(10, "trials of a generation (cmaes, pbt)", minimum=2)
    automl_delete_intermediate_ckpt: bool = option(True, "remove the checkpoints of all trials but the best")
    automl_hyperparameters: list[str] = option(
        [], "searched options: +KEY adds one, -KEY removes one, plain keys replace the default list", popular=True
    )
    automl_fixed: list[str] = option([], "options that keep the value of the spec")
    custom_param_ranges: dict[str, Any] | list[dict[str, Any]] = option(
        {}, "ranges of your own, KEY: {valid_min: a, valid_max: b} or KEY: {valid_options: [...]}"
    )
    schema_path: str = option("", "train schema to take the search space from (TAO's form)", path="input")
    confirm_seeds: int = option(0, "train your spec and the best one again with so many seeds and compare", minimum=0)
    seed: int = option(1234, "seed of the search; trainings use train.seed", minimum=0)
    results_dir: str = option("", "results folder; default <results_dir>/automl", path="output")


@dataclass(config=SPEC_CONFIG)
class Spec:
    """The whole spec. A file may hold the sections of every action; only the running one's are demanded."""

    model_name: str = option("pose_classification", "name of the model, stored in exported files")
    encryption_key: str = option("", "key that checkpoints are encrypted with; never written anywhere", secret=True)
    results_dir: str = option("", "folder under which each action gets its own", path="output")
    wandb: WandbSpec = group(WandbSpec, "Weights & Biases")
    model: ModelSpec = group(ModelSpec, "the network")
    dataset: DatasetSpec = group(DatasetSpec, "training data")
    input: InputSpec = group(InputSpec, "what a clip goes through before the network; stored in the model")
    augment: AugmentSpec = group(AugmentSpec, "random changes of training clips, all off by default")
    train: TrainSpec = group(TrainSpec, "training")
    automl: AutomlSpec = group(AutomlSpec, "search for better options")
    evaluate: EvaluateSpec = group(EvaluateSpec, "evaluation")
    inference: InferenceSpec = group(InferenceSpec, "inference")
    export: ExportSpec = group(ExportSpec, "export to ONNX")
    dataset_convert: DatasetConvertSpec = group(DatasetConvertSpec, "conversion of recordings")
    live: LiveSpec = group(LiveSpec, "decisions while frames come in")


SECTIONS: dict[str, tuple[str, ...]] = {
    "dataset_convert": ("dataset_convert",),
    "train": ("model", "dataset", "input", "augment", "train", "wandb"),
    "automl": ("model", "dataset", "input", "augment", "train", "automl", "wandb"),
    "evaluate": ("evaluate",),
    "inference": ("inference",),
    "export": ("export",),
}
"""The sections whose mandatory values and paths an action demands."""

_TRAINING_DATA = tuple(f"dataset.{part}_dataset.{kind}_path" for part in ("train", "val") for kind in ("data", "label"))

REQUIRED: dict[str, tuple[str, ...]] = {
    "dataset_convert": ("dataset_convert.data",),
    "train": _TRAINING_DATA,
    "automl": _TRAINING_DATA,
    "evaluate": ("evaluate.checkpoint", "evaluate.test_dataset.data_path", "evaluate.test_dataset.label_path"),
    "inference": ("inference.checkpoint", "inference.test_dataset.data_path"),
    "export": ("export.checkpoint",),
}

SHORTHANDS: dict[str, str] = {
    "num_epochs": "train.num_epochs",
    "batch_size": "dataset.batch_size",
    "evaluate_batch_size": "evaluate.batch_size",
    "inference_batch_size": "inference.batch_size",
    "learning_rate": "train.optim.lr",
    "num_gpus": "train.num_gpus",
    "num_workers": "dataset.num_workers",
    "num_classes": "dataset.num_classes",
    "graph_layout": "model.graph_layout",
    "resume_checkpoint": "train.resume_training_checkpoint_path",
    "pretrained_model": "model.pretrained_model_path",
    "export_onnx": "export.onnx_file",
    "inference_output_file": "inference.output_file",
}
