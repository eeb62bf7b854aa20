"""The mount as a program sees it, without a kernel: names, attributes, leases and bytes."""

import itertools
import os
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fakes import MIB, OLD_NS, FakeStore, InlineOffload, pattern
from support.rig import CONTENT, GID, UID, View, view_in
from trio.testing import MockClock

from ckptfs._daemon.attachment.attachment import Attachment
from ckptfs._daemon.attachment.inodes import (
    MOUNT_ROOT,
    VOLUMES_ROOT,
    IsDirectory,
    NoEntry,
    NotDirectory,
    ReadOnly,
    StaleInode,
    VfsError,
)
from ckptfs._daemon.cache import block_io
from ckptfs._daemon.fs.vfs import Overshoot
from ckptfs._model import attributes as names
from ckptfs._model.location import Location
from ckptfs.errors import (
    AccessDenied,
    CkptfsError,
    LimitExceeded,
    NotAttached,
    ObjectChanged,
    StoreUnavailable,
)

# -- names and attributes


async def test_vfs_lookup_finds_paths_with_their_attributes(view: View, store: FakeStore) -> None:
    attachment = view.attach(store)
    for path, data in CONTENT.items():
        found = view.stat(attachment, path)
        assert found == view.vfs.getattr(found.inode)
        assert (found.size, found.is_directory, found.nlink) == (len(data), False, 1)
        assert (found.mode, found.uid, found.gid) == (0o600, UID, GID)
        assert found.mtime_ns == OLD_NS
    links = {"": 3, "shards": 3, "shards/deep": 2}
    for path, nlink in links.items():
        found = view.stat(attachment, path)
        assert found == view.vfs.getattr(found.inode)
        assert (found.is_directory, found.nlink, found.mode) == (True, nlink, 0o700)
        assert found.mtime_ns == OLD_NS
    assert not store.reads()
    assert not store.confirms()


async def test_vfs_access_denies_writing(view: View, store: FakeStore) -> None:
    attachment = view.attach(store)
    paths = ("", "shards", "config.json", "shards/00.bin")
    found = [view.stat(attachment, path) for path in paths]
    for place in (view.vfs.getattr(MOUNT_ROOT), *found):
        assert view.vfs.access(place.inode, os.R_OK)
        assert view.vfs.access(place.inode, os.X_OK) is place.is_directory
        assert view.vfs.access(place.inode, os.R_OK | os.X_OK) is place.is_directory
        for mask in (os.W_OK, os.R_OK | os.W_OK, os.W_OK | os.X_OK):
            with pytest.raises(ReadOnly):
                view.vfs.access(place.inode, mask)
    view.vfs.remove(attachment)
    for place in found:
        with pytest.raises(StaleInode):
            view.vfs.access(place.inode, os.W_OK)


async def test_vfs_mount_point_lists_the_attachments(view: View, store: FakeStore) -> None:
    root = view.vfs.getattr(MOUNT_ROOT)
    assert (root.nlink, root.mode, root.uid, root.gid) == (2, 0o711, 1, 2)
    first = view.attach(store)
    second = view.attach(store, Location("local", "/other"))
    assert view.vfs.getattr(MOUNT_ROOT).nlink == 4
    assert [(n, s.inode) for n, s, _ in view.entries(MOUNT_ROOT)] == [
        (a.name.encode(), a.snapshot.tree.root.inode) for a in (first, second)
    ]
    assert first.name.startswith("step-5-")
    assert not view.vfs.is_lasting(MOUNT_ROOT, b"absent")
    assert view.vfs.is_lasting(first.snapshot.tree.root.inode, b"absent")
    assert not view.vfs.is_lasting(first.snapshot.tree.root.inode, b".metadata.json")


async def test_vfs_unknown_names_and_wrong_kinds_are_errors(view: View, store: FakeStore) -> None:
    attachment = view.attach(store)
    root, file = attachment.snapshot.tree.root.inode, view.stat(attachment, "config.json").inode
    for parent in (MOUNT_ROOT, root, file):
        with pytest.raises(NoEntry):
            view.vfs.lookup(parent, b"absent")
    with pytest.raises(IsDirectory):
        view.vfs.open(root)
    with pytest.raises(NotDirectory):
        view.vfs.opendir(file, 1)
    for unknown in (3, 99 << 32 | 1, root + 1000):
        with pytest.raises(StaleInode):
            view.vfs.getattr(unknown)
        with pytest.raises(StaleInode):
            view.vfs.open(unknown)
    assert not attachment.leases.stays


