"""The cheap baseline: features in the manner of DD-Net and a kernel ridge classifier, in closed form.

Features: the distances between all pairs of joints, the slow and the fast motion (Yang et al., "Make Skeleton-based
Action Recognition Model Smaller, Faster and Better", 2019, section 3), and the joints relative to the mean of a frame;
of clips stretched to a number of frames, centred, scaled and, in 3D, turned to the front as the first frame says.
Classifier: ridge regression of the classes (+1, -1) on a linear or a Gaussian kernel. Its options are chosen on
validation clips from one grid, the same for all data sets. Nothing is random.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kinegraph.data.pipeline import build_pipeline
from kinegraph.skeleton.layouts import Layout
from kinegraph.spec_input import InputSpec

Values = NDArray[np.float64]
GRID: dict[str, tuple[Any, ...]] = {
    "num_frames": (16, 32),
    "groups": ("distances motions", "distances positions", "distances motions positions"),
    "width": (0.0, 0.25, 0.5, 1.0, 2.0),
    "ridge": (1e-4, 1e-3, 1e-2, 1e-1, 1.0),
}
BLOCK = 64


@dataclass(frozen=True)
class BaselineOptions:
    """width: squared width of the Gaussian, in mean squared distances of the training clips; 0: a linear kernel.
    ridge: in units of the mean of the kernel's diagonal."""

    num_frames: int
    groups: str
    width: float
    ridge: float


@dataclass(frozen=True)
class BaselineModel:
    """`scales`: what each group of features is multiplied by. coefficients (N, classes) for the training clips."""

    options: BaselineOptions
    means: list[Values]
    scales: list[float]
    features: Values
    squared_width: float
    coefficients: Values
    offset: Values

    @property
    def num_parameters(self) -> int:
        """Numbers that the classifier keeps: features and coefficients of the training clips."""
        return self.features.size + self.coefficients.size

    @property
    def multiply_adds(self) -> int:
        """For a clip: the kernel with every training clip, and the scores."""
        return self.num_parameters


def make_groups(
    clips: NDArray[np.float32], layout: Layout, score_channel: int, num_frames: int, chosen: str
) -> list[Values]:
    """(N, C, T, V, 1) with zeros after each clip -> groups of features (N, D). `chosen` names them: distances, motions
    (two groups, slow and fast), positions."""
    num_coordinates = clips.shape[1] - (score_channel >= 0)
    options = InputSpec(
        missing="interpolate",
        score_channel=score_channel,
        centre="first",
        scale="first",
        align="first" if num_coordinates == 3 else "none",
        sampling="crop_resize",
        test_crop=1.0,
        num_frames=num_frames,
    )
    pipeline = build_pipeline(options, clips.shape[1], layout)
    blocks = [pipeline(clips[start : start + BLOCK]) for start in range(0, len(clips), BLOCK)]
    x = np.concatenate(blocks)[:, :num_coordinates, ..., 0].transpose(0, 2, 3, 1).astype(np.float64)
    first, second = np.triu_indices(x.shape[2], 1)
    made = {
        "distances": [np.linalg.norm(x[:, :, first] - x[:, :, second], axis=3)],
        "motions": [np.diff(x, axis=1), x[:, 2::2] - x[:, :-2:2]],
        "positions": [x - x.mean(axis=2, keepdims=True)],
    }
    return [group.reshape(len(x), -1) for name in chosen.split() for group in made[name]]


def compute_kernel(options: BaselineOptions, squared_distances: Values, products: Values, width: float) -> Values:
    return products if options.width == 0 else np.exp(-squared_distances / width)


def measure_distances(a: Values, b: Values) -> tuple[Values, Values]:
    """(N, D), (M, D) -> squared distances and inner products (N, M)."""
    products = a @ b.T
    squared = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1)[None] - 2 * products
    return np.maximum(squared, 0), products


def make_targets(labels: NDArray[np.int64], num_classes: int) -> Values:
    return np.where(labels[:, None] == np.arange(num_classes), 1.0, -1.0)


def scale_groups(groups: list[Values], means: list[Values], scales: list[float]) -> Values:
    """Groups (N, D) -> features (N, sum of D) in which every group weighs the same."""
    return np.concatenate([(g - mean) * scale for g, mean, scale in zip(groups, means, scales, strict=True)], axis=1)


