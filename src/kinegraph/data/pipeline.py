"""The input steps between an array of clips and a network; a checkpoint and an ONNX file store them.

    clean -> normalise -> sample -> [augmentation, in training] -> streams

Only NumPy is needed: an exported model answers without torch. The same steps take torch tensors, for training.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kinegraph.data.array_namespace import Array
from kinegraph.data.arrays import AXIS_LETTERS, NonFiniteCount, cast_to_float32, open_array
from kinegraph.data.body import Body, find_body
from kinegraph.data.input_checks import find_option_problems, find_score_channel, find_step_obstacles, read_options
from kinegraph.data.missing import MaskedClips, find_real, hold_missing, interpolate_missing, order_people
from kinegraph.data.normalise import normalise
from kinegraph.data.online_input import InputState, start_input, step_input
from kinegraph.data.sampling import TimeDraws, draw_test_clip, sample
from kinegraph.data.streams import make_streams
from kinegraph.errors import DataError, Problem, SpecError, UserError
from kinegraph.skeleton.layouts import Layout

if TYPE_CHECKING:
    from kinegraph.spec_input import InputSpec

PLAIN_VERSION = 1
"""A pipeline without steps: what versions of Kinegraph before the steps wrote and read."""
VERSION = 2
CLIPS_LOOKED_AT = 32
PLAIN_KEYS = ("version", "num_channels", "num_joints", "steps")
KEYS = ("version", "num_channels", "num_joints", "options", "body")


@dataclass(frozen=True)
class InputPipeline:
    """What every clip goes through before the network, in training, evaluation, inference and export alike.

    num_channels and num_joints are those of the file. Without options (and body) there are no steps: arrays stay as
    they are. Make one with steps by `build_pipeline`.
    """

    num_channels: int
    num_joints: int
    options: InputSpec | None = None
    body: Body | None = None

    @property
    def output_channels(self) -> int:
        """Channels that the network gets."""
        return self.num_channels * (len(self.options.streams) if self.options else 1)

    @property
    def num_coordinates(self) -> int:
        """Channels that are coordinates: all, or all but the score, which is the last one."""
        has_score = self.options is not None and self.options.score_channel >= 0
        return self.num_channels - has_score

    @property
    def is_causal(self) -> bool:
        """Whether frames can go through one at a time, each without knowing later ones."""
        return not find_step_obstacles(self.options)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint or the metadata of an ONNX file; `from_dict` reads it back."""
        shape = {"num_channels": self.num_channels, "num_joints": self.num_joints}
        if self.options is None or self.body is None:
            return {"version": PLAIN_VERSION, **shape, "steps": []}
        return {
            "version": VERSION,
            **shape,
            "options": asdict(self.options),
            "body": self.body.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: Any, where: str = "input pipeline") -> InputPipeline:
        """The pipeline that `to_dict` wrote; DataError for an unknown version, an unknown step or damaged
        data.
        """
        if not isinstance(data, Mapping):
            raise DataError(Problem(where, type(data).__name__, "a mapping with " + ", ".join(KEYS)))
        version = data.get("version")
        if version not in (PLAIN_VERSION, VERSION) or isinstance(version, bool):
            hint = "The model was made by another version of Kinegraph: use that version, or export it again."
            raise DataError(Problem(f"{where}.version", reprlib.repr(version), f"{PLAIN_VERSION} or {VERSION}", hint))
        problems = _check_keys(data, PLAIN_KEYS if version == PLAIN_VERSION else KEYS, where)
        if problems:
            raise DataError(*problems)
        num_channels, num_joints = data["num_channels"], data["num_joints"]
        if version == PLAIN_VERSION:
            return cls(num_channels, num_joints)
        options = read_options(data.get("options"), f"{where}.options")
        body = Body.from_dict(data.get("body"), num_joints, f"{where}.body")
        problems = find_option_problems(options, num_channels, num_joints, body, f"{where}.options")
        if problems:
            raise DataError(*problems)
        return cls(num_channels, num_joints, options, body)

    def __call__(self, x: np.ndarray, where: str = "input") -> np.ndarray:
        """(N, C, T, V, M) numbers -> (N, C', T', V, M) float32, contiguous.

        DataError, with every problem, for another number of axes, channels or joints, no frames or people,
        NaN or infinity.
        """
        return next(self.make_test_clips(x, where))

    def make_test_clips(self, x: np.ndarray, where: str = "input") -> Iterator[np.ndarray]:
        """The `test_clips` clips of each sequence that are answered together, one at a time, the first as a call gives
        it: (N, C, T, V, M) -> each (N, C', T', V, M). Raises as the call does.
        """
        x = self.check(x, where)
        if self.options is None:
            yield x
            return
        with np.errstate(over="ignore", invalid="ignore"):
            clips = self.normalise(self.clean(x))
        for number in range(self.options.test_clips):
            draws = draw_test_clip(self.options, number, len(x))
            with np.errstate(over="ignore", invalid="ignore"):
                y = np.ascontiguousarray(self.finish(self.sample(clips, draws)), np.float32)
            yield _check_result(y, x, where)

    def check(self, x: np.ndarray, where: str = "input") -> np.ndarray:
        """The first half of a call: (N, C, T, V, M) numbers -> the same as float32. Raises as the call does."""
        x = np.asarray(x)
        problems = self._check_shape(x, where)
        if problems:
            raise DataError(*problems)
        y = cast_to_float32(x)
        count = NonFiniteCount()
        count.add(y)
        problem = count.as_problem(where)
        if problem:
            raise DataError(problem)
        return y

    def run(self, x: Array) -> Array:
        """The second half: (N, C, T, V, M) float32, NumPy or torch -> (N, C', T', V, M)."""
        if self.options is None:
            return x
        return self.finish(self.sample(self.normalise(self.clean(x))))

    def clean(self, x: Array) -> MaskedClips:
        """Find what is missing, fill it as `missing` says, and put the people in order."""
        options = self.options
        if options is None:
            return find_real(x, self.num_channels)
        has_score = options.score_channel >= 0
        clips = find_real(x, self.num_coordinates, options.score_threshold, options.origin_joint, has_score)
        if options.missing == "hold":
            clips = hold_missing(clips, self.num_coordinates)
        elif options.missing == "interpolate":
            clips = interpolate_missing(clips, self.num_coordinates)
        return order_people(clips, options.people_order, self.num_coordinates)

    def normalise(self, clips: MaskedClips) -> MaskedClips:
        """Centre, scale and align."""
        if self.options is None or self.body is None:
            return clips
        return normalise(clips, self.num_coordinates, self.options, self.body)

    def sample(self, clips: MaskedClips, draws: TimeDraws | None = None) -> MaskedClips:
        """Choose frames: always the same ones, or with draws at random."""
        if self.options is None and draws is None:
            return clips
        return sample(clips, self.options or _make_default_options(), draws)

    def finish(self, clips: MaskedClips) -> Array:
        """The streams of the network."""
        if self.options is None or self.body is None:
            return clips.data
        return make_streams(clips, self.options.streams, self.num_coordinates, self.body)

    def start(self, num_people: int = 1) -> InputState:
        """The state before the first frame, for `step`: arrays with an entry for each person along the first axis.

        Raises UserError for a pipeline that is not causal, naming every step that is not.
        """
        obstacles = find_step_obstacles(self.options)
        if obstacles:
            raise UserError(*obstacles)
        return start_input(num_people, self.num_channels, self.num_coordinates, self.num_joints, self.options)

    def step(self, frames: NDArray[Any], state: InputState) -> tuple[NDArray[np.float32], InputState]:
        """The next frame (N, C, V) of N people -> (N, C', V), as a call on all frames so far would end; the new state.

        The given state stays as it was. Raises DataError for another shape, NaN or infinity.
        """
        num_people = len(next(iter(state.values()))) if state else len(frames)
        values = np.asarray(frames)
        if values.ndim != 3 or len(values) != num_people:
            expected = f"({num_people} people of the state, {self.num_channels} channels, {self.num_joints} joints)"
            raise DataError(Problem("frames", f"shape {values.shape}", expected))
        checked = self.check(values[:, :, None, :, None], "frames")
        if self.options is None or self.body is None:
            return checked[:, :, 0, :, 0], state
        with np.errstate(over="ignore", invalid="ignore"):
            result, state = step_input(checked, state, self.num_coordinates, self.options, self.body)
        return _check_result(result, checked, "frames"), state

    def _check_shape(self, x: np.ndarray, where: str) -> list[Problem]:
        problems = []
        if x.dtype.kind not in "fiu":
            problems.append(Problem(where, f"dtype {x.dtype}", "numbers (float32)"))
        if x.ndim != 5:
            hint = "Add the axis of people: x[..., numpy.newaxis]." if x.ndim == 4 else ""
            problems.append(Problem(where, f"{x.ndim} axes, shape {x.shape}", f"5 axes {AXIS_LETTERS}", hint))
            return problems
        _, num_channels, num_frames, num_joints, num_people = x.shape
        if num_channels != self.num_channels:
            got = f"{num_channels} channels in shape {x.shape}"
            problems.append(Problem(where, got, f"{self.num_channels} channels, as the model was trained with"))
        if num_joints != self.num_joints:
            got = f"{num_joints} joints in shape {x.shape}"
            problems.append(Problem(where, got, f"{self.num_joints} joints, as the model was trained with"))
        if num_frames < 1 or num_people < 1:
            problems.append(Problem(where, f"shape {x.shape}", "at least one frame and one person"))
        return problems


