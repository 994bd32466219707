"""The slots of a rank, against hand-computed ones on a fake process group.

test_fsdp.py tests real ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from sparse_lightning.sharding import (
    check_whole_blocks,
    gather_slots,
    gather_whole,
    is_sharded,
    local_part,
    local_slots,
    to_local_slots,
)

Make = Callable[[int, int, Placement], DTensor]


@pytest.fixture
def sharded() -> Iterator[Make]:
    """Return a function that makes a tensor of 2 x 2 blocks as seen by one of two ranks."""

    def make(rank: int, slots: int, placement: Placement) -> DTensor:
        dist.init_process_group("fake", rank=rank, world_size=2, store=FakeStore())
        mesh = dist.init_device_mesh("cpu", (2,))
        first, last = torch.arange(slots).chunk(2) if slots > 1 else (torch.arange(1), None)
        mine = (first, torch.arange(0) if last is None else last)[rank]
        part = mine if placement == Shard(0) else torch.arange(slots)
        local = part.float().view(-1, 1, 1).expand(-1, 2, 2).contiguous()
        shape = torch.Size([slots, 2, 2])
        return DTensor.from_local(local, mesh, [placement], shape=shape, stride=(4, 2, 1))

    yield make
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("rank", "slots", "mine"),
    [(0, 9, (0, 5)), (1, 9, (5, 9)), (0, 8, (0, 4)), (1, 8, (4, 8)), (1, 1, (1, 1))],
)
def test_the_slots_of_a_rank(sharded: Make, rank: int, slots: int, mine: tuple[int, int]) -> None:
    tensor = sharded(rank, slots, Shard(0))
    assert is_sharded(tensor) and local_slots(tensor) == slice(*mine)
    assert local_part(tensor)[:, 0, 0].tolist() == [*range(*mine)]
    wanted = torch.tensor([0, 3, 4, 5, 8])
    expected = [slot - mine[0] for slot in wanted.tolist() if mine[0] <= slot < mine[1]]
    assert to_local_slots(wanted, tensor).tolist() == expected


def test_writes_to_the_local_part_change_the_tensor(sharded: Make) -> None:
    tensor = sharded(1, 9, Shard(0))
    local_part(tensor).index_fill_(0, to_local_slots(torch.tensor([2, 6]), tensor), -1.0)
    assert tensor.to_local()[:, 1, 1].tolist() == [5, -1, 7, 8]


def test_replicas_hold_all_slots(sharded: Make) -> None:
    assert local_slots(sharded(1, 9, Replicate())) == slice(0, 9)


def test_sharding_within_blocks_is_refused(sharded: Make) -> None:
    tensor = sharded(0, 4, Shard(1))
    for refused in (check_whole_blocks, local_slots):
        with pytest.raises(ValueError, match=r"`values` must be sharded by slots.*Shard\(dim=1\)"):
            refused(tensor)


def test_plain_tensors_are_returned_unchanged() -> None:
    tensor = torch.rand(3, 2, 2)
    assert local_part(tensor) is tensor and gather_whole(tensor) is tensor
    numbers = torch.rand(3)
    assert gather_slots(numbers, tensor) is numbers
    assert to_local_slots(torch.tensor([2, 0]), tensor).tolist() == [2, 0]
    check_whole_blocks(tensor)
