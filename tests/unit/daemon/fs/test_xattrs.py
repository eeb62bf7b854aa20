"""Extended attributes and the checkpoint's own metadata, without a kernel: facts, changes, and a
check that no reader sees a mixture of two versions."""

import errno
import itertools
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import example, given
from hypothesis import strategies as st
from support.diskfaults import Fault, planned
from support.fakes import MIB, OLD_NS, FakeStore, InlineOffload
from support.rig import CONTENT, LOCATION, UID, View, view_in
from trio.testing import MockClock

from ckptfs._daemon.attachment.attachment import Attachment
from ckptfs._daemon.attachment.inodes import MOUNT_ROOT, NoEntry, StaleInode
from ckptfs._daemon.fs.xattrs import (
    AttributeStated,
    InvalidValue,
    NoAttribute,
    NotPermitted,
    NotSupported,
    shown_values,
)
from ckptfs._daemon.fuse.operations import errno_of
from ckptfs._model import attributes as names
from ckptfs._model.location import Location
from ckptfs.errors import (
    AccessDenied,
    Busy,
    CacheError,
    CkptfsError,
    MetadataError,
    MetadataNotDict,
    ObjectChanged,
    StoreTimeout,
    StoreUnavailable,
)

METADATA = ".metadata.json"
META = names.META_PREFIX


def root_of(attachment: Attachment) -> int:
    return attachment.snapshot.tree.root.inode


def raw(values: Any) -> bytes:
    return json.dumps(values).encode()


def stored(store: FakeStore) -> Any:
    """The metadata file at the store."""
    found = store.content(METADATA)
    return None if found is None else json.loads(found)


async def shown(view: View, attachment: Attachment) -> dict[str, Any]:
    """The metadata as its attributes have it, with attributes that are not listed."""
    root = root_of(attachment)
    found = shown_values(await view.metadata.values(attachment))[0]
    return {name[len(META) :]: json.loads(await view.text(root, name)) for name in found}


async def text_or_none(view: View, inode: int, name: str) -> str:
    """An attribute, or "" if it is absent."""
    try:
        return await view.text(inode, name)
    except NoAttribute:
        return ""


async def opened(view: View, attachment: Attachment) -> int | None:
    """Open the metadata file as the kernel does, which looks a stale name up once more."""
    root = attachment.snapshot.tree.root
    for _ in range(2):
        try:
            found = view.stat(attachment, METADATA)
        except NoEntry:
            await view.metadata.before_absence(attachment, root, METADATA.encode())
            try:
                found = view.stat(attachment, METADATA)
            except NoEntry:
                return None
        try:
            await view.metadata.before_open(*view.vfs.find(found.inode))
            return view.vfs.open(found.inode)
        except StaleInode:
            continue
    raise AssertionError("stale twice")


async def content(view: View, attachment: Attachment) -> bytes | None:
    """The content of the metadata file, or None if it is absent."""
    handle = await opened(view, attachment)
    if handle is None:
        return None
    try:
        return await view.read(handle, 0, 1 << 20)
    finally:
        view.vfs.release(handle)


async def change(view: View, attachment: Attachment, key: str, value: Any) -> None:
    await view.xattrs.set(root_of(attachment), META + key, raw(value), UID)


# -- facts


async def test_xattrs_of_the_root(view: View, store: FakeStore) -> None:
    store.overwrite("bad\nname", b"x")
    store.overwrite("..", b"x")
    attachment = view.attach(store)
    root = root_of(attachment)
    size = sum(map(len, CONTENT.values()))
    assert await view.text(root, names.URI) == LOCATION.uri
    assert await view.text(root, names.ORIGIN) == LOCATION.uri
    assert await view.text(root, names.VERSION) == attachment.manifest.version
    assert await view.text(root, names.ID) == LOCATION.digest
    assert await view.text(root, names.SIZE) == str(size)
    assert await view.text(root, names.FILES) == str(len(CONTENT))
    assert await view.text(root, names.CACHED) == "0"
    assert await view.text(root, names.STATE) == "lazy"
    assert await view.text(root, names.FORMAT) == "unknown"
    skipped = (await view.text(root, names.SKIPPED)).splitlines()
    assert sorted(line.split("\t")[0] for line in skipped) == ["..", "bad\\nname"]
    assert await view.text(root, names.METADATA_KEYS) == "0"
    listed = {names.URI, names.ORIGIN, names.VERSION, names.ID, names.SIZE, names.FILES}
    assert set(await view.names(root)) == listed
    for absent in (names.ERROR, names.ETAG, names.MTIME, names.TENSORS, META + "a", META):
        with pytest.raises(NoAttribute):
            await view.text(root, absent)
    for absent in ("user.other", "security.capability", names.PREFETCH, names.EVICT):
        with pytest.raises(NoAttribute):
            await view.text(root, absent)
    assert not store.reads()
    assert not store.confirms()


async def test_xattrs_of_a_root_without_skipped_names_lack_skipped(
    view: View, store: FakeStore
) -> None:
    root = root_of(view.attach(store))
    assert names.SKIPPED not in await view.names(root)
    with pytest.raises(NoAttribute):
        await view.text(root, names.SKIPPED)


async def test_xattrs_long_list_of_skipped_names_is_cut_at_a_line(view: View) -> None:
    store = FakeStore({f"{'x' * 200}{i}/..": b"" for i in range(500)})
    root = root_of(view.attach(store))
    value = await view.xattrs.get(root, names.SKIPPED)
    assert names.VALUE_BYTES_MAX - 400 < len(value) <= names.VALUE_BYTES_MAX
    assert all(len(line.split("\t")) == 2 for line in value.decode().splitlines())


async def test_xattrs_of_a_file_follow_its_state(view: View, store: FakeStore) -> None:
    attachment = view.attach(store)
    inode = view.stat(attachment, "shards/01.bin").inode
    lazy = {names.URI, names.ORIGIN, names.VERSION, names.SIZE, names.MTIME}
    assert await view.text(inode, names.VERSION) == f"{MIB}-{OLD_NS}"
    assert await view.text(inode, names.MTIME) == f"{OLD_NS // 10**9}.000000000"
    assert await view.text(inode, names.STATE) == "lazy"
    for name in (names.URI, names.ORIGIN):
        assert (await view.text(inode, name)).startswith("s3://bucket/run/step-5/shards/01.bin?")
    assert set(await view.names(inode)) == lazy
    assert not attachment.files  # the read of an attribute opens no file
    assert not [call for call in store.calls if call.operation != "list"]
    file = view.vfs.open(inode)
    await view.read(file, 0, 1)
    etag = store.etag("shards/01.bin").strip('"')
    assert await view.text(inode, names.VERSION) == await view.text(inode, names.ETAG) == etag
    await view.quiet()
    assert await view.text(inode, names.CACHED) == await view.text(inode, names.SIZE) == str(MIB)
    assert await view.text(inode, names.STATE) == "cached"
    assert set(await view.names(inode)) == lazy | {names.ETAG}
    view.vfs.release(file)
    assert await view.text(inode, names.STATE) == "cached"
    root = root_of(attachment)
    assert await view.text(root, names.CACHED) == str(MIB)
    assert await view.text(root, names.STATE) == "lazy"
    for absent in (names.ERROR, names.SKIPPED, names.ID, names.FILES, META + "a", names.TENSORS):
        with pytest.raises(NoAttribute):
            await view.text(inode, absent)


