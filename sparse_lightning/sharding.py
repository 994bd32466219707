"""Tensors by slot whose slots are spread over ranks, as `fully_shard` holds parameters.

Everything here leaves a plain tensor as it is, so that callers need not ask which one they have.
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
    """Tell whether ranks hold a part of the tensor each.

    >>> is_sharded(torch.zeros(3))
    False
    """
    # There is no such tensor before its module is imported, which takes half of a second.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor, sharing its memory."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        part: Tensor = tensor.to_local()
    return part


def local_slots(tensor: Tensor) -> slice:
    """Return which slots of a tensor, along its first dimension, this rank holds.

    Raises:
        ValueError: if it is cut along another dimension.

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
    """Raise ValueError if ranks hold parts of blocks."""
    if is_sharded(tensor):
        from torch.distributed.tensor import Replicate, Shard

        allowed = (Shard(0), Replicate())
        if any(placement not in allowed for placement in tensor.placements):
            raise ValueError(
                "`values` must be sharded by slots, so that every block is whole; got placements "
                f"{tensor.placements}. Call fully_shard without a shard_placement_fn for it."
            )


def all_slots(part: Tensor, like: Tensor) -> Tensor:
    """Return the numbers of all slots; of a sharded tensor, every rank must call this.

    Args:
        part: `[local slots]`, a number for each slot that this rank holds of `like`.
        like: `[slots, ...]`.

    Returns:
        `[slots]`.
    """
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor

    numbers = DTensor.from_local(
        part, like.device_mesh, like.placements, shape=torch.Size([like.shape[0]]), stride=(1,)
    )
    whole: Tensor = numbers.full_tensor()
    return whole


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor; of a sharded one, every rank must call this."""
    if not is_sharded(tensor):
        return tensor
    everything: Tensor = tensor.full_tensor()
    return everything


def at_local_slots(slots: Tensor, tensor: Tensor) -> Tensor:
    """Return, of some slots, those that this rank holds, counted from its first.

    Args:
        slots: int64 `[n]`.
        tensor: `[slots, ...]`.

    Returns:
        int64, on the device of what the rank holds.
    """
    device = local_part(tensor).device
    if not is_sharded(tensor):
        return slots.to(device)
    mine = local_slots(tensor)
    here: Tensor = slots[(slots >= mine.start) & (slots < mine.stop)] - mine.start
    return here.to(device)
