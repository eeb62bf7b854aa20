"""``ckptfs doctor``: each check, on a machine, daemon or store that really is that bad."""

import http.server
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from conftest import Node, daemons, mounts, wait_until
from support.faultserver import FaultServer, Object
from support.s3server import S3Server

import ckptfs
from ckptfs._doctor import disk, serving, store
from ckptfs._doctor import node as machine
from ckptfs._mount import session
from ckptfs._os import mountinfo

pytestmark = pytest.mark.mount

UriOf = Callable[[Path], str]
CKPTFS = str(Path(sys.executable).with_name("ckptfs"))


class Report(dict[str, Any]):
    """The results by their names."""

    status: int

    def line(self, name: str, status: str, *words: str) -> None:
        """Assert what a check says."""
        result = self[name]
        text = f"{result['message']} → {result['remedy']}"
        assert result["status"] == status, f"{name}: {result['status']}: {text}"
        assert all(word in text for word in words), text
        assert bool(result["remedy"]) == (status in ("warning", "failed")), text

    def all_but(self, *names: str) -> None:
        """Assert that nothing else is wrong."""
        wrong = {name for name, result in self.items() if result["status"] in ("failed", "warning")}
        # How fast the disk is, how full, and whether it is memory, is not the test's.
        assert wrong - {"cache-speed", "cache-space", "cache-place"} == {*names}


@pytest.fixture
def examined(node: Node, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Report]:
    """Run ``ckptfs doctor --json``; `prefix` goes before the command, which then is a process.

    Of the mounts of this machine it sees those of the test, and of the disk it writes little.
    """
    every = mountinfo.mounts
    monkeypatch.setattr(mountinfo, "mounts", lambda: [m for m in every() if m.path in mounts()])
    monkeypatch.setattr(disk, "_TRIED_BYTES", disk._CHUNK_BYTES)

    def run(uri: str = "", *, prefix: tuple[str, ...] = ()) -> Report:
        arguments = ("doctor", "--json", *((uri,) if uri else ()))
        if prefix:
            done = node.run(*prefix, CKPTFS, *arguments, check=False)
        else:
            done = node.here(*arguments, check=False)
        found = json.loads(done.stdout)
        report = Report({each["name"]: each for each in found["checks"]})
        has_failed = any(each["status"] == "failed" for each in found["checks"])
        assert done.returncode == int(has_failed)
        assert (found["status"] == "failed") == has_failed
        assert done.stderr == ""
        return report

    return run


Examined = Callable[..., Report]