async def test_xattrs_of_a_store_without_times_and_etags_lack_them(view: View) -> None:
    store = FakeStore({"a": b"abc"}, mtime_ns=0, with_etags=False)
    inode = view.stat(view.attach(store), "a").inode
    assert await view.read(view.vfs.open(inode), 0, 9) == b"abc"
    assert await view.text(inode, names.VERSION) == "3-0"
    for absent in (names.ETAG, names.MTIME):
        assert absent not in await view.names(inode)
        with pytest.raises(NoAttribute):
            await view.text(inode, absent)


async def test_xattrs_mtime_has_nine_decimals(view: View) -> None:
    store = FakeStore({"a": b"abc"}, mtime_ns=1_700_000_000_000_000_012)
    inode = view.stat(view.attach(store), "a").inode
    assert await view.text(inode, names.MTIME) == "1700000000.000000012"


async def test_xattrs_of_other_inodes(view: View, store: FakeStore) -> None:
    attachment = view.attach(store)
    inode = view.stat(attachment, "shards/deep").inode
    assert set(await view.names(inode)) == {names.URI, names.ORIGIN}
    assert (await view.text(inode, names.URI)).startswith("s3://bucket/run/step-5/shards/deep?")
    assert await view.names(MOUNT_ROOT) == []
    with pytest.raises(NoAttribute):
        await view.text(MOUNT_ROOT, names.URI)


async def test_xattrs_attached_lists_the_holders(view: View, store: FakeStore) -> None:
    attachment = view.attach(store)
    root = root_of(attachment)
    handles = [view.vfs.opendir(root, pid) for pid in (30, 7, 30)]
    told = json.loads(await view.text(root, names.ATTACHED))
    assert told.keys() == {"since", "holders", "pinned"}
    assert told["holders"] == [7, 30]
    assert told["pinned"] is False
    assert told["since"] == pytest.approx(attachment.attached_s, abs=0.001)
    attachment.leases.pinned = True
    for handle in handles:
        view.vfs.release(handle)
    told = json.loads(await view.text(root, names.ATTACHED))
    assert (told["holders"], told["pinned"]) == ([], True)


async def test_xattrs_error_is_on_the_file_and_on_the_root(view: View, store: FakeStore) -> None:
    attachment = view.attach(store)
    root = root_of(attachment)
    inode = view.stat(attachment, "shards/00.bin").inode
    file = view.vfs.open(inode)
    await view.read(file, 0, 1)
    store.fail("read_into", AccessDenied("shards/00.bin: expired"))
    with pytest.raises(AccessDenied):
        await view.read(file, 3 * MIB, 1)
    for place in (inode, root):
        assert await view.text(place, names.STATE) == "failing"
        assert (await view.text(place, names.ERROR)).endswith("Z shards/00.bin: expired")
        assert names.ERROR not in await view.names(place)  # it would be wrong on a copy
    store.overwrite("shards/00.bin", b"other")
    with pytest.raises(ObjectChanged):
        await view.read(file, 3 * MIB, 1)
    for place in (inode, root):
        assert await view.text(place, names.STATE) == "changed"
    assert await view.read(file, 5, 10) == CONTENT["shards/00.bin"][5:15]


async def test_xattrs_state_is_fetching_during_a_fetch(
    tmp_path: Path, store: FakeStore, autojump_clock: MockClock
) -> None:
    offload = InlineOffload()
    offload.latency_s = {"data": 1.0}
    async with view_in(tmp_path, offload=offload) as view:
        attachment = view.attach(store)
        inode = view.stat(attachment, "shards/01.bin").inode
        async with trio.open_nursery() as nursery:
            nursery.start_soon(view.read, view.vfs.open(inode), 0, 1)
            await trio.sleep(0.5)
            assert await view.text(inode, names.STATE) == "fetching"
            assert await view.text(root_of(attachment), names.STATE) == "fetching"


async def test_xattrs_state_of_an_empty_checkpoint_is_cached(view: View) -> None:
    root = root_of(view.attach(FakeStore()))
    assert await view.text(root, names.STATE) == "cached"
    assert await view.text(root, names.FILES) == "0"
    assert await view.text(root, names.FORMAT) == "unknown"
    assert view.entries(root) == []


async def test_xattrs_stated_facts_cannot_be_set(view: View, store: FakeStore) -> None:
    attachment = view.attach(store)
    places = [
        MOUNT_ROOT,
        *(view.stat(attachment, path).inode for path in ("", "shards", "config.json")),
    ]
    unknown = ["user.foo", "user.ckptfs.color", "security.x", META, "user.ckptfs.meta"]
    for place in places:
        for name in names.STATED:
            with pytest.raises(AttributeStated):
                await view.xattrs.set(place, name, b"1", UID)
            with pytest.raises(AttributeStated):
                await view.xattrs.remove(place, name, UID)
        for name in [*unknown, *([META + "a"] if place != root_of(attachment) else [])]:
            with pytest.raises(NotSupported):
                await view.xattrs.set(place, name, b"1", UID)
            with pytest.raises(NotSupported):
                await view.xattrs.remove(place, name, UID)
    for name in (names.PREFETCH, names.EVICT):
        with pytest.raises(NotSupported):
            await view.xattrs.set(MOUNT_ROOT, name, b"", UID)
        with pytest.raises(NoAttribute):
            await view.xattrs.remove(root_of(attachment), name, UID)
    assert stored(store) is None
    assert view.prefetched == []


async def test_xattrs_can_be_set_by_root_and_the_user_only(view: View, store: FakeStore) -> None:
    attachment = view.attach(store)
    root = root_of(attachment)
    for name in (META + "a", names.PREFETCH, names.EVICT):
        with pytest.raises(NotPermitted):
            await view.xattrs.set(root, name, b"1", UID + 1)
        with pytest.raises(NotPermitted):
            await view.xattrs.remove(root, name, UID + 1)
    await view.xattrs.set(root, META + "a", b"1", UID)
    await view.xattrs.set(root, META + "b", b"2", 0)
    await view.xattrs.set(root, META + "c", b"3", None)  # the kernel has checked it
    assert stored(store) == {"a": 1, "b": 2, "c": 3}
    for place in (root, view.stat(attachment, "config.json").inode):
        for other in (UID + 1, -1):  # the kernel lets every user list
            assert await view.xattrs.list(place, other) == []
        assert await view.xattrs.list(place, 0) == await view.xattrs.list(place, UID) != []


