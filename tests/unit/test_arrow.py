"""What pyarrow's errors become: decided by what the store said, not by words in names."""

import socket

import pytest
from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem

from ckptfs._store.arrow import ArrowStore, translate_error
from ckptfs._store.base import Pin
from ckptfs.errors import (
    AccessDenied,
    CheckpointNotFound,
    CkptfsError,
    StoreError,
    StoreTimeout,
    StoreUnavailable,
)


@pytest.mark.parametrize(
    "path",
    ["run/step-4160/model.bin", "HTTP status 416", "AWS Error NO_SUCH_KEY", "INVALID_RANGE"],
)
def test_an_outage_is_an_outage_whatever_the_name(
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
