"""The content of the store: every byte of every version of every object follows from the seed.

So a reader knows the right bytes without a copy of them. A version is a stretch of a random text
that repeats itself. The text's length differs from each multiple of a block, so that a block in the
wrong place, of another file or of another version never looks right.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass
from functools import cached_property

MIB = 1 << 20
PERIOD = 4 * MIB + 4099
"""Bytes until the text repeats itself; 4099 is a prime."""

LOCAL = "disk"
"""The checkpoint on the node's own disk, which a library in a worker reads. No object of it gets
another version: only time and size would tell."""

SURE_BYTES = 16
"""As many equal bytes are no coincidence."""


@dataclass(frozen=True)
class File:
    """An object. `index`: its number among all; `tensors`: their byte ranges, if it has such."""

    index: int
    checkpoint: str
    name: str
    bytes: int
    resizes: bool = False
    tensors: tuple[tuple[int, int], ...] = ()
    head: bytes = b""


class Contents:
    """All files of a run, by its seed."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        chance = random.Random(f"{seed} files")
        self.files: list[File] = []

        def add(checkpoint: str, name: str, size: int, *, resizes: bool = False) -> None:
            self.files.append(File(len(self.files), checkpoint, name, size, resizes))

        for number in range(3):
            self.files.append(self._safetensors(chance, number))
        add("model", "config.json", 700, resizes=True)
        add("model", "training/optimizer.bin", 6 * MIB + chance.randrange(MIB))
        add("run", "big.bin", 20 * MIB + chance.randrange(MIB))
        add("run", "layers/0/part-0.bin", 5 * MIB + 123)
        add("run", "layers/0/part-1.bin", 3 * MIB, resizes=True)
        add("run", "layers/1/deep/part-2.bin", MIB + 1)
        add("run", "empty", 0)
        add("run", "one", 1)
        for number in range(60):
            size = chance.randrange(40_000)
            add("wide", f"d{number % 7}/part-{number:03}", size, resizes=number % 5 == 0)
        for number in range(3):
            add(LOCAL, f"shard-{number}.bin", 7 * MIB + 5 * number)

    def _safetensors(self, chance: random.Random, number: int) -> File:
        sizes = [chance.randrange(1, 3 * MIB) for _ in range(chance.randrange(3, 8))]
        header: dict[str, object] = {}
        start = 0
        for index, size in enumerate(sizes):
            place = [start, start + size]
            header[f"layer.{index}"] = {"dtype": "U8", "shape": [size], "data_offsets": place}
            start += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        head = len(text).to_bytes(8, "little") + text
        ends = [len(head) + sum(sizes[: index + 1]) for index in range(len(sizes))]
        tensors = tuple((end - size, end) for end, size in zip(ends, sizes, strict=True))
        name = f"model-{number + 1:05}-of-00003.safetensors"
        return File(number, "model", name, len(head) + start, False, tensors, head)

    @cached_property
    def _text(self) -> bytes:
        return random.Random(f"{self._seed} text").randbytes(PERIOD)

    @cached_property
    def checkpoints(self) -> dict[str, list[File]]:
        """The files of each checkpoint."""
        found: dict[str, list[File]] = {}
        for file in self.files:
            found.setdefault(file.checkpoint, []).append(file)
        return found

    def size(self, file: File, version: int) -> int:
        """Bytes of a version."""
        if not file.resizes:
            return file.bytes
        return random.Random(f"{self._seed} {file.index} {version} size").randrange(file.bytes + 1)

    def _shift(self, file: File, version: int) -> int:
        text = f"{self._seed} {file.index} {version}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") % PERIOD

    def expected(self, file: File, version: int, offset: int, length: int) -> bytes:
        """The bytes [offset, offset + length) of a version; fewer at its end."""
        stop = min(offset + length, self.size(file, version))
        parts = [file.head[offset:stop]] if offset < len(file.head) else []
        offset = max(offset, min(len(file.head), stop))
        while offset < stop:
            at = (self._shift(file, version) + offset) % PERIOD
            parts.append(self._text[at : at + stop - offset])
            offset += len(parts[-1])
        return b"".join(parts)
