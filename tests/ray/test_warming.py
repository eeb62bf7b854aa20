"""Each node fetches from the store what its ranks will read, ahead of them."""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray.cloudpickle
from conftest import wait_until
from support.archives import write_safetensors
from support.raycluster import Member, on
from support.s3server import S3Server

import ckptfs.ray
from ckptfs import Checkpoint, PlanError
from ckptfs._client import plans
from ckptfs._model.protocol.requests import Activity
from ckptfs._store.describe import describe
from ckptfs.ray._nodes import place_of

pytestmark = pytest.mark.mount
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import it

MIB = 1 << 20
MODEL = "model.safetensors"


@pytest.fixture
def job(bucket: Path) -> Path:
    """The folder of a job's checkpoints."""
    return bucket / "job"


def checkpoint_of(folder: Path, s3: S3Server) -> Checkpoint:
    return Checkpoint(str(folder.relative_to(s3.root)), s3.filesystem())


def restore(
    checkpoint: Checkpoint, rank: int, places: list[tuple[int, int]], plan: Any = True
) -> None:
    """Read these bytes of the model, as the process of that rank."""
    os.environ["RANK"] = str(rank)
    try:
        with (
            checkpoint.as_directory(plan=plan) as path,
            open(f"{path}/{MODEL}", "rb", buffering=0) as file,
        ):
            for start, stop in places:
                assert len(os.pread(file.fileno(), stop - start, start)) == stop - start
    finally:
        del os.environ["RANK"]


def fetched_mib(member: Member) -> int:
    """MiB that its daemon has read from the store, in whole blocks, once it reads nothing more."""
    with member.connection() as connection:

        def is_quiet() -> bool:
            now = connection.ask(Activity())
            return not now.in_flight_bytes and not any(now.queue.values())

        wait_until(is_quiet)
        return -(-connection.status().fetched_bytes // MIB)


def test_each_node_is_warmed_with_the_files_that_it_needs(
    nodes: list[Member], s3: S3Server, job: Path
) -> None:
    job.mkdir()
    sizes = {"a.bin": 3 * MIB, "b.bin": 2 * MIB, "rank-1.json": 1001}
    for name, size in sizes.items():
        (job / name).write_bytes(os.urandom(size))
    wanted = {nodes[0].id: ["a.bin"], nodes[1].id: ["b.bin", "rank-1.json"]}
    found = ckptfs.ray.warm(checkpoint_of(job, s3), wanted).wait()
    assert found == {nodes[0].id: sizes["a.bin"], nodes[1].id: 2 * MIB + 1001}
    assert [member.status().fetched_bytes for member in nodes[:2]] == list(found.values())
    assert ckptfs.ray.warm(checkpoint_of(job, s3), [nodes[2].id]).wait() == {
        nodes[2].id: sum(sizes.values())
    }


def test_each_node_is_warmed_with_what_its_ranks_have_read(
    nodes: list[Member], s3: S3Server, job: Path
) -> None:
    gap = 9 * MIB  # the kernel reads on behind each tensor
    sizes = {"a": 3 * MIB, "1": gap, "b": 12 * MIB, "2": gap, "c": 2 * MIB, "3": gap}
    places = write_safetensors(job / "step1" / MODEL, sizes)
    first = checkpoint_of(job / "step1", s3)
    on(nodes[0], restore, first, 0, [places["c"], places["a"]])
    on(nodes[1], restore, first, 1, [places["b"]])
    before = [fetched_mib(member) for member in nodes[:2]]

    # The ranks come to other nodes than those that have seen them, the tensors to other places.
    places = write_safetensors(job / "step2" / MODEL, dict(reversed(sizes.items())))
    second = checkpoint_of(job / "step2", s3)
    ranks = {nodes[0].id: [1], nodes[1].id: [2, 0]}
    told = ckptfs.ray.warm(second, ranks, plan=True).wait()
    assert 12 <= told[nodes[0].id] / MIB <= 13
    assert 5 <= told[nodes[1].id] / MIB <= 7
    found = [fetched_mib(m) - then for m, then in zip(nodes[:2], before, strict=True)]
    assert 12 <= found[0] <= 14  # whole blocks, and that of the header
    assert 5 <= found[1] <= 8
    assert nodes[2].attachment() is None

    # They find it there; the kernel reads some of what follows, too.
    on(nodes[0], restore, second, 1, [places["b"]], False)
    on(nodes[1], restore, second, 0, [places["c"], places["a"]], False)
    again = [fetched_mib(m) - then for m, then in zip(nodes[:2], before, strict=True)]
    assert all(now - then <= 4 for now, then in zip(again, found, strict=True))


def test_a_plan_can_be_given_for_all_ranks(
    nodes: list[Member], s3: S3Server, job: Path, uri_of: Callable[[Path], str]
) -> None:
    sizes = {"a": 4 * MIB, "b": 8 * MIB}
    places = write_safetensors(job / "step1" / MODEL, sizes)
    on(nodes[0], restore, checkpoint_of(job / "step1", s3), 0, [places["a"]])
    (kept,) = (nodes[0].node.folder / "xdg").rglob("*.json")
    second = checkpoint_of(job / "step2", s3)
    write_safetensors(job / "step2" / MODEL, dict(reversed(sizes.items())))
    beside = json.dumps({plans.METADATA_KEY: kept.read_text()})
    (job / "step1" / ".metadata.json").write_text(beside)
    given = kept, plans.read(kept), uri_of(job / "step1")
    for plan, member in zip(given, nodes, strict=True):
        told = ckptfs.ray.warm(second, [member.id], plan=plan).wait()
        assert told.keys() == {member.id}
        assert 4 <= told[member.id] / MIB <= 6


def test_without_a_plan_nothing_is_fetched_and_said(
    nodes: list[Member], s3: S3Server, job: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_safetensors(job / "step1" / MODEL, {"a": MIB})
    checkpoint = checkpoint_of(job / "step1", s3)
    caplog.set_level(logging.WARNING, "ckptfs")
    name = plans.path_of(describe(*place_of(checkpoint))).name
    damaged = nodes[0].node.folder / "xdg" / "ckptfs" / "plans" / name
    damaged.parent.mkdir(parents=True)
    damaged.write_text("{}")
    told = ckptfs.ray.warm(checkpoint, plan=True).wait()
    assert told == dict.fromkeys((member.id for member in nodes), 0)
    assert f"node {nodes[0].id} has no plan for" in caplog.text
    assert "no node has a plan for" in caplog.text


def test_mistakes_are_said(nodes: list[Member], s3: S3Server, job: Path) -> None:
    checkpoint = checkpoint_of(job, s3)
    with pytest.raises(ValueError, match="files and plan exclude each other"):
        ckptfs.ray.warm(checkpoint, "all", ["*"], plan=True)
    mistakes: list[tuple[Any, bool]] = [("a.bin", False), ([0], False), ([], False)]
    mistakes += [(["a"], True), ([], True)]
    for needs, plan in mistakes:
        with pytest.raises(TypeError, match=f"node {nodes[0].id} must have a list of"):
            ckptfs.ray.warm(checkpoint, {nodes[0].id: needs}, plan=plan)
    with pytest.raises(PlanError, match="does not exist"):
        ckptfs.ray.warm(checkpoint, plan=str(job / "none.json"))
    with pytest.raises(ckptfs.CheckpointNotFound, match="cannot attach"):
        ckptfs.ray.warm(checkpoint)
