"""Ray Train v2: a run that fails, and goes on from a checkpoint that its workers mount."""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray.cloudpickle
import ray.train
import ray.train.collective
from conftest import Node
from pyarrow.fs import S3FileSystem
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from support.s3server import S3Server

import ckptfs.ray

from .conftest import make_directory, settle, weights

pytestmark = [
    pytest.mark.mount,
    pytest.mark.filterwarnings(r"ignore:`use_\w+` is deprecated:DeprecationWarning"),
]
Connect = Callable[..., None]

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import it


def digests(folder: "str | Path") -> dict[str, str]:
    return {
        name: hashlib.sha256(Path(folder, name).read_bytes()).hexdigest()
        for name in os.listdir(folder)
    }


def look_at(checkpoint: Any) -> dict[str, Any]:
    """The contents that one worker sees in the checkpoint while the others have it open, too."""
    with checkpoint.as_directory() as path:
        seen = {
            "path": path,
            "uuid": checkpoint._uuid.hex,
            "digests": digests(path),
            "pid": os.getpid(),
        }
        ray.train.collective.barrier()
        command = [sys.executable, "-m", "ckptfs", "status", "--json"]
        status = subprocess.run(command, check=True, capture_output=True, timeout=60).stdout
        ray.train.collective.barrier()
    return seen | {"attachments": json.loads(status)["attachments"]}


def train(config: dict[str, Any]) -> None:
    """Two steps, each with a checkpoint. After the first one, the second worker fails."""
    rank = ray.train.get_context().get_world_rank()
    seen: dict[str, Any] = {}
    step = 0
    if restored := ray.train.get_checkpoint():
        seen["restored"] = look_at(restored)
        step = 1
    with tempfile.TemporaryDirectory(dir=config["seen"]) as folder:
        if rank == 0:
            Path(folder, "weights.bin").write_bytes(weights(step))
        Path(folder, f"rank-{rank}.json").write_text(json.dumps({"step": step}))
        ray.train.report(
            {"step": step},
            checkpoint=ray.train.Checkpoint.from_directory(folder),
            checkpoint_dir_name=f"checkpoint-{step}",
        )
    ray.train.collective.barrier()
    reported = ray.train.get_checkpoint()
    if rank == 1:
        settle(reported.filesystem, reported.path, config["folder"])
        ray.train.get_all_reported_checkpoints()  # waits until this one has arrived
        if step == 0:
            raise RuntimeError("a worker fails, as the test wants it")
    ray.train.collective.barrier()
    seen["reported"] = look_at(reported)
    Path(config["seen"], f"rank-{rank}").write_text(json.dumps(seen))


def test_workers_go_on_from_a_checkpoint_that_they_mount(
    connect: Connect,
    node: Node,
    s3: S3Server,
    bucket: Path,
    writable_s3: S3FileSystem,
    tmp_path: Path,
) -> None:
    run = bucket / "runs" / "run"
    for folder in (run, run / "checkpoint-0", run / "checkpoint-1"):
        make_directory(folder)
    connect()
    trainer = DataParallelTrainer(
        train,
        train_loop_config={"seen": str(tmp_path), "folder": s3.root},
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(
            name="run",
            storage_path=f"{bucket.name}/runs",
            storage_filesystem=writable_s3,
            failure_config=FailureConfig(max_failures=1),
            callbacks=[ckptfs.ray.MountCallback()],
        ),
    )
    result = trainer.fit()
    assert result.metrics == {"step": 1}
    ranks = [json.loads((tmp_path / f"rank-{rank}").read_text()) for rank in range(2)]
    for step, name in enumerate(["restored", "reported"]):
        stored = digests(run / f"checkpoint-{step}")
        assert stored.keys() == {".keep", "weights.bin", "rank-0.json", "rank-1.json"}
        assert stored["weights.bin"] == hashlib.sha256(weights(step)).hexdigest()
        for seen in (rank[name] for rank in ranks):
            pids = [rank[name]["pid"] for rank in ranks]
            assert seen["path"].startswith(f"{node.mount}/checkpoint-{step}-")
            assert seen["digests"] == stored
            (attachment,) = (a for a in seen["attachments"] if a["holders"])
            assert attachment["path"] == seen["path"]
            assert attachment["holders"] == sorted(pids)
    # Of what they reported, each rank has an object of its own; Ray would copy it twice.
    assert ranks[0]["reported"]["uuid"] != ranks[1]["reported"]["uuid"]
    # All that the server sent, also to Ray itself: one copy of each of the two checkpoints.
    size = sum(f.stat().st_size for f in run.glob("checkpoint-*/*"))
    assert size <= s3.traffic().bytes_to_client <= 1.1 * size


@pytest.mark.long
def test_the_environment_names_the_callback(
    connect: Connect,
    node: Node,
    bucket: Path,
    writable_s3: S3FileSystem,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def train(config: dict[str, Any]) -> None:
        with tempfile.TemporaryDirectory(dir=config["seen"]) as folder:
            Path(folder, "step").write_text("0")
            ray.train.report(
                {},
                checkpoint=ray.train.Checkpoint.from_directory(folder),
                checkpoint_dir_name="checkpoint",
            )
        with ray.train.get_checkpoint().as_directory() as path:
            Path(config["seen"], "path").write_text(path)

    make_directory(bucket / "run" / "checkpoint")
    monkeypatch.setenv("RAY_TRAIN_CALLBACKS", "ckptfs.ray.MountCallback")
    connect()
    trainer = DataParallelTrainer(
        train,
        train_loop_config={"seen": str(tmp_path)},
        scaling_config=ScalingConfig(num_workers=1),
        run_config=RunConfig(name="run", storage_path=bucket.name, storage_filesystem=writable_s3),
    )
    trainer.fit()
    assert (tmp_path / "path").read_text().startswith(f"{node.mount}/checkpoint-")
