"""What a resumed run calls is the end of what the uninterrupted run calls, hook by hook, with the same counters.

A run that saves at each of its safe points is resumed from every one of these files. From `on_train_start` on,
each hook of the module, of the datamodule and of callbacks, each step of an LR scheduler and each call of a
logger has to come as it came in the run that never stopped, and whatever a hook reads of the trainer's counters
there has to be the same. So no validation is run twice or left out, and no epoch ends twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import holdfast as pl
from holdfast.callbacks import EarlyStopping, GradientAccumulationScheduler, LearningRateMonitor
from holdfast.loggers.logger import DummyLogger
from holdfast.utilities.combined_loader import CombinedLoader

from .harness import SaveEverywhere
from .tape import CALLBACK_HOOKS, MODULE_HOOKS, Tape, bits

pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning"),
    pytest.mark.filterwarnings("ignore:Trainer.overfit_batches=:UserWarning"),
    # Here the time is over at once, or never.
    pytest.mark.filterwarnings(r"ignore:Once resumed.*\s+Trainer.val_check_interval=:UserWarning"),
]

DATA_HOOKS = (
    "prepare_data", "setup", "teardown", "train_dataloader", "val_dataloader",
    "on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer",
)  # fmt: skip
LOGGER_CALLS = ("log_metrics", "log_hyperparams", "log_graph", "after_save_checkpoint", "finalize")
ROWS = 14


def counters(trainer: pl.Trainer) -> tuple[Any, ...]:
    """All that a hook can ask the trainer about where it is."""
    loop, progress = trainer.fit_loop, trainer.progress
    if loop is None:
        return ()
    return (
        ("epoch", trainer.current_epoch, "step", trainer.global_step, "batch", trainer.batch_idx),
        ("total", loop.total_batch_idx, loop.batch_idx, loop.max_batches, trainer.num_training_batches),
        ("stepped", loop._batches_that_stepped, "last", trainer.is_last_batch, "done", loop.done),
        ("validations", progress.validations, progress.validation_batches, trainer.val_check_batch),
        ("val", trainer.num_val_batches, trainer.validating, trainer.training, trainer.sanity_checking),
        ("epochs", *counts(loop.epoch_progress)),
        ("batches", *counts(loop.epoch_loop.batch_progress)),
        ("stop", trainer.should_stop, "again", loop.restarting),
        # Asking for it before the loader is there would ask for the loader.
        ("steps", loop.stream and trainer.estimated_stepping_batches),
        ("metrics", bits(dict(sorted(trainer.callback_metrics.items())))),
        ("logged", bits(dict(sorted(trainer.logged_metrics.items())))),
        ("rates", [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]),
    )


def counts(progress: Any) -> tuple[Any, ...]:
    names = ("ready", "started", "processed", "completed")
    return tuple([getattr(part, name) for name in names] for part in (progress.current, progress.total))


def recorded(kind: str, base: type, names: tuple[str, ...], tape: Tape, run: list[pl.Trainer]) -> type:
    """A subclass of ``base`` that writes each of ``names`` on the tape, with the counters, before running it."""

    def recorder(name: str) -> Any:
        def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
            told = [bits(one) for one in args if isinstance(one, (int, str, Tensor, dict))]
            tape.record(kind, name, told, kwargs.get("step"), counters(run[0]))
            return getattr(base, name)(self, *args, **kwargs)

        return hook

    return type(base.__name__, (base,), {name: recorder(name) for name in names})


class Model(pl.LightningModule):
    def __init__(self, case: Case, tape: Tape) -> None:
        super().__init__()
        self.case, self.tape = case, tape
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.2), nn.Linear(4, 1))
        self.automatic_optimization = not case.manual

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        parts = [part for part in batch.values() if part is not None] if self.case.combined else [batch]
        loss: Tensor = sum((self.net(part).square().mean() for part in parts), torch.zeros(()))
        self.log("loss", loss, on_step=True, on_epoch=True)
        if self.case.manual:
            for optimizer in self.optimizers()[: 1 + batch_idx % 2]:
                optimizer.zero_grad()
                self.manual_backward(self.net(parts[0]).square().mean())
                optimizer.step()
            self.lr_schedulers().step()
        return loss

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        self.log("begun", float(batch_idx))
        return -1 if batch_idx == self.case.skips_at else None

    def on_train_epoch_end(self) -> None:
        self.log("ended", float(self.current_epoch))

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", self.net(batch).square().mean(), on_step=True, on_epoch=True)

    def configure_optimizers(self) -> Any:
        tape = self.tape

        class Steps(torch.optim.lr_scheduler.StepLR):
            def step(self, *args: Any) -> None:
                tape.record("scheduler", "step", self.last_epoch)
                super().step(*args)

        class Plateau(torch.optim.lr_scheduler.ReduceLROnPlateau):
            def step(self, metrics: Any, *args: Any) -> None:  # type: ignore[override]
                tape.record("scheduler", "plateau", self.last_epoch, bits(metrics))
                super().step(metrics, *args)

        if self.case.manual:
            both = [torch.optim.SGD(self.net[place].parameters(), 0.05) for place in (0, 2)]
            return both, [Steps(both[0], 2, 0.9)]
        optimizer = torch.optim.SGD(self.net.parameters(), lr=0.05, momentum=0.9)
        if self.case.schedule is None:
            return optimizer
        if "plateau" in self.case.schedule:
            plateau = Plateau(optimizer, "min", 0.5, patience=0, threshold=0.5)
            schedule = {"interval": self.case.schedule.split()[0], "monitor": "begun"}
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, **schedule}}
        schedule = {
            "interval": self.case.schedule.split()[0],
            "frequency": int(self.case.schedule.split()[1]),
        }
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": Steps(optimizer, 1, 0.9), **schedule}}


class Stream(IterableDataset[Tensor]):
    """Rows without a length."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.linspace(-1, 1, ROWS * 3).view(ROWS, 3))