def build_pipeline(options: InputSpec, num_channels: int, layout: Layout) -> InputPipeline:
    """The pipeline of a spec's `input` for files with this many channels; the defaults give one without steps.

    Raises SpecError with every option that does not fit the channels or the layout.
    """
    if options == _make_default_options():
        return InputPipeline(num_channels, layout.num_joints)
    body = find_body(layout)
    problems = find_option_problems(options, num_channels, layout.num_joints, body, "input")
    if problems:
        raise SpecError(*problems)
    return InputPipeline(num_channels, layout.num_joints, options, body)


def settle_origin(pipeline: InputPipeline, data_path: str) -> InputPipeline:
    """The pipeline that knows whether the coordinates of its training data are relative to the centre joint.

    They are taken to be if the centre is zero in every frame that is looked at, and each coordinate of the other joints
    has both signs. Without knowing it, such a centre would count as missing. Only where origin_joint is -1.
    """
    options, body = pipeline.options, pipeline.body
    if options is None or body is None or options.origin_joint != -1:
        return pipeline
    coordinates = read_some_clips(data_path)[:, : pipeline.num_coordinates]
    axes = (0, 2, 3, 4)
    is_around = bool(((coordinates.min(axis=axes) < 0) & (coordinates.max(axis=axes) > 0)).all())
    is_relative = is_around and not coordinates[:, :, :, body.centre].any()
    return replace(pipeline, options=replace(options, origin_joint=body.centre if is_relative else -2))


