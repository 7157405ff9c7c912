from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kinegraph.whole_numbers import check_whole_number


@given(st.integers(), st.integers(-100, 100), st.integers(-100, 100))
def test_whole_numbers_between_the_limits_pass(value: int, smallest: int, largest: int) -> None:
    if value in range(smallest, largest + 1):
        assert check_whole_number(value, "count", smallest, largest) == value
    else:
        with pytest.raises(ValueError, match="count is"):
            check_whole_number(value, "count", smallest, largest)


@pytest.mark.parametrize("text", ["true", "false", "1.0", "1e0", '"1"', "null", "[1]", "NaN", '{"a": 1}'])
def test_what_json_holds_instead_is_refused_by_name(text: str) -> None:
    value: Any = json.loads(text)
    with pytest.raises(ValueError, match=r"^num_joints is .{1,40}$"):
        check_whole_number(value, "num_joints", 0, 10)


def test_a_long_value_is_told_shortly() -> None:
    with pytest.raises(ValueError) as caught:
        check_whole_number("x" * 100_000, "num_joints", 0, 10)
    assert len(str(caught.value)) < 60
