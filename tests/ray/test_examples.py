"""The examples on the page of `ray.tune.Checkpoint`, with each of the classes."""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pyarrow.fs
import pytest
import ray.tune
from conftest import Node
from support.s3server import S3Server

import ckptfs.ray


@pytest.fixture(params=[ray.tune, ckptfs, ckptfs.ray], ids=["ray", "ckptfs", "ckptfs.ray"])
def checkpoint_class(request: pytest.FixtureRequest) -> Any:
    return request.param.Checkpoint


@pytest.fixture
def aws(s3: S3Server, node: Node, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``s3://bucket/path/to/checkpoint`` is on our server, for all that goes by the environment."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{s3.endpoint}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.secret_key)
    bucket = s3.bucket_dir("bucket")
    checkpoint = bucket / "path" / "to" / "checkpoint"
    checkpoint.mkdir(parents=True)
    for name in ("model.pt", "optimizer.pt", "misc.pt"):
        (checkpoint / name).write_text(name)
    yield
    shutil.rmtree(bucket)


def test_from_directory(checkpoint_class: Any) -> None:
    checkpoint = checkpoint_class.from_directory("/tmp/example_checkpoint_dir")
    assert repr(checkpoint.filesystem).startswith("<pyarrow._fs.LocalFileSystem object")
    assert checkpoint.path == "/tmp/example_checkpoint_dir"


def test_uri(checkpoint_class: Any, aws: None) -> None:
    checkpoint = checkpoint_class("s3://bucket/path/to/checkpoint")
    assert repr(checkpoint.filesystem).startswith("<pyarrow._s3fs.S3FileSystem object")
    assert checkpoint.path == "bucket/path/to/checkpoint"


def test_custom_filesystem(checkpoint_class: Any) -> None:
    checkpoint = checkpoint_class(
        path="bucket/path/to/checkpoint",
        filesystem=pyarrow.fs.S3FileSystem(),
    )
    assert repr(checkpoint.filesystem).startswith("<pyarrow._s3fs.S3FileSystem object")
    assert checkpoint.path == "bucket/path/to/checkpoint"


@pytest.mark.mount
def test_contents(checkpoint_class: Any, node: Node, aws: None) -> None:
    checkpoint = checkpoint_class("s3://bucket/path/to/checkpoint")
    with checkpoint.as_directory() as local_checkpoint_dir:
        # The page prints them in another order: os.listdir promises none.
        assert set(os.listdir(local_checkpoint_dir)) == {"model.pt", "optimizer.pt", "misc.pt"}
        mounted = local_checkpoint_dir.startswith(str(node.mount))
        assert mounted == isinstance(checkpoint, ckptfs.Checkpoint)
