"""ckptfs on a real systemd: the node's side of scripts/systemd-proof. Runs as a unit, as root, with
the standard library alone; its result is ``/proof/result``.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

URI, WHEEL = os.environ["URI"], os.environ["WHEEL"]
RESTARTS, KILLS = int(os.environ["RESTARTS"]), int(os.environ["KILLS"])
SIZE, BLOCK = int(os.environ["SIZE"]), 1 << 16
MOUNT, PLACE = "/run/ckptfs/mnt", Path("/mnt/ckpt")
WAIT_S = 60.0
NOT_OURS = ("/dev", "/proc", "/proof", "/project", "/run", "/sys", "/tmp", "/wheels")
"""Not looked at for what is left; nor is what systemd itself writes:"""
OF_SYSTEMD = ("/var/lib/systemd", "/var/log", "/var/tmp", "/var/lib/private", "/var/cache/private")

READER = """
import hashlib, mmap, os, random, sys, time
path, how, seed, size, block, digests = sys.argv[1:]
size, block, rng = int(size), int(block), random.Random(seed)
digests = open(digests, "rb").read()

def check(offset, data):
    for i in range(0, len(data), block):
        want = digests[(offset + i) // block * 16:][:16]
        assert hashlib.blake2b(data[i:i + block], digest_size=16).digest() == want, (offset, i)

kept = os.open(path + "/a.bin", os.O_RDONLY)
folder = os.open(path, os.O_RDONLY)
mapped = mmap.mmap(kept, 0, prot=mmap.PROT_READ)
worst = operations = 0
print("ready", flush=True)
while not os.path.exists("/tmp/enough"):
    began = time.monotonic()
    offset = rng.randrange(size // block) * block
    length = min(size - offset, rng.choice((1, 4, 16)) * block)
    if how == "read":
        with open(path + "/a.bin", "rb") as file:
            file.seek(offset)
            check(offset, file.read(length))
    elif how == "pread":
        os.posix_fadvise(kept, 0, 0, os.POSIX_FADV_DONTNEED)
        check(offset, os.pread(kept, length, offset))
    elif how == "mmap":
        check(offset, mapped[offset:offset + length])
    else:
        assert sorted(os.listdir(folder)) == ["a.bin", "b.bin"]
        assert os.stat(path + "/b.bin").st_size == size
        assert os.getxattr(path + "/a.bin", "user.ckptfs.size") == str(size).encode()
    operations += 1
    worst = max(worst, time.monotonic() - began)
    time.sleep(0.005)  # let the others have the processor
print(operations, worst, flush=True)
"""

failed: list[str] = []


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def run(*command: str, check: bool = True) -> str:
    """Run it; returns what it prints."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout + done.stderr * (not check)


def wait_until(condition: Callable[[], Any]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {WAIT_S:g} s: {condition.__doc__}"
        time.sleep(0.05)


def shown(name: str, unit: str = "ckptfs.service") -> str:
    """A property of a unit."""
    return run("systemctl", "show", "--value", "--property", name, unit).strip()


def mounts() -> list[str]:
    """Where ckptfs is mounted."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line.split(" ")[4] for line in lines if " - fuse.ckptfs " in line]


def status() -> dict[str, Any]:
    """``ckptfs status --json``, by the next daemon if this one is just ending."""
    while True:
        with contextlib.suppress(AssertionError):
            return json.loads(run("ckptfs", "status", "--json"))


def processes() -> list[str]:
    """Of the service's cgroup, and other keepers and daemons."""
    found: list[str] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                if any(
                    name in command for name in ("ckptfs._keeper", "ckptfs._daemon", "bind_holder")
                ):
                    found.append(command)
    return found


def files() -> set[str]:
    """All files and folders of the system that this proof compares."""
    found: set[str] = set()
    for folder, names, others in os.walk("/"):
        names[:] = [
            name
            for name in names
            if not os.path.join(folder, name).startswith(NOT_OURS + OF_SYSTEMD)
        ]
        found.update(os.path.join(folder, name) for name in (*names, *others))
    return found


@contextlib.contextmanager
def step(name: str) -> Iterator[None]:
    """A part of the proof; the next ones run though it fails."""
    say(f"== {name}")
    try:
        yield
    except Exception:
        failed.append(name)
        say(f"FAILED: {traceback.format_exc()}")
        say(run("journalctl", "--no-pager", "-n", "30", "-u", "ckptfs*", check=False))
        say(run("systemctl", "status", "--no-pager", "ckptfs.service", check=False))


def install() -> None:
    """By a ckptfs in an environment of a user's; then an upgrade by itself."""
    run("python3", "-m", "venv", "/tmp/venv")
    run("/tmp/venv/bin/pip", "install", "--quiet", WHEEL)
    say(run("/tmp/venv/bin/ckptfs", "install-node"))
    before = files()
    run("ckptfs", "install-node", WHEEL)
    assert {f for f in files() ^ before if "__pycache__" not in f} == set()
    units = [f"/usr/local/lib/systemd/system/ckptfs.{kind}" for kind in ("service", "socket")]
    said = run("systemd-analyze", "verify", *units, check=False)
    assert said == "", said
    users = [unit.replace("/system/", "/user/") for unit in units]
    for_user = "env", "XDG_RUNTIME_DIR=/run", "systemd-analyze", "--user", "verify"
    said = run(*for_user, *users, check=False)
    assert said == "", said
    say("systemd-analyze verify: clean")
    said = run("systemd-analyze", "security", "--no-pager", "ckptfs.service", check=False)
    say(f"systemd-analyze security: {said.strip().splitlines()[-1]}")


def credentials() -> None:
    """The daemon's own, as a service has them."""
    secret = Path("/etc/ckptfs-credentials")
    secret.write_text(
        f"[default]\\naws_access_key_id = {os.environ['AWS_ACCESS_KEY_ID']}\\n"
        f"aws_secret_access_key = {os.environ['AWS_SECRET_ACCESS_KEY']}\\n".replace("\\n", "\n")
    )
    secret.chmod(0o600)
    folder = Path("/etc/systemd/system/ckptfs.service.d")
    folder.mkdir()
    (folder / "credentials.conf").write_text(
        "[Service]\nLoadCredential=aws:/etc/ckptfs-credentials\n"
        "Environment=AWS_SHARED_CREDENTIALS_FILE=%d/aws\n"
    )
    run("systemctl", "daemon-reload")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        del os.environ[name]


def public_uri() -> str:
    """The URI without credentials."""
    return re.sub(r"//[^@/]*@", "//", URI)


def store_endpoint() -> str:
    """The host and port of the store."""
    found = re.search(r"endpoint_override=([^&]*)", URI)
    assert found
    return found[1].replace("%3A", ":")


def activation() -> None:
    assert shown("ActiveState") == "inactive"
    path = run("ckptfs", "attach", public_uri()).strip()
    assert path.startswith(MOUNT), path
    assert shown("ActiveState") == "active"
    assert shown("StatusText") == f"serving on {MOUNT}"
    assert shown("NFileDescriptorStore") == "6"
    assert mounts() == [MOUNT]
    say(f"passthrough {status()['passthrough']}")
    run("ckptfs", "detach", path)


def under_load(how: str, times: int, do: Callable[[], object]) -> None:
    """Eight readers verify while the service is restarted or killed so many times."""
    Path("/tmp/enough").unlink(missing_ok=True)
    run("systemctl", "reset-failed", "ckptfs.service", check=False)
    path = run("ckptfs", "attach", public_uri()).strip()
    arguments = str(SIZE), str(BLOCK), "/proof/digests"
    readers = [
        subprocess.Popen(
            [sys.executable, "-c", READER, path, kind, str(seed), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for seed, kind in enumerate(("read", "pread", "mmap", "look") * 2)
    ]
    try:
        assert [reader.stdout and reader.stdout.readline() for reader in readers] == ["ready\n"] * 8
        before = status()
        for _ in range(times):
            time.sleep(0.5)
            run("systemctl", "reset-failed", "ckptfs.service", check=False)
            serving, invocation = status()["pid"], shown("InvocationID")
            do()
            wait_until(lambda old=serving: status()["pid"] != old)
            assert shown("InvocationID") != invocation
        after = status()
        assert after["restarts"] - before["restarts"] == times, (before, after)
        assert [a["name"] for a in after["attachments"]] == [
            a["name"] for a in before["attachments"]
        ]
        assert all(reader.poll() is None for reader in readers)
    finally:
        Path("/tmp/enough").touch()
        said = [reader.communicate(timeout=60)[0].strip() for reader in readers]
    assert [reader.returncode for reader in readers] == [0] * 8, said
    operations = sum(int(line.split()[0]) for line in said)
    worst_s = max(float(line.split()[1]) for line in said)
    say(
        f"{how} {times} times: 8 readers, {operations} reads verified, no error, "
        f"longest pause {worst_s:.2f} s; mounted on {mounts()}"
    )
    run("ckptfs", "detach", path)


def kill() -> None:
    run("systemctl", "kill", "--signal", "KILL", "ckptfs.service")
    wait_until(lambda: shown("ActiveState") == "active" and shown("SubState") == "running")


def watchdog() -> None:
    """A keeper that is stuck is killed, and readers go on."""
    folder = Path("/run/systemd/system/ckptfs.service.d")
    folder.mkdir(parents=True)
    (folder / "watchdog.conf").write_text("[Service]\nWatchdogSec=3\n")
    run("systemctl", "daemon-reload")
    run("systemctl", "restart", "ckptfs.service")
    under_load("stop the keeper (watchdog)", 1, lambda: stop_keeper())
    say(run("journalctl", "--no-pager", "-u", "ckptfs.service", "-g", "atchdog", "-o", "cat"))
    (folder / "watchdog.conf").unlink()
    folder.rmdir()
    run("systemctl", "daemon-reload")
    run("systemctl", "restart", "ckptfs.service")


def stop_keeper() -> None:
    os.kill(int(shown("MainPID")), 19)
    before = shown("NRestarts")
    wait_until(lambda: shown("NRestarts") != before and shown("ActiveState") == "active")


def stop() -> None:
    path = run("ckptfs", "attach", public_uri()).strip()
    held = os.open(path, os.O_RDONLY)
    run("systemctl", "stop", "ckptfs.service")
    assert mounts() == []
    assert processes() == []
    assert shown("NFileDescriptorStore") == "0"
    assert shown("Result") == "success"
    try:
        os.listdir(held)
    except OSError as error:
        say(f"who still had it open gets: {error}")
    else:
        raise AssertionError("a stopped service still serves")
    finally:
        os.close(held)
    assert os.listdir("/run/ckptfs") == ["control.sock"], os.listdir("/run/ckptfs")
    run("ckptfs", "attach", public_uri())  # the socket starts it again
    run("ckptfs", "umount")
    wait_until(lambda: shown("ActiveState") == "inactive")
    assert shown("NFileDescriptorStore") == "0"
    assert mounts() == []


def fstab() -> None:
    before = Path("/etc/fstab").read_text() if Path("/etc/fstab").exists() else None
    source = public_uri().partition("?")[0]
    endpoint = store_endpoint()
    options = f"ro,noauto,_netdev,x-systemd.automount,endpoint=http://{endpoint},region=us-east-1"
    PLACE.mkdir()
    line = f"{source} {PLACE} fuse.ckptfs {options} 0 0\n"
    say(line.strip())
    Path("/etc/fstab").write_text((before or "") + line)
    run("systemctl", "daemon-reload")
    run("systemctl", "start", "mnt-ckpt.automount")
    assert mounts() == []
    assert sorted(os.listdir(PLACE)) == ["a.bin", "b.bin"]  # it mounts now
    assert (PLACE / "a.bin").stat().st_size == SIZE
    assert sorted(mounts()) == sorted([MOUNT, str(PLACE)])
    [attachment] = status()["attachments"]
    assert len(attachment["holders"]) == 1, attachment
    run("systemctl", "restart", "ckptfs.service")
    assert (PLACE / "b.bin").read_bytes()[:4]
    run("umount", str(PLACE))
    wait_until(lambda: not status()["attachments"])
    os.listdir(PLACE)  # and again
    assert str(PLACE) in mounts()
    run("systemctl", "stop", "ckptfs.service")
    wait_until(lambda: mounts() == [])
    wait_until(lambda: processes() == [])
    assert sorted(os.listdir(PLACE)) == ["a.bin", "b.bin"]
    run("systemctl", "stop", "mnt-ckpt.automount", "mnt-ckpt.mount")
    assert mounts() == [MOUNT]
    refused = run("mount", "-t", "ckptfs", source, str(PLACE), "-o", "endpiont=x", check=False)
    assert "unknown option endpiont=x" in refused, refused
    assert mounts() == [MOUNT]
    idle_out(line, options)
    run("ckptfs", "umount")
    if before is None:
        Path("/etc/fstab").unlink()
    else:
        Path("/etc/fstab").write_text(before)
    PLACE.rmdir()
    run("systemctl", "daemon-reload")


def idle_out(line: str, options: str) -> None:
    """systemd unmounts an idle place, and the keeper lets go."""
    Path("/etc/fstab").write_text(line.replace(options, f"{options},x-systemd.idle-timeout=1"))
    run("systemctl", "daemon-reload")
    run("systemctl", "start", "mnt-ckpt.automount")
    assert os.listdir(PLACE)
    wait_until(lambda: mounts() == [MOUNT])
    wait_until(lambda: not status()["attachments"])
    run("systemctl", "stop", "mnt-ckpt.automount")


def named_store() -> None:
    """A store that the configuration names, with a credential of the service, after a reload."""
    config = Path("/etc/ckptfs.toml")
    before, pid = config.read_text(), status()["pid"]
    endpoint = store_endpoint()
    config.write_text(
        f'{before}\n[store.proof]\nuri = "s3://proof"\nendpoint = "http://{endpoint}"\n'
        'region = "us-east-1"\ncredentials = { file = "aws" }\n'
    )
    run("systemctl", "reload", "ckptfs.service")
    path = run("ckptfs", "attach", "proof:").strip()
    assert os.stat(f"{path}/a.bin").st_size == SIZE
    run("ckptfs", "detach", "proof:")
    PLACE.mkdir()
    run("mount", "-t", "ckptfs", "proof:", str(PLACE), "-o", "ro")
    assert sorted(os.listdir(PLACE)) == ["a.bin", "b.bin"]
    run("umount", str(PLACE))
    PLACE.rmdir()
    assert status()["pid"] == pid  # it is the same daemon
    config.write_text(before)
    run("systemctl", "reload", "ckptfs.service")
    refused = run("ckptfs", "attach", "proof:", check=False)
    assert "proof" in refused, refused
    say(f"without the table: {refused.strip()}")


def other_user() -> None:
    """A user of the node, at the node's daemon and with a unit of its own."""
    run("useradd", "--create-home", "--uid", "1234", "someone")
    try:
        run("systemctl", "start", "user@1234.service")
        wait_until(lambda: Path("/run/user/1234/systemd/private").exists())
        here = Path("/run/user/1234/ckptfs/control.sock")
        own = [
            "setpriv",
            "--reuid=1234",
            "--regid=1234",
            "--clear-groups",
            "env",
            "HOME=/home/someone",
        ]
        own += ["XDG_RUNTIME_DIR=/run/user/1234"]
        user = [*own, "systemctl", "--user"]
        assert run(*own, "ckptfs", "attach", URI).startswith(f"{MOUNT}/")  # the node's
        run("systemctl", "stop", "ckptfs.socket", "ckptfs.service")
        run(*user, "start", "ckptfs.socket")
        path = run(*own, "ckptfs", "attach", URI).strip()
        assert path.startswith(str(here.parent)), path
        assert run(*own, "stat", "--format=%s", f"{path}/a.bin").strip() == str(SIZE)
        for what in (["restart", "ckptfs"], ["kill", "--signal=KILL", "ckptfs"]):
            before = run(*user, "show", "--value", "-p", "InvocationID", "ckptfs").strip()
            run(*user, *what)
            wait_until(
                lambda old=before: (
                    run(*user, "show", "--value", "-p", "InvocationID", "ckptfs").strip()
                    not in ("", old)
                )
            )
            assert run(*own, "sha256sum", f"{path}/b.bin")
        before = run(*user, "show", "--value", "-p", "MainPID", "ckptfs")
        run(*user, "reload", "ckptfs")
        assert run(*own, "stat", "--format=%s", f"{path}/a.bin").strip() == str(SIZE)
        assert run(*user, "show", "--value", "-p", "MainPID", "ckptfs") == before
        run(*user, "stop", "ckptfs.service", "ckptfs.socket")
        assert mounts() == []
        say("a user's own service: restarted and killed, and what was attached is there")
        run("systemctl", "start", "ckptfs.socket")
        run("systemctl", "stop", "user@1234.service")
        wait_until(lambda: not Path("/run/user/1234").exists())
    finally:
        run("userdel", "--remove", "someone", check=False)
        for backup in ("/etc/subuid-", "/etc/subgid-"):
            Path(backup).unlink(missing_ok=True)


def main() -> None:
    before = files()
    with step("install, twice; check the units"):
        install()
    with step("credentials of the service"):
        credentials()
    with step("the first client starts it"):
        activation()
    restart = "systemctl", "restart", "ckptfs.service"
    with step("systemctl restart under load"):
        under_load("restarted", RESTARTS, lambda: run(*restart))
    with step("systemctl kill -s KILL under load, after daemon-reexec"):
        run("systemctl", "daemon-reexec")
        under_load("killed", KILLS, kill)
    with step("watchdog"):
        watchdog()
    with step("a named store, systemctl reload"):
        named_store()
    with step("systemctl stop"):
        stop()
    if os.path.exists("/dev/autofs"):
        with step("/etc/fstab with automount"):
            fstab()
    else:
        failed.append("NOT TRIED, because there is no /dev/autofs: /etc/fstab with automount")
    with step("a user's own units"):
        other_user()
    with step("uninstall"):
        for path in ("/etc/systemd/system/ckptfs.service.d", "/etc/ckptfs-credentials"):
            run("rm", "-r", path)
        say(run("ckptfs", "install-node", "--uninstall"))
        ours = {name for name in files() ^ before if "__pycache__" not in name}
        assert ours == set(), sorted(ours)[:50]
        assert not os.path.exists("/run/ckptfs")
        say("what was installed and what is left: nothing")
    Path("/proof/result").write_text(json.dumps(failed))


if __name__ == "__main__":
    main()
