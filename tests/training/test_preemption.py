"""A signal makes a fit save at its next safe point and leave; nothing that was trained is lost or done twice."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import holdfast as pl
from holdfast.callbacks import LambdaCallback, ModelCheckpoint, OnExceptionCheckpoint
from holdfast.checkpoint import catalog, commit
from holdfast.checkpoint.load import load
from holdfast.errors import ConfigError, StorageError
from holdfast.plugins.environments import LightningEnvironment, SLURMEnvironment
from holdfast.plugins.io import AsyncCheckpointIO, CheckpointIO
from holdfast.training.preemption import Interrupted, Preempted

from .toys import Toy, checkpoints, rows, trainer

TERM, INT, USR1, USR2 = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2


@pytest.fixture(autouse=True)
def handlers_are_put_back() -> Iterator[None]:
    """Whatever a test does, fit leaves no handler behind."""
    before = {number: signal.getsignal(number) for number in (TERM, INT, USR1, USR2)}
    yield
    assert {number: signal.getsignal(number) for number in before} == before


@pytest.fixture
def own_handler() -> Iterator[Callable[[signal.Signals], list[int]]]:
    """Install a handler of the script's own, and get the list of what it was called for."""
    before: dict[int, Any] = {}

    def install(number: signal.Signals) -> list[int]:
        calls: list[int] = []
        before[number] = signal.signal(number, lambda given, frame: calls.append(given))
        return calls

    yield install
    for number, earlier in before.items():
        signal.signal(number, earlier)


class Validated(Toy):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))


