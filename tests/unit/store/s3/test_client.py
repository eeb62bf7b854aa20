"""The S3 client: where requests go, how long it waits, and what it makes of HTTP."""

from __future__ import annotations

import contextlib
import io
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterable
from typing import Any, NamedTuple

import pytest

from ckptfs._store.request_context import Progress, ends_in
from ckptfs._store.request_metrics import REQUESTS
from ckptfs._store.s3.client import Asked, S3Client
from ckptfs._store.s3.keys import fixed_keys
from ckptfs._store.s3.options import S3Options
from ckptfs._store.s3.sigv4 import Keys
from ckptfs._store.transport.answers import read_all, read_into
from ckptfs._store.transport.errors import BrokenConnection, S3Error, SilentServer

TIMEOUT_S = 5.0
SHORT_S = 0.5
"""The longest silence where a server is slower than that on purpose."""


class Request(NamedTuple):
    """One request as it came."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes
    nth: int
    """On its connection, from 1."""

    @property
    def region(self) -> str:
        return self.headers["authorization"].split("/")[2]


Piece = bytes | float
"""Bytes to send, or seconds to wait. b"" ends the connection."""
Answer = Callable[[Request], Iterable[Piece]]


class Told:
    """A server that answers with what `answer` says."""

    def __init__(self, answer: Answer, host: str = "127.0.0.1") -> None:
        self.answer = answer
        self.requests: list[Request] = []
        self.connections = 0
        self._host = host
        self._ends = threading.Event()
        self._threads: list[threading.Thread] = []
        self._open: list[socket.socket] = []

    def __enter__(self) -> Told:
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        self._listener = socket.create_server((self._host, 0), family=family)
        self.port = self._listener.getsockname()[1]
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        for each in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(TIMEOUT_S)
            assert not thread.is_alive()
        self._listener.close()

    def _start(self, target: Callable[..., None], *args: object) -> None:
        self._threads.append(threading.Thread(target=target, args=args))
        self._threads[-1].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock = self._listener.accept()[0]
                self.connections += 1
                self._open.append(sock)
                self._start(self._serve, sock)

    def _serve(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError), sock.makefile("rb") as incoming:
            count = 0
            while line := incoming.readline().decode():
                headers: dict[str, str] = {}
                while more := incoming.readline().decode().strip():
                    name, _, headers[name.lower()] = more.replace(": ", ":").partition(":")
                body = incoming.read(int(headers.get("content-length", 0)))
                method, target, _ = line.split(" ")
                count += 1
                self.requests.append(Request(method, target, headers, body, count))
                for piece in self.answer(self.requests[-1]):
                    if isinstance(piece, bytes):
                        if not piece:
                            return
                        sock.sendall(piece)
                    elif self._ends.wait(piece):
                        return


def http(status: int = 200, body: bytes = b"", **headers: str) -> bytes:
    lines = [f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items()]
    head = f"HTTP/1.1 {status} Because\r\n{''.join(lines)}Content-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def error(status: int, code: str, fields: str = "", **headers: str) -> bytes:
    text = f"<Error><Code>{code}</Code><Message>told so</Message>{fields}</Error>"
    return http(status, text.encode(), **headers)


@contextlib.contextmanager
def serving(
    answer: Answer, timeout_s: float = TIMEOUT_S, host: str = "127.0.0.1", **options: Any
) -> Generator[tuple[Told, S3Client]]:
    shown = f"[{host}]" if ":" in host else host
    with Told(answer, host) as server:
        known = {"endpoint_override": f"http://{shown}:{server.port}", **options}
        keys = fixed_keys(Keys("key", "S3CR3T"))
        client = S3Client("bucket", S3Options(**known), keys, timeout_s)
        try:
            yield server, client
        finally:
            client.close()


def get(client: S3Client, key: str = "a", **more: Any) -> bytes:
    with client.request(Asked("GET", key, **more)) as answer:
        return read_all(answer, 1 << 20)


# -- addresses


def test_an_endpoint_with_a_path() -> None:
    with serving(lambda _: [http(body=b"x")]) as (server, client):
        for given in ("127.0.0.1:{}/storage/v1/s3", "HTTP://127.0.0.1:{}/storage/v1/s3/"):
            options = S3Options(endpoint_override=given.format(server.port), scheme="http")
            client = S3Client("bucket", options, fixed_keys(Keys("key", "S3CR3T")), TIMEOUT_S)
            assert get(client, "a b") == b"x"
            assert get(client, "", query={"list-type": "2"}) == b"x"
            client.close()
    targets = [request.target for request in server.requests]
    assert targets == ["/storage/v1/s3/bucket/a%20b", "/storage/v1/s3/bucket?list-type=2"] * 2


def test_an_ipv6_literal() -> None:
    with serving(lambda _: [http(body=b"x")], host="::1") as (server, client):
        assert get(client) == b"x"
    assert server.requests[0].headers["host"] == f"[::1]:{server.port}"


@pytest.mark.parametrize("base", ["", "/storage/v1/s3", "/a@b/c%20d"])
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@pytest.mark.parametrize(
    ("key", "query"), [("a b/c+%/ü?#", {}), ("x//./../y", {}), ("", {"prefix": "a/ b+&=", "x": ""})]
)
def test_signatures_are_those_of_botocore(
    base: str, host: str, key: str, query: dict[str, str]
) -> None:
    from botocore.auth import S3SigV4Auth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials

    shown = f"[{host}]" if ":" in host else host
    with Told(lambda _: [http(body=b"x")], host) as server:
        options = S3Options(
            endpoint_override=f"http://{shown}:{server.port}{base}",
            region="eu-west-3",
            requester_pays=True,
        )
        client = S3Client("bucket", options, fixed_keys(Keys("key", "S3CR3T", "tok")), TIMEOUT_S)
        get(client, key, query=query)
        client.close()
    [sent] = server.requests
    parts = sent.headers["authorization"].removeprefix("AWS4-HMAC-SHA256 ").split(", ")
    claimed = dict(part.split("=", 1) for part in parts)
    signed = {name: sent.headers[name] for name in claimed["SignedHeaders"].split(";")}
    assert {"host", "x-amz-request-payer", "x-amz-security-token"} < signed.keys()
    request: Any = AWSRequest(sent.method, f"http://{signed['host']}{sent.target}", signed)
    request.context["timestamp"] = signed["x-amz-date"]
    theirs: Any = S3SigV4Auth(Credentials("key", "S3CR3T", "tok"), "s3", "eu-west-3")
    text = theirs.string_to_sign(request, theirs.canonical_request(request))
    assert theirs.signature(text, request) == claimed["Signature"]


def test_requester_pays() -> None:
    with serving(lambda _: [http(body=b"x")], requester_pays=True) as (server, client):
        get(client)
        with client.request(Asked("HEAD", "a")):
            pass
    for request in server.requests:
        assert request.headers["x-amz-request-payer"] == "requester"
        assert "x-amz-request-payer" in request.headers["authorization"]


def test_a_server_that_wants_the_bucket_in_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a store of which each request names the bucket in its host, or is refused."""
    here = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda _, *more, **m: here("127.0.0.1", *more, **m))

    def answer(request: Request) -> list[bytes]:
        if not request.headers["host"].startswith("bucket.oss.test:"):
            return [error(403, "SecondLevelDomainForbidden")]
        return [http(body=request.target.encode())]

    with Told(answer) as server:
        options = S3Options(endpoint_override=f"http://oss.test:{server.port}")
        client = S3Client("bucket", options, fixed_keys(None), TIMEOUT_S)
        assert [get(client), get(client)] == [b"/a", b"/a"]
        client.close()
        assert len(server.requests) == 3  # it is remembered
        first = S3Client("bucket", options, fixed_keys(None), TIMEOUT_S)
        with first.request(Asked("HEAD", "a")):  # whose refusal has no body
            pass
        first.close()


