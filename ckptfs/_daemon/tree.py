"""Inodes: the directory tree of one manifest, and the numbering of all of them.

An inode number is the attachment's ordinal in the upper 32 bits, and in the lower ones 1 for its
root and then the position in the manifest's order. Ordinals are never used again, so a number means
one version of one file of one attachment for as long as the mount lives, and nothing has to be
counted or forgotten.
"""

from ckptfs._model.manifest import ListedFile, Manifest

MOUNT_ROOT = 1
"""Inode of the mount point itself, which is in no attachment (FUSE_ROOT_ID)."""


class Node:
    """A file or directory. `index` is a file's position in ``manifest.files``; -1 for
    directories."""

    __slots__ = (
        "children",
        "index",
        "inode",
        "mtime_ns",
        "name",
        "parent",
        "size",
        "subdirectories",
    )

    def __init__(self, inode: int, name: bytes, parent: "Node | None", index: int = -1) -> None:
        self.inode = inode
        self.name = name
        self.parent = parent
        self.index = index
        self.size = 0
        self.mtime_ns = 0
        self.subdirectories = 0
        self.children: dict[bytes, Node] = {}

    @property
    def is_directory(self) -> bool:
        """Whether it is a directory."""
        return self.index < 0


_NO_CHILDREN: dict[bytes, Node] = {}


class Tree:
    """The nodes of a manifest. A directory's mtime is that of its newest file, else `mtime_ns`."""

    def __init__(self, ordinal: int, manifest: Manifest, mtime_ns: int) -> None:
        base = ordinal << 32
        self.root = Node(base | 1, b"", None)
        self._nodes = [self.root]
        by_path = {"": self.root}
        for path in manifest.directories:
            parent = by_path[path.rpartition("/")[0]]
            node = self._add(base, path, parent, -1)
            parent.subdirectories += 1
            by_path[path] = node
        for index, file in enumerate(manifest.files):
            node = self._add(base, file.path, by_path[file.path.rpartition("/")[0]], index)
            node.children = _NO_CHILDREN
            node.size = file.size
            node.mtime_ns = file.mtime_ns or mtime_ns
        for node in reversed(self._nodes):  # children come after their parents
            if node.parent is not None:
                node.parent.mtime_ns = max(node.parent.mtime_ns, node.mtime_ns)
        for node in self._nodes:
            node.mtime_ns = node.mtime_ns or mtime_ns

    def _add(self, base: int, path: str, parent: Node, index: int) -> Node:
        name = path.rpartition("/")[2].encode()
        node = Node(base | (len(self._nodes) + 1), name, parent, index)
        self._nodes.append(node)
        parent.children[name] = node
        return node

    def replace(self, file: ListedFile, index: int) -> Node:
        """Show another version of a file of the root, or one more, under a number of its own."""
        node = self._add(self.root.inode & ~0xFFFFFFFF, file.path, self.root, index)
        node.children = _NO_CHILDREN
        node.size = file.size
        node.mtime_ns = file.mtime_ns or self.root.mtime_ns
        return node

    def remove(self, path: str) -> Node | None:
        """Show a file of the root no more; returns its node, if it was there."""
        node = self.root.children.get(path.encode())
        if node is None or node.is_directory:
            return None
        return self.root.children.pop(path.encode())

    def node(self, inode: int) -> Node | None:
        """The node with that number."""
        position = (inode & 0xFFFFFFFF) - 1
        return self._nodes[position] if 0 <= position < len(self._nodes) else None


def ordinal_of(inode: int) -> int:
    """The ordinal of the attachment that `inode` belongs to; 0 for the mount point."""
    return inode >> 32
