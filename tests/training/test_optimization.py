"""configure_optimizers in every documented form, and the step, automatic and by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau, StepLR

import holdfast as pl
from holdfast.training.configured import LRSchedulerConfig, read_configuration
from holdfast.training.optimizer import LightningOptimizer
from holdfast.utilities.enums import GradClipAlgorithmType
from tests.training.toys import Toy, rows, trainer


def sgd() -> torch.optim.SGD:
    return torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)


class TestForms:
    def test_one_and_several_optimizers(self) -> None:
        one, two = sgd(), sgd()
        assert read_configuration(one, automatic=True) == ([one], [])
        assert read_configuration([one, two], automatic=False) == ([one, two], [])
        assert read_configuration((one,), automatic=True) == ([one], [])

    def test_two_lists(self) -> None:
        optimizer = sgd()
        scheduler = StepLR(optimizer, 1)
        optimizers, configs = read_configuration(
            ([optimizer], [{"scheduler": scheduler, "interval": "step", "frequency": 3, "name": "lr"}]),
            automatic=True,
        )
        assert optimizers == [optimizer]
        assert configs == [LRSchedulerConfig(scheduler, name="lr", interval="step", frequency=3)]

    def test_dicts(self) -> None:
        first, second = sgd(), sgd()
        plateau = ReduceLROnPlateau(first)
        found = read_configuration(
            [
                {"optimizer": first, "lr_scheduler": {"scheduler": plateau, "monitor": "loss"}},
                {"optimizer": second},
            ],
            automatic=False,
        )
        assert found == (
            [first, second],
            [LRSchedulerConfig(plateau, reduce_on_plateau=True, monitor="loss")],
        )
        scheduler = StepLR(first, 1)
        assert read_configuration({"optimizer": first, "lr_scheduler": scheduler}, automatic=True) == (
            [first],
            [LRSchedulerConfig(scheduler)],
        )

    def test_none_trains_nothing_and_says_so(self) -> None:
        with pytest.warns(
            UserWarning, match="configure_optimizers returned None: this run will train nothing"
        ):
            assert read_configuration(None, automatic=True) == ([], [])

    @pytest.mark.parametrize(
        ("configured", "message"),
        [
            (
                lambda: [sgd(), sgd()],
                "configure_optimizers returned 2 optimizers. With more than one, set self.automatic_optimization = "
                "False in __init__ and step them in training_step.",
            ),
            (
                lambda: {"optimizer": (o := sgd()), "lr_scheduler": ReduceLROnPlateau(o)},
                'ReduceLROnPlateau needs the name of the value that it watches: return {"optimizer": ..., '
                '"lr_scheduler": {"scheduler": ..., "monitor": "val_loss"}} from configure_optimizers.',
            ),
            (
                lambda: {"lr_scheduler": None},
                'configure_optimizers returned a dict without the key "optimizer".',
            ),
            (
                lambda: {
                    "optimizer": (o := sgd()),
                    "lr_scheduler": {"scheduler": StepLR(o, 1), "interval": "batch"},
                },
                'A scheduler\'s "interval" must be "step" or "epoch", found \'batch\'.',
            ),
            (
                lambda: "adam",
                "configure_optimizers must return an optimizer, a list of them, two lists (optimizers and schedulers), "
                'a dict {"optimizer": ..., "lr_scheduler": ...} or a list of such dicts, found str where an optimizer '
                "belongs.",
            ),
        ],
    )
    def test_what_cannot_work(self, configured: Any, message: str) -> None:
        with pytest.raises(pl.ConfigError) as refused:
            read_configuration(configured(), automatic=True)
        assert str(refused.value) == message


class TestAutomatic:
    def test_accumulated_steps_are_those_of_the_larger_batch(self) -> None:
        models = [Toy(), Toy()]
        models[1].load_state_dict(models[0].state_dict())
        for model, size, windows in zip(models, (4, 2), (1, 2), strict=True):
            run = trainer(accumulate_grad_batches=windows)
            run.fit(model, rows(batch_size=size))
            assert run.global_step == 3
        torch.testing.assert_close(models[0].layer.weight, models[1].layer.weight)

    def test_a_last_window_that_is_not_full_steps_too(self) -> None:
        run = trainer(accumulate_grad_batches=2, max_epochs=2)
        run.fit(Toy(), rows())
        assert (run.global_step, run.progress.total_batches) == (4, 6)

    @pytest.mark.parametrize("algorithm", ["norm", "value"])
    def test_clipping(self, algorithm: str) -> None:
        seen: list[float] = []

        class Watched(Toy):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                return 1000 * self.loss(batch)

            def optimizer_step(
                self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
            ) -> None:
                optimizer.step(closure=optimizer_closure)
                gradient = torch.cat([p.grad.flatten() for p in self.parameters() if p.grad is not None])
                seen.append((gradient.norm() if algorithm == "norm" else gradient.abs().max()).item())

        trainer(gradient_clip_val=0.5, gradient_clip_algorithm=algorithm).fit(Watched(), rows())
        assert seen == pytest.approx([0.5] * 3, rel=1e-4)

    def test_an_optimizer_step_without_the_closure_is_refused(self) -> None:
        class Forgetful(Toy):
            def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
                pass

        with pytest.raises(pl.ConfigError) as refused:
            trainer().fit(Forgetful(), rows())
        assert str(refused.value) == (
            "Forgetful.optimizer_step did not run optimizer_closure, so nothing was trained. "
            "Pass it on: optimizer.step(closure=optimizer_closure)."
        )

    def test_lbfgs_evaluates_the_closure_several_times(self) -> None:
        class Second(Toy):
            calls = 0

            def training_step(self, batch: Any, batch_idx: int) -> Any:
                self.calls += 1
                return self.loss(batch)

            def configure_optimizers(self) -> Any:
                return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4)

        model, run = Second(), trainer()
        run.fit(model, rows())
        assert run.global_step == 3
        assert model.calls > 3

    @pytest.mark.parametrize(("interval", "expected"), [("step", 0.5**6), ("epoch", 0.5**2)])
    def test_schedulers_step_at_their_interval(self, interval: str, expected: float) -> None:
        class Scheduled(Toy):
            def configure_optimizers(self) -> Any:
                optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
                schedule = LambdaLR(optimizer, lambda count: 0.5**count)
                return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": interval}}

        run = trainer(max_epochs=2)
        run.fit(Scheduled(), rows())
        assert run.optimizers[0].param_groups[0]["lr"] == expected

    def test_a_plateau_without_its_value_is_an_error(self) -> None:
        class Watching(Toy):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                loss = self.loss(batch)
                self.log("loss", loss)
                return loss

            def configure_optimizers(self) -> Any:
                optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
                schedule = ReduceLROnPlateau(optimizer)
                return {
                    "optimizer": optimizer,
                    "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"},
                }

        with pytest.raises(pl.ConfigError) as refused:
            trainer().fit(Watching(), rows())
        assert str(refused.value) == (
            "ReduceLROnPlateau watches 'val_loss', which was not logged. Logged so far: ['loss']. "
            'Log it, or set "strict": False in the scheduler\'s configuration.'
        )

    @pytest.mark.filterwarnings("ignore:.* is the spelling of 1.x:DeprecationWarning")
    @pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16", 16])
    def test_mixed_precision_computes_in_it_and_keeps_full_weights(self, precision: Any) -> None:
        dtypes = set()

        class Mixed(Toy):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                output = self.layer(batch[0])
                dtypes.add(output.dtype)
                return output.float().square().mean()

        model, run = Mixed(), trainer(precision=precision)
        before = model.layer.weight.detach().clone()
        run.fit(model, rows())
        assert dtypes == {torch.bfloat16 if "bf16" in str(precision) else torch.float16}
        assert model.layer.weight.dtype == torch.float32
        assert not torch.equal(model.layer.weight, before)
        assert (run.precision_plugin.scaler is None) == ("bf16" in str(precision))


class Adversaries(pl.LightningModule):
    """Two optimizers by hand, as a GAN has them."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 1)
        self.required: list[tuple[bool, bool]] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for index, optimizer in enumerate(self.optimizers()):
            with self.toggled_optimizer(optimizer):
                self.required.append((self.first.weight.requires_grad, self.second.weight.requires_grad))
                loss = self.second(self.first(batch[0])).square().mean()
                optimizer.zero_grad()
                self.manual_backward(loss)
                self.clip_gradients(optimizer, 0.5, "norm")
                optimizer.step()
            self.log(f"loss_{index}", loss)
        self.lr_schedulers().step()

    def configure_optimizers(self) -> Any:
        first = torch.optim.SGD(self.first.parameters(), lr=0.1)
        return [first, torch.optim.SGD(self.second.parameters(), lr=0.1)], [StepLR(first, 1)]


