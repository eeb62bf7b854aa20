"""The places that are chosen where none is configured, on machines of each kind."""

import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

import ckptfs
from ckptfs._config import paths
from ckptfs._config.load import load, load_again
from ckptfs._keeper import launch
from ckptfs._os import mountinfo

OTHER = 65533


class Machine:
    """A machine whose fixed places are in a folder, and a user of it: the test's own.

    `kinds` are types of file systems by folder; elsewhere it is ext4.
    """

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        self.tmp, self.var_tmp = folder / "t", folder / "v"
        self.home.mkdir()
        for shared in (self.tmp, self.var_tmp):
            shared.mkdir()
            shared.chmod(0o1777)
        self.kinds: dict[Path, str] = {}
        self.environ = {"HOME": str(self.home)}

    def kind(self, path: "str | os.PathLike[str]") -> str:
        path = Path(path)
        return next((k for top, k in self.kinds.items() if path.is_relative_to(top)), "ext4")

    def runtime(self, **environ: str) -> Path:
        return paths.chosen(paths.runtime_places(self.environ | environ))

    def cache(self, **environ: str) -> Path:
        return paths.chosen(paths.cache_places(self.environ | environ))


UID = 4242


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """The user is root by rights, so that files can be given away, and `UID` by number. Its path is
    short: the socket's name has a limit of 107 bytes (unix(7))."""
    folder = Path(tempfile.mkdtemp(prefix="p"))
    found = Machine(folder)
    monkeypatch.setattr(paths, "_SHARED", (found.tmp, found.var_tmp))
    monkeypatch.setattr(paths, "_LOGINS", folder / "l")
    monkeypatch.setattr(paths, "filesystem_type", found.kind)
    monkeypatch.setattr(os, "geteuid", lambda: UID)
    os.chown(found.home, UID, UID)
    yield found
    shutil.rmtree(folder)


def listen(folder: Path, uid: int = UID) -> None:
    folder.mkdir(mode=0o700, exist_ok=True)
    os.chown(folder, uid, uid)
    with socket.socket(socket.AF_UNIX) as listening:
        at = os.open(folder, os.O_RDONLY)
        listening.bind(f"/proc/self/fd/{at}/{paths.SOCKET_NAME}")
        os.close(at)
    os.chown(folder / paths.SOCKET_NAME, uid, uid)


def test_the_place_does_not_depend_on_how_a_process_was_started(machine: Machine) -> None:
    wanted = machine.tmp / f"ckptfs-{UID}"
    job = machine.home / "job"
    job.mkdir()
    for environ in (
        {},
        {"TMPDIR": str(job)},
        {"XDG_RUNTIME_DIR": str(job)},
        {"HOME": "/"},
        {"HOME": ""},
    ):
        assert machine.runtime(**environ) == wanted
    assert not wanted.exists()
    for environ in ({}, {"TMPDIR": str(job)}, {"XDG_RUNTIME_DIR": str(job)}):
        assert machine.cache(**environ) == machine.home / ".cache" / "ckptfs"


def _plant_folder(at: Path) -> None:
    at.mkdir(mode=0o777)
    os.chown(at, OTHER, OTHER)


def _plant_link(at: Path) -> None:
    at.symlink_to(at.parent.parent / "home")
    os.chown(at, OTHER, OTHER, follow_symlinks=False)


def _plant_file(at: Path) -> None:
    at.touch()


def _plant_open_folder(at: Path) -> None:
    at.mkdir()
    os.chown(at, UID, UID)
    at.chmod(0o777)


def _plant_socket(at: Path) -> None:
    listen(at, OTHER)


def _plant_socket_in_open_folder(at: Path) -> None:
    _plant_open_folder(at)
    listen(at, OTHER)
    os.chown(at, UID, UID)


