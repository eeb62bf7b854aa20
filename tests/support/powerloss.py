"""A model of a disk after a power loss, which records the cache's operations.

`Recorder` notes every operation that changes the disk while it also happens. `image` then writes a
directory as it may be found after a crash at some moment: what is older than a while has reached
the disk, and of what is younger

- each name (a file or folder made, renamed, removed) and each length may be there or not: in order
  up to some moment, or any of them alone, as the file system likes;
- each piece of data may be there, or be what was there before, zeros, garbage, or bytes that belong
  to another place.
"""

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ckptfs._daemon.cache import disk_ops

_SECTOR_BYTES = 4096


class Event(NamedTuple):
    """One change. `target` is a path below the cache's directory, or the number of a file."""

    what: str
    target: Any
    value: Any = None
    data: bytes = b""


class Recorder:
    """The journal of all changes so far. `mark` puts a note of the test's into it."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._files = 0
        self._by_path: dict[str, int] = {}
        self._by_fd: dict[int, int] = {}

    def mark(self, note: Any) -> None:
        """Note what is to be known at a crash from here on."""
        self.events.append(Event("mark", note))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record while the context lasts."""
        with pytest.MonkeyPatch.context() as patch:
            for name in ("make_folder", "rename", "remove", "remove_empty", "open_file", "close"):
                patch.setattr(disk_ops, name, self._around(name, getattr(disk_ops, name)))
            for name in ("set_size", "write", "write_direct", "punch"):
                patch.setattr(disk_ops, name, self._around(name, getattr(disk_ops, name)))
            yield

    def _around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        note = getattr(self, f"_{name}")

        def call(*args: Any) -> Any:
            result = function(*args)
            note(result, *args)
            return result

        return call

    @staticmethod
    def _name(path: Path) -> str:
        """Below the directory of the cache, whose own name is /proc/self/fd/<n>."""
        return "/".join(path.parts[5:]) if path.parts[1] == "proc" else path.name

    def _make_folder(self, _: Any, path: Path) -> None:
        self.events.append(Event("folder", self._name(path)))

    def _rename(self, _: Any, source: Path, target: Path) -> None:
        old, new = self._name(source), self._name(target)
        self.events.append(Event("rename", old, new))
        for path in [path for path in self._by_path if path == old or path.startswith(old + "/")]:
            self._by_path[new + path[len(old) :]] = self._by_path.pop(path)

    def _remove(self, _: Any, path: Path) -> None:
        name = self._name(path)
        self.events.append(Event("remove", name))
        for path_ in [p for p in self._by_path if p == name or p.startswith(name + "/")]:
            del self._by_path[path_]

    def _remove_empty(self, _: Any, path: Path) -> None:
        self.events.append(Event("remove", self._name(path)))

    def _open_file(self, fd: int, path: Path, flags: int) -> None:
        name = self._name(path)
        if name not in self._by_path:
            if not flags & os.O_CREAT:
                return
            self._files += 1
            self._by_path[name] = self._files
            self.events.append(Event("file", self._files, name))
        elif flags & os.O_TRUNC:
            self.events.append(Event("size", self._by_path[name], 0))
        self._by_fd[fd] = self._by_path[name]

    def _close(self, _: Any, fd: int) -> None:
        self._by_fd.pop(fd, None)

    def _set_size(self, _: Any, fd: int, size: int) -> None:
        self.events.append(Event("size", self._by_fd[fd], size))

    def _write(self, count: int, fd: int, data: Any, offset: int) -> None:
        self.events.append(Event("write", self._by_fd[fd], offset, bytes(data[:count])))

    _write_direct = _write

    def _punch(self, _: Any, fd: int, offset: int, length: int) -> None:
        self.events.append(Event("punch", self._by_fd[fd], (offset, length)))


class _Image:
    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.names: dict[str, int] = {}  # path -> file; 0: a folder
        self.files: dict[int, bytearray] = {}

    def apply(self, event: Event) -> None:
        """Let it reach the disk."""
        what, target, value, data = event
        if what == "folder":
            self.names[target] = 0
        elif what == "file":
            self.names[value] = target
            self.files.setdefault(target, bytearray())
        elif what == "rename" and target in self.names:
            for path in self._below(target):
                self.names[value + path[len(target) :]] = self.names.pop(path)
        elif what == "remove":
            for path in self._below(target):
                del self.names[path]
        elif what == "size":
            file = self.files.setdefault(target, bytearray())
            del file[value:]
            file.extend(bytes(value - len(file)))
        elif what == "write":
            self.put(target, value, data)
        elif what == "punch":
            offset, length = value
            size = len(self.files.get(target, b""))
            self.put(target, offset, bytes(max(0, min(length, size - offset))))

    def _below(self, top: str) -> list[str]:
        return [path for path in self.names if path == top or path.startswith(top + "/")]

    def put(self, target: int, offset: int, data: bytes) -> None:
        file = self.files.setdefault(target, bytearray())
        if len(file) < offset + len(data):
            file.extend(bytes(offset + len(data) - len(file)))
        file[offset : offset + len(data)] = data

    def apply_part(self, event: Event) -> None:
        """Let some pieces of a write reach the disk, and others not, or as something else."""
        data, start = event.data, 0
        while start < len(data):
            length = self.chance.choice([_SECTOR_BYTES, 16 * _SECTOR_BYTES, len(data)])
            piece = data[start : start + length]
            fate = self.chance.random()
            if fate < 0.3:
                piece = b""
            elif fate < 0.4:
                piece = bytes(len(piece))
            elif fate < 0.45:
                piece = self.chance.randbytes(len(piece))
            elif fate < 0.5 and self.files:
                other = self.chance.choice(list(self.files.values()))
                piece = bytes(other[: len(piece)])
            self.put(event.target, event.value + start, piece)
            start += length


def image(events: list[Event], chance: random.Random, directory: Path) -> Any:
    """Make `directory` as it may be found after a crash; returns the last mark before it."""
    crash = chance.randrange(1, len(events) + 1)
    durable = max(0, crash - chance.choice([3, 10, 40, crash]))
    ordered = chance.choice([0, chance.randrange(durable, crash + 1)])
    result, mark = _Image(chance), None
    for number, event in enumerate(events[:crash]):
        if event.what == "mark":
            mark = event.target
        elif number < durable:
            result.apply(event)
        elif event.what == "write":
            result.apply_part(event)
        elif number < ordered if ordered else chance.random() < 0.6:
            result.apply(event)
    directory.mkdir(mode=0o700)
    for path, file in sorted(result.names.items()):
        target = directory / path
        if file == 0:
            target.mkdir(mode=0o700, parents=True, exist_ok=True)
        elif target.parent.is_dir():
            target.write_bytes(result.files[file])
            target.chmod(0o600)
    return mark