class TestManual:
    def test_every_optimizers_steps_are_counted_and_toggled(self) -> None:
        model, run = Adversaries(), trainer()
        run.fit(model, rows())
        assert run.global_step == 6
        assert model.required == [(True, False), (False, True)] * 3
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1**4)
        assert set(run.callback_metrics) == {"loss_0", "loss_1"}

    def test_outputs_without_a_loss_are_an_empty_dict(self) -> None:
        outputs = []

        class Listens(Adversaries):
            def on_train_batch_end(self, outputs_: Any, batch: Any, batch_idx: int) -> None:
                outputs.append(outputs_)

        trainer().fit(Listens(), rows(4))
        assert outputs == [{}]

    def test_what_the_trainer_cannot_do_for_it_is_refused(self) -> None:
        with pytest.raises(pl.ConfigError) as refused:
            trainer(gradient_clip_val=1.0).fit(Adversaries(), rows())
        assert str(refused.value) == (
            "Trainer(gradient_clip_val=, accumulate_grad_batches=) have no effect with manual optimization. "
            "Leave them out; clip with self.clip_gradients and accumulate in training_step."
        )

    def test_manual_backward_needs_manual_optimization(self) -> None:
        class Confused(Toy):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                self.manual_backward(self.loss(batch))

        with pytest.raises(pl.ConfigError) as refused:
            trainer().fit(Confused(), rows())
        assert (
            str(refused.value)
            == "self.manual_backward(loss) needs self.automatic_optimization = False in __init__."
        )


