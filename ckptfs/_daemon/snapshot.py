"""What an attachment shows: the manifest that was fixed when it was attached, as a tree, and newer
versions of the one file that may change.

The memory and the time that it takes grow with the number of files: one that the next daemon finds
recorded is built when it is first needed (``restore``).
"""

from collections.abc import Iterator

import msgspec

from ckptfs._daemon.cachedir import ObjectKey
from ckptfs._daemon.tree import Node, Tree
from ckptfs._model.location import Location
from ckptfs._model.manifest import ListedFile, Manifest


class Snapshot:
    """The files of one attachment.

    Args:
        ordinal: The attachment's.
        location: Where it is, without credentials.
        manifest: What it held when it was attached.
        attached_s: When that was, seconds since the epoch.
        cache_scope: Of its cached bytes (see `users`).

    Attributes:
        manifest: As given.
        listed: The manifest's files, and behind them newer versions (of the metadata file).
        replaced: Positions of those that are no longer shown.
        size: Bytes of all files that it shows.
        tree: Their inodes.
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
        self.manifest = manifest
        self.listed = list(manifest.files)
        self.replaced: set[int] = set()
        self.size = manifest.size
        self.tree = Tree(ordinal, manifest, int(attached_s * 1e9))
        self._digests: list[str] = [""] * len(self.listed)  # "": not computed yet

    def digests(self) -> list[str]:
        """Those of all in `listed`; at first a microsecond each."""
        return [self.digest(index) for index in range(len(self.listed))]

    def digest(self, index: int) -> str:
        """The cache's digest of the file at that position of `listed`."""
        digest = self._digests[index]
        if not digest:
            digest = self._digests[index] = self.key(index).digest()
        return digest

    def key(self, index: int) -> ObjectKey:
        """The cache's name for the file at that position of `listed`."""
        file = self.listed[index]
        path = f"{self._location.path}/{file.path}"
        store = self._location.store_identity + self._cache_scope
        return ObjectKey(store, path, file.size, file.mtime_ns)

    def shown(self) -> Iterator[tuple[int, ListedFile]]:
        """The files that it shows now, with their positions in `listed`."""
        return ((i, file) for i, file in enumerate(self.listed) if i not in self.replaced)

    def replace(self, file: ListedFile) -> Node:
        """Show this version of a file of the root from now on."""
        self.hide(file.path)
        index = len(self.listed)
        if file.mtime_ns:
            file = msgspec.structs.replace(file, mtime_ns=_told_apart(file.mtime_ns, index))
        self.listed.append(file)
        self._digests.append("")
        self.size += file.size
        return self.tree.replace(file, index)

    def hide(self, path: str) -> None:
        """Show that file of the root, if there is one, no more."""
        node = self.tree.remove(path)
        if node is not None:
            self.replaced.add(node.index)
            self.size -= node.size


def _told_apart(mtime_ns: int, serial: int) -> int:
    """Another time in the same second: a store's clock may tick in seconds, and the cache must not
    take one version for another, while `Store.confirm` compares seconds."""
    nudge = 1 + serial % 999
    return mtime_ns + (nudge if mtime_ns % 10**9 + nudge < 10**9 else -nudge)
