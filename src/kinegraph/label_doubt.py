"""Training clips whose labels the network doubts: found while it trains, and left out of its loss.

A network learns what the clips of a class have in common before it learns single clips by heart (Arpit et al., ICML
2017), all the more where every pass changes the clips. So for a good part of training it answers a clip with a wrong
label rightly, and an average of its answers over the epochs tells such clips (SELF, Nguyen et al., ICLR 2020, leaves
them out in the same way). A clip that is left out is still answered in every epoch, and comes back once the average
agrees with its label again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kinegraph.predict import write_csv
from kinegraph.run_files import DOUBTED_NAME
from kinegraph.training_job import TrainingJob

START = 0.2
"""Share of the epochs before anything is left out: until then the network knows too little."""
MEMORY = 0.9
"""What is left of the average after an epoch."""

Reduce = Callable[[Tensor, str], Tensor]
"""(values of this process, "sum" or "max") -> those of all processes together."""


class LabelDoubt:
    """For each of `num_clips` clips how much more probable than its label the network finds another class.

    `threshold` is the margin of probability from which a clip is left out, train.label_doubt.
    """

    def __init__(self, num_clips: int, threshold: float) -> None:
        self.threshold = threshold
        self.margins = torch.zeros(num_clips, dtype=torch.float64)
        self.answers = torch.full((num_clips,), -1)
        self._start_epoch()

    def _start_epoch(self) -> None:
        self.sums, self.counts = torch.zeros_like(self.margins), torch.zeros_like(self.margins)
        self.new_answers = torch.full_like(self.answers, -1)

    def note(self, index: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Take in the answers (n, classes) to the augmented clips of these numbers (n,), whose labels are `labels`."""
        probabilities = logits.detach().double().softmax(dim=1).cpu()
        own = labels.cpu()[:, None]
        others, answers = probabilities.scatter(1, own, -1.0).max(dim=1)
        margins = others - probabilities.gather(1, own)[:, 0]
        self.sums.index_add_(0, index, margins)
        self.counts.index_add_(0, index, torch.ones_like(margins))
        self.new_answers[index] = answers

    def find_trusted(self, index: Tensor, share: float) -> Tensor:
        """Which of the clips (n,) to learn from when this share of the epochs is done: (n,), true or false."""
        if share < START:
            return torch.ones(len(index), dtype=torch.bool)
        return self.margins[index] <= self.threshold

    def finish_epoch(self, reduce: Reduce) -> None:
        """Move the averages towards what the epoch gave, in all processes alike."""
        sums, counts = reduce(self.sums, "sum"), reduce(self.counts, "sum")
        answers = reduce(self.new_answers, "max")
        is_seen = counts > 0
        means = sums[is_seen] / counts[is_seen]
        self.margins[is_seen] = MEMORY * self.margins[is_seen] + (1 - MEMORY) * means
        self.answers[is_seen] = answers[is_seen]
        self._start_epoch()

    def make_state(self, reduce: Reduce) -> dict[str, Tensor]:
        """Plain tensors for a checkpoint; what all processes have of an epoch that is not over is added up."""
        return {
            "margins": self.margins,
            "answers": self.answers,
            "sums": reduce(self.sums, "sum"),
            "counts": reduce(self.counts, "sum"),
            "new_answers": reduce(self.new_answers, "max"),
        }

    def load_state(self, state: dict[str, Tensor], is_first: bool) -> None:
        """Go on from `make_state`. The epoch that is not over goes to the first process alone."""
        self.margins, self.answers = state["margins"], state["answers"]
        self._start_epoch()
        if is_first:
            self.sums, self.counts, self.new_answers = state["sums"], state["counts"], state["new_answers"]

    def list_doubted(self, share: float) -> list[int]:
        """The clips that are left out when this share of the epochs is done, those with the widest margin first."""
        doubted = torch.nonzero(~self.find_trusted(torch.arange(len(self.margins)), share))[:, 0]
        order: list[int] = doubted[self.margins[doubted].argsort(descending=True, stable=True)].tolist()
        return order


def report_doubt(doubt: LabelDoubt, job: TrainingJob, share: float) -> None:
    """Write the clips that are left out, when training ends with this share of the epochs done, to doubted_labels.csv
    in the run folder, and tell the user.
    """
    path = job.run.folder / DOUBTED_NAME
    class_names = sorted(job.label_map, key=lambda name: job.label_map[name])
    clips = doubt.list_doubted(share)
    rows = [
        [
            *(i, job.train_names[i], class_names[job.train_labels[i]], class_names[int(doubt.answers[i])]),
            f"{doubt.margins[i]:.3f}",
        ]
        for i in clips
    ]
    write_csv(path, ["number", "name", "label", "answer", "margin"], rows)
    if clips:
        job.run.info(
            f"{len(clips)} of {len(doubt.margins)} training clips were not learned from at the end, as their "
            f"labels are in doubt (train.label_doubt). Look at them, the most doubtful come first: {path}"
        )
