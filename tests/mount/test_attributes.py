"""Extended attributes, and what they say while bytes arrive."""

import errno
import json
import os
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from conftest import Node, wait_until
from safetensors import safe_open
from safetensors.numpy import save_file
from support.s3server import S3Server
from support.servers import Forwarder

import ckptfs
from ckptfs import xattrs

pytestmark = pytest.mark.mount

UriOf = Callable[[Path], str]

MIB = 1 << 20
WHOLE_S = 1_700_000_000
"""The AWS SDK takes rclone's "12:34:56.78Z" for no time at all; S3 itself has ".000Z" always."""
HTTP_BYTES_MAX = 64 << 10
"""Heads of a few requests and answers, and a listing."""


def attribute(path: str, name: str) -> str:
    return os.getxattr(path, f"user.ckptfs.{name}").decode()


def pread(path: str, length: int, offset: int) -> bytes:
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.pread(fd, length, offset)
    finally:
        os.close(fd)


def test_listxattr_has_the_documented_attributes(
    module_node: Node, small: Path, uri_of: UriOf
) -> None:
    os.utime(small / "layers/0/weights.bin", (WHOLE_S, WHOLE_S))
    place = {"user.ckptfs.uri", "user.xdg.origin.url"}
    both = place | {"user.ckptfs.version", "user.ckptfs.size"}
    root = both | {"user.ckptfs.id", "user.ckptfs.files"}
    with ckptfs.Checkpoint(uri_of(small)).as_directory() as path:
        assert set(os.listxattr(path)) == root
        assert set(os.listxattr(f"{path}/layers")) == place
        weights = f"{path}/layers/0/weights.bin"
        assert set(os.listxattr(weights)) == both | {"user.ckptfs.mtime", "user.ckptfs.etag"}
        (small / ".metadata.json").write_text('{"a": 1}')
        wait_until(lambda: set(os.listxattr(path)) == root | {"user.ckptfs.meta.a"})
        assert os.listxattr(module_node.mount) == []
        for place in (path, f"{path}/layers", f"{path}/config.json", str(module_node.mount)):
            for name in ("user.ckptfs.nothing", "user.other", "security.x", "trusted.x"):
                with pytest.raises(OSError, check=lambda error: error.errno == errno.ENODATA):
                    os.getxattr(place, name)
            for name in ("error", "skipped"):
                assert xattrs.get(place, f"user.ckptfs.{name}") is None
        with pytest.raises(FileNotFoundError):
            os.getxattr(f"{path}/nothing", "user.ckptfs.uri")


def test_attributes_describe_the_checkpoint_and_its_files(
    module_node: Node, small: Path, uri_of: UriOf
) -> None:
    os.utime(small / "config.json", (WHOLE_S, WHOLE_S))
    with ckptfs.Checkpoint(uri_of(small)).as_directory() as path:
        size = sum(file.stat().st_size for file in small.rglob("*") if file.is_file())
        version = attribute(path, "version")
        assert len(version) == 32
        assert set(version) <= set("0123456789abcdef")
        assert attribute(path, "size") == str(size)
        assert attribute(path, "cached") == "0"
        assert attribute(path, "state") == "lazy"
        file = f"{path}/config.json"
        stat = os.stat(file)
        assert attribute(file, "size") == str(stat.st_size)
        etag = attribute(file, "version")  # it was in the listing
        assert "-" not in etag
        assert '"' not in etag
        assert (attribute(file, "cached"), attribute(file, "state")) == ("0", "lazy")
        assert (attribute(f"{path}/empty", "size"), attribute(f"{path}/empty", "state")) == (
            "0",
            "cached",
        )
        Path(file).read_bytes()
        assert attribute(file, "version") == etag
        wait_until(lambda: attribute(file, "state") == "cached")  # not fetching any more
        assert attribute(file, "cached") == str(stat.st_size)
        assert attribute(path, "version") == version
        assert attribute(path, "state") == "lazy"
        Path(path, "layers/0/weights.bin").read_bytes()
        wait_until(lambda: attribute(path, "state") == "cached")
        assert attribute(path, "cached") == str(size)
        assert attribute(file, "etag") == etag
        assert attribute(file, "mtime") == f"{WHOLE_S}.000000000"
        assert attribute(path, "files") == "3"
        assert attribute(path, "id") == Path(path).name.rpartition("-")[2]
        assert attribute(path, "format") == "unknown"
        with ckptfs.Checkpoint(uri_of(small)).as_directory():
            told = json.loads(attribute(path, "attached"))
            assert (told["holders"], told["pinned"]) == ([os.getpid()], False)
            since = module_node.status()["attachments"][0]["attached"]
            assert told["since"] == pytest.approx(since, abs=0.001)
        module_node.here("attach", uri_of(small))
        assert json.loads(attribute(path, "attached"))["pinned"] is True


