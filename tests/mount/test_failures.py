"""A store that fails while files are mapped or read: what programs see, and where the reason is."""

import errno
import itertools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

import pytest
import trustme
from conftest import COMMAND_TIMEOUT_S, Node, wait_until
from support.fakes import pattern
from support.faultproxy import Proxy
from support.faultserver import FaultServer, Object

import ckptfs
from ckptfs._client import failures

pytestmark = pytest.mark.mount

MIB = 1 << 20
DATA = pattern(6 * MIB + 5)
OLD_S = 1_500_000_000

PROGRAM = """
import faulthandler, mmap, os, sys
faulthandler.enable()
how, path = sys.argv[1:]
fd = os.open(path, os.O_RDONLY)
try:
    if how == "read":
        os.read(fd, 4 << 20)
    elif how == "pread":
        os.pread(fd, 1, 3 << 20)
    elif how == "direct":
        direct = os.open(path, os.O_RDONLY | os.O_DIRECT)
        os.preadv(direct, [mmap.mmap(-1, 1 << 20)], 0)
    else:
        mapped = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
        print(mapped[5 << 20])
except OSError as error:
    sys.exit(error.errno)
"""


def uri_of(server: FaultServer) -> str:
    endpoint = quote(server.endpoint, safe="")
    return f"s3://k:s@bucket/run?endpoint_override={endpoint}&scheme=http&region=us-east-1"


@contextmanager
def failing(server: FaultServer, fault: str) -> Iterator[None]:
    """The store has this fault while the context lasts."""
    server.fault = fault
    server.break_down()
    try:
        yield
    finally:
        server.heal()


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer() as server:
        for name in ("model.safetensors", "other.bin"):
            server.objects[f"bucket/run/{name}"] = Object(DATA, OLD_S)
        server.objects["bucket/run/config.json"] = Object(b"{}", OLD_S)
        yield server


@pytest.fixture
def impatient(node: Node) -> Node:
    node.configure(read_deadline_s=3.0, store_timeout_s=0.5)
    node.expected_in_log += ["model.safetensors", "config.json", "other.bin"]
    return node


