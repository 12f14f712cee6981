"""What ``self.log`` collects in one loop: the latest value of each name and its reduction over the epoch.

Values stay tensors on their device until somebody reads them: logging never makes the host wait for a GPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from numbers import Number
from typing import Any

import torch
from torch import Tensor

from holdfast.errors import ConfigError
from holdfast.training.batch_size import batch_size_of
from holdfast.training.log_hooks import DEFAULTS, EPOCH_ONLY
from holdfast.utilities.rank_zero import rank_zero_only, warn_once

_REDUCTIONS: dict[Any, str] = {
    "mean": "mean",
    "avg": "mean",
    "sum": "sum",
    "min": "min",
    "max": "max",
    torch.mean: "mean",
    torch.sum: "sum",
    torch.min: "min",
    torch.max: "max",
    min: "min",
    max: "max",
    sum: "sum",
}


class Entry:
    """One logged name: its latest value and, with ``on_epoch``, its accumulation over the epoch."""

    __slots__ = (
        "asked", "bar", "fx", "group", "has_value", "hidden", "loader", "loader_suffix", "logger", "metric",
        "name", "on_epoch", "on_step", "reduce", "reduced_at", "reduced_epoch", "reduced_step",
        "step_reduced_at", "sync", "total", "updates", "value", "weight",
    )  # fmt: skip

    def __init__(
        self, name: str, fx: str, reduce: str, on_step: bool, on_epoch: bool, bar: bool, logger: bool
    ) -> None:
        self.name = name
        self.fx = fx
        self.reduce = reduce
        self.on_step = on_step
        self.on_epoch = on_epoch
        self.bar = bar
        self.logger = logger
        self.asked: Any = None
        self.loader: int | None = None
        self.loader_suffix = ""
        self.metric: Any = None
        self.value: Any = None
        self.has_value = False
        self.total: Any = None
        self.weight: float = 0
        self.updates = 0
        self.sync = False
        self.group: Any = None
        self.hidden = False
        """Whether it is another rank's to show."""
        self.reduced_epoch: Any = None
        self.reduced_step: Any = None
        self.reduced_at = self.step_reduced_at = -1
        """How many updates there had been when these two were reduced over the ranks."""

    def reset(self) -> None:
        self.has_value = False
        self.total = None
        self.weight = 0
        self.reduced_at = self.step_reduced_at = -1
        if self.metric is not None:
            self.metric.reset()

    def take_note_of(self, asked: tuple[Any, ...]) -> None:
        """Keep the arguments of ``self.log``, so that one comparison tells that a call has the same."""
        self.asked = asked
        self.sync, *group, only_rank_zero = asked[6:] or (False, False)
        self.group = group[0] if group else None
        # On other ranks it is counted all the same: a TorchMetrics object needs them all.
        self.hidden = bool(only_rank_zero) and rank_zero_only.rank != 0  # type: ignore[attr-defined]
        self.sync = bool(self.sync) and not only_rank_zero

    def step_name(self) -> str:
        return f"{self.name}_step{self.loader_suffix}" if self.on_epoch else self.name + self.loader_suffix

    def epoch_name(self) -> str:
        return f"{self.name}_epoch{self.loader_suffix}" if self.on_step else self.name + self.loader_suffix

    def update(self, value: Any, batch_size: int) -> None:
        """Take one value; a tensor is detached and copied, a number is kept as it is."""
        if isinstance(value, Tensor):
            value = value.detach()
            if value.numel() != 1:
                raise ConfigError(
                    f"self.log({self.name!r}, value): value must be a single number, found a tensor of shape "
                    f"{tuple(value.shape)}. Reduce it first, for example value.mean()."
                )
            if value.ndim:
                value = value.squeeze()
        elif type(value) is not float and type(value) is not int:
            # NumPy's scalars, whose arithmetic wraps around and which no checkpoint has a place for.
            value = value.item() if hasattr(value, "item") else value
        self.has_value = True
        self.updates += 1
        if self.on_epoch:
            if self.reduce == "mean":
                if self.weight == 0:
                    self.total = (value if isinstance(value, float) else _widened(value)) * batch_size
                elif isinstance(value, Tensor) and isinstance(self.total, Tensor):
                    self.total.add_(value, alpha=batch_size)
                else:
                    self.total = self.total + value * batch_size
                self.weight += batch_size
                if not self.on_step:
                    return
            elif self.weight == 0:
                self.total = value.clone() if isinstance(value, Tensor) else value
                self.weight = 1
            elif self.reduce == "sum":
                self.total = self.total + value
            elif isinstance(value, Tensor) or isinstance(self.total, Tensor):
                pick = torch.minimum if self.reduce == "min" else torch.maximum
                self.total = pick(torch.as_tensor(self.total), torch.as_tensor(value))
            else:
                self.total = min(self.total, value) if self.reduce == "min" else max(self.total, value)
        # Somebody may change a logged buffer in place before the value is read.
        self.value = value.clone() if isinstance(value, Tensor) else value

    def update_metric(self, metric: Any) -> None:
        """Take a TorchMetrics object: its value of this step now, its ``compute()`` when the epoch ends."""
        self.metric = metric
        self.has_value = True
        self.updates += 1
        self.weight = 1
        if self.on_step:
            cached = getattr(metric, "_forward_cache", None)
            # Without one there was no forward: whoever calls ``update`` wants no value of each step.
            self.value = None if cached is None else cached.detach().clone()
            if cached is None and not self.on_epoch:
                warn_once(
                    f"update {self.name}",
                    f"self.log({self.name!r}, metric): the metric was given its values by update(), so there "
                    "is none of this step. Log it with on_epoch=True, or call the metric instead.",
                )

    def is_reduced(self) -> bool:
        """Whether the ranks have told each other of all that is in it."""
        return self.reduced_at == self.updates

    def step_value(self) -> Tensor:
        if self.step_reduced_at == self.updates:
            return self.reduced_step  # type: ignore[no-any-return]
        return as_tensor(self.value)

    def epoch_value(self) -> Tensor:
        if self.reduced_at == self.updates:
            return self.reduced_epoch  # type: ignore[no-any-return]
        if self.metric is not None:
            return as_tensor(self.metric.compute())
        if self.weight == 0:  # a rank that has nothing of its own since a resume
            return torch.tensor(float("nan"))
        if self.reduce == "mean":
            return as_tensor(self.total / self.weight)
        return as_tensor(self.total)


