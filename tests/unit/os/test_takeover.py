"""The owner of something, and the processes that want to take it over."""

import os
import resource
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptfs._os import takeover
from ckptfs._os.claimants import Claimants
from ckptfs._os.takeover import Claim, Offered, Refused


@pytest.fixture
def path() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="ckptfs-") as folder:  # short enough for a socket
        yield f"{folder}/takeover"


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def owner(path: str, said: list[str]) -> Iterator[Claimants]:
    claimants = Claimants(path, ["old"], lambda: ({"color": "red"}, {"one": 0}), said.append)
    yield claimants
    claimants.close(is_owner=True)
    assert not Path(path).exists()


class Claiming:
    """A claim in a thread of its own.

    Attributes:
        found: The answer.
    """

    def __init__(self, path: str, name: str = "new", *, waits: bool = False) -> None:
        self.found: Offered | Refused | None = None
        self._arguments = path, Claim(name, "1", waits)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        self.found = takeover.claim(*self._arguments)

    def offered(self, owner: Claimants) -> Offered:
        """The offer."""
        while self._thread.is_alive():
            assert owner.wait(0.01) is None
        assert isinstance(self.found, Offered)
        return self.found

    def refused(self, owner: Claimants) -> Refused:
        """The refusal."""
        while self._thread.is_alive():
            assert owner.wait(0.01) is None
        assert isinstance(self.found, Refused)
        return self.found


def test_offer_has_the_state_and_the_descriptors(path: str, owner: Claimants) -> None:
    offered = Claiming(path).offered(owner)
    assert bytes(offered.state) == b'{"color":"red"}'
    assert offered.fds.keys() == {"owner", "one"}
    assert os.path.samestat(os.fstat(offered.fds["one"]), os.fstat(0))
    offered.close_fds()
    offered.refuse("not today")
    assert owner.wait(1.0) is None
    assert len(owner) == 0


def test_first_claimant_that_is_ready_takes_over(path: str, owner: Claimants) -> None:
    first, second = Claiming(path).offered(owner), Claiming(path).offered(owner)
    answers: list[str] = []
    thread = threading.Thread(target=lambda: answers.append(second.ready()))
    thread.start()
    heir = owner.wait(5.0)
    assert heir is not None
    assert first.ready() == "another process takes it over now"
    first.refuse("it may not")
    granting = threading.Thread(target=lambda: answers.append(heir.grant()))
    granting.start()
    thread.join(5)
    assert answers == [""]
    second.serving()
    granting.join(5)
    assert answers == ["", ""]
    for offered in (first, second):
        offered.close_fds()


def test_former_owner_and_waiting_claimants_get_an_offer_at_the_end(
    path: str, owner: Claimants, said: list[str]
) -> None:
    claims = [Claiming(path, waits=True), Claiming(path, "old")]
    while len(said) < 2:
        assert owner.wait(0.01) is None
    assert all(claim.found is None for claim in claims)
    assert owner.offer_last()
    assert owner.offer_last()  # one at a time
    while all(claim.found is None for claim in claims):
        assert owner.wait(0.01) is None
    [offered] = [claim.found for claim in claims if isinstance(claim.found, Offered)]
    offered.close_fds()
    offered.refuse("no")
    while len(owner) == 2:
        assert owner.wait(0.01) is None
    assert owner.offer_last()
    [last] = [claim.offered(owner) for claim in claims if claim.found is not offered]
    last.close_fds()
    last.refuse("no")


def test_claim_of_another_protocol_and_too_many_claims_are_refused(
    path: str, owner: Claimants, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ckptfs._os.claimants._CLAIMANTS_MAX", 2)
    claims = [Claiming(path, waits=True) for _ in range(2)]
    while len(said) < 2:
        assert owner.wait(0.01) is None
    refusal = Claiming(path).refused(owner)
    assert refusal == Refused("too many processes want to take over", lasting=True)
    owner.offer_last()
    while all(claim.found is None for claim in claims):
        assert owner.wait(0.01) is None
    for claim in claims:
        if isinstance(claim.found, Offered):
            claim.found.close_fds()
            claim.found.refuse("no")


def test_connection_that_cannot_be_accepted_ends_no_wait_late(path: str, owner: Claimants) -> None:
    """Too many files are open. The owner returns, and so notices signals."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(path)
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        lowest_free = os.dup(0)
        os.close(lowest_free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, before[1]))
        try:
            assert owner.wait(0.1) is None
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        assert len(owner) == 0
        owner.wait(0.1)
        assert len(owner) == 1


def test_no_owner_answers_none(path: str) -> None:
    assert takeover.claim(path, Claim("new", "1", waits=False)) is None