def run(how: str, path: str) -> "subprocess.CompletedProcess[str]":
    """The program above, as a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, how, path],
        capture_output=True,
        text=True,
        timeout=COMMAND_TIMEOUT_S,
        check=False,
    )


DARK = {
    "black hole": "did not answer",
    "refused": "cannot reach the store",
    "503": "the store is busy or broken",
    "trickling body": "did not answer",
}


@pytest.mark.parametrize(
    ("how", "fault"),
    [
        *itertools.product(("read", "mmap"), DARK),
        *itertools.product(("pread", "direct"), ("black hole",)),
    ],
)
def test_a_store_that_fails_is_an_errno_or_sigbus(
    impatient: Node, server: FaultServer, fault: str, how: str
) -> None:
    """The recipe: faulthandler says where, `user.ckptfs.error` why, and the log who."""
    with ckptfs.Checkpoint(uri_of(server)).as_directory() as path, failing(server, fault):
        file = f"{path}/model.safetensors"
        done = run(how, file)
        if how == "mmap":
            assert done.returncode == -7
            assert "Fatal Python error: Bus error" in done.stderr
            assert 'File "<string>"' in done.stderr
        else:
            assert done.returncode == errno.ETIMEDOUT
            assert done.stderr == ""
        assert DARK[fault] in os.getxattr(file, "user.ckptfs.error").decode()
        assert "model.safetensors in s3://bucket/run" in impatient.log()
        assert "a read by pid " in impatient.log()
        assert " (python" in impatient.log()
        said = ckptfs.explain(file)
        assert said is not None
        assert said.startswith(f"{file}: model.safetensors")
        assert DARK[fault] in said
        assert "ckptfs doctor 's3://bucket/run" in said
        assert str(impatient.cache_dir / "daemon.log") in said
        assert "k:s" not in said


FAULTS = {
    **{fault: (errno.ETIMEDOUT, cause) for fault, cause in DARK.items()},
    "wrong range": (errno.EIO, "other bytes than were asked for"),
    "403 expired": (errno.EACCES, "ExpiredToken"),
    "changed": (errno.ESTALE, "attach the checkpoint again"),
    "deleted": (errno.ESTALE, "deleted"),
}


def read_of_failing(path: str, server: FaultServer, fault: str, cause: str) -> None:
    """Read a file with this fault, and see that the attributes have the cause."""
    key = "bucket/run/model.safetensors"
    if fault == "changed":
        server.objects[key] = Object(DATA[:-1], OLD_S + 5)
    elif fault == "deleted":
        del server.objects[key]
    else:
        server.fault = fault
        server.break_down()
    try:
        Path(path, "model.safetensors").read_bytes()
    except OSError:
        for place in (f"{path}/model.safetensors", path):
            assert cause in os.getxattr(place, "user.ckptfs.error").decode()
        raise


@pytest.mark.parametrize("fault", FAULTS)
def test_each_errno_has_its_cause_in_the_attribute_and_in_a_note(
    impatient: Node, server: FaultServer, fault: str
) -> None:
    code, cause = FAULTS[fault]
    if code != errno.ETIMEDOUT:  # the store has time to answer, also on a machine under load
        impatient.configure(read_deadline_s=30.0)
    with (
        pytest.raises(OSError, check=lambda error: error.errno == code) as caught,
        ckptfs.Checkpoint(uri_of(server)).as_directory() as path,
    ):
        read_of_failing(path, server, fault, cause)
    if fault not in ("changed", "deleted"):
        server.heal()
    (note,) = vars(caught.value)["__notes__"]
    assert note.startswith(f"ckptfs: {path}")
    assert cause in note
    # The note stays when the checkpoint is let go.
    assert ckptfs.explain(caught.value) == note.removeprefix("ckptfs: ")


class LibraryError(Exception):
    """As safetensors and torch raise: without an errno, and without a path."""


def in_a_library(path: str) -> None:
    try:
        Path(path, "model.safetensors").read_bytes()
    except OSError:
        error = LibraryError("I/O error while reading the header")
        for each in (error, LibraryError(f"cannot load '{path}/model.safetensors'")):
            said = ckptfs.explain(each)
            assert said is not None
            assert "cannot reach the store" in said
        raise error from None


def test_errors_of_libraries_are_explained_too(impatient: Node, server: FaultServer) -> None:
    checkpoint = ckptfs.Checkpoint(uri_of(server))
    with (
        pytest.raises(LibraryError) as caught,
        checkpoint.as_directory() as path,
        failing(server, "refused"),
    ):
        in_a_library(path)
    (note,) = vars(caught.value)["__notes__"]
    assert "cannot reach the store" in note
    wait_until(lambda: not os.path.exists(path))
    ended = ckptfs.explain(f"{path}/model.safetensors")
    assert ended is not None
    assert "no longer attached" in ended
    assert "daemon.log" in ended


def test_errors_without_a_store_get_no_note(
    impatient: Node, server: FaultServer, tmp_path: Path
) -> None:
    checkpoint = ckptfs.Checkpoint(uri_of(server))
    for raised in (ValueError("ours"), FileNotFoundError(errno.ENOENT, "none", str(tmp_path))):
        with pytest.raises(type(raised)) as caught, checkpoint.as_directory():
            raise raised
        assert not hasattr(caught.value, "__notes__")
        assert ckptfs.explain(caught.value) is None
    with checkpoint.as_directory() as path:
        assert Path(path, "config.json").read_bytes() == b"{}"
        assert ckptfs.explain(path) is None
        assert ckptfs.explain(f"{path}/model.safetensors") is None
        assert ckptfs.explain(OSError(errno.EIO, "of another disk", str(tmp_path))) is None
    assert ckptfs.explain(tmp_path) is None
    assert ckptfs.explain(ckptfs.StoreTimeout("x: no answer")) == "x: no answer"


def test_an_old_failure_is_not_blamed(impatient: Node, server: FaultServer) -> None:
    checkpoint = ckptfs.Checkpoint(uri_of(server))
    with checkpoint.as_directory() as held:
        with failing(server, "refused"), pytest.raises(OSError):  # noqa: PT011
            Path(held, "model.safetensors").read_bytes()
        with pytest.raises(ValueError, match="ours") as caught, checkpoint.as_directory():
            raise ValueError("ours")
        assert not hasattr(caught.value, "__notes__")
        assert ckptfs.explain(OSError(errno.EIO, "of another disk", "/data/model")) is None
        assert ckptfs.explain(OSError(errno.EIO, "of some file")) is not None
        assert Path(held, "model.safetensors").read_bytes() == DATA
        said = ckptfs.explain(f"{held}/model.safetensors")
        assert said is not None
        assert "the store has answered since" in said


def raise_while_stopped(pid: int, path: str) -> None:
    os.kill(pid, signal.SIGSTOP)
    try:
        assert ckptfs.explain(f"{path}/model.safetensors", timeout_s=0.3) is None
        raise OSError(errno.EIO, "ours", f"{path}/model.safetensors")
    finally:
        threading.Timer(1.5, os.kill, (pid, signal.SIGCONT)).start()


def test_a_daemon_that_does_not_answer_delays_no_error(
    impatient: Node, server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ckptfs does not look into a mount whose daemon hangs, because a signal could not even kill
    the process that looks."""
    looked: list[object] = []
    with ckptfs.Checkpoint(uri_of(server)).as_directory() as path:
        pid = impatient.status()["pid"]
        with monkeypatch.context() as patch:
            patch.setattr(failures, "_TIMEOUT_S", 0.3)
            patch.setattr(failures.xattrs, "root_of", looked.append)
            with pytest.raises(OSError, match="ours") as caught, failures.noting(path):
                raise_while_stopped(pid, path)
        assert not hasattr(caught.value, "__notes__")
        assert not looked
        assert os.listdir(path)  # it is back


