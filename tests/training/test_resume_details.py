"""Things that a resume has to put back and that are easily forgotten, each with the run that needs it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, Sampler

import holdfast as pl
from holdfast.callbacks import ModelCheckpoint
from holdfast.checkpoint import catalog
from tests.training.toys import Toy, rows, trainer


class Rows(Dataset[Any]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        return torch.full((3,), float(index)) / 12 + torch.rand(3), index


class Validated(Toy):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))


def assert_every_resume_is_exact(
    root: Path,
    model: Callable[[], pl.LightningModule],
    train: Callable[[], Any],
    val: Callable[[], Any] = lambda: None,
    **arguments: Any,
) -> None:
    """Train once, saving at every batch; then go on from each of those files and compare what comes out."""

    def run(callback: ModelCheckpoint, path: Path | None) -> tuple[pl.LightningModule, pl.Trainer]:
        pl.seed_everything(4, verbose=False)
        made = trainer(callbacks=callback, **{"max_epochs": 2, "num_sanity_val_steps": 0, **arguments})
        module = model()
        if path is not None:
            # A new process: its generators stand somewhere else.
            pl.seed_everything(5, verbose=False)
        made.fit(module, train(), val(), ckpt_path=path)
        return module, made

    callback = ModelCheckpoint(root, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole, whole_run = run(callback, None)
    files = sorted(root.glob("*.ckpt"))
    assert len(files) >= 4
    for path in files:
        again = ModelCheckpoint(root / "again", filename="{step}", every_n_train_steps=1, save_top_k=-1)
        resumed, resumed_run = run(again, path)
        for name, value in whole.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name]), f"{name} after a resume from {path.name}"
        expected = {name: value.item() for name, value in whole_run.callback_metrics.items()}
        found = {name: value.item() for name, value in resumed_run.callback_metrics.items()}
        assert found == expected, f"metrics after a resume from {path.name}"


def test_torchmetrics_objects(tmp_path: Path) -> None:
    torchmetrics = pytest.importorskip("torchmetrics")

    class Measured(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.mean = torchmetrics.MeanMetric()
            self.all = torchmetrics.CatMetric()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.mean(loss)
            self.all(loss)
            self.log("mean", self.mean, on_step=False, on_epoch=True)
            return loss

        def on_train_epoch_end(self) -> None:
            self.log("spread", self.all.compute().std())
            self.all.reset()

    assert_every_resume_is_exact(tmp_path, Measured, rows)


def test_the_generator_of_a_sampler_inside_a_batch_sampler(tmp_path: Path) -> None:
    def loader() -> Any:
        sampler = RandomSampler(Rows(), generator=torch.Generator().manual_seed(1))
        return DataLoader(Rows(), batch_sampler=BatchSampler(sampler, 4, drop_last=False))

    assert_every_resume_is_exact(tmp_path, Toy, loader)


@pytest.mark.parametrize("make", [numpy.random.default_rng, numpy.random.RandomState, random.Random])
def test_a_samplers_generator_of_another_kind(tmp_path: Path, make: Any) -> None:
    class Shuffled(Sampler[int]):
        def __init__(self) -> None:
            self.rng = make(3)

        def __iter__(self) -> Iterator[int]:
            order = list(range(12))
            self.rng.shuffle(order)
            return iter(order)

        def __len__(self) -> int:
            return 12

    assert_every_resume_is_exact(tmp_path, Toy, lambda: DataLoader(Rows(), 4, sampler=Shuffled()))


@pytest.mark.parametrize("reduce_fx", [max, torch.max, "max"])
def test_a_reduction_in_every_spelling(tmp_path: Path, reduce_fx: Any) -> None:
    class Worst(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.log("worst", loss, on_step=False, on_epoch=True, reduce_fx=reduce_fx)
            return loss

    assert_every_resume_is_exact(tmp_path, Worst, rows)


def test_half_of_a_pair_of_numpys_normal_numbers(tmp_path: Path) -> None:
    class Noisy(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step([batch[0] + float(numpy.random.randn()), batch[1]], batch_idx)

    assert_every_resume_is_exact(tmp_path, Noisy, lambda: DataLoader(Rows(), 4, shuffle=True))


def test_a_validation_loaders_own_generator(tmp_path: Path) -> None:
    def val() -> Any:
        return DataLoader(Rows(), 4, shuffle=True, generator=torch.Generator().manual_seed(2))

    assert_every_resume_is_exact(tmp_path, Validated, rows, val, limit_val_batches=2)


def test_one_generator_for_both_loaders(tmp_path: Path) -> None:
    shared = torch.Generator()

    def train() -> Any:
        shared.manual_seed(9)
        return DataLoader(Rows(), 3, shuffle=True, generator=shared)

    def val() -> Any:
        return DataLoader(Rows(), 4, shuffle=True, generator=shared)

    assert_every_resume_is_exact(tmp_path, Validated, train, val, val_check_interval=0.5)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sampler_that_draws_as_it_goes(tmp_path: Path, workers: int) -> None:
    class Lazy(Sampler[list[int]]):
        def __iter__(self) -> Iterator[list[int]]:
            for _ in range(3):
                yield [random.randrange(12) for _ in range(3)] + [int(torch.randint(12, ()))]

        def __len__(self) -> int:
            return 3

    class Noisy(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step([batch[0] + random.random() + torch.rand(()), batch[1]], batch_idx)

    assert_every_resume_is_exact(
        tmp_path, Noisy, lambda: DataLoader(Rows(), batch_sampler=Lazy(), num_workers=workers)
    )


def test_a_loader_that_is_made_while_optimizers_are_configured(tmp_path: Path) -> None:
    class Cycle(Toy):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            steps = int(self.trainer.estimated_stepping_batches)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    assert_every_resume_is_exact(tmp_path, Cycle, lambda: DataLoader(Rows(), 4))


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        for index in range(12):
            yield torch.rand(3) + random.random(), index


def test_an_iterable_with_persistent_workers(tmp_path: Path) -> None:
    class Noisy(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step([batch[0] + torch.rand(()), batch[1]], batch_idx)

    assert_every_resume_is_exact(
        tmp_path, Noisy, lambda: DataLoader(Stream(), 4, num_workers=1, persistent_workers=True)
    )


class Stateful:
    """A loader that knows its own position; ``length`` None hides how long it is."""

    def __init__(self, *, sized: bool) -> None:
        self.position = 0
        if sized:
            self.__class__ = SizedStateful

    def __iter__(self) -> Iterator[Any]:
        while self.position < 6:
            self.position += 1
            ids = torch.arange(2) + 2 * self.position
            yield torch.rand(2, 3) + ids[:, None], ids
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class SizedStateful(Stateful):
    def __len__(self) -> int:
        return 6


@pytest.mark.parametrize("sized", [True, False])
def test_a_loader_with_a_state_of_its_own(tmp_path: Path, sized: bool) -> None:
    assert_every_resume_is_exact(
        tmp_path,
        Validated,
        lambda: Stateful(sized=sized),
        rows,
        **({"val_check_interval": 2} if sized else {}),
    )


def test_a_second_resume_from_a_file_of_a_resumed_run(tmp_path: Path) -> None:
    def run(path: Path | None, where: Path, stop: int) -> list[int]:
        pl.seed_everything(4, verbose=False)
        callback = ModelCheckpoint(where, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        module = Validated()
        trainer(callbacks=callback, max_steps=stop, max_epochs=None, val_check_interval=1).fit(
            module, Stateful(sized=True), rows(), ckpt_path=path
        )
        return module.seen

    whole = run(None, tmp_path / "whole", 6)
    first = run(None, tmp_path / "first", 2)
    second = run(tmp_path / "first" / "step=2.ckpt", tmp_path / "second", 4)
    third = run(tmp_path / "second" / "step=4.ckpt", tmp_path / "third", 6)
    assert first + second + third == whole


def test_a_file_saved_inside_validation_does_not_bring_its_modes(tmp_path: Path) -> None:
    class Saves(Validated):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            assert self.training
            return super().training_step(batch, batch_idx)

        def on_validation_epoch_end(self) -> None:
            self.trainer.save_checkpoint(tmp_path / "inside.ckpt")

    trainer(num_sanity_val_steps=0).fit(Saves(), rows(), rows())
    run = trainer(max_epochs=2)
    with pytest.warns(UserWarning, match="inside.ckpt was not taken at a safe point"):
        run.fit(Saves(), rows(), rows(), ckpt_path=tmp_path / "inside.ckpt")
    assert run.global_step == 6


def test_an_exception_inside_validation_leaves_the_modes_as_they_were(tmp_path: Path) -> None:
    class Breaks(Validated):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            raise RuntimeError("in validation")

    model, run = Breaks(), trainer(num_sanity_val_steps=0)
    with pytest.raises(RuntimeError, match="in validation"):
        run.fit(model, rows(), rows())
    assert model.training
    run.save_checkpoint(tmp_path / "broken off.ckpt")
    assert not catalog.read_summary(tmp_path / "broken off.ckpt").exact


def test_a_higher_limit_goes_on_inside_the_epoch_that_the_lower_one_cut_short(tmp_path: Path) -> None:
    def run(steps: int, path: Path | None) -> list[int]:
        callback = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1)
        model = Toy()
        trainer(callbacks=callback, max_steps=steps, max_epochs=None).fit(model, rows(20), ckpt_path=path)
        return model.seen

    assert run(3, None) == list(range(12))
    assert run(7, tmp_path / "step=3.ckpt") == [*range(12, 20), *range(8)]


def test_a_higher_limit_goes_on_inside_the_epoch_of_data_without_a_length(tmp_path: Path) -> None:
    class Endless(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return ((torch.ones(3), row) for row in range(20))

    def run(steps: int, path: Path | None) -> list[int]:
        callback = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1)
        model, data = Toy(), DataLoader(Endless(), batch_size=4)
        trainer(callbacks=callback, max_steps=steps, max_epochs=None).fit(model, data, ckpt_path=path)
        return model.seen

    assert run(3, None) == list(range(12))
    assert run(5, tmp_path / "step=3.ckpt") == list(range(12, 20))
    assert run(7, tmp_path / "step=5.ckpt") == list(range(8))


def test_an_epoch_whose_rest_a_hook_skipped_is_over_with_higher_limits_too(tmp_path: Path) -> None:
    class Skips(Toy):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 2 else None

        def on_train_epoch_end(self) -> None:
            ended.append(self.current_epoch)

    def run(epochs: int, path: Path | None) -> list[int]:
        model = Skips()
        trainer(callbacks=ModelCheckpoint(tmp_path, "{step}"), max_epochs=epochs).fit(
            model, rows(), ckpt_path=path
        )
        return model.seen

    ended: list[int] = []
    assert run(1, None) == list(range(8))
    assert run(2, tmp_path / "step=2.ckpt") == list(range(8))
    assert ended == [0, 1]


def test_what_is_saved_after_a_fit_that_a_limit_ended_within_an_epoch_is_not_exact(tmp_path: Path) -> None:
    run = trainer(max_steps=2, max_epochs=None)
    run.fit(Toy(), rows())
    run.save_checkpoint(tmp_path / "after.ckpt")
    assert not catalog.read_summary(tmp_path / "after.ckpt").exact
    with pytest.raises(pl.ConfigError) as refused:
        trainer(max_epochs=3, exact="require").fit(Toy(), rows(), ckpt_path=tmp_path / "after.ckpt")
    assert str(refused.value) == (
        'Trainer(exact="require") refuses this run, and nothing was trained. It would not be exact:\n'
        "  after.ckpt was saved after a limit had ended its epoch early, and a run goes on from it with the next "
        "epoch: the rest of that one is left out. Go on from the last checkpoint of ModelCheckpoint."
        '\nStart it as it was started, or train all the same with exact="warn".'
    )
    run = trainer(max_steps=3, max_epochs=None)
    run.fit(Toy(), rows())
    run.save_checkpoint(tmp_path / "after.ckpt")
    assert catalog.read_summary(tmp_path / "after.ckpt").exact


def test_another_batch_size_goes_on_at_the_same_row(tmp_path: Path) -> None:
    def run(size: int, path: Path | None, steps: int) -> list[int]:
        callback = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        model = Toy()
        trainer(callbacks=callback, max_steps=steps, max_epochs=1).fit(model, rows(24, size), ckpt_path=path)
        return model.seen

    assert run(4, None, 3) == list(range(12))
    with pytest.warns(UserWarning, match="batch size of the training data: 4 -> 6"):
        assert run(6, tmp_path / "step=3.ckpt", 9) == list(range(12, 24))
    with pytest.warns(UserWarning, match="batch size of the training data: 4 -> 8"):
        assert run(8, tmp_path / "step=3.ckpt", 9) == list(range(12, 24))


class TestViewsBetweenRequests:
    def test_each_request_begins_with_none(self) -> None:
        class Tested(Validated):
            def test_step(self, batch: Any, batch_idx: int) -> None:
                self.log("test_loss", self.loss(batch))

        run, model = trainer(), Tested()
        run.fit(model, rows(), rows())
        assert set(run.callback_metrics) == {"loss", "val_loss"}
        run.test(model, rows(), verbose=False)
        assert set(run.callback_metrics) == {"test_loss"}

    def test_what_is_logged_when_training_starts_counts(self) -> None:
        class Starts(Toy):
            def on_train_start(self) -> None:
                self.log("parameters", 4.0)

        run = trainer()
        run.fit(Starts(), rows())
        assert run.callback_metrics == {"parameters": 4.0}

    def test_a_trial_run_has_a_logger_that_takes_anything(self) -> None:
        class Logs(Toy):
            def on_train_start(self) -> None:
                self.logger.log_metrics({"a": 1.0}, step=0)
                self.logger.experiment.add_image("image", None)
                self.logger.log_image(key="image", images=[])

        pl.Trainer(fast_dev_run=True, accelerator="cpu", enable_progress_bar=False).fit(Logs(), rows())

    def test_epoch_schedulers_step_after_a_skipped_rest(self) -> None:
        class Skips(Toy):
            def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
                return -1 if batch_idx == 1 else None

            def configure_optimizers(self) -> Any:
                optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
                return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]

        run = trainer(max_epochs=2)
        run.fit(Skips(), rows())
        assert run.optimizers[0].param_groups[0]["lr"] == 0.25


def test_logs_go_on_where_they_were_when_checkpoints_lie_elsewhere_below_the_root(tmp_path: Path) -> None:
    def run(epochs: int) -> str | None:
        made = pl.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            default_root_dir=tmp_path,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=ModelCheckpoint(tmp_path / "lightning_logs" / "kept"),
        )
        made.fit(Toy(), rows(), ckpt_path="auto")
        return made.log_dir

    assert run(1) == run(2) == str(tmp_path / "lightning_logs" / "version_0")
