"""What the ranks of a job tell each other of what they logged: sums, so that every rank has the job's values.

All of it goes in one collective of a fixed length, on the group in which the ranks agree: numbers as float64,
and before them where a rank stands and what it has logged. So ranks that have logged different things, or are
in different places, find that out, instead of waiting or of adding up what does not belong together.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from holdfast.errors import ConfigError
from holdfast.training.results import Entry, Results, as_tensor
from holdfast.utilities.rank_zero import warn_once

if TYPE_CHECKING:
    from holdfast.training.trainer import Trainer

_LENGTH = 128
"""Numbers in the one collective; entries beyond that take a second one."""

_LOOPS = {"validate": "validation", "sanity_check": "sanity check"}

_MONITORS = 4
"""Monitored names that are compared."""

_HEADER = 3 + _MONITORS


class MetricExchange:
    """Reduces what was logged over the ranks of a job; one process has none.

    Args:
        trainer: Whose strategy has several processes, and is connected with them.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.rank = trainer.global_rank
        self._group = getattr(trainer.strategy, "coordination", None) or dist.group.WORLD

    def at_epoch_end(self, results: Results, *, again: bool = False, more: bool = False) -> bool:
        """Reduce what was logged for the epoch, and the latest values of steps among it; compute the metrics.

        Ranks: all. Blocks: until all are here. On return: `Entry.epoch_value` is the same on every rank for
        what was logged with ``sync_dist=True`` and for TorchMetrics objects.

        Args:
            results: What this rank has logged.
            again: Whether this is for what was logged by the hooks at the epoch's end.
            more: Whether hooks of this rank may log more of it, for which it has to come again.

        Returns:
            Whether any rank will come again.

        Raises:
            ConfigError: the ranks have logged different things.
        """
        new = _in_order(results, lambda one: not one.is_reduced())
        entries = [one for one in new if one.sync and one.metric is None]
        metrics = [one for one in new if one.metric is not None and one.on_epoch]
        loop = "training epoch" if results.training else _LOOPS.get(str(self._trainer.state.stage), "test")
        where = f"the end of the {loop}" + (", behind its hooks" if again else "")
        shared = [one for one in entries if one.group is None]
        marks = [_mark(one) for one in shared] + [f"{_mark(one)}, a metric" for one in metrics]
        names, own = self._monitored(results)
        rows = self._gather(where, marks, _numbers(shared), self._group, float(more), own)
        _take(shared, [row[_HEADER:] for row in rows])
        for one in metrics:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="The ``compute`` method of metric")
                one.reduced_epoch, one.reduced_at = as_tensor(one.metric.compute()), one.updates
        self._in_own_groups(where, [one for one in entries if one.group is not None])
        self._compare_monitored(results, names, [row[3:_HEADER] for row in rows])
        return any(row[2] for row in rows)

    def at_step(self, results: Results, wanted: Callable[[Entry], bool]) -> None:
        """Reduce the latest values of what is logged on steps with ``sync_dist=True``; nothing else happens.

        Ranks: all, if any has such an entry. Blocks: until all are here.

        Raises:
            ConfigError: the ranks have logged different things.
        """
        if not any(one.sync and one.on_step for one in results.entries.values()):
            return
        entries = _in_order(
            results, lambda one: one.sync and one.on_step and one.metric is None and wanted(one)
        )
        where = f"step {self._trainer.global_step}, where values of steps are logged"
        shared = [one for one in entries if one.group is None]
        if shared:
            numbers = [one.value for one in shared]
            rows = self._gather(where, [_mark(one) for one in shared], numbers, self._group)
            _take_steps(shared, [row[_HEADER:] for row in rows])
        self._in_own_groups(where, [one for one in entries if one.group is not None], steps=True)

    # -- one collective --------------------------------------------------------------------------------------

    def _gather(
        self,
        where: str,
        marks: list[str],
        numbers: list[Any],
        group: Any,
        more: float = 0.0,
        monitored: Sequence[float] = (),
    ) -> list[list[float]]:
        """Every rank's row: two checks, ``more``, what is monitored, and its numbers."""
        own = torch.zeros(_LENGTH, dtype=torch.float64)
        header = [_check(where), _check(repr(marks)), more, *monitored]
        own[: len(header)] = torch.tensor(header, dtype=torch.float64)
        values = _on_host(numbers)
        room = _LENGTH - _HEADER
        own[_HEADER : _HEADER + min(room, len(values))] = values[:room]
        rows = _all_gather(own, group, self._trainer)
        if any(row[:2].tolist() != header[:2] for row in rows):
            self._explain(where, marks, group)
        if len(values) > room:
            rest = _all_gather(values[room:], group, self._trainer)
            rows = [torch.cat(both) for both in zip(rows, rest, strict=True)]
        return [row.tolist() for row in rows]

    def _explain(self, where: str, marks: list[str], group: Any) -> None:
        """Say what the ranks have logged differently."""
        told: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(told, (self.rank, where, marks), group=group)
        if len({place for _, place, _ in told}) > 1:
            places = "; ".join(f"rank {rank}: {place}" for rank, place, _ in told)
            raise ConfigError(
                "The ranks wait for each other's logged values, and they stand in different places. "
                f"{places}. All ranks have to run the same number of batches, and to log the same names with "
                "sync_dist=True."
            )
        differing = sorted({mark for _, _, marks in told for mark in marks})
        lines = [
            f"  {mark}: by {_ranks([rank for rank, _, marks in told if mark in marks])}, "
            f"not by {_ranks([rank for rank, _, marks in told if mark not in marks])}"
            for mark in differing
            if not all(mark in marks for _, _, marks in told)
        ]
        raise ConfigError(
            f"self.log(..., sync_dist=True): at {where}, the ranks have not logged the same values, so there "
            "is nothing to reduce over them:\n" + "\n".join(lines) + "\n"
            "Log each on every rank, with the same arguments, or say rank_zero_only=True of rank 0's "
            "own. A TorchMetrics object always has to be logged on every rank."
        )

    def _in_own_groups(self, where: str, entries: list[Entry], *, steps: bool = False) -> None:
        """The same for what is logged with a ``sync_dist_group``, group after group."""
        groups = {id(one.group): one.group for one in entries}
        members = {key: _members(group) for key, group in groups.items()}
        for key in sorted((key for key in groups if members[key]), key=lambda key: members[key]):
            mine = [one for one in entries if id(one.group) == key]
            numbers = [one.value for one in mine] if steps else _numbers(mine)
            rows = self._gather(where, [_mark(one) for one in mine], numbers, groups[key])
            (_take_steps if steps else _take)(mine, [row[_HEADER:] for row in rows])

    # -- what is monitored -----------------------------------------------------------------------------------

    def _monitored(self, results: Results) -> tuple[list[str], list[float]]:
        """Names that decisions go by, and this rank's values of them; NaN for what it has not."""
        trainer = self._trainer
        asked = [getattr(callback, "monitor", None) for callback in trainer.callbacks]
        asked += [config.monitor for config in trainer.lr_scheduler_configs if config.reduce_on_plateau]
        names = list(dict.fromkeys(name for name in asked if isinstance(name, str)))[:_MONITORS]
        if trainer.state.fn != "fit" or not names:
            return [], [math.nan] * _MONITORS
        values = results.callback_metrics()
        own = [float(values[name]) if name in values else math.nan for name in names]
        return names, own + [math.nan] * (_MONITORS - len(names))

    def _compare_monitored(self, results: Results, names: list[str], rows: list[list[float]]) -> None:
        """Go by rank 0's value of what is monitored and differs by rank, and say so."""
        reduced = results.callback_metrics() if names else {}
        for index, name in enumerate(names):
            found = [row[index] for row in rows if not math.isnan(row[index])]
            if len(set(found)) < 2 or name not in reduced or self._is_reduced(results, name):
                continue
            warn_once(
                ("differs by rank", name),
                f"{name!r} is monitored and has another value on every rank: rank 0's is gone by. "
                f"Log it with self.log({name!r}, ..., sync_dist=True), and it is that of all the data.",
            )
            if not math.isnan(rows[0][index]):
                results.rank_zeros[name] = reduced[name].new_tensor(rows[0][index])

    @staticmethod
    def _is_reduced(results: Results, name: str) -> bool:
        """Whether the ranks' own values differed only because they were not reduced yet."""
        return any(
            name in (one.name + one.loader_suffix, one.step_name(), one.epoch_name()) and one.is_reduced()
            for one in results.entries.values()
        )


