"""The callbacks do what Lightning's do: the same rows, steps, rates, weights and arguments."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import ExponentialLR, StepLR
from torch.utils.data import DataLoader, TensorDataset

import holdfast
import holdfast.callbacks
from holdfast.callbacks.finetuning import BackboneFinetuning, BaseFinetuning
from holdfast.callbacks.gradient_accumulation_scheduler import GradientAccumulationScheduler
from holdfast.callbacks.lr_monitor import LearningRateMonitor
from holdfast.callbacks.prediction_writer import BasePredictionWriter
from holdfast.callbacks.timer import Timer
from holdfast.loggers import CSVLogger

lightning = pytest.importorskip("lightning.pytorch")
pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's own, which are none of our business

OURS = {
    one.__name__: one
    for one in (
        BackboneFinetuning,
        BaseFinetuning,
        BasePredictionWriter,
        CSVLogger,
        GradientAccumulationScheduler,
        LearningRateMonitor,
        Timer,
    )
}
BOTH = pytest.mark.parametrize("pl", [lightning, holdfast], ids=["lightning", "holdfast"])


def of(pl: Any, name: str) -> Any:
    """A class of that name, theirs or ours."""
    if pl is holdfast:
        return OURS[name]
    return getattr(lightning.callbacks, name, None) or getattr(lightning.loggers, name)


def module_class(pl: Any) -> Any:
    class Net(pl.LightningModule):  # type: ignore[misc]
        def __init__(self, configure: Any, automatic: bool = True) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.backbone = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
            self.head = nn.Linear(2, 1)
            self.configure = configure
            self.automatic_optimization = automatic

        def forward(self, x: Any) -> Any:
            return self.head(self.backbone(x))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self(batch[0]).square().mean()
            if self.automatic_optimization:
                return loss
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
            return None

        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return self(batch[0])

        def configure_optimizers(self) -> Any:
            return self.configure(self)

    return Net


def rows(count: int = 24, **arguments: Any) -> DataLoader[Any]:
    features = torch.arange(count * 3.0).view(count, 3) / (count * 3)
    return DataLoader(TensorDataset(features), **{"batch_size": 4, **arguments})


def make_trainer(pl: Any, **arguments: Any) -> Any:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return pl.Trainer(**{"accelerator": "cpu", "logger": False, "max_epochs": 2, **quiet, **arguments})


# -- LearningRateMonitor -------------------------------------------------------------------------------------


def plain(net: Any) -> Any:
    return Adam(net.parameters(), lr=0.1)


def each_epoch(net: Any) -> Any:
    optimizer = SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    return [optimizer], [StepLR(optimizer, 1)]


def each_step_named(net: Any) -> Any:
    optimizer = SGD(net.parameters(), lr=0.1)
    return [optimizer], [{"scheduler": ExponentialLR(optimizer, 0.9), "interval": "step", "name": "my"}]


def both_intervals(net: Any) -> Any:
    optimizer = SGD(net.parameters(), lr=0.1)
    each = {"scheduler": ExponentialLR(optimizer, 0.9), "interval": "step"}
    return [optimizer], [StepLR(optimizer, 1), each]


def groups(net: Any, *names: str) -> Any:
    parts = [{"params": net.backbone.parameters()}, {"params": net.head.parameters(), "lr": 0.5}]
    return SGD([{**part, **({"name": n} if n else {})} for part, n in zip(parts, names, strict=True)], lr=0.1)


def numbered_groups(net: Any) -> Any:
    return groups(net, "", "")


def named_groups(net: Any) -> Any:
    optimizer = groups(net, "encoder", "")
    return [optimizer], [StepLR(optimizer, 1)]


def several(net: Any) -> Any:
    first, second = SGD(net.backbone.parameters(), lr=0.1), SGD(net.head.parameters(), lr=0.2)
    third = Adam(net.head.parameters(), lr=0.3, betas=(0.5, 0.9))
    return [first, second, third], [StepLR(second, 1), {"scheduler": StepLR(third, 1), "name": "third"}]


def monitored(pl: Any, root: Path, configure: Any, interval: Any, **arguments: Any) -> Any:
    class AddGroup(pl.Callback):  # type: ignore[misc]
        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            if trainer.current_epoch == 1 and configure is plain:
                trainer.optimizers[0].add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 0.7})

    monitor = of(pl, "LearningRateMonitor")(interval, log_momentum=True, log_weight_decay=True)
    logger = of(pl, "CSVLogger")(str(root / pl.__name__))
    trainer = make_trainer(
        pl, logger=logger, callbacks=[AddGroup(), monitor], **{"log_every_n_steps": 2, **arguments}
    )
    trainer.fit(module_class(pl)(configure, automatic=configure is not several), rows())
    with open(Path(logger.log_dir) / "metrics.csv", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    metrics = {name: (value.item(), value.dtype) for name, value in trainer.callback_metrics.items()}
    attributes = monitor.lrs, monitor.last_momentum_values, monitor.last_weight_decay_values
    return table, metrics, attributes


@pytest.mark.parametrize("interval", [None, "step", "epoch"])
@pytest.mark.parametrize(
    "configure", [plain, each_epoch, each_step_named, both_intervals, numbered_groups, named_groups, several]
)
def test_learning_rates_have_the_same_names_in_the_same_rows(
    configure: Any, interval: Any, tmp_path: Path
) -> None:
    theirs = monitored(lightning, tmp_path, configure, interval)
    assert theirs[0]
    assert monitored(holdfast, tmp_path, configure, interval) == theirs


def test_learning_rates_with_accumulation_come_at_the_same_steps(tmp_path: Path) -> None:
    arguments = {"accumulate_grad_batches": 2, "log_every_n_steps": 4, "max_epochs": 3}
    theirs = monitored(lightning, tmp_path, both_intervals, None, **arguments)
    assert [row["step"] for row in theirs[0]] == ["0", "3", "3", "3", "6", "7", "7"]
    assert monitored(holdfast, tmp_path, both_intervals, None, **arguments) == theirs


# -- Timer ---------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(
    ("arguments", "steps"),
    [({}, 0), ({"min_epochs": 2, "max_epochs": 5}, 12), ({"min_epochs": 1, "min_steps": 8}, 8)],
)
@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_a_time_that_is_up_stops_after_what_has_to_be_trained(
    pl: Any, arguments: dict[str, int], steps: int, interval: str
) -> None:
    timer = of(pl, "Timer")("00:00:00:00", interval=interval)
    trainer = make_trainer(pl, callbacks=timer, **arguments)
    trainer.fit(module_class(pl)(plain), rows())
    assert (trainer.global_step, trainer.should_stop) == (steps, True)
    assert (timer.time_remaining() < 0) is (steps > 0)


# -- GradientAccumulationScheduler ---------------------------------------------------------------------------


@BOTH
def test_the_factor_of_each_epoch(pl: Any) -> None:
    seen: list[tuple[int, int]] = []

    class Look(pl.Callback):  # type: ignore[misc]
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            seen.append((trainer.accumulate_grad_batches, trainer.global_step))

    scheduler = of(pl, "GradientAccumulationScheduler")({1: 2, 3: 4})
    trainer = make_trainer(pl, callbacks=[scheduler, Look()], max_epochs=5)
    trainer.fit(module_class(pl)(plain), rows())
    assert seen == [(1, 6), (2, 9), (2, 12), (4, 14), (4, 16)]
    assert (scheduler.scheduling, scheduler.epochs) == ({0: 1, 1: 2, 3: 4}, [0, 1, 3])


# -- BasePredictionWriter ------------------------------------------------------------------------------------


def written(pl: Any, loaders: Any, keep: bool) -> list[Any]:
    calls: list[Any] = []

    class Writer(of(pl, "BasePredictionWriter")):  # type: ignore[misc]
        def write_on_batch_end(self, trainer: Any, module: Any, prediction: Any, *rest: Any) -> None:
            indices, _, batch_idx, dataloader_idx = rest
            calls.append((prediction.tolist(), indices, batch_idx, dataloader_idx))

        def write_on_epoch_end(self, trainer: Any, module: Any, predictions: Any, indices: Any) -> None:
            calls.append((torch.utils._pytree.tree_map(lambda one: one.tolist(), predictions), indices))

    torch.manual_seed(5)
    trainer = make_trainer(pl, callbacks=Writer("batch_and_epoch"))
    trainer.predict(module_class(pl)(plain), loaders, return_predictions=keep)
    return calls


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda: rows(6),
        lambda: rows(6, shuffle=True, generator=torch.Generator().manual_seed(2)),
        lambda: [rows(6), rows(3)],
        lambda: rows(6, num_workers=1),
    ],
    ids=["in order", "shuffled", "two loaders", "a worker"],
)
def test_predictions_are_written_with_their_rows(make: Any, keep: bool) -> None:
    theirs = written(lightning, make(), keep)
    assert len(theirs) in (3, 4)
    assert written(holdfast, make(), keep) == theirs


# -- BackboneFinetuning --------------------------------------------------------------------------------------


def trainable_only(net: Any) -> Optimizer:
    return SGD(filter(lambda p: p.requires_grad, net.parameters()), lr=0.1, momentum=0.9)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"backbone_initial_lr": 0.01},
        {"backbone_initial_ratio_lr": 0.5},
        {"backbone_initial_ratio_lr": 0.5, "should_align": False},
        {"lambda_func": lambda epoch: epoch / 2},
        {"train_bn": False},
        {"unfreeze_backbone_at_epoch": 0, "initial_denom_lr": 2.0},
    ],
    ids=str,
)
def test_a_backbone_is_unfrozen_at_the_same_rates_to_the_same_weights(arguments: dict[str, Any]) -> None:
    def trained(pl: Any) -> Any:
        rates: list[Any] = []

        class Look(pl.Callback):  # type: ignore[misc]
            def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
                rates.append([(one["lr"], len(one["params"])) for one in trainer.optimizers[0].param_groups])

        finetuning = of(pl, "BackboneFinetuning")(**{"unfreeze_backbone_at_epoch": 1, **arguments})
        trainer = make_trainer(pl, callbacks=[finetuning, Look()], max_epochs=4)
        net = module_class(pl)(trainable_only)
        trainer.fit(net, rows())
        flags = [parameter.requires_grad for parameter in net.parameters()]
        weights = {name: value.tolist() for name, value in net.state_dict().items()}
        return rates, finetuning.previous_backbone_lr, flags, weights

    theirs = trained(lightning)
    assert len(theirs[0][-1]) == 2
    assert trained(holdfast) == theirs


def test_a_backbone_goes_on_from_a_file_of_lightnings(tmp_path: Path) -> None:
    def run(pl: Any, epochs: int, ckpt_path: Path | None = None) -> Any:
        finetuning = of(pl, "BackboneFinetuning")(unfreeze_backbone_at_epoch=1)
        saves = pl.callbacks.ModelCheckpoint(tmp_path / pl.__name__, filename=str(epochs))
        trainer = make_trainer(
            pl, callbacks=[finetuning, saves], max_epochs=epochs, enable_checkpointing=True
        )
        trainer.fit(module_class(pl)(trainable_only), rows(), ckpt_path=ckpt_path)
        return trainer

    run(lightning, 3)
    ends = run(lightning, 5), run(holdfast, 5, tmp_path / "lightning.pytorch" / "3.ckpt")
    weights = [
        {name: value.tolist() for name, value in end.lightning_module.state_dict().items()} for end in ends
    ]
    assert weights[1] == weights[0]
    # Lightning's own resume leaves the backbone frozen for good.
    assert all(parameter.requires_grad for parameter in ends[1].lightning_module.parameters())


def test_lightning_goes_on_with_the_groups_of_our_file(tmp_path: Path) -> None:
    ours = make_trainer(holdfast, callbacks=BackboneFinetuning(unfreeze_backbone_at_epoch=1), max_epochs=3)
    ours.fit(module_class(holdfast)(trainable_only), rows())
    ours.save_checkpoint(tmp_path / "ours.ckpt")
    finetuning = of(lightning, "BackboneFinetuning")(unfreeze_backbone_at_epoch=1)
    theirs = make_trainer(lightning, callbacks=finetuning, max_epochs=4)
    theirs.fit(module_class(lightning)(trainable_only), rows(), ckpt_path=tmp_path / "ours.ckpt")
    assert [len(group["params"]) for group in theirs.optimizers[0].param_groups] == [4, 4]
    assert finetuning.previous_backbone_lr == pytest.approx(0.04)


@BOTH
def test_the_tools_of_finetuning(pl: Any) -> None:
    tools = of(pl, "BaseFinetuning")

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))
            self.inner = nn.Linear(1, 1)

    def flags(module: nn.Module) -> str:
        return "".join(str(int(parameter.requires_grad)) for parameter in module.parameters())

    net = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), nn.Linear(2, 1))
    names = [type(one).__name__ for one in tools.flatten_modules([net, [nn.ReLU(), Own()]])]
    assert names == ["Linear", "BatchNorm1d", "Linear", "ReLU", "Own", "Linear"]
    assert [len(list(tools.filter_params(net, train_bn=bn))) for bn in (True, False)] == [6, 4]
    tools.freeze(net)
    assert (flags(net), net[0][1].track_running_stats) == ("001100", True)
    assert len(list(tools.filter_params(net, requires_grad=False))) == 4
    tools.freeze(net, train_bn=False)
    assert (flags(net), net[0][1].track_running_stats) == ("000000", False)
    optimizer = SGD(net[1].parameters(), lr=0.3)
    tools.unfreeze_and_add_param_group(net[0], optimizer, train_bn=False)
    assert (flags(net), net[0][1].track_running_stats) == ("111100", True)
    assert [(group["lr"], len(group["params"])) for group in optimizer.param_groups] == [(0.3, 2), (0.03, 2)]
    tools.unfreeze_and_add_param_group(net, optimizer, lr=0.5)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2, 2]
    own = Own()
    tools.freeze_module(own)
    assert flags(own) == "011"
    tools.freeze(own)
    assert flags(own) == "000"
    tools.make_trainable(own)
    assert flags(own) == "111"
