"""Which strategy ``Trainer(strategy=, accelerator=, devices=, num_nodes=)`` means."""

from __future__ import annotations

from typing import Any

import torch

from holdfast.accelerators.base import Accelerator
from holdfast.accelerators.choose import BY_DEVICE, choose_accelerator
from holdfast.errors import ArgumentError, ConfigError
from holdfast.strategies.base import Strategy
from holdfast.strategies.single import SingleDeviceStrategy
from holdfast.utilities.unknown_names import did_you_mean

# With one device these all do what one process does.
_DDP_STARTS = ("ddp", "ddp_spawn", "ddp_fork", "ddp_notebook")
_DDP = {
    start + end
    for start in _DDP_STARTS
    for end in ("", "_find_unused_parameters_true", "_find_unused_parameters_false")
}
_ONE_PROCESS = "one process on one device is what there is so far"
_NOT_THERE = {
    "dp": "It was replaced by 'ddp' in Lightning 2. Use strategy='auto'.",
    "ddp2": "It was replaced by 'ddp' in Lightning 2. Use strategy='auto'.",
    "ddp_cpu": "Use strategy='ddp' with accelerator='cpu'.",
    "horovod": "Use strategy='auto'.",
    "bagua": "Use strategy='auto'.",
    "hivemind": "Use strategy='auto'.",
    "colossalai": "A model that fits one device trains with strategy='auto'.",
    "deepspeed": "A model that fits one device trains with strategy='auto', in less memory with "
    "precision='bf16-true'.",
    "fsdp": "A model that fits one device trains with strategy='auto', in less memory with "
    "precision='bf16-true'.",
    "fsdp_native": "Use strategy='auto'.",
    "fairscale": "Use strategy='auto'.",
    "model_parallel": "Use strategy='auto'.",
    "xla": "TPUs are not supported. Use strategy='auto' with accelerator='gpu' or 'cpu'.",
    "tpu_spawn": "TPUs are not supported. Use strategy='auto' with accelerator='gpu' or 'cpu'.",
    "single_xla": "TPUs are not supported. Use strategy='auto' with accelerator='gpu' or 'cpu'.",
    "single_tpu": "TPUs are not supported. Use strategy='auto' with accelerator='gpu' or 'cpu'.",
    "hpu_parallel": "HPUs are not supported. Use strategy='auto' with accelerator='gpu' or 'cpu'.",
    "hpu_single": "HPUs are not supported. Use strategy='auto' with accelerator='gpu' or 'cpu'.",
    "ipu_strategy": "IPUs are not supported. Use strategy='auto' with accelerator='gpu' or 'cpu'.",
}


def choose_strategy(
    strategy: str | Strategy = "auto",
    accelerator: str | Accelerator = "auto",
    devices: Any = "auto",
    num_nodes: int = 1,
) -> Strategy:
    """The strategy with its accelerator, whatever way it is spelled.

    Raises:
        ConfigError: it does not exist here, is not on this machine, or needs more than one process.
    """
    if isinstance(num_nodes, bool) or not isinstance(num_nodes, int) or num_nodes < 1:
        raise ArgumentError(f"Trainer(num_nodes={num_nodes!r}): expected an int of at least 1.")
    if num_nodes != 1:
        raise ConfigError(f"Trainer(num_nodes={num_nodes!r}): one machine is what there is so far.")
    if isinstance(strategy, Strategy):
        return _with_accelerator(strategy, accelerator)
    _check_name(strategy)
    chosen = choose_accelerator(accelerator)
    return SingleDeviceStrategy(_one_device(chosen, devices), accelerator=chosen)


def _check_name(strategy: Any) -> None:
    name = strategy.lower() if isinstance(strategy, str) else ""
    if name in ("auto", "single_device") or name in _DDP:
        return
    stem = next((known for known in _NOT_THERE if name == known or name.startswith(f"{known}_")), None)
    if stem is not None:
        raise ConfigError(f"Trainer(strategy={strategy!r}) is not supported. {_NOT_THERE[stem]}")
    raise ConfigError(
        f"Trainer(strategy={strategy!r}): expected 'auto', 'single_device', 'ddp' with one device, or a "
        f"Strategy.{did_you_mean(name, ('auto', 'single_device', 'ddp'))}"
    )


def _one_device(accelerator: Accelerator, devices: Any) -> torch.device:
    if devices == "auto":
        # "auto" is as many as there is a use for: one process uses one.
        devices = 1
    found = accelerator.get_parallel_devices(accelerator.parse_devices(devices))
    if len(found) > 1:
        raise ConfigError(f"Trainer(devices={devices!r}): {_ONE_PROCESS}. Use devices=1.")
    return found[0]


def _with_accelerator(strategy: Strategy, accelerator: str | Accelerator) -> Strategy:
    if strategy.accelerator is not None:
        own = type(strategy.accelerator)
        if accelerator != "auto" and type(choose_accelerator(accelerator)) is not own:
            raise ConfigError(
                f"Trainer(accelerator={accelerator!r}) contradicts {type(strategy).__name__}"
                f"(accelerator={own.__name__}()). Leave one out."
            )
    elif accelerator == "auto":
        kind = BY_DEVICE.get(strategy.root_device.type)
        strategy.accelerator = None if kind is None else kind()
    else:
        strategy.accelerator = choose_accelerator(accelerator)
    return strategy
