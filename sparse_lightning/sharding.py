"""Tensors whose slots are sharded over ranks, as `fully_shard` shards parameters.

All functions also accept plain tensors, so callers need not distinguish the two.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparse_lightning.nm_pattern import Moves, moved_pairs, pairs_of

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


@torch.no_grad()
def prepare_slot_change(
    tensor: Tensor, slots: Tensor, moves: Moves | None = None, start: float = 0.0
) -> Callable[[], None]:
    """Return a function that resets some slots of a tensor, and moves weights within others.

    The returned function only writes in place.

    Args:
        tensor: `[slots, ...]`; of the shape of `values` if there are moves.
        slots: int64 `[n]`, slots to reset.
        moves: moves of weights within slots that are not reset.
        start: content of the slots that are reset, and of new weights.
    """
    part, indices = local_part(tensor), to_local_slots(slots, tensor)
    moved = None
    if moves is not None and len(moves.groups):
        local = _to_local_moves(moves, tensor)
        moved = (*pairs_of(part, local), moved_pairs(part, local, start))

    @torch.no_grad()
    def write() -> None:
        # `part[indices] = start` would synchronise with the GPU.
        part.index_fill_(0, indices, start)
        if moved is not None:
            pairs, index, content = moved
            pairs.index_put_(index, content)

    return write


def _to_local_moves(moves: Moves, tensor: Tensor) -> Moves:
    """Return the moves in the local part of a tensor, on its device."""
    device = local_part(tensor).device
    if not is_sharded(tensor):
        return Moves(*(part.to(device) for part in moves))
    slots, groups_per_slot = local_slots(tensor), tensor.shape[1] * tensor.shape[2] // 2
    first, end = slots.start * groups_per_slot, slots.stop * groups_per_slot
    is_local = (moves.groups >= first) & (moves.groups < end)
    local = Moves(moves.groups[is_local] - first, moves.sources[is_local])
    return Moves(*(part.to(device) for part in local))
