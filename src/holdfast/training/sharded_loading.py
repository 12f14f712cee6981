"""A checkpoint into a run whose ranks each hold a part of the model, and a directory of parts into any run.

What is read takes the places of a payload's tensors, in the form in which the run holds them: from there on
restoring goes the same way as with one process. Nothing live is touched before all that is read was checked.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from holdfast.checkpoint import sharded, sharded_bytes
from holdfast.strategies.parts import empty_part, is_like, part_of
from holdfast.training.param_groups import groups_of
from holdfast.training.sharded_saving import APART, WAITING
from holdfast.utilities.wrapped_names import plain_names

if TYPE_CHECKING:
    from holdfast.strategies.fsdp import FSDPStrategy
    from holdfast.training.trainer import Trainer

SOURCE = "directory"
"""Under this key of a payload's "holdfast" is the directory in which tensors that are None in it lie."""


def read(trainer: Trainer, path: str) -> dict[str, Any]:
    """The payload of a directory: whole, or for a run with sharded weights without its tensors.

    Ranks with sharded weights share the checking: each reads some of the files.

    Raises:
        CheckpointError: it is not whole, or what this rank has checked is damaged.
    """
    if not trainer.strategy.shards_model:
        return with_averages(sharded.load(path))
    payload = sharded.load_rest(path)
    with sharded_bytes.opened(path) as directory:
        names = sorted(directory.manifest.files)
        sharded_bytes.check(directory, names[trainer.global_rank :: trainer.world_size])
    payload["holdfast"][SOURCE] = os.path.abspath(path)
    return payload


def with_averages(payload: dict[str, Any]) -> dict[str, Any]:
    """A payload as one rank needs it: gradients that ranks had not shared yet are averaged."""
    run = payload["holdfast"]
    apart = run.pop(APART, None)
    if apart:
        names = [key for key in apart[0] if key.startswith(WAITING)]
        total = {key[len(WAITING) :]: sum(one[key] for one in apart) / len(apart) for key in names}
        run["gradients"] = {**(run.get("gradients") or {}), **total}
    return payload


# -- weights -------------------------------------------------------------------------------------------------


def place_weights(trainer: Trainer, payload: dict[str, Any]) -> None:
    """Put this rank's parts into a payload, in the places of its weights and all that is no optimizer's.

    Of a directory this rank's parts are read; of a file that is mapped they are the file's own memory.

    Ranks: all, of a directory. Blocks: until all of them have checked what they read.

    Raises:
        CheckpointCorrupt: some rank has found that what it needs is damaged.
    """
    module = trainer.lightning_module
    plain = plain_names(module)
    live = {plain(name): one for name, one in module.state_dict().items()}
    run = payload["holdfast"]
    if SOURCE not in run:
        spread_weights(trainer, payload)
        return
    strategy: FSDPStrategy = trainer.strategy  # type: ignore[assignment]
    apart = run.get(APART) or []
    own = trainer.global_rank % len(apart) if apart else 0
    first = next((one for one in live.values() if is_like(one.shape, one)), None)

    def target(path: list[Any], shape: torch.Size, dtype: torch.dtype) -> Tensor | None:
        if path[0] == "optimizer_states":
            return None
        if path[:2] == ["holdfast", APART]:
            return torch.empty(shape, dtype=dtype) if path[2] == own and _weight(path[3]) else None
        if path[0] == "state_dict":
            return _room(shape, dtype, live.get(path[1]))
        parameter = live.get(path[-1]) if path[:2] == ["holdfast", "gradients"] else None
        if is_like(shape, parameter) or first is None or not shape:
            return _room(shape, dtype, parameter)
        # Somebody else's DTensor, such as an average of weights: spread like the weights.
        return empty_part(shape, dtype, first)

    _fill(payload, _read(run[SOURCE], strategy, target))
    run["waiting"] = _waiting(trainer, run)


def spread_weights(trainer: Trainer, payload: dict[str, Any]) -> None:
    """Put this rank's part in the place of each whole weight that the run holds in parts."""
    plain = plain_names(trainer.lightning_module)
    live = {plain(name): one for name, one in trainer.lightning_module.state_dict().items()}
    weights = payload["state_dict"]
    for name, value in weights.items():
        whole = isinstance(value, Tensor) and not is_like(value.shape, value)
        if whole and is_like(value.shape, live.get(name)):
            weights[name] = part_of(value, live[name])


def _weight(key: str) -> bool:
    """Whether a key of "apart" is that of a weight or buffer."""
    return not key.startswith(WAITING) and json.loads(key)[0] == "state_dict"


def _waiting(trainer: Trainer, run: dict[str, Any]) -> dict[str, Tensor]:
    """The gradients that wait on this rank: its own, or with another number of ranks the mean of all's.

    Memory: two times the gradients, whole.
    """
    strategy: FSDPStrategy = trainer.strategy  # type: ignore[assignment]
    apart = run.get(APART) or []
    same = len(apart) == trainer.world_size
    total: dict[str, Tensor] = {}
    for at in [trainer.global_rank] if same else range(len(apart)):

        def target(path: list[Any], shape: torch.Size, dtype: torch.dtype, at: int = at) -> Tensor | None:
            wanted = path[:3] == ["holdfast", APART, at] and path[3].startswith(WAITING)
            return torch.empty(shape, dtype=dtype) if wanted else None

        if not any(key.startswith(WAITING) for one in apart for key in one):
            continue
        for path, one in _read(run[SOURCE], strategy, target):
            name = path[3][len(WAITING) :]
            total[name] = total[name] + one if name in total else one
    return total if same else {name: one / len(apart) for name, one in total.items()}


