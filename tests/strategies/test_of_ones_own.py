"""A strategy that a user derives: what it overrides is called, in Lightning's order, and the result is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from holdfast.strategies import SingleDeviceStrategy
from tests.training.toys import Toy, rows, trainer


def recording(*names: str) -> tuple[SingleDeviceStrategy, list[str]]:
    """A strategy that notes the calls of these methods and does what it would have done."""
    called: list[str] = []

    def method(name: str) -> Any:
        def overridden(self: Any, *args: Any, **kwargs: Any) -> Any:
            called.append(name)
            return getattr(SingleDeviceStrategy, name)(self, *args, **kwargs)

        return overridden

    cls = type("Own", (SingleDeviceStrategy,), {name: method(name) for name in names})
    return cls("cpu"), called


def test_a_run() -> None:
    strategy, called = recording(
        "connect", "setup_environment", "setup", "model_to_device", "on_train_start", "batch_to_device",
        "on_train_batch_start", "optimizer_step", "training_step", "backward", "on_train_end", "teardown",
    )  # fmt: skip
    torch.manual_seed(1)
    model = Toy()
    made = trainer(accelerator="auto", strategy=strategy)
    made.fit(model, rows(4))
    assert called == [
        "connect", "setup_environment", "setup", "model_to_device", "on_train_start", "batch_to_device",
        "on_train_batch_start", "optimizer_step", "training_step", "backward", "on_train_end", "teardown",
    ]  # fmt: skip
    assert (strategy.model, strategy.lightning_module, strategy.optimizers) == (model, model, made.optimizers)
    torch.manual_seed(1)
    plain = Toy()
    trainer().fit(plain, rows(4))
    assert torch.equal(plain.layer.weight, model.layer.weight)


def test_evaluation_steps() -> None:
    strategy, called = recording(
        "validation_step", "test_step", "predict_step", "on_test_start", "on_test_end"
    )

    class Evaluated(Toy):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            called.append("module's")

        test_step = validation_step

    made = trainer(accelerator="auto", strategy=strategy)
    made.validate(Evaluated(), rows(4))
    made.test(Evaluated(), rows(4))
    assert called == ["validation_step", "module's", "on_test_start", "test_step", "module's", "on_test_end"]


def test_the_optimizer_argument_of_backward() -> None:
    optimizers: list[Any] = []

    class Own(SingleDeviceStrategy):
        def backward(self, closure_loss: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            optimizers.append(optimizer)
            return super().backward(2 * closure_loss, optimizer, *args, **kwargs)

    strategy = Own("cpu")
    made = trainer(accelerator="auto", strategy=strategy)
    made.fit(Toy(), rows(4))
    assert optimizers == made.optimizers


def test_restoring(tmp_path: Path) -> None:
    strategy, called = recording(
        "lightning_module_state_dict", "optimizer_state", "save_checkpoint", "load_checkpoint",
        "load_optimizer_state_dict",
    )  # fmt: skip
    made = trainer(accelerator="auto", strategy=strategy)
    made.fit(Toy(), rows(4))
    made.save_checkpoint(tmp_path / "a.ckpt")
    assert called == ["lightning_module_state_dict", "optimizer_state", "save_checkpoint"]
    called.clear()
    trainer(accelerator="auto", strategy=strategy, max_epochs=2).fit(
        Toy(), rows(4), ckpt_path=tmp_path / "a.ckpt"
    )
    assert called == ["load_checkpoint", "load_optimizer_state_dict"]


def test_loading_weights(tmp_path: Path) -> None:
    loaded: list[Any] = []

    class Loads(SingleDeviceStrategy):
        def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
            loaded.append((sorted(checkpoint["state_dict"]), strict))
            super().load_model_state_dict(checkpoint, strict=strict)

    class Validated(Toy):
        def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    model, made = Validated(), trainer()
    made.fit(model, rows(4))
    made.save_checkpoint(tmp_path / "a.ckpt")
    other = Validated()
    other.strict_loading = False
    run = trainer(accelerator="auto", strategy=Loads("cpu"))
    run.validate(other, rows(4), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert loaded == [(["layer.bias", "layer.weight"], False)]
    assert torch.equal(other.layer.weight, model.layer.weight)


def test_a_loader_is_wrapped_once(tmp_path: Path) -> None:
    given: list[int] = []

    class Wrapper:
        def __init__(self, loader: Any) -> None:
            self.loader = loader

        def __len__(self) -> int:
            return len(self.loader)

        def __iter__(self) -> Any:
            return iter(self.loader)

    class Wraps(SingleDeviceStrategy):
        def process_dataloader(self, dataloader: Any) -> Any:
            given.append(len(dataloader))
            return Wrapper(dataloader)

    class Validated(Toy):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...

    made = trainer(accelerator="auto", strategy=Wraps("cpu"), max_epochs=2)
    model = Validated()
    made.fit(model, rows(12), [rows(8), rows(4), Wrapper(rows(4))])
    assert sorted(given) == [1, 1, 2, 3]
    assert type(made.train_dataloader) is Wrapper
    assert model.seen == [*range(12), *range(12)]
    assert made.strategy.handles_gradient_accumulation is False


def test_optimizers_may_be_left_alone(tmp_path: Path) -> None:
    class Leaves(SingleDeviceStrategy):
        @property
        def lightning_restore_optimizer(self) -> bool:
            return False

    class Momentum(Toy):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

        def on_train_start(self) -> None:
            states.append(len(self.trainer.optimizers[0].state))

    states: list[int] = []
    made = trainer()
    made.fit(Momentum(), rows(4))
    made.save_checkpoint(tmp_path / "a.ckpt")
    for strategy in ("auto", Leaves("cpu")):
        trainer(accelerator="auto", strategy=strategy, max_epochs=2).fit(
            Momentum(), rows(4), ckpt_path=tmp_path / "a.ckpt"
        )
    assert states == [0, 2, 0]


def test_agreement_of_one_process() -> None:
    strategy = SingleDeviceStrategy("cpu")
    strategy.barrier("here")
    assert strategy.broadcast({"a": 1}) == {"a": 1}
    assert strategy.reduce(torch.tensor(3.0), reduce_op="sum") == 3
    assert torch.equal(strategy.all_gather(torch.ones(2)), torch.ones(2))
    assert strategy.reduce_boolean_decision(True, all=False) is True
    assert strategy.parallel_devices == [torch.device("cpu")]


def test_steps_get_what_the_modules_take() -> None:
    got: list[int] = []

    class Own(SingleDeviceStrategy):
        def validation_step(self, *args: Any, **kwargs: Any) -> Any:
            got.append(len(args))
            return super().validation_step(*args, **kwargs)

    class Evaluated(Toy):
        def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    class Told(Toy):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            got.append(dataloader_idx)

    made = trainer(accelerator="auto", strategy=Own("cpu"), profiler="simple")
    made.validate(Evaluated(), [rows(4), rows(4)])
    assert got == [2, 2]
    got.clear()
    made.validate(Told(), [rows(4), rows(4)])
    assert got == [3, 0, 3, 1]
