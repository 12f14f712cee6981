"""Loggers that write into ``<save_dir>/<name>/version_N``: which directory that is."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import Any

from holdfast.checkpoint import commit
from holdfast.errors import ConfigError
from holdfast.loggers.base import Logger


class VersionedLogger(Logger):
    """A logger with a local directory of its own for each run of an experiment.

    Args:
        save_dir: The directory under which everything is written; ``~`` and ``$NAME`` are expanded.
        name: The experiment's directory; None or "" leaves that level out.
        version: Which run of the experiment: a number for ``version_N``, a string as it is. Default: the
            next free number, chosen when first needed.
        prefix: Put before every metric's name, with a "-".

    Raises:
        ConfigError: ``save_dir`` is an address, not a local directory.
    """

    LOGGER_JOIN_CHAR = "-"

    def __init__(
        self,
        save_dir: str | os.PathLike[str],
        name: str | None,
        version: int | str | None,
        prefix: str,
    ) -> None:
        directory = expanded(save_dir)
        if "://" in directory:
            raise ConfigError(
                f"{type(self).__name__}(save_dir={directory!r}) is not a local directory: give one, and copy "
                "what is in it."
            )
        self._save_dir = directory
        self._name = name or ""
        self._version = version
        self._named = version is not None
        self._prefix = prefix

    @property
    def name(self) -> str:
        """The experiment's name; "" when it has no directory of its own."""
        return self._name

    @property
    def version(self) -> int | str:
        """This run's version: given, resumed in, or the next free number."""
        if self._version is None:
            self._version = _next_version(self.root_dir)
        return self._version

    @property
    def save_dir(self) -> str:
        """The directory that was given."""
        return self._save_dir

    @property
    def root_dir(self) -> str:
        """``<save_dir>/<name>``: the directory of all versions."""
        return os.path.join(self._save_dir, self._name) if self._name else self._save_dir

    @property
    def log_dir(self) -> str:
        """``<save_dir>/<name>/version_N``, or ``.../<version>`` for a version that is a string."""
        version = self.version
        return os.path.join(self.root_dir, version if isinstance(version, str) else f"version_{version}")

    def take_version(self, version: int | str | None) -> None:
        """Be told, on another rank than 0, which version rank 0 writes."""
        self._version = version

    def continues(self, state_dict: Mapping[str, Any]) -> bool:
        """Tell whether the version was named by the user, and begins with what ``state_dict`` counts on."""
        return self._named and self._begins_with(state_dict)

    def _begins_with(self, state_dict: Mapping[str, Any]) -> bool:
        return False

    def _place(self) -> dict[str, Any]:
        """Return the part of the state that says where this logger writes."""
        return {"version": self.version, "name": self.name, "log_dir": os.path.realpath(self.log_dir)}

    def _prefixed(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        if not self._prefix:
            return dict(metrics)
        return {f"{self._prefix}{self.LOGGER_JOIN_CHAR}{name}": value for name, value in metrics.items()}

    def _number(self, name: str, value: Any) -> Any:
        """Return ``value``, or the one number in it where it is a tensor or a NumPy value.

        Raises:
            ConfigError: it holds several numbers.
        """
        # Both libraries' values have it, so neither needs to be imported.
        if not hasattr(value, "item"):
            return value
        try:
            return value.item()
        except (RuntimeError, ValueError) as error:
            shape = tuple(getattr(value, "shape", ()))
            raise ConfigError(
                f"{type(self).__name__}.log_metrics: {name!r} is a {type(value).__name__} of shape {shape}. "
                "A metric is one number: reduce it, or log its elements under names of their own."
            ) from error


def expanded(path: str | os.PathLike[str]) -> str:
    """Return the path with the home directory and environment variables put in."""
    return os.path.expandvars(os.path.expanduser(os.fspath(path).removeprefix("file://")))


def sync_file(path: str) -> None:
    """Have what was written to the file on disk; one that is gone is passed over.

    Raises:
        StorageError: the disk refused.
    """
    with contextlib.suppress(FileNotFoundError):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        except OSError as error:
            raise commit.storage_error(path, "fsync", error) from error
        finally:
            os.close(descriptor)


def _next_version(root_dir: str) -> int:
    if not os.path.isdir(root_dir):
        return 0
    numbers = [
        int(entry.name.removeprefix("version_"))
        for entry in os.scandir(root_dir)
        if entry.name.startswith("version_")
        and entry.name.removeprefix("version_").isdecimal()
        and entry.is_dir()
    ]
    return max(numbers, default=-1) + 1
