"""The arguments of `FSDPStrategy`: what `fully_shard` makes of them, and what it has no use for."""

from __future__ import annotations

from typing import Any

import torch

from holdfast.errors import ArgumentError, ConfigError
from holdfast.utilities.unknown_names import did_you_mean

# What FSDP1 had, and what there is instead.
_LEFT_OUT = {
    "activation_checkpointing": "Call torch.utils.checkpoint.checkpoint in the model's forward.",
    "activation_checkpointing_policy": "Call torch.utils.checkpoint.checkpoint in the model's forward.",
    "backward_prefetch": "fully_shard prefetches by itself: leave it out.",
    "forward_prefetch": "fully_shard prefetches by itself: leave it out.",
    "limit_all_gathers": "fully_shard needs no limit: leave it out.",
    "param_init_fn": "Give the parts that you build on the meta device a reset_parameters method.",
    "sync_module_states": "All ranks start from rank 0's weights anyway: leave it out.",
    "use_orig_params": "Parameters always keep their names and their number: leave it out.",
}
_STRATEGIES = ("FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD", "_HYBRID_SHARD_ZERO2")


def check_torch() -> None:
    """Refuse a torch without `fully_shard`.

    Raises:
        ConfigError: it is older than 2.6.
    """
    version = torch.__version__.partition("+")[0].split(".")
    if (int(version[0]), int(version[1])) < (2, 6):
        raise ConfigError(
            f"FSDPStrategy(): fully_shard needs torch 2.6 or newer, found {torch.__version__}. Upgrade "
            "torch, or use strategy='ddp'."
        )


def check_names(kwargs: dict[str, Any]) -> None:
    """Refuse arguments that there are not; of FSDP1's, say what there is instead.

    Raises:
        ConfigError: there are some.
    """
    for name in kwargs:
        if name in _LEFT_OUT:
            raise ConfigError(
                f"FSDPStrategy({name}=...): that was FSDP1's, and fully_shard has no such argument. "
                f"{_LEFT_OUT[name]}"
            )
        known = ("auto_wrap_policy", "cpu_offload", "device_mesh", "ignored_parameters", "mixed_precision",
                 "reshard_after_forward", "sharding_strategy", "state_dict_type")  # fmt: skip
        raise ArgumentError(f"FSDPStrategy() has no argument {name!r}.{did_you_mean(name, known)}")


def check_mixed_precision(given: Any) -> None:
    """Refuse what is no policy of `fully_shard`.

    Raises:
        ConfigError: it is something else.
    """
    if given is None or type(given).__name__ == "MixedPrecisionPolicy":
        return
    raise ConfigError(
        f"FSDPStrategy(mixed_precision=...): expected a torch.distributed.fsdp.MixedPrecisionPolicy, such as "
        "MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32), found "
        f"{type(given).__name__}. FSDP1's buffer_dtype has no counterpart: buffers keep their dtype."
    )


def resharding(strategy: Any, given: bool | int | None) -> tuple[bool | int | None, bool]:
    """What `fully_shard` is told, and whether each machine has all parts."""
    name = str(getattr(strategy, "name", strategy)).upper()
    if name == "NO_SHARD":
        raise ConfigError("FSDPStrategy(sharding_strategy='NO_SHARD') shards nothing: use strategy='ddp'.")
    if name not in _STRATEGIES:
        raise ConfigError(
            f"FSDPStrategy(sharding_strategy={strategy!r}): expected one of "
            f"{', '.join(map(repr, _STRATEGIES[:3]))}."
        )
    keeps = name in ("SHARD_GRAD_OP", "_HYBRID_SHARD_ZERO2")
    return (False if keeps and given is None else given), name.lstrip("_").startswith("HYBRID")
