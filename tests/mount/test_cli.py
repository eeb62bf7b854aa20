"""The command line: what it prints, what it refuses, and what it never shows."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Node, wait_until
from support.s3server import S3Server

import ckptfs

pytestmark = pytest.mark.mount

UriOf = Callable[[Path], str]

ATTACHMENT_FIELDS = {
    *("name", "path", "uri", "version", "state", "files", "size", "cached", "holders"),
    "volume",
    *("open_files", "pinned", "attached", "uid", "error", "skipped", "skipped_count"),
    *("processes", "reads_per_s", "read_bytes_per_s", "fetched_bytes_per_s"),
}
STATUS_FIELDS = {
    *("taken_over_s", "host"),
    *("version", "pid", "mount", "cache_dir", "cache_bytes", "cache_bytes_max"),
    *(
        "fetched_bytes",
        "fetched_spans",
        "taken_bytes",
        "given_bytes",
        "passthrough",
        "restarts",
        "attachments",
        "left_out",
        "log",
        "workers",
        "worker_bytes",
        "uploads",
        "uploads_left_out",
    ),
}


def refusal(node: Node, *arguments: str) -> str:
    """The one line of a command that fails."""
    done = node.here(*arguments, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("ckptfs: error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_mount_and_umount(node: Node) -> None:
    assert "no ckptfs daemon is running" in refusal(node, "status")
    assert "no ckptfs daemon is running" in refusal(node, "umount")
    assert "no ckptfs daemon is running" in refusal(node, "ls")
    assert node.cli("mount").stdout == f"{node.mount}\n"
    assert os.path.ismount(node.mount)
    assert "no checkpoint is attached" in node.cli("status").stdout
    done = node.cli("umount")
    assert (done.stdout, done.stderr) == ("", "")
    assert not node.mount.exists()
    assert not node.socket.exists()


def test_attach_and_detach(node: Node, small: Path, uri_of: UriOf) -> None:
    uri = uri_of(small)
    done = node.cli("attach", uri)
    path = done.stdout.rstrip("\n")
    assert (done.stdout, done.stderr) == (f"{path}\n", "")
    assert Path(path).parent == node.mount
    assert node.here("attach", uri).stdout == done.stdout
    node.here("detach", path)
    assert "is not attached" in refusal(node, "detach", path)
    assert "is not attached" in refusal(node, "detach", uri)
    node.here("attach", uri)
    node.here("detach", f"{path}/layers/0")  # any path inside it
    assert node.status()["attachments"] == []
    assert "file:///tmp is not attached" in refusal(node, "detach", "/tmp")
    assert "is the mount itself" in refusal(node, "detach", str(node.mount))


def test_detach_while_it_is_held(node: Node, small: Path, uri_of: UriOf) -> None:
    uri = uri_of(small)
    with ckptfs.Checkpoint(uri).as_directory() as path:
        line = refusal(node, "detach", uri)
        assert str(os.getpid()) in line
        assert "--force" in line
        assert " is in use; ckptfs status names the processes" in refusal(node, "umount")
        node.here("attach", uri)
        node.here("detach", uri)  # takes the pin away
        assert node.status()["attachments"][0]["pinned"] is False
        assert os.listdir(path)
        node.here("detach", "--force", uri)
        assert node.status()["attachments"] == []
        with pytest.raises(OSError, match=r"No such file|Stale"):
            os.listdir(path)
        with ckptfs.Checkpoint(uri).as_directory() as again:  # a fresh one
            assert Path(again, "config.json").read_text() == '{"layers": 1}'


def test_ls(node: Node, small: Path, uri_of: UriOf) -> None:
    uri = uri_of(small)
    path = node.here("attach", uri).stdout.rstrip("\n")
    Path(path, "config.json").read_bytes()
    state = "user.ckptfs.state"
    wait_until(lambda: os.getxattr(f"{path}/config.json", state) == b"cached")
    assert path in node.here("ls", check=True).stdout.replace("\n", "").replace(" ", "")
    rows = json.loads(node.here("ls", "--json", path).stdout)
    assert [(row["path"], row["size"], row["cached"], row["state"]) for row in rows] == [
        ("config.json", 13, 13, "cached"),
        ("empty", 0, 0, "cached"),
        ("layers/0/weights.bin", 3_000_000, 0, "lazy"),
    ]
    assert all(row.keys() == {"path", "size", "cached", "state", "version"} for row in rows)
    assert json.loads(node.here("ls", "--json", uri).stdout) == rows
    [row] = json.loads(node.here("ls", "--json", f"{path}/config.json").stdout)
    assert row == rows[0]
    [row] = json.loads(node.here("ls", "--json", f"{path}/layers").stdout)
    assert row["path"] == "0/weights.bin"
    table = node.here("ls", path).stdout.splitlines()
    versions = [row["version"] for row in rows]
    assert table[0].split() == ["SIZE", "CACHED", "STATE", "VERSION", "PATH"]
    assert table[1].split() == [
        *("13", "B", "██████████", "100%", "cached", versions[0], "config.json"),
    ]
    assert table[3].split() == [
        *("2.9", "MiB", "░░░░░░░░░░", "0%", "lazy", versions[2], "layers/0/weights.bin"),
    ]
    assert "No such file" in refusal(node, "ls", f"{path}/nothing")
    assert {a["uri"] for a in json.loads(node.here("ls", "--json").stdout)} == {
        node.status()["attachments"][0]["uri"]
    }


def test_ls_of_a_uri_does_not_keep_it(node: Node, small: Path, uri_of: UriOf) -> None:
    node.configure(linger_s=0)
    node.here("mount")
    assert "config.json" in node.here("ls", uri_of(small)).stdout
    node.wait_detached()


def test_json_has_the_documented_fields(node: Node, small: Path, uri_of: UriOf) -> None:
    attached = json.loads(node.here("attach", "--json", uri_of(small)).stdout)
    assert attached.keys() == {"path", "uri", "version", "files", "size", "skipped"}
    assert (attached["files"], attached["size"], attached["skipped"]) == (3, 3_000_013, 0)
    status = node.status()
    assert status.keys() == STATUS_FIELDS
    [attachment] = status["attachments"]
    assert attachment.keys() == ATTACHMENT_FIELDS
    for field in ("path", "uri", "version", "files", "size"):
        assert attachment[field] == attached[field]
    assert status["mount"] == str(node.mount)
    assert status["cache_dir"] == str(node.cache_dir)
    assert json.loads(node.here("ls", "--json").stdout) == status["attachments"]


@pytest.mark.parametrize("columns", [80, 200])
def test_status_table(
    node: Node, small: Path, uri_of: UriOf, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm-256color")
    with ckptfs.Checkpoint(uri_of(small)).as_directory() as path:
        Path(path, "layers/0/weights.bin").read_bytes()
        node.wait_quiet()
        plain = node.here("status").stdout
        assert "\x1b" not in plain
        assert max(map(len, plain.splitlines())) <= max(columns, len(path) + 60)
        facts, _, table = plain.partition("\n\n")
        names = ["daemon", "mount", "cache", "fetched", "passthrough", "log"]
        assert [line.split()[0] for line in facts.splitlines()] == names
        header = table.splitlines()[0].split()
        assert header == ["STATE", "CACHED", "SIZE", "FILES", "CHECKPOINT"]
        joined = "".join(plain.split())
        assert f"s3://{small.parent.parent.name}/run/checkpoint" in joined or columns == 80
        assert f"held by pid {os.getpid()} (" in plain
        [holder] = node.status()["attachments"][0]["processes"]
        assert (holder["pid"], holder["open_files"]) == (os.getpid(), 0)
        assert holder["command"] in plain
        assert "2.9MiB" in joined
        assert "99%" in joined  # never 100 % before it is all there
        assert path in plain
        command = Path(sys.executable).with_name("ckptfs")
        done = node.run("script", "-qec", f"{command} status", "/dev/null")
        assert "\x1b[" in done.stdout  # colours on a terminal
        assert "CHECKPOINT" in done.stdout


def test_usage(node: Node) -> None:
    commands = [
        "mount",
        "umount",
        "status",
        "top",
        "attach",
        "detach",
        "ls",
        "prefetch",
        "find",
        "meta",
        "help",
    ]
    for arguments in (["--help"], ["help"]):
        text = node.here(*arguments).stdout
        for command in commands:
            assert f" {command} " in text
    for command in commands[:-1]:
        explained = node.here("help", command).stdout
        assert f"ckptfs {command}" in explained
    for wrong in (["nonsense"], ["status", "--nonsense"], ["attach"], ["help", "nonsense"]):
        done = node.here(*wrong, check=False)
        assert done.returncode == 2
        assert done.stdout == ""
        assert "Traceback" not in done.stderr
    assert "nonsense" in node.here("nonsense", check=False).stderr


def test_help_semantics(node: Node) -> None:
    text = node.here("help", "semantics").stdout
    for promise in ("Lazy", "Pinned", "ESTALE", "EROFS"):
        assert promise in text


def test_a_closed_pipe_is_no_traceback(node: Node, small: Path, uri_of: UriOf) -> None:
    path = node.here("attach", uri_of(small)).stdout.rstrip("\n")
    command = str(Path(sys.executable).with_name("ckptfs"))
    done = subprocess.run(
        ["sh", "-c", f"{command} ls {path} | true"],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert "Traceback" not in done.stderr


# -- secrets


def test_secrets_are_shown_nowhere(node: Node, s3: S3Server, small: Path, uri_of: UriOf) -> None:
    secret = s3.secret_key.encode()
    with ckptfs.Checkpoint(uri_of(small)).as_directory() as path:
        Path(path, "layers/0/weights.bin").read_bytes()
        daemon = node.status()["pid"]
        keeper = int(Path(f"/proc/{daemon}/stat").read_text().rpartition(")")[2].split()[1])
        assert b"ckptfs._keeper.keeper" in Path(f"/proc/{keeper}/cmdline").read_bytes()
        for pid in (daemon, keeper):
            assert secret not in Path(f"/proc/{pid}/cmdline").read_bytes()
            assert secret not in Path(f"/proc/{pid}/environ").read_bytes()
        for command in (["status"], ["status", "--json"], ["ls", "--json"], ["ls", path]):
            assert s3.secret_key not in node.here(*command).stdout
        node.here("ls", "--json", path)
    assert s3.secret_key not in node.log()
    node.end()
    found = node.run("grep", "-rl", s3.secret_key, str(node.folder), check=False)
    assert (found.returncode, found.stdout) == (1, "")
    assert any(node.cache_dir.glob("objects/*/*/data"))


def test_attaching_again_shows_the_new_version(node: Node, small: Path, uri_of: UriOf) -> None:
    path = node.here("attach", uri_of(small)).stdout.strip()
    assert Path(path, "config.json").read_text() == '{"layers": 1}'
    (small / "config.json").write_text('{"layers": "two"}')
    # Its readers have gone: only the pin holds it.
    wait_until(lambda: node.status()["attachments"][0]["open_files"] == 0)
    assert node.here("attach", uri_of(small)).stdout.strip() == path
    assert Path(path, "config.json").read_text() == '{"layers": "two"}'
    (attachment,) = node.status()["attachments"]
    assert attachment["pinned"]


def test_commands_work_from_a_mount_that_is_gone(node: Node) -> None:
    node.cli("mount")
    ckptfs = str(Path(sys.executable).with_name("ckptfs"))
    script = f"cd {node.mount} && {ckptfs} umount && {ckptfs} status"
    done = node.run("sh", "-c", script, check=False)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith("ckptfs: error: no ckptfs daemon is running")