# -- regions


def regional(refusal: bytes, says: str = "") -> Answer:
    """A server that wants signatures of eu-west-3. `refusal`: to others; `says`: which questions
    after the bucket it answers, by method."""

    def answer(request: Request) -> list[bytes]:
        if request.region == "eu-west-3":
            return [http(body=b"" if request.method == "HEAD" else b"x")]
        is_question = request.target.rstrip("/") in ("/bucket", "/bucket?location=")
        if is_question and says == request.method == "HEAD":
            return [http(403, x_amz_bucket_region="eu-west-3")]
        if is_question and says == request.method:
            return [http(body=b"<LocationConstraint>eu-west-3</LocationConstraint>")]
        end = refusal.index(b"\r\n\r\n") + 4
        return [refusal[:end] if request.method == "HEAD" else refusal]

    return answer


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(
    ("refusal", "says"),
    [
        (error(400, "AuthorizationHeaderMalformed", "<Region>eu-west-3</Region>"), "GET"),
        (error(400, "AuthorizationHeaderMalformed", x_amz_bucket_region="eu-west-3"), ""),
        (error(400, "IllegalLocationConstraintException", "<Region>eu-west-3</Region>"), "GET"),
        (error(301, "PermanentRedirect", x_amz_bucket_region="eu-west-3"), ""),
        (error(307, "TemporaryRedirect", x_amz_bucket_region="eu-west-3"), ""),
        (error(301, "PermanentRedirect", "<Endpoint>other.test</Endpoint>"), "HEAD"),
        (error(400, "AuthorizationHeaderMalformed"), "HEAD"),
        (error(400, "AuthorizationHeaderMalformed"), "GET"),
    ],
)
def test_the_region_is_learned(refusal: bytes, says: str, method: str) -> None:
    with serving(regional(refusal, says)) as (server, client):
        for _ in range(3):
            with client.request(Asked(method, "a")) as answer:
                answer.read()
    regions = [request.region for request in server.requests]
    assert regions[-3:] == ["eu-west-3"] * 3  # it is remembered
    assert len(regions) <= 6


