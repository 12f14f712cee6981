"""What a run was started with, as far as its bits depend on it: small facts that every full checkpoint holds.

A run that goes on from the checkpoint is compared with them (see `differences`).
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import platform
from collections.abc import Callable, Collection
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils.data import Subset

from holdfast.checkpoint.payload import encode
from holdfast.training.combined import CombinedStream
from holdfast.training.data import BatchStream
from holdfast.training.hparams import as_mapping, stored

if TYPE_CHECKING:
    from holdfast.training.trainer import Trainer

# Where a scheduler is, and not what it was made with; the base rates are the optimizer's.
_POSITION = {
    "base_lrs", "last_epoch", "_step_count", "_is_initial", "_get_lr_called_within_step", "_last_lr", "best",
    "num_bad_epochs", "cooldown_counter", "_initial_step", "verbose",
}  # fmt: skip
_OF_THE_COMMAND = ("interval", "frequency", "monitor")
_MAX_ITEMS = 32


def note(trainer: Trainer) -> dict[str, Any]:
    """The facts that hold for a whole fit, taken before a checkpoint's state is put in.

    A group's learning rate is the one that ``configure_optimizers`` gave it: what a scheduler makes of it for
    the first step is not looked at, unless the scheduler decides it all, as OneCycleLR does.
    """
    interval = trainer.val_check_interval
    return {
        "device": trainer.strategy.root_device.type,
        "precision": trainer.precision,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "gradient_clip_val": _plain(trainer.gradient_clip_val),
        "gradient_clip_algorithm": _plain(trainer.gradient_clip_algorithm),
        "limit_val_batches": trainer.limit_val_batches,
        "val_check_interval": str(interval) if isinstance(interval, timedelta) else interval,
        "check_val_every_n_epoch": trainer.check_val_every_n_epoch,
        "reload_dataloaders_every_n_epochs": trainer.reload_dataloaders_every_n_epochs,
        "hyper_parameters": hyperparameters(trainer),
        "optimizers": [_of_optimizer(optimizer) for optimizer in trainer.optimizers],
        "schedulers": [_of_scheduler(config) for config in trainer.lr_scheduler_configs],
    }


def facts(trainer: Trainer) -> dict[str, Any] | None:
    """The facts for a checkpoint that is taken now; None where no fit has noted any.

    Hyperparameters are in the checkpoint as it is; here only if the run has changed them since it began.
    """
    loop = trainer.fit_loop
    if loop is None or not loop.command:
        return None
    found = {**loop.command, **loop.in_force, **of_data(trainer)}
    if same(found["hyper_parameters"], hyperparameters(trainer)):
        del found["hyper_parameters"]
    return found


def in_force(then: dict[str, Any], now: dict[str, Any], afresh: Collection[str]) -> dict[str, Any]:
    """The facts of a checkpoint that hold for the run that goes on from it, whatever its own command says.

    Args:
        then: The checkpoint's.
        now: Those of the command.
        afresh: The states of the checkpoint that were not put in.
    """
    found: dict[str, Any] = {}
    for key, states in (("optimizers", "optimizer_states"), ("schedulers", "lr_schedulers")):
        old, new = then.get(key) or [], now[key]
        if states not in afresh and [one["class"] for one in old] == [one["class"] for one in new]:
            # When a scheduler steps is the command's own.
            own = [{name: one[name] for name in _OF_THE_COMMAND if name in one} for one in new]
            found[key] = [{**before, **mine} for before, mine in zip(old, own, strict=True)]
    return found


# -- hyperparameters -----------------------------------------------------------------------------------------


def hyperparameters(trainer: Trainer) -> dict[str, Any]:
    """The hyperparameters of "module" and "datamodule", in the form in which a checkpoint holds them."""
    owners = {"module": trainer.lightning_module, "datamodule": trainer.datamodule}
    found = {name: None if owner is None else stored(owner) for name, owner in owners.items()}
    return {name: plain_form(own[2]) for name, own in found.items() if own is not None}


def plain_form(values: Any) -> dict[str, Any]:
    """Hyperparameters, live ones or a file's, as plain values, without those that cannot be stored."""
    return dict(encode(as_mapping(values) or {}).tree or {})


def note_of_file(trainer: Trainer, payload: dict[str, Any]) -> dict[str, Any]:
    """What has to be known of a checkpoint's hyperparameters to compare them later.

    Returns:
        The plain forms of "module" and "datamodule", and under "unknown" the names that one side cannot tell.
    """
    found: dict[str, Any] = {}
    unknown = set(payload["holdfast"].get("omitted_hyper_parameters", []))
    for name, owner in (("module", trainer.lightning_module), ("datamodule", trainer.datamodule)):
        key = getattr(owner, "CHECKPOINT_HYPER_PARAMS_KEY", None)
        for values in (None if key is None else payload.get(key), getattr(owner, "hparams", None)):
            given = as_mapping(values) or {}
            unknown |= set(map(str, given)) - set(map(str, plain_form(given)))
        if key in payload:
            found[name] = plain_form(payload[key])
    return {**found, "unknown": sorted(unknown)}


# -- optimizers and schedulers -------------------------------------------------------------------------------


def _of_optimizer(optimizer: Any) -> dict[str, Any]:
    groups = []
    for group in optimizer.param_groups:
        given = {**group, "lr": group.get("initial_lr", group.get("lr"))}
        left_out = ("params", "param_names", "initial_lr")
        plain = {name: _plain(value) for name, value in given.items() if _is_plain(value)}
        groups.append({name: value for name, value in plain.items() if name not in left_out})
    return {"class": type(optimizer).__name__, "groups": groups}


def _of_scheduler(config: Any) -> dict[str, Any]:
    options = {name: getattr(config, name) for name in _OF_THE_COMMAND}
    return {"class": type(config.scheduler).__name__, **options, **_options(config.scheduler.state_dict())}


