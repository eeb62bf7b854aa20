"""The handoff from one daemon to the next, after a kill at any moment."""

import os
import random
from collections.abc import Iterator

import pytest

from ckptfs._mount import handoff
from ckptfs._mount.handoff import Fds, Handoff
from ckptfs.errors import DaemonError, LimitExceeded

DIGEST = "0123456789abcdef" * 2


@pytest.fixture
def fds() -> Iterator[Fds]:
    fds = handoff.create()
    yield fds
    for fd in fds.all():
        os.close(fd)


def test_handles_are_known_from_the_reply_to_the_release(fds: Fds) -> None:
    handles = Handoff(fds).handles
    reserved = handles.reserve(5, 70, is_directory=False)
    replying = handles.reserve(6, 71, is_directory=True)
    handles.replying(replying, 901)
    opened = handles.reserve(1 << 40 | 7, 72, is_directory=False)
    handles.replying(opened, 902, 3, DIGEST)
    handles.replied(opened)
    closed = handles.reserve(8, 73, is_directory=False)
    handles.replying(closed, 903)
    handles.replied(closed)
    assert handles.free(closed)

    after = Handoff(fds).handles
    (first, slot), (second, slot_of_second) = after.open_handles()
    assert (first, second) == (replying, opened)
    assert slot[1:] == (True, 71, 1, 0, 6, 901, bytes(16))
    assert slot_of_second[1:] == (False, 72, 1, 3, 1 << 40 | 7, 0, bytes.fromhex(DIGEST))
    assert not after.free(reserved)  # the kernel does not know it
    assert not after.free(closed)
    assert after.free(replying)
    assert after.free(opened)
    assert not after.free(opened)  # a repeated release
    assert not after.free(10**6)
    assert list(after.open_handles()) == []


def test_handles_are_never_used_twice(fds: Fds) -> None:
    seen: set[int] = set()
    for _ in range(5):
        handles = Handoff(fds).handles  # of the next daemon
        for _ in range(20):
            kept = [handles.reserve(2, 0, is_directory=False) for _ in range(3)]
            assert not seen & set(kept)
            seen |= set(kept)
            for handle in kept:
                assert handles.free(handle)
    assert len({handle & 0xFFFFFFFF for handle in seen}) == 3


def test_handles_are_limited(fds: Fds, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handoff, "HANDLES_MAX", 2)
    handles = Handoff(fds).handles
    first = handles.reserve(2, 0, is_directory=False)
    handles.reserve(2, 0, is_directory=False)
    with pytest.raises(LimitExceeded, match="2 files and directories of the mount are open"):
        handles.reserve(2, 0, is_directory=False)
    handles.free(first)
    handles.reserve(2, 0, is_directory=False)


def test_handoff_continues_ordinals_and_heartbeats(fds: Fds) -> None:
    assert handoff.beats(fds) == 0
    first = Handoff(fds)
    assert [first.next_ordinal(), first.next_ordinal()] == [1, 2]
    first.beat()
    second = Handoff(fds)
    assert second.next_ordinal() == 3
    second.beat()
    second.restarted()
    assert Handoff(fds).restarts == 1
    assert handoff.beats(fds) == 2


def test_handoff_of_another_version_is_refused(fds: Fds) -> None:
    os.pwrite(fds.table, b"\7", 0)
    with pytest.raises(DaemonError, match="ckptfs umount --force"):
        Handoff(fds)


@pytest.mark.parametrize("seed", range(20))
def test_journal_has_the_frames_that_are_not_forgotten(fds: Fds, seed: int) -> None:
    rng = random.Random(seed)
    expected: dict[int, list[bytes]] = {}
    journal = Handoff(fds).journal
    for _ in range(300):
        step = rng.random()
        key = rng.randrange(8)
        if step < 0.1:
            journal = Handoff(fds).journal  # the next daemon
        elif step < 0.3:
            journal.forget(key)
            expected.pop(key, None)
        else:
            data = rng.randbytes(rng.choice((1, 100, 20_000)))
            journal.append(key, data)
            expected.setdefault(key, []).append(data)
    for _ in range(2):
        found: dict[int, list[bytes]] = {}
        for key, data in journal.frames():
            found.setdefault(key, []).append(data)
        assert found == expected
        journal = Handoff(fds).journal
    kept = sum(16 + len(data) for parts in expected.values() for data in parts)
    assert sum(os.fstat(fd).st_size for fd in fds.logs) <= 2 * kept + (64 << 10) + 25_000


def test_journal_ignores_half_a_frame(fds: Fds) -> None:
    journal = Handoff(fds).journal
    journal.append(1, b"whole")
    os.pwrite(fds.logs[0], b"\xff" * 9, os.fstat(fds.logs[0]).st_size)  # killed in the middle of it
    journal = Handoff(fds).journal
    assert list(journal.frames()) == [(1, b"whole")]
    journal.append(2, b"next")
    assert list(Handoff(fds).journal.frames()) == [(1, b"whole"), (2, b"next")]


def test_journal_frees_the_memory_of_forgotten_frames(fds: Fds) -> None:
    journal = Handoff(fds).journal
    journal.append(1, b"S3CR3T")
    journal.forget(1)
    for log in fds.logs:
        assert b"S3CR3T" not in os.pread(log, 1 << 20, 0)