# -- an entry as numbers, and back ---------------------------------------------------------------------------


def _in_order(results: Results, wanted: Callable[[Entry], bool]) -> list[Entry]:
    """The wanted entries in an order that does not depend on which was logged first."""
    keys = sorted(results.entries, key=lambda key: (key[0], key[1], -1 if key[2] is None else key[2]))
    return [one for one in map(results.entries.__getitem__, keys) if one.has_value and wanted(one)]


def _mark(entry: Entry) -> str:
    """What has to be the same on every rank about an entry, for people to read as well."""
    when = " and ".join(
        text for text, yes in (("on_step", entry.on_step), ("on_epoch", entry.on_epoch)) if yes
    )
    return f"{entry.name + entry.loader_suffix!r} in {entry.fx} ({entry.reduce}, {when})"


def _numbers(entries: list[Entry]) -> list[Any]:
    """What is told of each entry for the epoch: total and weight, and its latest value."""
    numbers: list[Any] = []
    for one in entries:
        if one.on_epoch:
            numbers += [0.0 if one.total is None else one.total, float(one.weight)]
        if one.on_step:
            numbers.append(math.nan if one.value is None else one.value)
    return numbers


def _take(entries: list[Entry], rows: list[list[float]]) -> None:
    at = 0
    for one in entries:
        if one.on_epoch:
            totals, weights = [row[at] for row in rows], [row[at + 1] for row in rows]
            at += 2
            one.reduced_epoch = _like(one.total, _reduced(one.reduce, totals, weights))
        if one.on_step:
            one.reduced_step = _like(one.value, _reduced(one.reduce, [row[at] for row in rows], None))
            one.step_reduced_at = one.updates
            at += 1
        one.reduced_at = one.updates


