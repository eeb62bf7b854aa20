"""Other worlds for a Python program: where mounts were changed, or as another user."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

_FORGET_MOUNTS = (
    "grep ' fuse.ckptfs ' /proc/self/mountinfo | cut -d' ' -f5 | "
    "xargs -r umount --lazy --no-canonicalize 2>/dev/null || true; "  # some have just gone
)
OWN_MOUNTS = (
    *("unshare", "--mount", "--propagation", "private"),
    *("sh", "-ec", f'{_FORGET_MOUNTS}exec "$@"', "sh"),
)
"""The beginning of a command that has a mount namespace of its own. The namespace forgets its
copies of ckptfs's mounts: those of tests that run beside it would live as long as it."""

READ_ONLY_ROOT = "mount -o remount,bind,ro /; "
"""For `script` of `in_world`. Mounts that come behind it can be written."""


def over_tmp(mount: str) -> str:
    """A line of a script that mounts something on /tmp, and shows the interpreter there again if it
    lies in /tmp, as in a clone that is there."""
    shown = {Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()}
    inside = list(enumerate(sorted(path for path in shown if path.is_relative_to("/tmp")), 8))
    opened = [f"exec {fd}<{path}" for fd, path in inside]
    again = [
        f"mkdir -p {path}; mount --no-canonicalize --bind /proc/self/fd/{fd} {path}; exec {fd}<&-"
        for fd, path in inside
    ]
    return "; ".join([*opened, f"{mount} /tmp", *again])


def in_world(
    script: str,
    code: str,
    *arguments: str,
    uid: int = 0,
    without: tuple[str, ...] = (),
    **environment: str,
) -> "subprocess.CompletedProcess[str]":
    """Run `code` where a shell script has changed the mounts.

    Args:
        script: Of the shell, as root, in a mount namespace of its own.
        code: Of Python.
        arguments: For the program.
        uid: The user that the program becomes when all that it may need was imported, because the
            interpreter may lie where only root can read.
        without: Variables that are not in its environment.
        environment: Changes to it.
    """
    if os.geteuid():
        pytest.skip("only root can change mounts and become another user")
    become = (
        "import os, ckptfs.checkpoint, pyarrow.fs, logging, subprocess, tempfile, warnings\n"
        "import ckptfs._store.s3.store, ckptfs._store.resolve, ckptfs._store.local\n"
        f"os.setgroups([]); os.setresgid({uid}, {uid}, {uid}); os.setresuid({uid}, {uid}, {uid})\n"
    )
    shell = ("sh", "-ec", script + '\nexec "$@"', "sh")
    done = subprocess.run(
        [*OWN_MOUNTS, *shell, sys.executable, "-c", (become if uid else "") + code, *arguments],
        env={k: v for k, v in {**os.environ, **environment}.items() if k not in without},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done
