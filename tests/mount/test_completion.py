"""Completion by the Tab key, as shells ask for it, and help by topics."""

import re
import shutil
import socket
import sys
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import pytest
from conftest import Node

from ckptfs.cli import completion

pytestmark = pytest.mark.mount

UriOf = Callable[[Path], str]
BIN = Path(sys.executable).parent
COMMANDS = [
    *("mount", "umount", "restart", "status", "attach", "detach", "ls", "prefetch", "find"),
    *("doctor", "completion", "help", "meta"),
]


@pytest.fixture
def ask(node: Node, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], list[str]]:
    """The completions that ckptfs offers for a line, in the protocol between shells and typer."""

    def offered(shell: str, line: str) -> list[str]:
        words = line.split(" ")
        monkeypatch.setenv("_CKPTFS_COMPLETE", f"complete_{shell}")
        monkeypatch.setenv("_TYPER_COMPLETE_ARGS", line)
        monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
        done = node.here()
        monkeypatch.delenv("_CKPTFS_COMPLETE")
        assert done.stderr == ""
        return done.stdout.strip().splitlines()

    return offered


Ask = Callable[[str, str], list[str]]


def test_commands_and_topics(ask: Ask) -> None:
    assert {*COMMANDS} <= {*ask("bash", "ckptfs ")}
    assert ask("bash", "ckptfs umo") == ["umount"]
    assert ask("bash", "ckptfs meta up") == ["update"]
    assert ask("bash", "ckptfs doctor --j") == ["--json"]
    assert ask("bash", "ckptfs completion ") == ["bash", "zsh", "fish"]
    assert ask("bash", "ckptfs help s") == ["shell", "stores", "semantics", "status"]
    assert ask("fish", "ckptfs help sem") == ["semantics\tthe guarantees of a mounted checkpoint"]


def test_attached_checkpoints(node: Node, ask: Ask, small: Path, uri_of: UriOf) -> None:
    path = node.here("attach", uri_of(small)).stdout.strip()
    bucket = small.parent.parent.name
    for command in ("detach", "ls", "prefetch", "meta get", "meta list"):
        assert ask("bash", f"ckptfs {command} ") == [path]
        assert ask("bash", f"ckptfs {command} {path[:-3]}") == [path]
        assert ask("bash", f"ckptfs {command} /elsewhere") == []  # then the shell offers files
        assert ask("bash", f"ckptfs {command} s3") == []  # it has a query, which had to be quoted
        assert ask("fish", f"ckptfs {command} ") == [f"{path}\ts3://{bucket}/run/checkpoint"]
        assert path in ask("zsh", f"ckptfs {command} ")[0]


def test_completion_of_uris_needs_no_quotes(node: Node, ask: Ask, small: Path) -> None:
    path = node.here("attach", str(small)).stdout.strip()
    assert ask("bash", "ckptfs detach f") == [f"file://{small}"]
    assert ask("bash", "ckptfs detach /") == [path]


def test_completion_without_a_daemon_offers_and_prints_nothing(
    node: Node, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ask("bash", "ckptfs detach ") == []
    (node.folder / "ckptfs.toml").write_text("nonsense = 1\n")
    assert ask("bash", "ckptfs detach ") == []
    node.configure()
    monkeypatch.setattr(completion, "_ANSWER_S", 0.1)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(node.socket))
        silent.listen()
        assert completion.checkpoints("") == []
        assert ask("bash", "ckptfs detach ") == []
    node.socket.unlink()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts_are_valid(node: Node, shell: str) -> None:
    script = node.here("completion", shell).stdout
    assert "_CKPTFS_COMPLETE=complete_" in script
    if shell == "zsh":
        assert script.splitlines()[0] == "#compdef ckptfs"
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed: its script was not tried")
    (node.folder / "script").write_text(script)
    assert node.run(shell, "-n", str(node.folder / "script")).stderr == ""


def test_other_shells_are_refused(node: Node) -> None:
    done = node.here("completion", "csh", check=False)
    assert done.returncode == 2
    assert "'csh' is not one of bash, zsh, fish" in done.stderr


def test_bash_completes(
    node: Node, small: Path, uri_of: UriOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = node.here("attach", uri_of(small)).stdout.strip()
    monkeypatch.setenv("PATH", f"{BIN}:/usr/bin:/bin")
    script = (
        'eval "$(ckptfs completion bash)"\n'
        'COMP_WORDS=(ckptfs detach "$1") COMP_CWORD=2\n'
        "_ckptfs_completion ckptfs\n"
        'printf "%s\\n" "${COMPREPLY[@]}"; complete -p ckptfs\n'
    )
    said = node.run("bash", "-c", script, "bash", path[:4]).stdout.splitlines()
    assert said == [path, "complete -o default -F _ckptfs_completion ckptfs"]


def test_semantics_are_printed_as_they_are_and_for_a_terminal(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = files("ckptfs").joinpath("SEMANTICS.md").read_text()
    assert node.here("help", "semantics").stdout == text
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("PAGER", "cat")
    shown = node.run("script", "-qec", f"{BIN}/ckptfs help semantics", "/dev/null").stdout
    assert "\x1b[1m" in shown
    assert "\n## " not in shown
    lines = re.sub(r"\x1b\[[0-9;]*m", "", shown).replace("\r", "").splitlines()
    assert max(map(len, lines)) <= 80


def test_help_lists_its_topics(node: Node) -> None:
    for arguments in (["help"], ["--help"]):
        words = " ".join(node.here(*arguments).stdout.split())
        assert "semantics the guarantees of a mounted checkpoint" in words
    wrong = node.here("help", "nonsense", check=False).stderr
    assert "no command or topic 'nonsense'" in wrong
    assert "semantics" in wrong
