"""Attachments are shared, end after their last holder, and belong to one user."""

import math
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest
import trio
from support.bench import ELSEWHERE, ME, PLACE, PLACE_OF_OTHERS, SETTINGS, Bench, next_daemon
from support.fakes import FakeStore, InlineOffload
from support.rig import read_of, rig_in
from trio.testing import MockClock

from ckptfs._daemon.attachment import journal
from ckptfs._daemon.attachment.inodes import MOUNT_ROOT, StaleInode
from ckptfs._daemon.control.restore import restore
from ckptfs._model.location import Location
from ckptfs._model.manifest import ListedFile
from ckptfs._model.plans.plan import Wanted
from ckptfs.errors import (
    AccessDenied,
    Busy,
    DaemonError,
    LimitExceeded,
    NotAttached,
    StoreTimeout,
)

if TYPE_CHECKING:
    from ckptfs._daemon.attachment.attachment import Attachment


OTHER = 4242


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with rig_in(tmp_path, InlineOffload(), **SETTINGS) as rig:
        yield Bench(rig)


# -- attach


async def test_attaches_of_one_place_share_an_attachment(
    bench: Bench, autojump_clock: MockClock
) -> None:
    first = await bench.attach()
    again = await bench.attach()
    assert again is first
    assert bench.lists() == 1
    assert first.leases.clients == 2
    same_place = msgspec.structs.replace(PLACE, options={"region": "us"})
    assert await bench.attach(same_place) is first
    other_endpoint = msgspec.structs.replace(PLACE, options={"endpoint_override": "x:1"})
    assert await bench.attach(other_endpoint) is not first


async def test_users_and_places_do_not_share(bench: Bench, autojump_clock: MockClock) -> None:
    attachments = [await bench.attach(), await bench.attach(uid=OTHER)]
    assert attachments[0] is not attachments[1]
    assert attachments[1].uid == OTHER
    assert bench.lists() == 2
    elsewhere = await bench.attach(ELSEWHERE)
    assert elsewhere not in attachments
    assert len(bench.shown()) == 3
    for attachment in attachments:  # each ends by itself
        bench.service.attachments.detach(attachment, force=True)
    assert bench.shown() == [elsewhere.name]


def by_way(**more: object) -> Location:
    """A place of other users, with more options or secrets."""
    secrets = {k: v for k, v in more.items() if k in ("proxy", "tls_ca_pem")}
    options = {k: v for k, v in more.items() if k not in secrets}
    return msgspec.structs.replace(
        PLACE_OF_OTHERS,
        options={**PLACE_OF_OTHERS.options, **options},
        secrets={**PLACE_OF_OTHERS.secrets, **secrets},
    )


@pytest.mark.parametrize(
    "way",
    [
        {"proxy": "http://127.0.0.1:1"},
        {"tls_ca_pem": "a certificate"},
        {"tls_verify_certificates": False},
    ],
)
async def test_bytes_by_a_way_of_another_user_are_cached_for_that_user(
    bench: Bench, way: dict[str, object]
) -> None:
    digests: list[set[str]] = []
    for place, uid in (
        (PLACE_OF_OTHERS, ME),
        (PLACE_OF_OTHERS, OTHER + 1),
        (by_way(**way), OTHER + 1),
        (by_way(**way), OTHER),
    ):
        alone = await bench.attach(place, uid)
        digests.append(set(alone.snapshot.digests()))
        if uid != OTHER:
            bench.service.attachments.detach(alone, force=True)
    assert digests[0] == digests[1]
    assert not digests[0] & digests[2]
    assert not digests[3] & (digests[0] | digests[2])
    after = await next_daemon(bench)
    restored = after.service.attachments.find(OTHER, alone.name, None)
    assert restored.snapshot.digests() == alone.snapshot.digests()


async def test_the_way_of_the_daemons_own_user_is_that_of_all(bench: Bench) -> None:
    mine = await bench.attach(by_way(proxy="http://127.0.0.1:1"))
    theirs = await bench.attach(PLACE_OF_OTHERS, OTHER)
    assert mine.snapshot.digests() == theirs.snapshot.digests()


async def test_the_way_does_not_change_under_a_reader(bench: Bench) -> None:
    shared = await bench.attach(PLACE_OF_OTHERS, OTHER)
    with pytest.raises(Busy, match="in use with other cached blocks"):
        await bench.attach(by_way(proxy="http://127.0.0.1:1"), OTHER)
    bench.service.attachments.let_go(shared)  # the attachment lingers
    alone = await bench.attach(by_way(proxy="http://127.0.0.1:1"), OTHER)
    assert alone is not shared
    assert not set(alone.snapshot.digests()) & set(shared.snapshot.digests())