# -- format and tensors

ZIP, NO_ZIP = b"PK\x03\x04" + bytes(100), b"\x80\x02pickle"


@pytest.mark.parametrize(
    ("objects", "expected"),
    [
        ({"model.pt": ZIP}, "torch-zip"),
        ({"model.pt": NO_ZIP}, "unknown"),
        ({"model.pt": b"PK"}, "unknown"),
        ({"model.pt": b""}, "unknown"),
        ({"a/b/model.pth": ZIP, "config.json": b"{}"}, "torch-zip"),
        ({"last.ckpt": ZIP}, "torch-zip"),
        ({"x.safetensors": b"", "model.pt": ZIP}, "safetensors"),
    ],
)
async def test_xattrs_format_follows_the_header(
    view: View, objects: dict[str, bytes], expected: str
) -> None:
    store = FakeStore(objects)
    attachment = view.attach(store)
    root = root_of(attachment)
    for _ in range(2):
        assert await view.text(root, names.FORMAT) == expected
    assert len(store.reads()) <= 1
    assert all(file.opened.count == 0 for file in attachment.files.values())


async def test_xattrs_format_without_the_store_is_unknown_until_the_next_call(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    offload = InlineOffload()
    async with view_in(tmp_path, offload=offload) as view:
        denied = FakeStore({"model.pt": ZIP})
        denied.fail_always("confirm", AccessDenied("no"))
        root = root_of(view.attach(denied))
        assert await view.text(root, names.FORMAT) == "unknown"
        denied.fail_always("confirm", None)
        assert await view.text(root, names.FORMAT) == "torch-zip"
        elsewhere = Location("local", "/other")  # the cache has no block of it
        root = root_of(view.attach(FakeStore({"model.pt": ZIP}), elsewhere))
        offload.latency_s = {"data": math.inf, "control": math.inf}
        with trio.fail_after(10):
            assert await view.text(root, names.FORMAT) == "unknown"
        view.rig.nursery.cancel_scope.cancel()


def safetensors(tensors: int, *, name: str = "t") -> bytes:
    header = {
        f"{name}{i}": {"dtype": "F16", "shape": [2, 1], "data_offsets": [4 * i, 4 * i + 4]}
        for i in range(tensors)
    }
    head = raw({"__metadata__": {"format": "pt"}, **header})
    return len(head).to_bytes(8, "little") + head + bytes(4 * tensors)


async def test_xattrs_tensors_are_in_the_order_of_their_bytes(view: View) -> None:
    data = safetensors(3, name="größe ")
    attachment = view.attach(FakeStore({"a.safetensors": data, "b.bin": data}))
    inode = view.stat(attachment, "a.safetensors").inode
    lines = (await view.text(inode, names.TENSORS)).splitlines()
    base = len(data) - 12
    assert [json.loads(line) for line in lines] == [
        {
            "name": f"größe {i}",
            "dtype": "F16",
            "shape": [2, 1],
            "start": base + 4 * i,
            "end": base + 4 * i + 4,
        }
        for i in range(3)
    ]
    assert names.TENSORS not in await view.names(inode)
    other = view.stat(attachment, "b.bin").inode
    with pytest.raises(NoAttribute):
        await view.text(other, names.TENSORS)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x02",
        bytes(8),
        (5).to_bytes(8, "little") + b"{",
        (2).to_bytes(8, "little") + b"{]",
        (2).to_bytes(8, "little") + b"{}",
        b"\xff" * 8 + b"{" + bytes(100),
    ],
)
async def test_xattrs_tensors_of_another_format_are_absent(view: View, data: bytes) -> None:
    inode = view.stat(view.attach(FakeStore({"a.safetensors": data})), "a.safetensors").inode
    with pytest.raises(NoAttribute):
        await view.text(inode, names.TENSORS)


async def test_xattrs_long_list_of_tensors_is_cut_at_a_line(view: View) -> None:
    store = FakeStore({"a.safetensors": safetensors(2000, name="x" * 50)})
    inode = view.stat(view.attach(store), "a.safetensors").inode
    value = await view.xattrs.get(inode, names.TENSORS)
    assert names.VALUE_BYTES_MAX - 200 < len(value) <= names.VALUE_BYTES_MAX
    found = [json.loads(line)["name"] for line in value.splitlines()]
    assert found == [f"{'x' * 50}{i}" for i in range(len(found))]


# -- actions


async def test_xattrs_prefetch_names_exactly_the_files_below(view: View) -> None:
    paths = ["a[1]/x", "a[1]/y/z", "a1/x", "odd*", "oddity"]
    attachment = view.attach(FakeStore({path: b"1" for path in paths}))

    async def matched(path: str) -> list[str]:
        from ckptfs._daemon.attachment.prefetch import chosen

        await view.xattrs.set(view.stat(attachment, path).inode, names.PREFETCH, b"", UID)
        found, wanted = view.prefetched.pop()
        assert found is attachment
        shown = list(attachment.snapshot.shown())
        return sorted(file.path for file in chosen(shown, wanted.globs)[0].values())

    assert await matched("") == sorted(paths)
    assert await matched("a[1]") == ["a[1]/x", "a[1]/y/z"]
    assert await matched("a[1]/y") == ["a[1]/y/z"]
    assert await matched("a1/x") == ["a1/x"]
    assert await matched("odd*") == ["odd*"]


