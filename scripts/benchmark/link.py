"""The case in which the link is the limit: a slow one between this machine and the store."""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import subprocess
import threading
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from benchmark.contenders import CKPTFS, RAW, RUNAI, S3FS, S5CMD
from benchmark.loads import measure_loads
from benchmark.nginx import Site, serving
from benchmark.results import ratio
from benchmark.stores import CAPPED_LATENCY_S, CAPPED_RATE, Store

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.s3server import S3Server

    from benchmark.run import Run

RATE = "2gbit"
BURST = "1m"
"""Bytes that pass at once. The kernel hands over packets of 64 KiB, which must not be cut up."""

NETWORK = "198.18.0"
"""Addresses that no network may use: RFC 2544 keeps them for measurements."""

NEAR, FAR = f"{NETWORK}.1", f"{NETWORK}.2"
PORT = 9000
CLONE_NEWNET = 0x40000000
READERS_OF_RAW = 16
"""Three connections fill the link. The others hide the time that each request waits."""

CONTENDERS = (RAW, CKPTFS, S3FS, S5CMD, RUNAI)
"""A load takes each of them 5 s or more. rclone mount took 13 s, and would cost a round."""


def link(run: Run) -> None:
    """Cold load of the model over a link of 2 Gbit/s, with 20 ms for each request."""
    case = "link"
    taken = measure_loads(run, case, run.link, CONTENDERS, rounds=2)
    raw, own = taken.get(RAW.name), taken.get(CKPTFS.name)
    run.report.goals.append(ratio(case, "speed of ckptfs / raw", raw, own, at_least=0.97))


def setup_commands(namespace: str) -> list[list[str]]:
    """The commands that make a network namespace, with a link to it that `RATE` limits."""
    near, far = f"{namespace}n", f"{namespace}f"
    inside = ["ip", "-n", namespace]
    limit = ["tbf", "rate", RATE, "burst", BURST, "latency", "50ms"]
    return [
        ["ip", "netns", "add", namespace],
        ["ip", "link", "add", near, "type", "veth", "peer", "name", far, "netns", namespace],
        ["ip", "address", "add", f"{NEAR}/30", "dev", near],
        ["ip", "link", "set", near, "up"],
        [*inside, "address", "add", f"{FAR}/30", "dev", far],
        [*inside, "link", "set", far, "up"],
        f"tc -n {namespace} qdisc add dev {far} root".split() + limit,
    ]


@contextmanager
def linked(server: S3Server, folder: Path) -> Iterator[Store]:
    """`server` behind nginx, which clients reach over the slow link only.

    Raises:
        RuntimeError: The machine cannot make the link, or nginx does not start.
    """
    for program in ("ip", "tc"):
        if not shutil.which(program):
            raise RuntimeError(f"there is no {program} (Debian: iproute2)")
    namespace = f"ckb{os.getpid()}"
    with ExitStack() as stack:
        # The kernel removes a namespace and its end of a link some time later.
        stack.callback(_run_quietly, ["ip", "netns", "delete", namespace])
        stack.callback(_run_quietly, ["ip", "link", "delete", f"{namespace}n"])
        for command in setup_commands(namespace):
            _run(command)
        listener = stack.enter_context(_listen_in(namespace))
        site = Site(
            f"{FAR}:{PORT}",
            upstream=server.endpoint,
            latency_s=CAPPED_LATENCY_S,
            rate=CAPPED_RATE,
        )
        stack.enter_context(serving(site, folder, listener))
        yield Store("link", site.endpoint)


def _listen_in(namespace: str) -> socket.socket:
    """A socket that listens in the namespace.

    nginx itself stays outside, so it reaches the server without the link. A socket belongs to the
    namespace of the thread that made it, and a thread can enter one alone.
    """
    made: list[socket.socket | OSError] = []

    def make() -> None:
        try:
            with Path("/run/netns", namespace).open() as file:
                libc = ctypes.CDLL(None, use_errno=True)
                if libc.setns(file.fileno(), CLONE_NEWNET):
                    code = ctypes.get_errno()
                    raise OSError(code, os.strerror(code))
            made.append(socket.create_server((FAR, PORT), backlog=511))
        except OSError as error:
            made.append(error)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    if isinstance(made[0], OSError):
        raise RuntimeError(f"cannot listen in a network namespace: {made[0]}")
    return made[0]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise RuntimeError(f"`{' '.join(command)}`: {said[-1] if said else 'it failed'}")


def _run_quietly(command: list[str]) -> None:
    subprocess.run(command, capture_output=True, check=False)
