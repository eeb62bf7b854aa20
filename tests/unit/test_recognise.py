"""What a file's parts are is learned beside its reader, from little, and steers what is fetched."""

import io
import math
from pathlib import Path

import numpy as np
import pytest
import trio
from archives import pickle_metadata, write_torch_zip
from safetensors.numpy import save
from trio.testing import MockClock
from unit.fakes import MIB, FakeStore, InlineOffload, pattern
from unit.rig import View, read_of, rig_in, view_in
from unit.test_service import PLACE, Bench

from ckptfs._daemon import recognise
from ckptfs._daemon.attachment import Attachment
from ckptfs._model.blocks import blocks_of
from ckptfs._model.dcp import BYTES_MAX
from ckptfs.errors import AccessDenied

TENSOR_BYTES = 12 * MIB
TENSORS = [pattern(TENSOR_BYTES, seed) for seed in range(3)]
ITEM = pattern(12 * MIB)


def torch_zip() -> "tuple[bytes, list[tuple[int, int]]]":
    """An archive, and where its tensors are."""
    file = io.BytesIO()
    places = write_torch_zip(file, TENSORS)
    return file.getvalue(), places


def archives(count: int) -> bytes:
    """A file as torch.distributed.checkpoint writes them: each item is an archive."""
    file = io.BytesIO()
    write_torch_zip(file, [ITEM])
    return file.getvalue() * count


async def settled(view: View) -> None:
    """Return when nothing is being fetched or learned any more."""
    with trio.fail_after(30):
        while any(a.background for a in view.attachments):  # noqa: ASYNC110 - threads end it
            await trio.sleep(0.002)
    await view.quiet()


async def walk(view: View, inode: int, start: int, length: int) -> None:
    """Read as the kernel does, in pieces of 128 KiB."""
    for offset in range(start, start + length, 128 << 10):
        await view.read(inode, offset, min(128 << 10, start + length - offset))


def fetched(store: FakeStore, path: str) -> set[int]:
    """The blocks of a file that the store was asked for, each once."""
    blocks = [i for c in store.reads(path) for i in blocks_of(c.offset, c.length)]
    assert len(blocks) == len(set(blocks))
    return set(blocks)


def opened(view: View, attachment: Attachment, path: str) -> int:
    return view.vfs.open(view.stat(attachment, path).inode)


# -- zip archives


async def test_of_an_archive_the_end_is_looked_at_and_a_tensor_fetched_whole(
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


async def test_a_header_that_the_kernel_keeps_is_not_lost(tmp_path: Path) -> None:
    raw, places = torch_zip()
    store = FakeStore({"a": raw})
    async with view_in(tmp_path) as view:
        attachment = view.attach(store)
        file = opened(view, attachment, "a")
        await view.read(file, 0, 4)
        view.vfs.release(file)
        await settled(view)
        assert fetched(store, "a") == {0}  # who only looked at it gets no more
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
async def test_an_archive_that_makes_no_sense_is_a_file_like_others(
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


async def test_a_safetensors_header_is_enough(tmp_path: Path) -> None:
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
async def test_an_item_is_fetched_whole_and_only_it(tmp_path: Path, folder: str) -> None:
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
        # The other file, too, and neither its end nor the metadata is looked at for that.
        file = opened(view, attachment, f"{folder}y")
        await walk(view, file, 0, 4 * MIB)
        await settled(view)
        assert fetched(store, f"{folder}y") == set(blocks_of(0, item_bytes))
        assert len(store.reads(f"{folder}.metadata")) == 1


async def test_who_reads_the_metadata_wants_it_understood(tmp_path: Path) -> None:
    store = checkpoint()
    async with view_in(tmp_path) as view:
        attachment = view.attach(store)
        await view.read(opened(view, attachment, ".metadata"), 0, 100)
        await settled(view)
        (layout,) = attachment.layouts.values()
        assert layout is not None
        assert layout.keys() == {b"x", b"y"}


async def test_small_files_are_no_reason_to_look(tmp_path: Path) -> None:
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
async def test_another_metadata_file_costs_a_block_and_hides_nothing(
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


async def test_items_that_make_no_sense_leave_a_file_like_others(tmp_path: Path) -> None:
    store = checkpoint(item_bytes=100 * MIB)
    async with view_in(tmp_path) as view:
        file = opened(view, view.attach(store), "x")
        for offset in (0, 4096, 8192, 20 * MIB, 21 * MIB):
            await view.read(file, offset, 4096)
            await settled(view)
        assert len(fetched(store, "x")) <= 5  # its end, too: it looks like an archive


# -- faults


async def test_what_fails_to_be_learned_harms_nobody(tmp_path: Path) -> None:
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


async def test_an_unexpected_error_is_logged_and_harms_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a mistake")

    monkeypatch.setattr(recognise.dcp, "parts_by_file", fail)
    store = checkpoint()
    async with view_in(tmp_path) as view:
        attachment = view.attach(store)
        file = opened(view, attachment, "x")
        await view.read(file, 0, 4096)
        await settled(view)
        assert "a mistake" in caplog.text
        assert list(attachment.layouts.values()) == [{}]
        await view.read(file, 30 * MIB, 4096)


async def test_what_is_being_learned_ends_with_the_attachment(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with rig_in(tmp_path, InlineOffload(), linger_s=0) as rig:
        bench = Bench(rig)
        bench.stores[PLACE.path] = checkpoint()
        attachment = await bench.attach()
        vfs = bench.service.vfs
        handle = vfs.open(vfs.lookup(attachment.tree.root.inode, b"x").inode)
        bench.offload.latency_s = {"compute": math.inf}
        await read_of(vfs, handle, 0, 4096)
        await trio.sleep(10)
        metadata = attachment.file(next(iter(attachment.layouts)))
        assert attachment.background
        assert metadata.opens == 1
        vfs.release(handle)
        bench.service.let_go(attachment)
        await trio.sleep(10)
        assert bench.shown() == []
        assert not attachment.background
        assert metadata.opens == 0


# -- one file after the other


async def test_who_reads_file_after_file_finds_the_next_one_begun(tmp_path: Path) -> None:
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
        assert fetched(store, "m-3.x") == set(range(8))  # as far as a window
        assert fetched(store, "m-4.x") == fetched(store, "m-3.json") == set()
        file = opened(view, attachment, "m-3.x")
        await walk(view, file, 0, 12 * MIB)
        file = opened(view, attachment, "m-4.x")
        await walk(view, file, 0, 12 * MIB)  # the last one: what comes next is a directory
        await settled(view)
        assert fetched(store, "m-9.x/below") == fetched(store, "m-3.json") == set()
