"""Uploads to S3: checksums that say something, lost answers, and uploads that others have left."""

import base64
import hashlib
import socket
import threading
from typing import Any

import pytest
from support.uploading import Reply, ScriptedClient, refusal

from ckptfs._model.location import Location
from ckptfs._model.manifest import ListedFile
from ckptfs._store.resolve import open_store
from ckptfs._store.s3.uploads import PART_BYTES, S3Uploads, etag_of
from ckptfs._store.uploads import HasUploads, contradicts, part_bytes_for, parts_of
from ckptfs.errors import AccessDenied, StoreError, StoreUnavailable

DATA = memoryview(b"hello")
MD5 = hashlib.md5(b"hello").hexdigest()
OTHER = "0" * 32
PARTS = [hashlib.md5(b"hello").digest()] * 2
WHOLE = etag_of(PARTS).strip('"')
KMS = {"x-amz-server-side-encryption": "aws:kms"}


def begun(
    *answers: Any, size: int = PART_BYTES + 1, is_new: bool = False
) -> tuple[ScriptedClient, Any]:
    """The upload of an object of two parts, or of one, and the client with these answers."""
    created = Reply(
        body=b"<InitiateMultipartUpload><UploadId>id</UploadId></InitiateMultipartUpload>"
    )
    client = ScriptedClient(*([created] if size > PART_BYTES else []), *answers)
    uploads = S3Uploads(client, "run/", "s3://b/run")  # type: ignore[arg-type]
    return client, uploads.begin("x", size, is_new=is_new)


def done(etag: str) -> Reply:
    text = f"<ETag>&quot;{etag}&quot;</ETag>"
    text = f"<CompleteMultipartUploadResult>{text}</CompleteMultipartUploadResult>"
    return Reply(body=text.encode())


@pytest.mark.parametrize(
    ("etag", "headers", "fails"),
    [
        (MD5, {}, False),
        (MD5.upper(), {}, False),
        (OTHER, {}, True),
        (OTHER, {"x-amz-server-side-encryption": "AES256"}, True),
        (OTHER, KMS, False),
        (OTHER, {"x-amz-server-side-encryption-customer-algorithm": "AES256"}, False),
        ("0123456789abcdef", {}, False),  # another kind of checksum
        (f"{OTHER}-1", {}, False),
    ],
)
def test_put_compares_an_etag_that_is_an_md5(
    etag: str, headers: dict[str, str], fails: bool
) -> None:
    client, upload = begun(Reply(headers={"etag": f'"{etag}"', **headers}), size=5)
    if fails:
        with pytest.raises(StoreError, match="x in s3://b/run: the store has other bytes"):
            upload.send(1, DATA)
        return
    upload.send(1, DATA)
    assert upload.finish() == f'"{etag}"'
    digest = base64.b64encode(hashlib.md5(b"hello").digest()).decode()
    (asked,) = client.asked
    assert (asked.method, asked.key, asked.headers["content-md5"]) == ("PUT", "run/x", digest)
    assert asked.body_digest == "UNSIGNED-PAYLOAD"


@pytest.mark.parametrize(
    ("part", "whole", "fails"),
    [
        (MD5, WHOLE, False),
        (MD5, f"{OTHER}-2", True),
        (OTHER, f"{OTHER}-2", False),  # the ETags of the parts are no MD5s either
        (MD5, MD5, False),  # a store that computes the ETag of the whole content
    ],
)
def test_finish_compares_the_etag_of_the_parts(part: str, whole: str, fails: bool) -> None:
    answer = Reply(headers={"etag": f'"{part}"'})
    client, upload = begun(answer, answer, done(whole))
    upload.send(2, DATA)
    upload.send(1, DATA)
    if fails:
        with pytest.raises(StoreError, match="x in s3://b/run: the store has other bytes"):
            upload.finish()
    else:
        assert upload.finish() == f'"{whole}"'
    assert client.bodies[-1].index(b"<PartNumber>1<") < client.bodies[-1].index(b"<PartNumber>2<")


MARK = "x-amz-meta-ckptfs-upload"


