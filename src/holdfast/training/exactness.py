"""What keeps a resumed run from being the run that never stopped, said before the first batch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch

from holdfast.errors import ConfigError
from holdfast.training import ended, inexact_data, inexact_model, own_generators
from holdfast.training.differences import differences
from holdfast.training.progress import END, RunningStage
from holdfast.utilities.rank_zero import rank_zero_warn

if TYPE_CHECKING:
    from holdfast.training.trainer import Trainer


def before_anything_is_written(trainer: Trainer, resumed: dict[str, Any] | None) -> None:
    """With ``Trainer(exact="require")`` refuse a run that cannot be exact while its logs are still closed.

    Its loaders are asked for here, in the order in which they would be asked for later.

    Args:
        trainer: Whose optimizers and callbacks are in place.
        resumed: The "holdfast" part of the checkpoint that the run goes on from, or None.

    Raises:
        ConfigError: something differs or cannot be exact.
    """
    loop = trainer.fit_loop
    assert loop is not None
    if trainer.exact != "require" or 0 in (
        trainer.limit_train_batches,
        trainer.max_epochs,
        trainer.max_steps,
    ):
        return
    stage = trainer.state.stage
    if trainer.enable_validation and trainer.num_sanity_val_steps and resumed is None:
        trainer.state.stage = RunningStage.SANITY_CHECKING
        loop.data.make_validation()
        trainer.state.stage = stage
    loop.setup_data()
    if trainer.enable_validation and not loop.data.validation_waits:
        loop.data.make_validation()
    _refuse(trainer, resumed)


def before_first_batch(trainer: Trainer, resumed: dict[str, Any] | None) -> None:
    """Say, or with ``Trainer(exact="require")`` refuse, what differs and what cannot be exact.

    Args:
        trainer: Whose loaders, optimizers and callbacks are all in place by now.
        resumed: The "holdfast" part of the checkpoint that the run goes on from, or None.

    Raises:
        ConfigError: the trainer requires exactness, and something stands in its way.
    """
    if trainer.exact == "require":
        _refuse(trainer, resumed)
    else:
        if resumed is not None:
            title = f"{_name(trainer)} was saved by a run with other settings:"
            _say(title, differences(trainer, resumed))
        if resumed is not None or _can_be_resumed(trainer):
            title = "Once resumed, this run is not bit for bit the one that never stopped:"
            _say(title, reasons(trainer, resumed))
    if resumed is not None:
        for problem in ended.rates_at_their_end(trainer):
            rank_zero_warn(problem)


def _can_be_resumed(trainer: Trainer) -> bool:
    return bool(trainer.checkpoint_callbacks) and not trainer.fast_dev_run


def _name(trainer: Trainer) -> str:
    return os.path.basename(trainer.resumed_from or "the checkpoint")


def _say(title: str, lines: list[str]) -> None:
    if lines:
        rank_zero_warn("\n  ".join([title, *lines]))


def _refuse(trainer: Trainer, resumed: dict[str, Any] | None) -> None:
    found = reasons(trainer, resumed)
    if resumed is not None:
        found = [*differences(trainer, resumed), *_not_restored(trainer, resumed), *found]
    if found:
        title = 'Trainer(exact="require") refuses this run, and nothing was trained. It would not be exact:'
        remedy = '\nStart it as it was started, or train all the same with exact="warn".'
        raise ConfigError("\n  ".join([title, *found]) + ("" if resumed is None else remedy))


# -- what cannot be exact ------------------------------------------------------------------------------------


def reasons(trainer: Trainer, resumed: dict[str, Any] | None = None) -> list[str]:
    """Why a run that is stopped and resumed would not be the run that never stopped; empty where it would.

    Args:
        trainer: Whose loaders are in place.
        resumed: The "holdfast" part of the checkpoint that the run goes on from, or None.
    """
    loop = trainer.fit_loop
    found = [] if resumed is None else list(_of_checkpoint(trainer, resumed))
    if loop is not None and loop.stream is not None:
        found += inexact_data.reasons([loop.stream], "training data")
    if loop is not None and loop.validation is not None:
        found += inexact_data.reasons(loop.validation.streams, "validation data")
        if loop.stream is not None:
            found += inexact_data.shared([loop.stream], loop.validation.streams)
    found += [
        *inexact_model.reasons(trainer),
        *_of_globals(trainer),
        *_of_clock(trainer),
        *_of_device(trainer),
    ]
    return list(dict.fromkeys(found))


def _of_checkpoint(trainer: Trainer, resumed: dict[str, Any]) -> Iterator[str]:
    name = _name(trainer)
    if "generators" not in resumed:
        yield (
            f"{name} is not holdfast's: it tells neither the state of the generators nor the order of the "
            "rows, so other numbers are drawn from here on. The checkpoints of this run are exact."
        )
    elif not resumed.get("exact") and _was_cut_short(resumed["progress"]):
        yield (
            f"{name} was saved when the time for training was up, behind the early end of its epoch. The "
            "stopped.ckpt of that moment was saved before it."
        )
    elif not resumed.get("exact") and resumed["progress"].get("cut_short"):
        yield (
            f"{name} was saved after a limit had ended its epoch early, and a run goes on from it with the "
            "next epoch: the rest of that one is left out. Go on from the last checkpoint of ModelCheckpoint."
        )
    elif not resumed.get("exact"):
        yield (
            f"{name} was not taken at a safe point, but inside a hook or after an exception: what the rest "
            "of that batch did is not in it. Go on from a checkpoint of ModelCheckpoint."
        )


def _was_cut_short(progress: dict[str, Any]) -> bool:
    # Older files say only whether it was full.
    return progress.get("stage") == END and progress.get("cut_short", not progress.get("full_epoch", True))


def _not_restored(trainer: Trainer, resumed: dict[str, Any]) -> Iterator[str]:
    """What has been said where it was found, and is a reason to refuse."""
    for key in resumed["afresh"]:
        yield f"on_load_checkpoint has emptied {key!r}: they start afresh."
    for key in resumed["unclaimed_callbacks"]:
        yield f"{_name(trainer)} holds the state of {key}, and this trainer has no such callback. Add it."
    saved = len(resumed.get("generators", [{}])[0].get("cuda", []))
    here = torch.cuda.device_count() if saved else 0
    if here < saved:
        yield f"{_name(trainer)} holds the generators of {saved} GPUs, and {here} are here."


def _of_clock(trainer: Trainer) -> Iterator[str]:
    interval = trainer.val_check_interval
    if isinstance(interval, timedelta) and trainer.enable_validation:
        yield (
            f"Trainer(val_check_interval={str(interval)!r}) is a time, so the machine's speed decides when "
            "validation runs. Give a number of batches or a fraction of an epoch."
        )


def _of_device(trainer: Trainer) -> Iterator[str]:
    device = trainer.strategy.root_device.type
    if device == "cpu":
        return
    if (
        not torch.are_deterministic_algorithms_enabled()
        or torch.is_deterministic_algorithms_warn_only_enabled()
    ):
        yield (
            f"Some of torch's operations give other bits each time on {device.upper()}. Set "
            "Trainer(deterministic=True)."
        )
    if device == "cuda" and torch.backends.cudnn.benchmark:
        yield (
            "torch.backends.cudnn.benchmark is on, so cuDNN takes the algorithms that were fastest this "
            "time. Set Trainer(benchmark=False)."
        )


def _of_globals(trainer: Trainer) -> Iterator[str]:
    """Generators that are global variables, drawn from in the model's and the callbacks' methods."""
    owners = {type(one) for one in (*trainer.lightning_module.modules(), *trainer.callbacks)}
    for cls in sorted(owners, key=lambda cls: cls.__qualname__):
        for name, generator in own_generators.of_methods(cls):
            yield (
                f"{cls.__name__} draws from {name}, a global variable ({own_generators.kind_of(generator)}) "
                f"whose state is in no checkpoint. Make it an attribute, self.{name}: those are saved."
            )
