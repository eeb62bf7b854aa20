"""What a check is, and how all of them are run: at the same time, and none of them for ever.

A check runs when those are done that it needs, in a thread of its own. Nobody waits for it longer
than its `timeout_s`: a thread that hangs in a resolver or on a disk cannot be ended, so it is left
alone. What a check finds and another one needs, they share by the object whose methods they are.
"""

import threading
from collections.abc import Callable, Generator, Sequence
from typing import Literal, NamedTuple

import msgspec

from ckptfs._model.manifest import printable
from ckptfs.errors import CkptfsError

Status = Literal["ok", "warning", "failed", "skipped"]


class Outcome(NamedTuple):
    """What a check has found: what is so, in one line, and in another one what to do about it."""

    status: Status
    message: str
    remedy: str = ""


_CHARACTERS_MAX = 2000
"""Of a message: many settings of a store can be in one."""


class Check(NamedTuple):
    """One check.

    Attributes:
        name: Stable: scripts look for it.
        group: The heading that it stands under.
        look: Finds it out. May block.
        remedy: What to do where `look` fails without saying so, or does not end.
        needs: Checks without whose success this one says nothing.
        unless_failed: Checks that may be skipped, but not fail.
        after: Checks that have to be done, however they end.
        timeout_s: Longest time.
    """

    name: str
    group: str
    look: Callable[[], Outcome]
    remedy: str
    needs: tuple[str, ...] = ()
    unless_failed: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    timeout_s: float = 10.0


class Result(msgspec.Struct, frozen=True):
    """One line of the report."""

    name: str
    group: str
    status: Status
    message: str
    remedy: str = ""


def ok(message: str) -> Outcome:
    """It is as it should be."""
    return Outcome("ok", message)


def warning(message: str, remedy: str) -> Outcome:
    """It works, but not as well as it could."""
    return Outcome("warning", message, remedy)


def failed(message: str, remedy: str) -> Outcome:
    """It does not work."""
    return Outcome("failed", message, remedy)


def skipped(why: str) -> Outcome:
    """It says nothing here."""
    return Outcome("skipped", why)


class Examination:
    """A run of checks, which begins at once."""

    def __init__(self, checks: Sequence[Check]) -> None:
        self._checks = checks
        self._done = {check.name: threading.Event() for check in checks}
        self._outcomes: dict[str, Outcome] = {}
        self._failures: dict[str, str] = {}  # of those that failed, or are skipped for it: which
        self._late = 0
        for check in checks:
            threading.Thread(target=self._run, args=(check,), daemon=True).start()

    def results(self) -> Generator[Result]:
        """The results in the order of the checks, each as soon as it is there."""
        for check in self._checks:
            self._done[check.name].wait()
            outcome = self._outcomes[check.name]
            yield Result(
                check.name,
                check.group,
                outcome.status,
                printable(outcome.message, _CHARACTERS_MAX),
                printable(outcome.remedy),
            )

    @property
    def has_late(self) -> bool:
        """Whether a check has not ended in its time, so that its thread may still run."""
        return self._late > 0

    def _run(self, check: Check) -> None:
        for name in (*check.needs, *check.unless_failed, *check.after):
            self._done[name].wait()
        self._outcomes[check.name] = outcome = self._without(check) or self._look(check)
        if outcome.status == "failed":
            self._failures[check.name] = check.name
        self._done[check.name].set()

    def _without(self, check: Check) -> Outcome | None:
        """Why it is not run; None: it is."""
        for name in (*check.needs, *check.unless_failed):
            if failure := self._failures.get(name):
                self._failures[check.name] = failure
                return skipped(f"because of {failure}")
        for name in check.needs:
            if self._outcomes[name].status == "skipped":
                return self._outcomes[name]
        return None

    def _look(self, check: Check) -> Outcome:
        found: list[Outcome] = []
        thread = threading.Thread(target=lambda: found.append(_outcome_of(check)), daemon=True)
        thread.start()
        thread.join(check.timeout_s)
        if found:
            return found[0]
        self._late += 1
        return failed(f"no result within {check.timeout_s:g} s", check.remedy)


def _outcome_of(check: Check) -> Outcome:
    try:
        return check.look()
    except CkptfsError as error:  # "what happened; what to do"
        message, separator, remedy = str(error).rpartition("; ")
        return failed(message, remedy) if separator else failed(remedy, check.remedy)
    except OSError as error:
        return failed(str(error) or type(error).__name__, check.remedy)
    except Exception as error:  # of a library, or a fault of ours: the other checks go on
        return failed(f"{type(error).__name__}: {error}", check.remedy)
