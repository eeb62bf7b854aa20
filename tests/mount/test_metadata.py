"""The checkpoint's own metadata is the same in the attributes, the file, the API and the store.

This holds for changes from each of these places, and for each fault of the store.
"""

import contextlib
import ctypes
import errno
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import quote

import pytest
from conftest import COMMAND_TIMEOUT_S, Node, wait_until
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.errnos import code_of
from support.s3server import S3Server
from support.servers import Forwarder

import ckptfs
from ckptfs import xattrs
from ckptfs._client import client
from ckptfs._model.attributes import STATED
from ckptfs._model.location import Location

pytestmark = pytest.mark.mount

UriOf = Callable[[Path], str]
META = xattrs.PREFIX + "meta."
FILE = ".metadata.json"


@pytest.fixture(autouse=True)
def _plain_uploads(monkeypatch: pytest.MonkeyPatch) -> None:
    """rclone does not understand the checksums that the AWS SDK sends by default."""
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    monkeypatch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """A checkpoint on the local disk, which is mounted by `mounted`."""
    top = tmp_path / "checkpoint"
    (top / "sub").mkdir(parents=True)
    (top / "sub" / "a.bin").write_bytes(b"data")
    return top


@contextlib.contextmanager
def mounted(folder: Path) -> Iterator[str]:
    """A local directory in the mount; `as_directory` would give the directory itself."""
    with client.leased(Location("local", str(folder))) as path:
        yield path


def text(value: Any) -> str:
    """JSON that is equal for equal values, also for NaN."""
    return json.dumps(value, sort_keys=True)


def not_json(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def finite(value: Any) -> Any:
    """`value` as JSON has it: strings in place of NaN and the infinities."""
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value)
    if isinstance(value, list):
        return [finite(item) for item in value]
    return {k: finite(v) for k, v in value.items()} if isinstance(value, dict) else value


def attribute(path: str, key: str) -> Any:
    return json.loads(os.getxattr(path, META + key))


def attributes(path: str) -> dict[str, Any]:
    """The metadata as its attributes have it: those of all keys in the file, listed or not."""
    try:
        stored = file_of(path)
    except (FileNotFoundError, ValueError):
        stored = {}
    keys = gate(stored) if isinstance(stored, dict) else {}
    texts = {key: xattrs.get(path, META + key) for key in keys}
    return {key: json.loads(value) for key, value in texts.items() if value is not None}


def file_of(path: "str | Path") -> Any:
    return json.loads(Path(path, FILE).read_bytes())


def gate(values: dict[str, Any]) -> dict[str, Any]:
    """The entries that attributes can carry."""

    def fits(key: str) -> bool:
        try:
            return 0 < len(key.encode()) <= 238 and "\0" not in key
        except UnicodeEncodeError:
            return False

    return {key: value for key, value in values.items() if fits(key)}


# -- round trips

_keys = (
    st.text(max_size=10)
    | st.text("a.é/ \n\"'=", max_size=10)
    | st.sampled_from(["", "n\0", "x" * 238, "x" * 239, "ü" * 119, "ü" * 120, "\ud800", "\udc80"])
)
_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(10**200, 10**400)
    | st.floats()
    | st.text(st.characters(), max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_keys, inner, max_size=3),
    max_leaves=5,
)
_metadata = st.dictionaries(_keys, _json, max_size=6)
_few = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def check_round_trip(
    node: Node, checkpoint: ckptfs.Checkpoint, target: str, path: str, values: dict[str, Any]
) -> None:
    """By the API, the attributes, the file and the command; `target` names it without the mount."""
    carried = gate(values)
    checkpoint.set_metadata(values)
    assert text(attributes(path)) == text(carried)
    assert text(file_of(path)) == text(values)
    assert text(dict(xattrs.metadata(path))) == text(values)
    assert text(checkpoint.get_metadata()) == text(values)
    for place in (path, target):
        said = node.here("meta", "list", place, "--json").stdout
        assert text(json.loads(said, parse_constant=not_json)) == text(finite(values))
    told = xattrs.read(path)
    assert text(told.metadata) == text(carried)
    assert len(told.skipped) == len({*values} - {*carried})
    checkpoint.set_metadata({})
    for key, value in carried.items():
        os.setxattr(path, META + key, json.dumps(value).encode())
    assert text(attributes(path)) == text(carried)
    assert text(file_of(path)) == text(carried)
    assert text(checkpoint.get_metadata()) == text(carried)
    node.here("meta", "update", target, json.dumps(values))
    assert text(checkpoint.get_metadata()) == text({**carried, **values})
    assert text(attributes(path)) == text(carried)


