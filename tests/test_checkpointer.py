"""A loop of one's own, saved and restored: what is due, what is durable, what is said, what goes wrong."""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from holdfast.checkpoint import catalog, commit
from holdfast.checkpoint.engine import SnapshotChanged
from holdfast.checkpoint.load import load
from holdfast.checkpoint.retention import KeepBest, KeepLast
from holdfast.checkpoint.single import load_tensor
from holdfast.checkpointer import Checkpointer
from holdfast.errors import (
    CheckpointCorrupt,
    CheckpointIncompatible,
    CheckpointNotFound,
    ConfigError,
    StorageError,
)


class Loop:
    """A small training whose state is all there is of it."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = nn.Linear(3, 2)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.1)
        self.state: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer, "epoch": 0}

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.randn(4, 3)).square().sum().backward()
        self.optimizer.step()

    def weight(self) -> torch.Tensor:
        return self.model.weight.detach().clone()


@pytest.fixture
def said() -> Iterator[list[str]]:
    """The lines that holdfast logs."""
    lines: list[str] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler = Lines()
    logging.getLogger("holdfast").addHandler(handler)
    yield lines
    logging.getLogger("holdfast").removeHandler(handler)


@contextlib.contextmanager
def told() -> Iterator[list[str]]:
    """What is warned of within."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
        messages += [str(one.message) for one in caught]


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory)) if directory.exists() else []


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)


def fail_renames(monkeypatch: pytest.MonkeyPatch, times: int, number: int = errno.EIO) -> None:
    """Let the next renames to a checkpoint fail as a disk does."""
    rename, left = os.replace, [times]

    def replace(source: Any, target: Any, **more: Any) -> None:
        if left[0] and str(target).endswith(".ckpt"):
            left[0] -= 1
            raise OSError(number, os.strerror(number))
        rename(source, target, **more)

    monkeypatch.setattr(os, "replace", replace)


# -- what is due -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("background", [True, False])
def test_saved_and_restored(tmp_path: Path, background: bool) -> None:
    loop = Loop()
    with Checkpointer(tmp_path / "run", background=background) as checkpointer:
        assert checkpointer.restore(loop.state) is None
        loop.step()
        loop.state["epoch"] = 4
        path = checkpointer.save(1, loop.state)
        kept = loop.weight()
        loop.step()
    assert path == str(tmp_path / "run" / "step=00000001.ckpt")
    other = Loop(seed=1)
    assert Checkpointer(tmp_path / "run").restore(other.state) == 1
    assert other.weight().equal(kept)
    assert other.state["epoch"] == 4
    assert other.optimizer.state_dict()["state"][0]["step"] == 1


def test_every_third_step_is_due_and_no_other(tmp_path: Path) -> None:
    loop = Loop()
    with Checkpointer(tmp_path, keep=None, every=3) as checkpointer:
        saved = [step for step in range(12) if checkpointer.save(step, loop.state)]
    assert saved == [3, 6, 9]
    assert names(tmp_path) == [f"step=0000000{step}.ckpt" for step in saved]


def test_every_step_is_due_by_default_the_very_first_too(tmp_path: Path) -> None:
    loop = Loop()
    with Checkpointer(tmp_path, keep=None) as checkpointer:
        assert [step for step in range(3) if checkpointer.save(step, loop.state)] == [0, 1, 2]


def test_a_step_that_jumps_over_a_multiple_is_due(tmp_path: Path) -> None:
    loop = Loop()
    with Checkpointer(tmp_path, every=10) as checkpointer:
        assert [step for step in (7, 14, 19, 21, 29, 55) if checkpointer.save(step, loop.state)] == [
            14,
            21,
            55,
        ]


def test_what_is_due_goes_on_where_it_was_after_a_restore(tmp_path: Path) -> None:
    loop = Loop()
    with Checkpointer(tmp_path, every=10) as checkpointer:
        checkpointer.save(13, loop.state)
    with Checkpointer(tmp_path, every=10) as again:
        assert again.restore(loop.state) == 13
        assert [step for step in range(13, 32) if again.save(step, loop.state)] == [20, 30]


