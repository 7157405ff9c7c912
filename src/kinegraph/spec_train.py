"""The options of training: optimizer, learning rate, loss, averages, teachers. spec.py takes them in."""

from __future__ import annotations

from typing import Literal

from pydantic.dataclasses import dataclass

from kinegraph.config import SPEC_CONFIG, SearchRange, group, option

_SGD_ONLY = {"train.optim.optimizer_type": ("torch.optim.SGD",)}
_FLAG = (False, True)


@dataclass(config=SPEC_CONFIG)
class CudnnSpec:
    benchmark: bool = option(False, "let cuDNN try its algorithms first")
    deterministic: bool = option(True, "use deterministic algorithms only")


@dataclass(config=SPEC_CONFIG)
class OptimSpec:
    optimizer_type: Literal["torch.optim.SGD", "torch.optim.Adam", "torch.optim.Adamax", "torch.optim.AdamW"] = option(
        "torch.optim.SGD",
        "optimizer",
        search=SearchRange(choices=("torch.optim.SGD", "torch.optim.Adam", "torch.optim.Adamax", "torch.optim.AdamW")),
    )
    lr: float = option(0.1, "learning rate", minimum=0, automl=True, search=SearchRange(1e-4, 0.5, log=True))
    momentum: float = option(
        0.9, "momentum of SGD", minimum=0, automl=True, search=SearchRange(0.5, 0.99, when=_SGD_ONLY)
    )
    nesterov: bool = option(True, "Nesterov momentum of SGD", search=SearchRange(choices=_FLAG, when=_SGD_ONLY))
    weight_decay: float = option(
        1e-4, "weight decay", minimum=0, automl=True, search=SearchRange(1e-6, 1e-2, log=True, specials=(0.0,))
    )
    lr_scheduler: Literal["AutoReduce", "MultiStep", "Cosine"] = option(
        "MultiStep",
        "learning rate over the epochs",
        search=SearchRange(choices=("AutoReduce", "MultiStep", "Cosine")),
    )
    lr_monitor: Literal["val_loss", "train_loss"] = option(
        "val_loss",
        "what AutoReduce watches",
        search=SearchRange(choices=("val_loss", "train_loss"), when={"train.optim.lr_scheduler": ("AutoReduce",)}),
    )
    patience: int = option(
        1,
        "AutoReduce: epochs without gain before a step",
        minimum=1,
        automl=True,
        search=SearchRange(1, 10, when={"train.optim.lr_scheduler": ("AutoReduce",)}),
    )
    min_lr: float = option(
        1e-4,
        "AutoReduce and Cosine: lowest learning rate",
        minimum=0,
        search=SearchRange(
            1e-6, 1e-3, log=True, specials=(0.0,), when={"train.optim.lr_scheduler": ("AutoReduce", "Cosine")}
        ),
    )
    lr_steps: list[int] = option([10, 60], "MultiStep: epochs at which the learning rate drops")
    lr_decay: float = option(
        0.1,
        "MultiStep and AutoReduce: factor of a step",
        minimum=0,
        automl=True,
        search=SearchRange(0.05, 0.7, log=True, when={"train.optim.lr_scheduler": ("MultiStep", "AutoReduce")}),
    )
    warmup_epochs: int = option(
        0, "epochs over which the learning rate rises to lr", minimum=0, search=SearchRange(0, 5)
    )


@dataclass(config=SPEC_CONFIG)
class TrainSpec:
    num_gpus: int = option(1, "GPUs per machine (processes with accelerator=cpu)", minimum=1, popular=True)
    gpu_ids: list[int] = option([0], "which GPUs", popular=True)
    num_nodes: int = option(1, "machines, started by torchrun or SLURM", minimum=1, popular=True)
    accelerator: Literal["auto", "cpu", "gpu"] = option("auto", "auto: GPUs if there are any")
    precision: Literal["32", "bf16", "auto"] = option(
        "32", "bf16: mixed precision; auto: bf16 where the processors are faster with it"
    )
    seed: int = option(1234, "seed of everything random; -1: a new one each time", minimum=-1)
    cudnn: CudnnSpec = group(CudnnSpec, "cuDNN settings")
    num_epochs: int = option(10, "epochs in all, also when resuming", minimum=1, popular=True)
    min_epoch_steps: int = option(
        0, "an epoch takes every clip as often as so many steps need: for small sets", minimum=0, maximum=10**9
    )
    stop_after_epoch: int = option(
        -1, "pause once so many of num_epochs are done, to go on later with the same result; -1: no pause", minimum=-1
    )
    checkpoint_interval: int = option(1, "save every so many epochs or steps", minimum=1, popular=True)
    checkpoint_interval_unit: Literal["epoch", "step"] = option("epoch", "unit of checkpoint_interval")
    validation_interval: int = option(1, "validate every so many epochs", minimum=1, popular=True)
    best_metric: Literal["val_acc", "val_loss"] = option("val_acc", "what chooses the best checkpoint")
    resume_training_checkpoint_path: str = option("", "checkpoint to go on from", path="input")
    results_dir: str = option("", "results folder; default <results_dir>/train", path="output")
    optim: OptimSpec = group(OptimSpec, "optimizer and learning rate")
    early_stopping: int = option(
        0, "stop after so many epochs without a better validation; 0: train all epochs", minimum=0
    )
    label_smoothing: float = option(
        0.0, "share of the target spread over all classes", minimum=0, maximum=0.9, search=SearchRange(0.0, 0.3)
    )
    mixup: float = option(
        0.0, "mix pairs of clips with shares from Beta(mixup, mixup); 0: off", minimum=0, search=SearchRange(0.0, 1.0)
    )
    label_doubt: float = option(
        0.0,
        "leave out training clips for which the network's average answer gives another class so much more probability "
        "than the label; 0: learn from all",
        minimum=0,
        maximum=1,
    )
    ema_decay: float = option(
        0.0, "keep a moving average of the weights, which is the model then; 0: off", minimum=0, maximum=0.99999
    )
    temperature: float = option(
        0.0, "what logits are divided by for probabilities; 0: fitted on the validation clips", minimum=0, maximum=20
    )
    teacher: str = option("", "checkpoint whose answers are learned too (distillation)", path="input")
    teacher_weight: float = option(0.5, "share of the teacher's answers in the loss", minimum=0, maximum=1)
    teacher_temperature: float = option(
        2.0, "softens the answers of teacher and student while they are compared", minimum=0.1, maximum=20
    )
    grad_clip: float = option(
        0.0,
        "largest norm of the gradient; 0: no limit",
        minimum=0,
        automl=True,
        search=SearchRange(0.1, 50.0, log=True, specials=(0.0,)),
    )