async def test_an_attach_for_saving_has_blocks_of_its_own_and_keeps_the_pin(bench: Bench) -> None:
    shared = await bench.attach(PLACE_OF_OTHERS, OTHER, pinned=True)
    with pytest.raises(Busy, match="in use with other cached blocks"):
        await bench.attach(PLACE_OF_OTHERS, OTHER, saves=True)
    bench.service.attachments.let_go(shared)
    alone = await bench.attach(PLACE_OF_OTHERS, OTHER, saves=True)
    assert alone is await bench.attach(PLACE_OF_OTHERS, OTHER)  # also without saving
    assert alone.leases.pinned
    assert not set(alone.snapshot.digests()) & set(shared.snapshot.digests())
    after = await next_daemon(bench)
    restored = after.service.attachments.find(OTHER, alone.name, None)
    assert restored.snapshot.digests() == alone.snapshot.digests()


async def test_the_daemons_own_user_saves_blocks_for_all(bench: Bench) -> None:
    mine = await bench.attach(PLACE_OF_OTHERS, saves=True)
    theirs = await bench.attach(PLACE_OF_OTHERS, OTHER)
    assert mine.snapshot.digests() == theirs.snapshot.digests()


async def test_concurrent_attaches_list_once(bench: Bench, autojump_clock: MockClock) -> None:
    bench.offload.latency_s = {"control": 5.0}
    found: list[Attachment] = []

    async def attach() -> None:
        found.append(await bench.attach())

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(attach)
    assert bench.lists() == 1
    assert found == [found[0]] * 5
    assert found[0].leases.clients == 5


async def test_an_attach_reads_no_content(bench: Bench, autojump_clock: MockClock) -> None:
    await bench.attach()
    assert [call.operation for call in bench.store(PLACE).calls] == ["list"]


async def test_secrets_are_kept_out_of_the_attachment(
    bench: Bench, autojump_clock: MockClock
) -> None:
    attachment = await bench.attach()
    assert not attachment.location.secrets
    assert b"S3CR3T" not in msgspec.json.encode(bench.service.reporter.status(ME))


async def test_a_failed_attach_leaves_nothing_and_can_be_repeated(
    bench: Bench, autojump_clock: MockClock
) -> None:
    bench.store(PLACE).fail("list", AccessDenied("no"))
    with pytest.raises(AccessDenied):
        await bench.attach()
    assert bench.shown() == []
    assert bench.service.reporter.status(ME).attachments == []
    assert (await bench.attach()).leases.stays


async def test_an_attach_ends_at_its_deadline(bench: Bench, autojump_clock: MockClock) -> None:
    bench.offload.latency_s = {"control": math.inf}
    with pytest.raises(StoreTimeout, match="attach_deadline_s"):
        await bench.attach()
    bench.offload.latency_s = {}
    assert (await bench.attach()).leases.clients == 1


async def test_the_number_of_attachments_is_limited(
    bench: Bench, autojump_clock: MockClock
) -> None:
    places = [Location("local", f"/{i}") for i in range(5)]
    for place in places[:3]:
        await bench.attach(place)
    with pytest.raises(LimitExceeded, match="attachments_max"):
        await bench.attach(places[3])
    await bench.attach(places[0])  # the place is attached already


async def test_the_limit_holds_for_attaches_at_the_same_time(
    bench: Bench, autojump_clock: MockClock
) -> None:
    bench.offload.latency_s = {"control": 1.0}
    refused: list[LimitExceeded] = []

    async def attach(number: int) -> None:
        try:
            await bench.attach(Location("local", f"/{number}"))
        except LimitExceeded as error:
            refused.append(error)

    async with trio.open_nursery() as nursery:
        for number in range(5):
            nursery.start_soon(attach, number)
    assert len(bench.shown()) == 3
    assert len(refused) == 2


