"""The translation of pyarrow's errors: decided by what the store said, not by words in names."""

import os
import random
import socket
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from fsspec.implementations.local import LocalFileSystem
from pyarrow import fs as pafs
from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem
from support.reading import read_range

from ckptfs import Checkpoint
from ckptfs._model.location import Location
from ckptfs._store import arrow
from ckptfs._store.arrow import ArrowStore, translate_error
from ckptfs._store.base import Pin, pin_of
from ckptfs._store.resolve import open_store
from ckptfs.errors import (
    AccessDenied,
    CheckpointNotFound,
    CkptfsError,
    LocationError,
    ObjectChanged,
    StoreError,
    StoreTimeout,
    StoreUnavailable,
)


@pytest.mark.parametrize(
    "path",
    ["run/step-4160/model.bin", "HTTP status 416", "AWS Error NO_SUCH_KEY", "INVALID_RANGE"],
)
def test_arrow_outage_is_recognised_despite_object_names(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with socket.socket() as closed:  # bound and not listening: connections are refused
        closed.bind(("127.0.0.1", 0))
        filesystem = S3FileSystem(
            access_key="key",
            secret_key="secret",
            scheme="http",
            region="us-east-1",
            endpoint_override=f"127.0.0.1:{closed.getsockname()[1]}",
            retry_strategy=AwsStandardS3RetryStrategy(max_attempts=1),
        )
        store = ArrowStore(filesystem, "bucket", "s3://bucket")
        with pytest.raises(StoreUnavailable):
            store.confirm(Pin(path, 1, 0))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("When x: AWS Error ACCESS_DENIED during HeadObject operation: no", AccessDenied),
        ("When x: AWS Error NO_SUCH_BUCKET during ListObjectsV2 operation: no", CheckpointNotFound),
        ("Bucket 'b' not found", CheckpointNotFound),
        ("When x: AWS Error SLOW_DOWN during GetObject operation: no", StoreUnavailable),
        ("When x: AWS Error UNKNOWN (HTTP status 503) during GetObject: no", StoreUnavailable),
        (
            "When x: AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 28, "
            "Timeout was reached",
            StoreTimeout,
        ),
        ("When listing 'ACCESS_DENIED': AWS Error UNKNOWN (HTTP status 400) during x", StoreError),
        ("something else\nwith a second line", StoreError),
    ],
)
def test_errors_by_what_the_store_said(text: str, expected: type[CkptfsError]) -> None:
    error = translate_error(OSError(text), "s3://bucket/run")
    assert type(error) is expected
    assert str(error).startswith("s3://bucket/run: ")
    assert "\n" not in str(error)


# -- versions


class Handle:
    """An open file that tells what a test wants."""

    def __init__(self, path: str, said: dict[str, bytes]) -> None:
        self._file = pa.OSFile(path)
        self._said = said

    def metadata(self) -> dict[bytes, bytes]:
        return {name.encode(): value for name, value in self._said.items()}

    def size(self) -> int:
        return self._file.size()

    def read_at(self, count: int, offset: int) -> bytes:
        return self._file.read_at(count, offset)


class Told:
    """A filesystem whose handles say what a test wants, and which is asked for exact ranges."""

    type_name = "told"

    def __init__(self, **said: bytes) -> None:
        self.said = said
        self.opened = 0
        self.inner = pafs.LocalFileSystem()

    def open_input_file(self, path: str) -> Handle:
        self.opened += 1
        return Handle(path, {name.replace("_", "-"): value for name, value in self.said.items()})

    def get_file_info(self, what: Any) -> Any:
        return self.inner.get_file_info(what)


SECOND_NS = 1_700_000_000 * 10**9
OF_S3 = {"ETag": b'"1"', "Last_Modified": b"2023-11-14T22:13:20Z"}
OF_GOOGLE = {
    "etag": b"CAE=",
    "generation": b"17",
    "updated": b"2023-11-14T22:13:20.250000+00:00",
}
OF_AZURE = {"ETag": b"0x1", "Last_Modified": b"Tue, 14 Nov 2023 22:13:20 GMT"}


