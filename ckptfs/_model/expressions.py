"""The expressions of ``ckptfs find``: conditions on the metadata of a checkpoint.

They look like Python, and Python's parser reads them. This module defines their meaning: Python
evaluates nothing, and the module rejects everything that is not on this list:

- A name is a key of the metadata: ``step``. Dots and brackets go into objects and lists:
  ``optim.lr``, ``losses[0]``, ``losses[-1]``. ``meta`` is the metadata as a whole, for keys that
  are no names: ``meta["eval/loss"]``.
- Numbers, strings, lists; ``true``, ``false`` and ``null``, also as ``True``, ``False``, ``None``.
- ``==``, ``!=``, ``<``, ``<=``, ``>`` and ``>=``, also chained: ``0.1 < loss <= 0.3``. Any two
  values can be equal; numbers have an order, and strings have one.
- ``in`` and ``not in``: an element of a list, a part of a string, a key of an object.
- ``and``, ``or``, ``not`` and parentheses. As in Python, 0, "", [], {} and null are false.
- ``+``, ``-``, ``*``, ``/`` and ``%`` on numbers.
- ``exists(optim.lr)``, and ``matches(name, "run-*")`` with a glob (``fnmatch.fnmatchcase``).

**Unknown.** A missing key has an unknown value, and so has each calculation with one. The order of
types without an order (``"a" < 3``), a calculation with other values than numbers, a division by
zero, and an integer of more than `BITS_MAX` bits are unknown, too. The logic is Kleene's, as in
SQL: ``not`` unknown is unknown, ``and`` is false if one side is false, ``or`` is true if one side
is true. The expression finds a checkpoint if it is true: neither ``loss < 3`` nor ``not loss < 3``
finds one without ``loss``. null is a value like others: ``loss == null``.

**NaN** is legal (Python's ``json`` writes it) and known. As everywhere it is unequal to all, and no
comparison with it is true but ``!=``. So ``not loss < 3`` finds a loss that is NaN.
"""

import ast
import fnmatch
import operator
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, NoReturn, TypeAlias, cast

from ckptfs._model.manifest import printable
from ckptfs.errors import ExpressionError

CHARACTERS_MAX = 2000
"""Longest expression. It limits the stack of Python's parser, which grows with each level of
nesting."""
DEPTH_MAX = 100
"""Deepest nesting, and most terms of one sum, because both are recursion here."""
BITS_MAX = 1024
"""Most bits of a calculated integer, because products could grow for ever. Floats end there too."""
_SHOWN_CHARACTERS_MAX = 40
_HINT = 'write a key that is not a name, or is a word of Python, as meta["lambda"]'
_STRING = re.compile(r""" "(?:\\.|[^"\\])*" | '(?:\\.|[^'\\])*' """, re.VERBOSE)
_AND, _OR, _NOT = "write 'and'", "write 'or'", "write 'not'"
_MISTAKES = (
    (re.compile("[\u2018\u2019\u201c\u201d\u201e]"), 'write plain quotes, like "text"'),
    (re.compile(r"&&?"), _AND),
    (re.compile(r"\|\|?"), _OR),
    (re.compile(r"=~|~="), 'write matches(key, "glob*")'),
    (re.compile(r"==="), "write '=='"),
    (re.compile(r"=>"), "write '>='"),
    (re.compile(r"=<"), "write '<='"),
    (re.compile(r"<>"), "write '!='"),
    (re.compile(r"!(?!=)"), _NOT),
    (re.compile(r"(?<![=!<>])=(?!=)"), "write '==' to compare"),
    (re.compile(r"\b(?:AND|OR|NOT|IN)\b"), "write it in small letters"),
)
"""Spellings of other languages, outside of strings, and how to write them here."""
_LINE_ENDS = dict.fromkeys(map(ord, "\n\r\f"), " ")
"""The parser reads an expression of several lines as one."""


UNKNOWN: Final = object()
"""The value of a missing key, and of a calculation without a result."""

_Part: TypeAlias = Callable[[Mapping[str, Any]], Any]
"""A compiled part of an expression: from the metadata to a value."""

_CONSTANTS = {"true": True, "false": False, "null": None}
_WHOLE = "meta"
_ORDERS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_COMPARISONS = (ast.Eq, ast.NotEq, ast.In, ast.NotIn, *_ORDERS)
_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: lambda left, right: left / right,  # truediv has no types
    ast.Mod: operator.mod,
}


class Expression:
    """A compiled expression. Any text and any metadata are safe.

    Attributes:
        keys: The top-level keys of the metadata that the expression uses.
        texts: The keys on the right side of == and !=. One that no metadata has may be text whose
            quotes are missing.
    """

    def __init__(self, text: str) -> None:
        """Compile. Raises ExpressionError, which says at which character `text` is wrong."""
        compiler = _Compiler(text.translate(_LINE_ENDS).strip())
        self._part = compiler.compiled
        self.keys = frozenset(compiler.keys)
        self.texts = frozenset(compiler.texts)

    def value(self, metadata: Mapping[str, Any]) -> Any:
        """The value as in JSON, or UNKNOWN."""
        return self._part(metadata)

    def holds(self, metadata: Mapping[str, Any]) -> bool:
        """Whether the value is true: neither false nor unknown."""
        value = self._part(metadata)
        return value is not UNKNOWN and bool(value)


