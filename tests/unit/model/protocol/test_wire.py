"""Messages survive the wire. Decoding rejects all other lines, and does not repeat them."""

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptfs._model.counters import Counts, RequestCounts
from ckptfs._model.location import Location
from ckptfs._model.manifest import Skipped
from ckptfs._model.protocol.message import LINE_BYTES_MAX
from ckptfs._model.protocol.replies import (
    ActivityReply,
    Attached,
    AttachmentStatus,
    CheckpointActivity,
    Done,
    Failed,
    FileError,
    Holder,
    Prefetching,
    ProcessActivity,
    Reply,
    StatusReply,
)
from ckptfs._model.protocol.requests import (
    GLOBS_MAX,
    Activity,
    Attach,
    Detach,
    GetTrace,
    PrefetchProgress,
    Request,
    Restart,
    StartPrefetch,
    Status,
    Stop,
)
from ckptfs._model.protocol.wire import decode_reply, decode_request, encode
from ckptfs.errors import BY_CODE, CkptfsError, ProtocolError

SECRET = "S3CR3TS3CR3T"
PLACE = Location("s3", "bucket/a\nb", {"region": "eu", "anonymous": True}, {"secret_key": SECRET})
REQUESTS: list[Request] = [
    Attach(location=PLACE),
    Attach(location=Location("local", "/ü"), pinned=True),
    Detach(name="a"),
    Detach(location=PLACE, force=True),
    Status(),
    Status(request="a-B_3.x"),
    Activity(),
    StartPrefetch(name="a", globs=["*"], rate=5),
    GetTrace(name="a"),
    GetTrace(location=PLACE),
    PrefetchProgress(),
    Restart(),
    Stop(),
    Stop(force=True),
]
REPLIES: list[Reply] = [
    Attached(mount="/m", name="a", uri="file:///a", version="0", files=1, size=2, skipped=3),
    Done(),
    Failed(code="busy", message="line\nline"),
    StatusReply(
        version="1",
        pid=1,
        mount="/m",
        cache_dir="/c",
        cache_bytes=1 << 50,
        cache_bytes_max=0,
        fetched_bytes=1,
        taken_bytes=4,
        given_bytes=5,
        passthrough="on",
        restarts=3,
        fetched_spans=2,
        attachments=[
            AttachmentStatus(
                name="a",
                path="/m/a",
                uri="file:///a",
                version="0",
                state="lazy",
                files=1,
                size=2,
                cached=0,
                holders=[1, 2],
                open_files=0,
                pinned=False,
                attached=1.5,
                uid=0,
                skipped=[Skipped("x", "y")],
                skipped_count=1,
                processes=[Holder(1, "python3 train.py", 2)],
                reads_per_s=1.5,
            )
        ],
    ),
    Prefetching(
        ended=True,
        files=2,
        bytes=1 << 50,
        cached=3,
        fetched=4,
        errors=[FileError("a", "store", "gone")],
        error_count=1,
        early_code="limit",
        early_message="full",
    ),
    ActivityReply(
        version="1",
        pid=1,
        mount="/m",
        at_s=1.5,
        started=2.5,
        restarts=0,
        passthrough="off: no",
        cache_bytes=1,
        cache_bytes_max=2,
        evicted_bytes=3,
        evicted_objects=4,
        fetched_bytes=5,
        fetched_spans=6,
        hedged=1,
        running=8,
        in_flight_bytes=9,
        queue={"demand": 1},
        counts=Counts(
            retries=7, failures={"store-timeout": 1}, errors={"stale": 1}, latency_ns=[0, 1]
        ),
        requests=[RequestCounts("read", {"ok": 1}, [1])],
        checkpoints=[
            CheckpointActivity(
                name="a",
                uri="file:///a",
                in_flight=1,
                queued=0,
                counts=Counts(),
                processes=[ProcessActivity(1, "x", Counts(opens=1))],
                processes_left_out=2,
            )
        ],
        checkpoints_left_out=3,
    ),
]


@pytest.mark.parametrize("message", REQUESTS, ids=lambda m: type(m).__name__)
def test_requests_survive_the_wire(message: Request) -> None:
    line = encode(message)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert decode_request(line) == message
    with pytest.raises(ProtocolError):
        decode_reply(line)


@pytest.mark.parametrize("message", REPLIES, ids=lambda m: type(m).__name__)
def test_replies_survive_the_wire(message: Reply) -> None:
    line = encode(message)
    assert line.count(b"\n") == 1
    assert decode_reply(line) == message
    with pytest.raises(ProtocolError):
        decode_request(line)


def _attach(**changes: object) -> bytes:
    return json.dumps({**json.loads(encode(Attach(location=PLACE))), **changes}).encode()


def _prefetch(**changes: object) -> bytes:
    message = StartPrefetch(name=SECRET, globs=["*"])
    return json.dumps({**json.loads(encode(message)), **changes}).encode()