async def test_xattrs_evict_drops_the_files_below(view: View, store: FakeStore) -> None:
    attachment = view.attach(store)
    objects = view.rig.cache.directory / "objects"

    async def fetch(path: str) -> None:
        inode = view.vfs.open(view.stat(attachment, path).inode)
        for offset in range(0, len(CONTENT[path]), MIB):
            await view.read(inode, offset, MIB)
        await view.quiet()
        view.vfs.release(inode)

    async def evict(path: str) -> None:
        await view.xattrs.set(view.stat(attachment, path).inode, names.EVICT, b"", UID)

    paths = ["shards/00.bin", "shards/01.bin", "config.json"]
    for path in paths:
        await fetch(path)
    root = root_of(attachment)
    assert await view.text(root, names.CACHED) == str(sum(len(CONTENT[path]) for path in paths))
    await evict("shards/01.bin")
    assert await view.text(view.stat(attachment, "shards/01.bin").inode, names.CACHED) == "0"
    assert await view.text(view.stat(attachment, "shards/01.bin").inode, names.STATE) == "lazy"
    size = len(CONTENT["shards/00.bin"]) + len(CONTENT["config.json"])
    assert await view.text(root, names.CACHED) == str(size)
    await evict("shards")
    assert await view.text(root, names.CACHED) == str(len(CONTENT["config.json"]))
    await evict("")
    await evict("")  # the cache has nothing, which is no error
    assert await view.text(root, names.CACHED) == "0"
    assert view.rig.cache.index.used_bytes == 0
    assert [path for path in objects.rglob("*") if path.is_file()] == []
    assert not list((view.rig.cache.directory / "trash").iterdir())
    await fetch("shards/00.bin")
    assert await view.text(root, names.CACHED) == str(len(CONTENT["shards/00.bin"]))


async def test_xattrs_evict_of_an_open_file_is_busy(view: View, store: FakeStore) -> None:
    attachment = view.attach(store)
    inode = view.stat(attachment, "shards/01.bin").inode
    file = view.vfs.open(inode)
    assert await view.read(file, 0, 5) == CONTENT["shards/01.bin"][:5]
    await view.quiet()
    for place in (inode, root_of(attachment)):
        with pytest.raises(Busy, match=r"shards/01\.bin is open"):
            await view.xattrs.set(place, names.EVICT, b"", UID)
    assert "shards/01.bin is open" in await view.text(root_of(attachment), names.ERROR)
    assert await view.text(inode, names.CACHED) == str(MIB)
    view.vfs.release(file)
    await view.xattrs.set(inode, names.EVICT, b"", UID)
    assert await view.text(inode, names.CACHED) == "0"


async def test_xattrs_evict_on_a_failing_disk_is_an_error(
    view: View, store: FakeStore, caplog: pytest.LogCaptureFixture
) -> None:
    attachment = view.attach(store)
    inode = view.stat(attachment, "config.json").inode
    file = view.vfs.open(inode)
    await view.read(file, 0, 5)
    await view.quiet()
    view.vfs.release(file)
    with planned(Fault("rename", "EROFS", "always")) as plan:
        plan.active = True
        for place in (inode, root_of(attachment)):
            with pytest.raises(CacheError, match=r"config\.json cannot be dropped .*: Read"):
                await view.xattrs.set(place, names.EVICT, b"", UID)
    assert "cannot be dropped" in await view.text(root_of(attachment), names.ERROR)
    assert await view.text(inode, names.STATE) == "cached"
    await view.xattrs.set(inode, names.EVICT, b"", UID)
    assert await view.text(inode, names.STATE) == "lazy"
    caplog.clear()


# -- metadata: shown


_keys = st.text(max_size=12) | st.sampled_from(
    ["", "a.b", "ü" * 119, "ü" * 119 + "a", "x" * 238, "x" * 239, "a\0b", "\ud800", "new\nline"]
)
_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(10**300, 10**302)
    | st.floats(allow_nan=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(_keys, _json, max_size=8))
@example({"big": "x" * (names.VALUE_BYTES_MAX - 2), "bigger": "x" * (names.VALUE_BYTES_MAX - 1)})
@example({f"{'k' * 200}{i}": i for i in range(4000)})
@example({"nan": math.inf, "\udfff": 1, "": 2})
def test_xattrs_metadata_keys_are_shown_or_noted(values: dict[str, Any]) -> None:
    found, hidden = shown_values(values)
    assert len(found) + len(hidden) == len(values)
    for name, text in found.items():
        assert 0 < len(name.encode()) <= names.NAME_BYTES_MAX
        assert "\0" not in name
        assert 0 < len(text) <= names.VALUE_BYTES_MAX
        assert text.isascii()
        assert json.loads(text) == values[name[len(META) :]]
    for name, reason in hidden:
        assert reason
        assert "\n" not in name
        assert "\t" not in name
    absent = [key for key in values if META + key not in found]
    for key in absent:
        bad_key = not key or "\0" in key or any("\ud800" <= c <= "\udfff" for c in key)
        too_long = bad_key or len((META + key).encode()) > names.NAME_BYTES_MAX
        too_large = len(json.dumps(values[key])) > names.VALUE_BYTES_MAX
        assert too_long or too_large


def test_xattrs_metadata_value_too_deep_is_noted() -> None:
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    found, hidden = shown_values({"deep": value, "a": 1})
    assert found == {f"{META}a": b"1"}
    assert hidden == [("deep", "too deeply nested")]
    while value:  # freed all at once, it would take the stack
        value = value.pop()


async def test_xattrs_metadata_at_the_limits_is_shown(view: View) -> None:
    values = {"x" * 238: 1, "y" * 239: 2, "v": "x" * 65534, "w": "x" * 65535, "": 3, "n\0": 4}
    attachment = view.attach(FakeStore({METADATA: raw(values)}))
    found = await shown(view, attachment)
    assert found == {"x" * 238: 1, "v": "x" * 65534}
    noted = dict(
        line.split("\t")
        for line in (await view.text(root_of(attachment), names.SKIPPED)).splitlines()
    )
    assert noted == {
        "y" * 239: "the name has more than 255 bytes",
        "w": "the value has more than 65536 bytes",
        "": "the key is empty or holds a NUL",
        "n\\x00": "the key is empty or holds a NUL",
    }
    assert await content(view, attachment) == raw(values)


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[1, 2]", b"null", b'"text"', b"\xff\xfe", b'{"a": ' + b"9" * 5000 + b"}"]
)
async def test_xattrs_metadata_that_is_not_an_object_has_no_keys(view: View, data: bytes) -> None:
    store = FakeStore({METADATA: data})
    attachment = view.attach(store)
    root = root_of(attachment)
    assert await shown(view, attachment) == {}
    assert await content(view, attachment) == data
    for attempt in (
        lambda: view.xattrs.set(root, META + "a", b"1", UID),
        lambda: view.xattrs.remove(root, META + "a", UID),
    ):
        with pytest.raises(MetadataError):
            await attempt()
    if data in (b"[1, 2]", b"null", b'"text"'):
        with pytest.raises(MetadataNotDict):
            await change(view, attachment, "a", 1)
    assert METADATA in await view.text(root, names.ERROR)
    assert store.content(METADATA) == data
    store.overwrite(METADATA, b'{"a": 1}')  # as set_metadata does
    await view.metadata.refresh(attachment)
    assert await shown(view, attachment) == {"a": 1}


