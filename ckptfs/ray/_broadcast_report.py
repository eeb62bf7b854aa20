"""The report of a broadcast."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from ckptfs._model.units import size_text
from ckptfs._model.wording import counted

NOT_BROUGHT = "no other node could bring it"
_SHOWN_MAX = 10
"""Nodes with trouble that a summary names. More of them usually have the same cause."""


@dataclass(frozen=True)
class NodeReport:
    """One node's part of a broadcast.

    Attributes:
        had: Bytes that were in its cache when the broadcast began.
        fetched: Bytes that its daemon has read from the store to give them.
        read: Bytes that its daemon gave, from the store or from its cache.
        taken: Bytes that it took from other nodes.
        left: Bytes that it lacks, and reads from the store when a program needs them.
        error: The node's first error, or "". A later try may have succeeded.
    """

    read: int
    taken: int
    left: int
    error: str = ""
    had: int = 0
    fetched: int = 0


@dataclass(frozen=True)
class BroadcastReport:
    """The result of a broadcast. ``print(report)`` shows a summary.

    Attributes:
        version: The checkpoint's version, as in ``user.ckptfs.version``.
        files: Number of files in the broadcast.
        bytes: Total size of these files.
        nodes: The report of each node, by Ray's node id.
        seconds: Duration of the broadcast.
        sources: The report of each node that only gave, by Ray's node id.
    """

    version: str
    files: int
    bytes: int
    nodes: Mapping[str, NodeReport]
    seconds: float
    sources: Mapping[str, NodeReport] = field(default_factory=dict[str, NodeReport])

    @property
    def is_complete(self) -> bool:
        """Whether every node has all bytes."""
        return not any(node.left for node in self.nodes.values())

    def __str__(self) -> str:
        parts = self.nodes.values()
        all_parts = [*parts, *self.sources.values()]
        complete = sum(not part.left for part in parts)
        lines = [
            f"{counted(self.files, 'file')}, {size_text(self.bytes)}, in {self.seconds:.1f} s: "
            f"{complete} of {len(parts)} nodes have all of it",
            f"read from the store {size_text(sum(part.fetched for part in all_parts))}, "
            f"taken from other nodes {size_text(sum(part.taken for part in parts))}, "
            f"in caches before {size_text(sum(part.had for part in parts))}",
        ]
        troubled = [(name, part) for name, part in self.nodes.items() if part.left or part.error]
        troubled.sort(key=lambda each: -each[1].left)
        for name, part in troubled[:_SHOWN_MAX]:
            state = f"lacks {size_text(part.left)}" if part.left else "has all of it"
            lines.append(f"node {name} {state}: {part.error or NOT_BROUGHT}")
        if len(troubled) > _SHOWN_MAX:
            lines.append(f"and {len(troubled) - _SHOWN_MAX} nodes more")
        silent = [
            f"source {name}: {part.error}" for name, part in self.sources.items() if part.error
        ]
        lines += silent[:_SHOWN_MAX]
        return "\n".join(lines)
