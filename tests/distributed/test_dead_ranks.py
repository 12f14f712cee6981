"""A rank that fails, or is killed, ends the others in bounded time, with an error that names it."""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

import holdfast as pl
from holdfast.errors import RankFailed
from holdfast.strategies import DDPStrategy
from holdfast.strategies.failures import is_of_communication, look, of_exit_code
from tests.training.toys import Toy, rows, trainer

from .ranks import run_ranks, start_ranks

PATIENCE_S = 60
"""Far less than the half hour after which a collective gives up."""


class Failing(Toy):
    """Does something on one rank, in its third batch."""

    def __init__(self, rank: int, what: str) -> None:
        super().__init__()
        self.rank, self.what = rank, what

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 2 and self.global_rank == self.rank:
            if self.what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.what == "exit":
                raise SystemExit(3)
            raise ValueError("no more")
        return super().training_step(batch, batch_idx)


def ddp(**arguments: Any) -> pl.Trainer:
    return trainer(accelerator="cpu", strategy="ddp", **arguments)


def error_of(run: Any) -> tuple[str, str, int | None]:
    """What a call raises: type, first line, and rank."""
    try:
        run()
    except Exception as error:
        return type(error).__name__, str(error).split("\n")[0], getattr(error, "rank", None)
    return "", "", None


def fit_with(rank: int, what: str) -> tuple[str, str, int | None]:
    return error_of(lambda: ddp().fit(Failing(rank, what), rows(36)))


def wait_for_everybody(place: str, ranks: int) -> None:
    """Come together without the job's own means, which have failed."""
    (Path(place) / os.environ["RANK"]).touch()
    while len(list(Path(place).iterdir())) < ranks:
        time.sleep(0.02)


def fit_and_stay(rank: int, place: str) -> tuple[str, str, int | None]:
    """The rank that fails does not end: only its failure tells the others."""
    found = fit_with(rank, "raise")
    wait_for_everybody(place, 3)
    return found


@pytest.mark.parametrize("rank", [0, 1])
def test_the_error_of_one_rank_is_that_of_all(rank: int, tmp_path: Path) -> None:
    own = ("ValueError", "no more", None)
    theirs = ("RankFailed", f"rank {rank} failed with ValueError: no more.", rank)
    expected = [own if one == rank else theirs for one in range(3)]
    assert run_ranks(fit_and_stay, rank, str(tmp_path), ranks=3, timeout_s=PATIENCE_S) == expected


def whole_error() -> tuple[str, str]:
    try:
        ddp().fit(Failing(1, "raise"), rows(36))
    except RankFailed as error:
        return str(error), type(error.__cause__).__name__
    except ValueError:
        pass
    return "", ""


def test_the_message_has_the_traceback_of_the_other_rank() -> None:
    message, cause = run_ranks(whole_error, timeout_s=PATIENCE_S)[0]
    assert message.startswith(
        "rank 1 failed with ValueError: no more.\n\nOn rank 1:\n\nTraceback (most recent call last):\n"
    )
    assert message.endswith('in training_step\n    raise ValueError("no more")\nValueError: no more\n')
    assert cause == "RuntimeError"


@pytest.mark.parametrize(
    ("rank", "what", "told"),
    [
        (1, "kill", "rank 1 is gone."),
        (0, "kill", "rank 0 is gone, and the job's store with it."),
        (1, "exit", "rank 1 has left: SystemExit: 3."),
    ],
)
def test_a_rank_that_is_gone(rank: int, what: str, told: str) -> None:
    ended = start_ranks(fit_with, rank, what, ranks=3).wait(PATIENCE_S)
    assert [one.code for one in ended if one.rank == rank] == [-signal.SIGKILL if what == "kill" else 3]
    others = [one for one in ended if one.rank != rank]
    assert [(one.error, one.value) for one in others] == [("", ("RankFailed", told, rank))] * 2


