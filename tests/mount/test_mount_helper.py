"""``mount.ckptfs``, as mount(8) runs it: a checkpoint at a place of the administrator's."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from conftest import COMMAND_TIMEOUT_S, Node, mounts, wait_until
from mount.test_lifecycle import attachments
from support.s3server import S3Server

from ckptfs._model.location import Location
from ckptfs._model.uris import parse_uri
from ckptfs.cli import bind_holder, mount_helper
from ckptfs.errors import LocationError

pytestmark = pytest.mark.mount

UriOf = Callable[[Path], str]


@pytest.fixture
def place(node: Node, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory to mount on. The daemon finds its credentials by itself."""
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(node.folder / "aws"))
    (node.folder / "aws").write_text(
        f"[default]\naws_access_key_id = {s3.access_key}\naws_secret_access_key = {s3.secret_key}\n"
    )
    place = node.folder / "place with\ttab"
    place.mkdir()
    yield place
    if str(place) in map(_unescaped, mounts()):
        bind_holder.unmount(str(place))
    wait_until(lambda: not holders(place))


def _unescaped(path: str) -> str:
    return path.replace("\\040", " ").replace("\\011", "\t")


def is_mounted(place: Path) -> bool:
    return str(place) in map(_unescaped, mounts())


def holders(place: Path) -> list[int]:
    """The processes that hold what is mounted there."""
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if bind_holder.__file__.encode() in words and os.fsencode(place) in words:
                found.append(int(entry.name))
    return found


def helper(
    node: Node, source: str, place: Path, *options: str, check: bool = True
) -> "subprocess.CompletedProcess[str]":
    """Run it as mount(8) does."""
    command = str(Path(sys.executable).with_name("mount.ckptfs"))
    return node.run(command, source, str(place), *options, check=check)


def source_and_options(s3: S3Server, uri: str) -> tuple[str, str]:
    """A URI as in ``/etc/fstab``: without credentials and query, and the options for it."""
    parts = urlsplit(uri)
    source = f"s3://{parts.netloc.rpartition('@')[2]}{parts.path}"
    return source, f"endpoint=http://{s3.endpoint},region={s3.region}"


def test_umount_lets_go(node: Node, s3: S3Server, small: Path, uri_of: UriOf, place: Path) -> None:
    source, options = source_and_options(s3, uri_of(small))
    assert helper(node, source, place, "-n", "-o", f"rw,{options},x-systemd.automount").stdout == ""
    assert (place / "config.json").read_text() == '{"layers": 1}'
    [attachment] = attachments()
    assert attachment["holders"] == holders(place)
    assert not attachment["pinned"]
    assert os.getxattr(place, "user.ckptfs.files") == b"3"
    node.run("umount", str(place))
    wait_until(lambda: not holders(place))
    wait_until(lambda: not attachments())
    assert os.listdir(place) == []


def test_flags_are_those_of_the_mount(
    node: Node, s3: S3Server, small: Path, uri_of: UriOf, place: Path
) -> None:
    source, options = source_and_options(s3, uri_of(small))
    helper(node, source, place, "-o", f"ro,noexec,noatime,prefetch=*.json:layers,{options}")
    flags = os.statvfs(place).f_flag
    expected = os.ST_RDONLY | os.ST_NOEXEC | os.ST_NOATIME | os.ST_NOSUID | os.ST_NODEV
    assert flags & expected == expected
    with pytest.raises(OSError, check=lambda error: error.errno == errno.EROFS):
        os.setxattr(place, "user.ckptfs.meta.loss", b"1")
    wait_until(lambda: attachments()[0]["cached"] > 0)  # no process has read a file


def test_mount_helper_mount_outlives_a_restart_and_ends_with_umount(
    node: Node, s3: S3Server, small: Path, uri_of: UriOf, place: Path
) -> None:
    node.expected_in_log.append("has asked for the next one")
    source, options = source_and_options(s3, uri_of(small))
    helper(node, source, place, "-o", options)
    node.here("restart")
    assert (place / "config.json").read_text() == '{"layers": 1}'
    assert [a["holders"] for a in attachments()] == [holders(place)]
    node.here("umount", "--force")
    wait_until(lambda: not is_mounted(place))
    assert os.listdir(place) == []


