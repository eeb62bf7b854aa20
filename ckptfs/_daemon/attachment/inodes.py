"""Inodes: the directory tree of one manifest, and the numbers of its nodes.

An inode number has the attachment's ordinal in the upper 32 bits. The lower bits are 1 for its
root, and then follow the manifest's order. Ordinals are never used again, so a number means one
version of one file of one attachment as long as the mount lives. Therefore the daemon does not
count the kernel's references (FUSE_FORGET).
"""

from dataclasses import dataclass, field

from ckptfs._model.manifest import METADATA_NAME, ListedFile, Manifest

MOUNT_ROOT = 1
"""Inode of the mount point itself, outside every attachment (FUSE_ROOT_ID)."""
VOLUMES_ROOT = 2
"""Inode of the directory of volumes, outside every attachment."""
OUTSIDE = frozenset([MOUNT_ROOT, VOLUMES_ROOT])


class VfsError(Exception):
    """Base of the errors of file system operations."""


class NoEntry(VfsError):
    """The directory has no such name."""


class NotDirectory(VfsError):
    """The inode is a file, and the operation needs a directory."""


class IsDirectory(VfsError):
    """The inode is a directory, and the operation needs a file."""


class ReadOnly(VfsError):
    """The mount does not support writing."""


class StaleInode(VfsError):
    """The attachment has ended."""


@dataclass(slots=True, eq=False)
class Node:
    """A file or directory. `index` is a file's position in ``Snapshot.listed``, and -1 for a
    directory."""

    inode: int
    name: bytes
    parent: "Node | None"
    index: int = -1
    size: int = 0
    mtime_ns: int = 0
    subdirectories: int = 0
    children: "dict[bytes, Node]" = field(default_factory=dict[bytes, "Node"])

    @property
    def is_directory(self) -> bool:
        """Whether it is a directory."""
        return self.index < 0


_NO_CHILDREN: dict[bytes, Node] = {}


class Tree:
    """The nodes of a manifest. A directory's mtime is that of its newest file, or `mtime_ns` if no
    file has one."""

    def __init__(self, ordinal: int, manifest: Manifest, mtime_ns: int) -> None:
        self.root = Node(ordinal << 32 | 1, b"", None)
        self._nodes = [self.root]
        by_path = {"": self.root}
        for path in manifest.directories:
            parent = by_path[path.rpartition("/")[0]]
            node = self._add(path, parent, -1)
            parent.subdirectories += 1
            by_path[path] = node
        for index, file in enumerate(manifest.files):
            self._add_file(by_path[file.path.rpartition("/")[0]], file, index, mtime_ns)
        for node in reversed(self._nodes):  # children come after their parents
            if node.parent is not None:
                node.parent.mtime_ns = max(node.parent.mtime_ns, node.mtime_ns)
        for node in self._nodes:
            node.mtime_ns = node.mtime_ns or mtime_ns

    def _add(self, path: str, parent: Node, index: int) -> Node:
        name = path.rpartition("/")[2].encode()
        node = Node(self.root.inode + len(self._nodes), name, parent, index)
        self._nodes.append(node)
        parent.children[name] = node
        return node

    def _add_file(self, parent: Node, file: ListedFile, index: int, mtime_ns: int) -> Node:
        node = self._add(file.path, parent, index)
        node.children = _NO_CHILDREN
        node.size = file.size
        node.mtime_ns = file.mtime_ns or mtime_ns
        return node

    def replace(self, file: ListedFile, index: int) -> Node:
        """Show a new version of a file of the root, or a new file, with a number of its own."""
        return self._add_file(self.root, file, index, self.root.mtime_ns)

    def remove(self, path: str) -> Node | None:
        """Remove a file of the root, and return its node, or None if the root has no such file."""
        node = self.root.children.get(path.encode())
        if node is None or node.is_directory:
            return None
        return self.root.children.pop(path.encode())

    def node(self, inode: int) -> Node | None:
        """The node with that number."""
        position = (inode & 0xFFFFFFFF) - 1
        return self._nodes[position] if 0 <= position < len(self._nodes) else None


def ordinal_of(inode: int) -> int:
    """The ordinal of an inode's attachment; 0 for the directories outside of all attachments."""
    return inode >> 32


def entry_of(name: str) -> tuple[int, bytes]:
    """The entry for an attachment's name: the inode of the directory, and the name in it."""
    folder, _, last = name.rpartition("/")
    return VOLUMES_ROOT if folder else MOUNT_ROOT, last.encode()


def is_metadata(node: Node) -> bool:
    """Whether the node is a version of the checkpoint's own metadata file."""
    top = node.parent is not None and node.parent.parent is None
    return top and node.name == METADATA_NAME.encode() and not node.is_directory
