"""One run: its stores and objects, and how work is timed and repeated in it."""

from __future__ import annotations

import json
import math
import os
import select
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark.contenders import RAW
from benchmark.results import Panel
from ckptfs import CkptfsError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from support.s3server import CountingProxy

    from benchmark.contenders import Contender, Ready
    from benchmark.results import Report
    from benchmark.stores import Objects, Store

WORKER = Path(__file__).with_name("worker.py")
WORK_TIMEOUT_S = 120.0
"""For one piece of work. The slowest (a copy from the capped store) takes a fourth of it."""


class WorkError(Exception):
    """A piece of work that failed, in one line."""


def nothing(ready: Ready) -> None:
    """For contenders that are not watched."""


FAILURES = (WorkError, CkptfsError, RuntimeError, OSError, subprocess.SubprocessError)
"""Errors that end one contender's part in a case, and not the run."""


@dataclass(frozen=True)
class Run:
    """The part that all cases share.

    Attributes:
        temp: Folder of nodes, copies and mounts, on the measured disk.
        objects: The content of the stores.
        store: The server itself.
        tls: The same behind nginx, which ends TLS; None if that does not run, or no case needs it.
        capped: The same behind nginx with its limits, or None.
        capped_tls: The same with TLS, or None.
        link: The same over a slow link, or None.
        counted: The first one behind the proxy that counts.
        rounds: Number of measurements of each thing.
        budget_s: Time after which no further round of one measurement begins, so that a run ends
            soon on a busy machine.
        raw_threads: Number of readers that get most out of a store, by its name.
        report: The collected results.
    """

    temp: Path
    objects: Objects
    store: Store
    tls: Store | None
    capped: Store | None
    capped_tls: Store | None
    link: Store | None
    counted: tuple[Store, CountingProxy]
    rounds: int
    budget_s: float
    raw_threads: dict[str, int]
    report: Report

    def able(self, store: Store, *contenders: Contender) -> list[Contender]:
        """The contenders that can read `store`. The report names the others, with the reason."""
        if not store.ca_file:
            return list(contenders)
        reasons = {each.name: each.no_tls() for each in contenders if not each.missing()}
        lacking = {name: why for name, why in reasons.items() if why}
        self.report.absent.update({f"{name} over TLS": why for name, why in lacking.items()})
        return [each for each in contenders if each.name not in lacking]

    def large(self) -> dict[str, Any]:
        """The part of a job that names the large file."""
        return {"name": "large", "file": "data.bin"}

    def model(self) -> dict[str, Any]:
        """The part of a job that names the model, and one tensor of it."""
        made = self.objects
        shards = {"shards": made.shards()}
        return {"name": "model", "file": made.tensor_shard, "tensor": made.tensor} | shards

    def cold(
        self,
        contender: Contender,
        task: str,
        job: dict[str, Any],
        check: int,
        *,
        store: Store | None = None,
        before: Callable[[Ready], None] = nothing,
        after: Callable[[Ready], None] = nothing,
    ) -> Callable[[], float]:
        """A function that measures `contender` with an empty cache, in seconds for the task.

        If the contender has a node of ckptfs, the function calls `before` and `after` around the
        work, while its process still holds everything.
        """
        store = store or self.store
        if contender is RAW:
            sizes = [
                self.objects.folder / job["name"] / f for f in job.get("shards", [job["file"]])
            ]
            check = sum(path.stat().st_size for path in sizes)
            job = job | {"threads": self.raw_threads[store.name]}

        def measure() -> float:
            with (
                contender.cold(store, self.temp) as ready,
                working(ready, {"task": task} | job) as worker,
            ):
                if ready.node:
                    ready.node.wait_idle()
                    before(ready)
                seconds = worker.go(check)["seconds"]
                if ready.node:
                    after(ready)
                return seconds

        return measure

    def cold_each(
        self,
        contenders: Sequence[Contender],
        task: str,
        job: dict[str, Any],
        check: int,
        store: Store,
        *,
        before: Callable[[Ready], None] = nothing,
        after: Callable[[Ready], None] = nothing,
    ) -> dict[str, Callable[[], float]]:
        """The functions of `cold` for those contenders that can read `store`, by name."""
        return {
            each.name: self.cold(each, task, job, check, store=store, before=before, after=after)
            for each in self.able(store, *contenders)
        }

    def add_panel(
        self, case: str, title: str, series: dict[str, list[float]], unit: str = "s"
    ) -> None:
        """Report what was measured."""
        panel = Panel(case=case, title=title, unit=unit, series=series)
        self.report.panels.append(panel)

    def alternate(
        self,
        case: str,
        measures: dict[str, Callable[[], float]],
        rounds: int | None = None,
    ) -> dict[str, list[float]]:
        """Measure all in turns. Note each failed contender, and leave it out from then on."""
        measures = {name: measures[name] for name in measures if name not in self.report.absent}
        values: dict[str, list[float]] = {name: [] for name in measures}
        start_s = time.monotonic()
        for turn in range(rounds or self.rounds):
            if turn and time.monotonic() - start_s > self.budget_s:
                break
            names = list(measures)
            for name in reversed(names) if turn % 2 else names:
                try:
                    values[name].append(measures[name]())
                except FAILURES as error:
                    why = " ".join(str(error).split())
                    self.report.absent[f"{name} in {case}"] = why
                    print(f"bench: {case}: {name} failed: {why}", file=sys.stderr, flush=True)
                    del measures[name], values[name]
        return values


