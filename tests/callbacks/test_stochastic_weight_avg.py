"""StochasticWeightAveraging: rates, the average, BatchNorm's statistics, and that a resume is exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import SWALR

import holdfast as pl
from holdfast.callbacks import Callback, EarlyStopping, StochasticWeightAveraging
from holdfast.checkpoint.load import load
from holdfast.errors import ConfigError
from tests.resume.harness import first_difference

from .averaged import Regression, assert_resumes_everywhere, fit, loader, make_trainer

WEIGHT = "net.0.weight"


class Recorder(Callback):
    """The weights that each epoch begins with, and the last ones."""

    def __init__(self) -> None:
        self.begun: list[dict[str, Tensor]] = []
        self.last: dict[str, Tensor] = {}

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.begun.append(values_of(pl_module))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.last = values_of(pl_module)


def values_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def mean(states: list[dict[str, Tensor]], name: str = WEIGHT) -> Tensor:
    return torch.stack([state[name] for state in states]).mean(0)


def trained(callback: Any, model: Any = None, **arguments: Any) -> tuple[Any, Any, Recorder]:
    torch.manual_seed(0)
    recorder = Recorder()
    model = Regression() if model is None else model
    extra = arguments.pop("callbacks", [])
    trainer = make_trainer(pl, [callback, recorder, *extra], **{"max_epochs": 5, **arguments})
    trainer.fit(model, loader(), loader(8))
    return model, trainer, recorder


class TestAverage:
    def test_of_the_weights_that_the_epochs_begin_with(self) -> None:
        model, _, seen = trained(StochasticWeightAveraging(0.02, swa_epoch_start=3))
        assert torch.allclose(model.state_dict()[WEIGHT], mean(seen.begun[2:]))

    def test_a_fraction_of_the_epochs(self) -> None:
        callback = StochasticWeightAveraging(0.02, swa_epoch_start=0.8)
        model, _, seen = trained(callback)
        assert (callback.swa_start, callback.swa_end) == (3, 4)
        assert torch.allclose(model.state_dict()[WEIGHT], mean(seen.begun[3:]))

    def test_a_function_of_ones_own(self) -> None:
        callback = StochasticWeightAveraging(
            0.02,
            swa_epoch_start=3,
            avg_fn=lambda average, current, count: average + count * current,
            device=None,
        )
        model, _, seen = trained(callback)
        expected = seen.begun[2][WEIGHT] + seen.begun[3][WEIGHT] + 2 * seen.begun[4][WEIGHT]
        assert torch.allclose(model.state_dict()[WEIGHT], expected)

    def test_a_run_that_stops_early_ends_with_the_average_so_far(self) -> None:
        """Under Lightning it ends with the last weights, and the average is lost."""
        stopping = EarlyStopping("val_loss", patience=1, min_delta=1e9)
        callback = StochasticWeightAveraging(0.02, swa_epoch_start=1)
        model, _, seen = trained(callback, callbacks=[stopping])
        assert len(seen.begun) == 2
        assert torch.allclose(model.state_dict()[WEIGHT], mean(seen.begun))

    def test_a_start_that_never_comes_leaves_the_trained_weights(self) -> None:
        """Under Lightning the model ends with the weights that it began with."""
        with pytest.warns(UserWarning, match="averages nothing") as warned:
            model, _, seen = trained(StochasticWeightAveraging(0.02, swa_epoch_start=9))
        assert [str(one.message) for one in warned] == [
            "StochasticWeightAveraging(swa_epoch_start=9) averages nothing: training ends after 5 epochs."
        ]
        assert first_difference(values_of(model), seen.last) is None

    def test_without_a_last_epoch(self) -> None:
        model, _, seen = trained(
            StochasticWeightAveraging(0.02, swa_epoch_start=2), max_epochs=-1, max_steps=11
        )
        assert torch.allclose(model.state_dict()[WEIGHT], mean(seen.begun[1:]))


class TestRate:
    @pytest.mark.parametrize(
        ("scheduler", "before"), [("", 0.05), ("epoch", 0.05 * 0.9), ("step", 0.05 * 0.98**3)]
    )
    def test_it_goes_from_the_schedulers_to_its_own(self, scheduler: str, before: float) -> None:
        callback = StochasticWeightAveraging(0.01, 2, annealing_epochs=2, annealing_strategy="linear")
        model, trainer, _ = trained(callback, Regression(scheduler=scheduler))
        halfway = (before + 0.01) / 2
        epochs = [before] * 3 + [halfway] * 3 + [0.01] * 6
        assert model.rates[3:15] == pytest.approx(epochs)
        assert [type(config.scheduler).__mro__[1] for config in trainer.lr_scheduler_configs] == (
            [SWALR] if scheduler else []
        )

    def test_one_for_each_group(self) -> None:
        class Groups(Regression):
            def configure_optimizers(self) -> Any:
                return torch.optim.SGD([{"params": layer.parameters()} for layer in self.net[:2]], lr=0.05)

        callback = StochasticWeightAveraging([0.01, 0.02], swa_epoch_start=1, annealing_epochs=1)
        _, trainer, _ = trained(callback, Groups(), max_epochs=2)
        assert [group["lr"] for group in trainer.optimizers[0].param_groups] == pytest.approx([0.01, 0.02])


class TestBatchNorm:
    def test_statistics_are_those_of_the_averaged_weights(self) -> None:
        model, trainer, seen = trained(StochasticWeightAveraging(0.02, swa_epoch_start=3))
        hidden = [model.net[0](inputs) for inputs, _ in loader()]
        assert torch.allclose(model.net[1].running_mean, torch.stack([h.mean(0) for h in hidden]).mean(0))
        assert torch.allclose(model.net[1].running_var, torch.stack([h.var(0) for h in hidden]).mean(0))
        assert not torch.allclose(model.net[1].running_mean, seen.last["net.1.running_mean"])
        assert trainer.global_step == 15
        assert trainer.current_epoch == 5

    def test_computing_them_changes_nothing_else(self) -> None:
        class Sensitive(Regression):
            def __init__(self, norm: bool) -> None:
                super().__init__(norm=True, dropout=0.5)
                self.net[1].train(norm)
                self.steps = 0
                self.register_buffer("count", torch.tensor(0))

            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                self.steps += 1
                self.count += 1
                return super().training_step(batch, batch_idx)

        def left_by(norm: bool) -> tuple[Any, ...]:
            torch.manual_seed(0)
            trainer = make_trainer(pl, [StochasticWeightAveraging(0.02, swa_epoch_start=2)])
            model, rows = Sensitive(norm), loader(shuffle=True)
            rows.sampler.generator = torch.Generator().manual_seed(5)
            trainer.fit(model, rows)
            draws = torch.rand(3).tolist(), torch.rand(3, generator=rows.sampler.generator).tolist()
            kept = (model.steps, model.count.item(), model.net[1].momentum, "log" in vars(model))
            return draws, kept, sorted(trainer.callback_metrics)

        assert left_by(norm=True) == left_by(norm=False)
        assert left_by(norm=True)[1] == (9, 9, 0.1, False)

    def test_a_frozen_layer_keeps_its_own(self) -> None:
        class Frozen(Regression):
            def on_train_epoch_start(self) -> None:
                self.net[1].eval()

        model, _, _ = trained(StochasticWeightAveraging(0.02, swa_epoch_start=2), Frozen())
        assert model.net[1].running_mean.tolist() == [0.0] * 4

    def test_a_loss_that_needs_gradients(self) -> None:
        class Penalized(Regression):
            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                inputs = batch[0].clone().requires_grad_()
                out = self.net(inputs).sum()
                (slope,) = torch.autograd.grad(out, inputs, create_graph=True)
                return super().training_step(batch, batch_idx) + slope.square().mean()

        model, _, _ = trained(StochasticWeightAveraging(0.02, swa_epoch_start=2), Penalized(), max_epochs=2)
        assert model.net[1].num_batches_tracked == 6  # the step calls the model twice

    def test_limits_and_several_loaders(self) -> None:
        class Two(Regression):
            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                return super().training_step(batch["a"], batch_idx) + super().training_step(
                    batch["b"], batch_idx
                )

        torch.manual_seed(0)
        trainer = make_trainer(
            pl, [StochasticWeightAveraging(0.02, swa_epoch_start=2)], limit_train_batches=2, max_epochs=2
        )
        model = Two()
        trainer.fit(model, {"a": loader(), "b": loader(16)})
        assert model.net[1].num_batches_tracked == 4


class TestResume:
    @pytest.mark.parametrize("scheduler", ["", "step", "epoch", "plateau"])
    def test_before_in_and_after_the_averaging(self, tmp_path: Path, scheduler: str) -> None:
        """Every safe point of three epochs, the last two of which are averaged."""

        class Scheduled(Regression):
            def __init__(self) -> None:
                super().__init__(dropout=0.3, scheduler=scheduler)

        model, payload, saver = fit(self.callback(), tmp_path / "points", model=Scheduled())
        for number, path in saver.files.items():
            resumed, again, _ = fit(self.callback(), None, path, model=Scheduled())
            assert first_difference(model.state_dict(), resumed.state_dict()) is None, number
            assert (found := first_difference(payload, again)) is None, f"{number}: {found}"
            assert resumed.rates == model.rates[len(model.rates) - len(resumed.rates) :], number

    @staticmethod
    def callback() -> StochasticWeightAveraging:
        return StochasticWeightAveraging(0.02, swa_epoch_start=2, annealing_epochs=2)

    def test_with_accumulation_and_validation_inside_epochs(self, tmp_path: Path) -> None:
        assert_resumes_everywhere(
            self.callback, tmp_path, val_check_interval=2, accumulate_grad_batches=2, max_epochs=3
        )

    def test_longer_from_a_file_saved_after_training(self, tmp_path: Path) -> None:
        """Then the model holds the average; training goes on from the weights that trained."""
        fit(self.callback(), max_epochs=2)
        Path("final.ckpt").rename(tmp_path / "first.ckpt")
        averaged = load(tmp_path / "first.ckpt")["state_dict"][WEIGHT]
        model, _, _ = fit(self.callback(), ckpt_path=tmp_path / "first.ckpt", max_epochs=4)
        whole, _, _ = fit(self.callback(), max_epochs=4)
        assert first_difference(whole.state_dict(), model.state_dict()) is None
        assert not averaged.equal(whole.state_dict()[WEIGHT])

    def test_longer_from_where_a_limit_cut_an_epoch_short(self, tmp_path: Path) -> None:
        _, _, saver = fit(self.callback(), tmp_path / "points", max_steps=5)
        model, _, _ = fit(self.callback(), None, saver.files[len(saver.files)])
        whole, _, _ = fit(self.callback())
        assert first_difference(whole.state_dict(), model.state_dict()) is None

    def test_the_same_callback_in_another_run_begins_anew(self) -> None:
        callback = StochasticWeightAveraging(0.02, swa_epoch_start=2)
        trained(callback)
        model, _, seen = trained(callback, max_epochs=3)
        assert torch.allclose(model.state_dict()[WEIGHT], mean(seen.begun[1:]))


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"swa_lrs": 0.0}, "swa_lrs=0.0): expected a float above 0, or a list of them."),
            ({"swa_lrs": 1}, "swa_lrs=1): expected a float above 0, or a list of them."),
            ({"swa_lrs": [0.1, -0.1]}, "swa_lrs=[0.1, -0.1]): expected a float above 0, or a list of them."),
            (
                {"swa_epoch_start": 0},
                "swa_epoch_start=0): expected an epoch, counted from 1, or a float from 0.0 to 1.0.",
            ),
            (
                {"swa_epoch_start": 1.5},
                "swa_epoch_start=1.5): expected an epoch, counted from 1, or a float from 0.0 to 1.0.",
            ),
            ({"annealing_epochs": -1}, "annealing_epochs=-1): expected an int of at least 0."),
            ({"annealing_strategy": "sin"}, "annealing_strategy='sin'): expected 'cos' or 'linear'."),
            ({"avg_fn": 3}, "avg_fn=3): expected a function."),
            ({"device": 0}, "device=0): expected a torch.device, its name, or None."),
        ],
    )
    def test_messages(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError) as caught:
            StochasticWeightAveraging(**{"swa_lrs": 0.1, **arguments})
        assert str(caught.value) == f"StochasticWeightAveraging({message}"

    def test_several_optimizers(self) -> None:
        class Two(Regression):
            def __init__(self) -> None:
                super().__init__()
                self.automatic_optimization = False

            def configure_optimizers(self) -> Any:
                return [super(Two, self).configure_optimizers() for _ in range(2)]

        assert self.refusal(Two()) == (
            "StochasticWeightAveraging works with one optimizer; configure_optimizers returned 2."
        )

    def test_several_schedulers(self) -> None:
        class Two(Regression):
            def configure_optimizers(self) -> Any:
                optimizer = super().configure_optimizers()
                return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1) for _ in range(2)]

        assert self.refusal(Two()) == (
            "StochasticWeightAveraging works with one LR scheduler at most; configure_optimizers returned 2."
        )

    def test_groups_that_do_not_fit(self) -> None:
        assert self.refusal(Regression(), swa_lrs=[0.1, 0.2]) == (
            "StochasticWeightAveraging(swa_lrs=[0.1, 0.2]) has 2 learning rates for 1 param groups. Give one "
            "for each, or a float for all."
        )

    def test_a_fraction_of_no_epochs(self) -> None:
        assert self.refusal(Regression(), max_epochs=-1, max_steps=3) == (
            "StochasticWeightAveraging(swa_epoch_start=0.8) is a fraction of the trainer's max_epochs, which "
            "it does not have. Give the epoch as an int."
        )

    def test_manual_optimization_with_batch_norm(self) -> None:
        class Manual(Regression):
            def __init__(self) -> None:
                super().__init__()
                self.automatic_optimization = False

        assert self.refusal(Manual()) == (
            "StochasticWeightAveraging computes the statistics of BatchNorm with training_step, which would "
            "train Manual: it optimizes manually. Average its weights with WeightAveraging."
        )

    @staticmethod
    def refusal(model: Any, swa_lrs: Any = 0.1, **arguments: Any) -> str:
        trainer = make_trainer(pl, [StochasticWeightAveraging(swa_lrs)], **arguments)
        with pytest.raises(ConfigError) as caught:
            trainer.fit(model, loader())
        return str(caught.value)