@pytest.mark.parametrize(
    "plant",
    [
        *(_plant_folder, _plant_link, _plant_file, _plant_open_folder, _plant_socket),
        _plant_socket_in_open_folder,
    ],
)
def test_runtime_place_planted_by_another_user_is_passed_over(
    machine: Machine, plant: Callable[[Path], None]
) -> None:
    name = f"ckptfs-{UID}"
    plant(machine.tmp / name)
    assert machine.runtime() == machine.var_tmp / name
    first, *_ = paths.runtime_places(machine.environ)
    assert str(machine.tmp / name) in first.fault
    plant(machine.var_tmp / name)
    machine.environ["TMPDIR"] = str(machine.home)
    assert machine.runtime() == machine.home / name
    machine.environ["HOME"] = "/"
    assert machine.cache() == machine.home / name / "cache"


def test_runtime_place_with_our_socket_goes_first(machine: Machine) -> None:
    second = machine.var_tmp / f"ckptfs-{UID}"
    listen(second)
    assert machine.runtime() == second
    listen(machine.tmp / f"ckptfs-{UID}")
    assert machine.runtime() == machine.tmp / f"ckptfs-{UID}"


def test_a_login_does_not_change_the_place_but_a_service_of_the_user_does(machine: Machine) -> None:
    login = paths._LOGINS / str(UID)
    login.mkdir(parents=True, mode=0o700)
    os.chown(login, UID, UID)
    shared = machine.tmp / f"ckptfs-{UID}"
    assert machine.runtime(XDG_RUNTIME_DIR=str(login)) == shared
    listen(shared)
    listen(login / "ckptfs")  # as systemd does for ckptfs.socket
    assert machine.runtime() == login / "ckptfs"
    shutil.rmtree(login / "ckptfs")
    shutil.rmtree(shared)
    for folder in (machine.tmp, machine.var_tmp):
        _plant_folder(folder / f"ckptfs-{UID}")
    assert machine.runtime() == login / "ckptfs"


def test_a_folder_without_room_is_passed_over(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    statvfs = os.statvfs

    def full(path: Path) -> os.statvfs_result:
        space = list(statvfs(path))
        if Path(path).is_relative_to(machine.tmp):
            space[7] = 0  # f_favail
        if Path(path).is_relative_to(machine.home):
            space[4] = 0  # f_bavail
        return os.statvfs_result(space)

    monkeypatch.setattr(os, "statvfs", full)
    assert machine.runtime() == machine.var_tmp / f"ckptfs-{UID}"
    assert machine.cache() == machine.var_tmp / f"ckptfs-{UID}" / "cache"
    # A cache that is there can make room for itself.
    (machine.home / ".cache" / "ckptfs").mkdir(parents=True)
    os.chown(machine.home / ".cache" / "ckptfs", UID, UID)
    assert machine.cache() == machine.home / ".cache" / "ckptfs"


def test_a_path_too_long_for_a_socket_is_passed_over(machine: Machine) -> None:
    for folder in (machine.tmp, machine.var_tmp):
        _plant_file(folder / f"ckptfs-{UID}")
    deep = machine.home / ("d" * 100)
    deep.mkdir()
    places = paths.runtime_places({"TMPDIR": str(deep)})
    assert "too long for a socket" in places[-1].fault


@pytest.mark.parametrize("home", ["/", "", "relative", "/nonexistent", "~"])
def test_without_a_home_nothing_is_made_in_its_place(
    machine: Machine, home: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(machine.tmp.parent)
    environ = {"HOME": home}
    assert paths.user_folder(environ, "CACHE") is None
    assert paths.user_folder(environ, "CONFIG") is None
    assert machine.cache(HOME=home) == machine.var_tmp / f"ckptfs-{UID}" / "cache"
    assert paths.kept_place(environ) == machine.var_tmp / f"ckptfs-{UID}"
    config = load(environ).config
    assert config.cache_dir == str(machine.var_tmp / f"ckptfs-{UID}" / "cache")
    assert config.socket == str(machine.tmp / f"ckptfs-{UID}" / "control.sock")
    assert sorted(os.listdir()) == ["home", "t", "v"]


def test_user_folder_follows_absolute_xdg_variables(machine: Machine) -> None:
    given = {"XDG_CACHE_HOME": str(machine.var_tmp), "XDG_CONFIG_HOME": "relative"}
    assert paths.user_folder(machine.environ | given, "CACHE") == machine.var_tmp / "ckptfs"
    home_s = machine.home / ".config" / "ckptfs"
    assert paths.user_folder(machine.environ | given, "CONFIG") == home_s
    assert machine.cache(**given) == machine.var_tmp / "ckptfs"


def test_a_tilde_without_a_home_is_an_error(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "~")  # what expanduser(3) of Python leaves for a user without one
    monkeypatch.chdir(machine.home)
    with pytest.raises(ckptfs.LocationError, match="has no home directory"):
        ckptfs.Checkpoint.from_directory("~/run")
    checkpoint = ckptfs.Checkpoint.from_directory(machine.home)
    with pytest.raises(ckptfs.LocationError, match="has no home directory"):
        checkpoint.to_directory("~/copy")
    assert os.listdir(machine.home) == []


@pytest.mark.parametrize("kind", ["nfs4", "lustre", "gpfs", "beegfs", "cifs", "9p", "fuse.sshfs"])
def test_a_home_on_many_machines_has_a_cache_on_each(machine: Machine, kind: str) -> None:
    machine.kinds[machine.home] = kind
    assert machine.cache() == machine.var_tmp / f"ckptfs-{UID}" / "cache"
    # Memory is worse than that home, where the directory is named after the machine.
    machine.kinds[machine.tmp] = machine.kinds[machine.var_tmp] = "tmpfs"
    named = machine.cache()
    assert named.parent == machine.home / ".cache" / "ckptfs"
    assert named.name.startswith("node-")
    assert os.uname().nodename in named.name
    # The folder that a user keeps is for all machines.
    assert paths.kept_place(machine.environ) == machine.home / ".cache" / "ckptfs"
    machine.environ["HOME"] = "/"
    assert machine.cache() == machine.var_tmp / f"ckptfs-{UID}" / "cache"


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "overlay", "zfs", "fuse.fuse-overlayfs"])
def test_a_home_of_one_machine_has_the_cache(machine: Machine, kind: str) -> None:
    machine.kinds[machine.home] = kind
    assert machine.cache() == machine.home / ".cache" / "ckptfs"


