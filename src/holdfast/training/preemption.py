"""Leaving a fit in good order: a signal sets a flag, the next safe point saves, and the process exits."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any, NoReturn

from holdfast.callbacks.base import Checkpoint, SavePlan
from holdfast.callbacks.save_line import format_size
from holdfast.errors import ConfigError
from holdfast.strategies.environments import SLURMEnvironment
from holdfast.training import agreed
from holdfast.training.in_flight import settle
from holdfast.training.progress import END, START
from holdfast.training.saving import carry_out_requests
from holdfast.training.stopped import StoppedFiles
from holdfast.utilities.rank_zero import rank_zero_info

if TYPE_CHECKING:
    from holdfast.training.trainer import Trainer


class Preempted(SystemExit):
    """A signal ended the fit at a safe point; uncaught, the process exits with 143 and no traceback.

    All that was trained is durable, or it was said that nothing can be saved.
    """

    def __init__(self, code: int = 143) -> None:
        super().__init__(code)


class Interrupted(Preempted, KeyboardInterrupt):
    """Ctrl-C ended the fit at a safe point; uncaught, the process exits with 130 and no traceback."""

    def __init__(self, code: int = 130) -> None:
        super().__init__(code)


_listening: Preemption | None = None
"""The one whose handlers are in place: a fit inside of a hook of another fit leaves signals to that one."""


class Preemption(Checkpoint):
    """Saves at the next safe point after a signal, and then ends the run.

    The handler sets a flag and asks for a save, as a callback would: until a signal comes a step costs
    nothing. It is in no trainer's list of callbacks, so it is not in any checkpoint either.

    - What is saved is ``stopped.ckpt`` (see `StoppedFiles`), a full checkpoint to go on from exactly.
    - While nothing was trained, nothing is saved: the run leaves before its first batch.
    - The first SIGINT does the same with code 130. The second raises KeyboardInterrupt, wherever it comes,
      and from then on SIGINT ends the process.
    - What comes too late for any safe point acts when the fit is over, as it would have without it.
    - When a `Timer` says that the time is up, the same file is saved, and the fit ends by itself.

    Args:
        stop_signals: The signals, by number or name; with none SIGINT is left alone too.

    Raises:
        ConfigError: one of them is no signal, or cannot be caught.
    """

    def __init__(self, stop_signals: Sequence[int | str] = ("SIGTERM",)) -> None:
        if isinstance(stop_signals, (str, int)):
            raise ConfigError(
                f"Trainer(stop_signals={stop_signals!r}) must be several: stop_signals=({stop_signals!r},)."
            )
        self.signals = [_signal(one) for one in stop_signals]
        self.files = StoppedFiles()
        self._forget()

    def _forget(self) -> None:
        self.received: signal.Signals | None = None
        """The first signal of the current or last fit that means to stop it, SIGINT included."""
        self._taken: signal.Signals | None = None
        """The first one that came to this process; where there are several, they agree on `received`."""
        self.stop_received = False
        """Whether one other than SIGINT was among those that came."""
        self.cut_short = False
        """The time is up in the middle of an epoch: what is saved from now on is no run's that goes on."""
        self.cut_off = False
        """A second SIGINT came: nothing is saved any more."""
        self._pid = os.getpid()
        self.time_over = False
        """The time for training is up."""
        self._begun_at: int | None = None
        self._met = False
        self._leaves_at_end = False
        self._ended_otherwise = False

    # -- signals ---------------------------------------------------------------------------------------------

    @contextmanager
    def listening(self, trainer: Trainer) -> Iterator[None]:
        """Handle the signals for the length of a fit; the handlers before are put back, however it ends.

        Raises:
            Preempted: the signal came before the last safe point, where only the fit's end was left to do.
        """
        self._forget()
        handling = self._handling(trainer) if self._may_listen() else nullcontext()
        with agreed.ending(trainer, in_order=Preempted), handling:
            yield
        if self._leaves_at_end:
            self._requeue(trainer)
            raise self._way_out()

    @contextmanager
    def _handling(self, trainer: Trainer) -> Iterator[None]:
        global _listening
        error: BaseException | None = None
        handlers = _Handlers(self, trainer)
        _listening = self
        try:
            handlers.install(self._numbers(trainer))
            yield
        except BaseException as problem:
            error = problem
            raise
        finally:
            try:
                handlers.closed = True
            finally:  # a second SIGINT may have raised just there
                _listening = None
                handlers.put_back()
            if self._taken is not None and not self._met:
                _send_again(self._taken, error)
            error = None

    def _may_listen(self) -> bool:
        outer = _listening is not None and _listening._pid == os.getpid()
        return bool(self.signals) and not outer and threading.current_thread() is threading.main_thread()

    def _numbers(self, trainer: Trainer) -> list[signal.Signals]:
        slurm = _slurm_of(trainer)
        requeue = [] if slurm is None else [signal.Signals(slurm.requeue_signal)]
        return list(dict.fromkeys([*self.signals, *requeue, signal.SIGINT]))

    def take(self, number: signal.Signals, trainer: Trainer) -> None:
        """Note a signal; the first one asks for a save. Called by the handler, between any two operations.

        With several processes all of them stop at the safe point that they agree on; see `stop`.
        """
        if number != signal.SIGINT:
            self.stop_received = True
        if self._taken is not None:
            return
        self._taken = number
        if agreed.together(trainer):
            self._post(trainer)
            if not trainer.is_global_zero or self.received is not None:
                return
        else:
            self.received = number
            trainer.request_save(self)
        saves = _why_nothing_is_saved(trainer) is None
        line = f"saving {_when(trainer)}, then leaving" if saves else f"leaving {_when(trainer)}"
        if number == signal.SIGINT:
            line += " (Ctrl-C again to leave at once)"
        _say_at_once(f"{number.name}: {line}", trainer)

    def _post(self, trainer: Trainer) -> None:
        if self._taken is not None:
            agreed.post(trainer, agreed.STOP, [int(self._taken), trainer.global_rank])

    def stop(self, trainer: Trainer, told: list[int]) -> None:
        """Stop at this safe point, as all processes do: one of them has got a signal.

        Args:
            trainer: The trainer.
            told: The signal's number, and the rank that got it.
        """
        number, rank = signal.Signals(told[0]), told[1]
        if number != signal.SIGINT:
            self.stop_received = True
        if self.received is None:
            self.received = number
            trainer.request_save(self)
            if self._taken is None:
                saves = _why_nothing_is_saved(trainer) is None
                line = "saving, then leaving" if saves else "leaving"
                rank_zero_info(f"{number.name} on rank {rank}: {line}")

    def cut(self) -> NoReturn:
        """A second SIGINT: leave where the run is, and let a third one end the process."""
        self.cut_off = self._met = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        raise KeyboardInterrupt

    # -- the time is up --------------------------------------------------------------------------------------

    def time_is_up(self, trainer: Trainer) -> None:
        """Save where the run stops for it: the next safe point with ``min_epochs`` and -steps done."""
        self.time_over = True
        if not self._nothing_new(trainer):
            trainer.request_save(self)
        elif trainer.progress.stage not in (START, END) and _may_stop(trainer):
            # Started again with no time left: the epoch that was cut short only ends once more.
            self.cut_short = True

    # -- the safe point --------------------------------------------------------------------------------------

    def begin(self, trainer: Trainer, resumed: dict[str, Any] | None) -> None:
        """Note where training begins, and whose stopped files are this run's.

        Args:
            trainer: Whose counters and directories are restored and settled by now.
            resumed: The "holdfast" part of the checkpoint that it goes on from, or None.
        """
        self._begun_at = trainer.progress.total_batches
        self.files.begin(trainer, resumed)
        if agreed.together(trainer):
            agreed.begin(trainer)
            self._post(trainer)  # what came before then

    def plan_save(self, trainer: Trainer) -> SavePlan | None:
        """Plan the file; None where there is none to be saved, which is said."""
        if self._ended_otherwise:
            return None
        if self.received is None and not _may_stop(trainer):
            trainer.request_save(self)
            return None
        self._met = self._met or self.received is not None
        why = _why_nothing_is_saved(trainer)
        if why is not None and self.received is not None:
            rank_zero_info(f"nothing is saved: {why}")
        if why is not None or self.cut_short:
            return None
        return self.files.plan(trainer)

    def committed(self, trainer: Trainer, plan: SavePlan, report: Any) -> None:
        """Say where the file is."""
        self.files.saved(trainer, plan)
        name, size = os.path.relpath(plan.names[0]), format_size(report.size_bytes)
        rank_zero_info(f"saved {name}  step {trainer.global_step}  {size} in {report.durable_s:.2f} s")

    def after_saves(self, trainer: Trainer) -> None:
        """Leave the fit if a signal came; called at each safe point when its saves are carried out.

        Raises:
            Preempted: it did.
        """
        ended = trainer.progress.stage == END
        if self.time_over and not ended and _may_stop(trainer) and not self._nothing_new(trainer):
            self.cut_short = True
        if self.received is None:
            return
        if self in trainer.save_requests:  # it came while others' files were written
            carry_out_requests(trainer, exact=not self.cut_short)
        if ended and trainer.fit_loop is not None and trainer.fit_loop.finished:
            # All is trained. What the hooks of the end do no later start would make up for.
            self._leaves_at_end = True
            return
        self._leave(trainer)

    def leave_untrained(self, trainer: Trainer) -> None:
        """Leave if a signal came and nothing was trained: the file that the run went on from holds the same.

        Ranks: all. Blocks: while nothing was trained, until all have said whether a signal came.

        Raises:
            Preempted: so it is.
        """
        if not self._nothing_new(trainer):
            return
        if agreed.together(trainer):
            self._ask_all(trainer)
        if self.received is None:
            return
        since = "yet" if trainer.resumed_from is None else f"since {os.path.basename(trainer.resumed_from)}"
        rank_zero_info(f"nothing is saved: nothing was trained {since}")
        self._leave(trainer)

    def _ask_all(self, trainer: Trainer) -> None:
        strategy = trainer.strategy
        if self.received is None and strategy.reduce_boolean_decision(self._taken is not None, all=False):
            numbers = strategy.gather(int(self._taken or 0))
            self.received = signal.Signals(strategy.broadcast(max(numbers or [0])))

    def ends_otherwise(self, trainer: Trainer, error: BaseException) -> bool:
        """Save nothing more: ``error`` ended the fit. Return whether nobody else is to save either."""
        self._ended_otherwise = True
        while self in trainer.save_requests:
            trainer.save_requests.remove(self)
        cut_off = self.cut_off or (_listening is not None and _listening.cut_off)
        return cut_off or isinstance(error, Preempted)

    def _nothing_new(self, trainer: Trainer) -> bool:
        return self._begun_at in (None, trainer.progress.total_batches)

    def _leave(self, trainer: Trainer) -> NoReturn:
        self._met = True
        trainer.engine.wait()
        settle(trainer)
        agreed.share_stats(trainer)
        for logger in trainer.loggers:
            try:
                logger.save()
            except Exception as problem:  # what was trained is safe, and the time to leave is short
                rank_zero_info(f"{type(logger).__name__}.save failed: {problem}")
        self._requeue(trainer)
        raise self._way_out()

    def _way_out(self) -> Preempted:
        return Interrupted() if self.received == signal.SIGINT else Preempted()

    def _requeue(self, trainer: Trainer) -> None:
        """Have SLURM start the job again, if that would go on from somewhere."""
        slurm = _slurm_of(trainer)
        asked = slurm is not None and self.received != signal.SIGINT and trainer.is_global_zero
        if slurm is None or not asked or _why_nothing_is_saved(trainer) is not None:
            return
        if self.received == signal.SIGTERM and slurm.is_being_ended():
            # `scancel` sends it too, and a job that somebody cancelled is not to come back.
            rank_zero_info("not started again: SLURM says that the job was cancelled or its time was up")
            return
        problem = slurm.requeue()
        if problem is not None:
            problem += '. Submit the job again: ckpt_path="auto" goes on'
        rank_zero_info("SLURM starts the job again" if problem is None else f"SLURM: {problem}")


