"""Where a checkpoint is read from: a path, a URL or an open file, each as one regular file on this machine.

What is not such a file already is first copied whole into an anonymous one in the directory for temporary
files (``TMPDIR``), which is gone when the reading ends, and with the process if that is killed.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import re
import shlex
import tempfile
from collections.abc import Iterator
from typing import IO, Any, NamedTuple, TypeAlias, cast

from holdfast.checkpoint import catalog, commit, directories
from holdfast.errors import (
    CheckpointError,
    CheckpointIncomplete,
    CheckpointNotFound,
    ConfigError,
    HoldfastError,
    StorageError,
)

Source: TypeAlias = "str | os.PathLike[str] | IO[bytes]"

SILENCE_S = 60.0
"""How long a server may say nothing before the download is given up."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.:-]*)://")
_PIECE_BYTES = 1 << 20


class Origin(NamedTuple):
    """An opened checkpoint."""

    name: str
    """What to call it in a message; for a file of this machine its path."""
    file: IO[bytes]
    """A regular file whose first byte is the checkpoint's."""
    local: bool
    """Whether ``name`` is a path, beside which other checkpoints may lie."""


def is_url(source: object) -> bool:
    """Whether it is text such as ``https://host/a.ckpt`` or ``s3://bucket/a.ckpt``; a Path never is."""
    return isinstance(source, str) and _SCHEME.match(source) is not None


def title(source: object) -> str:
    """What to call a source: its path as given, or a URL without what may be a secret in it."""
    if is_url(source):
        text = str(source)
        if text.startswith("file://"):
            return text.removeprefix("file://")
        return re.sub(r"//[^/@]*@", "//", text.partition("?")[0])
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    name = getattr(source, "name", None)
    return name if isinstance(name, str) else f"<{type(source).__name__}>"


@contextlib.contextmanager
def opened(source: Source) -> Iterator[Origin]:
    """Open a source for the length of a block.

    A file object is read from where it stands, and stands there again afterwards if it can be moved.

    Raises:
        CheckpointNotFound: there is no such file, or the server says so.
        CheckpointIncomplete: it is a directory, a pipe or the like.
        ConfigError: it is none of the three, a file opened in text mode, or fsspec does not know the scheme.
        StorageError: it cannot be fetched, or not whole, or there is no room to copy it to.
    """
    if hasattr(source, "read") and not isinstance(source, os.PathLike):
        with _whole_copy(source, title(source)) as file:
            yield Origin(title(source), file, local=False)
        return
    if not isinstance(source, (str, os.PathLike)):
        raise ConfigError(
            f"A checkpoint is read from a path, a URL or a file opened with mode 'rb', found "
            f"{type(source).__name__}."
        )
    if is_url(source) and not str(source).startswith("file://"):
        url = str(source)
        with _temporary(title(url)) as file:
            _fetch(url, file)
            yield Origin(title(url), file, local=False)
        return
    name = title(source)
    with open_local(name) as file:
        yield Origin(name, file, local=True)


def open_local(name: str) -> IO[bytes]:
    """Open a file of this machine.

    Raises:
        CheckpointNotFound: there is none; names the nearest names in that directory.
        CheckpointIncomplete: it is a directory or not a regular file.
    """
    try:
        at = directories.standing(name)
        if os.path.exists(at) and not os.path.isdir(at) and not os.path.isfile(at):
            # Opening a pipe would wait for somebody to write to it.
            raise CheckpointIncomplete(f"{name} is not a regular file, so not a checkpoint.", path=name)
        return open(at, "rb", buffering=0)
    except IsADirectoryError:
        raise CheckpointIncomplete(f"{name} is a directory, not a checkpoint file.", path=name) from None
    except FileNotFoundError:
        directory, wanted = os.path.split(os.path.abspath(name))
        if not os.path.isdir(directory):
            hint = f"There is no directory {directory} either."
        else:
            there = sorted(entry for entry in os.listdir(directory) if not entry.startswith("."))
            there = [entry for entry in there if entry.endswith(catalog.SUFFIX)] or [
                entry for entry in there if os.path.isfile(os.path.join(directory, entry))
            ]
            near = difflib.get_close_matches(wanted, there, n=3, cutoff=0.3) or there[:3]
            hint = "That directory has no checkpoints."
            if near:
                hint = f"The nearest names there: {', '.join(near)}."
        raise CheckpointNotFound(f"There is no checkpoint {name}. {hint}", path=name) from None


def newest_beside(name: str) -> str:
    """A line that names the newest whole checkpoint beside a file that is not, or nothing."""
    directory = os.path.dirname(os.path.abspath(name))
    try:
        for entry in catalog.scan(directory):
            if entry.whole and not entry.foreign and not os.path.samefile(entry.path, name):
                newest = f"Newest whole checkpoint in {directory}: {os.path.basename(entry.path)}."
                return f"\n{newest} Check them all: holdfast verify {shlex.quote(directory)}"
    except (CheckpointError, OSError):  # this is for the message of an error that says more
        pass
    return ""


