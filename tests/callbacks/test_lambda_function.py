"""A function is called at its moment with what the hook gets, and nothing else is."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from holdfast.callbacks import Callback
from holdfast.callbacks.lambda_function import LambdaCallback
from holdfast.errors import ConfigError
from tests.training.toys import Toy, rows, trainer


def test_takes_a_function_for_every_moment() -> None:
    hooks = {name for name in vars(Callback) if name.startswith("on_") or name in ("setup", "teardown")}
    parameters = set(inspect.signature(LambdaCallback.__init__).parameters)
    assert hooks - parameters == {"on_restore_optimizers", "on_save_weights"}
    assert parameters - hooks == {"self"}


def test_is_called_with_what_the_hook_gets(tmp_path: Path) -> None:
    calls: list[Any] = []
    callback = LambdaCallback(
        setup=lambda trainer, module, stage: calls.append(("setup", stage)),
        on_train_batch_end=lambda trainer, module, outputs, batch, index: calls.append((module, index)),
        on_save_checkpoint=lambda trainer, module, checkpoint: checkpoint.update(extra=7),
        on_load_checkpoint=lambda trainer, module, checkpoint: calls.append(checkpoint["extra"]),
    )
    module = Toy()
    run = trainer(callbacks=callback)
    run.fit(module, rows())
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert calls == [("setup", "fit"), (module, 0), (module, 1), (module, 2)]
    trainer(callbacks=callback, max_epochs=1).fit(Toy(), rows(), ckpt_path=tmp_path / "a.ckpt")
    assert calls[4:] == [("setup", "fit"), 7]


def test_a_moment_without_a_function_is_not_used() -> None:
    callback = LambdaCallback(on_train_start=print)
    assert callback.uses_hook("on_train_start")
    assert not callback.uses_hook("on_train_batch_end")


def test_what_cannot_be_called_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        LambdaCallback(on_train_end=3)  # type: ignore[arg-type]
    assert str(caught.value) == "LambdaCallback(on_train_end=3): expected a function."
