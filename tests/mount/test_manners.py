"""How each command behaves in a shell: help, closed pipes, full disks, and one way to name a
checkpoint."""

import itertools
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer.main
from conftest import Node, wait_until
from support.s3server import S3Server

import ckptfs
from ckptfs._config import environment
from ckptfs.cli import app

pytestmark = pytest.mark.mount

UriOf = Callable[[Path], str]
COMMAND = str(Path(sys.executable).with_name("ckptfs"))


def commands(group: Any = None, *before: str) -> Iterator[tuple[str, ...]]:
    """All commands, as they are typed."""
    group = typer.main.get_command(app) if group is None else group
    for name, command in group.commands.items():
        yield (*before, name)
        if hasattr(command, "commands"):
            yield from commands(command, *before, name)


ALL = [(), *commands()]


def command_of(words: tuple[str, ...]) -> Any:
    """The command or the group with that name."""
    command: Any = typer.main.get_command(app)
    for word in words:
        command = command.commands[word]
    return command


@pytest.fixture
def attached(module_node: Node, small: Path, uri_of: UriOf, tmp_path: Path) -> dict[str, str]:
    """A checkpoint with metadata that was read of, and the words that name it and its like."""
    (small / ".metadata.json").write_text('{"loss": NaN, "best": -Infinity, "step": 3}')
    uri = uri_of(small)
    path = module_node.here("attach", uri).stdout.strip()
    Path(path, "layers/0/weights.bin").read_bytes()
    module_node.wait_quiet()
    return {
        "URI": uri,
        "PATH": path,
        "OUT": str(tmp_path / "out"),
        "RUN": uri_of(small.parent),
    }


PRINTING = [
    "attach URI",
    "attach --json URI",
    "ls",
    "ls --json",
    "ls PATH",
    "ls --json URI",
    "ls --tensors PATH",
    "ls --tensors --json PATH",
    "find URI",
    "find --json RUN",
    "prefetch PATH",
    "prefetch --json PATH",
    "plan save PATH -o OUT",
    "plan apply --json --plan OUT PATH",
    "plan show OUT",
    "plan show --json OUT",
    "report PATH -o OUT",
    "report --json PATH",
    "meta list PATH",
    "meta list --json PATH",
    "meta get PATH loss",
    "cache ls",
    "cache ls --json",
    "cache ls --json PATH",
    "cache gc",
    "cache gc --json",
    "cache verify",
    "cache verify --json",
    "status",
    "status --json",
    "top --once --interval 200ms",
    "top --json --interval 200ms",
    "config",
    "config --json",
    "reload",
    "reload --json",
    "mount",
    "doctor",
    "doctor --json",
    "help",
    "help prefetch",
    "help semantics",
    "completion bash",
    "--help",
    "--version",
]


def line_of(words: str, attached: dict[str, str]) -> str:
    """A command line for a shell."""
    return shlex.join([COMMAND, *(attached.get(word, word) for word in words.split())])


def shell(node: Node, text: str) -> "subprocess.CompletedProcess[str]":
    return node.run("bash", "-c", text, check=False)


