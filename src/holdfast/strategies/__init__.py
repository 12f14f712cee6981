"""Where the model lives and how the processes of a job agree."""

from holdfast.strategies.base import Strategy
from holdfast.strategies.single import SingleDeviceStrategy

__all__ = ["SingleDeviceStrategy", "Strategy"]
