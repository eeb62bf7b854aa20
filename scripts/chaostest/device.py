"""The files that the small disk's loop device is on, in a FUSE file system that fails when told to.

A process of its own: `python device.py MOUNTPOINT FOLDER`. The file system has one file
for each disk there was, named 0, 1 and so on; what is in them is in files of that name in FOLDER.
It takes one JSON object per line on standard input and answers each with a line: `{"fail": ["read",
"write"]}` lets these operations end with EIO, `{"fail": []}` ends that, `{"hang": true}` lets all
wait until `{"hang": false}`, and `{"gone": "0"}` takes a disk away for good: all that is still done
to it is EIO. An answer says how many operations have failed so far, of each kind.

So a block device returns what a disk returns that is broken, also where the kernel has no device
mapper for that.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import stat
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyfuse3
import trio

if TYPE_CHECKING:
    from pyfuse3 import FileHandleT, FileNameT, FlagT, InodeT, RequestContext

PR_SET_IO_FLUSHER = 57
"""prctl(2): who stands between the kernel and a disk must not wait for that disk when it asks for
memory."""


class Images(pyfuse3.Operations):
    """The files of `folder`. An inode is a name's number and 2."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        self._fds: dict[int, int] = {}
        self._gone: set[int] = set()
        self._failing: set[str] = set()
        self._failed: Counter[str] = Counter()
        self._goes_on = trio.Event()
        self._goes_on.set()

    def command(self, said: dict[str, Any]) -> dict[str, Any]:
        """Carry out a command; returns the answer."""
        if "fail" in said:
            self._failing = set(said["fail"])
        if said.get("hang"):
            self._goes_on = trio.Event()
        elif "hang" in said:
            self._goes_on.set()
        if "gone" in said:
            inode = int(said["gone"]) + 2
            self._gone.add(inode)
            os.truncate(self._folder / said["gone"], 0)
        return {"failed": self._failed}

    async def _wait_or_refuse(self, inode: int, kind: str) -> None:
        await self._goes_on.wait()
        if inode in self._gone or kind in self._failing:
            self._failed[kind] += 1
            raise pyfuse3.FUSEError(errno.EIO)

    def _attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_mode = stat.S_IFDIR | 0o700 if inode == pyfuse3.ROOT_INODE else 0o600
        if inode != pyfuse3.ROOT_INODE:
            entry.st_mode = stat.S_IFREG | 0o600
            entry.st_size = os.stat(self._folder / str(inode - 2)).st_size
        return entry

    async def lookup(
        self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext
    ) -> pyfuse3.EntryAttributes:
        try:
            return self._attributes(int(name) + 2)
        except (ValueError, OSError):
            raise pyfuse3.FUSEError(errno.ENOENT) from None

    async def getattr(self, inode: InodeT, ctx: RequestContext) -> pyfuse3.EntryAttributes:
        return self._attributes(inode)

    async def open(self, inode: InodeT, flags: FlagT, ctx: RequestContext) -> pyfuse3.FileInfo:
        if inode not in self._fds:
            self._fds[inode] = os.open(self._folder / str(inode - 2), os.O_RDWR)
        # Not through the page cache: what is there cannot fail.
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(inode), direct_io=True)

    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes:
        await self._wait_or_refuse(fh, "read")
        return os.pread(self._fds[fh], size, off)

    async def write(self, fh: FileHandleT, off: int, buf: bytes) -> int:
        await self._wait_or_refuse(fh, "write")
        return os.pwrite(self._fds[fh], buf, off)

    async def fsync(self, fh: FileHandleT, datasync: bool) -> None:
        await self._wait_or_refuse(fh, "write")


async def serve(images: Images) -> None:
    """Until standard input ends."""

    async def obey() -> None:
        async with trio.lowlevel.FdStream(os.dup(0)) as stream:
            left = b""
            async for data in stream:
                *lines, left = (left + data).split(b"\n")
                for line in lines:
                    print(json.dumps(images.command(json.loads(line))), flush=True)
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(obey)
        await pyfuse3.main()


def main() -> None:
    mountpoint, folder = sys.argv[1:]
    with suppress(OSError):
        ctypes.CDLL(None).prctl(PR_SET_IO_FLUSHER, 1)
    images = Images(Path(folder))
    pyfuse3.init(images, mountpoint, {"fsname=chaos-disk", "default_permissions"})
    try:
        trio.run(serve, images)
    finally:
        pyfuse3.close(unmount=True)


if __name__ == "__main__":
    main()
