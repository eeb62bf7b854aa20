"""Daemons where nothing is configured: users of each kind on machines of each kind.

A machine is a mount namespace: its ``/tmp``, ``/var/tmp``, ``/run`` and ``/etc/passwd`` are its
own, and its root can be read-only. All that runs there ends with it.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import COMMAND_TIMEOUT_S, Node
from support.worlds import OWN_MOUNTS, over_tmp

import ckptfs

pytestmark = pytest.mark.mount

UriOf = Callable[[Path], str]

UID, OTHER = 41999, 41998
BIN = Path(sys.executable).parent
READ = """
import json, os, sys, warnings
import ckptfs
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always", UserWarning)
    with ckptfs.Checkpoint(sys.argv[1]).as_directory() as path:
        with open(path + "/config.json") as file:
            text = file.read()
        said = [str(each.message) for each in caught if each.category is UserWarning]
        print(json.dumps([path, text, said]), flush=True)
"""
USER = ("setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups")


class Machine:
    """A machine that is made for one script.

    Args:
        node: Of the test.
        passwd: Whether the user has a line in /etc/passwd; their home is ``/``.
        device: Whether there is /dev/fuse.
        read_only: Whether only ``/tmp`` can be written, or what `before` mounts.
        before: More of a script, run as root.
    """

    def __init__(
        self,
        node: Node,
        *,
        passwd: bool = True,
        device: bool = True,
        read_only: bool = False,
        before: str = "",
    ) -> None:
        lines = [_show_interpreter(), over_tmp("mount -t tmpfs -o mode=1777 x")]
        if not read_only:
            lines += ["mount -t tmpfs -o mode=1777 x /var/tmp", "mount -t tmpfs -o mode=755 x /run"]
        line = f"someone:x:{UID}:{UID}::/:/bin/sh" if passwd else ""
        lines += [
            f"(cat /etc/passwd; echo {line}) > /tmp/passwd; mount --bind /tmp/passwd /etc/passwd",
            "mknod -m 666 /tmp/fuse c 10 229" if device else "",
            "mount --bind /tmp/fuse /dev/fuse" if device else _WITHOUT_DEVICE,
            f"mkdir -m 777 /tmp/cwd; mkdir /tmp/home; chown {UID}:{UID} /tmp/home",
            before,
            "mount -o remount,bind,ro /" if read_only else "",
            "cd /tmp/cwd",
        ]
        self._script = "\n".join(lines)

    def run(self, script: str, *arguments: str, **environ: str) -> str:
        """Run a script of sh there as root, with an environment of its own; returns its output."""
        words = [f"{name}={value}" for name, value in environ.items()]
        path = f"PATH={BIN}:/usr/sbin:/usr/bin:/sbin:/bin"
        command = [*OWN_MOUNTS, "unshare", "--pid", "--fork"]
        command += ["--kill-child", "--mount-proc", "env", "-i", path, "LANG=C.UTF-8", *words]
        command += ["sh", "-ec", f"{self._script}\n{script}", "sh", *arguments]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=2 * COMMAND_TIMEOUT_S, check=False
        )
        assert done.returncode == 0, f"{done.stdout}{done.stderr}"
        return done.stdout


_WITHOUT_DEVICE = (
    "mount -t tmpfs -o mode=755 x /dev; mknod -m 666 /dev/null c 1 3; "
    "mknod -m 666 /dev/urandom c 1 9; mkdir -m 1777 /dev/shm"
)


def _show_interpreter() -> str:
    """Lines that let every user run it, also where it lies in root's home."""
    shown = {Path(sys.base_prefix).resolve(), Path(sys.prefix).resolve()}
    hidden = {
        next((p for p in reversed(path.parents) if not p.stat().st_mode & 0o001), None)
        for path in shown
    } - {None}
    lines: list[str] = []
    for top in hidden:
        inside = [path for path in shown if path.is_relative_to(str(top))]
        for number, path in enumerate(inside):
            lines.append(f"mkdir -p /mnt; mount -t tmpfs x /mnt; mkdir /mnt/{number}")
            lines.append(f"mount --bind {path} /mnt/{number}")
        lines.append(f"mount -t tmpfs -o mode=755 x {top}")
        for number, path in enumerate(inside):
            lines.append(f"mkdir -p {path}; mount --move /mnt/{number} {path}")
        lines.append("umount /mnt")
    return "\n".join(lines)