@pytest.mark.long
def test_round_trips_on_a_local_disk(module_node: Node, local: Path) -> None:
    checkpoint = ckptfs.Checkpoint.from_directory(local)
    with mounted(local) as path:

        @_few
        @given(_metadata)
        @example({"nan": float("nan"), "inf": [float("-inf")], "tiny": 5e-324, "long": 10**300})
        @example({"": 1, "n\0": 2, "\ud800": 3, "x" * 239: 5, "x" * 238: 6})
        @example({"a": {"": {"n\0": "\ud800"}}, "a.b": "\udfff \u2028 \x1f", "new\nline": None})
        def check(values: dict[str, Any]) -> None:
            check_round_trip(module_node, checkpoint, str(local), path, values)
            assert text(file_of(local)) == text({**gate(values), **values})

        check()


def test_round_trips_on_s3(module_node: Node, small: Path, uri_of: UriOf) -> None:
    checkpoint = ckptfs.Checkpoint(uri_of(small))
    with checkpoint.as_directory() as path:

        @settings(_few, max_examples=4)
        @given(_metadata)
        @example({"nan": float("nan"), "": 1, "größe": {"a": [10**300, None]}, "x" * 239: 2})
        def check(values: dict[str, Any]) -> None:
            check_round_trip(module_node, checkpoint, uri_of(small), path, values)
            assert text(file_of(small)) == text({**gate(values), **values})

        check()


def test_metadata_is_shared_with_ray(module_node: Node, local: Path) -> None:
    rays = {"preprocessor_pkl": "gASVCg==", "_metric": float("nan"), "größe": 2**70, "nested": {}}
    with (local / FILE).open("w") as file:  # ray.train._checkpoint.Checkpoint.set_metadata
        json.dump(rays, file)
    with mounted(local) as path:
        assert text(attributes(path)) == text(rays)
        os.setxattr(path, META + "größe", "kein JSON: ä".encode())
        os.removexattr(path, META + "nested")
        with (local / FILE).open(encoding="utf-8") as file:
            written = json.load(file)
        expected = {k: v for k, v in rays.items() if k != "nested"} | {"größe": "kein JSON: ä"}
        assert text(written) == text(expected)


# -- at the same time

SETTER = """
import os, sys
print(flush=True)
sys.stdin.readline()
for number in range(int(sys.argv[3])):
    os.setxattr(sys.argv[1], f"user.ckptfs.meta.{sys.argv[2]}{number}", b"%d" % number)
"""
UPDATER = """
import sys
from ckptfs import Checkpoint
checkpoint = Checkpoint(sys.argv[1])
checkpoint.get_metadata()
print(flush=True)
sys.stdin.readline()
for number in range(int(sys.argv[3])):
    checkpoint.update_metadata({f"{sys.argv[2]}{number}": number})
"""


@pytest.mark.parametrize("other", ["the mount", "the API"])
def test_two_processes_set_two_hundred_keys_each(
    module_node: Node, local: Path, other: str
) -> None:
    (local / FILE).write_text('{"first": true}')
    with mounted(local) as path:
        second = (SETTER, path) if other == "the mount" else (UPDATER, str(local))
        set_together(module_node, 200, (SETTER, path), second)
        expected = numbered(200) | {"first": True}
        assert file_of(local) == file_of(path) == attributes(path) == expected
        assert os.listdir(local).count(FILE) == 1
        assert sorted(os.listdir(local)) == [FILE, "sub"]  # no temporary file is left


