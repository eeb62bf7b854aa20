"""How long the processes of a daemon hold the lock of their interpreters, sampled by py-spy."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from benchmark.contenders import why_not_installed
from benchmark.processes import Thread, schedule_between, thread_schedules

if TYPE_CHECKING:
    from collections.abc import Iterator

PY_SPY = Path(sys.executable).with_name("py-spy")
SAMPLES_PER_S = 200
"""A read of 1 s gives 200 samples."""

START_DEADLINE_S = 15.0


@dataclass
class Held:
    """The seconds of CPU with the lock, by process. It is complete at the end of `sampling`."""

    by_pid: dict[int, float] = field(default_factory=dict)


def parse_samples(raw: str) -> Counter[Thread]:
    """Samples by thread, from py-spy's raw format with --gil, --subprocesses and --threads.

    A line is the frames from the outermost on, which ";" divides, and a count. The first frames are
    the processes, each the parent of the next, and the thread: `process 12:"command"`,
    `thread (34): name`.
    """
    found: Counter[Thread] = Counter()
    for line in raw.splitlines():
        frames, _, count = line.rpartition(" ")
        head = re.match(r'((?:process \d+:".*?";)+)thread \((\d+)\)', frames)
        if head:
            pid = int(re.findall(r'process (\d+):"', head[1])[-1])
            found[Thread(pid, int(head[2]))] += int(count)
    return found


def on_cpu_s(held_s: float, ran_s: float, waited_s: float) -> float:
    """The part of the seconds with the lock for which the thread had a CPU.

    A sample cannot tell a thread that runs from one that waits for a CPU, and on few cores a thread
    waits often. The part is taken to be that of all seconds in which the thread ran or waited.
    """
    return held_s * ran_s / (ran_s + waited_s) if ran_s + waited_s > 0 else held_s


def taken_samples(said: str) -> int:
    """Number of looks at the processes, from py-spy's last message."""
    found = re.search(r"Samples: (\d+)", said)
    return int(found[1]) if found else 0


def why_missing() -> str:
    """The reason why py-spy cannot run here, or ""."""
    return "" if PY_SPY.exists() else f"py-spy is {why_not_installed('py-spy')}"


@contextmanager
def sampling(pid: int, temp: Path, held: Held) -> Iterator[None]:
    """Sample a process and its descendants until the end, into `held`.

    Raises:
        RuntimeError: py-spy is not installed, or cannot look at the process.
    """
    if why := why_missing():
        raise RuntimeError(why)
    output, log = temp / f"gil-{pid}", temp / f"gil-{pid}.log"
    # Nonblocking: py-spy else stops the process for each sample. Those that it reads while the
    # process goes on are sometimes of no use, and the rate below leaves them out.
    command = [PY_SPY, "record", "--gil", "--subprocesses", "--threads", "--nonblocking"]
    command += ["--rate", str(SAMPLES_PER_S), "--format", "raw", "--output", output]
    command += ["--pid", str(pid)]
    with log.open("wb") as log_file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log_file, stderr=log_file
        )
    try:
        _wait_sampling(process, log)
        before, start_s = thread_schedules(pid), time.monotonic()
        yield
        taken_s, after = time.monotonic() - start_s, thread_schedules(pid)
        process.send_signal(signal.SIGINT)
        process.wait(START_DEADLINE_S)
        samples = taken_samples(log.read_text())
        if not samples:
            raise RuntimeError(f"py-spy took no samples: {_last_line(log)}")
        found = parse_samples(output.read_text()) if output.exists() else Counter[Thread]()
        for thread, count in found.items():
            ran_s, waited_s = schedule_between(before, after, thread)
            seconds = on_cpu_s(count * taken_s / samples, ran_s, waited_s)
            held.by_pid[thread.pid] = held.by_pid.get(thread.pid, 0.0) + seconds
    finally:
        process.kill()
        process.wait()


def _wait_sampling(process: subprocess.Popen[bytes], log: Path) -> None:
    deadline_s = time.monotonic() + START_DEADLINE_S
    while "Sampling process" not in log.read_text():
        if process.poll() is not None or time.monotonic() > deadline_s:
            raise RuntimeError(f"py-spy does not start: {_last_line(log)}")
        time.sleep(0.02)


def _last_line(log: Path) -> str:
    lines = log.read_text().strip().splitlines()
    return lines[-1] if lines else "it said nothing"
