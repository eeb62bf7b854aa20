"""The snapshot: the files of an attachment as a tree, from the manifest at the time of attaching,
and newer versions of the one file that may change.

Its memory and time grow with the number of files. So the next daemon builds the snapshot of a
recorded attachment only when it is needed (``restore``).
"""

from collections.abc import Iterator

import msgspec

from ckptfs._daemon.attachment.inodes import Node, Tree
from ckptfs._daemon.cache.object_dir import ObjectKey
from ckptfs._model.location import Location
from ckptfs._model.manifest import ListedFile, Manifest


class Snapshot:
    """The files of one attachment, whose fields have the same names.

    Attributes:
        listed: The manifest's files, and behind them newer versions of the metadata file.
        replaced: Positions of files that are no longer shown.
        size: Bytes of all shown files.
        tree: The inodes.
    """

    def __init__(
        self,
        ordinal: int,
        location: Location,
        manifest: Manifest,
        attached_s: float,
        cache_scope: str = "",
    ) -> None:
        self._cache_scope = cache_scope
        self._location = location
        self.listed = list(manifest.files)
        self.replaced: set[int] = set()
        self.size = manifest.size
        self.tree = Tree(ordinal, manifest, int(attached_s * 1e9))
        self._digests: list[str] = [""] * len(self.listed)  # "" until it is computed

    def digests(self) -> list[str]:
        """The digests of all files in `listed`. Computing one takes a microsecond."""
        return [self.digest(index) for index in range(len(self.listed))]

    def digest(self, index: int) -> str:
        """The cache's digest of the file at that position of `listed`."""
        digest = self._digests[index]
        if not digest:
            digest = self._digests[index] = self.key(index).digest()
        return digest

    def key(self, index: int) -> ObjectKey:
        """The cache's key of the file at that position of `listed`."""
        file = self.listed[index]
        path = f"{self._location.path}/{file.path}"
        store = self._location.store_identity + self._cache_scope
        return ObjectKey(store, path, file.size, file.mtime_ns)

    @property
    def file_count(self) -> int:
        """Number of shown files."""
        return len(self.listed) - len(self.replaced)

    def shown(self) -> Iterator[tuple[int, ListedFile]]:
        """The shown files, with their positions in `listed`."""
        return ((i, file) for i, file in enumerate(self.listed) if i not in self.replaced)

    def replace(self, file: ListedFile) -> Node:
        """Show this version of a file of the root from now on."""
        self.hide(file.path)
        index = len(self.listed)
        if file.mtime_ns:
            file = msgspec.structs.replace(file, mtime_ns=_distinct_time(file.mtime_ns, index))
        self.listed.append(file)
        self._digests.append("")
        self.size += file.size
        return self.tree.replace(file, index)

    def hide(self, path: str) -> None:
        """Hide a file of the root, if the tree has it."""
        node = self.tree.remove(path)
        if node is not None:
            self.replaced.add(node.index)
            self.size -= node.size


def _distinct_time(mtime_ns: int, serial: int) -> int:
    """Another time in the same second. A store's clock may tick in seconds, so two versions may
    have the same time, and the cache must not mix them up. `Store.confirm` compares seconds."""
    nudge = 1 + serial % 999
    return mtime_ns + (nudge if mtime_ns % 10**9 + nudge < 10**9 else -nudge)
