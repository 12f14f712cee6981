"""Choices that are plain text and have names, as Lightning's users import them."""

from __future__ import annotations

from enum import Enum


class GradClipAlgorithmType(str, Enum):
    """How gradients are clipped: by the norm of all of them, or value by value. Equal to its text."""

    VALUE = "value"
    NORM = "norm"

    @staticmethod
    def supported_type(val: str) -> bool:
        """Whether the text names one of them."""
        return val in GradClipAlgorithmType.supported_types()

    @staticmethod
    def supported_types() -> list[str]:
        """The text of each."""
        return [choice.value for choice in GradClipAlgorithmType]
