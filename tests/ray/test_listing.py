"""A broadcast asks one node after the other for the files, without a cluster."""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportPrivateUsage=false

from types import SimpleNamespace
from typing import Any

import pytest
import ray

from ckptfs import errors
from ckptfs.ray import _broadcast, _nodes
from ckptfs.ray._peer import Failure

FILES = [("model.safetensors", 7)]
TIMEOUT_S = 40.0


class Node:
    """An actor whose call of `files` is its own reference. It is silent without an answer."""

    def __init__(self, answer: Any = None) -> None:
        self.answer = answer
        self.files = self
        self.waited_s: list[float] = []

    def remote(self) -> "Node":
        return self


@pytest.fixture(autouse=True)
def fake_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(refs: list[Node], *, timeout: float, fetch_local: bool) -> Any:
        for ref in refs:
            ref.waited_s.append(timeout)
        ready = [ref for ref in refs if ref.answer is not None]
        return ready, [ref for ref in refs if ref not in ready]

    def get(ref: Node) -> Any:
        return ref.answer

    monkeypatch.setattr(_nodes, "time", SimpleNamespace(monotonic=lambda: 0.0))
    monkeypatch.setattr(ray, "wait", wait)
    monkeypatch.setattr(ray, "get", get)


@pytest.mark.parametrize("first", [Node(), Node(Failure("daemon", "the daemon has ended"))])
def test_the_next_node_lists_after_a_silent_or_failed_one(first: Node) -> None:
    second, third = Node(FILES), Node(FILES)
    nodes = {"a": first, "b": second, "c": third}
    assert _broadcast._files(nodes, TIMEOUT_S) == FILES
    assert len(first.waited_s) == len(second.waited_s) == 1
    assert third.waited_s == []


def test_each_node_has_the_timeout_of_the_caller_for_its_answer() -> None:
    nodes = {"a": Node(), "b": Node()}
    with pytest.raises(errors.CheckpointNotFound, match="no node could list"):
        _broadcast._files(nodes, TIMEOUT_S)
    waits_s = [wait_s for node in nodes.values() for wait_s in node.waited_s]
    assert waits_s == [TIMEOUT_S] * 2
