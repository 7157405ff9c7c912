"""Why a model answers as it does: a class score split exactly over people, frames and joints.

A network that classifies the weighted mean of a map (N, M, C', T', V) with a linear layer has a score that is a sum
over the cells of that map (the reasoning of class activation maps, Zhou et al., CVPR 2016): cell (m, t, v) adds its
features times the weights of the class, times its share of the mean. These sums and the bias are the logit; nothing is
estimated. docs/explain.md says what the numbers mean and what they do not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from kinegraph.data.arrays import open_array
from kinegraph.data.missing import MaskedClips
from kinegraph.data.pipeline import InputPipeline
from kinegraph.data.sampling import place_frames
from kinegraph.errors import CheckpointError, Problem, UserError
from kinegraph.explain_picture import ExplainedClip, draw_explanation
from kinegraph.model_description import ModelDescription
from kinegraph.run import Run
from kinegraph.runtime import open_model_file
from kinegraph.storage import make_folder, write_atomically, write_json

if TYPE_CHECKING:
    from torch import Tensor, nn

FOLDER = "explanations"
STRONGEST_FRAMES = 5
TOLERANCE = 1e-3
"""Of the sum against the logit, for each 1 of logit: far above rounding, far below anything that matters."""
MAX_NAME_CHARACTERS = 60
MAX_TITLE_CHARACTERS = 100


@runtime_checkable
class Explainable(Protocol):
    """A network whose answer is `fcn`, linear, of a weighted mean of its map.

    total_stride: frames of the input from one frame of the map to the next; the first ones stand at the same place.
    """

    fcn: nn.Module
    total_stride: int

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, C, T, V, M) -> the map (N, M, C', T', V); V may be 1 in the map of a network that joins all joints."""
        ...

    def pooling_weights(self, x: Tensor) -> Tensor:
        """(N, C, T, V, M) -> (N, M, T'): what people and frames of the map weigh in the mean, 1 in all."""
        ...


@dataclass(frozen=True, eq=False)
class Explanations:
    """N clips. Contributions and bias of a clip add up to its score.

    labels         (N,) the class that is explained
    scores         (N,) its logit
    biases         (N,)
    contributions  (N, M, T', V) float64, people in the order of the file; V is 1 where the network has no joints left
    stream_sums    (N, streams) contributions of each network of a late fusion; without one a single column
    frames         (N, T') where each cell stands in the clip, in frames of the file from 0; NaN behind the clip's end
    """

    labels: NDArray[np.int64]
    scores: NDArray[np.float64]
    biases: NDArray[np.float64]
    contributions: NDArray[np.float64]
    stream_sums: NDArray[np.float64]
    frames: NDArray[np.float64]