def test_force_saves_what_is_not_due_and_over_the_same_step(tmp_path: Path) -> None:
    loop = Loop()
    with Checkpointer(tmp_path, every=10) as checkpointer:
        checkpointer.save(3, loop.state, force=True)
        loop.state["epoch"] = 9
        checkpointer.save(3, loop.state, {"loss": 0.5}, force=True)
    assert names(tmp_path) == ["step=00000003.ckpt"]
    assert load(tmp_path / "step=00000003.ckpt")["epoch"] == 9
    assert catalog.read_summary(tmp_path / "step=00000003.ckpt").metrics == {"loss": 0.5}


def test_a_step_that_goes_back_is_refused_before_it_hides_saves(tmp_path: Path) -> None:
    loop = Loop()
    with Checkpointer(tmp_path, every=10) as checkpointer:
        checkpointer.save(9, loop.state)
        with pytest.raises(ConfigError) as caught:
            checkpointer.save(0, loop.state)
    assert str(caught.value) == (
        "save(step=0): the step has gone back, it was 9 before. Give the number of steps of the whole run, not "
        "of an epoch."
    )


def test_the_file_is_the_moment_of_the_call(tmp_path: Path) -> None:
    """Whatever changes right after, by a step or by the program, is not in the file."""
    loop = Loop()
    buffer, history = torch.zeros(3), [1]
    loop.state |= {"buffer": buffer, "history": history}
    with Checkpointer(tmp_path, keep=None) as checkpointer:
        expected = []
        for step in range(1, 7):
            loop.step()
            buffer += 1
            checkpointer.save(step, loop.state)
            expected.append((loop.weight(), buffer.clone(), list(history)))
            history.append(step)
            buffer += 100
    for number, (weight, was, listed) in enumerate(expected, 1):
        payload = load(tmp_path / f"step={number:08d}.ckpt")
        assert payload["model"]["weight"].equal(weight)
        assert payload["buffer"].equal(was)
        assert payload["history"] == listed


def test_weights_changed_by_hand_while_they_are_copied_are_never_in_a_file(tmp_path: Path) -> None:
    """Large enough to be copied late; clipped by hand after each save, as no optimizer would."""
    model = nn.Linear(256, 256)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = {"model": model, "optimizer": optimizer}
    expected: dict[str, torch.Tensor] = {}
    checkpointer = Checkpointer(tmp_path, keep=None)
    with told() as messages:
        for step in range(1, 9):
            model(torch.randn(2, 256)).sum().backward()
            optimizer.step()
            path = checkpointer.save(step, state)
            assert path is not None
            expected[path] = model.weight.detach().clone()
            if step > 3:
                with torch.no_grad():
                    model.weight.clamp_(-0.01 / step, 0.01 / step)
        checkpointer.close()
    assert messages
    assert all("model/weight was changed" in message for message in messages)
    kept = [str(tmp_path / name) for name in names(tmp_path)]
    assert len(kept) >= 7
    for path in kept:
        assert load(path)["model"]["weight"].equal(expected[path])


# -- what is said and counted ------------------------------------------------------------------------------------


def test_each_save_is_one_line_and_counted(tmp_path: Path, said: list[str]) -> None:
    loop = Loop()
    with Checkpointer(tmp_path, keep=KeepBest(1, "loss"), background=False) as checkpointer:
        for step, loss in enumerate((0.5, 0.25, math.nan), 1):
            checkpointer.save(step, loop.state, {"loss": torch.tensor(loss, requires_grad=True)})
        best, newest = checkpointer.best, checkpointer.newest
    assert best is not None and newest is not None
    assert (best.step, newest.step) == (2, 3)
    lines = [line.split("  ") for line in said]
    assert [line[0] for line in lines] == [f"saved step=0000000{step}.ckpt" for step in (1, 2, 3)]
    assert [line[2:] for line in lines] == [
        ["loss 0.5 (best)"],
        ["loss 0.25 (best)", "deleted step=00000001.ckpt"],
        ["loss nan"],
    ]
    stats = checkpointer.stats
    assert (stats.saves, stats.failed, stats.deleted) == (3, 0, 1)
    assert stats.size_bytes == pytest.approx(3 * newest.size_bytes, abs=200)
    assert stats.last is not None and stats.last.path == newest.path
    assert stats.blocked_s > 0


