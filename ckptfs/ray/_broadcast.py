# Ray is not installed where the package is type-checked: its classes are of unknown type.
# pyright: reportMissingImports=false, reportUnknownVariableType=false
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false
# pyright: reportAttributeAccessIssue=false
"""A cluster gets a checkpoint for the price of one download.

`broadcast` has each part of a checkpoint read from the store by one node, and taken to the caches
of the others through Ray's object store; ``_course`` decides who does what, ``_peer`` is a
node's end. What it could not bring, each node reads from the store when it is needed: after a
broadcast a checkpoint is read as ever, through a mount of the node's daemon.

**Versions.** Each node attaches the checkpoint, with its own credentials. The version that most of
them see is the cluster's; a node that sees another one takes no part. The daemons verify each block
against the pinned version of their own attachment (``_daemon.exchange``).
"""

import fnmatch
import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import ray

from ckptfs._model.blocks import BLOCK_BYTES
from ckptfs._store.filesystems import FileSystem
from ckptfs.errors import (
    BY_CODE,
    AccessDenied,
    CheckpointNotFound,
    DaemonError,
    LimitExceeded,
    NoDaemon,
    NotAttached,
    ObjectChanged,
    ProtocolError,
)
from ckptfs.ray._course import Chunk, Course, chunks_of
from ckptfs.ray._nodes import (
    Nodes,
    answer_of,
    as_they_come,
    end,
    join,
    node_ids,
    place_of,
    smallest_object_store,
    start_peers,
)
from ckptfs.ray._peer import Failure, Gave, Joined

log = logging.getLogger(__name__)

_CHUNK_BYTES_MIN = 4 << 20
_CHUNK_BYTES_MAX = 64 << 20
_TURNS = 32
"""A node has so many turns, so that none is idle in the end."""
_CHUNKS_ENOUGH = 256
"""Turns of all nodes together, after which chunks get no smaller. Each is a message to each node,
of which one driver sends some thousand a second: 100 GB in chunks of 4 MiB would take 512 nodes 50
minutes, in chunks of 64 MiB 5 (`scripts/simulate`)."""
_GIVE_BYTES_MAX = 128 << 20
"""Most bytes that a node gives at the same time: what its daemon has in flight at most."""
_GIVES_MAX = 16
"""Most chunks that a node gives at the same time: as many as its daemon has requests."""
_WINDOW_SHARE = 4
"""A quarter of the smallest object store may be used."""
_PATIENCE_S = 10.0
"""How long all may wait for a slow node before they go on without it."""
_PROGRESS_S = 0.25
_HOPELESS = frozenset(
    ["lost", *(e.code for e in (AccessDenied, DaemonError, NoDaemon, NotAttached, ProtocolError))]
)
"""Errors after which there is no point in asking a node for anything else: its actor is gone, or
its daemon is, or it does not exchange blocks with this user or in this version."""


@dataclass(frozen=True)
class NodeReport:
    """One node's part. Bytes; `left`: what it lacks and reads from the store when it is needed.
    `error`: what went wrong there first, or ""; it may have been put right."""

    read: int
    taken: int
    left: int
    error: str = ""


@dataclass(frozen=True)
class BroadcastReport:
    """What a broadcast has done.

    Attributes:
        version: Of the checkpoint, as ``user.ckptfs.version`` has it.
        files, bytes: What was to be brought.
        nodes: By Ray's node id.
        seconds: How long it took.
    """

    version: str
    files: int
    bytes: int
    nodes: Mapping[str, NodeReport]
    seconds: float

    @property
    def is_complete(self) -> bool:
        """Whether every node has everything."""
        return not any(node.left for node in self.nodes.values())