def test_a_region_that_nothing_tells_is_asked_for_once() -> None:
    refusal = error(301, "PermanentRedirect")
    with serving(lambda request: [refusal if request.method == "GET" else http(301)]) as told:
        server, client = told
        for _ in range(3):
            with pytest.raises(S3Error, match="PermanentRedirect"):
                get(client)
    targets = [f"{request.method} {request.target}" for request in server.requests]
    questions = ["HEAD /bucket", "GET /bucket?location="]
    assert targets == ["GET /bucket/a", *questions, *["GET /bucket/a"] * 2]


def test_requests_beside_each_other_ask_once() -> None:
    refusal = error(301, "PermanentRedirect")
    with serving(regional(refusal, "HEAD")) as (server, client):
        threads = [threading.Thread(target=get, args=(client,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        questions = [each for each in server.requests if each.target == "/bucket"]
        answered = [each for each in server.requests if each.region == "eu-west-3"]
        assert (len(questions), len(answered)) == (1, 8)


def test_a_request_moves_twice_at_most() -> None:
    count = iter(range(99))

    def answer(_: Request) -> list[bytes]:
        return [error(400, "AuthorizationHeaderMalformed", f"<Region>r-{next(count)}</Region>")]

    with serving(answer) as (server, client):
        with pytest.raises(S3Error, match="AuthorizationHeaderMalformed"):
            get(client)
        assert len(server.requests) == 3


# -- time


def test_a_slow_first_byte_raises_patience_and_ends_well() -> None:
    def answer(_: Request) -> Iterable[Piece]:
        return [1.5 * SHORT_S, http(body=b"x")]

    with serving(answer, SHORT_S) as (_, client):
        assert client.patience.seconds == SHORT_S
        tries, data = 0, b""
        while not data:
            tries += 1
            with contextlib.suppress(SilentServer), ends_in(TIMEOUT_S):
                data = get(client)
        assert client.patience.seconds > SHORT_S
        assert 2 <= tries <= 4
        assert get(client) == b"x"  # the next one waits as long at once


def test_a_slow_body_after_a_quick_head_is_a_slow_first_byte() -> None:
    def answer(_: Request) -> Iterable[Piece]:
        return [http(body=b"xy")[:-2], 1.5 * SHORT_S, b"xy"]

    with serving(answer, SHORT_S) as (_, client):
        with pytest.raises(SilentServer):
            get(client)
        assert client.patience.seconds > SHORT_S
        assert get(client) == b"xy"


def test_silence_within_a_body_is_as_long_as_ever() -> None:
    def answer(_: Request) -> Iterable[Piece]:
        # More than one read of Python's buffer brings: what comes with the head is no body yet.
        return [http(body=bytes(1 << 20))[:-9], 9.0]

    with serving(answer, SHORT_S) as (_, client):
        with pytest.raises(SilentServer, match=r"after \d+ bytes nothing within 0\.5"):
            get(client)
        assert client.patience.seconds == SHORT_S


def test_one_answer_may_be_waited_for_longer() -> None:
    def answer(_: Request) -> Iterable[Piece]:
        return [2 * SHORT_S, http(body=b"x")]

    with serving(answer, SHORT_S) as (_, client):
        assert get(client, query={"list-type": "2"}, patience_s=TIMEOUT_S) == b"x"
        with ends_in(SHORT_S / 2), pytest.raises(SilentServer):
            get(client, query={"list-type": "2"}, patience_s=TIMEOUT_S)
        assert client.patience.seconds == SHORT_S


def slow_body(pieces: int) -> Answer:
    """64 KiB in `pieces`, one after the other, each after a fifth of `SHORT_S`."""
    size = (64 << 10) // pieces

    def answer(_: Request) -> Iterable[Piece]:
        yield http(body=bytes(64 << 10))[: -64 << 10]
        for _number in range(pieces):
            yield SHORT_S / 5
            yield bytes(size)

    return answer


def test_bytes_that_keep_coming_are_waited_for() -> None:
    with serving(slow_body(16), SHORT_S) as (_, client):
        buffer = memoryview(bytearray(64 << 10))
        asked = Asked("GET", "a", headers={"range": "x"})
        with ends_in(2 * SHORT_S), client.request(asked) as answer:
            assert read_into(answer, buffer) == 64 << 10
        # No caller waits for a page that comes later.
        with ends_in(SHORT_S), pytest.raises(SilentServer, match=r"is over|nothing within"):
            get(client, query={"list-type": "2", "prefix": ""})


def test_a_trickle_ends() -> None:
    with serving(slow_body(1 << 16), SHORT_S) as (_, client), pytest.raises(SilentServer) as failed:
        get(client)
    assert "no more than" in str(failed.value)


def test_a_read_that_is_given_up_ends_though_bytes_come() -> None:
    with serving(slow_body(16), SHORT_S) as (_, client):
        progress = Progress()
        timer = threading.Timer(SHORT_S, progress.give_up)
        timer.start()
        with pytest.raises(BrokenConnection):
            progress.run(lambda: get(client))
        timer.join()


def test_a_silent_connection_takes_the_kept_ones_with_it() -> None:
    silent = threading.Event()

    def answer(_: Request) -> Iterable[Piece]:
        return [9.0] if silent.is_set() else [http(body=b"x")]

    with serving(answer, SHORT_S) as (server, client):
        with contextlib.ExitStack() as opened:
            for _ in range(3):  # beside each other
                opened.enter_context(client.request(Asked("GET", "a"))).read()
        assert server.connections == 3
        silent.set()
        with pytest.raises(SilentServer):
            get(client)
        silent.clear()
        assert get(client) == b"x"
        assert server.connections == 4


def test_a_large_body_is_sent_in_pieces() -> None:
    body = bytes(range(256)) * 4096
    asked = Asked("PUT", "a", body=body)
    with serving(lambda _: [http()]) as (server, client), client.request(asked):
        pass
    assert server.requests[0].body == body
    assert server.requests[0].headers["content-length"] == str(len(body))


# -- HTTP


@pytest.mark.parametrize(
    "interim",
    [
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 102 Processing\r\n\r\n" * 3,
        b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n",
    ],
)
def test_interim_answers_are_skipped(interim: bytes) -> None:
    with serving(lambda _: [interim + http(body=b"x")]) as (server, client):
        assert [get(client), get(client)] == [b"x", b"x"]
        assert server.connections == 1


def test_an_upgrade_that_was_not_asked_for() -> None:
    with serving(lambda _: [http(101)]) as (_, client), pytest.raises(S3Error, match="101"):
        get(client)


@pytest.mark.parametrize("last", [http(body=b"x", Connection="close"), b"HTTP/1.0 200 OK\r\n\r\nx"])
def test_the_last_answer_of_a_connection(last: bytes) -> None:
    with serving(lambda _: [last, b""]) as (server, client):
        assert [get(client), get(client)] == [b"x", b"x"]
        assert server.connections == 2


def test_a_kept_connection_that_the_server_has_closed() -> None:
    with serving(lambda _: [http(body=b"x"), b""]) as (server, client):
        for _ in range(5):
            assert get(client) == b"x"
        assert server.connections == 5


def test_a_kept_connection_that_ends_when_it_is_asked() -> None:
    """The server's decision to close crosses the next request."""

    def answer(request: Request) -> Iterable[Piece]:
        return [b""] if request.nth > 1 else [http(body=b"x")]

    with serving(answer) as (server, client):
        for _ in range(3):
            assert get(client) == b"x"
        assert server.connections == 3


def test_bytes_after_an_answer_end_its_connection() -> None:
    # More than a buffer of the response takes in, which Python 3.14 has made 128 KiB.
    more = bytes(2 * io.DEFAULT_BUFFER_SIZE + (64 << 10))
    with serving(lambda _: [http(body=b"x") + more]) as (server, client):
        assert get(client) == b"x"
        time.sleep(0.05)  # all of it is there
        assert get(client) == b"x"
        assert server.connections == 2


def test_questions_are_counted() -> None:
    def counts() -> dict[str, int]:
        return {each.kind: sum(each.outcomes.values()) for each in REQUESTS.snapshot()}

    refusal = error(400, "AuthorizationHeaderMalformed")
    with serving(regional(refusal, "GET")) as (server, client):
        before = counts()
        get(client)
        after = counts()
        assert sum(after.values()) - sum(before.values()) == len(server.requests) == 4