class Explainer:
    """A trained network that says what its answers are made of. Made by `load_explainer`."""

    def __init__(
        self, path: str, network: nn.Module, description: ModelDescription, class_names: Sequence[str] = ()
    ) -> None:
        self.path, self.network, self.description = path, network, description
        self.class_names = list(class_names) or description.class_names
        self.parts = list(_list_parts(network, path))

    def explain(self, array: NDArray[Any], labels: NDArray[Any] | None = None, where: str = "input") -> Explanations:
        """Clips (N, C, T, V, M) as in the file, and classes (N,), by default those that the network answers.

        With several test clips a sequence, the first one is explained. Raises DataError for arrays that do not fit,
        UserError for labels that do not, CheckpointError if the sum of a clip is not its score.
        """
        import torch

        pipeline = self.description.pipeline or InputPipeline(array.shape[1], array.shape[3])
        values = pipeline.check(array, where)
        with torch.inference_mode():
            inputs = pipeline(values, where)
            x = torch.from_numpy(inputs if inputs.flags.writeable else inputs.copy())
            answers = self.network(x).double()
            given = answers.argmax(dim=1).numpy() if labels is None else labels
            chosen = torch.from_numpy(self._check_labels(given, len(x)))
            split = [_split_score(part, x, chosen) for part in self.parts]
            scores = answers.gather(1, chosen[:, None])[:, 0].numpy()
        contributions, biases = sum(part.cells for part in split), sum(part.biases for part in split)
        assert isinstance(contributions, np.ndarray) and isinstance(biases, np.ndarray)
        self._check_sums(contributions.sum(axis=(1, 2, 3)) + biases, scores)
        frames = find_file_frames(pipeline, values)[:, :: self.parts[0].network.total_stride]
        return Explanations(
            labels=chosen.numpy(),
            scores=scores,
            biases=biases,
            contributions=_restore_people(contributions, pipeline, values),
            stream_sums=np.stack([part.cells.sum(axis=(1, 2, 3)) for part in split], axis=1),
            frames=frames,
        )

    def _check_sums(self, sums: NDArray[np.float64], scores: NDArray[np.float64]) -> None:
        """A network that answers otherwise than by the mean it is split by would be explained wrongly."""
        errors = np.abs(sums - scores)
        if (errors > TOLERANCE * (1 + np.abs(scores))).any():
            got = f"contributions that miss the logit by {errors.max():.2g}"
            raise CheckpointError(Problem(self.path, got, "contributions that add up to it", "Please report this."))

    def _check_labels(self, labels: NDArray[Any], num_clips: int) -> NDArray[np.int64]:
        given = np.asarray(labels)
        num_classes = self.description.num_classes
        if given.shape != (num_clips,) or given.dtype.kind not in "iu":
            expected = f"a whole number for each of {num_clips} clips"
            raise UserError(Problem("labels", f"{given.dtype} of shape {given.shape}", expected))
        if num_clips and not 0 <= given.min() <= given.max() < num_classes:
            got = f"labels from {given.min()} to {given.max()}"
            raise UserError(Problem("labels", got, f"labels from 0 to {num_classes - 1}"))
        return given.astype(np.int64)


@dataclass(frozen=True, eq=False)
class _Part:
    """A network that is split: all there is, or the one for the channels of a stream in a late fusion."""

    network: Explainable
    weight: float
    channels: slice


@dataclass(frozen=True, eq=False)
class _Split:
    """What a part adds to the score: cells (N, M, T', V), biases (N,)."""

    cells: NDArray[np.float64]
    biases: NDArray[np.float64]


def load_explainer(path: str | Path, key: str = "", class_names: Sequence[str] = ()) -> Explainer:
    """Open a .pth file of Kinegraph or TAO; `key` as in `kinegraph.load`. class_names: for a file that holds none.

    Raises UserError for an ONNX file and for a network that cannot be explained, CheckpointError as `load`.
    """
    file = open_model_file(Path(path), key=key)
    if file.kind != "torch":
        hint = "Give the .pth file that it was exported from, or leave explain out."
        raise UserError(Problem(str(path), "an ONNX file, which lacks the map behind an answer", "a .pth file", hint))
    return Explainer(str(file.path), file.module, file.description, class_names)


def _list_parts(network: nn.Module, where: str) -> Iterator[_Part]:
    from kinegraph.models.late_fusion import LateFusion

    if isinstance(network, LateFusion):
        size = network.stream_channels
        for i, (branch, weight) in enumerate(zip(network.branches, network.fusion_weights.tolist(), strict=True)):
            yield _Part(_check_explainable(branch, where), weight, slice(i * size, (i + 1) * size))
    else:
        yield _Part(_check_explainable(network, where), 1.0, slice(None))


def _check_explainable(network: nn.Module, where: str) -> Explainable:
    if isinstance(network, Explainable):
        return network
    expected = "a network that classifies the mean of a map with a linear layer"
    raise UserError(Problem(where, f"a {type(network).__name__}", expected, "Leave explain out."))


def _split_score(part: _Part, x: Tensor, labels: Tensor) -> _Split:
    """The score of `labels` (N,) for the input of the network (N, C, T, V, M), cell by cell.

    In float64, so that many small cells add up.
    """
    import torch

    from kinegraph.models.late_fusion import map_stream

    network = part.network
    features = map_stream(network, x[:, part.channels], x).double()  # (N, M, C', T', V)
    shares = network.pooling_weights(x).double()[..., None] / features.shape[4]  # (N, M, T', 1)
    weight, bias = network.fcn.weight, network.fcn.bias
    assert isinstance(weight, torch.Tensor)
    rows = weight.double().flatten(1)[labels]  # (N, C')
    cells = torch.einsum("nmctv,nc->nmtv", features, rows) * shares
    biases = torch.zeros(len(x)).double() if bias is None else _pick(bias, labels)
    return _Split(part.weight * cells.numpy(), part.weight * biases.numpy())


