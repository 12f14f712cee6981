"""Several processes, each with a copy of the model: not there yet, and said so."""

from __future__ import annotations

from typing import Any

from holdfast.errors import ConfigError
from holdfast.strategies.single import SingleDeviceStrategy


class DDPStrategy(SingleDeviceStrategy):
    """Data parallel training in several processes. One process is what there is so far, so it refuses.

    Raises:
        ConfigError: always.
    """

    strategy_name = "ddp"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise ConfigError(
            "DDPStrategy(): one process on one device is what there is so far. Use Trainer(strategy='auto', "
            "devices=1); strategy='ddp' with one device runs the same in one process."
        )
