"""The training that signals stop: the same command starts it and starts it again.

    python preempted_child.py ROOT [OPTIONS AS JSON]

It says on stdout what happens, one line for each batch. Where OPTIONS["pause"] names a moment, as in
"training_step@9" (the step that the run has reached), it says "at training_step@9" and waits there for a line on
stdin: "again" to say it once more, "go" to go on. Leaves ROOT/final.pt.

OPTIONS["background"] says whether ModelCheckpoints save in the background. OPTIONS["hold"] = ["synced@10", PIPE]
holds a save up that goes on in the background: the one of step 10, at this point, until PIPE is opened for writing.
"""

from __future__ import annotations

import errno
import functools
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from child import BATCH_SIZE, Rows, say
from child import Net as QuietNet
from torch import Tensor
from torch.utils.data import DataLoader

import holdfast as pl
from holdfast.callbacks import EarlyStopping, LambdaCallback, ModelCheckpoint, OnExceptionCheckpoint, Timer
from holdfast.checkpoint import commit
from holdfast.loggers import CSVLogger
from holdfast.plugins.environments import SLURMEnvironment

EPOCHS = 3
BATCHES = 8
STEPS = EPOCHS * BATCHES
SAVE_EVERY_N_STEPS = 5
HOOKS = (
    "setup",
    "on_train_start",
    "on_train_epoch_start",
    "on_validation_end",
    "on_train_epoch_end",
    "on_train_end",
    "on_fit_end",
    "teardown",
    "on_after_backward",
    "on_save_checkpoint",
    "on_exception",
)


class Moments:
    """Waits at the moments that were asked for, each the first time it comes."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.pause = list(options.get("pause", []))
        self.raise_at = options.get("raise_at")
        self.disk_full_at = options.get("disk_full_at")
        self.hold = options.get("hold", [None, None])
        self.trainer: Any = None
        self.training = threading.get_ident()
        self.saved_step = 0
        # A process of the script's own, which is none of the run's.
        self.helper = multiprocessing.get_context("fork").Process(target=signal.pause)

    def in_save(self, point: str) -> None:
        """A named point of a save, in the foreground or in another thread."""
        if threading.get_ident() == self.training:
            self.reached(point)
        elif f"{point}@{self.saved_step}" == self.hold[0]:
            say("held", self.hold[0])
            open(self.hold[1]).close()

    def reached(self, where: str) -> None:
        if where == "on_save_checkpoint":
            self.saved_step = self.trainer.global_step
        moment = f"{where}@{self.trainer.global_step}"
        if moment == self.raise_at:
            raise RuntimeError(f"raised at {moment}")
        if moment == self.disk_full_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if moment not in self.pause:
            return
        self.pause.remove(moment)
        workers = [process.pid for process in multiprocessing.active_children()]
        say("workers", *workers)
        while True:
            say("at", moment)
            if sys.stdin.readline() != "again\n":
                return


class Net(QuietNet):
    def __init__(self, moments: Moments) -> None:
        super().__init__()
        self.moments = moments

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.moments.reached("training_step")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.moments.reached("sanity_step" if self.trainer.sanity_checking else "validation_step")
        super().validation_step(batch, batch_idx)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        say("step", self.trainer.global_step, float(outputs["loss"]).hex())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-3)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class WaitingRows(Rows):
    """Rows that tell of each process that they are sent to, which waits there for a line from a pipe."""

    def __init__(self, rows: int, pipe: str) -> None:
        super().__init__(rows)
        self.pipe = pipe

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        say("sent", "to", os.getpid())
        with open(self.pipe) as pipe:
            pipe.readline()


def loader(
    rows: int, batch_size: int, workers: int = 0, pipe: str | None = None, **options: Any
) -> DataLoader[Any]:
    if workers:
        options = {"num_workers": workers, "prefetch_factor": 1, **options}
    dataset = Rows(rows) if pipe is None else WaitingRows(rows, pipe)
    return DataLoader(dataset, batch_size=batch_size, **options)


def callbacks(options: dict[str, Any], moments: Moments) -> list[Any]:
    def hook(name: str) -> Callable[..., None]:
        return lambda trainer, *_: moments.reached(name)

    made: list[Any] = [
        LambdaCallback(**{name: hook(name) for name in HOOKS}),
        LambdaCallback(on_exception=lambda trainer, module, error: say("told of", type(error).__name__)),
    ]
    if options.get("helper"):
        made.append(LambdaCallback(on_train_start=lambda *_: moments.helper.start()))
    if "time_is_up_at" in options:
        made.append(LambdaCallback(on_train_batch_start=functools.partial(spend_an_hour, options)))
    if options.get("on_exception"):
        made.append(OnExceptionCheckpoint(options["on_exception"]))
    if options.get("trainer", {}).get("enable_checkpointing", True):
        background = options.get("background", True)
        first = ModelCheckpoint(
            options.get("dirpath"),
            background=background,
            every_n_train_steps=SAVE_EVERY_N_STEPS,
            monitor="loss_step",
            save_top_k=2,
            save_last=True,
            save_on_exception=bool(options.get("on_exception")),
        )
        best = {"monitor": "val_loss", "filename": "best-{epoch}", "background": background}
        made += [first, ModelCheckpoint(options.get("dirpath"), **best)]
    return [*made, EarlyStopping(monitor="val_loss", patience=EPOCHS)]


def spend_an_hour(options: dict[str, Any], trainer: Any, *_: Any) -> None:
    """Let the Trainer's timer believe that training has taken an hour by now."""
    if trainer.global_step == options["time_is_up_at"]:
        (timer,) = (callback for callback in trainer.callbacks if isinstance(callback, Timer))
        timer.load_state_dict({"time_elapsed": {"train": timedelta(hours=1).total_seconds()}})


