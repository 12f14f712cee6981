"""Generators that an epoch's order alone is drawn from, however long that takes."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import RandomSampler, SequentialSampler

from holdfast.training import rng

_END = object()


class Draws:
    """A stream of random numbers: in its ``with`` blocks the generators are its own, where it left them last.

    Args:
        seed: What it begins with.
        generators: Generators of torch, NumPy or Python, besides the global ones, that are to be its own too.
    """

    def __init__(self, seed: int, generators: Iterable[Any] = ()) -> None:
        self._python: Any = random.Random(seed).getstate()
        self._torch = torch.Generator().manual_seed(seed).get_state()
        self._numpy: Any = None
        self._seed = seed
        self._generators = list({id(one): one for one in generators}.values())
        self._states = [
            _seeded_state(one, rng.derive(seed, index)) for index, one in enumerate(self._generators)
        ]

    def __enter__(self) -> None:
        numpy = sys.modules.get("numpy")
        if numpy is not None:
            # Swapped, not copied, which would take 90 microseconds.
            inner, self._numpy = self._numpy, numpy.random.get_bit_generator()
            numpy.random.set_bit_generator(inner or numpy.random.MT19937())
            if inner is None:
                numpy.random.seed(self._seed & 0xFFFFFFFF)
        self._swap()

    def __exit__(self, *error: object) -> None:
        self._swap()
        numpy: Any = sys.modules.get("numpy")
        if self._numpy is not None:
            outer, self._numpy = self._numpy, numpy.random.get_bit_generator()
            numpy.random.set_bit_generator(outer)

    def _swap(self) -> None:
        python, torch_state = random.getstate(), torch.default_generator.get_state()
        random.setstate(self._python)
        torch.default_generator.set_state(self._torch)
        self._python, self._torch = python, torch_state
        for index, generator in enumerate(self._generators):
            state = rng.state_of(generator)
            rng.set_state_of(generator, self._states[index])
            self._states[index] = state

    def each(self, items: Iterator[Any], *, lazily: bool) -> Iterator[Any]:
        """The items; each of them is drawn from these numbers, or all with the first unless ``lazily``."""
        while True:
            with self:
                item = next(items, _END)
            if item is _END:
                return
            yield item
            if not lazily:
                yield from items
                return


def _seeded_state(generator: Any, seed: int) -> Any:
    """The state of a generator of the same kind that begins with a seed."""
    if isinstance(generator, torch.Generator):
        return torch.Generator(generator.device).manual_seed(seed).get_state()
    if isinstance(generator, random.Random):
        return random.Random(seed).getstate()
    numpy: Any = sys.modules["numpy"]
    if isinstance(generator, numpy.random.Generator):
        return type(generator.bit_generator)(seed).state
    return numpy.random.RandomState(seed & 0xFFFFFFFF).get_state(legacy=False)


def at_once(sampler: Any, seed: int) -> Sequence[Any] | None:
    """A sampler's whole order for a seed, where it can be had without asking the sampler row by row."""
    if type(sampler) in (list, range, tuple):
        return sampler  # type: ignore[no-any-return]
    if type(sampler) is SequentialSampler:
        return range(len(sampler.data_source))
    if type(sampler) is RandomSampler and not sampler.replacement:
        rows = len(sampler.data_source)
        if sampler.num_samples == rows:
            return torch.randperm(rows, generator=torch.Generator().manual_seed(seed))  # type: ignore[return-value]
    return None
