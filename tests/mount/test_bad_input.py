"""Bad input raises a typed exception, prints one line on the terminal, and leaves nothing behind.

The tests also cover objects that change, and a store that goes away and comes back.
"""

import errno
import itertools
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from conftest import Node, mounts, wait_until
from pyarrow.fs import S3FileSystem
from support.s3server import S3Server
from support.servers import Forwarder

import ckptfs
from ckptfs._client import client

pytestmark = pytest.mark.mount

UriOf = Callable[[Path], str]

MIB = 1 << 20
ANSWER_S = 30.0
"""Every mistake is answered within this time, also on a machine that is busy with other tests. The
promise is 10 s, and follows from `store_timeout_s` and from the number of attempts, which
`test_an_endpoint_that_never_answers` counts."""


def attach_by_cli(uri: str) -> str:
    """The one line that ``ckptfs attach`` prints when it fails, in a process of its own."""
    command = [str(Path(sys.executable).with_name("ckptfs")), "attach", uri]
    return the_line(
        subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S, check=False)
    )


def attach_here(node: Node, uri: str) -> str:
    """The same without a process of its own."""
    return the_line(node.here("attach", uri, check=False))


def the_line(done: "subprocess.CompletedProcess[str]") -> str:
    assert (done.returncode, done.stdout) == (1, ""), done
    assert done.stderr.startswith("ckptfs: error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def attach_by_python(uri: str) -> tuple[str, str]:
    """Name and message of the exception."""
    try:
        with ckptfs.Checkpoint(uri).as_directory() as path:
            pytest.fail(f"{uri} was attached as {path}")
    except ckptfs.CkptfsError as error:
        return type(error).__name__, str(error)


def with_endpoint(uri: str, s3: S3Server, endpoint: str) -> str:
    return uri.replace(quote(s3.endpoint, safe=""), quote(endpoint, safe=""))


@pytest.fixture
def refused_endpoint() -> Iterator[str]:
    """A port on which no server listens; the bound socket keeps other processes off it."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{bound.getsockname()[1]}"


@pytest.fixture
def silent_server() -> Iterator[socket.socket]:
    """A server whose connections are made and wait to be accepted for ever."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as listening:
        listening.setblocking(False)
        yield listening


def connections_of(server: socket.socket) -> int:
    """How many connections were made to a silent server."""
    for count in itertools.count():
        try:
            server.accept()[0].close()
        except BlockingIOError:
            return count
    raise AssertionError


def test_mount_of_a_wrong_location_is_an_error(
    node: Node,
    s3: S3Server,
    small: Path,
    uri_of: UriOf,
    refused_endpoint: str,
    subtests: pytest.Subtests,
) -> None:
    good = uri_of(small)
    wrong_secret = "wrong-secret"
    cases = {
        "scheme": ("ftp://host/x", "LocationError", "unknown scheme; use s3://"),
        "relative": ("run/checkpoint", "LocationError", "path"),  # a shell's can be relative
        "empty": ("", "LocationError", "URI"),
        "newline": ("s3://a\nb/c", "LocationError", "check the URI"),
        "option": (good + "&color=red", "LocationError", "check the URI"),
        "bucket": (s3.uri("no-such-bucket/x"), "CheckpointNotFound", "no such bucket; check"),
        "path": (uri_of(small / "nothing"), "CheckpointNotFound", "check the path"),
        "file": (uri_of(small / "config.json"), "CheckpointIsFile", "name the directory"),
        "local path": ("/no/such/path", "CheckpointNotFound", "check the path"),
        "local file": ("file:///etc/passwd", "CheckpointIsFile", "directory"),
        "key": (good.replace(s3.access_key, "nobody"), "AccessDenied", "check the access key"),
        "secret": (
            good.replace(s3.secret_key, wrong_secret),
            "AccessDenied",
            "check the secret key",
        ),
        "refused": (
            with_endpoint(good, s3, refused_endpoint),
            "StoreUnavailable",
            "check the endpoint",
        ),
        "unresolvable": (
            with_endpoint(good, s3, "nowhere.invalid"),
            "StoreUnavailable",
            "check the endpoint",
        ),
    }
    slow = ("refused", "unresolvable")
    with ThreadPoolExecutor(len(slow)) as pool:
        lines = {name: pool.submit(attach_by_cli, cases[name][0]) for name in slow}
    for name, (uri, expected, remedy) in cases.items():
        with subtests.test(name):
            kind, message = attach_by_python(uri)
            assert kind == expected, message
            line = lines[name].result() if name in slow else attach_here(node, uri)
            for text in (message, line):
                assert remedy in text
                assert "\n" not in text.rstrip("\n")
                assert "Traceback" not in text
                assert s3.secret_key not in text
                assert wrong_secret not in text
    assert node.status()["attachments"] == []
    assert os.listdir(node.mount) == []
    assert s3.secret_key not in node.log()


def test_an_endpoint_that_never_answers(
    node: Node, s3: S3Server, small: Path, uri_of: UriOf, silent_server: socket.socket
) -> None:
    node.configure(store_timeout_s=0.5, attach_deadline_s=3)
    uri = with_endpoint(uri_of(small), s3, f"127.0.0.1:{silent_server.getsockname()[1]}")
    with ThreadPoolExecutor(1) as pool:
        line = pool.submit(attach_by_cli, uri)
        kind, message = attach_by_python(uri)
    assert "check the endpoint" in line.result()
    assert kind == "StoreTimeout"
    assert "gave no listing within 3 s" in message
    assert connections_of(silent_server) <= 2 * 2  # of two attaches, if they have not shared
    assert node.status()["attachments"] == []


def test_exceptions_are_builtin_ones_too(node: Node, small: Path, uri_of: UriOf) -> None:
    with pytest.raises(FileNotFoundError), ckptfs.Checkpoint(uri_of(small / "x")).as_directory():
        pass
    with (
        pytest.raises(NotADirectoryError),
        ckptfs.Checkpoint(uri_of(small / "empty")).as_directory(),
    ):
        pass
    with pytest.raises(ValueError, match="unknown scheme"):
        ckptfs.Checkpoint("ftp://host/x")


# -- a machine or a configuration that does not do


@contextmanager
def injected(node: Node, monkeypatch: pytest.MonkeyPatch, code: str) -> Iterator[None]:
    """Have every Python process that is started run `code` first."""
    (node.folder / "inject").mkdir()
    (node.folder / "inject" / "sitecustomize.py").write_text(code)
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", str(node.folder / "inject"))
        yield


NO_PYFUSE3 = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "pyfuse3" else find(name, *rest)
"""
NO_DEVICE = """
import os
plain = os.open
def opened(path, *rest, **options):
    if path == "/dev/fuse":
        raise FileNotFoundError(2, "No such file or directory", path)
    return plain(path, *rest, **options)
os.open = opened
"""


@pytest.mark.parametrize(
    ("code", "message"),
    [(NO_PYFUSE3, "install ckptfs with its extra 'daemon'"), (NO_DEVICE, "--device /dev/fuse")],
    ids=["no pyfuse3", "no /dev/fuse"],
)
def test_a_machine_that_cannot_mount(
    node: Node,
    small: Path,
    uri_of: UriOf,
    monkeypatch: pytest.MonkeyPatch,
    code: str,
    message: str,
) -> None:
    node.expected_in_log.append("cannot mount")
    with injected(node, monkeypatch, code):
        with (
            pytest.raises(ckptfs.CannotMount, match=message),
            ckptfs.Checkpoint(uri_of(small)).as_directory(mode="mount"),
        ):
            pass
        assert "cannot mount: " in attach_by_cli(uri_of(small))
    assert str(node.mount) not in mounts()
    assert not node.mount.exists()
    assert not node.socket.exists()


def test_no_permission_to_mount(node: Node) -> None:
    node.expected_in_log.append("cannot mount")
    command = str(Path(sys.executable).with_name("ckptfs"))
    without = ("setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin")
    done = node.run(*without, command, "mount", check=False)
    assert (done.returncode, done.stdout) == (1, "")
    [line] = done.stderr.splitlines()
    assert line.startswith("ckptfs: error: cannot mount on ")
    assert "CAP_SYS_ADMIN" in line
    assert not node.mount.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("linger_s = [", "not valid TOML"),
        ("linger = 1", "unknown key 'linger'; did you mean 'linger_s'"),
        ("color = 1", "unknown key 'color'; ckptfs help config lists all"),
        ('linger_s = "long"', "linger_s"),
        ("connections_max = 0", "connections_max"),
        ('mount = "here"', "mount must be an absolute path"),
        (b"linger_s = 1 # \xff", "ckptfs.toml"),
    ],
)
def test_a_wrong_configuration(
    node: Node,
    small: Path,
    uri_of: UriOf,
    monkeypatch: pytest.MonkeyPatch,
    text: str | bytes,
    message: str,
) -> None:
    raw = text if isinstance(text, bytes) else text.encode()
    monkeypatch.delenv("CKPTFS_MOUNT")
    (node.folder / "ckptfs.toml").write_bytes(raw)
    with (
        pytest.raises(ckptfs.ConfigError) as raised,
        ckptfs.Checkpoint(uri_of(small)).as_directory(),
    ):
        pass
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert message in attach_here(node, uri_of(small))


def test_a_missing_configuration(
    node: Node, small: Path, uri_of: UriOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CKPTFS_CONFIG", "/no/such/ckptfs.toml")
    line = attach_here(node, uri_of(small))
    assert "/no/such/ckptfs.toml" in line
    assert "CKPTFS_CONFIG must name a readable file" in line


def test_a_socket_path_that_is_too_long(
    node: Node, small: Path, uri_of: UriOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CKPTFS_SOCKET", str(node.folder / ("x" * 100)))
    with (
        pytest.raises(ckptfs.PlaceUnusable, match="set CKPTFS_SOCKET to a shorter path"),
        ckptfs.Checkpoint(uri_of(small)).as_directory(mode="mount"),
    ):
        pass
    with (
        pytest.warns(UserWarning, match="copies the checkpoint .* set CKPTFS_SOCKET to a shorter"),
        ckptfs.Checkpoint(uri_of(small)).as_directory() as path,
    ):
        assert Path(path, "config.json").read_bytes() == (small / "config.json").read_bytes()
    assert "107" in attach_here(node, uri_of(small))


# -- writing


def test_writing_is_erofs(node: Node, small: Path, uri_of: UriOf) -> None:
    with ckptfs.Checkpoint(uri_of(small)).as_directory() as path:
        file, folder, new = f"{path}/config.json", f"{path}/layers", f"{path}/new"
        writes: list[Callable[[], Any]] = [
            lambda: os.open(file, os.O_WRONLY),
            lambda: os.open(file, os.O_RDWR),
            lambda: os.open(file, os.O_RDONLY | os.O_TRUNC),
            lambda: os.open(file, os.O_WRONLY | os.O_APPEND),
            lambda: os.open(new, os.O_WRONLY | os.O_CREAT),
            lambda: os.open(new, os.O_RDONLY | os.O_CREAT),
            lambda: os.truncate(file, 0),
            lambda: os.mkdir(new),
            lambda: os.mkdir(f"{node.mount}/new"),
            lambda: os.mknod(new),
            lambda: os.symlink("x", new),
            lambda: os.link(file, new),
            lambda: os.unlink(file),
            lambda: os.rmdir(f"{folder}/0"),
            lambda: os.rename(file, new),
            lambda: os.chmod(file, 0o777),
            lambda: os.chown(file, 1, 1),
            lambda: os.chmod(folder, 0o777),
            lambda: os.utime(file),
            lambda: os.utime(path),
            lambda: os.rmdir(path),
            lambda: os.rename(path, f"{node.mount}/other"),
            lambda: os.setxattr(file, "user.ckptfs.state", b"cached"),
            lambda: os.removexattr(file, "user.ckptfs.state"),
        ]
        before = sorted(os.listdir(path)), sorted(small.rglob("*"))
        for write in writes:
            with pytest.raises(OSError, check=lambda error: error.errno == errno.EROFS):
                write()
        # The kernel asks for this with a request that libfuse does not know.
        with pytest.raises(OSError, check=lambda error: error.errno == errno.EOPNOTSUPP):
            os.open(path, os.O_WRONLY | os.O_TMPFILE)
        assert Path(file).read_text() == '{"layers": 1}'
        assert (sorted(os.listdir(path)), sorted(small.rglob("*"))) == before


# -- a store that goes away


def reopened(path: str, offset: int, length: int = 4096) -> bytes:
    """Bytes of a file that are not in the kernel's cache."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return os.pread(fd, length, offset)
    finally:
        os.close(fd)


def is_readable(path: str, offset: int) -> bool:
    try:
        return bool(reopened(path, offset))
    except OSError:
        return False


def attribute(path: str, name: str) -> str:
    return os.getxattr(path, f"user.ckptfs.{name}").decode()


@pytest.mark.parametrize("how", ["cut", "hold"])
def test_a_store_that_goes_away_and_comes_back(
    node: Node, s3: S3Server, bucket: Path, uri_of: UriOf, how: str
) -> None:
    node.configure(read_deadline_s=1, store_timeout_s=0.4)
    node.expected_in_log += ["cannot reach the store", "did not answer", "not fetched", "no data"]
    data = os.urandom(64 * MIB)
    (bucket / "large.bin").write_bytes(data)
    (bucket / "other.bin").write_bytes(data[:100])
    with (
        Forwarder(s3.endpoint) as forwarder,
        ckptfs.Checkpoint(
            with_endpoint(uri_of(bucket), s3, forwarder.endpoint)
        ).as_directory() as path,
    ):
        file = f"{path}/large.bin"
        wait_until(lambda: is_readable(file, 0))  # the deadline is short for a busy machine
        forwarder.cut() if how == "cut" else forwarder.hold()
        for name, offset in (("large.bin", 40 * MIB), ("other.bin", 0)):
            with pytest.raises(OSError, check=is_timeout_or_io):
                reopened(f"{path}/{name}", offset)
            assert attribute(f"{path}/{name}", "state") == "failing"
            cause = "cannot reach the store" if how == "cut" else "did not answer"
            for place in (f"{path}/{name}", path):
                assert name in attribute(place, "error")
            assert cause in attribute(path, "error") or "not fetched" in attribute(path, "error")
        assert reopened(file, 0) == data[:4096]  # what is cached is still there
        forwarder.restore() if how == "cut" else forwarder.release()
        wait_until(lambda: is_readable(file, 40 * MIB))
        assert reopened(file, 40 * MIB) == data[40 * MIB :][:4096]
        wait_until(lambda: is_readable(f"{path}/other.bin", 0))
        assert reopened(f"{path}/other.bin", 0) == data[:100]
        assert attribute(file, "state") in ("lazy", "fetching")


def test_a_dark_store_harms_its_own_readers_only(
    node: Node, s3: S3Server, bucket: Path, uri_of: UriOf
) -> None:
    node.configure(read_deadline_s=30, store_timeout_s=0.5)
    node.expected_in_log += ["cannot reach the store", "did not answer", "not fetched", "no data"]
    dark_files, bright_files = bucket / "dark", bucket / "bright"
    for folder in (dark_files, bright_files):
        folder.mkdir()
    numbers = range(48)  # three times as many as there are connections
    for number in numbers:
        (dark_files / str(number)).write_bytes(bytes(2 * MIB))
    for name in ("cached", "cold", "later"):
        (bright_files / name).write_bytes(name.encode() * MIB)

    def head(path: str, name: str) -> str:
        return node.run("head", "-c", str(len(name)), f"{path}/{name}").stdout

    with Forwarder(s3.endpoint) as forwarder, ExitStack() as stack:
        dark_uri = with_endpoint(uri_of(dark_files), s3, forwarder.endpoint)
        dark = stack.enter_context(ckptfs.Checkpoint(dark_uri).as_directory())
        bright = stack.enter_context(ckptfs.Checkpoint(uri_of(bright_files)).as_directory())
        assert head(bright, "cached") == "cached"
        forwarder.hold()
        readers = [
            subprocess.Popen(["cat", f"{dark}/{number}"], stdout=-3, stderr=-3)
            for number in numbers
        ]
        try:
            wait_until(lambda: any(a["state"] == "failing" for a in node.status()["attachments"]))
            for name in ("cached", "cold"):  # within 60 s: the dark ones have not ended by then
                assert head(bright, name) == name
            assert all(reader.poll() is None for reader in readers)
        finally:
            for reader in readers:
                reader.kill()
        assert head(bright, "later") == "later"
        forwarder.release()
        for reader in readers:
            reader.wait(60)
        # Fetches outlast their readers, and would notice that the test removes the objects.
        wait_until(lambda: not any(a["open_files"] for a in node.status()["attachments"]))


def is_timeout_or_io(error: OSError) -> bool:
    return error.errno in (errno.ETIMEDOUT, errno.EIO)


# -- objects that change


def replace(file: Path) -> None:
    file.write_bytes(os.urandom(file.stat().st_size))


CHANGES: dict[str, Callable[[Path], Any]] = {
    "grown": lambda file: file.write_bytes(os.urandom(file.stat().st_size + 1)),
    "deleted": lambda file: file.unlink(),
    "truncated": lambda file: os.truncate(file, 5 * MIB),
    "emptied": lambda file: os.truncate(file, 0),
    "replaced": replace,
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_object_that_changes_is_stale(
    node: Node, bucket: Path, uri_of: UriOf, change: str
) -> None:
    node.expected_in_log.append("model.bin in s3://")
    data = os.urandom(48 * MIB)
    object_ = bucket / "layers" / "model.bin"
    object_.parent.mkdir()
    object_.write_bytes(data)
    (bucket / "config.json").write_text("{}")
    checkpoint = ckptfs.Checkpoint(uri_of(bucket))
    with checkpoint.as_directory() as path:
        file = f"{path}/layers/model.bin"
        assert reopened(file, 0) == data[:4096]
        wait_until(lambda: attribute(file, "state") == "lazy")  # nothing is under way
        CHANGES[change](object_)
        with pytest.raises(OSError, check=lambda error: error.errno == errno.ESTALE):
            reopened(file, 40 * MIB)
        assert attribute(file, "state") == attribute(path, "state") == "changed"
        for place in (file, path):
            assert "layers/model.bin" in attribute(place, "error")
            assert "changed at the store" in attribute(place, "error")
        assert reopened(file, 0) == data[:4096]
        assert os.stat(file).st_size == len(data)
        with pytest.raises(OSError, check=lambda error: error.errno == errno.ESTALE):
            reopened(file, 40 * MIB)
        assert Path(path, "config.json").read_text() == "{}"
        assert "layers/model.bin" in node.status()["attachments"][0]["error"]
    wait_until(lambda: not attached())
    with checkpoint.as_directory() as path:
        file = f"{path}/layers/model.bin"
        assert os.path.exists(file) is object_.exists()
        if object_.exists():
            assert Path(file).read_bytes() == object_.read_bytes()


def attached() -> bool:
    with client.connect() as connection:
        return bool(connection.status().attachments)


def test_a_checkpoint_that_vanishes(node: Node, bucket: Path, uri_of: UriOf) -> None:
    node.expected_in_log.append("it was deleted")
    (bucket / "run").mkdir()
    (bucket / "run" / "weights").write_bytes(b"1" * 100)
    with ckptfs.Checkpoint(uri_of(bucket / "run")).as_directory() as path:
        shutil.rmtree(bucket / "run")
        assert os.listdir(path) == ["weights"]
        with pytest.raises(OSError, check=lambda error: error.errno == errno.ESTALE):
            Path(path, "weights").read_bytes()
    wait_until(lambda: not attached())
    with (
        pytest.raises(ckptfs.CheckpointNotFound),
        ckptfs.Checkpoint(uri_of(bucket / "run")).as_directory(),
    ):
        pass


def test_a_location_that_cannot_be_opened_holds_up_nobody(
    node: Node, small: Path, uri_of: UriOf
) -> None:
    """Certificates that come from a pipe into which no process writes."""
    node.configure(attach_deadline_s=2.0)
    pipe = node.folder / "certificates"
    os.mkfifo(pipe)
    filesystem = S3FileSystem(
        access_key="k", secret_key="s", region="us-east-1", tls_ca_file_path=str(pipe)
    )

    def hang() -> None:
        with ckptfs.Checkpoint("bucket/run", filesystem).as_directory(mode="mount"):
            pass

    with ThreadPoolExecutor() as pool, ckptfs.Checkpoint(uri_of(small)).as_directory() as path:
        hanging = pool.submit(hang)
        while not hanging.done():
            assert os.getxattr(f"{path}/config.json", "user.ckptfs.size") == b"13"
            assert len(node.status()["attachments"]) == 1
        with pytest.raises(ckptfs.StoreTimeout, match="within 2 s"):
            hanging.result()
