"""Methods of LightningModule that people override or call: who calls them, with what, how often."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchmetrics
from torch import nn

from holdfast.callbacks import EarlyStopping
from tests.training.toys import Toy, rows, trainer


class Overriding(Toy):
    """Notes each call of what it overrides, and does what the method would have done."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        self.calls.append(("step", epoch, batch_idx))
        optimizer.step(closure=optimizer_closure)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        self.calls.append(("zero_grad", epoch, batch_idx))
        optimizer.zero_grad()

    def backward(self, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        self.calls.append("backward")
        loss.backward()

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: Any = None,
        gradient_clip_algorithm: Any = None,
    ) -> None:
        self.calls.append(("clip", gradient_clip_val, gradient_clip_algorithm))
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        self.calls.append(("schedule", type(scheduler).__name__, metric))
        scheduler.step()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        return [optimizer], [{"scheduler": schedule, "interval": "step", "frequency": 2}]


def test_overrides_of_a_step_are_called_in_lightnings_order() -> None:
    model = Overriding()
    run = trainer(gradient_clip_val=0.5, gradient_clip_algorithm="value")
    run.fit(model, rows())
    of_a_batch = [
        [("step", 0, batch), ("zero_grad", 0, batch), "backward", ("clip", 0.5, "value")]
        for batch in range(3)
    ]
    assert model.calls == [*of_a_batch[0], *of_a_batch[1], ("schedule", "StepLR", None), *of_a_batch[2]]
    assert run.lr_scheduler_configs[0].scheduler.get_last_lr() == [0.05]
    assert run.global_step == 3


def test_a_schedulers_own_metric_reaches_its_step() -> None:
    class Plateau(Overriding):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("train_loss", 2.5, on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

        def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
            self.calls.append(("schedule", float(metric)))
            scheduler.step(metric)

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return {"optimizer": optimizer, "lr_scheduler": schedule, "monitor": "train_loss"}

    model = Plateau()
    trainer(max_epochs=2).fit(model, rows())
    assert [call for call in model.calls if call[0] == "schedule"] == [("schedule", 2.5)] * 2


def test_callbacks_of_the_module_join_those_of_the_trainer() -> None:
    class Stopping(Toy):
        def on_train_epoch_end(self) -> None:
            self.log("goal", 1.0)

        def configure_callbacks(self) -> Any:
            return EarlyStopping("goal", stopping_threshold=2.0, check_on_train_epoch_end=True)

    run = trainer(max_epochs=9, enable_checkpointing=False)
    run.fit(Stopping(), rows())
    assert run.current_epoch == 1
    assert run.early_stopping_callback is not None and run.early_stopping_callback.monitor == "goal"


def test_layers_made_in_configure_model_are_trained_saved_and_loaded(tmp_path: Any) -> None:
    class Late(Toy):
        def __init__(self) -> None:
            super().__init__()
            del self.layer

        def configure_model(self) -> None:
            if not hasattr(self, "layer"):
                self.layer = nn.Linear(3, 1)

    model = Late()
    run = trainer()
    run.fit(model, rows())
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert torch.equal(Late.load_from_checkpoint(tmp_path / "a.ckpt").layer.weight, model.layer.weight)


def test_freeze_and_unfreeze() -> None:
    model = Toy()
    model.freeze()
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    model.unfreeze()
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())


def test_a_metric_may_be_named_by_its_attribute_and_logged_on_rank_zero_only() -> None:
    class Measuring(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.metrics = nn.ModuleDict({"mean": torchmetrics.MeanMetric()})

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            mean = self.metrics["mean"]
            mean(float(batch_idx))
            self.log("mean", mean, on_step=False, on_epoch=True, metric_attribute="metrics.mean")
            self.log("batch", float(batch_idx), rank_zero_only=True)
            return super().training_step(batch, batch_idx)

    run = trainer()
    run.fit(Measuring(), rows())
    assert run.callback_metrics == {"mean": torch.tensor(1.0), "batch": torch.tensor(2.0)}


def test_without_a_trainer_a_module_knows_its_place() -> None:
    module = Toy()
    assert (module.current_epoch, module.global_step, module.global_rank, module.local_rank) == (0, 0, 0, 0)
    assert (module.device, module.dtype) == (torch.device("cpu"), torch.float32)
    assert module.logger is None and module.loggers == []
    assert module.double().dtype == torch.float64
    with pytest.raises(RuntimeError) as refused:
        _ = module.trainer
    assert str(refused.value) == "Toy is not attached to a `Trainer`."