def _pick(bias: Any, labels: Tensor) -> Tensor:
    picked: Tensor = bias.double()[labels]
    return picked


def find_file_frames(pipeline: InputPipeline, x: NDArray[np.float32]) -> NDArray[np.float64]:
    """Where the frames that the network gets (N, T) stand in clips (N, C, T, V, M) of a file.

    In frames from 0, between two of them where the input is resampled; NaN behind the last frame with a person.
    """
    from kinegraph.spec_input import InputSpec

    lengths = pipeline.clean(x).find_lengths()
    positions, is_inside = place_frames(lengths, x.shape[2], pipeline.options or InputSpec(), None)
    return np.where(is_inside, positions, np.nan)


def _restore_people(cells: NDArray[np.float64], pipeline: InputPipeline, x: NDArray[np.float32]) -> NDArray[np.float64]:
    """Cells (N, M, T', V) of people as the pipeline orders them -> of people as the file does."""
    options = pipeline.options
    if options is None or options.people_order == "file" or x.shape[4] == 1:
        return cells
    restored = np.empty_like(cells)
    in_file, ordered = clean_as_in_file(pipeline, x).data, pipeline.clean(x).data
    for n in range(len(x)):
        left = list(range(x.shape[4]))
        for m in range(x.shape[4]):
            # Two people with the same values are both absent, or there is no telling them apart
            same = next(other for other in left if np.array_equal(in_file[n, ..., other], ordered[n, ..., m]))
            left.remove(same)
            restored[n, same] = cells[n, m]
    return restored


def clean_as_in_file(pipeline: InputPipeline, x: NDArray[np.float32]) -> MaskedClips:
    """Clips (N, C, T, V, M) with missing joints filled as for the network, and nothing else changed."""
    if pipeline.options is None:
        return pipeline.clean(x)
    return replace(pipeline, options=replace(pipeline.options, people_order="file")).clean(x)