def fit(root: Path, options: dict[str, Any]) -> Any:
    """Build everything anew, and train; returns the module."""
    pl.seed_everything(5)
    moments = Moments(options)
    asked = dict(options.get("trainer", {}))
    if "slurm" in options:
        asked["plugins"] = [SLURMEnvironment(**options["slurm"])]
    trainer = moments.trainer = pl.Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": EPOCHS,
            "default_root_dir": root,
            "logger": CSVLogger(root),
            "log_every_n_steps": 1,
            "callbacks": callbacks(options, moments),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **asked,
        }
    )
    # A place that tests know of: each call stands for one moment of a save.
    commit.crash_point = moments.in_save
    net = Net(moments)
    train = loader(BATCHES * BATCH_SIZE, BATCH_SIZE, shuffle=True, **options.get("loader", {}))
    val = loader(16, 2, **options.get("val_loader", {}))
    before = handlers()
    try:
        if options.get("validate"):
            trainer.validate(net, val)
        trainer.fit(net, train, val, ckpt_path=options.get("ckpt_path", "auto"))
    finally:
        if moments.helper.pid is not None:
            moments.helper.join()
            say("helper", moments.helper.exitcode)
        kept = handlers() == before
        say("left", f"received_sigterm={trainer.received_sigterm}", f"handlers_kept={kept}")
    return net


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in sorted(signal.valid_signals())]


def own_handler(number: int, frame: Any) -> None:
    say("own", signal.Signals(number).name)


def run(root: Path, options: dict[str, Any]) -> None:
    """Train, and where that was asked for catch what a signal raises, and train on in the same process."""
    caught = {"KeyboardInterrupt": KeyboardInterrupt, "SystemExit": SystemExit, None: ()}[
        options.get("catch")
    ]
    try:
        net = fit(root, options)
    except caught as error:
        say("caught", type(error).__name__, getattr(error, "code", None))
        net = fit(root, {})
    torch.save(net.state_dict(), root / "final.pt")
    say("done", net.trainer.global_step)


def main(root: Path, options: dict[str, Any]) -> None:
    signal.alarm(100)  # ends a run that hangs, and with it the test that waits for it
    torch.set_num_threads(1)
    for name in options.get("own_handlers", []):
        signal.signal(signal.Signals[name], own_handler)
    if options.get("thread"):
        training = threading.Thread(target=run, args=(root, options))
        training.start()
        training.join()
    else:
        run(root, options)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]) if len(sys.argv) > 2 else {})
