"""How checks are run, and what each says where the machine cannot be made that bad: by fakes."""

import contextlib
import errno
import itertools
import os
import resource
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptfs._doctor import checks, disk, node, plan, serving, store
from ckptfs._doctor.checks import Check, Examination, Outcome, Result, ok, skipped, warning
from ckptfs._model.config import Config
from ckptfs._model.location import Location
from ckptfs._mount import session
from ckptfs._os import mountinfo
from ckptfs.errors import StoreError

MIB = 1 << 20

# -- running


def results_of(*given: Check) -> dict[str, Result]:
    return {result.name: result for result in Examination(given).results()}


def check(name: str, look: Callable[[], Outcome], **more: object) -> Check:
    return Check(name, look, "do something", "group", **more)  # type: ignore[arg-type]


def raising(error: Exception) -> Callable[[], Outcome]:
    def look() -> Outcome:
        raise error

    return look


def test_a_check_that_does_not_end_is_left_alone() -> None:
    ends = threading.Event()

    def hang() -> Outcome:
        ends.wait()
        return ok("too late")

    examination = Examination(
        [
            check("hangs", hang, timeout_s=0.1),
            check("other", lambda: ok("fine")),
            check("next", lambda: ok("never"), needs=("hangs",)),
        ]
    )
    found = list(examination.results())
    ends.set()
    assert [(r.name, r.status, r.message, r.remedy) for r in found] == [
        ("hangs", "failed", "no result within 0.1 s", "do something"),
        ("other", "ok", "fine", ""),
        ("next", "skipped", "because of hangs", ""),
    ]
    assert examination.has_late


def test_what_a_check_raises_is_its_result() -> None:
    found = results_of(
        check("ours", raising(StoreError("it is broken; mend it"))),
        check("short", raising(StoreError("it is broken"))),
        check("disk", raising(OSError(errno.EIO, "Input/output error"))),
        check("bug", raising(KeyError("x"))),
    )
    said = {name: (r.status, r.message, r.remedy) for name, r in found.items()}
    assert said == {
        "ours": ("failed", "it is broken", "mend it"),
        "short": ("failed", "it is broken", "do something"),
        "disk": ("failed", "[Errno 5] Input/output error", "do something"),
        "bug": ("failed", "KeyError: 'x'", "do something"),
    }


def test_checks_wait_for_others_and_are_skipped_with_them() -> None:
    order: list[str] = []

    def look(name: str, outcome: Outcome) -> Callable[[], Outcome]:
        def noted() -> Outcome:
            order.append(name)
            return outcome

        return noted

    found = results_of(
        check("last", look("last", ok("")), after=("fails", "warns"), unless_failed=("not here",)),
        check("needs warned", look("needs warned", ok("")), needs=("warns",)),
        check("needs skipped", look("needs skipped", ok("")), needs=("not here",)),
        check("behind it", look("behind it", ok("")), needs=("behind",)),
        check("behind", look("behind", ok("")), needs=("fails",)),
        check("unless", look("unless", ok("")), unless_failed=("behind",)),
        check("not here", look("not here", skipped("it is not for us"))),
        check("fails", raising(OSError("broken"))),
        check("warns", look("warns", warning("slow", "hurry"))),
    )
    assert list(found) == [
        *("last", "needs warned", "needs skipped", "behind it", "behind", "unless"),
        *("not here", "fails", "warns"),
    ]
    said = {name: (result.status, result.message) for name, result in found.items()}
    assert said["last"] == ("ok", "")
    assert said["needs warned"] == ("ok", "")
    assert said["needs skipped"] == ("skipped", "it is not for us")
    assert said["behind"] == said["behind it"] == said["unless"] == ("skipped", "because of fails")
    assert order.index("warns") < order.index("last")
    assert sorted(order) == ["last", "needs warned", "not here", "warns"]


def test_what_a_store_says_cannot_move_the_cursor() -> None:
    (result,) = results_of(check("evil", lambda: ok("\x1b[2Jgone\nok  device"))).values()
    assert result.message == r"\x1b[2Jgone\nok  device"