def test_metadata_through_two_regions_is_one_place(
    module_node: Node, s3: S3Server, small: Path
) -> None:
    uri = s3.uri(str(small.relative_to(s3.root)))
    with ckptfs.Checkpoint(uri).as_directory() as path:
        other = uri.replace(f"region={s3.region}", "region=eu-west-1")
        assert other != uri
        set_together(module_node, 20, (SETTER, path), (UPDATER, other))
        assert file_of(small) == attributes(path) == numbered(20)


def set_together(node: Node, count: int, *commands: tuple[str, str]) -> None:
    """Two processes set `count` keys each, "a0" and "b0" on, at the same time."""
    processes = [
        node.python(*command, who, str(count)) for command, who in zip(commands, "ab", strict=True)
    ]
    for process in processes:
        assert process.stdout
        assert process.stdout.readline() == "\n"  # it is about to begin
    for process in processes:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        process.communicate(timeout=COMMAND_TIMEOUT_S)
        assert process.returncode == 0


def numbered(count: int) -> dict[str, int]:
    return {f"{who}{number}": number for who in "ab" for number in range(count)}


# -- visible at once


def test_a_change_is_visible_everywhere_at_once(module_node: Node, local: Path) -> None:
    checkpoint = ckptfs.Checkpoint.from_directory(local)
    with mounted(local) as path:
        file = Path(path, FILE)
        version = os.getxattr(path, "user.ckptfs.version")
        assert not file.exists()
        assert os.listdir(path) == ["sub"]
        held: list[tuple[int, bytes]] = []
        values: dict[str, Any] = {}
        raw = b""
        for number in range(6):
            values = {**values, "x" * number: "y" * number, "number": number}
            if number % 2:
                checkpoint.set_metadata(values)
            else:
                for key in gate(values):
                    module_node.run(
                        "setfattr", "-n", META + key, "-v", json.dumps(values[key]), path
                    )
                values = gate(values)
            raw = (local / FILE).read_bytes()
            assert json.loads(raw) == values
            assert file.stat().st_size == len(raw)  # before a listing tells the kernel
            with os.scandir(path) as entries:
                assert {entry.name: entry.stat().st_size for entry in entries}[FILE] == len(raw)
            assert f" {len(raw)} " in module_node.run("ls", "-la", path).stdout
            assert file.read_bytes() == raw
            assert attributes(path) == gate(values)
            assert checkpoint.get_metadata() == values
            assert dict(xattrs.metadata(path)) == values
            held.append((os.open(file, os.O_RDONLY), raw))
            for fd, old in held:
                assert os.pread(fd, 10_000, 0) == old
                assert os.fstat(fd).st_size == len(old)
        assert len({os.fstat(fd).st_ino for fd, _ in held}) == len(held)
        for fd, _ in held:
            os.close(fd)
        assert os.getxattr(path, "user.ckptfs.version") == version
        assert os.getxattr(path, "user.ckptfs.state") in (b"lazy", b"cached")
        assert os.getxattr(path, "user.ckptfs.files") == b"2"
        assert os.getxattr(path, "user.ckptfs.size") == str(len(raw) + 4).encode()


def test_what_another_node_does_is_seen_soon(module_node: Node, local: Path) -> None:
    with mounted(local) as path:
        file = Path(path, FILE)
        assert not file.exists()
        assert attributes(path) == {}
        (local / FILE).write_text('{"n": 0}')
        wait_until(file.exists)
        assert file.read_text() == '{"n": 0}'
        for number in (1, 2):  # of one size; the reader never gets ESTALE
            with file.open() as old:
                assert json.load(old) == {"n": number - 1}
                (local / FILE).write_text(f'{{"n": {number}}}')
                wait_until(lambda n=number: file_of(path) == {"n": n})
                assert attributes(path) == {"n": number}
                old.seek(0)
                assert json.load(old) == {"n": number - 1}
        (local / FILE).unlink()
        wait_until(lambda: attributes(path) == {})
        assert os.listdir(path) == ["sub"]
        with pytest.raises(FileNotFoundError):
            file.open()
        (local / FILE).write_text('{"again": 1}')
        wait_until(lambda: attributes(path) == {"again": 1})
        assert file_of(path) == {"again": 1}


