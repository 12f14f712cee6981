"""What ``Trainer(plugins=...)`` takes, at the paths where Lightning's users import it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from holdfast.utilities.lazy import lazily

if TYPE_CHECKING:
    from holdfast.checkpoint.checkpoint_io import AsyncCheckpointIO as AsyncCheckpointIO
    from holdfast.checkpoint.checkpoint_io import CheckpointIO as CheckpointIO
    from holdfast.checkpoint.checkpoint_io import TorchCheckpointIO as TorchCheckpointIO
    from holdfast.training.precision import DoublePrecision as DoublePrecision
    from holdfast.training.precision import HalfPrecision as HalfPrecision
    from holdfast.training.precision import MixedPrecision as MixedPrecision
    from holdfast.training.precision import Precision as Precision

_HOMES = {
    "AsyncCheckpointIO": "holdfast.checkpoint.checkpoint_io",
    "CheckpointIO": "holdfast.checkpoint.checkpoint_io",
    "DoublePrecision": "holdfast.training.precision",
    "HalfPrecision": "holdfast.training.precision",
    "MixedPrecision": "holdfast.training.precision",
    "Precision": "holdfast.training.precision",
    "TorchCheckpointIO": "holdfast.checkpoint.checkpoint_io",
}

_SYNC = "Use Trainer(sync_batchnorm=True)."
_EIGHT_BITS = "Use MixedPrecision('bf16-mixed', device), or Trainer(precision='bf16-true')."

# What Lightning has here and holdfast has not, and what to use instead.
_LEFT_OUT = {
    "BitsandbytesPrecision": _EIGHT_BITS,
    "DeepSpeedPrecision": _EIGHT_BITS,
    "FSDPPrecision": "Use Trainer(precision=...), or FSDPStrategy(mixed_precision=...).",
    "LayerSync": _SYNC,
    "TorchSyncBatchNorm": _SYNC,
    "TransformerEnginePrecision": _EIGHT_BITS,
    "XLACheckpointIO": "TPUs are not supported: use TorchCheckpointIO.",
    "XLAPrecision": "TPUs are not supported: use MixedPrecision.",
}

__all__ = sorted(_HOMES)

__getattr__, __dir__ = lazily(__name__, _HOMES, _LEFT_OUT)
