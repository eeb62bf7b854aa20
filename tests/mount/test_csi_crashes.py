"""A CSI driver that is killed between any two steps of a call leaves nothing that the next driver
and the kubelet's retry do not put right. The steps run in this process, and each kill is an
exception that no step handles."""

import contextlib
import functools
import os
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Node, wait_until
from support.s3server import S3Server

from ckptfs._client import client
from ckptfs._csi import bind_mounts, publishing, records
from ckptfs._csi.identity import Wanted, wanted
from ckptfs._csi.publication import Pod, Publication
from ckptfs._csi.publishing import Publishing
from ckptfs._csi.records import Record, Records
from ckptfs._os.mountinfo import mount_table

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can bind mounts"),
]
CALL_S = 60.0
STEPS: list[tuple[Any, str]] = [
    (Records, "put"),
    (Records, "remove"),
    (publishing, "_pin"),
    (publishing, "_detach"),
    (bind_mounts, "_mount"),
    (bind_mounts, "unmount"),
    (os, "mkdir"),
    (os, "rmdir"),
]
"""The steps of a call besides the attach."""


class Killed(BaseException):
    """The driver was killed."""


class Killer:
    """Kills the driver before or after a step. `at` counts these moments; 0 for no kill."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.at = 0
        for owner, name in STEPS:
            monkeypatch.setattr(owner, name, self._wrapped(getattr(owner, name)))
        attached = client.attached

        @contextlib.contextmanager
        def attached_in_steps(*args: Any, **more: Any) -> Generator[Any]:
            self._moment()
            with attached(*args, **more) as found:
                self._moment()
                yield found

        monkeypatch.setattr(client, "attached", attached_in_steps)

    def _wrapped(self, step: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(step)
        def run(*args: Any, **more: Any) -> Any:
            self._moment()
            result = step(*args, **more)
            self._moment()
            return result

        return run

    def _moment(self) -> None:
        self.at -= 1
        if self.at == 0:
            raise Killed

    def kills(self, call: Callable[[], object], at: int) -> bool:
        """Run a call that is killed at that moment. Returns whether it had as many."""
        self.at = at
        try:
            call()
        except Killed:
            return True
        finally:
            self.at = 0
        return False


@pytest.fixture
def asked(node: Node, s3: S3Server, small: Path) -> Iterator[Wanted]:
    """A publish of the checkpoint `small`, at a daemon that serves all users."""
    node.configure(allow_other=True, linger_s=0.05)
    node.here("mount")
    target = str(node.folder / "pods" / "vol" / "mount")
    attributes = {"uri": f"s3://{small.relative_to(s3.root)}", "endpoint": f"http://{s3.endpoint}"}
    publication = Publication("v", target, attributes, Pod("team", "pod", "account"))
    keys = {"aws_access_key_id": s3.access_key, "aws_secret_access_key": s3.secret_key}
    yield wanted(publication, attributes, keys, [])
    while bind_mounts.at(target) is not None:  # of a test that has failed
        bind_mounts.unmount(target)


@pytest.fixture
def found(tmp_path: Path) -> Iterator[Records]:
    with records.opened(tmp_path / "state") as found:
        yield found


def publish(driver: Publishing, asked: Wanted) -> None:
    driver.publish(asked, time.monotonic() + CALL_S)


def unpublish(driver: Publishing, asked: Wanted) -> None:
    driver.unpublish(asked.publication.volume_id, asked.publication.target)


def check_shown(asked: Wanted) -> None:
    target = asked.publication.target
    assert Path(target, "config.json").read_text()
    assert [line.path for line in mount_table()].count(target) == 1


def check_nothing_left(node: Node, found: Records, asked: Wanted) -> None:
    target = asked.publication.target
    assert target not in [line.path for line in mount_table()]
    assert not os.path.lexists(target)
    assert found.all() == []
    wait_until(lambda: node.status()["attachments"] == [])


def test_a_driver_that_is_killed_at_any_moment(
    node: Node, found: Records, asked: Wanted, monkeypatch: pytest.MonkeyPatch
) -> None:
    killer = Killer(monkeypatch)
    moments: dict[str, int] = {}
    for call, published in (("publish", False), ("renew", True), ("unpublish", True)):
        for tries_again in (True, False):
            at = 1
            while True:
                driver = Publishing(found)
                if published:
                    publish(driver, asked)
                run = unpublish if call == "unpublish" else publish
                if not killer.kills(functools.partial(run, driver, asked), at):
                    break
                driver = Publishing(found)
                driver.reconcile()
                if [record.state for record in found.all()] == ["published"]:
                    check_shown(asked)
                else:
                    assert call != "renew"
                    check_nothing_left(node, found, asked)
                if tries_again:  # the kubelet tries the same call again; or the pod is deleted
                    run(driver, asked)
                    if run is publish:
                        check_shown(asked)
                unpublish(driver, asked)
                check_nothing_left(node, found, asked)
                at += 1
            moments[call] = at - 1
            unpublish(driver, asked)
            check_nothing_left(node, found, asked)
    assert moments["publish"] > 12
    assert moments["renew"] > 3
    assert moments["unpublish"] > 8


def test_a_step_that_fails_is_undone(
    node: Node, found: Records, asked: Wanted, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Publishing(found)
    for owner, name in ((bind_mounts, "_mount"), (publishing, "_pin"), (os, "mkdir")):
        step = getattr(owner, name)

        def fail(*_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(owner, name, fail)
            with pytest.raises(OSError, match="No space left"):
                publish(driver, asked)
        assert getattr(owner, name) is step
        check_nothing_left(node, found, asked)
    # The disk of the records is full from the second record on.
    put = Records.put
    with monkeypatch.context() as patched:

        def fail_later(self: Records, record: Record) -> None:
            if record.state != "publishing":
                raise OSError(28, "No space left on device")
            put(self, record)

        patched.setattr(Records, "put", fail_later)
        with pytest.raises(OSError, match="No space left"):
            publish(driver, asked)
        check_nothing_left(node, found, asked)
    publish(driver, asked)
    check_shown(asked)
    unpublish(driver, asked)
    check_nothing_left(node, found, asked)


def test_volumes_without_records_are_detached_unless_a_pod_has_them(
    node: Node, found: Records, asked: Wanted
) -> None:
    driver = Publishing(found)
    publish(driver, asked)
    found.remove(asked.publication.key)
    driver.reconcile()
    check_shown(asked)
    bind_mounts.unmount(asked.publication.target)
    driver.reconcile()
    assert node.status()["attachments"] == []
    unpublish(driver, asked)
    check_nothing_left(node, found, asked)


def test_a_publication_whose_pod_is_gone_is_ended(
    node: Node, found: Records, asked: Wanted
) -> None:
    publish(Publishing(found), asked)
    target = asked.publication.target
    bind_mounts.unmount(target)
    os.rmdir(target)  # a node that was started again, and cleaned up
    Publishing(found).reconcile()
    check_nothing_left(node, found, asked)


def test_a_target_that_something_else_is_mounted_on_is_refused(
    node: Node, found: Records, asked: Wanted
) -> None:
    driver = Publishing(found)
    target = Path(asked.publication.target)
    target.mkdir(parents=True)
    node.run("mount", "-t", "tmpfs", "tmpfs", str(target))
    try:
        for call in (publish, unpublish):
            with pytest.raises(publishing.Refusal, match="is a mount of tmpfs") as caught:
                call(driver, asked)
            assert caught.value.status == "FAILED_PRECONDITION"
    finally:
        node.run("umount", str(target))
    unpublish(driver, asked)
    check_nothing_left(node, found, asked)
