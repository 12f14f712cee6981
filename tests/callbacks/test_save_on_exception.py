"""What ModelCheckpoint saves when an exception ends training, and that no good file pays for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import holdfast as pl
from holdfast.callbacks import Callback, ModelCheckpoint
from holdfast.checkpoint import catalog
from holdfast.checkpoint.load import load
from tests.training.toys import Toy, checkpoints, rows, trainer

# Such a file was not taken at a safe point, which the run that goes on from it says.
SAYS_SO = pytest.mark.filterwarnings(
    "ignore:Once resumed, this run is not bit for bit the one that never stopped"
)


class Validated(Toy):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)


class Trouble(RuntimeError):
    pass


def trouble(hook: str, at: int = 1, error: type[BaseException] = Trouble) -> Callback:
    """A callback that raises in ``hook`` when that is called for the ``at``-th time."""
    calls = []

    def raising(self: Any, *args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) == at:
            raise error("trouble")

    return type("Trouble", (Callback,), {hook: raising})()  # type: ignore[no-any-return]


def fit(
    callback: ModelCheckpoint,
    *others: Callback,
    error: type[BaseException] | None = None,
    ckpt_path: Any = None,
    **arguments: Any,
) -> None:
    """Two epochs of 3 steps, or as far as ``error`` lets them."""
    torch.manual_seed(1)
    run = trainer(callbacks=[*others, callback], **{"max_epochs": 2, **arguments})
    module = Validated()
    if error is None:
        run.fit(module, rows(), rows(4), ckpt_path=ckpt_path)
        return
    with pytest.raises(error, match="trouble"):
        run.fit(module, rows(), rows(4), ckpt_path=ckpt_path)


def steps(directory: Path) -> dict[str, int]:
    return {name: load(directory / name)["global_step"] for name in checkpoints(directory)}


@pytest.mark.parametrize(
    ("hook", "at", "kept"),
    [
        # Nothing was trained yet.
        *(
            (hook, 1, {})
            for hook in ("setup", "on_sanity_check_start", "on_train_start", "on_after_backward")
        ),
        ("on_train_batch_end", 1, {"epoch=0-step=1.ckpt": 1}),
        ("on_train_batch_start", 2, {"epoch=0-step=1.ckpt": 1}),
        ("on_validation_batch_start", 2, {"epoch=0-step=3.ckpt": 3}),
        ("on_train_epoch_end", 1, {"epoch=0-step=3.ckpt": 3}),
        # All of it is saved already.
        ("on_train_epoch_start", 2, {"epoch=0-step=3.ckpt": 3}),
        ("on_train_batch_start", 5, {"epoch=0-step=3.ckpt": 3, "epoch=1-step=4.ckpt": 4}),
        ("on_validation_end", 3, {"epoch=0-step=3.ckpt": 3, "epoch=1-step=6.ckpt": 6}),
        ("on_train_end", 1, {"epoch=1-step=6.ckpt": 6}),
        ("teardown", 1, {"epoch=1-step=6.ckpt": 6}),
    ],
)
@pytest.mark.parametrize("error", [Trouble, KeyboardInterrupt, SystemExit])
def test_what_was_trained_since_the_last_save_is_saved(
    tmp_path: Path, hook: str, at: int, kept: dict[str, int], error: type[BaseException]
) -> None:
    fit(ModelCheckpoint(tmp_path, save_on_exception=True), trouble(hook, at, error), error=error)
    assert steps(tmp_path) == kept


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_nothing_is_saved_outside_of_fit(tmp_path: Path, verb: str) -> None:
    run = trainer(callbacks=[ModelCheckpoint(tmp_path, save_on_exception=True)], max_epochs=2)
    run.fit(Validated(), rows(), rows(4))
    run.callbacks.append(trouble(f"on_{'validation' if verb == 'validate' else verb}_batch_start"))
    with pytest.raises(Trouble):
        getattr(run, verb)(Validated(), rows(4))
    assert steps(tmp_path) == {"epoch=1-step=6.ckpt": 6}


@pytest.mark.parametrize("counted", [True, False])
def test_a_save_on_exception_never_overwrites_a_good_file(tmp_path: Path, counted: bool) -> None:
    callback = ModelCheckpoint(
        tmp_path, filename="best", monitor="val_loss", save_last=True, save_on_exception=True,
        enable_version_counter=counted,
    )  # fmt: skip
    fit(callback, trouble("on_train_batch_start", 5), error=Trouble)
    assert steps(tmp_path) == {"best.ckpt": 3, "best-v1.ckpt": 4, "last.ckpt": 3}
    assert callback.best_model_path == str(tmp_path / "best.ckpt")
    assert callback.last_model_path == str(tmp_path / "last.ckpt")
    about = {name: catalog.read_summary(tmp_path / name).exact for name in checkpoints(tmp_path)}
    assert about == {"best.ckpt": True, "best-v1.ckpt": False, "last.ckpt": True}


@pytest.mark.parametrize("options", [{}, {"save_top_k": -1}, {"filename": "{epoch}"}, {"save_last": True}])
@pytest.mark.parametrize("at", [2, 5])
@SAYS_SO
def test_the_resumed_run_ends_with_the_files_of_one_that_was_never_stopped(
    tmp_path: Path, options: dict[str, Any], at: int
) -> None:
    """Goes on from the newest exact file; what the exception left is taken over, or stays beside them."""
    arguments = {"save_on_exception": True, "every_n_train_steps": 3, **options}
    fit(ModelCheckpoint(tmp_path / "straight", **arguments))
    fit(ModelCheckpoint(tmp_path / "broken", **arguments), trouble("on_train_batch_start", at), error=Trouble)
    left = [path.name for path in (tmp_path / "broken").iterdir() if not catalog.read_summary(path).exact]
    assert len(left) == 1
    fit(ModelCheckpoint(tmp_path / "broken", **arguments), ckpt_path="auto")
    straight, broken = steps(tmp_path / "straight"), steps(tmp_path / "broken")
    assert {name: step for name, step in broken.items() if name not in set(left) - set(straight)} == straight
    for name in straight:
        mine, theirs = (load(tmp_path / place / name)["state_dict"] for place in ("broken", "straight"))
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


@SAYS_SO
def test_the_file_of_an_exception_that_was_resumed_from_stays(tmp_path: Path) -> None:
    arguments = {"save_on_exception": True, "filename": "{epoch}", "monitor": "val_loss"}
    fit(ModelCheckpoint(tmp_path, **arguments), trouble("on_train_batch_start", 2), error=Trouble)
    before = (tmp_path / "epoch=0.ckpt").read_bytes()
    fit(ModelCheckpoint(tmp_path, **arguments), ckpt_path=tmp_path / "epoch=0.ckpt", max_epochs=1)
    assert steps(tmp_path) == {"epoch=0.ckpt": 1, "epoch=0-v1.ckpt": 3}
    assert (tmp_path / "epoch=0.ckpt").read_bytes() == before


@SAYS_SO
def test_a_crash_that_comes_again_and_again_leaves_one_file(tmp_path: Path) -> None:
    class Stuck(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 1:
                raise Trouble("trouble")

    for _ in range(3):
        fit(ModelCheckpoint(tmp_path, save_on_exception=True), Stuck(), error=Trouble, ckpt_path="auto")
    assert steps(tmp_path) == {"epoch=0-step=1.ckpt": 1}


def test_a_save_that_had_come_due_when_the_exception_came_costs_no_good_file(tmp_path: Path) -> None:
    """Without save_on_exception too: the state is one from the middle of a batch."""

    class Troubled(Validated):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if self.trainer.global_step == 4:
                raise Trouble("trouble")

    callback = ModelCheckpoint(tmp_path, every_n_train_steps=2)
    with pytest.raises(Trouble):
        trainer(callbacks=callback, max_epochs=2).fit(Troubled(), rows(), rows(4))
    assert steps(tmp_path) == {"epoch=0-step=2.ckpt": 2, "epoch=1-step=4.ckpt": 4}
    assert callback.best_model_path == str(tmp_path / "epoch=0-step=2.ckpt")
    assert not catalog.read_summary(tmp_path / "epoch=1-step=4.ckpt").exact


def test_without_save_on_exception_nothing_is_saved(tmp_path: Path) -> None:
    fit(ModelCheckpoint(tmp_path), trouble("on_train_batch_start", 5), error=Trouble)
    assert steps(tmp_path) == {"epoch=0-step=3.ckpt": 3}


def test_an_error_of_the_file_names_loses_nothing(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path, filename="{step}-{val_los:.1f}", save_on_exception=True)
    with pytest.raises(pl.ConfigError, match="asks for 'val_los'"):
        trainer(callbacks=callback, max_epochs=2).fit(Validated(), rows(), rows(4))
    assert steps(tmp_path) == {"step=3-val_los=nan.ckpt": 3}


def test_fast_dev_run_saves_nothing(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path, save_on_exception=True)
    fit(callback, trouble("on_train_batch_start", 2), error=Trouble, fast_dev_run=3)
    assert checkpoints(tmp_path) == []


def test_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from holdfast.utilities.rank_zero import logger

    lines: list[str] = []
    monkeypatch.setattr(logger, "info", lines.append)
    callback = ModelCheckpoint(tmp_path, save_on_exception=True)
    fit(callback, trouble("on_train_batch_start", 2), error=Trouble)
    first, *_, why = lines[-1].split("  ")
    assert (first, why) == ("saved epoch=0-step=1.ckpt", "on Trouble")
