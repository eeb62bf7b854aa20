"""The code of the Ray page: each block does what the page says of it."""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import inspect
import os
import pickle
import re
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.train
from conftest import Node
from pyarrow.fs import S3FileSystem
from ray.train.v2._internal.execution.storage import StorageContext
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.util.placement_group import placement_group, remove_placement_group
from support.raycluster import Member
from support.s3server import S3Server

import ckptfs.ray

from .conftest import make_directory

pytestmark = [
    pytest.mark.mount,
    pytest.mark.filterwarnings(r"ignore:`use_\w+` is deprecated:DeprecationWarning"),
]
Connect = Callable[..., None]

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "ckptfs" / "RAY.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
TRAINER, DRIVER, TASKS, OWN, SAVE, BROADCAST, CHOSEN, WARM = BLOCKS
URI = "s3://bucket/run7/step_3"

# Torch is not installed here, and Ray would take any module of that name for it. The page's trainer
# needs two functions.
TORCH = """
import os, pickle

def save(state, path):
    with open(path, "wb") as file:
        pickle.dump(state, file)

def load(path):
    with open(path, "rb") as file:
        state = pickle.load(file)
    with open(os.environ["LOADED"], "a") as file:
        print(path, state["step"], file=file)
    return state
"""


def run(code: str, **names: Any) -> dict[str, Any]:
    """Execute a block as a script; returns its names."""
    names = {"__name__": "__main__", "os": os, "ckptfs": ckptfs, **names}
    exec(compile(code, "RAY.md", "exec"), names)
    return names


def at(checkpoint: Any, code: str) -> str:
    """A block with the page's URI in the place of a checkpoint on the test's server."""
    assert URI in code
    return code.replace(f'"{URI}"', repr(checkpoint))


def test_the_readme_shows_the_lines_of_the_trainer_that_matter() -> None:
    section = (REPOSITORY / "README.md").read_text().split("\n## From Ray\n")[1]
    [block] = re.findall(r"```python\n(.*?)```", section.split("\n## ")[0], re.DOTALL)
    shown = [line for line in block.splitlines() if line]
    assert shown == [line for line in TRAINER.splitlines() if "ckptfs.ray" in line]
    assert len(TRAINER.splitlines()) <= 20


@pytest.mark.long
def test_the_trainer_goes_on_by_a_mount(
    connect: Connect,
    node: Node,
    bucket: Path,
    writable_s3: S3FileSystem,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for step in range(1, 4):
        make_directory(bucket / "run7" / f"step_{step}")
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "torchlike.py").write_text(TORCH)
    monkeypatch.syspath_prepend(tmp_path / "lib")
    loaded = tmp_path / "loaded"
    loaded.touch()
    variables = {"PYTHONPATH": str(tmp_path / "lib"), "LOADED": str(loaded)}
    connect(env_vars=node.environment | variables)
    trainer = DataParallelTrainer.__module__
    code = (
        TRAINER.replace("import torch\n", "import torchlike as torch\n")
        .replace("ray.train.torch import ", f"{trainer} import DataParallelTrainer as ")
        .replace('"s3://bucket"', f"{bucket.name!r}, storage")
    )
    try:
        run(code, storage=writable_s3)
        assert loaded.read_text() == ""
        for rank in range(2):
            stored = bucket / "run7" / "step_3" / f"rank-{rank}.pt"
            assert pickle.loads(stored.read_bytes()) == {"step": 3}
        run(code, storage=writable_s3)
    finally:
        sys.modules.pop("torchlike", None)
    found = sorted(line.split() for line in loaded.read_text().splitlines())
    assert [(Path(path).name, step) for path, step in found] == [
        ("rank-0.pt", "3"),
        ("rank-1.pt", "3"),
    ]
    assert all(path.startswith(f"{node.mount}/step_3-") for path, _ in found)


