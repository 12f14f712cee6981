"""Hyperparameters: what ``__init__`` was called with, so that a checkpoint can build the module again."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import sys
from collections.abc import Iterable, Mapping
from types import CodeType, FrameType
from typing import Any

from torch import nn

from holdfast.checkpoint.exact import type_name
from holdfast.errors import ConfigError
from holdfast.utilities.parsing import AttributeDict
from holdfast.utilities.parsing import as_mapping as named_values
from holdfast.utilities.rank_zero import rank_zero_deprecation, rank_zero_warn, warn_once

KWARGS = "kwargs"
"""The ``hparams_name`` of hyperparameters that are keyword arguments each, not one object."""

_MISSING = object()


# -- collecting ----------------------------------------------------------------------------------------------


def collect_init_arguments(owner: object, frame: FrameType | None) -> dict[str, Any] | None:
    """The arguments of every ``__init__`` of ``owner`` that is running now; a child's win over its parent's.

    ``frame`` is the one that asks. Wrappers between the ``__init__`` calls are passed over. None means that
    no ``__init__`` of it is running.
    """
    # An attribute, not the argument: a field may have a default factory, and __post_init__ may change it.
    fields = {f.name for f in dataclasses.fields(owner) if f.init} if dataclasses.is_dataclass(owner) else ()
    values = {name: value for name in fields if (value := getattr(owner, name, _MISSING)) is not _MISSING}
    generated = _generated_inits(type(owner))
    found = bool(fields)
    while frame is not None:
        code = frame.f_code
        if (
            code.co_name == "__init__"
            and code.co_argcount
            and frame.f_locals.get(code.co_varnames[0]) is owner
        ):
            # Frames are walked from the innermost, the parent's, outwards: the child comes later and wins.
            found = True
            arguments = _arguments_of(frame)
            if code in generated:
                arguments = {key: value for key, value in arguments.items() if key not in values}
            values.update(arguments)
        frame = frame.f_back
    return values if found else None


def _arguments_of(frame: FrameType) -> dict[str, Any]:
    """The arguments of the call that ``frame`` runs: positional and keyword ones, ``**kwargs`` flattened."""
    code: CodeType = frame.f_code
    named = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
    local = frame.f_locals
    values = {name: local[name] for name in named if name in local}
    if code.co_flags & inspect.CO_VARKEYWORDS:
        at = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & inspect.CO_VARARGS)
        values.update(local.get(code.co_varnames[at], {}))
    return values


def _generated_inits(cls: type[Any]) -> set[CodeType]:
    own = [vars(base) for base in cls.__mro__]
    return {
        space["__init__"].__code__
        for space in own
        if "__dataclass_fields__" in space and hasattr(space.get("__init__"), "__code__")
    }


def as_mapping(value: Any) -> dict[str, Any] | None:
    """Named values of any form as a dict, OmegaConf's with interpolations as written; None for others."""
    if is_config(value):
        plain: dict[str, Any] = sys.modules["omegaconf"].OmegaConf.to_container(value, resolve=False)
        return plain
    return named_values(value)


def is_config(value: Any) -> bool:
    """Whether it is OmegaConf's, which is not imported for the question."""
    omegaconf = sys.modules.get("omegaconf")
    return omegaconf is not None and isinstance(value, omegaconf.DictConfig)


def _copied(values: Mapping[str, Any]) -> AttributeDict:
    """A copy in which nothing is shared, but for what cannot be copied and for networks, which are large."""
    made = AttributeDict()
    for name, value in values.items():
        try:
            made[name] = value if isinstance(value, nn.Module) else copy.deepcopy(value)
        except Exception:  # an argument that cannot be copied, such as an open file, is one nevertheless
            made[name] = value
    return made


# -- keeping -------------------------------------------------------------------------------------------------


