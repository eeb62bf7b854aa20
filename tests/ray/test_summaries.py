"""The printed summary of a broadcast, and the choice of its nodes, without a cluster."""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import inspect
import re
from typing import Any

import pytest
import ray

import ckptfs.ray
from ckptfs.ray import BroadcastReport, NodeReport
from ckptfs.ray import _nodes as nodes_module

MIB = 1 << 20


def report(nodes: dict[str, NodeReport]) -> BroadcastReport:
    return BroadcastReport("v1", 3, 30 * MIB, nodes, 6.42)


def test_a_complete_broadcast_is_two_lines() -> None:
    half = NodeReport(15 * MIB, 15 * MIB, 0, had=5 * MIB, fetched=10 * MIB)
    assert str(report({"a": half, "b": half})) == (
        "3 files, 30.0 MiB, in 6.4 s: 2 of 2 nodes have all of it\n"
        "read from the store 20.0 MiB, taken from other nodes 30.0 MiB, in caches before 10.0 MiB"
    )


def test_each_node_with_trouble_has_a_line_with_its_cause() -> None:
    nodes = {
        "a": NodeReport(30 * MIB, 0, 0),
        "b": NodeReport(0, 30 * MIB, 0, "a block is damaged"),
        "c": NodeReport(0, 20 * MIB, 10 * MIB, "no answer for 120 s"),
        "d": NodeReport(0, 10 * MIB, 20 * MIB),
    }
    first, _, *lines = str(report(nodes)).splitlines()
    assert first.endswith(": 2 of 4 nodes have all of it")
    assert lines == [
        "node d lacks 20.0 MiB: no other node could bring it",
        "node c lacks 10.0 MiB: no answer for 120 s",
        "node b has all of it: a block is damaged",
    ]


def test_a_summary_has_an_end() -> None:
    nodes = {f"n{i}": NodeReport(0, 0, 30 * MIB, "it is gone") for i in range(500)}
    lines = str(report(nodes)).splitlines()
    assert len(lines) == 13
    assert lines[-1] == "and 490 nodes more"


def test_the_representation_has_all_of_it() -> None:
    shown = repr(report({"a": NodeReport(1, 2, 3, "x")}))
    assert shown.startswith("BroadcastReport(version='v1', files=3, bytes=31457280, nodes={'a': ")
    assert "NodeReport(read=1, taken=2, left=3, error='x', had=0, fetched=0)" in shown


@pytest.mark.parametrize("nodes", [None, "all"])
def test_no_nodes_are_all_nodes(nodes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    known = [{"NodeID": name, "Alive": name != "dead"} for name in ("b", "a", "dead")]
    monkeypatch.setattr(ray, "nodes", lambda: known)
    assert nodes_module.node_ids(nodes) == ["a", "b"]
    assert nodes_module.node_ids(["b"]) == ["b"]
    with pytest.raises(ValueError, match='nodes must be "all", None, a list of node ids'):
        nodes_module.node_ids("b")  # pyright: ignore[reportArgumentType] - on purpose
    with pytest.raises(ValueError, match="no living node of the cluster has the id dead"):
        nodes_module.node_ids(["dead"])


def test_the_package_lists_what_it_has() -> None:
    assert set(ckptfs.ray.__all__) <= set(dir(ckptfs.ray))
    for name in ckptfs.ray.__all__:
        found = getattr(ckptfs.ray, name)
        members = [found, *(vars(found).values() if inspect.isclass(found) else [])]
        docs = [inspect.getdoc(each) or "" for each in members if getattr(each, "__doc__", None)]
        assert docs[0]
        for doc in docs:  # no insides
            assert not re.search(r"(?<![\w_])_[a-z]\w*|\bckptfs\._\w+", doc), doc
    with pytest.raises(AttributeError, match="did you mean 'broadcast'"):
        ckptfs.ray.broadcats  # noqa: B018
