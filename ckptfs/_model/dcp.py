"""The layout of torch.distributed.checkpoint, from its pickle, which is never unpickled.

Such a checkpoint is a directory with the file ``.metadata``, a pickle of
``torch.distributed.checkpoint.metadata.Metadata``. Its ``storage_data`` is a dict whose values are
``torch.distributed.checkpoint.filesystem._StorageInfo`` with ``relative_path`` (a file beside it),
``offset`` and ``length``: where in which file an item (a tensor or a piece of one) is.

A pickle is a program for a stack machine (the opcodes are documented in CPython's ``pickletools``).
`_walk` runs it on a machine that can do nothing: no class is looked up, nothing is called, and of
what would be built only that is kept which could belong to a `_StorageInfo`: integers, strings (as
bytes), and the two classes' instances; everything else is None. What an instance's state would be
is the instance itself, so no dict is built either. Nothing is copied or compared as a whole, so
references to what was built before cost eight bytes each, however large it is.

A pickle that the machine does not understand (of a protocol below 2, with persistent ids, damaged,
or beyond the limits) says nothing: there are no parts then. Pure functions on untrusted bytes.
"""

from collections.abc import Callable
from typing import Any, cast

import msgspec

from ckptfs._model.formats import Parts, parts_of

SizeOf = Callable[[bytes], int]

NAME = b".metadata"
"""The file's name, ``torch.distributed.checkpoint.filesystem._metadata_fn``."""
HEAD_BYTES = 256
"""How much of the file `is_metadata` needs: protocol, frame, and the names of module and class."""
BYTES_MAX = 32 << 20
"""Longest pickle to look into: some 120,000 items (about 250 bytes and 110 opcodes each)."""
_OPCODES_MAX = 16_000_000
_HELD_MAX = 4_000_000
"""Most entries of stack and memo (about 50 bytes each at the worst)."""
_SLICE = 2048
"""Opcodes between two pauses: about a millisecond."""

_MODULE = b"torch.distributed.checkpoint.metadata"
_CLASS = b"Metadata"
_STORAGE_DATA = b"storage_data"
_STORAGE_CLASSES = (
    b"torch.distributed.checkpoint.filesystem",
    b"_StorageInfo",
)


class _Item(msgspec.Struct, gc=False):
    """A `_StorageInfo`, and its state."""

    path: bytes = b""
    offset: int = -1
    length: int = -1


class _Metadata(msgspec.Struct):
    """A `Metadata`, and its state. `items`: the values of its storage data."""

    items: "list[_Item] | None" = None


def is_metadata(head: bytes) -> bool:
    """Whether a file that begins with `head` (`HEAD_BYTES`, or all of it) may be such a pickle."""
    return head[:1] == b"\x80" and _MODULE in head


def parts_by_file(raw: bytes, size_of: SizeOf, pause: Callable[[], None]) -> dict[bytes, Parts]:
    """The items of each file, as far as they make sense.

    Args:
        raw: All of the file ``.metadata``.
        size_of: Bytes of the file of that name beside it; -1: there is none.
        pause: Called every `_SLICE` opcodes.
    """
    ranges: dict[bytes, set[tuple[int, int]]] = {}
    for item in _items(raw, pause):
        if item.offset >= 0 and item.length > 0:  # equal ones: several names of one item
            ranges.setdefault(item.path, set()).add((item.offset, item.offset + item.length))
    found: dict[bytes, Parts] = {}
    for path, own in ranges.items():
        pause()
        size = size_of(path)
        if size >= 0 and (parts := parts_of(sorted(own), 0, size)):
            found[path] = parts
    return found


def _items(raw: bytes, pause: Callable[[], None]) -> "list[_Item]":
    if len(raw) > BYTES_MAX or not 2 <= int.from_bytes(raw[1:2], "little") <= 5:
        return []
    try:
        result = _walk(raw, pause)
    except (IndexError, ValueError):  # cut short, or what pickle would refuse, too
        return []
    return (result.items or []) if isinstance(result, _Metadata) else []