def read(store: ArrowStore, pin: Pin, offset: int = 0) -> bytes:
    return read_range(store, pin, offset)[0]


@pytest.mark.parametrize(
    ("said", "etag"), [(OF_S3, '"1"'), (OF_GOOGLE, "17"), (OF_AZURE, "0x1")], ids=str
)
def test_a_handle_says_its_version(tmp_path: Path, said: dict[str, bytes], etag: str) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    told = Told(**said)
    store = ArrowStore(told, str(tmp_path), "told://top")
    pin = store.confirm(Pin("a", 5, SECOND_NS + 250_000_000))
    assert pin.etag == etag
    assert read(store, pin, 1) == b"2345"
    assert told.opened == 1  # the handle is kept
    told.said = {**said, "etag": b"2", "ETag": b"2", "generation": b"2"}
    with pytest.raises(ObjectChanged, match="ETag"):
        store.confirm(pin)
    told.said = said
    with pytest.raises(ObjectChanged, match="it was written again"):
        store.confirm(Pin("a", 5, SECOND_NS - 10**9))


@pytest.mark.parametrize("text", ["", "yesterday", "Xyz, 99 Nov 2023"])
def test_a_time_that_cannot_be_read_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    told = Told(ETag=b'"1"', Last_Modified=text.encode())
    assert ArrowStore(told, str(tmp_path), "told://top").confirm(Pin("a", 5, SECOND_NS)).etag


def test_without_etags_each_read_opens_a_handle_and_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    told, waited = Told(ETag=b'""'), list[int]()
    monkeypatch.setattr(arrow, "wait_until_settled", waited.append)
    store = ArrowStore(told, str(tmp_path), "told://top")
    pin = store.confirm(Pin("a", 5, (tmp_path / "a").stat().st_mtime_ns))
    assert pin.etag == ""
    for _ in range(2):
        assert read(store, pin) == b"12345"
    assert told.opened == 3
    assert waited == [pin.mtime_ns] * 2
    os.utime(tmp_path / "a", ns=(pin.mtime_ns, pin.mtime_ns + 1_000_000))
    with pytest.raises(ObjectChanged, match="it was written again"):
        store.confirm(pin)


def test_a_thousand_overwrites_through_a_filesystem_in_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes that were read and then confirmed are of one version."""
    chance, overwrites, right = random.Random(0), 0, 0
    path = tmp_path / "a"
    filesystem = pafs.PyFileSystem(pafs.FSSpecHandler(LocalFileSystem()))
    store = ArrowStore(filesystem, str(tmp_path), "file://top")

    def overwrite() -> None:
        nonlocal overwrites
        overwrites += 1
        (tmp_path / "fresh").write_bytes(b"%08d" % overwrites * 100)
        (tmp_path / "fresh").replace(path)

    monkeypatch.setattr(arrow, "wait_until_settled", lambda _: None)  # fine times of Linux >= 6.13
    while overwrites < 1000:
        overwrite()
        pin = next(pin_of(file) for file in store.list(9).files if file.path == "a")
        now = overwrites
        try:
            for _ in range(2):
                if chance.random() < 0.4:
                    overwrite()
                got = read(store, pin)
                if chance.random() < 0.4:
                    overwrite()
                store.confirm(pin)
                assert got == b"%08d" % now * 100
                right += 1
        except ObjectChanged:
            assert overwrites > now
    assert right > 100


# -- HDFS


def test_hdfs_without_java_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("JAVA_HOME", "HADOOP_HOME", "ARROW_LIBHDFS_DIR", "CLASSPATH"):
        monkeypatch.setenv(name, "/nowhere")
    for use in (
        lambda: Checkpoint("hdfs://host:8020/run"),
        lambda: open_store(Location("hdfs", "/run", {"host": "host", "port": 8020}), 3),
    ):
        with pytest.raises(LocationError, match=r"install Java and Hadoop's client") as caught:
            use()
        assert "\n" not in str(caught.value)
