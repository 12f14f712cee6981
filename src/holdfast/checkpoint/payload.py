"""What may be in a payload: plain values and tensors, their exact types, and what had to stay out.

`encode` turns any nested value into a tree that ``torch.load(weights_only=True)`` accepts and a spec of
exact types (see `exact`); `decode` puts the two together again. An unstorable value never stops the rest: it
is left out and named.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch

from holdfast.checkpoint import exact
from holdfast.checkpoint.exact import Spec
from holdfast.checkpoint.stand_ins import (
    AS_IT_IS,
    HANDLERS,
    LEAVES,
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
        tensors: (path, tensor) of every tensor in the tree; a tensor under two top-level keys is in both.
    """

    tree: Any
    types: Spec | None
    omissions: list[tuple[str, str]]
    tensors: list[tuple[str, torch.Tensor]]


def encode(obj: Any) -> Encoded:
    """Turn any value into what a checkpoint can hold; never raises for a value that it cannot hold.

    A value that cannot be stored is left out (its key is dropped; in a sequence None stands in its place) and
    named with the reason. Two references to one container or tensor stay one. Parameters and plain tensor
    subclasses become plain tensors without a gradient, which share memory with the originals.
    """
    encoder = _Encoder()
    try:
        tree, spec = encoder.value(obj)
    except Unstorable as reason:
        encoder.omissions.append(("", str(reason)))
        tree, spec = None, None
    return Encoded(tree, spec, encoder.omissions, encoder.tensors)


def decode(tree: Any, types: Spec | None) -> Any:
    """Give back the exact value from a tree (which is used up) and its spec.

    Raises:
        ValueError, TypeError, KeyError, IndexError: if the spec does not fit the tree.
    """
    return tree if types is None else _decode(tree, types, {}, 0)


def _decode(plain: Any, spec: Spec, done: dict[int, tuple[Any, Any]], depth: int) -> Any:
    if spec.get("type") == "ref":
        return done[id(plain)][1]
    if depth > MAX_DEPTH + 1:
        raise ValueError("the types are nested too deeply")
    result = plain
    items = spec.get("items")
    if items:
        children = {int(at): child for at, child in items.items()}
        if isinstance(plain, dict):
            keys = list(plain)
            for at, child in children.items():
                plain[keys[at]] = _decode(plain[keys[at]], child, done, depth + 1)
        elif isinstance(plain, (list, tuple)):
            values = list(plain)
            for at, child in children.items():
                values[at] = _decode(values[at], child, done, depth + 1)
            if isinstance(plain, list):
                plain[:] = values
            else:
                result = tuple(values)
        else:
            raise TypeError(f"a {type(plain).__name__} has no items")
    result = exact.restore(result, spec)
    done[id(plain)] = (plain, result)  # holding `plain` keeps its id from being used again
    return result


class _Encoder:
    def __init__(self) -> None:
        self.omissions: list[tuple[str, str]] = []
        self.tensors: list[tuple[str, torch.Tensor]] = []
        self.path: list[str] = []
        self.active: set[int] = set()
        # id -> (plain, spec, original kept alive, path, range in self.tensors)
        self.memo: dict[int, tuple[Any, Spec | None, Any, str, int, int]] = {}
        self.made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.seen_under: set[tuple[int, str]] = set()

    def value(self, obj: Any) -> Plain:
        kind = type(obj)
        if kind in AS_IT_IS:
            return obj, None
        if kind is torch.Tensor:
            return encode_tensor(self, obj)
        handler = HANDLERS.get(kind)
        if handler is None:
            return self.of_unknown_type(obj)
        return handler(self, obj) if handler in LEAVES else self.container(obj, handler)

    def of_unknown_type(self, obj: Any) -> Plain:
        """A value of somebody's own class, whose methods may do anything."""
        depth = len(self.path)
        try:
            handler = handler_for(obj)
            return handler(self, obj) if handler in LEAVES else self.container(obj, handler)
        except Unstorable:
            raise
        except Exception as error:
            del self.path[depth:]
            raise Unstorable(f"reading a {exact.type_name(type(obj))} raised {error!r}") from error

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
        first = len(self.tensors)
        try:
            plain, spec = handler(self, obj)
        finally:
            self.active.discard(key)
        self.memo[key] = (plain, spec, obj, "/".join(self.path), first, len(self.tensors))
        self.seen_under.add((key, self.path[0] if self.path else ""))
        return plain, spec

    def again(self, known: tuple[Any, Spec | None, Any, str, int, int]) -> Plain:
        plain, spec, original, path, first, last = known
        top = self.path[0] if self.path else ""
        if (id(original), top) not in self.seen_under:
            # Its tensors belong to this top-level key too: a reader that skips the other one needs them.
            self.seen_under.add((id(original), top))
            here = "/".join(self.path)
            self.tensors += [(here + name[len(path) :], tensor) for name, tensor in self.tensors[first:last]]
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
            if kind is not str and kind is not int:
                try:
                    key = plain_key(key)
                except Unstorable as reason:
                    self.omit(reason, str(type(key).__name__))
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


def _component(key: str) -> str:
    """One part of a slashed path; a slash within it is escaped, as JSON pointers do it."""
    return key.replace("~", "~0").replace("/", "~1") if "/" in key or "~" in key else key
