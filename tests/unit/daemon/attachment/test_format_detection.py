"""The daemon learns a file's parts beside its readers, from few bytes, and they steer readahead."""

import io
import math
from pathlib import Path

import numpy as np
import pytest
import trio
from safetensors.numpy import save
from support.archives import pickle_metadata, write_torch_zip
from support.bench import PLACE, Bench
from support.fakes import MIB, FakeStore, InlineOffload, pattern
from support.rig import View, read_of, rig_in, view_in
from trio.testing import MockClock

from ckptfs._daemon.attachment import format_detection
from ckptfs._daemon.attachment.attachment import Attachment
from ckptfs._model.blocks import blocks_of
from ckptfs._model.formats.dcp import BYTES_MAX
from ckptfs.errors import AccessDenied

TENSOR_BYTES = 12 * MIB
TENSORS = [pattern(TENSOR_BYTES, seed) for seed in range(3)]
ITEM = pattern(12 * MIB)


def torch_zip() -> "tuple[bytes, list[tuple[int, int]]]":
    """An archive, and the places of its tensors."""
    file = io.BytesIO()
    places = write_torch_zip(file, TENSORS)
    return file.getvalue(), places


def archives(count: int) -> bytes:
    """A file as torch.distributed.checkpoint writes them: each item is an archive."""
    file = io.BytesIO()
    write_torch_zip(file, [ITEM])
    return file.getvalue() * count


async def settled(view: View) -> None:
    """Wait until no fetch and no detection runs."""
    with trio.fail_after(30):
        while any(a.background for a in view.attachments):  # noqa: ASYNC110 - threads end it
            await trio.sleep(0.002)
    await view.quiet()


async def walk(view: View, inode: int, start: int, length: int) -> None:
    """Read as the kernel does, in pieces of 128 KiB."""
    for offset in range(start, start + length, 128 << 10):
        await view.read(inode, offset, min(128 << 10, start + length - offset))


def fetched(store: FakeStore, path: str) -> set[int]:
    """The blocks of a file that the daemon has requested, each once."""
    blocks = [i for c in store.reads(path) for i in blocks_of(c.offset, c.length)]
    assert len(blocks) == len(set(blocks))
    return set(blocks)


def opened(view: View, attachment: Attachment, path: str) -> int:
    return view.vfs.open(view.stat(attachment, path).inode)


# -- zip archives


async def test_format_detection_of_an_archive_reads_its_end(
    tmp_path: Path,
) -> None:
    raw, places = torch_zip()
    store = FakeStore({"any name": raw})
    async with view_in(tmp_path) as view:
        file = opened(view, view.attach(store), "any name")
        assert await view.read(file, 0, 4) == b"PK\x03\x04"
        await view.read(file, 0, 4096)
        await settled(view)
        last = (len(raw) - 1) // MIB
        assert fetched(store, "any name") - {last - 1} == {0, last}
        start, stop = places[1]
        await walk(view, file, start - 64, 4 * MIB)
        await settled(view)
        tensor = set(blocks_of(start, stop - start))
        assert fetched(store, "any name") - {last - 1} == {0, last} | tensor
        assert await view.read(file, start + 5, MIB) == TENSORS[1][5 : 5 + MIB]


async def test_format_detection_before_close_learns_a_header_in_the_page_cache(
    tmp_path: Path,
) -> None:
    raw, places = torch_zip()
    store = FakeStore({"a": raw})
    async with view_in(tmp_path) as view:
        attachment = view.attach(store)
        file = opened(view, attachment, "a")
        await view.read(file, 0, 4)
        view.vfs.release(file)
        await settled(view)
        assert fetched(store, "a") == {0}  # a program that read only the head causes no more
        for _ in range(2):
            file = opened(view, attachment, "a")
            await view.read(file, places[2][0], 4096)
            await settled(view)
            view.vfs.release(file)
        file = opened(view, attachment, "a")
        start, stop = places[1]
        await walk(view, file, start, 4 * MIB)
        await settled(view)
        assert set(blocks_of(start, stop - start)) <= fetched(store, "a")
        assert len(fetched(store, "a")) <= 16


