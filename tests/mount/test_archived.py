"""Archived objects through the real mount: attaching warns, and the rest is readable."""

import os
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import quote

import pytest
from conftest import Node
from support.faultserver import Object
from support.quirkserver import QuirkServer

import ckptfs

pytestmark = pytest.mark.mount

REASON = "it is archived (GLACIER); restore it, and then attach again"


def test_attaching_warns_of_archived_files(node: Node) -> None:
    node.expected_in_log.append("left out")
    with QuirkServer() as server:
        for name in ("one", "two"):
            server.objects[f"bucket/run/{name}"] = Object(name.encode(), 1_500_000_000)
        server.archived["bucket/run/one"] = "GLACIER"
        endpoint = quote(server.endpoint, safe="")
        uri = f"s3://k:s@bucket/run?endpoint_override={endpoint}&scheme=http&region=us-east-1"
        checkpoint = ckptfs.Checkpoint(uri)
        with ExitStack() as stack:
            with pytest.warns(UserWarning, match=r"run\?.* lacks one: it is archived"):
                path = stack.enter_context(checkpoint.as_directory())
            assert os.listdir(path) == ["two"]
            assert Path(path, "two").read_bytes() == b"two"
            assert os.getxattr(path, "user.ckptfs.skipped").decode() == f"one\t{REASON}\n"
        done = node.cli("attach", uri)
        assert done.stderr == f"ckptfs: warning: left out one: {REASON}\n"
        server.restored.add("bucket/run/one")
        node.cli("detach", done.stdout.strip())
        done = node.cli("attach", uri)
        assert done.stderr == ""
        assert Path(done.stdout.strip(), "one").read_bytes() == b"one"
