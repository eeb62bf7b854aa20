"""A CSI driver takes over from another one, with a gRPC client as the kubelet."""

import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import COMMAND_TIMEOUT_S, Node, wait_until
from mount.test_csi import check_nothing_left
from support.kubelet import DriverProcess, Kubelet, volumes_at
from support.takingover import KILLED_AT

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can bind mounts"),
]
SERVING = "ckptfs._csi.server: serving on "
WAITS = "waits for the end of this process"


@pytest.fixture
def volume(attributes: dict[str, str], keys: dict[str, str]) -> dict[str, dict[str, str]]:
    """The attributes and the Secret of a volume with the checkpoint `small`."""
    return {"attributes": attributes, "secrets": keys}


def new_driver(node: Node, kubelet: Kubelet) -> DriverProcess:
    return DriverProcess(node, kubelet, "--take-over")


def wait_for(driver: DriverProcess, text: str, count: int) -> None:
    """Wait until the drivers' log has a text so often."""
    wait_until(lambda: driver.log().count(text) == count)


def test_driver_takes_over_from_a_running_one(
    node: Node, kubelet: Kubelet, volume: dict[str, dict[str, str]]
) -> None:
    with new_driver(node, kubelet) as first:
        target = kubelet.publish("a", **volume)
        with new_driver(node, kubelet) as second:
            wait_for(second, SERVING, 2)
            wait_for(first, WAITS, 1)
            assert "handing over to ckptfs" in first.log()
            assert Path(target, "config.json").read_text() == '{"layers": 1}'
            kubelet.publish("a", **volume)  # by the second driver
            assert len(volumes_at(kubelet)) == 1
            kubelet.publish("b", **volume)
        wait_for(first, SERVING, 3)  # the former driver serves again
        assert not kubelet.stats("b").volume_condition.abnormal
        for pod in ("a", "b"):
            kubelet.unpublish(pod)
        check_nothing_left(node, kubelet, first)
    assert sorted(os.listdir(first.state)) == []


@contextlib.contextmanager
def waiting_publish(
    kubelet: Kubelet, driver: DriverProcess, volume: dict[str, dict[str, str]], timeout_s: float
) -> Iterator[Future[tuple[str, str]]]:
    """A publish of the pod "b" that waits for a silent store, and its refusal."""
    known = len(list(driver.state.glob("*.json")))
    with socket.create_server(("127.0.0.1", 0)) as silent, ThreadPoolExecutor(1) as threads:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        attributes = volume["attributes"] | {"endpoint": endpoint}
        request = kubelet.request("b", attributes, secrets=volume["secrets"])
        refused = threads.submit(
            kubelet.refusal, "NodePublishVolume", timeout_s=timeout_s, **request
        )
        wait_until(lambda: len(list(driver.state.glob("*.json"))) == known + 1)
        yield refused


def test_call_that_runs_during_a_takeover_is_finished_or_repeated(
    node: Node, kubelet: Kubelet, volume: dict[str, dict[str, str]]
) -> None:
    """The first driver hands over when a call that waits for a store has ended."""
    with (
        new_driver(node, kubelet) as first,
        waiting_publish(kubelet, first, volume, timeout_s=15) as refused,
        new_driver(node, kubelet) as second,
    ):
        wait_for(second, SERVING, 2)
        assert refused.result()[0] in ("UNAVAILABLE", "CANCELLED", "DEADLINE_EXCEEDED")
        wait_for(first, WAITS, 1)
        kubelet.publish("b", **volume)
        kubelet.unpublish("b")
        check_nothing_left(node, kubelet, second)


@pytest.mark.long
def test_driver_serves_on_while_a_call_does_not_end(
    node: Node, kubelet: Kubelet, volume: dict[str, dict[str, str]]
) -> None:
    """The call waits for a store, for longer than a handover waits for it."""
    node.configure(allow_other=True, attach_deadline_s=45.0, store_timeout_s=40.0)
    node.here("reload")
    node.expected_in_log += ["store", "attach"]
    with new_driver(node, kubelet) as first:
        target = kubelet.publish("a", **volume)
        with (
            waiting_publish(kubelet, first, volume, timeout_s=100) as refused,
            new_driver(node, kubelet) as second,
        ):
            wait_until(lambda: "calls are still running" in first.log(), timeout_s=90)
            assert Path(target, "config.json").read_text() == '{"layers": 1}'
            wait_until(lambda: refused.done(), timeout_s=60)
            wait_for(first, WAITS, 1)  # the second driver has asked again
            kubelet.publish("a", **volume)
            kubelet.unpublish("a")
            kubelet.unpublish("b")
            check_nothing_left(node, kubelet, second)


def start_killed_at(
    node: Node, kubelet: Kubelet, moment: int, armed: Path
) -> "subprocess.Popen[bytes]":
    code = KILLED_AT.replace("keeper.main()", "from ckptfs.__main__ import main; main()")
    words = ["csi", "--take-over", "--endpoint", f"unix://{kubelet.socket}", "--node-id", "node-1"]
    with (node.folder / "killed.log").open("ab") as log_file:
        return subprocess.Popen(
            [
                *(sys.executable, "-c", code, str(moment), str(armed), *words),
                *("--state-dir", str(node.folder / "csi")),
            ],
            stderr=log_file,
            cwd="/",
        )


def is_killed_at(
    node: Node, kubelet: Kubelet, volume: dict[str, dict[str, str]], killed: str, moment: int
) -> bool:
    """Take over, with a driver that is killed at that moment. Returns whether it was."""
    armed = node.folder / "armed"
    log = node.folder / "killed.log"
    log.write_text("")
    other = new_driver(node, kubelet)
    is_owner = killed == "owner"
    start_victim = functools.partial(start_killed_at, node, kubelet, moment, armed)
    victim = start_victim() if is_owner else None
    if victim is None:
        other.start()
    else:
        wait_until(lambda: SERVING in log.read_text())
    target = kubelet.publish("a", **volume)
    armed.touch()
    before = other.log().count(WAITS) if (node.folder / "csi.log").exists() else 0
    if victim is None:
        victim = start_victim()
    else:
        other.start()

    def is_over() -> bool:
        waits = WAITS in log.read_text() or other.log().count(WAITS) > before
        return victim.poll() is not None or waits

    wait_until(is_over)
    armed.unlink()
    was_killed = victim.poll() == -signal.SIGKILL
    kubelet.publish("a", **volume)
    assert Path(target, "config.json").read_text() == '{"layers": 1}'
    kubelet.unpublish("a")
    victim.terminate()
    assert victim.wait(COMMAND_TIMEOUT_S) in (0, -signal.SIGKILL), log.read_text()
    assert other.end() == 0, other.log()
    check_nothing_left(node, kubelet, other)
    return was_killed


@pytest.mark.long
@pytest.mark.parametrize("killed", ["claimant", "owner"])
def test_driver_that_is_killed_at_any_moment_of_a_takeover(
    node: Node, kubelet: Kubelet, volume: dict[str, dict[str, str]], killed: str
) -> None:
    moment = 1
    while is_killed_at(node, kubelet, volume, killed, moment):
        moment += 1
    assert moment > 8
