"""Saving with several ranks: rank 0 writes, and all ranks know the same."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import holdfast as pl
from tests.training.saved_in_background import Wide, batches, gate

from .ranks import run_ranks, start_ranks
from .saving_jobs import At, Model, checkpoint, files, loader, new_model, rank, trainer_in, weights


def _facts(trainer: pl.Trainer) -> dict[str, Any]:
    callback, stats = trainer.checkpoint_callback, trainer.checkpoint_stats
    assert callback is not None
    return {
        "best": callback.best_model_path,
        "last": callback.last_model_path,
        "score": None if callback.best_model_score is None else callback.best_model_score.item(),
        "stats": {name: str(value) for name, value in stats.figures().items()},
    }


def save_in_background(place: Path) -> tuple[dict[str, Any], Any, list[bool]]:
    model = new_model()
    kept = checkpoint(place, monitor="val", save_last=True, save_top_k=2, every_n_train_steps=3)
    trainer = trainer_in(place, kept, val_check_interval=3)
    trainer.fit(model, loader(), loader(8))
    path = kept.best_model_path
    opened = torch.load(path, weights_only=True)["state_dict"]["layer.weight"].tolist()
    return _facts(trainer), opened, [one.background for one in trainer.checkpoint_stats.reports]


@pytest.mark.parametrize("ranks", [2, 3])
def test_after_fit_all_ranks_know_the_same_and_can_open_the_best(tmp_path: Path, ranks: int) -> None:
    found = run_ranks(save_in_background, tmp_path, ranks=ranks)
    assert all(one == found[0] for one in found)
    facts, _, background = found[0]
    assert os.path.isfile(facts["best"]) and os.path.isfile(facts["last"])
    assert True in background, "nothing was written beside the training"
    assert len(files(tmp_path)) == 3
    assert facts["stats"]["deleted"] != "0"


# -- a disk that fails ---------------------------------------------------------------------------------------


def no_room(monkeypatched: list[Any]) -> None:
    """From now on rank 0's disk is full."""
    from holdfast.checkpoint import commit

    if rank() == 0:
        monkeypatched.append(commit.write_all)

        def full(*args: Any, **kwargs: Any) -> None:
            raise OSError(28, "No space left on device")

        commit.write_all = full  # type: ignore[assignment]
        from holdfast.checkpoint import background

        monkeypatched.append(background.write)
        background.write = full  # type: ignore[assignment]


def with_a_full_disk(place: Path, how: str) -> tuple[str, int, list[str], str]:
    model, before = new_model(), []
    kept = checkpoint(
        place, every_n_train_steps=3, save_top_k=-1, on_error="warn" if how == "warn" else "raise",
        background=how != "foreground",
    )  # fmt: skip
    fill = At(12 if how == "end" else 4, lambda trainer: no_room(before))
    trainer = trainer_in(place, fill, kept)
    error = ""
    try:
        trainer.fit(model, loader())
    except Exception as problem:
        error = f"{type(problem).__name__}: {problem}"
    return error, trainer.progress.total_batches, files(place), str(kept.best_model_path)


@pytest.mark.parametrize("how", ["background", "foreground", "end", "warn"])
def test_a_full_disk_of_rank_zero_is_every_ranks_error_at_the_same_batch(tmp_path: Path, how: str) -> None:
    ended = start_ranks(with_a_full_disk, tmp_path, how).wait(60)
    assert [one.error for one in ended] == ["", ""]
    assert ended[0].value == ended[1].value
    error, batches, kept, newest = ended[0].value
    if how == "warn":
        assert (error, batches) == ("", 16)
    else:
        assert error.endswith("No space left on device"), error
        assert batches < 16 or how == "end"
    assert newest.endswith(kept[-1]) and os.path.isfile(newest)


# -- trainer.save_checkpoint ---------------------------------------------------------------------------------


def save_by_hand(place: Path, who: str) -> tuple[str, str, list[str]]:
    from holdfast.strategies.agreement import Agreement

    Agreement.say_after_s = 0.1
    model, ranks = new_model(), (0, 1) if who == "all" else (0,)
    paths = []

    def save(trainer: pl.Trainer) -> None:
        path = place / f"by rank {trainer.global_rank}.ckpt"  # rank 0's counts
        trainer.save_checkpoint(path)
        paths.append(files(place))

    trainer = trainer_in(place, At(3, save, ranks), enable_checkpointing=False)
    error = ""
    try:
        trainer.fit(model, loader())
    except Exception as problem:
        error = f"{type(problem).__name__}: {str(problem).splitlines()[0]}"
    return error, str(trainer.progress.total_batches), paths