@pytest.mark.parametrize("is_ours", [True, False])
@pytest.mark.parametrize("is_repeated", [True, False])
def test_finish_after_a_lost_answer_takes_no_other_object_for_its_own(
    is_ours: bool, is_repeated: bool
) -> None:
    part = Reply(headers={"etag": f'"{MD5}"'})
    failed = Reply(body=b"<Error><Code>InternalError</Code></Error>")  # with the status 200
    client, upload = begun(part, part, *([failed] if is_repeated else []))
    upload.send(1, DATA)
    upload.send(2, DATA)
    if is_repeated:
        with pytest.raises(StoreUnavailable):
            upload.finish()
    mark = client.asked[0].headers[MARK] if is_ours else "another"
    head = Reply(headers={"etag": f'"{OTHER}"', MARK: mark})
    client.answers = [refusal(404, "NoSuchUpload"), head]
    if is_ours:
        client.answers[1] = Reply(headers={"etag": f'"{OTHER}-2"', MARK: mark})
        with pytest.raises(StoreError, match="the store has other bytes"):
            upload.finish()
        client.answers = [
            refusal(404, "NoSuchUpload"),
            Reply(headers={"etag": f'"{WHOLE}"', MARK: mark}),
        ]
        assert upload.finish() == f'"{WHOLE}"'
    else:
        with pytest.raises(StoreError, match="another program has ended the upload"):
            upload.finish()


@pytest.mark.parametrize("size", [5, PART_BYTES + 1])
@pytest.mark.parametrize("is_ours", [True, False])
def test_new_object_that_is_there_is_ours_by_its_mark_only(is_ours: bool, size: int) -> None:
    """An answer was lost, or another program has written the object."""
    is_small = size == 5
    client, upload = begun(size=size, is_new=True)
    head = Reply(headers={"etag": f'"{OTHER}"', MARK: upload._mark if is_ours else "another"})
    refused = refusal(412, "PreconditionFailed")
    part = Reply(headers={"etag": f'"{MD5}"'})
    client.answers = [refused, head] if is_small else [part, refused, Reply(204), head]
    upload.send(1, DATA)
    assert upload.finish() == (f'"{OTHER}"' if is_ours else "")
    conditional = [each for each in client.asked if each.headers.get("if-none-match") == "*"]
    assert [each.method for each in conditional] == ["PUT" if is_small else "POST"]
    assert client.asked[-1].method == "HEAD"


def test_shown_etag_is_that_of_the_own_object_only() -> None:
    client, upload = begun(Reply(headers={"etag": f'"{MD5}"'}), size=5)
    upload.send(1, DATA)
    mark = client.asked[0].headers[MARK]
    for shown, expected in ((mark, '"0123"'), ("another", "")):
        client.answers = [Reply(headers={"etag": '"0123"', MARK: shown})]
        assert upload.shown_etag() == expected


def test_finish_refuses_an_answer_that_is_not_of_s3() -> None:
    _, upload = begun(Reply(headers={"etag": f'"{MD5}"'}), Reply(body=b"<html>login</html>"))
    upload.send(1, DATA)
    with pytest.raises(StoreError, match="not that of S3"):
        upload.finish()


@pytest.mark.parametrize("answer", [Reply(), Reply(body=b"<html>login</html>")])
def test_answers_that_are_not_of_s3_are_errors(answer: Reply) -> None:
    client, upload = begun(answer)
    with pytest.raises(StoreError, match="not that of S3"):
        upload.send(1, DATA)
    client.answers = [answer]
    with pytest.raises(StoreError):
        S3Uploads(client, "run/", "s3://b/run").begin("x", PART_BYTES + 1)  # type: ignore[arg-type]


def page(*found: tuple[str, str], more: str = "") -> Reply:
    uploads = "".join(
        f"<Upload><Key>{key}</Key><UploadId>{upload}</UploadId></Upload>" for key, upload in found
    )
    if more:
        uploads += f"<IsTruncated>true</IsTruncated><NextKeyMarker>{more}</NextKeyMarker>"
    return Reply(
        body=f"<ListMultipartUploadsResult>{uploads}</ListMultipartUploadsResult>".encode()
    )


def test_prepare_ends_uploads_of_its_own_names_only() -> None:
    pages = [
        page(("run/a", "1"), ("run/other", "2"), more="run/other"),
        page(("run/b%2B+c", "3"), ("run/b+c", "4"), more="run/other"),  # not further
    ]
    client = ScriptedClient(*pages, Reply(204), Reply(404), Reply(204))
    S3Uploads(client, "run/", "s3://b/run").prepare({"a", "b+ c", "b+c"})  # type: ignore[arg-type]
    ended = [(each.key, each.query["uploadId"]) for each in client.asked[2:]]
    assert ended == [("run/a", "1"), ("run/b+ c", "3"), ("run/b+c", "4")]
    assert client.asked[1].query["key-marker"] == "run/other"


@pytest.mark.parametrize("code", ["AccessDenied", "NoSuchUpload", "NotImplemented"])
def test_prepare_goes_on_without_a_list_of_uploads(
    code: str, caplog: pytest.LogCaptureFixture
) -> None:
    client = ScriptedClient(refusal(403 if code == "AccessDenied" else 404, code))
    S3Uploads(client, "run/", "s3://b/run").prepare({"a"})  # type: ignore[arg-type]
    assert bool(caplog.records) == (code != "NoSuchUpload")  # rclone's word for none


