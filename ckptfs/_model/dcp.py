"""The layout of torch.distributed.checkpoint, from its pickle, which is never unpickled.

Such a checkpoint is a directory with the file ``.metadata``, a pickle of
``torch.distributed.checkpoint.metadata.Metadata``. Its ``storage_data`` is a dict whose values are
``torch.distributed.checkpoint.filesystem._StorageInfo`` with ``relative_path`` (a file beside it),
``offset`` and ``length``: where in which file an item (a tensor or a piece of one) is. Its keys are
``torch.distributed.checkpoint.metadata.MetadataIndex`` with ``fqn``, the tensor's name, and
``offset``, a ``torch.Size``: where in the tensor the piece begins; None for what is no tensor.

A pickle is a program for a stack machine (the opcodes are documented in CPython's ``pickletools``).
`_walk` runs it on a machine that can do nothing: no class is looked up, nothing is called, and of
what would be built only that is kept which could belong to these: integers, strings (as bytes),
sizes (as tuples, of what would be their numbers), and the classes' instances; everything else is
None. What an instance's state would be is the instance itself, so no dict is built either. Nothing
is copied or compared as a whole, so references to what was built before cost eight bytes each,
however large it is.

A pickle that the machine does not understand (of a protocol below 2, with persistent ids, damaged,
or beyond the limits) says nothing: there are no parts then. Pure functions on untrusted bytes.
"""

from collections.abc import Callable
from typing import Any, cast

import msgspec

from ckptfs._model.formats import Parts, Tensor, parts_of

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
_STORAGE_DATA = b"storage_data"
_DIMENSIONS_MAX = 16
"""Of a tensor; torch itself allows 64. Pieces of one with more are not told apart."""


class _Item(msgspec.Struct, gc=False):
    """A `_StorageInfo`, and its state."""

    path: bytes = b""
    offset: int = -1
    length: int = -1


class _Index(msgspec.Struct, gc=False):
    """A `MetadataIndex`, and its state."""

    name: bytes = b""
    offsets: tuple[int, ...] = ()


class _Metadata(msgspec.Struct):
    """A `Metadata`, and its state. `items`: its storage data."""

    items: "list[tuple[_Index, _Item]] | None" = None


class _Size:
    """``torch.Size``; an instance is a tuple here."""


_CLASSES: dict[tuple[Any, Any], type] = {
    (_MODULE, b"Metadata"): _Metadata,
    (_MODULE, b"MetadataIndex"): _Index,
    (b"torch.distributed.checkpoint.filesystem", b"_StorageInfo"): _Item,
    (b"torch", b"Size"): _Size,
}
_NO_INDEX = _Index()


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
    found: dict[bytes, Parts] = {}
    for path, own in _by_file(raw, pause).items():
        pause()
        size = size_of(path)
        places = sorted({(start, stop) for _, start, stop in own})  # several names of one item
        if size >= 0 and (parts := parts_of(places, 0, size)):
            found[path] = parts
    return found


def tensors_by_file(
    raw: bytes, size_of: SizeOf, pause: Callable[[], None]
) -> dict[bytes, list[Tensor]]:
    """The items of each file by position, as far as they lie in it; dtype and shape are unknown.

    Their names are those of the tensors; a piece that does not begin at the tensor's beginning also
    says where it does, as in ``layers.0.weight[512,0]``. The arguments are those of
    `parts_by_file`.
    """
    found: dict[bytes, list[Tensor]] = {}
    for path, own in _by_file(raw, pause).items():
        pause()
        size = size_of(path)
        tensors = [
            Tensor(_name_of(index), "", (), start, stop)
            for index, start, stop in own
            if stop <= size and index.name
        ]
        if tensors:
            found[path] = sorted(tensors, key=lambda tensor: (tensor.start, tensor.end))
    return found


def _name_of(index: _Index) -> str:
    name = index.name.decode(errors="replace")
    return f"{name}[{','.join(map(str, index.offsets))}]" if any(index.offsets) else name