def measure_groups(groups: list[Values]) -> tuple[list[Values], list[float]]:
    """Mean (D,) of every feature, and the factor that gives each group a mean squared length of 1."""
    means = [group.mean(axis=0) for group in groups]
    spreads = [((group - mean) ** 2).sum(axis=1).mean() for group, mean in zip(groups, means, strict=True)]
    return means, [1 / np.sqrt(max(spread, 1e-12)) for spread in spreads]


def fit_baseline(
    groups: list[Values], labels: NDArray[np.int64], num_classes: int, options: BaselineOptions
) -> BaselineModel:
    """Kernel ridge regression, solved exactly."""
    means, scales = measure_groups(groups)
    features = scale_groups(groups, means, scales)
    squared, products = measure_distances(features, features)
    width = options.width * squared.mean()
    kernel = compute_kernel(options, squared, products, width)
    targets = make_targets(labels, num_classes)
    offset = targets.mean(axis=0)
    ridge = options.ridge * np.trace(kernel) / len(kernel)
    coefficients = np.linalg.solve(kernel + ridge * np.eye(len(kernel)), targets - offset)
    return BaselineModel(options, means, scales, features, width, coefficients, offset)


def compute_scores(model: BaselineModel, groups: list[Values]) -> Values:
    """Groups (N, D) of other clips -> scores (N, classes)."""
    features = scale_groups(groups, model.means, model.scales)
    squared, products = measure_distances(features, model.features)
    return compute_kernel(model.options, squared, products, model.squared_width) @ model.coefficients + model.offset


def list_options() -> list[BaselineOptions]:
    """The grid."""
    return [BaselineOptions(*values) for values in itertools.product(*GRID.values())]


def choose_options(
    fit: NDArray[np.float32],
    fit_labels: NDArray[np.int64],
    val: NDArray[np.float32],
    val_labels: NDArray[np.int64],
    layout: Layout,
    score_channel: int,
    num_classes: int,
) -> tuple[BaselineOptions, int]:
    """The options with the most right answers on the validation clips, then with the least squared error.

    fit and val are clips (N, C, T, V, 1). Gives back the options and the number of right answers.
    """
    ranked: list[tuple[tuple[int, float], BaselineOptions]] = []
    targets = make_targets(val_labels, num_classes)
    for num_frames, chosen in itertools.product(GRID["num_frames"], GRID["groups"]):
        fit_groups, val_groups = (make_groups(clips, layout, score_channel, num_frames, chosen) for clips in (fit, val))
        for options, scores in _try_options(fit_groups, fit_labels, val_groups, num_classes, num_frames, chosen):
            right = int((scores.argmax(axis=1) == val_labels).sum())
            ranked.append(((right, -float(((scores - targets) ** 2).mean())), options))
    (right, _), options = max(ranked, key=lambda pair: pair[0])
    return options, right


def _try_options(
    fit_groups: list[Values],
    fit_labels: NDArray[np.int64],
    val_groups: list[Values],
    num_classes: int,
    num_frames: int,
    chosen: str,
) -> Iterator[tuple[BaselineOptions, Values]]:
    """Scores of the validation clips for every width and ridge; one decomposition serves all ridges of a kernel."""
    means, scales = measure_groups(fit_groups)
    features, others = scale_groups(fit_groups, means, scales), scale_groups(val_groups, means, scales)
    own, across = measure_distances(features, features), measure_distances(others, features)
    targets = make_targets(fit_labels, num_classes)
    offset = targets.mean(axis=0)
    for width in GRID["width"]:
        options = BaselineOptions(num_frames, chosen, width, 0.0)
        squared_width = width * own[0].mean()
        kernel = compute_kernel(options, *own, squared_width)
        values, vectors = np.linalg.eigh(kernel)
        projected, seen = vectors.T @ (targets - offset), compute_kernel(options, *across, squared_width) @ vectors
        for ridge in GRID["ridge"]:
            shrunk = projected / (values + ridge * np.trace(kernel) / len(kernel))[:, None]
            yield BaselineOptions(num_frames, chosen, width, ridge), seen @ shrunk + offset
