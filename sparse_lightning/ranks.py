"""What the ranks of a training tell each other, by `torch.distributed` where it is initialised.

Without a process group there is one rank, and everything here leaves its arguments as they are.
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


def is_first() -> bool:
    """Whether this is rank 0, which is the one that speaks to people."""
    return world_size() == 1 or dist.get_rank() == 0


def of_rank_zero(own: T) -> T:
    """Return what rank 0 passed; every rank must call this.

    Args:
        own: anything that can be pickled.
    """
    if world_size() == 1:
        return own
    holder = [own]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Return the sum of the tensors that the ranks pass; every rank must call this."""
    if world_size() == 1:
        return tensor
    total = tensor.contiguous().clone()
    dist.all_reduce(total)
    return total


def on_any_rank(flags: Sequence[bool], device: torch.device) -> list[bool]:
    """Return which flags one of the ranks has set; every rank must call this.

    Args:
        flags: as many on every rank.
        device: where the process group can reduce.
    """
    if world_size() == 1:
        return list(flags)
    counts = torch.tensor(flags, dtype=torch.float32, device=device)
    return [count > 0 for count in sum_over_ranks(counts).tolist()]


def check_alike(tensors: Iterable[Tensor], step: int, device: torch.device) -> None:
    """Raise RuntimeError on every rank unless all pass the same; every rank must call this.

    Args:
        tensors: what has to be the same.
        step: for the error.
        device: where the process group can reduce.
    """
    if world_size() == 1:
        return
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().numpy().tobytes())
    own = int.from_bytes(digest.digest()[:8], "little") >> 1
    # The largest, and the smallest by its negative, in one go: every rank knows, and none waits for
    # one that has stopped.
    both = torch.tensor([own, -own], device=device)
    dist.all_reduce(both, dist.ReduceOp.MAX)
    largest, smallest = both.tolist()
    if largest != -smallest:
        raise RuntimeError(
            "All ranks must hold the same blocks, and score them alike; they differ at step "
            f"{step} (seen on rank {dist.get_rank()}). Look for what differs between ranks: "
            "weights changed outside of the optimizer, or a criterion that draws numbers without "
            "`scores.generator`. Resume from the last checkpoint."
        )
