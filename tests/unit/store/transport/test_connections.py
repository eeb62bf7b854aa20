"""Requests on kept connections that the server closes: which of them are sent again."""

import socket
import threading
from collections.abc import Iterator

import pytest

from ckptfs._model.endpoints import Endpoint
from ckptfs._store.s3.options import S3Options
from ckptfs._store.transport.answers import Limits, read_all
from ckptfs._store.transport.connections import Connections

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"


class Closing:
    """A server that answers the first request of each connection, and closes at the second one,
    which it has then received."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = Endpoint("http", "127.0.0.1", self._listener.getsockname()[1])
        self.received: list[str] = []
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            with connection:
                for is_answered in (True, False):
                    request = connection.recv(1 << 16)
                    if request.startswith(b"END"):
                        return
                    if request:
                        self.received.append(request.split(b" ")[0].decode())
                    if request and is_answered:
                        connection.sendall(ANSWER)

    def end(self) -> None:
        assert self.endpoint.port
        with socket.create_connection((self.endpoint.host, self.endpoint.port)) as last:
            last.sendall(b"END")
            self._thread.join()
        self._listener.close()


@pytest.fixture
def server() -> Iterator[Closing]:
    server = Closing()
    yield server
    server.end()


def ask(connections: Connections, server: Closing, method: str) -> None:
    limits = Limits(5.0, 5.0)
    connection, answer = connections.send(method, server.endpoint, "/", {"host": "x"}, b"", limits)
    with connections.reading(connection, answer):
        read_all(answer, 100)


def test_request_on_a_connection_that_was_just_closed_is_sent_again(server: Closing) -> None:
    connections = Connections(S3Options(), 5.0)
    ask(connections, server, "GET")
    ask(connections, server, "GET")
    assert server.received == ["GET", "GET", "GET"]
    connections.close()


def test_post_on_a_connection_that_was_just_closed_is_left_to_its_caller(server: Closing) -> None:
    """The server may have carried it out."""
    connections = Connections(S3Options(), 5.0)
    ask(connections, server, "GET")
    with pytest.raises(ConnectionError):
        ask(connections, server, "POST")
    assert server.received == ["GET", "POST"]
    ask(connections, server, "POST")
    connections.close()
