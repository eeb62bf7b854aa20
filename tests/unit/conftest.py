"""Unit tests are deterministic: hypothesis draws the same examples in every run."""

import pytest
from hypothesis import settings

settings.register_profile("unit", derandomize=True, deadline=None, max_examples=60, database=None)
settings.load_profile("unit")


@pytest.fixture(autouse=True, scope="session")
def _base_of_tmp_path(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Make pytest's own folder before a test could be blamed for it."""
    tmp_path_factory.getbasetemp()
