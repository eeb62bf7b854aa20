"""A cluster gets a checkpoint for the price of one download."""

# One node reads each part of a checkpoint from its cache, or from the store if no node has it.
# Ray's object store brings it to the caches of the others. `_schedule` decides which node reads
# which part, and `_peer` is a node's end. After a broadcast programs read the checkpoint through a
# mount of the node's daemon as always, which reads from the store what the broadcast could not
# bring.
#
# Versions: each node attaches the checkpoint, with its own credentials. The version that most nodes
# see is the cluster's. A node that sees another version takes no part. The daemons verify each
# block against the pinned version of their own attachment (`_daemon.attachment.block_exchange`).

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import ray

from ckptfs import errors
from ckptfs._model.blocks import BLOCK_BYTES
from ckptfs._model.globs import matcher
from ckptfs._store.filesystems import FileSystem
from ckptfs.ray import _nodes
from ckptfs.ray._broadcast_report import NOT_BROUGHT, BroadcastReport, NodeReport
from ckptfs.ray._nodes import AnyCheckpoint, Nodes, answer_of
from ckptfs.ray._peer import Failure, Gave, Joined
from ckptfs.ray._schedule import Chunk, Course, Runs, chunks_of, length_of

log = logging.getLogger(__name__)

_CHUNK_BYTES_MIN = 4 << 20
_CHUNK_BYTES_MAX = 64 << 20
_TURNS = 32
"""Chunks that each node gives, so that none is idle in the end."""
_CHUNKS_ENOUGH = 256
"""Chunks of all nodes together, after which chunks get no smaller. Each is a message to each node,
and one driver sends about a thousand per second. 100 GB in chunks of 4 MiB would take 512 nodes 50
minutes, in chunks of 64 MiB 5 (`scripts/simulate`)."""
_GIVE_BYTES_MAX = 128 << 20
"""Maximum number of bytes that a node gives at the same time, as its daemon has in flight."""
_GIVES_MAX = 16
"""Maximum number of chunks that a node gives at the same time, as its daemon has requests."""
_WINDOW_SHARE = 4
"""A broadcast uses at most a quarter of the smallest object store."""
_PATIENCE_S = 10.0
"""Longest wait of all nodes for a slow one, before they go on without it."""
_PROGRESS_S = 0.25
_HOPELESS = frozenset(["lost", "access-denied", "daemon", "no-daemon", "not-attached", "protocol"])
"""Errors after which a broadcast does not ask the node again: its actor or daemon has gone, or its
daemon does not exchange blocks with this user or in this version."""


def broadcast(
    checkpoint: AnyCheckpoint | str,
    nodes: Nodes = "all",
    files: Sequence[str] = (),
    *,
    sources: Collection[str] = (),
    on: Literal["driver", "task"] = "driver",
    progress: bool = True,
    window_bytes: int | None = None,
    timeout_s: float = 120.0,
) -> BroadcastReport:
    """Bring a checkpoint into the caches of many nodes, and read it from the store only once.

    The function returns when the nodes have all that they can get. If a node cannot take part, dies
    or falls silent, or if a file changes meanwhile, the others continue. The report and the log
    name these nodes, which read from the store themselves.

        >>> report = ckptfs.ray.broadcast("s3://bucket/run7/checkpoint_000100")
        >>> print(report)
        30 files, 30.0 MiB, in 6.4 s: 3 of 3 nodes have all of it
        read from the store 30.0 MiB, taken from other nodes 60.0 MiB, in caches before 0 B

    Args:
        checkpoint: A ``ckptfs.Checkpoint``, one of Ray's, or a URI.
        nodes: The nodes that get it: "all" or None, a list of Ray's node ids, or a placement group,
            for which the call waits.
        files: Globs on relative paths (``*`` also matches ``/``), the most urgent first; empty for
            all files.
        sources: Ray's ids of further nodes that give what they have of the checkpoint in their
            caches, such as those that saved it. They get nothing, and a source that is dead or does
            not answer soon is left out.
        on: The place that directs the broadcast: this process ("driver") or a Ray task ("task"),
            which suits a distant driver. The files' contents never pass through this process.
        progress: Whether to show a bar, if this process has a terminal or a notebook.
        window_bytes: Maximum number of bytes in each node's object store; None for a quarter of the
            smallest one.
        timeout_s: Seconds without an answer after which the broadcast goes on without a node.

    Raises:
        LocationError: The checkpoint is a local directory, or in a filesystem that only this
            process has.
        CheckpointNotFound, CheckpointIsFile, AccessDenied, StoreError, DaemonError: No node could
            attach it. The message is that of the first node.
        ValueError: The cluster has no such nodes.
    """
    filesystem, path = _nodes.place_of(checkpoint)
    ids = _nodes.node_ids(nodes)
    giving = sorted((set(sources) & _nodes.living_ids()) - set(ids))
    options: dict[str, Any] = {"window_bytes": window_bytes, "timeout_s": timeout_s}
    options["sources"] = giving
    if on == "task":
        remote = ray.remote(num_cpus=0)(_broadcast)
        task = remote.remote(filesystem, path, ids, files, progress=progress, **options)
        return ray.get(task)
    return _broadcast(filesystem, path, ids, files, progress=progress, **options)


