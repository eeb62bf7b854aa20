"""Each kind of store: what is attached is what is there, byte for byte, and no more is fetched."""

import errno
import hashlib
import os
import random
import unicodedata
from pathlib import Path

import pytest
from conftest import Node
from support.stores.common import MIB, configure, data_requests, directory, fill
from support.stores.realstore import RealStore

import ckptfs

pytestmark = pytest.mark.mount

SIZES = (0, 1, 4095, 4096, 4097, MIB - 1, MIB, MIB + 1, 3 * MIB, 8 * MIB + 3)
NAMES = (
    "a space",
    "a#b",
    "%41",
    "100%",
    "a+b",
    "[x]",
    "(1)",
    "a&b=c;d",
    "q?r",
    "it's",
    'say "x"',
    "<x>",
    "back\\slash",
    "~tilde",
    "com,ma:colon@at",
    "step=100/loss=0.5",
    ".hidden",
    "deep/er/and/deeper/x",
    unicodedata.normalize("NFC", "é"),
    unicodedata.normalize("NFD", "ö"),
    "日本語/モデル",
    "\N{GRINNING FACE}",
    "n" * 200,
    "tab\tin it",
)


def odd_tree(store: RealStore) -> dict[str, bytes]:
    """Files of odd sizes, and small ones of odd names."""
    random_bytes = random.Random(1).randbytes
    files = {f"sizes/{size}": random_bytes(size) for size in SIZES}
    names = [
        name
        for name in NAMES
        if not set(name) & set(store.lacks) and not (store.hides_dots and name.startswith("."))
    ]
    return files | {f"names/{name}": name.encode() for name in names}


def all_files(top: str) -> dict[str, int]:
    """Paths and sizes of what is below a directory."""
    return {
        str(path.relative_to(top)): path.stat().st_size
        for path in Path(top).rglob("*")
        if path.is_file()
    }


MAPPING = """
import hashlib, mmap, os, sys
for line in sys.stdin.buffer.read().split(b"\\0"):
    with open(line, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        print(hashlib.sha256(mapped).hexdigest())
"""


def read_mapped(node: Node, files: list[str]) -> list[str]:
    """The hashes of files that another process maps: an error of a page would end this one."""
    with node.python(MAPPING) as process:
        return process.communicate("\0".join(files))[0].split()