def test_the_driver_mounts_what_ray_has_made(
    node: Node, small: Path, uri_of: Callable[[Path], str], capsys: pytest.CaptureFixture[str]
) -> None:
    result = types.SimpleNamespace(checkpoint=ray.train.Checkpoint(uri_of(small)))
    try:
        path = run(DRIVER, result=result)["path"]
    finally:
        ckptfs.ray.uninstall()
    assert path.startswith(f"{node.mount}/checkpoint-")
    assert "config.json" in capsys.readouterr().out


def test_tasks_mount_by_the_hook(
    connect: Connect, node: Node, small: Path, uri_of: Callable[[Path], str]
) -> None:
    hook = re.search(r"ray.init\(runtime_env=(.*)\)\n", TASKS)
    assert hook
    connect(**eval(hook[1]))
    code = at(uri_of(small), TASKS.replace(hook[0], ""))
    found = run(code)
    assert found["path"].startswith(f"{node.mount}/checkpoint-")
    assert found["names"] == ["config.json", "empty", "layers"]


def test_a_checkpoint_of_one_s_own(
    node: Node, small: Path, uri_of: Callable[[Path], str], capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(at(uri_of(small), OWN))
    assert found["path"].startswith(f"{node.mount}/checkpoint-")
    assert issubclass(found["Checkpoint"], ray.train.Checkpoint)
    assert "config.json" in capsys.readouterr().out


def test_a_rank_saves_by_ckptfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[inspect.BoundArguments] = []
    signature = inspect.signature(ray.train.report)
    storage = StorageContext(str(tmp_path), "run7")
    context = types.SimpleNamespace(get_world_rank=lambda: 1, get_storage=lambda: storage)
    monkeypatch.setattr(ray.train, "report", lambda *a, **k: told.append(signature.bind(*a, **k)))
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    torch = types.ModuleType("torchlike")
    exec(TORCH, torch.__dict__)
    run(SAVE, train=ray.train, torch=torch, tempfile=tempfile)["save"](3, {"step": 3})
    (call,) = (each.arguments for each in told)
    assert call["checkpoint_upload_mode"] == ray.train.CheckpointUploadMode.ASYNC
    saved = call["checkpoint_upload_fn"](call["checkpoint"], call["checkpoint_dir_name"])
    assert saved.path == str(tmp_path / "run7" / "step_3")
    assert pickle.loads(Path(saved.path, "rank-1.pt").read_bytes()) == {"step": 3}


def test_many_nodes(
    nodes: list[Member],
    s3: S3Server,
    small: Path,
    uri_of: Callable[[Path], str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = run(at(uri_of(small), BROADCAST))
    report = found["report"]
    assert report.is_complete
    first, second = capsys.readouterr().out.splitlines()
    shown = PAGE.split(BROADCAST)[1].split("```")[2].strip("\n").splitlines()
    numbers = re.compile(r"[0-9.]+")
    expected = [numbers.sub("N", line) for line in shown]
    assert [numbers.sub("N", line) for line in (first, second)] == expected
    assert first.endswith(": 3 of 3 nodes have all of it")

    checkpoint = ckptfs.Checkpoint(str(small.relative_to(s3.root)), s3.filesystem())
    group = placement_group([{"CPU": 1}] * 2, "STRICT_SPREAD")
    try:
        chosen = run(CHOSEN, checkpoint=checkpoint, placement_group=group)["report"]
    finally:
        remove_placement_group(group)
    assert (chosen.files, len(chosen.nodes)) == (1, 2)  # *.json

    node_a, node_b = nodes[0].id, nodes[1].id
    (small / "rank-0").mkdir()
    (small / "rank-0" / "state").write_bytes(bytes(1000))
    warming = run(WARM, checkpoint=checkpoint, node_a=node_a, node_b=node_b)["warming"]
    assert warming.wait() == {node_a: 1000, node_b: 0}
    assert str(warming) == (f"warming {checkpoint.path}: 2 of 2 nodes have their files, 1000 B")
    assert "warming" in capsys.readouterr().out
