"""``ckptfs find``: which checkpoints it finds, in what order, and what it says of the others."""

import json
import math
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Node
from support.fakes import FakeStore
from support.s3server import S3Server

from ckptfs._model.location import Location
from ckptfs._store.search import BYTES_MAX, LEVELS_MAX, THREADS, Found, search
from ckptfs.cli import app
from ckptfs.errors import AccessDenied

UriOf = Callable[[Path], str]
FILE = ".metadata.json"
HERE = Location("s3", "bucket/runs", {"region": "us-east-1"}, {"secret_key": "hidden"})


def add(directory: Path, content: Any) -> None:
    """Make a checkpoint with this metadata; text is written as it is."""
    directory.mkdir(parents=True)
    (directory / FILE).write_text(content if isinstance(content, str) else json.dumps(content))
    (directory / "weights.bin").write_bytes(b"weights")


@pytest.fixture
def runs(bucket: Path) -> Path:
    """Two runs with some trials, ``<bucket>/my runs/<run>/<trial>/checkpoint_…``: 40 checkpoints
    with metadata, of step 0 to 390."""
    top = bucket / "my runs"
    for number in range(40):
        directory = top / f"run{number // 20}" / f"trial_{number // 10:02}"
        metadata = {
            "step": 10 * number,
            "val_loss": 1 / (1 + number),
            "name": f"run{number // 20}-{number}",
            "optim": {"lr": 0.1 if number % 2 else 0.01},
            "losses": [1.0, 0.5, number],
            "eval/loss": number % 7,
        }
        add(directory / f"checkpoint_{number:06}", metadata)
    (top / "run0" / "no-metadata").mkdir()
    (top / "run0" / "no-metadata" / "weights.bin").write_bytes(b"weights")
    (top / "run0" / "metadata.json").write_text("{}")
    return top


def numbers(stdout: str) -> list[int]:
    """The checkpoints' numbers, in the order of the output's lines."""
    return [int(line.partition("?")[0][-6:]) for line in stdout.splitlines()]


def test_all_with_metadata_are_found_in_order(
    node: Node, runs: Path, uri_of: UriOf, s3: S3Server
) -> None:
    done = node.here("find", uri_of(runs))
    assert done.stderr == ""
    assert numbers(done.stdout) == list(range(40))
    bucket = runs.parent.name
    query = f"endpoint_override=http://{s3.endpoint}&region={s3.region}"
    assert done.stdout.splitlines()[25] == (
        f"s3://{bucket}/my%20runs/run1/trial_02/checkpoint_000025?{query}"
    )
    assert s3.secret_key not in done.stdout
    assert s3.access_key not in done.stdout
    targets = [request.target for request in s3.traffic().requests]
    assert sum("list-type" in target for target in targets) == 1
    assert not any("weights.bin" in target for target in targets if "list-type" not in target)
    within = node.here("find", uri_of(runs / "run1" / "trial_03")).stdout
    assert numbers(within) == list(range(30, 40))
    assert numbers(node.here("find", uri_of(runs), "--reverse").stdout) == list(range(39, -1, -1))
    one = runs / "run1" / "trial_03" / "checkpoint_000030"
    assert numbers(node.here("find", uri_of(one)).stdout) == [30]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--where", "val_loss < 0.03 and step > 350"], [36, 37, 38, 39]),
        (["--where", "10 <= step <= 30"], [1, 2, 3]),
        (["--where", "losses[-1] in [3, 5.0, 100]"], [3, 5]),
        (["--where", 'optim.lr == 0.1 and meta["eval/loss"] == 0'], [7, 21, 35]),
        (["--where", 'matches(name, "run1-2*")', "--limit", "2"], [20, 21]),
        (["--where", "step < 0"], []),
        (["--where", "not exists(step)"], []),
        (["--sort", "val_loss", "--limit", "3"], [39, 38, 37]),
        (["--sort", "val_loss", "--limit", "2", "--reverse"], [0, 1]),
        (["--sort", "optim.lr", "--where", "step < 40"], [0, 2, 1, 3]),
        (["--sort", "optim.lr", "--where", "step < 40", "--reverse"], [1, 3, 0, 2]),
        (["--sort", '-meta["eval/loss"]', "--limit", "3"], [6, 13, 20]),
        (["--sort", "name", "--where", "step in [20, 90, 100]"], [10, 2, 9]),
        (["--limit", "100"], list(range(40))),
    ],
)
@pytest.mark.usefixtures("node")
def test_conditions_and_order(
    runs: Path,
    uri_of: UriOf,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    expected: list[int],
) -> None:
    app(["find", uri_of(runs), *arguments], standalone_mode=False)  # faster than a process
    stdout, stderr = capsys.readouterr()
    assert numbers(stdout) == expected
    assert stderr == ""