def test_cache_place_without_a_usable_one_is_the_first(machine: Machine) -> None:
    for folder in (machine.tmp, machine.var_tmp):
        _plant_folder(folder / f"ckptfs-{UID}")
    os.chown(machine.home, OTHER, OTHER)
    (machine.home / ".cache").touch()
    places = paths.cache_places(machine.environ)
    assert all(place.fault for place in places)
    assert paths.chosen(places) == machine.home / ".cache" / "ckptfs"


def test_folders_are_made_for_this_user_alone_whatever_the_umask_is(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        paths.make_folder(tmp_path / "a" / "b")
        paths.make_folder(tmp_path / "a" / "b")
        os.umask(0o077)
        paths.make_folder(tmp_path / "c" / "d", 0o755)
    finally:
        os.umask(before)
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("a", "a/b", "c", "c/d")]
    assert modes == [0o700, 0o700, 0o755, 0o755]
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        paths.make_folder(tmp_path / "file" / "x")


def test_a_reload_keeps_the_places_that_were_chosen(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(os.environ):
        if name.startswith("CKPTFS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(machine.home))
    monkeypatch.setenv("CKPTFS_MOUNT", "/configured/before")
    before = load().config
    listen(machine.var_tmp / f"ckptfs-{UID}")  # another place would be chosen now
    monkeypatch.setenv("CKPTFS_MOUNT", "/configured/now")
    after = load_again(before)
    assert (after.socket, after.cache_dir) == (before.socket, before.cache_dir)
    assert after.mount == "/configured/now"


# -- what is mounted


def test_filesystem_type_is_that_of_the_last_mount_above_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert mountinfo.filesystem_type("/proc/self") == "proc"
    assert mountinfo.filesystem_type(tmp_path / "not" / "there") == mountinfo.filesystem_type(
        tmp_path
    )
    lines = [
        mountinfo.MountLine("/", "8:1", "ext4", "rw", "/"),
        mountinfo.MountLine("/a b", "0:1", "nfs4", "rw", "/"),
        mountinfo.MountLine("/a", "0:2", "xfs", "rw", "/"),
        mountinfo.MountLine("/a", "0:3", "tmpfs", "rw", "/"),
        mountinfo.MountLine("/m", "0:4", "fuse.ckptfs", "rw,user_id=7,group_id=7", "/"),
        mountinfo.MountLine("/o", "0:5", "fuse.ckptfs", "rw,user_id=7,allow_other", "/"),
    ]
    monkeypatch.setattr(mountinfo, "mount_table", lambda: lines)
    for path, kind in (("/a b/x", "nfs4"), ("/a/x", "tmpfs"), ("/ab", "ext4"), ("/", "ext4")):
        assert mountinfo.filesystem_type(path) == kind
    assert "mount of uid 7" in mountinfo.why_hidden("/m/run/file")
    assert "not even root" in mountinfo.why_hidden("/m")
    assert mountinfo.why_hidden("/o/run") == mountinfo.why_hidden("/a/x") == ""
    monkeypatch.setattr(os, "geteuid", lambda: 7)
    assert "a mount of group 7" in mountinfo.why_hidden("/m/run/file")
    monkeypatch.setattr(os, "getegid", lambda: 7)
    assert mountinfo.why_hidden("/m/run/file") == ""


def test_mount_table_unescapes_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all("\\" not in line.path for line in mountinfo.mount_table())
    assert {"proc"} <= {line.kind for line in mountinfo.mount_table()}


# -- caches beside each other


def test_cache_in_use_by_another_daemon_gets_a_sibling(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "DYING_S", 0.0)
    monkeypatch.setattr(paths, "fault_of", lambda *_, **__: "")
    held: list[int] = []
    loaded = load(machine.environ)
    first = machine.home / ".cache" / "ckptfs"
    names: list[str] = []
    for number in range(paths.SIBLINGS_MAX):
        config = loaded.config
        other = loaded._replace(config=msgspec.structs.replace(config, socket=f"/s{number}"))
        claimed, fd = launch.claim_cache(other, machine.environ)
        names.append(Path(claimed.cache_dir).name)
        held.append(fd)
        assert launch.is_kept(first)
    assert names == ["ckptfs", *(f"ckptfs-{n}" for n in range(2, paths.SIBLINGS_MAX + 1))]
    directory, faults = launch.free_cache(machine.environ)
    assert directory == machine.var_tmp / f"ckptfs-{UID}" / "cache"
    assert len(faults) == paths.SIBLINGS_MAX
    os.close(held.pop(2))
    directory, _ = launch.free_cache(machine.environ)
    assert directory == first.with_name("ckptfs-3")
    for fd in held:
        os.close(fd)


def test_a_socket_of_that_path_in_another_namespace_is_no_predecessor(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jobs whose /tmp is their own share a home: the next one waits for no other. But a keeper that
    comes after another one of the same socket waits until that one has ended."""
    monkeypatch.setattr(paths, "fault_of", lambda *_, **__: "")
    waited: list[float] = []
    monkeypatch.setattr(launch.time, "sleep", waited.append)
    held: list[int] = []
    loaded = load(machine.environ)
    for number in range(4):
        monkeypatch.setattr(os, "readlink", lambda _, n=number: f"mnt:[{n}]")
        config, fd = launch.claim_cache(loaded, machine.environ)
        held.append(fd)
        assert Path(config.cache_dir).name == ("ckptfs" if not number else f"ckptfs-{number + 1}")
        assert not waited
    monkeypatch.setattr(os, "readlink", lambda _: "mnt:[2]")
    monkeypatch.setattr(launch.time, "sleep", lambda _: os.close(held.pop(2)))
    config, fd = launch.claim_cache(loaded, machine.environ)
    held.append(fd)
    assert config.cache_dir.endswith("ckptfs-3")
    assert len(held) == 4
    for fd in held:
        os.close(fd)
