"""The callback that watches a fit from inside, and stops it where that was planned."""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch

from holdfast.callbacks.base import Callback, Checkpoint, SavePlan
from holdfast.callbacks.kept_checkpoints import KeptCheckpoints
from holdfast.callbacks.timer import Timer
from holdfast.errors import ConfigError
from holdfast.loggers.csv import CSVLogger
from holdfast.testing.events import (
    BATCH_END,
    EPOCH_END,
    FIT_END,
    KINDS,
    VALIDATION_END,
    Event,
    Key,
    Life,
    Message,
    Reasons,
    Started,
    Stopped,
    Tables,
)
from holdfast.testing.fingerprints import Fingerprints, Leaf
from holdfast.training import exactness, metric_objects, rng, state
from holdfast.training.data import BatchStream
from holdfast.training.progress import END, START, TrainerFn
from holdfast.training.resume import run_directories

if TYPE_CHECKING:
    from holdfast.training.module import LightningModule
    from holdfast.training.trainer import Trainer

T = TypeVar("T")

STOP_FILE = "stopped-by-test.ckpt"

# What two equal runs may differ in: the time, and the random name that a callback gives to a run's files.
TIMES = ("time_elapsed", "since_validation_s", "saved_at")
_COMPARED_BEFORE = ("state_dict", "optimizer_states", "lr_schedulers", "callbacks")
_VIEWS = ("callback", "logged", "bar")
_NOT_OF_THE_RUN = ("run", "environment", "loggers", "command")


class RunStopped(BaseException):
    """Stops a watched run; not an `Exception`, so that the script does not go on from it."""


class AtSafePoint(Checkpoint):
    """Has the recorder look at the run when all hooks of a batch or an epoch are done, and say what to save.

    It is in no trainer's list of callbacks: nothing about the run's own checkpoints depends on it.
    """

    def __init__(self, look: Callable[[Trainer], SavePlan | None]) -> None:
        self.look = look

    def plan_save(self, trainer: Trainer) -> SavePlan | None:
        """Look; and tell what to save."""
        return self.look(trainer)


