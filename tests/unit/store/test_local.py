"""A Store over a local directory: exact versions, links and odd files, errors told apart."""

import errno
import os
import random
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.fakes import pattern
from support.reading import read_range

from ckptfs._model.manifest import ListedFile, Skipped
from ckptfs._store import local, timestamps
from ckptfs._store.base import Pin, pin_of
from ckptfs._store.local import LocalStore
from ckptfs.errors import (
    AccessDenied,
    CheckpointIsFile,
    CheckpointNotFound,
    CkptfsError,
    LimitExceeded,
    ObjectChanged,
    StoreError,
    StoreTimeout,
    StoreUnavailable,
)

NAME = "file:///top"
SIZE = 300_000


@pytest.fixture
def top(tmp_path: Path) -> Path:
    (tmp_path / "top").mkdir()
    return tmp_path / "top"


@pytest.fixture
def store(top: Path) -> LocalStore:
    return LocalStore(str(top), NAME)


def pin(store: LocalStore, path: str = "a") -> Pin:
    return next(pin_of(file) for file in store.list(100).files if file.path == path)


def read(store: LocalStore, pin: Pin, offset: int = 0, length: int | None = None) -> bytes:
    data, is_confirmed = read_range(store, pin, offset, length)
    assert is_confirmed
    return data


# -- listing


def test_a_listing_has_names_sizes_times_and_versions(top: Path, store: LocalStore) -> None:
    (top / "sub" / "empty").mkdir(parents=True)
    (top / "a").write_bytes(b"12345")
    (top / "sub" / "b").write_bytes(b"")
    listing = store.list(4)
    assert sorted(listing.directories) == ["sub", "sub/empty"]
    assert listing.skipped == []
    by_path = {file.path: file for file in listing.files}
    assert sorted(by_path) == ["a", "sub/b"]
    assert by_path["a"].size == 5
    assert by_path["a"].mtime_ns == (top / "a").stat().st_mtime_ns
    assert by_path["a"].etag
    assert store.find("a") == by_path["a"]
    assert store.find("sub") is None
    assert store.find("none") is None
    with pytest.raises(LimitExceeded, match="more than files_max = 3"):
        store.list(3)


def test_links_are_followed_and_loops_are_not(top: Path, store: LocalStore) -> None:
    outside = top.parent / "outside"
    outside.mkdir()
    (outside / "far").write_bytes(b"far")
    (outside / "back").symlink_to(top)
    (top / "d" / "e").mkdir(parents=True)
    (top / "d" / "a").write_bytes(b"near")
    (top / "file link").symlink_to("d/a")
    (top / "folder link").symlink_to("d")
    (top / "out").symlink_to(outside)
    (top / "d" / "e" / "up").symlink_to("..")
    (top / "dead").symlink_to("nowhere")
    (top / "self").symlink_to("self")
    (top / "through a file").symlink_to("d/a/b")
    listing = store.list(100)
    assert {file.path: file.size for file in listing.files} == {
        "d/a": 4,
        "file link": 4,
        "folder link/a": 4,
        "out/far": 3,
    }
    above = "the link leads to a directory above it"
    nowhere = "the link leads nowhere"
    assert sorted(listing.skipped, key=lambda skipped: skipped.name) == [
        Skipped("d/e/up", above),
        Skipped("dead", nowhere),
        Skipped("folder link/e/up", above),
        Skipped("out/back", above),
        Skipped("self", nowhere),
        Skipped("through a file", nowhere),
    ]
    assert read(store, pin(store, "out/far")) == b"far"


