"""The cases of uploads: the model goes to a store, and is restored on the same node."""

from __future__ import annotations

import os
from contextlib import contextmanager
from functools import partial
from itertools import count
from typing import TYPE_CHECKING

from pyarrow.fs import FileSelector

from benchmark.contenders import CKPTFS, COPY_FILES, LOCAL, S5CMD, local_directory
from benchmark.results import amount, best, ratio
from benchmark.run import Run, WorkError, working
from benchmark.stores import BUCKET, MIB, Store, flush
from benchmark.weed import MissingStore, seaweedfs_server

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from benchmark.contenders import Contender, Ready

ROUNDS_MAX = 3
"""On 2 cores an upload of 1 GiB takes about 10 s, and a round has one of each contender."""

_numbers = count()


def upload(run: Run) -> None:
    """Upload of the model in 4 shards, and its restore on the same node."""
    _upload(run, "upload", run.store)
    store, proxy = run.counted
    served: list[float] = []

    def served_mib() -> float:
        with _uploaded(run, CKPTFS, store) as (ready, name, _):
            proxy.reset()
            _load(run, ready, name)
            served.append(proxy.snapshot().bytes_to_client / MIB)
        return served[-1]

    run.alternate("upload", {CKPTFS.name: served_mib}, 1)
    run.report.goals.append(amount("upload", "served for the restore", "MiB", served, at_most=1))


def upload_tls(run: Run) -> None:
    """The same over HTTPS, without the count."""
    if run.tls:
        _upload(run, "upload-tls", run.tls)


def upload_seaweedfs(run: Run) -> None:
    """The same to SeaweedFS, over HTTP and over its own HTTPS."""
    case = "upload-seaweedfs"
    try:
        with seaweedfs_server(run) as (server, ca_file):
            _upload(run, case, Store("SeaweedFS", server.endpoint))
            _upload(run, case, Store("SeaweedFS", server.tls_endpoint, ca_file))
    except MissingStore as missing:
        run.report.absent[f"the store of {case}"] = str(missing)


def _upload(run: Run, case: str, store: Store) -> None:
    """Measure the uploads of all contenders, and after each of ckptfs its restore and a load of the
    same files from the disk."""
    restored: dict[str, list[float]] = {CKPTFS.name: [], LOCAL: []}

    def measure(contender: Contender) -> float:
        with _uploaded(run, contender, store) as (ready, name, seconds):
            if ready.node:
                restored[CKPTFS.name].append(_load(run, ready, name))
                with local_directory(run.objects.folder) as local:
                    restored[LOCAL].append(_load(run, local, "model"))
        return seconds

    contenders = run.able(store, CKPTFS, S5CMD, COPY_FILES)
    measures = {each.name: partial(measure, each) for each in contenders}
    taken = run.alternate(case, measures, min(run.rounds, ROUNDS_MAX))
    size = run.objects.large_bytes >> 20
    run.add_panel(case, f"upload {size} MiB in 4 shards{store.suffix}", taken)
    run.add_panel(case, f"load them on that node{store.suffix}", restored)
    own, peers = taken.get(CKPTFS.name), best(taken, S5CMD.name, COPY_FILES.name)
    title = f"speed of ckptfs / best of s5cmd, pyarrow's copy_files{store.suffix}"
    run.report.goals += [
        ratio(case, title, peers, own, at_least=0.9),
        ratio(
            case,
            f"restore: ckptfs / local files{store.suffix}",
            restored[CKPTFS.name],
            restored[LOCAL],
            at_most=1.2,
        ),
    ]


@contextmanager
def _uploaded(run: Run, contender: Contender, store: Store) -> Iterator[tuple[Ready, str, float]]:
    """The model at `store`, uploaded by `contender`: the contender, still ready, the name of the
    copy, and the seconds that the upload took. At the end the copy is removed."""
    source = run.objects.folder / "model"
    name = f"uploaded-{next(_numbers)}"
    filesystem = store.filesystem()
    target = FileSelector(f"{BUCKET}/{name}", allow_not_found=True)
    with contender.cold(store, run.temp) as ready:
        job = {"way": f"upload_{ready.job['way']}", "name": name, "source": str(source)}
        if ready.node:
            ready.node.wait_idle()
        try:
            with working(ready, job) as worker:
                seconds = worker.go()["seconds"]
            found = filesystem.get_file_info(target)
            sizes = {os.path.basename(each.path): each.size for each in found}
            if sizes != {path.name: path.stat().st_size for path in source.iterdir()}:
                raise WorkError(f"{contender.name} reported success, and the store has {sizes}")
            yield ready, name, seconds
        finally:
            if filesystem.get_file_info(target):
                filesystem.delete_dir(target.base_dir)


def _load(run: Run, ready: Ready, name: str) -> float:
    """Seconds of a load of all tensors, when no page of their files is in memory."""
    _drop([run.objects.folder / "model" / shard for shard in run.objects.shards()])
    if ready.node:
        _drop(ready.node.data_files())
    with working(ready, run.model() | {"task": "load", "name": name}) as worker:
        return worker.go(run.objects.model_check)["seconds"]


def _drop(files: list[Path]) -> None:
    """Let the kernel forget what it has cached of the files."""
    for path in files:
        flush(path)
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
