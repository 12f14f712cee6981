"""What a pickle may call and how much that may make: plain values only, in proportion to its size.

What its opcodes may do by themselves is checked before, by `opcodes.scan`. Needs no torch, so that a file can
be described without it.
"""

from __future__ import annotations

import collections
import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from holdfast.checkpoint.opcodes import MOST_PARTS
from holdfast.checkpoint.opcodes import PickleError as PickleError
from holdfast.checkpoint.opcodes import scan as scan

_MOST_NAME = 200


class UnsafeGlobal(Exception):
    """The pickle names something that is not on the list; ``name`` is what it names, fit to be printed."""

    def __init__(self, name: str) -> None:
        self.name = printable(name)
        super().__init__(self.name)


def printable(text: str, most: int = _MOST_NAME) -> str:
    """Text from a file as a message may show it: not too long, and nothing that a terminal obeys."""
    cut = text if len(text) <= most else f"{text[:most]}..."
    return cut if cut.isprintable() else ascii(cut)[1:-1]


class _Allowance(threading.local):
    left: int | None = None


_allowance = _Allowance()


@contextlib.contextmanager
def allowance(size_bytes: int) -> Iterator[None]:
    """Let what a pickle calls copy so many bytes in all: a few bytes can name a large value again.

    Args:
        size_bytes: about 16 times the pickle's length; what a pickler wrote copies each of its bytes once.
    """
    before, _allowance.left = _allowance.left, size_bytes
    try:
        yield
    finally:
        _allowance.left = before


def charge(size_bytes: int) -> None:
    """Account for bytes that are about to be copied; a negative number allows for more.

    Raises:
        PickleError: that is more than the allowance.
    """
    if _allowance.left is not None:
        _allowance.left -= size_bytes
        if _allowance.left < 0:
            raise PickleError("it makes copies out of all proportion to its size")


class Call:
    """A function that a pickle may call, and do nothing else with.

    A plain function would not do: the BUILD opcode can set its defaults.
    """

    __slots__ = ("_function",)
    _function: Callable[..., Any]

    def __init__(self, function: Callable[..., Any]) -> None:
        object.__setattr__(self, "_function", function)

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setattr__(self, name: str, value: Any) -> None:
        raise PickleError("it changes one of the reader's own functions")

    def __setstate__(self, state: Any) -> None:
        raise PickleError("it changes one of the reader's own functions")


def check_keys(values: Iterable[Any]) -> None:
    """Refuse values that would take very long to hash, or overflow the stack: tuples in tuples in tuples.

    Raises:
        PickleError: if one of them has more than `MOST_PARTS` parts.
    """
    for value in values:
        if type(value) is not tuple and not isinstance(value, (tuple, slice)):
            continue
        pending, parts = [value], 0
        while pending:
            at = pending.pop()
            parts += 1
            if isinstance(at, tuple):
                if parts + len(pending) + len(at) > MOST_PARTS:
                    raise PickleError(f"a key has more than {MOST_PARTS} parts")
                pending += at
            elif isinstance(at, slice):
                pending += (at.start, at.stop, at.step)


def _encoded_bytes(text: Any, encoding: Any = "latin1") -> bytes:
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise PickleError("it has bytes in an encoding that no checkpoint has")
    charge(len(text))
    return text.encode("latin-1")


def _bytearray(*args: Any) -> bytearray:
    if len(args) == 2:  # as protocol 2 has it
        return bytearray(_encoded_bytes(*args))
    return bytearray(*given(args))


def _complex(*args: Any) -> complex:
    if not {type(arg) for arg in args} <= {int, float}:
        raise PickleError("a complex number is not made of numbers")
    return complex(*args)


def given(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments that are values with a size of their own: ``bytearray(1 << 40)`` would be a bomb."""
    if len(args) > 1 or not all(type(arg) in (list, tuple, dict, bytes) for arg in args):
        raise PickleError("a collection is made of something that is not one")
    for arg in args:
        charge(8 * len(arg))
    return args


def _members(args: tuple[Any, ...]) -> tuple[Any, ...]:
    for arg in given(args):
        check_keys(arg)
    return args


def _pairs(args: tuple[Any, ...]) -> tuple[Any, ...]:
    for arg in given(args):
        if type(arg) is not dict:
            if not all(type(pair) in (list, tuple) and len(pair) == 2 for pair in arg):
                raise PickleError("a mapping is made of something that is not pairs")
            check_keys(pair[0] for pair in arg)
    return args


def _counter(*args: Any) -> Any:
    if not all(type(arg) is dict for arg in args):
        raise PickleError("a Counter is made of something that is not a dict")
    return collections.Counter(*given(args))


def _plain() -> dict[tuple[str, str], Any]:
    table: dict[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): Call(lambda *args: collections.OrderedDict(*_pairs(args))),
        ("collections", "Counter"): Call(_counter),
        ("_codecs", "encode"): Call(_encoded_bytes),
    }
    by_name: dict[str, Callable[..., Any]] = {
        "set": lambda *args: set(*_members(args)),
        "frozenset": lambda *args: frozenset(*_members(args)),
        "bytearray": _bytearray,
        "bytes": lambda *args: bytes(*given(args)),
        "complex": _complex,
    }
    for name, builtin in by_name.items():
        table["builtins", name] = table["__builtin__", name] = Call(builtin)
    return table


PLAIN = _plain()
"""What makes plain values in a pickle, by the names that it has there."""