async def test_the_number_of_objects_is_limited(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with rig_in(tmp_path, InlineOffload(), **SETTINGS, files_max=1) as rig:
        with pytest.raises(LimitExceeded, match="files_max"):
            await Bench(rig).attach()


# -- the end of an attachment


async def test_it_lingers_and_is_removed(bench: Bench, autojump_clock: MockClock) -> None:
    attachment = await bench.attach()
    await trio.sleep(1000)
    assert bench.shown() == [attachment.name]  # its client holds it
    bench.service.attachments.let_go(attachment)
    await trio.sleep(9.9)
    assert bench.shown() == [attachment.name]
    await trio.sleep(0.2)
    assert bench.shown() == []
    assert bench.forgotten == [attachment.name]
    assert bench.store(PLACE).closed
    with pytest.raises(NotAttached):
        bench.service.attachments.find(ME, attachment.name, None)


async def test_every_use_begins_the_time_anew(bench: Bench, autojump_clock: MockClock) -> None:
    attachment = await bench.attach()
    bench.service.attachments.let_go(attachment)
    await trio.sleep(8)
    root = attachment.snapshot.tree.root.inode
    handle = bench.service.vfs.opendir(root, 1)
    await trio.sleep(100)
    assert bench.shown() == [attachment.name]
    bench.service.vfs.release(handle)
    await trio.sleep(8)
    bench.service.vfs.release(bench.service.vfs.opendir(root, 1))  # for a moment only
    await trio.sleep(8)
    file = bench.service.vfs.open(attachment.snapshot.tree.root.children[b"c"].inode)
    await trio.sleep(8)
    bench.service.vfs.release(file)
    await trio.sleep(8)
    assert bench.shown() == [attachment.name]
    await trio.sleep(3)
    assert bench.shown() == []


async def test_a_lingering_one_is_listed_again_and_used_if_it_is_the_same(
    bench: Bench, autojump_clock: MockClock
) -> None:
    first = await bench.attach()
    bench.service.attachments.let_go(first)
    assert await bench.attach() is first
    assert bench.lists() == 2
    bench.service.attachments.let_go(first)
    bench.store(PLACE).overwrite("c", b"y")
    second = await bench.attach()
    assert second is not first
    assert second.ordinal != first.ordinal
    assert second.manifest.version != first.manifest.version
    assert bench.shown() == [second.name] == [first.name]
    await trio.sleep(1000)
    assert bench.shown() == [second.name]  # the first timer does not end the second


async def test_a_held_one_is_joined_whatever_the_store_says(
    bench: Bench, autojump_clock: MockClock
) -> None:
    first = await bench.attach()
    bench.store(PLACE).overwrite("c", b"y")
    assert await bench.attach() is first
    assert bench.lists() == 1


async def test_one_that_would_end_during_the_listing_stays(
    bench: Bench, autojump_clock: MockClock
) -> None:
    first = await bench.attach()
    bench.service.attachments.let_go(first)
    bench.offload.latency_s = {"control": 15.0}
    assert await bench.attach() is first  # the listing takes longer than `linger_s`
    assert bench.shown() == [first.name]
    bench.service.attachments.let_go(first)
    await trio.sleep(11)
    assert bench.shown() == []


@pytest.mark.parametrize("changes", [False, True])
async def test_one_that_is_detached_by_force_during_the_listing_is_attached_anew(
    bench: Bench, autojump_clock: MockClock, changes: bool
) -> None:
    first = await bench.attach(pinned=True)
    bench.service.attachments.let_go(first)
    if changes:
        bench.store(PLACE).overwrite("c", b"y")
    bench.offload.latency_s = {"control": 15.0}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.attach)
        await trio.sleep(5)
        bench.service.attachments.detach(first, force=True)
        assert bench.shown() == []
    second = bench.service.attachments.find(ME, first.name, None)
    assert second is not first
    assert second.leases.clients == 1
    assert not second.leases.pinned
    assert bench.shown() == [second.name]
    assert len(bench.opened) == 2  # the store of the first one ended with it


async def test_an_attachment_in_nobodys_use_is_listed_over_its_connections(
    bench: Bench, autojump_clock: MockClock
) -> None:
    first = await bench.attach(pinned=True)
    bench.service.attachments.let_go(first)
    assert await bench.attach() is first
    assert (bench.lists(), len(bench.opened)) == (2, 1)
    bench.service.attachments.let_go(first)
    others = {"secret_key": "0TH3R"}
    for place in (
        msgspec.structs.replace(PLACE, secrets=others),
        msgspec.structs.replace(PLACE, secrets=others, options={"region": "us"}),
    ):
        opened = len(bench.opened)
        assert await bench.attach(place) is first
        assert len(bench.opened) == opened + 1
        bench.service.attachments.let_go(first)
    assert bench.lists() == 4