def _located(**changes: object) -> bytes:
    place = json.loads(encode(Attach(location=PLACE)))["location"]
    return _attach(location={**place, **changes})


BAD = {
    "empty": b"",
    "not json": b"attach " + SECRET.encode(),
    "cut": encode(Attach(location=PLACE))[:-5],
    "not an object": json.dumps([SECRET]).encode(),
    "null": b"null",
    "no operation": json.dumps({"v": 1, "x": SECRET}).encode(),
    "unknown operation": _attach(op="format"),
    "newer version": _attach(v=2),
    "version zero": _attach(v=0),
    "version as text": _attach(v="1"),
    "unknown field": _attach(more=SECRET),
    "request with a line end": _attach(request="a\n"),
    "request with a space": _attach(request="a b"),
    "long request": _attach(request="a" * 65),
    "wrong type": _attach(pinned=SECRET),
    "location as text": _attach(location=SECRET),
    "no location": json.dumps({"op": "attach"}).encode(),
    "unknown kind": _located(kind="ftp"),
    "unknown field of the location": _located(more=SECRET),
    "path as number": _located(path=5),
    "secret as list": _located(secrets={"secret_key": [SECRET]}),
    "secrets as list": _located(secrets=[SECRET]),
    "option as object": _located(options={"region": {"x": SECRET}}),
    "deep": b"[" * 200_000 + SECRET.encode(),
    "deep objects": b'{"op":"attach","location":' + b'{"a":' * 200_000,
    "deep known field": b'{"op":"attach","location":{"secrets":' + b'{"a":' * 100_000,
    "prefetch of nothing": _prefetch(globs=[]),
    "too many globs": _prefetch(globs=["*"] * (GLOBS_MAX + 1)),
    "globs as text": _prefetch(globs=SECRET),
    "negative rate": _prefetch(rate=-1),
    "huge rate": _prefetch(rate=(1 << 50) + 1),
    "rate as text": _prefetch(rate="5M"),
    "unknown field of a prefetch": _prefetch(more=SECRET),
    "prefetch without a name": json.dumps({"op": "prefetch", "globs": ["*"]}).encode(),
    "not utf-8": b'{"op":"attach","x":"\xff' + SECRET.encode() + b'"}',
    "trailing": encode(Status()) + SECRET.encode(),
    "two": encode(Status()) * 2,
}


@pytest.mark.parametrize("line", BAD.values(), ids=BAD)
def test_everything_else_is_refused_and_not_repeated(line: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        decode_request(line)
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    assert len(str(caught.value)) < 300


@given(st.integers(0, 200), st.sampled_from(["replace", "cut", "insert"]), st.binary(max_size=4))
def test_a_line_with_an_error_in_it_does_not_show_its_secret(
    place: int, how: str, noise: bytes
) -> None:
    line = bytearray(encode(Attach(location=PLACE)))
    place %= len(line)
    end = {"replace": place + len(noise), "cut": len(line), "insert": place}[how]
    line[place:end] = noise
    message = ""
    try:
        decode_request(bytes(line))
    except ProtocolError as error:
        message = str(error)
    assert SECRET not in message


@given(st.binary(max_size=60))
def test_noise_is_refused(noise: bytes) -> None:
    for decode in (decode_request, decode_reply):
        with pytest.raises(ProtocolError):
            decode(noise)


def test_a_status_of_another_release_is_understood() -> None:
    (status,) = (reply for reply in REPLIES if isinstance(reply, StatusReply))
    told = json.loads(encode(status))
    assert decode_reply(json.dumps(told | {"news": [SECRET]}).encode()) == status
    for name in ("taken_bytes", "given_bytes", "log"):  # since the first release
        del told[name]
    older = decode_reply(json.dumps(told).encode())
    assert older == msgspec.structs.replace(status, taken_bytes=0, given_bytes=0, log="")


def test_activity_reply_has_what_the_previous_release_requires() -> None:
    (activity,) = (reply for reply in REPLIES if isinstance(reply, ActivityReply))
    sent = json.loads(encode(activity))
    for level in (sent, *sent["checkpoints"]):
        assert {"retries", "failures", "counts"} <= level.keys()


def test_a_full_status_fits_into_a_line() -> None:
    status = REPLIES[3]
    assert isinstance(status, StatusReply)
    [attachment] = status.attachments
    size = len(encode(status)) * 1000
    assert attachment.skipped_count
    assert size < LINE_BYTES_MAX


def test_every_error_has_a_code_of_its_own() -> None:
    def tree(root: type[CkptfsError]) -> set[type[CkptfsError]]:
        return {root, *(leaf for child in root.__subclasses__() for leaf in tree(child))}

    own = {cls for cls in tree(CkptfsError) if cls.__module__ == "ckptfs.errors"}
    assert len({cls.code for cls in own}) == len(own)
    for cls in own:
        assert BY_CODE[cls.code] is cls
        assert str(cls("one line")) == "one line"