def as_user(*words: str) -> str:
    return " ".join([*USER, *words])


def json_lines(output: str) -> list[Any]:
    return [json.loads(line) for line in output.splitlines() if line.startswith(("[", "{"))]


# -- any user, without a home, with a read-only root


HOMES = {"/": "HOME=/", "none": "", "not there": "HOME=/nonexistent", "read-only root": "HOME=/"}
MACHINES = [
    *((home, True, True) for home in HOMES),
    *((home, home in ("/", "not there"), False) for home in HOMES),
    ("/", False, True),
    ("not there", False, True),
]
"""A home, whether there is a device, and whether the user has a line in /etc/passwd: all machines
that can mount, and of the others each pair of two values."""


@pytest.mark.parametrize(("home", "device", "passwd"), MACHINES)
def test_any_user_mounts_or_copies(
    node: Node, small: Path, uri_of: UriOf, passwd: bool, device: bool, home: str
) -> None:
    read_only = home == "read-only root"
    machine = Machine(node, passwd=passwd, device=device, read_only=read_only)
    script = (
        f'{as_user("env", HOMES[home], "python")} -c "$1" "$2"\n'
        "ls -A / /tmp/cwd | sed s/^/name:/\n"
        f"{as_user('env', HOMES[home], 'ckptfs doctor')} || true\n"
        f"{as_user('env', HOMES[home], 'ckptfs umount --force')} 2>&1 || true\n"
    )
    output = machine.run(script, READ, uri_of(small))
    [[path, text, said]] = json_lines(output)
    assert text == '{"layers": 1}'
    assert not re.search(r"^name:(~|\.cache|nonexistent|\.config)$", output, re.MULTILINE)
    names = re.findall("^name:(.*)$", output, re.MULTILINE)
    assert names[-1] == "/tmp/cwd:"  # and nothing is in it
    assert {*names} == {*os.listdir("/"), "/:", "", "/tmp/cwd:"}
    if passwd and device:
        assert (said, path.partition("/mnt/")[0]) == ([], f"/tmp/ckptfs-{UID}")
        assert re.search(rf"^ok +directories +.*/tmp/ckptfs-{UID}/control.sock", output, re.M)
    else:
        assert path.startswith("/tmp/ckptfs-cop")
        [warning] = said
        assert re.match("ckptfs copies the checkpoint .*: cannot mount", warning)
        cause = "docker run --device /dev/fuse" if not device else f"give uid {UID} a line in"
        assert cause in warning
        assert re.search(rf"^failed +{'mount' if device else 'device'} ", output, re.MULTILINE)


def test_without_mtab_a_user_copies_and_root_mounts(node: Node, small: Path, uri_of: UriOf) -> None:
    """Without it, fusermount3 would mount and then refuse to unmount."""
    hide = "cp -a /etc /tmp/etc; rm /tmp/etc/mtab; mount --bind /tmp/etc /etc"
    machine = Machine(node, before=hide)
    script = (
        f'{as_user("python")} -c "$1" "$2"; python -c "$1" "$2"; ckptfs umount --force\n'
        f"{as_user('ckptfs doctor')} || true; grep ' fuse.ckptfs ' /proc/self/mountinfo || true"
    )
    output = machine.run(script, READ, uri_of(small))
    [path, text, [warning]], [roots, same, nothing] = json_lines(output)
    assert path.startswith("/tmp/ckptfs-cop")
    assert (roots.partition("/mnt/")[0], nothing) == ("/run/ckptfs", [])
    assert text == same == '{"layers": 1}'
    assert warning.endswith("ln -s /proc/self/mounts /etc/mtab, as root")
    assert re.search(r"^failed +mount +.*/etc/mtab is missing", output, re.MULTILINE)
    assert " fuse.ckptfs " not in output


