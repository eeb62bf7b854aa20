# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false
# pyright: reportUntypedBaseClass=false
"""A named store as a pyarrow filesystem.

It knows its name only, and looks into the configuration of whichever process uses it: so it can be
pickled and sent to another node, and no credentials go with it.
"""

import functools
from typing import Any

from pyarrow import fs as pafs

from ckptfs._model.stores import named_location
from ckptfs._store.named import own_location

_PREFIX = "ckptfs-store:"


class StoreHandler(pafs.FileSystemHandler):
    """What pyarrow asks. Each method is that of the same name of a pyarrow filesystem.

    Raises UnknownStore where the process's configuration has no such store.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __reduce__(self) -> tuple[type["StoreHandler"], tuple[str]]:
        return StoreHandler, (self.name,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StoreHandler) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)

    @functools.cached_property
    def _fs(self) -> Any:
        from ckptfs._store.onfilesystem import filesystem_for  # it imports this module

        location = own_location(named_location(self.name, "", None))
        return pafs.SubTreeFileSystem(location.path or "/", filesystem_for(location))

    def get_type_name(self) -> str:
        return f"{_PREFIX}{self.name}"

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: list[str]) -> Any:
        return self._fs.get_file_info(paths)

    def get_file_info_selector(self, selector: Any) -> Any:
        return self._fs.get_file_info(selector)

    def create_dir(self, path: str, recursive: bool) -> None:
        self._fs.create_dir(path, recursive=recursive)

    def delete_dir(self, path: str) -> None:
        self._fs.delete_dir(path)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        self._fs.delete_dir_contents(path, missing_dir_ok=missing_dir_ok)

    def delete_root_dir_contents(self) -> None:
        self._fs.delete_dir_contents("/", accept_root_dir=True)

    def delete_file(self, path: str) -> None:
        self._fs.delete_file(path)

    def move(self, src: str, dest: str) -> None:
        self._fs.move(src, dest)

    def copy_file(self, src: str, dest: str) -> None:
        self._fs.copy_file(src, dest)

    def open_input_stream(self, path: str) -> Any:
        return self._fs.open_input_stream(path, compression=None)

    def open_input_file(self, path: str) -> Any:
        return self._fs.open_input_file(path)

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        return self._fs.open_output_stream(path, compression=None, metadata=metadata)

    def open_append_stream(self, path: str, metadata: Any) -> Any:
        return self._fs.open_append_stream(path, compression=None, metadata=metadata)