def test_where_notes_are_not_shown_the_reason_is_logged(
    impatient: Node,
    server: FaultServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(failures, "_SHOWS_NOTES", False)
    checkpoint = ckptfs.Checkpoint(uri_of(server))
    with (
        pytest.raises(OSError) as caught,  # noqa: PT011
        checkpoint.as_directory() as path,
        failing(server, "refused"),
    ):
        Path(path, "model.safetensors").read_bytes()
    assert [record.getMessage() for record in caplog.records] == vars(caught.value)["__notes__"]
    caplog.clear()


def read_behind(proxy: Proxy, fault: str, file: str) -> None:
    proxy.ask({"faults": [{"fault": fault}]})
    Path(file).read_bytes()


TLS = {"untrusted": "certificate", "handshake cut": "cannot reach the store"}


@pytest.mark.parametrize("fault", TLS)
def test_errors_of_tls_have_their_cause_too(
    impatient: Node, bucket: Path, uri_of: Callable[[Path], str], tmp_path: Path, fault: str
) -> None:
    impatient.expected_in_log.append("weights")
    (bucket / "run").mkdir()
    (bucket / "run" / "weights").write_bytes(DATA)
    ca = trustme.CA()
    ca.cert_pem.write_to_path(tmp_path / "ca.pem")
    pems = [tmp_path / "store.pem", tmp_path / "other.pem"]
    for pem, authority in zip(pems, (ca, trustme.CA()), strict=True):
        authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(pem)
    found = urlsplit(uri_of(bucket / "run"))
    query = dict(parse_qsl(found.query))
    with Proxy(query["endpoint_override"].rpartition("/")[2], 0, pems) as proxy:
        query |= {"endpoint_override": proxy.endpoint, "scheme": "https"}
        query["tls_ca_file_path"] = str(tmp_path / "ca.pem")
        uri = found._replace(query=urlencode(query)).geturl()
        with (
            pytest.raises(OSError, check=lambda error: error.errno == errno.ETIMEDOUT) as caught,
            ckptfs.Checkpoint(uri).as_directory() as path,
        ):
            read_behind(proxy, fault, f"{path}/weights")
    (note,) = vars(caught.value)["__notes__"]
    assert TLS[fault] in note


# -- without the store


MAPPING = """
import mmap, os, sys
for path in sys.argv[1:]:
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        sys.stdout.buffer.write(mapped)
"""


def test_reads_after_a_waited_prefetch_need_no_store(impatient: Node, server: FaultServer) -> None:
    told: list[tuple[int, int]] = []
    checkpoint = ckptfs.Checkpoint(uri_of(server))
    names = ["config.json", "model.safetensors", "other.bin"]
    with checkpoint.as_directory(
        prefetch="all", wait=True, progress=lambda *place: told.append(place)
    ) as path:
        size = 2 * len(DATA) + 2
        assert told[-1] == (size, size)
        assert os.getxattr(path, "user.ckptfs.state") == b"cached"
        for fault in ("black hole", "refused"):
            with failing(server, fault):
                files = [f"{path}/{name}" for name in names]
                done = subprocess.run(
                    [sys.executable, "-c", MAPPING, *files],
                    capture_output=True,
                    timeout=COMMAND_TIMEOUT_S,
                    check=False,
                )
                assert (done.returncode, done.stdout) == (0, b"{}" + DATA + DATA)


def test_waited_prefetch_is_kept_by_the_next_daemon(impatient: Node, server: FaultServer) -> None:
    impatient.expected_in_log.append("other.bin")
    with ckptfs.Checkpoint(uri_of(server)).as_directory(prefetch=["*.bin"], wait=True) as path:
        for _ in range(3):  # also by the one after it
            with pytest.raises(OSError, check=lambda error: error.errno == errno.EBUSY):
                os.setxattr(f"{path}/other.bin", "user.ckptfs.evict", b"1")
            assert b"is kept until the program ends" in os.getxattr(path, "user.ckptfs.error")
            assert os.getxattr(f"{path}/other.bin", "user.ckptfs.cached") == b"%d" % len(DATA)
            pid = impatient.status()["pid"]
            impatient.cli("restart")
            wait_until(lambda pid=pid: impatient.status()["pid"] != pid)
            wait_until(lambda: is_kept(f"{path}/other.bin"))
        os.setxattr(f"{path}/model.safetensors", "user.ckptfs.evict", b"1")  # is not kept


def is_kept(file: str) -> bool:
    try:
        os.setxattr(file, "user.ckptfs.evict", b"1")
    except OSError as error:
        return error.errno == errno.EBUSY
    raise AssertionError(f"{file} was evicted")


@pytest.mark.parametrize("fault", ["black hole", "refused", "503", "403 expired", "wrong range"])
def test_waited_prefetch_of_a_failing_store_raises_its_error(
    impatient: Node, server: FaultServer, fault: str
) -> None:
    code, cause = FAULTS[fault]
    if code != errno.ETIMEDOUT:  # the store has time to answer, also on a machine under load
        impatient.configure(read_deadline_s=30.0)
    kind = ckptfs.StoreTimeout if code == errno.ETIMEDOUT else ckptfs.PrefetchFailed
    checkpoint = ckptfs.Checkpoint(uri_of(server))
    with (
        checkpoint.as_directory() as held,
        failing(server, fault),
        pytest.raises(kind, match=r"model\.safetensors") as caught,
        checkpoint.as_directory(prefetch=["model*"], wait=True),
    ):
        pytest.fail("the context was entered")
    assert cause in str(caught.value)
    assert str(caught.value).startswith(held)
    assert ckptfs.explain(caught.value) == str(caught.value)


def test_waited_prefetch_that_cannot_complete_is_an_error(
    impatient: Node, server: FaultServer, tmp_path: Path
) -> None:
    impatient.configure(cache_bytes_max=8 * MIB, read_deadline_s=30.0)
    checkpoint = ckptfs.Checkpoint(uri_of(server))
    with pytest.raises(ValueError, match="give prefetch='all' for all"):
        checkpoint.as_directory(wait=True).__enter__()
    with pytest.raises(ckptfs.PrefetchFailed, match=r"no file in .* matches none\*"):
        checkpoint.as_directory(prefetch=["none*"], wait=True).__enter__()
    with pytest.raises(ckptfs.LimitExceeded, match=r"do not fit into the cache.*cache_bytes_max"):
        checkpoint.as_directory(prefetch="all", wait=True).__enter__()
    with (
        checkpoint.as_directory(),
        failing(server, "black hole"),
        pytest.raises(ckptfs.PrefetchFailed, match=r"were fetched after 2 s.*timeout_s"),
    ):
        checkpoint.as_directory(prefetch=["*.bin"], wait=True, timeout_s=2).__enter__()
    # Where nothing is mounted the files are there.
    with checkpoint.as_directory(prefetch=["*.json"], wait=True, mode="copy") as path:
        assert Path(path, "config.json").read_bytes() == b"{}"
    (tmp_path / "a").write_bytes(b"a")
    local = ckptfs.Checkpoint.from_directory(tmp_path)
    with local.as_directory(prefetch="all", wait=True) as path:
        assert path == str(tmp_path)
