"""The open-set benchmark: who is trained on and measured, and the scores; its trainings run by hand."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def open_set() -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import open_set
    finally:
        sys.path.remove(str(BENCHMARKS))
    return open_set


def test_no_fold_measures_what_it_has_seen(open_set: ModuleType) -> None:
    labels, subjects, views = (axis.ravel() for axis in np.meshgrid(np.arange(10), np.arange(1, 11), np.arange(3)))
    clips = [np.zeros((1, 20, 3), np.float32)] * len(labels)
    recordings = open_set.Recordings(clips, labels, subjects, views == 2)
    folds = open_set.split(recordings, 10)
    held_out = [label for fold in folds for label in fold.held_out]
    assert sorted(held_out) == list(range(10)), "each class once"
    for fold in folds:
        parts = [fold.fit, fold.val, fold.known, fold.unknown]
        assert all(len(part) for part in parts)
        together = np.concatenate(parts)
        assert not recordings.is_test[together].any()
        groups = [set(subjects[part].tolist()) for part in parts]
        assert groups[2] == groups[3] == set(open_set.MEASURED_SUBJECTS)
        assert groups[1] == set(open_set.VALIDATION_SUBJECTS)
        assert not groups[0] & (groups[1] | groups[2]) and not groups[1] & groups[2]
        is_new = np.isin(labels, fold.held_out)
        assert not is_new[np.concatenate(parts[:3])].any() and is_new[fold.unknown].all()
        # Nothing is left out but the held-out classes of subjects who are not measured
        left = ~recordings.is_test & ~np.isin(np.arange(len(labels)), together)
        assert is_new[left].all() and not np.isin(subjects[left], open_set.MEASURED_SUBJECTS).any()


def test_scores_of_known_answers(open_set: ModuleType) -> None:
    logits = np.array([[4.0, 0.0, 0.0], [1.0, 1.0, 1.0]], np.float32)
    sure = np.exp(4) / (np.exp(4) + 2)
    np.testing.assert_allclose(open_set.find_confidence(logits, 1.0), [sure, 1 / 3])
    np.testing.assert_allclose(open_set.find_energy(logits), [np.log(np.exp(4) + 2), 1 + np.log(3)])
    assert open_set.compare(np.array([3.0, 2.0]), np.array([2.0, 1.0])) == 0.875
    normalised = np.log(np.full((4, 3), 1 / 3, np.float32))
    energies = open_set.find_energy(normalised)
    assert open_set.compare(energies[:2], energies[2:]) is None


def test_mean_over_folds(open_set: ModuleType) -> None:
    folds = [{"held_out": ["a"], "clips": {"known": 3}, "auroc": value, "energy": None} for value in (0.5, 0.75)]
    assert open_set.summarise(folds) == {"auroc": 0.625, "energy": None}
