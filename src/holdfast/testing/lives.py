"""One start of the user's script: in this process, or in one of its own that is killed."""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from holdfast.errors import ConfigError
from holdfast.testing.events import Life, Message, Over, Stopped, Tale
from holdfast.testing.recorder import Recorder, RunStopped
from holdfast.training import rng
from holdfast.training.run import WATCHERS
from holdfast.utilities.seed import isolate_rng

Train = Callable[[Path], Any]


def live(train: Train, life: Life) -> Tale:
    """Start the script, and return what the life told when it is over or was stopped.

    Raises:
        ConfigError: the script is to be killed, and a process of its own could not import it.
        Exception: whatever the script raised.
    """
    return _in_a_process(train, life) if life.by == "sigkill" else _here(train, life)


def _here(train: Train, life: Life) -> Tale:
    tale = Tale(life)
    with isolate_rng():
        try:
            _watched(train, life, tale.messages.append)
        except RunStopped:
            pass
        except SystemExit:
            # What the trainer leaves with when it was told to stop.
            if life.by != "sigterm" or tale.stopped is None:
                raise
    return tale


def _watched(train: Train, life: Life, tell: Callable[[Message], None]) -> None:
    """Call the script with the recorder in each of its fits."""
    with contextlib.suppress(ImportError):
        import numpy  # noqa: F401  # its generator is there from the start, or in no life
    # Two lives that begin alike show that the script can be repeated. Each later one begins from other
    # numbers, as a new process does: what does not come from the checkpoint is then seen.
    rng.seed_generators(life.seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(life.seed)
    root = Path(life.root)
    root.mkdir(parents=True, exist_ok=True)
    token = WATCHERS.set((*WATCHERS.get(), Recorder(life, tell)))
    try:
        train(root)
    finally:
        WATCHERS.reset(token)
    tell(Over())


# -- in a process of its own --------------------------------------------------------------------------------


def _in_a_process(train: Train, life: Life) -> Tale:
    """Spawned, not forked: torch's threads do not survive a fork, and a restarted job is a new process."""
    _check_importable(train)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, train, life, torch.get_num_threads()))
    process.start()
    theirs.close()
    tale = Tale(life)
    try:
        # A killed process may leave loader's workers behind, which hold the pipe open for a while.
        while not tale.messages or not isinstance(tale.messages[-1], (Over, Stopped)):
            tale.messages.append(pickle.loads(ours.recv_bytes()))
    except EOFError:
        pass
    finally:
        ours.close()
        process.join()
    last = tale.messages[-1] if tale.messages else None
    if not isinstance(last, (Over, Stopped)) or (isinstance(last, Over) and last.failure):
        failure = last.failure if isinstance(last, Over) else "What it wrote to stderr may say why.\n"
        raise RuntimeError(f"train(root) ended its process with exit code {process.exitcode}.\n{failure}")
    return tale


def _check_importable(train: Train) -> None:
    try:
        pickle.dumps(train)
    except Exception as error:
        raise ConfigError(
            'assert_exact_resume(train, by="sigkill") starts train in processes of its own, so train has to '
            f"be a function at the top level of a module, and {train!r} cannot be sent there: {error}. "
            'by="exception" takes any function.'
        ) from None


def _child(pipe: Connection, train: Train, life: Life, threads: int) -> None:
    torch.set_num_threads(threads)  # the bits of a sum depend on it

    def tell(message: Message) -> None:
        pipe.send_bytes(pickle.dumps(message))

    try:
        _watched(train, life, tell)
    except RunStopped:
        tell(Over())
    except BaseException:
        tell(Over(traceback.format_exc()))
        sys.exit(1)