@pytest.mark.parametrize("damage", ["cut", "no directory", "small"])
async def test_format_detection_of_a_broken_archive_learns_nothing(
    tmp_path: Path, damage: str
) -> None:
    raw, _ = torch_zip()
    raw = {
        "cut": raw[:-1],
        "no directory": raw[: -2 * MIB] + bytes(2 * MIB - 22) + raw[-22:],
        "small": raw[: 4 * MIB],
    }[damage]
    store = FakeStore({"a": raw})
    async with view_in(tmp_path) as view:
        file = opened(view, view.attach(store), "a")
        for length in (4, 4096):
            await view.read(file, 0, length)
            await settled(view)
        assert (len(fetched(store, "a")) == 1) == (damage == "small")
        await walk(view, file, 0, 3 * MIB)
        await settled(view)
        assert await view.read(file, 3 * MIB, MIB) == raw[3 * MIB : 4 * MIB]


# -- safetensors


async def test_format_detection_of_safetensors_needs_only_the_header(tmp_path: Path) -> None:
    raw = save({name: np.zeros(TENSOR_BYTES, np.uint8) for name in "abc"})
    store = FakeStore({"file": raw})
    async with view_in(tmp_path) as view:
        file = opened(view, view.attach(store), "file")
        await view.read(file, 0, 4096)
        start = len(raw) - 2 * TENSOR_BYTES
        await walk(view, file, start, 4 * MIB)
        await settled(view)
        assert fetched(store, "file") == {0} | set(blocks_of(start, TENSOR_BYTES))


# -- torch.distributed.checkpoint

ITEMS = 4


def checkpoint(folder: str = "", item_bytes: int = 0) -> FakeStore:
    """Two files with `ITEMS` items each."""
    raw = archives(ITEMS)
    item_bytes = item_bytes or len(raw) // ITEMS
    items = [
        (f"layer.{name}.{i}", name, i * item_bytes, item_bytes)
        for name in ("x", "y")
        for i in range(ITEMS)
    ]
    files = {"x": raw, "y": raw, "small": bytes(100), ".metadata": pickle_metadata(items)}
    return FakeStore({folder + name: data for name, data in files.items()})


@pytest.mark.parametrize("folder", ["", "deep/er/"])
async def test_readahead_of_a_dcp_item_fetches_exactly_the_item(
    tmp_path: Path, folder: str
) -> None:
    store = checkpoint(folder)
    item_bytes = len(archives(1))
    async with view_in(tmp_path) as view:
        attachment = view.attach(store)
        file = opened(view, attachment, f"{folder}x")
        await view.read(file, item_bytes, 4096)
        await settled(view)
        assert fetched(store, f"{folder}.metadata") == {0}
        await walk(view, file, item_bytes, 4 * MIB)
        await settled(view)
        assert fetched(store, f"{folder}x") == set(blocks_of(item_bytes, item_bytes))
        # The other file, too, without a request for its end or for the metadata.
        file = opened(view, attachment, f"{folder}y")
        await walk(view, file, 0, 4 * MIB)
        await settled(view)
        assert fetched(store, f"{folder}y") == set(blocks_of(0, item_bytes))
        assert len(store.reads(f"{folder}.metadata")) == 1


async def test_format_detection_after_a_read_of_the_metadata_learns_layouts(tmp_path: Path) -> None:
    store = checkpoint()
    async with view_in(tmp_path) as view:
        attachment = view.attach(store)
        await view.read(opened(view, attachment, ".metadata"), 0, 100)
        await settled(view)
        (layout,) = attachment.layouts.values()
        assert layout is not None
        assert layout.keys() == {b"x", b"y"}


async def test_format_detection_ignores_small_files(tmp_path: Path) -> None:
    store = checkpoint()
    async with view_in(tmp_path) as view:
        attachment = view.attach(store)
        await view.read(opened(view, attachment, "small"), 0, 100)
        await settled(view)
        assert {call.path for call in store.reads()} == {"small"}
        assert not attachment.layouts


