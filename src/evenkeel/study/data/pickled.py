"""Reads the plain data in a pickle without running the pickle.

A pickle is a program: its opcodes may import anything and call it. Here the opcodes are only
*read*. Numbers, text, lists, tuples and dictionaries become themselves; the four names that a
pickled array of bytes needs are known by name and stand for themselves, none is imported and none
is called. Every other opcode or name is refused, with its offset. Nothing is allocated for a size
that the file only claims to have.
"""

from __future__ import annotations

import math
import pickletools
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Final

import numpy as np

from ...errors import FormatError
from .base import refuse

__all__ = ["PickledArray", "read"]

_MOST_OPCODES: Final = 1_000_000
_MOST_DIMS: Final = 4


class _Known(Enum):
    """What the names that are allowed stand for."""

    RECONSTRUCT = "makes an empty array"
    FROMBUFFER = "makes an array from bytes"
    NDARRAY = "the array type"
    DTYPE = "makes an element type"
    ENCODE = "turns text into bytes"


_NAMES: Final = {
    "numpy.core.multiarray _reconstruct": _Known.RECONSTRUCT,
    "numpy._core.multiarray _reconstruct": _Known.RECONSTRUCT,
    "numpy.core.numeric _frombuffer": _Known.FROMBUFFER,
    "numpy._core.numeric _frombuffer": _Known.FROMBUFFER,
    "numpy ndarray": _Known.NDARRAY,
    "numpy dtype": _Known.DTYPE,
    "_codecs encode": _Known.ENCODE,
}


@dataclass(eq=False)
class PickledArray:
    """An array of bytes. It has no value until the pickle has told its state."""

    value: np.ndarray | None = None


@dataclass(frozen=True)
class _Bytes:
    """The element type uint8, the only one."""


class _RefusedError(Exception):
    """Why the opcode at hand is refused."""


def read(where: Path | str, raw: bytes) -> object:
    """The value of a pickle of plain data and byte arrays.

    Args:
        where: what to call the pickle in an error.
        raw: the whole pickle. Text that Python 2 wrote comes out as bytes.

    Returns:
        None, bool, int, str, bytes, list, tuple, dict with str keys, `PickledArray`, or nests of
        them. A list may contain itself, so a reader must check what it walks.

    Raises:
        FormatError: damage, or anything else than plain data.
    """
    machine = _Machine()
    at = 0
    try:
        with warnings.catch_warnings():
            # Odd escapes in a damaged text are no news to anybody.
            warnings.simplefilter("ignore")
            for count, (opcode, argument, position) in enumerate(pickletools.genops(raw)):
                at = position or 0
                if count >= _MOST_OPCODES:
                    raise _RefusedError(f"more than {_MOST_OPCODES:,} opcodes")
                if opcode.name == "STOP":
                    return _finish(machine, where, raw, at)
                machine.step(opcode.name, argument)
    except _RefusedError as problem:
        raise refuse(where, f"{problem}; this reader takes plain data only", at) from None
    except FormatError:
        raise
    except (ValueError, OverflowError, struct.error, IndexError) as error:
        raise refuse(where, f"damaged pickle ({error}) after this opcode", at) from error
    raise refuse(where, "a pickle that does not end with STOP", len(raw))


def _finish(machine: _Machine, where: Path | str, raw: bytes, at: int) -> object:
    if at + 1 != len(raw):
        raise refuse(where, f"{len(raw) - at - 1:,} bytes follow the end of the pickle", at + 1)
    value = machine.pop()
    if machine.stack or machine.marks:
        raise _RefusedError("values are left over at the end")
    return value


@dataclass
class _Machine:
    """The stack and the memo of a pickle."""

    stack: list[object] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    memo: dict[int, object] = field(default_factory=dict)

    def step(self, name: str, argument: object) -> None:
        """Takes one opcode."""
        if name in _PUSHES:
            self.stack.append(_PUSHES[name](argument))
        elif name in _STEPS:
            _STEPS[name](self, argument)
        elif name not in _IGNORED:
            raise _RefusedError(f"opcode {name} is not allowed")

    def pop(self) -> object:
        """Takes the top of the stack, which may not lie below the last mark."""
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise _RefusedError("a value is missing on the stack")
        return self.stack.pop()

    def top(self) -> object:
        """Looks at the top of the stack."""
        value = self.pop()
        self.stack.append(value)
        return value

    def mark(self, _argument: object) -> None:
        self.marks.append(len(self.stack))

    def to_mark(self) -> list[object]:
        """Takes everything above the last mark."""
        if not self.marks:
            raise _RefusedError("a mark is missing on the stack")
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def put(self, argument: object) -> None:
        self.memo[len(self.memo) if argument is None else _integer(argument)] = self.top()

    def get(self, argument: object) -> None:
        index = _integer(argument)
        if index not in self.memo:
            raise _RefusedError(f"memo {index} was never stored")
        self.stack.append(self.memo[index])

    def tuple_of(self, count: int | None) -> None:
        values = self.to_mark() if count is None else [self.pop() for _ in range(count)][::-1]
        self.stack.append(tuple(values))

    def extend(self, values: list[object]) -> None:
        target = self.top()
        if not isinstance(target, list):
            raise _RefusedError(f"appends to a {_kind(target)}")
        target.extend(values)

    def set_items(self, values: list[object]) -> None:
        target = self.top()
        if not isinstance(target, dict) or len(values) % 2:
            raise _RefusedError(f"sets {len(values)} values in a {_kind(target)}")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if isinstance(key, bytes):
                key = key.decode("latin-1")
            if not isinstance(key, str):
                raise _RefusedError(f"a {_kind(key)} as a key")
            target[key] = value

    def name(self, argument: object) -> None:
        """Looks a name up in the list of those allowed; nothing is imported."""
        if argument is None:
            attribute, module = self.pop(), self.pop()
            if not isinstance(module, str) or not isinstance(attribute, str):
                raise _RefusedError("a name that is not text")
            argument = f"{module} {attribute}"
        if argument not in _NAMES:
            raise _RefusedError(f"the name '{str(argument).replace(' ', '.')}' is forbidden")
        self.stack.append(_NAMES[str(argument)])

    def reduce(self, _argument: object) -> None:
        """Stands in for a call of one of the names."""
        arguments, callee = self.pop(), self.pop()
        if not isinstance(arguments, tuple) or not isinstance(callee, _Known):
            raise _RefusedError(f"calls a {_kind(callee)}")
        self.stack.append(_call(callee, arguments))

    def build(self, _argument: object) -> None:
        """Gives an array or an element type its state."""
        state, target = self.pop(), self.top()
        if isinstance(target, _Bytes):
            return  # byte order and alignment say nothing about single bytes
        if not isinstance(target, PickledArray) or not isinstance(state, tuple) or len(state) != 5:
            raise _RefusedError(f"sets the state of a {_kind(target)}")
        _version, shape, element, fortran, values = state
        target.value = _array(values, element, shape, "F" if fortran is True else "C")


