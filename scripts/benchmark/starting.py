"""The further stores of a run: which cases need them, their start, and the limit of each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from support.serverbase import Authority

from benchmark import link
from benchmark.run import calibrate
from benchmark.stores import Store, capped, encrypted

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager, ExitStack
    from pathlib import Path

    from support.s3server import S3Server

    from benchmark import results

OPEN_THREADS = (2, 4, 8, 16)
CAPPED_THREADS = (8, 16, 32)
RAW_THREADS = {
    "tls": OPEN_THREADS,
    "capped": CAPPED_THREADS,
    "capped_tls": CAPPED_THREADS,
    "link": (link.READERS_OF_RAW,),
}
"""Numbers of readers, the fastest of which is the limit, by the store's field of the run."""

USERS = {
    "tls": {"sequential-tls", "load-tls", "tensor-tls", "small-tls", "ceiling", "upload-tls"},
    "capped": {"capped", "plan"},
    "capped_tls": {"capped-tls"},
    "link": {"link"},
}
"""The cases that need a store, by the store's field of the run."""


def start_others(
    stack: ExitStack,
    temp: Path,
    server: S3Server,
    names: list[str],
    report: results.Report,
) -> dict[str, Store]:
    """Start the stores that the cases need, by the field of the run; the report has the others."""
    authority = Authority(temp)
    makers: dict[str, Callable[[], AbstractContextManager[Store]]] = {
        "tls": lambda: encrypted(server, temp / "nginx-tls", authority),
        "capped": lambda: capped(server, temp / "nginx"),
        "capped_tls": lambda: capped(server, temp / "nginx-capped", authority, "capped TLS"),
        "link": lambda: link.linked(server, temp / "nginx-link"),
    }
    stores: dict[str, Store] = {}
    for field, make in makers.items():
        if USERS[field].isdisjoint(names):
            continue
        try:
            stores[field] = stack.enter_context(make())
        except (RuntimeError, OSError) as error:
            report.absent[f"the store of {', '.join(sorted(USERS[field]))}"] = str(error)
    return stores


def raw_threads(store: Store, others: dict[str, Store]) -> dict[str, int]:
    """The number of readers that get most out of each store, by the store's name."""
    job = {"name": "large", "file": "data.bin"}
    threads = {store.name: calibrate(store, job, OPEN_THREADS)}
    for field, other in others.items():
        candidates = RAW_THREADS[field]
        one = len(candidates) == 1
        threads[other.name] = candidates[0] if one else calibrate(other, job, candidates)
    return threads