def send(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


def at(hook: str, count: int = 1, *numbers: int, does: Callable[[], None] | None = None) -> pl.Callback:
    """A callback that sends signals, or does something else, when ``hook`` is called for the count-th time."""
    calls: list[None] = []

    def called(*args: Any, **kwargs: Any) -> None:
        calls.append(None)
        if len(calls) == count:
            (does or (lambda: send(*(numbers or (TERM,)))))()

    return LambdaCallback(**{hook: called})


def fit(directory: Path, *callbacks: Any, ckpt_path: Any = None, **arguments: Any) -> pl.Trainer:
    """Three epochs of 3 steps, each validated; the last checkpoint callback is a ModelCheckpoint."""
    torch.manual_seed(3)
    saves = [one for one in callbacks if isinstance(one, ModelCheckpoint)]
    made = [*callbacks, *([] if saves else [ModelCheckpoint(directory, save_top_k=-1)])]
    run = trainer(**{"max_epochs": 3, "default_root_dir": directory, **arguments}, callbacks=made)
    loader = rows(shuffle=True)
    run.fit(Validated(), loader, rows(8), ckpt_path=ckpt_path)
    return run


def stopped(directory: Path, *callbacks: Any, code: int = 143, **arguments: Any) -> Preempted:
    with pytest.raises(Preempted) as caught:
        fit(directory, *callbacks, **arguments)
    assert caught.value.code == code
    return caught.value


def weights(run: pl.Trainer) -> list[Tensor]:
    return [value.clone() for value in run.lightning_module.state_dict().values()]


def assert_same_weights(run: pl.Trainer, other: pl.Trainer) -> None:
    assert run.global_step == other.global_step
    assert all(one.equal(two) for one, two in zip(weights(run), weights(other), strict=True))


# -- where the signal comes ---------------------------------------------------------------------------------


def test_what_it_leaves_and_says(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = trainer(callbacks=ModelCheckpoint(tmp_path), max_epochs=3, default_root_dir=tmp_path)
    run.callbacks.insert(0, at("on_train_batch_start", 5))
    assert not run.received_sigterm
    with pytest.raises(SystemExit) as caught:
        run.fit(Validated(), rows(), rows(8))
    assert (type(caught.value), caught.value.code) == (Preempted, 143)
    assert run.received_sigterm and run.interrupted and run.global_step == 5
    payload, about = load(tmp_path / "stopped.ckpt"), catalog.read_summary(tmp_path / "stopped.ckpt")
    assert (payload["global_step"], payload["holdfast"]["progress"]["stage"]) == (5, "batch")
    assert (about.exact, about.kind, about.step) == (True, "full", 5)
    *said, saved = capfd.readouterr().err.splitlines()
    assert "SIGTERM: saving when this batch is done, then leaving" in said
    assert saved.startswith("saved stopped.ckpt  step 5  ") and saved.endswith(" s")
    assert not any("Preemption" in key or "preemption" in key for key in payload["callbacks"])


MOMENTS = {
    # hook and which call of it -> (global step and stage in the file)
    ("on_train_batch_start", 1): (1, "batch"),
    ("on_train_batch_end", 2): (2, "batch"),
    ("on_before_optimizer_step", 3): (3, "batch"),
    # with the two batches of the sanity check
    ("on_validation_batch_start", 4): (3, "validated"),
    ("on_validation_end", 2): (3, "validated"),
    ("on_train_epoch_end", 1): (3, "end"),
    ("on_train_epoch_start", 2): (4, "batch"),
    ("on_save_checkpoint", 1): (3, "end"),
    ("on_train_batch_start", 9): (9, "batch"),
    ("on_train_epoch_end", 3): (9, "end"),
}


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: f"{moment[0]} {moment[1]}")
def test_goes_on_as_if_never_stopped(tmp_path: Path, moment: tuple[str, int]) -> None:
    whole = fit(tmp_path / "whole")
    stopped(tmp_path / "run", at(*moment))
    payload = load(tmp_path / "run" / "stopped.ckpt")
    progress = payload["holdfast"]["progress"]
    assert (payload["global_step"], progress["stage"]) == MOMENTS[moment]
    assert progress["samples"] == 4 * progress["batch"]
    resumed = fit(tmp_path / "run", ckpt_path="auto")
    assert resumed.resumed_from == str(tmp_path / "run" / "stopped.ckpt")
    assert_same_weights(resumed, whole)
    left = [] if moment[0] != "on_train_epoch_end" or moment[1] != 3 else ["stopped.ckpt"]
    assert checkpoints(tmp_path / "run") == checkpoints(tmp_path / "whole") + left


def test_left_at_the_first_safe_point_it_does_not_validate(tmp_path: Path) -> None:
    seen: list[str] = []
    watch = LambdaCallback(
        on_validation_start=lambda trainer, module: seen.append("validation"),
        on_train_epoch_end=lambda trainer, module: seen.append("epoch"),
        on_exception=lambda trainer, module, error: seen.append(type(error).__name__),
        on_train_end=lambda trainer, module: seen.append("end"),
        teardown=lambda trainer, module, stage: seen.append("teardown"),
    )
    stopped(tmp_path, at("on_train_batch_start", 3), watch, num_sanity_val_steps=0)
    assert seen == ["Preempted"]


def test_behind_the_last_batch_of_all_the_fit_still_ends(tmp_path: Path) -> None:
    """No later start would call what comes behind the last epoch, so it is called before the run leaves."""
    seen: list[str] = []
    watch = LambdaCallback(
        on_exception=lambda trainer, module, error: seen.append("exception"),
        on_train_end=lambda trainer, module: seen.append("end"),
        teardown=lambda trainer, module, stage: seen.append("teardown"),
    )
    stopped(tmp_path, at("on_train_epoch_end", 3), watch)
    assert seen == ["end", "teardown"]
    assert load(tmp_path / "stopped.ckpt")["global_step"] == 9
    assert fit(tmp_path, ckpt_path="auto").global_step == 9


def steps_of(directory: Path) -> dict[str, int]:
    return {name: load(directory / name)["global_step"] for name in checkpoints(directory)}


@pytest.mark.parametrize(
    "hook", ["setup", "on_fit_start", "on_sanity_check_start", "on_validation_batch_end", "on_train_start"]
)
def test_before_the_first_batch_there_is_nothing_to_save(
    tmp_path: Path, hook: str, capfd: pytest.CaptureFixture[str]
) -> None:
    started: list[int] = []
    watch = LambdaCallback(on_train_batch_start=lambda trainer, *rest: started.append(1))
    stopped(tmp_path, at(hook), watch)
    assert (started, checkpoints(tmp_path)) == ([], [])
    assert capfd.readouterr().err.splitlines()[-1] == "nothing is saved: nothing was trained yet"


class Waits(torch.utils.data.Dataset[Any]):
    """Sends a signal while its count-th row is fetched."""

    def __init__(self, count: int) -> None:
        self.left = count

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        self.left -= 1
        if self.left == 0:
            send(TERM)
        return torch.full((3,), index / 12), index


@pytest.mark.parametrize(("count", "step"), [(1, 0), (4, 0), (5, 2), (12, 3)])
def test_while_data_is_fetched(tmp_path: Path, count: int, step: int) -> None:
    run = trainer(callbacks=ModelCheckpoint(tmp_path), max_epochs=2)
    with pytest.raises(Preempted):
        run.fit(Toy(), torch.utils.data.DataLoader(Waits(count), batch_size=4))
    assert (run.global_step, checkpoints(tmp_path)) == (step, ["stopped.ckpt"] if step else [])


@pytest.mark.parametrize(
    "first", [("on_train_epoch_end", 1), ("on_train_batch_end", 2), ("on_train_batch_end", 3)]
)
@pytest.mark.parametrize("hook", ["setup", "on_train_start"])
def test_nothing_new_since_the_resume_leaves_the_file_as_it_is(
    tmp_path: Path, first: tuple[str, int], hook: str, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = fit(tmp_path / "whole")
    root = tmp_path / "run"
    stopped(root, at(*first))
    before = {path.name: path.stat().st_mtime_ns for path in root.iterdir()}
    capfd.readouterr()
    stopped(root, at(hook), ckpt_path="auto")
    assert {path.name: path.stat().st_mtime_ns for path in root.iterdir()} == before
    assert "nothing is saved: nothing was trained since stopped.ckpt" in capfd.readouterr().err
    assert_same_weights(fit(root, ckpt_path="auto"), whole)


def test_in_a_validation_that_follows_a_resume(tmp_path: Path) -> None:
    """Stopped between a batch and its validation, and again in that validation: it is not run a third time."""
    whole = fit(tmp_path / "whole")
    root = tmp_path / "run"
    stopped(root, at("on_train_batch_start", 3))
    stopped(root, at("on_validation_start"), ckpt_path="auto")
    progress = load(root / "stopped.ckpt")["holdfast"]["progress"]
    assert (progress["stage"], progress["validations"], progress["samples"]) == ("validated", 1, 12)
    validations: list[int] = []
    watch = LambdaCallback(
        on_validation_start=lambda trainer, module: validations.append(trainer.global_step)
    )
    assert_same_weights(fit(root, watch, ckpt_path="auto"), whole)
    assert validations == [6, 9]


class Replayed(torch.utils.data.IterableDataset[Any]):
    """Rows without a length: a run that goes on reads them again from the epoch's start."""

    signals = False

    def __iter__(self) -> Iterator[Any]:
        for index in range(12):
            if self.signals and index == 2:
                send(TERM)
            yield torch.full((3,), index / 12), index


def test_while_data_is_read_again_for_a_resume(tmp_path: Path) -> None:
    def life(**how: Any) -> pl.Trainer:
        torch.manual_seed(1)
        data = Replayed()
        data.signals = how.pop("signals", False)
        callbacks = [ModelCheckpoint(tmp_path / how.pop("place", "run")), *how.pop("more", [])]
        run = trainer(callbacks=callbacks, max_epochs=2)
        run.fit(Toy(), torch.utils.data.DataLoader(data, batch_size=4), **how)
        return run

    whole = life(place="whole")
    with pytest.raises(Preempted):
        life(more=[at("on_train_batch_start", 5)])
    before = (tmp_path / "run" / "stopped.ckpt").stat().st_mtime_ns
    with pytest.raises(Preempted):
        life(ckpt_path="auto", signals=True)
    assert (tmp_path / "run" / "stopped.ckpt").stat().st_mtime_ns == before
    assert_same_weights(life(ckpt_path="auto"), whole)


# -- saves at the same point --------------------------------------------------------------------------------


def test_a_save_of_the_same_moment_shares_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And both say what ModelCheckpoint keeps from then on."""
    seen: list[list[str]] = []
    monkeypatch.setattr(commit, "crash_point", lambda name: seen.append(checkpoints(tmp_path)))
    stopped(tmp_path, at("on_train_batch_start", 2), ModelCheckpoint(tmp_path, every_n_train_steps=2))
    assert steps_of(tmp_path) == {"epoch=0-step=2.ckpt": 2, "stopped.ckpt": 2}
    assert (tmp_path / "stopped.ckpt").read_bytes() == (tmp_path / "epoch=0-step=2.ckpt").read_bytes()
    (state,) = load(tmp_path / "stopped.ckpt")["callbacks"].values()
    assert state["best_model_path"] == str(tmp_path / "epoch=0-step=2.ckpt")
    # Until it has its other name, a kill leaves the file under the one that the callback knows.
    assert [names for names in seen if len(names) == 1] and ["stopped.ckpt"] not in seen


def test_weights_alone_are_a_file_of_their_own(tmp_path: Path) -> None:
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_weights_only=True)
    stopped(tmp_path, at("on_train_batch_start", 2), saves)
    kinds = {name: catalog.read_summary(tmp_path / name).kind for name in checkpoints(tmp_path)}
    assert kinds == {"epoch=0-step=2.ckpt": "weights", "stopped.ckpt": "full"}
    # Weights are nothing to go on from, so it stays.
    run = fit(
        tmp_path, ModelCheckpoint(tmp_path, every_n_train_steps=2, save_weights_only=True), ckpt_path="auto"
    )
    assert run.global_step == 9 and "stopped.ckpt" in checkpoints(tmp_path)


@pytest.mark.parametrize("counted", [True, False])
def test_a_callback_that_has_the_name_itself_keeps_it(tmp_path: Path, counted: bool) -> None:
    saves: dict[str, Any] = {
        "dirpath": tmp_path / "run", "filename": "stopped", "every_n_train_steps": 2,
        "enable_version_counter": counted,
    }  # fmt: skip
    whole = fit(tmp_path / "whole", ModelCheckpoint(**{**saves, "dirpath": tmp_path / "whole"}))
    stopped(tmp_path, at("on_train_batch_start", 4), ModelCheckpoint(**saves))
    assert steps_of(tmp_path / "run") == {"stopped.ckpt": 4, "stopped-v1.ckpt": 4}
    resumed = fit(tmp_path, ModelCheckpoint(**saves), ckpt_path="auto")
    assert_same_weights(resumed, whole)
    assert steps_of(tmp_path / "run") == {"stopped.ckpt": 8}


class OwnFormat(CheckpointIO):
    """Writes with torch.save, as a plugin may."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        torch.save(checkpoint, path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
        return torch.load(path, weights_only=False)

    def remove_checkpoint(self, path: Any) -> None:
        os.unlink(path)


@pytest.mark.parametrize("plugin", [OwnFormat, AsyncCheckpointIO, lambda: AsyncCheckpointIO(OwnFormat())])
def test_with_checkpoint_plugins(tmp_path: Path, plugin: Any) -> None:
    """What is written in the background is there when the run leaves; the run's own file goes as ever."""
    whole = fit(tmp_path / "whole", plugins=[plugin()])
    root, seen = tmp_path / "run", []
    watch = LambdaCallback(on_exception=lambda trainer, *rest: seen.append(checkpoints(root)))
    stopped(root, at("on_train_batch_start", 5), watch, plugins=[plugin()])
    assert seen == [["epoch=0-step=3.ckpt", "stopped.ckpt"]]
    stopped(root, at("on_train_batch_start", 1), ckpt_path="auto", plugins=[plugin()])
    assert seen[0] == checkpoints(root)
    resumed = fit(root, ckpt_path="auto", plugins=[plugin()])
    assert_same_weights(resumed, whole)
    assert checkpoints(root) == checkpoints(tmp_path / "whole")


def test_a_background_save_that_fails_is_what_the_fit_ends_with(tmp_path: Path) -> None:
    class Full(OwnFormat):
        def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left on device"):
        fit(tmp_path, at("on_train_batch_start", 2), plugins=[AsyncCheckpointIO(Full())])


@pytest.mark.parametrize("also", [(), ("saves",)])
def test_a_save_that_fails_is_what_the_fit_ends_with(
    tmp_path: Path, also: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    saves = ModelCheckpoint(tmp_path, every_n_train_steps=2 if also else 0)
    run = trainer(callbacks=[at("on_train_batch_start", 2), saves], max_epochs=3)
    with monkeypatch.context() as faults, pytest.raises(StorageError) as caught:
        faults.setattr(os, "fsync", full)
        run.fit(Validated(), rows(), rows(8))
    name = "epoch=0-step=2.ckpt" if also else "stopped.ckpt"
    assert str(caught.value).startswith(f"Could not fsync {tmp_path / name}: No space left on device. ")
    assert os.listdir(tmp_path) == [] and run.received_sigterm
    assert saves.best_model_path == ""


def test_nobody_saves_on_it(tmp_path: Path) -> None:
    saves = ModelCheckpoint(tmp_path / "a", save_on_exception=True)
    stopped(tmp_path, at("on_train_batch_start", 2), OnExceptionCheckpoint(tmp_path / "b"), saves)
    assert (checkpoints(tmp_path / "a"), checkpoints(tmp_path / "b")) == (["stopped.ckpt"], [])
    assert saves.best_model_path == ""


def test_an_error_before_the_safe_point_is_an_error(
    tmp_path: Path, own_handler: Callable[[signal.Signals], list[int]]
) -> None:
    """It ends the fit as it would have; then the signal acts. The file is the exception's, not the run's."""
    calls = own_handler(TERM)

    def trouble(*args: Any) -> None:
        send(TERM)
        raise RuntimeError("trouble")

    saves = ModelCheckpoint(tmp_path, save_on_exception=True)
    with pytest.raises(RuntimeError, match="^trouble$"):
        fit(tmp_path, LambdaCallback(on_train_batch_end=trouble), saves)
    assert steps_of(tmp_path) == {"epoch=0-step=1.ckpt": 1}
    assert not catalog.read_summary(tmp_path / "epoch=0-step=1.ckpt").exact
    assert calls == [TERM, TERM]


DIES = """
import os, signal
import holdfast as pl
from tests.training.toys import Toy, rows, trainer

class Breaks(Toy):
    def training_step(self, batch, batch_idx):
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("trouble")

trainer().fit(Breaks(), rows())
"""


def test_an_error_that_the_signal_would_hide_is_shown(tmp_path: Path) -> None:
    """Python does not get to print it: the signal that comes again ends the process."""
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root), str(root / "src")])
    child = subprocess.run(
        [sys.executable, "-c", DIES], env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert child.returncode == -TERM
    assert "Traceback (most recent call last):" in child.stderr
    assert child.stderr.splitlines()[-1] == "RuntimeError: trouble"


def test_loggers_hear_of_it_and_one_that_fails_keeps_nobody(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    class Broken(pl.loggers.CSVLogger):
        statuses: list[str] = []

        def save(self) -> None:
            if self.statuses:
                raise OSError("no network")

        def finalize(self, status: str) -> None:
            self.statuses.append(status)

    logger = Broken(tmp_path)
    breaks = at("on_train_batch_start", 2, does=lambda: (logger.statuses.append("late"), send(TERM))[0])
    run = trainer(callbacks=[breaks], logger=[logger], enable_checkpointing=False)
    with pytest.raises(Preempted):
        run.fit(Toy(), rows())
    assert logger.statuses == ["late", "interrupted"]
    assert capfd.readouterr().err.splitlines()[-1] == "Broken.save failed: no network"


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"enable_checkpointing": False}, "the trainer has no checkpoint callback"),
        ({"fast_dev_run": 3}, "fast_dev_run is on"),
    ],
)
def test_where_nothing_is_saved_it_says_so_and_leaves(
    tmp_path: Path, arguments: dict[str, Any], why: str, capfd: pytest.CaptureFixture[str]
) -> None:
    run = trainer(**{"callbacks": [at("on_train_batch_start", 2)], **arguments}, max_epochs=3)
    with pytest.raises(Preempted):
        run.fit(Validated(), rows(), rows(8))
    assert (run.global_step, checkpoints(tmp_path)) == (2, [])
    said = capfd.readouterr().err.splitlines()[-2:]
    assert said == ["SIGTERM: leaving when this batch is done", f"nothing is saved: {why}"]