@pytest.mark.parametrize("opening", ["[", '{"a":'])
async def test_deep_nesting_is_harmless(
    view: View, opening: str, caplog: pytest.LogCaptureFixture
) -> None:
    """At every depth the value is shown, or noted as skipped, or the file is no metadata."""
    closing = "]" if opening == "[" else "}"
    for depth in [*range(880, 1010, 3), 5000, 100_000]:
        text = opening * depth + "1" + closing * depth
        store = FakeStore({METADATA: f'{{"deep": {text}, "b": 1}}'.encode()})
        attachment = view.attach(store)
        root = root_of(attachment)
        found = await shown(view, attachment)
        if "b" in found:
            is_noted = "deep\ttoo deeply" in await text_or_none(view, root, names.SKIPPED)
            assert found.get("deep") or is_noted
        empty = view.attach(FakeStore(), Location("local", "/other"))
        try:
            await view.xattrs.set(root_of(empty), META + "deep", text.encode(), UID)
        except InvalidValue:
            assert await shown(view, empty) == {}
        else:
            assert await view.text(root_of(empty), META + "deep")
        view.vfs.remove(attachment)
        view.vfs.remove(empty)


# -- metadata: read


async def test_xattrs_reads_in_a_row_ask_the_store_once(
    view: View, autojump_clock: MockClock
) -> None:
    store = FakeStore({METADATA: raw({"a": 1, "b": 2})})
    attachment = view.attach(store)

    def gets() -> int:
        return sum(call.operation == "get" for call in store.calls)

    assert await shown(view, attachment) == {"a": 1, "b": 2}
    assert gets() == 1
    store.overwrite(METADATA, raw({"a": 3}))
    await trio.sleep(0.4)
    assert META + "b" in await view.names(root_of(attachment))
    await trio.sleep(0.5)
    assert await shown(view, attachment) == {"a": 1, "b": 2}
    assert gets() == 1
    await trio.sleep(0.2)
    assert await shown(view, attachment) == {"a": 3}
    assert await content(view, attachment) == raw({"a": 3})
    assert gets() == 2


async def test_metadata_keeper_does_not_ask_at_opens_of_other_files(
    view: View, store: FakeStore
) -> None:
    store.overwrite("shards/.metadata.json", b"{}")
    attachment = view.attach(store)
    for path in ("config.json", "shards/.metadata.json"):
        node = view.vfs.find(view.stat(attachment, path).inode)
        await view.metadata.before_open(*node)
    for parent in ("", "shards"):
        node = view.vfs.find(view.stat(attachment, parent).inode)[1]
        await view.metadata.before_absence(attachment, node, b"nothing")
    shards = view.vfs.find(view.stat(attachment, "shards").inode)[1]
    await view.metadata.before_absence(attachment, shards, METADATA.encode())
    assert [call.operation for call in store.calls] == ["list"]


async def test_metadata_keeper_follows_creation_and_removal_at_the_store(
    view: View, store: FakeStore, autojump_clock: MockClock
) -> None:
    attachment = view.attach(store)
    files, size = attachment.snapshot.file_count, attachment.snapshot.size
    for data in (b'{"a": 1}', b'{"a": 2, "b": 3}'):
        assert await content(view, attachment) is None
        assert await shown(view, attachment) == {}
        store.overwrite(METADATA, data)
        await trio.sleep(1.5)
        assert await content(view, attachment) == data
        assert await shown(view, attachment) == json.loads(data)
        assert (attachment.snapshot.file_count, attachment.snapshot.size) == (
            files + 1,
            size + len(data),
        )
        store.delete(METADATA)
        await trio.sleep(1.5)
        assert await shown(view, attachment) == {}
        assert METADATA.encode() not in [n for n, _, _ in view.entries(root_of(attachment))]
        assert (attachment.snapshot.file_count, attachment.snapshot.size) == (files, size)
        await trio.sleep(1.5)


async def test_metadata_keeper_finds_a_removal_at_its_first_read(
    view: View, store: FakeStore
) -> None:
    store.overwrite(METADATA, b"{}")
    attachment = view.attach(store)
    store.delete(METADATA)
    assert await content(view, attachment) is None
    await change(view, attachment, "a", 1)
    assert await content(view, attachment) == b'{"a": 1}'


async def test_metadata_keeper_leaves_a_directory_of_that_name(view: View) -> None:
    """Object stores can have both; the manifest shows the directory."""
    store = FakeStore({f"{METADATA}/x": b"1", "a": b"2"})
    attachment = view.attach(store)
    await change(view, attachment, "n", 1)
    assert stored(store) == {"n": 1}
    assert await shown(view, attachment) == {"n": 1}
    assert view.stat(attachment, f"{METADATA}/x").size == 1
    assert (attachment.snapshot.file_count, attachment.snapshot.size) == (2, 2)


async def test_metadata_keeper_reports_an_error_and_recovers(
    view: View, autojump_clock: MockClock
) -> None:
    store = FakeStore({METADATA: raw({"a": 1})})
    attachment = view.attach(store)
    root = root_of(attachment)
    assert await shown(view, attachment) == {"a": 1}
    await trio.sleep(2)
    store.fail_always("get", StoreUnavailable("no answer"))
    for _ in range(5):
        with pytest.raises(StoreUnavailable, match="no answer"):
            await view.text(root, META + "a")
    assert await view.text(root, names.STATE)
    assert await view.names(root)
    asked = sum(call.operation == "get" for call in store.calls)
    assert asked == 2  # the daemon does not ask at once after a timeout
    assert (await view.text(root, names.ERROR)).endswith("no answer")
    store.fail_always("get", None)
    await trio.sleep(5.5)
    assert await shown(view, attachment) == {"a": 1}
    store.fail("get", AccessDenied("expired"))
    await trio.sleep(2)
    for _ in range(3):
        with pytest.raises(AccessDenied):
            await view.text(root, META + "a")
    await trio.sleep(5.5)
    assert await view.text(root, META + "a") == "1"


async def test_xattrs_list_without_the_store_lacks_metadata_keys(
    view: View, autojump_clock: MockClock
) -> None:
    """A name that a copying program could not read would end its copy."""
    store = FakeStore({METADATA: raw({"a": 1})})
    attachment = view.attach(store)
    root = root_of(attachment)
    assert META + "a" in await view.names(root)
    for error in (StoreUnavailable("no answer"), AccessDenied("expired")):
        await trio.sleep(61)
        store.fail_always("get", error)
        for _ in range(5):
            listed = await view.names(root)
            assert names.URI in listed
            assert [name for name in listed if name.startswith(META)] == []
            for name in listed:
                assert await view.text(root, name)
            await trio.sleep(0.3)
        store.fail_always("get", None)
    await trio.sleep(61)
    assert META + "a" in await view.names(root)


