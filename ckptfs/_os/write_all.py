"""Writes of whole buffers, because write(2) may write only the beginning of one."""

import os

Bytes = bytes | bytearray | memoryview


def write_all(fd: int, data: Bytes) -> None:
    """Write all of `data` at the descriptor's position. Raises OSError."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def pwrite_all(fd: int, data: Bytes, offset: int) -> None:
    """Write all of `data` at `offset`. Raises OSError."""
    rest = memoryview(data)
    while rest:
        count = os.pwrite(fd, rest, offset)
        rest, offset = rest[count:], offset + count
