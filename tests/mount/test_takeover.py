"""A keeper takes the mount over from another one, as in an update of Kubernetes' DaemonSet."""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import COMMAND_TIMEOUT_S, Node, wait_until
from mount.test_background_upload import hold
from mount.test_lifecycle import attachments, has_ended, hear, is_mounted
from mount.test_restart import verified_reads
from mount.test_users import let_others_in
from support.takingover import KeeperProcess, KeeperProcesses, keeper_processes, offer_at
from support.worlds import OWN_MOUNTS

import ckptfs
from ckptfs._os.mountinfo import mount_table

pytestmark = pytest.mark.mount

UriOf = Callable[[Path], str]
MIB = 1 << 20
GONE = (errno.ENOTCONN, errno.ECONNABORTED)


@pytest.fixture
def keepers(node: Node) -> Iterator[KeeperProcesses]:
    with keeper_processes(node) as keepers:
        yield keepers
    assert has_ended(node)
    assert not is_mounted(node)
    assert not list(node.folder.glob("sock*"))


def content_of(fd: int) -> bytes:
    """The bytes of an open file, from the daemon."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    return os.pread(fd, 1 << 20, 0)


@pytest.mark.long
def test_readers_do_not_notice_that_the_keeper_is_replaced(
    node: Node, bucket: Path, uri_of: UriOf, keepers: KeeperProcesses
) -> None:
    node.configure(cache_bytes_max=24 * MIB)
    first = keepers.start()
    first.wait_serving()
    with verified_reads(node, bucket, uri_of, 10):
        for count in (1, 2):
            time.sleep(0.3)
            second = keepers.start()
            second.wait_serving()
            first.wait_standing_by(second)
            assert first.end() == 0
            assert node.status()["restarts"] == count
            first = second


def test_takeover_keeps_pins_and_the_cache_and_shows_itself(
    node: Node, small: Path, uri_of: UriOf, keepers: KeeperProcesses
) -> None:
    first = keepers.start()
    first.wait_serving()
    path = node.here("attach", uri_of(small)).stdout.rstrip("\n")
    weights = Path(path, "layers/0/weights.bin").read_bytes()
    assert "taken over" not in node.here("status").stdout
    before = int(time.time())
    second = keepers.start()
    first.wait_standing_by(second)
    status = node.status()
    assert before <= status["taken_over_s"] <= time.time()
    assert status["host"] == os.uname().nodename
    assert [each["pinned"] for each in status["attachments"]] == [True]
    assert "\ntaken over   at " in node.here("status").stdout
    assert Path(path, "layers/0/weights.bin").read_bytes() == weights
    assert node.status()["fetched_bytes"] == 0
    assert "handing the mount over to ckptfs" in first.log()
    assert "took over the mount" in second.log()
    assert first.end() == 0
    assert Path(path, "config.json").read_text() == '{"layers": 1}'
    node.here("restart")  # the next program of this keeper hands the mount over, too
    node.expected_in_log.append("has asked for the next one")
    third = keepers.start()
    third.wait_serving()
    second.wait_standing_by(third)
    assert Path(path, "config.json").read_text() == '{"layers": 1}'


def test_takeover_keeps_passthrough_and_background_uploads(
    node: Node, bucket: Path, uri_of: UriOf, keepers: KeeperProcesses
) -> None:
    content = random.Random(1).randbytes(3 * MIB + 5)
    (bucket / "read").mkdir()
    (bucket / "read" / "a.bin").write_bytes(content)
    run = node.folder / "run"
    run.mkdir()
    (run / "b.bin").write_bytes(content)
    first = keepers.start()
    first.wait_serving()
    with ckptfs.Checkpoint(uri_of(bucket / "read")).as_directory() as path:
        assert Path(path, "a.bin").read_bytes() == content
        wait_until(lambda: attachments()[0]["cached"] == len(content))
        fd = os.open(f"{path}/a.bin", os.O_RDONLY)  # by passthrough, where the kernel has it
        words = "--background", "--limit-rate", "1M"
        node.here("upload", *words, str(run), uri_of(bucket / "run"))
        hold(node)  # the upload is not done before the takeover
        second = keepers.start()
        first.wait_standing_by(second)
        assert content_of(fd) == content[:MIB]
        os.close(fd)
    assert first.end() == 0
    node.here("uploads", "--wait")
    assert (bucket / "run" / "b.bin").read_bytes() == content
    wait_until(lambda: not list((node.cache_dir / "uploads").glob("*/files")))


def test_offer_ends_with_the_daemon_it_was_made_for(
    node: Node, small: Path, uri_of: UriOf, keepers: KeeperProcesses
) -> None:
    node.expected_in_log.append("was killed by signal 9: starting the next one")
    first = keepers.start()
    first.wait_serving()
    path = node.here("attach", uri_of(small)).stdout.rstrip("\n")
    offered = offer_at(f"{node.socket}.takeover")
    killed = node.status()["pid"]
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: node.status()["pid"] != killed)
    assert offered.ready() == "its daemon has been replaced"
    offered.refuse("it was told so")
    offered.close_fds()
    second = keepers.start()
    first.wait_standing_by(second)
    assert Path(path, "config.json").read_text() == '{"layers": 1}'


def test_signal_in_a_takeover_that_fails_ends_the_owner(
    node: Node, keepers: KeeperProcesses
) -> None:
    node.expected_in_log.append("has not taken the mount over: it was told so")
    owner = keepers.start()
    owner.wait_serving()
    offered = offer_at(f"{node.socket}.takeover")
    assert offered.ready() == ""
    owner.process.send_signal(signal.SIGTERM)  # the owner has no daemon now
    offered.refuse("it was told so")
    offered.close_fds()
    assert owner.process.wait(COMMAND_TIMEOUT_S) == 0
    assert not is_mounted(node)


def test_new_keeper_uses_its_own_configuration(
    node: Node, small: Path, uri_of: UriOf, keepers: KeeperProcesses
) -> None:
    node.configure(allow_other=False, attachments_max=1)
    keepers.start().wait_serving()
    path = node.here("attach", uri_of(small)).stdout.rstrip("\n")
    node.configure(allow_other=True, attachments_max=7)
    node.expected_in_log.append("the mount stays with allow_other = false until it ends")
    cache = node.folder / "cache-2"
    second = keepers.start(f"--cache-dir={cache}")
    second.wait_serving()
    assert node.status()["cache_dir"] == str(cache)
    assert Path(path, "config.json").read_text() == '{"layers": 1}'
    assert (cache / "objects").is_dir()
    for number in range(3):
        node.here("attach", uri_of(small) + f"&x={number}", check=False)
    assert [each["pinned"] for each in attachments()][:1] == [True]


def test_former_owner_gets_the_mount_back_if_its_successor_is_ended(
    node: Node, small: Path, uri_of: UriOf, keepers: KeeperProcesses
) -> None:
    first = keepers.start()
    first.wait_serving()
    path = node.here("attach", uri_of(small)).stdout.rstrip("\n")
    fd = os.open(f"{path}/config.json", os.O_RDONLY)
    second = keepers.start()
    first.wait_standing_by(second)
    assert second.end() == 0
    assert content_of(fd) == b'{"layers": 1}'
    os.close(fd)
    first.wait_for("took over the mount")
    assert node.status()["restarts"] == 2


def test_former_owner_starts_a_new_mount_if_its_successor_is_killed(
    node: Node, small: Path, uri_of: UriOf, keepers: KeeperProcesses
) -> None:
    first = keepers.start()
    first.wait_serving()
    path = node.here("attach", uri_of(small)).stdout.rstrip("\n")
    fd = os.open(f"{path}/config.json", os.O_RDONLY)
    second = keepers.start()
    first.wait_standing_by(second)
    second.kill()
    first.wait_for("ckptfs._daemon.app: serving on ", 2)
    with pytest.raises(OSError, check=lambda error: error.errno in GONE):
        content_of(fd)
    os.close(fd)
    assert attachments() == []
    assert node.here("attach", uri_of(small)).stdout.rstrip("\n") == path
    assert Path(path, "config.json").read_text() == '{"layers": 1}'


# -- keepers that cannot take over


def test_container_that_has_owned_the_mount_waits(
    node: Node, small: Path, uri_of: UriOf, keepers: KeeperProcesses
) -> None:
    """A container of the old pod that is started again does not take the mount from the new pod."""
    if os.geteuid():
        pytest.skip("only root can name containers")

    def start(name: str) -> "KeeperProcess":
        ckptfs = str(Path(sys.executable).with_name("ckptfs"))
        script = 'hostname "$0"; exec "$@"'
        words = ("mount", "--foreground", "--take-over")
        return keepers.run(["unshare", "--uts", "sh", "-ec", script, name, ckptfs, *words])

    first = start("ckptfs-old")
    first.wait_serving()
    path = node.here("attach", uri_of(small)).stdout.rstrip("\n")
    second = start("ckptfs-new")
    first.wait_standing_by(second)
    assert "took over the mount" in second.log()
    assert "'ckptfs-old'" in second.log()
    assert node.status()["host"] == "ckptfs-new"
    first.kill()
    again = start("ckptfs-old")
    again.wait_standing_by(second, 2)
    assert node.status()["host"] == "ckptfs-new"
    assert second.end() == 0  # an update that is taken back: the old pod goes on
    assert Path(path, "config.json").read_text() == '{"layers": 1}'
    assert node.status()["host"] == "ckptfs-old"
    third = start("ckptfs-new")  # its container is started again, and is the old one now
    third.wait_standing_by(again)


def test_keeper_waits_for_one_that_does_not_hand_over(
    node: Node, keepers: KeeperProcesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.expected_in_log.append("it does not hand its mount over; waiting for its end")
    node.here("mount")
    second = keepers.start()
    second.wait_for("waiting for its end")
    assert is_mounted(node)
    node.here("umount")
    second.wait_serving()
    assert node.status()["taken_over_s"] == 0


def test_kernel_that_cannot_repeat_requests_keeps_the_owner(
    node: Node, small: Path, uri_of: UriOf, keepers: KeeperProcesses
) -> None:
    node.configure(restart=False)
    node.expected_in_log.append("restart = false in the configuration; waiting for its end")
    first = keepers.start()
    first.wait_serving()
    path = node.here("attach", uri_of(small)).stdout.rstrip("\n")
    second = keepers.start()
    second.wait_for("waiting for its end")
    assert Path(path, "config.json").read_text() == '{"layers": 1}'
    assert first.end() == 0
    second.wait_serving()
    assert attachments() == []


OTHER_RELEASE = """
import struct, sys
import msgspec
from ckptfs._keeper import keeper, mount_state
from ckptfs._mount import handoff
from ckptfs._os import claimants, takeover

