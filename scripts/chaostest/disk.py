"""A small disk of the cache's own, which can get full, become read-only, fail and be replaced.

It is an ext4 on a loop device whose sectors are in `device`. The daemon's log, which is in the
cache's directory too, is a file elsewhere that is mounted there: it outlives the disk.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

DISK_BYTES = 192 << 20
COMMAND_TIMEOUT_S = 30
DEVICE = Path(__file__).with_name("device.py")


class Disk:
    """As a context manager: at the end nothing of it is left.

    Args:
        folder: For its files.
        at: Where it is mounted, a directory of this user's.
        log: The daemon's log.

    Raises:
        OSError, subprocess.SubprocessError: On entering, where this machine has no such disk.
    """

    def __init__(self, folder: Path, at: Path, log: Path) -> None:
        self._folder = folder
        self._at = at
        self._log = log
        self._serial = -1
        self._cleanup = ExitStack()

    def __enter__(self) -> Disk:
        with ExitStack() as stack:
            self._images = self._folder / "images"
            self._device = self._folder / "device"
            for path in (self._images, self._device):
                path.mkdir()
            self._log.touch(mode=0o600)
            stack.callback(self._end_device)
            command = [sys.executable, DEVICE, self._device, self._images]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
            )
            self._ask({})
            stack.callback(self._unmount)
            self._put_in()
            self._cleanup = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    # -- what goes wrong with it

    @contextlib.contextmanager
    def failing(self, kinds: Iterable[str]) -> Iterator[None]:
        """Operations of these kinds ("read", "write") end with EIO while the context lasts."""
        self._ask({"fail": list(kinds)})
        try:
            yield
        finally:
            self._ask({"fail": []})

    @contextlib.contextmanager
    def hanging(self) -> Iterator[None]:
        """It answers nothing while the context lasts."""
        self._ask({"hang": True})
        try:
            yield
        finally:
            self._ask({"hang": False})

    @contextlib.contextmanager
    def covered(self) -> Iterator[None]:
        """During the context, no process can open a file there for writing. Files that are open for
        writing stay so."""
        # A mount cannot become read-only once a process has opened a file there for writing. So it
        # does elsewhere, and a bind mount of it is read-only from its begin.
        aside = self._images / "read-only"
        aside.mkdir(exist_ok=True)
        _run("mount", "--bind", self._at, aside)
        try:
            _run("mount", "-o", "remount,bind,ro", aside)
            _run("mount", "--bind", aside, self._at)
        finally:
            _run("umount", "-l", aside)
        try:
            yield
        finally:
            _run("umount", "-l", self._at)

    def become_read_only(self) -> None:
        """As after an error that the file system has found in itself: until it is replaced."""
        source = _run("findmnt", "-n", "-o", "SOURCE", self._at).split()[-1]
        Path("/sys/fs/ext4", Path(source).name, "trigger_fs_error").write_text("1")

    def is_writable(self) -> bool:
        """Whether a file can be made there."""
        probe = self._at / "probe"
        try:
            probe.touch()
            probe.unlink()
        except OSError:
            return False
        return True

    def replace(self) -> None:
        """Take the disk out while processes use it, and put in an empty one without a fault."""
        self._unmount()
        self._ask({"gone": str(self._serial)})
        self._put_in()

    def failed(self) -> dict[str, int]:
        """How many operations have failed, by kind."""
        return self._ask({})["failed"]

    # -- how it is made

    def _put_in(self) -> None:
        self._serial += 1
        image = self._images / str(self._serial)
        with image.open("wb") as file:
            file.truncate(DISK_BYTES)
        _run("mkfs.ext4", "-q", "-m", "0", image)
        options = "loop,errors=remount-ro"
        _run("mount", "-o", options, self._device / str(self._serial), self._at)
        shutil.rmtree(self._at / "lost+found")
        self._at.chmod(0o700)
        log = self._at / "daemon.log"
        log.touch(mode=0o600)
        _run("mount", "--bind", self._log, log)

    def _unmount(self) -> None:
        while os.path.ismount(self._at):
            _run("umount", "-l", self._at)

    def _end_device(self) -> None:
        with self._process:
            assert self._process.stdin
            self._process.stdin.close()  # it ends then, and unmounts
            try:
                self._process.wait(COMMAND_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
        if os.path.ismount(self._device):
            _run("umount", "-l", self._device)

    def _ask(self, command: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise OSError("the disk's device has died")
        return json.loads(line)


def _run(*command: str | Path) -> str:
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S
    )
    return done.stdout