def broadcast(
    checkpoint: Any,
    nodes: Nodes = "all",
    files: Sequence[str] = (),
    *,
    on: Literal["driver", "task"] = "driver",
    progress: bool = True,
    window_bytes: int | None = None,
    timeout_s: float = 120.0,
) -> BroadcastReport:
    """Bring a checkpoint into the caches of many nodes, and read it from the store once.

    Returns when that is done, as far as it can be: a node that cannot take part, dies or falls
    silent, and a file that changes meanwhile, are in the report and the log, and are no error.

    Args:
        checkpoint: A ``ckptfs.Checkpoint``, one of Ray's, or a URI.
        nodes: Who gets it; see `Nodes`. A placement group is waited for.
        files: Globs on relative paths (``*`` also matches ``/``), in the order in which they are
            wanted; empty: everything.
        on: Where the course is decided: in this process, or in a Ray task, which suits a driver
            that is far away. No content comes here in either case.
        progress: Show a bar, where this process has a terminal.
        window_bytes: Most bytes in each node's object store; None: a quarter of the smallest one.
        timeout_s: A node from which nothing came for so long is given up.

    Raises:
        LocationError: It is a local directory, or in a filesystem that only this process has.
        CheckpointNotFound, CheckpointIsFile, AccessDenied, StoreError, DaemonError: No node could
            attach it; the first one's reason.
        ValueError: There are no such nodes.
    """
    filesystem, path = place_of(checkpoint)
    options: dict[str, Any] = {"window_bytes": window_bytes, "timeout_s": timeout_s}
    ids = node_ids(nodes)
    if on == "task":
        remote = ray.remote(num_cpus=0)(_broadcast)
        task = remote.remote(filesystem, path, ids, files, progress=progress, **options)
        return ray.get(task)
    return _broadcast(filesystem, path, ids, files, progress=progress, **options)


def chosen(files: Sequence[tuple[str, int]], globs: Sequence[str]) -> list[tuple[str, int]]:
    """Those that match, in the order of the globs, each once; all where there are none."""
    found: dict[tuple[str, int], None] = {}
    for glob in globs or ["*"]:
        matches = re.compile(fnmatch.translate(glob)).match
        found |= dict.fromkeys(file for file in files if matches(file[0]))
    return list(found)