async def test_a_store_that_finds_its_own_credentials_looks_for_them_anew(
    bench: Bench, autojump_clock: MockClock
) -> None:
    for count in (1, 2):
        bench.service.attachments.let_go(await bench.attach(ELSEWHERE))
        assert len(bench.opened) == count


async def test_a_pinned_one_stays(bench: Bench, autojump_clock: MockClock) -> None:
    attachment = await bench.attach(pinned=True)
    bench.service.attachments.let_go(attachment)
    await trio.sleep(1000)
    assert bench.shown() == [attachment.name]
    bench.service.attachments.detach(attachment, force=False)
    assert bench.shown() == []


async def test_detach_is_refused_while_a_process_holds_it(
    bench: Bench, autojump_clock: MockClock
) -> None:
    attachment = await bench.attach()
    bench.service.vfs.opendir(attachment.snapshot.tree.root.inode, 777)
    bench.service.attachments.let_go(attachment)
    with pytest.raises(Busy, match="777"):
        bench.service.attachments.detach(attachment, force=False)
    assert bench.shown() == [attachment.name]
    bench.service.attachments.detach(attachment, force=True)
    assert bench.shown() == []
    assert bench.forgotten == [attachment.name]
    assert (await bench.attach()) is not attachment


async def test_detach_of_a_pinned_one_in_use_lets_it_end_with_its_users(
    bench: Bench, autojump_clock: MockClock
) -> None:
    attachment = await bench.attach(pinned=True)
    handle = bench.service.vfs.opendir(attachment.snapshot.tree.root.inode, 777)
    bench.service.attachments.let_go(attachment)
    bench.service.attachments.detach(attachment, force=False)
    await trio.sleep(1000)
    assert bench.shown() == [attachment.name]
    bench.service.vfs.release(handle)
    await trio.sleep(11)
    assert bench.shown() == []


async def test_a_client_of_one_that_was_detached_by_force_ends_harmlessly(
    bench: Bench, autojump_clock: MockClock
) -> None:
    attachment = await bench.attach()
    bench.service.attachments.detach(attachment, force=True)
    again = await bench.attach()
    bench.service.attachments.let_go(attachment)
    await trio.sleep(1000)
    assert bench.service.attachments.find(ME, again.name, None) is again


async def test_find_is_by_name_or_place_and_only_for_the_user(
    bench: Bench, autojump_clock: MockClock
) -> None:
    attachment = await bench.attach()
    assert bench.service.attachments.find(ME, attachment.name, None) is attachment
    assert bench.service.attachments.find(ME, "", PLACE) is attachment
    for name, place in (("", None), ("other", None), ("", ELSEWHERE)):
        with pytest.raises(NotAttached):
            bench.service.attachments.find(ME, name, place)
    with pytest.raises(NotAttached):
        bench.service.attachments.find(OTHER, attachment.name, PLACE)


# -- credentials


def _with_secret(secret: str) -> Location:
    return msgspec.structs.replace(PLACE, secrets={"secret_key": secret})


async def test_new_credentials_must_prove_access_before_they_are_used(
    bench: Bench, autojump_clock: MockClock
) -> None:
    attachment = await bench.attach()
    first = bench.store(PLACE)
    renewed = bench.stores[PLACE.path] = FakeStore({"a/b": b"content", "c": b"x"})
    assert await bench.attach(_with_secret("renewed")) is attachment
    assert attachment.store is renewed
    assert len(renewed.confirms()) == 1
    denied = bench.stores[PLACE.path] = FakeStore({"a/b": b"content", "c": b"x"})
    denied.fail_always("confirm", AccessDenied("no"))
    with pytest.raises(AccessDenied):
        await bench.attach(_with_secret("stolen"))
    assert attachment.store is renewed
    assert attachment.leases.clients == 2
    assert not first.confirms()


async def test_files_that_are_open_go_on_with_the_new_credentials(
    bench: Bench, autojump_clock: MockClock
) -> None:
    attachment = await bench.attach()
    file = bench.service.vfs.open(attachment.snapshot.tree.root.children[b"c"].inode)
    bench.store(PLACE).fail_always("read_into", AccessDenied("expired"))
    with pytest.raises(AccessDenied):
        await read_of(bench.service.vfs, file, 0, 1)
    bench.stores[PLACE.path] = FakeStore({"a/b": b"content", "c": b"x"})  # with the same ETags
    await bench.attach(_with_secret("renewed"))
    assert await read_of(bench.service.vfs, file, 0, 1) == b"x"


