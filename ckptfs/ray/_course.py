"""The course of a broadcast: which node reads which part of a checkpoint, and who gets it. No IO.

The checkpoint is cut into *chunks*. One node *gives* a chunk: it reads it, from its cache or from
the store, and puts it into Ray's object store; the others *take* it. A chunk is given by a node
that has it, if there is one; else by the node that has the least to do, which so reads it from the
store for all of them. Since a node gets its next chunk when one is done, a slow one reads less.

**Window.** Chunks that are under way have at most `window_bytes` together: that is what one node's
object store has to hold. A chunk is under way from its `next_give` until nobody waits for it.

**What goes wrong.** A chunk that could not be given, or was not taken by everybody, comes again,
`TRIES` times in all, by another node if there is one. A node that is lost gives and takes no more;
one that is full takes no more. One that lets all the others wait is set aside: they go on without
it, and what it lacks is done when they have everything. What is left in the end (`left`), each
node reads from the store when it is needed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ckptfs._model.blocks import BLOCK_BYTES, block_count, blocks_length
from ckptfs._model.requests import PIECE_BLOCKS_MAX

TRIES = 3
"""How often a chunk is given, at most."""
_PIECES_MAX = 256
"""Most pieces of a chunk: of small files, each is a message to the daemon."""


@dataclass(frozen=True)
class Piece:
    """Consecutive blocks of one file: `length` bytes from block `first` on."""

    path: str
    first: int
    count: int
    length: int


Chunk = tuple[Piece, ...]


def chunks_of(files: Sequence[tuple[str, int]], chunk_bytes: int) -> list[Chunk]:
    """Cut files (path and size) into chunks of at most `chunk_bytes`, a whole number of blocks."""
    blocks_max = min(PIECE_BLOCKS_MAX, chunk_bytes // BLOCK_BYTES)
    chunks: list[Chunk] = []
    pending: list[Piece] = []
    pending_bytes = 0
    for path, size in files:
        for first in range(0, block_count(size), blocks_max):
            blocks = range(first, min(first + blocks_max, block_count(size)))
            piece = Piece(path, first, len(blocks), blocks_length(blocks, size))
            if pending_bytes + piece.length > chunk_bytes or len(pending) == _PIECES_MAX:
                chunks.append(tuple(pending))
                pending, pending_bytes = [], 0
            pending.append(piece)
            pending_bytes += piece.length
    if pending:
        chunks.append(tuple(pending))
    return chunks


@dataclass
class _Node:
    """`has`: its chunks; `giving`, `taking`: those it gives and takes now."""

    has: set[int]
    giving: set[int] = field(default_factory=set[int])
    taking: set[int] = field(default_factory=set[int])
    failed_gives: int = 0
    is_lost: bool = False
    is_full: bool = False
    is_aside: bool = False

    @property
    def takes(self) -> bool:
        return not (self.is_lost or self.is_full)

    @property
    def gives(self) -> bool:
        return not self.is_lost and self.failed_gives < TRIES


class Course:
    """Where a broadcast is.

    Args:
        chunks: All of them.
        nodes: Who takes part, and which chunks (positions) each has already.
        window_bytes: Most bytes of the chunks under way; one may always be.
        gives_max: How many chunks a node gives at the same time.
    """

    def __init__(
        self,
        chunks: Sequence[Chunk],
        nodes: Mapping[str, set[int]],
        window_bytes: int,
        gives_max: int,
    ) -> None:
        self._bytes = [sum(piece.length for piece in chunk) for chunk in chunks]
        self._nodes = {name: _Node(set(has)) for name, has in nodes.items()}
        self._window_bytes = window_bytes
        self._gives_max = gives_max
        self._tries = [0] * len(chunks)
        self._failed_at: dict[int, set[str]] = {}  # nodes that could not give a chunk
        self._queue = list(range(len(chunks)))[::-1]  # the next one last
        self._under_way: dict[int, set[str]] = {}  # by chunk: who is to take it; empty: being given
        self._under_way_bytes = 0
        self._bytes_there = sum(self._bytes[c] for has in nodes.values() for c in has)
        self._dropped: set[int] = set()  # chunks that nobody can have

    # -- what is next

    def next_give(self) -> tuple[int, str, bool] | None:
        """A chunk that is to be given now, by whom, and whether it is to be carried to others; it
        is under way from now on."""
        while self._queue or self._bring_back():
            chunk = self._queue[-1]
            wanting = self._wanting(chunk)
            if not wanting:
                self._queue.pop()
                continue
            length = self._bytes[chunk]
            if self._under_way and self._under_way_bytes + length > self._window_bytes:
                return None
            able = self._could_give(chunk)
            if not able:
                self._dropped.add(self._queue.pop())
                continue
            giver = min(able, key=lambda name: len(self._nodes[name].giving))
            if len(self._nodes[giver].giving) >= self._gives_max:
                return None  # they are all busy
            self._queue.pop()
            self._tries[chunk] += 1
            self._under_way[chunk] = set()
            self._under_way_bytes += length
            self._nodes[giver].giving.add(chunk)
            return chunk, giver, wanting != [giver]
        return None

    def _wanting(self, chunk: int) -> list[str]:
        return [
            name
            for name, node in self._nodes.items()
            if node.takes and not node.is_aside and chunk not in node.has
        ]

    def _could_give(self, chunk: int) -> list[str]:
        failed = self._failed_at.get(chunk, set())
        able = [n for n, node in self._nodes.items() if node.gives and not node.is_aside]
        fresh = [n for n in able if n not in failed]
        having = [n for n in fresh if chunk in self._nodes[n].has]
        # One that is full does not get it into its cache by reading it.
        return having or [n for n in fresh if not self._nodes[n].is_full]

    def _bring_back(self) -> bool:
        """If all the others are done, go on with those that were set aside and are idle by now:
        whether there are any."""
        back = [node for node in self._nodes.values() if node.is_aside and not node.taking]
        if self._under_way or not back:
            return False
        for node in back:
            node.is_aside = False
        self._queue = [c for c in range(len(self._bytes)) if c not in self._dropped][::-1]
        return True

    # -- what has happened

    def gave(self, chunk: int, giver: str) -> list[str]:
        """The chunk is in the object store: who is to take it."""
        node = self._nodes[giver]
        node.giving.discard(chunk)
        self._is_there(node, chunk)
        takers = self._wanting(chunk) if chunk in self._under_way else []
        if not takers:
            self._over(chunk)
        else:
            self._under_way[chunk] = set(takers)
        for name in takers:
            self._nodes[name].taking.add(chunk)
        return takers

    def gave_not(self, chunk: int, giver: str, *, for_good: bool = False) -> None:
        """It could not be given; `for_good`: nobody can."""
        node = self._nodes[giver]
        node.giving.discard(chunk)
        if not for_good:
            node.failed_gives += 1
        self._failed_at.setdefault(chunk, set()).add(giver)
        if for_good:
            self._dropped.add(chunk)
        self._over(chunk)

    def took(self, chunk: int, name: str, *, whole: bool) -> None:
        """That node has taken the chunk, or not."""
        node = self._nodes[name]
        node.taking.discard(chunk)
        if whole:
            self._is_there(node, chunk)
        self._wait_no_more(chunk, name)

    def lost(self, name: str) -> None:
        """That node is gone."""
        node = self._nodes[name]
        node.is_lost = True
        for chunk in list(node.giving):
            node.giving.discard(chunk)
            self._over(chunk)
        for chunk in list(node.taking):
            node.taking.discard(chunk)
            self._wait_no_more(chunk, name)

    def full(self, name: str) -> None:
        """That node's cache can hold no more."""
        self._nodes[name].is_full = True

    def set_aside(self, names: Sequence[str]) -> None:
        """Let the others go on without these, which are slow to take."""
        for name in names:
            self._nodes[name].is_aside = True
            for chunk in list(self._nodes[name].taking):
                self._wait_no_more(chunk, name)

    def _is_there(self, node: _Node, chunk: int) -> None:
        if chunk not in node.has:
            node.has.add(chunk)
            self._bytes_there += self._bytes[chunk]

    def _wait_no_more(self, chunk: int, name: str) -> None:
        takers = self._under_way.get(chunk)
        if takers is not None and name in takers:
            takers.discard(name)
            if not takers:
                self._over(chunk)

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

    # -- how it stands

    @property
    def is_done(self) -> bool:
        """Whether there is nothing more to do, once `next_give` has nothing."""
        waits = any(node.giving or node.taking for node in self._nodes.values() if not node.is_lost)
        return not (self._queue or self._under_way or waits)

    def is_under_way(self, chunk: int) -> bool:
        """Whether somebody still needs the chunk's object."""
        return chunk in self._under_way

    def laggards(self) -> list[str]:
        """For whom alone all that is under way waits, while others want the next chunk."""
        if not self._queue or not self._under_way or not all(self._under_way.values()):
            return []
        behind = set[str]().union(*self._under_way.values())
        return sorted(behind) if set(self._wanting(self._queue[-1])) - behind else []

    def waiting(self) -> list[str]:
        """Nodes that give or take something now."""
        return [n for n, node in self._nodes.items() if node.giving or node.taking]

    def bytes_there(self) -> tuple[int, int]:
        """Bytes that the nodes have, and of all that they are to have."""
        return self._bytes_there, sum(self._bytes) * len(self._nodes)

    def left(self, name: str) -> int:
        """Bytes that a node lacks."""
        return sum(self._bytes) - sum(self._bytes[c] for c in self._nodes[name].has)
