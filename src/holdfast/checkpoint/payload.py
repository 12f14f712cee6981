"""What may be in a payload: plain values and tensors, their exact types, and what had to stay out.

`encode` turns any nested value into a tree that ``torch.load(weights_only=True)`` accepts and a spec of
exact types (see `exact`); `decode` puts the two together again. An unstorable value never stops the rest: it
is left out and named.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch

from holdfast.checkpoint import exact
from holdfast.checkpoint.exact import Spec
from holdfast.checkpoint.pickle_scan import charge
from holdfast.checkpoint.stand_ins import (
    AS_IT_IS,
    HANDLERS,
    LEAVES,
    MAX_INT_BITS,
    Handler,
    Plain,
    Unstorable,
    encode_tensor,
    handler_for,
    plain_key,
)

MAX_DEPTH = 100


@dataclasses.dataclass
class Encoded:
    """A payload in the form in which it is written.

    Attributes:
        tree: plain values and plain tensors only; containers are new, tensors share memory with the payload.
        types: spec of the exact types, or None if all is plain.
        omissions: (path, reason) of everything that is not in the tree.
        tensors: (path, tensor) of every tensor in the tree; those of a shared container are there once.
    """

    tree: Any
    types: Spec | None
    omissions: list[tuple[str, str]]
    tensors: list[tuple[str, torch.Tensor]]


def encode(obj: Any) -> Encoded:
    """Turn any value into what a checkpoint can hold; never raises for a value that it cannot hold.

    A value that cannot be stored is left out (its key is dropped; in a sequence None stands in its place) and
    named with the reason. Two references to one container or tensor stay one. Tensors, parameters and plain
    tensor subclasses become new plain tensors without a gradient, which share memory with the originals.
    """
    encoder = _Encoder()
    try:
        tree, spec = encoder.value(obj)
    except Unstorable as reason:
        encoder.omissions.append(("", str(reason)))
        tree, spec = None, None
    return Encoded(tree, spec, encoder.omissions, encoder.tensors)


def decode(tree: Any, types: Any, skip: Collection[Any] = ()) -> Any:
    """Give back the exact value from a tree (which is used up) and its spec, without the keys in ``skip``.

    Where a spec does not fit what it is for, the plain value stays.
    """
    spec = types if isinstance(types, dict) else {}
    value = _decode_items(tree, spec, {}, 0)
    if isinstance(value, dict):
        for key in skip:  # not before: what is left may refer to the exact types of what lies under them
            value.pop(key, None)
    return exact.restore(value, spec)


def _decode(plain: Any, spec: Any, done: dict[int, tuple[Any, Any]], depth: int) -> Any:
    if not isinstance(spec, dict) or depth > MAX_DEPTH + 1:
        return plain
    if spec.get("type") == "ref":
        return done.get(id(plain), (plain, plain))[1]
    result = exact.restore(_decode_items(plain, spec, done, depth), spec)
    done[id(plain)] = (plain, result)  # holding `plain` keeps its id from being used again
    return result


def _decode_items(plain: Any, spec: Spec, done: dict[int, tuple[Any, Any]], depth: int) -> Any:
    items = spec.get("items")
    if not isinstance(items, dict) or not isinstance(plain, (dict, list, tuple)):
        return plain
    charge(8 * len(plain))
    places = list(plain) if isinstance(plain, dict) else range(len(plain))
    values: Any = list(plain) if isinstance(plain, tuple) else plain
    for at, child in items.items():
        try:
            place = places[int(at)]
        except (ValueError, IndexError):
            continue
        values[place] = _decode(values[place], child, done, depth + 1)
    return tuple(values) if isinstance(plain, tuple) else plain


class _Encoder:
    def __init__(self) -> None:
        self.omissions: list[tuple[str, str]] = []
        self.tensors: list[tuple[str, torch.Tensor]] = []
        self.path: list[str] = []
        self.active: set[int] = set()
        self.memo: dict[int, tuple[Any, Spec | None, Any]] = {}  # id -> (plain, spec, original kept alive)
        self.made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def value(self, obj: Any) -> Plain:
        depth = len(self.path)
        try:
            kind = type(obj)
            if kind in AS_IT_IS:
                return obj, None
            if kind is torch.Tensor or kind is torch.nn.Parameter:
                return encode_tensor(self, obj)
            handler = HANDLERS.get(kind) or handler_for(obj)
            return handler(self, obj) if handler in LEAVES else self.container(obj, handler)
        except (Unstorable, MemoryError, torch.cuda.OutOfMemoryError):
            raise
        except Exception as error:  # the methods of somebody's own class may do anything
            del self.path[depth:]
            raise _unreadable("", obj, error) from error

    def container(self, obj: Any, handler: Handler) -> Plain:
        key = id(obj)
        known = self.memo.get(key)
        if known is not None:
            return self.again(known)
        if key in self.active:
            raise Unstorable("it contains itself")
        if len(self.path) >= MAX_DEPTH:
            raise Unstorable(f"it is nested more than {MAX_DEPTH} levels deep")
        self.active.add(key)
        tensors, known_before = len(self.tensors), len(self.memo)
        try:
            plain, spec = handler(self, obj)
        except BaseException:
            # What was read of it so far is not in the tree, so nothing may refer to it.
            del self.tensors[tensors:]
            while len(self.memo) > known_before:
                self.memo.popitem()
            raise
        finally:
            self.active.discard(key)
        self.memo[key] = (plain, spec, obj)
        return plain, spec

    def again(self, known: tuple[Any, Spec | None, Any]) -> Plain:
        plain, spec, _ = known
        if spec is None or not isinstance(plain, (list, dict, set, tuple, torch.Tensor)) or plain == ():
            return plain, spec
        return plain, {"type": "ref"}

    def once(self, obj: torch.Tensor, make: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        known = self.made.get(id(obj))
        if known is None:
            known = self.made[id(obj)] = (make(obj), obj)  # holding `obj` keeps its id from being used again
        return known[0]

    def tensor(self, plain: torch.Tensor) -> None:
        self.tensors.append(("/".join(self.path), plain))

    def omit(self, reason: object, *more: str) -> None:
        self.omissions.append(("/".join([*self.path, *more]), str(reason)))

    def mapping(self, pairs: Iterable[tuple[Any, Any]], into: dict[Any, Any]) -> Spec | None:
        items: dict[str, Spec] = {}
        path = self.path
        for key, value in pairs:
            kind = type(key)
            if kind is not str and (kind is not int or key.bit_length() >= MAX_INT_BITS):
                try:
                    key = plain_key(key)
                except Exception as error:
                    reason = (
                        error if isinstance(error, Unstorable) else _unreadable("key of type ", key, error)
                    )
                    self.omit(reason, kind.__name__)
                    continue
            if key in into:
                self.omit("another key has the same plain value", _component(str(key)))
                continue
            path.append(_component(key if kind is str else str(key)))
            try:
                plain, spec = self.value(value)
            except Unstorable as reason:
                self.omit(reason)
            else:
                if spec is not None:
                    items[str(len(into))] = spec
                into[key] = plain
            path.pop()
        return {"items": items} if items else None

    def sequence(self, values: Iterable[Any], *, drop: bool = False) -> tuple[list[Any], Spec | None]:
        into: list[Any] = []
        items: dict[str, Spec] = {}
        path = self.path
        for value in values:
            path.append(str(len(into)))
            try:
                plain, spec = self.value(value)
            except Unstorable as reason:
                self.omit(reason)
                plain, spec = None, None
                if drop:
                    path.pop()
                    continue
            if spec is not None:
                items[str(len(into))] = spec
            into.append(plain)
            path.pop()
        return into, {"items": items} if items else None


def _unreadable(what: str, obj: Any, error: Exception) -> Unstorable:
    try:
        return Unstorable(f"reading a {what}{exact.type_name(type(obj))} raised {error!r}")
    except Exception:
        return Unstorable("reading it raised an error that cannot be shown")


def _component(key: str) -> str:
    """One part of a slashed path; a slash within it is escaped, as JSON pointers do it."""
    return key.replace("~", "~0").replace("/", "~1") if "/" in key or "~" in key else key