async def test_one_that_ends_while_credentials_are_proved_is_attached_anew(
    bench: Bench, autojump_clock: MockClock
) -> None:
    first = await bench.attach()
    bench.offload.latency_s = {"control": 12.0}  # for opening the store, then for the proof
    found: list[Attachment] = []

    async def attach() -> None:
        found.append(await bench.attach(_with_secret("renewed")))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(attach)
        await trio.sleep(13)
        bench.service.attachments.let_go(first)  # the attachment lingers for 10 s only
    [second] = found
    assert bench.service.attachments.find(ME, second.name, None) is second
    assert bench.shown() == [second.name]


# -- status, idle, stop


async def test_status_shows_what_the_user_may_see(bench: Bench, autojump_clock: MockClock) -> None:
    mine, theirs = await bench.attach(pinned=True), await bench.attach(uid=OTHER)
    bench.service.vfs.opendir(mine.snapshot.tree.root.inode, 77)
    bench.service.vfs.opendir(mine.snapshot.tree.root.inode, 77)
    bench.service.vfs.open(mine.snapshot.tree.root.children[b"c"].inode)
    reply = bench.service.reporter.status(OTHER)
    assert [a.uid for a in reply.attachments] == [OTHER]
    assert [a.uid for a in bench.service.reporter.status(0).attachments] == [mine.uid, theirs.uid]
    assert bench.service.reporter.status(999).attachments == []
    [shown] = [a for a in bench.service.reporter.status(0).attachments if a.uid == mine.uid]
    assert (shown.name, shown.path) == (mine.name, f"{bench.rig.config.mount}/{mine.name}")
    assert (shown.files, shown.size, shown.cached) == (2, 8, 0)
    assert (shown.holders, shown.open_files, shown.pinned) == ([77], 1, True)
    assert (shown.state, shown.error) == ("lazy", "")
    assert reply.pid == os.getpid()


async def test_status_lists_some_skipped_objects_and_counts_all(
    bench: Bench, autojump_clock: MockClock
) -> None:
    for number in range(150):
        bench.store(PLACE).overwrite(f"{number}/..", b"")
    await bench.attach()
    [shown] = bench.service.reporter.status(ME).attachments
    assert (len(shown.skipped), shown.skipped_count) == (100, 150)


async def test_idle_means_no_client_and_no_attachment_for_a_while(
    bench: Bench, autojump_clock: MockClock
) -> None:
    bench.service.lifetime.client_came()
    attachment = await bench.attach()
    ended = trio.Event()

    async def wait() -> None:
        await bench.service.lifetime.wait_idle()
        ended.set()

    bench.rig.nursery.start_soon(wait)
    await trio.sleep(500)
    assert not ended.is_set()
    bench.service.attachments.let_go(attachment)
    await trio.sleep(500)
    assert not ended.is_set()  # the client is still there
    bench.service.lifetime.client_left()
    await trio.sleep(59)
    assert not ended.is_set()
    bench.service.lifetime.client_came()
    bench.service.lifetime.client_left()
    await trio.sleep(59)
    assert not ended.is_set()
    await trio.sleep(3)
    assert ended.is_set()