def test_a_fresh_start_is_said(tmp_path: Path, said: list[str]) -> None:
    loop = Loop()
    torch.save({}, tmp_path / "foreign.ckpt")
    assert Checkpointer(tmp_path / "new").restore(loop.state) is None
    assert Checkpointer(tmp_path).restore(loop.state) is None
    assert said == [
        f"{tmp_path}/new has no checkpoint yet: starting from scratch",
        f"{tmp_path} has no checkpoint (of a Checkpointer; it has 1 others) yet: starting from scratch",
    ]


def test_best_without_a_ranking_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        _ = Checkpointer(tmp_path, keep=KeepLast(2)).best
    assert str(caught.value) == (
        "best: this Checkpointer ranks nothing. Give it a metric to go by, such as "
        'keep=KeepBest(1, "val_loss") | KeepLast(3).'
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, "every=0: give a whole number of steps, at least 1."),
        ({"on_error": "ignore"}, 'on_error=\'ignore\': it is "raise", "warn" or "retry".'),
        (
            {"keep": 0},
            "keep=0: give a whole number of at least 1, None to keep all, or policies such as "
            'KeepBest(1, "val_loss") | KeepLast(3).',
        ),
    ],
)
def test_arguments_that_cannot_work(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Checkpointer(tmp_path, **arguments)
    assert str(caught.value) == message


def test_calls_that_cannot_work(tmp_path: Path) -> None:
    loop = Loop()
    checkpointer = Checkpointer(tmp_path)
    messages = []
    for arguments in [
        (-1, loop.state),
        (1.5, loop.state),
        (1, loop.model),
        (1, {"a/b": 1}),
        (1, {"holdfast": 1}),
        (1, {"pair": (loop.model, 1)}),
        (1, loop.state, {"loss": torch.ones(2)}),
    ]:
        with pytest.raises(ConfigError) as caught:
            checkpointer.save(*arguments)  # type: ignore[arg-type]
        messages.append(str(caught.value))
    assert messages == [
        "save(step=-1): give the number of steps as a whole number, 0 or more.",
        "save(step=1.5): give the number of steps as a whole number, 0 or more.",
        "The state is a Linear; give a dict of what is to be saved, such as "
        '{"model": model, "optimizer": optimizer, "epoch": epoch}.',
        "The state has the key 'a/b'; keys are text without a slash.",
        "The state has the key 'holdfast', which the Checkpointer needs: rename it.",
        "pair/1 is a plain value in a tuple, where it could not be put back: use a list or a dict.",
        "save(metrics=): loss is not one number but a Tensor: tensor([1., 1.])",
    ]
    assert names(tmp_path) == []


# -- damaged files -----------------------------------------------------------------------------------------------


def saved_steps(directory: Path, *steps: int) -> Loop:
    loop = Loop()
    with Checkpointer(directory, keep=None) as checkpointer:
        for step in steps:
            loop.step()
            loop.state["epoch"] = step
            checkpointer.save(step, loop.state)
    return loop


def test_damaged_ones_are_passed_over_and_named_in_one_warning(tmp_path: Path) -> None:
    saved_steps(tmp_path, 1, 2, 3, 4)
    damage(tmp_path / "step=00000003.ckpt")
    cut = tmp_path / "step=00000004.ckpt"
    os.truncate(cut, cut.stat().st_size - 10)
    other = Loop(seed=1)
    with told() as messages:
        assert Checkpointer(tmp_path).restore(other.state) == 2
    assert other.state["epoch"] == 2
    (message,) = messages
    first, flipped, torn, last = message.splitlines()
    assert first == f"Checkpoints in {tmp_path} are damaged and were passed over:"
    assert flipped.startswith("  step=00000003.ckpt: ")
    assert torn == "  step=00000004.ckpt: it does not end with a zip directory"
    assert last == "Going on from step=00000002.ckpt."


def test_all_damaged_is_an_error_and_never_step_0(tmp_path: Path) -> None:
    saved_steps(tmp_path, 1, 2)
    damage(tmp_path / "step=00000001.ckpt")
    os.truncate(tmp_path / "step=00000002.ckpt", 100)
    other = Loop(seed=1)
    before = other.weight()
    with pytest.raises(CheckpointCorrupt) as caught:
        Checkpointer(tmp_path).restore(other.state)
    first, flipped, torn, last = str(caught.value).splitlines()
    assert first == (
        f"{tmp_path} has checkpoints, but not one of them is whole and verified, and starting from step 0 would "
        "bury them:"
    )
    assert flipped.startswith("  step=00000001.ckpt: ")
    assert torn == "  step=00000002.ckpt: it does not end with a zip directory"
    assert last == "Move them away to start anew."
    assert other.weight().equal(before)


def test_an_explicit_path_never_falls_back(tmp_path: Path) -> None:
    saved_steps(tmp_path, 1, 2)
    damage(tmp_path / "step=00000002.ckpt")
    other = Loop(seed=1)
    checkpointer = Checkpointer(tmp_path)
    with pytest.raises(CheckpointCorrupt, match="step=00000002.ckpt is corrupt"):
        checkpointer.restore(other.state, path=tmp_path / "step=00000002.ckpt")
    with pytest.raises(CheckpointNotFound, match="There is no checkpoint"):
        checkpointer.restore(other.state, path=tmp_path / "step=00000003.ckpt")
    torch.save({"model": {}}, tmp_path / "foreign.ckpt")
    with pytest.raises(CheckpointIncompatible) as caught:
        checkpointer.restore(other.state, path=tmp_path / "foreign.ckpt")
    assert str(caught.value) == (
        "foreign.ckpt was not saved by a Checkpointer. Read it with holdfast.load, and give its parts to your "
        "objects."
    )
    assert other.state["epoch"] == 0
    assert checkpointer.restore(other.state, path=tmp_path / "step=00000001.ckpt") == 1


# -- failures ----------------------------------------------------------------------------------------------------


def test_a_failure_in_the_background_is_raised_at_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = Loop()
    checkpointer = Checkpointer(tmp_path, every=10)
    fail_renames(monkeypatch, 1)
    assert checkpointer.save(10, loop.state) is not None
    checkpointer._engine.wait()
    with pytest.raises(StorageError) as caught:
        checkpointer.save(11, loop.state)  # not due, and nevertheless
    path = tmp_path / "step=00000010.ckpt"
    assert str(caught.value) == (
        f"Could not rename a file to {path}: Input/output error. The disk reports errors: look at the system's "
        "log before relying on this file system."
    )
    frames = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert "replacing" in frames  # where the disk refused
    assert names(tmp_path) == []
    # What was not saved is due at once, and the caller who goes on has lost nothing.
    assert checkpointer.save(12, loop.state) == str(tmp_path / "step=00000012.ckpt")
    checkpointer.close()
    assert names(tmp_path) == ["step=00000012.ckpt"]
    assert (checkpointer.stats.saves, checkpointer.stats.failed) == (1, 1)


@pytest.mark.parametrize("background", [True, False])
def test_raised_by_wait_or_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool) -> None:
    loop = Loop()
    fail_renames(monkeypatch, 1)
    checkpointer = Checkpointer(tmp_path, background=background)
    with pytest.raises(StorageError, match="Could not rename"):
        checkpointer.save(1, loop.state)
        checkpointer.wait()
    checkpointer.wait()  # once is enough