# -- what can be asked of each command


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_each_command_has_help(node: Node, words: tuple[str, ...], monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = node.here(*words, "-h").stdout
    assert text == node.here(*words, "--help").stdout
    if words != ("config",):  # a topic, too
        assert text == node.here("help", *words).stdout
    assert text.startswith(f"Usage: {' '.join(['ckptfs', *words])} ")
    assert max(map(len, text.splitlines())) <= 80 or "Examples:" in text.split("\n\n")[-1]
    assert "..." not in text.replace("]...", "").replace("...\n", "")
    assert not re.search(r"<\w+>|\[default|\[required|x>=", text)
    assert "install-completion" not in text
    command = command_of(words)
    assert command.help
    if not hasattr(command, "commands"):
        assert f"ckptfs {' '.join(words)}" in (command.epilog or ""), "it has no example"
        assert all(getattr(each, "help", "") for each in command.params)


def test_commands_stand_in_groups(node: Node) -> None:
    text = node.here("--help").stdout
    headings = [line[:-1] for line in text.splitlines() if re.fullmatch(r"\S.*:", line)]
    assert headings == ["Checkpoints", "This node", "The daemon", "Help", "Options"]
    for words in commands():
        assert f"\n  {words[0]} " in text


@pytest.mark.parametrize("option", ["--version", "-V"])
def test_version(node: Node, option: str) -> None:
    assert node.here(option).stdout == f"ckptfs {version('ckptfs')}\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("statsu", "no such command 'statsu'. Did you mean 'status', 'restart'?"),
        ("nonsense", "no such command 'nonsense'"),
        ("status --jsno", "no such option: --jsno"),
        ("attach", "missing argument 'URI'"),
        ("meta set x", "missing argument 'KEY'"),
        ("completion", "missing argument 'SHELL'. Choose from: bash, zsh, fish"),
        ("completion tcsh", "invalid value for 'SHELL': 'tcsh' is not one of bash, zsh, fish"),
        ("top --sort age", "invalid value for '--sort': 'age' is not one of read, store, reads, "),
        ("top --interval 5m", "invalid value for '--interval': 5m is not from 200ms to 1min"),
        ("top --interval much", "invalid value for '--interval': 'much' is not a duration"),
        (
            "find /run --limit 0",
            "invalid value for '--limit': '0' is not a whole number of 1 or more",
        ),
        (
            "plan apply /run --rank last",
            "invalid value for '--rank': 'last' is not a whole number of -1 or more",
        ),
        (
            "help cache nonsense",
            "invalid value: no command or topic 'cache nonsense'; there are ls",
        ),
    ],
)
def test_a_wrong_command_line(node: Node, words: str, said: str) -> None:
    done = node.here(*words.split(), check=False)
    first, usage, hint = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "")
    assert first.startswith("ckptfs: error: ")
    assert first.removeprefix("ckptfs: error: ").startswith(said)
    assert usage.startswith("Usage: ckptfs ")
    assert re.fullmatch(r"Try 'ckptfs.* --help' for help\.", hint)


def test_parameters_have_types_whose_mistakes_ckptfs_explains() -> None:
    texts = str, list[str], bool, Path, None  # any text is one, and a flag takes no value
    for words in ALL:
        for parameter in command_of(words).params:
            kind = parameter.type_descriptor
            is_number = kind and kind.annotation is int and parameter.max is None
            is_explained = is_number or (kind and kind.choices)
            assert is_explained or getattr(kind, "annotation", None) in texts, parameter.name


# -- outputs that cannot be written


def plan_for(node: Node, attached: dict[str, str], number: int, words: str) -> dict[str, str]:
    """`attached`, with a place of its own for the output of a command or for the plan it reads."""
    out = f"{attached['OUT']}{number}"
    if " OUT" in words and not words.startswith("plan save"):
        node.here("plan", "save", attached["PATH"], "-o", out)
    return attached | {"OUT": out}


@pytest.mark.parametrize(
    "part", [0, *(pytest.param(n, marks=pytest.mark.long) for n in range(1, 6))]
)
def test_command_with_a_closed_pipe_ends_without_traceback(
    module_node: Node, attached: dict[str, str], subtests: pytest.Subtests, part: int
) -> None:
    for number, words in enumerate(PRINTING[part::6]):
        with subtests.test(words):
            line = line_of(words, plan_for(module_node, attached, number, words))
            # Its reader has gone before it begins: the pipe of a process that has ended.
            done = shell(module_node, f"exec 3> >(true); wait $!; {line} >&3; echo $?")
            assert (done.stdout, done.stderr) == ("141\n", "")
            if "--json" in words:  # written like the text
                continue
            first = shell(module_node, f"{line} | head -n 1; echo ${{PIPESTATUS[0]}}")
            assert first.stderr == "" or "warning" in first.stderr
            allowed = ("0", "1" if words.startswith("doctor") else "0", "141")
            assert first.stdout.splitlines()[-1] in allowed


UNWRITABLE = {">/dev/full": "No space left on device", ">&-": "Bad file descriptor"}


def test_an_output_that_cannot_be_written(
    module_node: Node, attached: dict[str, str], subtests: pytest.Subtests
) -> None:
    commands = "status", "ls --json", "doctor", "help semantics", "config"
    for words, (place, reason) in itertools.product(commands, UNWRITABLE.items()):
        with subtests.test(words, place=place):
            done = shell(module_node, f"{line_of(words, attached)} {place}")
            assert done.returncode == 1
            assert done.stderr == f"ckptfs: error: cannot write to standard output: {reason}\n"


