"""Each kind of store: objects are overwritten in the middle of reads, and no read is of two
versions."""

import errno
import os
import random
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from conftest import Node
from support.stores.common import MIB, configure, directory
from support.stores.realstore import RealStore

pytestmark = pytest.mark.mount

SIZE = 3 * MIB
PIECE = 128 << 10
OVERWRITES, LONG = 40, 1000


def version(number: int) -> bytes:
    """The same size each, and each 8 bytes say which version they are of, and where."""
    words = np.empty((SIZE // 8, 2), "<u4")
    words[:, 0], words[:, 1] = number, np.arange(SIZE // 8)
    return words.tobytes()


def versions_in(data: bytes, offset: int) -> set[int]:
    """The versions that bytes are of; they have to be of the right place, too."""
    words = np.frombuffer(data, "<u4").reshape(-1, 2)
    assert np.array_equal(words[:, 1], np.arange(offset // 8, (offset + len(data)) // 8))
    return {int(number) for number in np.unique(words[:, 0])}


def pieces(seed: int) -> Iterator[int]:
    """Offsets of a whole file, in an order by chance."""
    order = list(range(0, SIZE, PIECE))
    random.Random(seed).shuffle(order)
    yield from order


def read_all(top: str, seed: int, found: dict[int, set[int]], begun: threading.Event) -> None:
    """Read a file in pieces, until one of them is ESTALE; note the versions that were seen, and -1
    for any other error."""
    fd = os.open(f"{top}/weights", os.O_RDONLY)
    try:
        for offset in pieces(seed):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
            data = os.pread(fd, PIECE, offset)
            assert len(data) == PIECE
            found.setdefault(seed, set()).update(versions_in(data, offset))
            begun.set()
    except OSError as error:
        found.setdefault(seed, set()).update({-1} if error.errno != errno.ESTALE else set())
    finally:
        begun.set()
        os.close(fd)


def test_no_read_is_of_two_versions(
    store: RealStore, node: Node, path: str, request: pytest.FixtureRequest
) -> None:
    """Several overwrites for each attachment, so most are within a second of another.

    All that is read through one attachment is of one version, or ESTALE.
    """
    if not store.has_mount:
        pytest.skip("it is copied")
    if not store.has_versions:
        pytest.skip("the server does not tell such versions apart")
    node.expected_in_log += ["changed at the store", "weights"]
    configure(node, store, window_bytes_max=MIB)
    node.here("reload")
    count = LONG if request.config.getoption("long") else OVERWRITES
    rng = random.Random(10)
    number, whole = 0, 0
    store.put(f"{path}/weights", version(number))
    while number < count:
        found: dict[int, set[int]] = {}
        with directory(store, path) as top:
            begun = threading.Event()
            readers = [
                threading.Thread(target=read_all, args=(top, seed, found, begun))
                for seed in (rng.randrange(1 << 30), rng.randrange(1 << 30))
            ]
            for reader in readers:
                reader.start()
            begun.wait()
            for _ in range(rng.choice((1, 1, 2, 5))):
                number += 1
                store.put(f"{path}/weights", version(number))
            for reader in readers:
                reader.join()
        seen = set[int]().union(*found.values())
        assert -1 not in seen
        assert len(seen) <= 1, f"versions {sorted(seen)} in one attachment; the last is {number}"
        whole += bool(seen)
    assert whole