def look_for_score(data_path: str) -> int:
    """The channel of a file that looks like a score, or -1."""
    values = np.moveaxis(read_some_clips(data_path), 1, 0)
    limits = values.reshape(len(values), -1)
    return find_score_channel(limits.min(axis=1).tolist(), limits.max(axis=1).tolist())


def read_some_clips(data_path: str) -> NDArray[np.float32]:
    """Up to CLIPS_LOOKED_AT clips (n, C, T, V, M), from all parts of a file."""
    array = open_array(data_path)
    return cast_to_float32(array[:: max(1, len(array) // CLIPS_LOOKED_AT)][:CLIPS_LOOKED_AT])


def _check_result(y: np.ndarray, x: np.ndarray, where: str) -> np.ndarray:
    if np.isfinite(y).all():
        return y
    got = f"values up to {np.abs(x).max():.2g}"
    raise DataError(Problem(where, got, "values that can be subtracted and squared as float32: these are too large"))


def _make_default_options() -> InputSpec:
    from kinegraph.spec_input import InputSpec  # costs 0.1 s, which a pipeline without steps does not need

    return InputSpec()


def _check_keys(data: Mapping[str, Any], keys: tuple[str, ...], where: str) -> list[Problem]:
    problems = [
        Problem(f"{where}.{key}", "an unknown key", "one of " + ", ".join(keys)) for key in data if key not in keys
    ]
    for key in ("num_channels", "num_joints"):
        value = data.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            problems.append(Problem(f"{where}.{key}", reprlib.repr(value), "a whole number of at least 1"))
    if "steps" not in keys:
        return problems
    steps = data.get("steps")
    if not isinstance(steps, list | tuple) or not all(isinstance(step, str) for step in steps):
        return [*problems, Problem(f"{where}.steps", reprlib.repr(steps), "a list of step names")]
    expected = "no steps: Kinegraph has none of this form"
    return [*problems, *(Problem(f"{where}.steps[{i}]", reprlib.repr(step), expected) for i, step in enumerate(steps))]
