from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

# No test asserts a time: machines are shared
settings.register_profile("kinegraph", deadline=None)
settings.load_profile("kinegraph")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with golden files and real recordings beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is missing: golden files and real recordings are not part of the repository")
    return SHARED