async def test_vfs_readdir_resumes_at_any_position(view: View, store: FakeStore) -> None:
    attachment = view.attach(store)
    for path in ("", "shards", "shards/deep"):
        inode = view.stat(attachment, path).inode
        everything = view.entries(inode)
        assert [position for _, _, position in everything] == list(range(1, len(everything) + 1))
        for name, found, _ in everything:
            assert view.vfs.lookup(inode, name) == found
        for start in range(len(everything) + 2):
            assert view.entries(inode, start) == everything[start:]
    assert {n for n, _, _ in view.entries(attachment.snapshot.tree.root.inode)} == {
        b"config.json",
        b"empty",
        b"shards",
    }


async def test_vfs_readdir_of_the_mount_point_is_stable_until_rewound(
    view: View, store: FakeStore
) -> None:
    first = view.attach(store)
    second = view.attach(store, Location("local", "/other"))
    handle = view.vfs.opendir(MOUNT_ROOT, 1)
    entries = view.vfs.readdir(handle, 0)
    assert next(entries)[0] == first.name.encode()
    view.vfs.remove(first)
    assert [n for n, _, _ in view.vfs.readdir(handle, 1)] == [second.name.encode()]
    assert [n for n, _, _ in view.vfs.readdir(handle, 0)] == [second.name.encode()]
    view.vfs.release(handle)


async def test_vfs_statfs_is_that_of_the_attachment_or_of_all(view: View, store: FakeStore) -> None:
    assert view.vfs.statfs() == (0, 0)
    one = view.attach(store)
    other = view.attach(FakeStore({"a": b"abc"}), Location("local", "/other"))
    size = sum(map(len, CONTENT.values()))
    for outside in (MOUNT_ROOT, VOLUMES_ROOT):
        assert view.vfs.statfs(outside) == (size + 3, len(CONTENT) + 1)
    inode = other.snapshot.tree.root.inode
    assert view.vfs.statfs(inode) == (3, 1)
    assert view.vfs.statfs(view.stat(one, "config.json").inode) == (size, len(CONTENT))
    view.vfs.remove(other)
    with pytest.raises(StaleInode):
        view.vfs.statfs(inode)
    assert view.vfs.statfs() == (size, len(CONTENT))


# -- leases


async def test_vfs_open_directory_or_file_keeps_the_attachment(
    view: View, store: FakeStore
) -> None:
    attachment = view.attach(store)
    root = attachment.snapshot.tree.root.inode
    handles = [view.vfs.opendir(root, 10), view.vfs.opendir(root, 20), view.vfs.opendir(root, 0)]
    assert len(set(handles)) == 3
    assert sorted(attachment.leases.directories.values()) == [0, 10, 20]
    below = view.vfs.opendir(view.stat(attachment, "shards").inode, 30)
    inode = view.stat(attachment, "config.json").inode
    files = [view.vfs.open(inode), view.vfs.open(inode)]
    assert len(set(files)) == 2
    assert attachment.leases.open_handles == 3
    assert attachment.leases.stays
    assert view.vfs.release(below)
    assert [view.vfs.release(file) for file in files] == [True, True]
    assert [view.vfs.release(file) for file in files] == [False, False]
    assert attachment.leases.open_handles == 0
    for handle in handles:
        assert attachment.leases.stays
        view.vfs.release(handle)
    assert not attachment.leases.stays
    assert view.released == [attachment] * 6


async def test_vfs_open_mount_point_keeps_no_attachment(view: View, store: FakeStore) -> None:
    attachment = view.attach(store)
    handle = view.vfs.opendir(MOUNT_ROOT, 1)
    assert not attachment.leases.stays
    view.vfs.release(handle)
    assert not view.released