def test_other_streams_that_are_closed(
    module_node: Node, attached: dict[str, str], subtests: pytest.Subtests
) -> None:
    for place in ("2>&-", "2>/dev/full", "<&-"):
        with subtests.test(place):
            good = shell(module_node, f"{line_of('ls --json', attached)} {place}")
            assert good.returncode == 0
            assert json.loads(good.stdout)[0]["path"] == attached["PATH"]
            bad = shell(module_node, f"{COMMAND} detach file:///nothing {place}")
            assert (bad.returncode, bad.stdout) == (1, "")


def test_a_command_that_prints_nothing_needs_no_output(
    module_node: Node, attached: dict[str, str]
) -> None:
    done = shell(module_node, f"{line_of('detach URI', attached)} >&-")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("words", ["top --once --interval 1min", "prefetch --limit-rate 1k HUGE"])
def test_ctrl_c(
    module_node: Node, attached: dict[str, str], bucket: Path, uri_of: UriOf, words: str
) -> None:
    (bucket / "huge").mkdir()
    (bucket / "huge" / "x").write_bytes(bytes(8 << 20))
    command = shlex.split(line_of(words, {"HUGE": uri_of(bucket / "huge")}))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: _has_begun(process.pid))
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "ckptfs: interrupted\n")


def _has_begun(pid: int) -> bool:
    """Whether the process has a connection to a daemon: it is past its imports."""
    try:
        return any("socket:" in os.readlink(f"/proc/{pid}/fd/{fd}") for fd in range(3, 10))
    except OSError:
        return False


# -- JSON


def _refuse(text: str) -> None:
    raise AssertionError(f"{text} is not JSON")


def test_json_is_json(
    module_node: Node, attached: dict[str, str], subtests: pytest.Subtests
) -> None:
    for number, words in enumerate(each for each in PRINTING if "--json" in each or "get" in each):
        with subtests.test(words):
            given = plan_for(module_node, attached, number, words)
            done = module_node.here(*(given.get(word, word) for word in words.split()), check=False)
            found = json.loads(done.stdout, parse_constant=_refuse)
            if words.startswith("meta list"):
                assert found == {"loss": "NaN", "best": "-Infinity", "step": 3}
            elif words.startswith("meta get"):
                assert found == "NaN"
                assert math.isnan(float(found))
            elif words.startswith("find"):
                [checkpoint] = found
                assert checkpoint["metadata"]["loss"] == "NaN"


# -- one way to name a checkpoint


def _spellings(node: Node, uri: str, path: str) -> dict[str, str]:
    """The ways to name the same checkpoint."""
    return {
        "the URI": uri,
        "a slash at its end": uri.replace("/checkpoint?", "/checkpoint/?"),
        "another order of parameters": re.sub(r"\?(.*?)&(.*)", r"?\2&\1", uri),
        "the path": path,
        "a slash behind the path": f"{path}/",
        "a file inside": f"{path}/config.json",
        "a directory inside": f"{path}/layers/0",
        "what is not there": f"{path}/nothing",
        "the path by way of others": f"{node.mount}/../{node.mount.name}/{Path(path).name}",
    }


def test_detach_takes_what_attach_took(
    module_node: Node, small: Path, uri_of: UriOf, subtests: pytest.Subtests
) -> None:
    uri = uri_of(small)
    path = module_node.here("attach", uri).stdout.strip()
    for number, (spelling, text) in enumerate(_spellings(module_node, uri, path).items()):
        with subtests.test(spelling):
            assert module_node.here("attach", uri).stdout.strip() == path
            if spelling != "what is not there":
                assert "weights.bin" in module_node.here("ls", text).stdout or "config.json" in text
                out = str(module_node.folder / f"report{number}")
                assert module_node.here("report", text, "-o", out).returncode == 0
                assert module_node.here("prefetch", text).stdout
                assert module_node.here("cache", "ls", text).stderr == ""
            module_node.here("detach", text)
            module_node.wait_detached()