def test_listing_skips_non_files_and_names_that_are_not_utf_8(top: Path, store: LocalStore) -> None:
    os.mkfifo(top / "pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(top / "socket"))
        (top / "line\n").write_bytes(b"1")
        with open(os.fsencode(top) + b"/bad\xff", "wb"):
            pass
        listing = store.list(100)
    assert [file.path for file in listing.files] == ["line\n"]  # refused by the manifest
    assert {skipped.name: skipped.reason for skipped in listing.skipped} == {
        "bad\\xff": "the name is not valid UTF-8",
        "pipe": "it is neither a file nor a directory",
        "socket": "it is neither a file nor a directory",
    }


def test_what_cannot_be_attached(top: Path) -> None:
    (top / "a").write_bytes(b"1")
    for path in ("none", "none/below", "a/below"):
        with pytest.raises(CheckpointNotFound, match="file:///x does not exist"):
            LocalStore(str(top / path), "file:///x").list(10)
    with pytest.raises(CheckpointIsFile, match="file:///x is a file"):
        LocalStore(str(top / "a"), "file:///x").list(10)


def failing(monkeypatch: pytest.MonkeyPatch, name: str, number: int, below: str = "") -> None:
    """Let a function of `os` fail for paths that end so, from now on."""
    real = getattr(os, name)

    def call(path: "bytes | int", *args: object, **more: object) -> object:
        if isinstance(path, int) or path.endswith(below.encode()):
            raise OSError(number, os.strerror(number))
        return real(path, *args, **more)

    monkeypatch.setattr(local.os, name, call)


def test_a_directory_that_cannot_be_listed_fails_the_listing(
    top: Path, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each other answer would be a checkpoint with fewer files."""
    (top / "sub").mkdir()
    for number, expected in (
        (errno.EACCES, AccessDenied),
        (errno.EIO, StoreError),
        (errno.ENAMETOOLONG, StoreError),
        (errno.ESTALE, StoreUnavailable),
    ):
        with monkeypatch.context() as patch:
            failing(patch, "scandir", number, "/sub")
            with pytest.raises(expected, match="sub in file:///top"):
                store.list(10)
    failing(monkeypatch, "scandir", errno.ENOENT, "/sub")
    assert store.list(10).files == []  # it was removed meanwhile


# -- versions


def replaced(path: Path, data: bytes) -> None:
    fresh = path.with_name("fresh")
    fresh.write_bytes(data)
    fresh.replace(path)


def in_place(path: Path, data: bytes) -> None:
    with path.open("r+b") as file:
        file.write(data)


def with_old_times(path: Path, data: bytes) -> None:
    about = path.stat()
    in_place(path, data)
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))


def with_old_times_and_place(path: Path, data: bytes) -> None:
    about = path.stat()
    replaced(path, data)
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))


def longer(path: Path, data: bytes) -> None:
    path.write_bytes(data + b"1")


def shorter(path: Path, data: bytes) -> None:
    os.truncate(path, len(data) // 2)


def deleted(path: Path, _: bytes) -> None:
    path.unlink()


def a_pipe(path: Path, _: bytes) -> None:
    path.unlink()
    os.mkfifo(path)


def a_directory(path: Path, _: bytes) -> None:
    path.unlink()
    path.mkdir()


CHANGES: list[Callable[[Path, bytes], None]] = [
    replaced,
    in_place,
    with_old_times,
    with_old_times_and_place,
    longer,
    shorter,
    deleted,
    a_pipe,
    a_directory,
]


@pytest.mark.parametrize("change", CHANGES)
def test_each_change_is_a_change(
    top: Path, store: LocalStore, change: Callable[[Path, bytes], None]
) -> None:
    (top / "a").write_bytes(b"first")
    pinned = pin(store)
    assert store.confirm(pinned) == pinned
    assert read(store, pinned, 1, 3) == b"irs"
    change(top / "a", b"other")
    for use in (lambda: store.confirm(pinned), lambda: read(store, pinned, 0, 2)):
        with pytest.raises(ObjectChanged, match=r"a in file:///top changed .* attach"):
            use()


def test_local_untouched_file_never_changes(top: Path, store: LocalStore) -> None:
    (top / "a").write_bytes(b"first")
    os.utime(top / "a", (1_700_000_000, 1_700_000_000))
    pinned = pin(store)
    (top / "b").write_bytes(b"beside it")
    assert pin(LocalStore(str(top), NAME)) == pinned
    assert store.confirm(pinned) == pinned
    assert read(store, pinned) == b"first"


def test_a_pin_of_an_earlier_release_is_completed(top: Path, store: LocalStore) -> None:
    (top / "a").write_bytes(b"first")
    pinned = pin(store)
    old = Pin("a", 5, pinned.mtime_ns + 7)  # as the daemon tells versions of metadata apart
    assert store.confirm(old) == Pin("a", 5, old.mtime_ns, pinned.etag)
    assert read(store, old) == b"first"
    replaced(top / "a", b"other")
    with pytest.raises(ObjectChanged):
        store.confirm(old)


def test_numbers_of_inodes_that_do_not_last_are_left_out(
    top: Path, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    (top / "a").write_bytes(b"first")
    assert not pin(store).etag.startswith("0-")
    monkeypatch.setattr(local, "_has_lasting_inodes", lambda _: False)
    assert pin(store).etag.startswith("0-")


@pytest.mark.parametrize("seed", range(2))
def test_a_thousand_overwrites_of_a_local_file_in_the_middle_of_reads(
    top: Path, store: LocalStore, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each read gives the bytes of the version that was listed, or ObjectChanged."""
    chance = random.Random(seed)
    path, real = top / "a", os.preadv
    current, overwrites, right, stale = b"", 0, 0, 0

    def overwrite() -> None:
        nonlocal current, overwrites
        overwrites += 1
        current = pattern(SIZE, overwrites)
        chance.choice([replaced, in_place, with_old_times, with_old_times_and_place])(path, current)

    def preadv(file: int, buffers: list[memoryview], offset: int) -> int:
        """A short read, with a change before or after it."""
        part = buffers[0][: chance.randrange(1, SIZE)]
        moment = chance.choice(["before", "after", "never", "never"])
        if moment == "before":
            overwrite()
        count = real(file, [part], offset)
        if moment == "after":
            overwrite()
        return count

    path.write_bytes(pattern(SIZE, 0))
    monkeypatch.setattr(local.os, "preadv", preadv)
    monkeypatch.setattr(timestamps, "TICK_S", 0.011)  # one tick, for a short test
    while overwrites < 500:
        overwrite()
        listed, content = pin(store), current
        for _ in range(2):
            offset = chance.randrange(SIZE)
            try:
                assert read(store, listed, offset) == content[offset:]
            except ObjectChanged:
                stale += 1
                break
            right += 1
    assert right > 100
    assert stale > 100


class Clock:
    """A clock that only sleepers move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, now_s: float) -> None:
        self.now_s = now_s
        self.slept_s: list[float] = []
        monkeypatch.setattr(timestamps.time, "time", lambda: self.now_s)
        monkeypatch.setattr(timestamps.time, "sleep", self._sleep)

    def _sleep(self, seconds_s: float) -> None:
        self.slept_s.append(seconds_s)
        self.now_s += seconds_s


def test_a_young_version_is_waited_for_until_its_tick_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(monkeypatch, 1_000_000.5)
    timestamps.wait_until_settled(1_000_000_499_000_000)
    assert clock.slept_s == [timestamps.TICK_S]
    timestamps.wait_until_settled(1_000_000 * 10**9)  # whole seconds: perhaps all that is kept
    assert clock.slept_s == [timestamps.TICK_S, 2.0]
    timestamps.wait_until_settled(2_000_000 * 10**9)  # a clock that is far ahead
    assert clock.slept_s == [timestamps.TICK_S, 2.0, 2.0]
    timestamps.wait_until_settled(0)
    timestamps.wait_until_settled(999_000_123_456_789)
    timestamps.wait_until_settled(999_000 * 10**9)
    assert len(clock.slept_s) == 3


def test_local_writes_of_one_tick_are_distinguished(
    top: Path, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock of the files stands still until the reader waits for it."""
    (top / "a").write_bytes(b"first")
    real, stamp = local._etag_of, "tick 1"
    monkeypatch.setattr(local, "_etag_of", lambda _: stamp)
    pinned = pin(store)

    def wait(stamp_ns: int) -> None:
        nonlocal stamp
        assert abs(stamp_ns - time.time_ns()) < 60 * 10**9
        in_place(top / "a", b"other")  # the last one in that tick
        stamp = "tick 2" if waits else stamp
        waits.append(stamp_ns)

    waits: list[int] = []
    monkeypatch.setattr(local, "wait_until_settled", wait)
    assert read(store, pinned) == b"other"
    with pytest.raises(ObjectChanged):
        read(store, pinned)
    assert len(waits) == 2
    assert real(os.stat(top / "a"))


@pytest.mark.parametrize(
    ("one_ns", "other_ns", "expected"),
    [
        (5 * 10**8, 5 * 10**8, True),
        (5 * 10**8, 5 * 10**8 + 999, True),
        (5 * 10**8, 5 * 10**8 + 1000, False),
        (10**9, 10**9 + 5 * 10**8, True),
        (10**9 + 5 * 10**8, 10**9 + 700, True),
        (10**9, 2 * 10**9, False),
        (10**9 + 5 * 10**8, 2 * 10**9, False),
    ],
)
def test_times_that_may_be_the_same(one_ns: int, other_ns: int, expected: bool) -> None:
    assert timestamps.is_same_time(one_ns, other_ns) is expected
    assert timestamps.is_same_time(other_ns, one_ns) is expected


# -- errors


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.EACCES, AccessDenied),
        (errno.EPERM, AccessDenied),
        (errno.EIO, StoreError),
        (errno.ETIMEDOUT, StoreTimeout),
        (errno.ESTALE, StoreUnavailable),
        (errno.EHOSTDOWN, StoreUnavailable),
        (errno.EMFILE, StoreUnavailable),
        (errno.ENOENT, ObjectChanged),
        (errno.ELOOP, ObjectChanged),
    ],
)
def test_errors_by_their_numbers(
    top: Path,
    store: LocalStore,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    expected: type[CkptfsError],
) -> None:
    (top / "a").write_bytes(b"first")
    pinned = pin(store)
    operations = {
        "open": (lambda: store.confirm(pinned), lambda: read(store, pinned)),
        "preadv": (lambda: read(store, pinned),),
    }
    for name, uses in operations.items():
        with monkeypatch.context() as patch:
            failing(patch, name, number)
            for use in uses:
                with pytest.raises(expected) as caught:
                    use()
                assert type(caught.value) is expected
                assert str(caught.value).startswith("a in file:///top")
                assert "\n" not in str(caught.value)
    assert read(store, pinned) == b"first"
    if expected is not ObjectChanged:
        with monkeypatch.context() as patch:
            failing(patch, "open", number)
            with pytest.raises(expected):
                store.get("a")


