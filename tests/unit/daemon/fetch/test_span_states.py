"""The states of a span, and the waits of its callers."""

from pathlib import Path

import pytest
import trio
from support.fakes import MIB, FakeStore, pattern
from support.rig import Rig, rig_in

from ckptfs._daemon.fetch.remote_file import RemoteFile
from ckptfs._daemon.fetch.scheduler import Priority
from ckptfs._daemon.fetch.span_states import Claim, Span, SpanState
from ckptfs.errors import AccessDenied, CkptfsError, StoreUnavailable

DATA = pattern(4 * MIB)


def span_of(file: RemoteFile) -> Span:
    return Span(file, file.entry, range(2), Priority.DEMAND, file.activity.background)


def claim_of(
    span: Span, file: RemoteFile, *, is_joined: bool = False, is_overtaken: bool = False
) -> Claim:
    return Claim(span, file, is_joined=is_joined, is_overtaken=is_overtaken)


def files_in(rig: Rig) -> "tuple[RemoteFile, RemoteFile]":
    store = FakeStore({"a": DATA})
    return rig.open(store, "a"), rig.open(store, "a")


async def test_span_goes_back_to_the_queue_between_two_tries(tmp_path: Path) -> None:
    async with rig_in(tmp_path) as rig:
        span = span_of(files_in(rig)[0])
        assert span.state is SpanState.WANTED
        span.queue()
        span.begin(asks_store=True)
        assert span.state is SpanState.RUNNING
        span.queue()
        assert span.state is SpanState.WANTED
        span.fail(StoreUnavailable("no route"))
        assert not span.done.is_set()
        span.end()
        assert span.state is SpanState.ENDED
        assert span.done.is_set()
        assert span.ended.is_set()


async def test_span_that_has_failed_begins_no_request(tmp_path: Path) -> None:
    async with rig_in(tmp_path) as rig:
        span = span_of(files_in(rig)[0])
        span.fail(StoreUnavailable("no route"))
        with pytest.raises(AssertionError):
            span.begin(asks_store=True)


async def test_span_deadline_moves_with_new_bytes_only(tmp_path: Path) -> None:
    async with rig_in(tmp_path) as rig:
        span = span_of(files_in(rig)[0])
        span.start_clock(10.0)
        begun_s = trio.current_time()
        assert span.heard(MIB, begun_s + 5)
        moved_s = span.scope.deadline
        assert moved_s == pytest.approx(begun_s + 15)
        assert not span.heard(MIB, begun_s + 9)
        assert not span.heard(MIB + 100, begun_s + 9)  # a server that trickles
        span.start_clock(1.0)
        assert span.scope.deadline == moved_s


@pytest.mark.parametrize(
    ("error", "is_joined", "is_foreign", "is_own_failure"),
    [
        (StoreUnavailable("away"), False, False, True),
        (StoreUnavailable("away"), True, False, False),
        (AccessDenied("refused"), True, False, True),
        (AccessDenied("refused"), True, True, False),
    ],
)
async def test_claim_of_a_failed_span_raises_the_callers_own_error_only(
    tmp_path: Path, error: CkptfsError, is_joined: bool, is_foreign: bool, is_own_failure: bool
) -> None:
    async with rig_in(tmp_path) as rig:
        mine, theirs = files_in(rig)
        span = span_of(theirs if is_foreign else mine)
        claim = claim_of(span, mine, is_joined=is_joined)
        span.fail(error)
        span.end()
        if is_own_failure:
            with pytest.raises(type(error), match=str(error)):
                await claim.wait(until_stored=False)
        else:
            assert await claim.wait(until_stored=False) is False


async def test_claim_of_an_overtaken_span_waits_for_its_end(tmp_path: Path) -> None:
    async with rig_in(tmp_path) as rig:
        file, _ = files_in(rig)
        span = span_of(file)
        span.done.set()
        assert await claim_of(span, file).wait(until_stored=False) is True
        for claim, until_stored in (
            (claim_of(span, file, is_overtaken=True), False),
            (claim_of(span, file), True),
        ):
            with trio.move_on_after(0.01) as patience:
                await claim.wait(until_stored=until_stored)
            assert patience.cancelled_caught
        span.end()
        assert await claim_of(span, file, is_overtaken=True).wait(until_stored=True) is True