def choose_clips(num_clips: int, limit: int, is_wrong: NDArray[np.bool_] | None = None) -> list[int]:
    """At most `limit` of the clips, evenly spread, in order; of an evaluation wrong answers up to a half of them."""
    if num_clips <= limit:
        return list(range(num_clips))
    wrong = np.flatnonzero(np.zeros(num_clips, bool) if is_wrong is None else is_wrong)
    right = np.setdiff1d(np.arange(num_clips), wrong)
    num_wrong = min(len(wrong), max(limit // 2, limit - len(right)))
    chosen = [_spread(wrong, num_wrong), _spread(right, limit - num_wrong)]
    return sorted(np.concatenate(chosen).tolist())


def _spread(indices: NDArray[np.intp], count: int) -> NDArray[np.intp]:
    return indices[np.arange(count) * len(indices) // max(count, 1)]


def write_explanations(
    explainer: Explainer,
    data_path: str,
    labels: NDArray[np.int64],
    names: Sequence[str],
    run: Run,
    limit: int,
    true_labels: NDArray[np.int64] | None = None,
) -> dict[str, str]:
    """Explain answers `labels` (N,) for the clips of a .npy file: explanations.npz, explanations.json and pictures.

    A label of -1 stands for the answer of the network. names (N) of the clips; limit: clips at most, chosen by
    `choose_clips`, with true labels (N,) also wrong ones. All goes to the folder explanations/ of the run. Gives back
    the files (role -> path). Raises as `Explainer.explain`, and StorageError.
    """
    folder = make_folder(run.folder / FOLDER)
    array = open_array(data_path)
    chosen = choose_clips(len(array), limit, None if true_labels is None else labels != true_labels)
    class_names = explainer.class_names
    parts, entries = [], []
    for done, index in enumerate(chosen, start=1):
        clip = np.asarray(array[index : index + 1])
        label = None if labels[index] < 0 else labels[index : index + 1]
        found = explainer.explain(clip, label, f"{data_path}: clip {index}")
        true_label = None if true_labels is None else int(true_labels[index])
        picture = folder / f"{index:05d}_{_make_file_name(names[index])}.png"
        entry = {
            **{"index": index, "name": names[index], "class": class_names[found.labels[0]]},
            **({} if true_label is None else {"true_class": class_names[true_label]}),
            **describe_explanation(explainer, found),
            "picture": picture.name,
        }
        draw_explanation(picture, prepare_picture(explainer, clip, found, _title(entry)))
        parts.append(found)
        entries.append(entry)
        run.progress(done, len(chosen), "explain")
    files = {"explanations": folder / "explanations.json", "explanations_arrays": folder / "explanations.npz"}
    _write_arrays(files["explanations_arrays"], parts, chosen)
    content = {"model": explainer.path, "data_path": data_path, "clips": entries}
    write_json(files["explanations"], run.show(content))
    run.info(f"Explained {len(chosen)} clips in {folder}.")
    return {role: str(path) for role, path in files.items()}


def _write_arrays(path: Path, parts: Sequence[Explanations], indices: Sequence[int]) -> None:
    def join(name: str) -> NDArray[Any]:
        return np.concatenate([getattr(part, name) for part in parts])

    arrays: dict[str, Any] = {
        "indices": np.array(indices, np.int64),
        "labels": join("labels"),
        **{name: join(name).astype(np.float32) for name in ("scores", "biases", "contributions", "frames")},
    }
    with write_atomically(path) as file:
        np.savez_compressed(file, **arrays)


def describe_explanation(explainer: Explainer, found: Explanations) -> dict[str, Any]:
    """The explanation of one clip as plain data: sums by joint, person and stream, and the strongest frames."""
    cells, frames = found.contributions[0], found.frames[0]
    is_inside = ~np.isnan(frames)
    joints = _list_joints(explainer, cells.shape[2])
    by_frame = cells.sum(axis=(0, 2))
    strongest = np.flatnonzero(is_inside)[np.argsort(-by_frame[is_inside], kind="stable")[:STRONGEST_FRAMES]]
    streams = explainer.description.pipeline and explainer.description.pipeline.options
    names = list(streams.streams) if streams and len(explainer.parts) > 1 else []
    return {
        "label": int(found.labels[0]),
        "score": float(found.scores[0]),
        "bias": float(found.biases[0]),
        "joints": dict(zip(joints, cells.sum(axis=(0, 1)).tolist(), strict=True)) if joints else "absent",
        "people": cells.sum(axis=(1, 2)).tolist(),
        **({"streams": dict(zip(names, found.stream_sums[0].tolist(), strict=True))} if names else {}),
        "behind_the_end": float(by_frame[~is_inside].sum()),
        "strongest_frames": [
            {"frame": float(frames[place]), "contribution": float(by_frame[place])} for place in strongest
        ],
    }


def _list_joints(explainer: Explainer, size: int) -> tuple[str, ...]:
    """Joint names of a map with `size` joints; none where the network has joined them."""
    layout = explainer.description.layout
    return layout.joints if layout is not None and layout.num_joints == size else ()


def prepare_picture(explainer: Explainer, clip: NDArray[Any], found: Explanations, title: str) -> ExplainedClip:
    """What `draw_explanation` needs of one clip (1, C, T, V, M) and its explanation."""
    pipeline = explainer.description.pipeline or InputPipeline(clip.shape[1], clip.shape[3])
    cleaned = clean_as_in_file(pipeline, pipeline.check(clip))
    coordinates = cleaned.data[:, : pipeline.num_coordinates][:, :3]
    layout = explainer.description.layout
    assert layout is not None, "a .pth file has a layout"
    return ExplainedClip(
        title=title,
        clips=MaskedClips(coordinates, cleaned.is_real),
        layout=layout,
        contributions=found.contributions[0],
        frames=found.frames[0],
        score=float(found.scores[0]),
        bias=float(found.biases[0]),
    )


def _title(entry: dict[str, Any]) -> str:
    title = f"{entry['name']}: {entry['class']}"
    true_class = entry.get("true_class", entry["class"])
    title = " ".join((title if true_class == entry["class"] else f"{title} (wrong: it is {true_class})").split())
    return title if len(title) <= MAX_TITLE_CHARACTERS else title[: MAX_TITLE_CHARACTERS - 3] + "..."


def _make_file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name)[:MAX_NAME_CHARACTERS].strip("_") or "clip"
