"""What a run says, before its first batch, of the run that it goes on from: all that differs, and nothing else."""

from __future__ import annotations

import os
import warnings
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, random_split

import holdfast as pl
from holdfast.callbacks import EarlyStopping, ModelCheckpoint, Timer
from holdfast.checkpoint.load import load
from holdfast.training import command
from tests.training.toys import Toy, rows, trainer


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines that a run says."""
    from holdfast.utilities.rank_zero import logger

    lines: list[str] = []
    monkeypatch.setattr(logger, "info", lines.append)
    return lines


def save(root: Path, model: pl.LightningModule, data: Any, **arguments: Any) -> Path:
    """Train for five steps, of which three are an epoch; returns the file of the last one."""
    saver = ModelCheckpoint(root, filename="a", every_n_train_steps=5)
    trainer(callbacks=[saver, *arguments.pop("callbacks", [])], **{"max_epochs": 2, **arguments}).fit(
        model, data
    )
    return root / "a.ckpt"


def go_on(path: Path, model: pl.LightningModule, data: Any, **arguments: Any) -> list[str]:
    """Go on from a file; returns what was warned of."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        saver = ModelCheckpoint(path.parent / "again")
        trainer(**{"max_epochs": 2, "callbacks": saver, **arguments}).fit(model, data, ckpt_path=path)
    return [str(one.message) for one in found]


OTHER = "a.ckpt was saved by a run with other settings:\n  "
AFRESH = (
    "A scheduler's course is in the checkpoint, so other arguments for it change nothing. To start the optimizer "
    "and its scheduler afresh, empty checkpoint['optimizer_states'] and checkpoint['lr_schedulers'] in "
    "on_load_checkpoint."
)


class Configured(Toy):
    """Configures its optimizer as it is told to."""

    configure: Callable[[Any], Any]

    def configure_optimizers(self) -> Any:
        return self.configure(self.parameters())


def with_optimizer(configure: Callable[[Any], Any], cls: type[Configured] = Configured) -> Configured:
    model = cls()
    model.configure = configure
    return model


class TestHyperparameters:
    def test_changed_added_and_gone(self, tmp_path: Path) -> None:
        class Deep(Toy):
            def __init__(self, **given: Any) -> None:
                pl.LightningModule.__init__(self)
                self.save_hyperparameters()
                self.layer = torch.nn.Linear(3, 1)
                self.seen = []

            def configure_optimizers(self) -> Any:
                return torch.optim.SGD(self.parameters(), lr=0.1)

        then = {
            "net": {"width": 3, "names": ["a", "b"]},
            "space": Namespace(drop=0.1),
            "weights": torch.tensor([1.0, 2.0]),
            "text": "x" * 70,
            "old": None,
            "same": float("nan"),
            "path": Path("here"),
            "activation": torch.relu,
            "int": 1,
        }
        now = {
            **then,
            "net": {"width": 4, "names": ["a", "c"]},
            "space": Namespace(drop=0.2),
            "weights": torch.tensor([1.0, 3.0]),
            "text": "x" * 71,
            "new": True,
            "activation": torch.tanh,
            "int": 1.0,
        }
        del now["old"]
        with pytest.warns(UserWarning, match="activation is not in the checkpoint"):
            path = save(tmp_path, Deep(**then), rows())
        assert go_on(path, Deep(**now), rows()) == [
            OTHER + "hyperparameter net.width: 3 -> 4\n"
            "  hyperparameter net.names: ['a', 'b'] -> ['a', 'c']\n"
            "  hyperparameter space.drop: 0.1 -> 0.2\n"
            "  hyperparameter weights: tensor of shape (2,) -> another tensor of shape (2,)\n"
            f"  hyperparameter text: {'x' * 57}... -> another {'x' * 57}...\n"
            "  hyperparameter old: None -> not given\n"
            "  hyperparameter new: not given -> True"
        ]

    def test_those_of_the_datamodule(self, tmp_path: Path) -> None:
        class Data(pl.LightningDataModule):
            def __init__(self, root: str) -> None:
                super().__init__()
                self.save_hyperparameters()

            def train_dataloader(self) -> Any:
                return rows()

        path = save(tmp_path, Toy(), Data("a"))
        assert go_on(path, Toy(), Data("b")) == [OTHER + "hyperparameter of the datamodule, root: a -> b"]

    def test_what_training_itself_has_changed_is_no_difference(self, tmp_path: Path) -> None:
        class Counts(Toy):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                self.hparams.width += 1
                self.hparams.steps = batch_idx
                return super().training_step(batch, batch_idx)

        path = save(tmp_path, Counts(), rows())
        assert load(path)["hyper_parameters"]["width"] == 6
        assert go_on(path, Counts(), rows()) == []
        assert go_on(path, Counts(lr=0.2), rows())[0].startswith(OTHER + "hyperparameter lr: 0.1 -> 0.2")


