"""The process that sends one upload of the background. The daemon starts it
(``ckptfs._daemon.uploads.sender``).

Standard input has the task, and standard output gets a JSON line for each step. SIGTERM ends the
upload, which removes its unfinished objects first.
"""

import os
import signal
import sys
import threading
import time
from contextlib import closing, suppress
from typing import NoReturn

import msgspec

from ckptfs._client.uploading import upload_and_save
from ckptfs._config.load import load_config
from ckptfs._model.upload_messages import NotSent, Progressed, Setup, Told
from ckptfs._model.uploads import Sent
from ckptfs._os.write_all import write_all
from ckptfs._store import directory_upload
from ckptfs._store.source import files_in
from ckptfs._store.target import open_target
from ckptfs._workers.lifeline import end_before_others, end_with
from ckptfs._workers.messages import failed
from ckptfs.errors import CannotUpload, CkptfsError

_PROGRESS_S = 0.2
"""Time between two lines with the progress: five a second look live."""


def main() -> None:
    """Send what standard input describes, and say how that ended."""
    end_with(int(sys.argv[1]))
    end_before_others()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # from a terminal; the daemon decides
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end)
    setup = msgspec.json.decode(sys.stdin.buffer.read(), type=Setup)
    # The daemon in which this user's programs attach gets the files: the node's, if there is one.
    with suppress(CkptfsError):  # a file that is wrong by now costs only the cache's part
        if load_config().socket != setup.socket:
            os.environ["CKPTFS_SOCKET"] = setup.socket
    _tell(_outcome(setup))
    os._exit(0)  # threads of a library would keep the process alive


def _end(number: int, _: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the objects are being removed
    raise SystemExit(128 + number)


def _outcome(setup: Setup) -> Sent | NotSent:
    try:
        return send(setup, _Progress())
    except Exception as error:
        told = failed(error, "upload")
        return NotSent(told.code, told.message, told.retry_after_s)


def send(setup: Setup, told: directory_upload.Told) -> Sent:
    """Upload the staged files, and give them to the daemon. Raises as ``ckptfs.upload``."""
    _check_staged(setup)
    store, uploads = open_target(setup.location, setup.store_timeout_s, setup.credentials)
    wanted = directory_upload.Wanted(
        overwrite=setup.options.overwrite,
        rate=setup.options.rate,
        merge=setup.options.merge,
        left_out=frozenset(setup.options.left_out),
    )
    with closing(store):
        done = upload_and_save(
            setup.directory,
            store,
            uploads,
            wanted,
            lambda: setup.asked,
            told,
            cache=setup.options.cache,
        )
    return Sent(
        **msgspec.structs.asdict(done.uploaded),
        cached_bytes=done.cached_bytes,
        cache_error=done.cache_error,
    )


def _check_staged(setup: Setup) -> None:
    """Raise CannotUpload unless the directory has all files that were staged. A checkpoint with
    fewer files would look like a complete one."""
    files = files_in(setup.directory, (), lambda _: None)
    if (len(files), sum(file.size for file in files)) != (setup.files, setup.bytes):
        raise CannotUpload(
            f"{setup.directory} has {len(files)} of {setup.files} files, or other sizes; another "
            "program has changed it, or the disk has lost them: upload the checkpoint again"
        )


class _Progress:
    """Says a few times a second how far the upload has come."""

    def __init__(self) -> None:
        self._next_s = 0.0

    def __call__(self, done: int, _: int) -> None:
        now_s = time.monotonic()
        if now_s >= self._next_s:
            self._next_s = now_s + _PROGRESS_S
            _tell(Progressed(done))


def _tell(told: Told) -> None:
    assert threading.current_thread() is threading.main_thread()
    write_all(1, msgspec.json.encode(told) + b"\n")


if __name__ == "__main__":
    main()