class HyperparametersMixin:
    """Gives a class ``save_hyperparameters()``, ``hparams`` and ``hparams_initial``."""

    _log_hyperparams = False
    _hparams_name = KWARGS
    _hparams_type: str | None = None
    _hparams: Any
    _hparams_initial: Any

    def save_hyperparameters(
        self,
        *args: Any,
        ignore: str | Iterable[str] | None = None,
        frame: FrameType | None = None,
        logger: bool = True,
    ) -> None:
        """Keep the arguments of ``__init__`` in ``self.hparams``, in every checkpoint and in the logger.

        A second call adds to the first.

        Args:
            args: Names of the arguments to keep; none keeps all. A single Namespace, dict, dataclass or
                OmegaConf container is kept whole instead, and given back as one argument.
            ignore: Names of arguments to leave out.
            frame: A frame within the ``__init__``; found by itself when None.
            logger: Whether loggers get the hyperparameters too.

        Raises:
            ConfigError: a name is not an argument of ``__init__``.
        """
        if frame is None:
            # Not by way of its own frame: that would be a cycle, and keep alive all that its callers hold.
            frame = sys._getframe(1)
        collected = collect_init_arguments(self, frame)
        found = collected or {}
        left_out = {ignore} if isinstance(ignore, str) else set(ignore or ())
        if len(args) == 1 and not isinstance(args[0], str):
            self._keep_whole(args[0], found, left_out)
        elif args:
            self._keep(self._named(args, found, left_out))
        else:
            if collected is None:
                rank_zero_warn(
                    f"{type(self).__name__}.save_hyperparameters() was called when no __init__ of it was "
                    "running, so there are no arguments to keep. Call it in __init__."
                )
            self._keep(found)
        self.remove_ignored_hparams(left_out)
        for name in left_out & set(self._hparams_initial):
            del self._hparams_initial[name]
        self._log_hyperparams = logger
        self._warn_of_modules()

    def remove_ignored_hparams(self, ignore_list: Iterable[str]) -> None:
        """Drop these names from ``hparams``; one that is not there is no error."""
        for name in ignore_list:
            self._hparams = without(self.hparams, name)

    @property
    def hparams(self) -> Any:
        """The hyperparameters, as attributes and items; what you change here is in the next checkpoint."""
        if not hasattr(self, "_hparams"):
            self._hparams = AttributeDict()
        return self._hparams

    @hparams.setter
    def hparams(self, value: Any) -> None:
        """The spelling of Lightning 1.0, in ``__init__``: ``self.hparams = hparams``."""
        rank_zero_deprecation(
            "self.hparams = hparams is an old spelling: use self.save_hyperparameters(hparams), in __init__.",
            stacklevel=6 if isinstance(self, nn.Module) else 5,  # an nn.Module sets attributes by a method
        )
        found = collect_init_arguments(self, sys._getframe(1)) or {}
        self._keep_whole(value, found, set())
        self._log_hyperparams = True

    @property
    def hparams_initial(self) -> AttributeDict:
        """A copy of the hyperparameters as they were when ``save_hyperparameters`` was called."""
        return _copied(self._hparams_initial) if hasattr(self, "_hparams_initial") else AttributeDict()

    def _named(self, args: Iterable[Any], found: dict[str, Any], left_out: set[str]) -> dict[str, Any]:
        for arg in args:
            if not isinstance(arg, str) or (arg not in found and arg not in left_out):
                raise ConfigError(
                    f"save_hyperparameters({', '.join(map(repr, args))}): {arg!r} is not an argument of "
                    f"{type(self).__name__}.__init__, which takes {sorted(found)}."
                )
        return {arg: found[arg] for arg in args if arg in found}

    def _keep_whole(self, whole: Any, found: dict[str, Any], left_out: set[str]) -> None:
        values = {} if whole is None else as_mapping(whole)
        if values is None:
            raise ConfigError(
                "save_hyperparameters(x): expected names of arguments, or one Namespace, dict, dataclass or "
                f"OmegaConf container, found {type(whole).__name__}."
            )
        self._hparams_name = next((key for key, value in found.items() if value is whole), self._hparams_name)
        self._hparams_type = type_name(type(whole))
        if is_config(whole) and not self.hparams:
            self._hparams = whole  # itself: its interpolations go on working
            self._hparams_initial = _copied(values)
        else:
            self._keep(values)

    def _keep(self, values: dict[str, Any]) -> None:
        self._hparams = with_values(self.hparams, values)
        if not hasattr(self, "_hparams_initial"):
            self._hparams_initial = AttributeDict()
        self._hparams_initial.update(_copied(values))

    def _warn_of_modules(self) -> None:
        names = [name for name, value in self._hparams_initial.items() if isinstance(value, nn.Module)]
        if names:
            cls = type(self).__name__
            warn_once(
                ("module as hyperparameter", cls, *names),
                f"{cls}.save_hyperparameters(): {', '.join(map(repr, names))} is an nn.Module. A checkpoint "
                "holds its weights, not how to build it: give it to "
                f"{cls}.load_from_checkpoint(path, {names[0]}=...). To hear no more of it: "
                f"save_hyperparameters(ignore={names!r}).",
            )


def with_values(values: Any, more: Mapping[str, Any]) -> Any:
    """The hyperparameters with more of them: the same object, or for OmegaConf a copy that takes them."""
    if not is_config(values):
        values.update(more)
        return values
    if not more:
        return values
    container = sys.modules["omegaconf"].OmegaConf
    made = copy.deepcopy(values)
    container.set_struct(made, False)
    container.set_readonly(made, False)
    try:
        for key, value in more.items():
            made[key] = value
    except Exception:  # OmegaConf takes no objects such as functions
        return AttributeDict({**container.to_container(values, resolve=False), **more})
    return made


def without(values: Any, name: str) -> Any:
    """The hyperparameters less one name: the same object, or for OmegaConf a copy."""
    if name not in values:
        return values
    if is_config(values):
        container = sys.modules["omegaconf"].OmegaConf
        return container.masked_copy(values, [key for key in values if key != name])
    del values[name]
    return values


def stored(owner: HyperparametersMixin) -> tuple[str, str | None, Any] | None:
    """Name, type and values of the hyperparameters for a checkpoint; None where there are none.

    Networks among them are left out: their weights are in the checkpoint already.
    """
    values = owner.hparams
    if not values:
        return None
    if not is_config(values):
        values = {key: value for key, value in values.items() if not isinstance(value, nn.Module)}
    return owner._hparams_name, owner._hparams_type, values
