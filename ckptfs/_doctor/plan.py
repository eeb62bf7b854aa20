"""All checks, in the order in which they are shown. Their names are for scripts, and stay."""

from collections.abc import Generator
from contextlib import closing, contextmanager

from ckptfs._doctor.checks import Check
from ckptfs._doctor.disk import Disk
from ckptfs._doctor.node import Node
from ckptfs._doctor.serving import Serving
from ckptfs._doctor.store import Remote

MACHINE, DAEMON, CACHE, STORE = "machine", "daemon", "cache", "store"
GROUPS = (MACHINE, DAEMON, CACHE, STORE)


@contextmanager
def all_checks(uri: str) -> Generator[list[Check]]:
    """The checks of this machine, and of the store that `uri` names; "": of none. What they have
    opened is closed at the end."""
    node = Node()
    disk = Disk(node)
    serving = Serving(node, disk)
    remote = Remote(uri, node)
    with closing(remote):
        yield [*_of_machine(node), *_of_daemon(serving), *_of_cache(node, disk), *_of_store(remote)]


def _of_machine(node: Node) -> list[Check]:
    # Where a daemon serves us that is not ours to start, the machine need not be able to mount.
    late = ("daemon",)
    permission = "mount as root, or install the package fuse3"
    return [
        Check("config", MACHINE, node.configuration, "see Configuration in the README"),
        Check("package", MACHINE, node.package, "pip install 'ckptfs[daemon]'", after=late),
        Check("device", MACHINE, node.device, "modprobe fuse", after=late),
        Check("fusermount", MACHINE, node.fusermount, "install the package fuse3", after=late),
        Check(
            *("mount", MACHINE, node.mount, permission),
            needs=("config", "device"),
            after=("daemon", "fusermount"),
        ),
        Check("restart", MACHINE, node.restarts, permission, needs=("mount",)),
        Check("passthrough", MACHINE, node.passes_through, permission, needs=("mount",)),
        Check("request-size", MACHINE, node.request_size, permission, needs=("mount",)),
        Check(
            *("allow-other", MACHINE, node.other_users, "make /etc/fuse.conf readable"),
            needs=("config",),
        ),
        Check("limits", MACHINE, node.limits, "raise them with ulimit", after=late),
    ]


def _of_daemon(serving: Serving) -> list[Check]:
    return [
        Check(
            *("daemon", DAEMON, serving.daemon),
            "see its log; ckptfs restart, or ckptfs umount --force",
            needs=("config",),
        ),
        Check("version", DAEMON, serving.version, "ckptfs restart", needs=("daemon",)),
        Check(
            *("leftover-mounts", DAEMON, serving.leftovers, "look into /proc/self/mountinfo"),
            needs=("config",),
            after=("daemon", "mount"),  # which makes one for a moment
        ),
    ]


def _of_cache(node: Node, disk: Disk) -> list[Check]:
    remedy = "set cache_dir (CKPTFS_CACHE_DIR) to a directory on a disk that works"
    late = ("daemon",)
    return [
        Check(
            *("directories", CACHE, node.directories),
            "set CKPTFS_SOCKET, CKPTFS_MOUNT and CKPTFS_CACHE_DIR to directories of your own",
            needs=("config",),
            after=late,
        ),
        Check("cache-space", CACHE, disk.space, remedy, needs=("config",), after=late),
        Check("cache-speed", CACHE, disk.speed, remedy, needs=("config",), after=late),
    ]


def _of_store(remote: Remote) -> list[Check]:
    endpoint = "check the endpoint, and firewall and proxies on the way"
    listed = "check the endpoint; give the URI of one checkpoint"
    return [
        Check(
            *("location", STORE, remote.location),
            "check the URI; give the bucket's region with ?region=",
            needs=("config",),
        ),
        Check(
            *("settings", STORE, remote.settings, "correct the setting"),
            needs=("config",),
            after=("location",),
        ),
        Check(
            *("credentials", STORE, remote.credentials),
            "check the profile or role",
            needs=("location",),
            after=("daemon",),
        ),
        Check(
            *("store-name", STORE, remote.name),
            "check the endpoint, and /etc/resolv.conf",
            needs=("location",),
        ),
        Check("store-connect", STORE, remote.connection, endpoint, needs=("store-name",)),
        Check("store-tls", STORE, remote.tls, endpoint, needs=("store-connect",)),
        Check(
            *("clock", STORE, remote.clock, endpoint),
            needs=("store-connect",),
            unless_failed=("store-tls",),
        ),
        Check(
            *("store-list", STORE, remote.listing, listed),
            needs=("location",),
            unless_failed=("credentials", "store-connect", "store-tls"),
            after=("clock",),
            timeout_s=15.0,
        ),
        Check("store-read", STORE, remote.reading, listed, needs=("store-list",), timeout_s=15.0),
    ]