class _Compiler:
    """Compiles the text to functions, from Python's syntax tree."""

    def __init__(self, text: str) -> None:
        self._text = text
        self.keys: set[str] = set()
        self.texts: set[str] = set()
        self.compiled = self._compile(self._parse(), 0)

    def _parse(self) -> ast.expr:
        if not self._text:
            raise ExpressionError("the expression is empty; write e.g. 'step > 1000'")
        if len(self._text) > CHARACTERS_MAX:
            raise ExpressionError(
                f"the expression has {len(self._text)} characters; at most {CHARACTERS_MAX} are "
                "allowed"
            )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # an escape like "\d" is an error in the text
                return ast.parse(self._text, mode="eval").body
        except SyntaxError as error:
            # 0 where the text ends too early
            at = min(error.offset - 1 if error.offset else len(self._text), len(self._text))
            self._refuse_mistake()
            self._refuse(at, self._text[at:], f"{error.msg}; {_HINT}")
        except (ValueError, MemoryError, RecursionError) as error:
            # A NUL, half of a surrogate pair; too much nesting for the parser's stack.
            self._refuse(0, self._text, str(error) or "it is nested too deeply")

    def _refuse_mistake(self) -> None:
        """Raise ExpressionError for the first spelling of another language."""
        code = _STRING.sub(lambda found: " " * len(found[0]), self._text)
        hits = [(hit, hint) for pattern, hint in _MISTAKES if (hit := pattern.search(code))]
        if hits:
            hit, hint = min(hits, key=lambda each: each[0].start())
            self._refuse(hit.start(), hit[0], hint)

    def _refuse(self, at: int, where: str, why: str) -> NoReturn:
        if len(where) > _SHOWN_CHARACTERS_MAX:
            where = where[:_SHOWN_CHARACTERS_MAX] + "…"
        place = f"at `{printable(where)}`" if where else "at its end"
        raise ExpressionError(f"the expression is wrong {place} (character {at + 1}): {why}")

    def _refuse_node(self, node: ast.expr, why: str) -> NoReturn:
        raw = self._text.encode()  # the tree counts bytes
        at = len(raw[: node.col_offset].decode())
        where = raw[node.col_offset : node.end_col_offset].decode()
        self._refuse(at, where, why)

    def _compile(self, node: ast.expr, depth: int) -> _Part:
        if depth > DEPTH_MAX:
            self._refuse_node(node, f"it is nested deeper than {DEPTH_MAX} levels")
        depth += 1
        match node:
            case ast.Constant(value=value) if isinstance(value, str | int | float | None):
                return lambda _: value
            case ast.Name(id=name) if name in _CONSTANTS:
                return lambda _: _CONSTANTS[name]
            case ast.Name() | ast.Attribute() | ast.Subscript():
                return self._lookup(node, depth)
            case ast.List(elts=elements):
                items = [self._compile(element, depth) for element in elements]
                return lambda metadata: _list([item(metadata) for item in items])
            case ast.UnaryOp(op=op, operand=operand):
                return self._unary(node, op, self._compile(operand, depth))
            case ast.BoolOp(op=op, values=values):
                parts = [self._compile(value, depth) for value in values]
                which = _all if isinstance(op, ast.And) else _any
                return lambda metadata: which(part(metadata) for part in parts)
            case ast.Compare(left=left, ops=ops, comparators=others):
                return self._comparison(node, ops, [left, *others], depth)
            case ast.BinOp(left=left, op=op, right=right):
                return self._calculation(node, left, op, right, depth)
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
                return self._call(node, name, arguments, depth)
            case ast.Tuple():
                self._refuse_node(node, "a list is written with brackets: [1, 2]")
            case _:
                self._refuse_node(node, "this is not part of the language; see ckptfs help find")

    def _lookup(self, node: ast.expr, depth: int) -> _Part:
        match node:
            case ast.Name(id=name) if name == _WHOLE:
                return lambda metadata: metadata
            case ast.Name(id=name) if name not in _CONSTANTS:
                self.keys.add(name)
                return lambda metadata: metadata.get(name, UNKNOWN)
            case ast.Attribute(value=base, attr=key):
                return self._item(base, key, depth)
            case ast.Subscript(value=base, slice=ast.Constant(value=str() | int() as key)):
                return self._item(base, key, depth)
            case ast.Subscript(
                value=base, slice=ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int(index)))
            ):
                return self._item(base, -index, depth)
            case ast.Subscript():
                self._refuse_node(node, "write a number or a string in quotes in the brackets")
            case _:
                self._refuse_node(node, "this is no key of the metadata")

    def _item(self, base: ast.expr, key: str | int, depth: int) -> _Part:
        if depth > DEPTH_MAX:
            self._refuse_node(base, f"it is nested deeper than {DEPTH_MAX} levels")
        if isinstance(base, ast.Name) and base.id == _WHOLE and isinstance(key, str):
            self.keys.add(key)
        container = self._lookup(base, depth + 1)
        return lambda metadata: _item(container(metadata), key)

    def _unary(self, node: ast.expr, op: ast.unaryop, operand: _Part) -> _Part:
        match op:
            case ast.Not():
                return lambda metadata: _not(operand(metadata))
            case ast.USub():
                return lambda metadata: _calculate(operator.sub, 0, operand(metadata))
            case ast.UAdd():
                return lambda metadata: _calculate(operator.add, 0, operand(metadata))
            case _:
                self._refuse_node(node, f"the operators on numbers are + - * / %; {_NOT} for ~")

    def _comparison(
        self, node: ast.expr, ops: list[ast.cmpop], operands: list[ast.expr], depth: int
    ) -> _Part:
        for op in ops:
            if not isinstance(op, _COMPARISONS):
                self._refuse_node(node, "compare with == and != instead of is and is not")
        kinds = [type(op) for op in ops]
        for kind, operand in zip(kinds, operands[1:], strict=True):
            if kind in (ast.Eq, ast.NotEq) and isinstance(operand, ast.Name):
                self.texts.add(operand.id)
        parts = [self._compile(operand, depth) for operand in operands]

        def compare(metadata: Mapping[str, Any]) -> Any:
            values = [part(metadata) for part in parts]
            return _all(map(_compare, kinds, values, values[1:]))

        return compare

    def _calculation(
        self, node: ast.expr, left: ast.expr, op: ast.operator, right: ast.expr, depth: int
    ) -> _Part:
        calculation = _OPERATORS.get(type(op))
        if calculation is None:
            if isinstance(op, ast.BitAnd | ast.BitOr):
                self._refuse_mistake()
            self._refuse_node(node, "the operators on numbers are + - * / %")
        for operand in (left, right):
            if isinstance(operand, ast.List) or (
                isinstance(operand, ast.Constant) and isinstance(operand.value, str)
            ):
                self._refuse_node(operand, "arithmetic needs numbers")
        first, second = self._compile(left, depth), self._compile(right, depth)
        return lambda metadata: _calculate(calculation, first(metadata), second(metadata))

    def _call(self, node: ast.expr, name: str, arguments: list[ast.expr], depth: int) -> _Part:
        match name, arguments:
            case "exists", [key]:
                value = self._lookup(key, depth)
                return lambda metadata: value(metadata) is not UNKNOWN
            case "matches", [text, ast.Constant(value=str(glob))]:
                value = self._compile(text, depth)
                return lambda metadata: _matches(value(metadata), glob)
            case _:
                self._refuse_node(node, 'the functions are exists(key) and matches(key, "glob*")')


