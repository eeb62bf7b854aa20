"""The layout of torch.distributed.checkpoint, from its pickle, which is never unpickled.

Such a checkpoint is a directory with the file ``.metadata``, a pickle of
``torch.distributed.checkpoint.metadata.Metadata``. Its ``storage_data`` is a dict whose values are
``torch.distributed.checkpoint.filesystem._StorageInfo``: the place of an item (a tensor or a piece
of one), with ``relative_path`` (a file beside it), ``offset`` and ``length``. Its keys are
``torch.distributed.checkpoint.metadata.MetadataIndex``, with ``fqn`` (the tensor's name) and
``offset`` (the ``torch.Size`` at which the piece begins in the tensor; None for other items).

A pickle is a program for a stack machine (CPython's ``pickletools`` documents the opcodes). The
machine here looks up no class and calls nothing. It keeps only the values that can belong to these
classes: integers, strings (as bytes), sizes (as tuples of integers), and instances. All other
values are None. An instance stands for its state, too, so the machine builds no dict. It copies and
compares no value as a whole, so a reference to an earlier value costs eight bytes, however large
that value is.

A pickle that the machine does not understand has no parts: one of a protocol below 2, one with
persistent ids, a damaged one, and one beyond the limits. Pure functions on untrusted bytes.
"""

import pickle
import pickletools
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast

import msgspec

from ckptfs._model.formats.headers import Parts, Tensor, parts_of

SizeOf = Callable[[bytes], int]

NAME = b".metadata"
"""The file's name, ``torch.distributed.checkpoint.filesystem._metadata_fn``."""
HEAD_BYTES = 256
"""Length of the beginning that `is_metadata` needs: protocol, frame, and the names of module and
class."""
BYTES_MAX = 32 << 20
"""Longest pickle to interpret: some 120,000 items (about 250 bytes and 110 opcodes each)."""
_OPCODES_MAX = 16_000_000
_HELD_MAX = 4_000_000
"""Most entries of stack and memo (about 50 bytes each in large checkpoints)."""
_SLICE = 2048
"""Opcodes between two pauses: about a millisecond."""

_MODULE = b"torch.distributed.checkpoint.metadata"
_DIMENSIONS_MAX = 16
"""Most dimensions of a tensor whose pieces get different names; torch itself allows 64."""


class _Item(msgspec.Struct, gc=False):
    """A `_StorageInfo`, and its state."""

    relative_path: bytes = b""
    offset: int = -1
    length: int = -1


class _Index(msgspec.Struct, gc=False):
    """A `MetadataIndex`, and its state."""

    fqn: bytes = b""
    offset: tuple[int, ...] = ()


class _Metadata(msgspec.Struct):
    """A `Metadata`, and its state."""

    storage_data: list[tuple[_Index, _Item]] = []


class _Size:
    """``torch.Size``, whose instances are tuples here."""


_CLASSES: dict[tuple[bytes, bytes], type] = {
    (_MODULE, b"Metadata"): _Metadata,
    (_MODULE, b"MetadataIndex"): _Index,
    (b"torch.distributed.checkpoint.filesystem", b"_StorageInfo"): _Item,
    (b"torch", b"Size"): _Size,
}
_FIELDS: dict[type, dict[bytes, type]] = {
    _Item: {b"relative_path": bytes, b"offset": int, b"length": int},
    _Index: {b"fqn": bytes, b"offset": tuple},
    _Metadata: {b"storage_data": list},
}
"""The types of the values that each instance keeps of its state."""


def is_metadata(head: bytes) -> bool:
    """Whether a file that begins with `head` (`HEAD_BYTES`, or all of it) may be such a pickle."""
    return head[:1] == b"\x80" and _MODULE in head


def parts_by_file(raw: bytes, size_of: SizeOf, pause: Callable[[], None]) -> dict[bytes, Parts]:
    """The items of each file, as far as they make sense.

    Args:
        raw: All of the file ``.metadata``.
        size_of: Function from the name of a file beside it to the file's bytes; -1 if it is absent.
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

    Their names are those of the tensors. The name of a piece that does not begin at the tensor's
    beginning has its position, as in ``layers.0.weight[512,0]``. The arguments are those of
    `parts_by_file`.
    """
    found: dict[bytes, list[Tensor]] = {}
    for path, own in _by_file(raw, pause).items():
        pause()
        size = size_of(path)
        tensors = [
            Tensor(_name_of(index), "", (), start, stop)
            for index, start, stop in own
            if stop <= size and index.fqn
        ]
        if tensors:
            found[path] = sorted(tensors, key=lambda tensor: (tensor.start, tensor.end))
    return found