def test_all_checks_are_known_and_each_has_a_remedy() -> None:
    with plan.all_checks("") as found:
        names = [each.name for each in found]
    assert names == [
        *("config", "package", "device", "fusermount", "mount", "restart", "passthrough"),
        *("request-size", "allow-other", "limits"),
        *("daemon", "version", "daemon-job", "leftover-mounts"),
        *("directories", "cache-place", "cache-space", "cache-speed"),
        *("location", "settings", "credentials", "store-name", "store-connect", "store-tls"),
        "clock",
        *("store-list", "store-read"),
    ]
    assert all(each.remedy for each in found)
    groups = [group for group, _ in itertools.groupby(each.group for each in found)]
    assert groups == ["machine", "daemon", "cache", "store"]
    for each in found:
        assert {*each.needs, *each.unless_failed, *each.after} <= {*names}


# -- a machine, made as bad as it can be


@pytest.fixture
def machine(tmp_path: Path) -> node.Node:
    """One whose files are below `tmp_path`."""
    machine = node.Node()
    machine.config = Config(
        socket=str(tmp_path / "run" / "sock"),
        mount=str(tmp_path / "run" / "mnt"),
        cache_dir=str(tmp_path / "cache"),
    )
    return machine


def assert_says(outcome: Outcome, status: checks.Status, *words: str) -> None:
    assert outcome.status == status, outcome
    text = f"{outcome.message} → {outcome.remedy}"
    assert all(word in text for word in words), text
    assert bool(outcome.remedy) == (status in ("warning", "failed"))


def test_no_device(machine: node.Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "DEVICE", tmp_path / "fuse")
    assert_says(machine.device(), "failed", "does not exist", "modprobe fuse")
    (tmp_path / "fuse").touch()
    assert_says(machine.device(), "failed", "is not a device", "--device /dev/fuse")


@pytest.mark.parametrize(
    ("uid", "words"), [(0, ("device cgroup", "--device")), (1000, ("chmod 666",))]
)
def test_a_device_that_must_not_be_opened(
    machine: node.Node, monkeypatch: pytest.MonkeyPatch, uid: int, words: tuple[str, ...]
) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(node, "DEVICE", Path("/dev/null"))
    monkeypatch.setattr(node.os, "open", refuse)
    monkeypatch.setattr(node.os, "geteuid", lambda: uid)
    assert_says(machine.device(), "failed", "Operation not permitted", *words)


def test_fusermount(machine: node.Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node.os, "geteuid", lambda: 1000)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert_says(
        machine.fusermount(), "failed", "fusermount3 is not installed", "install the package fuse3"
    )
    shutil.copy("/bin/true", tmp_path / "fusermount3")
    assert_says(machine.fusermount(), "failed", "not setuid root", "chmod u+s")
    monkeypatch.setattr(node.os, "geteuid", lambda: 0)
    assert_says(machine.fusermount(), "skipped", "root")


@pytest.mark.mount
@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ("could not determine username", "a line in /etc/passwd"),
        ("too many FUSE filesystems mounted; mount_max=N can be set in ...", "raise mount_max"),
        ("something else", "install the package fuse3"),
    ],
)
def test_what_fusermount_says(
    machine: node.Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, remedy: str
) -> None:
    (tmp_path / "fusermount3").write_text(f"#!/bin/sh\necho 'fusermount3: {said}' >&2; exit 1\n")
    (tmp_path / "fusermount3").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(node.os, "geteuid", lambda: 1000)
    with plan.all_checks("") as found:
        (its_check,) = [each for each in found if each.name == "mount"]
    (result,) = results_of(its_check._replace(look=machine.mount, needs=(), after=())).values()
    outcome = Outcome(result.status, result.message, result.remedy)
    assert_says(outcome, "failed", said.partition(";")[0], remedy)


