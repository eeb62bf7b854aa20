"""Plans through the mount: what one checkpoint's restore has read is fetched of the next."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Node, wait_until
from support.archives import write_checkpoint, write_safetensors
from support.s3server import S3Server

import ckptfs

pytestmark = pytest.mark.mount

MIB = 1 << 20
MODEL = "model.safetensors"
UriOf = Callable[[Path], str]
RESTORE = """
import json, os, struct, sys
import ckptfs

with ckptfs.Checkpoint(sys.argv[1]).as_directory(plan=json.loads(sys.argv[2])) as path:
    with open(f"{path}/model.safetensors", "rb", buffering=0) as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        for name in sys.argv[3:]:
            start, stop = (8 + length + at for at in header[name]["data_offsets"])
            assert len(os.pread(file.fileno(), stop - start, start)) == stop - start
"""


def restore(uri: str, plan: bool | str, *names: str, rank: str = "", script: str = RESTORE) -> str:
    """Restore these tensors in a process of its own; returns what that says."""
    done = subprocess.run(
        [sys.executable, "-c", script, uri, json.dumps(plan), *names],
        env={**os.environ, "RANK": rank},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture
def job(bucket: Path, monkeypatch: pytest.MonkeyPatch, node: Node) -> Path:
    """The folder of a job's checkpoints; its plans are kept in the node's folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(node.folder / "xdg"))
    return bucket / "job"


