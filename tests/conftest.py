"""What every test starts from: an empty working directory, and a process as the test before found it."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
import torch

from holdfast.utilities import rank_zero

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Whoever runs the tests in the background has it ignored, and so would every process that they start.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is given no place writes into the working directory: let it be the test's own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def process_as_it_was() -> Iterator[None]:
    """Generators, environment, torch's switches and what was said once, so that no test depends on another."""
    rank_zero._said.clear()
    environment = dict(os.environ)
    generators = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    os.environ.clear()
    os.environ.update(environment)
    random.setstate(generators[0])
    numpy.random.set_state(generators[1])
    torch.set_rng_state(generators[2])
    if torch.are_deterministic_algorithms_enabled() != deterministic:
        torch.use_deterministic_algorithms(deterministic)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
