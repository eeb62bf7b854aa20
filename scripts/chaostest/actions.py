"""Faults and other actions. Each function does one of them once, and undoes it.

The lanes run beside each other: for the store, for the node, for the disk of its cache, and for
uploads by programs and in the background. Each has its own stream of chance, so the order of the
actions depends on the seed only, and not on the speed of the machine.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from support.faultproxy import FAULTS, TLS_FAULTS

from chaostest import verdict
from chaostest.content import LOCAL, MIB
from chaostest.node import DAEMON, KEEPER, SENDER, WORKER
from ckptfs._model.protocol.requests import Attach, Detach
from ckptfs.errors import Busy, CkptfsError, NotAttached

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from chaostest.chaos import Chaos
    from chaostest.disk import Disk

PAGE_BYTES = 4096
SUCCESSOR_WAIT_S = 30.0
"""Longest wait for the daemon after the one that was killed."""

Action: TypeAlias = "Callable[[Chaos, random.Random], None]"


# -- the store


def store_fault(kind: str) -> Action:
    """The store, or the way to it, has a fault for a while."""

    def action(chaos: Chaos, chance: random.Random) -> None:
        length_s = chance.uniform(0.2, 2.0)
        share = chance.choice((0.2, 0.5, 1.0, 1.0))
        delay_s = chance.uniform(0.05, 0.8)
        if chaos.long and chance.random() < 0.15:
            length_s = chaos.node.config.read_deadline_s * chance.uniform(1.1, 2.0)
        with chaos.timeline.during(kind):
            chaos.proxy.ask({"fault": kind, "share": share, "delay_s": delay_s})
            try:
                chaos.wait(length_s)
            finally:
                chaos.proxy.ask({})

    return action


# -- daemon and keeper


def kill_daemon(chaos: Chaos, chance: random.Random) -> None:
    """`kill -9`, at times as soon as its successor is there."""
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        with chaos.timeline.during(verdict.KILLED):
            chaos.kill(DAEMON, signal.SIGKILL)
            wait_for_daemon(chaos)
        chaos.wait(chance.uniform(0, 0.5))


def crash_loop(chaos: Chaos, chance: random.Random) -> None:
    """Whatever is started as a daemon dies at once, also a spare one, for a while."""
    length_s = chance.uniform(1.0, 4.0)
    with chaos.timeline.during(verdict.KILLED):
        end_s = time.monotonic() + length_s
        while time.monotonic() < end_s:
            for pid in chaos.node.processes(DAEMON):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            chaos.wait(0.02)
        wait_for_daemon(chaos)


def terminate_daemon_by_segv(chaos: Chaos, chance: random.Random) -> None:
    """It ends by a signal of the kind that a bug in a library makes."""
    with chaos.timeline.during(verdict.KILLED):
        chaos.kill(DAEMON, signal.SIGSEGV)
        wait_for_daemon(chaos)


def stop_daemon(chaos: Chaos, chance: random.Random) -> None:
    """Stop the daemon (SIGSTOP), and continue it before the keeper gives it up."""
    length_s = chance.uniform(0.2, 3.0)
    with chaos.timeline.during(verdict.STOPPED):
        pids = chaos.kill(DAEMON, signal.SIGSTOP)
        try:
            chaos.wait(length_s)
        finally:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)


def stop_daemon_for_good(chaos: Chaos, chance: random.Random) -> None:
    """SIGSTOP, until the keeper has given it up."""
    with chaos.timeline.during(verdict.STOPPED):
        if pids := chaos.kill(DAEMON, signal.SIGSTOP):
            deadline_s = time.monotonic() + SUCCESSOR_WAIT_S
            while Path(f"/proc/{pids[0]}").exists():
                chaos.wait(0.1)
                if time.monotonic() > deadline_s:
                    os.kill(pids[0], signal.SIGKILL)
                    chaos.breach(
                        "stuck", f"the keeper has not ended it within {SUCCESSOR_WAIT_S:g} s"
                    )
                    break
            wait_for_daemon(chaos)


def kill_keeper(chaos: Chaos, chance: random.Random) -> None:
    """Kill the keeper. The mount is dead until the next attach."""
    with chaos.timeline.during(verdict.ENDED):
        chaos.kill(KEEPER, signal.SIGKILL)
        deadline_s = time.monotonic() + SUCCESSOR_WAIT_S
        while chaos.node.serving(DAEMON) == [] or not chaos.daemon_answers():
            chaos.wait(0.1)
            if time.monotonic() > deadline_s:
                chaos.breach("gone", f"no daemon {SUCCESSOR_WAIT_S:g} s after its keeper")
                return


def wait_for_daemon(chaos: Chaos) -> None:
    """Wait until a daemon answers again."""
    deadline_s = time.monotonic() + SUCCESSOR_WAIT_S
    while not chaos.daemon_answers():
        if time.monotonic() > deadline_s:
            chaos.breach("gone", f"no daemon answers {SUCCESSOR_WAIT_S:g} s after one was killed")
            return
        chaos.wait(0.05)


# -- workers, which readers must not notice


def kill_worker(chaos: Chaos, chance: random.Random) -> None:
    """`kill -9`, or a signal of the kind that a bug in a library makes, at times again at once."""
    for _ in range(chance.choice((1, 1, 1, 2))):
        chaos.kill(WORKER, chance.choice((signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV)))
        chaos.wait(chance.uniform(0, 0.5))


def stop_worker(chaos: Chaos, chance: random.Random) -> None:
    """SIGSTOP; the daemon gives it up if a call waits for it. Otherwise it goes on."""
    _stop(chaos, WORKER, chance.uniform(0.1, 3.0))


def _stop(chaos: Chaos, module: bytes, seconds: float) -> None:
    pids = chaos.kill(module, signal.SIGSTOP)
    try:
        chaos.wait(seconds)
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def starve_worker(chaos: Chaos, chance: random.Random) -> None:
    """The workers run for a quarter of the time, as under a limit of the CPU."""
    end_s = time.monotonic() + chance.uniform(0.5, 2.0)
    while time.monotonic() < end_s:
        _stop(chaos, WORKER, 0.15)
        chaos.wait(0.05)


def kill_reader(chaos: Chaos, chance: random.Random) -> None:
    """A job is killed, with all that it holds."""
    chaos.kill_reader(chance)


# -- attachments


def pin(chaos: Chaos, chance: random.Random) -> None:
    """Attach for good, and detach politely: who uses it does not notice."""
    checkpoint = chance.choice(list(chaos.uris))
    location = chaos.location(checkpoint)
    with contextlib.suppress(CkptfsError, OSError), chaos.node.control() as control:
        name = control.ask_once(Attach(location=location, pinned=True)).name
        chaos.wait(chance.uniform(0, 1.0))
        with contextlib.suppress(NotAttached, Busy):
            control.ask(Detach(name=name))


def detach_by_force(chaos: Chaos, chance: random.Random) -> None:
    """An administrator ends an attachment that processes may use."""
    checkpoint = chance.choice(list(chaos.uris))
    location = chaos.location(checkpoint)
    with (
        chaos.timeline.during(verdict.DETACHED, checkpoint),
        contextlib.suppress(CkptfsError, OSError),
        chaos.node.control() as control,
    ):
        control.ask(Detach(location=location, force=True))


def prefetch(chaos: Chaos, chance: random.Random) -> None:
    """`ckptfs prefetch`, which ends by itself or is killed."""
    uri = chaos.uris[chance.choice(list(chaos.uris))]
    command = [str(Path(sys.executable).with_name("ckptfs")), "prefetch", uri, "*", "--quiet"]
    if chance.random() < 0.5:
        command[-1:] = ["--limit-rate", "20M"]
    wait_s = chance.uniform(0.3, 3.0)
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        chaos.wait(wait_s, until=lambda: process.poll() is not None)
    finally:
        process.kill()
        process.wait()


# -- objects


def overwrite(chaos: Chaos, chance: random.Random) -> None:
    """Some objects get a new version."""
    files = [file for file in chaos.contents.files if file.checkpoint != LOCAL]
    for file in chance.sample(files, chance.randint(1, 3)):
        chaos.publish(file)


def change_metadata(chaos: Chaos, chance: random.Random) -> None:
    """Others than ckptfs change the metadata of a checkpoint."""
    chaos.write_note()


# -- uploads


def upload(chaos: Chaos, chance: random.Random) -> None:
    """A program uploads a directory, is killed at times, and tries again until it succeeds."""
    chaos.uploads.upload(chance)


def upload_in_background(chaos: Chaos, chance: random.Random) -> None:
    """A program hands a directory over. The lane follows the upload to its end."""
    chaos.backgrounds.upload(chance)


def kill_sender(chaos: Chaos, chance: random.Random) -> None:
    """The process that sends an upload of the background is killed, or stands still for a while."""
    if chance.random() < 0.7:
        chaos.kill(SENDER, chance.choice((signal.SIGKILL, signal.SIGABRT, signal.SIGTERM)))
    else:
        _stop(chaos, SENDER, chance.uniform(0.2, 2.0))


# -- cache and disk


def damage(chaos: Chaos, chance: random.Random) -> None:
    """Bits flip on the disk. The kernel's copy in memory goes, too, because the disk is bad.

    Files that the kernel reads by itself stay as they are, because ckptfs does not check these.
    """
    files = in_cache(chaos, "data")
    for path in chance.sample(files, min(len(files), chance.randint(1, 4))):
        if chaos.passthrough or chance.random() < 0.2:
            path = path.with_name(chance.choice(("map", "about.json")))
        with contextlib.suppress(OSError):  # it was just evicted
            flip(path, chance)


def in_cache(chaos: Chaos, name: str) -> list[Path]:
    """The objects' files of that name; none if a folder goes, or the disk fails, meanwhile."""
    try:
        return sorted(chaos.node.cache.glob(f"objects/*/*/{name}"))
    except OSError:
        return []