def test_local_directories(
    module_node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subtests: pytest.Subtests
) -> None:
    folder = tmp_path / "run" / "ckpt"
    folder.mkdir(parents=True)
    (folder / "a.json").write_text("{}")
    monkeypatch.setenv("HOME", str(tmp_path))
    texts = {
        "absolute": str(folder),
        "relative": "run/ckpt",
        "dot": ".",
        "home": "~/run/ckpt",
        "uri": f"file://{folder}",
        "link": f"{folder}/../ckpt",
    }
    for how, text in texts.items():
        with subtests.test(how):
            monkeypatch.chdir(folder if how == "dot" else tmp_path)
            path = module_node.here("attach", text).stdout.strip()
            assert os.listdir(path) == ["a.json"]
            assert "a.json" in module_node.here("ls", text).stdout
            assert "1 file" in module_node.here("prefetch", text).stdout
            module_node.here("detach", text)
            module_node.wait_detached()
    # Also when the directory itself has gone.
    monkeypatch.chdir(tmp_path)
    module_node.here("attach", str(folder))
    (folder / "a.json").unlink()
    folder.rmdir()
    module_node.here("detach", str(folder))
    module_node.wait_detached()


def test_a_uri_without_its_beginning(node: Node) -> None:
    for command in ("attach", "ls", "prefetch", "detach"):
        done = node.here(command, "bucket/run7/checkpoint_000100", check=False)
        assert done.returncode == 1
        assert "is not in this directory; write a place in a store like s3://" in done.stderr


def test_a_path_in_the_mount_is_attached_already(
    module_node: Node, attached: dict[str, str]
) -> None:
    done = module_node.here("attach", attached["PATH"], check=False)
    assert "is inside the mount, so its checkpoint is attached already" in done.stderr


# -- what matches nothing


def test_a_glob_that_matches_nothing(module_node: Node, attached: dict[str, str]) -> None:
    done = module_node.here("prefetch", attached["PATH"], "*.json", "*.pt", "nothing", check=False)
    assert done.returncode == 1
    assert "2 files, 56 B" in done.stdout
    assert "matches *.pt, nothing (others are fetched); ckptfs ls lists the files" in done.stderr
    told = json.loads(
        module_node.here(
            "prefetch", "--json", f"{attached['PATH']}/layers", "*.pt", check=False
        ).stdout
    )
    assert (told["files"], told["unmatched"]) == (0, ["*.pt"])
    # Each of these matches, though the first has all that the second has.
    assert module_node.here("prefetch", attached["PATH"], "*", "config.json").stderr == ""


def test_an_empty_plan(module_node: Node, attached: dict[str, str]) -> None:
    plan = module_node.folder / "plan.json"
    nothing = {"plan": 1, "uri": "s3://b/c", "version": "v", "files": [], "steps": []}
    plan.write_text(json.dumps(nothing))
    assert "the plan is empty" in module_node.here("plan", "show", str(plan)).stdout
    for rank in ("-1", "3"):
        done = module_node.here(
            "plan", "apply", attached["PATH"], "--plan", str(plan), "--rank", rank, check=False
        )
        assert done.returncode == 1
        assert "is empty; restore a checkpoint, and save a plan again" in done.stderr
    step = [0, "", 0, 5, [0, 1]]
    plan.write_text(json.dumps(nothing | {"files": ["config.json"], "steps": [step]}))
    done = module_node.here(
        "plan", "apply", attached["PATH"], "--plan", str(plan), "--rank", "7", check=False
    )
    assert "has nothing for rank 7; it has ranks 0-1" in done.stderr
    plan.write_text(json.dumps(nothing | {"files": ["other"], "steps": [step]}))
    done = module_node.here("plan", "apply", attached["PATH"], "--plan", str(plan), check=False)
    assert "has no file that the plan names" in done.stderr


def test_keys_that_no_checkpoint_has(module_node: Node, attached: dict[str, str]) -> None:
    done = module_node.here("find", attached["RUN"], "--sort", "stpe")
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr == "ckptfs: warning: no metadata has the key 'stpe'; did you mean 'step'?\n"
    done = module_node.here("find", attached["RUN"], "--where", "name == baseline")
    assert "no metadata has the key 'baseline'; write text in quotes: 'baseline'" in done.stderr


