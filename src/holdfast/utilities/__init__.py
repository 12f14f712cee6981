"""The small names that Lightning's users import from ``utilities``."""

from holdfast.utilities.exceptions import MisconfigurationException
from holdfast.utilities.rank_zero import (
    rank_zero_deprecation,
    rank_zero_info,
    rank_zero_only,
    rank_zero_warn,
)

__all__ = [
    "MisconfigurationException",
    "rank_zero_deprecation",
    "rank_zero_info",
    "rank_zero_only",
    "rank_zero_warn",
]
