"""Tensors whose slots are sharded over ranks, as `fully_shard` shards parameters.

All functions also accept plain tensors, so callers need not distinguish the two.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs


def is_sharded(tensor: Tensor) -> TypeIs[DTensor]:
    """Return whether the tensor is a `DTensor`, distributed over ranks.

    >>> is_sharded(torch.zeros(3))
    False
    """
    # Importing the module takes half a second, and before it is imported no DTensor exists.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """Return the part of a tensor on this rank, sharing its memory."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        part: Tensor = tensor.to_local()
    return part


def local_slots(tensor: Tensor) -> slice:
    """Return the slots, along the first dimension of a tensor, that are on this rank.

    Raises:
        ValueError: if the tensor is sharded along another dimension.

    >>> local_slots(torch.zeros(3, 16, 16))
    slice(0, 3, None)
    """
    if not is_sharded(tensor):
        return slice(0, tensor.shape[0])
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    check_whole_blocks(tensor)
    shape, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return slice(offset[0], offset[0] + shape[0])


def check_whole_blocks(tensor: Tensor) -> None:
    """Raise ValueError if the sharding of a tensor splits blocks between ranks."""
    if is_sharded(tensor):
        from torch.distributed.tensor import Replicate, Shard

        allowed = (Shard(0), Replicate())
        if any(placement not in allowed for placement in tensor.placements):
            raise ValueError(
                "`values` must be sharded by slots, so that every block is whole; got placements "
                f"{tensor.placements}. Call fully_shard without a shard_placement_fn for it."
            )


def gather_slots(part: Tensor, like: Tensor) -> Tensor:
    """Gather one number per slot from all ranks; if `like` is sharded, every rank must call this.

    Args:
        part: `[local slots]`, one number for each slot of `like` on this rank.
        like: `[slots, ...]`, the tensor whose slots `part` describes.

    Returns:
        `[slots]`.
    """
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor

    numbers = DTensor.from_local(
        part, like.device_mesh, like.placements, shape=torch.Size([like.shape[0]]), stride=(1,)
    )
    gathered: Tensor = numbers.full_tensor()
    return gathered


def gather_whole(tensor: Tensor) -> Tensor:
    """Gather a tensor from all ranks; if it is sharded, every rank must call this."""
    if not is_sharded(tensor):
        return tensor
    gathered: Tensor = tensor.full_tensor()
    return gathered


def to_local_slots(slots: Tensor, tensor: Tensor) -> Tensor:
    """Return the given slots that are on this rank, as indices into its local part.

    Args:
        slots: int64 `[n]`.
        tensor: `[slots, ...]`.

    Returns:
        int64 indices, on the device of the local part.
    """
    device = local_part(tensor).device
    if not is_sharded(tensor):
        return slots.to(device)
    local = local_slots(tensor)
    indices: Tensor = slots[(slots >= local.start) & (slots < local.stop)] - local.start
    return indices.to(device)