@pytest.fixture
def no_chain(node: Node, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No AWS credentials but those in the file that is returned, which a test may write."""
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(node.folder / name.lower()))
    return node.folder / "aws_shared_credentials_file"


# -- all is well


def test_a_machine_in_order(
    node: Node, examined: Examined, small: Path, uri_of: UriOf, s3: S3Server
) -> None:
    uri = uri_of(small)
    report = examined(uri)
    report.all_but()
    report.line("mount", "ok")
    report.line("daemon", "ok", "no daemon is running")
    report.line("version", "skipped", "no daemon is running")
    report.line("credentials", "ok", "from the URI")
    report.line("store-tls", "skipped", "plain")
    report.line("clock", "ok", "equal to the store's")
    report.line("store-list", "ok", "3 files, 2.9 MiB")
    report.line("store-read", "ok", "to the first byte", "B/s on one")
    assert s3.secret_key not in json.dumps(report)
    assert os.listdir(node.folder) == ["ckptfs.toml"]
    with ckptfs.Checkpoint(uri).as_directory():
        report = examined(uri)
        report.all_but()
        report.line("daemon", "ok", "1 checkpoint attached", str(node.socket))
        report.line("version", "ok")
        report.line("passthrough", "ok")
        report.line("leftover-mounts", "ok", "1 served")
    assert s3.secret_key not in json.dumps(report)


def test_local_files_need_no_network(examined: Examined, small: Path) -> None:
    report = examined(str(small))
    report.all_but()
    report.line("credentials", "ok", "none are needed")
    for name in ("store-name", "store-connect", "store-tls", "clock"):
        report.line(name, "skipped", "local files need no network")
    report.line("store-list", "ok", "3 files")
    report.line("store-read", "ok")


def test_without_a_uri_no_store_is_checked(examined: Examined) -> None:
    report = examined()
    report.all_but()
    for name in ("location", "credentials", "store-name", "clock", "store-read"):
        report.line(name, "skipped", "give a URI")


# -- the machine


def test_a_configuration_that_is_not_valid(node: Node, examined: Examined) -> None:
    (node.folder / "ckptfs.toml").write_text("linger = 1\n")
    report = examined()
    report.line("config", "failed", "unknown key 'linger'", "did you mean 'linger_s'?")
    for name in ("mount", "daemon", "directories", "cache-speed", "location"):
        report.line(name, "skipped", "because of config")
    report.line("device", "ok")


def test_a_machine_that_must_not_mount(examined: Examined) -> None:
    without = ("setpriv", "--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin")
    report = examined(prefix=without)
    report.line("mount", "failed", "Operation not permitted", "--cap-add SYS_ADMIN")
    report.line("restart", "skipped", "because of mount")


def test_doctor_warns_of_low_limits(examined: Examined) -> None:
    report = examined(prefix=("prlimit", "--nofile=1000:1000"))
    report.line("limits", "warning", "1000 open files", "LimitNOFILE=65536")
    report = examined(prefix=("prlimit", "--fsize=100000000:"))
    report.line("limits", "warning", "at most 100000000 bytes", "ulimit -f unlimited")


def test_limits_are_those_of_the_daemon(node: Node, examined: Examined) -> None:
    node.run("prlimit", "--nofile=1000:1000", CKPTFS, "mount")
    examined().line("limits", "warning", "1000 open files")


def test_a_directory_that_others_may_write_into(node: Node, examined: Examined) -> None:
    node.cache_dir.mkdir()
    node.cache_dir.chmod(0o777)
    examined().line("directories", "failed", str(node.cache_dir), "CKPTFS_CACHE_DIR")


def test_a_cache_without_room(node: Node, examined: Examined) -> None:
    node.configure(cache_bytes_max=1 << 20)
    examined().line(
        "cache-space", "warning", "the cache may use only 1.0 MiB", "raise cache_bytes_max"
    )


# -- the daemon


def test_a_daemon_that_does_not_answer(
    node: Node, examined: Examined, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "_ANSWER_S", 0.2)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(node.socket))
        listening.listen()
        report = examined()
    node.socket.unlink()
    report.line("daemon", "failed", "does not answer", "see its log")
    report.line("version", "skipped", "because of daemon")
    report.line("mount", "ok")


def test_a_daemon_that_died(node: Node, examined: Examined) -> None:
    node.expected_in_log.append("keeper: the daemon was killed")
    node.here("mount")
    before = node.status()["pid"]
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: node.status()["pid"] != before)
    report = examined()
    report.line("daemon", "warning", "restarted 1 time", str(node.cache_dir / "daemon.log"))
    report.all_but("daemon")


def test_a_checkpoint_in_trouble(
    node: Node, examined: Examined, small: Path, uri_of: UriOf
) -> None:
    node.expected_in_log.append("changed at the store")
    with ckptfs.Checkpoint(uri_of(small)).as_directory() as path:
        (small / "config.json").write_text('{"layers": "two"}')
        with pytest.raises(OSError, match="Stale"):
            Path(path, "config.json").read_text()
        examined().line("daemon", "warning", "1 of them changed", "ckptfs status")


def test_a_daemon_of_another_version(
    node: Node, examined: Examined, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.here("mount")
    version = node.status()["version"]
    monkeypatch.setattr(serving, "version_or_none", lambda _: "99.0")
    report = examined()
    report.line("version", "warning", f"the daemon is {version}", "99.0", "ckptfs restart")


def test_doctor_finds_a_daemon_with_another_protocol(node: Node, examined: Examined) -> None:
    def answer() -> None:
        connection, _ = listening.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(b'{"op":"status-reply","v":2}\n')

    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(node.socket))
        listening.listen()
        thread = threading.Thread(target=answer)
        thread.start()
        report = examined()
        thread.join()
    node.socket.unlink()
    report.line("daemon", "failed", "malformed", "client and daemon must be of the same version")


def test_a_client_in_a_container(
    node: Node, examined: Examined, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the node's socket and mount, and need not be able to mount itself."""
    node.here("mount")
    monkeypatch.setattr(serving, "_runs", lambda *_: False)  # the processes are out of sight
    monkeypatch.setattr(machine, "DEVICE", node.folder / "no-fuse")
    report = examined()
    report.all_but()
    for name in ("device", "mount", "restart", "directories", "cache-place", "cache-space"):
        report.line(name, "skipped", f"the daemon at {node.socket} mounts for this user")
    report.line("daemon", "ok", str(node.socket))
    report.line("leftover-mounts", "ok", "1 served")


# -- mounts that no daemon serves


@contextmanager
def mounted(at: Path) -> Iterator[int]:
    """A mount of ckptfs without a daemon; yields the session's descriptor."""
    at.mkdir()
    fd = session.mount(at, allow_other=False)
    try:
        session.answer_init(fd)
        yield fd
    finally:
        session.unmount(at)
        at.rmdir()


def test_a_dead_mount_is_found_and_not_touched(node: Node, examined: Examined) -> None:
    node.here("mount")
    other = node.folder / "other"
    with mounted(other) as fd:
        os.close(fd)
        report = examined()
        report.line("leftover-mounts", "warning", f"no daemon serves {other}", f"umount -l {other}")
        report.all_but("leftover-mounts")
        assert mounts() == {str(other), str(node.mount)}


NAMED = "import ctypes; ctypes.CDLL(None).prctl(15, b'systemd')\n"  # PR_SET_NAME: prctl(2)
WAIT = "import time; print('here', flush=True); time.sleep(60)"


@pytest.mark.parametrize(
    "command",
    [[WAIT, "ckptfs._keeper.keeper"], [WAIT, "ckptfs._daemon.keeper"], [NAMED + WAIT]],
)
def test_doctor_finds_a_mount_with_a_keeper_and_no_daemon(
    command: list[str], node: Node, examined: Examined
) -> None:
    """Its keeper, or a service manager for one."""
    other = node.folder / "other"
    with mounted(other) as fd:
        command = [sys.executable, "-c", *command]
        with subprocess.Popen(command, pass_fds=[fd], stdout=subprocess.PIPE) as keeper:
            os.close(fd)
            assert keeper.stdout is not None
            assert keeper.stdout.readline() == b"here\n"
            report = examined()
            keeper.kill()
        report.line("leftover-mounts", "warning", f"no daemon serves {other}", f"umount -l {other}")


def test_the_doctor_leaves_no_mount_when_it_is_killed(node: Node, examined: Examined) -> None:
    """The next doctor removes the mount that a killed one leaves."""
    script = (
        "import os, signal\n"
        "from pathlib import Path\n"
        "from ckptfs._config.load import load_config\n"
        "from ckptfs._doctor import trial_mount\n"
        "from ckptfs._mount import session\n"
        "session.answer_init = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "trial_mount.try_mount(load_config(), os.memfd_create('x'))\n"
    )
    done = node.run(sys.executable, "-c", script, check=False)
    assert done.returncode == -signal.SIGKILL
    [left] = mounts()
    assert "/ckptfs-doctor-" in left
    examined().all_but()
    assert mounts() == set()
    assert daemons() == set()


# -- the store


def s3_uri(endpoint: str, scheme: str = "http", keys: str = "key:secret@") -> str:
    query = f"scheme={scheme}&endpoint_override={endpoint}&region=us-east-1"
    return f"s3://{keys}bucket/run?{query}"


@pytest.fixture
def faulty(node: Node, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultServer]:
    """A server that is in order until it is given a fault."""
    node.configure(store_timeout_s=0.3)
    monkeypatch.setattr(store, "_STEP_S", 0.6)
    with FaultServer() as server:
        server.objects["bucket/run/weights"] = Object(os.urandom(100_000), 1_600_000_000)
        yield server


def test_doctor_with_an_invalid_uri_fails(examined: Examined) -> None:
    report = examined("nonsense://bucket/run")
    report.line("location", "failed", "unknown scheme", "s3://")
    for name in ("credentials", "store-name", "clock", "store-list", "store-read"):
        report.line(name, "skipped", "because of location")


def test_no_credentials(faulty: FaultServer, examined: Examined, no_chain: Path) -> None:
    report = examined(s3_uri(faulty.endpoint, keys=""))
    report.line("credentials", "failed", "no AWS credentials", "set AWS_ACCESS_KEY_ID")
    report.line("store-connect", "ok")
    report.line("store-list", "skipped", "because of credentials")
    report.line("store-read", "skipped", "because of credentials")


def test_credentials_of_a_profile(faulty: FaultServer, examined: Examined, no_chain: Path) -> None:
    no_chain.write_text("[default]\naws_access_key_id = known\naws_secret_access_key = hidden\n")
    report = examined(s3_uri(faulty.endpoint, keys=""))
    report.all_but()
    report.line("credentials", "ok", "from AWS's chain: shared-credentials-file", "'default'")
    report.line("settings", "ok", "profile default: aws_secret_access_key = (secret)")
    assert "hidden" not in json.dumps(report)


def test_credentials_of_the_environment(
    faulty: FaultServer, examined: Examined, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "known")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "covered")
    report = examined(s3_uri(faulty.endpoint, keys=""))
    report.all_but()
    report.line("credentials", "ok", "from the environment", "temporary")
    assert not {"hidden", "covered"} & {*re.findall(r"\w+", json.dumps(report))}


