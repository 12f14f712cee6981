"""In which hooks ``self.log`` may be called, and whether it means the step or the epoch there."""

from __future__ import annotations

# Hook -> (on_step, on_epoch) when self.log is called there without saying; hooks that are not here cannot
# log.
_STEP, _EPOCH = (True, False), (False, True)
DEFAULTS: dict[str, tuple[bool, bool]] = {
    **dict.fromkeys(
        (
            "training_step",
            "on_train_batch_start",
            "on_train_batch_end",
            "on_before_backward",
            "backward",
            "on_after_backward",
            "on_before_optimizer_step",
            "optimizer_step",
            "configure_gradient_clipping",
            "on_before_zero_grad",
            "optimizer_zero_grad",
        ),
        _STEP,
    ),
    **dict.fromkeys(
        (
            "on_train_start",
            "on_train_epoch_start",
            "on_train_epoch_end",
            "on_validation_start",
            "on_validation_epoch_start",
            "on_validation_batch_start",
            "validation_step",
            "on_validation_batch_end",
            "on_validation_epoch_end",
            "on_test_start",
            "on_test_epoch_start",
            "on_test_batch_start",
            "test_step",
            "on_test_batch_end",
            "on_test_epoch_end",
        ),
        _EPOCH,
    ),
}
EPOCH_ONLY = frozenset(
    name for name in DEFAULTS if name.endswith(("_epoch_start", "_epoch_end", "_start"))
) - {
    "on_train_batch_start",
    "on_validation_batch_start",
    "on_test_batch_start",
}


def in_batch(fx: str | None) -> bool:
    """Whether a hook or step of training is one of those that come with every batch."""
    return fx is not None and DEFAULTS.get(fx) == _STEP
