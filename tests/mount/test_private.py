"""Filesystems that cannot be described: a daemon of one's own, which leaves nothing, or a copy."""

import os
import re
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import Node, daemons, mounts, wait_until
from pyarrow import fs as pafs

import ckptfs

pytestmark = pytest.mark.mount

MODULE = """
import io
from pyarrow import fs
from fsspec.implementations.local import LocalFileSystem

class OtherLocal(LocalFileSystem):
    '''Of fsspec, and none that is known.'''
    protocol = "otherlocal"

class Unpicklable(OtherLocal):
    cachable = False
    def __reduce__(self):
        raise TypeError("cannot pickle a socket")

class Handler(fs.FileSystemHandler):
    '''Of pyarrow: a directory in Python.'''
    def __init__(self, below):
        self.inner = fs.SubTreeFileSystem(below, fs.LocalFileSystem())
    def get_type_name(self):
        return "mine"
    def normalize_path(self, path):
        return path
    def get_file_info(self, paths):
        return self.inner.get_file_info(paths)
    def get_file_info_selector(self, selector):
        return self.inner.get_file_info(selector)
    def open_input_file(self, path):
        return self.inner.open_input_file(path)
    def open_input_stream(self, path):
        return self.inner.open_input_stream(path)

Handler.__abstractmethods__ = frozenset()
"""

HOLDER = """
import os, sys
os.chdir(os.path.dirname(sys.argv[1]))
sys.path.insert(0, os.path.basename(sys.argv[1]))  # a relative path, as programs have them, too
import my_filesystems
import ckptfs

top, how = sys.argv[2:]
checkpoint = ckptfs.Checkpoint(top, my_filesystems.OtherLocal())
with checkpoint.as_directory(mode="mount") as path:
    if how == "fork":
        child = os.fork()
        with checkpoint.as_directory(mode="mount") as again:
            os.write(1, f"{again}\\n".encode())  # at once: two processes write
            if not child:
                sys.stdin.readline()
                os._exit(0)
        os.waitpid(child, 0)
    print(path, open(path + "/config.json").read(), flush=True)
    sys.stdin.readline()
"""

IN_MAIN = """
import sys, warnings
from fsspec.implementations.local import LocalFileSystem
import ckptfs

class OfMain(LocalFileSystem):
    protocol = "ofmain"

checkpoint = ckptfs.Checkpoint(sys.argv[1], OfMain())
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    with checkpoint.as_directory() as path:
        print(open(path + "/config.json").read())
print(*[warning.message for warning in caught])
try:
    checkpoint.as_directory(mode="mount").__enter__()
except ckptfs.CannotMount as error:
    print(error)
"""


@pytest.fixture
def node(node: Node) -> Node:
    """A private daemon of this node ends after half a second of idleness."""
    node.configure(idle_exit_s=0.5)
    return node


