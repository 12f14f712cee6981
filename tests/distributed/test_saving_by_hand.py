"""``trainer.save_checkpoint`` between and behind the requests of a script that has started its own ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

import holdfast as pl

from .test_launch import Job

SCRIPT = """
trainer = trainer(strategy={strategy!r}, devices=2, num_sanity_val_steps=0)
model = Model()
trainer.fit(model, rows())
trainer.save_checkpoint("fitted.ckpt")
trainer.validate(model, rows(), verbose=False)
trainer.save_checkpoint("validated.ckpt")
trainer.save_checkpoint("weights.ckpt", weights_only=True)
try:
    trainer.save_checkpoint("/dev/null/no.ckpt")
except OSError as error:
    say("refused", type(error).__name__)
trainer.save_checkpoint("after.ckpt")
say("saved by", RANK)
"""


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_ranks_that_wait_take_part(strategy: str, tmp_path: Path) -> None:
    code, lines, errors = Job(tmp_path, SCRIPT.format(strategy=strategy)).end()
    assert code == 0, errors
    assert lines == ["refused StorageError", "saved by 0"]
    whole = [pl.load(tmp_path / f"{name}.ckpt") for name in ("fitted", "validated", "after")]
    assert [one["global_step"] for one in whole] == [4, 4, 4]
    assert [len(one["holdfast"]["ranks"]) for one in whole] == [2, 2, 2]
    assert all(one["holdfast"]["exact"] for one in whole)
    weights = pl.load(tmp_path / "weights.ckpt")["state_dict"]
    assert sorted(weights) == ["layer.bias", "layer.weight"]
    for one in whole:
        assert all((one["state_dict"][name] == weights[name]).all() for name in weights)
