"""Daemon and clients in containers of their own: other mount namespaces, paths, pids and users.

The tests set up with unshare(1) the mounts that a container runtime sets up for volumes:

- a node whose mounts are shared;
- a daemon in a bind mount of the same peer group (``mountPropagation: Bidirectional``);
- clients in slaves of it (``HostToContainer``).
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import COMMAND_TIMEOUT_S, Node
from support.usernamespace import IS_SUPPORTED
from support.worlds import OWN_MOUNTS

from ckptfs._os import peercred

pytestmark = pytest.mark.mount

UriOf = Callable[[Path], str]

CKPTFS = str(Path(sys.executable).with_name("ckptfs"))
_GRACE_S = 15.0
OWN_PIDS = ("--pid", "--fork", "--kill-child", "--mount-proc")
HOLD = """
import sys
from pathlib import Path
import ckptfs
with ckptfs.Checkpoint(sys.argv[1]).as_directory(mode="mount") as path:
    print(path, Path(path, "config.json").read_text(), flush=True)
    sys.stdin.read()
"""


class Containers:
    """A node in a mount namespace of its own, and containers on it.

    On the node the volume is ``host/run``; the daemon's container has it as ``daemon/run``, and a
    client's as ``client/vol``.
    """

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self.folder = folder
        self._stack = stack
        for name in ("host", "daemon/run", "client/vol", "empty"):
            (folder / name).mkdir(parents=True)
        node = self._start(
            list(OWN_MOUNTS),
            f"mount -t tmpfs tmpfs {folder}/host; mount --make-shared {folder}/host; "
            f"mkdir {folder}/host/run; echo ready; exec sleep infinity",
        )
        assert line_of(node) == "ready"
        self._enter = ["nsenter", "--target", str(node.pid), "--mount"]

    def _start(
        self, command: list[str], script: str, *arguments: str, **environment: str
    ) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [*command, "sh", "-ec", script, "sh", *arguments],
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._stack.callback(end, process)
        return process

    def mounts(self) -> list[str]:
        """The mounts of ckptfs, as the node sees them."""
        done = subprocess.run(
            [*self._enter, "cat", "/proc/self/mountinfo"],
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=True,
        )
        lines = [line.split(" ") for line in done.stdout.splitlines()]
        found = [fields[4] for fields in lines if "fuse.ckptfs" in fields]
        return [path for path in found if path.startswith(str(self.folder))]

    def daemon(self, *flags: str) -> "subprocess.Popen[str]":
        """Start a daemon in its container, as its process 1, and wait for it."""
        run = self.folder / "daemon" / "run"
        process = self._start(
            [*self._enter, "unshare", "--mount", "--propagation", "unchanged", *OWN_PIDS],
            f'mount --rbind {self.folder}/host/run {run}; exec {CKPTFS} mount --foreground "$@"',
            *flags,
            CKPTFS_SOCKET=f"{run}/sock",
            CKPTFS_MOUNT=f"{run}/mnt",
        )
        assert process.stderr is not None
        while "serving on" not in (line := process.stderr.readline()):
            assert line, "the daemon did not start"
        return process

    def client(
        self,
        *command: str,
        propagation: str = "slave",
        options: tuple[str, ...] = OWN_PIDS,
        mount: str = "client/vol/mnt",
        before: str = "",
    ) -> "subprocess.Popen[str]":
        """Start a command in a container that has the volume, and nothing else of the node."""
        hide = f"mount --bind {self.folder}/empty {self.folder}/host"
        return self._start(
            [*self._enter, "unshare", "--mount", "--propagation", propagation, *options],
            f"mount --rbind {self.folder}/host/run {self.folder}/client/vol; {hide}; {before} "
            'exec "$@"',
            *command,
            CKPTFS_SOCKET=f"{self.folder}/client/vol/sock",
            CKPTFS_MOUNT=mount and f"{self.folder}/{mount}",
        )


def line_of(process: "subprocess.Popen[str]") -> str:
    """The next line that it prints."""
    assert process.stdout is not None
    line = process.stdout.readline().rstrip("\n")
    assert line, process.communicate(timeout=COMMAND_TIMEOUT_S)[1]
    return line


def said(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    """Status, output and errors of a process, when it has ended."""
    output, errors = process.communicate(timeout=COMMAND_TIMEOUT_S)
    return process.returncode, output, errors


def first_in(process: "subprocess.Popen[str]") -> int:
    """Process 1 of the container that unshare(1) has made."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(children[0]) if children else process.pid


