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

if TYPE_CHECKING:
    from collections.abc import Iterator

PY_SPY = Path(sys.executable).with_name("py-spy")
SAMPLES_PER_S = 200
"""A read of 1 s gives 200 samples."""

START_DEADLINE_S = 15.0


@dataclass
class Held:
    """The sampled seconds, by process. It is complete at the end of `sampling`."""

    by_pid: dict[int, float] = field(default_factory=dict)


def parse_samples(raw: str) -> Counter[int]:
    """Samples by process, from py-spy's raw format with subprocesses and --gil.

    A line is the frames from the outermost on, which ";" divides, and a count. The first frames are
    the processes: `process 12:"command"`, each the parent of the next.
    """
    found: Counter[int] = Counter()
    for line in raw.splitlines():
        frames, _, count = line.rpartition(" ")
        pids = re.match(r'(?:process \d+:".*?"(?:;|$))+', frames)
        if pids:
            found[int(re.findall(r'process (\d+):"', pids[0])[-1])] += int(count)
    return found


def taken_samples(said: str) -> int:
    """Number of looks at the processes, from py-spy's last message."""
    found = re.search(r"Samples: (\d+)", said)
    return int(found[1]) if found else 0


def why_missing() -> str:
    """The reason why py-spy cannot run here, or ""."""
    return "" if PY_SPY.exists() else f"py-spy is {why_not_installed('py-spy')}"


@contextmanager
def sampling(pid: int, temp: Path) -> Iterator[Held]:
    """Sample a process and its descendants until the end.

    Raises:
        RuntimeError: py-spy is not installed, or cannot look at the process.
    """
    if why := why_missing():
        raise RuntimeError(why)
    output, log, held = temp / f"gil-{pid}", temp / f"gil-{pid}.log", Held()
    # Nonblocking: py-spy else stops the process for each sample. Those that it reads while the
    # process goes on are sometimes of no use, and the rate below leaves them out.
    command = [PY_SPY, "record", "--gil", "--subprocesses", "--nonblocking", "--format", "raw"]
    command += ["--rate", str(SAMPLES_PER_S), "--output", output, "--pid", str(pid)]
    with log.open("wb") as log_file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log_file, stderr=log_file
        )
    try:
        _wait_sampling(process, log)
        start_s = time.monotonic()
        yield held
        taken_s = time.monotonic() - start_s
        process.send_signal(signal.SIGINT)
        process.wait(START_DEADLINE_S)
        samples = taken_samples(log.read_text())
        if not samples:
            raise RuntimeError(f"py-spy took no samples: {_last_line(log)}")
        each_s = taken_s / samples
        found = parse_samples(output.read_text()) if output.exists() else Counter[int]()
        held.by_pid = {pid: count * each_s for pid, count in found.items()}
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