class TestOptimizers:
    def test_another_learning_rate_changes_nothing_and_says_so(self, tmp_path: Path) -> None:
        path = save(tmp_path, Toy(), rows())
        model = Toy(lr=0.5)
        assert go_on(path, model, rows()) == [
            OTHER + "hyperparameter lr: 0.1 -> 0.5\n"
            "  learning rate of SGD, group 0: 0.1 -> 0.5 (the checkpoint's is gone on with)"
        ]
        assert model.optimizers().param_groups[0]["lr"] == 0.1

    def test_a_schedulers_start_does_not_hide_the_rate_that_was_given(self, tmp_path: Path) -> None:
        def warm(lr: float) -> Configured:
            def configure(parameters: Any) -> Any:
                optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9)
                return [optimizer], [lr_scheduler.LinearLR(optimizer, 0.5, total_iters=4)]

            return with_optimizer(configure)

        path, model = save(tmp_path, warm(0.1), rows()), warm(0.4)
        assert go_on(path, model, rows()) == [
            OTHER + "learning rate of SGD, group 0: 0.1 -> 0.4 (the checkpoint's is gone on with)"
        ]
        assert model.optimizers().param_groups[0]["lr"] == pytest.approx(0.1 * (0.5 + 2 * 0.125))

    def test_options_groups_and_schedulers(self, tmp_path: Path) -> None:
        def configured(decay: float, gamma: float, momentum: float) -> Configured:
            def configure(parameters: Any) -> Any:
                groups = [{"params": [one], "weight_decay": decay} for one in parameters]
                optimizer = torch.optim.SGD(groups, lr=0.1, momentum=momentum)
                steps = lr_scheduler.StepLR(optimizer, 1, gamma)
                return [optimizer], [lr_scheduler.SequentialLR(optimizer, [steps], [])]

            return with_optimizer(configure)

        path = save(tmp_path, configured(0.0, 0.5, 0.9), rows())
        assert go_on(path, configured(0.01, 0.6, 0.9), rows()) == [
            OTHER + "weight_decay of SGD, group 0: 0.0 -> 0.01 (the checkpoint's is gone on with)\n"
            "  weight_decay of SGD, group 1: 0.0 -> 0.01 (the checkpoint's is gone on with)\n"
            "  schedulers[0].gamma of SequentialLR: 0.5 -> 0.6 (the checkpoint's is gone on with)"
        ]

    def test_many_groups_are_not_all_listed(self, tmp_path: Path) -> None:
        def configured(lr: float) -> Configured:
            more = [torch.nn.Parameter(torch.zeros(1)) for _ in range(6)]
            return with_optimizer(
                lambda parameters: torch.optim.SGD([{"params": [one]} for one in [*parameters, *more]], lr=lr)
            )

        path = save(tmp_path, configured(0.1), rows())
        [found] = go_on(path, configured(0.2), rows())
        assert found.splitlines()[-2:] == [
            "  learning rate of SGD, group 3: 0.1 -> 0.2 (the checkpoint's is gone on with)",
            "  ... and the same of 4 more groups",
        ]

    def test_another_class(self, tmp_path: Path) -> None:
        def configured(optimizer_class: Any, scheduler_class: Any) -> Configured:
            def configure(parameters: Any) -> Any:
                optimizer = optimizer_class(parameters, lr=0.1)
                return [optimizer], [scheduler_class(optimizer, 1)]

            return with_optimizer(configure)

        path = save(tmp_path, configured(torch.optim.Adam, lr_scheduler.StepLR), rows())
        assert go_on(path, configured(torch.optim.AdamW, lr_scheduler.ExponentialLR), rows()) == [
            OTHER + "optimizer 0: Adam -> AdamW (the checkpoint's is gone on with)\n"
            "  LR scheduler 0: StepLR -> ExponentialLR (the checkpoint's is gone on with)"
        ]

    def test_a_schedule_that_was_made_for_the_old_limit(self, tmp_path: Path) -> None:
        def cycle() -> Configured:
            def configure(parameters: Any) -> Any:
                optimizer = torch.optim.SGD(parameters, lr=0.1)
                steps = int(model.trainer.estimated_stepping_batches)
                schedule = lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
                return [optimizer], [{"scheduler": schedule, "interval": "step"}]

            model = with_optimizer(configure)
            return model

        path = save(tmp_path, cycle(), rows())
        with (
            pytest.warns(UserWarning, match="OneCycleLR") as warned,
            pytest.raises(ValueError, match="Tried"),
        ):
            trainer(max_epochs=4, callbacks=ModelCheckpoint(tmp_path / "again")).fit(
                cycle(), rows(), ckpt_path=path
            )
        assert [str(one.message) for one in warned] == [
            OTHER + "total_steps of OneCycleLR: 6 -> 12 (the checkpoint's is gone on with)",
            "OneCycleLR has brought the learning rate of SGD down to about 0 (group 0: 4e-07), and training goes "
            f"on with that. {AFRESH}",
        ]