def _walk(raw: bytes, pause: Callable[[], None]) -> Any:
    """What the pickle stands for. Raises IndexError and ValueError if it is none, or too much.

    Numbers instead of names for the opcodes, in the order of their frequency: a million of them is
    nothing special. A stack that runs empty may give a wrong answer instead of an error; what comes
    out is checked anyway.
    """
    stack: list[Any] = []
    memo: list[Any] = []
    marks: list[int] = []
    nothing = _NOTHING
    at = 2  # behind the protocol
    for _ in range(_OPCODES_MAX // _SLICE):
        for _ in range(_SLICE):
            op = raw[at]
            at += 1
            if op == 0x94:  # MEMOIZE
                memo.append(stack[-1])
            elif op == 0x68:  # BINGET
                stack.append(memo[raw[at]])
                at += 1
            elif op == 0x6A:  # LONG_BINGET
                stack.append(memo[int.from_bytes(raw[at : at + 4], "little")])
                at += 4
            elif op == 0x28:  # MARK
                marks.append(len(stack))
            elif op in nothing:
                stack.append(None)
            elif op == 0x4B:  # BININT1
                stack.append(raw[at])
                at += 1
            elif op == 0x81:  # NEWOBJ
                del stack[-1]
                made = stack[-1]
                stack[-1] = made() if made is _Item or made is _Metadata else None
            elif op == 0x62 or op == 0x52:  # BUILD, REDUCE
                del stack[-1]
                if op == 0x52:
                    stack[-1] = None
            elif op == 0x86:  # TUPLE2
                del stack[-1]
                stack[-1] = None
            elif op == 0x75:  # SETITEMS
                mark = marks.pop()
                _set_items(stack[mark - 1], stack, mark)
                del stack[mark:]
            elif op == 0x7D:  # EMPTY_DICT
                stack.append(_dict_after(stack[-1]) if stack else None)
            elif op == 0x85:  # TUPLE1
                stack[-1] = None
            elif op == 0x4D:  # BININT2
                stack.append(int.from_bytes(raw[at : at + 2], "little"))
                at += 2
            elif op == 0x8C:  # SHORT_BINUNICODE
                at += 1
                stack.append(raw[at : at + raw[at - 1]])
                at += raw[at - 1]
            elif op == 0x4A:  # BININT
                stack.append(int.from_bytes(raw[at : at + 4], "little", signed=True))
                at += 4
            elif op == 0x8A:  # LONG1
                at += 1
                stack.append(int.from_bytes(raw[at : at + raw[at - 1]], "little", signed=True))
                at += raw[at - 1]
            elif op == 0x74:  # TUPLE
                del stack[marks.pop() :]
                stack.append(None)
            elif op == 0x61 or op == 0x30:  # APPEND, POP
                del stack[-1]
            elif op == 0x65 or op == 0x90 or op == 0x31:  # APPENDS, ADDITEMS, POP_MARK
                del stack[marks.pop() :]
            elif op == 0x73:  # SETITEM
                _set_items(stack[-3], stack, len(stack) - 2)
                del stack[-2:]
            elif op == 0x95:  # FRAME
                at += 8
            elif op == 0x93:  # STACK_GLOBAL
                name = stack.pop()
                stack[-1] = _class_of(stack[-1], name)
            elif op == 0x63:  # GLOBAL
                after = raw.index(b"\n", at)
                end = raw.index(b"\n", after + 1)
                stack.append(_class_of(raw[at:after], raw[after + 1 : end]))
                at = end + 1
            elif op == 0x71 or op == 0x72:  # BINPUT, LONG_BINPUT
                width = 1 if op == 0x71 else 4
                _put(memo, int.from_bytes(raw[at : at + width], "little"), stack[-1])
                at += width
            elif op in _COUNTED:
                width, is_text = _COUNTED[op]
                length = int.from_bytes(raw[at : at + width], "little")
                at += width
                stack.append(raw[at : at + length] if is_text else None)
                at += length
            elif op == 0x87:  # TUPLE3
                del stack[-2:]
                stack[-1] = None
            elif op == 0x47:  # BINFLOAT
                stack.append(None)
                at += 8
            elif op == 0x92:  # NEWOBJ_EX
                del stack[-2:]
                stack[-1] = None
            elif op == 0x91:  # FROZENSET
                del stack[marks.pop() :]
                stack.append(None)
            elif op == 0x2E:  # STOP
                return stack[-1]
            else:
                raise ValueError(op)
        if len(stack) + len(memo) + len(marks) > _HELD_MAX:
            raise ValueError("too much")
        pause()
    raise ValueError("too long")


_NOTHING = frozenset(b")N\x88\x89]\x8f")
"""EMPTY_TUPLE, NONE, NEWTRUE, NEWFALSE, EMPTY_LIST, EMPTY_SET."""
_COUNTED = {
    0x58: (4, True),  # BINUNICODE
    0x8D: (8, True),  # BINUNICODE8
    0x43: (1, False),  # SHORT_BINBYTES
    0x42: (4, False),  # BINBYTES
    0x8E: (8, False),  # BINBYTES8
    0x96: (8, False),  # BYTEARRAY8
    0x8B: (4, False),  # LONG4
}
"""Opcodes with a length of so many bytes and content, and whether that is text."""


def _class_of(module: Any, name: Any) -> Any:
    if module == _MODULE and name == _CLASS:
        return _Metadata
    return _Item if (module, name) == _STORAGE_CLASSES else None


def _dict_after(below: Any) -> Any:
    """What stands for a new dict, by what is below it on the stack: an instance's state for the
    instance, the storage data for a list of items."""
    if type(below) is _Item or type(below) is _Metadata:
        return below
    return list[_Item]() if below == _STORAGE_DATA else None


def _set_items(target: Any, stack: list[Any], start: int) -> None:
    """Take in the keys and values on the stack from `start` on."""
    if type(target) is list:
        items = cast("list[_Item]", target)
        items.extend(value for value in stack[start + 1 :: 2] if type(value) is _Item)
    elif type(target) is _Item:
        for key, value in zip(stack[start::2], stack[start + 1 :: 2], strict=False):
            if key == b"relative_path" and type(value) is bytes:
                target.path = value
            elif key == b"offset" and type(value) is int:
                target.offset = value
            elif key == b"length" and type(value) is int:
                target.length = value
    elif type(target) is _Metadata:
        for key, value in zip(stack[start::2], stack[start + 1 :: 2], strict=False):
            if key == _STORAGE_DATA and type(value) is list:
                target.items = value


def _put(memo: list[Any], index: int, value: Any) -> None:
    """A pickler counts its memo up; anything else is none of Python's."""
    if index == len(memo):
        memo.append(value)
    else:
        memo[index] = value