def test_save_checkpoint_on_every_rank_returns_on_each_when_the_file_is_there(tmp_path: Path) -> None:
    found = run_ranks(save_by_hand, tmp_path, "all")
    assert found == [("", "16", [["by rank 0.ckpt"]])] * 2
    saved = torch.load(tmp_path / "by rank 0.ckpt", weights_only=True)
    assert saved["global_step"] == 3 and len(saved["holdfast"]["ranks"]) == 2


def test_save_checkpoint_on_rank_zero_alone_names_who_is_missing_and_ends(tmp_path: Path) -> None:
    ended = start_ranks(save_by_hand, tmp_path, "rank 0").wait(60)
    rule = "Call it on every rank: all take part in it, and rank 0 writes the file."
    what = (
        "trainer.save_checkpoint: rank 0 is there, and rank 1 has gone past it: it is in batch 3 of epoch 0."
    )
    assert ended[0].value[0] == f"RankFailed: {what} {rule}"
    assert ended[1].value[0] == f"RankFailed: rank 0 failed with RankFailed: {what} {rule}"
    assert f"trainer.save_checkpoint: rank 0 has waited 0 s for rank 1. {rule}" in ended[0].output
    assert files(tmp_path) == []


# -- ranks that disagree -------------------------------------------------------------------------------------


class Disagreeing(Model):
    """Logs another value on every rank, and sees another directory."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", torch.tensor(1.0 + self.trainer.global_rank))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # A collective, as a sharded optimizer's state needs: every rank has to come here.
        ranks = torch.tensor(1.0)
        torch.distributed.all_reduce(ranks)
        checkpoint["ranks"] = ranks.item()


def disagree(place: Path) -> tuple[dict[str, Any], bool]:
    pl.seed_everything(1)
    kept = checkpoint(place, monitor="val", filename="{epoch}-{val:.0f}", save_top_k=2)
    real = os.path.lexists
    if rank() == 1:
        os.path.lexists = lambda path: True  # type: ignore[assignment]
    trainer = trainer_in(place, kept)
    trainer.fit(Disagreeing(), loader(), loader(8))
    os.path.lexists = real
    return _facts(trainer), kept.file_exists(place if rank() == 0 else place / "nowhere", trainer)


def test_a_metric_in_the_name_and_a_file_that_differ_per_rank_are_rank_zeros(tmp_path: Path) -> None:
    found = run_ranks(disagree, tmp_path)
    assert found[0] == found[1]
    assert files(tmp_path) == ["epoch=0-val=1.ckpt", "epoch=1-val=1.ckpt"]
    assert found[0][1] is True
    saved = torch.load(tmp_path / "kept" / "epoch=0-val=1.ckpt", weights_only=True)
    assert saved["ranks"] == 2.0


def ask_on_one_rank(place: Path) -> str:
    from holdfast.strategies.agreement import Agreement

    Agreement.say_after_s = 0.1
    kept = checkpoint(place, every_n_train_steps=100)
    asks = At(3, lambda trainer: trainer.request_save(kept), (1,))
    trainer = trainer_in(place, asks, kept)
    try:
        trainer.fit(new_model(), loader())
    except Exception as problem:
        return str(problem).splitlines()[0]
    return ""


def test_a_save_that_one_rank_asks_for_is_refused_and_says_so(tmp_path: Path) -> None:
    ended = start_ranks(ask_on_one_rank, tmp_path).wait(60)
    what = (
        "the save at step 3: rank 1 is there, and rank 0 has gone past it: it is in batch 3 of epoch 0. Whatever "
        "asks for a save (a callback, `trainer.request_save`) has to do so on every rank, or none."
    )
    assert ended[1].value == what
    assert ended[0].value == f"rank 1 failed with RankFailed: {what}"


class StopsItself(pl.Callback):
    """Says to stop on one rank, when the epoch ends."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        trainer.should_stop = trainer.should_stop or trainer.global_rank == 1


def stop_on_one_rank(place: Path) -> tuple[int, list[str], bool]:
    trainer = trainer_in(place, StopsItself(), checkpoint(place), max_epochs=5)
    trainer.fit(new_model(), loader())
    return trainer.progress.total_batches, files(place), bool(trainer.should_stop)


def test_one_rank_that_stops_at_the_end_of_an_epoch_stops_all(tmp_path: Path) -> None:
    assert run_ranks(stop_on_one_rank, tmp_path) == [(8, ["epoch=0-step=8.ckpt"], True)] * 2


# -- exceptions ----------------------------------------------------------------------------------------------


def _raise(trainer: pl.Trainer) -> None:
    raise ValueError("no")


def raise_on(place: Path, ranks: tuple[int, ...]) -> tuple[str, list[str]]:
    kept = checkpoint(place, save_on_exception=True, every_n_train_steps=100)
    trainer = trainer_in(place, At(3, _raise, ranks), kept)
    try:
        trainer.fit(new_model(), loader())
    except Exception as problem:
        return str(problem).splitlines()[0], files(place)
    return "", []