class Data(pl.LightningDataModule):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case

    def train_dataloader(self) -> Any:
        if self.case.stream:
            return DataLoader(Stream(), 4)
        rows = torch.linspace(-1, 1, ROWS * 3).view(ROWS, 3)
        loader = DataLoader(rows, 4, shuffle=True)  # type: ignore[arg-type, var-annotated]
        return (
            CombinedLoader({"a": loader, "b": DataLoader(rows, 7)}, "max_size")
            if self.case.combined
            else loader
        )  # type: ignore[arg-type]

    def val_dataloader(self) -> Any:
        loaders = [DataLoader(torch.linspace(0, 1, count * 3).view(count, 3), 2) for count in (4, 6)]  # type: ignore[arg-type, var-annotated]
        return loaders[: self.case.val_loaders]


class Case:
    """One run to stop and resume; what is not named is the plainest."""

    def __init__(
        self,
        *,
        manual: bool = False,
        stream: bool = False,
        combined: bool = False,
        skips_at: int | None = None,
        val_loaders: int = 1,
        schedule: str | None = None,
        callbacks: Any = list,
        **trainer: Any,
    ) -> None:
        self.manual, self.stream, self.combined, self.skips_at = manual, stream, combined, skips_at
        self.val_loaders, self.schedule, self.callbacks, self.trainer = (
            val_loaders,
            schedule,
            callbacks,
            trainer,
        )

    def run(self, root: Path, ckpt_path: Path | None = None, *, save: bool = True) -> Run:
        """Train in ``root``, from the start or from ``ckpt_path``."""
        tape, trainers = Tape(), []  # type: ignore[var-annotated]
        pl.seed_everything(3 if ckpt_path is None else 4, verbose=False)
        saver = SaveEverywhere(root if save else None, tape)
        trainer = pl.Trainer(
            accelerator="cpu",
            default_root_dir=root,
            logger=recorded("logger", DummyLogger, LOGGER_CALLS, tape, trainers)(),
            callbacks=[
                recorded("callback", pl.Callback, CALLBACK_HOOKS, tape, trainers)(),
                *self.callbacks(),
                saver,
            ],
            enable_progress_bar=False,
            enable_model_summary=False,
            **{"max_epochs": 2, "log_every_n_steps": 1, **self.trainer},
        )
        trainers.append(trainer)
        model = recorded("module", Model, MODULE_HOOKS, tape, trainers)(self, tape)
        data = recorded("data", Data, DATA_HOOKS, tape, trainers)(self)
        trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)
        return Run(trainer, tape, saver)


class Run:
    def __init__(self, trainer: pl.Trainer, tape: Tape, saver: SaveEverywhere) -> None:
        self.trainer, self.tape, self.files, self.kinds = trainer, tape, saver.files, saver.kinds