class TestWhatCannotBeTrained:
    @pytest.mark.parametrize("hook", [False, True], ids=["plain", "with a hook"])
    def test_a_loss_that_nothing_had_a_part_in(self, hook: bool) -> None:
        class Detached(Toy):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                return self.loss(batch).detach()

        if hook:
            Detached.on_after_backward = lambda self: None  # type: ignore[method-assign]
        with pytest.raises(RuntimeError) as refused:
            trainer().fit(Detached(), rows())
        assert str(refused.value) == (
            "The loss of Detached.training_step does not require grad and does not have a grad_fn: no parameter "
            "that is trained had a part in it. Was it detached, computed under no_grad, or is everything frozen?"
        )

    @pytest.mark.parametrize(
        ("output", "found"),
        [
            ("text", "str"),
            (1.0, "float"),
            ([1], "list"),
            ({"lost": 1}, "a dict without it"),
            ({"loss": 1.0}, 'a dict with "loss": float'),
        ],
    )
    def test_an_output_without_a_loss(self, output: Any, found: str) -> None:
        model = Toy()
        model.training_step = lambda batch, batch_idx: output  # type: ignore[method-assign]
        with pytest.raises(pl.ConfigError) as refused:
            trainer().fit(model, rows())
        assert str(refused.value) == (
            'Toy.training_step must return the loss as a tensor, a dict with the key "loss", or None, '
            f"found {found}."
        )

    def test_an_output_of_manual_optimization(self) -> None:
        class Counts(Adversaries):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                return 3

        with pytest.raises(pl.ConfigError) as refused:
            trainer().fit(Counts(), rows())
        assert str(refused.value) == (
            "Counts.training_step with manual optimization must return a tensor, a dict or None, found int."
        )

    def test_a_closure_that_cannot_be_called(self) -> None:
        class Wrong(Toy):
            def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None) -> None:
                optimizer.step(closure=3)

        with pytest.raises(pl.ConfigError) as refused:
            trainer().fit(Wrong(), rows())
        assert str(refused.value) == (
            "optimizer.step(closure=3): expected a function without arguments, or None, found int."
        )

    def test_an_optimizer_step_that_leaves_the_closure_out(self) -> None:
        class Forgets(Toy):
            def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None) -> None:
                optimizer.step()

        with pytest.raises(pl.ConfigError, match="Forgets.optimizer_step did not run optimizer_closure"):
            trainer().fit(Forgets(), rows())

    @pytest.mark.parametrize(
        ("given", "passed", "message"),
        [
            (
                {"gradient_clip_val": 1.0},
                {"gradient_clip_val": 0.5},
                "Trainer(gradient_clip_val=1.0) and clip_gradients(gradient_clip_val=0.5) contradict each other. "
                "Leave one of them out.",
            ),
            (
                {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"},
                {"gradient_clip_algorithm": GradClipAlgorithmType.NORM},
                "Trainer(gradient_clip_algorithm='value') and clip_gradients(gradient_clip_algorithm='norm') "
                "contradict each other. Leave one of them out.",
            ),
            (
                {},
                {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "mean"},
                "gradient_clip_algorithm must be 'norm' or 'value', found 'mean'.",
            ),
        ],
    )
    def test_clipping_that_contradicts_itself(
        self, given: dict[str, Any], passed: dict[str, Any], message: str
    ) -> None:
        class Clips(Toy):
            def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
                self.clip_gradients(optimizer, **passed)

        with pytest.raises(pl.ConfigError) as refused:
            trainer(**given).fit(Clips(), rows())
        assert str(refused.value) == message


class TestWrappedOptimizer:
    def test_by_itself_it_is_the_one_inside(self) -> None:
        inside = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))], lr=0.5)
        wrapped = LightningOptimizer(inside)
        inside.param_groups[0]["params"][0].grad = torch.ones(2)
        wrapped.step()
        assert wrapped.state_dict() == inside.state_dict()
        wrapped.zero_grad()
        assert inside.param_groups[0]["params"][0].grad is None
        wrapped.load_state_dict({**inside.state_dict(), "state": {}})
        assert inside.state == {}, "what it loads is the optimizer's, not its own"
        with pytest.raises(AttributeError):
            wrapped.no_such_thing
        with pytest.raises(pl.ConfigError) as refused, wrapped.toggle_model():
            pass
        assert str(refused.value) == "optimizer.toggle_model() works inside of trainer.fit only."

    def test_a_copy_is_whole(self) -> None:
        wrapped = LightningOptimizer(torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.5))
        copied = copy.deepcopy(wrapped)
        assert type(copied) is LightningOptimizer
        assert copied.param_groups[0]["lr"] == 0.5
        assert copied.optimizer is not wrapped.optimizer

    def test_what_a_method_of_the_optimizer_sets_is_the_optimizers(self) -> None:
        class Counting(torch.optim.SGD):
            count = 0

            def counted(self) -> None:
                self.count += 1

        inside = Counting([torch.nn.Parameter(torch.ones(2))], lr=0.5)
        LightningOptimizer(inside).counted()
        assert inside.count == 1

    def test_an_algorithm_by_its_name(self) -> None:
        assert GradClipAlgorithmType("value") == "value"
        assert GradClipAlgorithmType.supported_types() == ["value", "norm"]
        assert GradClipAlgorithmType.supported_type("norm")
        assert not GradClipAlgorithmType.supported_type("mean")
        run = trainer(gradient_clip_val=0.5, gradient_clip_algorithm=GradClipAlgorithmType.VALUE)
        run.fit(Toy(), rows())
        assert run.gradient_clip_algorithm == "value"


def test_steps_without_an_optimizer_count() -> None:
    class Nothing(Toy):
        def configure_optimizers(self) -> None:
            return None

    class Stop(pl.Callback):
        batches = 0

        def on_train_batch_end(self, *args: Any) -> None:
            self.batches += 1
            assert self.batches <= 4

    run = trainer(max_steps=4, max_epochs=-1, callbacks=[Stop()], enable_checkpointing=False)
    with pytest.warns(UserWarning, match="train nothing"):
        run.fit(Nothing(), rows())
    assert run.global_step == 4


def test_optimizers_in_a_list_and_one_scheduler() -> None:
    class Bare(Toy):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            return [optimizer], torch.optim.lr_scheduler.StepLR(optimizer, 1)

    run = trainer()
    run.fit(Bare(), rows())
    assert len(run.lr_scheduler_configs) == 1
