"""The course of a broadcast: which node reads which part of a checkpoint, and which nodes get it.

The checkpoint is cut into *chunks*. One node *gives* a chunk: it reads the chunk from its cache or
from the store, and puts it into Ray's object store. The other nodes *take* it. A node that has the
chunk gives it. If no node has it, the node with the least to do reads it from the store for all of
them. A slow node reads less, because a node gets its next chunk when it has finished one. If all
nodes with a chunk are busy, other chunks go first.

**Window.** The chunks under way have at most `window_bytes` together, because one node's object
store has to hold them. A chunk is under way from its `next_give` until no node waits for it.

**Failures.** If a node could not give or take a chunk, the chunk is given again, by another node if
possible, and `TRIES` times at most. A lost node gives and takes no more, and a full node takes no
more. If all others wait for one node, it is set aside: the others go on without it, and it gets the
chunks that it lacks when they have everything. Each node reads the rest (`left`) from the store
when a program needs it.

**Sources** only give chunks that they have. They take none, and read none from the store.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import MappingProxyType

from ckptfs._model.blocks import BLOCK_BYTES, block_count, blocks_length
from ckptfs._model.protocol.requests import PIECE_BLOCKS_MAX

TRIES = 3
"""Maximum number of times that a chunk is given."""
_PIECES_MAX = 256
"""Maximum number of pieces in a chunk of small files. Each is a message to the daemon."""


@dataclass(frozen=True)
class Piece:
    """Consecutive blocks of one file: `length` bytes from block `first` on."""

    path: str
    first: int
    count: int
    length: int


Chunk = tuple[Piece, ...]

Runs = Sequence[tuple[int, int]]
"""Consecutive blocks of a file that a node has: the first block and their number, ascending."""


def chunks_of(
    files: Sequence[tuple[str, int]],
    chunk_bytes: int,
    nodes: Mapping[str, Mapping[str, Runs]] = MappingProxyType({}),
) -> tuple[list[Chunk], dict[str, set[int]]]:
    """Cut files into chunks of at most `chunk_bytes`, a whole number of blocks.

    All blocks of a chunk are on the same nodes, or on none, so a chunk that a node gives from its
    cache needs no byte from the store.

    Args:
        files: The path and the size of each.
        chunk_bytes: Maximum size of a chunk.
        nodes: For each node, the blocks that it has of each file.

    Returns:
        The chunks, in about the order of the files, and for each node the positions of those that
        it has.
    """
    blocks_max = min(PIECE_BLOCKS_MAX, chunk_bytes // BLOCK_BYTES)
    begun: dict[frozenset[str], list[Piece]] = {}
    begun_bytes: Counter[frozenset[str]] = Counter()
    found: list[tuple[Chunk, frozenset[str]]] = []
    for path, size in files:
        for blocks, owners in _owned(path, block_count(size), nodes):
            for first in range(blocks.start, blocks.stop, blocks_max):
                part = range(first, min(first + blocks_max, blocks.stop))
                piece = Piece(path, first, len(part), blocks_length(part, size))
                pieces = begun.setdefault(owners, [])
                begun_bytes[owners] += piece.length
                if begun_bytes[owners] > chunk_bytes or len(pieces) == _PIECES_MAX:
                    found.append((tuple(pieces), owners))
                    pieces = begun[owners] = []
                    begun_bytes[owners] = piece.length
                pieces.append(piece)
    found += [(tuple(pieces), owners) for owners, pieces in begun.items()]
    has = {name: {i for i, (_, owners) in enumerate(found) if name in owners} for name in nodes}
    return [chunk for chunk, _ in found], has


def _owned(
    path: str, count: int, nodes: Mapping[str, Mapping[str, Runs]]
) -> Iterator[tuple[range, frozenset[str]]]:
    """Cut a file of `count` blocks where other nodes have the blocks: the parts, and their
    nodes."""
    runs = {name: list(files[path]) for name, files in nodes.items() if files.get(path)}
    cuts = {0, count}
    for each in runs.values():
        cuts.update(edge for first, length in each for edge in (first, first + length))
    edges = sorted(cut for cut in cuts if cut <= count)
    for begin, end in pairwise(edges):
        owners = frozenset(name for name, each in runs.items() if _contains(each, begin))
        yield range(begin, end), owners


def _contains(runs: Runs, block: int) -> bool:
    at = bisect_right(runs, block, key=lambda run: run[0]) - 1
    return at >= 0 and block < runs[at][0] + runs[at][1]


def length_of(chunk: Chunk) -> int:
    """The size of a chunk in bytes."""
    return sum(piece.length for piece in chunk)


@dataclass
class _Node:
    """A node, with the chunks that it has, and those that it gives and takes now."""

    is_source: bool = False
    has: set[int] = field(default_factory=set[int])
    giving: set[int] = field(default_factory=set[int])
    taking: set[int] = field(default_factory=set[int])
    failed_gives: int = 0
    is_lost: bool = False
    is_full: bool = False
    is_aside: bool = False

    @property
    def takes(self) -> bool:
        return not (self.is_source or self.is_lost or self.is_full)

    @property
    def gives(self) -> bool:
        return not self.is_lost and self.failed_gives < TRIES


class Course:
    """The state of a broadcast. It does no IO: the caller reports what the nodes have done.

    Args:
        chunks: All chunks.
        nodes: The positions of the chunks that each node has already.
        window_bytes: Maximum size of all chunks under way. A single chunk may be larger.
        gives_max: Maximum number of chunks that a node gives at the same time.
        sources: The nodes that only give what they have.
    """

    def __init__(
        self,
        chunks: Sequence[Chunk],
        nodes: Mapping[str, set[int]],
        window_bytes: int,
        gives_max: int,
        sources: Collection[str] = (),
    ) -> None:
        self._bytes = [length_of(chunk) for chunk in chunks]
        self._nodes = {name: _Node(is_source=name in sources) for name in nodes}
        self._window_bytes = window_bytes
        self._gives_max = gives_max
        self._tries = [0] * len(chunks)
        self._failed_at: dict[int, set[str]] = {}  # nodes that could not give a chunk
        self._queue = list(range(len(chunks)))[::-1]  # the next one last
        self._under_way: dict[int, set[str]] = {}  # by chunk: its takers; none while it is given
        self._under_way_bytes = 0
        self._owners: list[set[str]] = [set() for _ in chunks]  # by chunk: the nodes that have it
        self._bytes_there = 0
        for name, has in nodes.items():
            for chunk in has:
                self._is_there(name, chunk)
        self._dropped: set[int] = set()  # chunks that no node can get

    # -- what is next

    def next_give(self) -> tuple[int, str, bool] | None:
        """Begin a chunk: its position, its giver, and whether other nodes will take it. None if no
        chunk can begin now."""
        while self._queue or self._bring_back():
            busy = {n for n, node in self._nodes.items() if len(node.giving) >= self._gives_max}
            able = {n for n, node in self._nodes.items() if node.gives and not node.is_aside}
            if busy and able <= busy:
                return None
            for at in reversed(range(len(self._queue))):
                chunk = self._queue[at]
                if self._owners[chunk] and self._owners[chunk] <= busy:
                    continue
                wanting = self._wanting(chunk)
                if not wanting:
                    del self._queue[at]
                    continue
                length = self._bytes[chunk]
                if self._under_way and self._under_way_bytes + length > self._window_bytes:
                    return None
                givers = self._could_give(chunk, able)
                if not givers:
                    self._dropped.add(chunk)
                    del self._queue[at]
                    continue
                giver = min(givers, key=lambda name: len(self._nodes[name].giving))
                if giver in busy:
                    continue
                del self._queue[at]
                self._tries[chunk] += 1
                self._under_way[chunk] = set()
                self._under_way_bytes += length
                self._nodes[giver].giving.add(chunk)
                return chunk, giver, wanting != [giver]
            if self._queue:
                return None  # the nodes that could give are busy
        return None

    def _wanting(self, chunk: int) -> list[str]:
        return [
            name
            for name, node in self._nodes.items()
            if node.takes and not node.is_aside and chunk not in node.has
        ]

    def _could_give(self, chunk: int, able: set[str]) -> list[str]:
        fresh = able - self._failed_at.get(chunk, set())
        # A node that takes no chunks would read this one, but not keep it in its cache.
        having = fresh & self._owners[chunk]
        could = having or {n for n in fresh if self._nodes[n].takes}
        return [name for name in self._nodes if name in could]  # in an order that can be repeated

    def _bring_back(self) -> bool:
        """When all others are done, continue with the idle nodes among those set aside. Return
        whether there are any."""
        back = [node for node in self._nodes.values() if node.is_aside and not node.taking]
        if self._under_way or not back:
            return False
        for node in back:
            node.is_aside = False
        self._queue = [c for c in range(len(self._bytes)) if c not in self._dropped][::-1]
        return True

    # -- reports of the nodes

    def gave(self, chunk: int, giver: str) -> list[str]:
        """Note that the chunk is in the object store. Return the nodes that must take it."""
        node = self._nodes[giver]
        node.giving.discard(chunk)
        self._is_there(giver, chunk)
        takers = self._wanting(chunk) if chunk in self._under_way else []
        if not takers:
            self._over(chunk)
            return []
        self._under_way[chunk] = set(takers)
        for name in takers:
            self._nodes[name].taking.add(chunk)
        return takers

    def gave_not(self, chunk: int, giver: str, *, for_good: bool = False) -> None:
        """Note that the node could not give the chunk. `for_good`: no other node can, either."""
        node = self._nodes[giver]
        node.giving.discard(chunk)
        self._failed_at.setdefault(chunk, set()).add(giver)
        self._is_not_there(giver, chunk)  # although it may have said so
        if for_good:
            self._dropped.add(chunk)
        else:
            node.failed_gives += 1
        self._over(chunk)

    def took(self, chunk: int, name: str, *, whole: bool) -> None:
        """Note that the node has taken the chunk, or could not if not `whole`."""
        node = self._nodes[name]
        node.taking.discard(chunk)
        if whole:
            self._is_there(name, chunk)
        self._wait_no_more(chunk, name)

    def lost(self, name: str) -> None:
        """Note that the node has gone."""
        node = self._nodes[name]
        node.is_lost = True
        while node.giving:
            self._over(node.giving.pop())
        while node.taking:
            self._wait_no_more(node.taking.pop(), name)

    def full(self, name: str) -> None:
        """Note that the node's cache is full."""
        self._nodes[name].is_full = True

    def set_aside(self, names: Sequence[str]) -> None:
        """Let the others go on without these nodes, which are slow to take."""
        for name in names:
            self._nodes[name].is_aside = True
            for chunk in self._nodes[name].taking:
                self._wait_no_more(chunk, name)

    def _is_there(self, name: str, chunk: int) -> None:
        if name not in self._owners[chunk]:
            self._owners[chunk].add(name)
            self._nodes[name].has.add(chunk)
            self._count(name, self._bytes[chunk])

    def _is_not_there(self, name: str, chunk: int) -> None:
        if name in self._owners[chunk]:
            self._owners[chunk].discard(name)
            self._nodes[name].has.discard(chunk)
            self._count(name, -self._bytes[chunk])

    def _count(self, name: str, new_bytes: int) -> None:
        if not self._nodes[name].is_source:
            self._bytes_there += new_bytes

    def _wait_no_more(self, chunk: int, name: str) -> None:
        takers = self._under_way.get(chunk, set())
        if takers == {name}:
            self._over(chunk)
        takers.discard(name)

    def _over(self, chunk: int) -> None:
        if self._under_way.pop(chunk, None) is None:
            return
        self._under_way_bytes -= self._bytes[chunk]
        if chunk in self._dropped or not self._wanting(chunk):
            return
        if self._tries[chunk] < TRIES:
            self._queue.insert(0, chunk)
        else:
            self._dropped.add(chunk)

    # -- the state

    @property
    def is_done(self) -> bool:
        """Whether the broadcast has ended, once `next_give` returns None."""
        waits = any(node.giving or node.taking for node in self._nodes.values() if not node.is_lost)
        return not (self._queue or self._under_way or waits)

    def is_under_way(self, chunk: int) -> bool:
        """Whether a node still needs the chunk's object."""
        return chunk in self._under_way

    def laggards(self) -> list[str]:
        """The nodes for which all chunks under way wait, while others want the next chunk."""
        if not self._queue or not self._under_way or not all(self._under_way.values()):
            return []
        behind = set[str]().union(*self._under_way.values())
        return sorted(behind) if set(self._wanting(self._queue[-1])) - behind else []

    def bytes_there(self) -> tuple[int, int]:
        """The bytes that the nodes have, and those that they will have in the end, without
        sources."""
        takers = sum(not node.is_source for node in self._nodes.values())
        return self._bytes_there, sum(self._bytes) * takers

    def left(self, name: str) -> int:
        """The bytes that a node lacks."""
        return sum(self._bytes) - sum(self._bytes[c] for c in self._nodes[name].has)
