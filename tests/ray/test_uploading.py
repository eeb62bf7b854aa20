"""ckptfs uploads what workers report, and restores it from the nodes that have saved it."""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.cloudpickle
import ray.train
import ray.train.collective
from pyarrow.fs import FileSystem, LocalFileSystem, SubTreeFileSystem
from ray.train import CheckpointUploadMode, FailureConfig, RunConfig, ScalingConfig
from ray.train.v2._internal.execution.storage import StorageContext
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from support.raycluster import Member
from support.s3server import S3Server

import ckptfs
import ckptfs.ray
from ckptfs import LocationError, TargetExists

from .conftest import WEIGHTS_BYTES, make_directory, weights

for name in (__name__, weights.__module__):  # workers cannot import them
    ray.cloudpickle.register_pickle_by_value(sys.modules[name])


# -- without a cluster


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StorageContext:
    """The storage of a run, in which this process would be a worker."""
    storage = StorageContext(str(tmp_path / "storage"), "run")
    context = SimpleNamespace(get_storage=lambda: storage)
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    return storage


def reported(folder: Path, **files: str) -> Any:
    """A checkpoint of one rank."""
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(content)
    return ray.train.Checkpoint.from_directory(str(folder))


def contents(folder: str) -> dict[str, str]:
    return {path.name: path.read_text() for path in Path(folder).iterdir()}


def test_upload_merges_ranks_where_ray_would_persist_them(
    storage: StorageContext, tmp_path: Path
) -> None:
    ranks = [reported(tmp_path / f"{i}", config="{}", **{f"rank{i}": str(i)}) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda rank: ckptfs.ray.upload(rank, "checkpoint-1"), ranks))
    target = storage.build_checkpoint_path_from_name("checkpoint-1")
    assert all(each.filesystem == storage.storage_filesystem for each in found)
    assert {each.path for each in found} == {target}
    assert {type(each) for each in found} == {ray.train.Checkpoint}
    files = {"config": "{}", "rank0": "0", "rank1": "1", "rank2": "2", "rank3": "3"}
    assert contents(target) == files
    assert [contents(rank.path) for rank in ranks] == [
        {"config": "{}", f"rank{i}": str(i)} for i in range(4)
    ]


def test_upload_refuses_other_content_of_the_same_name(
    storage: StorageContext, tmp_path: Path
) -> None:
    ckptfs.ray.upload(reported(tmp_path / "0", config="{}", rank0="0"), "checkpoint-1")
    again = reported(tmp_path / "1", config="[]", rank1="1")
    with pytest.raises(TargetExists, match=r"other content in 1 file \(config\)"):
        ckptfs.ray.upload(again, "checkpoint-1")
    found = functools.partial(ckptfs.ray.upload, overwrite=True)(again, "checkpoint-1")
    assert contents(found.path) == {"config": "[]", "rank0": "0", "rank1": "1"}


def test_upload_merges_metadata_as_ray_does(storage: StorageContext, tmp_path: Path) -> None:
    for rank in (0, 1):
        checkpoint = reported(tmp_path / f"{rank}", **{f"rank{rank}": ""})
        checkpoint.set_metadata({"rank": rank})
        found = ckptfs.ray.upload(checkpoint, "checkpoint-1")
    found = ckptfs.ray.upload(reported(tmp_path / "2", rank2=""), "checkpoint-1")
    assert found.get_metadata() == {"rank": 1}


def test_upload_refuses_places_that_ray_would_not_accept(
    storage: StorageContext, tmp_path: Path
) -> None:
    checkpoint = reported(tmp_path / "0", rank0="0")
    for name in ("../other", str(tmp_path / "other")):
        with pytest.raises(LocationError, match="is outside of the run's storage"):
            ckptfs.ray.upload(checkpoint, name)
    assert not (tmp_path / "storage" / "other").exists()
    remote, path = FileSystem.from_uri("mock:///x")
    for filesystem in (remote, SubTreeFileSystem("x", remote)):
        with pytest.raises(LocationError, match="is not a local directory; report it with"):
            ckptfs.ray.upload(ray.train.Checkpoint(path, filesystem), "checkpoint-1")
    LocalFileSystem().delete_dir_contents(storage.experiment_fs_path)  # as on another machine
    with pytest.raises(RuntimeError, match="Unable to set up cluster storage"):
        ckptfs.ray.upload(checkpoint, "checkpoint-1")
    assert list(Path(storage.experiment_fs_path).iterdir()) == []


