"""The adapter, without a cluster: classes, places, pickles, metadata, install and uninstall."""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray.cloudpickle
import ray.train
import ray.tune
from conftest import Node
from pyarrow import ArrowInvalid
from pyarrow.fs import LocalFileSystem, S3FileSystem, SubTreeFileSystem, _MockFileSystem
from ray.train._internal.framework_checkpoint import FrameworkCheckpoint
from ray.train.v2._internal.callbacks.env_callback import _initialize_env_callbacks
from ray.train.v2.api.callback import RayTrainCallback
from support.s3server import S3Server

import ckptfs.ray

UriOf = Callable[[Path], str]


class OwnCheckpoint(ray.train.Checkpoint):
    """As the frameworks' packages have them."""


# -- the class


def test_is_a_checkpoint_of_ray_and_of_ckptfs(tmp_path: Path) -> None:
    for checkpoint in (
        ckptfs.ray.Checkpoint(tmp_path),
        ckptfs.ray.Checkpoint.from_directory(tmp_path),
    ):
        assert type(checkpoint) is ckptfs.ray.Checkpoint
        assert isinstance(checkpoint, ray.tune.Checkpoint)
        assert isinstance(checkpoint, ray.train.Checkpoint)
        assert isinstance(checkpoint, ckptfs.Checkpoint)


def test_what_ray_took_away_is_explained_as_by_ray() -> None:
    with pytest.raises(AttributeError, match="does not support `from_dict"):
        ckptfs.ray.Checkpoint.from_dict({})
    with pytest.raises(AttributeError, match="does not support `from_uri"):
        ckptfs.ray.Checkpoint.from_uri("s3://bucket/path")


@pytest.mark.parametrize("pickler", [pickle, ray.cloudpickle])
def test_survives_pickling(pickler: Any) -> None:
    filesystem = SubTreeFileSystem("bucket", S3FileSystem(region="eu-west-3", anonymous=True))
    checkpoint = ckptfs.ray.Checkpoint("run/ckpt", filesystem)
    copy = pickler.loads(pickler.dumps(checkpoint))
    assert type(copy) is ckptfs.ray.Checkpoint
    assert copy.path == "run/ckpt"
    assert copy.filesystem == filesystem
    assert copy._uuid == checkpoint._uuid


def test_is_hashable_by_identity() -> None:
    one, other = (ckptfs.ray.Checkpoint("/ckpt") for _ in range(2))
    assert one != other
    assert len({one, one, other}) == 2


def test_is_no_path() -> None:
    for kind in (ray.tune.Checkpoint, ckptfs.ray.Checkpoint):
        with pytest.raises(TypeError):
            os.fspath(kind("/ckpt"))


# -- places

S3 = "?region=us-east-1"  # without it, pyarrow asks AWS for the bucket's region


@pytest.mark.parametrize(
    "arguments",
    [
        ("/run/ckpt",),
        ("/run/ckpt/",),
        ("/run/a b#c?d%20e",),
        ("~/ckpt",),
        (Path("/run/ckpt"),),
        ("file:///run/ckpt",),
        ("file:///run/ckpt/",),
        (f"s3://key:secret@bucket/run/ckpt{S3}",),
        (f"s3://key:secret@bucket/run/ckpt/{S3}",),
        (f"s3://key:secret@bucket{S3}",),
        ("gs://anonymous@bucket/run/ckpt",),
        ("mock:///run/ckpt",),
        ("bucket/run/ckpt", S3FileSystem(region="us-east-1")),
        ("bucket/run/ckpt/", S3FileSystem(region="us-east-1")),
        ("run/ckpt", SubTreeFileSystem("bucket", S3FileSystem(region="us-east-1"))),
        ("/run/ckpt", LocalFileSystem()),
        (Path("run/ckpt"), _MockFileSystem()),
    ],
    ids=lambda arguments: "-".join(
        a if isinstance(a, str) else type(a).__name__ for a in arguments
    ),
)
@pytest.mark.parametrize("kind", [ckptfs.Checkpoint, ckptfs.ray.Checkpoint])
def test_names_the_same_place_as_rays(kind: Any, arguments: Any) -> None:
    rays, ours = ray.tune.Checkpoint(*arguments), kind(*arguments)
    assert ours.path == rays.path
    assert ours.filesystem.type_name == rays.filesystem.type_name
    assert repr(ours) == repr(rays)


def test_relative_paths_are_refused_with_a_better_reason() -> None:
    with pytest.raises(ArrowInvalid, match="empty scheme"):
        ray.tune.Checkpoint("run/ckpt")
    with pytest.raises(ckptfs.LocationError, match="relative path; use an absolute path"):
        ckptfs.ray.Checkpoint("run/ckpt")


def test_from_directory_makes_paths_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Another process has another working directory: Ray's checkpoint would be elsewhere there.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert ray.tune.Checkpoint.from_directory("ckpt").path == "ckpt"
    assert ckptfs.ray.Checkpoint.from_directory("ckpt").path == f"{tmp_path}/ckpt"
    assert ckptfs.ray.Checkpoint.from_directory("~/ckpt/").path == "/home/me/ckpt"