@pytest.fixture
def modules(tmp_path: Path) -> Path:
    """A folder with a module of filesystems."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "my_filesystems.py").write_text(MODULE)
    return folder


@pytest.fixture
def top(tmp_path: Path) -> Path:
    """A checkpoint."""
    top = tmp_path / "run" / "ckpt"
    (top / "layers").mkdir(parents=True)
    (top / "config.json").write_text("{}")
    (top / "layers" / "weights").write_bytes(os.urandom(2_500_000))
    (top / "layers" / "empty").touch()
    return top


def files_in(top: "str | Path") -> dict[str, bytes]:
    return {str(p.relative_to(top)): p.read_bytes() for p in Path(top).rglob("*") if p.is_file()}


def private(folder: "str | Path" = "") -> list[Path]:
    """Directories of private daemons, alive or left behind."""
    return list(Path(folder or tempfile.gettempdir()).glob("ckptfs-private-*"))


def keepers() -> set[int]:
    return daemons(b"--private")


@contextmanager
def all_gone() -> Iterator[None]:
    """Nothing is left when the idle time is over."""
    yield
    wait_until(lambda: not daemons() and not private() and not mounts())


def test_a_private_daemon_leaves_nothing(
    node: Node, modules: Path, top: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(modules)
    import my_filesystems  # pyright: ignore[reportMissingImports]

    handler = my_filesystems.Handler(str(top.parent))
    checkpoint = ckptfs.Checkpoint("ckpt", pafs.PyFileSystem(handler))
    with all_gone():
        with checkpoint.as_directory(prefetch=["layers/*"], mode="mount") as path:
            [folder] = private()
            assert Path(path).parent == folder / "mnt"
            assert folder.stat().st_mode & 0o777 == 0o700
            wait_until(lambda: os.getxattr(path, "user.ckptfs.cached") == b"2500000")
            assert files_in(path) == files_in(top)
            with checkpoint.as_directory(mode="mount") as again:
                assert again == path
            assert len(keepers()) == 1
            assert os.getxattr(path, "user.ckptfs.uri") == b"private://ckpt"
        assert not node.socket.exists()  # the node's own daemon was not asked
    waiting = checkpoint.as_directory(prefetch="all", wait=True, mode="mount")
    with all_gone(), waiting as path:
        assert os.getxattr(path, "user.ckptfs.state") == b"cached"
        assert files_in(path) == files_in(top)
        assert ckptfs.explain(path) is None
    del sys.modules["my_filesystems"]


def test_forked_children_share_it_and_a_killed_process_lets_go(
    node: Node, modules: Path, top: Path
) -> None:
    with all_gone(), node.python(HOLDER, str(modules), str(top), "fork") as holder:
        assert holder.stdout
        assert holder.stdin
        first, second = holder.stdout.readline(), holder.stdout.readline()
        assert first == second != ""
        assert len(private()) == len(keepers()) == 1
        holder.stdin.write("child\n")
        holder.stdin.flush()
        assert holder.stdout.readline() == f"{first.strip()} {{}}\n"
        holder.kill()


def test_private_keeper_removes_the_remains_of_a_killed_one(
    node: Node, modules: Path, top: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the temporary folder is reached through a symlink."""
    scratch, link = node.folder / "tmp", node.folder / "link"
    scratch.mkdir()
    link.symlink_to(scratch)
    monkeypatch.setenv("TMPDIR", str(link))
    with node.python(HOLDER, str(modules), str(top), "plain") as holder:
        assert holder.stdout
        mounted = Path(holder.stdout.readline().split()[0])
        [folder] = private(scratch)
        assert folder.name == mounted.parent.parent.name
        [keeper] = keepers()
        os.kill(keeper, signal.SIGKILL)
        wait_until(lambda: not daemons())
        assert str(folder / "mnt") in mounts()
        holder.kill()
    with all_gone(), node.python(HOLDER, str(modules), str(top), "plain") as holder:
        assert holder.stdout
        assert holder.stdout.readline().endswith(" {}\n")
        assert folder not in private(scratch)
        assert len(private(scratch)) == 1
        assert str(folder / "mnt") not in mounts()
        holder.communicate("\n")
    assert list(scratch.iterdir()) == []


def test_a_class_that_no_other_process_can_import_is_copied(node: Node, top: Path) -> None:
    with all_gone(), node.python(IN_MAIN, str(top)) as process:
        content, warning, refusal, end = process.communicate()[0].split("\n")
    assert content == "{}"
    assert re.match(r"ckptfs copies the checkpoint \(.*\) to /.*: cannot mount ", warning)
    for text in (warning, refusal):
        assert "cannot be unpickled in another process" in text
        assert "OfMain" in text
        assert "define its class in a module that can be imported" in text
    assert end == ""


def test_filesystem_that_cannot_be_pickled_is_copied(
    node: Node, modules: Path, top: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(modules)
    import my_filesystems  # pyright: ignore[reportMissingImports]

    checkpoint = ckptfs.Checkpoint(str(top), my_filesystems.Unpicklable())
    with (
        pytest.warns(
            UserWarning,
            match=r"copies the checkpoint \(.*\) to /.*: a my_filesystems\.Unpicklable "
            r"cannot be mounted .*"
            r"and it cannot be pickled \(cannot pickle a socket\)",
        ),
        checkpoint.as_directory() as path,
    ):
        assert files_in(path) == files_in(top)
    with (
        pytest.raises(ckptfs.LocationError, match="and it cannot be pickled"),
        checkpoint.as_directory(mode="mount"),
    ):
        pass
    assert not daemons()
    del sys.modules["my_filesystems"]


def test_a_temporary_folder_whose_path_is_too_long_means_a_copy(
    node: Node, modules: Path, top: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(modules)
    import my_filesystems  # pyright: ignore[reportMissingImports]

    deep = tmp_path / ("long" * 30)
    deep.mkdir()
    monkeypatch.setenv("TMPDIR", str(deep))
    checkpoint = ckptfs.Checkpoint(str(top), my_filesystems.OtherLocal())
    with (
        pytest.warns(UserWarning, match="cannot mount: .* too long for a socket; set TMPDIR"),
        checkpoint.as_directory() as path,
    ):
        assert files_in(path) == files_in(top)
    assert list(deep.iterdir()) == []
    del sys.modules["my_filesystems"]