# -- a run on two nodes


def killed_in_the_middle(rank: int, checkpoint: Any, name: str) -> Any:
    """Upload, and kill this process when a part of the bytes is at the store."""
    from ckptfs.ray import _uploading

    def tell(done: int, total: int) -> None:
        if rank == 1 and 0 < done < total:
            os.kill(os.getpid(), signal.SIGKILL)

    _uploading._upload = functools.partial(ckptfs.upload, progress=tell)
    return ckptfs.ray.upload(checkpoint, name)


def save(rank: int, step: int, scratch: str, upload: Any) -> None:
    folder = tempfile.mkdtemp(dir=scratch)
    Path(folder, f"rank-{rank}.bin").write_bytes(weights(2 * step + rank))
    Path(folder, "config.json").write_text("{}")  # of both ranks
    ray.train.report(
        {},
        checkpoint=ray.train.Checkpoint.from_directory(folder),
        checkpoint_dir_name=f"checkpoint-{step}",
        checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
        checkpoint_upload_fn=upload,
    )


def train(config: dict[str, Any]) -> None:
    """Fail twice: first while a checkpoint is uploaded, and then the whole node."""
    rank, scratch = ray.train.get_context().get_world_rank(), config["scratch"]
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        save(rank, 0, scratch, ckptfs.ray.upload)
        ray.train.get_all_reported_checkpoints()  # waits until this one has arrived
        save(rank, 1, scratch, functools.partial(killed_in_the_middle, rank))
        ray.train.get_all_reported_checkpoints()
        raise AssertionError("rank 1 was not killed")
    with checkpoint.as_directory() as path:
        assert path.startswith(config["mounts"])
        assert path.split("/")[-1].startswith("checkpoint-0-")
        for each in range(2):
            assert Path(path, f"rank-{each}.bin").read_bytes() == weights(each)
        assert Path(path, "config.json").read_text() == "{}"
    ray.train.collective.barrier()
    Path(scratch, f"restored-{rank}-{os.getpid()}").touch()
    if len(list(Path(scratch).glob(f"restored-{rank}-*"))) == 2:
        return
    if rank == 1:  # a new machine
        command = [sys.executable, "-m", "ckptfs", "stop", "--force"]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        shutil.rmtree(os.environ["CKPTFS_CACHE_DIR"])
        os.kill(os.getpid(), signal.SIGKILL)
    ray.train.collective.barrier()


@ray.remote(num_cpus=2)
class Occupant:
    """Keeps a node from having workers."""


@pytest.mark.mount
@pytest.mark.filterwarnings(r"ignore:`use_\w+` is deprecated:DeprecationWarning")
@pytest.mark.usefixtures("can_write")
def test_nodes_that_have_saved_a_checkpoint_restore_it_without_the_store(
    nodes: list[Member],
    s3: S3Server,
    bucket: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    third = NodeAffinitySchedulingStrategy(nodes[2].id, soft=False)
    occupant = Occupant.options(scheduling_strategy=third).remote()
    ray.get(occupant.__ray_ready__.remote())
    make_directory(bucket / "runs" / "run")
    trainer = DataParallelTrainer(
        train,
        train_loop_config={
            "scratch": str(tmp_path),
            "mounts": str(nodes[0].node.folder.parent),
        },
        scaling_config=ScalingConfig(num_workers=2, placement_strategy="STRICT_SPREAD"),
        run_config=RunConfig(
            name="run",
            storage_path=f"{bucket.name}/runs",
            storage_filesystem=s3.filesystem(check_directory_existence_before_creation=True),
            failure_config=FailureConfig(max_failures=2),
            callbacks=[ckptfs.ray.RestoreCallback()],
        ),
    )
    result = trainer.fit()
    assert len(list(tmp_path.glob("restored-*"))) == 4
    assert result.checkpoint.path.endswith("/run/checkpoint-0")
    assert {path.name for path in (bucket / "runs" / "run" / "checkpoint-0").iterdir()} == {
        "rank-0.bin",
        "rank-1.bin",
        "config.json",
    }
    # All that the server sent, also to Ray itself, for two restores on two nodes.
    assert s3.traffic().bytes_to_client <= 0.01 * 2 * WEIGHTS_BYTES
    assert [member.status().fetched_bytes for member in nodes[:2]] == [0, 0]
    ray.kill(occupant)