def chosen(files: Sequence[tuple[str, int]], globs: Sequence[str]) -> list[tuple[str, int]]:
    """The files that match, in the order of the globs; all files without globs."""
    found: dict[tuple[str, int], None] = {}
    for glob in globs or ["*"]:
        matches = matcher(glob)
        found |= dict.fromkeys(file for file in files if matches(file[0]))
    return list(found)


def _broadcast(
    filesystem: FileSystem,
    path: str,
    ids: Sequence[str],
    globs: Sequence[str],
    *,
    sources: Sequence[str],
    progress: bool,
    window_bytes: int | None,
    timeout_s: float,
) -> BroadcastReport:
    began_s = time.monotonic()
    all_ids = [*ids, *sources]
    window_bytes = window_bytes or _nodes.smallest_object_store(all_ids) // _WINDOW_SHARE
    with ExitStack() as stack:
        # The best size of a chunk depends on the files, and only a node can list them.
        chunk_bytes_max = max(BLOCK_BYTES, min(_CHUNK_BYTES_MAX, window_bytes // _WINDOW_SHARE))
        peers = _nodes.start_peers(filesystem, path, all_ids, chunk_bytes_max, _GIVES_MAX)
        stack.callback(_nodes.end, peers)
        version, joined, failed = _joined(peers, path, sources)
        partners = {name: peers[name] for name in joined}
        files = chosen(_files(partners, timeout_s), globs)
        size = sum(length for _, length in files)
        takers = partners.keys() - set(sources)
        chunk_bytes = _chunk_bytes(size, len(takers), chunk_bytes_max)
        chunks, has = chunks_of(files, chunk_bytes, _what_is_there(partners, joined, files))
        had = {name: sum(length_of(chunks[i]) for i in own) for name, own in has.items()}
        gives_max = max(2, min(_GIVES_MAX, _GIVE_BYTES_MAX // chunk_bytes))
        course = Course(chunks, has, window_bytes, gives_max, sources)
        show = stack.enter_context(_bar(f"broadcasting {path}")) if progress else None
        run = _Run(course, chunks, partners, timeout_s, show)
        run.run()
    failed |= run.failed

    def report(name: str, left: int) -> NodeReport:
        error = failed[name].message if name in failed else ""
        taken, fetched = run.taken_bytes[name], run.fetched_bytes[name]
        return NodeReport(run.read_bytes[name], taken, left, error, had.get(name, 0), fetched)

    nodes = {name: report(name, course.left(name) if name in partners else size) for name in ids}
    for name, part in nodes.items():
        if part.left:
            text = "broadcast of %s: node %s reads %d bytes from the store itself: %s"
            log.warning(text, path, name, part.left, part.error or NOT_BROUGHT)
    given = {name: report(name, 0) for name in sources}
    seconds = time.monotonic() - began_s
    return BroadcastReport(version, len(files), size, nodes, seconds, given)


def _chunk_bytes(size: int, nodes: int, most: int) -> int:
    fair = size // min(nodes * _TURNS, _CHUNKS_ENOUGH)
    return min(most, max(_CHUNK_BYTES_MIN, fair)) // BLOCK_BYTES * BLOCK_BYTES


def _joined(
    peers: Mapping[str, Any], path: str, sources: Collection[str]
) -> tuple[str, dict[str, Joined], dict[str, Failure]]:
    """The version that most nodes see, these nodes, and the failures of the others. Sources do not
    decide on the version. Raises the first failure if no other node has joined."""
    joined, failed = _nodes.join(peers, sources)
    versions = Counter(answer.version for name, answer in joined.items() if name not in sources)
    if not versions:
        failure = next(failure for name, failure in failed.items() if name not in sources)
        error = errors.BY_CODE.get(failure.code, errors.DaemonError)
        raise error(f"no node could attach {path}: {failure.message}")
    version = versions.most_common(1)[0][0]
    for name in [name for name, answer in joined.items() if answer.version != version]:
        del joined[name]
        failed[name] = Failure(errors.ObjectChanged.code, "it sees another version")
    return version, joined, failed


def _files(partners: Mapping[str, Any], timeout_s: float) -> list[tuple[str, int]]:
    """The files of the checkpoint, from the first node that lists them. A node has `timeout_s` for
    its answer. Raises CheckpointNotFound."""
    for name, peer in partners.items():
        for ref, _ in _nodes.as_they_come({peer.files.remote(): name}, timeout_s):
            answer = answer_of(ref)
            if not isinstance(answer, Failure):
                return answer
    raise errors.CheckpointNotFound("no node could list the checkpoint's files")


def _what_is_there(
    partners: Mapping[str, Any],
    joined: Mapping[str, Joined],
    files: Sequence[tuple[str, int]],
) -> dict[str, dict[str, Runs]]:
    """The blocks that each node has of each file."""
    has: dict[str, dict[str, Runs]] = {name: {} for name in partners}
    refs = {partners[n].cached.remote(files): n for n in partners if joined[n].cached}
    for ref, name in _nodes.as_they_come(refs):
        answer = answer_of(ref)
        if isinstance(answer, Failure):
            log.info("broadcast: node %s does not say what it has: %s", name, answer.message)
        else:
            has[name] = answer
    return has


class _Run:
    """Asks the actors to carry out a course, and reports their answers to it."""

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
        self._pending: dict[Any, tuple[str, int, str]] = {}  # verb, chunk, node
        self._owed: Counter[str] = Counter()  # number of pending answers, by node
        self._given: dict[int, Gave] = {}
        now_s = time.monotonic()
        self._heard_s = dict.fromkeys(peers, now_s)  # the last sign of a node with pending answers
        self._moved_s = now_s
        self._shown_s = 0.0
        self.read_bytes: Counter[str] = Counter()
        self.fetched_bytes: Counter[str] = Counter()
        self.taken_bytes: Counter[str] = Counter()
        self.failed: dict[str, Failure] = {}

    def run(self) -> None:
        """Run the course to its end."""
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

    def _note(self, ref: Any, verb: str, chunk: int, name: str) -> None:
        if not self._owed[name]:
            self._heard_s[name] = time.monotonic()
        self._owed[name] += 1
        self._pending[ref] = verb, chunk, name

    def _wait(self) -> None:
        refs = list(self._pending)
        ready, _ = ray.wait(refs, timeout=_PROGRESS_S, fetch_local=False)
        if ready:  # take all other answers, too
            ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0, fetch_local=False)
        for ref in ready:
            if ref in self._pending:
                verb, chunk, name = self._pending.pop(ref)
                self._owed[name] -= 1
                self._heard_s[name] = self._moved_s = time.monotonic()
                answer = answer_of(ref)
                if isinstance(answer, Failure) and answer.code in _HOPELESS:
                    self._lost(name, answer)
                elif verb == "give":
                    self._gave(chunk, name, answer)
                else:
                    self._took(chunk, name, answer)
        for chunk in [c for c in self._given if not self._course.is_under_way(c)]:
            del self._given[chunk]  # and with it the object

    def _gave(self, chunk: int, name: str, answer: Gave | Failure) -> None:
        if isinstance(answer, Failure):
            self._note_failure(name, chunk, answer)
            self._course.gave_not(chunk, name, for_good=answer.code == errors.ObjectChanged.code)
            return
        self.read_bytes[name] += length_of(self._chunks[chunk])
        self.fetched_bytes[name] += answer.fetched
        takers = self._course.gave(chunk, name)
        if answer.data is None:
            for taker in takers:  # no other node wanted the chunk when it was begun
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
            if answer.code == errors.LimitExceeded.code:
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


@contextmanager
def _bar(what: str) -> Generator[Callable[[int, int], None]]:
    """A bar in the driver, also if this process is a task of it."""
    worker = getattr(ray.get_runtime_context(), "worker", None)  # a Ray client has none
    if worker is None or worker.mode != ray.WORKER_MODE:
        from ckptfs._os.progress_bar import progress_bar  # rich is slow to import

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