def test_uris_hold_no_secret_and_can_be_attached(
    module_node: Node,
    s3: S3Server,
    bucket: Path,
    monkeypatch: pytest.MonkeyPatch,
    uri_of: UriOf,
) -> None:
    odd = bucket / "run 1" / "50%25+50 % ?#é&=x" / "inner"
    odd.mkdir(parents=True)
    (odd / "f?i#l%e").write_bytes(b"data")
    with ckptfs.Checkpoint(uri_of(bucket / "run 1")).as_directory() as path:
        below = f"{path}/{odd.relative_to(bucket / 'run 1')}"
        uris = {place: attribute(place, "uri") for place in (path, below, f"{below}/f?i#l%e")}
        for place, uri in uris.items():
            assert os.getxattr(place, "user.xdg.origin.url").decode() == uri
            assert uri.startswith(f"s3://{bucket.name}/run")
            assert s3.secret_key not in uri
            assert s3.access_key not in uri
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.access_key)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.secret_key)
        with ckptfs.Checkpoint(uris[path]).as_directory() as again:
            assert again == path
        with ckptfs.Checkpoint(uris[below]).as_directory() as inner:
            assert Path(inner, "f?i#l%e").read_bytes() == b"data"
            assert attribute(inner, "uri") == uris[below]
            assert attribute(f"{inner}/f?i#l%e", "uri") == uris[f"{below}/f?i#l%e"]
        with (
            pytest.raises(ckptfs.CheckpointIsFile),
            ckptfs.Checkpoint(uris[f"{below}/f?i#l%e"]).as_directory(),
        ):
            pass


# -- format and tensors

FORMATS: dict[str, dict[str, bytes]] = {
    "safetensors": {"sub/a.safetensors": b""},
    "torch-zip": {"model.pt": b"PK\x03\x04" + bytes(100), "config.json": b"{}"},
    "torch-dcp": {"__0_0.distcp": b"x", ".metadata": b"x"},
    "orbax": {"_CHECKPOINT_METADATA": b"{}", "default/manifest.ocdbt": b"x"},
    "huggingface": {"config.json": b"{}", "model-00001-of-00001.safetensors": b""},
    "tensorflow": {"saved_model.pb": b"x", "variables/variables.index": b"x"},
    "unknown": {"model.pt": b"\x80\x02not a zip", "config.json": b"{}"},
}


@pytest.mark.parametrize("name", FORMATS)
def test_format_attribute_names_each_format(
    module_node: Node, bucket: Path, uri_of: UriOf, name: str
) -> None:
    for path, data in FORMATS[name].items():
        (bucket / path).parent.mkdir(parents=True, exist_ok=True)
        (bucket / path).write_bytes(data)
    with ckptfs.Checkpoint(uri_of(bucket)).as_directory() as path:
        assert attribute(path, "format") == name
        assert xattrs.read(path).format == name


def test_format_attribute_of_a_large_torch_archive_is_known(
    module_node: Node, bucket: Path, uri_of: UriOf
) -> None:
    with zipfile.ZipFile(bucket / "model.pth", "w") as archive:
        archive.writestr("archive/data.pkl", os.urandom(3 * MIB))
    with ckptfs.Checkpoint(uri_of(bucket)).as_directory() as path:
        assert attribute(path, "format") == "torch-zip"
        assert int(attribute(path, "cached")) <= MIB


