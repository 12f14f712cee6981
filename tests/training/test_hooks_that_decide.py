"""What a hook decides is done: an optimizer that starts afresh, a run that stops before it began."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

import holdfast as pl
from holdfast.callbacks import Callback, ModelCheckpoint
from holdfast.loggers import CSVLogger
from holdfast.plugins import AsyncCheckpointIO
from tests.training.toys import Toy, checkpoints, rows, trainer


class Scheduled(Toy):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


def saved(path: Path, module: Toy) -> None:
    run = trainer()
    run.fit(module, rows())
    run.save_checkpoint(path)


class TestAfresh:
    def test_what_a_hook_empties_starts_afresh(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        class Afresh(Scheduled):
            def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
                checkpoint["optimizer_states"], checkpoint["lr_schedulers"] = [], []

            def on_train_start(self) -> None:
                optimizer = self.optimizers(use_pl_optimizer=False)
                self.found = (len(optimizer.state), optimizer.param_groups[0]["lr"])

        saved(tmp_path / "a.ckpt", Scheduled())
        module, run = Afresh(), trainer(max_epochs=2)
        run.fit(module, rows(), ckpt_path=tmp_path / "a.ckpt")
        assert module.found == (0, 0.1)
        assert run.global_step == 6
        said = capsys.readouterr().err
        assert "on_load_checkpoint has emptied 'optimizer_states': the optimizers start afresh" in said
        assert "on_load_checkpoint has emptied 'lr_schedulers': the LR schedulers start afresh" in said

    def test_a_checkpoint_that_never_had_it_is_refused(self, tmp_path: Path) -> None:
        saved(tmp_path / "a.ckpt", Toy())
        with pytest.raises(pl.CheckpointIncompatible, match="holds the state of 0 LR schedulers"):
            trainer(max_epochs=2).fit(Scheduled(), rows(), ckpt_path=tmp_path / "a.ckpt")


class Stopping(Callback):
    """Tells the run to stop in a hook."""

    def __init__(self, hook: str) -> None:
        self.seen: list[str] = []
        for name in ("on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_train_epoch_end"):
            setattr(self, name, lambda trainer, *args, name=name: self.see(trainer, name, hook))

    def see(self, trainer: Any, name: str, hook: str) -> None:
        self.seen.append(name)
        trainer.should_stop = trainer.should_stop or name == hook


class TestStops:
    @pytest.mark.parametrize(
        ("hook", "seen"),
        [
            ("on_train_start", ["on_train_start"]),
            ("on_train_epoch_start", ["on_train_start", "on_train_epoch_start", "on_train_epoch_end"]),
        ],
    )
    def test_before_the_first_batch(self, hook: str, seen: list[str]) -> None:
        stopping, module = Stopping(hook), Toy()
        trainer(callbacks=[stopping], enable_checkpointing=False).fit(module, rows())
        assert stopping.seen == seen
        assert module.seen == []

    def test_the_least_is_trained_all_the_same(self) -> None:
        module = Toy()
        stopping = Stopping("on_train_start")
        trainer(callbacks=[stopping], enable_checkpointing=False, max_epochs=3, min_epochs=1).fit(
            module, rows()
        )
        assert len(module.seen) == 12


def test_data_without_a_length_promises_nothing() -> None:
    class Endless(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter([(torch.ones(3), 0)] * 12)

    run = trainer(limit_train_batches=9)
    run.fit(Toy(), DataLoader(Endless(), batch_size=4))
    assert run.global_step == 3


def test_a_state_key_of_ones_own() -> None:
    class Mine(Callback):
        @property
        def state_key(self) -> str:
            return self._generate_state_key(what="a")

    assert Mine().state_key == f"{Mine.__qualname__}{{'what': 'a'}}"


class Failing(Callback):
    """Fails when it hears of the exception."""

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        raise OSError("no line to the pager")


class FailingLogger(CSVLogger):
    """Fails when it is closed."""

    def finalize(self, status: str) -> None:
        raise OSError("no line to the server")


def test_who_fails_to_hear_of_an_exception_keeps_nobody_else_from_it(tmp_path: Path) -> None:
    class Breaking(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("a", 1.0)
            if self.global_step == 2:
                raise RuntimeError("broken")
            return super().training_step(batch, batch_idx)

    saving = ModelCheckpoint(tmp_path / "kept", save_on_exception=True)
    kept = CSVLogger(tmp_path / "logs", version=0)
    run = trainer(
        callbacks=[Failing(), saving], logger=[FailingLogger(tmp_path / "other"), kept], log_every_n_steps=1
    )
    with (
        pytest.warns(UserWarning, match="The run ended") as said,
        pytest.raises(RuntimeError, match="broken"),
    ):
        run.fit(Breaking(), rows())
    assert [str(one.message) for one in said] == [
        "The run ended with RuntimeError, and Failing.on_exception failed: no line to the pager",
        "The run ended with RuntimeError, and FailingLogger.finalize failed: no line to the server",
    ]
    assert checkpoints(tmp_path / "kept") == ["epoch=0-step=2.ckpt"]
    assert len((tmp_path / "logs/lightning_logs/version_0/metrics.csv").read_text().splitlines()) == 3


class Uploading(CSVLogger):
    """Fails to upload the first file that it is told of."""

    told = 0

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        self.told += 1
        if self.told == 1:
            raise OSError("no line to the store")


@pytest.mark.parametrize("plugins", [None, [AsyncCheckpointIO()]], ids=["engine", "async"])
def test_a_logger_that_fails_after_a_save_makes_no_callback_forget_its_file(
    plugins: Any, tmp_path: Path
) -> None:
    first = ModelCheckpoint(tmp_path / "first", every_n_train_steps=1)
    second = ModelCheckpoint(tmp_path / "second", every_n_train_steps=1, monitor="step", mode="max")
    run = trainer(callbacks=[first, second], logger=Uploading(tmp_path / "logs"), plugins=plugins)
    with pytest.raises(OSError, match="no line to the store"):
        run.fit(Toy(), rows())
    for callback, name in ((first, "first"), (second, "second")):
        assert callback.best_model_path == str(tmp_path / name / "epoch=0-step=1.ckpt")
        assert "epoch=0-step=1.ckpt" in checkpoints(tmp_path / name)
