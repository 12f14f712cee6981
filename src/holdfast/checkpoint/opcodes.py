"""What a pickle may do, told from its opcodes before any of them is carried out. Needs no torch.

The C unpickler trusts a pickle. One of a few bytes can ask it for terabytes, hash a key for longer than the
world will last or until the stack overflows, double a list with each opcode, or set the state of a tensor.
`scan` follows the program without making anything: it knows of each object on the stack only what it weighs
as a key and what may be put into it.
"""

from __future__ import annotations

import collections
import re
import struct
from collections.abc import Callable, Iterable
from typing import Any

ITEMS, VALUES, MEMBERS, STATE, PLAIN_STATE = 1, 2, 4, 8, 16
"""What may be done to an object after it was made: set items, append, add, set its state; ``PLAIN_STATE``:
only attributes that hide none of an OrderedDict's own."""
ANYTHING = ITEMS | VALUES | MEMBERS | STATE

_KINDS: dict[tuple[bytes, bytes], int] = {
    (b"collections", b"OrderedDict"): ITEMS | PLAIN_STATE,
    (b"collections", b"Counter"): ITEMS,
    (b"collections", b"defaultdict"): ITEMS,
    (b"collections", b"deque"): VALUES,
    (b"_codecs", b"encode"): 0,
    (b"torch", b"Size"): 0,
    (b"torch", b"device"): 0,
    (b"torch.serialization", b"_get_layout"): 0,
    (b"numpy.core.multiarray", b"scalar"): 0,
    (b"numpy._core.multiarray", b"scalar"): 0,
}
for _module in (b"builtins", b"__builtin__"):
    _KINDS |= {(_module, b"set"): MEMBERS, (_module, b"list"): VALUES, (_module, b"dict"): ITEMS}
    for _name in b"bytearray bytes complex frozenset slice tuple int float str bool".split():
        _KINDS[_module, _name] = 0
_MODULES_OF_VALUES = {b"torch._utils", b"torch._tensor", b"datetime", b"pathlib", b"pathlib._local"}

MOST_PARTS = 10_000
"""How many parts a key may have, each counted as often as hashing it would come upon it."""
_CALLED = 64  # what the result of a call counts as in a key
_TEXT_BYTES = 200

_COUNTED: dict[int, tuple[str, int]] = {
    ord("X"): ("<I", 4), ord("B"): ("<I", 4), ord("T"): ("<i", 4), ord("U"): ("<B", 1), ord("C"): ("<B", 1),
    0x8A: ("<B", 1), 0x8B: ("<i", 4), 0x8C: ("<B", 1), 0x8D: ("<Q", 8), 0x8E: ("<Q", 8), 0x96: ("<Q", 8),
}  # fmt: skip
_NUMBERS = {ord("K"): 2, ord("M"): 3, ord("J"): 5, ord("G"): 9, ord("N"): 1, 0x88: 1, 0x89: 1}
_LINE_BYTES = 5000  # of a number or a short text; reading digits takes time that grows as their square

_GET, _INT = rb"(?:h.|j.{4})", rb"(?:K.|M..|J.{4})"
_PUT = rb"(?:q.|r..[\x00-\x3f]\x00)"  # bounded: the unpickler makes room up to the slot that it is told
_SIZE = rb"(?:\)|(?:%(i)s\x85|%(i)s%(i)s\x86|%(i)s%(i)s%(i)s\x87|\(%(i)s{4,8}t)"
_SIZE = _SIZE % {b"i": _INT} + _PUT + b")"
_KEY = b"X(?:%s)" % b"|".join(rb"\x%02x\0\0\0.{%d}" % (length, length) for length in range(1, 17))
_TENSOR = re.compile(
    _GET + rb"\(\(" + _GET + _GET + _KEY + _PUT + _GET + _INT + b"t" + _PUT + b"Q" + _INT + _SIZE + _SIZE
    + rb"[\x88\x89]" + _GET + rb"\)R" + _PUT + _GET + b"?t" + _PUT + b"R" + _PUT,
    re.DOTALL,
)  # fmt: skip
"""All that stands for one tensor, as every pickler writes it: one step of the scan instead of thirty."""
_RUN = re.compile(rb"(?:K.){2,999}|(?:M..){2,999}|(?:J.{4}){2,999}|(?:G.{8}){2,999}", re.DOTALL)


class PickleError(Exception):
    """The pickle is malformed, or asks for more than it could need."""


