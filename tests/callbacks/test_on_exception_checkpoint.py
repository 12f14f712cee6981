"""What an exception would have taken is in a file of its own, and nothing else is touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast.callbacks import ModelCheckpoint
from holdfast.callbacks.on_exception_checkpoint import OnExceptionCheckpoint
from holdfast.checkpoint.load import load
from holdfast.errors import ConfigError
from tests.training.toys import Toy, rows, trainer

# Such a file was not taken at a safe point, which the run that goes on from it says.
SAYS_SO = pytest.mark.filterwarnings(
    "ignore:Once resumed, this run is not bit for bit the one that never stopped"
)


class Breaks(Toy):
    """Raises in the batch after step ``at``."""

    at: int
    error: BaseException

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_step == self.at:
            raise self.error
        return super().training_step(batch, batch_idx)


def checkpoints(directory: Path) -> list[str]:
    """The files in the callback's directory itself; the trainer's default callback has one below it."""
    return sorted(path.name for path in directory.glob("*.ckpt"))


def break_at(step: int, *callbacks: Any, error: BaseException | None = None, **how: Any) -> Breaks:
    module = Breaks()
    module.at, module.error = step, RuntimeError("broken") if error is None else error
    with pytest.raises(BaseException) as caught:
        trainer(callbacks=list(callbacks), max_epochs=2).fit(module, rows(), **how)
    assert caught.value is module.error
    return module


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_the_file_holds_what_was_trained(error: BaseException, tmp_path: Path) -> None:
    callback = OnExceptionCheckpoint(tmp_path)
    assert callback.ckpt_path == str(tmp_path / "on_exception.ckpt")
    module = break_at(4, callback, error=error)
    assert checkpoints(tmp_path) == ["on_exception.ckpt"]
    payload = load(tmp_path / "on_exception.ckpt")
    assert (payload["global_step"], payload["epoch"], payload["holdfast"]["exact"]) == (4, 1, False)
    assert all(torch.equal(payload["state_dict"][name], value) for name, value in module.state_dict().items())


@SAYS_SO
def test_a_run_goes_on_from_it(tmp_path: Path) -> None:
    break_at(4, OnExceptionCheckpoint(tmp_path))
    run = trainer(max_epochs=2, callbacks=[ModelCheckpoint()])
    run.fit(Toy(), rows(), ckpt_path=tmp_path / "on_exception.ckpt")
    assert run.global_step == 6


def test_a_good_file_is_never_overwritten(tmp_path: Path) -> None:
    callback = OnExceptionCheckpoint(tmp_path, "crash")
    break_at(2, callback)
    first = (tmp_path / "crash.ckpt").read_bytes()
    break_at(3, callback)
    break_at(4, OnExceptionCheckpoint(tmp_path, "crash"))
    assert checkpoints(tmp_path) == ["crash-v1.ckpt", "crash-v2.ckpt", "crash.ckpt"]
    assert (tmp_path / "crash.ckpt").read_bytes() == first
    assert callback.ckpt_path == str(tmp_path / "crash-v1.ckpt")


@SAYS_SO
def test_what_a_file_holds_already_is_not_saved_again(tmp_path: Path) -> None:
    break_at(0, OnExceptionCheckpoint(tmp_path))
    assert checkpoints(tmp_path) == []
    break_at(4, OnExceptionCheckpoint(tmp_path))
    break_at(4, OnExceptionCheckpoint(tmp_path), ckpt_path=tmp_path / "on_exception.ckpt")
    assert checkpoints(tmp_path) == ["on_exception.ckpt"]


def test_only_a_fit_is_saved(tmp_path: Path) -> None:
    class BadTest(Toy):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            raise RuntimeError("broken")

    run = trainer(callbacks=OnExceptionCheckpoint(tmp_path))
    run.fit(BadTest(), rows())
    with pytest.raises(RuntimeError, match="^broken$"):
        run.test(BadTest(), rows())
    assert checkpoints(tmp_path) == []


def test_beside_a_model_checkpoint_both_save(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path / "best", every_n_train_steps=2, save_on_exception=True)
    break_at(3, OnExceptionCheckpoint(tmp_path / "last"), best)
    assert checkpoints(tmp_path / "last") == ["on_exception.ckpt"]
    assert len(checkpoints(tmp_path / "best")) == 2


def test_an_empty_name_and_a_remote_directory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        OnExceptionCheckpoint(tmp_path, "")
    assert str(caught.value) == "OnExceptionCheckpoint(filename=...) is empty: give the file's name."
    with pytest.raises(ConfigError) as caught:
        OnExceptionCheckpoint("s3://bucket/a")
    assert str(caught.value) == (
        "OnExceptionCheckpoint(dirpath='s3://bucket/a') is not a local directory: give one, and copy what is "
        "in it."
    )