# -- metadata


@pytest.mark.parametrize("remote", [False, True], ids=["local", "s3"])
def test_metadata_is_rays(
    remote: bool, tmp_path: Path, s3: S3Server, small: Path, writable_s3: S3FileSystem
) -> None:
    place: tuple[str, Any] = (str(tmp_path), LocalFileSystem())
    if remote:
        place = (str(small.relative_to(s3.root)), writable_s3)
    rays, ours = ray.tune.Checkpoint(*place), ckptfs.ray.Checkpoint(*place)
    assert ours.get_metadata() == rays.get_metadata() == {}
    rays.set_metadata({"step": 1, "name": "é"})
    assert ours.get_metadata() == {"step": 1, "name": "é"}
    ours.update_metadata({"step": 2})
    assert rays.get_metadata() == {"step": 2, "name": "é"}
    rays.update_metadata({"loss": 0.5})
    assert ours.get_metadata() == {"step": 2, "name": "é", "loss": 0.5}
    ours.set_metadata({"fresh": [None, True]})
    assert rays.get_metadata() == {"fresh": [None, True]}


# -- install


def test_install_and_uninstall_may_be_repeated() -> None:
    before = dict(vars(ray.train.Checkpoint))
    for _ in range(2):
        ckptfs.ray.install()
        for name in ("as_directory", "to_directory", "get_metadata"):
            ours = getattr(ckptfs.Checkpoint, name)
            assert getattr(ray.train.Checkpoint, name) is ours
            assert getattr(ray.tune.Checkpoint, name) is ours
            assert getattr(FrameworkCheckpoint, name) is ours
    for _ in range(2):
        ckptfs.ray.uninstall()
        assert dict(vars(ray.train.Checkpoint)) == before
    assert ckptfs.ray.Checkpoint.as_directory is ckptfs.Checkpoint.as_directory


def test_pickles_stay_rays(installed: None) -> None:
    # They can be read where ckptfs is not installed.
    checkpoint = ray.tune.Checkpoint("/ckpt")
    assert type(checkpoint).__module__.startswith("ray.")
    assert b"ckptfs" not in pickle.dumps(checkpoint) + ray.cloudpickle.dumps(checkpoint)


@pytest.mark.mount
@pytest.mark.parametrize(
    "kind", [ray.train.Checkpoint, ray.tune.Checkpoint, FrameworkCheckpoint, OwnCheckpoint]
)
def test_installed_all_checkpoints_mount(kind: Any, node: Node, small: Path, uri_of: UriOf) -> None:
    checkpoint = kind(uri_of(small))  # also those that were made before
    ckptfs.ray.install()
    try:
        with checkpoint.as_directory(prefetch="all", wait=True) as path:
            assert path.startswith(f"{node.mount}/checkpoint-")
            assert sorted(os.listdir(path)) == ["config.json", "empty", "layers"]
    finally:
        ckptfs.ray.uninstall()
    with checkpoint.as_directory() as path:
        assert os.path.basename(path) == f"checkpoint_tmp_{checkpoint._uuid.hex}"  # Ray's copy


@pytest.mark.mount
def test_mounts_with_nothing_installed(node: Node, small: Path, uri_of: UriOf) -> None:
    checkpoint = ckptfs.ray.Checkpoint(uri_of(small))
    with checkpoint.as_directory() as path:
        assert path.startswith(f"{node.mount}/checkpoint-")
    with checkpoint.as_directory(prefetch="all", wait=True) as path:
        assert os.getxattr(path, "user.ckptfs.state") == b"cached"


def test_installed_copies_are_where_ray_looks_for_them(
    installed: None, small: Path, uri_of: UriOf
) -> None:
    checkpoint = ray.tune.Checkpoint(uri_of(small))
    path = checkpoint.to_directory()
    assert path == checkpoint._get_temporary_checkpoint_dir()
    assert sorted(os.listdir(path)) == ["config.json", "empty", "layers"]
    shutil.rmtree(path)


def test_local_checkpoints_stay_where_they_are(installed: None, tmp_path: Path) -> None:
    for kind in (ray.tune.Checkpoint, OwnCheckpoint, ckptfs.ray.Checkpoint):
        with kind.from_directory(tmp_path).as_directory() as path:
            assert path == str(tmp_path)


def test_the_callback_is_one_that_ray_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TRAIN_CALLBACKS", "ckptfs.ray.MountCallback")
    (callback,) = _initialize_env_callbacks()
    assert isinstance(callback, RayTrainCallback)
    rays = ray.train.Checkpoint.as_directory
    copy = ray.cloudpickle.loads(ray.cloudpickle.dumps(callback))
    copy.after_init_train_context()
    try:
        assert ray.train.Checkpoint.as_directory is not rays
    finally:
        ckptfs.ray.uninstall()
    assert ray.train.Checkpoint.as_directory is rays