def flip(path: Path, chance: random.Random) -> None:
    """Flip a bit of a file, past the page cache where its size allows it."""
    place, bit = chance.random(), 1 << chance.randrange(8)
    direct = path.name == "data" and path.stat().st_size >= PAGE_BYTES
    fd = os.open(path, os.O_RDWR | (os.O_DIRECT if direct else 0))
    try:
        size = os.fstat(fd).st_size
        if not direct:
            if size:
                at = int(place * size)
                os.pwrite(fd, bytes([os.pread(fd, 1, at)[0] ^ bit]), at)
            return
        at = os.lseek(fd, int(place * size) // PAGE_BYTES * PAGE_BYTES, os.SEEK_DATA)
        at = at // PAGE_BYTES * PAGE_BYTES
        with mmap.mmap(-1, PAGE_BYTES) as page:  # O_DIRECT wants whole pages
            if os.preadv(fd, [page], at) == PAGE_BYTES:
                page[int(place * PAGE_BYTES)] ^= bit
                os.pwritev(fd, [page], at)
    finally:
        os.close(fd)


def forget(chaos: Chaos, chance: random.Random) -> None:
    """The kernel forgets what it has of the cache: blocks come from the disk, checked."""
    for path in in_cache(chaos, "data"):
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def remove_cached(chaos: Chaos, chance: random.Random) -> None:
    """An administrator cleans up in the cache's folder."""
    files = in_cache(chaos, "*")
    for path in chance.sample(files, min(len(files), 3)):
        with contextlib.suppress(OSError):
            path.unlink()


# -- the disk


def fill_disk(chaos: Chaos, chance: random.Random) -> None:
    """Others take the rest of the disk, for a while."""
    left, length_s = chance.choice((0, 0, MIB // 2, 5 * MIB)), chance.uniform(0.3, 3.0)
    ballast = chaos.node.cache / "ballast"
    try:
        with ballast.open("wb") as file:
            for part in (8 * MIB, MIB, PAGE_BYTES):
                with contextlib.suppress(OSError):
                    while os.fstatvfs(file.fileno()).f_bavail * PAGE_BYTES >= left + part:
                        size = os.fstat(file.fileno()).st_size
                        os.posix_fallocate(file.fileno(), size, part)
        chaos.wait(length_s)
    finally:
        ballast.unlink(missing_ok=True)


def disk_read_only(chaos: Chaos, chance: random.Random) -> None:
    """The file system becomes read-only, because of an error or by a mount."""
    length_s, covers = chance.uniform(0.3, 6.0), chance.random() < 0.5
    disk = disk_of(chaos)
    with chaos.timeline.during(verdict.READ_ONLY):
        if covers:
            with disk.covered():
                chaos.wait(length_s)
        else:
            try:
                disk.become_read_only()
                chaos.wait(length_s)
            finally:
                replace(chaos, disk)


def disk_fails(chaos: Chaos, chance: random.Random) -> None:
    """Reads of the disk, or writes to it, end with EIO. It recovers by itself. If the errors have
    broken its file system, the lane replaces it."""
    kinds = chance.choice((["read"], ["write"], ["read", "write"], ["read", "write"]))
    length_s = chance.uniform(0.3, 3.0)
    if chaos.long and chance.random() < 0.4:
        length_s = 8.0  # ext4 writes its journal each 5 s
    replaces = chance.random() < 0.3
    disk = disk_of(chaos)
    with chaos.timeline.during(verdict.DISK_FAILS):
        try:
            with disk.failing(kinds):
                forget(chaos, chance)
                chaos.wait(length_s)
        finally:
            if replaces or not disk.is_writable():
                replace(chaos, disk)


def disk_hangs(chaos: Chaos, chance: random.Random) -> None:
    """It does not answer for a while, less than until a daemon that waits for it counts as stuck.
    Then it does all that it was told."""
    length_s = chance.uniform(0.3, 3.0)
    if chaos.long and chance.random() < 0.3:
        length_s = chaos.node.config.read_deadline_s * chance.uniform(1.1, 1.4)
    disk = disk_of(chaos)
    with chaos.timeline.during(verdict.DISK_HANGS), disk.hanging():
        chaos.wait(length_s)


def replace(chaos: Chaos, disk: Disk) -> None:
    """Replace the disk. Files on it are lost."""
    with chaos.timeline.during(verdict.REPLACED):
        disk.replace()


def disk_of(chaos: Chaos) -> Disk:
    """The cache's."""
    assert chaos.node.disk is not None
    return chaos.node.disk


STORE: dict[str, tuple[int, Action]] = {
    kind: (1, store_fault(kind)) for kind in (*FAULTS, *TLS_FAULTS)
}
NODE: dict[str, tuple[int, Action]] = {
    "kill daemon": (6, kill_daemon),
    "crash daemon": (2, terminate_daemon_by_segv),
    "crash loop": (1, crash_loop),
    "stop daemon": (3, stop_daemon),
    "daemon stuck": (1, stop_daemon_for_good),
    "kill keeper": (1, kill_keeper),
    "kill worker": (4, kill_worker),
    "stop worker": (2, stop_worker),
    "starve worker": (2, starve_worker),
    "kill reader": (4, kill_reader),
    "kill sender": (6, kill_sender),
    "pin": (3, pin),
    "detach by force": (3, detach_by_force),
    "prefetch": (3, prefetch),
    "overwrite": (8, overwrite),
    "change metadata": (3, change_metadata),
    "damage": (6, damage),
    "forget": (4, forget),
    "remove cached": (2, remove_cached),
}
DISK: dict[str, tuple[int, Action]] = {
    "fill disk": (3, fill_disk),
    "disk read-only": (2, disk_read_only),
    "disk fails": (3, disk_fails),
    "disk hangs": (2, disk_hangs),
}
UPLOADS: dict[str, tuple[int, Action]] = {"upload": (1, upload)}
BACKGROUND: dict[str, tuple[int, Action]] = {"background upload": (1, upload_in_background)}
LANES = {
    "store": STORE,
    "node": NODE,
    "disk": DISK,
    "uploads": UPLOADS,
    "background": BACKGROUND,
    "background beside it": BACKGROUND,
}
"""The actions of each lane, with weights: how often each comes."""
UPLOADING = {"uploads", "background", "background beside it"}
"""The lanes whose actions take longer than others, because an upload is tried several times."""

SLOW = {"daemon stuck"}
"""Actions that take more than 10 s each: not in a short run."""