# -- the copy ------------------------------------------------------------------------------------------------


def _temporary(name: str) -> IO[bytes]:
    try:
        return cast("IO[bytes]", tempfile.TemporaryFile(prefix="holdfast-", buffering=0))
    except OSError as error:
        raise _no_room(name, error) from error


def _put(piece: bytes, file: IO[bytes], name: str) -> None:
    try:
        commit.write_all(file.fileno(), piece)
    except OSError as error:
        raise _no_room(name, error) from error


def _no_room(name: str, error: OSError) -> StorageError:
    where = tempfile.tempdir or "the directory for temporary files"
    return StorageError(
        f"{name} cannot be copied to {where} to be read: {error.strerror}. Nothing was loaded. Set TMPDIR to "
        "a directory with room for it, or copy it to a file of this machine."
    )


# -- file objects --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _whole_copy(source: Any, name: str) -> Iterator[IO[bytes]]:
    if isinstance(source, io.TextIOBase):
        raise ConfigError(f"{name} is opened in text mode; a checkpoint is bytes: open it with mode 'rb'.")
    start = source.tell() if _seekable(source) else None
    try:
        with _temporary(name) as file:
            while piece := source.read(_PIECE_BYTES):
                if isinstance(piece, str):
                    raise ConfigError(f"{name} gives text; a checkpoint is bytes: open it with mode 'rb'.")
                _put(piece, file, name)
            yield file
    finally:
        if start is not None:
            source.seek(start)


def _seekable(source: Any) -> bool:
    return hasattr(source, "tell") and hasattr(source, "seekable") and bool(source.seekable())


# -- URLs ----------------------------------------------------------------------------------------------------


def _fetch(url: str, into: IO[bytes]) -> None:
    try:
        if url.lower().startswith(("http://", "https://")):
            _download(url, into)
        else:
            _through_fsspec(url, into)
    except HoldfastError:
        raise
    except Exception as error:  # each protocol, and each of fsspec's file systems, has errors of its own
        reason = getattr(error, "reason", None) or error
        raise StorageError(f"{title(url)} cannot be fetched: {reason}. Nothing was loaded.") from error


def _download(url: str, into: IO[bytes]) -> None:
    import http.client
    import urllib.error
    import urllib.parse
    import urllib.request

    if "@" in urllib.parse.urlsplit(url).netloc:
        raise ConfigError(
            f"{title(url)} was given with a user name or a password, which is not sent: leave it out, or "
            "download the file first."
        )
    request = urllib.request.Request(url, headers={"User-Agent": "holdfast"})
    expected: int | None = None
    try:
        with urllib.request.urlopen(request, timeout=SILENCE_S) as answer:
            said = answer.headers.get("Content-Length")
            expected = int(said) if said is not None and said.isdigit() else None
            while piece := answer.read(_PIECE_BYTES):
                _put(piece, into, title(url))
    except urllib.error.HTTPError as error:
        with error:
            text = f"{title(url)}: the server answers {error.code} {error.reason}."
        if error.code in (404, 410):
            raise CheckpointNotFound(f"There is no checkpoint at {text}") from None
        raise StorageError(f"{text} Nothing was loaded.") from None
    except http.client.InvalidURL:  # whose text has the secrets of the address in it
        raise ConfigError(f"{title(url)} is not a valid address: write a space as %20.") from None
    except (http.client.IncompleteRead, ConnectionError) as error:
        if not into.tell() and not isinstance(error, http.client.IncompleteRead):
            raise
        partial = len(error.partial) if isinstance(error, http.client.IncompleteRead) else 0
        raise _cut_short(url, into.tell() + partial, expected) from error
    if expected is not None and into.tell() != expected:
        raise _cut_short(url, into.tell(), expected)


def _cut_short(url: str, got: int, expected: int | None) -> StorageError:
    whole = "" if expected is None else f" of {expected}"
    return StorageError(
        f"{title(url)}: the connection ended after {got}{whole} bytes. Nothing was loaded; try again."
    )


def _through_fsspec(url: str, into: IO[bytes]) -> None:
    scheme = url.partition("://")[0]
    try:
        import fsspec  # type: ignore[import-untyped]
    except ImportError:
        raise ConfigError(
            f"Reading from {scheme}:// needs the package fsspec, which is not installed: pip install fsspec"
        ) from None
    try:
        system, path = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:  # an unknown scheme, or one whose package is missing
        raise ConfigError(f"fsspec cannot read from {scheme}://: {error}") from error
    try:
        with system.open(path, "rb") as remote:
            while piece := remote.read(_PIECE_BYTES):
                _put(piece, into, title(url))
    except FileNotFoundError:
        raise CheckpointNotFound(f"There is no checkpoint {title(url)}.") from None
    expected = system.size(path)
    if expected is not None and expected != into.tell():
        raise _cut_short(url, into.tell(), expected)
