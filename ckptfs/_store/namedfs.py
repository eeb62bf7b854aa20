# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false
# pyright: reportUntypedBaseClass=false
"""A named store as a pyarrow filesystem.

It knows its name only, and looks into the configuration of whichever process uses it: so it can be
pickled and sent to another node, and no credentials go with it.
"""

from typing import Any

from pyarrow import fs as pafs

from ckptfs._model.stores import named_location
from ckptfs._store.build import filesystem_for
from ckptfs._store.lazyfs import LazyHandler
from ckptfs._store.named import own_location

_PREFIX = "ckptfs-store:"


class StoreHandler(LazyHandler):
    """What pyarrow asks.

    Raises UnknownStore where the process's configuration has no such store.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def __reduce__(self) -> tuple[type["StoreHandler"], tuple[str]]:
        return StoreHandler, (self.name,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StoreHandler) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)

    def build(self) -> Any:
        """See `LazyHandler`."""
        location = own_location(named_location(self.name, "", None))
        return pafs.SubTreeFileSystem(location.path or "/", filesystem_for(location))

    def get_type_name(self) -> str:
        return f"{_PREFIX}{self.name}"
