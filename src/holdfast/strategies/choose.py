"""Which strategy ``Trainer(strategy=, accelerator=, devices=, num_nodes=)`` means."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from holdfast.accelerators.base import Accelerator
from holdfast.accelerators.choose import BY_DEVICE, choose_accelerator
from holdfast.accelerators.cuda import CUDAAccelerator
from holdfast.errors import ArgumentError, ConfigError
from holdfast.strategies.base import Strategy
from holdfast.strategies.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    TorchElasticEnvironment,
    find_environment,
)
from holdfast.strategies.single import SingleDeviceStrategy
from holdfast.utilities.rank_zero import warn_once
from holdfast.utilities.unknown_names import did_you_mean

if TYPE_CHECKING:
    from holdfast.strategies.parallel import ParallelStrategy

# With one device these all do what one process does.
_DDP_STARTS = ("ddp", "ddp_spawn", "ddp_fork", "ddp_notebook")
_DDP = {
    start + end
    for start in _DDP_STARTS
    for end in ("", "_find_unused_parameters_true", "_find_unused_parameters_false")
}
_FSDP = ("fsdp", "fsdp_native", "fsdp_cpu_offload")
_NAMES = ("auto", "single_device", "ddp", "fsdp")
_NOT_THERE = {
    "dp": "It was replaced by 'ddp' in Lightning 2. Use strategy='ddp'.",
    "ddp2": "It was replaced by 'ddp' in Lightning 2. Use strategy='ddp'.",
    "ddp_cpu": "Use strategy='ddp' with accelerator='cpu'.",
    "horovod": "Use strategy='ddp'.",
    "bagua": "Use strategy='ddp'.",
    "hivemind": "Use strategy='ddp'.",
    "colossalai": "Use strategy='fsdp'.",
    "deepspeed": "Use strategy='fsdp'.",
    "fairscale": "Use strategy='fsdp'.",
    "ddp_sharded": "Use strategy='fsdp'.",
    "model_parallel": "Use strategy='fsdp'.",
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
    environment: ClusterEnvironment | None = None,
) -> Strategy:
    """The strategy with its accelerator, whatever way it is spelled.

    Args:
        strategy: "auto": one process where one device is asked for and no launcher has started more, else
            "ddp".
        accelerator: The kind of device.
        devices: This machine's; "auto" is as many as a launcher has started processes, else one for "auto",
            and for "ddp" and "fsdp" all GPUs.
        num_nodes: Machines.
        environment: What the launcher says; None finds it out.

    Raises:
        ConfigError: it does not exist here, is not on this machine, or differs from what was started.
    """
    if isinstance(num_nodes, bool) or not isinstance(num_nodes, int) or num_nodes < 1:
        raise ArgumentError(f"Trainer(num_nodes={num_nodes!r}): expected an int of at least 1.")
    if isinstance(strategy, Strategy):
        from holdfast.strategies.parallel import ParallelStrategy

        if isinstance(strategy, ParallelStrategy):
            return _configured(strategy, accelerator, devices, num_nodes, environment)
        return _with_accelerator(strategy, accelerator)
    name = _check_name(strategy)
    chosen = choose_accelerator(accelerator)
    if name == "single_device":
        return SingleDeviceStrategy(_one_device(chosen, devices), accelerator=chosen)
    environment = environment or find_environment()
    found = _devices(chosen, devices, num_nodes, environment, all_there_are=name != "auto")
    parallel: ParallelStrategy
    if name in _FSDP:
        from holdfast.strategies.fsdp import FSDPStrategy

        offload = name == "fsdp_cpu_offload"
        parallel = FSDPStrategy(accelerator=chosen, cluster_environment=environment, cpu_offload=offload)
    elif len(found) * num_nodes == 1 and _started(environment) in (None, 1):
        return SingleDeviceStrategy(found[0], accelerator=chosen)
    else:
        from holdfast.strategies.ddp import DDPStrategy

        unused = {"find_unused_parameters": name.endswith("_true")} if "_find_unused" in name else {}
        options: dict[str, Any] = {"cluster_environment": environment, **unused}
        parallel = DDPStrategy(chosen, **options)
        _say_how_it_starts(name)
    parallel.configure(found, num_nodes)
    return parallel


def _configured(
    strategy: ParallelStrategy,
    accelerator: str | Accelerator,
    devices: Any,
    num_nodes: int,
    environment: ClusterEnvironment | None,
) -> Strategy:
    """A strategy that was given as an object, with what it was not given itself."""
    given = strategy.given_devices
    if given is None and strategy.accelerator is None:
        strategy.accelerator = choose_accelerator(accelerator)
    _with_accelerator(strategy, accelerator)
    strategy.cluster_environment = environment or strategy.cluster_environment
    if given is not None and devices != "auto":
        raise ConfigError(
            f"Trainer(devices={devices!r}) and {type(strategy).__name__}(parallel_devices=...) both say "
            "which devices. Leave one out."
        )
    if given is None:
        assert strategy.accelerator is not None
        given = _devices(strategy.accelerator, devices, num_nodes, strategy.environment, all_there_are=True)
    strategy.configure(given, num_nodes)
    return strategy


def _started(environment: ClusterEnvironment) -> int | None:
    """How many processes a launcher has started; None where none has, or it does not say."""
    if isinstance(environment, LightningEnvironment) or not environment.creates_processes_externally:
        return None
    return environment.world_size()


def _devices(
    accelerator: Accelerator,
    devices: Any,
    num_nodes: int,
    environment: ClusterEnvironment,
    *,
    all_there_are: bool,
) -> list[torch.device]:
    """This machine's devices, one for each of its processes."""
    if devices == "auto":
        started = _started(environment)
        if isinstance(environment, TorchElasticEnvironment):
            started, num_nodes = environment.local_world_size(), 1
        if started is not None:
            devices = max(1, started // num_nodes)
            if isinstance(accelerator, CUDAAccelerator) and torch.cuda.device_count() == 1:
                # Each process was given a GPU of its own, and sees no other.
                return [torch.device("cuda", 0)] * devices
        else:
            devices = accelerator.auto_device_count() if all_there_are else 1
    return accelerator.get_parallel_devices(accelerator.parse_devices(devices))


def _say_how_it_starts(name: str) -> None:
    start = next((one for one in ("ddp_spawn", "ddp_fork", "ddp_notebook") if name.startswith(one)), None)
    if start is not None:
        warn_once(
            start,
            f"Trainer(strategy={start!r}) is started as 'ddp' is: by running this process's command again. "
            "Use strategy='ddp'.",
        )


def _check_name(strategy: Any) -> str:
    name = strategy.lower() if isinstance(strategy, str) else ""
    if name in ("auto", "single_device") or name in _DDP or name in _FSDP:
        return name
    stem = next((known for known in _NOT_THERE if name == known or name.startswith(f"{known}_")), None)
    if stem is not None:
        raise ConfigError(f"Trainer(strategy={strategy!r}) is not supported. {_NOT_THERE[stem]}")
    raise ConfigError(
        f"Trainer(strategy={strategy!r}): expected {', '.join(map(repr, _NAMES))}, or a "
        f"Strategy.{did_you_mean(name, _NAMES)}"
    )


def _one_device(accelerator: Accelerator, devices: Any) -> torch.device:
    found = accelerator.get_parallel_devices(accelerator.parse_devices(1 if devices == "auto" else devices))
    if len(found) > 1:
        raise ConfigError(
            f"Trainer(strategy='single_device', devices={devices!r}): it takes one. Use strategy='ddp'."
        )
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
