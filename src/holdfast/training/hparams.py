"""Hyperparameters: what ``__init__`` was called with, so that a checkpoint can build the module again."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import inspect
from collections.abc import Iterable, Mapping
from types import CodeType, FrameType
from typing import Any

from holdfast.errors import ConfigError


class AttributeDict(dict[str, Any]):
    """A dict whose keys are attributes too: ``hparams.lr`` and ``hparams["lr"]`` are the same."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"Missing attribute {name!r}; there are {sorted(self)}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        del self[name]


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


def collect_init_arguments(owner: object, frame: FrameType | None) -> dict[str, Any]:
    """The arguments of every ``__init__`` of ``owner`` that is running now; a child's win over its parent's.

    ``frame`` is the one that asks. Wrappers between the ``__init__`` calls are passed over.
    """
    if dataclasses.is_dataclass(owner):
        return {
            f.name: getattr(owner, f.name)
            for f in dataclasses.fields(owner)
            if f.init and hasattr(owner, f.name)
        }
    values: dict[str, Any] = {}
    while frame is not None:
        code = frame.f_code
        if (
            code.co_name == "__init__"
            and code.co_argcount
            and frame.f_locals.get(code.co_varnames[0]) is owner
        ):
            # Frames are walked from the innermost, the parent's, outwards: the child comes later and wins.
            values.update(_arguments_of(frame))
        frame = frame.f_back
    return values


def as_mapping(value: Any) -> dict[str, Any] | None:
    """A Namespace, mapping, dataclass or OmegaConf object as a dict; None for anything else."""
    if isinstance(value, argparse.Namespace):
        return dict(vars(value))
    if isinstance(value, Mapping):
        return dict(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    return None


class HyperparametersMixin:
    """Gives a class ``save_hyperparameters()``, ``hparams`` and ``hparams_initial``."""

    _hparams: AttributeDict
    _hparams_initial: AttributeDict

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._log_hyperparams = False

    def save_hyperparameters(
        self,
        *args: Any,
        ignore: str | Iterable[str] | None = None,
        frame: FrameType | None = None,
        logger: bool = True,
    ) -> None:
        """Keep the arguments of ``__init__`` in ``self.hparams``, in every checkpoint and in the logger.

        Args:
            args: Names of the arguments to keep; none keeps all. A single Namespace, dict or dataclass is
                kept whole instead.
            ignore: Names of arguments to leave out.
            frame: The frame of the ``__init__``; found by itself when None.
            logger: Whether loggers get the hyperparameters too.

        Raises:
            ConfigError: a name is not an argument of ``__init__``.
        """
        if frame is None:
            current = inspect.currentframe()
            frame = None if current is None else current.f_back
        found = collect_init_arguments(self, frame)
        left_out = {ignore} if isinstance(ignore, str) else set(ignore or ())
        found = {name: value for name, value in found.items() if name not in left_out}
        name = "kwargs"
        if len(args) == 1 and not isinstance(args[0], str):
            whole = as_mapping(args[0])
            if whole is None:
                raise ConfigError(
                    "save_hyperparameters(x): expected names of arguments, or one Namespace, dict or "
                    f"dataclass, found {type(args[0]).__name__}."
                )
            name = next((key for key, value in found.items() if value is args[0]), "kwargs")
            values = {key: value for key, value in whole.items() if key not in left_out}
        elif args:
            wrong = [
                arg for arg in args if not isinstance(arg, str) or (arg not in found and arg not in left_out)
            ]
            if wrong:
                raise ConfigError(
                    f"save_hyperparameters({', '.join(map(repr, args))}): {wrong[0]!r} is not an argument of "
                    f"{type(self).__name__}.__init__, which takes {sorted(found)}."
                )
            values = {arg: found[arg] for arg in args if arg in found}
        else:
            values = found
        self._hparams_name = name
        self._log_hyperparams = logger
        self._hparams = AttributeDict(values)
        try:
            self._hparams_initial = copy.deepcopy(self._hparams)
        except (
            Exception
        ):  # an argument that cannot be copied, such as an open file, is still a hyperparameter
            self._hparams_initial = AttributeDict(values)

    @property
    def hparams(self) -> AttributeDict:
        """The hyperparameters; what you change here is in the next checkpoint."""
        if not hasattr(self, "_hparams"):
            self._hparams = AttributeDict()
        return self._hparams

    @property
    def hparams_initial(self) -> AttributeDict:
        """The hyperparameters as they were when ``save_hyperparameters`` was called."""
        return copy.deepcopy(self._hparams_initial) if hasattr(self, "_hparams_initial") else AttributeDict()


def instantiate(
    cls: type[Any], saved: Mapping[str, Any], name: str | None, overrides: Mapping[str, Any]
) -> Any:
    """Build ``cls`` from saved hyperparameters and overrides, less what ``__init__`` does not take.

    Args:
        cls: The class to build.
        saved: The checkpoint's ``hyper_parameters``.
        name: Its ``hparams_name``: the argument that takes them all as one object, or "kwargs".
        overrides: Arguments given by the caller.

    Raises:
        CheckpointIncompatible: ``__init__`` wants an argument that is neither saved nor given.
    """
    from holdfast.errors import CheckpointIncompatible

    parameters = inspect.signature(cls.__init__).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    values: dict[str, Any] = dict(saved)
    if name and name != "kwargs" and name in parameters:
        merged = AttributeDict(values)
        merged.update({key: value for key, value in overrides.items() if key not in parameters})
        values = {name: merged}
        values.update({key: value for key, value in overrides.items() if key in parameters})
    else:
        values.update(overrides)
        if not takes_any:
            values = {key: value for key, value in values.items() if key in parameters}
    missing = [
        p.name
        for i, p in enumerate(parameters.values())
        if i > 0
        and p.default is p.empty
        and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        and p.name not in values
    ]
    if missing:
        raise CheckpointIncompatible(
            f"{cls.__name__}.load_from_checkpoint: __init__ needs {', '.join(map(repr, missing))}, which the "
            f"checkpoint's hyperparameters {sorted(map(str, saved))} do not hold. Give it as a keyword "
            f"argument, or call self.save_hyperparameters() in __init__ before training."
        )
    return cls(**values)
