"""What is shown, summed up and judged is what Lightning shows, sums up and judges, at every hook."""

from __future__ import annotations

import contextlib
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import holdfast
from holdfast.callbacks.early_stopping import EarlyStopping
from holdfast.callbacks.tqdm_progress_bar import TQDMProgressBar
from holdfast.utilities import model_summary

lightning = pytest.importorskip("lightning.pytorch")
pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's own, which are none of our business

HOOKS = [
    "on_sanity_check_start", "on_sanity_check_end", "on_train_start", "on_train_end",
    "on_train_epoch_start", "on_train_epoch_end", "on_train_batch_start", "on_train_batch_end",
    *(f"on_{stage}_{moment}" for stage in ("validation", "test", "predict")
      for moment in ("start", "batch_start", "batch_end", "end")),
]  # fmt: skip
BARS = ("train", "val", "test", "predict")


class Endless(IterableDataset[Any]):
    """Does not tell its length."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Any:
        return iter(torch.ones(self.count, 3))


def loader(count: int, endless: bool = False) -> DataLoader[Any]:
    return DataLoader(Endless(count)) if endless else DataLoader(torch.ones(count, 3))  # type: ignore[arg-type]


def module(pl: Any) -> Any:
    class Net(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layer(batch).square().mean()

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("val", self.layer(batch).mean(), prog_bar=True)

        def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...

        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> int:
            return batch_idx

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    return Net()


def shown(
    pl: Any,
    base: Any,
    bar: dict[str, Any],
    arguments: dict[str, Any],
    *,
    fns: tuple[str, ...] = ("fit",),
    loaders: tuple[int, ...] = (3,),
    endless: bool = False,
) -> list[tuple[str, dict[str, Any]]]:
    """Each hook with the bars as it leaves them: n, total, name, whether they are left and are closed."""
    seen: list[tuple[str, dict[str, Any]]] = []

    def watched(hook: str) -> Any:
        def method(self: Any, *args: Any, **kwargs: Any) -> None:
            getattr(base, hook)(self, *args, **kwargs)
            bars = {}
            for name in BARS:
                one = getattr(self, f"_{name}_progress_bar")
                if one is not None:
                    bars[name] = (one.n, one.total, getattr(one, "desc", ""), one.leave, one.disable)
            seen.append((hook, bars))

        return method

    callback = type("Watched", (base,), {hook: watched(hook) for hook in HOOKS})(**bar)
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[callback],
        **arguments,
    )
    evaluated = [loader(count, endless) for count in loaders]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        for fn in fns:
            if fn == "fit":
                trainer.fit(module(pl), loader(7, endless), evaluated)
            else:
                getattr(trainer, fn)(module(pl), evaluated)
    return seen


@pytest.mark.parametrize(
    ("bar", "arguments", "more"),
    [
        ({}, {"max_epochs": 2}, {}),
        ({"refresh_rate": 3}, {"max_epochs": 2}, {"loaders": (3, 2)}),
        ({"refresh_rate": 0}, {"max_epochs": 1}, {}),
        ({"refresh_rate": 100}, {"max_epochs": 1, "num_sanity_val_steps": -1}, {}),
        ({"leave": True}, {"max_epochs": 2}, {}),
        ({}, {"max_epochs": 1, "val_check_interval": 3}, {}),
        ({"refresh_rate": 2}, {"max_epochs": 2, "val_check_interval": 0.5}, {}),
        ({}, {"max_epochs": 1, "limit_train_batches": 4, "limit_val_batches": 1}, {}),
        ({}, {"max_epochs": 1, "limit_val_batches": 0}, {}),
        ({"refresh_rate": 3}, {"max_epochs": -1, "max_steps": 10}, {}),
        ({"refresh_rate": 5}, {"max_epochs": 2, "check_val_every_n_epoch": 2}, {}),
        ({}, {"max_epochs": 2}, {"endless": True}),
        ({"refresh_rate": 2}, {}, {"fns": ("test", "predict", "validate"), "loaders": (3, 2)}),
    ],
    ids=str,
)
def test_tqdm_bars_stand_where_lightnings_stand(bar: Any, arguments: Any, more: Any) -> None:
    theirs = shown(lightning, lightning.callbacks.TQDMProgressBar, bar, arguments, **more)
    ours = shown(holdfast, TQDMProgressBar, bar, arguments, **more)
    assert len(theirs) > 10
    assert ours == theirs


def test_tqdm_bars_made_by_init_methods_look_like_lightnings() -> None:
    for name in ("sanity", "train", "validation", "test", "predict"):
        looks = []
        for base in (lightning.callbacks.TQDMProgressBar, TQDMProgressBar):
            callback = base(process_position=1)
            callback._trainer = type("Trainer", (), {"state": type("State", (), {"fn": "fit"})})
            with contextlib.redirect_stdout(io.StringIO()) as out:
                bar = getattr(callback, f"init_{name}_tqdm")()
                looks.append((bar.desc, bar.pos, bar.leave, bar.bar_format, bar.fp == out, bar.total))
                bar.close()
        assert looks[0] == looks[1]


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(8)
        self.rest = nn.Sequential(nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Any:
        return self.rest(self.norm(self.first(x)))


def nested(example: Any) -> Any:
    class Nested(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.parts = Parts()
            self.head = nn.Linear(2, 3).requires_grad_(False).eval()
            self.pairs = nn.Bilinear(3, 3, 2)
            self.lstm = nn.LSTM(2, 3, batch_first=True)
            self.unused = nn.Linear(2, 2)
            self.own = nn.Parameter(torch.ones(5))
            if example is not None:
                self.example_input_array = example

        def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
            head = self.head(self.parts(x))
            self.lstm(self.parts(x)[None])
            return self.pairs(head, head if y is None else y)

    return Nested()


@pytest.mark.parametrize("depth", [0, 1, 2, -1])
@pytest.mark.parametrize(
    "example",
    [
        None,
        torch.ones(6, 4),
        (torch.ones(6, 4), torch.ones(6, 3)),
        [torch.ones(6, 4)],
        {"x": torch.ones(6, 4), "y": torch.ones(6, 3)},
    ],
    ids=["none", "tensor", "tuple", "list", "dict"],
)
def test_summaries_count_and_measure_as_lightnings(depth: int, example: Any) -> None:
    from lightning.pytorch.utilities.model_summary import summarize

    model = nested(example)
    ours, theirs = model_summary.summarize(model, max_depth=depth), summarize(model, max_depth=depth)
    for name in (
        "layer_names", "layer_types", "param_nums", "training_modes", "in_sizes", "out_sizes",
        "total_parameters", "trainable_parameters", "total_layer_params", "model_size", "total_training_modes",
    ):  # fmt: skip
        assert getattr(ours, name) == getattr(theirs, name), name


def judged(pl: Any, base: Any, stops: list[dict[str, Any]], arguments: Any, values: Any, where: str) -> Any:
    class Net(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)
            self.values = iter([*values, *[values[-1]] * 50])

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layer(batch[0]).square().mean()

        def on_train_epoch_end(self) -> None:
            if where == "train":
                self.log("m", torch.tensor(next(self.values)))

        def validation_step(self, batch: Any, batch_idx: int) -> None: ...

        def on_validation_epoch_end(self) -> None:
            if where == "validation" and not self.trainer.sanity_checking:
                self.log("m", torch.tensor(next(self.values)))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    callbacks = [base("m", **one) for one in stops]
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=callbacks,
        **{"max_epochs": 8, **arguments},
    )
    data = DataLoader(TensorDataset(torch.ones(4, 3)))
    trainer.fit(Net(), data, data)
    ends = [
        {
            **{
                key: str(value) for key, value in one.state_dict().items() if key != "stopping_reason_message"
            },
            "told": one.stopping_reason_message is not None,
            "key": one.state_key,
            "min_delta": one.min_delta,
            "op": one.monitor_op,
        }
        for one in callbacks
    ]
    return trainer.current_epoch, trainer.global_step, trainer.should_stop, ends


@pytest.mark.parametrize(
    ("stops", "arguments", "values", "where"),
    [
        ([{"patience": 2}], {}, [1.0, 0.9, 0.95], "validation"),
        ([{"patience": 0}], {}, [1.0, 0.9, 0.95], "validation"),
        ([{"patience": 2, "min_delta": 0.1}], {}, [1.0, 0.95, 0.91, 0.8], "validation"),
        ([{"patience": 1, "min_delta": -0.1}], {}, [1.0, 1.05, 1.2], "validation"),
        ([{"patience": 1, "min_delta": -0.1, "mode": "max"}], {}, [1.0, 0.95, 0.8], "validation"),
        ([{"patience": 2, "mode": "max", "min_delta": 0.1}], {}, [1.0, 1.05, 1.2, 1.25], "validation"),
        ([{}], {}, [1.0, math.nan], "validation"),
        ([{"check_finite": False, "patience": 2}], {}, [1.0, math.nan, math.nan, 0.5], "validation"),
        ([{"stopping_threshold": 0.5}], {}, [1.0, 0.5, 0.4], "validation"),
        ([{"divergence_threshold": 2.0}], {}, [1.0, 2.0, 2.5], "validation"),
        ([{"patience": 1}], {"min_epochs": 5}, [1.0, 1.0, 1.0, 0.5, 0.4, 0.3], "validation"),
        ([{"patience": 1}], {"min_steps": 14}, [1.0, 1.0, 1.0, 0.5, 0.4, 0.4], "validation"),
        ([{"patience": 2}], {"val_check_interval": 2}, [1.0, 0.9, 0.95], "validation"),
        ([{"patience": 1}], {"val_check_interval": 2, "min_steps": 11}, [1.0, 1.0, 0.5, 0.4], "validation"),
        ([{"patience": 1}], {"check_val_every_n_epoch": 2}, [1.0], "validation"),
        ([{"patience": 1, "check_on_train_epoch_end": False}], {}, [1.0], "validation"),
        ([{"patience": 1}], {}, [1.0], "train"),
        ([{"patience": 1, "check_on_train_epoch_end": False, "strict": False}], {}, [1.0], "train"),
        ([{"patience": 1}, {"patience": 3, "mode": "max"}], {}, [1.0, 0.9], "validation"),
        (
            [{"patience": 1}, {"patience": 3, "mode": "max"}],
            {"min_epochs": 4},
            [1.0, 1.1, 1.0, 1.2],
            "validation",
        ),
        ([{"patience": 1, "log_rank_zero_only": True, "verbose": True}], {}, [1.0, 0.9], "validation"),
        ([{"patience": 9}], {"max_steps": 6}, [1.0], "validation"),
        ([{"strict": False}], {"fast_dev_run": True}, [1.0], "validation"),
    ],
    ids=str,
)
def test_early_stopping_ends_runs_where_lightnings_does(
    stops: Any, arguments: Any, values: Any, where: str
) -> None:
    theirs = judged(lightning, lightning.callbacks.EarlyStopping, stops, arguments, values, where)
    assert judged(holdfast, EarlyStopping, stops, arguments, values, where) == theirs