def _broadcast(
    filesystem: FileSystem,
    path: str,
    ids: Sequence[str],
    globs: Sequence[str],
    *,
    progress: bool,
    window_bytes: int | None,
    timeout_s: float,
) -> BroadcastReport:
    began_s = time.monotonic()
    window_bytes = window_bytes or smallest_object_store(ids) // _WINDOW_SHARE
    with ExitStack() as stack:
        # How large a chunk is good depends on the files, which a node has to say.
        chunk_bytes_max = max(BLOCK_BYTES, min(_CHUNK_BYTES_MAX, window_bytes // _WINDOW_SHARE))
        peers = start_peers(filesystem, path, ids, chunk_bytes_max, _GIVES_MAX)
        stack.callback(end, peers)
        joined, failed = join(peers)
        version = _version_of(joined, failed, path)
        for name, answer in joined.items():
            if answer.version != version:
                failed[name] = Failure(ObjectChanged.code, "it sees another version of it")
        partners = {n: peers[n] for n in joined if n not in failed}
        files = chosen(_files(partners), globs)
        size = sum(length for _, length in files)
        chunk_bytes = _chunk_bytes(size, len(partners), chunk_bytes_max)
        chunks = chunks_of(files, chunk_bytes)
        has = _what_is_there(partners, joined, files, chunks)
        gives_max = max(2, min(_GIVES_MAX, _GIVE_BYTES_MAX // chunk_bytes))
        course = Course(chunks, has, window_bytes, gives_max)
        show = stack.enter_context(_bar(f"broadcasting {path}")) if progress else None
        run = _Run(course, chunks, partners, timeout_s, show)
        run.run()
        failed |= run.failed
        nodes = {
            name: NodeReport(
                run.read_bytes[name],
                run.taken_bytes[name],
                course.left(name) if name in partners else size,
                failed[name].message if name in failed else "",
            )
            for name in ids
        }
    report = BroadcastReport(version, len(files), size, nodes, time.monotonic() - began_s)
    for name, node in nodes.items():
        if node.left:
            log.warning(
                "broadcast of %s: node %s reads %d bytes from the store itself: %s",
                *(path, name, node.left, node.error or "they could not be brought"),
            )
    return report


def _chunk_bytes(size: int, nodes: int, most: int) -> int:
    fair = size // min(nodes * _TURNS, _CHUNKS_ENOUGH)
    return min(most, max(_CHUNK_BYTES_MIN, fair)) // BLOCK_BYTES * BLOCK_BYTES


def _version_of(joined: Mapping[str, Joined], failed: Mapping[str, Failure], path: str) -> str:
    """The version that most see. Raises the first failure where there is none."""
    versions = Counter(answer.version for answer in joined.values())
    if versions:
        return versions.most_common(1)[0][0]
    for failure in failed.values():
        error = BY_CODE.get(failure.code, DaemonError)
        raise error(f"no node could attach {path}: {failure.message}")
    raise AssertionError


def _files(partners: Mapping[str, Any]) -> list[tuple[str, int]]:
    for peer in partners.values():
        answer = answer_of(peer.files.remote())
        if not isinstance(answer, Failure):
            return answer
    raise CheckpointNotFound("no node could list the checkpoint's files")


def _what_is_there(
    partners: Mapping[str, Any],
    joined: Mapping[str, Joined],
    files: Sequence[tuple[str, int]],
    chunks: Sequence[Chunk],
) -> dict[str, set[int]]:
    """The chunks that nodes have, because they have all files of which these are parts."""
    has: dict[str, set[int]] = {name: set() for name in partners}
    refs = {partners[n].cached.remote(files): n for n in partners if joined[n].cached}
    for ref, name in as_they_come(refs):
        answer = answer_of(ref)
        if not isinstance(answer, Failure):
            whole = {file[0] for file, is_whole in zip(files, answer, strict=True) if is_whole}
            has[name] = {
                i for i, chunk in enumerate(chunks) if all(piece.path in whole for piece in chunk)
            }
    return has


class _Run:
    """Carries a course out: asks the actors, and tells the course what they have done."""

    def __init__(
        self,
        course: Course,
        chunks: Sequence[Chunk],
        peers: Mapping[str, Any],
        timeout_s: float,
        show: Callable[[int, int], None] | None,
    ) -> None:
        self._course = course
        self._chunks = chunks
        self._peers = peers
        self._timeout_s = timeout_s
        self._show = show
        self._pending: dict[Any, tuple[str, int, str]] = {}  # what, chunk, node
        self._owed: Counter[str] = Counter()  # how many of them, by node
        self._given: dict[int, Gave] = {}
        now_s = time.monotonic()
        self._heard_s = dict.fromkeys(peers, now_s)  # from each node that owes an answer
        self._moved_s = now_s
        self._shown_s = 0.0
        self.read_bytes: Counter[str] = Counter()
        self.taken_bytes: Counter[str] = Counter()
        self.failed: dict[str, Failure] = {}

    def run(self) -> None:
        """Until there is nothing more to do."""
        while True:
            while (step := self._course.next_give()) is not None:
                self._give(*step)
            if self._course.is_done:
                break
            self._wait()
            self._give_up_on_the_silent()
            self._report_progress(0 if self._course.is_done else _PROGRESS_S)
        self._report_progress(0)

    def _give(self, chunk: int, name: str, carried: bool) -> None:
        call = self._peers[name].give.options(concurrency_group="give")
        self._note(call.remote(self._chunks[chunk], carried), "give", chunk, name)

    def _note(self, ref: Any, what: str, chunk: int, name: str) -> None:
        if not self._owed[name]:
            self._heard_s[name] = time.monotonic()
        self._owed[name] += 1
        self._pending[ref] = what, chunk, name

    def _wait(self) -> None:
        refs = list(self._pending)
        ready, _ = ray.wait(refs, timeout=_PROGRESS_S, fetch_local=False)
        if ready:  # and whatever else is
            ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0, fetch_local=False)
        for ref in ready:
            if ref in self._pending:
                what, chunk, name = self._pending.pop(ref)
                self._owed[name] -= 1
                self._heard_s[name] = self._moved_s = time.monotonic()
                answer = answer_of(ref)
                if isinstance(answer, Failure) and answer.code in _HOPELESS:
                    self._lost(name, answer)
                elif what == "give":
                    self._gave(chunk, name, answer)
                else:
                    self._took(chunk, name, answer)
        for chunk in [c for c in self._given if not self._course.is_under_way(c)]:
            del self._given[chunk]  # and with it the object

    def _gave(self, chunk: int, name: str, answer: Gave | Failure) -> None:
        if isinstance(answer, Failure):
            self._note_failure(name, chunk, answer)
            changed = answer.code == ObjectChanged.code
            self._course.gave_not(chunk, name, for_good=changed)
            return
        self.read_bytes[name] += self._length(chunk)
        takers = self._course.gave(chunk, name)
        if answer.data is None:
            for taker in takers:  # nobody wanted it when it was begun
                self._course.took(chunk, taker, whole=False)
            return
        if takers:
            self._given[chunk] = answer
        for taker in takers:
            call = self._peers[taker].take.options(concurrency_group="take")
            ref = call.remote(self._chunks[chunk], answer.sums, answer.data)
            self._note(ref, "take", chunk, taker)

    def _took(self, chunk: int, name: str, answer: int | Failure) -> None:
        if isinstance(answer, Failure):
            self._note_failure(name, chunk, answer)
            if answer.code == LimitExceeded.code:
                self._course.full(name)
        else:
            self.taken_bytes[name] += answer
        self._course.took(chunk, name, whole=not isinstance(answer, Failure))

    def _note_failure(self, name: str, chunk: int, failure: Failure) -> None:
        log.info("broadcast: node %s, chunk %d: %s", name, chunk, failure.message)
        self.failed.setdefault(name, failure)

    def _lost(self, name: str, failure: Failure) -> None:
        self.failed[name] = failure
        self._pending = {ref: call for ref, call in self._pending.items() if call[2] != name}
        del self._owed[name]
        self._course.lost(name)

    def _give_up_on_the_silent(self) -> None:
        now_s = time.monotonic()
        for name in [name for name, count in self._owed.items() if count]:
            if now_s - self._heard_s[name] > self._timeout_s:
                self._lost(name, Failure("ray", f"no answer for {self._timeout_s:g} s"))
        if now_s - self._moved_s > _PATIENCE_S and (slow := self._course.laggards()):
            log.info("broadcast: going on without %s, which are slow", ", ".join(slow))
            self._course.set_aside(slow)

    def _report_progress(self, interval_s: float) -> None:
        now_s = time.monotonic()
        if self._show is not None and now_s - self._shown_s >= interval_s:
            self._shown_s = now_s
            self._show(*self._course.bytes_there())

    def _length(self, chunk: int) -> int:
        return sum(piece.length for piece in self._chunks[chunk])


@contextmanager
def _bar(what: str) -> Generator[Callable[[int, int], None]]:
    """A bar in the driver, wherever this runs."""
    worker = getattr(ray.get_runtime_context(), "worker", None)  # a Ray client has none
    if worker is None or worker.mode != ray.WORKER_MODE:
        from ckptfs._progress import progress_bar  # rich is slow to import

        with progress_bar(what) as show:
            yield show
        return
    from ray.experimental import tqdm_ray

    bar = tqdm_ray.tqdm(desc=what, unit="B")

    def show_there(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    try:
        yield show_there
    finally:
        bar.close()
