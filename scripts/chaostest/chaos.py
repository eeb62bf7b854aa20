"""The parts of a run: the store with its proxy, the node, the readers and the outcome."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from support.faultproxy import TLS_FAULTS, Proxy
from support.s3server import S3Server

from chaostest.background import Backgrounds
from chaostest.board import Board
from chaostest.certificates import certify
from chaostest.content import LOCAL, MIB, Contents, File
from chaostest.node import DAEMON, KEEPER, SENDER, Node
from chaostest.reader import NOTED
from chaostest.report import Outcome
from chaostest.uploads import Uploads, unfinished
from chaostest.verdict import Breach, Timeline, Verdict
from ckptfs._store.describe import describe
from ckptfs._store.filesystems import filesystem_of
from ckptfs.errors import CkptfsError

if TYPE_CHECKING:
    from collections.abc import Callable

    from ckptfs._model.location import Location

BUCKET = "chaos"
_KILLS = {DAEMON: "daemon", KEEPER: "keeper", SENDER: "process that sends"}
HUNG_AFTER_S = 5.0
"""Excess over its limit after which an operation counts as endless."""


class Stopped(Exception):
    """The run's time is over."""


class Chaos:
    """The state of one run. As a context manager, it starts all parts, and ends them.

    Args:
        seed: Seed of the actions and their order.
        readers: Number of processes that read. Another one writes metadata.
        long: Whether to include actions that take long.
        logs: Folder for the output of readers and daemon.
        tls: Whether the readers reach the store over TLS; None leaves it to chance.
    """

    def __init__(
        self,
        seed: int,
        *,
        readers: int,
        long: bool,
        logs: Path,
        tls: bool | None = None,
    ) -> None:
        chance = random.Random(f"{seed} settings")
        self.long = long
        self.logs = logs
        self.contents = Contents(seed)
        self.passthrough = chance.random() < 0.4
        spare = chance.random() < 0.7
        settings = {
            "linger_s": chance.choice((0.0, 0.3, 2.0)),
            "idle_exit_s": 20.0,
            "read_deadline_s": 6.0,
            "attach_deadline_s": 8.0,
            "store_timeout_s": 1.0,
            "cache_bytes_max": chance.choice((0, 24, 40, 64)) * MIB,
            "cache_free_share_min": 0.05,
            "connections_max": chance.choice((2, 8, 16)),
            "in_flight_bytes_max": chance.choice((16, 32, 64)) * MIB,
            "span_bytes_max": chance.choice((1, 4, 8)) * MIB,
            "window_bytes_max": chance.choice((8, 32)) * MIB,
            "passthrough": self.passthrough,
            "spare": spare,
            "restarts_max": 100_000,
        }
        self._tls = chance.random() < 0.3 if tls is None else tls
        settings["fetch_processes"] = chance.choice((0, 1, 2, 2))
        if settings["fetch_processes"]:  # only many reads at once are a load
            settings |= {"connections_max": 16, "span_bytes_max": MIB, "window_bytes_max": 32 * MIB}
        settings["reply_threads"] = chance.choice((0, 1, 2))
        settings["upload_bytes_max"] = chance.choice((0, 24, 40, 100)) * MIB
        self.outcome = Outcome(seed, dict(settings))
        self.timeline = Timeline()
        self.node = Node(settings, small_disk=os.geteuid() == 0)
        self.uploads = Uploads(self)
        self.backgrounds = Backgrounds(self)
        self._scheme = "scheme=http"
        self._readers = readers
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._incarnations: Counter[int] = Counter()
        self._said: dict[Path, int] = {}
        self._stopped = threading.Event()
        self._lock = threading.RLock()
        self._seen_daemons: set[int] = set()
        self._hung: set[tuple[int, float]] = set()
        self._killed: set[int] = set()
        self._mapped: dict[int, dict[str, Any]] = {}  # by slot, what was mapped last
        self._cleanup = ExitStack()

    def __enter__(self) -> Chaos:
        with ExitStack() as stack:
            self._server = stack.enter_context(S3Server())
            stack.enter_context(self.node)
            pems = self._certificates()
            proxy = Proxy(self._server.endpoint, self.outcome.seed, pems)
            self.proxy = stack.enter_context(proxy)
            stack.callback(self._keep_logs)
            os.environ.update(self.node.environment)
            self._staging = self._server.root.parent / "staging"
            self._staging.mkdir()
            self.board = Board(self.node.folder / "board", len(self.contents.files))
            self._direct = self._server.endpoint
            self._server.endpoint = self.proxy.endpoint
            if pems:
                self._scheme = f"scheme=https&tls_ca_file_path={pems[0]}"
            self.uris = {name: self.uri_of(name) for name in self.contents.checkpoints}
            self.uris[LOCAL] = f"disk:{LOCAL}"
            for file in self.contents.files:
                self._write(file, 0)
            self.verdict = Verdict(
                self.timeline,
                read_deadline_s=self.node.config.read_deadline_s,
                attach_deadline_s=self.node.config.attach_deadline_s,
                passthrough=self.passthrough,
            )
            stack.callback(self._end_readers)
            self._cleanup = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._cleanup.close()

    def stop(self) -> None:
        """End the actions."""
        self._stopped.set()

    def _certificates(self) -> list[Path]:
        """The certificates for TLS, if the run uses it. Otherwise its faults are left out."""
        pems: list[Path] = []
        if self._tls:
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                pems += [certify(self.node.folder / name) for name in ("store.pem", "other.pem")]
        if not pems:
            self.outcome.left_out += TLS_FAULTS
        self.outcome.settings["tls"] = bool(pems)
        return pems

    def wait(self, seconds: float, until: Callable[[], bool] = lambda: False) -> None:
        """Wait, at most until the run ends. Raises Stopped then."""
        end_s = time.monotonic() + seconds
        while (left_s := end_s - time.monotonic()) > 0 and not until():
            if self._stopped.wait(min(left_s, 0.1)):
                raise Stopped

    def breach(self, kind: str, text: str, told: dict[str, Any] | None = None) -> None:
        """Record a violation."""
        with self._lock:
            self.outcome.breaches.append(Breach(kind, time.monotonic(), text, told or {}))
        recent = self.timeline.overlapping(time.monotonic() - 10, time.monotonic())
        windows = ", ".join(f"{w.kind} {w.begin_s:.2f}-{w.end_s:.2f}" for w in recent)
        print(f"chaos: BREACH {kind}: {text}\n  {told}\n  now {time.monotonic():.2f}: {windows}",
              file=sys.stderr, flush=True)  # fmt: skip

    # -- for actions

    def kill(self, module: bytes, number: int) -> list[int]:
        """Send a signal to processes of a module, and return these."""
        pids = self.node.serving(module)
        if pids and module in _KILLS and number in (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT):
            self.backgrounds.note_kill(_KILLS[module])
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        return pids

    def daemon_answers(self) -> bool:
        """Whether there is a daemon that answers."""
        try:
            self.node.status()
        except (CkptfsError, OSError):
            return False
        return True

    def uri_of(self, path: str) -> str:
        """The URI of a directory in the bucket, by the proxy."""
        return self._server.uri(f"{BUCKET}/{path}").replace("scheme=http", self._scheme)

    def stored(self, path: str) -> Path:
        """The place at which the store keeps a directory of the bucket."""
        return self._server.bucket_dir(BUCKET) / path

    def put(self, name: str, data: bytes) -> None:
        """Make an object like another program."""
        staged = self._staging / "upload"
        staged.write_bytes(data)
        self._replace(staged, name)

    def unfinished_uploads(self) -> list[str]:
        """The keys of the uploads that have not ended, as the store itself says."""
        keys = self._server.access_key, self._server.secret_key
        return unfinished(self._direct, *keys, BUCKET)

    def location(self, checkpoint: str) -> Location:
        """The location of a checkpoint, for the control socket."""
        return describe(*filesystem_of(self.uris[checkpoint]))

    def publish(self, file: File) -> None:
        """Put the next version of a file into the store, as a whole and at once."""
        version = self.board.version(file.index) + 1
        self._write(file, version)

    def _write(self, file: File, version: int) -> None:
        staged = self._staging / "object"
        if file.checkpoint == LOCAL:
            staged = self.node.local / LOCAL / file.name
            staged.parent.mkdir(parents=True, exist_ok=True)
        with staged.open("wb") as out:
            for offset in range(0, self.contents.size(file, version), MIB):
                out.write(self.contents.expected(file, version, offset, MIB))
        if version:
            self.timeline.publishing(file.index)
            self.board.set_version(file.index, version)
        if file.checkpoint != LOCAL:
            self._replace(staged, f"{file.checkpoint}/{file.name}")

    def write_note(self) -> None:
        """Write the metadata of a checkpoint like another program."""
        staged = self._staging / "note"
        value = self.board.note()[1] + 1
        staged.write_text(json.dumps({"note": value}))
        self._replace(staged, f"{NOTED}/.metadata.json")
        self.board.set_note(value)

    def _replace(self, staged: Path, name: str) -> None:
        target = self.stored(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        self.proxy.ask({"pause": True})
        try:
            staged.rename(target)
            time.sleep(0.002)  # rclone keeps what it knows of a folder for 0.1 ms
        finally:
            self.proxy.ask({"pause": False})

    # -- readers

    def start_readers(self) -> None:
        """Start all readers, and the process that writes metadata."""
        for slot in range(self._readers + 1):
            self._start_reader(slot)

    def end_readers(self) -> None:
        """End all readers, and take in their last reports."""
        self.look_at_readers()
        self._end_readers()
        self._follow()

    def _start_reader(self, slot: int) -> None:
        self._incarnations[slot] += 1
        life = self._incarnations[slot]
        job = {
            "role": "scribe" if slot == self._readers else "reader",
            "seed": self.outcome.seed,
            "chance": f"{self.outcome.seed} reader {slot} {life}",
            "slot": slot,
            "board": str(self.node.folder / "board"),
            "log": str(self.logs / f"reader-{slot}.jsonl"),
            "uris": self.uris,
            "clock_s": time.time() - time.monotonic(),
        }
        self.board.end(slot)
        with (self.logs / f"reader-{slot}.stderr").open("ab") as errors:
            self._processes[slot] = subprocess.Popen(
                [sys.executable, "-m", "chaostest.reader", json.dumps(job)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
            )

    def kill_reader(self, chance: random.Random) -> None:
        """Kill one; the next look at the readers starts another in its place."""
        process = self._processes[chance.randrange(self._readers)]
        self._killed.add(process.pid)
        process.kill()

    def look_at_readers(self) -> None:
        """Take in the reports, judge readers that have ended or hang, and replace the former."""
        self._follow()
        now_s = time.monotonic()
        for slot, process in list(self._processes.items()):
            doing = self.board.doing(slot)
            status = process.poll()
            if status is not None:
                self._follow()
                self._judge_end(slot, status, now_s)
                self._start_reader(slot)
            elif doing is not None:
                limit_s = self.verdict.limit_s(doing.operation, doing.bytes, doing.since_s, now_s)
                hung = now_s - doing.since_s > limit_s + HUNG_AFTER_S
                if hung and (slot, doing.since_s) not in self._hung:
                    self._hung.add((slot, doing.since_s))
                    where = Path(f"/proc/{process.pid}/stack")
                    stack = where.read_text() if os.access(where, os.R_OK) else ""
                    text = f"{doing.operation} has not ended after {now_s - doing.since_s:.1f} s"
                    self.breach("hung", text, {"slot": slot, "pid": process.pid, "stack": stack})

    def _judge_end(self, slot: int, status: int, now_s: float) -> None:
        """A reader has ended. By SIGBUS, if a page could not be read."""
        doing = self.board.doing(slot)
        if status == -signal.SIGKILL:
            if self._processes[slot].pid not in self._killed:
                self.breach("reader", f"reader {slot} was killed by another process")
        elif status == -signal.SIGBUS and doing is not None:
            told = self._mapped[slot] | {
                "operation": doing.operation,
                "error": "SIGBUS",
                "text": "a page of a mapped file cannot be read",
                "start_s": doing.since_s,
                "end_s": now_s,
            }
            self._take_failure(told)
        else:
            said = (self.logs / f"reader-{slot}.stderr").read_text().strip().splitlines()
            self.breach("reader", f"reader {slot} ended with {status}: {said[-1:]}")

    def _follow(self) -> None:
        """Take in the new reports of the readers."""
        for path in self.logs.glob("reader-*.jsonl"):
            with path.open("rb") as file:
                file.seek(self._said.get(path, 0))
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self._said[path] = self._said.get(path, 0) + len(line)
                    self._take(json.loads(line))

    def _take(self, told: dict[str, Any]) -> None:
        kind = told["kind"]
        outcome = self.outcome
        if kind == "counts":
            outcome.operations.update(told["operations"])
            outcome.bytes_verified += told["bytes"]
            for operation, longest_s in told["longest_s"].items():
                known_s = outcome.longest_s.get(operation, 0.0)
                outcome.longest_s[operation] = max(known_s, longest_s)
        elif kind == "failure":
            self._take_failure(told)
        elif kind == "slow":
            begin_s, end_s = told["start_s"], told["end_s"]
            limit_s = self.verdict.limit_s(told["operation"], told["length"], begin_s, end_s)
            if not self.timeline.overlapping(begin_s, end_s):
                outcome.undisturbed_s = max(outcome.undisturbed_s, end_s - begin_s)
            if end_s - begin_s > limit_s:
                text = f"{told['operation']} took {end_s - begin_s:.1f} s of {limit_s:.1f} s"
                self.breach("slow", text, told)
        elif kind == "maps":
            self._mapped[told["slot"]] = told
        elif kind == "pinned":
            if why := self.verdict.of_pin(told):
                self.breach("pin", why, told)
        elif kind == "wrong":
            if why := self.verdict.of_wrong(told):
                self.breach("wrong bytes", why, told)
        elif kind == "old note":
            if why := self.verdict.of_old_note(told):
                self.breach("metadata", why, told)
        else:
            self.breach(kind, told["text"], told)

    def _take_failure(self, told: dict[str, Any]) -> None:
        if why := self.verdict.of_failure(told):
            self.breach("error", why, told)
        else:
            self.outcome.errors_allowed[f"{told['operation']}: {told['error']}"] += 1

    def _end_readers(self) -> None:
        for process in self._processes.values():
            self._killed.add(process.pid)
            process.kill()
        for process in self._processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(3)
        if any(process.poll() is None for process in self._processes.values()):
            self.node.end()  # one that waits for the mount cannot be killed before
            for process in self._processes.values():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)

    def sample(self, label: str = "most") -> None:
        """Sample the daemon and the keeper (`Outcome.samples`)."""
        for name, module in (("daemon", DAEMON), ("keeper", KEEPER)):
            sample = self.node.sample(module)
            if sample is None:
                continue
            if name == "daemon":
                self._seen_daemons.add(sample.pid)
                self.outcome.daemons = len(self._seen_daemons)
            known = self.outcome.samples.setdefault(name, {})
            figures = list(sample[1:])
            if label == "most":
                before = known.get("most", [0, 0, 0])
                figures = [max(pair) for pair in zip(before, figures, strict=True)]
            known[label] = figures

    def _keep_logs(self) -> None:
        with contextlib.suppress(OSError):
            (self.logs / "daemon.log").write_text(self.node.log())
            shutil.copy(self.node.folder / "config.toml", self.logs)
