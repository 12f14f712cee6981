"""What of the data no checkpoint brings back, found before the first batch."""

from __future__ import annotations

import dis
from collections import Counter
from collections.abc import Iterable, Iterator
from types import CodeType
from typing import Any

from torch.utils.data import DataLoader

from holdfast.training.command import parts_of
from holdfast.training.data import BatchStream
from holdfast.training.own_generators import kind_of, reachable


def reasons(streams: Iterable[Any], what: str) -> Iterator[str]:
    """One full sentence, which names the remedy, for each thing that makes a resume inexact.

    Args:
        streams: How the loops read the loaders.
        what: What the messages call this data.
    """
    for stream in parts_of(list(streams)):
        facts = stream.describe()
        if not facts["in_order"]:
            yield (
                f"DataLoader(in_order=False), of the {what}: batches come as workers finish them, so the "
                "rows after a resume are not those that were left. Leave in_order out."
            )
        if not stream.stateful:  # as exact as its state
            yield from _of_stream(stream, what, facts)


def shared(training: Iterable[Any], validation: Iterable[Any]) -> Iterator[str]:
    """A sentence for each loader with a state that both train and validate: each moves it for the other."""
    loaders = [part.loader for part in parts_of(list(training)) if part.stateful]
    for part in parts_of(list(validation)):
        if any(part.loader is loader for loader in loaders):
            yield (
                f"One {type(part.loader).__name__} is the training data and the validation data, and "
                "validation within an epoch moves its state. Give each a loader of its own."
            )


def _of_stream(stream: BatchStream, what: str, facts: dict[str, Any]) -> Iterator[str]:
    loader: Any = stream.loader
    is_loader = isinstance(loader, DataLoader)
    told = {id(generator) for generator in stream.kept_generators()}
    # Where data is read again, the workers begin anew in each epoch, with copies of what there was at first.
    if is_loader and stream.seekable and facts["workers"]:
        for owner in (loader.dataset, loader.collate_fn):
            for path, kind in _new_generators(owner, told):
                yield (
                    f"{path}, of the {what}, is a generator of its own ({kind}), and each worker has a copy "
                    "of it. Draw from the global generators of torch, NumPy or Python: these are seeded for "
                    "each batch."
                )
    if is_loader and facts["iterable"] and not facts["workers"]:
        yield from _of_numbers(
            loader.dataset, what, "Draw the order of its rows from torch's global generator."
        )
    # The innermost first, so that each is told of by its own name.
    for owner in reversed([one for one in stream.samplers() if one is not loader or not is_loader]):
        for path, kind in _new_generators(owner, told):
            yield (
                f"{path}, of the {what}, is a generator ({kind}) whose state is in no checkpoint. Make it an "
                f"attribute of {type(owner).__name__} itself: those are saved."
            )
        yield from _of_numbers(
            owner,
            what,
            "Give it set_epoch(epoch), which is called before each epoch, or state_dict and load_state_dict.",
        )


def _new_generators(owner: Any, told: set[int]) -> Iterator[tuple[str, str]]:
    """The way to each generator that ``owner`` may draw from and that was not told of, and what it is."""
    for path, generator in reachable(owner, getattr(owner, "__name__", type(owner).__name__)):
        if id(generator) not in told:
            told.add(id(generator))
            yield path, kind_of(generator)


def _of_numbers(owner: Any, what: str, remedy: str) -> Iterator[str]:
    """A sampler or an iterable that counts its epochs by itself begins again with the first one."""
    if hasattr(owner, "set_epoch") or (hasattr(owner, "state_dict") and hasattr(owner, "load_state_dict")):
        return
    for name in _carried_over(owner):
        yield (
            f"{type(owner).__name__}.__iter__, of the {what}, goes on from self.{name} of the epoch before, "
            f"which is in no checkpoint. {remedy}"
        )


def _carried_over(owner: Any) -> list[str]:
    """Numbers among an object's attributes that ``__iter__`` depends on, and goes on from the next time."""
    code = getattr(getattr(type(owner), "__iter__", None), "__code__", None)
    if code is None or type(owner).__module__.startswith(("torch.", "torchdata.")):
        return []
    read: set[str] = set()
    written: set[str] = set()
    found: list[str] = []
    writes = Counter[str]()
    for instruction in dis.get_instructions(code):
        name = instruction.argval
        if instruction.opname == "LOAD_ATTR":
            read |= {name} - written
        elif instruction.opname == "STORE_ATTR":
            written.add(name)
            writes[name] += 1
            if name in read and name not in found and type(vars(owner).get(name)) in (int, float):
                found.append(name)
    # What is read as often as it is written, as by ``+=``, only counts.
    reads = Counter(_attributes_read(code))
    return [name for name in found if reads[name] > writes[name]]


def _attributes_read(code: CodeType) -> Iterator[str]:
    """The attributes that a function reads, and those that functions within it read."""
    for instruction in dis.get_instructions(code):
        if instruction.opname == "LOAD_ATTR":
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _attributes_read(constant)