@pytest.mark.parametrize(
    "metadata", [b'{"a": "' + bytes(3 * MIB) + b'"}', bytes(BYTES_MAX + 1), b"", b"\x80"]
)
async def test_format_detection_of_a_foreign_metadata_file_costs_one_block(
    tmp_path: Path, metadata: bytes
) -> None:
    raw, places = torch_zip()
    store = FakeStore({"a": raw, ".metadata": metadata})
    async with view_in(tmp_path) as view:
        file = opened(view, view.attach(store), "a")
        for length in (4, 4096, 4096):
            await view.read(file, 0, length)
            await settled(view)
        assert fetched(store, ".metadata") <= {0}
        start, stop = places[1]
        await walk(view, file, start, 4 * MIB)
        await settled(view)
        assert set(blocks_of(start, stop - start)) <= fetched(store, "a")


async def test_format_detection_of_broken_items_learns_nothing(tmp_path: Path) -> None:
    store = checkpoint(item_bytes=100 * MIB)
    async with view_in(tmp_path) as view:
        file = opened(view, view.attach(store), "x")
        for offset in (0, 4096, 8192, 20 * MIB, 21 * MIB):
            await view.read(file, offset, 4096)
            await settled(view)
        assert len(fetched(store, "x")) <= 5  # its end, too, because it resembles an archive


# -- faults


async def test_format_detection_after_an_error_leaves_reads_intact(tmp_path: Path) -> None:
    store = checkpoint()
    store.fail("read_into", AccessDenied(".metadata: access denied"), at=2)
    async with view_in(tmp_path, connections_max=1) as view:
        attachment = view.attach(store)
        file = opened(view, attachment, "x")
        await view.read(file, 20 * MIB, 4096)
        await settled(view)
        assert "access denied" in attachment.error
        await walk(view, file, 20 * MIB, 3 * MIB)
        await settled(view)
        assert len(store.reads(".metadata")) == 1


async def test_format_detection_logs_an_unexpected_error_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a mistake")

    monkeypatch.setattr(format_detection.dcp, "parts_by_file", fail)
    store = checkpoint()
    async with view_in(tmp_path) as view:
        attachment = view.attach(store)
        file = opened(view, attachment, "x")
        await view.read(file, 0, 4096)
        await settled(view)
        assert "a mistake" in caplog.text
        assert list(attachment.layouts.values()) == [{}]
        await view.read(file, 30 * MIB, 4096)


async def test_format_detection_ends_with_its_attachment(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with rig_in(tmp_path, InlineOffload(), linger_s=0) as rig:
        bench = Bench(rig)
        bench.stores[PLACE.path] = checkpoint()
        attachment = await bench.attach()
        vfs = bench.service.vfs
        handle = vfs.open(vfs.lookup(attachment.snapshot.tree.root.inode, b"x").inode)
        bench.offload.latency_s = {"compute": math.inf}
        await read_of(vfs, handle, 0, 4096)
        await trio.sleep(10)
        metadata = attachment.file(next(iter(attachment.layouts)))
        assert attachment.background
        assert metadata.opened.count == 1
        vfs.release(handle)
        bench.service.attachments.let_go(attachment)
        await trio.sleep(10)
        assert bench.shown() == []
        assert not attachment.background
        assert metadata.opened.count == 0


# -- one file after the other


async def test_format_detection_fetches_the_head_of_the_next_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(format_detection, "_HOLD_S", 0.01)
    names = ["m-1.x", "m-2.x", "m-3.x", "m-4.x", "m-3.json", "m-9.x/below"]
    store = FakeStore({name: pattern(12 * MIB, number) for number, name in enumerate(names)})
    async with view_in(tmp_path, window_bytes_max=8 * MIB) as view:
        attachment = view.attach(store)
        for name in ("m-1.x", "m-2.x"):
            assert fetched(store, "m-3.x") == set()
            file = opened(view, attachment, name)
            await walk(view, file, 0, 12 * MIB)
            view.vfs.release(file)
            await settled(view)
        assert fetched(store, "m-3.x") == set(range(8))  # as much as a window
        assert fetched(store, "m-4.x") == fetched(store, "m-3.json") == set()
        file = opened(view, attachment, "m-3.x")
        await walk(view, file, 0, 12 * MIB)
        file = opened(view, attachment, "m-4.x")
        await walk(view, file, 0, 12 * MIB)  # the last one, because a directory follows
        await settled(view)
        assert fetched(store, "m-9.x/below") == fetched(store, "m-3.json") == set()