class StopsAt(pl.Callback):
    def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
        trainer.should_stop = trainer.should_stop or trainer.global_step == 6


CASES = {
    "plain": Case(),
    "no validation": Case(val_loaders=0),
    "validation after a part of the epoch": Case(val_check_interval=0.5),
    "validation after a number of batches": Case(val_check_interval=3),
    "validation after each batch": Case(val_check_interval=1),
    "validation after a number of batches, across epochs": Case(
        val_check_interval=3, check_val_every_n_epoch=None, max_epochs=3
    ),
    "validation after a time that is over at once": Case(val_check_interval=timedelta(0)),
    "validation after a time that is never over": Case(val_check_interval=timedelta(days=1)),
    "validation every second epoch": Case(check_val_every_n_epoch=2, max_epochs=4),
    "validation twice in every second epoch": Case(
        check_val_every_n_epoch=2, val_check_interval=0.5, max_epochs=3
    ),
    "several validation loaders": Case(val_loaders=2, val_check_interval=2),
    "a limit on training batches": Case(limit_train_batches=3),
    "a part of the training batches": Case(limit_train_batches=0.5),
    "a limit on validation batches": Case(limit_val_batches=1, val_loaders=2),
    "overfit_batches": Case(overfit_batches=2),
    "a whole sanity check": Case(num_sanity_val_steps=-1),
    "no sanity check": Case(num_sanity_val_steps=0),
    "EarlyStopping on validation": Case(
        callbacks=lambda: [EarlyStopping("val_loss", min_delta=1.0, patience=2)], max_epochs=9
    ),
    "EarlyStopping in the middle of the epoch": Case(
        callbacks=lambda: [EarlyStopping("val_loss", min_delta=1.0, patience=2)],
        max_epochs=9,
        val_check_interval=2,
    ),
    "EarlyStopping on the epoch's loss": Case(
        callbacks=lambda: [EarlyStopping("loss_epoch", min_delta=1.0, patience=1)], max_epochs=9
    ),
    "told to stop in the middle of an epoch": Case(callbacks=lambda: [StopsAt()], max_epochs=9),
    "told to stop before it may": Case(callbacks=lambda: [StopsAt()], max_epochs=9, min_epochs=3),
    "accumulation over 3": Case(accumulate_grad_batches=3, schedule="step 1", log_every_n_steps=2),
    "accumulation by a schedule": Case(
        callbacks=lambda: [GradientAccumulationScheduler({0: 2, 1: 3})], max_epochs=3
    ),
    "optimizers stepped by hand": Case(manual=True, val_check_interval=3),
    "max_steps in the middle of an epoch": Case(max_steps=6, max_epochs=-1),
    "max_steps at the end of an epoch": Case(max_steps=8, max_epochs=-1),
    "max_steps and accumulation": Case(max_steps=3, max_epochs=-1, accumulate_grad_batches=3),
    "data without a length": Case(stream=True),
    "data without a length, validated in between": Case(stream=True, val_check_interval=3),
    "data without a length and accumulation": Case(stream=True, accumulate_grad_batches=3),
    "combined loaders": Case(combined=True, val_check_interval=0.5),
    "loaders asked for in each epoch": Case(reload_dataloaders_every_n_epochs=1, max_epochs=3),
    "loaders asked for in every second epoch": Case(
        reload_dataloaders_every_n_epochs=2, max_epochs=4, check_val_every_n_epoch=3
    ),
    "the rest of each epoch skipped": Case(skips_at=2, schedule="epoch 1"),
    "a scheduler for epochs": Case(schedule="epoch 1", callbacks=lambda: [LearningRateMonitor()]),
    "a scheduler for every second step": Case(schedule="step 2", log_every_n_steps=3),
    "a scheduler that waits for a plateau": Case(schedule="epoch plateau", max_epochs=3),
    "a scheduler that looks for a plateau at each step": Case(schedule="step plateau", max_epochs=3),
}  # fmt: skip


def rests(whole: Run, number: int, resumed: Run) -> tuple[list[Any], list[Any]]:
    """What the whole run did after it saved this file, and what the resumed one did from on_train_start on."""
    place = next(i for i, event in enumerate(whole.tape) if event[:2] == ("safe point", number))
    expected = whole.tape[place + 1 :]
    starts = [i for i, event in enumerate(resumed.tape) if event[1] == "on_train_start"]
    if not starts:  # all is trained: it neither starts nor ends training
        starts = [next(i for i, event in enumerate(resumed.tape) if event[1] == "on_fit_end") - 1]
        expected = [event for event in expected if event[1] != "on_train_end"]
    return expected, resumed.tape[starts[-1] + 1 :]


