"""What a trainer says about its run: before, during and after each request."""

from __future__ import annotations

from typing import Any

import holdfast as pl
from tests.training.toys import Toy, rows, trainer


class Whole(Toy):
    def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch[0])


def counts(run: pl.Trainer) -> list[Any]:
    return [run.num_val_batches, run.num_sanity_val_batches, run.num_test_batches, run.num_predict_batches]


def test_the_counts_of_each_request_stay_through_the_others() -> None:
    run, model, tested = trainer(num_sanity_val_steps=2), Whole(), rows(8)
    assert counts(run) == [[], [], [], []]
    run.test(model, tested, verbose=False)
    run.predict(model, rows(12))
    assert counts(run) == [[], [], [2], [3]]
    run.validate(model, rows(16), verbose=False)
    assert counts(run) == [[4], [], [2], [3]]
    run.fit(model, rows(20), rows(4))
    assert counts(run) == [[1], [1], [2], [3]]
    run.validate(model, rows(16), verbose=False)
    assert counts(run) == [[4], [1], [2], [3]]
    run.predict(model, rows(4))
    assert counts(run) == [[1], [1], [2], [1]]
    assert run.num_training_batches == 5
    assert run.test_dataloaders is tested


def test_switches_go_by_their_names() -> None:
    assert trainer().enable_autolog_hparams is True
    run = trainer(enable_autolog_hparams=False)
    assert (run.enable_autolog_hparams, run.received_sigterm) == (False, False)
