"""The streams of random numbers that a run draws from: saved, restored, and kept apart.

Three kinds of draws must not touch each other, or a resumed run drifts from the one that never stopped:

* the model's own (dropout, noise, the shuffle of each epoch): the global generators, saved as they are;
* the data's (augmentation in ``__getitem__`` or a collate function): seeded for every batch from
  ``(seed, stage, loader, epoch, batch, rank)``, so a batch is the same whichever process loads it and when;
* validation's: the whole run of it works on seeds of its own and leaves the global generators untouched.

This module is imported by data-loader workers: it imports next to nothing of holdfast.
"""

from __future__ import annotations

import hashlib
import random
import sys
from typing import Any

import torch

from holdfast.utilities.seed import apart as apart
from holdfast.utilities.seed import capture as capture
from holdfast.utilities.seed import restore as restore
from holdfast.utilities.seed import seed_generators as seed_generators
from holdfast.utilities.seed import set_state_of as set_state_of
from holdfast.utilities.seed import state_of as state_of

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def derive(*parts: int | str) -> int:
    """A 64-bit seed that depends on every part and on nothing else; equal on every machine."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def mix(base: int, index: int) -> int:
    """The ``index``-th seed of the stream ``base``: cheap enough for every batch (splitmix64's finalizer)."""
    z = (base + (index + 1) * _GOLDEN) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


class Isolation:
    """Lets code draw from seeded generators and then gives the run its own back, in some 20 microseconds.

    NumPy's state would take 90 us to copy out and in, so its generator is swapped for a spare one instead.
    That drops the second half of a pair of ``numpy.random.randn`` that may wait in the run's own generator,
    at every fetch.
    """

    __slots__ = ("_active", "_numpy", "_python", "_spare", "_torch")

    def __init__(self) -> None:
        self._active = False
        self._spare: Any = None

    def enter(self, seed: int) -> None:
        """Set the run's generators aside and seed what code sees until ``leave``."""
        self._python = random.getstate()
        self._torch = torch.default_generator.get_state()
        numpy = sys.modules.get("numpy")
        if numpy is not None:
            if self._spare is None:
                self._spare = numpy.random.MT19937()
            self._numpy = numpy.random.get_bit_generator()
            numpy.random.set_bit_generator(self._spare)
            numpy.random.seed(seed & 0xFFFFFFFF)
        else:
            self._numpy = None
        random.seed(seed)
        torch.default_generator.manual_seed(seed)
        self._active = True

    def leave(self) -> None:
        """Give the run its generators back; does nothing when they are in place already."""
        if not self._active:
            return
        self._active = False
        random.setstate(self._python)
        torch.default_generator.set_state(self._torch)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_bit_generator(self._numpy)