def test_the_next_checkpoint_is_fetched_by_the_plan_of_the_first(
    node: Node, s3: S3Server, job: Path, uri_of: UriOf
) -> None:
    node.configure(linger_s=0, window_bytes_max=MIB)
    write_safetensors(
        job / "step1" / MODEL, {"a": 6 * MIB, "b": 6 * MIB, "c": 6 * MIB, "d": 12 * MIB}
    )
    assert restore(uri_of(job / "step1"), True, "c", "b") == ""
    (kept,) = (node.folder / "xdg" / "ckptfs" / "plans").iterdir()
    steps = json.loads(kept.read_bytes())["steps"]
    assert [step[1] for step in steps] == ["c", "b"]

    places = write_safetensors(
        job / "step2" / MODEL, {"d": 12 * MIB, "c": 6 * MIB, "b": 6 * MIB, "a": 6 * MIB}
    )
    s3.reset_traffic()
    with ckptfs.Checkpoint(uri_of(job / "step2")).as_directory(plan=True):
        expected = {
            block
            for name in "bc"
            for block in range(places[name][0] // MIB, places[name][1] // MIB)
        }
        wait_until(lambda: asked(s3) >= expected)
        node.wait_quiet()
    spare = {0} | {places[name][at] // MIB for name in "bc" for at in (0, 1)}
    assert asked(s3) <= expected | spare
    assert json.loads(kept.read_bytes())["steps"] == steps  # it stays that of the first


READ_EVERYHOW = """
import mmap, os, sys

path, start, stop = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
fd = os.open(path, os.O_RDONLY)
area = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
with open(sys.argv[4], "rb") as file:
    data = file.read()
assert area[start:stop] == data[start:stop]
print("mapped", flush=True)
sys.stdin.readline()
around = max(0, start - 700_000)
assert os.pread(fd, stop - start + 10, start) == data[start : stop + 10]  # over the edge
direct = os.open(path, os.O_RDONLY | os.O_DIRECT)
place = around // 4096 * 4096
buffer = mmap.mmap(-1, 1 << 20)
assert os.preadv(direct, [buffer], place) == 1 << 20
assert buffer[:] == data[place : place + (1 << 20)]
assert area[around:stop] == data[around:stop]
"""


def test_the_kernel_reads_over_the_edge_of_a_plan_in_vain(
    node: Node, s3: S3Server, job: Path, uri_of: UriOf
) -> None:
    """It reads half a MiB before and after what a program touches of mapped memory."""
    node.configure(linger_s=20, passthrough=False)
    sizes = {"a": 8 * MIB, "b": 8 * MIB, "c": 8 * MIB}
    write_safetensors(job / "step1" / MODEL, sizes)
    restore(uri_of(job / "step1"), True, "b")
    places = write_safetensors(job / "step2" / MODEL, sizes)
    start, stop = places["b"]
    s3.reset_traffic()
    with ckptfs.Checkpoint(uri_of(job / "step2")).as_directory(plan=True) as path:
        expected = {0, *range(start // MIB, stop // MIB + 1)}
        wait_until(lambda: asked(s3) >= expected)
        node.wait_quiet()
        places_of = os.path.join(path, MODEL), str(start), str(stop), job / "step2" / MODEL
        with subprocess.Popen(
            [sys.executable, "-c", READ_EVERYHOW, *places_of],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as reader:
            assert reader.stdout
            assert reader.stdout.readline() == b"mapped\n"
            node.wait_quiet()
            assert asked(s3) == expected
            reader.communicate(b"\n", timeout=60)
        assert reader.returncode == 0


def asked(s3: S3Server, name: str = "model") -> set[int]:
    """Indices of the blocks of that file that were asked for."""
    blocks: set[int] = set()
    for request in s3.traffic().requests:
        if request.method == "GET" and request.range and name in request.target:
            first, last = map(int, request.range.removeprefix("bytes=").split("-"))
            blocks |= set(range(first // MIB, last // MIB + 1))
    return blocks


def test_each_rank_has_its_own_part(node: Node, s3: S3Server, job: Path, uri_of: UriOf) -> None:
    node.configure(linger_s=20, window_bytes_max=MIB)
    sizes = {"a": 4 * MIB, "gap": 8 * MIB, "b": 4 * MIB, "end": 8 * MIB}
    write_safetensors(job / "step1" / MODEL, sizes)
    uri = uri_of(job / "step1")
    path = node.here("attach", uri).stdout.strip()
    restore(uri, False, "a", rank="0")
    restore(uri, False, "b", rank="1")
    node.here("plan", "save", path)
    shown = json.loads(node.here("plan", "show", uri, "--json").stdout)
    assert [(step[1], step[4]) for step in shown["steps"]] == [("a", [0]), ("b", [1])]
    table = node.here("plan", "show", uri).stdout
    assert "model.safetensors" in table
    node.here("detach", path)

    places = write_safetensors(job / "step2" / MODEL, sizes)
    s3.reset_traffic()
    done = node.here("plan", "apply", uri_of(job / "step2"), "--rank", "1", "--json")
    told = json.loads(done.stdout)
    assert (told["files"], told["bytes"], told["errors"]) == (1, 4 * MIB, [])
    found = asked(s3)
    assert set(range(places["b"][0] // MIB, places["b"][1] // MIB)) <= found
    assert not found & set(range(1, places["b"][0] // MIB))


RESTORE_SHARDED = """
import json, os, sys
import ckptfs

with ckptfs.Checkpoint(sys.argv[1]).as_directory(plan=json.loads(sys.argv[2])) as path:
    top = os.path.join(path, sys.argv[3])
    with open(os.path.join(top, ".metadata"), "rb") as file:
        assert file.read()
    for name, start, stop in map(json.loads, sys.argv[4:]):
        with open(os.path.join(top, name), "rb", buffering=0) as file:
            assert len(os.pread(file.fileno(), stop - start, start)) == stop - start
"""


@pytest.mark.parametrize("folders", [("", ""), ("global_step1", "global_step2")])
def test_pieces_of_sharded_tensors_are_found_by_name(
    node: Node, s3: S3Server, job: Path, uri_of: UriOf, folders: tuple[str, str]
) -> None:
    """Of the files of a torch.distributed.checkpoint, also where these are in a folder with another
    number, and a piece is in another file than before."""
    node.configure(linger_s=20, window_bytes_max=MIB)
    lower, upper, other = ("w", (0, 0)), ("w", (512, 0)), ("other", (0,))
    one, two, far = (os.urandom(size * MIB) for size in (5, 6, 20))
    places = write_checkpoint(
        job / "step1" / folders[0],
        {"__0_0.distcp": [one, far], "__1_0.distcp": [two, far]},
        [lower, other, upper, other],
    )
    uri = uri_of(job / "step1")
    path = node.here("attach", uri).stdout.strip()
    for rank, piece in (("0", places[0]), ("1", places[2])):
        script = RESTORE_SHARDED
        restore(uri, False, folders[0], json.dumps(piece), rank=rank, script=script)
    node.here("plan", "save", path)
    shown = json.loads(node.here("plan", "show", uri, "--json").stdout)
    assert [(step[1], step[4]) for step in shown["steps"]] == [
        ("", [0]),
        ("w", [0]),
        ("w[512,0]", [1]),
    ]  # fmt: skip - the other one has .metadata from the kernel

    places = write_checkpoint(
        job / "step2" / folders[1],
        {"__0_0.distcp": [far, two, far], "__1_0.distcp": [far, one]},
        [other, upper, other, other, lower],
    )
    s3.reset_traffic()
    second = uri_of(job / "step2")
    told = json.loads(node.here("plan", "apply", second, "--rank", "1", "--json").stdout)
    assert (told["files"], told["bytes"], told["errors"]) == (1, len(two), [])
    _, start, stop = places[1]
    assert asked(s3, "__0_0") == set(range(start // MIB, stop // MIB))
    assert asked(s3, "__1_0") == set()


def test_a_plan_can_be_a_file_or_beside_a_checkpoint(
    node: Node, job: Path, uri_of: UriOf, tmp_path: Path
) -> None:
    write_safetensors(job / "step1" / MODEL, {"a": 4 * MIB, "b": 12 * MIB})
    write_safetensors(job / "step2" / MODEL, {"b": 12 * MIB, "a": 4 * MIB})
    first, second = uri_of(job / "step1"), uri_of(job / "step2")
    path = node.here("attach", first).stdout.strip()
    assert "nothing was read yet" in refusal(node, "plan", "save", path)
    restore(first, False, "a")
    file = tmp_path / "plan.json"
    assert node.here("plan", "save", path, "-o", str(file)).stdout == f"{file}\n"
    node.here("plan", "save", path, "--metadata")
    for plan in (str(file), first):
        restore(second, plan, "a")
        told = json.loads(node.here("plan", "apply", second, "--plan", plan, "--json").stdout)
        assert told["bytes"] == 4 * MIB
    assert "there is no plan for" in refusal(node, "plan", "apply", second)
    assert "has no plan" in refusal(node, "plan", "show", second)
    assert "does not exist" in refusal(node, "plan", "show", f"{tmp_path}/none")
    file.write_text("{}")
    assert "not a plan" in refusal(node, "plan", "apply", second, "--plan", str(file))
    with (
        pytest.raises(ckptfs.CkptfsError, match="not a plan"),
        ckptfs.Checkpoint(second).as_directory(plan=file),
    ):
        pass


def refusal(node: Node, *arguments: str) -> str:
    done = node.here(*arguments, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    return done.stderr


def test_a_plan_can_be_made_when_the_restore_is_over(
    node: Node, job: Path, uri_of: UriOf, tmp_path: Path
) -> None:
    node.configure(linger_s=0)
    write_safetensors(job / "step1" / MODEL, {"a": 4 * MIB, "b": 12 * MIB})
    uri, file = uri_of(job / "step1"), str(tmp_path / "plan.json")
    restore(uri, False, "a")
    wait_until(lambda: not node.status()["attachments"])
    node.here("plan", "save", uri, "-o", file)
    assert [step[1] for step in json.loads(Path(file).read_bytes())["steps"]] == ["a"]
    (job / "step1" / "more").write_bytes(b"x")
    assert "another version" in refusal(node, "plan", "save", uri, "-o", file)


def test_plan_leaves_out_tensors_that_the_checkpoint_lacks(
    node: Node, job: Path, uri_of: UriOf
) -> None:
    write_safetensors(job / "step1" / MODEL, {"a": 4 * MIB, "b": 4 * MIB, "c": 40 * MIB})
    restore(uri_of(job / "step1"), True, "a", "b")
    write_safetensors(job / "step2" / MODEL, {"a": 2 * MIB, "z": 30 * MIB})
    assert restore(uri_of(job / "step2"), True, "a") == ""
    told = json.loads(node.here("plan", "apply", uri_of(job / "step2"), "--json").stdout)
    assert (told["bytes"], told["errors"]) == (2 * MIB, [])