def test_tensors_are_those_that_safetensors_has(
    module_node: Node, bucket: Path, uri_of: UriOf
) -> None:
    tensors = {
        "größe.weight": np.arange(600_000, dtype=np.float32).reshape(2, 3, -1),
        "half": np.ones((5, 7), np.float16),
        "scalar": np.array(3, np.int64),
        "empty": np.zeros((0, 4), np.uint8),
        "bools": np.array([True, False]),
    }
    save_file(tensors, bucket / "a.safetensors", metadata={"format": "np"})
    data = (bucket / "a.safetensors").read_bytes()
    (bucket / "broken.safetensors").write_bytes(b"\xff" * 100)
    with ckptfs.Checkpoint(uri_of(bucket)).as_directory() as path:
        lines = attribute(f"{path}/a.safetensors", "tensors").splitlines()
        found = {line["name"]: line for line in map(json.loads, lines)}
        wait_until(lambda: int(attribute(f"{path}/a.safetensors", "cached")) == MIB)
        with safe_open(bucket / "a.safetensors", "np") as opened:
            assert found.keys() == {*opened.keys()}
            for name in found:
                part = opened.get_slice(name)
                assert found[name]["dtype"] == part.get_dtype()
                assert found[name]["shape"] == part.get_shape()
                span = data[found[name]["start"] : found[name]["end"]]
                assert span == tensors[name].tobytes()
        starts = [json.loads(line)["start"] for line in lines]
        assert starts == sorted(starts)
        with pytest.raises(OSError, check=lambda error: error.errno == errno.ENODATA):
            attribute(f"{path}/broken.safetensors", "tensors")
        assert xattrs.read_all(f"{path}/broken.safetensors")["user.ckptfs.size"] == "100"


def test_many_tensors_are_cut_at_a_line(module_node: Node, bucket: Path, uri_of: UriOf) -> None:
    save_file({f"{'x' * 50}.{i}": np.zeros(1) for i in range(2000)}, bucket / "a.safetensors")
    with ckptfs.Checkpoint(uri_of(bucket)).as_directory() as path:
        value = attribute(f"{path}/a.safetensors", "tensors")
        assert 65_000 < len(value) <= 65_536
        assert all(json.loads(line)["dtype"] == "F64" for line in value.splitlines())


# -- actions


def disk_bytes(node: Node) -> int:
    """The bytes that the cached files take on the disk."""
    found = (node.cache_dir / "objects").rglob("*")
    return sum(file.stat().st_blocks * 512 for file in found if file.is_file())


def test_prefetch_and_evict_attributes_change_the_cache(
    node: Node, bucket: Path, uri_of: UriOf
) -> None:
    sizes = {"a/1.bin": 3 * MIB, "a/[b]/2.bin": MIB, "a/b/3.bin": MIB, "4.bin": 2 * MIB, "5": 10}
    for name, size in sizes.items():
        (bucket / name).parent.mkdir(parents=True, exist_ok=True)
        (bucket / name).write_bytes(os.urandom(size))

    def act(place: str, action: str) -> None:
        node.run("setfattr", "-n", f"user.ckptfs.{action}", place)

    with ckptfs.Checkpoint(uri_of(bucket)).as_directory() as path:

        def cached() -> set[str]:
            """The names of the cached files; a file that is there only in part fails the test."""
            found = {name: int(attribute(f"{path}/{name}", "cached")) for name in sizes}
            assert all(size in (0, sizes[name]) for name, size in found.items()), found
            return {name for name, size in found.items() if size}

        def total(*names: str) -> str:
            return str(sum(sizes[name] for name in names))

        act(f"{path}/4.bin", "prefetch")
        wait_until(lambda: attribute(path, "cached") == total("4.bin"))
        act(f"{path}/a/[b]", "prefetch")
        wait_until(lambda: attribute(path, "cached") == total("4.bin", "a/[b]/2.bin"))
        node.wait_quiet()
        assert cached() == {"4.bin", "a/[b]/2.bin"}
        act(f"{path}/a", "prefetch")
        act(path, "prefetch")
        wait_until(lambda: attribute(path, "cached") == total(*sizes))
        wait_until(lambda: attribute(path, "state") == "cached")  # the map on disk comes last
        assert disk_bytes(node) > sum(sizes.values())
        act(f"{path}/a/1.bin", "evict")
        assert cached() == sizes.keys() - {"a/1.bin"}
        assert disk_bytes(node) < 5 * MIB
        act(f"{path}/a", "evict")
        assert cached() == {"4.bin", "5"}
        assert attribute(path, "cached") == total("4.bin", "5")
        assert node.status()["attachments"][0]["cached"] == int(total("4.bin", "5"))
        act(path, "evict")
        assert cached() == set()
        assert attribute(path, "state") == "lazy"
        assert disk_bytes(node) == 0
        for name in sizes:
            assert Path(path, name).read_bytes() == (bucket / name).read_bytes()