def _name_of(index: _Index) -> str:
    name = index.fqn.decode(errors="replace")
    return f"{name}[{','.join(map(str, index.offset))}]" if any(index.offset) else name


def _by_file(raw: bytes, pause: Callable[[], None]) -> dict[bytes, list[tuple[_Index, int, int]]]:
    """Index, start and stop of each file's items."""
    found: dict[bytes, list[tuple[_Index, int, int]]] = {}
    if len(raw) > BYTES_MAX or not 2 <= int.from_bytes(raw[1:2], "little") <= 5:
        return found
    try:
        result = _run(raw, pause)
    except (IndexError, ValueError):  # pickle would reject it, too, or it is beyond the limits
        return found
    for index, item in result.storage_data if isinstance(result, _Metadata) else ():
        if item.offset >= 0 and item.length > 0:
            own = found.setdefault(item.relative_path, [])
            own.append((index, item.offset, item.offset + item.length))
    return found


def _run(raw: bytes, pause: Callable[[], None]) -> Any:
    """The pickle's value. Raises IndexError and ValueError for malformed and excessive pickles.

    An empty stack may give a wrong value instead of an error, because the callers check the value.
    """
    machine = _Machine()
    at = 2  # after the protocol
    for _ in range(_OPCODES_MAX // _SLICE):
        for _ in range(_SLICE):
            opcode = raw[at]
            if opcode == _STOP:
                return machine.stack[-1]
            if opcode not in _STEPS:
                raise ValueError(opcode)
            step, argument_bytes, length_bytes = _STEPS[opcode]
            start = at + 1 + length_bytes
            at = start + argument_bytes
            if length_bytes:
                at += int.from_bytes(raw[start - length_bytes : start], "little")
            elif opcode == _GLOBAL:
                at = raw.index(b"\n", raw.index(b"\n", start) + 1) + 1
            step(machine, raw[start:at])
        if len(machine.stack) + len(machine.memo) + len(machine.marks) > _HELD_MAX:
            raise ValueError("too many values")
        pause()
    raise ValueError("too many opcodes")


class _Machine:
    """The state of a pickle's program, and the steps of more than one expression."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: list[Any] = []
        self.marks: list[int] = []

    def replace(self, start: int, *values: object) -> None:
        """Replace the stack's values from `start` on."""
        self.stack[start:] = values

    def push_dict(self) -> None:
        """Push the instance whose state the dict is, a list for the storage data, or None."""
        below = self.stack[-1] if self.stack else None
        if type(below) not in _FIELDS:
            below = list[tuple[_Index, _Item]]() if below == b"storage_data" else None
        self.stack.append(below)

    def get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def put(self, index: int) -> None:
        """Remember the newest value. Python's pickler counts the memo's indices up."""
        if index > len(self.memo):
            raise IndexError(index)
        self.memo[index : index + 1] = self.stack[-1:]

    def join(self, start: int) -> None:
        """Replace values by a tuple if they are a size, or are the arguments of `_Size`, which
        stand for the size. Replace others by None."""
        values = self.stack[start:]
        if len(values) == 1 and type(values[0]) is tuple:
            return
        is_size = len(values) <= _DIMENSIONS_MAX and all(
            type(value) is int and 0 <= value < 1 << 63 for value in values
        )
        self.replace(start, tuple(values) if is_size else None)

    def find_global(self, names: bytes) -> None:
        self.stack += names.split(b"\n")[:2]
        self.find_class()

    def find_class(self) -> None:
        module, name = self.stack[-2:]
        is_named = type(module) is bytes and type(name) is bytes
        self.replace(-2, _CLASSES.get((module, name)) if is_named else None)

    def make_instance(self) -> None:
        made = self.stack[-2]
        self.replace(-2, made() if isinstance(made, type) else None)

    def call(self) -> None:
        self.replace(-2, self.stack[-1] if self.stack[-2] is _Size else None)

    def set_items(self, start: int) -> None:
        """Move keys and values from the stack to the value below them, if it keeps them."""
        target = self.stack[start - 1]
        if target is not None:
            _keep(target, zip(self.stack[start::2], self.stack[start + 1 :: 2], strict=False))
        self.replace(start)


def _keep(target: object, pairs: Iterable[tuple[Any, Any]]) -> None:
    if type(target) is list:
        cast("list[tuple[_Index, _Item]]", target).extend(
            (key if type(key) is _Index else _Index(), value)
            for key, value in pairs
            if type(value) is _Item
        )
    elif fields := _FIELDS.get(type(target)):
        for key, value in pairs:
            if isinstance(key, bytes) and key in fields and type(value) is fields[key]:
                setattr(target, key.decode(), value)


_unsigned = partial(int.from_bytes, byteorder="little")
_signed = partial(int.from_bytes, byteorder="little", signed=True)
_STOP, _GLOBAL = pickle.STOP[0], pickle.GLOBAL[0]
_NO_VALUE = b"".join(
    (
        *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BINFLOAT, pickle.LONG4),
        *(pickle.EMPTY_TUPLE, pickle.EMPTY_LIST, pickle.EMPTY_SET),
        *(pickle.SHORT_BINBYTES, pickle.BINBYTES, pickle.BINBYTES8, pickle.BYTEARRAY8),
    )
)
_TEXTS = pickle.SHORT_BINUNICODE + pickle.BINUNICODE + pickle.BINUNICODE8
_ROWS: tuple[tuple[bytes, Callable[[_Machine, bytes], object]], ...] = (
    (_NO_VALUE, lambda machine, _: machine.stack.append(None)),
    (_TEXTS, lambda machine, text: machine.stack.append(text)),
    (pickle.BININT1 + pickle.BININT2, lambda machine, n: machine.stack.append(_unsigned(n))),
    (pickle.BININT + pickle.LONG1, lambda machine, n: machine.stack.append(_signed(n))),
    (pickle.EMPTY_DICT, lambda machine, _: machine.push_dict()),
    (pickle.BINGET + pickle.LONG_BINGET, lambda machine, n: machine.get(_unsigned(n))),
    (pickle.BINPUT + pickle.LONG_BINPUT, lambda machine, n: machine.put(_unsigned(n))),
    (pickle.MEMOIZE, lambda machine, _: machine.put(len(machine.memo))),
    (pickle.MARK, lambda machine, _: machine.marks.append(len(machine.stack))),
    (pickle.POP + pickle.APPEND + pickle.BUILD, lambda machine, _: machine.stack.pop()),
    (
        pickle.POP_MARK + pickle.APPENDS + pickle.ADDITEMS,
        lambda machine, _: machine.replace(machine.marks.pop()),
    ),
    (pickle.FROZENSET, lambda machine, _: machine.replace(machine.marks.pop(), None)),
    (pickle.TUPLE, lambda machine, _: machine.join(machine.marks.pop())),
    (pickle.TUPLE1, lambda machine, _: machine.join(-1)),
    (pickle.TUPLE2, lambda machine, _: machine.join(-2)),
    (pickle.TUPLE3, lambda machine, _: machine.join(-3)),
    (pickle.GLOBAL, lambda machine, names: machine.find_global(names)),
    (pickle.STACK_GLOBAL, lambda machine, _: machine.find_class()),
    (pickle.NEWOBJ, lambda machine, _: machine.make_instance()),
    (pickle.NEWOBJ_EX, lambda machine, _: machine.replace(-3, None)),
    (pickle.REDUCE, lambda machine, _: machine.call()),
    (pickle.SETITEM, lambda machine, _: machine.set_items(len(machine.stack) - 2)),
    (pickle.SETITEMS, lambda machine, _: machine.set_items(machine.marks.pop())),
    (pickle.FRAME, lambda machine, _: None),
)
_ARGUMENT_BYTES = {ord(each.code): each.arg.n if each.arg else 0 for each in pickletools.opcodes}
_LENGTH_BYTES = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}
_STEPS = {
    code: (step, max(0, _ARGUMENT_BYTES[code]), _LENGTH_BYTES.get(_ARGUMENT_BYTES[code], 0))
    for codes, step in _ROWS
    for code in codes
}
"""By opcode: the step, the length of a fixed argument, and the length of another one's length."""