def wait_for_all(how: str) -> tuple[str, str, int | None]:
    made = ddp()
    made.validate(Toy(), rows(6), verbose=False) if how == "later" else None

    class Waits(Toy):
        def on_fit_start(self) -> None:
            if self.global_rank == 1:
                raise ValueError("before the barrier")
            self.trainer.strategy.barrier()

    return error_of(lambda: made.fit(Waits(), rows(6)))


def test_a_rank_that_fails_while_others_wait_in_a_barrier() -> None:
    theirs = ("RankFailed", "rank 1 failed with ValueError: before the barrier.", 1)
    assert run_ranks(wait_for_all, "first", ranks=3, timeout_s=PATIENCE_S) == [
        theirs, ("ValueError", "before the barrier", None), theirs,
    ]  # fmt: skip


def fail_between_requests() -> tuple[str, str, int | None]:
    made = ddp()
    made.fit(Toy(), rows(6))
    if made.global_rank == 1:
        try:
            raise KeyError("between")
        except KeyError:
            # As the interpreter does with what nobody catches.
            sys.excepthook(*sys.exc_info())
        os._exit(1)
    while look(made.strategy.store) is None:  # type: ignore[attr-defined]
        time.sleep(0.02)
    return error_of(lambda: made.fit(Toy(), rows(6)))


def test_an_error_between_two_requests() -> None:
    ended = start_ranks(fail_between_requests).wait(PATIENCE_S)
    assert ended[0].value == ("RankFailed", "rank 1 failed with KeyError: 'between'.", 1), ended[0]
    assert "KeyError: 'between'" in ended[1].output


def fail_and_go_on(place: str) -> tuple[Any, ...]:
    made = ddp()
    first = error_of(lambda: made.fit(Failing(1, "raise"), rows(36)))
    exchanged = error_of(lambda: made.strategy.barrier())
    wait_for_everybody(place, 2)
    again = ddp()
    again.fit(Toy(), rows(36))
    return first[0], exchanged[0], again.global_step


def test_who_catches_the_error_may_start_over(tmp_path: Path) -> None:
    """Until then whatever has to be exchanged is refused, rather than waited for."""
    assert run_ranks(fail_and_go_on, str(tmp_path), timeout_s=PATIENCE_S) == [
        ("RankFailed", "RankFailed", 5), ("ValueError", "RankFailed", 5),
    ]  # fmt: skip


def come_alone() -> tuple[str, str, int | None]:
    if os.environ["RANK"] == "1":
        return "", "", None
    strategy = DDPStrategy(timeout=timedelta(seconds=1))
    return error_of(lambda: trainer(accelerator="cpu", strategy=strategy).fit(Toy(), rows(6)))


def test_a_rank_that_never_comes() -> None:
    assert run_ranks(come_alone, timeout_s=PATIENCE_S)[0] == (
        "RankFailed",
        "rank 1 of 2 did not come within 1 s. Every process of the job has to be started, and to run the same "
        "requests to the trainer.",
        1,
    )


def error_of_ones_own() -> tuple[str, str, int | None]:
    class Refused(Toy):
        def on_fit_start(self) -> None:
            raise pl.ConfigError("not like this")

    return error_of(lambda: ddp().fit(Refused(), rows(6)))


def test_the_same_error_on_all_ranks_is_each_ones_own() -> None:
    assert run_ranks(error_of_ones_own, timeout_s=PATIENCE_S) == [("ConfigError", "not like this", None)] * 2


def test_how_a_process_ended() -> None:
    assert str(of_exit_code(2, -9).error()) == "rank 2 was killed by SIGKILL."
    assert str(of_exit_code(2, 7).error()) == "rank 2 ended with exit code 7, while the others needed it."
    assert of_exit_code(2, 7).error().rank == 2


def test_which_errors_may_come_from_elsewhere() -> None:
    wrapped = ValueError("it failed")
    wrapped.__cause__ = RuntimeError("[.../gloo/transport/tcp/pair.cc:537] Read error")
    assert is_of_communication(wrapped)
    assert is_of_communication(torch.distributed.DistNetworkError("x"))
    assert not is_of_communication(RuntimeError("shapes differ"))
    assert not is_of_communication(ValueError("gloo"))