async def test_vfs_inodes_of_an_ended_attachment_are_stale(view: View, store: FakeStore) -> None:
    attachment = view.attach(store)
    root = attachment.snapshot.tree.root.inode
    inode = view.stat(attachment, "shards/01.bin").inode
    file, other = view.vfs.open(inode), view.vfs.open(inode)
    handle, unread = view.vfs.opendir(root, 1), view.vfs.opendir(root, 1)
    assert await view.read(file, 0, 5) == CONTENT["shards/01.bin"][:5]
    await view.quiet()
    view.vfs.remove(attachment)
    assert [file.opened.count for file in attachment.files.values()] == [0]
    with pytest.raises(StaleInode):
        await view.read(file, 0, 5)
    for call in (view.vfs.getattr, view.vfs.open, view.vfs.find):
        with pytest.raises(StaleInode):
            call(root)
    with pytest.raises(StaleInode):
        await view.names(root)
    with pytest.raises(StaleInode):
        await view.text(root, names.STATE)
    with pytest.raises(StaleInode):
        await view.xattrs.set(root, names.META_PREFIX + "a", b"1", 0)
    with pytest.raises(StaleInode):
        view.vfs.lookup(root, b"empty")
    with pytest.raises(StaleInode):
        list(view.vfs.readdir(unread, 0))
    with pytest.raises(NoEntry):
        view.vfs.lookup(MOUNT_ROOT, attachment.name.encode())
    for opened in (file, other, handle, unread):  # the kernel closes what it had opened
        assert view.vfs.release(opened)
    assert not view.released
    again = view.attach(store)
    assert again.snapshot.tree.root.inode != root
    fresh = view.vfs.open(view.stat(again, "shards/01.bin").inode)
    assert not view.vfs.release(file)  # a late release for the old attachment
    assert await view.read(fresh, 1, 5) == CONTENT["shards/01.bin"][1:6]


async def test_vfs_attachment_removed_during_a_read_is_stale(
    tmp_path: Path, store: FakeStore, autojump_clock: MockClock
) -> None:
    offload = InlineOffload()
    offload.latency_s = {"data": 1.0}
    async with view_in(tmp_path, offload=offload) as view:
        attachment = view.attach(store)
        inode = view.vfs.open(view.stat(attachment, "shards/00.bin").inode)
        outcomes: list[bytes | Exception] = []

        async def reader() -> None:
            try:
                outcomes.append(await view.read(inode, 0, 5))
            except (CkptfsError, VfsError) as error:
                outcomes.append(error)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader)
            await trio.sleep(0.5)
            view.vfs.remove(attachment)
            with pytest.raises(StaleInode):
                await view.read(inode, 0, 5)
        [outcome] = outcomes
        assert outcome == CONTENT["shards/00.bin"][:5] or isinstance(outcome, NotAttached)


# -- reading


async def test_vfs_read_is_cut_at_the_end_of_the_file(view: View, store: FakeStore) -> None:
    attachment = view.attach(store)
    data = CONTENT["shards/00.bin"]
    inode = view.vfs.open(view.stat(attachment, "shards/00.bin").inode)
    for offset, length in [
        (0, MIB),
        (len(data) - 1, 1),
        (len(data) - 1, MIB),
        (len(data), MIB),
        (len(data) + 5, MIB),
        (2 * MIB + 7, MIB),
        (5, 0),
    ]:
        assert await view.read(inode, offset, length) == data[offset : offset + length]
    empty = view.vfs.open(view.stat(attachment, "empty").inode)
    assert await view.read(empty, 0, MIB) == b""
    assert not store.reads("empty")


async def test_vfs_sequential_reads_fetch_ahead(view: View, store: FakeStore) -> None:
    attachment = view.attach(store)
    inode = view.vfs.open(view.stat(attachment, "shards/00.bin").inode)
    await view.read(inode, 0, MIB)
    assert len(store.reads()) == 1
    await view.read(inode, MIB, MIB)
    await view.quiet()
    assert attachment.cached_bytes(view.rig.cache) == 3 * MIB + 5


