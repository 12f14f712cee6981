"""Records, in one ordered list, everything that a training run does that a user could notice.

The same recorders are made for holdfast and for PyTorch Lightning (``pl`` is either package), so that two
runs of one package, or one run of each, can be compared event by event.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch

Event = tuple[Any, ...]

SHARED_HOOKS = (
    "on_fit_start", "on_fit_end",
    "on_train_start", "on_train_end",
    "on_train_epoch_start", "on_train_epoch_end",
    "on_train_batch_start", "on_train_batch_end",
    "on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step",
    "on_validation_start", "on_validation_end",
    "on_validation_epoch_start", "on_validation_epoch_end",
    "on_validation_batch_start", "on_validation_batch_end",
    "on_test_start", "on_test_end",
    "on_test_epoch_start", "on_test_epoch_end",
    "on_test_batch_start", "on_test_batch_end",
    "on_predict_start", "on_predict_end",
    "on_predict_epoch_start", "on_predict_epoch_end",
    "on_predict_batch_start", "on_predict_batch_end",
    "setup", "teardown",
)  # fmt: skip
CALLBACK_HOOKS = (*SHARED_HOOKS, "on_sanity_check_start", "on_sanity_check_end")
MODULE_HOOKS = (
    *SHARED_HOOKS,
    "prepare_data", "configure_model", "configure_callbacks",
    "on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer",
    "on_validation_model_zero_grad", "on_validation_model_eval", "on_validation_model_train",
    "on_test_model_eval", "on_test_model_train", "on_predict_model_eval", "on_predict_model_train",
    "backward", "configure_gradient_clipping", "optimizer_step", "optimizer_zero_grad", "lr_scheduler_step",
)  # fmt: skip


def bits(value: Any) -> Any:
    """A value that is equal to another one's only if both are the same bit for bit, NaN included."""
    if isinstance(value, torch.Tensor):
        if value.numel() == 1 and value.is_floating_point():
            return float(value.detach()).hex()
        contents = value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        return (str(value.dtype), tuple(value.shape), zlib.crc32(contents))
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, Mapping):
        return tuple((key, bits(inner)) for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(bits(inner) for inner in value)
    return value


class Tape(list[Event]):
    """The events of one run, in order."""

    def record(self, *event: Any) -> None:
        self.append(event)

    def names(self, first: str) -> list[Any]:
        """The second items of the events whose first is ``first``."""
        return [event[1] for event in self if event[0] == first]


def recording_callback(pl: Any, tape: Tape) -> Any:
    """A callback that overrides every hook and records each call with the trainer's counters."""

    def recorder(name: str) -> Any:
        def hook(self: Any, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
            tape.record("callback", name, trainer.current_epoch, trainer.global_step)

        return hook

    hooks = {name: recorder(name) for name in CALLBACK_HOOKS}
    return type("RecordingCallback", (pl.Callback,), hooks)()


def with_recorded_hooks(base: type, tape: Tape, hooks: tuple[str, ...] = MODULE_HOOKS) -> type:
    """A subclass of the module class ``base`` that records each of its hooks before running it."""

    def recorder(name: str) -> Any:
        def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
            tape.record("module", name)
            return getattr(base, name)(self, *args, **kwargs)

        return hook

    return type(base.__name__, (base,), {name: recorder(name) for name in hooks})


def recording_logger(pl: Any, tape: Tape) -> Any:
    """A logger that keeps nothing but the tape."""

    class RecordingLogger(pl.loggers.logger.Logger if hasattr(pl.loggers, "logger") else pl.loggers.Logger):
        name = "recording"
        version = 0

        def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
            tape.record("logged", step, bits({key: float(value) for key, value in sorted(metrics.items())}))

        def log_hyperparams(self, params: Any = None, *args: Any, **kwargs: Any) -> None:
            tape.record("hyperparameters")

    return RecordingLogger()
