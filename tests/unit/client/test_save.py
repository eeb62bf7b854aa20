"""A client that gives the cache what it has uploaded ends at once if the user interrupts it."""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ckptfs._client import blocks, client, save
from ckptfs._client.connection import Connection
from ckptfs._config.paths import Place
from ckptfs._model.location import Location
from ckptfs._store.directory_upload import Content
from ckptfs._store.source import SourceFile
from ckptfs.errors import CkptfsError

THREADS = 2


@pytest.fixture
def silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The socket of a daemon that interrupts this process when all threads wait for its answers."""
    monkeypatch.chdir(tmp_path)  # the path of a socket has a limit
    with socket.create_server("sock", family=socket.AF_UNIX) as listener:
        waiting = threading.Barrier(THREADS)

        def serve(connection: socket.socket) -> None:
            with connection:
                connection.recv(1)
                if waiting.wait() == 0:
                    main = threading.main_thread().ident
                    assert main is not None
                    signal.pthread_kill(main, signal.SIGINT)
                while connection.recv(1 << 10):
                    pass

        def accept() -> None:
            for _ in range(THREADS):
                threads.append(threading.Thread(target=serve, args=(listener.accept()[0],)))
                threads[-1].start()

        threads = [threading.Thread(target=accept)]
        threads[0].start()
        yield "sock"
        for thread in threads:
            thread.join()


def test_interrupted_save_ends_the_requests_that_wait_for_the_daemon(
    silent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").write_bytes(bytes(THREADS * save._PIECE_BYTES))
    status = os.stat(tmp_path / "x")
    content = Content(SourceFile(str(tmp_path), "x", status), '"etag"')
    said: list[str] = []
    really_save = save._Seat.save

    def note(*args: Any) -> int:
        try:
            return really_save(*args)
        except CkptfsError as error:
            said.append(str(error))
            raise

    monkeypatch.setattr(save, "_THREADS", THREADS)
    monkeypatch.setattr(save._Seat, "save", note)
    monkeypatch.setattr(blocks, "connect", lambda: Connection(silent, 150.0))
    monkeypatch.setattr(Connection, "borrow_memory", lambda _: os.memfd_create("blocks"))
    monkeypatch.setattr(client, "leased", lambda *_, **__: contextlib.nullcontext("/mount/name"))
    with pytest.raises(KeyboardInterrupt):
        save.save(Location("s3", "bucket/run"), [content])
    assert said == ["the user has interrupted the upload"] * THREADS


def test_programs_wait_in_a_directory_of_their_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own"
    monkeypatch.setattr(save, "runtime_places", lambda _: [Place(own, "")])
    for mode, lock in ((0o700, tmp_path / "node" / "sock.save"), (0o777, own / "save")):
        (tmp_path / "node").mkdir(exist_ok=True)
        (tmp_path / "node").chmod(mode)  # 0o777 is one that others write to, too
        monkeypatch.setenv("CKPTFS_SOCKET", str(tmp_path / "node" / "sock"))
        with save._turn():
            assert lock.is_file()
        assert not lock.exists()