def _by_file(raw: bytes, pause: Callable[[], None]) -> dict[bytes, list[tuple[_Index, int, int]]]:
    """Index, start and stop of each file's items."""
    found: dict[bytes, list[tuple[_Index, int, int]]] = {}
    for index, item in _items(raw, pause):
        if item.offset >= 0 and item.length > 0:
            own = found.setdefault(item.path, [])
            own.append((index, item.offset, item.offset + item.length))
    return found


def _items(raw: bytes, pause: Callable[[], None]) -> "list[tuple[_Index, _Item]]":
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
                stack[-1] = made() if made is _Item or made is _Index or made is _Metadata else None
            elif op == 0x62:  # BUILD
                del stack[-1]
            elif op == 0x52:  # REDUCE
                argument = stack.pop()
                stack[-1] = argument if stack[-1] is _Size else None
            elif op == 0x86:  # TUPLE2
                second = stack.pop()
                stack[-1] = _tuple(stack[-1], second) if stack[-2] is _Size else None
            elif op == 0x75:  # SETITEMS
                mark = marks.pop()
                _set_items(stack[mark - 1], stack, mark)
                del stack[mark:]
            elif op == 0x7D:  # EMPTY_DICT
                stack.append(_dict_after(stack[-1]) if stack else None)
            elif op == 0x85:  # TUPLE1
                stack[-1] = _tuple(stack[-1]) if stack[-2] is _Size else None
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
                mark = marks.pop()
                made = _tuple(*stack[mark:]) if mark and stack[mark - 1] is _Size else None
                del stack[mark:]
                stack.append(made)
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
                made = _tuple(*stack[-3:]) if stack[-4] is _Size else None
                del stack[-2:]
                stack[-1] = made
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
    if type(module) is bytes and type(name) is bytes:
        return _CLASSES.get((module, name))
    return None


def _tuple(*items: Any) -> Any:
    """What stands for a tuple behind `_Size`: its numbers, or what it is called with, which stands
    for the same."""
    is_argument = len(items) == 1 and isinstance(items[0], tuple)
    return cast("Any", items[0]) if is_argument else items


def _is_size(value: Any) -> bool:
    if type(value) is not tuple:
        return False
    numbers = cast("tuple[Any, ...]", value)
    return len(numbers) <= _DIMENSIONS_MAX and all(
        type(number) is int and 0 <= number < 1 << 63 for number in numbers
    )


def _dict_after(below: Any) -> Any:
    """What stands for a new dict, by what is below it on the stack: an instance's state for the
    instance, the storage data for a list of items."""
    if type(below) is _Item or type(below) is _Index or type(below) is _Metadata:
        return below
    return list[tuple[_Index, _Item]]() if below == _STORAGE_DATA else None


def _set_items(target: Any, stack: list[Any], start: int) -> None:
    """Take in the keys and values on the stack from `start` on."""
    if target is None:  # nearly always
        return
    pairs = zip(stack[start::2], stack[start + 1 :: 2], strict=False)
    if type(target) is list:
        items = cast("list[tuple[_Index, _Item]]", target)
        items.extend(
            (key if type(key) is _Index else _NO_INDEX, value)
            for key, value in pairs
            if type(value) is _Item
        )
    elif type(target) is _Item:
        for key, value in pairs:
            if key == b"relative_path" and type(value) is bytes:
                target.path = value
            elif key == b"offset" and type(value) is int:
                target.offset = value
            elif key == b"length" and type(value) is int:
                target.length = value
    elif type(target) is _Index:
        for key, value in pairs:
            if key == b"fqn" and type(value) is bytes:
                target.name = value
            elif key == b"offset" and _is_size(value):
                target.offsets = value
    elif type(target) is _Metadata:
        for key, value in pairs:
            if key == _STORAGE_DATA and type(value) is list:
                target.items = value


def _put(memo: list[Any], index: int, value: Any) -> None:
    """A pickler counts its memo up; anything else is none of Python's."""
    if index == len(memo):
        memo.append(value)
    else:
        memo[index] = value
