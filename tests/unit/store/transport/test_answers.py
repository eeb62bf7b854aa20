"""Bodies are received in bursts, whose bytes are counted when a burst or the server's patience
ends."""

import socket
import threading
from collections.abc import Iterator
from typing import Literal

import pytest
from support.fakes import pattern

from ckptfs._store.request_context import Progress
from ckptfs._store.transport import answers
from ckptfs._store.transport.answers import Answer, Limits, Silence, read_into

HEAD = b"HTTP/1.1 206 Partial Content\r\nContent-Length: %d\r\n\r\n"
PIECE_BYTES = 16 << 10
"""As much as one record of TLS brings."""


class Pieces:
    """A connected socket that receives at most a piece at a time, as one with TLS does."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.calls = 0

    def recv_into(self, buffer: memoryview) -> int:
        self.calls += 1
        return self._sock.recv_into(buffer[:PIECE_BYTES])

    def makefile(self, mode: Literal["rb"]) -> object:
        return self._sock.makefile(mode)

    def settimeout(self, seconds: float) -> None:
        self._sock.settimeout(seconds)


@pytest.fixture
def ends() -> Iterator[tuple[Pieces, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Pieces(ours), theirs


class Counts(Progress):
    """A progress that keeps the counts of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: list[int] = []

    def came(self, count: int) -> None:
        super().came(count)
        self.counts.append(count)


def received(sock: Pieces, progress: Progress, buffer: memoryview, silence_s: float = 20.0) -> int:
    """The number of bytes that `read_into` brings from an answer on `sock`."""

    def read() -> int:
        with Answer(Limits(20.0, silence_s), sock, method="GET") as answer:  # type: ignore[arg-type]
            answer.begin()
            return read_into(answer, buffer)

    return progress.run(read)


def sent(theirs: socket.socket, *parts: bytes) -> threading.Thread:
    """A thread that sends `parts`, and leaves the connection open."""
    thread = threading.Thread(target=lambda: [theirs.sendall(part) for part in parts])
    thread.start()
    return thread


@pytest.mark.parametrize("length", [1, 8191, 8192, 8193, PIECE_BYTES, PIECE_BYTES + 1, 1_000_003])
def test_a_body_is_received_whole_from_a_connection_that_stays_open(
    ends: tuple[Pieces, socket.socket], length: int
) -> None:
    sock, theirs = ends
    data, buffer = pattern(length), bytearray(length)
    sender = sent(theirs, HEAD % length, data)
    progress = Progress()
    assert received(sock, progress, memoryview(buffer)) == length
    sender.join()
    assert buffer == data
    assert progress.count == len(HEAD % length) + length


def test_many_pieces_are_counted_at_once(
    ends: tuple[Pieces, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "_BURST_S", 60.0)
    sock, theirs = ends
    length = 4 << 20
    sender = sent(theirs, HEAD % length, pattern(length))
    progress = Counts()
    assert received(sock, progress, memoryview(bytearray(length))) == length
    sender.join()
    assert sock.calls >= length // PIECE_BYTES
    assert len(progress.counts) < 10


def test_bytes_that_came_before_a_silence_are_counted(ends: tuple[Pieces, socket.socket]) -> None:
    sock, theirs = ends
    length, came = 1 << 20, 100_000
    theirs.sendall(HEAD % length + bytes(came))
    progress = Progress()
    with pytest.raises(Silence, match=rf"after {len(HEAD % length) + came} bytes nothing within"):
        received(sock, progress, memoryview(bytearray(length)), silence_s=0.1)
    assert progress.count == len(HEAD % length) + came