async def test_vfs_kernel_readahead_beyond_a_plan_is_refused(view: View, store: FakeStore) -> None:
    attachment = view.attach(store)
    node = view.stat(attachment, "shards/00.bin")
    handle = view.vfs.open(node.inode)
    (file,) = (f for f in attachment.files.values() if f.opened.count)
    edge = 3 * MIB // 2, MIB  # blocks 1 and 2
    await view.rig.fetcher.fetch(file, range(1, 2))
    store.calls.clear()

    file.is_planned = True
    with pytest.raises(Overshoot):
        view.vfs.read_now(handle, *edge, is_exact=False)
    assert view.vfs.read_now(handle, 3 * MIB // 2, 4096, is_exact=False) is not None
    await view.quiet()
    assert not store.reads()

    assert view.vfs.read_now(handle, *edge) is None  # a program asks for all of it
    assert view.vfs.read_now(handle, *edge, is_exact=False) is None  # it is on its way
    expected = CONTENT["shards/00.bin"][edge[0] : sum(edge)]
    assert b"".join(await view.vfs.read(handle, *edge)) == expected
    assert view.vfs.read_now(handle, *edge, is_exact=False) is not None


async def test_vfs_kernel_readahead_without_a_plan_is_served(view: View, store: FakeStore) -> None:
    attachment = view.attach(store)
    handle = view.vfs.open(view.stat(attachment, "shards/00.bin").inode)
    await view.read(handle, MIB, 4096)
    edge = 3 * MIB // 2, MIB
    assert view.vfs.read_now(handle, *edge, is_exact=False) is None
    expected = CONTENT["shards/00.bin"][edge[0] : sum(edge)]
    assert b"".join(await view.vfs.read(handle, *edge)) == expected


# -- against a model

PATHS = ("a", "b", "c")
SIZES = {"a": 3 * MIB + 5, "b": 2 * MIB, "c": 7}
_serial = itertools.count()
_operations = st.lists(
    st.tuples(
        st.sampled_from(
            ["read"] * 8
            + ["pair", "pair", "release", "attach", "remove", "overwrite", "same second"]
            + ["outage", "denied", "disk full", "damage", "late overwrite", "clear"]
        ),
        st.sampled_from(PATHS),
        st.integers(0, 3 * MIB + 4),
        st.sampled_from([1, 4096, 128 << 10, MIB]),
        st.integers(1, 9),
    ),
    min_size=8,
    max_size=40,
)


class Model:
    """A model in plain bytes: every version of an object, and the reads of each attachment."""

    def __init__(self) -> None:
        self.serial = itertools.count()
        self.mtime_ns = int(time.time()) * 10**9  # young: the same second can come again
        self.store = FakeStore()
        self.versions: dict[tuple[str, int], list[bytes]] = {}
        self.seen: dict[tuple[int, str], list[tuple[int, bytes]]] = {}
        self.denied = False
        for path in PATHS:
            self.overwrite(path)

    def overwrite(self, path: str, *, same_second: bool = False) -> None:
        if not same_second:
            self.mtime_ns += 10**9
        data = pattern(SIZES[path], next(self.serial))
        old = self.store._objects.get(path)
        mtime_ns = old.mtime_ns if same_second and old else self.mtime_ns
        self.versions.setdefault((path, mtime_ns), []).append(data)
        self.store.overwrite(path, data, mtime_ns=mtime_ns)

    def changed(self, path: str, mtime_ns: int) -> bool:
        """Whether the object is, or may be, another version than a listing's."""
        current = self.store.pin(path).mtime_ns
        return current != mtime_ns or len(self.versions[path, mtime_ns]) > 1

    def check(self, attachment: Attachment, path: str, offset: int, data: bytes) -> None:
        """All that an attachment ever read of a file is of one version of the listed second."""
        seen = self.seen.setdefault((attachment.ordinal, path), [])
        seen.append((offset, data))
        [listed] = [f for f in attachment.manifest.files if f.path == path]
        assert any(
            all(version[start : start + len(part)] == part for start, part in seen)
            for version in self.versions[path, listed.mtime_ns]
        ), f"{path}: bytes of no version, or of two"


async def _operate(
    view: View, model: Model, operations: "list[tuple[str, str, int, int, int]]"
) -> None:
    vfs, store = view.vfs, model.store
    attachment: Attachment | None = view.attach(store)
    opened: dict[int, int] = {}

    async def read(attachment: Attachment, path: str, offset: int, length: int) -> None:
        inode = view.stat(attachment, path).inode
        if inode not in opened:
            opened[inode] = vfs.open(inode)
        [listed] = [f for f in attachment.manifest.files if f.path == path]
        try:
            data = await view.read(opened[inode], offset, length)
        except ObjectChanged:
            assert model.changed(path, listed.mtime_ns)
        except AccessDenied:
            assert model.denied
        else:
            assert len(data) == max(0, min(length, SIZES[path] - offset))
            model.check(attachment, path, offset, data)

    for operation, path, offset, length, number in operations:
        if operation == "attach" and attachment is None:
            attachment = view.attach(store)
        elif operation == "remove" and attachment is not None:
            vfs.remove(attachment)
            attachment = None
            opened.clear()
        elif operation == "overwrite":
            model.overwrite(path)
        elif operation == "same second":
            model.overwrite(path, same_second=True)
        elif operation == "late overwrite":
            store.at_moment(number, lambda path=path: model.overwrite(path))
        elif operation == "outage":
            kind = "confirm" if number % 2 else "read_into"
            store.fail(kind, StoreUnavailable("outage"), at=1 + number // 4, times=3)
        elif operation == "denied":
            store.fail("confirm" if number % 2 else "read_into", AccessDenied("no"))
            model.denied = True
        elif operation == "clear":
            store._plans.clear()
        elif operation == "release" and opened:
            vfs.release(opened.popitem()[1])
        elif operation == "damage" and attachment is not None:
            _damage(view, attachment, path)
        elif operation in ("read", "pair", "disk full") and attachment is not None:
            refuse = mock.Mock(side_effect=OSError(28, "full"))
            write = refuse if operation == "disk full" else block_io.write
            with mock.patch.object(block_io, "write", write):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(read, attachment, path, offset, length)
                    if operation == "pair":
                        nursery.start_soon(read, attachment, path, max(0, offset - MIB), MIB)


def _damage(view: View, attachment: Attachment, path: str) -> None:
    """Overwrite the cached bytes of a file on the disk that are not verified yet."""
    [digest] = [
        d
        for d, f in zip(attachment.snapshot.digests(), attachment.manifest.files, strict=True)
        if f.path == path
    ]
    if digest not in view.rig.cache.opened:
        # It is closed, so the cache verifies all of it at its next use.
        data = view.rig.cache.directory / "objects" / digest[:2] / digest / "data"
        if data.exists():
            with data.open("r+b") as file:
                file.write(b"damage")


@settings(max_examples=100)
@given(_operations, st.sampled_from([100, MIB + 20_000, 4 * MIB, 0]))
def test_vfs_reads_return_bytes_of_one_version_or_an_error(
    tmp_path_factory: pytest.TempPathFactory,
    operations: "list[tuple[str, str, int, int, int]]",
    bytes_max: int,
) -> None:
    directory = tmp_path_factory.getbasetemp() / f"model{next(_serial)}"
    model = Model()

    async def main() -> None:
        limits: dict[str, Any] = {"cache_bytes_max": bytes_max, "span_bytes_max": 2 * MIB}
        async with view_in(directory, **limits) as view:
            await _operate(view, model, operations)
        async with view_in(directory, **limits) as view:  # and the bytes on the disk are right
            model.denied = True
            model.seen.clear()
            again = [("read", p, o, MIB, 1) for p in PATHS for o in range(0, SIZES[p], MIB)]
            await _operate(view, model, again)

    trio.run(main, clock=MockClock(autojump_threshold=0))


# -- errors


async def test_vfs_open_beyond_a_limit_is_in_the_error_attribute(
    tmp_path: Path, store: FakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (16, 16))  # two files of one user
    async with view_in(tmp_path) as view:
        attachment = view.attach(store)
        inodes = [view.stat(attachment, path).inode for path in sorted(CONTENT)]
        for inode in inodes[:2]:
            view.vfs.open(inode)
        with pytest.raises(LimitExceeded):
            view.vfs.open(inodes[2])
        root = attachment.snapshot.tree.root.inode
        assert "has 2 files open" in await view.text(root, "user.ckptfs.error")
        assert await view.text(root, "user.ckptfs.state") == "lazy"  # no file is to blame


async def test_vfs_version_mismatch_in_the_cache_is_in_the_error_attribute(
    view: View, store: FakeStore, caplog: pytest.LogCaptureFixture
) -> None:
    """The cache has blocks of another version by now, and no request to the store has failed."""
    attachment = view.attach(store)
    inode = view.stat(attachment, "shards/00.bin").inode
    handle = view.vfs.open(inode)
    assert await view.read(handle, 0, 5) == CONTENT["shards/00.bin"][:5]
    file = attachment.files[attachment.snapshot.tree.node(inode).index]  # type: ignore[union-attr]
    view.rig.cache.learn(file.entry, '"another"')
    caplog.set_level("INFO")
    with pytest.raises(ObjectChanged) as caught:
        await view.read(handle, 2 * MIB, 5)
    assert not file.health.changed
    view.vfs.note_read(handle, 2 * MIB, 0, 0, caught.value, thread=os.getpid())
    assert await view.text(inode, "user.ckptfs.state") == "changed"
    assert "was written again" in await view.text(inode, "user.ckptfs.error")
    assert f"a read by pid {os.getpid()} (" in caplog.messages[-1]
    noted = len(caplog.records)
    view.vfs.note_read(handle, 2 * MIB, 0, 0, caught.value)
    assert "a read by another container has failed (object-changed)" in caplog.messages[-1]
    assert len(caplog.records) == noted + 1
