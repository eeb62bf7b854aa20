"""Uploads to Google and Azure: parts in order and in blocks, and checksums of the content."""

import base64
import hashlib
import json
from typing import Any

import pytest
from support.uploading import Reply, ScriptedClient

from ckptfs._model.manifest import ListedFile
from ckptfs._store.cloud import azure_uploads, gcs_uploads
from ckptfs._store.cloud.azure_uploads import AzureUploads
from ckptfs._store.cloud.gcs_uploads import GoogleUploads
from ckptfs._store.s3.uploads import etag_of
from ckptfs.errors import StoreError

PART = gcs_uploads.PART_BYTES
DATA = bytes(PART) + b"end"
MD5 = base64.b64encode(hashlib.md5(DATA).digest()).decode()
BEGUN = Reply(headers={"location": "http://h/upload/x?uploadType=resumable&upload_id=id&name=x"})


def described(md5: str = MD5, name: str = "run/x") -> Reply:
    return Reply(body=json.dumps({"name": name, "md5Hash": md5}).encode())


def more(persisted: int) -> Reply:
    return Reply(308, {"range": f"bytes=0-{persisted - 1}"} if persisted else {})


def google(*answers: Any) -> tuple[ScriptedClient, Any]:
    client = ScriptedClient(*answers)
    uploads = GoogleUploads(client, client, "run/", "gs://b/run")  # type: ignore[arg-type]
    return client, uploads.begin("x", len(DATA))


def sent(client: ScriptedClient) -> list[str]:
    return [each.headers["content-range"] for each in client.asked[1:]]


def test_google_takes_parts_in_order_and_checks_the_whole() -> None:
    client, upload = google(BEGUN, more(PART), described())
    upload.send(1, memoryview(DATA)[:PART])
    upload.send(2, memoryview(DATA)[PART:])
    assert upload.finish() == f'"{hashlib.md5(DATA).hexdigest()}"'
    assert sent(client) == [
        f"bytes 0-{PART - 1}/{len(DATA)}",
        f"bytes {PART}-{PART + 2}/{len(DATA)}",
    ]
    assert [each.headers.get("x-goog-hash") for each in client.asked[1:]] == [None, f"md5={MD5}"]
    assert all(each.query["upload_id"] == "id" for each in client.asked[1:])


