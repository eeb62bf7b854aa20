"""Loading one tensor costs little more than its bytes, in each format that says where they are."""

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Node
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from support.archives import write_checkpoint, write_torch_zip
from support.s3server import S3Server

import ckptfs

pytestmark = pytest.mark.mount

MIB = 1 << 20


@pytest.fixture
def shard(bucket: Path) -> Path:
    """A shard with large, medium and tiny tensors, 130 MiB in all."""
    chance = np.random.default_rng(7)
    sizes = {"a.large": 40, "b.large": 48, "c.medium": 5, "d.large": 32, "e.medium": 4}
    tensors = {n: chance.random(mib * MIB // 4, dtype=np.float32) for n, mib in sizes.items()}
    tensors |= {f"{n}.norm": chance.random(1000, dtype=np.float32) for n in sizes}
    (bucket / "model").mkdir()
    file = bucket / "model" / "model.safetensors"
    save_file(tensors, file)
    return file


def needed_bytes(file: Path, tensor: str) -> int:
    """The bytes of header and tensor, which every reader needs."""
    with file.open("rb") as raw:
        header = int.from_bytes(raw.read(8), "little")
        start, stop = json.loads(raw.read(header))[tensor]["data_offsets"]
    return 8 + header + stop - start


@pytest.mark.parametrize("tensor", ["a.large", "b.large", "c.medium", "d.large", "e.medium.norm"])
def test_one_tensor_fetches_little_more_than_its_bytes(
    module_node: Node, s3: S3Server, shard: Path, uri_of: Callable[[Path], str], tensor: str
) -> None:
    with safe_open(shard, framework="np") as original:
        expected = original.get_tensor(tensor)
    with ckptfs.Checkpoint(uri_of(shard.parent)).as_directory() as path:
        s3.reset_traffic()
        with safe_open(f"{path}/model.safetensors", framework="np") as file:
            assert np.array_equal(file.get_tensor(tensor), expected)
        # The readahead may still be on its way, and its bytes count, too.
        module_node.wait_quiet()
        fetched = s3.traffic().bytes_to_client
    # A block each for the header, both edges and the kernel's own readahead behind the tensor; for
    # a large one that is less than a tenth. The rest: heads of the answers.
    needed = needed_bytes(shard, tensor)
    extra = 2 * MIB if needed >= 32 * MIB else 4 * MIB
    assert fetched <= 1.1 * needed + extra + 100_000


def test_a_whole_shard_is_fetched_once(
    module_node: Node, s3: S3Server, shard: Path, uri_of: Callable[[Path], str]
) -> None:
    expected = load_file(shard)
    with ckptfs.Checkpoint(uri_of(shard.parent)).as_directory() as path:
        s3.reset_traffic()
        loaded = load_file(f"{path}/model.safetensors")
        assert loaded.keys() == expected.keys()
        assert all(np.array_equal(loaded[name], expected[name]) for name in expected)
        module_node.wait_quiet()
        fetched = s3.traffic().bytes_to_client
    assert fetched <= 1.02 * shard.stat().st_size


BEGUN_BYTES = 6 * MIB
"""Bytes that a test reads of a tensor, which are enough to start the readahead for it."""


def begin_to_read(file: Path, start: int) -> bytes:
    """Read as a loader does: a record's header by itself, and then one piece after the other."""
    with file.open("rb", buffering=0) as raw:
        raw.seek(start)
        pieces = [raw.read(30)]
        while (count := sum(map(len, pieces))) < BEGUN_BYTES:
            pieces.append(raw.read(min(MIB, BEGUN_BYTES - count)))
    return b"".join(pieces)


def test_a_tensor_of_an_archive_is_fetched_and_little_more(
    module_node: Node, s3: S3Server, bucket: Path, uri_of: Callable[[Path], str]
) -> None:
    (bucket / "run").mkdir()
    tensors = [os.urandom(mib * MIB) for mib in (8, 24, 8)]
    places = write_torch_zip(bucket / "run" / "model.pt", tensors)
    with ckptfs.Checkpoint(uri_of(bucket / "run")).as_directory() as path:
        s3.reset_traffic()
        file = Path(path, "model.pt")
        with file.open("rb", buffering=0) as raw:
            assert raw.read(4) == b"PK\x03\x04"
        assert zipfile.is_zipfile(file)  # reads its end
        module_node.wait_quiet()
        assert begin_to_read(file, places[1][0]) == tensors[1][:BEGUN_BYTES]
        module_node.wait_quiet()
        fetched = s3.traffic().bytes_to_client
    assert 24 * MIB <= fetched <= 1.1 * 24 * MIB + 2 * MIB + 100_000


def test_an_item_of_a_sharded_checkpoint_is_fetched_and_little_more(
    module_node: Node, s3: S3Server, bucket: Path, uri_of: Callable[[Path], str]
) -> None:
    items = [os.urandom(16 * MIB - 1000) for _ in range(3)]
    write_checkpoint(bucket / "run", {"__0_0.distcp": items[:1], "__1_0.distcp": items})
    with ckptfs.Checkpoint(uri_of(bucket / "run")).as_directory() as path:
        s3.reset_traffic()
        assert Path(path, ".metadata").read_bytes()
        module_node.wait_quiet()
        read = begin_to_read(Path(path, "__1_0.distcp"), len(items[0]))
        assert read == items[1][:BEGUN_BYTES]
        module_node.wait_quiet()
        fetched = s3.traffic().bytes_to_client
    assert 16 * MIB <= fetched <= 1.1 * 16 * MIB + 2 * MIB + 100_000