class Worker:
    """A process that does one job when it is told to; see worker.py."""

    def __init__(self, process: subprocess.Popen[str], what: str) -> None:
        self._process = process
        self._what = what

    def go(self, check: int | None = None) -> dict[str, Any]:
        """Do the work and return its result; `check` is what its check must be."""
        self.start()
        return self.result(check)

    def start(self) -> None:
        assert self._process.stdin
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def result(self, check: int | None = None) -> dict[str, Any]:
        """Wait for it.

        Raises:
            WorkError: It failed, took too long, or did not read what it should have.
        """
        result = json.loads(self.line())
        if check is not None and result["check"] != check:
            raise WorkError(f"{self._what}: read {result['check']}, and not {check}")
        return result

    def line(self) -> str:
        assert self._process.stdout
        if not select.select([self._process.stdout], [], [], WORK_TIMEOUT_S)[0]:
            raise WorkError(f"{self._what}: no answer within {WORK_TIMEOUT_S:g} s")
        if line := self._process.stdout.readline():
            return line
        assert self._process.stderr
        said = self._process.stderr.read().strip().splitlines()
        raise WorkError(f"{self._what}: {said[-1] if said else 'ended without a word'}")


@contextmanager
def working(ready: Ready, job: dict[str, Any]) -> Iterator[Worker]:
    """A process that has made itself ready for the job. At the end it lets go of all it holds."""
    job = ready.job | job
    process = subprocess.Popen(
        [*ready.prefix, sys.executable, WORKER, json.dumps(job)],
        env=os.environ | ready.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    worker = Worker(process, f"{job['way']}, {job.get('task', 'all')}")
    try:
        worker.line()  # it is ready
        yield worker
    except BaseException:
        process.kill()
        raise
    finally:
        assert process.stdin
        process.stdin.close()
        try:
            process.wait(WORK_TIMEOUT_S)
        except subprocess.TimeoutExpired:  # it hangs in the kernel, until its mount is gone
            process.kill()
        for pipe in (process.stdout, process.stderr):
            assert pipe
            pipe.close()


def calibrate(store: Store, job: dict[str, Any], candidates: Sequence[int]) -> int:
    """How many threads read fastest from the store with nothing stored, each tried twice."""
    taken_s = dict.fromkeys(candidates, math.inf)
    for threads in (*candidates, *candidates):
        with (
            RAW.cold(store, Path()) as ready,
            working(ready, job | {"threads": threads}) as worker,
        ):
            taken_s[threads] = min(taken_s[threads], worker.go()["seconds"])
    return min(taken_s, key=lambda threads: taken_s[threads])


def wait_quiet(ready: Ready) -> None:
    """Wait until nothing is being fetched ahead of the readers any more."""
    assert ready.node
    deadline_s = time.monotonic() + WORK_TIMEOUT_S
    while any(a["state"] == "fetching" for a in ready.node.status()["attachments"]):
        if time.monotonic() > deadline_s:
            raise WorkError(f"still fetching after {WORK_TIMEOUT_S:g} s")
        time.sleep(0.05)