def end(process: "subprocess.Popen[str]") -> None:
    """End a container, as a runtime does."""
    if process.poll() is None:
        os.kill(first_in(process), signal.SIGTERM)
        try:
            process.communicate(timeout=_GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
    process.communicate()


@pytest.fixture
def containers(node: Node) -> Iterator[Containers]:
    can = subprocess.run(["unshare", "--mount", *OWN_PIDS, "true"], check=False).returncode == 0
    if not can:
        pytest.skip("no new namespaces are allowed here")
    with contextlib.ExitStack() as stack:
        yield Containers(node.folder / "node", stack)


def test_a_client_sees_the_mount_under_a_path_of_its_own(
    containers: Containers, node: Node, small: Path, uri_of: UriOf
) -> None:
    containers.daemon()
    client = containers.client(sys.executable, "-c", HOLD, uri_of(small))
    path, _, content = line_of(client).partition(" ")
    assert path.startswith(f"{containers.folder}/client/vol/mnt/checkpoint-")
    assert content == '{"layers": 1}'
    status = containers.client(CKPTFS, "status")
    assert "held by" in said(status)[1].lower()
    attach = containers.client(CKPTFS, "attach", uri_of(small))
    assert said(attach) == (0, f"{path}\n", "")
    got = containers.client("cat", f"{path}/config.json")
    assert said(got) == (0, content, "")
    detach = containers.client(CKPTFS, "detach", path)
    assert said(detach) == (0, "", "")
    assert said(client)[0] == 0


def test_pids_that_the_daemon_does_not_see(
    containers: Containers, small: Path, uri_of: UriOf
) -> None:
    """Its pid namespace has no process of the clients, so the kernel says 0."""
    containers.daemon()
    client = containers.client(sys.executable, "-c", HOLD, uri_of(small))
    path = line_of(client).partition(" ")[0]
    status = said(containers.client(CKPTFS, "status"))[1]
    assert "processes of other containers" in status
    assert "pid 0" not in status
    refused = said(containers.client(CKPTFS, "detach", path))
    assert refused[0] == 1
    assert "is held by processes of other containers;" in refused[2]
    assert said(client)[0] == 0


@pytest.mark.skipif(not IS_SUPPORTED, reason="the kernel names the user of each request")
def test_users_that_the_daemon_does_not_see(
    containers: Containers, small: Path, uri_of: UriOf
) -> None:
    """The kernel names neither the user nor the process, so the daemon lists no attributes. The
    kernel decides who may read and set them."""
    (small / ".metadata.json").write_text('{"a": 1}')
    containers.daemon("--allow-other")
    path = said(containers.client(CKPTFS, "attach", uri_of(small)))[1].strip()
    name = "user.ckptfs.meta.a"
    for user, listed, read, changed in (("0", "", "1", 0), ("65534", "", "", 1)):
        become = ("setpriv", f"--reuid={user}", "--clear-groups")
        assert said(containers.client(*become, "getfattr", "--dump", path))[1] == listed
        one = containers.client(*become, "getfattr", "--only-values", "--name", name, path)
        assert said(one)[1] == read
        change = containers.client(*become, "setfattr", "--name", name, "--value", "1", path)
        assert said(change)[0] == changed


@pytest.mark.parametrize("begins", ["before", "after"])
def test_a_mount_that_does_not_reach_the_container(
    containers: Containers, small: Path, uri_of: UriOf, begins: str
) -> None:
    """Without propagation a container sees what was mounted when it began, at most."""
    if begins == "before":
        waits = f"while ! [ -e {containers.folder}/client/vol/sock ]; do sleep 0.05; done;"
        arguments = ("attach", uri_of(small))
        client = containers.client(CKPTFS, *arguments, propagation="private", before=waits)
        containers.daemon()
        wanted = f"{containers.folder}/client/vol/mnt is not a mount of ckptfs here"
    else:
        containers.daemon()
        client = containers.client(CKPTFS, "attach", uri_of(small), mount="client/elsewhere")
        wanted = f"{containers.folder}/client/elsewhere does not exist here"
    status, output, errors = said(client)
    assert (status, output) == (1, "")
    assert errors.startswith(f"ckptfs: error: {wanted}; the daemon has mounted on")
    assert "mountPropagation: HostToContainer" in errors
    assert errors.count("\n") == 1


def test_the_daemons_own_path_is_not_the_clients(
    containers: Containers, small: Path, uri_of: UriOf
) -> None:
    containers.daemon()
    client = containers.client(CKPTFS, "attach", uri_of(small), mount="")
    status, _, errors = said(client)
    assert status == 1
    assert f"{containers.folder}/daemon/run/mnt does not exist here" in errors


def test_the_daemons_container_ends_with_its_mount(
    containers: Containers, small: Path, uri_of: UriOf
) -> None:
    daemon = containers.daemon()
    mounts = [f"{containers.folder}/host/run/mnt"]
    assert containers.mounts() == mounts
    end(daemon)
    assert containers.mounts() == []
    containers.daemon()
    assert containers.mounts() == mounts
    assert said(containers.client(CKPTFS, "attach", uri_of(small)))[0] == 0


def test_a_container_that_goes_on_sees_the_mount_of_the_next_daemon(
    containers: Containers, small: Path, uri_of: UriOf
) -> None:
    """A daemon that is killed leaves a dead mount on the node, which the next one takes away."""
    daemon = containers.daemon()
    gate = containers.folder / "gate"
    os.mkfifo(gate)
    attach = f"{CKPTFS} attach '{uri_of(small)}'"
    status = f"{CKPTFS} status 2>&1"
    then = f"{attach}; cat $({attach})/config.json"
    script = f"{attach}; cat {gate}; {status}; cat {gate}; {then}"
    client = containers.client("sh", "-c", script)
    path = line_of(client)
    os.kill(first_in(daemon), signal.SIGKILL)
    daemon.communicate(timeout=COMMAND_TIMEOUT_S)
    gate.write_text("")
    assert line_of(client).startswith("ckptfs: error: no ckptfs daemon is running at ")
    assert containers.mounts() == [f"{containers.folder}/host/run/mnt"]
    containers.daemon()
    gate.write_text("")
    assert line_of(client) == path
    assert line_of(client) == '{"layers": 1}'
    assert said(client)[0] == 0


def test_a_user_namespace_without_the_daemons_user(
    containers: Containers, small: Path, uri_of: UriOf
) -> None:
    containers.daemon()
    client = containers.client("unshare", "--user", CKPTFS, "attach", uri_of(small))
    status, _, errors = said(client)
    assert status == 1
    assert "is served by a user outside of this user namespace" in errors


@pytest.mark.parametrize(
    ("uid", "lines", "anybody"),
    [
        (65534, "0 0 4294967295", False),
        (65534, "0 100000 65536", True),
        (65534, "0 0 1000\n1000 1000 4294966295", False),
        (1000, "0 100000 65536", False),
    ],
)
def test_the_overflow_id_is_anybody_where_some_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uid: int, lines: str, anybody: bool
) -> None:
    (tmp_path / "map").write_text(lines)
    monkeypatch.setattr(peercred, "_UID_MAP", tmp_path / "map")
    assert peercred.is_anybody(uid) == anybody
