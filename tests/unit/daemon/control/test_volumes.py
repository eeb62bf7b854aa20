"""A volume has an attachment of its own, with its own credentials, modes and cached bytes."""

import os
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from support.bench import ME, PLACE, PLACE_OF_OTHERS, SETTINGS, Bench, next_daemon
from support.fakes import InlineOffload, config_of
from support.rig import rig_in
from trio.testing import MockClock

from ckptfs._daemon.attachment.inodes import MOUNT_ROOT, VOLUMES_ROOT, NoEntry
from ckptfs._daemon.control.commands import Commands, ConnectionState
from ckptfs._daemon.control.named_stores import Peer, Stores
from ckptfs._daemon.control.permissions import check_rights
from ckptfs._daemon.quotas import cache_scope, saved_scope
from ckptfs._model.location import Location
from ckptfs._model.named_store import StoreTable
from ckptfs._model.protocol.requests import Attach, Detach
from ckptfs._model.volume import Volume
from ckptfs.errors import AccessDenied, Busy, NotAttached, RightsNotLent

RED, BLUE = Volume("red"), Volume("blue", 4711)
RENEWED = msgspec.structs.replace(PLACE, secrets={**PLACE.secrets, "access_key": "newer"})


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with rig_in(tmp_path, InlineOffload(), **SETTINGS) as rig:
        yield Bench(rig)


async def test_volumes_of_one_place_share_nothing(bench: Bench, autojump_clock: MockClock) -> None:
    usual = await bench.attach()
    red = await bench.attach(volume=RED)
    blue = await bench.attach(volume=BLUE)
    assert len({usual.ordinal, red.ordinal, blue.ordinal}) == 3
    assert (usual.name, red.name) == (PLACE.directory, ".volumes/red")
    attachments = bench.service.attachments
    assert attachments.find(ME, "", PLACE) is usual
    assert attachments.find(ME, ".volumes/blue", None) is blue
    attachments.detach(usual, force=True)
    with pytest.raises(NotAttached):  # a URI never means the volume of a pod
        attachments.find(ME, "", PLACE)
    assert bench.forgotten == [PLACE.directory]


async def test_volumes_are_shown_in_a_directory_of_their_own(
    bench: Bench, autojump_clock: MockClock
) -> None:
    vfs = bench.service.vfs
    assert vfs.lookup(MOUNT_ROOT, b".volumes").inode == VOLUMES_ROOT
    assert vfs.getattr(VOLUMES_ROOT).mode == 0o700
    red, blue = await bench.attach(volume=RED), await bench.attach(volume=BLUE)
    assert bench.shown() == []
    with pytest.raises(NoEntry):
        vfs.lookup(MOUNT_ROOT, b"red")
    assert not vfs.is_lasting(VOLUMES_ROOT, b"absent")
    assert not vfs.is_listing_lasting(VOLUMES_ROOT)
    handle = vfs.opendir(VOLUMES_ROOT, 1)
    assert [(name, stat.inode) for name, stat, _ in vfs.readdir(handle, 0)] == [
        (b"red", red.snapshot.tree.root.inode),
        (b"blue", blue.snapshot.tree.root.inode),
    ]
    vfs.release(handle)
    for name, of_directory, of_file in ((b"red", 0o555, 0o444), (b"blue", 0o550, 0o440)):
        top = vfs.lookup(VOLUMES_ROOT, name)
        file = vfs.lookup(top.inode, b"c")
        assert (top.mode, top.uid, file.mode, file.uid) == (of_directory, ME, of_file, ME)
        assert (file.gid == 4711) == (name == b"blue")
    bench.service.attachments.detach(red, force=True)
    with pytest.raises(NoEntry):
        vfs.lookup(VOLUMES_ROOT, b"red")
    assert bench.forgotten == [".volumes/red"]


async def test_a_volume_is_renewed_and_never_listed_again(
    bench: Bench, autojump_clock: MockClock
) -> None:
    red = await bench.attach(volume=RED, pinned=True)
    bench.service.attachments.let_go(red)
    assert not red.leases.in_use
    bench.store(PLACE).overwrite("c", b"another version")
    assert await bench.attach(RENEWED, volume=RED) is red
    assert bench.lists() == 1
    assert bench.service.attachments.opened_for(red) == RENEWED
    bench.store(PLACE).fail("confirm", AccessDenied("no"))
    with pytest.raises(AccessDenied):
        await bench.attach(PLACE, volume=RED)
    assert bench.service.attachments.opened_for(red) == RENEWED


async def test_a_volume_shows_one_place(bench: Bench, autojump_clock: MockClock) -> None:
    await bench.attach(volume=RED)
    with pytest.raises(Busy, match=r"\.volumes/red shows s3://bucket/run/step-1"):
        await bench.attach(PLACE_OF_OTHERS, volume=RED)
    with pytest.raises(Busy, match="other settings"):
        await bench.attach(volume=Volume("red", 7))


async def test_the_next_daemon_has_the_volumes(bench: Bench, autojump_clock: MockClock) -> None:
    blue = await bench.attach(volume=BLUE, pinned=True)
    after = await next_daemon(bench)
    [found] = after.service.attachments
    assert (found.key, found.volume, found.name) == (blue.key, BLUE, ".volumes/blue")
    status = after.service.reporter.status(ME, ".volumes/blue")
    assert [a.volume for a in status.attachments] == ["blue"]
    assert after.service.reporter.status(ME, ".volumes/red").attachments == []


async def test_only_the_daemons_users_attach_volumes(
    bench: Bench, autojump_clock: MockClock
) -> None:
    commands = Commands(bench.service, Stores({}), None, "the daemon")
    other = ConnectionState(Peer(4242, 4242))
    with pytest.raises(AccessDenied, match="attach volumes"):
        await commands.run(Attach(location=PLACE, volume=RED), other)
    ours = ConnectionState(Peer(ME, ME))
    await commands.run(Attach(location=PLACE, volume=RED), ours)
    with pytest.raises(NotAttached):
        await commands.run(Detach(name=".volumes/red", force=True), other)
    await commands.run(Detach(name=".volumes/red", force=True), ours)


def test_a_volume_counts_as_another_user() -> None:
    config = config_of(Path("/nowhere"))
    lending = Volume("red", lends=True)
    for location in (
        Location("s3", "bucket/run"),
        Location("local", "/etc"),
        StoreTable("s3://bucket").location("prod", "run"),
    ):
        with pytest.raises(RightsNotLent, match="not for this volume"):
            check_rights(os.geteuid(), location, config, RED)
        check_rights(os.geteuid(), location, config, lending)
    of_file = msgspec.structs.replace(PLACE, options={"profile": "admin"})
    for volume in (RED, lending):
        with pytest.raises(RightsNotLent, match="names profile"):
            check_rights(os.geteuid(), of_file, config, volume)
    # A pod that chooses the proxy could answer for the store.
    by_proxy = msgspec.structs.replace(PLACE, secrets={**PLACE.secrets, "proxy": "http://x"})
    scopes = {scope(ME, by_proxy, v) for scope in (cache_scope, saved_scope) for v in (RED, BLUE)}
    assert scopes == {" by the way of volume red", " by the way of volume blue"}
    assert saved_scope(ME, PLACE, RED) == cache_scope(ME, PLACE, RED) == ""