async def test_xattrs_listed_names_can_be_read_without_the_store(
    view: View, autojump_clock: MockClock
) -> None:
    store = FakeStore({METADATA: raw({"a": 1})})
    attachment = view.attach(store)
    root = root_of(attachment)
    for wait_s in (0.1, 0.45, 0.6, 0.9, 1.2):  # since the last request
        store.fail_always("get", None)
        await view.metadata.refresh(attachment)
        await trio.sleep(wait_s)
        assert META + "a" in await view.names(root)
        store.fail_always("get", StoreUnavailable("no answer"))
        await trio.sleep(0.45)
        assert await view.text(root, META + "a") == "1"


async def test_xattrs_list_with_many_keys_has_some_and_their_number(view: View) -> None:
    values: dict[str, Any] = {"big": "x" * 3000, **{f"metric {n:03}": n for n in range(120)}}
    attachment = view.attach(FakeStore({METADATA: raw(values)}))
    root = root_of(attachment)
    listed = await view.names(root)
    keys = [name[len(META) :] for name in listed if name.startswith(META)]
    assert keys == [*values][1 : len(keys) + 1] != []
    assert listed[0] == names.METADATA_KEYS
    assert await view.text(root, names.METADATA_KEYS) == "121"
    used = [names.kept_bytes(name, await view.xattrs.get(root, name)) for name in listed]
    assert names.LISTED_BYTES_MAX - 64 < sum(used) <= names.LISTED_BYTES_MAX
    assert await shown(view, attachment) == values
    few = {key: values[key] for key in keys[:3]}
    await view.xattrs.set(root, META + "last", b"1", UID)
    assert set(await view.names(root)) >= {names.METADATA_KEYS, names.URI, names.ORIGIN}
    other = root_of(view.attach(FakeStore({METADATA: raw(few)}), Location("local", "/few")))
    assert names.METADATA_KEYS not in await view.names(other)


async def test_metadata_keeper_pauses_longer_with_each_error(
    view: View, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    store = FakeStore({METADATA: raw({"a": 1})})
    attachment = view.attach(store)
    store.fail_always("get", AccessDenied("not with this key"))
    for _ in range(120):
        with pytest.raises(AccessDenied):
            await view.text(root_of(attachment), META + "a")
        await trio.sleep(1)
    # After 0, 5, 15, 35 and 75 s.
    assert sum(call.operation == "get" for call in store.calls) == 5
    assert sum("not with this key" in record.message for record in caplog.records) == 1


async def test_metadata_keeper_takes_a_denial_without_listing_as_absence(
    view: View, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    store = FakeStore({"weights": b"x"})
    attachment = view.attach(store)
    root = root_of(attachment)
    store.fail_always("get", AccessDenied("s3:ListBucket is missing"))
    for _ in range(60):
        assert await shown(view, attachment) == {}
        await trio.sleep(0.5)
    assert sum(call.operation == "get" for call in store.calls) == 1
    assert names.ERROR not in await view.names(root)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    await view.xattrs.set(root, META + "a", b"2", UID)
    store.fail_always("get", None)
    assert await shown(view, attachment) == {"a": 2}


async def test_metadata_keeper_asks_again_after_a_denial(
    view: View, autojump_clock: MockClock
) -> None:
    store = FakeStore({"weights": b"x"})
    attachment = view.attach(store)
    store.fail("get", AccessDenied("s3:ListBucket is missing"))
    assert await shown(view, attachment) == {}
    store.overwrite(METADATA, raw({"a": 1}))
    await trio.sleep(61)
    assert await shown(view, attachment) == {"a": 1}


async def test_metadata_keeper_ends_its_pause_after_a_local_change(
    view: View, autojump_clock: MockClock
) -> None:
    store = FakeStore({METADATA: raw({"a": 1})})
    attachment = view.attach(store)
    store.fail("get", StoreUnavailable("no answer"))
    with pytest.raises(StoreUnavailable):
        await view.text(root_of(attachment), META + "a")
    store.overwrite(METADATA, raw({"a": 2}))
    await view.metadata.refresh(attachment)
    assert await shown(view, attachment) == {"a": 2}


async def test_a_dark_store_ends_at_the_deadline(tmp_path: Path, autojump_clock: MockClock) -> None:
    offload = InlineOffload()
    async with view_in(tmp_path, offload=offload, read_deadline_s=7) as view:
        attachment = view.attach(FakeStore({METADATA: raw({"a": 1})}))
        root = root_of(attachment)
        offload.latency_s = {"control": math.inf}
        for attempt in (
            lambda: view.text(root, META + "a"),
            lambda: view.xattrs.set(root, META + "a", b"2", UID),
            lambda: view.xattrs.remove(root, META + "a", UID),
        ):
            started_s = trio.current_time()
            with trio.fail_after(100), pytest.raises(StoreTimeout, match="within 7 s"):
                await attempt()
            assert trio.current_time() - started_s == pytest.approx(7)
        handle = await opened(view, attachment)  # the listed version counts
        assert handle is not None
        view.vfs.release(handle)
        offload.latency_s = {}
        await trio.sleep(6)
        assert await shown(view, attachment) == {"a": 1}


# -- metadata: changed


async def test_metadata_change_is_at_the_store_and_visible_at_once(
    view: View, store: FakeStore
) -> None:
    attachment = view.attach(store)
    version = await view.text(root_of(attachment), names.VERSION)
    assert await content(view, attachment) is None
    steps: list[tuple[str, Any]] = [
        ("a", 1),
        ("a", {"b": [None, "ü"]}),
        ("größe", 0.1),
        ("a.b", "text"),
        ("a", 10**400),
    ]
    expected: dict[str, Any] = {}
    for key, value in steps:
        await change(view, attachment, key, value)
        expected[key] = value
        assert stored(store) == expected
        assert await shown(view, attachment) == expected
        assert await content(view, attachment) == store.content(METADATA)
        entries = {name: found for name, found, _ in view.entries(root_of(attachment))}
        assert entries[METADATA.encode()].size == len(store.content(METADATA) or b"")
    for key in ("a", "größe", "a.b"):
        await view.xattrs.remove(root_of(attachment), META + key, UID)
        del expected[key]
        assert stored(store) == expected
        assert await shown(view, attachment) == expected
    assert await content(view, attachment) == b"{}"
    assert await view.text(root_of(attachment), names.VERSION) == version


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"12", 12),
        (b"text", "text"),
        (b"", ""),
        (b" [1, 2] ", [1, 2]),
        (b"1 2", "1 2"),
        (b"NaN", math.nan),
        ("größe".encode(), "größe"),
        (b'"quoted"', "quoted"),
        (b"9" * 5000, "9" * 5000),  # Python reads no number of that length
    ],
)
async def test_metadata_change_to_other_text_than_json_is_a_string(
    view: View, value: bytes, expected: Any
) -> None:
    store = FakeStore()
    await view.xattrs.set(root_of(view.attach(store)), META + "a", value, UID)
    assert stored(store)["a"] == pytest.approx(expected, nan_ok=True)


