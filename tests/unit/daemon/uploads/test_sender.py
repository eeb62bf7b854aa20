"""The process that sends: its lines, its end, and what it refuses to send."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import trio
from support.background import TARGET

from ckptfs import _upload_process
from ckptfs._daemon.uploads import sender as sender_module
from ckptfs._daemon.uploads.sender import Sender
from ckptfs._model.location import Location
from ckptfs._model.upload_messages import NotSent, Setup
from ckptfs._model.uploads import Sent, UploadOptions
from ckptfs.errors import CannotUpload, DaemonError

SENT = Sent("s3://bucket/run", 1, 4, 0, 0, 4, "")
SENT_LINE = (
    '{"type":"sent","uri":"s3://bucket/run","files":1,"bytes":4,"skipped_files":0,'
    '"skipped_bytes":0,"cached_bytes":4,"cache_error":""}'
)


def setup_of(directory: Path, location: Location = TARGET) -> Setup:
    return Setup(
        directory=str(directory),
        files=2,
        bytes=8,
        location=location,
        credentials="default",
        asked=location,
        options=UploadOptions(cache=False),
        store_timeout_s=3.0,
        socket=str(directory / "no-daemon"),
    )


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A file with the code that runs instead of the process."""
    path = tmp_path / "program.py"

    def start(_: Setup) -> "tuple[subprocess.Popen[bytes], int]":
        reader, writer = os.pipe()
        try:
            return subprocess.Popen([sys.executable, str(path)], stdout=writer), reader
        finally:
            os.close(writer)

    monkeypatch.setattr(sender_module, "_start", start)
    return path


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ('print(\'{"type":"progressed","bytes":3}\'); print(line)', SENT),
        (
            'print(\'{"type":"not-sent","code":"store","message":"no"}\')',
            NotSent("store", "no"),
        ),
        ("print('nonsense')", NotSent(DaemonError.code, "the process that sent it ")),
        ("print('x' * 100_000, end='')", NotSent(DaemonError.code, "the process that sent it ")),
        ("sys.exit(3)", NotSent(DaemonError.code, "the process that sent it ended with status 3")),
        (
            "os.kill(os.getpid(), 9)",
            NotSent(DaemonError.code, "the process that sent it was killed by SIGKILL"),
        ),
    ],
)
async def test_the_last_line_or_the_end_of_the_process_is_the_result(
    code: str, expected: "Sent | NotSent", program: Path, tmp_path: Path
) -> None:
    program.write_text(f"import os, sys\nline = {SENT_LINE!r}\n{code}\n")
    progressed: list[int] = []
    result = await Sender().run(setup_of(tmp_path), progressed.append)
    if isinstance(expected, NotSent) and isinstance(result, NotSent):
        assert result.code == expected.code
        assert result.message.startswith(expected.message)
    else:
        assert result == expected
        assert progressed == [3]


async def test_a_process_is_asked_to_end_and_killed_with_the_daemon(
    program: Path, tmp_path: Path
) -> None:
    begun = tmp_path / "begun"
    program.write_text(
        f"import pathlib, time\npathlib.Path({str(begun)!r}).touch()\ntime.sleep(600)\n"
    )
    for how in ("end", "cancel"):
        begun.unlink(missing_ok=True)
        sender, results = Sender(), []

        async def run(sender: Sender = sender, results: "list[object]" = results) -> None:
            results.append(await sender.run(setup_of(tmp_path), lambda _: None))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            while not begun.exists():  # noqa: ASYNC110 - another process makes it
                await trio.sleep(0.01)
            if how == "end":
                sender.end()
            else:
                nursery.cancel_scope.cancel()
        assert sender._process is not None
        assert sender._process.poll() is not None
        assert len(results) == (how == "end")


async def test_no_process_starts_whose_output_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> tuple[int, int]:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    started: list[object] = []
    monkeypatch.setattr(os, "pipe", refuse)
    monkeypatch.setattr(subprocess, "Popen", started.append)
    before = len(os.listdir("/proc/self/fd"))
    result = await Sender().run(setup_of(tmp_path), lambda _: None)
    text = "the process for an upload did not start: Too many open files"
    assert result == NotSent(DaemonError.code, text)
    assert started == []
    assert len(os.listdir("/proc/self/fd")) == before


async def test_an_upload_that_is_ended_before_its_process_starts_sends_nothing(
    program: Path, tmp_path: Path
) -> None:
    sender = Sender()
    sender.end()
    assert isinstance(await sender.run(setup_of(tmp_path), lambda _: None), NotSent)
    assert sender._process is None


def test_files_that_are_missing_or_short_are_not_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staged, target = tmp_path / "files", tmp_path / "target"
    staged.mkdir()
    (staged / "one").write_bytes(b"1234")
    setup = setup_of(staged, Location("local", str(target)))
    monkeypatch.setenv("CKPTFS_SOCKET", setup.socket)
    for content in (None, b"123"):
        if content is not None:
            (staged / "two").write_bytes(content)
        with pytest.raises(CannotUpload, match="another program has changed it"):
            _upload_process.send(setup, lambda *_: None)
    assert not target.exists()
    (staged / "two").write_bytes(b"1234")
    assert _upload_process.send(setup, lambda *_: None).bytes == 8
    assert (target / "two").read_bytes() == b"1234"


async def test_a_process_that_cannot_end_keeps_its_place(
    program: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A killed process waits for a disk in the kernel, as long as `poll` finds it there."""
    waits = True

    def poll(process: "subprocess.Popen[bytes]") -> int | None:
        return None if waits else really_poll(process)

    really_poll = subprocess.Popen.poll
    monkeypatch.setattr(subprocess.Popen, "poll", poll)
    monkeypatch.setattr(sender_module, "_END_S", 0.05)
    monkeypatch.setattr(sender_module, "_REAP_LATE_S", 0.01)
    program.write_text("import os\nos.kill(os.getpid(), 9)\n")
    results: list[object] = []

    async def run() -> None:
        results.append(await Sender().run(setup_of(tmp_path), lambda _: None))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        while "waits in the kernel" not in caplog.text:  # noqa: ASYNC110 - a log has no event
            await trio.sleep(0.01)
        await trio.sleep(0.1)
        assert results == []
        waits = False
    killed = "the process that sent it was killed by SIGKILL"
    assert results == [NotSent(DaemonError.code, killed)]
