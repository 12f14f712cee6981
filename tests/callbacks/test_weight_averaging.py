"""WeightAveraging and EMAWeightAveraging: what is averaged when, who sees it, and that a resume is exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics
from torch import Tensor, nn

import holdfast as pl
from holdfast.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint, WeightAveraging
from holdfast.checkpoint.load import load
from holdfast.errors import ConfigError
from tests.resume.harness import first_difference

from .averaged import Regression, assert_resumes_everywhere, fit, loader, make_trainer

WEIGHT = "net.0.weight"


class Recorder(Callback):
    """The training weights after each step, and those that each validation batch sees."""

    def __init__(self) -> None:
        self.trained: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.trained.append(pl_module.state_dict()[WEIGHT].clone())


def trained(callback: Any, **arguments: Any) -> tuple[Any, Any, list[Tensor]]:
    """The model and trainer after training, and the weights that trained, step by step."""
    torch.manual_seed(0)
    recorder, model = Recorder(), Regression()
    trainer = make_trainer(pl, [callback, recorder], **arguments)
    trainer.fit(model, loader(), loader(8))
    return model, trainer, recorder.trained


class TestAverage:
    def test_it_is_the_mean_over_all_steps(self) -> None:
        model, _, weights = trained(WeightAveraging())
        assert len(weights) == 9
        assert torch.allclose(model.state_dict()[WEIGHT], torch.stack(weights).mean(0))

    def test_validation_sees_it_and_training_does_not(self) -> None:
        model, _, weights = trained(WeightAveraging())
        for epoch, seen in enumerate(model.validated[::2], 1):
            assert torch.allclose(seen, torch.stack(weights[: 3 * epoch]).mean(0))
        _, _, alone = trained(Callback())
        assert first_difference(alone, weights) is None

    def test_exponential(self) -> None:
        model, _, weights = trained(EMAWeightAveraging(decay=0.8))
        expected = weights[0]
        for weight in weights[1:]:
            expected = 0.8 * expected + 0.2 * weight
        assert torch.allclose(model.state_dict()[WEIGHT], expected)

    @pytest.mark.parametrize(
        ("arguments", "steps", "epochs"),
        [
            ({}, [0, 1, 2, 3, 4, 5, 6], []),
            ({"update_every_n_steps": 3}, [0, 3, 6], []),
            ({"update_every_n_steps": 2, "update_starting_at_step": 3}, [4, 6], []),
            ({"update_starting_at_epoch": 1, "update_starting_at_step": 5}, [5, 6], [1, 2]),
        ],
    )
    def test_when_it_is_updated(self, arguments: dict[str, int], steps: list[int], epochs: list[int]) -> None:
        callback = EMAWeightAveraging(**arguments)
        assert [step for step in range(7) if callback.should_update(step_idx=step)] == steps
        assert [epoch for epoch in range(3) if callback.should_update(epoch_idx=epoch)] == epochs
        assert callback.should_update() is False

    def test_a_subclass_chooses(self) -> None:
        class AfterEpochs(WeightAveraging):
            def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
                return epoch_idx is not None and epoch_idx >= 1

        model, _, weights = trained(AfterEpochs())
        assert torch.allclose(model.state_dict()[WEIGHT], (weights[5] + weights[8]) / 2)

    def test_an_accumulated_step_counts_once(self) -> None:
        model, trainer, weights = trained(WeightAveraging(), accumulate_grad_batches=3)
        assert trainer.global_step == 3
        assert torch.allclose(model.state_dict()[WEIGHT], (weights[2] + weights[5] + weights[8]) / 3)

    def test_until_the_first_update_it_is_the_current_weights(self, tmp_path: Path) -> None:
        """Under Lightning it is those that training began with: validated, saved, and left at the end."""
        model, trainer, weights = trained(EMAWeightAveraging(update_starting_at_step=1000))
        assert model.validated[2].equal(weights[5])
        assert model.state_dict()[WEIGHT].equal(weights[-1])
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        payload = load(tmp_path / "a.ckpt")
        assert payload["state_dict"][WEIGHT].equal(weights[-1])
        assert payload["averaging_state"]["n_averaged"] == 0

    def test_another_device_and_function(self) -> None:
        def sum_of(averaged: Tensor, current: Tensor, count: Any) -> Tensor:
            return averaged + current

        model, _, weights = trained(WeightAveraging(device="cpu", avg_fn=sum_of))
        assert torch.allclose(model.state_dict()[WEIGHT], torch.stack(weights).sum(0))


class Buffered(Regression):
    def __init__(self) -> None:
        super().__init__()
        mask = torch.full((3, 3), float("-inf")).triu(1)
        self.register_buffer("mask", mask)
        self.register_buffer("table", torch.randn(100), persistent=False)
        self.register_buffer("positions", torch.arange(5))
        self.register_buffer("used", torch.tensor([True, False]))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("moving", torch.tensor(0.0))
        self.before = {name: buffer.clone() for name, buffer in self.named_buffers()}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.count += 1
        self.moving += 1
        self.used.logical_not_()
        return super().training_step(batch, batch_idx)


class TestBuffers:
    @pytest.mark.parametrize("make", [WeightAveraging, EMAWeightAveraging])
    def test_what_does_not_change_stays_to_the_bit(self, make: Any) -> None:
        model = Buffered()
        make_trainer(pl, [make()]).fit(model, loader())
        for name in ("mask", "table", "positions"):
            assert torch.equal(getattr(model, name), model.before[name]), name

    def test_counters_and_flags_are_not_averaged(self) -> None:
        model = Buffered()
        make_trainer(pl, [WeightAveraging()]).fit(model, loader())
        assert (model.count.item(), model.used.tolist()) == (9, [False, True])
        assert model.net[1].num_batches_tracked == 9
        assert model.moving.item() == 5.0

    def test_without_use_buffers_they_are_copied(self) -> None:
        model = Buffered()
        make_trainer(pl, [WeightAveraging(use_buffers=False)]).fit(model, loader())
        assert model.moving.item() == 9.0


class TestCheckpoint:
    def test_it_holds_the_average_and_the_weights_that_trained(self, tmp_path: Path) -> None:
        every = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        torch.manual_seed(0)
        recorder = Recorder()
        make_trainer(pl, [WeightAveraging(), recorder, every]).fit(Regression(), loader(), loader(8))
        for step, current in enumerate(recorder.trained, 1):
            payload = load(tmp_path / f"step={step}.ckpt")
            mean = torch.stack(recorder.trained[:step]).mean(0)
            assert torch.allclose(payload["state_dict"][WEIGHT], mean)
            assert payload["current_model_state"][WEIGHT].equal(current)
            assert payload["averaging_state"]["n_averaged"] == step
            assert payload["callbacks"]["WeightAveraging"] == {"latest_update_step": step}
            loaded = Regression.load_from_checkpoint(tmp_path / f"step={step}.ckpt")
            assert loaded.state_dict()[WEIGHT].equal(payload["state_dict"][WEIGHT])

    def test_a_file_of_weights_only_holds_the_average(self, tmp_path: Path) -> None:
        """Under Lightning it holds the weights that trained."""
        every = ModelCheckpoint(
            tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1, save_weights_only=True
        )
        torch.manual_seed(0)
        recorder = Recorder()
        trainer = make_trainer(pl, [WeightAveraging(), recorder, every])
        trainer.fit(Regression(), loader())
        trainer.save_checkpoint(tmp_path / "end.ckpt", weights_only=True)
        for step, name in ((2, "step=2"), (9, "step=9"), (9, "end")):
            weight = load(tmp_path / f"{name}.ckpt")["state_dict"][WEIGHT]
            assert torch.allclose(weight, torch.stack(recorder.trained[:step]).mean(0))

    def test_saved_while_validation_has_the_average(self, tmp_path: Path) -> None:
        class Saving(Callback):
            def on_validation_batch_start(self, trainer: Any, *args: Any) -> None:
                trainer.save_checkpoint(tmp_path / "inside.ckpt")
                trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)

        torch.manual_seed(0)
        recorder = Recorder()
        trainer = make_trainer(pl, [WeightAveraging(), recorder, Saving()], max_epochs=1)
        trainer.fit(Regression(), loader(), loader(8))
        payload = load(tmp_path / "inside.ckpt")
        mean = torch.stack(recorder.trained).mean(0)
        assert torch.allclose(payload["state_dict"][WEIGHT], mean)
        assert payload["current_model_state"][WEIGHT].equal(recorder.trained[-1])
        assert torch.allclose(load(tmp_path / "weights.ckpt")["state_dict"][WEIGHT], mean)

    def test_validate_and_test_from_a_file_get_the_average(self, tmp_path: Path) -> None:
        model, trainer, _ = trained(WeightAveraging())
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        averaged = model.state_dict()[WEIGHT].clone()
        for callbacks in ([], [WeightAveraging()]):
            other = Regression()
            make_trainer(pl, callbacks).validate(
                other, loader(8), ckpt_path=tmp_path / "a.ckpt", verbose=False
            )
            assert other.validated[0].equal(averaged)
            assert other.state_dict()[WEIGHT].equal(averaged)
        trainer.validate(model, loader(8), verbose=False)
        assert model.validated[-1].equal(averaged)

    def test_a_file_without_averages_says_so(self, tmp_path: Path) -> None:
        _, trainer, _ = trained(Callback(), max_epochs=1)
        trainer.save_checkpoint(tmp_path / "plain.ckpt")
        weights = load(tmp_path / "plain.ckpt")["state_dict"][WEIGHT]
        recorder, model = Recorder(), Regression()
        resumed = make_trainer(pl, [WeightAveraging(), recorder], max_epochs=2)
        with pytest.warns(UserWarning, match="no averaged weights") as warned:
            resumed.fit(model, loader(), ckpt_path=tmp_path / "plain.ckpt")
        assert [str(one.message) for one in warned] == [
            "The checkpoint has no averaged weights: WeightAveraging starts to average anew, from its weights."
        ]
        assert not recorder.trained[0].equal(weights)
        assert torch.allclose(model.state_dict()[WEIGHT], torch.stack(recorder.trained).mean(0))


class TestResume:
    @pytest.mark.parametrize(
        ("make", "arguments"),
        [
            (WeightAveraging, {}),
            (lambda: EMAWeightAveraging(decay=0.7), {"val_check_interval": 2}),
            (lambda: EMAWeightAveraging(use_buffers=False, decay=0.7, update_every_n_steps=2), {}),
            (lambda: EMAWeightAveraging(decay=0.7, update_starting_at_step=4), {"max_epochs": 2}),
            (lambda: EMAWeightAveraging(decay=0.7), {"accumulate_grad_batches": 2}),
        ],
    )
    def test_from_every_safe_point(self, tmp_path: Path, make: Any, arguments: dict[str, Any]) -> None:
        assert_resumes_everywhere(make, tmp_path, **arguments)

    def test_longer_from_a_file_saved_after_training(self, tmp_path: Path) -> None:
        """Then the model holds the average; training goes on from the weights that trained."""
        fit(WeightAveraging(), max_epochs=1)
        Path("final.ckpt").rename(tmp_path / "first.ckpt")
        model, payload, _ = fit(WeightAveraging(), ckpt_path=tmp_path / "first.ckpt")
        whole, expected, _ = fit(WeightAveraging())
        assert first_difference(whole.state_dict(), model.state_dict()) is None
        assert first_difference(expected["current_model_state"], payload["current_model_state"]) is None

    def test_a_run_that_is_done_already(self, tmp_path: Path) -> None:
        whole, _, saver = fit(WeightAveraging(), tmp_path / "points")
        model, _, _ = fit(WeightAveraging(), None, saver.files[len(saver.files)])
        assert model.rates == []
        assert first_difference(whole.state_dict(), model.state_dict()) is None

    def test_validation_that_breaks_off_leaves_the_weights_that_trained(self, tmp_path: Path) -> None:
        class Breaking(Regression):
            def validation_step(self, batch: Any, batch_idx: int) -> None:
                raise ZeroDivisionError

        recorder, model = Recorder(), Breaking()
        trainer = make_trainer(pl, [WeightAveraging(), recorder])
        with pytest.raises(ZeroDivisionError):
            trainer.fit(model, loader(), loader(8))
        assert model.state_dict()[WEIGHT].equal(recorder.trained[-1])
        trainer.save_checkpoint(tmp_path / "broken.ckpt")
        payload = load(tmp_path / "broken.ckpt")
        assert payload["current_model_state"][WEIGHT].equal(recorder.trained[-1])
        assert torch.allclose(payload["state_dict"][WEIGHT], torch.stack(recorder.trained).mean(0))

    def test_the_same_callback_in_another_run_begins_anew(self) -> None:
        callback = WeightAveraging()
        trained(callback)
        model, _, weights = trained(callback, max_epochs=1)
        assert torch.allclose(model.state_dict()[WEIGHT], torch.stack(weights).mean(0))


class TestModels:
    def test_lazy_parameters(self) -> None:
        class Lazy(Regression):
            def __init__(self) -> None:
                super().__init__()
                self.net[0] = nn.LazyLinear(4)

        recorder, model = Recorder(), Lazy()
        make_trainer(pl, [WeightAveraging(), recorder]).fit(model, loader(), loader(8))
        assert torch.allclose(model.state_dict()[WEIGHT], torch.stack(recorder.trained).mean(0))

    def test_tied_weights_stay_tied(self, tmp_path: Path) -> None:
        class Tied(Regression):
            def __init__(self) -> None:
                super().__init__()
                first, second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
                self.net = nn.Sequential(first, second, nn.Linear(3, 1))
                self.net[1].weight = self.net[0].weight

        model = Tied()
        trainer = make_trainer(pl, [WeightAveraging()])
        trainer.fit(model, loader(), loader(8))
        assert model.net[1].weight is model.net[0].weight
        trainer.save_checkpoint(tmp_path / "tied.ckpt")
        payload = load(tmp_path / "tied.ckpt")
        for part in ("state_dict", "current_model_state"):
            first, second = payload[part]["net.0.weight"], payload[part]["net.1.weight"]
            assert first.data_ptr() == second.data_ptr()

    def test_metrics_optimizers_and_parameters_are_the_same_objects(self) -> None:
        class Measured(Regression):
            def __init__(self) -> None:
                super().__init__()
                self.error = torchmetrics.MeanSquaredError()

            def validation_step(self, batch: Any, batch_idx: int) -> None:
                super().validation_step(batch, batch_idx)
                self.error.update(self.net(batch[0]), batch[1])
                assert self.trainer.validating

        model = Measured()
        before = [*model.parameters()]
        pointers = [parameter.data_ptr() for parameter in before]
        make_trainer(pl, [EMAWeightAveraging()]).fit(model, loader(), loader(8))
        assert all(mine is theirs for mine, theirs in zip(before, model.parameters(), strict=True))
        assert [parameter.data_ptr() for parameter in model.parameters()] == pointers
        assert model.error.total == 8 * 3

    def test_frozen_weights_stay_to_the_bit(self) -> None:
        model = Regression()
        model.net[0].requires_grad_(False)
        before = model.net[0].weight.clone()
        make_trainer(pl, [EMAWeightAveraging()]).fit(model, loader())
        assert model.net[0].weight.equal(before)

    def test_what_a_module_keeps_of_a_step_does_not_matter(self) -> None:
        class Keeping(Regression):
            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                self.kept = super().training_step(batch, batch_idx)
                return self.kept

        model = Keeping()
        make_trainer(pl, [WeightAveraging()]).fit(model, loader())
        assert model.kept.grad_fn is not None

    def test_a_module_that_cannot_be_copied(self) -> None:
        model = Regression()
        model.rows = (row for row in [])
        with pytest.raises(ConfigError) as caught:
            make_trainer(pl, [WeightAveraging()]).fit(model, loader())
        assert str(caught.value) == (
            "WeightAveraging keeps a copy of Regression, which cannot be copied: cannot pickle 'generator' "
            "object. Leave what cannot be copied out of its __getstate__."
        )

    def test_a_save_in_the_background_is_awaited_before_weights_change(self) -> None:
        class Engine(pl.callbacks.Callback):
            copying, waited = True, 0

            def wait_for_copy(self, **_: bool) -> None:
                self.waited += 1

            def wait(self) -> None: ...

            def close(self) -> None: ...

        trainer = make_trainer(pl, [WeightAveraging()], max_epochs=1)
        trainer.engine = engine = Engine()
        trainer.fit(Regression(), loader(4), loader(8))
        # The backward pass, the update, validation and its two exchanges, the end of the epoch and of training.
        assert engine.waited == 7


class TestArguments:
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (
                lambda: WeightAveraging(average=1),
                "WeightAveraging(average=...): there is no such argument. Besides its own, WeightAveraging "
                "takes avg_fn= or multi_avg_fn=, for torch's AveragedModel.",
            ),
            (
                lambda: WeightAveraging(avg_fn=max, multi_avg_fn=max),
                "WeightAveraging(avg_fn=, multi_avg_fn=) exclude each other. Give one of them.",
            ),
            (
                lambda: EMAWeightAveraging(avg_fn=max),
                "EMAWeightAveraging(avg_fn=...): it has its averaging function already. Use "
                "WeightAveraging(avg_fn=...).",
            ),
            (
                lambda: EMAWeightAveraging(decay=99),
                "EMAWeightAveraging(decay=99) must be a number from 0 to 1.",
            ),
            (
                lambda: EMAWeightAveraging(update_every_n_steps=0),
                "EMAWeightAveraging(update_every_n_steps=0) must be an int of at least 1.",
            ),
        ],
    )
    def test_messages(self, make: Any, message: str) -> None:
        with pytest.raises(ConfigError) as caught:
            make()
        assert str(caught.value) == message

    def test_two_of_them(self) -> None:
        trainer = make_trainer(pl, [WeightAveraging(), EMAWeightAveraging()])
        with pytest.raises(ConfigError) as caught:
            trainer.fit(Regression(), loader())
        assert str(caught.value) == (
            "The trainer has 2 callbacks that average weights: WeightAveraging, EMAWeightAveraging. A model is "
            "validated and saved with one average. Leave one of them."
        )
