"""The training loop, in each process of a run.

Everything random in a step is a function of (seed, position in training, rank, clip), and a checkpoint holds the
position. So a run that is killed and started again ends with the same weights as one that was not.
"""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from kinegraph.allocator import keep_freed_memory
from kinegraph.data.dataset import Batch, ClipDataset, EpochBatchSampler, EvaluationShard, load_batches
from kinegraph.data.input_checks import compare_options
from kinegraph.data.pipeline import InputPipeline
from kinegraph.data.transforms import TrainingAugmentation
from kinegraph.devices import apply_settings
from kinegraph.errors import KinegraphError, Problem, UserError
from kinegraph.label_doubt import LabelDoubt, report_doubt
from kinegraph.models import build_model
from kinegraph.models.checkpoint import Checkpoint, load_pretrained, read_checkpoint
from kinegraph.models.late_fusion import LateFusion
from kinegraph.optim import LearningRateSchedule, build_optimizer
from kinegraph.run import connect_log, find_encryption_key, redact, show_messages
from kinegraph.run_checkpoints import CheckpointKeeper
from kinegraph.spec import ModelSpec, Spec
from kinegraph.storage import write_json
from kinegraph.teacher import Teacher
from kinegraph.train_log import TrainLog
from kinegraph.training_job import Position, Totals, TrainingJob, find_last_epoch, has_ended
from kinegraph.training_loss import MixedBatch, TrainingLoss, mix_clips, weigh_classes
from kinegraph.validation import Answers, fit_answers, measure_network
from kinegraph.weight_average import WeightAverage


def fit(fabric: Fabric, job: TrainingJob) -> dict[str, Any]:
    """Train from the resume point, or the start, to the last epoch; the final metrics and files, on every rank."""
    job.run.writes = fabric.global_rank == 0
    connect_log(job.run)
    is_child = multiprocessing.parent_process() is not None
    if is_child:
        show_messages()
    apply_settings(job.run.spec.train.cudnn, fabric.world_size)
    try:
        _agree(fabric, job)
        with keep_freed_memory():
            return _Trainer(fabric, job).run_epochs()
    except KinegraphError as error:
        if is_child and job.failure_path:
            write_json(job.failure_path, {"kind": type(error).__name__, "problems": error.as_data()})
        raise


def _agree(fabric: Fabric, job: TrainingJob) -> None:
    """All processes take the seed of the first, and must have found the same checkpoint to go on from."""
    if fabric.world_size == 1:
        return
    job.seed = fabric.broadcast(job.seed)
    found: list[Any] = [None] * fabric.world_size
    torch.distributed.all_gather_object(found, job.resume_path.name if job.resume_path else None)
    if len(set(found)) > 1:
        got = ", ".join(f"process {rank} {name or 'none'}" for rank, name in enumerate(found))
        hint = "Put results_dir on a disk that all machines share."
        raise UserError(Problem("checkpoint to go on from", got, "the same one in every process", hint))