def _options(state: dict[str, Any], path: str = "") -> dict[str, Any]:
    """The plain values of a scheduler's state but for its position; those of schedulers within it too."""
    found: dict[str, Any] = {}
    for name, value in state.items():
        if name in _POSITION:
            continue
        if name == "_schedulers" and isinstance(value, list):
            for index, inner in enumerate(value):
                found.update(_options(inner, f"{path}schedulers[{index}]."))
        elif isinstance(value, dict) and all(type(key) is int for key in value):
            found[path + name] = [key for key, count in value.items() for _ in range(count)]  # milestones
        elif _is_plain(value):
            found[path + name] = _plain(value)
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return len(value) <= _MAX_ITEMS and all(_is_plain(one) for one in value)
    single = isinstance(value, Tensor) and not is_lazy(value) and value.numel() == 1
    return value is None or single or isinstance(value, (bool, int, float, str))


def _plain(value: Any) -> Any:
    """The value with tensors of one number as that number, and enums as their value."""
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, Tensor):
        return value.item()
    return value.value if hasattr(value, "value") else value


# -- data ----------------------------------------------------------------------------------------------------


def of_data(trainer: Trainer) -> dict[str, Any]:
    """What training's and validation's loaders are, as far as they are there."""
    loop = trainer.fit_loop
    if loop is None:
        return {}
    validation = [] if loop.validation is None else loop.validation.streams
    training = [one for one in [loop.stream] if one is not None]
    found: dict[str, Any] = {"train": _of_streams(training), "val": _of_streams(validation)}
    if loop.stream is not None:
        found["batches"] = None if loop.batches == float("inf") else int(loop.batches)
    return found


def parts_of(streams: list[Any]) -> list[BatchStream]:
    """The streams over one loader each that these consist of."""
    return [
        part
        for stream in streams
        for part in (stream.parts if isinstance(stream, CombinedStream) else [stream])
    ]


def _of_streams(streams: list[Any]) -> list[dict[str, Any]]:
    return [_of_loader(part) for part in parts_of(streams)]


def _of_loader(stream: BatchStream) -> dict[str, Any]:
    loader, known = stream.loader, stream.describe()
    batches = getattr(loader, "batch_sampler", None)
    sampler = None
    if not known["iterable"]:
        sampler = loader.sampler if type(batches).__module__.startswith("torch.") else batches
    return {
        "rows": known["rows"],
        "batch_size": _plain(known["batch_size"] or getattr(batches, "batch_size", None)),
        "sampler": None if sampler is None else type(sampler).__name__,
        "split": _split(getattr(loader, "dataset", None)),
        # Of map-style data each batch is the same, whichever worker loads it.
        "workers": known["workers"] if known["iterable"] else None,
    }


_splits: WeakKeyDictionary[Subset[Any], str] = WeakKeyDictionary()


def _split(dataset: Any) -> str | None:
    """Which rows a Subset, such as random_split's, is of; None for whole datasets."""
    if type(dataset) is not Subset:
        return None
    if dataset not in _splits:
        indices = torch.as_tensor(list(dataset.indices), dtype=torch.int64)
        digest = hashlib.blake2b(bytes(indices.view(torch.uint8).tolist()), digest_size=4)
        digest.update((_split(dataset.dataset) or "").encode())
        _splits[dataset] = digest.hexdigest()
    return _splits[dataset]


# -- environment ---------------------------------------------------------------------------------------------


def environment(device: torch.device) -> dict[str, Any]:
    """What else the bits of a run depend on.

    Args:
        device: Where it computes; what only matters on a GPU is there for a GPU only.
    """
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "numpy": _version("numpy"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "float32_matmul_precision": _unless_refused(
            torch.get_float32_matmul_precision, _precision_of_each_backend
        ),
        "gpus": [],
    }
    if device.type == "cuda":
        cudnn: Any = torch.backends.cudnn
        found |= {
            "gpus": [torch.cuda.get_device_name(device)],
            "cuda": torch.version.cuda,
            "cudnn": cudnn.version(),
            "cudnn.deterministic": cudnn.deterministic,
            "cudnn.benchmark": cudnn.benchmark,
            "TF32 in matmul": _unless_refused(
                lambda: torch.backends.cuda.matmul.allow_tf32,
                lambda: torch.backends.cuda.matmul.fp32_precision == "tf32",
            ),
            "TF32 in cudnn": _unless_refused(
                lambda: cudnn.allow_tf32,
                lambda: f"{cudnn.conv.fp32_precision} (conv), {cudnn.rnn.fp32_precision} (rnn)",
            ),
        }
    return found


def _unless_refused(old: Callable[[], Any], new: Callable[[], Any]) -> Any:
    """What a setting of torch is: asking for it as ever is an error once torch's newer switch was used."""
    try:
        return old()
    except RuntimeError:
        return new()


def _precision_of_each_backend() -> str:
    backends = {"cuda": torch.backends.cuda, "mkldnn": torch.backends.mkldnn}
    return ", ".join(f"{one.matmul.fp32_precision} ({name})" for name, one in backends.items())


# -- comparing -----------------------------------------------------------------------------------------------


def same(one: Any, other: Any) -> bool:
    """Whether two plain values are equal: tensors by their bits, NaN equal to NaN, 1 equal to 1.0."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
            return False
        alike = (one.dtype, one.shape) == (other.dtype, other.shape)
        return alike and torch.allclose(one.cpu(), other.cpu(), rtol=0, atol=0, equal_nan=True)
    if isinstance(one, dict) and isinstance(other, dict):
        return set(one) == set(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float) and isinstance(other, float) and one != one:
        return other != other
    return bool(one == other)


@functools.cache
def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