def test_google_gets_the_bytes_again_that_it_did_not_keep() -> None:
    client, upload = google(BEGUN, more(PART // 2), more(PART))
    upload.send(1, memoryview(DATA)[:PART])
    assert sent(client)[1] == f"bytes {PART // 2}-{PART - 1}/{len(DATA)}"
    assert client.bodies[2] == DATA[PART // 2 : PART]


@pytest.mark.parametrize("answer", [more(0), Reply(308, {"range": "bytes=0-99999999"})])
def test_google_that_keeps_nothing_is_an_error(answer: Reply) -> None:
    _, upload = google(BEGUN, answer)
    with pytest.raises(StoreError, match="not Google's"):
        upload.send(1, memoryview(DATA)[:PART])


def test_google_with_other_bytes_is_an_error() -> None:
    _, upload = google(BEGUN, more(PART), described(md5="b3RoZXI="))
    upload.send(1, memoryview(DATA)[:PART])
    with pytest.raises(StoreError, match="x in gs://b/run: the store has other bytes"):
        upload.send(2, memoryview(DATA)[PART:])


def test_google_that_is_another_server_is_an_error() -> None:
    with pytest.raises(StoreError, match="not Google's"):
        google(Reply())
    client = ScriptedClient(Reply(body=b"<html>"))
    uploads = GoogleUploads(client, client, "run/", "gs://b/run")  # type: ignore[arg-type]
    with pytest.raises(StoreError, match="not Google's"):
        uploads.begin("x", 1).send(1, memoryview(b"1"))


def test_google_part_that_is_sent_again_counts_once() -> None:
    unavailable = Reply(503)
    _, upload = google(BEGUN, unavailable, more(PART), described())
    with pytest.raises(StoreError):
        upload.send(1, memoryview(DATA)[:PART])
    upload.send(1, memoryview(DATA)[:PART])
    upload.send(2, memoryview(DATA)[PART:])
    assert upload.finish()


def test_names_that_a_service_cannot_hold() -> None:
    client: Any = ScriptedClient()
    assert GoogleUploads(client, client, "run/", "gs://b/run").fault_of("a\rb")
    assert GoogleUploads(client, client, "run/", "gs://b/run").fault_of("x" * 1021)
    assert GoogleUploads(client, client, "run/", "gs://b/run").fault_of("x" * 1020) is None
    assert AzureUploads(client, "run/", "abfss://b").fault_of("a\\b")
    assert AzureUploads(client, "run/", "abfss://b").fault_of("x" * 1021)
    assert AzureUploads(client, "run/", "abfss://b").fault_of("x" * 1020) is None


# -- Azure

BLOCKS = [DATA[: azure_uploads.PART_BYTES], DATA[azure_uploads.PART_BYTES :]]
MARK = etag_of([hashlib.md5(block).digest() for block in BLOCKS]).strip('"')


def test_azure_makes_a_blob_of_blocks_and_marks_it() -> None:
    client = ScriptedClient(Reply(201), Reply(201), Reply(201, {"etag": '"0x8D"'}))
    uploads = AzureUploads(client, "run/", "abfss://b")  # type: ignore[arg-type]
    upload = uploads.begin("x", len(DATA))
    for number in (2, 1):
        upload.send(number, memoryview(BLOCKS[number - 1]))
    assert upload.finish() == '"0x8D"'
    last = client.asked[-1]
    assert last.query == {"comp": "blocklist"}
    assert last.headers["x-ms-meta-ckptfs_md5"] == MARK
    ids = [each.query["blockid"] for each in client.asked[:2]]
    assert client.bodies[-1].index(ids[1].encode()) < client.bodies[-1].index(ids[0].encode())
    for asked, block in zip(client.asked, reversed(BLOCKS), strict=False):
        md5 = base64.b64encode(hashlib.md5(block).digest()).decode()
        assert asked.headers["content-md5"] == md5


def test_azure_uploads_of_one_blob_share_no_blocks() -> None:
    """All blocks without a list belong to the blob, whichever upload has sent them."""
    ids: list[str] = []
    for _ in range(2):
        client = ScriptedClient(Reply(201), Reply(201))
        uploads = AzureUploads(client, "run/", "abfss://b")  # type: ignore[arg-type]
        upload = uploads.begin("x", len(DATA))
        for number in (1, 2):
            upload.send(number, memoryview(BLOCKS[number - 1]))
        ids += [each.query["blockid"] for each in client.asked]
    assert len(set(ids)) == 4
    assert len(set(map(len, ids))) == 1


@pytest.mark.parametrize(
    ("headers", "same"),
    [
        ({"x-ms-meta-ckptfs_md5": MARK}, True),
        ({"x-ms-meta-ckptfs_md5": f"{'0' * 32}-2"}, False),
        ({"x-ms-meta-ckptfs_md5": f"{'0' * 32}-3"}, None),
        ({"content-md5": MD5}, True),
        ({"content-md5": "AAAAAAAAAAAAAAAAAAAAAA=="}, False),
        ({}, None),
    ],
)
def test_azure_is_same_knows_what_a_blob_says(headers: dict[str, str], same: bool | None) -> None:
    client = ScriptedClient(Reply(headers=headers))
    uploads = AzureUploads(client, "run/", "abfss://b")  # type: ignore[arg-type]

    def digests(part_bytes: int) -> list[bytes]:
        pieces = [DATA[i : i + part_bytes] for i in range(0, len(DATA), part_bytes)]
        return [hashlib.md5(piece).digest() for piece in pieces]

    assert uploads.is_same(ListedFile("x", len(DATA), 0), digests) is same
