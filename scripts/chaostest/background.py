"""Uploads in the background: their programs, processes, daemons and keepers are killed.

A program hands a directory of known content over, and is killed at times and tried again until the
daemon has accepted it. Then the directory gets other bytes and goes. The lane follows the upload
to its end, while a reader compares the pending files at times. It cancels some uploads, and
sends those again that have failed. At the end of a run each upload is whole at the store.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import signal
import subprocess
import threading
import time
from typing import TYPE_CHECKING

from chaostest import verdict
from chaostest.content import MIB
from chaostest.uploads import (
    COMMAND,
    KILLED,
    KILLED_MAX,
    METADATA,
    TRIES_MAX,
    TRY_S,
    fault_of_end,
    files_in,
    read_back,
    verify,
)
from ckptfs._model.protocol.uploads import ListUploads
from ckptfs.errors import AccessDenied, CacheError, CannotUpload, CkptfsError, StoreError

if TYPE_CHECKING:
    from pathlib import Path

    from chaostest.chaos import Chaos
    from ckptfs._model.uploads import UploadStatus

FOLLOW_S = 240.0
"""The longest time from the acceptance of an upload to its end, without a byte of progress."""
UNKNOWN_S = 60.0
"""The longest time for which a daemon may not know an upload: until the disk of its cache answers
again."""
SPOOL_S = 60.0
"""The longest time until the spool has only records, at rest."""
LARGE_BYTES_MAX = 20 * MIB

_DISK_FAULTS = {verdict.READ_ONLY, verdict.DISK_FAILS, verdict.DISK_HANGS}
_FAILURES = {
    **{kind: {StoreError.code} for kind in verdict.STORE_ERRORS},
    **{kind: {CacheError.code, CannotUpload.code, StoreError.code} for kind in _DISK_FAULTS},
    "denied": {AccessDenied.code},
    verdict.ENDED: {AccessDenied.code},  # the credentials were in the memory of the keeper
    verdict.REPLACED: {CacheError.code, CannotUpload.code, "not-found", StoreError.code},
}
"""The errors with which an upload may fail, by what happened since its acceptance."""


class Backgrounds:
    """The uploads in the background of a run. Several lanes have one each."""

    def __init__(self, chaos: Chaos) -> None:
        self._chaos = chaos
        self._count = 0
        self._lock = threading.Lock()  # guards the count and the set
        self._current: set[Background] = set()

    def upload(self, chance: random.Random) -> None:
        """Do one upload. It stays a current one if the run ends meanwhile."""
        with self._lock:
            self._count += 1
            upload = Background(self._chaos, self._count, chance)
            self._current.add(upload)
        upload.run()
        with self._lock:
            self._current.remove(upload)

    def note_kill(self, what: str) -> None:
        """Count the kill of a process if an upload is being handed over or sent now."""
        with self._lock:
            if any(upload.is_under_way for upload in self._current):
                self._chaos.outcome.kills[what] += 1

    def end(self) -> None:
        """Complete the current uploads while nothing fails, and look for what is left."""
        for upload in sorted(self._current, key=lambda each: each.number):
            upload.complete()
        self._current.clear()
        self._judge_counts()
        try:
            self._judge_rest()
        except (CkptfsError, OSError) as error:
            self._chaos.breach("background", f"no daemon answers at the end: {error}")

    def _judge_counts(self) -> None:
        """Each upload that has begun is complete or cancelled."""
        counts = self._chaos.outcome.uploads
        begun = counts["begun in the background"]
        ended = counts["complete in the background"], counts["cancelled"]
        if begun != sum(ended):
            text = f"{begun} uploads have begun, {ended[0]} are complete, {ended[1]} cancelled"
            self._chaos.breach("background", text)

    def _judge_rest(self) -> None:
        known = statuses(self._chaos, starts=True) or []
        for status in known:
            if status.state != "done":
                text = f"{status.id} is {status.state} at the end: {status.message}"
                self._chaos.breach("background", text)
        top = self._chaos.node.cache / "uploads"
        expected = {f"{status.id}/upload.json" for status in known}
        deadline_s = time.monotonic() + SPOOL_S
        while (found := _paths(top)) - expected and time.monotonic() < deadline_s:
            time.sleep(0.2)
        if left := sorted(found - expected):
            self._chaos.breach("background", f"the spool still has {left[:5]}")


def _paths(top: Path) -> set[str]:
    """The files, and the directories without an entry, below a directory."""
    found: set[str] = set()
    for path in top.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # it is being removed
            if not path.is_dir() or not any(path.iterdir()):
                found.add(str(path.relative_to(top)))
    return found


def statuses(chaos: Chaos, *, starts: bool = False) -> list[UploadStatus] | None:
    """The uploads that the daemon knows; None if no daemon answers. Raises CkptfsError and OSError
    if `starts`."""
    try:
        if starts:
            chaos.node.start()
        with chaos.node.control() as control:
            return list(control.ask_once(ListUploads()).uploads)
    except (CkptfsError, OSError):
        if starts:
            raise
        return None


class Background:
    """One directory, which a daemon uploads to a target of its own.

    Attributes:
        number: Its number in the run.
        is_under_way: Whether the program hands it over, or the daemon has not sent it yet.
    """

    def __init__(self, chaos: Chaos, number: int, chance: random.Random) -> None:
        self.number = number
        self.is_under_way = False
        self._chaos = chaos
        self._chance = chance
        self._name = f"background/{number}"
        self._uri = chaos.uri_of(self._name)
        self._top = chaos.node.folder / f"background-{number}"
        self._kept = chaos.node.folder / f"background-{number}-kept"
        self._content = random.Random(f"{chaos.outcome.seed} background {number}")
        self._makes_old = chance.random() < 0.25
        self._cancels = chance.random() < 0.15
        self._counts = chaos.outcome.uploads
        self._accepted_s = 0.0
        self._id = ""
        self._is_at_rest = False

    # -- its life

    def run(self) -> None:
        """Upload until the store has it, or cancel it. Raises Stopped."""
        if not self._kept.exists():
            self._write()
        if not self.is_under_way:  # `complete` runs one again that the end of the run has stopped
            self._counts["begun in the background"] += 1
        while True:
            self._hand_over()
            if self._cancels:
                self._wait(self._chance.uniform(0, 3))
                self._cancel()
                break
            if not self._makes_old and self._chance.random() < 0.5:
                read = read_back(self._chaos, self._name, self._uri, self._kept, is_pending=True)
                self._counts["pending files read"] += read
            if self._follow():
                self._finish()
                break
        self.is_under_way = False
        for top in (self._kept, self._chaos.stored(self._name)):
            shutil.rmtree(top, ignore_errors=top != self._kept)

    def complete(self) -> None:
        """Do what is left while nothing fails."""
        self._is_at_rest, self._cancels = True, False
        try:
            if self._id and self._follow():
                self._finish()
            else:
                self.run()
        except (CkptfsError, OSError) as error:
            self._breach(f"fails although nothing is wrong: {error}")

    def _write(self) -> None:
        sizes = {
            "large.bin": self._chance.randrange(MIB, LARGE_BYTES_MAX),
            "a/small.bin": 70_000,
            "a/b/empty": 0,
        }
        for name, size in sizes.items():
            path = self._kept / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self._content.randbytes(size))
            if self._makes_old:
                self._chaos.put(f"{self._name}/{name}", self._content.randbytes(size))
        (self._kept / METADATA).write_text('{"step": 1}')

    def _finish(self) -> None:
        verify(self._chaos, self._name, self._uri, self._kept)
        self._counts["complete in the background"] += 1

    # -- the program

    def _hand_over(self) -> None:
        """Run the program until the daemon has accepted the directory, which then changes and
        goes."""
        self.is_under_way = True
        for number in range(TRIES_MAX):
            self._send_failed_again(self._mine() or [])  # of programs that were killed
            shutil.copytree(self._kept, self._top)
            kills = not self._is_at_rest and number < KILLED_MAX and self._chance.random() < 0.5
            try:
                accepted = self._try(kills=kills)
            finally:
                for path in self._top.rglob("*.bin"):
                    path.write_bytes(bytes(path.stat().st_size))
                shutil.rmtree(self._top)
            if accepted:
                self._id, self._accepted_s = accepted, time.monotonic()
                return
            self._wait(0.2)
        self._breach(f"was not accepted in {TRIES_MAX} tries")

    def _try(self, *, kills: bool) -> str:
        """One try. Returns the id of the accepted upload, or ""."""
        begin_s = time.monotonic()
        command = [COMMAND, "upload", "--background", "--json"]
        command += ["--overwrite"] if self._makes_old else []
        command += ["--no-cache"] if self._chance.random() < 0.3 else []
        command += ["--limit-rate", "6M"] if self._chance.random() < 0.5 else []
        command += [str(self._top), self._uri]
        kill_s = self._chance.uniform(0.3, 2.5) if kills else TRY_S
        number = self._chance.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGINT))
        pipe = subprocess.PIPE
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, start_new_session=True
        ) as process:
            try:
                self._wait(kill_s, process)
                if process.poll() is None and kills:
                    self._chaos.backgrounds.note_kill("program")
                    process.send_signal(number)
                    self._wait(TRY_S, process)
                if process.poll() is None:
                    self._breach(f"was not taken over within {TRY_S:g} s")
            finally:
                process.kill()
                printed, said = process.communicate()
        if process.returncode == 0:
            return json.loads(printed)["id"]
        if process.returncode not in KILLED:
            self._counts["not accepted"] += 1
            if fault := fault_of_end(process.returncode, said.decode()):
                self._breach(fault)
            elif not self._is_full(said) and not self._kinds_since(begin_s):
                self._breach(f"was refused while nothing was wrong: {said.decode()}")
        return ""

    def _is_full(self, said: bytes) -> bool:
        """Whether failed uploads fill `upload_bytes_max`, as the program said."""
        is_full = b"upload_bytes_max" in said
        self._counts["refused by the limit"] += is_full
        return is_full

    def _wait(self, seconds: float, process: subprocess.Popen[bytes] | None = None) -> None:
        """Wait, at most until the process ends. Raises Stopped, unless the run is at rest."""
        if not self._is_at_rest:
            self._chaos.wait(seconds, lambda: process is not None and process.poll() is not None)
        elif process is None:
            time.sleep(seconds)
        else:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(seconds)

    # -- the daemon

    def _mine(self) -> list[UploadStatus] | None:
        """The uploads to this target, also those of killed programs; None if no daemon answers."""
        known = statuses(self._chaos, starts=self._is_at_rest)
        if known is None:
            return None
        place = f"/{self._name}"
        return [each for each in known if each.uri.partition("?")[0].endswith(place)]

    def _follow(self) -> bool:
        """Follow the upload to its end. Returns False if it is to be handed over again, because
        its disk was replaced."""
        progress_s, last = time.monotonic(), -1
        unknown_s = 0.0
        while time.monotonic() - progress_s < FOLLOW_S:
            self._wait(0.3)
            mine = self._mine()
            if mine is None:
                continue
            if self._id not in {each.id for each in mine}:
                if verdict.REPLACED in self._kinds_since(self._accepted_s):
                    self._counts["lost with the disk"] += 1
                    return False
                unknown_s = unknown_s or time.monotonic()
                if time.monotonic() - unknown_s > UNKNOWN_S:
                    self._breach(f"the upload {self._id} is unknown to the daemon")
                    return False
                continue
            unknown_s = 0.0
            if all(each.state == "done" for each in mine):
                return True
            self._send_failed_again(mine)
            done = sum(each.sent for each in mine)
            if done != last:
                progress_s, last = time.monotonic(), done
        self._breach(f"has not ended after {FOLLOW_S:g} s: {self._mine()}")
        return True

    def _kinds_since(self, begin_s: float) -> set[str]:
        """The kinds of faults since then."""
        windows = self._chaos.timeline.overlapping(begin_s, time.monotonic())
        return {window.kind for window in windows}

    def _send_failed_again(self, mine: list[UploadStatus]) -> None:
        """Judge the uploads that have failed, and send them again, as a user does. Those whose
        files went with a disk are dropped."""
        for status in mine:
            if status.state != "failed":
                continue
            self._counts[f"failed: {status.code}"] += 1
            begun_s = time.monotonic() - (time.time() - status.begun)
            kinds = self._kinds_since(begun_s)
            self._judge_failure(status, kinds)
            if verdict.REPLACED in kinds:
                self._run("uploads", "--drop", status.id)
            else:
                retry = "uploads", "--retry", status.id, "--target", self._uri
                self._counts["sent again"] += self._run(*retry)

    def _judge_failure(self, status: UploadStatus, kinds: set[str]) -> None:
        """An upload may have failed because of faults of these kinds, and has kept its files."""
        if status.code not in {code for kind in kinds for code in _FAILURES.get(kind, ())}:
            text = f"{status.id} failed ({status.code}) while {sorted(kinds)}: {status.message}"
            self._breach(text)
        if kinds & {verdict.REPLACED, *_DISK_FAULTS}:
            return  # its files cannot be read, or are gone
        kept = files_in(self._chaos.node.cache / "uploads" / status.id / "files")
        if kept != files_in(self._kept):
            self._breach(f"{status.id} failed, and has other files than it took over")

    def _cancel(self) -> None:
        """Drop all uploads to the target. No files and no record of them stay."""
        deadline_s = time.monotonic() + FOLLOW_S
        while time.monotonic() < deadline_s:
            mine = self._mine()
            left = [each.id for each in mine or () if each.state != "done"]
            if mine is not None and not left:
                break
            for upload in left:
                self._run("uploads", "--drop", upload)
            self._wait(0.3)
        else:
            self._breach("cannot be dropped")
        self._counts["cancelled"] += 1

    def _run(self, *words: str) -> bool:
        """Run a command of ckptfs. Returns whether it has succeeded."""
        try:
            done = subprocess.run(
                [COMMAND, *words], capture_output=True, text=True, timeout=TRY_S, check=False
            )
        except subprocess.TimeoutExpired:
            self._breach(f"ckptfs {words[:2]} has not ended within {TRY_S:g} s")
            return False
        if done.returncode and (fault := fault_of_end(done.returncode, done.stderr)):
            self._breach(f"ckptfs {words[:2]}: {fault}")
        return not done.returncode

    def _breach(self, text: str) -> None:
        self._chaos.breach("background", f"{self._name} {text}")