def test_user_allow_other(
    machine: node.Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_says(
        machine.other_users(), "skipped", "only uid 0 can read the mount; no other user can"
    )
    with monkeypatch.context() as as_user:
        as_user.setattr(node.os, "geteuid", lambda: 1000)
        assert_says(
            machine.other_users(), "skipped", "only uid 1000 can", "not even root and Docker, can"
        )
    config = machine.config
    fields = {name: getattr(config, name) for name in ("socket", "mount", "cache_dir")}
    machine.config = Config(**fields, allow_other=True)
    run = Path(machine.config.socket).parent
    run.mkdir(mode=0o700)
    assert_says(
        machine.other_users(), "failed", f"{run} gives other users no access", f"chmod o+x {run}"
    )
    fields |= {"socket": "/run/ckptfs-test/sock", "mount": "/run/ckptfs-test/mnt"}
    machine.config = Config(**fields, allow_other=True)
    assert_says(machine.other_users(), "ok", "root")
    conf = tmp_path / "fuse.conf"
    monkeypatch.setattr(node, "FUSE_CONF", conf)
    monkeypatch.setattr(node.os, "geteuid", lambda: 1000)
    assert_says(machine.other_users(), "failed", f"echo user_allow_other >> {conf}")
    conf.write_text("#user_allow_other\n")
    assert_says(machine.other_users(), "failed", f"echo user_allow_other >> {conf}")
    conf.write_text("mount_max = 10\nuser_allow_other \n")
    assert_says(machine.other_users(), "ok", str(conf))


def test_directories(machine: node.Node, tmp_path: Path) -> None:
    run, cache = tmp_path / "run", tmp_path / "cache"
    assert_says(machine.directories(), "ok", str(run), str(cache))
    assert not run.exists()
    run.touch()
    assert_says(machine.directories(), "failed", f"{run} is not a directory", "CKPTFS_SOCKET")
    run.unlink()
    cache.mkdir()
    cache.chmod(0o1777)  # sticky does not do for a cache
    assert_says(machine.directories(), "failed", f"{cache} belongs to another", "chown")
    cache.chmod(0o700)
    os.chown(cache, 65534, 65534)
    assert_says(machine.directories(), "failed", f"{cache} belongs to another", "chown")
    os.chown(cache, 0, 0)
    (run / "mnt").mkdir(parents=True)
    assert_says(machine.directories(), "ok")
    (run / "mnt" / "mine").touch()
    assert_says(machine.directories(), "failed", "is not empty", "CKPTFS_MOUNT")
    shutil.rmtree(run / "mnt")
    (run / "mnt").touch()
    assert_says(machine.directories(), "failed", "mnt is not a directory", "CKPTFS_MOUNT")


def test_directories_of_a_user(
    machine: node.Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node.os, "access", lambda *_: False)
    assert_says(machine.directories(), "failed", "this user cannot make", "make it as root")
    (tmp_path / "run").mkdir()
    assert_says(machine.directories(), "failed", "this user cannot write to", "chmod u+rwx")
    (tmp_path / "run").rmdir()
    monkeypatch.undo()
    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(node.os, "geteuid", lambda: 1000)  # whose root's directory is not
    assert_says(machine.directories(), "failed", "belongs to another user", "CKPTFS_CACHE_DIR")


def test_package(machine: node.Node, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_says(machine.package(), "ok", "pyfuse3 3.")
    monkeypatch.setattr(node, "find_spec", lambda name: None if name == "pyfuse3" else name)
    assert_says(
        machine.package(), "failed", "without pyfuse3", "install ckptfs with its extra 'daemon'"
    )
    machine.served_by = "/run/sock"
    assert_says(machine.package(), "skipped", "the daemon at /run/sock mounts for this user")


def test_a_client_in_a_container_need_not_mount(
    machine: node.Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node, "DEVICE", tmp_path / "fuse")
    machine.served_by = "/run/sock"
    listed = plan._of_machine(machine) + plan._of_cache(machine, disk.Disk(machine))
    looks = {check.name: check.look for check in listed}
    names = "device", "fusermount", "mount", "directories", "cache-place", "cache-space"
    for name in (*names, "cache-speed"):
        assert_says(looks[name](), "skipped", "the daemon at /run/sock mounts for this user")


def test_limits_of_a_daemon_out_of_sight(
    machine: node.Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    machine.daemon_pid = 1
    monkeypatch.setattr(resource, "prlimit", refuse)
    assert_says(machine.limits(), "skipped", "pid 1")


# -- kernels that are older


@pytest.mark.mount
def test_an_older_kernel(machine: node.Node, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = session.answer_init

    def answer_as_older(fd: int, _: int) -> session.Features:
        answer(fd, 0)
        return session.Features(passthrough=False, resend=False)

    monkeypatch.setattr(session, "answer_init", answer_as_older)
    monkeypatch.setattr(session, "set_read_ahead", lambda *_: False)
    assert_says(machine.mount(), "ok")
    assert_says(machine.restarts(), "warning", "the mount ends", "Linux 6.9 or later")
    assert_says(machine.passes_through(), "warning", "Linux 6.9")
    assert_says(machine.request_size(), "warning", "read_ahead_kb is read-only", "/sys")
    machine.passthrough = "on"  # what the daemon says that runs
    assert_says(machine.passes_through(), "ok")


@pytest.mark.mount
def test_passthrough_needs_a_disk(machine: node.Node, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.passthrough = "off: the cache is on a stacked file system; set cache_dir to another"
    assert_says(machine.passes_through(), "warning", "stacked", "set cache_dir to another")
    machine.passthrough = "off: not permitted; it needs CAP_SYS_ADMIN"
    assert_says(machine.passes_through(), "warning", "not permitted", "CAP_SYS_ADMIN")
    machine.passthrough = "off: the cache's file system cannot: Operation not supported"
    assert_says(machine.passes_through(), "warning", "ext4 or xfs")
    monkeypatch.setattr(node.os, "geteuid", lambda: 1000)
    assert_says(machine.passes_through(), "skipped", "only root's daemon has passthrough")


def test_requests_that_the_kernel_keeps_small(
    machine: node.Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node, "PAGES_LIMIT", tmp_path / "limit")
    (tmp_path / "limit").write_text("32\n")
    assert_says(machine.request_size(), "warning", "128 KiB", "sysctl fs.fuse.max_pages_limit=256")


# -- the cache's disk


def test_a_disk_without_room(machine: node.Node, monkeypatch: pytest.MonkeyPatch) -> None:
    its_disk = disk.Disk(machine)
    full = os.statvfs_result((4096, 4096, 1 << 26, 1 << 20, 1 << 20, 100, 10, 10, 0, 255))
    monkeypatch.setattr(disk.os, "statvfs", lambda _: full)  # 4 of 256 GiB are free
    assert_says(
        its_disk.space(),
        "warning",
        "25.6 GiB must stay free; the cache may use only 0 B",
        "move cache_dir",
    )
    its_disk.cache_bytes = 2 << 30
    assert_says(its_disk.space(), "ok", "4.0 GiB of 256.0 GiB free", "the cache may use 2.0 GiB")
    no_inode = os.statvfs_result((4096, 4096, 1 << 26, 1 << 25, 1 << 25, 100, 0, 0, 0, 255))
    monkeypatch.setattr(disk.os, "statvfs", lambda _: no_inode)
    assert_says(its_disk.space(), "warning", "has no free inode", "remove small files")
    monkeypatch.setattr(
        disk.os, "statvfs", lambda _: os.statvfs_result((4096, 4096, 9, 9, 9, 9, 9, 9, 0, 255))
    )
    assert_says(its_disk.speed(), "skipped", "is full")


def test_a_disk_that_is_slow_or_fails(
    machine: node.Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    its_disk = disk.Disk(machine)
    monkeypatch.setattr(disk, "SPEED_MIN", 1e15)
    assert_says(its_disk.speed(), "warning", "slower than a network", "a local SSD")
    assert os.listdir(tmp_path) == []

    def fail(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(disk.os, "fdatasync", fail)
    with plan.all_checks("") as checks_:
        (its_check,) = [c for c in checks_ if c.name == "cache-speed"]
    alone = its_check._replace(look=its_disk.speed, needs=(), after=())
    result = results_of(alone)["cache-speed"]
    assert_says(Outcome(result.status, result.message, result.remedy), "failed", "Input/output")
    assert os.listdir(tmp_path) == []


# -- where a store is


@pytest.mark.parametrize(
    ("location", "host", "port", "is_secured"),
    [
        (Location("s3", "bucket/run"), "bucket.s3.us-east-1.amazonaws.com", 443, True),
        (
            Location("s3", "bucket/run", {"endpoint_override": "minio:9000", "scheme": "http"}),
            *("minio", 9000, False),
        ),
        (Location("s3", "b/run", {"endpoint_override": "https://minio"}), "minio", 443, True),
        (Location("gcs", "bucket/run"), "storage.googleapis.com", 443, True),
        (
            Location("azure", "c/run", {"account_name": "me"}),
            *("me.blob.core.windows.net", 443, True),
        ),
        (
            Location(
                *("azure", "c/run"),
                {
                    "account_name": "me",
                    "blob_storage_authority": ".local:10000",
                    "blob_storage_scheme": "http",
                },
            ),
            *("me.local", 10000, False),
        ),
        (Location("az", "c/run", {"account_name": "me"}), "me.blob.core.windows.net", 443, True),
        (Location("hf", "me/model"), "huggingface.co", 443, True),
        (Location("hf", "me/model", {"endpoint": "http://hub:80"}), "hub", 80, False),
        (Location("http", "https://host:8443/models/run"), "host", 8443, True),
        (Location("hdfs", "/run", {"host": "namenode", "port": 9000}), "namenode", 9000, False),
    ],
)
def test_endpoints(location: Location, host: str, port: int, is_secured: bool) -> None:
    endpoint = store.endpoint_of(location)
    assert endpoint is not None
    assert (endpoint.host, endpoint.port) == (host, port)
    assert (endpoint.tls is not None) == is_secured


def test_local_files_have_no_endpoint() -> None:
    assert store.endpoint_of(Location("local", "/run")) is None


@pytest.mark.parametrize(("size", "has_rate"), [(3, False), (MIB - 1, False), (MIB, True)])
def test_reading_of_a_small_file_says_no_rate(
    machine: node.Node, tmp_path: Path, size: int, has_rate: bool
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "weights").write_bytes(bytes(size))
    with contextlib.closing(store.Remote(str(tmp_path / "run"), machine)) as remote:
        assert_says(remote.location(), "ok")
        assert_says(remote.listing(), "ok", "1 file")
        outcome = remote.reading()
    assert_says(outcome, "ok", "to the first byte")
    assert ("B/s" in outcome.message) == has_rate


# -- mounts


def mount_at(path: str, *, uid: int = 0) -> mountinfo.MountLine:
    return mountinfo.MountLine(path, "0:99", mountinfo.FSTYPE, f"rw,user_id={uid}", "/")


@pytest.mark.mount
def test_mounts_where_the_kernel_does_not_tell_whose(
    machine: node.Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [mount_at("/mnt/of a daemon")]
    monkeypatch.setattr(mountinfo, "mounts", lambda: found)
    monkeypatch.setattr(serving, "_connection_of", lambda *_: 0)
    looks = serving.Serving(machine, disk.Disk(machine))
    with open("/dev/fuse", "rb+", buffering=0):
        assert_says(looks.leftovers(), "ok", "this kernel hides the daemons of 1 more")
    monkeypatch.setattr(serving, "_fuse_descriptors", lambda _: [])
    assert_says(looks.leftovers(), "warning", "no daemon serves /mnt/of a daemon", "umount -l")
    found[:] = [mount_at("/mnt/of another", uid=4711)]
    monkeypatch.setattr(serving.os, "geteuid", lambda: 1000)
    assert_says(looks.leftovers(), "ok", "no mount of ckptfs is left")


def test_a_mount_on_which_somebody_waits(
    machine: node.Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mountinfo, "mounts", lambda: [mount_at("/mnt/dead")])
    monkeypatch.setattr(serving, "_fuse_descriptors", lambda _: [])
    monkeypatch.setattr(serving, "_FUSECTL", tmp_path)
    (tmp_path / "99").mkdir()
    (tmp_path / "99" / "waiting").write_text("3\n")
    looks = serving.Serving(machine, disk.Disk(machine))
    remedy = f"echo 1 > {tmp_path}/99/abort; umount -l /mnt/dead"
    assert_says(looks.leftovers(), "warning", "no daemon serves /mnt/dead", remedy)