async def test_metadata_change_to_bytes_that_are_not_text_is_refused(view: View) -> None:
    store = FakeStore()
    attachment = view.attach(store)
    with pytest.raises(InvalidValue):
        await view.xattrs.set(root_of(attachment), META + "a", b"\xff", UID)
    with pytest.raises(NoAttribute):
        await view.xattrs.remove(root_of(attachment), META + "a", UID)
    assert stored(store) is None


async def test_metadata_change_keeps_keys_of_other_nodes(view: View) -> None:
    odd = {"": 1, "\ud800": 2, "x" * 300: 3, "n\0": [math.inf]}
    store = FakeStore({METADATA: raw({"a": 1})})
    attachment = view.attach(store)
    assert await shown(view, attachment) == {"a": 1}
    store.overwrite(METADATA, raw({"b": 2, **odd}))  # within the time that is fresh
    await change(view, attachment, "c", 3)
    assert stored(store) == {"b": 2, "c": 3, **odd}
    assert await shown(view, attachment) == {"b": 2, "c": 3}
    with pytest.raises(NoAttribute):
        await view.xattrs.remove(root_of(attachment), META + "a", UID)


async def test_metadata_changes_wait_for_each_other(view: View, autojump_clock: MockClock) -> None:
    offload = view.rig.offload
    assert isinstance(offload, InlineOffload)
    store = FakeStore()
    attachment = view.attach(store)
    async with trio.open_nursery() as nursery:
        for number in range(20):
            offload.latency_s["control"] = (number * 7) % 5 / 10
            nursery.start_soon(change, view, attachment, f"k{number}", number)
            await trio.sleep(0.01)
    assert stored(store) == {f"k{number}": number for number in range(20)}
    assert await shown(view, attachment) == stored(store)


async def test_metadata_slow_read_hides_no_later_change(
    view: View, autojump_clock: MockClock
) -> None:
    offload = view.rig.offload
    assert isinstance(offload, InlineOffload)
    store = FakeStore()
    attachment = view.attach(store)
    async with trio.open_nursery() as nursery:
        offload.reply_s = {"control": 3.0}
        nursery.start_soon(change, view, attachment, "a", 1)
        await trio.sleep(1)
        offload.reply_s = {}
        nursery.start_soon(change, view, attachment, "b", 2)
    assert stored(store) == await shown(view, attachment) == {"a": 1, "b": 2}
    assert await content(view, attachment) == store.content(METADATA)


@pytest.mark.parametrize("operation", ["get", "put", "put answer", "find"])
@pytest.mark.parametrize("error", [AccessDenied("refused"), StoreUnavailable("refused")])
async def test_metadata_failed_change_leaves_one_whole_version(
    view: View, autojump_clock: MockClock, operation: str, error: CkptfsError
) -> None:
    old, new = {"a": 1, "b": 2}, {"a": 5, "b": 2}
    store = FakeStore({METADATA: raw(old)})
    attachment = view.attach(store)
    root = root_of(attachment)
    assert await shown(view, attachment) == old
    store.fail(operation, error)
    with pytest.raises(type(error), match="refused"):
        await change(view, attachment, "a", 5)
    assert (await view.text(root, names.ERROR)).endswith("refused")
    assert stored(store) == (old if operation in ("get", "put") else new)
    if isinstance(error, StoreUnavailable):
        await trio.sleep(5.5)
    assert await shown(view, attachment) == stored(store)
    assert await content(view, attachment) == store.content(METADATA)
    await change(view, attachment, "a", 6)
    assert stored(store) == {"a": 6, "b": 2}


async def test_metadata_change_in_a_removed_directory_is_an_error(view: View) -> None:
    store = FakeStore()
    attachment = view.attach(store)
    store.is_gone = True
    with pytest.raises(CkptfsError) as caught:
        await change(view, attachment, "a", 1)
    assert errno_of(caught.value) == errno.EIO


