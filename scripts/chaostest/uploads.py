"""Uploads of known content, which are killed and tried again until they succeed, and are verified.

`python -m chaostest.uploads URI DIRECTORY [--pending]` is a reader of an upload: it compares the
mounted checkpoint with the directory, and prints the first file that differs. With `--pending` it
reads what the daemon still has to upload.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from support.servers import s3_client

from chaostest.content import MIB
from ckptfs import Checkpoint
from ckptfs.errors import CkptfsError

if TYPE_CHECKING:
    from chaostest.chaos import Chaos

SIZES = {"large.bin": 17 * MIB + 11, "a/small.bin": 70_000, "a/b/empty": 0}
"""The files, one of them with several parts."""
METADATA = ".metadata.json"
COMMAND = str(Path(sys.executable).with_name("ckptfs"))
KILLED_MAX = 5
"""The most tries of an upload that are killed."""
TRIES_MAX = 40
TRY_S = 180.0
"""The longest time of a try, in which the store is away for some seconds at a time."""
COMPARE_S = 60.0
KILLED = (-signal.SIGKILL, 128 + signal.SIGINT, -signal.SIGINT)
"""The exit statuses of killed tries. Python ends by SIGINT itself if its start is interrupted."""
DIFFERS = 3
"""The exit status of the last reader if a file differs."""


class Uploads:
    """The uploads of a run, one after the other. `current` has begun, and has not succeeded."""

    def __init__(self, chaos: Chaos) -> None:
        self._chaos = chaos
        self._count = 0
        self.current: Upload | None = None

    def upload(self, chance: random.Random) -> None:
        """Do one upload. It stays the current one if the run ends meanwhile."""
        self._count += 1
        self.current = Upload(self._chaos, self._count, chance)
        self.current.run()
        self.current = None

    def end(self) -> None:
        """Complete the current upload while nothing fails, and look for what is left at the
        store."""
        if self.current is not None:
            self.current.complete()
            self.current = None
        for key in self._chaos.unfinished_uploads():
            self._chaos.breach("upload", f"an upload of {key} was left at the store")


class Upload:
    """The upload of one directory to a target of its own."""

    def __init__(self, chaos: Chaos, number: int, chance: random.Random) -> None:
        self._chaos = chaos
        self._chance = chance
        self._name = f"uploads/{number}"
        self._top = chaos.node.folder / f"upload-{number}"
        self._content = random.Random(f"{chaos.outcome.seed} upload {number}")
        self._makes_old = chance.random() < 0.3
        self._uri = chaos.uri_of(self._name)
        self._counts = chaos.outcome.uploads

    def run(self) -> None:
        """Upload until a try succeeds. Raises Stopped."""
        self._write()
        self._counts["begun"] += 1
        for number in range(TRIES_MAX):
            if self._try(kills=number < KILLED_MAX and self._chance.random() < 0.6):
                self._verify()
                return
            self._chaos.wait(0.1)
        self._chaos.breach("upload", f"{self._name} has failed {TRIES_MAX} times")

    def complete(self) -> None:
        """Upload while nothing fails."""
        if self._try(kills=False, is_at_rest=True):
            self._verify()
        else:
            self._chaos.breach("upload", f"{self._name} fails although nothing is wrong")

    def _write(self) -> None:
        """Write the directory, and at times other content to the target."""
        for name, size in SIZES.items():
            path = self._top / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self._content.randbytes(size))
            if self._makes_old:
                self._chaos.put(f"{self._name}/{name}", self._content.randbytes(size))
        (self._top / METADATA).write_text('{"step": 1}')

    def _command(self) -> list[str]:
        """The command of a try. Another way to upload has another command."""
        command = [COMMAND, "upload", "--json"]
        # A target with other content refuses all others.
        command += ["--overwrite"] if self._makes_old or self._chance.random() < 0.2 else []
        command += ["--no-cache"] if self._chance.random() < 0.3 else []
        command += ["--limit-rate", "20M"] if self._chance.random() < 0.3 else []
        return [*command, str(self._top), self._uri]

    def _try(self, *, kills: bool, is_at_rest: bool = False) -> bool:
        """One try. Returns whether it has succeeded."""
        begin_s = time.monotonic()
        process = subprocess.Popen(
            self._command(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        kill_s = self._chance.uniform(0.3, 2.5) if kills else TRY_S
        number = self._chance.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGINT))
        try:
            self._wait(process, kill_s, is_at_rest=is_at_rest)
            if process.poll() is None and kills:
                self._counts[f"killed by {number.name}"] += 1
                process.send_signal(number)
                self._wait(process, TRY_S, is_at_rest=is_at_rest)
            if process.poll() is None:
                self._chaos.breach("upload", f"{self._name} has not ended after {TRY_S:g} s")
        finally:
            process.kill()
            _, said = process.communicate()
        return self._judge(process.returncode, said, begin_s)

    def _wait(self, process: subprocess.Popen[str], limit_s: float, *, is_at_rest: bool) -> None:
        """Wait for the end of a try. Raises Stopped, unless the run is at rest."""
        if not is_at_rest:
            self._chaos.wait(limit_s, until=lambda: process.poll() is not None)
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(limit_s)

    def _judge(self, status: int, said: str, begin_s: float) -> bool:
        """Whether a try that has ended so has succeeded."""
        if status == 0:
            return True
        if status in KILLED:
            return False
        self._counts["failed"] += 1
        if fault := fault_of_end(status, said):
            self._chaos.breach("upload", f"{self._name}: {fault}")
        elif not self._chaos.timeline.overlapping(begin_s, time.monotonic()):
            self._chaos.breach("upload", f"{self._name} failed while nothing was wrong: {said}")
        return False

    def _verify(self) -> None:
        verify(self._chaos, self._name, self._uri, self._top)
        self._counts["complete"] += 1
        shutil.rmtree(self._top)
        shutil.rmtree(self._chaos.stored(self._name))


def verify(chaos: Chaos, name: str, uri: str, top: Path) -> None:
    """Compare a directory with the files of the store, and with the checkpoint in the mount. The
    files of the store come first, because the mount may be away."""
    counts = chaos.outcome.uploads
    expected, stored = files_in(top), files_in(chaos.stored(name))
    wrong = sorted(path for path in expected | stored if expected.get(path) != stored.get(path))
    if wrong:
        counts["wrong"] += 1
        chaos.breach("upload", f"the store has other bytes of {name}: {wrong}")
    counts["read back"] += read_back(chaos, name, uri, top)


def read_back(chaos: Chaos, name: str, uri: str, top: Path, *, is_pending: bool = False) -> bool:
    """Compare a directory with the checkpoint in the mount. Returns whether all of it was read."""
    command = [sys.executable, "-m", "chaostest.uploads", uri, str(top)]
    command += ["--pending"] if is_pending else []
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=COMPARE_S, check=False
        )
    except subprocess.TimeoutExpired:
        return False
    if done.returncode == DIFFERS:
        chaos.outcome.uploads["wrong"] += 1
        which = "pending files" if is_pending else "mount"
        text = f"the {which} has other bytes of {name}: {done.stdout.strip()}"
        chaos.breach("upload", text)
    return done.returncode == 0


def fault_of_end(status: int, said: str) -> str:
    """The reason why a command may not have ended so, with `said` on its standard error; ""
    if it may."""
    lines = said.strip().splitlines()
    errors = [line for line in lines if not line.startswith("ckptfs: warning: ")]
    if status == 1 and len(errors) == 1 and errors[0].startswith("ckptfs: error: "):
        return ""
    return f"it ended with {status}: {lines[-3:]}"


def files_in(top: Path) -> dict[str, bytes]:
    """The files below a directory."""
    return {
        str(path.relative_to(top)): path.read_bytes() for path in top.rglob("*") if path.is_file()
    }


def unfinished(endpoint: str, access_key: str, secret_key: str, bucket: str) -> list[str]:
    """The keys of the uploads of a bucket that have not ended."""
    client = s3_client(endpoint, access_key, secret_key)
    try:
        found = client.list_multipart_uploads(Bucket=bucket)
    except client.exceptions.ClientError as error:
        if error.response["Error"]["Code"] == "NoSuchUpload":  # rclone has none
            return []
        raise
    return [each["Key"] for each in found.get("Uploads", [])]


def main() -> int:
    uri, top, *more = sys.argv[1:]
    is_pending = more == ["--pending"]
    try:
        with Checkpoint(uri).as_directory(mode="mount", pending=is_pending) as mounted:
            for path in Path(top).rglob("*"):
                name = path.relative_to(top)
                if path.is_file() and path.read_bytes() != Path(mounted, name).read_bytes():
                    print(name)
                    return DIFFERS
    except (CkptfsError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