def test_the_same_text_written_again_stays_readable(module_node: Node, local: Path) -> None:
    (local / FILE).write_text('{"n": 1}')
    with mounted(local) as path:
        assert file_of(path) == {"n": 1}
        seen_ns = os.stat(local / FILE).st_mtime_ns + 5 * 10**9
        os.utime(local / FILE, ns=(seen_ns, seen_ns))
        # Once the new time is there, the daemon also reads bytes that are not in its cache.
        wait_until(lambda: file_of(path) and os.stat(f"{path}/{FILE}").st_mtime_ns > seen_ns - 1000)
        wait_until(lambda: code_of(lambda: os.setxattr(path, "user.ckptfs.evict", b"")) == "")
        assert file_of(path) == {"n": 1}
        os.setxattr(path, META + "n", b"1")
        os.setxattr(path, META + "n", b"1")
        assert file_of(path) == {"n": 1}


def test_versions_of_one_size_and_second_are_not_mixed(module_node: Node, local: Path) -> None:
    """A disk's clock may tick slowly: here it stands still."""
    file = local / FILE
    file.write_text('{"n": 10}')
    os.utime(file, (1_700_000_000, 1_700_000_000))
    fds: list[int] = []
    with mounted(local) as path:
        for number in range(10, 13):
            fresh = local / "fresh"
            fresh.write_text(f'{{"n": {number}}}')
            os.utime(fresh, (1_700_000_000, 1_700_000_000))
            fresh.rename(file)
            wait_until(lambda n=number: attributes(path) == {"n": n})
            assert file_of(path) == {"n": number}
            fds.append(os.open(f"{path}/{FILE}", os.O_RDONLY))
            found = [json.loads(os.pread(fd, 100, 0))["n"] for fd in fds]
            assert found == list(range(10, number + 1))
        for fd in fds:
            os.close(fd)


def test_attaching_again_joins_and_shows_what_is_stored(
    node: Node, small: Path, uri_of: UriOf
) -> None:
    node.configure(linger_s=600)
    checkpoint = ckptfs.Checkpoint(uri_of(small))
    with checkpoint.as_directory() as path:
        inode, version = os.stat(path).st_ino, os.getxattr(path, "user.ckptfs.version")
        os.setxattr(path, META + "n", b"1")
        with checkpoint.as_directory() as again:
            assert again == path
            assert attributes(again) == file_of(again) == {"n": 1}
    # No process has the checkpoint open while another node changes the file.
    for content in ('{"n": 22}', None, '{"n": 333}'):
        if content is None:
            (small / FILE).unlink()
        else:
            (small / FILE).write_text(content)
        with checkpoint.as_directory() as again:
            assert again == path
            assert os.stat(again).st_ino == inode
            assert os.getxattr(again, "user.ckptfs.version") == version
            assert (FILE in os.listdir(again)) is (content is not None)
            assert attributes(again) == json.loads(content or "{}")
            assert not content or file_of(again) == json.loads(content)
    assert len(node.status()["attachments"]) == 1


# -- errors