def test_every_byte_of_odd_sizes_and_names(store: RealStore, node: Node, path: str) -> None:
    files = odd_tree(store)
    fill(store, path, files)
    with directory(store, path) as top:
        assert all_files(top) == {name: len(data) for name, data in files.items()}
        # Some are mapped first, others read.
        mapped = [name for name, data in files.items() if len(data) % 2]
        assert read_mapped(node, [f"{top}/{name}" for name in mapped]) == [
            hashlib.sha256(files[name]).hexdigest() for name in mapped
        ]
        for name, data in files.items():
            file = f"{top}/{name}"
            assert Path(file).read_bytes() == data, name
            fd = os.open(file, os.O_RDONLY)
            try:
                for offset in (0, 1, len(data) // 2, max(0, len(data) - 5), len(data) + 1):
                    assert os.pread(fd, 4099, offset) == data[offset : offset + 4099], name
            finally:
                os.close(fd)


def test_a_copy_has_every_byte(store: RealStore, node: Node, path: str, tmp_path: Path) -> None:
    files = odd_tree(store)
    fill(store, path, files)
    copied = store.checkpoint(path).to_directory(tmp_path / "copy")
    assert all_files(str(copied)) == {name: len(data) for name, data in files.items()}
    for name, data in files.items():
        assert Path(copied, name).read_bytes() == data, name


def test_missing_checkpoint_on_real_store_is_an_error(
    store: RealStore, node: Node, path: str
) -> None:
    with pytest.raises(ckptfs.CheckpointNotFound):
        store.checkpoint(path).to_directory()
    if store.has_mount:
        with pytest.raises(ckptfs.CheckpointNotFound), directory(store, path):
            pass
    if store.has_address:
        said = node.here("attach", store.address(path), check=False)
        assert said.returncode == 1
        assert path.rpartition("/")[2] in said.stderr
        assert "does not exist" in said.stderr


def test_a_file_is_no_checkpoint(store: RealStore, node: Node, path: str) -> None:
    store.put(f"{path}/file", b"x")
    with pytest.raises(ckptfs.CheckpointIsFile):
        store.checkpoint(f"{path}/file").to_directory()
    if store.has_mount:
        with pytest.raises(ckptfs.CheckpointIsFile), directory(store, f"{path}/file"):
            pass


def test_little_more_is_fetched_than_is_read(store: RealStore, node: Node, path: str) -> None:
    if store.proxy is None:
        pytest.skip("no network is between")
    data = random.Random(2).randbytes(MIB) * 64
    store.put(f"{path}/large", data)
    store.put(f"{path}/config.json", b"{}")
    store.reset_traffic()
    with directory(store, path) as top:
        assert all_files(top) == {"large": len(data), "config.json": 2}
        assert not data_requests(store)
        fd = os.open(f"{top}/large", os.O_RDONLY)
        try:
            assert os.pread(fd, 4 * MIB, 32 * MIB) == data[: 4 * MIB]
        finally:
            os.close(fd)
        node.wait_quiet()
        fetched = data_requests(store)
        assert sum(each["body_bytes"] for each in fetched) <= 12 * MIB
        assert len(fetched) <= 12
        store.reset_traffic()
        assert Path(f"{top}/config.json").read_bytes() == b"{}"
        node.wait_quiet()
        assert len(store.traffic()) <= store.small_file_requests


def test_requests_of_a_whole_file(store: RealStore, node: Node, path: str) -> None:
    """At most one request for each MiB, and two at the beginning."""
    if store.proxy is None:
        pytest.skip("no network is between")
    data = random.Random(3).randbytes(MIB) * 32
    store.put(f"{path}/large", data)
    store.age(f"{path}/large")
    store.reset_traffic()
    with directory(store, path) as top:
        store.reset_traffic()
        assert Path(f"{top}/large").read_bytes() == data
        requests = store.traffic()
        assert sum(each["body_bytes"] for each in requests) < 1.05 * len(data)
        assert len(requests) <= 34, [each["target"] for each in requests]


def test_the_second_attachment_comes_from_the_cache(
    store: RealStore, node: Node, path: str
) -> None:
    if store.proxy is None:
        pytest.skip("no network is between")
    files = {"a": os.urandom(5 * MIB + 1), "b": os.urandom(1000)}
    fill(store, path, files)
    for _ in range(2):
        store.reset_traffic()
        with directory(store, path) as top:
            for name, data in files.items():
                assert Path(top, name).read_bytes() == data
            node.wait_quiet()
    assert not data_requests(store)


def test_a_file_that_is_overwritten_or_deleted_is_stale(
    store: RealStore, node: Node, path: str
) -> None:
    """A file that was not read before is ESTALE, and the next attachment shows what is there."""
    if not store.has_mount:
        pytest.skip("a copy does not change")
    node.expected_in_log += ["changed at the store", "written", "deleted"]
    configure(node, store, window_bytes_max=0)
    node.here("reload")
    old, new = (random.Random(seed).randbytes(12 * MIB) for seed in (4, 5))
    fill(store, path, {"a": old, "b": old, "c": b"unchanged"})
    with directory(store, path) as top:
        opened = [os.open(f"{top}/{name}", os.O_RDONLY) for name in "ab"]
        try:
            for fd in opened:
                assert os.pread(fd, 100, 0) == old[:100]
            node.wait_quiet()
            store.put(f"{path}/a", new[:-1])  # of another size, for servers that know no more
            store.delete(f"{path}/b")
            for fd in opened:
                with pytest.raises(OSError, check=lambda error: error.errno == errno.ESTALE):
                    os.pread(fd, MIB, 10 * MIB)
        finally:
            for fd in opened:
                os.close(fd)
        assert os.getxattr(top, "user.ckptfs.state") == b"changed"
        assert Path(top, "c").read_bytes() == b"unchanged"
    with directory(store, path) as top:
        assert all_files(top) == {"a": len(new) - 1, "c": 9}
        assert Path(top, "a").read_bytes() == new[:-1]