def _call(callee: _Known, arguments: tuple[object, ...]) -> object:
    match callee, arguments:
        case _Known.RECONSTRUCT, (_Known.NDARRAY, _, _):
            return PickledArray()
        case _Known.FROMBUFFER, (values, element, shape, "C" | "F" as order):
            return PickledArray(_array(values, element, shape, str(order)))
        case _Known.DTYPE, ("u1" | b"u1" | "|u1" | "uint8", *_):
            return _Bytes()
        case _Known.DTYPE, (str() | bytes() as found, *_):
            text = found if isinstance(found, str) else found.decode("latin-1")
            raise _RefusedError(f"elements of type '{text[:20]}', wanted unsigned bytes")
        case _Known.ENCODE, (str() as text, "latin1" | "latin-1"):
            return text.encode("latin-1")
    raise _RefusedError(f"a call that {callee.value} has unexpected arguments")


def _array(values: object, element: object, shape: object, order: str) -> np.ndarray:
    """An array over bytes that are there, of a shape that fits them."""
    if not isinstance(values, bytes) or not isinstance(element, _Bytes):
        raise _RefusedError(f"an array of {_kind(element)} over a {_kind(values)}, wanted bytes")
    if not isinstance(shape, tuple) or len(shape) > _MOST_DIMS:
        raise _RefusedError(f"an array whose shape is no tuple of at most {_MOST_DIMS} sizes")
    sizes = [_integer(size) for size in shape]
    if min(sizes, default=0) < 0 or math.prod(sizes) != len(values):
        text = " x ".join(str(size) for size in sizes)
        raise _RefusedError(f"an array of {text} over {len(values):,} bytes")
    array = np.frombuffer(values, np.uint8)
    return array.reshape(sizes, order="F" if order == "F" else "C")


def _integer(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _RefusedError(f"a {_kind(value)} where a whole number belongs")
    return value


def _text_bytes(value: object) -> bytes:
    # pickletools shows the byte strings of Python 2 as latin-1 text.
    return str(value).encode("latin-1")


def _kind(value: object) -> str:
    """The type of a value: never the value, which may be endless."""
    return type(value).__name__.lstrip("_")


_IGNORED: Final = {"PROTO", "FRAME"}

_PUSHES: Final[dict[str, Callable[[object], object]]] = {
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    "EMPTY_LIST": lambda _: [],
    "EMPTY_DICT": lambda _: {},
    "EMPTY_TUPLE": lambda _: (),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1"), _integer),
    **dict.fromkeys(("BINSTRING", "SHORT_BINSTRING"), _text_bytes),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"), str),
    "BINBYTES": lambda value: value,
    "SHORT_BINBYTES": lambda value: value,
    "BINBYTES8": lambda value: value,
    "BYTEARRAY8": lambda value: bytes(value) if isinstance(value, bytearray) else value,
}

_STEPS: Final[dict[str, Callable[[_Machine, object], None]]] = {
    "MARK": _Machine.mark,
    **dict.fromkeys(("BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine.put),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _Machine.get),
    "TUPLE": lambda machine, _: machine.tuple_of(None),
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "APPEND": lambda machine, _: machine.extend([machine.pop()]),
    "APPENDS": lambda machine, _: machine.extend(machine.to_mark()),
    "SETITEM": lambda machine, _: machine.set_items([machine.pop(), machine.pop()][::-1]),
    "SETITEMS": lambda machine, _: machine.set_items(machine.to_mark()),
    "GLOBAL": _Machine.name,
    "STACK_GLOBAL": _Machine.name,
    "REDUCE": _Machine.reduce,
    "BUILD": _Machine.build,
}