# -- the meaning


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _item(container: Any, key: str | int) -> Any:
    if isinstance(container, Mapping) and isinstance(key, str):
        return cast("Mapping[str, Any]", container).get(key, UNKNOWN)
    if isinstance(container, list) and isinstance(key, int):
        items = cast("list[Any]", container)
        return items[key] if -len(items) <= key < len(items) else UNKNOWN
    return UNKNOWN


def _list(items: list[Any]) -> Any:
    return UNKNOWN if any(item is UNKNOWN for item in items) else items


def _not(value: Any) -> Any:
    return UNKNOWN if value is UNKNOWN else not value


def _all(values: Iterable[Any]) -> Any:
    result: Any = True
    for value in values:
        if value is UNKNOWN:
            result = UNKNOWN
        elif not value:
            return False
    return result


def _any(values: Iterable[Any]) -> Any:
    return _not(_all(map(_not, values)))


def _compare(kind: type[ast.cmpop], left: Any, right: Any) -> Any:
    if left is UNKNOWN or right is UNKNOWN:
        return UNKNOWN
    if kind is ast.Eq:
        return left == right
    if kind is ast.NotEq:
        return left != right
    if kind is ast.In:
        return _is_in(left, right)
    if kind is ast.NotIn:
        return _not(_is_in(left, right))
    if (_is_number(left) and _is_number(right)) or (
        isinstance(left, str) and isinstance(right, str)
    ):
        return _ORDERS[kind](left, right)
    return UNKNOWN


def _is_in(item: Any, container: Any) -> Any:
    if isinstance(container, list):
        # Not Python's `in`, which finds a NaN that is the same object.
        return any(item == element for element in cast("list[Any]", container))
    if isinstance(container, str | Mapping) and isinstance(item, str):
        return item in container
    return UNKNOWN


def _calculate(operation: Callable[[Any, Any], Any], left: Any, right: Any) -> Any:
    if not (_is_number(left) and _is_number(right)):
        return UNKNOWN
    try:
        value = operation(left, right)
    except (ZeroDivisionError, OverflowError):
        return UNKNOWN
    return UNKNOWN if isinstance(value, int) and value.bit_length() > BITS_MAX else value


def _matches(text: Any, glob: str) -> Any:
    return fnmatch.fnmatchcase(text, glob) if isinstance(text, str) else UNKNOWN