async def test_metadata_late_answer_does_not_hide_a_newer_version(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """An abandoned change may still arrive at the store, after the error."""
    offload = InlineOffload()
    async with view_in(tmp_path, offload=offload, read_deadline_s=2) as view:
        store = FakeStore({METADATA: raw({"a": 1})})
        attachment = view.attach(store)
        offload.reply_s = {"control": 3.0}
        with pytest.raises(StoreTimeout):
            await change(view, attachment, "a", 2)
        offload.reply_s = {}
        await trio.sleep(6)
        assert stored(store) == {"a": 2}
        assert await shown(view, attachment) == {"a": 2}
        assert await content(view, attachment) == raw({"a": 2})


# -- metadata: versions


@pytest.mark.parametrize("files", [3, 999, 1999])
@pytest.mark.parametrize("with_etags", [True, False])
@pytest.mark.parametrize("mtime_ns", [OLD_NS, OLD_NS + 10**9 - 1, OLD_NS + 10**9 - 500])
async def test_metadata_versions_of_one_size_and_second_are_never_mixed(
    view: View,
    autojump_clock: MockClock,
    caplog: pytest.LogCaptureFixture,
    files: int,
    with_etags: bool,
    mtime_ns: int,
) -> None:
    objects = {f"f/{number}": b"" for number in range(files)}
    store = FakeStore({**objects, METADATA: b'{"n": 10}'}, mtime_ns=mtime_ns, with_etags=with_etags)
    store.put_mtime_ns = mtime_ns
    attachment = view.attach(store)
    held: list[tuple[int, bytes]] = []
    for number in range(10, 16):
        if number > 10:
            if number % 2:
                await change(view, attachment, "n", number)
            else:
                store.overwrite(METADATA, raw({"n": number}), mtime_ns=mtime_ns)
                await trio.sleep(1.1)
        expected = raw({"n": number})
        assert await content(view, attachment) == expected
        assert await shown(view, attachment) == {"n": number}
        handle = await opened(view, attachment)
        assert handle is not None
        assert await view.read(handle, 0, 100) == expected
        held.append((handle, expected))
        for old, data in held:
            assert await view.read(old, 0, 100) == data
    assert len({handle for handle, _ in held}) == len(held)
    for handle, _ in held:
        view.vfs.release(handle)
    assert await view.text(root_of(attachment), names.STATE) != "changed"
    assert [r.message for r in caplog.records if r.levelno > logging.INFO] == []


async def test_the_same_text_written_again_stays_readable(
    view: View, autojump_clock: MockClock
) -> None:
    store = FakeStore({METADATA: b'{"n": 1}'})
    attachment = view.attach(store)
    assert await shown(view, attachment) == {"n": 1}
    for action in ("theirs", "ours", "ours, in one second"):
        if action == "theirs":
            store.overwrite(METADATA, b'{"n": 1}')
            await trio.sleep(1.1)
        else:
            store.put_mtime_ns = store.pin(METADATA).mtime_ns if "second" in action else None
            await change(view, attachment, "n", 1)
        assert await content(view, attachment) == b'{"n": 1}'
        await view.xattrs.set(root_of(attachment), names.EVICT, b"", UID)
        assert await content(view, attachment) == b'{"n": 1}'


async def test_metadata_reader_of_an_old_version_does_not_mark_a_change(
    view: View, autojump_clock: MockClock
) -> None:
    store = FakeStore({METADATA: b'{"n": 1}'})
    attachment = view.attach(store)
    handle = await opened(view, attachment)
    assert handle is not None
    await change(view, attachment, "n", 2)
    with pytest.raises(ObjectChanged):  # it was never read, and the store no longer has it
        await view.read(handle, 0, 100)
    assert await content(view, attachment) == b'{"n": 2}'
    await view.quiet()
    assert await view.text(root_of(attachment), names.STATE) == "cached"
    view.vfs.release(handle)


# -- against a model

_serial = itertools.count()
_steps = st.lists(
    st.tuples(
        st.sampled_from(
            ["set"] * 4
            + ["remove", "theirs", "theirs", "delete", "wait", "wait", "read", "hold"]
            + ["denied", "lost", "dark", "evict"]
        ),
        st.sampled_from(["a", "b", "größe"]),
        st.integers(10, 13),
        st.booleans(),
    ),
    min_size=4,
    max_size=25,
)


class Model:
    """Every version of the file that the store ever had."""

    def __init__(self, store: FakeStore) -> None:
        self.store = store
        self.versions: set[bytes | None] = set()
        self.look()

    def look(self) -> bytes | None:
        """The current version at the store."""
        found = self.store.content(METADATA)
        self.versions.add(found)
        return found


async def _step(
    view: View, model: Model, attachment: Attachment, held: dict[int, bytes], step: tuple[Any, ...]
) -> None:
    operation, key, number, same_second = step
    store, root = model.store, root_of(attachment)
    before = model.look()
    known = store.pin(METADATA).mtime_ns if before is not None else None
    store.put_mtime_ns = known if same_second else None
    values = json.loads(before) if before else {}
    if operation in ("set", "remove", "denied", "lost"):
        if operation in ("denied", "lost"):
            store.fail("put" if operation == "denied" else "put answer", AccessDenied("no"))
        try:
            if operation == "remove":
                await view.xattrs.remove(root, META + key, UID)
            else:
                await view.xattrs.set(root, META + key, raw(number), UID)
        except AccessDenied:
            assert operation in ("denied", "lost")
            assert stored(store) in (values or None, values, {**values, key: number})
        except NoAttribute:
            assert operation == "remove"
            assert key not in values
        else:
            values = {**values, key: number}
            if operation == "remove":
                del values[key]
            assert stored(store) == values
        store._faults.clear()
        assert await shown(view, attachment) == (stored(store) or {})
        assert await content(view, attachment) == model.look()
    elif operation == "theirs":
        data = raw({**values, key: number})
        if data != before or not same_second:  # the same version, see `MetadataKeeper`
            store.overwrite(METADATA, data, mtime_ns=store.put_mtime_ns)
    elif operation == "delete" and before is not None:
        store.delete(METADATA)
    elif operation == "wait":
        await trio.sleep(1.1)
        assert await shown(view, attachment) == (stored(store) or {})
        assert await content(view, attachment) == store.content(METADATA)
    elif operation == "dark":
        store.fail("get", StoreUnavailable("outage"))
        await trio.sleep(1.1)
        await shown_or_error(view, attachment)
        store._faults.clear()
        await trio.sleep(5.1)
        assert await shown(view, attachment) == (stored(store) or {})
    elif operation == "evict":
        try:
            await view.xattrs.set(root, names.EVICT, b"", UID)
        except Busy:
            assert held
    elif operation in ("read", "hold") and (handle := await opened(view, attachment)) is not None:
        try:
            data = await view.read(handle, 0, 1000)
        except ObjectChanged:  # it changed within the time that is fresh
            view.vfs.release(handle)
            return
        assert data in model.versions
        if operation == "read" or handle in held:
            view.vfs.release(handle)
        else:
            held[handle] = data
    for handle, data in held.items():
        assert await view.read(handle, 0, 1000) == data


async def shown_or_error(view: View, attachment: Attachment) -> None:
    try:
        await shown(view, attachment)
    except StoreUnavailable:
        return


@given(_steps, st.booleans(), st.booleans())
def test_metadata_attributes_file_and_store_agree(
    tmp_path_factory: pytest.TempPathFactory,
    steps: "list[tuple[Any, ...]]",
    with_etags: bool,
    exists: bool,
) -> None:
    directory = tmp_path_factory.getbasetemp() / f"metadata{next(_serial)}"

    async def main() -> None:
        async with view_in(directory) as view:
            store = FakeStore({METADATA: raw({"a": 10})} if exists else {}, with_etags=with_etags)
            model = Model(store)
            attachment = view.attach(store)
            held: dict[int, bytes] = {}
            for step in steps:
                await _step(view, model, attachment, held, step)
            await trio.sleep(6)
            assert await shown(view, attachment) == (stored(store) or {})
            assert await content(view, attachment) == store.content(METADATA)
            assert await view.text(root_of(attachment), names.STATE) != "changed"
            for inode in held:
                view.vfs.release(inode)

    trio.run(main, clock=MockClock(autojump_threshold=0))


async def test_xattrs_evict_works_for_the_deepest_tree(
    view: View, autojump_clock: MockClock
) -> None:
    path = "a/" * 2000 + "a"
    attachment = view.attach(FakeStore({path: b"x"}))
    await view.xattrs.set(attachment.snapshot.tree.root.inode, "user.ckptfs.evict", b"", UID)


async def test_xattrs_metadata_above_the_limit_has_no_keys(
    view: View, autojump_clock: MockClock
) -> None:
    raw = b'{"a": [' + b"[]," * (2 << 20) + b"1]}"
    attachment = view.attach(FakeStore({".metadata.json": raw}))
    assert "user.ckptfs.meta.a" not in await view.names(attachment.snapshot.tree.root.inode)
    error = await view.text(attachment.snapshot.tree.root.inode, "user.ckptfs.error")
    assert "more than 4194304" in error
