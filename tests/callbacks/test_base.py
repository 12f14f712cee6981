"""What every callback has, and that importing the room costs nothing."""

from __future__ import annotations

import inspect
import subprocess
import sys
import warnings
from typing import Any

import pytest

import holdfast.callbacks
from holdfast.callbacks import Callback, Checkpoint


def test_only_overridden_hooks_are_used() -> None:
    class Mine(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            pass

    mine = Mine()
    assert mine.uses_hook("on_train_start")
    assert not mine.uses_hook("on_train_end")
    mine.on_train_end = lambda trainer, pl_module: None  # type: ignore[method-assign]
    assert mine.uses_hook("on_train_end")
    assert not Checkpoint().uses_hook("on_train_batch_end")


def test_logging_outside_of_a_run_is_said() -> None:
    class LogsTooEarly(Callback):
        pass

    message = r"^LogsTooEarly\.log\('a'\) was called outside of a run; the value is not kept\.$"
    with pytest.warns(UserWarning, match=message):
        LogsTooEarly().log("a", 1.0)


def test_defaults() -> None:
    class Outer:
        class Mine(Callback):
            pass

    mine = Outer.Mine()
    assert mine.state_key == "test_defaults.<locals>.Outer.Mine"
    assert mine.state_dict() == {}
    trainer: Any = None
    assert Checkpoint().plan_save(trainer) is None


def test_the_hooks_are_lightnings_with_the_same_arguments() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = pytest.importorskip("lightning.pytorch.callbacks").Callback

    def hooks(kind: type) -> dict[str, list[str]]:
        names = [name for name in dir(kind) if name.startswith("on_") or name in ("setup", "teardown")]
        return {name: list(inspect.signature(getattr(kind, name)).parameters) for name in names}

    arguments = ["self", "trainer", "pl_module", "checkpoint"]
    own = {"on_restore_optimizers": arguments, "on_save_weights": arguments}
    assert hooks(Callback) == {**hooks(theirs), **own}


def test_every_name_is_there_and_none_is_loaded_before_it_is_asked_for() -> None:
    for name in holdfast.callbacks.__all__:
        assert name in dir(holdfast.callbacks)
        assert getattr(holdfast.callbacks, name).__name__ == name
    with pytest.raises(AttributeError) as caught:
        _ = holdfast.callbacks.Nothing
    assert str(caught.value) == "module 'holdfast.callbacks' has no attribute 'Nothing'"
    code = (
        "import sys, holdfast.callbacks, holdfast.loggers;"
        "print('torch' in sys.modules, 'rich' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "False False\n"
