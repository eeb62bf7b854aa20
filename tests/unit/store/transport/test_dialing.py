"""Connections to hosts of which some addresses are dead."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from ckptfs._store.transport import dialing
from ckptfs._store.transport.dialing import Address, Dialer, interleaved, resolve

if TYPE_CHECKING:
    from collections.abc import Iterator

DEADLINE_S = 10.0


def tcp(host: str, port: int) -> Address:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return Address(family, socket.SOCK_STREAM, 6, (host, port))


@pytest.fixture
def alive() -> Iterator[int]:
    """The port of a server at 127.0.0.1."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def hole(alive: int) -> Iterator[str]:
    """An address of the same port that takes no connection, and says nothing."""
    with contextlib.ExitStack() as opened:
        listener = opened.enter_context(socket.socket())
        listener.bind(("127.0.0.3", alive))
        listener.listen(0)
        for _ in range(2):  # its queue is full then
            filler = opened.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.3", alive))
        yield "127.0.0.3"


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The addresses that each name has."""
    found: list[str] = []

    def getaddrinfo(host: str, port: int, **_: Any) -> list[Any]:
        return [
            (each.family, each.kind, 6, "", each.place) for each in (tcp(a, port) for a in found)
        ]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return found


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The addresses that were tried, in their order."""
    seen: list[str] = []

    class Seen(socket.socket):
        def connect_ex(self, address: Any, /) -> int:
            seen.append(address[0])
            return super().connect_ex(address)

    monkeypatch.setattr(dialing.socket, "socket", Seen)
    return seen


def dial(dialer: Dialer, port: int, within_s: float = DEADLINE_S) -> str:
    with contextlib.closing(dialer.dial("host.test", port, within_s)) as sock:
        assert sock.getpeername()[1] == port
        return sock.getpeername()[0]


@pytest.mark.parametrize(
    "dead",
    [
        ["127.0.0.2"],
        ["127.0.0.2", "127.0.0.4", "127.0.0.5"],
        ["hole"],
        ["hole", "127.0.0.2"],
        ["2001:db8::1", "127.0.0.2"],
    ],
)
def test_the_first_address_that_connects_is_taken(
    alive: int, hole: str, resolver: list[str], dead: list[str]
) -> None:
    resolver += [hole if each == "hole" else each for each in dead]
    resolver.append("127.0.0.1")
    assert dial(Dialer(), alive) == "127.0.0.1"


def test_families_alternate() -> None:
    found = [tcp(host, 1) for host in ("::1", "::2", "::3", "127.0.0.1", "127.0.0.2")]
    hosts = [each.place[0] for each in interleaved(found)]
    assert hosts == ["::1", "127.0.0.1", "::2", "127.0.0.2", "::3"]


def test_the_address_that_worked_is_tried_first(
    alive: int, resolver: list[str], tried: list[str]
) -> None:
    resolver += ["127.0.0.2", "127.0.0.1"]
    dialer = Dialer()
    dial(dialer, alive)
    dial(dialer, alive)
    assert tried == ["127.0.0.2", "127.0.0.1", "127.0.0.1"]


def test_an_address_that_was_silent_is_tried_last(
    alive: int, resolver: list[str], tried: list[str]
) -> None:
    resolver += ["127.0.0.1", "127.0.0.2"]
    dialer = Dialer()
    dial(dialer, alive)
    dialer.was_silent("host.test", alive)
    dial(dialer, alive)
    assert tried == ["127.0.0.1", "127.0.0.2", "127.0.0.1"]


def test_an_address_that_is_gone_is_replaced(alive: int, resolver: list[str]) -> None:
    resolver += ["127.0.0.1"]
    dialer = Dialer()
    dial(dialer, alive)
    with socket.create_server(("127.0.0.6", alive)):
        resolver[:] = ["127.0.0.6"]
        assert dial(dialer, alive) == "127.0.0.6"


def test_the_loser_is_closed(
    alive: int, hole: str, resolver: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[socket.socket] = []

    class Noted(socket.socket):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(dialing.socket, "socket", Noted)
    resolver += [hole, "127.0.0.2", "127.0.0.1"]
    won = Dialer().dial("host.test", alive, DEADLINE_S)
    assert [sock for sock in made if sock.fileno() >= 0] == [won]
    assert won.getblocking() is False  # its user sets a timeout
    won.close()


def test_an_error_names_all_addresses(alive: int, hole: str, resolver: list[str]) -> None:
    resolver += ["127.0.0.2", "127.0.0.4"]
    with pytest.raises(ConnectionRefusedError) as failed:
        Dialer().dial("host.test", alive, DEADLINE_S)
    text = "Connection refused (127.0.0.2), Connection refused (127.0.0.4)"
    assert failed.value.strerror == text
    resolver += [hole]
    with pytest.raises(TimeoutError, match=r"'host.test' port \d+ within 0.5 s \(Connection ref"):
        Dialer().dial("host.test", alive, 0.5)
    resolver.clear()
    with pytest.raises(OSError, match=r"'host\.test' has no address"):
        Dialer().dial("host.test", alive, DEADLINE_S)


# -- the resolver


def test_a_name_without_an_address() -> None:
    with pytest.raises(OSError, match=r"cannot resolve 'no-such-host\.invalid'"):
        resolve("no-such-host.invalid", 80, DEADLINE_S)
    with pytest.raises(OSError, match="not a valid host name"):
        resolve("a" * 70 + ".test", 80, DEADLINE_S)


def test_a_resolver_that_hangs_holds_no_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    answers = threading.Event()

    def getaddrinfo(host: str, port: int, **_: Any) -> list[Any]:
        asked.append(host)
        answers.wait()
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    threads = threading.active_count()
    for _ in range(3):
        with pytest.raises(TimeoutError, match=r"'slow\.test' within 0\.05 s: the resolver hangs"):
            resolve("slow.test", 80, 0.05)
    assert asked == ["slow.test"]  # they share one look-up
    assert threading.active_count() == threads + 1
    monkeypatch.setattr(dialing, "_LOOKUPS_MAX", 1)
    with pytest.raises(OSError, match="too many host names"):
        resolve("other.test", 80, 0.05)
    answers.set()
    while threading.active_count() > threads:
        time.sleep(0.01)
    assert resolve("slow.test", 80, DEADLINE_S) == [tcp("127.0.0.1", 80)]


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_an_address_needs_no_resolver(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "Thread", None)
    assert resolve(host, 80, DEADLINE_S)[0].place[:2] == (host, 80)