class TestOverSeveralStarts:
    def test_it_is_compared_with_what_trains_and_not_with_what_was_asked_for(self, tmp_path: Path) -> None:
        """A rate that was asked for in vain is not what the third start goes on from."""

        def model(lr: float) -> Configured:
            return with_optimizer(lambda parameters: torch.optim.SGD(parameters, lr=lr))

        first = save(tmp_path, model(0.1), rows())
        rate = "learning rate of SGD, group 0: {} -> {} (the checkpoint's is gone on with)"
        assert go_on(first, model(0.2), rows()) == [OTHER + rate.format(0.1, 0.2)]
        (second,) = (tmp_path / "again").iterdir()
        name = OTHER.replace("a.ckpt", second.name)
        more = {"callbacks": ModelCheckpoint(tmp_path / "third"), "max_epochs": 3}
        assert go_on(second, model(0.2), rows(), **more) == [name + rate.format(0.1, 0.2)]
        (third,) = (tmp_path / "third").iterdir()
        last = {"callbacks": ModelCheckpoint(tmp_path / "fourth"), "max_epochs": 4}
        assert go_on(third, model(0.1), rows(), **last) == []


class TestSettingsAndData:
    def test_the_trainers_settings(self, tmp_path: Path) -> None:
        path = save(tmp_path, Toy(), rows())
        changed: dict[str, Any] = {
            "accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "precision": "bf16-mixed",
        }  # fmt: skip
        assert go_on(path, Toy(), rows(), **changed) == [
            OTHER + "precision: 32-true -> bf16-mixed\n"
            "  accumulate_grad_batches: 1 -> 2\n"
            "  gradient_clip_val: None -> 0.5"
        ]

    def test_rows_and_their_order(self, tmp_path: Path) -> None:
        path = save(tmp_path, Toy(), rows(shuffle=True))
        assert go_on(path, Toy(), rows(15, shuffle=True)) == [
            OTHER + "rows in the training data: 12 -> 15 (the rest of the epoch comes in another order)"
        ]
        assert go_on(path, Toy(), rows()) == [
            OTHER + "sampler of the training data: RandomSampler -> SequentialSampler"
        ]

    def test_the_batch_size(self, tmp_path: Path) -> None:
        path, model = save(tmp_path, Toy(), rows()), Toy()
        assert go_on(path, model, rows(batch_size=2)) == [
            OTHER + "batch size of the training data: 4 -> 2 (the epoch goes on at the same row)"
        ]
        assert model.seen == [8, 9, 10, 11]

    def test_the_number_of_batches(self, tmp_path: Path) -> None:
        path = save(tmp_path, Toy(), rows())
        assert go_on(path, Toy(), rows(), limit_train_batches=2, max_epochs=3) == [
            OTHER + "batches in a training epoch: 3 -> 2"
        ]

    def test_another_split(self, tmp_path: Path) -> None:
        def half(seed: int) -> DataLoader[Any]:
            whole = TensorDataset(torch.rand(24, 3), torch.arange(24))
            return DataLoader(random_split(whole, [12, 12], torch.Generator().manual_seed(seed))[0], 4)

        path = save(tmp_path, Toy(), half(1))
        assert go_on(path, Toy(), half(1)) == []
        assert go_on(path, Toy(), half(2)) == [
            OTHER + "rows of the training data: not the same ones (was the split drawn with another seed?)"
        ]

    def test_validation_data(self, tmp_path: Path) -> None:
        class Validated(Toy):
            def validation_step(self, batch: Any, batch_idx: int) -> None:
                self.loss(batch)

            def val_dataloader(self) -> Any:
                return self.data

        def model(*data: Any) -> Toy:
            made = Validated()
            made.data = list(data)
            return made

        path = save(tmp_path, model(rows(4), rows(4)), rows())
        assert go_on(path, model(rows(4), rows(8)), rows()) == [OTHER + "rows in validation loader 1: 4 -> 8"]
        assert go_on(path, model(rows(4)), rows()) == [OTHER + "validation loaders: 2 -> 1"]

    def test_workers_matter_where_each_reads_for_itself(self, tmp_path: Path) -> None:
        class Stream(IterableDataset[Any]):
            def __iter__(self) -> Any:
                return iter(rows(12).dataset)

        path = save(tmp_path / "map", Toy(), rows())
        assert go_on(path, Toy(), rows(num_workers=1)) == []
        path = save(tmp_path / "stream", Toy(), DataLoader(Stream(), 4))
        assert go_on(path, Toy(), DataLoader(Stream(), 4, num_workers=1)) == [
            OTHER
            + "workers of the training data: 0 -> 1 (each worker of an iterable dataset reads and draws "
            "for itself)"
        ]


