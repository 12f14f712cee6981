"""A saved state back into live objects: all of it is checked before any of it is written; all or nothing.

Modules, optimizers and tensors are compared with what was saved before anything is written. What only its
own ``load_state_dict`` can judge (schedulers, a module with hooks) goes first, and is put back if anything
refuses.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from holdfast.checkpoint.stateful import (
    DICT,
    GENERATOR,
    LIST,
    LOADER,
    MODULE,
    OBJECT,
    OPTIMIZER,
    TENSOR,
    VALUE,
    Captured,
    bare,
    items_of,
    joined,
    kind_of,
    leaves,
)
from holdfast.errors import CheckpointIncompatible
from holdfast.utilities import seed
from holdfast.utilities.optimizer_state import load_optimizer_state
from holdfast.utilities.wrapped_names import matched, plain_names

_SHOWN = 12
_ORDER = (OBJECT, GENERATOR, "custom module", OPTIMIZER, MODULE, TENSOR, LOADER)
_WORDS = {
    MODULE: "a module", OPTIMIZER: "an optimizer", OBJECT: "an object", LOADER: "a loader",
    TENSOR: "a tensor", GENERATOR: "a generator", VALUE: "a plain value", DICT: "a dict", LIST: "a list",
}  # fmt: skip
_SHAPED_LIKE_THE_PARAMETER = {
    "exp_avg", "exp_avg_sq", "exp_inf", "max_exp_avg_sq", "momentum_buffer", "square_avg", "grad_avg",
    "acc_delta", "sum", "prev", "step_size", "ax",
}  # fmt: skip


class _Pair(NamedTuple):
    path: str
    kind: str
    live: Any
    saved: Any


class Restoration:
    """A saved state that fits the live one, ready to be written into it.

    Raises:
        CheckpointIncompatible: it does not fit; names each key, what was expected and what was found. Nothing
            was changed.
        ConfigError: the live state is not one that can be saved.
    """

    def __init__(self, state: dict[str, Any], saved: Captured, source: str) -> None:
        self._source = source
        self._kinds, self._omitted = saved.kinds, saved.omitted
        self._pairs: list[_Pair] = []
        self._values: list[tuple[Any, Any, Any]] = []
        self._problems: list[str] = []
        self.kept: list[str] = []
        """Paths that the file could not hold; they stay as they are."""
        for _ in leaves(state):
            pass  # refuses what is no such state
        self._match(state, saved.values, "")
        if self._problems:
            shown = self._problems[:_SHOWN]
            more = len(self._problems) - len(shown)
            raise CheckpointIncompatible(
                f"{source} does not fit the state; nothing was restored:\n  "
                + "\n  ".join(shown)
                + (f"\n  and {more} more" if more else "")
                + "\nGive restore() the same objects, built as they were when it was saved."
            )

    # -- finding what belongs together -----------------------------------------------------------------------

    def _match(self, live: Any, saved: Any, path: str) -> None:
        theirs = dict(items_of(saved))
        for key, value in items_of(live):
            where = joined(path, key)
            if where in self._omitted:
                self.kept.append(where)
            elif key not in theirs:
                self._problems.append(f"{where}: {_WORDS[kind_of(value)]} in the state, nothing in the file")
            else:
                self._match_one(live, key, value, theirs[key], where)
        mine = dict(items_of(live))
        for key, value in theirs.items():
            where = joined(path, key)
            if key in mine or where in self._omitted:
                continue
            if self._kind(where) == VALUE and isinstance(live, dict):
                self._values.append((live, key, value))
            else:
                self._problems.append(
                    f"{where}: {_WORDS[self._kind(where)]} in the file, nothing in the state"
                )

    def _match_one(self, holder: Any, key: Any, live: Any, saved: Any, where: str) -> None:
        kind, theirs = kind_of(live), self._kind(where)
        if kind == VALUE and (theirs in (VALUE, TENSOR) or self._holds_only_tensors(theirs, where)):
            self._values.append((holder, key, saved))
        elif kind != theirs and {kind, theirs} != {OBJECT, LOADER}:
            self._problems.append(f"{where}: {_WORDS[kind]} in the state, {_WORDS[theirs]} in the file")
        elif kind in (DICT, LIST):
            self._match(live, saved, where)
        elif kind in (MODULE, OPTIMIZER) and not isinstance(saved, Mapping):
            self._problems.append(
                f"{where}: {_WORDS[kind]} in the state, a {type(saved).__name__} in the file"
            )
        else:
            if kind == MODULE:
                live = bare(live)
                kind = "custom module" if _is_custom(live) else MODULE
                saved = matched(saved, live.state_dict(), live)
            self._problems += [f"{where}{problem}" for problem in _problems(kind, live, saved)]
            self._pairs.append(_Pair(where, kind, live, saved))

    def _kind(self, where: str) -> str:
        return self._kinds.get(where, VALUE)

    def _holds_only_tensors(self, kind: str, where: str) -> bool:
        """A dict that is filled while training is empty in a new process."""
        inside = {one for path, one in self._kinds.items() if path.startswith(f"{where}/")}
        return kind in (DICT, LIST) and inside <= {VALUE, TENSOR, DICT, LIST}

    # -- writing ---------------------------------------------------------------------------------------------

    def apply(self) -> None:
        """Write everything into the live objects.

        Raises:
            CheckpointIncompatible: an object refused its state; everything is as it was before.
        """
        undo: list[Callable[[], Any]] = []
        modules = [pair for pair in self._pairs if pair.kind in (MODULE, "custom module")]
        at = ""
        try:
            with torch.no_grad():
                for kind in _ORDER:
                    for pair in self._pairs:
                        if pair.kind == kind:
                            at = pair.path
                            undo += _way_back(pair)
                            _put(pair, modules)
        except Exception as error:
            for put_back in reversed(undo):
                put_back()
            raise CheckpointIncompatible(
                f"{self._source} does not fit the state: {at} refused what was saved for it "
                f"({type(error).__name__}: {error}). Everything is as it was before."
            ) from error
        for holder, key, value in self._values:
            _put_value(holder, key, value)


def _put(pair: _Pair, modules: list[_Pair]) -> None:
    if pair.kind == OPTIMIZER:
        # All modules as one, so that each parameter is found with the weight that was saved for it.
        together = nn.ModuleDict({str(index): one.live for index, one in enumerate(modules)})
        weights = {
            f"{index}.{name}": value
            for index, one in enumerate(modules)
            for name, value in _plainly_named(one)
        }
        load_optimizer_state(pair.live, pair.saved, together, weights)
    elif pair.kind == GENERATOR:
        seed.set_state_of(pair.live, pair.saved)
    elif pair.kind == TENSOR:
        pair.live.copy_(pair.saved)
    elif pair.kind == MODULE:
        pair.live.load_state_dict(pair.saved, strict=not _lost_extra_states(pair.live, pair.saved))
    else:
        pair.live.load_state_dict(pair.saved)


def _plainly_named(pair: _Pair) -> Iterator[tuple[str, Any]]:
    plain = plain_names(pair.live)
    return ((plain(name), value) for name, value in pair.saved.items())


def _way_back(pair: _Pair) -> list[Callable[[], Any]]:
    """What undoes writing; nothing for what was checked whole and cannot be refused any more."""
    live = pair.live
    if pair.kind == GENERATOR:
        state = seed.state_of(live)
        return [lambda: seed.set_state_of(live, state)]
    if pair.kind == OPTIMIZER:
        before = live.state_dict()  # loading makes a new state beside the old one
        return [lambda: live.load_state_dict(before)]
    if pair.kind in (OBJECT, "custom module"):
        copied = copy.deepcopy(live.state_dict())
        return [lambda: live.load_state_dict(copied)]
    return []


def _put_value(holder: Any, key: Any, value: Any) -> None:
    live = holder[key] if not isinstance(holder, dict) or key in holder else None
    if type(live) is dict and type(value) is dict:  # the program may know it by another name too
        live.clear()
        live.update(value)
    elif type(live) is list and type(value) is list:
        live[:] = value
    else:
        holder[key] = value


# -- what must agree -----------------------------------------------------------------------------------------


def _problems(kind: str, live: Any, saved: Any) -> list[str]:
    if kind == MODULE:
        return _module_problems(live, saved)
    if kind == OPTIMIZER:
        return _optimizer_problems(live, saved)
    if kind == TENSOR and (live.shape, live.dtype) != (saved.shape, saved.dtype):
        return [f": {_looks(live)} in the state, {_looks(saved)} in the file"]
    return []


def _looks(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _is_custom(module: nn.Module) -> bool:
    """Whether only the module itself can tell what it takes: it, or a part of it, has its own way to load."""
    return any(
        type(part).load_state_dict is not nn.Module.load_state_dict or part._load_state_dict_pre_hooks
        for part in module.modules()
    )


def _lost_extra_states(module: nn.Module, saved: Mapping[str, Any]) -> list[str]:
    """Keys of what ``get_extra_state`` gave that the file could not hold."""
    own = module.state_dict()
    return [key for key in own if key not in saved and key.rpartition(".")[2] == "_extra_state"]


def _module_problems(module: nn.Module, saved: Mapping[str, Any]) -> list[str]:
    own = module.state_dict()
    lost = _lost_extra_states(module, saved)
    problems = [f"/{key}: in the state, not in the file" for key in own if key not in {*saved, *lost}]
    for key, value in saved.items():
        if key not in own:
            problems.append(f"/{key}: in the file, not in the state")
        elif _has_shape(value) and _has_shape(own[key]) and value.shape != own[key].shape:
            shapes = f"{tuple(own[key].shape)} in the state, {tuple(value.shape)} in the file"
            problems.append(f"/{key}: shape {shapes}")
    return problems


def _has_shape(value: Any) -> bool:
    return isinstance(value, Tensor) and not is_lazy(value)


def _optimizer_problems(optimizer: Any, saved: Mapping[str, Any]) -> list[str]:
    groups, theirs = optimizer.param_groups, saved.get("param_groups")
    if theirs is None or "state" not in saved:  # its state_dict is its own affair
        return []
    if len(groups) != len(theirs):
        return [f": {len(groups)} parameter groups in the state, {len(theirs)} in the file"]
    problems = []
    for number, (group, other) in enumerate(zip(groups, theirs, strict=True)):
        mine, counted = len(group["params"]), len(other["params"])
        if mine != counted:
            problems.append(f"/param_groups/{number}: {mine} parameters in the state, {counted} in the file")
        elif type(getattr(optimizer, "optimizer", optimizer)).__module__.startswith("torch.optim."):
            for parameter, index in zip(group["params"], other["params"], strict=True):
                problems += _misshapen(parameter, index, saved["state"].get(index, {}))
    return problems


def _misshapen(parameter: Tensor, index: int, kept: Mapping[str, Any]) -> list[str]:
    return [
        f"/state/{index}/{name}: for a parameter of shape {tuple(parameter.shape)} in the state, "
        f"{tuple(value.shape)} in the file"
        for name, value in kept.items()
        if name in _SHAPED_LIKE_THE_PARAMETER
        and isinstance(value, Tensor)
        and value.dim() > 0
        and value.shape != parameter.shape
    ]
