"""`HyperparametersMixin`, where Lightning's users import it from."""

from __future__ import annotations

from holdfast.training.hparams import HyperparametersMixin

__all__ = ["HyperparametersMixin"]
