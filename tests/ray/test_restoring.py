"""Ray Train v2 on two nodes: what the workers go on from is read from the store once."""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.cloudpickle
import ray.train
import ray.train.collective
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from support.raycluster import Member
from support.s3server import S3Server

import ckptfs.ray
from ckptfs import Checkpoint

from .conftest import WEIGHTS_BYTES, make_directory, settle, weights

pytestmark = [
    pytest.mark.mount,
    pytest.mark.filterwarnings(r"ignore:`use_\w+` is deprecated:DeprecationWarning"),
]
for name in (__name__, weights.__module__):  # workers cannot import them
    ray.cloudpickle.register_pickle_by_value(sys.modules[name])


def train(config: dict[str, Any]) -> None:
    """Load all weights, before and after a failure; before it, there is a checkpoint."""
    rank = ray.train.get_context().get_world_rank()
    checkpoint = ray.train.get_checkpoint() or config["begin"]
    with checkpoint.as_directory() as path:
        step = int(Path(path, "step").read_text())
        assert Path(path, "weights.bin").read_bytes() == weights(step)
        assert path.startswith(config["mounts"])
        assert path.split("/")[-1].startswith(f"checkpoint-{step}-")
    if step == 1:
        return
    with tempfile.TemporaryDirectory(dir=config["scratch"]) as folder:
        if rank == 0:
            Path(folder, "weights.bin").write_bytes(weights(1))
            Path(folder, "step").write_text("1")
        ray.train.report(
            {},
            checkpoint=ray.train.Checkpoint.from_directory(folder) if rank == 0 else None,
            checkpoint_dir_name="checkpoint-1",
        )
    ray.train.collective.barrier()
    if rank == 0:
        reported = ray.train.get_checkpoint()
        settle(reported.filesystem, reported.path, config["folder"])
        ray.train.get_all_reported_checkpoints()  # waits until this one has arrived
        raise RuntimeError("a worker fails, as the test wants it")
    ray.train.collective.barrier()


@pytest.mark.long
@pytest.mark.usefixtures("can_write")
def test_all_nodes_of_a_run_restore_for_one_download(
    nodes: list[Member],
    s3: S3Server,
    bucket: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    storage = s3.filesystem(check_directory_existence_before_creation=True)
    run = bucket / "runs" / "run"
    for folder in (run, run / "checkpoint-1", bucket / "checkpoint-0"):
        make_directory(folder)
    (bucket / "checkpoint-0" / "weights.bin").write_bytes(weights(0))
    (bucket / "checkpoint-0" / "step").write_text("0")
    begin = Checkpoint(f"{bucket.name}/checkpoint-0", s3.filesystem())
    trainer = DataParallelTrainer(
        train,
        train_loop_config={
            "begin": begin,
            "scratch": str(tmp_path),
            "folder": s3.root,
            "mounts": str(nodes[0].node.folder.parent),
        },
        scaling_config=ScalingConfig(num_workers=2, placement_strategy="STRICT_SPREAD"),
        run_config=RunConfig(
            name="run",
            storage_path=f"{bucket.name}/runs",
            storage_filesystem=storage,
            failure_config=FailureConfig(max_failures=1),
            callbacks=[ckptfs.ray.RestoreCallback(begin)],
        ),
    )
    trainer.fit()
    size = 2 * (WEIGHTS_BYTES + 1)  # of both checkpoints
    fetched = [member.status().fetched_bytes for member in nodes if member.node.socket.exists()]
    assert sum(fetched) == size
    assert sum(count > 0 for count in fetched) >= 2  # they may be others after the failure
    assert size <= s3.traffic().bytes_to_client <= 1.1 * size


def test_nodes_that_lost_their_workers_give_what_they_have(
    nodes: list[Member], s3: S3Server, bucket: Path
) -> None:
    make_directory(bucket / "checkpoint-0")
    (bucket / "checkpoint-0" / "weights.bin").write_bytes(weights(0))
    checkpoint = Checkpoint(f"{bucket.name}/checkpoint-0", s3.filesystem())
    callback = ckptfs.ray.RestoreCallback()
    callback.after_execution_group_start(group([nodes[0], nodes[1]], None))
    warming = ckptfs.ray.warm(checkpoint, [nodes[1].id])  # as if its rank had saved it
    assert warming.wait() == {nodes[1].id: WEIGHTS_BYTES}
    s3.reset_traffic()
    callback.after_execution_group_start(group([nodes[0], nodes[2]], checkpoint))
    assert [member.status().fetched_bytes for member in nodes] == [0, WEIGHTS_BYTES, 0]
    assert nodes[0].status().taken_bytes == nodes[2].status().taken_bytes == WEIGHTS_BYTES
    assert s3.traffic().bytes_to_client <= 0.05 * WEIGHTS_BYTES


def group(members: list[Member], checkpoint: Checkpoint | None) -> Any:
    """Workers on these nodes, to the extent that the callback asks."""
    workers = [SimpleNamespace(metadata=SimpleNamespace(node_id=each.id)) for each in members]
    return SimpleNamespace(
        get_workers=lambda: workers, execute_single=lambda rank, function: checkpoint
    )
