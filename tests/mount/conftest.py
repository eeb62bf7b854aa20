"""Fixtures of the CSI driver's tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Node
from support.kubelet import Kubelet, volumes_at
from support.s3server import S3Server

from ckptfs._csi import bind_mounts


@pytest.fixture
def kubelet(node: Node) -> Iterator[Kubelet]:
    """A kubelet, and a daemon that serves all users."""
    node.configure(allow_other=True)
    node.folder.chmod(0o755)
    node.here("mount")
    kubelet = Kubelet(node.folder / "kubelet")
    kubelet.folder.mkdir()
    yield kubelet
    kubelet.close()
    for target in volumes_at(kubelet):  # of a test that has failed
        bind_mounts.unmount(target)


@pytest.fixture
def attributes(s3: S3Server, small: Path) -> dict[str, str]:
    """The attributes of a volume with the checkpoint `small`."""
    path = small.relative_to(s3.root)
    return {"uri": f"s3://{path}", "endpoint": f"http://{s3.endpoint}", "region": s3.region}


@pytest.fixture
def keys(s3: S3Server) -> dict[str, str]:
    """The Secret of that volume."""
    return {"AWS_ACCESS_KEY_ID": s3.access_key, "AWS_SECRET_ACCESS_KEY": s3.secret_key}