def test_where_only_the_temporary_folder_can_be_written(
    node: Node, small: Path, uri_of: UriOf
) -> None:
    hide = "mount -t tmpfs -o mode=1777 x /media; mount -o remount,bind,ro /tmp"
    machine = Machine(node, read_only=True, before=hide)
    python = as_user("env", "TMPDIR=/media", "HOME=/nonexistent", "python")
    script = f'cd /media; {python} -c "$1" "$2"\n'
    script += as_user("env TMPDIR=/media ckptfs status --json | tr -d '\\n'; echo; ")
    script += as_user("env TMPDIR=/media ckptfs umount --force")
    output = machine.run(script, READ, uri_of(small))
    [path, _, said], status = json_lines(output)
    assert (path.partition("/mnt/")[0], said) == (f"/media/ckptfs-{UID}", [])
    assert status["cache_dir"] == f"/media/ckptfs-{UID}/cache"


def test_root_where_run_is_read_only(node: Node, small: Path, uri_of: UriOf) -> None:
    # Often a mount of its own, to which what is done to / does not matter.
    close = "mount --bind /run /run; mount -o remount,bind,ro /run"
    machine = Machine(node, read_only=True, before=close)
    output = machine.run('python -c "$1" "$2"; ckptfs umount --force', READ, uri_of(small))
    [[path, _, said]] = json_lines(output)
    assert (path.partition("/mnt/")[0], said) == ("/tmp/ckptfs-0", [])


# -- one user, many jobs


def test_jobs_of_a_user_share_a_daemon(node: Node, small: Path, uri_of: UriOf) -> None:
    """Each has a temporary folder of its own, and one is started by a login."""
    login = f"mkdir -p /run/user; mkdir -m 700 /run/user/{UID}; chown {UID} /run/user/{UID}"
    machine = Machine(node, before=f"{login}; mkdir -m 777 /tmp/j1 /tmp/j2")
    jobs = (
        "HOME=/tmp/home TMPDIR=/tmp/j1",
        f"HOME=/tmp/home TMPDIR=/tmp/j2 XDG_RUNTIME_DIR=/run/user/{UID}",
        "TMPDIR=/tmp/j2",
    )
    script = "".join(f'{as_user("env", job, "python")} -c "$1" "$2"\n' for job in jobs)
    script += as_user("ckptfs status --json | tr -d '\\n'; echo; ")
    script += as_user("ckptfs umount --force")
    *reads, status = json_lines(machine.run(script, READ, uri_of(small)))
    assert len({path for path, _, _ in reads}) == 1
    assert status["mount"] == f"/tmp/ckptfs-{UID}/mnt"
    assert status["cache_dir"] == "/tmp/home/.cache/ckptfs"


def test_jobs_that_do_not_see_each_other_have_a_cache_each(
    node: Node, small: Path, uri_of: UriOf
) -> None:
    """Each job has a ``/tmp`` of its own, as by Slurm's job_container/tmpfs; both start at once."""
    machine = Machine(node, before="mount --bind /tmp/home /media")
    user = as_user("env HOME=/media")
    job = (
        f'{over_tmp("mount -t tmpfs -o mode=1777 x")}; cd /; {user} python -c "$1" "$2"; '
        f"{user} ckptfs status --json > /media/status.$3; touch /media/done.$3; "
        "while ! [ -e /media/done.1 -a -e /media/done.2 ]; do sleep 0.1; done; "
        f"{user} ckptfs umount --force"
    )
    script = (
        f'for n in 1 2; do unshare --mount sh -ec \'{job}\' sh "$1" "$2" $n & done; wait\n'
        "for n in 1 2; do tr -d '\\n' < /media/status.$n; echo; done"
    )
    *reads, one, two = json_lines(machine.run(script, READ, uri_of(small)))
    assert [said for _, _, said in reads] == [[], []]
    caches = {one["cache_dir"], two["cache_dir"]}
    assert caches == {"/media/.cache/ckptfs", "/media/.cache/ckptfs-2"}