class _Handlers:
    """The handlers of one fit, and those that were there before."""

    def __init__(self, preemption: Preemption, trainer: Trainer) -> None:
        self.preemption = preemption
        self.trainer = trainer
        self.earlier: dict[int, Any] = {}
        self.pid = os.getpid()
        self.interrupted = False
        self.closed = False
        """Whether the fit is over, so that nothing is raised any more."""
        self.back = False

    def install(self, numbers: Sequence[signal.Signals]) -> None:
        """Take the signals over, but for those whose handler is not Python's and could not be put back."""
        for number in numbers:
            earlier = signal.getsignal(number)
            # A job in the background ignores Ctrl-C, which is meant for another one.
            in_background = number == signal.SIGINT and earlier == signal.SIG_IGN
            if earlier is not None and not in_background:
                self.earlier[number] = earlier
                signal.signal(number, self.handle)

    def put_back(self) -> None:
        """Put the earlier handlers back, but where somebody else has taken a signal over since."""
        self.closed = True
        # SIGINT last: from then on it may raise.
        for number in sorted(self.earlier, key=lambda number: number == signal.SIGINT):
            ours = number == signal.SIGINT and self.preemption.cut_off
            if ours or signal.getsignal(number) == self.handle:
                signal.signal(number, self.earlier[number])
        self.back = True

    def handle(self, number: int, frame: Any) -> None:
        """Handle a signal; the handler of before is called too, but for Python's own for SIGINT."""
        earlier = self.earlier[number]
        if self.back or os.getpid() != self.pid:
            _as_before(number, frame, earlier)
            return
        if number == signal.SIGINT and not self.closed:
            if self.interrupted:
                self.preemption.cut()
            self.interrupted = True
        self.preemption.take(signal.Signals(number), self.trainer)
        if callable(earlier) and earlier is not signal.default_int_handler:
            # One that means to leave gets its way at the safe point, where all is saved.
            with suppress(SystemExit):
                earlier(number, frame)


