"""Ray Tune and plain tasks: restored by mount in a trial, in the driver and in a task."""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# pyright: reportFunctionMemberAccess=false

import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray.cloudpickle
import ray.tune
from conftest import Node, wait_until
from pyarrow.fs import S3FileSystem, SubTreeFileSystem
from ray.tune import FailureConfig, RunConfig, TuneConfig, Tuner
from support.s3server import S3Server

from .conftest import WEIGHTS_BYTES, make_directory, settle, weights

pytestmark = pytest.mark.mount
Connect = Callable[..., None]
HOOK = "ckptfs.ray.install"

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import it


def trial(config: dict[str, Any]) -> None:
    """Reports a checkpoint. The first trial fails then, and restores it when it is tried again."""
    index = config["index"]
    if restored := ray.tune.get_checkpoint():
        with restored.as_directory() as path:
            assert Path(path, "weights.bin").read_bytes() == weights(index)
            ray.tune.report({"score": index, "restored": path})
        return
    with tempfile.TemporaryDirectory(dir=config["scratch"]) as folder:
        Path(folder, "weights.bin").write_bytes(weights(index))
        ray.tune.report(
            {"score": index, "restored": ""},
            checkpoint=ray.tune.Checkpoint.from_directory(folder),
        )
    reported = ray.tune.get_checkpoint()
    settle(reported.filesystem, reported.path, config["bucket"])
    if index == 0:
        raise RuntimeError("a trial fails, as the test wants it")


def test_a_trial_and_then_the_driver_restore_by_mount(
    connect: Connect,
    node: Node,
    s3: S3Server,
    bucket: Path,
    writable_s3: S3FileSystem,
    tmp_path: Path,
    installed: None,
) -> None:
    for index in range(2):
        make_directory(bucket / "tune" / f"trial-{index}" / "checkpoint_000000")
    connect(worker_process_setup_hook=HOOK)
    tuner = Tuner(
        trial,
        param_space={
            "index": ray.tune.grid_search([0, 1]),
            "scratch": str(tmp_path),
            "bucket": bucket,
        },
        tune_config=TuneConfig(
            trial_dirname_creator=lambda trial: f"trial-{trial.config['index']}"
        ),
        run_config=RunConfig(
            name="tune",
            storage_path="/",
            storage_filesystem=SubTreeFileSystem(bucket.name, writable_s3),
            failure_config=FailureConfig(max_failures=1),
            verbose=0,
        ),
    )
    results = tuner.fit()
    assert [result.error for result in results] == [None, None]
    restored = {result.metrics["score"]: result.metrics["restored"] for result in results}
    assert restored[0].startswith(f"{node.mount}/checkpoint_000000-")
    assert s3.traffic().bytes_to_client <= 1.1 * WEIGHTS_BYTES

    s3.reset_traffic()
    best = results.get_best_result("score", "max").get_best_checkpoint("score", "max")
    assert isinstance(best, ray.tune.Checkpoint)
    with best.as_directory() as path:
        assert path.startswith(f"{node.mount}/checkpoint_000000-")
        assert path != restored[0]
        assert sorted(os.listdir(path)) == [".keep", "weights.bin"]
        assert Path(path, "weights.bin").read_bytes() == weights(1)
    assert WEIGHTS_BYTES <= s3.traffic().bytes_to_client <= 1.1 * WEIGHTS_BYTES


def test_the_daemon_outlives_the_worker_that_started_it(
    connect: Connect, node: Node, small: Path, uri_of: Callable[[Path], str]
) -> None:
    @ray.remote
    def look(uri: str) -> tuple[int, str, list[str]]:
        with ray.tune.Checkpoint(uri).as_directory() as path:
            return os.getpid(), path, sorted(os.listdir(path))

    connect(worker_process_setup_hook=HOOK)
    worker, path, names = ray.get(look.remote(uri_of(small)))
    assert path.startswith(f"{node.mount}/checkpoint-")
    assert names == ["config.json", "empty", "layers"]
    daemon = node.status()["pid"]
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: not os.path.exists(f"/proc/{worker}/environ"))
    assert ray.get(look.remote(uri_of(small)))[1:] == (path, names)
    assert node.status()["pid"] == daemon