# -- optimizers ----------------------------------------------------------------------------------------------


def place_optimizers(trainer: Trainer, payload: dict[str, Any]) -> None:
    """Put this rank's parts into a payload, in the places of its optimizers' tensors; by parameters' names.

    Ranks: all, of a directory. Blocks: until all of them have checked what they read.
    On return: nothing in the optimizers' states refers to a mapped file.

    Raises:
        CheckpointCorrupt: some rank has found that what it needs is damaged.
    """
    run, states = payload["holdfast"], payload["optimizer_states"]
    owners = [_owners(trainer, run, index, state) for index, state in enumerate(states)]
    if SOURCE not in run:
        for index, state in enumerate(states):
            if not isinstance(state, dict) or not isinstance(state.get("state"), dict):
                continue
            for key, kept in state["state"].items():
                state["state"][key] = _each_tensor(kept, partial(_own, like=owners[index].get(key)))
        return
    strategy: FSDPStrategy = trainer.strategy  # type: ignore[assignment]
    apart = run.get(APART) or []
    own = trainer.global_rank % len(apart) if apart else 0

    def target(path: list[Any], shape: torch.Size, dtype: torch.dtype) -> Tensor | None:
        if path[0] == "optimizer_states":
            parameter = owners[path[1]].get(path[3]) if path[2] == "state" and len(path) > 3 else None
            return _room(shape, dtype, parameter)
        wanted = path[:3] == ["holdfast", APART, own] and not path[3].startswith(WAITING)
        if wanted and json.loads(path[3])[0] == "optimizer_states":
            return torch.empty(shape, dtype=dtype)
        return None

    _fill(payload, _read(run[SOURCE], strategy, target))


def _owners(trainer: Trainer, run: Mapping[str, Any], index: int, state: Any) -> dict[Any, Tensor]:
    """The live parameter that each key of an optimizer's state belongs to."""
    module = trainer.lightning_module
    plain = plain_names(module)
    parameters = {plain(name): one for name, one in module.named_parameters()}
    saved = run.get("param_groups") or groups_of(trainer.optimizers, module)
    names = [name for group in saved[index] for name in group] if index < len(saved) else []
    groups = state.get("param_groups") if isinstance(state, dict) else None
    keys = [key for group in groups or () for key in group["params"]]
    return {
        key: parameters[name] for key, name in zip(keys, names, strict=False) if name in parameters
    }  # fmt: skip


def _own(one: Tensor, like: Tensor | None) -> Tensor:
    return (part_of(one, like) if is_like(one.shape, like) and like is not None else one).clone()


def _each_tensor(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if type(value) is dict:
        return {key: _each_tensor(one, change) for key, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_each_tensor(one, change) for one in value)
    return value


# -- gradients -----------------------------------------------------------------------------------------------


def place_gradients(
    trainer: Trainer, run: dict[str, Any], *, inside_window: bool
) -> dict[str, Tensor] | None:
    """The gradients that parameters get; those that wait to be shared are put where the next backward adds.

    Args:
        trainer: Whose run.
        run: The checkpoint's "holdfast".
        inside_window: Whole gradients have not been shared yet; else they are all ranks' already.
    """
    strategy: FSDPStrategy = trainer.strategy  # type: ignore[assignment]
    strategy.put_waiting(run.pop("waiting", None) or {})
    kept = run.get("gradients")
    if not kept:
        return kept
    plain = plain_names(trainer.lightning_module)
    found: dict[str, Tensor] = {}
    wait: dict[str, Tensor] = {}
    for name, parameter in trainer.lightning_module.named_parameters():
        gradient = kept.get(plain(name))
        if gradient is None:
            continue
        whole = not is_like(gradient.shape, gradient) and is_like(gradient.shape, parameter)
        if whole and inside_window and trainer.accumulate_grad_batches > 1:
            wait[plain(name)] = gradient.clone()
        else:
            found[plain(name)] = _own(gradient, parameter) if whole else gradient
    if wait:
        strategy.put_waiting(wait)
    return found


# -- reading -------------------------------------------------------------------------------------------------


def _room(shape: torch.Size, dtype: torch.dtype, live: Any) -> Tensor:
    if is_like(shape, live):
        return empty_part(shape, dtype, live)
    return torch.empty(shape, dtype=dtype)


def _read(
    directory: str,
    strategy: FSDPStrategy,
    target: Callable[[list[Any], torch.Size, torch.dtype], Tensor | None],
) -> list[tuple[list[Any], Tensor]]:
    """Read the tensors for which there is a target, each with its path. Ranks: all."""
    wanted: dict[str, Tensor] = {}
    paths: dict[str, list[Any]] = {}
    for key, (shape, dtype) in sharded.tensor_info(directory).items():
        path = json.loads(key)
        room = target(path, shape, dtype)
        if room is not None:
            wanted[key], paths[key] = room, path
    sharded.load_into(directory, wanted, group=strategy.coordination)
    return [(paths[key], one) for key, one in wanted.items()]


def _fill(payload: dict[str, Any], tensors: list[tuple[list[Any], Tensor]]) -> None:
    """Put tensors in their places; what is another one on this rank last."""
    for path, one in sorted(tensors, key=lambda pair: pair[0][:2] == ["holdfast", APART]):
        _put(payload, json.loads(path[3]) if path[:2] == ["holdfast", APART] else path, one)


def _put(held: Any, path: list[Any], value: Tensor) -> Any:
    inside = value if len(path) == 1 else _put(held[path[0]], path[1:], value)
    if isinstance(held, tuple):
        return (*held[: path[0]], inside, *held[path[0] + 1 :])
    held[path[0]] = inside
    return held
