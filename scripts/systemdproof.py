"""ckptfs on a real systemd: the host's side of scripts/systemd-proof.

The Debian is booted from an overlay that is thrown away. In it a unit runs
``systemdproof_node.py``, which installs the wheel that was built here and does all the rest; its
output comes through a shared folder, as does its result. The S3 server runs here.
"""

import argparse
import contextlib
import hashlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from support.s3server import S3Server

AUTOFS = Path("/dev/autofs")
PROJECT = Path(__file__).parents[1]
SIZE = 64 << 20
BLOCK = 1 << 16
BOOT_WAIT_S = 900.0
UNIT = """[Unit]
Description=Proof of ckptfs
After=multi-user.target
[Service]
Type=oneshot
EnvironmentFile=/proof/environment
ExecStart=/usr/bin/python3 -u /project/scripts/systemdproof_node.py
ExecStopPost=/bin/systemctl --no-block poweroff
StandardOutput=append:/proof/log
StandardError=append:/proof/log
TimeoutStartSec=infinity
"""


def build_wheels(folder: Path, own: Path) -> Path:
    """Wheels of all that ``ckptfs[daemon]`` needs into `folder`, and ckptfs into `own`; returns its
    path. Those that are there already are kept for as long as the dependencies are the same."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "wheel"]
    stamp = hashlib.sha256((PROJECT / "pyproject.toml").read_bytes()).hexdigest()
    if not (folder / stamp).exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([*pip, "--wheel-dir", folder, f"{PROJECT}[daemon]"], check=True)
        for wheel in folder.glob("ckptfs-*.whl"):
            wheel.unlink()
        (folder / stamp).touch()
    subprocess.run([*pip, "--no-deps", "--wheel-dir", own, PROJECT], check=True)
    [wheel] = own.glob("ckptfs-*.whl")
    return wheel


@contextlib.contextmanager
def overlay(base: Path, scratch: Path) -> Iterator[Path]:
    """A root file system of `base` in which everything may be changed."""
    folders = {name: scratch / name for name in ("upper", "work", "root")}
    for folder in folders.values():
        folder.mkdir()
    options = f"lowerdir={base},upperdir={folders['upper']},workdir={folders['work']}"
    mount = ["mount", "-t", "overlay", "overlay", "-o", options, folders["root"]]
    subprocess.run(mount, check=True)
    try:
        yield folders["root"]
    finally:
        subprocess.run(["umount", folders["root"]], check=True)


def make_checkpoint(bucket: Path, digests: Path) -> None:
    """Two files, and a digest of each block of the first."""
    content = random.Random(1).randbytes(SIZE)
    (bucket / "a.bin").write_bytes(content)
    (bucket / "b.bin").write_bytes(content[::-1])
    blocks = (content[i : i + BLOCK] for i in range(0, SIZE, BLOCK))
    digests.write_bytes(b"".join(hashlib.blake2b(b, digest_size=16).digest() for b in blocks))


def boot(root: Path, shared: Path, wheels: Path, console: Path) -> None:
    """Boot, show what the node says, and return when it is down."""
    binds = {"/proof": shared}
    read_only = {"/project": PROJECT, "/wheels": wheels}
    command = ["systemd-nspawn", "--quiet", "--directory", root, "--boot", "--register=no"]
    command += ["--keep-unit", "--capability=all", "--console=pipe", "--bind=/dev/fuse"]
    if AUTOFS.exists():
        command.append(f"--bind={AUTOFS}")
    command += [f"--bind={path}:{name}" for name, path in binds.items()]
    command += [f"--bind-ro={path}:{name}" for name, path in read_only.items()]
    with (
        console.open("wb") as output,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output) as node,
        (shared / "log").open() as log,
    ):
        deadline_s = time.monotonic() + BOOT_WAIT_S
        while node.poll() is None:
            sys.stdout.write(log.read())
            sys.stdout.flush()
            if time.monotonic() > deadline_s:
                node.terminate()
            time.sleep(0.2)
        sys.stdout.write(log.read())


def main() -> None:
    """Boot a node, and show what it says; status 1 if something was not as promised."""
    parser = argparse.ArgumentParser(prog="systemd-proof", description=__doc__)
    parser.add_argument("cache", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--restarts", type=int, default=10, help="how often it is restarted")
    parser.add_argument("--kills", type=int, default=5, help="how often all of it is killed")
    args = parser.parse_args()
    wheels = args.cache / "wheels"
    with contextlib.ExitStack() as stack:
        scratch = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="proof-", dir=args.cache))
        )
        shared = scratch / "shared"
        shared.mkdir()
        server = stack.enter_context(S3Server())
        bucket = server.bucket_dir("proof")
        make_checkpoint(bucket, shared / "digests")
        wheel = build_wheels(wheels, shared)
        root = stack.enter_context(overlay(args.cache / "base", scratch))
        unit = root / "etc/systemd/system/proof.service"
        unit.write_text(UNIT)
        wants = root / "etc/systemd/system/default.target.wants"
        wants.mkdir(exist_ok=True)
        (wants / unit.name).symlink_to(f"../{unit.name}")
        environment = {
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": "/wheels",
            "HOME": "/root",
            "WHEEL": f"/proof/{wheel.name}",
            "URI": server.uri("proof"),
            "AWS_ACCESS_KEY_ID": server.access_key,
            "AWS_SECRET_ACCESS_KEY": server.secret_key,
            "AWS_EC2_METADATA_DISABLED": "true",
            "RESTARTS": str(args.restarts),
            "KILLS": str(args.kills),
            "SIZE": str(SIZE),
        }
        lines = [f"{name}={value}\n" for name, value in environment.items()]
        (shared / "environment").write_text("".join(lines))
        (shared / "log").touch()
        console = args.cache / "console.log"
        boot(root, shared, wheels, console)
        result = shared / "result"
        if not result.exists():
            sys.exit(f"systemd-proof: the node did not get to the end; see {console}")
        failed = json.loads(result.read_text())
    if failed:
        sys.exit(f"systemd-proof: FAILED: {failed}")
    print("systemd-proof: passed")


if __name__ == "__main__":
    main()
