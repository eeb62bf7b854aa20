"""Helpers that the tests of the contract suite share."""

import contextlib
import mmap
import os
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from conftest import Node
from support.stores.realstore import RealStore

from ckptfs._client import client
from ckptfs.cli.target import location_of

MIB = 1 << 20


def configure(node: Node, store: RealStore, **settings: Any) -> None:
    """Settings of the node, and its named stores. Takes effect with `reload`."""
    node.configure(**{"read_deadline_s": 20.0, "linger_s": 0.0, **settings})
    if store.has_table:
        tables = store.table("main", ""), store.table("runs", "runs")
        with (node.folder / "ckptfs.toml").open("a") as file:
            file.write("".join(tables))


@contextlib.contextmanager
def directory(store: RealStore, path: str) -> Iterator[str]:
    """The checkpoint as a directory: mounted, or copied where only this process sees it."""
    if store.name == "local":  # which Python reads where it lies
        lease = client.leased(location_of(store.address(path)))
    elif store.has_mount:
        lease = store.checkpoint(path).as_directory(mode="mount")
    else:
        lease = store.checkpoint(path).as_directory(mode="copy")
    with lease as found:
        yield found


def fill(store: RealStore, path: str, files: Mapping[str, bytes]) -> None:
    """Write a checkpoint."""
    for name, data in files.items():
        store.put(f"{path}/{name}", data)
        store.age(f"{path}/{name}")


def data_requests(store: RealStore) -> list[dict[str, Any]]:
    """Of the requests since the last reset, those that brought bytes of objects, but for
    metadata."""
    return [
        each
        for each in store.traffic()
        if each["operation"] in ("read", "get")
        and each["status"] in (200, 206)
        and ".metadata.json" not in each["target"]
    ]


def read_once(file: str, offset: int, length: int) -> bytes:
    """Read past the kernel's memory: one request to the daemon, which is not repeated."""
    fd = os.open(file, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, -(-length // mmap.PAGESIZE) * mmap.PAGESIZE) as aligned:
            with memoryview(aligned) as view, view[:length] as part:
                count = os.preadv(fd, [part], offset)
            return aligned[:count]
    finally:
        os.close(fd)


@contextlib.contextmanager
def credentials_in_environment(store: RealStore) -> Iterator[None]:
    """URIs that ckptfs prints contain no credentials, so a process that attaches one has them in
    variables."""
    with pytest.MonkeyPatch.context() as patched:
        for variable, value in store.secret_environment.items():
            patched.setenv(variable, value)
        yield