@pytest.mark.parametrize("ranks", [(0,), (1,), (0, 1)])
def test_an_exception_on_any_rank_is_saved_on_by_rank_zero(tmp_path: Path, ranks: tuple[int, ...]) -> None:
    ended = start_ranks(raise_on, tmp_path, ranks).wait(60)
    assert len(files(tmp_path)) == 1, [(one.value, one.error, one.output) for one in ended]
    for one in ended:
        told = [f"rank {other} failed with ValueError: no." for other in ranks if other != one.rank]
        assert one.value[0] in (["no"] if one.rank in ranks else told)
    saved = torch.load(tmp_path / "kept" / files(tmp_path)[0], weights_only=True)
    assert saved["global_step"] == 3 and saved["holdfast"]["exact"] is False


# -- a second fit, and a resume ------------------------------------------------------------------------------


def fit_twice(place: Path) -> tuple[list[float], list[float], list[str]]:
    model = new_model()
    trainer = trainer_in(place, checkpoint(place, save_top_k=-1), max_epochs=1)
    trainer.fit(model, loader())
    first = weights(model)
    trainer.max_epochs = 2
    trainer.fit(model, loader(), ckpt_path="last")
    return first, weights(model), files(place)


def test_the_same_trainer_fits_again(tmp_path: Path) -> None:
    found = run_ranks(fit_twice, tmp_path)
    assert found[0] == found[1]
    assert found[0][0] != found[0][1]
    assert found[0][2] == ["epoch=0-step=8.ckpt", "epoch=1-step=16.ckpt"]


def stop_in_the_middle(place: Path) -> str:
    from holdfast.strategies.agreement import Agreement

    Agreement.say_after_s = 0.1
    trainer = trainer_in(place, At(3, _stop, (1,)), checkpoint(place))
    try:
        trainer.fit(new_model(), loader())
    except Exception as problem:
        return str(problem).splitlines()[0]
    return ""


def _stop(trainer: pl.Trainer) -> None:
    trainer.should_stop = True


def test_a_rank_that_stops_alone_in_the_middle_of_an_epoch_is_an_error(tmp_path: Path) -> None:
    ended = start_ranks(stop_in_the_middle, tmp_path).wait(60)
    what = (
        "the end of epoch 0: rank 1 is there, and rank 0 has gone past it: it is in batch 3 of epoch 0. In the "
        "middle of an epoch `trainer.should_stop`, and -1 from on_train_batch_start, have to come on every rank "
        "at the same batch."
    )
    assert ended[1].value == what
    assert ended[0].value == f"rank 1 failed with RankFailed: {what}"


# -- snapshots, and plugins ----------------------------------------------------------------------------------


def meddle(place: Path) -> tuple[dict[str, Any], list[str]]:
    """Weights change behind the optimizer's back, beside the first snapshot that is copied late."""

    def change(model: pl.LightningModule, held: Any) -> None:
        if held is not None:
            assert held.held.wait(20)
        with torch.no_grad():
            model.net[0].weight.mul_(0.5)  # type: ignore[index,union-attr,operator]
        if held is not None:
            held.open()

    class Changing(Wide):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.trainer.global_step == 6:
                change(self, held)
            return super().training_step(batch, batch_idx)

    pl.seed_everything(1)
    kept = checkpoint(place, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    trainer = trainer_in(place, kept, max_epochs=2)
    with gate(3) if rank() == 0 else nullcontext() as held:
        trainer.fit(Changing(), batches(16))
    return _facts(trainer), files(place)


def test_a_snapshot_that_is_thrown_away_is_saved_again_by_all_ranks(tmp_path: Path) -> None:
    found = run_ranks(meddle, tmp_path)
    assert found[0] == found[1]
    facts, kept = found[0]
    assert facts["stats"]["discarded"] == "1"
    # Saved again when all have heard of it, which may be where the next save is due anyway.
    assert "step=6.ckpt" not in kept and len(kept) == int(facts["stats"]["saves"]) >= 7


def with_a_plugin(place: Path) -> tuple[dict[str, Any], list[str]]:
    plugin = pl.plugins.AsyncCheckpointIO(pl.plugins.TorchCheckpointIO())
    kept = checkpoint(place, every_n_train_steps=3, save_top_k=-1)
    trainer = trainer_in(place, kept, plugins=plugin)
    trainer.fit(new_model(), loader())
    facts = _facts(trainer)
    return {name: facts[name] for name in ("best", "last")}, files(place)


def test_a_checkpoint_plugin_writes_on_rank_zero_alone(tmp_path: Path) -> None:
    found = run_ranks(with_a_plugin, tmp_path)
    assert found[0] == found[1]
    assert len(found[0][1]) == 5 and os.path.isfile(found[0][0]["best"])