async def test_a_daemon_may_stay_for_ever(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with rig_in(tmp_path, InlineOffload(), **(SETTINGS | {"idle_exit_s": 0})) as rig:
        with trio.move_on_after(10_000) as scope:
            await Bench(rig).service.lifetime.wait_idle()
        assert scope.cancelled_caught


async def test_stop_is_refused_while_something_is_open(
    bench: Bench, autojump_clock: MockClock
) -> None:
    attachment = await bench.attach(pinned=True)
    handle = bench.service.vfs.opendir(attachment.snapshot.tree.root.inode, 1)
    with pytest.raises(Busy):
        bench.service.lifetime.stop(force=False)
    assert not bench.service.lifetime.stopped.is_set()
    bench.service.vfs.release(handle)
    file = bench.service.vfs.open(attachment.snapshot.tree.root.children[b"c"].inode)
    with pytest.raises(Busy):
        bench.service.lifetime.stop(force=False)
    bench.service.vfs.release(file)
    bench.service.lifetime.stop(force=False)
    assert bench.service.lifetime.stopped.is_set()


async def test_stop_by_force_asks_nobody(bench: Bench, autojump_clock: MockClock) -> None:
    attachment = await bench.attach()
    bench.service.vfs.opendir(attachment.snapshot.tree.root.inode, 1)
    bench.service.lifetime.stop(force=True)
    assert bench.service.lifetime.stopped.is_set()


# -- after another daemon


async def test_the_next_daemon_has_every_attachment(bench: Bench) -> None:
    gone = await bench.attach(PLACE_OF_OTHERS)
    bench.service.attachments.detach(gone, force=True)
    pinned = await bench.attach(pinned=True)
    other = await bench.attach(PLACE_OF_OTHERS, OTHER)
    inode = other.snapshot.tree.root.children[b"c"].inode
    held = bench.service.vfs.opendir(other.snapshot.tree.root.inode, 77)
    file = bench.service.vfs.open(inode, 77)
    for handle in (held, file):
        bench.handoff.handles.replying(handle, 900 + handle % 7)
        bench.handoff.handles.replied(handle)

    after = await next_daemon(bench)
    assert after.shown() == [pinned.name, other.name]
    found = after.service.attachments.find(ME, pinned.name, None)
    assert found.leases.pinned
    assert found.manifest == pinned.manifest
    assert found.attached_s == pinned.attached_s
    assert found.snapshot.digests() == pinned.snapshot.digests()
    assert after.service.attachments.find(OTHER, other.name, None).leases.directories == {held: 77}
    assert after.service.attachments.find(OTHER, other.name, None).leases.open_handles == 1
    assert await read_of(after.service.vfs, file, 0, 10) == b"x"
    assert after.lists() == 1  # the first daemon has listed it
    with pytest.raises(StaleInode):
        after.service.vfs.find(gone.snapshot.tree.root.inode)
    fresh = await after.attach(msgspec.structs.replace(PLACE, path="bucket/third"))
    assert fresh.ordinal > max(pinned.ordinal, other.ordinal, gone.ordinal)


async def test_the_next_daemon_knows_what_has_changed_since(bench: Bench) -> None:
    attachment = await bench.attach()
    bench.service.attachments.let_go(attachment)
    store = bench.store(PLACE)
    store.overwrite("a/b", b"replaced", mtime_ns=5 * 10**9)
    new = msgspec.structs.replace(PLACE, secrets={"secret_key": "another"})
    attachment = await bench.attach(new)  # lists again: another version
    attachment.replace(ListedFile(".metadata.json", 2, 7 * 10**9))
    attachment.replace(ListedFile(".metadata.json", 3, 8 * 10**9))
    shown = attachment.snapshot.tree.root.children[b".metadata.json"]
    newer = msgspec.structs.replace(PLACE, secrets={"secret_key": "a third"})
    assert await bench.attach(newer) is attachment
    attachment.hide("c")
    attachment.pin(True)
    attachment.pin(False)
    attachment.file(0).version.pin_etag('"learned"')
    attachment.file(1).version.pin_etag("", "checks")

    after = await next_daemon(await next_daemon(bench))
    found = after.service.attachments.find(ME, attachment.name, None)
    assert found.manifest == attachment.manifest
    assert found.snapshot.listed == attachment.snapshot.listed
    assert set(found.snapshot.tree.root.children) == {b"a", b".metadata.json"}
    same = found.snapshot.tree.root.children[b".metadata.json"]
    assert (same.inode, same.size, same.mtime_ns) == (shown.inode, shown.size, shown.mtime_ns)
    assert (found.file(0).pin.etag, found.file(0).pin.etag_of) == ('"learned"', "answers")
    assert found.file(1).pin.etag_of == "checks"
    assert not found.leases.pinned
    assert after.service.attachments.opened_for(found) == newer
    assert "secret" not in repr(found.location)


async def test_the_next_daemon_makes_of_an_attachment_what_is_needed(bench: Bench) -> None:
    attachment = await bench.attach(pinned=True)
    attachment.file(0).version.pin_etag('"learned"')
    after = await next_daemon(bench)
    found = after.service.attachments.find(ME, attachment.name, None)
    assert found._snapshot is None  # names, sizes and counts need no snapshot
    assert after.service.vfs.statfs() == bench.service.vfs.statfs()
    assert after.service.vfs.getattr(MOUNT_ROOT).nlink == 3
    assert found._snapshot is None
    inode = attachment.snapshot.tree.root.children[b"c"].inode
    assert await read_of(after.service.vfs, after.service.vfs.open(inode), 0, 10) == b"x"
    assert found.file(0).pin.etag == '"learned"'


async def test_what_went_wrong_is_known_to_the_next_daemon(bench: Bench) -> None:
    attachment = await bench.attach(pinned=True)
    store = bench.store(PLACE)
    inode = attachment.snapshot.tree.root.children[b"c"].inode
    handle = bench.service.vfs.open(inode)
    for number in range(300):  # the store fails again and again
        store.fail("read_into", AccessDenied(f"refused {number}"))
        with pytest.raises(AccessDenied):
            await read_of(bench.service.vfs, handle, 0, 1)
        attachment.note(AccessDenied(f"also {number}"))
    assert sum(len(data) for _, data in bench.handoff.journal.frames()) < 4096
    after = await next_daemon(await next_daemon(bench))
    found = after.service.attachments.find(ME, attachment.name, None)
    assert found.own_error == attachment.own_error
    assert found.own_error.endswith("also 299")
    assert found.file(1).health.error == attachment.file(1).health.error
    assert found.file(1).health.error.endswith("refused 299")
    assert found.state(0) == "failing"
    assert await read_of(after.service.vfs, after.service.vfs.open(inode), 0, 10) == b"x"
    last = await next_daemon(after)
    found = last.service.attachments.find(ME, attachment.name, None)
    assert found.state(0) == "lazy"
    assert found.file(1).health.error.endswith("refused 299")  # the last error
    last.service.attachments.detach(found, force=True)
    assert list(last.handoff.journal.frames()) == []


async def test_a_store_that_does_not_open_holds_up_no_restart_for_long(
    bench: Bench, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    await bench.attach()
    bench.offload.latency_s = {"control": math.inf}
    began = trio.current_time()
    after = await next_daemon(bench)
    assert after.shown() == []
    assert trio.current_time() - began == 10
    assert "did not open within 10 s" in caplog.text
    caplog.clear()


async def test_what_nobody_holds_after_a_restart_goes(
    bench: Bench, autojump_clock: MockClock
) -> None:
    await bench.attach()
    after = await next_daemon(bench)
    assert len(after.shown()) == 1  # its client may come back
    await trio.sleep(SETTINGS["linger_s"] + 1)
    assert after.shown() == []
    assert list(after.handoff.journal.frames()) == []


async def test_the_next_daemon_goes_on_with_prefetches(
    bench: Bench, autojump_clock: MockClock
) -> None:
    bench.offload.latency_s = {"data": math.inf}  # the first daemon does not get far
    attachment = await bench.attach(pinned=True)
    bench.service.prefetches.begin_recorded(attachment, Wanted(["c"]))
    await trio.sleep(1)
    bench.service.attachments.remove(attachment)
    record = journal.recorder(bench.handoff.journal, 1)
    record(journal.Made(PLACE, attachment.manifest, ME, ME, 1.0))
    record(journal.PrefetchBegun(5, Wanted(["c"])))
    record(journal.PrefetchBegun(6, Wanted(["a/b"])))
    record(journal.PrefetchEnded(6))
    bench.offload.latency_s = {}
    after = await next_daemon(bench)
    await trio.sleep(5)
    [found] = after.service.attachments
    cached = [path for path in ("a/b", "c") if after.store(PLACE).reads(path)]
    assert cached == ["c"]
    kinds = [type(event).__name__ for event in journal.recorded(bench.handoff.journal)[1]]
    assert kinds[-1] == "PrefetchEnded"
    assert found.state(found.cached_bytes(bench.rig.cache)) == "lazy"


async def test_an_attachment_whose_store_is_refused_does_not_take_the_others_along(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    lost = await bench.attach()
    kept = await bench.attach(ELSEWHERE)
    after = Bench(bench.rig, bench.fds)
    after.stores = bench.stores
    after.refused = PLACE.path
    await restore(after.service)
    after.service.attachments.release_all()
    assert after.shown() == [kept.name]
    assert "cannot be restored: " in caplog.text
    assert lost.ordinal not in journal.recorded(after.handoff.journal)
    caplog.clear()


async def test_a_journal_that_makes_no_sense_is_refused(bench: Bench) -> None:
    bench.handoff.journal.append(1, b"\xc1")
    with pytest.raises(DaemonError, match="cannot read the journal of the previous daemon"):
        await restore(Bench(bench.rig, bench.fds).service)
