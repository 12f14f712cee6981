"""A rank's part of a tensor: cut out of the whole, copied to the host, compared with the others'."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, sharing its memory; any other tensor itself."""
    from torch.distributed.tensor import DTensor

    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def with_local(part: Tensor, mesh: Any, placements: Any, shape: Any) -> Tensor:
    """A DTensor whose part on this rank is ``part``, wherever that is.

    Args:
        part: This rank's part.
        mesh: The ranks.
        placements: How the tensor is spread over them.
        shape: Of the whole tensor.
    """
    from torch.distributed.tensor import DTensor

    stride = torch.empty(tuple(shape), device="meta").stride()
    # from_local would move the part to the mesh's kind of device.
    made: Any = DTensor.from_local(
        torch.empty_like(part, device=mesh.device_type) if part.device.type != mesh.device_type else part,
        mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride,
    )  # fmt: skip
    made._local_tensor = part
    return made  # type: ignore[no-any-return]


def empty_part(shape: Any, dtype: torch.dtype, like: Tensor) -> Tensor:
    """A DTensor without values, spread over the ranks as ``like`` is."""
    sizes, _ = _place(shape, like)
    part = torch.empty(sizes, dtype=dtype, device=local(like).device)
    return with_local(part, like.device_mesh, like.placements, shape)  # type: ignore[attr-defined]


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """A DTensor spread as ``like`` is, whose part on this rank shares the memory of the whole tensor."""
    sizes, begin = _place(whole.shape, like)
    box = tuple(slice(at, at + size) for at, size in zip(begin, sizes, strict=True))
    part = whole.detach()[box]
    return with_local(part, like.device_mesh, like.placements, whole.shape)  # type: ignore[attr-defined]


def _place(shape: Any, like: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    sizes, begin = compute_local_shape_and_global_offset(tuple(shape), mesh, placements)
    return tuple(sizes), tuple(begin)


def is_like(shape: Any, live: Any) -> bool:
    """Whether a tensor of this shape belongs to a sharded one, and is to be spread in the same way."""
    from torch.distributed.tensor import DTensor

    return isinstance(live, DTensor) and tuple(shape) == tuple(live.shape)


def digest(tensors: Iterable[Tensor]) -> bytes:
    """A checksum of shapes, dtypes and values."""
    found = hashlib.blake2b(digest_size=16)
    for one in tensors:
        here = one.detach().cpu().contiguous()
        found.update(f"{tuple(here.shape)} {here.dtype};".encode())
        if here.numel():
            found.update(here.reshape(-1).view(torch.uint8).numpy().data)
    return found.digest()


class HostCopies:
    """Copies of tensors in the host's memory, which is used again for the next ones.

    Memory: this rank's parts, from the first copy until `clear`.
    """

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    def of(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors as they are now; of a DTensor, this rank's part. Two names of one tensor stay one.

        What was returned before is written over.
        """
        memory: dict[str, Tensor] = {}
        done: dict[Any, Tensor] = {}
        found: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            live = local(tensor.detach())
            who = (live.data_ptr(), live.shape, live.stride(), live.dtype, live.device, tensor.shape)
            if live.numel() and who in done:
                found[key] = done[who]
                continue
            copy = self._memory.get(key)
            if copy is None or copy.shape != live.shape or copy.dtype != live.dtype:
                copy = torch.empty(live.shape, dtype=live.dtype)
            memory[key] = copy.copy_(live)
            made = copy
            if live is not tensor and hasattr(tensor, "placements"):
                made = with_local(copy, tensor.device_mesh, tensor.placements, tensor.shape)  # type: ignore[attr-defined]
            found[key] = done[who] = made
        self._memory = memory
        return found

    def clear(self) -> None:
        """Let go of the memory."""
        self._memory = {}