def test_credentials_that_expired_at_their_source(
    node: Node, faulty: FaultServer, examined: Examined, no_chain: Path
) -> None:
    given = {"Version": 1, "AccessKeyId": "a", "SecretAccessKey": "b", "SessionToken": "c"}
    (node.folder / "given").write_text(json.dumps({**given, "Expiration": "2020-01-01T00:00:00Z"}))
    (node.folder / "aws_config_file").write_text(
        f"[default]\ncredential_process = cat {node.folder}/given\n"
    )
    report = examined(s3_uri(faulty.endpoint, keys=""))
    report.line("credentials", "failed", "expired", "check the profile or role")


def test_credentials_that_the_store_calls_expired(faulty: FaultServer, examined: Examined) -> None:
    faulty.fault = "403 expired"
    report = examined(s3_uri(faulty.endpoint))
    report.line("store-list", "failed", "ExpiredToken", "renew them")
    report.line("store-read", "skipped", "because of store-list")


def test_wrong_credentials(examined: Examined, small: Path, s3: S3Server) -> None:
    uri = s3.uri(str(small.relative_to(s3.root))).replace(s3.secret_key, "wrong")
    report = examined(uri)
    report.line("store-list", "failed", "SignatureDoesNotMatch", "correct the credentials")


def test_a_name_without_an_address(
    faulty: FaultServer, examined: Examined, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    report = examined(s3_uri("store.invalid:9000"))
    report.line("store-name", "failed", "store.invalid", "/etc/resolv.conf")
    report.line("store-list", "skipped", "because of store-name")


def test_a_store_that_refuses_connections(faulty: FaultServer, examined: Examined) -> None:
    faulty.fault = "refused"
    faulty.break_down()
    report = examined(s3_uri(faulty.endpoint))
    report.line("store-connect", "failed", faulty.endpoint.partition(":")[2], "firewall")
    report.line("store-list", "skipped", "because of store-connect")
    faulty.heal()
    examined(s3_uri(faulty.endpoint)).all_but()


def test_a_store_that_is_a_black_hole(faulty: FaultServer, examined: Examined) -> None:
    faulty.fault = "black hole"
    report = examined(s3_uri(faulty.endpoint))
    report.line("store-connect", "ok")
    report.line("clock", "failed", "timed out", "check the endpoint")
    report.line("store-list", "failed", "did not answer", "check the endpoint")


def test_a_store_that_answers_with_other_bytes(faulty: FaultServer, examined: Examined) -> None:
    faulty.fault = "wrong range"
    report = examined(s3_uri(faulty.endpoint))
    report.line("store-list", "ok", "1 file,")
    report.line("store-read", "failed", "other bytes")


def test_a_place_with_nothing_and_one_with_too_much(
    faulty: FaultServer, examined: Examined, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = s3_uri(faulty.endpoint).replace("/run", "/elsewhere")
    examined(nowhere).line("store-list", "failed", "does not exist", "check the path")
    monkeypatch.setattr(store, "_FILES_MAX", 0)
    report = examined(s3_uri(faulty.endpoint))
    report.line("store-list", "warning", "more than 0 objects", "give the URI of one checkpoint")
    report.line("store-read", "skipped", "no file")


@contextmanager
def web_server(date: Callable[[], str], certificate: str = "") -> Iterator[str]:
    """A server that knows the time, and nothing else; yields its endpoint."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def date_time_string(self, timestamp: float | None = None) -> str:
            return date()

        def do_HEAD(self) -> None:
            self.send_error(403)

        def log_message(self, *_: object, **__: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        server.handle_error = lambda *_: None  # type: ignore[method-assign]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("ahead_s", "status", "words"),
    [
        (0, "ok", ("equal to the store's",)),
        (-300, "warning", ("ahead of the store's", "NTP")),
        (3600, "failed", ("behind the store's; S3 refuses", "NTP")),
        (None, "skipped", ("sends no time",)),
    ],
)
def test_doctor_compares_the_clock_with_the_store(
    examined: Examined, ahead_s: int | None, status: str, words: tuple[str]
) -> None:
    def date() -> str:
        return "" if ahead_s is None else formatdate(time.time() + ahead_s, usegmt=True)

    with web_server(date) as endpoint:
        examined(s3_uri(endpoint)).line("clock", status, *words)


def test_doctor_finds_an_untrusted_certificate(node: Node, examined: Examined) -> None:
    pem = str(node.folder / "pem")
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost"
    node.run(
        *command.split(),
        "-addext",
        "subjectAltName=IP:127.0.0.1",
        "-keyout",
        pem,
        "-out",
        f"{pem}.crt",
    )
    Path(pem).write_text(Path(pem).read_text() + Path(f"{pem}.crt").read_text())
    with web_server(lambda: formatdate(usegmt=True), pem) as endpoint:
        report = examined(s3_uri(endpoint, "https"))
        report.line("store-tls", "failed", "self-signed certificate", "tls_ca_file_path")
        report.line("clock", "skipped", "because of store-tls")
        report.line("store-list", "skipped", "because of store-tls")


def test_a_store_without_tls(examined: Examined) -> None:
    with web_server(lambda: formatdate(usegmt=True)) as endpoint:
        report = examined(s3_uri(endpoint, "https"))
    report.line("store-tls", "failed", "check the endpoint")


# -- how it looks


@pytest.mark.parametrize("columns", [80, 160])
def test_doctor_on_a_terminal_is_coloured_and_fits_it(
    node: Node, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    node.configure(cache_bytes_max=1 << 20)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm-256color")
    said = node.run("script", "-qec", f"{CKPTFS} doctor", "/dev/null").stdout
    assert "\x1b[32mok" in said
    lines = re.sub(r"\x1b\[[0-9;]*m", "", said).replace("\r", "").splitlines()
    assert max(map(len, lines)) <= columns
    assert [line for line in lines if line and not line.startswith(" ")][:4] == [
        *("machine", "daemon", "cache", "store")
    ]
    assert any(line.startswith("  warning  cache-space      ") for line in lines)
    assert any(
        line.startswith(" " * 28 + "→ free disk space, raise cache_bytes_max") for line in lines
    )
    shown = " ".join("".join(lines).split())
    assert "store-list, store-read: give a URI to check its store" in shown
    assert re.search(r"\d+ ok, \d+ warning, \d+ skipped$", lines[-1])


def test_piped_each_check_is_a_line(node: Node) -> None:
    node.configure(cache_bytes_max=1 << 20)
    said = node.here("doctor").stdout
    assert "\x1b" not in said
    lines = said.splitlines()
    rows = [line.split()[:2] for line in lines]
    assert {status for status, _ in rows} <= {"ok", "warning", "failed", "skipped"}
    assert [name for _, name in rows][:3] == ["config", "package", "device"]
    assert len(rows) == 27
    (line,) = [line for line in lines if line.startswith("warning  cache-space")]
    assert " → free disk space, raise cache_bytes_max" in line


def test_the_exit_status_tells_of_failures(node: Node) -> None:
    assert node.here("doctor").returncode == 0
    done = node.here("doctor", "nonsense://x", check=False)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_check_that_hangs_does_not_keep_the_command(node: Node) -> None:
    """A resolver that never answers: no thread can be ended that waits for it."""
    script = (
        "import socket, sys, threading\n"
        "from ckptfs._doctor import plan\n"
        "from ckptfs.__main__ import main\n"
        "of_store = plan._of_store\n"
        "def of_store_in_haste(remote):\n"
        "    return [c._replace(timeout_s=0.5) if c.name == 'store-name' else c\n"
        "            for c in of_store(remote)]\n"
        "plan._of_store = of_store_in_haste\n"
        "socket.getaddrinfo = lambda *_, **__: threading.Event().wait()\n"
        "sys.argv = ['ckptfs', 'doctor', sys.argv[1]]\n"
        "main()\n"
    )
    done = node.run(sys.executable, "-c", script, s3_uri("store.invalid:9000"), check=False)
    (line,) = [line for line in done.stdout.splitlines() if "store-name" in line.split()[:2]]
    assert line.startswith("failed")
    assert "no result within 0.5 s → check the endpoint" in line
    assert "store-read" in done.stdout
    assert (done.returncode, done.stderr) == (1, "")
