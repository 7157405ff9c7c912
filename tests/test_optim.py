from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kinegraph.optim import LearningRateSchedule, build_optimizer
from kinegraph.spec_train import OptimSpec


def list_rates(options: OptimSpec, num_epochs: int, steps: int) -> list[float]:
    schedule = LearningRateSchedule(options, num_epochs, steps)
    return [schedule.compute_lr(epoch, step) for epoch in range(num_epochs) for step in range(steps)]


def make_torch_optimizer(lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def test_multistep_agrees_with_torch() -> None:
    optimizer = make_torch_optimizer(0.1)
    reference = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5], gamma=0.2)
    rates = list_rates(OptimSpec(lr=0.1, lr_steps=[3, 5], lr_decay=0.2), 8, 1)
    for rate in rates:
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()


def test_cosine_agrees_with_torch() -> None:
    optimizer = make_torch_optimizer(0.1)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=12, eta_min=0.001)
    rates = list_rates(OptimSpec(lr=0.1, lr_scheduler="Cosine", min_lr=0.001), 4, 3)
    assert len(rates) == 12
    for rate in rates:
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()


@given(
    losses=st.lists(st.floats(0.1, 5.0), min_size=1, max_size=30),
    patience=st.integers(1, 4),
    decay=st.floats(0.1, 0.9),
)
def test_autoreduce_agrees_with_torch(losses: list[float], patience: int, decay: float) -> None:
    optimizer = make_torch_optimizer(0.1)
    reference = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=decay, patience=patience, min_lr=1e-3, eps=0
    )
    options = OptimSpec(lr=0.1, lr_scheduler="AutoReduce", patience=patience, lr_decay=decay, min_lr=1e-3)
    schedule = LearningRateSchedule(options, len(losses), 1)
    for epoch, loss in enumerate(losses):
        assert schedule.compute_lr(epoch, 0) == pytest.approx(optimizer.param_groups[0]["lr"])
        reference.step(loss)
        schedule.finish_epoch({"val_loss": loss})
        resumed = LearningRateSchedule(options, len(losses), 1)
        resumed.load_state_dict(schedule.state_dict())
        schedule = resumed
    assert schedule.compute_lr(len(losses), 0) == pytest.approx(optimizer.param_groups[0]["lr"])


def test_warmup_rises_linearly_to_lr() -> None:
    rates = list_rates(OptimSpec(lr=0.2, warmup_epochs=2, lr_steps=[100]), 4, 5)
    assert rates[:10] == pytest.approx([0.02 * (i + 1) for i in range(10)])
    assert rates[10:] == pytest.approx([0.2] * 10)
    assert math.isclose(max(rates), 0.2)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("torch.optim.SGD", {"momentum": 0.8, "nesterov": True, "weight_decay": 0.01}),
        ("torch.optim.Adam", {"weight_decay": 0.01}),
        ("torch.optim.Adamax", {"weight_decay": 0.01}),
        ("torch.optim.AdamW", {"weight_decay": 0.01}),
    ],
)
def test_build_optimizer(name: Any, expected: dict[str, Any]) -> None:
    optimizer = build_optimizer(
        OptimSpec(optimizer_type=name, lr=0.3, momentum=0.8, weight_decay=0.01), [torch.nn.Parameter(torch.zeros(2))]
    )
    assert f"torch.optim.{type(optimizer).__name__}" == name
    group = optimizer.param_groups[0]
    assert group["lr"] == 0.3
    assert {key: group[key] for key in expected} == expected