def test_without_a_directory_of_a_callback_it_lies_where_auto_looks(tmp_path: Path) -> None:
    class Own(pl.callbacks.Checkpoint):
        pass

    def life(*more: Any, **how: Any) -> pl.Trainer:
        run = trainer(callbacks=[*more, Own()], default_root_dir=tmp_path, max_epochs=2)
        run.fit(Toy(), rows(), **how)
        return run

    with pytest.raises(Preempted):
        life(at("on_train_batch_start", 2))
    assert (tmp_path / "checkpoints" / "stopped.ckpt").exists()
    assert life(ckpt_path="auto").resumed_from == str(tmp_path / "checkpoints" / "stopped.ckpt")


# -- whose file it is ---------------------------------------------------------------------------------------


def test_it_goes_once_a_later_save_is_durable(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stopped(tmp_path, at("on_train_batch_start", 4))
    seen: list[list[str]] = []
    watch = LambdaCallback(
        on_validation_end=lambda trainer, module: seen.append(checkpoints(tmp_path)),
        on_train_epoch_start=lambda trainer, module: seen.append(checkpoints(tmp_path)),
    )
    # In the background it goes a few steps later.
    saves = ModelCheckpoint(tmp_path, save_top_k=-1, background=False)
    fit(tmp_path, watch, saves, ckpt_path="auto")
    assert seen[:2] == [
        ["epoch=0-step=3.ckpt", "stopped.ckpt"],
        ["epoch=0-step=3.ckpt", "epoch=1-step=6.ckpt"],
    ]
    line = "deleted stopped.ckpt: the run has gone on from there, and is saved"
    assert line in capfd.readouterr().err.splitlines()


def test_a_kill_between_the_later_save_and_its_deletion(tmp_path: Path) -> None:
    """The next start finds both; the run may be done by then, and save nothing any more."""
    stopped(tmp_path, at("on_train_batch_start", 4))
    left = (tmp_path / "stopped.ckpt").read_bytes()
    fit(tmp_path, ckpt_path="auto")
    assert "stopped.ckpt" not in checkpoints(tmp_path)
    (tmp_path / "stopped.ckpt").write_bytes(left)
    run = fit(tmp_path, ckpt_path="auto")
    assert run.resumed_from == str(tmp_path / "epoch=2-step=9.ckpt")
    assert "stopped.ckpt" not in checkpoints(tmp_path)


def test_the_file_that_the_user_named_stays(tmp_path: Path) -> None:
    stopped(tmp_path, at("on_train_batch_start", 4))
    before = (tmp_path / "stopped.ckpt").read_bytes()
    stopped(tmp_path, at("on_train_batch_start", 1), ckpt_path=tmp_path / "stopped.ckpt")
    assert steps_of(tmp_path) == {"epoch=0-step=3.ckpt": 3, "stopped.ckpt": 4, "stopped-v1.ckpt": 5}
    fit(tmp_path, ckpt_path=tmp_path / "stopped.ckpt")
    assert (tmp_path / "stopped.ckpt").read_bytes() == before
    assert "stopped-v1.ckpt" not in checkpoints(tmp_path)


def test_one_that_is_further_on_is_kept_until_the_run_is_there(tmp_path: Path) -> None:
    """Sent back to an earlier file on purpose, the run does not write over what it may still be wanted for."""
    stopped(tmp_path, at("on_train_batch_start", 8))
    back = tmp_path / "epoch=0-step=3.ckpt"
    stopped(tmp_path, at("on_train_batch_start", 1), ckpt_path=back)
    assert steps_of(tmp_path) == {
        "epoch=0-step=3.ckpt": 3, "epoch=1-step=6.ckpt": 6, "stopped.ckpt": 8, "stopped-v1.ckpt": 4,
    }  # fmt: skip
    seen: list[list[str]] = []
    watch = LambdaCallback(
        on_train_epoch_start=lambda *_: seen.append([n for n in checkpoints(tmp_path) if "stopped" in n])
    )
    fit(tmp_path, watch, ckpt_path=tmp_path / "stopped-v1.ckpt")
    assert seen == [["stopped-v1.ckpt", "stopped.ckpt"]]
    assert [name for name in checkpoints(tmp_path) if "stopped" in name] == ["stopped-v1.ckpt"]


def test_a_directory_that_was_moved(tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole")
    stopped(tmp_path / "run", at("on_train_batch_start", 5))
    (tmp_path / "run").rename(tmp_path / "moved")
    stopped(tmp_path / "moved", at("on_train_batch_start", 2), ckpt_path="auto")
    assert steps_of(tmp_path / "moved") == {
        "epoch=0-step=3.ckpt": 3,
        "epoch=1-step=6.ckpt": 6,
        "stopped.ckpt": 7,
    }
    assert_same_weights(fit(tmp_path / "moved", ckpt_path="auto"), whole)
    assert checkpoints(tmp_path / "moved") == checkpoints(tmp_path / "whole")


def test_it_goes_from_wherever_the_run_found_it(tmp_path: Path) -> None:
    """Here the callbacks have changed places."""

    def life(root: Path, first: str, second: str, *more: Any, **how: Any) -> pl.Trainer:
        every = {"a": {"every_n_epochs": 1}, "b": {"every_n_train_steps": 3}}
        saves = [
            ModelCheckpoint(root / name, filename=name, save_top_k=-1, **every[name])
            for name in (first, second)
        ]
        return fit(root, *more, *saves, **how)

    whole = life(tmp_path / "whole", "a", "b")
    root = tmp_path / "run"
    with pytest.raises(Preempted):
        life(root, "a", "b", at("on_train_batch_start", 2))
    assert (root / "a" / "stopped.ckpt").exists()
    with pytest.raises(Preempted):
        life(root, "b", "a", at("on_train_batch_start", 3), ckpt_path="auto")
    assert (steps_of(root / "a"), steps_of(root / "b")) == ({"a.ckpt": 3}, {"b.ckpt": 3, "stopped.ckpt": 5})
    assert_same_weights(life(root, "b", "a", ckpt_path="auto"), whole)
    assert checkpoints(root) == checkpoints(tmp_path / "whole")


def test_another_runs_file_is_never_touched(tmp_path: Path) -> None:
    stopped(tmp_path, at("on_train_batch_start", 2))
    other = (tmp_path / "stopped.ckpt").read_bytes()
    stopped(tmp_path, at("on_train_batch_start", 1))
    assert steps_of(tmp_path) == {"stopped.ckpt": 2, "stopped-v1.ckpt": 1}
    fit(tmp_path, ckpt_path="auto")
    assert (tmp_path / "stopped.ckpt").read_bytes() == other
    assert "stopped-v1.ckpt" not in checkpoints(tmp_path)


def test_the_exit_can_be_caught_and_the_same_trainer_goes_on(tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole")
    torch.manual_seed(3)
    run = trainer(
        callbacks=[at("on_train_batch_start", 5), ModelCheckpoint(tmp_path / "run", save_top_k=-1)],
        max_epochs=3,
    )
    module, loader = Validated(), rows(shuffle=True)
    with pytest.raises(SystemExit):
        run.fit(module, loader, rows(8))
    assert run.received_sigterm
    run.fit(module, loader, rows(8), ckpt_path="auto")
    assert not run.received_sigterm
    assert_same_weights(run, whole)
    assert checkpoints(tmp_path / "run") == checkpoints(tmp_path / "whole")


# -- Ctrl-C -------------------------------------------------------------------------------------------------


def test_the_first_ctrl_c(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    error = stopped(tmp_path, at("on_train_batch_start", 2, INT), code=130)
    assert isinstance(error, Interrupted) and isinstance(error, KeyboardInterrupt)
    assert steps_of(tmp_path) == {"stopped.ckpt": 2}
    line = "SIGINT: saving when this batch is done, then leaving (Ctrl-C again to leave at once)"
    assert line in capfd.readouterr().err.splitlines()


def test_the_second_ctrl_c(tmp_path: Path) -> None:
    """Plain KeyboardInterrupt, in the middle of the batch; nobody saves, though this callback would."""
    seen: list[Any] = []
    watch = LambdaCallback(on_exception=lambda *_: seen.append(signal.getsignal(INT)))
    saves = ModelCheckpoint(tmp_path, save_on_exception=True)
    with pytest.raises(KeyboardInterrupt) as caught:
        fit(tmp_path, at("on_train_batch_start", 2, INT, INT), watch, saves)
    assert type(caught.value) is KeyboardInterrupt
    assert checkpoints(tmp_path) == []
    assert seen == [signal.SIG_DFL], "a third one ends the process, whatever it is at"


@pytest.mark.parametrize("point", ["temp-created", "written", "synced"])
def test_the_second_ctrl_c_cuts_a_save_off(
    tmp_path: Path, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(tmp_path, at("on_train_batch_start", 4))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(commit, "crash_point", lambda name: send(INT) if name == point else None)
    with pytest.raises(KeyboardInterrupt) as caught:
        fit(tmp_path, at("on_train_batch_start", 1, INT), ckpt_path="auto")
    assert type(caught.value) is KeyboardInterrupt
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_ctrl_c_after_sigterm_changes_nothing_yet(tmp_path: Path) -> None:
    stopped(tmp_path, at("on_train_batch_start", 2, TERM, TERM, INT))
    assert steps_of(tmp_path) == {"stopped.ckpt": 2}


def test_what_a_hook_raises_by_itself_is_what_it_ever_was(tmp_path: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt("by hand")

    saves = ModelCheckpoint(tmp_path, save_on_exception=True)
    with pytest.raises(KeyboardInterrupt, match="^by hand$"):
        fit(tmp_path, at("on_train_batch_start", 3, does=interrupt), saves)
    assert steps_of(tmp_path) == {"epoch=0-step=2.ckpt": 2}


@pytest.mark.parametrize("hook", ["on_train_end", "on_fit_end", "teardown"])
def test_a_ctrl_c_that_comes_too_late(tmp_path: Path, hook: str) -> None:
    ended: list[str] = []
    watch = LambdaCallback(teardown=lambda trainer, module, stage: ended.append(stage))
    with pytest.raises(KeyboardInterrupt) as caught:
        fit(tmp_path, at(hook, 1, INT), watch)
    assert (type(caught.value), ended) == (KeyboardInterrupt, ["fit"])
    assert checkpoints(tmp_path) == ["epoch=0-step=3.ckpt", "epoch=1-step=6.ckpt", "epoch=2-step=9.ckpt"]


# -- which signals, and what else handles them ----------------------------------------------------------------


def test_a_signal_of_the_users_choice(tmp_path: Path) -> None:
    for number, given in ((USR1, "SIGUSR1"), (USR2, int(USR2))):
        stopped(tmp_path / number.name, at("on_train_batch_start", 2, number), stop_signals=[given])
        assert steps_of(tmp_path / number.name) == {"stopped.ckpt": 2}


def test_the_scripts_own_handler_is_called_too(
    tmp_path: Path, own_handler: Callable[[signal.Signals], list[int]]
) -> None:
    term, interrupt = own_handler(TERM), own_handler(INT)
    stopped(tmp_path, at("on_train_batch_start", 2, TERM, TERM, INT))
    assert (term, interrupt) == ([TERM, TERM], [INT])


def test_too_late_it_reaches_the_handler_again(
    tmp_path: Path, own_handler: Callable[[signal.Signals], list[int]]
) -> None:
    term = own_handler(TERM)
    run = fit(tmp_path, at("on_train_end"))
    assert run.state.finished and run.received_sigterm
    assert term == [TERM, TERM]


def test_a_handler_that_exits_gets_its_way_when_all_is_saved(tmp_path: Path) -> None:
    """`signal.signal(SIGTERM, lambda *_: sys.exit(0))` is in many a script."""
    before = signal.signal(TERM, lambda number, frame: sys.exit(0))
    try:
        stopped(tmp_path, at("on_train_batch_start", 2))
    finally:
        signal.signal(TERM, before)
    assert load(tmp_path / "stopped.ckpt")["global_step"] == 2


def test_a_job_in_the_background_goes_on_ignoring_ctrl_c(tmp_path: Path) -> None:
    before = signal.signal(INT, signal.SIG_IGN)
    try:
        run = fit(tmp_path, at("on_train_batch_start", 2, INT))
    finally:
        signal.signal(INT, before)
    assert run.global_step == 9 and not (tmp_path / "stopped.ckpt").exists()


def test_a_signal_that_was_ignored_stops_the_fit_all_the_same(tmp_path: Path) -> None:
    before = signal.signal(TERM, signal.SIG_IGN)
    try:
        stopped(tmp_path, at("on_train_batch_start", 2))
        assert signal.getsignal(TERM) is signal.SIG_IGN
        assert fit(tmp_path, at("on_train_end"), ckpt_path="auto").state.finished
    finally:
        signal.signal(TERM, before)


def test_none_at_all_leaves_every_handler_alone(
    tmp_path: Path, own_handler: Callable[[signal.Signals], list[int]]
) -> None:
    term = own_handler(TERM)
    run = fit(tmp_path, at("on_train_batch_start", 2), stop_signals=())
    assert (term, run.global_step, run.received_sigterm) == ([TERM], 9, False)
    with pytest.raises(KeyboardInterrupt) as caught:
        fit(tmp_path, at("on_train_batch_start", 2, INT), stop_signals=())
    assert type(caught.value) is KeyboardInterrupt


def test_a_handler_that_is_taken_over_within_the_fit_is_left_alone(tmp_path: Path) -> None:
    calls: list[int] = []

    def theirs(number: int, frame: Any) -> None:
        calls.append(number)

    before = signal.getsignal(USR1)
    fit(tmp_path, at("on_train_start", does=lambda: signal.signal(USR1, theirs)), stop_signals=["SIGUSR1"])
    assert signal.getsignal(USR1) is theirs
    signal.signal(USR1, before)


def test_in_another_thread_signals_are_left_alone(
    tmp_path: Path, own_handler: Callable[[signal.Signals], list[int]]
) -> None:
    term, runs = own_handler(TERM), []
    thread = threading.Thread(target=lambda: runs.append(fit(tmp_path, at("on_train_batch_start", 2))))
    thread.start()
    thread.join()
    assert (term, runs[0].global_step, runs[0].received_sigterm) == ([TERM], 9, False)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_does_what_it_would_have_done(tmp_path: Path) -> None:
    ended: list[int] = []

    def fork() -> None:
        child = os.fork()
        if child == 0:
            send(TERM)
            os._exit(0)
        ended.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    run = fit(tmp_path, at("on_train_batch_start", 2, does=fork))
    assert (ended, run.global_step) == ([-TERM], 9)


def test_what_is_no_signal_is_refused() -> None:
    refused = {
        ("SIGNONE",): "Trainer(stop_signals=...): 'SIGNONE' is no signal of this system.",
        (4711,): "Trainer(stop_signals=...): 4711 is no signal of this system.",
        ("SIGKILL",): "Trainer(stop_signals=...): SIGKILL cannot be caught by any process.",
        "SIGTERM": "Trainer(stop_signals='SIGTERM') must be several: stop_signals=('SIGTERM',).",
    }
    for given, message in refused.items():
        with pytest.raises(ConfigError) as caught:
            trainer(stop_signals=given)
        assert str(caught.value) == message


# -- several fits --------------------------------------------------------------------------------------------


def test_a_fit_within_a_fit_comes_to_its_end_first(tmp_path: Path) -> None:
    """What it does is done again when the outer one goes on from before it, so the outer one stops behind it."""
    inner: list[pl.Trainer] = []

    def probe(number: int | None) -> pl.Callback:
        return at(
            "on_train_epoch_end", 2,
            does=lambda: inner.append(fit(tmp_path / "inner", at("on_train_batch_start", 2, number or 0), max_epochs=1)),
        )  # fmt: skip

    whole = fit(tmp_path / "whole", probe(None))
    stopped(tmp_path / "run", probe(TERM))
    assert [run.global_step for run in inner] == [3, 3]
    assert checkpoints(tmp_path / "inner") == ["epoch=0-step=3-v1.ckpt", "epoch=0-step=3.ckpt"]
    assert load(tmp_path / "run" / "stopped.ckpt")["global_step"] == 6
    assert_same_weights(fit(tmp_path / "run", ckpt_path="auto"), whole)


def test_two_trainers_one_after_the_other(tmp_path: Path) -> None:
    fit(tmp_path / "first", stop_signals=["SIGTERM"])
    stopped(tmp_path / "second", at("on_train_batch_start", 2))
    stopped(tmp_path / "third", at("on_train_batch_start", 4))
    assert [checkpoints(tmp_path / name)[-1] for name in ("second", "third")] == ["stopped.ckpt"] * 2


def test_validation_by_itself_is_left_to_the_signal(
    tmp_path: Path, own_handler: Callable[[signal.Signals], list[int]]
) -> None:
    term = own_handler(TERM)
    trainer(callbacks=[at("on_validation_start")], enable_checkpointing=False).validate(
        Validated(), rows(8), verbose=False
    )
    assert term == [TERM]


# -- the time is up ------------------------------------------------------------------------------------------


class Clock(pl.Callback):
    """Stands for the timer's clock: one second passes with every training batch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1000.0
        monkeypatch.setattr("holdfast.callbacks.timer.monotonic", lambda: self.now_s)

    def on_train_batch_start(self, *args: Any) -> None:
        self.now_s += 1


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


LONG = {"seconds": 1000}


@pytest.mark.parametrize(
    ("arguments", "at_step", "stage"),
    [
        ({}, 4, "batch"),
        ({"val_check_interval": 2}, 4, "batch"),
        ({"min_steps": 5}, 5, "batch"),
        ({"min_steps": 9}, 9, "batch"),
        ({"min_epochs": 2}, 6, "end"),
    ],
)
def test_time_that_is_up_saves_where_the_run_stops(
    tmp_path: Path, clock: Clock, arguments: dict[str, Any], at_step: int, stage: str
) -> None:
    def life(root: Path, **how: Any) -> pl.Trainer:
        return fit(root, clock, ModelCheckpoint(root), **arguments, **how)

    whole, root = life(tmp_path / "whole"), tmp_path / "run"
    short = life(root, max_time={"seconds": 4})
    assert short.state.finished and not short.received_sigterm
    payload = load(root / "stopped.ckpt")
    assert (payload["global_step"], payload["holdfast"]["progress"]["stage"]) == (at_step, stage)
    again = life(root, ckpt_path="auto", max_time={"seconds": 4})
    assert (again.global_step, again.state.finished) == (at_step, True)
    assert (root / "stopped.ckpt").exists()
    resumed = life(root, ckpt_path="auto", max_time=LONG)
    assert resumed.resumed_from == str(root / "stopped.ckpt")
    assert_same_weights(resumed, whole)
    if at_step < 9:
        assert checkpoints(root) == checkpoints(tmp_path / "whole")


def test_time_that_is_looked_at_between_epochs(tmp_path: Path, clock: Clock) -> None:
    """Nothing is cut short then: the file is the epoch's."""
    whole = fit(tmp_path / "whole", clock)
    timer = pl.callbacks.Timer({"seconds": 4}, interval="epoch")
    assert fit(tmp_path / "run", clock, timer).global_step == 6
    assert load(tmp_path / "run" / "stopped.ckpt")["holdfast"]["progress"]["stage"] == "end"
    assert catalog.read_summary(tmp_path / "run" / "epoch=1-step=6.ckpt").exact
    assert_same_weights(fit(tmp_path / "run", clock, ckpt_path="auto", max_time=LONG), whole)


def test_what_follows_the_cut_is_no_file_to_go_on_from_exactly(tmp_path: Path, clock: Clock) -> None:
    """A run that has more time never had this end of an epoch, so ``auto`` takes the one from before it."""
    fit(tmp_path, clock, max_time={"seconds": 4})
    exact = {name: catalog.read_summary(tmp_path / name).exact for name in checkpoints(tmp_path)}
    assert exact == {"epoch=0-step=3.ckpt": True, "epoch=1-step=4.ckpt": False, "stopped.ckpt": True}


def test_a_signal_after_the_time_is_up_leaves_the_file_as_it_is(tmp_path: Path, clock: Clock) -> None:
    stopped(tmp_path, clock, at("on_validation_start", 3), max_time={"seconds": 4})
    progress = load(tmp_path / "stopped.ckpt")["holdfast"]["progress"]
    assert (progress["global_step"], progress["stage"]) == (4, "batch")


def test_time_that_is_up_before_anything_is_trained(tmp_path: Path, clock: Clock) -> None:
    run = fit(tmp_path, clock, max_time={"seconds": 0})
    assert (run.global_step, run.state.finished, checkpoints(tmp_path)) == (0, True, [])


def test_time_that_is_up_where_nothing_is_saved(
    tmp_path: Path, clock: Clock, capfd: pytest.CaptureFixture[str]
) -> None:
    run = trainer(callbacks=[clock], enable_checkpointing=False, max_time={"seconds": 4}, max_epochs=3)
    run.fit(Toy(), rows())
    assert (run.global_step, run.state.finished) == (4, True)
    assert "nothing is saved" not in capfd.readouterr().err


def test_time_is_kept_where_no_signal_is_handled(tmp_path: Path, clock: Clock) -> None:
    fit(tmp_path, clock, max_time={"seconds": 4}, stop_signals=())
    assert load(tmp_path / "stopped.ckpt")["global_step"] == 4


# -- SLURM -----------------------------------------------------------------------------------------------------


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job of SLURM's, whose `scontrol` writes down what it is asked, and fails where FAILS is set."""
    commands = tmp_path / "commands"
    commands.mkdir()
    script = commands / "scontrol"
    script.write_text(
        f'#!/bin/sh\necho "$@" $(ls {tmp_path}/run | grep stopped) >> {tmp_path}/calls\n'
        'test -z "$FAILS" || { echo "$FAILS" >&2; exit 3; }\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    for name, value in {"JOB_ID": "12", "JOB_NAME": "train", "NTASKS": "1", "PROCID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    (tmp_path / "run").mkdir()
    (tmp_path / "calls").touch()
    return tmp_path / "calls"


@pytest.mark.parametrize("number", [USR1, TERM])
def test_a_job_is_requeued_when_its_file_is_there(
    tmp_path: Path, job: Path, number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    stopped(tmp_path / "run", at("on_train_batch_start", 2, number))
    assert job.read_text() == "requeue 12 stopped.ckpt\n"
    assert capfd.readouterr().err.splitlines()[-1] == "SLURM starts the job again"


def test_a_task_of_an_array(tmp_path: Path, job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "11")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "4")
    stopped(tmp_path / "run", at("on_train_batch_start", 2))
    assert job.read_text() == "requeue 11_4 stopped.ckpt\n"


def test_before_anything_is_trained_it_is_requeued_too(tmp_path: Path, job: Path) -> None:
    stopped(tmp_path / "run", at("on_train_start"))
    assert job.read_text() == "requeue 12\n"


def test_behind_the_last_epoch_it_is_requeued_for_what_follows_the_fit(tmp_path: Path, job: Path) -> None:
    stopped(tmp_path / "run", at("on_train_epoch_end", 3))
    assert job.read_text() == "requeue 12 stopped.ckpt\n"


@pytest.mark.parametrize(
    ("numbers", "arguments", "code"),
    [
        ((INT, TERM), {}, 130),
        ((TERM,), {"plugins": [SLURMEnvironment(auto_requeue=False)]}, 143),
        ((TERM,), {"plugins": [LightningEnvironment()]}, 143),
        ((TERM,), {"fast_dev_run": 3}, 143),
    ],
)
def test_who_is_not_requeued(
    tmp_path: Path, job: Path, numbers: tuple[int, ...], arguments: dict[str, Any], code: int
) -> None:
    """Ctrl-C is the user's; and a run that saves nothing would begin anew each time."""
    stopped(tmp_path / "run", at("on_train_batch_start", 2, *numbers), code=code, **arguments)
    assert job.read_text() == ""


def test_a_requeue_signal_of_the_users_choice(tmp_path: Path, job: Path) -> None:
    environment = SLURMEnvironment(requeue_signal=USR2)
    stopped(tmp_path / "run", at("on_train_batch_start", 2, USR2), plugins=[environment])
    assert job.read_text() == "requeue 12 stopped.ckpt\n"


def test_what_scontrol_answers_is_said(
    tmp_path: Path, job: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAILS", "Job is not allowed to be requeued")
    stopped(tmp_path / "run", at("on_train_batch_start", 2))
    assert capfd.readouterr().err.splitlines()[-1] == (
        "SLURM: `scontrol requeue 12` failed with code 3: Job is not allowed to be requeued. "
        'Submit the job again: ckpt_path="auto" goes on'
    )
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    stopped(tmp_path / "run", at("on_train_batch_start", 2), ckpt_path="auto")
    assert capfd.readouterr().err.splitlines()[-1] == (
        "SLURM: `scontrol requeue 12` failed: [Errno 2] No such file or directory: 'scontrol'. "
        'Submit the job again: ckpt_path="auto" goes on'
    )
    monkeypatch.setenv("SLURM_JOB_NAME", "bash")
    stopped(tmp_path / "run", at("on_train_batch_start", 1), ckpt_path="auto", plugins=[SLURMEnvironment()])
    assert capfd.readouterr().err.splitlines()[-1] == (
        "SLURM: there is no job to requeue: SLURM_JOB_ID is not set, or the job is interactive. Submit the job again: "
        'ckpt_path="auto" goes on'
    )