@pytest.mark.long
def test_the_next_daemon_has_the_cache_of_the_last(node: Node) -> None:
    """Also after a restart, and where the keeper was killed; a program that replaces the keeper
    keeps its lock."""
    machine = Machine(node)
    ckptfs_ = as_user("env HOME=/tmp/home ckptfs")
    where = f"{ckptfs_} status --json | tr -d '\\n'; echo\n"
    locked = "if flock -n /tmp/home/.cache/ckptfs/keeper.lock true; then echo '[\"free\"]'; fi\n"
    script = (
        f"{ckptfs_} mount; {where}{locked}{ckptfs_} restart; {where}{locked}"
        f"{ckptfs_} umount; {ckptfs_} mount; {where}"
        "kill -9 $(grep -sl '_keeper\\.[k]eeper' /proc/[0-9]*/cmdline | cut -d/ -f3)\n"
        f"while {ckptfs_} status > /tmp/said 2>&1; do sleep 0.1; done\n"  # it ends a moment later
        f"{ckptfs_} mount; {where}{ckptfs_} umount"
    )
    found = json_lines(machine.run(script))
    assert [each["cache_dir"] for each in found] == ["/tmp/home/.cache/ckptfs"] * 4


def test_a_process_of_another_group_is_told_why_it_does_not_see_the_mount(
    node: Node, small: Path, uri_of: UriOf
) -> None:
    """As with newgrp(1), sg(1) and ``sbatch --gid``; where everybody may look, it may, too."""
    machine = Machine(node)
    other = f"setpriv --reuid={UID} --regid={OTHER} --clear-groups"
    script = (
        f'{as_user("ckptfs mount")}; {other} python -c "$1" "$2"; '
        f"{other} ckptfs doctor | grep ' daemon ' || true; "
        f'{as_user("ckptfs umount")}; ckptfs mount --allow-other; {other} python -c "$1" "$2"; '
        "ckptfs umount"
    )
    output = machine.run(script, READ, uri_of(small))
    [_, _, [said]], [path, _, nothing] = json_lines(output)
    why = f"/tmp/ckptfs-{UID}/mnt is a mount of group {UID}, which the kernel demands"
    assert f"{why}, and this process has group {OTHER}; run this as group {UID} (sg)" in said
    assert re.search(rf"^failed +daemon .*{why}", output, re.MULTILINE)
    assert (path.partition("/mnt/")[0], nothing) == ("/run/ckptfs", [])


def test_a_daemons_directories_do_not_age(node: Node) -> None:
    """systemd-tmpfiles(8) passes by what it cannot lock. A program that replaces the keeper keeps
    the lock, and it ends with the keeper."""
    machine = Machine(node)
    folder = f"/tmp/ckptfs-{UID}"
    ckptfs_ = as_user("ckptfs")
    look = (
        f"for at in {folder} /var/tmp/ckptfs-{UID}/cache; do "
        "if flock --nonblock $at true; then echo free; else echo kept; fi; done\n"
    )
    script = f"{ckptfs_} mount\n{look}{ckptfs_} restart\n{look}{ckptfs_} umount\n{look}"
    found = [line for line in machine.run(script).splitlines() if line in ("free", "kept")]
    assert found == ["kept"] * 4 + ["free"] * 2


def test_a_cache_in_the_daemons_own_directory(node: Node, small: Path, uri_of: UriOf) -> None:
    machine = Machine(node)
    user = as_user("env", f"CKPTFS_CACHE_DIR=/tmp/ckptfs-{UID}")
    script = f'{user} python -c "$1" "$2"; {user} ckptfs umount'
    [[path, _, said]] = json_lines(machine.run(script, READ, uri_of(small)))
    assert (path.partition("/mnt/")[0], said) == (f"/tmp/ckptfs-{UID}", [])


