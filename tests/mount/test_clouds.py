"""Checkpoints on Google and Azure through the real mount, on fake-gcs-server and Azurite."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pyarrow import fs as pafs
from support.cloudservers import ACCOUNT, ACCOUNT_KEY, BUCKET, CloudProxy, Reply, cloud_server
from support.fakes import pattern

import ckptfs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import Node

pytestmark = pytest.mark.mount

MIB = 1 << 20
SPAN = 8 * MIB
"""Bytes of the largest request of a sequential reader."""


@pytest.fixture(scope="module", params=["gcs", "azure"])
def cloud(request: pytest.FixtureRequest) -> Iterator[Any]:
    with cloud_server(request.param) as server:
        yield server


@pytest.fixture
def proxy(cloud: Any) -> Iterator[CloudProxy]:
    with CloudProxy(cloud.endpoint) as proxy:
        yield proxy


def checkpoint(cloud: Any, endpoint: str, path: str) -> ckptfs.Checkpoint:
    if cloud.kind == "gcs":
        filesystem = pafs.GcsFileSystem(anonymous=True, scheme="http", endpoint_override=endpoint)
    else:
        filesystem = pafs.AzureFileSystem(
            ACCOUNT,
            account_key=ACCOUNT_KEY,
            blob_storage_authority=endpoint,
            dfs_storage_authority=endpoint,
            blob_storage_scheme="http",
            dfs_storage_scheme="http",
        )
    return ckptfs.Checkpoint(f"{BUCKET}/{path}", filesystem)


def test_small_files_cost_one_request_each_and_a_second_attach_none(
    node: Node, cloud: Any, proxy: CloudProxy
) -> None:
    content = {f"tab\t {i}": pattern(1000 + i) for i in range(12)}
    for name, data in content.items():
        cloud.put(f"small/{name}", data)
    place = checkpoint(cloud, proxy.endpoint, "small")
    for expected in (["read"] * len(content), []):
        with place.as_directory() as path:
            assert set(os.listdir(path)) == set(content)
            proxy.operations()
            with ThreadPoolExecutor(4) as pool:
                got = dict(
                    zip(
                        content,
                        pool.map(lambda n: Path(path, n).read_bytes(), content),
                        strict=True,
                    )
                )
            assert got == content
            node.wait_quiet()
            assert proxy.operations() == expected


def test_a_large_file_costs_one_request_per_span(node: Node, cloud: Any, proxy: CloudProxy) -> None:
    data = pattern(64 * MIB)
    cloud.put("large/weights", data)
    with checkpoint(cloud, proxy.endpoint, "large").as_directory() as path:
        proxy.operations()
        assert Path(path, "weights").read_bytes() == data
        node.wait_quiet()
        operations = proxy.operations()
        assert set(operations) == {"read"}
        # The spans grow from the reader's first bytes on.
        assert len(operations) <= 2 * (len(data) // SPAN)


def test_an_overwrite_in_the_same_second_mixes_no_bytes(
    node: Node, cloud: Any, proxy: CloudProxy
) -> None:
    old, new = b"o" * (2 * SPAN), b"n" * (2 * SPAN)
    cloud.put("mixed/weights", old)
    node.expected_in_log.append("weights")
    with checkpoint(cloud, proxy.endpoint, "mixed").as_directory() as path:
        fd = os.open(f"{path}/weights", os.O_RDONLY)
        try:
            assert os.pread(fd, 4096, 0) == old[:4096]
            cloud.put("mixed/weights", new)
            for offset in range(0, len(old), MIB):
                try:
                    assert set(os.pread(fd, MIB, offset)) == {ord("o")}
                except OSError as error:
                    assert error.errno == errno.ESTALE  # noqa: PT017
            with pytest.raises(OSError, check=lambda error: error.errno == errno.ESTALE):
                os.pread(fd, 4096, len(old) - 4096)
        finally:
            os.close(fd)
    with checkpoint(cloud, proxy.endpoint, "mixed").as_directory() as path:
        assert Path(path, "weights").read_bytes() == new


def test_a_read_outlasts_an_outage(node: Node, cloud: Any, proxy: CloudProxy) -> None:
    data = pattern(100_000)
    cloud.put("outage/weights", data)
    node.expected_in_log.append("weights")
    refused: list[str] = []

    def refuse_some(seen: Any, reply: Reply) -> Reply:
        if seen.operation == "list" or len(refused) == 6:
            return reply
        refused.append(seen.operation)
        return Reply(503, {"Content-Type": "text/html"}, b"<html>down", 10)

    with checkpoint(cloud, proxy.endpoint, "outage").as_directory() as path:
        proxy.change = refuse_some
        assert Path(path, "weights").read_bytes() == data
        assert len(refused) == 6


def test_metadata_is_read_and_written(node: Node, cloud: Any, proxy: CloudProxy) -> None:
    del node
    cloud.put("meta/x", b"1")
    place = checkpoint(cloud, proxy.endpoint, "meta")
    assert place.get_metadata() == {}
    place.set_metadata({"step": 1})
    place.update_metadata({"loss": 2.5})
    assert place.get_metadata() == {"step": 1, "loss": 2.5}


def test_a_filesystem_of_gcsfs_is_mounted(node: Node, cloud: Any, proxy: CloudProxy) -> None:
    from gcsfs import GCSFileSystem

    if cloud.kind != "gcs":
        pytest.skip("gcsfs reads Google only")
    cloud.put("gcsfs/x", b"1")
    place = f"http://{proxy.endpoint}"
    filesystem = GCSFileSystem(token="anon", endpoint_url=place, skip_instance_cache=True)
    with ckptfs.Checkpoint(f"{BUCKET}/gcsfs", filesystem).as_directory() as path:
        assert Path(path, "x").read_bytes() == b"1"
        assert [each["uri"].partition("?")[0] for each in node.status()["attachments"]] == [
            f"gs://{BUCKET}/gcsfs"
        ]