# -- small files as a whole


def test_local_put_replaces_file_atomically(top: Path, store: LocalStore) -> None:
    assert store.get("a") is None
    store.put("a", b"first")
    with (top / "a").open("rb") as old:
        store.put("a", b"second")
        assert old.read() == b"first"
    assert store.get("a") == b"second"
    assert store.find("a") == ListedFile("a", 6, (top / "a").stat().st_mtime_ns, pin(store).etag)
    (top / "folder").mkdir()
    for use in (lambda: store.put("folder", b"1"), lambda: store.get("folder")):
        with pytest.raises(StoreError, match="folder in file:///top"):
            use()
    assert sorted(os.listdir(top)) == ["a", "folder"]
    with pytest.raises(CheckpointNotFound):
        store.put("none/a", b"1")
    os.mkfifo(top / "pipe")
    with pytest.raises(StoreError, match="pipe in file:///top is not a file"):
        store.get("pipe")


def test_no_descriptor_is_kept(top: Path, store: LocalStore) -> None:
    (top / "a").write_bytes(b"first")
    pinned = pin(store)
    before = os.listdir("/proc/self/fd")
    read(store, pinned)
    store.confirm(pinned)
    (top / "a").unlink()
    with pytest.raises(ObjectChanged):
        read(store, pinned)
    assert os.listdir("/proc/self/fd") == before
