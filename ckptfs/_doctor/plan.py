"""All checks, in the order of the report. Scripts use their names, so the names are stable."""

from collections.abc import Generator
from contextlib import closing, contextmanager
from functools import partial

from ckptfs._doctor.checks import Check
from ckptfs._doctor.disk import Disk
from ckptfs._doctor.node import Node
from ckptfs._doctor.serving import Serving
from ckptfs._doctor.store import Remote
from ckptfs._model.wording import INSTALL_DAEMON


@contextmanager
def all_checks(uri: str) -> Generator[list[Check]]:
    """Provide the checks of this machine, and of the store of `uri` unless that is "". The end of
    the context closes the connections that they opened."""
    node = Node()
    disk = Disk(node)
    with closing(Remote(uri, node)) as remote:
        checks = _of_machine(node) + _of_daemon(Serving(node, disk))
        yield checks + _of_cache(node, disk) + _of_store(remote)


def _of_machine(node: Node) -> list[Check]:
    permission = "mount as root, or install the package fuse3"
    check = partial(Check, group="machine")
    # If another user's daemon serves this user, the machine need not be able to mount. So most of
    # these checks come after "daemon".
    late = ("daemon",)
    before_mount = ("daemon", "fusermount")
    own = node.unless_served
    return [
        check("config", node.configuration, "see ckptfs help config"),
        check("package", node.package, INSTALL_DAEMON, after=late),
        check("device", own(node.device), "modprobe fuse", after=late),
        check("fusermount", own(node.fusermount), "install the package fuse3", after=late),
        check("mount", own(node.mount), permission, needs=("config", "device"), after=before_mount),
        check("restart", node.restarts, permission, needs=("mount",)),
        check("passthrough", node.passes_through, permission, needs=("mount",)),
        check("request-size", node.request_size, permission, needs=("mount",)),
        check("allow-other", node.other_users, "make /etc/fuse.conf readable", needs=("config",)),
        check("limits", node.limits, "raise them with ulimit", after=late),
    ]


def _of_daemon(serving: Serving) -> list[Check]:
    log = "see its log; ckptfs restart, or ckptfs umount --force"
    mounts = "read /proc/self/mountinfo"
    late = ("daemon", "mount")  # `mount` makes a short mount
    check = partial(Check, group="daemon")
    return [
        check("daemon", serving.daemon, log, needs=("config",)),
        check("version", serving.version, "ckptfs restart", needs=("daemon",)),
        check("daemon-job", serving.lifetime, "see ckptfs help jobs", needs=("daemon",)),
        check("leftover-mounts", serving.leftovers, mounts, needs=("config",), after=late),
    ]


def _of_cache(node: Node, disk: Disk) -> list[Check]:
    private = "set CKPTFS_SOCKET, CKPTFS_MOUNT and CKPTFS_CACHE_DIR to directories of your own"
    working = "set cache_dir (CKPTFS_CACHE_DIR) to a directory on a disk that works"
    check = partial(Check, group="cache", needs=("config",), after=("daemon",))
    own = node.unless_served
    return [
        check("directories", own(node.directories), private),
        check("cache-place", own(disk.place), working),
        check("cache-space", own(disk.space), working),
        check("cache-speed", own(disk.speed), working),
    ]


def _of_store(remote: Remote) -> list[Check]:
    uri = "check the URI; give the bucket's region with ?region="
    setting, profile = "correct the setting", "check the profile or role"
    name = "check the endpoint, and /etc/resolv.conf"
    endpoint = "check the endpoint, and the firewalls and proxies on the way"
    listed = "check the endpoint; give the URI of one checkpoint"
    connected = ("store-connect",)
    secure = ("credentials", "store-connect", "store-tls")
    check = partial(Check, group="store", needs=("location",))
    return [
        check("location", remote.location, uri, needs=("config",)),
        check("settings", remote.settings, setting, needs=("config",), after=("location",)),
        check("credentials", remote.credentials, profile, after=("daemon",)),
        check("store-name", remote.name, name),
        check("store-connect", remote.connection, endpoint, needs=("store-name",)),
        check("store-tls", remote.tls, endpoint, needs=connected),
        check("clock", remote.clock, endpoint, needs=connected, unless_failed=("store-tls",)),
        check(
            "store-list",
            remote.listing,
            listed,
            unless_failed=secure,
            after=("clock",),
            timeout_s=15.0,
        ),
        check("store-read", remote.reading, listed, needs=("store-list",), timeout_s=15.0),
    ]