def test_a_mount_that_another_daemon_serves_stays(node: Node, small: Path, uri_of: UriOf) -> None:
    """A socket of its own is not enough for a second daemon; one that has died is replaced."""
    machine = Machine(node)
    first = as_user("env HOME=/tmp/home ckptfs")
    second = as_user("env HOME=/tmp/home CKPTFS_SOCKET=/tmp/home/other.sock ckptfs")
    library = as_user("env HOME=/tmp/home CKPTFS_SOCKET=/tmp/home/other.sock python")
    script = (
        f'at=$({first} attach "$1"); {second} mount 2>&1 || true; {as_user("cat $at/config.json")};'
        f'echo; {library} -c "$2" "$1"; {as_user("cat $at/config.json")}; echo\n'
        "kill -9 $(pgrep -f ckptfs._keeper.keeper)\n"
        f"{second} mount; {second} umount"
    )
    output = machine.run(script, uri_of(small), READ)
    refusal, content, copied, again, served = output.splitlines()
    mount = f"/tmp/ckptfs-{UID}/mnt"
    why = f"mount point {mount} is in use by another ckptfs daemon, whose socket is not"
    assert f"{why} /tmp/home/other.sock; set CKPTFS_MOUNT" in refusal
    assert content == again == '{"layers": 1}'
    path, text, [warning] = json.loads(copied)
    assert (text, "/ckptfs-copy-" in path) == (content, True)
    assert why in warning
    assert served == mount


# -- other users


@pytest.mark.parametrize(
    "plant",
    [
        "mkdir -m 777 {0}; chown {1} {0}",
        "ln -s /tmp/home {0}; chown -h {1} {0}",
        "touch {0}; chown {1} {0}",
    ],
)
def test_a_planted_directory_is_passed_over(
    node: Node, small: Path, uri_of: UriOf, plant: str
) -> None:
    planted = f"/tmp/ckptfs-{UID}"
    machine = Machine(node, before=plant.format(planted, OTHER))
    script = (
        f'{as_user("python")} -c "$1" "$2"; ls -A {planted}/ 2>/dev/null | sed s/^/in:/; '
        f"{as_user('ckptfs umount --force')}; {as_user('ckptfs doctor')} | grep ' directories '"
    )
    output = machine.run(script, READ, uri_of(small))
    [[path, _, said]] = json_lines(output)
    assert (path.partition("/mnt/")[0], said) == (f"/var/tmp/ckptfs-{UID}", [])
    assert "in:" not in output
    assert f"not elsewhere, because {planted}" in output


def test_a_daemon_for_other_users_without_a_service(node: Node, small: Path, uri_of: UriOf) -> None:
    machine = Machine(node, before="mkdir -m 700 /run/ckptfs")
    script = (
        f'umask 077; ckptfs mount --allow-other; {as_user("python")} -c "$1" "$2"; '
        "ckptfs umount --force"
    )
    [[path, _, said]] = json_lines(machine.run(script, READ, uri_of(small)))
    assert (path.partition("/mnt/")[0], said) == ("/run/ckptfs", [])


def test_root_is_told_why_it_does_not_see_a_users_mount(
    node: Node, small: Path, uri_of: UriOf
) -> None:
    machine = Machine(node)
    script = (
        f'at=$({as_user("ckptfs attach")} "$1"); ls $at 2>&1 || true; '
        "ckptfs ls $at 2>&1 || true; "
        f'CKPTFS_SOCKET=/tmp/ckptfs-{UID}/control.sock ckptfs attach "$1" 2>&1 || true; '
        f"{as_user('ckptfs doctor')} | grep allow-other; {as_user('ckptfs umount --force')}"
    )
    output = machine.run(script, uri_of(small))
    ls, ours, attach, doctor = output.splitlines()
    assert ls.endswith("Permission denied")
    assert f"/tmp/ckptfs-{UID}/mnt is a mount of uid {UID}" in ours
    assert "not even root" in ours
    assert f"is served by uid {UID}, which is neither you nor root" in attach
    assert "not even root and Docker, can" in doctor


# -- places that are configured