@pytest.mark.parametrize(
    ("body", "is_of_a_store"),
    [(b"<html>login</html>", False), (b"<p>login", False), (b"<ListBucketResult/>", True)],
)
def test_prepare_takes_no_login_page_for_a_store_without_a_list_of_uploads(
    body: bytes, is_of_a_store: bool, caplog: pytest.LogCaptureFixture
) -> None:
    client = ScriptedClient(Reply(body=body))
    uploads = S3Uploads(client, "run/", "s3://b/run")  # type: ignore[arg-type]
    if is_of_a_store:
        uploads.prepare({"a"})
        assert "lists no parts" in caplog.text
    else:
        with pytest.raises(StoreError, match=r"s3://b/run.*not that of S3"):
            uploads.prepare({"a"})


def test_begin_after_a_lost_answer_ends_what_may_have_begun() -> None:
    created = Reply(
        body=b"<InitiateMultipartUpload><UploadId>2</UploadId></InitiateMultipartUpload>"
    )
    client = ScriptedClient(refusal(503, "SlowDown"), page(("run/x", "1")), Reply(204), created)
    uploads = S3Uploads(client, "run/", "s3://b/run")  # type: ignore[arg-type]
    with pytest.raises(StoreUnavailable):
        uploads.begin("x", PART_BYTES + 1)
    uploads.begin("x", PART_BYTES + 1)
    assert [each.method for each in client.asked] == ["POST", "GET", "DELETE", "POST"]


@pytest.mark.parametrize(
    ("etag", "size", "same"),
    [
        (f'"{MD5}"', 5, True),
        (f'"{OTHER}"', 5, False),
        (f'"{WHOLE}"', PART_BYTES + 1, True),
        (f'"{OTHER}-2"', PART_BYTES + 1, False),
        (f'"{OTHER}-3"', PART_BYTES + 1, None),
        ('"0123456789abcdef"', 5, None),
        ("", 5, None),
    ],
)
def test_is_same_knows_what_an_etag_says(etag: str, size: int, same: bool | None) -> None:
    client = ScriptedClient(Reply())
    uploads = S3Uploads(client, "", "s3://b")  # type: ignore[arg-type]

    def digests(part_bytes: int) -> list[bytes]:
        assert part_bytes == (size if size == 5 else PART_BYTES)
        return PARTS[: parts_of(size, part_bytes)]

    assert uploads.is_same(ListedFile("x", size, 0, etag), digests) is same
    if same is False:
        client.answers = [Reply(headers=KMS)]
        assert uploads.is_same(ListedFile("x", size, 0, etag), digests) is None


def test_parts_grow_with_the_file() -> None:
    assert part_bytes_for(10_000 * PART_BYTES, PART_BYTES, 10_000) == PART_BYTES
    larger = part_bytes_for(10_000 * PART_BYTES + 1, PART_BYTES, 10_000)
    assert larger == PART_BYTES + (1 << 20)
    assert parts_of(5 << 40, part_bytes_for(5 << 40, PART_BYTES, 10_000)) <= 10_000
    assert parts_of(0, PART_BYTES) == 1


def test_only_checksums_of_one_kind_contradict() -> None:
    assert contradicts(f'"{MD5}"', f'"{OTHER}"')
    assert contradicts('"0x8D1"', '"0x8D2"')
    assert not contradicts(f'"{MD5}"', f'"{MD5.upper()}"')
    assert not contradicts(f'"{MD5}"', f'"{OTHER}-2"')
    assert not contradicts(f'"{MD5}"', '"0123456789abcdef"')
    assert not contradicts(f'"{MD5}"', "")


def test_refusal_before_the_whole_body_was_sent_is_that_refusal() -> None:
    """As servers do that deny access: they answer the head, and close."""
    body = b"<Error><Code>AccessDenied</Code><Message>planned</Message></Error>"
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def refuse() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 10)
                head = f"HTTP/1.1 403 Forbidden\r\nContent-Length: {len(body)}\r\n\r\n"
                connection.sendall(head.encode() + body)

        thread = threading.Thread(target=refuse)
        thread.start()
        options = {"endpoint_override": f"127.0.0.1:{listener.getsockname()[1]}", "scheme": "http"}
        location = Location("s3", "bucket/run", options, {"access_key": "k", "secret_key": "s"})
        store = open_store(location, 5.0)
        assert isinstance(store, HasUploads)
        uploads = store.uploads()
        assert uploads is not None
        with pytest.raises(AccessDenied, match="planned"):
            uploads.begin("x", PART_BYTES).send(1, memoryview(bytes(PART_BYTES)))
        thread.join()
        store.close()  # type: ignore[attr-defined]