def test_json(node: Node, runs: Path, uri_of: UriOf) -> None:
    arguments = ("find", uri_of(runs), "--where", "step in [30, 20]")
    rows = json.loads(node.here(*arguments, "--json").stdout)
    assert [row["uri"] for row in rows] == node.here(*arguments).stdout.splitlines()
    assert [row.keys() for row in rows] == [{"uri", "metadata"}] * 2
    assert rows[0]["metadata"] == json.loads(
        (runs / "run0" / "trial_00" / "checkpoint_000002" / FILE).read_text()
    )
    assert json.loads(node.here("find", uri_of(runs), "--where", "step < 0", "--json").stdout) == []


def test_values_that_have_no_order_are_last(node: Node, tmp_path: Path) -> None:
    values = {"a": None, "b": 2, "c": "x", "d": math.nan, "e": 1.5, "f": [1], "g": "w", "i": True}
    for name, value in values.items():
        add(tmp_path / name, {"key": value})
    add(tmp_path / "h", {})

    def order(*arguments: str) -> str:
        lines = node.here("find", str(tmp_path), "--sort", "key", *arguments).stdout.splitlines()
        return "".join(line[-1] for line in lines)

    assert order() == "iebgcadfh"
    assert order("--reverse") == "cgbeiadfh"


def test_broken_metadata_is_named_and_the_rest_goes_on(
    node: Node, runs: Path, uri_of: UriOf
) -> None:
    add(runs / "run1" / "not json", "{'a': 1}")
    add(runs / "run1" / "a-list", [1])
    add(runs / "run1" / "empty", "")
    add(runs / "run1" / "deep", "[" * 5000 + "]" * 5000)
    add(runs / "run1" / "odd", {"step": 5, "text": "ä\ud800\x1b\n", "nan": math.nan})
    done = node.here("find", uri_of(runs), "--where", "step < 20", "--json")
    rows = json.loads(done.stdout)
    assert [row["uri"].partition("?")[0][-2:] for row in rows] == ["00", "01", "dd"]
    assert rows[2]["metadata"]["text"] == "ä\ud800\x1b\n"
    assert done.stdout.isascii()
    assert rows[2]["metadata"]["nan"] == "NaN"
    lines = done.stderr.splitlines()
    assert len(lines) == 4
    for line, name in zip(lines, ["a-list", "deep", "empty", "not%20json"], strict=True):
        assert line.startswith("ckptfs: warning: .metadata.json in s3://")
        assert f"/run1/{name}?" in line
    assert "not an object" in lines[0]


def test_a_misspelt_key_is_named(node: Node, runs: Path, uri_of: UriOf) -> None:
    done = node.here("find", uri_of(runs), "--where", "vall_loss < 1 or stepp > 1 or step < 0")
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "ckptfs: warning: no metadata has the key 'stepp'; did you mean 'step'?",
        "ckptfs: warning: no metadata has the key 'vall_loss'; did you mean 'val_loss'?",
    ]


