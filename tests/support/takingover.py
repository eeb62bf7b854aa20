"""Keepers that take a mount over from each other, each a process of its own."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from conftest import COMMAND_TIMEOUT_S, Node, wait_until

from ckptfs._os import takeover
from ckptfs._os.takeover import Claim, Offered

KILLED_AT = """
import os, signal, sys
from ckptfs._keeper import daemon_process, keeper
from ckptfs._os import takeover

at, armed = int(sys.argv.pop(1)), sys.argv.pop(1)
moments = 0

def moment():
    global moments
    moments += os.path.exists(armed)
    if moments == at:
        os.kill(os.getpid(), signal.SIGKILL)

def in_steps(owner, name):
    step = getattr(owner, name)

    def run(*args, **more):
        moment()
        result = step(*args, **more)
        moment()
        return result

    setattr(owner, name, run)

in_steps(takeover.Channel, "send")
in_steps(takeover.Channel, "receive")
for name in ("wait_imported", "activate", "end"):
    in_steps(daemon_process.DaemonProcess, name)
keeper.main()
"""
"""A keeper that is killed at the given moment, before or after a step of a takeover. It counts as
long as the given file exists."""


def offer_at(path: str) -> Offered:
    """The offer of the keeper or driver that listens there, to another one."""
    offered = takeover.claim(path, Claim("another", "0", waits=False))
    assert isinstance(offered, Offered)
    return offered


class KeeperProcess:
    """A keeper in the foreground that takes part in takeovers.

    Attributes:
        process: The process.
    """

    def __init__(self, log: Path, command: Sequence[str], **environment: str) -> None:
        self._log = log
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                command,
                stderr=file,
                stdin=subprocess.DEVNULL,
                cwd="/",
                env={**os.environ, **environment},
            )

    def log(self) -> str:
        """The text that it has written."""
        return self._log.read_text()

    def wait_for(self, text: str, count: int = 1) -> None:
        """Wait until the log has a text so often."""
        wait_until(lambda: self.log().count(text) >= count or self.process.poll() is not None)
        assert self.log().count(text) >= count, self.log()

    def wait_serving(self) -> None:
        """Wait until its daemon serves."""
        self.wait_for("ckptfs._daemon.app: serving on ")

    def wait_standing_by(self, owner: "KeeperProcess", count: int = 1) -> None:
        """Wait until this former owner waits for the end of `owner`."""
        owner.wait_for("waits for the end of this process", count)

    def end(self) -> int:
        """End it by SIGTERM, and return its status."""
        self.process.send_signal(signal.SIGTERM)  # does nothing after its end
        return self.process.wait(COMMAND_TIMEOUT_S)

    def kill(self) -> None:
        """End it by SIGKILL."""
        self.process.kill()
        self.process.wait(COMMAND_TIMEOUT_S)


class KeeperProcesses:
    """Starts keepers of a node, which end with `keeper_processes`."""

    def __init__(self, node: Node, stack: ExitStack) -> None:
        self._node = node
        self._stack = stack
        self._count = 0

    def start(self, *options: str, **environment: str) -> KeeperProcess:
        """Start ``ckptfs mount --foreground --take-over``."""
        ckptfs = str(Path(sys.executable).with_name("ckptfs"))
        words = ("mount", "--foreground", "--take-over", *options)
        return self.run([ckptfs, *words], **environment)

    def start_killed_at(self, moment: int, armed: Path) -> KeeperProcess:
        """Start a keeper that is killed at that moment (`KILLED_AT`)."""
        words = (str(moment), str(armed), "--take-over")
        return self.run([sys.executable, "-c", KILLED_AT, *words])

    def run(self, command: Sequence[str], **environment: str) -> KeeperProcess:
        """Start a keeper by a command."""
        self._count += 1
        log = self._node.folder / f"keeper-{self._count}.log"
        keeper = KeeperProcess(log, command, **environment)
        self._stack.callback(self._end, keeper)
        return keeper

    def _end(self, keeper: KeeperProcess) -> None:
        if keeper.process.poll() is None:
            keeper.end()
        self._node.check_log(keeper.log())


@contextmanager
def keeper_processes(node: Node) -> Iterator[KeeperProcesses]:
    """Keepers of a node. The last one that was started ends first."""
    with ExitStack() as stack:
        yield KeeperProcesses(node, stack)