def first_difference(expected: list[Any], seen: list[Any]) -> str | None:
    """The first call that differs, or the counters that differ in it; None when all are the same."""
    for index, (mine, theirs) in enumerate(zip(expected, seen)):
        if mine == theirs:
            continue
        before = " ".join(str(event[1]) for event in expected[max(0, index - 6) : index])
        if mine[:2] != theirs[:2]:
            return f"after {before!r}: whole {mine[:3]}, resumed {theirs[:3]}"
        parts = [(one, other) for one, other in zip(mine[2:4], theirs[2:4]) if one != other]
        parts += [(one, other) for one, other in zip(mine[-1], theirs[-1]) if one != other]
        return f"after {before!r}: in {mine[:2]}: whole and resumed {parts}"
    if len(expected) == len(seen):
        return None
    longer, start = max(expected, seen, key=len), min(len(expected), len(seen))
    more = [event[:2] for event in longer[start : start + 8]]
    return f"the {'whole' if longer is expected else 'resumed'} run goes on after {start} calls: {more}"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_resumed_run_calls_what_is_left_to_call(case: Case, tmp_path: Path) -> None:
    whole = case.run(tmp_path)
    assert whole.files
    problems = []
    for number, path in whole.files.items():
        if case.skips_at is not None and number == max(whole.files):
            continue  # all is trained, and the index of a batch that was skipped is in no file
        resumed = case.run(tmp_path, path, save=False)
        difference = first_difference(*rests(whole, number, resumed))
        if difference is not None:
            problems.append(f"file {number} of {len(whole.files)} ({whole.kinds[number]}): {difference}")
    assert not problems, f"{len(problems)} of {len(whole.files)}:\n" + "\n".join(problems[:2])


def test_a_file_saved_between_two_fits_is_followed_by_the_next_epoch(tmp_path: Path) -> None:
    """Saved by hand after the first epoch's fit, and so at the start of the second epoch."""
    whole = Case(max_epochs=2).run(tmp_path)
    short = Case(max_epochs=1).run(tmp_path / "short")
    short.trainer.save_checkpoint(tmp_path / "by hand.ckpt")
    resumed = Case(max_epochs=2).run(tmp_path, tmp_path / "by hand.ckpt", save=False)
    first_end = next(number for number, kind in whole.kinds.items() if kind == "epoch")
    assert first_difference(*rests(whole, first_end, resumed)) is None


@pytest.mark.parametrize("sanity", [2, -1])
def test_before_training_a_resumed_run_calls_all_but_the_sanity_check(sanity: int, tmp_path: Path) -> None:
    case = Case(num_sanity_val_steps=sanity)
    whole = case.run(tmp_path)
    resumed = case.run(tmp_path, whole.files[2], save=False)

    def before_training(run: Run) -> list[Any]:
        calls = [event[:2] for event in run.tape if event[0] != "scheduler"]
        return calls[: next(i for i, call in enumerate(calls) if call[1] == "on_train_start")]

    first, second = before_training(whole), before_training(resumed)
    checked = [first.index(("callback", f"on_sanity_check_{edge}")) for edge in ("start", "end")]
    assert ("callback", "on_validation_batch_start") in first[slice(*checked)]
    asks = [("data", "val_dataloader")]
    assert second == [
        *first[: checked[0]],
        *(first[checked[1] + 1 :]),
        *asks,
    ]


def test_a_finished_run_sets_up_ends_and_leaves_its_loggers_alone(tmp_path: Path) -> None:
    whole = Case().run(tmp_path)
    again = Case().run(tmp_path, whole.files[max(whole.files)], save=False)
    assert " ".join(f"{kind}.{name}" for kind, name, *_ in again.tape if kind != "scheduler") == (
        "module.configure_callbacks data.prepare_data module.prepare_data "
        "data.setup callback.setup module.setup module.configure_model "
        "callback.on_fit_start module.on_fit_start "
        "data.train_dataloader data.val_dataloader "
        "callback.on_fit_end module.on_fit_end "
        "logger.finalize "
        "data.teardown callback.teardown module.teardown"
    )
