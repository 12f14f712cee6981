"""Ways to save and to load one state: holdfast's, its peers', and what the disk allows."""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from states import flat

BLOCK_BYTES = 8 << 20
PAGE_BYTES = 4096

Save = Callable[[dict[str, Any], Path], None]


def fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_all(path: Path) -> None:
    """Make a file, or all files of a directory, durable, as those have to who save with what does not."""
    for found in [path, *path.rglob("*")] if path.is_dir() else [path]:
        fsync(found)
    fsync(path.parent)


class RawWrites:
    """The same number of bytes from memory that is warm already, in the two ways that the system has."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = -(-size_bytes // PAGE_BYTES) * PAGE_BYTES
        self.buffer = mmap.mmap(-1, self.size_bytes)
        block = os.urandom(1 << 20)
        for at in range(0, self.size_bytes, len(block)):
            self.buffer[at : at + len(block)] = block[: self.size_bytes - at]

    def direct(self, state: dict[str, Any], path: Path) -> None:
        self._write(path, os.O_DIRECT)

    def buffered(self, state: dict[str, Any], path: Path) -> None:
        self._write(path, 0)

    def _write(self, path: Path, flags: int) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | flags, 0o666)
        view = memoryview(self.buffer)
        try:
            for at in range(0, self.size_bytes, BLOCK_BYTES):
                os.pwrite(fd, view[at : at + BLOCK_BYTES], at)
            os.fsync(fd)
        finally:
            os.close(fd)
        fsync(path.parent)


def holdfast(state: dict[str, Any], path: Path) -> None:
    from holdfast.checkpoint.engine import CheckpointEngine

    CheckpointEngine().save(state, path)


def torch_save(state: dict[str, Any], path: Path) -> None:
    torch.save(state, path)
    fsync_all(path)


def torch_save_no_fsync(state: dict[str, Any], path: Path) -> None:
    torch.save(state, path)


def safetensors_save(state: dict[str, Any], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(flat(state), path)
    fsync_all(path)


def dcp_save(state: dict[str, Any], path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    with quiet():
        dcp.save(state, storage_writer=dcp.FileSystemWriter(path, sync_files=True), no_dist=True)
    fsync_all(path)


def torchsnapshot_save(state: dict[str, Any], path: Path) -> None:
    with quiet():
        import torchsnapshot

        torchsnapshot.Snapshot.take(str(path), {"state": torchsnapshot.StateDict(**state)})
    fsync_all(path)


def lightning_save(state: dict[str, Any], path: Path) -> None:
    from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

    TorchCheckpointIO().save_checkpoint(state, path)
    fsync_all(path)


@contextlib.contextmanager
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def one_process_group() -> None:
    """What torch's asynchronous saving needs, even in one process."""
    import torch.distributed as dist

    if not dist.is_initialized():
        store = dist.HashStore()
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)


# -- in the background: each returns what waits until the checkpoint is durable ------------------------------


class Holdfast:
    """The engine as a training run uses it: weights and optimizer state may be copied late."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        from holdfast.checkpoint.engine import CheckpointEngine

        self.engine = CheckpointEngine()
        self.late = list(module.parameters())
        self.late += [t for one in optimizer.state.values() for t in one.values() if t.numel() > 1]

    def save(self, state: dict[str, Any], path: Path) -> Callable[[], None]:
        pending = self.engine.save_in_background(state, path, late=self.late)

        def wait() -> None:
            pending.wait()

        return wait

    def before_step(self) -> None:
        self.engine.wait_for_copy()

    def close(self) -> None:
        self.engine.close()


class Dcp:
    """`torch.distributed.checkpoint.async_save`, as it comes or with the stager that overlaps."""

    def __init__(self, *, overlapping: bool) -> None:
        self.overlapping = overlapping
        self.stager: Any = None
        self.staged: Any = None

    def save(self, state: dict[str, Any], path: Path) -> Callable[[], None]:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        one_process_group()
        if self.overlapping and self.stager is None:
            # The two that need CUDA are off; staging in a thread of its own is what overlaps.
            options = StagingOptions(
                use_pinned_memory=False,
                use_shared_memory=False,
                use_async_staging=True,
                use_non_blocking_copy=False,
            )
            self.stager = DefaultStager(options)
        with quiet():
            answer = dcp.async_save(
                state,
                storage_writer=dcp.FileSystemWriter(path, sync_files=True),
                async_stager=self.stager,
            )
        self.staged = getattr(answer, "staging_completion", None)
        done = getattr(answer, "upload_completion", answer)

        def wait() -> None:
            done.result()
            fsync_all(path)

        return wait

    def before_step(self) -> None:
        if self.staged is not None:
            self.staged.result()

    def close(self) -> None:
        if self.stager is not None:
            self.stager.close()


class Torchsnapshot:
    def save(self, state: dict[str, Any], path: Path) -> Callable[[], None]:
        with quiet():
            import torchsnapshot

            pending = torchsnapshot.Snapshot.async_take(
                str(path), {"state": torchsnapshot.StateDict(**state)}
            )

        def wait() -> None:
            pending.wait()
            fsync_all(path)

        return wait

    def before_step(self) -> None:
        pass

    def close(self) -> None:
        pass


class LightningAsync:
    """Lightning's AsyncCheckpointIO around its usual one."""

    def save(self, state: dict[str, Any], path: Path) -> Callable[[], None]:
        from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

        plugin = AsyncCheckpointIO(TorchCheckpointIO())
        plugin.save_checkpoint(state, path)

        def wait() -> None:
            plugin.teardown()
            fsync_all(path)

        return wait

    def before_step(self) -> None:
        pass

    def close(self) -> None:
        pass


def installed(name: str) -> bool:
    return find_spec(name) is not None


def remove(path: Path) -> None:
    """Delete it, and let the disk come to rest: nobody shall pay for what another one left to be written."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    os.sync()