def _widened(value: Any) -> Any:
    """A value fit for adding up many: half precision and integers become the default floating type."""
    if isinstance(value, Tensor) and value.dtype not in (torch.float32, torch.float64):
        return value.to(torch.get_default_dtype())
    return value


def _spelled_out(asked: tuple[Any, ...]) -> tuple[Any, ...]:
    # What was asked for in the run that wrote a checkpoint has no group, and before that no more than six.
    prog_bar, logger, on_step, on_epoch, reduce_fx, *rest = asked
    if len(rest) == 4:
        del rest[2]
    return prog_bar, logger, on_step, on_epoch, _REDUCTIONS.get(reduce_fx), *rest


def _ask_the_same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return all(a == b for a, b in zip(_spelled_out(one), _spelled_out(other), strict=False))


def as_tensor(value: Any) -> Tensor:
    """A 0-dimensional tensor of 32 or 64 bits for any logged value, whatever numbers it was made of."""
    if isinstance(value, Tensor):
        widened: Tensor = _widened(value.detach())
        return widened
    return torch.tensor(value, dtype=torch.get_default_dtype())


class Results:
    """What one loop (training, or an evaluation) has logged since its epoch began."""

    def __init__(self, *, training: bool) -> None:
        self.training = training
        self.entries: dict[tuple[str, str, int | None], Entry] = {}
        self.fx: str | None = None
        self.batch: Any = None
        self.batch_size: int | None = None
        self.dataloader_idx: int | None = None
        self.epoch_ended = False
        self.ranks_agree = False
        """Whether several ranks tell each other when the epoch ends: before that a metric has no value."""
        self.rank_zeros: dict[str, Tensor] = {}
        """Monitored values that are not the same on every rank: rank 0's, which all go by."""

    def reset(self) -> None:
        """Forget the values, keep the names: a new epoch begins."""
        self.rank_zeros.clear()
        for entry in self.entries.values():
            entry.reset()
        self.epoch_ended = False

    def drop(self, fx: str) -> None:
        """Forget what one hook has logged."""
        self.entries = {key: entry for key, entry in self.entries.items() if entry.fx != fx}

    def log(self, name: str, value: Any, asked: tuple[Any, ...], batch_size: int | None) -> None:
        """One ``self.log``; everything that does not change from call to call is settled at the first one."""
        entry = self.entries.get((self.fx, name, self.dataloader_idx))  # type: ignore[arg-type]
        if entry is None:
            entry = self._register(name, value, asked)
        elif entry.asked != asked:
            # The same reduction may be spelled in several ways: "max", max, torch.max.
            if not _ask_the_same(entry.asked, asked):
                raise ConfigError(
                    f"self.log({name!r}, ...) was called in {self.fx} with other arguments than before. "
                    "Give one name the same arguments at every call."
                )
            entry.take_note_of(asked)
        if entry.metric is not None:
            entry.update_metric(value)
            return
        if batch_size is None:
            if not entry.on_epoch or entry.reduce != "mean":
                batch_size = 1
            else:
                if self.batch_size is None:
                    self.batch_size = 1 if self.batch is None else batch_size_of(self.batch)
                batch_size = self.batch_size
        entry.update(value, batch_size)

    def _register(self, name: str, value: Any, asked: tuple[Any, ...]) -> Entry:
        prog_bar, logger, on_step, on_epoch, reduce_fx, add_dataloader_idx = asked[:6]
        fx = self.fx
        if fx is not None and "predict" in fx:
            raise ConfigError(
                f"self.log({name!r}, ...) cannot be called in {fx}: trainer.predict collects no metrics. "
                "Return the value with the prediction, or give it to self.logger.log_metrics."
            )
        if fx is None or fx not in DEFAULTS:
            raise ConfigError(
                f"self.log({name!r}, ...) cannot be called in {fx or 'a place outside of the loops'}. "
                "Call it in a step, or in a hook of a batch or an epoch."
            )
        step_default, epoch_default = DEFAULTS[fx]
        on_step = step_default if on_step is None else on_step
        on_epoch = epoch_default if on_epoch is None else on_epoch
        if on_step and fx in EPOCH_ONLY:
            raise ConfigError(
                f"self.log({name!r}, on_step=True) cannot be used in {fx}: there is no step there."
            )
        if not on_step and not on_epoch:
            raise ConfigError(f"self.log({name!r}, on_step=False, on_epoch=False) would log nothing.")
        reduce = _REDUCTIONS.get(reduce_fx)
        if reduce is None:
            raise ConfigError(
                f"self.log({name!r}, reduce_fx={reduce_fx!r}): expected 'mean', 'sum', 'min' or 'max'. "
                "For anything else log a TorchMetrics object."
            )
        if not isinstance(value, (Tensor, Number)) and not _is_metric(value):
            raise ConfigError(
                f"self.log({name!r}, value): expected a number, a tensor of one element or a TorchMetrics "
                f"object, found {type(value).__name__}."
            )
        entry = Entry(name, fx, reduce, on_step, on_epoch, prog_bar, True if logger is None else bool(logger))
        entry.take_note_of(asked)
        entry.metric = value if _is_metric(value) else None
        entry.loader = self.dataloader_idx
        if self.dataloader_idx is not None and not add_dataloader_idx:
            self._refuse_same_name(fx, name)
        if self.dataloader_idx is not None and add_dataloader_idx:
            entry.loader_suffix = f"/dataloader_idx_{self.dataloader_idx}"
        self.entries[(fx, name, self.dataloader_idx)] = entry
        return entry

    def _refuse_same_name(self, fx: str, name: str) -> None:
        """Raise if another loader's values go by this name already: one would hide the other."""
        if any(
            (other_fx, other) == (fx, name) and loader != self.dataloader_idx
            for other_fx, other, loader in self.entries
        ):
            raise ConfigError(
                f"self.log({name!r}, add_dataloader_idx=False) was called for several loaders, whose values "
                "would hide each other. Leave add_dataloader_idx out, or give each loader's value a name."
            )

    # -- reading -------------------------------------------------------------------------------------------

    def step_metrics(self, wanted: Callable[[Entry], bool]) -> dict[str, Tensor]:
        """Latest values of the wanted entries that are logged on steps, under their step names."""
        return {
            entry.step_name(): entry.step_value()
            for entry in self.shown()
            if entry.on_step and entry.value is not None and wanted(entry)
        }

    def epoch_metrics(self, wanted: Callable[[Entry], bool]) -> dict[str, Tensor]:
        """Reduced values of the wanted entries that are logged on epochs, under their epoch names."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The ``compute`` method of metric")
            return {
                entry.epoch_name(): entry.epoch_value()
                for entry in self.shown()
                if entry.on_epoch and self._has_epoch_value(entry) and wanted(entry)
            }

    def callback_metrics(self) -> dict[str, Tensor]:
        """Everything under every name it goes by, as callbacks see it now."""
        values: dict[str, Tensor] = {}
        for entry in self.shown():
            plain = entry.name + entry.loader_suffix
            if entry.on_step and self.training and entry.value is not None:
                values[entry.step_name()] = values[plain] = entry.step_value()
            if entry.on_epoch and self.epoch_ended and self._has_epoch_value(entry):
                values[entry.epoch_name()] = values[plain] = entry.epoch_value()
        values.update(self.rank_zeros)
        return values

    def shown(self) -> list[Entry]:
        """The entries that were logged, but for those that are another rank's to show."""
        return [entry for entry in self.entries.values() if entry.has_value and not entry.hidden]

    def _has_epoch_value(self, entry: Entry) -> bool:
        # A metric is computed where all ranks are. Whoever asks here may be alone, and would wait for them.
        return entry.metric is None or not self.ranks_agree or entry.is_reduced()

    # -- the accumulators, for a checkpoint in the middle of an epoch ---------------------------------------

    def state_dict(self, paths: Mapping[int, str]) -> list[dict[str, Any]]:
        """The accumulators as plain values, for `load_state_dict`.

        Args:
            paths: The path in the module of each TorchMetrics object, by its id; their states are not here.
        """
        for entry in self.entries.values():
            if entry.metric is not None and id(entry.metric) not in paths:
                warn_once(
                    ("metric elsewhere", entry.name),
                    f"self.log({entry.name!r}, {type(entry.metric).__name__}): the metric is no attribute of "
                    "the module, so what it has gathered is in no checkpoint. Make it one, in __init__.",
                )
        return [
            {
                "fx": fx,
                "name": name,
                "loader": loader,
                "asked": list(_spelled_out(entry.asked)),
                "reduce": entry.reduce,
                "on_step": entry.on_step,
                "on_epoch": entry.on_epoch,
                "bar": entry.bar,
                "logger": entry.logger,
                "suffix": entry.loader_suffix,
                "value": entry.value if entry.on_step else None,
                "total": entry.total,
                "weight": entry.weight,
                "updates": entry.updates,
                "metric": paths.get(id(entry.metric)),
            }
            for (fx, name, loader), entry in self.entries.items()
            if entry.has_value and not entry.hidden and (entry.metric is None or id(entry.metric) in paths)
        ]

    def load_state_dict(
        self, state: list[dict[str, Any]], device: torch.device, metrics: Mapping[str, Any]
    ) -> None:
        """Go on from what `state_dict` gave; ``metrics`` are the TorchMetrics objects by path."""
        for saved in state:
            entry = Entry(
                saved["name"],
                saved["fx"],
                saved["reduce"],
                saved["on_step"],
                saved["on_epoch"],
                saved["bar"],
                saved["logger"],
            )
            entry.take_note_of(tuple(saved["asked"]))
            entry.loader_suffix = saved["suffix"]
            entry.value, entry.total = (
                value.to(device) if isinstance(value, Tensor) else value
                for value in (saved["value"], saved["total"])
            )
            entry.weight = saved["weight"]
            entry.updates = saved["updates"]
            entry.metric = None if saved["metric"] is None else metrics.get(saved["metric"])
            entry.has_value = True
            self.entries[(entry.fx, entry.name, saved["loader"])] = entry


def _is_metric(value: Any) -> bool:
    return isinstance(value, torch.nn.Module) and hasattr(value, "compute") and hasattr(value, "reset")