def tf32(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """What a checkpoint of a run on a GPU would hold of TF32."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    found = command.environment(torch.device("cuda"))
    return found["TF32 in matmul"], found["TF32 in cudnn"]


class TestEnvironment:
    def test_threads_and_algorithms(self, tmp_path: Path) -> None:
        path = save(tmp_path, Toy(), rows())
        torch.set_num_threads(2)
        assert go_on(path, Toy(), rows(), deterministic=True) == [
            OTHER + "threads: 1 -> 2 (bits may differ)\n"
            "  deterministic algorithms: False -> True (bits may differ)"
        ]

    def test_a_file_from_another_machine(self, tmp_path: Path) -> None:
        class FromElsewhere(Toy):
            def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
                checkpoint["holdfast"]["environment"] |= {
                    "torch": "2.0", "numpy": None, "python": "3.9.1", "machine": "riscv64",
                    "cpu_capability": "DEFAULT", "float32_matmul_precision": "medium", "gpus": ["one"],
                }  # fmt: skip

        import platform

        import numpy

        path = save(tmp_path, Toy(), rows())
        python = ".".join(platform.python_version_tuple()[:2])
        assert go_on(path, FromElsewhere(), rows()) == [
            OTHER + f"torch: 2.0 -> {torch.__version__} (bits may differ)\n"
            f"  numpy: None -> {numpy.__version__} (bits may differ)\n"
            f"  python: 3.9 -> {python} (bits may differ)\n"
            f"  machine: riscv64 -> {platform.machine()} (bits may differ)\n"
            f"  CPU capability: DEFAULT -> {torch.backends.cpu.get_cpu_capability()} (bits may differ)\n"
            "  float32 matmul precision: medium -> highest (bits may differ)"
        ]

    @pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="torch from 2.9 on has it")
    def test_float32_precision_by_torchs_newer_switches(self, tmp_path: Path) -> None:
        """Once one of them is set, asking torch's older function for the precision is an error."""
        path = save(tmp_path, Toy(), rows())
        matmul = torch.backends.cuda.matmul
        before = matmul.fp32_precision
        matmul.fp32_precision = "tf32"
        try:
            said = go_on(path, Toy(), rows())
            (tmp_path / "other").mkdir()
            path = save(tmp_path / "other", Toy(), rows())
            assert go_on(path, Toy(), rows()) == []
        finally:
            matmul.fp32_precision = before
        now = f"tf32 (cuda), {torch.backends.mkldnn.matmul.fp32_precision} (mkldnn)"
        assert said == [OTHER + f"float32 matmul precision: highest -> {now} (bits may differ)"]
        assert go_on(path, Toy(), rows()) == [
            OTHER + f"float32 matmul precision: {now} -> highest (bits may differ)"
        ]

    def test_tf32_on_a_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Asked of torch as on a GPU, which need not be here."""
        matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        before = matmul.allow_tf32, cudnn.allow_tf32
        assert tf32(monkeypatch) == before
        try:
            matmul.allow_tf32, cudnn.allow_tf32 = not before[0], not before[1]
            assert tf32(monkeypatch) == (not before[0], not before[1])
        finally:
            matmul.allow_tf32, cudnn.allow_tf32 = before

    @pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="torch from 2.9 on has it")
    def test_tf32_on_a_gpu_by_torchs_newer_switches(self, monkeypatch: pytest.MonkeyPatch) -> None:
        matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
        before = matmul.fp32_precision, conv.fp32_precision
        try:
            matmul.fp32_precision, conv.fp32_precision = "tf32", "ieee"
            assert tf32(monkeypatch) == (True, "ieee (conv), tf32 (rnn)")
        finally:
            matmul.fp32_precision, conv.fp32_precision = before

    def test_a_file_of_a_version_that_knew_less(self, tmp_path: Path) -> None:
        class Older(Toy):
            def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
                del checkpoint["holdfast"]["command"], checkpoint["holdfast"]["own_generators"]
                for name in ("numpy", "python"):
                    del checkpoint["holdfast"]["environment"][name]

        path = save(tmp_path, Toy(), rows())
        assert go_on(path, Older(), rows()) == []
        assert go_on(path, Older(lr=0.2), rows(batch_size=2)) == [
            OTHER + "hyperparameter lr: 0.1 -> 0.2\n"
            "  batch size of the training data: 4 -> 2 (the epoch goes on at the same row)"
        ]


class TestAlreadyFinished:
    def last(self, path: Path, said: list[str], model: Any = None, **arguments: Any) -> str:
        said.clear()
        run = trainer(**arguments)
        run.fit(model or Toy(), rows(), ckpt_path=path)
        return said[-1]

    def finish(self, root: Path, model: Any = None, **arguments: Any) -> Path:
        run = trainer(**arguments)
        run.fit(model or Toy(), rows())
        run.save_checkpoint(root / "a.ckpt")
        return root / "a.ckpt"

    def test_by_epochs_and_by_steps(self, tmp_path: Path, said: list[str]) -> None:
        path = self.finish(tmp_path, max_epochs=2)
        assert self.last(path, said, max_epochs=2) == (
            "already finished: max_epochs=2 reached (2 epochs, 6 steps are done). Raise it to train on."
        )
        assert self.last(path, said, max_epochs=1) == (
            "already finished: max_epochs=1 reached (2 epochs, 6 steps are done). Raise it to train on."
        )
        assert self.last(path, said, max_epochs=9, max_steps=6) == (
            "already finished: max_steps=6 reached (2 epochs, 6 steps are done). Raise it to train on."
        )

    def test_by_time(self, tmp_path: Path, said: list[str]) -> None:
        path = self.finish(tmp_path, max_epochs=2, callbacks=[Timer("00:01:00:00")])

        class Late(Timer):
            @property
            def state_key(self) -> str:
                return "Timer"

            def load_state_dict(self, state_dict: dict[str, Any]) -> None:
                super().load_state_dict({"time_elapsed": {"train": 3600.0}})

        assert self.last(path, said, max_epochs=9, callbacks=[Late("00:01:00:00")]) == (
            "already finished: the time for training, 1:00:00, is up (2 epochs, 6 steps are done). Raise it to "
            "train on."
        )

    def test_by_early_stopping(self, tmp_path: Path, said: list[str]) -> None:
        class Flat(Toy):
            def on_train_epoch_end(self) -> None:
                self.log("flat", 1.0)

        path = self.finish(tmp_path, Flat(), max_epochs=9, callbacks=[EarlyStopping("flat", patience=1)])
        again = {"max_epochs": 9, "callbacks": [EarlyStopping("flat", patience=1)]}
        assert self.last(path, said, Flat(), **again) == (
            "already finished: EarlyStopping stopped the run (2 epochs, 6 steps are done): flat did not improve "
            "once. The best was 1. Raise max_epochs or max_steps to train on."
        )

    def test_by_the_users_word(self, tmp_path: Path, said: list[str]) -> None:
        class Stops(Toy):
            def on_train_epoch_end(self) -> None:
                self.trainer.should_stop = True

        path = self.finish(tmp_path, Stops(), max_epochs=9)
        assert self.last(path, said, Stops(), max_epochs=9) == (
            "already finished: the run was told to stop, by trainer.should_stop (1 epoch, 3 steps are done). "
            "Raise max_epochs or max_steps to train on."
        )


def scheduled(make: Callable[[Any], Any], interval: str = "epoch") -> Configured:
    def configure(parameters: Any) -> Any:
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        return [optimizer], [{"scheduler": make(optimizer), "interval": interval}]

    return with_optimizer(configure)


class TestRatesOfAbout0:
    def finish(self, root: Path, model: Any, **arguments: Any) -> Path:
        run = trainer(**{"max_epochs": 2, **arguments})
        run.fit(model, rows())
        run.save_checkpoint(root / "a.ckpt")
        return root / "a.ckpt"

    @pytest.mark.parametrize(
        ("make", "rises"),
        [
            (lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 2), " It rises again from here."),
            (lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda epoch: max(0.0, 1 - epoch / 2)), ""),
            (lambda optimizer: lr_scheduler.PolynomialLR(optimizer, 2), ""),
        ],
    )
    def test_a_run_that_goes_further_than_its_schedule(self, tmp_path: Path, make: Any, rises: str) -> None:
        path = self.finish(tmp_path, scheduled(make))
        name = type(make(torch.optim.SGD(Toy().parameters(), lr=0.1))).__name__
        assert go_on(path, scheduled(make), rows(), max_epochs=4) == [
            f"{name} has brought the learning rate of SGD down to about 0 (group 0: 0), and training goes on "
            f"with that.{rises} {AFRESH}"
        ]

    def test_one_cycle_takes_no_more_steps(self, tmp_path: Path) -> None:
        def cycle() -> Configured:
            return scheduled(lambda one: lr_scheduler.OneCycleLR(one, 0.1, total_steps=6), "step")

        path = self.finish(tmp_path, cycle())
        with (
            pytest.warns(UserWarning, match="OneCycleLR") as warned,
            pytest.raises(ValueError, match="Tried"),
        ):
            trainer(max_epochs=4).fit(cycle(), rows(), ckpt_path=path)
        assert [str(one.message) for one in warned] == [
            f"OneCycleLR has done all of its total_steps=6, and its next step is an error. {AFRESH}"
        ]

    def test_what_the_message_advises_works(self, tmp_path: Path) -> None:
        def made() -> Configured:
            return scheduled(lambda optimizer: lr_scheduler.PolynomialLR(optimizer, 2))

        class Afresh(Configured):
            def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
                checkpoint["optimizer_states"] = []
                checkpoint["lr_schedulers"] = []

        path, model = self.finish(tmp_path, made()), with_optimizer(made().configure, Afresh)
        assert go_on(path, model, rows(), max_epochs=3) == []
        assert model.optimizers().param_groups[0]["lr"] == pytest.approx(0.05)

    @pytest.mark.parametrize(
        "make",
        [
            lambda optimizer: lr_scheduler.LinearLR(optimizer, 1e-9, total_iters=9),
            lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda epoch: float(epoch > 3)),
            lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 2),
            lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 2),
            lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 1e-4),
        ],
    )
    def test_the_same_command_is_not_warned_of_its_own_schedule(self, tmp_path: Path, make: Any) -> None:
        saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        trainer(callbacks=saver, max_epochs=5).fit(scheduled(make), rows())
        for epoch in range(4):
            path = tmp_path / f"epoch={epoch}.ckpt"
            assert go_on(path, scheduled(make), rows(), max_epochs=5) == []

    def test_a_schedule_that_has_ended_too_early_is_told_of(self, tmp_path: Path) -> None:
        def made() -> Configured:
            return scheduled(lambda optimizer: lr_scheduler.PolynomialLR(optimizer, 2))

        saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        trainer(callbacks=saver, max_epochs=5).fit(made(), rows())
        assert go_on(tmp_path / "epoch=0.ckpt", made(), rows(), max_epochs=5) == []
        assert "PolynomialLR has brought" in go_on(tmp_path / "epoch=1.ckpt", made(), rows(), max_epochs=5)[0]
        assert go_on(tmp_path / "epoch=4.ckpt", made(), rows(), max_epochs=5) == []


class Kept(pl.Callback):
    def state_dict(self) -> dict[str, Any]:
        return {"kept": 1}


class TestFirstLine:
    def test_what_is_restored_and_what_is_not(self, tmp_path: Path, said: list[str]) -> None:
        class Scheduled(Toy):
            def configure_optimizers(self) -> Any:
                optimizer = super().configure_optimizers()
                return [optimizer], [lr_scheduler.StepLR(optimizer, 1)]

            def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
                checkpoint["lr_schedulers"] = []

        class Logs(Scheduled):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                loss = super().training_step(batch, batch_idx)
                self.log("x", loss)
                return loss

        path = save(tmp_path, Scheduled(), rows(), callbacks=[Timer(), Kept()])
        said.clear()
        with pytest.warns(UserWarning, match="callbacks that this trainer does not have"):
            trainer(max_epochs=2, callbacks=[Timer(), EarlyStopping("x", strict=False, patience=9)]).fit(
                Logs(), rows(), ckpt_path=path
            )
        assert said[:2] == [
            "on_load_checkpoint has emptied 'lr_schedulers': the LR schedulers start afresh",
            f"resumed from {os.path.relpath(path)}  step 5  restored: weights, 1 optimizer(s), 2 callback(s), "
            "generators  not restored: scheduler(s) (on_load_checkpoint has emptied 'lr_schedulers'), Kept (no such "
            "callback in this trainer), EarlyStopping (the checkpoint holds no state of it)  goes on at epoch 1, "
            "batch 2",
        ]
