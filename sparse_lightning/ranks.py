"""Communication between the ranks of a training, through `torch.distributed`.

Without an initialised process group there is one rank, and nothing is communicated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def world_size() -> int:
    """Return the number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_rank_zero() -> bool:
    """Return whether this is rank 0, the only rank that warns."""
    return world_size() == 1 or dist.get_rank() == 0


def broadcast_from_rank_zero(value: T) -> T:
    """Return the value that rank 0 passed; every rank must call this.

    Args:
        value: any object that can be pickled.
    """
    if world_size() == 1:
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all ranks; every rank must call this."""
    if world_size() == 1:
        return tensor
    total = tensor.contiguous().clone()
    dist.all_reduce(total)
    return total


def any_over_ranks(flags: Sequence[bool], device: torch.device) -> list[bool]:
    """Return which flags are set on at least one rank; every rank must call this.

    Args:
        flags: flags of this rank; their number is the same on every rank.
        device: a device on which the process group can reduce.
    """
    if world_size() == 1:
        return list(flags)
    counts = torch.tensor(flags, dtype=torch.float32, device=device)
    return [count > 0 for count in sum_over_ranks(counts).tolist()]


def check_identical(tensors: Iterable[Tensor], step: int, device: torch.device) -> None:
    """Raise RuntimeError on every rank unless all ranks pass equal tensors; all must call this.

    Args:
        tensors: tensors that must be equal bit for bit on all ranks.
        step: step to name in the error.
        device: a device on which the process group can reduce.
    """
    if world_size() == 1:
        return
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().numpy().tobytes())
    own = int.from_bytes(digest.digest()[:8], "little") >> 1
    # One reduction yields the largest digest and, by its negative, the smallest. So every rank
    # raises, and none is left waiting for a rank that has stopped.
    both = torch.tensor([own, -own], device=device)
    dist.all_reduce(both, dist.ReduceOp.MAX)
    largest, smallest = both.tolist()
    if largest != -smallest:
        raise RuntimeError(
            "All ranks must hold the same blocks and compute the same scores; they differ at step "
            f"{step} (detected on rank {dist.get_rank()}). Look for what differs between ranks: "
            "weights changed outside of the optimizer, or a criterion that draws random numbers "
            "without `scores.generator`. Resume from the last checkpoint."
        )