def _take_cache(node: Node) -> dict[str, str]:
    node.here("mount")
    return {
        "CKPTFS_SOCKET": f"{node.folder}/other.sock",
        "CKPTFS_MOUNT": f"{node.folder}/other",
    }


def _give_cache_away(node: Node) -> dict[str, str]:
    node.cache_dir.mkdir()
    os.chown(node.cache_dir, OTHER, OTHER)
    return {}


def _fill_mount(node: Node) -> dict[str, str]:
    node.mount.mkdir()
    (node.mount / "mine").touch()
    return {}


def _of_file(name: str) -> Callable[[Node], dict[str, str]]:
    def configure(node: Node) -> dict[str, str]:
        return {name: str(node.folder / "ckptfs.toml" / "x")}

    return configure


PLACES: dict[str, tuple[Callable[[Node], dict[str, str]], str]] = {
    "cache in use": (_take_cache, "is in use by another ckptfs daemon"),
    "cache of another user": (_give_cache_away, "belongs to uid"),
    "cache in a file": (_of_file("CKPTFS_CACHE_DIR"), "Not a directory"),
    "socket in a file": (_of_file("CKPTFS_SOCKET"), "Not a directory"),
    "socket too long": (lambda n: {"CKPTFS_SOCKET": f"{n.folder}/{'x' * 108}"}, "is longer than"),
    "mount that is not empty": (_fill_mount, "is not empty"),
    "mount in a file": (_of_file("CKPTFS_MOUNT"), "Not a directory"),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_configured_place_that_cannot_be_used(
    node: Node, small: Path, uri_of: UriOf, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """In mode "auto" it is copied, "mount" and the command line fail, and doctor tells before."""
    node.expected_in_log += ["mount point", "is in use by another", "cache directory"]
    configure, cause = PLACES[place]
    checkpoint = ckptfs.Checkpoint(uri_of(small))
    with monkeypatch.context() as other:
        for name, value in configure(node).items():
            other.setenv(name, value)
        with (
            pytest.warns(UserWarning, match=f"ckptfs copies the checkpoint .*: .*{cause}"),
            checkpoint.as_directory() as path,
        ):
            assert Path(path, "config.json").read_text() == '{"layers": 1}'
        with (
            pytest.raises(ckptfs.PlaceUnusable, match=cause),
            checkpoint.as_directory(mode="mount"),
        ):
            pass
        done = node.here("attach", uri_of(small), check=False)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
        doctor = node.here("doctor", check=False)
        assert doctor.returncode == 1
    assert issubclass(ckptfs.PlaceUnusable, (ckptfs.CannotMount, ckptfs.ConfigError))


# -- a cache on an overlay


def test_a_cache_on_an_overlay(node: Node) -> None:
    """While passthrough is on, the kernel lets no overlay lie over the mount."""
    layers = "mkdir /tmp/l /tmp/u /tmp/w /tmp/o /tmp/u2 /tmp/w2 /tmp/o2"
    over = "mount -t overlay x -o lowerdir=/tmp/l,upperdir=/tmp/u,workdir=/tmp/w /tmp/o"
    machine = Machine(node, before=f"{layers}; {over}")
    try_it = (
        "if mount -t overlay x -o lowerdir=/run/ckptfs/mnt,upperdir=/tmp/u2,workdir=/tmp/w2 "
        "/tmp/o2 2>/dev/null; then umount /tmp/o2; echo over:yes; else echo over:no; fi\n"
    )
    script = (
        f"ckptfs doctor | grep cache-place; ckptfs mount; {try_it} ckptfs umount\n"
        f"ckptfs mount --set passthrough=false; {try_it} ckptfs umount"
    )
    output = machine.run(script, CKPTFS_CACHE_DIR="/tmp/o/cache")
    assert re.search(r"^warning +cache-place +.* is on overlay, .*passthrough = false", output)
    has_passthrough = tuple(map(int, re.findall(r"\d+", os.uname().release)[:2])) >= (6, 9)
    assert re.findall("over:(.*)", output) == ["no" if has_passthrough else "yes", "yes"]