class Recorder(Callback):
    """Tells of every batch, validation and epoch of every fit, and stops the run behind the planned one.

    It draws no number, has no state, and logs nothing.

    Args:
        life: What is planned.
        tell: Takes what it has to tell.
    """

    def __init__(self, life: Life, tell: Callable[[Message], None]) -> None:
        self.life = life
        self.tell = tell
        self.fit = -1
        self.look = Fingerprints(life.root)
        self.stops_soon = False
        """The stop is behind the run, which is about to be stopped in whatever comes next."""
        self.is_stopped = False
        self.was_told = False
        """The signal is sent, and the trainer about to leave."""
        self.safe_point = AtSafePoint(self._at_safe_point)
        self.before: dict[str, dict[str, Leaf]] = {}
        """What was seen before the event that is going on is over."""
        self.rows: deque[list[Any]] | None = None

    # -- a fit ----------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what the fit goes on from."""
        if self.is_stopped or self.was_told:  # a script that trains on by itself after an error
            self._leave()
        self.fit += 1
        self.before = {}
        source, progress = trainer.resumed_from, trainer.progress
        batch = 0 if progress.stage == END else progress.batch
        position = f"epoch {progress.epoch + (progress.stage == END)}, batch {batch}"
        if source is not None:
            source = os.path.relpath(source, self.life.root)
        self.tell(Started(self.fit, source, position))
        if source is None and self.life.goes_on == self.fit:
            self._leave()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From now on the stream is there, and its rows can be noted."""
        reasons = exactness.reasons(trainer)
        if reasons:
            self.tell(Reasons(tuple(reasons)))
        self._note_rows(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The loader may be another one in this epoch."""
        self._note_rows(trainer)

    def _note_rows(self, trainer: Trainer) -> None:
        stream = None if trainer.fit_loop is None else trainer.fit_loop.stream
        if isinstance(stream, BatchStream) and stream.rows is None:
            stream.note_rows()
        self.rows = getattr(stream, "rows", None)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Training is over."""
        self._stop_here("on_train_end", trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell of the end, and of what a checkpoint would hold now."""
        values = {"generator": generators(), **self._state_of(trainer)}
        values["final checkpoint"] = self._final_checkpoint(trainer)
        self.tell(Event(self._key(trainer, FIT_END), trainer.batch_idx, trainer.global_step, values))
        tables = [logger for logger in trainer.loggers if isinstance(logger, CSVLogger)]
        paths = tuple(
            os.path.relpath(os.path.join(one.log_dir, "metrics.csv"), self.life.root) for one in tables
        )
        self.tell(Tables(self.fit, paths))

    # -- its batches ----------------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Look at the batch and at what the step will draw from."""
        rows = self.rows.popleft() if self.rows else None
        self.before = {
            "rows": {} if rows is None else self.look.of(rows, "rows"),
            "batch": self.look.of(batch, "batch"),
            "generator": generators(),
        }

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ask to look again when all hooks of the batch are done."""
        self._stop_here("on_train_batch_end", trainer)
        self._ask(trainer, BATCH_END, "on_train_batch_end")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to gather its batches."""
        self.before = {"batch": {}}

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Look at a batch of validation."""
        if _counts(trainer):
            name = f"batch {batch_idx}" + (f" of loader {dataloader_idx}" if dataloader_idx else "")
            self.before["batch"].update(self.look.of(batch, name))

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """A place to be stopped in."""
        if _counts(trainer):
            self._stop_here("on_validation_batch_end", trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask to look when all that follows the validation is done."""
        if _counts(trainer):
            self._ask(trainer, VALIDATION_END, "on_validation_end")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask to look when all that ends the epoch is done."""
        self._stop_here("on_train_epoch_end", trainer)
        self._ask(trainer, EPOCH_END, "on_train_epoch_end")

    # -- the safe point ------------------------------------------------------------------------------------

    def _ask(self, trainer: Trainer, kind: str, hook: str) -> None:
        trainer.request_save(self.safe_point)
        if self.life.by == "sigterm" and self._key(trainer, kind) == self.life.stop:
            self._send_sigterm(trainer, hook)

    def _key(self, trainer: Trainer, kind: str) -> Key:
        return Key(self.fit, kind, trainer.progress.epoch, trainer.progress.total_batches)

    def _at_safe_point(self, trainer: Trainer) -> SavePlan | None:
        if self.is_stopped or trainer.progress.stage == START:
            return None
        key = self._key(trainer, KINDS[trainer.progress.stage])
        before, self.before = self.before, {}
        values = {**before, **self._state_of(trainer)}
        self.tell(Event(key, trainer.batch_idx, trainer.global_step, values))
        if key != self.life.stop or self.life.by == "sigterm":
            return None
        self.stops_soon = True
        directory = run_directories(trainer)[0]
        return SavePlan(names=(os.path.join(directory, STOP_FILE),)) if self.life.save else None

    # -- being stopped -------------------------------------------------------------------------------------

    def _stop_here(self, hook: str, trainer: Trainer) -> None:
        if not self.stops_soon or self.is_stopped:
            return
        self.tell(Stopped(self.fit, self._where(hook, trainer)))
        if self.life.by == "sigkill":
            os.kill(os.getpid(), signal.SIGKILL)
        self._leave()

    def _leave(self) -> NoReturn:
        self.is_stopped = True
        raise RunStopped

    def _where(self, hook: str, trainer: Trainer) -> str:
        batch = "" if hook == "on_train_epoch_end" else f", batch {trainer.batch_idx}"
        return f"{hook} of epoch {trainer.progress.epoch}{batch}"

    def _send_sigterm(self, trainer: Trainer, hook: str) -> None:
        handler = signal.getsignal(signal.SIGTERM)
        if signal.SIGTERM not in trainer.preemption.signals or not callable(handler):
            raise ConfigError(
                'assert_exact_resume(by="sigterm"): this trainer leaves SIGTERM to end the process. Train in '
                'the main thread and with Trainer(stop_signals=("SIGTERM",)), or take by="sigkill".'
            )
        self.tell(Stopped(self.fit, self._where(hook, trainer)))
        self.was_told = True
        os.kill(os.getpid(), signal.SIGTERM)

    # -- what there is to see ------------------------------------------------------------------------------

    def _state_of(self, trainer: Trainer) -> dict[str, dict[str, Leaf]]:
        """What the run has come to, in the order in which it is compared."""
        module, look = trainer.lightning_module, self.look.of
        metrics = metric_objects.found_in(module)
        schedulers = _numbered([config.scheduler for config in trainer.lr_scheduler_configs])
        with_state = {
            name: callback
            for name, callback in _numbered(trainer.callbacks).items()
            if type(callback) is not Timer
        }
        callbacks: dict[str, Leaf] = {}
        for name, callback in with_state.items():
            skip = ("run", *TIMES) if isinstance(callback, KeptCheckpoints) else TIMES
            callbacks.update(look(callback.state_dict() or {}, name, skip=skip))
        return {
            "logged value": look({**trainer.logged_metrics, **trainer.callback_metrics}),
            "parameter": {name: look(value)[""] for name, value in module.named_parameters()},
            "buffer": {name: look(value)[""] for name, value in module.named_buffers()},
            "metric": look(
                {path: {n: getattr(one, n) for n in one._defaults} for path, one in metrics.items()}
            ),
            "value of an optimizer": self._optimizers(trainer.optimizers, dict(module.named_parameters())),
            "value of a scheduler": look({name: one.state_dict() for name, one in schedulers.items()}),
            "value of a callback": callbacks,
        }

    def _optimizers(self, optimizers: list[Any], parameters: dict[str, torch.Tensor]) -> dict[str, Leaf]:
        names = {id(parameter): name for name, parameter in parameters.items()}
        found: dict[str, Leaf] = {}
        for name, optimizer in _numbered(optimizers).items():
            for number, group in enumerate(optimizer.param_groups):
                found.update(self.look.of(group, f"{name}, group {number}", skip=("params",)))
            for parameter, values in optimizer.state.items():
                found.update(self.look.of(values, f"{name}, {names.get(id(parameter), 'a tensor')}"))
        return found

    def _final_checkpoint(self, trainer: Trainer) -> dict[str, Leaf]:
        """What a checkpoint would hold besides all that: also what the module's own hooks put into it."""
        payload = state.capture(trainer, weights_only=False, exact=False)
        rest = _without(payload, _COMPARED_BEFORE)
        rest["holdfast"] = _without(payload["holdfast"], _NOT_OF_THE_RUN)
        rest["holdfast"]["metrics"] = _without(payload["holdfast"]["metrics"], _VIEWS)
        return self.look.of(rest, skip=TIMES)


def _without(values: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def _counts(trainer: Trainer) -> bool:
    """Whether a validation is part of training: not the sanity check's, and not one after fit."""
    return trainer.state.fn is TrainerFn.FITTING and not trainer.sanity_checking


def generators() -> dict[str, Leaf]:
    """The states of the generators that everybody draws from, each by name."""
    states = rng.capture()
    states.update({f"cuda:{index}": one for index, one in enumerate(states.pop("cuda", ()))})
    look = Fingerprints("", keep_bytes=0)
    return {name: Leaf(" ".join(leaf.text for leaf in look.of(one).values())) for name, one in states.items()}


def _numbered(objects: Sequence[T]) -> dict[str, T]:
    """Objects by the names of their types; those of one type are numbered."""
    types = [type(one).__name__ for one in objects]
    return {
        name if types.count(name) == 1 else f"{name} {types[:index].count(name)}": one
        for index, (name, one) in enumerate(zip(types, objects, strict=True))
    }
