"""Fixtures for tests of the daemon."""

import pytest

from ckptfs._daemon import quotas
from ckptfs._daemon.attachment import block_exchange
from ckptfs._daemon.control import commands, permissions, server


@pytest.fixture
def as_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat every client as one of the other users."""
    for module in (block_exchange, commands, permissions, quotas, server):
        monkeypatch.setattr(module, "is_ours", lambda uid: False)
