"""Unit tests are deterministic: hypothesis draws the same examples in every run."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import settings
from support.fakes import FakeStore
from support.rig import CONTENT, View, view_in

settings.register_profile("unit", derandomize=True, deadline=None, max_examples=60, database=None)
settings.load_profile("unit")


@pytest.fixture
def store() -> FakeStore:
    """A store with the files of `CONTENT`."""
    return FakeStore(CONTENT)


@pytest.fixture
async def view(tmp_path: Path) -> AsyncIterator[View]:
    """A view with nothing attached."""
    async with view_in(tmp_path) as view:
        yield view
