"""A reader: `python -m chaostest.reader JSON`. It takes leases and does in them what jobs do.

It goes on until it is killed. `role`: "reader", or "scribe", which changes a checkpoint's metadata
and looks whether it is so.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import random
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chaostest.board import Board
from chaostest.content import MIB, Contents, File
from chaostest.watch import Handle, Lease, OperationFailed, Watch
from ckptfs import Checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator

PR_SET_PDEATHSIG = 1
READ_BYTES = (4096, 65536, 262144, MIB)
SCRIBES = "run"
"""The checkpoint whose metadata the scribe changes. Other programs change that of "model"."""

NOTED = "model"
STATED = ("state", "size", "cached", "version", "uri")


class Reader:
    """The state that a reader needs in each operation."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.chance = random.Random(job["chance"])
        self.contents = Contents(job["seed"])
        self.board = Board(Path(job["board"]), len(self.contents.files))
        self.watch = Watch(self.contents, self.board, job["slot"], Path(job["log"]))
        self.uris: dict[str, str] = job["uris"]
        self.clock_s: float = job["clock_s"]

    def run(self) -> None:
        """Take leases for ever."""
        habits = (
            *(self.read_through, self.read_through, self.read_here_and_there),
            *(self.read_mapped, self.load_tensors, self.look, self.look, self.steer),
        )
        while True:
            checkpoint = self.chance.choice(list(self.uris))
            self.watch.tell_counts()
            try:
                with self.lease(checkpoint) as lease:
                    for _ in range(self.chance.randint(1, 8)):
                        self.do_one(self.chance.choice(habits), lease)
            except OperationFailed:
                time.sleep(0.1)  # where nothing goes, no process shall take all of the machine

    def do_one(self, habit: Any, lease: Lease) -> None:
        """One habit in a lease; when it has failed, the lease may still be good."""
        files = self.contents.checkpoints[lease.checkpoint]
        try:
            habit(lease, self.chance.choice(files))
        except OperationFailed:
            if self.chance.random() < 0.5:
                raise

    @contextmanager
    def lease(self, checkpoint: str) -> Iterator[Lease]:
        """Attach, and let go at the end."""
        lease = Lease(checkpoint, time.monotonic())
        context = Checkpoint(self.uris[checkpoint]).as_directory(mode="mount")
        path = self.watch.do("attach", context.__enter__, lease=lease)
        assert path is not None
        lease.path = path
        try:
            since = self.attribute(lease, "", "attached")
            lease.attached_s = json.loads(since)["since"] - self.clock_s
            yield lease
        finally:
            os.chdir("/")
            self.watch.do("let go", context.__exit__, None, None, None, lease=lease)

    @contextmanager
    def open(self, lease: Lease, file: File, *, relative: bool = False) -> Iterator[Handle]:
        """Open a file of the lease."""
        path = file.name if relative else f"{lease.path}/{file.name}"
        fd = self.watch.do("open", os.open, path, os.O_RDONLY, lease=lease, file=file)
        assert fd is not None
        handle = Handle(lease, file, fd)
        try:
            yield handle
        finally:
            self.watch.do("close", os.close, fd, lease=lease, file=file)

    def read(self, handle: Handle, offset: int, length: int) -> bytes:
        """Read once, and check it."""
        data = self.watch.do(
            *("read", os.pread, handle.fd, length, offset),
            lease=handle.lease,
            file=handle.file,
            length=length,
        )
        assert data is not None
        self.watch.check(handle, offset, data)
        if not data and handle.version is not None:
            size = self.contents.size(handle.file, handle.version)
            if offset < size:
                self.watch.check_end(handle, offset)
        return data

    # -- habits

    def read_through(self, lease: Lease, file: File) -> None:
        """From start to end, at times by a name relative to the working directory."""
        relative = self.chance.random() < 0.3
        if relative:
            self.watch.do("chdir", os.chdir, lease.path, lease=lease)
        length = self.chance.choice(READ_BYTES[1:])
        with self.open(lease, file, relative=relative) as handle:
            offset = 0
            while data := self.read(handle, offset, length):
                offset += len(data)
                if self.chance.random() < 0.02:  # the kernel forgets what it has of the file
                    os.posix_fadvise(handle.fd, 0, 0, os.POSIX_FADV_DONTNEED)
            self.watch.check_end(handle, offset)

    def read_here_and_there(self, lease: Lease, file: File) -> None:
        """Small and large pieces at any place, also past the end."""
        with self.open(lease, file) as handle:
            if self.chance.random() < 0.5:
                os.posix_fadvise(handle.fd, 0, 0, os.POSIX_FADV_DONTNEED)
            for _ in range(self.chance.randint(1, 30)):
                offset = self.chance.randrange(file.bytes + 1)
                self.read(handle, offset, self.chance.choice((1, 100, *READ_BYTES)))

    def read_mapped(self, lease: Lease, file: File) -> None:
        """By page faults. One that fails is a SIGBUS, which ends the process."""
        with self.open(lease, file) as handle:
            size = self.watch.do("stat", os.fstat, handle.fd, lease=lease, file=file)
            assert size is not None
            if not size.st_size:
                return
            self.watch.maps(lease, file)
            with mmap.mmap(handle.fd, 0, prot=mmap.PROT_READ) as mapped:
                for _ in range(self.chance.randint(1, 10)):
                    offset = self.chance.randrange(size.st_size)
                    length = self.chance.choice(READ_BYTES)
                    data = self.watch.do(
                        "fault",
                        lambda start, stop: mapped[start:stop],
                        offset,
                        offset + length,
                        lease=lease,
                        file=file,
                        length=length,
                    )
                    assert data is not None
                    self.watch.check(handle, offset, data)

    def load_tensors(self, lease: Lease, file: File) -> None:
        """As safetensors does: the header, then tensors, one after the other or some of them."""
        if not file.tensors:
            return
        with self.open(lease, file) as handle:
            self.read(handle, 0, 8)
            self.read(handle, 8, len(file.head) - 8)
            tensors = list(file.tensors)
            if self.chance.random() < 0.5:
                tensors = self.chance.sample(tensors, self.chance.randint(1, len(tensors)))
            for start, stop in tensors:
                offset = start
                while offset < stop:
                    offset += len(self.read(handle, offset, min(MIB, stop - offset)))

    def look(self, lease: Lease, file: File) -> None:
        """Names, sizes and attributes; what must not work; and the metadata that others change."""
        do, path = self.watch.do, f"{lease.path}/{file.name}"
        names = do("listdir", os.listdir, lease.path, lease=lease)
        files = self.contents.checkpoints[lease.checkpoint]
        expected = {each.name.partition("/")[0] for each in files}
        if names is not None and set(names) - {".metadata.json"} != expected:
            text = f"{sorted(names)} and not {sorted(expected)}"
            self.watch.tell(
                "names", text=text, checkpoint=lease.checkpoint, told_s=time.monotonic()
            )
        found = do("stat", os.stat, path, lease=lease, file=file)
        if found is not None:
            self.watch.check_end(Handle(lease, file, -1), found.st_size)
        do("listxattr", os.listxattr, path, lease=lease, file=file)
        self.attribute(lease, file.name, self.chance.choice(STATED))
        if file.tensors and self.chance.random() < 0.3:
            self.attribute(lease, file.name, "tensors", (errno.ENODATA,), file)
        absent = f"{path}.absent"
        do("absent", os.stat, absent, lease=lease, expected=(errno.ENOENT, errno.ENOTDIR))
        fd = do("write", os.open, path, os.O_RDWR, lease=lease, expected=(errno.EROFS,))
        if fd is not None:
            os.close(fd)
            self.watch.tell("allowed", text="a file was opened for writing")
        do("statvfs", os.statvfs, lease.path, lease=lease)
        if lease.checkpoint == NOTED:
            self.look_at_note(lease)

    def look_at_note(self, lease: Lease) -> None:
        """Changes of the metadata by other programs show after a second."""
        written_s, value = self.board.note()
        start_s = time.monotonic()
        seen = self.attribute(lease, "", "meta.note", expected=(errno.ENODATA,))
        if value and written_s < start_s - 1.2 and int(seen or 0) < value:
            self.watch.tell(
                *("old note",),
                text=f"the metadata says {seen or 'nothing'}, others wrote {value} "
                f"{start_s - written_s:.1f} s before",
                written_s=written_s,
                told_s=time.monotonic(),
                checkpoint=lease.checkpoint,
                lease_s=lease.began_s,
            )

    def steer(self, lease: Lease, file: File) -> None:
        """Begin to fetch a file, or drop it."""
        name = self.chance.choice(("prefetch", "evict"))
        path = f"{lease.path}/{file.name}"
        arguments = path, f"user.ckptfs.{name}", b"1"
        expected = (errno.EBUSY,)
        self.watch.do(name, os.setxattr, *arguments, lease=lease, file=file, expected=expected)

    def attribute(
        self,
        lease: Lease,
        name: str,
        attribute: str,
        expected: tuple[int, ...] = (),
        file: File | None = None,
    ) -> bytes:
        """An attribute's value; b"" for an errno that is expected."""
        kind = attribute if attribute == "tensors" else attribute.partition(".")[0]
        operation = {"tensors": "tensors", "meta": "metadata"}.get(kind, "attribute")
        path = f"{lease.path}/{name}"
        found = self.watch.do(
            *(operation, os.getxattr, path, f"user.ckptfs.{attribute}"),
            lease=lease,
            file=file,
            expected=expected,
        )
        return found or b""

    # -- the scribe

    def write_metadata(self) -> None:
        """Change the metadata for ever, and look whether it is so."""
        value, known = 0, {}
        while True:
            self.watch.tell_counts()
            try:
                with self.lease(SCRIBES) as lease:
                    for _ in range(self.chance.randint(1, 20)):
                        value += 1
                        self.write_once(lease, f"k{self.chance.randrange(4)}", value, known)
                        time.sleep(self.chance.random() * 0.3)
            except OperationFailed:
                time.sleep(0.1)

    def write_once(self, lease: Lease, key: str, value: int, known: dict[str, set[int]]) -> None:
        """Set a key, by attribute or by the API; `known` are the values that it may have."""
        before = known.get(key, {0})
        known[key] = before | {value}
        start_s = time.monotonic()
        if self.chance.random() < 0.3:
            change = Checkpoint(self.uris[lease.checkpoint]).update_metadata
            self.watch.do("update metadata", change, {key: value}, lease=lease)
        else:
            arguments = lease.path, f"user.ckptfs.meta.{key}", str(value).encode()
            self.watch.do("set metadata", os.setxattr, *arguments, lease=lease)
        known[key] = {value}
        absent = (errno.ENODATA,)
        seen = int(self.attribute(lease, "", f"meta.{key}", expected=absent) or 0)
        if seen not in known[key]:
            self.watch.tell(
                *("old note",),
                text=f"{key} was set to {value}, and is {seen} right after",
                written_s=start_s,
                told_s=time.monotonic(),
                checkpoint=lease.checkpoint,
                lease_s=lease.began_s,
            )


def main() -> None:
    job = json.loads(sys.argv[1])
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # prctl(2)
    os.chdir("/")
    reader = Reader(job)
    if job["role"] == "scribe":
        reader.write_metadata()
    else:
        reader.run()


if __name__ == "__main__":
    main()
