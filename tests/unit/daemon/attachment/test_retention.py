"""The cache keeps files for programs that have waited for them, within the share of each user."""

import contextlib
import os
import resource
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from ckptfs._daemon.attachment.retention import _DESCRIPTORS_SHARE, Kept
from ckptfs._daemon.cache.cached_object import disk_bytes
from ckptfs._daemon.quotas import share_of
from ckptfs._model.plans.plan import Piece
from ckptfs.errors import LimitExceeded

MIB = 1 << 20
ALICE, BOB = 65533, 65534
SHARE = 4 * disk_bytes(MIB)
"""The share of one of the other users."""


class FakeCache:
    @property
    def index(self) -> "FakeCache":
        return self

    def capacity_bytes(self) -> int:
        return 4 * SHARE

    @contextlib.contextmanager
    def held(self, entry: Any) -> Iterator[None]:
        yield


def attachment(uid: int) -> Any:
    return SimpleNamespace(uid=uid, kept=Counter())


def entry(size: int = MIB) -> Any:
    return SimpleNamespace(size=size, kept=0)


@pytest.fixture
def kept() -> Kept:
    return Kept(FakeCache())  # type: ignore[arg-type]


def pieces(count: int) -> list[Piece]:
    return [Piece(index, 0, MIB) for index in range(count)]


def test_retention_of_simultaneous_users_is_bounded_as_in_turn(kept: Kept) -> None:
    """The check has passed for each of them before the first has taken space."""
    first, second, other = attachment(ALICE), attachment(ALICE), attachment(BOB)
    for each in (first, second, other):
        kept.check_space(each, pieces(4))
    with contextlib.ExitStack() as stack:
        for index in range(4):
            stack.enter_context(kept.keeping(first, index, entry()))
        with pytest.raises(LimitExceeded, match=f"for uid {ALICE}"):
            stack.enter_context(kept.keeping(second, 0, entry()))
        assert second.kept[0] == 0
        stack.enter_context(kept.keeping(first, 3, entry()))  # which counts already
        for index in range(4):
            stack.enter_context(kept.keeping(other, index, entry()))
    with contextlib.ExitStack() as stack:  # after all space was released
        for index in range(4):
            stack.enter_context(kept.keeping(second, index, entry()))
    assert not kept._bytes
    assert not kept._files


@pytest.mark.parametrize("uid", [ALICE, os.geteuid()])
def test_retention_leaves_descriptors_for_other_files(
    kept: Kept, uid: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (80, 80))
    all_files = 80 // 2 // _DESCRIPTORS_SHARE
    files_max = all_files if uid == os.geteuid() else share_of(all_files)
    mine = attachment(uid)
    kept.check_space(mine, [Piece(index, 0, 1) for index in range(files_max)])
    with contextlib.ExitStack() as stack:
        for index in range(files_max):
            stack.enter_context(kept.keeping(mine, index, entry(1)))
        with pytest.raises(LimitExceeded, match=r"ulimit -n"):
            stack.enter_context(kept.keeping(attachment(uid), 0, entry(1)))
        with pytest.raises(LimitExceeded, match=r"ulimit -n"):
            kept.check_space(mine, [Piece(files_max, 0, 1)])