def test_metadata_attributes_fail_with_the_documented_errno(module_node: Node, local: Path) -> None:
    with mounted(local) as path:
        file, folder = f"{path}/sub/a.bin", f"{path}/sub"
        stated = {name for place in (path, file, folder) for name in os.listxattr(place)}
        stated |= STATED
        places = (path, file, folder, str(module_node.mount))
        value = b"1"
        for place in places:
            for name in ("user.foo", "user.ckptfs.color", "user.ckptfs.prefetch", META + "absent"):
                assert code_of(lambda p=place, n=name: os.getxattr(p, n)) == "ENODATA"
            for name in stated:
                assert code_of(lambda p=place, n=name: os.setxattr(p, n, value)) == "EROFS"
                assert code_of(lambda p=place, n=name: os.removexattr(p, n)) == "EROFS"
            for name in ("user.foo", "user.ckptfs.color", "trusted.x", META, META + "bad\udcff"):
                assert code_of(lambda p=place, n=name: os.setxattr(p, n, value)) == "ENOTSUP"
                assert code_of(lambda p=place, n=name: os.removexattr(p, n)) == "ENOTSUP"
            if place != path:
                for name in (META + "a",):
                    assert code_of(lambda p=place, n=name: os.setxattr(p, n, value)) == "ENOTSUP"
                    assert code_of(lambda p=place, n=name: os.removexattr(p, n)) == "ENOTSUP"
        assert code_of(lambda: os.getxattr(path, META + "bad\udcff")) == "ENODATA"
        assert not (local / FILE).exists()

        def put(key: str, value: bytes, flags: int = 0) -> str:
            return code_of(lambda: os.setxattr(path, META + key, value, flags))

        assert put("a", b"\xff") == "EINVAL"
        assert put("a", b"[" * 60_000) == "EINVAL"
        assert put("a", b"1", os.XATTR_REPLACE) == "ENODATA"
        assert put("a", b"1", os.XATTR_CREATE) == ""
        assert put("a", b"2", os.XATTR_CREATE) == "EEXIST"
        assert put("a", b"3", os.XATTR_REPLACE) == ""
        assert put("k" * 238, b"0") == ""
        assert put("k" * 239, b"0") == "ERANGE"  # the kernel's answer
        assert put("a", b"x" * 65537) == "E2BIG"  # the kernel's, too
        assert code_of(lambda: os.removexattr(path, META + "b")) == "ENODATA"
        for action in ("prefetch", "evict"):
            name = f"user.ckptfs.{action}"
            assert code_of(lambda n=name: os.removexattr(path, n)) == "ENODATA"
            assert code_of(lambda n=name: os.setxattr(module_node.mount, n, b"")) == "ENOTSUP"
        assert file_of(local) == {"a": 3, "k" * 238: 0}
        assert attributes(path) == {"a": 3, "k" * 238: 0}


def test_short_buffers_are_erange(module_node: Node, local: Path) -> None:
    (local / FILE).write_text('{"a": "0123456789"}')
    libc = ctypes.CDLL(None, use_errno=True)

    def call(name: str, *arguments: object) -> "int | str":
        done = getattr(libc, name)(*arguments)
        return done if done >= 0 else errno.errorcode[ctypes.get_errno()]

    with mounted(local) as path:
        where, name = path.encode(), (META + "a").encode()
        buffer = ctypes.create_string_buffer(70_000)
        assert call("getxattr", where, name, None, 0) == 12
        assert call("getxattr", where, name, buffer, 11) == "ERANGE"
        assert call("getxattr", where, name, buffer, 12) == 12
        assert buffer.raw[:12] == b'"0123456789"'
        length = call("listxattr", where, None, 0)
        assert isinstance(length, int)
        assert call("listxattr", where, buffer, length - 1) == "ERANGE"
        assert call("listxattr", where, buffer, length) == length
        assert name in buffer.raw[:length].split(b"\0")


@pytest.mark.parametrize("count", [120, pytest.param(3000, marks=pytest.mark.long)])
def test_all_keys_are_read_by_name_whatever_is_listed(
    module_node: Node, local: Path, count: int
) -> None:
    values: dict[str, Any] = {f"eval/{'k' * 100}_{n}": n % 7 for n in range(count)}
    values["big"] = "x" * 60_000
    (local / FILE).write_text(json.dumps(values))
    with mounted(local) as path:
        assert attributes(path) == values == file_of(path) == xattrs.metadata(path)
        told = xattrs.read(path)
        assert (told.metadata, told.skipped) == (values, {})
        assert attribute(path, "big") == values["big"]
        listed = [name[len(META) :] for name in os.listxattr(path) if name.startswith(META)]
        assert listed
        assert listed == [*values][: len(listed)]
        assert "user.ckptfs.metadata_keys" in os.listxattr(path)
        assert os.getxattr(path, "user.ckptfs.metadata_keys") == b"%d" % (count + 1)
        assert json.loads(module_node.here("meta", "list", path, "--json").stdout) == values