class _Again(Exception):
    """What was passed over as a tensor matters after all: follow the pickle step by step."""


class _Word(int):
    """Text that would hide one of an OrderedDict's methods, or that was not looked at."""


_WORD = _Word(1)


class _Name:
    """A global on the stack: ``kind`` says what may be done to what it gives."""

    __slots__ = ("kind",)

    def __init__(self, kind: int) -> None:
        self.kind = kind


class _Thing:
    """An object that may be changed. What cannot be is a number: what it counts as in a key."""

    __slots__ = ("fetched", "hides", "kind")

    def __init__(self, kind: int) -> None:
        self.kind = kind
        self.fetched = False  # it came out of the memo
        self.hides = False  # it has a key that as an attribute would hide a method


_HIDING = frozenset(name.encode() for name in dir(collections.OrderedDict))
_LONGEST_HIDING = max(map(len, _HIDING))


def scan(data: bytes) -> int:
    """Check that a pickle is well formed and can do no harm; return where it ends.

    Every counted length lies inside the data and memo slots are bounded by its size. A key has at most
    `MOST_PARTS` parts, and all of them together cost no more to hash than the pickle's length warrants. Only
    containers are put into, and only instances get a state. Extension codes, out-of-band buffers, text
    persistent ids and DUP, which no pickler writes into a checkpoint, are refused.

    What it cannot tell is whether a name may be called: the unpickler's ``find_class`` decides that. A name
    that is not in the table here counts as an inert class of `foreign_types`, to which anything may be done.

    Raises:
        PickleError: says what is wrong.
    """
    try:
        try:
            return _Scan(data, quick=True).run()
        except _Again:
            return _Scan(data, quick=False).run()
    except (IndexError, struct.error):
        raise PickleError("it ends in the middle, or uses more than it made") from None


