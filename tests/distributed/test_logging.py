"""What ``self.log`` means in several processes: values of all the data, the same on every rank."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, TensorDataset

import holdfast as pl
from holdfast.callbacks import EarlyStopping, LambdaCallback, ModelCheckpoint
from holdfast.loggers import CSVLogger

from .ranks import run_ranks


class Net(pl.LightningModule):
    """Logs each row's number in a way of its own; what it learns is of no account."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def note(self, batch: Any, batch_idx: int) -> None:
        """Log something of a training batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.note(batch, batch_idx)
        return self.layer(batch[0]).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log something of a validation batch."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.001)


# Parts of unequal size, in batches of unequal size, of different numbers: the mean over all of them is 12.5.
PARTS = {0: [1.0, 2, 3, 4, 5], 1: [10.0, 20, 30, 40]}


def loader(rank: int, batch_size: int = 2) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.tensor(PARTS[rank]).unsqueeze(1)), batch_size=batch_size)


def make_trainer(root: Any = None, **arguments: Any) -> pl.Trainer:
    arguments = {
        "accelerator": "cpu", "strategy": "ddp", "logger": False, "enable_checkpointing": False,
        "max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 2, "num_sanity_val_steps": 0,
        "enable_progress_bar": False, "enable_model_summary": False, "use_distributed_sampler": False,
        "default_root_dir": root, **arguments,
    }  # fmt: skip
    return pl.Trainer(**arguments)


def numbers(metrics: Any) -> dict[str, float]:
    return {name: round(value.item(), 4) for name, value in sorted(metrics.items())}


class EveryReduction(Net):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        for reduction in ("mean", "sum", "min", "max"):
            self.log(reduction, batch[0].mean(), reduce_fx=reduction, sync_dist=True)
        self.log("own", batch[0].mean())
        self.log("number", float(batch[0].sum()), reduce_fx="sum", sync_dist=True)


def every_reduction() -> Any:
    trainer, calls = make_trainer(limit_val_batches=1.0), count_collectives()
    rank = trainer.global_rank
    found = trainer.validate(EveryReduction(), loader(rank, 2 + rank), verbose=False)
    return numbers(trainer.callback_metrics), found, len(calls)


def count_collectives() -> list[Any]:
    calls: list[Any] = []
    real = dist.all_gather

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[1].shape)
        return real(*args, **kwargs)

    dist.all_gather = counted
    return calls


def test_values_are_reduced_over_all_rows_once_an_epoch_in_one_collective() -> None:
    ranks = run_ranks(every_reduction)
    synced = {"max": 40.0, "mean": round(115 / 9, 4), "min": 1.5, "number": 115.0, "sum": 70.0}
    for rank, (metrics, found, calls) in enumerate(ranks):
        own = metrics.pop("own")
        assert own == [3.0, 25.0][rank]
        assert metrics == synced
        assert {name: round(value, 4) for name, value in found[0].items() if name != "own"} == synced
        assert calls == 1


class Steps(Net):
    def note(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", batch[0].mean(), on_step=True, on_epoch=True, sync_dist=True)
        self.log("own", batch[0].mean(), on_step=True)


def steps(root: str, every: int) -> Any:
    trainer = make_trainer(root, log_every_n_steps=every, logger=CSVLogger(root), limit_train_batches=4)
    PARTS.update({0: [float(i) for i in range(4)], 1: [10.0 + i for i in range(4)]})
    calls = count_collectives()
    trainer.fit(Steps(), loader(trainer.global_rank, 1))
    return numbers(trainer.callback_metrics), numbers(trainer.logged_metrics), len(calls)


def test_values_of_steps_are_reduced_where_they_are_logged_and_not_at_other_steps(tmp_path: Path) -> None:
    first, second = run_ranks(steps, str(tmp_path), 2)
    # At two of the four steps, when training starts, and at the epoch's end.
    assert first[2] == second[2] == 4
    assert first[0] == {"loss": 6.5, "loss_epoch": 6.5, "loss_step": 8.0, "own": 3.0}
    assert second[0] == {**first[0], "own": 13.0}
    assert first[1]["loss_step"] == second[1]["loss_step"] == 8.0
    rows = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()
    assert rows == [
        "epoch,loss_epoch,loss_step,own,step",
        "0,,6.0,1.0,1",
        "0,,8.0,3.0,3",
        "0,6.5,,,3",
    ]


class ManyNames(Net):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        for index in range(100):
            self.log(f"v{index}", batch[0].sum() + index, reduce_fx="sum", sync_dist=True)


def many_names() -> Any:
    trainer, calls = make_trainer(limit_val_batches=1), count_collectives()
    trainer.validate(ManyNames(), loader(trainer.global_rank), verbose=False)
    return numbers(trainer.callback_metrics)["v99"], len(calls)


def test_names_beyond_the_first_collective_take_one_more() -> None:
    assert run_ranks(many_names) == [(33.0 + 2 * 99, 2)] * 2


class AtTheEnd(Net):
    seen: float = 0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("in_step", batch[0].mean(), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        self.seen = self.trainer.callback_metrics["in_step"].item()
        self.log("in_hook", float(self.global_rank), sync_dist=True)


def at_the_end() -> Any:
    trainer, calls, model = make_trainer(limit_val_batches=1), count_collectives(), AtTheEnd()
    trainer.validate(model, loader(trainer.global_rank), verbose=False)
    return numbers(trainer.callback_metrics), model.seen, len(calls)


def test_a_hook_at_the_end_sees_reduced_values_and_what_it_logs_is_reduced_too() -> None:
    assert run_ranks(at_the_end) == [({"in_hook": 0.5, "in_step": 8.25}, 8.25, 2)] * 2


class OtherNames(Net):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        for name in ("b", "a") if self.global_rank else ("a", "b"):
            self.log(name, batch[0].mean(), sync_dist=True)
        if self.global_rank == 1 and batch_idx == 1:
            self.log("rare", 1.0, sync_dist=True)


def other_names(limit: int) -> Any:
    trainer = make_trainer(limit_val_batches=limit)
    try:
        trainer.validate(OtherNames(), loader(trainer.global_rank), verbose=False)
    except pl.ConfigError as error:
        return str(error)
    return numbers(trainer.callback_metrics)


def test_names_in_another_order_are_the_same_names() -> None:
    assert run_ranks(other_names, 1) == [{"a": 8.25, "b": 8.25}] * 2


def test_a_name_that_not_all_ranks_have_logged_is_an_error_on_all() -> None:
    message = (
        "self.log(..., sync_dist=True): at the end of the validation, the ranks have not logged the same "
        "values, so there is nothing to reduce over them:\n"
        "  'rare' in validation_step (mean, on_epoch): by rank 1, not by rank 0\n"
        "Log each on every rank, with the same arguments, or say rank_zero_only=True of rank 0's own. "
        "A TorchMetrics object always has to be logged on every rank."
    )
    assert run_ranks(other_names, 2) == [message] * 2


class OtherPlaces(Net):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("a", batch[0].mean(), on_step=self.global_rank == 1, sync_dist=True)


def other_places(root: str) -> Any:
    trainer = make_trainer(root, logger=CSVLogger(root))
    try:
        trainer.validate(OtherPlaces(), loader(trainer.global_rank), verbose=False)
    except pl.ConfigError as error:
        return str(error)
    return None


def test_ranks_that_stand_in_different_places_say_so(tmp_path: Path) -> None:
    message = (
        "The ranks wait for each other's logged values, and they stand in different places. "
        "rank 0: the end of the validation; rank 1: step 0, where values of steps are logged. "
        "All ranks have to run the same number of batches, and to log the same names with sync_dist=True."
    )
    assert run_ranks(other_places, str(tmp_path)) == [message] * 2


class OnlyRankZero(Net):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("mine", batch[0].mean(), rank_zero_only=True, sync_dist=True)
        self.log("ours", batch[0].mean(), sync_dist=True)
        if self.global_rank == 0:
            self.log("also_mine", batch[0].mean())


def only_rank_zero(root: str) -> Any:
    stopping = EarlyStopping("mine")
    trainer = make_trainer(root, logger=CSVLogger(root), callbacks=[stopping], limit_val_batches=1)
    rank = trainer.global_rank
    trainer.fit(OnlyRankZero(), loader(rank), loader(rank))
    return numbers(trainer.callback_metrics), stopping.best_score.item()


def test_what_is_only_rank_zeros_is_there_alone_and_can_be_monitored(tmp_path: Path) -> None:
    first, second = run_ranks(only_rank_zero, str(tmp_path))
    assert first == ({"also_mine": 1.5, "mine": 1.5, "ours": 8.25}, 1.5)
    assert second == ({"ours": 8.25}, 1.5)


class InAGroup(Net):
    groups: Any = None

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("pair", batch[0].mean(), sync_dist=True, sync_dist_group=self.groups[self.global_rank // 2])
        self.log("all", batch[0].mean(), sync_dist=True)


def in_a_group() -> Any:
    trainer, model = make_trainer(limit_val_batches=1), InAGroup()
    PARTS.update({rank: [float(rank)] for rank in range(4)})
    trainer.strategy.setup_environment()
    model.groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    trainer.validate(model, loader(trainer.global_rank), verbose=False)
    return numbers(trainer.callback_metrics)


def test_a_group_reduces_among_its_own_ranks() -> None:
    assert run_ranks(in_a_group, ranks=4) == [
        {"all": 1.5, "pair": 0.5}, {"all": 1.5, "pair": 0.5}, {"all": 1.5, "pair": 2.5}, {"all": 1.5, "pair": 2.5},
    ]  # fmt: skip


class Unsynced(Net):
    def __init__(self, sync: bool) -> None:
        super().__init__()
        self.sync = sync

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", batch[0].mean(), sync_dist=self.sync)
        self.log("same", 1.0)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.001)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        scheduler = {"scheduler": plateau, "monitor": "val"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


def unsynced(root: str, sync: bool) -> Any:
    stopping = EarlyStopping("val", patience=2)
    saving = ModelCheckpoint(monitor="val", filename="{epoch}-{val:.2f}")
    others = EarlyStopping("same", patience=9)
    trainer = make_trainer(
        root,
        callbacks=[stopping, saving, others],
        enable_checkpointing=True,
        max_epochs=5,
        limit_val_batches=1,
    )
    rank = trainer.global_rank
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer.fit(Unsynced(sync), loader(rank), loader(rank))
    said = [str(one.message) for one in told if "monitored" in str(one.message)]
    seen = stopping.best_score.item(), trainer.current_epoch, Path(saving.best_model_path).name
    rate = trainer.optimizers[0].param_groups[0]["lr"]
    return seen, numbers(trainer.callback_metrics)["val"], rate, said


def test_a_monitored_value_that_differs_is_said_once_and_all_go_by_rank_zeros(tmp_path: Path) -> None:
    first, second = run_ranks(unsynced, str(tmp_path), False)
    assert first[:3] == second[:3]
    assert first[:2] == ((1.5, 3, "epoch=0-val=1.50.ckpt"), 1.5)
    assert first[2] == pytest.approx(0.00001)
    assert first[3] == [
        "'val' is monitored and has another value on every rank: rank 0's is gone by. Log it with "
        "self.log('val', ..., sync_dist=True), and it is that of all the data."
    ]
    assert second[3] == []


def test_a_monitored_value_of_all_the_data_needs_no_word(tmp_path: Path) -> None:
    first, second = run_ranks(unsynced, str(tmp_path), True)
    assert first == second
    assert first[0] == (8.25, 3, "epoch=0-val=8.25.ckpt")
    assert first[3] == []


class Gathering(Net):
    def gather(self) -> Any:
        rank = float(self.global_rank)
        nested = {"a": torch.tensor([rank, rank + 1]), "b": (3, [rank, "text"]), "c": True}
        found = self.all_gather(nested)
        weight = torch.tensor([rank + 1], requires_grad=True)
        gathered = self.all_gather(weight, sync_grads=True)
        (gathered * torch.tensor([[2.0], [3.0]])).sum().backward()
        return found, gathered.detach(), weight.grad, self.all_gather(weight).requires_grad


def gathering() -> Any:
    trainer, model = make_trainer(), Gathering()
    model.trainer = trainer
    trainer.strategy.setup_environment()
    found, gathered, gradient, requires = model.gather()
    b = found["b"]
    return found["a"].tolist(), [one.tolist() for one in (b[0], b[1][0], found["c"])], b[1][1], (
        gathered.tolist(), gradient.tolist(), requires,
    )  # fmt: skip


def test_all_gather_takes_nested_values_and_lets_gradients_back() -> None:
    first, second = run_ranks(gathering)
    assert first[:3] == second[:3]
    assert first[:3] == ([[0.0, 1.0], [1.0, 2.0]], [[3, 3], [0.0, 1.0], [True, True]], "text")
    # Each rank's sum has all of the weights in it, so a weight's gradient is that of both sums.
    assert first[3] == ([[1.0], [2.0]], [4.0], False)
    assert second[3] == ([[1.0], [2.0]], [6.0], False)


def hook_kinds() -> Any:
    own: list[Any] = []
    callbacks: list[Any] = [
        LambdaCallback(on_validation_epoch_end=lambda trainer, module: own.append(trainer.global_rank)),
        ModelCheckpoint(monitor="val"),
    ]
    calls = count_collectives()
    trainer = make_trainer(limit_val_batches=1, callbacks=callbacks, enable_checkpointing=True)
    trainer.validate(Unsynced(True), loader(trainer.global_rank), verbose=False)
    return own, len(calls)


def test_a_lambda_may_log_at_the_end_too() -> None:
    assert run_ranks(hook_kinds) == [([0], 2), ([1], 2)]


class Everything(Net):
    def note(self, batch: Any, batch_idx: int) -> None:
        value = batch[0].mean()
        self.log("mean", value, on_step=True, on_epoch=True, sync_dist=True)
        self.log("sum", value, on_step=False, on_epoch=True, reduce_fx="sum", sync_dist=True)
        self.log("most", value, on_step=False, on_epoch=True, reduce_fx="max", sync_dist=True)
        self.log("own", value, on_step=False, on_epoch=True)
        self.log("first", value, on_step=False, on_epoch=True, rank_zero_only=True)


def goes_on_in_the_epoch(root: str) -> Any:
    found = []
    for ckpt_path in (None, f"{root}/step=2.ckpt"):
        saving = ModelCheckpoint(root, filename="{step}", every_n_train_steps=2, save_top_k=-1)
        trainer = make_trainer(root, callbacks=[saving], enable_checkpointing=True, limit_train_batches=5)
        data = DataLoader(TensorDataset(torch.arange(5.0).unsqueeze(1) + 10 * trainer.global_rank))
        trainer.fit(Everything(), data, ckpt_path=ckpt_path)
        found.append(numbers(trainer.callback_metrics))
    return found


def test_an_epoch_that_was_gone_on_with_has_the_values_of_all_of_it(tmp_path: Path) -> None:
    ranks = run_ranks(goes_on_in_the_epoch, str(tmp_path))
    for rank, (whole, resumed) in enumerate(ranks):
        assert resumed == whole
        own = {"own": 2.0 + 10 * rank, **({} if rank else {"first": 2.0})}
        assert whole == {"mean": 7.0, "mean_epoch": 7.0, "mean_step": 9.0, "sum": 70.0, "most": 14.0, **own}


def goes_on_alone(root: str) -> Any:
    trainer = make_trainer(root, strategy="auto", limit_train_batches=5, max_epochs=1)
    data = DataLoader(TensorDataset(torch.arange(5.0).unsqueeze(1)))
    trainer.fit(Everything(), data, ckpt_path=f"{root}/step=2.ckpt")
    return numbers(trainer.callback_metrics)


def test_one_process_goes_on_from_what_all_had_logged(tmp_path: Path) -> None:
    run_ranks(goes_on_in_the_epoch, str(tmp_path))
    found = run_ranks(goes_on_alone, str(tmp_path), ranks=1)[0]
    # Two batches of each of two ranks, then three of the one.
    assert found["mean"] == found["mean_epoch"] == round((0 + 1 + 10 + 11 + 2 + 3 + 4) / 7, 4)
    assert found["sum"] == 31.0
    assert found["most"] == 11.0


class EachStep(Net):
    def note(self, batch: Any, batch_idx: int) -> None:
        self.log("own", batch[0].mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.001)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        scheduler = {"scheduler": plateau, "monitor": "own", "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


def each_step() -> float:
    trainer = make_trainer(limit_train_batches=4)
    PARTS.update({0: [4.0, 3, 2, 1], 1: [1.0, 2, 3, 4]})
    trainer.fit(EachStep(), loader(trainer.global_rank, 1))
    rate: float = trainer.optimizers[0].param_groups[0]["lr"]
    return rate


def test_learning_rates_that_go_by_a_value_of_each_step_stay_the_same() -> None:
    assert run_ranks(each_step) == [0.001, 0.001]
