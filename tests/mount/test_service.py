"""The keeper as a service: what it tells the service manager, and what that keeps for it."""

import errno
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import COMMAND_TIMEOUT_S, Node, wait_until
from mount.test_lifecycle import attachments, daemons, has_ended, is_mounted
from mount.test_restart import verified_reads
from support.servicemanager import ServiceManager, managing

import ckptfs

pytestmark = pytest.mark.mount

UriOf = Callable[[Path], str]
MIB = 1 << 20
KEPT = {"fuse", "held", "listen", "lock", "log0", "log1", "table"}


@pytest.fixture
def manager(node: Node) -> Iterator[ServiceManager]:
    command = [str(Path(sys.executable).with_name("ckptfs")), "mount", "--foreground"]
    folder = node.folder / "manager"
    folder.mkdir()
    with managing(folder, command) as manager:
        yield manager
        if manager.process is not None and manager.process.poll() is None:
            assert manager.stop() == 0
        log = manager.log()
    node.check_log(log)
    assert has_ended(node)


def start(manager: ServiceManager) -> None:
    """Start the service, and wait until it is ready."""
    before = ready(manager)
    manager.start()
    wait_until(lambda: ready(manager) > before)


def ready(manager: ServiceManager) -> int:
    return sum(said.startswith("READY=1\n") for said in manager.said)


def test_the_service_says_that_it_serves_and_ends(node: Node, manager: ServiceManager) -> None:
    start(manager)
    assert manager.said[-1] == f"READY=1\nSTATUS=serving on {node.mount}"
    assert manager.store.keys() == KEPT
    wait_until(lambda: manager.beats >= 2)
    assert manager.stop() == 0
    dropped = {said for said in manager.said if said.startswith("FDSTOREREMOVE=1\n")}
    assert dropped == {f"FDSTOREREMOVE=1\nFDNAME={name}" for name in KEPT}
    assert "STOPPING=1" in manager.said
    assert not is_mounted(node)
    assert sorted(os.listdir(node.folder)) == ["cache", "ckptfs.toml", "manager"]


def test_the_watchdog_hears_nothing_while_the_daemon_is_stuck(
    node: Node, manager: ServiceManager
) -> None:
    node.expected_in_log.append("was stuck: starting the next one")
    start(manager)
    wait_until(lambda: manager.beats)
    [stuck] = daemons(node)
    os.kill(stuck, signal.SIGSTOP)
    before = manager.beats
    wait_until(lambda: "STATUS=the daemon was stuck: starting the next one" in manager.said)
    assert manager.beats - before <= 1  # it may have beaten since the last look
    wait_until(lambda: ready(manager) == 2)
    wait_until(lambda: manager.beats - before > 1)


@pytest.mark.parametrize(
    "activated", [pytest.param(False, marks=pytest.mark.long), True], ids=["alone", "by-its-socket"]
)
def test_readers_do_not_notice_that_the_service_is_restarted_or_killed(
    node: Node, bucket: Path, uri_of: UriOf, manager: ServiceManager, activated: bool
) -> None:
    node.configure(cache_bytes_max=24 * MIB)
    if activated:
        manager.listen("control", node.socket)
    start(manager)
    with verified_reads(node, bucket, uri_of, 6):
        for how in ("restart", "kill"):
            time.sleep(0.3)
            if how == "restart":
                assert manager.stop("restart") == 0
            else:
                manager.kill()
            wait_until(lambda: has_ended(node))
            assert manager.store.keys() == KEPT - ({"listen"} if activated else set())
            start(manager)
        assert node.status()["restarts"] == 2


def test_service_asks_for_the_job_of_its_own_unit(node: Node, manager: ServiceManager) -> None:
    start(manager)
    assert manager.stop("restart") == 0
    unit = Path("/proc/self/cgroup").read_text().rstrip("\n").rpartition("/")[2]
    asked = (manager.folder / "asked").read_text()
    assert asked == f"list-jobs --plain --no-legend --no-pager -- {unit}\n"
    assert is_mounted(node)
    start(manager)


def test_a_program_that_is_replaced_still_is_the_service(
    node: Node, small: Path, uri_of: UriOf, manager: ServiceManager
) -> None:
    node.expected_in_log.append("has asked for the next one: starting the next one")
    start(manager)
    with ckptfs.Checkpoint(uri_of(small)).as_directory() as path:
        node.here("restart")
        wait_until(lambda: ready(manager) == 2)
        before = manager.beats
        wait_until(lambda: manager.beats > before)
        assert manager.stop("restart") == 0
        start(manager)
        assert Path(path, "config.json").read_text() == '{"layers": 1}'
        assert node.status()["restarts"] == 2


def test_a_service_that_is_stopped_ends_its_readers(
    node: Node, small: Path, uri_of: UriOf, manager: ServiceManager
) -> None:
    start(manager)
    path = node.here("attach", uri_of(small)).stdout.rstrip("\n")
    held = os.open(path, os.O_RDONLY)
    assert manager.stop() == 0
    gone = (errno.ENOTCONN, errno.ECONNABORTED)
    with pytest.raises(OSError, check=lambda error: error.errno in gone):
        os.listdir(held)
    os.close(held)
    assert not is_mounted(node)
    start(manager)
    assert attachments() == []


@pytest.mark.parametrize("lost", ["table", "held"])
def test_service_without_a_kept_descriptor_starts_anew(
    node: Node, small: Path, uri_of: UriOf, manager: ServiceManager, lost: str
) -> None:
    start(manager)
    path = node.here("attach", uri_of(small)).stdout.rstrip("\n")
    manager.kill()
    wait_until(lambda: has_ended(node))
    os.close(manager.store.pop(lost))
    start(manager)
    assert manager.store.keys() == KEPT
    assert attachments() == []
    assert not os.path.exists(path)
    assert node.here("attach", uri_of(small)).stdout.rstrip("\n") == path


def test_a_mount_that_was_taken_away_meanwhile_starts_anew(
    node: Node, manager: ServiceManager
) -> None:
    start(manager)
    manager.kill()
    wait_until(lambda: has_ended(node))
    node.run("umount", "-l", str(node.mount))
    start(manager)
    assert is_mounted(node)
    assert attachments() == []


def test_a_mount_that_had_to_be_ended_is_a_failure_of_the_service(
    node: Node, manager: ServiceManager
) -> None:
    node.configure(restart=False)
    node.expected_in_log.append("because restart = false in the configuration")
    start(manager)
    assert manager.store == {}
    os.kill(daemons(node)[0], signal.SIGKILL)
    assert manager.process is not None
    assert manager.process.wait(COMMAND_TIMEOUT_S) == 1
    assert not is_mounted(node)


def test_where_no_daemon_may_follow_another_a_restart_is_a_new_mount(
    node: Node, manager: ServiceManager
) -> None:
    node.configure(restart=False)
    start(manager)
    assert manager.stop("restart") == 0
    assert not is_mounted(node)
    start(manager)
    assert is_mounted(node)


def test_a_socket_where_no_client_looks_is_refused(node: Node, manager: ServiceManager) -> None:
    elsewhere = node.folder / "elsewhere"
    manager.listen("control", elsewhere)
    node.expected_in_log.append("the service manager listens at")
    assert manager.start().wait(COMMAND_TIMEOUT_S) == 1
    assert f"listens at {elsewhere}, and the configuration says {node.socket}" in manager.log()
    assert not is_mounted(node)


def test_a_daemon_that_a_service_starts_on_demand_does_not_speak_for_it(
    node: Node, manager: ServiceManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", f"{manager.folder}/notify")
    node.here("mount")
    assert daemons(node)
    node.end()
    assert manager.said == []