def _take_steps(entries: list[Entry], rows: list[list[float]]) -> None:
    for at, one in enumerate(entries):
        one.reduced_step = _like(one.value, _reduced(one.reduce, [row[at] for row in rows], None))
        one.step_reduced_at = one.updates


def _reduced(reduce: str, values: list[float], weights: list[float] | None) -> float:
    """One number of all ranks'. Added up in the order of ranks, it is the same on each, bit for bit."""
    if reduce == "mean":
        weight = float(len(values)) if weights is None else sum(weights)
        return sum(values) / weight if weight else math.nan
    if weights is not None:  # a rank that went on from a checkpoint may have nothing yet
        values = [value for value, weight in zip(values, weights, strict=True) if weight or reduce == "sum"]
    if reduce == "sum":
        return sum(values)
    nans = [value for value in values if math.isnan(value)]
    return nans[0] if nans else (min if reduce == "min" else max)(values)


def _like(own: Any, value: float) -> Tensor:
    """The number as a tensor of the device and precision that the rank's own value has."""
    kind = as_tensor(0.0 if own is None else own)
    return torch.tensor(value, dtype=kind.dtype, device=kind.device)


def _on_host(numbers: list[Any]) -> Tensor:
    """Numbers and tensors of one element as one tensor on the CPU; each device is waited for once."""
    values = torch.tensor(
        [0.0 if isinstance(one, Tensor) else float(one) for one in numbers], dtype=torch.float64
    )
    by_kind: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, one in enumerate(numbers):
        if isinstance(one, Tensor):
            by_kind.setdefault((one.device, one.dtype), []).append(index)
    for indices in by_kind.values():
        values[indices] = torch.stack([numbers[index].reshape(()) for index in indices]).cpu().double()
    return values


def _all_gather(own: Tensor, group: Any, trainer: Trainer) -> list[Tensor]:
    device = trainer.strategy.root_device if dist.get_backend(group) == "nccl" else own.device
    sent = own.to(device)
    rows = [torch.empty_like(sent) for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, sent, group=group)
    return [row.cpu() for row in rows]


def _check(text: str) -> float:
    """A number for a text that differs where texts differ, and that float64 holds exactly."""
    return float(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big"))


def _members(group: Any) -> list[int]:
    """The ranks in a group; none where this one is not in it."""
    if not isinstance(group, dist.ProcessGroup) or dist.get_rank(group) < 0:
        return []
    return dist.get_process_group_ranks(group)


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