def test_a_local_directory(node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(tmp_path / "exp 1" / "checkpoint_0", {"step": 1})
    add(tmp_path / "exp 1" / "checkpoint_1", {"step": 2})
    expected = [f"file://{tmp_path}/exp%201/checkpoint_{number}" for number in range(2)]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    whole = str(tmp_path), f"file://{tmp_path}", f"{tmp_path}/exp 1/"
    for place in (*whole, ".", "exp 1", f"../{tmp_path.name}", "~/exp 1"):
        assert node.here("find", place).stdout.splitlines() == expected
    empty = tmp_path / "empty"
    empty.mkdir()
    done = node.here("find", str(empty), "--where", "step > 0")
    assert done.stdout == ""
    assert done.stderr == f"ckptfs: warning: no checkpoint below file://{empty} has metadata\n"


def test_what_cannot_be_searched_is_one_line(
    node: Node, runs: Path, uri_of: UriOf, s3: S3Server, tmp_path: Path
) -> None:
    def refusal(*arguments: str) -> str:
        done = node.here("find", *arguments, check=False)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("ckptfs: error: ")
        assert done.stderr.count("\n") == 1
        assert s3.secret_key not in done.stderr
        return done.stderr

    assert "does not exist" in refusal(uri_of(runs / "nothing"))
    assert "does not exist" in refusal(str(tmp_path / "nothing"))
    assert "no such bucket" in refusal(s3.uri("no-such-bucket-here/run"))
    assert "is a file" in refusal(uri_of(runs / "run0" / "metadata.json"))
    assert "access denied" in refusal(uri_of(runs).replace(s3.access_key, "another-key", 1))
    assert "unknown scheme" in refusal("nonsense://bucket/run")
    s3.reset_traffic()
    assert "(character 1): the operators on" in refusal(uri_of(runs), "--where", "step ** 2 > 1")
    assert "at its end" in refusal(uri_of(runs), "--sort", "step -")
    assert "is empty" in refusal(uri_of(runs), "--where", "")
    assert s3.traffic().requests == []  # before the store is asked for anything
    assert node.here("find", check=False).returncode == 2
    assert node.here("find", uri_of(runs), "--limit", "0", check=False).returncode == 2


def test_progress_is_shown_on_a_terminal_only(
    node: Node, runs: Path, uri_of: UriOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("URI", uri_of(runs))
    command = Path(sys.executable).with_name("ckptfs")
    stdout = node.folder / "found"
    done = node.run("script", "-qec", f'{command} find "$URI" > {stdout}', "/dev/null")
    assert "reading metadata" in done.stdout
    assert "40/40" in done.stdout
    assert numbers(stdout.read_text()) == list(range(40))


@pytest.mark.mount
def test_what_is_found_can_be_attached(
    node: Node, runs: Path, uri_of: UriOf, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The URIs have no credentials: they come from the environment, as usual.
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.secret_key)
    monkeypatch.setenv("URI", uri_of(runs))
    command = Path(sys.executable).with_name("ckptfs")
    script = f"{command} find \"$URI\" --where 'step in [70, 310]' | xargs -n1 {command} attach"
    paths = node.run("timeout", "50", "sh", "-c", script).stdout.splitlines()
    assert [json.loads(Path(path, FILE).read_text())["step"] for path in paths] == [70, 310]
    assert Path(paths[1], "weights.bin").read_bytes() == b"weights"
    uris = [a["uri"] for a in node.status()["attachments"]]
    found = node.here("find", uri_of(runs), "--where", "step in [70, 310]").stdout.splitlines()
    assert sorted(uris) == sorted(found)


# -- the search itself


def found_in(store: FakeStore) -> tuple[list[Found], list[str]]:
    """The checkpoints that the search finds, and its warnings."""
    warnings: list[str] = []
    return list(search(store, HERE, warn=warnings.append)), warnings


class Meeting(FakeStore):
    """A store in which `get` waits for as many others as may run at the same time."""

    def __init__(self, objects: dict[str, bytes], together: int) -> None:
        super().__init__(objects)
        self._barrier = threading.Barrier(together)
        self._counting = threading.Lock()
        self._now = 0
        self.most = 0

    def get(self, path: str) -> bytes | None:
        """See Store.get."""
        with self._counting:
            self._now += 1
            self.most = max(self.most, self._now)
        self._barrier.wait(30)
        with self._counting:
            self._now -= 1
        return super().get(path)


def test_so_many_requests_run_at_the_same_time_and_no_more() -> None:
    assert THREADS >= 16
    objects = {f"{number:04}/{FILE}": b'{"n": %d}' % number for number in range(THREADS * 8)}
    store = Meeting(objects, THREADS)
    told: list[tuple[int, int]] = []
    found = search(store, HERE, warn=pytest.fail, progress=lambda *done: told.append(done))
    assert [checkpoint.metadata["n"] for checkpoint in found] == list(range(THREADS * 8))
    assert store.most == THREADS
    assert told == [(number, THREADS * 8) for number in range(1, THREADS * 8 + 1)]
    assert not [t for t in threading.enumerate() if t.name.startswith("ckptfs-search")]


def test_which_directories_are_checkpoints() -> None:
    store = FakeStore(
        {
            FILE: b'{"n": 0}',
            f"a/b/{FILE}": b'{"n": 1}',
            f"a/{FILE}": b'{"n": 2}',
            f"a/x{FILE}": b'{"n": 3}',
            f"a/{FILE}.bak": b'{"n": 4}',
            f"{FILE}/weights.bin": b"",
            "weights.bin": b"",
        }
    )
    query = "?region=us-east-1"
    assert found_in(store) == (
        [
            Found(f"s3://bucket/runs{query}", {"n": 0}),
            Found(f"s3://bucket/runs/a{query}", {"n": 2}),
            Found(f"s3://bucket/runs/a/b{query}", {"n": 1}),
        ],
        [],
    )


def test_what_is_left_out_is_named() -> None:
    nested = b'{"a": ' * LEVELS_MAX + b"1" + b"}" * LEVELS_MAX
    store = FakeStore(
        {
            f"a\nb/{FILE}": b"{}",
            f"../up/{FILE}": b"{}",
            f"a//{FILE}": b"{}",
            f"deep/{FILE}": nested.replace(b"1", b"[1]"),
            f"fine/{FILE}": nested,
            f"large/{FILE}": b'"' + b" " * BYTES_MAX + b'"',
            f"null/{FILE}": b"null",
            f"text/{FILE}": b'{"a": \xff}',
        }
    )
    found, warnings = found_in(store)
    assert [checkpoint.uri for checkpoint in found] == ["s3://bucket/runs/fine?region=us-east-1"]
    for warning, what in zip(
        warnings,
        [
            "../up/.metadata.json in s3://bucket/runs?region=us-east-1 is left out: the name",
            r"a\nb/.metadata.json in s3://bucket/runs?region=us-east-1 is left out: the name",
            "a//.metadata.json in s3://bucket/runs?region=us-east-1 is left out: the name",
            ".metadata.json in s3://bucket/runs/deep?region=us-east-1 is nested deeper than",
            f".metadata.json in s3://bucket/runs/large?region=us-east-1 has {BYTES_MAX + 2} bytes",
            ".metadata.json in s3://bucket/runs/null?region=us-east-1 holds a NoneType",
            ".metadata.json in s3://bucket/runs/text?region=us-east-1 is not JSON",
        ],
        strict=True,
    ):
        assert warning.startswith(what)
        assert "\n" not in warning
    assert f"large/{FILE}" not in [call.path for call in store.calls]


def test_a_file_that_is_deleted_meanwhile_is_no_checkpoint() -> None:
    store = FakeStore({f"a/{FILE}": b"{}", f"b/{FILE}": b"{}"})
    listing = store.list(10)
    store.list = lambda files_max: listing  # type: ignore[method-assign]
    store.delete(f"a/{FILE}")
    found, warnings = found_in(store)
    assert [checkpoint.uri for checkpoint in found] == ["s3://bucket/runs/b?region=us-east-1"]
    assert warnings == []


def test_an_error_of_the_store_ends_the_search() -> None:
    store = FakeStore({f"{number:04}/{FILE}": b"{}" for number in range(1000)})
    store.fail("get", AccessDenied("expired"), at=10)
    with pytest.raises(AccessDenied, match="expired"):
        found_in(store)
    assert len(store.calls) < 500  # what was not yet asked for is not
    assert not [t for t in threading.enumerate() if t.name.startswith("ckptfs-search")]
