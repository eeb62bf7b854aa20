"""Fixtures of the contract suite: one server and one daemon for all tests of a store."""

import contextlib
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest
from conftest import Node, mounts, temporary
from support.serverbase import Missing
from support.stores.adapters import FAST, STORES
from support.stores.common import configure
from support.stores.realstore import RealStore


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Without ``--stores`` only the fast servers, and of tests that are marked for all servers, and
    take long, none but those with rclone."""
    if "store" not in metafunc.fixturenames:
        return
    if metafunc.config.getoption("stores"):
        names = list(STORES)
    elif metafunc.definition.get_closest_marker("all_servers"):
        names = ["rclone"]
    else:
        names = list(FAST)
    metafunc.parametrize("store", names, indirect=True, scope="package")


@pytest.fixture(autouse=True)
def _leaves_nothing() -> Iterator[None]:
    """As everywhere, but for the daemons, which some of these tests replace."""
    before = mounts(), temporary()
    yield
    left = [sorted(now - then) for now, then in zip((mounts(), temporary()), before, strict=True)]
    assert left == [[], []], f"left behind: mounts, temporary files: {left}"


_TIME_OF_LOG = "%Y-%m-%d %H:%M:%S"
SETTINGS = re.compile(r"^(AWS|AZURE|GOOGLE)_|_CA_BUNDLE$|^SSL_CERT_|_PROXY$", re.IGNORECASE)
"""Variables of the machine that would count for a store."""


@pytest.fixture(scope="package")
def store(request: pytest.FixtureRequest) -> Iterator[RealStore]:
    """The server; the test is skipped where this machine lacks it."""
    with contextlib.ExitStack() as stack:
        try:
            started = stack.enter_context(STORES[request.param]())
        except Missing as missing:
            pytest.skip(str(missing))
        yield started


@pytest.fixture(scope="package")
def daemon(store: RealStore) -> Iterator[Node]:
    """The node whose daemon the tests of a store share. The bucket is its named store `main`."""
    node = Node(Path(tempfile.mkdtemp(prefix="ckptfs-")))
    with pytest.MonkeyPatch.context() as patched:
        for name, value in {**node.environment, **store.environment}.items():
            patched.setenv(name, value)
        for name in [name for name in os.environ if SETTINGS.search(name)]:
            if name not in {**node.environment, **store.environment}:
                patched.delenv(name)
        configure(node, store)
        try:
            if store.has_mount:
                node.here("mount")
            yield node
        finally:
            node.end()
            shutil.rmtree(node.folder)


@pytest.fixture
def node(daemon: Node, store: RealStore) -> Iterator[Node]:
    """The node, as it is at first; a test may expect lines in its log."""
    earlier = list(daemon.expected_in_log)  # of all earlier tests
    daemon.expected_in_log.clear()
    began = f"{datetime.now():{_TIME_OF_LOG}}"
    if store.has_mount:
        daemon.here("mount")  # a test may have ended it
    said = len(daemon.log())
    yield daemon
    if store.proxy:
        store.break_down()
    configure(daemon, store)
    if daemon.socket.exists():
        daemon.here("reload")
    lines = daemon.log()[said:].splitlines()
    daemon.check_log("\n".join(line for line in lines if line >= began))
    daemon.expected_in_log += earlier  # the log holds some lines back, with their time
    daemon.check_log("\n".join(line for line in lines if line < began))


@pytest.fixture
def path(store: RealStore) -> str:
    """A directory of the test's own, in which nothing is."""
    if store.proxy:
        store.reset_traffic()
    return f"runs/{uuid.uuid4().hex[:12]}"
