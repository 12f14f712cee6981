"""A logger that fails when the run is over: the others are closed, everything is torn down, and it is told once."""

from __future__ import annotations

from typing import Any

import pytest

import holdfast as pl
from tests.loggers.test_base import Logging, Recorder
from tests.training.toys import rows, trainer


class Fails(Recorder):
    def finalize(self, status: str) -> None:
        super().finalize(status)
        raise RuntimeError("the service is away")


class TornDown(pl.Callback):
    def __init__(self) -> None:
        self.stages: list[str] = []

    def teardown(self, trainer: Any, module: Any, stage: str) -> None:
        self.stages.append(stage)


@pytest.mark.parametrize("verb", ["fit", "test"])
def test_a_logger_that_cannot_be_finalized_keeps_nobody_from_the_end(verb: str) -> None:
    class Module(Logging):
        def teardown(self, stage: str) -> None:
            torn_down.stages.append(f"module {stage}")

    loggers, torn_down = [Recorder(), Fails(), Recorder()], TornDown()
    run = trainer(logger=loggers, callbacks=torn_down, enable_checkpointing=False)
    with pytest.raises(RuntimeError, match="the service is away"):
        getattr(run, verb)(Module(), rows())
    closed = [[call for call in logger.calls if call[0] == "finalize"] for logger in loggers]
    assert closed == [[("finalize", "success")]] * 3
    assert torn_down.stages == [verb, f"module {verb}"]


def test_what_fails_after_the_loggers_were_closed_closes_none_again() -> None:
    class Breaks(pl.Callback):
        def teardown(self, trainer: Any, module: Any, stage: str) -> None:
            raise RuntimeError("in teardown")

    logger = Recorder()
    with pytest.raises(RuntimeError, match="in teardown"):
        trainer(logger=logger, callbacks=Breaks(), enable_checkpointing=False).fit(Logging(), rows())
    assert [call for call in logger.calls if call[0] == "finalize"] == [("finalize", "success")]


def test_two_that_fail_are_both_named() -> None:
    run = trainer(logger=[Fails(), Fails()])
    with (
        pytest.warns(UserWarning, match="Another logger") as warned,
        pytest.raises(RuntimeError, match="the service is away"),
    ):
        run.fit(Logging(), rows())
    assert str(warned[0].message) == "Another logger failed to finalize: RuntimeError: the service is away"