def _when(trainer: Trainer) -> str:
    if trainer.sanity_checking or trainer.validating:
        return "when this validation is done"
    return "when this batch is done" if trainer.training else "at the next safe point"


def _say_at_once(line: str, trainer: Trainer) -> None:
    """Say a line from a handler, past Python's own streams, which may be in the middle of a write.

    In a terminal it takes the place of the bar, which is drawn again below it.
    """
    bar = trainer.progress_bar_callback
    with suppress(OSError, ValueError):  # a stream that is gone
        lines = bar.lines_drawn if bar is not None and os.isatty(2) else 0
        if lines:
            # The bar takes back as many lines as it had, from where it finds the cursor.
            line = "\r\x1b[2K" + "\x1b[1A\x1b[2K" * (lines - 1) + line + "\n" * (lines - 1)
        os.write(2, f"{line}\n".encode())


def _as_before(number: int, frame: Any, earlier: Any) -> None:
    """Do what the earlier handler would have done: the fit is over, or another process's."""
    if callable(earlier):
        earlier(number, frame)
    elif earlier == signal.SIG_DFL:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)


def _send_again(number: signal.Signals, error: BaseException | None) -> None:
    """Send the process the signal that no safe point met; it may end here and now."""
    if signal.getsignal(number) == signal.SIG_DFL and error is not None:
        traceback.print_exception(error)
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    signal.raise_signal(number)


def _may_stop(trainer: Trainer) -> bool:
    return trainer.fit_loop is not None and trainer.fit_loop.may_stop()


def _why_nothing_is_saved(trainer: Trainer) -> str | None:
    if trainer.fast_dev_run:
        return "fast_dev_run is on"
    return None if trainer.checkpoint_callbacks else "the trainer has no checkpoint callback"


def _slurm_of(trainer: Trainer) -> SLURMEnvironment | None:
    """The environment of a job that is to be requeued; None for any other."""
    found = trainer.cluster_environment
    if found is None and SLURMEnvironment.detect():
        found = SLURMEnvironment()
    return found if isinstance(found, SLURMEnvironment) and found.auto_requeue else None


def _signal(given: int | str) -> signal.Signals:
    try:
        number = signal.Signals[given] if isinstance(given, str) else signal.Signals(given)
    except (KeyError, ValueError):
        raise ConfigError(f"Trainer(stop_signals=...): {given!r} is no signal of this system.") from None
    if number in (signal.SIGKILL, signal.SIGSTOP):
        raise ConfigError(f"Trainer(stop_signals=...): {number.name} cannot be caught by any process.")
    return number
