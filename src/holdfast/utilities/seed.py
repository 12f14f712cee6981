"""The generators that everybody draws from: seeded, captured, put back. Python's, NumPy's and torch's."""

from __future__ import annotations

import contextlib
import os
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch

from holdfast.errors import ConfigError
from holdfast.utilities.rank_zero import rank_zero_info


def capture() -> dict[str, Any]:
    """The state of every global generator of this process: Python, NumPy (if loaded), torch, each GPU."""
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
        "torch": torch.get_rng_state(),
    }
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        state["numpy"] = numpy.random.get_state(legacy=False)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore(state: dict[str, Any]) -> list[str]:
    """Put the generators back to ``state``.

    Returns:
        One sentence for each generator that could not be restored, such as a GPU that is not there.
    """
    problems: list[str] = []
    python = state["python"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    torch.set_rng_state(state["torch"].cpu())
    if "numpy" in state:
        try:
            import numpy

            numpy.random.set_state(state["numpy"])
        except ImportError:
            problems.append("NumPy's generator was saved, but NumPy is not installed here")
    if "cuda" in state:
        devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
        for index, device_state in enumerate(state["cuda"][:devices]):
            torch.cuda.set_rng_state(device_state.cpu(), index)
        if devices < len(state["cuda"]):
            problems.append(f"{len(state['cuda'])} GPU generators were saved, {devices} GPUs are here")
    return problems


def in_the_place_of(old: Any, new: Any) -> Any:
    """The new states, in the memory of the old ones where these are alike.

    Both are what `capture` or `state_of` gave, so nobody else has that memory. Saving is faster for it: what
    lies where it lay at the save before needs no new plan.
    """
    if isinstance(new, dict) and isinstance(old, dict):
        return {key: in_the_place_of(old.get(key), value) for key, value in new.items()}
    if isinstance(new, list) and isinstance(old, list) and len(new) == len(old):
        return [in_the_place_of(*pair) for pair in zip(old, new, strict=True)]
    alike = type(old) is type(new) and hasattr(new, "dtype") and hasattr(new, "shape")
    if not alike or old.dtype != new.dtype or old.shape != new.shape or not new.shape:
        return new
    if isinstance(new, torch.Tensor) and old.device != new.device:
        return new
    old[...] = new
    return old


def state_of(generator: Any) -> Any:
    """The state of a generator object of torch, NumPy or Python, as plain values; None for anything else."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(generator, numpy.random.Generator):
        return generator.bit_generator.state
    if numpy is not None and isinstance(generator, numpy.random.RandomState):
        return generator.get_state(legacy=False)
    return None


def set_state_of(generator: Any, state: Any) -> None:
    """Put a generator object back to what `state_of` gave for it."""
    if isinstance(generator, torch.Generator):
        generator.set_state(state.cpu())
    elif isinstance(generator, random.Random):
        version, words, gauss = state
        generator.setstate((version, tuple(words), gauss))
    elif hasattr(generator, "bit_generator"):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)


@contextlib.contextmanager
def isolate_rng(include_cuda: bool = True) -> Iterator[None]:
    """Run a block that may draw and seed as it likes; behind it the generators are as they were before.

    Args:
        include_cuda: Whether the generators of GPUs are put back too.
    """
    state = capture()
    if not include_cuda:
        state.pop("cuda", None)
    try:
        yield
    finally:
        restore(state)


def seed_generators(seed: int) -> None:
    """Seed Python's, torch's CPU and NumPy's generator (if loaded) from one 64-bit number."""
    random.seed(seed)
    torch.default_generator.manual_seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed & 0xFFFFFFFF)


@contextlib.contextmanager
def apart(seed: int) -> Iterator[None]:
    """Run a block on generators of its own, GPUs' included, seeded with ``seed``; then restore the run's."""
    state = capture()
    seed_generators(seed)
    if "cuda" in state:
        torch.cuda.manual_seed_all(seed)
    try:
        yield
    finally:
        restore(state)


def seed_everything(seed: int | None = None, workers: bool = False, verbose: bool = True) -> int:
    """Seed Python, NumPy and torch (CPU and every GPU) and return the seed.

    Args:
        seed: Up to 32 bits. None takes ``PL_GLOBAL_SEED`` from the environment, else 0.
        workers: Kept for compatibility: holdfast always seeds data-loader workers, for each batch anew.
        verbose: Say which seed was set.

    Raises:
        ConfigError: the seed does not fit in 32 bits.
    """
    if seed is None:
        seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
    seed = int(seed)
    if not 0 <= seed <= 0xFFFFFFFF:
        raise ConfigError(f"seed_everything({seed}): the seed must lie between 0 and {0xFFFFFFFF}.")
    if verbose:
        rank_zero_info(f"Seed set to {seed}")
    os.environ["PL_GLOBAL_SEED"] = str(seed)
    os.environ["PL_SEED_WORKERS"] = str(int(workers))
    random.seed(seed)
    with contextlib.suppress(ImportError):
        import numpy

        numpy.random.seed(seed)
    torch.manual_seed(seed)
    return seed
