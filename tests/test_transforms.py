from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kinegraph.data.transforms import (
    MOVE_DRAWS,
    TrainingAugmentation,
    pad_window,
    random_choose,
    random_move,
    uniform_from_counters,
)
from reference_files import load_reference


def make_clips(num_clips: int = 5, num_frames: int = 7, num_channels: int = 3) -> torch.Tensor:
    """Clips without zeros, so that padding can be told from content."""
    values = np.random.default_rng(3).uniform(0.1, 1, (num_clips, num_channels, num_frames, 4, 2))
    return torch.from_numpy(values.astype(np.float32))


# A SplitMix64 generator seeded with 0 and with 1234567 starts with these values (published test vectors).
@pytest.mark.parametrize(("seed", "expected"), [(0, 0xE220A8397B1DCDAF), (1234567, 6457827717110365317)])
def test_mixing_function_gives_the_published_values(seed: int, expected: int) -> None:
    from kinegraph.data.counters import _mix

    assert int(_mix(np.array([seed], np.uint64))[0]) == expected


def test_uniforms_equal_a_restatement_in_plain_integers() -> None:
    def mix(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    drawn = uniform_from_counters(1234, 7, np.array([0, 3, 99999]), 4, 2)
    for row, index in enumerate([0, 3, 99999]):
        for draw in range(4):
            state = 0
            for coordinate in (1234, 2, 7, index, draw):
                state = mix(state ^ coordinate)
            assert drawn[row, draw] == (state >> 11) / 2**53


@pytest.mark.parametrize("vary", ["index", "epoch", "seed", "draw", "stream"])
def test_uniforms_are_uniform_along_every_coordinate(vary: str) -> None:
    count, bins = 4000, 20
    one = np.array([5])
    drawn = {
        "index": lambda: uniform_from_counters(1, 2, np.arange(count), 1, 0)[:, 0],
        "epoch": lambda: np.concatenate([uniform_from_counters(1, e, one, 1, 0)[0] for e in range(count)]),
        "seed": lambda: np.concatenate([uniform_from_counters(s, 2, one, 1, 0)[0] for s in range(count)]),
        "draw": lambda: uniform_from_counters(1, 2, one, count, 0)[0],
        "stream": lambda: np.concatenate([uniform_from_counters(1, 2, one, 1, s)[0] for s in range(count)]),
    }[vary]()
    assert drawn.shape == (count,) and drawn.min() >= 0 and drawn.max() < 1
    observed = np.bincount((drawn * bins).astype(int), minlength=bins)
    chi_square = float(((observed - count / bins) ** 2 / (count / bins)).sum())
    assert chi_square < 43.8  # 19 degrees of freedom, p = 0.001
    # Kolmogorov-Smirnov, p = 0.001; and neighbours are not correlated (5 standard deviations).
    steps = np.arange(1, count + 1) / count
    assert float(np.abs(np.sort(drawn) - steps).max()) < 1.95 / np.sqrt(count) + 1 / count
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 5 / np.sqrt(count)


def test_draws_streams_epochs_and_seeds_are_independent() -> None:
    count = 4000
    clips = np.arange(count)
    columns = [
        *uniform_from_counters(1, 0, clips, 8, 1).T,
        *uniform_from_counters(1, 0, clips, 8, 2).T,
        *uniform_from_counters(1, 1, clips, 8, 1).T,
        *uniform_from_counters(2, 0, clips, 8, 1).T,
    ]
    correlations = np.corrcoef(columns)
    off_diagonal = correlations[~np.eye(len(columns), dtype=bool)]
    assert len(off_diagonal) == 32 * 31
    assert np.abs(off_diagonal).max() < 5 / np.sqrt(count)
    # Two draws together fill the unit square evenly: 100 cells, 99 degrees of freedom, p = 0.001.
    cells = (columns[0] * 10).astype(int) * 10 + (columns[1] * 10).astype(int)
    observed = np.bincount(cells, minlength=100)
    assert float(((observed - count / 100) ** 2 / (count / 100)).sum()) < 148.2


@given(
    seed=st.integers(-1, 2**63),
    epoch=st.integers(0, 10**6),
    clips=st.lists(st.integers(0, 10**9), min_size=1, max_size=30),
    num_draws=st.integers(1, 9),
)
@settings(max_examples=50, deadline=None)
def test_uniforms_do_not_depend_on_the_batch(seed: int, epoch: int, clips: list[int], num_draws: int) -> None:
    together = uniform_from_counters(seed, epoch, np.array(clips), num_draws, 3)
    assert together.dtype == np.float64 and together.shape == (len(clips), num_draws)
    for row, clip in enumerate(clips):
        alone = uniform_from_counters(seed, epoch, np.array([clip]), num_draws + 2, 3)
        assert np.array_equal(together[row], alone[0, :num_draws])


def test_pad_window_adds_zeros_at_the_end_and_never_crops() -> None:
    x = make_clips(num_frames=7)
    padded = pad_window(x, 10)
    assert padded.shape == (5, 3, 10, 4, 2)
    assert torch.equal(padded[:, :, :7], x) and not padded[:, :, 7:].any()
    for window_size in (-1, 3, 7):
        assert torch.equal(pad_window(x, window_size), x)


def test_random_choose_crops_every_place_equally_often() -> None:
    x = make_clips(num_clips=6, num_frames=7)
    uniforms = np.array([[0.0], [0.19], [0.21], [0.5], [0.99], [1 - 2**-53]])
    chosen = random_choose(x, 3, uniforms)
    assert chosen.shape == (6, 3, 3, 4, 2) and chosen.is_contiguous()
    for clip, start in enumerate([0, 0, 1, 2, 4, 4]):
        assert torch.equal(chosen[clip], x[clip, :, start : start + 3])


def test_random_choose_places_a_short_clip_among_zeros() -> None:
    x = make_clips(num_clips=5, num_frames=7)
    chosen = random_choose(x, 9, np.array([0.0, 0.34, 0.66, 0.67, 0.99])[:, None])
    assert chosen.shape == (5, 3, 9, 4, 2) and chosen.is_contiguous()
    for clip, start in enumerate([0, 1, 1, 2, 2]):
        expected = torch.zeros(3, 9, 4, 2)
        expected[:, start : start + 7] = x[clip]
        assert torch.equal(chosen[clip], expected)


def test_random_choose_leaves_fitting_and_whole_clips_alone() -> None:
    x = make_clips(num_frames=7)
    for window_size in (-1, 7):
        assert torch.equal(random_choose(x, window_size, np.full((5, 1), 0.9)), x)


@given(
    num_frames=st.integers(1, 12),
    num_channels=st.integers(2, 4),
    draws=st.lists(
        # Never on a boundary between two choices, where rounding decides.
        st.lists(st.integers(0, 63).map(lambda i: (i + 0.5) / 64), min_size=MOVE_DRAWS, max_size=MOVE_DRAWS),
        min_size=1,
        max_size=4,
    ),
)
@settings(max_examples=40, deadline=None)
def test_random_move_equals_the_plain_restatement(num_frames: int, num_channels: int, draws: list[list[float]]) -> None:
    move_clip = load_reference("random_move_plain").move_clip
    x = make_clips(len(draws), num_frames, num_channels)
    before = x.clone()
    moved = random_move(x, np.array(draws))
    assert torch.equal(x, before), "the input was changed in place"
    assert moved.shape == x.shape and moved.dtype == torch.float32
    for clip, row in enumerate(draws):
        np.testing.assert_allclose(moved[clip].numpy(), move_clip(x[clip].numpy(), row), atol=2e-6)


def test_random_move_moves_the_frames_it_should() -> None:
    # Rotation 0 -> 10 degrees, scale 1 -> 1, no shift: the first frame stays, the last turns by 10 degrees.
    draws = np.array([[0.5, 0.99, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]])
    x = make_clips(1, 6)
    moved = random_move(x, draws)
    assert torch.equal(moved[:, :, 0], x[:, :, 0])
    radius, turned = (torch.hypot(y[:, 0], y[:, 1]) for y in (x, moved))
    torch.testing.assert_close(radius, turned)
    angle = torch.atan2(moved[:, 1, -1], moved[:, 0, -1]) - torch.atan2(x[:, 1, -1], x[:, 0, -1])
    torch.testing.assert_close(torch.rad2deg(angle), torch.full_like(angle, 10.0))
    assert torch.equal(moved[:, 2], x[:, 2])


def test_random_move_needs_two_channels() -> None:
    with pytest.raises(ValueError, match="channels 0 and 1"):
        random_move(make_clips(num_channels=1), np.zeros((5, MOVE_DRAWS)))


@pytest.mark.parametrize("window_size", [-1, 4, 7, 11])
@pytest.mark.parametrize("choose", [False, True])
def test_augmentation_depends_on_seed_epoch_and_clip_only(window_size: int, choose: bool) -> None:
    augment = TrainingAugmentation(window_size, random_choose=choose, random_move=True, seed=5)
    x = make_clips(6)
    index = torch.tensor([40, 7, 7000, 3, 1, 0])
    together = augment(x, index, epoch=2)
    order = torch.tensor([5, 2, 0])
    assert torch.equal(augment(x[order], index[order], epoch=2), together[order])
    for clip in range(6):
        alone = augment(x[clip : clip + 1], index[clip : clip + 1].numpy(), epoch=2)
        assert torch.equal(alone[0], together[clip])
    assert not torch.equal(augment(x, index, epoch=3), together)
    other_seed = TrainingAugmentation(window_size, random_choose=choose, random_move=True, seed=6)
    assert not torch.equal(other_seed(x, index, epoch=2), together)


def test_augmentation_pads_first_and_moves_then() -> None:
    x, index = make_clips(), torch.arange(5)
    moved = TrainingAugmentation(9, random_move=True, seed=1)(x, index, 0)
    draws = uniform_from_counters(1, 0, index.numpy(), MOVE_DRAWS, 2)
    assert torch.equal(moved, random_move(pad_window(x, 9), draws))
    assert moved[:, :2, 7:].any(), "padded frames are shifted as well"
    assert torch.equal(TrainingAugmentation(9)(x, index, 0), pad_window(x, 9))
    assert torch.equal(TrainingAugmentation()(x, index, 0), x)


def test_data_modules_work_without_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import numpy, kinegraph.data.labels, kinegraph.data.inspect, kinegraph.data.checks\n"
        "from kinegraph.data.pipeline import InputPipeline\n"
        "print(InputPipeline(3, 4)(numpy.ones((1, 3, 2, 4, 1))).sum())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "24.0"
