"""The checks of a node without users and faults.

`python -m chaostest.rest URI FILE` is the last reader: it reads one file and waits until all of it
is in the cache. It prints the number of cached bytes, and the file's size.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from chaostest.content import MIB
from chaostest.node import DAEMON, Sample
from ckptfs import Checkpoint
from ckptfs.errors import CkptfsError

if TYPE_CHECKING:
    from chaostest.chaos import Chaos

MEMORY_GROWTH_MAX = 96 * MIB
DESCRIPTORS_GROWTH_MAX = 24
THREADS_GROWTH_MAX = 24
"""From rest to rest: buffers that are kept for the next span, connections and threads that wait for
more work."""

REST_WAIT_S = 30.0
STORED_WAIT_S = 20.0
KILLED_AT_ITS_START = (
    " ERROR ckptfs._keeper.keeper: the next daemon did not come up: the daemon did not come up; "
)
"""The keeper's messages about that."""

CANNOT = re.compile(r" cache: cannot (\w+)")


def wait_for_rest(chaos: Chaos) -> bool:
    """Wait until nothing is attached any more; False: something stays so."""
    deadline_s = time.monotonic() + REST_WAIT_S
    while chaos.node.status()["attachments"]:
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.1)
    return True


def judge(chaos: Chaos) -> None:
    """Look at a node whose readers have ended."""
    try:
        chaos.node.start()
        _judge_cache(chaos)
        if not wait_for_rest(chaos):
            status = chaos.node.status()
            left = [a | {"skipped": []} for a in status["attachments"]]
            chaos.breach("rest", f"still attached {REST_WAIT_S:g} s after all ended: {left}")
    except (CkptfsError, OSError) as error:
        chaos.breach("rest", f"no daemon answers at the end: {error}")
    _wait_for_idle_channels(chaos)
    chaos.sample("last")
    _judge_growth(chaos)
    _judge_log(chaos)


def _judge_cache(chaos: Chaos) -> None:
    """Whatever the disk has done, the cache is in use again now that it does nothing more."""
    file = next(file for file in chaos.contents.files if file.name.endswith("part-2.bin"))
    chaos.publish(file)
    command = [sys.executable, "-m", "chaostest.rest", chaos.uris[file.checkpoint], file.name]
    wait_s = STORED_WAIT_S + REST_WAIT_S
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=wait_s, check=False)
    except subprocess.TimeoutExpired:
        chaos.breach("cache", f"{file.name} cannot be read within {wait_s:g} s, at rest")
        return
    cached, _, size = done.stdout.strip().partition(" of ")
    if done.returncode or cached != size:
        said = dict(words_of_cache(chaos.node.log()))
        text = done.stdout.strip() or done.stderr.strip().splitlines()[-1:]
        chaos.breach("cache", f"{file.name} is not stored, at rest: {text}; the log: {said}")


def _wait_for_idle_channels(chaos: Chaos) -> None:
    """Wait until the daemon has closed its channels to workers, which it does after 10 s."""
    first = chaos.outcome.samples.get("daemon", {}).get("first")
    deadline_s = time.monotonic() + REST_WAIT_S
    while first and time.monotonic() < deadline_s:
        sample = chaos.node.sample(DAEMON)
        if sample is not None and sample.descriptors - first[1] <= DESCRIPTORS_GROWTH_MAX:
            return
        time.sleep(0.2)


def _judge_growth(chaos: Chaos) -> None:
    limits = MEMORY_GROWTH_MAX, DESCRIPTORS_GROWTH_MAX, THREADS_GROWTH_MAX
    for name, known in chaos.outcome.samples.items():
        if "first" not in known or "last" not in known:
            chaos.breach("growth", f"there was no {name} to look at")
            continue
        figures = zip(Sample._fields[1:], known["first"], known["last"], limits, strict=True)
        for what, first, last, limit in figures:
            if last - first > limit:
                chaos.breach("growth", f"{what} of the {name}: from {first} to {last}")


def _judge_log(chaos: Chaos) -> None:
    log = chaos.node.log()
    chaos.outcome.cache_cannot = words_of_cache(log)
    for line in log.splitlines():
        if KILLED_AT_ITS_START in line:
            continue
        if " ERROR " in line or " CRITICAL " in line or line.startswith(("Traceback", "---")):
            chaos.breach("log", line)


def words_of_cache(log: str) -> Counter[str]:
    """The failed operations of the cache in the log, and their numbers."""
    return Counter(CANNOT.findall(log))


def main() -> None:
    uri, name = sys.argv[1:]
    with Checkpoint(uri).as_directory(mode="mount") as top:
        path = Path(top, name)
        size = len(path.read_bytes())
        deadline_s = time.monotonic() + STORED_WAIT_S
        while True:
            cached = int(os.getxattr(path, "user.ckptfs.cached"))
            if cached == size or time.monotonic() > deadline_s:
                break
            time.sleep(0.05)
    print(f"{cached} of {size}")


if __name__ == "__main__":
    main()
