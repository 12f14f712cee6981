"""The factor follows from the epoch, also for a run that goes on in the middle of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast.callbacks.gradient_accumulation_scheduler import GradientAccumulationScheduler
from holdfast.errors import ConfigError
from tests.training.toys import Toy, rows, trainer

from .resumes import resume_everywhere


def test_the_factor_of_any_epoch() -> None:
    scheduler = GradientAccumulationScheduler({2: 3, 5: 1})
    assert [scheduler.get_accumulate_grad_batches(epoch) for epoch in range(7)] == [1, 1, 3, 3, 3, 1, 1]
    assert scheduler.going_to_accumulate_grad_batches()
    assert not GradientAccumulationScheduler({4: 1}).going_to_accumulate_grad_batches()


def test_goes_on_exactly_from_within_a_window(tmp_path: Path) -> None:
    class Momentum(Toy):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    runs = resume_everywhere(
        tmp_path,
        Momentum,
        lambda: [GradientAccumulationScheduler({0: 2, 1: 3, 2: 1})],
        lambda: rows(20, shuffle=True),
        max_epochs=4,
    )
    assert {run.global_step for run in runs} == {3 + 2 + 5 + 5}


def test_a_trainer_can_fit_twice() -> None:
    again = trainer(callbacks=GradientAccumulationScheduler({0: 4}))
    again.fit(Toy(), rows())
    again.fit(Toy(), rows())
    assert again.accumulate_grad_batches == 4


@pytest.mark.parametrize(
    ("scheduling", "message"),
    [
        ({}, "expected a dict of epoch to factor, such as {0: 8, 4: 4}."),
        ([4], "expected a dict of epoch to factor, such as {0: 8, 4: 4}."),
        ({-1: 2}, "an epoch must be an int of at least 0, found -1."),
        ({"1": 2}, "an epoch must be an int of at least 0, found '1'."),
        ({1: 0}, "a factor must be an int of at least 1, found 0."),
        ({1: 2.0}, "a factor must be an int of at least 1, found 2.0."),
    ],
    ids=str,
)
def test_a_bad_schedule_is_refused(scheduling: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        GradientAccumulationScheduler(scheduling)
    assert str(caught.value) == f"GradientAccumulationScheduler(scheduling={scheduling!r}): {message}"


def test_a_trainer_with_a_factor_of_its_own_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        trainer(callbacks=GradientAccumulationScheduler({0: 2}), accumulate_grad_batches=2).fit(Toy(), rows())
    assert str(caught.value) == (
        "Trainer(accumulate_grad_batches=2) and a GradientAccumulationScheduler contradict each other. Leave "
        "one of them out."
    )


def test_manual_optimization_is_refused() -> None:
    module = Toy()
    module.automatic_optimization = False
    with pytest.raises(ConfigError) as caught:
        trainer(callbacks=GradientAccumulationScheduler({0: 2})).fit(module, rows())
    assert str(caught.value) == (
        "GradientAccumulationScheduler has no effect with manual optimization. Leave it out, and accumulate "
        "in training_step."
    )
