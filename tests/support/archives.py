"""Files in the layouts of safetensors and torch, made without these: also sharded checkpoints."""

import contextlib
import itertools
import json
import os
import pickle
import struct
import sys
import types
import zipfile
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ALIGNMENT = 64
"""torch.save begins each tensor's data at a multiple of it."""


def write_safetensors(file: Path, sizes: "dict[str, int]") -> "dict[str, tuple[int, int]]":
    """Write tensors of so many random bytes; returns where these begin and end."""
    header, at = {}, 0
    for name, size in sizes.items():
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(header).encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + os.urandom(at))
    base = 8 + len(raw)
    return {
        name: (base + each["data_offsets"][0], base + each["data_offsets"][1])
        for name, each in header.items()
    }


def write_torch_zip(
    file: "Path | IO[bytes]", tensors: "list[bytes]", pickled: bytes = b"\x80\x02}."
) -> "list[tuple[int, int]]":
    """Write what torch.save would; returns where each tensor's data begins and ends."""
    places: list[tuple[int, int]] = []
    with zipfile.ZipFile(file, "w") as archive:

        def add(name: str, data: bytes) -> None:
            entry = zipfile.ZipInfo(f"archive/{name}")
            assert archive.fp
            at = archive.fp.tell() + 30 + len(entry.filename)
            padding = -(at + 4) % ALIGNMENT
            entry.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
            archive.writestr(entry, data)
            end = archive.fp.tell()
            places.append((end - len(data), end))
            entry.extra = b""  # in the local header only

        add("data.pkl", pickled)
        add("byteorder", b"little")
        first = len(places)
        for number, data in enumerate(tensors):
            add(f"data/{number}", data)
        last = len(places)
        add("version", b"3\n")
    return places[first:last]


def pickle_metadata(
    items: "list[tuple[str, str, int, int]]",
    protocol: int = 4,
    planner_data: object = None,
    offsets: "dict[int, tuple[int, ...]] | None" = None,
) -> bytes:
    """A ``.metadata`` of torch.distributed.checkpoint for items of (name, file, offset, length).

    `offsets`: where in its tensor an item begins, by position; the others are no tensors.
    """
    with _torch_modules() as (torch, metadata, filesystem):
        top = metadata.Metadata()
        sizes = {number: torch.Size(found) for number, found in (offsets or {}).items()}
        top.state_dict_metadata = {
            name: ("opaque", [1.5, {name: sizes.get(number)}])
            for number, (name, *_) in enumerate(items)
        }
        top.planner_data = planner_data
        top.storage_data = {}
        for number, (name, path, offset, length) in enumerate(items):
            index = metadata.MetadataIndex()
            index.fqn, index.offset, index.index = name, sizes.get(number), number
            info = filesystem._StorageInfo()
            info.relative_path, info.offset, info.length = path, offset, length
            top.storage_data[index] = info
        top.version = "1.0.0"
        return pickle.dumps(top, protocol)


class _Size(tuple[int, ...]):
    """A stand-in for ``torch.Size``, which is a tuple, and is pickled as ``torch.Size`` is."""

    __slots__ = ()

    def __reduce__(self) -> "tuple[type[_Size], tuple[tuple[int, ...]]]":
        return type(self), (tuple(self),)


def write_checkpoint(
    folder: Path,
    shards: "dict[str, list[bytes]]",
    pieces: "list[tuple[str, tuple[int, ...]]] | None" = None,
) -> "list[tuple[str, int, int]]":
    """Write a sharded checkpoint; returns each item's file, begin and end.

    Args:
        folder: Where.
        shards: Each file's items, which follow each other.
        pieces: The tensor that each item is of, and where in it that begins.
    """
    folder.mkdir(parents=True, exist_ok=True)
    places: list[tuple[str, int, int]] = []
    for name, contents in shards.items():
        (folder / name).write_bytes(b"".join(contents))
        ends = list(itertools.accumulate(map(len, contents)))
        places += [(name, end - len(data), end) for end, data in zip(ends, contents, strict=True)]
    names = [name for name, _ in pieces or []] or [f"item.{n}" for n in range(len(places))]
    items = [
        (name, file, start, end - start)
        for name, (file, start, end) in zip(names, places, strict=True)
    ]
    offsets = {number: begin for number, (_, begin) in enumerate(pieces or [])}
    (folder / ".metadata").write_bytes(pickle_metadata(items, offsets=offsets))
    return places


@contextlib.contextmanager
def _torch_modules() -> "Iterator[tuple[types.ModuleType, types.ModuleType, types.ModuleType]]":
    """Stand-ins for the modules whose classes the pickle names."""
    names = ["torch", "torch.distributed", "torch.distributed.checkpoint"]
    names += [f"{names[-1]}.metadata", f"{names[-1]}.filesystem"]
    modules = {name: types.ModuleType(name) for name in names}
    for module, classes in zip(
        names[-2:], [["Metadata", "MetadataIndex"], ["_StorageInfo"]], strict=True
    ):
        for name in classes:
            setattr(modules[module], name, type(name, (), {"__module__": module}))
    vars(modules["torch"])["Size"] = type(
        "Size", (_Size,), {"__module__": "torch", "__slots__": ()}
    )
    before = {name: sys.modules.get(name) for name in names}
    sys.modules.update(modules)
    try:
        yield modules["torch"], modules[names[-2]], modules[names[-1]]
    finally:
        for name, module in before.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module
