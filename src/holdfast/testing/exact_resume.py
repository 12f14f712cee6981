"""`assert_exact_resume`: trains whole, trains stopped and started again, and compares."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from holdfast.checkpoint import catalog
from holdfast.errors import ConfigError
from holdfast.testing.events import BATCH_END, FIT_END, Life, Over, Tale
from holdfast.testing.lives import live
from holdfast.testing.parting import Comparison, differing_tables
from holdfast.testing.places import choose
from holdfast.testing.wording import message

By = Literal["exception", "sigterm", "sigkill"]


@dataclass(frozen=True)
class ExactResume:
    """What `assert_exact_resume` has shown.

    Args:
        stops: Where the run was stopped, in words.
        resumed_from: The checkpoint that it went on from after each stop, below the run's directory.
        batches: Training batches of the run that never stopped.
        compared: Training batches of the stopped one that were compared; those done twice count twice.
    """

    stops: tuple[str, ...]
    resumed_from: tuple[str, ...]
    batches: int
    compared: int


def assert_exact_resume(
    train: Callable[[Path], Any],
    root: str | os.PathLike[str],
    *,
    stops: int = 4,
    at: Sequence[int] | None = None,
    by: By = "exception",
    save: bool = True,
    ignore: Sequence[str] = (),
    seed: int = 0,
) -> ExactResume:
    """Show that a training script, stopped and started again, does what it does when it is never stopped.

    ``train`` is called with ``root/whole`` and runs to its end. Then it is called with ``root/stopped``, is
    stopped, called again with the same directory, and so on until it has come to its end too. Every training
    batch, validation and epoch of every fit is compared: the rows and the contents of the batches, the
    generators of Python, NumPy, torch and each GPU, every logged value, parameter, buffer and metric, the
    state of optimizers, schedulers and callbacks; and at the end what a checkpoint would hold, and the CSV
    logs.

    A stop lies behind a batch, a validation or an epoch: from there the run goes on, and it is stopped
    somewhere in what comes next, so that some work is lost and done again. The first that are chosen lie in
    the middle of an epoch, behind a batch that validation follows, behind an epoch, behind the last batch of
    an epoch, and behind a validation, where there is such a place.

    What is compared has to be the same in every bit, so the script has to do the same when it is run twice.
    Before each call the generators are seeded, equally for the first two calls and differently for the
    others, as they are in a new process; at the end they are put back.

    Args:
        train: Builds everything anew, from the data to the trainer, with ``default_root_dir=root``, and fits
            with ``ckpt_path="auto"``; several times if it likes. It keeps what it writes below ``root``.
        root: An empty directory, such as pytest's ``tmp_path``.
        stops: How many stops are chosen.
        at: Stop behind these batches instead, counted from 1 over all epochs and fits; and where validation
            or the end of the epoch follows one of them, behind that too.
        by: "exception" raises one, in this process: the quickest. "sigterm" sends that signal to this
            process, and the trainer saves by itself before it leaves. "sigkill" has each start in a process
            of its own, and kills it: of the script nothing stays in memory, not its globals either. ``train``
            then has to be a function at the top level of a module, and each start costs seconds.
        save: Save a checkpoint at each stop besides the run's own, so that the run goes on from there. False
            leaves it to the run's own checkpoints alone, the first of which has to come before the first
            stop. It says nothing about "sigterm", where the trainer saves anyway.
        ignore: Names of logged values that may differ, such as those that measure time; or patterns of
            them: "time/*".
        seed: Chooses the stops, and is what the generators are seeded with.

    Returns:
        What was stopped, gone on from and compared.

    Raises:
        AssertionError: the two runs are not the same, or the stopped one had nothing to go on from. The
            message names the first difference and what usually causes it.
        ConfigError: ``train`` is not such a function, or an argument cannot work.
    """
    _check(stops, at, by)
    directory = Path(os.path.realpath(root))
    for name in ("whole", "stopped"):
        if (directory / name).exists():
            raise ConfigError(
                f"assert_exact_resume: {directory / name} is there already. Give an empty directory."
            )
    whole = live(train, Life(-1, str(directory / "whole"), by, save, seed))
    _check_whole(whole)
    chosen = choose(whole.events, at, stops, seed)
    comparison = Comparison(whole, ignore)
    lives: list[Tale] = []
    for number in range(len(chosen) + 1):
        stop = chosen[number] if number < len(chosen) else None
        before = chosen[number - 1].fit if number else None
        life = Life(number, str(directory / "stopped"), by, save, seed + number, stop, goes_on=before)
        lives.append(live(train, life))
        _check_life(lives)
        parting = comparison.compare(lives[-1])
        if parting is not None:
            raise AssertionError(message(parting, lives, whole, len(chosen)))
        if stop is not None and lives[-1].stopped is None:
            break
    parting = differing_tables(whole, lives[-1], ignore)
    if parting is not None:
        raise AssertionError(message(parting, lives, whole, len(chosen)))
    batches = sum(event.key.kind == BATCH_END for event in whole.events)
    stopped_in = tuple(tale.stopped.where for tale in lives if tale.stopped is not None)
    return ExactResume(stopped_in, tuple(map(_source, lives[1:])), batches, comparison.compared)


def _check(stops: int, at: Sequence[int] | None, by: str) -> None:
    if by not in get_args(By):
        raise ConfigError(f'assert_exact_resume(by={by!r}) must be "exception", "sigterm" or "sigkill".')
    if stops < 1:
        raise ConfigError(f"assert_exact_resume(stops={stops}) must be at least 1.")
    if at is not None and not at:
        raise ConfigError("assert_exact_resume(at=[]) names no batch to stop behind.")


def _check_whole(whole: Tale) -> None:
    if not whole.starts:
        raise ConfigError(
            "assert_exact_resume: train(root) did not call Trainer.fit, so there is nothing to stop."
        )
    source = next((start.resumed_from for start in whole.starts if start.resumed_from is not None), None)
    if source is not None and not _is_below(source, whole):
        _refuse_outside(source)
    if not any(event.key.kind == BATCH_END for event in whole.events):
        raise ConfigError("assert_exact_resume: train(root) trained no batch, so there is nothing to stop.")


def _check_life(lives: list[Tale]) -> None:
    """A stopped run begins from nothing, goes on from a checkpoint when it is started again, and stops."""
    tale = lives[-1]
    for start in tale.starts:
        if start.resumed_from is not None and not _is_below(start.resumed_from, tale):
            _refuse_outside(start.resumed_from)
        if start.fit == tale.life.goes_on and start.resumed_from is None:
            raise AssertionError(_nothing_to_go_on_from(lives))
    stopped = tale.stopped
    if tale.life.by == "sigterm" and stopped is not None and _ended(tale, stopped.fit):
        raise AssertionError(
            f"SIGTERM was sent in {stopped.where}, and fit went on to its end: something has taken the "
            "signal from the trainer, which puts its handler in place when fit begins. Leave it there, or "
            "call it in yours."
        )


def _ended(tale: Tale, fit: int) -> bool:
    ends = [event.key.fit for event in tale.events if event.key.kind == FIT_END]
    return fit in ends and isinstance(tale.messages[-1], Over)


def _is_below(source: str, tale: Tale) -> bool:
    root = Path(os.path.realpath(tale.life.root))
    return Path(os.path.realpath(root / source)).is_relative_to(root)


def _refuse_outside(source: str) -> None:
    raise ConfigError(
        f"assert_exact_resume: train(root) went on from {source}, which is not below root. Give the trainer "
        "default_root_dir=root, and let loggers and checkpoint callbacks write below it."
    )


def _nothing_to_go_on_from(lives: list[Tale]) -> str:
    stopped, life = lives[-2].stopped, lives[-1].life
    assert stopped is not None
    root = Path(life.root)
    found = sorted(catalog.scan(root, recursive=True), key=lambda entry: entry.saved_at)
    files = "".join(f"\n  {os.path.relpath(one.path, root)}, saved at step {one.step}" for one in found)
    if files:
        now = (
            f'Below root there were:{files}\nDoes it call trainer.fit(..., ckpt_path="auto") on a trainer '
            "with default_root_dir=root?"
        )
    elif life.by == "sigterm":
        now = "None was saved: on SIGTERM the trainer saves where it has a checkpoint callback."
    else:
        now = (
            "None was saved by then. Save more often, as ModelCheckpoint(every_n_train_steps=1) does, stop "
            "later (at=), or leave out save=False: then a checkpoint is saved at every stop."
        )
    return (
        f"The run was stopped in {stopped.where}. When it was started again, it did not go on from a "
        f"checkpoint, but from the start. {now}"
    )


def _source(tale: Tale) -> str:
    sources = [start.resumed_from for start in tale.starts if start.fit == tale.life.goes_on]
    return (sources and sources[0]) or ""
