"""A container runtime's part for a pod with ``hostUsers: false``, as a program of its own.

``python usernamespace.py VOLUME SEEN READONLY SCRIPT`` runs a shell script as root of a new user
namespace, whose ids begin at `FIRST` on the node. The script has all capabilities there, and mount
and PID namespaces of its own. It sees the volume on the directory SEEN, by an idmapped mount: the
id that the volume's files have on the node is the same id in the pod. With READONLY ``no``, the
runtime also makes that mount writable, which a good one never does.

The system calls are those of runc and crun: open_tree(2), mount_setattr(2) and move_mount(2).
"""

import ctypes
import os
import struct
import sys

FIRST = 300_000
IDS = 65_536
"""The ids of a pod, as the kubelet gives them out."""

IS_SUPPORTED = tuple(map(int, os.uname().release.split("-")[0].split(".")[:2])) >= (6, 12)
"""Whether the kernel lets root make idmapped mounts of FUSE."""

_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR = 428, 429, 442
_AT_FDCWD, _AT_EMPTY_PATH = -100, 0x1000
_OPEN_TREE_CLONE, _MOVE_MOUNT_F_EMPTY_PATH = 1, 4
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_IDMAP = 1, 0x100000
_CLONE_NEWNS, _CLONE_NEWUSER, _CLONE_NEWPID = 0x20000, 0x10000000, 0x20000000
_MS_REC, _MS_PRIVATE = 0x4000, 1 << 18
_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def clone_idmapped(volume: str, user_namespace: int, *, readonly: bool = True) -> int:
    """A detached clone of the mount at `volume`, mapped by a user namespace. Raises OSError, with
    EINVAL if the file system cannot be idmapped."""
    tree = _checked(_libc.syscall(_OPEN_TREE, _AT_FDCWD, os.fsencode(volume), _OPEN_TREE_CLONE))
    drop = 0 if readonly else _MOUNT_ATTR_RDONLY
    attributes = struct.pack("=4Q", _MOUNT_ATTR_IDMAP, drop, 0, user_namespace)
    given = (tree, b"", _AT_EMPTY_PATH, attributes, len(attributes))
    _checked(_libc.syscall(_MOUNT_SETATTR, *given))
    return tree


def user_namespace() -> tuple[int, int]:
    """Fork a process into a new user namespace. Returns its id, and a descriptor. The process
    returns from here, too, with the id 0, when that descriptor is closed."""
    waits, goes_on = os.pipe()
    made, says_so = os.pipe()
    child = os.fork()
    if not child:
        os.close(goes_on)
        _checked(_libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNS | _CLONE_NEWPID))
        os.write(says_so, b".")
        os.read(waits, 1)
        return 0, -1
    os.close(waits)
    os.close(says_so)
    os.read(made, 1)
    for name in ("uid_map", "gid_map"):
        with open(f"/proc/{child}/{name}", "w") as file:
            file.write(f"0 {FIRST} {IDS}")
    return child, goes_on


def main(volume: str, seen: str, readonly: str, script: str) -> int:
    _checked(_libc.unshare(_CLONE_NEWNS))
    _checked(_libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None))
    child, goes_on = user_namespace()
    if not child:
        os.chdir(os.path.dirname(seen))  # the pod's user may not enter the directories around it
        os.setgroups([])
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
        os.chdir(os.path.basename(seen))
        done = os.spawnv(os.P_WAIT, "/bin/sh", ["sh", "-ec", script])  # process 1 of the pod
        os._exit(done)
    return _attend(child, goes_on, volume, seen, readonly=readonly != "no")


def _attend(child: int, goes_on: int, volume: str, seen: str, *, readonly: bool) -> int:
    """Mount for the pod, let it go on, and return its exit status."""
    namespace = os.open(f"/proc/{child}/ns/user", os.O_RDONLY)
    tree = clone_idmapped(volume, namespace, readonly=readonly)
    mounts = os.open(f"/proc/{child}/ns/mnt", os.O_RDONLY)
    _checked(_libc.setns(mounts, _CLONE_NEWNS))
    place = os.fsencode(seen)
    given = (tree, b"", _AT_FDCWD, place, _MOVE_MOUNT_F_EMPTY_PATH)
    _checked(_libc.syscall(_MOVE_MOUNT, *given))
    os.close(goes_on)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