# -- the environment


def test_unknown_variables_are_named(
    module_node: Node, attached: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CKPTFS_CACHEDIR", "/x")
    monkeypatch.setenv("CKPTFS_ZZZ", "/x")
    monkeypatch.setenv("CKPTFS_SERVICE_HOST", "10.0.0.1")  # of Kubernetes
    monkeypatch.setenv("CKPTFS_METRICS_PORT_9467_TCP_ADDR", "10.0.0.1")
    monkeypatch.setenv("CKPTFS_PORT", "tcp://10.0.0.1:80")
    lines = module_node.here("ls").stderr.splitlines()
    assert lines[0].removeprefix("ckptfs: warning: the variable ") == (
        "CKPTFS_CACHEDIR has no effect; did you mean CKPTFS_CACHE_DIR?"
    )
    assert lines[1].startswith(
        "ckptfs: warning: the variable CKPTFS_ZZZ has no effect; ckptfs knows"
    )
    assert len(lines) == 2
    checked = module_node.here("doctor").stdout
    assert re.search(
        "^warning +config +valid; .*; CKPTFS_CACHEDIR, CKPTFS_ZZZ have no effect → did you mean "
        "CKPTFS_CACHE_DIR\\?; ckptfs knows CKPTFS_CONFIG",
        checked,
        re.MULTILINE,
    ), checked
    told = json.loads(module_node.here("config", "--json").stdout)
    assert told["unknown_variables"] == ["CKPTFS_CACHEDIR", "CKPTFS_ZZZ"]


def test_each_variable_that_the_code_reads_is_known() -> None:
    package = Path(ckptfs.__file__).parent
    code = "\n".join(path.read_text() for path in package.rglob("*.py"))
    read = set(re.findall(r"""environ(?:\.get\(|\[)["'](CKPTFS_\w+)""", code))
    assert read
    assert environment.unknown(dict.fromkeys(read, "")) == {}


# -- a terminal


def test_the_pager(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    monkeypatch.setenv("PAGER", "head -n 2 >/dev/null; echo the pager was here")
    on_a_terminal = ["script", "-qec", f"{COMMAND} help semantics", "/dev/null"]
    assert node.run(*on_a_terminal).stdout.strip() == "the pager was here"
    assert "the pager" not in node.run(COMMAND, "help", "semantics").stdout
    short = ["script", "-qec", f"{COMMAND} help detach", "/dev/null"]
    monkeypatch.setenv("LINES", "50")
    assert "Usage: ckptfs detach" in node.run(*short).stdout
    monkeypatch.setenv("PAGER", "no-such-program")
    assert "Guarantees of a mounted checkpoint" in node.run(*on_a_terminal).stdout
    monkeypatch.setenv("PAGER", "exit 3")
    monkeypatch.setenv("TERM", "dumb")
    assert "Guarantees of a mounted checkpoint" in node.run(*on_a_terminal).stdout


def test_a_status_without_colours(
    module_node: Node, attached: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1")
    shown = module_node.run("script", "-qec", f"{COMMAND} status", "/dev/null").stdout
    assert not re.search(r"\x1b\[(?:\d+;)*3\d", shown)
    monkeypatch.setenv("COLUMNS", "40")
    uri = f"s3://{attached['URI'].partition('@')[2].partition('?')[0]}"
    assert uri in module_node.run("script", "-qec", f"{COMMAND} status", "/dev/null").stdout


def test_what_a_configuration_shows(node: Node, s3: S3Server) -> None:
    node.configure(read_deadline_s="5min", cache_bytes_max="500G", linger_s=0.2)
    rows = [line.split() for line in node.here("config").stdout.splitlines()]
    shown = {row[0]: row[1] for row in rows if len(row) > 2}
    assert (shown["read_deadline_s"], shown["linger_s"], shown["idle_exit_s"]) == (
        "5min",
        "200ms",
        "1min",
    )
    assert (shown["cache_bytes_max"], shown["span_bytes_max"]) == ("500GB", "8MiB")
    assert shown["restart"] == "true"
    settings = json.loads(node.here("config", "--json").stdout)["settings"]
    assert {each["key"]: each["value"] for each in settings}["read_deadline_s"] == 300.0