change = sys.argv.pop(1)
offer = mount_state.Held.offer

def changed(self, device):
    found = msgspec.to_builtins(offer(self, device))
    if change == "unknown":
        return {**found, "colour": "red"}
    del found["resend"]
    return found

if change == "layout":
    handoff.has_this_layout = lambda fds: False
elif change == "protocol":
    takeover.claim = lambda path, wanted, claim=takeover.claim: claim(
        path, msgspec.structs.replace(wanted, protocol=2)
    )
elif change == "message":
    class Offer(msgspec.Struct, tag="offer-2"):
        state: msgspec.Raw
        fds: list[str]
    claimants.Offer = Offer
else:
    mount_state.Held.offer = changed
keeper.main()
"""
"""A keeper whose state or messages are those of another release."""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("unknown", ""),
        ("missing", "its state is unknown: Object missing required field `resend`"),
        ("layout", "the state of its daemon has the layout of another ckptfs version"),
        ("protocol", "it has version 1 of the protocol, and not 2"),
        ("message", "its message is of another version"),
    ],
)
def test_keepers_of_two_releases(
    node: Node, small: Path, uri_of: UriOf, keepers: KeeperProcesses, change: str, reason: str
) -> None:
    """One of both is of another release, as in each update."""
    node.expected_in_log.append(reason or "-")
    other = [sys.executable, "-c", OTHER_RELEASE, change, "--take-over"]
    is_claimant = change in ("layout", "protocol")
    first = keepers.start() if is_claimant else keepers.run(other)
    first.wait_serving()
    path = node.here("attach", uri_of(small)).stdout.rstrip("\n")
    fd = os.open(f"{path}/config.json", os.O_RDONLY)
    second = keepers.run(other) if is_claimant else keepers.start()
    if reason:
        second.wait_for(f"{reason}")
        assert "waiting for its end" in second.log()
        assert content_of(fd) == b'{"layers": 1}'
        os.close(fd)
    else:
        second.wait_serving()
        assert content_of(fd) == b'{"layers": 1}'
        os.close(fd)
        first.wait_standing_by(second)
    assert first.end() == 0
    second.wait_serving()
    assert Path(node.here("attach", uri_of(small)).stdout.rstrip("\n"), "config.json").exists()


def test_daemon_that_does_not_come_up_leaves_the_mount_to_the_owner(
    node: Node, small: Path, uri_of: UriOf, keepers: KeeperProcesses
) -> None:
    code = (
        "from ckptfs._keeper import daemon_process, keeper\n"
        "def fail(self, *_):\n"
        "    raise daemon_process.DaemonError('no daemon today')\n"
        "daemon_process.DaemonProcess.activate = fail\n"
        "keeper.main()\n"
    )
    node.expected_in_log.append("no daemon today")
    first = keepers.start()
    first.wait_serving()
    path = node.here("attach", uri_of(small)).stdout.rstrip("\n")
    fd = os.open(f"{path}/config.json", os.O_RDONLY)
    second = keepers.run([sys.executable, "-c", code, "--take-over"])
    assert second.process.wait(COMMAND_TIMEOUT_S) == 1
    assert second.log() == "ckptfs: error: no daemon today\n"
    assert content_of(fd) == b'{"layers": 1}'
    os.close(fd)
    assert node.status()["restarts"] == 1


def test_a_process_of_another_user_learns_nothing(node: Node, keepers: KeeperProcesses) -> None:
    if os.geteuid():
        pytest.skip("only root can become another user")
    node.folder.chmod(0o755)
    first = keepers.start()
    first.wait_serving()
    path = Path(f"{node.socket}.takeover")
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o666)
    code = (
        "import os, sys\n"
        "from ckptfs._os import takeover\n"
        "os.chdir(sys.argv[1])\n"
        "os.setresgid(1234, 1234, 1234); os.setresuid(1234, 1234, 1234)\n"
        "takeover.why_not_peer = lambda _: ''\n"
        "print(takeover.claim(sys.argv[2], takeover.Claim('x', '0', False)))\n"
    )
    with node.python(code, str(path.parent), path.name) as process:
        answer = hear(process)
    assert "it belongs to uid 1234, and this process to uid 0" in answer
    assert "lasting=True" in answer
    first.wait_for("may not take over: it belongs to uid 1234")


# -- kills


def outcome(fd: int) -> str:
    """Whether the mount of an open file goes on: "same" or "new"."""
    try:
        found = content_of(fd)
    except OSError as error:
        return "new" if error.errno in GONE else str(error)
    finally:
        os.close(fd)
    return "same" if found == b'{"layers": 1}' else repr(found)


def outcome_of_kill(
    node: Node, uri: str, keepers: KeeperProcesses, killed: str, moment: int
) -> str:
    """Take over, with a keeper that is killed at that moment. Returns what `outcome` does; "" if
    the takeover has no such moment."""
    armed = node.folder / "armed"
    is_owner = killed == "owner"
    first = keepers.start_killed_at(moment, armed) if is_owner else keepers.start()
    first.wait_serving()
    path = node.here("attach", uri).stdout.rstrip("\n")
    fd = os.open(f"{path}/config.json", os.O_RDONLY)
    armed.touch()
    second = keepers.start() if is_owner else keepers.start_killed_at(moment, armed)
    victim, survivor = (first, second) if is_owner else (second, first)
    wait_until(lambda: victim.process.poll() is not None or "waits for" in second.log())
    armed.unlink()
    wait_until(lambda: node.here("status", "--json", check=False).returncode == 0)
    found = outcome(fd)
    assert Path(node.here("attach", uri).stdout.rstrip("\n"), "config.json").exists()
    assert [line.path for line in mount_table()].count(str(node.mount)) == 1
    was_killed = victim.process.poll() == -signal.SIGKILL
    survivor.end()
    victim.end()
    wait_until(lambda: has_ended(node))
    assert not is_mounted(node)
    return found if was_killed else ""


@pytest.mark.long
@pytest.mark.parametrize("killed", ["claimant", "owner"])
def test_keeper_that_is_killed_at_any_moment_of_a_takeover(
    node: Node, small: Path, uri_of: UriOf, keepers: KeeperProcesses, killed: str
) -> None:
    """One of the two serves in the end. It continues the mount, except if the killed keeper alone
    had the descriptors."""
    node.configure(passthrough=False)  # the kernel would read from the cache without a mount
    node.expected_in_log += ["has not taken the mount over: it has died"]
    outcomes: list[str] = []
    while found := outcome_of_kill(node, uri_of(small), keepers, killed, len(outcomes) + 1):
        outcomes.append(found)
    print(killed, outcomes)
    if killed == "claimant":
        # In the last moments this keeper alone is the owner.
        assert outcomes == ["same"] * 13 + ["new"] * (len(outcomes) - 13)
        assert len(outcomes) > 13
    else:
        assert outcomes == ["new"] * 3 + ["same"] * (len(outcomes) - 3)
        assert len(outcomes) > 10


# -- other users

NOBODY = 65534
AS_NOBODY = (
    *("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"),
    # The interpreter may lie where only root can read.
    *("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"),
)


@pytest.fixture
def as_nobody(node: Node) -> Iterator[tuple[str, ...]]:
    """The beginning of a command of a user without root, where every user may open /dev/fuse."""
    if os.geteuid():
        pytest.skip("only root can become another user")
    let_others_in(node.folder)
    os.chown(node.folder, NOBODY, NOBODY)
    device = node.folder / "fuse"
    script = f"mknod -m 666 {device} c 10 229; mount --bind {device} /dev/fuse; echo; cat"
    with subprocess.Popen(
        [*OWN_MOUNTS, "sh", "-ec", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as world:
        assert hear(world) == ""
        yield ("nsenter", f"--target={world.pid}", "--mount", *AS_NOBODY)
        world.communicate(timeout=COMMAND_TIMEOUT_S)


def test_takeover_of_a_mount_of_fusermount(
    node: Node,
    small: Path,
    uri_of: UriOf,
    as_nobody: tuple[str, ...],
    keepers: KeeperProcesses,
) -> None:
    """A user without root takes over the own mount, and ends it by fusermount3."""

    def in_world(*command: str) -> str:
        return node.run(*as_nobody, *command).stdout.rstrip("\n")

    ckptfs = str(Path(sys.executable).with_name("ckptfs"))
    command = [*as_nobody, ckptfs, "mount", "--foreground", "--take-over"]
    first = keepers.run(command)
    first.wait_serving()
    path = in_world(ckptfs, "attach", uri_of(small))
    second = keepers.run(command)
    first.wait_standing_by(second)
    assert in_world("cat", f"{path}/config.json") == '{"layers": 1}'
    assert first.end() == 0
    assert in_world("cat", f"{path}/config.json") == '{"layers": 1}'
    root = keepers.start()  # root is another user
    node.expected_in_log.append("it belongs to uid 65534, and this process to uid 0")
    root.wait_for("waiting for its end")
    assert root.end() == 0
    assert second.end() == 0
    assert str(node.mount) not in in_world("cat", "/proc/self/mountinfo")


def test_takeover_needs_the_foreground(node: Node) -> None:
    refused = node.here("mount", "--take-over", check=False)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "--take-over is for a mount in the foreground; add --foreground" in refused.stderr
    assert has_ended(node)