class _Trainer:
    def __init__(self, fabric: Fabric, job: TrainingJob) -> None:
        self.fabric, self.job, self.run = fabric, job, job.run
        self.spec: Spec = job.run.spec
        data = self.spec.dataset
        # The steps of the pipeline follow on the device: augmentation stands between them
        self.train_set = ClipDataset(data.train_dataset.data_path, job.train_labels, job.pipeline.check)
        self.val_set = ClipDataset(data.val_dataset.data_path, job.val_labels, job.pipeline)
        self.augment = TrainingAugmentation(
            *(data.window_size, data.random_choose, data.random_move, job.seed),
            *(job.pipeline, job.augment, job.layout.symmetric),
        )
        sampler = self._make_sampler(0, 0)
        self.num_batches = sampler.batches_per_epoch
        if sampler.num_passes > 1:
            self.run.info(f"An epoch takes every clip {sampler.num_passes} times: train.min_epoch_steps.")
        torch.manual_seed(job.seed)
        self.network = build_model(self.spec.model, job.layout, job.num_classes, job.pipeline.output_channels)
        key = find_encryption_key(self.spec)
        resumed = read_checkpoint(job.resume_path, key) if job.resume_path else None
        decay = self.spec.train.ema_decay
        self.average = WeightAverage(self.network, decay) if decay > 0 else None
        threshold = self.spec.train.label_doubt
        self.doubt = LabelDoubt(len(self.train_set), threshold) if threshold > 0 else None
        self.temperature = self.spec.train.temperature or (resumed.temperature if resumed else 1.0)
        self._load_weights(resumed, key)
        optimizer = build_optimizer(self.spec.train.optim, self.network.parameters())
        self.schedule = LearningRateSchedule(self.spec.train.optim, self.spec.train.num_epochs, self.num_batches)
        self.position, best = Position(), None
        if resumed and resumed.training:
            self.position, best = self._restore(resumed.training, optimizer)
        self.keeper = CheckpointKeeper(self.run, key, best)
        self.model, self.optimizer = fabric.setup(self.network, optimizer)
        if self.average:
            self.average.network.to(fabric.device)
        self._make_loss(key)
        self.metrics: dict[str, float] = dict(resumed.metrics) if resumed else {}
        self.log = TrainLog(self.run, self.position.epoch) if self.run.writes else None
        self.counted_s = time.monotonic()

    def _make_loss(self, key: str) -> None:
        job, train = self.job, self.spec.train
        weights = weigh_classes(job.train_labels, job.num_classes) if self.spec.dataset.balance == "loss" else None
        self.loss = TrainingLoss(train, weights)
        self.teacher = None
        if train.teacher:
            self.teacher = Teacher(train.teacher, key, job.pipeline, job.layout, job.label_map, self.fabric.device)

    def _load_weights(self, resumed: Checkpoint | None, key: str) -> None:
        if resumed:
            # Of a run with ema_decay the model is the average, and training goes on with the weights behind it
            self.network.load_state_dict((resumed.training or {}).get("weights") or resumed.state_dict)
        elif self.spec.model.pretrained_model_path:
            path = self.spec.model.pretrained_model_path
            given = read_checkpoint(path, key)
            self.run.info(f"Weights start from {path}.")
            for message in load_pretrained(self.network, given, path):
                self.run.info(message)
            trained = InputPipeline.from_dict(given.pipeline, path).options if given.pipeline else None
            for message in compare_options(self.job.pipeline.options, trained, path):
                self.run.warn(message)
            if given.num_classes == self.job.num_classes and given.label_map not in (None, self.job.label_map):
                self.run.warn(f"The head of {path} was trained for other classes ({', '.join(given.class_names)}).")
        if self.average:
            self.average.network.load_state_dict(resumed.state_dict if resumed else self.network.state_dict())
        for network in (self.network, self.average.network if self.average else None):
            if isinstance(network, LateFusion) and self.spec.model.fusion_weights:
                network.set_weights(self.spec.model.fusion_weights)

    def _restore(self, training: dict[str, Any], optimizer: torch.optim.Optimizer) -> tuple[Position, Any]:
        options = [
            {name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups
        ]
        optimizer.load_state_dict(training["optimizer"])
        for group, given in zip(optimizer.param_groups, options, strict=True):
            group.update(given)  # the spec's weight decay and momentum, which may have changed since
        self.schedule.load_state_dict(training["schedule"])
        if self.doubt and training.get("label_doubt"):
            self.doubt.load_state(training["label_doubt"], self.run.writes)
        totals = Totals(*training["totals"]) if self.run.writes else Totals()
        position = Position(training["epoch"], training["step"], training["global_step"], training["seconds"], totals)
        return position, training["best"]

    def _make_sampler(self, epoch: int, start_batch: int) -> EpochBatchSampler:
        return EpochBatchSampler(
            len(self.train_set),
            self.spec.dataset.batch_size,
            seed=self.job.seed,
            epoch=epoch,
            start_batch=start_batch,
            min_batches=self.spec.train.min_epoch_steps,
            how=self.spec.dataset.shuffle,
            balanced_by=self.job.train_labels if self.spec.dataset.balance == "sampling" else None,
            rank=self.fabric.global_rank,
            world_size=self.fabric.world_size,
        )

    def _load_batches(self, dataset: ClipDataset, batches: Any) -> Iterator[Batch]:
        return load_batches(dataset, batches, self.spec.dataset.num_workers, self.fabric.device)

    def run_epochs(self) -> dict[str, Any]:
        train = self.spec.train
        first_epoch, last_epoch = self.position.epoch, find_last_epoch(train)
        started_s, first_step = time.monotonic(), self.position.global_step
        for epoch in range(first_epoch, last_epoch):
            epoch_started_s = time.monotonic()
            steps_before = self.position.global_step
            learning_rate = self._train_epoch()
            validates = epoch == last_epoch - 1 or self._is_planned(epoch)
            losses = self._measure_epoch(epoch, validates)
            now_s = time.monotonic()
            # By steps: the first epoch of a resumed run may be the end of one
            step_s = (now_s - started_s) / max(self.position.global_step - first_step, 1)
            left_s = step_s * self.num_batches * (last_epoch - epoch - 1)
            steps = self.position.global_step - steps_before
            # Before the checkpoint: a kill in between repeats the epoch, and the repetition replaces the row
            if self.log:
                row = {"epoch": epoch, "step": self.position.global_step, "lr": learning_rate, **losses}
                self.log.report_epoch(row, losses, now_s - epoch_started_s, steps, self.num_batches, left_s)
            self._finish_epoch(epoch, losses)
            if has_ended(epoch + 1, self.keeper.best, train) and epoch + 1 < last_epoch:
                self.run.info(f"Stopped early: no gain in {train.early_stopping} epochs (train.early_stopping).")
                break
        self._count_seconds()
        if self.log:
            self.log.close()
        weights = getattr(self.network, "fusion_weights", None)
        return {
            "metrics": {**self.metrics, "best": self.keeper.best, "train_seconds": self.position.seconds},
            "temperature": self.temperature,
            "fusion_weights": [] if weights is None else weights.tolist(),
        }

    def _train_epoch(self) -> float:
        position, train = self.position, self.spec.train
        self.model.train()
        learning_rate = train.optim.lr
        sampler = self._make_sampler(position.epoch, position.step)
        for batch in self._load_batches(self.train_set, sampler):
            learning_rate = self.schedule.compute_lr(position.epoch, position.step)
            for parameters in self.optimizer.param_groups:
                parameters["lr"] = learning_rate
            torch.manual_seed(_mix_seed(self.job.seed, position.global_step, self.fabric.global_rank))
            draws = sampler.number_draws(position.step, batch.index.numpy())
            self._train_step(batch, draws, sampler.find_pass(position.step))
            position.step += 1
            position.global_step += 1
            self.run.progress(position.global_step, find_last_epoch(train) * self.num_batches, "training steps")
            due = train.checkpoint_interval_unit == "step" and position.global_step % train.checkpoint_interval == 0
            if due and position.step < self.num_batches:
                self._save(position.epoch)
        return learning_rate

    def _train_step(self, batch: Batch, draws: np.ndarray, number_of_pass: int) -> None:
        train = self.spec.train
        clips = self.augment(batch.data, draws, number_of_pass)
        mixed = mix_clips(clips, batch.labels, train.mixup)
        logits = self.model(mixed.clips)
        num_losses = len(logits) if logits.ndim == 3 else 1
        network: Any = self.network
        answers = network.fuse(logits.detach()) if logits.ndim == 3 else logits.detach()
        learned = self._choose_learned(batch, answers)
        loss = self.loss(logits, mixed, self.teacher.compute(mixed.clips) if self.teacher else None, learned)
        value = loss.item()
        if not math.isfinite(value):
            where = f"training, epoch {self.position.epoch}, step {self.position.global_step}"
            hint = "Lower train.optim.lr or set train.grad_clip, and look at the data with `kinegraph inspect`."
            raise KinegraphError(Problem(where, f"a loss of {value}", "a finite loss", hint))
        self.optimizer.zero_grad()
        self.fabric.backward(loss)
        if train.grad_clip > 0:
            # Streams learn as if each were alone, so each has a norm of its own
            for part in self.network.branches if isinstance(self.network, LateFusion) else [self.network]:
                nn.utils.clip_grad_norm_(part.parameters(), train.grad_clip)
        self.optimizer.step()
        if self.average:
            self.average.update(self.network, self.position.global_step)
        self._count_batch(value / num_losses, answers, mixed)

    def _choose_learned(self, batch: Batch, answers: Tensor) -> Tensor | None:
        """Which clips of a batch to learn from, (n,), or None: all."""
        if self.doubt is None:
            return None
        self.doubt.note(batch.index, answers, batch.labels)
        learned = self.doubt.find_trusted(batch.index, self.position.epoch / self.spec.train.num_epochs)
        return learned.to(answers.device)

    def _count_batch(self, loss: float, answers: Tensor, mixed: MixedBatch) -> None:
        count = len(mixed.labels)
        chosen = answers.argmax(1)
        right = [(chosen == labels).sum().item() for labels in (mixed.labels, mixed.others)]
        self.position.totals.add(loss * count, mixed.share * right[0] + (1 - mixed.share) * right[1], count)

    def _measure_epoch(self, epoch: int, validates: bool) -> dict[str, float]:
        losses = self._reduce(self.position.totals).compute_means("train")
        return losses | self._validate(self._is_planned(epoch)) if validates else losses

    def _is_planned(self, epoch: int) -> bool:
        """Whether the epoch ends with a validation anyway. One that only a pause brings chooses nothing: AutoReduce,
        the best checkpoint and fused streams would go on otherwise than in a run that is not paused.
        """
        train = self.spec.train
        return epoch == train.num_epochs - 1 or (epoch + 1) % train.validation_interval == 0

    def _finish_epoch(self, epoch: int, losses: dict[str, float]) -> None:
        """Save as the interval says, and always the last epoch and the best one."""
        position, train = self.position, self.spec.train
        is_last = epoch == find_last_epoch(train) - 1
        is_planned = self._is_planned(epoch)
        self.schedule.finish_epoch(
            losses if is_planned else {name: losses[name] for name in ("train_loss", "train_acc")}
        )
        self.metrics |= losses
        if self.doubt:
            self.doubt.finish_epoch(self._reduce_tensor)
        position.epoch, position.step, position.totals = epoch + 1, 0, Totals()
        done = epoch + 1 if train.checkpoint_interval_unit == "epoch" else position.global_step
        on_interval = done % train.checkpoint_interval == 0 or is_last
        is_best = is_planned and self.keeper.note_metrics(losses, epoch, position.global_step, on_interval)
        ends = has_ended(epoch + 1, self.keeper.best, train)
        if ends and self.doubt and self.run.writes:
            # Before the checkpoint, after which nothing would make up for it
            report_doubt(self.doubt, self.job, epoch / train.num_epochs)
        if on_interval or is_best or ends:
            self._save(epoch)

    def _validate(self, is_planned: bool) -> dict[str, float]:
        network = self.average.network if self.average else self.network
        if self.fabric.world_size > 1:
            for buffer in network.buffers():  # each process has its own statistics of the normalisations
                torch.distributed.broadcast(buffer, 0)
        shard = EvaluationShard(
            len(self.val_set), self.spec.dataset.batch_size, self.fabric.global_rank, self.fabric.world_size
        )
        answers = Answers(len(self.val_set))
        batches = zip(self._load_batches(self.val_set, shard.batches), shard.valid_counts, strict=True)
        totals = measure_network(network, batches, answers, self.fabric.autocast)
        self._fit_answers(network, answers, is_planned)
        return self._reduce(totals).compute_means("val")

    def _fit_answers(self, network: nn.Module, answers: Answers, is_planned: bool) -> None:
        given, fits_weights = self.spec.train.temperature, is_planned and not self.spec.model.fusion_weights
        temperature = fit_answers(network, *answers.gather(self.fabric), fits_weights)
        self.temperature = given or temperature
        if isinstance(network, LateFusion) and isinstance(self.network, LateFusion):
            self.network.fusion_weights.copy_(network.fusion_weights)

    def _reduce(self, totals: Totals) -> Totals:
        if self.fabric.world_size == 1:
            return totals
        values = torch.tensor(
            [totals.loss, totals.correct, totals.count], dtype=torch.float64, device=self.fabric.device
        )
        reduced: Any = self.fabric.all_reduce(values, reduce_op="sum")
        return Totals(*reduced.tolist())

    def _reduce_tensor(self, values: Tensor, how: str) -> Tensor:
        if self.fabric.world_size == 1:
            return values
        reduced: Any = self.fabric.all_reduce(values.clone().to(self.fabric.device), reduce_op=how)
        return reduced.cpu()  # type: ignore[no-any-return]

    def _save(self, epoch: int) -> None:
        totals = self._reduce(self.position.totals)
        doubt = {"label_doubt": self.doubt.make_state(self._reduce_tensor)} if self.doubt else {}
        self._count_seconds()
        if self.run.writes:
            self.keeper.save(epoch, self.position.global_step, lambda: self._make_checkpoint(totals, doubt))
        self.fabric.barrier()

    def _count_seconds(self) -> None:
        now_s = time.monotonic()
        self.position.seconds += now_s - self.counted_s
        self.counted_s = now_s

    def _make_checkpoint(self, totals: Totals, doubt: dict[str, Any]) -> Checkpoint:
        job, position = self.job, self.position
        network = self.average.network if self.average else self.network
        raw = {"weights": _copy_weights(self.network)} if self.average else {}
        return Checkpoint(
            state_dict=_copy_weights(network),
            options=ModelSpec(**self.run.show(asdict(self.spec.model))),
            layout=job.layout,
            num_classes=job.num_classes,
            label_map=job.label_map,
            pipeline=job.pipeline.to_dict(),
            num_channels=job.pipeline.output_channels,
            temperature=self.temperature,
            metrics=dict(self.metrics),
            spec=self.run.show(redact(self.spec)),
            training={
                "epoch": position.epoch,
                "step": position.step,
                "global_step": position.global_step,
                "seconds": position.seconds,
                "totals": list(asdict(totals).values()),
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "best": self.keeper.best,
                "seed": job.seed,
                "fingerprint": job.fingerprint,
                "precision": job.precision,
                "world_size": self.fabric.world_size,
                **raw,
                **doubt,
            },
        )


def _copy_weights(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in network.state_dict().items()}


def _mix_seed(seed: int, global_step: int, rank: int) -> int:
    """A seed for the dropout of one step on one rank."""
    return (seed * 1_000_003 + global_step * 8_191 + rank * 131) % 2**63