def test_raised_at_the_end_of_the_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop()
    fail_renames(monkeypatch, 1)
    with pytest.raises(StorageError, match="Could not rename"), Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, loop.state)


def test_an_exception_in_the_block_is_not_hidden_and_the_save_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = Loop()
    with pytest.raises(ZeroDivisionError), Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, loop.state)
        _ = 1 // 0
    assert names(tmp_path) == ["step=00000001.ckpt"]
    fail_renames(monkeypatch, 1)
    with told() as messages, pytest.raises(ZeroDivisionError), Checkpointer(tmp_path / "b") as checkpointer:
        checkpointer.save(2, loop.state)
        _ = 1 // 0
    (message,) = messages
    assert message.startswith("The save that was under way failed as well: Could not rename a file to ")


@pytest.mark.parametrize("background", [True, False])
def test_warn_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool) -> None:
    loop = Loop()
    fail_renames(monkeypatch, 1)
    with Checkpointer(tmp_path, background=background, on_error="warn") as checkpointer:
        with told() as messages:
            checkpointer.save(1, loop.state)
            checkpointer.wait()
        checkpointer.save(2, loop.state)
    (message,) = messages
    assert message == (
        "step=00000001.ckpt was not saved, and training goes on without it: "
        f"Could not rename a file to {tmp_path}/step=00000001.ckpt: Input/output error. The disk reports errors: "
        "look at the system's log before relying on this file system."
    )
    assert names(tmp_path) == ["step=00000002.ckpt"]


