"""The driver registers itself with a kubelet, whose plugin manager a test double plays."""

import contextlib
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import Node, wait_until
from mount.test_csi_takeover import SERVING, WAITS, wait_for
from support.kubelet import DriverProcess, Kubelet
from support.pluginmanager import PluginManager
from support.takingover import offer_at

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can bind mounts"),
]
NAME = "csi.ckptfs.dev"
REGISTERED, UNREGISTERED = ("registered", NAME), ("unregistered", NAME)


def registry(node: Node) -> Path:
    """The kubelet's plugins_registry. A socket's path has 107 bytes at most."""
    return node.folder / "reg"


@pytest.fixture
def manager(node: Node, kubelet: Kubelet) -> Iterator[PluginManager]:
    registry(node).mkdir()
    with PluginManager(registry(node)) as manager:
        yield manager


def new_driver(node: Node, kubelet: Kubelet, *flags: str) -> DriverProcess:
    registration = ("--registration-dir", str(registry(node)))
    endpoint = ("--kubelet-endpoint", str(kubelet.socket))
    return DriverProcess(node, kubelet, *registration, *endpoint, *flags)


def wait_registered(kubelet: Kubelet, manager: PluginManager) -> None:
    wait_until(lambda: manager.drivers == {NAME: str(kubelet.socket)})


def test_driver_registers_and_unregisters_itself(
    node: Node, kubelet: Kubelet, manager: PluginManager
) -> None:
    with new_driver(node, kubelet) as driver:
        wait_registered(kubelet, manager)
        wait_for(driver, f"the kubelet has registered {NAME}", 1)
    wait_until(lambda: manager.history == [REGISTERED, UNREGISTERED])
    assert not os.listdir(manager.folder)


def test_signal_in_a_takeover_that_fails_unregisters_the_driver(
    node: Node, kubelet: Kubelet, manager: PluginManager
) -> None:
    with new_driver(node, kubelet, "--take-over") as driver:
        wait_registered(kubelet, manager)
        offered = offer_at(str(driver.state / "takeover"))
        assert offered.ready() == ""
        with ThreadPoolExecutor(1) as ending:
            ended = ending.submit(driver.end)
            wait_until(lambda: not kubelet.socket.exists())
            offered.refuse("it was told so")
            offered.close_fds()
            assert ended.result() == 0
    assert not os.listdir(manager.folder)


def test_driver_stays_registered_during_a_surge_and_a_rollback(
    node: Node, kubelet: Kubelet, manager: PluginManager
) -> None:
    with new_driver(node, kubelet, "--take-over") as first:
        wait_registered(kubelet, manager)
        with new_driver(node, kubelet, "--take-over") as second:
            wait_for(first, SERVING, 2)
            wait_for(first, WAITS, 1)
            kubelet.call("NodeGetInfo")
            assert second.end() == 0  # a rollback: the first one serves again
            wait_for(first, SERVING, 3)
            kubelet.call("NodeGetInfo")
        with new_driver(node, kubelet, "--take-over") as third:
            wait_for(third, SERVING, 4)
            wait_for(third, WAITS, 2)
            assert first.end() == 0  # the end of an update
            kubelet.call("NodeGetInfo")
            assert manager.history == [REGISTERED]
    wait_until(lambda: manager.history == [REGISTERED, UNREGISTERED])


@pytest.mark.parametrize("killed", ["old", "new"])
def test_driver_that_is_killed_in_an_update_leaves_the_registration(
    node: Node, kubelet: Kubelet, manager: PluginManager, killed: str
) -> None:
    first, second = (new_driver(node, kubelet, "--take-over") for _ in range(2))
    with contextlib.ExitStack() as ends:
        ends.callback(first.end)
        first.start()
        wait_registered(kubelet, manager)
        ends.callback(second.end)
        second.start()
        wait_for(first, WAITS, 1)
        victim, other = (first, second) if killed == "old" else (second, first)
        victim.kill(is_alone=False)
        if killed == "new":
            wait_for(other, SERVING, 3)
        kubelet.call("NodeGetInfo")
        assert manager.history == [REGISTERED]
        assert other.end() == 0, other.log()
        wait_until(lambda: manager.history == [REGISTERED, UNREGISTERED])


def test_driver_that_was_killed_registers_anew(
    node: Node, kubelet: Kubelet, manager: PluginManager
) -> None:
    with new_driver(node, kubelet) as driver:
        wait_registered(kubelet, manager)
        driver.kill()
        driver.start()
        wait_until(lambda: manager.history == [REGISTERED, UNREGISTERED, REGISTERED])


def test_driver_is_registered_after_a_restart_of_the_kubelet(
    node: Node, kubelet: Kubelet, manager: PluginManager
) -> None:
    with new_driver(node, kubelet) as driver:
        wait_registered(kubelet, manager)
        manager.restart()
        wait_registered(kubelet, manager)
        for name in os.listdir(manager.folder):  # as kubelets of old did at their start
            Path(manager.folder, name).unlink()
        manager.restart()
        wait_registered(kubelet, manager)
        wait_for(driver, f"the kubelet has registered {NAME}", 3)


def test_driver_tries_again_after_a_refusal(
    node: Node, kubelet: Kubelet, manager: PluginManager
) -> None:
    manager.refusal = "cannot update the CSINode"
    with new_driver(node, kubelet) as driver:
        wait_for(driver, f"does not register {NAME}: cannot update the CSINode; trying", 1)
        manager.refusal = ""
        wait_registered(kubelet, manager)
        kubelet.call("NodeGetInfo")


def test_probe_says_whether_the_driver_can_serve(node: Node, kubelet: Kubelet) -> None:
    endpoint = f"unix://{kubelet.socket}"
    with DriverProcess(node, kubelet):
        node.cli("csi", "--probe", "--endpoint", endpoint)
        node.cli("csi", "--probe", "--take-over", "--endpoint", endpoint)
        command = Path(sys.executable).with_name("ckptfs")
        other = f'hostname other; exec {command} csi --probe --endpoint {endpoint} "$@"'
        in_pod = ("unshare", "--uts", "sh", "-ec", other, "sh")
        node.run(*in_pod)
        done = node.run(*in_pod, "--take-over", check=False)
        assert done.returncode == 1
        assert f"the driver of {os.uname().nodename!r} serves at" in done.stderr
        node.end()
        done = node.cli("csi", "--probe", "--endpoint", endpoint, check=False)
        assert done.returncode == 1
        assert "cannot serve" in done.stderr
    done = node.cli("csi", "--probe", "--endpoint", endpoint, check=False)
    assert done.returncode == 1


def test_registration_needs_both_flags_and_a_directory(node: Node, kubelet: Kubelet) -> None:
    command = ("csi", "--endpoint", f"unix://{kubelet.socket}")
    missing = str(kubelet.folder / "missing")
    done = node.cli(*command, "--registration-dir", missing, check=False)
    assert "--registration-dir and --kubelet-endpoint need each other" in done.stderr
    both = ("--registration-dir", missing, "--kubelet-endpoint", str(kubelet.socket))
    done = node.cli(*command, *both, check=False)
    assert done.returncode == 1
    assert f"{missing}: No such file or directory; give" in done.stderr
    assert not kubelet.socket.exists()
