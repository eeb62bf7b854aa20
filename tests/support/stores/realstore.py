"""Real stores of all kinds, behind one interface: how tests write to them, and how ckptfs reads.

Each is a context manager. Tests write to the server itself; ckptfs comes through a proxy, which
counts requests and makes them fail. Where the server has TLS, so has the proxy.
"""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import quote

from support.faultproxy import Proxy

import ckptfs

if TYPE_CHECKING:
    from typing_extensions import Self

BUCKET = "bucket"
SEED = 20


class RealStore:
    """One bucket (container, directory) of a server.

    Attributes:
        has_mount: Another process can read it, so it can be mounted.
        has_address: A user can type where it is.
        has_table: It can be a named store.
        has_keys: The server looks at credentials.
        is_writable: ckptfs can write metadata to it.
        has_versions: The server tells apart two versions of one size that were written within one
            second, by an ETag or a time.
        lacks: Characters that no name there can have.
        hides_dots: Its listings leave out names that begin with a dot.
        small_file_requests: Most requests for a file that one request can bring.
        refusals: The faults of `wronganswers` that are how such a server refuses credentials.
    """

    name: ClassVar[str]
    has_mount = True
    has_address = True
    has_table = True
    has_keys = False
    is_writable = True
    has_versions = True
    lacks = ""
    hides_dots = False
    small_file_requests = 1
    refusals: tuple[str, ...] = ("denied", "s3 expired")
    proxy: Proxy | None = None

    def __init__(self) -> None:
        self._cleanup = ExitStack()

    @property
    def environment(self) -> dict[str, str]:
        """Variables that the daemon and the clients need."""
        return {}

    @property
    def secrets(self) -> tuple[str, ...]:
        """Texts that must never be shown."""
        return ()

    @property
    def secret_environment(self) -> dict[str, str]:
        """Variables that hold the credentials."""
        return {}

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ckptfs-r-")))
            self.start(stack)
            self._cleanup = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    def start(self, stack: ExitStack) -> None:
        """Start servers. Raises serverbase.Missing."""
        raise NotImplementedError

    def put(self, key: str, data: bytes) -> None:
        """Write an object, or write it anew."""
        raise NotImplementedError

    def age(self, key: str) -> None:
        """Make an object look old, where a young one is read more carefully."""

    def delete(self, key: str) -> None:
        """Delete an object."""
        raise NotImplementedError

    def get(self, key: str) -> bytes:
        """An object as the server has it."""
        raise NotImplementedError

    def address(self, path: str) -> str:
        """The URI that a user types for the directory `path`, with the credentials."""
        raise NotImplementedError

    def table(self, name: str, path: str) -> str:
        """The table of a named store that begins at `path`, with the credentials."""
        raise NotImplementedError

    def table_address(self, path: str) -> str:
        """The address that a user types for the directory in the named store `main`, the bucket."""
        return f"main:{path}"

    def with_wrong_keys(self, path: str) -> ckptfs.Checkpoint:
        """The directory, by credentials that the server does not take."""
        raise NotImplementedError

    def checkpoint(self, path: str) -> ckptfs.Checkpoint:
        """The directory `path`."""
        return ckptfs.Checkpoint(self.address(path))

    def traffic(self) -> list[dict[str, Any]]:
        """The requests since the last `reset_traffic`."""
        assert self.proxy
        return self.proxy.ask({"traffic": "all"})["traffic"]

    def reset_traffic(self) -> None:
        assert self.proxy
        self.proxy.ask({"traffic": "reset"})

    def break_down(self, *faults: dict[str, Any]) -> None:
        """Let faults begin; without any, let them end. See `faultproxy`."""
        assert self.proxy
        self.proxy.ask({"faults": faults})

    def _serve(self, stack: ExitStack, upstream: str, pem: Path | None = None) -> None:
        """Start the proxy."""
        pems = [] if pem is None else [pem, pem]
        self.proxy = stack.enter_context(Proxy(upstream, SEED, pems))

    def secret_file(self, values: dict[str, str]) -> Path:
        """A file of credentials, for a table."""
        path = self.folder / "secrets.json"
        path.touch(0o600)
        path.write_text(json.dumps(values))
        return path


class OnDisk(RealStore):
    """A store that shows the files of a folder. `root` holds the bucket."""

    root: Path

    def put(self, key: str, data: bytes) -> None:
        path = self.root / BUCKET / key
        path.parent.mkdir(parents=True, exist_ok=True)
        new = self.folder / "new"
        new.write_bytes(data)
        new.chmod(0o644)
        new.rename(path)  # no request finds half of it

    def age(self, key: str) -> None:
        path = self.root / BUCKET / key
        mtime_s = path.stat().st_mtime - 60
        os.utime(path, (mtime_s, mtime_s))

    def delete(self, key: str) -> None:
        (self.root / BUCKET / key).unlink()

    def get(self, key: str) -> bytes:
        return (self.root / BUCKET / key).read_bytes()


class Local(OnDisk):
    """A directory of this machine."""

    name = "local"

    def start(self, stack: ExitStack) -> None:
        self.root = self.folder / "root"
        (self.root / BUCKET).mkdir(parents=True)

    def address(self, path: str) -> str:
        return f"file://{quote(f'{self.root}/{BUCKET}/{path}')}"

    def table(self, name: str, path: str) -> str:
        return f'\n[store.{name}]\nuri = "{self.address(path)}"\n'


class Memory(RealStore):
    """fsspec's memory, which only this process sees: its checkpoints are copied."""

    name = "memory"
    has_mount = False
    has_address = False
    has_table = False

    def start(self, stack: ExitStack) -> None:
        from fsspec.implementations.memory import MemoryFileSystem

        self._filesystem = MemoryFileSystem()
        stack.callback(self._filesystem.rm, f"/{BUCKET}", recursive=True)
        self._filesystem.mkdir(f"/{BUCKET}")

    def put(self, key: str, data: bytes) -> None:
        self._filesystem.pipe_file(f"/{BUCKET}/{key}", data)

    def delete(self, key: str) -> None:
        self._filesystem.rm_file(f"/{BUCKET}/{key}")

    def get(self, key: str) -> bytes:
        return self._filesystem.cat_file(f"/{BUCKET}/{key}")

    def checkpoint(self, path: str) -> ckptfs.Checkpoint:
        return ckptfs.Checkpoint(f"/{BUCKET}/{path}", filesystem=self._filesystem)