@pytest.mark.parametrize("background", [True, False])
def test_retry_writes_up_to_three_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    loop = Loop()
    fail_renames(monkeypatch, 2)
    with Checkpointer(tmp_path, background=background, on_error="retry") as checkpointer:
        checkpointer.save(1, loop.state)
    assert names(tmp_path) == ["step=00000001.ckpt"]
    last = checkpointer.stats.last
    assert last is not None and last.attempts == 3
    assert load(tmp_path / "step=00000001.ckpt")["model"]["weight"].equal(loop.weight())
    fail_renames(monkeypatch, 3)
    with (
        pytest.raises(StorageError),
        Checkpointer(tmp_path, background=background, on_error="retry") as again,
    ):
        again.restore(loop.state)
        again.save(2, loop.state)
    assert names(tmp_path) == ["step=00000001.ckpt"]


def test_a_snapshot_that_changed_is_taken_again_at_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = Loop()
    checkpointer = Checkpointer(tmp_path, every=10)
    monkeypatch.setattr(
        "holdfast.checkpoint.background.write", lambda *a, **k: (_ for _ in ()).throw(SnapshotChanged(["w"]))
    )
    assert checkpointer.save(10, loop.state) is not None
    checkpointer._engine.wait()
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    loop.step()
    assert checkpointer.save(11, loop.state) == str(tmp_path / "step=00000011.ckpt")
    assert checkpointer.save(12, loop.state) is None
    checkpointer.close()
    assert names(tmp_path) == ["step=00000011.ckpt"]
    assert checkpointer.stats.failed == 1


def test_a_policy_that_raises_deletes_nothing(tmp_path: Path) -> None:
    class Broken(KeepLast):
        def opinions(self, candidates: Any, now: float) -> Any:
            raise RuntimeError("no opinion")

    loop = Loop()
    with Checkpointer(tmp_path, keep=Broken(1)) as checkpointer:
        checkpointer.save(1, loop.state)
        with told() as messages:
            checkpointer.wait()
    assert messages == [f"Nothing was deleted in {tmp_path}: keep= raised RuntimeError('no opinion')."]
    assert names(tmp_path) == ["step=00000001.ckpt"]


def test_used_again_after_it_was_closed(tmp_path: Path) -> None:
    loop = Loop()
    checkpointer = Checkpointer(tmp_path, keep=1)
    for step in (1, 2):
        checkpointer.save(step, loop.state)
        checkpointer.close()
    assert names(tmp_path) == ["step=00000002.ckpt"]


def test_a_disk_without_room_is_told_before_the_first_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit, "free_bytes", lambda path: 1000)
    model = nn.Linear(50, 50)
    state = {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}
    with pytest.warns(UserWarning, match="A checkpoint of this state needs") as told:
        assert Checkpointer(tmp_path).restore(state) is None
    assert [str(one.message) for one in told] == [
        f"A checkpoint of this state needs about 30,600 bytes, and 1,000 are free in {tmp_path}: the first save "
        "will fail. Make room, or choose another directory."
    ]


def test_a_forced_save_is_copied_before_the_call_returns(tmp_path: Path) -> None:
    """Behind the last save of a run weights may be changed by hand: an average put in their place, say."""
    model = nn.Linear(500, 500)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = {"model": model, "optimizer": optimizer}
    with Checkpointer(tmp_path, keep=None) as checkpointer:
        checkpointer.restore(state)
        for step in range(1, 6):
            model(torch.ones(500)).sum().backward()
            optimizer.step()
            checkpointer.save(step, state, force=step == 5)
        then = model.weight.detach().clone()
        with torch.no_grad():
            model.weight.mul_(0)
    assert checkpointer.newest is not None
    assert torch.equal(load_tensor(checkpointer.newest.path, "model/weight"), then)


def test_what_saving_cost_reads_well(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"x": torch.zeros(3)})
    lines = str(checkpointer.stats).splitlines()
    assert [line.split()[0] for line in lines] == ["saves", "the", "files"]
    assert lines[2] == "files     deleted 0"