class _Scan:
    def __init__(self, data: bytes, *, quick: bool) -> None:
        self.data = data
        self.quick = quick
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.slots = max(1 << 16, len(data))
        self.left = 16 * len(data) + (1 << 16)
        self.passed_over = False

    def run(self) -> int:
        """Follow the pickle to its end."""
        data, end, stack, memo, slots = self.data, len(self.data), self.stack, self.memo, self.slots
        push, fetch, number = stack.append, memo.get, int.from_bytes
        quick, tensor, again = self.quick, _TENSOR.match, _RUN.match
        at = 0
        while at < end:
            code = data[at]
            if code == 0x71:  # q: BINPUT
                memo[data[at + 1]] = stack[-1]
                at += 2
            elif code == 0x72:  # r: LONG_BINPUT
                slot = number(data[at + 1 : at + 5], "little")
                if slot > slots:
                    raise self.no_slot(slot)
                memo[slot] = stack[-1]
                at += 5
            elif code == 0x68 or code == 0x6A:  # h, j: BINGET, LONG_BINGET
                after = at + 2 if code == 0x68 else at + 5
                if quick and data[after] == 0x28 and (made := tensor(data, at)) is not None:
                    self.passed_over = True
                    push(1)
                    at = made.end()
                    continue
                slot = number(data[at + 1 : after], "little")
                item = fetch(slot)
                if item is None or type(item) is _Thing:
                    self.get(slot)
                else:
                    push(item)
                at = after
            elif code == 0x58 and quick:  # X: BINUNICODE
                begin = at + 5
                length = number(data[at + 1 : begin], "little")
                at = begin + length
                if at > end:
                    raise PickleError(f"byte {at} lies beyond its end")
                push(_WORD if length <= _LONGEST_HIDING and data[begin:at] in _HIDING else 1)
            elif code in _NUMBERS:
                run = again(data, at)
                if run is None:
                    push(1)
                    at += _NUMBERS[code]
                else:
                    stack += [1] * ((run.end() - at) // _NUMBERS[code])
                    at = run.end()
            elif code == 0x2E:  # STOP
                stack[-1]
                return at + 1
            else:
                at = self.other(code, at)
        raise PickleError("it ends in the middle")

    def other(self, code: int, at: int) -> int:
        """One opcode that is not among the most common ones; returns where the next begins."""
        action: Callable[[_Scan], object] | None = _ACTIONS.get(code)
        if action is not None:
            action(self)
            return at + 1
        if code in _COUNTED:
            return self.counted(code, at)
        line: Callable[[_Scan, int, int], int] | None = _LINES.get(code)
        if line is not None:
            found = self.data.find(b"\n", at)
            if found < 0:
                raise PickleError("it ends in the middle")
            return line(self, at + 1, found)
        if code == 0x80:  # PROTO
            return at + 2
        if code == 0x95:  # a frame: a hint only, but the unpickler reads that much at once
            length = int.from_bytes(self.data[at + 1 : at + 9], "little")
            if at + 9 + length > len(self.data):
                raise PickleError(f"a frame of {length} bytes lies beyond its end")
            return at + 9
        raise PickleError(f"opcode {code:#04x} at byte {at} has no place in a checkpoint")

    # -- values ----------------------------------------------------------------------------------------------

    def counted(self, code: int, at: int) -> int:
        form, width = _COUNTED[code]
        length: int = struct.unpack_from(form, self.data, at + 1)[0]
        begin = at + 1 + width
        if length < 0 or begin + length > len(self.data):
            raise PickleError(f"byte {begin + length} lies beyond its end")
        item: Any = 1
        if code in (0x8A, 0x8B):
            item += 8 * length  # so that a key has no more digits than Python prints
        elif length <= _LONGEST_HIDING and self.data[begin : begin + length] in _HIDING:
            item = _WORD if self.quick else self.data[begin : begin + length]
        elif not self.quick and length <= _TEXT_BYTES:
            item = self.data[begin : begin + length]
        self.stack.append(item)
        return begin + length

    def get(self, slot: int) -> None:
        item = self.memo.get(slot)
        if item is None:
            if self.passed_over:
                raise _Again
            raise PickleError(f"memo slot {slot} is empty")
        if type(item) is _Thing:
            item.fetched = True
        self.stack.append(item)

    def put(self, slot: int) -> None:
        if slot > self.slots:
            raise self.no_slot(slot)
        self.memo[slot] = self.stack[-1]

    def no_slot(self, slot: object) -> PickleError:
        return PickleError(f"memo slot {slot} is out of proportion to {len(self.data)} bytes")

    def memoize(self) -> None:
        if self.passed_over:
            raise _Again  # whose slots are counted too
        self.put(len(self.memo))

    def mark(self) -> None:
        self.marks.append(len(self.stack))

    def to_mark(self) -> list[Any]:
        at = self.marks.pop()
        items = self.stack[at:]
        del self.stack[at:]
        return items

    def drop(self) -> None:
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.stack.pop()

    def tuple_of(self, items: list[Any]) -> None:
        self.stack.append(1 + sum(map(_weight, items)))

    def last(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    # -- changes ---------------------------------------------------------------------------------------------

    def hashed(self, keys: Iterable[Any]) -> None:
        """Account for keys."""
        for key in keys:
            weight = _weight(key)
            if weight > MOST_PARTS:
                raise PickleError(f"a key has more than {MOST_PARTS} parts")
            self.left -= weight
        if self.left < 0:
            raise PickleError("its keys are out of proportion to its size")

    def target(self, kind: int) -> _Thing:
        """The object on top of the stack, into which something goes."""
        thing = self.stack[-1]
        if type(thing) is not _Thing or not thing.kind & kind:
            raise PickleError("it changes something that is not a container")
        if thing.fetched and self.passed_over:
            raise _Again  # a tensor that was passed over may have taken its slot since
        return thing

    def set_items(self, items: list[Any]) -> None:
        if items:
            thing = self.target(ITEMS)
            for key in items[::2]:
                if type(key) is int and key == 1:
                    self.left -= 1
                else:
                    self.hashed((key,))
                    thing.hides = thing.hides or _hides(key)

    def add(self, items: list[Any]) -> None:
        if items:
            self.target(MEMBERS)
            self.hashed(items)

    def build(self) -> None:
        state = self.stack.pop()
        thing = self.target(STATE | PLAIN_STATE)
        if not thing.kind & STATE and (
            type(state) is not _Thing or not state.kind & ITEMS or state.hides or state.kind & STATE
        ):
            raise PickleError("it gives an OrderedDict attributes that none has")

    # -- calls -----------------------------------------------------------------------------------------------

    def name(self, module: bytes, name: bytes) -> None:
        kind = _KINDS.get((module, name))
        if kind is None:
            kind = 0 if module in _MODULES_OF_VALUES else ANYTHING
        self.stack.append(_Name(kind))

    def stack_name(self) -> None:
        if self.quick:
            raise _Again  # which keeps the text
        module, name = self.last(2)
        if type(module) is not bytes or type(name) is not bytes:
            raise PickleError("it names something by what is not a name")
        self.name(module, name)

    def call(self, called: Any) -> None:
        kind = getattr(called, "kind", 0)
        if type(called) is _Thing and kind != ANYTHING:
            kind = 0
        self.stack.append(_Thing(kind) if kind else _CALLED)

    def call_marked(self) -> None:
        self.call(self.to_mark()[0])

    # -- lines of text ---------------------------------------------------------------------------------------

    def number_line(self, begin: int, end: int) -> int:
        if end - begin > _LINE_BYTES:
            raise PickleError(f"a number of {end - begin} digits has no place in a checkpoint")
        self.stack.append(1 + 3 * (end - begin))
        return end + 1

    def text_line(self, begin: int, end: int) -> int:
        self.stack.append(_WORD)  # with escapes it could be any text
        return end + 1

    def put_line(self, begin: int, end: int) -> int:
        self.put(self.slot(begin, end))
        return end + 1

    def get_line(self, begin: int, end: int) -> int:
        self.get(self.slot(begin, end))
        return end + 1

    def slot(self, begin: int, end: int) -> int:
        text = self.data[begin:end]
        if not text.isdigit() or len(text) > 10:
            raise self.no_slot(repr(text[:20]))
        return int(text)

    def name_lines(self, begin: int, end: int) -> int:
        second = self.data.find(b"\n", end + 1)
        if second < 0:
            raise PickleError("it ends in the middle")
        self.name(self.data[begin:end], self.data[end + 1 : second])
        return second + 1

    def instance_lines(self, begin: int, end: int) -> int:
        self.to_mark()
        at = self.name_lines(begin, end)
        self.call(self.stack.pop())
        return at


def _weight(item: Any) -> int:
    return int(item) if isinstance(item, int) else 1


def _hides(key: Any) -> bool:
    return type(key) is _Word or (type(key) is bytes and key in _HIDING)


def _dict_of(scan: _Scan) -> None:
    items = scan.to_mark()
    scan.stack.append(_Thing(ITEMS))
    scan.set_items(items)


def _frozenset_of(scan: _Scan) -> None:
    items = scan.to_mark()
    scan.hashed(items)
    scan.tuple_of(items)


_ACTIONS: dict[int, Any] = {
    ord("("): _Scan.mark,
    ord("t"): lambda scan: scan.tuple_of(scan.to_mark()),
    ord(")"): lambda scan: scan.stack.append(1),
    ord("R"): lambda scan: scan.call(scan.last(2)[0]),
    ord("Q"): lambda scan: scan.stack.append(scan.last(1) and 1),
    ord("}"): lambda scan: scan.stack.append(_Thing(ITEMS)),
    ord("]"): lambda scan: scan.stack.append(_Thing(VALUES)),
    ord("d"): _dict_of,
    ord("l"): lambda scan: scan.stack.append(_Thing(VALUES if scan.to_mark() is not None else 0)),
    ord("s"): lambda scan: scan.set_items(scan.last(2)),
    ord("u"): lambda scan: scan.set_items(scan.to_mark()),
    ord("a"): lambda scan: scan.last(1) and scan.target(VALUES),
    ord("e"): lambda scan: scan.to_mark() and scan.target(VALUES),
    ord("b"): _Scan.build,
    ord("0"): _Scan.drop,
    ord("1"): _Scan.to_mark,
    ord("o"): _Scan.call_marked,
    0x81: lambda scan: scan.call(scan.last(2)[0]),
    0x85: lambda scan: scan.tuple_of(scan.last(1)),
    0x86: lambda scan: scan.tuple_of(scan.last(2)),
    0x87: lambda scan: scan.tuple_of(scan.last(3)),
    0x8F: lambda scan: scan.stack.append(_Thing(MEMBERS)),
    0x90: lambda scan: scan.add(scan.to_mark()),
    0x91: _frozenset_of,
    0x92: lambda scan: scan.call(scan.last(3)[0]),
    0x93: _Scan.stack_name,
    0x94: _Scan.memoize,
}
_LINES: dict[int, Any] = {
    ord("I"): _Scan.number_line,
    ord("L"): _Scan.number_line,
    ord("F"): _Scan.number_line,
    ord("S"): _Scan.text_line,
    ord("V"): _Scan.text_line,
    ord("p"): _Scan.put_line,
    ord("g"): _Scan.get_line,
    ord("c"): _Scan.name_lines,
    ord("i"): _Scan.instance_lines,
}