def test_the_views_of_the_mapping_read_the_file_once(
    module_node: Node, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {f"k{n}": n for n in range(50)}
    (local / FILE).write_text(json.dumps(values))
    with mounted(local) as path:
        shown, loads = xattrs.metadata(path), mock.Mock(wraps=json.loads)
        monkeypatch.setattr("ckptfs.xattrs.json.loads", loads)
        assert [*shown.items()] == [*values.items()]
        assert [*shown.keys()] == [*values]
        assert [*shown.values()] == [*range(50)]
        assert shown == values
        assert loads.call_count == 4


class Interposer(Forwarder):
    """A forwarder that can refuse uploads, or swallow the answers to them."""

    REFUSAL = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>no</Message></Error>"

    def __init__(self, upstream: str) -> None:
        super().__init__(upstream)
        self.refuses = self.swallows = False
        self.swallowed = threading.Event()
        self._uploads: set[socket.socket] = set()  # servers that have got one

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            from_client = source.getsockname()[1] == self._port
            while data := source.recv(1 << 16):
                self._flows.wait()
                if from_client and data.startswith(b"PUT "):
                    self._uploads.add(target)
                    if self.refuses:
                        head = b"HTTP/1.1 403 Forbidden\r\nContent-Type: application/xml\r\n"
                        length = b"Content-Length: %d\r\nConnection: close\r\n\r\n"
                        source.sendall(head + length % len(self.REFUSAL) + self.REFUSAL)
                        break
                goes_on = data.startswith(b"HTTP/1.1 100 ")  # the body is still to come
                if self.swallows and source in self._uploads and not goes_on:
                    self.swallowed.set()
                    break
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def behind(interposer: type[Forwarder], s3: S3Server, folder: Path) -> "Iterator[tuple[Any, str]]":
    """A forwarder in front of the store, and the path of the checkpoint that is mounted there."""
    with interposer(s3.endpoint) as forwarder:
        ends = [quote(endpoint, safe="") for endpoint in (s3.endpoint, forwarder.endpoint)]
        uri = s3.uri(str(folder.relative_to(s3.root))).replace(ends[0], ends[1])
        with ckptfs.Checkpoint(uri).as_directory() as path:
            yield forwarder, path


def test_a_store_that_refuses_is_eacces(node: Node, s3: S3Server, small: Path) -> None:
    node.expected_in_log.append(".metadata.json in s3://")
    (small / FILE).write_text('{"n": 1}')
    with behind(Interposer, s3, small) as (interposer, path):
        interposer.refuses = True
        assert code_of(lambda: os.setxattr(path, META + "n", b"2")) == "EACCES"
        assert code_of(lambda: os.removexattr(path, META + "n")) == "EACCES"
        with pytest.raises(PermissionError):
            xattrs.metadata(path)["n"] = 2
        assert "access denied" in os.getxattr(path, "user.ckptfs.error").decode()
        assert s3.secret_key not in os.getxattr(path, "user.ckptfs.error").decode()
        assert file_of(small) == file_of(path) == attributes(path) == {"n": 1}
        interposer.refuses = False
        os.setxattr(path, META + "n", b"3")
        assert file_of(small) == file_of(path) == attributes(path) == {"n": 3}


def test_an_answer_that_is_lost_leaves_one_whole_version(
    node: Node, s3: S3Server, small: Path
) -> None:
    node.expected_in_log.append(".metadata.json in s3://")
    old, new = {"n": 1, "k": "x" * 5000}, {"n": 2, "k": "x" * 5000}
    (small / FILE).write_text(json.dumps(old))
    with behind(Interposer, s3, small) as (interposer, path):
        assert attributes(path) == old
        interposer.swallows = True
        assert code_of(lambda: os.setxattr(path, META + "n", b"2")) in ("EIO", "ETIMEDOUT")
        assert interposer.swallowed.is_set()
        interposer.swallows = False
        assert ".metadata.json" in os.getxattr(path, "user.ckptfs.error").decode()
        assert file_of(small) == new
        os.setxattr(path, META + "m", b"3")  # nothing has to be waited for, and nothing is lost
        assert attributes(path) == file_of(path) == file_of(small) == {**new, "m": 3}


def test_a_dark_store_ends_at_the_deadline(node: Node, s3: S3Server, small: Path) -> None:
    node.expected_in_log.append(".metadata.json in s3://")
    node.configure(read_deadline_s=1, store_timeout_s=0.5)
    old = {"n": 1, "k": "x" * 5000}
    (small / FILE).write_text(json.dumps(old))
    with behind(Forwarder, s3, small) as (forwarder, path):
        assert attributes(path) == old
        forwarder.hold()
        # Within the time limit of the command: the kernel itself would wait for ever.
        done = node.run("setfattr", "-n", META + "n", "-v", "2", path, check=False)
        assert done.returncode == 1
        assert "timed out" in done.stderr or "Input/output error" in done.stderr
        with pytest.raises(ckptfs.StoreError, match=r"\.metadata\.json"):
            xattrs.metadata(path)["n"] = 3
        # The rest is told at once.
        assert "user.ckptfs.version" in os.listxattr(path)
        assert [name for name in os.listxattr(path) if name.startswith(META)] == []
        assert os.getxattr(path, "user.ckptfs.state") == b"lazy"
        assert os.getxattr(path, "user.ckptfs.error")
        forwarder.release()
        wait_until(lambda: code_of(lambda: attributes(path)) == "")
        assert attributes(path)["k"] == old["k"]
        os.setxattr(path, META + "n", b"4")
        assert attributes(path) == file_of(path) == file_of(small) == {**old, "n": 4}


def test_metadata_that_is_no_object(module_node: Node, local: Path) -> None:
    for stored in ("[1, 2]", "no json", ""):
        (local / FILE).write_text(stored)
        with mounted(local) as path:
            assert attributes(path) == {}
            assert code_of(lambda p=path: os.setxattr(p, META + "a", b"1")) == "EIO"
            assert code_of(lambda p=path: os.removexattr(p, META + "a")) == "EIO"
            assert ".metadata.json" in os.getxattr(path, "user.ckptfs.error").decode()
            assert xattrs.read(path).metadata == {}
            with pytest.raises(ckptfs.MetadataError):
                dict(xattrs.metadata(path))
            assert Path(path, FILE).read_text() == (local / FILE).read_text() == stored
            ckptfs.Checkpoint.from_directory(local).set_metadata({"a": 1})
            assert attributes(path) == {"a": 1}


def test_a_checkpoint_that_is_gone(module_node: Node, local: Path) -> None:
    with mounted(local) as path:
        shutil.rmtree(local)
        assert code_of(lambda: os.setxattr(path, META + "a", b"1")) == "EIO"
        assert not local.exists()
        assert attributes(path) == {}


# -- in Python


def test_read_from_any_place_inside(
    node: Node, small: Path, uri_of: UriOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    (small / FILE).write_text('{"val_loss": 0.25, "x\\u0000": 1}')
    with ckptfs.Checkpoint(uri_of(small)).as_directory() as path:
        link = node.folder / "link"
        link.symlink_to(f"{path}/layers")
        monkeypatch.chdir(f"{path}/layers/0")
        places = [
            *(path, Path(path), f"{path}/", f"{path}/layers", f"{path}/layers/0/weights.bin"),
            *("weights.bin", ".", "../..", link, link / "0" / "weights.bin", f"{path}/{FILE}"),
        ]
        told = xattrs.read(path)
        for place in places:
            told = xattrs.read(place)
            assert told.path == path
            assert told.metadata == {"val_loss": 0.25}
            assert xattrs.root_of(place) == path
            assert xattrs.metadata(place)["val_loss"] == 0.25
        assert told.uri == os.getxattr(path, "user.ckptfs.uri").decode()
        assert told.id in path
        assert told.version == os.getxattr(path, "user.ckptfs.version").decode()
        assert (told.format, told.files) == ("unknown", 4)
        assert told.size == sum(f.stat().st_size for f in small.rglob("*") if f.is_file())
        assert 0 < told.cached < told.size
        assert (told.state, told.error, told.pinned) == ("lazy", "", False)
        assert told.holders == [os.getpid()]
        assert told.skipped == {"x\\x00": "the key is empty or holds a NUL"}
        assert xattrs.get(path, "user.ckptfs.state") == "lazy"
        assert xattrs.get(path, "user.ckptfs.nothing") is None
        assert xattrs.read_all("weights.bin")["user.ckptfs.size"] == "3000000"
        monkeypatch.chdir("/")
        link.unlink()


def test_xattrs_read_outside_a_mount_is_not_attached(module_node: Node, local: Path) -> None:
    with mounted(local) as path:
        for place in (local, local / "sub" / "a.bin", "/", "/proc/self", module_node.mount):
            for function in (xattrs.read, xattrs.metadata, xattrs.root_of, xattrs.read_all):
                with pytest.raises(ckptfs.NotAttached, match="is not in a mounted checkpoint"):
                    function(place)
        for place in (f"{path}/nothing", f"{path}/nothing/at/all", local / "nothing", "nothing"):
            for function in (xattrs.read, xattrs.metadata, xattrs.root_of, xattrs.read_all):
                with pytest.raises(FileNotFoundError):
                    function(place)


def test_metadata_is_a_mapping(module_node: Node, local: Path) -> None:
    with mounted(local) as path:
        found = xattrs.metadata(f"{path}/sub")
        assert found == {}
        assert len(found) == 0
        assert not (local / FILE).exists()
        found["loss"] = 0.5
        found["tags"] = ["a", {"b": None}]
        found.update({"größe": 1}, more=2)
        expected = {"loss": 0.5, "tags": ["a", {"b": None}], "größe": 1, "more": 2}
        assert dict(found) == found == expected == file_of(local)
        assert list(found) == list(expected)
        assert len(found) == 4
        assert found["loss"] == found.get("loss") == 0.5
        assert "loss" in found
        assert "no" not in found
        assert found.get("no", 7) == 7
        assert repr(found) == f"Metadata({expected!r})"
        for action in (lambda: found["no"], lambda: found.__delitem__("no")):
            with pytest.raises(KeyError, match="no"):
                action()
        del found["loss"]
        assert found.pop("more") == 2
        assert file_of(local) == {"tags": ["a", {"b": None}], "größe": 1}
        for key, value, error in [
            ("a", object(), TypeError),
            ("", 1, ckptfs.MetadataError),
            ("n\0", 1, ckptfs.MetadataError),
            ("x" * 239, 1, ckptfs.MetadataError),
            ("\ud800", 1, ckptfs.MetadataError),
            ("\udc80", 1, ckptfs.MetadataError),
            ("long", "x" * 65535, ckptfs.MetadataError),
        ]:
            with pytest.raises(error):
                found[key] = value
            with pytest.raises(error):
                found.update({"first": 1, key: value})
        assert "first" not in found
        found["long"] = "x" * 65534
        assert xattrs.read(path).metadata["long"] == "x" * 65534


def test_metadata_set_by_another_process_is_visible(module_node: Node, local: Path) -> None:
    code = "import sys; from ckptfs import xattrs; xattrs.metadata(sys.argv[1])['seen'] = 'ja'"
    with mounted(local) as path:
        subprocess.run([sys.executable, "-c", code, path], check=True, timeout=COMMAND_TIMEOUT_S)
        assert attribute(path, "seen") == "ja"
        assert file_of(local) == {"seen": "ja"}
