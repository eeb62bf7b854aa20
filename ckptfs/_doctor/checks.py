"""The type of a check, and the engine that runs all checks at the same time.

Each check runs in a thread of its own, as soon as the checks that it needs are done. A check that
does not end within its `timeout_s` has failed, and its thread is left alone, because Python cannot
end a thread that hangs in a resolver or on a disk. Checks share results by the object whose
methods they are.
"""

import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, wait
from functools import partial
from typing import Literal, NamedTuple

import msgspec

from ckptfs._model.manifest import printable
from ckptfs.errors import CkptfsError

Status = Literal["ok", "warning", "failed", "skipped"]


class Outcome(NamedTuple):
    """The result of a check: its status, one line of facts, and one line with a remedy."""

    status: Status
    message: str
    remedy: str = ""


_CHARACTERS_MAX = 2000
"""Maximum length of a message, which can list many settings of a store."""


class Check(NamedTuple):
    """One check.

    Attributes:
        name: The stable name, which scripts use.
        look: The function of the check, which may block.
        remedy: The remedy if `look` raises an error without one, or does not end.
        group: The heading of the check in the report.
        needs: Checks that must succeed before this one runs.
        unless_failed: Checks that must succeed or be skipped before this one runs.
        after: Checks that must end before this one runs.
        timeout_s: The longest time for `look`.
    """

    name: str
    look: Callable[[], Outcome]
    remedy: str
    group: str
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


ok = partial(Outcome, "ok")
"""Report that a check found no fault."""
warning = partial(Outcome, "warning")
"""Report a fault that does not stop ckptfs, and its remedy."""
failed = partial(Outcome, "failed")
"""Report a fault that stops ckptfs, and its remedy."""
skipped = partial(Outcome, "skipped")
"""Report that a check does not apply here."""


class Examination:
    """A run of checks, which starts at once.

    Attributes:
        has_late: Whether a check has exceeded its time, so that its thread may still run.
    """

    def __init__(self, checks: Sequence[Check]) -> None:
        self.has_late = False
        self._checks = checks
        self._outcomes = {check.name: Future[Outcome]() for check in checks}
        self._failures: dict[str, str] = {}  # failed and skipped checks, each with the one to blame
        self._given_up = False
        for check in checks:
            threading.Thread(target=self._run, args=(check,), daemon=True).start()

    def results(self) -> Generator[Result]:
        """Yield the results in the order of the checks, each as soon as possible."""
        for check in self._checks:
            status, message, remedy = self._outcomes[check.name].result()
            message = printable(message, _CHARACTERS_MAX)
            yield Result(check.name, check.group, status, message, printable(remedy))

    def give_up(self) -> None:
        """Start no further check, and wait until the running checks have ended or are late.

        Checks clean up after themselves. They end mounts and remove files, so the process must not
        end during a check.
        """
        self._given_up = True
        wait(self._outcomes.values())

    def _run(self, check: Check) -> None:
        wait(self._outcomes[name] for name in (*check.needs, *check.unless_failed, *check.after))
        outcome = self._without(check) or self._look(check)
        if outcome.status == "failed":
            self._failures[check.name] = check.name
        self._outcomes[check.name].set_result(outcome)

    def _without(self, check: Check) -> Outcome | None:
        """Return the outcome of a check that is skipped, or None if it should run."""
        if self._given_up:
            return skipped("the command ended before this check")
        for name in (*check.needs, *check.unless_failed):
            if failure := self._failures.get(name):
                self._failures[check.name] = failure
                return skipped(f"because of {failure}")
        needed = (self._outcomes[name].result() for name in check.needs)
        return next((outcome for outcome in needed if outcome.status == "skipped"), None)

    def _look(self, check: Check) -> Outcome:
        # Not an executor, whose threads would keep the interpreter from ending.
        found = Future[Outcome]()
        threading.Thread(target=lambda: found.set_result(_outcome_of(check)), daemon=True).start()
        wait([found], check.timeout_s)
        if found.done():
            return found.result()
        self.has_late = True
        return failed(f"no result within {check.timeout_s:g} s", check.remedy)


def _outcome_of(check: Check) -> Outcome:
    try:
        return check.look()
    except CkptfsError as error:  # "what happened; what to do"
        message, separator, remedy = str(error).rpartition("; ")
        return failed(message, remedy) if separator else failed(remedy, check.remedy)
    except OSError as error:
        return failed(str(error) or type(error).__name__, check.remedy)
    except Exception as error:  # of a library, or a bug of ours; the other checks continue
        return failed(f"{type(error).__name__}: {error}", check.remedy)
