"""Which precision a training gets."""

from __future__ import annotations

import pytest
import torch

from kinegraph.devices import choose_precision


@pytest.mark.parametrize("asked", ["32", "bf16"])
def test_a_precision_that_is_named_is_taken(asked: str) -> None:
    assert choose_precision(asked, "cpu") == asked


@pytest.mark.parametrize(
    ("found", "expected"),
    [({}, "32"), ({"avx512_f": True}, "32"), ({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16")],
)
def test_auto_takes_bf16_where_the_processor_has_instructions_for_it(
    found: dict[str, bool], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    assert choose_precision("auto", "cpu") == expected