def test_evict_attribute_of_an_open_file_is_refused(
    module_node: Node, small: Path, uri_of: UriOf
) -> None:
    with ckptfs.Checkpoint(uri_of(small)).as_directory() as path:
        file = f"{path}/layers/0/weights.bin"
        fd = os.open(file, os.O_RDONLY)
        assert len(os.pread(fd, 4_000_000, 0)) == 3_000_000
        for place in (file, f"{path}/layers", path):
            with pytest.raises(OSError, check=lambda error: error.errno == errno.EBUSY):
                os.setxattr(place, "user.ckptfs.evict", b"")
        assert "layers/0/weights.bin is open" in attribute(path, "error")
        wait_until(lambda: attribute(file, "cached") == "3000000")
        os.close(fd)
        for _ in range(10):  # just after a read: no process has it open
            os.setxattr(file, "user.ckptfs.evict", b"")
            assert attribute(file, "cached") == "0"
            pread(file, 4_000_000, 0)


def test_only_what_is_read_is_fetched(
    module_node: Node, s3: S3Server, bucket: Path, uri_of: UriOf
) -> None:
    data = os.urandom(4 * MIB)
    (bucket / "large.bin").write_bytes(data)
    os.truncate(bucket / "large.bin", 100 * MIB + 5)
    s3.reset_traffic()
    with ckptfs.Checkpoint(uri_of(bucket)).as_directory() as path:
        assert [request.method for request in s3.traffic().requests] == ["GET"]
        assert "list-type=2" in s3.traffic().requests[0].target
        assert s3.traffic().bytes_to_client < HTTP_BYTES_MAX
        file = f"{path}/large.bin"
        held = os.open(file, os.O_RDONLY)  # `cached` of a closed file counts whole pages
        # In the middle of blocks, because the kernel reads a little on.
        for block, offset in ((2, 300_000), (2, 700_000), (2, 500_000), (40, 300_000)):
            place = block * MIB + offset
            assert pread(file, 1, place) == (data[place : place + 1] or b"\0")
            fetched = MIB if block == 2 else 2 * MIB
            wait_until(lambda n=fetched: attribute(file, "cached") == str(n))  # it is on the disk
            assert attribute(path, "cached") == str(fetched)
            assert s3.traffic().bytes_to_client < fetched + HTTP_BYTES_MAX
        assert pread(file, 100, 100 * MIB + 2) == bytes(3)  # the last block is short
        wait_until(lambda: attribute(file, "cached") == str(2 * MIB + 5))
        wait_until(lambda: attribute(file, "state") == "lazy")
        os.close(held)


def test_state_attribute_follows_the_fetched_bytes(
    module_node: Node, s3: S3Server, bucket: Path
) -> None:
    data = os.urandom(3 * MIB + 1)
    (bucket / "model.bin").write_bytes(data)
    with Forwarder(s3.endpoint) as forwarder:
        ends = [quote(endpoint, safe="") for endpoint in (s3.endpoint, forwarder.endpoint)]
        uri = s3.uri(bucket.name).replace(ends[0], ends[1])
        with ckptfs.Checkpoint(uri).as_directory() as path:
            file = f"{path}/model.bin"
            assert attribute(file, "state") == "lazy"
            forwarder.hold()
            got: list[bytes] = []
            reader = threading.Thread(target=lambda: got.append(Path(file).read_bytes()))
            reader.start()
            wait_until(lambda: attribute(file, "state") == "fetching")
            assert attribute(path, "state") == "fetching"
            assert module_node.status()["attachments"][0]["state"] == "fetching"
            forwarder.release()
            reader.join()
            assert got == [data]
            wait_until(lambda: attribute(file, "state") == attribute(path, "state") == "cached")
            assert attribute(file, "cached") == str(len(data))
