"""Writes of spans to the disk, while their object gets other files."""

from array import array
from collections.abc import Callable
from pathlib import Path

from support.fakes import MIB, InlineOffload, T
from unit.daemon.cache.test_cache import block_of, cache_in, keep, key_of, store

from ckptfs._daemon.cache import block_io, object_dir
from ckptfs._daemon.cache.cached_object import ABSENT, STORED
from ckptfs._daemon.cache.writer import Storing


class Meanwhile(InlineOffload):
    """Calls a function after the first call in a thread, before the event loop goes on."""

    def __init__(self, then: Callable[[], None]) -> None:
        super().__init__()
        self._then: Callable[[], None] | None = then

    async def run(self, kind: str, call: Callable[[], T]) -> T:
        result = await super().run(kind, call)
        if self._then is not None:
            then, self._then = self._then, None
            then()
        return result


async def test_a_block_written_to_files_that_were_retired_is_not_on_the_disk(
    tmp_path: Path,
) -> None:
    """The next daemon finds a block missing in the map of an object that the kernel reads."""
    key = key_of("a", 3 * MIB)
    with cache_in(tmp_path) as cache:
        entry = cache.open(key)
        for index in range(3):
            assert store(cache, entry, index, block_of(entry, index))
        assert cache.begin_passthrough(entry)
        object_dir.write_sums(entry.files, 0, array("Q", [0]))
        entry.passthroughs = 0
    with cache_in(tmp_path) as cache:
        entry = cache.restore_passthrough(key.digest())
        assert entry is not None
        assert list(entry.state) == [ABSENT, STORED, STORED]
        lent = entry.files
        keep(cache, entry, 0, block_of(entry, 0))
        offload = Meanwhile(lambda: cache.loaded(entry, 1, entry.sums[1], good=False))
        await Storing(cache, offload).store(entry, range(1), entry.memory[0])
        assert entry.files is not lent
        assert entry.state[0] == ABSENT
        assert not entry.verified
        content = b"".join(block_of(entry, index) for index in range(3))
        assert block_io.disk_ops.read(lent.data, 3 * MIB, 0) == content  # the kernel still reads it
