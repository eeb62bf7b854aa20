"""Loading one tensor of a safetensors file costs little more than its bytes."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Node
from s3server import S3Server
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

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
    """Header and tensor: nobody can do with less."""
    with file.open("rb") as raw:
        header = int.from_bytes(raw.read(8), "little")
        start, stop = json.loads(raw.read(header))[tensor]["data_offsets"]
    return 8 + header + stop - start


@pytest.mark.parametrize("tensor", ["a.large", "b.large", "c.medium", "d.large", "e.medium.norm"])
def test_one_tensor_fetches_little_more_than_its_bytes(
    node: Node, s3: S3Server, shard: Path, uri_of: Callable[[Path], str], tensor: str
) -> None:
    with safe_open(shard, framework="np") as original:
        expected = original.get_tensor(tensor)
    with ckptfs.Checkpoint(uri_of(shard.parent)).as_directory() as path:
        s3.reset_traffic()
        with safe_open(f"{path}/model.safetensors", framework="np") as file:
            assert np.array_equal(file.get_tensor(tensor), expected)
        # What was asked for ahead may still be on its way: it counts, too.
        node.wait_quiet()
        fetched = s3.traffic().bytes_to_client
    # A block each for the header, both edges and the kernel's own readahead behind the tensor; for
    # a large one that is less than a tenth. The rest: heads of the answers.
    needed = needed_bytes(shard, tensor)
    extra = 2 * MIB if needed >= 32 * MIB else 4 * MIB
    assert fetched <= 1.1 * needed + extra + 100_000


def test_a_whole_shard_is_fetched_once(
    node: Node, s3: S3Server, shard: Path, uri_of: Callable[[Path], str]
) -> None:
    expected = load_file(shard)
    with ckptfs.Checkpoint(uri_of(shard.parent)).as_directory() as path:
        s3.reset_traffic()
        loaded = load_file(f"{path}/model.safetensors")
        assert loaded.keys() == expected.keys()
        assert all(np.array_equal(loaded[name], expected[name]) for name in expected)
        node.wait_quiet()
        fetched = s3.traffic().bytes_to_client
    assert fetched <= 1.02 * shard.stat().st_size
