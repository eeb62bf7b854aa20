"""``ckptfs prefetch``: what it fetches and says, and that nothing goes on when it has ended."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Node, wait_until
from mount.test_prefetch import MIB, cached, gets, make, quoted
from support.s3server import S3Server
from support.servers import Forwarder

import ckptfs
from ckptfs._client import client
from ckptfs._model.protocol.replies import AttachmentStatus

pytestmark = pytest.mark.mount

UriOf = Callable[[Path], str]
COMMAND = str(Path(sys.executable).with_name("ckptfs"))


def prefetch(node: Node, *arguments: str) -> dict[str, Any]:
    """The JSON that a prefetch prints which succeeds."""
    told = json.loads(node.here("prefetch", "--json", *arguments).stdout)
    assert told.pop("seconds") >= 0
    assert told.pop("unmatched") == []
    return told


def refusal(node: Node, *arguments: str) -> str:
    """The one line of a prefetch that fails at once."""
    done = node.here("prefetch", *arguments, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("ckptfs: error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_prefetch_command_fetches_the_named_files(
    node: Node, s3: S3Server, bucket: Path, uri_of: UriOf
) -> None:
    node.configure(linger_s=0)
    files = {"a.json": 100, "b.bin": 9 * MIB, "d[1]/x.json": 7, "d[1]/e/y.bin": 20, "d[1]/z": 0}
    make(bucket / "ckpt", files | {"d1/x.json": 5})
    uri = uri_of(bucket / "ckpt")
    first = prefetch(node, uri, "*.json")
    assert first == {"files": 3, "bytes": 112, "fetched": 112, "cached": 0, "errors": []}
    node.wait_detached()  # it held it only while it ran
    s3.reset_traffic()
    with ckptfs.Checkpoint(uri).as_directory() as path:
        assert cached(path) == 112
        assert prefetch(node, f"{path}/a.json")["cached"] == 100
        assert prefetch(node, f"{path}/d[1]", "*.json")["cached"] == 7
        assert sorted(set(gets(s3))) == []
        below = prefetch(node, f"{path}/d[1]")
        assert below == {"files": 3, "bytes": 27, "fetched": 20, "cached": 7, "errors": []}
        assert set(gets(s3)) == {"y.bin"}
        assert "b.bin is a file" in refusal(node, f"{path}/b.bin", "*")
        assert "No such file" in refusal(node, f"{path}/nothing")
        assert "'50 apples' is not a rate" in refusal(node, path, "--limit-rate", "50 apples")
        none = node.here("prefetch", path, "*.pt", check=False)
        assert none.returncode == 1
        assert "matches *.pt" in none.stderr
        bar = node.run("script", "-qec", f"{COMMAND} prefetch '{path}'", "/dev/null").stdout
        assert "fetching ckpt-" in bar
        assert "MiB" in bar
        assert "6 files, 9.0 MiB: 9.0 MiB fetched in " in bar
        said = node.here("prefetch", "--limit-rate", "1k", path)
        assert said.stderr == ""  # no bar where there is no terminal
        assert "0 B fetched" in said.stdout


def test_prefetch_command_names_files_that_it_cannot_fetch(
    node: Node, s3: S3Server, bucket: Path, uri_of: UriOf
) -> None:
    node.configure(cache_bytes_max=6 * MIB, read_deadline_s=1.0)
    node.expected_in_log += ["b in s3://", "e in s3://", "f in s3://"]
    make(bucket / "ckpt", {"a": 1000, "b": 1000, "c": 4 * MIB, "d": 4 * MIB, "e": 5, "f": 5})
    with Forwarder(s3.endpoint) as forwarder:
        uri = uri_of(bucket / "ckpt").replace(quoted(s3.endpoint), quoted(forwarder.endpoint))
        with ckptfs.Checkpoint(uri).as_directory() as path:
            (bucket / "ckpt" / "b").write_bytes(b"of another size")
            done = node.here("prefetch", "--json", path, "[ab]", check=False)
            assert done.returncode == 1
            told = json.loads(done.stdout)
            assert (told["files"], told["bytes"], told["fetched"]) == (2, 2000, 1000)
            [error] = told["errors"]
            assert (error["path"], error["code"]) == ("b", "object-changed")
            assert done.stderr == (
                f"ckptfs: error: 1 of 2 files could not be fetched: {error['message']}\n"
            )
            full = node.here("prefetch", path, "[cd]", check=False)
            assert full.returncode == 1
            assert full.stderr.count("\n") == 1
            assert (
                "the cache can hold 6.0 MiB, which is enough for the first 1 of 2 files"
                in full.stderr
            )
            assert cached(f"{path}/c") == 4 * MIB
            forwarder.cut()
            dark = node.here("prefetch", "--json", path, "[ef]", check=False)
            assert dark.returncode == 1
            assert "the prefetch ended early: " in dark.stderr
            [error] = json.loads(dark.stdout)["errors"]
            assert error["path"] == ""
            assert error["code"].startswith("store-")


def test_prefetch_ends_with_its_command(node: Node, bucket: Path, uri_of: UriOf) -> None:
    make(bucket / "ckpt", {"large": 60 * MIB})
    uri = uri_of(bucket / "ckpt")
    node.here("mount")

    def attachments() -> list[AttachmentStatus]:
        with client.connect() as connection:
            return connection.status().attachments

    for how in (signal.SIGINT, signal.SIGKILL):
        before = sum(path.stat().st_blocks for path in node.cache_dir.glob("objects/*/*/data"))
        command = subprocess.Popen(
            [COMMAND, "prefetch", "--limit-rate", "4M", uri],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_until(lambda before=before: any(512 * before < a.cached for a in attachments()))
        command.send_signal(how)
        output, errors = command.communicate(timeout=30)
        assert output == ""
        if how is signal.SIGINT:
            assert (command.returncode, errors.strip()) == (130, "ckptfs: interrupted")
        wait_until(lambda: not attachments())
    told = prefetch(node, uri)
    assert told["cached"] >= 2 * MIB  # what was fetched stayed
    assert told["fetched"] >= 20 * MIB