def test_mount_helper_with_uid_lets_that_user_read_alone(
    node: Node, s3: S3Server, small: Path, uri_of: UriOf, place: Path
) -> None:
    node.configure(allow_other=True, lend_daemon_rights=True)
    for around in (node.folder, *node.folder.parents):  # xdist adds one
        if around.name.startswith("ckptfs-"):
            around.chmod(0o755)
    node.here("mount")
    source, options = source_and_options(s3, uri_of(small))
    helper(node, source, place, "-o", f"uid=4242,{options}")
    for uid, readable in ((4242, True), (4243, False)):
        done = subprocess.run(
            ["cat", str(place / "config.json")],
            user=uid,
            group=uid,
            extra_groups=[],
            capture_output=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
        assert (done.returncode == 0) is readable, done


def test_mount_helper_with_wrong_arguments_leaves_no_mount(
    node: Node, s3: S3Server, small: Path, uri_of: UriOf, place: Path
) -> None:
    source, options = source_and_options(s3, uri_of(small))
    for uri, where, given, status, text in (
        (source, place, ("-o", "endpiont=x"), 1, "unknown option endpiont=x"),
        (source, place, ("-o", "endpoint="), 1, "endpoint= needs a value"),
        (uri_of(small), place, (), 1, "all users can see credentials here"),
        (source, place / "none", ("-o", options), 32, "it is not a directory; create it"),
        (source, place, ("-o", f"uid=nobody-of-that-name,{options}"), 32, "no such user"),
        (f"{source}/none", place, ("-o", options), 32, "none"),
    ):
        done = helper(node, uri, where, *given, check=False)
        assert (done.returncode, text in done.stderr) == (status, True), done
        assert s3.secret_key not in done.stderr
        assert done.stderr.count("\n") == 1
    assert helper(node, source, place, "-f", "-s", "-o", "whatever").returncode == 0
    assert not is_mounted(place)
    assert not holders(place)


def test_mount_helper_options_equal_uri_parameters() -> None:
    options = mount_helper.parse(
        'endpoint="http://[::1]:9000/a,b",region=x,anonymous,requester_pays,x-foo,comment=a,'
        "force_virtual_addressing,ca_file=/a b,ca_dir=/c&d,verify_certificates=false,nofail"
    )
    assert parse_uri(mount_helper.uri_of("s3://b/run#2", options)) == Location(
        "s3",
        "b/run#2",
        {
            "endpoint_override": "[::1]:9000/a,b",
            "scheme": "http",
            "region": "x",
            "anonymous": True,
            "requester_pays": True,
            "force_virtual_addressing": True,
            "tls_ca_file_path": "/a b",
            "tls_ca_dir_path": "/c&d",
            "tls_verify_certificates": False,
        },
    )
    options = mount_helper.parse("endpoint=host:9000,anonymous=true")
    assert parse_uri(mount_helper.uri_of("s3://b/p?scheme=http", options)).options == {
        "endpoint_override": "host:9000",
        "scheme": "http",
        "anonymous": True,
    }
    assert mount_helper.uri_of("prod:run 7/#1", mount_helper.parse("ro")) == "prod:run 7/#1"


@pytest.mark.parametrize(
    ("source", "options", "said"),
    [
        ("gs://b/p", "region=x", r"unknown parameter 'region'.*of the options region"),
        ("s3://b/p?region=x", "region=y", "region is given twice"),
        ("s3://b/p", "region=x,region=y", "option region is given twice"),
        ("s3://b/p", "anonymous=yes", "must be true or false"),
        ("prod:run7", "anonymous", "the table of a named store sets anonymous"),
        ("/data", "ro", "is not a URI"),
        ("s3a://b/p", "ro", "write s3://"),
        ("s3://b/p?x=y", "ro", "%3F"),
    ],
)
def test_mount_helper_with_invalid_options_fails(source: str, options: str, said: str) -> None:
    with pytest.raises(LocationError, match=said):
        mount_helper.uri_of(source, mount_helper.parse(options))
